"""Making a video cheap to read: H.264 with a key frame every 12 frames, short side 256, no sound.

Every frame stays, at its time. What is easy to break: the same bytes must come out for the same bytes on one machine
(a restarted pack relies on it), and a frame that was decoded carries the type it had, which the encoder would obey.
"""

import io
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kinoray.config.shared import DecodeConfig, digest
from kinoray.errors import UndecodableVideo
from kinoray.video.frames import probe
from kinoray.video.info import VideoInfo, check_counts
from kinoray.video.media import media_stage
from kinoray.video.pyav import PyavVideo, Turn

__all__ = ["TRANSCODE", "TranscodeSettings", "Transcoded", "open_output", "transcode", "x264_options"]

_MAX_LOST_FRACTION = 0.1  # of the frames; more, and what is left is not the video

_MAKE = 2
"""Raised when the same settings make other bytes: a pack that was begun before is not gone on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscodeSettings:
    """What a transcoded video is. Written to pack.json; another choice here is another pack."""

    short_side_px: int = 256
    """The shorter side of larger videos, scaled down with their aspect kept; smaller ones stay as they are."""
    gop: int = 12
    """Frames from one key frame to the next: sparse sampling decodes about this many for each one it wants."""
    crf: int = 23
    """Quality of x264 (lower is better and larger; 23 is its own default)."""
    preset: str = "medium"
    """Effort of x264."""

    @property
    def digest(self) -> str:
        """16 hex digits that name the settings."""
        return digest([asdict(self), _MAKE])


TRANSCODE = TranscodeSettings()
"""What `pack --transcode` makes."""


@dataclass(frozen=True, slots=True)
class Transcoded:
    """A video as it is packed."""

    data: bytes
    """The MP4."""
    info: VideoInfo
    """The probe of these bytes."""
    frames_lost: int
    """Frames that the source promises and that could not be decoded; their time belongs to the frame before."""

    def __post_init__(self) -> None:
        check_counts(self, "frames_lost")


class _NoTimesError(Exception):
    """Frames come out of the decoder in times that do not rise."""


def transcode(data: bytes, config: DecodeConfig, settings: TranscodeSettings = TRANSCODE) -> Transcoded:
    """The same frames at the same times in a small H.264 MP4.

    Raises:
        MediaError: the source cannot be decoded or is over a limit (decode.max_frames counts all of its frames), more
            than a tenth of its frames are lost, or it cannot be encoded (UndecodableVideo).
    """
    try:
        encoded, num_frames, promised = _encode(data, config, settings, by_time=True)
    except _NoTimesError:
        encoded, num_frames, promised = _encode(data, config, settings, by_time=False)
    lost = max(0, promised - num_frames)
    if lost > _MAX_LOST_FRACTION * promised:
        raise UndecodableVideo(f"{lost} of {promised} frames cannot be decoded; too many to transcode the rest")
    info = probe(encoded, config)
    if info.num_frames != num_frames:
        raise UndecodableVideo(f"transcoding made {info.num_frames} frames of {num_frames}")
    return Transcoded(encoded, info, lost)


def _encode(data: bytes, config: DecodeConfig, settings: TranscodeSettings, *, by_time: bool) -> tuple[bytes, int, int]:
    """(file, its frames, frames that the source promises)."""
    buffer = io.BytesIO()
    num_frames = 0
    with PyavVideo(data, config) as video, media_stage(UndecodableVideo, "the video cannot be encoded as H.264"):
        promised = video.num_frames
        with open_output(buffer, "mp4") as output:
            encoder: Any = None
            for frame in _timed(video, by_time=by_time):
                if encoder is None:
                    encoder = _Encoder(output, frame, video, settings)
                encoder.put(frame)
                num_frames += 1
            encoder.finish()
    return buffer.getvalue(), num_frames, promised


def _timed(video: PyavVideo, *, by_time: bool) -> Iterator[Any]:
    """The frames, their times beginning at 0: their own, their packets' in order, or 1, 2, 3 at the frame rate."""
    first: int | None = None
    last = -1
    ticks: list[int] | None = None
    if by_time and video.frame_times is not None:
        ticks = np.rint(video.frame_times / float(video.time_base)).astype(np.int64).tolist()
    for number, frame in enumerate(video.shown_frames()):
        if by_time and video.table.timed:
            if frame.pts is None:
                raise _NoTimesError
            first = frame.pts if first is None else first
            frame.pts, frame.time_base = frame.pts - first, video.time_base
        elif ticks is not None:
            if number + 1 >= len(ticks):
                raise _NoTimesError
            frame.pts, frame.time_base = ticks[number], video.time_base
            frame.duration = ticks[number + 1] - ticks[number]
        else:
            frame.pts, frame.time_base, frame.duration = number, 1 / video.frame_rate, 1
        if frame.pts <= last:
            raise _NoTimesError
        last = frame.pts
        yield frame


