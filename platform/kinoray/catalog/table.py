"""The table of videos: one row a video, with where its bytes are and what is known of it.

Catalogs are immutable. What is easy to break: the digest names the content, not the file, so it must not depend on
how Parquet encodes it.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.catalog.folders import is_video, no_video_among, said_of_others
from kinoray.catalog.ids import unique_ids
from kinoray.catalog.inventory import is_manifest, newest_manifest
from kinoray.catalog.listing import CATALOG_SCHEMA, NOT_OTHERS, spool_listing
from kinoray.catalog.read import Reference, read_video, read_videos, time_problem
from kinoray.catalog.source import SourceFile, find_files, warn
from kinoray.config.files import local_path, local_uri
from kinoray.console import many
from kinoray.errors import (
    AccessDenied,
    CatalogError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, absolute, is_s3, join
from kinoray.storage.records import parse_json, parse_record, parse_table

__all__ = [
    "CATALOG_SCHEMA",
    "REFERENCE_COLUMNS",
    "Catalog",
    "Reference",
    "catalog_of_files",
    "catalog_of_source",
    "is_catalog",
    "lies_inside",
    "load_catalog",
    "read_video",
    "read_videos",
    "references",
    "save_catalog",
]

REFERENCE_COLUMNS = ("uri", "offset", "length", "sha256", "time_start_s", "time_end_s")
"""What `references` needs of a table."""

_LABELS_KEY = b"kinoray.labels"
_DIGEST_ROWS = 4096
_PACK_RECORD = "pack.json"  # the last thing that a pack writes


@dataclass(frozen=True)
class Catalog:
    """Rows of CATALOG_SCHEMA and the names of the classes.

    Raises:
        CatalogError: the schema is another one, a row has no video_id or uri, a video_id is used twice, or a label_id
            has no name.
    """

    table: pa.Table
    """The rows, in CATALOG_SCHEMA."""
    labels: tuple[str, ...] = ()
    """Class names, index = label_id; empty for an unlabelled catalog."""

    def __post_init__(self) -> None:
        if not self.table.schema.equals(CATALOG_SCHEMA):
            raise CatalogError(f"a catalog needs the columns {CATALOG_SCHEMA.names}, got {self.table.schema.names}")
        for name in ("video_id", "uri"):
            if self.table.column(name).null_count:
                num_null = many(self.table.column(name).null_count, "row")
                raise CatalogError(f"{name} may not be null: {num_null} without it")
        ids = self.table.column("video_id")
        if len(ids.unique()) != len(ids):
            video_id, count = Counter(ids.to_pylist()).most_common(1)[0]
            raise CatalogError(f"video_id {video_id!r} is used {count} times; it must be unique in a catalog")
        label_ids = set(self.table.column("label_id").unique().to_pylist()) - {None}
        if label_ids and not 0 <= min(label_ids) <= max(label_ids) < len(self.labels):
            raise CatalogError(
                f"label_id {max(label_ids)} has no name: the catalog names {many(len(self.labels), 'class')}"
            )

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the rows, in their order, and of the labels."""
        content = hashlib.sha256(json.dumps(self.labels).encode())
        for start in range(0, len(self), _DIGEST_ROWS):  # slices of a fixed size: chunks depend on how it was read
            rows = self.table.slice(start, _DIGEST_ROWS).to_pydict()
            content.update(json.dumps(rows, separators=(",", ":")).encode())
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def select(self, split: str) -> "Catalog":
        """The rows of one split; all of them for "".

        Raises:
            CatalogError: there is no such row; the message names the splits that there are.
        """
        if not split:
            if not len(self):
                raise CatalogError("the catalog is empty: it has no video at all")
            return self
        splits = self.table.column("split").to_pylist()
        if split not in splits:
            there = ", ".join(f"{name or 'none'} ({count})" for name, count in sorted(_counts(splits).items()))
            raise CatalogError(f"the catalog has no video of split {split!r}; its splits are: {there or 'none'}")
        return Catalog(self.table.filter(pa.array([name == split for name in splits])), self.labels)


def _counts(splits: list[str | None]) -> dict[str, int]:
    return Counter(name or "" for name in splits)


def references(table: pa.Table) -> list[Reference]:
    """Where the bytes of each row are, in the order of the rows; needs REFERENCE_COLUMNS."""
    columns = [table.column(name).to_pylist() for name in REFERENCE_COLUMNS]
    return [
        Reference(uri, offset, length, sha256, time_problem(start_s, end_s))
        for uri, offset, length, sha256, start_s, end_s in zip(*columns, strict=True)
    ]


