"""Networks for the labelling tests: sensitive to what they are fed with, watchable, stoppable, or broken."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinoray.config.scoring import ScoreKind
from kinoray.config.shared import ClipConfig, ModelConfig
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from tiny_models import MeanColour, Spec


class Mixing(nn.Module):
    """Logits that depend on every pixel, on the flow, and on who else is in the batch.

    So tables can only be equal if every batch held the same videos, in the same order.
    """

    def __init__(self, num_classes: int, journal: str, hold_after: int) -> None:
        super().__init__()
        self.input_spec = Spec(flow_channels=2)
        self.journal, self.hold_after = journal, hold_after
        self.see = nn.Conv2d(5, 8, kernel_size=5, stride=3)
        self.classify = nn.Linear(8, num_classes)

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        assert rgb is not None
        assert flow is not None
        if self.journal:
            self._note_and_hold()
        x = torch.cat([rgb, flow], dim=3).flatten(0, 2)
        features = self.see(x).relu().mean(dim=(2, 3)).unflatten(0, rgb.shape[:3]).mean(dim=(1, 2))
        place = torch.linspace(0.0, 1.0, len(features))[:, None]
        logits: Tensor = self.classify(features + 0.1 * features.mean(dim=0) + 0.1 * place)
        return logits

    def _note_and_hold(self) -> None:
        """One line for each batch; after `hold_after` of them, wait until the file `<journal>.go` is there."""
        with Path(self.journal).open("a") as file:
            file.write(f"{os.getpid()}\n")
        while len(Path(self.journal).read_text().splitlines()) > self.hold_after and not self._may_go():
            time.sleep(0.02)

    def _may_go(self) -> bool:
        return Path(f"{self.journal}.go").exists()


def mixing(num_classes: int, journal: str = "", hold_after: int = 10**9) -> Mixing:
    return Mixing(num_classes, journal, hold_after)


def save_untrained(
    storage: Storage,
    uri: str,
    labels: tuple[str, ...],
    clip: ClipConfig,
    factory: str,
    *,
    scores: ScoreKind = "softmax",
    **options: Any,
) -> str:
    """A checkpoint with the same random weights every time; returns its uri."""
    torch.manual_seed(7)
    model = ModelConfig(factory=factory, options=options)
    meta = CheckpointMeta(model=model, clip=clip, labels=labels, epoch=1, step=1, samples=1, scores=scores)
    save_checkpoint(storage, uri, model_state=build_model(model, len(labels)).state_dict(), meta=meta)
    return uri


class Wrong(nn.Module):
    """Gives NaN or infinity for one video of each batch, or one class too many; or fails, or ends its process."""

    def __init__(self, num_classes: int, how: str) -> None:
        super().__init__()
        self.input_spec = Spec()
        self.num_classes, self.how = num_classes, how
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        assert rgb is not None
        if self.how == "dies":
            os._exit(1)
        if self.how == "raises":
            raise RuntimeError("out of memory")
        logits = torch.zeros(len(rgb), self.num_classes + (self.how == "wide"))
        if self.how in ("nan", "inf", "-inf"):
            logits[-1, 0] = float(self.how)
        return logits


def wrong(num_classes: int, how: str) -> Wrong:
    return Wrong(num_classes, how)


def two_segments(num_classes: int) -> MeanColour:
    """A network that is built for two segments and no other number."""
    model = MeanColour(num_classes, 0, 0.0)
    model.input_spec = Spec(num_segments=2)
    return model
