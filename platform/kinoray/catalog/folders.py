"""What a listing means: which file is a video, what it is called, which folder a split or a class, what systems leave.

What is easy to break: `pack`, `label` and `doctor` must say the same of one folder, so none of them decides any of this
itself. And which ids come out depends on the set of the names alone, not on their order: names are strangers', and may
be chosen so that what becomes of them is equal.
"""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from kinoray.console import many
from kinoray.errors import CatalogError

__all__ = [
    "BETWEEN_CLASSES",
    "HEAD_BYTES",
    "MAX_ID_LEVEL",
    "VIDEO_EXTENSIONS",
    "SkippedFolders",
    "class_name",
    "class_names",
    "doubt_of_labels",
    "ending_shown",
    "extension",
    "id_at",
    "in_label_list",
    "is_hidden",
    "is_other",
    "is_text",
    "is_video",
    "is_video_head",
    "label_list",
    "no_video_among",
    "no_video_of_endings",
    "place_problem",
    "places_in_folders",
    "said_of_endings",
    "said_of_others",
    "set_problems",
    "split_named",
    "unique_ids",
]

VIDEO_EXTENSIONS = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
        *(".mkv", ".webm", ".avi", ".divx", ".flv", ".ogv", ".wmv", ".asf"),
        *(".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".vob"),
        *(".m2v", ".mpv", ".h264", ".264", ".avc", ".h265", ".265", ".hevc"),
        *(".dv", ".dif", ".mxf", ".ivf", ".nut", ".apng"),
        *(".rm", ".rmvb"),
    }
)
"""What is a video by its name, in lower case. Nobody calls anything else so that lies beside videos; what kinoray does
not decode (the last line) is one all the same, since a row that says so is better than a file that is left out. A .gif
or .webp may be a picture or move: it is looked at."""

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".svg")

_OTHER_EXTENSIONS = frozenset(
    {
        *(".vtt", ".srt", ".ass", ".ssa", ".sbv", ".lrc", ".idx", ".sub"),
        *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".htm", ".nfo", ".pdf"),
        *(".log", ".ini", ".url", ".description", ".npy", ".npz", ".pkl", ".parquet", ".py", ".sh", ".md5", ".sha256"),
        *_PICTURES,
        *(".mp3", ".wav", ".m4a", ".aac", ".flac", ".opus", ".wma"),
        *(".part", ".ytdl", ".tmp", ".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"),
        *(".thm", ".lrv", ".lrf", ".ifo", ".bup", ".cpi", ".mpl", ".bdm", ".modd", ".moff"),
    }
)
"""What is something else by its name, and lies beside videos: subtitles, notes, pictures, sound, downloads that were
cut, and what cameras and discs write (previews among it, which are small copies of the video beside them)."""

HEAD_BYTES = 1024
"""Of a file's first bytes, what `is_video_head` asks for: three packets of MPEG-TS, or what a GIF has before its first
picture."""

_MAGIC = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"0&\xb2u\x8ef\xcf\x11",  # ASF
    b"\x00\x00\x01\xba",  # MPEG-PS
    b"\x00\x00\x01\xb3",  # MPEG-1 and MPEG-2 video
    b"\x06\x0e+4\x02\x05\x01\x01",  # MXF
    b"\x1f\x07\x00",  # DV
    b"DKIF",  # IVF
    b"nut/multimedia container",
    b".RMF",
)
_RAW = re.compile(rb"\0\0\0?\x01([\x27\x47\x67\x09]|[\x40\x46]\x01)")  # H.264 or HEVC: parameters, or a delimiter
_MOVES = re.compile(rb"!\xff\x0b(NETSCAPE2\.0|ANIMEXTS1\.0)|!\xf9\x04.(?!\0\0)", re.DOTALL)  # a GIF: a loop, or a delay
_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free", b"pnot")  # what MP4 and QuickTime begin with
_OTHER_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis", b"crx ")
_SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"aax ")
_OGG_VIDEO = (b"\x80theora", b"OVP80", b"BBCD")  # in the first pages, one a stream
_TS_PACKETS = ((0, 188), (4, 192), (0, 204))  # MPEG-TS, that of AVCHD and Blu-ray, that with error correction

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}

