"""One trial of a sweep: `kinoray train` on a run folder of its own, in the form that Ray Tune drives.

Tune sees an epoch a step. The run waits after each epoch until Tune has decided, so a trial that is stopped ends where
it was judged and leaves a whole checkpoint. Nothing of Tune's own is needed to go on: a trial that is started again
shows the epochs in its metrics.jsonl once more and trains on from its newest checkpoint.

    OUT/trials/ID/trial.json       its settings; for a run that continues another's checkpoint, where it came from
    OUT/trials/ID/outcome.json     how it ended, once it has
    OUT/trials/ID-g1, -g2, ...     PBT: what the trial trains after each exchange
"""

import json
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from kinoray.catalog.table import load_catalog
from kinoray.errors import CheckpointNotFound, KinorayError
from kinoray.network.checkpoint import (
    CheckpointMeta,
    choose_checkpoint,
    list_checkpoints,
    load_model_state,
    load_train_state,
    save_checkpoint,
)
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_record, read_record
from kinoray.train.config import TrainConfig
from kinoray.train.gate import Gate, Row
from kinoray.train.runfolder import checkpoint_uri, claim_run, read_metrics, run_digest
from kinoray.train.verb import train
from kinoray.tune.space import Settings, apply

__all__ = ["METRIC", "TrialContext", "TrialRun", "copy_checkpoint", "generations", "trial_run"]

METRIC = "val_top1"
"""What trials are compared by: the accuracy on val_split after an epoch; higher is better."""


@dataclass(frozen=True, slots=True)
class TrialContext:
    """What all trials of a sweep share."""

    base: TrainConfig
    """Settings that are not searched; out is the sweep's."""
    desk: Any
    """The sweep's Desk."""
    interval: int
    """PBT: epochs that a trial trains at a time, handing its place on in between; 0 to train without a break."""


def trial_run(out: str, name: str, generation: int = 0) -> str:
    """Run folder of a trial."""
    return join(out, "trials", f"{name}-g{generation}" if generation else name)


