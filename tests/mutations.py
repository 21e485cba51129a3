"""Video files damaged in known ways, each named by a number: the same number gives the same bytes again.

Sources are real files of every container and codec that the encoders here can make. What is easy to break: a mutant
must differ from its source, or it tests nothing.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from decode_reference import moving
from kinoray.demo.videos import make_video

__all__ = ["MUTATIONS", "NUM_FRAMES", "SOURCES", "Mutant", "make_mutant", "make_source"]

NUM_FRAMES = 30

SOURCES: dict[str, tuple[str, str]] = {
    "h264.mp4": ("libx264", "mp4"),
    "h264.mkv": ("libx264", "matroska"),
    "h264.ts": ("libx264", "mpegts"),
    "hevc.mp4": ("libx265", "mp4"),
    "hevc.mkv": ("libx265", "matroska"),
    "hevc.ts": ("libx265", "mpegts"),
    "vp9.webm": ("libvpx-vp9", "webm"),
    "vp9.mp4": ("libvpx-vp9", "mp4"),
    "av1.mp4": ("libsvtav1", "mp4"),
    "av1.webm": ("libsvtav1", "webm"),
    "av1.mkv": ("libsvtav1", "matroska"),
}
"""Encoder and container of each source."""

_OPTIONS = {
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1:bframes=2"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "40", "b": "0"},
    "libsvtav1": {"preset": "12", "crf": "45", "svtav1-params": "lp=1"},
}
_MASTERS = {0x1A45DFA3, 0x18538067, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB}
"""Elements of EBML that hold elements."""
_BOXES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta"}
_TS_PACKET = 188


@cache
def make_source(name: str) -> bytes:
    """An undamaged file of SOURCES: NUM_FRAMES frames of 64 x 48, three groups of pictures, the index in front."""
    os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder writes pages
    codec, container = SOURCES[name]
    return make_video(
        moving(NUM_FRAMES, 48, 64), fps=30, codec=codec, container=container, gop=10, options=_OPTIONS.get(codec, {})
    )


@dataclass(frozen=True, slots=True)
class Mutant:
    """A damaged file."""

    name: str
    """`h264.mp4/sizes/17`: its source, what was done, its number."""
    source: str
    kind: str
    data: bytes


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 4, 16, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _header(data: bytearray, rng: random.Random) -> None:
    """Bits where the container keeps its tables: the moov box, or the first bytes."""
    moov = data.find(b"moov")
    begin, end = (moov, moov + int.from_bytes(data[moov - 4 : moov], "big") - 4) if moov > 0 else (0, 600)
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(begin, min(end, len(data)))] ^= 1 << rng.randrange(8)


def _zeros(data: bytearray, rng: random.Random) -> None:
    begin, length = _stretch(data, rng)
    data[begin : begin + length] = bytes(length)


def _double(data: bytearray, rng: random.Random) -> None:
    begin, length = _stretch(data, rng)
    data[begin:begin] = data[begin : begin + length]


def _stretch(data: bytearray, rng: random.Random) -> tuple[int, int]:
    length = rng.randrange(1, max(2, len(data) // rng.choice((8, 64, 512))))
    return rng.randrange(len(data) - length), length


def _sizes(data: bytearray, rng: random.Random) -> None:
    """A size or count in the container's own structure."""
    if data[4:8] == b"ftyp":
        _mp4_number(data, rng)
    elif data[:4] == b"\x1a\x45\xdf\xa3":
        place, width = rng.choice(list(_ebml_sizes(data, 0, len(data))))
        marker = 1 << (8 - width)
        data[place : place + width] = rng.randbytes(width)
        data[place] = (data[place] & (marker - 1)) | marker
    else:
        start = rng.randrange(len(data) // _TS_PACKET) * _TS_PACKET
        data[start + rng.randrange(1, 20)] = rng.choice((0, 1, 0x47, 0x7F, 0xFF, rng.randrange(256)))


def _mp4_number(data: bytearray, rng: random.Random) -> None:
    """The size of a box, or a 32-bit number inside one."""
    place, size = rng.choice(list(_mp4_boxes(data, 0, len(data))))
    if rng.random() < 0.5 and size >= 16:
        place += 8 + 4 * rng.randrange((min(size, 400) - 8) // 4)
    old = int.from_bytes(data[place : place + 4], "big")
    new = rng.choice((0, 1, 7, 8, old + 1, old - 1, 2 * old, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)))
    data[place : place + 4] = struct.pack(">I", new % 2**32)


def _mp4_boxes(data: bytearray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin + 8 <= end:
        size = int.from_bytes(data[begin : begin + 4], "big")
        if size < 8:
            return
        yield begin, size
        if bytes(data[begin + 4 : begin + 8]) in _BOXES:
            yield from _mp4_boxes(data, begin + 8, min(begin + size, end))
        begin += size


def _ebml_sizes(data: bytearray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(place, width) of the size of every element."""
    while begin + 2 <= end:
        id_width = 9 - data[begin].bit_length()
        place = begin + id_width
        if id_width > 4 or place >= end or not data[place]:
            return
        width = 9 - data[place].bit_length()
        size = int.from_bytes(data[place : place + width], "big") & ((1 << 7 * width) - 1)
        yield place, width
        content = place + width
        if int.from_bytes(data[begin:place], "big") in _MASTERS:
            yield from _ebml_sizes(data, content, min(content + size, end))
        begin = content + size


MUTATIONS: dict[str, Callable[[bytearray, random.Random], None]] = {
    "cut": _cut,
    "bits": _bits,
    "header": _header,
    "sizes": _sizes,
    "zeros": _zeros,
    "double": _double,
}
"""What is done to the bytes, in place."""


def make_mutant(number: int) -> Mutant:
    """The mutant of that number; consecutive numbers go through all sources and kinds of damage."""
    source = list(SOURCES)[number % len(SOURCES)]
    kind = list(MUTATIONS)[number // len(SOURCES) % len(MUTATIONS)]
    rng = random.Random(number)
    good = make_source(source)
    data = bytearray(good)
    while data == good:
        data = bytearray(good)
        MUTATIONS[kind](data, rng)
    return Mutant(f"{source}/{kind}/{number}", source, kind, bytes(data))
