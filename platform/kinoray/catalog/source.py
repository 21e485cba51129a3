"""Finding the files that a user means: everything below a folder or prefix, or the rows of a CSV; and the tables that
people write as text, since every list, annotation file and correction goes through here.

Nothing is left out here, whatever it is called: each file is listed with whether it is a video. A name that is found is
data: it never becomes a path to write to. What is easy to break: of a text nothing is repaired and nothing is guessed,
since a guess loses rows or classes in silence; what is odd is an error with its line, and the file is counted again
from its bytes. A record is a line.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from kinoray.catalog.folders import (
    HEAD_BYTES,
    SkippedFolders,
    class_name,
    class_names,
    doubt_of_labels,
    extension,
    is_other,
    is_video,
    is_video_head,
    split_named,
)
from kinoray.catalog.read import stat_size
from kinoray.config.files import foreign, local_path, local_uri
from kinoray.console import shortened, visible
from kinoray.errors import (
    BadCredentials,
    CatalogError,
    IncompleteOutput,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, absolute, is_s3, join

__all__ = [
    "UNLABELLED_SPLITS",
    "Judgement",
    "News",
    "Record",
    "SourceFile",
    "TextTable",
    "cells_of",
    "check_names",
    "decode_text",
    "find_files",
    "is_unknown",
    "parse_records",
    "parse_table_text",
    "text_lines",
    "unquoted",
    "warn",
]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINE_END = re.compile("\r\n|\n|\r")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_CHARS = 80
_SHOWN_NAMES = 200  # characters of the names of all columns


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
    num_filled = sum(not _is_bare(line, delimiter) for line in lines[start + 1 :])
    if len(records) != num_filled:
        raise CatalogError(f"{uri}: {num_filled} lines below its header, but {len(records)} rows; please report it")
    return TextTable(names, tuple(records))


def parse_records(uri: str, lines: Sequence[str], start: int, names: Sequence[str], delimiter: str) -> list[Record]:
    """The lines from place `start` on as records; those without any text are left out.

    Raises:
        CatalogError: a quote is not closed, or a line has more or fewer cells than there are names; with the line.
    """
    records = []
    shown = shortened(",".join(names), _SHOWN_NAMES)
    for number, line in enumerate(lines[start:], start + 1):
        where = f"{uri} line {number}"
        cells = cells_of(where, line, delimiter)
        if not any(cell.strip() for cell in cells):
            continue
        if _is_bare(line, delimiter):
            raise CatalogError(
                f"{where}: its cells hold quotes and {_DELIMITERS[delimiter]} alone; name something in it"
            )
        if len(cells) != len(names):
            more = "more" if len(cells) > len(names) else "fewer"
            raise CatalogError(
                f"{where}: {len(cells)} cells are {more} than the {len(names)} columns ({shown}); put quotes "
                f"around a cell that holds {_DELIMITERS[delimiter]}, and leave no cell out"
            )
        records.append(Record(number, dict(zip(names, cells, strict=True))))
    return records


def _is_bare(line: str, delimiter: str) -> bool:
    """Whether a line holds nothing but what divides and quotes cells."""
    return re.search(rf'[^\s"{delimiter}]', line) is None


def cells_of(where: str, line: str, delimiter: str = ",") -> list[str]:
    """The cells of one line, as RFC 4180 has them.

    Raises:
        CatalogError: a quote is not closed in its line, or stands where none may.
    """
    if '"' not in line:
        return line.split(delimiter)
    cell = re.compile(rf'(?:"((?:[^"]++|"")*+)"|([^"{delimiter}]*))(?={delimiter}|\Z)')  # possessive: no memory
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
            check_names(where, names)
            _refuse_mixed(where, names, delimiter)
            return names, delimiter
    raise problem or CatalogError(f"{where}: {remedy}, found {head.strip()[:_SHOWN_CHARS]!r}")


def check_names(where: str, names: Sequence[str]) -> None:
    """Refuse names of columns of which one would stand for another, or be taken for none since it looks like one.

    Raises:
        CatalogError: two are equal, or one holds characters that do not show.
    """
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if name and count > 1]
        if twice:
            raise CatalogError(f"{where}: two columns are called {twice[0]!r:.80}; rename or remove one of them")
    hidden = [name for name in names if visible(name) != name]
    if hidden:
        raise CatalogError(f"{where}: the column {hidden[0]!a:.80} holds characters that do not show; rename it")


def _refuse_mixed(where: str, names: Sequence[str], delimiter: str) -> None:
    mixed = [name for name in names for other in _DELIMITERS if other != delimiter and other in name]
    if mixed:
        raise CatalogError(
            f"{where}: the column {mixed[0]!r:.80} holds what may be meant to divide columns; divide all of them by "
            "commas"
        )


_STAT_THREADS = 16
_MAX_LOOKS = 400  # at files of one ending
_MAX_COUNTED = 100_000  # endings that are counted; where there are more of them, they are none
_OTHER = "/"  # stands for all endings that are rare; none holds it
_MAX_ENDINGS = 20  # that are looked at by themselves: digests behind a dot are no endings
UNLABELLED_SPLITS = frozenset({"test", "holdout", "unlabelled"})
"""Splits whose videos may have no label."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a source names."""

    name: str
    """Path below the source, or as the CSV has it; unique in a source."""
    uri: str
    """Absolute address; of a name that is not UTF-8 percent-encoded, so that it can be written to a table."""
    size_bytes: int
    """Size in the listing; 0 if the file is not there, or cannot be looked at; -1 where an inventory does not tell."""
    label: str | None = None
    """Class name, from a CSV."""
    labels: tuple[str, ...] | None = None
    """All its classes, from a CSV whose column is called labels; perhaps none."""
    split: str | None = None
    """Split, from a CSV; `Validation` is called `val`, and so on."""
    is_video: bool = True
    """Whether it is one by its name, or where that does not say by its first bytes; what a CSV names always is."""


