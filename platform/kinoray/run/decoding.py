"""What a decode task of the training stream does; its workers import this module, so it must not import torch."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kinoray.catalog import read_videos, references
from kinoray.config import ClipConfig
from kinoray.errors import KinorayError, MediaError, StorageError
from kinoray.sample import clip_rng
from kinoray.sandbox import shared_sandbox
from kinoray.storage import Storage

__all__ = ["DecodeTask"]

FLOW_CHANNELS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTask:
    """Turns blocks of references into blocks of clips of one shape; small, and pickled to the tasks."""

    storage: Storage
    clip: ClipConfig
    with_flow: bool
    seed: int = 0
    epoch: int | None = None
    """Epoch whose random frames and crops are drawn; None for the middle frames and the centre crop."""

    @property
    def frame_shape(self) -> tuple[int, int, int, int]:
        """(S, T, H, W) of every clip."""
        sample, size = self.clip.sample, self.clip.view.crop_px
        return sample.num_segments, sample.frames_per_segment, size, size

    @property
    def clip_bytes(self) -> int:
        """Bytes of a decoded clip."""
        return int(np.prod(self.frame_shape)) * (3 + (FLOW_CHANNELS if self.with_flow else 0))

    def __call__(self, block: pa.Table) -> dict[str, np.ndarray]:
        """Decode a block of references: one row in, one row out; an unreadable one is zeros, ok=False and a reason."""
        count = block.num_rows
        segments, frames, height, width = self.frame_shape
        rgb = np.zeros((count, segments, frames, 3, height, width), np.uint8)
        flow = np.zeros((count, segments, frames, FLOW_CHANNELS, height, width), np.int8) if self.with_flow else None
        errors: list[KinorayError | None] = [None] * count
        sandbox = shared_sandbox(1)  # a worker runs one task at a time, and keeps its decoder for the next
        found = read_videos(self.storage, references(block))
        for index, (video_id, data) in enumerate(zip(block.column("video_id").to_pylist(), found, strict=True)):
            rng = None if self.epoch is None else clip_rng(self.seed, self.epoch, video_id)
            try:
                if isinstance(data, KinorayError):
                    raise data
                clip = sandbox.decode_clip(data, self.clip, with_flow=self.with_flow, rng=rng)
            except (MediaError, StorageError) as error:
                errors[index] = error
                continue
            rgb[index] = clip.frames
            if flow is not None:
                flow[index] = clip.flow
        columns = {
            "row": block.column("row").to_numpy(),
            "ok": np.array([error is None for error in errors]),
            "rgb": rgb,
        }
        if flow is not None:
            columns["flow"] = flow
        columns["error_class"] = np.array([type(error).__name__ if error else "" for error in errors])
        columns["error_text"] = np.array([str(error) if error else "" for error in errors])
        return columns
