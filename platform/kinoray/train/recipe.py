"""The training recipe: learning rates, the optimizer and its state as named tensors, the loss, what is frozen."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kinoray.config.shared import OptimConfig
from kinoray.errors import CheckpointMismatch
from kinoray.train.sharding import like_parameter

__all__ = [
    "batch_norms",
    "class_weights",
    "freeze",
    "learning_rate",
    "load_optimizer_state",
    "loss_sum",
    "make_optimizer",
    "optimizer_state",
    "set_rate",
]

_STEP_FACTOR = 0.1  # schedule=step: what the rate is multiplied by

# Shapes: B videos, C classes


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: rises linearly over warmup_fraction of the steps, then follows the schedule.

    The first step already has a rate above zero; on a cosine the step after the last would have zero.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / (num_warmup + 1)
    if config.schedule == "step":
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


def make_optimizer(module: nn.Module, config: OptimConfig, backbone: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained; those named in `backbone` have a rate of their own (set_rate).

    On CUDA it is one kernel over all of them; elsewhere torch's plain form, whose digits are other ones.
    """
    head = [parameter for name, parameter in _trained(module) if name not in backbone]
    rest = [parameter for name, parameter in _trained(module) if name in backbone]
    groups = [{"params": head, "lr_factor": 1.0}, {"params": rest, "lr_factor": config.backbone_lr_factor}]
    on_cuda = all(parameter.device.type == "cuda" for parameter in (*head, *rest))
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True if on_cuda else None,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step use this learning rate, times lr_factor in each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments as `parameter name/exp_avg` and so on, as they are (sharded ones as shards).

    The optimizer's own form numbers the parameters.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in _trained(module):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_state gave, made whole.

    Raises:
        CheckpointMismatch: the state names a parameter that the module does not train.
    """
    trained = dict(_trained(module))
    numbers = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {name: numbers.index(id(parameter)) for name, parameter in trained.items()}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        if name not in index_of:
            raise CheckpointMismatch(f"the optimizer state is for {name!r}, which this model does not train")
        moments.setdefault(index_of[name], {})[moment] = like_parameter(value, trained[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


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
