"""`kinoray correct --add SET`: the videos that people looked at join the set that a network was trained on.

One catalog then holds both: the set's rows in their order, then the videos that it lacks. A video is known by its
place, or else by the SHA-256 of its bytes, in a transcoded pack by that of the bytes before. What is easy to break: a
video of the set keeps its row and its split, wherever its copies lie, so that nothing that is scored is ever learnt;
and only a person changes a label of the set, never the model.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kinoray.catalog.folders import in_label_list, label_list
from kinoray.catalog.read import Reference, read_videos, stat_size
from kinoray.catalog.table import Catalog
from kinoray.console import draw_step, many
from kinoray.errors import BadCredentials, CatalogError, KinorayError, StorageUnavailable
from kinoray.pack.unit import read_commit
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record

__all__ = ["Found", "Joined", "join_set", "names_of", "rename", "sizes_of"]

_THREADS = 16
_SHARDS = "/shards/"
_RANKS = {"accepted": 0, "kept": 1, "corrected": 2, "bad": 2}  # whose word counts: the model's, a catalog's, a person's
_COUNTS = ("added", "in_set", "relabelled", "removed", "copies", "unread")
_Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """A video of the predictions of which something is known."""

    row: _Row
    """Of CATALOG_SCHEMA, with the class in `label`, or BAD_VIDEO; where a video may have several, their label list."""
    what: str
    """`corrected`, `kept` (the label of a catalog), `accepted` (the model's), or `bad` (to be left out)."""
    where: str
    """File and line of a correction, for messages."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A set with what joined it."""

    rows: list[_Row]
    """As those of Found; a label is None where the set has none."""
    labels: tuple[str, ...]
    """The classes of the set in their order, then new ones."""
    counts: Counter[str]
    """Videos: `added`; `in_set`, of which the set has copies; `relabelled` and `removed` rows of the set; `copies` of
    one another that were left out; `unread`, of which it could not be known whether they are copies."""

    @property
    def totals(self) -> dict[str, int]:
        """All of them."""
        return {name: self.counts[name] for name in _COUNTS}


def join_set(
    storage: Storage,
    known: Catalog,
    found: Sequence[Found],
    labels: Sequence[str],
    *,
    new_classes: Sequence[str] = (),
    several: bool,
) -> Joined:
    """The set with the videos that were found, each once.

    Args:
        labels: what a label of `found` may be; those that no row has and `new_classes` lacks are left out.
        several: whether a video may have several classes.

    Raises:
        CatalogError: two people gave copies of a video different labels.
        StorageUnavailable, BadCredentials: the store cannot be asked. What else cannot be read is no copy of anything.
    """
    counts: Counter[str] = Counter()
    rows = _rows_of(known, several=several)
    places = [_place(row) for row in rows]
    there = set(places)
    strangers = [item.row for item in found if _place(item.row) not in there]
    contents = _contents(storage, rows, strangers, counts)
    places += [_place(row) for row in strangers]
    video_at = {place: content or place for place, content in zip(places, contents, strict=True)}
    groups: dict[Hashable, list[Found]] = defaultdict(list)
    for item in found:
        groups[video_at[_place(item.row)]].append(item)
    in_set: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        in_set[video_at[_place(row)]].append(index)
    removed: set[int] = set()
    added: list[_Row] = []
    for key, items in groups.items():
        word = _word(items)
        if key not in in_set:
            counts["copies"] += len(items) - 1
            if word.what != "bad":
                added.append({**word.row, "split": _split(items)})
            continue
        counts["in_set"] += len(items)
        if word.what == "bad":
            removed.update(in_set[key])
        elif word.what == "corrected":
            for index in in_set[key]:
                counts["relabelled"] += _relabel(rows[index], word.row["label"])
    counts["removed"] = len(removed)
    counts["added"] = len(added)
    rows = [row for index, row in enumerate(rows) if index not in removed]
    rows += added
    used = {name for row in rows for name in names_of(row, several=several)} | set(new_classes)
    classes = dict.fromkeys([*known.labels, *(name for name in labels if name in used)])
    return Joined(rows, tuple(classes), counts)


def _rows_of(known: Catalog, *, several: bool) -> list[_Row]:
    rows: list[_Row] = known.table.to_pylist()
    if several:
        for row, names in zip(rows, known.class_names(), strict=True):
            row["label"] = None if row["label_ids"] is None else label_list(names)
    return rows


def names_of(row: _Row, *, several: bool) -> tuple[str, ...]:
    """The classes of a row."""
    if row["label"] is None:
        return ()
    return in_label_list(row["label"]) if several else (row["label"],)


def _place(row: _Row) -> Hashable:
    return row["uri"], row["offset"], row["length"]


def _word(items: Sequence[Found]) -> Found:
    """What counts of what is said of copies of one video: a person's word most, then the first.

    Raises:
        CatalogError: two people say different things.
    """
    best = max(items, key=lambda item: _RANKS[item.what])
    for item in items:
        if _RANKS[item.what] == _RANKS["bad"] and item.row["label"] != best.row["label"]:
            raise CatalogError(
                f"{item.where}, column label: {item.row['video_id']} is {item.row['label']!r} here, and "
                f"{best.row['video_id']}, which has the same bytes, is {best.row['label']!r} in {best.where}; keep one "
                "of the two lines"
            )
    return best


def _split(items: Sequence[Found]) -> str | None:
    """Where a catalog has one of the copies; rather scored than learnt."""
    splits = {item.row["split"] for item in items if item.row["split"]}
    return min(splits - {"train"} or splits, default=None)


def _relabel(row: _Row, label: str) -> bool:
    """Give a row of the set its corrected label; whether it had another one, or none."""
    before = row["label"]
    if before == label:
        return False
    row["label"] = label
    row["reason"] = f"corrected; the set said {'nothing' if before is None else before}"
    return True


def rename(rows: Sequence[_Row]) -> int:
    """Give each video an id of its own, the first its own; how many have another one now."""
    taken: set[str] = set()
    renamed = 0
    for row in rows:
        if row["video_id"] in taken:
            row["video_id"] += f"_{hashlib.sha256(repr(_place(row)).encode(errors='surrogatepass')).hexdigest()[:10]}"
            renamed += 1
        taken.add(row["video_id"])
    return renamed


# Which videos are the same


def sizes_of(storage: Storage, rows: Sequence[_Row]) -> list[int]:
    """The size of each video in bytes; of a whole object that says none it is asked for. 0: it cannot be looked at."""

    def size_of(row: _Row) -> int:
        known = row["length"] if row["length"] is not None else row.get("size_bytes")
        return known or stat_size(storage, row["uri"])

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(size_of, rows))


