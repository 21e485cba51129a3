"""Transcoding keeps every frame at its time, gives the same bytes again, and refuses what cannot be kept."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from decode_reference import moving, plain_decode
from kinoray.config.shared import DecodeConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import EmptyMedia, MediaOverBudget, NoVideoStream, UndecodableVideo, UnreadableContainer
from kinoray.video.frames import probe
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.transcode import TRANSCODE, TranscodeSettings, transcode

CONFIG = DecodeConfig()
FRAMES = moving(40, height=96, width=128)


def times(data: bytes) -> list[float]:
    """When each frame is shown, by the packets, from the first on."""
    with av.open(io.BytesIO(data)) as container:
        shown = sorted(float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.size)
    return [time - shown[0] for time in shown]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"gop": 250},
        {"fps": Fraction(30000, 1001)},
        {"pts": [*range(10), *range(15, 35), *range(50, 60)]},
        {"container": "matroska"},
        {"container": "mpegts"},
        {"container": "webm", "codec": "libvpx-vp9"},
        {"pix_fmt": "yuvj420p"},
        {"pix_fmt": "yuv444p"},
        {"rotation": 90},
        {"container": "avi", "codec": "mpeg4"},
    ],
    ids=str,
)
def test_every_frame_stays_at_its_time_and_looks_the_same(how: dict[str, Any]) -> None:
    data = make_video(FRAMES, **how)
    made = transcode(data, CONFIG)
    before, after = probe(data, CONFIG), made.info
    assert made.frames_lost == 0
    assert after == probe(made.data, CONFIG)
    assert (after.codec, after.num_frames, after.rotation) == ("h264", 40, before.rotation)
    assert (after.width, after.height) == (before.width, before.height)
    assert after.duration_s == pytest.approx(before.duration_s, abs=1 / before.fps)
    if how.get("container") != "avi":  # which has no times
        assert times(made.data) == pytest.approx(times(data), abs=2e-3)
    difference = np.abs(np.stack(plain_decode(data)).astype(int) - np.stack(plain_decode(made.data)))
    assert difference.mean() < 4  # grey levels; another frame of this scene differs by 20
    assert difference.mean(axis=(1, 2, 3)).max() < 8


def test_frames_of_the_scene_do_differ_by_more_than_that() -> None:
    frames = np.stack(plain_decode(make_video(FRAMES))).astype(int)
    assert np.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3)).min() > 8


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1280, 720, (454, 256)),
        (720, 1280, (256, 454)),
        (300, 300, (256, 256)),
        (340, 256, (340, 256)),
        (64, 48, (64, 48)),
        (65, 49, (64, 48)),
        (1000, 16, (1000, 16)),
    ],
)
def test_the_short_side_is_at_most_256_and_nothing_is_enlarged(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    data = make_video(np.zeros((3, height, width, 3), np.uint8), pix_fmt="yuv444p")
    info = transcode(data, CONFIG).info
    assert (info.width, info.height) == expected


def test_the_result_is_short_groups_of_plain_h264_without_sound() -> None:
    with av.open(io.BytesIO(transcode(make_video(FRAMES, gop=250), CONFIG).data)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        keys = [index for index, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert max(np.diff([*keys, 40])) <= TRANSCODE.gop == 12


def test_the_same_bytes_come_out_again() -> None:
    data = make_video(moving(30, height=256, width=340), gop=250)
    made = transcode(data, CONFIG)
    assert all(transcode(data, CONFIG).data == made.data for _ in range(5))
    with Sandbox(1) as sandbox:
        assert sandbox.transcode(data, CONFIG) == made
    assert transcode(data, CONFIG, TranscodeSettings(crf=30)).data != made.data
    assert TranscodeSettings(crf=30).digest != TRANSCODE.digest


def test_a_large_video_becomes_small() -> None:
    data = make_video(moving(20, height=720, width=1280), gop=250)
    assert len(transcode(data, CONFIG).data) < len(data) / 4


def test_what_is_no_video_is_refused_as_by_the_probe() -> None:
    good = make_video(FRAMES)
    for kind, error in (
        ("empty", EmptyMedia),
        ("random", UnreadableContainer),
        ("index_lost", UnreadableContainer),
        ("audio_only", NoVideoStream),
    ):
        with pytest.raises(error):
            transcode(make_broken(kind, good), CONFIG)
    with pytest.raises(MediaOverBudget, match=r"40 frames to decode are more than decode\.max_frames = 39"):
        transcode(good, DecodeConfig(max_frames=39))
    with pytest.raises(MediaOverBudget, match=r"decode\.max_pixels"):
        transcode(good, DecodeConfig(max_pixels=100))


def spoilt(num_spoilt: int) -> bytes:
    """100 key frames of MPEG-4, the first few of the last hundred overwritten with zeros: these do not decode."""
    data = bytearray(make_video(moving(100), codec="mpeg4", gop=1))
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[10 : 10 + num_spoilt]:
        data[position : position + size] = bytes(size)
    return bytes(data)


def test_a_few_lost_frames_are_counted_and_many_are_too_many() -> None:
    whole = transcode(spoilt(0), CONFIG)
    assert (whole.frames_lost, whole.info.num_frames) == (0, 100)
    made = transcode(spoilt(6), CONFIG)
    assert (made.frames_lost, made.info.num_frames) == (6, 94)
    assert made.info.duration_s == pytest.approx(whole.info.duration_s)
    with pytest.raises(UndecodableVideo, match="20 of 100 frames cannot be decoded"):
        transcode(spoilt(20), CONFIG)
