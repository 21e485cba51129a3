"""Accuracy of a classifier, from labels and predicted class ids.

Everything inside is an exact integer count, so scores of parts add up to the score of the whole on any number of
workers. Videos that could not be scored are counted here too: an accuracy is never shown without its coverage.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scores", "score", "wilson_interval"]

IntArray = NDArray[np.int64]
TOP = 5
Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution


def wilson_interval(hits: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95% by default); (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = hits / total, z * z
    centre = p + z2 / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not exclude p itself


def _ratio(hits: int, total: int) -> float:
    return hits / total if total else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Counts over a labelled set of videos; parts merge with `+`. Accuracies are NaN where nothing was counted.

    Raises:
        ValueError: the arrays do not fit each other.
    """

    confusion: IntArray
    """int64 [C, C]: evaluated videos by true class (row) and first predicted class (column)."""
    hits_top5: IntArray
    """int64 [C]: evaluated videos, by true class, whose class is among the first 5 (or all, with fewer classes)."""
    unreadable: int = 0
    """Videos of the set that were quarantined."""
    missing: int = 0
    """Videos of the set of which there is no result at all."""

    def __post_init__(self) -> None:
        classes = len(self.hits_top5)
        if self.confusion.shape != (classes, classes):
            raise ValueError(f"confusion must be [{classes}, {classes}] as hits_top5, got {list(self.confusion.shape)}")

    def __add__(self, other: "Scores") -> "Scores":
        """Scores of both sets of videos together."""
        if self.num_classes != other.num_classes:
            raise ValueError(f"scores of {self.num_classes} and {other.num_classes} classes cannot be added")
        return Scores(
            self.confusion + other.confusion,
            self.hits_top5 + other.hits_top5,
            self.unreadable + other.unreadable,
            self.missing + other.missing,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.hits_top5)

    @property
    def evaluated(self) -> int:
        """Videos that were scored."""
        return int(self.confusion.sum())

    @property
    def total(self) -> int:
        """Videos of the set: evaluated + unreadable + missing."""
        return self.evaluated + self.unreadable + self.missing

    @property
    def coverage(self) -> float:
        """Share of the set that was evaluated."""
        return _ratio(self.evaluated, self.total)

    @property
    def correct(self) -> int:
        """Videos whose first predicted class is the true one."""
        return int(self.confusion.trace())

    @property
    def top1(self) -> float:
        """Accuracy of the first prediction, over the evaluated videos."""
        return _ratio(self.correct, self.evaluated)

    @property
    def top5(self) -> float:
        """Share of the evaluated videos with the true class among the first 5 predictions."""
        return _ratio(int(self.hits_top5.sum()), self.evaluated)

    @property
    def top1_of_all(self) -> float:
        """top1 when every video that is unreadable or missing counts as wrong."""
        return _ratio(self.correct, self.total)

    @property
    def top5_of_all(self) -> float:
        """top5 when every video that is unreadable or missing counts as wrong."""
        return _ratio(int(self.hits_top5.sum()), self.total)

    @property
    def per_class(self) -> NDArray[np.float64]:
        """float64 [C]: top-1 accuracy (recall) of each class; NaN for a class without evaluated videos."""
        support = self.confusion.sum(axis=1)
        accuracy = np.full(self.num_classes, np.nan)
        np.divide(self.confusion.diagonal(), support, out=accuracy, where=support > 0)
        return accuracy

    @property
    def mean_class(self) -> float:
        """Mean of per_class over the classes that have evaluated videos."""
        seen = self.per_class[~np.isnan(self.per_class)]
        return float(seen.mean()) if len(seen) else math.nan

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Wilson 95% interval of top1."""
        return wilson_interval(self.correct, self.evaluated)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """Wilson 95% interval of top5."""
        return wilson_interval(int(self.hits_top5.sum()), self.evaluated)

    def summary(self) -> dict[str, Any]:
        """All of it but the confusion matrix as JSON-able numbers (NaN becomes None)."""
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("top1", "top5", "mean_class", "top1_of_all", "top5_of_all", "coverage")
        }
        values |= {name: getattr(self, name) for name in ("evaluated", "unreadable", "missing", "total")}
        values = {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in values.items()}
        values["per_class"] = [None if math.isnan(x) else float(x) for x in self.per_class]
        values |= {"top1_interval": list(self.top1_interval), "top5_interval": list(self.top5_interval)}
        return values


def score(labels: IntArray, topk: IntArray, num_classes: int, *, unreadable: int = 0, missing: int = 0) -> Scores:
    """Count predictions against labels.

    Args:
        labels: int [N], true class ids.
        topk: int [N, K], predicted class ids, best first; K at least min(5, num_classes), more is ignored.
        num_classes: number of classes C.
        unreadable: videos of the set that were quarantined.
        missing: videos of the set without a result.

    Raises:
        ValueError: shapes do not fit, an id is outside 0 .. C-1, or K is too small.
    """
    top = min(TOP, num_classes)
    if labels.ndim != 1 or topk.ndim != 2 or len(topk) != len(labels) or topk.shape[1] < top:
        raise ValueError(f"labels must be [N] and topk [N, {top} or more], got {labels.shape} and {topk.shape}")
    for name, ids in (("labels", labels), ("topk", topk)):
        if ids.size and not (ids.min() >= 0 and ids.max() < num_classes):
            raise ValueError(f"{name} must be class ids in 0 .. {num_classes - 1}, got {ids.min()} .. {ids.max()}")
    pairs = labels.astype(np.int64) * num_classes + topk[:, 0]
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)
    within = (topk[:, :top] == labels[:, None]).any(axis=1)
    hits = np.bincount(labels[within], minlength=num_classes).astype(np.int64)
    return Scores(confusion, hits, unreadable, missing)