class _Encoder:
    """Scales and encodes frames like the first one it is shown."""

    def __init__(self, output: Any, first: Any, video: PyavVideo, settings: TranscodeSettings) -> None:
        self._output = output
        self._scaler = VideoReformatter()
        self._width, self._height = _scaled(first.width, first.height, settings.short_side_px)
        options = x264_options({"crf": str(settings.crf), "preset": settings.preset})
        self._stream = output.add_stream("libx264", rate=video.frame_rate, options=options)
        self._stream.width, self._stream.height = self._width, self._height
        self._stream.pix_fmt, self._stream.gop_size = "yuv420p", settings.gop
        context = self._stream.codec_context
        context.time_base = first.time_base
        context.thread_count = 1
        context.flags |= int(av.codec.context.Flags.bitexact | av.codec.context.Flags.frame_duration)
        sample = self._scale(first)
        for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
            setattr(context, name, getattr(sample, name))
        turn = video.turn
        if turn != Turn():
            flips = (turn.mirrored and turn.across, turn.mirrored and not turn.across)  # PyAV's are after the turn
            self._stream.set_display_rotation(90 * turn.quarters, *flips)
        if video.pixel_ratio != 1:
            context.sample_aspect_ratio = video.pixel_ratio

    def put(self, frame: Any) -> None:
        """Encode one more frame."""
        scaled = self._scale(frame)
        scaled.pts, scaled.time_base = frame.pts, frame.time_base
        scaled.duration = frame.duration  # the last frame's is in no other frame's time
        scaled.pict_type = 0  # whatever it was in the source, the encoder decides
        self._output.mux(self._stream.encode(scaled))

    def finish(self) -> None:
        """Write what the encoder holds back."""
        self._output.mux(self._stream.encode(None))

    def _scale(self, frame: Any) -> Any:
        return self._scaler.reformat(
            frame,
            width=self._width,
            height=self._height,
            format="yuv420p",
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )


def _scaled(width: int, height: int, short_side_px: int) -> tuple[int, int]:
    """(width, height), even, the shorter at most short_side_px."""
    scale = min(Fraction(1), Fraction(short_side_px, min(width, height)))
    return max(2, int(width * scale / 2) * 2), max(2, int(height * scale / 2) * 2)


def open_output(buffer: io.BytesIO, container: str, options: Mapping[str, str] | None = None) -> Any:
    """A muxer into memory that writes nothing of time or version; MP4 gets its index in front unless options say else.

    To move the index, the muxer reads back what it has written, through io_open.
    """
    muxer = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if container in ("mp4", "mov") else {})
    return av.open(
        buffer,
        "w",
        format=container,
        options=muxer | dict(options or {}),
        io_open=lambda *_: io.BytesIO(buffer.getvalue()),
    )


def x264_options(options: Mapping[str, str]) -> dict[str, str]:
    """Options of libx264 with which the same frames give the same bytes."""
    merged = dict(options)
    if platform.machine() in ("x86_64", "AMD64"):
        # With AVX-512, x264 gives other bytes from one call to the next (seen up to 340 x 256); SSE4.2 is as fast here.
        merged["x264-params"] = ":".join(filter(None, ["asm=SSE4.2", merged.get("x264-params", "")]))
    return merged
