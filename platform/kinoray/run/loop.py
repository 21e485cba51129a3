"""What each training worker runs: epochs of steps, an exact evaluation after each, and what rank 0 then writes.

Easy to break: whether a run goes on must be decided from what all ranks share, or some would wait for ever for those
that stopped.
"""

import hashlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from kinoray.catalog import Catalog, load_catalog
from kinoray.checkpoint import (
    CheckpointMeta,
    list_checkpoints,
    load_model_state,
    load_train_state,
    load_weights,
    save_checkpoint,
)
from kinoray.errors import (
    CatalogError,
    CheckpointError,
    CheckpointMismatch,
    ConfigError,
    KinorayError,
    ModelError,
    TooManyBad,
    TrainingDiverged,
)
from kinoray.model import VideoModel, build_model, without_start_weights
from kinoray.progress import format_duration
from kinoray.quarantine import Refusal
from kinoray.run.cluster import quiet_ray
from kinoray.run.decoding import DecodeTask
from kinoray.run.gate import Gate
from kinoray.run.ingest import Rows, Samples, Unreadable, epoch_order, rank_part, rank_steps, run_length, stream
from kinoray.run.recipe import learning_rate, load_optimizer_state, optimizer_state
from kinoray.run.replica import Replica, Totals
from kinoray.run.runfolder import add_refusals, checkpoint_uri, prune_checkpoints, run_digest, write_metrics
from kinoray.storage import Storage, join
from kinoray.verbs import TrainConfig

__all__ = ["worker_loop"]

T = TypeVar("T")
_CHECK_STEPS = 32  # how often ranks look whether to go on: looking costs a GPU its lead over the CPU
_PROGRESS_S = 5.0
_FINAL = (ConfigError, CatalogError, CheckpointError, ModelError, TooManyBad, TrainingDiverged)


def worker_loop(job: Mapping[str, Any]) -> dict[str, str]:
    """Train to the end, from the newest whole checkpoint on; `job` holds config, catalog_digest, box and gate.

    Returns `{}`, `stopped` if the gate ended the run, or error_class and error_text of an error that all ranks have and
    that another try would meet again: Ray Train would start the workers max_failures times over for it.
    """
    try:
        worker = _Worker(job["config"], job["catalog_digest"], job["box"], job["gate"])
        if not worker.run():
            return {"stopped": "by the gate"}
    except _FINAL as error:
        return {"error_class": type(error).__name__, "error_text": str(error)}
    return {}


