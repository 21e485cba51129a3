"""What names in a listing mean: which file is a video, which folder a split or a class, and what systems leave behind.

What is easy to break: `pack`, `label` and `doctor` must say the same of one folder, so none of them decides any of this
itself.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = [
    "VIDEO_EXTENSIONS",
    "extension",
    "is_hidden",
    "is_other",
    "is_text",
    "is_video",
    "place_problem",
    "places_in_folders",
    "said_of_others",
    "split_named",
]

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp"}
)
"""What counts as a video in a folder that has no catalog, in lower case."""

_OTHER_EXTENSIONS = frozenset(
    {
        *(".vtt", ".srt", ".ass", ".ssa", ".sbv", ".lrc"),
        *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".htm", ".nfo", ".pdf"),
        *(".log", ".ini", ".url", ".description", ".npy", ".npz", ".pkl", ".parquet"),
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".svg", ".thm"),
        *(".mp3", ".wav", ".m4a", ".aac", ".flac", ".ogg", ".opus"),
        *(".part", ".ytdl", ".tmp", ".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"),
    }
)
"""What is surely something else, and lies beside videos: subtitles, notes, stills, sound, downloads that were cut."""

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}

_SHOWN_ENDINGS = 8

_LEFT_BY_SYSTEMS = frozenset(  # besides what begins with a dot, such as ._a.mp4, .Trash-1000 and .snapshot
    {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
)

_PROBLEMS = {
    "HiddenFile": "a hidden file, or inside a hidden folder",
    "NotAVideo": "no video by its name",
    "NoClassFolder": "lies outside of the class folders",
    "UnusableName": "its name is not UTF-8; rename it",
}


def extension(name: str) -> str:
    """`bus/a.MP4` -> `.mp4`; empty for a name without one."""
    stem, dot, last = name.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if stem and dot else ""


def split_named(name: str) -> str | None:
    """`Validation` -> `val`: the split that goes by this name, in whatever case; None if none does."""
    return _SPLIT_OF.get(name.lower())


def is_hidden(path: Sequence[str]) -> bool:
    """Whether a file, by the parts of its path, is hidden or left by a system: trash, snapshots, thumbnails."""
    return any(part.startswith(".") or part.lower() in _LEFT_BY_SYSTEMS for part in path)


def is_video(name: str) -> bool:
    """Whether a file below a source is a video by its name."""
    return extension(name) in VIDEO_EXTENSIONS and not is_hidden(name.split("/"))


def is_other(name: str) -> bool:
    """Whether a file below a source says by its name that it is no video; of most endings nothing is known."""
    return extension(name) in _OTHER_EXTENSIONS


def said_of_others(names: Iterable[str]) -> str:
    """`12 files are no videos by their names (.json 6, .vtt 4, hidden 2)`."""
    counts = Counter("hidden" if is_hidden(name.split("/")) else extension(name) or "no ending" for name in names)
    shown = ", ".join(f"{ending} {count}" for ending, count in counts.most_common(_SHOWN_ENDINGS))
    more = f" and {len(counts) - _SHOWN_ENDINGS} more endings" if len(counts) > _SHOWN_ENDINGS else ""
    are = (
        "1 file is no video by its name"
        if counts.total() == 1
        else f"{counts.total()} files are no videos by their names"
    )
    return f"{are} ({shown}{more})"


def is_text(name: str) -> bool:
    """Whether a name is UTF-8; one that is not is listed with surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def place_problem(error_class: str) -> str:
    """A refusal by place or name, in words."""
    return _PROBLEMS[error_class]


def places_in_folders(names: Sequence[str]) -> list[tuple[str, str | None] | str]:
    """(class, split or None) of each path below a source, or the error_class of its refusal (see `place_problem`).

    The top folders are splits where all that have videos (by their names, if any file is one) are called so, and there
    are folders inside. Others beside them, such as `annotations/`, are no classes.
    """
    paths = [name.split("/") for name in names]
    inside = [path for path in paths if len(path) > 1 and not is_hidden(path)]
    seen = [path for path in inside if is_video(path[-1])] or inside
    has_splits = all(split_named(path[0]) for path in seen) and any(len(path) > 2 for path in seen)
    places: list[tuple[str, str | None] | str] = []
    for name, path in zip(names, paths, strict=True):
        split = split_named(path[0]) if has_splits else None
        folders = path[1:-1] if has_splits else path[:-1]
        if is_hidden(path):
            places.append("HiddenFile")
        elif is_other(path[-1]):
            places.append("NotAVideo")
        elif not folders or not folders[0] or (has_splits and split is None):
            places.append("NoClassFolder")
        elif not is_text(name):
            places.append("UnusableName")
        else:
            places.append((folders[0], split))
    return places
