"""ECO (Zolfaghari et al., 2018): a 2D network on every frame, a 3D network over the frames' feature maps.

All S x T frames of a video, in order of time, are one sequence (the paper: S = 4 .. 32 segments, T = 1).

Shapes: M clips, T frames, F = M*T frames, C channels, Y X pixels, H W feature grid, K classes
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinoray.network import InputSpec
from video_baselines.streams import ClipClassifier, DepthParts, build_streams, require_count, require_fraction

__all__ = ["BN_INCEPTION", "BnInceptionBlock", "Eco", "eco"]

BN_INCEPTION: Mapping[str, tuple[int, int, int, int, int, str, int]] = {
    "3a": (64, 64, 64, 64, 96, "avg", 32),
    "3b": (64, 64, 96, 64, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, "stride", 0),
    "4a": (224, 64, 96, 96, 128, "avg", 128),
    "4b": (192, 96, 128, 96, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, "avg", 128),
    "4d": (96, 128, 192, 160, 192, "avg", 128),
    "4e": (0, 128, 192, 192, 256, "stride", 0),
    "5a": (352, 192, 320, 160, 224, "avg", 128),
    "5b": (352, 192, 320, 192, 224, "max", 128),
}
"""BN-Inception's blocks: channels of 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool, channels after it."""


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _HalfPool(nn.Module):
    """Max pool 3x3, stride 2, to ceil(size / 2): padded at the end, at both ends where the size is odd."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


class BnInceptionBlock(nn.Module):
    """Side by side: 1x1; 3x3; 3x3 after 3x3; pool. In a `stride` block no 1x1, stride 2, the pool as it is."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, str, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce_double, double, pool, pooled = channels
        stride = 2 if pool == "stride" else 1
        self.one = _conv(inputs, one, 1) if one else None
        self.three = nn.Sequential(_conv(inputs, reduce3, 1), _conv(reduce3, three, 3, stride))
        self.maps = nn.Sequential(_conv(inputs, reduce_double, 1), _conv(reduce_double, double, 3))
        self.twice = _conv(double, double, 3, stride)
        self.pool: nn.Module
        if pool == "stride":
            self.pool = _HalfPool()
        else:
            kind = nn.AvgPool2d(3, stride=1, padding=1) if pool == "avg" else nn.MaxPool2d(3, stride=1, padding=1)
            self.pool = nn.Sequential(kind, _conv(inputs, pooled, 1))
        self.outputs = one + three + double + (pooled or inputs)

    def forward(self, x: Tensor, maps: Tensor | None = None) -> Tensor:
        """Return all branches, [F, outputs, H / stride, W / stride]; `maps`: self.maps(x) where it is there already."""
        branches = [] if self.one is None else [self.one(x)]
        maps = self.maps(x) if maps is None else maps
        return torch.cat([*branches, self.three(x), self.twice(maps), self.pool(x)], dim=1)


def _conv3d(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _activate(num_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm3d(num_channels), nn.ReLU(inplace=True))


class _Stage3d(nn.Module):
    """a = conv(act(conv(x))) + down(x);  out = act(a + conv(act(conv(act(a)))));  act = relu(BN), all 3x3x3."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv3d(inputs, outputs, stride), _activate(outputs), _conv3d(outputs, outputs))
        self.down = _conv3d(inputs, outputs, stride) if stride > 1 else None
        # The ReLU behind `before` must not write into the sum's other term.
        self.before = nn.Sequential(nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))
        self.second = nn.Sequential(_conv3d(outputs, outputs), _activate(outputs), _conv3d(outputs, outputs))
        self.after = _activate(outputs)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        if self.down is not None:
            a = a + self.down(x)
        out: Tensor = self.after(a + self.second(self.before(a)))
        return out


class Eco(nn.Module):
    """Section 3 of the paper, figures 2-3 and table 1; clips [M, T, C, Y, X] in, logits [M, K] out.

    maps_t  = BN-Inception of frame t up to the inner 3x3 of inception-3c: 96 channels, 28 x 28 at 224 px
    v3d     = mean over thw of res5(res4(res3(maps_1 .. maps_T)))       a 3D ResNet-18's last three stages, 512
    v2d     = mean over t, yx of the rest of BN-Inception               1024, left out in ECO Lite
    logits  = W [v2d; v3d] + b
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, lite: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(in_channels, 64, 7, 2), _HalfPool(), _conv(64, 64, 1), _conv(64, 192, 3), _HalfPool()
        )
        self.blocks = nn.ModuleDict()
        inputs = 192
        for name, channels in BN_INCEPTION.items():
            block = BnInceptionBlock(inputs, channels)
            if lite and name == "3c":
                # Only its inner maps are used: one owner for each parameter.
                self.lite_maps = block.maps
                break
            self.blocks[name] = block
            inputs = block.outputs
        self.lite = lite
        self.volume = nn.Sequential(_Stage3d(96, 128, 1), _Stage3d(128, 256, 2), _Stage3d(256, 512, 2))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(512 if lite else 512 + inputs, num_classes)

    @property
    def depth_parts(self) -> DepthParts:
        """The common part, block by block; then each stage of the 3D tail beside two or three blocks of the 2D one."""
        tails = (("volume.0", "4a", "4b"), ("volume.1", "4c", "4d", "4e"), ("volume.2", "5a", "5b"))
        beside = tuple((stage, *(f"blocks.{name}" for name in names)) for stage, *names in tails)
        return ("stem",), ("blocks.3a",), ("blocks.3b",), ("blocks.3c", "lite_maps"), *beside

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]."""
        num_frames = clips_MTCYX.shape[1]
        x = self.blocks["3b"](self.blocks["3a"](self.stem(clips_MTCYX.flatten(0, 1))))
        maps: Tensor = self.lite_maps(x) if self.lite else self.blocks["3c"].get_submodule("maps")(x)
        vectors = [self.volume(maps.reshape(-1, num_frames, *maps.shape[1:]).transpose(1, 2)).mean(dim=(2, 3, 4))]
        if not self.lite:
            x = self.blocks["3c"](x, maps)
            for name in ("4a", "4b", "4c", "4d", "4e", "5a", "5b"):
                x = self.blocks[name](x)
            vectors.insert(0, x.mean(dim=(2, 3)).reshape(-1, num_frames, x.shape[1]).mean(dim=1))
        logits_MK: Tensor = self.classifier(self.dropout(torch.cat(vectors, dim=1)))
        return logits_MK


def eco(*, num_classes: int, lite: bool = False, dropout: float = 0.5) -> ClipClassifier:
    """Build ECO from random weights; lite=True leaves out the 2D tail. RGB. Raises ValueError naming the option."""
    require_count("num_classes", num_classes)
    require_fraction("dropout", dropout)
    return build_streams(
        "rgb", lambda _: Eco(num_classes, lite=lite, dropout=dropout), spec=InputSpec(), grouping="video"
    )
