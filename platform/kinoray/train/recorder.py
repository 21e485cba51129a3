"""What rank 0 writes while a run goes on: checkpoints after epochs and inside them, losses, metrics, refusals, curves.

Every method is one job of the uploader. Easy to break: checkpoint.json comes last, so that whatever a resumed run will
not do again is in the run folder already.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kinoray.catalog.quarantine import Refusal
from kinoray.catalog.table import Catalog
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.curves import draw_curves
from kinoray.train.recipe import learning_rate
from kinoray.train.runfolder import (
    add_refusals,
    checkpoint_uri,
    prune_checkpoints,
    run_digest,
    write_losses,
    write_metrics,
)
from kinoray.train.state import Snapshot

__all__ = ["Recorder"]

_CURVES_S = 60.0  # drawing costs half a second: not after each of many short epochs


class Recorder:
    """Writes to config.out; `num_steps` is the number of steps of an epoch."""

    def __init__(self, storage: Storage, config: TrainConfig, catalog: Catalog, num_steps: int) -> None:
        self._storage, self._config, self._num_steps = storage, config, num_steps
        self._meta = CheckpointMeta(
            model=config.model,
            clip=config.clip,
            labels=catalog.labels,
            epoch=0,
            step=0,
            samples=0,
            catalog_digest=catalog.digest,
            run_digest=run_digest(config, catalog),
        )
        self._drawn_s = time.monotonic()

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Note videos that could not be read."""
        add_refusals(self._storage, self._config.out, refusals)

    def keep_step(
        self, state: Snapshot, history: Tensor, *, epoch: int, samples: int, refusals: Sequence[Refusal]
    ) -> None:
        """Make the run resumable inside `epoch`, after the steps in history (Replica.history)."""
        self.refuse(refusals)
        write_losses(self._storage, self._config.out, epoch, self._loss_rows(epoch, history))
        done = len(history)
        step = (epoch - 1) * self._num_steps + done
        self._save(state, epoch=epoch - 1, epoch_steps=done, step=step, samples=samples)

    def keep_epoch(
        self, state: Snapshot, history: Tensor, row: Mapping[str, float | int], refusals: Sequence[Refusal]
    ) -> None:
        """Write a finished epoch; a kill before its end costs the epoch's result, and the next try replaces it."""
        self.refuse(refusals)
        epoch = int(row["epoch"])
        losses = self._loss_rows(epoch, history)
        write_losses(self._storage, self._config.out, epoch, losses)
        write_metrics(self._storage, self._config.out, row, losses)
        metrics = {name: float(value) for name, value in row.items()}
        self._save(state, epoch=epoch, step=int(row["step"]), samples=int(row["samples"]), metrics=metrics)
        if time.monotonic() - self._drawn_s > _CURVES_S:
            draw_curves(self._storage, self._config.out)
            self._drawn_s = time.monotonic()

    def _save(self, state: Snapshot, **changes: object) -> None:
        meta = replace(self._meta, **changes)  # type: ignore[arg-type]
        uri = checkpoint_uri(self._config.out, meta.epoch, meta.step)
        save_checkpoint(self._storage, uri, model_state=state.weights, meta=meta, train_state=state.train)
        prune_checkpoints(
            self._storage,
            self._config.out,
            self._config.keep_checkpoints,
            keep_best=self._config.keep_best,
            written=(meta.epoch, meta.step),
        )

    def _loss_rows(self, epoch: int, history: Tensor) -> list[dict[str, float | int]]:
        """A row a step: what it was trained on and what came out; no loss where no video could be read."""
        optim, rows = self._config.optim, []
        for index, (videos, unreadable, loss_sum, _, _) in enumerate(history.tolist()):
            step = (epoch - 1) * self._num_steps + index
            row: dict[str, float | int] = {"epoch": epoch, "step": step + 1, "videos": int(videos)}
            row |= {"unreadable": int(unreadable), "lr": learning_rate(optim, step, optim.epochs * self._num_steps)}
            rows.append(row | ({"loss": loss_sum / videos} if videos else {}))
        return rows
