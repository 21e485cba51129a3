"""Keys: what names an input of a labelling, 64 bits each, and the files that hold and sort those of a whole library.

What is easy to break: a library has more keys than a driver can hold as Python's objects (57 bytes each). They are
numbers in arrays and files; a text, `k` and 16 hex digits, is made of them only for the rows at hand. And two sets of
pairs that are joined must be cut at the same numbers: buckets are ranges of the first one, and who joins says how many.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import eq
from pathlib import Path
from typing import Self, overload
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinoray.errors import CatalogError
from kinoray.storage.objects import Storage

__all__ = [
    "KEY_BYTES",
    "KEY_COLUMNS",
    "KEY_PATTERN",
    "Keys",
    "Numbers",
    "Pairs",
    "Tally",
    "join_pairs",
    "key_numbers",
    "keys_in",
    "numbers_of",
    "row_keys",
]

KEY_COLUMNS = ("video_id", "uri", "offset", "length", "size_bytes", "sha256")
"""What a key is made of."""
_TIMES = ("time_start_s", "time_end_s")
KEY_BYTES = 8
"""Of a key in a file, the most significant first."""

KEY_PATTERN = "^k[0-9a-f]{16}$"
"""Of a key as text."""

Numbers = NDArray[np.uint64]
_CHUNK = 2**18
_PLAIN = r"^[ !#-\[\]-~]*$"  # what JSON writes as it is
_PLAIN_CHARS = bytes(char for char in range(32, 127) if char != ord("\\"))
_KEY_CHARS = 17
_HEX = np.full(256, 255, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


class Keys(Sequence[str]):
    """Keys in an order, as texts; they lie in memory or in a file, and are read when they are looked at."""

    __slots__ = ("_begin", "_end", "_read")

    def __init__(self, read: Callable[[int, int], Numbers], begin: int, end: int) -> None:
        """`read` gives the numbers from one place to another."""
        self._read, self._begin, self._end = read, begin, end

    @classmethod
    def of(cls, numbers: Numbers) -> Self:
        """Keys that are in memory."""
        return cls(lambda begin, end: numbers[begin:end], 0, len(numbers))

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Self:
        """Keys that somebody has as texts. Raises ValueError: one is no key."""
        return cls.of(numbers_of(pa.array(texts, pa.string())))

    @classmethod
    def in_file(cls, path: Path) -> Self:
        """Keys in a file on this machine."""

        def read(begin: int, end: int) -> Numbers:
            return np.fromfile(path, ">u8", end - begin, offset=begin * KEY_BYTES).astype(np.uint64)

        return cls(read, 0, path.stat().st_size // KEY_BYTES)

    @classmethod
    def in_object(cls, storage: Storage, uri: str, count: int) -> Self:
        """Keys in a stored object."""

        def read(begin: int, end: int) -> Numbers:
            data = storage.read_range(uri, begin * KEY_BYTES, (end - begin) * KEY_BYTES)
            return np.frombuffer(data, ">u8").astype(np.uint64)

        return cls(read, 0, count)

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Keys": ...
    def __getitem__(self, place: int | slice) -> "str | Keys":
        if isinstance(place, int):
            if not -len(self) <= place < len(self):
                raise IndexError(f"there are {len(self)} keys, not one at {place}")
            at = self._begin + place % len(self)
            return f"k{int(self._read(at, at + 1)[0]):016x}"
        begin, end, step = place.indices(len(self))
        assert step == 1, "keys are cut, not picked"
        return Keys(self._read, self._begin + begin, self._begin + max(begin, end))

    def __iter__(self) -> Iterator[str]:
        for numbers in self.chunks():
            yield from (f"k{number:016x}" for number in numbers.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Callable[[Numbers], "Keys"], tuple[Numbers]]:
        return Keys.of, (self.numbers(),)

    def numbers(self) -> Numbers:
        """All of them, uint64 [N]."""
        return self._read(self._begin, self._end)

    def chunks(self, size: int = _CHUNK) -> Iterator[Numbers]:
        """All of them, a bounded number at a time."""
        for begin in range(self._begin, self._end, size):
            yield self._read(begin, min(begin + size, self._end))


def key_numbers(table: pa.Table) -> Numbers:
    """The key of each row of a table with KEY_COLUMNS, uint64 [N]: the first 64 bits of a digest of these values.

    The same name, place and size (and checksum) give the same key; a file that was replaced by one of another size is
    another input, and is labelled again. Times are part of the key where no clip can have them, in tables with such
    columns: a row that is mended is another input, and a row whose times are right keeps its key whatever they are.
    """
    columns = [table.column(name) for name in KEY_COLUMNS]
    video_id, uri, *numbers, sha256 = columns
    written = [part for column in numbers for part in (_or_null(column, pc.cast(column, pa.string())), ",")]
    digest = _or_null(sha256, pc.binary_join_element_wise('"', sha256, '"', ""))
    lines = pc.binary_join_element_wise('["', video_id, '","', uri, '",', *written, digest, "]", "")
    rows = lines.cast(pa.binary()).to_pylist()
    if not _are_plain(rows, 4 * len(rows) + 2 * (len(rows) - sha256.null_count)):
        for place in np.flatnonzero(_is_odd(columns)).tolist():
            row = [column[place].as_py() for column in columns]
            rows[place] = json.dumps(row, separators=(",", ":")).encode()
    for place, start_s, end_s in _wrong_times(table):
        rows[place] += json.dumps([start_s, end_s]).encode()
    digests = b"".join([hashlib.sha256(row).digest()[:KEY_BYTES] for row in rows])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _wrong_times(table: pa.Table) -> Iterator[tuple[int, float | None, float | None]]:
    """The rows with times for which their videos are refused unread: place, time_start_s, time_end_s."""
    if not set(_TIMES) <= set(table.column_names):
        return
    start, end = (table.column(name) for name in _TIMES)
    if start.null_count == end.null_count == table.num_rows:
        return
    begin_s = pc.fill_null(start, 0.0).to_numpy()
    finish_s = pc.coalesce(end, start, pa.scalar(0.0)).to_numpy()
    right = np.isfinite(begin_s) & np.isfinite(finish_s) & (begin_s >= 0) & (finish_s >= begin_s)
    for place in np.flatnonzero(~right).tolist():
        yield place, start[place].as_py(), end[place].as_py()


def _or_null(column: pa.ChunkedArray, written: pa.ChunkedArray) -> pa.ChunkedArray | str:
    """What a column is in JSON, where it has values."""
    return "null" if column.null_count == len(column) else pc.fill_null(written, "null")


def _are_plain(rows: Sequence[bytes], num_quotes: int) -> bool:
    """Whether all texts of these lines are written in JSON as they are."""
    text = b"".join(rows)
    return not text.translate(None, _PLAIN_CHARS) and text.count(b'"') == num_quotes


def _is_odd(columns: Sequence[pa.ChunkedArray]) -> NDArray[np.bool_]:
    """Of each row, whether one of its texts is written otherwise in JSON."""
    odd = np.zeros(len(columns[0]), np.bool_)
    for column in columns:
        if pa.types.is_string(column.type):
            odd |= ~pc.fill_null(pc.match_substring_regex(column, _PLAIN), True).to_numpy()
    return odd


def row_keys(table: pa.Table) -> Keys:
    """The key of each row of a catalog's table. A key is `k` and 16 hex digits as text: without the letter a
    spreadsheet takes 992408070180e010 for a number, and writes another one.

    Raises:
        CatalogError: two rows are the same input.
    """
    numbers = [key_numbers(table.slice(start, _CHUNK)) for start in range(0, table.num_rows, _CHUNK)]
    keys = np.concatenate([np.empty(0, np.uint64), *numbers])
    found, counts = np.unique(keys, return_counts=True)
    if len(found) < len(keys):
        worst = int(np.argmax(counts))
        row = int(np.flatnonzero(keys == found[worst])[0])
        video_id, uri = (table.column(name)[row].as_py() for name in ("video_id", "uri"))
        raise CatalogError(f"{uri} (video {video_id}) is in the catalog {counts[worst]} times; list it once")
    return Keys.of(keys)


def numbers_of(column: pa.Array | pa.ChunkedArray) -> Numbers:
    """Keys that are texts in a column, as numbers uint64 [N]. Raises ValueError: one is no key."""
    texts = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(texts, pa.ChunkedArray):  # of no chunk
        texts = pa.concat_arrays([pa.array([], pa.string()), *texts.chunks])
    count = len(texts)
    if not count:
        return np.empty(0, np.uint64)
    joined = pc.binary_join(pa.ListArray.from_arrays([0, count], texts), "")[0].as_py()
    if texts.null_count or joined is None or not pc.all(pc.equal(pc.binary_length(texts), _KEY_CHARS)).as_py():
        raise ValueError("a row_key is not `k` and 16 hex digits")
    chars = np.frombuffer(joined.encode(), np.uint8)
    if len(chars) != count * _KEY_CHARS:
        raise ValueError("a row_key is not `k` and 16 hex digits")
    chars = chars.reshape(count, _KEY_CHARS)
    digits = _HEX[chars[:, 1:]]
    if not (chars[:, 0] == ord("k")).all() or digits.max() > 15:
        raise ValueError("a row_key is not `k` and 16 hex digits")
    pairs = digits[:, 0::2] << 4 | digits[:, 1::2]
    return np.ascontiguousarray(pairs).view(">u8").reshape(count).astype(np.uint64)


def keys_in(numbers: Numbers) -> bytes:
    """Keys as a file has them."""
    return numbers.astype(">u8").tobytes()


class Tally:
    """What tells two collections of keys apart, in whatever order: their number and two sums.

    Each key is mixed with numbers drawn by this process before it is added, so that who chooses names cannot choose
    what they add up to; two different collections agree by chance once in 2 ** 128.
    """

    _seeds = np.random.default_rng().integers(2**64, size=2, dtype=np.uint64)

    def __init__(self) -> None:
        self.count = 0
        self._sums = [0, 0]

    def add(self, numbers: Numbers) -> None:
        """Add keys."""
        self.count += len(numbers)
        for place, seed in enumerate(self._seeds):
            self._sums[place] = (self._sums[place] + int(_mixed(numbers ^ seed).sum(dtype=np.uint64))) % 2**64

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and (self.count, self._sums) == (other.count, other._sums)

    __hash__ = None  # type: ignore[assignment]


def _mixed(x: Numbers) -> Numbers:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 5)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


# Numbers that are sorted on disk


_RUN = 2**18  # pairs that are held and sorted at once
_MAX_BITS = 16
_WIDTH = 8  # bytes

Values = NDArray[np.int64]


class Pairs:
    """Pairs (key, value): added in any order, read back by `buckets`, of equal keys in the order in which they came."""

    def __init__(self, folder: Path, width: int = 64) -> None:
        """
        Args:
            folder: holds what is not in memory; it is the caller's, to be removed when all is done.
            width: keys have so many bits, of which the leading ones should be spread evenly.
        """
        self._width = width
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
        edges = (
            np.arange(1, 2**bits, dtype=np.uint64) << np.uint64(self._width - bits) if bits else np.empty(0, np.uint64)
        )
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
