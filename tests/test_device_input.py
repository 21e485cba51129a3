"""What the device makes of whole frames is what the decoder makes of them, up to rounding; flow as it is known."""

from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from decode_reference import moving
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    DecodeConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    SampleConfig,
    ViewConfig,
    digest,
)
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.network.anytime import EarlyExit
from kinoray.network.batch import RawBatch, VideoBatch, collate, model_inputs
from kinoray.network.build import build_model, check_clip
from kinoray.network.checkpoint import find_checkpoint, load_meta, load_model
from kinoray.network.device_input import DeviceInput, Feeder, collate_raw, quantised, scaled, sent
from kinoray.network.scorer import ClipScorer, ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.train.augment import Augmenter
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.runfolder import read_metrics
from kinoray.train.verb import train
from kinoray.video.bank import decode_bank
from kinoray.video.clip import Clip, decode_clip
from kinoray.video.flow_dis import quantise
from kinoray.video.flow_tvl1 import tvl1_flow
from kinoray.video.protocol import ViewsConfig
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.transform import View
from kinoray.video.views import decode_views
from label_models import save_untrained
from small_sets import set_in
from test_yuv420 import scenery
from tiny_models import OWN_NETWORKS, Spec

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAMPLE = SampleConfig(num_segments=2, frames_per_segment=3)
VIEW = ViewConfig(resize="short_side", resize_px=36, crop_px=30)
TVL1 = FlowConfig(estimator="tvl1", bound_px=8.0)
Frames = Literal["rgb", "yuv420"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images here are small: several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(frames: Frames = "rgb", *, view: ViewConfig = VIEW, **decode: object) -> ClipConfig:
    return ClipConfig(sample=SAMPLE, decode=DecodeConfig(frames=frames, **decode), view=view, flow=TVL1)  # type: ignore[arg-type]


def by_decoder(frames: Frames = "rgb", view: ViewConfig = VIEW) -> ClipConfig:
    return config(frames, view=view)


def by_device(frames: Frames = "rgb", view: ViewConfig = VIEW) -> ClipConfig:
    return config(frames, view=view, scale_on="device")


def pixels(batch: VideoBatch) -> torch.Tensor:
    found = batch.rgb if batch.rgb is not None else batch.yuv
    assert found is not None
    return found.cpu()


def finished(clips: list[Clip], clip: ClipConfig, device: str = "cpu") -> VideoBatch:
    return DeviceInput(clip, device, Storage())(collate_raw(clips))


# Scaling


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "view",
    [
        View(60, 80, 0, 0, 60, False),
        View(31, 47, 0, 5, 30, True),
        View(150, 200, 20, 33, 40, True),
        View(120, 64, 7, 1, 60, False),
    ],
    ids=str,
)
def test_scaling_is_torchs_antialiased_one_then_a_cut_and_a_mirror(view: View, device: str) -> None:
    planes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 90, 110)).astype(np.uint8))
    whole = F.interpolate(planes[None].double(), (view.height, view.width), mode="bilinear", antialias=True)[0]
    expected = whole[:, view.top : view.top + view.size, view.left : view.left + view.size]
    expected = expected.flip(2) if view.flip else expected
    found = scaled(planes.to(device), torch.tensor(astuple(view), device=device), view.size)
    assert found.dtype == torch.uint8
    assert float((found.cpu() - expected).abs().max()) <= 0.501  # rounded to whole levels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"),
    [(256, 340, "yuv420p"), (96, 128, "yuv420p"), (101, 77, "yuv444p")],
    ids=["made smaller", "made larger", "odd"],
)
@pytest.mark.parametrize(("frames", "mean", "largest"), [("rgb", 0.5, 30), ("yuv420", 0.4, 20)])
def test_frames_are_those_that_the_decoder_scales(
    frames: Frames, mean: float, largest: int, height: int, width: int, pix_fmt: str, device: str
) -> None:
    """In grey levels. RGB differs more at edges of strong colours: here chroma is enlarged before it is scaled."""
    data = make_video(scenery(8, height, width), pix_fmt=pix_fmt)
    for view in (ViewConfig(resize_px=128, crop_px=112), ViewConfig(resize="short_side", resize_px=140, crop_px=112)):
        for seed in (None, 1, 4):  # None: the centre; 1 and 4 draw other scales, and one of them a mirror
            here, there = by_decoder(frames, view), by_device(frames, view)
            expected, raw = (
                decode_clip(data, clip, with_flow=False, rng=None if seed is None else np.random.default_rng(seed))
                for clip in (here, there)
            )
            assert raw.view is not None
            assert expected.view is None
            error = (pixels(finished([raw], there, device)).int() - pixels(collate([expected])).int()).float()
            assert float(error.abs().mean()) <= mean
            assert float(error.abs().max()) <= largest
            assert abs(float(error.mean())) <= 0.1  # nothing is brighter or darker as a whole


