"""Pretrained weights: reading them, fitting them to a network strictly, making a flow stem out of an RGB stem.

Nothing is unpickled, and nothing is skipped in silence: what does not fit is listed, entry by entry.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["WeightsMismatch", "flow_stem", "load_strict", "read_state", "require_fit"]

_SHOWN = 8


class WeightsMismatch(ValueError):
    """Weights do not fit the network; the message lists what is missing, unexpected or of another shape."""


def read_state(path: str | Path, *, option: str = "backbone_weights") -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or, weights only, from a .pth or .pt file.

    Raises ValueError naming the option and the file if it is not there, not readable, or not a state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{option}: {file} is not a file (expected .safetensors, .pth or .pt)")
    if file.suffix == ".safetensors":
        return _read_safetensors(file, option)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for files not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{option}: {file} cannot be read as tensors only: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{option}: {file} holds a {type(state).__name__}, expected a dict of tensors")
    return {str(name): tensor for name, tensor in state.items()}


def _read_safetensors(file: Path, option: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{option}: {file} needs the package safetensors (pip install safetensors)") from error
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{option}: {file} is not a whole safetensors file: {error}") from error


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str, ignore: Iterable[str] = ()) -> None:
    """Copy a state dict into a module; every entry must fit, by name and shape.

    `ignore` names prefixes that may be in the file and are not used (the classifier of an ImageNet network).
    `num_batches_tracked` may be missing, as in files from before torch 0.4.1. Raises WeightsMismatch.
    """
    prefixes = tuple(ignore)
    given = {name: value for name, value in state.items() if not (prefixes and name.startswith(prefixes))}
    require_fit(module, given, source=source)
    module.load_state_dict(given, strict=False)


def require_fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise WeightsMismatch, listing what differs, unless load_strict would take every entry; copies nothing."""
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} (expected {tuple(own[name].shape)}, found {tuple(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {_first(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightsMismatch(
            f"{source} does not fit {type(module).__name__}: expected {len(own)} entries, found {len(state)}; "
            + "; ".join(problems)
        )


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def flow_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Return a stem kernel for `in_channels` flow channels from an RGB one: its mean over channels, repeated.

    TSN's cross-modality initialisation. weight [D, 3, kh, kw] -> [D, in_channels, kh, kw].
    """
    return weight.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1)
