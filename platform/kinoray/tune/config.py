"""The config tree of `kinoray tune`: all of TrainConfig, and what to try.

That is entries `setting path = values` over the tree of TrainConfig, checked before anything starts:

    optim.lr=log:1e-4..1e-2            any number in the range, drawn evenly in its logarithm
    optim.lr=log:1e-4..1e-2/5          these five, evenly spaced in the logarithm
    optim.weight_decay=lin:0..0.1      any number, drawn evenly; /N as above
    model.options.heads=int:2..8       any whole number, both ends included; /N as above
    clip.sample.num_segments=4,8,16    one of a list of YAML scalars
    clip.view.train_scales=[[1.0], [1.0, 0.75]]    one of a list in YAML, for values that are lists themselves

Drawn numbers are rounded to three digits, so that a table shows what was used. Easy to break: the trials of a sweep
must come out the same when it is started again, since their folders are found by their settings.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from tyro.constructors import PrimitiveConstructorSpec

from kinoray.config.file import config_from_mapping, parse_yaml, to_yaml
from kinoray.config.shared import CacheConfig, digest, require
from kinoray.errors import ConfigError
from kinoray.train.config import TrainConfig

__all__ = [
    "Axis",
    "Settings",
    "SpaceEntries",
    "TuneConfig",
    "apply",
    "default_space",
    "draw_trials",
    "grid_trials",
    "parse_space",
    "require_of_space",
    "train_config",
    "trial_id",
]

Settings = dict[str, Any]
"""Values by setting path, such as {"optim.lr": 0.002}."""
_FIXED = {
    *("catalog", "out", "storage", "resources", "cache", "parallel", "eval_every", "patience"),
    *("checkpoint_every_steps", "keep_checkpoints", "max_failures", "max_bad_fraction"),
}
_MAX_GRID = 10_000


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


@dataclass(frozen=True, slots=True)
class Axis:
    """One entry of the space: a list of values to choose from, or a range to draw from."""

    path: str
    values: tuple[Any, ...] = ()
    """What is chosen from; empty for a range."""
    scale: Literal["log", "lin", "int", ""] = ""
    """How a range is drawn from; "" for a list that was given as one."""
    low: float = 0.0
    high: float = 0.0

    def allows(self, value: Any) -> bool:
        """Whether it is one of the values, or lies in the range."""
        if value in self.values:
            return True
        return bool(self.scale) and type(value) in (int, float) and self.low <= value <= self.high

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        return self.at(float(rng.random()))

    def at(self, share: float) -> float | int:
        """The value of a range at 0 (low) .. 1 (high)."""
        if self.scale == "int":
            return min(int(self.high), int(self.low) + int(share * (self.high - self.low + 1)))
        if self.scale == "log":
            return self.clip(math.exp(math.log(self.low) + share * math.log(self.high / self.low)))
        return self.clip(self.low + share * (self.high - self.low))

    def clip(self, value: float) -> float | int:
        """A number moved into the range and rounded."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.scale == "int" else min(max(float(f"{inside:.3g}"), self.low), self.high)


