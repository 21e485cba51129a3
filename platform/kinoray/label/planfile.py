"""Plans as they are stored: a head, and two files that it names.

    <catalog digest>.json              the head; who writes it first has made the plan
    <catalog digest>-<digest>.parquet  its units
    <catalog digest>-<digest>.keys     the keys of all units, one after the other, read where they are needed

What is easy to break: the head is the commit. The files that it names have to be there before, and have their digests
in their names, so that writers that do not agree do not meet.

And which rows of a labelling are its table: one answer for whoever reads it. The newest plan's rows come first. Behind
them come those of older plans, unless a catalog that was labelled whole since replaces theirs: it is of the same
source, or has a unit in common with it. So what has left the source shows no more, and splits or sources that were
labelled apart lie side by side. A newer row hides the older rows of its place, also while the newer catalog is
unfinished, and also when a filter drops the newer one; so rows are compared before they are filtered.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.errors import ChecksumMismatch, ObjectNotFound
from kinoray.label.keys import KEY_BYTES, Keys
from kinoray.label.plan import Plan, StoredKeys, units_of
from kinoray.label.unit import PLACE, Finished, Unit
from kinoray.storage.objects import MAX_RECORD_BYTES, MAX_TABLE_BYTES, Storage, join
from kinoray.storage.records import as_name, read_record, record_of
from kinoray.storage.tables import parse_table

__all__ = [
    "Committed",
    "StoredPlans",
    "parse_units",
    "read_shown",
    "read_shown_windows",
    "shown_plans",
    "shown_units",
    "to_units",
]

_HEAD, _UNITS, _KEYS = ".json", ".parquet", ".keys"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """plans/<catalog digest>.json."""

    catalog_digest: str
    unit_size: int
    sequence: int
    num_rows: int
    units: str
    """SHA-256 of the file with the units."""
    keys: str
    """And of that with their keys."""


class StoredPlans:
    """The folder of the plans of one labelling. All methods raise StorageError."""

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage, self._root = storage, root

    def names(self) -> Iterator[str]:
        """The digests of the catalogs that have a plan."""
        prefix = self._root + "/"
        for info in self._storage.list(prefix):
            if info.uri.endswith(_HEAD):
                yield info.uri.removeprefix(prefix).removesuffix(_HEAD)

    def put_if_absent(self, plan: Plan) -> Plan:
        """Store a plan that was just made, unless another writer was first; returns the one that stands."""
        head = self._put_files(plan)
        uri = self._uri(plan.catalog_digest, _HEAD)
        if self._storage.put_if_absent(uri, _to_json(head)):
            return plan
        standing = self._read_head(uri)
        for ours, other, kind in ((head.units, standing.units, _UNITS), (head.keys, standing.keys, _KEYS)):
            if ours != other:
                self._storage.delete(self._uri(plan.catalog_digest, kind, ours))
        return self.read(plan.catalog_digest)

    def put(self, plan: Plan) -> Plan:
        """Store a plan that was just made in place of the one that is there; returns it.

        The files of the other stay: somebody may be reading them.
        """
        head = self._put_files(plan)
        self._storage.put(self._uri(plan.catalog_digest, _HEAD), _to_json(head))
        return plan

    def _put_files(self, plan: Plan) -> _Head:
        assert plan.path is not None
        units = to_units(plan)
        with plan.path.open("rb") as file:
            keys_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        head = _Head(
            catalog_digest=plan.catalog_digest,
            unit_size=plan.unit_size,
            sequence=plan.sequence,
            num_rows=plan.num_rows,
            units=hashlib.sha256(units).hexdigest(),
            keys=keys_sha256,
        )
        self._storage.put(self._uri(plan.catalog_digest, _UNITS, head.units), units)
        self._storage.put_file(self._uri(plan.catalog_digest, _KEYS, head.keys), plan.path)
        return head

    def read(self, catalog_digest: str) -> Plan:
        """The plan of a catalog; its keys stay where they are.

        Raises:
            ObjectNotFound: there is none.
            ChecksumMismatch: it is not what was written.
        """
        uri = self._uri(catalog_digest, _HEAD)
        head = self._read_head(uri)
        if head.catalog_digest != catalog_digest:
            raise ChecksumMismatch(f"{uri} is the plan of another catalog ({head.catalog_digest}); remove it")
        try:
            units = self._uri(catalog_digest, _UNITS, as_name(head.units, "units"))
            keys = self._uri(catalog_digest, _KEYS, as_name(head.keys, "keys"))
            data = self._storage.read(units, max_bytes=MAX_TABLE_BYTES)
            if hashlib.sha256(data).hexdigest() != head.units:
                raise ValueError("its units are not those that were written")
            if self._storage.stat(keys).size_bytes != head.num_rows * KEY_BYTES:
                raise ValueError(f"it is of {head.num_rows:,} rows, and {keys} is not")
            all_keys = Keys.in_object(self._storage, keys, head.num_rows)
            found = parse_units(data, all_keys)
        except (ValueError, TypeError, ObjectNotFound, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ChecksumMismatch(f"{uri} is not what was written: {reason}; remove it, and label again") from error
        stored = StoredKeys(keys, uri, head.keys)
        return Plan(head.catalog_digest, head.unit_size, head.sequence, found, all_keys, stored=stored)

    def _read_head(self, uri: str) -> _Head:
        return read_record(self._storage, uri, record_of(_Head), MAX_RECORD_BYTES)

    def _uri(self, catalog_digest: str, kind: str, sha256: str = "") -> str:
        return join(self._root, f"{catalog_digest}{'-' if sha256 else ''}{sha256[:16]}{kind}")


def _to_json(head: _Head) -> bytes:
    return json.dumps(asdict(head), indent=1).encode()


_UNITS_SCHEMA = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_keys", pa.int64(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("last", pa.int64(), nullable=False),
        pa.field("mask", pa.binary()),
    ]
)


def to_units(plan: Plan) -> bytes:
    """The units of a plan as Parquet; their keys are apart."""
    units = plan.units
    columns = [
        pa.array([unit.unit_id for unit in units], pa.string()),
        pa.array([unit.num_rows for unit in units], pa.int64()),
        pa.array([len(unit.keys) for unit in units], pa.int64()),
        pa.array([unit.first for unit in units], pa.int64()),
        pa.array([unit.last for unit in units], pa.int64()),
        pa.array([unit.mask for unit in units], pa.binary()),
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_UNITS_SCHEMA), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def parse_units(data: bytes, keys: Keys) -> tuple[Unit, ...]:
    """What `to_units` made. Raises ValueError, TypeError or pyarrow.ArrowException: it is something else."""
    table = parse_table(data)
    if not table.schema.equals(_UNITS_SCHEMA) or any(
        table.column(field.name).null_count for field in list(_UNITS_SCHEMA)[:-1]
    ):
        raise ValueError(f"its columns are {table.schema.names}")
    columns = [table.column(name).to_pylist() for name in _UNITS_SCHEMA.names]
    num_rows, num_keys = (np.array(column, np.int64) for column in columns[1:3])
    masked = np.array([mask is not None for mask in columns[5]], np.bool_)
    if (num_keys < 1).any() or (num_rows < num_keys).any() or ((num_rows > num_keys) != masked).any():
        raise ValueError("a unit has other rows than keys")
    total = sum(columns[2])  # of Python's numbers, which do not overflow
    if total != len(keys):
        raise ValueError(f"its units have {total:,} keys, and there are {len(keys):,}")
    if len(set(columns[0])) < len(columns[0]):
        raise ValueError("two of its units have the same id")
    for unit_id, rows, kept, first, last, mask in zip(*columns, strict=True):
        as_name(unit_id, "unit_id")
        if not 0 <= first <= last < total or last - first < kept - 1:
            raise ValueError(f"unit {unit_id} has {kept} rows from {first} to {last} of {total:,}")
        if mask is not None and (len(mask) != -(-rows // 8) or int.from_bytes(mask, "little").bit_count() != kept):
            raise ValueError(f"the mask of unit {unit_id} is not of its rows")
    ends = np.cumsum(num_keys).tolist()
    return tuple(units_of(keys, ends, zip(columns[0], columns[1], *columns[3:], strict=True)))


_WINDOW = 256  # units that are prefetched, so that a slow one holds no whole table


class Committed(Protocol):
    """What is asked of a ledger here."""

    def plans(self) -> list[Plan]: ...
    def finished(self) -> dict[str, Finished]: ...
    def committed(self) -> set[str]: ...
    def read_units(self, units: Iterable[Unit], columns: list[str] | None = None) -> Iterator[pa.Table]: ...
    def read_windows(self, units: Iterable[Unit]) -> Iterator[pa.Table]: ...


def shown_plans(ledger: Committed, after: Plan | None = None, source: str = "") -> list[Plan]:
    """The plans whose finished units are the table, the newest first.

    Args:
        after: a plan that counts as if its catalog were labelled whole, last of all.
        source: what its catalog was made of.
    """
    finished = ledger.finished()
    plans = ledger.plans()
    if after is not None:
        plans = [plan for plan in plans if plan.catalog_digest != after.catalog_digest] + [after]
    sources = {digest: found.source for digest, found in finished.items()}
    if after is not None:
        sources[after.catalog_digest] = source
    shown: list[Plan] = []
    replaced_units: set[str] = set()
    replaced_sources: set[str] = set()
    for plan in reversed(plans):
        units = {unit.unit_id for unit in plan.units}
        mine = sources.get(plan.catalog_digest)
        if replaced_units.isdisjoint(units) and mine not in replaced_sources:
            shown.append(plan)
        if mine is not None:
            replaced_units |= units
        if mine:
            replaced_sources.add(mine)
    return shown


def shown_units(ledger: Committed) -> tuple[list[Unit], list[Unit]]:
    """The finished units of the newest plan, and those with rows that it does not have, cut to these rows."""
    done = ledger.committed()
    newest: list[Unit] = []
    older: list[Unit] = []
    seen: dict[str, int] = {}  # a bit a row
    for number, plan in enumerate(shown_plans(ledger)):
        for unit in plan.units:
            if unit.unit_id not in done:
                continue
            all_rows = (1 << unit.num_rows) - 1
            rows = all_rows if unit.mask is None else int.from_bytes(unit.mask, "little")
            left = rows & ~seen.get(unit.unit_id, 0)
            seen[unit.unit_id] = seen.get(unit.unit_id, 0) | rows
            if not number:
                newest.append(unit)
            elif left:
                mask = left.to_bytes(-(-unit.num_rows // 8), "little")
                older.append(replace(unit, mask=None if left == all_rows else mask))
    return newest, older


def read_shown(ledger: Committed, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The committed rows of the table, newest plan first, unit by unit in the order of its catalog.

    Args:
        columns: of PREDICTION_SCHEMA; the tables may have those of PLACE, too.

    Raises:
        IncompleteOutput, ChecksumMismatch: a part is gone, or not what was committed.
    """
    newest, older = shown_units(ledger)
    stored = list(dict.fromkeys([*columns, *(PLACE if older else ())])) or ["row_key"]
    hidden_by_none = {place for table in _read(ledger, older, list(PLACE)) for place in _places_of(table)}
    for table in _read(ledger, newest, stored):
        if hidden_by_none:
            hidden_by_none.difference_update(_places_of(table))
        yield table
    for table in _read(ledger, older if hidden_by_none else [], stored):
        shown = []
        for place in _places_of(table):
            shown.append(place in hidden_by_none)
            hidden_by_none.discard(place)
        yield table.filter(pa.array(shown, pa.bool_()))


def read_shown_windows(ledger: Committed) -> Iterator[pa.Table]:
    """The rows of the windows of the table's videos (WINDOW_SCHEMA). Raises as `read_shown`."""
    done, seen = ledger.committed(), set[str]()
    for plan in shown_plans(ledger):
        units = [unit for unit in plan.units if unit.unit_id in done and unit.unit_id not in seen]
        seen.update(unit.unit_id for unit in units)
        for start in range(0, len(units), _WINDOW):
            yield from ledger.read_windows(units[start : start + _WINDOW])


def _read(ledger: Committed, units: Sequence[Unit], columns: list[str]) -> Iterator[pa.Table]:
    for start in range(0, len(units), _WINDOW):
        yield from ledger.read_units(units[start : start + _WINDOW], columns)


def _places_of(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Where the video of each row lies."""
    return zip(*(table.column(name).to_pylist() for name in PLACE), strict=True)
