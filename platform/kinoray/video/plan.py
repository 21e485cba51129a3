"""Which packets must be decoded for the frames that are wanted: arithmetic on packet times and flags, no codec.

Packets come in decoding order, frames in the order they are shown; B-frames make the two differ. The easy mistake is
to start a group of pictures too late: frames shown before their group's key frame ("leading", in open groups) may
refer to the group before, so that one has to be decoded as well.
"""

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["FrameSink", "PacketTable", "Reading", "Run"]

_MAX_REORDER = 64
"""No codec holds back more frames than this (H.264 and HEVC: 16): packets farther out of order have wrong times."""


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
