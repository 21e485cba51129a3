"""The tables and the picture of the study (kinoray.tune.study): top-1, what order is worth, and differences in pairs.

Every difference is paired: the same videos, the same seeds. What is easy to break: two trials that answered for
different videos must not be compared, and what is left out is said on the page.
"""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kinoray.config.shared import ModelConfig
from kinoray.console import many
from kinoray.errors import JobError
from kinoray.network.build import build_outline, without_start_weights
from kinoray.network.cost import describe
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.tune.config import apply, trial_id
from kinoray.tune.results import TrialRow
from kinoray.tune.study import GAINS, ORDERS, PAPER_ROWS, ROWS, X_ROW, Answers, Row, read_answers

__all__ = ["PairedGain", "Study", "paired_gain", "study_costs", "study_page", "study_plot"]

_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class PairedGain:
    """How much more often one network is right than another, in points."""

    points: float
    low: float
    """95% interval over videos."""
    high: float
    p: float
    """Two-sided."""


def paired_gain(ours: Mapping[int, NDArray[np.bool_]], theirs: Mapping[int, NDArray[np.bool_]]) -> PairedGain | None:
    """Compare runs of equal seeds on the same videos; None where no seed is in both.

    Of each video the difference is the mean over the seeds of being right, ours less theirs. p is that of a sign test
    by permutation: how often random signs of these differences give a mean as far from 0, of 20,000 draws and the one
    that was found. The interval is normal, from the differences' sample deviation.

    Args:
        ours, theirs: which videos were right, bool [N], by seed.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    difference_N = np.mean([ours[seed].astype(float) - theirs[seed] for seed in seeds], axis=0)
    mean = float(difference_N.mean())
    spread = 1.96 * float(difference_N.std(ddof=1)) / math.sqrt(len(difference_N)) if len(difference_N) > 1 else 1.0
    different_N = difference_N[difference_N != 0]
    rng = np.random.Generator(np.random.PCG64(0))
    num_as_far = 1
    for draws in np.split(np.arange(_DRAWS), 20):
        signs = rng.integers(0, 2, (len(draws), len(different_N))) * 2 - 1
        sums = np.abs(signs @ different_N)
        num_as_far += int(np.count_nonzero(sums >= abs(different_N.sum()) - 1e-9))
    return PairedGain(100 * mean, 100 * (mean - spread), 100 * (mean + spread), num_as_far / (_DRAWS + 1))


def _mean(values: Sequence[float]) -> str:
    """`82.6 +- 5.4`, or the mean alone of a single run; `-` of none."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_costs(base: TrainConfig, rows: Sequence[Row] = ROWS) -> dict[str, int]:
    """Multiply-accumulates of one clip by the title of each row."""
    sample, view = base.clip.sample, base.clip.view
    found = {}
    for row in rows:
        config = apply(replace(base, model=ModelConfig()), row.settings(0, base.model.options)).model
        model = build_outline(without_start_weights(config), 2)
        found[row.title] = describe(model, sample.num_segments, sample.frames_per_segment, view.crop_px).macs
    return found


