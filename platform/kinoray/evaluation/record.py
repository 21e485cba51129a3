"""What an evaluation says: predictions joined with true classes, and evaluation.json, written and read here only.

What is easy to break: every video of the split counts once, those that could not be read too; an accuracy is never
shown without its coverage.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.catalog.table import Catalog, catalog_of_source, load_catalog
from kinoray.config.file import config_from_mapping
from kinoray.console import many, table, visible
from kinoray.errors import CatalogError, CheckpointMismatch, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.evaluation.metrics import (
    Calibration,
    CalibrationSummary,
    Confused,
    Scores,
    ScoreSummary,
    calibration_of,
    class_counts,
    confused_classes,
    score,
    wilson_interval,
)
from kinoray.label.ledger import Ledger
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.records import is_name, parse_json

__all__ = [
    "ANSWER_COLUMNS",
    "MULTILABEL",
    "Answers",
    "ClassRow",
    "Evaluation",
    "EvaluationRecord",
    "Origin",
    "evaluation_record",
    "join_answers",
    "print_evaluation",
    "read_evaluation",
    "true_classes",
    "write_evaluation",
]

ANSWER_COLUMNS = ("video_id", "status", "id_topk", "score_topk")
"""Columns of predictions that `join_answers` needs."""

MULTILABEL = "multilabel"
"""`kind` of an evaluation of several classes a video (kinoray.evaluation.multilabel)."""

_FILE_NAME = "evaluation.json"
_TOP = 5
_MAX_LINES = 40  # classes listed on the terminal; evaluation.json has all
_MAX_PAIRS = 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """What a model says about each video of a catalog, in the catalog's order."""

    video_ids: list[str]
    truth: NDArray[np.int64]
    """int64 [N]: true classes, as the model numbers them."""
    topk: NDArray[np.int64]
    """int64 [N, K]: predicted classes, best first; -1 where there is no answer."""
    first_score: NDArray[np.float32]
    """float32 [N]: score of the first class; NaN where there is no answer."""
    quarantined: NDArray[np.bool_]
    """bool [N]: the video was quarantined."""
    missing: NDArray[np.bool_]
    """bool [N]: there is no row of it at all."""
    num_classes: int

    @property
    def answered(self) -> NDArray[np.bool_]:
        """bool [N]: neither quarantined nor missing."""
        return ~(self.quarantined | self.missing)

    @property
    def right(self) -> NDArray[np.bool_]:
        """bool [N]: the first class is the true one; False where there is no answer."""
        return np.equal(self.topk[:, 0], self.truth, dtype=bool)

    @property
    def scores(self) -> Scores:
        """Counts over all videos."""
        return score(
            self.truth[self.answered],
            self.topk[self.answered],
            self.num_classes,
            quarantined=int(self.quarantined.sum()),
            missing=int(self.missing.sum()),
        )

    @property
    def calibration(self) -> Calibration:
        """Reliability of the first score, over the videos that were answered."""
        return calibration_of(self.first_score[self.answered], self.right[self.answered])


def true_classes(catalog: Catalog, labels: Sequence[str]) -> NDArray[np.int64]:
    """The true class of each video as the model numbers its classes, int64 [N]; classes are matched by name.

    Args:
        labels: the model's class names.

    Raises:
        CatalogError: a video has no label.
        CheckpointMismatch: a label that the model does not know.
    """
    label_ids = catalog.table.column("label_id").to_pylist()
    if catalog.is_multilabel:
        raise CatalogError(
            "the videos have label lists, and this checkpoint gives each one class; train on the lists, or name a "
            "catalog of one class a video"
        )
    if None in label_ids:
        first = catalog.table.column("video_id")[label_ids.index(None)].as_py()
        raise CatalogError(
            f"{label_ids.count(None)} of {len(label_ids)} videos have no label, {first!r} is the first; evaluate needs "
            "a labelled catalog (kinoray pack makes one), to label videos use kinoray label"
        )
    number = {label: index for index, label in enumerate(labels)}
    used = [catalog.labels[label_id] for label_id in sorted(set(label_ids))]
    if unknown := [label for label in used if label not in number]:
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointMismatch(
            f"the checkpoint has {len(labels)} classes, the catalog {len(catalog.labels)}; the checkpoint does "
            f"not know {names}; take a checkpoint that was trained on this catalog's classes"
        )
    return np.array([number[catalog.labels[label_id]] for label_id in label_ids], np.int64)


