"""Finding the files that a user means: everything below a folder or prefix, or the rows of a CSV.

Nothing is left out here, whatever it is called; what to do with a file that is no video is the caller's business. A
name that is found is data: it never becomes a path to write to.
"""

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kinoray.catalog.folders import is_video, split_named
from kinoray.catalog.tables import decode_text, parse_table_text
from kinoray.config.files import FILE_SCHEME, local_path, local_uri
from kinoray.errors import CatalogError, ConfigError, IncompleteOutput, ObjectNotFound, StorageError, StorageUnavailable
from kinoray.storage.objects import Storage, absolute, is_s3, join

__all__ = ["UNLABELLED_SPLITS", "SourceFile", "find_files", "stat_size", "unique_ids", "warn"]

_SHOWN_FOLDERS = 10
_STAT_THREADS = 16
_MAX_ID_BYTES = 180  # leaves room for an extension in the 255 bytes of a file name
UNLABELLED_SPLITS = frozenset({"test", "holdout", "unlabelled"})
"""Splits whose videos may have no label."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a source names."""

    name: str
    """Path below the source, or as the CSV has it; unique in a source."""
    uri: str
    """Absolute address; of a name that is not UTF-8 percent-encoded, so that it can be written to a table."""
    size_bytes: int
    """Size in the listing; 0 if the file is not there, or cannot be looked at."""
    label: str | None = None
    """Class name, from a CSV."""
    split: str | None = None
    """Split, from a CSV; `Validation` is called `val`, and so on."""


def warn(text: str) -> None:
    """Say on stderr what was left out, and why: stdout may be a table."""
    print(f"WARNING: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def find_files(storage: Storage, source: str, *, say: Callable[[str], None] = warn) -> list[SourceFile]:
    """All files of a folder or s3:// prefix at any depth, or of a .csv (columns path or uri, label?, split?), by name.

    The address of a video (by its name) stands for that video. Paths in a CSV are relative to its folder, absolute, or
    s3://. A folder that is empty gives an empty list. Folders that cannot be listed are left out and told to `say`.

    Raises:
        CatalogError: the CSV lacks a column or a path, names a file twice, or is no CSV; with the line.
        ObjectNotFound: no such CSV, folder or bucket.
    """
    if source.lower().endswith(".csv"):
        return _read_csv(storage, source)
    prefix = absolute(source).rstrip("/") + "/"
    skipped: list[str] = []
    infos = storage.list(prefix, skipped=lambda folder, why: skipped.append(f"{folder} is left out: {why}"))
    files = [SourceFile(info.uri[len(prefix) :], local_uri(info.uri), info.size_bytes) for info in infos]
    for text in skipped[:_SHOWN_FOLDERS]:
        say(text)
    if len(skipped) > _SHOWN_FOLDERS:
        say(f"{len(skipped) - _SHOWN_FOLDERS} more folders below {source} are left out")
    if files:
        return files
    if is_video(source.rpartition("/")[2]) and storage.exists(source):
        info = storage.stat(source)
        return [SourceFile(source.rpartition("/")[2], local_uri(absolute(local_path(source))), info.size_bytes)]
    if not is_s3(source) and not Path(source).is_dir():
        if Path(source).exists():
            raise CatalogError(
                f"{source} is a file; expected a folder or s3:// prefix of videos, one video (.mp4 and others), a .csv "
                "or a .parquet"
            )
        raise ObjectNotFound(f"{source}: no such folder or video")
    return files


def unique_ids(names: Sequence[str]) -> list[str]:
    """A video_id for each (unique) name: the path without its extension, in letters, digits, `_` and `-`.

    `bus/a.b.mp4` -> `bus__a_b`: a key that every WebDataset reader splits at the same dot. Names that come out equal,
    or too long, all get a digest of the name at the end, whatever their order.
    """
    ids = [_sanitise(name) for name in names]
    counts = Counter(ids)
    return [
        video_id if counts[video_id] == 1 and len(video_id.encode()) <= _MAX_ID_BYTES else _with_digest(video_id, name)
        for video_id, name in zip(ids, names, strict=True)
    ]


def _sanitise(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    stem = base.rpartition(".")[0] or base
    text = unicodedata.normalize("NFC", f"{folder}{slash}{stem}")
    return re.sub(r"[^\w-]", "_", text.replace("/", "__"))


def _with_digest(video_id: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:10]
    return f"{video_id.encode()[:_MAX_ID_BYTES].decode(errors='ignore')}-{digest}"


def _read_csv(storage: Storage, source: str) -> list[SourceFile]:
    table = parse_table_text(
        source,
        decode_text(source, storage.read(source)),
        ("path", "uri"),
        "there is no column path: the first line must be path,label[,split]",
    )
    column = "path" if "path" in table.columns else "uri"
    folder = absolute(source).rpartition("/")[0]
    files: dict[str, SourceFile] = {}
    for record in table.records:
        where = f"{source} line {record.line}"
        name = record.cells[column].strip()
        if not name:
            raise CatalogError(f"{where}: the path is empty")
        split = record.cells.get("split", "").strip() or None
        file = SourceFile(
            name=name,
            uri=_uri_of(folder, name),
            size_bytes=0,
            label=record.cells.get("label", "").strip() or None,
            split=split_named(split) or split if split else None,
        )
        if file.uri in files:
            raise CatalogError(f"{where}: {name} is listed twice; a video can have one row only")
        files[file.uri] = file
    if len(files) != len(table.records):
        raise IncompleteOutput(f"{source}: {len(table.records)} rows, but {len(files)} videos; please report it")
    return sorted(_with_sizes(storage, list(files.values())), key=lambda file: file.name)


def _uri_of(folder: str, name: str) -> str:
    """The address of what a CSV calls `name`."""
    if is_s3(name) or ("://" in name and not name.startswith(FILE_SCHEME)):
        return name  # its reader says that there is no such store
    path = local_path(name)
    return local_uri(path if path.startswith("/") else absolute(join(folder, path)))


def _with_sizes(storage: Storage, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Ask for each file's size, in threads; what cannot be looked at stays in the list, and its reader will say why."""
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        sizes = list(pool.map(lambda file: stat_size(storage, file.uri), files))
    return [replace(file, size_bytes=size_bytes) for file, size_bytes in zip(files, sizes, strict=True)]


def stat_size(storage: Storage, uri: str) -> int:
    """The size of an object; 0 where it cannot be looked at: one that is not there, denied, or a link to itself.

    Raises:
        StorageUnavailable: the store is down.
    """
    try:
        return storage.stat(uri).size_bytes
    except StorageUnavailable:
        raise
    except (StorageError, ConfigError):
        return 0
