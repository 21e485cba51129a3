"""A plan: which rows of a catalog are in which unit of work, made by streaming over the catalog's keys.

Everything that has a row each lies in files of a scratch folder; in memory there is a bit a row, and what a unit takes.

What is easy to break: a unit's id names its rows, not the catalog they came from, so that a library that has grown, or
two jobs at once, share the units they have in common instead of labelling their videos twice. And every driver must
come to the same plan.
"""

import hashlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from kinoray.catalog.rows import Rows, RowsDigest, said_repeated
from kinoray.errors import CatalogError, ChecksumMismatch
from kinoray.label.keys import KEY_BYTES, Keys, Numbers, Pairs, join_pairs, key_numbers, keys_in
from kinoray.label.unit import Unit, unit_id_of

__all__ = [
    "Places",
    "Plan",
    "StoredKeys",
    "Survey",
    "are_set",
    "draft_plan",
    "gone_rows",
    "survey",
    "unfinished_keys",
    "units_of",
]

_CHUNK = 2**18  # keys that are looked at at once; of whole bytes of bits
_PLACE_BITS = 32
_SHIFT = np.uint64(_PLACE_BITS)  # of a unit's number beside the place of a row in it
_SPREAD = 16  # a unit that nobody has finished is taken over where its rows are no further apart than this
_SPREAD_ROWS = 4096

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a catalog finds."""

    digest: str
    """Names the rows and the classes."""
    keys: Keys
    """Of its rows, in their order."""


def survey(rows: Rows, folder: Path) -> Survey:
    """Read a catalog once; `folder` holds its keys, 8 bytes a row, as long as the survey is used.

    Raises:
        CatalogError: two rows have the same video_id, or are the same input.
    """
    content = RowsDigest(rows.labels)
    by_key, by_name = Pairs(folder), Pairs(folder)
    path = folder / f"keys-{uuid4().hex}"
    num_rows = 0
    with path.open("wb") as file:
        for table in rows.batches():
            content.update(table)
            numbers = key_numbers(table)
            file.write(keys_in(numbers))
            places = np.arange(num_rows, num_rows + len(numbers), dtype=np.int64)
            by_key.add(numbers, places)
            names = map(hash, table.column("video_id").to_pylist())  # by this process alone: nobody can choose it
            by_name.add(np.fromiter(names, np.int64, len(numbers)).view(np.uint64), places)
            num_rows += len(numbers)
    _refuse_repeated(rows, by_name, by_key)
    return Survey(content.hexdigest(), Keys.in_file(path))


def _refuse_repeated(rows: Rows, by_name: Pairs, by_key: Pairs) -> None:
    for hashes, places in by_name.repeated():
        same = places[hashes == hashes[0]].tolist()
        names = [_row_at(rows, place)["video_id"] for place in same]
        if count := names.count(names[0]) - 1:
            raise said_repeated(names[0], count + 1, rows, same[0], same[names.index(names[0], 1)])
    for keys, places in by_key.repeated():
        row = _row_at(rows, int(places[0]))
        count = int((keys == keys[0]).sum())
        found = " and ".join(rows.where(place) for place in places[keys == keys[0]][:2].tolist())
        raise CatalogError(
            f"{row['uri']} (video {row['video_id']}) is in the catalog {count} times ({found}); list it once"
        )


def _row_at(rows: Rows, place: int) -> dict[str, Any]:
    found: dict[str, Any] = next(rows.batches(place)).slice(0, 1).to_pylist()[0]
    return found


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """Where the keys of a plan lie, and what they were when they were written."""

    uri: str
    head: str
    """Address of the plan's head."""
    sha256: str

    def damaged(self) -> ChecksumMismatch:
        """They are others now. Without the head the plan is made again, with the same units where it can be."""
        return ChecksumMismatch(
            f"{self.uri} is not what was written: its SHA-256 is another; remove {self.head} and label again, "
            "which finds the parts that are there"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The units of a catalog: each of its rows is in exactly one of them."""

    catalog_digest: str
    """Which catalog."""
    unit_size: int
    """Rows of each unit that was cut for this plan; units taken over from older plans keep their size."""
    sequence: int
    """Its age: greater than that of every plan which was there before it was made."""
    units: tuple[Unit, ...]
    """In the order of their first row in the catalog."""
    keys: Keys
    """Of all units, one after the other."""
    path: Path | None = field(default=None, compare=False)
    """Where they lie on this machine, for a plan that was just made."""
    stored: "StoredKeys | None" = field(default=None, compare=False)
    """For a plan that was read."""

    @property
    def num_rows(self) -> int:
        """Rows of the catalog."""
        return len(self.keys)


def draft_plan(
    labelling_id: str,
    found: Survey,
    unit_size: int,
    folder: Path,
    *,
    older: Sequence[Plan] = (),
    committed: Collection[str] = (),
) -> Plan:
    """Cut a catalog into units of `unit_size` rows, after taking over what older plans of the same labelling hold.

    Taken over: finished units of which some rows are in this catalog; and units all of whose rows are, and not far
    apart (another job may be at work on them). What is left is exactly what is new.

    Args:
        labelling_id: digest of model and settings.
        folder: holds the plan's keys, as long as it is used.
        older: plans of other catalogs.
        committed: ids of finished units.
    """
    free = np.full(-(-len(found.keys) // 8), 255, np.uint8)  # a bit a row
    taken: deque[_Taken] = deque()
    if older:
        taken.extend(sorted(_take_over(found.keys, older, committed, free, folder), key=lambda unit: unit.first))
    path = folder / f"plan-{uuid4().hex}"
    ends: list[int] = []
    about: list[tuple[str, int, int, int, bytes | None]] = []
    with path.open("wb") as file:

        def put(numbers: Numbers, *of_unit: Any) -> None:
            file.write(keys_in(numbers))
            ends.append((ends[-1] if ends else 0) + len(numbers))
            about.append(of_unit)

        for places, numbers in _cut(found.keys, free, unit_size):
            while taken and taken[0].first < places[0]:
                unit = taken.popleft()
                put(unit.numbers(), unit.unit_id, unit.num_rows, unit.first, unit.last, unit.mask)
            unit_id = unit_id_of(labelling_id, numbers)
            put(numbers, unit_id, len(numbers), int(places[0]), int(places[-1]), None)
        for unit in taken:
            put(unit.numbers(), unit.unit_id, unit.num_rows, unit.first, unit.last, unit.mask)
    keys = Keys.in_file(path)
    sequence = 1 + max((plan.sequence for plan in older), default=-1)
    return Plan(found.digest, unit_size, sequence, tuple(units_of(keys, ends, about)), keys, path)


def units_of(
    keys: Keys, ends: Iterable[int], about: Iterable[tuple[str, int, int, int, bytes | None]]
) -> Iterator[Unit]:
    """Units by where their keys end, and what else they are."""
    begin = 0
    for end, (unit_id, num_rows, first, last, mask) in zip(ends, about, strict=True):
        yield Unit(unit_id, keys[begin:end], num_rows, first, last, mask)
        begin = end


def _cut(keys: Keys, free: NDArray[np.uint8], unit_size: int) -> Iterator[tuple[Places, Numbers]]:
    """The rows that are free, `unit_size` at a time: their places and keys."""
    held: list[tuple[Places, Numbers]] = []
    start = 0
    for chunk in keys.chunks(_CHUNK):
        bits = np.unpackbits(free[start // 8 : -(-(start + len(chunk)) // 8)], bitorder="little")[: len(chunk)]
        inside = np.flatnonzero(bits)
        held.append((inside + start, chunk[inside]))
        start += len(chunk)
        places, numbers = (np.concatenate(part) for part in zip(*held, strict=True))
        whole = len(places) - len(places) % unit_size
        for begin in range(0, whole, unit_size):
            yield places[begin : begin + unit_size], numbers[begin : begin + unit_size]
        held = [(places[whole:], numbers[whole:])]
    if held and len(held[0][0]):
        yield held[0]


# What older plans hold


@dataclass(frozen=True, slots=True)
class _Taken:
    """A unit of an older plan, as it is in this one."""

    unit_id: str
    num_rows: int
    first: int
    last: int
    mask: bytes | None
    path: Path
    begin: int
    count: int

    def numbers(self) -> Numbers:
        """The keys of its rows that are in this catalog."""
        return np.fromfile(self.path, np.uint64, self.count, offset=self.begin * KEY_BYTES)


class _Older:
    """The units of older plans, numbered in their order, each once."""

    def __init__(self, plans: Sequence[Plan], committed: Collection[str], folder: Path) -> None:
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.finished, self.open = Pairs(folder), Pairs(folder)
        known: set[str] = set()
        for plan in sorted(plans, key=lambda plan: (plan.sequence, plan.catalog_digest)):
            for units, numbers in _groups(plan):
                self._add(units, numbers, known, committed)

    @property
    def code_bits(self) -> int:
        """Of the number of a row in one of these units; the leading ones are the unit's."""
        return _PLACE_BITS + max(1, len(self.ids) - 1).bit_length()

    def _add(self, units: list[Unit], numbers: Numbers, known: set[str], committed: Collection[str]) -> None:
        done, waiting, codes = np.zeros(len(numbers), np.bool_), np.zeros(len(numbers), np.bool_), []
        begin = 0
        for unit in units:
            end = begin + len(unit.keys)
            inside = np.arange(end - begin, dtype=np.uint64) if unit.mask is None else _kept(unit).astype(np.uint64)
            codes.append((np.uint64(len(self.ids)) << _SHIFT) | inside)
            if unit.unit_id not in known:
                done[begin:end] = unit.unit_id in committed
                waiting[begin:end] = unit.unit_id not in committed and unit.is_whole
            known.add(unit.unit_id)
            self.ids.append(unit.unit_id)
            self.sizes.append(unit.num_rows)
            begin = end
        values = np.concatenate(codes).view(np.int64)
        self.finished.add(numbers[done], values[done])
        self.open.add(numbers[waiting], values[waiting])


def _groups(plan: Plan) -> Iterator[tuple[list[Unit], Numbers]]:
    """The units of a plan with their keys, some at a time. Raises ChecksumMismatch at the end: the keys are damaged."""
    group: list[Unit] = []
    begin = end = 0
    digest = hashlib.sha256()

    def numbers() -> Numbers:
        found = plan.keys[begin:end].numbers()
        digest.update(keys_in(found))
        return found

    for unit in plan.units:
        group.append(unit)
        end += len(unit.keys)
        if end - begin >= _CHUNK:
            yield group, numbers()
            group, begin = [], end
    if group:
        yield group, numbers()
    if plan.stored is not None and digest.hexdigest() != plan.stored.sha256:
        raise plan.stored.damaged()


def unfinished_keys(plan: Plan, committed: Collection[str]) -> Numbers:
    """The keys of the units that are not finished, uint64 [N]."""
    found = [np.empty(0, np.uint64)]
    for units, numbers in _groups(plan):
        left = [unit.unit_id not in committed for unit in units]
        found.append(numbers[np.repeat(left, [len(unit.keys) for unit in units])])
    return np.concatenate(found)


def _kept(unit: Unit) -> Places:
    """Which rows of a unit's part are in the plan's catalog, by their place in it."""
    assert unit.mask is not None
    return np.flatnonzero(np.unpackbits(np.frombuffer(unit.mask, np.uint8), bitorder="little"))


def _located(keys: Keys, folder: Path) -> Pairs:
    here, start = Pairs(folder), 0
    for chunk in keys.chunks(_CHUNK):
        here.add(chunk, np.arange(start, start + len(chunk), dtype=np.int64))
        start += len(chunk)
    return here


def _matches(units: Pairs, here: Pairs) -> Iterator[tuple[Numbers, Numbers, Places]]:
    """(key, row in a unit, row in the catalog) of every key that both have; of several units the first."""
    for (keys, values), (known, places) in join_pairs(units, here):
        if not len(known) or not len(keys):
            continue
        first = np.insert(keys[1:] != keys[:-1], 0, True)
        keys, codes = keys[first], values[first].view(np.uint64)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        met = known[at] == keys
        yield keys[met], codes[met], places[at[met]]


def are_set(bits: NDArray[np.uint8], places: Places) -> NDArray[np.bool_]:
    """Whether the bits at these places are set."""
    return np.asarray(bits[places >> 3] >> (places & 7).astype(np.uint8) & 1, np.bool_)


def _take(free: NDArray[np.uint8], places: Places) -> None:
    np.bitwise_and.at(free, places >> 3, ~(np.uint8(1) << (places & 7).astype(np.uint8)))


def _take_over(
    keys: Keys, plans: Sequence[Plan], committed: Collection[str], free: NDArray[np.uint8], folder: Path
) -> Iterator[_Taken]:
    """The units that this catalog shares with older plans; their rows are no longer free."""
    older, here = _Older(plans, committed, folder), _located(keys, folder)
    bits = older.code_bits
    rows, names = Pairs(folder, bits), Pairs(folder, bits)  # by row in a unit: row in the catalog, and key
    for numbers, codes, places in _matches(older.finished, here):
        rows.add(codes, places)
        names.add(codes, numbers.view(np.int64))
        _take(free, places)

    maybe_rows, maybe_names = Pairs(folder, bits), Pairs(folder, bits)
    count = np.zeros(len(older.ids), np.int64)
    lowest, highest = np.full(len(count), len(keys), np.int64), np.zeros(len(count), np.int64)
    for numbers, codes, places in _matches(older.open, here):
        left = are_set(free, places)
        unit = (codes[left] >> _SHIFT).astype(np.int64)
        np.add.at(count, unit, 1)
        np.minimum.at(lowest, unit, places[left])
        np.maximum.at(highest, unit, places[left])
        maybe_rows.add(codes[left], places[left])
        maybe_names.add(codes[left], numbers[left].view(np.int64))
    sizes = np.array(older.sizes, np.int64)
    fits = (count == sizes) & (highest - lowest < _SPREAD * sizes + _SPREAD_ROWS)
    for (codes, places), (_, numbers_found) in zip(maybe_rows.buckets(), maybe_names.buckets(), strict=True):
        chosen = fits[(codes >> _SHIFT).astype(np.int64)]
        rows.add(codes[chosen], places[chosen])
        names.add(codes[chosen], numbers_found[chosen])
        _take(free, places[chosen])
    yield from _grouped(older, rows, names, folder / f"taken-{uuid4().hex}")


def _grouped(older: _Older, rows: Pairs, names: Pairs, path: Path) -> Iterator[_Taken]:
    """One unit for all rows of the same, which come one after the other; their keys go to a file."""
    begin = 0
    with path.open("wb") as file:
        for unit, codes, places, numbers in _runs(rows, names):
            numbers.tofile(file)
            file.flush()
            mask = None
            if len(codes) < older.sizes[unit]:
                bits = np.zeros(older.sizes[unit], np.uint8)
                bits[codes & np.uint64(2**32 - 1)] = 1
                mask = np.packbits(bits, bitorder="little").tobytes()
            first, last = int(places.min()), int(places.max())
            yield _Taken(older.ids[unit], older.sizes[unit], first, last, mask, path, begin, len(codes))
            begin += len(codes)


def _runs(rows: Pairs, names: Pairs) -> Iterator[tuple[int, Numbers, Places, Numbers]]:
    held: tuple[Numbers, Places, Numbers] = (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint64))
    bits = rows.bits
    for (codes, places), (_, numbers) in zip(rows.buckets(bits), names.buckets(bits), strict=True):
        all_codes = np.concatenate([held[0], codes])
        all_places = np.concatenate([held[1], places])
        all_numbers = np.concatenate([held[2], numbers.view(np.uint64)])
        units = (all_codes >> _SHIFT).astype(np.int64)
        starts = [0, *(np.flatnonzero(units[1:] != units[:-1]) + 1).tolist()] if len(units) else []
        for start, end in pairwise(starts):  # the last may go on in the next bucket
            yield int(units[start]), all_codes[start:end], all_places[start:end], all_numbers[start:end]
        last = starts[-1] if starts else 0
        held = all_codes[last:], all_places[last:], all_numbers[last:]
    if len(held[0]):
        yield int(held[0][0] >> _SHIFT), *held


def gone_rows(
    keys: Keys, plans: Sequence[Plan], committed: Collection[str], folder: Path
) -> Iterator[tuple[str, Places]]:
    """Finished units of which rows are not in a catalog with these keys: unit id, places of these rows in its part."""
    older, here = _Older(plans, committed, folder), _located(keys, folder)
    gone = Pairs(folder, older.code_bits)
    for (numbers, codes), (known, _) in join_pairs(older.finished, here):
        missing = ~np.isin(numbers, known)
        gone.add(codes[missing].view(np.uint64), codes[missing])
    for unit, found, *_ in _runs(gone, gone):
        yield older.ids[unit], (found & np.uint64(2**32 - 1)).astype(np.int64)
