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
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, cast

from kinoray.errors import KinorayError

__all__ = [
    "Notes",
    "PlainStream",
    "Progress",
    "draw_step",
    "end_process",
    "ended_by_signals",
    "exact_stdout",
    "format_duration",
    "keep_native_messages",
    "kept_if_interrupted",
    "kept_messages",
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
_REDRAW_S = 0.2
_BAR = 20  # characters
_SURE_S = 2.0  # before which, and
_SURE_COUNT = 5  # items before which a rate is an accident


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`; `?` for what no clock has measured."""
    if not abs(seconds) < 2**40:
        return "?"
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
    hidden = {char for char in found if char in "\ufffe\uffff" or unicodedata.category(char) in _HIDING}
    return "".join(f"\\u{ord(char):04x}" if char in hidden else char for char in found)


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters; `...` where it was cut."""
    return text if len(text) <= most else text[: most - 3] + "..."


def table(
    rows: Iterable[Sequence[str]],
    *,
    head: Sequence[str] = (),
    right: Collection[int] = (),
    indent: str = "",
    fits: bool = False,
) -> list[str]:
    """Lines with columns of equal width, two spaces apart. Cells may hold other people's text: it is made visible.

    Args:
        rows: cells, as many in each row as there are columns.
        head: titles of the columns; none for "no such line".
        right: places of the columns that stand to the right, as numbers do.
        indent: what each line begins with.
        fits: on a terminal the widest texts are cut so that lines fit it; into a pipe or a file nothing is.
    """
    lines = [[visible(cell) for cell in row] for row in ([head] if head else [])]
    lines += [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if fits and sys.stdout.isatty():
        texts = [place for place in range(len(widths)) if place not in right]
        taken = len(indent) + 2 * (len(widths) - 1) + sum(widths[place] for place in right)
        room = shutil.get_terminal_size().columns - taken
        widest = max((widths[place] for place in texts), default=0)
        while widest > 16 and sum(min(widths[place], widest) for place in texts) > room:
            widest -= 1
        for place in texts:
            widths[place] = min(widths[place], widest)
        lines = [[cell if at in right else shortened(cell, widest) for at, cell in enumerate(line)] for line in lines]
    return [(indent + "  ".join(_padded(line, widths, right))).rstrip() for line in lines]


def _padded(cells: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    return [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


class _Screen:
    """The line of a terminal that is drawn over and over; a PlainStream takes it away before it writes another one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._stream: TextIO | None = None
        self._width = 0
        self._is_free = True

    def draw(self, stream: TextIO, line: str) -> None:
        """Show the line, as far as it fits, unless another one has been begun and not ended."""
        with self.lock:
            if not self._is_free:
                return
            line = shortened(visible(line), max(20, shutil.get_terminal_size().columns - 1))
            stream.write("\r" + line.ljust(self._width))
            stream.flush()
            self._stream, self._width = stream, len(line)

    def clear(self) -> None:
        """Take the line away."""
        with self.lock:
            if self._stream is not None:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()
                self._stream, self._width = None, 0

    def wrote(self, text: str) -> None:
        """Something else has been written to the terminal."""
        self._is_free = text.endswith("\n") if text else self._is_free


_screen = _Screen()


def _terminal(stream: TextIO) -> TextIO | None:
    """The terminal below a PlainStream. None: it is none, or others may write to it and would not clear the line."""
    is_one = isinstance(stream, PlainStream) and stream.isatty() and os.environ.get("TERM") != "dumb"
    return unfiltered(stream) if is_one else None


def draw_step(line: str) -> None:
    """On a terminal, a line that says what is waited for, until the next line is printed."""
    if terminal := _terminal(sys.stdout):
        _screen.draw(terminal, line)


class Progress:
    """Counts work: `label: 120/400 videos, 35.1/s, 8 s left, quarantined 3`, every few seconds in a log, and on a
    terminal as one line with a bar. With `is_for_eyes` a log has none of it, since it has other lines that say more.

    The first line comes with the first update, the last with `close`. Rates count from the first result on, so neither
    the start of the workers nor what was done before (pass that as `already`) is in them, and nothing is said of the
    time left before a few results; the last line has no rate where it would be an accident. Threads may share it.
    """

    def __init__(
        self,
        total: int,
        task: str,
        noun: str,
        *,
        already: int = 0,
        every_s: float = 5.0,
        stream: TextIO | None = None,
        is_for_eyes: bool = False,
    ) -> None:
        self._total = total
        self._task = task
        self._noun = noun
        self._already = already
        self._stream = stream or sys.stdout
        self._terminal = _terminal(self._stream)
        self._is_shown = self._terminal is not None or not is_for_eyes
        self._every_s = _REDRAW_S if self._terminal else every_s
        self._lock = threading.Lock()
        self._done = 0
        self._parts: dict[str, int] = {}
        self._whole: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._note = ""
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._last_print = -1e9
        if self._terminal:
            self._print()

    def update(self, done: int = 1, *, part: str = "", **counts: int) -> None:
        """Add finished items, and counts that are shown behind the rate (quarantined=1).

        Args:
            part: what `saw` was told of is these; it counts no more.
        """
        with self._lock:
            if part:
                self._whole.add(part)
                self._parts.pop(part, None)
            self._done += done
            self._counts.update(counts)
            self._tick()

    def saw(self, part: str, done: int) -> None:
        """So many items of a part are done so far; a part that is begun again may have fewer than before."""
        with self._lock:
            if part not in self._whole:
                self._parts[part] = done
                self._tick()

    def tick(self) -> None:
        """Time has passed: on a terminal, say so."""
        if self._terminal:
            with self._lock:
                self._tick()

    def note(self, text: str) -> None:
        """Words at the end of each line from now on."""
        self._note = text

    def close(self) -> None:
        """Print the last line, with the time taken."""
        with self._lock:
            self._print(final=True)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._first is None and self._count() > 0:
            self._first = now, self._count()
        if self._is_shown and now - self._last_print >= self._every_s:
            self._print()

    def _count(self) -> int:
        """Items that are done, but for those before this job."""
        return min(self._total - self._already, self._done + sum(self._parts.values()))

    def _print(self, *, final: bool = False) -> None:
        now = self._last_print = time.monotonic()
        done = self._count()
        count = f"{self._already + done:,}/{self._total:,} {self._noun}"
        parts = [f"{self._task}: {count}"]
        if final:
            rate = self._rate(now, done)
            parts += [*([f"{rate:.1f}/s"] if rate else []), f"took {format_duration(now - self._start)}"]
        elif rate := self._rate(now, done):
            left_s = (self._total - self._already - done) / rate
            parts += [f"{rate:.1f}/s", f"{format_duration(left_s)} left"]
        elif self._terminal:
            parts += [f"{format_duration(now - self._start)} so far"]
        parts += [f"{name} {n:,}{' this run' * bool(self._already)}" for name, n in sorted(self._counts.items()) if n]
        parts.extend([self._note] if self._note else [])
        if self._terminal and not final:
            full = round(_BAR * (self._already + done) / max(1, self._total))
            parts[0] = f"{self._task}: [{'#' * full}{'-' * (_BAR - full)}] {count}"
            _screen.draw(self._terminal, ", ".join(parts))
        else:
            print(", ".join(parts), file=self._stream, flush=True)

    def _rate(self, now: float, done: int) -> float:
        """Items a second since the first result; 0 while they are too few to say."""
        if self._first is None:
            return 0.0
        first_s, before = self._first
        is_enough = now - first_s >= _SURE_S and done - before >= _SURE_COUNT
        return (done - before) / (now - first_s) if is_enough else 0.0


class Notes:
    """What workers tell the driver, until it asks: an actor. Here, since its process imports this module and no more.

    Lines are for people; counts are how much of a part of the work is done so far.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts: dict[str, int] = {}
        self._place = ""

    def settle(self, place: str) -> None:
        """The placement group of the workers."""
        self._place = place

    def place(self) -> str:
        """What `settle` was told."""
        return self._place

    def post(self, line: str) -> None:
        """A line to print."""
        self._lines.append(line)

    def tell(self, part: str, count: int) -> None:
        """So much of a part is done."""
        self._counts[part] = count

    def take(self) -> tuple[list[str], dict[str, int]]:
        """What came since the last time."""
        taken = self._lines, self._counts
        self._lines, self._counts = [], {}
        return taken


class PlainStream:
    """A text stream whose lines are `visible`; everything but writing is the other stream's."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write with all but line ends and tabs spelled out; the length of what was asked for."""
        parts = _LINE_ENDS.split(text)
        with _screen.lock:
            _screen.clear()
            self.stream.write("".join(part if index % 2 else visible(part) for index, part in enumerate(parts)))
            if _terminal(cast(TextIO, self)):
                _screen.wrote(text)
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
        _screen.clear()
        sys.stdout, sys.stderr = saved


def unfiltered(stream: TextIO) -> TextIO:
    """The stream below a PlainStream; another one itself."""
    return stream.stream if isinstance(stream, PlainStream) else stream


def exact_stdout() -> TextIO:
    """stdout for data: exact in a pipe or a file, `visible` on a terminal."""
    return sys.stdout if sys.stdout.isatty() else unfiltered(sys.stdout)


def print_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """As sys.excepthook: an error that nobody foresaw may hold a stranger's text, too."""
    lines = traceback.format_exception(kind, error, at)
    if path := kept_messages():
        lines.append(f"what Ray said meanwhile is in {path}\n")
    print("".join(lines), end="", file=PlainStream(unfiltered(sys.stderr)))


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


_native: list[TextIO] = []  # file descriptor 2 as a stream, where this process is a command's
_kept: list[Path] = []


def _own_stderr() -> None:
    """Give Python's stderr a descriptor of its own, so that native code's can be turned into a file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or none
        if sys.stderr.fileno() == 2:
            _native.append(open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False))  # noqa: SIM115
            own = open(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)  # noqa: SIM115
            sys.stderr = own


def keep_native_messages(path: Path) -> TextIO | None:
    """In a command's own process, what native code writes to stderr goes to this file from now on; the same as a
    stream. `kept_messages` names the file. None where the process is somebody else's.
    """
    if not _native:
        return None
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    _kept[:] = [path]
    return _native[0]


def kept_messages() -> str:
    """Where messages were kept, if there are any."""
    return next((str(path) for path in _kept if path.exists() and path.stat().st_size), "")


@contextlib.contextmanager
def kept_if_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C within it says what is kept; the outermost has the last word only where no inner one had it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        draw_step("interrupted; looking what is kept")
        try:
            said = kept()
        except KinorayError as error:
            said = f"what is kept cannot be read now: {error}"
        raise KeyboardInterrupt(said) from None


def end_process(run: Callable[[], int]) -> NoReturn:
    """End this process with what `run` returns, when all that waits for its end has had its turn.

    Python itself would now take the interpreter apart while threads of native libraries are at work. One of Arrow's
    that gives back memory then, which happens after a command that was short, aborts the process.
    """
    code = 1
    _own_stderr()
    try:
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  (as Python ends a program)
        sys.excepthook(*cast(Any, sys.exc_info()))
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _end_now)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it was closed
            stream.flush()
    os._exit(code)


def _end_now(number: int, _: FrameType | None) -> NoReturn:
    """Ctrl-C once more: what was started is ended by who watches over it (kinoray.storage.leftovers)."""
    os._exit(128 + number)


_EVENTS = logging.getLogger("kinoray.events")
_EVENTS.addHandler(logging.NullHandler())  # else Python prints warnings that no handler takes


def log_event(what: str, ids: Mapping[str, str | int | float], *, bad: bool = False) -> None:
    """Log something that happened in a job; `ids` (run, unit, video) become fields of the record. `bad`: as a warning.

    `resources.logs json` makes Ray write these records as JSON. Without that nobody hears them: a job's output stays
    what people read.
    """
    _EVENTS.log(logging.WARNING if bad else logging.INFO, what, extra=ids)
