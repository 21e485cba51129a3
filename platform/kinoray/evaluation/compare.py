"""`kinoray compare`: two evaluations side by side, as one self-contained HTML page and as JSON beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kinoray.catalog.table import references
from kinoray.evaluation.comparison import Comparison, Flip, compare_evaluations
from kinoray.evaluation.config import CompareConfig
from kinoray.evaluation.read import Evaluation, read_evaluation
from kinoray.page import render_page
from kinoray.storage.objects import Storage, absolute
from kinoray.video.strips import Strip, contact_strips

__all__ = ["compare"]

_MAX_VIDEOS = 100  # shown of those that became right, and of those that became wrong; the JSON has all

_ABOUT = ["checkpoint", "members", "weights", "protocol", "views", "catalog", "split", "catalog_digest"]
_ABOUT += ["model_digest", "config_digest"]
_ABOUT += ["top1", "top1_interval", "top5", "mean_class", "top1_of_all", "coverage", "evaluated", "unreadable"]
_SCALE = 100.0  # drawing units from no difference to one of 100 points


@dataclass(frozen=True, slots=True)
class _Card:
    """One video that flipped, as the template shows it."""

    flip: Flip
    strip: Strip | None


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare, write the page and its JSON, and print what came of it in a few lines.

    Returns:
        What is in the JSON: `Comparison.summary()`, with `a` and `b`, what each of the two is.

    Raises:
        CatalogError: no video was scored by both, or true labels differ.
        KinorayError: an evaluation cannot be read, or the page cannot be written.
    """
    storage = Storage(config.storage)
    a, b = (read_evaluation(storage, uri, catalog=config.catalog) for uri in (config.a, config.b))
    comparison = compare_evaluations(a, b)
    record = {"a": _about(a), "b": _about(b), **comparison.summary()}
    page = _render(config, a, b, comparison, storage).encode("utf-8")
    out = absolute(config.out)
    data = out.removesuffix(".html") + ".json"
    storage.put(data, json.dumps(record, indent=1).encode())
    storage.put(out, page)
    _print(comparison, record)
    print(f"compare: {out}, {len(page) / 1e6:.1f} MB; all numbers are in {data}", flush=True)
    return record


def _about(one: Evaluation) -> dict[str, Any]:
    record = one.record
    return {
        "evaluation": one.uri,
        **{name: record[name] for name in _ABOUT if name in record},
        "ece": record["calibration"]["ece"],
    }


def _print(comparison: Comparison, record: dict[str, Any]) -> None:
    paired = comparison.paired
    low, high = paired.interval
    for name in ("a", "b"):
        right = paired.both + (paired.only_a if name == "a" else paired.only_b)
        print(
            f"compare: {name.upper()} top-1 {right / paired.total:.1%} of {paired.total}: {record[name]['evaluation']}"
        )
    difference = f"{100 * paired.difference:+.1f} points (95% interval {100 * low:+.1f} .. {100 * high:+.1f})"
    print(
        f"compare: B less A {difference}, McNemar p = {paired.p:.2g}; {paired.only_b} videos became right, "
        f"{paired.only_a} wrong; the two agree on {comparison.agreement:.1%}"
    )
    moved = [move for move in comparison.classes if move.moved]
    print(f"compare: {len(moved)} of {len(comparison.classes)} classes moved by more than their 95% interval")
    apart = {
        "only in A": comparison.num_only_in_a,
        "only in B": comparison.num_only_in_b,
        "scored by A only": comparison.num_scored_by_a,
        "scored by B only": comparison.num_scored_by_b,
    }
    if any(apart.values()):
        print(f"compare: left out: {', '.join(f'{count} videos {what}' for what, count in apart.items() if count)}")


def _render(config: CompareConfig, a: Evaluation, b: Evaluation, comparison: Comparison, storage: Storage) -> str:
    gained, lost = comparison.gained[:_MAX_VIDEOS], comparison.lost[:_MAX_VIDEOS]
    strips = _strips(storage, a, [*gained, *lost], config.frames_per_video)
    values: dict[str, object] = {
        "config": config,
        "sides": [{"name": "A", **_about(a)}, {"name": "B", **_about(b)}],
        "comparison": comparison,
        "num_moved": sum(move.moved for move in comparison.classes),
        "scale": _SCALE,
        "gained": [_Card(flip, strips.get(flip.row)) for flip in gained],
        "lost": [_Card(flip, strips.get(flip.row)) for flip in lost],
    }
    return render_page("compare.html.j2", values, styles=("report.css", "compare.css"))


def _strips(storage: Storage, a: Evaluation, flips: Sequence[Flip], num_frames: int) -> dict[int, Strip]:
    """Contact strips by row of A's catalog, read in the catalog's order."""
    rows = sorted(flip.row for flip in flips)
    if not num_frames or not rows:
        return {}
    places = references(a.catalog.table.take(rows))
    return dict(zip(rows, contact_strips(storage, places, num_frames), strict=True))
