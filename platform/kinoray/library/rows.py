"""Rows of predictions as a stream, and a stream as CSV, JSON lines, Parquet or columns for the eyes.

Rows are filtered unit by unit, with only the columns that are asked for, and written as they come, never held whole.

What is easy to break: names come from strangers, so a CSV cell must be no formula and a terminal must only show it.
"""

import csv
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray import console
from kinoray.errors import ConfigError
from kinoray.label.ledger import Ledger
from kinoray.label.planfile import read_shown, read_shown_windows, shown_units
from kinoray.label.unit import PREDICTION_SCHEMA, WINDOW_SCHEMA

__all__ = [
    "BAD_VIDEO",
    "LABEL_SCHEMA",
    "WINDOW_LABEL_SCHEMA",
    "Where",
    "blocks",
    "class_names",
    "count_missing",
    "count_rows",
    "defused",
    "first_item",
    "is_multi_label",
    "print_table",
    "rows_of",
    "scan",
    "scan_windows",
    "undefused",
    "write_parquet",
    "write_text",
]

BAD_VIDEO = "__bad__"
"""What a correction calls a video that should not be in a set at all."""

_FIRST = {"label": "label_topk", "score": "score_topk"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last: full-width forms
_ROW_GROUP = 65_536
_BLOCK_BYTES = 64 * 2**20  # of rows with embeddings, which may take kilobytes each
_NARROW: dict[pa.DataType, Callable[[float], Any]] = {pa.float16(): np.float16, pa.float32(): np.float32}


def _with_first(schema: pa.Schema, after: str) -> pa.Schema:
    fields = list(schema)
    place = schema.get_field_index(after) + 1
    first = [pa.field("label", pa.string()), pa.field("score", pa.float32())]
    return pa.schema([*fields[:place], *first, *fields[place:]])


LABEL_SCHEMA: pa.Schema = _with_first(PREDICTION_SCHEMA, "status")
"""PREDICTION_SCHEMA with the likeliest class and its score as columns of their own; null where not labelled."""

WINDOW_LABEL_SCHEMA: pa.Schema = _with_first(WINDOW_SCHEMA, "end_s")
"""WINDOW_SCHEMA with the same two columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Which rows are wanted; what is left out does not matter."""

    status: tuple[str, ...] = ()
    """labelled, quarantined, skipped, or abstained (rows with that flag)."""
    label: tuple[str, ...] = ()
    """Names of the first class."""
    named: tuple[str, ...] = ()
    """Names of any class that was named; of a labelling whose videos may have several."""
    score: tuple[float, float] | None = None
    """Least and greatest."""
    margin: tuple[float, float] | None = None
    """Least and greatest."""
    video_id: str = ""
    """A pattern with * ? and [...]."""

    @property
    def columns(self) -> list[str]:
        """Columns that `mask` looks at."""
        used = [name for name in ("score", "margin", "label", "video_id") if getattr(self, name)]
        return used + (["status", "abstained"] if self.status else []) + (["label_topk"] if self.named else [])

    def mask(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        """True where a row is wanted."""
        keep: Any = pa.array([True] * len(table), pa.bool_())
        if self.status:
            said = pc.is_in(table["status"], value_set=pa.array(self.status, pa.string()))
            keep = pc.or_(said, table["abstained"]) if "abstained" in self.status else said
        if self.label:
            keep = pc.and_(keep, pc.is_in(table["label"], value_set=pa.array(self.label, pa.string())))
        if self.named:
            keep = pc.and_(keep, pa.array(_holds(table["label_topk"], self.named), pa.bool_()))
        for name in ("score", "margin"):
            span = getattr(self, name)
            if span is not None:
                least, most = (pa.scalar(number, pa.float32()) for number in span)
                keep = pc.and_(keep, pc.greater_equal(table[name], least))
                keep = pc.and_(keep, pc.less_equal(table[name], most))
        if self.video_id:
            fits = re.compile(fnmatch.translate(self.video_id)).match
            ids = table["video_id"].to_pylist()
            keep = pc.and_(keep, pa.array([fits(video_id) is not None for video_id in ids], pa.bool_()))
        return pc.fill_null(keep, False)


def _holds(lists: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """bool [N]: whether a list has one of the names in it."""
    found = np.zeros(len(lists), bool)
    column = lists.combine_chunks()
    is_one = pc.is_in(pc.list_flatten(column), value_set=pa.array(names, pa.string())).to_numpy(zero_copy_only=False)
    found[pc.list_parent_indices(column).to_numpy()[is_one]] = True
    return found


def class_names(ledger: Ledger) -> tuple[str, ...]:
    """The model's classes, in its order.

    Raises:
        ConfigError: job.json does not name them.
    """
    labels = ledger.job().labels
    if not labels:
        raise ConfigError(f"predictions: {ledger.root}/job.json names no classes (labels)")
    return labels


def is_multi_label(ledger: Ledger) -> bool:
    """Whether a video may have any number of classes (label --scores sigmoid); label_topk then holds just those."""
    return ledger.job().scores == "sigmoid"


def scan(ledger: Ledger, columns: Sequence[str], where: Where | None = None) -> Iterator[pa.Table]:
    """The committed rows in the order of the catalog, as `read_predictions` has them, a small table at a time.

    Args:
        columns: of LABEL_SCHEMA; what the tables hold, in this order.

    Raises:
        IncompleteOutput, ChecksumMismatch: a part is gone, or not what was committed.
    """
    where = where or Where()
    stored = dict.fromkeys(_FIRST.get(name, name) for name in [*columns, *where.columns])
    for table in read_shown(ledger, list(stored)):
        yield _select(table, columns, where)


def count_rows(ledger: Ledger) -> int | None:
    """How many rows `scan` gives, all of them; None where parts would have to be read to know."""
    newest, older = shown_units(ledger)
    return None if older else sum(len(unit.keys) for unit in newest)  # a newer row may hide an older one of its place


def count_missing(ledger: Ledger) -> tuple[int, int]:
    """How many inputs of the newest catalog have no row yet, and how many inputs there are."""
    done = ledger.committed()
    newest = ledger.plans()[-1:]  # none while a first job still lists its videos
    missing = sum(len(unit.keys) for plan in newest for unit in plan.units if unit.unit_id not in done)
    return missing, sum(plan.num_rows for plan in newest)


def scan_windows(ledger: Ledger, columns: Sequence[str], where: Where | None = None) -> Iterator[pa.Table]:
    """The rows of windows (`label --window-s`) as `read_windows` has them, a small table at a time.

    Args:
        columns: of WINDOW_LABEL_SCHEMA.

    Raises:
        ConfigError: it was labelled without windows.
        IncompleteOutput, ChecksumMismatch: a part is gone, or not what was committed.
    """
    where = where or Where()
    if ledger.job().windows is None:
        raise ConfigError(f"windows: {ledger.root} was labelled without windows; label with --window-s")
    for table in read_shown_windows(ledger):
        status = pa.array(["labelled"] * len(table), pa.string())  # what is not labelled has no windows
        yield _select(table.append_column("status", status), columns, where)


def _select(table: pa.Table, columns: Sequence[str], where: Where) -> pa.Table:
    for name, source in _FIRST.items():
        if name in columns or name in where.columns:
            table = table.append_column(LABEL_SCHEMA.field(name), first_item(table[source]))
    if where.columns:
        table = table.filter(where.mask(table))
    return table.select(list(columns))


def first_item(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """First item of each list; null where the list is null or empty."""
    filled = pc.if_else(pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0), column, None)
    return pc.list_element(filled, 0)


# Rows as text and files


def defused(text: str) -> str:
    """Text as a CSV cell that no spreadsheet takes for a formula: a quote sign goes in front where one might."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def undefused(cell: str) -> str:
    """What `defused` was given."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def rows_of(table: pa.Table) -> Iterable[dict[str, Any]]:
    """Rows as Python values; float32 as the shortest number that means it (0.9, not 0.8999999761581421)."""
    columns = [_values(table[name]) for name in table.column_names]
    return (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist()
    kind = column.type
    is_list = pa.types.is_list(kind)
    narrow = _NARROW.get(kind.value_type if is_list else kind)
    if narrow is None:
        return values

    def short(value: float | None) -> float | None:
        return None if value is None else float(str(narrow(value)))

    if is_list:
        return [None if value is None else [short(item) for item in value] for value in values]
    return [short(value) for value in values]


def write_text(tables: Iterable[pa.Table], columns: Sequence[str], kind: Literal["csv", "jsonl"], file: TextIO) -> int:
    """Write the rows and return how many there were."""
    num_rows = 0
    writer = csv.writer(file)  # with \r\n: Python quotes those characters only that end its lines
    if kind == "csv":
        writer.writerow([defused(name) for name in columns])
    for table in tables:
        num_rows += len(table)
        for row in rows_of(table):
            if kind == "csv":
                writer.writerow([_cell(value) for value in row.values()])
            else:
                file.write(json.dumps(row) + "\n")
    return num_rows


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return defused(value)
    return json.dumps(value) if isinstance(value, list | bool) else value


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Write the rows as one Parquet file with row groups of a useful size, and return how many there were."""
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in blocks(tables, schema):
            writer.write_table(block, row_group_size=_ROW_GROUP)
            num_rows += len(block)
    return num_rows


def blocks(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows as tables of this schema, as long as a row group should be, or as wide rows in memory allow."""
    held: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in tables:
        held.append(table)
        num_rows += len(table)
        num_bytes += table.nbytes
        if num_rows >= _ROW_GROUP or num_bytes >= _BLOCK_BYTES:
            yield pa.concat_tables(held).cast(schema)
            held = []
            num_rows = num_bytes = 0
    if num_rows:
        yield pa.concat_tables(held).cast(schema)


def print_table(table: pa.Table) -> None:
    """Print it as aligned columns, numbers to the right."""
    right = [place for place, field in enumerate(table.schema) if not _is_text(field.type)]
    rows = [[_shown(value) for value in row.values()] for row in rows_of(table)]
    for line in console.table(rows, head=[name.upper() for name in table.column_names], right=right, fits=True):
        print(line)


def _is_text(kind: pa.DataType) -> bool:
    return not (pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return ("|" if value and isinstance(value[0], str) else " ").join(_shown(item) for item in value)
    return str(value)
