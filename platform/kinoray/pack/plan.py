"""What is to be packed: units of work, and the planners of folders, lists and catalogs; kinetics.py has another one.

A plan is a pure function of the listing, so that every run comes to the same one. A shard holds one split, and its
files are drawn from all classes by a hash of their names: any shard is a fair sample. What is easy to break: classes,
their order and their splits are the source's; which split a video without one gets is found in kinoray.pack.splits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import pyarrow as pa

from kinoray.catalog.folders import (
    extension,
    is_text,
    no_video_among,
    place_problem,
    places_in_folders,
    set_problems,
    unique_ids,
)
from kinoray.catalog.read import Reference, stat_size, time_problem
from kinoray.catalog.rows import QuarantineRow, Refusal
from kinoray.catalog.source import UNLABELLED_SPLITS, SourceFile, find_files, warn
from kinoray.catalog.table import Catalog, is_catalog, load_catalog, references
from kinoray.config.shared import digest
from kinoray.console import many
from kinoray.errors import CatalogError
from kinoray.pack.config import PackConfig
from kinoray.pack.splits import Candidate, contents_of, draw_splits, share
from kinoray.storage.objects import Storage, join

__all__ = [
    "FileVerdict",
    "Plan",
    "PlannedVideo",
    "Unit",
    "cut_evenly",
    "make_plan",
    "plan_of_catalog",
    "plan_source",
    "split_name",
]

T = TypeVar("T")

_STAT_THREADS = 16


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """A file, or a member of an archive or shard, that is to be packed."""

    video_id: str
    """Unique name; the key in the shard."""
    name: str
    """Path below the source."""
    uri: str
    """Where it lies now."""
    size_bytes: int
    """Size in the listing."""
    label: str | None
    """Class name; None in a split without labels."""
    label_id: int | None
    """Index of the class."""
    split: str
    """`train`, `val`, `test` or what a list says."""
    offset: int | None = None
    """As of a Reference."""
    length: int | None = None
    """As of a Reference."""
    sha256: str | None = None
    """As of a Reference."""
    row_problem: str = ""
    """As of a Reference."""
    member: str | None = None
    """Of an archive's member its name, made printable; then uri is ARCHIVE#MEMBER, an address for people only."""
    clip: str = ""
    """Kinetics: which clip it is. Of several files of a clip one is packed."""
    time_start_s: float | None = None
    """Kinetics: where the clip begins in its source."""
    time_end_s: float | None = None
    """Kinetics: where it ends; what is much shorter is refused."""
    labels: tuple[str, ...] | None = None
    """All its classes, in a set whose videos may have several; label and label_id are None there."""
    label_ids: tuple[int, ...] | None = None
    """Their indices, rising."""

    @property
    def key(self) -> str:
        """What it is known by while it is packed."""
        return self.clip or self.video_id

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes; none of an unlabelled video."""
        return (self.label,) if self.label is not None else self.labels or ()

    @property
    def source(self) -> str:
        """The file that holds it."""
        return self.uri if self.member is None else self.uri.removesuffix(f"#{self.member}")

    @property
    def reference(self) -> Reference:
        """Where its bytes are, and what they must be."""
        return Reference(self.uri, self.offset, self.length, self.sha256, self.row_problem)


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """What became of one file or member."""

    source: str
    """The file, or the archive that holds the member."""
    member: str | None
    """The member's name, made printable; None for a file."""
    key: str
    """As of a PlannedVideo; Kinetics: the clip that its name says it is, empty if none."""
    verdict: str
    """`packed` or `unreadable`; for Kinetics one of kinetics.FILE_VERDICTS."""
    refusal: Refusal | None = None
    """Why it is not packed, if it is for what it is itself."""
    note: str = ""
    """Why it is not packed, if another file is in its place."""
    offset: int | None = None
    """First byte in `source`, if a catalog says that it lies inside."""
    length: int | None = None
    """Number of bytes in `source`."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task packs: files, or the members of an archive."""

    name: str
    """`shard-train-00000`, `archive-00012`, `part-00003`; it is done where shards/<name>.json is."""
    files: tuple[PlannedVideo | FileVerdict, ...] = ()
    """In the order in which they are looked at; a verdict for what is not wanted. Empty for an archive."""
    archive: SourceFile | None = None
    """Whose members are judged as they come."""
    is_one_shard: bool = False
    """Whether it makes one tar of its own name; else one or more of each split, none much over shard_bytes."""
    is_replacement: bool = False
    """Whether it is packed before the others, since its clips take the place of files in them."""

    @property
    def num_files(self) -> int:
        """Files of the source that it is about."""
        return 1 if self.archive else len(self.files)

    @property
    def what(self) -> str:
        """It, in an error's words."""
        if self.archive:
            return f"{self.archive.uri} is"
        first = self.files[0]
        return f"{len(self.files)} files from {first.source} on are"


