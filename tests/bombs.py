"""Small files that ask for much: time, memory, streams, frames. Made by hand, box by box, which costs little.

`BOMBS` maps a name to the file's maker, the error that it must be refused with, and its message. `LIES` are files that
claim nonsense, cost nothing and hold two good frames.
"""

import functools
import struct
import zlib
from collections.abc import Callable

import numpy as np

from kinoray.demo.videos import make_video
from kinoray.errors import MediaError, MediaOverBudget, NoVideoStream, UndecodableVideo, UnreadableContainer


def box(kind: bytes, *parts: bytes) -> bytes:
    """An MP4 box."""
    payload = b"".join(parts)
    return struct.pack(">I", 8 + len(payload)) + kind + payload


def full(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    """An MP4 box with version 0 and flags."""
    return box(kind, struct.pack(">I", flags), *parts)


def u32(*values: int) -> bytes:
    """Big-endian words."""
    return struct.pack(f">{len(values)}I", *values)


FTYP = box(b"ftyp", b"isom", u32(512), b"isomiso2avc1mp41")
MATRIX = u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


@functools.cache
def tiny() -> bytes:
    """Two frames of 16 x 16."""
    return make_video(np.zeros((2, 16, 16, 3), np.uint8), options={"preset": "ultrafast"})


def avc_header() -> bytes:
    """The avcC box of `tiny`."""
    data = tiny()
    place = data.index(b"avcC") - 4
    return data[place : place + struct.unpack(">I", data[place : place + 4])[0]]


def key_frame() -> bytes:
    """The first sample of `tiny`."""
    data = tiny()
    sizes = data.index(b"stsz") + 16
    return data[data.rindex(b"mdat") + 4 :][: struct.unpack(">I", data[sizes : sizes + 4])[0]]


def sample_entry(codec: bytes, width: int, height: int, *boxes: bytes) -> bytes:
    """A video sample entry of stsd."""
    fixed = bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", width & 0xFFFF, height & 0xFFFF)
    return box(
        codec, fixed, u32(0x480000, 0x480000, 0), struct.pack(">H", 1), bytes(32), struct.pack(">Hh", 24, -1), *boxes
    )


def header(duration: int, scale: int) -> bytes:
    """mvhd."""
    return full(b"mvhd", u32(0, 0, scale, duration, 0x10000, 0x1000000, 0, 0), MATRIX, bytes(24), u32(2))


def track(
    entry: bytes,
    *,
    num_samples: int,
    sizes: list[int] | int,
    offset: int,
    scale: int = 30,
    keys: tuple[int, ...] = (1,),
    number: int = 1,
    tables: tuple[bytes, ...] = (),
    data_reference: bytes = full(b"url ", flags=1),
    edits: bytes = b"",
) -> bytes:
    """A trak whose samples lie in one chunk; all of `sizes` bytes if that is a number."""
    each = [] if isinstance(sizes, int) else sizes
    duration = num_samples & 0xFFFFFFFF
    stbl = box(
        b"stbl",
        full(b"stsd", u32(1), entry),
        full(b"stts", u32(1, num_samples, 1)),
        full(b"stss", u32(len(keys), *keys)),
        full(b"stsc", u32(1, 1, num_samples, 1)),
        full(b"stsz", u32(0 if each else int(sizes), num_samples, *each)),  # type: ignore[call-overload]
        full(b"stco", u32(1, offset)),
        *tables,
    )
    minf = box(b"minf", full(b"vmhd", bytes(8), flags=1), box(b"dinf", full(b"dref", u32(1), data_reference)), stbl)
    handler = full(b"hdlr", u32(0), b"vide", bytes(13))
    mdia = box(b"mdia", full(b"mdhd", u32(0, 0, scale, duration, 0x55C40000)), handler, minf)
    tkhd = full(b"tkhd", u32(0, 0, number, 0, duration, 0, 0, 0, 0), MATRIX, u32(16 << 16, 16 << 16), flags=3)
    return box(b"trak", tkhd, *([edits] if edits else []), mdia)


def mp4(
    make_tracks: Callable[[int], bytes], media: bytes, *, extra: bytes = b"", scale: int = 30, duration: int = 1
) -> bytes:
    """ftyp, moov, mdat; `make_tracks` is given where the media bytes begin."""
    moov = box(b"moov", header(duration, scale), make_tracks(0), extra)
    begin = len(FTYP) + len(moov) + 8
    return FTYP + box(b"moov", header(duration, scale), make_tracks(begin), extra) + box(b"mdat", media)


def h264(
    num_samples: int, sample: bytes, *, fps: int = 30, entry: bytes | None = None, claimed: int | None = None
) -> bytes:
    """A key frame and then the same sample again and again, at constant size."""
    size = len(sample)
    avc = entry or sample_entry(b"avc1", 16, 16, avc_header())
    count = claimed or num_samples
    return mp4(
        lambda begin: track(avc, num_samples=count, sizes=size, offset=begin, scale=fps),
        sample * num_samples,
        duration=count,
    )


def chunk(kind: bytes, payload: bytes) -> bytes:
    """A PNG chunk."""
    return u32(len(payload)) + kind + payload + u32(zlib.crc32(kind + payload))


def png(width: int, height: int, payload: bytes) -> bytes:
    """A PNG of 1 bit a pixel."""
    head = chunk(b"IHDR", u32(width, height) + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(payload, 9)) + chunk(b"IEND", b"")


def ebml(kind: bytes, *parts: bytes, unknown: bool = False, claimed: int | None = None) -> bytes:
    """An EBML element; of unknown size, or claiming one."""
    payload = b"".join(parts)
    size = len(payload) if claimed is None else claimed
    return kind + (b"\x01" + b"\xff" * 7 if unknown else struct.pack(">Q", 1 << 56 | size)) + payload


def matroska(*elements: bytes) -> bytes:
    """A Matroska file whose segment has an unknown size."""
    head = ebml(
        b"\x1a\x45\xdf\xa3", ebml(b"\x42\x82", b"matroska"), ebml(b"\x42\x87", b"\x04"), ebml(b"\x42\x85", b"\x02")
    )
    info = ebml(b"\x15\x49\xa9\x66", ebml(b"\x2a\xd7\xb1", b"\x0f\x42\x40"))
    return head + ebml(b"\x18\x53\x80\x67", info, *elements, unknown=True)


def mkv_track(codec: bytes, private: bytes, *, number: int = 1, more: bytes = b"") -> bytes:
    """A TrackEntry of 16 x 16."""
    video = ebml(b"\xe0", ebml(b"\xb0", b"\x10"), ebml(b"\xba", b"\x10"))
    head = (
        ebml(b"\xd7", bytes([number])),
        ebml(b"\x73\xc5", bytes([number])),
        ebml(b"\x83", b"\x01"),
        ebml(b"\x86", codec),
    )
    return ebml(b"\xae", *head, private, video, more)


def mkv_blocks(payload: bytes, count: int) -> bytes:
    """A cluster of unknown size with the same block again and again."""
    blocks = [ebml(b"\xa3", b"\x81", struct.pack(">h", index % 30000), b"\x80", payload) for index in range(count)]
    return ebml(b"\x1f\x43\xb6\x75", ebml(b"\xe7", b"\x00"), *blocks, unknown=True)


def frame_8192() -> bytes:
    """One real frame of 8192 x 8192 in 198 kB."""
    return make_video(np.broadcast_to(np.uint8(0), (1, 8192, 8192, 3)), options={"preset": "ultrafast"})


def hour() -> bytes:
    """An hour at 30 fps behind one key frame."""
    return h264(108_000, key_frame()[:10])


def five_hours() -> bytes:
    """540,000 frames of two bytes."""
    return h264(540_000, b"\0\0")


def day_at_one_fps() -> bytes:
    """86,400 frames of four bytes."""
    return h264(86_400, b"\0\0\0\1", fps=1)


def claimed_size() -> bytes:
    """The index says 65535 x 65535, the stream 16 x 16."""
    return h264(2, key_frame(), entry=sample_entry(b"avc1", 65535, 65535, avc_header()))


def sample_count() -> bytes:
    """An index of constant size that claims 2^31 - 2 samples."""
    return h264(2, b"\1", claimed=2**31 - 2)


def fragment_count() -> bytes:
    """A fragment that claims 100 million samples without a table."""
    entry = sample_entry(b"avc1", 16, 16, avc_header())
    mvex = box(b"mvex", full(b"trex", u32(1, 1, 1, 1, 0)))
    trak = track(entry, num_samples=0, sizes=0, offset=0)
    moov = box(b"moov", header(0, 30), trak, mvex)
    trun = full(b"trun", u32(100_000_000))
    moof = box(b"moof", full(b"mfhd", u32(1)), box(b"traf", full(b"tfhd", u32(1), flags=0x20000), trun))
    return FTYP + moov + moof + box(b"mdat", key_frame())


def many_edits() -> bytes:
    """An edit list that repeats 3,000 samples 20,000 times."""
    entry = sample_entry(b"avc1", 16, 16, avc_header())
    count = 20_000
    elst = box(b"edts", full(b"elst", u32(count), u32(3000, 0, 0x10000) * count))
    return mp4(
        lambda begin: track(entry, num_samples=3000, sizes=10, offset=begin, keys=tuple(range(1, 3001)), edits=elst),
        key_frame()[:10] * 3000,
    )


def time_table() -> bytes:
    """A table of composition times for 4 * 10^12 samples."""
    entry = sample_entry(b"avc1", 16, 16, avc_header())
    ctts = full(b"ctts", u32(2000), u32(2**31 - 1, 1) * 2000)
    return mp4(lambda begin: track(entry, num_samples=2, sizes=10, offset=begin, tables=(ctts,)), key_frame() * 2)


def png_in_mov() -> bytes:
    """A track of 64 x 64 whose picture is a PNG of 60,000 x 60,000."""
    picture = png(60_000, 60_000, bytes(2_000_000))
    return mp4(
        lambda begin: track(sample_entry(b"png ", 64, 64), num_samples=1, sizes=[len(picture)], offset=begin), picture
    )


def jpeg_in_mov() -> bytes:
    """A track of 64 x 64 whose picture is a JPEG of 65,500 x 65,500."""
    quant = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 65500, 65500, 1) + b"\x01\x11\x00"
    table = b"\xff\xc4" + struct.pack(">HB", 20, 0) + bytes([1] + [0] * 15) + b"\0"
    table += b"\xff\xc4" + struct.pack(">HB", 20, 16) + bytes([1] + [0] * 15) + b"\0"
    picture = (
        b"\xff\xd8" + quant + frame + table + b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 63, 0) + bytes(9000)
    )
    picture += b"\xff\xd9"
    return mp4(
        lambda begin: track(sample_entry(b"jpeg", 64, 64), num_samples=1, sizes=[len(picture)], offset=begin), picture
    )


