"""`kinoray compare`: two evaluations on the videos that both scored: who was right, which classes moved, which flipped.

It makes one self-contained HTML page, and JSON beside it. What is easy to break: videos and classes are joined by name,
and a video counts only if both scored it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinoray.catalog.table import lies_inside, references
from kinoray.console import many
from kinoray.errors import CatalogError
from kinoray.evaluation.config import CompareConfig
from kinoray.evaluation.metrics import ScoreSummary, wilson_interval
from kinoray.evaluation.record import Evaluation, Origin, read_evaluation
from kinoray.page.render import render_page
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import require_file
from kinoray.video.strips import Strip, contact_strips

__all__ = [
    "ClassMove",
    "Comparison",
    "Flip",
    "Paired",
    "Side",
    "compare",
    "compare_evaluations",
    "mcnemar_p",
    "pair",
]

_MAX_VIDEOS = 100  # shown of those that became right, and of those that became wrong; the JSON has all
_SIDE_ORIGIN = (
    "checkpoint",
    "members",
    "weights",
    "protocol",
    "views",
    "catalog",
    "split",
    "catalog_digest",
    "model_digest",
    "config_digest",
)
_SIDE_SCORES = ("top1", "top1_interval", "top5", "mean_class", "top1_of_all", "coverage", "evaluated", "quarantined")
_SCALE = 100.0  # drawing units from no difference to one of 100 points


# Two models on the same videos: is one better, or is it chance?


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split of the disagreements is by chance.

    only_a and only_b are the videos that one of the two got right and the other wrong. Under the null hypothesis they
    fall to either side with probability 1/2: p = min(1, 2 * sum_{k <= min} C(n, k) / 2^n), n = only_a + only_b, summed
    in whole numbers.
    """
    n = only_a + only_b
    least = min(only_a, only_b)
    term = 1  # C(n, 0)
    total = 1
    for k in range(1, least + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, float(2 * total / 2**n))


@dataclass(frozen=True, slots=True)
class Paired:
    """Videos by who was right: both, only model A, only model B, neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        """Videos."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of B less that of A; NaN of no videos."""
        return (self.only_b - self.only_a) / self.total if self.total else math.nan

    @property
    def p(self) -> float:
        """`mcnemar_p`."""
        return mcnemar_p(self.only_a, self.only_b)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference of two paired proportions, by Newcombe's method 10 (Statistics in Medicine 17,
        1998, p. 2635): Wilson's intervals of the two, put together with their correlation. (-1, 1) of no videos.
        """
        n = self.total
        if not n:
            return -1.0, 1.0
        right_a = self.both + self.only_a
        right_b = self.both + self.only_b
        low_a, high_a = wilson_interval(right_a, n)
        low_b, high_b = wilson_interval(right_b, n)
        a = right_a / n
        b = right_b / n
        phi = self._phi
        below = _joined(b - low_b, high_a - a, phi)
        above = _joined(high_b - b, a - low_a, phi)
        return max(-1.0, self.difference - below), min(1.0, self.difference + above)

    @property
    def _phi(self) -> float:
        """Correlation of right and wrong in A and B, with Newcombe's continuity correction."""
        right_a = self.both + self.only_a
        right_b = self.both + self.only_b
        scale = math.sqrt(right_a * (self.total - right_a) * right_b * (self.total - right_b))
        if not scale:
            return 0.0
        product = self.both * self.neither - self.only_a * self.only_b
        return (max(product - self.total / 2, 0.0) if product > 0 else product) / scale