@dataclass(frozen=True, slots=True)
class Plan:
    """Every file that was found, in a unit or refused."""

    labels: tuple[str, ...]
    """Class names; index = label_id."""
    units: tuple[Unit, ...]
    """The work."""
    refused: tuple[QuarantineRow, ...] = ()
    """Files that are quarantined by their place or name, without reading them."""
    others: tuple[str, ...] = ()
    """Names of files that are no videos; they are counted and left out."""
    size_bytes: int = 0
    """Of all files in units."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What plan.json says besides: what this planner was asked for."""
    word: str = "shard"
    """What a unit is, for people."""

    @property
    def num_found(self) -> int:
        """Files that the source names; an archive is one."""
        return len(self.others) + len(self.refused) + sum(unit.num_files for unit in self.units)

    @property
    def digest(self) -> str:
        """16 hex digits of all of it: which files, how large, of which class and split, in which unit."""
        units = [asdict(unit) for unit in self.units]
        for unit in units:
            for file in unit["files"]:
                for name in ("labels", "label_ids"):
                    if file.get(name, ()) is None:  # of one class a video: the digest that such a plan always had
                        del file[name]
        return digest([self.labels, units, [asdict(row) for row in self.refused], self.others])


def plan_source(storage: Storage, config: PackConfig) -> Plan:
    """The files of a folder or list; or the videos of a catalog, which may be members of other shards.

    Raises:
        CatalogError: there is nothing to pack, or the list is malformed.
        StorageError: the source cannot be listed.
    """
    shard_bytes, source = config.shard_mb * 2**20, config.source
    if is_catalog(storage, source):
        catalog = _with_sizes(storage, load_catalog(storage, source))
        contents = {}
        if config.val_fraction:
            places = zip(references(catalog.table), catalog.table["size_bytes"].to_pylist(), strict=True)
            found = contents_of(storage, [(place, size_bytes or 0) for place, size_bytes in places])
            contents = dict(zip(catalog.table["video_id"].to_pylist(), found, strict=True))
        plan = plan_of_catalog(
            source, catalog, shard_bytes=shard_bytes, val_fraction=config.val_fraction, contents=contents
        )
    else:
        files = find_files(storage, source)
        contents = {}
        if config.val_fraction:
            videos = [file for file in files if file.is_video]
            found = contents_of(storage, [(Reference(file.uri), file.size_bytes) for file in videos])
            contents = dict(zip((file.uri for file in videos), found, strict=True))
        plan = make_plan(source, files, shard_bytes=shard_bytes, val_fraction=config.val_fraction, contents=contents)
    planned = [file for unit in plan.units for file in unit.files if isinstance(file, PlannedVideo)]
    several = any(file.labels is not None for file in planned)
    for problem, remedy in set_problems(Counter((file.class_names, file.split) for file in planned), several=several):
        warn(f"{source}: {problem}; {remedy}")
    if config.val_fraction and all(file.split != "val" for file in planned):
        reason = "no class has two videos of different content without a split"
        warn(f"{source}: val_fraction {config.val_fraction:g} sent no video to val: {reason}")
    return plan


