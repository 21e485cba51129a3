"""What the decode tests compare with: generated pictures, and a plain decode of every frame with nothing planned."""

import io
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Self

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
    all_keys: bool = False,
    change: Callable[[bytes], bytes] = bytes,
    options: dict[str, str] | None = None,
) -> bytes:
    """The same packets in another container: without the first few, moved in time, with times made wrong; for VP8 with
    the `show this frame` bit of some packets cleared; with some packets overwritten; with all flagged as key frames;
    with their bytes changed."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=options or {}) as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate([p for p in source.demux(stream) if p.size][first:]):
            content = bytearray(change(bytes(packet)))
            if number in hide:
                content[0] &= ~0x10
            if number in spoil:
                content[:] = b"\xff" * len(content)
            new = av.Packet(bytes(content))
            moved = int(shift / packet.time_base)
            new.pts, new.dts = packet.pts - moved, packet.dts - moved
            if pts_from_dts:
                new.pts = new.dts = number * packet.duration
            new.duration, new.time_base, new.is_keyframe = (
                packet.duration,
                packet.time_base,
                all_keys or packet.is_keyframe,
            )
            new.stream = copy
            output.mux(new)
    return buffer.getvalue()


class _Bits:
    """A string of bits, with H.264's numbers."""

    def __init__(self, *numbers: int) -> None:
        self.bits = ""
        for number in numbers:
            self.golomb(number)

    def put(self, bits: str) -> Self:
        self.bits += bits
        return self

    def golomb(self, number: int) -> Self:
        digits = f"{number + 1:b}"
        return self.put("0" * (len(digits) - 1) + digits)

    def aligned(self) -> Self:
        return self.put("0" * (-len(self.bits) % 8))

    def unit(self, head: int) -> bytes:
        """A NAL unit with its start code; no three bytes in it may look like one."""
        bits = self.put("1").aligned().bits
        content = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
        return b"\x00\x00\x00\x01" + bytes([head]) + re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\x00\x00\x03", content)


def h264_fields(frames: np.ndarray, *, whole: frozenset[int] = frozenset(), gop: int = 4) -> list[list[bytes]]:
    """H.264 of grey frames (uint8 [N, 64, 32], every byte over 0), coded without loss: for each, its pictures.

    They are a top and a bottom field, as camcorders and broadcasters code them, or one for the frames in `whole`.
    x264 codes no fields. Every gop-th frame is a key frame, with the settings in front.
    """
    sps = _Bits().put("01001101" + "0" * 8 + "00011110").golomb(0).golomb(0).golomb(2).golomb(2).put("0")
    sps.golomb(1).golomb(1).put("00100")  # 2 x 4 macroblocks; fields may be coded
    pps = _Bits(0, 0).put("00").golomb(0).golomb(0).golomb(0).put("000").golomb(0).golomb(0).golomb(0).put("000")
    settings = sps.unit(0x67) + pps.unit(0x68)
    coded = []
    for number, frame in enumerate(frames):
        place = number % gop
        parities = [None] if number in whole else [0, 1]
        pictures = []
        for parity in parities:
            is_idr = place == 0 and parity != 1
            bits = _Bits(0, 7, 0).put(f"{place:04b}").put("0" if parity is None else f"1{parity}")
            bits = bits.golomb(number // gop % 2).put("00") if is_idr else bits.put("0")
            bits.golomb(0)
            lines = frame if parity is None else frame[parity::2]
            for top in range(0, len(lines), 16):
                for left in (0, 16):
                    block = lines[top : top + 16, left : left + 16].tobytes() + b"\x80" * 128
                    bits.golomb(25).aligned().put("".join(f"{byte:08b}" for byte in block))
            pictures.append(bits.unit(0x65 if is_idr else 0x61))
        if place == 0:
            pictures[0] = settings + pictures[0]
        coded.append(pictures)
    return coded


def mpeg2_fields(levels: list[int], gop: int = 4) -> list[list[bytes]]:
    """MPEG-2 of even grey frames, 32 x 64, each of 128 + level (-60 .. 60): for each, a top and a bottom field."""
    start = b"\x00\x00\x01"

    def header(code: int, bits: str) -> bytes:
        bits += "0" * (-len(bits) % 8)
        return start + bytes([code]) + bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))

    sizes = ["100", "00", "01", "101", "110", "1110", "11110"]  # table B.12
    coded = []
    for number, level in enumerate(levels):
        pictures = []
        for structure in ("01", "10"):
            picture = header(0x00, f"{number % gop:010b}" + "001" + "1" * 16 + "0")
            picture += header(0xB5, "1000" + "1" * 16 + "00" + structure + "0" * 10)
            for row in (1, 2):
                size = abs(level).bit_length()
                first = f"{level if level > 0 else level + (1 << size) - 1:0{size}b}" if size else ""
                blocks = sizes[size] + first + "10" + ("100" + "10") * 3 + ("00" + "10") * 2
                picture += header(row, "000010" + "11" + blocks + "11" + ("100" + "10") * 4 + ("00" + "10") * 2)
            pictures.append(picture)
        if number % gop == 0:
            sequence = header(0xB3, f"{32:012b}{64:012b}" + "00010011" + f"{1000:018b}1{20:010b}000")
            extension = header(0xB5, "0001" + "01001000" + "0" + "01" + "0" * 16 + "1" + "0" * 16)
            pictures[0] = sequence + extension + header(0xB8, "0" * 25 + "1000000") + pictures[0]
        coded.append(pictures)
    return coded


def mux_fields(coded: list[list[bytes]], container: str, *, together: bool = False, codec: str = "h264") -> bytes:
    """A video of 25 frames a second of those above: a packet for each picture, or for each frame."""
    whole = b"".join(b"".join(pictures) for pictures in coded)
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(whole), format=codec) as source,
        av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        for number, pictures in enumerate(coded):
            for half, content in enumerate([b"".join(pictures)] if together else pictures):
                packet = av.Packet(content)
                packet.pts = packet.dts = 3600 * number + 1800 * half
                packet.duration, packet.time_base = (
                    (1800 if len(pictures) == 2 and not together else 3600),
                    Fraction(1, 90_000),
                )
                packet.is_keyframe = b"\x00\x00\x01\x67" in content or b"\x00\x00\x01\xb3" in content
                packet.stream = copy
                output.mux(packet)
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
