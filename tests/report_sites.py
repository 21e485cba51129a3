"""Small result tables and the sites that `report` makes of them, for the tests; and names that try to break out."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.config.scoring import ScoreKind, WindowsConfig
from kinoray.config.shared import digest
from kinoray.label.ledger import Ledger
from kinoray.label.unit import PREDICTION_SCHEMA, WINDOW_SCHEMA
from kinoray.library.config import ReportConfig
from kinoray.library.report import report
from kinoray.storage.objects import Storage
from small_tables import job_record, planned

__all__ = [
    "CLASSES",
    "HOSTILE",
    "Site",
    "Truth",
    "catalog_of",
    "hostile_site",
    "make_site",
    "predictions",
    "refused",
    "row",
    "windows_of",
    "write_predictions",
]

CLASSES = ("cat", "dog", "emu")
Truth = list[tuple[str, str | None, str | None]]
"""video_id, label and split of each video."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "\u202egnp.exe",
    "\u2066isolate\u2069",
    "nul\x00byte",
    "bell\x07 escape\x1b[31mred",
    "{{7*7}}{% raw %}",
    "${alert(1)}",
    "`${alert(1)}`\\",
    "<!-- --><svg onload=alert(1)>",
    "]]></style><style>*{display:none}</style>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "</option></select><iframe srcdoc=x>",
    "line\nbreak\ttab\r",
    "</title><base href=//evil.example/>",
    "=1+1",
    '=HYPERLINK("http://evil.example","x")',
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    "\uff1d1+1",
    "'quoted",
    'a,"b",c',
    "line\u2028separator\u2029",
    "x" * 3000,
    "\U0001f9d1\u200d\U0001f680 emoji \ufe0f",
    "\U000e0041tag",
    "__proto__",
    "constructor",
    "..",
    "../../etc/passwd",
    "%3Cscript%3E&label=cat#view=videos",
    " leading and trailing ",
    "\ufeffbom",
)


def row(video_id: str, **changes: Any) -> dict[str, Any]:
    """A labelled row: dog 0.6, cat 0.3, emu 0.1."""
    counts = {item.name: 1 for item in PREDICTION_SCHEMA if item.type == pa.int32() and not item.nullable}
    return {
        **counts,
        "video_id": video_id,
        "uri": f"/nowhere/{video_id}.mp4",
        "status": "labelled",
        "label_topk": ["dog", "cat", "emu"],
        "id_topk": [1, 0, 2],
        "score_topk": [0.6, 0.3, 0.1],
        "margin": 0.3,
        "entropy": 0.898,
        "abstained": False,
        "model_digest": "m" * 16,
        "config_digest": "c" * 16,
        "run_id": "run-1",
    } | changes


def refused(
    video_id: str, error_class: str | None = "EmptyMedia", text: str = "no bytes", **more: Any
) -> dict[str, Any]:
    """A quarantined row."""
    nothing = dict.fromkeys(("label_topk", "id_topk", "score_topk", "margin", "entropy"))
    return row(video_id, status="quarantined", error_class=error_class, error_text=text, **nothing) | more


def predictions(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(
        [item | {"row_key": f"k{n:016x}"} for n, item in enumerate(rows)], schema=PREDICTION_SCHEMA
    )


def catalog_of(truth: Truth, labels: tuple[str, ...] = CLASSES) -> Catalog:
    ids = [labels.index(label) if label is not None else None for _, label, _ in truth]
    rows = [
        {"video_id": video_id, "uri": f"/nowhere/{video_id}.mp4", "label": label, "label_id": label_id, "split": split}
        for (video_id, label, split), label_id in zip(truth, ids, strict=True)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA), labels)


def lists_of(truth: list[tuple[str, list[int] | None]], labels: tuple[str, ...] = CLASSES) -> Catalog:
    """A catalog of label lists, all of split val."""
    rows = [
        {"video_id": video_id, "uri": f"/nowhere/{video_id}.mp4", "label_ids": ids, "split": "val"}
        for video_id, ids in truth
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA), labels)


def write_predictions(
    folder: Path,
    table: pa.Table,
    unit_size: int = 3,
    *,
    num_units: int | None = None,
    several: bool = False,
    windows: pa.Table | None = None,
    embeddings: bool = False,
    labels: tuple[str, ...] = (),
    checkpoint: str = "run",
    model_digest: str = "m",
) -> str:
    """A labelling, as `label` leaves it; with num_units, one that has got so far."""
    ledger = Ledger(Storage(), str(folder / digest(table["video_id"].to_pylist())))
    cut = None if windows is None else WindowsConfig(length_s=1.0, stride_s=1.0)
    scores: ScoreKind = "sigmoid" if several else "softmax"
    about = {"scores": scores, "windows": cut, "checkpoint": checkpoint, "model_digest": model_digest}
    ledger.pin_job(job_record(labels=labels, settings={"scorer": {"embeddings": embeddings}}, **about))
    plan = planned(ledger, "catalog", table["row_key"].to_pylist(), unit_size)
    for number, unit in enumerate(plan.units[:num_units]):
        rows = table.slice(number * unit_size, unit_size)
        ours = windows
        if windows is not None:
            ours = windows.filter(pc.is_in(windows["row_key"], value_set=rows["row_key"].combine_chunks()))
        ledger.commit(unit, rows, "run-1", ours)
    return str(folder)


