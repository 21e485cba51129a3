"""Where a labelling's time goes: each stage is timed by how long the worker waits for it, and the longest one binds.

The same numbers go to Ray's Prometheus metrics, where Ray runs: `ray_kinoray_label_videos_total` by status,
`ray_kinoray_label_quarantined_total` by reason, `ray_kinoray_label_stage_seconds_total` by stage, and
`ray_kinoray_label_prefetched` of each worker; all by labelling.
"""

import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from kinoray.catalog.source import warn
from kinoray.console import format_duration, many, visible
from kinoray.label.ledger import Ledger, find_labellings
from kinoray.label.unit import Commit, JobEnd, Times
from kinoray.storage.objects import Storage, absolute

__all__ = [
    "STAGES",
    "LabelMetrics",
    "Span",
    "Stage",
    "StageClock",
    "UnitTimes",
    "bar_line",
    "bound_stage",
    "clock",
    "covered_s",
    "label_spans",
    "summarise",
    "trace_events",
]

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


# Spans of time, as a table or for a trace viewer


_BAR = 30  # characters
_SLOWEST = 5
_STAGES = ("store", "decode", "model")  # of a unit; its commit is what ends it, so no commit can say how long it took


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something that took time, on one worker."""

    name: str
    worker: str
    begin_s: float
    """In seconds since 1970."""
    end_s: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of it by stage; what is left of it is `rest`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else a viewer shows."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s


def clock(time_s: float) -> str:
    """Date and time of day, UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def bar_line(name: str, seconds: float, whole_s: float) -> str:
    """`decode   12 min 05 s  71 %  #####################`."""
    share = seconds / whole_s if whole_s > 0 else 0.0
    return f"    {name:<22}{format_duration(seconds):>12} {share:>5.0%}  {'#' * round(min(share, 2.0) * _BAR)}".rstrip()


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was open."""
    total, end_s = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin_s):
        total += max(0.0, span.end_s - max(span.begin_s, end_s))
        end_s = max(end_s, span.end_s)
    return total


def trace_events(spans: Sequence[Span], process: str) -> dict[str, Any]:
    """The spans in the Trace Event Format, a row for each worker; parts follow each other from a span's begin."""
    rows = {worker: number for number, worker in enumerate(sorted({span.worker for span in spans}), start=1)}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": process}}]
    for worker, row in rows.items():
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": worker}})
    for span in spans:
        place = {"ph": "X", "pid": 1, "tid": rows[span.worker]}
        about = {**span.about, **{f"{name}_s": round(seconds, 4) for name, seconds in span.parts.items()}}
        events.append({**place, "name": span.name, "ts": _us(span.begin_s), "dur": _us(span.seconds), "args": about})
        begin_s = span.begin_s
        for name, seconds in span.parts.items():
            events.append({**place, "name": name, "ts": _us(begin_s), "dur": _us(seconds), "args": {}})
            begin_s += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def summarise(storage: Storage, place: str, to: str = "") -> list[Span]:
    """Print where the time of each run of the labellings in `place` went; the spans of their units, also written to
    `to` for a trace viewer.

    Raises:
        ObjectNotFound: there is no labelling.
        StorageError: it cannot be read, or `to` cannot be written.
    """
    spans = [span for root in find_labellings(storage, place) for span in _labelling(Ledger(storage, root))]
    if to:
        storage.put(absolute(to), json.dumps(trace_events(spans, place)).encode())
        print(f"labels: {many(len(spans), 'span')} in {absolute(to)}; open it in https://ui.perfetto.dev")
    return spans


def label_spans(commits: Sequence[Commit]) -> list[Span]:
    """A span for each unit whose commit says when it was made, by begin."""
    spans = [
        Span(
            name=f"unit {commit.unit_id[:8]}",
            worker=times.worker,
            begin_s=times.begin_s,
            end_s=times.end_s,
            parts={"store": times.store, "decode": times.decode, "model": times.model},
            about={"run": commit.run_id, "unit": commit.unit_id, **commit.counts},
        )
        for commit in commits
        if (times := commit.times) is not None
    ]
    return sorted(spans, key=lambda span: (span.begin_s, span.worker))


def _labelling(ledger: Ledger) -> list[Span]:
    commits = list(ledger.commits())
    jobs = {job.run_id: job for job in ledger.jobs(warn)}
    spans = label_spans(commits)
    rows = sum(commit.rows for commit in commits)
    print(f"{ledger.root}: {many(rows, 'video')} in {many(len(commits), 'unit')}")
    if len(spans) < len(commits):
        print(f"  {many(len(commits) - len(spans), 'unit')} committed without times")
    of_run = defaultdict(list)
    for span in spans:
        of_run[span.about["run"]].append(span)
    for run_id, found in sorted(of_run.items(), key=lambda item: item[1][0].begin_s):
        is_old = any(job.began_s > found[-1].begin_s for job in jobs.values())
        for line in _run_lines(run_id, found, jobs.get(run_id), is_old=is_old):
            print(visible(line))
    return spans


def _run_lines(run_id: str, spans: list[Span], job: JobEnd | None, *, is_old: bool) -> list[str]:
    """What is said of one run of a labelling; is_old: a later one has ended."""
    workers = sorted({span.worker for span in spans})
    nodes = {worker.rpartition("/")[0] for worker in workers}
    first_s, last_s = min(span.begin_s for span in spans), max(span.end_s for span in spans)
    own_s = {worker: covered_s(span for span in spans if span.worker == worker) for worker in workers}
    whole_s, busy_s = (last_s - first_s) * len(workers), sum(own_s.values())
    waited = Counter[str]()
    for span in spans:
        waited.update(span.parts)
    lines = [
        f"run {run_id}: {many(len(spans), 'unit')} by {many(len(workers), 'worker')} on {many(len(nodes), 'node')}, "
        f"{clock(first_s)} to {clock(last_s)}"
    ]
    if job is None:
        why = "it was killed, or failed" if is_old else "it still runs, was killed, or failed"
        lines.append(f"  it has no summary: {why}")
    else:
        after = format_duration(max(0.0, first_s - job.began_s))
        lines.append(f"  {format_duration(job.wall_s)} in all; its first unit began {after} after the job")
    lines.append(f"  of {len(workers)} x {format_duration(last_s - first_s)} from the first unit to the last:")
    lines += [bar_line(f"{stage}", waited[stage], whole_s) for stage in _STAGES]
    lines.append(bar_line("other (start-up, rows)", max(0.0, busy_s - sum(waited.values())), whole_s))
    lines.append(bar_line("between units", max(0.0, whole_s - busy_s), whole_s))
    lines.append("  slowest units:")
    for span in sorted(spans, key=lambda span: -span.seconds)[:_SLOWEST]:
        stage = max(_STAGES, key=lambda name: span.parts[name])
        share = span.parts[stage] / span.seconds if span.seconds > 0 else 0.0
        lines.append(f"    {span.about['unit']}  {span.seconds:.1f} s, {share:.0%} of it {stage}, on {span.worker}")
    return lines
