"""Reading back the JSON that kinoray and others wrote (Parquet: tables.py); nothing can run code when it is read.

Whatever lies in a folder may come from a stranger, so size, depth and values are bounded before anybody looks at them,
and a name that is joined to a folder is a name and no path.

Whether an output may be written is said here, too, before any work, and nothing is changed by asking: a folder is a
verb's where it is new, empty, or holds a record that this verb writes. What is easy to break: a command that was killed
must be able to go on, so that record has to be the first file that a verb writes; and of two that start at once none
may take the other's first file for a stranger's.
"""

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from kinoray.config.file import config_from_mapping, first_repeated
from kinoray.config.files import local_path
from kinoray.config.shared import StorageConfig
from kinoray.errors import AccessDenied, ChecksumMismatch, ConfigError, ObjectNotFound
from kinoray.storage.objects import MAX_RECORD_BYTES, Storage, absolute, is_s3, join

__all__ = [
    "MAX_RECORD_BYTES",
    "Writer",
    "as_name",
    "as_seconds",
    "is_name",
    "parse_json",
    "parse_lines",
    "parse_record",
    "read_record",
    "record_of",
    "require_file",
    "require_folder",
    "require_places",
]

T = TypeVar("T")


_MAX_DEPTH = 64  # lists and objects inside each other; ours have five
_MAX_CONTAINERS = 4_000_000  # each takes 60 to 200 bytes of memory, and may be two bytes of text
_MAX_SECONDS = 2**35  # a thousand years
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Writer = Literal["pack", "train", "tune", "label", "labels", "correct", "export", "report", "import", "demo", "doctor"]
"""Whose folder it is to be; `label` stands for all that label, `labels` writes tables."""
_OWN: Mapping[Writer, tuple[str, ...]] = {
    "pack": ("pack.json", "plan.json"),
    "train": ("run.json", "trial.json"),
    "tune": ("sweep.json",),
    "label": ("*/job.json", "evaluation.json", "calibration.json"),
    "labels": ("_by_kinoray.json",),
    "correct": ("corrections.json",),
    "export": ("quarantined.jsonl", "network.json"),
    "report": ("data/site.js",),
    "import": ("checkpoint.json", "import.json"),
    "demo": ("demo.json",),
    "doctor": ("doctor.json", "bad.parquet"),
}
"""The records of each, at least one of which is there as soon as any other file is; `*` is any folder."""
_WHAT = {
    "pack": "a pack",
    "train": "a training run",
    "tune": "a sweep",
    "label": "labellings",
    "labels": "a table of labels",
    "correct": "a corrected set",
    "export": "an export",
    "report": "a report",
    "import": "a checkpoint",
    "demo": "a demo",
    "doctor": "what doctor found",
}
_SHOWN = 3
_LISTED_KEYS = 1000  # of a prefix: one page


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


def require_folder(storage: Storage, option: str, uri: str, writer: Writer) -> None:
    """Refuse a folder or s3:// prefix that holds what is not this writer's, or that cannot be written.

    Args:
        option: the flag that names it, for the message.

    Raises:
        ConfigError: it is a file, holds other things, or cannot be written.
        StorageUnavailable: the store is down.
    """
    place = absolute(uri).rstrip("/") or "/"
    if is_s3(place):
        names = _names_in_store(storage, option, place)
    else:
        _require_writable(option, uri, local_path(place))
        names = _names_in_folder(local_path(place))
    if not names or _record_in(storage, place, names, writer):  # asked last: what was listed came after its record
        return
    for other in _OWN:
        if record := _record_in(storage, place, names, other):
            raise ConfigError(f"{option} {uri} holds {_WHAT[other]} ({record}): choose an empty folder")
    if "job.json" in names:
        raise ConfigError(f"{option} {uri} is the folder of one labelling (job.json): choose an empty folder")
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    raise ConfigError(f"{option} {uri} holds files that are not kinoray's ({shown}): choose an empty folder")


