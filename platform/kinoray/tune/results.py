"""What came of a sweep, read from the trials' own run folders (Ray Tune's snapshots may lag behind them), and its page.

The page is a heat map of two settings, learning curves, and every trial, in one file without a script.

Settings and errors hold other people's text: they reach the page only as escaped text. The figures are plain geometry
here; the template draws them as SVG.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from kinoray.console import table, visible
from kinoray.errors import JobError, ObjectNotFound
from kinoray.page.render import render_page
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json, read_record
from kinoray.train.runfolder import RunFolder
from kinoray.tune.config import Axis, Settings, require_of_space
from kinoray.tune.job import trial_run

__all__ = [
    "REPEATED",
    "TrialRow",
    "best_row",
    "heat_map",
    "known_trials",
    "print_table",
    "ranked",
    "read_outcome",
    "read_trial",
    "require_own_trials",
    "tune_page",
    "write_outcome",
    "write_table",
]

REPEATED = (
    "JobError",
    "ClusterError",
    "StorageError",
    "StorageUnavailable",
    "AccessDenied",
    "BadCredentials",
    "ObjectNotFound",
)
"""Failures that are not the settings' fault: such a trial is tried again when the sweep goes on."""

PLOT_WIDTH = 400.0
PLOT_HEIGHT = 200.0
_MAX_COLUMNS = 8
_MAX_LEGEND = 12
_MAX_TICKS = 8
_FIRST_COLUMN = "optim.lr"
_FIRST_ROW = "clip.sample.num_segments"


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


def write_outcome(storage: Storage, out: str, name: str, outcome: dict[str, str]) -> None:
    """Say how a trial ended: status (finished, stopped or failed), error_class and error_text."""
    storage.put(join(trial_run(out, name), "outcome.json"), json.dumps(outcome).encode())


def read_outcome(storage: Storage, out: str, name: str) -> dict[str, str]:
    """What write_outcome wrote; status "" for a trial that has not ended, or is to be tried again."""
    try:
        return read_record(storage, join(trial_run(out, name), "outcome.json"), _to_outcome)
    except ObjectNotFound:
        return {"status": "", "error_class": "", "error_text": ""}


def _to_outcome(record: dict[str, Any]) -> dict[str, str]:
    return {name: str(record[name]) for name in ("status", "error_class", "error_text")}


def known_trials(storage: Storage, out: str) -> dict[str, Settings]:
    """Trials that have a folder under OUT/trials, with the settings that they began with."""
    prefix = join(out, "trials") + "/"
    found = {}
    for info in storage.list(prefix):
        name, _, rest = info.uri.removeprefix(prefix).partition("/")
        if rest == "trial.json":
            found[name] = read_record(storage, info.uri, lambda record: dict(record["settings"]))
    return found


def require_own_trials(storage: Storage, out: str, axes: Sequence[Axis]) -> None:
    """Refuse a sweep's folder with a trial.json that this sweep cannot have written.

    Raises:
        ConfigError: it holds a setting or a value that is not in the space.
    """
    for info in storage.list(join(out, "trials") + "/"):
        if info.uri.endswith("/trial.json"):
            settings = read_record(storage, info.uri, lambda record: record["settings"])
            require_of_space(axes, settings, info.uri)


def read_trial(storage: Storage, out: str, name: str, settings: Settings) -> TrialRow:
    """One row of the table."""
    outcome = read_outcome(storage, out, name)
    run = trial_run(out, name)
    epochs = RunFolder(storage, run).epochs()
    curve = [(row.epoch, row.val_top1) for row in epochs if row.val_top1 is not None]
    best = max(curve, key=lambda point: (point[1], -point[0])) if curve else None
    return TrialRow(
        trial=name,
        settings=settings,
        status=outcome["status"] or ("unfinished" if curve else "waiting"),
        best_val_top1=best[1] if best else None,
        best_epoch=best[0] if best else None,
        epochs=curve[-1][0] if curve else 0,
        run=run,
        decode_cpu_s=round(sum(row.decode_cpu_s for row in epochs), 2),
        error=": ".join(part for part in (outcome["error_class"], outcome["error_text"]) if part),
        curve=tuple(curve),
    )


def write_table(storage: Storage, out: str, rows: Iterable[TrialRow]) -> None:
    """trials.jsonl, best first."""
    lines = (json.dumps(asdict(row)) for row in rows)
    storage.put(join(out, "trials.jsonl"), ("\n".join(lines) + "\n").encode())


