"""What reaches a terminal: text that only shows. Names of videos and classes, and decoders' errors, are strangers'.

Easy to break: a stream that is data for another program (CSV in a pipe) must keep every value as it is; it asks for
`exact_stdout`.
"""

import contextlib
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO, cast

__all__ = ["PlainStream", "exact_stdout", "plain_streams", "print_traceback", "unfiltered", "visible"]

_HIDING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_LINE_ENDS = re.compile("(\r?\n|\t)")


def visible(text: object) -> str:
    """Text with characters that hide or reorder it (control, format and direction marks) spelled out as `\\u202e`."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(char if unicodedata.category(char) not in _HIDING else f"\\u{ord(char):04x}" for char in found)


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
