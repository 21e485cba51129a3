"""Accuracy counts against slow loops and closed forms."""

import json
import math
from dataclasses import asdict
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from kinoray.evaluation.compare import Paired, mcnemar_p, pair
from kinoray.evaluation.metrics import (
    Calibration,
    Scores,
    average_precisions,
    calibration_of,
    class_counts,
    f1_of,
    mean_precision,
    resampled_precisions,
    score,
    wilson_interval,
)


def random_predictions(num_videos: int, num_classes: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_videos)
    topk = np.stack([rng.permutation(num_classes)[:k] for _ in range(num_videos)])
    return labels, topk


@pytest.mark.parametrize(("num_classes", "k"), [(2, 2), (4, 4), (5, 5), (11, 5), (11, 7)])
def test_counts_equal_a_loop_over_the_videos(num_classes: int, k: int) -> None:
    labels, topk = random_predictions(200, num_classes, k)
    confusion = [[0] * num_classes for _ in range(num_classes)]
    first = within = 0
    for label, ids in zip(labels.tolist(), topk.tolist(), strict=True):
        confusion[label][ids[0]] += 1
        first += label == ids[0]
        within += label in ids[:5]

    scores = score(labels, topk, num_classes)

    assert scores.confusion.tolist() == confusion
    assert scores.confusion.dtype == np.int64
    assert scores.top1.value == first / 200
    assert scores.top5.value == within / 200
    rows = class_counts(scores.confusion, [str(label) for label in range(num_classes)], scores.hits_top5)
    for label in range(num_classes):
        assert rows[label].recall == confusion[label][label] / sum(confusion[label])
        assert rows[label].called == sum(row[label] for row in confusion)
        assert rows[label].within_top5 == sum(
            true == label and true in ids[:5] for true, ids in zip(labels, topk, strict=True)
        )
    assert scores.mean_class == pytest.approx(
        sum(confusion[c][c] / sum(confusion[c]) for c in range(num_classes)) / num_classes, abs=1e-15
    )


@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [0, 150, 200], [37, 90]])
def test_scores_of_parts_add_up_to_the_whole(cuts: list[int]) -> None:
    labels, topk = random_predictions(200, 7, 5, seed=3)
    whole = score(labels, topk, 7, quarantined=5, missing=2)
    parts = [
        score(a, b, 7, quarantined=int(index == 0) * 5, missing=int(index == 0) * 2)
        for index, (a, b) in enumerate(zip(np.split(labels, cuts), np.split(topk, cuts), strict=True))
    ]
    total = sum(parts[1:], start=parts[0])
    assert total.summary() == whole.summary()
    assert total.confusion.tolist() == whole.confusion.tolist()
    assert total.hits_top5.tolist() == whole.hits_top5.tolist()


def test_videos_that_were_not_scored_lower_the_accuracy_of_all_but_not_of_the_evaluated() -> None:
    scores = score(np.array([0, 1, 2, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]]), 3)
    scores += score(np.array([], dtype=np.int64), np.zeros((0, 3), dtype=np.int64), 3, quarantined=3, missing=1)
    top1, top5 = scores.top1, scores.top5
    assert (top1.evaluated, top1.quarantined, top1.missing, top1.total) == (4, 3, 1, 8)
    assert top1.coverage == 0.5
    assert top1.value == 0.75
    assert top1.of_all == 0.375
    assert (top5.value, top5.of_all) == (1.0, 0.5)


def test_a_class_without_videos_has_no_accuracy_and_leaves_the_class_mean_alone() -> None:
    scores = score(np.array([0, 0, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]]), 3)
    assert [row.recall for row in class_counts(scores.confusion, "abc")] == [0.5, None, 1.0]
    assert scores.mean_class == 0.75


def test_nothing_evaluated_is_nan_not_zero() -> None:
    scores = score(np.array([], dtype=np.int64), np.zeros((0, 2), dtype=np.int64), 2, quarantined=4)
    assert math.isnan(scores.top1.value)
    assert math.isnan(scores.mean_class)
    assert scores.top1.of_all == 0.0
    assert scores.top1.interval == (0.0, 1.0)
    assert json.loads(json.dumps(asdict(scores.summary()), allow_nan=False))["top1"] is None


def test_one_class_is_always_right() -> None:
    scores = score(np.zeros(3, dtype=np.int64), np.zeros((3, 1), dtype=np.int64), 1)
    assert (scores.top1.value, scores.top5.value, scores.top1.evaluated) == (1.0, 1.0, 3)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (1, 2), (713, 1000), (1, 100000)])
def test_wilson_bounds_are_where_the_score_test_just_rejects(hits: int, total: int) -> None:
    # Definition: the bounds p solve (hits/total - p)^2 = z^2 p (1 - p) / total.
    for p in wilson_interval(hits, total):
        assert (hits / total - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / total, abs=1e-12)
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert low < high