def make_plan(
    source: str,
    files: Sequence[SourceFile],
    *,
    shard_bytes: int,
    val_fraction: float,
    contents: Mapping[str, str | None] = MappingProxyType({}),
) -> Plan:
    """Sort the files of `source` into shards of about `shard_bytes`.

    Classes come from the list, or from folders: `class/...` or `split/class/...`, where the top folders are called
    train, val or test, or by another usual name of these. Without splits, `val_fraction` of each class goes to val.

    Args:
        contents: uri -> `contents_of`.

    Raises:
        CatalogError: no file has a class, or a row of a CSV has none.
    """
    others = tuple(file.name for file in files if not file.is_video)
    files = [file for file in files if file.is_video]
    names = [file.name for file in files]
    ids = dict(zip(names, unique_ids(names), strict=True))
    is_csv = source.lower().endswith(".csv")
    places: Sequence[tuple[str | None, str | None] | str]
    places = _places_from_rows(source, files) if is_csv else places_in_folders(names)
    kept: list[tuple[SourceFile, str | None, str | None]] = []
    refused: list[QuarantineRow] = []
    for file, place in zip(files, places, strict=True):
        if isinstance(place, str):
            refusal = Refusal("list", place, place_problem(place))
            refused.append(QuarantineRow(ids[file.name], file.uri, refusal))
        else:
            kept.append((file, *place))
    if not kept:
        if is_csv:
            raise CatalogError(f"{source} lists no video")
        expected = f"expected folders of one class each, such as {join(source, 'walking/a.mp4')}"
        if not files:
            raise CatalogError(no_video_among(source, others, expected))
        raise CatalogError(f"{source}: found {many(len(files), 'video')}, but none in a class folder; {expected}")
    candidates = [
        Candidate(file.name, file.labels if label is None else (label,), split, contents.get(file.uri))
        for file, label, split in kept
    ]
    splits = draw_splits(source, candidates, val_fraction)
    labels = tuple(sorted({label for candidate in candidates for label in candidate.labels or ()}))
    label_ids = {label: index for index, label in enumerate(labels)}
    videos = [
        PlannedVideo(
            video_id=ids[file.name],
            name=file.name,
            uri=file.uri,
            size_bytes=file.size_bytes,
            label=label,
            label_id=None if label is None else label_ids[label],
            split=splits[file.name],
            labels=file.labels,
            label_ids=None if file.labels is None else tuple(sorted(map(label_ids.__getitem__, file.labels))),
        )
        for file, label, _ in kept
    ]
    return replace(_plan_of(labels, videos, refused, shard_bytes, val_fraction), others=others)


def plan_of_catalog(
    source: str,
    catalog: Catalog,
    *,
    shard_bytes: int,
    val_fraction: float,
    contents: Mapping[str, str | None] = MappingProxyType({}),
) -> Plan:
    """Sort the rows of a catalog into shards of about `shard_bytes`: its classes, their order and its splits stay.

    Rows without a split go to train, and `val_fraction` of each class of them to val.

    Args:
        contents: video_id -> `contents_of`.

    Raises:
        CatalogError: it has no row, or some rows of a split have a class and others none.
    """
    rows = catalog.table.to_pylist()
    if not rows:
        raise CatalogError(f"{source}: the catalog is empty, there is nothing to pack")
    keys = unique_ids([f"{row['video_id']}.x" for row in rows])  # as they are, where they are such names already
    class_names = catalog.class_names()
    candidates = [
        Candidate(
            name=row["video_id"],
            labels=None if row["label"] is None and row["label_ids"] is None else names,
            split=row["split"],
            content=contents.get(row["video_id"]) or row["sha256"],
        )
        for row, names in zip(rows, class_names, strict=True)
    ]
    splits = draw_splits(source, candidates, val_fraction)
    videos = [
        PlannedVideo(
            video_id=key,
            name=key if row["offset"] is not None else key + extension(row["uri"]),
            uri=row["uri"],
            size_bytes=max(0, row["length"] if row["length"] is not None else row["size_bytes"] or 0),
            label=row["label"],
            label_id=row["label_id"],
            split=splits[row["video_id"]],
            offset=row["offset"],
            length=row["length"],
            sha256=row["sha256"],
            row_problem=time_problem(row["time_start_s"], row["time_end_s"]),
            labels=None if row["label_ids"] is None else names,
            label_ids=None if row["label_ids"] is None else tuple(row["label_ids"]),
        )
        for row, key, names in zip(rows, keys, class_names, strict=True)
    ]
    for split, members in _by_split(videos).items():
        missing = [video.video_id for video in members if video.label_id is None and video.label_ids is None]
        if 0 < len(missing) < len(members):
            raise CatalogError(
                f"{source}: {len(missing)} of the {len(members)} videos of split {split!r} have no class, {missing[0]} "
                "is one; give all of them a class, or none"
            )
    return _plan_of(catalog.labels, videos, (), shard_bytes, val_fraction)


