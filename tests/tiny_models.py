"""Networks that are no part of kinoray: any `package:function` trains, and small ones keep the tests fast."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

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


class Deadly(MeanColour):
    """Kills a process with SIGKILL at its n-th training step: the one whose id is in the file, "self" for its own."""

    def __init__(self, num_classes: int, flow_channels: int, victim: str, at_step: int) -> None:
        super().__init__(num_classes, flow_channels, 0.0)
        self.victim, self.steps_left = Path(victim), at_step

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        self.steps_left -= self.training
        if self.steps_left == 0:
            try:
                who = self.victim.read_text()
                self.victim.unlink()  # once, by one rank
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid() if who == "self" else int(who), signal.SIGKILL)
        return super().forward(rgb=rgb, flow=flow)


def deadly(num_classes: int, victim: str, at_step: int, flow_channels: int = 0) -> Deadly:
    return Deadly(num_classes, flow_channels, victim, at_step)


class Refuses(MeanColour):
    """Fails in forward as a network with a bug does."""

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        raise ValueError("this network has a bug")


def refuses(num_classes: int) -> Refuses:
    return Refuses(num_classes, 0, 0.0)


def wrong_shape(num_classes: int) -> MeanColour:
    """A network that does not know how many classes there are."""
    return MeanColour(num_classes + 1, 0, 0.0)
