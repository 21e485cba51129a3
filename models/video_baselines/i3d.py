"""I3D (Carreira and Zisserman, 2017; over ResNets as in Wang et al., 2018), with non-local blocks, and S3D-G.

A clip is one segment: T frames go in together, the logits of the S segments are averaged. T is free, 1 included.

Shapes: M clips, T frames, C channels, Y X pixels, K classes
"""

import functools
from typing import Literal, cast

import torchvision
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.backbone import build_backbones
from vcm_sdd.weights import flow_stem, load_strict, read_state
from video_baselines.inception3d import ClippedPool3d, Inception3d
from video_baselines.resnet3d import DEPTHS, ResNet3d, inflate_state
from video_baselines.slowfast import slowfast_recipe
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

__all__ = ["PooledClassifier", "i3d", "i3d_nl", "s3dg", "two_stream_i3d"]

_HALF = (0.5, 0.5, 0.5)
# Carreira and Zisserman (2017), section 3: 64 frames at 25 a second, shortest side 256, centre crop 224; short videos
# are looped. Every frame of a video of 30 a second, as its users take them, and not five of six.
_I3D_RECIPE = ClipRecipe(
    frames=64, stride=1, fps=25.0, placement="even", resize="shortest", resize_px=(256, 256), crop_px=224
)
_NONLOCAL = {0: (0, 0), 5: (2, 3), 10: (4, 6)}


class PooledClassifier(nn.Module):
    """logits = W mean_thw features(clip) + b, dropout on the mean. A network with frames first, [M, T, C, Y, X].

    windows: the mean is over windows of 2 x 7 x 7 cells, stride 1, so the first and last of the time steps count half
    (I3D as published, whose linear layer stands in front of the last mean: the same numbers).
    """

    def __init__(
        self, features: nn.Module, num_channels: int, num_classes: int, dropout: float, *, windows: bool = False
    ) -> None:
        super().__init__()
        self.features = features
        self.pool = ClippedPool3d() if windows else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(num_channels, num_classes)

    @property
    def depth_parts(self) -> DepthParts:
        """Those of the features."""
        return under("features", cast(DepthParts, self.features.depth_parts))

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K] for clips [M, T, C, Y, X]."""
        grid_MDTHW = self.pool(self.features(clips_MTCYX.transpose(1, 2)))
        logits_MK: Tensor = self.classifier(self.dropout(grid_MDTHW.mean(dim=(2, 3, 4))))
        return logits_MK


def i3d(
    *,
    num_classes: int,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    nonlocal_blocks: int = 0,
    inflation: Literal["mean", "centre"] = "mean",
    time_padding: Literal["zeros", "replicate"] = "zeros",
    strided_stem: bool = False,
    padding: Literal["both", "same"] = "both",
    pooling: Literal["mean", "windows"] = "mean",
    dropout: float = 0.5,
) -> ClipClassifier:
    """Build I3D: a 2D network whose kernels are inflated along time.

    backbone: resnet18 to resnet152, or inception_v1 (the original). backbone_weights: None (random), `imagenet`, the
    name of a torchvision weight set, or a .safetensors, .pth or .pt file of the 2D network; the flow stem is the mean
    of the RGB stem over its channels before it is inflated. nonlocal_blocks: 0, 5 (two in res3, three in res4) or 10
    (every block there; ResNets only). inflation: `mean` spreads a kernel over time, `centre` puts it in the middle.
    time_padding: what lies beyond the first and last frame (ResNets only). strided_stem: time / 8 instead of / 2, for
    clips of 32 frames or more (ResNets only). padding: the stem's, alike on `both` sides, or TensorFlow's `same`;
    pooling: the final `mean` over the grid, or over its 2 x 7 x 7 `windows` (both inception_v1 only; DeepMind's
    weights need `same` and `windows`, see video_baselines.published). Raises ValueError naming the option.
    """
    _check_i3d(num_classes, backbone, nonlocal_blocks, inflation, time_padding, strided_stem)
    _check_published(backbone, padding, pooling)
    require_fraction("dropout", dropout)
    require_count("flow_channels", flow_channels)
    inception = backbone == "inception_v1"
    states = {} if backbone_weights is None else _states_2d(backbone, backbone_weights, flow_channels)

    def make(stream: Literal["rgb", "flow"]) -> nn.Module:
        channels = 3 if stream == "rgb" else flow_channels
        net: Inception3d | ResNet3d
        if inception:
            net = Inception3d("joint", in_channels=channels, same_stem=padding == "same")
        else:
            net = ResNet3d(
                backbone,
                in_channels=channels,
                nonlocal_blocks=_NONLOCAL[nonlocal_blocks],
                strided_stem=strided_stem,
                replicate=time_padding == "replicate",
            )
        if stream in states:
            _load_inflated(net, states[stream], inflation, source=f"backbone_weights {backbone_weights}")
        return PooledClassifier(net, net.num_channels, num_classes, dropout, windows=pooling == "windows")

    # Over ResNets: 8 frames, every 8th (I3D 8x8 of PySlowFast), or Wang et al.'s 128 in a row for the strided stem.
    resnet = InputSpec(recipe=slowfast_recipe(128, 1) if strided_stem else slowfast_recipe(8, 8))
    spec = InputSpec(rgb_mean=_HALF, rgb_std=_HALF, recipe=_I3D_RECIPE) if inception else resnet
    return build_streams(modality, make, spec=spec, flow_channels=flow_channels, flow_weight=flow_weight)


def _check_i3d(
    num_classes: int, backbone: str, nonlocal_blocks: int, inflation: str, time_padding: str, strided_stem: bool
) -> None:
    require_count("num_classes", num_classes)
    require_choice("backbone", backbone, ("inception_v1", *DEPTHS))
    require_choice("nonlocal_blocks", nonlocal_blocks, _NONLOCAL)
    require_choice("inflation", inflation, ("mean", "centre"))
    require_choice("time_padding", time_padding, ("zeros", "replicate"))
    if backbone == "inception_v1" and (nonlocal_blocks or strided_stem or time_padding != "zeros"):
        raise ValueError("nonlocal_blocks, strided_stem and time_padding need a ResNet backbone, got inception_v1")


def _check_published(backbone: str, padding: str, pooling: str) -> None:
    require_choice("padding", padding, ("both", "same"))
    require_choice("pooling", pooling, ("mean", "windows"))
    if backbone != "inception_v1" and (padding, pooling) != ("both", "mean"):
        raise ValueError(f"padding and pooling need backbone inception_v1, got {backbone}")


def _load_inflated(
    net: nn.Module, state: dict[str, Tensor], inflation: Literal["mean", "centre"], *, source: str
) -> None:
    """Load a 2D network's weights; non-local blocks, which it does not have, stay as they are."""
    inflated = inflate_state(state, net, inflation)
    kept = {name: value for name, value in net.state_dict().items() if name.startswith("nonlocal_blocks.")}
    load_strict(net, {**kept, **inflated}, source=source, ignore=("fc.", "aux1.", "aux2."))


