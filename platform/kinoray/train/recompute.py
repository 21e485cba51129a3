"""Activation checkpointing: parts of a network keep nothing for the gradient but their inputs, and run twice.

Easy to break: the second run must not move what the first has moved: batch norms' statistics stay as they are in it,
and torch.utils.checkpoint replays the generators.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kinoray.errors import ConfigError
from kinoray.network.parts import backbone_parts
from kinoray.train.recipe import batch_norms

__all__ = ["Recomputed", "recompute"]


class Recomputed:
    """The parts of a network that are computed twice; `ran` says whether its forward has called any of them."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.ran = False
        for part in parts:
            part.forward = self._twice(part, part.forward)

    def _twice(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _still(part)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.ran = True
            if not (part.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run


def recompute(module: nn.Module, what: Literal["none", "head", "all"]) -> Recomputed | None:
    """Make the head, or the head and each block of the backbones, keep no activations inside; None for nothing.

    The head is what the network has beside its backbone_parts; blocks are the members of their nn.Sequential.

    Raises:
        ConfigError: the network names no backbone_parts, so there is nothing to choose.
    """
    if what == "none":
        return None
    names = backbone_parts(module)
    if not names:
        raise ConfigError(
            f"optim.recompute must be none for {type(module).__name__}, which names no backbone_parts, got {what!r}"
        )
    parts = [child for name, child in module.named_children() if name not in names]
    if what == "all":
        for name in names:
            parts += _blocks(module.get_submodule(name))
    return Recomputed(parts)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost nn.Sequential modules; one of plain layers is a block itself."""
    if isinstance(module, nn.Sequential):
        has_blocks = any(list(child.children()) for child in module)
        return list(module) if has_blocks else [module]
    return [block for child in module.children() for block in _blocks(child)]


@contextmanager
def _still(part: nn.Module) -> Iterator[None]:
    """Batch norms compute as they do in training, but leave their statistics alone."""
    norms = batch_norms(part)
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
