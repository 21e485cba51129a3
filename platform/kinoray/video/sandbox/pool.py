"""Decoding in processes of its own: whatever a video does there is an error of that video here, and of no other.

A `Sandbox` does what kinoray.video.frames does, with the same results and the same errors. A video whose decoder dies,
hangs or takes too much memory is tried once more, in a new process; then it is refused. What is easy to break: a
process holds one video at a time, so that a death has exactly one cause.
"""

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from kinoray.config.shared import ClipConfig, DecodeConfig
from kinoray.errors import KinorayError, MediaError
from kinoray.video.frames import Frames, check_answer, decode
from kinoray.video.info import VideoInfo
from kinoray.video.media import check_size_bytes
from kinoray.video.readers import NotForNvdec, not_in_sandbox, require_nvdec
from kinoray.video.request import Request, Sampled
from kinoray.video.sandbox.child import Decoded
from kinoray.video.sandbox.process import NONSENSE, Answer, DecoderLost, DecoderProcess, makes_no_sense, start_decoder
from kinoray.video.sandbox.wire import unpack
from kinoray.video.shots import NUM_FRAMES_AT_ONCE, Shots
from kinoray.video.transcode import Transcoded

__all__ = ["DeviceDecoder", "Sandbox", "shared_sandbox"]

_Result = TypeVar("_Result")

_TRIES = 2
_MOST_CPU_S = 1e6  # for one video; what a process says is not believed
_TRANSCODE_PATIENCE = 10  # every frame is decoded and encoded


class Sandbox:
    """Up to `num_children` decoder processes, started when they are needed, for any number of threads.

    They end with `close`, with the last reference to the sandbox, and with this process, however it ends.
    """

    def __init__(self, num_children: int) -> None:
        self.num_children = 0
        self.cpu_s = 0.0
        """CPU seconds that its processes spent on videos for which they answered."""
        self._room = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._idle: list[DecoderProcess] = []
        self._busy: set[DecoderProcess] = set()
        self._finalizer = weakref.finalize(self, _kill_all, self._idle)
        self.grow(num_children)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def grow(self, num_children: int) -> None:
        """Allow at least so many processes."""
        with self._lock:
            more = num_children - self.num_children
            if more > 0:
                self.num_children += more
                self._room.release(more)

    def pids(self) -> list[int]:
        """Ids of all processes that run now."""
        with self._lock:
            return sorted(process.pid for process in [*self._idle, *self._busy])

    def busy_pids(self) -> list[int]:
        """Ids of the processes that are reading a video now."""
        with self._lock:
            return sorted(process.pid for process in self._busy)

    def warm(self, config: DecodeConfig) -> None:
        """Start a process for whoever decodes first; what goes wrong is his to hear."""
        with suppress(KinorayError), self._process(config, 0, new=False):
            pass

    def close(self) -> None:
        """End the idle processes. Those at work end their video first; a later request starts new ones."""
        with self._lock:
            idle, self._idle[:] = list(self._idle), []
        _kill_all(idle)

    def decode(self, data: bytes, request: Request, clip: ClipConfig) -> Frames:
        """kinoray.video.frames.decode in a decoder process; the generator is left as if it had been used here.

        Raises:
            MediaError: as there; DecoderCrashed, DecodeTimeout or MediaOverBudget where that needs two processes.
            ConfigError: the back end is not installed, or decode.device is cuda.
            DecoderStartFailed: no process can be started.
        """
        if clip.decode.device == "cuda":
            raise not_in_sandbox()

        def read(answer: Answer) -> Frames:
            decoded = unpack(Decoded, answer.fields["record"], answer.arrays)
            check_answer(decoded.frames, request, clip)
            if isinstance(request, Sampled) and request.rng is not None:
                request.rng.bit_generator.state = decoded.rng or {}
            return decoded.frames

        return self._ask("decode", data, clip.decode, {"request": request, "clip": clip}, read)

    def probe(self, data: bytes, config: DecodeConfig) -> VideoInfo:
        """kinoray.video.frames.probe in a decoder process. Raises what decode raises."""
        return self._ask("probe", data, config, {"config": config}, _reader(VideoInfo))

    def shots(self, data: bytes, config: DecodeConfig) -> Shots:
        """All shots of a video: those that kinoray.video.shots.shots_in finds in one stretch after the other.

        Raises:
            MediaError: as decode; MediaOverBudget for more shots than a video may have.
        """
        found, begin = Shots(np.zeros(0, np.int64), 0, 0), 0
        while True:
            found += self._ask("shots", data, config, {"begin": begin, "config": config}, _shots_from(begin))
            begin += NUM_FRAMES_AT_ONCE
            if begin >= found.num_frames:
                return found

    def transcode(self, data: bytes, config: DecodeConfig) -> Transcoded:
        """kinoray.video.transcode.transcode, in ten times decode.deadline_s. Raises what decode raises."""
        arguments = {"config": config}
        return self._ask("transcode", data, config, arguments, _reader(Transcoded), patience=_TRANSCODE_PATIENCE)

    def _ask(
        self,
        operation: str,
        data: bytes,
        config: DecodeConfig,
        arguments: dict[str, Any],
        read: Callable[[Answer], _Result],
        *,
        patience: int = 1,
    ) -> _Result:
        check_size_bytes(len(data), config)  # before gigabytes are copied
        for left in reversed(range(_TRIES)):
            with self._process(config, len(data), new=left == 0) as process:
                try:
                    answer = process.ask(operation, data, config, arguments, patience=patience)
                    try:
                        result, cpu_s = read(answer), float(answer.fields["cpu_s"])
                        if not 0 <= cpu_s < _MOST_CPU_S:
                            raise ValueError(f"{cpu_s} CPU seconds")
                    except NONSENSE as cause:
                        process.is_usable = False
                        raise DecoderLost(makes_no_sense(cause)) from cause
                    with self._lock:
                        self.cpu_s += cpu_s
                    return result
                except DecoderLost as lost:
                    if not left:
                        raise type(lost.error)(f"{lost.error} (tried {_TRIES} times)") from lost
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _process(self, config: DecodeConfig, size_bytes: int, *, new: bool) -> Iterator[DecoderProcess]:
        """An idle process, or a new one. It is kept for later only if it answered."""
        with self._room:
            process = self._idle_process(new, config, size_bytes)
            with self._lock:
                self._busy.add(process)
            try:
                yield process
            finally:
                with self._lock:
                    self._busy.discard(process)
                    if process.is_usable:
                        self._idle.append(process)
                if not process.is_usable:
                    process.kill()

    def _idle_process(self, new: bool, config: DecodeConfig, size_bytes: int) -> DecoderProcess:
        """The process used last if it serves for the file, else a new one in its place.

        One that died while it had nothing to do harms no video.
        """
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return start_decoder(config, size_bytes)
            if new or not process.serves(config, size_bytes):
                process.kill()
                new = False
                continue
            return process


