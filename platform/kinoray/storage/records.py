"""Reading back the JSON that kinoray and others wrote (Parquet: tables.py); nothing can run code when it is read.

Whatever lies in a folder may come from a stranger, so size, depth and values are bounded before anybody looks at them,
and a name that is joined to a folder is a name and no path.
"""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

from kinoray.config.file import config_from_mapping, first_repeated
from kinoray.errors import ChecksumMismatch
from kinoray.storage.objects import MAX_RECORD_BYTES, Storage

__all__ = [
    "MAX_RECORD_BYTES",
    "as_name",
    "as_seconds",
    "is_name",
    "parse_json",
    "parse_lines",
    "parse_record",
    "read_record",
    "record_of",
]

T = TypeVar("T")


_MAX_DEPTH = 64  # lists and objects inside each other; ours have five
_MAX_CONTAINERS = 4_000_000  # each takes 60 to 200 bytes of memory, and may be two bytes of text
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
