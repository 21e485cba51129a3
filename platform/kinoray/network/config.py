"""The settings of `kinoray import`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.shared import ModelConfig, StoreConfig

__all__ = ["ImportConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(StoreConfig):
    """Make a checkpoint of a network that somebody published: weights, classes, how it was fed, where it is from.

    Example: kinoray import torchvision:mvit_v2_s --out networks/mvit

    Without SOURCE it lists the networks that ship and what can be imported. With the name of one that ships, or
    `package:function`, and without --out it says what that one costs, part by part. `label`, `evaluate`, `calibrate`
    and `bench` take a SOURCE as --checkpoint, `train` and `tune` as --init-from, and import it by themselves; import it
    to s3:// for a cluster. No code of a source runs: weights are read as data, and the networks are those that ship.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = ""
    """torchvision:NAME[:WEIGHTS], i3d, hf:FOLDER, hf:OWNER/NAME[@REVISION], or a .safetensors or .pth file with
    model.factory; or a network to describe. Default: list them."""
    out: str = ""
    """Folder or s3:// prefix of the new checkpoint."""
    labels: str = ""
    """Text file of class names, one a line in the order of the network's logits. Default: the source's own."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(factory=""))
    """The network that a file of weights is of, other sources say it themselves; options of one to describe."""
