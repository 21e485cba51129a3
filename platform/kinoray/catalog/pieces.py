"""The rows of a catalog, and a stream of those that lie in Parquet files: a few at a time are in memory.

What is easy to break: whoever labels a library reads its catalog several times and calls rows by their number, so a
stream gives the same rows in the same order each time. And the digest names the content, not the files, so it must not
depend on how Parquet encodes it, or on how it is cut.
"""

import os
import re
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray.catalog.rows import CATALOG_SCHEMA, OF_FEW_VALUES, _labels_of, check_rows, no_split, schema_with, splits_in
from kinoray.config.files import local_path, local_uri
from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.tables import TableFile

__all__ = ["Pieces", "find_pieces", "is_pieces", "lies_inside"]


_OPEN_THREADS = 8
_MAX_OPENED = 4  # files that stay open
_SMALL_GROUP_ROWS = 32  # a row group of fewer is read with its neighbours, since each takes 5 ms
_JOINED_GROUPS = 64
_GLOB = re.compile(r"[*?\[]")

T = TypeVar("T")


class Pieces:
    """The rows of Parquet files, one file after the other. Columns that they lack are null.

    Addresses that are not absolute start at their table's folder.

    Raises:
        StorageError: one cannot be read.
        CatalogError: one is no catalog; or, while rows are read, holds what no catalog may.
    """

    def __init__(self, storage: Storage, uris: Sequence[str], *, root: str = "") -> None:
        """`root`: rows may only refer to what lies inside of this folder; "" where they may refer to anything."""
        self._storage, self._root, self._uris = storage, root, list(uris)
        self._origin: tuple[Pieces, str] | None = None
        """Whose rows of which split these are."""
        self._opened: dict[int, TableFile] = {}
        self.labels: tuple[str, ...] = ()
        self._spans = array("q")
        """Of each stretch of row groups that are read at once: number of the file, first group, number of groups."""
        self._starts = array("q", [0])
        """The first row of each stretch, and how many rows there are."""
        self._file_starts = array("q")
        with ThreadPoolExecutor(_OPEN_THREADS, thread_name_prefix="open") as pool:  # on S3 each is two requests
            for number, (file, labels, stretches) in enumerate(
                _in_turn(pool, partial(_looked_at, storage), self._uris)
            ):
                if number and labels != self.labels:
                    raise CatalogError(
                        f"{self._uris[number]} names other classes than {self._uris[0]}; in one catalog all are alike"
                    )
                self.labels = labels
                if len(self._uris) <= _MAX_OPENED:
                    self._opened[number] = file
                self._file_starts.append(self._starts[-1])
                for group, count, num_rows in stretches:
                    self._spans.extend((number, group, count))
                    self._starts.append(self._starts[-1] + num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> str:
        """As of `Rows`."""
        if self._origin is not None:
            rows, split = self._origin
            begin = 0
            for table in rows.batches():
                places = pc.indices_nonzero(pc.fill_null(pc.equal(table.column("split"), split), False))
                if row < len(places):
                    return rows.where(begin + places[row].as_py())
                row -= len(places)
                begin += table.num_rows
        number = bisect_right(self._file_starts, row) - 1
        return f"{self._uris[number]} row {row - self._file_starts[number]}"

    def batches(self, begin: int = 0) -> Iterator[pa.Table]:
        """As of `Rows`."""
        for place in range(max(0, bisect_right(self._starts, begin) - 1), len(self._starts) - 1):
            row = self._starts[place]
            number, group, count = self._spans[3 * place : 3 * place + 3]
            for table in self._read(number, group, count, row):
                skipped = max(0, begin - row)
                row += table.num_rows
                if skipped < table.num_rows:
                    yield table.slice(skipped)

    def _file(self, number: int) -> TableFile:
        """A file; one that was not among the last few is opened again, since each takes 0.1 MB."""
        if number not in self._opened:
            while len(self._opened) >= _MAX_OPENED:
                self._opened.pop(next(iter(self._opened)))
            uri = self._uris[number]
            file = _opened(self._storage, uri)
            begin = self._file_starts[number]
            end = (*self._file_starts[number + 1 : number + 2], len(self))[0]
            if file.num_rows != end - begin:
                raise CatalogError(f"{uri} has changed while the catalog was read; start again")
            self._opened[number] = file
        return self._opened[number]

    def _read(self, number: int, group: int, count: int, begin: int) -> Iterator[pa.Table]:
        file = self._file(number)
        known = set(file.schema.names)
        columns = [name for name in CATALOG_SCHEMA.names if name in known]
        row = begin - self._file_starts[number]
        try:
            for found in file.batches(group, columns, count=count):
                table = _normal(found, file.uri, row)
                check_rows(table, len(self.labels))
                self._require_inside(file.uri, row, table)
                row += table.num_rows
                yield table
        except (pa.ArrowException, CatalogError) as error:
            known_uri = str(error).startswith(file.uri)
            raise CatalogError(str(error) if known_uri else f"{file.uri}: {error}") from error

    def _require_inside(self, path: str, begin: int, table: pa.Table) -> None:
        """Raise CatalogError for a row whose bytes lie outside of the folder of its table, also by way of a link."""
        if not self._root:
            return
        uris = table.column("uri")
        for uri in uris.unique().to_pylist():
            if not lies_inside(self._root, uri):
                row = pc.index(uris, uri).as_py()
                raise CatalogError(
                    f"{path} row {begin + row} ({table.column('video_id')[row].as_py()}) refers to {uri}, which lies "
                    f"outside of {self._root}; if you trust this table, name it itself: {path}"
                )

    def select(self, split: str, folder: Path) -> "Pieces":
        """The rows of one split, copied into a file in a folder; all for "". Raises CatalogError: there is none."""
        if not split:
            if not len(self):
                raise CatalogError("the catalog is empty: it has no video at all")
            return self
        counts: Counter[str] = Counter()
        path = folder / "split.parquet"
        with pq.ParquetWriter(
            path, schema_with(self.labels), compression="zstd", use_dictionary=list(OF_FEW_VALUES)
        ) as writer:
            for table in self.batches():
                counts.update(splits_in(table))
                chosen = table.filter(pc.fill_null(pc.equal(table.column("split"), split), False))
                writer.write_table(chosen.replace_schema_metadata(writer.schema.metadata))
        if not counts[split]:
            raise no_split(split, counts)
        chosen_rows = Pieces(Storage(), [str(path)])
        chosen_rows._origin = self, split
        return chosen_rows


def _opened(storage: Storage, uri: str) -> TableFile:
    try:
        return TableFile(storage, uri)
    except (pa.ArrowException, ValueError) as error:
        raise CatalogError(f"{uri} is not a catalog: {' '.join(str(error).split())}") from error


def _looked_at(storage: Storage, uri: str) -> tuple[TableFile, tuple[str, ...], list[tuple[int, int, int]]]:
    """A file, the names of its classes, and (first row group, number of groups, rows) of what is read at once."""
    file = _opened(storage, uri)
    try:
        labels = _labels_of(file.schema)
    except ValueError as error:
        raise CatalogError(f"{uri} is not a catalog: {error}") from error
    missing = {"video_id", "uri"} - set(file.schema.names)
    if missing:
        remedy = (
            "; a file of an S3 Inventory? name its manifest.json" if {"bucket", "key"} <= set(file.schema.names) else ""
        )
        lacking = " and ".join(sorted(missing))
        raise CatalogError(f"{uri} lacks the column {lacking}; found {file.schema.names}{remedy}")
    stretches: list[tuple[int, int, int]] = []
    for group, num_rows in enumerate(file.group_rows):
        if stretches and max(num_rows, stretches[-1][2] // stretches[-1][1]) < _SMALL_GROUP_ROWS:
            first, count, before = stretches[-1]
            if count < _JOINED_GROUPS:
                stretches[-1] = (first, count + 1, before + num_rows)
                continue
        stretches.append((group, 1, num_rows))
    return file, labels, stretches


def _in_turn(pool: ThreadPoolExecutor, look: Callable[[str], T], uris: Sequence[str]) -> Iterator[T]:
    """What each gives, in order; a few are under way, and none any more after an error."""
    asked: deque[Future[T]] = deque()
    try:
        for uri in uris:
            asked.append(pool.submit(look, uri))
            if len(asked) > 2 * _OPEN_THREADS:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    finally:
        for future in asked:
            future.cancel()


def _normal(found: pa.Table, path: str, begin: int) -> pa.Table:
    """The rows of a file from row `begin` on in CATALOG_SCHEMA, with absolute addresses.

    Raises:
        CatalogError: a value is none of its column; with file, row and column.
    """
    columns: list[Any] = [
        _cast(found.column(field.name), field, path, begin)
        if field.name in found.schema.names
        else pa.nulls(found.num_rows, field.type)
        for field in CATALOG_SCHEMA
    ]
    place = CATALOG_SCHEMA.get_field_index("uri")
    columns[place] = _absolute_uris(columns[place], path.rpartition("/")[0])
    return pa.table(columns, schema=CATALOG_SCHEMA)


def _cast(column: pa.ChunkedArray, field: pa.Field, path: str, begin: int) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not pa.types.is_string(field.type) and (pa.types.is_boolean(kind) or pa.types.is_temporal(kind)):
        raise CatalogError(f"{path}: the column {field.name} holds values of type {kind}, expected {field.type}")
    try:
        found = column.cast(field.type)
    except pa.ArrowException as error:
        good, bad = 0, len(column)  # rows from the first on that can be cast, and that cannot
        while bad - good > 1:
            middle = (good + bad) // 2
            if not _cast_problem(column.slice(0, middle), field.type):
                good = middle
            else:
                bad = middle
        row = f" row {begin + good}" if len(column) else ""
        problem = _cast_problem(column.slice(good, 1), field.type)
        raise CatalogError(
            f"{path}{row}: the column {field.name} ({kind}) cannot be read as {field.type}: {problem or error}"
        ) from error
    if field.name == "size_bytes" and (pc.min(found).as_py() or 0) < 0:
        row = pc.index(pc.less(found, 0), True).as_py()
        raise CatalogError(f"{path} row {begin + row}: size_bytes is {found[row].as_py()}, expected 0 or more, or null")
    return found


def _cast_problem(column: pa.ChunkedArray, kind: pa.DataType) -> str:
    try:
        column.cast(kind)
    except pa.ArrowException as error:
        return str(error)
    return ""


def _absolute_uris(uris: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    is_absolute = pc.match_substring_regex(pc.fill_null(uris, ""), "^$|^/|://")
    if pc.all(is_absolute, min_count=0).as_py():
        return uris
    start = absolute(folder or ".")
    found = [
        uri if not uri or uri.startswith("/") or "://" in uri else local_uri(absolute(join(start, uri)))
        for uri in uris.to_pylist()
    ]
    return pa.chunked_array([pa.array(found, pa.string())])


def lies_inside(root: str, uri: str) -> bool:
    """Whether an address leads to something below a folder or prefix, links resolved."""
    if is_s3(root) or is_s3(uri):
        return uri.startswith(f"{root}/")
    return "\0" not in uri and os.path.realpath(local_path(uri)).startswith(f"{os.path.realpath(root).rstrip('/')}/")


def is_pieces(storage: Storage, source: str) -> bool:
    """Whether a source names many Parquet files at once, such as `s3://bucket/catalog/*.parquet`."""
    return source.endswith(".parquet") and _GLOB.search(source) is not None and not storage.exists(source)


def find_pieces(storage: Storage, source: str) -> list[str]:
    """The files that a pattern names, by name, in a folder as in a bucket: `s3://bucket/lake/cat*/**/*.parquet`.

    `*`, `?` and `[0-9]` match inside a name, `**` any number of folders; as in a shell, none matches a "." that begins
    a name, and as in Spark `**` leaves out folders whose names begin with "_". Brackets that match nothing are those of
    a name. Of a folder that is called so, as Spark writes them, all .parquet files are taken. An address without a
    pattern may be such a folder.

    Raises:
        ObjectNotFound: there is none.
        CatalogError: a folder that is called so has no .parquet file.
    """
    place = absolute(source)
    found = _matching(storage, place)
    if not found and "[" in place:
        found = _matching(storage, re.sub(r"\[\[\]|\[", "[[]", place))
    if not found:
        raise ObjectNotFound(f"{source}: no file there has such a name")
    return found


def _matching(storage: Storage, place: str) -> list[str]:
    first = _GLOB.search(place)
    start = place[: first.start()] if first else f"{place}/"
    prefix = start if is_s3(place) else start[: start.rfind("/") + 1]
    try:
        wanted = re.compile(f"(?P<match>{_regex_of(place)})(?P<inside>/.*)?", re.DOTALL)
    except re.error:  # [z-a]
        return []
    found: list[str] = []
    folders: dict[str, bool] = {}
    for info in storage.list(prefix):
        match = wanted.fullmatch(info.uri)
        if match is None:
            continue
        inside = match["inside"] or ""
        is_table = not inside or (inside.endswith(".parquet") and not re.search("/[._]", inside))
        if is_table:
            found.append(info.uri)
        if inside:
            folders[match["match"]] = folders.get(match["match"], False) or is_table
    for folder, has_table in folders.items():
        if not has_table:
            raise CatalogError(f"{folder} is a folder, and no .parquet file lies in it; remove it, or name others")
    return sorted(found)


def _regex_of(pattern: str) -> str:
    """A pattern as a regular expression."""
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts.append("(?:(?![._])[^/]+/)*")
            continue
        text = r"(?!\.)" if _GLOB.match(part) and not part.startswith("[[]") else ""
        for token in re.findall(r"\[[!^]?\]?[^\]/]*\]|\*+|.", part, re.DOTALL):
            if token[0] == "*":
                text += "[^/]*"
            elif token == "?":
                text += "[^/]"
            elif token[0] == "[" and len(token) > 1:
                is_other = token[1] in "!^"
                letters = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[1 + is_other : -1])
                text += f"[^/{letters}]" if is_other else f"[{letters}]"
            else:
                text += re.escape(token)
        parts.append(f"{text}/")
    return "".join(parts).removesuffix("/")
