"""torchvision's video networks as kinoray models, with their Kinetics weights where there is a network.

A clip is one segment: T frames go in together, the logits of the S segments are averaged.

Shapes: M clips, T frames, C channels, Y X pixels, K classes
"""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torchvision
from torch import Tensor, nn
from torchvision.models.video import S3D, MViT, SwinTransformer3d, VideoResNet
from torchvision.models.video.mvit import MSBlockConfig
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem
from torchvision.ops import StochasticDepth

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.weights import load_strict, read_state
from video_baselines.inception3d import ClippedPool3d
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    Modality,
    build_streams,
    require_count,
    require_fraction,
    under,
)

__all__ = [
    "FramesFirst",
    "mc3_18",
    "mvit_v1_b",
    "mvit_v2_s",
    "published_clip",
    "r2plus1d_18",
    "r2plus1d_34",
    "r3d_18",
    "s3d",
    "swin3d_b",
    "swin3d_s",
    "swin3d_t",
]


class FramesFirst(nn.Module):
    """A network over [M, C, T, Y, X], fed with [M, T, C, Y, X]; refuses clips that are too short for it."""

    def __init__(self, name: str, net: nn.Module, min_frames: int = 1) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self.min_frames = min_frames

    @property
    def depth_parts(self) -> DepthParts:
        """Blocks of a transformer, stages of a ResNet, layers of an S3D, each behind what stands in front of it."""
        return under("net", tuple(_depth_parts(self.net)))

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]. Raises ValueError for fewer than min_frames frames."""
        if clips_MTCYX.shape[1] < self.min_frames:
            raise ValueError(
                f"{self.name} needs at least {self.min_frames} frames a segment, got {clips_MTCYX.shape[1]} "
                "(set clip.sample.frames_per_segment)"
            )
        logits_MK: Tensor = self.net(clips_MTCYX.transpose(1, 2))
        return logits_MK


def _depth_parts(net: Any) -> list[tuple[str, ...]]:
    if isinstance(net, MViT):
        return [("conv_proj", "pos_encoding"), *((f"blocks.{number}",) for number in range(len(net.blocks)))]
    if isinstance(net, VideoResNet):
        return [("stem",), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    if isinstance(net, S3D):
        return [(f"features.{name}",) for name, layer in net.features.named_children() if list(layer.parameters())]
    assert isinstance(net, SwinTransformer3d)
    groups: list[tuple[str, ...]] = [("patch_embed",)]
    merging: tuple[str, ...] = ()
    for name, stage in net.features.named_children():
        if not isinstance(stage, nn.Sequential):  # patches are merged for the block behind it
            merging = (f"features.{name}",)
            continue
        for number in range(len(stage)):
            groups.append((*merging, f"features.{name}.{number}"))
            merging = ()
    return groups


def _head(net: nn.Module) -> tuple[str, nn.Module]:
    """The last layer and its name."""
    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv3d))]
    return layers[-1]


def _fitted(net: nn.Module, state: dict[str, Tensor], source: str, num_classes: int) -> nn.Module:
    """Load weights; the last layer too where it has the right number of classes, else it stays random."""
    name, layer = _head(net)
    weight = state.get(f"{name}.weight")
    if weight is not None and weight.shape[0] != num_classes:
        fresh = {f"{name}.{entry}": value for entry, value in layer.state_dict().items()}
        state = {**state, **fresh}
    load_strict(net, state, source=source)
    return net


def _pretrained(name: str, weights: str) -> tuple[dict[str, Tensor], str]:
    if "." in weights or "/" in weights:
        return read_state(weights), f"weights {weights}"
    known = torchvision.models.get_model_weights(name)
    wanted = "KINETICS400_V1" if weights == "kinetics400" else weights
    if wanted not in known.__members__:
        names = ", ".join(known.__members__)
        raise ValueError(f"weights must be kinetics400, {names} or a file, got {weights!r}")
    try:
        return known[wanted].get_state_dict(progress=False, check_hash=True), f"weights {name} {wanted}"
    except OSError as error:
        raise ValueError(
            f"weights {name} {wanted} cannot be downloaded ({error}); give the path of a .pth or .safetensors file"
        ) from error


def published_clip(weights: Any) -> ClipRecipe:
    """What a weight set of torchvision says about the clips that it was tested on; None where it does not.

    Frame rate and length stand in its description only (`frame_rate=7.5`, `clip_len=16`). Frames are resized without
    antialiasing, as they were when the networks were trained.
    """
    presets, text = weights.transforms(), str(weights.meta.get("_docs", ""))
    rate, length = (re.search(rf"`{name}=([0-9.]+)`", text) for name in ("frame_rate", "clip_len"))
    height, width = presets.crop_size
    assert height == width, f"{weights} crops {presets.crop_size}"
    sides = tuple(presets.resize_size)
    return ClipRecipe(
        frames=int(length.group(1)) if length else None,
        fps=float(rate.group(1)) if rate else None,
        stride=1 if rate else None,
        placement="torchvision",
        short="repeat_last",  # its own sampler leaves videos out that are shorter than a clip
        resize="shortest" if len(sides) == 1 else "exact",
        resize_px=cast(tuple[int, int], sides * 2 if len(sides) == 1 else sides),
        crop_px=height,
        middle="even",
        interpolation=presets.interpolation.value,
        antialias=False,
    )


def _spec(name: str, *, crop_px: int | None, frames: int | None = None) -> InputSpec:
    """Scaling and clips as torchvision's weights of that name were trained and tested with."""
    weights = torchvision.models.get_model_weights(name).KINETICS400_V1
    presets = weights.transforms()
    mean, std = ((float(x), float(y), float(z)) for x, y, z in (presets.mean, presets.std))
    if crop_px is not None:
        require_count("crop_px", crop_px, minimum=16)
    recipe = published_clip(weights)
    return InputSpec(crop_px=crop_px, frames_per_segment=frames, rgb_mean=mean, rgb_std=std, recipe=recipe)


