"""Which packets must be decoded for the frames that are wanted: arithmetic on packet times and flags.

Packets come in decoding order, frames in the order they are shown; B-frames make the two differ. The easy mistake is
to start a group of pictures too late: frames shown before their group's key frame ("leading", in open groups) may
refer to the group before, so that one has to be decoded as well. Containers flag key frames, and not always truly, and
they do not say that a packet is half a frame: `PacketBits` reads that from the packets' first bits.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["MAX_REORDER", "FrameSink", "PacketBits", "PacketTable", "Reading", "Run"]

MAX_REORDER = 64
"""No codec holds back more frames than this (H.264 and HEVC: 16): packets farther out of order have wrong times."""


class FrameSink(Protocol):
    """Where a back end puts the wanted frames."""

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) to which a frame that is shown as width x height has to be scaled."""

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Take one scaled frame: red, green and blue, uint8 [height, width] each. May come twice; the last counts."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of reading the wanted frames."""

    frames_decoded: int
    """Frames that the decoder gave, wanted or not."""
    frames_corrupt: int
    """Distinct frames that the decoder refused or flagged as damaged, that were wanted and had to be replaced, or that
    come before the first key frame and so cannot be decoded."""


@dataclass(frozen=True, slots=True)
class Run:
    """Packets begin .. end - 1 go to the decoder one after the other; before and after, its memory is cleared."""

    begin: int
    end: int


class PacketTable:
    """The packets of one video stream, in decoding order, and the number of the frame that each one carries.

    `frame_of`, int64 [P]: place of the packet's frame in the order of showing; -1 where no frame comes out (hidden by
    an edit list, or before the first key frame; `num_headless` counts the latter). `timed`: times tell the frames
    apart; where they do not (AVI), frames can only be counted as they come out of the decoder.

    Args:
        second: bool [P], the packet holds the second field of the frame whose first is in the packet before it.
    """

    def __init__(
        self,
        pts: list[int | None],
        keyframe: np.ndarray,
        shown: np.ndarray,
        *,
        times_stored: bool,
        second: np.ndarray | None = None,
    ) -> None:
        self._second = np.zeros(len(pts), bool) if second is None else second
        if self.halved:
            pts = [pts[place - 1] if half else pts[place] for place, half in enumerate(self._second.tolist())]
            keyframe, shown = keyframe & ~self._second, shown & ~self._second
        keys = np.flatnonzero(keyframe)
        self._keys = keys if len(keys) else np.zeros(min(1, len(pts)), np.int64)
        self.shown = shown.copy()
        self.shown[: self._keys[0] if len(keys) else 0] = False
        self.num_headless = int(shown.sum() - self.shown.sum())
        times = np.array([-1 if value is None else value for value in pts], np.int64)
        places = np.flatnonzero(self.shown)
        order = places[np.argsort(times[places], kind="stable")]
        self.frame_of = np.full(len(pts), -1, np.int64)
        self.frame_of[order] = np.arange(len(order))
        halves = np.flatnonzero(self._second)
        self.frame_of[halves] = self.frame_of[halves - 1]
        self.timed = (
            times_stored
            and not any(value is None for value in pts)
            and bool((np.diff(times[order]) > 0).all())
            and bool((np.abs(self.frame_of[places] - np.arange(len(places))) <= MAX_REORDER).all())
        )
        self._times = times

    @property
    def num_frames(self) -> int:
        """Frames that the packets promise."""
        return int(self.shown.sum())

    @property
    def longest_step(self) -> int:
        """Most units of time between two frames that follow each other; 0 where times do not tell."""
        times = np.sort(self._times[self.shown])
        return int(np.diff(times).max()) if self.timed and len(times) > 1 else 0

    @property
    def halved(self) -> bool:
        """Whether frames are spread over two packets, a field in each."""
        return bool(self._second.any())

    def num_to_decode(self, runs: list[Run]) -> int:
        """Frames that the decoder has to decode for these stretches, hidden ones included."""
        return sum(run.end - run.begin - int(self._second[run.begin : run.end].sum()) for run in runs)

    @property
    def num_packets(self) -> int:
        """Packets, with those that show nothing."""
        return len(self.frame_of)

    @property
    def num_keyframes(self) -> int:
        """Packets at which decoding can begin; 1 where none is marked."""
        return len(self._keys)

    @property
    def key_frames(self) -> np.ndarray:
        """Numbers of the frames at which decoding can begin, int64, rising; without those that are not shown."""
        numbers = self.frame_of[self._keys]
        return np.sort(numbers[numbers >= 0])

    def index_of_time(self) -> dict[int, int]:
        """From a frame's time (pts) to its number; -1 for the times of frames that are not shown."""
        numbers = dict(zip(self._times.tolist(), self.frame_of.tolist(), strict=True))
        places = np.flatnonzero(self.shown)
        return numbers | dict(zip(self._times[places].tolist(), self.frame_of[places].tolist(), strict=True))

    def wanted_packets(self, wanted: np.ndarray) -> np.ndarray:
        """bool [P]: the packet carries one of the wanted frames."""
        return np.isin(self.frame_of, wanted)

    def runs_for(self, wanted: np.ndarray) -> list[Run]:
        """The fewest whole stretches of packets from which a codec with key frames decodes the wanted frames exactly.

        Each begins at a key frame and ends with the last wanted packet that needs it.
        """
        is_wanted = self.wanted_packets(wanted)
        bounds = [*self._keys.tolist(), self.num_packets]
        runs: list[Run] = []
        for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
            hits = np.flatnonzero(is_wanted[begin:end])
            if not len(hits):
                continue
            last = begin + int(hits[-1]) + 1
            leading = bool((self._times[begin + hits] < self._times[begin]).any())
            if leading and group > 0:
                begin = bounds[group - 1]
            if runs and begin < runs[-1].end:
                runs[-1] = Run(runs[-1].begin, last)
            else:
                runs.append(Run(begin, last))
        return runs

    def runs_in_order(self, wanted: np.ndarray) -> list[Run]:
        """One stretch from the first packet to the last that carries a wanted frame."""
        hits = np.flatnonzero(self.wanted_packets(wanted))
        return [Run(0, int(hits[-1]) + 1)] if len(hits) else []


