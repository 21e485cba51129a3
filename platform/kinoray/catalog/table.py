"""The table of videos: one row a video, with where its bytes are and what is known of it.

Catalogs are immutable. What is easy to break: what a folder stands for, a pack's catalog or the videos in it, is
decided here alone, so that all verbs say the same.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray.catalog.folders import is_video, no_video_among, said_of_others, unique_ids
from kinoray.catalog.inventory import is_manifest, newest_manifest, said_of_manifests
from kinoray.catalog.listing import NOT_OTHERS, spool_listing
from kinoray.catalog.pieces import Pieces, find_pieces, is_pieces, lies_inside
from kinoray.catalog.read import Reference, read_video, read_videos, time_problem
from kinoray.catalog.rows import (
    CATALOG_SCHEMA,
    GROUP_ROWS,
    OF_FEW_VALUES,
    Rows,
    RowsDigest,
    check_rows,
    no_split,
    said_repeated,
    schema_with,
    splits_in,
)
from kinoray.catalog.source import SourceFile, find_files, warn
from kinoray.config.files import local_uri
from kinoray.errors import (
    AccessDenied,
    CatalogError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.records import parse_record

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
    "open_pieces",
    "read_video",
    "read_videos",
    "references",
    "rows_of_source",
    "save_catalog",
]

REFERENCE_COLUMNS = ("uri", "offset", "length", "sha256", "time_start_s", "time_end_s")
"""What `references` needs of a table."""

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
        check_rows(self.table, len(self.labels))
        ids = self.table.column("video_id")
        if len(ids.unique()) != len(ids):
            video_id, count = Counter(ids.to_pylist()).most_common(1)[0]
            raise CatalogError(f"video_id {video_id!r} is used {count} times; it must be unique in a catalog")

    @property
    def is_multilabel(self) -> bool:
        """Whether a video may have several classes, or none: the rows have label_ids."""
        lists = self.table.column("label_ids")
        return bool(lists.null_count < len(lists))

    def class_names(self) -> list[tuple[str, ...]]:
        """The classes of each video, by name; none of an unlabelled one."""
        if not self.is_multilabel:
            return [() if label is None else (label,) for label in self.table.column("label").to_pylist()]
        return [tuple(self.labels[index] for index in ids or ()) for ids in self.table.column("label_ids").to_pylist()]

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the rows, in their order, and of the labels."""
        content = RowsDigest(self.labels)
        content.update(self.table)
        return content.hexdigest()

    def batches(self, begin: int = 0) -> Iterator[pa.Table]:
        """The rows from row `begin` on, a few at a time."""
        for start in range(begin, len(self), GROUP_ROWS):
            yield self.table.slice(start, GROUP_ROWS)

    def where(self, row: int) -> str:
        """As of `Rows`."""
        return f"row {row}"

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
        counts = splits_in(self.table)
        if not counts[split]:
            raise no_split(split, counts)
        return Catalog(self.table.filter(pc.fill_null(pc.equal(self.table.column("split"), split), False)), self.labels)


def references(table: pa.Table) -> list[Reference]:
    """Where the bytes of each row are, in the order of the rows; needs REFERENCE_COLUMNS."""
    columns = [table.column(name).to_pylist() for name in REFERENCE_COLUMNS]
    return [
        Reference(uri, offset, length, sha256, time_problem(start_s, end_s))
        for uri, offset, length, sha256, start_s, end_s in zip(*columns, strict=True)
    ]


def load_catalog(storage: Storage, uri: str) -> Catalog:
    """The catalog in a .parquet, in many (`PLACE/*.parquet`), or of a folder that `kinoray pack` wrote.

    Only a .parquet that is named itself may refer to what lies outside of its folder: who names a folder may not know
    what a table in it refers to. Addresses that are not absolute start at the table's folder.

    Raises:
        ObjectNotFound: there is none.
        CatalogError: it is not Parquet, lacks video_id or uri, holds values of a wrong type, or refers to what lies
            outside of the folder.
    """
    pieces = open_pieces(storage, uri)
    table = pa.concat_tables([CATALOG_SCHEMA.empty_table(), *pieces.batches()])
    ids = table.column("video_id")
    try:
        if len(ids.unique()) != len(ids):
            names = ids.to_pylist()
            name, count = Counter(names).most_common(1)[0]
            first = names.index(name)
            raise said_repeated(name, count, pieces, first, names.index(name, first + 1))
        return Catalog(table, pieces.labels)
    except CatalogError as error:
        raise CatalogError(f"{uri}: {error}") from error


def open_pieces(storage: Storage, uri: str) -> Pieces:
    """The rows of such a catalog as a stream; `load_catalog` says what it may be, and what is raised."""
    if is_pieces(storage, uri):
        return Pieces(storage, find_pieces(storage, uri))
    path = uri if uri.endswith(".parquet") else join(uri, "catalog.parquet")
    try:
        return Pieces(storage, [path], root="" if path == uri else absolute(path).rpartition("/")[0])
    except ObjectNotFound as error:
        if uri.endswith(".parquet"):
            with contextlib.suppress(ObjectNotFound):
                return Pieces(storage, find_pieces(storage, uri))  # Spark writes a folder of such a name
        raise ObjectNotFound(f"{error}; expected a folder that `kinoray pack` finished, or a .parquet") from error


def save_catalog(storage: Storage, uri: str, catalog: Catalog) -> None:
    """Write the catalog as one Parquet object; the labels go into the schema's metadata."""
    sink = io.BytesIO()
    table = catalog.table.replace_schema_metadata(schema_with(catalog.labels).metadata)
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS, use_dictionary=list(OF_FEW_VALUES))
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


def rows_of_source(
    storage: Storage, source: str, folder: Path, *, keep: str = "", say: Callable[[str], None] = warn
) -> Rows:
    """As `catalog_of_source`, but as a stream, of which few rows are in memory; a list (.csv) is, whole.

    Args:
        folder: of this machine; holds what is listed as long as the rows are used.
        keep: where the listing of a large prefix leaves what it has (see `spool_listing`).
    """
    if is_catalog(storage, source, say=say):
        return open_pieces(storage, source)
    if source.lower().endswith(".csv"):
        return catalog_of_source(storage, source, say=say)
    listed = folder / "listing"
    listed.mkdir()
    return Pieces(Storage(), [str(path) for path in spool_listing(storage, source, listed, keep=keep, say=say)])


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
            expected += said_of_manifests(source, names)
            raise CatalogError(no_video_among(source, names, expected))
    if not files:
        raise CatalogError(f"{source} lists no video")
    return _listed(files)


def _listed(files: list[SourceFile]) -> Catalog:
    labels = tuple(
        sorted({label for file in files for label in (file.label, *(file.labels or ())) if label is not None})
    )
    label_ids = {label: index for index, label in enumerate(labels)}
    columns: dict[str, list[Any]] = {
        "video_id": unique_ids([file.name for file in files]),
        "uri": [file.uri for file in files],
        "label": [file.label for file in files],
        "label_id": [None if file.label is None else label_ids[file.label] for file in files],
        "split": [file.split for file in files],
        "size_bytes": [file.size_bytes for file in files],
        "status": ["listed"] * len(files),
        "label_ids": [
            None if file.labels is None else sorted(map(label_ids.__getitem__, file.labels)) for file in files
        ],
    }
    arrays = [pa.array(columns.get(field.name, [None] * len(files)), field.type) for field in CATALOG_SCHEMA]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), labels)
