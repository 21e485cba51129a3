"""Weights that are spread over the ranks (FSDP2) and whole ones, by the same calls.

Easy to break: making a whole tensor of a sharded one is a collective, so all ranks must do it, in the same order.
"""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kinoray.network.parts import backbone_parts

__all__ = ["full_state", "full_tensor", "is_sharded", "like_parameter", "load_full_state", "shard"]


def shard(module: nn.Module, device_type: str) -> None:
    """Spread the parameters of a network over all ranks: each of its backbone_parts a unit, the rest another one."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for name in backbone_parts(module):
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(module, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the network, whole."""
    return {name: full_tensor(value) for name, value in module.state_dict().items()}


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, spread as the parameter is; any other tensor as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the network; names and shapes must be its own."""
    own = module.state_dict()
    module.load_state_dict({name: like_parameter(value, own[name]) for name, value in state.items()})
