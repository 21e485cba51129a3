"""1 x 1 convolutions with what follows them: the same numbers as apart, from torch's operations and from the kernel.

The kernel itself runs here in Triton's interpreter, and is compiled for an H100 as far as its machine code.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from kinoray.network.pointwise import Pointwise, fuse_pointwise, pointwise
from kinoray.network.prepare import Compiled, fold_batch_norms
from vcm_sdd.network import vcm_sdd

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch comes without Triton")
PLATFORM = Path(__file__).resolve().parents[1] / "platform"


def conv(inputs: int = 64, outputs: int = 64, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def fused(module: nn.Module, x: Tensor) -> int:
    """How many were fused; what the module gives must stay the same."""
    traced = fx.symbolic_trace(module.eval())
    with torch.no_grad():
        expected = module(x.clone())
        count = fuse_pointwise(traced)
        assert float((traced(x.clone()) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert sum(isinstance(part, Pointwise) for part in traced.modules()) == count
    return count


@pytest.mark.parametrize(("name", "count"), [("resnet18", 0), ("resnet50", 33)])
def test_a_folded_resnet(name: str, count: int) -> None:
    torch.manual_seed(0)
    trunk = fold_batch_norms(vcm_sdd(num_classes=3, backbone=name).rgb_backbone)
    assert trunk is not None
    assert fused(trunk, torch.randn(2, 3, 64, 64)) == count


class Net(nn.Module):
    def __init__(self, call: Callable[["Net", Tensor], Tensor], **options: int) -> None:
        super().__init__()
        self.conv, self.other, self.relu, self.call = conv(**options), conv(), nn.ReLU(inplace=True), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x * 1.0)


def later(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    net.relu(x)  # in place, before the sum
    return y + x


def residual_later(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x.clone()) + x
    net.relu(x)  # in place, between the sum and its ReLU
    return torch.relu(y)


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda net, x: net.conv(x), 1),
        (lambda net, x: F.relu(net.conv(x)), 1),
        (lambda net, x: net.conv(x).add_(x).relu_(), 1),
        (lambda net, x: net.relu(x + net.conv(x.clone())), 1),
        (lambda net, x: torch.relu(net.conv(x.clone()) + net.other(x)), 2),
        (lambda net, x: net.conv(x.clone()) + 1.0, 1),
        (lambda net, x: torch.add(net.conv(x.clone()), x, alpha=2.0), 1),
        (lambda net, x: net.relu(net.conv(x.clone()) + x.mean(dim=(2, 3), keepdim=True)), 1),
        (lambda net, x: (lambda y: y + y.relu())(net.conv(x)), 1),
        (lambda net, x: (lambda y: y + y)(net.conv(x)), 1),
        (later, 0),
        (residual_later, 1),
    ],
)
def test_what_follows_is_taken_along_where_nothing_else_looks_at_it(call: Callable, count: int) -> None:
    torch.manual_seed(0)
    assert fused(Net(call), torch.randn(2, 64, 5, 7)) == count


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}, {"padding": 1}, {"outputs": 96}])
def test_other_convolutions_stay(options: dict[str, int]) -> None:
    assert fused(Net(lambda net, x: net.relu(net.conv(x)), **options), torch.randn(2, 64, 6, 6)) == 0


def test_it_can_be_compiled() -> None:
    torch.manual_seed(0)
    block = fold_batch_norms(Bottleneck(256, 64))
    assert block is not None
    x = torch.randn(2, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = block(x)
        assert fuse_pointwise(block) == 2
        compiled = Compiled(block, {"freezing": True})
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert compiled.is_compiled


def test_the_operation_says_what_it_gives() -> None:
    x, weight, bias = torch.randn(2, 64, 3, 5), torch.randn(128, 64, 1, 1), torch.randn(128)
    residual = torch.randn(2, 128, 3, 5)
    for arguments in ((x, weight, bias, None, False), (x, weight, bias, residual, True)):
        torch.library.opcheck(pointwise, arguments)


INTERPRETED = """
import itertools, torch
from torch.nn import functional as F
from kinoray.network.pointwise import launch, make_kernel, require_right

torch.manual_seed(0)
kernel, worst = make_kernel(), 0.0
for (frames, side, depth, columns), add, relu in itertools.product(
    [(1, 3, 64, 64), (3, 7, 128, 64), (2, 9, 64, 256)], (False, True), (False, True)
):
    x = torch.randn(frames, depth, side, side)
    weight, bias = torch.randn(columns, depth, 1, 1), torch.randn(columns)
    residual = torch.randn(frames, columns, side, side) if add else None
    found = launch(kernel, x, weight, bias, residual, relu)
    expected = F.conv2d(x.double(), weight.double(), bias.double()) + (0.0 if residual is None else residual.double())
    expected = expected.relu() if relu else expected
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    worst = max(worst, float((found - expected).abs().max()))
require_right(kernel, "cpu", torch.float32)


class Wrong:
    def __getitem__(self, grid):
        return lambda x, weight, bias, residual, y, *sizes, **constants: y.copy_(torch.randn(y.shape))


try:
    require_right(Wrong(), "cpu", torch.float32)
except ArithmeticError:
    print(worst)
"""


@needs_triton
def test_the_kernel_gives_the_convolution() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kinoray.network.pointwise import make_kernel

names = ("x", "weight", "bias", "residual", "y")
signature = {**{name: "*bf16" for name in names}, "num_rows": "i32", "num_columns": "i32"}
for columns, warps in ((128, 8), (64, 4)):
    constants = {"depth": 256, "ADD": True, "RELU": True, "ROWS": 128, "COLUMNS": columns, "DEPTH": 64}
    source = ASTSource(
        make_kernel(),
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 4, 6)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})
    print(made.asm["ptx"].count("wgmma.mma_async"), made.metadata.shared)
"""


@needs_triton
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's compiler is there for Linux")
def test_the_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        products, shared_bytes = map(int, line.split())
        assert products > 0, "no matrix products in its machine code"
        assert 2 * shared_bytes <= 227 * 1024, "two programs should fit on a core"
