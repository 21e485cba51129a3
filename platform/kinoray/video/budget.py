"""Cheap looks at a file that refuse what would cost much: before libav reads its index, and before it reads packets.

Small files can ask for gigabytes: an edit list repeats the samples of an MP4, a fragment claims samples that are not
there, an index is compressed. What is easy to break: a file that is only odd, or cut short, must still be read, so each
rule here compares what would be built with what an honest file of that size holds. What is encrypted is told by the
same looks, since a decoder makes noise of it.
"""

import mmap
import resource
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kinoray.config.clip import said_limit
from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaOverBudget

__all__ = ["MAX_STREAMS", "BoxClaims", "check_boxes", "check_index", "check_memory", "empty_at_end", "encryption"]

MAX_STREAMS = 100
"""Streams of a file. libav opens a decoder for each; 3,000 of them take 2 GB."""

_PARENTS = frozenset((b"moov", b"edts", b"mdia", b"minf", b"stbl", b"traf", b"cmov"))
_MAX_DEPTH = 8
_MAX_BOXES = 2**17  # looked at, in all
_MAX_REPEATED = 10**6  # samples that an edit list may make of those that are there
_FEW_EDITS = 16
_MAX_INDEX_BYTES = 16 * 2**20  # of an index that is compressed; 4 h of video take about 10 MB
_MOST_BYTES_A_PIXEL = 8  # four channels of 16 bits
_VISUAL_ENTRY_BYTES = 78  # before the boxes in a sample description
_MATROSKA_TRACKS = (0x18538067, 0x1654AE6B)
_MATROSKA_ENCRYPTION = (0x6D80, 0x6240, 0x5035)
_ASF_HEADER_BYTES = 2**16
_ASF_ENCRYPTION = (
    bytes.fromhex("FBB3112223BDD211B4B700A0C955FC6E"),
    bytes.fromhex("14E68A292226174CB935DAE07EE9289C"),
)
_REORDER = 64  # places by which decoding order and order of showing differ at most


@dataclass(slots=True)
class BoxClaims:
    """What the boxes of an MP4 say that there is."""

    boxes: int = 0
    tracks: int = 0
    fragment_samples: int = 0
    repeated: int = 0
    edits: int = 0
    """Of the track that is being read."""
    samples: int = 0
    """Of the track that is being read."""
    track_id: int = 0
    """Of the track that is being read."""
    is_encrypted: bool = False
    """Of the track that is being read."""
    encrypted_ids: set[int] = field(default_factory=set)
    """Tracks whose samples are encrypted."""
    is_fragmented: bool = False
    """The index at the front is not of the whole file."""


def check_boxes(data: bytes) -> BoxClaims:
    """Refuse an MP4 or MOV whose index would unfold to far more than the file can hold; other files pass.

    Raises:
        MediaOverBudget: with what is claimed, and what is there.
    """
    claims = BoxClaims()
    _walk(data, 0, len(data), claims, depth=0)
    if claims.fragment_samples > len(data):
        raise MediaOverBudget(f"{claims.fragment_samples:,} samples are claimed by a file of {len(data):,} bytes")
    return claims


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


def _walk(data: bytes, begin: int, end: int, claims: BoxClaims, depth: int) -> None:
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
        elif kind == b"tkhd" and first + 24 <= stop:
            claims.track_id = struct.unpack_from(">I", data, first + (20 if data[first] == 1 else 12))[0]
        elif kind == b"stsd":
            claims.is_encrypted = any(_is_encrypted(data, *entry) for entry in _boxes(data, first + 8, stop))
        elif kind in (b"mvex", b"moof"):
            claims.is_fragmented = True
            if depth < _MAX_DEPTH:
                _walk(data, first, stop, claims, depth + 1)
        elif kind == b"trun" and first + 8 <= stop:
            claims.fragment_samples += struct.unpack_from(">I", data, first + 4)[0]
        elif kind == b"trak" and depth < _MAX_DEPTH:
            _walk_track(data, first, stop, claims, depth)
        elif kind in _PARENTS and depth < _MAX_DEPTH:
            _walk(data, first, stop, claims, depth + 1)


def _walk_track(data: bytes, begin: int, end: int, claims: BoxClaims, depth: int) -> None:
    claims.tracks += 1
    if claims.tracks > MAX_STREAMS:
        raise MediaOverBudget(f"the file has more than {MAX_STREAMS} tracks")
    claims.edits = claims.samples = claims.track_id = 0
    claims.is_encrypted = False
    _walk(data, begin, end, claims, depth + 1)
    if claims.is_encrypted:
        claims.encrypted_ids.add(claims.track_id)
    if claims.edits > _FEW_EDITS:
        claims.repeated += claims.edits * claims.samples
        if claims.repeated > _MAX_REPEATED:
            raise MediaOverBudget(
                f"an edit list of {claims.edits:,} entries repeats up to {claims.samples:,} samples each time"
            )


