"""More rows than fit in memory, in the order of their names: sorted runs on the disk, and a merge of them.

What is easy to break: a run is opened when its turn comes, and of an open one a small batch is in memory. So of runs
that lie one behind the other, as pieces of a listing do, thousands may be merged; of others so many are merged at once.
And pieces of a listing that is under way are kept in a store, so that one that was interrupted goes on: a piece may be
damaged or a stranger's, and counts for what it says only where its rows agree.
"""

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.errors import ChecksumMismatch, ObjectNotFound, ObjectTooLarge
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_json
from kinoray.storage.stretches import WHOLE, Gap
from kinoray.storage.tables import parse_table

__all__ = [
    "Kept",
    "Piece",
    "Row",
    "Runs",
    "batched",
    "rows_of",
]

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
        self.odd: tuple[bytes, int | None, int | None] | None = None
        """A name that came with two sizes."""
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
        before: bytes | None = None
        before_bytes: int | None = None
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
                if size_bytes != before_bytes:
                    self.odd = name, before_bytes, size_bytes
            before, before_bytes = name, size_bytes
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


# Pieces of a listing that is under way


_KEY = b"kinoray.listing"
_PIECE_ROWS = 16_384
_MAX_PIECE_BYTES = 2**26  # a piece has 17,383 rows at most, of keys of 1,024 bytes
_MAX_AGE_S = 86_400.0
_THREADS = 8
_MAX_WAITING = 8  # pieces on their way to the store
_SCHEMA = pa.schema([pa.field("name", pa.binary(), nullable=False), pa.field("size_bytes", pa.int64())])


class Piece:
    """All objects between two keys, in their order."""

    def __init__(self, after: str) -> None:
        self.after = after
        self.num_rows = 0
        self._tables: list[pa.Table] = []

    @property
    def is_full(self) -> bool:
        """Whether it has the rows of a whole piece."""
        return self.num_rows >= _PIECE_ROWS

    def add(self, names: list[str], sizes: list[int]) -> None:
        """The objects that follow."""
        self._tables.append(pa.table([[name.encode() for name in names], sizes], schema=_SCHEMA))
        self.num_rows += len(names)

    def write(self, path: Path, server: str, prefix: str, until: str | None) -> None:
        """As a Parquet file that says which piece of which listing it is."""
        about = json.dumps({"server": server, "prefix": prefix, "after": self.after, "until": until}).encode()
        table = pa.concat_tables(self._tables).sort_by("name").replace_schema_metadata({_KEY: about})
        pq.write_table(table, path, compression="zstd", row_group_size=4096, use_dictionary=False)


class Kept:
    """The pieces of a listing of one prefix in a store."""

    def __init__(self, storage: Storage, keep: str, prefix: str, folder: Path) -> None:
        """`folder` takes the pieces that are loaded."""
        self.num_loaded = 0
        """Objects in the pieces that were loaded."""
        self._storage, self._keep, self._prefix, self._folder = storage, keep, prefix, folder
        self._start = prefix.removeprefix("s3://").partition("/")[2]
        self._server = storage.server(prefix)
        self._place = join(keep, hashlib.sha256(f"{self._server} {prefix}".encode()).hexdigest()[:16])
        self._is_used = False
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="keep")
        self._puts: list[Future[None]] = []

    def load(self, adopt: Callable[[Path], None]) -> Sequence[Gap]:
        """Load what is there and no day old, by the store's clock; the gaps between.

        Pieces of other listings stay until they are as old.
        """
        there = list(self._storage.list(self._keep.rstrip("/") + "/"))
        if not there:
            return WHOLE
        self._is_used = True
        clock = join(self._place, "clock")
        self._storage.put(clock, b"")
        now_s = self._storage.stat(clock).modified_s
        old = [info for info in there if info.modified_s < now_s - _MAX_AGE_S]
        list(self._pool.map(self._storage.delete, [info.uri for info in old]))
        mine = [info.uri for info in there if info not in old and info.uri.startswith(f"{self._place}/")]
        gaps: list[Gap] = []
        covered: str | None = ""
        for piece in sorted(filter(None, self._pool.map(self._read, mine)), key=lambda piece: piece.after):
            if covered is None or piece.after < covered:
                continue  # of another job, which cut otherwise
            if piece.after > covered:
                gaps.append((covered, piece.after))
            covered = piece.until
            adopt(piece.path)
            self.num_loaded += piece.num_rows
        return gaps if covered is None else [*gaps, (covered, None)]

    def put(self, path: Path) -> None:
        """Keep a piece; whether that was done is known by `clear`, or when a few others were put."""
        self._is_used = True
        uri = join(self._place, f"{uuid4().hex}.parquet")
        self._puts.append(self._pool.submit(self._storage.put_file, uri, path))
        if len(self._puts) > _MAX_WAITING:
            self._puts.pop(0).result()

    def clear(self) -> None:
        """The listing is complete: nothing of it stays."""
        for put in self._puts:
            put.result()
        if self._is_used:
            uris = [info.uri for info in self._storage.list(f"{self._place}/")]
            list(self._pool.map(self._storage.delete, uris))

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()  # what is on its way arrives

    def _read(self, uri: str) -> "_Loaded | None":
        """The piece in an object; None where it is gone, or is none."""
        try:
            data = self._storage.read(uri, max_bytes=_MAX_PIECE_BYTES)
            table = parse_table(data)
            about = parse_json((table.schema.metadata or {})[_KEY])
            after, until = about["after"], about["until"]
            is_mine = about["server"] == self._server and about["prefix"] == self._prefix
            if not is_mine or not _holds(table, self._start, after, until):
                return None
        except (
            ObjectNotFound,
            ObjectTooLarge,
            ChecksumMismatch,
            pa.ArrowException,
            ValueError,
            LookupError,
            TypeError,
        ):
            return None  # removed by another job, or no piece: its keys are listed again
        path = self._folder / f"kept-{uri.rpartition('/')[2]}"
        path.write_bytes(data)
        return _Loaded(after, until, path, table.num_rows)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A piece, in a file on this machine."""

    after: str
    until: str | None
    path: Path
    num_rows: int


def _holds(table: pa.Table, start: str, after: object, until: object) -> bool:
    """Whether a piece is in order, and between the keys that it names.

    Args:
        start: what all keys begin with.
    """
    if not isinstance(after, str) or not (until is None or isinstance(until, str)):
        return False
    if not table.schema.equals(_SCHEMA) or not table.num_rows or table.column("name").null_count:
        return False
    keys = [start + name.decode() for name in table.column("name").to_pylist()]
    sizes = table.column("size_bytes").to_pylist()
    is_sorted = all(one < other for one, other in itertools.pairwise(keys))
    is_inside = after < keys[0] and (until is None or keys[-1] <= until)
    return is_sorted and is_inside and all(isinstance(size, int) and size >= 0 for size in sizes)
