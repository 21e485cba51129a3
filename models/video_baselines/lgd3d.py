"""LGD-3D (Qiu et al., 2019): a pseudo-3D ResNet whose blocks keep a vector of the whole clip beside its grid.

Built after the first author's own PyTorch network (ZhaofanQiu/Optimization-Planning-for-3D-ConvNets,
model/lgd_p3d_resnet.py). A clip is one segment of T frames; the logits of the S segments are averaged.

Shapes: M clips, T frames, C channels, Y X pixels, D features, H W grid, K classes
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.backbone import build_backbones
from vcm_sdd.weights import load_strict
from video_baselines.resnet3d import DEPTHS, TimeConv3d, inflate_state
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    Modality,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
)

__all__ = ["LgdBlock", "LgdResNet3d", "P3dBranch", "lgd3d"]

_BACKBONES = ("resnet50", "resnet101", "resnet152")
_RANK_DIVISOR = 16
# Frames in a row of the video's own rate, as in base_config/default.yml and the records of that repository.
_RECIPE = ClipRecipe(frames=16, stride=1, resize="shortest", resize_px=(256, 256), crop_px=224)


class P3dBranch(nn.Module):
    """The residual branch of a bottleneck whose 3x3x3 is S = 1x3x3 and T = 3x1x1 (Qiu et al., 2017).

    a   relu(BN(T(S(x))))        b   relu(BN(S(x) + T(x)))        c   relu(y + T(y)),  y = relu(BN(S(x)))
    """

    def __init__(self, kind: Literal["a", "b", "c"], inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv1 = TimeConv3d(inputs, width)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = TimeConv3d(width, width, space=3, stride=(1, stride))
        self.conv2_t = TimeConv3d(width, width, time=3, stride=(1, stride if kind == "b" else 1))
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = TimeConv3d(width, 4 * width)
        self.bn3 = nn.BatchNorm3d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, 4 width, T, H / stride, W / stride], without a ReLU behind it."""
        x = torch.relu(self.bn1(self.conv1(x)))
        if self.kind == "a":
            y = torch.relu(self.bn2(self.conv2_t(self.conv2(x))))
        elif self.kind == "b":
            y = torch.relu(self.bn2(self.conv2(x) + self.conv2_t(x)))
        else:
            y = torch.relu(self.bn2(self.conv2(x)))
            y = torch.relu(y + self.conv2_t(y))
        out: Tensor = self.bn3(self.conv3(y))
        return out


