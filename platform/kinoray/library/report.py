"""`kinoray report`: a static site from predictions, with numbers, frames, filters, quarantine and corrections.

Figures are made as plain geometry: the template draws them as SVG or table cells, so that names stay escaped text and
colours follow the reader's light or dark theme. What is easy to break: the numbers cover all rows, whatever the site
lists of them.
"""

import base64
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import Reference, load_catalog
from kinoray.console import many
from kinoray.errors import KinorayError, ObjectNotFound
from kinoray.evaluation.metrics import Calibration, confused_classes
from kinoray.library.config import ReportConfig
from kinoray.library.numbers import (
    Confusion,
    Kind,
    Numbers,
    ResultTable,
    choose,
    count,
    count_codecs,
    count_durations,
    join_truth,
    read_result,
)
from kinoray.library.rows import scan, scan_windows
from kinoray.library.serve import serve
from kinoray.library.site import Likeness, Links, Site, add_places, collect_names, site_record
from kinoray.library.vectors import map_2d, nearest, usable
from kinoray.network.checkpoint_files import META_FILE, read_document
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.records import require_folder

__all__ = ["HISTOGRAM_HEIGHT", "histogram_bars", "report"]

HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 400.0, 120.0
RELIABILITY_SIDE = 200.0
NUM_SHADES = 10

MAX_TABLE_CLASSES = 30
"""Up to so many classes confusion is a table of numbers, above it a picture and the most frequent mistakes."""
MAX_MISTAKES = 30
MAX_BARS = 20
MAX_SIMILAR = 20_000
"""Up to so many listed videos with embeddings each is compared with each: 2 x 10^11 products at 512 numbers."""
NUM_SIMILAR = 24
_PATIENCE_S = 5.0  # for what a checkpoint says of itself
MAX_EXAMPLES = 3
_KINDS = ("right", "wrong", "unknown")


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the site and return its totals.

    A video that cannot be read any more shows the reason instead of its frames.

    Returns:
        `out` (index.html), `bytes`, `videos`, `inputs`, `labelled`, `quarantined`, `skipped`, `shown` (videos that are
        listed), `without_frames` (those that could not be read for their strip) and `top1` (None without a catalog).

    Raises:
        ConfigError: `out` holds what is no report, or predictions of several models are there.
        StorageError: predictions or catalog cannot be read, or the site cannot be written.
        CatalogError: no rows yet, or the catalog does not fit the predictions.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    require_folder(storage, "out", config.out, "report")
    result = read_result(storage, config.predictions)
    catalog = load_catalog(storage, config.catalog) if config.catalog else None
    rows = join_truth(result.rows, catalog, several=result.several)
    labels = tuple(dict.fromkeys((*(catalog.labels if catalog else ()), *result.labels)))
    numbers = count(rows, labels, several=result.several)
    listed = add_places(choose(rows, config.max_videos), config.max_strips)
    names = collect_names(listed, numbers, several=result.several)
    record = site_record(numbers, names, listed, config.title, result.digest)
    links = _links(storage, listed, config.presign_hours) if config.presign_hours else None
    windows = _windows(result, listed)
    likeness = _likeness(result, listed)
    site = Site(storage, out, listed, names, record, config.decode, windows=windows, links=links, likeness=likeness)
    without_frames = site.write_data(keep_strips=config.serve)
    site.write_page(_values(config, result, rows, numbers, site), _media_sources(config, listed, links))
    _print_totals(out, site.num_bytes, result, numbers, len(listed), without_frames)
    if links:
        num_links = sum(uri is not None for uri in links.uris)
        print(f"report: whoever has the site can read {many(num_links, 'video')} of it until {links.until}")
    if config.serve:
        serve(storage, out, site.written, _places(listed))
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
        "top1": numbers.accuracy.top1.value if numbers.accuracy else None,
    }


