"""What a report says in numbers: counts, certainty, accuracy with its interval, classes, confusion.

Everything covers all rows of the predictions, not only the videos that the site lists. Accuracy is never counted over
videos that the model was trained on where the catalog names another split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import Catalog
from kinoray.errors import CatalogError
from kinoray.evaluation.metrics import Calibration, calibration_of, wilson_interval

__all__ = ["Accuracy", "ClassRow", "Confusion", "Numbers", "count", "join_truth"]

TRAIN_SPLIT = "train"
NUM_BINS = 20


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers among the labelled videos of one split (None: all), with a 95% Wilson interval."""

    split: str | None
    num_right: int
    num_labelled: int
    num_unreadable: int
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """Share of right answers among the videos that could be read."""
        return self.num_right / self.num_labelled

    @property
    def value_all(self) -> float:
        """The same with unreadable videos counted as wrong."""
        return self.num_right / (self.num_labelled + self.num_unreadable)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRow:
    """One class: what the model called so, and how right it was (0 of 0 without a catalog)."""

    name: str
    num_predicted: int
    """All videos that were called so."""
    mean_score: float | None
    """Their mean first score; None of none."""
    num_called: int
    """Those of them that the accuracy counts."""
    num_true: int
    """Videos of this true class that the accuracy counts."""
    num_right: int

    @property
    def precision(self) -> float | None:
        """Share of right answers among those that were called so; None of none."""
        return self.num_right / self.num_called if self.num_called else None

    @property
    def recall(self) -> float | None:
        """Share of right answers among those that are so; None of none."""
        return self.num_right / self.num_true if self.num_true else None


@dataclass(frozen=True, slots=True)
class Confusion:
    """counts[i, j]: videos of true class names[i] that were called names[j]; int64 [C, C]."""

    names: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Everything that the site says in numbers."""

    num_videos: int
    num_labelled: int
    num_quarantined: int
    num_skipped: int
    num_abstained: int
    mean_margin: float | None
    histogram: np.ndarray
    """int64 [3, NUM_BINS]: top-1 scores in 0 .. 1 of right, wrong and unknown answers."""
    margin_histogram: np.ndarray
    """int64 [3, NUM_BINS]: the same of margins."""
    classes: tuple[ClassRow, ...]
    accuracy: Accuracy | None
    splits: tuple[Accuracy, ...]
    confusion: Confusion | None
    calibration: Calibration | None
    """Over the videos that the accuracy counts."""


def join_truth(table: pa.Table, catalog: Catalog | None) -> pa.Table:
    """Add `top1` and `score` (the first answer), `true_label`, `split` and `right` (null where unknown) to predictions.

    Raises:
        CatalogError: the catalog has no labels, or none for any of these videos.
    """
    table = table.append_column("top1", _first(table["label_topk"]))
    table = table.append_column("score", _first(table["score_topk"]))
    truth, split = pa.nulls(len(table), pa.string()), pa.nulls(len(table), pa.string())
    if catalog is not None:
        place = pc.index_in(table["video_id"], value_set=catalog.table["video_id"].combine_chunks())
        truth = pc.take(catalog.table["label"].combine_chunks(), place)
        split = pc.take(catalog.table["split"].combine_chunks(), place)
        if pc.count(catalog.table["label"]).as_py() == 0:
            raise CatalogError("the catalog has no labels to compare with; leave --catalog out, or name a labelled one")
        if pc.count(truth).as_py() == 0:
            raise CatalogError(
                f"none of the {len(table)} videos in the predictions has a label in the catalog of {len(catalog)}; "
                f"ids look like {table['video_id'][0]} and {catalog.table['video_id'][0]}: is it the right catalog?"
            )
    table = table.append_column("true_label", truth).append_column("split", split)
    return table.append_column("right", pc.equal(table["top1"], table["true_label"]))


def _first(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """First item of each list; null where the list is null or empty."""
    filled = pc.if_else(pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0), column, None)
    return pc.list_element(filled, 0)


def count(rows: pa.Table, labels: Sequence[str]) -> Numbers:
    """Count what `join_truth` gave. `labels`: class names in the catalog's order (may be empty)."""
    status = rows["status"]
    labelled = rows.filter(pc.equal(status, "labelled"))
    counted, accuracy, splits = _accuracies(rows)
    names = _class_names(labelled, counted, labels)
    confusion = _confusion(counted, names) if accuracy else None
    return Numbers(
        num_videos=len(rows),
        num_labelled=len(labelled),
        num_quarantined=pc.sum(pc.equal(status, "quarantined")).as_py() or 0,
        num_skipped=pc.sum(pc.equal(status, "skipped")).as_py() or 0,
        num_abstained=pc.sum(labelled["abstained"]).as_py() or 0,
        mean_margin=pc.mean(labelled["margin"]).as_py(),
        histogram=_histogram(labelled, "score"),
        margin_histogram=_histogram(labelled, "margin"),
        classes=_class_rows(labelled, names, confusion),
        accuracy=accuracy,
        splits=splits,
        confusion=confusion,
        calibration=_calibration(counted) if accuracy else None,
    )


