"""Accuracy counts against slow loops and closed forms."""

import json
import math

import numpy as np
import pytest

from kinoray.metrics import Scores, score, wilson_interval


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
    assert scores.top1 == first / 200
    assert scores.top5 == within / 200
    for label in range(num_classes):
        assert scores.per_class[label] == confusion[label][label] / sum(confusion[label])
    assert scores.mean_class == pytest.approx(
        sum(confusion[c][c] / sum(confusion[c]) for c in range(num_classes)) / num_classes, abs=1e-15
    )


@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [0, 150, 200], [37, 90]])
def test_scores_of_parts_add_up_to_the_whole(cuts: list[int]) -> None:
    labels, topk = random_predictions(200, 7, 5, seed=3)
    whole = score(labels, topk, 7, unreadable=5, missing=2)
    parts = [
        score(a, b, 7, unreadable=int(index == 0) * 5, missing=int(index == 0) * 2)
        for index, (a, b) in enumerate(zip(np.split(labels, cuts), np.split(topk, cuts), strict=True))
    ]
    total = sum(parts[1:], start=parts[0])
    assert total.summary() == whole.summary()
    assert total.confusion.tolist() == whole.confusion.tolist()


def test_videos_that_were_not_scored_lower_the_accuracy_of_all_but_not_of_the_evaluated() -> None:
    scores = score(np.array([0, 1, 2, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]]), 3)
    scores += score(np.array([], dtype=np.int64), np.zeros((0, 3), dtype=np.int64), 3, unreadable=3, missing=1)
    assert (scores.evaluated, scores.unreadable, scores.missing, scores.total) == (4, 3, 1, 8)
    assert scores.coverage == 0.5
    assert scores.top1 == 0.75
    assert scores.top1_of_all == 0.375
    assert (scores.top5, scores.top5_of_all) == (1.0, 0.5)


def test_a_class_without_videos_has_no_accuracy_and_leaves_the_class_mean_alone() -> None:
    scores = score(np.array([0, 0, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]]), 3)
    assert scores.per_class[[0, 2]].tolist() == [0.5, 1.0]
    assert math.isnan(scores.per_class[1])
    assert scores.mean_class == 0.75
    assert scores.summary()["per_class"] == [0.5, None, 1.0]


def test_nothing_evaluated_is_nan_not_zero() -> None:
    scores = score(np.array([], dtype=np.int64), np.zeros((0, 2), dtype=np.int64), 2, unreadable=4)
    assert math.isnan(scores.top1)
    assert scores.top1_of_all == 0.0
    assert scores.top1_interval == (0.0, 1.0)
    assert json.loads(json.dumps(scores.summary(), allow_nan=False))["top1"] is None


def test_one_class_is_always_right() -> None:
    scores = score(np.zeros(3, dtype=np.int64), np.zeros((3, 1), dtype=np.int64), 1)
    assert (scores.top1, scores.top5, scores.evaluated) == (1.0, 1.0, 3)


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
