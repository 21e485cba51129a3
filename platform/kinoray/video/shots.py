"""Where the shots of a video begin, told by small pictures of its frames.

A cut changes the picture at once, by more than anything near it does, and for good: a camera that turns changes it as
much but not at once, and a flash not for good. Fades are not looked for. Key frames are compared first: where two that
are near each other look alike, what is between them is one shot and is not decoded.

A video is looked at in stretches, each a request of its own, so that the limits of decoding hold however long it is.
What is easy to break: windows depend on where shots begin, so that depends on a video's bytes and on nothing else.
"""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaOverBudget, UndecodableVideo
from kinoray.video.info import check_counts
from kinoray.video.pyav import PyavVideo

__all__ = ["NUM_FRAMES_AT_ONCE", "Shots", "first_frames", "shots_in"]

NUM_FRAMES_AT_ONCE = 3000
"""Frames of a stretch."""

_SIDE_PX = 16
_MOST_SHRUNK = 64  # times at once: the filters of libswscale end at 256 pixels
_LEAST = 20.0  # mean difference of pixels, of 255, by which a cut changes the picture
_TIMES = 4.0  # the mean change near a cut
_STILL = 0.5  # what changes less is the same picture again: conversions of the frame rate repeat some
_ALIKE = 10.0  # difference of key frames with no cut between them, at most
_NEAR_S = 0.2
_NEAR_FRAMES = (3, 15)  # at least and at most
_KEYS_S = (0.5, 1.0)  # key frames are compared so far apart, at least and at most
_MOST_SHOTS = 10_000  # they go to a decoder in one message


@dataclass(frozen=True, slots=True, eq=False)
class Shots:
    """The shots that begin in a video, or in a stretch of it.

    Raises (when made):
        ValueError: they are none.
    """

    firsts: np.ndarray
    """int64 [K], rising: the first frame of each shot, but for the one with which the video begins."""
    num_frames: int
    """Frames of the video, as far as that is known."""
    frames_decoded: int
    """Frames that the decoder gave."""

    def __post_init__(self) -> None:
        check_counts(self, "num_frames", "frames_decoded")
        if self.firsts.dtype != np.int64 or self.firsts.ndim != 1:
            raise ValueError(f"shots: expected int64 [K], found {self.firsts.dtype} {list(self.firsts.shape)}")
        if (np.diff(self.firsts, prepend=0, append=self.num_frames) <= 0).any() and len(self.firsts):
            raise ValueError(f"shots at {self.firsts.tolist()!s:.80} of a video of {self.num_frames} frames")

    def __add__(self, later: "Shots") -> "Shots":
        """With those of the stretch that follows.

        Raises:
            MediaOverBudget: they are more than a video may have.
        """
        firsts = np.concatenate([self.firsts, later.firsts])
        if len(firsts) > _MOST_SHOTS:
            text = f"{len(firsts):,} cuts are more than the {_MOST_SHOTS:,} that a video may have"
            raise MediaOverBudget(f"{text}; label it without window_at_cuts")
        return Shots(firsts[firsts < later.num_frames], later.num_frames, self.frames_decoded + later.frames_decoded)


def shots_in(data: bytes, begin: int, config: DecodeConfig) -> Shots:
    """The shots that begin at one of the frames begin .. begin + NUM_FRAMES_AT_ONCE - 1.

    Raises:
        MediaError: one of its subclasses; any bytes give shots or that.
    """
    with PyavVideo(data, config) as video:
        look = _Look(video, begin)
        firsts = look.firsts() if begin < video.num_frames else []
        firsts = [first for first in firsts if first + look.near <= video.num_frames]
        return Shots(np.array(firsts, np.int64), video.num_frames, look.frames_decoded)


