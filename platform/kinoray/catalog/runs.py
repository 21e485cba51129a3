"""More rows than fit in memory, in the order of their names: sorted runs on the disk, and a merge of them.

What is easy to break: a run is opened when its turn comes, and of an open one a small batch is in memory. So of runs
that lie one behind the other, as pieces of a listing do, thousands may be merged; of others so many are merged at once.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Row", "Runs", "batched", "rows_of"]

_RUN_SCHEMA = pa.schema([pa.field("name", pa.binary(), nullable=False), pa.field("size_bytes", pa.int64())])
_RUN_ROWS = 100_000
_RUN_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")
_BATCH_ROWS = 512  # of each open run are in memory
_MAX_RUNS = 64  # that are merged at once

Row = tuple[bytes, int | None]
"""A name, and a size where it is known. Names are UTF-8, surrogates too: their order is that of Python's texts."""


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of so many rows, but for the last one."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


@dataclass(frozen=True, slots=True)
class _Run:
    """A sorted file of rows."""

    first: bytes
    path: Path


class Runs:
    """Rows in any order, and in that of their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_repeated = 0
        """Rows that `merged` left out last time, since their name had come before."""
        self._levels: list[list[_Run]] = [[]]  # those of a level were merged as often
        self._adopted: list[_Run] = []
        self._rows: list[Row] = []
        self._number = itertools.count()
        folder.mkdir(parents=True)

    def new_path(self) -> Path:
        """Where a run may be written."""
        return self.folder / f"{next(self._number):08d}.parquet"

    def add(self, row: Row) -> None:
        """A row; in any order."""
        self._rows.append(row)
        if len(self._rows) == _RUN_ROWS:
            self._flush()

    def adopt(self, path: Path, first: bytes) -> None:
        """A run that was written elsewhere, whose rows lie between those of other ones."""
        self._adopted.append(_Run(first, path))

    def merged(self) -> Iterator[Row]:
        """All rows by their names, and each name once."""
        if self._rows:
            self._flush()
        self.num_repeated = 0
        yield from self._merge([*itertools.chain(*self._levels), *self._adopted])

    def _flush(self) -> None:
        self._rows.sort(key=lambda row: row[0])
        self._levels[0].append(self._write(self._rows))
        self._rows = []
        for level, runs in enumerate(self._levels):
            if len(runs) == _MAX_RUNS:
                if level + 1 == len(self._levels):
                    self._levels.append([])
                self._levels[level + 1].append(self._write(self._merge(runs, repeat=True)))
                for run in runs:
                    run.path.unlink()
                runs.clear()

    def _write(self, rows: Iterable[Row]) -> _Run:
        path = self.new_path().with_suffix(".arrow")
        first = b""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _RUN_SCHEMA, options=_RUN_OPTIONS) as writer:
            for number, batch in enumerate(batched(rows, _BATCH_ROWS)):
                first = first if number else batch[0][0]
                writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=_RUN_SCHEMA))
        return _Run(first, path)

    def _merge(self, runs: list[_Run], *, repeat: bool = False) -> Iterator[Row]:
        """Rows in order; a run is opened when its turn comes, so of runs that lie one behind the other one is open."""
        waiting = sorted(runs, key=lambda run: run.first, reverse=True)
        opened: list[tuple[bytes, int, int | None, Iterator[Row]]] = []
        before = None
        while waiting or opened:
            while waiting and (not opened or waiting[-1].first <= opened[0][0]):
                rows = rows_of(waiting.pop().path)
                name, size_bytes = next(rows)
                heapq.heappush(opened, (name, len(waiting), size_bytes, rows))
            name, number, size_bytes, rows = opened[0]
            if name != before or repeat:
                yield name, size_bytes
            else:
                self.num_repeated += 1
            before = name
            following = next(rows, None)
            if following is None:
                heapq.heappop(opened)
            else:
                heapq.heapreplace(opened, (following[0], number, following[1], rows))


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a run, or of a piece of a listing."""
    if path.suffix == ".arrow":
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
