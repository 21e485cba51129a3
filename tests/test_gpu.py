"""Where there is a GPU: it gives what the CPU gives. TensorFloat-32 is off here, so that float32 means float32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from decode_reference import moving
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ClipConfig, InferenceConfig, ModelConfig, OptimConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.network.batch import VideoBatch, collate, model_inputs
from kinoray.network.build import VideoModel, build_model
from kinoray.network.flow_tvl1 import tvl1_flow
from kinoray.network.forward import auto_batch_size
from kinoray.network.pointwise import _launcher, pointwise
from kinoray.network.prepare import BF16_TOLERANCE, FP32_TOLERANCE, Repeated, prepare_for_inference
from kinoray.network.scorer import ClipScorer, ScorerConfig
from kinoray.train.config import TrainConfig
from kinoray.train.step import Replica
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled, Views
from kinoray.video.sandbox.pool import DeviceDecoder, Sandbox
from test_torchcodec import needs_torchcodec

GPU = "cuda"
CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=3), view=ViewConfig(resize_px=72, crop_px=64))
MODEL = ModelConfig(options={"backbone": "resnet18", "heads": 2, "scale": "dim"})

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU (torch.cuda.is_available)")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Ten real videos, decoded."""
    videos = (make_video(moving(30, seed=seed), fps=30, gop=12) for seed in range(10))
    return [decode(video, Sampled(), CLIP).clip() for video in videos]


@pytest.fixture
def model(clips: list[Clip]) -> VideoModel:
    """A network whose batch norms have seen the clips."""
    torch.manual_seed(0)
    model = build_model(MODEL, 5)
    for part in cast(nn.Module, model).modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        cast(nn.Module, model).train()(**model_inputs(collate(clips), model.input_spec, "cpu"))
    return cast(VideoModel, cast(nn.Module, model).eval())


