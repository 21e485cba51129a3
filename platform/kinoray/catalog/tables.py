"""Reading tables that people wrote as text: every list, annotation file and correction goes through here.

A record is a line. What is easy to break: nothing is repaired and nothing is guessed, since a guess loses rows or
classes in silence; what is odd is an error with its line, and the file is counted again from its bytes.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kinoray.errors import CatalogError

__all__ = [
    "Record",
    "TextTable",
    "cells_of",
    "decode_text",
    "parse_records",
    "parse_table_text",
    "text_lines",
    "unquoted",
]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINE_END = re.compile("\r\n|\n|\r")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a table."""

    line: int
    """Its number in the file, counted from 1."""
    cells: dict[str, str]
    """By the names of the columns; as they are written, with spaces."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table with a header."""

    columns: tuple[str, ...]
    """Their names in lower case, without spaces around them; "" for one without a name."""
    records: tuple[Record, ...]
    """All lines below the header that hold anything."""


def decode_text(uri: str, data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 with its mark (what Excel calls Unicode text).

    Raises:
        CatalogError: it is neither, or holds zero bytes; with the line.
    """
    is_utf16 = data.startswith(_UTF16)
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\n|\r", data[: error.start])) + 1
        odd = data[error.start : error.start + 1].hex()
        what = "UTF-16" if is_utf16 else "UTF-8"
        raise CatalogError(
            f"{uri} line {line} is not {what} text (byte 0x{odd}); save the file as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    if "\0" in text:
        line = len(_LINE_END.split(text[: text.index("\0")]))
        raise CatalogError(f"{uri} line {line} holds a zero byte, so it is damaged or no text; save it as UTF-8 again")
    return text


def text_lines(text: str) -> list[str]:
    """The lines of a text, whatever ends them; not cut where only Unicode sees the end of a line, as in a name."""
    lines = _LINE_END.split(text)
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def parse_table_text(uri: str, text: str, needed: Collection[str], remedy: str) -> TextTable:
    """The table of a text whose first line names its columns, one of `needed` among them.

    Cells are divided by commas, or by semicolons or tabs if that makes the header fit (or Excel's line sep=; says so).

    Raises:
        CatalogError: anything is odd; with the line, and `remedy` if the header does not fit.
    """
    lines = text_lines(text)
    start = next((index for index, line in enumerate(lines) if line.strip()), 0)
    delimiters: Sequence[str] = tuple(_DELIMITERS)
    said = re.fullmatch(r'"?sep=(.)"?[,;\t]*', lines[start], re.IGNORECASE)
    if said:
        if said[1] not in _DELIMITERS:
            raise CatalogError(f"{uri} line {start + 1}: cells divided by {said[1]!r} are not read; use commas")
        delimiters = said[1]
        start = next((index for index in range(start + 1, len(lines)) if lines[index].strip()), len(lines))
    head = lines[start] if start < len(lines) else ""
    names, delimiter = _header(f"{uri} line {start + 1}", head, delimiters, needed, remedy)
    records = parse_records(uri, lines, start + 1, names, delimiter)
    num_filled = sum(bool(re.search(rf'[^\s"{delimiter}]', line)) for line in lines[start + 1 :])
    if len(records) != num_filled:
        raise CatalogError(f"{uri}: {num_filled} lines below its header, but {len(records)} rows; please report it")
    return TextTable(names, tuple(records))


def parse_records(uri: str, lines: Sequence[str], start: int, names: Sequence[str], delimiter: str) -> list[Record]:
    """The lines from place `start` on as records; those without any text are left out.

    Raises:
        CatalogError: a quote is not closed, or a line has more or fewer cells than there are names; with the line.
    """
    records = []
    for number, line in enumerate(lines[start:], start + 1):
        where = f"{uri} line {number}"
        cells = cells_of(where, line, delimiter)
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(names):
            more = "more" if len(cells) > len(names) else "fewer"
            raise CatalogError(
                f"{where}: {len(cells)} cells are {more} than the {len(names)} columns ({','.join(names)}); put quotes "
                f"around a cell that holds {_DELIMITERS[delimiter]}, and leave no cell out"
            )
        records.append(Record(number, dict(zip(names, cells, strict=True))))
    return records


def cells_of(where: str, line: str, delimiter: str = ",") -> list[str]:
    """The cells of one line, as RFC 4180 has them.

    Raises:
        CatalogError: a quote is not closed in its line, or stands where none may.
    """
    if '"' not in line:
        return line.split(delimiter)
    cell = re.compile(rf'(?:"((?:[^"]|"")*)"|([^"{delimiter}]*))(?={delimiter}|\Z)')
    cells: list[str] = []
    position = 0
    while position <= len(line):
        match = cell.match(line, position)
        if match is None:
            shown = line[position : position + _SHOWN_CHARS]
            raise CatalogError(
                f"{where}, cell {len(cells) + 1}: a quote is not closed in its line, or stands inside a cell: "
                f'{shown!r}; write a quote that belongs to a cell twice, with quotes around the cell: "a ""b"" c"'
            )
        cells.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        position = match.end() + 1
    return cells


def unquoted(where: str, text: str) -> str:
    """A cell that stands alone, without the quotes around it. Raises CatalogError as `cells_of`."""
    return cells_of(where, text, "\n")[0]


def _header(
    where: str, head: str, delimiters: Sequence[str], needed: Collection[str], remedy: str
) -> tuple[tuple[str, ...], str]:
    """The names of the columns, and what divides them."""
    problem: CatalogError | None = None
    for delimiter in delimiters:
        try:
            names = tuple(name.strip().lower() for name in cells_of(where, head, delimiter))
        except CatalogError as error:
            problem = problem or error
            continue
        if set(needed) & set(names):
            _check_names(where, names, delimiter)
            return names, delimiter
    raise problem or CatalogError(f"{where}: {remedy}, found {head.strip()[:_SHOWN_CHARS]!r}")


def _check_names(where: str, names: Sequence[str], delimiter: str) -> None:
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise CatalogError(f"{where}: two columns are called {twice[0]!r}; rename or remove one of them")
    mixed = [name for name in names for other in _DELIMITERS if other != delimiter and other in name]
    if mixed:
        raise CatalogError(
            f"{where}: the column {mixed[0]!r} holds what may be meant to divide columns; divide all of them by commas"
        )