def print_table(rows: Sequence[TrialRow]) -> None:
    """The table for people."""
    paths = sorted({path for row in rows for path in row.settings})
    head = ["trial", *paths, "best val top-1", "epoch", "epochs", "status"]
    cells = [
        (
            row.trial,
            *(_text(row.settings.get(path, "")) for path in paths),
            "-" if row.best_val_top1 is None else f"{row.best_val_top1:.4f}",
            "-" if row.best_epoch is None else str(row.best_epoch),
            str(row.epochs),
            row.status,
        )
        for row in rows
    ]
    numbers = [place for place, path in enumerate(paths, 1) if all(_is_number(row.settings.get(path)) for row in rows)]
    for line in table(cells, head=head, right=[*numbers, *range(len(paths) + 1, len(paths) + 4)]):
        print(line)
    for row in rows:
        if row.error:
            print(f"trial {visible(row.trial)}: {visible(row.error)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ranked(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Best first; trials that failed come last, whatever they reached before: their settings do not work."""

    def key(row: TrialRow) -> tuple[bool, float, str]:
        return row.status == "failed", -(row.best_val_top1 if row.best_val_top1 is not None else -1.0), row.trial

    return sorted(rows, key=key)


def best_row(rows: Sequence[TrialRow], out: str) -> TrialRow:
    """The best of ranked trials. Raises JobError if none has a score and has not failed."""
    scored = [row for row in rows if row.best_val_top1 is not None and row.status != "failed"]
    if not scored:
        reasons = "; ".join(f"trial {row.trial}: {row.error}" for row in rows if row.error) or "none has ended an epoch"
        raise JobError(f"no trial of {out} has a score: {reasons}")
    return scored[0]


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


@dataclass(frozen=True, slots=True)
class _Cell:
    """One square of the heat map: where it is, what it says, and how strong its colour is (0 .. 1)."""

    column: int
    row: int
    text: str
    strength: float


def _cells(grid: _Grid) -> list[_Cell]:
    low = float(np.nanmin(grid.values))
    span = float(np.nanmax(grid.values)) - low
    return [
        _Cell(column, row, f"{100 * value:.1f}", 0.1 + 0.8 * (value - low) / span if span else 0.5)
        for (row, column), value in np.ndenumerate(grid.values)
        if not math.isnan(value)
    ]


@dataclass(frozen=True, slots=True)
class _Curve:
    """The accuracies of one trial as the points of an SVG polyline; only the best have a colour and a name."""

    trial: str
    points: str
    colour: str


@dataclass(frozen=True, slots=True)
class _Curves:
    """Learning curves in a drawing of PLOT_WIDTH x PLOT_HEIGHT, y downwards: from epoch 1 to last, 0% to 100%."""

    ticks: list[tuple[float, int]]
    """Where whole epochs are on the axis: the first, the last, and some between them."""
    curves: list[_Curve]


def _learning_curves(trials: Sequence[TrialRow]) -> _Curves:
    drawn = [row for row in trials if row.curve]
    last = max(epoch for row in drawn for epoch, _ in row.curve)
    curves = []
    for index, row in enumerate(drawn):
        points = " ".join(
            f"{PLOT_WIDTH * (epoch - 1) / max(1, last - 1):.1f},{PLOT_HEIGHT * (1 - value):.1f}"
            for epoch, value in row.curve
        )
        colour = f"hsl({150 * index % 360}, 60%, 50%)" if index < _MAX_LEGEND else ""  # far from the one before
        curves.append(_Curve(row.trial, points, colour))
    step = max(1, math.ceil((last - 1) / _MAX_TICKS))
    epochs = sorted({*range(1, last - step // 2, step), last})  # none so near to the last that their numbers touch
    ticks = [(PLOT_WIDTH * (epoch - 1) / max(1, last - 1), epoch) for epoch in epochs]
    return _Curves(ticks, curves)


def _links(trials: Sequence[TrialRow], out: str) -> dict[str, str]:
    """Where each trial's epochs are, seen from the page in OUT; none of one that lies elsewhere, or has none."""
    folder = absolute(out).rstrip("/") + "/"
    return {
        row.trial: f"{quote(absolute(row.run).removeprefix(folder))}/metrics.jsonl"
        for row in trials
        if row.curve and absolute(row.run).startswith(folder)
    }


def tune_page(summary: dict[str, Any], axes: Sequence[Axis], trials: Sequence[TrialRow]) -> str:
    """The HTML page. `trials` are best first; `summary` is what tune.json holds."""
    is_scored = any(row.best_val_top1 is not None for row in trials)
    heat = heat_map(axes, trials) if is_scored else None
    values = {
        "summary": summary,
        "paths": _order(axes),
        "trials": trials,
        "heat": heat,
        "cells": _cells(heat) if heat else [],
        "plot": _learning_curves(trials) if is_scored else None,
        "places": {row.trial: place for place, row in enumerate(trials, 1)},
        "links": _links(trials, summary["out"]),
        "is_binned": heat is not None and any(" to " in label for label in heat.columns),
    }
    return render_page("tune.html.j2", values, styles=("page.css", "tune.css"))
