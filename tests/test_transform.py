"""Views: geometry by hand, and against cutting first and resizing afterwards."""

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from decode_reference import moving, plain_decode
from kinoray.config.clip import Interpolation
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError
from kinoray.network import ClipRecipe, InputSpec
from kinoray.network.build import clip_for
from kinoray.video import transform
from kinoray.video.frames import decode
from kinoray.video.request import Views
from kinoray.video.transform import ReusedMemory, View, crop_views, train_view
from vcm_sdd.preprocess import preprocess

STRETCH = ViewConfig()
SHORT = ViewConfig(resize="short_side")


@pytest.mark.parametrize(
    ("config", "width", "height", "expected"),
    [
        pytest.param(STRETCH, 340, 256, View(256, 256, 16, 16, 224, False), id="stretch ignores the aspect"),
        pytest.param(STRETCH, 96, 96, View(256, 256, 16, 16, 224, False), id="stretch enlarges"),
        pytest.param(SHORT, 340, 256, View(256, 340, 16, 58, 224, False), id="landscape"),
        pytest.param(SHORT, 1280, 720, View(256, 455, 16, 115, 224, False), id="landscape 720p"),
        pytest.param(SHORT, 720, 1280, View(455, 256, 115, 16, 224, False), id="portrait"),
        pytest.param(SHORT, 10, 4000, View(102400, 256, 51088, 16, 224, False), id="very thin"),
    ],
)
def test_testing_takes_the_centre(config: ViewConfig, width: int, height: int, expected: View) -> None:
    assert transform.test_view(config, width, height) == expected


@pytest.mark.parametrize(
    ("config", "width", "height", "places"),
    [
        pytest.param(SHORT, 340, 256, [(16, 0), (16, 58), (16, 116)], id="landscape: left, centre, right"),
        pytest.param(SHORT, 256, 340, [(0, 16), (58, 16), (116, 16)], id="portrait: top, centre, bottom"),
        pytest.param(SHORT, 64, 64, [(16, 0), (16, 16), (16, 32)], id="square: left, centre, right"),
        pytest.param(STRETCH, 340, 256, [(16, 0), (16, 16), (16, 32)], id="stretched, landscape"),
        pytest.param(STRETCH, 256, 340, [(0, 16), (16, 16), (32, 16)], id="stretched, portrait"),
    ],
)
def test_three_crops_lie_along_the_longer_side(
    config: ViewConfig, width: int, height: int, places: list[tuple[int, int]]
) -> None:
    views = crop_views(config, width, height, "three")
    assert [(view.top, view.left) for view in views] == places
    assert views[1] == transform.test_view(config, width, height)
    assert {(view.height, view.width, view.size, view.flip) for view in views} == {
        (views[1].height, views[1].width, 224, False)
    }


def test_ten_crops_are_corners_and_centre_and_their_mirror_images() -> None:
    views = crop_views(SHORT, 340, 256, "ten")
    assert [(view.top, view.left) for view in views] == 2 * [(0, 0), (0, 116), (32, 0), (32, 116), (16, 58)]
    assert [view.flip for view in views] == 5 * [False] + 5 * [True]
    assert {(view.height, view.width, view.size) for view in views} == {(256, 340, 224)}
    assert crop_views(SHORT, 340, 256, "center") == [transform.test_view(SHORT, 340, 256)] == [views[4]]


@pytest.mark.parametrize(("width", "height"), [(320, 200), (200, 320), (256, 256)])
@pytest.mark.parametrize("config", [STRETCH, SHORT], ids=["stretch", "short_side"])
def test_training_crops_have_the_configured_sides(config: ViewConfig, width: int, height: int) -> None:
    """Undo the enlargement: the cut's sides, in pixels of the resized frame, are two neighbours of train_scales."""
    rng = np.random.default_rng(0)
    centre = transform.test_view(config, width, height)
    short = min(centre.height, centre.width)
    steps, flips = set(), 0
    for _ in range(600):
        view = train_view(config, width, height, rng)
        sides = (view.size * centre.height / view.height, view.size * centre.width / view.width)
        fractions = [side / short for side in sides]
        nearest = [int(np.argmin([abs(f - scale) for scale in config.train_scales])) for f in fractions]
        for fraction, which in zip(fractions, nearest, strict=True):
            assert fraction == pytest.approx(config.train_scales[which], rel=0.005)  # sizes are whole pixels
        steps.add((nearest[0], nearest[1]))
        flips += view.flip
        assert view.size == config.crop_px
    assert steps == {(a, b) for a in range(4) for b in range(4) if abs(a - b) <= 1}
    assert 240 < flips < 360