class Study:
    """What has been found of each row."""

    def __init__(self, storage: Storage, base: TrainConfig, found: Sequence[TrialRow], others: int = 0) -> None:
        """
        Args:
            base: what the trials share; its model.options are those of the rows.
            found: the trials, of rows of ROWS with base.model.options.
            others: how many trials the folder has besides.

        Raises:
            JobError: two of the trials have answered for different videos.
        """
        self.base = base
        self.seeds = sorted({row.settings["optim.seed"] for row in found})
        by_id = {row.trial: row for row in found}
        self.answers: dict[str, dict[int, Answers]] = {row.title: {} for row in ROWS}
        self.left_out: list[str] = []
        first: tuple[str, Answers] | None = None
        for row in ROWS:
            for seed in self.seeds:
                name = trial_id(row.settings(seed, base.model.options))
                if name not in by_id:
                    continue
                answers = read_answers(storage, base.out, name)
                if by_id[name].status != "finished" or answers is None:
                    how = by_id[name].error or f"{by_id[name].status}, no answers"
                    self.left_out.append(f"{row.title}, seed {seed}, trial {name} ({how})")
                    continue
                first = first or (name, answers)
                _require_same_videos(base.out, first, (name, answers))
                self.answers[row.title][seed] = answers
        if others:
            self.left_out.append(f"{many(others, 'trial')} with other model.options")
        self.rows = [row for row in ROWS if self.answers[row.title]]
        """Those with an answer."""
        self.costs = study_costs(base, self.rows)

    def top1(self, row: Row, order: str = "forward") -> list[float]:
        """Percent, a seed each."""
        return [100 * float(one.right(order).mean()) for one in self.answers[row.title].values()]

    def gain(self, row: Row, over: Row) -> PairedGain | None:
        """Of one row over another, both with the frames in order."""
        return paired_gain(self._right(row, "forward"), self._right(over, "forward"))

    def worth(self, row: Row, order: str) -> PairedGain | None:
        """Of the frames in order over those in another order."""
        return paired_gain(self._right(row, "forward"), self._right(row, order))

    def _right(self, row: Row, order: str) -> dict[int, NDArray[np.bool_]]:
        return {seed: one.right(order) for seed, one in self.answers[row.title].items()}

    def best_of_paper(self) -> Row:
        """The row of the paper with the highest mean."""
        return max(PAPER_ROWS, key=lambda row: statistics.fmean(self.top1(row) or [0.0]))


def _require_same_videos(out: str, one: tuple[str, Answers], other: tuple[str, Answers]) -> None:
    """What could be decoded at one time may differ from what could at another."""
    (name, ours), (other_name, theirs) = one, other
    known = bool(ours.videos and theirs.videos)
    if ours.truth != theirs.truth or (known and ours.videos != theirs.videos):
        raise JobError(
            f"{out}: trials {name} and {other_name} have answered for different videos ({len(ours.truth)} and "
            f"{len(theirs.truth)} could be decoded); remove trials/*/orders.json there and run the same command again"
        )


def _about(study: Study) -> str:
    """What the numbers are of, and what is not in them."""
    base = study.base
    some = next((one for row in study.rows for one in study.answers[row.title].values()), None)
    num_videos = len(some.truth) if some else 0
    lost = f" ({some.quarantined:,} more could not be decoded)" if some and some.quarantined else ""
    options = " ".join(f"{name}={value}" for name, value in base.model.options.items())
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"{many(num_videos, 'video')} of {base.val_split} of {base.catalog}{lost}; {many(base.optim.epochs, 'epoch')}, "
        f"seeds {seeds}; {base.clip.sample.num_segments} x {base.clip.sample.frames_per_segment} frames of "
        f"{base.clip.view.crop_px} px; {options}. Means and sample deviations are over the seeds; intervals and p are "
        "over the videos, each p of its own comparison alone."
    ]
    if study.left_out:
        lines.append(f"Left out: {'; '.join(study.left_out)}.")
    seeds_of = {row.title: study.answers[row.title] for row in study.rows}
    fewer = [f"{title} ({', '.join(map(str, of))})" for title, of in seeds_of.items() if len(of) < len(study.seeds)]
    if fewer:
        lines.append(f"Of fewer seeds: {'; '.join(fewer)}. Differences are over the seeds that both rows have.")
    return "\n\n".join(lines)


def _cells(gain: PairedGain | None) -> list[str]:
    """Difference, interval and p."""
    if gain is None:
        return ["-", "-", "-"]
    p = f"{gain.p:.4f}" if gain.p >= 1e-4 else "<0.0001"
    return [f"{gain.points:+.1f}", f"{gain.low:+.1f} to {gain.high:+.1f}", p]


