"""Which rows of a catalog make up which unit of work: pure functions, so that every driver comes to the same plan.

What is easy to break: a unit's id names its rows, not the catalog they came from, so that a library that has grown, or
two jobs at once, share the units they have in common instead of labelling their videos twice.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import eq
from typing import Any

import pyarrow as pa

from kinoray.config.shared import digest
from kinoray.errors import CatalogError
from kinoray.storage.records import as_name

__all__ = ["Plan", "Unit", "make_plan", "row_keys"]

_KEY_COLUMNS = ("video_id", "uri", "offset", "length", "size_bytes", "sha256")
_SLICE_ROWS = 4096


def row_keys(table: pa.Table) -> list[str]:
    """16 hex digits for each row of a catalog's table: the same name, place and size (and checksum) give the same key.

    A file that was replaced by one of another size is therefore another input, and is labelled again.

    Raises:
        CatalogError: two rows are the same input.
    """
    keys: list[str] = []
    for start in range(0, table.num_rows, _SLICE_ROWS):  # the columns as Python's objects are ten times the keys
        part = table.slice(start, _SLICE_ROWS)
        columns = [part.column(name).to_pylist() for name in _KEY_COLUMNS]
        keys += [digest(list(row)) for row in zip(*columns, strict=True)]
    if len(set(keys)) < len(keys):
        key, count = Counter(keys).most_common(1)[0]
        video_id, uri = (table.column(name)[keys.index(key)].as_py() for name in ("video_id", "uri"))
        raise CatalogError(f"{uri} (video {video_id}) is in the catalog {count} times; list it once")
    return keys


@dataclass(frozen=True, slots=True)
class Unit:
    """What is labelled and committed at once."""

    unit_id: str
    """Digest of the labelling and of all rows of the unit."""
    keys: tuple[str, ...]
    """Its rows that belong to the plan's catalog, in order."""
    num_rows: int
    """All its rows: more than `keys` where a finished unit also holds videos that have left the catalog."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its rows are in the catalog (else it can be read, but not labelled)."""
        return len(self.keys) == self.num_rows


@dataclass(frozen=True, slots=True)
class Plan:
    """The units of a catalog: each of its rows is in exactly one of them."""

    catalog_digest: str
    """Which catalog."""
    unit_size: int
    """Rows of each unit that was cut for this plan; units taken over from older plans keep their size."""
    sequence: int
    """How many plans there were before this one."""
    units: tuple[Unit, ...]
    """In the order of their first row in the catalog."""

    @property
    def num_rows(self) -> int:
        """Rows of the catalog."""
        return sum(len(unit.keys) for unit in self.units)

    def covers(self, keys: Sequence[str]) -> bool:
        """Whether each key is in exactly one unit, once, and nothing else is."""
        if self.num_rows != len(keys):
            return False
        if all(map(eq, keys, self._keys())):  # in the order of the catalog, as in most plans: nothing is copied
            return True
        return sorted(keys) == sorted(self._keys())

    def _keys(self) -> Iterator[str]:
        return chain.from_iterable(unit.keys for unit in self.units)

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        units = [{"unit_id": unit.unit_id, "num_rows": unit.num_rows, "keys": list(unit.keys)} for unit in self.units]
        return {
            "catalog_digest": self.catalog_digest,
            "unit_size": self.unit_size,
            "sequence": self.sequence,
            "units": units,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Plan":
        """What `to_record` gave."""
        digest, unit_size, sequence = (record[name] for name in ("catalog_digest", "unit_size", "sequence"))
        if not (type(unit_size) is int and type(sequence) is int and isinstance(record["units"], list)):
            raise TypeError("unit_size and sequence must be whole numbers, units a list")
        return cls(as_name(digest, "catalog_digest"), unit_size, sequence, tuple(map(_to_unit, record["units"])))


def _to_unit(record: dict[str, Any]) -> Unit:
    keys, num_rows = record["keys"], record["num_rows"]
    if type(num_rows) is not int or not isinstance(keys, list) or set(map(type, keys)) != {str}:
        raise TypeError("num_rows of a unit must be a whole number, its keys a list of texts")
    if num_rows < len(keys):
        raise ValueError(f"a unit has {num_rows} rows and {len(keys)} keys")
    return Unit(as_name(record["unit_id"], "unit_id"), tuple(keys), num_rows)


def make_plan(
    labelling_id: str,
    catalog_digest: str,
    keys: Sequence[str],
    unit_size: int,
    *,
    older: Sequence[Plan] = (),
    committed: Collection[str] = (),
) -> Plan:
    """Cut a catalog into units of `unit_size` rows, after taking over what older plans of the same labelling hold.

    Taken over: units whose rows are all in this catalog (finished or not: another job may be at work on them), and
    finished units of which some rows are. What is left is exactly what is new.

    Args:
        labelling_id: digest of model and settings.
        keys: `row_keys` of the catalog, in order.
        older: plans of other catalogs.
        committed: ids of finished units.
    """
    position = {key: row for row, key in enumerate(keys)}
    older_units = [
        unit for plan in sorted(older, key=lambda plan: (plan.sequence, plan.catalog_digest)) for unit in plan.units
    ]
    free = set(keys)
    taken: dict[str, Unit] = {}
    for finished in (True, False):  # what is finished first, so that no unfinished unit repeats a row of it
        for unit in older_units:
            mine = tuple(key for key in unit.keys if key in free)
            fits = unit.unit_id in committed if finished else len(mine) == unit.num_rows
            if mine and fits and unit.unit_id not in taken:
                taken[unit.unit_id] = Unit(unit.unit_id, mine, unit.num_rows)
                free.difference_update(mine)
    units = list(taken.values())
    new = [key for key in keys if key in free]
    for start in range(0, len(new), unit_size):
        part = tuple(new[start : start + unit_size])
        units.append(Unit(digest([labelling_id, *part]), part, len(part)))
    units.sort(key=lambda unit: position[unit.keys[0]])
    return Plan(catalog_digest, unit_size, len(older), tuple(units))
