"""Prepared models say what the plain ones say."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kinoray.network import InputSpec
from kinoray.network.prepare import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    Repeated,
    compile_pays,
    fold_batch_norms,
    prepare_for_inference,
)
from vcm_sdd.network import VCMSDD, vcm_sdd


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_clip(batch: int = 3, segments: int = 2, frames: int = 2, size: int = 32) -> dict[str, Tensor]:
    shape = (batch, segments, frames)
    return {"rgb": torch.randn(*shape, 3, size, size), "flow": torch.randn(*shape, 2, size, size)}


def shake_batch_norms(model: nn.Module) -> nn.Module:
    """Statistics as after training: folding must not pass because mean is 0 and variance 1."""
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def trained() -> VCMSDD:
    """A small network that tells three kinds of clips apart."""
    torch.manual_seed(0)
    model = vcm_sdd(num_classes=3, backbone="tiny", scale="dim")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(30):
        clip, labels = labelled(seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**clip), labels).backward()
        optimizer.step()
    return model


def labelled(seed: int, per_class: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(per_class)
    shape = (len(labels), 1, 2)
    rgb = torch.randn(*shape, 3, 32, 32, generator=generator)
    flow = torch.randn(*shape, 2, 32, 32, generator=generator)
    rgb += torch.eye(3)[labels].view(-1, 1, 1, 3, 1, 1)
    return {"rgb": rgb, "flow": flow}, labels


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32_TOLERANCE), ("bf16", BF16_TOLERANCE)])
def test_prepared_model_names_the_same_classes(precision: str, tolerance: float, trained: VCMSDD) -> None:
    clip, labels = labelled(seed=1000, per_class=20)
    plain = trained.eval()(**clip).detach()
    assert (plain.argmax(dim=1) == labels).float().mean() > 0.9
    logits = prepare_for_inference(trained, precision=precision)(**clip)  # type: ignore[arg-type]
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(logits.argmax(dim=1), plain.argmax(dim=1))
    assert (logits - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize(
    ("backbone", "changed"),
    [
        ("tiny", {}),
        ("tiny", {"mff": False}),
        ("tiny", {"mff_norm": True}),
        ("tiny", {"consensus": "probs"}),
        ("resnet18", {}),
        ("resnext50_32x4d", {}),
    ],
)
def test_prepared_model_gives_the_same_logits_with_every_head(backbone: str, changed: dict[str, bool]) -> None:
    model = shake_batch_norms(vcm_sdd(num_classes=5, backbone=backbone, **changed)).eval()
    clip = make_clip(2)
    with torch.no_grad():
        plain = model(**clip)
        torch.testing.assert_close(
            prepare_for_inference(model)(**clip), plain, rtol=0, atol=FP32_TOLERANCE * float(plain.abs().max())
        )
        rounded = prepare_for_inference(model, precision="bf16")(**clip)
        torch.testing.assert_close(rounded, plain, rtol=0, atol=BF16_TOLERANCE * float(plain.abs().max()))
        assert not torch.equal(rounded, plain)


def test_model_stays_as_it_was_and_can_go_on_training() -> None:
    model = vcm_sdd(num_classes=5, backbone="tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare_for_inference(model, precision="bf16")
    prepared(**make_clip())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert prepared.input_spec == model.input_spec
    model(**make_clip()).sum().backward()


def test_no_batch_norm_is_left_in_a_residual_network() -> None:
    model = vcm_sdd(num_classes=5, backbone="resnet18")
    prepared = prepare_for_inference(model)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in model.modules()) == 40
    assert not any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules())


def test_result_does_not_depend_on_frames_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_for_inference(shake_batch_norms(vcm_sdd(num_classes=5, backbone="tiny")))
    clip = make_clip()
    whole = prepared(**clip)
    calls = []
    prepared.rgb_backbone.traced.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[0]))
    monkeypatch.setattr("kinoray.network.prepare._CPU_PIXELS", 5 * 32 * 32)
    torch.testing.assert_close(prepared(**clip), whole, rtol=1e-5, atol=1e-6)
    assert calls == [4, 4, 4]


def test_wrong_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'int8'"):
        prepare_for_inference(nn.Linear(1, 1), precision="int8")  # type: ignore[arg-type]


def test_compiling_pays_only_for_long_jobs() -> None:
    assert not compile_pays(8 * 6 * 2)
    assert compile_pays(1000 * 16 * 6 * 2)


class Odd(nn.Module):
    """Parts that must be left alone: a batch norm in front of its convolution, one that shares it, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.twice_norm = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1, bias=False)
        self.plain_norm = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(self.before(x))
        x = self.first_norm(first) + first
        x = self.twice(self.twice_norm(self.twice(x)))
        return self.plain_norm(self.plain(x))


