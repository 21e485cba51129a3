"""The rows of the ablation study, the record of one finished run, and the table and checks that follow from records.

Everything here is arithmetic on records; nothing is trained. A check is a statement of what came out, never a gate.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kinoray.config.shared import ModelConfig

__all__ = ["ROWS", "SCALES", "Check", "Row", "RunResult", "Score", "Study", "tabulate"]

Scale = Literal["frobenius", "dim"]

SCALES: tuple[Scale, Scale] = ("frobenius", "dim")
"""MFF's two scales: as printed in the paper, and the root of the channels per head."""


@dataclass(frozen=True, slots=True)
class Row:
    """One network of the study. Rows with MFF are trained with each scale."""

    name: str
    """Key in results.jsonl."""
    title: str
    """What the table calls it."""
    factory: str
    """Import string of the network's factory."""
    options: Mapping[str, object]
    """Options of the factory, without the scale."""
    paper_top1: float | None = None
    """Kinetics-400 top-1 in the paper, percent (tables 2 and 3)."""
    has_scale: bool = False
    """Whether MFF is on, so that its scale matters."""
    one_sequence: bool = False
    """Whether all frames of a video are one sequence for the network (TSM)."""

    def scales(self) -> tuple[Scale | None, ...]:
        """The scales it is trained with; (None,) where there is none."""
        return SCALES if self.has_scale else (None,)

    def model(self, scale: Scale | None) -> ModelConfig:
        """Its config with one of its scales."""
        options = dict(self.options) | ({"scale": scale} if scale else {})
        return ModelConfig(factory=self.factory, options=options)


def _vcm_sdd(*, stc: bool, mff: bool, stc_init: str = "near") -> dict[str, object]:
    return {"backbone": "tiny", "heads": 4, "stc": stc, "mff": mff, "stc_init": stc_init}


_VCM_SDD = "vcm_sdd:vcm_sdd"
_FRAMES = {"backbone": "tiny", "dropout": 0.0}  # no dropout: the rows of table 2 have none

ROWS = (
    Row("tsn_rgb", "TSN, RGB", "video_baselines:tsn", _FRAMES | {"modality": "rgb"}, 71.3),
    Row("tsn_flow", "TSN, flow", "video_baselines:tsn", _FRAMES | {"modality": "flow"}),
    Row("tsm_rgb", "TSM, RGB", "video_baselines:tsm", _FRAMES | {"modality": "rgb"}, 75.1, one_sequence=True),
    Row("neither", "No_STC No_MFF", _VCM_SDD, _vcm_sdd(stc=False, mff=False), 71.7),
    Row("stc", "STC No_MFF", _VCM_SDD, _vcm_sdd(stc=True, mff=False), 73.9),
    Row("mff", "No_STC MFF", _VCM_SDD, _vcm_sdd(stc=False, mff=True), 78.5, has_scale=True),
    Row("both", "STC MFF", _VCM_SDD, _vcm_sdd(stc=True, mff=True), 80.1, has_scale=True),
    Row(
        "both_random",
        "STC MFF, random STC init",
        _VCM_SDD,
        _vcm_sdd(stc=True, mff=True, stc_init="random"),
        has_scale=True,
    ),
)
"""The study: single streams, the four rows of table 2, and what STC's usual initialisation does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One trained and tested network: a line of results.jsonl. Accuracies in percent of the test videos."""

    row: str
    scale: Scale | None
    seed: int
    digest: str
    """Names everything that decided the numbers; results of other settings are never mixed in."""
    top1: float
    mover_top1: float
    """How often the mover's thing was right, whatever the direction."""
    direction_top1: float
    """How often the direction was right, whatever the thing."""
    losses: tuple[float, ...]
    """Mean training loss of each epoch."""
    num_params: int
    cpu_s: float
    """CPU seconds for training and testing."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """What the network says of itself after training."""


@dataclass(frozen=True, slots=True)
class Score:
    """Top-1 of one row over its seeds, percent."""

    values: tuple[float, ...]
    """In the order of the seeds."""
    mean: float
    spread: float | None
    """Standard deviation over the seeds (n - 1 in the denominator); None with fewer than two."""
    mover: float
    """Mean of mover_top1."""
    direction: float
    """Mean of direction_top1."""
    notes: Mapping[str, float]
    """Means of the notes."""


@dataclass(frozen=True, slots=True)
class Check:
    """A statement about the means that the equations, or how the set is made, let one expect."""

    name: str
    text: str
    value: float
    ok: bool


@dataclass(frozen=True, slots=True)
class Study:
    """The table: scores by (row, scale), rows that have no result yet left out; and what can be checked on them."""

    scores: Mapping[tuple[str, Scale | None], Score]
    checks: tuple[Check, ...]

    def score(self, row: Row, scale: Scale) -> Score | None:
        """The row's score in the column of that scale: rows without MFF have the same one in both."""
        return self.scores.get((row.name, scale if row.has_scale else None))

    def gain(self, row: str, over: str, scale: Scale) -> float | None:
        """Difference of two rows' means with that scale, in points; None if one is missing."""
        named = {item.name: item for item in ROWS}
        a, b = self.score(named[row], scale), self.score(named[over], scale)
        return None if a is None or b is None else a.mean - b.mean


def _score(results: Sequence[RunResult]) -> Score:
    results = sorted(results, key=lambda result: result.seed)
    values = tuple(result.top1 for result in results)
    names = results[0].notes
    return Score(
        values=values,
        mean=statistics.fmean(values),
        spread=statistics.stdev(values) if len(values) > 1 else None,
        mover=statistics.fmean(result.mover_top1 for result in results),
        direction=statistics.fmean(result.direction_top1 for result in results),
        notes={name: statistics.fmean(result.notes[name] for result in results) for name in names},
    )


def tabulate(results: Iterable[RunResult]) -> Study:
    """Mean and spread of every row over its seeds, and the checks."""
    groups: dict[tuple[str, Scale | None], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.row, result.scale), []).append(result)
    order = [(row.name, scale) for row in ROWS for scale in row.scales()]
    scores = {key: _score(groups[key]) for key in order if key in groups}
    study = Study(scores, ())
    return Study(scores, tuple(_checks(study)))


def _checks(study: Study) -> list[Check]:
    checks = []
    for name, stream in (("tsn_rgb", "RGB"), ("tsn_flow", "flow")):
        if (name, None) in study.scores:
            top1 = study.scores[name, None].mean
            text = f"{stream} alone not above its ceiling of 25 % (5 points for chance)"
            checks.append(Check(f"{name}_below_ceiling", text, top1, top1 <= 30.0))
    if ("neither", None) in study.scores:
        top1 = study.scores["neither", None].mean
        checks.append(Check("neither_below_late_fusion", "neither STC nor MFF: below 55 %", top1, top1 < 55.0))
    for scale in SCALES:
        words = {"frobenius": "scale as printed", "dim": "sqrt(d)"}[scale]
        gain, change = study.gain("mff", "neither", scale), study.gain("both", "mff", scale)
        if gain is not None:
            checks.append(
                Check(f"mff_gain_{scale}", f"MFF minus neither at least 20 points, {words}", gain, gain >= 20.0)
            )
        if change is not None:
            text = f"near-init STC with MFF within 5 points of MFF alone, {words}"
            checks.append(Check(f"near_stc_harmless_{scale}", text, change, abs(change) <= 5.0))
    return checks
