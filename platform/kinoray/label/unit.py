"""A unit of work, and the file that its predictions become.

A unit's part is one Parquet file, which says whose rows they are and proves that it is whole:

    PAR1 | pages, each with Parquet's own checksum | SHA-256 of all before it | SHA-256 of all behind it | footer | PAR1

The footer's key-value metadata `kinoray` is the unit's Commit. Parquet finds pages and footer by their offsets, so its
readers never look at the 64 bytes between them; ours compares them first, and so finds every flipped bit.

What is easy to break: Parquet's checksums are of pages only: a flipped bit in a page's header or in the footer may
rename a column or a unit, and everything still reads.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray.config.scoring import ScoreKind, WindowsConfig
from kinoray.config.shared import ModelConfig, digest
from kinoray.label.keys import KEY_PATTERN, Numbers, keys_in
from kinoray.storage.records import as_name, as_seconds, parse_json, record_of
from kinoray.storage.tables import parse_table

__all__ = [
    "PLACE",
    "PREDICTION_SCHEMA",
    "STATUSES",
    "WINDOW_SCHEMA",
    "Commit",
    "Finished",
    "JobEnd",
    "JobRecord",
    "Times",
    "Totals",
    "Unit",
    "labelling_id",
    "parse_commit",
    "parse_part",
    "parse_windows",
    "to_part",
    "to_windows",
    "unit_id_of",
]


def labelling_id(model_digest: str, config_digest: str) -> str:
    """The folder that holds what one model says under one setting."""
    return digest([model_digest, config_digest])


def unit_id_of(labelling_id: str, keys: Numbers) -> str:
    """The name of a unit: digest of the labelling and of all its rows, uint64 [N]."""
    return hashlib.sha256(labelling_id.encode() + keys_in(keys)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is labelled and committed at once."""

    unit_id: str
    """Digest of the labelling and of all rows of the unit."""
    keys: Sequence[str]
    """Its rows that belong to the plan's catalog, in order."""
    num_rows: int
    """All its rows: more than `keys` where a finished unit also holds videos that have left the catalog."""
    first: int = 0
    """Of its rows the first in the plan's catalog, and the last; others may lie between."""
    last: int = 0
    mask: bytes | None = None
    """Where it has more rows than keys: a bit a row, the least significant first, set for those in the catalog."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its rows are in the catalog (else it can be read, but not labelled)."""
        return len(self.keys) == self.num_rows


# The part of a unit

_KEY = "kinoray"
_MAGIC = b"PAR1"
_DIGEST_BYTES = 32
_END_BYTES = 8  # length of the footer, magic

STATUSES = frozenset(("labelled", "quarantined", "skipped"))
"""What a row may be."""
_ANSWER = {"label_topk", "id_topk", "score_topk"}
_SCORES = {"score_topk", "scores", "margin"}  # 0 .. 1
_FINITE = {"entropy", "begin_s", "end_s"}

