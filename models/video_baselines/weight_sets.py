"""torchvision's Kinetics weights: which there are, what they were fed, and how a file of theirs becomes our network's.

Everything is read from the installed torchvision's own metadata. Nothing here downloads.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from kinoray.network import InputSpec
from vcm_sdd.weights import require_fit
from video_baselines.torchvision_video import published_clip

__all__ = ["WeightSet", "adopt_state", "weight_sets"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSet:
    """One weight set of torchvision for one of its video networks."""

    factory: str
    """Name of the network, torchvision's and ours: video_baselines:NAME."""
    name: str
    """Name of the weight set, as in `weights=NAME`; a network's first is its default."""
    class_names: tuple[str, ...]
    """Index = number of the logit."""
    spec: InputSpec
    """Mean, deviation, crop and recipe that it was trained and tested with."""
    clips_per_video: int | None
    """Clips whose answers were averaged for the accuracy."""
    top1: float
    """Published accuracy on Kinetics-400 in percent."""
    top5: float
    """The same within five answers."""
    recipe_url: str
    """Where its training is described; its licence is that of this source."""
    url: str
    """The file that torchvision downloads."""
    note: str
    """torchvision's own words about it."""


def weight_sets() -> tuple[WeightSet, ...]:
    """Every weight set of every video network of the installed torchvision, by name."""
    models = torchvision.models
    return tuple(
        _weight_set(name, weights)
        for name in sorted(models.list_models(module=models.video))
        for weights in models.get_model_weights(name)
    )


def _weight_set(factory: str, weights: torchvision.models.WeightsEnum) -> WeightSet:
    meta, presets = weights.meta, weights.transforms()
    clips = re.search(r"`clips_per_video=([0-9]+)`", meta["_docs"])
    accuracy = meta["_metrics"]["Kinetics-400"]
    mean, std = ((float(x), float(y), float(z)) for x, y, z in (presets.mean, presets.std))
    recipe = published_clip(weights)
    return WeightSet(
        factory=factory,
        name=weights.name,
        class_names=tuple(meta["categories"]),
        spec=InputSpec(crop_px=recipe.crop_px, rgb_mean=mean, rgb_std=std, recipe=recipe),
        clips_per_video=int(clips.group(1)) if clips else None,
        top1=accuracy["acc@1"],
        top5=accuracy["acc@5"],
        recipe_url=meta["recipe"],
        url=weights.url,
        note=" ".join(meta["_docs"].split()),
    )


def adopt_state(factory: str, state: Mapping[str, Tensor], *, source: str) -> tuple[int, dict[str, Tensor]]:
    """A state dict of torchvision's network as that of ours: its number of classes, and the entries under our names.

    Every entry must fit the network that video_baselines:FACTORY builds for so many classes with its defaults.

    Raises:
        ValueError: torchvision has no video network of that name.
        WeightsMismatch: the file is of another network; the message lists what differs.
    """
    known = torchvision.models.list_models(module=torchvision.models.video)
    if factory not in known:
        raise ValueError(f"{source}: torchvision has video networks {', '.join(sorted(known))}, got {factory!r}")
    build = getattr(importlib.import_module("video_baselines"), factory)
    with torch.device("meta"):  # shapes only: nothing is drawn, nothing allocated
        net: nn.Module = build(num_classes=2).rgb_net.net
    head = [name for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv3d))][-1]
    last = state.get(f"{head}.weight")
    num_classes = 2 if last is None else int(last.shape[0])
    with torch.device("meta"):
        net = build(num_classes=num_classes).rgb_net.net
    require_fit(net, state, source=source)
    return num_classes, {f"rgb_net.net.{name}": tensor for name, tensor in state.items()}
