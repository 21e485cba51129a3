"""Reading back what kinoray and others wrote: JSON and Parquet, of which nothing can run code when it is read.

Whatever lies in a folder may come from a stranger, so size, depth and values are bounded before anybody looks at them,
and a name that is joined to a folder is a name and no path.

What is easy to break: Ray registers Arrow types whose values are pickles, in every process of a job. A table that
holds one must be refused before any value of it is looked at.
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.config.file import config_from_mapping, first_repeated
from kinoray.errors import ChecksumMismatch
from kinoray.storage.objects import MAX_RECORD_BYTES, Storage

__all__ = [
    "MAX_RECORD_BYTES",
    "as_name",
    "as_seconds",
    "is_name",
    "iter_table",
    "parse_json",
    "parse_lines",
    "parse_record",
    "parse_table",
    "read_record",
    "record_of",
]

T = TypeVar("T")

_MAX_DEPTH = 64  # lists and objects inside each other; ours have five
_MAX_CONTAINERS = 4_000_000  # each takes 60 to 200 bytes of memory, and may be two bytes of text
_TABLE_BYTES = 2**28
_GROUP_BYTES = 2**30  # of a row group, where one is read at a time
_BATCH_ROWS = 2**12
_TABLE_EXPANSION = 1024  # a table of 100 million names in a row, of 2 bytes each in the file, is 200 times as large
_MAX_SECONDS = 2**35  # a thousand years
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str, *, bits: int = 64) -> Any:
    """The value of a JSON text: no deeper than 64, whole numbers of 64 bits, finite ones, each key once, whole text.

    Raises:
        ValueError: it is none, with the reason.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data  # a lone surrogate is a ValueError, too
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(f"more than {_MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=partial(_whole, bits=bits),
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"lists and objects lie deeper than {_MAX_DEPTH} in each other") from None
    _check(value, texts=_SURROGATE.search(raw) is not None)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {first_repeated(name for name, _ in pairs)!r:.80} is there twice")
    return found


