"""Config trees of the verbs that bring their own data or need none: `demo`, `ablate` and `model`."""

from dataclasses import dataclass, field
from typing import Literal

from kinoray.config.shared import (
    OptimConfig,
    ResourcesConfig,
    StorageConfig,
    require,
)

__all__ = [
    "AblateConfig",
    "DemoConfig",
]

_NOT_IN_STUDY = (
    "accumulate",
    "backbone_lr_factor",
    "class_balance",
    "compile",
    "ema_decay",
    "freeze_bn",
    "label_smoothing",
    "precision",
    "recompute",
)  # settings of optim that `ablate` does not take: all its networks are trained alike, on one thread


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
    seed: int = 0
    """Seeds the videos and the training."""

    def __post_init__(self) -> None:
        require(self.videos_per_class >= 4, "videos_per_class", "at least 4", self.videos_per_class)
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """Train the rows of the paper's table 2, TSN and TSM on a generated set with several seeds, and tabulate them.

    Example: kinoray ablate --out runs/ablation --doc docs/ablation.md

    The set (synthetic/binding.py) asks which thing moves and which way. A finished run is one line of results.jsonl;
    the same command again trains what is missing and nothing else.
    """

    out: str
    """Folder or s3:// prefix for results.jsonl, ablation.json and ablation.md."""
    doc: str = ""
    """Also write the table, the paper's figures and a reading of both to this Markdown file."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every network is trained once with each of these."""
    quick: bool = False
    """Shows in a minute that it works: 1 epoch, 1 seed, 144 videos. Its numbers mean nothing."""
    num_train: int = 1600
    """Training videos, a multiple of the 8 classes."""
    num_test: int = 1600
    """Test videos, a multiple of the 8 classes."""
    data_seed: int = 0
    """Seeds the videos."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The recipe of every run; its seed is replaced by each of `seeds`."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Runs at a time (num_workers); each trains on one thread."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_test"):
            value = getattr(self, name)
            require(value >= 8 and value % 8 == 0, name, "a multiple of 8, at least 8", value)
        distinct = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(distinct and min(self.seeds) >= 0, "seeds", "different whole numbers of at least 0", self.seeds)
        for name in _NOT_IN_STUDY:
            expected, found = getattr(OptimConfig(), name), getattr(self.optim, name)
            require(found == expected, f"optim.{name}", f"{expected} in this study", found)
