"""StNet (He et al., 2019): N frames are one picture of 3 N channels, a 2D network sees T of these, and time in between.

Built after the authors' PaddlePaddle network (PaddleVideo's StNet over ResNet-50). A video is S segments of N frames,
one super-image each (the paper: S = 7, N = 5).

Shapes: M videos, S super-images, F = M*S, N frames, C channels, Y X pixels, D features, H W grid, K classes
"""

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.backbone import RESNETS, ResNetGrid, build_backbone, build_backbones, laid_out
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
)

__all__ = ["StNet", "TemporalBlock", "TemporalXception", "stnet"]

_XCEPTION = 1024


class TemporalBlock(nn.Module):
    """y = x + BN(relu(conv(x))), the convolution 3x1x1 over the super-images, with a bias.

    The paper's text has Conv3d, BN, ReLU and no sum; this is what was released.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(num_channels, num_channels, (3, 1, 1), padding=(1, 0, 0))
        self.bn = nn.BatchNorm3d(num_channels)
        _init(self.conv)

    def forward(self, x_MDSHW: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        return torch.add(x_MDSHW, self.bn(torch.relu(self.conv(x_MDSHW))))


class TemporalXception(nn.Module):
    """The temporal Xception block: channel by channel over time, then over channels, beside a plain projection.

        z = BN(x)        y = relu(BN(P2 D2 relu(BN(P1 D1 z)) + P3 z))

    D: 3 super-images of one channel, P: 1 x 1 to 1024 channels, both with biases.
    """

    def __init__(self, num_channels: int, outputs: int = _XCEPTION) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(num_channels)
        self.deep = nn.Sequential(
            nn.Conv1d(num_channels, num_channels, 3, padding=1, groups=num_channels),
            nn.Conv1d(num_channels, outputs, 1),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv1d(outputs, outputs, 3, padding=1, groups=outputs),
            nn.Conv1d(outputs, outputs, 1),
        )
        self.plain = nn.Conv1d(num_channels, outputs, 1)
        self.after = nn.BatchNorm1d(outputs)
        for conv in (*self.deep, self.plain):
            if isinstance(conv, nn.Conv1d):
                _init(conv)

    def forward(self, x_MDS: Tensor) -> Tensor:
        """Return [M, outputs, S]."""
        z = self.before(x_MDS)
        return torch.relu(self.after(self.deep(z) + self.plain(z)))


def _init(conv: nn.Conv1d | nn.Conv3d) -> None:
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


class StNet(nn.Module):
    """Videos [M, S N, C, Y, X] in, logits [M, K] out.

    x      = 2D network of each super-image, a TemporalBlock behind res3 and res4
    logits = W max_s TemporalXception(mean_yx x) + b
    """

    depth_parts: DepthParts = (
        ("stem",),
        ("layer1",),
        ("layer2", "temporal3"),
        ("layer3", "temporal4"),
        ("layer4",),
        ("xception",),
    )

    def __init__(self, grid: ResNetGrid, frames: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.frames = frames
        self.stem = nn.Sequential(grid.conv1, grid.bn1, grid.relu, grid.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = grid.layer1, grid.layer2, grid.layer3, grid.layer4
        self.temporal3 = TemporalBlock(grid.num_channels // 4)
        self.temporal4 = TemporalBlock(grid.num_channels // 2)
        self.xception = TemporalXception(grid.num_channels)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_XCEPTION, num_classes)

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]; frames of a super-image lie one after the other."""
        num_super = clips_MTCYX.shape[1] // self.frames
        supers_FCYX = clips_MTCYX.reshape(-1, self.frames * clips_MTCYX.shape[2], *clips_MTCYX.shape[3:])
        x = self.layer2(self.layer1(self.stem(laid_out(supers_FCYX))))
        x = self.layer3(_over_time(self.temporal3, x, num_super))
        x = self.layer4(_over_time(self.temporal4, x, num_super))
        vectors_MSD = x.mean(dim=(2, 3)).reshape(-1, num_super, x.shape[1])
        y_MDS = self.xception(vectors_MSD.transpose(1, 2))
        logits_MK: Tensor = self.classifier(self.dropout(y_MDS.amax(dim=2)))
        return logits_MK


def _over_time(block: TemporalBlock, x_FDHW: Tensor, num_super: int) -> Tensor:
    x_MDSHW = x_FDHW.reshape(-1, num_super, *x_FDHW.shape[1:]).transpose(1, 2)
    return laid_out(block(x_MDSHW).transpose(1, 2).flatten(0, 1))


def stnet(
    *,
    num_classes: int,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    frames: int = 5,
    dropout: float = 0.0,
) -> ClipClassifier:
    """Build StNet: a video is S super-images of `frames` frames each (the paper: S = 7, frames = 5), S is free.

    backbone: a torchvision ResNet. backbone_weights: None (random), `imagenet`, the name of a torchvision weight set,
    or a .safetensors, .pth or .pt file; the stem is its mean over the channels, divided by `frames`. RGB. Raises
    ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_choice("backbone", backbone, RESNETS)
    require_count("frames", frames)
    require_fraction("dropout", dropout)
    if backbone_weights is None:
        grid = build_backbone(backbone, 3 * frames)
    else:
        _, grid = build_backbones(backbone, flow_channels=3 * frames, weights=backbone_weights)
    assert isinstance(grid, ResNetGrid)
    if backbone_weights is not None:
        with torch.no_grad():
            grid.conv1.weight.div_(frames)
    # PaddleVideo's configs/stnet.yaml; there the frames of a super-image follow each other, here they are spread.
    recipe = ClipRecipe(frames=frames, segments=7, resize="shortest", resize_px=(256, 256), crop_px=224)
    return build_streams(
        "rgb",
        lambda _: StNet(grid, frames, num_classes, dropout),
        spec=InputSpec(frames_per_segment=frames, recipe=recipe),
        grouping="video",
    )