class _Look:
    """At one stretch of a video, low .. high - 1 with what is near it on both sides."""

    def __init__(self, video: PyavVideo, begin: int) -> None:
        fps = video.num_frames / video.duration_s if video.duration_s > 0 else float(video.frame_rate)
        least, most = _NEAR_FRAMES
        self.near = round(min(max(_NEAR_S * fps, least), most))
        self.frames_decoded = 0
        self._video = video
        self._begin, self._end = max(begin, self.near), min(begin + NUM_FRAMES_AT_ONCE, video.num_frames)
        self._low, self._high = max(0, begin - self.near), min(self._end + self.near, video.num_frames)
        self._step, self._apart = (max(1, round(min(seconds * fps, video.num_frames))) for seconds in _KEYS_S)

    def firsts(self) -> list[int]:
        """First frames of shots, rising. What does not decode begins none: that is for its windows to report."""
        found = []
        try:
            doubtful = self._doubtful()
            wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.arange(*bounds) for bounds in doubtful)]))
            pictures = self._pictures(wanted)
        except UndecodableVideo:
            return []
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            frames = list(itertools.takewhile(pictures.__contains__, run.tolist()))  # the video may end before it
            if frames:
                places = first_frames(np.stack([pictures[frame] for frame in frames]), self.near)
                found += [frames[place] for place in places]
        return [first for first in found if self._begin <= first < self._end]

    def _doubtful(self) -> list[tuple[int, int]]:
        """Between which frames (the second is not among them) another shot may begin, as far as key frames tell.

        Each ends behind its cut by what is near.
        """
        keys = self._keys()
        pictures = self._pictures(keys)
        found = []
        for one, other in itertools.pairwise([self._low, *keys.tolist(), self._high]):
            known = one in pictures and other in pictures and other - one <= self._apart
            if not known or _difference(pictures[one], pictures[other]) > _ALIKE:
                found.append((one, min(other + self.near, self._high)))
        return found

    def _keys(self) -> np.ndarray:
        """The key frames to compare, int64, rising; none where decoding cannot begin at them."""
        if not self._video.decodes_by_groups() or not self._video.table.timed:
            return np.zeros(0, np.int64)
        keys = self._video.table.key_frames
        keys = keys[(keys >= self._low) & (keys < self._high)]
        return np.asarray(keys[np.unique(keys // self._step, return_index=True)[1]])

    def _pictures(self, wanted: np.ndarray) -> dict[int, np.ndarray]:
        """By number: int16 [D], the pixels of each of these frames."""
        sink = _Pictures()
        if len(wanted):
            self.frames_decoded += self._video.read(wanted, sink).frames_decoded
        return sink.of


class _Pictures:
    """A FrameSink that keeps 16 x 16 pixels of each frame."""

    def __init__(self) -> None:
        self.of: dict[int, np.ndarray] = {}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """See FrameSink."""
        return max(_SIDE_PX, -(-height // _MOST_SHRUNK)), max(_SIDE_PX, -(-width // _MOST_SHRUNK))

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """See FrameSink."""
        small = cv2.resize(np.dstack(planes), (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
        self.of[index] = small.reshape(-1).astype(np.int16)


def first_frames(pictures: np.ndarray, near: int) -> list[int]:
    """Places of the pictures, int16 [N, D], with which another shot begins.

    Args:
        near: how many pictures on each side a cut is compared with; a shot has more.
    """
    changes = np.abs(np.diff(pictures, axis=0)).mean(axis=1)
    found = []
    for place in np.flatnonzero(changes >= _LEAST).tolist():
        first, last = max(0, place - near), min(place + near, len(changes) - 1)
        around = changes[first : last + 1]
        others = np.delete(
            around, np.arange(max(first, place - 1), min(place + 1, last) + 1) - first
        )  # of a mixed frame
        others = others[others > _STILL]
        is_largest = place == first + int(around.argmax())
        if not is_largest or (len(others) and changes[place] < _TIMES * others.mean()):
            continue
        before, after = pictures[first : place + 1], pictures[place + 1 : last + 2]
        if all(_difference(one, other) >= _LEAST for one in before for other in after):
            found.append(place + 1)
    return found


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())
