"""Reading back what kinoray and others wrote: JSON and Parquet, of which nothing can run code when it is read.

What is easy to break: Ray registers Arrow types whose values are pickles, in every process of a job. A table that
holds one must be refused before any value of it is looked at.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.errors import ChecksumMismatch

__all__ = ["parse_lines", "parse_record", "parse_table"]

T = TypeVar("T")


def parse_record(data: bytes, uri: str, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the JSON object in the bytes of a file that kinoray wrote; `dict` for the object itself.

    Raises:
        ChecksumMismatch: it is no JSON, or not the object that `make` takes.
    """
    try:
        return make(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ChecksumMismatch(f"{uri} does not hold what kinoray wrote ({reason}); restore or remove it") from error


def parse_lines(data: bytes, uri: str) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file that kinoray wrote. Raises as parse_record."""
    return [
        parse_record(line, f"{uri} line {number}", dict) for number, line in enumerate(data.splitlines(), 1) if line
    ]


def parse_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file, with these columns only.

    Raises:
        pyarrow.ArrowInvalid: it is no Parquet, or a column's type is none of Arrow's own.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        if wrong := [name for name in columns or names if names.count(name) != 1]:
            raise pa.ArrowInvalid(f"column {wrong[0]} is there {names.count(wrong[0])} times; once is right")
        for field in file.schema_arrow:
            if _is_foreign(field.type):
                raise pa.ArrowInvalid(f"column {field.name} has the type {field.type}, whose values are not plain data")
        return file.read(columns=None if columns is None else list(columns))
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise pa.ArrowInvalid(" ".join(str(error).split())) from error


def _is_foreign(kind: pa.DataType) -> bool:
    """Whether a type, or one inside it, is an extension in Python: its values are made by somebody's code."""
    if isinstance(kind, pa.ExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _is_foreign(kind.value_type)
    return any(_is_foreign(kind.field(index).type) for index in range(kind.num_fields))
