"""Backbones: frames in, the grid of the last convolution out (Eq. 1-2), no pooling, no classifier.

Shapes: F frames, Y X pixels, D channels, H W feature grid
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.fx
import torchvision
from torch import Tensor, nn

from kinoray.network import IMAGENET_MEAN, IMAGENET_STD
from vcm_sdd.weights import flow_stem, load_strict, read_state

__all__ = [
    "RESNETS",
    "Backbone",
    "ResNetGrid",
    "TimmGrid",
    "TinyGrid",
    "build_backbone",
    "build_backbones",
    "laid_out",
]

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""Names of torchvision's residual networks, all usable as backbones; the paper's is resnet101."""

Triple = tuple[float, float, float]


def laid_out(frames_FCYX: Tensor) -> Tensor:
    """Frames in the order of memory that their device's convolutions want, and hand on: channels_last on a GPU.

    In any other cuDNN would turn every picture around for its matrix units, and back. On a CPU they stay as they are.
    """
    return frames_FCYX.contiguous(memory_format=torch.channels_last) if frames_FCYX.is_cuda else frames_FCYX


torch.fx.wrap("laid_out")  # it asks for the device, which tracing does not know


class Backbone(Protocol):
    """A module that maps frames [F, C, Y, X] to a feature grid [F, num_channels, H, W]."""

    num_channels: int
    rgb_mean: Triple
    rgb_std: Triple

    @property
    def depth_parts(self) -> tuple[tuple[str, ...], ...]: ...
    def __call__(self, frames_FCYX: Tensor) -> Tensor: ...


class ResNetGrid(nn.Module):
    """torchvision's ResNet up to its last block, ReLU'd, stride 32; entries are named as in torchvision."""

    rgb_mean = IMAGENET_MEAN
    rgb_std = IMAGENET_STD
    depth_parts = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))

    def __init__(self, name: str, in_channels: int = 3) -> None:
        super().__init__()
        full = torchvision.models.get_model(name, weights=None)
        self.num_channels: int = full.fc.in_features
        self.conv1, self.bn1, self.relu, self.maxpool = full.conv1, full.bn1, full.relu, full.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = full.layer1, full.layer2, full.layer3, full.layer4
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames_FCYX: Tensor) -> Tensor:
        """Return features [F, D, H, W] with H = ceil(Y / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(laid_out(frames_FCYX)))))
        return cast(Tensor, self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class TinyGrid(nn.Module):
    """A network of 0.3 M parameters, stride 16, 96 channels: for small frames, small sets and training from scratch."""

    num_channels = 96
    rgb_mean = IMAGENET_MEAN
    rgb_std = IMAGENET_STD
    depth_parts = (("stem",), ("down",), ("block",))

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _conv(in_channels, 32, kernel=8, stride=4, padding=2)
        self.down = nn.Sequential(_conv(32, 64, stride=2), _conv(64, 96, stride=2))
        self.block = nn.Sequential(_conv(96, 96), nn.Conv2d(96, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96))

    def forward(self, frames_FCYX: Tensor) -> Tensor:
        """Return features [F, 96, H, W] with H = ceil(floor(Y / 4) / 4)."""
        x = self.down(self.stem(laid_out(frames_FCYX)))
        return torch.relu(x + self.block(x))


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class TimmGrid(nn.Module):
    """A network of the timm package without its pool and classifier: convolutions, or a transformer's patch tokens.

    Tokens that stand for no place (class, distillation, registers) are left out, the others laid out as they lie in the
    frame. Networks that can take other sizes than they were trained with do so (positions are interpolated).
    """

    def __init__(self, name: str, in_channels: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        self.name = name
        self.trunk: Any = _timm_trunk(name, num_classes=0, in_chans=in_channels, pretrained=pretrained)
        self.num_channels = int(self.trunk.num_features)
        self.num_prefix_tokens = int(getattr(self.trunk, "num_prefix_tokens", 0))
        self.channels_last = getattr(self.trunk, "output_fmt", None) == "NHWC"
        stages = getattr(self.trunk, "feature_info", None)
        self.stride = int(stages[-1]["reduction"]) if stages else 32
        self.rgb_mean: Triple = tuple(self.trunk.pretrained_cfg["mean"])
        self.rgb_std: Triple = tuple(self.trunk.pretrained_cfg["std"])
        names = self.trunk.pretrained_cfg.get("classifier", ())
        self.classifier_names = (names,) if isinstance(names, str) else tuple(names)
        self.stem_name = str(self.trunk.pretrained_cfg["first_conv"])

    @property
    def depth_parts(self) -> tuple[tuple[str, ...], ...]:
        """As timm itself groups the network's parameters for rates that fall with the depth."""
        from timm.models import group_parameters

        groups = group_parameters(self.trunk, self.trunk.group_matcher())
        return tuple(tuple(f"trunk.{name}" for name in groups[place]) for place in sorted(groups))

    def forward(self, frames_FCYX: Tensor) -> Tensor:
        """Return features [F, D, H, W]; raises ValueError if the network does not make a grid of this frame size."""
        height, width = frames_FCYX.shape[2:]
        try:
            x = self.trunk.forward_features(laid_out(frames_FCYX))
        except AssertionError as error:  # how timm says that it was made for another size
            raise ValueError(
                f"backbone 'timm:{self.name}' does not take frames of {height} x {width}: {error}"
            ) from error
        if isinstance(x, Tensor) and x.ndim == 4 and self.channels_last:
            x = x.permute(0, 3, 1, 2)
        elif isinstance(x, Tensor) and x.ndim == 3:
            x = self._grid(x[:, self.num_prefix_tokens :], height // self.stride, width // self.stride)
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.num_channels:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"a backbone must return [F, {self.num_channels}, H, W], 'timm:{self.name}' gives {found}")
        return x

    def _grid(self, tokens_FND: Tensor, rows: int, columns: int) -> Tensor:
        if tokens_FND.shape[1] != rows * columns:
            raise ValueError(
                f"backbone 'timm:{self.name}' makes {tokens_FND.shape[1]} tokens, no grid of {rows} x {columns}"
            )
        return tokens_FND.transpose(1, 2).reshape(-1, tokens_FND.shape[2], rows, columns)


