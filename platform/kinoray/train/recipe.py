"""The training recipe: what is done to clips on the device (augment.*), learning rates, the optimizer, the loss, what
is frozen, what is computed twice (optim.*).

Colours of single clips are drawn from (seed, epoch, video_id), mixtures of two from (seed, epoch, step), so a resumed
run draws the same. A clip is one image to every colour operation, or its frames would flicker; flow keeps its values.

Easy to break: what is computed twice must move nothing the second time that the first has moved: batch norms'
statistics stay as they are in it, and torch.utils.checkpoint replays the generators.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from kinoray.config.shared import AugmentConfig, OptimConfig
from kinoray.errors import ConfigError
from kinoray.network.batch import VideoBatch
from kinoray.network.build import backbone_parts, depths
from kinoray.video.sample import clip_rng

__all__ = [
    "PHOTOMETRIC",
    "Augmenter",
    "Mix",
    "Recomputed",
    "batch_norms",
    "class_weights",
    "colour_clip",
    "freeze",
    "learning_rate",
    "loss_sum",
    "make_optimizer",
    "mix_inputs",
    "multilabel_loss_sum",
    "rate_factors",
    "recompute",
    "set_rate",
    "still_parts",
    "trained_parameters",
]

_STEP_FACTOR = 0.1  # what the rate is multiplied by after each of step_epochs

PHOTOMETRIC = (
    "identity",
    "brightness",
    "colour",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""RandAugment's operations that move no pixel."""
_BINS = 31  # of RandAugment's magnitude, 0 .. 30