def require_places(config: Any, writes: Writer | Literal["file"]) -> None:
    """What a verb that starts slowly would say of its source and its output, said before it starts.

    Raises:
        ObjectNotFound: the source is a local path, and nothing is there.
        Else as require_folder, and require_file.
    """
    storage = getattr(config, "storage", None)
    if config.out and writes == "file":
        require_file("out", config.out)
    elif config.out and writes != "file":
        require_folder(
            Storage(storage if isinstance(storage, StorageConfig) else StorageConfig()), "out", config.out, writes
        )
    source = "" if writes == "import" else getattr(config, "catalog", "") or getattr(config, "source", "")
    place, _, name = source.rpartition("/")
    looked = (place or ".") if "*" in name else source  # the files of a catalog in pieces are named together
    if source and not is_s3(source) and not os.path.lexists(local_path(absolute(looked))):
        packed = "file; expected a folder that `kinoray pack` finished, or a .parquet"
        raise ObjectNotFound(
            f"{absolute(source)}: no such {packed if writes in ('train', 'tune') else 'folder or video'}"
        )


def require_file(option: str, uri: str) -> None:
    """Refuse a name that is a folder's or cannot be written; a file that is there is replaced.

    Raises:
        ConfigError: as said.
    """
    place = absolute(uri)
    if is_s3(place):
        return
    path = local_path(place)
    if place.endswith("/") or os.path.isdir(path):
        raise ConfigError(f"{option} {uri} is a folder: choose the name of a file")
    _require_writable(option, uri, os.path.dirname(path))


def _record_in(storage: Storage, place: str, names: list[str], writer: Writer) -> str:
    """A record of this writer's; empty if there is none."""
    for record in _OWN[writer]:
        folder, _, name = record.rpartition("/")
        found = [f"{folder}/" if folder else record]
        if folder == "*":
            found = [name for name in names if name.endswith("/")]
        for first in found:
            path = first + name if folder else record
            if first in names and storage.exists(join(place, path)):
                return path
    return ""


def _names_in_store(storage: Storage, option: str, place: str) -> list[str]:
    """What a prefix holds, as `_names_in_folder`, as far as its first keys tell."""
    try:
        if storage.exists(place):
            raise ConfigError(f"{option} {place} is an object: choose an empty prefix")
        keys = [info.uri[len(place) + 1 :] for info in itertools.islice(storage.list(place + "/"), _LISTED_KEYS)]
    except (AccessDenied, ObjectNotFound) as error:
        raise ConfigError(f"{option} {error}") from error
    first = [key.partition("/") for key in keys]
    return sorted({name + slash for name, slash, _ in first if _counts(name)})


def _names_in_folder(path: str) -> list[str]:
    """What a folder holds, sorted; a folder in it that has files ends in "/", an empty one does not count."""
    if not os.path.isdir(path):
        return []
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not _counts(entry.name):
                continue
            if not entry.is_dir():
                names.append(entry.name)
            elif any(_counts(name) for _, _, files in os.walk(entry.path) for name in files):
                names.append(entry.name + "/")
    return sorted(names)


def _counts(name: str) -> bool:
    """Whether it is somebody's: not hidden (.DS_Store, what we write aside), not the file system's own."""
    return not name.startswith(".") and name != "lost+found"


def _require_writable(option: str, uri: str, path: str) -> None:
    """Refuse a folder in which, or in the nearest that is there above it, no file can be made and removed again."""
    nearest = path
    while not os.path.isdir(nearest):
        if os.path.lexists(nearest):
            what = "is a file" if nearest == path else f"cannot be a folder, since {nearest} is a file"
            raise ConfigError(f"{option} {uri} {what}: choose an empty folder")
        nearest = os.path.dirname(nearest)
    try:
        os.scandir(nearest).close()
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except PermissionError:
        raise ConfigError(
            f"{option} {uri} cannot be written: no permission; choose another folder, or have its owner allow you to "
            f"list and write {nearest}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{option} {uri} cannot be written: {nearest}: {error.strerror or error}; choose another folder"
        ) from None
