"""The training recipe: AdamW, linear warm-up, cosine; and its state as named tensors for a checkpoint."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kinoray.config import OptimConfig
from kinoray.errors import CheckpointMismatch

__all__ = ["learning_rate", "load_optimizer_state", "make_optimizer", "optimizer_state"]


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: rises linearly over warmup_fraction of the steps, then falls along a cosine.

    The first step already has a rate above zero, and the step after the last would have zero.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / (num_warmup + 1)
    share = (step - num_warmup) / (num_steps - num_warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments as `parameter name/exp_avg` and so on; the optimizer's own form numbers the parameters."""
    state: dict[str, Tensor] = {}
    for name, parameter in _trained(module):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_state gave.

    Raises:
        CheckpointMismatch: the state names a parameter that the module does not train.
    """
    trained = _trained(module)
    moments: dict[int, dict[str, Tensor]] = {}
    index_of = {name: index for index, (name, _) in enumerate(trained)}
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        if name not in index_of:
            raise CheckpointMismatch(f"the optimizer state is for {name!r}, which this model does not train")
        moments.setdefault(index_of[name], {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
