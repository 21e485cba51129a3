"""Why a video is refused: one record from the decoder to the table, and one place that says whose fault an error is.

A refused video is a row of the quarantine table, never an absence. What is easy to break: a store that is down must
never be committed as the fault of a video, so nothing becomes a Refusal except by `judge` (or by its place or name).
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray import errors
from kinoray.errors import BadCredentials, CatalogError, KinorayError, StorageUnavailable
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage
from kinoray.storage.tables import parse_table

__all__ = [
    "QUARANTINE_SCHEMA",
    "QuarantineRow",
    "Refusal",
    "count_reasons",
    "error_of",
    "judge",
    "load_quarantine",
    "refusal_columns",
    "refusals_of_columns",
    "report",
    "save_quarantine",
]

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
