"""ARTNet (Wang et al., 2018): a 3D ResNet-18 whose convolutions look at appearance and at relations apart.

Built layer by layer after the authors' network file (wanglimin/ARTNet, models/112_artnet_resnet_18_deploy.prototxt).
A clip is one segment: T frames go in together (the paper: 16), the logits of the S segments are averaged.

Shapes: M clips, C channels, T frames, Y X pixels, D features, H W grid
"""

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from video_baselines.i3d import PooledClassifier
from video_baselines.resnet3d import TimeConv3d
from video_baselines.streams import ClipClassifier, DepthParts, build_streams, require_count, require_fraction

__all__ = ["ArtNet", "SmartBlock", "artnet"]

# models/112_artnet_resnet_18_train_val.prototxt: 16 frames in a row of the video's own rate, resized by OpenCV.
_RECIPE = ClipRecipe(frames=16, stride=1, resize="exact", resize_px=(128, 170), crop_px=112, antialias=False)


class SmartBlock(nn.Module):
    """A 2D convolution of what is seen beside the energy of a 3D one, joined by 1x1x1 (the paper's SMART block).

        y = reduce relu[BN(A x); BN(pool((BN(R x))^2))]        pool(z)_c = (z_2c + z_2c+1) / 2

    A is 1 x k x k, R 3 x k x k, both with `outputs` channels, so 1.5 as many go into reduce. No norm behind it.
    """

    def __init__(self, inputs: int, outputs: int, *, space: int = 3, stride: int = 1) -> None:
        super().__init__()
        strides = (stride, stride)
        self.appearance = nn.Sequential(
            TimeConv3d(inputs, outputs, space=space, stride=strides), nn.BatchNorm3d(outputs)
        )
        self.relation = nn.Sequential(
            TimeConv3d(inputs, outputs, time=3, space=space, stride=strides), nn.BatchNorm3d(outputs)
        )
        self.energy_bn = nn.BatchNorm3d(outputs // 2)
        self.reduce = TimeConv3d(outputs + outputs // 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, outputs, T / stride, Y / stride, X / stride]."""
        seen = self.appearance(x)
        energy = self.relation(x).square().unflatten(1, (-1, 2)).mean(dim=2)
        both = torch.cat((seen, self.energy_bn(energy)), dim=1)
        y: Tensor = self.reduce(torch.relu(both))
        return y


class _Block(nn.Module):
    """a = relu(BN(x));  y = second(relu(BN(conv(a)))) + x, or + down(a) where the size changes; convolutions 3x3x3.

    second: a SMART block, or a convolution (res5).
    """

    def __init__(self, inputs: int, outputs: int, *, smart: bool) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.before = nn.Sequential(nn.BatchNorm3d(inputs), nn.ReLU(inplace=True))
        self.first = nn.Sequential(
            TimeConv3d(inputs, outputs, time=3, space=3, stride=(stride, stride)),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
        )
        self.second = SmartBlock(outputs, outputs) if smart else TimeConv3d(outputs, outputs, time=3, space=3)
        self.down = TimeConv3d(inputs, outputs, time=3, space=3, stride=(2, 2)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.before(x)
        y: Tensor = self.second(self.first(a))
        return y + (x if self.down is None else self.down(a))


class ArtNet(nn.Module):
    """ARTNet-ResNet18 (d): SMART blocks in the stem and as every second convolution of res2 .. res4."""

    num_channels = 512
    depth_parts: DepthParts = (("stem",), ("res2",), ("res3",), ("res4",), ("res5", "after"))

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = SmartBlock(in_channels, 64, space=7, stride=2)
        self.res2 = nn.Sequential(_Block(64, 64, smart=True), _Block(64, 64, smart=True))
        self.res3 = nn.Sequential(_Block(64, 128, smart=True), _Block(128, 128, smart=True))
        self.res4 = nn.Sequential(_Block(128, 256, smart=True), _Block(256, 256, smart=True))
        self.res5 = nn.Sequential(_Block(256, 512, smart=False), _Block(512, 512, smart=False))
        self.after = nn.Sequential(nn.BatchNorm3d(512), nn.ReLU(inplace=True))

    def forward(self, x_MCTYX: Tensor) -> Tensor:
        """Return features [M, 512, ceil(T / 16), Y / 16, X / 16]."""
        grid_MDTHW: Tensor = self.after(self.res5(self.res4(self.res3(self.res2(self.stem(x_MCTYX))))))
        return grid_MDTHW


def artnet(*, num_classes: int, dropout: float = 0.2) -> ClipClassifier:
    """Build ARTNet over ResNet-18 from random weights, as the paper trains it. RGB.

    Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_fraction("dropout", dropout)
    return build_streams(
        "rgb",
        lambda _: PooledClassifier(ArtNet(), ArtNet.num_channels, num_classes, dropout),
        spec=InputSpec(recipe=_RECIPE),
    )
