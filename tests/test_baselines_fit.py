"""Every baseline learns 8 videos by heart: its parameters are connected, its modes and shapes hold in training."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import video_baselines as vb
from small_baselines import SMALL

QUICK = {"tsn rgb", "tsn flow", "tsn two-stream", "tsm", "tsm online", "i3d_nl", "slowfast", "stnet", "swin3d_t"}
LEARNING_RATE = {"mvit_v2_s": 2e-4}  # 1e-3 throws this one about; the others take it


def plain_training(net: nn.Module) -> nn.Module:
    """Take away what works against learning by heart, and let BN statistics follow within a few steps."""
    for module in net.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.3
    return net.train()


def videos(clip: tuple[int, int], px: int) -> tuple[Tensor, Tensor, Tensor]:
    """8 videos of noise in 4 classes that nothing but their pixels tells apart."""
    rgb = torch.randn(8, *clip, 3, px, px)
    flow = torch.rand(8, *clip, 2, px, px) * 2 - 1
    return rgb, flow, torch.arange(8) % 4


def learn(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, max_steps: int, lr: float) -> tuple[float, int]:
    """Return the share of videos that are right in eval mode, and the steps it took."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, foreach=True)
    share = 0.0
    for step in range(1, max_steps + 1):
        model.train()
        loss = F.cross_entropy(model(**inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 4 == 0:
            with torch.no_grad():
                share = float((model.eval()(**inputs).argmax(dim=1) == labels).double().mean())
            if share == 1.0:
                return share, step
    return share, max_steps


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SMALL]
)
def test_eight_videos_are_learnt_by_heart(name: str) -> None:
    torch.manual_seed(0)
    factory, options, clip, px = SMALL[name]
    model = plain_training(getattr(vb, factory)(num_classes=4, **options))
    rgb, flow, labels = videos(clip, px)
    inputs = {"rgb": rgb, "flow": flow}
    with torch.no_grad():
        before = float((copy.deepcopy(model).eval()(**inputs).argmax(dim=1) == labels).double().mean())
    share, steps = learn(model, inputs, labels, max_steps=60, lr=LEARNING_RATE.get(name, 1e-3))
    assert before < 1.0
    assert share == 1.0, f"{share:.0%} after {steps} steps"
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert not idle, f"parameters that no gradient reaches: {idle[:5]}"
