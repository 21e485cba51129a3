"""Which file goes into which shard: a pure function of the listing, so that every run comes to the same plan.

A shard holds one split, and its files are drawn from all classes by a hash of their names: any shard is a fair sample.
What is easy to break: a file's split depends on its own name only, so that a grown source moves no video from
training to validation.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from kinoray.catalog.quarantine import Refusal
from kinoray.catalog.read import Reference, time_problem
from kinoray.catalog.source import UNLABELLED_SPLITS, SourceFile, unique_ids
from kinoray.catalog.table import Catalog, extension
from kinoray.config.shared import digest
from kinoray.errors import CatalogError

__all__ = [
    "PackPlan",
    "PlannedMember",
    "PlannedVideo",
    "ShardPlan",
    "cut_evenly",
    "make_plan",
    "places_in_folders",
    "plan_of_catalog",
    "share",
    "split_name",
]

T = TypeVar("T")

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """A file that is to be packed."""

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
    """`train`, `val`, `test` or what a CSV says."""

    @property
    def reference(self) -> Reference:
        """Where its bytes are."""
        return Reference(self.uri)


@dataclass(frozen=True, slots=True)
class PlannedMember(PlannedVideo):
    """A row of a catalog that is to be packed: perhaps a member of another shard."""

    offset: int | None
    length: int | None
    sha256: str | None
    row_problem: str = ""
    """As of a Reference."""

    @property
    def reference(self) -> Reference:
        """Where its bytes are, and what they must be."""
        return Reference(self.uri, self.offset, self.length, self.sha256, self.row_problem)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One unit of work: the files of one shard, in the order in which they are written."""

    name: str
    """`shard-train-00000`: shards/<name>.tar, committed by shards/<name>.json."""
    videos: tuple[PlannedVideo, ...]
    """Its files."""


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Every file that was found, in a shard or refused."""

    labels: tuple[str, ...]
    """Class names, sorted; index = label_id."""
    shards: tuple[ShardPlan, ...]
    """The work."""
    refused: tuple[Refusal, ...]
    """Files that are refused by their place or name, without reading them."""

    @property
    def num_found(self) -> int:
        """Files that the source names."""
        return len(self.refused) + sum(len(shard.videos) for shard in self.shards)

    @property
    def digest(self) -> str:
        """16 hex digits of all of it: which files, how large, of which class and split, in which shard."""
        return digest(asdict(self))


def make_plan(source: str, files: Sequence[SourceFile], *, shard_bytes: int, val_fraction: float) -> PackPlan:
    """Sort the files of `source` into shards of about `shard_bytes`.

    Classes come from the CSV, or from folders: `class/...` or `split/class/...`, where all top folders are called
    train, val, validation or test. Without splits, a hash of the name sends `val_fraction` of the files to val.

    Raises:
        CatalogError: no file has a class, or a row of a CSV has none.
    """
    names = [file.name for file in files]
    ids = dict(zip(names, unique_ids(names), strict=True))
    is_csv = source.lower().endswith(".csv")
    places: Sequence[tuple[str | None, str | None] | str]
    places = _places_from_rows(source, files) if is_csv else places_in_folders(names)
    kept: list[tuple[SourceFile, str | None, str]] = []
    refused: list[Refusal] = []
    for file, place in zip(files, places, strict=True):
        if isinstance(place, str) or not _is_text(file.name):
            error_class, text = (place, _REASONS[place]) if isinstance(place, str) else _UNUSABLE
            refused.append(Refusal(ids[file.name], file.uri, error_class, text, "list"))
        else:
            label, split = place
            kept.append((file, label, split or ("val" if share("val", file.name) < val_fraction else "train")))
    if not kept:
        what = "nothing" if not files else f"{len(files)} files, but none in a class folder"
        raise CatalogError(
            f"{source}: found {what}; expected folders of one class each, such as {source}/walking/a.mp4"
        )
    labels = tuple(sorted({label for _, label, _ in kept if label is not None}))
    label_ids = {label: index for index, label in enumerate(labels)}
    videos = [
        PlannedVideo(
            ids[file.name],
            file.name,
            file.uri,
            file.size_bytes,
            label,
            None if label is None else label_ids[label],
            split,
        )
        for file, label, split in kept
    ]
    shards = [
        shard
        for split in sorted({video.split for video in videos})
        for shard in _cut(split, [video for video in videos if video.split == split], shard_bytes)
    ]
    return PackPlan(labels, tuple(shards), tuple(refused))


def plan_of_catalog(source: str, catalog: Catalog, *, shard_bytes: int, val_fraction: float) -> PackPlan:
    """Sort the rows of a catalog into shards of about `shard_bytes`: its classes, their order and its splits stay.

    Rows without a split go to train, or by a hash of the video_id to val.

    Raises:
        CatalogError: it has no row, or some rows of a split have a class and others none.
    """
    rows = catalog.table.to_pylist()
    if not rows:
        raise CatalogError(f"{source}: the catalog is empty, there is nothing to pack")
    keys = unique_ids([f"{row['video_id']}.x" for row in rows])  # as they are, where they are such names already
    videos = []
    for row, key in zip(rows, keys, strict=True):
        split = row["split"] or ("val" if share("val", row["video_id"]) < val_fraction else "train")
        name = key if row["offset"] is not None else key + extension(row["uri"])
        size_bytes = max(0, row["length"] if row["length"] is not None else row["size_bytes"] or 0)
        place = (row["offset"], row["length"], row["sha256"], time_problem(row["time_start_s"], row["time_end_s"]))
        videos.append(PlannedMember(key, name, row["uri"], size_bytes, row["label"], row["label_id"], split, *place))
    splits = {split: [video for video in videos if video.split == split] for split in sorted({v.split for v in videos})}
    for split, members in splits.items():
        missing = [video.video_id for video in members if video.label_id is None]
        if 0 < len(missing) < len(members):
            raise CatalogError(
                f"{source}: {len(missing)} of the {len(members)} videos of split {split!r} have no class, {missing[0]} "
                "is one; give all of them a class, or none"
            )
    shards = [shard for split, members in splits.items() for shard in _cut(split, members, shard_bytes)]
    return PackPlan(catalog.labels, tuple(shards), ())


_REASONS = {
    "HiddenFile": "a hidden file, or inside a hidden folder",
    "NoClassFolder": "lies outside of the class folders",
}
_UNUSABLE = ("UnusableName", "its name is not UTF-8; rename it")


def _places_from_rows(source: str, files: Sequence[SourceFile]) -> list[tuple[str | None, str | None]]:
    places = []
    for file in files:
        if file.label is None and file.split not in UNLABELLED_SPLITS:
            raise CatalogError(
                f"{source}: {file.name} has no label; expected the columns path,label[,split], and a label in each row "
                f"whose split is not {' or '.join(sorted(UNLABELLED_SPLITS))}"
            )
        places.append((file.label, file.split))
    return places


def places_in_folders(names: Sequence[str]) -> list[tuple[str, str | None] | str]:
    """(class, split or None) of each path below a source, or the error_class of its refusal."""
    paths = [name.split("/") for name in names]
    seen = [path for path in paths if not _is_hidden(path) and len(path) > 1]
    has_splits = all(path[0].lower() in _SPLIT_FOLDERS for path in seen) and any(len(path) > 2 for path in seen)
    places: list[tuple[str, str | None] | str] = []
    for path in paths:
        folders = path[1:-1] if has_splits else path[:-1]
        if _is_hidden(path):
            places.append("HiddenFile")
        elif not folders or not folders[0]:
            places.append("NoClassFolder")
        else:
            places.append((folders[0], _SPLIT_FOLDERS[path[0].lower()] if has_splits else None))
    return places


def _is_hidden(path: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in path) or "__MACOSX" in path


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8 is listed with surrogates
        return False
    return True


def share(purpose: str, name: str) -> float:
    """A number in [0, 1) that looks random but belongs to the name."""
    return (
        int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode(errors="surrogatepass")).digest()[:7], "big") / 2**56
    )


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


def _cut(split: str, videos: Sequence[PlannedVideo], shard_bytes: int) -> list[ShardPlan]:
    ordered = sorted(videos, key=lambda video: (share("order", video.name), video.name))
    stem = f"shard-{split_name(split)}"
    full = cut_evenly(ordered, [video.size_bytes for video in ordered], shard_bytes)
    return [ShardPlan(f"{stem}-{index:05d}", tuple(shard)) for index, shard in enumerate(full)]


def split_name(split: str) -> str:
    """A split's name (text from a CSV) as part of a file name; other characters give way to a digest."""
    plain = "".join(char for char in split if char.isascii() and (char.isalnum() or char in "_-"))[:40]
    return plain if plain == split else f"{plain}-{digest(split)[:8]}"