def _joined(x: float, y: float, phi: float) -> float:
    """sqrt(x^2 - 2 phi x y + y^2), which rounding must not make the root of a negative number."""
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def pair(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> Paired:
    """Count videos of which bool [N] says whether A and B were right.

    Raises:
        ValueError: the two are not of one length.
    """
    if right_a.shape != right_b.shape or right_a.ndim != 1:
        raise ValueError(f"right_a and right_b must be [N] alike, got {list(right_a.shape)} and {list(right_b.shape)}")
    counts = [int(((right_a == a) & (right_b == b)).sum()) for a in (True, False) for b in (True, False)]
    return Paired(both=counts[0], only_a=counts[1], only_b=counts[2], neither=counts[3])


# Two evaluations


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
class Side:
    """One of the two evaluations."""

    evaluation: str
    """As it was named."""
    origin: Origin
    scores: ScoreSummary
    """Over its own videos, also those that the other did not score."""
    ece: float | None
    """Expected calibration error."""

    def summary(self) -> dict[str, Any]:
        """What the JSON and the page say of it; what does not apply to its origin is left out."""
        origin = {name: getattr(self.origin, name) for name in _SIDE_ORIGIN}
        return {
            "evaluation": self.evaluation,
            **{name: value for name, value in origin.items() if value is not None},
            **{name: getattr(self.scores, name) for name in _SIDE_SCORES},
            "ece": self.ece,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What came of comparing; differences are B less A."""

    a: Side
    b: Side
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
        """What the JSON holds."""
        return {
            "a": self.a.summary(),
            "b": self.b.summary(),
            "num_common": self.num_common,
            "num_only_in_a": self.num_only_in_a,
            "num_only_in_b": self.num_only_in_b,
            "num_scored_by_a": self.num_scored_by_a,
            "num_scored_by_b": self.num_scored_by_b,
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
    record = asdict(flip)
    del record["row"]  # a place in A's catalog, for the page only
    return record


def compare_evaluations(a: Evaluation, b: Evaluation) -> Comparison:
    """Join two evaluations by video_id and class name and count.

    Raises:
        CatalogError: no video was scored by both, or one has another true label in each.
    """
    place_b = {video_id: place for place, video_id in enumerate(b.answers.video_ids)}
    rows_a = np.array([row for row, name in enumerate(a.answers.video_ids) if name in place_b], np.int64)
    rows_b = np.array([place_b[a.answers.video_ids[row]] for row in rows_a], np.int64)
    _check_truth(a, b, rows_a, rows_b)
    answered_a = a.answers.answered[rows_a]
    answered_b = b.answers.answered[rows_b]
    both = answered_a & answered_b
    if not both.any():
        raise CatalogError(
            f"{a.uri} and {b.uri} have no scored video in common ({len(rows_a)} of {len(a.answers.video_ids)} and "
            f"{len(b.answers.video_ids)} are in both); compare evaluations of one catalog and split"
        )
    first = rows_a[both]
    second = rows_b[both]
    right_a = a.answers.right[first]
    right_b = b.answers.right[second]
    said_a = _names(a, a.answers.topk[first, 0])
    said_b = _names(b, b.answers.topk[second, 0])
    return Comparison(
        a=_side(a),
        b=_side(b),
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


def _side(one: Evaluation) -> Side:
    record = one.record
    return Side(evaluation=one.uri, origin=record.origin, scores=record.scores, ece=record.calibration.ece)


def _check_truth(a: Evaluation, b: Evaluation, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> None:
    true_a = _names(a, a.answers.truth[rows_a])
    true_b = _names(b, b.answers.truth[rows_b])
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
        part_a = right_a[of_class]
        part_b = right_b[of_class]
        paired = pair(part_a, part_b)
        moves.append(ClassMove(label=label, paired=paired, top1_a=float(part_a.mean()), top1_b=float(part_b.mean())))
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


# The page


def compare(config: CompareConfig) -> Comparison:
    """Compare, write the page and its JSON, and print what came of it in a few lines.

    Raises:
        CatalogError: no video was scored by both, or true labels differ.
        KinorayError: an evaluation cannot be read, or the page cannot be written.
    """
    storage = Storage(config.storage)
    require_file("out", config.out)
    a = read_evaluation(storage, config.a, catalog=config.catalog)
    b = read_evaluation(storage, config.b, catalog=config.catalog)
    comparison = compare_evaluations(a, b)
    page = _render(config, a, comparison, storage).encode("utf-8")
    out = absolute(config.out)
    data = out.removesuffix(".html") + ".json"
    storage.put(data, json.dumps(comparison.summary(), indent=1).encode())
    storage.put(out, page)
    _print(comparison)
    print(f"compare: {out}, {len(page) / 1e6:.1f} MB; all numbers are in {data}", flush=True)
    return comparison


def _print(comparison: Comparison) -> None:
    paired = comparison.paired
    low, high = paired.interval
    for name, only, side in (("A", paired.only_a, comparison.a), ("B", paired.only_b, comparison.b)):
        top1 = (paired.both + only) / paired.total
        print(f"compare: {name} top-1 {top1:.1%} of {paired.total:,}: {side.evaluation}")
    difference = f"{100 * paired.difference:+.1f} points (95% interval {100 * low:+.1f} .. {100 * high:+.1f})"
    print(
        f"compare: B less A {difference}, McNemar p = {paired.p:.2g}; {many(paired.only_b, 'video')} became right, "
        f"{paired.only_a:,} wrong; the two agree on {comparison.agreement:.1%}"
    )
    num_moved = sum(move.moved for move in comparison.classes)
    print(f"compare: {num_moved} of {many(len(comparison.classes), 'class')} moved by more than their 95% interval")
    apart = {
        "only in A": comparison.num_only_in_a,
        "only in B": comparison.num_only_in_b,
        "scored by A only": comparison.num_scored_by_a,
        "scored by B only": comparison.num_scored_by_b,
    }
    if any(apart.values()):
        left_out = ", ".join(f"{many(count, 'video')} {what}" for what, count in apart.items() if count)
        print(f"compare: left out: {left_out}")


@dataclass(frozen=True, slots=True)
class _Card:
    """One video that flipped, as the template shows it."""

    flip: Flip
    strip: Strip | None


def _render(config: CompareConfig, a: Evaluation, comparison: Comparison, storage: Storage) -> str:
    gained = comparison.gained[:_MAX_VIDEOS]
    lost = comparison.lost[:_MAX_VIDEOS]
    strips = _strips(storage, a, [*gained, *lost], config)
    values: dict[str, object] = {
        "config": config,
        "sides": [{"name": "A", **comparison.a.summary()}, {"name": "B", **comparison.b.summary()}],
        "comparison": comparison,
        "num_moved": sum(move.moved for move in comparison.classes),
        "scale": _SCALE,
        "has_top5": len(a.labels) > 5,
        "gained": [_Card(flip, strips.get(flip.row)) for flip in gained],
        "lost": [_Card(flip, strips.get(flip.row)) for flip in lost],
    }
    return render_page("compare.html.j2", values, styles=("page.css", "report.css", "compare.css"))


def _strips(storage: Storage, a: Evaluation, flips: Sequence[Flip], config: CompareConfig) -> dict[int, Strip]:
    """Contact strips by row of A's catalog, read in the catalog's order.

    A catalog that the user did not name may refer to anything: of it only what lies in its folder is read.
    """
    rows = sorted(flip.row for flip in flips)
    if not config.frames_per_video or not rows:
        return {}
    places = dict(zip(rows, references(a.catalog.table.take(rows)), strict=True))
    root = a.catalog_found_in
    inside = {row: place for row, place in places.items() if not root or lies_inside(root, place.uri)}
    made = contact_strips(storage, list(inside.values()), config.frames_per_video, config.decode)
    outside = f"lies outside of {root}, the folder of a catalog that nobody named; --catalog names it"
    return {
        **{row: Strip((), outside) for row in places},
        **dict(zip(inside, made, strict=True)),
    }
