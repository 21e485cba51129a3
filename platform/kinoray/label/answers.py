"""From logits to what a row says: scores, the likeliest classes, margin, entropy, and whether the model abstains.

Pure functions in float64; and what `kinoray calibrate` found for a model, as it is written and read. What is easy to
break: the temperature is applied once, to the logits of the whole video, after its views and windows have become one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kinoray.config.scoring import ScoreKind, ViewAverage
from kinoray.config.shared import ClipConfig, require
from kinoray.errors import CheckpointMismatch, ConfigError
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import parse_json, record_of

__all__ = [
    "AnswerRule",
    "Calibrated",
    "MarginPoint",
    "average_logits",
    "load_calibration",
    "scores_of",
    "top_predictions",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRule:
    """How logits become an answer; part of a result's digest."""

    top_k: int = 5
    """Classes named; all of them if there are fewer."""
    scores: ScoreKind = "softmax"
    """`softmax`: one class a video, scores add up to 1. `sigmoid`: any number of classes, each with a score of its
    own; only those that reach the threshold are named."""
    temperature: float = 1.0
    """Logits are divided by it before they become scores (Guo et al. 2017, section 4.2)."""
    threshold: float = 0.0
    """Where the first score is lower, the row is marked as abstained."""
    thresholds: tuple[float, ...] = ()
    """Of each class, instead of `threshold`; of sigmoid scores. A row without a class is marked as abstained."""
    min_margin: float = 0.0
    """Where the first score is less than this above the second, too."""
    all_scores: bool = False
    """The score of every class, too."""

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "top_k", "at least 1", self.top_k)
        require(self.temperature > 0, "temperature", "greater than 0", self.temperature)
        require(0 <= self.threshold <= 1, "threshold", "in 0 .. 1", self.threshold)
        require(0 <= self.min_margin <= 1, "min_margin", "in 0 .. 1", self.min_margin)
        wanted = "in 0 .. 1, one for each class, with sigmoid scores and without threshold"
        alone = self.scores == "sigmoid" and not self.threshold and all(0 <= value <= 1 for value in self.thresholds)
        require(alone or not self.thresholds, "thresholds", wanted, self.thresholds)

    @property
    def record(self) -> dict[str, Any]:
        """As JSON: without thresholds, where there are none, as it was before there were any."""
        tree = asdict(self)
        if not self.thresholds:
            del tree["thresholds"]
        return tree


def top_predictions(logits: np.ndarray, labels: Sequence[str], rule: AnswerRule) -> list[dict[str, Any]]:
    """The prediction columns of each video. Of equal scores the lower id comes first.

    Args:
        logits: float [B, C], all finite.
        labels: C class names.
    """
    scores, entropy = scores_of(logits, rule)
    order = np.argsort(-scores, axis=1, kind="stable")
    least = np.array(rule.thresholds or [rule.threshold] * len(labels))
    answers = []
    for row, ids in enumerate(order):
        first = scores[row, ids[0]]
        margin = float(first - (scores[row, ids[1]] if len(ids) > 1 else 0.0))
        abstained = first < rule.threshold
        if rule.scores == "sigmoid":
            ids = ids[scores[row, ids] >= least[ids]]
            abstained = not len(ids)
        best = ids[: rule.top_k]
        answers.append(
            {
                "label_topk": [labels[index] for index in best],
                "id_topk": best.tolist(),
                "score_topk": scores[row, best].tolist(),
                "margin": margin,
                "entropy": float(entropy[row]),
                "abstained": bool(abstained or margin < rule.min_margin),
            }
            | ({"scores": scores[row]} if rule.all_scores else {})
        )
    return answers


