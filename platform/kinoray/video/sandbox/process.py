"""One decoder process, seen from its parent: started, asked, watched against the clock, killed.

The file goes in and the frames come out through two memory files that both sides hold; the socket carries short
messages only. What is easy to break: a process that did not answer in full is never asked again, and nothing that it
sends is unpickled or believed without a look.
"""

import contextlib
import fcntl
import math
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kinoray import errors
from kinoray.config.clip import said_limit
from kinoray.config.shared import DecodeConfig
from kinoray.errors import ConfigError, DecoderCrashed, DecoderStartFailed, DecodeTimeout, MediaError, MediaOverBudget
from kinoray.storage.records import parse_json
from kinoray.video.sandbox.wire import DTYPES, MESSAGE_BYTES
from kinoray.video.transform import ReusedMemory

__all__ = [
    "CHILD_ENV",
    "NONSENSE",
    "Answer",
    "DecoderLost",
    "DecoderProcess",
    "makes_no_sense",
    "room_for",
    "start_decoder",
]

_PYTHON = os.path.abspath(sys.executable)  # relative where PATH is, and a decoder starts in /
_START_TRIES = 3
_START_DEADLINE_S = 120.0
_KEEP_INPUT_BYTES = 2**24  # of the input file between two videos
_STDERR_BYTES = 2**16
_LEAST_FILE_BYTES = 2**26
_INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX", "TMPDIR")
"""What a decoder sees of the environment: no credentials."""
CHILD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Else glibc gives the memory of each frame's flow back to the kernel, and takes it again: 30 % more CPU.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}
"""What it has there besides."""