def _windows(result: ResultTable, listed: pa.Table) -> Iterator[pa.Table]:
    """The windows of listed videos, where long ones were cut."""
    if result.job.windows is None:
        return
    keys = listed["row_key"].combine_chunks()
    for table in scan_windows(result.ledger, ["row_key", "begin_s", "end_s", "label", "score"]):
        yield table.filter(pc.is_in(table["row_key"], value_set=keys))


def _likeness(result: ResultTable, listed: pa.Table) -> Likeness | None:
    """Where the listed videos lie by their embeddings; None where the labelling has none."""
    scorer = result.job.settings.get("scorer")
    if not isinstance(scorer, dict) or not scorer.get("embeddings"):
        return None
    keys = listed["row_key"].combine_chunks()
    listed_ones = (
        table.filter(pc.and_(pc.is_in(table["row_key"], value_set=keys), pc.is_valid(table["embedding"])))
        for table in scan(result.ledger, ["row_key", "embedding"])
    )
    found = pa.concat_tables(listed_ones)
    lengths = pc.list_value_length(found["embedding"])
    width = pc.max(lengths).as_py() or 0
    found = found.filter(pc.equal(lengths, width)) if width else found.slice(0, 0)
    vectors_ND = np.asarray(pc.list_flatten(found["embedding"]).to_numpy()).reshape(len(found), width)
    is_good = usable(vectors_ND) if width else np.zeros(0, bool)
    vectors_ND = vectors_ND[is_good]
    rows = pc.index_in(found["row_key"].filter(pa.array(is_good)), value_set=keys).to_numpy()
    places: list[list[float] | None] = [None] * len(listed)
    for row, place in zip(rows.tolist(), np.round(map_2d(vectors_ND).astype(float), 4).tolist(), strict=True):
        places[row] = place
    if len(rows) > MAX_SIMILAR:
        return Likeness(places=places, near=None)
    near: list[list[list[float]] | None] = [None] * len(listed)
    others, similarities = nearest(vectors_ND, vectors_ND, NUM_SIMILAR + 1)
    for place, row in enumerate(rows.tolist()):
        is_other = others[place] != place
        theirs = rows[others[place][is_other][:NUM_SIMILAR]].tolist()
        near[row] = [theirs, np.round(similarities[place][is_other][:NUM_SIMILAR].astype(float), 3).tolist()]
    return Likeness(places=places, near=near)


def _places(listed: pa.Table) -> dict[str, Reference]:
    """Where the listed videos lie, by row_key."""
    columns = [listed[name].to_pylist() for name in ("row_key", "uri", "offset", "length")]
    return {key: Reference(*place) for key, *place in zip(*columns, strict=True)}


def _links(storage: Storage, listed: pa.Table, hours: float) -> Links:
    """Addresses of the listed videos in s3://; none of members of shards, since an address names whole objects.

    And none where the reader pays: a browser cannot say that it agrees.
    """
    end = datetime.now(UTC) + timedelta(hours=hours)
    uris: list[str | None] = []
    for place in _places(listed).values():
        bucket = place.uri.removeprefix("s3://").partition("/")[0]
        is_whole = is_s3(place.uri) and place.offset is None and not place.problem
        uri = None
        if is_whole and storage.config.access_of(bucket) != "requester_pays":
            with suppress(ObjectNotFound):  # no bucket can be called so
                uri = storage.presign(place.uri, int(hours * 3600))
        uris.append(uri)
    return Links(uris=uris, until=f"{end:%Y-%m-%d %H:%M} UTC")


def _media_sources(config: ReportConfig, listed: pa.Table, links: Links | None) -> list[str]:
    """From where the page may play videos: no more than there are."""
    is_file = [not is_s3(place.uri) and place.offset is None for place in _places(listed).values()]
    found = ["file:"] if any(is_file) else []
    return [*found, *(["'self'"] if config.serve else []), *(links.origins if links else [])]


