"""What the decode tests compare with: generated pictures, and a plain decode of every frame with nothing planned."""

import io
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

HEIGHT, WIDTH = 48, 80
"""Size to which `plain_decode` and `Collect` scale frames (not that of any tested file)."""


def moving(num_frames: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """A textured scene under a wandering camera, with noise and two cuts: no two frames alike. uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(seed)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (height + 120, width + 120, 3)).astype(np.uint8), (0, 0), 3)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    frames = []
    for number in range(num_frames):
        part = 3 * number // num_frames
        x, y = round(60 + 50 * np.sin(number / 9 + part)), round(60 + 50 * np.cos(number / 13 + 2 * part))
        frame = np.roll(scene, 31 * part, axis=1)[y : y + height, x : x + width].astype(int)
        frames.append(np.clip(frame + rng.integers(-6, 7, frame.shape), 0, 255).astype(np.uint8))
    return np.stack(frames)


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """One decoded frame, scaled with a scaler of its own: uint8 [3, height, width]."""
    how = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
    scaled = VideoReformatter().reformat(frame, width, height, "gbrp", interpolation=how, threads=1)
    planes = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in scaled.planes]
    return np.stack([planes[2], planes[0], planes[1]])


def plain_decode(data: bytes, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Every frame of the file, in the order of showing, as `to_rgb` gives it."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return [to_rgb(frame, height, width) for frame in container.decode(stream)]


def remux(
    data: bytes,
    container: str,
    *,
    first: int = 0,
    shift: Fraction = Fraction(0),
    pts_from_dts: bool = False,
    hide: frozenset[int] = frozenset(),
    spoil: frozenset[int] = frozenset(),
    options: dict[str, str] | None = None,
) -> bytes:
    """The same packets in another container: without the first few, moved in time, with times made wrong; for VP8 with
    the `show this frame` bit of some packets cleared; with some packets overwritten."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=options or {}) as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate([p for p in source.demux(stream) if p.size][first:]):
            content = bytearray(bytes(packet))
            if number in hide:
                content[0] &= ~0x10
            if number in spoil:
                content[:] = b"\xff" * len(content)
            new = av.Packet(bytes(content))
            moved = int(shift / packet.time_base)
            new.pts, new.dts = packet.pts - moved, packet.dts - moved
            if pts_from_dts:
                new.pts = new.dts = number * packet.duration
            new.duration, new.time_base, new.is_keyframe = packet.duration, packet.time_base, packet.is_keyframe
            new.stream = copy
            output.mux(new)
    return buffer.getvalue()


def with_matrix(data: bytes, linear: tuple[float, ...], place: tuple[float, float] = (0, 0)) -> bytes:
    """An MP4 with another display matrix: (x, y) is shown at (a x + c y, b x + d y) + place, linear = (a, b, c, d)."""
    a, b, c, d = linear
    at = data.index(b"tkhd") + 44
    rows = ((a, b, 0), (c, d, 0), (*place, 1))
    fixed = [round(value * (2**30 if column == 2 else 2**16)) for row in rows for column, value in enumerate(row)]
    return data[:at] + struct.pack(">9i", *fixed) + data[at + 36 :]


class Collect:
    """A FrameSink that keeps everything it gets, scaled as `plain_decode` does."""

    def __init__(self) -> None:
        self.frames: dict[int, np.ndarray] = {}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        return HEIGHT, WIDTH

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self.frames[index] = np.stack(planes)
