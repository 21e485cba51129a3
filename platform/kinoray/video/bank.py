"""The frames that several samplings of one video want, from one reading: what a cache keeps for all trials of a sweep.

Each sampling's clip is bit for bit what `decode_clip` gives. That holds as long as the video is what it says it is:
where frames were missing or damaged, a reading that wants more frames may see the file differently; `exact` tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kinoray.config.shared import ClipConfig, SampleConfig
from kinoray.errors import ConfigError
from kinoray.video.backend import reach, read_frames
from kinoray.video.pyav import PyavVideo
from kinoray.video.sample import segment_indices
from kinoray.video.sink import ClipSink, Empty, new_array

__all__ = ["FrameBank", "decode_bank"]


@dataclass(frozen=True, slots=True)
class FrameBank:
    """U distinct frames of a video, in one cut, and which of them each sampling takes."""

    frames: np.ndarray
    """uint8 [U, 3, H, W]."""
    flow: np.ndarray | None
    """int8 [U, 2, H, W] to the next frame of the video; None if it was not asked for."""
    places: list[np.ndarray]
    """For each sampling, in the order asked for: int64 [S * T], rows of `frames`."""
    exact: bool
    """Whether every sampling alone would have given the same frames."""


def decode_bank(
    data: bytes,
    config: ClipConfig,
    samples: Sequence[SampleConfig],
    *,
    with_flow: bool,
    rng: np.random.Generator | None = None,
    empty: Empty = new_array,
) -> FrameBank:
    """Decode what all samplings want, with the draws that each of them would make from `rng` (config.sample is unused).

    Args:
        empty: as for `decode_clip`.

    Raises:
        MediaError: one of its subclasses; any bytes give a bank or that.
        ConfigError: their flow is found on the device.
    """
    if config.flow_on_device(with_flow=with_flow):
        raise ConfigError(f"cache.gb must be 0 with flow.estimator {config.flow.estimator}, which the device computes")
    state = rng.bit_generator.state if rng is not None else {}
    with PyavVideo(data, config.decode, max(reach(sample) for sample in samples)) as video:
        promised = video.num_frames
        while True:
            num_frames = video.num_frames
            indices = []
            for sample in samples:
                if rng is not None:
                    rng.bit_generator.state = state
                indices.append(segment_indices(num_frames, sample, rng).reshape(-1))
            unique = np.unique(np.concatenate(indices))
            sink = ClipSink(unique, num_frames, replace(config, sample=samples[0]), rng, empty)
            reading = read_frames(data, video, sink.wanted(with_flow=with_flow), sink, config.decode)
            if video.num_frames == num_frames:
                break
        sink.finish()
        flow, partners = sink.motion() if with_flow else (None, None)
        sink.mirrored(flow, partners)
        return FrameBank(
            frames=sink.frames,
            flow=flow,
            places=[np.searchsorted(unique, wanted) for wanted in indices],
            exact=num_frames == promised and reading.frames_corrupt == 0,
        )
