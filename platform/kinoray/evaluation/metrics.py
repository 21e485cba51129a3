"""Counts of what a model got right: accuracy, per class, confusion, calibration; average precision and F1.

Everything inside is an exact integer count, so numbers of parts add up to the numbers of the whole on any number of
workers, in any order, digit by digit. Videos that could not be scored are counted here too: an accuracy is never shown
without its coverage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Accuracy",
    "Calibration",
    "CalibrationBin",
    "CalibrationSummary",
    "ClassCounts",
    "Confused",
    "ScoreSummary",
    "Scores",
    "average_precisions",
    "calibration_of",
    "class_counts",
    "confused_classes",
    "count_confusion",
    "f1_of",
    "mean_precision",
    "resampled_precisions",
    "score",
    "wilson_interval",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
TOP = 5
NUM_BINS = 15
_Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution
_RESAMPLED = 200  # sets of videos that an interval is of
_UNIT = 2**36
"""Scores are counted in 1 / _UNIT: exact for a float32 of at least 2^-13, which a first score is with 8192 classes."""


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p = hits / total
    z2 = _Z95 * _Z95
    centre = p + z2 / (2 * total)
    half = _Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    low = (centre - half) / (1 + z2 / total)
    high = (centre + half) / (1 + z2 / total)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not exclude p itself


def _ratio(hits: int, total: int) -> float:
    return hits / total if total else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


# Accuracy


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many videos of a set were answered rightly. Shares of nothing are NaN."""

    right: int
    evaluated: int
    """Videos that were scored."""
    quarantined: int = 0
    """Videos of the set that were quarantined."""
    missing: int = 0
    """Videos of the set of which there is no answer at all."""

    @property
    def total(self) -> int:
        """Videos of the set: evaluated + quarantined + missing."""
        return self.evaluated + self.quarantined + self.missing

    @property
    def value(self) -> float:
        """Share of right answers among the evaluated videos."""
        return _ratio(self.right, self.evaluated)

    @property
    def of_all(self) -> float:
        """The same with every video that is quarantined or missing counted as wrong."""
        return _ratio(self.right, self.total)

    @property
    def coverage(self) -> float:
        """Share of the set that was evaluated."""
        return _ratio(self.evaluated, self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of `value`."""
        return wilson_interval(self.right, self.evaluated)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCounts:
    """One class: the evaluated videos that are of it, or were called so."""

    label: str
    videos: int
    """Videos that are of the class."""
    called: int
    """Videos whose first answer is the class."""
    right: int
    """Videos that are both."""
    within_top5: int | None
    """Videos of the class that have it among the first 5 answers; None where so many are not known."""

    @property
    def recall(self) -> float | None:
        """Share of right answers among the videos that are of the class; None of none. It is the class's top-1."""
        return self.right / self.videos if self.videos else None

    @property
    def recall_top5(self) -> float | None:
        """The same of the first 5 answers; None of none, and where so many are not known."""
        return self.within_top5 / self.videos if self.videos and self.within_top5 is not None else None

    @property
    def precision(self) -> float | None:
        """Share of right answers among the videos that were called so; None of none."""
        return self.right / self.called if self.called else None


@dataclass(frozen=True, slots=True)
class Confused:
    """One kind of mistake: `videos` of class `true` were called `predicted`."""

    true: str
    predicted: str
    videos: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """`Scores` in numbers that JSON holds; None where nothing was counted."""

    top1: float | None
    top5: float | None
    mean_class: float | None
    top1_of_all: float | None
    top5_of_all: float | None
    coverage: float | None
    evaluated: int
    quarantined: int
    missing: int
    total: int
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Counts over a labelled set of videos; parts merge with `+`.

    Raises:
        ValueError: the arrays do not fit each other.
    """

    confusion: IntArray
    """int64 [C, C]: evaluated videos by true class (row) and first predicted class (column)."""
    hits_top5: IntArray
    """int64 [C]: evaluated videos, by true class, whose class is among the first 5 (or all, with fewer classes)."""
    quarantined: int = 0
    """Videos of the set that were quarantined."""
    missing: int = 0
    """Videos of the set of which there is no answer at all."""

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
            self.quarantined + other.quarantined,
            self.missing + other.missing,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.hits_top5)

    @property
    def top1(self) -> Accuracy:
        """The first prediction is the true class."""
        return Accuracy(int(self.confusion.trace()), int(self.confusion.sum()), self.quarantined, self.missing)

    @property
    def top5(self) -> Accuracy:
        """The true class is among the first 5 predictions."""
        return Accuracy(int(self.hits_top5.sum()), int(self.confusion.sum()), self.quarantined, self.missing)

    @property
    def mean_class(self) -> float:
        """Mean of the classes' top-1 accuracies, over those that have evaluated videos."""
        videos = self.confusion.sum(axis=1)
        seen = videos > 0
        if not seen.any():
            return math.nan
        return float((self.confusion.diagonal()[seen] / videos[seen]).mean())

    def summary(self) -> ScoreSummary:
        """All of it but the classes and their confusion."""
        top1 = self.top1
        top5 = self.top5
        return ScoreSummary(
            top1=_or_none(top1.value),
            top5=_or_none(top5.value),
            mean_class=_or_none(self.mean_class),
            top1_of_all=_or_none(top1.of_all),
            top5_of_all=_or_none(top5.of_all),
            coverage=_or_none(top1.coverage),
            evaluated=top1.evaluated,
            quarantined=top1.quarantined,
            missing=top1.missing,
            total=top1.total,
            top1_interval=top1.interval,
            top5_interval=top5.interval,
        )


def count_confusion(truth: NDArray[np.integer[Any]], first: NDArray[np.integer[Any]], num_classes: int) -> IntArray:
    """int64 [C, C]: videos by true class (row) and first predicted class (column).

    Args:
        truth: int [N], class ids in 0 .. C-1.
        first: int [N], likewise.
    """
    cells = truth.astype(np.int64) * num_classes + first.astype(np.int64)
    return np.bincount(cells, minlength=num_classes * num_classes).reshape(num_classes, num_classes).astype(np.int64)


def score(labels: IntArray, topk: IntArray, num_classes: int, *, quarantined: int = 0, missing: int = 0) -> Scores:
    """Count predictions against labels.

    Args:
        labels: int [N], true class ids.
        topk: int [N, K], predicted class ids, best first; K at least min(5, num_classes), more is ignored.
        num_classes: number of classes C.
        quarantined: videos of the set that were quarantined.
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
    confusion = count_confusion(labels, topk[:, 0], num_classes)
    within = (topk[:, :top] == labels[:, None]).any(axis=1)
    hits = np.bincount(labels[within], minlength=num_classes).astype(np.int64)
    return Scores(confusion, hits, quarantined, missing)


def class_counts(confusion: IntArray, labels: Sequence[str], hits_top5: IntArray | None = None) -> list[ClassCounts]:
    """Each class in the order of the confusion's rows."""
    videos = confusion.sum(axis=1).tolist()
    called = confusion.sum(axis=0).tolist()
    right = confusion.diagonal().tolist()
    return [
        ClassCounts(
            label=label,
            videos=videos[index],
            called=called[index],
            right=right[index],
            within_top5=None if hits_top5 is None else int(hits_top5[index]),
        )
        for index, label in enumerate(labels)
    ]


def confused_classes(confusion: IntArray, labels: Sequence[str], most: int) -> list[Confused]:
    """The most frequent mistakes, at most `most`: frequent ones first, then in the order of the classes."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, wrong.shape)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [
        Confused(labels[row], labels[column], int(wrong[row, column])) for row, column in pairs if wrong[row, column]
    ]


# Calibration: how far the first score of an answer may be taken for the chance that it is right.


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Answers whose first score is in (low, high]."""

    low: float
    high: float
    videos: int
    accuracy: float | None
    """None in an empty bin."""
    mean_score: float | None
    """None in an empty bin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSummary:
    """`Calibration` in numbers that JSON holds; None where nothing was counted."""

    ece: float | None
    mean_score: float | None
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Answers by their first score, in 15 bins of equal width; parts merge with `+`.

    Bin m holds scores in (m / 15, (m + 1) / 15] (Guo et al. 2017, On Calibration of Modern Neural Networks, section 2).
    """

    videos: NDArray[np.int64]
    """int64 [15]: answers of each bin."""
    right: NDArray[np.int64]
    """int64 [15]: how many of them are right."""
    score_units: NDArray[np.int64]
    """int64 [15]: the sum of their scores, in units of 2^-36."""

    def __add__(self, other: "Calibration") -> "Calibration":
        """Calibration over both sets of videos together."""
        return Calibration(self.videos + other.videos, self.right + other.right, self.score_units + other.score_units)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over all answers of |accuracy - mean score| of their bin; NaN of none."""
        total = int(self.videos.sum())
        off = sum(
            abs(right * _UNIT - units)
            for right, units in zip(self.right.tolist(), self.score_units.tolist(), strict=True)
        )
        return off / (total * _UNIT) if total else math.nan

    @property
    def mean_score(self) -> float:
        """Mean first score; above the accuracy, the model is too sure of itself. NaN of none."""
        total = int(self.videos.sum())
        return int(self.score_units.sum()) / (total * _UNIT) if total else math.nan

    def summary(self) -> CalibrationSummary:
        """Its error, mean score, and the reliability table."""
        bins = []
        for index in range(NUM_BINS):
            videos = int(self.videos[index])
            right = int(self.right[index])
            units = int(self.score_units[index])
            bins.append(
                CalibrationBin(
                    low=index / NUM_BINS,
                    high=(index + 1) / NUM_BINS,
                    videos=videos,
                    accuracy=right / videos if videos else None,
                    mean_score=units / (videos * _UNIT) if videos else None,
                )
            )
        return CalibrationSummary(ece=_or_none(self.error), mean_score=_or_none(self.mean_score), bins=tuple(bins))


def calibration_of(scores: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> Calibration:
    """Sort answers into bins.

    Args:
        scores: float [N], the first score of each answer, in 0 .. 1.
        right: bool [N], whether the answer is the true class.

    Raises:
        ValueError: shapes do not fit, or a score is outside 0 .. 1.
    """
    if scores.ndim != 1 or scores.shape != right.shape:
        raise ValueError(f"scores and right must be [N] alike, got {list(scores.shape)} and {list(right.shape)}")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores must be in 0 .. 1, got {scores.min()} .. {scores.max()}")
    units = np.rint(scores.astype(np.float64) * _UNIT).astype(np.int64)
    bins = np.maximum((units * NUM_BINS + _UNIT - 1) // _UNIT - 1, 0)
    sums = np.zeros(NUM_BINS, np.int64)
    np.add.at(sums, bins, units)
    videos = np.bincount(bins, minlength=NUM_BINS).astype(np.int64)
    hits = np.bincount(bins[right], minlength=NUM_BINS).astype(np.int64)
    return Calibration(videos, hits, sums)


# Where a video may have any number of classes. Equal scores are one step of a precision-recall curve, so that nothing
# depends on the order of the videos, or on how many workers had them.


def average_precisions(scores: NDArray[np.floating[Any]], truth: BoolArray) -> FloatArray:
    """Average precision of each class, float64 [C]; NaN of one without a video.

        AP = sum over the distinct scores, the highest first, of (R_k - R_(k-1)) P_k

    with precision P_k and recall R_k of the videos that score at least so high.

    Args:
        scores: float [N, C].
        truth: bool [N, C].
    """
    ones = np.ones((len(scores), 1), np.float32)
    return np.array([_precisions(scores[:, place], truth[:, place], ones)[0] for place in range(scores.shape[1])])


def mean_precision(precisions: FloatArray) -> float:
    """mAP: their mean over the classes that have a video; NaN of none."""
    known = precisions[~np.isnan(precisions)]
    return float(known.mean()) if len(known) else math.nan


def _precisions(scores_N: NDArray[np.floating[Any]], truth_N: BoolArray, weights_NR: NDArray[np.float32]) -> FloatArray:
    """Average precision of one class, float64 [R], where each video counts as often as a column of the weights says.

    Recall rises only at scores that a video of the class has; what lies between two of them is added up at once.
    """
    if not truth_N.any():
        return np.full(weights_NR.shape[1], math.nan)
    order = np.argsort(-scores_N, kind="stable")
    ranked_N = truth_N[order]
    ends = np.append(np.flatnonzero(np.diff(scores_N[order])), len(order) - 1)  # of runs of equal scores
    ends_K = ends[np.add.reduceat(ranked_N, np.append(0, ends[:-1] + 1), dtype=np.int64) > 0]
    begins_K = np.append(0, ends_K[:-1] + 1)
    places = np.flatnonzero(ranked_N)
    weights_NR = weights_NR[order[: ends_K[-1] + 1]]
    called_KR = np.cumsum(np.add.reduceat(weights_NR, begins_K), axis=0, dtype=np.float64)
    gained_KR = np.add.reduceat(weights_NR[places], np.searchsorted(places, begins_K)).astype(np.float64)
    right_KR = np.cumsum(gained_KR, axis=0)
    total_R = right_KR[-1]
    sums_R = (gained_KR * right_KR / np.maximum(called_KR, 1.0)).sum(axis=0)
    found: FloatArray = np.where(total_R > 0, sums_R / np.maximum(total_R, 1.0), math.nan)
    return found


def resampled_precisions(scores: NDArray[np.floating[Any]], truth: BoolArray) -> FloatArray:
    """Average precisions, float64 [R, C], of as many videos drawn with replacement; the draws are always the same."""
    num_videos = len(scores)
    raw = np.random.PCG64(0).random_raw(_RESAMPLED * num_videos).reshape(_RESAMPLED, num_videos)
    drawn = (raw % np.uint64(num_videos)).astype(np.int64)
    weights = np.stack([np.bincount(row, minlength=num_videos) for row in drawn], axis=1).astype(np.float32)
    columns = [_precisions(scores[:, place], truth[:, place], weights) for place in range(scores.shape[1])]
    return np.stack(columns, axis=1)


def f1_of(videos: int, called: int, right: int) -> tuple[float | None, tuple[float, float]]:
    """F1 = 2 right / (videos + called), and its 95% interval; None of neither.

    Of the videos that are of the class or were called so, a share J = right / (videos + called - right) is both, and
    F1 = 2 J / (1 + J) rises with J: its interval is Wilson's of J.
    """
    union = videos + called - right
    low, high = wilson_interval(right, union)
    return 2 * right / (videos + called) if union else None, (2 * low / (1 + low), 2 * high / (1 + high))
