"""`kinoray report`: a static site from predictions, with numbers, frames, filters, quarantine and corrections.

What is easy to break: the numbers cover all rows, whatever the site lists of them.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import load_catalog
from kinoray.errors import ConfigError
from kinoray.library.config import ReportConfig
from kinoray.library.report.columns import collect_names, site_record
from kinoray.library.report.figures import confused_pairs, confusion_picture, histogram_bars, reliability_marks, shade
from kinoray.library.report.numbers import Numbers, count, join_truth
from kinoray.library.report.site import Site, add_places
from kinoray.library.report.table import ResultTable, choose, read_result
from kinoray.storage.objects import Storage, absolute, join

__all__ = ["report"]

MAX_TABLE_CLASSES = 30
"""Up to so many classes confusion is a table of numbers, above it a picture and the most frequent mistakes."""
MAX_MISTAKES = 30
MAX_EXAMPLES = 3


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the site and return its totals.

    A video that cannot be read any more shows the reason instead of its frames.

    Returns:
        `out` (index.html), `bytes`, `videos`, `inputs`, `labelled`, `quarantined`, `skipped`, `shown` (videos that are
        listed), `without_frames` (those that could not be read for their strip) and `top1` (None without a catalog).

    Raises:
        ConfigError: `out` is a file, or predictions of several models are there.
        StorageError: predictions or catalog cannot be read, or the site cannot be written.
        CatalogError: no rows yet, or the catalog does not fit the predictions.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    if storage.exists(out):
        raise ConfigError(f"out must be a folder for the site, {out} is a file; name another, or remove it")
    result = read_result(storage, config.predictions)
    catalog = load_catalog(storage, config.catalog) if config.catalog else None
    rows = join_truth(result.rows, catalog)
    labels = tuple(dict.fromkeys((*(catalog.labels if catalog else ()), *result.labels)))
    numbers = count(rows, labels)
    listed = add_places(choose(rows, config.max_videos), config.max_strips if config.frames_per_video else 0)
    names = collect_names(listed, numbers)
    site = Site(storage, out, listed, names, site_record(numbers, names, listed, config.title, result.digest))
    without_frames = site.write(_values(config, result, rows, numbers, listed), config.frames_per_video)
    _print_totals(out, site.num_bytes, result, numbers, len(listed), without_frames)
    return {
        "out": join(out, "index.html"),
        "bytes": site.num_bytes,
        "videos": numbers.num_videos,
        "inputs": result.num_inputs,
        "labelled": numbers.num_labelled,
        "quarantined": numbers.num_quarantined,
        "skipped": numbers.num_skipped,
        "shown": len(listed),
        "without_frames": without_frames,
        "top1": numbers.accuracy.value if numbers.accuracy else None,
    }


def _print_totals(
    out: str, size: int, result: ResultTable, numbers: Numbers, num_listed: int, without_frames: int
) -> None:
    sums = f"{numbers.num_labelled} labelled + {numbers.num_quarantined} quarantined + {numbers.num_skipped} skipped"
    pending = f" + {result.num_pending} to come" if result.num_pending else ""
    print(f"report: {result.num_inputs} inputs = {sums}{pending}")
    if num_listed < numbers.num_videos:
        print(f"report: the site lists {num_listed} of them, least certain first (--max-videos); its numbers cover all")
    if without_frames:
        print(f"report: {without_frames} videos could not be read for their frames; the site says why")
    print(f"report: {size / 1e6:.1f} MB; open {join(out, 'index.html')}", flush=True)


@dataclass(frozen=True, slots=True)
class _Group:
    """One kind of quarantine: how many videos, their share, and examples of the reason as text."""

    status: str
    reason: str
    num_videos: int
    texts: tuple[str, ...]


def _groups(rows: pa.Table) -> list[_Group]:
    """Videos without an answer by status and reason, the most frequent first."""
    others = rows.filter(pc.not_equal(rows["status"], "labelled"))
    others = others.append_column("reason", pc.coalesce(others["error_class"], others["status"]))
    counts = others.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist()
    groups = []
    for item in counts:
        same = pc.and_(pc.equal(others["status"], item["status"]), pc.equal(others["reason"], item["reason"]))
        texts = pc.value_counts(others["error_text"].filter(same)).to_pylist()
        texts = sorted(texts, key=lambda text: (-text["counts"], text["values"] or ""))[:MAX_EXAMPLES]
        said = tuple(text["values"] or "no reason was recorded" for text in texts)
        groups.append(_Group(item["status"], item["reason"], item["count_all"], said))
    return sorted(groups, key=lambda group: (-group.num_videos, group.status, group.reason))


def _values(
    config: ReportConfig, result: ResultTable, rows: pa.Table, numbers: Numbers, listed: pa.Table
) -> dict[str, object]:
    """What the template shows."""
    confusion = numbers.confusion
    small = confusion is not None and len(confusion.names) <= MAX_TABLE_CLASSES
    return {
        "config": config,
        "result": result,
        "numbers": numbers,
        "num_listed": len(listed),
        "num_listed_labelled": pc.sum(pc.equal(listed["status"], "labelled")).as_py() or 0,
        "num_strips": pc.sum(pc.greater_equal(listed["strip"], 0)).as_py() or 0,
        "histograms": [
            (title, name, histogram_bars(histogram, name), int(histogram.sum(axis=0).max()))
            for title, name, histogram in (
                ("Score of the first answer", "score", numbers.histogram),
                ("Margin: first less second score", "margin", numbers.margin_histogram),
            )
        ],
        "classes": sorted(numbers.classes, key=lambda row: -row.num_predicted),
        "confusion": confusion,
        "shades": shade(confusion) if confusion and small else None,
        "picture": confusion_picture(confusion) if confusion and not small else "",
        "mistakes": confused_pairs(confusion, MAX_MISTAKES) if confusion else [],
        "reliability": reliability_marks(numbers.calibration) if numbers.calibration else [],
        "groups": _groups(rows),
        "origin": {name: _distinct(rows, name) for name in ("model_digest", "config_digest", "run_id")},
    }


def _distinct(rows: pa.Table, name: str) -> list[str]:
    return sorted(value for value in pc.unique(rows[name]).to_pylist() if value)
