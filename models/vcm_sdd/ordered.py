"""VCM-SDD/X: the two backbones of VCM-SDD under a head that sees what is where, and in which order.

The head of the paper pools by means, so that it cannot tell a clip from the same frames in another order, and its
attention has nothing to learn but the backbones. Here both streams meet at each place of each frame, learned queries
look at places and then at times, and convolutions over time stand between the two. docs/ablation.md compares the two
heads, docs/experiments.md says what else was tried.

Shapes: B videos, S segments, T frames a segment, H W feature grid, P = H*W places, U = S*T frames of a video,
D channels of a backbone, E channels of the head, K queries, C classes
"""

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kinoray.network import InputSpec
from vcm_sdd.backbone import Backbone, build_backbone, build_backbones
from vcm_sdd.network import checked_input, feature_grids
from vcm_sdd.options import require_count

__all__ = ["VCMSDDX", "ContentOrderHead", "vcm_sdd_x"]

_STREAMS = {"rgb": ("rgb",), "flow": ("flow",), "two_stream": ("rgb", "flow")}
_WAVES = (0.5, 1.0, 2.0, 4.0)
_KERNEL = 5


class ContentOrderHead(nn.Module):
    """From the feature grids of one or both streams to logits.

        z_BSTPE = gelu(sum over streams of W [norm(x), norm(x - mean of x over T)] + place)
                                                                       what is where, and what of it is new
        f_BSTE  = W [K queries' means of z over the places]            what a frame shows
        f_BSTE  = f + W gelu(conv_t(norm(f))), twice                   how it changes within its segment
        v_BD    = [K queries' means of f + time, over the U frames]    when it happens in the video
        logits  = W norm(v) + b

    A query's mean is weighted by the softmax of its products with what it looks at. Places and times enter as waves
    of their position in 0 .. 1, so that the numbers of segments, frames and cells are free at run time.
    """

    def __init__(
        self, streams: tuple[str, ...], num_channels: int, num_classes: int, *, width: int, queries: int, dropout: float
    ) -> None:
        super().__init__()
        self.binders = nn.ModuleDict({name: _Binder(num_channels, width) for name in streams})
        self.place = nn.Linear(4 * len(_WAVES), width, bias=False)
        self.time = nn.Linear(2 * len(_WAVES), width, bias=False)
        self.place_queries = _LearnedQueries(width, queries)
        self.frame = nn.Linear(queries * width, width)
        self.changes = nn.Sequential(*(_Change(width, dropout) for _ in range(2)))
        self.time_queries = _LearnedQueries(width, queries)
        self.norm = nn.LayerNorm(queries * width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(queries * width, num_classes)

    def forward(self, grids: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, C] for the grids [B, S, T, H, W, D] of its streams."""
        num_videos, num_segments, num_frames, height, width, _ = next(iter(grids.values())).shape
        dtype = self.place.weight.dtype
        place_HWE = self.place(_waves_of_places(height, width, self.place.weight))
        # Backbones prepared for inference give bfloat16; the head stays in float32.
        streams = [binder(grids[name].to(dtype)) for name, binder in self.binders.items()]
        nodes_BSTHWE = self.dropout(nn.functional.gelu(sum(streams, start=place_HWE)))
        frames_ME = self.frame(self.place_queries(nodes_BSTHWE.flatten(0, 2).flatten(1, 2)))
        frames_STE = self.changes(frames_ME.reshape(num_videos * num_segments, num_frames, -1))
        frames_BUE = frames_STE.reshape(num_videos, num_segments * num_frames, -1)
        time_UE = self.time(_waves(num_segments * num_frames, self.time.weight))
        return cast(Tensor, self.classifier(self.dropout(self.norm(self.time_queries(frames_BUE, time_UE)))))


class _Binder(nn.Module):
    """What a stream says of each place: its features, and what sets them apart from their mean over the segment.

    The mean of a still picture is the picture: what never changes would drown what does, if it were not taken off.
    """

    def __init__(self, num_channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.change_norm = nn.LayerNorm(num_channels)
        self.linear = nn.Linear(2 * num_channels, width)

    def forward(self, grid_BSTHWD: Tensor) -> Tensor:
        """Return [B, S, T, H, W, E]."""
        change_BSTHWD = grid_BSTHWD - grid_BSTHWD.mean(dim=2, keepdim=True)
        both = torch.cat((self.norm(grid_BSTHWD), self.change_norm(change_BSTHWD)), dim=-1)
        return cast(Tensor, self.linear(both))


class _LearnedQueries(nn.Module):
    """K weighted means of things, side by side; what a query looks for is learned."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, queries, bias=False)

    def forward(self, x_MNE: Tensor, position_NE: Tensor | None = None) -> Tensor:
        """Return [M, K*E] for things [M, N, E]; positions count for where a query looks, and are in what it sees."""
        if position_NE is not None:
            x_MNE = x_MNE + position_NE
        weights_MNK: Tensor = self.scores(self.norm(x_MNE)).softmax(dim=1)
        return (weights_MNK.transpose(1, 2) @ x_MNE).flatten(1)


class _Change(nn.Module):
    """A residual block over the frames of a segment: each channel's own convolution over time, then all channels."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_MTE: Tensor) -> Tensor:
        """Return [M, T, E]; beyond either end of a segment are zeros."""
        y_MTE = self.conv(self.norm(x_MTE).transpose(1, 2)).transpose(1, 2)
        return x_MTE + cast(Tensor, self.dropout(self.linear(nn.functional.gelu(y_MTE))))


def _waves(count: int, like: Tensor) -> Tensor:
    """Sines and cosines of (i + 1/2) / count, [count, 2 * waves]: the middles of equal parts of 0 .. 1."""
    exact = torch.promote_types(like.dtype, torch.float32)
    middle_N = (torch.arange(count, device=like.device, dtype=exact) + 0.5) / count
    # Numbers of Python's, since a tensor of them would be copied to a GPU, which a CUDA graph cannot record.
    angle_NF = torch.stack([2 * math.pi * middle_N * wave for wave in _WAVES], dim=1)
    return torch.cat((angle_NF.sin(), angle_NF.cos()), dim=1).to(like.dtype)


def _waves_of_places(height: int, width: int, like: Tensor) -> Tensor:
    """Those of the row beside those of the column, [H, W, 4 * waves]."""
    rows, columns = _waves(height, like), _waves(width, like)
    return torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=2)


class VCMSDDX(nn.Module):
    """The whole network: a backbone a stream (Eq. 1-2 of the paper), then ContentOrderHead.

    `input_spec` says what to feed it. The number of segments, of frames and the frame size are free at run time.
    """

    reads_bf16_features = True

    def __init__(self, backbones: Mapping[str, Backbone], head: ContentOrderHead, spec: InputSpec) -> None:
        super().__init__()
        self.rgb_backbone = backbones.get("rgb")
        self.flow_backbone = backbones.get("flow")
        self.head = head
        self.input_spec = spec
        self.backbone_parts = tuple(f"{name}_backbone" for name in backbones)
        self.cost_parts = {
            **{f"{name} backbone": (f"{name}_backbone",) for name in backbones},
            "binding": ("head.binders", "head.place", "head.place_queries", "head.frame"),
            "order": ("head.changes", "head.time", "head.time_queries", "head.norm"),
            "classifier": ("head.classifier",),
        }

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        """Return logits [B, C] for rgb [B, S, T, 3, Y, X] and flow [B, S, T, flow_channels, Y, X], both float.

        A modality that the network does not use is not looked at. Raises ValueError stating expected and received.
        """
        return self.from_features(self.to_features(rgb=rgb, flow=flow))

    def to_features(self, *, rgb: Tensor | None, flow: Tensor | None) -> dict[str, Tensor]:
        """Return the feature grids of its streams, [B, S, T, H, W, D] each: all that the backbones do."""
        inputs: dict[str, Tensor] = {}
        if self.rgb_backbone is not None:
            inputs["rgb"] = checked_input("rgb", rgb, 3)
        if self.flow_backbone is not None:
            inputs["flow"] = checked_input("flow", flow, self.input_spec.flow_channels)
        shapes = {name: (*x.shape[:3], *x.shape[4:]) for name, x in inputs.items()}
        if len(shapes) == 2 and shapes["rgb"] != shapes["flow"]:  # a tracer's sizes have no hash
            raise ValueError(
                "rgb and flow must have equal videos, segments, frames, height and width, "
                f"got rgb {shapes['rgb']} and flow {shapes['flow']}"
            )
        backbones = {"rgb": self.rgb_backbone, "flow": self.flow_backbone}
        return {name: feature_grids(cast(Backbone, backbones[name]), x) for name, x in inputs.items()}

    def from_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, C] for what to_features gives: all that the head does."""
        return cast(Tensor, self.head(features))

    @property
    def depth_parts(self) -> tuple[tuple[str, ...], ...]:
        """Those of the backbones, side by side; the head is not deep."""
        named = {"rgb_backbone": self.rgb_backbone, "flow_backbone": self.flow_backbone}
        streams = [
            [tuple(f"{name}.{part}" for part in parts) for parts in backbone.depth_parts]
            for name, backbone in named.items()
            if backbone is not None
        ]
        return tuple(sum(groups, ()) for groups in zip(*streams, strict=True))


def vcm_sdd_x(
    *,
    num_classes: int,
    backbone: str = "resnet101",
    backbone_weights: str | None = None,
    modality: Literal["rgb", "flow", "two_stream"] = "two_stream",
    flow_channels: int = 2,
    width: int = 128,
    queries: int = 4,
    dropout: float = 0.4,
) -> VCMSDDX:
    """Build VCM-SDD/X for num_classes.

    Args:
        backbone, backbone_weights, flow_channels: as those of VCM-SDD (vcm_sdd.options.Options).
        modality: rgb and flow have one backbone alone.
        width: channels of the head (E).
        queries: how many learned queries look at places, and how many at times (K).
        dropout: in training, of nodes, of each change over time, and in front of the classifier.

    Raises ValueError naming the option, what was expected and what was found.
    """
    if modality not in _STREAMS:
        raise ValueError(f"modality must be one of {', '.join(_STREAMS)}, got {modality!r}")
    counts = {"num_classes": num_classes, "flow_channels": flow_channels, "width": width, "queries": queries}
    for name, value in counts.items():
        require_count(name, value)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in 0 .. 1 (1 excluded), got {dropout!r}")
    streams = _STREAMS[modality]
    if backbone_weights is None:
        backbones = {name: build_backbone(backbone, 3 if name == "rgb" else flow_channels) for name in streams}
    else:
        pair = build_backbones(backbone, flow_channels=flow_channels, weights=backbone_weights)
        backbones = {name: one for name, one in zip(("rgb", "flow"), pair, strict=True) if name in streams}
    first = backbones[streams[0]]
    spec = InputSpec(
        rgb="rgb" in streams,
        flow_channels=flow_channels if "flow" in streams else 0,
        rgb_mean=first.rgb_mean,
        rgb_std=first.rgb_std,
    )
    head = ContentOrderHead(
        streams, first.num_channels, num_classes, width=width, queries=queries, dropout=float(dropout)
    )
    return VCMSDDX(backbones, head, spec)
