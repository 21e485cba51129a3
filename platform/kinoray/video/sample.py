"""Which frames of a video are looked at: arithmetic on frame numbers, the same on every machine.

A video of F frames is cut into S * T equal slots of F / (S * T) frames. The slots are real intervals: where they are
shorter than a frame, neighbouring slots share it, so short videos repeat frames instead of failing.

Random draws nest: from one generator state, the frames that few slots draw are (but for frames on a slot's border)
among those that a multiple of the slots draws, and the generator is left alike. Trials with other segment counts then
need almost the same frames, decoded once (see kinoray.video.cache). Easy to break: draw nothing that depends on S or T.

Dense clips are one stretch of a video each, by the arithmetic of the samplers that published networks were fed by. Each
sampler is followed index by index, its roundings and its float32 included (tests/test_dense.py):

    mmaction2     SampleFrames of MMAction2 1.2, mmaction/datasets/transforms/loading.py; with a frame rate the branch
                  for target_fps, which is also PySlowFast's use_offset
    slowfast      get_start_end_idx and temporal_sampling of PySlowFast, slowfast/datasets/decoder.py: its frames are
                  spread from a clip's first to its last one, a little more than a stride apart
    torchvision   VideoClips and UniformClipSampler, torchvision/datasets/video_utils.py and samplers/clip_sampler.py

    even          ours: mmaction2 without a frame rate, every round(stride * fps / config.fps)-th frame

What they do not say is ours, too: a single clip lies in the middle of the video unless `placed` asks for the sampler's
own place, and torchvision, which leaves short videos out, repeats frames as the others do.

Long videos are cut into windows: every frame of the video is in one, and all windows of a
video are equally long: of as many frames where frames come evenly, and else of as many seconds.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from kinoray.config.clip import MAX_STRIDE, Placement, SampleConfig
from kinoray.config.scoring import ViewsConfig, WindowsConfig

__all__ = [
    "clip_indices",
    "clip_rng",
    "cut_by_time",
    "cut_windows",
    "dense_indices",
    "dense_reach",
    "segment_indices",
    "view_indices",
    "window_indices",
]

_SLACK = (0.5, 0.1)  # share of a mean frame, and of a window, by which the last window may be longer than the others
_EPSILON_S = 1e-6


def clip_indices(
    num_frames: int, fps: float, config: SampleConfig, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Frame numbers of one clip, int64 [S, T]: spread over the video, or a dense clip in its middle (rng: anywhere)."""
    if config.is_dense:
        return np.asarray(dense_indices(num_frames, fps, config, rng=rng)[0])
    return segment_indices(num_frames, config, rng)


