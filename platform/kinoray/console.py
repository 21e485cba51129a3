"""What verbs print, and workers log: progress, tables, text that only shows, events.

Output reads the same on a terminal and in a log. Names of videos and classes, and decoders' errors, are strangers'.
Easy to break: a stream that is data for another program (CSV in a pipe) must keep every value as it is; it asks for
`exact_stdout`.
"""

import atexit
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, cast

__all__ = [
    "PlainStream",
    "Progress",
    "end_process",
    "ended_by_signals",
    "exact_stdout",
    "format_duration",
    "log_event",
    "many",
    "plain_streams",
    "print_traceback",
    "shortened",
    "table",
    "unfiltered",
    "visible",
]

_HIDING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_LINE_ENDS = re.compile("(\r?\n|\t)")


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


def visible(text: object) -> str:
    """Text with characters that hide or reorder it (control, format and direction marks) spelled out as `\\u202e`."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(char if unicodedata.category(char) not in _HIDING else f"\\u{ord(char):04x}" for char in found)


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters; `...` where it was cut."""
    return text if len(text) <= most else text[: most - 3] + "..."


def table(
    rows: Iterable[Sequence[str]], *, head: Sequence[str] = (), right: Collection[int] = (), indent: str = ""
) -> list[str]:
    """Lines with columns of equal width, two spaces apart. Cells may hold other people's text: it is made visible.

    Args:
        rows: cells, as many in each row as there are columns.
        head: titles of the columns; none for "no such line".
        right: places of the columns that stand to the right, as numbers do.
        indent: what each line begins with.
    """
    lines = [[visible(cell) for cell in row] for row in ([head] if head else [])]
    lines += [[visible(cell) for cell in row] for row in rows]
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
        self._total = total
        self._task = task
        self._noun = noun
        self._already = already
        self._every_s = every_s
        self._stream = stream or sys.stdout
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


class PlainStream:
    """A text stream whose lines are `visible`; everything but writing is the other stream's."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write with all but line ends and tabs spelled out; the length of what was asked for."""
        parts = _LINE_ENDS.split(text)
        self.stream.write("".join(part if index % 2 else visible(part) for index, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """`write` each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def plain_streams() -> Iterator[None]:
    """Within it, stdout and stderr are PlainStreams."""
    saved = sys.stdout, sys.stderr
    plain = cast(TextIO, PlainStream(unfiltered(sys.stdout))), cast(TextIO, PlainStream(unfiltered(sys.stderr)))
    sys.stdout, sys.stderr = plain
    try:
        yield
    finally:
        sys.stdout, sys.stderr = saved


def unfiltered(stream: TextIO) -> TextIO:
    """The stream below a PlainStream; another one itself."""
    return stream.stream if isinstance(stream, PlainStream) else stream


def exact_stdout() -> TextIO:
    """stdout for data: exact in a pipe or a file, `visible` on a terminal."""
    return sys.stdout if sys.stdout.isatty() else unfiltered(sys.stdout)


def print_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """As sys.excepthook: an error that nobody foresaw may hold a stranger's text, too."""
    print("".join(traceback.format_exception(kind, error, at)), end="", file=PlainStream(unfiltered(sys.stderr)))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and a terminal that closes, end a command as Ctrl-C does: what it has opened is closed, in order."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is end:  # else it is Ray's by now
                signal.signal(number, signal.SIG_DFL)


def end_process(run: Callable[[], int]) -> NoReturn:
    """End this process with what `run` returns, when all that waits for its end has had its turn.

    Python itself would now take the interpreter apart while threads of native libraries are at work. One of Arrow's
    that gives back memory then, which happens after a command that was short, aborts the process.
    """
    code = 1
    try:
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  (as Python ends a program)
        sys.excepthook(*cast(Any, sys.exc_info()))
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it was closed
            stream.flush()
    os._exit(code)


_EVENTS = logging.getLogger("kinoray.events")
_EVENTS.addHandler(logging.NullHandler())  # else Python prints warnings that no handler takes


def log_event(what: str, ids: Mapping[str, str | int | float], *, bad: bool = False) -> None:
    """Log something that happened in a job; `ids` (run, unit, video) become fields of the record. `bad`: as a warning.

    `resources.logs json` makes Ray write these records as JSON. Without that nobody hears them: a job's output stays
    what people read.
    """
    _EVENTS.log(logging.WARNING if bad else logging.INFO, what, extra=ids)