def parse_space(space: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The entries of a space, sorted by path; values are the grammar's text, or a list.

    Raises:
        ConfigError: naming the entry.
    """
    if not space:
        raise ConfigError("space must name at least one setting, such as optim.lr=log:1e-4..1e-2")
    return tuple(_axis(path, space[path]) for path in sorted(space))


def _axis(path: str, spec: Any) -> Axis:
    entry = f"space: {path}={spec}"
    if path.split(".")[0] in _FIXED:
        raise ConfigError(f"{entry}: {path.split('.')[0]} is the same for all trials; it decides no result")
    if isinstance(spec, str) and spec.partition(":")[0] in ("log", "lin", "int"):
        return _range(path, spec, entry)
    if isinstance(spec, str) and not spec.lstrip().startswith("["):
        values = [_scalar(part.strip(), entry) for part in spec.split(",")]
    else:
        listed = _yaml(spec, entry) if isinstance(spec, str) else spec
        values = list(listed) if isinstance(listed, list | tuple) else [listed]
    distinct = {repr(value) for value in values}
    if not values or len(distinct) < len(values):
        raise ConfigError(f"{entry}: expected one or more different values")
    return Axis(path, tuple(values))


def _yaml(text: str, entry: str) -> Any:
    return parse_yaml(text, f"{entry}: {text!r:.80}")


def _scalar(text: str, entry: str) -> Any:
    value = _yaml(text, entry)
    if value is None or isinstance(value, dict | list):
        raise ConfigError(f"{entry}: {text!r} is no value; write VALUE,VALUE,... or [VALUE, ...]")
    if isinstance(value, str):
        try:
            value = float(value)  # YAML takes 1e-4 for text
        except ValueError:
            return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{entry}: {text!r} is not a finite number")
    return value


def _range(path: str, spec: str, entry: str) -> Axis:
    scale, _, rest = spec.partition(":")
    ends, slash, count_text = rest.partition("/")
    try:
        low, high = (float(end) for end in ends.split(".."))
        count = int(count_text) if slash else 0
    except ValueError as error:
        raise ConfigError(f"{entry}: expected {scale}:LOW..HIGH or {scale}:LOW..HIGH/COUNT") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{entry}: expected a range whose low end is below its high end")
    if scale == "log" and low <= 0:
        raise ConfigError(f"{entry}: a log range must begin above 0")
    if scale == "int" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{entry}: the ends of an int range must be whole numbers")
    axis = Axis(path, (), "log" if scale == "log" else "lin" if scale == "lin" else "int", low, high)
    if not slash:
        return axis
    points = tuple(axis.at(index / (count - 1)) for index in range(count)) if count >= 2 else ()
    if len(points) < 2 or len(set(points)) < len(points):
        raise ConfigError(f"{entry}: /COUNT must be 2 or more, and give different values")
    return Axis(path, points, axis.scale, low, high)


def apply(base: TrainConfig, settings: Settings) -> TrainConfig:
    """The config with these settings.

    Raises:
        ConfigError: there is no such setting, or it does not take the value; the message names both.
    """
    tree: dict[str, Any] = parse_yaml(to_yaml(base), "settings")
    for path, value in settings.items():
        *folders, name = path.split(".")
        branch: Any = tree
        for depth, folder in enumerate(folders):
            if not isinstance(branch, dict) or folder not in branch:
                raise ConfigError(f"space: {path} is not a setting; {_known(branch, folders[:depth])}")
            branch = branch[folder]
        # Options of a network are its own: the factory knows them.
        if not isinstance(branch, dict) or (name not in branch and folders != ["model", "options"]):
            raise ConfigError(f"space: {path} is not a setting; {_known(branch, folders)}")
        if isinstance(branch.get(name), dict):
            raise ConfigError(f"space: {path} is a group of settings; name one of {', '.join(branch[name])}")
        branch[name] = value
    try:
        return config_from_mapping(TrainConfig, tree)
    except ConfigError as error:
        shown = ", ".join(f"{path}={value}" for path, value in settings.items())
        raise ConfigError(f"space: {error} (trial {shown})") from error


def _known(branch: Any, folders: Sequence[str]) -> str:
    where = ".".join(folders) or "the tree"
    return f"{where} has {', '.join(sorted(branch))}" if isinstance(branch, dict) else f"{where} is a value"


def require_of_space(axes: Sequence[Axis], settings: object, where: str) -> Settings:
    """Settings that were read back from a sweep's folder: only what the space names, and values out of it.

    Whoever writes there could else choose the network, and so code.

    Raises:
        ConfigError: naming the first that is none of the space.
    """
    known = {axis.path: axis for axis in axes}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: settings must be a mapping, found {str(settings)[:100]!r}")
    for path, value in settings.items():
        if path not in known or not known[path].allows(value):
            text = f"{path}={value}"[:200]
            raise ConfigError(f"{where} holds a trial with {text!r}, which is not in this sweep's space; remove it")
    return settings


def trial_id(settings: Settings) -> str:
    """8 hex digits that name a trial by its settings."""
    return digest(settings)[:8]


def grid_trials(axes: Sequence[Axis]) -> list[Settings]:
    """Every combination; the entry that comes first by its path changes slowest.

    Raises:
        ConfigError: an axis is a range without /COUNT, or the grid is too large.
    """
    for axis in axes:
        if not axis.values:
            raise ConfigError(f"space: a grid needs a list of values for {axis.path}; add /COUNT to its range")
    size = math.prod(len(axis.values) for axis in axes)
    if size > _MAX_GRID:
        raise ConfigError(f"space: the grid has {size:,} trials, more than {_MAX_GRID:,}")
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip([axis.path for axis in axes], values, strict=True)) for values in combinations]


def draw_trials(axes: Sequence[Axis], count: int, seed: int) -> list[Settings]:
    """`count` different settings drawn at random; fewer where the space has not as many."""
    if all(axis.values for axis in axes) and math.prod(len(axis.values) for axis in axes) <= count:
        return grid_trials(axes)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn: dict[str, Settings] = {}
    for _ in range(100 * count):
        settings = {axis.path: axis.draw(rng) for axis in axes}
        drawn.setdefault(trial_id(settings), settings)
        if len(drawn) == count:
            break
    return list(drawn.values())
