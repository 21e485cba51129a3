"""What a rank's steps change and a checkpoint keeps: weights, moments, their moving average; and where they start from.

A checkpoint holds whole tensors, so a run may go on with another number of workers, or with `parallel` changed:

    weights (model.safetensors)      what is scored: the network's state, or its moving average where there is one
    train (train_state.safetensors)
      optimizer/<parameter>/<moment>   what the optimizer remembers
      live/<name>, average/updates     with a moving average: the state that is trained, and how often it was taken in
      scaler/<name>                    fp16: the scale of the loss
      epoch/steps                      Replica.history, in a snapshot inside an epoch

No generator's state is in it: `seed_step` seeds them anew for each step, from numbers that a resumed run has, too.

Easy to break: making a whole tensor of a sharded one is a collective, so all ranks must do it, in the same order. And
what shards is imported where something is: it takes each process a second and more, which most trainings need not wait.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, manual_seed, nn

from kinoray.config.shared import ModelConfig
from kinoray.errors import CheckpointMismatch
from kinoray.network.build import VideoModel, backbone_parts, classifier_names
from kinoray.network.checkpoint import (
    find_checkpoint,
    load_meta,
    load_model_state,
    load_weights,
    require_weights,
    weight_shapes,
)
from kinoray.storage.objects import Storage
from kinoray.train.recipe import trained_parameters

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "HISTORY",
    "Average",
    "Snapshot",
    "TrainState",
    "is_sharded",
    "load_optimizer_state",
    "optimizer_state",
    "seed_step",
    "shard",
    "start_from",
]

HISTORY = "epoch/steps"
_OPTIMIZER = "optimizer/"
_LIVE = "live/"
_UPDATES = "average/updates"
_SCALER = {"scaler/scale": "scale", "scaler/growth_tracker": "_growth_tracker"}


# Where a run starts from


def start_from(storage: Storage, uri: str, model: VideoModel, config: ModelConfig, labels: Sequence[str]) -> str:
    """Copy the weights of the checkpoint (or run folder) at uri into the model; what was and was not taken, in a line.

    Every weight must fit, but for the classifier of other classes. It is taken only if the checkpoint's classes are
    `labels`, in their order: equal counts are not enough.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: as load_model_state.
        CheckpointMismatch: other weights than the classifier's are missing, not wanted or of another shape.
    """
    where = find_checkpoint(storage, uri)
    meta = load_meta(storage, where)
    shapes = weight_shapes(storage, where)
    own = model.state_dict()
    kept: dict[str, Tensor] = {}
    left_out: list[str] = []
    if meta.labels != tuple(labels):
        for name in sorted(classifier_names(model, config, len(labels))):
            found = f"{list(shapes[name].shape)} there" if name in shapes else "not there"
            left_out.append(f"{name} ({found}, {list(own[name].shape)} here)")
            kept[name] = own[name]
    require_weights(cast(nn.Module, model), shapes | kept, where)  # before they are read: they may be huge
    load_weights(cast(nn.Module, model), load_model_state(storage, where) | kept, where)
    taken = f"train: starts from {where}: {len(own) - len(left_out)} of {len(own)} weights"
    if not left_out:
        return taken
    why = f"left out, as its {len(meta.labels)} classes are not these {len(labels)}"
    return f"{taken}; {why}: {', '.join(left_out)}"


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a network may draw from (dropout and the like: torch, numpy, random) for one step of one rank."""
    key = hashlib.sha256(f"{seed}\n{epoch}\n{step}\n{rank}".encode()).digest()
    manual_seed(int.from_bytes(key[:7], "big"))
    np.random.seed(int.from_bytes(key[7:11], "big"))
    random.seed(key[11:19])


# What steps change


