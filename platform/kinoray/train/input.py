"""What a rank of a training is fed with: the plan of an epoch, and a Ray Data stream that decodes along it.

The order of an epoch is a pure function of (seed, epoch), and which rows are in global batch g is a function of that
order alone, so it does not matter how many workers there are, and a run can start at any step. Every row comes exactly
once an epoch, also when the count does not divide. That is why each rank streams its own rows instead of being handed
a share by Ray Train's `datasets=`: its split is an equal one, and drops up to world_size - 1 rows an epoch.

Easy to break: a store that is down ends the batches of one rank, while the others go on to their next collective; so
the rank says so in `outage` and stays with them until all can end together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.data.collate_fn import NumpyBatchCollateFn

from kinoray.catalog.rows import QuarantineRow, Refusal, error_of, refusals_of_columns
from kinoray.catalog.table import REFERENCE_COLUMNS, Catalog
from kinoray.config.shared import CacheConfig, ClipConfig
from kinoray.errors import JobError, StorageUnavailable
from kinoray.network.batch import DeviceInput, FeatureBatch, Feeder, RawBatch, VideoBatch, sent
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.video.cache import CacheFolder

__all__ = [
    "DecodeCost",
    "Feed",
    "NoClip",
    "Part",
    "Samples",
    "decoded_clips",
    "epoch_order",
    "rank_part",
    "rank_steps",
    "run_length",
    "stream",
]

Rows = NDArray[np.int64]
_WINDOW_ROWS = 4096  # rows that are mixed with each other: several shards of 256 MB
_MAX_RUN = 8  # neighbours that stay together
_BLOCK_BYTES = 96 * 2**20  # decoded clips that one task hands over at a time
_BLOCK_ROWS = 16  # between two tasks a worker waits for 25 ms
_STORE_SHARE = 0.5  # of the object store, for the clips of all ranks that wait to be used


# The plan of an epoch


def run_length(catalog: Catalog, batch_size: int) -> int:
    """How many neighbours of a shard an epoch keeps together, so that one ranged read fetches them all.

    Only as many as leave 16 independent draws in a batch, and none where neighbours are mostly of one class (videos
    listed class by class), since a batch would see few classes.
    """
    labels = catalog.table.column("label_id").to_numpy()
    if catalog.is_multilabel:
        codes: dict[tuple[str, ...], int] = {}
        labels = np.array([codes.setdefault(names, len(codes)) for names in catalog.class_names()])
    if len(labels) < 2:
        return 1
    same = float(np.mean(labels[1:] == labels[:-1]))
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    chance = float(np.sum(shares**2))
    if same > (1 + chance) / 2:
        return 1
    return max(1, min(_MAX_RUN, batch_size // 16))


def epoch_order(catalog: Catalog, *, seed: int, epoch: int, run: int = 1) -> Rows:
    """The rows of the catalog in the order in which an epoch sees them, int64 [N], each once.

    Shards are permuted, then runs of `run` neighbours are permuted inside windows of 4096 rows: random enough to train
    on, and a window touches few shards. The numbers come from PCG64's raw stream, which numpy keeps the same for ever.
    """
    num_rows = len(catalog)
    uris = catalog.table.column("uri").to_numpy(zero_copy_only=False)
    starts_shard = np.r_[True, uris[1:] != uris[:-1]][:num_rows]
    shard = np.cumsum(starts_shard) - 1
    place = np.arange(num_rows) - np.flatnonzero(starts_shard)[shard]  # of a row in its shard
    chunk = np.cumsum(starts_shard | (place % run == 0)) - 1
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    shard_keys = random.random_raw(num_rows)
    chunk_keys = random.random_raw(num_rows)
    # So that windows do not cut a shard at the same row for ever.
    first_window = int(random.random_raw()) % _WINDOW_ROWS

    order = np.lexsort((np.arange(num_rows), shard_keys[shard]))
    leads = np.r_[True, chunk[order][1:] != chunk[order][:-1]][:num_rows]
    window_of_chunk = np.zeros(num_rows, np.int64)
    window_of_chunk[chunk[order][leads]] = (np.flatnonzero(leads) + first_window) // _WINDOW_ROWS
    return np.lexsort((np.arange(num_rows), chunk_keys[chunk], window_of_chunk[chunk])).astype(np.int64)


def rank_part(count: int, rank: int, world_size: int) -> slice:
    """Which of `count` items are the rank's: as even as can be, the first ranks get the most."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def rank_steps(order: Rows, *, batch_size: int, rank: int, world_size: int, first_step: int = 0) -> list[Rows]:
    """The rank's rows of global batches first_step, first_step + 1, ... where batch g begins at order[g * batch_size].

    The last batch may be short, and then a rank's part of it may be empty: all ranks get equally many steps.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch[rank_part(len(batch), rank, world_size)] for batch in batches[first_step:]]


# A rank's steps


@dataclass(frozen=True, slots=True)
class NoClip:
    """A row that gave no clip, and why."""

    row: int
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Samples:
    """A rank's part of one global batch: the clips that could be read, in plan order, and the rows that could not."""

    rows: Rows
    """Row in the catalog of each clip, int64 [B]."""
    clips: VideoBatch | FeatureBatch
    """The clips, or what frozen backbones made of them (kinoray.train.features); B may be 0."""
    quarantined: tuple[NoClip, ...]
    """What is not among them; never replaced by another video."""
    decode_cpu_s: float
    """CPU seconds that decode tasks spent on what arrived with this batch, reading included."""
    cached: int
    """Videos that came from the cache, of frames or features."""


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What it took to decode."""

    cpu_s: float
    """CPU seconds of decode tasks, reading included."""
    cached: int | None
    """Videos that came from the cache; None without one."""


class Part:
    """A split of the catalog, and what of it could not be read on this rank."""

    def __init__(self, catalog: Catalog, name: str) -> None:
        self.catalog = catalog.select(name)
        self.name = name
        self.labels = _labels_of(self.catalog)
        """int64 [N]; where videos may have several, uint8 [N, C] of 0 and 1."""
        self.refusals: list[QuarantineRow] = []

    def __len__(self) -> int:
        return len(self.catalog)

    def quarantine(self, quarantined: Sequence[NoClip]) -> None:
        """Take down videos that could not be read."""
        for item in quarantined:
            row = self.catalog.table.select(["video_id", "uri", "offset", "length"]).slice(item.row, 1).to_pylist()[0]
            stage = f"train on {self.name or 'all'}"
            self.refusals.append(QuarantineRow(**row, refusal=replace(item.refusal, stage=stage)))


def _labels_of(catalog: Catalog) -> torch.Tensor:
    if not catalog.is_multilabel:
        return torch.from_numpy(catalog.table.column("label_id").to_numpy().astype(np.int64))
    flags = torch.zeros(len(catalog), len(catalog.labels), dtype=torch.uint8)
    for row, ids in enumerate(catalog.table.column("label_ids").to_pylist()):
        flags[row, ids] = 1
    return flags


class Feed:
    """Streams a rank's steps; all ranks have one."""

    outage: StorageUnavailable | None = None
    """Why batches ended early on this rank: the store is down, for longer than storage.retry_s."""

    def __init__(self, config: TrainConfig, clip: ClipConfig, storage: Storage, *, device: torch.device) -> None:
        self._config = config
        self._clip = clip
        self._storage = storage
        self._finish = DeviceInput(clip.flow.bound_px, device) if clip.flow_on_device else None
        self._feeder = Feeder(device) if device.type == "cuda" and not clip.flow_on_device else None
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self._frames = config.cache if config.cache.keep == "frames" else CacheConfig()
        if self._frames.gb:
            CacheFolder(self._frames).has_room(0)  # where it cannot be used, that is said before the first step
        self._spent = torch.zeros(2, dtype=torch.float64)  # CPU seconds, videos from the cache

    def turn(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> AbstractContextManager[None]:
        """What the batches of these arguments are taken in; all ranks must enter it together."""
        return nullcontext()

    def batches(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> Iterator[Samples]:
        """The steps of a part that have any row, in order, with the random frames of an epoch (None: the middle).

        Ends early with `outage` set, and gives nothing from then on, where the store is down.

        Raises:
            JobError: as `stream`.
        """
        task = DecodeTask(
            storage=self._storage,
            clip=self._clip,
            seed=self._config.optim.seed,
            epoch=epoch,
            cache=self._frames,
        )
        share = rank_part(self._config.resources.decode_tasks, self._rank, self._world_size)
        decode_tasks = max(1, share.stop - share.start)
        try:
            for samples in stream(
                part.catalog,
                steps,
                task,
                decode_tasks=decode_tasks,
                world_size=self._world_size,
                finish=self._finish,
            ):
                self._spent += torch.tensor([samples.decode_cpu_s, samples.cached], dtype=torch.float64)
                part.quarantine(samples.quarantined)
                yield self._sent(samples)
        except StorageUnavailable as error:
            self.outage = error

    def _sent(self, samples: Samples) -> Samples:
        """On the device: they get there while it computes the step before."""
        if self._feeder is None or not len(samples.clips) or isinstance(samples.clips, FeatureBatch):
            return samples
        return replace(samples, clips=sent(samples.clips, self._feeder))

    def check(self) -> None:
        """Raise this rank's outage, if there is one."""
        if self.outage is not None:
            raise self.outage

    def spent(self, device: torch.device) -> DecodeCost:
        """What decoding took since the last call, on all ranks, which must all call it."""
        numbers = self._spent.to(device, copy=True)
        dist.all_reduce(numbers)
        self._spent.zero_()
        cached = int(numbers[1]) if self._config.cache.gb else None
        return DecodeCost(cpu_s=round(float(numbers[0]), 3), cached=cached)


# The stream


def stream(
    catalog: Catalog,
    steps: Sequence[Rows],
    task: DecodeTask,
    *,
    decode_tasks: int,
    world_size: int,
    finish: Callable[[RawBatch], VideoBatch] | None = None,
) -> Iterator[Samples]:
    """Decode the rows of each step that has any, in order, with `decode_tasks` Ray tasks of one CPU each.

    All steps but the last have equally many rows, as rank_steps makes them. Blocks ahead of the caller take at most
    this rank's share of the object store.

    Args:
        finish: finds flow on the device; needed where the task's clip leaves that to it.

    Raises:
        JobError: Ray Data gave other rows than the plan asked for.
        StorageUnavailable: the store of the videos is down.
    """
    wanted = [rows for rows in steps if len(rows)]
    if not wanted:
        return
    local_batch = len(wanted[0])
    dataset = _dataset(catalog, np.concatenate(wanted), task, decode_tasks, local_batch)
    options = dataset.context.execution_options
    options.preserve_order = True
    store = float(ray.cluster_resources().get("object_store_memory", 0.0))
    options.resource_limits = options.resource_limits.copy(
        cpu=decode_tasks, object_store_memory=store * _STORE_SHARE / world_size
    )
    batches: Iterator[_Arrived] = iter(
        dataset.iter_torch_batches(batch_size=local_batch, collate_fn=_Collate(), prefetch_batches=1, device="cpu")
    )
    for planned in wanted:
        found = next(batches, None)
        if found is None or not np.array_equal(found.rows, planned):
            there = "no more rows" if found is None else f"rows {found.rows.tolist()}"
            raise JobError(f"Ray Data broke the plan of the epoch: expected rows {planned.tolist()}, got {there}")
        for item in found.quarantined:
            error = error_of(item.refusal)
            if isinstance(error, StorageUnavailable):
                raise error
        clips = found.clips
        if isinstance(clips, RawBatch):
            assert finish is not None
            clips = finish(clips)
        yield Samples(found.kept, clips, found.quarantined, found.decode_cpu_s, found.cached)


def _dataset(catalog: Catalog, rows: Rows, task: DecodeTask, decode_tasks: int, local_batch: int) -> ray.data.Dataset:
    plan = (
        catalog.table.select(["video_id", *REFERENCE_COLUMNS])
        .take(rows)
        .append_column("row", pa.array(rows))
        .combine_chunks()
    )
    size = max(1, min(_BLOCK_ROWS, local_batch, _BLOCK_BYTES // task.clip_bytes))
    # from_blocks, not from_arrow: that starts a remote task a block to learn what is known here.
    blocks = ray.data.from_blocks([plan.slice(start, size) for start in range(0, len(rows), size)])
    return blocks.map_batches(
        task,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.TaskPoolStrategy(size=decode_tasks),
        num_cpus=1,
    )


class _Arrived(NamedTuple):
    """A batch as it comes from Ray Data: all its rows, those with a clip, and what Samples says of it."""

    rows: Rows
    kept: Rows
    clips: VideoBatch | RawBatch
    quarantined: tuple[NoClip, ...]
    decode_cpu_s: float
    cached: int


class _Collate(NumpyBatchCollateFn):  # type: ignore[misc]  # ray has no types
    """Columns of a batch -> _Arrived; runs in Ray Data's prefetch thread."""

    def __call__(self, batch: dict[str, np.ndarray]) -> _Arrived:
        ok = batch["ok"].astype(bool)
        rows = batch["row"].astype(np.int64)
        return _Arrived(
            rows=rows,
            kept=rows[ok],
            clips=decoded_clips(batch, ok),
            quarantined=tuple(
                NoClip(row, refusal)
                for row, refusal in zip(rows.tolist(), refusals_of_columns(batch), strict=True)
                if refusal is not None
            ),
            decode_cpu_s=float(batch["cpu_s"].sum()),
            cached=int(batch["cached"].sum()),
        )


def decoded_clips(batch: dict[str, np.ndarray], ok: np.ndarray) -> VideoBatch | RawBatch:
    """The clips in the columns of DecodeTask, of the rows that are ok."""
    keep = slice(None) if ok.all() else ok  # a slice copies nothing
    tensors = {name: _tensor(batch[name][keep]) for name in ("rgb", "flow", "partners", "last") if name in batch}
    if "partners" in tensors:
        return RawBatch(tensors["rgb"], tensors["partners"], tensors["last"])
    return VideoBatch(rgb=tensors["rgb"], flow=tensors.get("flow"))


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Views into the object store are read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