def _contents(storage: Storage, rows: Sequence[_Row], found: Sequence[_Row], counts: Counter[str]) -> list[str | None]:
    """SHA-256 of each video of both, in order; None where it is not needed, since no other one has that size.

    `counts` is told how many could not be read for it. Of `found` the rows get the checksums, too: what is trained on
    later are the bytes that were compared.
    """
    both = [*rows, *found]
    digests = [row.get("sha256") for row in both]
    if not found:
        return digests
    sources, sizes = _sources(storage, rows), sizes_of(storage, both)
    in_set, outside = Counter(sizes[: len(rows)]), Counter(sizes[len(rows) :])

    def may_be_copied(index: int, size: int) -> bool:
        if index < len(rows):
            return outside[size] > 0
        return bool(sources) or in_set[size] > 0 or outside[size] > 1

    counts["unread"] = sum(digest is None and not size for digest, size in zip(digests, sizes, strict=True))
    wanted = [
        index
        for index, (digest, size) in enumerate(zip(digests, sizes, strict=True))
        if digest is None and size and may_be_copied(index, size)
    ]
    if wanted:
        draw_step(f"correct: reading {many(len(wanted), 'video')} to know which are the same")
    places = [Reference(both[index]["uri"], both[index]["offset"], both[index]["length"]) for index in wanted]
    for index, data in zip(wanted, read_videos(storage, places), strict=True):
        if isinstance(data, StorageUnavailable | BadCredentials):
            raise data
        if isinstance(data, KinorayError):  # who trains on it will say what is wrong with it
            counts["unread"] += 1
            continue
        digests[index] = hashlib.sha256(data).hexdigest()
        if index >= len(rows):
            both[index] |= {"sha256": digests[index], "size_bytes": len(data)}
    return [sources.get(digest, digest) if digest else None for digest in digests]


def _sources(storage: Storage, rows: Sequence[_Row]) -> dict[str, str]:
    """checksum -> that of the video it was transcoded from, of all shards of transcoded packs in which rows lie."""
    packs = {row["uri"].rpartition(_SHARDS)[0] for row in rows if row["offset"] is not None and _SHARDS in row["uri"]}
    return {
        packed.sha256: packed.source_sha256
        for pack in sorted(packs)
        if _is_transcoded(storage, join(pack, "pack.json"))
        for unit in _units(storage, pack)
        for packed in read_commit(storage, pack, unit).packed
    }


def _is_transcoded(storage: Storage, uri: str) -> bool:
    return storage.exists(uri) and read_record(storage, uri, lambda record: bool(record.get("transcode")))


def _units(storage: Storage, pack: str) -> Iterator[str]:
    for info in storage.list(pack + _SHARDS):
        name = info.uri.rpartition("/")[2]
        if name.endswith(".json"):
            yield name.removesuffix(".json")
