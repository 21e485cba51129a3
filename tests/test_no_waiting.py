"""What runs on a GPU stays there: no operation of it waits for the host, so it can be queued ahead and recorded.

Found out on stand-ins for CUDA tensors (tests/stand_ins.py), on a machine without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import video_baselines as vb
from kinoray.config.shared import AugmentConfig, ModelConfig, OptimConfig, SampleConfig
from kinoray.network import InputSpec
from kinoray.network import flow_tvl1 as tvl1
from kinoray.network.batch import DeviceInput, RawBatch, VideoBatch, model_inputs
from kinoray.network.build import build_model
from kinoray.network.pointwise import fuse_pointwise
from kinoray.network.prepare import fold_batch_norms, prepare_for_inference
from kinoray.train import recipe
from kinoray.train.config import TrainConfig
from kinoray.train.recipe import PHOTOMETRIC, Mix, colour_clip, mix_inputs
from kinoray.train.step import Replica
from stand_ins import LeavesDevice, moved, on_device, stand_ins
from vcm_sdd.backbone import build_backbone

SAMPLE, SIZE = SampleConfig(num_segments=2, frames_per_segment=3), 64
MODEL = ModelConfig(options={"backbone": "resnet18", "heads": 2})
FACTORIES = sorted(set(vb.__all__) - {"ClipClassifier", "huggingface", "image_text"})  # a config makes those

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with stand_ins():
        yield


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def inputs_of(spec: Any, videos: int = 2) -> dict[str, Tensor | None]:
    size = spec.crop_px or SIZE
    shape = (videos, spec.num_segments or 2, spec.frames_per_segment or 8)
    return {
        "rgb": cuda(*shape, 3, size, size) if spec.rgb else None,
        "flow": cuda(*shape, spec.flow_channels, size, size) if spec.flow_channels else None,
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x[torch.arange(3)],
        lambda x: x + torch.ones(3),
    ],
)
def test_the_stand_ins_find_what_waits(call: Callable[[Tensor], object]) -> None:
    with on_device(), pytest.raises((LeavesDevice, RuntimeError)):
        call(cuda(3))


def test_only_copies_that_do_not_wait_may_come_from_the_host() -> None:
    with on_device(sends=True):
        cuda(3) + torch.ones(3).to("cuda", non_blocking=True)
        with pytest.raises(LeavesDevice, match="waits"):
            torch.ones(3).to("cuda")


def network(config: ModelConfig, precision: Any = None) -> nn.Module:
    """Built on the host, as a worker does it; then on the device. With a precision, as labelling prepares it."""
    with unset_fake_temporarily():
        model = cast(nn.Module, build_model(config, 7))
        if precision is not None:
            model = prepare_for_inference(model, precision=precision)
    return moved(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"scale": "dim", "consensus": "probs"}, {"mff": False}, {"stc": False}, {"mff_norm": True}]
)
def test_labelling_a_second_batch(precision: Any, options: dict[str, Any]) -> None:
    """The first call may keep things on the device; a recording is made of a later one."""
    prepared = network(ModelConfig(options={**MODEL.options, **options}), precision)
    inputs = inputs_of(prepared.input_spec)
    with torch.no_grad():
        prepared(**inputs)
        with on_device():
            assert prepared(**inputs).shape == (2, 7)


def test_fused_convolutions() -> None:
    with unset_fake_temporarily():
        trunk = fold_batch_norms(build_backbone("resnet50"))
        assert trunk is not None
        assert fuse_pointwise(trunk) == 33
    moved(trunk.to(torch.bfloat16))
    with torch.no_grad(), on_device():
        features = trunk(cuda(4, 3, SIZE, SIZE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last))
    assert features.shape == (4, 2048, 2, 2)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "mvit_v2_s"])
def test_labelling_with_another_network(name: str) -> None:
    model = network(ModelConfig(factory=name)).eval()
    inputs = inputs_of(model.input_spec)
    with torch.no_grad():
        model(**inputs)
        with on_device():
            assert model(**inputs).shape == (2, 7)


def test_what_torchvision_sends_from_the_host() -> None:
    """So MViT runs without a CUDA graph, and sharpness costs a wait a clip (docs/gpu.md)."""
    model = network(ModelConfig(factory="mvit_v2_s")).eval()
    with torch.no_grad(), on_device(), pytest.raises(LeavesDevice):
        model(**inputs_of(model.input_spec))
    clip = cuda(2, 3, 3, SIZE, SIZE, dtype=torch.uint8)
    with on_device(), pytest.raises(LeavesDevice):
        recipe._randaugment(clip[0, 0], "sharpness", 9, 1.0, SIZE)


@pytest.mark.parametrize("name", ["vcm_sdd", "tsn", "tsm"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "tiny"])
def test_convolutions_see_channels_last(name: str, backbone: str) -> None:
    """In training, too: cuDNN has matrix units for no other order."""
    model = network(ModelConfig(factory=name, options={"backbone": backbone})).train()
    seen = []
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(
                lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
            )
    model(**inputs_of(model.input_spec))
    assert len(seen) >= 5
    assert all(seen)


def test_inputs() -> None:
    shape = (2, 2, 3)
    flow = cuda(*shape, 2, SIZE, SIZE, dtype=torch.int8)
    batch = VideoBatch(rgb=cuda(*shape, 3, SIZE, SIZE, dtype=torch.uint8), flow=flow)
    with on_device(sends=True):
        found = model_inputs(batch, InputSpec(rgb=True, flow_channels=2), "cuda")
    assert [cast(Tensor, x).device.type for x in found.values()] == ["cuda", "cuda"]


def test_flow_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = DeviceInput(20.0, "cpu")  # pinned memory and streams need a GPU; what is fed is on it
    finish._feed = lambda tensors: [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors]  # type: ignore
    monkeypatch.setattr(tvl1, "_runner", lambda device, shape: partial(tvl1._flow_of_group, step=tvl1._step))
    grid = (2, 3)
    with unset_fake_temporarily():
        raw = RawBatch(
            frames=torch.zeros(2, *grid, 3, SIZE, SIZE, dtype=torch.uint8),
            partners=torch.zeros(2, *grid, 1, SIZE, SIZE, dtype=torch.uint8),
            last=torch.zeros(2, *grid, dtype=torch.bool),
        )
    with on_device():
        batch = finish(raw)
    assert len(batch) == 2
    assert cast(Tensor, batch.flow).shape == (2, *grid, 2, SIZE, SIZE)


@pytest.mark.parametrize("operation", [name for name in PHOTOMETRIC if name != "sharpness"])
def test_colours(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PHOTOMETRIC", (operation,))
    config = AugmentConfig(colour_jitter=0.4, randaugment_ops=2, randaugment_magnitude=9)
    clip = cuda(2, 3, 3, SIZE, SIZE, dtype=torch.uint8)
    with on_device():
        assert colour_clip(clip, config, np.random.default_rng(0)).shape == clip.shape


@pytest.mark.parametrize("box", [None, (3, 4, 20, 20)])
def test_mixtures(box: Any) -> None:
    own, other = (inputs_of(InputSpec(rgb=True, flow_channels=2)) for _ in range(2))
    mix = Mix(0.7, torch.tensor([1, 0]), box)
    with on_device():
        mix_inputs(own, other, mix)


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["none", "head", "all"])
def test_the_loss_of_a_second_training_step(ranks: None, recompute: Any) -> None:
    """Up to the backward pass, for which torch wants a GPU. What the first step keeps is there for the second."""
    optim = OptimConfig(recompute=recompute, label_smoothing=0.1)
    config = TrainConfig(catalog="c", out="o", model=MODEL, optim=optim)
    replica = Replica(cast(Any, network(MODEL)), 7, config, torch.device("cuda"))
    replica.train()
    frames, flow = (cuda(2, 2, 3, n, SIZE, SIZE, dtype=dtype) for n, dtype in ((3, torch.uint8), (2, torch.int8)))
    batch, labels = VideoBatch(rgb=frames, flow=flow), torch.tensor([0, 1])
    mix = Mix(0.7, torch.tensor([1, 0]), None)
    for context in (nullcontext(), on_device(sends=True)):
        with context:
            replica._exchange(torch.zeros((), dtype=torch.float64, device="cuda"))
            assert replica._train_part(batch, labels, slice(0, 2), mix).device.type == "cuda"
