"""Pretrained weights: reading them, fitting them to a network strictly, making a flow stem out of an RGB stem.

Nothing is unpickled, and nothing is skipped in silence: what does not fit is listed, entry by entry. What is easy to
break: a file may be a stranger's, so it is looked at before it is read, and takes no more memory than it has bytes.
"""

import errno
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

__all__ = ["WeightsMismatch", "flow_stem", "load_strict", "open_regular", "read_state", "require_fit"]

_SHOWN = 8
_SMALL_BYTES = 2**24
_MAX_EXPANSION = 64  # bytes of a larger file for each that is on the disk
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class WeightsMismatch(ValueError):
    """Weights do not fit the network; the message lists what is missing, unexpected or of another shape."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read from, without waiting for a pipe's other end.

    Raises ValueError if it is none, or has more than 64 times the bytes that are on the disk, the others being holes;
    OSError if it cannot be opened. (kinoray.config.files has the platform's own, which networks do not import.)
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if _is_of_holes(descriptor, info.st_size):
            raise ValueError(f"{path} has {info.st_size:,} bytes, nearly all of them holes: fetch it again")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _is_of_holes(descriptor: int, size_bytes: int) -> bool:
    """Whether a large file has next to nothing on the disk. Where the file system does not tell, it has no holes."""
    there = offset = 0
    while size_bytes > _SMALL_BYTES and there < size_bytes // _MAX_EXPANSION:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
            offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            return error.errno == errno.ENXIO  # behind the last data
        there += offset - start
    os.lseek(descriptor, 0, os.SEEK_SET)
    return False


def read_state(path: str | Path, *, option: str = "backbone_weights") -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or, weights only, from a .pth or .pt file.

    Raises ValueError naming the option and the file if it is not there, not readable, or not a state dict of plain
    tensors: dense, of real or whole numbers, none larger than its bytes.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{option}: {file} is not a file (expected .safetensors, .pth or .pt)")
    state: object
    try:
        with open_regular(file) as opened:
            if file.suffix == ".safetensors":
                state = _read_safetensors(file, option)
            else:
                state = _read_pickle(opened, f"{option}: {file}")
    except OSError as error:
        raise ValueError(f"{option}: {file} cannot be opened: {error.strerror or error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{option}: {file} holds a {type(state).__name__}, expected a dict of tensors")
    for name, tensor in state.items():
        if problem := _oddity(tensor):
            raise ValueError(f"{option}: {file}: {name!s:.200} {problem}; save it as a plain tensor")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _oddity(tensor: Tensor) -> str:
    """Why a tensor is none of a network's weights; empty for one that is."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return f"is no dense tensor ({str(tensor.layout).removeprefix('torch.')}, {tensor.device}, {tensor.dtype})"
    if tensor.dtype not in (*_REAL, *_WHOLE):
        return f"is of {tensor.dtype}, expected real or whole numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"repeats its numbers: shape {tuple(tensor.shape)} of {tensor.untyped_storage().nbytes():,} bytes"
    return ""


def _read_pickle(file: BinaryIO, where: str) -> object:
    try:
        if zipfile.is_zipfile(file):  # torch takes packed members too, and unpacks them whole
            members = zipfile.ZipFile(file).infolist()
            size_bytes = os.fstat(file.fileno()).st_size
            if sum(one.file_size for one in members) > size_bytes:
                raise ValueError(f"its members have more bytes than the {size_bytes:,} of the file")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for files not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{where} cannot be read as tensors only: {reason}") from error


def _read_safetensors(file: Path, option: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{option}: {file} needs the package safetensors (pip install safetensors)") from error
    try:
        return load_file(file)
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # a type torch has not
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
