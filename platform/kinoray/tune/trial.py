"""One trial of a sweep: `kinoray train` on a run folder of its own, in the form that Ray Tune drives.

Tune sees an epoch a step. The run waits after each epoch until Tune has decided, so a trial that is stopped ends where
it was judged and leaves a whole checkpoint. Nothing of Tune's own is needed to go on: a trial that is started again
shows the epochs in its metrics.jsonl once more and trains on from its newest checkpoint.

    OUT/trials/ID/trial.json       its settings
    OUT/trials/ID/outcome.json     how it ended, once it has
"""

import json
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from ray import tune

from kinoray.errors import KinorayError
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.job import Gate
from kinoray.train.runfolder import EpochRow, RunFolder
from kinoray.train.verb import train
from kinoray.tune.space import apply

__all__ = ["METRIC", "TrialContext", "TrialRun", "trial_run"]

METRIC = "val_top1"
"""What trials are compared by: the accuracy on val_split after an epoch; higher is better."""


@dataclass(frozen=True, slots=True)
class TrialContext:
    """What all trials of a sweep share."""

    base: TrainConfig
    """Settings that are not searched; out is the sweep's."""
    desk: Any
    """The sweep's Desk."""


def trial_run(out: str, name: str) -> str:
    """Run folder of a trial."""
    return join(out, "trials", name)


class TrialRun(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """What Tune calls; `config["choice"]` holds trial (its id), settings, and ended: whether it is only shown again."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Take up the trial's run folder, or begin it."""
        self._store = Storage(context.base.storage)
        self._gate = Gate(context.desk, self.trial_name)
        self._gate.take_over()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._epoch = 0
        self._best = 0.0
        settings = dict(config["choice"]["settings"])
        self._config = replace(apply(context.base, settings), out=trial_run(context.base.out, self.trial_name))
        folder = RunFolder(self._store, self._config.out)
        whole = folder.checkpoints()
        rows = [row for row in folder.epochs() if whole and row.epoch <= whole[-1][1].epoch]
        self._replay: deque[EpochRow] = deque(rows)
        about = join(self._config.out, "trial.json")
        if not self._store.exists(about):  # without it the folder does not count
            self._store.put(about, json.dumps({"trial": self.trial_name, "settings": settings}, indent=1).encode())

    def step(self) -> dict[str, Any]:
        """The next epoch as a result for Tune."""
        if self._replay:
            result = self._result(self._replay.popleft()) | {"replayed": True}
            is_over = self.config["choice"].get("ended", False) and not self._replay
            return result | {"done": result["done"] or is_over}
        row = self._next_row()
        return self._after_end() if row is None else self._result(row)

    def _next_row(self) -> EpochRow | None:
        """Train until the next epoch that was not shown yet; None when the run ended by itself."""
        if self._thread is None:
            self._gate.begin()
            self._error = None
            self._thread = threading.Thread(target=self._train, name="train", daemon=True)
            self._thread.start()
        else:
            self._gate.answer(True)
        while (row := self._gate.take()) is not None and row.epoch <= self._epoch:
            self._gate.answer(True)  # trained again, after workers died
        return row

    def _train(self) -> None:
        try:
            train(self._config, self._gate)
        except BaseException as error:  # noqa: BLE001  (raised again by step)
            self._error = error
        finally:
            self._gate.end()

    def _result(self, row: EpochRow) -> dict[str, Any]:
        self._epoch = row.epoch
        value = row.val_top1 or 0.0  # None where no video of val_split could be read
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
        """Nothing: the checkpoints are in the run folder."""

    def load_checkpoint(self, checkpoint: str) -> None:
        """Nothing, as above."""

    def cleanup(self) -> None:
        """Called when the trial is over, stopped or paused."""
        self._end_training()
