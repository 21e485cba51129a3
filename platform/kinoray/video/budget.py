"""Cheap looks at a file that refuse what would cost much: before libav reads its index, and before it reads packets.

Small files can ask for gigabytes: an edit list repeats the samples of an MP4, a fragment claims samples that are not
there, an index is compressed. What is easy to break: a file that is only odd, or cut short, must still be read, so each
rule here compares what would be built with what an honest file of that size holds.
"""

import mmap
import resource
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaOverBudget

__all__ = ["MAX_STREAMS", "check_boxes", "check_index", "check_memory"]

MAX_STREAMS = 100
"""Streams of a file. libav opens a decoder for each; 3,000 of them take 2 GB."""

_PARENTS = frozenset((b"moov", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"cmov"))
_MAX_DEPTH = 8
_MAX_BOXES = 2**17  # looked at, in all
_MAX_REPEATED = 10**6  # samples that an edit list may make of those that are there
_FEW_EDITS = 16
_MAX_INDEX_BYTES = 16 * 2**20  # of an index that is compressed; 4 h of video take about 10 MB
_MOST_BYTES_A_PIXEL = 8  # four channels of 16 bits
_REORDER = 64  # places by which decoding order and order of showing differ at most


@dataclass(slots=True)
class _Claims:
    """What the boxes of an MP4 say that there is."""

    boxes: int = 0
    tracks: int = 0
    fragment_samples: int = 0
    repeated: int = 0
    edits: int = 0
    """Of the track that is being read."""
    samples: int = 0
    """Of the track that is being read."""


def check_boxes(data: bytes) -> None:
    """Refuse an MP4 or MOV whose index would unfold to far more than the file can hold; other files pass.

    Raises:
        MediaOverBudget: with what is claimed, and what is there.
    """
    claims = _Claims()
    _walk(data, 0, len(data), claims, depth=0)
    if claims.fragment_samples > len(data):
        raise MediaOverBudget(f"{claims.fragment_samples:,} samples are claimed by a file of {len(data):,} bytes")


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, begin and end of the payload) of the boxes in a stretch, as far as they make sense."""
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        head = 8
        if size == 1 and begin + 16 <= end:
            size, head = struct.unpack_from(">Q", data, begin + 8)[0], 16
        stop = end if size == 0 else min(end, begin + size)
        if size and size < head:
            return
        yield kind, begin + head, stop
        begin = stop


def _walk(data: bytes, begin: int, end: int, claims: _Claims, depth: int) -> None:
    for kind, first, stop in _boxes(data, begin, end):
        claims.boxes += 1
        if claims.boxes > _MAX_BOXES:
            return
        if kind == b"cmvd":
            _walk_compressed(data[first:stop], claims, depth)
        elif kind == b"elst" and first + 8 <= stop:
            claims.edits = min(struct.unpack_from(">I", data, first + 4)[0], (stop - first) // 12)
        elif kind in (b"stsz", b"stz2") and first + 12 <= stop:
            claims.samples = min(struct.unpack_from(">I", data, first + 8)[0], len(data))
        elif kind == b"trun" and first + 8 <= stop:
            claims.fragment_samples += struct.unpack_from(">I", data, first + 4)[0]
        elif kind == b"trak" and depth < _MAX_DEPTH:
            _walk_track(data, first, stop, claims, depth)
        elif kind in _PARENTS and depth < _MAX_DEPTH:
            _walk(data, first, stop, claims, depth + 1)


def _walk_track(data: bytes, begin: int, end: int, claims: _Claims, depth: int) -> None:
    claims.tracks += 1
    if claims.tracks > MAX_STREAMS:
        raise MediaOverBudget(f"the file has more than {MAX_STREAMS} tracks")
    claims.edits = claims.samples = 0
    _walk(data, begin, end, claims, depth + 1)
    if claims.edits > _FEW_EDITS:
        claims.repeated += claims.edits * claims.samples
        if claims.repeated > _MAX_REPEATED:
            raise MediaOverBudget(
                f"an edit list of {claims.edits:,} entries repeats up to {claims.samples:,} samples each time"
            )


def _walk_compressed(payload: bytes, claims: _Claims, depth: int) -> None:
    """The index of an old QuickTime file: its size and then zlib."""
    claimed = struct.unpack_from(">I", payload)[0] if len(payload) >= 4 else 0
    if claimed > _MAX_INDEX_BYTES:
        raise MediaOverBudget(f"the compressed index claims {claimed:,} bytes; {_MAX_INDEX_BYTES:,} are read")
    try:
        inflated = zlib.decompressobj().decompress(payload[4:], _MAX_INDEX_BYTES)
    except zlib.error:
        return  # libav says what is wrong with it
    _walk(inflated, 0, len(inflated), claims, depth + 1)


def check_index(stream: Any, size_bytes: int, config: DecodeConfig, *, by_groups: bool, reach: float) -> None:
    """Refuse by the container's index, where it lists every sample (MP4), what reading all packets would refuse later.

    Args:
        stream: PyAV's stream.
        by_groups: decoding may begin at any key frame.
        reach: share of the frames that is passed for certain before the last wanted one.

    Raises:
        MediaOverBudget: longer than decode.max_duration_s, or more frames to decode than decode.max_frames.
    """
    entries = stream.index_entries
    count = len(entries)
    if count < 2 or entries[-1].pos + entries[-1].size > size_bytes:  # cut short: what is there is read and counted
        return
    seconds = float((entries[-1].timestamp - entries[0].timestamp) * stream.time_base)
    if seconds > config.max_duration_s:
        raise MediaOverBudget(f"{seconds:,.1f} s are more than decode.max_duration_s = {config.max_duration_s:,g}")
    place = int(reach * count) - _REORDER
    if place <= config.max_frames:
        return
    key = entries.search_timestamp(entries[place].timestamp, backward=True, any_frame=False) if by_groups else 0
    if place - max(0, key) > config.max_frames:
        raise MediaOverBudget(
            f"{place - max(0, key):,} or more frames to decode are more than decode.max_frames = {config.max_frames:,}"
        )


def check_memory(width: int, height: int) -> None:
    """Tell a lack of memory from damage, where the decoder refused a frame of this size: libav calls both "invalid".

    Raises:
        MediaOverBudget: (from a MemoryError) this process may not take much more address space than that of a frame.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    try:  # only asked for, never written to; a decoder process cannot open files that tell
        mmap.mmap(-1, max(1, _MOST_BYTES_A_PIXEL * width * height), flags=mmap.MAP_PRIVATE).close()
    except (OSError, OverflowError):
        text = f"no memory for another frame of {width} x {height}"
        raise MediaOverBudget(text) from MemoryError(text)