def _wrapped(
    name: str,
    build: Callable[..., nn.Module],
    num_classes: int,
    weights: str | None,
    spec: InputSpec,
    min_frames: int = 1,
) -> ClipClassifier:
    require_count("num_classes", num_classes)
    net = build(num_classes=num_classes)
    if weights is not None:
        state, source = _pretrained(name, weights)
        net = _fitted(net, state, source, num_classes)
    return build_streams("rgb", lambda _: FramesFirst(name, net, min_frames), spec=spec)


def _plain(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    crop_px: int | None = None,
) -> ClipClassifier:
    """Build torchvision's network of that name.

    weights: None (random), `kinetics400`, the name of a torchvision weight set, or a .safetensors, .pth or .pt file
    with the network's state dict; the last layer is replaced where the number of classes differs. crop_px: side of the
    crop that the model insists on (by default that of its weights; null takes any). T is free. Raises ValueError.
    """
    build = functools.partial(torchvision.models.get_model, name, weights=None)
    return _wrapped(name, build, num_classes, weights, _spec(name, crop_px=crop_px))


r3d_18 = functools.partial(_plain, "r3d_18", crop_px=112)
"""ResNet-18 with 3x3x3 kernels (Tran et al., 2018)."""

mc3_18 = functools.partial(_plain, "mc3_18", crop_px=112)
"""ResNet-18, 3D in the first stage and 2D behind it (Tran et al., 2018)."""

r2plus1d_18 = functools.partial(_plain, "r2plus1d_18", crop_px=112)
"""R(2+1)D with 18 layers (Tran et al., 2018)."""


def _swin3d(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    crop_px: int | None = 224,
    drop_path: float = 0.1,
) -> ClipClassifier:
    """Build torchvision's Video Swin Transformer of that name.

    drop_path: share of the last block's branches left out while training, less before it (stochastic depth). All
    others as in r2plus1d_18. Raises ValueError.
    """
    require_fraction("drop_path", drop_path)

    def build(num_classes: int) -> nn.Module:
        net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        _set_drop_path(net, drop_path)
        return net

    return _wrapped(name, build, num_classes, weights, _spec(name, crop_px=crop_px))


def _set_drop_path(net: nn.Module, drop_path: float) -> None:
    """Scale the rates of stochastic depth, which grow from block to block, so that the last is drop_path."""
    layers = [layer for layer in net.modules() if isinstance(layer, StochasticDepth)]
    largest = max(layer.p for layer in layers)
    for layer in layers:
        layer.p *= drop_path / largest


swin3d_t = functools.partial(_swin3d, "swin3d_t")
"""Video Swin Transformer, tiny (Liu et al., 2022)."""

swin3d_s = functools.partial(_swin3d, "swin3d_s")
"""Video Swin Transformer, small (Liu et al., 2022)."""

swin3d_b = functools.partial(_swin3d, "swin3d_b")
"""Video Swin Transformer, base (Liu et al., 2022)."""


def s3d(*, num_classes: int, weights: str | None = None, crop_px: int | None = 224) -> ClipClassifier:
    """Build torchvision's S3D (Xie et al., 2018): separable inception, 5 frames or more. Options as in r2plus1d_18."""

    def build(num_classes: int) -> nn.Module:
        net: nn.Module = torchvision.models.get_model("s3d", weights=None, num_classes=num_classes)
        net.avgpool = ClippedPool3d()
        return net

    return _wrapped("s3d", build, num_classes, weights, _spec("s3d", crop_px=crop_px), min_frames=5)


