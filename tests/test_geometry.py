"""A picture is what a player shows: turned and mirrored by its display matrix, and with pixels that are not square."""

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from decode_reference import moving, plain_decode, with_matrix
from kinoray.config.shared import ClipConfig, DecodeConfig, FlowConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import MediaOverBudget
from kinoray.video.frames import decode, probe
from kinoray.video.info import VideoInfo
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.strips import jpeg_uri
from kinoray.video.transcode import open_output, transcode, x264_options
from test_torchcodec import needs_torchcodec

CONFIG = DecodeConfig()
FRAMES = moving(6)
SHOWN: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as it is": ((1, 0, 0, 1), lambda rows: rows),
    "left to right": ((-1, 0, 0, 1), lambda rows: rows[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda rows: rows[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda rows: rows[::-1, ::-1]),
    "a quarter clockwise": ((0, 1, -1, 0), lambda rows: rows.swapaxes(0, 1)[:, ::-1]),
    "a quarter counterclockwise": ((0, -1, 1, 0), lambda rows: rows.swapaxes(0, 1)[::-1]),
    "transposed": ((0, 1, 1, 0), lambda rows: rows.swapaxes(0, 1)),
    "transposed along the other diagonal": ((0, -1, -1, 0), lambda rows: rows.swapaxes(0, 1)[::-1, ::-1]),
}
"""(a, b, c, d) of the matrix, and what it does to a picture [h, w, 3]."""

every_way = pytest.mark.parametrize("way", list(SHOWN))
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not on this machine")


def pictures(data: bytes, config: ClipConfig | None = None) -> list[np.ndarray]:
    """The 6 frames as displayed, [h, w, 3] each, at their own size."""
    wanted = Thumbnails(num_frames=6, height=probe(data, CONFIG).height)
    return decode(data, wanted, config or ClipConfig()).pictures()


def by_ffmpeg(data: bytes, folder: Path) -> np.ndarray:
    """The first frame as ffmpeg turns it, [h, w, 3], at its own size."""
    path = folder / "a.mp4"
    path.write_bytes(data)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-frames:v", "1", "-f", "image2pipe", "-c:v", "ppm", "-"]
    return np.asarray(Image.open(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)))


@pytest.fixture(scope="module")
def plain() -> bytes:
    return make_video(FRAMES, gop=3)


@every_way
@pytest.mark.parametrize(("scale", "place"), [(1, (0, 0)), (2.5, (96, -64))], ids=["pure", "scaled and moved"])
def test_the_matrix_is_applied_whole(plain: bytes, way: str, scale: float, place: tuple[float, float]) -> None:
    linear, shown = SHOWN[way]
    data = with_matrix(plain, tuple(scale * value for value in linear), place)
    stored = [np.moveaxis(frame, 0, -1) for frame in plain_decode(plain, 64, 96)]
    for found, frame in zip(pictures(data), stored, strict=True):
        assert np.array_equal(found, shown(frame))


@needs_ffmpeg
@every_way
def test_it_is_what_ffmpeg_shows(plain: bytes, way: str, tmp_path: Path) -> None:
    data = with_matrix(plain, SHOWN[way][0])
    theirs, ours = by_ffmpeg(data, tmp_path), pictures(data)[0]
    assert theirs.shape == ours.shape
    # ffmpeg repeats chroma where we interpolate it; any other way is off by 25 and more
    assert np.abs(theirs.astype(int) - ours).mean() < 7 < 20 < np.abs(theirs[::-1].astype(int) - ours).mean()


@needs_torchcodec
@every_way
@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_the_other_back_ends_show_the_same(plain: bytes, way: str, backend: Any) -> None:
    data = with_matrix(plain, SHOWN[way][0])
    ours, theirs = pictures(data)[0], pictures(data, ClipConfig(decode=DecodeConfig(backend=backend)))[0]
    assert np.abs(ours.astype(int) - theirs).mean() < 7 < 20 < np.abs(ours[::-1].astype(int) - theirs).mean()