def _agreed(step: Callable[[], T]) -> T:
    """The result of a step without collectives; where it fails on one rank, the error is raised on all."""
    error: KinorayError | None = None
    try:
        result = step()
    except KinorayError as found:
        error = found
    errors: list[KinorayError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise first
    return result


class _Part:
    """A split of the catalog, and what of it could not be read on this rank."""

    def __init__(self, catalog: Catalog, name: str) -> None:
        self.catalog, self.name = catalog.select(name), name
        self.labels = torch.from_numpy(self.catalog.table.column("label_id").to_numpy().astype(np.int64))
        self.refusals: list[Refusal] = []

    def __len__(self) -> int:
        return len(self.catalog)

    def refuse(self, unreadable: Sequence[Unreadable]) -> None:
        """Take down videos that could not be read."""
        for item in unreadable:
            row = self.catalog.table.select(["video_id", "uri", "offset", "length"]).slice(item.row, 1).to_pylist()[0]
            stage = f"train on {self.name or 'all'}"
            self.refusals.append(Refusal(**row, error_class=item.error_class, error_text=item.error_text, stage=stage))


class _Worker:
    """One rank of the run."""

    def __init__(self, config: TrainConfig, catalog_digest: str, box: Any, gate: Gate | None) -> None:
        quiet_ray()
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
        self.config, self.optim, self._box, self._gate = config, config.optim, box, gate
        self.storage = Storage(config.storage)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if gate is not None and self.rank == 0:
            gate.attach()
        catalog = _agreed(lambda: self._catalog(catalog_digest))
        self.labels, self.catalog_digest = catalog.labels, catalog.digest
        self.run_digest = run_digest(config, catalog)
        self.train = _Part(catalog, config.split)
        self.val = _Part(catalog, config.val_split) if config.val_split else None
        self.num_steps = -(-len(self.train) // self.optim.batch_size)
        self.run_length = run_length(self.train.catalog, self.optim.batch_size)
        newest = self._newest()
        model = _agreed(lambda: self._model(fresh=newest is None))
        self.with_flow = model.input_spec.flow_channels > 0
        self.replica = Replica(model, len(self.labels), config.clip, self.optim, ray.train.torch.get_device())
        self.epoch, self.samples = 0, 0
        if newest is not None:
            _agreed(lambda: self._resume(*newest))
        self._first_step, self._start_s = self.epoch * self.num_steps, time.monotonic()
        self._said_s = self._start_s
        kind = self.replica.device.type
        done = f" after epoch {self.epoch}, from {newest[0]}" if newest else ""
        self._say(f"train: {self.world_size} workers start on {kind}{done}")

    def _catalog(self, catalog_digest: str) -> Catalog:
        if not self.storage.exists(join(self.config.out, "run.json")):
            raise ConfigError(
                f"out {self.config.out} is not there on {socket.gethostname()}, where rank {self.rank} runs; on "
                "several nodes it must be s3:// or a folder that they share"
            )
        catalog = load_catalog(self.storage, self.config.catalog)
        if catalog.digest != catalog_digest:
            raise CatalogError(f"{self.config.catalog} changed while the run was starting; start it again")
        return catalog

    def _newest(self) -> tuple[str, CheckpointMeta] | None:
        """The newest whole checkpoint, as rank 0 sees it."""
        found = _agreed(lambda: list_checkpoints(self.storage, self.config.out) if self.rank == 0 else [])
        choice: list[Any] = [found[-1] if found else None]
        dist.broadcast_object_list(choice, src=0)
        newest: tuple[str, CheckpointMeta] | None = choice[0]
        return newest

    def _model(self, *, fresh: bool) -> VideoModel:
        torch.manual_seed(self.optim.seed)  # the same weights on all ranks
        config = self.config.model if fresh else without_start_weights(self.config.model)
        return build_model(config, len(self.labels))

    def _resume(self, uri: str, meta: CheckpointMeta) -> None:
        if meta.run_digest != self.run_digest:
            found = f"run {meta.run_digest}, not {self.run_digest}"
            raise CheckpointMismatch(f"{uri} is of another run ({found}); move it out of {self.config.out}")
        load_weights(self.replica.module, load_model_state(self.storage, uri), uri)
        load_optimizer_state(self.replica.module, self.replica.optimizer, load_train_state(self.storage, uri))
        self.epoch, self.samples = meta.epoch, meta.samples

    def _say(self, line: str) -> None:
        if self.rank == 0:
            self._box.post.remote(line)

    def run(self) -> bool:
        """All epochs that are left; False if the gate ended the run before."""
        while self.epoch < self.optim.epochs:
            start_s = time.monotonic()
            epoch = self.epoch + 1
            trained, wait_s = self._train_epoch(epoch)
            train_s = time.monotonic() - start_s
            self.samples += trained.videos
            row: dict[str, float | int] = {"epoch": epoch, "step": epoch * self.num_steps, "samples": self.samples}
            row |= {"loss": trained.loss, "top1": trained.top1, "top5": trained.top5, "unreadable": trained.unreadable}
            row |= {"lr": self.replica.optimizer.param_groups[0]["lr"]}
            self.replica.share_buffers()
            if self.val is not None:
                scored = self._evaluate(self.val)
                row |= {"val_loss": scored.loss, "val_top1": scored.top1, "val_top5": scored.top5}
                row |= {"val_videos": scored.videos, "val_unreadable": scored.unreadable}
            row |= {"videos_per_s": len(self.train) / train_s, "decode_wait": wait_s / train_s}
            row |= {"epoch_s": time.monotonic() - start_s, "time_s": time.time()}
            # What was not measured (no readable video) is left out: NaN is no JSON.
            row = {name: value for name, value in row.items() if not math.isnan(value)}
            self._record_refusals()
            if self.rank == 0:
                self._keep(row)
            self.epoch = epoch
            self._say(_epoch_line(row, self.optim.epochs))
            ray.train.report(row)
            if not self._goes_on(row):
                return False
        return True

    def _goes_on(self, row: Mapping[str, float | int]) -> bool:
        """What the gate says to the epoch, on all ranks alike; the last epoch is shown, too."""
        if self._gate is None:
            return True
        verdict: list[Any] = [self.rank != 0 or self._gate.go_on(row)]
        dist.broadcast_object_list(verdict, src=0)
        return bool(verdict[0]) or self.epoch == self.optim.epochs

    def _stream(self, part: _Part, steps: Sequence[Rows], epoch: int | None) -> Iterator[Samples]:
        task = DecodeTask(
            storage=self.storage, clip=self.config.clip, with_flow=self.with_flow, seed=self.optim.seed, epoch=epoch
        )
        share = rank_part(self.config.resources.decode_tasks, self.rank, self.world_size)
        decode_tasks = max(1, share.stop - share.start)
        return stream(part.catalog, steps, task, decode_tasks=decode_tasks, world_size=self.world_size)

    def _train_epoch(self, epoch: int) -> tuple[Totals, float]:
        """Train one epoch; totals over all ranks, and the seconds that this rank waited for decoded clips."""
        # Dropout and the like depend on (seed, epoch, rank), so that an epoch that is trained again is the same.
        key = hashlib.sha256(f"{self.optim.seed}\n{epoch}\n{self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(key[:7], "big"))
        order = epoch_order(self.train.catalog, seed=self.optim.seed, epoch=epoch, run=self.run_length)
        size = self.optim.batch_size
        steps = rank_steps(order, batch_size=size, rank=self.rank, world_size=self.world_size)
        batches = self._stream(self.train, steps, epoch)
        self.replica.reset()
        self.replica.module.train()
        wait_s = 0.0
        for index, rows in enumerate(steps):
            asked_s = time.monotonic()
            samples = next(batches) if len(rows) else None
            wait_s += time.monotonic() - asked_s
            step = (epoch - 1) * self.num_steps + index
            rate = learning_rate(self.optim, step, self.optim.epochs * self.num_steps)
            if samples is None:
                self.replica.train_step(None, self.train.labels[:0], 0, rate)
            else:
                self.train.refuse(samples.unreadable)
                labels = self.train.labels[samples.rows]
                self.replica.train_step(samples.clips, labels, len(samples.unreadable), rate)
            self._progress(epoch, step + 1)
            if (index + 1) % _CHECK_STEPS == 0:
                self._require_sound(self.replica.totals(), epoch)
        totals = self.replica.finish()
        self._require_sound(totals, epoch)
        return totals, wait_s

    def _evaluate(self, part: _Part) -> Totals:
        """Score the model on every video of the part, each on one rank; totals over all ranks."""
        order = np.arange(len(part), dtype=np.int64)
        size = self.optim.batch_size
        steps = rank_steps(order, batch_size=size, rank=self.rank, world_size=self.world_size)
        self.replica.reset()
        self.replica.module.eval()
        for samples in self._stream(part, steps, None):
            part.refuse(samples.unreadable)
            self.replica.score(samples.clips, part.labels[samples.rows], len(samples.unreadable))
        return self.replica.finish()

    def _require_sound(self, totals: Totals, epoch: int) -> None:
        """Raise, on all ranks alike, what makes it useless to go on."""
        limit, count = self.config.max_bad_fraction, len(self.train)
        if totals.unreadable > limit * count:
            self._record_refusals()
            table = join(self.config.out, "quarantine.parquet")
            raise TooManyBad(
                f"{totals.unreadable} of {count} training videos could not be read in epoch {epoch}, more than "
                f"max_bad_fraction = {limit:g}; {table} lists them with the reasons"
            )
        if not math.isfinite(totals.loss_sum):
            raise TrainingDiverged(
                f"the loss is {totals.loss_sum} in epoch {epoch}; lower optim.lr ({self.optim.lr:g}) or "
                f"optim.clip_norm ({self.optim.clip_norm:g}) and start a new run"
            )

    def _record_refusals(self) -> None:
        mine = [refusal for part in (self.train, self.val) if part is not None for refusal in part.refusals]
        all_ranks: list[list[Refusal]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(all_ranks, mine)
        if self.rank == 0:
            add_refusals(self.storage, self.config.out, [refusal for refusals in all_ranks for refusal in refusals])
        for part in (self.train, self.val):
            if part is not None:
                part.refusals.clear()

    def _keep(self, row: Mapping[str, float | int]) -> None:
        """Write the epoch's metrics, then its checkpoint: a kill between them costs the epoch and replaces its row."""
        out = self.config.out
        write_metrics(self.storage, out, row)
        meta = CheckpointMeta(
            model=self.config.model,
            clip=self.config.clip,
            labels=self.labels,
            epoch=int(row["epoch"]),
            step=int(row["step"]),
            samples=self.samples,
            metrics={name: float(value) for name, value in row.items()},
            catalog_digest=self.catalog_digest,
            run_digest=self.run_digest,
        )
        save_checkpoint(
            self.storage,
            checkpoint_uri(out, meta.epoch, meta.step),
            model_state=self.replica.module.state_dict(),
            meta=meta,
            train_state=optimizer_state(self.replica.module, self.replica.optimizer),
        )
        prune_checkpoints(self.storage, out, self.config.keep_checkpoints)

    def _progress(self, epoch: int, step: int) -> None:
        now = time.monotonic()
        if self.rank != 0 or now - self._said_s < _PROGRESS_S:
            return
        self._said_s = now
        totals = self.replica.totals()
        done, num_steps = step - self._first_step, self.optim.epochs * self.num_steps
        left_s = (now - self._start_s) / done * (num_steps - step)  # evaluations so far are in it
        rate = done * self.optim.batch_size / (now - self._start_s)
        parts = [f"train: epoch {epoch}/{self.optim.epochs}, step {step}/{num_steps}"]
        parts += [f"loss {totals.loss:.3f}"] if totals.videos else []
        parts += [f"{rate:.1f} videos/s", f"{format_duration(left_s)} left"]
        parts += [f"unreadable {totals.unreadable}"] if totals.unreadable else []
        self._say(", ".join(parts))


def _epoch_line(row: Mapping[str, float | int], epochs: int) -> str:
    nan = math.nan
    parts = [f"train: epoch {row['epoch']}/{epochs} done in {format_duration(row['epoch_s'])}"]
    parts.append(f"loss {row.get('loss', nan):.3f}, top-1 {row.get('top1', nan):.3f}")
    if "val_videos" in row:
        numbers = f"loss {row.get('val_loss', nan):.3f}, top-1 {row.get('val_top1', nan):.3f}"
        parts.append(f"val {numbers}, top-5 {row.get('val_top5', nan):.3f} ({row['val_videos']} videos)")
    parts.append(f"{row['videos_per_s']:.1f} videos/s, {row['decode_wait']:.0%} of it waiting for decoders")
    if bad := int(row["unreadable"] + row.get("val_unreadable", 0)):
        parts.append(f"unreadable {bad}")
    return "; ".join(parts)
