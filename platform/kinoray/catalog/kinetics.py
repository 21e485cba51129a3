"""Kinetics sets, as names and rows: what a clip is called, what is wanted of an annotation, what a file is to it.

All of it is pure. What is easy to break: a clip is known by its key alone (`<youtube id>_000010_000020`), never by the
folder or archive it lies in, and of a clip that is listed or found more than once exactly one row and one file count.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from kinoray.catalog.folders import VIDEO_EXTENSIONS, is_hidden, unique_ids

__all__ = [
    "OFFICIAL_CLASSES",
    "TRAIN",
    "AnnotationRow",
    "RowPlan",
    "Wanted",
    "clip_key",
    "judge_name",
    "key_of_name",
    "plan_rows",
    "printable",
    "window_of_key",
    "youtube_id_of_key",
]

OFFICIAL_CLASSES = {"k400": 400, "k600": 600, "k700": 700}
"""Classes of each set; another count is reported, not refused."""

TRAIN = "train"
"""The split that gives way where it overlaps with another one."""

_KEY = re.compile(r"(?P<youtube_id>.+)_(?P<start>\d{1,6})_(?P<end>\d{1,6})", re.ASCII)
_MAX_NAME_BYTES = 1024
_SHOWN_CHARS = 200


class AnnotationRow(NamedTuple):
    """One line of an annotation file."""

    source: str
    """The file."""
    line: int
    """Line in it (Parquet: row), counted from 1."""
    key: str
    """Which clip: `clip_key`, or what a file of the listed path would be known by."""
    label: str | None
    """Class name; None in a split without labels."""
    split: str
    """`train`, `val`, `test`, or another name."""
    time_start_s: float | None
    """Where the clip begins in its source, if the annotation says so."""
    time_end_s: float | None
    """Where it ends."""


class Wanted(NamedTuple):
    """What the catalog is to say of a clip, if a file is found."""

    video_id: str
    label: str | None
    label_id: int | None
    split: str
    time_start_s: float | None
    time_end_s: float | None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What each annotation row asks for."""

    labels: tuple[str, ...]
    """Class names, sorted; index = label_id."""
    clips: Mapping[str, Wanted | str]
    """By key: what is wanted, or the verdict on any file of that key (`leak`, `beyond_limit`)."""
    verdicts: Sequence[tuple[str, str] | None]
    """(verdict, detail) of each row whose fate is known without its file; None for a row that wants one."""
    num_leaks: int
    """Clips of train whose source video is in another split, too; removed from train unless leaks are kept."""
    num_between: int
    """Source videos that two splits other than train share; they stay in both."""


def clip_key(youtube_id: str, time_start_s: float, time_end_s: float) -> str:
    """`abcdefghijk`, 10, 20 -> `abcdefghijk_000010_000020`, as Kinetics names its files."""
    return f"{youtube_id}_{int(time_start_s):06d}_{int(time_end_s):06d}"


def key_of_name(name: str) -> str:
    """The key of a file, from its base name; `abc_10_20.mp4` and `abc_000010_000020.webm` are the same clip."""
    base = name.rpartition("/")[2]
    stem, dot, ending = base.rpartition(".")
    key = stem if stem and f"{dot}{ending}".lower() in VIDEO_EXTENSIONS else base
    match = _KEY.fullmatch(key)
    return clip_key(match["youtube_id"], int(match["start"]), int(match["end"])) if match else key


def window_of_key(key: str) -> tuple[float, float] | None:
    """(time_start_s, time_end_s) that the key names, or None."""
    match = _KEY.fullmatch(key)
    if match is None or int(match["start"]) >= int(match["end"]):
        return None
    return float(match["start"]), float(match["end"])


def youtube_id_of_key(key: str) -> str:
    """The source video's id: the key without its window."""
    match = _KEY.fullmatch(key)
    return match["youtube_id"] if match else key