def off(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest difference, of the largest value."""
    found, expected = (torch.as_tensor(x).double().cpu() for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def label(model: VideoModel, clips: list[Clip], device: str, inference: InferenceConfig) -> np.ndarray:
    scorer = ClipScorer[int](model, CLIP, ScorerConfig(batch_size=4, inference=inference), num_classes=5, device=device)
    found = {}
    for number, clip in enumerate(clips):
        found.update(scorer.put(number, clip))
    found.update(scorer.flush())
    assert list(found) == list(range(len(clips)))
    return np.stack([answer.logits for answer in found.values()])


@pytest.mark.parametrize(
    ("inference", "tolerance"),
    [
        (InferenceConfig(), FP32_TOLERANCE),
        (InferenceConfig(precision="bf16"), BF16_TOLERANCE),
        (InferenceConfig(precision="bf16", compile=True), BF16_TOLERANCE),
    ],
)
def test_ten_videos_are_labelled_as_on_the_cpu(
    model: VideoModel, clips: list[Clip], inference: InferenceConfig, tolerance: float
) -> None:
    expected = label(model, clips, "cpu", InferenceConfig())
    assert off(label(model, clips, GPU, inference), expected) <= tolerance


def test_a_recorded_call_gives_what_the_network_gives(model: VideoModel, clips: list[Clip]) -> None:
    network = cast(nn.Module, model).to(GPU)
    plain = prepare_for_inference(network)
    recorded = prepare_for_inference(network, compile=True)
    assert isinstance(recorded, Repeated)
    earlier = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):  # the last is filled up
        inputs = model_inputs(collate(clips[part]), model.input_spec, GPU)
        earlier.append((recorded(**inputs), plain(**inputs)))
    for found, expected in earlier:  # after all replays: none may have written over another's logits
        assert off(found, expected) <= FP32_TOLERANCE
    assert [recording is not None for recording in recorded._recordings.values()] == [True]


class Hesitant(nn.Module):
    """A network that waits for the host, which a recording cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(3, 5)

    def forward(self, *, rgb: Tensor, flow: None) -> Tensor:
        colours = rgb.mean(dim=(1, 2, 4, 5))
        return cast(Tensor, self.classify(colours * (2.0 if colours.sum().item() > 0 else 1.0)))


def test_a_network_that_cannot_be_recorded_runs_all_the_same() -> None:
    network = Hesitant().to(GPU)
    repeated, rgb = Repeated(network), torch.rand(4, 1, 2, 3, 8, 8, device=GPU)
    for _ in range(2):
        torch.testing.assert_close(repeated(rgb=rgb, flow=None), network(rgb=rgb, flow=None))


def train(device: str, batches: list[tuple[VideoBatch, Tensor]], lr: float, **settings: str) -> tuple[Tensor, bool]:
    """Losses of the steps, and whether AdamW is one kernel."""
    optim = OptimConfig(**settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = TrainConfig(catalog="c", out="o", model=MODEL, clip=CLIP, optim=optim)
    replica = Replica(build_model(MODEL, 5), 5, config, torch.device(device))
    replica.train()
    for batch, labels in batches:
        replica.train_step(batch, labels, 0, lr)
    replica.finish()
    return replica.history()[:, 2], bool(replica.state.optimizer.param_groups[0]["fused"])


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# AdamW's first step is lr times the sign of the gradient: in bfloat16, weights with hardly any move to the other side.
@pytest.mark.parametrize(("precision", "lr", "tolerance"), [("fp32", 1e-3, 1e-2), ("bf16", 1e-5, 3e-2)])
def test_two_steps_train_as_on_the_cpu(
    one_rank: None, clips: list[Clip], precision: str, lr: float, tolerance: float
) -> None:
    batches = [(collate(clips[:5]), torch.arange(5)), (collate(clips[5:]), torch.arange(5))]
    expected, _ = train("cpu", batches, lr)
    found, fused = train(GPU, batches, lr, precision=precision, recompute="all")
    assert fused
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_inputs_are_those_of_the_cpu(clips: list[Clip], model: VideoModel) -> None:
    batch = collate(clips)
    there, here = (model_inputs(batch, model.input_spec, device) for device in (GPU, "cpu"))
    for name, expected in here.items():
        torch.testing.assert_close(cast(Tensor, there[name]).cpu(), expected, rtol=1e-6, atol=1e-6)


def test_tvl1_is_that_of_the_cpu() -> None:
    images = torch.from_numpy(moving(103, 64, 64)[..., 1].copy())  # more pairs than are recorded together
    expected = tvl1_flow(images[:-1], images[1:])
    found = tvl1_flow(images[:-1].to(GPU), images[1:].to(GPU)).cpu()
    assert (found - expected).abs().mean() < 0.01  # px; hundreds of steps, sums in another order


@pytest.mark.parametrize(("depth", "columns", "side"), [(64, 256, 56), (256, 64, 13), (1024, 256, 14), (512, 2048, 7)])
def test_fused_convolutions_are_rounded_once(depth: int, columns: int, side: int) -> None:
    assert _launcher() is not None
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator).to(torch.bfloat16)
        for shape in ((5, depth, side, side), (columns, depth, 1, 1), (columns,), (5, columns, side, side))
    )
    expected = F.conv2d(x.double(), weight.double(), bias.double()) + residual.double()
    found = pointwise(x.to(GPU), weight.to(GPU), bias.to(GPU), residual.to(GPU), True).cpu().double()
    torch.testing.assert_close(found, expected.relu(), rtol=2**-8, atol=1e-3)


def test_a_batch_size_is_found(model: VideoModel) -> None:
    size = auto_batch_size(model, CLIP, InferenceConfig(precision="bf16"), GPU)
    assert size in (1, 2, 4, 8, 16, 32, 64)


@needs_torchcodec
def test_nvdec_gives_the_plans_frames_and_leaves_the_rest_to_it() -> None:
    there = replace(CLIP, decode=replace(CLIP.decode, device="cuda"))
    good, turned = make_video(moving(60), fps=30, gop=12), make_video(moving(24), rotation=90)
    with Sandbox(1) as sandbox:
        decoder = DeviceDecoder(sandbox)
        for video in (good, turned):
            found = decoder.decode(video, Views(views=ViewsConfig()), there.without_flow())
            expected = sandbox.decode(video, Views(views=ViewsConfig()), CLIP.without_flow())
            assert np.array_equal(found.indices, expected.indices)
            assert np.abs(found.frames.astype(int) - expected.frames).mean() < 4
    assert decoder.take_refused()["rotation"] == 1
    assert not decoder.take_refused()
