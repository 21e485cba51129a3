"""Calls that are made ready once for one shape and then repeated: compiled, filled up to it, on CUDA recorded.

What is easy to break: a replay writes where the recording wrote, so what it gives is copied before anyone keeps it; and
recorded code must not wait for the host. Whatever cannot be compiled or recorded runs as it is, and the log says so.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Compiled", "Recording", "Repeated"]

_LOG = logging.getLogger(__name__)
_WARM_UPS = 3  # calls before the recording: they compile, choose algorithms and fill caches

Shape = tuple[tuple[str, torch.Size], ...]


class Compiled(nn.Module):
    """A module that torch.compile takes on its first call, for each shape anew; uncompiled where it cannot."""

    def __init__(self, module: nn.Module, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self._compiled: Callable[..., Any] | None = torch.compile(module, dynamic=False, options=options)

    @property
    def is_compiled(self) -> bool:
        """Whether the next call tries it."""
        return self._compiled is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        if self._compiled is not None:
            try:
                return self._compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, OSError) as error:  # failed compilations are RuntimeErrors of many names;
                _say("torch.compile", error)  # a real fault comes again, uncompiled
                self._compiled = None
        return self.module(*args, **kwargs)


class Recording:
    """A call as a CUDA graph: its kernels are launched at once, without Python between them.

    What the call caches is read where it lay when it was recorded, so it must stay there. What a replay gives is
    overwritten by the next one.
    """

    def __init__(self, call: Callable[..., Tensor], **inputs: Tensor) -> None:
        device = next(iter(inputs.values())).device
        with torch.inference_mode(False):  # tensors that may be written to in any mode
            self._inputs = {name: torch.empty_like(x) for name, x in inputs.items()}
        self._write(inputs)
        here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                call(**self._inputs)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that decode may use the device meanwhile. The outer stream is there for a recording that fails: torch
        # then leaves its own stream in place.
        with torch.cuda.stream(here), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = call(**self._inputs)

    def _write(self, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            self._inputs[name].copy_(x)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The output for inputs of the recorded shapes, until the next call."""
        self._write(inputs)
        self._graph.replay()
        return self._output


class Repeated(nn.Module):
    """A network that always sees full batches: short ones are filled up with zeros, their logits cut off again.

    The size is that of the largest batch so far of clips of a shape. On CUDA a call is recorded for each shape and
    replayed; a network that waits for the host (`.item()`, a choice by a tensor's value) cannot be, and is called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.input_spec = getattr(model, "input_spec", None)
        self._sizes: dict[Shape, int] = {}
        self._recordings: dict[Shape, Recording | None] = {}

    @torch.no_grad()
    def forward(self, **inputs: Tensor | None) -> Tensor:
        """Return logits [B, C] for inputs [B, ...]; a stream that the network does not look at may be None."""
        present = {name: x for name, x in inputs.items() if x is not None}
        absent = dict.fromkeys(inputs.keys() - present.keys())
        shape = tuple((name, x.shape[1:]) for name, x in present.items())
        count, device = next((len(x), x.device) for x in present.values())
        if count > self._sizes.get(shape, 0):
            self._sizes[shape] = count
            self._recordings.pop(shape, None)
        full = {name: _filled(x, self._sizes[shape]) for name, x in present.items()}
        if device.type == "cuda":
            if shape not in self._recordings:
                self._recordings[shape] = self._record(full, absent)
            if (recording := self._recordings[shape]) is not None:
                return recording(**full).clone()[:count]
        return cast(Tensor, self.model(**full, **absent))[:count]

    def _record(self, inputs: dict[str, Tensor], absent: dict[str, None]) -> Recording | None:
        try:
            return Recording(partial(self.model, **absent), **inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _say("CUDA graphs", error)
            return None


def _filled(x: Tensor, size: int) -> Tensor:
    missing = size - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _say(what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    _LOG.warning("running without %s: %s: %s", what, type(error).__name__, reason)
