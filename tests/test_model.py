"""How a trained network is prepared for labelling: the same answers, or the network as it is."""

import logging

import pytest
import torch
from torch import Tensor, nn

from kinoray.config.shared import ClipConfig, InferenceConfig, SampleConfig, ViewConfig
from kinoray.errors import ModelError
from kinoray.network.prepare import compile_advice, prepare_model
from tiny_models import Spec

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=3), view=ViewConfig(resize_px=18, crop_px=16))


def trunk() -> nn.Sequential:
    """Convolution and batch norm with statistics as after training."""
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU())


class Small(nn.Module):
    """A network with a part that can be folded, or, with a norm of another kind, without one."""

    def __init__(self, body: nn.Module, num_classes: int = 5) -> None:
        super().__init__()
        self.input_spec = Spec()
        self.body, self.classify = body, nn.Linear(4, num_classes)
        self.dtypes: list[torch.dtype] = []

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        assert rgb is not None
        assert flow is None
        features = self.body(rgb.flatten(0, 2))
        self.dtypes.append(features.dtype)
        logits: Tensor = self.classify(features.mean(dim=(2, 3)).unflatten(0, rgb.shape[:3]).mean(dim=(1, 2)))
        return logits


class Moody(nn.Module):
    """Tracing freezes the first branch: the traced part gives other numbers than the part itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = trunk(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x)
        return y if isinstance(x, torch.fx.Proxy) else 2 * y


def clips(num_videos: int = 3) -> dict[str, Tensor | None]:
    return {"rgb": torch.randn(num_videos, 2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "flow": None}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_the_prepared_copy_says_what_the_network_says() -> None:
    network = Small(trunk()).eval()
    prepared = prepare_model(network, CLIP, InferenceConfig())
    assert prepared is not network
    assert not any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules())  # type: ignore[attr-defined]
    with torch.inference_mode():
        torch.testing.assert_close(prepared(**clips()), network(**clips()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", [trunk(), nn.Conv2d(3, 4, 3)], ids=["folded", "whole"])
def test_bf16_runs_in_bf16_and_answers_in_float32(body: nn.Module) -> None:
    network = Small(body).eval()
    prepared = prepare_model(network, CLIP, InferenceConfig(precision="bf16"))
    with torch.inference_mode():
        expected, found = network(**clips()), prepared(**clips())
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-2 * float(expected.abs().max()))


class Reaching(Small):
    """Calls the insides of a part by their names, so the part cannot be replaced."""

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        assert isinstance(self.body, nn.Sequential)
        assert rgb is not None
        features = self.body[2](self.body[1](self.body[0](rgb.flatten(0, 2))))
        logits: Tensor = self.classify(features.mean(dim=(2, 3)).unflatten(0, rgb.shape[:3]).mean(dim=(1, 2)))
        return logits


@pytest.mark.parametrize("network", [Small(Moody()), Reaching(trunk())], ids=["moody", "reaching"])
def test_a_network_that_cannot_be_folded_keeps_its_batch_norms(
    network: Small, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prepared = prepare_model(network, CLIP, InferenceConfig())
        rounded = prepare_model(network, CLIP, InferenceConfig(precision="bf16"))
    assert "batch norms stay: " in caplog.text
    assert not network.training
    with torch.inference_mode():
        expected = network(**clips())
        assert torch.equal(prepared(**clips()), expected)
        found = rounded(**clips())
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-2 * float(expected.abs().max()))


def test_a_network_that_cannot_be_run_is_named_with_its_input() -> None:
    wrong = Small(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ModelError, match=r"failed on a clip \{'rgb': \[1, 1, 3, 3, 16, 16\]\}: .*channels"):
        prepare_model(wrong, CLIP, InferenceConfig())


def test_compiling_is_advised_where_it_pays() -> None:
    spec = Spec(flow_channels=2)
    assert compile_advice(spec, CLIP, InferenceConfig(), 10) == ""
    assert "would save more time" in compile_advice(spec, CLIP, InferenceConfig(), 10**6)
    assert "takes longer than it saves" in compile_advice(spec, CLIP, InferenceConfig(compile=True), 10)
    assert compile_advice(spec, CLIP, InferenceConfig(compile=True), 10**6) == ""