def _walk_compressed(payload: bytes, claims: BoxClaims, depth: int) -> None:
    """The index of an old QuickTime file: its size and then zlib."""
    claimed = struct.unpack_from(">I", payload)[0] if len(payload) >= 4 else 0
    if claimed > _MAX_INDEX_BYTES:
        raise MediaOverBudget(f"the compressed index claims {claimed:,} bytes; {_MAX_INDEX_BYTES:,} are read")
    try:
        inflated = zlib.decompressobj().decompress(payload[4:], _MAX_INDEX_BYTES)
    except zlib.error:
        return  # libav says what is wrong with it
    _walk(inflated, 0, len(inflated), claims, depth + 1)


def _is_encrypted(data: bytes, kind: bytes, begin: int, end: int) -> bool:
    """Whether samples of this kind are: Common Encryption (encv), FairPlay (drmi), or any other protection."""
    inside = (inner for inner, _, _ in _boxes(data, begin + _VISUAL_ENTRY_BYTES, end))
    return kind in (b"encv", b"drmi") or b"sinf" in inside


def encryption(data: bytes, claims: BoxClaims, container: str, stream_id: int, place: int, tag: bytes) -> str:
    """How the packets of a video stream are encrypted; empty if nothing says that they are.

    Args:
        container: libav's name.
        place: the stream's place among the video streams.
        tag: the codec's tag in the container.
    """
    if "mp4" in container and stream_id in claims.encrypted_ids:
        return "Common Encryption or another protection in its sample description"
    if "matroska" in container and place < len(tracks := _matroska_video_tracks(data)) and tracks[place]:
        return "ContentEncryption in its track"
    if container == "mpegts" and tag[:1] == b"\xdb":
        return "SAMPLE-AES, by its stream type"
    if container == "mpegts" and _is_scrambled(data, stream_id):
        return "scrambled transport packets"
    if container == "asf" and any(guid in data[:_ASF_HEADER_BYTES] for guid in _ASF_ENCRYPTION):
        return "a content encryption object in its header"
    return ""


def _elements(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(id, begin and end of the payload) of Matroska's elements in a stretch, as far as they make sense."""
    while begin + 2 <= end and data[begin]:
        size_at = begin + 9 - data[begin].bit_length()
        if size_at >= end or not data[size_at]:
            return
        first = size_at + 9 - data[size_at].bit_length()
        size = int.from_bytes(data[size_at:first]) & (1 << 7 * (first - size_at)) - 1
        is_open = size == (1 << 7 * (first - size_at)) - 1  # a live stream's
        stop = end if is_open else min(end, first + size)
        yield int.from_bytes(data[begin:size_at]), first, stop
        begin = stop


def _matroska_video_tracks(data: bytes) -> list[bool]:
    """For each video track in order: whether it is encrypted."""
    found = []
    tracks = _inside(data, 0, len(data), _MATROSKA_TRACKS)
    for _, begin, end in (entry for track in tracks for entry in _elements(data, *track) if entry[0] == 0xAE):
        types = list(_inside(data, begin, end, (0x83,)))
        if types and data[types[0][0] : types[0][1]][-1:] == b"\x01":
            found.append(any(True for _ in _inside(data, begin, end, _MATROSKA_ENCRYPTION)))
    return found


def _inside(data: bytes, begin: int, end: int, path: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The payloads of all elements at a path."""
    for number, first, stop in _elements(data, begin, end):
        if number == path[0]:
            if len(path) == 1:
                yield first, stop
            else:
                yield from _inside(data, first, stop, path[1:])


def _is_scrambled(data: bytes, pid: int) -> bool:
    """Whether most of a program's packets are: conditional access of broadcasters."""
    for size, sync in ((188, 0), (192, 4)):
        count = len(data) // size
        packets = np.frombuffer(data, np.uint8, count * size).reshape(count, size)[:, sync : sync + 4]
        if count and (packets[:, 0] == 0x47).mean() > 0.5:
            of_stream = packets[(packets[:, 1].astype(int) & 31) * 256 + packets[:, 2] == pid]
            return bool(len(of_stream)) and bool((of_stream[:, 3] & 0xC0 != 0).mean() > 0.5)
    return False


def empty_at_end(data: bytes, stream_index: int) -> int:
    """Empty chunks with which the index of an AVI ends: the last frame stays for so long."""
    place = data.rfind(b"idx1")
    if place < 0 or place + 8 > len(data):
        return 0
    size = min(struct.unpack_from("<I", data, place + 4)[0], len(data) - place - 8)
    entries = np.frombuffer(data, "<u4", size // 16 * 4, place + 8).reshape(-1, 4)
    prefix = int.from_bytes(b"%02d" % stream_index, "little")
    filled = np.flatnonzero(entries[entries[:, 0] & 0xFFFF == prefix, 3][::-1])
    return int(filled[0]) if len(filled) else 0


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
        raise MediaOverBudget(f"{seconds:,.1f} s are more than {said_limit('max_duration_s', config.max_duration_s)}")
    place = int(reach * count) - _REORDER
    if place <= config.max_frames:
        return
    key = entries.search_timestamp(entries[place].timestamp, backward=True, any_frame=False) if by_groups else 0
    if place - max(0, key) > config.max_frames:
        raise MediaOverBudget(
            f"{place - max(0, key):,} or more frames to decode are more than "
            f"{said_limit('max_frames', config.max_frames)}"
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