def test_training_crops_reach_every_place() -> None:
    config = ViewConfig(resize_px=20, crop_px=16, train_scales=(0.8,))  # enlarged to 20 px: 5 x 5 places
    rng = np.random.default_rng(0)
    views = [train_view(config, 64, 64, rng) for _ in range(500)]
    assert {(view.height, view.width) for view in views} == {(20, 20)}
    assert {(view.top, view.left) for view in views} == {(top, left) for top in range(5) for left in range(5)}


def test_flip_can_be_turned_off_without_changing_the_rest() -> None:
    with_flip = [train_view(STRETCH, 340, 256, np.random.default_rng(seed)) for seed in range(50)]
    without = [train_view(ViewConfig(train_flip=False), 340, 256, np.random.default_rng(seed)) for seed in range(50)]
    assert any(view.flip for view in with_flip)
    assert not any(view.flip for view in without)
    assert [(v.height, v.width, v.top, v.left) for v in with_flip] == [
        (v.height, v.width, v.top, v.left) for v in without
    ]


@pytest.mark.parametrize("config", [STRETCH, SHORT], ids=["stretch", "short_side"])
def test_a_view_is_cutting_first_and_resizing_afterwards(config: ViewConfig) -> None:
    """On a smooth picture both ways give the same pixels; the naive one rounds its cut to whole source pixels.

    Tolerance: half a source pixel of rounding at each edge times the steepest slope (1.3 levels a pixel), and one level
    for rounding to bytes.
    """
    width, height = 400, 300
    y, x = np.mgrid[0:height, 0:width]
    picture = 127 + 60 * np.sin(2 * np.pi * x / 400 + 1) + 50 * np.cos(2 * np.pi * y / 300)
    picture = picture.astype(np.float32)
    rng = np.random.default_rng(1)
    for _ in range(30):
        view = train_view(config, width, height, rng)
        scaled = cv2.resize(picture, (view.width, view.height), interpolation=cv2.INTER_LINEAR)
        ours = scaled[view.top : view.top + view.size, view.left : view.left + view.size]
        left, right = (round(edge * width / view.width) for edge in (view.left, view.left + view.size))
        top, bottom = (round(edge * height / view.height) for edge in (view.top, view.top + view.size))
        naive = cv2.resize(picture[top:bottom, left:right], (view.size, view.size), interpolation=cv2.INTER_LINEAR)
        assert np.abs(ours - naive).max() < 0.5 * 1.3 * 2 + 1


# Resizing as published networks were fed


@pytest.mark.parametrize(
    ("config", "width", "height", "expected"),
    [
        pytest.param(
            ViewConfig(resize_px=128, resize_width_px=171, crop_px=112, middle="even", interpolation="bilinear"),
            *(340, 256, View(128, 171, 8, 30, 112, False)),
            id="exact, half a pixel to the even side",
        ),
        pytest.param(
            ViewConfig(resize_px=128, resize_width_px=171, crop_px=112),
            *(340, 256, View(128, 171, 8, 29, 112, False)),
            id="exact, half a pixel down",
        ),
        pytest.param(
            replace(SHORT, interpolation="bilinear"),
            *(1366, 720, View(256, 485, 16, 130, 224, False)),
            id="the longer side is cut to whole pixels, 485.7",
        ),
        pytest.param(SHORT, 1366, 720, View(256, 486, 16, 131, 224, False), id="and rounded otherwise"),
    ],
)
def test_published_geometry(config: ViewConfig, width: int, height: int, expected: View) -> None:
    assert transform.test_view(config, width, height) == expected
    assert {view.height for view in crop_views(config, width, height, "ten")} == {expected.height}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize(("width", "height"), [(640, 360), (90, 160), (256, 256)])
