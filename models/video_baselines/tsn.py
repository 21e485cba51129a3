"""TSN (Wang et al., 2016) and TSM (Lin et al., 2019): 2D networks over frames, logits averaged over all of them.

Shapes: M clips, T frames of a clip, F = M*T frames, C channels, Y X pixels, D features, H W feature grid, K classes
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from kinoray.network import InputSpec
from vcm_sdd.backbone import Backbone, ResNetGrid, TinyGrid, build_backbone, build_backbones, laid_out
from video_baselines.streams import (
    ClipClassifier,
    Modality,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
)

__all__ = ["FrameClassifier", "ShiftedGrid", "temporal_shift", "tsm", "tsn"]


def temporal_shift(x_MTCYX: Tensor, *, div: int = 8, online: bool = False) -> Tensor:
    """Move a part of the channels along time (TSM, section 3; figure 1).

        offline   out[t, 0:n] = x[t + 1, 0:n]    out[t, n:2n] = x[t - 1, n:2n]    the rest stays,  n = C // div
        online    out[t, 0:n] = x[t - 1, 0:n]                                     the rest stays

    Frames beyond either end are zeros. Shape and dtype stay.
    """
    n = x_MTCYX.shape[2] // div
    if online:
        earlier = F.pad(x_MTCYX[:, :-1, :n], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((earlier, x_MTCYX[:, :, n:]), dim=2)
    later = F.pad(x_MTCYX[:, 1:, :n], (0, 0, 0, 0, 0, 0, 0, 1))
    earlier = F.pad(x_MTCYX[:, :-1, n : 2 * n], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((later, earlier, x_MTCYX[:, :, 2 * n :]), dim=2)


class ShiftedGrid(nn.Module):
    """A residual backbone with a temporal shift in front of the first convolution of every residual branch.

        y = relu(shortcut(x) + branch(shift(x)))        TSM section 3.2, "residual shift"

    The shortcut sees the frame as it is. Parameters and their names are the backbone's: TSN weights fit.
    """

    def __init__(self, grid: ResNetGrid | TinyGrid, *, div: int = 8, online: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.div = div
        self.online = online

    def forward(self, frames_FCYX: Tensor, num_frames: int) -> Tensor:
        """Return features [F, D, H, W] of F = M * num_frames frames, clip by clip in order of time."""
        grid = self.grid
        if isinstance(grid, TinyGrid):
            x: Tensor = grid.down(grid.stem(laid_out(frames_FCYX)))
            return torch.relu(x + grid.block(self._shift(x, num_frames)))
        x = grid.maxpool(grid.relu(grid.bn1(grid.conv1(laid_out(frames_FCYX)))))
        for stage in (grid.layer1, grid.layer2, grid.layer3, grid.layer4):
            for block in stage:
                x = self._residual(block, x, num_frames)
        return x

    def _shift(self, x_FCYX: Tensor, num_frames: int) -> Tensor:
        x_MTCYX = x_FCYX.reshape(-1, num_frames, *x_FCYX.shape[1:])
        return laid_out(temporal_shift(x_MTCYX, div=self.div, online=self.online).flatten(0, 1))

    def _residual(self, block: BasicBlock | Bottleneck, x: Tensor, num_frames: int) -> Tensor:
        """One of torchvision's BasicBlock or Bottleneck, its branch fed with shifted frames."""
        y = block.relu(block.bn1(block.conv1(self._shift(x, num_frames))))
        y = block.bn2(block.conv2(y))
        if hasattr(block, "conv3"):
            y = block.bn3(block.conv3(block.relu(y)))
        shortcut: Tensor = x if block.downsample is None else block.downsample(x)
        return torch.relu(y + shortcut)


