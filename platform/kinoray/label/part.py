"""A part: the rows of one unit of work as one Parquet file, which says whose rows they are and proves that it is whole.

    PAR1 | pages, each with Parquet's own checksum | SHA-256 of all before it | SHA-256 of all behind it | footer | PAR1

The footer's key-value metadata `kinoray` is the unit's Commit. Parquet finds pages and footer by their offsets, so its
readers never look at the 64 bytes between them; ours compares them first, and so finds every flipped bit.

What is easy to break: Parquet's checksums are of pages only. A flipped bit in a page's header or in the footer may
rename a column or a unit, and everything still reads.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.storage.records import as_name, parse_json, parse_table, record_of

__all__ = [
    "PREDICTION_SCHEMA",
    "WINDOW_SCHEMA",
    "Commit",
    "Times",
    "parse_commit",
    "parse_part",
    "parse_windows",
    "to_part",
    "to_windows",
]

_KEY = "kinoray"
_MAGIC = b"PAR1"
_DIGEST_BYTES = 32
_END_BYTES = 8  # length of the footer, magic

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("row_key", pa.string(), nullable=False),  # names the input: plan.row_keys
        pa.field("status", pa.string(), nullable=False),  # labelled, quarantined or skipped
        pa.field("error_class", pa.string()),
        pa.field("error_text", pa.string()),
        pa.field("label_topk", pa.list_(pa.string())),  # likeliest first; null unless labelled, as all below
        pa.field("id_topk", pa.list_(pa.int32())),
        pa.field("score_topk", pa.list_(pa.float32())),  # probabilities
        pa.field("scores", pa.list_(pa.float32())),  # of all classes in the model's order; null unless asked for
        pa.field("margin", pa.float32()),  # first score less the second
        pa.field("entropy", pa.float32()),  # of all classes, in nats
        pa.field("abstained", pa.bool_(), nullable=False),
        pa.field("embedding", pa.list_(pa.float16())),  # what goes into the classifiers; null unless asked for
        pa.field("segment_logits", pa.list_(pa.float32())),  # [S, C] row by row; null unless asked for
        pa.field("views", pa.int32(), nullable=False),  # of all windows together
        pa.field("windows", pa.int32(), nullable=False),  # 1 unless the video was cut
        pa.field("segments_run", pa.int32(), nullable=False),  # that the network looked at, of all views together
        pa.field("frames_decoded", pa.int32(), nullable=False),
        pa.field("frames_corrupt", pa.int32(), nullable=False),
        pa.field("frames_missing", pa.int32(), nullable=False),  # promised by the file's header, and not there
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("config_digest", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
    ]
)
"""One row for every input."""

WINDOW_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),  # 0, 1, ... in the order of time
        pa.field("begin_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        *(
            PREDICTION_SCHEMA.field(name)
            for name in ("label_topk", "id_topk", "score_topk", "scores", "margin", "entropy", "abstained")
        ),
    ]
)
"""One row for every window of a labelled video, where the settings cut long videos into windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """When a unit was labelled, where, and what the worker waited for. Its commit ends it, so that is not in it."""

    worker: str
    """Host and process."""
    begin_s: float
    """In seconds since 1970."""
    end_s: float
    store: float
    """Seconds of it, as those below."""
    decode: float
    model: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a part says of itself."""

    unit_id: str
    run_id: str
    """The job that wrote it."""
    counts: dict[str, int]
    """Rows by status."""
    windows: str | None = None
    """SHA-256 of the file with the rows of its windows; None where nothing is cut."""
    times: Times | None = None

    @property
    def rows(self) -> int:
        """Rows of the part."""
        return sum(self.counts.values())


def to_part(rows: pa.Table, commit: Commit) -> bytes:
    """The bytes of a part."""
    data = _to_parquet(rows, asdict(commit))
    start = _footer_start(data)
    pages, footer = data[:start], data[start:]
    return b"".join((pages, hashlib.sha256(pages).digest(), hashlib.sha256(footer).digest(), footer))


def to_windows(windows: pa.Table, unit_id: str) -> bytes:
    """The bytes of a file of windows. It says nothing of its writer: equal windows are equal files."""
    return _to_parquet(windows, {"unit_id": unit_id})


def _to_parquet(table: pa.Table, about: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: json.dumps(about)})
    return sink.getvalue()


def parse_part(data: bytes, columns: Sequence[str] | None = None) -> tuple[Commit, pa.Table]:
    """What a part says of itself, and its rows with these columns only.

    Raises:
        ValueError, TypeError, pyarrow.ArrowException: it is not what `to_part` made.
    """
    digests = _footer_start(data) - 2 * _DIGEST_BYTES
    if hashlib.sha256(data[:digests]).digest() != data[digests : digests + _DIGEST_BYTES]:
        raise ValueError("its rows are not those that were written")
    return parse_commit(data), _parse_rows(data, columns, PREDICTION_SCHEMA)


def parse_commit(data: bytes) -> Commit:
    """What a part says of itself. Raises as `parse_part`.

    Args:
        data: the part, or its end, with the whole footer.
    """
    start = _footer_start(data)
    if hashlib.sha256(data[start:]).digest() != data[start - _DIGEST_BYTES : start]:
        raise ValueError("its footer is not the one that was written")
    about = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    commit = record_of(Commit)(parse_json(about.get(_KEY.encode(), b"null")))
    as_name(commit.unit_id, "unit_id")
    if commit.windows is not None:
        as_name(commit.windows, "windows")  # it is in the name of a file
    return commit


def parse_windows(data: bytes, commit: Commit) -> pa.Table:
    """The rows of the windows that a commit names. Raises as `parse_part`."""
    if hashlib.sha256(data).hexdigest() != commit.windows:
        raise ValueError("its windows are not those that the unit was committed with")
    return _parse_rows(data, None, WINDOW_SCHEMA)


def _footer_start(data: bytes) -> int:
    """Where the footer begins, behind the digests."""
    start = len(data) - _END_BYTES - int.from_bytes(data[-_END_BYTES : -len(_MAGIC)], "little")
    if data[-len(_MAGIC) :] != _MAGIC or start < 2 * _DIGEST_BYTES:
        raise ValueError("it is cut short, or no part")
    return start


def _parse_rows(data: bytes, columns: Sequence[str] | None, schema: pa.Schema) -> pa.Table:
    table = parse_table(data, columns)
    for field in table.schema:
        if field.name in schema.names and not field.equals(schema.field(field.name)):
            raise ValueError(f"column {field.name} is {field.type}, expected {schema.field(field.name).type}")
    return table.replace_schema_metadata(None)
