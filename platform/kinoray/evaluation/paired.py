"""Two models on the same videos: is one better, or is it chance? Exact where it can be, no approximation unsaid."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinoray.evaluation.accuracy import Z95, wilson_interval

__all__ = ["Paired", "mcnemar_p", "pair"]


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split of the disagreements is by chance.

    only_a and only_b are the videos that one of the two got right and the other wrong. Under the null hypothesis they
    fall to either side with probability 1/2: p = min(1, 2 * sum_{k <= min} C(n, k) / 2^n), n = only_a + only_b, summed
    in whole numbers.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    term = total = 1  # C(n, 0)
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
        right_a, right_b = self.both + self.only_a, self.both + self.only_b
        (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, n, Z95), wilson_interval(right_b, n, Z95)
        a, b, phi = right_a / n, right_b / n, self._phi
        below = _joined(b - low_b, high_a - a, phi)
        above = _joined(high_b - b, a - low_a, phi)
        return max(-1.0, self.difference - below), min(1.0, self.difference + above)

    @property
    def _phi(self) -> float:
        """Correlation of right and wrong in A and B, with Newcombe's continuity correction."""
        a, b, c, d, n = self.both, self.only_a, self.only_b, self.neither, self.total
        scale = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        if not scale:
            return 0.0
        product = a * d - b * c
        return (max(product - n / 2, 0.0) if product > 0 else product) / scale


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
