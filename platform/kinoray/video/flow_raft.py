"""Optical flow of many pairs at once by torchvision's RAFT, with weights that the user has.

RAFT was trained on colour pictures. Here it sees grey ones in all three channels, since of the second frame only the
green plane, or Y, comes to the device.
"""

import io

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_large, raft_small

from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.storage.objects import Storage

__all__ = ["Raft", "load_raft"]

# Shapes: P pairs, H W pixels

_MIN_SIDE = 128  # below, the correlation pyramid has an empty level
_MULTIPLE = 8
_GROUP = 16  # pairs at a time
_FIRST_WEIGHT = "feature_encoder.convnormrelu.0.weight"
_KINDS = {32: raft_small, 64: raft_large}  # by the channels of that weight


def _read_state(storage: Storage, uri: str) -> dict[str, Tensor]:
    """The tensors of a weights file; a pickle can bring nothing else."""
    try:
        data = storage.read(uri)
    except ObjectNotFound as error:
        raise ConfigError(
            f"flow.weights {uri} is not there; it must be a file that every worker can read, or s3://"
        ) from error
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # both raise a dozen kinds for files not their own
        raise ConfigError(f"flow.weights {uri} cannot be read as tensors only: {_one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"flow.weights {uri} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class Raft:
    """torchvision's raft_small or raft_large, ready on a device."""

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self._network = network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Motion from each first image to its second, grey levels 0 .. 255, [P, H, W]: float32 [P, 2, H, W].

        In pixels, x then y, as `kinoray.video.flow_tvl1.tvl1_flow`. Images are enlarged at the right and at the bottom
        with copies of their last pixels to what RAFT takes: multiples of 8, at least 128.
        """
        height, width = first.shape[1:]
        more = [max(_MIN_SIDE, _MULTIPLE * -(-side // _MULTIPLE)) - side for side in (width, height)]
        found = [first.new_empty((0, 2, height, width), dtype=torch.float32)]
        for start in range(0, len(first), _GROUP):
            images = torch.stack([first[start : start + _GROUP], second[start : start + _GROUP]]).float()
            images = F.pad(images / 127.5 - 1, (0, more[0], 0, more[1]), mode="replicate")
            flow = self._network(*images[:, :, None].expand(-1, -1, 3, -1, -1))[-1]
            found.append(flow[..., :height, :width].float())
        return torch.cat(found)


def load_raft(storage: Storage, uri: str, device: torch.device | str) -> Raft:
    """RAFT with the weights at `uri` (.safetensors, or a .pth of plain weights); their shapes say which of the two.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it does not hold the weights of raft_small or
            raft_large.
    """
    state = _read_state(storage, uri)
    first = state.get(_FIRST_WEIGHT)
    make = None if first is None else _KINDS.get(len(first))
    if make is None:
        raise ConfigError(f"flow.weights {uri} does not hold weights of torchvision's raft_small or raft_large")
    network = make(weights=None)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"flow.weights {uri} does not fit {make.__name__}: {_one_line(error)}") from error
    return Raft(network, device)
