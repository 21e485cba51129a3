"""Listings of any size as catalogs: Parquet files whose rows are in the order of their names, made in bounded memory.

Names are collected in sorted runs on the disk, merged, judged and written. Rows, order and video_ids are those that
`find_files` and `unique_ids` give of the same source; a test holds the two together. What is easy to break: nothing
here may hold something for each file, so what is not a count or a bounded sample goes to the disk.
"""

import contextlib
import hashlib
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.catalog.folders import (
    MAX_ID_LEVEL,
    SkippedFolders,
    ending_shown,
    id_at,
    no_video_of_endings,
    said_of_endings,
)
from kinoray.catalog.inventory import (
    inventory_rows,
    is_manifest,
    newest_manifest,
    open_inventory,
    said_of_manifests,
)
from kinoray.catalog.rows import CATALOG_SCHEMA, GROUP_ROWS, OF_FEW_VALUES
from kinoray.catalog.runs import Kept, Piece, Row, Runs, batched, rows_of
from kinoray.catalog.source import Judgement, News, SourceFile, find_files, is_unknown, warn
from kinoray.config.files import local_path, local_uri
from kinoray.errors import CatalogError
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.stretches import WHOLE

__all__ = ["FILE_ROWS", "NOT_OTHERS", "spool_listing"]

FILE_ROWS = 2**20
"""Rows of a file, but of the last one."""
NOT_OTHERS = ("catalog.parquet", "pack.json")
"""What lies in a folder and is not said to be left out: `is_catalog` has spoken of it."""

_MAX_ENDINGS = 10_000  # that are told apart among what is left out
_MAX_MANIFESTS = 10_000  # names of inventories that are kept: one a day for 27 years
_PARTITION_ROWS = 2**18
_SAY_EVERY_S = 10.0

_Words = np.ndarray[Any, np.dtype[np.uint64]]


def spool_listing(
    storage: Storage, source: str, folder: Path, *, keep: str = "", say: Callable[[str], None] = warn
) -> list[Path]:
    """The catalog of the videos in a folder, a prefix or an S3 Inventory (its manifest.json or its folder), or of one.

    Args:
        source: no catalog and no list; `catalog_of_source` reads those.
        folder: a new or empty one on this machine, for the files and, meanwhile, several times their size.
        keep: where a large listing of a prefix leaves what it has, so that one that was interrupted goes on there
            within a day; a folder or prefix of its own, which is empty afterwards.
        say: told what is left out, and where some files speak for others.

    Returns:
        Parquet files in CATALOG_SCHEMA; their rows follow each other in the order of their names.

    Raises:
        CatalogError: nothing there is a video, or the inventory is malformed.
        StorageError: it cannot be read.
    """
    if source.lower().endswith((".csv", ".parquet")):
        raise ValueError(f"{source} is a list or a catalog, and not to be listed")
    manifest, is_named = source, True
    if not is_manifest(source):
        listed = _spool_files(storage, source, folder, keep, say)
        if not isinstance(listed, str):
            return listed
        manifest, is_named = listed, False
    inventory = open_inventory(storage, manifest, say, is_named=is_named)
    spool = _Spool(folder, f"s3://{inventory.bucket}/")
    for key, size_bytes in inventory_rows(storage, inventory, folder, say):
        spool.add(key, size_bytes)
    paths = spool.write(storage, manifest, say)
    if spool.runs.odd:
        name, one, other = spool.runs.odd
        raise CatalogError(
            f"{manifest}: the key {_text_of(name)!r:.80} is there with {one} and with {other} bytes, and nothing says "
            "which is the latest; have S3 write the field IsLatest, or only current versions"
        )
    if spool.runs.num_repeated:
        say(f"{manifest}: {spool.runs.num_repeated:,} rows of keys that it has twice are left out")
    return paths or spool.refuse(manifest)


