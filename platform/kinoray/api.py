"""What a Python program calls: load, label, read and train (docs/python.md). `import kinoray` shows these names.

Nothing here prints. What a command would print goes to the logger `kinoray`, progress as INFO and warnings as WARNING;
errors are those of kinoray.errors. What is easy to break: the jobs print from many places and from Ray's threads, so
their streams are caught, and what a handler prints of a record must not become another record.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar, cast

import pyarrow as pa

from kinoray.config.file import config_from_mapping
from kinoray.errors import ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.predict import Model, Prediction
from kinoray.network.resolve import is_whole
from kinoray.storage.objects import Storage, absolute
from kinoray.train.config import TrainConfig, finetune

__all__ = ["Labelled", "Model", "Prediction", "Trained", "label", "load", "read", "train"]

_LOG = logging.getLogger("kinoray")
_PathLike = str | os.PathLike[str]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A labelling that is complete: labelled + quarantined + skipped = inputs."""

    folder: str
    """Where its table is, below `out`; `kinoray.read` takes either."""
    inputs: int
    labelled: int
    quarantined: int
    skipped: int
    damaged: int
    """Labelled videos of which some frames would not decode."""
    reasons: Mapping[str, int]
    """Quarantined videos by error class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came of a training."""

    run: str
    """The run folder."""
    checkpoint: str
    """Its best checkpoint."""
    best_epoch: int
    """After which it was written."""
    epochs: int
    """That were trained."""
    loss: float | None
    """Mean training loss of the last one."""
    val_top1: float | None
    """Of the best epoch on the validation split; None where there is none."""
    val_top5: float | None
    val_map: float | None
    """Its mean average precision, where videos may have several classes."""
    quarantined: int
    """Training videos that could not be read, in the last epoch."""


def load(source: _PathLike, **settings: Any) -> Model:
    """A network that answers in this process: a checkpoint, or a run folder (its best checkpoint).

    Args:
        settings: of `kinoray label`, named as in a config file: `top_k=3`, `**{"decode.backend": "decord"}`.

    Raises:
        CheckpointError: there is no sound checkpoint.
        ConfigError: a setting is wrong, or the checkpoint names a network that is not allowed.
    """
    _refuse(settings, "out", "plan", "split")
    named = {"source": "", "checkpoint": os.fspath(source)}
    return Model(_config(LabelConfig, settings, named))


def label(source: _PathLike, model: Model | _PathLike, *, out: _PathLike, **settings: Any) -> Labelled:
    """Label every video of a source exactly once, with Ray; the same call again does what is missing.

    Args:
        source: a catalog, a list, a folder or s3:// prefix of videos, or one video.
        model: what `load` gave, with its settings, or what it takes.
        out: folder or s3:// prefix for the table.
        settings: as for `load`; `**{"resources.num_workers": 8}`, `split="val"`.

    Raises:
        TooManyBad: more than max_bad_fraction were quarantined; the table is complete all the same.
        KinorayError: the source, the network, the store or the cluster cannot be used.
    """
    _refuse(settings, "plan")
    place = os.fspath(out)
    if not place:
        raise ConfigError("out must be a folder or an s3:// prefix for the table, got ''")
    named: dict[str, Any] = {"source": os.fspath(source), "out": place}
    if isinstance(model, Model):
        named |= {"checkpoint": model.checkpoint, "classes": "", "prompts": ()}  # the checkpoint has the classes in it
        config = _config(LabelConfig, settings, named, model.config)
    else:
        config = _config(LabelConfig, settings, {"checkpoint": os.fspath(model), **named})
    from kinoray.label.verb import label as run

    with _as_a_job():
        totals = run(config)
    counts = {item.name: totals[item.name] for item in dataclasses.fields(Labelled) if item.name != "folder"}
    return Labelled(folder=totals["root"], **counts)


