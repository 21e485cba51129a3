"""Tables as CSV, JSON lines, Parquet, or columns for the eyes: written as they come, never held whole.

What is easy to break: names come from strangers, so a CSV cell must be no formula and a terminal must only show it.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray import console
from kinoray.console import shortened, visible

__all__ = ["defused", "print_table", "rows_of", "undefused", "write_parquet", "write_text"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last: full-width forms
_ROW_GROUP = 65_536
_MAX_CELL = 48
_NARROW: dict[pa.DataType, Callable[[float], Any]] = {pa.float16(): np.float16, pa.float32(): np.float32}


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
    held = 0
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            waiting.append(table)
            num_rows += len(table)
            held += len(table)
            if held >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting).cast(schema), row_group_size=_ROW_GROUP)
                waiting = []
                held = 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting).cast(schema), row_group_size=_ROW_GROUP)
    return num_rows


def print_table(table: pa.Table) -> None:
    """Print it as aligned columns, numbers to the right."""
    right = [place for place, field in enumerate(table.schema) if not _is_text(field.type)]
    rows = [[_shown(value) for value in row.values()] for row in rows_of(table)]
    for line in console.table(rows, head=[name.upper() for name in table.column_names], right=right):
        print(line)


def _is_text(kind: pa.DataType) -> bool:
    return not (pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return _shown(" ".join(_shown(item) for item in value))
    return shortened(visible(value), _MAX_CELL)
