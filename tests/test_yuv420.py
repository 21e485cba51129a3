"""decode.frames=yuv420: I420 is what libav makes of the whole frame, cut; RGB from it is what the standard says."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from decode_reference import moving
from kinoray.catalog.table import load_catalog, read_videos, references
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    DecodeConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    SampleConfig,
    ViewConfig,
)
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.network.batch import VideoBatch, collate, model_inputs, yuv420_to_rgb
from kinoray.network.checkpoint import find_checkpoint, load_meta, load_model
from kinoray.storage.objects import Storage
from kinoray.train.augment import Augmenter
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.runfolder import read_metrics
from kinoray.train.verb import train
from kinoray.video.bank import decode_bank
from kinoray.video.clip import Clip, decode_clip, thumbnails
from kinoray.video.colour import chroma_to_centre, to_bt601
from kinoray.video.flow_dis import dis_flow, quantise
from kinoray.video.protocol import PROTOCOLS, ViewsConfig
from kinoray.video.sample import clip_rng, segment_indices, view_indices
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.sink import clip_frame_bytes, i420_planes, mirror
from kinoray.video.transform import View, crop_views, test_view, train_view
from kinoray.video.views import decode_views
from label_models import save_untrained
from small_sets import set_in
from tiny_models import OWN_NETWORKS, Spec

YUV = DecodeConfig(frames="yuv420")
CLIP = ClipConfig(
    sample=SampleConfig(num_segments=2, frames_per_segment=3),
    decode=YUV,
    view=ViewConfig(resize="short_side", resize_px=36, crop_px=30),
)
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]


# Independent references: libav on whole frames, and the standard in float64


def quarter_right(chroma: np.ndarray) -> np.ndarray:
    """Catmull-Rom at x + 1/4 with repeated edges, rounded half to even; the weights times 128 are whole numbers."""
    padded = np.pad(chroma.astype(np.int64), ((0, 0), (1, 2)), mode="edge")
    width = chroma.shape[1]
    weights = (-9, 111, 29, -3)
    total = sum(weight * padded[:, k : k + width] for k, weight in enumerate(weights))
    return np.clip(np.rint(total / 128), 0, 255).astype(np.uint8)


def plain_yuv(data: bytes, height: int, width: int, *, turns: int = 0, left_sited: bool = True) -> list[Planes]:
    """Every frame of the file: decoded one after the other, scaled by libav to 4:2:0, then turned."""
    frames = []
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(video=0):
            stored = (height, width) if turns % 2 else (width, height)
            scaled = frame.reformat(*stored, format="yuv420p", interpolation="BILINEAR")
            y, u, v = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in scaled.planes]
            if left_sited:
                u, v = quarter_right(u), quarter_right(v)
            frames.append(tuple(np.rot90(plane, turns) for plane in (y, u, v)))
    return frames  # type: ignore[return-value]


def cut_out(planes: Planes, view: View) -> np.ndarray:
    """The view's part as I420, written out by hand: the rows of Y, then U, then V, packed."""
    parts = []
    for plane, share in zip(planes, (1, 2, 2), strict=True):
        top, left, size = view.top // share, view.left // share, view.size // share
        part = plane[top : top + size, left : left + size]
        parts.append((part[:, ::-1] if view.flip else part).reshape(-1))
    return np.concatenate(parts).reshape(view.size * 3 // 2, view.size)


def float_rgb(frame: np.ndarray) -> np.ndarray:
    """I420 [H * 3 / 2, W] -> RGB, float64 [3, H, W] before rounding: ITU-R BT.601, chroma between four neighbours."""
    height, width = frame.shape[0] * 2 // 3, frame.shape[1]
    flat = frame.reshape(-1).astype(np.float64)
    y = (flat[: height * width].reshape(height, width) - 16) / 219

    def upsampled(plane: np.ndarray) -> np.ndarray:
        def line(values: np.ndarray) -> np.ndarray:
            places = np.clip((np.arange(2 * len(values)) + 0.5) / 2 - 0.5, 0, len(values) - 1)
            return np.interp(places, np.arange(len(values)), values)

        return np.apply_along_axis(line, 1, np.apply_along_axis(line, 0, plane))

    small = (flat[height * width :].reshape(2, height // 2, width // 2) - 128) / 224
    pb, pr = upsampled(small[0]), upsampled(small[1])
    red, blue = y + 1.402 * pr, y + 1.772 * pb
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    return np.clip(255 * np.stack([red, green, blue]), 0, 255)


def scenery(num_frames: int = 4, height: int = 256, width: int = 340) -> np.ndarray:
    """What photographs are like: most of the energy in large smooth parts, some edges of strong colours."""
    rng = np.random.default_rng(0)
    total = np.zeros((height + 60, width + 60, 3), np.float32)
    for sigma, share in ((24, 1.0), (8, 0.5), (2.5, 0.22), (1, 0.08)):
        noise = cv2.GaussianBlur(rng.normal(size=total.shape).astype(np.float32), (0, 0), sigma)
        grey = noise.mean(axis=2, keepdims=True)
        total += share / noise.std() * (1.2 * grey + 0.5 * (noise - grey))
    canvas = np.clip(128 + 46 * total, 0, 255).astype(np.uint8)
    cv2.circle(canvas, (150, 120), 50, (200, 60, 40), -1, cv2.LINE_AA)
    cv2.rectangle(canvas, (220, 160), (300, 220), (30, 80, 190), -1)
    return np.stack([canvas[5 * k : 5 * k + height, 4 * k : 4 * k + width] for k in range(num_frames)])


# What decoding gives


@pytest.mark.parametrize(
    ("options", "turns", "left_sited"),
    [
        pytest.param({"gop": 12}, 0, True, id="h264"),
        pytest.param({"codec": "libvpx-vp9", "container": "webm"}, 0, False, id="vp9, centred chroma"),
        pytest.param({"rotation": 90}, 1, True, id="turned by 90 degrees"),
        pytest.param({"rotation": 180}, 2, True, id="turned by 180 degrees"),
        pytest.param({"rotation": -90}, 3, True, id="turned by 270 degrees"),
        pytest.param({"pix_fmt": "yuv420p10le"}, 0, True, id="10 bit"),
    ],
)
def test_frames_are_the_whole_frames_that_libav_scales_cut_at_even_places(
    options: dict[str, Any], turns: int, left_sited: bool
) -> None:
    data = make_video(moving(20, 44, 70), **options)
    width, height = (44, 70) if turns % 2 else (70, 44)
    flips = set()
    for rng_of in (lambda: None, *(lambda seed=seed: np.random.default_rng(seed) for seed in range(6))):
        clip = decode_clip(data, CLIP, with_flow=True, rng=rng_of())
        rng = rng_of()
        view = test_view(CLIP.view, width, height, 2) if rng is None else _drawn_view(clip, rng, width, height)
        flips.add(view.flip)
        whole = plain_yuv(data, view.height, view.width, turns=turns, left_sited=left_sited)
        assert len(whole) == clip.num_frames
        assert clip.frames.shape == (2, 3, 45, 30)
        for place, index in np.ndenumerate(clip.indices):
            assert np.array_equal(clip.frames[place], cut_out(whole[index], view))
            start = index if index + 1 < len(whole) else index - 1
            straight = replace(view, flip=False)
            pair = [np.ascontiguousarray(cut_out(whole[t], straight)[:30]) for t in (start, start + 1)]
            flow = quantise(dis_flow(*pair, CLIP.flow.preset), CLIP.flow.bound_px)
            if view.flip:
                flow = flow[..., ::-1] * np.array([-1, 1], np.int8)[:, None, None]
            assert clip.flow is not None
            assert np.array_equal(clip.flow[place], flow)
    assert flips == {False, True}


def _drawn_view(clip: Clip, rng: np.random.Generator, width: int, height: int) -> View:
    """The view that decoding drew, after it drew the frames."""
    assert np.array_equal(segment_indices(clip.num_frames, CLIP.sample, rng), clip.indices)
    return train_view(CLIP.view, width, height, rng, 2)


def test_a_quarter_to_the_right_is_what_the_weights_say() -> None:
    chroma = np.random.default_rng(0).integers(0, 256, (40, 33)).astype(np.uint8)
    assert np.array_equal(chroma_to_centre(chroma), quarter_right(chroma))
    ramp = np.tile(np.arange(10, 250, 4, dtype=np.uint8), (3, 1))
    assert np.array_equal(chroma_to_centre(ramp)[:, 2:-2], ramp[:, 2:-2] + 1)  # 4 a sample, so 1 a quarter


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("colorspace", "kr", "kb"), [(1, 0.2126, 0.0722), (9, 0.2627, 0.0593), (2, 0.299, 0.114)])
def test_colours_of_another_standard_are_those_of_the_same_light(
    colorspace: int, kr: float, kb: float, full_range: bool
) -> None:
    """Flat fields of any colour, from the standard's definition in float64, both ways, within half a level."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        stored = rng.integers((40, 90, 90), (200, 166, 166))
        y, pb, pr = (stored - (0, 128, 128)) / 255 if full_range else (stored - (16, 128, 128)) / (219, 224, 224)
        red, blue = y + 2 * (1 - kr) * pr, y + 2 * (1 - kb) * pb
        green = (y - kr * red - kb * blue) / (1 - kr - kb)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.772, 128 + 224 * (red - luma) / 1.402)
        planes = [
            np.full(shape, value, np.uint8) for shape, value in zip(((8, 6), (4, 3), (4, 3)), stored, strict=True)
        ]
        found = to_bt601((planes[0], planes[1], planes[2]), colorspace, full_range=full_range)
        for plane, like, value in zip(found, planes, expected, strict=True):
            assert (plane.dtype, plane.shape) == (np.uint8, like.shape)
            assert np.abs(plane - value).max() <= 0.5 + 1e-4


def test_colours_are_converted_on_one_thread() -> None:
    cv2.setNumThreads(2)
    planes = np.zeros((8, 6), np.uint8), np.zeros((4, 3), np.uint8), np.zeros((4, 3), np.uint8)
    to_bt601(planes, 1, full_range=False)
    assert cv2.getNumThreads() == 1


@pytest.mark.parametrize("config", [ViewConfig(resize="short_side"), ViewConfig(resize_px=36, crop_px=30)])
@pytest.mark.parametrize(("width", "height"), [(341, 257), (257, 341), (64, 64), (1920, 1079)])
def test_views_of_step_two_are_even_and_next_to_those_of_step_one(config: ViewConfig, width: int, height: int) -> None:
    for seed in range(40):
        even = train_view(config, width, height, np.random.default_rng(seed), 2)
        plain = train_view(config, width, height, np.random.default_rng(seed))
        assert not any(number % 2 for number in (even.height, even.width, even.top, even.left))
        assert abs(even.height - plain.height) <= 2
        assert abs(even.width - plain.width) <= 2
        assert even.flip == plain.flip
    for view, near in zip(
        crop_views(config, width, height, "ten", 2), crop_views(config, width, height, "ten"), strict=True
    ):
        assert not any(number % 2 for number in (view.height, view.width, view.top, view.left))
        assert max(abs(view.top - near.top), abs(view.left - near.left)) <= 2


# What the device makes of it


def test_the_conversion_is_the_standard_computed_in_float64() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 3, 24, 20)).astype(np.uint8)
    rgb = yuv420_to_rgb(torch.from_numpy(frames)).numpy()
    assert (rgb.dtype, rgb.shape) == (np.uint8, (2, 3, 3, 16, 20))
    for place in np.ndindex(2, 3):
        exact = float_rgb(frames[place])
        assert np.abs(rgb[place] - exact).max() <= 0.5 + 1e-3  # rounded, from float32
    black, white = np.full((1, 24, 16), 128, np.uint8), np.full((1, 24, 16), 128, np.uint8)
    black[:, :16], white[:, :16] = 16, 235
    assert yuv420_to_rgb(torch.from_numpy(black)).unique().tolist() == [0]
    assert yuv420_to_rgb(torch.from_numpy(white)).unique().tolist() == [255]


def test_many_frames_are_converted_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinoray.network.batch._CONVERTED_PIXELS", 600)
    frames = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 2, 24, 16)).astype(np.uint8))
    together = yuv420_to_rgb(frames)
    assert torch.equal(together, torch.stack([yuv420_to_rgb(one) for one in frames]))
    assert yuv420_to_rgb(frames[:0]).shape == (0, 2, 3, 16, 16)


def test_a_mirrored_or_turned_frame_becomes_the_mirrored_or_turned_picture() -> None:
    """Exactly, chroma included: that is why chroma lies in the middle of its pixels."""
    frame = np.random.default_rng(2).integers(0, 256, (24, 16)).astype(np.uint8)
    rgb = yuv420_to_rgb(torch.from_numpy(frame)).numpy()
    other = frame[None].copy()
    mirror(other)
    assert not np.array_equal(other[0], frame)
    assert np.array_equal(yuv420_to_rgb(torch.from_numpy(other[0])).numpy(), rgb[..., ::-1])
    turned = np.concatenate([np.rot90(plane).reshape(-1) for plane in i420_planes(frame)]).reshape(24, 16)
    assert np.array_equal(yuv420_to_rgb(torch.from_numpy(turned)).numpy(), np.rot90(rgb, axes=(1, 2)))


MATRIX = "colormatrix="
COLOURS: dict[str, tuple[dict[str, Any], float]] = {  # of a file; the largest mean difference in grey levels
    "untagged": ({}, 0.8),
    "bt601": ({"options": {"x264-params": MATRIX + "smpte170m"}}, 0.8),
    "bt709": ({"options": {"x264-params": MATRIX + "bt709"}}, 1.0),
    "bt709, full range": ({"options": {"x264-params": MATRIX + "bt709:fullrange=on"}}, 1.0),
    "bt2020": ({"options": {"x264-params": MATRIX + "bt2020nc"}}, 1.0),
    "smpte 240m": ({"options": {"x264-params": MATRIX + "smpte240m"}}, 1.0),
    "fcc": ({"options": {"x264-params": MATRIX + "fcc"}}, 1.0),
    "full range": ({"options": {"x264-params": "fullrange=on"}}, 1.0),
    "jpeg": ({"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"}, 1.0),
    "10 bit": ({"pix_fmt": "yuv420p10le"}, 0.9),
    "vp9": ({"codec": "libvpx-vp9", "container": "webm"}, 0.8),
    "4:4:4": ({"pix_fmt": "yuv444p"}, 1.3),  # its chroma loses half of its lines and columns
    "rgb": ({"codec": "ffv1", "container": "matroska", "pix_fmt": "bgr0"}, 1.5),
    "grey": ({"codec": "ffv1", "container": "matroska", "pix_fmt": "gray"}, 0.4),
}


@pytest.mark.parametrize("name", COLOURS)
def test_pictures_are_those_of_rgb_within_a_grey_level_in_all_colours_of_files(name: str) -> None:
    """Edges of strong colours differ most: up to 40 levels (85 from 4:4:4), in less than one pixel of a thousand 20."""
    options, mean = COLOURS[name]
    data = make_video(scenery(), **options)
    config = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2))
    expected = decode_clip(data, config, with_flow=False).frames.astype(int)
    found = decode_clip(data, replace(config, decode=YUV), with_flow=False).frames
    error = yuv420_to_rgb(torch.from_numpy(found)).numpy().astype(int) - expected
    full_chroma = name in ("4:4:4", "rgb")
    assert np.abs(error).mean() <= mean
    assert np.abs(error).max() <= (95 if full_chroma else 45)
    assert np.quantile(np.abs(error), 0.999) <= (45 if full_chroma else 20)
    assert np.abs(error.mean(axis=(0, 1, 3, 4))).max() <= 0.3  # no colour is brighter or darker as a whole


def test_a_batch_takes_either_kind_and_its_inputs_are_those_of_the_converted_frames() -> None:
    data = make_video(moving(20, 44, 70))
    clips = [decode_clip(data, CLIP, with_flow=True, rng=np.random.default_rng(seed)) for seed in range(3)]
    batch = collate(clips)
    assert batch.rgb is None
    assert batch.yuv is not None
    assert (len(batch), batch.yuv.shape) == (3, (3, 2, 3, 45, 30))
    rgb = VideoBatch(rgb=yuv420_to_rgb(batch.yuv), flow=batch.flow)
    spec = Spec(flow_channels=2)
    for some in (slice(0, 2), torch.tensor([2, 0])):
        one, other = (model_inputs(each.select(some), spec, "cpu") for each in (batch, rgb))
        for name in ("rgb", "flow"):
            assert torch.equal(one[name], other[name])  # type: ignore[arg-type]
    augmenter = Augmenter(AugmentConfig(colour_jitter=0.4, randaugment_ops=2), 0, torch.device("cpu"))
    coloured = [augmenter.colour(each, ["a", "b", "c"], 1).rgb for each in (batch, rgb)]
    assert torch.equal(coloured[0], coloured[1])  # type: ignore[arg-type]


def test_a_batch_refuses_what_is_no_i420() -> None:
    yuv, flow = torch.zeros(1, 2, 3, 24, 16, dtype=torch.uint8), torch.zeros(1, 2, 3, 2, 16, 16, dtype=torch.int8)
    rgb = torch.zeros(1, 2, 3, 3, 16, 16, dtype=torch.uint8)
    VideoBatch(rgb=None, flow=flow, yuv=yuv)
    with pytest.raises(ModelError, match="its frames once, got rgb and yuv"):
        VideoBatch(rgb=rgb, flow=None, yuv=yuv)
    with pytest.raises(ModelError, match=r"batch\.yuv must be uint8 \[B, S, T, H \* 3 / 2, W\], got uint8 .*25, 16\]"):
        VideoBatch(rgb=None, flow=None, yuv=torch.zeros(1, 2, 3, 25, 16, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"batch\.yuv must be uint8 .* got float32"):
        VideoBatch(rgb=None, flow=None, yuv=yuv.float())
    with pytest.raises(ModelError, match=r"batch\.yuv and batch\.flow must agree in B, S, T, H, W"):
        VideoBatch(rgb=None, flow=flow[..., :8], yuv=yuv)
    with pytest.raises(ModelError, match="needs rgb, but the batch has none"):
        model_inputs(VideoBatch(rgb=None, flow=flow), Spec(), "cpu")


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DecodeConfig(frames="yuv420", backend="decord"),
            "decode.frames must be rgb with decode.backend decord",
        ),
        (lambda: DecodeConfig(frames="yuv420", backend="torchcodec"), "decode.frames must be rgb with decode.backend"),
        (lambda: ClipConfig(decode=YUV, view=ViewConfig(crop_px=111)), "view.crop_px must be even with decode.frames"),
        (lambda: ClipConfig(decode=YUV, view=ViewConfig(resize_px=257)), "view.resize_px must be even with decode"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# Everything else that decodes


def test_thumbnails_stay_rgb() -> None:
    data = make_video(moving(20, 44, 70))
    for one, other in zip(thumbnails(data, YUV, 3, 21), thumbnails(data, DecodeConfig(), 3, 21), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "views", [ViewsConfig(temporal=3, crops="three"), ViewsConfig(temporal=2, crops="ten")], ids=["3x3", "2x10"]
)
def test_views_of_one_reading_are_cuts_of_whole_frames(views: ViewsConfig) -> None:
    data = make_video(moving(31, 44, 70), gop=12)
    found = decode_views(data, CLIP, views, with_flow=True)
    cuts = crop_views(CLIP.view, 70, 44, views.crops, 2)
    whole = plain_yuv(data, cuts[0].height, cuts[0].width)
    clips = iter(found.clips())
    for indices in view_indices(31, CLIP.sample, views.temporal):
        for cut in cuts:
            clip = next(clips)
            assert np.array_equal(clip.indices, indices)
            for place, index in np.ndenumerate(indices):
                assert np.array_equal(clip.frames[place], cut_out(whole[index], cut))
    assert next(clips, None) is None
    (centre,) = decode_views(data, CLIP, ViewsConfig(), with_flow=True).clips()
    alone = decode_clip(data, CLIP, with_flow=True)
    assert np.array_equal(centre.frames, alone.frames)
    assert np.array_equal(centre.flow, alone.flow)  # type: ignore[arg-type]


def test_a_decoder_process_hands_over_the_same_half_as_many_bytes() -> None:
    data = make_video(moving(20, 44, 70))
    with Sandbox(1) as sandbox:
        for seed in (0, 1):
            here = decode_clip(data, CLIP, with_flow=True, rng=np.random.default_rng(seed))
            there = sandbox.decode_clip(data, CLIP, with_flow=True, rng=np.random.default_rng(seed))
            assert np.array_equal(here.frames, there.frames)
            assert np.array_equal(here.flow, there.flow)  # type: ignore[arg-type]
        rgb = sandbox.decode_clip(data, replace(CLIP, decode=DecodeConfig()), with_flow=False)
        assert 2 * there.frames.nbytes == rgb.frames.nbytes
        ten = ViewsConfig(temporal=2, crops="ten")
        pairs = zip(
            sandbox.decode_views(data, CLIP, ten, with_flow=False).clips(),
            decode_views(data, CLIP, ten, with_flow=False).clips(),
            strict=True,
        )
        assert all(np.array_equal(one.frames, other.frames) for one, other in pairs)


def test_a_bank_and_a_cache_give_the_bytes_that_decoding_gives(tmp_path: Path) -> None:
    grids = [SampleConfig(num_segments=count, frames_per_segment=2) for count in (1, 2, 4)]
    data = make_video(moving(20, 44, 70))
    (tmp_path / "v.mp4").write_bytes(data)
    row = {"video_id": "v", "uri": str(tmp_path / "v.mp4"), "offset": None, "length": None, "sha256": None, "row": 0}
    names = {"video_id": pa.string(), "uri": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    names |= {"time_start_s": pa.float64(), "time_end_s": pa.float64()}
    block = pa.Table.from_pylist([row], schema=pa.schema({**names, "sha256": pa.string(), "row": pa.int64()}))
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), grids=("1x2", "2x2", "4x2"))
    for epoch in (None, 1, 2):
        bank = decode_bank(data, CLIP, grids, with_flow=True, rng=epoch and clip_rng(0, epoch, "v"))
        for sample, places in zip(grids, bank.places, strict=True):
            config = replace(CLIP, sample=sample)
            clip = decode_clip(data, config, with_flow=True, rng=epoch and clip_rng(0, epoch, "v"))
            assert np.array_equal(bank.frames[places].reshape(clip.frames.shape), clip.frames)
            task = DecodeTask(storage=Storage(), clip=config, with_flow=True, epoch=epoch, cache=cache)
            assert task.clip_bytes == clip.frames.nbytes + clip.flow.nbytes  # type: ignore[union-attr]
            for from_cache in (sample is not grids[0], True):
                columns = task(block)
                assert columns["cached"].tolist() == [from_cache]
                assert "rgb" not in columns
                assert np.array_equal(columns["yuv"][0], clip.frames)
                assert np.array_equal(columns["flow"][0], clip.flow)  # type: ignore[arg-type]
    assert clip_frame_bytes(CLIP, with_flow=False) == 30 * 45


# End to end


def test_a_labelling_worker_follows_the_checkpoint_and_equals_a_plain_loop(tmp_path: Path) -> None:
    """Views of 5x3, scored by a network that looks at every pixel, against clips decoded and averaged one by one."""
    labels = ("a", "b", "c")
    (tmp_path / "videos").mkdir()
    for number in range(3):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(make_video(moving(15 + number, 44, 70, seed=number)))
    checkpoint = save_untrained(Storage(), str(tmp_path / "checkpoint"), labels, CLIP, "label_models:mixing")
    assert load_meta(Storage(), checkpoint).clip.decode == YUV
    config = LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=str(tmp_path / "videos"),
        checkpoint=checkpoint,
        out=str(tmp_path / "out"),
        protocol="5x3",
        batch_size=15,
    )
    labelling = open_labelling(config, "label")
    assert labelling.job.clip == CLIP
    worker = LabelUnits(labelling.job)
    start = 0
    for unit in labelling.plan.units:
        rows = labelling.catalog.table.slice(start, len(unit.keys))
        start += len(unit.keys)
        (result,) = worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        assert (result["error_class"], result["quarantined"]) == ("", 0)
    table = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units)).sort_by("uri")
    model, _ = load_model(Storage(), checkpoint, OWN_NETWORKS)
    views = PROTOCOLS["5x3"].views(config.view_average)
    for row in table.to_pylist():
        clips = list(decode_views(Path(row["uri"]).read_bytes(), CLIP, views, with_flow=True).clips())
        rgb = torch.stack([yuv420_to_rgb(torch.from_numpy(clip.frames)) for clip in clips])
        flow = torch.stack([torch.from_numpy(clip.flow) / 127.0 for clip in clips])  # type: ignore[operator]
        with torch.no_grad():
            p = model(rgb=(rgb / 255.0 - 0.5) / 0.25, flow=flow).double().softmax(dim=1).mean(dim=0)
        assert row["views"] == 15
        scores, ids = p.topk(3)
        assert row["id_topk"] == ids.tolist()
        np.testing.assert_allclose(row["score_topk"], scores.numpy(), rtol=1e-4)
    assert table.num_rows == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_trains_on_it_says_so_in_its_checkpoint_and_is_scored_on_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    config = TrainConfig(
        catalog=set_in(tmp_path / "set", train=18, val=6),
        out=str(tmp_path / "run"),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=1, frames_per_segment=2),
            decode=YUV,
            view=ViewConfig(resize_px=32, crop_px=24),
        ),
        model=ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}),
        augment=AugmentConfig(colour_jitter=0.1),
        optim=OptimConfig(epochs=6, batch_size=6, lr=0.05),
        resources=ResourcesConfig(num_workers=2, decode_tasks=2),
    )
    train(config)
    last = read_metrics(Storage(), config.out)[-1]
    assert (last["unreadable"], last["val_videos"]) == (0, 6)
    checkpoint = find_checkpoint(Storage(), config.out)
    model, meta = load_model(Storage(), checkpoint, OWN_NETWORKS)
    assert meta.clip == config.clip
    rows = load_catalog(Storage(), config.catalog).select("val")
    clips = [decode_clip(data, meta.clip, with_flow=True) for data in read_videos(Storage(), references(rows.table))]  # type: ignore[arg-type]
    model.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = model(**model_inputs(collate(clips), model.input_spec, "cpu"))
    labels = torch.tensor(rows.table["label_id"].to_pylist())
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert float(loss) == pytest.approx(meta.metrics["val_loss"], rel=1e-5)
    assert meta.metrics["val_top1"] == 1.0
