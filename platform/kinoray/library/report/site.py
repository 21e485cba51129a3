"""Writes the report's site: index.html, its script and style, data files of rows and of contact strips.

What is easy to break: index.html comes last, so that a report that was cut off leaves the old page or none; and every
file names its build, so that a page never shows rows or frames of another one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import Reference
from kinoray.console import Progress
from kinoray.library.report.columns import ROWS_PER_FILE, STRIPS_PER_FILE, Names, data_file, id_ranks, row_columns
from kinoray.page import render_page
from kinoray.storage.objects import Storage, join
from kinoray.video.strips import Strip, contact_strips

__all__ = ["Site", "add_places"]

SCRIPTS = ("data", "select", "corrections", "card", "sheet", "view", "keys")
STYLES = ("report.css", "report_site.css")
_STRIPS_AT_ONCE = 100 * STRIPS_PER_FILE  # held in memory, about 25 kB each; within them videos are read in place order
_WRITERS = 8
_DATA_FILE = re.compile(r"(rows|strips)-\d+\.js")


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


class Site:
    """The folder of one report. `num_bytes` counts what was written."""

    def __init__(self, storage: Storage, out: str, listed: pa.Table, names: Names, record: dict[str, Any]) -> None:
        self.storage, self.out = storage, out.rstrip("/")
        self.listed, self.record = listed, record
        parts = (listed.slice(start, ROWS_PER_FILE) for start in range(0, len(listed), ROWS_PER_FILE))
        self.chunks = [row_columns(part, names) for part in parts]
        content = json.dumps([record, self.chunks]).encode()
        self.build = hashlib.sha256(content).hexdigest()[:16]
        self.nonce = hashlib.sha256(b"nonce" + content).hexdigest()[:32]  # no name can foresee it: it is part of it
        self.num_bytes = 0

    def write(self, values: dict[str, object], num_frames: int) -> int:
        """Write all files, index.html last, and remove data files of an older site in the same place.

        Args:
            values: what the page's template needs, but for what every page has.
            num_frames: of each contact strip.

        Returns:
            How many of the videos that should have a strip could not be read for it.

        Raises:
            StorageError: a file cannot be written.
        """
        written: set[str] = set()
        num_unreadable = 0

        def counted() -> Iterator[tuple[str, Any]]:
            nonlocal num_unreadable
            yield "site", self.record
            for index, chunk in enumerate(self.chunks):
                yield f"rows-{index}", chunk
            for name, strips in self._strip_files(num_frames):
                num_unreadable += sum(not strip.frames for strip in strips)
                yield name, [_strip_record(strip) for strip in strips]

        for name in _in_threads(self._put_data, counted()):
            written.add(f"{name}.js")
        self._put("assets/report.css", "".join(_template(name) for name in STYLES).encode())
        self._put("assets/report.js", "".join(_template(f"report_{name}.js") for name in SCRIPTS).encode())
        self._put("index.html", self._page(values).encode("utf-8"))
        self._remove_others(written)
        return num_unreadable

    def _put_data(self, item: tuple[str, Any]) -> str:
        name, value = item
        self._put(f"data/{name}.js", data_file(name, self.build, value))
        return name

    def _put(self, path: str, data: bytes) -> None:
        self.storage.put(join(self.out, path), data)
        self.num_bytes += len(data)

    def _page(self, values: dict[str, object]) -> str:
        policy = (
            f"default-src 'none'; script-src 'nonce-{self.nonce}'; style-src 'nonce-{self.nonce}'; img-src data:; "
            "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types kinoray"
        )
        shared = {"site_policy": policy, "nonce": self.nonce, "build": self.build, "link": _link}
        return render_page("report.html.j2", values | shared, styles=())

    def _strip_files(self, num_frames: int) -> Iterator[tuple[str, list[Strip]]]:
        """Names and strips, made in windows of the list, so that they need not fit in memory together."""
        wanted = self.listed.filter(pc.greater_equal(self.listed["strip"], 0))
        if not num_frames or not len(wanted):
            return
        progress = Progress(len(wanted), "report", "contact strips")
        for start in range(0, len(wanted), _STRIPS_AT_ONCE):
            window = wanted.slice(start, _STRIPS_AT_ONCE)
            order = pc.sort_indices(window, [("uri", "ascending"), ("offset", "ascending")]).to_pylist()
            strips: dict[int, Strip] = {}
            columns = [window[name].take(order).to_pylist() for name in ("uri", "offset", "length")]
            places = [Reference(*place) for place in zip(*columns, strict=True)]
            made = contact_strips(self.storage, places, num_frames)
            for place, strip in zip(order, made, strict=True):
                strips[place] = strip
                progress.update(1, unreadable=int(not strip.frames))
            for first in range(0, len(window), STRIPS_PER_FILE):
                part = [strips[place] for place in range(first, min(first + STRIPS_PER_FILE, len(window)))]
                yield f"strips-{(start + first) // STRIPS_PER_FILE}", part
        progress.close()

    def _remove_others(self, written: set[str]) -> None:
        for info in list(self.storage.list(join(self.out, "data/"))):
            name = info.uri.rpartition("/")[2]
            if info.uri == join(self.out, "data", name) and _DATA_FILE.fullmatch(name) and name not in written:
                self.storage.delete(info.uri)


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


def _template(name: str) -> str:
    return files("kinoray").joinpath("templates", name).read_text(encoding="utf-8")