def study_page(study: Study) -> str:
    """Top-1 of every row, its frames in order, reversed and shuffled, its cost, and paired differences: Markdown."""
    table = []
    for row in ROWS:
        paper = "-" if row.paper_top1 is None else f"{row.paper_top1:.1f}"
        cost = f"{study.costs[row.title] / 1e9:.3f}" if row.title in study.costs else "-"
        table.append([row.title, *(_mean(study.top1(row, order)) for order in ORDERS), cost, paper])
    others = ORDERS[1:]
    worth = [[row.title, *(cell for order in others for cell in _cells(study.worth(row, order)))] for row in study.rows]
    best = (X_ROW, study.best_of_paper())
    gains = []
    for row, over in (*GAINS, *([] if best in GAINS else [best])):
        paper = "-"
        if row.paper_top1 is not None and over.paper_top1 is not None:
            paper = f"{row.paper_top1 - over.paper_top1:+.1f}"
        gains.append([f"{row.title} over {over.title}", *_cells(study.gain(row, over)), paper])
    paired = ["95 % interval", "p"]
    tables = (
        _about(study),
        _markdown(["top-1, %", *ORDERS, "GMAC a clip", "paper, K400"], table),
        _markdown(["points", *(name for order in others for name in (f"forward - {order}", *paired))], worth),
        _markdown(["points", "difference", *paired, "paper, K400"], gains),
    )
    return "\n\n".join(tables) + "\n"


_LEFT, _TOP, _WIDTH, _HEIGHT = 50, 24, 420, 300
_LINE = 13  # between two numbers beside points, in the units of the picture
_COLOURS = {"vcm_sdd": "#1f6fb4", "vcm_sdd_x": "#c0392b"}


def study_plot(study: Study) -> str:
    """Top-1 against multiply-accumulates, with the spread over seeds: an SVG picture, which brings its own background.

    Points are numbered; where several lie on each other, their numbers stand one above the other.
    """
    step = _round_step(max(study.costs.values(), default=1) / 1e9 / 6)
    most = step * max(1, math.ceil(max(study.costs.values(), default=1) / 1e9 / step))
    total = _HEIGHT + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {total}" role="img" font-family="sans-serif"',
        ' font-size="12">',
        "<title>Top-1 against multiply-accumulates of a clip</title>",
        f'<rect width="800" height="{total}" fill="white"/>',
    ]
    for share in range(0, 101, 20):
        y = _TOP + _HEIGHT * (1 - share / 100)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share}</text>')
    for number in range(round(most / step) + 1):
        x, y = _LEFT + _WIDTH * number * step / most, _TOP + _HEIGHT + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{number * step:.4g}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 38}" text-anchor="middle">GMAC a clip</text>')
    parts.append(f'<text x="{_LEFT - 40}" y="{_TOP - 10}">top-1, %</text>')
    marks: list[tuple[float, float, str, int]] = []
    for number, row in enumerate(study.rows, 1):
        values = study.top1(row)
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        x = _LEFT + _WIDTH * study.costs[row.title] / 1e9 / most
        ends = (mean, max(0.0, mean - spread), min(100.0, mean + spread))
        y, low, high = (_TOP + _HEIGHT * (1 - value / 100) for value in ends)
        colour = _COLOURS.get(row.factory, "#666")
        marks.append((x, y, colour, number))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="white"/>')
        legend = html.escape(f"{number}  {row.title}: {_mean(values)}")
        parts.append(f'<text x="{_LEFT + _WIDTH + 40}" y="{_TOP + 18 * number}" fill="{colour}">{legend}</text>')
    return "\n".join([*parts, *_numbers(marks), "</svg>", ""])


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below it."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _numbers(marks: Sequence[tuple[float, float, str, int]]) -> list[str]:
    """The number of each point (x, y, colour, number) to its right, the highest first; none on another."""
    parts = []
    taken: list[tuple[float, float]] = []
    for x, y, colour, number in sorted(marks, key=lambda mark: (mark[1], mark[3])):
        at = y
        while any(abs(x - other) < 24 and abs(at - below) < _LINE for other, below in taken):
            at = max(below for other, below in taken if abs(x - other) < 24) + _LINE
        taken.append((x, at))
        if at - y > _LINE / 2:
            parts.append(f'<path d="M{x + 4:.1f} {y:.1f}L{x + 11:.1f} {at:.1f}" stroke="{colour}" stroke-width=".5"/>')
        parts.append(f'<text x="{x + 12:.1f}" y="{at + 4:.1f}" fill="{colour}">{number}</text>')
    return parts