class News(str):
    """What is said though nothing is wrong."""

    __slots__ = ()


def warn(text: str) -> None:
    """Say on stderr what was left out, and why, in one line: stdout may be a table."""
    head = "" if isinstance(text, News) else "WARNING: "
    print(f"{head}{visible(text)}", file=sys.stderr, flush=True)


def find_files(storage: Storage, source: str, *, say: Callable[[str], None] = warn) -> list[SourceFile]:
    """All files of a folder or s3:// prefix at any depth, or of a .csv (columns path or uri, label?, split?), by name.

    A list whose videos may have several classes has the column labels instead of label: `red|round`.

    The address of a video stands for that video. Paths in a CSV are relative to its folder, absolute, ~/, file:// or
    s3://. A folder that is empty gives an empty list. Folders that cannot be listed are left out and told to `say`.

    A file whose name does not say what it is (another ending, or none) is a video if its first bytes are. Of an ending
    that very many files have, some are looked at: if any of those is a video, so are all the others.

    Raises:
        CatalogError: the CSV lacks a column or a path, names a file twice, or is no CSV; with the line.
        ObjectNotFound: no such CSV, folder or bucket.
    """
    if source.lower().endswith(".csv"):
        return _read_csv(storage, source, say)
    prefix = local_path(absolute(source)).rstrip("/") + "/"
    skipped = SkippedFolders()
    infos = sorted(storage.list_unsorted(prefix, skipped=skipped.add), key=lambda info: info.uri)
    files = [SourceFile(info.uri[len(prefix) :], local_uri(info.uri), info.size_bytes) for info in infos]
    skipped.tell(source, say)
    if files:
        judgement = Judgement()
        for file in files:
            judgement.count(file.name)
        judgement.look(storage, source, (file for file in files if is_unknown(file.name)), say)
        return [file if judgement.is_video(file.name) else replace(file, is_video=False) for file in files]
    name = source.rstrip("/").rpartition("/")[2]
    if is_s3(source):
        is_one = not source.endswith("/") and "/" in source.removeprefix("s3://") and storage.exists(source)
    else:
        is_one = not os.path.isdir(local_path(source))
    if not is_one:
        return files
    uri = absolute(source)
    if not is_s3(uri) and not os.path.lexists(local_path(uri)):
        raise ObjectNotFound(f"{source}: no such folder or video")
    file = SourceFile(name, uri, storage.stat(uri).size_bytes)
    if is_other(name) or not (is_video(name) or _is_video_inside(storage, file)):
        raise CatalogError(
            f"{source} is a file, and no video; expected a folder or s3:// prefix of videos, one video, a .csv, a "
            ".parquet, or the manifest.json of an S3 Inventory"
        )
    return [file]


def is_unknown(name: str) -> bool:
    """Whether a name does not say if a file is a video."""
    return not is_video(name) and not is_other(name)