def test_frames_are_resized_as_published_networks_were_fed(
    interpolation: Interpolation, antialias: bool, width: int, height: int
) -> None:
    """Against torchvision's words (vcm_sdd.preprocess), or Pillow itself for filters that torch does not have.

    Both round to whole grey levels, each in its own order, and OpenCV's weights are whole numbers.
    """
    recipe = ClipRecipe(
        resize="shortest",
        resize_px=(128, 128),
        crop_px=112,
        middle="even",
        interpolation=interpolation,
        antialias=antialias,
    )
    if not antialias and interpolation not in ("nearest", "bilinear", "bicubic"):
        with pytest.raises(ConfigError, match=f"view.antialias must be on with view.interpolation {interpolation}"):
            clip_for(InputSpec(recipe=recipe))
        return
    view = clip_for(InputSpec(recipe=recipe)).view
    cut = transform.test_view(view, width, height)
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 1.5)
    found = np.stack([transform.resized_cut(picture[..., channel], cut, view) for channel in range(3)])
    if interpolation in ("lanczos", "box", "hamming"):
        how = Image.Resampling[interpolation.upper()]
        whole = np.asarray(Image.fromarray(picture).resize((cut.width, cut.height), how))
        expected = np.moveaxis(whole[cut.rows, cut.columns], -1, 0)
    else:
        spec = InputSpec(rgb_mean=(0, 0, 0), rgb_std=(1, 1, 1), recipe=recipe)
        expected = np.rint(255 * preprocess(torch.from_numpy(picture)[None], spec)[0].numpy())
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= (2 if interpolation in ("bicubic", "lanczos") else 1)  # their weights fall below 0
    assert difference.mean() < 0.5


def test_decoded_frames_are_resized_from_rgb_as_large_as_the_video() -> None:
    """Every frame of a clip, in three crops, against a plain decode without scaling; the flow is of these frames."""
    data = make_video(moving(6, 80, 120))
    spec = InputSpec(recipe=ClipRecipe(frames=3, stride=2, resize="shortest", resize_px=(40, 40), crop_px=32))
    clip = clip_for(spec)
    found = list(decode(data, Views(views=ViewsConfig(crops="three")), clip).clips())
    plain = plain_decode(data, 80, 120)
    places = found[1].indices[0].tolist()
    assert places == [0, 2, 4]
    frames = torch.from_numpy(np.stack([np.moveaxis(plain[place], 0, -1) for place in places]))
    expected = 255 * preprocess(frames, replace(spec, rgb_mean=(0, 0, 0), rgb_std=(1, 1, 1))).numpy()
    assert np.abs(found[1].frames[0] - expected).max() <= 1.01
    assert found[1].flow is not None
    assert found[1].flow.shape == (1, 3, 2, 32, 32)
    assert not np.array_equal(found[0].frames, found[2].frames)
    (alone,) = decode(data, Views(views=ViewsConfig()), clip).clips()
    assert np.array_equal(alone.frames, found[1].frames)


@pytest.mark.parametrize(("top", "left"), [(-1, 0), (0, -1), (33, 0), (0, 77)])
def test_a_cut_outside_the_frame_is_refused(top: int, left: int) -> None:
    with pytest.raises(ValueError, match=r"not inside 256 x 300"):
        View(height=256, width=300, top=top, left=left, size=224, flip=False)


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 x 5"):
        transform.test_view(STRETCH, 0, 5)


@pytest.mark.parametrize(
    "hold",
    [lambda array: array, lambda array: array[1:2], torch.from_numpy, pa.array, memoryview],
    ids=["array", "view", "tensor", "arrow", "buffer"],
)
def test_memory_is_used_again_only_once_nobody_looks_at_it(hold: Callable[[np.ndarray], object]) -> None:
    memory = ReusedMemory()
    first = memory.empty("frames", [4], np.int64)
    first[:] = 1, 2, 3, 4
    place, held = first.ctypes.data, hold(first)
    del first
    other = memory.empty("frames", [4], np.int64)
    other[:] = 0
    assert other.ctypes.data != place
    kept = np.asarray(held)
    assert kept.tolist() == ([2] if len(kept) == 1 else [1, 2, 3, 4])

    place = other.ctypes.data
    del other
    assert memory.empty("frames", [2, 2], np.int32).ctypes.data == place
    assert memory.empty("flow", [4], np.int8).ctypes.data != place
