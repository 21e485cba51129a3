"""Clips get to the device as they are, and the flow that is found there (TV-L1) is the motion that is known."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from decode_reference import moving
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainResourcesConfig,
    ViewConfig,
    digest,
)
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.network.batch import DeviceInput, Feeder, RawBatch, VideoBatch, collate_raw, model_inputs, quantised, sent
from kinoray.network.build import build_model
from kinoray.network.checkpoint import find_checkpoint, load_meta, load_model
from kinoray.network.flow_tvl1 import tvl1_flow
from kinoray.network.scorer import ClipScorer, EarlyExit, ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.recipe import Augmenter
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from kinoray.video.cache import FrameCache
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled, Views
from kinoray.video.sample import clip_rng, segment_indices
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.transform import quantise, train_view
from label_models import save_untrained
from small_sets import set_in
from tiny_models import OWN_NETWORKS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAMPLE = SampleConfig(num_segments=2, frames_per_segment=3)
VIEW = ViewConfig(resize="short_side", resize_px=36, crop_px=30)
TVL1 = FlowConfig(estimator="tvl1", bound_px=8.0)
CLIP = ClipConfig(sample=SAMPLE, view=VIEW, flow=TVL1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images here are small: several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def finished(clips: list[Clip], clip: ClipConfig, device: str = "cpu") -> VideoBatch:
    return DeviceInput(clip.flow.bound_px, device)(collate_raw(clips))


def scenery(height: int, width: int) -> np.ndarray:
    """What photographs are like, uint8 [H, W, 3]: most of the energy in large smooth parts, some strong edges."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for sigma, share in ((24, 1.0), (8, 0.5), (2.5, 0.22), (1, 0.08)):
        noise = cv2.GaussianBlur(rng.normal(size=total.shape).astype(np.float32), (0, 0), sigma)
        grey = noise.mean(axis=2, keepdims=True)
        total += share / noise.std() * (1.2 * grey + 0.5 * (noise - grey))
    picture = np.clip(128 + 46 * total, 0, 255).astype(np.uint8)
    cv2.circle(picture, (150, 120), 50, (200, 60, 40), -1, cv2.LINE_AA)
    cv2.rectangle(picture, (220, 160), (300, 220), (30, 80, 190), -1)
    return picture


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
@pytest.mark.parametrize("names", [("rgb",), ("rgb", "flow"), ("flow",)])
def test_a_batch_arrives_as_it_was(device: str, names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    parts = {
        "rgb": torch.from_numpy(rng.integers(0, 256, (2, 1, 3, 3, 8, 8)).astype(np.uint8)),
        "flow": torch.from_numpy(rng.integers(-99, 99, (2, 1, 3, 2, 8, 8)).astype(np.int8)),
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
    picture = scenery(260, 320)
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
def test_flow_is_that_of_the_source_at_the_models_size_and_flips_with_the_view(device: str) -> None:
    """Frames of 96 x 128 are scaled by 80 / 96, so the flow is the motion a frame times that, in 127 / bound_px."""
    clip = replace(CLIP, view=ViewConfig(resize="short_side", resize_px=80, crop_px=64, train_scales=(1.0,)))
    data = make_video(shifting(), gop=24)
    flips = set()
    for seed in (None, 0, 1):
        # A training view of scale 1 cuts 64 px out of what 80 px show: it is enlarged by 80 / 64 less.
        raw = decode(data, Sampled(rng=rng_of(seed)), clip).clip()
        assert raw.flow is None
        found = finished([raw], clip, device)
        assert found.flow is not None
        assert found.flow.shape == (1, 2, 3, 2, 64, 64)
        scale = 80 / 96 if seed is None else 64 / 96
        flip = seed is not None and drawn_flip(clip, raw, seed)
        flips.add(flip)
        expected = torch.tensor([-1.0 if flip else 1.0, -0.5]) * scale * 127 / TVL1.bound_px
        inner = found.flow[..., 8:-8, 8:-8].float().mean(dim=(0, 1, 2, 4, 5)).cpu()
        assert (inner - expected).abs().max() <= 0.1 * 127 / TVL1.bound_px  # a tenth of a pixel, after x264
    assert flips == {False, True}


def rng_of(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


def drawn_flip(clip: ClipConfig, raw: Clip, seed: int) -> bool:
    """Whether the view that decoding drew, after it drew the frames, is mirrored."""
    rng = np.random.default_rng(seed)
    assert np.array_equal(segment_indices(raw.num_frames, clip.sample, rng), raw.indices)
    return train_view(clip.view, 128, 96, rng).flip


def test_frames_and_their_partners_are_those_of_a_decoder_that_finds_flow_itself() -> None:
    """The device gets the same pixels: its frames are dis's frames, and each partner the green of the next frame."""
    every = SampleConfig(num_segments=1, frames_per_segment=20)
    data = make_video(moving(20, 44, 70))
    for seed in (None, 1, 4):
        clip = replace(CLIP, sample=every)
        raw = decode(data, Sampled(rng=rng_of(seed)), clip).clip()
        there = decode(data, Sampled(rng=rng_of(seed)), replace(clip, flow=FlowConfig())).clip()
        assert np.array_equal(raw.frames, there.frames)
        assert raw.partners is not None
        assert np.array_equal(raw.partners[0, :-1, 0], raw.frames[0, 1:, 1])
        assert np.array_equal(raw.partners[0, -1, 0], raw.frames[0, -2, 1])


def test_flow_of_the_last_frame_leads_from_the_one_before_to_it() -> None:
    clip = replace(CLIP, sample=SampleConfig(num_segments=1, frames_per_segment=6))
    raw = decode(make_video(moving(6, 44, 70)), Sampled(), clip).clip()
    assert raw.indices.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert raw.last.tolist() == [[False] * 5 + [True]]
    grey = torch.from_numpy(raw.frames[0, :, 1])
    between = tvl1_flow(grey[:-1], grey[1:])
    flow = finished([raw], clip).flow
    assert flow is not None
    assert torch.equal(flow[0, 0], quantised(torch.cat([between, between[-1:]]), 8.0))


def test_a_video_of_one_frame_does_not_move() -> None:
    raw = decode(make_video(moving(1, 44, 70)), Sampled(), CLIP).clip()
    flow = finished([raw], CLIP).flow
    assert flow is not None
    assert int(flow.abs().max()) == 0


def test_clips_of_one_batch_do_not_change_each_other() -> None:
    clips = [decode(make_video(moving(20, 44, 70, seed=seed)), Sampled(), CLIP).clip() for seed in range(3)]
    together = finished(clips, CLIP)
    for place, clip in enumerate(clips):
        alone = finished([clip], CLIP)
        assert torch.equal(together.rgb[place], alone.rgb[0])  # type: ignore[index]
        assert torch.equal(together.flow[place], alone.flow[0])  # type: ignore[index]


def test_no_clips_are_an_empty_batch() -> None:
    shape = (0, 2, 3)
    raw = RawBatch(
        torch.empty((*shape, 3, 30, 30), dtype=torch.uint8),
        torch.empty((*shape, 1, 30, 30), dtype=torch.uint8),
        torch.empty(shape, dtype=torch.bool),
    )
    batch = DeviceInput(8.0, "cpu")(raw)
    assert len(batch) == 0
    assert batch.flow is not None
    assert batch.flow.shape == (*shape, 2, 30, 30)


def test_quantised_flow_is_that_of_the_decoder() -> None:
    flow = np.random.default_rng(0).normal(0, 12, (2, 31, 33)).astype(np.float32)
    flow[:, 0, :9] = [0.0, 15.0, -15.0, 15.01, -99.0, 1e3, -1e3, 7.4, -7.4]
    assert torch.equal(
        quantised(torch.from_numpy(flow), 15.0), torch.from_numpy(quantise(np.moveaxis(flow, 0, 2), 15.0))
    )


def test_colours_are_changed_after_the_flow_is_found() -> None:
    raw = decode(make_video(moving(20, 44, 70)), Sampled(), CLIP).clip()
    batch = finished([raw], CLIP)
    coloured = Augmenter(AugmentConfig(colour_jitter=0.9), 0, torch.device("cpu")).colour(batch, ["v"], 1)
    assert not torch.equal(coloured.rgb, batch.rgb)  # type: ignore[arg-type]
    assert torch.equal(coloured.flow, batch.flow)  # type: ignore[arg-type]


# Views, children, blocks


@pytest.mark.parametrize("crops", ["center", "three", "ten"])
def test_flow_of_all_views_is_that_of_the_views_themselves(crops: str) -> None:
    """Frames of every view are dis's; the flow of a mirrored view is the mirrored one's, x with the other sign."""
    data = make_video(moving(31, 44, 70))
    views = ViewsConfig(temporal=2, crops=crops)  # type: ignore[arg-type]
    clips = list(decode(data, Views(views=views), CLIP).clips())
    expected = list(decode(data, Views(views=views), replace(CLIP, flow=FlowConfig())).clips())
    assert len(clips) == len(expected) == views.num_views
    for clip, other in zip(clips, expected, strict=True):
        assert np.array_equal(clip.indices, other.indices)
        assert np.array_equal(clip.frames, other.frames)
    batch = finished(clips, CLIP)
    for place, clip in enumerate(clips):
        first = torch.from_numpy(clip.frames[:, :, 1].reshape(-1, 30, 30))
        second = torch.from_numpy(clip.partners[:, :, 0].reshape(-1, 30, 30))  # type: ignore[index]
        assert not clip.last.any()
        flow = quantised(tvl1_flow(first, second), 8.0).reshape(2, 3, 2, 30, 30)
        assert torch.equal(batch.flow[place], flow)  # type: ignore[index]


def test_a_decoder_process_gives_the_same_clips() -> None:
    data = make_video(moving(20, 44, 70))
    ten = ViewsConfig(temporal=1, crops="ten")
    with Sandbox(1) as sandbox:
        here = decode(data, Sampled(rng=np.random.default_rng(3)), CLIP).clip()
        there = sandbox.decode(data, Sampled(rng=np.random.default_rng(3)), CLIP).clip()
        pairs = [(here, there)]
        pairs += zip(
            decode(data, Views(views=ten), CLIP).clips(),
            sandbox.decode(data, Views(views=ten), CLIP).clips(),
            strict=True,
        )
        for one, other in pairs:
            assert np.array_equal(one.frames, other.frames)
            assert np.array_equal(one.partners, other.partners)  # type: ignore[arg-type]
            assert np.array_equal(one.last, other.last)


def test_a_block_holds_partners_and_says_what_is_unreadable(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        data = make_video(moving(20, 44 + 10 * number, 70)) if name != "b" else b"no video"
        (tmp_path / name).write_bytes(data)
    schema = {"video_id": pa.string(), "uri": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    rows = [{"video_id": name, "uri": str(tmp_path / name), "row": number} for number, name in enumerate(names)]
    schema |= {"time_start_s": pa.float64(), "time_end_s": pa.float64()}
    block = pa.Table.from_pylist(rows, schema=pa.schema({**schema, "sha256": pa.string(), "row": pa.int64()}))
    task = DecodeTask(storage=Storage(), clip=CLIP, epoch=1)
    columns = task(block)
    assert columns["ok"].tolist() == [True, False, True]
    assert columns["error_class"].tolist()[1] == "UnreadableContainer"
    assert "flow" not in columns
    for number, name in ((0, "a"), (2, "c")):
        rng = clip_rng(0, 1, name)
        clip = decode((tmp_path / name).read_bytes(), Sampled(rng=rng), CLIP).clip()
        assert np.array_equal(columns["rgb"][number], clip.frames)
        assert np.array_equal(columns["partners"][number], clip.partners)  # type: ignore[arg-type]
        assert np.array_equal(columns["last"][number], clip.last)
        assert task.clip_bytes == clip.frames.nbytes + clip.partners.nbytes  # type: ignore[union-attr]
    assert not columns["partners"][1].any()


# Settings and errors


def test_the_digest_names_the_estimator() -> None:
    assert digest(ClipConfig()) == digest(asdict(ClipConfig()))
    assert digest(ClipConfig()) != digest(ClipConfig(flow=FlowConfig(estimator="tvl1")))


def test_a_cache_of_finished_clips_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.gb must be 0 with clip\.flow\.estimator tvl1, got 1"):
        TrainConfig(catalog="c", out="o", clip=CLIP, cache=CacheConfig(gb=1))
    with pytest.raises(ConfigError, match=r"cache\.gb must be 0 with flow\.estimator tvl1"):
        FrameCache(CacheConfig(gb=1), CLIP)


def test_a_raw_batch_says_what_does_not_fit() -> None:
    raw = decode(make_video(moving(20, 44, 70)), Sampled(), CLIP).clip()
    small = replace(CLIP, view=ViewConfig(resize="short_side", resize_px=36, crop_px=24))
    with pytest.raises(ModelError, match="at least one clip"):
        collate_raw([])
    with pytest.raises(ModelError, match="all clips of a batch must have partners, got 1 of 2"):
        collate_raw([raw, replace(raw, partners=None)])
    with pytest.raises(ModelError, match="clips of a batch must have one shape"):
        collate_raw([raw, decode(make_video(moving(20, 44, 70)), Sampled(), small).clip()])
    batch = collate_raw([raw, raw])
    for changed in ({"last": batch.last[:1]}, {"partners": batch.partners[..., :9]}, {"frames": batch.frames[:, :1]}):
        with pytest.raises(ModelError, match="frames, partners and last must agree in B, S, T, H, W"):
            replace(batch, **changed)


# End to end


def answers(model: object, clip: ClipConfig, scorer: ScorerConfig, clips: list[Clip]) -> list[np.ndarray]:
    running: ClipScorer[int] = ClipScorer(model, clip, scorer, num_classes=3, device="cpu")  # type: ignore[arg-type]
    found = [pair for number, one in enumerate(clips) for pair in running.put(number, one)]
    return [answer.logits for _, answer in sorted([*found, *running.flush()], key=lambda pair: pair[0])]


@pytest.mark.parametrize("rule", [None, EarlyExit(margin=1.0)], ids=["whole", "segment by segment"])
def test_a_scorer_gives_what_the_network_says_of_the_finished_batch(rule: EarlyExit | None) -> None:
    torch.manual_seed(3)
    model = build_model(ModelConfig(factory="vcm_sdd", options={"backbone": "tiny", "consensus": "probs"}), 3)
    clip = replace(CLIP, view=ViewConfig(resize="short_side", resize_px=40, crop_px=32))
    clips = [decode(make_video(moving(20, 44, 70 + 10 * k, seed=k)), Sampled(), clip).clip() for k in range(3)]
    found = answers(model, clip, ScorerConfig(batch_size=2, early_exit=rule), clips)
    with torch.no_grad():
        inputs = model_inputs(finished(clips, clip), model.input_spec, "cpu")
        expected = model.eval()(**inputs).double()  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=2e-4)


def test_a_labelling_worker_labels_videos_of_different_sizes_with_it(tmp_path: Path) -> None:
    clip = CLIP
    (tmp_path / "videos").mkdir()
    for number in range(3):
        data = make_video(moving(15 + number, 44 + 8 * number, 70, seed=number))
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(data)
    checkpoint = save_untrained(Storage(), str(tmp_path / "checkpoint"), ("a", "b", "c"), clip, "label_models:mixing")
    source = str(tmp_path / "videos")
    labelling = open_labelling(
        LabelConfig(
            allow_factory=OWN_NETWORKS, source=source, checkpoint=checkpoint, out=str(tmp_path / "out"), unit_size=3
        ),
        "label",
    )
    assert labelling.job.clip == clip
    worker, (unit,) = LabelUnits(labelling.job), labelling.plan.units
    (result,) = worker(pa.Table.from_pylist([pack_unit(unit, labelling.catalog.table)])).to_pylist()
    assert (result["error_class"], result["quarantined"], result["rows"]) == ("", 0, 3)
    model, _ = load_model(Storage(), checkpoint, OWN_NETWORKS)
    rows = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units)).to_pylist()
    clips = [decode(Path(row["uri"]).read_bytes(), Sampled(), clip).clip() for row in rows]
    with torch.no_grad():  # each by itself, as on CPUs: this network mixes the clips of a batch
        one_by_one = [model(**model_inputs(finished([one], clip), model.input_spec, "cpu")) for one in clips]
    logits = torch.cat(one_by_one).double()
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
            view=ViewConfig(resize_px=32, crop_px=24),
            flow=TVL1,
        ),
        model=ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}),
        augment=AugmentConfig(colour_jitter=0.1, mixup_alpha=0.2),
        optim=OptimConfig(epochs=6, batch_size=6, lr=0.05),
        resources=TrainResourcesConfig(num_workers=2, decode_tasks=2),
    )
    train(settings)
    last = RunFolder(Storage(), settings.out).epochs()[-1]
    assert (last.quarantined, last.val_videos) == (1, 6)
    meta = load_meta(Storage(), find_checkpoint(Storage(), settings.out))
    assert meta.clip == settings.clip
    assert meta.metrics["val_top1"] == 1.0