class Judgement:
    """Which files of a source are videos: by their names, or where those do not say it by the first bytes of some.

    All names are counted first; then `look` reads a bounded number of files; then `is_video` knows. It holds what it
    looked at, and how many files each ending has, but no list of files.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._frequent: tuple[str, ...] = ()
        self._looked: dict[str, bool] = {}
        self._rest: dict[str, bool] = {}  # by group: whether those are videos that were not looked at

    def count(self, name: str) -> None:
        """Take note of a file; in any order."""
        if is_unknown(name):
            ending = extension(name)
            is_counted = ending in self._counts or len(self._counts) < _MAX_COUNTED
            self._counts[ending if is_counted else _OTHER] += 1

    def look(self, storage: Storage, source: str, files: Iterable[SourceFile], say: Callable[[str], None]) -> None:
        """Look at some of the files that were counted: all whose names say nothing come, in the order of their names.

        `say` is told where some speak for the others.
        """
        if not self._counts:
            return
        endings = sorted(self._counts.keys() - {_OTHER}, key=lambda ending: (-self._counts[ending], ending))
        self._frequent = tuple(endings[:_MAX_ENDINGS])
        sizes = {ending: self._counts[ending] for ending in self._frequent}
        sizes[_OTHER] = self._counts.total() - sum(sizes.values())
        seen: Counter[str] = Counter()
        chosen: dict[str, list[SourceFile]] = {group: [] for group in sizes}
        for file in files:
            group = self._group(file.name)
            if seen[group] % (-(-sizes[group] // _MAX_LOOKS) or 1) == 0:
                chosen[group].append(file)
            seen[group] += 1
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            for group, looked in chosen.items():
                found = list(pool.map(partial(_is_video_inside, storage), looked))
                self._looked.update((file.name, is_one) for file, is_one in zip(looked, found, strict=True))
                self._rest[group] = any(found)
                if len(looked) < sizes[group]:
                    what = f"{group} files" if group else "files without an ending"
                    say(
                        f"{source}: of {sizes[group]} {'files of other endings' if group == _OTHER else what} "
                        f"{len(looked)} were looked at and {sum(found)} of them are videos, so the others are taken "
                        f"for {'videos, too' if any(found) else 'none'}; to choose, list them in a .csv"
                    )

    def is_video(self, name: str) -> bool:
        """Whether a file is one."""
        if is_video(name):
            return True
        if is_other(name):
            return False
        looked = self._looked.get(name)
        return self._rest.get(self._group(name), False) if looked is None else looked

    def _group(self, name: str) -> str:
        ending = extension(name)
        return ending if ending in self._frequent else _OTHER


def _is_video_inside(storage: Storage, file: SourceFile) -> bool:
    """Whether its first bytes are those of a video; what cannot be read counts as one: its reader will say why."""
    try:
        size_bytes = storage.stat(file.uri).size_bytes if file.size_bytes < 0 else file.size_bytes
        return is_video_head(storage.read_range(file.uri, 0, min(size_bytes, HEAD_BYTES)))
    except (StorageUnavailable, BadCredentials):
        raise
    except StorageError:
        return True


def _read_csv(storage: Storage, source: str, say: Callable[[str], None]) -> list[SourceFile]:
    table = parse_table_text(
        source,
        decode_text(source, storage.read(source, max_bytes=MAX_TABLE_BYTES)),
        ("path", "uri"),
        "there is no column path: the first line must be path,label[,split]",
    )
    column = "path" if "path" in table.columns else "uri"
    if {"label", "labels"} <= set(table.columns):
        raise CatalogError(
            f"{source} line 1: there are the columns label and labels; keep label where each video has one class, "
            "labels (red|round) where it may have several"
        )
    folder = absolute(source).rpartition("/")[0]
    files: dict[str, SourceFile] = {}
    for record in table.records:
        where = f"{source} line {record.line}"
        name = record.cells[column].strip()
        if not name:
            raise CatalogError(f"{where}: the path is empty")
        split = record.cells.get("split", "").strip() or None
        file = SourceFile(
            name=name,
            uri=_uri_of(folder, name),
            size_bytes=0,
            label=class_name(record.cells.get("label", "").strip(), where) or None,
            labels=class_names(record.cells.get("labels", ""), where),
            split=split_named(split) or split if split else None,
        )
        if file.uri in files:
            raise CatalogError(f"{where}: {name} is listed twice; a video can have one row only")
        files[file.uri] = file
    has_lists = "labels" in table.columns
    cells = [record.cells.get("labels" if has_lists else "label", "") for record in table.records]
    if doubt := doubt_of_labels(cells, several=has_lists):
        say(f"{source}: {doubt}")
    if len(files) != len(table.records):
        raise IncompleteOutput(f"{source}: {len(table.records)} rows, but {len(files)} videos; please report it")
    return sorted(_with_sizes(storage, list(files.values())), key=lambda file: file.name)


def _uri_of(folder: str, name: str) -> str:
    """The address of what a CSV calls `name`."""
    if is_s3(name) or foreign(name):
        return name  # its reader says that there is no such store
    path = os.path.expanduser(local_path(name))
    return local_uri(path if path.startswith("/") else absolute(join(folder, path)))


def _with_sizes(storage: Storage, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Ask for each file's size, in threads; what cannot be looked at stays in the list, and its reader will say why."""
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        sizes = list(pool.map(lambda file: stat_size(storage, file.uri), files))
    return [replace(file, size_bytes=size_bytes) for file, size_bytes in zip(files, sizes, strict=True)]
