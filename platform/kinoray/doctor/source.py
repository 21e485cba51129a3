"""What a source holds by its listing or catalog alone: nothing is read but names, sizes and the catalog.

What is easy to break: the videos and their ids are those that `label` would find, and the sample depends on the ids
only, never on their order or on chance.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.folders import extension, places_in_folders, said_of_others, set_problems, unique_ids
from kinoray.catalog.source import UNLABELLED_SPLITS, SourceFile, find_files
from kinoray.catalog.table import (
    Catalog,
    catalog_of_files,
    is_catalog,
    load_catalog,
    references,
)
from kinoray.config.shared import DecodeConfig
from kinoray.console import many, table
from kinoray.doctor.config import Section, Warn
from kinoray.errors import CatalogError
from kinoray.storage.objects import Storage, format_bytes

__all__ = ["Inventory", "choose_sample", "open_source", "source_section"]

_EXAMPLES = 5
_FEW_VIDEOS = 10  # of a class, to train on
_SHOWN_EXTENSIONS = 12
_SLICE_ROWS = 4096
_IGNORED_BY_SYSTEMS = (".ds_store", "thumbs.db", "desktop.ini")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """The videos of a source, and the files beside them."""

    source: str
    """As it was given, absolute."""
    kind: str
    """`catalog`, `csv` or `folder`."""
    catalog: Catalog
    """The videos; a pack's have a label and a checksum, a folder's only a size."""
    others: tuple[SourceFile, ...] = ()
    """Files of a folder that are no videos."""
    num_renamed: int = 0
    """Files whose video_id carries a digest, since it would be too long or another file's, too."""
    notes: tuple[str, ...] = ()
    """What was left out of the listing, and why."""
    places: Mapping[tuple[tuple[str, ...], str | None], int]
    """(classes, split) -> videos: the catalog's, or what `pack` would make of a folder; empty if none is labelled."""


def open_source(storage: Storage, source: str) -> Inventory:
    """List a source, as `kinoray label` understands it. Takes about 1.4 kB of memory a video.

    Raises:
        CatalogError: nothing there is a video, or the list is malformed.
        StorageError: it cannot be listed or read.
    """
    notes: list[str] = []
    if is_catalog(storage, source, say=notes.append):
        catalog = load_catalog(storage, source)
        if not len(catalog):
            raise CatalogError(f"{source}: the catalog is empty: it has no video at all")
        places = _places_of(catalog)
        return Inventory(source=source, kind="catalog", catalog=catalog, notes=tuple(notes), places=places)
    files = find_files(storage, source, say=notes.append)
    catalog = catalog_of_files(source, files)
    if source.lower().endswith(".csv"):
        places, videos, others = _places_of(catalog), files, []
    else:
        videos = [file for file in files if file.is_video]
        others = [file for file in files if not file.is_video]
        places = _places_of_folders(videos)
    ids = catalog.table.column("video_id").to_pylist()
    return Inventory(
        source=source,
        kind="csv" if source.lower().endswith(".csv") else "folder",
        catalog=catalog,
        others=tuple(others),
        num_renamed=sum(unique_ids([file.name])[0] != own for file, own in zip(videos, ids, strict=True)),
        places=places,
        notes=tuple(notes),
    )


def _places_of(catalog: Catalog) -> Counter[tuple[tuple[str, ...], str | None]]:
    splits = catalog.table.column("split")
    if splits.null_count == len(catalog) and not any(catalog.class_names()):
        return Counter()
    return Counter(zip(catalog.class_names(), splits.to_pylist(), strict=True))


def _places_of_folders(videos: Sequence[SourceFile]) -> Counter[tuple[tuple[str, ...], str | None]]:
    """What `kinoray pack` would take for class and split; nothing if there are no class folders."""
    places = places_in_folders([video.name for video in videos])
    if all(isinstance(place, str) for place in places):
        return Counter()
    return Counter(((), None) if isinstance(place, str) else ((place[0],), place[1]) for place in places)


def choose_sample(catalog: Catalog, count: int) -> list[int]:
    """Places of `count` rows (0: of all), rising: those whose video_id has the smallest hashes."""
    if not count or count >= len(catalog):
        return list(range(len(catalog)))
    ids = catalog.table.column("video_id")
    hashed = ((hashlib.sha256(ids[place].as_py().encode()).digest(), place) for place in range(len(catalog)))
    return sorted(place for _, place in heapq.nsmallest(count, hashed))


