"""`kinoray labels select`: which videos to label next, from margins and embeddings.

The rows are read as a stream; of each class, or of all, the most doubtful are held. What is easy to break: a video that
was corrected is never chosen again, and what is chosen lies far from it, too; and a file that somebody has filled in
is never written over.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.source import decode_text, parse_table_text
from kinoray.console import many
from kinoray.errors import CatalogError, ConfigError, ObjectNotFound
from kinoray.library.config import SelectConfig
from kinoray.library.labels import put_rows
from kinoray.library.similar import Vectors
from kinoray.library.vectors import far_apart
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, absolute
from kinoray.storage.records import require_file

__all__ = ["select", "to_label_next"]

_POOL = 10  # times the budget: so many of the most doubtful rows may be chosen
_DROP_ROWS = 8192  # that are gathered before those beyond the pool are dropped
_WRITTEN = ("video_id", "uri", "label", "score", "margin")


def select(config: SelectConfig) -> dict[str, Any]:
    """Write the videos to label next.

    Returns:
        `root`, `candidates`, `selected`, and of each class that the network names how many are `chosen`.

    Raises:
        ConfigError: there are no embeddings; or `out` is there and is no list without labels.
        CatalogError: a file of corrections has no column row_key, or is of other videos, or all videos are in it.
        KinorayError: something cannot be read or written.
    """
    storage = Storage(config.storage)
    require_file("out", config.out)
    _require_unfilled(storage, config.out)
    known = _row_keys(storage, config.corrections)
    vectors = Vectors(storage, config.predictions, config.cache)
    shares = {"": config.budget}
    if config.stratified:
        counts: Counter[str] = Counter()
        for rows, _ in vectors:
            counts.update(_strata(rows.filter(_are_candidates(rows, known)), config))
        shares = _shares(counts, config.budget)
    pools = {name: _Pool(_POOL * share) for name, share in shares.items()}
    known_vectors: list[np.ndarray] = []
    num_candidates = num_known = 0
    for rows, vectors_ND in vectors:
        is_known = _are_known(rows, known).to_numpy()
        num_known += int(is_known.sum())
        known_vectors.append(vectors_ND[is_known])
        is_candidate = _are_candidates(rows, known).to_numpy()
        num_candidates += int(is_candidate.sum())
        strata = np.array(_strata(rows, config), object)
        for name in shares.keys() & set(strata):
            mine = np.flatnonzero(is_candidate & (strata == name))
            pools[name].add(rows.take(mine), vectors_ND[mine])
    if len(known) and not num_known:
        raise CatalogError(
            f"corrections: none of {many(len(known), 'row_key')} in {', '.join(config.corrections)} is of a video of "
            f"{vectors.ledger.root} with an embedding; were they made from another table?"
        )
    seen = np.concatenate(known_vectors)
    chosen: list[pa.Table] = []
    for name, pool in pools.items():
        for rows, vectors_ND in pool.rows():
            places = to_label_next(rows["margin"].to_numpy(), vectors_ND, shares[name], seen)
            chosen.append(rows.take(places))
            seen = np.concatenate([seen, vectors_ND[places]])
    if not chosen:
        raise CatalogError(f"{vectors.ledger.root} has no labelled video with an embedding that is not corrected yet")
    table = pa.concat_tables(chosen)
    out = table.select(["row_key"]).append_column("label", pa.array([""] * len(table)))
    for name in _WRITTEN:
        out = out.append_column("predicted" if name == "label" else name, table[name])
    put_rows(storage, "csv", config.out, [out], out.schema)
    margins = pc.min_max(table["margin"]).as_py()
    strange = f"; {many(len(known) - num_known, 'correction')} of no such video" if num_known < len(known) else ""
    print(
        f"labels select: {len(out):,} of {many(num_candidates, 'labelled video')}, with margins from "
        f"{margins['min']:.3f} to {margins['max']:.3f}{vectors.said_of_others()}{strange}; fill in the column label, "
        f"and give the file to kinoray correct --corrections",
        flush=True,
    )
    named = Counter(table["label"].to_pylist())
    return {"root": vectors.ledger.root, "candidates": num_candidates, "selected": len(out), "chosen": dict(named)}


def _require_unfilled(storage: Storage, out: str) -> None:
    """Raises ConfigError: what is there is no list that select wrote, or one that somebody has filled in."""
    uri = absolute(out)
    try:
        data = storage.read(uri, max_bytes=MAX_TABLE_BYTES)
    except ObjectNotFound:
        return
    if not data.strip():
        return
    try:
        table = parse_table_text(uri, decode_text(uri, data), ("row_key",), "there is no column row_key")
        num_filled = sum(bool(record.cells["label"].strip()) for record in table.records)
    except (CatalogError, KeyError):
        raise ConfigError(f"out: {out} is there, and is no list of this verb's: choose another name") from None
    if num_filled:
        raise ConfigError(f"out: {out} has {many(num_filled, 'label')} that somebody filled in: choose another name")


def to_label_next(margins_N: np.ndarray, vectors_ND: np.ndarray, budget: int, known_KD: np.ndarray) -> np.ndarray:
    """Of rows that are not labelled yet those to label next, int64 [budget], the most wanted first.

    Args:
        margins_N: 0 .. 1.
        vectors_ND: embeddings, float16.
        known_KD: those of what has been labelled.
    """
    doubtful = np.sort(np.argsort(margins_N, kind="stable")[: _POOL * budget])
    chosen: np.ndarray = doubtful[far_apart(vectors_ND[doubtful], 1 - margins_N[doubtful], budget, known_KD)]
    return chosen


def _strata(rows: pa.Table, config: SelectConfig) -> list[str]:
    """The class of each row; "" where none is named, or where classes do not count."""
    return pc.fill_null(rows["label"], "").to_pylist() if config.stratified else [""] * len(rows)


def _row_keys(storage: Storage, uris: Sequence[str]) -> pa.Array:
    """The row_keys of files of corrections, without their letter, which early tables did not have."""
    keys: set[str] = set()
    for uri in uris:
        text = decode_text(uri, storage.read(absolute(uri), max_bytes=MAX_TABLE_BYTES))
        remedy = "expected a CSV of corrections, with the column row_key"
        table = parse_table_text(uri, text, ("row_key",), f"there is no column row_key; {remedy}")
        keys.update(record.cells["row_key"].strip().removeprefix("k") for record in table.records)
    return pa.array(sorted(keys), pa.string())


def _are_known(rows: pa.Table, known: pa.Array) -> pa.ChunkedArray:
    """True where a correction names the row."""
    return pc.is_in(pc.utf8_ltrim(rows["row_key"], "k"), value_set=known)


def _are_candidates(rows: pa.Table, known: pa.Array) -> pa.ChunkedArray:
    """True where a network answered, and nobody has corrected it."""
    return pc.and_not(pc.is_valid(rows["margin"]), _are_known(rows, known))


def _shares(counts: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many of each class: the same number, and what a class has not goes to the others.

    Where the budget is smaller than the number of classes, the rarest come first.
    """
    shares: dict[str, int] = {}
    left = budget
    order = sorted(counts, key=lambda name: (counts[name], name))
    for number, name in enumerate(order):
        shares[name] = min(counts[name], -(-left // (len(order) - number)))
        left -= shares[name]
    return {name: share for name, share in sorted(shares.items()) if share}


class _Pool:
    """The rows of a stream with the smallest margins; of equal ones the first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tables: list[pa.Table] = []
        self._vectors: list[np.ndarray] = []
        self._num_held = 0

    def add(self, rows: pa.Table, vectors_ND: np.ndarray) -> None:
        """Look at the next rows."""
        if not len(rows):
            return
        self._tables.append(rows)
        self._vectors.append(vectors_ND)
        self._num_held += len(rows)
        if self._num_held > self._limit + _DROP_ROWS:
            self._drop()

    def rows(self) -> list[tuple[pa.Table, np.ndarray]]:
        """The rows and their embeddings, float16 [N, D], together; nothing where there are none."""
        if self._tables:
            self._drop()
        return list(zip(self._tables, self._vectors, strict=True))

    def _drop(self) -> None:
        rows = pa.concat_tables(self._tables)
        vectors_ND = np.concatenate(self._vectors)
        order = np.argsort(rows["margin"].to_numpy(), kind="stable")[: self._limit]
        order.sort()  # the order of the stream, so that of equal ones the first stays the first
        self._tables = [rows.take(order)]
        self._vectors = [vectors_ND[order]]
        self._num_held = len(order)
