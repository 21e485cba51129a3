"""What the demo makes and runs: its files, the settings of its steps, and each step as a command line."""

import dataclasses
import json
import shlex
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from kinoray.config.shared import StorageConfig
from kinoray.demo.config import DemoConfig
from kinoray.demo.videos import BROKEN_KINDS, class_names, make_broken, make_demo_set
from kinoray.evaluation.config import EvaluateConfig
from kinoray.label.config import LabelConfig
from kinoray.library.config import ReportConfig
from kinoray.pack.config import PackConfig
from kinoray.storage.objects import join
from kinoray.train.config import PRESETS, TrainConfig

__all__ = ["Recipe", "command_line", "make_recipe", "make_videos"]

VAL_FRACTION = 0.25
SHARD_MB = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of every step, in their order."""

    pack: PackConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    label: LabelConfig
    report: ReportConfig


def make_recipe(config: DemoConfig, source: str, base: str, storage: StorageConfig) -> Recipe:
    """The steps over the videos in `source`; all they make goes below `base`, but the page to `config.out`."""
    packed, run, labels = join(base, "set"), join(base, "run"), join(base, "labels")
    preset = PRESETS["demo"]()
    optim = dataclasses.replace(preset.optim, epochs=config.epochs)
    return Recipe(
        pack=PackConfig(source=source, out=packed, shard_mb=SHARD_MB, val_fraction=VAL_FRACTION, storage=storage),
        train=dataclasses.replace(preset, catalog=packed, out=run, optim=optim, storage=storage),
        evaluate=EvaluateConfig(catalog=packed, checkpoint=run, out=join(run, "eval"), storage=storage),
        label=LabelConfig(source=source, checkpoint=run, out=labels, storage=storage),
        report=ReportConfig(
            predictions=labels,
            out=str(Path(config.out) / "report"),
            catalog=packed,
            title="kinoray demo",
            storage=storage,
        ),
    )


def make_videos(folder: Path, videos_per_class: int, seed: int) -> int:
    """Make the set and one broken file of each kind in `folder`, unless it is there; returns the number of files.

    The folder appears only when it is complete.
    """
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_demo_set(unfinished, videos_per_class, seed)
        for kind, name in zip(BROKEN_KINDS, class_names(), strict=True):
            good = min((unfinished / name).iterdir()).read_bytes()
            (unfinished / name / f"broken-{kind}.mp4").write_bytes(make_broken(kind, good))
        unfinished.rename(folder)
    return sum(1 for _ in folder.glob("*/*.mp4"))


def command_line(verb: str, config: Any) -> str:
    """The `kinoray` command that gives this config: what differs from the defaults, quoted for a shell."""
    return shlex.join(["kinoray", verb, *_arguments(config, "")])


def _arguments(config: Any, prefix: str) -> list[str]:
    hints = typing.get_type_hints(type(config), include_extras=True)
    first: list[str] = []
    rest: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"{prefix}{field.name}".replace("_", "-")
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            first.append(str(value))
        elif dataclasses.is_dataclass(value):
            rest += _arguments(value, f"{prefix}{field.name}.")
        elif value != _default(field):
            negated = f"{prefix}no-{field.name}".replace("_", "-")  # as tyro spells it: --clip.view.no-train-flip
            rest += [f"--{negated}"] if value is False else [f"--{flag}", *_words(value)]
    return first + rest


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _words(value: Any) -> list[str]:
    """A value as words of a command line."""
    if value is True:
        return []
    if isinstance(value, tuple):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
    return [str(value)]