def load_catalog(storage: Storage, uri: str) -> Catalog:
    """The catalog in a .parquet, or of a folder that `kinoray pack` wrote. Columns it lacks are null.

    Only a .parquet that is named itself may refer to what lies outside of its folder: who names a folder may not know
    what a table in it refers to. Addresses that are not absolute start at the table's folder.

    Raises:
        ObjectNotFound: there is none.
        CatalogError: it is not Parquet, lacks video_id or uri, holds values of a wrong type, or refers to what lies
            outside of the folder.
    """
    path = uri if uri.endswith(".parquet") else join(uri, "catalog.parquet")
    try:
        data = storage.read(path, max_bytes=MAX_TABLE_BYTES)
    except ObjectNotFound as error:
        raise ObjectNotFound(f"{error}; expected a folder that `kinoray pack` finished, or a .parquet") from error
    try:
        found = parse_table(data)
        labels = parse_json((found.schema.metadata or {}).get(_LABELS_KEY, b"[]"))
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("its labels are not a list of texts")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CatalogError(f"{path} is not a catalog: {' '.join(str(error).split())}") from error
    missing = {"video_id", "uri"} - set(found.schema.names)
    if missing:
        raise CatalogError(f"{path} lacks the column {' and '.join(sorted(missing))}; found {found.schema.names}")
    try:
        columns = [
            found.column(field.name).cast(field.type)
            if field.name in found.schema.names
            else pa.nulls(found.num_rows, field.type)
            for field in CATALOG_SCHEMA
        ]
        place = CATALOG_SCHEMA.get_field_index("uri")
        columns[place] = _absolute_uris(columns[place], path.rpartition("/")[0])
        catalog = Catalog(pa.table(columns, schema=CATALOG_SCHEMA), tuple(labels))
        catalog.table.validate(full=True)
    except (pa.ArrowException, CatalogError) as error:
        raise CatalogError(f"{path}: {error}") from error
    if path != uri:
        _require_inside(path, catalog)
    return catalog