PLACE = ("video_id", "uri", "offset", "length")
"""Columns that say where a video lies; a file that was replaced is another input in the same place."""

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("row_key", pa.string(), nullable=False),  # names the input: row_keys
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
class JobRecord:
    """job.json: what all rows of a labelling share."""

    checkpoint: str
    """What answered; empty for an ensemble."""
    members: tuple[str, ...] = ()
    """Evaluations that an ensemble averaged."""
    model_digest: str
    config_digest: str
    labels: tuple[str, ...]
    """The model's classes, in its order."""
    scores: ScoreKind = "softmax"
    """sigmoid: a video may have any number of classes."""
    windows: WindowsConfig | None = None
    """How long videos were cut."""
    model: ModelConfig | None = None
    """Which network; None for an ensemble."""
    settings: dict[str, Any]
    """Whatever else can change a row, for people: config_digest is the digest of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEnd:
    """What a file in jobs/ says of a job that came to its end; the rest of it is for people."""

    run_id: str
    began_s: float
    """In seconds since 1970."""
    wall_s: float
    """How long it took."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "JobEnd":
        """Of the file's JSON. Raises what parse_record takes for damage."""
        return cls(
            run_id=as_name(record["run_id"], "run_id"),
            began_s=as_seconds(datetime.fromisoformat(record["began"]).timestamp(), "began"),
            wall_s=as_seconds(record["wall_s"], "wall_s"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a file in done/ says of the age of a catalog; the rest of it is for people."""

    sequence: int
    """As of a plan: how many there were when it was labelled whole, or -1 where the file does not say."""
    source: str
    """What the catalog was made of, where the file says so."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Finished":
        """Of the file's JSON. Raises what parse_record takes for damage."""
        sequence, source = record.get("sequence", -1), record.get("source", "")
        if type(sequence) is not int or not -1 <= sequence < 2**31 or not isinstance(source, str):
            raise ValueError(f"its sequence is {sequence!r:.40}, its source {source!r:.80}")
        return cls(sequence=sequence, source=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What became of a catalog: labelled + quarantined + skipped = inputs."""

    inputs: int
    labelled: int
    quarantined: int
    skipped: int
    reasons: dict[str, int]
    """Quarantined rows by error class."""
    damaged: int
    """Labelled videos of which some frames would not decode."""
    examples: tuple[tuple[str, str], ...]
    """The first quarantined rows: video_id, and reason as text."""


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


def parse_part(
    data: bytes, columns: Sequence[str] | None = None, num_classes: int | None = None
) -> tuple[Commit, pa.Table]:
    """What a part says of itself, and its rows with these columns only.

    Args:
        num_classes: of the labelling, where it is known.

    Raises:
        ValueError, TypeError, pyarrow.ArrowException: it is not what `to_part` made.
    """
    digests = _footer_start(data) - 2 * _DIGEST_BYTES
    if hashlib.sha256(data[:digests]).digest() != data[digests : digests + _DIGEST_BYTES]:
        raise ValueError("its rows are not those that were written")
    commit, table = parse_commit(data), _parse_rows(data, columns, PREDICTION_SCHEMA, num_classes)
    if table.num_columns and table.num_rows != commit.rows:
        raise ValueError(f"it has {table.num_rows} rows, and says {commit.rows}")
    return commit, table


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
    if not commit.counts.keys() <= STATUSES or not all(count >= 0 for count in commit.counts.values()):
        raise ValueError(f"its counts are {commit.counts!s:.80}")
    if commit.windows is not None:
        as_name(commit.windows, "windows")  # it is in the name of a file
    for name in ("begin_s", "end_s", "store", "decode", "model") if commit.times else ():
        as_seconds(getattr(commit.times, name), name)
    return commit


def parse_windows(data: bytes, commit: Commit, num_classes: int | None = None) -> pa.Table:
    """The rows of the windows that a commit names. Raises as `parse_part`."""
    if hashlib.sha256(data).hexdigest() != commit.windows:
        raise ValueError("its windows are not those that the unit was committed with")
    return _parse_rows(data, None, WINDOW_SCHEMA, num_classes)


def _footer_start(data: bytes) -> int:
    """Where the footer begins, behind the digests."""
    start = len(data) - _END_BYTES - int.from_bytes(data[-_END_BYTES : -len(_MAGIC)], "little")
    if data[-len(_MAGIC) :] != _MAGIC or start < 2 * _DIGEST_BYTES:
        raise ValueError("it is cut short, or no part")
    return start


def _parse_rows(data: bytes, columns: Sequence[str] | None, schema: pa.Schema, num_classes: int | None) -> pa.Table:
    table = parse_table(data, schema.names if columns is None else columns)
    for field in table.schema:
        if field.name in schema.names and not field.equals(schema.field(field.name)):
            raise ValueError(f"column {field.name} is {field.type}, expected {schema.field(field.name).type}")
    _check_values(table, num_classes)
    return table.replace_schema_metadata(None)


def _check_values(table: pa.Table, num_classes: int | None) -> None:
    """Refuse what no labelling writes, and no reader expects: rows may be a stranger's, with digests that are right."""
    for field in table.schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            raise ValueError(f"column {field.name} holds a null")
        if pa.types.is_list(field.type):
            if field.name == "scores" and num_classes is not None:
                _require(field.name, pc.equal(pc.list_value_length(column), num_classes))
            column = pc.list_flatten(column)
            if column.null_count:
                raise ValueError(f"column {field.name} holds a list with a null")
        if field.name == "row_key":
            _require(field.name, pc.match_substring_regex(column, KEY_PATTERN))
        if field.name in _SCORES:
            _require(field.name, pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, 1)))
        elif field.name in _FINITE:
            _require(field.name, pc.is_finite(column))
        elif field.name == "id_topk" and num_classes is not None:
            _require(field.name, pc.less(column, num_classes))
        if pa.types.is_int32(column.type):
            _require(field.name, pc.greater_equal(column, 0))
    if "status" in table.column_names:
        status = table.column("status")
        _require("status", pc.is_in(status, value_set=pa.array(sorted(STATUSES))))
        for name in _ANSWER & set(table.column_names):
            answered = pc.is_valid(table.column(name))
            _require(name, pc.or_(answered, pc.not_equal(status, "labelled")))
    lengths = [pc.fill_null(pc.list_value_length(table.column(name)), -1) for name in _ANSWER & set(table.column_names)]
    for other in lengths[1:]:
        _require("label_topk, id_topk or score_topk", pc.equal(lengths[0], other))


def _require(name: str, holds: Any) -> None:
    """`holds` has a truth for each value; nulls are let pass."""
    if pc.all(holds).as_py() is False:
        raise ValueError(f"column {name} holds a value that no labelling gives")