@pytest.mark.parametrize(
    ("labels", "topk", "message"),
    [
        ([0, 1], [[0, 1, 2]], "labels must be"),
        ([0], [[0, 1]], r"topk \[N, 3 or more\]"),
        ([3], [[0, 1, 2]], r"labels must be class ids in 0 \.\. 2, got 3 \.\. 3"),
        ([0], [[0, -1, 2]], "topk must be class ids"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(labels: list[int], topk: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(np.array(labels), np.array(topk), 3)


def test_scores_of_different_class_counts_do_not_add() -> None:
    a, b = (Scores(np.zeros((n, n), np.int64), np.zeros(n, np.int64)) for n in (2, 3))
    with pytest.raises(ValueError, match="scores of 2 and 3 classes"):
        a + b


# Calibration


def overconfident(num: int, num_classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, C] probabilities and int64 [N] true classes of a model that is too sure of itself."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num, num_classes)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([rng.choice(num_classes, p=row) for row in p])
    sharp = np.exp(1.7 * logits) / np.exp(1.7 * logits).sum(1, keepdims=True)
    return sharp.astype(np.float32), truth


def test_calibration_error_equals_a_loop_in_float64() -> None:
    p, truth = overconfident(3000)
    first, right = p.max(1), p.argmax(1) == truth
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for confidence, hit in zip(first.tolist(), right.tolist(), strict=True):
        (index,) = [m for m in range(15) if m / 15 < confidence <= (m + 1) / 15]
        bins[index].append((confidence, hit))
    gaps = [abs(sum(hit for _, hit in inside) - sum(c for c, _ in inside)) for inside in bins]
    found = calibration_of(first, right)
    assert 0.05 < found.error == pytest.approx(sum(gaps) / 3000, abs=1e-12)
    assert found.mean_score == pytest.approx(first.astype(np.float64).mean(), abs=1e-12)
    table = found.summary().bins
    assert [row.videos for row in table] == [len(inside) for inside in bins]
    for row, inside in zip(table, bins, strict=True):
        if inside:
            assert row.accuracy == sum(hit for _, hit in inside) / len(inside)
            assert row.mean_score == pytest.approx(sum(c for c, _ in inside) / len(inside), abs=1e-12)
        else:
            assert row.accuracy is row.mean_score is None


def test_calibration_of_parts_adds_up_to_the_whole_in_any_order() -> None:
    p, truth = overconfident(500, seed=2)
    first, right = p.max(1), p.argmax(1) == truth
    whole = calibration_of(first, right).summary()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(500)
        parts = [calibration_of(first[part], right[part]) for part in np.array_split(order, 4)]
        assert sum(parts[1:], start=parts[0]).summary() == whole  # exactly


def test_bins_are_open_below_and_closed_above() -> None:
    found = calibration_of(np.array([0.0, 2.0**-30, 0.5, 1.0]), np.array([False, False, True, True]))
    assert found.videos.tolist() == [2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert found.error == pytest.approx((2.0**-30 + 0.5 + 0) / 4, abs=1e-12)
    edges = np.array([m / 15 for m in range(1, 16)])  # as doubles: some are above the fraction, by less than a unit
    assert (calibration_of(edges, np.ones(15, bool)).videos.sum(), len(edges)) == (15, 15)


def test_calibration_of_nothing_is_nan_not_zero() -> None:
    found = calibration_of(np.zeros(0, np.float32), np.zeros(0, bool))
    assert math.isnan(found.error)
    assert json.loads(json.dumps(asdict(found.summary()), allow_nan=False))["ece"] is None
    assert isinstance(found + found, Calibration)


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [([0.5, 0.5], [True], "must be"), ([1.5], [True], r"in 0 \.\. 1"), ([math.nan], [True], "in 0")],
)
def test_scores_that_are_none_are_refused(scores: list[float], right: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_of(np.array(scores), np.array(right))


# Two models


def naive_mcnemar(only_a: int, only_b: int) -> Fraction:
    """All 2^n ways in which the disagreements can fall, one by one: how many are as uneven as this one."""
    n = only_a + only_b
    uneven = sum(abs(2 * sum(way) - n) >= abs(only_a - only_b) for way in product((0, 1), repeat=n))
    return Fraction(uneven, 2**n)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 5), (3, 3), (2, 9), (9, 2), (4, 6), (0, 12)])
def test_mcnemar_counts_all_ways_to_disagree(only_a: int, only_b: int) -> None:
    assert mcnemar_p(only_a, only_b) == float(naive_mcnemar(only_a, only_b))


def test_mcnemar_of_many_videos() -> None:
    """Binomial probabilities through logarithms of factorials, a way of its own, for numbers like Kinetics'."""
    n, least = 4000, 1900
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(n + 1)]
    tail = math.fsum(math.exp(x) for x in logs[: least + 1])
    assert mcnemar_p(least, n - least) == pytest.approx(2 * tail, rel=1e-9)
    assert mcnemar_p(0, 20000) == 0.0  # 2^-19999 is no double


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "low", "high"),
    [
        (36, 2, 12, 0, 0.0569, 0.3404),  # Newcombe 1998, table II, method 10
        (20, 2, 12, 16, 0.0562, 0.3292),
        (2, 2, 12, 34, 0.0537, 0.3421),
        (1, 7, 1, 12, -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014, airway reactivity
    ],
)
def test_intervals_of_paired_differences_are_the_published_ones(
    both: int, only_a: int, only_b: int, neither: int, low: float, high: float
) -> None:
    paired = Paired(both, only_a, only_b, neither)
    assert paired.interval == pytest.approx((low, high), abs=5e-4)
    swapped = Paired(both, only_b, only_a, neither)
    assert swapped.interval == pytest.approx((-paired.interval[1], -paired.interval[0]), abs=1e-15)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (5, 0, 0, 0), (0, 0, 0, 5), (0, 5, 0, 0), (0, 0, 7, 0), (1, 0, 0, 1)])
