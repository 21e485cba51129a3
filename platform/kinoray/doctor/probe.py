"""Reading a sample of videos, and measuring what decoding some of them costs, in decoder processes and without Ray.

What is easy to break: no more videos are in memory than the decoders need, and a time belongs to one video only, so
each measuring thread has a decoder process to itself.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TypeVar

from kinoray.catalog.rows import Refusal, judge
from kinoray.catalog.table import Reference, read_videos
from kinoray.config.clip import said_limit
from kinoray.config.shared import ClipConfig, DecodeConfig
from kinoray.console import Progress
from kinoray.errors import AccessDenied, KinorayError, MediaError
from kinoray.storage.objects import Storage
from kinoray.video.info import VideoInfo
from kinoray.video.request import Sampled
from kinoray.video.sandbox.pool import Sandbox, shared_sandbox

__all__ = ["DecodeCost", "Probed", "Video", "measure", "probe_all"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A row of the sample."""

    video_id: str
    reference: Reference
    size_bytes: int | None
    """By the listing or the catalog; None if they do not say."""

    @property
    def place(self) -> str:
        """What people know it by: its path, or its id inside a shard."""
        return self.reference.uri if self.reference.offset is None else self.video_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What became of a video that was to be probed."""

    video: Video
    size_bytes: int = 0
    """Bytes that were read."""
    sha256: str = ""
    """Of the bytes; empty if they could not be read."""
    info: VideoInfo | None = None
    """What it is; None if it is bad."""
    refusal: Refusal | None = None
    """Why it is bad."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCost:
    """What a video took. CPU seconds are those of the decoder process and of the thread that feeds it."""

    video_id: str
    cpu_s: float = 0.0
    """Decoding the frames of one clip."""
    flow_cpu_s: float | None = None
    """The same with optical flow; None if it was not asked for."""
    frames_decoded: int = 0
    frames_corrupt: int = 0
    num_frames: int = 0
    transcode_cpu_s: float | None = None
    """Transcoding it as `pack --transcode` does; None if it was not tried."""
    transcoded_cpu_s: float | None = None
    """Decoding the same clip from the transcoded video."""
    transcoded_bytes: int | None = None
    transcode_refusal: Refusal | None = None
    """Why `pack --transcode` would refuse it."""
    size_bytes: int = 0
    """Bytes that were read for this."""
    refusal: Refusal | None = None
    """Why it could not be decoded; then there are no times."""