def _print_totals(
    out: str, size: int, result: ResultTable, numbers: Numbers, num_listed: int, without_frames: int
) -> None:
    sums = (
        f"{numbers.num_labelled:,} labelled + {numbers.num_quarantined:,} quarantined + {numbers.num_skipped:,} skipped"
    )
    pending = f" + {result.num_pending:,} to come" if result.num_pending else ""
    print(f"report: {many(result.num_inputs, 'input')} = {sums}{pending}")
    if num_listed < numbers.num_videos:
        print(
            f"report: the site lists {num_listed:,} of them, least certain first (--max-videos); its numbers cover all"
        )
    if without_frames:
        print(f"report: {many(without_frames, 'video')} could not be read for their frames; the site says why")
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
    config: ReportConfig, result: ResultTable, rows: pa.Table, numbers: Numbers, site: Site
) -> dict[str, object]:
    """What the template shows."""
    confusion = numbers.confusion
    listed = site.listed
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
        "unused": [row.counts.label for row in numbers.classes if not (row.num_predicted or row.counts.videos)],
        "confusion": confusion,
        "shades": _shade(confusion) if confusion and small else None,
        "picture": _confusion_picture(confusion) if confusion and not small else "",
        "mistakes": confused_classes(confusion.counts, confusion.names, MAX_MISTAKES) if confusion else [],
        "reliability": _reliability_marks(numbers.calibration) if numbers.calibration else [],
        "groups": _groups(rows),
        "has_map": site.record["map"],
        "has_media": site.record["media"],
        "kinds": _kinds(rows, numbers, site),
        "network": _network(result),
        "origin": {name: _distinct(rows, name) for name in ("model_digest", "config_digest", "run_id")},
    }


def _kinds(rows: pa.Table, numbers: Numbers, site: Site) -> list[dict[str, Any]]:
    """Figures that count the videos by class, length and codec: title, filter, bars, what they count."""
    called = [(row.num_predicted, row.counts.label) for row in numbers.classes if row.num_predicted]
    classes = [Kind(name, name, number) for number, name in sorted(called, key=lambda item: (-item[0], item[1]))]
    figures = [("Classes", "label", classes, many(numbers.num_labelled, "labelled video"))]
    for title, field, column, counted in (
        ("Length", "duration", "duration_s", count_durations),
        ("Codec", "codec", "codec", count_codecs),
    ):
        known = rows[column].drop_null()
        said = f"{many(len(known), 'video')} of which the catalog says it"
        if not len(known):
            known = pa.chunked_array([pa.array(getattr(site, column), rows[column].type)]).drop_null()
            said = f"{many(len(known), 'video')} that {'was' if len(known) == 1 else 'were'} opened for contact strips"
        figures.append((title, field, list(counted(known.to_numpy(zero_copy_only=False))), said))
    return [
        {"title": title, "field": field, "bars": bars[:MAX_BARS], "more": len(bars) - MAX_BARS, "counts": said}
        for title, field, bars, said in figures
        if bars
    ]


