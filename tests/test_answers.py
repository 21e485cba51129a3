"""What a row says, against loops over single numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kinoray.errors import ConfigError
from kinoray.label.answers import AnswerRule, average_logits, scores_of, top_predictions

LOGITS = np.random.default_rng(0).normal(size=(6, 5)) * 4
LABELS = list("abcde")


def naive_softmax(row: np.ndarray, temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softmax_scores_are_those_of_the_cooled_logits(temperature: float) -> None:
    scores, entropy = scores_of(LOGITS, AnswerRule(temperature=temperature))
    for row, found, bits in zip(LOGITS, scores, entropy, strict=True):
        p = naive_softmax(row, temperature)
        np.testing.assert_allclose(found, p, rtol=1e-12)
        assert bits == pytest.approx(-sum(x * math.log(x) for x in p))


def test_sigmoid_scores_stand_alone_and_only_those_above_the_threshold_are_named() -> None:
    rule = AnswerRule(scores="sigmoid", temperature=2.0, threshold=0.6, top_k=3, all_scores=True)
    for row, answer in zip(LOGITS, top_predictions(LOGITS, LABELS, rule), strict=True):
        p = [sigmoid(x / 2) for x in row]
        ranking = sorted(range(5), key=lambda index: -p[index])
        named = [index for index in ranking[:3] if p[index] >= 0.6]
        assert answer["id_topk"] == named
        assert answer["label_topk"] == [LABELS[index] for index in named]
        np.testing.assert_allclose(answer["scores"], p, rtol=1e-12)
        assert answer["abstained"] == (not named)
        entropy = -sum(x * math.log(x) + (1 - x) * math.log(1 - x) for x in p)
        assert answer["entropy"] == pytest.approx(entropy)
    assert {answer["abstained"] for answer in top_predictions(LOGITS - 4, LABELS, rule)} == {True, False}


def test_each_class_may_have_a_threshold_of_its_own() -> None:
    """A class is named though one with a higher score is not; a row without any is marked."""
    scores = np.array([[0.9, 0.6, 0.3], [0.7, 0.4, 0.2], [0.95, 0.1, 0.29]])
    logits = np.log(scores / (1 - scores))
    rule = AnswerRule(scores="sigmoid", thresholds=(0.92, 0.5, 0.25), top_k=3)
    answers = top_predictions(logits, ["a", "b", "c"], rule)
    assert [answer["label_topk"] for answer in answers] == [["b", "c"], [], ["a", "c"]]
    assert answers[0]["score_topk"] == pytest.approx([0.6, 0.3])
    assert [answer["abstained"] for answer in answers] == [False, True, False]
    assert [answer["margin"] for answer in answers] == pytest.approx([0.3, 0.3, 0.66])
    (first, *_) = top_predictions(logits, ["a", "b", "c"], replace(rule, top_k=1))
    assert first["label_topk"] == ["b"]
    assert "thresholds" not in AnswerRule().record
    assert rule.record["thresholds"] == (0.92, 0.5, 0.25)
    for changes in ({"scores": "softmax"}, {"threshold": 0.5}, {"thresholds": (0.5, 1.5, 0.5)}):
        with pytest.raises(ConfigError, match=r"thresholds must be in 0 \.\. 1, one for each class, with sigmoid"):
            replace(rule, **changes)  # type: ignore[arg-type]


def test_a_row_abstains_below_the_threshold_or_the_margin() -> None:
    logits = np.log(np.array([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]]))
    for threshold, min_margin, expected in (
        (0.0, 0.0, [False, False, False]),
        (0.55, 0.0, [False, False, True]),
        (0.0, 0.3, [True, False, True]),
        (0.95, 0.0, [True, True, True]),
    ):
        rule = AnswerRule(threshold=threshold, min_margin=min_margin)
        answers = top_predictions(logits, ["a", "b"], rule)
        assert [answer["abstained"] for answer in answers] == expected
        assert [answer["label_topk"][0] for answer in answers] == ["a", "a", "a"]  # what it would have said stays


def test_averages_are_of_scores_or_of_logits() -> None:
    np.testing.assert_allclose(average_logits(LOGITS, "logits", "sigmoid"), LOGITS.mean(axis=0), rtol=1e-12)
    mean = average_logits(LOGITS, "probs", "sigmoid")
    for column, logit in zip(LOGITS.T, mean, strict=True):
        assert sigmoid(logit) == pytest.approx(sum(sigmoid(x) for x in column) / len(column), rel=1e-12)
    far = average_logits(np.array([[800.0, -800.0], [900.0, -700.0]]), "probs", "sigmoid")
    assert np.isfinite(far).all()
    assert (average_logits(LOGITS[:1], "probs", "sigmoid") == LOGITS[0]).all()


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 0), ("temperature", 0.0), ("threshold", 1.5), ("min_margin", -0.1)]
)
def test_a_wrong_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        AnswerRule(**{field: value})  # type: ignore[arg-type]
