"""The study of the paper's table 2: its four rows, TSN and TSM as trials of a sweep, and the table that comes of them.

Every trial is scored by its last epoch: nothing is chosen by looking at the videos that it is scored on.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kinoray.tune.results import TrialRow
from kinoray.tune.space import Settings, trial_id

__all__ = ["ROWS", "Row", "study_page", "study_trials"]

_SCALES = ("frobenius", "dim")
"""MFF's two scales: as printed in the paper, and the root of the channels per head."""


@dataclass(frozen=True, slots=True)
class Row:
    """One network of the study. Rows with MFF are trained with each scale."""

    title: str
    """What the table calls it."""
    factory: str
    """A short name of a network."""
    options: Mapping[str, Any]
    """Its own options, beside those that the study gives all networks."""
    paper_top1: float | None = None
    """Kinetics-400 top-1 in the paper, percent (tables 2 and 3)."""
    has_scale: bool = False
    """Whether MFF is on, so that its scale matters."""

    def settings(self, scale: str, seed: int, options: Mapping[str, Any]) -> Settings:
        """What its trial with a scale and a seed sets."""
        own = dict(self.options) | ({"scale": scale} if self.has_scale else {})
        if self.factory == "vcm_sdd":
            own = {**options, **own}
        else:
            own = {name: value for name, value in options.items() if name.startswith("backbone")} | own
        chosen = {f"model.options.{name}": value for name, value in own.items()}
        return {"model.factory": self.factory, "optim.seed": seed, **chosen}


# No dropout in TSN and TSM: the rows of table 2 have none.
ROWS = (
    Row("TSN, RGB", "tsn", {"modality": "rgb", "dropout": 0.0}, 71.3),
    Row("TSN, flow", "tsn", {"modality": "flow", "dropout": 0.0}),
    Row("TSM, RGB", "tsm", {"modality": "rgb", "dropout": 0.0}, 75.1),
    Row("No_STC No_MFF", "vcm_sdd", {"stc": False, "mff": False}, 71.7),
    Row("STC No_MFF", "vcm_sdd", {"stc": True, "mff": False}, 73.9),
    Row("No_STC MFF", "vcm_sdd", {"stc": False, "mff": True}, 78.5, has_scale=True),
    Row("STC MFF", "vcm_sdd", {"stc": True, "mff": True}, 80.1, has_scale=True),
)
"""Single streams, and the four rows of table 2."""
_NEITHER, _STC, _MFF, _BOTH = ROWS[3:]
_GAINS = ((_STC, _NEITHER), (_MFF, _NEITHER), (_BOTH, _MFF), (_BOTH, _NEITHER))


def study_trials(options: Mapping[str, Any], seeds: Sequence[int]) -> list[Settings]:
    """All trials, seed by seed, so that a study cut short has whole tables of its first seeds.

    Args:
        options: of every network (backbone, ...); those that are not the backbone's are VCM-SDD's alone.
    """
    trials = [row.settings(scale, seed, options) for seed in seeds for row in ROWS for scale in _SCALES]
    return list({trial_id(settings): settings for settings in trials}.values())  # rows without MFF have no scale


def _mean(values: Sequence[float], form: str = ".1f") -> str:
    """`82.6 +- 5.4`, or the mean alone of a single run; `-` of none."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_page(found: Sequence[TrialRow], options: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """Top-1 of every row, and what STC and MFF add, beside the paper's figures: Markdown.

    Means and sample deviations are over the seeds; a difference is taken between runs of one seed. Trials that failed,
    or have no score yet, are left out.
    """
    by_id = {row.trial: row for row in found if row.status != "failed" and row.curve}

    def top1(row: Row, scale: str) -> dict[int, float]:
        """Percent, by seed."""
        ids = {seed: trial_id(row.settings(scale, seed, options)) for seed in seeds}
        return {seed: 100 * by_id[name].curve[-1][1] for seed, name in ids.items() if name in by_id}

    table = []
    for row in ROWS:
        printed, root = (_mean(list(top1(row, scale).values())) for scale in _SCALES)
        paper = "-" if row.paper_top1 is None else f"{row.paper_top1:.1f}"
        table.append([row.title, printed, root if row.has_scale else "same", paper])
    gains = []
    for row, base in _GAINS:
        cells = []
        for scale in _SCALES:
            ours, theirs = top1(row, scale), top1(base, scale)
            cells.append(_mean([ours[seed] - theirs[seed] for seed in ours if seed in theirs], "+.1f"))
        if not (row.has_scale or base.has_scale):
            cells[1] = "same"
        assert row.paper_top1 is not None
        assert base.paper_top1 is not None
        gains.append([f"{row.title} over {base.title}", *cells, f"{row.paper_top1 - base.paper_top1:+.1f}"])
    columns = ["scale as printed", "scale sqrt(d)", "paper, K400"]
    return f"{_markdown(['top-1, %', *columns], table)}\n\n{_markdown(['points', *columns], gains)}\n"