def _calibration(counted: pa.Table) -> Calibration:
    return calibration_of(counted["score"].to_numpy(), counted["right"].to_numpy().astype(bool))


def _accuracies(rows: pa.Table) -> tuple[pa.Table, Accuracy | None, tuple[Accuracy, ...]]:
    """The labelled rows that count, their accuracy, and the accuracy of each split."""
    known = rows.filter(pc.is_valid(rows["true_label"]))
    found = sorted({split for split in pc.unique(known["split"]).to_pylist() if split})
    per_split = [(name, known.filter(pc.equal(known["split"], name))) for name in found]
    counted, shown = known, None
    if TRAIN_SPLIT in found and len(found) > 1:
        counted = known.filter(pc.fill_null(pc.not_equal(known["split"], TRAIN_SPLIT), True))
        rest = [name for name in found if name != TRAIN_SPLIT]
        shown = " + ".join(rest)
    elif len(found) == 1:
        shown = found[0]
    splits = [_accuracy(name, part) for name, part in per_split]
    labelled = counted.filter(pc.equal(counted["status"], "labelled"))
    return labelled, _accuracy(shown, counted), tuple(item for item in splits if item)


def _accuracy(split: str | None, rows: pa.Table) -> Accuracy | None:
    labelled = rows.filter(pc.equal(rows["status"], "labelled"))
    if not len(labelled):
        return None
    right = int(pc.sum(labelled["right"]).as_py() or 0)
    interval = wilson_interval(right, len(labelled))
    return Accuracy(split, right, len(labelled), len(rows) - len(labelled), interval)


def _class_names(labelled: pa.Table, counted: pa.Table, labels: Sequence[str]) -> tuple[str, ...]:
    """The catalog's classes in its order, then those that only the model or only a row names, sorted."""
    seen = set(pc.unique(labelled["top1"]).to_pylist()) | set(pc.unique(counted["true_label"]).to_pylist())
    return (*labels, *sorted(name for name in seen - set(labels) if name is not None))


def _class_rows(labelled: pa.Table, names: tuple[str, ...], confusion: Confusion | None) -> tuple[ClassRow, ...]:
    answered = labelled.filter(pc.is_valid(labelled["top1"]))
    places = pc.index_in(answered["top1"], value_set=pa.array(names, pa.string())).to_numpy()
    predicted = np.bincount(places, minlength=len(names)).tolist()
    totals = np.bincount(places, weights=answered["score"].to_numpy(), minlength=len(names)).tolist()
    counts = confusion.counts if confusion else np.zeros((len(names), len(names)), np.int64)
    called, true, right = (item.tolist() for item in (counts.sum(axis=0), counts.sum(axis=1), counts.diagonal()))
    return tuple(
        ClassRow(
            name=name,
            num_predicted=predicted[place],
            mean_score=totals[place] / predicted[place] if predicted[place] else None,
            num_called=called[place],
            num_true=true[place],
            num_right=right[place],
        )
        for place, name in enumerate(names)
    )


def _confusion(counted: pa.Table, names: tuple[str, ...]) -> Confusion:
    known = pa.array(names, pa.string())
    pairs = [pc.index_in(counted[name], value_set=known).to_numpy() for name in ("true_label", "top1")]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (pairs[0], pairs[1]), 1)
    return Confusion(names, counts)


def _histogram(labelled: pa.Table, name: str) -> np.ndarray:
    known = labelled.filter(pc.is_valid(labelled[name]))
    bins = np.clip((known[name].to_numpy().astype(np.float64) * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
    right = pc.fill_null(pc.cast(known["right"], pa.int8()), -1).to_numpy()
    return np.stack([np.bincount(bins[right == value], minlength=NUM_BINS) for value in (1, 0, -1)]).astype(np.int64)
