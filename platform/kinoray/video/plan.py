"""Which packets must be decoded for the frames that are wanted: arithmetic on packet times and flags, no codec.

Packets come in decoding order, frames in the order they are shown; B-frames make the two differ. The easy mistake is
to start a group of pictures too late: frames shown before their group's key frame ("leading", in open groups) may
refer to the group before, so that one has to be decoded as well.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

__all__ = ["FrameSink", "PacketTable", "Reading", "Run", "comes_evenly", "frame_times", "jumps_closed"]

_MAX_REORDER = 64
"""No codec holds back more frames than this (H.264 and HEVC: 16): packets farther out of order have wrong times."""
_JUMP_S = (-0.1, 10.0)
"""Steps of the decoding time beyond these are jumps of the clock, as ffmpeg has it (dts_delta_threshold)."""
_SLOW = 10
"""Times the usual step that a step may have and is no jump: in a slide show of a picture a minute, a minute is real."""
_HELD = 16
"""Frames by which a picture is shown earlier at most: in files that call every packet a key frame, no jump is less."""
_EVEN = (0.25, 0.002)
"""Frames come evenly where none is farther from its place than this share of a frame or, if that is more, this many
seconds: Matroska and FLV round to milliseconds, and film at 60 Hz is shown for 2 and 3 fields in turn."""


class FrameSink(Protocol):
    """Where a back end puts the wanted frames."""

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) to which a frame that is shown as width x height has to be scaled."""

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Take one scaled frame: red, green and blue, uint8 [height, width] each. May come twice; the last counts."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of reading the wanted frames."""

    frames_decoded: int
    """Frames that the decoder gave, wanted or not."""
    frames_corrupt: int
    """Distinct frames that the decoder refused or flagged as damaged, that were wanted and had to be replaced, or that
    come before the first key frame and so cannot be decoded."""


@dataclass(frozen=True, slots=True)
class Run:
    """Packets begin .. end - 1 go to the decoder one after the other; before and after, its memory is cleared."""

    begin: int
    end: int


class PacketTable:
    """The packets of one video stream, in decoding order, and the number of the frame that each one carries.

    `frame_of`, int64 [P]: place of the packet's frame in the order of showing; -1 where no frame comes out (hidden by
    an edit list, or before the first key frame; `num_headless` counts the latter). `timed`: times tell the frames
    apart; where they do not (AVI), frames can only be counted as they come out of the decoder.
    """

    def __init__(self, pts: list[int | None], keyframe: np.ndarray, shown: np.ndarray, *, times_stored: bool) -> None:
        keys = np.flatnonzero(keyframe)
        self._keys = keys if len(keys) else np.zeros(min(1, len(pts)), np.int64)
        self.shown = shown.copy()
        self.shown[: self._keys[0] if len(keys) else 0] = False
        self.num_headless = int(shown.sum() - self.shown.sum())
        times = np.array([-1 if value is None else value for value in pts], np.int64)
        places = np.flatnonzero(self.shown)
        order = places[np.argsort(times[places], kind="stable")]
        self.frame_of = np.full(len(pts), -1, np.int64)
        self.frame_of[order] = np.arange(len(order))
        self.timed = (
            times_stored
            and not any(value is None for value in pts)
            and bool((np.diff(times[order]) > 0).all())
            and bool((np.abs(self.frame_of[places] - np.arange(len(places))) <= _MAX_REORDER).all())
        )
        self._times = times

    @property
    def num_frames(self) -> int:
        """Frames that the packets promise."""
        return int(self.shown.sum())

    @property
    def num_packets(self) -> int:
        """Packets, with those that show nothing."""
        return len(self.frame_of)

    @property
    def num_keyframes(self) -> int:
        """Packets at which decoding can begin; 1 where none is marked."""
        return len(self._keys)

    def index_of_time(self) -> dict[int, int]:
        """From a frame's time (pts) to its number; -1 for the times of frames that are not shown."""
        numbers = dict(zip(self._times.tolist(), self.frame_of.tolist(), strict=True))
        places = np.flatnonzero(self.shown)
        return numbers | dict(zip(self._times[places].tolist(), self.frame_of[places].tolist(), strict=True))

    def wanted_packets(self, wanted: np.ndarray) -> np.ndarray:
        """bool [P]: the packet carries one of the wanted frames."""
        return np.isin(self.frame_of, wanted)

    def runs_for(self, wanted: np.ndarray) -> list[Run]:
        """The fewest whole stretches of packets from which a codec with key frames decodes the wanted frames exactly.

        Each begins at a key frame and ends with the last wanted packet that needs it.
        """
        is_wanted = self.wanted_packets(wanted)
        bounds = [*self._keys.tolist(), self.num_packets]
        runs: list[Run] = []
        for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
            hits = np.flatnonzero(is_wanted[begin:end])
            if not len(hits):
                continue
            last = begin + int(hits[-1]) + 1
            leading = bool((self._times[begin + hits] < self._times[begin]).any())
            if leading and group > 0:
                begin = bounds[group - 1]
            if runs and begin < runs[-1].end:
                runs[-1] = Run(runs[-1].begin, last)
            else:
                runs.append(Run(begin, last))
        return runs

    def runs_in_order(self, wanted: np.ndarray) -> list[Run]:
        """One stretch from the first packet to the last that carries a wanted frame."""
        hits = np.flatnonzero(self.wanted_packets(wanted))
        return [Run(0, int(hits[-1]) + 1)] if len(hits) else []


