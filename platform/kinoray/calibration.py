"""What a labelled set teaches about a model's scores: the temperature, and the margin at which a video may stop early.

Both are fitted on one set and stated with what they gave there; `label --calibration` takes the file. What is easy to
break: the margin is fitted by replaying exactly what labelling does, the same order of segments and the same rule.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinoray.anytime import EarlyExit, RunningAnswer, SegmentConsensus, nested_order
from kinoray.config.shared import ClipConfig
from kinoray.errors import CheckpointMismatch, ConfigError
from kinoray.metrics.accuracy import wilson_interval
from kinoray.metrics.calibration import calibrate
from kinoray.storage.objects import Storage, absolute

__all__ = [
    "MAX_CHANGED",
    "Calibrated",
    "MarginPoint",
    "fit_margins",
    "fit_temperature",
    "likelihood_and_error",
    "load_calibration",
    "to_json",
]

MAX_CHANGED = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of changed labels for which a margin is looked for."""
_MARGINS = np.arange(1, 1001) / 1000
_LOWEST, _HIGHEST = 0.05, 20.0  # temperatures; a set that the model gets wholly right has no best one


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
    """Empty for a network that does not see its segments one by one."""

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
        record = json.loads(storage.read(place))
        record["margins"] = tuple(MarginPoint(**point) for point in record["margins"])
        found = Calibrated(**record | {name: tuple(record[name]) for name in ("nll", "ece")})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{place} is not the calibration.json of kinoray calibrate: {error!r}") from error
    if found.model_digest != model_digest:
        raise CheckpointMismatch(
            f"{place} calibrates model {found.model_digest}, the checkpoint is {model_digest}; run kinoray calibrate "
            "with this checkpoint"
        )
    return found


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
