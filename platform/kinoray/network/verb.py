"""`kinoray model`: which networks there are, and what one of them costs."""

import torch
from torch import nn

from kinoray.config.shared import ModelConfig
from kinoray.console import table
from kinoray.errors import ConfigError
from kinoray.network.build import SHORT_NAMES, build_model, without_start_weights
from kinoray.network.config import ModelVerbConfig
from kinoray.network.cost import ModelCost, describe

__all__ = ["describe_model"]


def describe_model(config: ModelVerbConfig) -> ModelCost | None:
    """Print the costs of a network, or the known names where none is given; returns the costs.

    Raises:
        ConfigError: no such network or option, or a size that the network does not take.
    """
    if not config.describe:
        print("\n".join(table(SHORT_NAMES.items())))
        return None
    model = without_start_weights(ModelConfig(factory=config.describe, options=config.options))
    with torch.device("meta"):  # no memory is taken and nothing computed, whatever the size
        network = build_model(model, config.num_classes)
    assert isinstance(network, nn.Module)
    try:
        cost = describe(network, config.num_segments, config.frames_per_segment, config.crop_px, name=config.describe)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(cost)
    return cost