def join_answers(catalog: Catalog, truth: NDArray[np.int64], predictions: pa.Table, num_classes: int) -> Answers:
    """Join predictions with true classes by video_id.

    Args:
        truth: `true_classes` of the catalog.
        predictions: ANSWER_COLUMNS; a video of the catalog that is not there counts as missing.
        num_classes: classes of the model.
    """
    video_ids = catalog.table.column("video_id").to_pylist()
    row_of = {video_id: row for row, video_id in enumerate(predictions.column("video_id").to_pylist())}
    status, ids, scores = (predictions.column(name).to_pylist() for name in ANSWER_COLUMNS[1:])
    top = max((len(found) for found in ids if found), default=min(_TOP, num_classes))
    topk = np.full((len(video_ids), top), -1, np.int64)
    first_score = np.full(len(video_ids), np.nan, np.float32)
    quarantined = np.zeros(len(video_ids), bool)
    missing = np.zeros(len(video_ids), bool)
    for place, video_id in enumerate(video_ids):
        row = row_of.get(video_id)
        if row is None:
            missing[place] = True
        elif status[row] != "labelled":
            quarantined[place] = True
        else:
            topk[place, : len(ids[row])] = ids[row]
            first_score[place] = scores[row][0] if scores[row] else 0.0
    return Answers(
        video_ids=video_ids,
        truth=truth,
        topk=topk,
        first_score=first_score,
        quarantined=quarantined,
        missing=missing,
        num_classes=num_classes,
    )


