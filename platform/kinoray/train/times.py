"""What Ray's metrics say of a training, by run (the name of its folder).

`ray_kinoray_train_videos_total`; `ray_kinoray_train_seconds_total` by stage (`decode`: a worker waited for clips,
`step`: the rest of its training, `score`); `ray_kinoray_train_unreadable_total` by reason; `ray_kinoray_train_score`
by name.
"""

from collections import Counter as Count
from collections.abc import Iterable, Mapping
from typing import Literal

import ray
from ray.util.metrics import Counter, Gauge

from kinoray.train.ingest import Unreadable

__all__ = ["TrainMetrics"]

_SCORES = ("loss", "top1", "lr", "val_loss", "val_top1", "val_top5")


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
        for reason, count in Count(item.error_class for item in unreadable).items():
            self._unreadable.inc(count, tags={**self._tags, "reason": reason})

    def spent(self, stage: Literal["decode", "step", "score"], seconds: float) -> None:
        """Count time."""
        if self._runs and seconds > 0:
            self._seconds.inc(seconds, tags={**self._tags, "stage": stage})

    def epoch(self, row: Mapping[str, float | int]) -> None:
        """Show the numbers of an epoch."""
        if self._runs:
            for name in _SCORES:
                if name in row:
                    self._score.set(float(row[name]), tags={**self._tags, "name": name})
