"""What each training worker runs: epochs of steps, an exact evaluation after each, and what rank 0 then writes.

Easy to break: whether a run goes on must be decided from what all ranks share, or some would wait for ever for those
that stopped. `_agreed` and `_from_first` are how they decide; every rank must come to each of them, in the same order.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kinoray.catalog.rows import QuarantineRow
from kinoray.catalog.table import Catalog, load_catalog
from kinoray.config.shared import ClipConfig
from kinoray.console import log_event
from kinoray.errors import (
    CatalogError,
    CheckpointMismatch,
    ConfigError,
    KinorayError,
    TooManyBad,
    TrainingDiverged,
)
from kinoray.evaluation.metrics import average_precisions, mean_precision
from kinoray.network.batch import FeatureBatch, VideoBatch
from kinoray.network.build import VideoModel, backbone_names, build_model, without_start_weights
from kinoray.network.checkpoint import CheckpointMeta, load_model_state, load_train_state
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.features import FeatureFeed
from kinoray.train.input import Feed, Part, Rows, Samples, epoch_order, rank_steps, run_length
from kinoray.train.recipe import Augmenter, class_weights, learning_rate
from kinoray.train.recorder import Pace, Recorder, TrainMetrics, Uploader, epoch_line, host, software
from kinoray.train.runfolder import EpochRow, RunFolder, run_digest, stopped_early
from kinoray.train.state import seed_step, start_from
from kinoray.train.step import Replica, Totals

__all__ = ["TrainLoop"]

T = TypeVar("T")
_GPU_CHECK_STEPS = 32  # between two looks whether to go on: they cost a GPU its lead over the CPU


class TrainLoop:
    """One rank of the run. Making it builds the network and goes to where the newest checkpoint was taken."""

    def __init__(
        self,
        config: TrainConfig,
        catalog_digest: str,
        device: torch.device,
        *,
        say: Callable[[str], None],
        saw: Callable[[int], None],
        report: Callable[[EpochRow], None],
        go_on: Callable[[EpochRow], bool] | None,
    ) -> None:
        """All ranks must make one together, in an initialised process group.

        Args:
            say: shows a line to who started the run; rank 0's are shown.
            saw: is told, on rank 0, how many steps are done; for the eyes only.
            report: is told each epoch, on every rank.
            go_on: asked by rank 0 after each epoch whether to train another; None for always.
        """
        self.config = config
        self.optim = config.optim
        self._show = say
        self._saw = saw
        self._report = report
        self._go_on = go_on
        self.storage = Storage(config.storage)
        self.folder = RunFolder(self.storage, config.out)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

        catalog = _agreed(lambda: self._catalog(catalog_digest))
        self.labels = catalog.labels
        self.run_digest = run_digest(config, catalog)
        self.train = Part(catalog, config.split)
        self.val = Part(catalog, config.val_split) if config.val_split else None
        self.num_steps = -(-len(self.train) // self.optim.batch_size)
        self.run_length = run_length(self.train.catalog, self.optim.batch_size)
        self.recorder = Recorder(self.folder, config, catalog, self.num_steps)
        self.uploader = Uploader()

        newest = _from_first(self._newest)
        model = _agreed(lambda: self._model(fresh=newest is None))
        self.replica = _agreed(lambda: self._replica(model, device))
        self.augmenter = Augmenter(config.augment, self.optim.seed, device)
        self._check_steps = 1 if device.type == "cpu" else _GPU_CHECK_STEPS
        self.epoch = 0
        """Whole epochs that are done."""
        self.epoch_steps = 0
        """Steps that are done of the next one."""
        self.samples = 0
        """Videos trained on in whole epochs."""
        if newest is not None:
            _agreed(lambda: self._resume(*newest))
        self.feed = _agreed(lambda: self._feed(config.clip.for_network(model.input_spec.flow_channels)))
        self._source = newest[0] if newest else ""
        self._pace = Pace(self.optim, self.num_steps)
        self._run = config.out.rstrip("/").rpartition("/")[2]
        self._metrics = TrainMetrics(self._run)

    def _catalog(self, catalog_digest: str) -> Catalog:
        if not self.folder.is_claimed():
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
        return self.folder.newest(warn=lambda line: self._say(f"train: {line}"))

    def _model(self, *, fresh: bool) -> VideoModel:
        torch.manual_seed(self.optim.seed)  # the same weights on all ranks
        known = without_start_weights(self.config.model)
        if not fresh:
            return build_model(known, len(self.labels))
        if not self.config.init_from:
            return build_model(self.config.model, len(self.labels))
        model = build_model(known, len(self.labels))
        self._say(start_from(self.storage, self.config.init_from, model, known, self.labels))
        return model

    def _replica(self, model: VideoModel, device: torch.device) -> Replica:
        num_classes = len(self.labels)
        backbone = frozenset[str]()
        if self.optim.backbone_lr_factor != 1:
            backbone = backbone_names(model, self.config.model, num_classes)
        weights = None
        if self.optim.class_balance:
            weights = class_weights(self.train.labels, num_classes, self.optim.class_balance)
        return Replica(model, num_classes, self.config, device, backbone=backbone, class_weights=weights)

    def _feed(self, clip: ClipConfig) -> Feed:
        """What gives the batches; the features that it may keep are those of the weights that are here now."""
        device = self.replica.device
        if self.config.cache.keep == "frames":
            return Feed(self.config, clip, self.storage, device=device)
        return FeatureFeed(self.config, clip, self.storage, self.replica, self._coloured, self._say)

    def _resume(self, uri: str, meta: CheckpointMeta) -> None:
        if meta.run_digest != self.run_digest:
            found = f"run {meta.run_digest}, not {self.run_digest}"
            raise CheckpointMismatch(f"{uri} is of another run ({found}); move it out of {self.config.out}")
        self.replica.resume(load_model_state(self.storage, uri), load_train_state(self.storage, uri), uri)
        self.epoch = meta.epoch
        self.epoch_steps = meta.epoch_steps
        self.samples = meta.samples - self.replica.totals().videos

    def _say(self, line: str) -> None:
        if self.rank == 0 and line:
            self._show(line)

    def note_start(self, commits: Mapping[str, str]) -> None:
        """Say, and write to environment.json, where the run starts from, on what, with which versions."""
        after = ""
        if self.epoch_steps:
            after = f"step {self.epoch_steps} of epoch {self.epoch + 1}"
        elif self.epoch:
            after = f"epoch {self.epoch}"
        where = f" after {after}, from {self._source}" if after else ""
        who = "1 worker starts" if self.world_size == 1 else f"{self.world_size} workers start"
        self._say(f"train: {who} on {self.replica.device.type}{where}")
        if self.epoch < self.optim.epochs:
            self._say("train: decoding the first clips")
        ranks: list[Any] = [None] * self.world_size
        dist.all_gather_object(ranks, (host(self.rank), software()))
        first = ranks[0][1]
        hosts = [about if versions == first else about | {"software": versions} for about, versions in ranks]
        start = {"time_s": time.time(), "after": after, **commits, "software": first, "hosts": hosts}
        self._write(lambda: self.folder.add_start(start))

    # Epochs

    def run(self) -> bool:
        """All epochs that are left; False if go_on ended the run before."""
        with self.uploader:
            while self.epoch < self.optim.epochs:
                row = self._run_epoch(self.epoch + 1)
                if not self._goes_on(row):
                    return False
                if _from_first(lambda: stopped_early(self.folder.epochs(), self.config)):
                    break
        return True

    def _run_epoch(self, epoch: int) -> EpochRow:
        """Train what is left of the epoch, score it if it is its turn, and save it."""
        start_s = time.monotonic()
        num_videos = max(0, len(self.train) - self.epoch_steps * self.optim.batch_size)
        trained, wait_s = self._train_epoch(epoch)
        train_s = time.monotonic() - start_s
        history = self.replica.history()
        self.samples += trained.videos
        self.replica.state.share_buffers()
        scored = None
        if self.val is not None and (epoch % self.config.eval_every == 0 or epoch == self.optim.epochs):
            scored = self._evaluate(self.val)
        decoding = self.feed.spent(self.replica.device)
        has_top5 = len(self.labels) > 5 and self.train.labels.dim() == 1  # of five classes it is 1, whatever is said
        row = EpochRow(
            epoch=epoch,
            step=epoch * self.num_steps,
            samples=self.samples,
            loss=_measured(trained.loss),
            top1=_measured(trained.top1),
            top5=_measured(trained.top5) if has_top5 else None,
            quarantined=trained.quarantined,
            lr=learning_rate(self.optim, epoch * self.num_steps - 1, self.optim.epochs * self.num_steps),
            val_loss=_measured(scored.loss) if scored else None,
            val_top1=_measured(scored.top1) if scored else None,
            val_top5=_measured(scored.top5) if scored and has_top5 else None,
            val_map=self._mean_precision() if scored and self.train.labels.dim() == 2 else None,
            val_videos=scored.videos if scored else None,
            val_quarantined=scored.quarantined if scored else None,
            videos_per_s=num_videos / train_s,
            decode_wait=wait_s / train_s,
            train_s=train_s,
            decode_cpu_s=decoding.cpu_s,
            cached=decoding.cached,
            epoch_s=time.monotonic() - start_s,
            time_s=time.time(),
        )
        self._save_epoch(row, history)
        self.epoch = epoch
        self.epoch_steps = 0
        self._say(epoch_line(row, self.optim.epochs))
        self._metrics.spent("decode", wait_s)
        self._metrics.spent("step", train_s - wait_s)
        self._metrics.spent("score", row.epoch_s - train_s)
        if self.rank == 0:
            self._metrics.epoch(row)
            log_event("epoch done", {"run": self._run, **row.record()})
        self._report(row)
        return row

    def _goes_on(self, row: EpochRow) -> bool:
        """What is said to the epoch, on all ranks alike; the last epoch is shown, too."""
        go_on = self._go_on
        if go_on is None:
            return True
        return _from_first(lambda: go_on(row)) or self.epoch == self.optim.epochs

    def _train_epoch(self, epoch: int) -> tuple[Totals, float]:
        """Train what is left of an epoch; its totals over all ranks, and the seconds that this rank waited for it."""
        first = self.epoch_steps
        order = epoch_order(self.train.catalog, seed=self.optim.seed, epoch=epoch, run=self.run_length)
        steps = rank_steps(
            order, batch_size=self.optim.batch_size, rank=self.rank, world_size=self.world_size, first_step=first
        )
        if not first:
            self.replica.reset()
        self.replica.train()
        view = self.config.augment.view_of(epoch)
        with self.feed.turn(self.train, steps, view):
            wait_s = self._take_steps(epoch, first, steps, self.feed.batches(self.train, steps, view))
        totals = self.replica.finish()
        self._require_sound(totals, epoch)
        return totals, wait_s

    def _take_steps(self, epoch: int, first: int, steps: Sequence[Rows], batches: Iterator[Samples]) -> float:
        """The epoch's steps from `first` on; the seconds that this rank waited for their batches."""
        every = self.config.checkpoint_every_steps
        wait_s = 0.0
        for index, rows in enumerate(steps, start=first):
            asked_s = time.monotonic()
            samples = next(batches, None) if len(rows) else None
            if self.feed.outage is not None:
                self.replica.halt()  # and on with a step without videos: the other ranks wait in its collectives
            wait_s += time.monotonic() - asked_s
            self._train_step(epoch, index, samples)
            num_done = (epoch - 1) * self.num_steps + index + 1
            if self.rank == 0:
                self._saw(num_done)
                self._say(self._pace.line(self.replica, epoch, num_done))
            if every and num_done % every == 0:
                self._save_in_epoch(epoch, num_done)
            elif (index + 1) % self._check_steps == 0:
                self._require_sound(self.replica.totals(), epoch)
        return wait_s

    def _train_step(self, epoch: int, index: int, samples: Samples | None) -> None:
        """Step `index` of the epoch on this rank's part of its batch; None is no video at all."""
        step = (epoch - 1) * self.num_steps + index
        rate = learning_rate(self.optim, step, self.optim.epochs * self.num_steps)
        seed_step(self.optim.seed, epoch, index, self.rank)
        if samples is None:
            self.replica.train_step(None, self.train.labels[:0], 0, rate)
            return
        labels = self.train.labels[samples.rows]
        self._metrics.step(len(labels), samples.quarantined)
        for item in samples.quarantined:
            name = self.train.catalog.table["video_id"][item.row].as_py()
            about = {"reason": item.refusal.error_class, "text": item.refusal.error_text}
            log_event("quarantined", {"run": self._run, "epoch": epoch, "video": name, **about}, bad=True)
        clips = self._coloured(self.train, samples, self.config.augment.view_of(epoch))
        mix = self.augmenter.mix(len(labels), self.config.clip.view.crop_px, epoch, index)
        self.replica.train_step(clips, labels, len(samples.quarantined), rate, mix)

    def _coloured(self, part: Part, samples: Samples, view: int | None) -> VideoBatch | FeatureBatch:
        """The clips as the backbones see them; of features that has been done."""
        if view is None or isinstance(samples.clips, FeatureBatch):
            return samples.clips
        video_ids = part.catalog.table["video_id"].take(samples.rows).to_pylist()
        return self.augmenter.colour(samples.clips, video_ids, view)

    def _evaluate(self, part: Part) -> Totals:
        """Score the model on every video of the part, each on one rank; totals over all ranks."""
        order = np.arange(len(part), dtype=np.int64)
        steps = rank_steps(order, batch_size=self.optim.batch_size, rank=self.rank, world_size=self.world_size)
        self.replica.reset()
        self.replica.eval()
        with self.feed.turn(part, steps, None):
            for samples in self.feed.batches(part, steps, None):
                self.replica.score(samples.clips, part.labels[samples.rows], len(samples.quarantined))
        if self.feed.outage is not None:
            self.replica.halt()
        totals = self.replica.finish()
        self._require_stores()
        return totals

    def _mean_precision(self) -> float | None:
        """mAP of what was just scored."""
        logits, labels = self.replica.scored()
        return _measured(mean_precision(average_precisions(logits.numpy(), labels.numpy() > 0)))

    # Whether it is of use to go on

    def _require_stores(self) -> None:
        """Raise, on all ranks alike, that the store is down for one of them. Nothing it missed has been saved."""
        if self.replica.halted():
            _agreed(self.feed.check)

    def _require_sound(self, totals: Totals, epoch: int) -> None:
        """Raise, on all ranks alike, what makes it useless to go on."""
        self._require_stores()
        limit = self.config.max_bad_fraction
        count = len(self.train)
        if totals.quarantined > limit * count:
            refusals = self._refusals()
            self._write(lambda: self.folder.quarantine(refusals))
            raise TooManyBad(
                f"{totals.quarantined} of {count} training videos could not be read in epoch {epoch}, more than "
                f"max_bad_fraction = {limit:g}; {self.folder.quarantine_uri} lists them with the reasons"
            )
        if not math.isfinite(totals.loss_sum):
            raise TrainingDiverged(
                f"the loss is {totals.loss_sum} in epoch {epoch}; lower optim.lr ({self.optim.lr:g}) or "
                f"optim.clip_norm ({self.optim.clip_norm:g}) and start a new run"
            )

    # What rank 0 writes

    def _save_in_epoch(self, epoch: int, step: int) -> None:
        """Let a checkpoint be written while training goes on, unless the one before is still under way."""
        totals = self.replica.finish()
        self._require_sound(totals, epoch)
        if not _from_first(self.uploader.ready):
            self._say(f"train: no checkpoint at step {step}: the one before is still being written")
            return
        refusals = self._refusals()
        state = self.replica.snapshot(in_epoch=True, keep=self.rank == 0)
        if self.rank == 0:
            history = self.replica.history()
            samples = self.samples + totals.videos
            keep = partial(self.recorder.keep_step, epoch=epoch, samples=samples, refusals=refusals)
            self.uploader.submit(partial(keep, state, history))

    def _save_epoch(self, row: EpochRow, history: Tensor) -> None:
        """Write the epoch and its checkpoint, and wait until it is there."""
        refusals = self._refusals()
        state = self.replica.snapshot(in_epoch=False, keep=self.rank == 0)
        self._write(lambda: self.recorder.keep_epoch(state, history, row, refusals))

    def _refusals(self) -> list[QuarantineRow]:
        """What no rank could read since the last call, on rank 0; all ranks must call it."""
        parts = [part for part in (self.train, self.val) if part is not None]
        mine = [refusal for part in parts for refusal in part.refusals]
        all_ranks: list[list[QuarantineRow]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(all_ranks, mine)
        for part in parts:
            part.refusals.clear()
        return [refusal for refusals in all_ranks for refusal in refusals]

    def _write(self, job: Callable[[], object]) -> None:
        """Do the job on rank 0 after what is under way there; all ranks wait for it."""

        def written() -> None:
            self.uploader.submit(job)
            self.uploader.wait()

        _from_first(written)


def _measured(mean: float) -> float | None:
    """None for the mean of nothing."""
    return None if math.isnan(mean) else mean


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


def _from_first(step: Callable[[], T]) -> T:
    """What the step gives on rank 0, the only one to take it, for all ranks; an error of it is raised on all."""
    found: list[T | KinorayError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = step()
        except KinorayError as error:
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], KinorayError):
        raise found[0]
    return found[0]  # type: ignore[return-value]