def generations(storage: Storage, out: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(run folder, content of trial.json) of what the trial has trained, in order; several after PBT exchanges."""
    found: list[tuple[str, dict[str, Any]]] = []
    while True:
        run = trial_run(out, name, len(found))
        if not storage.exists(join(run, "trial.json")):
            return found
        found.append((run, read_record(storage, join(run, "trial.json"), dict)))


class TrialRun(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """What Tune calls; `config["choice"]` holds trial (its id), settings, and ended: whether it is only shown again."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Take up the trial's newest run folder, or begin its first one."""
        self._context, self._store = context, Storage(context.base.storage)
        self._gate = Gate(context.desk, self.trial_name)
        self._gate.take_over()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._epoch, self._best = 0, 0.0
        known = generations(self._store, context.base.out, self.trial_name)
        if known:
            self._open(len(known) - 1, known[-1][1]["settings"])
        else:
            self._open(0, dict(config["choice"]["settings"]))
            self._describe({})

    def _open(self, generation: int, settings: Settings) -> None:
        """Make this run folder the one that is trained, and get ready to show its epochs again."""
        out = self._context.base.out
        self._generation, self._settings = generation, settings
        config = replace(apply(self._context.base, settings), out=trial_run(out, self.trial_name, generation))
        if self._context.interval:  # what another trial may still want to copy
            config = replace(config, keep_checkpoints=max(config.keep_checkpoints, self._context.interval + 1))
        self._config = config
        whole = list_checkpoints(self._store, config.out)
        rows = [row for row in read_metrics(self._store, config.out) if whole and row["epoch"] <= whole[-1][1].epoch]
        self._replay: deque[Row] = deque(rows[-1:] if self._context.interval else rows)

    def _describe(self, origin: dict[str, Any]) -> None:
        """Write trial.json; without it the folder does not count."""
        text = json.dumps({"trial": self.trial_name, "settings": self._settings, **origin}, indent=1)
        self._store.put(join(self._config.out, "trial.json"), text.encode())

    def step(self) -> dict[str, Any]:
        """The next epoch (PBT: the last of the next `interval`) as a result for Tune."""
        if self._replay:
            result = self._result(self._replay.popleft()) | {"replayed": True}
            is_over = self.config["choice"].get("ended", False) and not self._replay
            return result | {"done": result["done"] or is_over}
        interval = self._context.interval
        if interval:
            self._gate.enter()
        try:
            while (row := self._next_row()) is not None:
                at_end = int(row["epoch"]) >= self._config.optim.epochs
                if at_end or not interval or int(row["epoch"]) % interval == 0:
                    return self._result(row)
        finally:
            if interval:
                self._end_training()
                self._gate.leave()
        return self._after_end()

    def _next_row(self) -> Row | None:
        """Train until the next epoch that was not shown yet; None when the run ended by itself."""
        if self._thread is None:
            self._gate.begin()
            self._error = None
            self._thread = threading.Thread(target=self._train, name="train", daemon=True)
            self._thread.start()
        else:
            self._gate.answer(True)
        while (row := self._gate.take()) is not None and int(row["epoch"]) <= self._epoch:
            self._gate.answer(True)  # trained again, after workers died
        return row

    def _train(self) -> None:
        try:
            train(self._config, self._gate)
        except BaseException as error:  # noqa: BLE001  (raised again by step)
            self._error = error
        finally:
            self._gate.end()

    def _result(self, row: Row) -> dict[str, Any]:
        self._epoch = int(row["epoch"])
        value = float(row.get(METRIC, 0.0))  # absent where no video of val_split could be read
        self._best = max(self._best, value)
        is_last = self._epoch >= self._config.optim.epochs
        return {"epoch": self._epoch, METRIC: value, "best": self._best, "done": is_last}

    def _after_end(self) -> dict[str, Any]:
        """The run ended without a new epoch: it failed, or there was nothing left to train."""
        self._end_training()
        if self._error is not None and not isinstance(self._error, KinorayError):
            raise self._error
        result: dict[str, Any] = {"epoch": self._epoch, METRIC: self._best, "best": self._best, "done": True}
        if self._error is not None:
            text = " ".join(str(self._error).split())
            result |= {"error_class": type(self._error).__name__, "error_text": text}
        return result

    def _end_training(self) -> None:
        """End the run after the epoch it is in, if one is going on; its workers and their CPUs are free afterwards."""
        if self._thread is not None:
            self._gate.answer(False)
            self._thread.join()
            self._thread = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Say where the real checkpoint is: PBT hands this on to the trial that exploits it."""
        state = {"run": self._config.out, "epoch": self._epoch, "settings": self._settings}
        (Path(checkpoint_dir) / "trial.json").write_text(json.dumps(state))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from another trial's checkpoint with this trial's new settings; nothing to do for its own."""
        path = Path(checkpoint) / "trial.json"
        state = parse_record(path.read_bytes(), str(path), dict)
        if state["run"] == self._config.out:
            return
        run = trial_run(self._context.base.out, self.trial_name, self._generation + 1)
        for info in list(self._store.list(f"{run}/")):  # what a kill left of an earlier exchange
            self._store.delete(info.uri)
        self._open(self._generation + 1, dict(self.config["choice"]["settings"]))
        self._epoch = copy_checkpoint(self._store, state["run"], int(state["epoch"]), self._config)
        self._describe({"from_run": state["run"], "from_epoch": self._epoch})

    def cleanup(self) -> None:
        """Called when the trial is over, stopped or paused."""
        self._end_training()


def copy_checkpoint(storage: Storage, source: str, epoch: int, config: TrainConfig) -> int:
    """Put the checkpoint of `source` after `epoch` epochs where the run of `config` goes on from it; returns its epoch.

    If that one is gone, the newest whole epoch is taken.

    Raises:
        CheckpointNotFound: there is none.
        ConfigError: config.out holds a run with other settings.
    """
    catalog = load_catalog(storage, config.catalog)
    claim_run(storage, config, catalog)

    def order(found: list[tuple[str, CheckpointMeta]]) -> list[tuple[str, CheckpointMeta]]:
        first_of_epoch = {item[1].epoch: item for item in reversed(found)}
        return [first_of_epoch[key] for key in sorted(first_of_epoch, key=lambda key: (key != epoch, -key))]

    chosen = choose_checkpoint(storage, source, order, resumable=True)
    if chosen is None:
        raise CheckpointNotFound(f"{source} has no whole checkpoint to go on from")
    uri, meta = chosen
    save_checkpoint(
        storage,
        checkpoint_uri(config.out, meta.epoch, meta.step),
        model_state=load_model_state(storage, uri),
        train_state=load_train_state(storage, uri),
        meta=replace(meta, run_digest=run_digest(config, catalog), clip=config.clip, model=config.model),
    )
    return meta.epoch
