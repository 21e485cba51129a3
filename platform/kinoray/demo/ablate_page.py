"""The study as Markdown: the table, and the page docs/ablation.md with the paper's figures and a reading.

Every number, and every sentence that depends on one, is made from the results: the page cannot disagree with them.
"""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from kinoray.config.shared import ClipConfig
from kinoray.demo.ablate_rows import ROWS, SCALES, Row, RunResult, Score, Study
from kinoray.demo.config import AblateConfig

__all__ = ["doc_page", "table_page"]

_SCALE_WORDS = {"frobenius": "as printed", "dim": "sqrt(d)"}


def _cell(score: Score | None) -> str:
    """`82.6 +- 5.4`, or the mean alone of a single run."""
    if score is None:
        return "-"
    return f"{score.mean:.1f}" if score.spread is None else f"{score.mean:.1f} +- {score.spread:.1f}"


def _row_cells(study: Study, row: Row) -> list[str]:
    cells = [_cell(study.score(row, scale)) for scale in SCALES]
    paper = "-" if row.paper_top1 is None else f"{row.paper_top1:.1f}"
    return [row.title, cells[0], cells[1] if row.has_scale else "same", paper]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_page(study: Study) -> str:
    """Mean and spread of every row with both scales, beside the paper's Kinetics-400 figures."""
    header = ["top-1, %", "scale as printed", "scale sqrt(d)", "paper, K400"]
    return _markdown(header, [_row_cells(study, row) for row in ROWS]) + "\n"


def _runs_table(study: Study) -> str:
    """Every run, and what was right of the label's two parts."""
    rows = []
    for row in ROWS:
        for scale in row.scales():
            score = study.scores.get((row.name, scale))
            if score is None:
                continue
            weight = score.notes.get("stc_self_weight")
            rows.append(
                [
                    f"{row.title}, {_SCALE_WORDS[scale]}" if scale else row.title,
                    " / ".join(f"{value:.1f}" for value in score.values),
                    f"{score.mover:.1f}",
                    f"{score.direction:.1f}",
                    "-" if weight is None else f"{weight:.3f}",
                    "-" if weight is None else f"{score.notes['stc_effective_neighbours']:.2f}",
                ]
            )
    header = ["", "top-1 of each seed", "mover right", "direction right", "STC self weight", "STC neighbours"]
    return _markdown(header, rows)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def doc_page(study: Study, config: AblateConfig, clip: ClipConfig, results: Sequence[RunResult]) -> str:
    """The page docs/ablation.md. `config` is the one that was run, with what --quick replaced."""
    environment = Environment(
        loader=PackageLoader("kinoray"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["signed"] = _signed
    rows = {row.name: row for row in ROWS}
    page = environment.get_template("ablation.md.j2").render(
        study=study,
        config=config,
        clip=clip,
        table=table_page(study).rstrip(),
        runs=_runs_table(study),
        words=_SCALE_WORDS,
        paper={row.name: row.paper_top1 for row in ROWS},
        score=lambda name, scale: study.score(rows[name], scale),
        params={row.name: next((r.num_params for r in results if r.row == row.name), 0) for row in ROWS},
        num_runs=len(results),
        cpu_min=round(sum(result.cpu_s for result in results) / 60),
    )
    return page.rstrip() + "\n"
