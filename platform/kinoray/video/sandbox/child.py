"""The inside of a decoder process: take one request after the other, decode, put the frames into shared memory.

`python -m kinoray.video.sandbox.child SOCKET INPUT OUTPUT PARENT BACKEND ROOM`: three inherited descriptors, the
parent's process id, the decode.backend and the room_bytes of `_Decoder`. What is easy to break: nothing here may import
torch or ray, and what goes back is JSON and raw arrays, never a pickle, since this process reads what strangers made.
And nothing can be imported or opened any more once it reads them (jail.py).
"""

import errno
import gc
import importlib
import json
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
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from kinoray.config.shared import ClipConfig, DecodeConfig
from kinoray.errors import ConfigError, MediaError
from kinoray.video.frames import Frames, decode, probe
from kinoray.video.info import VideoInfo
from kinoray.video.readers import require_backend
from kinoray.video.request import Request, Sampled
from kinoray.video.sandbox import jail
from kinoray.video.sandbox.wire import MESSAGE_BYTES, OutputSpace, pack
from kinoray.video.shots import Shots, shots_in
from kinoray.video.transcode import Transcoded, transcode

__all__ = ["Decoded", "main"]

_TEXT_LENGTH = 2000
_LARGEST = 2**62  # limit that the kernel takes
_NO_ROOM = (errno.ENOMEM, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What `decode` sends back."""

    frames: Frames
    rng: dict[str, Any] | None
    """State of the request's generator, after it was used."""


def _decode(space: OutputSpace, data: bytes, request: Request, clip: ClipConfig) -> Decoded:
    frames = decode(data, request, clip, empty=space.empty)
    rng = request.rng if isinstance(request, Sampled) else None
    return Decoded(frames, None if rng is None else dict(rng.bit_generator.state))


def _probe(_: OutputSpace, data: bytes, config: DecodeConfig) -> VideoInfo:
    return probe(data, config)


def _shots(_: OutputSpace, data: bytes, begin: int, config: DecodeConfig) -> Shots:
    return shots_in(data, begin, config)


def _transcode(_: OutputSpace, data: bytes, config: DecodeConfig) -> Transcoded:
    return transcode(data, config)


def _packed(work: Callable[..., Any]) -> Callable[[OutputSpace, bytes, dict[str, Any]], dict[str, Any]]:
    return lambda space, data, arguments: pack(work(space, data, **arguments), space)


_OPERATIONS: dict[str, Callable[[OutputSpace, bytes, dict[str, Any]], dict[str, Any]]] = {
    "decode": _packed(_decode),
    "probe": _packed(_probe),
    "shots": _packed(_shots),
    "transcode": _packed(_transcode),
}
_LATE = ("PIL.ImageFile", "av.subtitles.codeccontext", "av.subtitles.stream", "av.subtitles.subtitle", "numpy.ma")
"""Modules that libraries import in the middle of their work: PyAV for files with subtitles, numpy for np.unique, Pillow
for a resize; tests/test_jail.py finds those that are missing here."""


def _load(backend: str) -> str:
    """Import all that decoding uses; what its libraries look up on the machine, they look up now.

    Returns:
        Why the back end cannot be used; "" if it can.
    """
    for module in _LATE:
        importlib.import_module(module)
    cv2.setNumThreads(1)  # OpenCV looks for processors and for plugins of its thread pool
    platform.machine()  # keeps what it found, for x264_options
    try:
        require_backend(backend)
    except ConfigError as error:
        return str(error)
    return ""


class _Decoder:
    """Answers requests, each within the address space it may take.

    That is a soft limit, which code that has taken over this process can lift. Two hard ones hold against it as well:
    the output file has at most `room_bytes`, and all address space is what the largest request may need.
    """

    def __init__(self, input_fd: int, output_fd: int, room_bytes: int) -> None:
        self._input = input_fd
        self._space = OutputSpace(output_fd)
        self._idle_bytes = _address_space() - self._space.size_bytes
        _set_limit(resource.RLIMIT_FSIZE, room_bytes)  # all other files are closed to it
        self._most_bytes = _set_limit(resource.RLIMIT_AS, self._idle_bytes + 2 * room_bytes)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What came of a request: the result, or `error` and `text`."""
        self._space.clear()
        limit = self._idle_bytes + self._space.size_bytes + request["size_bytes"] + request["memory_bytes"]
        try:
            resource.setrlimit(resource.RLIMIT_AS, (min(limit, self._most_bytes), self._most_bytes))
            return _OPERATIONS[request["operation"]](
                self._space, self._read(request["size_bytes"]), request["arguments"]
            )
        except Exception as error:  # noqa: BLE001  (whatever a video does to the decoder is said about that video)
            return _refusal(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (self._most_bytes, self._most_bytes))

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
    if any(isinstance(one, MemoryError) or getattr(one, "errno", None) in _NO_ROOM for one in causes):
        return {"error": "memory", "text": ""}
    if isinstance(error, MediaError):
        return {"error": type(error).__name__, "text": str(error)[:_TEXT_LENGTH]}
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]  # extract_tb would read the source
    file = os.path.basename(frame.f_code.co_filename)
    text = f"{type(error).__name__} in {file}:{line}: {' '.join(str(error).split())}"
    return {"error": "unexpected", "text": text[:_TEXT_LENGTH]}


def _set_limit(kind: int, size_bytes: int) -> int:
    """Set a limit for good, unless a lower one is in force; returns the one that is."""
    _, hard = resource.getrlimit(kind)
    limit = min(size_bytes, _LARGEST if hard == resource.RLIM_INFINITY else hard)
    resource.setrlimit(kind, (limit, limit))
    return limit


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
    backend, room_bytes = sys.argv[5], int(sys.argv[6])
    jail.die_with(parent)
    _prepare()
    missing = _load(backend)
    gc.freeze()  # collecting then looks at what requests made, and at nothing else
    decoder = _Decoder(input_fd, output_fd, room_bytes)
    with socket.socket(fileno=socket_fd) as connection:
        layers = jail.enter(socket_fd, input_fd, output_fd, parent, threads=backend != "pyav")
        connection.send(json.dumps({"missing": missing, "layers": layers}).encode())
        while message := connection.recv(MESSAGE_BYTES):
            begin_s = time.process_time()
            answer = decoder.answer(pickle.loads(message))
            answer["cpu_s"] = time.process_time() - begin_s
            connection.send(json.dumps(answer, default=np.ndarray.tolist).encode())
            del answer
            gc.collect()  # PyAV's cycles hold frames; left until chance collects them, they scatter the heap


if __name__ == "__main__":
    main()
