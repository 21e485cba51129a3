"""Rows of a result table as a stream: filtered unit by unit, with only the columns that are asked for.

What is easy to break: where several catalogs were labelled into one place, a newer row hides the older rows of its
place, also when a filter drops the newer one; so rows are compared before they are filtered.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.errors import ConfigError
from kinoray.label.ledger import PLACE, Ledger, leave_out_seen
from kinoray.label.unit import PREDICTION_SCHEMA, WINDOW_SCHEMA

__all__ = [
    "BAD_VIDEO",
    "LABEL_SCHEMA",
    "WINDOW_LABEL_SCHEMA",
    "Where",
    "class_names",
    "first_item",
    "is_multi_label",
    "scan",
    "scan_windows",
]

BAD_VIDEO = "__bad__"
"""What a correction calls a video that should not be in a set at all."""

_FIRST = {"label": "label_topk", "score": "score_topk"}
_WINDOW = 256  # units that are fetched ahead of the reader, so that a slow one holds no whole table


def _with_first(schema: pa.Schema, after: str) -> pa.Schema:
    fields = list(schema)
    place = schema.get_field_index(after) + 1
    first = [pa.field("label", pa.string()), pa.field("score", pa.float32())]
    return pa.schema([*fields[:place], *first, *fields[place:]])


LABEL_SCHEMA: pa.Schema = _with_first(PREDICTION_SCHEMA, "status")
"""PREDICTION_SCHEMA with the likeliest class and its probability as columns of their own; null where not labelled."""

WINDOW_LABEL_SCHEMA: pa.Schema = _with_first(WINDOW_SCHEMA, "end_s")
"""WINDOW_SCHEMA with the same two columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Which rows are wanted; what is left out does not matter."""

    status: tuple[str, ...] = ()
    """labelled, quarantined, skipped, or abstained (rows with that flag)."""
    label: tuple[str, ...] = ()
    """Names of the first class."""
    score: tuple[float | None, float | None] = (None, None)
    """Least and greatest."""
    margin: tuple[float | None, float | None] = (None, None)
    """Least and greatest."""
    video_id: str = ""
    """A pattern with * ? and [...]."""

    @property
    def columns(self) -> list[str]:
        """Columns that `mask` looks at."""
        used = [name for name in ("score", "margin") if getattr(self, name) != (None, None)]
        used += [name for name in ("label", "video_id") if getattr(self, name)]
        return used + (["status", "abstained"] if self.status else [])

    def mask(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        """True where a row is wanted."""
        keep: Any = pa.array([True] * len(table), pa.bool_())
        if self.status:
            said = pc.is_in(table["status"], value_set=pa.array(self.status, pa.string()))
            keep = pc.or_(said, table["abstained"]) if "abstained" in self.status else said
        if self.label:
            keep = pc.and_(keep, pc.is_in(table["label"], value_set=pa.array(self.label, pa.string())))
        for name in ("score", "margin"):
            least, most = getattr(self, name)
            if least is not None:
                keep = pc.and_(keep, pc.greater_equal(table[name], pa.scalar(least, pa.float32())))
            if most is not None:
                keep = pc.and_(keep, pc.less_equal(table[name], pa.scalar(most, pa.float32())))
        if self.video_id:
            fits = re.compile(fnmatch.translate(self.video_id)).match
            ids = table["video_id"].to_pylist()
            keep = pc.and_(keep, pa.array([fits(video_id) is not None for video_id in ids], pa.bool_()))
        return pc.fill_null(keep, False)


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
    plans, done = ledger.plans(), ledger.committed()
    several = len(plans) > 1
    wanted = dict.fromkeys([*columns, *where.columns, *(PLACE if several else ())])
    stored = list(dict.fromkeys(_FIRST.get(name, name) for name in wanted)) or ["row_key"]
    places: set[tuple[Any, ...]] = set()
    for plan in reversed(plans):
        units = [unit for unit in plan.units if unit.unit_id in done]
        for start in range(0, len(units), _WINDOW):
            for table in ledger.read_units(units[start : start + _WINDOW], stored):
                if several:
                    table = leave_out_seen(table, places)
                yield _select(table, columns, where)


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
    done, seen = ledger.committed(), set[str]()
    for plan in reversed(ledger.plans()):
        units = [unit for unit in plan.units if unit.unit_id in done and unit.unit_id not in seen]
        seen.update(unit.unit_id for unit in units)
        for start in range(0, len(units), _WINDOW):
            for table in ledger.read_windows(units[start : start + _WINDOW]):
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
