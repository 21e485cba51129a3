"""Stand-ins for CUDA tensors: shapes, dtypes and devices without values, on a machine without a GPU.

An operation that needs a value on the host (`.item()`, a choice by a tensor, indexing by a mask) or that mixes devices
fails on them as it fails, or waits, on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LeavesDevice(AssertionError):
    """An operation that a host must wait for, or that cannot be recorded as a CUDA graph."""


class _OnDevice(TorchDispatchMode):
    """Refuses tensors of the host; with `sends`, copies to the device that do not wait may begin there."""

    def __init__(self, sends: bool) -> None:
        super().__init__()
        self._sends = sends

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        on_host = [x for x in tensors if x.device.type == "cpu" and x.ndim]  # numbers travel with the launch
        arrives = any(x.device.type == "cuda" for x in tree_leaves(out) if isinstance(x, Tensor))
        if on_host and not self._sends:
            raise LeavesDevice(f"{func} on the host, {list(on_host[0].shape)}")
        if on_host and arrives and not kwargs.get("non_blocking"):
            raise LeavesDevice(f"{func} waits for the device")
        return out


@contextmanager
def stand_ins() -> Iterator[None]:
    """Tensors made in it have no values; device="cuda" is there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_device(*, sends: bool = False) -> _OnDevice:
    """A context in which every operation must stay on the device, or, with `sends`, only send to it without waiting."""
    return _OnDevice(sends)


def moved(module: nn.Module) -> nn.Module:
    """The module with stand-ins on CUDA for its parameters and buffers; `.to` leaves it there. Within `stand_ins`."""
    for part in module.modules():
        for held, make in ((part._parameters, nn.Parameter), (part._buffers, lambda x, _: x)):
            for name, x in list(held.items()):
                if x is not None:
                    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                    held[name] = make(there, x.requires_grad)
    module.to = lambda *_, **__: module  # type: ignore[method-assign]  # Module.to cannot swap such tensors
    return module
