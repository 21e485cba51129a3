"""Fitting what `label --calibration` takes: the temperature, and the margins at which a video may stop early.

Both are fitted on one set and stated with what they gave there. What is easy to break: a margin is fitted by replaying
exactly what labelling does, the same order of segments and the same rule.
"""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinoray.evaluation.accuracy import wilson_interval
from kinoray.evaluation.calibration_error import calibrate
from kinoray.label.calibration import Calibrated, MarginPoint
from kinoray.network.anytime import EarlyExit, RunningAnswer, SegmentConsensus, nested_order

__all__ = ["MAX_CHANGED", "fit_margins", "fit_temperature", "likelihood_and_error", "to_json"]


MAX_CHANGED = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of changed labels for which a margin is looked for."""
_MARGINS = np.arange(1, 1001) / 1000
_LOWEST, _HIGHEST = 0.05, 20.0  # temperatures; a set that the model gets wholly right has no best one


def to_json(calibrated: Calibrated) -> bytes:
    """The file's bytes."""
    return json.dumps(asdict(calibrated), indent=1).encode()


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

    low, high = math.log(1 / _HIGHEST), math.log(1 / _LOWEST)
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
    error = calibrate(np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == truth).error
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
            leads[video, place], tops[video, place] = running.lead, int(running.logits.argmax())
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
