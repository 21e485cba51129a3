"""What an evaluation says: predictions joined with true classes, all numbers in evaluation.json, and how it is read.

What is easy to break: every video of the split counts once, those that could not be read too; an accuracy is never
shown without its coverage.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.catalog.table import Catalog
from kinoray.errors import CatalogError, CheckpointMismatch
from kinoray.evaluation.accuracy import Scores, score, wilson_interval
from kinoray.evaluation.calibration_error import Calibration, calibrate
from kinoray.storage.objects import Storage, join

__all__ = [
    "ANSWER_COLUMNS",
    "FILE_NAME",
    "Answers",
    "confused_classes",
    "evaluation_record",
    "join_answers",
    "print_evaluation",
    "true_classes",
    "write_evaluation",
]

FILE_NAME = "evaluation.json"
ANSWER_COLUMNS = ("video_id", "status", "id_topk", "score_topk")
"""Columns of predictions that `join_answers` needs."""

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
    unreadable: NDArray[np.bool_]
    """bool [N]: the video was quarantined."""
    missing: NDArray[np.bool_]
    """bool [N]: there is no row of it at all."""
    num_classes: int

    @property
    def answered(self) -> NDArray[np.bool_]:
        """bool [N]: neither unreadable nor missing."""
        return ~(self.unreadable | self.missing)

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
            unreadable=int(self.unreadable.sum()),
            missing=int(self.missing.sum()),
        )

    @property
    def calibration(self) -> Calibration:
        """Reliability of the first score, over the videos that were answered."""
        return calibrate(self.first_score[self.answered], self.right[self.answered])


def true_classes(catalog: Catalog, labels: Sequence[str]) -> NDArray[np.int64]:
    """The true class of each video as the model numbers its classes, int64 [N]; classes are matched by name.

    Args:
        labels: the model's class names.

    Raises:
        CatalogError: a video has no label.
        CheckpointMismatch: a label that the model does not know.
    """
    label_ids = catalog.table.column("label_id").to_pylist()
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
    unreadable, missing = np.zeros(len(video_ids), bool), np.zeros(len(video_ids), bool)
    for place, video_id in enumerate(video_ids):
        row = row_of.get(video_id)
        if row is None:
            missing[place] = True
        elif status[row] != "labelled":
            unreadable[place] = True
        else:
            topk[place], first_score[place] = ids[row], scores[row][0]
    return Answers(
        video_ids=video_ids,
        truth=truth,
        topk=topk,
        first_score=first_score,
        unreadable=unreadable,
        missing=missing,
        num_classes=num_classes,
    )


def confused_classes(scores: Scores, most: int = _MAX_PAIRS) -> list[tuple[int, int, int]]:
    """The most frequent mistakes as (true class, predicted class, videos), the most frequent first."""
    wrong = scores.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(flat) // scores.num_classes, int(flat) % scores.num_classes) for flat in order]
    return [(true, said, int(wrong[true, said])) for true, said in pairs if wrong[true, said]]


def evaluation_record(answers: Answers, labels: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """What evaluation.json holds: Scores.summary(), per class, confusion, calibration, and what was evaluated.

    Args:
        about: what is said about it besides, under keys of its own.
    """
    scores = answers.scores
    summary = scores.summary()
    per_class = summary.pop("per_class")
    support, right = scores.confusion.sum(axis=1).tolist(), scores.confusion.diagonal().tolist()
    classes = [
        {
            "label": label,
            "videos": videos,
            "top1": per_class[index],
            "top1_interval": list(wilson_interval(right[index], videos)),
            "top5": int(scores.hits_top5[index]) / videos if videos else None,
        }
        for index, (label, videos) in enumerate(zip(labels, support, strict=True))
    ]
    pairs = [
        {"true": labels[true], "predicted": labels[said], "videos": n} for true, said, n in confused_classes(scores)
    ]
    return {
        **summary,
        "calibration": answers.calibration.summary(),
        "labels": list(labels),
        "classes": classes,
        "confusion": scores.confusion.tolist(),
        "confused": pairs,
        **about,
    }


def write_evaluation(storage: Storage, out: str, root: str, record: dict[str, Any]) -> str:
    """Write evaluation.json to `out`, where the newest evaluation is found, and beside its predictions.

    Returns:
        The uri of the first.
    """
    data = json.dumps(record, indent=1).encode()
    uri = join(out, FILE_NAME)
    storage.put(join(root, FILE_NAME), data)
    storage.put(uri, data)
    return uri


def print_evaluation(task: str, answers: Answers, labels: Sequence[str]) -> None:
    """The numbers in a few lines, each after the name of the verb."""
    scores, calibration = answers.scores, answers.calibration
    lines = [
        f"{scores.total} videos = {scores.evaluated} evaluated + {scores.unreadable} unreadable + {scores.missing} "
        f"missing (coverage {_percent(scores.coverage)})"
    ]
    for name, value, interval, of_all in (
        ("top-1", scores.top1, scores.top1_interval, scores.top1_of_all),
        ("top-5", scores.top5, scores.top5_interval, scores.top5_of_all),
    ):
        low, high = interval
        lines.append(
            f"{name} {_percent(value)} (95% interval {low:.1%} .. {high:.1%}); {_percent(of_all)} with unreadable and "
            "missing counted as wrong"
        )
    lines.append(f"mean class accuracy {_percent(scores.mean_class)}")
    lines.append(
        f"calibration error (ECE) {_percent(calibration.error)}, mean score {_percent(calibration.mean_score)}"
    )
    lines += _class_lines(scores, labels)
    if pairs := confused_classes(scores):
        lines.append("most often confused (true -> predicted):")
        lines += [f"  {labels[true]} -> {labels[said]}: {count}" for true, said, count in pairs]
    print("\n".join(f"{task}: {line}" for line in lines))


def _class_lines(scores: Scores, labels: Sequence[str]) -> list[str]:
    support, accuracy = scores.confusion.sum(axis=1), scores.per_class
    shown, lines = list(range(len(labels))), []
    if len(labels) > _MAX_LINES:
        shown = sorted((index for index in shown if support[index]), key=lambda index: accuracy[index])[:_MAX_LINES]
        lines.append(f"the {len(shown)} classes with the lowest accuracy:")
    width = max((len(labels[index]) for index in shown), default=5)
    lines += [f"  {labels[index]:<{width}}  {_percent(accuracy[index]):>6} of {support[index]}" for index in shown]
    return lines


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1%}"