def test_seeds_of_the_test_above_mirror_and_do_not() -> None:
    data = make_video(scenery(4, 96, 128))
    views = [decode_clip(data, by_device(), with_flow=False, rng=np.random.default_rng(seed)).view for seed in (1, 4)]
    assert {view.flip for view in views if view} == {True, False}


@pytest.mark.parametrize("frames", ["rgb", "yuv420"])
def test_frames_that_need_no_scaling_are_the_same_bytes(frames: Frames) -> None:
    data = make_video(moving(20, 48, 64))
    view = ViewConfig(resize="short_side", resize_px=48, crop_px=40)
    expected = collate([decode_clip(data, by_decoder(frames, view), with_flow=False)])
    found = finished([decode_clip(data, by_device(frames, view), with_flow=False)], by_device(frames, view))
    assert torch.equal(pixels(found), pixels(expected))


@pytest.mark.parametrize("frames", ["rgb", "yuv420"])
def test_clips_of_different_sizes_make_one_batch_and_do_not_change_each_other(frames: Frames) -> None:
    sizes = [(44, 70), (90, 60), (44, 70), (36, 36)]
    clips = [
        decode_clip(make_video(moving(20, *size, seed=k)), by_device(frames), with_flow=True, rng=rng)
        for k, (size, rng) in enumerate(zip(sizes, map(np.random.default_rng, range(4)), strict=True))
    ]
    together = finished(clips, by_device(frames))
    assert len(together) == 4
    assert together.flow is not None
    for place, clip in enumerate(clips):
        alone = finished([clip], by_device(frames))
        assert torch.equal(pixels(together)[place], pixels(alone)[0])
        assert torch.equal(together.flow[place], alone.flow[0])  # type: ignore[index]


def test_no_clips_are_an_empty_batch() -> None:
    for frames, shape in (("rgb", (0, 2, 3, 3, 30, 30)), ("yuv420", (0, 2, 3, 45, 30))):
        empty = DeviceInput(by_device(frames), "cpu", Storage())(RawBatch(frames=[]))  # type: ignore[arg-type]
        assert pixels(empty).shape == shape


# To the device


@pytest.mark.parametrize("device", DEVICES)
def test_a_feeder_brings_what_it_is_given_and_leaves_the_batches_before_alone(device: str) -> None:
    rng = np.random.default_rng(0)
    feeder = Feeder(device)
    given, brought = [], []
    for size in (5, 3000, 7, 4000, 1):  # growing and shrinking buffers, more batches than buffers
        tensors = [
            torch.from_numpy(rng.integers(0, 256, (3, size)).astype(np.uint8)),
            torch.from_numpy(rng.integers(-9, 9, (size,))),
            torch.from_numpy(rng.random((size, 2)) < 0.5),
            torch.zeros(0, 4),
            torch.from_numpy(rng.integers(0, 256, (size, 6)).astype(np.uint8)).T,
        ]
        given.append([x.clone() for x in tensors])
        brought.append(feeder(tensors))
        for x in tensors:
            x.zero_()
    for before, after in zip(given, brought, strict=True):
        for x, y in zip(before, after, strict=True):
            assert (y.device.type, y.dtype) == (device, x.dtype)
            assert torch.equal(y.cpu(), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [("rgb",), ("rgb", "flow"), ("yuv", "flow"), ("flow",)])