def gif() -> bytes:
    """A GIF of 65,535 x 65,535."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
        + b"\2\1\0\0;"
    )


def apng() -> bytes:
    """A PNG of 60,000 x 60,000 by itself."""
    return png(60_000, 60_000, bytes(2_000_000))


def compressed_index() -> bytes:
    """A QuickTime index that claims to inflate to 2 GB."""
    body = zlib.compress(bytes(100_000_000), 9)
    cmov = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", u32(2_000_000_000), body))
    return box(b"ftyp", b"qt  ", u32(512), b"qt  ") + box(b"moov", cmov) + box(b"mdat", key_frame())


def deep_boxes() -> bytes:
    """100,000 boxes, each in the one before."""
    depth = 100_000
    sizes = [8 * (depth - level) for level in range(depth)]
    data = b"".join(u32(size) + b"trak" for size in sizes)
    return FTYP + box(b"moov", header(1, 30), data) + box(b"mdat", key_frame())


def many_streams() -> bytes:
    """2,999 H.264 tracks."""
    entry = sample_entry(b"avc1", 16, 16, avc_header())
    return mp4(
        lambda begin: b"".join(
            track(entry, num_samples=2, sizes=len(key_frame()), offset=begin, number=number)
            for number in range(1, 3000)
        ),
        key_frame() * 2,
    )


def many_mkv_streams() -> bytes:
    """5,000 entries of tracks; the first holds two frames."""
    tracks = [
        mkv_track(b"V_MPEG4/ISO/AVC", ebml(b"\x63\xa2", avc_header()[8:]), number=1 + n % 120) for n in range(5000)
    ]
    return matroska(ebml(b"\x16\x54\xae\x6b", *tracks), mkv_blocks(key_frame(), 3))


def mkv_private() -> bytes:
    """A codec header that claims 250 MB."""
    private = ebml(b"\x63\xa2", b"\1" * 100, claimed=250_000_000)
    return matroska(ebml(b"\x16\x54\xae\x6b", mkv_track(b"V_MPEG4/ISO/AVC", private)), mkv_blocks(b"x", 3))


def mkv_zlib() -> bytes:
    """100 packets that inflate to 9 MB each."""
    encoding = ebml(b"\x50\x34", ebml(b"\x42\x54", b"\x00"))
    coded = ebml(
        b"\x6d\x80",
        ebml(b"\x62\x40", ebml(b"\x50\x31", b"\x00"), ebml(b"\x50\x32", b"\x01"), ebml(b"\x50\x33", b"\x00"), encoding),
    )
    body = zlib.compress(bytes(9_000_000), 9)
    trk = mkv_track(b"V_MPEG4/ISO/AVC", ebml(b"\x63\xa2", avc_header()[8:]), more=coded)
    return matroska(ebml(b"\x16\x54\xae\x6b", trk), mkv_blocks(body, 100))


def metadata() -> bytes:
    """A title that claims 2 GB, in a box that claims the same."""
    text = box(b"\xa9nam", u32(0x7FFFFFFF), b"data", u32(1, 0), b"x" * 1000)
    lie = u32(0x7FFFFFF0) + b"meta" + u32(0) + full(b"hdlr", u32(0), b"mdir", bytes(13)) + box(b"ilst", text)
    return mp4(
        lambda begin: track(sample_entry(b"avc1", 16, 16, avc_header()), num_samples=1, sizes=[4], offset=begin),
        b"\0\0\0\0",
        extra=box(b"udta", lie),
    )


Refusal = tuple[Callable[[], bytes], type[MediaError], str]

BOMBS: dict[str, Refusal] = {
    "frame_8192": (frame_8192, MediaOverBudget, r"8192 x 8192 = 67,108,864 pixels are more than decode\.max_pixels"),
    "hour": (hour, MediaOverBudget, r"10\d,\d{3} or more frames to decode are more than decode\.max_frames = 60,000"),
    "five_hours": (five_hours, MediaOverBudget, r"18,000\.0 s are more than decode\.max_duration_s = 14,400"),
    "day_at_one_fps": (day_at_one_fps, MediaOverBudget, r"86,399\.0 s are more than decode\.max_duration_s = 14,400"),
    "sample_count": (sample_count, UndecodableVideo, "holds no packet of the video stream"),
    "fragment_count": (fragment_count, MediaOverBudget, r"100,000,000 samples are claimed by a file of [\d,]+ bytes"),
    "many_edits": (many_edits, MediaOverBudget, "an edit list of 20,000 entries repeats up to 3,000 samples each time"),
    "time_table": (time_table, UndecodableVideo, "no frame comes out of 2 h264 packets"),
    "png_in_mov": (png_in_mov, UndecodableVideo, r"no frame comes out of 1 png packets \(1 refused"),
    "jpeg_in_mov": (jpeg_in_mov, UndecodableVideo, r"no frame comes out of 1 mjpeg packets \(1 refused"),
    "gif": (gif, UndecodableVideo, "no frame comes out of 1 gif packets"),
    "apng": (apng, UnreadableContainer, "no video file of a known format"),
    "compressed_index": (compressed_index, MediaOverBudget, "the compressed index claims 2,000,000,000 bytes"),
    "deep_boxes": (deep_boxes, NoVideoStream, "no video stream"),
    "many_streams": (many_streams, MediaOverBudget, "the file has more than 100 tracks"),
    "mkv_private": (mkv_private, UndecodableVideo, "no frame comes out of 3 h264 packets"),
    "mkv_zlib": (
        mkv_zlib,
        MediaOverBudget,
        r"packets of a file of 878,\d{3} bytes take more than 4,\d{3},\d{3}: they are",
    ),
    "metadata": (metadata, UndecodableVideo, "no frame comes out of 1 h264 packets"),
}

LIES: dict[str, Callable[[], bytes]] = {"claimed_size": claimed_size, "many_mkv_streams": many_mkv_streams}
