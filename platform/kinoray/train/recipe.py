"""The training recipe (optim.*): learning rates, the optimizer, the loss, what is frozen, what is computed twice.

Easy to break: what is computed twice must move nothing the second time that the first has moved: batch norms'
statistics stay as they are in it, and torch.utils.checkpoint replays the generators.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from kinoray.config.shared import OptimConfig
from kinoray.errors import ConfigError
from kinoray.network.build import backbone_parts, depths

__all__ = [
    "Recomputed",
    "batch_norms",
    "class_weights",
    "freeze",
    "learning_rate",
    "loss_sum",
    "make_optimizer",
    "rate_factors",
    "recompute",
    "set_rate",
    "trained_parameters",
]

_STEP_FACTOR = 0.1  # what the rate is multiplied by after each of step_epochs

# Shapes: B videos, C classes


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: rises linearly over warmup_fraction of the steps, then falls.

    The first step already has a rate above zero; on a cosine the step after the last would have zero.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / (num_warmup + 1)
    if config.step_epochs:
        whole_epochs = step * config.epochs // num_steps
        return config.lr * _STEP_FACTOR ** sum(whole_epochs >= epoch for epoch in config.step_epochs)
    share = (step - num_warmup) / (num_steps - num_warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a network."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def freeze(module: nn.Module, config: OptimConfig, backbone: Collection[str]) -> None:
    """Take from training what freeze_bn and a backbone_lr_factor of 0 name; `backbone` holds names of parameters."""
    if config.freeze_bn:
        for norm in batch_norms(module):
            norm.requires_grad_(False)
    if config.backbone_lr_factor == 0:
        for name, parameter in module.named_parameters():
            if name in backbone:
                parameter.requires_grad_(False)


def rate_factors(module: nn.Module, config: OptimConfig, backbone: Collection[str] = ()) -> dict[str, float]:
    """What the rate is multiplied by for each parameter that is trained:

        factor = layer_decay ** depth * (backbone_lr_factor in `backbone`, else 1)

    depth is 1 in the block in front of the answer and grows towards the input (kinoray.network.build.depths).

    Raises:
        ConfigError: layer_decay is set, and the network names no depth_parts.
    """
    deep = {} if config.layer_decay == 1 else depths(module)
    return {
        name: config.layer_decay ** deep.get(name, 0) * (config.backbone_lr_factor if name in backbone else 1.0)
        for name, _ in trained_parameters(module)
    }


def make_optimizer(module: nn.Module, config: OptimConfig, backbone: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained, in groups of one rate_factors each (set_rate), the largest first.

    On CUDA it is one kernel over all of them; elsewhere torch's plain form, whose digits are other ones.
    """
    factors = rate_factors(module, config, backbone)
    trained = trained_parameters(module)
    groups = [
        {"params": [parameter for name, parameter in trained if factors[name] == factor], "lr_factor": factor}
        for factor in sorted(set(factors.values()), reverse=True)
    ]
    on_cuda = all(parameter.device.type == "cuda" for _, parameter in trained)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True if on_cuda else None,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step use this learning rate, times lr_factor in each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not frozen, by name."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def class_weights(labels: Tensor, num_classes: int, power: float) -> Tensor:
    """Weights float32 [C], (videos of the class) ** -power, such that the mean over `labels` (int64 [N]) is 1.

    A class without a video has weight 0.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = torch.where(counts > 0, counts.clamp(min=1.0) ** -power, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    partners: Tensor | None = None,
    share: float = 1.0,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of logits float [B, C] with labels int64 [B].

    q    = share * onehot(labels) + (1 - share) * onehot(partners)
    loss = - sum over videos and classes of weights_c ((1 - smoothing) q_c + smoothing / C) log softmax(logits)_c
    """

    def part(targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, weight=weights, reduction="sum", label_smoothing=smoothing)

    own = part(labels)
    return own if partners is None else share * own + (1.0 - share) * part(partners)


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
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked = count
