"""The parts of a checkup: each says what it found as numbers, as lines to read, and as warnings with a remedy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Section", "Warn", "format_bytes", "many", "spread", "table"]


@dataclass(frozen=True, slots=True)
class Warn:
    """Something that a user should know before a job is started."""

    found: str
    """What was found, with numbers."""
    remedy: str
    """What to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What one check found."""

    name: str
    """Its key in doctor.json."""
    values: dict[str, Any]
    """The numbers, as JSON."""
    lines: tuple[str, ...] = ()
    """The same for people."""
    warnings: tuple[Warn, ...] = ()
    """What needs attention."""


def many(count: int, noun: str) -> str:
    """`1 video`, `2,000 videos`, `3 classes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def format_bytes(size_bytes: float) -> str:
    """`123 B`, `4.6 MB`, `7.8 TB`: decimal, as stores bill it."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Count, minimum, median, mean, 95th percentile, maximum and sum; of nothing: only the count."""
    if not len(values):
        return {"count": 0}
    array = np.asarray(values, np.float64)
    low, median, p95, high = np.percentile(array, [0, 50, 95, 100])
    numbers = {"min": low, "median": median, "mean": array.mean(), "p95": p95, "max": high, "sum": array.sum()}
    return {"count": len(array), **{name: float(number) for name, number in numbers.items()}}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in [head, *rows])
    ]
