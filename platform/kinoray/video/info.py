"""What a video is, and when its frames are shown: by the times of its packets, whose clock may jump.

Easy to break: a video whose frames come evenly has no times (`frame_times` is None), and is cut by frame numbers to the
same windows, digit by digit, on every machine.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kinoray.video.plan import MAX_REORDER, PacketTable

__all__ = ["MAX_COUNT", "FrameClock", "VideoInfo", "check_counts", "comes_evenly", "frame_times", "jumps_closed"]

MAX_COUNT = 2**31 - 1
"""The largest count that is believed: tables hold 32 bits."""
_FPS = (1e-9, 1e12)
_WORD = re.compile(r"[\w+./-]{0,64}", re.ASCII)
_RATES_AGREE = 0.01
"""Share of the duration by the frame rate that times which do not tell frames apart may differ by."""
_JUMP_S = (-0.1, 10.0)
"""Steps of the decoding time beyond these are jumps of the clock, as ffmpeg has it (dts_delta_threshold)."""
_SLOW = 10
"""Times the usual step that a step may have and is no jump: in a slide show of a picture a minute, a minute is real."""
_HELD = 16
"""Frames by which a picture is shown earlier at most: in files that call every packet a key frame, no jump is less."""
_EVEN = (0.25, 0.002)
"""Frames come evenly where none is farther from its place than this share of a frame or, if that is more, this many
seconds: Matroska and FLV round to milliseconds, and film at 60 Hz is shown for 2 and 3 fields in turn."""


def check_counts(record: object, *names: str) -> None:
    """Refuse counts that no table holds: what is made of a file, or comes from a decoder process, may claim anything.

    Raises:
        ValueError: one is negative, or above MAX_COUNT.
    """
    for name in names:
        if not 0 <= getattr(record, name) <= MAX_COUNT:
            raise ValueError(f"{name} = {getattr(record, name)}, expected 0 .. {MAX_COUNT:,}")


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is, as displayed: width and height are of square pixels, and turned by rotation.

    Raises (when made):
        ValueError: a value is not one that a video can have.
    """

    duration_s: float
    fps: float
    """Mean frames per second."""
    num_frames: int
    """Counted from the packets that are there."""
    width: int
    height: int
    codec: str
    rotation: int
    """Degrees counterclockwise from the stored to the displayed picture: 0, 90, 180 or 270."""
    claimed_frames: int | None = None
    """Frames that the file's header promises; None where it makes no promise (MPEG-TS and others).

    More than num_frames: the file was cut. Less: something was added, or its index is damaged.
    """
    num_keyframes: int = 0
    """Frames from which decoding can begin, by the packets."""
    container: str = ""
    """The kind of file, as libav calls it: `mov/mp4`, `matroska/webm`, `mpegts`, ..."""
    mirrored: bool = False
    """Whether top and bottom of the stored picture change places before it is turned."""

    def __post_init__(self) -> None:
        check_counts(self, "num_frames", "width", "height", "num_keyframes")
        if self.claimed_frames is not None:
            check_counts(self, "claimed_frames")
        if not 0 <= self.duration_s < math.inf or not (self.fps == 0 or _FPS[0] <= self.fps <= _FPS[1]):
            raise ValueError(f"{self.duration_s} s at {self.fps} frames per second")
        if self.rotation not in (0, 90, 180, 270):
            raise ValueError(f"rotation = {self.rotation}, expected 0, 90, 180 or 270")
        if not _WORD.fullmatch(self.codec) or not _WORD.fullmatch(self.container):
            raise ValueError(f"codec {self.codec!r:.80} in container {self.container!r:.80} are no names of libav's")

    @property
    def miscounted(self) -> bool:
        """Whether the header promises another number of frames: off by more than one and more than 2 percent."""
        claimed = self.num_frames if self.claimed_frames is None else self.claimed_frames
        return abs(claimed - self.num_frames) > max(1.0, 0.02 * self.num_frames)

    @property
    def frames_missing(self) -> int:
        """How many frames fewer there are than the header promises; 0 unless `miscounted`."""
        return max(0, (self.claimed_frames or 0) - self.num_frames) if self.miscounted else 0


class FrameClock:
    """The times of one stream's frames. `span`: when the first packet is shown and the last one is over, in units.

    Args:
        clock: a time for each packet, in decoding order, jumps closed.
        durations: how long each is shown, where that is known.
        shown: whether the container has it shown.
        unit: seconds of a unit of all these.
        rate: mean frames a second as the container claims; 0 for none.
        num_dropped: frames that are not there because the one before them stays.
        times_stored: whether the container stores when a frame is shown.
    """

    duration_s: float
    """From the first frame's start to the last frame's end by the packets; by the frame rate where they lie."""
    frame_times: np.ndarray | None
    """float64 [F + 1]: seconds from the first packet's time to when each frame is shown, and to when the last one is
    over. None where frames come evenly, as far as anything says: then num_frames / duration_s tells it all."""

    def __init__(
        self,
        clock: Sequence[int | None],
        durations: Sequence[int | None],
        shown: Sequence[bool],
        table: PacketTable,
        *,
        unit: Fraction,
        rate: float,
        num_dropped: int,
        times_stored: bool,
    ) -> None:
        self._unit = unit
        self._times_stored = times_stored
        self.span = (0, 0)
        self.duration_s = (table.num_frames + num_dropped) / rate if rate else 0.0
        self.frame_times = None
        found = frame_times(clock, durations, table.shown, unit)
        if found is None:
            return
        begins, end = found
        known = [at for at, is_shown in zip(clock, shown, strict=True) if is_shown and at is not None]
        zero = min([math.floor(begins[0]), *known])
        measured_s = max(0.0, float((end - zero) * unit))
        doubt = max(_RATES_AGREE, sum(at is None for at in clock) / len(clock)) * self.duration_s
        self.span = (zero, end)
        if (table.timed and times_stored) or (not num_dropped and abs(measured_s - self.duration_s) > doubt):
            self.duration_s = measured_s
        elif not num_dropped:
            return
        self._set_times(begins)

    def found(self, pts: Sequence[int | None]) -> None:
        """Go by the times of what came out of the decoder, where that is less than the packets promise."""
        known = sorted(at for at in pts if at is not None)
        self.frame_times = None
        if self.span[1] and self._times_stored and len(known) == len(pts):
            self._set_times(np.array(known, np.float64))

    def _set_times(self, begins: np.ndarray) -> None:
        times = (begins - self.span[0]) * float(self._unit)
        times = np.append(times, max(times[-1], self.duration_s))
        self.frame_times = None if comes_evenly(times) else times


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
    if (np.abs(order - np.arange(len(order))) > MAX_REORDER).any():
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