def _reader(kind: type[_Result]) -> Callable[[Answer], _Result]:
    return lambda answer: unpack(kind, answer.fields["record"], answer.arrays)


def _shots_from(begin: int) -> Callable[[Answer], Shots]:
    def read(answer: Answer) -> Shots:
        found = unpack(Shots, answer.fields["record"], answer.arrays)
        if ((found.firsts < begin) | (found.firsts >= begin + NUM_FRAMES_AT_ONCE)).any():
            raise ValueError(f"shots at {found.firsts.tolist()!s:.80} of the stretch that begins at frame {begin}")
        return found

    return read


def _kill_all(processes: list[DecoderProcess]) -> None:
    while processes:
        processes.pop().kill()


_shared_lock = threading.Lock()
_shared: dict[int, Sandbox] = {}


def shared_sandbox(num_children: int) -> Sandbox:
    """The sandbox of this process, with room for at least `num_children` decoders at a time."""
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared.clear()  # of a process that forked this one
            _shared[os.getpid()] = Sandbox(num_children)
        sandbox = _shared[os.getpid()]
    sandbox.grow(num_children)
    return sandbox


class DeviceDecoder:
    """`Sandbox.decode` for decode.device=cuda: on the GPU of this process, and in the sandbox where that does not do.

    A decoder process sees every file first, since what kills a parser must kill it there.

    Raises:
        ConfigError: no GPU, or no torchcodec.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        require_nvdec()
        self._sandbox = sandbox
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()

    def take_refused(self) -> Counter[str]:
        """The readings since the last call that the sandbox did after all.

        They are counted by the reason of a NotForNvdec, or by the name of another MediaError.
        """
        with self._lock:
            refused, self._refused = self._refused, Counter()
        return refused

    def decode(self, data: bytes, request: Request, clip: ClipConfig) -> Frames:
        """As there, with the same frame numbers; colours differ by the 1 to 2 grey levels of another decoder.

        Raises:
            MediaError: neither can decode it.
        """
        on_cpu = replace(clip, decode=replace(clip.decode, device="cpu"))
        if not request.first_window:
            self._sandbox.probe(data, on_cpu.decode)
        try:
            return decode(data, request, clip)
        except MediaError as error:
            with self._lock:
                self._refused[error.reason if isinstance(error, NotForNvdec) else type(error).__name__] += 1
        return self._sandbox.decode(data, request, on_cpu)
