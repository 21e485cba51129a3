"""Whether an output may be written: said before any work, in one place for all verbs, and nothing is changed by asking.

A folder is a verb's where it is new, empty, or holds a record that this verb writes. What is easy to break: a command
that was killed must be able to go on, so that record has to be the first file that a verb writes; and of two that start
at once none may take the other's first file for a stranger's.
"""

import itertools
import os
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

from kinoray.config.files import local_path
from kinoray.config.shared import StorageConfig
from kinoray.errors import AccessDenied, ConfigError, ObjectNotFound
from kinoray.storage.objects import Storage, absolute, is_s3, join

__all__ = ["Writer", "require_file", "require_folder", "require_places"]

Writer = Literal["pack", "train", "tune", "label", "labels", "correct", "export", "report", "import", "demo", "doctor"]
"""Whose folder it is to be; `label` stands for all that label, `labels` writes tables."""

_OWN: Mapping[Writer, tuple[str, ...]] = {
    "pack": ("pack.json", "plan.json"),
    "train": ("run.json", "trial.json"),
    "tune": ("sweep.json",),
    "label": ("*/job.json", "evaluation.json", "calibration.json"),
    "labels": ("_by_kinoray.json",),
    "correct": ("corrections.json",),
    "export": ("quarantined.jsonl",),
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