# Shapes: B videos, C classes, S segments, T frames a segment, F = S*T frames, H W pixels


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: rises linearly over warmup_fraction of the steps, then falls.

    The first step already has a rate above zero; on a cosine the step after the last would have zero.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / (num_warmup + 1)
    if config.step_epochs:
        whole_epochs = step * config.epochs // num_steps
        return config.lr * _STEP_FACTOR ** sum(whole_epochs >= epoch for epoch in config.step_epochs)
    share = (step - num_warmup) / (num_steps - num_warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a network."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def freeze(module: nn.Module, config: OptimConfig, backbone: Collection[str]) -> None:
    """Take from training what freeze_bn and a backbone_lr_factor of 0 name; `backbone` holds names of parameters."""
    if config.freeze_bn:
        for norm in batch_norms(module):
            norm.requires_grad_(False)
    if config.backbone_lr_factor == 0:
        for name, parameter in module.named_parameters():
            if name in backbone:
                parameter.requires_grad_(False)


def still_parts(module: nn.Module, config: OptimConfig) -> list[nn.Module]:
    """What computes in training as it does in scoring; call it after `freeze`.

    With freeze_bn the batch norms. With a backbone_lr_factor of 0 the largest submodules that have parameters, but none
    that is trained: their dropout and stochastic depth stand still, too.
    """
    parts: list[nn.Module] = [*batch_norms(module)] if config.freeze_bn else []
    if config.backbone_lr_factor == 0:
        parts += _untrained(module)
    return parts


def _untrained(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        trained = {parameter.requires_grad for parameter in child.parameters()}
        if trained == {False}:
            yield child
        elif True in trained:
            yield from _untrained(child)


def rate_factors(module: nn.Module, config: OptimConfig, backbone: Collection[str] = ()) -> dict[str, float]:
    """What the rate is multiplied by for each parameter that is trained:

        factor = layer_decay ** depth * (backbone_lr_factor in `backbone`, else 1)

    depth is 1 in the block in front of the answer and grows towards the input (kinoray.network.build.depths).

    Raises:
        ConfigError: layer_decay is set, and the network names no depth_parts.
    """
    deep = {} if config.layer_decay == 1 else depths(module)
    return {
        name: config.layer_decay ** deep.get(name, 0) * (config.backbone_lr_factor if name in backbone else 1.0)
        for name, _ in trained_parameters(module)
    }


def make_optimizer(module: nn.Module, config: OptimConfig, backbone: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained, in groups of one rate_factors each (set_rate), the largest first.

    On CUDA it is one kernel over all of them; elsewhere torch's plain form, whose digits are other ones.
    """
    factors = rate_factors(module, config, backbone)
    trained = trained_parameters(module)
    groups = [
        {"params": [parameter for name, parameter in trained if factors[name] == factor], "lr_factor": factor}
        for factor in sorted(set(factors.values()), reverse=True)
    ]
    on_cuda = all(parameter.device.type == "cuda" for _, parameter in trained)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True if on_cuda else None,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step use this learning rate, times lr_factor in each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not frozen, by name."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def class_weights(labels: Tensor, num_classes: int, power: float) -> Tensor:
    """Weights float32 [C], (videos of the class) ** -power, such that the mean over `labels` is 1.

    A class without a video has weight 0; where videos may have several classes it has that of a class with one, or
    nothing would teach the network that no video has it.

    Args:
        labels: int64 [N], or [N, C] of 0 and 1 where videos may have several.
    """
    if labels.dim() == 1:
        counts = torch.bincount(labels, minlength=num_classes).double()
        weights = torch.where(counts > 0, counts.clamp(min=1.0) ** -power, 0.0)
    else:
        counts = labels.sum(dim=0, dtype=torch.float64)
        weights = counts.clamp(min=1.0) ** -power
    if not counts.any():
        return weights.float()
    return (weights * counts.sum() / (weights * counts).sum()).float()


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    partners: Tensor | None = None,
    share: float = 1.0,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of logits float [B, C] with labels int64 [B].

    q    = share * onehot(labels) + (1 - share) * onehot(partners)
    loss = - sum over videos and classes of weights_c ((1 - smoothing) q_c + smoothing / C) log softmax(logits)_c
    """

    def part(targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, weight=weights, reduction="sum", label_smoothing=smoothing)

    own = part(labels)
    return own if partners is None else share * own + (1.0 - share) * part(partners)


_FOCUS = 2.0  # gamma of the focal loss
_FOCUS_LACKING = 4.0  # gamma- of the asymmetric loss; its gamma+ is 0
_SHIFT = 0.05  # its m


def multilabel_loss_sum(
    logits: Tensor,
    labels: Tensor,
    kind: Literal["bce", "focal", "asymmetric"],
    *,
    partners: Tensor | None = None,
    share: float = 1.0,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over videos and classes of the binary losses of logits float [B, C] with labels [B, C], 0 or 1.

    q          = share * labels + (1 - share) * partners;  y = (1 - smoothing) q + smoothing / 2
    loss       = sum of weights_c (y has_c + (1 - y) lacks_c),  p = sigmoid(logits)
    bce          has = -log p                  lacks = -log(1 - p)
    focal        has = -(1 - p)^2 log p        lacks = -p^2 log(1 - p)            Lin et al. 2017, eq. 4
    asymmetric   has = -log p                  lacks = -s^4 log(1 - s)            Ridnik et al. 2021, eq. 4 to 7
                 with s = max(p - 0.05, 0)
    """
    targets = labels if partners is None else share * labels + (1.0 - share) * partners
    targets = (1.0 - smoothing) * targets + smoothing / 2
    has, lacks = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    if kind == "focal":
        p = torch.sigmoid(logits)
        has, lacks = (1 - p) ** _FOCUS * has, p**_FOCUS * lacks
    elif kind == "asymmetric":
        shifted = (torch.sigmoid(logits) - _SHIFT).clamp(min=0.0)
        lacks = shifted**_FOCUS_LACKING * -torch.log1p(-shifted)
    terms = targets * has + (1 - targets) * lacks
    return (terms if weights is None else weights * terms).sum()


class Recomputed:
    """The parts of a network that are computed twice; `ran` says whether its forward has called any of them."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.ran = False
        for part in parts:
            part.forward = self._twice(part, part.forward)

    def _twice(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _still(part)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.ran = True
            if not (part.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run


def recompute(module: nn.Module, what: Literal["none", "head", "all"]) -> Recomputed | None:
    """Make the head, or the head and each block of the backbones, keep no activations inside; None for nothing.

    The head is what the network has beside its backbone_parts; blocks are the members of their nn.Sequential.

    Raises:
        ConfigError: the network names no backbone_parts, so there is nothing to choose.
    """
    if what == "none":
        return None
    names = backbone_parts(module)
    if not names:
        raise ConfigError(
            f"optim.recompute must be none for {type(module).__name__}, which names no backbone_parts, got {what!r}"
        )
    parts = [child for name, child in module.named_children() if name not in names]
    if what == "all":
        for name in names:
            parts += _blocks(module.get_submodule(name))
    return Recomputed(parts)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost nn.Sequential modules; one of plain layers is a block itself."""
    if isinstance(module, nn.Sequential):
        has_blocks = any(list(child.children()) for child in module)
        return list(module) if has_blocks else [module]
    return [block for child in module.children() for block in _blocks(child)]


@contextmanager
def _still(part: nn.Module) -> Iterator[None]:
    """Batch norms compute as they do in training, but leave their statistics alone."""
    norms = batch_norms(part)
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked = count


@dataclass(frozen=True, slots=True)
class Mix:
    """How the clips of a batch are mixed: each with clip `partners[i]` of the same batch."""

    share: float
    """Of the clip itself in label and, without a box, in every pixel: 0.5 .. 1."""
    partners: Tensor
    """int64 [B]."""
    box: tuple[int, int, int, int] | None
    """CutMix: (top, left, height, width) in pixels of what comes from the partner, in all frames; None for mixup."""

    def part(self, videos: slice) -> "Mix":
        """The same for some of the clips; partners still count in the whole batch."""
        return replace(self, partners=self.partners[videos])


class Augmenter:
    """Draws for one run; the same for any order of calls."""

    def __init__(self, config: AugmentConfig, seed: int, device: torch.device) -> None:
        self._config = config
        self._seed = seed
        self._device = device

    def colour(self, clips: VideoBatch, video_ids: Sequence[str], epoch: int) -> VideoBatch:
        """The clips with other colours, RGB on the device; the same object if colours are not to be changed."""
        if clips.rgb is None or not self._config.changes_colours or not len(clips):
            return clips
        coloured = []
        for stored, video_id in zip(clips.rgb, video_ids, strict=True):
            # A stream of its own: a cache of decoded clips must not change what is drawn here.
            rng = clip_rng(self._seed, epoch, f"{video_id}\ncolour")
            clip = stored.to(self._device, non_blocking=True)
            coloured.append(colour_clip(clip, self._config, rng))
        return VideoBatch(rgb=torch.stack(coloured), flow=clips.flow)

    def mix(self, num_videos: int, size: int, epoch: int, step: int) -> Mix | None:
        """How to mix this rank's clips of size x size pixels in a step of the epoch; None for not at all."""
        config = self._config
        kinds = [name for name in ("mixup", "cutmix") if getattr(config, f"{name}_alpha") > 0]
        if not kinds or num_videos < 2:
            return None
        rng = clip_rng(self._seed, epoch, f"\nmix\n{step}")  # no video is named so
        kind = kinds[int(rng.integers(len(kinds)))]
        alpha = config.mixup_alpha if kind == "mixup" else config.cutmix_alpha
        # Both clips of a pair are in the batch, so the larger share may always be the clip's own.
        drawn = float(rng.beta(alpha, alpha))
        share = max(drawn, 1.0 - drawn)
        # The order of an epoch is random, but neighbours may be of one shard: half a batch away they are not.
        partners = torch.arange(num_videos).roll(max(1, num_videos // 2))
        if kind == "mixup":
            return Mix(share, partners, None)
        side = int(size * (1.0 - share) ** 0.5)  # rounded down: the clip itself keeps the larger share
        top, left = (int(rng.integers(size - side + 1)) for _ in range(2))
        return Mix(1.0 - side * side / (size * size), partners, (top, left, side, side))


def mix_inputs(own: dict[str, Tensor | None], other: dict[str, Tensor | None], mix: Mix) -> dict[str, Tensor | None]:
    """The inputs of a model for mixed clips, from those of the clips [B, S, T, C, H, W] and of their partners."""
    mixed: dict[str, Tensor | None] = {}
    for name, x in own.items():
        y = other[name]
        if x is None or y is None:
            mixed[name] = None
        elif mix.box is None:
            mixed[name] = mix.share * x + (1.0 - mix.share) * y
        else:
            top, left, height, width = mix.box
            inside = (..., slice(top, top + height), slice(left, left + width))
            x = x.clone()
            x[inside] = y[inside]
            mixed[name] = x
    return mixed


def colour_clip(clip: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """One clip, uint8 [S, T, 3, H, W], with colour jitter, then RandAugment's operations, as rng draws them."""
    segments, frames, channels, height, width = clip.shape
    image = clip.flatten(0, 1).transpose(0, 1).reshape(channels, segments * frames * height, width)
    for operation in _jitter(config, rng):
        image = operation(image)
    for _ in range(config.randaugment_ops):
        name = PHOTOMETRIC[int(rng.integers(len(PHOTOMETRIC)))]
        sign = -1.0 if rng.random() < 0.5 else 1.0
        image = _randaugment(image, name, config.randaugment_magnitude, sign, height)
    return image.reshape(channels, segments * frames, height, width).transpose(0, 1).reshape(clip.shape)


def _jitter(config: AugmentConfig, rng: np.random.Generator) -> list[Callable[[Tensor], Tensor]]:
    """ColorJitter's operations in random order."""
    from torchvision.transforms.v2 import functional as V

    operations: list[Callable[[Tensor], Tensor]] = []
    if config.colour_jitter > 0:
        low, high = 1.0 - config.colour_jitter, 1.0 + config.colour_jitter
        for adjust in (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation):
            factor = float(rng.uniform(low, high))
            operations.append(partial(_adjusted, adjust, factor))
    return [operations[index] for index in rng.permutation(len(operations))]


def _adjusted(adjust: Callable[[Tensor, float], Tensor], factor: float, image: Tensor) -> Tensor:
    return adjust(image, factor)


def _randaugment(image: Tensor, name: str, magnitude: int, sign: float, height: int) -> Tensor:
    """One operation on uint8 [3, F * height, W], as strong as torchvision's RandAugment makes it in 31 bins."""
    from torchvision.transforms.v2 import functional as V

    strength = 0.9 * magnitude / (_BINS - 1)
    operations: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: image,
        "brightness": lambda: V.adjust_brightness(image, 1.0 + sign * strength),
        "colour": lambda: V.adjust_saturation(image, 1.0 + sign * strength),
        "contrast": lambda: V.adjust_contrast(image, 1.0 + sign * strength),
        "sharpness": lambda: _sharpened(image, 1.0 + sign * strength, height),
        "posterize": lambda: V.posterize(image, 8 - round(magnitude / ((_BINS - 1) / 4))),
        "solarize": lambda: V.solarize(image, 255.0 * (1.0 - magnitude / (_BINS - 1))),
        "autocontrast": lambda: V.autocontrast(image),
        "equalize": lambda: V.equalize(image),
    }
    return operations[name]()


def _sharpened(image: Tensor, factor: float, height: int) -> Tensor:
    """Frame by frame, since it looks at neighbours."""
    from torchvision.transforms.v2 import functional as V

    frames = image.reshape(3, -1, height, image.shape[-1]).transpose(0, 1)
    return cast(Tensor, V.adjust_sharpness(frames, factor)).transpose(0, 1).reshape(image.shape)
