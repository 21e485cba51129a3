"""Batches through a network without waiting for each: the next one is launched before the last one's logits are read.

On a GPU the host only queues work, so it can prepare a batch while another is computed; on a CPU the same calls compute
at once. What is easy to break: nothing between `launch` and `fetch` may look at a value on the device, and errors of
the device appear where they are fetched.

How many clips a batch has: one on a CPU, on a GPU what is asked for, or found out there (batch_size 0). Logits of
another batch size differ in their last digits, and so do those of another place in the batch: libraries choose their
algorithm by the number of rows, and take the last few rows of a product another way than the first. So on a CPU, where
a batch saves little, each clip is run by itself: then its digits are its own, whatever the unit of work. On a GPU a
labelling has one size: the first worker finds it out, writes it down, and all others take it, also after a kill and on
other GPUs. What is easy to break: what is written is never replaced.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kinoray.config.scoring import CPU_BATCH
from kinoray.config.shared import ClipConfig, InferenceConfig
from kinoray.errors import ConfigError, ModelError, ObjectNotFound
from kinoray.network import InputSpec
from kinoray.network.batch import FLOW_CHANNELS, Feeder, RawBatch, VideoBatch, collate, collate_raw, model_inputs
from kinoray.network.build import VideoModel
from kinoray.network.prepare import prepare_model
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record

if TYPE_CHECKING:
    from kinoray.video.frames import Clip

__all__ = [
    "CPU_BATCH",
    "Collate",
    "Forward",
    "Launched",
    "agreed_batch_size",
    "auto_batch_size",
    "collate_for",
    "largest_batch",
]

Collate = Callable[[Sequence["Clip"]], VideoBatch]
"""How clips become a batch."""

_MOST = 64  # clips; a GPU is full before
_SHARE = 0.8  # of the memory that is free: recorded calls and the next batch's inputs come on top

_ERRORS = (RuntimeError, TypeError, ValueError)
"""What a network raises that cannot take a batch, and CUDA for what went wrong on the device."""


def collate_for(device: str, finish: Callable[[RawBatch], VideoBatch] | None) -> Collate:
    """Clips as a batch, on the device where that is not the CPU. `finish` does there what decoding has left to it."""
    if finish is not None:
        return lambda clips: finish(collate_raw(clips))
    # From pinned memory: a copy from any other waits for what the device computes.
    return collate if device == "cpu" else partial(collate, stack=Feeder(device).stacked)


class Launched:
    """A batch under way. `fetch` it once."""

    def __init__(
        self, logits: Tensor, embeddings: Tensor | None, shapes: dict[str, list[int]], num_classes: int
    ) -> None:
        self._shapes, self._expected = shapes, [_num_clips(shapes), num_classes]
        self._host = [_to_host(x) for x in (logits, embeddings) if x is not None]
        self._done: torch.cuda.Event | None = None
        if logits.device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def fetch(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Wait for it: logits, float64 [B, C], and embeddings, float32 [B, D].

        Raises:
            ModelError: the network failed, or gave NaN, infinity or another number of classes.
        """
        try:
            if self._done is not None:
                self._done.synchronize()
        except RuntimeError as error:
            raise _failed(self._shapes, error) from error
        logits, embeddings = self._host[0].numpy(), self._host[1].numpy() if len(self._host) > 1 else None
        if list(logits.shape) != self._expected:
            found = list(logits.shape)
            raise ModelError(f"the model gave logits {found}, expected {self._expected} for its labels")
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits)).any(axis=1).sum())
            raise ModelError(f"the model gave NaN or infinite logits for {bad} of {len(logits)} clips of a batch")
        return logits.astype(np.float64), embeddings