_AV1_SEQUENCE, _AV1_HEADER, _AV1_FRAME = 1, 3, 6  # OBU types
_START = b"\x00\x00\x01"
_H264_SLICES, _H264_SPS, _H264_PPS = (1, 5), 7, 8
_HIGH_PROFILES = frozenset((44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244))
_SLICE_HEAD, _SET_HEAD = 32, 512  # bytes in which a slice says which picture it is of, and a set what is read of it


class PacketBits:
    """What packets say themselves, told in decoding order: is it a key frame, is it shown, is it a second field.

    Bits that make no sense say nothing: then the container's flags hold, and the decoder tells what is wrong.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec = codec
        self._length_bytes = (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0
        self._sps: dict[int, tuple[bool, bool, int]] = {}  # by id: may code fields, planes are apart, bits of frame_num
        self._sps_of: dict[int, int] = {}  # by the id of a PPS
        self._may_code_fields = False
        self._open: tuple[int, int] | None = None  # frame number and parity of a field that lacks its other
        if codec == "h264":
            for nal in _avcc_sets(extradata) if self._length_bytes else self._nals(memoryview(extradata)):
                self._read_set(nal)

    def begins(self, packet: memoryview) -> bool:
        """Whether a packet that is flagged as a key frame is one: all that follow do without what came before it."""
        if not len(packet):
            return False
        if self._codec == "vp8":
            return not packet[0] & 1
        if self._codec == "vp9":
            bits = packet[0] << 1 & 0xFF if packet[0] & 0x30 == 0x30 else packet[0]  # profile 3 has one bit more
            return packet[0] >> 6 == 2 and not bits & 0x0C
        if self._codec == "av1":
            return _av1_begins(packet)
        if self._codec in ("mpeg1video", "mpeg2video"):
            return bytes(packet[:4]) == _START + b"\xb3"
        if self._codec == "mpeg4":
            data = bytes(packet)
            picture = data.find(_START + b"\xb6") + 4
            return 4 <= picture < len(data) and data[picture] < 64
        return True

    def shows(self, packet: memoryview) -> bool:
        """Whether a frame comes out: VP8 has hidden ones in packets of their own, which one bit tells."""
        return self._codec != "vp8" or bool(packet[0] & 0x10)

    def is_second(self, packet: memoryview, is_key: bool) -> bool:
        """Whether it holds but the second field of the frame whose first is in the packet before it (H.264, MPEG-2).

        As libav's decoders have it: of the other parity, with the same number. Cheap where no fields may be coded.
        """
        if self._codec == "mpeg2video":
            pictures = _mpeg2_pictures(bytes(packet))
        elif self._codec == "h264" and (self._may_code_fields or is_key):
            pictures = self._pictures(packet)
        else:
            return False
        before, self._open = self._open, None
        if len(pictures) != 1 or pictures[0][1] == _WHOLE:
            return False
        number, parity = pictures[0]
        if before == (number, 1 - parity):
            return True
        self._open = pictures[0]
        return False

    def _pictures(self, packet: memoryview) -> list[tuple[int, int]]:
        """(number, parity) of the pictures of an H.264 packet, as far as they tell fields apart."""
        pictures: list[tuple[int, int]] = []
        try:
            for nal in self._nals(packet):
                if nal[0] & 31 not in _H264_SLICES:
                    self._read_set(nal)
                elif not self._may_code_fields:
                    return []
                elif (picture := self._field(nal)) not in pictures:
                    pictures.append(picture)
        except (IndexError, KeyError, ValueError):
            return []
        return pictures

    def _nals(self, data: memoryview) -> Iterator[bytes]:
        """The first bytes of each NAL unit, those that hold settings whole; without emulation prevention."""
        for begin, end in self._units(data):
            kind = data[begin] & 31
            end = min(end, begin + (_SLICE_HEAD if kind in _H264_SLICES else _SET_HEAD))
            if kind in _H264_SLICES or kind in (_H264_SPS, _H264_PPS):
                yield bytes(data[begin:end]).replace(b"\x00\x00\x03", b"\x00\x00")

    def _units(self, data: memoryview) -> Iterator[tuple[int, int]]:
        place = 0
        if self._length_bytes:
            while place + self._length_bytes < len(data):
                begin = place + self._length_bytes
                place = begin + int.from_bytes(data[place:begin])
                if place > begin:
                    yield begin, min(place, len(data))
            return
        whole = bytes(data)
        place = whole.find(_START)
        while 0 <= place < len(whole) - 3:
            following = whole.find(_START, place + 3)
            yield place + 3, following if following >= 0 else len(whole)
            place = following

    def _read_set(self, nal: bytes) -> None:
        bits = _Bits(nal[1:])
        try:
            if nal[0] & 31 == _H264_SPS:
                number, settings = _sps_settings(bits)
                self._sps[number] = settings
                self._may_code_fields = any(fields for fields, _, _ in self._sps.values())
            elif nal[0] & 31 == _H264_PPS:
                number = bits.golomb()
                self._sps_of[number] = bits.golomb()
        except ValueError:
            return  # what is damaged there, the decoder finds out

    def _field(self, nal: bytes) -> tuple[int, int]:
        """Frame number of a slice's picture, and 0 for a top field, 1 for a bottom field, or _WHOLE."""
        bits = _Bits(nal[1:])
        bits.golomb()
        bits.golomb()
        may_code_fields, planes, length = self._sps[self._sps_of[bits.golomb()]]
        bits.take(2 if planes else 0)
        number = bits.take(length)
        if may_code_fields and bits.take(1):
            return number, bits.take(1)
        return number, _WHOLE


