"""`kinoray trace`: where a run's time went, from storage alone.

A labelling's commits say when each unit was begun and done, where, and what the worker waited for; a training's
metrics.jsonl says it of each epoch. Nothing else is kept for it.

Easy to break: clocks of several machines are compared here, so a unit may seem to begin before its job.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from kinoray.console import format_duration, many
from kinoray.errors import ChecksumMismatch, ConfigError, ObjectNotFound
from kinoray.label.table import Commit, Ledger, find_labellings
from kinoray.library.config import TraceConfig
from kinoray.library.spans import Span, bar_line, clock, covered_s, trace_events
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_lines

__all__ = ["label_spans", "trace", "train_spans"]

_SLOWEST = 5
_MAX_MOMENT_S = 2**35  # a thousand years after 1970
_STAGES = ("store", "decode", "model")  # of a unit; its commit is what ends it, so no commit can say how long it took


def trace(config: TraceConfig) -> list[Span]:
    """Print where the time went, write the spans to config.to, and return them.

    Raises:
        ConfigError: there is neither a labelling nor a run.
        StorageError: it cannot be read, or config.to cannot be written.
    """
    storage, place = Storage(config.storage), absolute(config.place)
    if storage.exists(join(place, "run.json")):
        spans = train_spans(storage, place)
        _print_training(place, spans)
    else:
        try:
            roots = find_labellings(storage, place)
        except ObjectNotFound:
            raise ConfigError(
                f"{place} holds neither a labelling (job.json) nor a training (run.json); give the --out of `kinoray "
                "label`, `evaluate` or `train`"
            ) from None
        spans = [span for root in roots for span in _trace_labelling(Ledger(storage, root))]
    if config.to:
        uri = absolute(config.to)
        storage.put(uri, json.dumps(trace_events(spans, place)).encode())
        print(f"trace: {len(spans)} spans are in {uri}; open it in https://ui.perfetto.dev")
    return spans


def label_spans(commits: Sequence[Commit]) -> list[Span]:
    """A span for each unit whose commit says when it was made, by begin."""
    spans = [_unit_span(commit, commit.times) for commit in commits if commit.times is not None]
    return sorted(spans, key=lambda span: (span.begin_s, span.worker))


def _unit_span(commit: Commit, times: dict[str, Any]) -> Span:
    try:
        found = {name: float(times[name]) for name in ("begin_s", "end_s", *_STAGES)}
        worker = str(times["worker"])
        if not all(0 <= seconds < _MAX_MOMENT_S for seconds in found.values()):
            raise ValueError("some are no times")
    except (ValueError, KeyError, TypeError) as error:
        raise ChecksumMismatch(f"the commit of unit {commit.unit_id} has times that are not ours: {error!r}") from error
    return Span(
        name=f"unit {commit.unit_id[:8]}",
        worker=worker,
        begin_s=found["begin_s"],
        end_s=found["end_s"],
        parts={stage: found[stage] for stage in _STAGES},
        about={"run": commit.run_id, "unit": commit.unit_id, **commit.counts},
    )


def _trace_labelling(ledger: Ledger) -> list[Span]:
    commits = list(ledger.commits())
    jobs = {str(job.get("run_id")): job for job in ledger.jobs()}
    spans = label_spans(commits)
    rows = sum(commit.rows for commit in commits)
    print(f"{ledger.root}: {rows} videos in {len(commits)} units")
    if len(spans) < len(commits):
        print(f"  {many(len(commits) - len(spans), 'unit')} committed without times")
    of_run = defaultdict(list)
    for span in spans:
        of_run[span.about["run"]].append(span)
    for run_id, found in sorted(of_run.items(), key=lambda item: item[1][0].begin_s):
        for line in _run_lines(run_id, found, jobs.get(run_id)):
            print(line)
    return spans


def _run_lines(run_id: str, spans: list[Span], job: dict[str, Any] | None) -> list[str]:
    """What is said of one run of a labelling."""
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
        lines.append("  it has no summary: it still runs, or was killed")
    else:
        try:
            lines.append(
                f"  {format_duration(float(job['wall_s']))} in all; its first unit began {_after(job, first_s)}"
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ChecksumMismatch(f"the summary of run {run_id} is not ours: {error!r}") from error
    lines.append(f"  of {len(workers)} x {format_duration(last_s - first_s)} from the first unit to the last:")
    lines += [bar_line(f"{stage}", waited[stage], whole_s) for stage in _STAGES]
    lines.append(bar_line("rest of the units", max(0.0, busy_s - sum(waited.values())), whole_s))
    lines.append(bar_line("between units", max(0.0, whole_s - busy_s), whole_s))
    lines.append("  slowest units:")
    for span in sorted(spans, key=lambda span: -span.seconds)[:_SLOWEST]:
        stage = max(_STAGES, key=lambda name: span.parts[name])
        share = span.parts[stage] / span.seconds if span.seconds > 0 else 0.0
        lines.append(f"    {span.about['unit']}  {span.seconds:.1f} s, {share:.0%} of it {stage}, on {span.worker}")
    return lines


def _after(job: dict[str, Any], first_s: float) -> str:
    began_s = datetime.fromisoformat(job["began"]).timestamp()
    return f"{format_duration(max(0.0, first_s - began_s))} after the job"


def train_spans(storage: Storage, out: str) -> list[Span]:
    """The epochs of a run: a span for training, with the seconds that rank 0 waited for decoders, and one for scoring.

    Raises:
        ChecksumMismatch: metrics.jsonl is not what train wrote.
    """
    uri, spans = join(out, "metrics.jsonl"), []
    try:
        rows = parse_lines(storage.read(uri, max_bytes=MAX_RECORD_BYTES), uri)
    except ObjectNotFound:
        return []  # no epoch is done
    try:
        for row in rows:
            if not 0 <= row["time_s"] < _MAX_MOMENT_S:
                raise ValueError(f"time_s is {row['time_s']!r:.40}")
            begin_s, train_s = row["time_s"] - row["epoch_s"], row.get("train_s", row["epoch_s"])
            parts = {"waiting for decoders": row["decode_wait"] * train_s}
            about = {"epoch": row["epoch"]}
            at_s = begin_s + train_s
            name = f"epoch {row['epoch']}"
            spans.append(
                Span(name=name, worker="training", begin_s=begin_s, end_s=at_s, parts=parts, about={**about, **row})
            )
            if "val_videos" in row:
                about["val_videos"] = row["val_videos"]
                spans.append(
                    Span(name=f"{name}, scoring", worker="training", begin_s=at_s, end_s=row["time_s"], about=about)
                )
    except (ValueError, KeyError, TypeError) as error:
        raise ChecksumMismatch(f"{uri} does not hold what kinoray wrote: {error!r}") from error
    return spans


def _print_training(place: str, spans: list[Span]) -> None:
    if not spans:
        print(f"{place}: no epoch is done yet")
        return
    epochs = [span for span in spans if span.parts]
    scoring_s = sum(span.seconds for span in spans if not span.parts)
    begin_s, end_s = spans[0].begin_s, spans[-1].end_s
    whole_s, train_s = end_s - begin_s, sum(span.seconds for span in epochs)
    wait_s = sum(span.parts["waiting for decoders"] for span in epochs)
    print(f"{place}: {len(epochs)} epochs, {clock(begin_s)} to {clock(end_s)}, {format_duration(whole_s)}")
    for name, seconds in (
        ("waiting for decoders", wait_s),
        ("training steps", train_s - wait_s),
        ("scoring", scoring_s),
        ("between epochs", whole_s - covered_s(spans)),
    ):
        print(bar_line(name, seconds, whole_s))
    slowest = max(epochs, key=lambda span: span.seconds)
    print(f"  slowest: {slowest.name} with {format_duration(slowest.seconds)}")