def _spool_files(
    storage: Storage, source: str, folder: Path, keep: str, say: Callable[[str], None]
) -> list[Path] | str:
    """The files; or the manifest of the newest inventory in the source, where that and no video is there."""
    prefix = local_path(absolute(source)).rstrip("/") + "/"
    spool = _Spool(folder, prefix)
    kept = Kept(storage, keep, prefix, spool.runs.folder) if keep and is_s3(prefix) else None
    with kept or contextlib.nullcontext():
        _collect(storage, source, spool, kept, say)
        paths = spool.write(storage, source, say)
        if kept:
            kept.clear()
    if not paths and (newest := newest_manifest(spool.manifests)):
        return join(absolute(source), newest)
    return paths or spool.refuse(source)


def _collect(storage: Storage, source: str, spool: "_Spool", kept: Kept | None, say: Callable[[str], None]) -> None:
    """All files of the source."""
    if is_s3(spool.prefix):
        _collect_objects(storage, source, spool, kept, say)
    else:
        skipped = SkippedFolders()
        progress = _Progress(source, say)
        for info in storage.list_unsorted(spool.prefix, skipped=skipped.add):
            spool.add(info.uri[len(spool.prefix) :], info.size_bytes)
            progress.add(1)
        skipped.tell(source, say)
    if not spool.num_files:
        for file in find_files(storage, source, say=say):  # it may be one video
            spool.prefix = local_path(file.uri).removesuffix(file.name)
            spool.add(file.name, file.size_bytes)


def _collect_objects(
    storage: Storage, source: str, spool: "_Spool", kept: Kept | None, say: Callable[[str], None]
) -> None:
    """All objects below the prefix; each piece of the listing is a run, and kept."""
    gaps = WHOLE if kept is None else kept.load(spool.adopt)
    if kept and kept.num_loaded:
        known = f"{kept.num_loaded:,} objects are known from it"
        say(News(f"{source}: goes on with a listing that was interrupted: {known}"))
    server = storage.server(spool.prefix)
    start = len(spool.prefix.split("/", 3)[3])
    pieces: dict[str, Piece] = {}
    progress = _Progress(source, say)
    for stretch in storage.stretches(spool.prefix, gaps):
        progress.add(len(stretch.entries))
        piece = pieces.pop(stretch.after, None) or Piece(stretch.after)
        piece.add([entry[0][start:] for entry in stretch.entries], [entry[1] for entry in stretch.entries])
        if stretch.until is None or stretch.is_last or piece.is_full:
            if piece.num_rows:
                path = spool.new_path()
                piece.write(path, server, spool.prefix, stretch.until)
                spool.adopt(path)
                if kept and (piece.after or stretch.until is not None):  # a listing of one piece is short
                    kept.put(path)
        else:
            pieces[stretch.until] = piece


class _Progress:
    """Says how far a listing is, where that takes long."""

    def __init__(self, source: str, say: Callable[[str], None]) -> None:
        self._source, self._say = source, say
        self._num_files = 0
        self._begin_s = self._said_s = time.monotonic()

    def add(self, count: int) -> None:
        """So many files more."""
        self._num_files += count
        now_s = time.monotonic()
        if now_s - self._said_s >= _SAY_EVERY_S:
            self._said_s = now_s
            self._say(News(f"{self._source}: {self._num_files:,} files listed in {now_s - self._begin_s:.0f} s"))


