"""VCM-SDD (Gong and Li, 2022): two backbones, spatio-temporal consistency, multi-modal fusion, two classifiers.

Shapes: B videos, S segments, M = B*S, T frames a segment, Y X pixels, H W feature grid, N = T*H*W nodes, D channels,
C classes
"""

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from kinoray.network import InputSpec
from vcm_sdd.backbone import Backbone, build_backbones
from vcm_sdd.consistency import Consistency, Grid
from vcm_sdd.fusion import CrossModalFusion
from vcm_sdd.options import Options, require_count

__all__ = ["VCMSDD", "TwoStreamHead", "checked_input", "feature_grids", "vcm_sdd", "vcm_sdd_r101"]


class TwoStreamHead(nn.Module):
    """From the feature grids of both streams to logits (section 3, Eq. 3-14).

        F       = STC(x) for each stream                      Eq. 3-10   off: F = x
        p       = MFF(F_rgb, F_flow), pooled over nodes       Eq. 11-12  off: p = mean over nodes of F
        logits  = mean over segments of (M_rgb(p_rgb) + M_flow(p_flow)) / 2        Eq. 13, 14

    Departures: Eq. 14 prints F_att_rgb twice, the text names RGB and flow. The classifiers are linear, so the mean
    over segments is taken before them (exact); consensus="probs" averages softmax(segment logits) instead and
    returns its logarithm.
    """

    def __init__(self, num_channels: int, num_classes: int, options: Options) -> None:
        super().__init__()
        if options.mff and num_channels % options.heads:
            raise ValueError(f"heads must divide the backbone's {num_channels} channels, got heads={options.heads}")
        self.options = options
        self.rgb_stc = _consistency(options) if options.stc else None
        self.flow_stc = _consistency(options) if options.stc and not options.share_stc else None
        self.mff = _fusion(options, num_channels) if options.mff else None
        self.rgb_classifier = nn.Linear(num_channels, num_classes)
        self.flow_classifier = None if options.shared_classifier else nn.Linear(num_channels, num_classes)

    def forward(self, rgb_MND: Tensor, flow_MND: Tensor, *, grid: Grid, num_segments: int) -> Tensor:
        """Return logits [B, C] for nodes [B*S, N, D] of both streams; grid is (T, H, W)."""
        rgb_MD, flow_MD = self.pool(rgb_MND, flow_MND, grid)
        rgb_BSD, flow_BSD = (x.reshape(-1, num_segments, x.shape[-1]) for x in (rgb_MD, flow_MD))
        if self.options.consensus == "logits":
            return self.classify(rgb_BSD.mean(dim=1), flow_BSD.mean(dim=1))
        # Averaging after the softmax is not linear: one classification a segment.
        log_probs_BSC = self.classify(rgb_BSD, flow_BSD).log_softmax(dim=-1)
        return log_probs_BSC.logsumexp(dim=1) - math.log(num_segments)

    def pool(self, rgb_MND: Tensor, flow_MND: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return one vector a segment for each stream, [M, D] each: what the classifiers see."""
        flow_stc = self.flow_stc or self.rgb_stc
        if self.mff is None:
            if self.rgb_stc is None or flow_stc is None:
                return rgb_MND.mean(dim=1), flow_MND.mean(dim=1)
            return self.rgb_stc(rgb_MND, grid, pooled=True), flow_stc(flow_MND, grid, pooled=True)
        if self.rgb_stc is not None and flow_stc is not None:
            rgb_MND, flow_MND = self.rgb_stc(rgb_MND, grid), flow_stc(flow_MND, grid)
        if self.options.scope == "segment":
            return cast(tuple[Tensor, Tensor], self.mff(rgb_MND, flow_MND))
        num_nodes, num_channels = grid[1] * grid[2], rgb_MND.shape[-1]
        frames = (x.reshape(-1, num_nodes, num_channels) for x in (rgb_MND, flow_MND))
        rgb_MD, flow_MD = (x.reshape(-1, grid[0], num_channels).mean(dim=1) for x in self.mff(*frames))
        return rgb_MD, flow_MD

    def classify(self, rgb: Tensor, flow: Tensor) -> Tensor:
        """Return the mean of both streams' logits, [..., C], for vectors [..., D]."""
        flow_classifier = self.flow_classifier if self.flow_classifier is not None else self.rgb_classifier
        # Backbones prepared for inference give bfloat16; the classifiers are small and stay in float32.
        rgb, flow = rgb.to(self.rgb_classifier.weight.dtype), flow.to(flow_classifier.weight.dtype)
        return cast(Tensor, (self.rgb_classifier(rgb) + flow_classifier(flow)) / 2)


def _consistency(options: Options) -> Consistency:
    return Consistency(
        geometry=options.geometry,
        eps=options.eps,
        metric=options.metric,
        radius=options.radius,
        self_loop=options.self_loop,
        residual=options.stc_residual,
        init=options.stc_init,
    )


def _fusion(options: Options, num_channels: int) -> CrossModalFusion:
    return CrossModalFusion(
        heads=options.heads,
        scale=options.scale,
        eq12=options.eq12,
        residual=options.mff_residual,
        norm_channels=num_channels if options.mff_norm else 0,
    )


class VCMSDD(nn.Module):
    """The whole network: F_rgb = backbone_rgb(rgb), F_flow = backbone_flow(flow) (Eq. 1-2), then the head.

    `input_spec` says what to feed it. The number of segments, of frames and the frame size are free at run time.
    """

    reads_bf16_features = True
    """The head takes features of any dtype: inference need not cast them back (kinoray.network.prepare)."""

    backbone_parts = ("rgb_backbone", "flow_backbone")
    """The submodules that training may give a rate of their own, recompute block by block, and shard one by one."""

    compile_parts = ("head.mff",)
    """Compiled on a GPU: each pass over the scores of MFF costs as much there as the product before it."""

    cost_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rgb backbone": ("rgb_backbone",),
        "flow backbone": ("flow_backbone",),
        "STC": ("head.rgb_stc", "head.flow_stc"),
        "MFF": ("head.mff",),
        "classifiers": ("head.rgb_classifier", "head.flow_classifier"),
    }
    """The modules that a table of costs adds up under one name."""

    def __init__(self, rgb_backbone: Backbone, flow_backbone: Backbone, head: TwoStreamHead, spec: InputSpec) -> None:
        super().__init__()
        self.rgb_backbone = rgb_backbone
        self.flow_backbone = flow_backbone
        self.head = head
        self.input_spec = spec

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        """Return logits [B, C] for rgb [B, S, T, 3, Y, X] and flow [B, S, T, flow_channels, Y, X], both float.

        Scaling as in kinoray.network.InputSpec. Raises ValueError stating expected and received.
        """
        return self.from_features(self.to_features(rgb=rgb, flow=flow))

    def to_features(self, *, rgb: Tensor | None, flow: Tensor | None) -> dict[str, Tensor]:
        """Return the feature grids of both streams, [B, S, T, H, W, D] each: all that the backbones do."""
        rgb, flow = self._checked(rgb, flow)
        return {"rgb": feature_grids(self.rgb_backbone, rgb), "flow": feature_grids(self.flow_backbone, flow)}

    def from_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, C] for what to_features gives: all that the head does."""
        _, num_segments, *grid, num_channels = features["rgb"].shape
        num_nodes = math.prod(grid)
        rgb_MND, flow_MND = (features[name].reshape(-1, num_nodes, num_channels) for name in ("rgb", "flow"))
        return cast(Tensor, self.head(rgb_MND, flow_MND, grid=tuple(grid), num_segments=num_segments))

    @property
    def depth_parts(self) -> tuple[tuple[str, ...], ...]:
        """Those of the backbones, side by side; the head is not deep."""
        pairs = zip(self.rgb_backbone.depth_parts, self.flow_backbone.depth_parts, strict=True)
        return tuple(
            (*(f"rgb_backbone.{part}" for part in rgb), *(f"flow_backbone.{part}" for part in flow))
            for rgb, flow in pairs
        )

    @property
    def segment_consensus(self) -> Literal["logits", "probs"]:
        """What the answer is the mean of, over segments that do not see each other: any part of them may be run."""
        return self.head.options.consensus

    def cost_note(self, segment_macs: Mapping[str, int], num_frames: int) -> str:
        """Say what the paper's tables call GFLOPs: MACs of one RGB segment, ImageNet classifier on each frame."""
        classifier = num_frames * self.head.rgb_classifier.in_features * 1000
        gmac = (segment_macs["rgb backbone"] + classifier) / 1e9
        return f'The paper\'s way to count (its "GFLOPs": MACs of one RGB segment, ImageNet classifier on): {gmac:.2f}'

    def _checked(self, rgb: Tensor | None, flow: Tensor | None) -> tuple[Tensor, Tensor]:
        rgb = checked_input("rgb", rgb, 3)
        flow = checked_input("flow", flow, self.input_spec.flow_channels)
        if (rgb.shape[:3], rgb.shape[4:]) != (flow.shape[:3], flow.shape[4:]):
            raise ValueError(
                "rgb and flow must have equal videos, segments, frames, height and width, "
                f"got rgb {tuple(rgb.shape)} and flow {tuple(flow.shape)}"
            )
        return rgb, flow


