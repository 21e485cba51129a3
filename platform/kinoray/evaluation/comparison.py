"""Two evaluations on the videos that both scored: who was right, which classes moved, which videos flipped.

What is easy to break: videos and classes are joined by name, and a video counts only if both scored it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinoray.errors import CatalogError
from kinoray.evaluation.paired import Paired, pair
from kinoray.evaluation.read import Evaluation

__all__ = ["ClassMove", "Comparison", "Flip", "compare_evaluations"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMove:
    """One class: how right the two are on its videos."""

    label: str
    paired: Paired
    top1_a: float
    top1_b: float

    @property
    def moved(self) -> bool:
        """Whether the 95% interval of the difference leaves out zero."""
        low, high = self.paired.interval
        return low > 0 or high < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A video that one of the two got right."""

    row: int
    """Its row in A's catalog."""
    video_id: str
    true: str
    said_a: str
    said_b: str
    score_a: float
    score_b: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What came of comparing; differences are B less A."""

    paired: Paired
    """Over the videos that both scored."""
    agreement: float
    """Share of these videos that both call the same."""
    num_common: int
    """Videos of both, scored or not."""
    num_only_in_a: int
    """Videos that only A's split has."""
    num_only_in_b: int
    """Videos that only B's split has."""
    num_scored_by_a: int
    """Common videos that A scored and B could not."""
    num_scored_by_b: int
    """Common videos that B scored and A could not."""
    classes: tuple[ClassMove, ...]
    """The largest difference first, then by name; classes with videos that both scored."""
    gained: tuple[Flip, ...]
    """Wrong in A, right in B; B's surest first."""
    lost: tuple[Flip, ...]
    """Right in A, wrong in B; A's surest first."""

    def summary(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        names = ("num_common", "num_only_in_a", "num_only_in_b", "num_scored_by_a", "num_scored_by_b")
        return {
            **{name: getattr(self, name) for name in names},
            **_counts(self.paired),
            "agreement": self.agreement,
            "classes": [
                {"label": move.label, "top1_a": move.top1_a, "top1_b": move.top1_b, **_counts(move.paired)}
                for move in self.classes
            ],
            "gained": [_flip(flip) for flip in self.gained],
            "lost": [_flip(flip) for flip in self.lost],
        }


def _counts(paired: Paired) -> dict[str, Any]:
    return {
        "videos": paired.total,
        "both_right": paired.both,
        "only_a_right": paired.only_a,
        "only_b_right": paired.only_b,
        "both_wrong": paired.neither,
        "difference": paired.difference,
        "difference_interval": list(paired.interval),
        "mcnemar_p": paired.p,
    }


def _flip(flip: Flip) -> dict[str, Any]:
    return {name: getattr(flip, name) for name in ("video_id", "true", "said_a", "said_b", "score_a", "score_b")}


def compare_evaluations(a: Evaluation, b: Evaluation) -> Comparison:
    """Join two evaluations by video_id and class name and count.

    Raises:
        CatalogError: no video was scored by both, or one has another true label in each.
    """
    place_b = {video_id: place for place, video_id in enumerate(b.answers.video_ids)}
    rows_a = np.array([row for row, name in enumerate(a.answers.video_ids) if name in place_b], np.int64)
    rows_b = np.array([place_b[a.answers.video_ids[row]] for row in rows_a], np.int64)
    _check_truth(a, b, rows_a, rows_b)
    answered_a, answered_b = a.answers.answered[rows_a], b.answers.answered[rows_b]
    both = answered_a & answered_b
    if not both.any():
        raise CatalogError(
            f"{a.uri} and {b.uri} have no scored video in common ({len(rows_a)} of {len(a.answers.video_ids)} and "
            f"{len(b.answers.video_ids)} are in both); compare evaluations of one catalog and split"
        )
    first, second = rows_a[both], rows_b[both]
    right_a, right_b = a.answers.right[first], b.answers.right[second]
    said_a, said_b = _names(a, a.answers.topk[first, 0]), _names(b, b.answers.topk[second, 0])
    return Comparison(
        paired=pair(right_a, right_b),
        agreement=float(np.mean(said_a == said_b)),
        num_common=len(rows_a),
        num_only_in_a=len(a.answers.video_ids) - len(rows_a),
        num_only_in_b=len(b.answers.video_ids) - len(rows_b),
        num_scored_by_a=int((answered_a & ~answered_b).sum()),
        num_scored_by_b=int((answered_b & ~answered_a).sum()),
        classes=_moves(_names(a, a.answers.truth[first]), right_a, right_b),
        gained=_flips(a, b, first[~right_a & right_b], second[~right_a & right_b], surest="b"),
        lost=_flips(a, b, first[right_a & ~right_b], second[right_a & ~right_b], surest="a"),
    )


def _check_truth(a: Evaluation, b: Evaluation, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> None:
    true_a, true_b = _names(a, a.answers.truth[rows_a]), _names(b, b.answers.truth[rows_b])
    changed = np.flatnonzero(true_a != true_b)
    if len(changed):
        first = ", ".join(
            f"{a.answers.video_ids[rows_a[place]]} ({true_a[place]} and {true_b[place]})" for place in changed[:5]
        )
        raise CatalogError(
            f"{len(changed)} of {len(rows_a)} videos have another true label in {a.uri} than in {b.uri}: {first}; "
            "evaluate both on one catalog"
        )


def _names(one: Evaluation, ids: NDArray[np.int64]) -> NDArray[np.object_]:
    return np.array(one.labels, object)[ids]


def _moves(truth: NDArray[np.object_], right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> tuple[ClassMove, ...]:
    moves = []
    for label in sorted(set(truth.tolist())):
        of_class = truth == label
        part_a, part_b = right_a[of_class], right_b[of_class]
        moves.append(
            ClassMove(
                label=label, paired=pair(part_a, part_b), top1_a=float(part_a.mean()), top1_b=float(part_b.mean())
            )
        )
    return tuple(sorted(moves, key=lambda move: -abs(move.paired.difference)))


def _flips(
    a: Evaluation, b: Evaluation, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64], *, surest: str
) -> tuple[Flip, ...]:
    flips = [
        Flip(
            row=int(row),
            video_id=a.answers.video_ids[row],
            true=a.labels[a.answers.truth[row]],
            said_a=a.labels[a.answers.topk[row, 0]],
            said_b=b.labels[b.answers.topk[other, 0]],
            score_a=float(a.answers.first_score[row]),
            score_b=float(b.answers.first_score[other]),
        )
        for row, other in zip(rows_a.tolist(), rows_b.tolist(), strict=True)
    ]
    return tuple(sorted(flips, key=lambda flip: (-(flip.score_a if surest == "a" else flip.score_b), flip.video_id)))
