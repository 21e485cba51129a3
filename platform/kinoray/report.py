"""One self-contained HTML page from predictions: numbers, frames, filters, confusion, quarantine.

What is easy to break: the numbers cover all rows, whatever the page shows of them.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog import Reference, load_catalog
from kinoray.errors import CatalogError
from kinoray.page import render_page
from kinoray.predictions import read_predictions
from kinoray.progress import Progress
from kinoray.report_figures import confused_pairs, confusion_picture, histogram_bars, reliability_marks, shade
from kinoray.report_numbers import Numbers, count, join_truth
from kinoray.report_strips import Strip, contact_strips
from kinoray.storage import Storage, absolute
from kinoray.verbs import ReportConfig

__all__ = ["report"]

MAX_TABLE_CLASSES = 30
"""Up to so many classes confusion is a table of numbers, above it a picture and the most frequent mistakes."""
MAX_MISTAKES = 30
MAX_REASONS = 200
"""Rows listed for each kind of quarantine; the counts always cover all."""


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page and return its totals: out, videos, labelled, quarantined, shown, without_frames, bytes, top1.

    A video that cannot be read any more shows the reason instead of its frames.

    Raises:
        StorageError: predictions or catalog cannot be read, or the page cannot be written.
        CatalogError: no rows yet, or the catalog does not fit the predictions.
    """
    storage = Storage(config.storage)
    table = read_predictions(storage, config.predictions)
    if not len(table):
        raise CatalogError(
            f"{config.predictions} holds no finished rows yet; run kinoray label, or wait for its first unit, then this"
        )
    catalog = load_catalog(storage, config.catalog) if config.catalog else None
    rows = join_truth(table, catalog)
    numbers = count(rows, catalog.labels if catalog else ())
    shown = _choose(rows, config.max_videos)
    strips = _strips(storage, shown, config.frames_per_video)
    page = _render(config, rows, numbers, shown, strips).encode("utf-8")
    out = absolute(config.out)
    storage.put(out, page)
    without_frames = sum(1 for strip in strips.values() if not strip.frames)
    _print_totals(out, len(page), numbers, without_frames)
    return {
        "out": out,
        "bytes": len(page),
        "videos": numbers.num_videos,
        "labelled": numbers.num_labelled,
        "quarantined": numbers.num_quarantined,
        "shown": len(shown),
        "without_frames": without_frames,
        "top1": numbers.accuracy.value if numbers.accuracy else None,
    }


def _print_totals(out: str, size: int, numbers: Numbers, without_frames: int) -> None:
    parts = [f"{numbers.num_labelled} labelled", f"{numbers.num_quarantined} quarantined"]
    if numbers.num_skipped:
        parts.append(f"{numbers.num_skipped} skipped")
    if without_frames:
        parts.append(f"{without_frames} could not be read for their frames")
    print(f"report: {out}, {size / 1e6:.1f} MB: {numbers.num_videos} videos, {', '.join(parts)}", flush=True)


def _choose(rows: pa.Table, most: int) -> pa.Table:
    """The videos to show: labelled ones, least certain first, then the others; at most `most` of each."""
    labelled = rows.filter(pc.equal(rows["status"], "labelled"))
    others = rows.filter(pc.not_equal(rows["status"], "labelled"))
    labelled = labelled.sort_by([("margin", "ascending"), ("video_id", "ascending")])
    others = others.sort_by([("status", "ascending"), ("error_class", "ascending"), ("video_id", "ascending")])
    return pa.concat_tables([labelled.slice(0, most), others.slice(0, most)])


def _strips(storage: Storage, shown: pa.Table, num_frames: int) -> dict[int, Strip]:
    """Contact strips by row of `shown`, read in the order in which the videos lie in their shards."""
    labelled = shown.append_column("row", pa.array(range(len(shown)))).filter(pc.equal(shown["status"], "labelled"))
    if not num_frames or not len(labelled):
        return {}
    labelled = labelled.sort_by([("uri", "ascending"), ("offset", "ascending")])
    columns = [labelled[name].to_pylist() for name in ("uri", "offset", "length")]
    places = [Reference(*place) for place in zip(*columns, strict=True)]
    progress = Progress(len(labelled), "report", "contact strips")
    strips: dict[int, Strip] = {}
    for row, strip in zip(labelled["row"].to_pylist(), contact_strips(storage, places, num_frames), strict=True):
        strips[row] = strip
        progress.update(1, unreadable=int(not strip.frames))
    progress.close()
    return strips


