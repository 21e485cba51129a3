"""Batches through a network without waiting for each: the next one is launched before the last one's logits are read.

On a GPU the host only queues work, so it can prepare a batch while another is computed; on a CPU the same calls compute
at once. What is easy to break: nothing between `launch` and `fetch` may look at a value on the device, and errors of
the device appear where they are fetched.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kinoray.errors import ModelError
from kinoray.network.batch import RawBatch, VideoBatch, collate, model_inputs
from kinoray.network.build import InputSpec, VideoModel
from kinoray.network.device_input import Feeder, collate_raw

if TYPE_CHECKING:
    from kinoray.video.clip import Clip

__all__ = ["Collate", "Forward", "Launched", "collate_for"]

Collate = Callable[[Sequence["Clip"]], VideoBatch]
"""How clips become a batch."""

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