class _Spool:
    """The files of a source on their way to a catalog."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.prefix = prefix
        self.runs = Runs(folder / "unsorted")
        self.num_files = 0
        self.manifests: set[str] = set()
        """Names below the source that an inventory's manifest and its checksum may have."""
        self._folder = folder
        self._judgement = Judgement()
        self._others: Counter[str] = Counter()
        self._has_catalog = False

    def add(self, name: str, size_bytes: int | None) -> None:
        """A file; in any order."""
        self._judgement.count(name)
        self.num_files += 1
        self.runs.add((_bytes_of(name), size_bytes))

    def new_path(self) -> Path:
        """Where a run may be written."""
        return self.runs.new_path()

    def adopt(self, path: Path) -> None:
        """A run of files that was written there."""
        first = None
        for name, _ in rows_of(path):
            first = name if first is None else first
            self._judgement.count(_text_of(name))
            self.num_files += 1
        if first is not None:
            self.runs.adopt(path, first)

    def write(self, storage: Storage, source: str, say: Callable[[str], None]) -> list[Path]:
        """The catalog's files; none where nothing is a video. The runs are gone then."""
        self._judgement.look(storage, source, self._unknown(), say)
        ids = _Ids(self._folder / "ids", self.num_files, self._name_of)
        paths: list[Path] = []
        groups = batched(self._videos(), GROUP_ROWS)
        while group := next(groups, None):
            paths.append(self._folder / f"{len(paths):06d}.parquet")
            with _writer(paths[-1]) as writer:
                for rows in itertools.chain([group], itertools.islice(groups, FILE_ROWS // GROUP_ROWS - 1)):
                    names = [_text_of(name) for name, _ in rows]
                    writer.write_batch(self._batch(ids.first(names), names, [size_bytes for _, size_bytes in rows]))
        ids.settle(paths)
        shutil.rmtree(self.runs.folder)
        if paths and self._others:
            say(f"{source}: {said_of_endings(self._others)}, and left out")
        return paths

    def refuse(self, source: str) -> list[Path]:
        """Raise CatalogError: nothing in the source is a video."""
        expected = "expected videos (.mp4, .mkv and others) at any depth, or a catalog"
        if self._has_catalog:
            expected = f"name the table itself to use it: {join(source, 'catalog.parquet')}"
        expected += said_of_manifests(source, self.manifests)
        raise CatalogError(no_video_of_endings(source, self._others, expected))

    def _unknown(self) -> Iterator[SourceFile]:
        for raw, size_bytes in self.runs.merged():
            name = _text_of(raw)
            if is_unknown(name):
                yield SourceFile(name, local_uri(self.prefix + name), -1 if size_bytes is None else size_bytes)

    def _videos(self) -> Iterator[Row]:
        for row in self.runs.merged():
            name = _text_of(row[0])
            if self._judgement.is_video(name):
                yield row
            else:
                self._note(name)

    def _note(self, name: str) -> None:
        """Take note of a file that is no video."""
        self._has_catalog = self._has_catalog or name == "catalog.parquet"
        if name.endswith(("manifest.json", "manifest.checksum")) and len(self.manifests) < _MAX_MANIFESTS:
            self.manifests.add(name)
        if name not in NOT_OTHERS:
            ending = ending_shown(name)
            is_counted = ending in self._others or len(self._others) < _MAX_ENDINGS
            self._others[ending if is_counted else "rare endings"] += 1

    def _batch(self, video_ids: list[str], names: list[str], sizes: list[int | None]) -> pa.RecordBatch:
        columns = {
            "video_id": video_ids,
            "uri": [local_uri(self.prefix + name) for name in names],
            "size_bytes": sizes,
            "status": ["listed"] * len(names),
        }
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(names), field.type)
            for field in CATALOG_SCHEMA
        ]
        return pa.record_batch(arrays, schema=CATALOG_SCHEMA)

    def _name_of(self, uri: str) -> str:
        return local_path(uri)[len(self.prefix) :]


def _bytes_of(name: str) -> bytes:
    return name.encode(errors="surrogatepass")


def _text_of(name: bytes) -> str:
    return name.decode(errors="surrogatepass")


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, CATALOG_SCHEMA, compression="zstd", use_dictionary=list(OF_FEW_VALUES))


# --- ids