def test_a_batch_arrives_as_it_was(device: str, names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    parts = {
        "rgb": torch.from_numpy(rng.integers(0, 256, (2, 1, 3, 3, 8, 8)).astype(np.uint8)),
        "flow": torch.from_numpy(rng.integers(-99, 99, (2, 1, 3, 2, 8, 8)).astype(np.int8)),
        "yuv": torch.from_numpy(rng.integers(0, 256, (2, 1, 3, 12, 8)).astype(np.uint8)),
    }
    batch = VideoBatch(**{name: x if name in names else None for name, x in parts.items()})
    found = sent(batch, Feeder(device))
    assert found.device.type == device
    for name, x in parts.items():
        y = getattr(found, name)
        assert (y is None) == (name not in names)
        assert y is None or torch.equal(y.cpu(), x)


# Flow


def shifting(num_frames: int = 24, dx: float = 1.0, dy: float = -0.5) -> np.ndarray:
    """A picture that moves by (dx, dy) pixels a frame, uint8 [N, 96, 128, 3]."""
    picture = scenery(1, 200, 260)[0]
    places = np.arange(num_frames)
    return np.stack(
        [
            cv2.warpAffine(
                picture, np.array([[1, 0, k * dx - 60], [0, 1, k * dy - 50]]), (128, 96), flags=cv2.INTER_CUBIC
            )
            for k in places
        ]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frames", ["rgb", "yuv420"])
@pytest.mark.parametrize("scale_on", ["decoder", "device"])
def test_flow_is_that_of_the_source_at_the_models_size_and_flips_with_the_view(
    frames: Frames, scale_on: str, device: str
) -> None:
    """Frames of 96 x 128 are scaled by 80 / 96, so the flow is the motion a frame times that, in 127 / bound_px."""
    view = ViewConfig(resize="short_side", resize_px=80, crop_px=64, train_scales=(1.0,))
    clip = config(frames, view=view, scale_on=scale_on)
    data = make_video(shifting(), gop=24)
    for seed in (None, 1, 4):
        # A training view of scale 1 cuts 64 px out of what 80 px show: it is enlarged by 80 / 64 less.
        rng = None if seed is None else np.random.default_rng(seed)
        raw = decode_clip(data, clip, with_flow=True, rng=rng)
        assert raw.flow is None
        found = finished([raw], clip, device)
        assert found.flow is not None
        assert found.flow.shape == (1, 2, 3, 2, 64, 64)
        scale = 80 / 96 if seed is None else 64 / 96
        flip = seed is not None and _flips(data, seed, view)
        expected = torch.tensor([-1.0 if flip else 1.0, -0.5]) * scale * 127 / TVL1.bound_px
        inner = found.flow[..., 8:-8, 8:-8].float().mean(dim=(0, 1, 2, 4, 5)).cpu()
        assert (inner - expected).abs().max() <= 0.1 * 127 / TVL1.bound_px  # a tenth of a pixel, after x264


def _flips(data: bytes, seed: int, view: ViewConfig) -> bool:
    drawn = decode_clip(data, by_device(view=view), with_flow=False, rng=np.random.default_rng(seed)).view
    assert drawn is not None
    return drawn.flip


@pytest.mark.parametrize("frames", ["rgb", "yuv420"])
def test_flow_of_the_last_frame_leads_from_the_one_before_to_it(frames: Frames) -> None:
    clip = replace(config(frames), sample=SampleConfig(num_segments=1, frames_per_segment=6))
    raw = decode_clip(make_video(moving(6, 44, 70)), clip, with_flow=True)
    assert raw.indices.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert raw.last.tolist() == [[False] * 5 + [True]]
    grey = torch.from_numpy(raw.frames[0, :, :30] if frames == "yuv420" else raw.frames[0, :, 1])
    between = tvl1_flow(grey[:-1], grey[1:])
    flow = finished([raw], clip).flow
    assert flow is not None
    assert torch.equal(flow[0, 0], quantised(torch.cat([between, between[-1:]]), 8.0))


def test_a_video_of_one_frame_does_not_move() -> None:
    raw = decode_clip(make_video(moving(1, 44, 70)), by_device(), with_flow=True)
    flow = finished([raw], by_device()).flow
    assert flow is not None
    assert int(flow.abs().max()) == 0


def test_quantised_flow_is_that_of_the_decoder() -> None:
    flow = np.random.default_rng(0).normal(0, 12, (2, 31, 33)).astype(np.float32)
    flow[:, 0, :9] = [0.0, 15.0, -15.0, 15.01, -99.0, 1e3, -1e3, 7.4, -7.4]
    assert torch.equal(
        quantised(torch.from_numpy(flow), 15.0), torch.from_numpy(quantise(np.moveaxis(flow, 0, 2), 15.0))
    )


def test_colours_are_changed_after_the_flow_is_found() -> None:
    raw = decode_clip(make_video(moving(20, 44, 70)), by_device(), with_flow=True)
    batch = finished([raw], by_device())
    coloured = Augmenter(AugmentConfig(colour_jitter=0.9), 0, torch.device("cpu")).colour(batch, ["v"], 1)
    assert not torch.equal(pixels(coloured), pixels(batch))
    assert torch.equal(coloured.flow, batch.flow)  # type: ignore[arg-type]


# Views, children, blocks


@pytest.mark.parametrize("frames", ["rgb", "yuv420"])
@pytest.mark.parametrize("crops", ["center", "three", "ten"])
def test_all_views_are_those_of_the_decoder_and_hold_the_frames_once(frames: Frames, crops: str) -> None:
    data = make_video(scenery(12, 96, 128))
    views = ViewsConfig(temporal=2, crops=crops)  # type: ignore[arg-type]
    there = decode_views(data, by_device(frames), views, with_flow=True)
    assert there.frames.shape[0] == 1
    expected = list(decode_views(data, by_decoder(frames), views, with_flow=True).clips())
    clips = list(there.clips())
    assert len(there) == len(clips) == len(expected)
    for clip, other in zip(clips, expected, strict=True):
        assert np.array_equal(clip.indices, other.indices)
    found, theirs = finished(clips, by_device(frames)), finished(expected, by_decoder(frames))
    error = (pixels(found).int() - pixels(theirs).int()).abs().float().flatten(1).mean(1)  # of each view
    assert float(error.max()) <= 0.5
    error = (found.flow.int() - theirs.flow.int()).abs().float().flatten(1).mean(1)  # type: ignore[union-attr]
    assert float(error.max()) <= 0.1 * 127 / TVL1.bound_px


def test_a_decoder_process_gives_the_same_clips() -> None:
    data = make_video(moving(20, 44, 70))
    ten = ViewsConfig(temporal=1, crops="ten")
    with Sandbox(1) as sandbox:
        for clip in (by_device(), by_device("yuv420"), by_decoder()):
            rngs = [np.random.default_rng(3) for _ in range(2)]
            here = decode_clip(data, clip, with_flow=True, rng=rngs[0])
            there = sandbox.decode_clip(data, clip, with_flow=True, rng=rngs[1])
            pairs = [(here, there)]
            pairs += zip(
                decode_views(data, clip, ten, with_flow=True).clips(),
                sandbox.decode_views(data, clip, ten, with_flow=True).clips(),
                strict=True,
            )
            for one, other in pairs:
                assert one.view == other.view
                assert np.array_equal(one.frames, other.frames)
                assert np.array_equal(one.partners, other.partners)  # type: ignore[arg-type]
                assert np.array_equal(one.last, other.last)


def test_a_block_holds_clips_of_any_size_and_says_what_is_unreadable(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        data = make_video(moving(20, 44 + 10 * number, 70)) if name != "b" else b"no video"
        (tmp_path / name).write_bytes(data)
    schema = {"video_id": pa.string(), "uri": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    rows = [{"video_id": name, "uri": str(tmp_path / name), "row": number} for number, name in enumerate(names)]
    schema |= {"time_start_s": pa.float64(), "time_end_s": pa.float64()}
    block = pa.Table.from_pylist(rows, schema=pa.schema({**schema, "sha256": pa.string(), "row": pa.int64()}))
    columns = DecodeTask(storage=Storage(), clip=by_device(), with_flow=True, epoch=1)(block)
    assert columns["ok"].tolist() == [True, False, True]
    assert columns["error_class"].tolist()[1] == "UnreadableContainer"
    assert [array.shape[-2:] for array in columns["frames"]] == [(44, 70), (1, 1), (64, 70)]
    assert [array.shape for array in columns["partners"]] == [(2, 3, 1, 44, 70), (1,) * 5, (2, 3, 1, 64, 70)]
    assert columns["views"].shape == (3, 6)
    assert columns["last"].shape == (3, 2, 3)


# Settings and errors


def test_the_digest_changes_with_the_options_and_not_with_their_defaults() -> None:
    default = asdict(ClipConfig())
    before = {name: dict(value) for name, value in default.items()}
    del before["decode"]["scale_on"], before["flow"]["estimator"], before["flow"]["weights"]
    assert digest(ClipConfig()) == digest(before) == digest(default)
    others = [
        ClipConfig(decode=DecodeConfig(scale_on="device")),
        ClipConfig(flow=FlowConfig(estimator="tvl1")),
        ClipConfig(flow=FlowConfig(estimator="raft", weights="a.pth")),
        ClipConfig(flow=FlowConfig(estimator="raft", weights="b.pth")),
    ]
    digests = {digest(clip) for clip in [ClipConfig(), *others]}
    assert len(digests) == 5
    nested = {digest([{"clip": asdict(clip)}, "x"]) for clip in [ClipConfig(), *others]}
    assert len(nested) == 5
    assert digest([{"clip": before}, "x"]) in nested


def test_settings_that_do_not_go_together_are_refused() -> None:
    dis = replace(by_device(), flow=FlowConfig())
    assert dis.on_device(with_flow=False)
    with pytest.raises(
        ConfigError, match=r"decode\.scale_on must be decoder with flow\.estimator dis.*set flow\.estim"
    ):
        check_clip(Spec(flow_channels=2), dis)
    with pytest.raises(
        ConfigError, match=r"decode\.scale_on must be decoder with decode\.backend decord, got 'device'"
    ):
        DecodeConfig(scale_on="device", backend="decord")
    with pytest.raises(ConfigError, match=r"flow\.weights must be the weights of raft .*, got ''"):
        FlowConfig(estimator="raft")
    with pytest.raises(ConfigError, match=r"flow\.weights must be .*, got 'a\.pth'"):
        FlowConfig(weights="a.pth")
    with pytest.raises(ConfigError, match=r"cache\.gb must be 0 with clip\.decode\.scale_on device and with"):
        TrainConfig(catalog="c", out="o", clip=by_device(), cache=CacheConfig(gb=1))
    for clip in (by_device(), by_decoder()):
        with pytest.raises(ConfigError, match=r"cache\.gb must be 0 where the device does part of the decoding"):
            decode_bank(b"", clip, [SAMPLE], with_flow=True)


def test_a_raw_batch_says_what_does_not_fit() -> None:
    raw = decode_clip(make_video(moving(20, 44, 70)), by_device(), with_flow=True)
    with pytest.raises(ModelError, match="at least one clip"):
        collate_raw([])
    with pytest.raises(ModelError, match="all clips of a batch must have partners or none, got 1 of 2"):
        collate_raw([raw, replace(raw, partners=None)])
    with pytest.raises(ModelError, match="all clips of a batch must have a view or none, got 1 of 2"):
        collate_raw([raw, replace(raw, view=None)])
    with pytest.raises(ModelError, match="partners and last together"):
        RawBatch(frames=[], partners=[])
    with pytest.raises(ModelError, match="one entry a clip, got 0 and 1 entries"):
        RawBatch(frames=[], views=torch.zeros(1, 6, dtype=torch.int64))


# End to end


def answers(model: object, clip: ClipConfig, scorer: ScorerConfig, clips: list[Clip]) -> list[np.ndarray]:
    running: ClipScorer[int] = ClipScorer(model, clip, scorer, num_classes=3, device="cpu")  # type: ignore[arg-type]
    found = [pair for number, one in enumerate(clips) for pair in running.put(number, one)]
    return [answer.logits for _, answer in sorted([*found, *running.flush()], key=lambda pair: pair[0])]


@pytest.mark.parametrize("rule", [None, EarlyExit(margin=1.0)], ids=["whole", "segment by segment"])
def test_a_scorer_gives_what_the_network_says_of_the_finished_batch(rule: EarlyExit | None) -> None:
    torch.manual_seed(3)
    model = build_model(ModelConfig(factory="vcm_sdd", options={"backbone": "tiny", "consensus": "probs"}), 3)
    clip = by_device(view=ViewConfig(resize="short_side", resize_px=40, crop_px=32))
    clips = [decode_clip(make_video(moving(20, 44, 70 + 10 * k, seed=k)), clip, with_flow=True) for k in range(3)]
    found = answers(model, clip, ScorerConfig(batch_size=2, early_exit=rule), clips)
    with torch.no_grad():
        inputs = model_inputs(finished(clips, clip), model.input_spec, "cpu")
        expected = model.eval()(**inputs).double()  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=2e-4)


def test_a_labelling_worker_labels_videos_of_different_sizes_with_it(tmp_path: Path) -> None:
    clip = by_device("yuv420")
    (tmp_path / "videos").mkdir()
    for number in range(3):
        data = make_video(moving(15 + number, 44 + 8 * number, 70, seed=number))
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(data)
    checkpoint = save_untrained(Storage(), str(tmp_path / "checkpoint"), ("a", "b", "c"), clip, "label_models:mixing")
    source = str(tmp_path / "videos")
    labelling = open_labelling(
        LabelConfig(allow_factory=OWN_NETWORKS, source=source, checkpoint=checkpoint, out=str(tmp_path / "out")),
        "label",
    )
    assert labelling.job.clip == clip
    worker, (unit,) = LabelUnits(labelling.job), labelling.plan.units
    (result,) = worker(pa.Table.from_pylist([pack_unit(unit, labelling.catalog.table)])).to_pylist()
    assert (result["error_class"], result["quarantined"], result["rows"]) == ("", 0, 3)
    model, _ = load_model(Storage(), checkpoint, OWN_NETWORKS)
    rows = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units)).to_pylist()
    clips = [decode_clip(Path(row["uri"]).read_bytes(), clip, with_flow=True) for row in rows]
    assert len({one.frames.shape for one in clips}) == 3
    with torch.no_grad():
        logits = model(**model_inputs(finished(clips, clip), model.input_spec, "cpu")).double()
    scores, ids = logits.softmax(1).topk(3)
    assert [row["id_topk"] for row in rows] == ids.tolist()
    np.testing.assert_allclose([row["score_topk"] for row in rows], scores.numpy(), rtol=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_trains_on_it_and_is_scored_on_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    settings = TrainConfig(
        catalog=set_in(tmp_path / "set", train=18, val=6, broken=(4,)),
        out=str(tmp_path / "run"),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=1, frames_per_segment=2),
            decode=DecodeConfig(frames="yuv420", scale_on="device"),
            view=ViewConfig(resize_px=32, crop_px=24),
            flow=TVL1,
        ),
        model=ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}),
        augment=AugmentConfig(colour_jitter=0.1, mixup_alpha=0.2, mix_probability=0.3),
        optim=OptimConfig(epochs=6, batch_size=6, lr=0.05),
        resources=ResourcesConfig(num_workers=2, decode_tasks=2),
    )
    train(settings)
    last = read_metrics(Storage(), settings.out)[-1]
    assert (last["unreadable"], last["val_videos"]) == (1, 6)
    meta = load_meta(Storage(), find_checkpoint(Storage(), settings.out))
    assert meta.clip == settings.clip
    assert meta.metrics["val_top1"] == 1.0
