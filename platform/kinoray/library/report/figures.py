"""Figures of the report as plain geometry: the template draws them as SVG or table cells, so that names stay escaped
text and colours follow the reader's light or dark theme.
"""

import base64
from dataclasses import dataclass

import cv2
import numpy as np

from kinoray.evaluation.metrics import Calibration
from kinoray.library.report.numbers import Confusion

__all__ = [
    "Bar",
    "Confused",
    "Mark",
    "confused_pairs",
    "confusion_picture",
    "histogram_bars",
    "reliability_marks",
    "shade",
]

HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 400.0, 120.0
NUM_SHADES = 10
_KINDS = ("right", "wrong", "unknown")


@dataclass(frozen=True, slots=True)
class Bar:
    """One rectangle of the histogram in drawing units, y downwards; `hint` is what it says under the pointer."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    hint: str
    values: str
    """The values that it counts, as the site's filters take them: `0.45..0.5`."""


@dataclass(frozen=True, slots=True)
class Confused:
    """One kind of mistake: `count` videos of class `true` were called `predicted`."""

    true: str
    predicted: str
    count: int


def histogram_bars(histogram: np.ndarray, what: str) -> list[Bar]:
    """Stacked bars of int64 [3, bins] (right, wrong, unknown over values 0 .. 1); the highest fills the height.

    Args:
        what: name of the value, for the hints.
    """
    num_bins = histogram.shape[1]
    unit = HISTOGRAM_HEIGHT / max(1, int(histogram.sum(axis=0).max()))
    width = HISTOGRAM_WIDTH / num_bins
    bars: list[Bar] = []
    for index, column in enumerate(histogram.T.tolist()):
        floor = HISTOGRAM_HEIGHT
        counted = ", ".join(f"{n} {kind}" for n, kind in zip(column, _KINDS, strict=True) if n and kind != "unknown")
        low, high = index / num_bins, (index + 1) / num_bins
        hint = f"{what} {low:.2f} to {high:.2f}: {sum(column)} videos"
        for number, kind in zip(column, _KINDS, strict=True):
            if number:
                height = number * unit
                floor -= height
                hint_here = f"{hint} ({counted})" if counted else hint
                place = (index * width + 1, round(floor, 2), width - 2, round(height, 2))
                bars.append(Bar(*place, kind, hint_here, f"{low:g}..{high:g}"))
    return bars


RELIABILITY_SIDE = 200.0


@dataclass(frozen=True, slots=True)
class Mark:
    """One bin of the reliability plot in drawing units, y downwards: a dot whose area is the bin's share of videos."""

    x: float
    y: float
    radius: float
    hint: str


def reliability_marks(calibration: Calibration) -> list[Mark]:
    """A dot for each bin that has videos, at (mean score, accuracy); well calibrated scores lie on the diagonal."""
    side, total = RELIABILITY_SIDE, max(1, int(calibration.videos.sum()))
    marks = []
    for item in calibration.summary().bins:
        if item.mean_score is not None and item.accuracy is not None:
            hint = (
                f"score {item.low:.2f} to {item.high:.2f}: {item.videos} videos, mean score {item.mean_score:.3f}, "
                f"{item.accuracy:.1%} right"
            )
            radius = 2 + 10 * (item.videos / total) ** 0.5
            x = side * item.mean_score
            y = side * (1 - item.accuracy)
            marks.append(Mark(round(x, 2), round(y, 2), round(radius, 2), hint))
    return marks


def shade(confusion: Confusion) -> list[list[int]]:
    """For each cell its share of the row as a step 0 .. 10; a count above zero never gets step 0."""
    share = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    steps: list[list[int]] = np.ceil(share * NUM_SHADES).astype(int).tolist()
    return steps


def confusion_picture(confusion: Confusion) -> str:
    """Data URI of a PNG, one pixel a cell: opacity is the share of the row, so that it suits any background."""
    share = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    bgra = np.zeros((*confusion.counts.shape, 4), np.uint8)
    bgra[..., :3] = (205, 125, 45)
    bgra[..., 3] = np.where(confusion.counts > 0, 40 + np.round(share * 215), 0)
    _, png = cv2.imencode(".png", bgra)
    return f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode('ascii')}"


def confused_pairs(confusion: Confusion, most: int) -> list[Confused]:
    """The most frequent mistakes, at most `most`, frequent ones first, then in the order of the classes."""
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, wrong.shape)
    names = confusion.names
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [Confused(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