class _Ids:
    """`unique_ids` of more names than fit in memory, in the same rounds: in each, ids that are equal become longer.

    An id is its hash of 128 bits, which nobody can make collide. They lie in partitions on the disk: what is equal is
    in the same one, and one is in memory at a time. A record is in the partition of its id's present hash: two words of
    hash, and 4 x row + level.
    """

    def __init__(self, folder: Path, num_names: int, name_of: Callable[[str], str]) -> None:
        self._folder, self._name_of = folder, name_of
        self._num_partitions = -(-num_names // _PARTITION_ROWS) or 1
        self._changed: set[int] = set()
        """Partitions that have records of which nobody knows whether they are equal to others."""
        self._num_rows = 0
        folder.mkdir(parents=True)

    def first(self, names: list[str]) -> list[str]:
        """The ids of the next rows, before any were compared."""
        made = [id_at(name, 0) for name in names]
        rows = range(self._num_rows, self._num_rows + len(names))
        self._record(
            [video_id for video_id, _ in made], [4 * row + level for row, (_, level) in zip(rows, made, strict=True)]
        )
        self._num_rows += len(names)
        return [video_id for video_id, _ in made]

    def settle(self, paths: list[Path]) -> None:
        """Write the final ids into the files of the rows, as far as they are others."""
        while self._changed:
            changed, self._changed = sorted(self._changed), set()
            for partition in changed:
                self._compare(partition)
            for bin_path in sorted(self._folder.glob("raised-*")):
                self._rewrite(paths[int(bin_path.name.partition("-")[2])], np.fromfile(bin_path, np.uint64))
                bin_path.unlink()
        shutil.rmtree(self._folder)

    def _record(self, video_ids: list[str], places: list[int]) -> None:
        digests = b"".join(hashlib.blake2b(video_id.encode(), digest_size=16).digest() for video_id in video_ids)
        records = np.empty((len(places), 3), np.uint64)
        records[:, :2] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
        records[:, 2] = places
        partitions = (records[:, 0] >> np.uint64(32)) * np.uint64(self._num_partitions) >> np.uint64(32)
        self._changed.update(_append_by(partitions, records, self._folder, "partition"))

    def _compare(self, partition: int) -> None:
        """Take the records of equal ids out of a partition, as far as they can be longer."""
        path = self._folder / f"partition-{partition}"
        records = np.fromfile(path, np.uint64).reshape(-1, 3)
        records = records[np.lexsort((records[:, 1], records[:, 0]))]
        repeats = (records[1:, :2] == records[:-1, :2]).all(axis=1)
        is_equal = np.append(repeats, False) | np.insert(repeats, 0, False)
        is_raised = is_equal & (records[:, 2] % np.uint64(4) < MAX_ID_LEVEL)
        if is_raised.any():
            raised = records[is_raised, 2] + np.uint64(1)
            _append_by(raised // np.uint64(4 * FILE_ROWS), raised, self._folder, "raised")
            records[~is_raised].tofile(path)

    def _rewrite(self, path: Path, raised: _Words) -> None:
        """Give longer ids to some rows of a file."""
        raised.sort()
        places = raised.tolist()
        aside = path.with_suffix(".new")
        start = places[0] // 4 // FILE_ROWS * FILE_ROWS
        with pq.ParquetFile(path) as file, _writer(aside) as writer:
            for batch in file.iter_batches(GROUP_ROWS):
                stop = np.searchsorted(raised, np.uint64(4 * (start + batch.num_rows)))
                here, places = places[: int(stop)], places[int(stop) :]
                raised = raised[int(stop) :]
                if here:
                    batch = self._longer(batch, start, here)
                writer.write_batch(batch)
                start += batch.num_rows
        aside.replace(path)

    def _longer(self, batch: pa.RecordBatch, start: int, places: list[int]) -> pa.RecordBatch:
        video_ids = batch.column(0).to_pylist()
        rows = [place // 4 - start for place in places]
        names = [self._name_of(uri) for uri in batch.column(1).take(pa.array(rows)).to_pylist()]
        for row, name, place in zip(rows, names, places, strict=True):
            video_ids[row] = id_at(name, place % 4)[0]
        self._record([video_ids[row] for row in rows], places)
        return batch.set_column(0, CATALOG_SCHEMA.field(0), pa.array(video_ids, pa.string()))


def _append_by(
    keys: _Words,
    records: _Words,
    folder: Path,
    what: str,
) -> list[int]:
    """Append each record to the file of its key; the keys that there are."""
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    for key, part in zip(found.tolist(), np.split(records[order], starts[1:]), strict=True):
        with (folder / f"{what}-{key}").open("ab") as file:
            part.tofile(file)
    return [int(key) for key in found]
