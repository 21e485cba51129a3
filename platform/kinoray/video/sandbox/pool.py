"""Decoding in processes of its own: whatever a video does there is an error of that video here, and of no other.

A `Sandbox` has the functions of kinoray.video, with the same results and the same errors. A video whose decoder dies,
hangs or takes too much memory is tried once more, in a new process; then it is refused. What is easy to break: a
process holds one video at a time, so that a death has exactly one cause.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, get_type_hints

import numpy as np

from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig
from kinoray.video.bank import FrameBank
from kinoray.video.clip import Clip, VideoInfo
from kinoray.video.media import check_size_bytes
from kinoray.video.sandbox.process import NONSENSE, Answer, DecoderLost, DecoderProcess, makes_no_sense, start_decoder
from kinoray.video.transcode import Transcoded
from kinoray.video.views import ViewClips

__all__ = ["Sandbox", "shared_sandbox"]

_Result = TypeVar("_Result")

_TRIES = 2
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

    def close(self) -> None:
        """End the idle processes. Those at work end their video first; a later request starts new ones."""
        with self._lock:
            idle, self._idle[:] = list(self._idle), []
        _kill_all(idle)

    def decode_clip(
        self, data: bytes, config: ClipConfig, *, with_flow: bool, rng: np.random.Generator | None = None
    ) -> Clip:
        """kinoray.video.clip.decode_clip in a decoder process; the generator is left as if it had been used here.

        Raises:
            MediaError: as there; DecoderCrashed, DecodeTimeout or MediaOverBudget where that needs two processes.
            DecoderStartFailed: no process can be started.
        """
        arguments = {"config": config, "with_flow": with_flow, "rng": rng}

        def read(answer: Answer) -> Clip:
            num_frames, frames_decoded, frames_corrupt = _counts(answer)
            clip = Clip(
                frames=answer.arrays["frames"],
                flow=answer.arrays.get("flow"),
                indices=answer.arrays["indices"],
                num_frames=num_frames,
                frames_decoded=frames_decoded,
                frames_corrupt=frames_corrupt,
                info=_video_info(answer),
                partners=answer.arrays.get("partners"),
            )
            if rng is not None:
                rng.bit_generator.state = answer.fields["rng"]
            return clip

        return self._ask("decode_clip", data, config.decode, arguments, read)

    def decode_views(
        self, data: bytes, config: ClipConfig, views: ViewsConfig, *, with_flow: bool, first_window: int = 0
    ) -> ViewClips:
        """kinoray.video.views.decode_views in a decoder process. Raises what decode_clip raises."""
        arguments = {"config": config, "views": views, "with_flow": with_flow, "first_window": first_window}

        def read(answer: Answer) -> ViewClips:
            num_frames, frames_decoded, frames_corrupt = _counts(answer)
            return ViewClips(
                frames=answer.arrays["frames"],
                flow=answer.arrays.get("flow"),
                indices=answer.arrays["indices"],
                windows=answer.arrays["windows"],
                first_window=first_window,
                num_windows=int(answer.fields["num_windows"]),
                mirrored=bool(answer.fields["mirrored"]),
                num_frames=num_frames,
                frames_decoded=frames_decoded,
                frames_corrupt=frames_corrupt,
                info=_video_info(answer),
                partners=answer.arrays.get("partners"),
            )

        return self._ask("decode_views", data, config.decode, arguments, read)

    def decode_bank(
        self,
        data: bytes,
        config: ClipConfig,
        samples: Sequence[SampleConfig],
        *,
        with_flow: bool,
        rng: np.random.Generator | None = None,
    ) -> FrameBank:
        """kinoray.video.bank.decode_bank in a decoder process; the generator is used up. Raises as decode_clip."""
        arguments = {"config": config, "samples": list(samples), "with_flow": with_flow, "rng": rng}
        ends = np.cumsum([sample.num_segments * sample.frames_per_segment for sample in samples])[:-1]

        def read(answer: Answer) -> FrameBank:
            places = np.split(answer.arrays["places"], ends)
            return FrameBank(answer.arrays["frames"], answer.arrays.get("flow"), places, bool(answer.fields["exact"]))

        return self._ask("decode_bank", data, config.decode, arguments, read)

    def probe(self, data: bytes, config: DecodeConfig) -> VideoInfo:
        """kinoray.video.clip.probe in a decoder process. Raises what decode_clip raises."""
        return self._ask("probe", data, config, {"config": config}, _video_info)

    def thumbnails(self, data: bytes, config: DecodeConfig, num_frames: int, height: int) -> list[np.ndarray]:
        """kinoray.video.clip.thumbnails in a decoder process. Raises what decode_clip raises."""
        arguments = {"config": config, "num_frames": num_frames, "height": height}

        def read(answer: Answer) -> list[np.ndarray]:
            return [answer.arrays[str(number)] for number in range(num_frames)]

        return self._ask("thumbnails", data, config, arguments, read)

    def transcode(self, data: bytes, config: DecodeConfig) -> Transcoded:
        """kinoray.video.transcode.transcode, in ten times decode.deadline_s. Raises what decode_clip raises."""

        def read(answer: Answer) -> Transcoded:
            encoded = answer.arrays["data"].tobytes()
            return Transcoded(encoded, _video_info(answer), int(answer.fields["frames_lost"]))

        return self._ask("transcode", data, config, {"config": config}, read, patience=_TRANSCODE_PATIENCE)

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
            with self._process(new=left == 0, backend=config.backend) as process:
                try:
                    answer = process.ask(operation, data, config, arguments, patience=patience)
                    try:
                        result, cpu_s = read(answer), float(answer.fields["cpu_s"])
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
    def _process(self, *, new: bool, backend: str = "pyav") -> Iterator[DecoderProcess]:
        """An idle process, or a new one. It is kept for later only if it answered."""
        with self._room:
            process = self._idle_process(new, backend)
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

    def _idle_process(self, new: bool, backend: str = "pyav") -> DecoderProcess:
        """The process used last if it is alive and of that back end, else a new one in its place.

        One that died while it had nothing to do harms no video.
        """
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return start_decoder(backend)
            if new or process.backend != backend or not process.is_alive():
                process.kill()
                new = False
                continue
            return process


def _video_info(answer: Answer) -> VideoInfo:
    return _record(VideoInfo, answer.fields["info"])


def _record(kind: type[_Result], found: dict[str, Any]) -> _Result:
    """A dataclass of numbers and words from JSON."""
    for name, hint in get_type_hints(kind).items():
        if not isinstance(found[name], hint):
            raise TypeError(f"{name} = {found[name]!r}")
    return kind(**found)


def _counts(answer: Answer) -> tuple[int, int, int]:
    num_frames, frames_decoded, frames_corrupt = (int(count) for count in answer.fields["counts"])
    return num_frames, frames_decoded, frames_corrupt


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
