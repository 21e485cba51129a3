"""The page of a sweep: a heat map of two settings, learning curves, and every trial, in one file without a script.

Settings and errors hold other people's text: they reach the page only as escaped text, and pictures as PNG.
"""

import base64
import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kinoray.console import visible
from kinoray.page import render_page
from kinoray.storage.records import parse_json
from kinoray.tune.space import Axis

__all__ = ["TrialRow", "heat_map", "tune_page"]

_MAX_COLUMNS = 8
_MAX_LEGEND = 12
_FIRST_COLUMN, _FIRST_ROW = "optim.lr", "clip.sample.num_segments"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """What came of one trial."""

    trial: str
    """Its id, the name of its folder under OUT/trials."""
    settings: dict[str, Any]
    """What differs from the other trials, by setting path."""
    status: str
    """finished, stopped (by the scheduler), failed, unfinished or waiting."""
    best_val_top1: float | None
    """Highest accuracy on val_split after any epoch; None before the first."""
    best_epoch: int | None
    epochs: int
    """Epochs trained."""
    run: str
    """Run folder with the best epoch."""
    decode_cpu_s: float
    """CPU seconds of the trial's decode tasks."""
    error: str
    """Why it failed."""
    curve: tuple[tuple[int, float], ...]
    """(epoch, val_top1) of every epoch."""


def _order(axes: Sequence[Axis]) -> list[str]:
    """Setting paths, those that the heat map shows first: columns, then rows."""
    paths = [axis.path for axis in axes]
    return sorted(paths, key=lambda path: (path != _FIRST_COLUMN, path != _FIRST_ROW, paths.index(path)))


@dataclass(frozen=True, slots=True)
class _Grid:
    """Best accuracy by column and row; NaN where no trial is."""

    column_path: str
    row_path: str
    columns: list[str]
    rows: list[str]
    values: np.ndarray


def _ticks(trials: Sequence[TrialRow], path: str) -> tuple[list[str], list[int]]:
    """Labels of an axis, and each trial's place on it; many numbers are put into bins."""
    values = [row.settings.get(path) for row in trials]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    distinct = sorted({json.dumps(value) for value in values})
    if len(numbers) == len(values):
        ordered = sorted(set(numbers))
        if len(ordered) > _MAX_COLUMNS:
            is_log = ordered[0] > 0 and ordered[-1] / ordered[0] >= 10
            make = np.geomspace if is_log else np.linspace
            edges = make(ordered[0], ordered[-1], _MAX_COLUMNS + 1)
            places = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, _MAX_COLUMNS - 1)
            return [f"{a:.2g} to {b:.2g}" for a, b in itertools.pairwise(edges)], places.tolist()
        return [f"{value:g}" for value in ordered], [ordered.index(value) for value in numbers]
    labels = [str(parse_json(text)) for text in distinct]
    return labels, [distinct.index(json.dumps(value)) for value in values]


def heat_map(axes: Sequence[Axis], trials: Sequence[TrialRow]) -> _Grid:
    """The grid of the first two settings: optim.lr and clip.sample.num_segments if they are searched."""
    paths = [*_order(axes), ""]
    scored = [row for row in trials if row.best_val_top1 is not None]
    columns, column_of = _ticks(scored, paths[0])
    rows, row_of = _ticks(scored, paths[1]) if paths[1] else ([""], [0] * len(scored))
    values = np.full((len(rows), len(columns)), math.nan)
    for trial, row, column in zip(scored, row_of, column_of, strict=True):
        assert trial.best_val_top1 is not None
        values[row, column] = np.fmax(values[row, column], trial.best_val_top1)
    return _Grid(paths[0], paths[1], columns, rows, values)


def _picture(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _heat_picture(grid: _Grid) -> str:
    figure = Figure(figsize=(7.0, 1.6 + 0.5 * len(grid.rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * grid.values, cmap="viridis", aspect="auto")
    # No mathematics: a dollar sign in a setting's value is a dollar sign.
    axes.set_xticks(range(len(grid.columns)), [visible(label)[:30] for label in grid.columns], parse_math=False)
    axes.set_yticks(range(len(grid.rows)), [visible(label)[:30] for label in grid.rows], parse_math=False)
    axes.set_xlabel(grid.column_path, parse_math=False)
    axes.set_ylabel(grid.row_path, parse_math=False)
    middle = (np.nanmin(grid.values) + np.nanmax(grid.values)) / 2
    for (row, column), value in np.ndenumerate(grid.values):
        if not math.isnan(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=ink)
    figure.colorbar(image, label="best val top-1, %")
    return _picture(figure)


def _curve_picture(trials: Sequence[TrialRow]) -> str:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(row for row in trials if row.curve):
        epochs, values = zip(*row.curve, strict=True)
        strong = index < _MAX_LEGEND
        style: dict[str, Any] = (
            {"label": row.trial, "linewidth": 1.4} if strong else {"color": "0.75", "linewidth": 0.8, "zorder": 1}
        )
        axes.plot(epochs, [100 * value for value in values], marker=".", **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel("val top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    return _picture(figure)


def tune_page(summary: dict[str, Any], axes: Sequence[Axis], trials: Sequence[TrialRow]) -> str:
    """The HTML page. `trials` are best first; `summary` is what tune.json holds."""
    is_scored = any(row.best_val_top1 is not None for row in trials)
    values = {
        "summary": summary,
        "paths": _order(axes),
        "trials": trials,
        "heat": _heat_picture(heat_map(axes, trials)) if is_scored else "",
        "curves": _curve_picture(trials) if is_scored else "",
        "is_binned": is_scored and any(" to " in label for label in heat_map(axes, trials).columns),
    }
    return render_page("tune.html.j2", values, styles=("tune.css",))
