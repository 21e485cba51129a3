"""A moving average of a network's weights while it trains (EMA); what is scored and saved where a run has one.

decay_t = min(decay, (1 + t) / (10 + t))      t = 0, 1, ... counts the updates
a       = decay_t a + (1 - decay_t) w         floating point weights and statistics; counters are copied
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kinoray.errors import CheckpointMismatch
from kinoray.train.sharding import full_tensor, like_parameter

__all__ = ["Average"]


class Average:
    """Begins with the weights that the module has now; holds shards where the module does."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self.values: dict[str, Tensor] = {}
        """The averages, by the names of the module's state."""
        self.num_updates = 0
        self.restart(module)

    def restart(self, module: nn.Module) -> None:
        """Begin anew with the module's weights."""
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's weights in."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value.detach(), 1.0 - decay)
            else:
                self.values[name].copy_(value)
        self.num_updates += 1

    def full(self) -> dict[str, Tensor]:
        """The averaged state, whole; all ranks must call it where it is sharded."""
        return {name: full_tensor(value) for name, value in self.values.items()}

    def buffers(self, module: nn.Module) -> list[Tensor]:
        """The averages of the module's buffers, in their order."""
        return [self.values[name] for name, _ in module.named_buffers() if name in self.values]

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Put back what `full` gave after num_updates.

        Raises:
            CheckpointMismatch: the names are others.
        """
        if set(state) != set(self.values):
            raise CheckpointMismatch("the moving average in the checkpoint is of another network")
        for name, value in self.values.items():
            value.copy_(like_parameter(state[name].to(value.device), value))
        self.num_updates = num_updates
