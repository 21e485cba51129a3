"""Spans of time, what they sum up to, and their form for a trace viewer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kinoray.console import format_duration

__all__ = ["Span", "bar_line", "clock", "covered_s", "trace_events"]

_BAR = 30


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