_WHOLE = 2


class _Bits:
    """Bits from the left, as H.264 writes its numbers. Raises ValueError at their end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ValueError("no bits are left")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        if zeros > 32:
            raise ValueError("a number of more than 32 bits")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        code = self.golomb()
        return (code + 1) // 2 if code & 1 else -(code // 2)


def _sps_settings(bits: _Bits) -> tuple[int, tuple[bool, bool, int]]:
    """(id, (may code fields, planes are apart, bits of frame_num)) of a sequence parameter set (7.3.2.1.1)."""
    profile = bits.take(24) >> 16
    number, chroma, planes = bits.golomb(), 1, 0
    if profile in _HIGH_PROFILES:
        chroma = bits.golomb()
        planes = bits.take(1) if chroma == 3 else 0
        bits.golomb()
        bits.golomb()
        bits.take(1)
        if bits.take(1):
            for place in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling(bits, 16 if place < 6 else 64)
    length = bits.golomb() + 4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.golomb()):
            bits.signed()
    bits.golomb()
    bits.take(1)
    bits.golomb()
    bits.golomb()
    return number, (not bits.take(1), bool(planes), length)


def _skip_scaling(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _avcc_sets(extradata: bytes) -> Iterator[bytes]:
    """The parameter sets of an MP4's avcC box."""
    place = 5
    for mask in (31, 255):
        count = extradata[place] & mask if place < len(extradata) else 0
        place += 1
        for _ in range(count):
            size = int.from_bytes(extradata[place : place + 2])
            nal = extradata[place + 2 : place + 2 + min(size, _SET_HEAD)]
            place += 2 + size
            if nal:
                yield nal.replace(b"\x00\x00\x03", b"\x00\x00")


def _mpeg2_pictures(packet: bytes) -> list[tuple[int, int]]:
    """(number, parity) of the pictures of an MPEG-2 packet: temporal_reference and picture_structure."""
    pictures = []
    place = packet.find(_START + b"\0")
    while place >= 0:
        coding = packet.find(_START + b"\xb5", place)
        if coding < 0 or coding + 6 >= len(packet):
            break
        number = int.from_bytes(packet[place + 4 : place + 6]) >> 6
        pictures.append((number, {1: 0, 2: 1}.get(packet[coding + 6] & 3, _WHOLE)))
        place = packet.find(_START + b"\0", coding)
    return pictures


def _av1_begins(packet: memoryview) -> bool:
    """Whether a sequence header comes first, then a key frame that is shown at once (a random access point)."""
    place, has_sequence, is_still = 0, False, False
    while place < len(packet):
        kind = packet[place] >> 3 & 15
        has_size = bool(packet[place] & 2)
        place += 2 if packet[place] & 4 else 1
        size, shift = (0, 0) if has_size else (len(packet) - place, 0)
        while has_size and place < len(packet) and shift < 56:
            byte = packet[place]
            size |= (byte & 127) << shift
            place, shift = place + 1, shift + 7
            if not byte & 128:
                break
        if place >= len(packet):
            return False
        if kind == _AV1_SEQUENCE:
            has_sequence, is_still = True, bool(packet[place] & 8)
        elif kind in (_AV1_HEADER, _AV1_FRAME):
            return has_sequence and (is_still or packet[place] >> 4 == 1)  # not one of before; key frame; shown
        place += size
    return False
