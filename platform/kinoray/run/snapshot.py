"""All that training needs to go on from a step, as named tensors on the CPU: copies, so that training need not wait.

No generator's state is in it: `seed_step` seeds them anew for each step, from numbers that a resumed run has, too.

    optimizer/<parameter>/<moment>   what the optimizer remembers
    epoch/steps                      Replica.history, in a snapshot inside an epoch
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, manual_seed

from kinoray.checkpoint import load_weights
from kinoray.errors import CheckpointCorrupt
from kinoray.run.recipe import load_optimizer_state, optimizer_state
from kinoray.run.replica import Replica

__all__ = ["HISTORY", "Snapshot", "load_snapshot", "seed_step", "take_snapshot"]

HISTORY = "epoch/steps"
_OPTIMIZER = "optimizer/"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State between two steps; equal on all ranks but for buffers, which are rank 0's in any case."""

    weights: dict[str, Tensor]
    """The module's parameters and buffers."""
    train: dict[str, Tensor]
    """What else there is; see the module."""


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a network may draw from (dropout and the like: torch, numpy, random) for one step of one rank."""
    key = hashlib.sha256(f"{seed}\n{epoch}\n{step}\n{rank}".encode()).digest()
    manual_seed(int.from_bytes(key[:7], "big"))
    np.random.seed(int.from_bytes(key[7:11], "big"))
    random.seed(key[11:19])


def take_snapshot(replica: Replica, *, in_epoch: bool) -> Snapshot:
    """Copy the state of this rank; in_epoch adds what the epoch has counted so far (call `finish` before)."""
    train = {
        f"{_OPTIMIZER}{name}": _copy(value)
        for name, value in optimizer_state(replica.module, replica.optimizer).items()
    }
    if in_epoch:
        train[HISTORY] = _copy(replica.history())
    return Snapshot({name: _copy(value) for name, value in replica.module.state_dict().items()}, train)


def load_snapshot(replica: Replica, weights: Mapping[str, Tensor], train: Mapping[str, Tensor], uri: str) -> None:
    """Put back what take_snapshot copied and the checkpoint at uri kept.

    Raises:
        CheckpointMismatch: it is of another network.
        CheckpointCorrupt: the counts of the epoch have another form.
    """
    load_weights(replica.module, weights, uri)
    moments = {name.removeprefix(_OPTIMIZER): value for name, value in train.items() if name.startswith(_OPTIMIZER)}
    load_optimizer_state(replica.module, replica.optimizer, moments)
    replica.reset()
    if HISTORY in train:
        history = train[HISTORY]
        if history.dim() != 2 or history.shape[1] != 5:
            raise CheckpointCorrupt(f"{uri}: {HISTORY} must be [steps, 5], found {list(history.shape)}")
        replica.restore(history)


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return copied.contiguous()
