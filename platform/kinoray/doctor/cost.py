"""From the times of a few decoded videos to those of a whole library: pure arithmetic.

    total_s = num_videos * sum over classes of (share of the class in the probed sample) * (mean time of its decoded)

A class is a codec and a size of frames; bad videos are a class that costs nothing. What is easy to break: the decoded
videos are spread over the classes, so their plain mean is not the library's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kinoray.video.media import VideoInfo

__all__ = ["Estimate", "cost_class", "estimate_total", "size_class", "spread_over_classes"]

_SIZES = (256, 360, 480, 720, 1080, 2160)
_ROUNDS = 2000


def size_class(info: VideoInfo) -> str:
    """`<= 256`, `<= 360`, ... `> 2160`, by the short side in pixels."""
    side = min(info.width, info.height)
    return next((f"<= {limit}" for limit in _SIZES if side <= limit), f"> {_SIZES[-1]}")


def cost_class(info: VideoInfo) -> str:
    """`h264 <= 256`: what decides, before all, how dear a video is to decode."""
    return f"{info.codec} {size_class(info)}"


def spread_over_classes(classes: Sequence[str], count: int) -> list[int]:
    """Rising places of `count` items: two of each class as far as it goes, the largest classes first, then by share.

    Inside a class the first ones are taken.
    """
    sizes = Counter(classes)
    order = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]
    taken: Counter[str] = Counter()
    for _ in range(min(count, len(classes))):
        open_classes = [name for name in order if taken[name] < sizes[name]]
        few = [name for name in open_classes if taken[name] < 2]
        least = min((taken[name] for name in few), default=0)
        first = next((name for name in few if taken[name] == least), None)
        taken[first or max(open_classes, key=lambda name: sizes[name] / (taken[name] + 1))] += 1
    places = []
    for place, name in enumerate(classes):
        if taken[name]:
            taken[name] -= 1
            places.append(place)
    return places


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """CPU seconds for every video of a library."""

    total_s: float
    low_s: float | None
    """Lower end of the 95% bootstrap interval; None where no class has two decoded videos and nothing was sampled."""
    high_s: float | None
    """Its upper end."""
    guessed: tuple[str, ...]
    """Classes of which no video was decoded: they are taken at the mean of all that were."""


def estimate_total(
    num_videos: int, probed: Mapping[str, int], num_bad: int, times_s: Mapping[str, Sequence[float]], *, seed: int = 0
) -> Estimate | None:
    """The time for `num_videos` videos; None if no video was decoded.

    The interval resamples the probed videos (unless all videos were probed) and, in each class, the decoded ones. It
    covers chance in the sample, not what the machine does; a class with one decoded video adds nothing to it.

    Args:
        num_videos: in the library, bad ones among them.
        probed: class -> probed good videos.
        num_bad: probed bad videos.
        times_s: class -> CPU seconds of its decoded videos.
    """
    everything = [time_s for times in times_s.values() for time_s in times]
    if not everything or not probed:
        return None
    names = sorted(probed)
    guessed = tuple(name for name in names if not times_s.get(name))
    samples = [np.asarray(times_s.get(name) or everything, np.float64) for name in names]
    counts = np.array([probed[name] for name in names], np.float64)
    num_probed = int(counts.sum()) + num_bad
    total_s = num_videos * float(np.dot(counts, [sample.mean() for sample in samples])) / num_probed
    is_whole = num_probed >= num_videos
    if is_whole and all(len(sample) < 2 for sample in samples):
        return Estimate(total_s=total_s, low_s=None, high_s=None, guessed=guessed)
    rng = np.random.default_rng(seed)
    shares = np.append(counts, num_bad) / num_probed
    drawn = np.tile(shares, (_ROUNDS, 1)) if is_whole else rng.multinomial(num_probed, shares, _ROUNDS) / num_probed
    means = np.stack([rng.choice(sample, (_ROUNDS, len(sample))).mean(axis=1) for sample in samples], axis=1)
    totals = num_videos * (drawn[:, :-1] * means).sum(axis=1)
    low_s, high_s = np.percentile(totals, [2.5, 97.5])
    return Estimate(total_s=total_s, low_s=float(low_s), high_s=float(high_s), guessed=guessed)
