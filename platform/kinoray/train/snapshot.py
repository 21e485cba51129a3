"""All that training needs to go on from a step, as named tensors on the CPU: copies, so that training need not wait.

No generator's state is in it: `seed_step` seeds them anew for each step, from numbers that a resumed run has, too.

    optimizer/<parameter>/<moment>   what the optimizer remembers
    live/<name>, average/updates     with a moving average, which is what is saved as weights: those that are trained
    scaler/<name>                    fp16: the scale of the loss
    epoch/steps                      Replica.history, in a snapshot inside an epoch
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, manual_seed

from kinoray.errors import CheckpointCorrupt, CheckpointMismatch
from kinoray.network.checkpoint import require_weights
from kinoray.train.recipe import load_optimizer_state, optimizer_state
from kinoray.train.replica import Replica
from kinoray.train.sharding import full_tensor

__all__ = ["HISTORY", "Snapshot", "load_snapshot", "seed_step", "take_snapshot"]

HISTORY = "epoch/steps"
_OPTIMIZER, _LIVE, _UPDATES = "optimizer/", "live/", "average/updates"
_SCALER = {"scaler/scale": "scale", "scaler/growth_tracker": "_growth_tracker"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State between two steps; equal on all ranks but for buffers, which are rank 0's in any case."""

    weights: dict[str, Tensor]
    """What is scored and labelled with: the module's parameters and buffers, or their moving average."""
    train: dict[str, Tensor]
    """What else there is; see the module."""


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a network may draw from (dropout and the like: torch, numpy, random) for one step of one rank."""
    key = hashlib.sha256(f"{seed}\n{epoch}\n{step}\n{rank}".encode()).digest()
    manual_seed(int.from_bytes(key[:7], "big"))
    np.random.seed(int.from_bytes(key[7:11], "big"))
    random.seed(key[11:19])


def take_snapshot(replica: Replica, *, in_epoch: bool, keep: bool = True) -> Snapshot:
    """Copy the state of this rank; in_epoch adds what the epoch has counted so far (call `finish` before).

    All ranks must call it; one that does not keep the state gets an empty one.
    """
    live = replica.module.state_dict()
    weights = dict(live) if replica.average is None else replica.average.values
    train = {f"{_OPTIMIZER}{name}": value for name, value in optimizer_state(replica.module, replica.optimizer).items()}
    if replica.average is not None:
        train |= {f"{_LIVE}{name}": value for name, value in live.items()}
        train[_UPDATES] = torch.tensor(replica.average.num_updates)
    if scaler := replica.scaler.state_dict():
        train |= {name: torch.tensor(scaler[key]) for name, key in _SCALER.items()}
    if in_epoch:
        train[HISTORY] = replica.history()
    return Snapshot(_copies(weights, keep), _copies(train, keep))


def load_snapshot(replica: Replica, weights: Mapping[str, Tensor], train: Mapping[str, Tensor], uri: str) -> None:
    """Put back what take_snapshot copied and the checkpoint at uri kept; all ranks must call it.

    Raises:
        CheckpointMismatch: it is of another network.
        CheckpointCorrupt: the counts of the epoch have another form.
    """
    live = {name.removeprefix(_LIVE): value for name, value in train.items() if name.startswith(_LIVE)}
    if (replica.average is not None) != (_UPDATES in train):
        raise CheckpointMismatch(f"{uri} and this run differ in optim.ema_decay: one of them has a moving average")
    trained = weights if replica.average is None else live
    require_weights(replica.module, trained, uri)
    replica.load(trained)
    if replica.average is not None:
        replica.average.load(weights, int(train[_UPDATES]))
    moments = {name.removeprefix(_OPTIMIZER): value for name, value in train.items() if name.startswith(_OPTIMIZER)}
    load_optimizer_state(replica.module, replica.optimizer, moments)
    if scaler := replica.scaler.state_dict():
        replica.scaler.load_state_dict(scaler | {key: train[name].item() for name, key in _SCALER.items()})
    replica.reset()
    if HISTORY in train:
        history = train[HISTORY]
        if history.dim() != 2 or history.shape[1] != 5:
            raise CheckpointCorrupt(f"{uri}: {HISTORY} must be [steps, 5], found {list(history.shape)}")
        replica.restore(history)


def _copies(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one after another; none where they are not kept."""
    copied = {}
    for name, value in state.items():
        whole = full_tensor(value)
        if keep:
            copied[name] = _copy(whole)
    return copied


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return copied.contiguous()
