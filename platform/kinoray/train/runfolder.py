"""A training's run folder: where everything in it lies, what its rows say, and whose it is.

Every file is written whole, by the driver or by rank 0, so the same code serves a folder and s3://. Epochs that are
trained again after a failure replace what the first try wrote.

    run.json           the settings that decide the result, and the catalog's digest; a run resumes only with the same
    config.yaml        all settings, as --config reads them
    environment.json   for each start of the workers: versions, commit, hosts
    status.json        what the driver last said about the run; see kinoray.train.runs
    tracker.json       with --track: the run's id there, and the last epoch that was told
    metrics.jsonl      one EpochRow an epoch
    losses/            one file of JSON lines an epoch, one StepRow a step
    tensorboard/       one event file an epoch
    learning_curves.svg
    quarantine.parquet videos that could not be read
    checkpoints/       see kinoray.network.checkpoint
    ray/               Ray Train's own; holds nothing that a run needs
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kinoray.catalog.rows import QuarantineRow, load_quarantine, save_quarantine
from kinoray.catalog.table import Catalog
from kinoray.config.file import to_yaml
from kinoray.config.shared import digest
from kinoray.errors import ConfigError, ObjectNotFound, StorageError
from kinoray.network.checkpoint import (
    META_FILE,
    CheckpointMeta,
    best_of,
    delete_checkpoint,
    list_checkpoints,
    newest_checkpoint,
)
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_json, parse_record
from kinoray.train.config import TrainConfig

__all__ = ["EpochRow", "RunFolder", "StepRow", "numbers", "run_digest", "run_settings", "stopped_early"]

Row = TypeVar("Row", "EpochRow", "StepRow")
_CHECKPOINT_NAME = re.compile(r"epoch-\d+-step-\d+")
_SHOWN_DIFFERENCES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """What came of an epoch, over all ranks: a line of metrics.jsonl. None is what was not measured."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps so far."""
    samples: int
    """Videos trained on so far, quarantined ones not counted."""
    loss: float | None = None
    """Mean loss in training; of what could be read."""
    top1: float | None = None
    """Share of training videos whose label came first."""
    top5: float | None = None
    """Share whose label was among the first 5; None where there are no more classes than that."""
    quarantined: int
    """Training videos that could not be read."""
    lr: float
    """Learning rate of the last step."""
    val_loss: float | None = None
    """The same of val_split, in epochs that are scored."""
    val_top1: float | None = None
    val_top5: float | None = None
    val_map: float | None = None
    """Mean average precision, where videos may have several classes; top1 is then the share of first answers that
    hold."""
    val_videos: int | None = None
    """Videos that were scored."""
    val_quarantined: int | None = None
    videos_per_s: float
    """Of this start of the workers, while training."""
    decode_wait: float
    """Share of train_s that rank 0 waited for clips, or for their features."""
    train_s: float
    """Seconds of training steps."""
    decode_cpu_s: float
    """CPU seconds of decoding."""
    cached: int | None = None
    """Videos that came from the cache, of frames or features, where there is one."""
    epoch_s: float
    """Seconds in all, scoring included."""
    time_s: float
    """When it ended, in seconds since 1970."""

    def record(self) -> dict[str, float | int]:
        """As JSON: without what was not measured."""
        return _record(self)

    @property
    def score(self) -> float | None:
        """What says which epoch is best."""
        return self.val_top1 if self.val_map is None else self.val_map


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """A training step over all ranks: a line of a file in losses/.

    Equal losses are equal bits: JSON keeps all of a float64.
    """

    epoch: int
    """From 1."""
    step: int
    """From 1, counted through all epochs."""
    videos: int
    """Videos that were trained on."""
    quarantined: int
    """Videos that could not be read."""
    lr: float
    """Learning rate."""
    loss: float | None = None
    """Mean over the videos; None where none could be read."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder or an s3:// prefix that a run writes to."""

    storage: Storage
    uri: str

    @property
    def quarantine_uri(self) -> str:
        """The table of videos that could not be read."""
        return join(self.uri, "quarantine.parquet")

    @property
    def curves_uri(self) -> str:
        """The picture of the learning curves."""
        return join(self.uri, "learning_curves.svg")

    @property
    def ray_uri(self) -> str:
        """Ray Train's own folder."""
        return join(self.uri, "ray")

    def events_uri(self, epoch: int) -> str:
        """An epoch's TensorBoard events.

        One file an epoch, named by it: TensorBoard reads the files of a folder in order of their names, and the same
        epoch trained again overwrites its own.
        """
        return join(self.uri, "tensorboard", f"events.out.tfevents.{epoch:010d}.kinoray")

    def checkpoint_uri(self, epoch: int, step: int) -> str:
        """Where the checkpoint after `epoch` whole epochs and `step` steps goes."""
        return join(self.uri, "checkpoints", f"epoch-{epoch:04d}-step-{step:06d}")

    # Whose it is

    def is_claimed(self) -> bool:
        """Whether a run has begun here."""
        return self.storage.exists(join(self.uri, "run.json"))

    def claim(self, config: TrainConfig, catalog: Catalog) -> None:
        """Make it this run's folder, or check that it is already.

        Raises:
            ConfigError: the folder holds a run with other settings; the message names them.
            StorageError: run.json cannot be read or written.
        """
        uri = join(self.uri, "run.json")
        ours = run_settings(config, catalog)
        text = json.dumps({"digest": digest(ours), "settings": ours}, indent=1, sort_keys=True)
        if self.storage.put_if_absent(uri, text.encode()):
            self.storage.put(join(self.uri, "config.yaml"), to_yaml(config).encode())
            return
        try:
            theirs = dict(parse_json(self.storage.read(uri))["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{uri} is damaged ({error}); give another --out") from error
        differences = _differences(theirs, ours)
        if differences:
            shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
            left = len(differences) - _SHOWN_DIFFERENCES
            more = f" and {left} more" if left > 0 else ""
            raise ConfigError(
                f"out {self.uri} holds a run with other settings: {shown}{more}; "
                "resume it with the same settings, or give another --out"
            )

    def add_start(self, start: Mapping[str, Any]) -> None:
        """Append a start of the workers to environment.json."""
        uri = join(self.uri, "environment.json")
        try:
            starts = list(parse_json(self.storage.read(uri))["starts"])
        except ObjectNotFound:
            starts = []
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{uri} is damaged ({error}); delete it, and the same command goes on") from error
        self.storage.put(uri, (json.dumps({"starts": [*starts, start]}, indent=1) + "\n").encode())

    # Rows

    def epochs(self) -> list[EpochRow]:
        """The epochs of metrics.jsonl, in order; none if there is no such file."""
        uri = join(self.uri, "metrics.jsonl")
        try:
            data = self.storage.read(uri)
        except ObjectNotFound:
            return []
        return _parse(data, uri, lambda record: EpochRow(**numbers(record)))

    def write_epoch(self, row: EpochRow) -> None:
        """Append an epoch. Rows of this and later epochs, from a try that failed after them, are dropped."""
        earlier = [known for known in self.epochs() if known.epoch < row.epoch]
        self.storage.put(join(self.uri, "metrics.jsonl"), _lines([*earlier, row]))

    def steps(self) -> list[StepRow]:
        """The training steps of the run, in order."""
        found: list[StepRow] = []
        for uri in sorted(info.uri for info in self.storage.list(join(self.uri, "losses") + "/")):
            data = self.storage.read(uri)
            found += _parse(data, uri, lambda record: StepRow(**numbers(record)))
        return found

    def write_steps(self, epoch: int, rows: Sequence[StepRow]) -> None:
        """Write the steps of an epoch so far; they replace those of a try that failed."""
        self.storage.put(join(self.uri, "losses", f"epoch-{epoch:06d}.jsonl"), _lines(rows))

    def quarantine(self, refusals: Sequence[QuarantineRow]) -> None:
        """Add videos that could not be read to the quarantine table, each once (the first reason stays)."""
        if not refusals:
            return
        uri = self.quarantine_uri
        known = load_quarantine(self.storage, uri) if self.storage.exists(uri) else []
        seen = {refusal.video_id for refusal in known}
        first = {refusal.video_id: refusal for refusal in reversed(refusals) if refusal.video_id not in seen}
        if first:
            save_quarantine(self.storage, uri, [*known, *(first[video_id] for video_id in sorted(first))])

    # Checkpoints

    def checkpoints(self) -> list[tuple[str, CheckpointMeta]]:
        """Whole checkpoints, oldest first."""
        return list_checkpoints(self.storage, self.uri)

    def newest(self, warn: Callable[[str], object]) -> tuple[str, CheckpointMeta] | None:
        """Where the run goes on: its newest sound checkpoint. `warn` is told of each broken one that is left out.

        Raises:
            CheckpointError: some are there, but none is sound.
        """
        return newest_checkpoint(self.storage, self.uri, warn=warn)

    def prune_checkpoints(self, keep: int, *, written: tuple[int, int] | None = None) -> None:
        """Delete all but the newest, the newest `keep` of those after epochs, and the best one.

        With them goes what writers that were killed have left: files in a folder of ours without checkpoint.json. So
        this must not run while a checkpoint is being written. Those that cannot be read stay: what they hold may be
        wanted.

        Args:
            written: (epoch, step) of the newest that the run has. Later ones are those that it could not go on from:
                they stay until they are written anew, and take no place from the others.
        """
        last = written or (sys.maxsize, sys.maxsize)
        found = [item for item in self.checkpoints() if (item[1].epoch, item[1].step) <= last]
        if not found:
            return
        after_epochs = [item for item in found if not item[1].epoch_steps]
        kept = {found[-1][0], best_of(found)[0]}
        kept.update(uri for uri, _ in after_epochs[-keep:])
        spare = {uri for uri, _ in found if uri not in kept}
        for uri in sorted(spare | self._unfinished_checkpoints()):
            delete_checkpoint(self.storage, uri)

    def _unfinished_checkpoints(self) -> set[str]:
        """Folders of ours without checkpoint.json."""
        there = {info.uri for info in self.storage.list(join(self.uri, "checkpoints") + "/")}
        folders = {uri.rpartition("/")[0] for uri in there}
        ours = {uri for uri in folders if _CHECKPOINT_NAME.fullmatch(uri.rpartition("/")[2])}
        return {uri for uri in ours if join(uri, META_FILE) not in there}


def stopped_early(epochs: Sequence[EpochRow], config: TrainConfig) -> bool:
    """Whether the last config.patience scorings in these epochs brought no higher val_top1 (or val_map)."""
    scores = [row.score for row in epochs if row.score is not None]
    if not config.patience or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= config.patience


def run_settings(config: TrainConfig, catalog: Catalog) -> dict[str, Any]:
    """The settings that a resumed run must share, flat: `optim.lr` and so on.

    Resources, storage, limits and what is kept may differ. optim.epochs may not: the learning rate's course depends
    on it, so more epochs are another training and need another run folder.
    """
    tree = asdict(config)
    flat = {name: tree[name] for name in ("split", "val_split", "init_from")}
    for name in ("model", "clip", "augment", "optim"):
        flat.update(_flatten(tree[name], f"{name}."))
    if not catalog.is_multilabel:
        del flat["optim.multilabel_loss"]  # it decides nothing there
    flat["catalog.digest"] = catalog.digest
    settings: dict[str, Any] = parse_json(json.dumps(flat))  # tuples become lists, as they come back from run.json
    return settings


def run_digest(config: TrainConfig, catalog: Catalog) -> str:
    """16 hex digits of run_settings."""
    return digest(run_settings(config, catalog))


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    def shown(settings: Mapping[str, Any], name: str) -> str:
        return json.dumps(settings[name]) if name in settings else "not set"

    return [
        f"{name} is {shown(theirs, name)} there, {shown(ours, name)} here"
        for name in sorted(set(theirs) | set(ours))
        if name not in theirs or name not in ours or theirs[name] != ours[name]
    ]


def _record(row: EpochRow | StepRow) -> dict[str, float | int]:
    return {name: value for name, value in asdict(row).items() if value is not None}


def _lines(rows: Iterable[EpochRow | StepRow]) -> bytes:
    return "".join(json.dumps(_record(row)) + "\n" for row in rows).encode()


def _parse(data: bytes, uri: str, make: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """Raises ChecksumMismatch: a line is not what was written."""
    return [
        parse_record(line, f"{uri} line {number}", make) for number, line in enumerate(data.splitlines(), 1) if line
    ]


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A row of ours, all of whose values are numbers. Raises TypeError where one is not."""
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is no number")
    return record