NONSENSE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What is raised where an answer is not what an operation gives: its process is replaced, and the video refused."""

Start = Callable[[], "subprocess.Popen[bytes]"]


class DecoderLost(Exception):
    """The process is gone, or has to go. `error` says what the video is refused with if that was its last try."""

    def __init__(self, error: MediaError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Answer:
    """What a decoder process made of a video."""

    fields: dict[str, Any]
    """Numbers and words, from JSON."""
    arrays: dict[str, np.ndarray]
    """Arrays of our own: the process cannot reach them any more."""


class _Starter:
    """Starts processes from a thread that lives as long as this process.

    The kernel ends a decoder with the thread that started it, and threads of a pool come and go.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._orders: queue.SimpleQueue[tuple[Start, Future[subprocess.Popen[bytes]]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="decoder-starter", daemon=True).start()

    def start(self, order: Start) -> "subprocess.Popen[bytes]":
        """Carry out the order in that thread; raises what it raises."""
        future: Future[subprocess.Popen[bytes]] = Future()
        self._orders.put((order, future))
        return future.result()

    def _work(self) -> None:
        while True:
            order, future = self._orders.get()
            try:
                future.set_result(order())
            except OSError as error:
                future.set_exception(error)


_starter_lock = threading.Lock()
_starters: list[_Starter] = []


def _starter() -> _Starter:
    with _starter_lock:
        if not _starters or _starters[-1].owner != os.getpid():  # a fork has no threads but its first
            _starters[:] = [_Starter()]
        return _starters[-1]


def room_for(config: DecodeConfig, size_bytes: int) -> int:
    """Bytes that a decoder process must have room for to be given a file: its size is rounded up to a power of two.

    So that a process is seldom replaced for its room, and one that reads small files gets little more than they need.
    """
    return config.max_memory_mb * 2**20 + max(_LEAST_FILE_BYTES, 1 << (size_bytes - 1).bit_length())


def start_decoder(config: DecodeConfig, size_bytes: int = 0) -> "DecoderProcess":
    """A new decoder process, ready for its first video, which has so many bytes.

    Raises:
        ConfigError: decode.backend cannot be imported.
        DecoderStartFailed: three in a row did not start.
    """
    for _ in range(_START_TRIES - 1):
        with contextlib.suppress(DecoderStartFailed):
            return DecoderProcess(config, size_bytes)
    return DecoderProcess(config, size_bytes)


class DecoderProcess:
    """A running decoder process for one decode.backend; used by one thread at a time.

    Raises (when made):
        ConfigError: the back end cannot be imported.
        DecoderStartFailed: it could not be started.
    """

    is_usable = True
    """False while it is asked, and after that if it did not answer in full."""

    def __init__(self, config: DecodeConfig, size_bytes: int = 0) -> None:
        self.backend = config.backend
        self.room_bytes = room_for(config, size_bytes)
        """It can never take more memory than thrice this."""
        self.layers: dict[str, str] = {}
        """Layer of its jail (jail.LAYERS) -> why it is not in force here; "" where it is."""
        self._owner = os.getpid()
        self._memory = ReusedMemory()
        self._input, self._output = os.memfd_create("kinoray-video"), _output_file()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr, their_stderr = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # full: what is written is dropped
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _starter().start(lambda: self._popen(theirs, their_stderr))
            theirs.close()
            self._wait_ready()
        except OSError as error:
            self.kill()
            raise _start_failed(str(error)) from error
        except BaseException:
            self.kill()
            raise
        finally:
            theirs.close()
            os.close(their_stderr)

    def _popen(self, theirs: socket.socket, stderr: int) -> "subprocess.Popen[bytes]":
        descriptors = (theirs.fileno(), self._input, self._output)
        env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        env |= CHILD_ENV | {"PYTHONPATH": os.pathsep.join(_import_path(self.backend))}
        return subprocess.Popen(
            [
                _PYTHON,
                "-P",
                "-s",
                "-m",
                "kinoray.video.sandbox.child",
                *map(str, descriptors),
                str(os.getpid()),
                self.backend,
                str(self.room_bytes),
            ],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd="/",
            env=env,
        )

    def _wait_ready(self) -> None:
        try:
            message = self._receive(time.monotonic() + _START_DEADLINE_S)
        except TimeoutError as error:
            raise _start_failed(f"it was not ready within {_START_DEADLINE_S:g} s") from error
        if not message:
            raise _start_failed(self._last_words())
        found = parse_json(message)  # it has read nothing of a stranger's yet
        self.layers = found["layers"]
        if found["missing"]:
            raise ConfigError(found["missing"])

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    def serves(self, config: DecodeConfig, size_bytes: int) -> bool:
        """Whether it can be given a file of so many bytes: it still runs, and says nothing unasked."""
        fits = self.backend == config.backend and self.room_bytes >= room_for(config, size_bytes)
        return fits and self.is_alive() and not select.select([self._socket], [], [], 0)[0]

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    def ask(
        self, operation: str, data: bytes, config: DecodeConfig, arguments: dict[str, Any], *, patience: int = 1
    ) -> Answer:
        """Have one of the child's operations done on a file, within `patience` times decode.deadline_s.

        The process must be one that `serves`.

        Raises:
            DecoderLost: no answer, or one that shows that the process must be replaced; `kill` it.
            MediaError: what the operation raised.
        """
        deadline = time.monotonic() + patience * config.deadline_s
        memory_bytes = config.max_memory_mb * 2**20
        request = {
            "operation": operation,
            "size_bytes": len(data),
            "memory_bytes": memory_bytes,
            "arguments": arguments,
        }
        self.is_usable = False
        _write(self._input, data)
        try:
            self._socket.send(pickle.dumps(request))
            message = self._receive(deadline)
        except TimeoutError as error:
            times = f" x {patience}" if patience > 1 else ""
            text = f"no answer from the decoder within {said_limit('deadline_s', config.deadline_s)}{times}"
            raise DecoderLost(DecodeTimeout(text)) from error
        except ConnectionError:
            message = b""
        if not message:
            raise DecoderLost(DecoderCrashed(f"the decoder process {self._last_words()} while it read this video"))
        if len(data) > _KEEP_INPUT_BYTES:
            os.ftruncate(self._input, 0)
        try:
            fields = parse_json(message, bits=256)  # states of random generators are wide
            refusal = _error_of(fields, config)
            arrays = self._read_arrays(fields.pop("arrays", {}), memory_bytes + len(data))
        except NONSENSE as cause:
            raise DecoderLost(makes_no_sense(cause)) from cause
        self.is_usable = not isinstance(refusal, DecoderLost)
        if refusal is not None:
            raise refusal
        return Answer(fields, arrays)

    def _read_arrays(self, places: dict[str, Any], room_bytes: int) -> dict[str, np.ndarray]:
        """Copies of the arrays that an answer names; a decoder may not fill this process's memory."""
        arrays = {}
        for name, place in places.items():
            arrays[name] = self._read_array(name, *place, room_bytes=room_bytes)
            room_bytes -= arrays[name].nbytes
        return arrays

    def _read_array(self, name: str, offset: int, dtype: str, shape: list[int], *, room_bytes: int) -> np.ndarray:
        if dtype not in DTYPES or not all(isinstance(side, int) and side >= 0 for side in (offset, *shape)):
            raise ValueError(f"array of dtype {dtype} and shape {shape} at {offset}")
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if offset + size_bytes > os.fstat(self._output).st_size:
            raise ValueError(f"array of shape {shape} at {offset} ends behind the shared file")
        if size_bytes > room_bytes:
            raise ValueError(f"array of shape {shape}, where {room_bytes} bytes are left of decode.max_memory_mb")
        array = self._memory.empty(name, shape, dtype)
        view, done = array.reshape(-1).view(np.uint8).data, 0  # which cast does not give of no elements
        while done < size_bytes:
            done += os.preadv(self._output, [view[done:]], offset + done)
        return array

    def _receive(self, deadline: float) -> bytes:
        self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
        return self._socket.recv(MESSAGE_BYTES)

    def _last_words(self) -> str:
        """How a process that closed its socket came to its end; it is over after this."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.poll()
        self._end()
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._stderr, _STDERR_BYTES)
        lines = [line.strip() for line in said.decode(errors="replace").split("\n") if line.strip()]
        return _ending(code) + (f" ({lines[-1][:200]})" if lines else "")

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():  # not that of a parent that forked us
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the process at once, wait until it is gone, and give back what belongs to it."""
        self._end()
        self._socket.close()
        for descriptor in (self._input, self._output, self._stderr):
            os.close(descriptor)


def _import_path(backend: str) -> list[str]:
    """Where a decoder imports from: kinoray's root, installed packages, and where what it decodes with lies.

    Not all of sys.path: the folder of a script, or the one a command is given in, can be a stranger's library, and a
    sitecustomize.py in it would run before the decoder is in its jail.
    """
    path = [str(Path(__file__).resolve().parents[3])]
    path += [os.path.abspath(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    for package in ("numpy", "cv2", "av", backend):
        spec = find_spec(package)
        if spec is not None and spec.origin:
            path.append(str(Path(os.path.abspath(spec.origin)).parents[1]))
    return list(dict.fromkeys(path))


def _output_file() -> int:
    """A memory file that its other holder cannot shrink while it is read here."""
    descriptor = os.memfd_create("kinoray-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    view, done = memoryview(data), 0
    while done < len(view):  # one call takes at most 2 GiB
        done += os.pwrite(descriptor, view[done:], done)


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its socket"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def makes_no_sense(cause: Exception) -> DecoderCrashed:
    """The error of a video for which the answer raised one of NONSENSE."""
    reason = " ".join(str(cause).split())[:200]
    return DecoderCrashed(f"the decoder process gave an answer that makes no sense ({type(cause).__name__}: {reason})")


def _error_of(fields: dict[str, Any], config: DecodeConfig) -> Exception | None:
    """The error that a decoder named, to be raised here, if it named one."""
    if "error" not in fields:
        return None
    kind, text = str(fields["error"]), str(fields["text"])
    if kind == "memory":
        reason = f"decoding takes more address space than {said_limit('max_memory_mb', config.max_memory_mb)}"
        return DecoderLost(MediaOverBudget(reason))
    if kind == "unexpected":
        return DecoderCrashed(f"the decoder failed unexpectedly: {text}")
    found = getattr(errors, kind) if kind in errors.__all__ else None
    if found is None or not issubclass(found, MediaError):  # no video may say that the store is down, or end a job
        raise ValueError(f"error {kind!r}")
    error: Exception = found(text)
    return error


def _start_failed(reason: str) -> DecoderStartFailed:
    return DecoderStartFailed(
        f"no decoder process can be started on {socket.gethostname()} ({_START_TRIES} tries): {reason}; check that "
        f"{_PYTHON} -m kinoray.video.sandbox.child finds PyAV, numpy and OpenCV there, and that memory is left"
    )
