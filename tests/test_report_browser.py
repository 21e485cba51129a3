"""The report's site as people use it, in a real Chromium: filters, order, pages, class sheets, corrections, keyboard.

Skipped where no Chromium is installed (Debian: apt-get install chromium). Every test ends with an empty console.
"""

import csv
import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Page, find_chromium, open_page
from kinoray.console import visible
from kinoray.demo.videos import make_clip, make_video
from report_sites import HOSTILE, Site, Truth, catalog_of, hostile_site, lists_of, make_site, refused, row

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium is installed (Debian: apt-get install chromium)"),
]

NAMES = ("archery", "bowling", "juggling", "sailing", "yoga")
REASONS = ("EmptyMedia", "NoVideoStream", "UndecodableVideo")
PER_PAGE = 50
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d")
Rows = list[dict[str, Any]]
Seen = Callable[[dict[str, Any]], bool]


def random_table(number: int, seed: int) -> tuple[Rows, Truth]:
    """Rows with distinct scores, margins and entropies, some without an answer, and their truth."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    truth: Truth = []
    for index in range(number):
        video_id = f"part-{index % 7}/clip {index}"
        order = rng.permutation(len(NAMES))
        scores = np.sort(rng.dirichlet(np.ones(len(NAMES)) * 0.6))[::-1]
        if rng.random() < 0.15:
            rows.append(
                refused(
                    video_id, REASONS[index % 3], f"reason {index}", status=("quarantined", "skipped")[index % 5 == 0]
                )
            )
        else:
            answer = {"label_topk": [NAMES[place] for place in order], "id_topk": order.tolist()}
            answer |= {"score_topk": scores.tolist(), "margin": float(scores[0] - scores[1])}
            answer |= {"entropy": float(-(scores * np.log(scores + 1e-12)).sum()), "abstained": bool(scores[0] < 0.4)}
            rows.append(row(video_id, offset=512 * index, length=100, **answer))
        truth.append((video_id, NAMES[rng.integers(len(NAMES))] if rng.random() < 0.8 else None, "val"))
    return rows, truth


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def quiet(page: Page) -> Iterator[Page]:
    """The page; the test fails if the browser had anything to complain about, or asked for anything but our files."""
    before, asked = len(page.complaints), len(page.requests)
    yield page
    assert page.complaints[before:] == []
    assert [
        url for url in page.requests[asked:] if not url.startswith(("file://", "about:", "blob:", "http://127.0.0.1:"))
    ] == []


@pytest.fixture(scope="module")
def table() -> tuple[Rows, Truth]:
    return random_table(180, seed=5)


@pytest.fixture(scope="module")
def site(table: tuple[Rows, Truth], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """180 videos; the 130 least certain ones have strips of one real video, but for one that is gone."""
    folder = tmp_path_factory.mktemp("site")
    video = folder / "star.mp4"
    video.write_bytes(make_video(make_clip("star", "up", np.random.default_rng(0))))
    rows, truth = table
    gone = min((item for item in rows if item["margin"] is not None), key=lambda item: item["margin"])
    # A shard's member cannot be this one file, so strips are made of whole files.
    rows = [item | {"uri": str(video), "offset": None, "length": None} for item in rows]
    rows = [item | {"uri": "/gone.mp4"} if item["video_id"] == gone["video_id"] else item for item in rows]
    return make_site(folder, rows, catalog_of(truth, NAMES), title="180 videos", max_strips=130)


def visit(page: Page, site: Site, fragment: str = "", base: str = "") -> None:
    page.goto(f"{base or site.folder.as_uri()}/index.html{fragment}")
    page.wait("document.body.dataset.ready")


def ids_shown(page: Page) -> list[str]:
    found: list[str] = page.js("[...document.querySelectorAll('#videos h3')].map((title) => title.textContent)")
    return found


def expected(table: tuple[Rows, Truth], wanted: Seen = lambda _: True, sort: str = "margin") -> list[str]:
    """Ids in the order of the site, by plain Python."""
    known = {video_id: label for video_id, label, _ in table[1]}
    rows = [item | {"true": known[item["video_id"]], "score": (item["score_topk"] or [None])[0]} for item in table[0]]
    sign = -1 if sort.startswith("-") else 1
    name = sort.lstrip("-")

    def place(item: dict[str, Any]) -> tuple[Any, ...]:
        part, number = item["video_id"].removeprefix("part-").split("/clip ")
        natural = (int(part), int(number))
        if name == "id":
            return tuple(sign * value for value in natural)
        return (item[name] is None, sign * (item[name] or 0), natural)

    return [item["video_id"] for item in sorted((item for item in rows if wanted(item)), key=place)]


def top1(item: dict[str, Any]) -> str | None:
    return item["label_topk"][0] if item["label_topk"] else None


FILTERS: dict[str, tuple[str, Seen]] = {
    "class": ("label=yoga", lambda item: top1(item) == "yoga"),
    "true class": ("true=sailing", lambda item: item["true"] == "sailing"),
    "labelled": ("status=labelled", lambda item: item["status"] == "labelled"),
    "abstained": ("status=abstained", lambda item: bool(item["abstained"])),
    "quarantined": ("status=quarantined", lambda item: item["status"] == "quarantined"),
    "skipped": ("status=skipped", lambda item: item["status"] == "skipped"),
    "reason": ("reason=NoVideoStream", lambda item: item.get("error_class") == "NoVideoStream"),
    "score": ("score=0.5..0.75", lambda item: item["score"] is not None and 0.5 <= item["score"] <= 0.75),
    "margin": ("margin=..0.2", lambda item: item["margin"] is not None and item["margin"] <= 0.2),
    "text": ("text=PART-3", lambda item: "part-3" in item["video_id"]),
    "wrong": ("verdict=wrong", lambda item: item["true"] is not None and top1(item) not in (None, item["true"])),
    "right": ("verdict=right", lambda item: item["true"] is not None and top1(item) == item["true"]),
    "two": (
        "label=bowling&verdict=wrong",
        lambda item: top1(item) == "bowling" and item["true"] not in (None, "bowling"),
    ),
    "no such class": ("label=nothing", lambda item: False),
}


def test_every_filter_by_its_address_shows_what_plain_python_counts(
    quiet: Page, site: Site, table: tuple[Rows, Truth]
) -> None:
    visit(quiet, site)
    for name, (fragment, wanted) in FILTERS.items():
        quiet.js(f"location.hash = {'#' + fragment!r}")
        found = expected(table, wanted)
        quiet.wait(f"document.getElementById('matching').textContent.startsWith('{len(found)} of 180 videos match')")
        assert ids_shown(quiet) == found[:PER_PAGE], name
        assert quiet.js("document.getElementById('nothing').hidden") == bool(found), name


def test_filters_and_order_are_chosen_in_the_form_and_stay_in_the_address(
    quiet: Page, site: Site, table: tuple[Rows, Truth]
) -> None:
    visit(quiet, site, "#view=videos")
    for sort in ("margin", "-margin", "score", "-score", "entropy", "-entropy", "id", "-id"):
        quiet.choose("select[name=sort]", sort)
        assert ids_shown(quiet) == expected(table, sort=sort)[:PER_PAGE], sort
    quiet.choose("select[name=label]", "archery")
    quiet.fill("input[name=score-from]", "0.6")
    quiet.fill("input[name=text]", "Clip 1")

    def wanted(item: dict[str, Any]) -> bool:
        return top1(item) == "archery" and item["score"] >= 0.6 and "clip 1" in item["video_id"]

    found = expected(table, wanted, "-id")
    assert ids_shown(quiet) == found != []
    assert quiet.js("location.hash") == "#label=archery&score=0.6..&text=Clip+1&sort=-id"
    quiet.reload()
    quiet.wait("document.body.dataset.ready")
    assert ids_shown(quiet) == found
    assert quiet.js("document.querySelector('input[name=score-from]').value") == "0.6"
    quiet.click("#controls button[type=reset]")
    quiet.wait("location.hash === '#view=videos'")
    assert ids_shown(quiet) == expected(table)[:PER_PAGE]


def test_pages_hold_50_and_only_their_strips_are_loaded(quiet: Page, site: Site, table: tuple[Rows, Truth]) -> None:
    asked = len(quiet.requests)
    visit(quiet, site, "#view=videos")
    everything = expected(table)
    for number in (1, 2, 3, 4):
        assert ids_shown(quiet) == everything[(number - 1) * PER_PAGE : number * PER_PAGE]
        assert quiet.js("document.querySelectorAll('#videos article').length") == len(ids_shown(quiet)) <= PER_PAGE
        if number == 1:
            quiet.wait("document.querySelectorAll('#videos img').length > 10")
            assert "No frames: ObjectNotFound" in quiet.js("document.querySelector('#videos article').textContent")
            loaded = {
                url.partition("/strips-")[2].partition(".")[0] for url in quiet.requests[asked:] if "/strips-" in url
            }
            assert loaded <= {"0", "1", "2", "3", "4"}
            quiet.wait("[...document.querySelectorAll('#videos img')].every((image) => image.naturalWidth === 96)")
        if number < 4:
            quiet.click("#pager button[data-page=next]")
            quiet.wait(f"document.getElementById('page-number').value === '{number + 1}'")
    assert quiet.js("location.hash") == "#page=4"
    quiet.js("history.back()")
    quiet.wait("document.getElementById('page-number').value === '3'")
    assert ids_shown(quiet) == everything[100:150]
    visit(quiet, site, "#page=4")  # a deep link; and one past the end
    assert ids_shown(quiet) == everything[150:]
    visit(quiet, site, "#page=999")
    assert ids_shown(quiet) == everything[150:]


def test_a_class_has_a_sheet_with_its_numbers(quiet: Page, site: Site, table: tuple[Rows, Truth]) -> None:
    visit(quiet, site, "#view=classes")
    quiet.click("section[data-section=classes] a[href='#label=bowling']")
    quiet.wait("!document.getElementById('sheet').hidden")
    known = {video_id: label for video_id, label, _ in table[1]}
    labelled = [item for item in table[0] if item["label_topk"]]
    called = [item for item in labelled if top1(item) == "bowling"]
    counted = [item for item in called if known[item["video_id"]]]
    true = [item for item in labelled if known[item["video_id"]] == "bowling"]
    right = [item for item in counted if known[item["video_id"]] == "bowling"]
    mean = float(np.mean([item["score_topk"][0] for item in called]))
    tiles = quiet.js("[...document.querySelectorAll('#sheet .tiles dd:not(.note)')].map((tile) => tile.textContent)")
    assert tiles == [
        str(len(called)),
        f"{mean:.1%}",
        f"{len(right) / len(counted):.1%}",
        f"{len(right) / len(true):.1%}",
    ]
    assert quiet.js("document.title") == "bowling - 180 videos"
    assert ids_shown(quiet) == expected(table, lambda item: top1(item) == "bowling")[:PER_PAGE]
    quiet.click("#sheet .near a:last-child")
    quiet.wait("location.hash === '#label=juggling'")
    assert ids_shown(quiet) == expected(table, lambda item: top1(item) == "juggling")[:PER_PAGE]
    quiet.click("nav [data-view=quarantine]")
    quiet.wait("!document.querySelector('[data-section=quarantine]').hidden")
    quiet.click("section[data-section=quarantine] a[href*='EmptyMedia']")
    quiet.wait("location.hash.includes('reason=EmptyMedia')")
    first = ids_shown(quiet)
    assert first == expected(
        table, lambda item: item["status"] == "quarantined" and item["error_class"] == "EmptyMedia"
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows, with the quote signs taken off that keep spreadsheets from running formulas."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))

    def plain(cell: str) -> str:
        return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULAS) else cell

    return [{name: plain(value) for name, value in item.items()} for item in rows]


def test_corrections_are_made_kept_listed_and_downloaded(quiet: Page, site: Site, table: tuple[Rows, Truth]) -> None:
    visit(quiet, site, "#view=videos")
    quiet.js("kinoray.app.corrections.clear()")
    order = expected(table)
    keys = {item["video_id"]: f"k{number:016x}" for number, item in enumerate(table[0])}
    answers = {item["video_id"]: item["label_topk"] for item in table[0]}
    quiet.click("#videos li:nth-child(1) [data-answer='2']")
    quiet.click("#videos li:nth-child(2) [data-bad]")
    quiet.fill("#videos li:nth-child(3) .correction input", "yoga")
    quiet.press("Enter")
    quiet.click("#videos li:nth-child(4) [data-answer='0']")
    quiet.click("#videos li:nth-child(5) [data-answer='1']")
    quiet.click("#videos li:nth-child(5) [data-undo]")
    quiet.fill("#videos li:nth-child(6) .correction input", "no such class")
    quiet.press("Enter")
    labels = [answers[order[0]][2], "__bad__", "yoga", answers[order[3]][0]]
    quiet.reload()
    quiet.wait("document.body.dataset.ready")
    assert quiet.js("document.getElementById('num-corrections').textContent") == "4"
    shown = "(said) => said.hidden ? '' : said.firstChild.textContent"
    said = quiet.js(f"[...document.querySelectorAll('#videos .said')].slice(0, 6).map({shown})")
    assert said == [f"You say: {labels[0]}", "You say: bad video", "You say: yoga", f"Confirmed: {labels[3]}", "", ""]
    quiet.choose("select[name=corrected]", "yes")
    assert ids_shown(quiet) == order[:4]
    quiet.click("nav [data-view=corrections]")
    quiet.wait("!document.querySelector('[data-section=corrections]').hidden")
    listed = quiet.js("[...document.querySelectorAll('#corrections-list th')].map((cell) => cell.textContent)")
    assert listed == order[3::-1]
    rows = read_csv(quiet.download("#download"))
    uris = {item["id"]: item["uri"] for item in site.rows()}
    assert rows == [
        {
            "video_id": video_id,
            "row_key": keys[video_id],
            "uri": uris[video_id],
            "offset": "",
            "length": "",
            "predicted": answers[video_id][0],
            "label": label,
        }
        for video_id, label in zip(order[:4], labels, strict=True)
    ]
    quiet.click("#corrections-list button")
    assert quiet.js("document.getElementById('num-corrections').textContent") == "3"
    quiet.js("kinoray.app.corrections.clear()")
    assert quiet.js("localStorage.getItem(kinoray.app.corrections.place)") == "[]"


def test_classes_are_taken_away_and_added_where_a_video_may_have_several(quiet: Page, tmp_path: Path) -> None:
    rows = [
        row("a", label_topk=["yoga", "archery"], score_topk=[0.9, 0.6], margin=0.1),
        row("b", label_topk=["sailing"], score_topk=[0.8], margin=0.2),
        row("c", label_topk=[], score_topk=[], margin=0.3),
        row("d", label_topk=["bowling", "yoga"], score_topk=[0.8, 0.7], margin=0.4),
        row("e", label_topk=["bowling"], score_topk=[0.8], margin=0.5),
    ]
    truth = [("a", [0, 4]), ("b", [3, 4]), ("c", []), ("d", None), ("e", None)]
    site = make_site(tmp_path, rows, lists_of(truth, NAMES), several=True)
    visit(quiet, site, "#view=videos")
    badges = "[...document.querySelectorAll('#videos .badges')].map((badges) => badges.textContent)"
    assert [text.removeprefix("labelled").partition("split")[0] for text in quiet.js(badges)] == [
        "right",
        "wrong",
        "right",
        "",
        "",
    ]
    pressed = "[...document.querySelectorAll('#videos > li:nth-child(1) [aria-pressed=true]')].length"
    assert quiet.js(pressed) == 2
    quiet.click("#videos > li:nth-child(1) [data-answer='1']")
    assert quiet.js(pressed) == 1
    quiet.fill("#videos > li:nth-child(2) .correction input", "yoga")
    quiet.press("Enter")
    quiet.click("#videos > li:nth-child(3) [data-confirm]")
    quiet.click("#videos > li:nth-child(4) h3")
    quiet.press("1", "2", "j", "y")  # none is left of the fourth; the fifth is right
    shown = "[...document.querySelectorAll('#videos .said')].map((said) => said.firstChild.textContent)"
    assert quiet.js(shown) == [
        "You say: yoga",
        "You say: sailing|yoga",
        "Confirmed: none of the classes",
        "You say: none of the classes",
        "Confirmed: bowling",
    ]
    said = [(line["video_id"], line["predicted"], line["label"]) for line in read_csv(downloaded(quiet))]
    assert sorted(said) == [
        ("a", "archery|yoga", "yoga"),
        ("b", "sailing", "sailing|yoga"),
        ("c", "|", "|"),
        ("d", "bowling|yoga", "|"),
        ("e", "bowling", "bowling"),
    ]
    quiet.js("location.hash = '#label=yoga'")
    quiet.wait("document.querySelectorAll('#videos h3').length === 2")
    assert ids_shown(quiet) == ["a", "d"]
    quiet.js("location.hash = '#verdict=wrong'")
    quiet.wait("document.querySelectorAll('#videos h3').length === 1")
    assert ids_shown(quiet) == ["b"]
    quiet.js("kinoray.app.corrections.clear()")


def downloaded(page: Page) -> Path:
    page.js("location.hash = '#view=corrections'")
    page.wait("!document.querySelector('[data-section=corrections]').hidden")
    return page.download("#download")


def test_the_keyboard_alone_does_it(quiet: Page, site: Site, table: tuple[Rows, Truth]) -> None:
    visit(quiet, site, "#view=videos")
    quiet.js("kinoray.app.corrections.clear()")
    order = expected(table)
    answers = {item["video_id"]: item["label_topk"] for item in table[0]}

    def current() -> str:
        found: str = quiet.js("document.activeElement.closest('article').querySelector('h3').textContent")
        return found

    quiet.press("j", "j", "k", "ArrowRight", "ArrowLeft")
    assert current() == order[0]
    quiet.press("2")
    assert current() == order[1]
    quiet.press("b", "u")  # the second is bad; u is for the third, of which nothing was said
    chosen = quiet.js("[...kinoray.app.corrections.records.values()].map((record) => [record.video_id, record.label])")
    assert chosen == [[order[0], answers[order[0]][1]], [order[1], "__bad__"]]
    quiet.press("k", "u")
    assert quiet.js("kinoray.app.corrections.size") == 1
    columns = quiet.js("getComputedStyle(document.getElementById('videos')).gridTemplateColumns.split(' ').length")
    quiet.press("ArrowDown")
    assert current() == order[1 + columns]
    quiet.press("ArrowUp", "c")
    assert quiet.js("document.activeElement.tagName") == "INPUT"
    quiet.type("2")  # a digit in a text is a digit
    assert quiet.js("kinoray.app.corrections.size") == 1
    quiet.fill("#videos li:nth-child(2) .correction input", "sailing")
    quiet.press("Enter", "Escape")
    assert current() == order[1]
    assert quiet.js("kinoray.app.corrections.size") == 2
    quiet.press("n")
    quiet.wait("location.hash === '#page=2'")
    quiet.press("j", "k")  # before the first card of a page is the last one of the page before
    assert quiet.js("location.hash") == "#view=videos"
    assert current() == order[PER_PAGE - 1]
    quiet.press("/")
    quiet.type("clip 17")
    found = expected(table, lambda item: "clip 17" in item["video_id"])
    quiet.wait(f"document.querySelectorAll('#videos article').length === {len(found)}")
    assert ids_shown(quiet) == found
    quiet.js("kinoray.app.corrections.clear()")


def test_hostile_names_stay_names(quiet: Page, tmp_path: Path) -> None:
    site = hostile_site(tmp_path, HOSTILE, HOSTILE[1])
    visit(quiet, site, "#sort=id")
    elements = {"SCRIPT", "IFRAME", "SVG", "BASE", "OBJECT", "EMBED", "STYLE"}
    seen: set[str] = set()
    num_pages = -(-2 * len(HOSTILE) // PER_PAGE)
    for number in range(1, num_pages + 1):
        quiet.js(f"location.hash = '#sort=id&page={number}'")
        quiet.wait(f"document.getElementById('page-number').value === '{number}'")
        seen.update(ids_shown(quiet))
        tags = quiet.js(
            "[...document.querySelectorAll('#videos *, #sheet *')].map((node) => node.tagName.toUpperCase())"
        )
        assert not elements & set(tags)
        names = quiet.js("[...document.querySelectorAll('body *')].flatMap((node) => node.getAttributeNames())")
        assert not [name for name in names if name.startswith("on")]
    assert seen == {visible(name) for name in HOSTILE} | {visible(f"q{n:02d}{name}") for n, name in enumerate(HOSTILE)}
    for name in HOSTILE:  # a class sheet of each, by a deep link; and each as what somebody says of a video
        label = f"kinoray.app.site.labels[{sorted(HOSTILE).index(name)}]"
        quiet.js(f"kinoray.go({{view: 'videos', page: 1, sort: '', label: {label}}})")
        assert quiet.js(f"kinoray.readQuery(location.hash).label === {label}")
        assert quiet.js("document.querySelector('#sheet h2').textContent") == f"Class {visible(name)}"
        assert ids_shown(quiet) == [visible(name)]
        quiet.js("document.querySelector('#videos [data-answer=\"1\"]').click()")
    quiet.js("location.hash = '#view=corrections'")
    path = quiet.download("#download")
    rows = {item["row_key"]: item for item in read_csv(path)}
    assert len(rows) == len(HOSTILE)
    for index, name in enumerate(HOSTILE):
        item = rows[f"k{2 * index:016x}"]
        assert (item["video_id"], item["uri"]) == (name, f"/{name}")
        assert (item["predicted"], item["label"]) == (name, HOSTILE[(index + 1) % len(HOSTILE)])
    with path.open(encoding="utf-8", newline="") as file:
        assert not [cell for line in csv.reader(file) for cell in line if cell.startswith(FORMULAS)]
    quiet.js("kinoray.app.corrections.clear()")


def test_the_policy_refuses_markup_and_foreign_scripts(page: Page, site: Site) -> None:
    visit(page, site)
    error = page.js(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; } })()"
    )
    assert error == "TypeError"
    with pytest.raises(RuntimeError, match="is no data file of this site"):
        page.js("kinoray.load('../../other')")
    page.js("document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'}))")
    page.wait("document.querySelector('img[src^=http]').complete")
    assert not [
        url for url in page.requests if "127.0.0.1:9/" in url and not url.startswith("http://127.0.0.1:9/x.png")
    ]
    assert any("Content Security Policy" in text for text in page.complaints)


def test_the_site_works_from_a_server_too(quiet: Page, site: Site, table: tuple[Rows, Truth]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site.folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visit(quiet, site, "#label=yoga", base=f"http://127.0.0.1:{server.server_port}")
        assert ids_shown(quiet) == expected(table, lambda item: top1(item) == "yoga")[:PER_PAGE]
        quiet.wait("document.querySelectorAll('#videos img').length > 5")
        quiet.goto("about:blank")
        server.shutdown()


def test_a_site_that_lacks_a_file_says_which(page: Page, tmp_path: Path) -> None:
    rows, _ = random_table(20, seed=6)
    site = make_site(tmp_path, rows, max_strips=0)
    data = site.folder / "data" / "rows-0.js"
    whole = data.read_text()
    for text, message in [
        (None, "data/rows-0.js could not be read"),
        ("", "data/rows-0.js is damaged"),
        (whole.replace(str(site.all("body")[0]["data-build"]), "0" * 16), "data/rows-0.js belongs to another report"),
    ]:
        data.unlink()
        if text is not None:
            data.write_text(text)
        page.goto(f"{site.folder.as_uri()}/index.html#view=videos")
        page.wait("!document.getElementById('trouble').hidden")
        assert message in page.js("document.getElementById('trouble').textContent")
        data.write_text(whole)


@pytest.mark.slow
def test_ten_thousand_videos_are_filtered_sorted_and_paged_like_a_few(quiet: Page, tmp_path: Path) -> None:
    rows, truth = random_table(10_000, seed=7)
    table = (rows, truth)
    site = make_site(tmp_path, rows, catalog_of(truth, NAMES), max_strips=0)
    visit(quiet, site, "#view=videos")
    assert ids_shown(quiet) == expected(table)[:PER_PAGE]
    for sort in ("-score", "entropy", "id"):
        for fragment, wanted in FILTERS.values():
            found = expected(table, wanted, sort)
            quiet.js(f"kinoray.go({{...kinoray.readQuery('#{fragment}'), sort: '{sort}'}}, {{replace: true}})")
            assert quiet.js("kinoray.app.rows.length") == len(found)
            assert ids_shown(quiet) == found[:PER_PAGE]
            assert quiet.js("document.querySelectorAll('body *').length") < 6000
    visit(quiet, site, "#page=200&sort=id")
    assert ids_shown(quiet) == expected(table, sort="id")[199 * PER_PAGE :]