def source_section(inventory: Inventory, decode: DecodeConfig) -> Section:
    """Counts, sizes, names, labels and known checksums of everything that was listed."""
    rows = inventory.catalog.table
    sizes = [
        length if size is None else size
        for size, length in zip(rows.column("size_bytes").to_pylist(), rows.column("length").to_pylist(), strict=True)
    ]
    known = [size for size in sizes if size is not None and size >= 0]
    problems = [
        reference.problem
        for start in range(0, len(rows), _SLICE_ROWS)  # rows as Python's objects take much more memory
        for reference in references(rows.slice(start, _SLICE_ROWS))
        if reference.problem
    ]
    suffixes = Counter(extension(uri.as_py()) or "(none)" for uri in rows.column("uri"))
    other_suffixes = Counter(extension(file.name) or "(none)" for file in inventory.others)
    values: dict[str, Any] = {
        "source": inventory.source,
        "kind": inventory.kind,
        "num_videos": len(sizes),
        "num_objects": len(rows.column("uri").unique()),
        "video_bytes": sum(known),
        "num_size_unknown": len(sizes) - len(known),
        "by_extension": dict(suffixes.most_common()),
        "num_malformed": len(problems),
        "malformed_example": problems[0] if problems else "",
        "num_empty": sum(size == 0 for size in known),
        "num_over_max_bytes": sum(size > decode.max_bytes for size in known),
        "largest_bytes": max(known, default=0),
        "num_ignored": len(inventory.others),
        "ignored": said_of_others(file.name for file in inventory.others),
        "ignored_bytes": sum(file.size_bytes for file in inventory.others),
        "ignored_by_extension": dict(other_suffixes.most_common()),
        "ignored_examples": [_printable(file.name) for file in inventory.others[:_EXAMPLES]],
        "num_renamed": inventory.num_renamed,
        "duplicates": _duplicates(inventory),
        "labels": _labels(inventory),
    }
    return Section(
        name="source", values=values, lines=tuple(_lines(values)), warnings=tuple(_warnings(inventory, values, decode))
    )


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _duplicates(inventory: Inventory) -> dict[str, Any] | None:
    """Videos with equal checksums; None where the source has none."""
    rows = inventory.catalog.table
    sums = rows.column("sha256")
    if sums.null_count == len(sums):
        return None
    repeated = pa.array([item["values"] for item in sums.value_counts().to_pylist() if item["counts"] > 1], pa.string())
    copies = rows.filter(pc.is_in(sums, value_set=repeated.drop_null()))
    groups: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for row in copies.select(["sha256", "video_id", "split"]).to_pylist():
        groups[row["sha256"]].append((row["video_id"], row["split"]))
    same = list(groups.values())
    across = [group for group in same if len({split for _, split in group}) > 1]
    return {
        "num_groups": len(same),
        "num_extra": sum(len(group) - 1 for group in same),
        "num_across_splits": len(across),
        "examples": [[video_id for video_id, _ in group[:2]] for group in [*across, *same][:_EXAMPLES]],
    }


def _labels(inventory: Inventory) -> dict[str, Any] | None:
    """Classes and splits; None where nothing is labelled."""
    if not inventory.places:
        return None
    counts: Counter[tuple[str, str | None]] = Counter()  # 0 for what is not there
    for (names, split), count in inventory.places.items():
        for label in names:
            counts[label, split] += count
    labels = sorted({label for label, _ in counts})
    splits: dict[str, Any] = {}
    for split in sorted({name or "" for _, name in inventory.places}):
        per_class = {label: counts[label, split or None] for label in labels if counts[label, split or None]}
        ranked = sorted(per_class.items(), key=lambda item: (item[1], item[0]))
        splits[split] = {
            "num_videos": sum(count for (_, name), count in inventory.places.items() if (name or "") == split),
            "num_classes": len(per_class),
            "fewest": ranked[0] if ranked else None,
            "most": ranked[-1] if ranked else None,
        }
    trained = "train" if "train" in splits else ""
    in_training = {label: counts[label, trained or None] for label in labels}
    return {
        "from": "folders, as kinoray pack reads them" if inventory.kind == "folder" else inventory.kind,
        "num_classes": len(labels),
        "num_unlabelled": _num_unlabelled(inventory),
        "splits": splits,
        "classes": {label: in_training[label] for label in labels},
        "not_in_train": [label for label in labels if not in_training[label]] if "train" in splits else [],
        "not_in_val": [label for label in labels if not counts[label, "val"]] if "val" in splits else [],
        "few": [label for label in labels if 0 < in_training[label] < _FEW_VIDEOS],
    }


def _num_unlabelled(inventory: Inventory) -> int:
    """Videos of which no class is known, and should be; a label list may be empty, and is known all the same."""
    catalog = inventory.catalog
    if catalog.is_multilabel:
        splits = catalog.table.filter(pc.is_null(catalog.table["label_ids"]))["split"].to_pylist()
        return sum(split not in UNLABELLED_SPLITS for split in splits)
    return sum(
        count for (names, split), count in inventory.places.items() if not names and split not in UNLABELLED_SPLITS
    )


