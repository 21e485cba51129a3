"""Writes the report's site: index.html, its script and style, data files of rows and of contact strips.

The data files are columns of rows as JavaScript calls, so that a page opened from a disk can load them (a browser lets
no such page fetch JSON). What is easy to break: names come from strangers. They are in these files only as JSON strings
in ASCII, with `<`, `>` and `&` escaped, never as code, keys or file names. index.html comes last, so that a report that
was cut off leaves the old page or none; and every file names its build, so that a page never shows rows or frames of
another one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import Reference
from kinoray.config.shared import DecodeConfig
from kinoray.console import Progress
from kinoray.errors import ObjectNotFound
from kinoray.library.numbers import Numbers
from kinoray.page.render import asset, render_site_page
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_json
from kinoray.video.strips import Strip, contact_strips

__all__ = [
    "ROWS_PER_FILE",
    "STRIPS_PER_FILE",
    "Likeness",
    "Links",
    "Names",
    "Site",
    "add_places",
    "collect_names",
    "id_ranks",
    "site_record",
]

ROWS_PER_FILE = 2_000
STRIPS_PER_FILE = 10
"""So many that a page of 50 needs 5 files in the first order, so few that any other order does not load too much.
Windows and links of rows are so many in a file, too."""
_STRIP_FRAMES = 4  # as many as are seen at one glance

SCRIPTS = ("data", "select", "corrections", "player", "card", "sheet", "bulk", "map", "view", "keys")
STYLES = ("page.css", "report.css", "report_site.css")
_CALL, _END = "kinoray.deliver(...", ");\n"
_STATUSES = ("labelled", "quarantined", "skipped")
_NUM_CONFUSED = 3
_DIGITS = 6
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}
_STRIPS_AT_ONCE = 100 * STRIPS_PER_FILE  # held in memory, about 25 kB each; within them videos are read in place order
_WRITERS = 8
_DATA_FILE = re.compile(r"(rows|strips|media|windows|links|map|similar)-\d+\.js")


# What the data files hold


def _data_file(name: str, build: str, value: Any) -> bytes:
    """One data file: a call that hands `value` (JSON-able) to the page under this name."""
    text = json.dumps([name, build, value], separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return f"{_CALL}{text}{_END}".encode("ascii")


@dataclass(frozen=True, slots=True)
class Names:
    """What rows refer to by number."""

    labels: tuple[str, ...]
    """Those of the numbers in their order, then those that are never a first answer."""
    reasons: tuple[str, ...]
    splits: tuple[str, ...]
    truths: tuple[str, ...] | None
    """Where a video may have several classes: what they are, `red|round`; None where a truth is a label."""


def collect_names(listed: pa.Table, numbers: Numbers, *, several: bool = False) -> Names:
    """All names of the listed rows."""
    labels = dict.fromkeys(row.counts.label for row in numbers.classes)
    truths = _distinct(listed["true_label"])
    found = _distinct(pc.list_flatten(listed["label_topk"]))
    labels.update(dict.fromkeys(sorted(found if several else found | truths)))
    reasons = pc.coalesce(listed["error_class"], listed["status"]).filter(pc.not_equal(listed["status"], "labelled"))
    return Names(
        labels=tuple(labels),
        reasons=tuple(sorted(_distinct(reasons))),
        splits=tuple(sorted(_distinct(listed["split"]))),
        truths=tuple(sorted(truths)) if several else None,
    )


def _distinct(column: pa.ChunkedArray) -> set[str]:
    return {value for value in pc.unique(column).to_pylist() if value is not None}


def _row_columns(rows: pa.Table, names: Names) -> dict[str, list[Any]]:
    """Rows as lists, one a column; names are numbers (-1 for none), addresses are told once."""
    uris, uri = _coded(rows["uri"])
    labelled = pc.equal(rows["status"], "labelled")
    reason = pc.if_else(labelled, None, pc.coalesce(rows["error_class"], rows["status"]))
    tops = [item or [] for item in rows["label_topk"].to_pylist()]
    place = {name: index for index, name in enumerate(names.labels)}
    return {
        "id": rows["video_id"].to_pylist(),
        "rank": rows["rank"].to_pylist(),
        "uris": uris,
        "uri": uri,
        "offset": rows["offset"].to_pylist(),
        "length": rows["length"].to_pylist(),
        "key": rows["row_key"].to_pylist(),
        "status": _places(rows["status"], _STATUSES),
        "reason": _places(reason, names.reasons),
        "text": rows["error_text"].to_pylist(),
        "top": [[place[label] for label in item] for item in tops],
        "scores": [[round(score, _DIGITS) for score in item or []] for item in rows["score_topk"].to_pylist()],
        "margin": _rounded(rows["margin"]),
        "entropy": _rounded(rows["entropy"]),
        "abstained": [int(value) for value in rows["abstained"].to_pylist()],
        "truth": _places(rows["true_label"], names.labels if names.truths is None else names.truths),
        "split": _places(rows["split"], names.splits),
        "strip": rows["strip"].to_pylist(),
        "windows": rows["windows"].to_pylist(),
        **({} if names.truths is None else {"right": _as_verdicts(rows["right"])}),
    }


def _coded(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_pylist()


def _places(column: pa.ChunkedArray, names: Sequence[str]) -> list[int]:
    found: list[int] = pc.fill_null(pc.index_in(column, value_set=pa.array(names, pa.string())), -1).to_pylist()
    return found


def _as_verdicts(column: pa.ChunkedArray) -> list[int]:
    """1 for right, 0 for wrong, -1 where it is not known."""
    return [-1 if value is None else int(value) for value in column.to_pylist()]


def _rounded(column: pa.ChunkedArray) -> list[float | None]:
    return [None if value is None else round(value, _DIGITS) for value in column.to_pylist()]


def id_ranks(ids: Sequence[str]) -> list[int]:
    """The place of each id in the order of people: v2 before v10."""
    order = sorted(range(len(ids)), key=lambda index: (_natural(ids[index]), ids[index]))
    ranks = [0] * len(ids)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def _natural(text: str) -> list[tuple[int, str]]:
    """Pieces of text, digits as (number of digits, digits): longer numbers are larger."""
    parts = re.split(r"0*([0-9]+)", text)
    return [(len(part) if index % 2 else 0, part.casefold()) for index, part in enumerate(parts)]


def site_record(numbers: Numbers, names: Names, listed: pa.Table, title: str, table_digest: str) -> dict[str, Any]:
    """What the page must know before any row."""
    return {
        "title": title,
        "digest": table_digest,
        "labels": names.labels,
        "reasons": names.reasons,
        "splits": names.splits,
        "classes": _class_records(numbers),
        "videos": numbers.num_videos,
        "listed": len(listed),
        "rows": -(-len(listed) // ROWS_PER_FILE),
        "perStripFile": STRIPS_PER_FILE,
        "truth": numbers.accuracy is not None,
        "media": bool(pc.any(pc.greater_equal(listed["strip"], 0)).as_py() or pc.count(listed["duration_s"]).as_py()),
        "windows": bool(pc.any(pc.greater(listed["windows"], 1)).as_py()),
        **({} if names.truths is None else {"truths": names.truths}),
    }


def _class_records(numbers: Numbers) -> list[dict[str, Any]]:
    """Counts of each class, in the order of the labels, and what it is most often taken for."""
    records = []
    confusion = numbers.confusion
    for index, row in enumerate(numbers.classes):
        record: dict[str, Any] = {
            "predicted": row.num_predicted,
            "meanScore": row.mean_score,
            "called": row.counts.called,
            "true": row.counts.videos,
            "right": row.counts.right,
        }
        if confusion is not None:
            taken = confusion.counts[index].copy()
            taken[index] = 0
            most = (-taken).argsort(kind="stable")[:_NUM_CONFUSED].tolist()
            record["takenFor"] = [[other, int(taken[other])] for other in most if taken[other]]
        records.append(record)
    return records


def add_places(listed: pa.Table, num_strips: int) -> pa.Table:
    """Add `rank` (place in the order of ids) and `strip` (number of the contact strip, -1 for none) to listed rows.

    Args:
        num_strips: how many labelled rows get one, from the first on.
    """
    labelled = pc.equal(listed["status"], "labelled").to_numpy()
    number = np.cumsum(labelled) - 1
    strip = np.where(labelled & (number < num_strips), number, -1)
    listed = listed.append_column("rank", pa.array(id_ranks(listed["video_id"].to_pylist()), pa.int64()))
    return listed.append_column("strip", pa.array(strip, pa.int64()))


# The folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Addresses with which anybody may read the videos."""

    uris: Sequence[str | None]
    """Of each listed row; None where it has none."""
    until: str
    """When they end, for people."""

    @property
    def origins(self) -> list[str]:
        """The servers that they lead to, as a policy names them."""
        return sorted({"{0.scheme}://{0.netloc}".format(urlsplit(uri)) for uri in self.uris if uri})


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How the listed videos lie to each other by their embeddings; None of those that have none."""

    places: Sequence[Sequence[float] | None]
    """Of each listed row: x and y on the map, in -1 .. 1."""
    near: Sequence[Sequence[Sequence[float]] | None] | None
    """Of each: the numbers of the listed rows that are most similar, and how similar; None where these are too many."""


class Site:
    """The folder of one report. `num_bytes` counts what was written, `written` names it.

    Args:
        listed: rows, with what `add_places` adds.
        windows: rows of WINDOW_LABEL_SCHEMA of listed videos, in the order of time for each.
        links: put into the site.
        likeness: where there are embeddings.
    """

    def __init__(
        self,
        storage: Storage,
        out: str,
        listed: pa.Table,
        names: Names,
        record: dict[str, Any],
        decode: DecodeConfig,
        *,
        windows: Iterable[pa.Table] = (),
        links: Links | None = None,
        likeness: Likeness | None = None,
    ) -> None:
        self._decode = decode
        self._links = links
        self._likeness = likeness
        record = {**record, "map": likeness is not None, "similar": bool(likeness and likeness.near)}
        if links:
            record = {**record, "linksUntil": links.until}
        self.storage = storage
        self.out = out.rstrip("/")
        self.listed = listed
        self.record = record
        parts = (listed.slice(start, ROWS_PER_FILE) for start in range(0, len(listed), ROWS_PER_FILE))
        self.chunks = [_row_columns(part, names) for part in parts]
        content = json.dumps([record, self.chunks]).encode()
        self.build = hashlib.sha256(content).hexdigest()[:16]
        self.nonce = hashlib.sha256(b"nonce" + content).hexdigest()[:32]  # no name can foresee it: it is part of it
        self.num_bytes = 0
        self.written: set[str] = set()
        self._windows = _window_lists(windows, names) if record["windows"] else None
        self.duration_s: list[float | None] = listed["duration_s"].to_pylist()
        """Of each listed row, as far as the catalog or a strip tells; whole after `write_data`."""
        self.codec: list[str | None] = listed["codec"].to_pylist()
        """Likewise."""

    def write_data(self, *, keep_strips: bool = False) -> int:
        """Write all that the page loads. The page itself, which `write_page` writes, comes last.

        Args:
            keep_strips: leave those that a whole site of the same rows has here already.

        Returns:
            How many of the videos that should have a strip could not be read for it.

        Raises:
            StorageError: a file cannot be written.
        """
        kept = self._kept_strips() if keep_strips else None
        num_unreadable = kept or 0

        def counted() -> Iterator[tuple[str, Any]]:
            nonlocal num_unreadable
            for index, chunk in enumerate(self.chunks):
                yield f"rows-{index}", chunk
            for name, strips in self._strip_files() if kept is None else ():
                num_unreadable += sum(not strip.frames for strip in strips)
                yield name, [_strip_record(strip) for strip in strips]
            if self.record["media"]:
                yield from self._media_files()
            if self._windows is not None:
                yield from _in_files("windows", [self._windows.get(key) for key in self.listed["row_key"].to_pylist()])
            if self._links:
                yield from _in_files("links", self._links.uris)
            if self._likeness:
                yield from _in_files("map", self._likeness.places, ROWS_PER_FILE)
                yield from _in_files("similar", self._likeness.near or ())

        self._put_data(("site", self.record))  # first: it says whose the folder is
        for _ in _in_threads(self._put_data, counted()):
            pass
        self._put("assets/report.css", asset(STYLES).encode())
        self._put("assets/report.js", asset([f"report_{name}.js" for name in SCRIPTS]).encode())
        return num_unreadable

    def write_page(self, values: dict[str, object], media: Sequence[str]) -> None:
        """Write index.html, and remove data files of an older site in the same place.

        Args:
            values: what the page's template needs, but for what every page has.
            media: from where the page may play videos, as a policy has it.
        """
        shared = {"build": self.build, "link": _link}
        page = render_site_page("report.html.j2", {**values, **shared}, nonce=self.nonce, media=media)
        self._put("index.html", page.encode("utf-8"))
        self._remove_others()

    def _put_data(self, item: tuple[str, Any]) -> str:
        name, value = item
        return self._put(f"data/{name}.js", _data_file(name, self.build, value))

    def _put(self, path: str, data: bytes) -> str:
        self.storage.put(join(self.out, path), data)
        self.num_bytes += len(data)
        self.written.add(path)
        return path

    def _kept_strips(self) -> int | None:
        """How many videos could not be read for the strips of the site that is here; None if they are to be made."""
        num_strips = pc.sum(pc.greater_equal(self.listed["strip"], 0)).as_py() or 0
        names = [f"strips-{number}" for number in range(-(-num_strips // STRIPS_PER_FILE))]
        try:
            page = self.storage.read(join(self.out, "index.html"))  # the last file of a site
            if f'data-build="{self.build}"'.encode() not in page:
                return None
            found = [self._read_data(name) for name in names]
            media = [
                self._read_data(f"media-{index}") for index in range(len(self.chunks) if self.record["media"] else 0)
            ]
            self.duration_s = [value for chunk in media for value in chunk["duration"]] or self.duration_s
            self.codec = [
                chunk["codecs"][place] if place >= 0 else None for chunk in media for place in chunk["codec"]
            ] or self.codec
        except (ObjectNotFound, ValueError, LookupError, TypeError):
            return None
        self.written.update(f"data/{name}.js" for name in names)
        return sum(isinstance(strip, str) for strips in found for strip in strips)

    def _read_data(self, name: str) -> Any:
        """The value of a data file of this build. Raises ObjectNotFound, ValueError."""
        text = self.storage.read(join(self.out, "data", f"{name}.js")).decode("ascii")
        found, build, value = parse_json(text.removeprefix(_CALL).removesuffix(_END))
        if (found, build) != (name, self.build):
            raise ValueError(f"{name} is of another report")
        return value

    def _media_files(self) -> Iterator[tuple[str, Any]]:
        """Lengths and codecs, as many rows a file as rows-N has."""
        for start in range(0, len(self.listed), ROWS_PER_FILE):
            codecs = self.codec[start : start + ROWS_PER_FILE]
            names = sorted({name for name in codecs if name})
            seconds = self.duration_s[start : start + ROWS_PER_FILE]
            yield (
                f"media-{start // ROWS_PER_FILE}",
                {
                    "codecs": names,
                    "codec": [names.index(name) if name else -1 for name in codecs],
                    "duration": [None if value is None else round(value, 3) for value in seconds],
                },
            )

    def _strip_files(self) -> Iterator[tuple[str, list[Strip]]]:
        """Names and strips, made in windows of the list, so that they need not fit in memory together."""
        wanted = self.listed.filter(pc.greater_equal(self.listed["strip"], 0))
        if not len(wanted):
            return
        progress = Progress(len(wanted), "report", "contact strips")
        for start in range(0, len(wanted), _STRIPS_AT_ONCE):
            window = wanted.slice(start, _STRIPS_AT_ONCE)
            rows = np.flatnonzero(self.listed["strip"].to_numpy() >= 0)[start : start + len(window)].tolist()
            order = pc.sort_indices(window, [("uri", "ascending"), ("offset", "ascending")]).to_pylist()
            strips: dict[int, Strip] = {}
            columns = [window[name].take(order).to_pylist() for name in ("uri", "offset", "length")]
            places = [Reference(*place) for place in zip(*columns, strict=True)]
            made = contact_strips(self.storage, places, _STRIP_FRAMES, self._decode)
            for place, strip in zip(order, made, strict=True):
                strips[place] = strip
                if strip.info:
                    self.duration_s[rows[place]] = self.duration_s[rows[place]] or strip.info.duration_s or None
                    self.codec[rows[place]] = self.codec[rows[place]] or strip.info.codec or None
                progress.update(1, without_frames=int(not strip.frames))
            for first in range(0, len(window), STRIPS_PER_FILE):
                part = [strips[place] for place in range(first, min(first + STRIPS_PER_FILE, len(window)))]
                yield f"strips-{(start + first) // STRIPS_PER_FILE}", part
        progress.close()

    def _remove_others(self) -> None:
        for info in list(self.storage.list(join(self.out, "data/"))):
            name = info.uri.rpartition("/")[2]
            is_ours = info.uri == join(self.out, "data", name) and _DATA_FILE.fullmatch(name)
            if is_ours and f"data/{name}" not in self.written:
                self.storage.delete(info.uri)


def _window_lists(windows: Iterable[pa.Table], names: Names) -> dict[str, list[list[Any]]]:
    """The windows of each row_key as lists: when they begin, when they end, their first classes and scores."""
    place = {name: index for index, name in enumerate(names.labels)}
    found: dict[str, list[list[Any]]] = {}
    for table in windows:
        columns = [table[name].to_pylist() for name in ("row_key", "begin_s", "end_s", "label", "score")]
        for key, begin_s, end_s, label, score in zip(*columns, strict=True):
            lists = found.setdefault(key, [[], [], [], []])
            said = place.get(label, -1), None if score is None else round(score, 4)
            for values, value in zip(lists, (round(begin_s, 3), round(end_s, 3), *said), strict=True):
                values.append(value)
    return found


def _in_files(kind: str, values: Sequence[Any], num_rows: int = STRIPS_PER_FILE) -> Iterator[tuple[str, Any]]:
    """Something of each listed row, so many rows a file."""
    for start in range(0, len(values), num_rows):
        yield f"{kind}-{start // num_rows}", list(values[start : start + num_rows])


def _in_threads(function: Callable[[tuple[str, Any]], str], items: Iterator[tuple[str, Any]]) -> Iterator[str]:
    """Results in order, with at most twice as many items under way as there are threads."""
    with ThreadPoolExecutor(_WRITERS) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * _WRITERS:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _strip_record(strip: Strip) -> list[Any] | str:
    """Frames as [width, height, base64 of a JPEG], or the reason why there are none."""
    if not strip.frames:
        return strip.reason
    return [[frame.width, frame.height, frame.uri.partition(",")[2]] for frame in strip.frames]


def _link(**query: str) -> str:
    """The part of the site's address behind `#` that shows these videos."""
    return "#" + urlencode(query)
