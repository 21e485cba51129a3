"""What verbs print: progress of long work and tables, as plain lines that read the same on a terminal and in a log."""

import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TextIO

__all__ = ["Progress", "format_duration", "many", "table"]


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def many(count: int, noun: str) -> str:
    """`1 video`, `2,000 videos`, `3 classes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def table(
    rows: Iterable[Sequence[str]], *, head: Sequence[str] = (), right: Collection[int] = (), indent: str = ""
) -> list[str]:
    """Lines with columns of equal width, two spaces apart.

    Args:
        rows: cells, as many in each row as there are columns.
        head: titles of the columns; none for "no such line".
        right: places of the columns that stand to the right, as numbers do.
        indent: what each line begins with.
    """
    lines = [list(row) for row in rows]
    if head:
        lines.insert(0, list(head))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [(indent + "  ".join(_padded(line, widths, right))).rstrip() for line in lines]


def _padded(cells: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    return [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


class Progress:
    """Counts work and prints `label: 120/400 videos, 35.1/s, 8 s left, quarantined 3` every few seconds.

    The first line comes with the first update, the last with `close`. Rates are over the work seen here, so a resumed
    job does not claim the speed of what was done before (pass that as `already`).
    """

    def __init__(
        self, total: int, task: str, noun: str, *, already: int = 0, every_s: float = 5.0, stream: TextIO | None = None
    ) -> None:
        self._total, self._task, self._noun, self._already = total, task, noun, already
        self._every_s, self._stream = every_s, stream or sys.stdout
        self._done = 0
        self._counts: Counter[str] = Counter()
        self._note = ""
        self._start = time.monotonic()
        self._last_print = -1e9

    def update(self, done: int = 1, **counts: int) -> None:
        """Add finished items, and counts that are shown behind the rate (quarantined=1)."""
        self._done += done
        self._counts.update(counts)
        if time.monotonic() - self._last_print >= self._every_s:
            self._print()

    def note(self, text: str) -> None:
        """Words at the end of each line from now on."""
        self._note = text

    def close(self) -> None:
        """Print the last line, with the time taken."""
        self._print(final=True)

    def _print(self, *, final: bool = False) -> None:
        now = time.monotonic()
        self._last_print = now
        elapsed = max(now - self._start, 1e-9)
        rate = self._done / elapsed
        parts = [f"{self._task}: {self._already + self._done}/{self._total} {self._noun}", f"{rate:.1f}/s"]
        if final:
            parts.append(f"took {format_duration(elapsed)}")
        elif rate > 0:
            parts.append(f"{format_duration((self._total - self._already - self._done) / rate)} left")
        parts.extend(f"{name} {count}" for name, count in sorted(self._counts.items()) if count)
        parts.extend([self._note] if self._note else [])
        print(", ".join(parts), file=self._stream, flush=True)
