"""How a training run gets on: lines to read, every few seconds inside an epoch and one after it; and Ray's metrics.

`ray_kinoray_train_videos_total`; `ray_kinoray_train_seconds_total` by stage (`decode`: a worker waited for clips,
`step`: the rest of its training, `score`); `ray_kinoray_train_unreadable_total` by reason; `ray_kinoray_train_score`
by name. All by run (the name of its folder).
"""

import time
from collections import Counter as Count
from collections.abc import Iterable
from typing import Literal

import ray
from ray.util.metrics import Counter, Gauge

from kinoray.config.shared import OptimConfig
from kinoray.console import format_duration
from kinoray.train.input import Unreadable
from kinoray.train.runfolder import EpochRow
from kinoray.train.step import Replica

__all__ = ["Pace", "TrainMetrics", "epoch_line"]

_PROGRESS_S = 5.0
_SCORES = ("loss", "top1", "lr", "val_loss", "val_top1", "val_top5")


class Pace:
    """Measures from its making on, at `first_step` of epochs of `num_steps` each."""

    def __init__(self, optim: OptimConfig, num_steps: int, first_step: int) -> None:
        self._optim = optim
        self._num_steps = optim.epochs * num_steps
        self._first_step = first_step
        self._start_s = time.monotonic()
        self._said_s = self._start_s

    def line(self, replica: Replica, epoch: int, step: int) -> str:
        """What to say after so many steps in all; empty where it was said just now."""
        now = time.monotonic()
        if now - self._said_s < _PROGRESS_S:
            return ""
        self._said_s = now
        totals = replica.totals()
        done = step - self._first_step
        left_s = (now - self._start_s) / done * (self._num_steps - step)  # evaluations so far are in it
        rate = done * self._optim.batch_size / (now - self._start_s)
        parts = [f"train: epoch {epoch}/{self._optim.epochs}, step {step}/{self._num_steps}"]
        parts += [f"loss {totals.loss:.3f}"] if totals.videos else []
        parts += [f"{rate:.1f} videos/s", f"{format_duration(left_s)} left"]
        parts += [f"unreadable {totals.unreadable}"] if totals.unreadable else []
        return ", ".join(parts)


def epoch_line(row: EpochRow, epochs: int) -> str:
    """An epoch as a sentence."""
    parts = [f"train: epoch {row.epoch}/{epochs} done in {format_duration(row.epoch_s)}"]
    parts.append(f"loss {_shown(row.loss)}, top-1 {_shown(row.top1)}")
    if row.val_videos is not None:
        numbers = f"loss {_shown(row.val_loss)}, top-1 {_shown(row.val_top1)}, top-5 {_shown(row.val_top5)}"
        parts.append(f"val {numbers} ({row.val_videos} videos)")
    parts.append(f"{row.videos_per_s:.1f} videos/s, {row.decode_wait:.0%} of it waiting for decoders")
    bad = row.unreadable + (row.val_unreadable or 0)
    if bad:
        parts.append(f"unreadable {bad}")
    return "; ".join(parts)


def _shown(mean: float | None) -> str:
    return "nan" if mean is None else f"{mean:.3f}"


class TrainMetrics:
    """Counters of one worker; nothing where Ray does not run."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._runs = ray.is_initialized()
        if self._runs:
            self._videos = Counter("kinoray_train_videos", "videos that were trained on", tag_keys=("run",))
            self._unreadable = Counter(
                "kinoray_train_unreadable", "videos that gave no clip, by reason", tag_keys=("run", "reason")
            )
            self._seconds = Counter(
                "kinoray_train_seconds", "seconds of training workers, by stage", tag_keys=("run", "stage")
            )
            self._score = Gauge("kinoray_train_score", "numbers of the last epoch, by name", tag_keys=("run", "name"))

    def step(self, videos: int, unreadable: Iterable[Unreadable]) -> None:
        """Count a step."""
        if not self._runs:
            return
        if videos:
            self._videos.inc(videos, tags=self._tags)
        for reason, count in Count(item.refusal.error_class for item in unreadable).items():
            self._unreadable.inc(count, tags={**self._tags, "reason": reason})

    def spent(self, stage: Literal["decode", "step", "score"], seconds: float) -> None:
        """Count time."""
        if self._runs and seconds > 0:
            self._seconds.inc(seconds, tags={**self._tags, "stage": stage})

    def epoch(self, row: EpochRow) -> None:
        """Show the numbers of an epoch."""
        if not self._runs:
            return
        for name in _SCORES:
            value = getattr(row, name)
            if value is not None:
                self._score.set(float(value), tags={**self._tags, "name": name})