def test_only_batch_norms_that_can_be_folded_are() -> None:
    odd = Odd().eval()
    for norm in (odd.before, odd.first_norm, odd.twice_norm):
        shake_batch_norms(norm)
    nn.init.uniform_(odd.plain_norm.running_var, 0.5, 1.5)
    folded = fold_batch_norms(odd)
    assert folded is not None
    left = {name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert left == {"before", "first_norm", "twice_norm"}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), odd(x), rtol=1e-5, atol=1e-6)


class Branching(nn.Module):
    """A user's network that looks at its numbers, so only its parts can be traced; 3D convolutions."""

    input_spec = InputSpec(rgb=True)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.classifier = nn.Linear(8, 4)

    def forward(self, *, rgb: Tensor, flow: Tensor | None) -> Tensor:
        if not bool(rgb.isfinite().all()):
            raise ValueError("rgb must be finite")
        x = self.features(rgb.flatten(0, 1).transpose(1, 2))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3, 4)))
        return logits.unflatten(0, rgb.shape[:2]).mean(dim=1)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32_TOLERANCE), ("bf16", BF16_TOLERANCE)])
def test_any_model_can_be_prepared(precision: str, tolerance: float) -> None:
    model = shake_batch_norms(Branching()).eval()
    rgb = torch.randn(2, 2, 3, 3, 16, 16)
    prepared = prepare_for_inference(model, precision=precision)  # type: ignore[arg-type]
    assert not any(isinstance(part, nn.BatchNorm3d) for part in prepared.modules())
    plain, fast = model(rgb=rgb, flow=None), prepared(rgb=rgb, flow=None)
    assert fast.dtype == torch.float32
    assert (fast - plain).abs().max() <= tolerance * plain.abs().max()


def test_short_batches_are_filled_up_and_cut_off_again() -> None:
    model = vcm_sdd(num_classes=5, backbone="tiny", heads=2).eval()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(len(inputs["rgb"])), with_kwargs=True)
    repeated = Repeated(model)
    with torch.inference_mode():
        for batch, segments in ((3, 2), (1, 2), (4, 2), (2, 2), (1, 1)):
            clip = make_clip(batch, segments)
            found, plain = repeated(**clip), model(**clip)
            assert found.shape == (batch, 5)
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    assert seen[::2] == [3, 3, 4, 4, 1]
    assert repeated.input_spec == model.input_spec


COMPILED = """
import logging, sys, torch
from vcm_sdd import vcm_sdd
from kinoray.network.prepare import compile_named_parts, prepare_for_inference
logging.basicConfig()
torch.set_num_threads(1)
torch.manual_seed(0)
model = vcm_sdd(num_classes=5, backbone="tiny").eval()
prepared = prepare_for_inference(model, compile=True)
compile_named_parts(prepared)  # as on a GPU
for batch in (3, 1):  # the second is filled up to the size of the first
    clip = {"rgb": torch.randn(batch, 1, 2, 3, 32, 32), "flow": torch.randn(batch, 1, 2, 2, 32, 32)}
    plain, fast = model(**clip), prepared(**clip)
    assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max(), (plain, fast)
print("compiled", prepared.rgb_backbone.compiled.is_compiled, prepared.head.mff.is_compiled)
whole = prepare_for_inference(model, compile=True, fold=False)
for batch in (2, 1, 2):
    clip = {"rgb": torch.randn(batch, 1, 2, 3, 32, 32), "flow": torch.randn(batch, 1, 2, 2, 32, 32)}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain, fast = model(**clip), whole(**clip)
    assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max(), (plain, fast)
print("compiled anew", torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
"""


def run_compiled(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    fresh = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", COMPILED], env=fresh, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits(tmp_path: Path) -> None:
    done = run_compiled(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compiled True True" in done.stdout, done.stderr
    assert "compiled anew 0" in done.stdout


@pytest.mark.slow
def test_without_a_compiler_the_model_runs_uncompiled_and_says_so(tmp_path: Path) -> None:
    done = run_compiled(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert done.returncode == 0, done.stderr
    assert "compiled False False" in done.stdout
    assert "running without torch.compile" in done.stderr
