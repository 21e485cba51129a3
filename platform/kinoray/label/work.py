"""What the driver of a labelling hands to its workers, units with their rows, and what it hears from the first of them.

What is easy to break: the driver needs no torch, which takes seconds and most of a gigabyte. So nothing here imports
it, and what only the built network knows comes from a worker as plain values.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.catalog.rows import Rows
from kinoray.catalog.table import REFERENCE_COLUMNS
from kinoray.config.scoring import ScorerConfig, SegmentConsensus, ViewsConfig
from kinoray.config.shared import ClipConfig
from kinoray.errors import CatalogError, IncompleteOutput
from kinoray.label.answers import AnswerRule
from kinoray.label.keys import Keys, Numbers, key_numbers
from kinoray.label.plan import Places, StoredKeys, are_set
from kinoray.label.unit import Unit, unit_id_of
from kinoray.storage.objects import Storage

__all__ = ["UNIT_COLUMNS", "LabelJob", "NetworkFacts", "pack_unit", "rows_in", "work_of"]

UNIT_COLUMNS = ("video_id", *REFERENCE_COLUMNS)
"""Columns of a catalog that a worker needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelJob:
    """What all workers of a job share; small, since it is pickled to each."""

    storage: Storage
    root: str
    """Folder of the labelling, where units are committed; "" where nothing is to be kept."""
    checkpoint: str
    model_digest: str
    config_digest: str
    run_id: str
    clip: ClipConfig
    num_decoders: int
    """Decoder processes of each worker."""
    torch_threads: int
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    answer: AnswerRule = field(default_factory=AnswerRule)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    device: str = "cpu"
    allow_factory: tuple[str, ...] = ()
    """Networks that do not ship with kinoray, and that the checkpoint may name."""
    protocol: str = ""
    """What the clip is of, for messages."""
    clips_a_worker: int = 0
    """About so many, for advice on compiling."""


def pack_unit(unit: Unit, rows: pa.Table) -> dict[str, Any]:
    """A unit as one row of a Dataset: references, never bytes of videos.

    Args:
        rows: the unit's rows of the catalog, in its order.
    """
    table = rows.select(list(UNIT_COLUMNS)).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"unit_id": unit.unit_id, "keys": list(unit.keys), "rows": sink.getvalue().to_pybytes()}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFacts:
    """What only the built network knows of a labelling."""

    consensus: SegmentConsensus | None
    """How it makes one answer of its segments; None for one that sees them together."""
    advice: tuple[str, ...]
    """Lines for people: where a flag contradicts what the network was made for, and whether compiling would pay."""


# Units with their rows


def work_of(
    rows: Rows, keys: Keys, labelling_id: str, units: Iterable[Unit], stored: StoredKeys | None = None
) -> Iterator[tuple[Unit, pa.Table]]:
    """Units with their keys at hand, and with their rows (CATALOG_SCHEMA), in the order of the unit.

    Row groups of the catalog in which no unit has a row are not read.

    Args:
        rows: the catalog.
        keys: of the catalog, from its `survey`.
        stored: of the units.

    Raises:
        ChecksumMismatch: the keys of a unit are not those that were stored.
        IncompleteOutput: a unit holds videos that have left the catalog.
        CatalogError: the catalog is another one than when it was surveyed.
    """
    cursor = _Cursor(rows)
    for unit in units:
        if not unit.is_whole:
            raise IncompleteOutput(
                f"unit {unit.unit_id} was finished and its part is gone, with rows of videos that have left the "
                "catalog; run the same command again, which labels those that have not"
            )
        numbers, places = _places(unit, keys, labelling_id)
        if stored is not None and unit_id_of(labelling_id, numbers) != unit.unit_id:
            raise stored.damaged()
        table = cursor.take(places)
        if len(table) != len(numbers) or (key_numbers(table) != numbers).any():
            raise CatalogError("the catalog has changed while it was read; run the same command again")
        yield Unit(unit.unit_id, tuple(Keys.of(numbers)), unit.num_rows), table


def rows_in(rows: Rows, keys: Keys, labelling_id: str, units: Iterable[Unit]) -> Iterator[pa.Table]:
    """The rows of all these units, in the order of the catalog, a few at a time; each must be whole."""
    wanted = np.zeros(-(-len(keys) // 8), np.uint8)  # a bit a row
    for unit in units:
        together = unit.last - unit.first + 1 == len(unit.keys)
        _set_bits(wanted, np.arange(unit.first, unit.last + 1) if together else _places(unit, keys, labelling_id)[1])
    start = 0
    for table in rows.batches():
        places = np.flatnonzero(are_set(wanted, np.arange(start, start + table.num_rows)))
        start += table.num_rows
        if len(places):
            yield table if len(places) == table.num_rows else table.take(pa.array(places))


def _set_bits(bits: NDArray[np.uint8], places: Places) -> None:
    np.bitwise_or.at(bits, places >> 3, np.uint8(1) << (places & 7).astype(np.uint8))


def _places(unit: Unit, keys: Keys, labelling_id: str) -> tuple[Numbers, Places]:
    """The keys of a unit, and its rows in the catalog."""
    if unit.last - unit.first + 1 == len(unit.keys):
        numbers = keys[unit.first : unit.last + 1].numbers()
        if unit_id_of(labelling_id, numbers) == unit.unit_id:  # so the stored keys need not be fetched
            return numbers, np.arange(unit.first, unit.last + 1)
    assert isinstance(unit.keys, Keys)
    wanted = unit.keys.numbers()
    order = np.argsort(wanted)
    places = np.full(len(wanted), -1, np.int64)
    start = unit.first
    for chunk in keys[unit.first : unit.last + 1].chunks():
        at = np.minimum(np.searchsorted(wanted, chunk, sorter=order), len(wanted) - 1)
        met = wanted[order[at]] == chunk
        places[order[at[met]]] = np.flatnonzero(met) + start
        start += len(chunk)
    return wanted, places[places >= 0]


class _Cursor:
    """Rows by their number; going on is cheap, going back starts anew."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._batches: Iterator[pa.Table] = iter(())
        self._table: pa.Table | None = None
        self._begin = 0

    def take(self, places: Places) -> pa.Table:
        """The rows at these places, in their order."""
        order = np.argsort(places, kind="stable")
        ascending = places[order]
        parts: list[pa.Table] = []
        at = 0
        while at < len(ascending):
            table = self._at(int(ascending[at]))
            end = int(np.searchsorted(ascending, self._begin + table.num_rows))
            parts.append(table.take(pa.array(ascending[at:end] - self._begin)))
            at = end
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(parts).combine_chunks().take(pa.array(back))

    def _at(self, place: int) -> pa.Table:
        """The batch that holds a row."""
        table = self._table
        if table is None or not self._begin <= place:
            table = self._open(place)
        elif place >= self._begin + table.num_rows:
            self._begin += table.num_rows
            following = next(self._batches, None)
            table = self._table = following
            if table is None or place >= self._begin + table.num_rows:
                table = self._open(place)
        return table

    def _open(self, place: int) -> pa.Table:
        self._begin, self._batches = place, self._rows.batches(place)
        self._table = next(self._batches)
        return self._table
