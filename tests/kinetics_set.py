"""A small synthetic copy of Kinetics with its traps: the set is built file by file, each with the verdict it must get.

The verdicts are written down here by hand, where the trap is laid; nothing of kinoray.pack is used to find them.
"""

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinoray.demo.videos import make_broken, make_video

LABELS = ("abseiling", "blowing d'balloon", "riding a bike", "tying knot (not on a tie)")
WINDOW_S = 10


def clip(number: int, seconds: int = WINDOW_S) -> bytes:
    """A video of its own for each number: 32 x 32, one frame a second."""
    rng = np.random.Generator(np.random.PCG64(number))
    frames = np.broadcast_to(rng.integers(0, 255, (seconds, 4, 4, 3), np.uint8)[:, :, :, None], (seconds, 4, 4, 8, 3))
    return make_video(np.repeat(frames.reshape(seconds, 4, 32, 3), 8, axis=1), fps=1)


def youtube_id(number: int) -> str:
    return f"-id_{number:04d}_X"[:11].ljust(11, "Z")


def key(number: int, start: int = 10) -> str:
    return f"{youtube_id(number)}_{start:06d}_{start + WINDOW_S:06d}"


@dataclass
class File:
    """A file, or a member of an archive, and what must become of it."""

    name: str
    data: bytes
    verdict: str
    reason: str = ""
    header: Callable[[tarfile.TarInfo], None] = lambda header: None
    """Changes a member's header."""
    shown: str | None = None
    """The name as verdicts.parquet has it, if it is not printable."""


@dataclass
class KineticsSet:
    """What lies at the source, what the annotations say, and what must come of both."""

    files: list[File] = field(default_factory=list)
    archives: dict[str, list[File]] = field(default_factory=dict)
    finish: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    """What is done to an archive's tar: compression, damage."""
    lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Annotation file -> (line, verdict of the row)."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Archive -> a part of what is said of it."""

    def row(self, verdict: str, number: int, *, split: str = "train", start: int = 10) -> None:
        name = LABELS[number % len(LABELS)]
        quoted = f'"{name}"' if number % 2 else name
        line = f"{quoted},{youtube_id(number)},{start},{start + WINDOW_S},{'validate' if split == 'val' else split},0"
        self.lines.setdefault(f"{split}.csv", [("label,youtube_id,time_start,time_end,split,is_cc", "")])
        self.lines[f"{split}.csv"].append((line, verdict))

    def test_row(self, verdict: str, number: int) -> None:
        """The official test file has no column of labels."""
        self.lines.setdefault("test.csv", [("youtube_id,time_start,time_end,split", "")])
        self.lines["test.csv"].append((f"{youtube_id(number)},10,20,test", verdict))

    def add(self, place: str, name: str, data: bytes, verdict: str, reason: str = "", **more: Any) -> None:
        """Into an archive, or into a folder."""
        if place.endswith("/"):
            self.files.append(File(place + name, data, verdict, reason, **more))
        else:
            self.archives.setdefault(place, []).append(File(name, data, verdict, reason, **more))

    def content(self) -> dict[str, bytes]:
        """Path below the source -> bytes."""
        found = {file.name: file.data for file in self.files}
        for path, members in self.archives.items():
            found[path] = self.finish.get(path, gzip.compress)(make_tar(members))
        return found

    def write(self, folder: Path) -> Path:
        """Write source and annotations; returns the source."""
        for path, data in self.content().items():
            (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / path).write_bytes(data)
        for name in self.lines:
            (folder / name).write_bytes(self.annotations(name))
        return folder / "source"

    def annotations(self, name: str) -> bytes:
        return "\n".join(line for line, _ in self.lines[name]).encode() + b"\n"

    def row_verdicts(self) -> dict[tuple[str, int], str]:
        """(annotation file, line) -> verdict."""
        return {
            (name, number): verdict
            for name, lines in self.lines.items()
            for number, (_, verdict) in enumerate(lines, 1)
            if verdict
        }

    def file_verdicts(self) -> list[tuple[str, str | None, str, str]]:
        """(path, member, verdict, reason), sorted; the reason only of what is unreadable."""
        found: list[tuple[str, str | None, str, str]] = [(f.name, None, f.verdict, f.reason) for f in self.files]
        for path, members in self.archives.items():
            found += [(path, m.shown or m.name, m.verdict, m.reason) for m in members if m.verdict]
        return sorted(found, key=str)