_SHOWN_ENDINGS = 8
_SHOWN_FOLDERS = 10

_LEFT_BY_SYSTEMS = frozenset(  # besides what begins with a dot, such as ._a.mp4, .Trash-1000 and .snapshot
    {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
)

_PROBLEMS = {
    "NoClassFolder": "lies outside of the class folders",
    "UnusableName": "its name is not UTF-8; rename it",
}
_FEW_TO_VALIDATE = 10
_SHOWN_CLASSES = 5
_MAX_CLASS = 2**12  # characters of a name, as in a checkpoint
BETWEEN_CLASSES = "|"
"""Divides the classes of one video in a cell."""


class SkippedFolders:
    """Counts the folders that a listing leaves out, and keeps what is said of the first ones."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._num_more = 0

    def add(self, folder: str, why: str) -> None:
        """Another one."""
        if len(self._texts) < _SHOWN_FOLDERS:
            self._texts.append(f"{folder} is left out: {why}")
        else:
            self._num_more += 1

    def tell(self, source: str, say: Callable[[str], None]) -> None:
        """Say which, and how many more."""
        for text in self._texts:
            say(text)
        if self._num_more:
            say(f"{self._num_more} more folders below {source} are left out")


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


@functools.lru_cache(4096)
def _is_hidden_folder(folder: str) -> bool:
    return is_hidden(folder.split("/"))


def _is_hidden_name(name: str) -> bool:
    """`is_hidden` of a path as text; of files in one folder quick."""
    folder, slash, base = name.rpartition("/")
    is_hidden_base = base.startswith(".") or base.lower() in _LEFT_BY_SYSTEMS
    return is_hidden_base or (bool(slash) and _is_hidden_folder(folder))


def is_video(name: str) -> bool:
    """Whether a file below a source is a video by its name."""
    return extension(name) in VIDEO_EXTENSIONS and not _is_hidden_name(name)


def is_other(name: str) -> bool:
    """Whether a file below a source is none by its name; of most endings, and without one, nothing is known."""
    return extension(name) in _OTHER_EXTENSIONS or _is_hidden_name(name)


def is_video_head(head: bytes) -> bool:
    """Whether a file is a video by its first HEAD_BYTES (all of them, if it has fewer).

    Pictures that do not move are none, nor is sound.
    """
    if head[4:8] == b"ftyp":
        return head[8:12] not in (*_OTHER_BRANDS, *_SOUND_BRANDS)
    if head[4:8] in _BOX_TYPES:
        return b"\0" in head  # "The free ..." is a text
    if head.startswith(b"RIFF"):
        return head[8:11] == b"AVI" or (head[8:16] == b"WEBPVP8X" and len(head) > 20 and head[20] & 2 != 0)
    if head.startswith(b"OggS"):
        return any(magic in head for magic in _OGG_VIDEO)
    if head.startswith(b"GIF8"):
        return _MOVES.search(head) is not None
    if head.startswith(b"\x89PNG"):
        return b"acTL" in head
    packets = ([head[start + number * step :][:1] for number in range(3)] for start, step in _TS_PACKETS)
    return head.startswith(_MAGIC) or _RAW.match(head) is not None or any(found == [b"G"] * 3 for found in packets)


def said_of_others(names: Iterable[str]) -> str:
    """`12 files are no videos (.json 6, .vtt 4, hidden 2)`."""
    return said_of_endings(Counter(map(ending_shown, names)))


def said_of_endings(counts: Counter[str]) -> str:
    """`said_of_others` of files that were counted by `ending_shown`."""
    are = "1 file is no video" if counts.total() == 1 else f"{counts.total()} files are no videos"
    return f"{are} ({_shown(counts)})"


def no_video_among(source: str, names: Iterable[str], expected: str) -> str:
    """`frames: found 6 files, none of them a video (.jpg 6); ...`: for a source in which nothing is one.

    Args:
        expected: what to do, where they are not pictures.
    """
    return no_video_of_endings(source, Counter(map(ending_shown, names)), expected)


def no_video_of_endings(source: str, counts: Counter[str], expected: str) -> str:
    """`no_video_among` of files that were counted by `ending_shown`."""
    if not counts:
        return f"{source}: found nothing; {expected}"
    if all(ending in _PICTURES for ending in counts):
        picture = counts.most_common(1)[0][0]
        expected = (
            "a video is one file, and a folder of pictures is none: make one of each such folder (ffmpeg -framerate 25 "
            f"-i FOLDER/%05d{picture} FOLDER.mp4)"
        )
    if ".parquet" in counts:
        expected += f"; tables are named as '{source.rstrip('/')}/*.parquet'"
    none = "and it is no video" if counts.total() == 1 else "none of them a video"
    return f"{source}: found {many(counts.total(), 'file')}, {none} ({_shown(counts)}); {expected}"


def ending_shown(name: str) -> str:
    """What a file that is no video is counted as."""
    return "hidden" if _is_hidden_name(name) else extension(name) or "no ending"


def _shown(counts: Counter[str]) -> str:
    more = f" and {len(counts) - _SHOWN_ENDINGS} more endings" if len(counts) > _SHOWN_ENDINGS else ""
    return ", ".join(f"{ending} {count}" for ending, count in counts.most_common(_SHOWN_ENDINGS)) + more


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


def class_name(text: str, where: str) -> str:
    """The name of a class in the form in which names are compared: `e` with an accent may be one character or two.

    Raises:
        CatalogError: it is longer than any name: accents in a row take the square of their number.
    """
    if len(text) > _MAX_CLASS:
        raise CatalogError(
            f"{where}: the class {text[:40]!r} ... has {len(text):,} characters, at most {_MAX_CLASS:,} are read; "
            "give it a shorter name"
        )
    return unicodedata.normalize("NFC", text)


def class_names(text: str, where: str) -> tuple[str, ...] | None:
    """The classes in a cell `red|round`, each once, sorted; None of an empty cell, none of them of `|`.

    Raises:
        CatalogError: as class_name.
    """
    if not text.strip():
        return None
    names = {class_name(part.strip(), where) for part in text.split(BETWEEN_CLASSES)}
    return tuple(sorted(names - {""}))


def label_list(names: Iterable[str]) -> str:
    """Classes in one text, `red|round`; those of equal classes are equal, and `|` is none."""
    return BETWEEN_CLASSES.join(sorted(set(names))) or BETWEEN_CLASSES


def in_label_list(text: str) -> tuple[str, ...]:
    """The classes of a `label_list`."""
    return tuple(name for name in text.split(BETWEEN_CLASSES) if name)


def places_in_folders(names: Sequence[str]) -> list[tuple[str, str | None] | str]:
    """(class, split or None) of each video by its path below a source, or the error_class of its refusal.

    The top folders are splits where all of them are called so, and there are folders inside.
    """
    paths = [name.split("/") for name in names]
    inside = [path for path in paths if len(path) > 1]
    has_splits = all(split_named(path[0]) for path in inside) and any(len(path) > 2 for path in inside)
    places: list[tuple[str, str | None] | str] = []
    for name, path in zip(names, paths, strict=True):
        split = split_named(path[0]) if has_splits else None
        folders = path[1:-1] if has_splits else path[:-1]
        if not folders or not folders[0]:
            places.append("NoClassFolder")
        elif not is_text(name):
            places.append("UnusableName")
        else:
            places.append((class_name(folders[0], "a folder"), split))
    return places


def doubt_of_labels(cells: Sequence[str], *, several: bool) -> str:
    """Why the labels of a list may be meant otherwise than they are read, or "".

    Args:
        several: whether each cell is a label list.
    """
    lists = [cell.strip() for cell in cells if BETWEEN_CLASSES in cell.strip(f" {BETWEEN_CLASSES}")]
    if not several:
        meant = "is read as the name of one class; where videos may have several, the column is called labels"
        return f"{lists[0]!r:.80} {meant}" if lists else ""
    others = [] if lists else [cell.strip() for cell in cells if re.search(r"[,;\[]", cell)]
    if not others:
        return ""
    return (
        f"no label list is divided by {BETWEEN_CLASSES}, so {others[0]!r:.80} is read as the name of one class "
        f"({many(len(others), 'cell')} like it); write red|round"
    )


def set_problems(
    places: Mapping[tuple[tuple[str, ...], str | None], int], *, several: bool = False
) -> list[tuple[str, str]]:
    """(what is odd, what to do) of a labelled set too poor to train on; `places`: (classes, split) -> videos.

    Args:
        several: whether a video may have several classes, or none.
    """
    found: list[tuple[str, str]] = []
    labels = {label for names, _ in places for label in names}
    num_labelled = sum(count for (names, _), count in places.items() if names)
    lacks_all = any(not names for names, _ in places)
    if several and not labels:
        found.append(
            ("every label list is empty", "there is no class to learn; name those that videos have: red|round")
        )
    if len(labels) == 1 and not (several and lacks_all):  # else to have it or not is what is learnt
        text = f"all {num_labelled} labelled videos are of one class, {next(iter(labels))!r}"
        found.append((text, "a network learns nothing from one class; expected a folder, or a label, for each class"))
    num_val = sum(count for (_, split), count in places.items() if split == "val")
    if 0 < num_val < max(_FEW_TO_VALIDATE, len(labels)):
        what = f"{many(num_val, 'video')} to validate on, for {many(len(labels), 'class')}"
        text = what if several else f"{what}: each is {100 / num_val:.0f} % of a top-1"
        found.append((text, "accuracies on so few say little; add videos to val"))
    absent = sorted(labels - {label for names, split in places if split == "val" for label in names})
    if num_val and absent:
        text = f"{many(len(absent), 'class')} without a video in val: {', '.join(absent[:_SHOWN_CLASSES])}"
        text += f" and {len(absent) - _SHOWN_CLASSES} more" if len(absent) > _SHOWN_CLASSES else ""
        found.append((text, "their accuracy stays unknown; move some videos to val"))
    return found


# What a video is called


_MAX_ID_BYTES = 180  # leaves room for an extension in the 255 bytes of a file name
_MAX_ID_CHARS = 1024  # that are looked at for it, and become more than those bytes: accents in a row take long
_DIGEST_CHARS = (0, 10, 64)  # of a name's SHA-256 in its video_id: none, enough against chance, enough against intent
MAX_ID_LEVEL = len(_DIGEST_CHARS) - 1


def unique_ids(names: Sequence[str]) -> list[str]:
    """A video_id for each (unique) name: the path without its extension, in letters, digits, `_` and `-`.

    `bus/a.b.mp4` -> `bus__a_b`: a key that every WebDataset reader splits at the same dot. Names that come out equal,
    or too long, all get a digest of the name at the end, whatever their order; a whole one where names were chosen so
    that they come out equal all the same.
    """
    plain = [_sanitise(name) for name in names]
    lengths = [int(len(video_id.encode()) > _MAX_ID_BYTES) for video_id in plain]  # places in _DIGEST_CHARS
    ids = list(map(_with_digest, plain, names, lengths))
    while True:
        counts = Counter(ids)
        equal = [place for place, video_id in enumerate(ids) if counts[video_id] > 1]
        longer = [place for place in equal if lengths[place] < MAX_ID_LEVEL]
        if not longer:
            return ids
        for place in longer:
            lengths[place] += 1
            ids[place] = _with_digest(plain[place], names[place], lengths[place])


def id_at(name: str, level: int) -> tuple[str, int]:
    """The video_id of a name that `level` rounds of `unique_ids` found equal to another one, and what level that is.

    It is 1 at least for a long name, and at most MAX_ID_LEVEL.
    """
    plain = _sanitise(name)
    level = max(level, int(len(plain.encode()) > _MAX_ID_BYTES))
    return _with_digest(plain, name, level), level


def _sanitise(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    stem = base.rpartition(".")[0] or base
    text = unicodedata.normalize("NFC", f"{folder}{slash}{stem}"[:_MAX_ID_CHARS])
    return re.sub(r"[^\w-]", "_", text.replace("/", "__"))


def _with_digest(video_id: str, name: str, length: int) -> str:
    """The id with so much of the name's digest (a place in _DIGEST_CHARS), cut to leave room for it."""
    num_chars = _DIGEST_CHARS[length]
    if not num_chars:
        return video_id
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:num_chars]
    room_bytes = _MAX_ID_BYTES + _DIGEST_CHARS[1] - num_chars
    return f"{video_id.encode()[:room_bytes].decode(errors='ignore')}-{digest}"
