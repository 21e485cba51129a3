"""Which back end reads the wanted frames, and how far into the file they reach."""

import numpy as np

from kinoray.config.shared import DecodeConfig, SampleConfig
from kinoray.video.decord import read_with_decord
from kinoray.video.nvdec import read_on_device, require_nvdec
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo
from kinoray.video.torchcodec import read_with_torchcodec

__all__ = ["reach", "read_frames"]


def reach(sample: SampleConfig) -> float:
    """Share of the frames before the last slot: its frame is wanted, whichever it is."""
    return 1 - 1 / (sample.num_segments * sample.frames_per_segment)


def read_frames(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink, config: DecodeConfig) -> Reading:
    """Put the wanted frames into the sink with config.backend; `video` is `data`, opened. See PyavVideo.read.

    Raises:
        MediaError: one of its subclasses.
        ConfigError: the back end is not installed, or decode.device is cuda and this process may not use a GPU.
    """
    if config.device == "cuda":
        require_nvdec()
        return read_on_device(data, video, wanted, sink, "cuda")
    if config.backend == "decord":
        return read_with_decord(data, video, wanted, sink)
    if config.backend == "torchcodec":
        return read_with_torchcodec(data, video, wanted, sink)
    return video.read(wanted, sink)