def _whole(text: str, bits: int) -> int:
    value = int(text) if len(text) <= bits else 2**bits  # a digit is more than a bit, and long texts take long
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise ValueError(f"the whole number {text:.30} does not fit {bits} bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.30} is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _check(value: Any, *, texts: bool) -> None:
    """Refuse what lies too deep, and with `texts` what is no Unicode; without recursion, so that depth cannot hurt."""
    level = [value]
    for depth in range(_MAX_DEPTH + 1):
        if depth == _MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            break
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if texts:
                    below.extend(item)
            elif isinstance(item, list):
                below.extend(item)
            elif texts and isinstance(item, str):
                item.encode("utf-8")
        level = below if texts else [item for item in below if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"lists and objects lie deeper than {_MAX_DEPTH} in each other")


def parse_record(data: bytes, uri: str, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the JSON object in the bytes of a file that kinoray wrote; `dict` for the object itself.

    Raises:
        ChecksumMismatch: it is no JSON, or not the object that `make` takes.
    """
    try:
        record = parse_json(data)
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, found {type(record).__name__}")
        return make(record)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ChecksumMismatch(f"{uri} does not hold what kinoray wrote ({reason}); restore or remove it") from error


def read_record(
    storage: Storage, uri: str, make: Callable[[dict[str, Any]], T], max_bytes: int = MAX_RECORD_BYTES
) -> T:
    """`parse_record` of a file, which is not read where it is larger than `max_bytes`. Raises StorageError."""
    return parse_record(storage.read(uri, max_bytes=max_bytes), uri, make)


def record_of(cls: type[T]) -> Callable[[Any], T]:
    """Makes `cls`, a dataclass, of a JSON object: every field of its declared type, none missing, none unknown.

    What it returns raises ValueError or TypeError.
    """

    def make(record: object) -> T:
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, found {type(record).__name__}")
        return config_from_mapping(cls, record, complete=True)

    return make


def parse_lines(data: bytes, uri: str) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file that kinoray wrote. Raises as parse_record."""
    return [
        parse_record(line, f"{uri} line {number}", dict) for number, line in enumerate(data.splitlines(), 1) if line
    ]


def is_name(text: object) -> bool:
    """Whether it may be joined to a folder: one component of a path, of plain characters, not hidden, not long."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def as_name(text: object, what: str) -> str:
    """The text, where `is_name` holds for it; else a ValueError that calls it `what`."""
    if not is_name(text):
        raise ValueError(f"{what} {text!r:.80} is not a name (letters, digits, . _ -; no leading dot, at most 200)")
    return str(text)


def as_seconds(value: object, what: str) -> float:
    """A length of time, or a time since 1970 that a calendar has; else a ValueError that calls it `what`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_SECONDS:
        raise ValueError(f"{what} is {value!r:.40}, expected seconds, 0 to {_MAX_SECONDS:,}")
    return float(value)


def parse_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file, with these columns only; pages are compared with their checksums.

    Raises:
        pyarrow.ArrowInvalid: it is no Parquet, a column's type is none of Arrow's own, or it would take more memory
            than 256 MiB and 1,024 times its bytes.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        names = file.schema_arrow.names
        if wrong := [name for name in columns or names if names.count(name) != 1]:
            raise pa.ArrowInvalid(f"column {wrong[0]} is there {names.count(wrong[0])} times; once is right")
        for field in file.schema_arrow:
            if _is_foreign(field.type):
                raise pa.ArrowInvalid(f"column {field.name} has the type {field.type}, whose values are not plain data")
        _check_size(data, columns)
        table = file.read(columns=None if columns is None else list(columns))
        table.validate(full=True)  # texts that are not UTF-8, too
        return table
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        # ArrowInvalid is a ValueError; the others: a part of it is cut, or is something else than it should be
        raise pa.ArrowInvalid(" ".join(str(error).split())) from error


def iter_table(path: Path, columns: Sequence[str], *, needed: Collection[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file of any size, with those of these columns that it has; as `parse_table`, but in pieces.

    Raises:
        pyarrow.ArrowInvalid: as `parse_table`; or a row group would take more memory than 1 GiB, or a needed column is
            not there.
    """
    try:
        with (
            path.open("rb") as source,
            mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data,
            pq.ParquetFile(path, page_checksum_verification=True, buffer_size=2**20, pre_buffer=False) as file,
        ):
            names = file.schema_arrow.names
            if missing := [name for name in needed if name not in names]:
                raise pa.ArrowInvalid(f"it has no column {missing[0]}; found {names!r:.200}")
            found = [name for name in columns if name in names]
            if wrong := [name for name in found if names.count(name) != 1]:
                raise pa.ArrowInvalid(f"column {wrong[0]} is there {names.count(wrong[0])} times; once is right")
            for field in file.schema_arrow:
                if _is_foreign(field.type) or (field.name in found and pa.types.is_nested(field.type)):
                    raise pa.ArrowInvalid(
                        f"column {field.name} has the type {field.type}, whose values are not plain data"
                    )
            _check_groups(data, found)
            for batch in file.iter_batches(_BATCH_ROWS, columns=found):
                batch.validate(full=True)
                yield batch
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise pa.ArrowInvalid(" ".join(str(error).split())) from error


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
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def _check_size(data: bytes, columns: Sequence[str] | None) -> None:
    """Refuse a file of a few bytes that becomes gigabytes. Raises ValueError or LookupError where it cannot be told."""
    room = _TABLE_BYTES + _TABLE_EXPANSION * len(data)
    for chunks in _row_groups(data, columns):
        for path, chunk, width in chunks:
            room -= _chunk_bytes(data, path, chunk, width, room)


def _check_groups(data: mmap.mmap, columns: Sequence[str]) -> None:
    """As `_check_size`, of a file that is read in row groups."""
    for chunks in _row_groups(data, columns):
        room = _GROUP_BYTES
        for path, chunk, width in chunks:
            room -= _chunk_bytes(data, path, chunk, width, room)


def _row_groups(
    data: bytes | mmap.mmap, columns: Sequence[str] | None
) -> Iterator[list[tuple[str, dict[int, Any], int]]]:
    """The name, the entry in the footer and the width of each of these columns, by row groups.

    The footer is read here, too: Arrow ends the process where it is asked for a column whose entry was changed.
    """
    footer, _ = _thrift(data[-8 - int.from_bytes(data[-8:-4], "little") : -8], 0)
    widths = [leaf.get(2, 0) for leaf in footer[2] if not leaf.get(5)]  # of what is not a group of columns
    for group in footer[4]:
        chunks = []
        for width, entry in zip(widths, group[1], strict=True):
            chunk = entry[3]
            path = b".".join(chunk[3]).decode()
            if columns is None or any(path == name or path.startswith(f"{name}.") for name in columns):
                chunks.append((path, chunk, width))
        yield chunks


def _chunk_bytes(data: bytes | mmap.mmap, path: str, chunk: dict[int, Any], width: int, room: int) -> int:
    """Memory that a column of a row group takes, at most; ValueError where that is more than `room`."""
    is_text, codec, wanted = chunk[1] == _BYTE_ARRAY, chunk[4], chunk[5]
    at, dictionary = chunk[9], chunk.get(11, 0)
    if 0 < dictionary < at:
        at = dictionary
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
        length = int.from_bytes(page[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return longest


def _thrift(data: bytes | mmap.mmap, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol by the numbers of its fields, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while data[at]:
        step, kind = divmod(data[at], 16)
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


def _thrift_value(data: bytes | mmap.mmap, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(data, at)
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


def _zigzag(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("the header of a page is none")
