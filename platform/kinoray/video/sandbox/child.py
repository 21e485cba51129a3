"""The inside of a decoder process: take one request after the other, decode, put the frames into shared memory.

`python -m kinoray.video.sandbox.child SOCKET INPUT OUTPUT PARENT BACKEND`: three inherited descriptors, the parent's
process id and the decode.backend. What is easy to break: nothing here may import torch or ray, and what goes back is
JSON and raw arrays, never a pickle, since this process reads what strangers made. And nothing can be imported or opened
any more once it reads them (jail.py).
"""

import errno
import importlib
import json
import math
import mmap
import os
import pickle
import platform
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from kinoray.errors import KinorayError
from kinoray.video.bank import decode_bank
from kinoray.video.clip import decode_clip, probe, thumbnails
from kinoray.video.sandbox import jail
from kinoray.video.transcode import transcode
from kinoray.video.views import decode_views

__all__ = ["MESSAGE_BYTES", "OutputSpace", "main"]

MESSAGE_BYTES = 2**16
"""Longest request or answer; frames and files go another way."""

_TEXT_LENGTH = 2000
_ALIGN_BYTES = 64
_GROW_BYTES = 2**20


class OutputSpace:
    """Arrays in the shared output file: made here, read by the parent at (offset, dtype, shape)."""

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


def _decode_clip(space: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    clip = decode_clip(data, **arguments, empty=space.empty)
    arrays = {"frames": clip.frames, "flow": clip.flow, "partners": clip.partners, "indices": clip.indices}
    rng = arguments["rng"]
    return {
        "arrays": {name: space.place(name, array) for name, array in arrays.items() if array is not None},
        "counts": [clip.num_frames, clip.frames_decoded, clip.frames_corrupt],
        "info": asdict(clip.info),
        "rng": None if rng is None else rng.bit_generator.state,
    }


def _decode_views(space: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    views = decode_views(data, **arguments, empty=space.empty)
    arrays = {"frames": views.frames, "flow": views.flow, "partners": views.partners}
    arrays |= {"indices": views.indices, "windows": views.windows}
    return {
        "arrays": {name: space.place(name, array) for name, array in arrays.items() if array is not None},
        "counts": [views.num_frames, views.frames_decoded, views.frames_corrupt],
        "info": asdict(views.info),
        "num_windows": views.num_windows,
        "mirrored": views.mirrored,
    }


def _decode_bank(space: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    bank = decode_bank(data, **arguments, empty=space.empty)
    arrays = {"frames": bank.frames, "flow": bank.flow, "places": np.concatenate(bank.places)}
    return {
        "arrays": {name: space.place(name, array) for name, array in arrays.items() if array is not None},
        "exact": bank.exact,
    }


def _probe(_: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"arrays": {}, "info": asdict(probe(data, **arguments))}


def _thumbnails(space: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    images = thumbnails(data, **arguments)
    return {"arrays": {str(number): space.place(str(number), image) for number, image in enumerate(images)}}


def _transcode(space: OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    made = transcode(data, **arguments)
    encoded = space.place("data", np.frombuffer(made.data, np.uint8))
    return {"arrays": {"data": encoded}, "info": asdict(made.info), "frames_lost": made.frames_lost}


_OPERATIONS: dict[str, Callable[[OutputSpace, bytes, dict[str, Any]], dict[str, Any]]] = {
    "decode_bank": _decode_bank,
    "decode_clip": _decode_clip,
    "decode_views": _decode_views,
    "probe": _probe,
    "thumbnails": _thumbnails,
    "transcode": _transcode,
}


_MODULES = {
    "pyav": (),
    "decord": ("decord",),
    "torchcodec": ("torchcodec.decoders", "torchcodec.transforms"),
}
_LATE = ("av.subtitles.codeccontext", "av.subtitles.stream", "av.subtitles.subtitle", "numpy.ma")
"""Modules that libraries import in the middle of their work: PyAV for files with subtitles, numpy for np.unique.
tests/test_jail.py finds those that are missing here."""


class _Absent(MetaPathFinder):
    """Says again why a back end could not be imported, where decoding asks for it."""

    def __init__(self, package: str, error: Exception) -> None:
        self._package, self._error = package, error

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == self._package:
            raise self._error
        return None


def _load(backend: str) -> None:
    """Import all that decoding uses; what its libraries look up on the machine, they look up now."""
    for module in _LATE:
        importlib.import_module(module)
    cv2.setNumThreads(1)  # OpenCV looks for processors and for plugins of its thread pool
    platform.machine()  # keeps what it found, for x264_options
    for module in _MODULES[backend]:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            sys.meta_path.insert(0, _Absent(module.partition(".")[0], error))


class _Decoder:
    """Answers requests, each within the address space it may take."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self._input = input_fd
        self._space = OutputSpace(output_fd)
        self._idle_bytes = _address_space() - self._space.size_bytes

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What came of a request: the result, or `error` and `text`."""
        self._space.clear()
        limit = self._idle_bytes + self._space.size_bytes + request["size_bytes"] + request["memory_bytes"]
        try:
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            return _OPERATIONS[request["operation"]](
                self._space, self._read(request["size_bytes"]), request["arguments"]
            )
        except Exception as error:  # noqa: BLE001  (whatever a video does to the decoder is said about that video)
            return _refusal(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _read(self, size_bytes: int) -> bytes:
        parts, offset = [], 0
        while offset < size_bytes:  # one call gives at most 2 GiB
            part = os.pread(self._input, size_bytes - offset, offset)
            if not part:
                raise OSError(f"the shared input ends after {offset:,} of {size_bytes:,} bytes")
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _refusal(error: Exception) -> dict[str, Any]:
    causes = (error, error.__cause__)
    if any(isinstance(one, MemoryError) or getattr(one, "errno", None) == errno.ENOMEM for one in causes):
        return {"error": "memory", "text": ""}
    if isinstance(error, KinorayError):
        return {"error": type(error).__name__, "text": str(error)[:_TEXT_LENGTH]}
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]  # extract_tb would read the source
    file = os.path.basename(frame.f_code.co_filename)
    text = f"{type(error).__name__} in {file}:{line}: {' '.join(str(error).split())}"
    return {"error": "unexpected", "text": text[:_TEXT_LENGTH]}


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def _prepare() -> None:
    """Let the parent handle the terminal's Ctrl-C; be the first to go if memory ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def main() -> None:
    """Serve until the parent closes its end of the socket."""
    socket_fd, input_fd, output_fd, parent = (int(text) for text in sys.argv[1:5])
    backend = sys.argv[5]
    jail.die_with(parent)
    _prepare()
    _load(backend)
    decoder = _Decoder(input_fd, output_fd)
    with socket.socket(fileno=socket_fd) as connection:
        layers = jail.enter(socket_fd, input_fd, output_fd, parent, threads=backend != "pyav")
        connection.send(json.dumps({"ready": os.getpid(), "layers": layers}).encode())
        while message := connection.recv(MESSAGE_BYTES):
            begin_s = time.process_time()
            answer = decoder.answer(pickle.loads(message))
            answer["cpu_s"] = time.process_time() - begin_s
            connection.send(json.dumps(answer, default=np.ndarray.tolist).encode())


if __name__ == "__main__":
    main()