def scores_of(logits: np.ndarray, rule: AnswerRule) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B, C] and their entropy [B] in nats (sigmoid: the sum over the classes, each a yes or no of its own)."""
    cooled = logits.astype(np.float64) / rule.temperature
    if rule.scores == "softmax":
        log_p = _log_softmax(cooled)
        p = np.exp(log_p)
        return p, -(p * log_p).sum(axis=1)
    log_p, log_not_p = _log_sigmoids(cooled)
    p = np.exp(log_p)
    return p, -(p * log_p + np.exp(log_not_p) * log_not_p).sum(axis=1)


def average_logits(logits: np.ndarray, average: ViewAverage, scores: ScoreKind = "softmax") -> np.ndarray:
    """Logits of a video from those of its views or windows, float64 [V, C] -> [C]; a single one stays as it is.

    average="logits": their mean. "probs": logits whose scores are the mean of the scores of all.
    """
    if len(logits) == 1:
        return np.asarray(logits[0])
    if average == "logits":
        return np.asarray(logits.mean(axis=0))
    if scores == "softmax":
        return _log_mean_exp(_log_softmax(logits))
    log_p, log_not_p = _log_sigmoids(logits)
    return np.asarray(_log_mean_exp(log_p) - _log_mean_exp(log_not_p))


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    """log(mean(exp(x))) over the first axis."""
    highest = x.max(axis=0)
    return np.asarray(highest + np.log(np.exp(x - highest).mean(axis=0)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [B, C]"""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _log_sigmoids(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(sigmoid(x)) and log(1 - sigmoid(x)), float64."""
    x = logits.astype(np.float64)
    return -np.logaddexp(0.0, -x), -np.logaddexp(0.0, x)


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginPoint:
    """One margin, and what stopping there did to the calibration set."""

    max_changed: float
    """The share of videos that may get another top-1 than the full pass gives."""
    margin: float
    """The lowest margin from which on no higher one changed more."""
    changed: int
    """Videos of the set that did get another."""
    upper: float
    """Upper end of the 95% interval (Wilson) of that share: what may be expected of other videos."""
    segments_saved: float
    """Share of all segments that were not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """The file that `kinoray calibrate` writes."""

    model_digest: str
    num_segments: int
    frames_per_segment: int
    num_videos: int
    """Labelled videos of the set that were read."""
    temperature: float
    nll: tuple[float, float]
    """Mean negative log-likelihood at temperature 1, and at this one."""
    ece: tuple[float, float]
    """Expected calibration error at temperature 1, and at this one."""
    margins: tuple[MarginPoint, ...]
    """Empty for a network that does not see its segments one by one, or was trained on label lists."""
    thresholds: tuple[float, ...] = ()
    """Of a network that was trained on label lists: of each class the score with the highest F1 on the set."""
    macro_f1: tuple[float, float] | None = None
    """Mean F1 of the classes that the set has: with 0.5 for all, and with these."""

    def to_json(self) -> bytes:
        """The file's bytes; what is of label lists only where there are any."""
        tree = asdict(self)
        if not self.thresholds:
            del tree["thresholds"], tree["macro_f1"]
        return json.dumps(tree, indent=1).encode()

    def margin_for(self, max_changed: float, clip: ClipConfig) -> float:
        """The margin at which at most this share of the calibration set changed its top-1.

        Raises:
            ConfigError: it was not fitted, or for other clips.
        """
        sample = clip.sample
        if (sample.num_segments, sample.frames_per_segment) != (self.num_segments, self.frames_per_segment):
            raise ConfigError(
                f"calibration was made for {self.num_segments} x {self.frames_per_segment} frames, this labelling has "
                f"{sample.num_segments} x {sample.frames_per_segment}; run kinoray calibrate with the same protocol"
            )
        fitting = [point for point in self.margins if point.max_changed <= max_changed]
        if not fitting:
            raise ConfigError("calibration holds no margins: this network does not see its segments one by one")
        return fitting[-1].margin


def load_calibration(storage: Storage, uri: str, model_digest: str) -> Calibrated:
    """Read what `kinoray calibrate` wrote.

    Raises:
        StorageError: it cannot be read.
        ConfigError: it is not such a file.
        CheckpointMismatch: it is another model's.
    """
    place = absolute(uri)
    try:
        found = record_of(Calibrated)(parse_json(storage.read(place)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place} is not the calibration.json of kinoray calibrate: {error!r}") from error
    if found.model_digest != model_digest:
        raise CheckpointMismatch(
            f"{place} calibrates model {found.model_digest}, the checkpoint is {model_digest}; run kinoray calibrate "
            "with this checkpoint"
        )
    return found
