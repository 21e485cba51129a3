"""Networks that are no part of kinoray: any `package:function` trains, and small ones keep the tests fast."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """What the platform asks of a model (kinoray.model.InputSpec); deliberately not vcm_sdd's class."""

    rgb: bool = True
    flow_channels: int = 0
    num_segments: int | None = None
    frames_per_segment: int | None = None
    crop_px: int | None = None
    rgb_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rgb_std: tuple[float, float, float] = (0.25, 0.25, 0.25)


class MeanColour(nn.Module):
    """A linear classifier on the mean colour (and mean flow) of the whole clip."""

    def __init__(self, num_classes: int, flow_channels: int, dropout: float) -> None:
        super().__init__()
        self.input_spec = Spec(flow_channels=flow_channels)
        self.drop = nn.Dropout(dropout)
        self.classify = nn.Linear(3 + flow_channels, num_classes)

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        features = [x.mean(dim=(1, 2, 4, 5)) for x in (rgb, flow) if x is not None]
        logits: Tensor = self.classify(self.drop(torch.cat(features, dim=1)))
        return logits


def mean_colour(num_classes: int, flow_channels: int = 0, dropout: float = 0.0) -> MeanColour:
    return MeanColour(num_classes, flow_channels, dropout)