@every_way
def test_a_transcoded_video_is_shown_in_the_same_way(plain: bytes, way: str) -> None:
    data = with_matrix(plain, SHOWN[way][0])
    made = transcode(data, CONFIG)
    before = probe(data, CONFIG)
    for name in ("width", "height", "rotation", "mirrored"):
        assert getattr(made.info, name) == getattr(before, name)
    for ours, theirs in zip(pictures(data), pictures(made.data), strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 4


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("as it is", (1, 0)),
        ("left to right", (-1, 0)),
        ("upside down", (1, 0)),
        ("half a turn", (-1, 0)),
        ("a quarter clockwise", (0, 1)),
        ("a quarter counterclockwise", (0, -1)),
        ("transposed", (0, 1)),
        ("transposed along the other diagonal", (0, -1)),
    ],
)
def test_flow_goes_where_the_displayed_picture_goes(way: str, expected: tuple[int, int]) -> None:
    """Every stored frame is the one before, moved 2 pixels to the right."""
    scene = moving(1, height=96, width=120)[0]
    data = make_video(np.stack([scene[:, 20 - 2 * step : 116 - 2 * step] for step in range(4)]), options={"crf": "10"})
    clip = ClipConfig(
        sample=SampleConfig(num_segments=3, frames_per_segment=1),
        view=ViewConfig(resize="stretch", resize_px=96, crop_px=96),
        flow=FlowConfig(estimator="dis"),
    )
    flow = decode(with_matrix(data, SHOWN[way][0]), Sampled(), clip).clip().flow
    assert flow is not None
    x, y = (np.median(flow[:, 0, axis, 20:-20, 20:-20]) * clip.flow.bound_px / 127 for axis in (0, 1))
    assert (x, y) == pytest.approx((2 * expected[0], 2 * expected[1]), abs=0.5)


# Pixels that are not square


def with_ratio(ratio: str, frames: np.ndarray = FRAMES, container: str = "mp4", codec: str = "libx264") -> bytes:
    """A video that says of its pixels that they are so wide by so high."""
    buffer = io.BytesIO()
    with open_output(buffer, container) as output:
        stream = output.add_stream(codec, rate=12, options=x264_options({}) if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(ratio)
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("1", (96, 64)),
        ("64/45", (137, 64)),
        ("16/9", (171, 64)),
        ("8/9", (85, 64)),
        ("1/4", (24, 64)),
        ("16", (1536, 64)),
        ("1/16", (6, 64)),
        ("17", (96, 64)),
        ("1/10000", (96, 64)),
        ("10000", (96, 64)),
    ],
)
def test_the_size_is_that_of_the_displayed_picture(ratio: str, size: tuple[int, int]) -> None:
    """Beyond 16 it is no pixel: taken as square."""
    info = probe(with_ratio(ratio), CONFIG)
    assert (info.width, info.height) == size


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mov", "mpeg4")],
)
def test_container_and_codec_may_both_say_it(container: str, codec: str) -> None:
    info = probe(with_ratio("4/3", moving(6, 72, 96), container, codec), CONFIG)
    assert (info.width, info.height) == (128, 72)


def test_the_ratio_is_that_of_stored_pixels_so_it_turns_with_them() -> None:
    data = with_matrix(with_ratio("4/3"), (0, 1, -1, 0))
    info = probe(data, CONFIG)
    assert (info.width, info.height) == (64, 128)
    upright = np.moveaxis(plain_decode(with_ratio("4/3"), 64, 128)[0], 0, -1)
    assert np.array_equal(pictures(data)[0], np.rot90(upright, -1))


VIEW = ViewConfig(resize="short_side", resize_px=32, crop_px=32)
CLIP = ClipConfig(sample=SampleConfig(num_segments=6, frames_per_segment=1), view=VIEW).without_flow()