def _timm_trunk(name: str, **options: Any) -> Any:
    """timm's network, able to take other frame sizes where there is a switch for that."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"backbone 'timm:{name}' needs the package timm: pip install 'kinoray[timm]'") from error
    if ":" in name:
        network, _, file = name.partition(":")
        raise ValueError(
            f"backbone 'timm:{name}': give the file by itself: backbone=timm:{network} backbone_weights={file}"
        )
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # it has no such switch
        return timm.create_model(name, **options)
    except RuntimeError as error:
        raise ValueError(f"backbone 'timm:{name}' is not known to timm: {error}") from error


def build_backbone(name: str, in_channels: int = 3) -> Backbone:
    """Build a backbone by name with random weights. Raises ValueError listing the known names."""
    if name in RESNETS:
        return ResNetGrid(name, in_channels)
    if name == "tiny":
        return TinyGrid(in_channels)
    if isinstance(name, str) and name.startswith("timm:"):
        return TimmGrid(name.removeprefix("timm:"), in_channels)
    raise ValueError(f"backbone must be tiny, timm:NAME or one of {', '.join(RESNETS)}, got {name!r}")


def build_backbones(name: str, *, flow_channels: int, weights: str | None) -> tuple[Backbone, Backbone]:
    """Build the RGB and the flow backbone (same architecture, weights of their own).

    weights: None for random ones, "imagenet" or the name of one of torchvision's weight sets (downloaded once), or a
    .safetensors, .pth or .pt file with the network's own state dict. With weights, the flow stem starts as the mean
    of the RGB stem over its channels (TSN). Raises ValueError.
    """
    rgb, flow = build_backbone(name), build_backbone(name, flow_channels)
    if weights is not None:
        state, source = _pretrained(name, weights)
        prefix, stem, ignore = _names(rgb)
        _load(rgb, state, prefix, ignore, source)
        adapted = {**state, stem: flow_stem(state[stem], flow_channels)}
        _load(flow, adapted, prefix, ignore, source)
    return rgb, flow


def _load(backbone: Backbone, state: dict[str, Tensor], prefix: str, ignore: tuple[str, ...], source: str) -> None:
    assert isinstance(backbone, nn.Module)
    target = backbone.get_submodule(prefix) if prefix else backbone
    load_strict(target, state, source=source, ignore=ignore)


def _names(backbone: Backbone) -> tuple[str, str, tuple[str, ...]]:
    """Submodule that a file's names refer to, name of the stem kernel, prefixes of the classifier."""
    if isinstance(backbone, TimmGrid):
        return "trunk", f"{backbone.stem_name}.weight", tuple(f"{name}." for name in backbone.classifier_names)
    if isinstance(backbone, TinyGrid):
        return "", "stem.0.weight", ()
    return "", "conv1.weight", ("fc.",)


def _pretrained(name: str, weights: str) -> tuple[dict[str, Tensor], str]:
    if "." in weights or "/" in weights:
        return read_state(weights), f"backbone_weights {weights}"
    if name.startswith("timm:"):
        return _download(lambda: TimmGrid(name.removeprefix("timm:"), pretrained=True).trunk.state_dict(), weights)
    if name == "tiny":
        raise ValueError(f"backbone_weights: there are no pretrained weights for backbone tiny, got {weights!r}")
    known = torchvision.models.get_model_weights(name)
    # V1 is the recipe of the paper's time, and the one whose features are known to transfer.
    wanted = "IMAGENET1K_V1" if weights == "imagenet" else weights
    if wanted not in known.__members__:
        names = ", ".join(member.name for member in known)
        raise ValueError(f"backbone_weights must be imagenet, {names} or a file, got {weights!r}")
    return _download(lambda: known[wanted].get_state_dict(progress=False, check_hash=True), f"{name} {wanted}")


def _download(get: Callable[[], dict[str, Tensor]], source: str) -> tuple[dict[str, Tensor], str]:
    try:
        return get(), source
    except OSError as error:
        raise ValueError(
            f"backbone_weights {source} cannot be downloaded ({error}); give the path of a .safetensors or .pth file"
        ) from error
