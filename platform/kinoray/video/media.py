"""A video file in memory: opened, its stream chosen, its packets listed and checked against the limits.

Whatever goes wrong inside libav becomes one of our MediaErrors, named by the stage in which it happened; libav's own
error types stay in here, and its log is off. Only the given bytes are ever read: formats that refer to other files
are not on the list, no protocol is allowed, and opening a second file is refused.
"""

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NoReturn, Self

import av
import numpy as np

from kinoray.config.clip import said_limit
from kinoray.config.shared import DecodeConfig
from kinoray.errors import (
    EmptyMedia,
    MediaError,
    MediaOverBudget,
    NoVideoStream,
    UndecodableVideo,
    UnreadableContainer,
)
from kinoray.video.budget import MAX_STREAMS, check_boxes, check_index, empty_at_end, encryption
from kinoray.video.info import MAX_COUNT, FrameClock, jumps_closed
from kinoray.video.plan import PacketBits, PacketTable, Run

__all__ = ["LIBAV_ERRORS", "Media", "check_size_bytes", "media_stage"]

_FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg"),
    *("gif", "apng", "dv", "mxf", "ivf", "nut"),
)
"""Containers that hold everything themselves. No playlists, concat lists, image sequences or network protocols."""
_RAW_FORMATS = ("h264", "hevc", "mpegvideo")
"""Streams without a container, for files that begin with a start code: libav finds them in much that is damaged."""
_TIMED_FORMATS = ("mov", "mp4", "matroska", "webm", "mpegts", "mpeg", "flv", "ogg", "gif", "apng", "dv", "ivf", "nut")
"""Containers that store when a frame is shown. AVI and ASF do not: the times that libav makes up there are wrong."""
_GROUP_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4"))
"""Codecs whose key frames forget all that came before; of others (WMV, H.263) the decoder keeps more than pictures."""
_REMEDIES = {
    b"RIFF....WEBP": "WebP, whose animations libav does not decode; make a GIF or an MP4 of it (magick a.webp a.gif)",
    rb"\.RMF": "RealMedia, which is not decoded here; make an MP4 of it (ffmpeg -i a.rm a.mp4)",
    b"YUV4MPEG2": "YUV4MPEG, which is not decoded here; make an MP4 of it (ffmpeg -i a.y4m -qp 0 a.mp4)",
}
"""Of what people take for videos, by how it begins: what it is, and what to do."""
_MAX_DEMUX_ERRORS = 64
"""Damaged places in the container after which the rest is given up."""
_MAX_SCALED_PIXELS = 2**25
"""Scaling the short side of a 16 x 1,000,000 frame to 256 would take 12 GB."""
_MAX_EXPANSION = 4
"""Packets may be compressed in the container, or share their bytes: times the size of the file that all may take."""
_KEEP_BYTES = 64 * 2**20
"""Packets of larger files are not kept beside the file itself, but read again when they are decoded."""

LIBAV_ERRORS = (av.FFmpegError, OSError, ValueError, LookupError, MemoryError, ArithmeticError, RuntimeError)
"""What PyAV is known to raise on damaged input: its own tree, and bare Python errors from its wrappers."""


@contextmanager
def media_stage(error: type[MediaError], what: str) -> Iterator[None]:
    """Turn anything that libav raises inside into `error`, on one line: what was done, and libav's reason."""
    try:
        yield
    except LIBAV_ERRORS as cause:
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise error(f"{what}: {' '.join(str(reason).split())}") from cause


def check_size_bytes(size_bytes: int, config: DecodeConfig) -> None:
    """Refuse a file for its size alone.

    Raises:
        EmptyMedia: it has no bytes.
        MediaOverBudget: it has more than decode.max_bytes.
    """
    if not size_bytes:
        raise EmptyMedia("the file has 0 bytes; fetch it again or drop it from the list")
    if size_bytes > config.max_bytes:
        raise MediaOverBudget(f"{size_bytes:,} bytes are more than {said_limit('max_bytes', config.max_bytes)}")