def read(out: _PathLike, *, windows: bool = False) -> pa.Table:
    """The predictions in a labelling's `out`, one row for every input; `.to_pandas()` makes a data frame of them.

    Args:
        windows: one row for every window instead, of a labelling that cut long videos (window_s).

    Raises:
        ObjectNotFound: nothing was labelled there, or not in windows.
        ConfigError: several models or settings have their tables there; name the folder of one.
    """
    from kinoray.label.ledger import read_predictions, read_windows

    return (read_windows if windows else read_predictions)(Storage(), absolute(os.fspath(out)))


def train(source: _PathLike | TrainConfig, *, out: _PathLike = "", **settings: Any) -> Trained:
    """Train on a packed set, with Ray; the same call again goes on with the run in `out`, or finds it finished.

    Args:
        source: a pack's folder or its catalog.parquet, or all settings in one TrainConfig.
        out: run folder, or s3:// prefix.
        settings: of `kinoray train`, named as in a config file: `**{"optim.epochs": 20, "model.factory": "tsm"}`.

    Raises:
        KinorayError: as `kinoray train` says.
    """
    if isinstance(source, TrainConfig):
        if out or settings:
            given = ", ".join([*(["out"] if out else []), *settings])
            raise ConfigError(f"a TrainConfig has all settings in it, got {given} as well; use dataclasses.replace")
        config = source
    else:
        if not os.fspath(out):
            raise ConfigError("out must be a run folder or an s3:// prefix, got ''")
        named = {"catalog": os.fspath(source), "out": os.fspath(out)}
        recipe = finetune() if is_whole(os.fspath(settings.get("init_from", ""))) else None
        config = _config(TrainConfig, settings, named, recipe)
    from kinoray.train.verb import train as run  # with all of Ray Train

    with _as_a_job():
        totals = run(config)
    same = ("run", "best_epoch", "epochs", "loss", "val_top1", "val_top5", "val_map", "quarantined")
    return Trained(checkpoint=totals["best"], **{name: totals[name] for name in same})


# Settings by name


def _refuse(settings: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in settings:
            raise ConfigError(f"{name} is no setting here")


def _config(cls: type[_T], settings: Mapping[str, Any], named: Mapping[str, Any], start: Any = None) -> _T:
    """The config tree with these settings, upon those of `start`. Raises ConfigError naming the field."""
    content: dict[str, Any] = {} if start is None else _plain(dataclasses.asdict(start))
    for name, value in {**settings, **named}.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name}: {parent} has no parts, it is set to {inner!r}")
            place = inner
        both_are_parts = isinstance(value, Mapping) and isinstance(place.get(last), dict)
        place[last] = {**place[last], **_plain(value)} if both_are_parts else _plain(value)
    return config_from_mapping(cls, content, complete=True)


def _plain(value: Any) -> Any:
    """As a YAML file has it."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# A job inside somebody's program


@contextlib.contextmanager
def _as_a_job() -> Iterator[None]:
    """What a job prints becomes log records, and a Ray that it starts ends with it; one that ran before stays."""
    from kinoray.cluster.connect import own_session

    streams = _LogLines(logging.INFO, sys.stdout), _LogLines(logging.WARNING, sys.stderr)
    stdout, stderr = (cast(TextIO, stream) for stream in streams)
    with own_session(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            yield
        finally:
            for stream in streams:
                stream.end()


class _Emitting(threading.local):
    """Whether this thread is handing a record to its handlers."""

    now = False


_emitting = _Emitting()


class _LogLines:
    """A text stream whose lines become log records; everything but writing is the real stream's."""

    def __init__(self, level: int, stream: TextIO) -> None:
        self._level, self._stream = level, stream
        self._rest = ""

    def write(self, text: str) -> int:
        """Log the lines that are whole now."""
        if _emitting.now:  # a handler that prints
            return self._stream.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        _emitting.now = True
        try:
            for line in lines:
                if line.strip():
                    _LOG.log(self._level, "%s", line.rstrip())
        finally:
            _emitting.now = False
        return len(text)

    def end(self) -> None:
        """Log what is left."""
        if self._rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
