"""Dense clips, each one stretch of a video, by the arithmetic of the samplers that published networks were fed by.

Each sampler is followed index by index, its roundings and its float32 included (tests/test_dense.py):

    mmaction2     SampleFrames of MMAction2 1.2, mmaction/datasets/transforms/loading.py; with a frame rate the branch
                  for target_fps, which is also PySlowFast's use_offset
    slowfast      get_start_end_idx and temporal_sampling of PySlowFast, slowfast/datasets/decoder.py: its frames are
                  spread from a clip's first to its last one, a little more than a stride apart
    torchvision   VideoClips and UniformClipSampler, torchvision/datasets/video_utils.py and samplers/clip_sampler.py

    even          ours: mmaction2 without a frame rate, every round(stride * fps / config.fps)-th frame

What they do not say is ours, too: a single clip lies in the middle of the video unless `placed` asks for the sampler's
own place, and torchvision, which leaves short videos out, repeats frames as the others do.

Shapes: V clips, N = S * T frames of each
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from kinoray.config.clip import MAX_STRIDE, Placement, SampleConfig

__all__ = ["dense_indices", "dense_reach"]


def dense_indices(
    num_frames: int,
    fps: float,
    config: SampleConfig,
    num_clips: int = 1,
    *,
    placed: bool = False,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Frame numbers of dense clips (config.stride is not 0), int64 [V, S, T], each in 0 .. num_frames - 1.

    With rng every whole start of the one clip is drawn equally often. As in kinoray.video.sample draws nest, and F
    numbers are taken from rng whatever the clip is: of all frames' waiting times the first start to ring wins.

    Args:
        fps: frames a second of the video; 0 where it is not known, and then it counts as config.fps.

    Raises:
        ValueError: num_frames or num_clips is less than 1, or a draw is asked for several clips.
    """
    if num_frames < 1 or num_clips < 1:
        raise ValueError(f"num_frames and num_clips must be at least 1, got {num_frames} and {num_clips}")
    sampler = _SAMPLERS[config.placement](num_frames, fps or config.fps, config)
    if rng is not None:
        if num_clips > 1:
            raise ValueError(f"one clip is drawn at a time, got num_clips {num_clips}")
        drawable = min(sampler.num_starts, num_frames)
        first = int(np.argmin(rng.exponential(size=num_frames)[:drawable]))
        starts = np.array([first * sampler.num_starts // drawable], np.float64)
    elif num_clips == 1 and not placed:
        starts = np.array([sampler.middle])
    else:
        starts = sampler.starts(num_clips)
    places_VN = np.stack([sampler.places(float(start)) for start in starts])
    if config.short == "loop":
        places_VN = places_VN % sampler.num_places
    else:
        places_VN = np.minimum(places_VN, [[sampler.last(places)] for places in places_VN])
    return sampler.frames(places_VN).reshape(num_clips, config.num_segments, config.frames_per_segment)


def dense_reach(num_clips: int, *, placed: bool, drawn: bool) -> float:
    """Share of a long video's frames before the last one of these clips, whichever sampler places them."""
    if drawn or (num_clips == 1 and placed):
        return 0.0
    return 0.5 if num_clips == 1 else 1 - 1 / num_clips


class _Sampler(Protocol):
    """Dense clips of one video. Places are its frames or, in torchvision, those that are left at another rate."""

    num_places: int
    num_starts: int
    """Whole starts that training draws from, 0 .. num_starts - 1."""
    middle: float
    """Start of a single clip."""

    def starts(self, num_clips: int) -> np.ndarray:
        """float64 [V]: where the sampler puts so many clips."""

    def places(self, start: float) -> np.ndarray:
        """int64 [N]: places of a clip; those of num_places and more are beyond the video."""

    def last(self, places_N: np.ndarray) -> int:
        """The place that is repeated in a clip that goes beyond the video."""

    def frames(self, places: np.ndarray) -> np.ndarray:
        """int64: the frames at places."""


class _MMAction2:
    """Clips from the first to the last possible start, each rounded; the last frame *that it took* is repeated."""

    def __init__(self, num_frames: int, fps: float, config: SampleConfig) -> None:
        num, stride = config.num_frames, config.stride
        self.num_places = num_frames
        self._whole_steps = bool(config.fps)
        if config.fps:
            span = max(1.0, num * stride * (fps / config.fps))
            self._offsets_N = np.linspace(0, span - 1, num).astype(np.int64)
            self._free = max(num_frames - span, 0.0)
            self.num_starts = int(self._free) + 1
        else:
            self._offsets_N = np.arange(num) * stride
            self._free = float(max(num_frames - (num - 1) * stride - 1, 0))
            self.num_starts = max(num_frames - num * stride, 0) + 1  # in training it leaves stride - 1 frames free
        self.middle = self._free // 2

    def starts(self, num_clips: int) -> np.ndarray:
        if num_clips == 1:
            return np.array([self.middle])
        step = self._free / (num_clips - 1)
        starts_V = np.arange(num_clips) * (np.floor(step) if self._whole_steps else step)
        return np.asarray(np.rint(starts_V))

    def places(self, start: float) -> np.ndarray:
        return np.asarray(int(start) + self._offsets_N)

    def last(self, places_N: np.ndarray) -> int:
        return int(places_N[places_N < self.num_places].max())

    def frames(self, places: np.ndarray) -> np.ndarray:
        return places


class _Even(_MMAction2):
    """The whole stride that comes nearest to the frame rate."""

    def __init__(self, num_frames: int, fps: float, config: SampleConfig) -> None:
        stride = round(config.stride * fps / config.fps) if config.fps else config.stride
        super().__init__(num_frames, fps, replace(config, stride=min(max(1, stride), MAX_STRIDE), fps=0.0))


class _SlowFast:
    """V clips in steps of free / V: the first begins with the video, the last ends before its end."""

    def __init__(self, num_frames: int, fps: float, config: SampleConfig) -> None:
        self._num = config.num_frames
        self._span = float(self._num * config.stride)
        if config.fps:
            self._span = self._num * config.stride * fps / config.fps
        self._free = max(num_frames - self._span, 0.0)
        self.num_places = num_frames
        self.num_starts = int(self._free) + 1
        self.middle = self._free // 2

    def starts(self, num_clips: int) -> np.ndarray:
        return np.asarray(self._free * np.arange(num_clips) / num_clips)

    def places(self, start: float) -> np.ndarray:
        places_N = _linspace(start, start + self._span - 1, self._num)
        return np.asarray(np.maximum(places_N, 0).astype(np.int64))

    def last(self, _: np.ndarray) -> int:
        return self.num_places - 1

    def frames(self, places: np.ndarray) -> np.ndarray:
        return places


class _Torchvision:
    """The video is brought to the frame rate, and clips begin at any frame that is left; V of those, evenly spaced."""

    def __init__(self, num_frames: int, fps: float, config: SampleConfig) -> None:
        self._num_frames, self._offsets_N = num_frames, np.arange(config.num_frames) * config.stride
        self._step = fps / config.fps if config.fps else 1.0
        if self._step.is_integer():
            self.num_places = -(-num_frames // int(self._step))
        else:
            self.num_places = max(1, int(num_frames * config.fps / fps))
        self._free = max(self.num_places - int(self._offsets_N[-1]) - 1, 0)
        self.num_starts = self._free + 1
        self.middle = float(self._free // 2)

    def starts(self, num_clips: int) -> np.ndarray:
        return np.asarray(np.floor(_linspace(0, self._free, num_clips)).astype(np.float64))

    def places(self, start: float) -> np.ndarray:
        return np.asarray(int(start) + self._offsets_N)

    def last(self, _: np.ndarray) -> int:
        return self.num_places - 1

    def frames(self, places: np.ndarray) -> np.ndarray:
        at = np.floor(places.astype(np.float32) * np.float32(self._step)).astype(np.int64)
        return np.asarray(np.minimum(at, self._num_frames - 1))


def _linspace(start: float, end: float, num: int) -> np.ndarray:
    """torch.linspace: float32 [num], counted from the nearer end, product and sum rounded once (fused)."""
    first, last, count = np.float32(start), np.float32(end), np.arange(num)
    if num == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(num - 1))  # float64 holds its products exactly
    return np.where(count < num // 2, first + step * count, last - step * (num - 1 - count)).astype(np.float32)


_SAMPLERS: Mapping[Placement, type[_MMAction2] | type[_SlowFast] | type[_Torchvision]] = {
    "mmaction2": _MMAction2,
    "slowfast": _SlowFast,
    "torchvision": _Torchvision,
    "even": _Even,
}
