"""Where a labelling's time goes: each stage is timed by how long the worker waits for it, and the longest one binds.

The same numbers go to Ray's Prometheus metrics, where Ray runs: `ray_kinoray_label_videos_total` by status,
`ray_kinoray_label_quarantined_total` by reason, `ray_kinoray_label_stage_seconds_total` by stage, and
`ray_kinoray_label_prefetched` of each worker; all by labelling.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from kinoray.label.unit import Times

__all__ = ["STAGES", "LabelMetrics", "Stage", "StageClock", "UnitTimes", "bound_stage"]

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

    def times(self, begin_s: float) -> Times:
        """Of a unit that was begun then, in seconds since 1970, with nothing timed before it."""
        return Times(
            worker=f"{socket.gethostname()}/{os.getpid()}",
            begin_s=begin_s,
            end_s=time.time(),
            store=self.seconds["store"],
            decode=self.seconds["decode"],
            model=self.seconds["model"],
        )

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


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTimes:
    """What a worker says of a unit that it has done."""

    counts: Mapping[str, int]
    """Videos by status."""
    reasons: Mapping[str, int]
    """Quarantined videos by error class."""
    seconds: Mapping[str, float]
    """What was waited for, by stage."""
    prefetched: float
    """Decoded videos that waited for the network, on average."""


class LabelMetrics:
    """What Ray's metrics say of a labelling; nothing where Ray does not run."""

    def __init__(self, labelling_id: str) -> None:
        import ray  # here, for whoever labels without it: importing ray.data takes seconds
        from ray.util.metrics import Counter, Gauge

        self._tags = {"labelling": labelling_id}
        self._runs = ray.is_initialized()
        if self._runs:
            self._videos = Counter(
                "kinoray_label_videos", "videos that got their row, by status", tag_keys=("labelling", "status")
            )
            self._refused = Counter(
                "kinoray_label_quarantined", "videos that were quarantined, by reason", tag_keys=("labelling", "reason")
            )
            self._stages = Counter(
                "kinoray_label_stage_seconds",
                "seconds that labelling workers waited, by stage",
                tag_keys=("labelling", "stage"),
            )
            self._depth = Gauge(
                "kinoray_label_prefetched",
                "decoded videos of a worker that wait for the network, mean over a unit",
                tag_keys=("labelling",),
            )

    def add(self, unit: UnitTimes) -> None:
        """Count a unit."""
        if not self._runs:
            return
        for counter, tag, values in (
            (self._videos, "status", unit.counts),
            (self._refused, "reason", unit.reasons),
            (self._stages, "stage", unit.seconds),
        ):
            for name, value in values.items():
                if value > 0:
                    counter.inc(value, tags={**self._tags, tag: name})
        self._depth.set(unit.prefetched, tags=self._tags)
