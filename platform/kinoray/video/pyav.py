"""Reading wanted frames with PyAV: decode what the plan asks for, scale straight from YUV to planar RGB.

Frames come out bit for bit as from a plain decode of the whole file. That is checked as far as it can be: where a
planned frame is missing or anything is flagged as damaged, the file is decoded again from its start, leaving nothing
out, and what is reported is what that gave.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter

from kinoray.config.clip import said_limit
from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaOverBudget, UndecodableVideo
from kinoray.video.budget import check_memory
from kinoray.video.info import VideoInfo
from kinoray.video.media import LIBAV_ERRORS, Media, media_stage
from kinoray.video.plan import FrameSink, Reading, Run

__all__ = ["PyavVideo", "Turn"]

_MAX_RATE = 1000
_MAX_DAMAGED = 0.9  # of the decoded frames; more, and the others are chance
_DAMAGED = "{} frames are damaged; the file is damaged, or encrypted though its container does not say so"
# Without ACCURATE_RND, 4:2:0 frames that already have the target size take a short cut to RGB: black columns at the
# right of some widths (340), and blocky colours. At any other size it changes no bit and costs nothing.
_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
_MAX_PIXEL_RATIO = 16
"""No real pixel is this many times as wide as high, or as high as wide (half of 3D is 2, 352 x 576 at 16:9 is 2.9):
such a header would make a line of the picture."""


@dataclass(frozen=True, slots=True)
class Turn:
    """From the stored to the displayed picture: top and bottom change places if `mirrored`, and then it is turned."""

    quarters: int = 0
    """Counterclockwise."""
    mirrored: bool = False

    @property
    def across(self) -> bool:
        """Whether what is stored as a row is shown as a column."""
        return self.quarters % 2 == 1

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """[h, w] -> the same pixels as displayed."""
        upright = pixels[::-1] if self.mirrored else pixels
        return np.rot90(upright, self.quarters) if self.quarters else upright


class _TimesLie(Exception):
    """Frames come out with times that no packet has, or in another order, and nothing is damaged: count them."""


@dataclass(slots=True)
class _Tally:
    """What one pass over the packets saw."""

    decoded: int = 0
    corrupt: set[int] = field(default_factory=set)
    refused: list[int] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)

    @property
    def num_whole(self) -> int:
        return self.decoded - len(self.corrupt)


class PyavVideo(Media):
    """A video file whose frames can be read. Raises what Media raises when it is made."""

    def __init__(self, data: bytes, config: DecodeConfig, reach: float = 0.0) -> None:
        super().__init__(data, config, reach)
        self._scaler = _FrameScaler()
        self._first: tuple[Turn, int, int] | None = None  # of the first frame, width and height as displayed
        self.pixel_ratio = _pixel_ratio(self._stream)
        """Width of a stored pixel by its height."""
        self._timed = self.table.timed
        self.num_frames = self.table.num_frames
        """Frames in the video. What the packets promise, until a `read` finds out that fewer come out."""

    @property
    def turn(self) -> Turn:
        """How the first frame is turned and mirrored for display.

        Raises:
            UndecodableVideo: no frame can be decoded.
        """
        return self._first_frame()[0]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first frame, as displayed: turned, and in square pixels. Raises what `turn` raises."""
        _, width, height = self._first_frame()
        return width, height

    @property
    def info(self) -> VideoInfo:
        """What the video is. Raises what `turn` raises."""
        turn, width, height = self._first_frame()
        duration_s, num_frames = self.duration_s, self.num_frames
        return VideoInfo(
            duration_s=duration_s,
            fps=num_frames / duration_s if duration_s > 0 else 0.0,
            num_frames=num_frames,
            width=width,
            height=height,
            codec=self.codec,
            rotation=90 * turn.quarters,
            mirrored=turn.mirrored,
            claimed_frames=self.claimed_frames,
            num_keyframes=self.table.num_keyframes,
            container=self.container,
        )

    def _first_frame(self) -> tuple[Turn, int, int]:
        if self._first is None:
            tally = _Tally()
            places = min(self.table.num_packets, self._config.max_frames)
            next(self._frames([Run(0, places)], None, tally), None)
            if self._first is None:
                raise UndecodableVideo(self._no_frame(tally))
        return self._first

    def _no_frame(self, tally: _Tally) -> str:
        return (
            f"the container opens, but no frame comes out of {self.table.num_packets} {self.codec} packets "
            f"({len(tally.refused)} refused by the decoder)"
        )

    def read(self, wanted: np.ndarray, sink: FrameSink) -> Reading:
        """Put the frames with these numbers (int64, sorted, each once, at least one) into the sink.

        A wanted frame that does not come out is replaced by the nearest earlier frame that did (the first one, if
        there is no earlier) and counted as corrupt. Where num_frames is less after the call than it was before, the
        sink may have gaps: choose frames again from that many.

        Raises:
            UndecodableVideo: no frame at all comes out, all wanted ones are damaged, or one cannot be converted.
            MediaOverBudget: more packets than decode.max_frames would have to be decoded, or a frame is too large.
        """
        if self._timed:
            try:
                return self._read_by_time(wanted, sink)
            except _TimesLie:
                self._timed = False
        return self._read_by_count(wanted, sink)

    def _read_by_time(self, wanted: np.ndarray, sink: FrameSink) -> Reading:
        whole = self.table.runs_in_order(wanted)
        by_groups = self.decodes_by_groups()
        leave_out = ~self.table.wanted_packets(wanted) if self.leaves_out_exactly() else None
        first = _Tally()
        runs = self.table.runs_for(wanted) if by_groups else whole
        self.check_frames(runs)
        self._collect(runs, leave_out, wanted, sink, first, {})
        missing = set(wanted.tolist()) - first.kept
        if not missing and not first.corrupt and not first.refused:
            return Reading(first.decoded, self.table.num_headless)
        # Damage, or key frame flags that promise more than they keep.
        self.check_frames(whole)
        second = _Tally()
        stand_ins: dict[int, Any] = dict.fromkeys(missing)
        self._collect(whole, None, wanted, sink, second, stand_ins)
        missing -= second.kept
        for index in missing:
            if stand_ins[index] is None:
                raise UndecodableVideo(self._no_frame(second))
            self._put(index, stand_ins[index], sink)
        corrupt = second.corrupt | missing | {int(self.table.frame_of[place]) for place in second.refused}
        self._check_whole_enough(wanted, corrupt - {-1}, second.num_whole)
        return Reading(first.decoded + second.decoded, len(corrupt - {-1}) + self.table.num_headless)

    def _collect(
        self,
        runs: list[Run],
        leave_out: np.ndarray | None,
        wanted: np.ndarray,
        sink: FrameSink,
        tally: _Tally,
        stand_ins: dict[int, Any],
    ) -> None:
        """Decode the runs and put the wanted frames; for each key of stand_ins hold the nearest earlier frame."""
        index_of_time = self.table.index_of_time()
        wanted_set = set(wanted.tolist())
        last = -1
        for frame in self._frames(runs, leave_out, tally):
            index = index_of_time.get(frame.pts)
            if index is not None and index < 0:
                continue
            whole = not tally.refused and not tally.corrupt
            if index is None or (whole and index <= last):
                raise _TimesLie
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
        tally, shown = _Tally(), []
        wanted_set = set(wanted.tolist())
        self.check_frames([Run(0, int(wanted[-1]) + 1)])
        for index, frame in enumerate(self._frames([Run(0, self.table.num_packets)], None, tally)):
            if frame.is_corrupt:
                tally.corrupt.add(index)
            shown.append(frame.pts)
            if index in wanted_set:
                self._put(index, frame, sink)
            if index >= wanted[-1]:
                self._check_whole_enough(wanted, tally.corrupt, tally.num_whole)
                return Reading(tally.decoded, len(tally.corrupt) + len(tally.refused))
        if not tally.decoded:
            raise UndecodableVideo(self._no_frame(tally))
        self._check_whole_enough(wanted[wanted < tally.decoded], tally.corrupt, tally.num_whole)
        self.num_frames = tally.decoded
        self._clock.found(shown)
        return Reading(tally.decoded, len(tally.corrupt) + len(tally.refused))

    def _check_whole_enough(self, wanted: np.ndarray, corrupt: set[int], num_whole: int) -> None:
        """Refuse what shows nothing of the video: noise decodes now and then without an error."""
        if len(wanted) and corrupt.issuperset(wanted.tolist()):
            raise UndecodableVideo(_DAMAGED.format(f"all {len(wanted)} wanted"))
        num_frames = num_whole + len(corrupt)
        if len(corrupt) > _MAX_DAMAGED * num_frames:
            raise UndecodableVideo(_DAMAGED.format(f"{len(corrupt):,} of {num_frames:,} decoded"))

    @property
    def frame_rate(self) -> Fraction:
        """Mean frames per second, as the container claims; 25 where it claims nothing usable."""
        claimed = self.average_rate or self._stream.base_rate
        if self.table.halved and self._timed and self.duration_s:  # libav counts packets there
            claimed = Fraction(self.table.num_frames / self.duration_s).limit_denominator(1001)
        return Fraction(claimed) if claimed and 0 < claimed <= _MAX_RATE else Fraction(25)

    @property
    def time_base(self) -> Fraction:
        """Seconds in one unit of the frames' times."""
        return Fraction(self._stream.time_base)

    def shown_frames(self) -> Iterator[Any]:
        """Every frame that is shown, in order, as libav gives it; frames that do not decode are left out.

        Raises:
            UndecodableVideo: no frame comes out, or (at the end) hardly one was whole.
            MediaOverBudget: more packets than decode.max_frames, or a frame is too large.
        """
        whole = [Run(0, self.table.num_packets)]
        self.check_frames(whole)
        index_of_time = self.table.index_of_time() if self._timed else {}
        tally = _Tally()
        for number, frame in enumerate(self._frames(whole, None, tally)):
            if frame.is_corrupt:
                tally.corrupt.add(number)
            if index_of_time.get(frame.pts, 0) >= 0:
                yield frame
        if not tally.decoded:
            raise UndecodableVideo(self._no_frame(tally))
        self._check_whole_enough(np.arange(0), tally.corrupt, tally.num_whole)

    def check_frames(self, runs: list[Run]) -> None:
        """Refuse a plan before it is carried out.

        Raises:
            MediaOverBudget: it sends more packets to the decoder than decode.max_frames.
        """
        num_frames = self.table.num_to_decode(runs)
        if num_frames > self._config.max_frames:
            raise MediaOverBudget(
                f"{num_frames:,} frames to decode are more than {said_limit('max_frames', self._config.max_frames)}"
            )

    def _frames(self, runs: list[Run], leave_out: np.ndarray | None, tally: _Tally) -> Iterator[Any]:
        """Decode run after run. Where `leave_out` (bool [P]) is true, a frame that nobody refers to is left out."""
        for packets in self.packets(runs):
            self.context.flush_buffers()
            self.context.skip_frame, leaves_out = "DEFAULT", False
            for place, packet in packets:
                if leave_out is not None and leave_out[place] != leaves_out:  # libav takes 3 us to be told
                    leaves_out = not leaves_out
                    self.context.skip_frame = "NONREF" if leaves_out else "DEFAULT"
                yield from self._decode(packet, place, tally)
            yield from self._decode(None, -1, tally)  # what the decoder still holds back

    def _decode(self, packet: Any, place: int, tally: _Tally) -> list[Any]:
        try:
            frames: list[Any] = self.context.decode(packet)
        except MemoryError as cause:
            raise MediaOverBudget("a frame takes more memory than there is") from cause
        except LIBAV_ERRORS:
            check_memory(self.context.width, self.context.height)
            tally.refused.append(place)
            return []
        for frame in frames:
            self.check_size(frame.width, frame.height)
        tally.decoded += len(frames)
        if frames and self._first is None:
            turn = _turn(frames[0])
            self._first = (turn, *self._shown_size(frames[0], turn))
        return frames

    def _shown_size(self, frame: Any, turn: Turn) -> tuple[int, int]:
        """(width, height) as displayed: in square pixels, with the rows that are stored."""
        width = max(1, round(frame.width * self.pixel_ratio))
        return (frame.height, width) if turn.across else (width, frame.height)

    def _put(self, index: int, frame: Any, sink: FrameSink) -> None:
        """Scale one frame and hand it on in displayed orientation."""
        turn = _turn(frame)
        height, width = sink.scaled_size(*self._shown_size(frame, turn))
        self.check_scaled_size(width, height)
        planes = self._scaler.planes(frame, *((width, height) if turn.across else (height, width)))
        first, second, third = (turn.apply(plane) for plane in planes)
        sink.put(index, (first, second, third))


