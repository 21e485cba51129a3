"""Anytime labelling: segments of a video one by one, until the others cannot change, or hardly change, its top-1.

For a network whose answer is the mean over segments of probabilities, the running sum of k of S segments leads by
sum_1 - sum_2, and each of the S - k others adds at most 1 to that of another class: a lead of more than S - k is final.
What is easy to break: segments come in nested order, so that those seen first are spread over the whole video.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kinoray.config.shared import require

__all__ = ["EarlyExit", "RunningAnswer", "SegmentConsensus", "nested_order"]

SegmentConsensus = Literal["logits", "probs"]
"""What a network averages over its segments; those of which `segment_consensus` says so run on any part of them."""

_ROUNDING = 1e-5  # a lead by less than this, in segments, is not taken for one: other batches round otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyExit:
    """When a video may stop; part of a result's digest."""

    margin: float | None = None
    """Lead of the running answer's first probability above its second from which it counts as settled. None: only what
    cannot change any more stops (exactly the full pass's top-1)."""

    def __post_init__(self) -> None:
        require(self.margin is None or 0 <= self.margin <= 1, "margin", "in 0 .. 1", self.margin)

    def stages(self, num_segments: int) -> list[int]:
        """Segments that have been seen at the end of each stage, rising, the last one all of them.

        No lead can exceed the rest before more than half are seen; a margin is asked for from the second one on.
        """
        first = num_segments // 2 + 1 if self.margin is None else min(2, num_segments)
        return list(range(min(first, num_segments), num_segments + 1))


def nested_order(num_segments: int) -> np.ndarray:
    """All segments, int64 [S], any beginning of it spread over the video: 0, 8, 4, 12, 2, ... of 16 (van der Corput).

    The places of the bit-reversed numbers below the next power of two, those that are not segments left out.
    """
    bits = max(1, math.ceil(math.log2(max(2, num_segments))))
    reversed_places = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(2**bits)]
    return np.array([place for place in reversed_places if place < num_segments], np.int64)


class RunningAnswer:
    """The mean over the segments seen so far of one video."""

    def __init__(self, num_segments: int, consensus: SegmentConsensus) -> None:
        self.num_segments, self.consensus = num_segments, consensus
        self.seen = 0
        self._total: np.ndarray | float = 0.0

    def add(self, logits: np.ndarray, count: int) -> None:
        """The network's answer, float64 [C], for `count` more segments."""
        self._total = self._total + count * (np.exp(logits) if self.consensus == "probs" else logits)
        self.seen += count

    @property
    def logits(self) -> np.ndarray:
        """float64 [C]: what the network says of the segments seen, as it says it (logarithms with "probs")."""
        mean = np.asarray(self._total) / self.seen
        return np.log(np.maximum(mean, np.finfo(np.float64).tiny)) if self.consensus == "probs" else mean

    @property
    def lead(self) -> float:
        """Of the mean's first probability above its second, in 0 .. 1."""
        logits = self.logits
        if len(logits) < 2:
            return 1.0
        shifted = np.exp(logits - logits.max())
        second, first = np.sort(shifted / shifted.sum())[-2:]
        return float(first - second)

    def is_settled(self, rule: EarlyExit) -> bool:
        """Whether no more segments are needed. Without a margin only a mean of probabilities can be."""
        left = self.num_segments - self.seen
        if left == 0:
            return True
        if rule.margin is not None:
            return self.lead >= rule.margin
        return self.consensus == "probs" and self.seen * self.lead > left + _ROUNDING
