"""Inception-V1 over space and time: I3D (joint kernels), S3D (separable kernels), S3D-G (separable and gated).

Entries are named as in torchvision's GoogLeNet, so that its ImageNet weights can be inflated by name.

Shapes: M clips, C channels, T frames, Y X pixels, D features, H W feature grid
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BLOCKS",
    "ClippedPool3d",
    "ConvBn3d",
    "FeatureGate",
    "Inception3d",
    "SamePool3d",
    "SeparableConv3d",
    "same_pads",
]

Kind = Literal["joint", "separable", "gated"]

BLOCKS: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Channels of each inception block: 1x1; 3x3 reduce, 3x3; second reduce, second 3x3; after the pool."""


def same_pads(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """TensorFlow's SAME as F.pad takes it (last axis first): ceil(size / stride) cells come out along every axis.

    total = max((ceil(size / stride) - 1) * stride + kernel - size, 0)      front = floor(total / 2), rest behind
    """
    pads: list[int] = []
    for size, width, step in zip(sizes, kernel, stride, strict=True):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return pads


class ConvBn3d(nn.Module):
    """relu(BN(conv(x))) with a joint kernel k x k x k; padded by k // 2 all around, or not at all (pad=False)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, *, pad: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, size, stride=stride, padding=size // 2 if pad else 0, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, outputs, T / stride, Y / stride, X / stride]."""
        return torch.relu(self.bn(self.conv(x)))


class FeatureGate(nn.Module):
    """y = x * sigmoid(W mean_thw(x) + b), channel by channel (S3D-G: Xie et al. 2018, section 4.4)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_channels, num_channels)

    def forward(self, x_MCTHW: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        weight_MC = torch.sigmoid(self.linear(x_MCTHW.mean(dim=(2, 3, 4))))
        return x_MCTHW * weight_MC[:, :, None, None, None]


class SeparableConv3d(nn.Module):
    """relu(BN(k x 1 x 1 conv(relu(BN(1 x k x k conv(x)))))), and a gate behind it where asked (S3D, S3D-G)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, *, gated: bool = False) -> None:
        super().__init__()
        half = size // 2
        self.conv = nn.Conv3d(
            inputs, outputs, (1, size, size), stride=(1, stride, stride), padding=(0, half, half), bias=False
        )
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)
        self.time_conv = nn.Conv3d(
            outputs, outputs, (size, 1, 1), stride=(stride, 1, 1), padding=(half, 0, 0), bias=False
        )
        self.time_bn = nn.BatchNorm3d(outputs, eps=1e-3)
        self.gate = FeatureGate(outputs) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, outputs, T / stride, Y / stride, X / stride]."""
        x = torch.relu(self.bn(self.conv(x)))
        gated: Tensor = self.gate(torch.relu(self.time_bn(self.time_conv(x))))
        return gated


class SamePool3d(nn.Module):
    """Max pool whose output has ceil(size / stride) cells along each axis, whatever the size.

    Padding as in the original (TensorFlow's SAME: one more cell at the end than in front), or `both`: k // 2 on both
    sides, as torchvision's S3D has it. Inputs follow a ReLU, so zeros may stand for nothing.
    """

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int], *, both: bool = False) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        """Pool [M, C, T, H, W]."""
        if self.both:
            padding = tuple(size // 2 if size == 3 else 0 for size in self.kernel)
            return F.max_pool3d(x, self.kernel, self.stride, padding)
        return F.max_pool3d(F.pad(x, same_pads(x.shape[2:], self.kernel, self.stride)), self.kernel, self.stride)


class ClippedPool3d(nn.Module):
    """Average pool 2 x 7 x 7 with stride 1, its window cut to the grid: crops below 224 px and short clips work."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, C, T - 1, H - 6, W - 6], no side below 1."""
        window = [min(size, limit) for size, limit in zip(x.shape[2:], (2, 7, 7), strict=True)]
        return F.avg_pool3d(x, window, stride=1)


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int], kind: Kind) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = channels
        self.branch1 = ConvBn3d(inputs, one, 1)
        self.branch2 = nn.Sequential(ConvBn3d(inputs, reduce3, 1), _conv(reduce3, three, 3, 1, kind))
        self.branch3 = nn.Sequential(ConvBn3d(inputs, reduce5, 1), _conv(reduce5, five, 3, 1, kind))
        self.branch4 = nn.Sequential(nn.MaxPool3d(3, stride=1, padding=1), ConvBn3d(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


def _conv(inputs: int, outputs: int, size: int, stride: int, kind: Kind) -> nn.Module:
    if kind == "joint":
        return ConvBn3d(inputs, outputs, size, stride)
    return SeparableConv3d(inputs, outputs, size, stride, gated=kind == "gated")


class Inception3d(nn.Module):
    """Clips in, the feature grid of the last inception block out (1024 channels).

    kind: `joint` k x k x k kernels (I3D, Carreira and Zisserman 2017, figure 3), `separable` 1 x k x k then k x 1 x 1
    (S3D, Xie et al. 2018), `gated` = separable with a feature gate behind every temporal convolution (S3D-G).
    same_stem (joint kernels only): the stem, the only convolution with a stride, is padded as in TensorFlow; by 3 all
    around otherwise. At even sizes these are different networks.
    """

    num_channels = 1024
    depth_parts = (("conv1",), ("conv2",), ("conv3",), *((f"inception{name}",) for name in BLOCKS))

    def __init__(self, kind: Kind, *, in_channels: int = 3, pool_both: bool = False, same_stem: bool = False) -> None:
        super().__init__()
        assert kind == "joint" or not same_stem
        self.same_stem = same_stem
        self.conv1 = ConvBn3d(in_channels, 64, 7, 2, pad=False) if same_stem else _conv(in_channels, 64, 7, 2, kind)
        self.conv2 = ConvBn3d(64, 64, 1)
        self.conv3 = _conv(64, 192, 3, 1, kind)
        inputs = 192
        for name, channels in BLOCKS.items():
            self.add_module(f"inception{name}", _Block(inputs, channels, kind))
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
        self.space_pool = SamePool3d((1, 3, 3), (1, 2, 2), both=pool_both)
        self.pool3 = SamePool3d((3, 3, 3), (2, 2, 2), both=pool_both)
        self.pool4 = SamePool3d((2, 2, 2), (2, 2, 2), both=pool_both)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_MCTYX: Tensor) -> Tensor:
        """Return features [M, 1024, ceil(T / 8), Y / 32, X / 32]."""
        # Outside of conv1, so that its batch norm can be folded: what looks at sizes cannot be traced.
        x: Tensor = F.pad(x_MCTYX, same_pads(x_MCTYX.shape[2:], (7, 7, 7), (2, 2, 2))) if self.same_stem else x_MCTYX
        x = self.space_pool(self.conv1(x))
        x = self.space_pool(self.conv3(self.conv2(x)))
        for name in BLOCKS:
            if name == "4a":
                x = self.pool3(x)
            elif name == "5a":
                x = self.pool4(x)
            x = self.get_submodule(f"inception{name}")(x)
        return x
