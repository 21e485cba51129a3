"""The page: its numbers against plain loops, its frames against the videos, and names that try to break out of it."""

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest

from kinoray.catalog import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.config import StorageConfig
from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.metrics import wilson_interval
from kinoray.page import visible
from kinoray.predictions import PREDICTION_SCHEMA, Ledger
from kinoray.report import report
from kinoray.report_figures import HISTOGRAM_HEIGHT, histogram_bars
from kinoray.report_numbers import count, join_truth
from kinoray.report_strips import MAX_FRAME_BYTES, jpeg_uri
from kinoray.storage import Storage
from kinoray.synthetic import make_clip, make_video
from kinoray.verbs import ReportConfig

CLASSES = ("cat", "dog", "emu")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "javascript:alert(1)",
    "\u202egnp.exe",
    "nul\x00byte",
    "{{7*7}}{% raw %}",
    "<!-- --><svg onload=alert(1)>",
    "]]></style><style>*{display:none}</style>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "</option></select><iframe srcdoc=x>",
    "line\nbreak\ttab\r",
    "</title><base href=//evil.example/>",
    "`${alert(1)}`\\",
)


def row(video_id: str, **changes: Any) -> dict[str, Any]:
    """A labelled row: dog 0.6, cat 0.3, emu 0.1."""
    return {
        "video_id": video_id,
        "uri": f"/nowhere/{video_id}.mp4",
        "status": "labelled",
        "label_topk": ["dog", "cat", "emu"],
        "id_topk": [1, 0, 2],
        "score_topk": [0.6, 0.3, 0.1],
        "margin": 0.3,
        "entropy": 0.898,
        "abstained": False,
        "views": 1,
        "frames_decoded": 4,
        "frames_corrupt": 0,
        "frames_missing": 0,
        "model_digest": "m" * 16,
        "config_digest": "c" * 16,
        "run_id": "run-1",
    } | changes


def refused(video_id: str, error_class: str = "EmptyMedia", text: str = "no bytes") -> dict[str, Any]:
    nothing = dict.fromkeys(("label_topk", "id_topk", "score_topk", "margin", "entropy"))
    return row(video_id, status="quarantined", error_class=error_class, error_text=text, **nothing)


def predictions(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([item | {"row_key": str(n)} for n, item in enumerate(rows)], schema=PREDICTION_SCHEMA)


def catalog_of(truth: list[tuple[str, str | None, str | None]], labels: tuple[str, ...] = CLASSES) -> Catalog:
    ids = [labels.index(label) if label is not None else None for _, label, _ in truth]
    rows = [
        {"video_id": video_id, "uri": f"/nowhere/{video_id}.mp4", "label": label, "label_id": label_id, "split": split}
        for (video_id, label, split), label_id in zip(truth, ids, strict=True)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA), labels)


@dataclass
class Page:
    """What `report` wrote and returned."""

    totals: dict[str, Any]
    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    @property
    def cards(self) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == "li" and "data-id" in found]

    def texts(self, tag: str) -> list[str]:
        """The pieces of text that lie directly in elements of this name."""
        return [data for name, data in self.words if name == tag]

    @property
    def text(self) -> str:
        """All visible text, white space collapsed."""
        return " ".join("".join(data for tag, data in self.words if tag not in ("script", "style")).split())


