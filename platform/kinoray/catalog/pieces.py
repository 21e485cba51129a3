"""The rows of a catalog, and a stream of those that lie in Parquet files: a few at a time are in memory.

What is easy to break: whoever labels a library reads its catalog several times and calls rows by their number, so a
stream gives the same rows in the same order each time. And the digest names the content, not the files, so it must not
depend on how Parquet encodes it, or on how it is cut.
"""

import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray.config.files import local_path, local_uri
from kinoray.console import many
from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.records import parse_json
from kinoray.storage.tables import TableFile

__all__ = [
    "CATALOG_SCHEMA",
    "GROUP_ROWS",
    "OF_FEW_VALUES",
    "Pieces",
    "Rows",
    "RowsDigest",
    "check_rows",
    "find_pieces",
    "is_pieces",
    "lies_inside",
    "no_split",
    "said_repeated",
    "schema_with",
    "splits_in",
]

CATALOG_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("split", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("time_start_s", pa.float64()),
        pa.field("time_end_s", pa.float64()),
        pa.field("duration_s", pa.float64()),
        pa.field("fps", pa.float64()),
        pa.field("num_frames", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("codec", pa.string()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("label_ids", pa.list_(pa.int32())),
    ]
)
"""Columns of a catalog. offset and length are null for a whole object; status is `packed` (probed) or `listed`.

A video of one class has label and label_id; where videos may have several, label_ids alone says which: rising, empty
for none of the classes, null where it is not known. No catalog has both.
"""

GROUP_ROWS = 65_536
"""Rows of a row group of what kinoray writes: what a reader holds at once."""

OF_FEW_VALUES = ("label", "label_id", "split", "fps", "width", "height", "codec", "status", "reason")
"""Columns that are written with a dictionary; for names it would be as large as they are."""

_LABELS_KEY = b"kinoray.labels"
_LISTS = "label_ids"
_OPEN_THREADS = 8
_MAX_OPENED = 4  # files that stay open
_SMALL_GROUP_ROWS = 32  # a row group of fewer is read with its neighbours, since each takes 5 ms
_JOINED_GROUPS = 64
_GLOB = re.compile(r"[*?\[]")

T = TypeVar("T")


class Rows(Protocol):
    """The rows of a catalog, wherever they are: a `Catalog` in memory, or `Pieces`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, index = label_id; empty for an unlabelled catalog."""
        ...

    def __len__(self) -> int: ...

    def batches(self, begin: int = 0) -> Iterator[pa.Table]:
        """The rows from row `begin` on in CATALOG_SCHEMA, a few at a time."""
        ...

    def where(self, row: int) -> str:
        """Where a row lies, for messages."""
        ...


class RowsDigest:
    """What names the rows of a catalog, in their order, and the names of its classes, however they are cut.

    label_ids count where there are any: a catalog of one class a video has the digest that it had before them.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._num_rows = 0
        self._has_lists = False
        self._of_column = {field.name: (hashlib.sha256(), hashlib.sha256()) for field in CATALOG_SCHEMA}

    def update(self, table: pa.Table) -> None:
        """Add rows (CATALOG_SCHEMA)."""
        for field in CATALOG_SCHEMA:
            which, values = self._of_column[field.name]
            if pa.types.is_list(field.type):
                self._add_lists(table.column(field.name).combine_chunks())
                continue
            for column in table.column(field.name).chunks:
                if pa.types.is_string(field.type):
                    lengths = pc.fill_null(pc.binary_length(column), -1)
                    which.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
                    values.update(_text_bytes(pc.fill_null(column, "")))
                else:
                    which.update(pc.is_valid(column).to_numpy(zero_copy_only=False).tobytes())
                    numbers = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
                    values.update(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes())
        self._num_rows += table.num_rows

    def _add_lists(self, column: pa.Array) -> None:
        """Which rows have a list, how long each is, and what is in them."""
        if column.null_count == len(column):
            return
        self._has_lists = True
        which, values = self._of_column[_LISTS]
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        lengths = pc.drop_null(pc.list_value_length(column)).to_numpy()
        which.update(np.stack([rows + self._num_rows, lengths]).T.astype("<i8").tobytes())
        values.update(pc.list_flatten(column).to_numpy(zero_copy_only=False).astype("<i4").tobytes())

    def hexdigest(self) -> str:
        """16 hex digits."""
        whole = hashlib.sha256(json.dumps(self._labels).encode())
        for name, (which, values) in self._of_column.items():
            if name == _LISTS and not self._has_lists:
                continue
            whole.update(name.encode() + which.digest() + values.digest())
        return whole.hexdigest()[:16]


def _text_bytes(column: pa.StringArray) -> memoryview:
    """The bytes of all texts of a column, one behind the other."""
    _, offsets, data = column.buffers()
    if data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)
    return memoryview(data)[ends[column.offset] : ends[column.offset + len(column)]]


def check_rows(table: pa.Table, num_labels: int) -> None:
    """Refuse rows that no catalog may hold.

    Raises:
        CatalogError: the schema is another one, a row has no video_id or uri, a label_id has no name, or some rows have
            a label_id and others a list of them.
    """
    if not table.schema.equals(CATALOG_SCHEMA):
        raise CatalogError(f"a catalog needs the columns {CATALOG_SCHEMA.names}, got {table.schema.names}")
    for name in ("video_id", "uri"):
        if table.column(name).null_count:
            num_null = many(table.column(name).null_count, "row")
            raise CatalogError(f"{name} may not be null: {num_null} without it")
    label_ids, lists = table.column("label_id"), table.column(_LISTS)
    one, several = label_ids.null_count < len(label_ids), lists.null_count < len(lists)
    if one and several:
        raise CatalogError(
            "some rows have a label_id and others label_ids; in one catalog all have the one or the other"
        )
    for name, ids in (("label_id", label_ids), (_LISTS, pc.list_flatten(lists) if several else None)):
        if ids is None or (name == "label_id" and not one):
            continue
        if name == _LISTS and ids.null_count:
            raise CatalogError("label_ids holds a list with a null in it")
        span = pc.min_max(ids).as_py()
        if len(ids) and not 0 <= span["min"] <= span["max"] < num_labels:
            raise CatalogError(f"{name} {span['max']} has no name: the catalog names {many(num_labels, 'class')}")


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


def said_repeated(video_id: str, count: int, rows: Rows, first: int, second: int) -> CatalogError:
    """The error of a catalog that names a video twice."""
    places = f"{rows.where(first)} and {rows.where(second)}"
    return CatalogError(f"video_id {video_id!r} is used {count} times ({places}); it must be unique in a catalog")


def splits_in(table: pa.Table) -> Counter[str]:
    """Rows by split; "" for those without one."""
    counted = table.column("split").value_counts().to_pylist()
    return Counter({entry["values"] or "": entry["counts"] for entry in counted})


def no_split(split: str, counts: Mapping[str, int]) -> CatalogError:
    """The error of a catalog without a row of a split."""
    there = ", ".join(f"{name or 'none'} ({count})" for name, count in sorted(counts.items()) if count)
    return CatalogError(f"the catalog has no video of split {split!r}; its splits are: {there or 'none'}")


def schema_with(labels: Sequence[str]) -> pa.Schema:
    """CATALOG_SCHEMA as a file has it: its metadata names the classes."""
    return CATALOG_SCHEMA.with_metadata({_LABELS_KEY: json.dumps(list(labels)).encode()})


def _labels_of(schema: pa.Schema) -> tuple[str, ...]:
    """The names of the classes in the metadata of a file. Raises ValueError: they are something else."""
    labels = parse_json((schema.metadata or {}).get(_LABELS_KEY, b"[]"))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("its labels are not a list of texts")
    return tuple(labels)


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
