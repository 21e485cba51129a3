"""`kinoray calibrate`: label a set whose classes are known, and fit on it what `label --calibration` takes.

That is the temperature, and the margins at which a video may stop early; or, of a network that gives a video any number
of classes, a threshold for each class. All are stated with what they gave on the set. What is easy to break: a margin
is fitted by replaying exactly what labelling does, the same order of segments and the same rule; and a threshold lies
between two scores of the set, so that rounding moves no video across it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.config.scoring import ScoringConfig, shared_settings
from kinoray.console import many, visible
from kinoray.errors import CatalogError
from kinoray.evaluation.config import CalibrateConfig
from kinoray.evaluation.metrics import calibration_of, f1_of, wilson_interval
from kinoray.evaluation.multilabel import require_truth, true_sets
from kinoray.evaluation.record import true_classes
from kinoray.label.answers import Calibrated, MarginPoint
from kinoray.label.config import LabelConfig
from kinoray.label.job import Workers
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.verb import refuse_too_many_bad, run_labelling
from kinoray.network.scorer import EarlyExit, RunningAnswer, SegmentConsensus, nested_order
from kinoray.storage.objects import Storage, absolute, join

__all__ = [
    "MAX_CHANGED",
    "best_threshold",
    "binary_likelihood_and_error",
    "calibrate",
    "doubts",
    "fit_binary_temperature",
    "fit_margins",
    "fit_temperature",
    "likelihood_and_error",
    "logits_of",
]

MAX_CHANGED = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of changed labels for which a margin is looked for."""
_MARGINS = np.arange(1, 1001) / 1000
_ENOUGH = 1000  # videos
_SHOWN = 5  # names
_EDGE = 1.001  # so near to its limit a temperature is at it
_LOWEST, _HIGHEST = 0.05, 20.0  # temperatures; a set that the model gets wholly right has no best one
_COLUMNS = ["row_key", "status", "scores", "segment_logits"]


def calibrate(config: CalibrateConfig) -> Calibrated:
    """Label the split, fit temperature and margins, write OUT/calibration.json and print what they give.

    Returns:
        What is in calibration.json.

    Raises:
        CatalogError: a video of the split has no label, or none could be read.
        TooManyBad: more than max_bad_fraction were quarantined; calibration.json is written all the same.
        KinorayError: as `label`.
    """
    asked = LabelConfig(
        source=config.catalog,
        out=config.out,
        split=config.split,
        all_scores=True,
        **shared_settings(config, ScoringConfig),
    )
    with Workers(config.resources, "calibrate") as workers:
        labelling = open_labelling(
            asked,
            "calibrate",
            check=require_truth,
            segments=True,
            look=workers.look,
        )
        totals = run_labelling(labelling, config.resources, "calibrate", workers=workers)
    fit = _fit_several if labelling.meta.scores == "sigmoid" else _fit
    calibrated = fit(labelling)
    uri = join(absolute(config.out), "calibration.json")
    Storage(config.storage).put(uri, calibrated.to_json())
    _print(calibrated, uri)
    refuse_too_many_bad(totals, config.max_bad_fraction, labelling.ledger.root)
    return calibrated


def _labelled_rows(labelling: Labelling) -> list[dict[str, Any]]:
    """Raises CatalogError: there is none."""
    rows = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units, _COLUMNS)).to_pylist()
    rows = [row for row in rows if row["status"] == "labelled"]
    if not rows:
        raise CatalogError(f"no video of the catalog could be read, so nothing was fitted; see {labelling.ledger.root}")
    return rows


def _fit_several(labelling: Labelling) -> Calibrated:
    """Temperature and thresholds, where a video may have any number of classes."""
    rows = _labelled_rows(labelling)
    place = {key: index for index, key in enumerate(labelling.found.keys)}
    truth = true_sets(labelling.catalog, labelling.meta.labels)[[place[row["row_key"]] for row in rows]]
    logits = logits_of(np.array([row["scores"] for row in rows], np.float32))
    temperature = fit_binary_temperature(logits, truth)
    errors = [binary_likelihood_and_error(logits, truth, value) for value in (1.0, temperature)]
    scores = np.exp(-np.logaddexp(0.0, -logits / temperature))
    thresholds = tuple(best_threshold(scores[:, c], truth[:, c]) for c in range(truth.shape[1]))
    known = truth.any(axis=0)
    unknown = [labelling.meta.labels[c] for c in np.flatnonzero(~known)]
    if unknown:
        some = ", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else "")
        print(f"calibrate: warning: no video of the set is of {visible(some)}: from 0.5 on a video is called so")
    before, after = (_mean_f1(truth[:, known], (scores >= np.array(least))[:, known]) for least in (0.5, thresholds))
    found = _calibrated(labelling, len(rows), temperature, errors)
    return replace(found, thresholds=thresholds, macro_f1=(before, after))


