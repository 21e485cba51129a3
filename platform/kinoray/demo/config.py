"""Config tree of the verb `demo`."""

from dataclasses import dataclass
from typing import Literal

from kinoray.config.shared import (
    require,
)

__all__ = [
    "DemoConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Make a small set of real H.264 videos, then pack, train, evaluate, label and report on this machine.

    Example: kinoray demo --storage s3
    """

    out: str = "demo-out"
    """Folder for everything the demo makes."""
    storage: Literal["local", "s3"] = "local"
    """`s3` keeps the data in a local S3 server that the demo starts and stops (needs the s3-demo extra)."""
    videos_per_class: int = 80
    """Size of the set (6 classes; a quarter is held out)."""
    epochs: int = 10
    """Training epochs."""

    def __post_init__(self) -> None:
        require(self.videos_per_class >= 4, "videos_per_class", "at least 4", self.videos_per_class)
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
