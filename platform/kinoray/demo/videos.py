"""Real H.264 files made from nothing, for the demo, the tests and the benchmarks; and files broken in known ways.

The demo's classes are 2 things x 3 motions. A card that carries a disc or a star moves over a panning background;
both cards have the same outline and any colours, so the flow shows the motion and never the thing; the card wraps
around the edges from a random start, so one frame shows the thing and its place says nothing of the motion. Nothing
changes its class when it is mirrored left to right.
"""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from kinoray.video.transcode import open_output, x264_options

__all__ = [
    "BROKEN_KINDS",
    "MOTIONS",
    "THINGS",
    "class_names",
    "make_broken",
    "make_clip",
    "make_demo_set",
    "make_video",
]

THINGS = ("disc", "star")
"""What is drawn on the moving card."""
MOTIONS = ("up", "down", "sideways")
"""How the card moves; `sideways` is to the left or to the right."""
BROKEN_KINDS = ("empty", "random", "index_lost", "cut_front_index", "audio_only", "one_frame")
"""What `make_broken` can do. The first three and audio_only cannot be decoded, the other two can."""

_SIDE_PX = 96
_CARD_PX = 36
_FPS = 12


def class_names() -> list[str]:
    """The demo's six classes, `disc-up` and so on, in the order of a sorted listing."""
    return sorted(f"{thing}-{motion}" for thing in THINGS for motion in MOTIONS)