def _mvit(
    name: str,
    blocks: Callable[[], list[MSBlockConfig]],
    *,
    num_classes: int,
    weights: str | None = None,
    crop_px: int = 224,
    frames: int = 16,
    drop_path: float = 0.2,
) -> ClipClassifier:
    """Build torchvision's MViT of that name.

    Its tables of positions fix the clip: `frames` frames (a multiple of 2) of crop_px x crop_px (a multiple of 32).
    Kinetics weights need 16 x 224. drop_path: share of the last block's branches left out while training, less before
    it (stochastic depth). weights as in r2plus1d_18. Raises ValueError.
    """
    for option, value, unit in (("crop_px", crop_px, 32), ("frames", frames, 2)):
        require_count(option, value, minimum=unit)
        if value % unit:
            raise ValueError(f"{option} must be a multiple of {unit}, got {value}")
    require_fraction("drop_path", drop_path)
    second = name == "mvit_v2_s"

    def build(num_classes: int) -> nn.Module:
        net: nn.Module = MViT(
            spatial_size=(crop_px, crop_px),
            temporal_size=frames,
            block_setting=blocks(),
            residual_pool=second,
            residual_with_cls_embed=False,
            rel_pos_embed=second,
            proj_after_attn=second,
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        return net

    return _wrapped(name, build, num_classes, weights, _spec(name, crop_px=crop_px, frames=frames))


def _mvit_v1_b_blocks() -> list[MSBlockConfig]:
    """MViT paper, table 3: stages of 1, 2, 11 and 2 blocks; the last block before a stage doubles the channels."""
    stages = [stage for stage, depth in enumerate((1, 2, 11, 2)) for _ in range(depth)]
    blocks = []
    for index, stage in enumerate(stages):
        pools = index > 0 and stage != stages[index - 1]
        following = stages[min(index + 1, len(stages) - 1)]
        keys = 8 // 2**stage
        blocks.append(
            MSBlockConfig(
                num_heads=2**stage,
                input_channels=96 * 2**stage,
                output_channels=96 * 2**following,
                kernel_q=[3, 3, 3] if pools else [],
                kernel_kv=[3, 3, 3],
                stride_q=[1, 2, 2] if pools else [],
                stride_kv=[1, keys, keys],
            )
        )
    return blocks


def _mvit_v2_s_blocks() -> list[MSBlockConfig]:
    """MViTv2 paper, table 1: stages of 1, 2, 11 and 2 blocks, channels doubling, the query pooled at each new stage."""
    blocks, inputs = [], 96
    for stage, depth in enumerate((1, 2, 11, 2)):
        outputs = 96 * 2**stage
        for index in range(depth):
            halves = 2 if stage > 0 and index == 0 else 1
            # Keys keep one resolution throughout: 8 x 8 times coarser than the queries of the first stage. A stage's
            # first block still sees the keys of the stage before it.
            keys = 8 // 2**stage
            blocks.append(
                MSBlockConfig(
                    num_heads=2**stage,
                    input_channels=inputs,
                    output_channels=outputs,
                    kernel_q=[3, 3, 3],
                    kernel_kv=[3, 3, 3],
                    stride_q=[1, halves, halves],
                    stride_kv=[1, keys, keys],
                )
            )
            inputs = outputs
    return blocks


mvit_v1_b = functools.partial(_mvit, "mvit_v1_b", _mvit_v1_b_blocks)
"""MViT-B 16x4 (Fan et al., 2021)."""

mvit_v2_s = functools.partial(_mvit, "mvit_v2_s", _mvit_v2_s_blocks)
"""MViT-V2-S 16x4 (Li et al., 2022)."""


def r2plus1d_34(
    *,
    num_classes: int,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    crop_px: int | None = 112,
) -> ClipClassifier:
    """Build R(2+1)D-34 (Tran et al., 2018) on RGB, flow or both, from random weights. T is free (the paper: 32).

    Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_count("flow_channels", flow_channels)

    def make(stream: Literal["rgb", "flow"]) -> nn.Module:
        net = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [3, 4, 6, 3], R2Plus1dStem, num_classes=num_classes)
        if stream == "flow":
            first: Any = net.stem[0]
            net.stem[0] = nn.Conv3d(
                flow_channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
            )
            nn.init.kaiming_normal_(net.stem[0].weight, mode="fan_out", nonlinearity="relu")
        return FramesFirst("r2plus1d_34", net)

    spec = _spec("r2plus1d_18", crop_px=crop_px)
    recipe = replace(spec.recipe, frames=32, stride=1, fps=None)  # the paper, section 4: 32 frames in a row
    spec = replace(spec, recipe=recipe)
    return build_streams(modality, make, spec=spec, flow_channels=flow_channels, flow_weight=flow_weight)
