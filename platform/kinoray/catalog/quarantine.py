"""The table of what was refused, where it was, and why: a refused file is a row here, never an absence."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.errors import CatalogError
from kinoray.storage.objects import Storage
from kinoray.storage.records import parse_table

__all__ = ["QUARANTINE_SCHEMA", "Refusal", "count_reasons", "load_quarantine", "save_quarantine"]

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
"""Columns of a quarantine table. stage is where it was refused: `list`, `read` or `probe`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row of QUARANTINE_SCHEMA."""

    video_id: str
    """What the video would be called in the catalog."""
    uri: str
    """Where it lies."""
    error_class: str
    """Name of an error of errors.py; at stage `list`: HiddenFile, NoClassFolder or UnusableName."""
    error_text: str
    """The reason, one line."""
    stage: str
    """`list`, `read` or `probe`."""
    offset: int | None = None
    """First byte inside uri, for a member of an archive."""
    length: int | None = None
    """Bytes inside uri, for a member of an archive."""


def count_reasons(refusals: Iterable[Refusal]) -> dict[str, int]:
    """How many of each error_class, the most frequent first."""
    return dict(Counter(refusal.error_class for refusal in refusals).most_common())


def save_quarantine(storage: Storage, uri: str, refusals: Sequence[Refusal]) -> None:
    """Write the table as one Parquet object, also when it is empty."""
    columns = [[getattr(refusal, name) for refusal in refusals] for name in QUARANTINE_SCHEMA.names]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, QUARANTINE_SCHEMA, strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=QUARANTINE_SCHEMA), sink, compression="zstd")
    storage.put(uri, sink.getvalue())


def load_quarantine(storage: Storage, uri: str) -> list[Refusal]:
    """The rows of a quarantine table.

    Raises:
        CatalogError: it is not one.
    """
    try:
        table = parse_table(storage.read(uri))
        return [Refusal(**row) for row in table.select(QUARANTINE_SCHEMA.names).to_pylist()]
    except (pa.ArrowException, KeyError) as error:
        raise CatalogError(f"{uri} is not a quarantine table: {' '.join(str(error).split())}") from error