def shard(module: nn.Module, device_type: str) -> None:
    """Spread the parameters of a network over all ranks: each of its backbone_parts a unit, the rest another one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for name in backbone_parts(module):
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)


class Average:
    """A moving average of a network's weights while it trains (EMA); begins with those that it has now.

        decay_t = min(decay, (1 + t) / (10 + t))      t = 0, 1, ... counts the updates
        a       = decay_t a + (1 - decay_t) w         floating point weights and statistics; counters are copied

    It holds shards where the module does. torch's AveragedModel cannot: it copies the module, which FSDP2 refuses; and
    it averages counters, too.
    """

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

    def buffers(self, module: nn.Module) -> list[Tensor]:
        """The averages of the module's buffers, in their order."""
        return [self.values[name] for name, _ in module.named_buffers() if name in self.values]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State between two steps, whole tensors on the CPU; equal on all ranks but for buffers, which are rank 0's."""

    weights: dict[str, Tensor]
    """What is scored and labelled with: the module's parameters and buffers, or their moving average."""
    train: dict[str, Tensor]
    """What else there is; see the module."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """A rank's part of it. All ranks must make the same calls."""

    module: nn.Module
    """The network, as it is trained; sharded or not."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None

    def weights(self) -> dict[str, Tensor]:
        """What is scored and saved: the moving average if there is one, else the module's state; whole."""
        values = self.module.state_dict() if self.average is None else self.average.values
        return {name: _whole(value) for name, value in values.items()}

    def share_buffers(self) -> None:
        """Give all ranks the buffers (BatchNorm's statistics) of rank 0, whose they are in a checkpoint."""
        if dist.get_world_size() > 1:
            averaged = [] if self.average is None else self.average.buffers(self.module)
            for buffer in [*self.module.buffers(), *averaged]:
                dist.broadcast(buffer, src=0)

    def snapshot(self, *, keep: bool = True) -> Snapshot:
        """Copies of it all, so that training need not wait for who writes them.

        A rank that does not keep the state gets an empty one.
        """
        live = self.module.state_dict()
        weights = dict(live)
        train = {f"{_OPTIMIZER}{name}": value for name, value in optimizer_state(self.module, self.optimizer).items()}
        if self.average is not None:
            weights = self.average.values
            for name, value in live.items():
                train[f"{_LIVE}{name}"] = value
            train[_UPDATES] = torch.tensor(self.average.num_updates)
        scaling = self.scaler.state_dict()
        if scaling:
            for name, key in _SCALER.items():
                train[name] = torch.tensor(scaling[key])
        return Snapshot(_copies(weights, keep), _copies(train, keep))

    def load(self, weights: Mapping[str, Tensor], train: Mapping[str, Tensor], uri: str) -> None:
        """Put back what `snapshot` copied and the checkpoint at uri kept.

        Raises:
            CheckpointMismatch: it is of another network, or of a run with another optim.ema_decay.
        """
        if (self.average is not None) != (_UPDATES in train):
            raise CheckpointMismatch(f"{uri} and this run differ in optim.ema_decay: one of them has a moving average")
        require_weights(self.module, weights, uri)
        _set_weights(self.module, weights)
        if self.average is not None:
            # The average is what the module holds for a moment: it is then sharded as the module is.
            self.average.restart(self.module)
            self.average.num_updates = int(train[_UPDATES])
            live = _under(train, _LIVE)
            require_weights(self.module, live, uri)
            _set_weights(self.module, live)
        load_optimizer_state(self.module, self.optimizer, _under(train, _OPTIMIZER))
        scaling = self.scaler.state_dict()
        if scaling:
            saved = {key: train[name].item() for name, key in _SCALER.items()}
            self.scaler.load_state_dict(scaling | saved)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments as `parameter name/exp_avg` and so on, as they are (sharded ones as shards).

    The optimizer's own form numbers the parameters. torch's helpers for it are not exact: they make moments for
    parameters that have never had a gradient.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(module):
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{moment}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_state gave, made whole.

    Raises:
        CheckpointMismatch: the state names a parameter that the module does not train.
    """
    trained = dict(trained_parameters(module))
    numbers = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        if name not in trained:
            raise CheckpointMismatch(f"the optimizer state is for {name!r}, which this model does not train")
        number = numbers.index(id(trained[name]))
        moments.setdefault(number, {})[moment] = _spread_like(trained[name], value)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the network; names and shapes must be its own."""
    own = module.state_dict()
    module.load_state_dict({name: _spread_like(own[name], value) for name, value in weights.items()})


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether it is one that `shard` was called for."""
    return hasattr(module, "set_requires_gradient_sync")


def _is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def _spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, sharded as the parameter is; any other tensor as it is."""
    if _is_shard(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _copies(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one after another; none where they are not kept.

    To the CPU alone would hand out the tensors themselves where they are there already.
    """
    copied = {}
    for name, value in state.items():
        whole = _whole(value)
        if keep:
            copied[name] = whole.detach().to("cpu", copy=True).contiguous()
    return copied
