"""Which parameters of a network are its classifier, and which its backbones.

A network may name its backbones: `backbone_parts`, submodules that its forward calls. Of one that names none, all but
the classifier counts as backbone. The classifier needs no name: it is whatever the number of classes shapes.
"""

from typing import cast

import torch
from torch import nn

from kinoray.config.shared import ModelConfig
from kinoray.network.build import VideoModel, build_model, without_start_weights

__all__ = ["backbone_names", "backbone_parts", "classifier_names"]


def backbone_parts(model: VideoModel | nn.Module) -> tuple[str, ...]:
    """Names of the submodules that the network calls its backbones; none if it does not say."""
    return tuple(getattr(model, "backbone_parts", ()))


def classifier_names(model: VideoModel, config: ModelConfig, num_classes: int) -> frozenset[str]:
    """Weights of the model, built by config for num_classes, whose shape follows from the number of classes."""
    with torch.random.fork_rng(devices=[]):  # building draws weights: leave the caller's generator as it is
        other = build_model(without_start_weights(config), num_classes + 1).state_dict()
    return frozenset(
        name for name, tensor in model.state_dict().items() if name in other and other[name].shape != tensor.shape
    )


def backbone_names(model: VideoModel, config: ModelConfig, num_classes: int) -> frozenset[str]:
    """Parameters of the backbones."""
    names = [name for name, _ in cast(nn.Module, model).named_parameters()]
    if parts := backbone_parts(model):
        return frozenset(name for name in names if name.startswith(tuple(f"{part}." for part in parts)))
    return frozenset(names) - classifier_names(model, config, num_classes)