class FrameClassifier(nn.Module):
    """Logits of every frame, averaged (TSN Eq. 1 with average consensus).

    logits = mean_t W mean_yx backbone(x_t) + b
    """

    def __init__(self, backbone: Backbone | ShiftedGrid, num_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(num_channels, num_classes)

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K] for clips [M, T, C, Y, X]."""
        num_frames = clips_MTCYX.shape[1]
        frames_FCYX = clips_MTCYX.flatten(0, 1)
        if isinstance(self.backbone, ShiftedGrid):
            grid_FDHW = self.backbone(frames_FCYX, num_frames)
        else:
            grid_FDHW = self.backbone(frames_FCYX)
        logits_FK: Tensor = self.classifier(self.dropout(grid_FDHW.mean(dim=(2, 3))))
        return logits_FK.reshape(-1, num_frames, logits_FK.shape[1]).mean(dim=1)


def _backbones(name: str, modality: Modality, flow_channels: int, weights: str | None) -> dict[str, Backbone]:
    """The backbones of the streams that are wanted, pretrained if asked."""
    require_choice("modality", modality, ("rgb", "flow", "two_stream"))
    require_count("flow_channels", flow_channels)
    streams = {"rgb": ("rgb",), "flow": ("flow",), "two_stream": ("rgb", "flow")}[modality]
    if weights is None:
        return {stream: build_backbone(name, 3 if stream == "rgb" else flow_channels) for stream in streams}
    rgb, flow = build_backbones(name, flow_channels=flow_channels, weights=weights)
    return {stream: {"rgb": rgb, "flow": flow}[stream] for stream in streams}


def tsn(
    *,
    num_classes: int,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    dropout: float = 0.5,
) -> ClipClassifier:
    """Build TSN: a 2D network on each frame, logits averaged over all S x T frames (the paper: T = 1).

    backbone: a torchvision ResNet, `tiny`, or `timm:NAME`. backbone_weights: None (random), `imagenet`, the name of a
    torchvision weight set, or a .safetensors, .pth or .pt file; the flow stem then starts as the mean of the RGB stem
    over its channels (cross-modality initialisation). modality: rgb, flow, or two_stream (logits averaged, flow
    weighted with flow_weight). flow_channels: 2, or 2 L where L flow fields are stacked (the paper: L = 5). dropout: in
    front of the classifier. Raises ValueError naming the option.
    """
    return _frame_model(num_classes, backbone, backbone_weights, modality, flow_channels, flow_weight, dropout, None)


def tsm(
    *,
    num_classes: int,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    shift: Literal["offline", "online"] = "offline",
    shift_div: int = 8,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    dropout: float = 0.5,
) -> ClipClassifier:
    """Build TSM: TSN whose residual branches see 1 / shift_div of the channels from each neighbour in time.

    All S x T frames of a video, in order of time, are one sequence (the paper: S = 8 or 16, T = 1). shift: `offline`
    looks both ways, `online` at the past only. backbone: a torchvision ResNet or `tiny` (one residual branch). All
    others as in tsn. Raises ValueError naming the option.
    """
    require_choice("shift", shift, ("offline", "online"))
    require_count("shift_div", shift_div, minimum=1 if shift == "online" else 2)
    settings = (shift_div, shift == "online")
    return _frame_model(
        num_classes, backbone, backbone_weights, modality, flow_channels, flow_weight, dropout, settings
    )


def _frame_model(
    num_classes: int,
    backbone: str,
    backbone_weights: str | None,
    modality: Modality,
    flow_channels: int,
    flow_weight: float,
    dropout: float,
    shift: tuple[int, bool] | None,
) -> ClipClassifier:
    require_count("num_classes", num_classes)
    require_fraction("dropout", dropout)
    grids = _backbones(backbone, modality, flow_channels, backbone_weights)
    first = next(iter(grids.values()))

    def make(stream: Literal["rgb", "flow"]) -> nn.Module:
        grid = grids[stream]
        if shift is None:
            return FrameClassifier(grid, grid.num_channels, num_classes, dropout)
        if not isinstance(grid, (ResNetGrid, TinyGrid)):
            raise ValueError(f"backbone must be tiny or a torchvision ResNet for tsm, got {backbone!r}")
        shifted = ShiftedGrid(grid, div=shift[0], online=shift[1])
        return FrameClassifier(shifted, grid.num_channels, num_classes, dropout)

    spec = InputSpec(rgb_mean=first.rgb_mean, rgb_std=first.rgb_std)
    return build_streams(
        modality, make, spec=spec, flow_channels=flow_channels, grouping="video", flow_weight=flow_weight
    )