def _lines(values: dict[str, Any]) -> list[str]:
    unknown = f", {values['num_size_unknown']} of unknown size" if values["num_size_unknown"] else ""
    where = f" in {many(values['num_objects'], 'object')}" if values["num_objects"] != values["num_videos"] else ""
    kind = {"catalog": "catalog", "csv": "CSV", "folder": "listing"}[values["kind"]]
    lines = [f"{many(values['num_videos'], 'video')}{where}, {format_bytes(values['video_bytes'])}{unknown} ({kind})"]
    suffixes = list(values["by_extension"].items())
    more = f" and {len(suffixes) - _SHOWN_EXTENSIONS} more" if len(suffixes) > _SHOWN_EXTENSIONS else ""
    lines.append(f"names: {', '.join(f'{name} {count:,}' for name, count in suffixes[:_SHOWN_EXTENSIONS])}{more}")
    if values["num_ignored"]:
        examples = ", ".join(values["ignored_examples"])
        size = format_bytes(values["ignored_bytes"])
        lines.append(f"{values['ignored']}, left out: {size}, such as {examples}")
    labels = values["labels"]
    if labels:
        head = ("split", "videos", "classes", "fewest videos", "most videos")
        rows = [
            (
                split or "(none)",
                f"{found['num_videos']:,}",
                f"{found['num_classes']:,}",
                *(f"{end[1]:,} ({end[0]})" if end else "-" for end in (found["fewest"], found["most"])),
            )
            for split, found in labels["splits"].items()
        ]
        lines += [
            f"{many(labels['num_classes'], 'class')} ({labels['from']})",
            *table(rows, head=head, right=range(1, len(head))),
        ]
    if values["duplicates"] is not None:
        lines.append(f"equal checksums: {many(values['duplicates']['num_extra'], 'video')} the same as others")
    return lines


def _warnings(inventory: Inventory, values: dict[str, Any], decode: DecodeConfig) -> list[Warn]:
    found: list[Warn] = []
    remedy = "pack reads it so, too" if inventory.kind == "csv" else "it is left out by label and pack, too"
    found += [Warn(text, remedy) for text in inventory.notes]
    if values["num_malformed"]:
        text = f"{many(values['num_malformed'], 'row')} of the catalog that say what cannot be, such as: "
        found.append(Warn(text + values["malformed_example"], "mend them: they will be quarantined"))
    if values["num_empty"]:
        text = f"{many(values['num_empty'], 'video')} with 0 bytes, or not there at all"
        found.append(Warn(text, "fetch them again, or drop them from the list: they will be quarantined"))
    if values["num_over_max_bytes"]:
        text = f"{many(values['num_over_max_bytes'], 'video')} with more than decode.max_bytes = {decode.max_bytes:,}"
        found.append(Warn(text, "raise --clip.decode.max-bytes (a decoder holds a whole file), or cut them"))
    odd = [file for file in inventory.others if file.name.rpartition("/")[2].lower() not in _IGNORED_BY_SYSTEMS]
    archives = [file for file in odd if file.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    if archives:
        text = f"ignored: {many(len(archives), 'archive')}, such as {_printable(archives[0].name)}"
        found.append(Warn(text, "`kinoray pack --kinetics` reads tars as they are; unpack others"))
    if inventory.num_renamed:
        text = f"{many(inventory.num_renamed, 'name')} too long, or equal to others but for endings and odd characters"
        found.append(Warn(text, "their video_id gets a digest at the end; rename them if you join results by video_id"))
    if duplicates := values["duplicates"]:
        found += _duplicate_warnings(duplicates)
    if labels := values["labels"]:
        found += _label_warnings(labels)
        problems = set_problems(inventory.places, several=inventory.catalog.is_multilabel)
        found += [Warn(text, remedy) for text, remedy in problems]
    return found


def _duplicate_warnings(duplicates: dict[str, Any]) -> list[Warn]:
    pair = " and ".join(duplicates["examples"][0]) if duplicates["examples"] else ""
    if duplicates["num_across_splits"]:
        text = f"{many(duplicates['num_across_splits'], 'video')} in more than one split, such as {pair}"
        return [Warn(text, "remove them from train: an evaluation on them is worth nothing")]
    if duplicates["num_extra"]:
        return [Warn(f"{many(duplicates['num_extra'], 'video')} the same as others, such as {pair}", "drop the copies")]
    return []


def _label_warnings(labels: dict[str, Any]) -> list[Warn]:
    found: list[Warn] = []
    if absent := labels["not_in_train"]:
        text = f"{many(len(absent), 'class')} without a video in train: {_some(absent)}"
        found.append(Warn(text, "no network can learn them; move videos to train, or drop the classes"))
    if few := labels["few"]:
        text = f"{many(len(few), 'class')} with fewer than {_FEW_VIDEOS} videos to train on: {_some(few)}"
        found.append(Warn(text, "add videos, or train with --optim.class-balance 0.5"))
    if labels["num_unlabelled"]:
        text = f"{many(labels['num_unlabelled'], 'video')} without a label, although others have one"
        found.append(Warn(text, "they cannot be trained on; label them, or put them into split test"))
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
