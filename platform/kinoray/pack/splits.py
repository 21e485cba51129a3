"""Which split a video belongs to that its source puts into none: in `pack`, and in `correct`.

What is easy to break: which videos validate is drawn class by class in the order of a hash of their names, so that a
grown source moves few of them; and equal contents are one video there, whatever each of them is called, or a network is
scored on what it has learnt by heart.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kinoray.catalog.read import Reference
from kinoray.catalog.source import warn
from kinoray.console import many
from kinoray.errors import BadCredentials, StorageError, StorageUnavailable
from kinoray.storage.objects import Storage

__all__ = ["Candidate", "contents_of", "draw_splits", "share"]

_THREADS = 16
_TAIL_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Candidate:
    """A video that a split is found for."""

    name: str
    """Unique; its hash is its place in the draw."""
    labels: tuple[str, ...] | None
    """Its classes, perhaps none of them; None of an unlabelled video."""
    split: str | None = None
    """Where the source says that it belongs."""
    content: str | None = None
    """Equal to that of its copies; None where it has none."""


def contents_of(storage: Storage, videos: Sequence[tuple[Reference, int]]) -> list[str | None]:
    """What is equal of copies and of nothing else that is likely, for each video and its size; None where none is.

    The checksum, where all videos of that size have one; else a digest of the last bytes. Videos that are alike in size
    and end are then on one side of a split, copies or not, which does no harm.

    Raises:
        StorageUnavailable, BadCredentials: the store cannot be asked. Of what else cannot be read its reader will tell.
    """
    sizes = [place.length or size_bytes for place, size_bytes in videos]
    counts = Counter(sizes)
    bare = {size for (place, _), size in zip(videos, sizes, strict=True) if place.sha256 is None}

    def content(place: Reference, size_bytes: int) -> str | None:
        if size_bytes not in bare:
            return place.sha256
        if size_bytes <= 0 or counts[size_bytes] < 2 or place.problem:
            return None
        length = min(size_bytes, _TAIL_BYTES)
        try:
            data = storage.read_range(place.uri, (place.offset or 0) + size_bytes - length, length)
        except (StorageUnavailable, BadCredentials):
            raise
        except StorageError:
            return None
        return f"{size_bytes}:{hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(content, (place for place, _ in videos), sizes))


def draw_splits(source: str, candidates: Sequence[Candidate], fraction: float) -> dict[str, str]:
    """name -> split of each video: what the source says; else that of a copy; else val for `fraction` of each class.

    Of a class with two contents or more at least one validates and one does not. Which ones is a matter of their names:
    those whose hashes come first. What is left of the fractions of all classes goes to the largest remainders. Copies
    are one here, of the classes of all of them; where they are more videos than the class is to give, they come last.
    What the source itself puts on both sides is named in a warning.
    """
    splits = {video.name: video.split for video in candidates if video.split}
    said: dict[str, set[str]] = {}
    for video in candidates:
        if video.split and video.content and video.labels is not None:  # a split without labels scores nothing
            said.setdefault(video.content, set()).add(video.split)
    leaks = [
        video.name
        for video in candidates
        if video.split == "train" and video.content and said.get(video.content, {"train"}) != {"train"}
    ]
    if leaks:
        warn(
            f"{source}: {many(len(leaks), 'video')} of split train with the same content as one of another split, such "
            f"as {leaks[0]}; they stay where the source says, and scores of that split are too good: leave them out"
        )
    free: dict[str, list[Candidate]] = {}
    for video in sorted(candidates, key=lambda video: (share("val", video.name), video.name)):
        if video.split:
            continue
        if video.content in said:
            others = said[video.content]
            splits[video.name] = min(others - {"train"} or others)  # rather scored than learnt
            continue
        free.setdefault(f"content {video.content}" if video.content else f"name {video.name}", []).append(video)
    labels_of = {key: {label for video in videos for label in video.labels or ("",)} for key, videos in free.items()}
    sizes: Counter[str] = Counter()
    for key, names in labels_of.items():
        sizes.update(dict.fromkeys(names, len(free[key])))

    def is_large(key: str) -> bool:
        return len(free[key]) > 1 and any(len(free[key]) > fraction * sizes[label] for label in labels_of[key])

    classes: dict[str, list[str]] = {}
    for key in sorted(free, key=is_large):
        for label in sorted(labels_of[key]):
            classes.setdefault(label, []).append(key)
    validating = _drawn(classes, fraction)
    for key, videos in free.items():
        splits |= dict.fromkeys((video.name for video in videos), "val" if key in validating else "train")
    return splits


def _drawn(classes: Mapping[str, Sequence[str]], fraction: float) -> set[str]:
    """Which keys validate, of those of each class in the order in which they are drawn; a key may have many classes.

    Rare classes draw first, and what they drew counts for the others. No class gives its last one.
    """
    if not 0 < fraction < 1:
        return {key for keys in classes.values() for key in keys if fraction}
    several = {label: keys for label, keys in classes.items() if len(keys) > 1}
    quotas = {label: fraction * len(keys) for label, keys in several.items()}
    counts = {label: int(quota) for label, quota in quotas.items()}
    missing = round(sum(quotas.values())) - sum(counts.values())
    for label in sorted(quotas, key=lambda label: (counts[label] - quotas[label], label))[: max(0, missing)]:
        counts[label] += 1
    classes_of: dict[str, list[str]] = {}
    for label, keys in classes.items():
        for key in keys:
            classes_of.setdefault(key, []).append(label)
    wanted = {label: max(counts[label], 1) if label in counts else 0 for label in classes}
    room = {label: len(keys) - 1 for label, keys in classes.items()}  # that it can still give
    chosen: set[str] = set()
    for label, keys in sorted(several.items(), key=lambda item: (len(item[1]), item[0])):
        for spare in (0, -math.inf):  # first those that no other class has enough of
            for key in keys:
                if wanted[label] <= 0:
                    break
                mine = classes_of[key]
                if key in chosen or any(room[other] == 0 or wanted[other] <= spare for other in mine):
                    continue
                chosen.add(key)
                for other in mine:
                    room[other] -= 1
                    wanted[other] -= 1
    return chosen


def share(purpose: str, name: str) -> float:
    """A number in [0, 1) that looks random but belongs to the name."""
    return (
        int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode(errors="surrogatepass")).digest()[:7], "big") / 2**56
    )