class _FrameScaler:
    """Scales the frames of one video, bilinear, once for each, from what the decoder gives to planar RGB.

    libswscale keeps the scaler of the last size and pixels; used for two in turn it would make it anew for each frame.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def planes(self, frame: Any, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Red, green and blue, uint8 [height, width]; the frame is not turned.

        Raises:
            UndecodableVideo: libswscale does not know the frame's pixels.
        """
        with media_stage(UndecodableVideo, f"a {frame.width} x {frame.height} {frame.format.name} frame to RGB"):
            scaled = self._reformatter.reformat(
                frame, width=width, height=height, format="gbrp", interpolation=_TO_RGB, threads=1
            )
        green, blue, red = (_pixels(plane) for plane in scaled.planes)
        return red, green, blue


def _pixels(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _pixel_ratio(stream: Any) -> Fraction:
    """What the container says, or else the codec, as in ffmpeg. 1 where nothing is said, or what cannot be."""
    said = Fraction(stream.sample_aspect_ratio or 0)
    return said if 1 <= said * _MAX_PIXEL_RATIO <= _MAX_PIXEL_RATIO**2 else Fraction(1)


def _turn(frame: Any) -> Turn:
    """What the frame's display matrix says, to the nearest quarter: its scale and its place do not count."""
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side_data is None:
        return Turn()
    # (x, y) is shown at (a x + c y, b x + d y), y downwards. The angle is taken as libav takes it.
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data))
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return Turn()
    clockwise = math.atan2(b / down, a / across)
    return Turn(round(-clockwise / (math.pi / 2)) % 4, a * d < b * c)