def _network(result: ResultTable) -> list[tuple[str, str]]:
    """What answered, for people: name and text of each fact that is known of the checkpoint, where it still is."""
    job = result.job
    storage = Storage(replace(result.ledger.storage.config, retry_s=_PATIENCE_S))
    facts = [("Network", job.model.factory)] if job.model else []
    facts += [("Checkpoint", job.checkpoint)] if job.checkpoint else [("Average of", ", ".join(job.members))]
    try:
        meta = read_document(storage, absolute(job.checkpoint)).meta if job.checkpoint else None
        saved_s = storage.stat(join(absolute(job.checkpoint), META_FILE)).modified_s if meta else 0.0
    except KinorayError:  # gone, or not ours to read: the table does not need it
        meta = None
    if meta and meta.model_digest == job.model_digest:
        origin = meta.origin
        trained = f"trained with kinoray: {many(meta.epoch, 'epoch')}, {many(meta.samples, 'video')} seen"
        facts.append(("From", origin.source if origin else trained))
        facts += [("Licence of the weights", origin.licence)] if origin and origin.licence else []
        facts.append(("Saved", f"{datetime.fromtimestamp(saved_s, UTC):%Y-%m-%d}"))
    days = sorted({f"{datetime.fromtimestamp(end.began_s, UTC):%Y-%m-%d}" for end in result.ledger.jobs(_ignore)})
    facts += [("Labelled", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")] if days else []
    return facts


def _ignore(_: str) -> None:
    """A job's file that says something else tells no day; `labels --summary` says which it is."""


def _distinct(rows: pa.Table, name: str) -> list[str]:
    return sorted(value for value in pc.unique(rows[name]).to_pylist() if value)


# Figures


@dataclass(frozen=True, slots=True)
class _Bar:
    """One rectangle of the histogram in drawing units, y downwards; `hint` is what it says under the pointer."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    hint: str
    values: str
    """The values that it counts, as the site's filters take them: `0.45..0.5`."""


def histogram_bars(histogram: np.ndarray, what: str) -> list[_Bar]:
    """Stacked bars of int64 [3, bins] (right, wrong, unknown over values 0 .. 1); the highest fills the height.

    Args:
        what: name of the value, for the hints.
    """
    num_bins = histogram.shape[1]
    unit = HISTOGRAM_HEIGHT / max(1, int(histogram.sum(axis=0).max()))
    width = HISTOGRAM_WIDTH / num_bins
    bars: list[_Bar] = []
    for index, column in enumerate(histogram.T.tolist()):
        floor = HISTOGRAM_HEIGHT
        counted = ", ".join(f"{n} {kind}" for n, kind in zip(column, _KINDS, strict=True) if n and kind != "unknown")
        low, high = index / num_bins, (index + 1) / num_bins
        hint = f"{what} {low:.2f} to {high:.2f}: {many(sum(column), 'video')}"
        for number, kind in zip(column, _KINDS, strict=True):
            if number:
                height = number * unit
                floor -= height
                hint_here = f"{hint} ({counted})" if counted else hint
                place = (index * width + 1, round(floor, 2), width - 2, round(height, 2))
                bars.append(_Bar(*place, kind, hint_here, f"{low:g}..{high:g}"))
    return bars


@dataclass(frozen=True, slots=True)
class _Mark:
    """One bin of the reliability plot in drawing units, y downwards: a dot whose area is the bin's share of videos."""

    x: float
    y: float
    radius: float
    hint: str


def _reliability_marks(calibration: Calibration) -> list[_Mark]:
    """A dot for each bin that has videos, at (mean score, accuracy); well calibrated scores lie on the diagonal."""
    side = RELIABILITY_SIDE
    total = max(1, int(calibration.videos.sum()))
    marks = []
    for item in calibration.summary().bins:
        if item.mean_score is not None and item.accuracy is not None:
            hint = (
                f"score {item.low:.2f} to {item.high:.2f}: {many(item.videos, 'video')}, "
                f"mean score {item.mean_score:.3f}, {item.accuracy:.1%} right"
            )
            radius = 2 + 10 * (item.videos / total) ** 0.5
            x = side * item.mean_score
            y = side * (1 - item.accuracy)
            marks.append(_Mark(round(x, 2), round(y, 2), round(radius, 2), hint))
    return marks


def _shade(confusion: Confusion) -> list[list[int]]:
    """For each cell its share of the row as a step 0 .. 10; a count above zero never gets step 0."""
    share = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    steps: list[list[int]] = np.ceil(share * NUM_SHADES).astype(int).tolist()
    return steps


def _confusion_picture(confusion: Confusion) -> str:
    """Data URI of a PNG, one pixel a cell: opacity is the share of the row, so that it suits any background."""
    share = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
    bgra = np.zeros((*confusion.counts.shape, 4), np.uint8)
    bgra[..., :3] = (205, 125, 45)
    bgra[..., 3] = np.where(confusion.counts > 0, 40 + np.round(share * 215), 0)
    _, png = cv2.imencode(".png", bgra)
    return f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode('ascii')}"
