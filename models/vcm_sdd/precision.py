"""Autocast at the places where it would round too much."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "no_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on x's device, None if it is off or unknown there (meta)."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on x's device keep the dtypes they are given."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