def make_video(
    frames: np.ndarray,
    *,
    fps: Fraction | int = _FPS,
    codec: str = "libx264",
    container: str = "mp4",
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    pts: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> bytes:
    """Encode RGB frames, uint8 [N, H, W, 3], and return the file's bytes: the same for the same arguments.

    `pts` are the frames' times in units of 1 / fps (default 0, 1, 2, ...); gaps make a variable frame rate.
    `rotation` is stored in the display matrix, in degrees counterclockwise. `options` go to the encoder,
    `container_options` to the muxer (default for mp4: the index in front).
    """
    num_frames, height, width = frames.shape[:3]
    buffer = io.BytesIO()
    with open_output(buffer, container, container_options) as output:
        stream = output.add_stream(codec, rate=Fraction(fps), options=_encoder_options(codec, options or {}))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pix_fmt, gop
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= int(av.codec.context.Flags.bitexact)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = 1 / Fraction(fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _encoder_options(codec: str, options: Mapping[str, str]) -> dict[str, str]:
    if codec != "libx264":
        return dict(options)
    return x264_options({"crf": "20", "preset": "veryfast"} | dict(options))


def _texture(rng: np.random.Generator, side: int, grain_px: float) -> np.ndarray:
    """Smooth muted random colours, float32 [side, side, 3] in 0 .. 1, that continue over the edges."""
    noise = rng.random((side, side, 3), dtype=np.float32)
    kernel = 2 * round(2 * grain_px) + 1
    tiled = np.tile(noise, (3, 3, 1))
    blurred: np.ndarray = cv2.GaussianBlur(tiled, (kernel, kernel), grain_px)[side : 2 * side, side : 2 * side]
    blurred = (blurred - blurred.mean(axis=(0, 1))) / (blurred.std() + 1e-6)
    grey = blurred.mean(axis=2, keepdims=True)
    return np.asarray(np.clip(0.5 + 0.16 * grey + 0.07 * blurred, 0.0, 1.0), np.float32)


def _shape_mask(thing: str, angle: float) -> np.ndarray:
    """Where the thing is on its card, float32 [_CARD_PX, _CARD_PX] in 0 .. 1, smooth at the edges."""
    scale = 8  # drawn large and averaged down
    side = _CARD_PX * scale
    centre, radius = side / 2, 0.43 * side
    canvas = np.zeros((side, side), np.uint8)
    if thing == "disc":
        cv2.circle(canvas, (side // 2, side // 2), round(0.8 * radius), 255, -1)
    else:  # five points; about the area of the disc
        corners = [
            (
                centre + (1.12 if k % 2 == 0 else 0.5) * radius * math.sin(angle + k * math.pi / 5),
                centre - (1.12 if k % 2 == 0 else 0.5) * radius * math.cos(angle + k * math.pi / 5),
            )
            for k in range(10)
        ]
        cv2.fillPoly(canvas, [np.rint(corners).astype(np.int32)], 255)
    small: np.ndarray = cv2.resize(canvas, (_CARD_PX, _CARD_PX), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255.0


def _card(rng: np.random.Generator, thing: str) -> np.ndarray:
    """A textured square with the thing on it, light on dark or dark on light, float32 [_CARD_PX, _CARD_PX, 3]."""
    paper = 0.12 + 0.22 * _texture(rng, _CARD_PX, 2.0)
    ink = 0.75 + 0.25 * rng.random(3, dtype=np.float32)
    mask = _shape_mask(thing, float(rng.uniform(-0.3, 0.3)))[..., None]
    card = np.asarray(paper * (1 - mask) + ink * mask, np.float32)
    return card if rng.random() < 0.5 else 1 - card


def _shifted(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The image moved by (x, y) pixels, fractions too; what leaves at one edge comes in at the other."""
    move = np.array([[1, 0, x % image.shape[1]], [0, 1, y % image.shape[0]]], np.float32)
    size = (image.shape[1], image.shape[0])
    shifted: np.ndarray = cv2.warpAffine(image, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return shifted


def make_clip(thing: str, motion: str, rng: np.random.Generator) -> np.ndarray:
    """Frames of one demo video, uint8 [N, 96, 96, 3] with N from 24 to 32; the card moves 1.5 to 2.5 px a frame."""
    num_frames = int(rng.integers(24, 33))
    background = _texture(rng, _SIDE_PX, 4.0)
    layer = np.zeros((_SIDE_PX, _SIDE_PX, 4), np.float32)  # RGB and opacity of the card
    layer[:_CARD_PX, :_CARD_PX, :3] = _card(rng, thing)
    layer[:_CARD_PX, :_CARD_PX, 3] = 1.0
    layer[..., :3] *= layer[..., 3:]
    side = float(rng.choice([-1.0, 1.0]))  # drawn for every motion: first frames do not depend on it
    step = np.array({"up": (0.0, -1.0), "down": (0.0, 1.0), "sideways": (side, 0.0)}[motion]) * rng.uniform(1.5, 2.5)
    start = rng.uniform(0, _SIDE_PX, 2)
    heading = rng.uniform(0, 2 * math.pi)
    pan = rng.uniform(0.1, 0.6) * np.array([math.cos(heading), math.sin(heading)])
    frames = np.empty((num_frames, _SIDE_PX, _SIDE_PX, 3), np.uint8)
    for number in range(num_frames):
        behind = _shifted(background, *(pan * number))
        card = _shifted(layer, *(start + step * number))
        picture = card[..., :3] + behind * (1 - card[..., 3:])
        noise = rng.standard_normal(picture.shape, dtype=np.float32) * 0.008
        frames[number] = np.clip((picture + noise) * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return frames


def make_demo_set(folder: Path, videos_per_class: int, seed: int) -> int:
    """Write `<folder>/<class>/<class>-0000.mp4` and so on; returns how many files. The same bytes for the same seed.

    A video depends on (seed, class, number) only, so a larger set begins with the files of a smaller one.
    """
    count = 0
    for thing in THINGS:
        for motion in MOTIONS:
            name = f"{thing}-{motion}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(videos_per_class):
                key = hashlib.sha256(f"{seed}\n{name}\n{number}".encode()).digest()
                rng = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))
                (folder / name / f"{name}-{number:04d}.mp4").write_bytes(make_video(make_clip(thing, motion, rng)))
                count += 1
    return count


def _remux(good: bytes, *, movflags: str, max_packets: int | None = None) -> bytes:
    """The same packets in a new MP4; at most the first max_packets of the video."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(good)) as source,
        av.open(
            buffer,
            "w",
            format="mp4",
            options={"fflags": "+bitexact"} | ({"movflags": movflags} if movflags else {}),
            io_open=lambda *_: io.BytesIO(buffer.getvalue()),
        ) as output,
    ):
        video = source.streams.video[0]
        copy = output.add_stream_from_template(video)
        packets = [packet for packet in source.demux(video) if packet.size]
        for packet in packets[:max_packets]:
            packet.stream = copy
            output.mux(packet)
    return buffer.getvalue()


def _audio_only() -> bytes:
    """Two seconds of a sine tone as AAC in an MP4, and no pictures."""
    rate = 16_000
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream("aac", rate=rate, layout="mono")
        times = np.arange(2 * rate, dtype=np.float32) / rate
        frame = av.AudioFrame.from_ndarray((0.3 * np.sin(2 * np.pi * 440 * times))[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def make_broken(kind: str, good: bytes) -> bytes:
    """A file broken in one known way, made from a good MP4. `kind` is one of BROKEN_KINDS.

    empty: no bytes. random: 20 kB of noise. index_lost: the index was at the end and is cut off. cut_front_index: the
    index is in front and 40 % of the pictures are cut off. audio_only: sound without pictures. one_frame: the first
    frame alone, which is a valid video.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "empty":
        return b""
    if kind == "random":
        return np.random.Generator(np.random.PCG64(len(good))).bytes(20_000)
    if kind == "index_lost":
        whole = _remux(good, movflags="")
        return whole[: int(0.6 * len(whole))]
    if kind == "cut_front_index":
        whole = _remux(good, movflags="+faststart")
        pictures = whole.index(b"mdat") + 4
        return whole[: pictures + int(0.6 * (len(whole) - pictures))]
    if kind == "audio_only":
        return _audio_only()
    if kind == "one_frame":
        return _remux(good, movflags="+faststart", max_packets=1)
    raise ValueError(f"kind must be one of {', '.join(BROKEN_KINDS)}, got {kind!r}")
