"""Steps that all ranks of a run take together, so that none waits for ever for one that gave up.

Easy to break: every rank must come to each of these, in the same order.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from kinoray.errors import KinorayError

__all__ = ["agreed", "from_first"]

T = TypeVar("T")


def agreed(step: Callable[[], T]) -> T:
    """The result of a step without collectives; where it fails on one rank, the error is raised on all."""
    error: KinorayError | None = None
    try:
        result = step()
    except KinorayError as found:
        error = found
    errors: list[KinorayError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise first
    return result


def from_first(step: Callable[[], T]) -> T:
    """What the step gives on rank 0, the only one to take it, for all ranks; an error of it is raised on all."""
    found: list[T | KinorayError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = step()
        except KinorayError as error:
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], KinorayError):
        raise found[0]
    return found[0]  # type: ignore[return-value]