def jumps_closed(
    pts: Sequence[int | None],
    dts: Sequence[int | None],
    durations: Sequence[int | None],
    keyframe: Sequence[bool],
    unit: Fraction,
    *,
    ahead: bool,
) -> np.ndarray | None:
    """What to add to the times of each packet, int64 [P], so that the clock does not jump; None where it does not.

    A stretch between two jumps begins when the one before it ends: recordings joined end to end, a clock that wraps.

    Args:
        ahead: jumps may lead forward, and the container stores decoding times, as MPEG-TS. In others a gap is a picture
            that stays, and a jump is a key frame that is shown before what precedes it.
    """
    known = np.flatnonzero([value is not None for value in dts])
    steps: np.ndarray = np.diff(np.array([value for value in dts if value is not None], np.int64))
    packets = np.diff(known)
    forward = steps > 0
    if not forward.any():
        return None
    usual = float(np.median(steps[forward] / packets[forward]))
    back, far = (seconds / float(unit) for seconds in _JUMP_S)
    if ahead:
        jumps = np.flatnonzero((steps < back) | (steps > max(far, _SLOW * usual)))
        starts, untimed = known[jumps + 1], packets[jumps] - 1
    else:
        starts = np.array(_steps_back(pts, keyframe, min(back, -_HELD * usual)), np.int64)
        untimed = np.zeros(len(starts), np.int64)
    if not len(starts):
        return None
    starts = np.append(0, starts)
    largest = np.iinfo(np.int64).max // 4
    begins = np.minimum.reduceat(np.array([largest if value is None else value for value in pts], np.int64), starts)
    ends = [-largest if at is None else at + (last or int(usual)) for at, last in zip(pts, durations, strict=True)]
    lengths = np.maximum.reduceat(np.array(ends, np.int64), starts) - begins
    lengths[lengths < 0] = 0  # none of its packets has a time
    lengths[:-1] += (untimed * usual).astype(np.int64)  # of packets before the jump
    offsets = begins[0] + np.append(0, np.cumsum(lengths[:-1])) - begins
    return np.repeat(offsets, np.diff(np.append(starts, len(pts))))


def _steps_back(pts: Sequence[int | None], keyframe: Sequence[bool], back: float) -> list[int]:
    """Places of the key frames that are shown before what precedes them, by more than `back` (negative)."""
    found, latest = [], -math.inf
    for place, (at, is_key) in enumerate(zip(pts, keyframe, strict=True)):
        if at is None:
            continue
        if is_key and at < latest + back:
            found.append(place)
            latest = at
        latest = max(latest, at)
    return found


def frame_times(
    pts: Sequence[int | None], durations: Sequence[int | None], shown: np.ndarray, unit: Fraction
) -> tuple[np.ndarray, int] | None:
    """When each frame begins, in order (float64 [F], several may begin at once), and when the last one ends.

    A packet without a time is taken to come between its neighbours; a last frame of unknown duration stays as long as
    the one before it. None where hardly a packet has a time, or times are so far out of order that they are wrong.
    Where packets are reordered, MP4 says until when a packet is the last *decoded* one: of an uneven video the last
    frame then stays no longer than the one before it.

    Args:
        shown: bool [P]: the packets whose frames are counted.
    """
    places = np.flatnonzero(shown)
    known = np.flatnonzero([value is not None for value in pts])
    if not len(places) or len(known) < min(2, len(pts)):
        return None
    ticks = np.array([value for value in pts if value is not None], np.float64)
    found = np.interp(places, known, ticks)
    if len(known) < len(pts):
        step = (ticks[-1] - ticks[0]) / (known[-1] - known[0])
        found += step * (np.minimum(places - known[0], 0) + np.maximum(places - known[-1], 0))
    order = np.argsort(found, kind="stable")
    if (np.abs(order - np.arange(len(order))) > _MAX_REORDER).any():
        return None
    times = found[order]
    lasts = np.array([value or 0 for value in durations], np.float64)
    end = int((found + lasts[places]).max())
    if len(times) == 1:
        return times, end
    one_more = int(2 * times[-1] - times[-2])
    if end <= times[-1]:
        return times, one_more
    reordered = bool((np.diff(order) < 0).any())
    if reordered and not comes_evenly((np.append(times, end) - times[0]) * float(unit)):
        own = int(times[-1] + lasts[places[order[-1]]])
        end = min(one_more, own) if own > times[-1] else one_more
    return times, end


def comes_evenly(times: np.ndarray) -> bool:
    """Whether frames that begin and in the end are over at these seconds (float64 [F + 1]) come at one rate."""
    step = float(times[-1]) / (len(times) - 1)
    share, seconds = _EVEN
    return bool((np.abs(times - step * np.arange(len(times))) <= max(share * step, seconds)).all())
