"""Calibration: how far the first score of an answer may be taken for the chance that it is right.

Everything inside is an exact integer, scores too, so parts add up to the whole in any order, digit by digit.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "calibrate"]

NUM_BINS = 15
_UNIT = 2**36
"""Scores are counted in 1 / _UNIT: exact for a float32 of at least 2^-13, which a first score is with 8192 classes."""


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

    def summary(self) -> dict[str, Any]:
        """JSON-able: ece, mean_score, and the reliability table (accuracy and mean score are None in an empty bin)."""
        bins = []
        for index in range(NUM_BINS):
            videos, right, units = (int(counts[index]) for counts in (self.videos, self.right, self.score_units))
            bins.append(
                {
                    "low": index / NUM_BINS,
                    "high": (index + 1) / NUM_BINS,
                    "videos": videos,
                    "accuracy": right / videos if videos else None,
                    "mean_score": units / (videos * _UNIT) if videos else None,
                }
            )
        counted = bool(self.videos.sum())
        return {
            "ece": self.error if counted else None,
            "mean_score": self.mean_score if counted else None,
            "bins": bins,
        }


def calibrate(scores: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> Calibration:
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
    videos, hits = (np.bincount(which, minlength=NUM_BINS).astype(np.int64) for which in (bins, bins[right]))
    return Calibration(videos, hits, sums)