class Forward:
    """A prepared network on its device."""

    def __init__(
        self,
        model: VideoModel,
        spec: InputSpec,
        device: str,
        num_classes: int,
        *,
        collate: Collate = collate,
        embeddings: Callable[[int], Tensor] | None = None,
    ) -> None:
        """`embeddings` gives those of the forward pass before it, [B, D], for so many clips."""
        self._model, self._spec, self._device = model, spec, device
        self._num_classes, self._collate, self._embeddings = num_classes, collate, embeddings

    def launch(self, clips: Sequence["Clip"]) -> Launched:
        """Start on a batch of clips.

        Raises:
            ModelError: the clips do not fit the network or one another, or the network fails.
        """
        inputs = model_inputs(self._collate(clips), self._spec, self._device)
        shapes = {name: list(x.shape) for name, x in inputs.items() if x is not None}
        try:
            with torch.inference_mode():
                logits = self._model(**inputs).float()
                embeddings = self._embeddings(len(clips)) if self._embeddings else None
                return Launched(logits, embeddings, shapes, self._num_classes)
        except _ERRORS as error:
            raise _failed(shapes, error) from error


def _to_host(x: Tensor) -> Tensor:
    """Its values, once the stream has come to here; in pinned memory, without which the copy would wait."""
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _num_clips(shapes: dict[str, list[int]]) -> int:
    """Number of clips."""
    return next(iter(shapes.values()))[0]


def _failed(shapes: dict[str, list[int]], error: Exception) -> ModelError:
    return ModelError(f"the model failed on a batch {shapes}: {error}")


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The last of 1, 2, 4, ... up to `most` that fits; 0 if one does not. Running out of memory is not fitting."""
    size, found = 1, 0
    while size <= most:
        try:
            if not fits(size):
                break
        except torch.OutOfMemoryError:
            break
        found, size = size, 2 * size
    return found


def auto_batch_size(model: VideoModel, clip: ClipConfig, inference: InferenceConfig, device: str) -> int:
    """Clips a forward pass of this network: CPU_BATCH on a CPU, else what fits in the GPU's memory.

    The network is moved to the device.

    Raises:
        ConfigError: the GPU's memory does not hold one clip.
    """
    if device == "cpu":
        return CPU_BATCH
    cast(nn.Module, model).to(device)
    plain = InferenceConfig(precision=inference.precision)  # compiling takes minutes for each size, and less memory
    prepared = prepare_model(model, clip, plain)
    budget = _SHARE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            prepared(**model_inputs(_blank(size, model, clip), model.input_spec, device))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() <= budget

    size = largest_batch(fits, _MOST)
    torch.cuda.empty_cache()
    if not size:
        raise ConfigError(
            f"batch_size 0 finds no room for one clip in {budget / 2**30:.1f} GiB of GPU memory; give "
            "--inference.precision bf16, fewer --num-segments, or a larger GPU"
        )
    return size


def _blank(size: int, model: VideoModel, clip: ClipConfig) -> VideoBatch:
    side, spec = clip.view.crop_px, model.input_spec
    shape = (size, clip.sample.num_segments, clip.sample.frames_per_segment)
    rgb = torch.zeros(*shape, 3, side, side, dtype=torch.uint8)
    flow = torch.zeros(*shape, FLOW_CHANNELS, side, side, dtype=torch.int8) if spec.flow_channels else None
    return VideoBatch(rgb=rgb, flow=flow)


def agreed_batch_size(storage: Storage, root: str, find: Callable[[], int]) -> int:
    """The size written down in the labelling's folder `root`; if there is none yet, what `find` gives is written."""
    uri = join(root, "batch_size.json")
    try:
        return _read(storage, uri)
    except ObjectNotFound:
        storage.put_if_absent(uri, json.dumps({"batch_size": find()}).encode())
        return _read(storage, uri)  # another worker may have been first


def _read(storage: Storage, uri: str) -> int:
    def of(record: dict[str, Any]) -> int:
        size = int(record["batch_size"])
        if not 1 <= size <= _MOST:
            raise ValueError(f"batch_size {size} is not 1 .. {_MOST}")
        return size

    return read_record(storage, uri, of)
