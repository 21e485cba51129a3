"""Which frames of a video are looked at: arithmetic on frame numbers, the same on every machine.

A video of F frames is cut into S * T equal slots of F / (S * T) frames. The slots are real intervals: where they are
shorter than a frame, neighbouring slots share it, so short videos repeat frames instead of failing.

Random draws nest: from one generator state, the frames that few slots draw are (but for frames on a slot's border)
among those that a multiple of the slots draws, and the generator is left alike. Trials with other segment counts then
need almost the same frames, decoded once (see kinoray.video.cache). Easy to break: draw nothing that depends on S or T.

Dense clips are in dense.py. Long videos are cut into windows: every frame of the video is in one, and all windows of a
video are equally long: of as many frames where frames come evenly, and else of as many seconds.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from kinoray.config.scoring import ViewsConfig, WindowsConfig
from kinoray.config.shared import SampleConfig
from kinoray.video.dense import dense_indices

__all__ = [
    "clip_indices",
    "clip_rng",
    "cut_by_time",
    "cut_windows",
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
