"""Where a labelling's time goes: each stage is timed by how long the worker waits for it, and the longest one binds.

The same numbers go to Ray's Prometheus metrics, where Ray runs: `ray_kinoray_label_videos_total` by status and
`ray_kinoray_label_stage_seconds_total` by stage, both by labelling.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import ray
from ray.util.metrics import Counter

__all__ = ["STAGES", "LabelMetrics", "Stage", "StageClock", "bound_stage"]

Stage = Literal["store", "decode", "model", "commit"]
STAGES: tuple[Stage, ...] = ("store", "decode", "model", "commit")
"""What a worker may wait for: the store's answer, a decoder, the network, the commit of a unit."""


class StageClock:
    """Adds up seconds by stage. A stage that is timed inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inner_s = 0.0

    @contextmanager
    def timing(self, stage: Stage) -> Iterator[None]:
        """Time what is inside."""
        outer_inner_s, self._inner_s = self._inner_s, 0.0
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            whole_s = time.perf_counter() - begin_s
            self.seconds[stage] += whole_s - self._inner_s
            self._inner_s = outer_inner_s + whole_s

    def take(self) -> dict[str, float]:
        """The seconds since the last call, of every stage."""
        seconds, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return {stage: seconds[stage] for stage in STAGES}


def bound_stage(seconds: Mapping[str, float]) -> str:
    """`decode 81%`: the stage that is waited for most, with its share; empty where nothing was timed."""
    total = sum(seconds.values())
    if total <= 0:
        return ""
    stage = max(STAGES, key=lambda name: seconds.get(name, 0.0))
    return f"{stage} {seconds.get(stage, 0.0) / total:.0%}"


class LabelMetrics:
    """Counters in Ray's metrics; nothing where Ray does not run."""

    def __init__(self, labelling_id: str) -> None:
        self._videos: Counter | None = None
        self._stages: Counter | None = None
        if ray.is_initialized():
            tags = {"labelling": labelling_id}
            self._videos = Counter(
                "kinoray_label_videos", "videos that got their row, by status", tag_keys=("labelling", "status")
            )
            self._videos.set_default_tags(tags)
            self._stages = Counter(
                "kinoray_label_stage_seconds",
                "seconds that labelling workers waited, by stage",
                tag_keys=("labelling", "stage"),
            )
            self._stages.set_default_tags(tags)

    def add(self, counts: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Count a unit's rows by status and its seconds by stage."""
        if self._videos is None or self._stages is None:
            return
        for status, count in counts.items():
            if count:
                self._videos.inc(count, tags={"status": status})
        for stage, spent_s in seconds.items():
            if spent_s > 0:
                self._stages.inc(spent_s, tags={"stage": stage})