def plan_rows(rows: Sequence[AnnotationRow], *, limit: int | None, keep_leaks: bool) -> RowPlan:
    """Which rows want a file. Rows give way, in this order: listed twice, leaking into train, over the limit.

    Of rows with one key the first counts, one outside of train before one of train. A train row leaks if its source
    video is wanted in another split, too. The limit counts rows of each split that are left then, in their order.
    """
    verdicts: list[tuple[str, str] | None] = [None] * len(rows)
    first = _first_of_each_key(rows)
    for index, row in enumerate(rows):
        chosen = rows[first[row.key]]
        if first[row.key] != index:
            where = f"{chosen.source} line {chosen.line}"
            leaks = row.split == TRAIN != chosen.split and not keep_leaks
            differs = "" if row.label == chosen.label else f"; there it is of class {chosen.label!r}"
            verdicts[index] = (
                "leak" if leaks else "duplicate",
                f"the clip is in split {chosen.split} at {where}{differs}",
            )
    splits_of: dict[str, set[str]] = {}
    for index in first.values():
        splits_of.setdefault(youtube_id_of_key(rows[index].key), set()).add(rows[index].split)
    leaking = {video for video, splits in splits_of.items() if TRAIN in splits and len(splits) > 1}
    num_leaks = sum(verdict is not None and verdict[0] == "leak" for verdict in verdicts)
    labels = _sorted_labels({row.label for row in rows if row.label is not None})
    label_ids = {label: index for index, label in enumerate(labels)}
    keys = list(first)
    video_ids = dict(zip(keys, unique_ids(keys), strict=True))
    clips: dict[str, Wanted | str] = {}
    taken: Counter[str] = Counter()
    for index in sorted(first.values()):
        row = rows[index]
        video = youtube_id_of_key(row.key)
        if row.split == TRAIN and video in leaking:
            num_leaks += 1
            if not keep_leaks:
                others = " and ".join(sorted(splits_of[video] - {TRAIN}))
                verdicts[index] = ("leak", f"its source video {video} is in split {others}, too")
        elif limit is not None and taken[row.split] >= limit:
            verdicts[index] = ("beyond_limit", f"limit {limit}: this many rows of split {row.split} come before it")
        verdict = verdicts[index]
        if verdict is not None:
            clips[row.key] = verdict[0]
            continue
        taken[row.split] += 1
        label_id = None if row.label is None else label_ids[row.label]
        clips[row.key] = Wanted(video_ids[row.key], row.label, label_id, row.split, row.time_start_s, row.time_end_s)
    num_between = sum(len(splits - {TRAIN}) > 1 for splits in splits_of.values())
    return RowPlan(labels, clips, verdicts, num_leaks, num_between)


def _first_of_each_key(rows: Sequence[AnnotationRow]) -> dict[str, int]:
    """Which row of each key counts."""
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        there = first.setdefault(row.key, index)
        if rows[there].split == TRAIN != row.split:
            first[row.key] = index
    return first


def _sorted_labels(labels: AbstractSet[str]) -> tuple[str, ...]:
    """By name; as numbers where all are numbers, so that 10 comes after 9."""

    def by_number(label: str) -> tuple[int, str, str]:  # of any length
        digits = label.lstrip("0")
        return len(digits), digits, label

    are_numbers = all(label.isascii() and label.isdigit() for label in labels)
    return tuple(sorted(labels, key=by_number if are_numbers else None))


def judge_name(name: str, clips: Mapping[str, Wanted | str]) -> tuple[str, str, str]:
    """(key, verdict, reason) of a file by its name; the verdict is "" if the file is wanted.

    The key is "" where the name says nothing of a clip. Only the base name and its key are ever used, so a name that
    leads elsewhere would do no harm; it is refused all the same.
    """
    parts = re.split(r"[/\\]", name)
    problem = _name_problem(name, parts)
    if problem:
        return "", "unsafe_name", problem
    base = parts[-1]
    if is_hidden([part for part in parts if part != "."]):
        return "", "not_a_video", "a hidden file, or inside a hidden folder"
    key = key_of_name(name)
    ending = base.rpartition(".")[2].lower()
    if f".{ending}" not in VIDEO_EXTENSIONS and key not in clips:
        return "", "not_a_video", "its name does not end as a video's does"
    wanted = clips.get(key)
    if wanted is None:
        return key, "not_annotated", "no annotation row has this clip"
    if isinstance(wanted, str):
        return key, wanted, "as its annotation row"
    return key, "", ""


def _name_problem(name: str, parts: Sequence[str]) -> str:
    if not parts[-1]:
        return "the name is empty"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        return "the name is an absolute path"
    if ".." in parts:
        return "the name leads out of its folder"
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if num_bytes > _MAX_NAME_BYTES:
        return f"the name has {num_bytes} bytes"
    if not name.isprintable():
        return "the name has control characters"
    return ""


def printable(name: str) -> str:
    """The name as text that can be shown and stored: control characters and what is not UTF-8 escaped, cut if long."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(name)} characters)"
