"""The settings of `kinoray model` and `kinoray import`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.shared import ModelConfig, ModelOptions, StorageConfig, require

__all__ = ["ImportConfig", "ModelVerbConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVerbConfig:
    """Say what a network costs: parameters and multiply-accumulates, part by part, for a whole video.

    Example: kinoray model --describe vcm_sdd_r101

    Without --describe it lists the networks that ship with kinoray. Nothing is trained or downloaded.
    """

    describe: str = ""
    """A short name, or `package:function`."""
    options: ModelOptions = field(default_factory=dict)
    """Keyword arguments of the network's factory, such as backbone=resnet50."""
    num_classes: int = 400
    """Classes (Kinetics-400)."""
    num_segments: int | None = None
    """Segments a video. Default: what the network demands, else the paper's 16."""
    frames_per_segment: int | None = None
    """Frames a segment. Default: what the network demands, else the paper's 6."""
    crop_px: int | None = None
    """Side of a frame, in pixels. Default: what the network demands, else 224."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 1, "num_classes", "at least 1", self.num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Make a checkpoint of a network that somebody published: weights, classes, how it was fed, where it is from.

    Example: kinoray import torchvision:mvit_v2_s --out networks/mvit

    Without SOURCE it lists what can be imported. `label`, `evaluate`, `calibrate` and `bench` take a SOURCE as
    --checkpoint, `train` and `tune` as --init-from, and import it by themselves; import it to s3:// for a cluster.
    No code of a source runs: weights are read as data, and the networks are those that ship.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = ""
    """torchvision:NAME[:WEIGHTS], i3d, hf:FOLDER, hf:OWNER/NAME[@REVISION], or a .safetensors or .pth file with
    model.factory. Default: list them."""
    out: str = ""
    """Folder or s3:// prefix of the new checkpoint."""
    labels: str = ""
    """Text file of class names, one a line in the order of the network's logits. Default: the source's own."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(factory=""))
    """The network that a file of weights is of; other sources say it themselves."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