class LgdBlock(nn.Module):
    """One step of both paths: the vector takes up the grid, then every cell of the grid takes up the vector.

        g' = relu(W_x mean_thw(x) + W_g g)
        x' = relu(shortcut(x) + branch(x) + W_o g')

    Each W is a product of two matrices of rank D / 16 with biases. W_o starts at 0: a new block is a residual block.
    """

    def __init__(self, kind: Literal["a", "b", "c"], inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = P3dBranch(kind, inputs, width, stride)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(TimeConv3d(inputs, outputs, stride=(1, stride)), nn.BatchNorm3d(outputs))
        self.from_local = _low_rank(inputs, outputs)
        self.from_global = _low_rank(inputs, outputs)
        self.to_local = _low_rank(outputs, outputs)
        last = self.to_local[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x_MDTHW: Tensor, g_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid and the vector behind this block."""
        g = torch.relu(self.from_local(x_MDTHW.mean(dim=(2, 3, 4))) + self.from_global(g_MD))
        x = self.branch(x_MDTHW) + self.downsample(x_MDTHW) + self.to_local(g)[:, :, None, None, None]
        return torch.relu(x), g


def _low_rank(inputs: int, outputs: int) -> nn.Sequential:
    rank = outputs // _RANK_DIVISOR
    return nn.Sequential(nn.Linear(inputs, rank), nn.Linear(rank, outputs))


class LgdResNet3d(nn.Module):
    """A ResNet of LGD blocks, their branches a, b, c, a, ... in turn; every `stride` frames are one from the stem on.

    logits = (W1 mean_thw(x) + b1 + W2 g + b2) / 2
    """

    depth_parts: DepthParts = (("stem",), ("layer1",), ("layer2",), ("layer3",), ("layer4",))

    def __init__(
        self, depths: Sequence[int], num_classes: int, *, in_channels: int, stride: int, dropout: float
    ) -> None:
        super().__init__()
        self.stride = stride
        first = nn.Conv3d(in_channels, 64, (stride, 7, 7), stride=(stride, 2, 2), padding=(0, 3, 3), bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        pool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.stem = nn.Sequential(first, nn.BatchNorm3d(64), nn.ReLU(inplace=True), pool)
        kinds: tuple[Literal["a", "b", "c"], ...] = ("a", "b", "c")
        inputs, count = 64, 0
        for number, depth in enumerate(depths):
            width, blocks = 64 * 2**number, nn.ModuleList()
            for index in range(depth):
                halves = 2 if number > 0 and index == 0 else 1
                blocks.append(LgdBlock(kinds[count % 3], inputs, width, halves))
                inputs, count = 4 * width, count + 1
            self.add_module(f"layer{number + 1}", blocks)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(inputs, num_classes)
        self.global_classifier = nn.Linear(inputs, num_classes)

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K] for clips [M, T, C, Y, X]; T must be a multiple of the stem's stride (ValueError)."""
        if clips_MTCYX.shape[1] % self.stride:
            raise ValueError(
                f"lgd3d needs a multiple of stride={self.stride} frames a segment, got {clips_MTCYX.shape[1]} "
                "(set clip.sample.frames_per_segment)"
            )
        x = self.stem(clips_MTCYX.transpose(1, 2))
        g = x.mean(dim=(2, 3, 4))
        for number in (1, 2, 3, 4):
            blocks = self.get_submodule(f"layer{number}")
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x, g = block(x, g)
        local_MK: Tensor = self.classifier(self.dropout(x.mean(dim=(2, 3, 4))))
        global_MK: Tensor = self.global_classifier(self.dropout(g))
        return (local_MK + global_MK) / 2

    def load_2d(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Start as the 2D network on the middle one of every `stride` frames: temporal kernels pass on what they see.

        state: of a torchvision ResNet of these depths, without its classifier. Raises WeightsMismatch.
        """
        for block in self.modules():
            if isinstance(block, P3dBranch):
                nn.init.zeros_(block.conv2_t.weight)
                if block.kind == "a":
                    nn.init.dirac_(block.conv2_t.weight)
        stem = {"conv1": "stem.0", "bn1": "stem.1"}
        renamed = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            ours = f"{stem[first]}.{rest}" if first in stem else re.sub(r"\.(conv\d|bn\d)\.", r".branch.\1.", name)
            renamed[ours] = value
        load_strict(self, {**self.state_dict(), **inflate_state(renamed, self, "centre")}, source=source)


def lgd3d(
    *,
    num_classes: int,
    backbone: str = "resnet101",
    backbone_weights: str | None = None,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    stride: int = 4,
    dropout: float = 0.5,
) -> ClipClassifier:
    """Build LGD-3D over a ResNet. T must be a multiple of stride (the authors' configurations: 16 and 4).

    backbone: resnet50, resnet101 or resnet152. backbone_weights: None (random), `imagenet`, the name of a torchvision
    weight set, or a .safetensors, .pth or .pt file of the 2D network. stride: frames that the stem joins to one.
    modality: rgb, flow, or two_stream (logits averaged). Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_choice("backbone", backbone, _BACKBONES)
    require_count("flow_channels", flow_channels)
    require_count("stride", stride)
    require_fraction("dropout", dropout)
    grids: dict[str, object] = {}
    if backbone_weights is not None:
        rgb, flow = build_backbones(backbone, flow_channels=flow_channels, weights=backbone_weights)
        grids = {"rgb": rgb, "flow": flow}

    def make(stream: Literal["rgb", "flow"]) -> nn.Module:
        channels = 3 if stream == "rgb" else flow_channels
        net = LgdResNet3d(DEPTHS[backbone], num_classes, in_channels=channels, stride=stride, dropout=dropout)
        if grids:
            grid = grids[stream]
            assert isinstance(grid, nn.Module)
            net.load_2d(grid.state_dict(), source=f"backbone_weights {backbone_weights}")
        return net

    spec = InputSpec(recipe=_RECIPE)
    return build_streams(modality, make, spec=spec, flow_channels=flow_channels, flow_weight=flow_weight)