def _with_sizes(storage: Storage, catalog: Catalog) -> Catalog:
    """The catalog with the sizes of whole objects that it does not know; what is not there is quarantined by name."""
    table = catalog.table
    columns = [table.column(name).to_pylist() for name in ("uri", "offset", "size_bytes")]

    def size_of(row: tuple[str, int | None, int | None]) -> int | None:
        uri, offset, size_bytes = row
        if offset is not None or size_bytes is not None:
            return size_bytes
        return stat_size(storage, uri)

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        sizes = pa.array(list(pool.map(size_of, zip(*columns, strict=True))), pa.int64())
    place = table.schema.get_field_index("size_bytes")
    return Catalog(table.set_column(place, table.schema.field(place), sizes), catalog.labels)


def _places_from_rows(source: str, files: Sequence[SourceFile]) -> list[tuple[str | None, str | None] | str]:
    places: list[tuple[str | None, str | None] | str] = []
    for file in files:
        if file.label is None and file.labels is None and file.split not in UNLABELLED_SPLITS:
            raise CatalogError(
                f"{source}: {file.name} has no label; expected the columns path,label[,split], and a label in each row "
                f"whose split is not {' or '.join(sorted(UNLABELLED_SPLITS))}; where videos may have several classes, "
                "path,labels[,split], as in a.mp4,red|round, and | alone for none of them"
            )
        places.append((file.label, file.split) if is_text(file.name) else "UnusableName")
    return places


def _plan_of(
    labels: tuple[str, ...],
    videos: Sequence[PlannedVideo],
    refused: Sequence[QuarantineRow],
    shard_bytes: int,
    val_fraction: float,
) -> Plan:
    units = [unit for split, members in _by_split(videos).items() for unit in _cut(split, members, shard_bytes)]
    size_bytes = sum(video.size_bytes for video in videos)
    about = {"val_fraction": val_fraction}
    return Plan(labels, tuple(units), tuple(refused), size_bytes=size_bytes, about=about)


def _by_split(videos: Sequence[PlannedVideo]) -> dict[str, list[PlannedVideo]]:
    splits: dict[str, list[PlannedVideo]] = {split: [] for split in sorted({video.split for video in videos})}
    for video in videos:
        splits[video.split].append(video)
    return splits


def cut_evenly(items: Sequence[T], sizes: Sequence[int], part_bytes: int) -> list[list[T]]:
    """Cut the items, in their order, into parts of nearly equal size, none much over part_bytes unless one item is."""
    total = sum(sizes)
    num_parts = max(1, min(-(-total // part_bytes), len(items)))
    parts: list[list[T]] = [[] for _ in range(num_parts)]
    before = 0
    for item, size_bytes in zip(items, sizes, strict=True):
        parts[min(before * num_parts // max(total, 1), num_parts - 1)].append(item)
        before += size_bytes
    return [part for part in parts if part]  # one huge item can span a whole part's share


def _cut(split: str, videos: Sequence[PlannedVideo], shard_bytes: int) -> list[Unit]:
    ordered = sorted(videos, key=lambda video: (share("order", video.name), video.name))
    stem = f"shard-{split_name(split)}"
    full = cut_evenly(ordered, [video.size_bytes for video in ordered], shard_bytes)
    return [Unit(f"{stem}-{index:05d}", tuple(shard), is_one_shard=True) for index, shard in enumerate(full)]


def split_name(split: str) -> str:
    """A split's name (text from a list) as part of a file name; other characters give way to a digest."""
    plain = "".join(char for char in split if char.isascii() and (char.isalnum() or char in "_-"))[:40]
    return plain if plain == split else f"{plain}-{digest(split)[:8]}"