def probe_all(storage: Storage, videos: Sequence[Video], decode: DecodeConfig, num_decoders: int) -> list[Probed]:
    """Read and probe videos; one result for each, in their order. Reads nothing larger than decode.max_bytes.

    Raises:
        StorageUnavailable, AccessDenied: the store is at fault (AccessDenied: none of the videos may be read).
        DecoderStartFailed: this machine is.
    """
    sandbox = shared_sandbox(num_decoders)

    def probe(video: Video, data: bytes) -> Probed:
        found = Probed(video=video, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        try:
            return replace(found, info=sandbox.probe(data, decode))
        except MediaError as error:
            return replace(found, refusal=judge(error, "probe"))

    small = [video for video in videos if (video.size_bytes or 0) <= decode.max_bytes]
    progress = Progress(len(small), "doctor: probed", "videos")
    results: dict[str, Probed] = {}
    for video, outcome in _worked(storage, small, probe, num_decoders, decode.max_bytes):
        found = Probed(video=video, refusal=outcome) if isinstance(outcome, Refusal) else outcome
        results[video.video_id] = found
        progress.update(1, bad=found.refusal is not None)
    if small:
        progress.close()
    refusals = [found.refusal for found in results.values() if found.refusal is not None]
    denied = [refusal for refusal in refusals if refusal.error_class == AccessDenied.__name__]
    if denied and len(denied) == len(results):
        raise AccessDenied(
            f"no video of {len(denied):,} may be read; the first: {denied[0].error_text}; check the credentials"
        )
    return [results.get(video.video_id) or _over_size(video, decode) for video in videos]


def _over_size(video: Video, decode: DecodeConfig) -> Probed:
    text = f"{video.size_bytes:,} bytes are more than {said_limit('max_bytes', decode.max_bytes)}; it was not read"
    return Probed(video=video, refusal=Refusal("list", "MediaOverBudget", text))


def measure(
    storage: Storage,
    videos: Sequence[Video],
    clip: ClipConfig,
    *,
    transcode_ids: frozenset[str],
    num_decoders: int,
) -> list[DecodeCost]:
    """Decode the clips of videos, `num_decoders` at a time, and measure the CPU time of each; in their order.

    The first video of each decoder process is decoded twice, and only the second time counts: the first one loads
    libraries.

    Raises:
        StorageUnavailable, DecoderStartFailed: as probe_all.
    """
    progress = Progress(len(videos), "doctor: decoded", "videos")
    results = []
    with ExitStack() as stack:
        sandboxes: SimpleQueue[_Meter] = SimpleQueue()
        for _ in range(num_decoders):
            sandboxes.put(_Meter(stack.enter_context(Sandbox(1)), clip))

        def decode(video: Video, data: bytes) -> DecodeCost:
            meter = sandboxes.get()
            try:
                return meter.cost(video, data, transcoded=video.video_id in transcode_ids)
            except MediaError as error:
                return DecodeCost(video_id=video.video_id, size_bytes=len(data), refusal=judge(error, "decode"))
            finally:
                sandboxes.put(meter)

        for video, outcome in _worked(storage, videos, decode, num_decoders, clip.decode.max_bytes):
            if isinstance(outcome, Refusal):
                outcome = DecodeCost(video_id=video.video_id, refusal=outcome)
            results.append(outcome)
            progress.update(1, bad=outcome.refusal is not None)
    if videos:
        progress.close()
    return results


class _Meter:
    """A decoder process, and what it takes for a video."""

    def __init__(self, sandbox: Sandbox, clip: ClipConfig) -> None:
        self._sandbox, self._clip = sandbox, clip
        self._is_warm = False

    def cost(self, video: Video, data: bytes, *, transcoded: bool) -> DecodeCost:
        if not self._is_warm:
            self._sandbox.decode(data, Sampled(), self._clip)
            self._is_warm = True
        frames_alone = self._clip.without_flow()
        cpu_s, frames = self._timed(lambda: self._sandbox.decode(data, Sampled(), frames_alone))
        found = DecodeCost(
            video_id=video.video_id,
            cpu_s=cpu_s,
            frames_decoded=frames.frames_decoded,
            frames_corrupt=frames.frames_corrupt,
            num_frames=frames.num_frames,
            size_bytes=len(data),
        )
        if self._clip != frames_alone:
            flow_cpu_s, _ = self._timed(lambda: self._sandbox.decode(data, Sampled(), self._clip))
            found = replace(found, flow_cpu_s=flow_cpu_s)
        if not transcoded:
            return found
        try:
            transcode_cpu_s, made = self._timed(lambda: self._sandbox.transcode(data, self._clip.decode))
            after_s, _ = self._timed(lambda: self._sandbox.decode(made.data, Sampled(), frames_alone))
        except MediaError as error:  # it can be decoded all the same
            return replace(found, transcode_refusal=judge(error, "transcode"))
        size_bytes = len(made.data)
        return replace(found, transcode_cpu_s=transcode_cpu_s, transcoded_cpu_s=after_s, transcoded_bytes=size_bytes)

    def _timed(self, work: Callable[[], T]) -> tuple[float, T]:
        begin_s = self._sandbox.cpu_s + time.thread_time()
        result = work()
        return self._sandbox.cpu_s + time.thread_time() - begin_s, result


def _worked(
    storage: Storage, videos: Sequence[Video], work: Callable[[Video, bytes], T], num_threads: int, max_bytes: int
) -> Iterator[tuple[Video, T | Refusal]]:
    """(video, what `work` makes of its bytes, or why they could not be read), in order, a few in memory at a time."""
    pending: deque[tuple[Video, Future[T] | Refusal]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="doctor") as pool:
        try:
            blobs = read_videos(storage, [video.reference for video in videos], max_bytes=max_bytes)
            for video, data in zip(videos, blobs, strict=True):
                if isinstance(data, KinorayError):
                    pending.append((video, judge(data, "read")))
                else:
                    pending.append((video, pool.submit(work, video, data)))
                while len(pending) > 2 * num_threads:
                    first, entry = pending.popleft()
                    yield first, entry if isinstance(entry, Refusal) else entry.result()
            while pending:
                first, entry = pending.popleft()
                yield first, entry if isinstance(entry, Refusal) else entry.result()
        finally:
            for _, entry in pending:
                if isinstance(entry, Future):
                    entry.cancel()
