"""What a decode task of the training stream does; its workers import this module, so it must not import torch."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.rows import Refusal, judge, refusal_columns, report
from kinoray.catalog.table import read_videos, references
from kinoray.config.shared import CacheConfig, ClipConfig
from kinoray.errors import KinorayError, MediaError, StorageUnavailable
from kinoray.storage.objects import Storage
from kinoray.video.cache import FrameCache
from kinoray.video.frames import Clip
from kinoray.video.request import Sampled
from kinoray.video.sample import clip_rng
from kinoray.video.sandbox.pool import Sandbox, shared_sandbox
from kinoray.video.transform import ReusedMemory

__all__ = ["DecodeTask", "file_states"]

FLOW_CHANNELS = 2
_STAT_THREADS = 16
_memory = ReusedMemory()


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTask:
    """Turns blocks of references into blocks of clips of one shape; small, and pickled to the tasks."""

    storage: Storage
    clip: ClipConfig
    """What the network is fed (ClipConfig.for_network)."""
    seed: int = 0
    epoch: int | None = None
    """Epoch whose random frames and crops are drawn; None for the middle frames and the centre crop."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Decoded frames on this node's disk."""

    @property
    def clip_bytes(self) -> int:
        """Bytes of a decoded clip."""
        sample = self.clip.sample
        return sample.num_segments * sample.frames_per_segment * self.clip.frame_bytes

    def __call__(self, block: pa.Table) -> dict[str, np.ndarray]:
        """Decode a block of references: one row in, one row out; a quarantined one is zeros, ok=False and a reason.

        The columns are those of VideoBatch, or of RawBatch where the device finds the flow.
        StorageUnavailable is no fault of a video: it ends the block, with that reason in what is left of its rows.
        """
        count = block.num_rows
        size = self.clip.view.crop_px
        grid = (count, self.clip.sample.num_segments, self.clip.sample.frames_per_segment)
        decoded = {"rgb": _memory.empty("rgb", (*grid, 3, size, size), np.uint8)}
        if self.clip.flow_on_device:
            decoded["partners"] = _memory.empty("partners", (*grid, 1, size, size), np.uint8)
            decoded["last"] = np.empty(grid, bool)
        elif self.clip.flow.estimator != "none":
            decoded["flow"] = _memory.empty("flow", (*grid, FLOW_CHANNELS, size, size), np.int8)
        refusals: list[Refusal | None] = [None] * count
        sandbox = shared_sandbox(1)  # a worker runs one task at a time, and keeps its decoder for the next
        begin_s = time.process_time() + sandbox.cpu_s
        cache = FrameCache(self.cache, self.clip) if self.cache.gb else None
        states = {} if cache is None else file_states(self.storage, block)
        videos = [{**video, "state": states.get(video["uri"])} for video in block.to_pylist()]
        places = [{name: array[index] for name, array in decoded.items()} for index in range(count)]
        cached = [cache is not None and self._load(cache, videos[index], places[index]) for index in range(count)]
        missing = [index for index in range(count) if not cached[index]]
        wanted = references(block.take(missing)) if missing else []
        found = read_videos(self.storage, wanted, max_bytes=self.clip.decode.max_bytes)
        left = list(missing)
        try:
            for index, data in zip(missing, found, strict=True):
                if isinstance(data, KinorayError):
                    refusals[index] = judge(data, "read")
                else:
                    try:
                        cached[index] = self._decode(sandbox, cache, data, videos[index], places[index])
                    except MediaError as error:
                        refusals[index] = judge(error, "decode")
                left.pop(0)
        except StorageUnavailable as outage:  # each of the others would wait as long as this one did
            for index in left:
                refusals[index] = report(outage, "read")
        for place, refusal in zip(places, refusals, strict=True):
            if refusal is not None:  # nothing, or a part of a clip, was written there
                for array in place.values():
                    array.fill(0)
        cpu_s = np.zeros(count)
        cpu_s[:1] = time.process_time() + sandbox.cpu_s - begin_s
        return {
            "row": block.column("row").to_numpy(),
            "ok": np.array([refusal is None for refusal in refusals]),
            "cached": np.array(cached, bool),
            "cpu_s": cpu_s,
            **decoded,
            **refusal_columns(refusals),
        }

    def _key(self, cache: FrameCache, video: Mapping[str, Any]) -> str:
        return cache.key(video, self.seed, self.epoch)

    def _load(self, cache: FrameCache, video: Mapping[str, Any], place: Mapping[str, np.ndarray]) -> bool:
        return cache.load(self._key(cache, video), place["rgb"], place.get("flow"))

    def rng(self, video: Mapping[str, Any]) -> np.random.Generator | None:
        """What draws a video's frames and crop; None for the middle frames and the centre crop."""
        return None if self.epoch is None else clip_rng(self.seed, self.epoch, video["video_id"])

    def _decode(
        self,
        sandbox: Sandbox,
        cache: FrameCache | None,
        data: bytes,
        video: Mapping[str, Any],
        place: Mapping[str, np.ndarray],
    ) -> bool:
        """Fill a clip's arrays; whether they came from the cache after all."""
        if cache is not None and cache.has_room():
            key = self._key(cache, video)
            with cache.lock(key):
                if self._load(cache, video, place):  # another task decoded it while this one waited
                    return True
                samples = cache.samples
                found = sandbox.decode(data, Sampled(samples=tuple(samples), rng=self.rng(video)), self.clip)
                if found.exact:
                    cache.add(key, found)
                    _fill(place, found.clip(samples.index(self.clip.sample)))
                    return False
        _fill(place, sandbox.decode(data, Sampled(rng=self.rng(video)), self.clip).clip())
        return False


def file_states(storage: Storage, table: pa.Table) -> dict[str, list[Any]]:
    """What tells a file from one that has taken its place since, by its uri, where the catalog has no checksum."""
    uris = pc.unique(table.filter(pc.is_null(table["sha256"]))["uri"]).to_pylist()

    def state(uri: str) -> list[Any]:
        try:
            info = storage.stat(uri)
        except KinorayError:  # its reader will say why
            return []
        return [info.size_bytes, info.modified_s, info.etag]

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return dict(zip(uris, pool.map(state, uris), strict=True))


def _fill(place: Mapping[str, np.ndarray], clip: Clip) -> None:
    found = {"rgb": clip.frames, "flow": clip.flow, "partners": clip.partners, "last": clip.last}
    for name, array in place.items():
        array[:] = found[name]