class Reader(HTMLParser):
    """Collects elements in order, and text by the element that holds it. Refuses what is not well nested."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page, self.open = page, ["document"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.page.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.page.words.append((self.open[-1], data))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment in the page: {data!r}")


def write_predictions(folder: Path, table: pa.Table, unit_size: int = 3) -> str:
    """A finished labelling, as `label` leaves it."""
    ledger = Ledger(Storage(StorageConfig()), str(folder / "0123456789abcdef"))
    ledger.pin_job({"checkpoint": "run"})
    plan = ledger.plan("catalog", table["row_key"].to_pylist(), unit_size)
    for number, unit in enumerate(plan.units):
        ledger.commit(unit, table.slice(number * unit_size, unit_size), "run-1")
    return str(folder)


def make_page(folder: Path, rows: list[dict[str, Any]], catalog: Catalog | None = None, **settings: Any) -> Page:
    out = folder / "report.html"
    config = ReportConfig(
        predictions=write_predictions(folder / "labels", predictions(rows)),
        out=str(out),
        catalog=str(folder / "set") if catalog else "",
        **settings,
    )
    if catalog:
        save_catalog(Storage(StorageConfig()), str(folder / "set" / "catalog.parquet"), catalog)
    totals = report(config)
    page = Page(totals, out.read_text(encoding="utf-8"))
    reader = Reader(page)
    reader.feed(page.html)
    reader.close()
    assert reader.open == ["document"]
    return page


def frames_of(uri: str | None) -> np.ndarray:
    """The picture in a data URI, RGB."""
    assert uri is not None
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


# Numbers


def random_rows(number: int, seed: int) -> tuple[list[dict[str, Any]], list[tuple[str, str | None, str | None]]]:
    rng = np.random.default_rng(seed)
    rows, truth = [], []
    for index in range(number):
        video_id = f"v{index:03d}"
        order = rng.permutation(3)
        scores = np.sort(rng.dirichlet(np.ones(3)))[::-1]
        if rng.random() < 0.15:
            rows.append(refused(video_id))
        else:
            names = [CLASSES[place] for place in order]
            rows.append(row(video_id, label_topk=names, score_topk=scores.tolist(), margin=scores[0] - scores[1]))
        label = CLASSES[rng.integers(3)] if rng.random() < 0.9 else None
        truth.append((video_id, label, str(rng.choice(["train", "val", "test"]))))
    return rows, truth


def test_numbers_equal_plain_loops() -> None:
    rows, truth = random_rows(300, seed=1)
    known = {video_id: (label, split) for video_id, label, split in truth}
    numbers = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES)
    labelled = [item for item in rows if item["status"] == "labelled"]
    assert (numbers.num_videos, numbers.num_labelled) == (300, len(labelled))
    assert numbers.num_quarantined == 300 - len(labelled)
    assert numbers.mean_margin == pytest.approx(float(np.mean([item["margin"] for item in labelled])), rel=1e-6)

    pairs: Counter[tuple[str, str]] = Counter()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    for item in rows:
        label, split = known[item["video_id"]]
        if label is None:
            continue
        assert split is not None
        if item["status"] != "labelled":
            unreadable[split] += 1
            continue
        total[split] += 1
        right[split] += item["label_topk"][0] == label
        if split != "train":
            pairs[label, item["label_topk"][0]] += 1
    assert numbers.confusion is not None
    assert numbers.confusion.counts.tolist() == [[pairs[true, called] for called in CLASSES] for true in CLASSES]
    assert [(item.split, item.num_right, item.num_labelled, item.num_unreadable) for item in numbers.splits] == [
        (split, right[split], total[split], unreadable[split]) for split in ("test", "train", "val")
    ]
    assert numbers.accuracy is not None
    counted = total["val"] + total["test"]
    assert (numbers.accuracy.split, numbers.accuracy.num_labelled) == ("test + val", counted)
    assert numbers.accuracy.value == (right["val"] + right["test"]) / counted
    assert numbers.accuracy.interval == wilson_interval(right["val"] + right["test"], counted)
    called = Counter(item["label_topk"][0] for item in labelled)
    assert {item.name: item.num_predicted for item in numbers.classes} == called
    assert {item.name: item.num_right for item in numbers.classes} == {name: pairs[name, name] for name in CLASSES}

    verdicts = Counter()
    for item in labelled:
        label = known[item["video_id"]][0]
        place = 2 if label is None else (0 if item["label_topk"][0] == label else 1)
        verdicts[place, min(19, int(np.float32(item["score_topk"][0]) * 20))] += 1
    assert numbers.histogram.tolist() == [[verdicts[kind, place] for place in range(20)] for kind in range(3)]


def test_accuracy_counts_training_videos_only_where_there_are_no_others() -> None:
    rows = [row("a"), row("b")]
    for truth, expected in [
        ([("a", "dog", "train"), ("b", "cat", "train")], ("train", 1, 2)),
        ([("a", "dog", "train"), ("b", "cat", "val")], ("val", 0, 1)),
        ([("a", "dog", None), ("b", "dog", None)], (None, 2, 2)),
        ([("a", "dog", "train"), ("b", None, "val")], ("train", 1, 1)),
    ]:
        found = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES).accuracy
        assert found is not None
        assert (found.split, found.num_right, found.num_labelled) == expected


def test_a_class_that_only_the_model_knows_has_its_place_in_the_confusion() -> None:
    truth = [("a", "dog", "val"), ("b", "cat", "val")]
    rows = [row("a"), row("b", label_topk=["yak", "dog"], score_topk=[0.9, 0.1], id_topk=[3, 1])]
    confusion = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES).confusion
    assert confusion is not None
    assert confusion.names == (*CLASSES, "yak")
    assert np.argwhere(confusion.counts).tolist() == [[0, 3], [1, 1]]


def test_histogram_bars_stack_to_the_counts() -> None:
    histogram = np.array([[0, 3, 1], [2, 1, 0], [0, 4, 0]])
    bars = histogram_bars(histogram)
    unit = HISTOGRAM_HEIGHT / 8
    heights = {(bar.kind, round(bar.x)): bar.height / unit for bar in bars}
    first, second, third = sorted({round(bar.x) for bar in bars})
    assert heights == pytest.approx(
        {("wrong", first): 2, ("right", second): 3, ("wrong", second): 1, ("unknown", second): 4, ("right", third): 1}
    )
    assert min(bar.y for bar in bars) == 0
    for bar in bars:
        below = [other for other in bars if other.x == bar.x and other.y == pytest.approx(bar.y + bar.height)]
        assert below or bar.y + bar.height == pytest.approx(HISTOGRAM_HEIGHT)


# The page


def test_the_page_shows_the_frames_the_answers_and_the_verdict(tmp_path: Path) -> None:
    frames = make_clip("star", "up", np.random.default_rng(0))
    video = tmp_path / "star.mp4"
    video.write_bytes(make_video(frames))
    truth: list[tuple[str, str | None, str | None]] = [("star", "dog", "val"), ("gone", "cat", "val")]
    rows = [row("star", uri=str(video)), row("gone", margin=0.2), refused("empty", text="the file has no bytes")]
    page = make_page(tmp_path, rows, catalog_of(truth), frames_per_video=3)
    assert {name: page.totals[name] for name in ("videos", "labelled", "quarantined", "shown", "without_frames")} == {
        "videos": 3,
        "labelled": 2,
        "quarantined": 1,
        "shown": 3,
        "without_frames": 1,
    }
    assert page.totals["top1"] == 0.5
    assert page.totals["bytes"] == len(page.html.encode())
    assert [(card["data-id"], card["data-verdict"], card["data-status"]) for card in page.cards] == [
        ("gone", "wrong", "labelled"),
        ("star", "right", "labelled"),
        ("empty", "", "quarantined"),
    ]
    images = page.all("img")
    assert [image["alt"] for image in images] == [f"frame {number} of 3" for number in (1, 2, 3)]
    with av.open(str(video)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for image in images:
        shown = frames_of(image["src"]).astype(int)
        assert shown.shape == (96, 96, 3)
        assert (image["width"], image["height"]) == ("96", "96")
        assert min(float(np.abs(shown - frame).mean()) for frame in decoded) < 6
    assert "No frames: ObjectNotFound" in page.text
    assert "the file has no bytes" in page.text
    assert "Top-1 accuracy" in page.text
    assert "50.0%" in page.text


def test_cards_are_in_order_of_certainty_and_the_page_says_what_it_leaves_out(tmp_path: Path) -> None:
    margins = dict(zip("abcdef", (0.5, 0.1, 0.3, 0.2, 0.6, 0.4), strict=True))
    rows = [row(name, margin=margin) for name, margin in margins.items()] + [refused(name) for name in "zyx"]
    page = make_page(tmp_path, rows, max_videos=2, frames_per_video=0)
    assert [card["data-id"] for card in page.cards] == ["b", "d", "x", "y"]
    assert "Showing the 2 least certain of 6 labelled videos and 2 of 3 without an answer." in page.text
    assert page.totals["videos"] == 9
    assert not page.all("img")
    nothing = make_page(tmp_path / "none", rows, max_videos=0)
    assert not nothing.cards
    assert "Showing the 0 least certain of 6 labelled videos" in nothing.text


def test_quarantine_is_grouped_by_its_reason_the_most_frequent_first(tmp_path: Path) -> None:
    rows = [refused("a"), refused("b", "NoVideoStream", "sound only"), refused("c", "NoVideoStream", "sound only")]
    page = make_page(tmp_path, [*rows, refused("d", "UndecodableVideo", "no frame")])
    assert [text for text in page.texts("summary") if "video" in text] == [": 2 videos", ": 1 video", ": 1 video"]
    order = [page.html.rindex(f"<summary><bdi>{name}") for name in ("NoVideoStream", "EmptyMedia", "UndecodableVideo")]
    assert order == sorted(order)
    assert page.totals["top1"] is None


def test_many_classes_are_a_picture_and_a_list_of_mistakes(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(40))
    rows = [row(f"v{n}", label_topk=[names[n]], score_topk=[1.0], id_topk=[n], margin=None) for n in range(40)]
    truth: list[tuple[str, str | None, str | None]] = [(f"v{n}", names[max(n, 1)], "val") for n in range(40)]
    page = make_page(tmp_path, rows, catalog_of(truth, names), frames_per_video=0)
    (image,) = page.all("img")
    assert image["src"] is not None
    picture = cv2.imdecode(
        np.frombuffer(base64.b64decode(image["src"].partition(",")[2]), np.uint8), cv2.IMREAD_UNCHANGED
    )
    expected = np.zeros((40, 40), bool)
    expected[range(40), range(40)] = True
    expected[0, 0], expected[1, 0] = False, True
    assert ((picture[..., 3] > 0) == expected).all()
    (mistake,) = [button for button in page.all("button") if "data-true" in button]
    assert (mistake["data-true"], mistake["data-predicted"]) == ("class 1", "class 0")


def test_the_policy_allows_this_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    page = make_page(tmp_path, [row("a")], frames_per_video=0)
    (meta,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = dict(rule.strip().split(" ", 1) for rule in (meta["content"] or "").split(";"))
    hashes = {}
    for tag in ("script", "style"):
        assert len(page.all(tag)) == 1
        text = "".join(page.texts(tag))
        hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for tag, attributes in page.elements:  # what the policy would block must not be there in the first place
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("link", "iframe", "object", "base")
    assert not re.search(r"https?://", page.html)


def hostile_page(folder: Path, names: tuple[str, ...], title: str) -> Page:
    labels = tuple(sorted(names))
    rows = []
    for index, name in enumerate(names):
        called = [names[index], names[(index + 1) % len(names)]]
        answer = row(f"{index:02d}{name}", uri=f"/{name}", label_topk=called, score_topk=[0.6, 0.3], id_topk=[0, 1])
        rows.append(answer | {"run_id": name, "model_digest": name})
        rows.append(refused(f"q{index:02d}{name}", error_class=f"E{index:02d}{name}", text=name))
    truth: list[tuple[str, str | None, str | None]] = [
        (f"{index:02d}{name}", names[index - index % 2], name) for index, name in enumerate(names)
    ]
    return make_page(folder, rows, catalog_of(truth, labels), title=title)


def test_hostile_names_add_no_element_and_no_attribute(tmp_path: Path) -> None:
    plain = hostile_page(tmp_path / "plain", tuple(LETTERS[: len(HOSTILE)]), "title")
    hostile = hostile_page(tmp_path / "hostile", HOSTILE, HOSTILE[1] + HOSTILE[2])
    assert len(plain.cards) == 2 * len(HOSTILE)

    def shape(page: Page) -> Counter[tuple[str, ...]]:
        return Counter((tag, *sorted(attributes)) for tag, attributes in page.elements)

    assert shape(hostile) == shape(plain)
    for tag, attributes in hostile.elements:
        assert (attributes.get("href") or "#").startswith("#"), tag
        assert (attributes.get("src") or "data:").startswith("data:"), tag
    assert "".join(hostile.texts("script")) == "".join(plain.texts("script"))
    # They are shown as what they are, and none hides or reorders what is around it.
    assert {card["data-true"] for card in hostile.cards} - {""} == {visible(name) for name in HOSTILE[::2]}
    assert not set(hostile.html) & {"\x00", "\u202e", "\r"}
    assert "{{7*7}}{% raw %}" in hostile.text
    assert "49" not in "".join(hostile.texts("bdi"))


def test_visible_spells_out_what_cannot_be_seen() -> None:
    assert visible("a\x00b\u202ec\n\u200d\ud800") == "a\\u0000b\\u202ec\\u000a\\u200d\\ud800"
    assert visible("Stra\u00dfe \u0627\u0644\u0639 <b>") == "Stra\u00dfe \u0627\u0644\u0639 <b>"


# Size


@pytest.mark.parametrize("width", [54, 96, 170, 400])
def test_no_frame_is_larger_than_its_share_of_the_page(width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, width, 3), dtype=np.uint8)
    thumbnail = jpeg_uri(noise)
    assert frames_of(thumbnail.uri).shape == (96, min(width, 192), 3)
    assert (thumbnail.width, thumbnail.height) == (min(width, 192), 96)
    assert len(base64.b64decode(thumbnail.uri.partition(",")[2])) <= MAX_FRAME_BYTES


def test_500_videos_fit_in_15_mb(tmp_path: Path) -> None:
    rows = [row(f"some/longer/path/to/a/video-{n:04d}") for n in range(50)]
    page = make_page(tmp_path, rows, frames_per_video=0)
    fixed = len(make_page(tmp_path / "one", rows[:1], frames_per_video=0).html)
    card = (len(page.html) - fixed) / 49
    assert fixed + 500 * (card + 4 * (MAX_FRAME_BYTES * 4 / 3 + 120)) < 15e6


# Errors


def test_nothing_labelled_yet_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="holds no predictions"):
        report(ReportConfig(predictions=str(tmp_path / "nothing"), out=str(tmp_path / "report.html")))
    Ledger(Storage(StorageConfig()), str(tmp_path / "labels" / "0123456789abcdef")).pin_job({"checkpoint": "run"})
    with pytest.raises(CatalogError, match="holds no finished rows yet; run kinoray label"):
        report(ReportConfig(predictions=str(tmp_path / "labels"), out=str(tmp_path / "report.html")))
    assert not (tmp_path / "report.html").exists()


def test_a_catalog_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"none of the 1 videos .* ids look like a and other"):
        make_page(tmp_path / "other", [row("a")], catalog_of([("other", "dog", None)]))
    with pytest.raises(CatalogError, match="the catalog has no labels"):
        make_page(tmp_path / "none", [row("a")], catalog_of([("a", None, None)]))


def test_a_page_of_nothing_but_quarantine_is_a_page(tmp_path: Path) -> None:
    page = make_page(tmp_path, [refused("a"), refused("b")], catalog_of([("a", "dog", "val"), ("b", "cat", "val")]))
    assert page.totals["labelled"] == 0
    assert [card["data-id"] for card in page.cards] == ["a", "b"]
    assert "Top-1 accuracy" not in page.text
