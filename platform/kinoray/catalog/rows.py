"""Rows: what one of a catalog is, and what names them all; and the record of a refusal, from the decoder to the table.

A refused video is a row of the quarantine table, never an absence. What is easy to break: a store that is down must
never be committed as the fault of a video, so nothing becomes a Refusal except by `judge` (or by its place or name).
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray import errors
from kinoray.console import many
from kinoray.errors import BadCredentials, CatalogError, KinorayError, StorageUnavailable
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage
from kinoray.storage.records import parse_json
from kinoray.storage.tables import parse_table

__all__ = [
    "CATALOG_SCHEMA",
    "GROUP_ROWS",
    "OF_FEW_VALUES",
    "QUARANTINE_SCHEMA",
    "QuarantineRow",
    "Refusal",
    "Rows",
    "RowsDigest",
    "check_rows",
    "count_reasons",
    "error_of",
    "judge",
    "load_quarantine",
    "no_split",
    "refusal_columns",
    "refusals_of_columns",
    "report",
    "said_repeated",
    "save_quarantine",
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
    if several:
        ids, of = pc.list_flatten(lists).to_numpy(), pc.list_parent_indices(lists.combine_chunks()).to_numpy()
        if ((ids[1:] <= ids[:-1]) & (of[1:] == of[:-1])).any():
            raise CatalogError("label_ids must rise in each list, each class once")


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


QUARANTINE_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("error_class", pa.string(), nullable=False),
        pa.field("error_text", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
    ]
)
"""Columns of a quarantine table."""

_COLUMNS = ("stage", "error_class", "error_text")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a video is refused. It crosses Ray and lies in commits as it is."""

    stage: str
    """Where it was refused: `list`, `read`, `probe`, `decode`; `train on <split>` in the table of a training."""
    error_class: str
    """Name of an error of errors.py; at stage `list` also what is wrong with its name or place, such as HiddenFile."""
    error_text: str
    """The reason, one line."""


def judge(error: KinorayError, stage: str) -> Refusal:
    """What an error says of its video; the error is raised where it says nothing of a video.

    Raises:
        StorageUnavailable, BadCredentials: the store is down, or takes the credentials for no object.
    """
    if isinstance(error, StorageUnavailable | BadCredentials):
        raise error
    return report(error, stage)


def report(error: KinorayError, stage: str) -> Refusal:
    """The record of an error, whoever is at fault: for an error that ends a job, on its way from a worker's rows."""
    return Refusal(stage, type(error).__name__, " ".join(str(error).split()))


def error_of(refusal: Refusal) -> KinorayError:
    """The error that was given to `report`."""
    kind = getattr(errors, refusal.error_class, KinorayError)
    error: KinorayError = kind(refusal.error_text)
    return error


def refusal_columns(refusals: Sequence[Refusal | None]) -> dict[str, np.ndarray]:
    """Refusals as columns of a table, one row each; texts are empty where there is none."""
    return {
        name: np.array(["" if refusal is None else getattr(refusal, name) for refusal in refusals], dtype=str)
        for name in _COLUMNS
    }


def refusals_of_columns(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> list[Refusal | None]:
    """What `refusal_columns` was given."""
    rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
    return [Refusal(str(stage), str(kind), str(text)) if kind else None for stage, kind, text in rows]


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """One row of QUARANTINE_SCHEMA."""

    video_id: str
    """What the video would be called in the catalog."""
    uri: str
    """Where it lies."""
    refusal: Refusal
    """Why it is refused."""
    offset: int | None = None
    """First byte inside uri, for a member of an archive."""
    length: int | None = None
    """Bytes inside uri, for a member of an archive."""

    @property
    def error_class(self) -> str:
        """As of a Refusal."""
        return self.refusal.error_class

    @property
    def error_text(self) -> str:
        """As of a Refusal."""
        return self.refusal.error_text

    @property
    def stage(self) -> str:
        """As of a Refusal."""
        return self.refusal.stage


def count_reasons(rows: Iterable[QuarantineRow]) -> dict[str, int]:
    """How many of each error_class, the most frequent first."""
    return dict(Counter(row.error_class for row in rows).most_common())


def save_quarantine(storage: Storage, uri: str, rows: Sequence[QuarantineRow]) -> None:
    """Write the table as one Parquet object, also when it is empty."""
    columns = [[getattr(row, name) for row in rows] for name in QUARANTINE_SCHEMA.names]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, QUARANTINE_SCHEMA, strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=QUARANTINE_SCHEMA), sink, compression="zstd")
    storage.put(uri, sink.getvalue())


def load_quarantine(storage: Storage, uri: str) -> list[QuarantineRow]:
    """The rows of a quarantine table.

    Raises:
        CatalogError: it is not one.
    """
    try:
        table = parse_table(storage.read(uri, max_bytes=MAX_TABLE_BYTES))
        return [
            QuarantineRow(
                row["video_id"],
                row["uri"],
                Refusal(row["stage"], row["error_class"], row["error_text"]),
                row["offset"],
                row["length"],
            )
            for row in table.select(QUARANTINE_SCHEMA.names).to_pylist()
        ]
    except (pa.ArrowException, KeyError) as error:
        raise CatalogError(f"{uri} is not a quarantine table: {' '.join(str(error).split())}") from error