def _refuse_io(*_: Any) -> NoReturn:
    raise PermissionError("a media file may not open another file")


class Media:
    """One video file. Use it in a `with` block.

    Args:
        reach: share of the frames that will be passed for certain before the last one that is wanted.

    Raises (when made):
        EmptyMedia, UnreadableContainer, NoVideoStream, UndecodableVideo (no decoder, no packets), MediaOverBudget.
    """

    table: PacketTable
    """The packets, and which frame each one carries."""
    _clock: FrameClock
    _offsets: np.ndarray | None = None  # int64 [P]: closes the jumps of the packets' clock

    def __init__(self, data: bytes, config: DecodeConfig, reach: float = 0.0) -> None:
        check_size_bytes(len(data), config)
        self._boxes = check_boxes(data)
        self._data, self._config = data, config
        self._num_dropped = 0  # empty samples: the frame before stays
        self._container = self._open()
        try:
            self._stream = self._choose_stream()
            self._check_encryption()
            check_index(self._stream, len(data), config, by_groups=self.decodes_by_groups(), reach=reach)
            with media_stage(UnreadableContainer, "the container's packets cannot be read"):
                self._packets: list[Any] | None = self._list_packets()
            self._check_duration()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what libav holds."""
        self._container.close()

    def _open(self) -> Any:
        size = f"{len(self._data):,} bytes"
        formats = _FORMATS + (_RAW_FORMATS if re.match(b"\0\0\0?\1", self._data) else ())
        for begins, text in _REMEDIES.items():
            if re.match(begins, self._data, re.DOTALL):
                raise UnreadableContainer(f"{size} of {text}")
        with media_stage(UnreadableContainer, f"{size} are no video file of a known format, or its index is lost"):
            return av.open(
                io.BytesIO(self._data),
                options=self._codec_options(),  # libav decodes a first frame by itself
                container_options={
                    "format_whitelist": ",".join(formats),
                    "protocol_whitelist": "none",
                    "max_streams": str(MAX_STREAMS),
                },
                metadata_errors="replace",
                io_open=_refuse_io,
                buffer_size=2**18,
            )

    def _choose_stream(self) -> Any:
        """The video stream that players show: no cover or thumbnails, not a still beside one that moves, the default.

        Where that leaves several, it is libav's own rule (frames, bit rate).
        """
        kind = av.stream.Disposition
        streams = [stream for stream in self._container.streams.video if not stream.disposition & kind.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams})) or "no stream at all"
            raise NoVideoStream(f"no video stream: the file holds {kinds}")
        decodable = [stream for stream in streams if stream.codec_context is not None]
        if not decodable:
            raise UndecodableVideo("no decoder for the video stream's codec")
        best = decodable[0] if len(decodable) == 1 else self._shown_stream(decodable)
        context = best.codec_context
        self.check_size(context.width, context.height)
        context.thread_count, context.thread_type = 1, "NONE"
        context.options = self._codec_options()
        return best

    def _shown_stream(self, streams: list[Any]) -> Any:
        """Of several; another look at the file counts their packets, since what was read cannot be unread."""
        counts = {stream.index: 0 for stream in streams}
        with self._open() as container:
            for packet in _packets(container, list(counts)):
                counts[packet.stream_index] += packet.size > 0
                if min(counts.values()) > 1:
                    break
        kind = av.stream.Disposition

        def rank(stream: Any) -> tuple[int, bool]:
            is_still = counts[stream.index] == 1 or stream.disposition & (kind.still_image | kind.timed_thumbnails)
            return (0 if not counts[stream.index] else 1 if is_still else 2), bool(stream.disposition & kind.default)

        first = [stream for stream in streams if rank(stream) == max(map(rank, streams))]
        libavs = self._container.streams.best("video")
        return next((stream for stream in first if stream.index == libavs.index), first[0])

    def _check_encryption(self) -> None:
        try:
            tag = self.context.codec_tag.encode("latin-1")
        except UnicodeDecodeError as error:  # PyAV takes tags for ASCII
            tag = error.object
        place = [stream.index for stream in self._container.streams.video].index(self.stream_index)
        how = encryption(self._data, self._boxes, self._container.format.name, self._stream.id, place, tag)
        if how:
            raise UndecodableVideo(f"the video is encrypted ({how}), and kinoray has no keys; decrypt it first")

    def check_size(self, width: int, height: int) -> None:
        """Refuse a frame that is too large.

        Raises:
            MediaOverBudget: it has more pixels than decode.max_pixels.
        """
        if width * height > self._config.max_pixels:
            raise MediaOverBudget(
                f"{width} x {height} = {width * height:,} pixels are more than "
                f"{said_limit('max_pixels', self._config.max_pixels)}"
            )

    def check_scaled_size(self, width: int, height: int) -> None:
        """Refuse to enlarge a very thin frame into a very large one.

        Raises:
            MediaOverBudget: scaled to width x height it would have more than 2^25 pixels.
        """
        if width * height > _MAX_SCALED_PIXELS:
            raise MediaOverBudget(
                f"a frame of this shape, scaled to {width} x {height}, has {width * height:,} pixels, more than "
                f"{_MAX_SCALED_PIXELS:,}; view.resize=stretch keeps it small"
            )

    def _codec_options(self) -> dict[str, str]:
        """Frames may be larger than the header says: libav itself refuses what is clearly over the limit.

        Not exactly at the limit, since it counts rows rounded up to 64 pixels.
        """
        return {"max_pixels": str(self._config.max_pixels * 5 // 4 + 2**16)}

    def _demux(self, container: Any) -> Iterator[Any]:
        """The stream's packets. Reading goes on after a damaged place; one that is cut short at the end is left out."""
        held = None
        for packet in _packets(container, [self.stream_index]):
            if not packet.size:  # repeats the last frame, or marks the end
                self._num_dropped += container is self._container and packet.dts is not None
                continue
            if held is not None:
                yield held
            held = packet
        if held is not None and not held.is_corrupt:
            yield held

    def _list_packets(self) -> list[Any] | None:
        """Fill the table; returns the packets themselves where they are small enough to keep."""
        kept: list[Any] | None = [] if len(self._data) <= _KEEP_BYTES else None
        pts, dts, durations, keyframe, shown, second = [], [], [], [], [], []
        bits = PacketBits(self.codec, self.context.extradata or b"")
        size_bytes = 0
        has_key = False
        for packet in self._demux(self._container):
            size_bytes += packet.size
            self._check_expansion(size_bytes)
            pts.append(packet.pts)
            dts.append(packet.dts)
            durations.append(packet.duration)
            content = memoryview(packet)
            # the first one stays: its settings may lie in the header alone, which a decoder forgets when it is flushed
            keyframe.append(packet.is_keyframe and (not has_key or bits.begins(content)))
            has_key |= keyframe[-1]
            second.append(bits.is_second(content, packet.is_keyframe))
            shown.append(not packet.is_discard and bits.shows(content))
            if kept is not None:
                kept.append(packet)
        if not pts:
            raise UndecodableVideo("the container opens, but holds no packet of the video stream")
        timed = any(name in _TIMED_FORMATS for name in self._container.format.name.split(","))
        if timed:
            ahead = bool(self._container.format.flags & av.format.Flags.ts_discont.value)
            self._offsets = jumps_closed(pts, dts, durations, keyframe, self._stream.time_base, ahead=ahead)
        if self._offsets is not None:
            by = self._offsets.tolist()
            pts, dts = (
                [None if at is None else at + more for at, more in zip(clock, by, strict=True)] for clock in (pts, dts)
            )
        for place, packet in enumerate(kept or []):
            self._close_jump(place, packet)
        in_order = timed or (self.container == "avi" and self.context.codec.intra_only)  # places in decoding order
        self.table = PacketTable(
            pts, np.array(keyframe), np.array(shown), times_stored=in_order, second=np.array(second)
        )
        if not self.table.num_frames:
            raise UndecodableVideo(f"none of the {len(pts)} video packets carries a frame that is to be shown")
        if self.container == "avi" and None not in dts:  # libav counts chunks there, and passes over empty ones
            num_chunks = max(dts) - min(dts) + 1 + empty_at_end(self._data, self.stream_index)
            if not self._stream.frames or num_chunks <= self._stream.frames + 1:
                self._num_dropped = max(self._num_dropped, num_chunks - len(dts))
        for place in np.flatnonzero(second).tolist():  # a frame is over with its second field
            own, other = pts[place - 1], pts[place]
            if own is not None and other is not None:
                durations[place - 1] = max(durations[place - 1] or 0, other - own + (durations[place] or 0))
        self._clock = FrameClock(
            pts if timed else dts,  # decoding times count the empty chunks of an AVI, which repeat a frame
            durations if timed else [None] * len(dts),  # and durations do not
            shown,
            self.table,
            unit=self._stream.time_base,
            rate=float(self.average_rate or 0),
            num_dropped=self._num_dropped,
            times_stored=timed,
        )
        return kept

    def _close_jump(self, place: int, packet: Any) -> None:
        """Bring a packet's times to the clock of the table: what comes out of the decoder is found by them."""
        if self._offsets is None:
            return
        offset = int(self._offsets[place])
        packet.pts = None if packet.pts is None else packet.pts + offset
        packet.dts = None if packet.dts is None else packet.dts + offset

    def _check_expansion(self, size_bytes: int) -> None:
        limit = _MAX_EXPANSION * len(self._data) + 2**20
        if size_bytes > limit:
            raise MediaOverBudget(
                f"the packets of a file of {len(self._data):,} bytes take more than {limit:,}: they are compressed in "
                "the container, or share their bytes"
            )

    def _check_duration(self) -> None:
        if self.duration_s > self._config.max_duration_s:
            raise MediaOverBudget(
                f"{self.duration_s:,.1f} s are more than {said_limit('max_duration_s', self._config.max_duration_s)}"
            )

    @property
    def duration_s(self) -> float:
        """From the first frame's start to the last frame's end by the packets; by the frame rate where they lie."""
        return self._clock.duration_s

    @property
    def frame_times(self) -> np.ndarray | None:
        """As FrameClock has them."""
        return self._clock.frame_times

    @property
    def stream_index(self) -> int:
        """Number of the chosen stream in the container."""
        return int(self._stream.index)

    @property
    def is_only_stream(self) -> bool:
        """Whether there are no other pictures in the container, not even a cover."""
        return len(self._container.streams.video) == 1

    @property
    def context(self) -> Any:
        """libav's decoder for the stream."""
        return self._stream.codec_context

    @property
    def codec(self) -> str:
        """Name of the codec: h264, hevc, vp9, ..."""
        return str(self.context.codec.canonical_name)

    @property
    def container(self) -> str:
        """The kind of file, as libav calls it: mov/mp4, matroska/webm, mpegts, ..."""
        return "/".join(str(self._container.format.name).split(",")[:2])

    @property
    def average_rate(self) -> Fraction | None:
        """Frames a second, as the container has it, or the codec of a raw stream, for which libav would say 25."""
        raw = self._container.format.name in _RAW_FORMATS
        rate: Fraction | None = self._stream.guessed_rate if raw else self._stream.average_rate
        return rate

    @property
    def claimed_frames(self) -> int | None:
        """Frames that the header promises, without those that an edit list hides; None where it makes no promise.

        It is compared with what is there, and never used for anything else; it may be a lie, and is cut to MAX_COUNT.
        MP4, MOV and AVI store a count; libav's index lacks what an edit list leaves out of it. Matroska stores the
        track's end (or length, by some writers): it promises frames only where they end earlier than both, by more
        than the longest frame; frames lost from its middle are not noticed. MPEG-TS stores nothing, and nor does the
        index at the front of an MP4 in fragments.
        """
        if self._boxes.is_fragmented:
            return None
        unseen = self.table.num_packets - self.table.num_frames
        is_trimmed = self.container == "mov/mp4" and self._stream.id in self._boxes.trimmed_ids
        listed = len(self._stream.index_entries) if is_trimmed else 0
        if listed or self._stream.frames:
            return min(max(0, (listed or int(self._stream.frames)) - unseen - self._num_dropped), MAX_COUNT)
        claimed_s = _seconds(self._stream.metadata.get("DURATION", ""))
        first, end = (float(time * self._stream.time_base) for time in self._clock.span)
        if claimed_s is None or end <= first:
            return None
        missing_s = claimed_s - max(end, end - first)
        if missing_s <= float(self.table.longest_step * self._stream.time_base):
            return self.table.num_frames
        return round(min(self.table.num_frames * (1 + missing_s / (end - first)), MAX_COUNT))

    def packets(self, runs: Iterable[Run]) -> Iterator[Iterator[tuple[int, Any]]]:
        """For each run (they rise, and are consumed in turn): (place, packet) of its places in the table."""
        if self._packets is not None:
            for run in runs:
                yield enumerate(self._packets[run.begin : run.end], run.begin)
            return
        with self._open() as container:
            every = enumerate(self._demux(container))  # once for all runs: there may be one for each key frame
            for run in runs:
                yield self._read_again(every, run)

    def _read_again(self, every: Iterator[tuple[int, Any]], run: Run) -> Iterator[tuple[int, Any]]:
        for place, packet in every:
            if place >= run.begin:
                self._close_jump(place, packet)
                yield place, packet
            if place + 1 >= run.end:
                return

    def decodes_by_groups(self) -> bool:
        """Whether decoding may begin at any key frame with the certainty that frames come out exactly."""
        return self.codec in _GROUP_CODECS or self.context.codec.intra_only

    def leaves_out_exactly(self) -> bool:
        """Whether frames that nobody refers to can be left out, packet by packet, and all others stay exact.

        H.264 and HEVC only: dav1d and vp9 lose wanted frames then. Not HEVC with temporal layers, where libav takes
        frames that only a higher layer refers to for frames that nobody refers to.
        """
        return self.codec == "h264" or (self.codec == "hevc" and _hevc_layers(self.context.extradata or b"") == 1)


