"""What each training worker runs: epochs of steps, an exact evaluation after each, and what rank 0 then writes.

Easy to break: whether a run goes on must be decided from what all ranks share, or some would wait for ever for those
that stopped.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.placement_group import get_current_placement_group
from torch import Tensor

from kinoray.catalog.quarantine import Refusal
from kinoray.catalog.table import Catalog, load_catalog
from kinoray.cluster.connect import quiet_ray
from kinoray.cluster.environment import host, software
from kinoray.cluster.events import log_event
from kinoray.errors import (
    CatalogError,
    CheckpointError,
    CheckpointMismatch,
    ConfigError,
    ModelError,
    StorageUnavailable,
    TooManyBad,
    TrainingDiverged,
)
from kinoray.network.build import VideoModel, build_model, without_start_weights
from kinoray.network.checkpoint import CheckpointMeta, load_model_state, load_train_state, newest_checkpoint
from kinoray.network.parts import backbone_names
from kinoray.storage.objects import Storage, join
from kinoray.train.augment import Augmenter
from kinoray.train.config import TrainConfig
from kinoray.train.feed import Feed, Part
from kinoray.train.gate import Gate
from kinoray.train.ingest import Samples, epoch_order, rank_steps, run_length
from kinoray.train.pace import Pace, epoch_line
from kinoray.train.ranks import agreed, from_first
from kinoray.train.recipe import class_weights, learning_rate
from kinoray.train.recorder import Recorder
from kinoray.train.runfolder import add_start, read_metrics, run_digest, stopped_early
from kinoray.train.state import seed_step, start_from
from kinoray.train.step import Replica, Totals
from kinoray.train.times import TrainMetrics
from kinoray.train.upload import Uploader

__all__ = ["worker_loop"]

_CHECK_STEPS = {"cpu": 1}  # how often ranks look whether to go on, else 32: it costs a GPU its lead over the CPU
_FINAL = (
    ConfigError,
    CatalogError,
    CheckpointError,
    ModelError,
    StorageUnavailable,  # every request was made again for storage.retry_s, so another start would wait as long again
    TooManyBad,
    TrainingDiverged,
)


def worker_loop(job: Mapping[str, Any]) -> dict[str, str]:
    """Train to the end, from the newest whole checkpoint on; `job` holds config, catalog_digest, commits, box, gate.

    Returns `{}`, `stopped` if the gate ended the run, or error_class and error_text of an error that all ranks have and
    that another try would meet again: Ray Train would start the workers max_failures times over for it.
    """
    try:
        worker = _Worker(job["config"], job["catalog_digest"], job["box"], job["gate"])
        worker.note_start(job["commits"])
        if not worker.run():
            return {"stopped": "by the gate"}
    except _FINAL as error:
        return {"error_class": type(error).__name__, "error_text": str(error)}
    return {}


class _Worker:
    """One rank of the run."""

    def __init__(self, config: TrainConfig, catalog_digest: str, box: Any, gate: Gate | None) -> None:
        quiet_ray()
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
        self.config, self.optim, self._box, self._gate = config, config.optim, box, gate
        self.storage = Storage(config.storage)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.rank == 0 and (place := get_current_placement_group()) is not None:
            ray.get(box.settle.remote(place.id.hex()))
        if gate is not None and self.rank == 0:
            gate.attach()
        catalog = agreed(lambda: self._catalog(catalog_digest))
        self.labels = catalog.labels
        self.run_digest = run_digest(config, catalog)
        self.train = Part(catalog, config.split)
        self.val = Part(catalog, config.val_split) if config.val_split else None
        self.num_steps = -(-len(self.train) // self.optim.batch_size)
        self.run_length = run_length(self.train.catalog, self.optim.batch_size)
        self.recorder, self.uploader = Recorder(self.storage, config, catalog, self.num_steps), Uploader()
        newest = from_first(self._newest)
        model = agreed(lambda: self._model(fresh=newest is None))
        device, with_flow = ray.train.torch.get_device(), model.input_spec.flow_channels > 0
        self.feed = agreed(lambda: Feed(config, self.storage, with_flow=with_flow, device=device))
        self.replica = agreed(lambda: self._replica(model, device))
        self.augmenter = Augmenter(config.augment, self.optim.seed, self.replica.device)
        self.epoch, self.epoch_steps, self.samples = 0, 0, 0  # whole epochs, steps and videos in them
        if newest is not None:
            agreed(lambda: self._resume(*newest))
        self._pace = Pace(self.optim, self.num_steps, self.epoch * self.num_steps + self.epoch_steps)
        self._source = newest[0] if newest else ""
        self._run = config.out.rstrip("/").rpartition("/")[2]
        self._metrics = TrainMetrics(self._run)

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
        """The newest sound checkpoint; broken ones after it are named."""
        return newest_checkpoint(self.storage, self.config.out, warn=lambda line: self._say(f"train: {line}"))

    def _model(self, *, fresh: bool) -> VideoModel:
        torch.manual_seed(self.optim.seed)  # the same weights on all ranks
        init_from, known = self.config.init_from, without_start_weights(self.config.model)
        model = build_model(self.config.model if fresh and not init_from else known, len(self.labels))
        if fresh and init_from:
            self._say(start_from(self.storage, init_from, model, known, self.labels))
        return model

    def _replica(self, model: VideoModel, device: torch.device) -> Replica:
        optim, num_classes = self.optim, len(self.labels)
        own_rate = optim.backbone_lr_factor != 1
        backbone = backbone_names(model, self.config.model, num_classes) if own_rate else frozenset[str]()
        weights = class_weights(self.train.labels, num_classes, optim.class_balance) if optim.class_balance else None
        return Replica(model, num_classes, self.config, device, backbone=backbone, class_weights=weights)

    def _resume(self, uri: str, meta: CheckpointMeta) -> None:
        if meta.run_digest != self.run_digest:
            found = f"run {meta.run_digest}, not {self.run_digest}"
            raise CheckpointMismatch(f"{uri} is of another run ({found}); move it out of {self.config.out}")
        self.replica.resume(load_model_state(self.storage, uri), load_train_state(self.storage, uri), uri)
        self.epoch, self.epoch_steps = meta.epoch, meta.epoch_steps
        self.samples = meta.samples - self.replica.totals().videos

    def note_start(self, commits: Mapping[str, str]) -> None:
        """Say, and write to environment.json, where the run starts from, on what, with which versions."""
        after = f"epoch {self.epoch}" if self.epoch else ""
        after = f"step {self.epoch_steps} of epoch {self.epoch + 1}" if self.epoch_steps else after
        where = f" after {after}, from {self._source}" if after else ""
        self._say(f"train: {self.world_size} workers start on {self.replica.device.type}{where}")
        ranks: list[Any] = [None] * self.world_size
        dist.all_gather_object(ranks, (host(self.rank), software()))
        first = ranks[0][1]
        hosts = [about if versions == first else about | {"software": versions} for about, versions in ranks]
        start = {"time_s": time.time(), "after": after, **commits, "software": first, "hosts": hosts}
        self._write(lambda: add_start(self.storage, self.config.out, start))

    def _say(self, line: str) -> None:
        if self.rank == 0 and line:
            self._box.post.remote(line)

    def run(self) -> bool:
        """All epochs that are left; False if the gate ended the run before."""
        with self.uploader:
            return self._epochs()

    def _epochs(self) -> bool:
        while self.epoch < self.optim.epochs:
            start_s, num_videos = time.monotonic(), len(self.train) - self.epoch_steps * self.optim.batch_size
            epoch, num_steps = self.epoch + 1, self.num_steps
            trained, wait_s = self._train_epoch(epoch)
            train_s, history = time.monotonic() - start_s, self.replica.history()
            self.samples += trained.videos
            row: dict[str, float | int] = {"epoch": epoch, "step": epoch * num_steps, "samples": self.samples}
            row |= {"loss": trained.loss, "top1": trained.top1, "top5": trained.top5, "unreadable": trained.unreadable}
            row |= {"lr": learning_rate(self.optim, epoch * num_steps - 1, self.optim.epochs * num_steps)}
            self.replica.state.share_buffers()
            if self.val is not None and (epoch % self.config.eval_every == 0 or epoch == self.optim.epochs):
                scored = self._evaluate(self.val)
                row |= {"val_loss": scored.loss, "val_top1": scored.top1, "val_top5": scored.top5}
                row |= {"val_videos": scored.videos, "val_unreadable": scored.unreadable}
            row |= {"videos_per_s": max(0, num_videos) / train_s, "decode_wait": wait_s / train_s, "train_s": train_s}
            row |= self.feed.spent(self.replica.device)
            row |= {"epoch_s": time.monotonic() - start_s, "time_s": time.time()}
            # What was not measured (no readable video) is left out: NaN is no JSON.
            row = {name: value for name, value in row.items() if not math.isnan(value)}
            self._save_epoch(row, history)
            self.epoch, self.epoch_steps = epoch, 0
            self._say(epoch_line(row, self.optim.epochs))
            self._note_epoch(row, wait_s)
            ray.train.report(row)
            if not self._goes_on(row):
                return False
            if from_first(lambda: stopped_early(read_metrics(self.storage, self.config.out), self.config)):
                break
        return True

    def _note_epoch(self, row: Mapping[str, float | int], wait_s: float) -> None:
        """Metrics of an epoch, and rank 0's record of it."""
        train_s = float(row["train_s"])
        for stage, seconds in (("decode", wait_s), ("step", train_s - wait_s), ("score", row["epoch_s"] - train_s)):
            self._metrics.spent(stage, seconds)  # type: ignore[arg-type]  # of a tuple of literals
        if self.rank == 0:
            self._metrics.epoch(row)
            log_event("epoch done", {"run": self._run, **row})

    def _goes_on(self, row: Mapping[str, float | int]) -> bool:
        """What the gate says to the epoch, on all ranks alike; the last epoch is shown, too."""
        if self._gate is None:
            return True
        verdict: list[Any] = [self.rank != 0 or self._gate.go_on(row)]
        dist.broadcast_object_list(verdict, src=0)
        return bool(verdict[0]) or self.epoch == self.optim.epochs

    def _train_epoch(self, epoch: int) -> tuple[Totals, float]:
        """Train what is left of an epoch; its totals over all ranks, and the seconds that this rank waited for it."""
        optim, first, every = self.optim, self.epoch_steps, self.config.checkpoint_every_steps
        order = epoch_order(self.train.catalog, seed=optim.seed, epoch=epoch, run=self.run_length)
        steps = rank_steps(
            order, batch_size=optim.batch_size, rank=self.rank, world_size=self.world_size, first_step=first
        )
        batches = self.feed.batches(self.train, steps, epoch)
        if not first:
            self.replica.reset()
        self.replica.train()
        wait_s = 0.0
        for index, rows in enumerate(steps, start=first):
            asked_s = time.monotonic()
            samples = next(batches, None) if len(rows) else None
            if self.feed.outage is not None:
                self.replica.halt()  # and on with a step without videos: the other ranks wait in its collectives
            wait_s += time.monotonic() - asked_s
            step = (epoch - 1) * self.num_steps + index
            self._train_step(epoch, index, samples)
            self._say(self._pace.line(self.replica, epoch, step + 1) if self.rank == 0 else "")
            if every and (step + 1) % every == 0:
                self._save_in_epoch(epoch, step + 1)
            elif (index + 1) % _CHECK_STEPS.get(self.replica.device.type, 32) == 0:
                self._require_sound(self.replica.totals(), epoch)
        totals = self.replica.finish()
        self._require_sound(totals, epoch)
        return totals, wait_s

    def _train_step(self, epoch: int, index: int, samples: Samples | None) -> None:
        """Step `index` of the epoch on this rank's part of its batch; None is no video at all."""
        step = (epoch - 1) * self.num_steps + index
        rate = learning_rate(self.optim, step, self.optim.epochs * self.num_steps)
        seed_step(self.optim.seed, epoch, index, self.rank)
        if samples is None:
            self.replica.train_step(None, self.train.labels[:0], 0, rate)
        else:
            labels = self.train.labels[samples.rows]
            video_ids = self.train.catalog.table["video_id"].take(samples.rows).to_pylist()
            self._metrics.step(len(video_ids), samples.unreadable)
            for item in samples.unreadable:
                name = self.train.catalog.table["video_id"][item.row].as_py()
                ids = {"run": self._run, "epoch": epoch, "video": name}
                log_event("unreadable", ids | {"reason": item.error_class, "text": item.error_text}, bad=True)
            clips = self.augmenter.colour(samples.clips, video_ids, epoch)
            mix = self.augmenter.mix(len(labels), self.config.clip.view.crop_px, epoch, index)
            self.replica.train_step(clips, labels, len(samples.unreadable), rate, mix)

    def _evaluate(self, part: Part) -> Totals:
        """Score the model on every video of the part, each on one rank; totals over all ranks."""
        order = np.arange(len(part), dtype=np.int64)
        size = self.optim.batch_size
        steps = rank_steps(order, batch_size=size, rank=self.rank, world_size=self.world_size)
        self.replica.reset()
        self.replica.eval()
        for samples in self.feed.batches(part, steps, None):
            self.replica.score(samples.clips, part.labels[samples.rows], len(samples.unreadable))
        if self.feed.outage is not None:
            self.replica.halt()
        totals = self.replica.finish()
        self._require_stores()
        return totals

    def _require_stores(self) -> None:
        """Raise, on all ranks alike, that the store is down for one of them. Nothing it missed has been saved."""
        if self.replica.halted():
            agreed(self.feed.check)

    def _require_sound(self, totals: Totals, epoch: int) -> None:
        """Raise, on all ranks alike, what makes it useless to go on."""
        self._require_stores()
        limit, count = self.config.max_bad_fraction, len(self.train)
        if totals.unreadable > limit * count:
            refusals = self._refusals()
            self._write(lambda: self.recorder.refuse(refusals))
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

    def _refusals(self) -> list[Refusal]:
        """What no rank could read since the last call, on rank 0; all ranks must call it."""
        parts = [part for part in (self.train, self.val) if part is not None]
        mine = [refusal for part in parts for refusal in part.refusals]
        all_ranks: list[list[Refusal]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(all_ranks, mine)
        for part in parts:
            part.refusals.clear()
        return [refusal for refusals in all_ranks for refusal in refusals]

    def _save_in_epoch(self, epoch: int, step: int) -> None:
        """Let a checkpoint be written while training goes on, unless the one before is still under way."""
        totals = self.replica.finish()
        self._require_sound(totals, epoch)
        if not from_first(self.uploader.ready):
            self._say(f"train: no checkpoint at step {step}: the one before is still being written")
            return
        refusals = self._refusals()
        state = self.replica.snapshot(in_epoch=True, keep=self.rank == 0)
        if self.rank == 0:
            history = self.replica.history()
            samples = self.samples + totals.videos
            keep = partial(self.recorder.keep_step, epoch=epoch, samples=samples, refusals=refusals)
            self.uploader.submit(partial(keep, state, history))

    def _save_epoch(self, row: Mapping[str, float | int], history: Tensor) -> None:
        """Write the epoch and its checkpoint, and wait until it is there."""
        refusals = self._refusals()
        state = self.replica.snapshot(in_epoch=False, keep=self.rank == 0)
        self._write(lambda: self.recorder.keep_epoch(state, history, row, refusals))

    def _write(self, job: Callable[[], object]) -> None:
        """Do the job on rank 0 after what is under way there; all ranks wait for it."""

        def written() -> None:
            self.uploader.submit(job)
            self.uploader.wait()

        from_first(written)
