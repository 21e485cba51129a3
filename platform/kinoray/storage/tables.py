"""Parquet that anybody wrote: tables read whole, or by row groups where a library is larger than memory.

What is easy to break: Ray registers Arrow types whose values are pickles, in every process of a job. A table that
holds one must be refused before any value of it is looked at; and a footer may say anything, so what a column takes
in memory is counted from its pages first.
"""

import io
import struct
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.storage.objects import Storage

__all__ = ["TableFile", "iter_table", "leave_pandas_out", "parse_table"]

_TABLE_BYTES = 2**28
_TABLE_EXPANSION = 1024  # a table of 100 million names in a row, of 2 bytes each in the file, is 200 times as large
_MAX_DEPTH = 64
_GROUP_BYTES = 2**30
_FOOTER_BYTES = 2**28
_BATCH_ROWS = 2**16
_TAIL_BYTES = 2**16
_LEAST_BYTES = 12  # of any Parquet file


def leave_pandas_out() -> None:
    """Have pyarrow do without pandas, in a process of ours: the first array that it makes would import it otherwise.

    That takes half a second, and 40 MB.
    """
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, _WithoutPandas)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(_WithoutPandas)


class _WithoutPandas(MetaPathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ImportError("left out")


def parse_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file, with these columns only; pages are compared with their checksums.

    Raises:
        pyarrow.ArrowInvalid: it is no Parquet, a column's type is none of Arrow's own, or it would take more memory
            than 256 MiB and 1,024 times its bytes.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        _check_schema(file.schema_arrow, columns)
        footer, _ = _thrift(_raw_footer(data, len(data)), 0)
        room = _TABLE_BYTES + _TABLE_EXPANSION * len(data)
        for group in footer[4]:
            room -= _group_bytes(data, footer, group, columns, room)
        table = file.read(columns=None if columns is None else list(columns))
        table.validate(full=True)  # texts that are not UTF-8, too
        return table
    except _DAMAGE as error:
        raise pa.ArrowInvalid(" ".join(str(error).split())) from error


# What reading a file raises that is no Parquet: a part of it is cut, or is something else than it should be.
_DAMAGE = (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError, pa.ArrowException)


class TableFile:
    """A Parquet file of any size, of which one row group at a time is in memory."""

    def __init__(self, storage: Storage, uri: str) -> None:
        """Reads the footer.

        Raises:
            StorageError: it cannot be read.
            pyarrow.ArrowInvalid: it is no Parquet, or a column's type is none of Arrow's own.
        """
        self.uri = uri
        self._bytes = _Stored(storage, uri)
        self._footer: dict[int, Any] | None = None
        try:
            self._raw_footer = _raw_footer(self._bytes, len(self._bytes))
            _thrift(self._raw_footer, 0)
            self._file = pq.ParquetFile(pa.PythonFile(self._bytes, "r"), page_checksum_verification=True)
            self.schema: pa.Schema = self._file.schema_arrow
            _check_schema(self.schema, None)
            metadata = self._file.metadata
            self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except _DAMAGE as error:
            raise pa.ArrowInvalid(" ".join(str(error).split())) from error
        finally:
            self._bytes.hold(0, 0)
        self.num_rows = sum(self.group_rows)
        """Of all groups."""

    def batches(self, group: int, columns: Sequence[str] | None = None, *, count: int = 1) -> Iterator[pa.Table]:
        """The rows of so many row groups with these columns, at most 65,536 at a time. Raises as `parse_table`."""
        try:
            if self._footer is None:  # it takes a megabyte: only that of a file that is being read is kept
                self._footer, _ = _thrift(self._raw_footer, 0)
            entries = self._footer[4][group : group + count]
            spans = [_span(entry) for entry in entries]
            begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
            if end - begin > _GROUP_BYTES:
                raise ValueError(
                    f"row group {group} has {end - begin:,} bytes, at most {_GROUP_BYTES:,} are read; write it with "
                    "smaller row groups (pyarrow: row_group_size=65536)"
                )
            self._bytes.hold(begin, end)
            room = _TABLE_BYTES + _TABLE_EXPANSION * (end - begin)
            for entry in entries:
                room -= _group_bytes(self._bytes, self._footer, entry, columns, room)
            names = None if columns is None else list(columns)
            groups = list(range(group, group + count))
            for batch in self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
                batch.validate(full=True)
                yield pa.Table.from_batches([batch])
        except _DAMAGE as error:
            raise pa.ArrowInvalid(" ".join(str(error).split())) from error
        finally:
            self._bytes.hold(0, 0)
            if group + count == len(self.group_rows):
                self._footer = None


def iter_table(path: Path, columns: Sequence[str], *, needed: Collection[str]) -> Iterator[pa.Table]:
    """The rows of a file of this machine, with those of these columns that it has, a few at a time.

    Raises:
        pyarrow.ArrowInvalid: as `TableFile`; or a needed column is not there, or a column holds lists or the like.
    """
    file = TableFile(Storage(), str(path))
    if missing := [name for name in needed if name not in file.schema.names]:
        raise pa.ArrowInvalid(f"it has no column {missing[0]}; found {file.schema.names!r:.200}")
    found = [name for name in columns if name in file.schema.names]
    for name in found:
        if pa.types.is_nested(kind := file.schema.field(name).type):
            raise pa.ArrowInvalid(f"column {name} has the type {kind}, whose values are not plain data")
    for group in range(len(file.group_rows)):
        yield from file.batches(group, found)


class _Stored(io.RawIOBase):
    """A stored object as a file that is read at any place; one span of it is held, and costs no request."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self._storage, self._uri = storage, uri
        self._size_bytes = storage.stat(uri).size_bytes
        self._at = 0
        self._begin, self._span = 0, b""
        self.hold(max(0, self._size_bytes - _TAIL_BYTES), self._size_bytes)

    def hold(self, begin: int, end: int) -> None:
        """Fetch a span, in place of the last one."""
        if not 0 <= begin <= end <= self._size_bytes:
            raise ValueError("a column of it lies behind its end")
        self._begin, self._span = begin, b""
        self._span = self._storage.read_range(self._uri, begin, end - begin) if end > begin else b""

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            begin, end, _ = place.indices(self._size_bytes)
            return self._bytes_at(begin, max(begin, end))
        return self._bytes_at(place, place + 1)[0]

    def _bytes_at(self, begin: int, end: int) -> bytes:
        if self._begin <= begin and end <= self._begin + len(self._span):
            return self._span[begin - self._begin : end - self._begin]
        return self._storage.read_range(self._uri, begin, end - begin)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size_bytes)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size_bytes if size < 0 else min(self._size_bytes, self._at + size)
        data = self._bytes_at(self._at, max(self._at, end))
        self._at += len(data)
        return data


def _check_schema(schema: pa.Schema, columns: Sequence[str] | None) -> None:
    names = schema.names
    if wrong := [name for name in columns or names if names.count(name) != 1]:
        raise pa.ArrowInvalid(f"column {wrong[0]} is there {names.count(wrong[0])} times; once is right")
    for field in schema:
        if _is_foreign(field.type):
            raise pa.ArrowInvalid(f"column {field.name} has the type {field.type}, whose values are not plain data")


def _is_foreign(kind: pa.DataType) -> bool:
    """Whether a type, or one inside it, is an extension in Python: its values are made by somebody's code."""
    if isinstance(kind, pa.ExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _is_foreign(kind.value_type)
    return any(_is_foreign(kind.field(index).type) for index in range(kind.num_fields))


# What a Parquet file takes once it is read. Its footer may say anything, so the headers of the pages are read, as the
# reader will read them: for the values that each claims, its bytes, and the longest text of its dictionary.

_DICTIONARY_PAGE = 2
_HEADERS = {0: (5, 2), 3: (8, 4)}  # type of a page of data: field of its header, and of the encoding in that
_DICTIONARY_ENCODINGS = (2, 8)
_PREFIX_ENCODING = 7  # DELTA_BYTE_ARRAY: each text may begin with all of the one before
_VALUE_BYTES = 8
# More than each text of a dictionary and each page take in memory: what looking at them costs in time.
_TEXT_BYTES = 256
_PAGE_BYTES = 2**16
_BYTE_ARRAY = 6
_LENGTH = struct.Struct("<I")
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def _raw_footer(data: Any, size_bytes: int) -> bytes:
    """Read here, too: Arrow ends the process where it is asked for a column whose entry was changed."""
    if size_bytes < _LEAST_BYTES:
        raise ValueError(f"it has {size_bytes} bytes, and is no Parquet file")
    length = int.from_bytes(data[size_bytes - 8 : size_bytes - 4], "little")
    if length > min(_FOOTER_BYTES, size_bytes):
        raise ValueError(f"its footer would have {length:,} bytes")
    return bytes(data[size_bytes - 8 - length : size_bytes - 8])


def _span(group: dict[int, Any]) -> tuple[int, int]:
    """Where the bytes of a row group begin and end in the file."""
    begins, ends = [], []
    for entry in group[1]:
        begin = _chunk_start(entry[3])
        begins.append(begin)
        ends.append(begin + entry[3][7])
    return min(begins, default=0), max(ends, default=0)


def _chunk_start(chunk: dict[int, Any]) -> int:
    at: int = chunk[9]
    dictionary = chunk.get(11, 0)
    return int(dictionary) if 0 < dictionary < at else at


def _group_bytes(
    data: Any, footer: dict[int, Any], group: dict[int, Any], columns: Sequence[str] | None, room: int
) -> int:
    """Memory that a row group takes, at most. ValueError or LookupError: more than `room`, or it cannot be told."""
    left = room
    widths = [leaf.get(2, 0) for leaf in footer[2] if not leaf.get(5)]  # of what is not a group of columns
    for width, entry in zip(widths, group[1], strict=True):
        chunk = entry[3]
        path = b".".join(chunk[3]).decode()
        if columns is None or any(path == name or path.startswith(f"{name}.") for name in columns):
            left -= _chunk_bytes(data, path, chunk, width, left)
    return room - left


def _chunk_bytes(data: Any, path: str, chunk: dict[int, Any], width: int, room: int) -> int:
    """Memory that a column of a row group takes, at most; ValueError where that is more than `room`."""
    is_text, codec, wanted = chunk[1] == _BYTE_ARRAY, chunk[4], chunk[5]
    at = _chunk_start(chunk)
    total, num_values, longest = 0, 0, 0
    while num_values < wanted:
        header, at = _thrift(data, at)
        kind, size_bytes, stored_bytes = header[1], header[2], header[3]
        if min(size_bytes, stored_bytes) < 0 or at + stored_bytes > len(data):
            raise ValueError(f"a page of {path} ends behind the file")
        total += size_bytes + _PAGE_BYTES
        if kind == _DICTIONARY_PAGE and is_text:
            num_texts = header[7][1]
            total += num_texts * _TEXT_BYTES
            if total <= room:
                longest = max(longest, _longest(data[at : at + stored_bytes], num_texts, size_bytes, codec))
        elif kind in _HEADERS:
            field, place = _HEADERS[kind]
            count, encoding = header[field][1], header[field][place]
            if count < 0 or encoding == _PREFIX_ENCODING:
                raise ValueError(f"{path} is encoded in a way that is not read; write it with pyarrow")
            num_values += count
            total += count * (max(width, _VALUE_BYTES) + (longest if encoding in _DICTIONARY_ENCODINGS else 0))
        at += stored_bytes
        if total > room:
            raise ValueError(
                f"read, it would take more memory than {_TABLE_EXPANSION:,} times its {len(data):,} bytes and "
                f"{_TABLE_BYTES:,} more"
            )
    return total


def _longest(page: bytes, num_texts: int, size_bytes: int, codec: int) -> int:
    """Bytes of the longest text in a page of a dictionary: each has its length, 4 bytes, in front."""
    if codec:
        page = pa.decompress(page, size_bytes, _CODECS[codec], asbytes=True)
    at = longest = 0
    for _ in range(num_texts):
        (length,) = _LENGTH.unpack_from(page, at)
        if length > longest:
            longest = length
        at += 4 + length
    return longest


def _thrift(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol by the numbers of its fields, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        step, kind = head >> 4, head & 15
        at += 1
        if step:
            field += step
        else:
            field, at = _zigzag(data, at)
        if kind in (1, 2):
            fields[field] = kind == 1
        else:
            fields[field], at = _thrift_value(data, at, kind, depth)
    return fields, at + 1


def _thrift_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind == 7 and at + 8 <= len(data):
        return None, at + 8  # a number with a point: none is asked for
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind in (9, 10) and depth < _MAX_DEPTH:
        count, inner = divmod(data[at], 16)
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        if count > len(data) - at:  # each value takes a byte at least
            raise ValueError("a list in it ends behind the file")
        values = []
        for _ in range(count):
            value, at = _thrift_value(data, at, inner, depth + 1)
            values.append(value)
        return values, at
    if kind == 12 and depth < _MAX_DEPTH:
        return _thrift(data, at, depth + 1)
    raise ValueError("a part of the file is not as Parquet writes it")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 0x80:  # most are short
        return value >> 1 ^ -(value & 1), at + 1
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("the header of a page is none")