def _packets(container: Any, indices: list[int]) -> Iterator[Any]:
    """The packets of these streams; reading goes on after a damaged place."""
    for stream in container.streams:
        if stream.index not in indices:
            stream.discard = av.stream.Discard.all
    errors = 0
    while errors <= _MAX_DEMUX_ERRORS:
        try:
            yield from container.demux([container.streams[index] for index in indices])
            return
        except MemoryError as cause:
            raise MediaOverBudget("the container's packets take more memory than there is") from cause
        except LIBAV_ERRORS:
            errors += 1


def _hevc_layers(extradata: bytes) -> int:
    """Number of temporal layers that an HEVC header announces: hvcC (MP4, Matroska) or VPS (MPEG-TS); 0 if unknown."""
    if len(extradata) > 22 and extradata[0] == 1:
        return extradata[21] >> 3 & 7
    vps = extradata.find(b"\x00\x00\x01\x40\x01")
    return (extradata[vps + 6] >> 1 & 7) + 1 if 0 <= vps < len(extradata) - 6 else 0


def _seconds(text: str) -> float | None:
    """`00:01:02.500000000` -> 62.5; None for anything else."""
    match = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d{1,9})?)", text)
    return 3600.0 * int(match[1]) + 60.0 * int(match[2]) + float(match[3]) if match else None