@dataclass(frozen=True, slots=True)
class _Answer:
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class _Card:
    """One video as the template shows it."""

    video_id: str
    where: str
    status: str
    abstained: bool
    reason: str
    answers: tuple[_Answer, ...]
    true_label: str | None
    verdict: str
    split: str
    margin: float | None
    entropy: float | None
    strip: Strip | None


def _cards(shown: pa.Table, strips: dict[int, Strip]) -> list[_Card]:
    return [_card(row, strips.get(index)) for index, row in enumerate(shown.to_pylist())]


def _card(row: dict[str, Any], strip: Strip | None) -> _Card:
    labelled = row["status"] == "labelled"
    names, scores = row["label_topk"] or (), row["score_topk"] or ()
    return _Card(
        video_id=row["video_id"],
        where=_where(row),
        status=row["status"],
        abstained=bool(row["abstained"]),
        reason="" if labelled else _reason(row),
        answers=tuple(_Answer(*answer) for answer in zip(names, scores, strict=True)) if labelled else (),
        true_label=row["true_label"],
        verdict="" if row["right"] is None or not labelled else ("right" if row["right"] else "wrong"),
        split=row["split"] or "",
        margin=row["margin"],
        entropy=row["entropy"],
        strip=strip,
    )


def _where(row: dict[str, Any]) -> str:
    """`uri`, and for a member of a shard its first and last byte."""
    if row["offset"] is None or row["length"] is None:
        return str(row["uri"])
    return f"{row['uri']} bytes {row['offset']} to {row['offset'] + row['length'] - 1}"


def _reason(row: dict[str, Any]) -> str:
    return f"{row['error_class'] or row['status']}: {row['error_text'] or 'no reason was recorded'}"


@dataclass(frozen=True, slots=True)
class _Refused:
    """One kind of quarantine: how many videos, and the first of them as (video_id, where, reason)."""

    error_class: str
    num_videos: int
    videos: list[tuple[str, str, str]]


def _refused(rows: pa.Table) -> list[_Refused]:
    """Videos without an answer by error_class, the most frequent first."""
    others = rows.filter(pc.not_equal(rows["status"], "labelled"))
    names = pc.coalesce(others["error_class"], others["status"])
    counts = {item["values"]: item["counts"] for item in pc.value_counts(names).to_pylist()}
    groups = []
    for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        part = others.filter(pc.equal(names, name)).sort_by("video_id").slice(0, MAX_REASONS).to_pylist()
        videos = [(row["video_id"], _where(row), row["error_text"] or "no reason was recorded") for row in part]
        groups.append(_Refused(name, number, videos))
    return groups


def _render(config: ReportConfig, rows: pa.Table, numbers: Numbers, shown: pa.Table, strips: dict[int, Strip]) -> str:
    confusion = numbers.confusion
    values: dict[str, object] = {
        "config": config,
        "numbers": numbers,
        "bars": histogram_bars(numbers.histogram),
        "classes": sorted(numbers.classes, key=lambda row: -row.num_predicted),
        "confusion": confusion,
        "shades": shade(confusion) if confusion and len(confusion.names) <= MAX_TABLE_CLASSES else None,
        "picture": confusion_picture(confusion) if confusion and len(confusion.names) > MAX_TABLE_CLASSES else "",
        "mistakes": confused_pairs(confusion, MAX_MISTAKES) if confusion else [],
        "reliability": reliability_marks(numbers.calibration) if numbers.calibration else [],
        "cards": _cards(shown, strips),
        "refused": _refused(rows),
        "origin": {name: _values(rows, name) for name in ("model_digest", "config_digest", "run_id")},
    }
    return render_page("report.html.j2", values, styles=("report.css",), script="report.js")


def _values(rows: pa.Table, name: str) -> list[str]:
    return sorted(value for value in pc.unique(rows[name]).to_pylist() if value)
