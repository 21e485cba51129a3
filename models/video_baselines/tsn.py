"""TSN (Wang et al., 2016) and TSM (Lin et al., 2019): 2D networks over frames, logits averaged over all of them.

Shapes: M clips, T frames of a clip, F = M*T frames, C channels, Y X pixels, D features, H W feature grid, K classes
"""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.backbone import Backbone, ResNetGrid, TimmGrid, TinyGrid, build_backbone, build_backbones, laid_out
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    Modality,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
    under,
)

__all__ = ["FrameClassifier", "ShiftedGrid", "ShiftedTimm", "temporal_shift", "tsm", "tsn"]


# Lin et al. (2019), section 5.1: a frame of each of 8 (or 16) segments, shortest side 256, crop 224.
_TSM_RECIPE = ClipRecipe(frames=1, segments=8, resize="shortest", resize_px=(256, 256), crop_px=224, antialias=False)


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

    @property
    def depth_parts(self) -> DepthParts:
        """Those of the grid."""
        return under("grid", self.grid.depth_parts)

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


class ShiftedTimm(nn.Module):
    """A timm backbone with a temporal shift in front of the first convolution, or the attention, of every block.

    Residual and inverted residual blocks are shifted as ShiftedGrid's; of a transformer's blocks the patch tokens, in
    front of the attention, frame by frame at each place, while class and register tokens stay. The TSM paper has
    convolutions only. Parameters and their names are the backbone's.
    """

    def __init__(self, grid: TimmGrid, *, div: int = 8, online: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self._frames = _FrameCount()
        for entry, prefix in _branch_entries(grid):
            entry.register_forward_pre_hook(_ShiftInput(self._frames, prefix, div, online))

    @property
    def depth_parts(self) -> DepthParts:
        """Those of the grid."""
        return under("grid", self.grid.depth_parts)

    def forward(self, frames_FCYX: Tensor, num_frames: int) -> Tensor:
        """Return features [F, D, H, W] of F = M * num_frames frames, clip by clip in order of time."""
        self._frames.num = num_frames
        try:
            features: Tensor = self.grid(frames_FCYX)
        finally:
            self._frames.num = None
        return features


class _FrameCount:
    """How many frames are one clip, for the time of one forward pass; None outside of it."""

    num: int | None = None


class _ShiftInput:
    """A forward pre-hook: the first argument with channels of its neighbours in time; tokens [F, N, D] or maps."""

    def __init__(self, frames: _FrameCount, prefix: int, div: int, online: bool) -> None:
        self.frames, self.prefix, self.div, self.online = frames, prefix, div, online

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if self.frames.num is None:  # a copy taken out of its network would see frames of other clips
            raise RuntimeError("a shifted block runs inside of its ShiftedTimm only")
        if x.ndim == 4:
            return self._shifted(x), *inputs[1:]
        head_FND, patches_FND = x[:, : self.prefix], x[:, self.prefix :]
        maps = patches_FND.transpose(1, 2)[..., None]
        return torch.cat((head_FND, self._shifted(maps)[..., 0].transpose(1, 2)), dim=1), *inputs[1:]

    def _shifted(self, x_FCYX: Tensor) -> Tensor:
        x_MTCYX = x_FCYX.reshape(-1, cast(int, self.frames.num), *x_FCYX.shape[1:])
        return laid_out(temporal_shift(x_MTCYX, div=self.div, online=self.online).flatten(0, 1))


# timm's inverted residual blocks, whose module has no public name, and their first convolution.
_INVERTED = {"InvertedResidual": "conv_pw", "EdgeResidual": "conv_exp"}


def _branch_entries(grid: TimmGrid) -> list[tuple[nn.Module, int]]:
    """The first layer of each residual branch of a timm network, and how many tokens in front are no place."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.resnet import BasicBlock as TimmBasicBlock
    from timm.models.resnet import Bottleneck as TimmBottleneck
    from timm.models.vision_transformer import VisionTransformer

    trunk = grid.trunk
    if isinstance(trunk, (VisionTransformer, Eva, Beit)):
        return [(block.attn, grid.num_prefix_tokens) for block in trunk.blocks]
    found: list[tuple[nn.Module, int]] = []
    for block in trunk.modules():
        if isinstance(block, (TimmBasicBlock, TimmBottleneck)):
            found.append((block.conv1, 0))
        elif type(block).__name__ in _INVERTED and block.has_skip:
            found.append((block.get_submodule(_INVERTED[type(block).__name__]), 0))
    if not found:
        raise ValueError(
            f"backbone 'timm:{grid.name}' has no blocks that tsm knows how to shift: it knows ResNets, MobileNets and "
            "EfficientNets, and vision transformers"
        )
    return found


class FrameClassifier(nn.Module):
    """Logits of every frame, averaged (TSN Eq. 1 with average consensus).

    logits = mean_t W mean_yx backbone(x_t) + b
    """

    def __init__(
        self, backbone: Backbone | ShiftedGrid | ShiftedTimm, num_channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(num_channels, num_classes)

    @property
    def depth_parts(self) -> DepthParts:
        """Those of the backbone."""
        return under("backbone", self.backbone.depth_parts)

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K] for clips [M, T, C, Y, X]."""
        return self.from_features(self.to_features(clips_MTCYX))

    def to_features(self, clips_MTCYX: Tensor) -> Tensor:
        """Return the mean over each frame's grid, [M, T, D]."""
        num_frames = clips_MTCYX.shape[1]
        frames_FCYX = clips_MTCYX.flatten(0, 1)
        if isinstance(self.backbone, (ShiftedGrid, ShiftedTimm)):
            grid_FDHW = self.backbone(frames_FCYX, num_frames)
        else:
            grid_FDHW = self.backbone(frames_FCYX)
        frames_FD: Tensor = grid_FDHW.mean(dim=(2, 3))
        return frames_FD.reshape(-1, num_frames, frames_FD.shape[1])

    def from_features(self, frames_MTD: Tensor) -> Tensor:
        """Return logits [M, K] for what to_features gives."""
        num_frames = frames_MTD.shape[1]
        logits_FK: Tensor = self.classifier(self.dropout(frames_MTD.flatten(0, 1)))
        return logits_FK.reshape(-1, num_frames, logits_FK.shape[1]).mean(dim=1)


class _FrameStreams(ClipClassifier):
    """FrameClassifiers of whole videos, in two halves: the backbones with the pool, and the rest."""

    def to_features(self, *, rgb: Tensor | None, flow: Tensor | None) -> dict[str, Tensor]:
        """Return a vector of each frame, [B, S*T, D], by stream."""
        return {
            name: cast(FrameClassifier, net).to_features(x_BSTCYX.flatten(1, 2))
            for name, (net, x_BSTCYX) in self.streams(rgb, flow).items()
        }

    def from_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, K] for what to_features gives."""
        nets = {"rgb": self.rgb_net, "flow": self.flow_net}
        return self.joined([cast(FrameClassifier, nets[name]).from_features(x) for name, x in features.items()])


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
    looks both ways, `online` at the past only. backbone: a torchvision ResNet, `tiny` (one residual branch), or
    `timm:NAME` of a ResNet, MobileNet, EfficientNet or vision transformer. All others as in tsn. Raises ValueError
    naming the option.
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
        shifted: ShiftedGrid | ShiftedTimm
        if isinstance(grid, TimmGrid):
            shifted = ShiftedTimm(grid, div=shift[0], online=shift[1])
        elif isinstance(grid, (ResNetGrid, TinyGrid)):
            shifted = ShiftedGrid(grid, div=shift[0], online=shift[1])
        else:
            raise ValueError(f"backbone must be tiny, timm:NAME or a torchvision ResNet for tsm, got {backbone!r}")
        return FrameClassifier(shifted, grid.num_channels, num_classes, dropout)

    recipe = ClipRecipe() if shift is None else _TSM_RECIPE
    spec = InputSpec(rgb_mean=first.rgb_mean, rgb_std=first.rgb_std, recipe=recipe)
    return build_streams(
        modality,
        make,
        spec=spec,
        flow_channels=flow_channels,
        grouping="video",
        flow_weight=flow_weight,
        join=_FrameStreams,
    )