def _absolute_uris(uris: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    if all(uri is None or uri.startswith("/") or "://" in uri or not uri for uri in uris.unique().to_pylist()):
        return uris
    start = absolute(folder or ".")
    found = [
        uri if not uri or uri.startswith("/") or "://" in uri else local_uri(absolute(join(start, uri)))
        for uri in uris.to_pylist()
    ]
    return pa.chunked_array([pa.array(found, pa.string())])


def _require_inside(path: str, catalog: Catalog) -> None:
    """Raise CatalogError for a row whose bytes lie outside of the folder of its table, also by way of a link."""
    root = absolute(path).rpartition("/")[0]
    uris = catalog.table.column("uri")
    for uri in uris.unique().to_pylist():
        if not lies_inside(root, uri):
            row = uris.to_pylist().index(uri)
            raise CatalogError(
                f"{path} row {row} ({catalog.table.column('video_id')[row].as_py()}) refers to {uri}, which lies "
                f"outside of {root}; if you trust this table, name it itself: {path}"
            )


def lies_inside(root: str, uri: str) -> bool:
    """Whether an address leads to something below a folder or prefix, links resolved."""
    if is_s3(root) or is_s3(uri):
        return uri.startswith(f"{root}/")
    return "\0" not in uri and os.path.realpath(local_path(uri)).startswith(f"{os.path.realpath(root).rstrip('/')}/")


def save_catalog(storage: Storage, uri: str, catalog: Catalog) -> None:
    """Write the catalog as one Parquet object; the labels go into the schema's metadata."""
    sink = io.BytesIO()
    metadata = {_LABELS_KEY: json.dumps(catalog.labels).encode()}
    pq.write_table(catalog.table.replace_schema_metadata(metadata), sink, compression="zstd")
    storage.put(uri, sink.getvalue())


def catalog_of_source(storage: Storage, source: str, *, say: Callable[[str], None] = warn) -> Catalog:
    """A catalog of what a user points at: a pack's folder, a .parquet, a .csv, a folder or prefix of videos, or one.

    Or an S3 Inventory: its manifest.json, or its folder.

    Videos in a folder are known by their names or first bytes and stay where they are; their rows are `listed`, not
    probed, and have no checksum. `say` is told what is left out.

    Raises:
        CatalogError: nothing there is a video, or the list is malformed.
        StorageError: it cannot be read.
    """
    if is_catalog(storage, source, say=say):
        return load_catalog(storage, source)
    if is_manifest(source):
        return _spooled(storage, source, say)
    files = find_files(storage, source, say=say)
    if not any(file.is_video for file in files) and newest_manifest({file.name for file in files}):
        return _spooled(storage, source, say)
    catalog = catalog_of_files(source, files)
    others = [file.name for file in files if not file.is_video and file.name not in NOT_OTHERS]
    if others:
        say(f"{source}: {said_of_others(others)}, and left out")
    return catalog


def _spooled(storage: Storage, source: str, say: Callable[[str], None]) -> Catalog:
    """The catalog of an S3 Inventory."""
    with scratch_folder("listing") as folder:
        paths = spool_listing(storage, source, folder, say=say)
        return Catalog(pa.concat_tables([pq.read_table(path) for path in paths]))


def is_catalog(storage: Storage, source: str, *, say: Callable[[str], None] = warn) -> bool:
    """Whether it is a .parquet or the folder of a finished pack, and not a .csv or a folder of videos.

    Only a pack's catalog stands for its folder: one that lies among videos, by whatever way it came there, must not
    take their place. `say` is told of it, and of videos beside a pack.

    Raises:
        StorageError: it cannot be read.
    """
    if source.endswith(".parquet"):
        return True
    table = join(source, "catalog.parquet")
    if source.lower().endswith(".csv"):
        return False
    with _left_aside_if_unreadable(source):
        if not storage.exists(table):
            return False
        if _is_pack(storage, join(source, _PACK_RECORD)):
            _say_beside(storage, source, say)
            return True
    say(
        f"{table} is ignored and the videos of its folder are listed, since no finished pack lies there (it would have "
        f"a {_PACK_RECORD}); to use that table, name it itself: {table}"
    )
    return False


def _is_pack(storage: Storage, uri: str) -> bool:
    return isinstance(parse_record(storage.read(uri), uri, dict).get("catalog_digest"), str)


def _say_beside(storage: Storage, source: str, say: Callable[[str], None]) -> None:
    """Tell of videos in a pack's folder that its catalog does not have: who names the folder may mean them."""
    prefix = absolute(source).rstrip("/") + "/"
    try:
        listed = [info.uri for info in storage.list(prefix, skipped=lambda folder, why: None)]
    except AccessDenied:  # by a bucket whose objects may be read, and not listed
        return
    beside = {local_uri(uri) for uri in listed if is_video(uri[len(prefix) :])}
    if beside:
        beside -= set(load_catalog(storage, source).table.column("uri").unique().to_pylist())
    if beside:
        are = "1 video that is not in it lies" if len(beside) == 1 else f"{len(beside):,} videos that are not in it lie"
        say(
            f"{source} stands for the pack in it (pack.json), and {are} beside it and will be left out; to mean the "
            "videos, move the pack elsewhere"
        )


@contextlib.contextmanager
def _left_aside_if_unreadable(source: str) -> Iterator[None]:
    """What cannot be read of a table in a folder, or of its record, does not keep from the videos beside it.

    But a bucket denies what is not there, too, and a store that is down says nothing.
    """
    try:
        yield
    except StorageUnavailable:
        raise
    except AccessDenied:
        if is_s3(source):
            raise
    except StorageError:
        return


def catalog_of_files(source: str, files: list[SourceFile]) -> Catalog:
    """The catalog of what `find_files` found in a source that is no catalog itself.

    Raises:
        CatalogError: nothing there is a video.
    """
    if not source.lower().endswith(".csv"):
        names = [file.name for file in files]
        files = [file for file in files if file.is_video]
        if not files:
            expected = "expected videos (.mp4, .mkv and others) at any depth, or a catalog"
            if "catalog.parquet" in names:
                expected = f"name the table itself to use it: {join(source, 'catalog.parquet')}"
            raise CatalogError(no_video_among(source, names, expected))
    if not files:
        raise CatalogError(f"{source} lists no video")
    return _listed(files)


def _listed(files: list[SourceFile]) -> Catalog:
    labels = tuple(sorted({file.label for file in files if file.label is not None}))
    label_ids = {label: index for index, label in enumerate(labels)}
    columns = {
        "video_id": unique_ids([file.name for file in files]),
        "uri": [file.uri for file in files],
        "label": [file.label for file in files],
        "label_id": [None if file.label is None else label_ids[file.label] for file in files],
        "split": [file.split for file in files],
        "size_bytes": [file.size_bytes for file in files],
        "status": ["listed"] * len(files),
    }
    arrays = [pa.array(columns.get(field.name, [None] * len(files)), field.type) for field in CATALOG_SCHEMA]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), labels)
