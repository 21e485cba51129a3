"""Residual networks over space and time, and the inflation of 2D weights into them (I3D, SlowFast).

Shapes: M clips, C channels, T frames, Y X pixels, D features, H W feature grid
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from video_baselines.nonlocal_block import NonLocalBlock, nonlocal_positions
from video_baselines.streams import DepthParts

__all__ = [
    "DEPTHS",
    "BasicBlock3d",
    "Bottleneck3d",
    "ResNet3d",
    "TimeConv3d",
    "inflate_kernel",
    "inflate_state",
    "make_stage",
]

Inflation = Literal["mean", "centre"]

DEPTHS: Mapping[str, tuple[int, int, int, int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
"""Residual blocks in res2 .. res5. 18 and 34 have blocks of two 3x3 convolutions, the others bottlenecks."""


class TimeConv3d(nn.Conv3d):
    """A bias-free convolution of size (t, k, k), padded so that stride 1 keeps the size.

    Beyond the first and last frame there are zeros, or copies of these frames (replicate=True).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        time: int = 1,
        space: int = 1,
        stride: tuple[int, int] = (1, 1),
        groups: int = 1,
        replicate: bool = False,
    ) -> None:
        padding = (0 if replicate else time // 2, space // 2, space // 2)
        kernel, strides = (time, space, space), (stride[0], stride[1], stride[1])
        super().__init__(inputs, outputs, kernel, stride=strides, padding=padding, groups=groups, bias=False)
        self.edge = time // 2 if replicate else 0
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [M, C, T, Y, X]."""
        if self.edge:
            input = F.pad(input, (0, 0, 0, 0, self.edge, self.edge), mode="replicate")
        return super().forward(input)


class BasicBlock3d(nn.Module):
    """y = relu(shortcut(x) + BN(1x3x3(relu(BN(tx3x3(x)))))). Names of entries as in torchvision."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, time: int, stride: int = 1, replicate: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = TimeConv3d(inputs, width, time=time, space=3, stride=(1, stride), replicate=replicate)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = TimeConv3d(width, outputs, space=3)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, outputs, T, Y / stride, X / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.downsample(x))


class Bottleneck3d(nn.Module):
    """y = relu(shortcut(x) + BN(1x1x1(relu(BN(1x3x3(relu(BN(tx1x1(x))))))))). Names of entries as in torchvision."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, time: int, stride: int = 1, replicate: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = TimeConv3d(inputs, width, time=time, replicate=replicate)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = TimeConv3d(width, width, space=3, stride=(1, stride))
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = TimeConv3d(width, outputs)
        self.bn3 = nn.BatchNorm3d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, outputs, T, Y / stride, X / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(TimeConv3d(inputs, outputs, stride=(1, stride)), nn.BatchNorm3d(outputs))


def make_stage(
    name: str, inputs: int, width: int, *, stride: int, times: Sequence[int], replicate: bool = False
) -> nn.Sequential:
    """Build one stage: a residual block of network `name` for each temporal kernel size in `times`."""
    basic = name in ("resnet18", "resnet34")
    kind, outputs = (BasicBlock3d, width) if basic else (Bottleneck3d, 4 * width)
    blocks = []
    for index, time in enumerate(times):
        first = index == 0
        blocks.append(
            kind(
                inputs if first else outputs,
                width,
                outputs,
                time=time,
                stride=stride if first else 1,
                replicate=replicate,
            )
        )
    return nn.Sequential(*blocks)


_STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNet3d(nn.Module):
    """I3D over a ResNet (Wang et al. 2018, table 1): clips in, the feature grid of res5 out.

    Stem 5x7x7; the first convolution of a residual block has temporal size 3 in every block of res2, every second one
    of res3 and res4 and the middle one of res5, else 1; a temporal max pool of 2 after res2. All else is the 2D
    network. strided_stem adds temporal strides of 2 to the stem and its pool, for clips of 32 frames and more.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        nonlocal_blocks: tuple[int, int] = (0, 0),
        strided_stem: bool = False,
        replicate: bool = False,
    ) -> None:
        super().__init__()
        stem_stride = 2 if strided_stem else 1
        depths = DEPTHS[name]
        self.conv1 = TimeConv3d(in_channels, 64, time=5, space=7, stride=(stem_stride, 2), replicate=replicate)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d((1, 3, 3), stride=(stem_stride, 2, 2), padding=(0, 1, 1))
        # ceil_mode: a single frame, or the last of an odd number, stays.
        self.time_pool = nn.MaxPool3d((2, 1, 1), ceil_mode=True)
        times = (
            [3] * depths[0],
            [3 if index % 2 == 0 else 1 for index in range(depths[1])],
            [3 if index % 2 == 0 else 1 for index in range(depths[2])],
            [1 if index % 2 == 0 else 3 for index in range(depths[3])],
        )
        expansion = 1 if name in ("resnet18", "resnet34") else 4
        inputs = (64, 64 * expansion, 128 * expansion, 256 * expansion)
        stages = [
            make_stage(name, inputs[i], 64 * 2**i, stride=1 if i == 0 else 2, times=times[i], replicate=replicate)
            for i in range(4)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.nonlocal_blocks = nn.ModuleDict(
            {
                f"layer{stage}_{index}": NonLocalBlock(64 * 2 ** (stage - 1) * expansion)
                for stage, wanted in zip((2, 3), nonlocal_blocks, strict=True)
                for index in nonlocal_positions(depths[stage - 1], wanted)
            }
        )
        self.num_channels = 512 * expansion
        blocks_of = {name: [part for part in self.nonlocal_blocks if part.startswith(f"{name}_")] for name in _STAGES}
        self.depth_parts: DepthParts = (
            ("conv1", "bn1"),
            *((name, *(f"nonlocal_blocks.{part}" for part in blocks)) for name, blocks in blocks_of.items()),
        )

    def forward(self, x_MCTYX: Tensor) -> Tensor:
        """Return features [M, num_channels, ceil(T / 2), Y / 32, X / 32] (T / 8 with a strided stem)."""
        x: Tensor = self.maxpool(torch.relu(self.bn1(self.conv1(x_MCTYX))))
        x = self.time_pool(self.layer1(x))
        for name, stage in (("layer2", self.layer2), ("layer3", self.layer3), ("layer4", self.layer4)):
            for index, block in enumerate(stage):
                x = block(x)
                key = f"{name}_{index}"
                if key in self.nonlocal_blocks:
                    x = self.nonlocal_blocks[key](x)
        return x


def inflate_kernel(weight_OIYX: Tensor, time: int, how: Inflation = "mean") -> Tensor:
    """Return a 3D kernel [O, I, time, Y, X] that acts on a repeated frame as the 2D kernel acts on that frame.

    mean     w3[t] = w2 / time for all t        Carreira and Zisserman (2017), section 2.2
    centre   w3[time // 2] = w2, the rest 0     also right at the ends, where the padding is zero
    """
    if how == "mean":
        return weight_OIYX.unsqueeze(2).repeat(1, 1, time, 1, 1) / time
    inflated = weight_OIYX.new_zeros((*weight_OIYX.shape[:2], time, *weight_OIYX.shape[2:]))
    inflated[:, :, time // 2] = weight_OIYX
    return inflated


def inflate_state(state_2d: Mapping[str, Tensor], net: nn.Module, how: Inflation = "mean") -> dict[str, Tensor]:
    """Return the state dict of a 2D network with every 2D kernel inflated to the size of `net`'s entry of that name."""
    sizes = {name: value.shape for name, value in net.state_dict().items()}
    return {
        name: inflate_kernel(value, sizes[name][2], how) if value.ndim == 4 and len(sizes.get(name, ())) == 5 else value
        for name, value in state_2d.items()
    }