def _calibrated(
    labelling: Labelling, num_videos: int, temperature: float, errors: Sequence[tuple[float, float]]
) -> Calibrated:
    """With the negative log likelihood and the calibration error before and after."""
    (nll_before, ece_before), (nll_after, ece_after) = errors
    sample = labelling.job.clip.sample
    return Calibrated(
        model_digest=labelling.job.model_digest,
        num_segments=sample.num_segments,
        frames_per_segment=sample.frames_per_segment,
        num_videos=num_videos,
        temperature=temperature,
        nll=(nll_before, nll_after),
        ece=(ece_before, ece_after),
        margins=(),
    )


def logits_of(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """What sigmoid made these scores of; 0 and 1, which float32 rounds to, become the nearest numbers that it has."""
    p = np.clip(scores.astype(np.float64), float(np.finfo(np.float32).tiny), 1 - 2.0**-25)
    return np.asarray(np.log(p) - np.log1p(-p))


def fit_binary_temperature(logits: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """As `fit_temperature`, of the binary cross entropies of all pairs of a video and a class, [N, C]."""

    def slope(b: float) -> float:
        p = np.exp(-np.logaddexp(0.0, -b * logits))
        return float(((p - truth) * logits).mean())

    return _coolest(slope)


def binary_likelihood_and_error(
    logits: NDArray[np.float64], truth: NDArray[np.bool_], temperature: float
) -> tuple[float, float]:
    """Mean binary cross entropy and expected calibration error, over all pairs of a video and a class, [N, C]."""
    x = logits / temperature
    nll = np.logaddexp(0.0, x) - truth * x
    error = calibration_of(np.exp(-np.logaddexp(0.0, -x)).ravel(), truth.ravel()).error
    return float(nll.mean()), error


def best_threshold(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The score from which on a class is best said to hold: that of the highest F1, float [N] and bool [N].

    Half-way to the next lower score, of equally good ones the highest. 0.5 for a class without a video.
    """
    if not truth.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    right = np.cumsum(truth[order])[ends]
    f1 = 2 * right / (ends + 1 + truth.sum())
    end = int(ends[int(f1.argmax())])
    lower = ranked[end + 1] if end + 1 < len(ranked) else 0.0
    return float((ranked[end] + lower) / 2)


def _mean_f1(truth: NDArray[np.bool_], called: NDArray[np.bool_]) -> float:
    values = [
        f1_of(int(truth[:, c].sum()), int(called[:, c].sum()), int((truth & called)[:, c].sum()))[0] or 0.0
        for c in range(truth.shape[1])
    ]
    return sum(values) / len(values) if values else 0.0


def _fit(labelling: Labelling) -> Calibrated:
    rows = _labelled_rows(labelling)
    consensus = labelling.consensus
    classes = dict(zip(labelling.found.keys, true_classes(labelling.catalog, labelling.meta.labels), strict=True))
    truth = np.array([classes[row["row_key"]] for row in rows], np.int64)
    smallest = float(np.finfo(np.float32).tiny)
    logits = np.log(np.maximum(np.array([row["scores"] for row in rows], np.float64), smallest))
    temperature = fit_temperature(logits, truth)
    errors = [likelihood_and_error(logits, truth, value) for value in (1.0, temperature)]
    found = _calibrated(labelling, len(rows), temperature, errors)
    margins = fit_margins(_segments(rows, found.num_segments), consensus) if consensus else ()
    return replace(found, margins=margins)


def _segments(rows: list[dict[str, Any]], num_segments: int) -> NDArray[np.float32]:
    return np.array([row["segment_logits"] for row in rows], np.float32).reshape(len(rows), num_segments, -1)


def _print(calibrated: Calibrated, uri: str) -> None:
    print(
        f"calibrate: temperature {calibrated.temperature:.3f} on {many(calibrated.num_videos, 'video')}: calibration "
        f"error {calibrated.ece[0]:.1%} -> {calibrated.ece[1]:.1%}, loss {calibrated.nll[0]:.3f} -> "
        f"{calibrated.nll[1]:.3f}"
    )
    for text in doubts(calibrated):
        print(f"calibrate: warning: {text}")
    if calibrated.macro_f1:
        before, after = calibrated.macro_f1
        print(
            f"calibrate: thresholds {min(calibrated.thresholds):.3f} .. {max(calibrated.thresholds):.3f}, one a class: "
            f"mean F1 {before:.1%} with 0.5 -> {after:.1%}"
        )
    points = {point.margin: point for point in calibrated.margins}  # the same margin may keep to several shares
    for point in points.values():
        print(
            f"calibrate: early exit at margin {point.margin:.3f}: {many(point.changed, 'label')} changed (at most "
            f"{point.upper:.2%} with 95% certainty), {point.segments_saved:.0%} of the segments saved"
        )
    print(f"calibrate: written to {uri}; use it with: kinoray label ... --calibration {uri}", flush=True)


def doubts(calibrated: Calibrated) -> list[str]:
    """Why what was fitted may not be worth using."""
    found = []
    if calibrated.num_videos < _ENOUGH:
        found.append(f"{many(calibrated.num_videos, 'video')} are few; fit on {_ENOUGH:,} or more")
    if not _LOWEST * _EDGE < calibrated.temperature < _HIGHEST / _EDGE:
        found.append(
            f"the temperature is at its limit ({_LOWEST:g} .. {_HIGHEST:g}): the network is right, or wrong, whatever "
            "its scores are; fit on other videos, or train it longer"
        )
    if calibrated.ece[1] > calibrated.ece[0]:
        found.append("the calibration error has grown, so scores are worse with this temperature than without")
    return found


def fit_temperature(logits: NDArray[np.floating[Any]], truth: NDArray[np.int64]) -> float:
    """The temperature with the lowest mean negative log-likelihood (Guo et al. 2017, section 4.2), in 0.05 .. 20.

    The likelihood of softmax(b * logits) is concave in b = 1 / temperature; bisection finds where its slope is 0.

    Args:
        logits: float [N, C].
        truth: int64 [N], true classes.
    """
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    right = x[np.arange(len(x)), truth]

    def slope(b: float) -> float:
        p = np.exp(b * x)
        p /= p.sum(axis=1, keepdims=True)
        return float(((p * x).sum(axis=1) - right).mean())  # of the loss, rising in b

    return _coolest(slope)


def _coolest(slope: Callable[[float], float]) -> float:
    """The temperature 1 / b at which a slope that rises in b is 0, by bisection."""
    low = math.log(1 / _HIGHEST)
    high = math.log(1 / _LOWEST)
    for _ in range(60):
        middle = (low + high) / 2
        if slope(math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def likelihood_and_error(
    logits: NDArray[np.floating[Any]], truth: NDArray[np.int64], temperature: float
) -> tuple[float, float]:
    """Mean negative log-likelihood and expected calibration error at a temperature."""
    x = logits.astype(np.float64) / temperature
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    error = calibration_of(np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == truth).error
    return float(-log_p[np.arange(len(x)), truth].mean()), error


def fit_margins(segments: NDArray[np.floating[Any]], consensus: SegmentConsensus) -> tuple[MarginPoint, ...]:
    """For each share in MAX_CHANGED the lowest margin that keeps to it, by replaying the labelling of each video.

    Args:
        segments: float [N, S, C], the network's answer for each segment, in order of time.
    """
    num_videos, num_segments, _ = segments.shape
    stages = EarlyExit(margin=1.0).stages(num_segments)
    order = nested_order(num_segments)
    leads = np.empty((num_videos, len(stages)))
    tops = np.empty((num_videos, len(stages)), np.int64)
    for video, answers in enumerate(segments.astype(np.float64)):
        running = RunningAnswer(num_segments, consensus)
        for segment in order[: stages[0] - 1]:
            running.add(answers[segment], 1)
        for place, end in enumerate(stages):
            running.add(answers[order[end - 1]], 1)
            leads[video, place] = running.lead
            tops[video, place] = int(running.logits.argmax())
    leads[:, -1] = np.inf  # the last stage always stops
    stops = np.stack([(leads >= margin).argmax(axis=1) for margin in _MARGINS])
    changed = np.stack([(tops[np.arange(num_videos), stop] != tops[:, -1]).sum() for stop in stops])
    worst = np.maximum.accumulate(changed[::-1])[::-1]  # of this margin and all above it
    points = []
    for share in MAX_CHANGED:
        fits = np.flatnonzero(worst <= share * num_videos)
        place = int(fits[0]) if len(fits) else len(_MARGINS) - 1
        run = np.asarray(stages)[stops[place]].sum()
        points.append(
            MarginPoint(
                max_changed=share,
                margin=float(_MARGINS[place]),
                changed=int(changed[place]),
                upper=wilson_interval(int(changed[place]), num_videos)[1],
                segments_saved=float(1 - run / (num_videos * num_segments)),
            )
        )
    return tuple(points)
