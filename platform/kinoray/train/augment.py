"""What training does to decoded clips on the model's device: colours of single clips, mixtures of two.

Colours are drawn from (seed, epoch, video_id), mixtures from (seed, epoch, step), so a resumed run draws the same.
Easy to break: a clip is one image to every colour operation, or its frames would flicker; and flow is never recoloured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kinoray.config.shared import AugmentConfig
from kinoray.network.batch import VideoBatch
from kinoray.video.sample import clip_rng

__all__ = ["PHOTOMETRIC", "Augmenter", "Mix", "colour_clip", "mix_inputs"]

# Shapes: B videos, S segments, T frames a segment, F = S*T frames, H W pixels

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