def feature_grids(backbone: Backbone, x_BSTCYX: Tensor) -> Tensor:
    """Return a backbone's features as [B, S, T, H, W, D] for frames [B, S, T, C, Y, X]."""
    features_FDHW = backbone(x_BSTCYX.flatten(0, 2))
    # In channels_last memory this permutation moves nothing.
    nodes_FHWD = features_FDHW.permute(0, 2, 3, 1)
    return nodes_FHWD.reshape(*x_BSTCYX.shape[:3], *nodes_FHWD.shape[1:])


def checked_input(name: str, x: Tensor | None, channels: int) -> Tensor:
    """Return a stream's input; raises ValueError unless it is float [B, S, T, channels, Y, X], none of them 0."""
    expected = f"{name} must be float [videos, segments, frames, {channels}, height, width]"
    if x is None:
        raise ValueError(f"{expected}, got None: this model needs {name}")
    if x.ndim != 6 or x.shape[3] != channels or 0 in x.shape:
        raise ValueError(f"{expected}, none of them 0, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{expected}, normalised as its input_spec says, got dtype {x.dtype}")
    return x


def vcm_sdd(*, num_classes: int, **options: Any) -> VCMSDD:
    """Build VCM-SDD for num_classes. What may be chosen: vcm_sdd.options.Options.

    Raises ValueError naming the option, what was expected and what was found.
    """
    require_count("num_classes", num_classes)
    chosen = Options(**options)
    flow_channels = chosen.flow_channels
    rgb, flow = build_backbones(chosen.backbone, flow_channels=flow_channels, weights=chosen.backbone_weights)
    spec = InputSpec(rgb=True, flow_channels=flow_channels, rgb_mean=rgb.rgb_mean, rgb_std=rgb.rgb_std)
    return VCMSDD(rgb, flow, TwoStreamHead(rgb.num_channels, num_classes, chosen), spec)


# What inspect and the platform see: the options by name, with their types and defaults.
vcm_sdd.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("num_classes", inspect.Parameter.KEYWORD_ONLY, annotation=int),
        *inspect.signature(Options).parameters.values(),
    ],
    return_annotation=VCMSDD,
)

vcm_sdd_r101 = functools.partial(vcm_sdd, backbone="resnet101")
"""The paper's network: ResNet-101 backbones, every option as printed."""
