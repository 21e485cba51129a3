"""`kinoray labels search` and `kinoray labels dedup`: what is similar by the embeddings of predictions.

The numbers are worked out in kinoray.library.vectors; here they are read, and what was found is printed or written. A
search reads a stream, and holds what it has found; duplicates need all embeddings at once, which stay float16. What is
easy to break: rows without an embedding (quarantined, or of zeros) are counted and said.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.source import warn
from kinoray.config.files import local_path
from kinoray.config.shared import digest, require
from kinoray.console import Progress, many
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import Ledger, open_ledger
from kinoray.label.planfile import shown_units
from kinoray.library.config import DedupConfig, FoundConfig, SearchConfig
from kinoray.library.labels import Joined, put_rows
from kinoray.library.rows import LABEL_SCHEMA, blocks, print_table, scan
from kinoray.library.vectors import Nearest, cosines, differing, near_groups, usable
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import require_file

__all__ = ["Vectors", "dedup", "most_similar", "search"]

_COLUMNS = ("video_id", "label", "score", "margin", "uri", "offset", "length", "row_key")
_DAMAGE = ("frames_corrupt", "frames_missing")
_STORED = (*_COLUMNS, *_DAMAGE, "embedding")
_OF_CATALOG = ("label", "split", "duration_s", "width", "height", "size_bytes")
_SIZES = ("length", "catalog_size_bytes", "catalog_width", "catalog_duration_s")
_SHOWN_ROWS = 50
_CACHED_ROWS = 8192  # of a batch of the file in --cache
_DIGEST_KEY = b"kinoray"
_DAY_S = 86400.0
_AS_LONG = 0.98  # of the longest in a group


# Reading


class Vectors:
    """The rows of a labelling that have an embedding, in the order of its table, as often as they are asked for."""

    def __init__(self, storage: Storage, predictions: str, cache: str = "") -> None:
        """Opens the labelling; with `cache`, a folder of this machine, its embeddings are read once and kept there.

        Raises:
            ConfigError: results of several models or settings are there.
            StorageError: there is none, or a part is not what was committed.
            ConfigError: the cache cannot be read or written.
        """
        self.ledger = open_ledger(storage, absolute(predictions))
        self.num_rows = 0
        """That the last reading found so far."""
        self.num_without = 0
        """And rows without an embedding."""
        self._cache = _cached(self.ledger, Path(local_path(absolute(cache)))) if cache else None

    def __iter__(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Some rows without their embeddings, and those, float16 [N, D].

        Raises:
            ConfigError: no row has one.
            CatalogError: they have several lengths.
        """
        self.num_rows = self.num_without = 0
        width = 0
        for batch in self._batches(_STORED):
            rows, vectors_ND = _with_vectors(batch)
            self.num_rows += len(rows)
            self.num_without += len(batch) - len(rows)
            if not len(rows):
                continue
            width = width or vectors_ND.shape[1]
            if vectors_ND.shape[1] != width:
                raise CatalogError(
                    f"{self.ledger.root}: its embeddings have {width} numbers and {vectors_ND.shape[1]}; they must be "
                    "of one network: label again into another place"
                )
            yield pa.Table.from_batches([rows.select([*_COLUMNS, *_DAMAGE])]), vectors_ND
        if not self.num_rows:
            scorer = self.ledger.job().settings.get("scorer")
            remedy = "label with --embeddings, into a new --out"
            if isinstance(scorer, dict) and scorer.get("embeddings"):
                remedy = f"none of its {many(self.num_without, 'row')} is of a video that was labelled"
            raise ConfigError(f"predictions: no row of {self.ledger.root} has an embedding; {remedy}")

    def find(self, name: str) -> tuple[str, np.ndarray] | None:
        """The row_key and the embedding, float16 [D], of the row with this row_key or video_id; None: no row has both.

        Raises:
            ConfigError: several rows have this video_id, as those of two labelled folders may.
        """
        row_key = self._row_key(name)
        if not row_key:
            return None
        for number, batch in enumerate(self._batches(("row_key",) if self._cache else ("row_key", "embedding"))):
            place = pc.index(batch.column("row_key"), pa.scalar(row_key)).as_py()
            if place < 0:
                continue
            if self._cache:
                (batch,) = self._batches(_STORED, number)
            row, vectors_1D = _with_vectors(batch.slice(place, 1))
            return (row_key, vectors_1D[0]) if len(row) else None
        return None

    def _row_key(self, name: str) -> str:
        """Of the row that has this row_key, or else this video_id; empty where there is none."""
        alike: list[tuple[str, str]] = []
        for batch in self._batches(("video_id", "uri", "row_key")):
            if pc.index(batch.column("row_key"), pa.scalar(name)).as_py() >= 0:
                return name
            found = batch.filter(pc.equal(batch.column("video_id"), name))
            alike += zip(found.column("row_key").to_pylist(), found.column("uri").to_pylist(), strict=True)
        if len(alike) > 1:
            some = ", ".join(f"{row_key} ({uri})" for row_key, uri in alike[:5])
            raise ConfigError(
                f"like: {many(len(alike), 'video')} of {self.ledger.root} have the video_id {name!r}: {some}; "
                "name one by its row_key"
            )
        return alike[0][0] if alike else ""

    def whole(self) -> tuple[pa.Table, np.ndarray]:
        """All rows, and their embeddings, float16 [N, D]. Raises as a reading."""
        most = sum(len(unit.keys) for units in shown_units(self.ledger) for unit in units)
        tables: list[pa.Table] = []
        all_ND = np.empty((0, 0), np.float16)
        num_rows = 0
        for rows, vectors_ND in self:
            if not tables:
                all_ND = np.empty((most, vectors_ND.shape[1]), np.float16)  # takes memory once it is filled
            tables.append(rows.take(np.arange(len(rows))))  # a batch of the cache is one buffer, embeddings included
            end = num_rows + len(rows)
            if end > len(all_ND):  # a job has committed more of them meanwhile
                all_ND.resize((end + end // 8, all_ND.shape[1]), refcheck=False)
            all_ND[num_rows:end] = vectors_ND
            num_rows = end
        return pa.concat_tables(tables).combine_chunks(), all_ND[:num_rows]

    def said_of_others(self) -> str:
        """What is to be said of rows without an embedding; empty where there are none."""
        have = "has" if self.num_without == 1 else "have"
        return f"; {many(self.num_without, 'row')} {have} no embedding" if self.num_without else ""

    def _batches(self, columns: Sequence[str], only: int | None = None) -> Iterator[pa.RecordBatch]:
        """The rows, or the batch with this number of those in the cache."""
        if self._cache is None:
            for table in scan(self.ledger, columns):
                yield from table.to_batches()
            return
        options = pa.ipc.IpcReadOptions(included_fields=[_STORED.index(name) for name in columns])
        reader = pa.ipc.open_file(self._cache, options=options)
        for number in range(reader.num_record_batches) if only is None else [only]:
            yield reader.get_batch(number)


def _with_vectors(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, np.ndarray]:
    """The rows that have a usable embedding, and these.

    Raises:
        CatalogError: they have several lengths.
    """
    lengths = pc.list_value_length(batch.column("embedding"))
    rows = batch.filter(pc.greater(lengths, 0)) if lengths.null_count or pc.min(lengths).as_py() == 0 else batch
    span = pc.min_max(lengths.filter(pc.greater(lengths, 0))).as_py()
    if span["min"] != span["max"]:
        raise CatalogError(f"embeddings of {span['min']} and of {span['max']} numbers are in one table; label again")
    if not len(rows):
        return rows, np.empty((0, 0), np.float16)
    vectors_ND = rows.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
    is_good = usable(vectors_ND)
    if is_good.all():
        return rows, vectors_ND
    return rows.filter(pa.array(is_good)), vectors_ND[is_good]


def _cached(ledger: Ledger, folder: Path) -> pa.NativeFile:
    """The file with the rows and embeddings of a labelling, made anew where it is of other rows.

    It is an Arrow file, read batch by batch: were it mapped, all of it would count as memory of this process. It stays
    open, so that all that is read of it is of one table, whoever puts a newer one in its place.

    Raises:
        ConfigError: it cannot be read or written.
    """
    parts = {
        info.uri.rpartition("/")[2]: f"{info.size_bytes} {info.modified_s} {info.etag}"  # one may be labelled again
        for info in ledger.storage.list(join(ledger.root, "parts/"))
    }
    units = [unit for part in shown_units(ledger) for unit in part]
    names = [
        f"{unit.unit_id} {parts.get(f'{unit.unit_id}.parquet')} {unit.mask.hex() if unit.mask else ''}"
        for unit in units
    ]
    wanted = hashlib.sha256("\n".join([ledger.root, *names]).encode()).hexdigest().encode()
    path = folder / f"{digest([ledger.root])}.arrow"
    try:
        if _digest_in(path) != wanted:
            _write_cache(ledger, path, wanted, sum(len(unit.keys) for unit in units))
        return pa.OSFile(str(path), "rb")
    except OSError as error:
        raise ConfigError(
            f"cache: {folder} cannot be used ({error.strerror or error}); name another folder, or leave it out"
        ) from error


def _write_cache(ledger: Ledger, path: Path, wanted: bytes, num_rows: int) -> None:
    schema = pa.schema([LABEL_SCHEMA.field(name) for name in _STORED], {_DIGEST_KEY: wanted})
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.stem}.*.tmp"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - _DAY_S:  # of a command that was killed
                left.unlink()
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    progress = Progress(num_rows, "labels: read", "rows", stream=sys.stderr, is_for_eyes=True)
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for block in blocks(scan(ledger, _STORED), schema):
                writer.write_table(block, max_chunksize=_CACHED_ROWS)
                progress.update(len(block))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest_in(path: Path) -> bytes:
    """Of which rows a file is; empty where there is none."""
    try:
        with pa.OSFile(str(path), "rb") as file:
            return bytes((pa.ipc.open_file(file).schema.metadata or {}).get(_DIGEST_KEY, b""))
    except (OSError, pa.ArrowInvalid):
        return b""


# Search


def search(config: SearchConfig) -> dict[str, Any]:
    """Print or write the videos that are most similar to one, or to a text.

    Returns:
        `root`, `compared` (embeddings) and `rows` (the video_ids that were found, the nearest first).

    Raises:
        ConfigError: there is no such video, or no embeddings; or the network reads no texts.
        KinorayError: something cannot be read or written.
    """
    storage = Storage(config.storage)
    if config.to:
        require_file("to", config.to)
    vectors = Vectors(storage, config.predictions, config.cache)
    if config.text:
        row_key, query_D = "", _of_text(storage, vectors, config)
    else:
        row_key, query_D = vectors.find(config.like) or ("", _seen(storage, vectors, config))
    found = most_similar(vectors, query_D, config.limit, without=row_key)
    _put(storage, config, found, ("similarity", "video_id", "label", "score", "margin"))
    compared = many(vectors.num_rows, "embedding")
    _say(config, f"labels search: {len(found):,} of {compared}, the nearest first{vectors.said_of_others()}")
    return {"root": vectors.ledger.root, "compared": vectors.num_rows, "rows": found["video_id"].to_pylist()}


def most_similar(vectors: Vectors, query_D: np.ndarray, limit: int, *, without: str = "") -> pa.Table:
    """The rows whose embeddings are most similar to a vector, the nearest first, with their `similarity`.

    Args:
        query_D: of any float type.
        without: row_key of a row that is left out.

    Raises:
        ConfigError: the vector has another length than the embeddings; or no row has one.
    """
    nearest = Nearest(query_D[None], limit + bool(without))
    held: list[pa.Table] = []
    for rows, vectors_ND in vectors:
        if vectors_ND.shape[1] != len(query_D):
            raise ConfigError(
                f"like: its embedding has {len(query_D)} numbers, and those of {vectors.ledger.root} have "
                f"{vectors_ND.shape[1]}; it must be of the same network"
            )
        begin = nearest.num_seen
        nearest.add(vectors_ND)
        places = nearest.places[0]
        if (places >= begin).any():
            mine = places[places >= begin]
            held.append(rows.take(mine - begin).append_column("place", pa.array(mine)))
            table = pa.concat_tables(held)
            held = [table.filter(pc.is_in(table["place"], value_set=pa.array(places)))]
    order = pc.index_in(pa.array(nearest.places[0]), value_set=held[0]["place"].combine_chunks())
    found = held[0].take(order).select(list(_COLUMNS))
    found = found.add_column(0, "similarity", pa.array(nearest.similarities[0]))
    return found.filter(pc.not_equal(found["row_key"], without)).slice(0, limit)


def _of_text(storage: Storage, vectors: Vectors, config: SearchConfig) -> np.ndarray:
    """The vector, float32 [D], of a text by the network that labelled the videos.

    Raises:
        ConfigError: it is another network, or none of texts; or the text gives no vector.
    """
    record = vectors.ledger.job()
    checkpoint = config.checkpoint or record.checkpoint
    require(bool(checkpoint), "checkpoint", "given: several networks labelled these videos", config.checkpoint)
    from kinoray.network.published import embed_text  # here: it imports torch, which takes seconds

    query_D = embed_text(storage, checkpoint, config.text, labelled_by=(record.checkpoint, record.model_digest))
    if not (np.isfinite(query_D).all() and query_D.any()):
        raise ConfigError(f"text: {checkpoint} gives zeros, or no numbers, for {config.text!r:.200}")
    return query_D


def _seen(storage: Storage, vectors: Vectors, config: SearchConfig) -> np.ndarray:
    """The embedding, float16 [D], of a video that is not in the table, as the labelling would have had it.

    Raises:
        ConfigError: it is no file, or gives none.
    """
    uri = absolute(config.like)
    if not storage.exists(uri):
        next(iter(vectors))  # says so, if no row has an embedding
        raise ConfigError(
            f"like: {vectors.ledger.root} has no video {config.like!r} with an embedding (by video_id or row_key), and "
            f"no such file is there; kinoray labels {config.predictions} --columns video_id row_key names them"
        )
    record = vectors.ledger.job()
    checkpoint = config.checkpoint or record.checkpoint
    require(bool(checkpoint), "like", "a video of the table: several networks labelled it", config.like)
    from kinoray.label.predict import Model  # here: it imports torch, which takes seconds

    print(f"labels search: {checkpoint} looks at {uri}", file=sys.stderr, flush=True)
    own = LabelConfig(
        source="", checkpoint=checkpoint, allow_factory=config.allow_factory, embeddings=True, storage=config.storage
    )
    with Model(own, seen_as_in=record, warn=warn) as model:
        answer = model.predict(uri)
    if answer.embedding is None or not usable(answer.embedding[None]).all():
        raise ConfigError(f"like: {config.like} gives no embedding: {answer.error_text or 'the network gave zeros'}")
    return answer.embedding


# Duplicates


def dedup(config: DedupConfig) -> dict[str, Any]:
    """Print or write the groups of near duplicates, and which of each to keep.

    Returns:
        `root`, `compared` (embeddings), `groups`, `duplicates` (their videos) and `spare` (those not to be kept).

    Raises:
        ConfigError: a column is unknown, or there are no embeddings.
        CatalogError: the catalog to join has none of the videos.
        KinorayError: something cannot be read or written.
    """
    storage = Storage(config.storage)
    if config.to:
        require_file("to", config.to)
    joined = _joined(storage, config)
    vectors = Vectors(storage, config.predictions, config.cache)
    rows, vectors_ND = vectors.whole()
    progress = Progress(len(rows), "labels dedup", "videos", stream=sys.stderr, is_for_eyes=True)
    roots_N = near_groups(vectors_ND, config.threshold, tell=progress.update)
    members = np.flatnonzero(np.bincount(roots_N, minlength=len(rows))[roots_N] > 1)
    table = rows.take(members)
    notes = "" if len(members) else f"; a --threshold below {config.threshold:g} finds copies that are less alike"
    if joined:
        table = joined.add(table)
        joined.check()
        if joined.num_unmet:
            have = "has" if joined.num_unmet == 1 else "have"
            notes += f"; of {many(len(members), 'duplicate')} {joined.num_unmet:,} {have} no video in {config.join}"
    roots = roots_N[members]
    if config.across:
        differ = differing(roots, table[config.across].to_pylist())
        table, members, roots = table.filter(pa.array(differ)), members[differ], roots[differ]
    order = _best_first(table, roots, members)
    table, members, roots = table.take(order), members[order], roots[order]
    if len(members) and not any(_numbers(table, name).any() for name in _SIZES):
        notes += "; the first undamaged of each in the table is kept"
        notes += "" if joined else ": --join the library for the largest and longest"
    is_first = np.ones(len(roots), bool)
    is_first[1:] = roots[1:] != roots[:-1]
    group = np.cumsum(is_first)
    kept = members[is_first][group - 1]
    found = table.select([name for name in table.column_names if name not in _DAMAGE])
    found = found.add_column(0, "group", pa.array(group))
    found = found.add_column(1, "keep", pa.array(is_first))
    found = found.add_column(2, "similarity", pa.array(cosines(vectors_ND, members, kept)))
    shown = dict.fromkeys(
        ["group", "keep", "similarity", "video_id", "label", *([config.across] * bool(config.across))]
    )
    _put(storage, config, found, tuple(shown))
    num_groups = int(is_first.sum())
    differ_in = f" across {config.across}" if config.across else ""
    _say(
        config,
        f"labels dedup: {many(num_groups, 'group')}{differ_in} with {len(found):,} of {many(len(rows), 'video')}, "
        f"{len(found) - num_groups:,} of them to spare{vectors.said_of_others()}{notes}",
    )
    return {
        "root": vectors.ledger.root,
        "compared": len(rows),
        "groups": num_groups,
        "duplicates": len(found),
        "spare": len(found) - num_groups,
    }


def _joined(storage: Storage, config: DedupConfig) -> Joined | None:
    """The catalog's columns that the rows get. Raises ConfigError: `across` is no column."""
    joined = Joined(storage, config.join) if config.join else None
    known = [*_COLUMNS, *(joined.table.column_names if joined else ())]
    if config.across and config.across not in known:
        raise ConfigError(f"across: there is no column {config.across!r}; there are {', '.join(known)}")
    if joined:
        joined.keep([*(f"catalog_{name}" for name in _OF_CATALOG), config.across])
    return joined


def _best_first(table: pa.Table, roots: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The order of groups, and in each of the row to keep and the others."""
    is_damaged = _numbers(table, "frames_corrupt") + _numbers(table, "frames_missing") > 0
    duration_s = _numbers(table, "catalog_duration_s")
    longest_s = np.zeros(int(roots.max(initial=0)) + 1)
    np.maximum.at(longest_s, roots, np.where(is_damaged, 0.0, duration_s))
    is_short = duration_s < _AS_LONG * longest_s[roots]
    pixels = _numbers(table, "catalog_width") * _numbers(table, "catalog_height")
    length = _numbers(table, "length")
    size = np.where(length > 0, length, _numbers(table, "catalog_size_bytes"))
    return np.lexsort((places, -size, -pixels, is_short, is_damaged, roots))


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, nulls as 0; zeros where the table has no such column."""
    column = table[name] if name in table.column_names else pa.nulls(len(table))
    return np.asarray(pc.fill_null(pc.cast(column, pa.float64()), 0.0))


# Showing


def _put(storage: Storage, config: FoundConfig, table: pa.Table, shown: Sequence[str]) -> None:
    if config.format == "table":
        print_table(table.select(list(shown)).slice(0, _SHOWN_ROWS))
    else:
        put_rows(storage, config.format, config.to, [table], table.schema)


def _say(config: FoundConfig, line: str) -> None:
    """For people; beside rows that are printed for programs."""
    is_mixed = config.format != "table" and not config.to
    print(line, file=sys.stderr if is_mixed else sys.stdout, flush=True)
