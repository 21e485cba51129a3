"""Reading wanted frames with PyAV: demux once, decode what the plan asks for, scale straight from YUV to planar RGB.

Whatever goes wrong inside libav becomes one of our MediaErrors, named by the stage in which it happened; libav's own
error types, and its log, stay in here. Only the given bytes are ever read: formats that refer to other files are not
on the list, no protocol is allowed, and opening a second file is refused.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn, Self

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kinoray.config import DecodeConfig
from kinoray.decode_plan import FrameSink, PacketTable, Reading, Run
from kinoray.errors import (
    EmptyMedia,
    MediaError,
    MediaOverBudget,
    NoVideoStream,
    UndecodableVideo,
    UnreadableContainer,
)

__all__ = ["PyavVideo"]

FORMATS = ("mov", "mp4", "m4a", "3gp", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg")
"""Containers that hold everything themselves. No playlists, concat lists, image sequences or network protocols."""
TIMED_FORMATS = ("mov", "mp4", "matroska", "webm", "mpegts", "mpeg", "flv", "ogg")
"""Containers that store when a frame is shown. AVI and ASF do not: the times that libav makes up there are wrong."""
SKIPPABLE = ("h264", "hevc")
"""Codecs whose decoder can be told packet by packet to leave frames out. dav1d and vp9 lose wanted frames then."""
MAX_DEMUX_ERRORS = 64
"""Damaged places in the container after which the rest is given up."""

# Everything that PyAV is known to raise on damaged input: its own tree, and bare Python errors from its wrappers.
LIBAV_ERRORS = (av.FFmpegError, OSError, ValueError, LookupError, MemoryError, ArithmeticError, RuntimeError)


@contextmanager
def _stage(error: type[MediaError], what: str) -> Iterator[None]:
    """Turn anything that libav raises into our error, on one line."""
    try:
        yield
    except LIBAV_ERRORS as cause:
        raise error(f"{what}: {_reason(cause)}") from cause


def _reason(cause: BaseException) -> str:
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(str(text).split())


def _refuse_io(*_: Any) -> NoReturn:
    raise PermissionError("a media file may not open another file")


class _TimesLie(Exception):
    """Frames come out with times that no packet has, or in another order: only counting can tell them apart."""


@dataclass(slots=True)
class _Tally:
    """What one pass over the packets saw."""

    decoded: int = 0
    corrupt: set[int] = field(default_factory=set)
    refused: list[int] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)


class PyavVideo:
    """One video in memory: its packets, what they tell about it, and its frames. Use it in a `with` block.

    Raises (when made):
        EmptyMedia, UnreadableContainer, NoVideoStream, UndecodableVideo (no decoder, no packets), MediaOverBudget.
    """

    def __init__(self, data: bytes, config: DecodeConfig) -> None:
        if not data:
            raise EmptyMedia("the file has 0 bytes; fetch it again or drop it from the list")
        if len(data) > config.max_bytes:
            raise MediaOverBudget(f"{len(data):,} bytes are more than decode.max_bytes = {config.max_bytes:,}")
        self._config = config
        self._scaler = VideoReformatter()
        with _stage(UnreadableContainer, f"{len(data):,} bytes are no readable video file (damaged, or index lost)"):
            self._container = av.open(
                io.BytesIO(data),
                container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"},
                metadata_errors="replace",
                io_open=_refuse_io,
                buffer_size=2**18,
            )
        try:
            self._stream = self._choose_stream()
            self._check_pixels(self.coded_size)
            self._packets = self._demux()
            self.table = self._tabulate()
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

    def _choose_stream(self) -> Any:
        """The video stream with the most pixels that is not a cover picture."""
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            raise NoVideoStream(f"no video stream: the file holds {kinds}")
        decodable = [stream for stream in streams if stream.codec_context is not None]
        if not decodable:
            raise UndecodableVideo("no decoder is available for the video stream's codec")
        best = max(decodable, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
        for stream in self._container.streams:
            if stream.index != best.index:
                stream.discard = av.stream.Discard.all
        context = best.codec_context
        context.thread_count, context.thread_type = 1, "NONE"
        context.options = {"max_pixels": str(self._config.max_pixels)}  # frames may grow after the header
        return best

    def _check_pixels(self, size: tuple[int, int]) -> None:
        if size[0] * size[1] > self._config.max_pixels:
            raise MediaOverBudget(
                f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels are more than decode.max_pixels = "
                f"{self._config.max_pixels:,}"
            )

    def _demux(self) -> list[Any]:
        """All packets of the stream. After a damaged place it goes on reading; a packet that is cut short is left."""
        packets: list[Any] = []
        errors = 0
        while errors <= MAX_DEMUX_ERRORS:
            try:
                for packet in self._container.demux(self._stream):
                    packets.append(packet)  # noqa: PERF402  # one by one: those before an error must stay
                break
            except LIBAV_ERRORS:
                errors += 1
        packets = [packet for packet in packets if packet.size]  # empty ones repeat the last frame, or flush
        if packets and packets[-1].is_corrupt:
            packets.pop()
        if not packets:
            raise UndecodableVideo("the container opens, but holds no packet of the video stream")
        return packets

    def _tabulate(self) -> PacketTable:
        shown = np.array([not packet.is_discard for packet in self._packets])
        if self.codec == "vp8":  # its hidden reference frames are packets of their own; bit 4 says "show"
            shown &= np.array([bool(bytes(packet)[0] & 0x10) for packet in self._packets])
        names = self._container.format.name.split(",")
        return PacketTable(
            [packet.pts for packet in self._packets],
            np.array([packet.is_keyframe for packet in self._packets]),
            shown,
            times_stored=any(name in TIMED_FORMATS for name in names),
        )

    def _check_duration(self) -> None:
        if self.duration_s > self._config.max_duration_s:
            raise MediaOverBudget(
                f"{self.duration_s:.1f} s are more than decode.max_duration_s = {self._config.max_duration_s:g}"
            )

    @property
    def codec(self) -> str:
        """Name of the codec: h264, hevc, vp9, ..."""
        return str(self._stream.codec_context.codec.canonical_name)

    @property
    def coded_size(self) -> tuple[int, int]:
        """(width, height) as stored, before rotation."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as displayed."""
        width, height = self.coded_size
        return (height, width) if self.rotation % 180 else (width, height)

    @property
    def duration_s(self) -> float:
        """From the first frame's start to the last frame's end, by the packets; by the frame rate where they lie."""
        rate = float(self._stream.average_rate or 0)
        if not self.table.timed:
            return self.table.num_frames / rate if rate else 0.0
        first = min(self._packets, key=lambda packet: packet.pts)
        last = max(self._packets, key=lambda packet: packet.pts)
        base = float(self._stream.time_base)
        last_frame_s = last.duration * base if last.duration else (1 / rate if rate else 0.0)
        return float((last.pts - first.pts) * base + last_frame_s)

    @cached_property
    def rotation(self) -> int:
        """Degrees counterclockwise by which the stored picture is turned for display: 0, 90, 180 or 270.

        Known from the first frame that can be decoded.

        Raises:
            UndecodableVideo: there is none.
        """
        tally = _Tally()
        for frame in self._frames(self.table.runs_in_order(np.arange(self.table.num_frames)), None, tally):
            return 90 * _quarter_turns(frame)
        raise UndecodableVideo(self._no_frame(tally))

    def _no_frame(self, tally: _Tally) -> str:
        return (
            f"the container opens, but no frame comes out of {self.table.num_packets} {self.codec} packets "
            f"({len(tally.refused)} refused by the decoder)"
        )

    def read(self, wanted: np.ndarray, sink: FrameSink) -> Reading:
        """Put the frames with these numbers (int64, sorted, each once) into the sink, each exactly once or replaced.

        Frames are those of a plain decode of the whole file, bit for bit. A wanted frame that does not come out is
        replaced by the nearest earlier frame that did (a later one, if there is none), and counted as corrupt.

        Raises:
            UndecodableVideo: no frame at all comes out, or it cannot be converted to RGB.
            MediaOverBudget: more packets than decode.max_frames would have to be decoded.
        """
        if self.table.timed:
            try:
                return self._read_by_time(wanted, sink)
            except _TimesLie:
                pass
        return self._read_by_count(wanted, sink)

    def _read_by_time(self, wanted: np.ndarray, sink: FrameSink) -> Reading:
        whole = self.table.runs_in_order(wanted)
        runs = self.table.runs_for(wanted) if self.codec in SKIPPABLE else whole
        keep_all = None if self.codec not in SKIPPABLE else self.table.wanted_packets(wanted)
        first = _Tally()
        self._collect(runs, keep_all, wanted, sink, first, {})
        missing = set(wanted.tolist()) - first.kept
        if not missing and not first.corrupt and not first.refused:
            return Reading(self.table.num_frames, first.decoded, 0)
        # Damage, or flags that promise more than they keep: decode everything, and hold what stands in for the missing.
        second = _Tally()
        stand_ins: dict[int, Any] = dict.fromkeys(missing)
        self._collect(whole, None, wanted, sink, second, stand_ins)
        missing -= second.kept
        for index in missing:
            if stand_ins[index] is None:
                raise UndecodableVideo(self._no_frame(second))
            self._put(index, stand_ins[index], sink)
        corrupt = second.corrupt | missing | {int(self.table.frame_of[place]) for place in second.refused}
        return Reading(self.table.num_frames, first.decoded + second.decoded, len(corrupt - {-1}))

    def _collect(
        self,
        runs: list[Run],
        full: np.ndarray | None,
        wanted: np.ndarray,
        sink: FrameSink,
        tally: _Tally,
        stand_ins: dict[int, Any],
    ) -> None:
        """Decode the runs and put the wanted frames; for each key of stand_ins hold the nearest earlier frame."""
        index_of_time = self.table.index_of_time()
        wanted_set = set(wanted.tolist())
        last = -1
        for frame in self._frames(runs, full, tally):
            index = index_of_time.get(frame.pts)
            if index is None or -1 < index <= last:
                raise _TimesLie
            if index < 0:
                continue
            last = index
            if frame.is_corrupt:
                tally.corrupt.add(index)
            if index in wanted_set:
                self._put(index, frame, sink)
                tally.kept.add(index)
            for missing, held in stand_ins.items():
                if held is None or index < missing:
                    stand_ins[missing] = frame

    def _read_by_count(self, wanted: np.ndarray, sink: FrameSink) -> Reading:
        """For times that tell nothing: the k-th frame out of the decoder is frame k."""
        tally = _Tally()
        wanted_set = set(wanted.tolist())
        everything = self.table.runs_in_order(np.arange(self.table.num_frames))
        for index, frame in enumerate(self._frames(everything, None, tally)):
            if frame.is_corrupt:
                tally.corrupt.add(index)
            if index in wanted_set:
                self._put(index, frame, sink)
            if index >= wanted[-1]:
                return Reading(self.table.num_frames, tally.decoded, len(tally.corrupt) + len(tally.refused))
        if not tally.decoded:
            raise UndecodableVideo(self._no_frame(tally))
        return Reading(tally.decoded, tally.decoded, len(tally.corrupt) + len(tally.refused))

    def _frames(self, runs: list[Run], full: np.ndarray | None, tally: _Tally) -> Iterator[Any]:
        """Decode run after run. Where `full` (bool [P]) is false, frames that nobody refers to are left out."""
        num_packets = sum(run.end - run.begin for run in runs)
        if num_packets > self._config.max_frames:
            raise MediaOverBudget(
                f"{num_packets:,} packets to decode are more than decode.max_frames = {self._config.max_frames:,}"
            )
        context = self._stream.codec_context
        for run in runs:
            context.flush_buffers()
            for place in [*range(run.begin, run.end), None]:  # None: what the decoder still holds back
                leave_out = full is not None and place is not None and not full[place]
                context.skip_frame = "NONREF" if leave_out else "DEFAULT"
                try:
                    frames = context.decode(None if place is None else self._packets[place])
                except LIBAV_ERRORS:
                    tally.refused.append(-1 if place is None else place)
                    continue
                tally.decoded += len(frames)
                yield from frames

    def _put(self, index: int, frame: Any, sink: FrameSink) -> None:
        """Scale one frame in displayed orientation and hand it on as red, green, blue."""
        turns = _quarter_turns(frame)
        across = turns % 2 == 1
        shown = (frame.height, frame.width) if across else (frame.width, frame.height)
        height, width = sink.scaled_size(*shown)
        with _stage(UndecodableVideo, f"a {frame.width} x {frame.height} {frame.format.name} frame cannot become RGB"):
            scaled = self._scaler.reformat(
                frame,
                width=height if across else width,
                height=width if across else height,
                format="gbrp",
                interpolation=Interpolation.BILINEAR,
                threads=1,
            )
        green, blue, red = (np.rot90(_plane(plane), turns) for plane in scaled.planes)
        sink.put(index, (red, green, blue))


def _quarter_turns(frame: Any) -> int:
    """Quarter turns counterclockwise from the stored to the displayed picture. Mirroring in the matrix is ignored."""
    return int(round(frame.rotation / 90) % 4)


def _plane(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