def test_intervals_stay_within_one_and_hold_the_difference(counts: tuple[int, int, int, int]) -> None:
    paired = Paired(*counts)
    low, high = paired.interval
    assert -1 <= low < high <= 1
    assert math.isnan(paired.difference) if not paired.total else low <= paired.difference <= high


def test_pairs_are_counted_by_who_was_right() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.6, rng.random(200) < 0.5
    counts = {(x, y): sum((i, j) == (x, y) for i, j in zip(a, b, strict=True)) for x in (0, 1) for y in (0, 1)}
    found = pair(a, b)
    assert found == Paired(counts[1, 1], counts[1, 0], counts[0, 1], counts[0, 0])
    assert found.difference == pytest.approx(b.mean() - a.mean(), abs=1e-15)
    with pytest.raises(ValueError, match=r"\[200\] and \[199\]"):
        pair(a, b[1:])


# Several classes a video


def slow_precision(scores: list[float], truth: list[bool]) -> float | None:
    """Average precision as a sum over thresholds."""
    if not any(truth):
        return None
    total, before = Fraction(0), Fraction(0)
    for level in sorted(set(scores), reverse=True):
        called = [flag for value, flag in zip(scores, truth, strict=True) if value >= level]
        recall = Fraction(sum(called), sum(truth))
        total += (recall - before) * Fraction(sum(called), len(called))
        before = recall
    return float(total)


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_equals_a_sum_over_thresholds_in_any_order(levels: int) -> None:
    """Few levels mean many equal scores."""
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (40, 6)) / levels
    truth = rng.random((40, 6)) < [0.5, 0.1, 0.9, 0.3, 0.0, 1.0]
    found = average_precisions(scores, truth)
    expected = [slow_precision(scores[:, c].tolist(), truth[:, c].tolist()) for c in range(6)]
    assert [None if math.isnan(value) else value for value in found.tolist()] == pytest.approx(expected, rel=1e-12)
    known = [value for value in expected if value is not None]
    assert len(known) == truth.any(axis=0).sum() >= 4
    assert mean_precision(found) == pytest.approx(sum(known) / len(known), rel=1e-12)
    order = rng.permutation(40)
    np.testing.assert_array_equal(average_precisions(scores[order], truth[order]), found)
    assert np.isnan(average_precisions(np.empty((0, 2)), np.empty((0, 2), bool))).all()
    assert math.isnan(mean_precision(np.array([math.nan])))


def test_resampled_precisions_are_those_of_the_videos_that_were_drawn() -> None:
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 9, (25, 2)) / 9, rng.random((25, 2)) < 0.4
    found = resampled_precisions(scores, truth)
    drawn = (np.random.PCG64(0).random_raw(200 * 25) % np.uint64(25)).astype(int).reshape(200, 25)
    for row in range(200):
        rows = drawn[row]
        expected = [slow_precision(scores[rows, c].tolist(), truth[rows, c].tolist()) for c in range(2)]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-12)
    assert 0.05 < found[:, 0].std() < 0.2


def test_f1_has_the_interval_of_the_share_that_is_both() -> None:
    value, (low, high) = f1_of(videos=30, called=20, right=15)
    assert value == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert low < value < high
    shares = wilson_interval(15, 35)
    assert (low, high) == pytest.approx(tuple(2 * share / (1 + share) for share in shares))
    assert f1_of(0, 0, 0) == (None, (0.0, 1.0))
    assert f1_of(3, 0, 0)[0] == 0.0
    inside = 0
    rng = np.random.default_rng(2)
    for _ in range(400):  # of 60 videos that are in it or called so, 0.5 are both: F1 is 2/3
        right = int((rng.random(60) < 0.5).sum())
        low, high = f1_of(right, 60, right)[1]
        inside += low <= 2 / 3 <= high
    assert 0.92 <= inside / 400 <= 0.98