def middle(frames: list[np.ndarray]) -> np.ndarray:
    """The middle 32 columns of frames [3, 32, w]."""
    left = round((frames[0].shape[2] - 32) / 2)
    return np.stack(frames)[..., left : left + 32]


def seen(data: bytes, clip: ClipConfig = CLIP) -> np.ndarray:
    """uint8 [6, 3, 32, 32]."""
    return decode(data, Sampled(), clip).clip().frames[:, 0]


def test_the_short_side_is_that_of_the_displayed_picture() -> None:
    data = with_ratio("16/9")
    assert np.array_equal(seen(data), middle(plain_decode(data, 32, round(171 / 2))))
    tall = with_ratio("1/2")  # 48 x 64
    expected = np.stack(plain_decode(tall, 43, 32))[:, :, 5:37]
    assert np.array_equal(seen(tall), expected)


def test_stretched_pictures_are_the_same_for_any_ratio() -> None:
    stretch = replace(CLIP, view=replace(VIEW, resize="stretch"))
    assert np.array_equal(seen(with_ratio("16/9"), stretch), seen(with_ratio("1"), stretch))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_other_interpolations_see_square_pixels(interpolation: Any) -> None:
    clip = replace(CLIP, view=replace(VIEW, interpolation=interpolation))
    found = seen(with_ratio("2"), clip).astype(int)
    assert np.abs(found - middle(plain_decode(with_ratio("2"), 32, 96))).mean() < 3
    assert np.abs(found - seen(with_ratio("1"), clip)).mean() > 8


def test_square_or_unknown_pixels_change_no_bit(plain: bytes) -> None:
    said = with_ratio("1")
    assert b"pasp" in said
    assert b"pasp" not in plain
    for data in (said, plain):
        assert np.array_equal(seen(data), middle(plain_decode(data, 32, 48)))
    absurd = with_ratio("1/10000")
    assert np.array_equal(seen(absurd), middle(plain_decode(absurd, 32, 48)))


@needs_torchcodec
@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_all_back_ends_see_square_pixels(backend: Any) -> None:
    data = with_ratio("16/9")
    theirs = seen(data, replace(CLIP, decode=DecodeConfig(backend=backend))).astype(int)
    assert np.abs(theirs - seen(data)).mean() < 5


def test_a_wide_frame_of_wide_pixels_is_refused_before_it_is_made() -> None:
    data = with_ratio("16", moving(2, height=16, width=4096))
    with pytest.raises(MediaOverBudget, match=r"view\.resize=stretch keeps it small"):
        decode(data, Sampled(), replace(CLIP, view=ViewConfig(resize="short_side", resize_px=224, crop_px=224)))


def test_a_strip_shows_the_displayed_shape() -> None:
    (frame,) = decode(with_ratio("16/9"), Thumbnails(num_frames=1, height=48), ClipConfig()).pictures()
    assert (jpeg_uri(frame).width, jpeg_uri(frame).height) == (128, 48)


@pytest.mark.parametrize("ratio", ["16/9", "8/9", "1/2", "40/27"])
@pytest.mark.parametrize(("height", "width"), [(120, 96), (288, 360)])
def test_a_transcoded_video_keeps_the_ratio(ratio: str, height: int, width: int) -> None:
    data = with_ratio(ratio, moving(2, height, width))
    made = transcode(data, CONFIG)
    with av.open(io.BytesIO(made.data)) as container:
        stream = container.streams.video[0]
        assert stream.sample_aspect_ratio == stream.codec_context.sample_aspect_ratio == Fraction(ratio)
    before = probe(data, CONFIG)
    assert shape(made.info) == pytest.approx(shape(before), rel=0.02)


def shape(info: VideoInfo) -> float:
    """Width by height."""
    return info.width / info.height


def test_a_transcoded_video_of_square_pixels_says_nothing_of_them(plain: bytes) -> None:
    assert b"pasp" not in transcode(plain, CONFIG).data
