"""Long videos in windows: where each one begins and ends, as arithmetic on frame numbers.

What is easy to break: every frame of the video is in a window, and all windows of a video are equally long.
"""

import numpy as np

from kinoray.config.scoring import WindowsConfig
from kinoray.config.shared import SampleConfig
from kinoray.video.sample import view_indices

__all__ = ["cut_windows", "window_indices"]


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


def window_indices(windows: np.ndarray, sample: SampleConfig, num_views: int) -> np.ndarray:
    """Frame numbers of the temporal views of each window, int64 [W * V, S, T]: window by window, see `view_indices`."""
    return np.concatenate([start + view_indices(int(end - start), sample, num_views) for start, end in windows])
