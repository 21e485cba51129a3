"""Videos of a unit, prefetched for the network: each as its views, or as the reason why there are none.

What is easy to break: decoders are the worker's own processes, so decoded frames never leave its machine; and no more
videos are held than the model needs next.
"""

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from kinoray.catalog.rows import Refusal, judge
from kinoray.catalog.table import read_videos, references
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ClipConfig
from kinoray.errors import BucketNotFound, KinorayError, MediaError, StorageUnavailable, UndecodableVideo
from kinoray.label.times import StageClock
from kinoray.storage.objects import Storage
from kinoray.video.frames import Frames
from kinoray.video.request import Views
from kinoray.video.sandbox.pool import DeviceDecoder, Sandbox, shared_sandbox

__all__ = ["DecodedVideo", "VideoReader"]


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """A readable video, of which a part is decoded: all of it, unless it is cut into many windows."""

    data: bytes
    first: Frames
    shots: tuple[int, ...] | None
    """As in Views."""


class VideoReader:
    """Reads and decodes videos with decoder processes of its own."""

    def __init__(
        self,
        storage: Storage,
        clip: ClipConfig,
        views: ViewsConfig,
        clock: StageClock,
        *,
        num_decoders: int,
        batch_size: int,
    ) -> None:
        self._clock = clock
        self._storage, self._clip, self._views = storage, clip, views
        self._prefetched = -(-batch_size // views.num_views) + num_decoders
        self._num_decoders = num_decoders
        self._threads = self._pool()
        self._sandbox = shared_sandbox(num_decoders)
        self._decoder: Sandbox | DeviceDecoder = self._sandbox
        self._depths: list[int] = []
        self._buckets: set[str] = set()

    def videos(self, rows: pa.Table) -> Iterator[DecodedVideo | Refusal]:
        """One for each row, in order, some of them prefetched: as many as fill a batch, and the decoders.

        Raises:
            StorageUnavailable, DecoderStartFailed: the store is down, or this machine; that is no fault of a video.
            ConfigError: decode.device is cuda, and there is no GPU or no torchcodec.
        """
        if self._clip.decode.device == "cuda" and isinstance(self._decoder, Sandbox):
            self._decoder = DeviceDecoder(self._sandbox)  # here, so that a machine without a GPU is an error of the job
        pending: deque[Future[DecodedVideo | Refusal] | Refusal] = deque()
        wanted = references(rows)
        arriving = iter(read_videos(self._storage, wanted, max_bytes=self._clip.decode.max_bytes))
        try:
            for uri in (reference.uri for reference in wanted):
                with self._clock.timing("store"):
                    data = next(arriving)
                if isinstance(data, KinorayError):
                    pending.append(self._judge(uri, data))
                else:
                    self._buckets.add(_bucket(uri))
                    pending.append(self._threads.submit(self._open, data))
                if len(pending) > self._prefetched:
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            for entry in pending:
                if isinstance(entry, Future):
                    entry.cancel()

    def close(self) -> None:
        """End the decoder processes, those at work behind their video; later videos start new ones."""
        self._threads.shutdown(cancel_futures=True)
        self._threads = self._pool()
        self._sandbox.close()

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_decoders, thread_name_prefix="decode")

    def _judge(self, uri: str, error: KinorayError) -> Refusal:
        """Why there are no bytes; raises where the store is at fault: it is down, or a bucket was there and is gone."""
        if isinstance(error, BucketNotFound) and _bucket(uri) in self._buckets:
            error = StorageUnavailable(f"{error}; it was there when the job began, so nothing was quarantined for it")
        return judge(error, "read")

    def take_refused(self) -> Counter[str]:
        """How many readings the GPU left to the sandbox since the last call, by reason."""
        return self._decoder.take_refused() if isinstance(self._decoder, DeviceDecoder) else Counter()

    def take_depth(self) -> float:
        """How many decoded videos waited for the model, on average since the last call; 0: the model waits."""
        depths, self._depths = self._depths, []
        return sum(depths) / max(1, len(depths))

    def parts(self, video: DecodedVideo) -> Iterator[Frames]:
        """All windows of a video, a few at a time; the next ones are decoded while these are consumed.

        Raises:
            MediaError: a later window cannot be decoded.
        """
        part = video.first
        while True:
            end = part.first_window + len(part.windows)
            if end >= part.num_windows:
                yield part
                return
            following = self._threads.submit(self._decode, video.data, end, video.shots)
            try:
                yield part
            except GeneratorExit:  # the rest is not wanted: a part before this one was refused
                following.cancel()
                raise
            total = part.num_windows
            with self._clock.timing("decode"):
                part = following.result()
            if part.num_windows != total:
                raise UndecodableVideo(f"its windows became {part.num_windows} from {total} while they were read")

    def _open(self, data: bytes) -> DecodedVideo | Refusal:
        windows = self._views.windows
        try:
            if windows is None or not windows.at_cuts:
                return DecodedVideo(data, self._decode(data, 0, None), None)
            found = self._sandbox.shots(data, self._clip.decode)
            shots = tuple(found.firsts.tolist())
            first = self._decode(data, 0, shots)
            return DecodedVideo(data, replace(first, frames_decoded=first.frames_decoded + found.frames_decoded), shots)
        except MediaError as error:  # whatever a video does is one of these; what else goes wrong is not its fault
            return judge(error, "decode")

    def _decode(self, data: bytes, first_window: int, shots: tuple[int, ...] | None) -> Frames:
        return self._decoder.decode(data, Views(views=self._views, first_window=first_window, shots=shots), self._clip)

    def _next(self, pending: deque[Future[DecodedVideo | Refusal] | Refusal]) -> DecodedVideo | Refusal:
        self._depths.append(sum(isinstance(entry, Future) and entry.done() for entry in pending))
        entry = pending.popleft()
        with self._clock.timing("decode"):
            return entry.result() if isinstance(entry, Future) else entry


def _bucket(uri: str) -> str:
    return "/".join(uri.split("/")[:3])
