"""Finding the files that a user means: everything below a folder or prefix, or the rows of a CSV.

Nothing is left out here, whatever it is called; what to do with a file that is no video is the caller's business. A
name that is found is data: it never becomes a path to write to.
"""

import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.storage.objects import Storage, absolute, is_s3, join

__all__ = ["SourceFile", "find_files", "unique_ids"]

_STAT_THREADS = 16
_MAX_ID_BYTES = 180  # leaves room for an extension in the 255 bytes of a file name
_SPLIT_NAMES = {"validation": "val"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a source names."""

    name: str
    """Path below the source, or as the CSV has it; unique in a source."""
    uri: str
    """Absolute address."""
    size_bytes: int
    """Size in the listing; 0 if the file is not there."""
    label: str | None = None
    """Class name, from a CSV."""
    split: str | None = None
    """Split, from a CSV; `validation` is called `val`."""


def find_files(storage: Storage, source: str) -> list[SourceFile]:
    """All files of a folder or s3:// prefix at any depth, or of a .csv (columns path or uri, label?, split?), by name.

    Paths in a CSV are relative to its folder, absolute, or s3://. A folder that is empty gives an empty list.

    Raises:
        CatalogError: the CSV lacks a column or a path, or names a file twice.
        ObjectNotFound: no such CSV, folder or bucket.
    """
    if source.lower().endswith(".csv"):
        return _read_csv(storage, source)
    prefix = absolute(source).rstrip("/") + "/"
    files = [SourceFile(info.uri[len(prefix) :], info.uri, info.size_bytes) for info in storage.list(prefix)]
    if not files and not is_s3(source) and not Path(source).is_dir():
        if Path(source).exists():
            raise CatalogError(f"{source} is a file; expected a folder or s3:// prefix of videos, a .csv or a .parquet")
        raise ObjectNotFound(f"{source}: no such folder")
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
    try:
        text = storage.read(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{source} is not UTF-8 text: {error}") from error
    try:
        return _with_sizes(storage, _parse_csv(source, text))
    except csv.Error as error:
        raise CatalogError(f"{source} is not a CSV: {error}") from error


def _parse_csv(source: str, text: str) -> list[SourceFile]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
    column = columns.get("path", columns.get("uri"))
    if column is None:
        raise CatalogError(
            f"{source} has no column path: its first line must be path,label[,split], found {','.join(columns)!r}"
        )
    folder = absolute(source).rpartition("/")[0]
    files: dict[str, SourceFile] = {}
    for row in rows:
        name = (row[column] or "").strip()
        if not name:
            raise CatalogError(f"{source} line {rows.line_num}: the path is empty")
        is_absolute = is_s3(name) or name.startswith("/")
        file = SourceFile(
            name=name,
            uri=name if is_absolute else absolute(join(folder, name)),
            size_bytes=0,
            label=(row.get(columns.get("label", "")) or "").strip() or None,
            split=(row.get(columns.get("split", "")) or "").strip() or None,
        )
        if file.uri in files:
            raise CatalogError(f"{source} line {rows.line_num}: {name} is listed twice; a video can have one row only")
        files[file.uri] = replace(file, split=_SPLIT_NAMES.get(file.split or "", file.split))
    return sorted(files.values(), key=lambda file: file.name)


def _with_sizes(storage: Storage, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Ask for each file's size, in threads; a file that is not there stays in the list, and its reader will say so."""

    def with_size(file: SourceFile) -> SourceFile:
        try:
            return replace(file, size_bytes=storage.stat(file.uri).size_bytes)
        except ObjectNotFound:
            return file

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return list(pool.map(with_size, files))
