"""How a record gets out of a decoder process: its arrays through memory that both sides hold, the rest as JSON.

A dataclass says by its types what travels how, so a new field is one edit. What is easy to break: the parent believes
nothing without a look. What it makes of an answer has the types that the dataclass says, or is refused.
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

__all__ = ["DTYPES", "MESSAGE_BYTES", "OutputSpace", "pack", "unpack"]

MESSAGE_BYTES = 2**16
"""Longest request or answer; frames and files go another way."""
DTYPES = ("|u1", "|i1", "<i8", "<f8")
"""What arrays may be made of."""

_ALIGN_BYTES = 64
_GROW_BYTES = 2**20
_Record = TypeVar("_Record")


class OutputSpace:
    """Arrays in the shared output file: made in the decoder process, read by the parent at (offset, dtype, shape)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, _GROW_BYTES) if _grow(fd, _GROW_BYTES) else None
        self._arrays: dict[str, tuple[int, np.ndarray]] = {}
        self._end = 0

    @property
    def size_bytes(self) -> int:
        """Address space that the file takes."""
        return len(self._map) if self._map is not None else 0

    def clear(self) -> None:
        """Begin anew; arrays made before are overwritten from now on."""
        self._arrays.clear()
        self._end = 0

    def empty(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """An array with anything in it. The same name again: the array of that name is given up."""
        count = math.prod(shape)
        size_bytes = count * np.dtype(dtype).itemsize
        offset = self._arrays[name][0] if name in self._arrays else self._end
        if name in self._arrays and self._arrays[name][1].nbytes != size_bytes:
            offset = self._end
        end = offset + size_bytes
        self._end = max(self._end, -(-end // _ALIGN_BYTES) * _ALIGN_BYTES)
        if self._map is None or end > len(self._map):
            size = -(-end // _GROW_BYTES) * _GROW_BYTES
            _grow(self._fd, size)
            self._map = mmap.mmap(self._fd, size)  # arrays of the smaller mapping stay valid: the pages are the same
        array = np.frombuffer(self._map, dtype, count, offset).reshape(shape)
        self._arrays[name] = (offset, array)
        return array

    def place(self, name: str, array: np.ndarray) -> list[Any]:
        """[offset, dtype, shape] of an array made by `empty`; any other is copied in under this name."""
        address = array.__array_interface__["data"][0]
        for offset, own in self._arrays.values():
            if own.__array_interface__["data"][0] == address and own.nbytes == array.nbytes:
                return [offset, array.dtype.str, list(array.shape)]
        copy = self.empty(name, array.shape, array.dtype.type)
        copy[...] = array
        return [self._arrays[name][0], array.dtype.str, list(array.shape)]


def _grow(fd: int, size: int) -> bool:
    """Make the file at least so long; it may never shrink."""
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)
    return True


def pack(record: Any, space: OutputSpace) -> dict[str, Any]:
    """A dataclass as JSON, with `arrays`: where each of its arrays lies, by its path (`frames.indices.0`)."""
    arrays: dict[str, list[Any]] = {}
    found = _packed(record, "", space, arrays)
    return {"record": found, "arrays": arrays}


def _packed(value: Any, path: str, space: OutputSpace, arrays: dict[str, list[Any]]) -> Any:
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    if isinstance(value, np.ndarray):
        arrays[path] = space.place(path, value)
        return "array"
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            _packed(item, f"{path}.{number}", space, arrays)
        return len(value)
    if is_dataclass(value):
        prefix = path and f"{path}."
        return {
            item.name: _packed(getattr(value, item.name), prefix + item.name, space, arrays) for item in fields(value)
        }
    return value


def unpack(kind: type[_Record], found: Any, arrays: Mapping[str, np.ndarray], path: str = "") -> _Record:
    """The dataclass that `pack` was given, from the record and copies of its arrays.

    Raises:
        LookupError, TypeError, ValueError: it is none; other fields, or of other types.
    """
    hints = get_type_hints(kind)
    if not isinstance(found, dict) or found.keys() != hints.keys():
        raise TypeError(f"expected {', '.join(hints)}, found {found!r}")
    prefix = path and f"{path}."
    return kind(**{name: _unpacked(hint, found[name], arrays, prefix + name) for name, hint in hints.items()})


def _unpacked(hint: Any, found: Any, arrays: Mapping[str, np.ndarray], path: str) -> Any:
    if isinstance(hint, UnionType):  # X | None
        if found is None:
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if hint is np.ndarray:
        return arrays[path]
    if hint is bytes:
        return arrays[path].tobytes()
    if get_origin(hint) is tuple:  # of as many arrays as there are
        return tuple(arrays[f"{path}.{number}"] for number in range(found))
    if is_dataclass(hint):
        return unpack(hint, found, arrays, path)  # type: ignore[arg-type]
    kind = get_origin(hint) or hint
    if type(found) is not kind:
        raise TypeError(f"{path} = {found!r}, expected {kind.__name__}")
    return found