two_stream_i3d = functools.partial(i3d, modality="two_stream")
"""I3D on RGB and on flow, networks of their own, logits averaged."""

i3d_nl = functools.partial(i3d, nonlocal_blocks=5)
"""The non-local network: I3D over a ResNet with five non-local blocks."""


def s3dg(
    *,
    num_classes: int,
    modality: Modality = "rgb",
    flow_channels: int = 2,
    flow_weight: float = 1.0,
    gating: bool = True,
    dropout: float = 0.2,
) -> ClipClassifier:
    """Build S3D-G: separable inception with feature gating, from random weights (gating=False: S3D).

    There are no public weights for it; for S3D's see `s3d`. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_fraction("dropout", dropout)

    def make(stream: Literal["rgb", "flow"]) -> nn.Module:
        channels = 3 if stream == "rgb" else flow_channels
        net = Inception3d("gated" if gating else "separable", in_channels=channels)
        return PooledClassifier(net, net.num_channels, num_classes, dropout)

    spec = InputSpec(rgb_mean=_HALF, rgb_std=_HALF, recipe=_I3D_RECIPE)  # Xie et al. (2018): 64 frames at 25 a second
    return build_streams(modality, make, spec=spec, flow_channels=flow_channels, flow_weight=flow_weight)


def _states_2d(backbone: str, weights: str, flow_channels: int) -> dict[str, dict[str, Tensor]]:
    """State dicts of the pretrained 2D networks, one a stream; the flow stem is the mean of the RGB stem."""
    if backbone == "inception_v1":
        state = _googlenet_state(weights)
        stem = "conv1.conv.weight"
        return {"rgb": state, "flow": {**state, stem: flow_stem(state[stem], flow_channels)}}
    rgb, flow = build_backbones(backbone, flow_channels=flow_channels, weights=weights)
    assert isinstance(rgb, nn.Module)
    assert isinstance(flow, nn.Module)
    return {"rgb": rgb.state_dict(), "flow": flow.state_dict()}


def _googlenet_state(weights: str) -> dict[str, Tensor]:
    if "." in weights or "/" in weights:
        state = read_state(weights)
        if "conv1.conv.weight" not in state:
            raise ValueError(f"backbone_weights: {weights} is not of torchvision's GoogLeNet: no conv1.conv.weight")
        return state
    known = torchvision.models.get_model_weights("googlenet")
    name = "IMAGENET1K_V1" if weights == "imagenet" else weights
    require_choice("backbone_weights", name, known.__members__)
    try:
        downloaded: dict[str, Tensor] = known[name].get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise ValueError(
            f"backbone_weights googlenet {name} cannot be downloaded ({error}); give the path of a file"
        ) from error
    return downloaded
