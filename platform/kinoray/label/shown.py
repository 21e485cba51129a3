"""Which rows of a labelling are its table: one answer for whoever reads it.

The newest plan's rows come first. Behind them come those of older plans, unless a catalog that was labelled whole since
replaces theirs: it is of the same source, or has a unit in common with it. So what has left the source shows no more,
and splits or sources that were labelled apart lie side by side.

What is easy to break: a newer row hides the older rows of its place, also while the newer catalog is unfinished, and
also when a filter drops the newer one; so rows are compared before they are filtered.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa

from kinoray.label.plan import Plan
from kinoray.label.unit import PLACE, Finished, Unit

__all__ = ["Committed", "read_shown", "read_shown_windows", "shown_plans", "shown_units"]

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