def segment_indices(num_frames: int, config: SampleConfig, rng: np.random.Generator | None = None) -> np.ndarray:
    """Frame numbers, int64 [S, T], never falling, each in 0 .. num_frames - 1.

    Without rng: the middle of each slot, `(2i + 1) * F // (2 * S * T)`. With rng: a frame drawn from each slot, such
    that over all slots every frame of the video is drawn equally often; F numbers are taken from rng.

    Raises:
        ValueError: num_frames is less than 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    num_slots = config.num_segments * config.frames_per_segment
    if rng is None:
        return _middles(num_frames, num_slots).reshape(config.num_segments, config.frames_per_segment)
    return _drawn(num_frames, num_slots, rng).reshape(config.num_segments, config.frames_per_segment)


def _drawn(num_frames: int, num_slots: int, rng: np.random.Generator) -> np.ndarray:
    """A frame of each slot, int64 [num_slots], drawn with the share of the slot that it fills.

    Each frame waits for an exponential time, and in a slot the first one wins: of frames with rates w it is frame f
    with probability w_f / sum(w), and the first of two slots together is the first of one of them.
    """
    waits = rng.exponential(size=num_frames)
    frames = np.empty(num_slots, np.int64)
    for slot in range(num_slots):  # from begin to end in units of 1 / num_slots frame
        begin, end = slot * num_frames, (slot + 1) * num_frames
        first, last = begin // num_slots, (end - 1) // num_slots
        rates = np.full(last - first + 1, num_slots, np.int64)
        rates[0] -= begin - first * num_slots
        rates[-1] -= (last + 1) * num_slots - end
        frames[slot] = first + int(np.argmin(waits[first : last + 1] / rates))
    return frames


def view_indices(num_frames: int, config: SampleConfig, num_views: int) -> np.ndarray:
    """Frame numbers of `num_views` temporal views, int64 [V, S, T], each in 0 .. num_frames - 1.

    Each slot is cut into V equal parts; view v takes the middle of part v of every slot:
    `(2 * (i * V + v) + 1) * F // (2 * V * S * T)` in slot i. Every view spans the whole video, as a training clip does;
    one view is `segment_indices`. As in SlowFast, views lie in equal steps over what a clip leaves free, which is one
    slot here; MMAction2's `twice_sample` is V = 2 at the phases 0 and 1/2 of a slot, ours are 1/4 and 3/4.

    Raises:
        ValueError: num_frames or num_views is less than 1.
    """
    if num_frames < 1 or num_views < 1:
        raise ValueError(f"num_frames and num_views must be at least 1, got {num_frames} and {num_views}")
    shape = (config.num_segments, config.frames_per_segment, num_views)
    middles = _middles(num_frames, int(np.prod(shape)))
    return np.ascontiguousarray(middles.reshape(shape).transpose(2, 0, 1))


def _middles(num_frames: int, num_slots: int) -> np.ndarray:
    """The frames in the middle of equal slots, int64 [num_slots]."""
    return (2 * np.arange(num_slots, dtype=np.int64) + 1) * num_frames // (2 * num_slots)


def cut_windows(num_frames: int, fps: float, config: WindowsConfig | None) -> np.ndarray:
    """First frame of each window and the frame after its last, int64 [W, 2].

    Windows start every stride; the last one ends with the video, so it may overlap the one before it by more. A video
    that is no longer than a window, or whose frame rate is unknown (fps 0), is one window.
    """
    if config is None or fps <= 0 or num_frames <= max(1, round(config.length_s * fps)):
        return np.array([[0, num_frames]], np.int64)
    length, stride = max(1, round(config.length_s * fps)), max(1, round(config.stride_s * fps))
    starts = np.append(np.arange(0, num_frames - length, stride, dtype=np.int64), num_frames - length)
    return np.stack([starts, starts + length], axis=1)


def cut_by_time(times: np.ndarray, config: WindowsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Windows as `cut_windows` has them, of a video whose frames do not come evenly, and when they begin and end.

    A window has the frames that begin within its seconds; and the one that is shown when it begins, if that stays for
    half of the window or longer.

    Args:
        times: float64 [F + 1], when each frame begins and when the last one is over.

    Returns:
        int64 [W, 2] and float64 [W, 2], in seconds.
    """
    end_s = float(times[-1])
    share, most = _SLACK
    slack_s = min(share * end_s / (len(times) - 1), most * config.length_s)
    count = max(0, math.ceil((end_s - config.length_s - slack_s) / config.stride_s))
    begins = config.stride_s * np.arange(count + 1)
    if begins[-1] + config.length_s > end_s + slack_s:
        begins[-1] = max(0.0, end_s - config.length_s)
    ends = np.minimum(begins + config.length_s, end_s)
    ends[-1] = end_s
    first, stop = (np.searchsorted(times[:-1], bounds - _EPSILON_S) for bounds in (begins, ends))
    stop[-1] = len(times) - 1
    shown = np.maximum(np.searchsorted(times[:-1], begins + _EPSILON_S, "right") - 1, 0)
    until = np.append(times[:-1], math.inf)[first]
    first = np.where(until - begins >= (ends - begins) / 2, shown, first)
    return np.stack([first, np.maximum(stop, first + 1)], axis=1), np.stack([begins, ends], axis=1)


def window_indices(windows: np.ndarray, rates: Sequence[float], sample: SampleConfig, views: ViewsConfig) -> np.ndarray:
    """Frame numbers of the temporal views of each window, int64 [W * V, S, T], window by window.

    Spread clips interleave (`view_indices`), dense clips lie over the window (`dense_indices`).

    Args:
        rates: frames a second of each window.
    """
    found = []
    for (start, end), fps in zip(windows.tolist(), rates, strict=True):
        if sample.is_dense:
            indices = dense_indices(end - start, fps, sample, views.temporal, placed=views.placed)
        else:
            indices = view_indices(end - start, sample, views.temporal)
        found.append(start + indices)
    return np.concatenate(found)


def clip_rng(seed: int, epoch: int, video_id: str) -> np.random.Generator:
    """The random generator of one video in one epoch: it does not matter which worker draws from it, or when."""
    key = hashlib.sha256(f"{seed}\n{epoch}\n{video_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))


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
