"""STC networks (Diba et al., 2018): 3D ResNets and ResNeXts whose branches are weighed channel by channel.

Not the STC of VCM-SDD. A clip is one segment of as many frames as the network was built for; the logits of the S
segments are averaged. docs/models.md says what of it could be read where.

Shapes: M clips, C channels, T frames, Y X pixels, D features, H W grid
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from video_baselines.i3d import PooledClassifier
from video_baselines.resnet3d import DEPTHS, TimeConv3d
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
)

__all__ = ["StcBlock", "StcResNet3d", "stcnet"]

_BACKBONES: Mapping[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet50": (DEPTHS["resnet50"], 1),
    "resnet101": (DEPTHS["resnet101"], 1),
    "resnet152": (DEPTHS["resnet152"], 1),
    "resnext50_32x4d": (DEPTHS["resnet50"], 32),
    "resnext101_32x4d": (DEPTHS["resnet101"], 32),
}
"""Blocks in res2 .. res5, and groups of the 3x3x3 convolutions."""


class StcBlock(nn.Module):
    """Weigh the channels by what they are over the clip, and by what they are in each frame.

        t = sigmoid(W2 relu(W1 mean_thw(x)))      TCB   W1: D/r x D      W2: D x D/r
        s = sigmoid(W4 relu(W3 mean_hw(x)))       SCB   W3: TD/r x TD    W4: D x TD/r
        y = (t * x + s * x) / 2                         t, s: one number a channel

    The matrices have biases. T is that of the grid, so a block is built for it.
    """

    def __init__(self, num_channels: int, num_frames: int, reduction: int) -> None:
        super().__init__()
        self.temporal = _excitation(num_channels, num_channels, reduction)
        self.spatial = _excitation(num_frames * num_channels, num_channels, reduction)

    def forward(self, x_MDTHW: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        t_MD = self.temporal(x_MDTHW.mean(dim=(2, 3, 4)))
        s_MD = self.spatial(x_MDTHW.mean(dim=(3, 4)).flatten(1))
        return torch.mul(x_MDTHW, ((t_MD + s_MD) / 2)[:, :, None, None, None])


def _excitation(inputs: int, outputs: int, reduction: int) -> nn.Sequential:
    inner = max(inputs // reduction, 1)
    return nn.Sequential(nn.Linear(inputs, inner), nn.ReLU(inplace=True), nn.Linear(inner, outputs), nn.Sigmoid())


class _Bottleneck(nn.Module):
    """y = relu(shortcut(x) + STC(BN(1x1x1(relu(BN(3x3x3(relu(BN(1x1x1(x)))))))))); stride and groups: of the 3x3x3."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, stride: int, groups: int, num_frames: int, reduction: int
    ) -> None:
        super().__init__()
        strides = (stride, stride)
        self.branch = nn.Sequential(
            TimeConv3d(inputs, width),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            TimeConv3d(width, width, time=3, space=3, stride=strides, groups=groups),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            TimeConv3d(width, outputs),
            nn.BatchNorm3d(outputs),
        )
        self.stc = StcBlock(outputs, num_frames, reduction)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(TimeConv3d(inputs, outputs, stride=strides), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.stc(self.branch(x)) + self.downsample(x))


class StcResNet3d(nn.Module):
    """Hara et al.'s 3D ResNet or ResNeXt (2018) with an STC block in every residual branch, in front of the sum.

    Stem 7x7x7, stride 1 x 2 x 2; max pool 3x3x3, stride 2; res3 .. res5 halve time, height and width.
    """

    num_channels = 2048
    depth_parts: DepthParts = (("stem",), ("layer1",), ("layer2",), ("layer3",), ("layer4",))

    def __init__(self, name: str, *, frames: int, reduction: int, in_channels: int = 3) -> None:
        super().__init__()
        depths, groups = _BACKBONES[name]
        self.stem = nn.Sequential(
            TimeConv3d(in_channels, 64, time=7, space=7, stride=(1, 2)),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(3, stride=2, padding=1),
        )
        inputs = 64
        num_frames = -(-frames // 2)
        for number, depth in enumerate(depths):
            stride = 1 if number == 0 else 2
            num_frames = -(-num_frames // stride)
            outputs = 256 * 2**number
            width = outputs // 2 if groups > 1 else outputs // 4
            blocks = [
                _Bottleneck(
                    inputs if index == 0 else outputs,
                    width,
                    outputs,
                    stride=stride if index == 0 else 1,
                    groups=groups,
                    num_frames=num_frames,
                    reduction=reduction,
                )
                for index in range(depth)
            ]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x_MCTYX: Tensor) -> Tensor:
        """Return features [M, 2048, ceil(T / 16), Y / 32, X / 32]."""
        x: Tensor = self.stem(x_MCTYX)
        for number in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{number}")(x)
        return x


def stcnet(
    *,
    num_classes: int,
    backbone: str = "resnext101_32x4d",
    frames: int = 32,
    reduction: int = 16,
    dropout: float = 0.0,
) -> ClipClassifier:
    """Build an STC network from random weights. The default is STC-ResNext-101 of 32 frames.

    backbone: resnet50, resnet101, resnet152, resnext50_32x4d or resnext101_32x4d. frames: of a clip, which fixes it
    (the paper: 16, 32 and 64). reduction: r in StcBlock. RGB. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_choice("backbone", backbone, _BACKBONES)
    require_count("frames", frames)
    require_count("reduction", reduction)
    require_fraction("dropout", dropout)
    # Of the paper only the number of frames; the rest as Hara et al. test the networks below it.
    recipe = ClipRecipe(frames=frames, stride=1, resize="shortest", resize_px=(112, 112), crop_px=112)
    return build_streams(
        "rgb",
        lambda _: PooledClassifier(
            StcResNet3d(backbone, frames=frames, reduction=reduction), StcResNet3d.num_channels, num_classes, dropout
        ),
        spec=InputSpec(frames_per_segment=frames, recipe=recipe),
    )