def make_tar(members: list[File]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            header = tarfile.TarInfo(member.name)
            header.size = len(member.data)
            member.header(header)
            tar.addfile(header, io.BytesIO(member.data) if header.isreg() else None)
    return buffer.getvalue()


def of_type(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(header: tarfile.TarInfo) -> None:
        header.type, header.linkname, header.size = kind, target, 0

    return change


def traps(place: Callable[[str], str], *, members: bool) -> KineticsSet:
    """The set, its files in the places that `place` gives for train, train2, val, test and replacement.

    `members`: with what only a tar can hold.
    """
    made = KineticsSet()
    train, train2, val, test, new = (place(name) for name in ("train", "train2", "val", "test", "replacement"))
    for number in range(8):  # nothing wrong
        made.row("packed", number)
        made.add(train if number % 2 else train2, f"{key(number)}.mp4", clip(number), "packed")
    for number in (20, 21, 22):
        made.row("packed", number, split="val")
        made.add(val, f"{LABELS[number % 4]}/{key(number)}.mp4", clip(number), "packed")
    for number in (30, 31):
        made.test_row("packed", number)
        made.add(test, f"{key(number)}.mp4", clip(number), "packed")
    made.row("missing", 40)
    made.row("missing", 41, split="val")
    made.test_row("missing", 42)
    made.row("unreadable", 50)
    made.add(train, f"{key(50)}.mp4", b"", "unreadable", "EmptyMedia")
    made.row("unreadable", 51)
    made.add(train, f"{key(51)}.mp4", make_broken("index_lost", clip(51)), "unreadable", "UnreadableContainer")
    made.row("packed", 52)  # broken in one place, whole in another
    made.add(train, f"{key(52)}.mp4", b"not a video", "unreadable", "UnreadableContainer")
    made.add(train2, f"{key(52)}.mp4", clip(52), "packed")
    made.row("packed", 53)
    made.add(train, f"{key(53)}.mp4", clip(53), "packed")
    made.add(train2, f"{key(53)}.mp4", clip(53), "duplicate")
    made.row("packed", 54)  # broken, and replaced
    made.add(train, f"{key(54)}.mp4", make_broken("index_lost", clip(54)), "replaced")
    made.add(new, f"{key(54)}.mp4", clip(54), "packed")
    made.row("packed", 55)  # the replacement is no better
    made.add(train, f"{key(55)}.mp4", clip(55), "packed")
    made.add(new, f"{key(55)}.mp4", make_broken("audio_only", clip(55)), "unreadable", "NoVideoStream")
    made.row("too_short", 56)
    made.add(train, f"{key(56)}.mp4", clip(56, 1), "too_short", "TooShort")
    made.row("packed", 57)  # short, but not too short
    made.add(train, f"{key(57)}.mp4", clip(57, 3), "packed")
    made.row("leak", 20, start=50)  # another window of a validation video
    made.add(train, f"{key(20, 50)}.mp4", clip(60), "leak")
    made.row("leak", 21)  # the very clip
    made.row("leak", 61)  # the bytes of a validation clip under another id
    made.add(train, f"{key(61)}.mp4", clip(22), "leak")
    made.row("duplicate", 3)
    made.row("packed", 62)
    made.add(train2, f"some/old name/{youtube_id(62)}_10_20.MP4", clip(62), "packed")
    made.add(train, f"{key(70)}.mp4", clip(70), "not_annotated")  # Kinetics-600 forgot it
    made.add(train2, "readme.txt", b"x", "not_a_video")
    made.add(val, ".DS_Store", b"x", "not_a_video")
    made.add(train, f"._{key(1)}.mp4", b"\0\5\x16\7", "not_a_video")
    made.add(train, f"__MACOSX/{key(1)}.mp4", b"x", "not_a_video")
    if members:
        _add_odd_members(made, train)
    return made


def _add_odd_members(made: KineticsSet, train: str) -> None:
    made.row("missing", 80)  # only under names that lead elsewhere
    for name in (f"../../{key(80)}.mp4", f"/etc/{key(80)}.mp4", f"a\\..\\{key(80)}.mp4", f"C:\\{key(80)}.mp4"):
        made.add(train, name, clip(80), "unsafe_name")
    made.add(train, f"a\x1b[31m/{key(80)}.mp4", clip(80), "unsafe_name", shown=f"a\\x1b[31m/{key(80)}.mp4")
    made.add(train, f"a\n/{key(80)}.mp4", clip(80), "unsafe_name", shown=f"a\\n/{key(80)}.mp4")
    long = "x" * 4000 + ".mp4"
    made.add(train, long, b"x", "unsafe_name", shown=f"{long[:200]}... (4004 characters)")
    made.row("missing", 81)
    made.add(train, f"{key(81)}.mp4", b"", "not_regular", header=of_type(tarfile.SYMTYPE, "/etc/passwd"))
    made.add(train, f"{key(81)}.mp4", b"", "not_regular", header=of_type(tarfile.LNKTYPE, f"{key(1)}.mp4"))
    made.add(train, f"{key(81)}.mp4", b"", "not_regular", header=of_type(tarfile.CHRTYPE))
    made.add(train, f"{key(81)}.mp4", b"", "not_regular", header=of_type(tarfile.FIFOTYPE))
    made.add(train, "abseiling", b"", "folder", header=of_type(tarfile.DIRTYPE))
    made.row("packed", 82)  # a huge attribute in front of it changes nothing but the time of reading
    made.add(
        train,
        f"./abseiling/{key(82)}.mp4",
        clip(82),
        "packed",
        header=lambda header: header.pax_headers.update({"SCHILY.xattr.x": "y" * 100_000}),
    )
    made.add(
        train,
        f"{key(81)}.mp4",
        clip(81),
        "not_regular",
        header=lambda header: header.pax_headers.update({"SCHILY.xattr.bomb": "y" * 2_000_000}),
    )


def archived_set() -> KineticsSet:
    """As CVDF hands it out: gzipped tars, one that is not gzipped, a replacement, one that is cut."""
    places = {
        "train": "train/part_0.tar.gz",
        "train2": "train/part_1.tar.gz",
        "val": "val/val.tar",
        "test": "test/part_0.tgz",
        "replacement": "replacement/replacement_for_corrupted_k400.tgz",
    }
    made = traps(places.__getitem__, members=True)
    made.finish[places["train2"]] = bytes  # a plain tar under the name of a gzipped one
    made.finish[places["val"]] = bytes
    cut = "train/part_2.tar.gz"
    made.row("packed", 90)
    made.row("unreadable", 91)
    made.row("missing", 92)
    made.add(cut, f"{key(90)}.mp4", clip(90), "packed")
    made.add(cut, f"{key(91)}.mp4", np.random.default_rng(0).bytes(5000), "unreadable", "DamagedArchive")
    made.add(cut, f"{key(92)}.mp4", clip(92), "")  # never reached
    made.finish[cut] = lambda tar: gzip.compress(tar)[: len(gzip.compress(clip(90))) + 2500]
    made.damaged[cut] = "behind member 2: the gzip is cut short"
    made.add("train/part_3.tar.gz", "x.mp4", b"", "")
    made.finish["train/part_3.tar.gz"] = lambda _: b"<html>404</html>" * 100
    made.damaged["train/part_3.tar.gz"] = "at its start: it is something else"
    made.add("annotations/", "train.csv", b"label", "not_a_video")
    return made


def folder_set() -> KineticsSet:
    """As people keep it: files in folders of classes and splits."""
    places = {
        "train": "train/riding a bike/",
        "train2": "train2/d'o/",
        "val": "val/",
        "test": "test/",
        "replacement": "a_replacement/",
    }
    return traps(places.__getitem__, members=False)