# evaluation.json


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """How right the answers are for the videos of one class; None where it has none."""

    label: str
    videos: int
    top1: float | None
    top1_interval: tuple[float, float]
    top5: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What was evaluated with what: a checkpoint with its settings, or the members of an ensemble."""

    members: tuple[str, ...] | None = None
    """Evaluations that were averaged."""
    weights: tuple[float, ...] | None = None
    """One for each member."""
    catalog: str
    split: str
    catalog_digest: str
    checkpoint: str | None = None
    protocol: str | None = None
    views: int = 1
    """Views of each video, over all members."""
    view_average: str | None = None
    num_segments: int | None = None
    frames_per_segment: int | None = None
    inference: dict[str, Any] | None = None
    """InferenceConfig."""
    model_digest: str
    config_digest: str
    predictions: str
    """The labelling that it was counted from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """What evaluation.json holds; there the fields of `scores` and `origin` lie beside the others."""

    scores: ScoreSummary
    calibration: CalibrationSummary
    labels: tuple[str, ...]
    classes: tuple[ClassRow, ...]
    """In the order of the labels."""
    confusion: tuple[tuple[int, ...], ...]
    """Videos by true class (row) and first predicted class (column)."""
    confused: tuple[Confused, ...]
    """The most frequent mistakes."""
    origin: Origin

    def to_json(self) -> bytes:
        """The file's bytes; what does not apply to its origin is left out."""
        tree = asdict(self)
        scores = tree.pop("scores")
        origin = tree.pop("origin")
        known = {name: value for name, value in origin.items() if value is not None}
        return json.dumps({**scores, **tree, **known}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> "EvaluationRecord":
        """What `to_json` made.

        Args:
            uri: where it was, for messages.

        Raises:
            ConfigError: it is something else, or of another version.
        """
        try:
            flat = parse_json(data)
        except ValueError as error:
            raise ConfigError(f"{uri} is not what evaluate wrote: {error}") from error
        if not isinstance(flat, dict):
            raise ConfigError(f"{uri} is not what evaluate wrote: it holds no object")
        if flat.get("kind") == MULTILABEL:
            raise ConfigError(
                f"{uri} is of a network that gives videos several classes; this takes evaluations of one class a video"
            )
        scores = {name: flat[name] for name in _names(ScoreSummary) if name in flat}
        origin = {name: flat[name] for name in _names(Origin) if name in flat}
        tree = {name: flat[name] for name in _names(cls) if name in flat}
        missing = sorted(_REQUIRED - set(flat))
        if missing:
            raise ConfigError(f"{uri} lacks {', '.join(missing)}: it is not what this version wrote; evaluate again")
        try:
            return config_from_mapping(cls, {**tree, "scores": scores, "origin": origin}, complete=True)
        except ConfigError as error:
            raise ConfigError(f"{uri} is not what evaluate wrote: {error}; evaluate again") from error


def _names(record: type[Any]) -> list[str]:
    return [field.name for field in fields(record)]


_REQUIRED = {
    *_names(ScoreSummary),
    *(set(_names(EvaluationRecord)) - {"scores", "origin"}),
    *("catalog", "split", "catalog_digest", "model_digest", "config_digest", "predictions"),
}


def evaluation_record(answers: Answers, labels: Sequence[str], origin: Origin) -> EvaluationRecord:
    """All numbers of an evaluation."""
    scores = answers.scores
    classes = [
        ClassRow(
            label=counts.label,
            videos=counts.videos,
            top1=counts.recall,
            top1_interval=wilson_interval(counts.right, counts.videos),
            top5=counts.recall_top5,
        )
        for counts in class_counts(scores.confusion, labels, scores.hits_top5)
    ]
    return EvaluationRecord(
        scores=scores.summary(),
        calibration=answers.calibration.summary(),
        labels=tuple(labels),
        classes=tuple(classes),
        confusion=tuple(tuple(row) for row in scores.confusion.tolist()),
        confused=tuple(confused_classes(scores.confusion, labels, _MAX_PAIRS)),
        origin=origin,
    )


class _Record(Protocol):
    """What is known of a file, whatever it counts."""

    @property
    def origin(self) -> Origin: ...

    def to_json(self) -> bytes: ...


def write_evaluation(storage: Storage, out: str, record: _Record) -> str:
    """Write evaluation.json to `out`, where the newest evaluation is found, and beside its predictions.

    Returns:
        The uri of the first.
    """
    data = record.to_json()
    uri = join(out, _FILE_NAME)
    storage.put(join(record.origin.predictions, _FILE_NAME), data)
    storage.put(uri, data)
    return uri


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """One evaluation read back: what evaluation.json says, and what it was made of."""

    uri: str
    """As it was named."""
    record: EvaluationRecord
    catalog: Catalog
    """The videos of the split."""
    catalog_found_in: str
    """The folder of the catalog; empty where the user named it, who then knows what it refers to."""
    answers: Answers
    predictions: pa.Table
    """The rows: ANSWER_COLUMNS and what was asked for besides."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The model's classes."""
        return self.record.labels


def read_evaluation(storage: Storage, uri: str, *, catalog: str = "", columns: tuple[str, ...] = ()) -> Evaluation:
    """What `evaluate` wrote.

    The record may be a stranger's: its predictions lie beside it, wherever it says that they are, and of the catalog
    it can only say where a pack or a .parquet is, on this machine or in its own bucket.

    Args:
        uri: its --out, the folder of one of its labellings, or an evaluation.json.
        catalog: where the catalog is, if it was moved, or is none that a record may name.
        columns: of the predictions, besides ANSWER_COLUMNS.

    Raises:
        ObjectNotFound: nothing was evaluated there, or the catalog is gone.
        ConfigError: the file is no evaluation, or of an older kinoray.
        CatalogError: the catalog is not the one that was evaluated, or must be named.
        IncompleteOutput: the predictions are gone or unfinished.
    """
    uri = absolute(uri).rstrip("/")
    file = uri if uri.endswith(".json") else join(uri, _FILE_NAME)
    try:
        data = storage.read(file)
    except ObjectNotFound:
        raise ObjectNotFound(f"there is no {file}; expected the --out of `kinoray evaluate`") from None
    record = EvaluationRecord.from_json(data, file)
    beside = file.rpartition("/")[0]
    source = absolute(catalog) if catalog else _recorded_catalog(storage, uri, beside, record.origin.catalog)
    videos = _catalog(storage, uri, record.origin, source, is_named=bool(catalog))
    name = record.origin.predictions.rpartition("/")[2]
    roots = [beside, *([join(beside, name)] if is_name(name) else [])]
    root = next((root for root in roots if storage.exists(join(root, "job.json"))), roots[-1])
    ledger = Ledger(storage, root)
    plans = [plan for plan in ledger.plans() if plan.catalog_digest == videos.digest]
    if not plans:
        raise IncompleteOutput(f"{uri}: the predictions in {root} are gone; evaluate again")
    predictions = pa.concat_tables(ledger.read_units(plans[0].units, [*ANSWER_COLUMNS, *columns]))
    return Evaluation(
        uri=uri,
        record=record,
        catalog=videos,
        catalog_found_in="" if catalog else source.rpartition("/")[0] if source.endswith(".parquet") else source,
        answers=join_answers(videos, true_classes(videos, record.labels), predictions, len(record.labels)),
        predictions=predictions,
    )


def _recorded_catalog(storage: Storage, uri: str, beside: str, said: str) -> str:
    """What the record in folder `beside` may mean by `said`: what lies beside it by that name, or that itself."""
    said = absolute(said).rstrip("/")
    name = said.rpartition("/")[2]
    near = join(beside, name)
    if is_name(name) and storage.exists(near if near.endswith(".parquet") else join(near, "catalog.parquet")):
        return near
    if is_s3(said) and not (is_s3(beside) and said.split("/")[2] == beside.split("/")[2]):
        raise CatalogError(
            f"{uri} says that its catalog is {said}, and nothing else says so; if you trust it, name it: "
            f"--catalog {said}"
        )
    return said


def _catalog(storage: Storage, uri: str, origin: Origin, source: str, *, is_named: bool) -> Catalog:
    try:
        videos = (catalog_of_source if is_named else load_catalog)(storage, source).select(origin.split)
    except ObjectNotFound as error:
        raise ObjectNotFound(
            f"{uri}: its catalog is gone ({error}), or is a list or folder of videos; name where it is (--catalog)"
        ) from error
    if videos.digest != origin.catalog_digest:
        raise CatalogError(
            f"{uri} was made with another catalog ({origin.catalog_digest}) than {source} holds now "
            f"({videos.digest}, split {origin.split!r}); evaluate again, or name that catalog with --catalog"
        )
    return videos


# For people


def print_evaluation(task: str, record: EvaluationRecord) -> None:
    """The numbers in a few lines, each after the name of the verb."""
    scores = record.scores
    calibration = record.calibration
    has_top5 = len(record.labels) > 5  # of five classes it is 100%, whatever the network says
    lines = [
        f"{many(scores.total, 'video')} = {scores.evaluated:,} evaluated + {scores.quarantined:,} quarantined + "
        f"{scores.missing:,} missing (coverage {_percent(scores.coverage)})",
        _accuracy_line("top-1", scores.top1, scores.top1_interval, scores.top1_of_all),
        *([_accuracy_line("top-5", scores.top5, scores.top5_interval, scores.top5_of_all)] if has_top5 else []),
        f"mean class accuracy {_percent(scores.mean_class)}",
        f"calibration error (ECE) {_percent(calibration.ece)}, mean score {_percent(calibration.mean_score)}",
        *_class_lines(record.classes),
    ]
    if record.confused:
        lines.append("most often confused (true -> predicted):")
        lines += [f"  {item.true} -> {item.predicted}: {item.videos:,}" for item in record.confused]
    print("\n".join(f"{task}: {visible(line)}" for line in lines))


def _accuracy_line(name: str, value: float | None, interval: tuple[float, float], of_all: float | None) -> str:
    low, high = interval
    return (
        f"{name} {_percent(value)} (95% interval {low:.1%} .. {high:.1%}); {_percent(of_all)} with quarantined and "
        "missing counted as wrong"
    )


def _class_lines(classes: Sequence[ClassRow]) -> list[str]:
    lines = []
    shown = list(classes)
    if len(classes) > _MAX_LINES:
        known = [row for row in classes if row.top1 is not None]
        shown = sorted(known, key=lambda row: row.top1 or 0.0)[:_MAX_LINES]
        lines.append(f"the {len(shown)} classes with the lowest accuracy:")
    cells = [(row.label, _percent(row.top1), f"of {row.videos:,}") for row in shown]
    return lines + table(cells, right=(1,), indent="  ")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
