"""The run folder's learning curves as one SVG: loss of steps and epochs, accuracy, learning rate."""

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from kinoray.storage.objects import Storage, join
from kinoray.train.runfolder import read_losses, read_metrics

__all__ = ["draw_curves"]

_MAX_POINTS = 1000
_TRAIN, _VAL = "#4c78a8", "#e45756"
Row = dict[str, Any]


def draw_curves(storage: Storage, out: str) -> None:
    """Write out/learning_curves.svg from metrics.jsonl and losses/; nothing is written before the first step's loss."""
    epochs, steps = read_metrics(storage, out), read_losses(storage, out)
    if not steps:
        return
    figure = Figure(figsize=(9, 7), layout="constrained")  # not pyplot: a worker's thread draws, too
    FigureCanvasSVG(figure)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    last = {row["epoch"]: row["step"] for row in steps}
    first = {row["epoch"]: row["step"] for row in reversed(steps)}
    longest = max(last[epoch] - first[epoch] + 1 for epoch in last)  # the newest epoch may have only begun
    at = [row["step"] / longest for row in steps]
    places, values = _thinned(at, [row.get("loss", math.nan) for row in steps])
    loss.plot(places, values, color=_TRAIN, alpha=0.35, linewidth=0.8, label="train, steps")
    _line(loss, epochs, "loss", _TRAIN, "train")
    _line(loss, epochs, "val_loss", _VAL, "val")
    loss.set_ylabel("cross entropy")
    for name, colour, label in (("top1", _TRAIN, "train top-1"), ("val_top1", _VAL, "val top-1")):
        _line(accuracy, epochs, name, colour, label)
    _line(accuracy, epochs, "val_top5", "#f2a29b", "val top-5")
    accuracy.set_ylabel("accuracy")
    accuracy.set_ylim(0, 1)
    places, values = _thinned(at, [row["lr"] for row in steps])
    rate.plot(places, values, color="#54a24b", linewidth=1.0)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epochs")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    storage.put(join(out, "learning_curves.svg"), content.getvalue())


def _line(axes: Axes, rows: Sequence[Row], name: str, colour: str, label: str) -> None:
    """The metric of the epochs that have it, each at its end."""
    known = [(row["epoch"], row[name]) for row in rows if name in row]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, linewidth=1.5, label=label)


def _thinned(places: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _MAX_POINTS points: means of neighbours, where there are more."""
    size = -(-len(values) // _MAX_POINTS)
    if size == 1:
        return list(places), list(values)
    means, middles = [], []
    for start in range(0, len(values), size):
        group = [value for value in values[start : start + size] if not math.isnan(value)]
        means.append(sum(group) / len(group) if group else math.nan)
        middles.append(places[min(start + size // 2, len(places) - 1)])
    return middles, means
