"""Pairs of 64-bit numbers, any many, read back in the order of the first: sorted in runs on disk, in bounded memory.

What is easy to break: two sets that are joined must be cut at the same numbers, so buckets are ranges of the first
number, and how many there are is said by whoever joins them.
"""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pairs", "join_pairs"]

_RUN = 2**18  # pairs that are held and sorted at once
_MAX_BITS = 16
_WIDTH = 8  # bytes

Numbers = NDArray[np.uint64]
Values = NDArray[np.int64]


class Pairs:
    """Pairs (key, value): added in any order, read back by `buckets`, of equal keys in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds what is not in memory; it is the caller's, to be removed when all is done."""
        self._path = folder / f"pairs-{uuid4().hex}"
        self._held: list[tuple[Numbers, Values]] = []
        self._num_held = 0
        self._runs: list[int] = [0]  # where each begins, and the end of the last

    def __len__(self) -> int:
        return self._runs[-1] + self._num_held

    def add(self, keys: Numbers, values: Values) -> None:
        """Add pairs: uint64 [N] and int64 [N]."""
        for start in range(0, len(keys), _RUN):
            part = keys[start : start + _RUN]
            self._held.append((part, values[start : start + _RUN]))
            self._num_held += len(part)
            if self._num_held >= _RUN:
                self._flush()

    @property
    def bits(self) -> int:
        """How many leading bits cut these pairs into buckets that are held easily."""
        return min(_MAX_BITS, max(0, (len(self) // _RUN).bit_length()))

    def buckets(self, bits: int | None = None) -> Iterator[tuple[Numbers, Values]]:
        """The pairs in ranges of their keys, each range sorted by key; empty ones too: 2 ** bits in all."""
        bits = self.bits if bits is None else bits
        held = self._sorted()
        edges = np.arange(1, 2**bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, np.uint64)
        runs = [*self._cut_runs(edges), _cut(held[0], edges)]
        for bucket in range(2**bits):
            keys, values = [], []
            for run, cuts in enumerate(runs):
                begin, end = cuts[bucket], cuts[bucket + 1]
                if begin == end:
                    continue
                if run == len(runs) - 1:
                    found = held[0][begin:end], held[1][begin:end]
                else:
                    found = self._read(run, begin, end)
                keys.append(found[0])
                values.append(found[1])
            if len(keys) == 1:
                yield keys[0], values[0]
            elif keys:
                yield _sort(np.concatenate(keys), np.concatenate(values))
            else:
                yield np.empty(0, np.uint64), np.empty(0, np.int64)

    def repeated(self) -> Iterator[tuple[Numbers, Values]]:
        """The pairs whose key is there more than once, a bucket at a time."""
        for keys, values in self.buckets():
            equal = keys[1:] == keys[:-1]
            if equal.any():
                several = np.append(equal, False) | np.insert(equal, 0, False)
                yield keys[several], values[several]

    def _sorted(self) -> tuple[Numbers, Values]:
        if not self._held:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        found = _sort(*(np.concatenate(part) for part in zip(*self._held, strict=True)))
        self._held = [found]
        return found

    def _flush(self) -> None:
        keys, values = self._sorted()
        with self._path.open("ab") as file:
            keys.tofile(file)
            values.tofile(file)
        self._runs.append(self._runs[-1] + len(keys))
        self._held, self._num_held = [], 0

    def _cut_runs(self, edges: Numbers) -> Iterator[list[int]]:
        for run in range(len(self._runs) - 1):
            yield _cut(self._read(run, 0, self._runs[run + 1] - self._runs[run])[0], edges)

    def _read(self, run: int, begin: int, end: int) -> tuple[Numbers, Values]:
        """Of a run, the pairs from place `begin` to `end`."""
        start = self._runs[run]
        at = (2 * start + begin) * _WIDTH
        behind = (start + self._runs[run + 1] + begin) * _WIDTH
        return (
            np.fromfile(self._path, np.uint64, end - begin, offset=at),
            np.fromfile(self._path, np.int64, end - begin, offset=behind),
        )


def join_pairs(left: Pairs, right: Pairs) -> Iterator[tuple[tuple[Numbers, Values], tuple[Numbers, Values]]]:
    """The buckets of both, cut at the same numbers."""
    bits = max(left.bits, right.bits)
    yield from zip(left.buckets(bits), right.buckets(bits), strict=True)


def _sort(keys: Numbers, values: Values) -> tuple[Numbers, Values]:
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


def _cut(keys: Numbers, edges: Numbers) -> list[int]:
    """Where each bucket begins, and the end of the last."""
    return [0, *np.searchsorted(keys, edges).tolist(), len(keys)]