def windows_of(rows: list[dict[str, Any]], answers: list[tuple[str, float]]) -> pa.Table:
    """Windows of a second each for every labelled row, with these first classes and scores."""
    return pa.Table.from_pylist(
        [
            {
                "video_id": item["video_id"],
                "row_key": f"k{number:016x}",
                "window": place,
                "begin_s": float(place),
                "end_s": place + 1.0,
                "label_topk": [label],
                "id_topk": [0],
                "score_topk": [score],
                "margin": 0.1,
                "entropy": 0.1,
                "abstained": False,
            }
            for number, item in enumerate(rows)
            for place, (label, score) in enumerate(answers)
            if item["status"] == "labelled"
        ],
        schema=WINDOW_SCHEMA,
    )


@dataclass
class Site:
    """What `report` wrote and returned."""

    totals: dict[str, Any]
    folder: Path
    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def texts(self, tag: str) -> list[str]:
        """The pieces of text that lie directly in elements of this name."""
        return [data for name, data in self.words if name == tag]

    @property
    def text(self) -> str:
        """All text, white space collapsed."""
        return " ".join("".join(data for _, data in self.words).split())

    def data(self, name: str) -> Any:
        """What data/NAME.js hands to the page."""
        text = (self.folder / "data" / f"{name}.js").read_text(encoding="ascii")
        head, tail = "kinoray.deliver(...", ");\n"
        assert text.startswith(head)
        assert text.endswith(tail)
        found, build, value = json.loads(text[len(head) : -len(tail)])
        assert (found, build) == (name, self.all("body")[0]["data-build"])
        return value

    def rows(self) -> list[dict[str, Any]]:
        """The listed rows with their names, in the order of the files."""
        site = self.data("site")
        rows = []
        for index in range(site["rows"]):
            columns = self.data(f"rows-{index}")
            uris = columns.pop("uris")
            for values in zip(*columns.values(), strict=True):
                item = dict(zip(columns, values, strict=True))
                item["uri"] = uris[item["uri"]]
                item["status"] = ("labelled", "quarantined", "skipped")[item["status"]]
                item["top"] = [site["labels"][label] for label in item["top"]]
                for name, names in (("reason", "reasons"), ("truth", "labels"), ("split", "splits")):
                    item[name] = site[names][item[name]] if item[name] >= 0 else None
                rows.append(item)
        return rows


class _Reader(HTMLParser):
    """Collects elements in order, and text by the element that holds it. Refuses what is not well nested."""

    VOID = frozenset({"meta", "img", "input", "br", "link"})

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.open = site, ["document"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.site.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.site.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.site.words.append((self.open[-1], data))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment in the page: {data!r}")


def make_site(
    folder: Path,
    rows: list[dict[str, Any]],
    catalog: Catalog | None = None,
    *,
    several: bool = False,
    windows: pa.Table | None = None,
    embeddings: bool = False,
    labels: tuple[str, ...] = (),
    **settings: Any,
) -> Site:
    """Write the rows as a labelling, and its report; both in `folder`."""
    if catalog:
        save_catalog(Storage(), str(folder / "set" / "catalog.parquet"), catalog)
    config = ReportConfig(
        predictions=write_predictions(
            folder / "labels",
            predictions(rows),
            unit_size=max(3, len(rows) // 5),
            several=several,
            windows=windows,
            embeddings=embeddings,
            labels=labels,
        ),
        out=str(folder / "report"),
        catalog=str(folder / "set" / "catalog.parquet") if catalog else "",
        **settings,
    )
    totals = report(config)
    site = Site(totals, folder / "report", (folder / "report" / "index.html").read_text(encoding="utf-8"))
    reader = _Reader(site)
    reader.feed(site.html)
    reader.close()
    assert reader.open == ["document"]
    return site


def hostile_site(folder: Path, names: tuple[str, ...], title: str) -> Site:
    """Each name as id, address, class, split, run, and as kind and text of a reason; every other answer is wrong."""
    labels = tuple(sorted(names))
    rows = []
    for index, name in enumerate(names):
        called = [names[index], names[(index + 1) % len(names)]]
        answer = row(name, uri=f"/{name}", label_topk=called, score_topk=[0.6, 0.3], id_topk=[0, 1])
        rows.append(answer | {"run_id": name, "model_digest": name})
        rows.append(refused(f"q{index:02d}{name}", error_class=name, text=name))
    truth: Truth = [(name, names[index - index % 2], name) for index, name in enumerate(names)]
    return make_site(folder, rows, catalog_of(truth, labels), title=title)
