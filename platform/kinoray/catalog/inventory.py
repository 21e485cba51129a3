"""S3 Inventory: the lists of all objects of a bucket that S3 writes every day or week, read in place of a listing.

An inventory is a folder: DATE/manifest.json names the files of that day, which lie in data/ beside the dates. Whoever
wrote it may be a stranger: of a file's address only its name counts, so what is read lies in that folder; each file has
the size and MD5 that the manifest says; and nothing of a file is taken into memory whole.
"""

import codecs
import csv
import hashlib
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from kinoray.catalog.source import News
from kinoray.console import many
from kinoray.errors import CatalogError, ChecksumMismatch, ObjectNotFound
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, join
from kinoray.storage.records import as_name, parse_json
from kinoray.storage.stretches import is_marker
from kinoray.storage.tables import iter_table

__all__ = ["Inventory", "inventory_rows", "is_manifest", "newest_manifest", "open_inventory", "said_of_manifests"]

_MANIFEST, _CHECKSUM = "manifest.json", "manifest.checksum"
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\dZ")
_MAX_MANIFEST_BYTES = 2**26
_READ_BYTES = 2**24
_MAX_LINE_BYTES = 2**16  # a key has 1,024 bytes, three times as many characters at most, and 20 other cells
_MAX_KEY_BYTES = 1024
_COLUMNS = {
    "bucket": "Bucket",
    "key": "Key",
    "size": "Size",
    "is_latest": "IsLatest",
    "is_delete_marker": "IsDeleteMarker",
}
"""What is read: names in Parquet, and in the fileSchema of CSV."""
_BATCH_ROWS = 4096  # that are Python objects at once
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class _File:
    """One of the files that a manifest names."""

    uri: str
    size_bytes: int
    md5: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a manifest says."""

    uri: str
    """Of the manifest."""
    bucket: str
    """Whose objects are listed."""
    columns: tuple[str, ...] | None
    """Of a CSV, in order; None for Parquet."""
    files: tuple[_File, ...]


def is_manifest(uri: str) -> bool:
    """Whether a source is the manifest of an inventory, by its name."""
    return uri.rpartition("/")[2] == _MANIFEST


def newest_manifest(names: Collection[str]) -> str | None:
    """Of the names below a folder, the manifest of the newest finished inventory: S3 writes its checksum last."""
    found = [name for name in names if is_manifest(name) and name.replace(_MANIFEST, _CHECKSUM) in names]
    dated = [name for name in found if _DATE.fullmatch(name.removesuffix(f"/{_MANIFEST}"))]
    return max(dated, default=_MANIFEST if _MANIFEST in found else None)


def said_of_manifests(source: str, names: Collection[str]) -> str:
    """What is added to the error of a folder without videos, where inventories lie in it; empty where none do."""
    found = max((name for name in names if is_manifest(name)), default=None)
    return f"; an S3 Inventory is named by its manifest: {join(source, found)}" if found else ""


def open_inventory(storage: Storage, uri: str, say: Callable[[str], None], *, is_named: bool) -> Inventory:
    """Read the manifest; `say` is told whose objects it lists.

    Args:
        is_named: the user named this manifest; if it was found in a folder, that must be called as S3 calls it, so that
            the user has named the bucket.

    Raises:
        CatalogError: it is no manifest, or one of an inventory that is not read.
        ChecksumMismatch: its checksum is another one.
    """
    data = storage.read(uri, max_bytes=_MAX_MANIFEST_BYTES)
    _check_digest(storage, uri, data)
    try:
        inventory, created = _parsed(uri, parse_json(data))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CatalogError(
            f"{uri} is not the manifest of an S3 Inventory ({reason}); to label a folder of videos, name the folder"
        ) from error
    if not is_named and uri.split("/")[-4:-3] != [inventory.bucket]:
        raise CatalogError(
            f"{uri} lists objects of s3://{inventory.bucket}, and its folder is not called so; if you trust it, name "
            f"the manifest itself: {uri}"
        )
    made = f"of {datetime.fromtimestamp(created / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    files = many(len(inventory.files), "file")
    say(News(f"{uri}: an S3 Inventory {made} in {files}; videos are read from s3://{inventory.bucket}"))
    return inventory


def _check_digest(storage: Storage, uri: str, data: bytes) -> None:
    """Compare a manifest with the checksum beside it, where there is one."""
    try:
        said = (
            storage.read(uri.replace(_MANIFEST, _CHECKSUM), max_bytes=_MAX_KEY_BYTES).decode(errors="replace").strip()
        )
    except ObjectNotFound:
        return
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if said.lower() != found:
        raise ChecksumMismatch(f"{uri} has the MD5 {found}, its {_CHECKSUM} says {said!r:.80}; fetch both again")


def _parsed(uri: str, record: dict[str, Any]) -> tuple[Inventory, int]:
    kind = record["fileFormat"]
    if kind not in ("CSV", "Parquet"):
        raise CatalogError(
            f"{uri}: an inventory in {kind!r:.40} is not read; have S3 write the next one as Apache Parquet, or as CSV"
        )
    columns = None
    if kind == "CSV":
        columns = tuple(name.strip() for name in record["fileSchema"].split(","))
        if len(set(columns)) < len(columns) or not {"Bucket", "Key"} <= set(columns):
            raise ValueError(f"its fileSchema is {record['fileSchema']!r:.80}, expected Bucket, Key and others")
    folder = "/".join(uri.split("/")[:-2])
    files = []
    for item in record["files"]:
        parts = item["key"].split("/")
        if parts[-2:-1] != ["data"]:
            raise ValueError(f"the file {item['key']!r:.80} does not lie in the folder data")
        size_bytes, md5 = item["size"], item["MD5checksum"]
        if (
            not isinstance(size_bytes, int)
            or not 0 < size_bytes <= MAX_TABLE_BYTES
            or not re.fullmatch("[0-9a-f]{32}", md5)
        ):
            raise ValueError(f"the file {item['key']!r:.80} has no size up to {MAX_TABLE_BYTES:,} and MD5checksum")
        files.append(_File(join(folder, "data", as_name(parts[-1], "a file")), size_bytes, md5))
    if len({file.uri for file in files}) < len(files):
        raise ValueError("a file is named twice")
    created = int(record["creationTimestamp"])
    if not 0 <= created < 2**42:
        raise ValueError(f"creationTimestamp is {created}")
    return Inventory(uri, as_name(record["sourceBucket"], "sourceBucket"), columns, tuple(files)), created


def inventory_rows(
    storage: Storage, inventory: Inventory, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[str, int | None]]:
    """The keys of all objects and their sizes where the inventory has them, in the order of its files.

    Args:
        folder: takes one file at a time.

    Raises:
        CatalogError: a file is malformed; with its line or row.
        ChecksumMismatch: it is not the file of which the manifest speaks.
    """
    read = _parquet_rows if inventory.columns is None else _csv_rows
    left_out = {"older versions": 0, "delete markers": 0}
    for file in inventory.files:
        path = folder / "inventory"
        _fetch(storage, file, path)
        for where, row in read(inventory, file, path):
            if row["bucket"] != inventory.bucket:
                raise CatalogError(
                    f"{where}: an object of s3://{row['bucket']}, expected those of s3://{inventory.bucket}"
                )
            if row.get("is_delete_marker"):
                left_out["delete markers"] += 1
            elif row.get("is_latest") is False:
                left_out["older versions"] += 1
            elif not is_marker(row["key"], row.get("size")):
                yield row["key"], row.get("size")
        path.unlink()
    told = [f"{count:,} {what}" for what, count in left_out.items() if count]
    if told:
        say(News(f"{inventory.uri}: {' and '.join(told)} are left out"))


def _fetch(storage: Storage, file: _File, path: Path) -> None:
    """A file as the manifest has it, on this machine."""
    digest = hashlib.md5(usedforsecurity=False)
    there_bytes = storage.stat(file.uri).size_bytes
    if there_bytes != file.size_bytes:
        raise ChecksumMismatch(
            f"{file.uri} has {there_bytes:,} bytes, its manifest says {file.size_bytes:,}; take a newer inventory"
        )
    with path.open("wb") as target:
        for start in range(0, file.size_bytes, _READ_BYTES):
            data = storage.read_range(file.uri, start, min(_READ_BYTES, file.size_bytes - start))
            digest.update(data)
            target.write(data)
    if digest.hexdigest() != file.md5:
        raise ChecksumMismatch(
            f"{file.uri} has the MD5 {digest.hexdigest()}, its manifest says {file.md5}; take a newer inventory"
        )


_Row = tuple[str, dict[str, Any]]
"""Where it is, for messages, and its cells by _COLUMNS."""


def _parquet_rows(inventory: Inventory, file: _File, path: Path) -> Iterator[_Row]:
    number = 0
    try:
        for batch in iter_table(path, tuple(_COLUMNS), needed=("bucket", "key")):
            for start in range(0, len(batch), _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                    where = f"{file.uri} row {number}"
                    yield where, _checked(where, row)
                    number += 1
    except pa.ArrowException as error:
        raise CatalogError(f"{file.uri} is not a table of an S3 Inventory: {error}") from error


def _csv_rows(inventory: Inventory, file: _File, path: Path) -> Iterator[_Row]:
    assert inventory.columns is not None
    places = {name: inventory.columns.index(column) for name, column in _COLUMNS.items() if column in inventory.columns}
    reader = csv.reader(_lines(file, path), strict=True)
    try:
        for cells in reader:
            where = f"{file.uri} line {reader.line_num}"
            if len(cells) != len(inventory.columns):
                raise CatalogError(f"{where}: {len(cells)} cells, its manifest names {len(inventory.columns)} columns")
            row: dict[str, Any] = {name: cells[place] for name, place in places.items()}
            for name in ("is_latest", "is_delete_marker"):
                if row.get(name):
                    row[name] = _TRUTH.get(row[name].lower(), row[name])
            try:
                row["key"] = unquote_to_bytes(row["key"].replace("+", " ")).decode()
                if "size" in row:
                    row["size"] = int(row["size"]) if re.fullmatch("[0-9]{1,18}", row["size"]) else row["size"] or None
            except UnicodeDecodeError as error:
                raise CatalogError(f"{where}: the key {row['key']!r:.80} is no URL-encoded text") from error
            yield where, _checked(where, {name: None if cell == "" else cell for name, cell in row.items()})
    except csv.Error as error:
        raise CatalogError(f"{file.uri} line {reader.line_num}: {error}") from error


def _lines(file: _File, path: Path) -> Iterator[str]:
    """The lines of a .csv.gz (or .csv), decompressed as they are asked for."""
    is_packed = file.uri.lower().endswith(".gz")
    unpack = zlib.decompressobj(31)
    rest, number = b"", 0
    with path.open("rb") as source:
        while data := source.read(2**16):
            while data:
                try:
                    text = unpack.decompress(data, _READ_BYTES) if is_packed else data
                except zlib.error as error:
                    raise CatalogError(f"{file.uri} behind line {number} is damaged, or no gzip ({error})") from error
                data = unpack.unconsumed_tail or unpack.unused_data if is_packed else b""
                if unpack.eof and data:  # another member
                    unpack = zlib.decompressobj(31)
                *lines, rest = (rest + text).split(b"\n")
                if len(rest) > _MAX_LINE_BYTES:
                    raise CatalogError(
                        f"{file.uri} line {number + len(lines) + 1} has more text than a line of an inventory"
                    )
                for line in lines:
                    number += 1
                    yield _decoded(file, number, line) + "\n"
    if is_packed and not unpack.eof:
        raise CatalogError(f"{file.uri} is cut: its gzip does not end")
    if rest:
        yield _decoded(file, number + 1, rest)


def _decoded(file: _File, number: int, line: bytes) -> str:
    try:
        return line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
    except UnicodeDecodeError as error:
        raise CatalogError(f"{file.uri} line {number} is no UTF-8 text") from error


def _checked(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row, whose values are of their types and can be."""
    kinds = {"bucket": str, "key": str, "size": int, "is_latest": bool, "is_delete_marker": bool}
    for name, value in row.items():
        needed = name in ("bucket", "key")
        if not (isinstance(value, kinds[name]) or (value is None and not needed)):
            raise CatalogError(f"{where}: {name} is {value!r:.80}, expected {kinds[name].__name__}")
    if len(row["key"].encode(errors="surrogatepass")) > _MAX_KEY_BYTES or (row.get("size") or 0) < 0:
        raise CatalogError(f"{where}: no object has the key {row['key']!r:.80} and {row.get('size')} bytes")
    return row
