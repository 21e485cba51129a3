"""The config tree of `kinoray tune`: all of TrainConfig, and what to try."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

from kinoray.config.shared import CacheConfig, require
from kinoray.errors import ConfigError
from kinoray.train.config import TrainConfig
from kinoray.tune.space import parse_space

__all__ = ["SpaceEntries", "TuneConfig", "default_space", "train_config"]


def _parse_entries(items: list[str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for item in items:
        path, equals, spec = item.partition("=")
        if not (path and equals and spec):
            raise ConfigError(f"space must be PATH=VALUES, such as optim.lr=log:1e-4..1e-2, got {item!r}")
        if path in entries:
            raise ConfigError(f"space names {path} twice")
        entries[path] = spec
    return entries


def _entry_text(path: str, spec: Any) -> str:
    return f"{path}={spec}"


SpaceEntries = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="PATH=VALUES [PATH=VALUES ...]",
        instance_from_str=_parse_entries,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [_entry_text(path, spec) for path, spec in value.items()],
    ),
]


def default_space() -> dict[str, Any]:
    """Learning rates around the one that trains stably on small sets, and the paper's and smaller segment counts."""
    return {"optim.lr": "log:5e-4..8e-3", "clip.sample.num_segments": "4,8,16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(TrainConfig):
    """Try settings: train one run for each, stop early what falls behind, and say which was best.

    Example: kinoray tune s3://bucket/set --out s3://bucket/sweeps/lr --num-trials 12

    Every setting of `kinoray train` is taken as all trials' own; `space` names those that differ, by their path:
    optim.lr=log:1e-4..1e-2 (drawn evenly in the logarithm; lin: and int: likewise; /5 for five points of it),
    clip.sample.num_segments=4,8,16 (one of these), model.options.scale=frobenius,dim. Each trial is an ordinary run
    folder, OUT/trials/ID. OUT holds tune.json, trials.jsonl, best.yaml (for kinoray train --config) and tune.html.

    The same command again goes on after whatever stopped it: finished trials are not run again, the others go on from
    their newest checkpoints. Never more trials run at a time than the cluster can hold.

    All trials share one decode, kept on the nodes' disks while the sweep runs (--cache.gb): trials with the same seed
    draw the same crops and frames that nest, so one reading of a video serves all segment counts, and no number of any
    trial depends on it. Each epoch of each video has its own file; epochs that do not fit are decoded by each trial.
    """

    cache: CacheConfig = field(default_factory=lambda: CacheConfig(gb=20.0))
    """Decoded frames, or features of frozen backbones, on disk; --cache.gb 0 decodes for each trial anew."""

    space: SpaceEntries = field(default_factory=default_space)
    """What differs between trials."""
    search: Literal["random", "grid", "optuna"] = "random"
    """Which settings are tried: drawn at random, all combinations of lists, or chosen by Optuna's TPE from the results
    so far (pip install 'kinoray[optuna]')."""
    num_trials: int = 8
    """Trials of a random or Optuna search; a grid has as many as it has."""
    grace_epochs: int | None = None
    """A trial is stopped at a rung (this, three times this, ...) unless it is among the best third there (ASHA). As
    many as epochs, or more, train all to the end. Default: a third of the epochs, but at least 8 (or all, if fewer):
    networks that bind what moves to where stay flat for 5 to 8 epochs, and an eager scheduler stops the good ones.
    """

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)  # super() without arguments fails in a dataclass with slots
        parse_space(self.space)
        require(bool(self.val_split), "val_split", "a split to compare trials on", self.val_split)
        require(self.eval_every == 1, "eval_every", "1: trials are compared after each epoch", self.eval_every)
        require(self.patience == 0, "patience", "0: grace_epochs says which trials stop", self.patience)
        require(self.num_trials >= 1, "num_trials", "at least 1", self.num_trials)
        require(self.grace_epochs is None or self.grace_epochs >= 1, "grace_epochs", "at least 1", self.grace_epochs)

    @property
    def grace(self) -> int:
        """grace_epochs, or its default."""
        return self.grace_epochs or min(self.optim.epochs, max(8, -(-self.optim.epochs // 3)))


def train_config(config: TuneConfig) -> TrainConfig:
    """What the trials share, as a TrainConfig."""
    return TrainConfig(**{item.name: getattr(config, item.name) for item in dataclasses.fields(TrainConfig)})
