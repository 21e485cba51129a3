"""Blocks of clips that the model's device has yet to finish; decode workers import this, so it must not import torch.

Easy to break: such clips differ in size, so a block's columns hold an array of its own for each row.
"""

import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kinoray.catalog.table import read_videos, references
from kinoray.errors import KinorayError, MediaError, StorageError, StorageUnavailable
from kinoray.video.clip import Clip
from kinoray.video.sandbox.pool import shared_sandbox

if TYPE_CHECKING:
    from kinoray.train.decoding import DecodeTask

__all__ = ["decode_raw"]

_VIEW_FIELDS = 6


def decode_raw(task: "DecodeTask", block: pa.Table) -> dict[str, np.ndarray]:
    """Decode a block of references as DecodeTask does, into the columns that RawBatch is made of.

    `frames` and, with flow, `partners` and `last`; with decode.scale_on=device also `views`. Rows that cannot be read
    hold arrays of one pixel.
    """
    sandbox = shared_sandbox(1)
    begin_s = time.process_time() + sandbox.cpu_s
    count = block.num_rows
    clips: list[Clip | None] = [None] * count
    errors: list[KinorayError | None] = [None] * count
    found = read_videos(task.storage, references(block), max_bytes=task.clip.decode.max_bytes)
    for index, (video, data) in enumerate(zip(block.to_pylist(), found, strict=True)):
        try:
            if isinstance(data, KinorayError):
                raise data
            clips[index] = sandbox.decode_clip(data, task.clip, with_flow=task.with_flow, rng=task.rng(video))
        except (MediaError, StorageError) as error:
            errors[index] = error
            if isinstance(error, StorageUnavailable):  # each of the others would wait as long as this one did
                errors[index:] = [error] * (count - index)
                break
    cpu_s = np.zeros(count)
    cpu_s[:1] = time.process_time() + sandbox.cpu_s - begin_s
    return {
        "row": block.column("row").to_numpy(),
        "ok": np.array([error is None for error in errors]),
        "cached": np.zeros(count, bool),
        "cpu_s": cpu_s,
        **_arrays(task, clips),
        "error_class": np.array([type(error).__name__ if error else "" for error in errors]),
        "error_text": np.array([str(error) if error else "" for error in errors]),
    }


def _arrays(task: "DecodeTask", clips: Sequence[Clip | None]) -> dict[str, np.ndarray]:
    sample = task.clip.sample
    grid = (sample.num_segments, sample.frames_per_segment)
    num_sides = 4 if task.clip.decode.frames == "yuv420" else 5
    columns = {"frames": _ragged([clip.frames if clip else None for clip in clips], num_sides)}
    if task.with_flow:
        columns["partners"] = _ragged([clip.partners if clip else None for clip in clips], 5)
        columns["last"] = np.stack([clip.last if clip else np.zeros(grid, bool) for clip in clips])
    if task.clip.decode.scale_on == "device":
        columns["views"] = np.array(
            [astuple(clip.view) if clip and clip.view else (0,) * _VIEW_FIELDS for clip in clips], np.int64
        )
    return columns


def _ragged(arrays: Sequence[np.ndarray | None], num_sides: int) -> np.ndarray:
    """A column of arrays of different shapes."""
    column = np.empty(len(arrays), object)
    for index, array in enumerate(arrays):
        column[index] = np.zeros((1,) * num_sides, np.uint8) if array is None else array
    return column
