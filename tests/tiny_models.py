"""Networks that are no part of kinoray: any `package:function` trains, and small ones keep the tests fast."""

import itertools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kinoray.config.shared import StorageConfig
from kinoray.storage.objects import Storage, join
from ports import wait_until

OWN_NETWORKS = (
    *("tiny_models:mean_colour", "tiny_models:deadly", "tiny_models:mortal"),
    *("tiny_models:one_by_one", "tiny_models:fickle"),
    *("label_models:mixing", "label_models:two_segments", "label_models:wrong"),
)
"""What tests allow a checkpoint to name, as a user does with --allow-factory."""


@dataclass(frozen=True)
class Spec:
    """What the platform asks of a model (kinoray.network.InputSpec); deliberately not its class."""

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


class OneByOne(MeanColour):
    """A network that asks how many clips there are, as a traced one may not."""

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        assert rgb is not None
        clips = [super(OneByOne, self).forward(rgb=clip[None], flow=None) for clip in rgb.unbind()]
        return torch.cat(clips)


def one_by_one(num_classes: int) -> OneByOne:
    return OneByOne(num_classes, 0, 0.0)


class Fickle(MeanColour):
    """A network that says something else each time."""

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        return super().forward(rgb=rgb, flow=flow) + next(_CALLS)


def fickle(num_classes: int) -> Fickle:
    return Fickle(num_classes, 0, 0.0)


_CALLS = itertools.count()


class Mortal(MeanColour):
    """Kills a process with SIGKILL at chosen training steps: each file of the folder `deaths` is one death.

    A file holds "STEP WHO": the step, counted from when its rank was started, and whom it kills: "self",
    "controller" (Ray Train's), "driver" (the job, where it started its own Ray) or a process id. Files are taken in
    order of their names, one for each start of the workers, and whichever rank removes the file kills. "STEP WHO RUN
    [ENDPOINT]" waits for a checkpoint inside the first epoch of that run folder, which is written meanwhile.
    """

    def __init__(self, num_classes: int, deaths: str, dropout: float, batch_norm: bool, flow_channels: int) -> None:
        super().__init__(num_classes, flow_channels, dropout)
        self.norm = nn.BatchNorm1d(3) if batch_norm else nn.Identity()
        self.file = min(Path(deaths).iterdir(), default=None) if deaths else None
        self.step_to_die, self.who, *self.run = self.file.read_text().split() if self.file else ("0", "")
        self.num_steps = 0

    def forward(self, *, rgb: Tensor | None, flow: Tensor | None) -> Tensor:
        self.num_steps += self.training
        if self.num_steps == int(self.step_to_die) and self.file is not None and self.file.exists():
            try:
                self.file.unlink()
            except FileNotFoundError:
                pass  # the other rank was faster
            else:
                if self.run:
                    wait_until(lambda: _has_checkpoint(*self.run), 60, "there is a checkpoint to go on from")
                os.kill(_process(self.who), signal.SIGKILL)
        assert rgb is not None
        colours = rgb.transpose(1, 3)  # channels second
        rgb = self.norm(colours.flatten(2)).unflatten(2, colours.shape[2:]).transpose(1, 3)
        return super().forward(rgb=rgb, flow=flow)


def mortal(
    num_classes: int, deaths: str = "", dropout: float = 0.0, batch_norm: bool = False, flow_channels: int = 0
) -> Mortal:
    return Mortal(num_classes, deaths, dropout, batch_norm, flow_channels)


def _process(who: str) -> int:
    """The id of "self", "controller", "driver", or of a process named by it.

    Workers and controller are children of the raylet, which is one of the driver.
    """
    if who == "self":
        return os.getpid()
    if who == "driver":
        return _parent(os.getppid())
    if who != "controller":
        return int(who)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = _parent(int(folder.name))
            name = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if parent == os.getppid() and name.startswith("ray::TrainController"):
            return int(folder.name)
    raise RuntimeError("no training controller beside this worker")


def _has_checkpoint(run: str, endpoint_url: str | None = None) -> bool:
    storage = Storage(StorageConfig(endpoint_url=endpoint_url, region="us-east-1", addressing="path"))
    return any(info.uri.endswith(".json") for info in storage.list(join(run, "checkpoints", "epoch-0000-step-")))


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
