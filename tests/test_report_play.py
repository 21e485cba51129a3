"""The report's site in a real Chromium: videos play, windows loop, many are corrected at once, files of corrections.

From the disk, from `report --serve`, and by pre-signed addresses of a bucket; and on a phone. Skipped as
test_report_browser.py is.
"""

import contextlib
import csv
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from browser import Page, find_chromium, open_page
from kinoray.catalog.table import Catalog, Reference
from kinoray.config.shared import StorageConfig
from kinoray.demo.videos import make_clip, make_video
from kinoray.evaluation.compare import compare
from kinoray.evaluation.config import CompareConfig
from kinoray.library.config import CorrectConfig, ReportConfig
from kinoray.library.correct import correct, read_corrections
from kinoray.library.report import report
from kinoray.library.serve import SiteServer
from kinoray.storage.objects import Storage
from kinoray.tune.config import parse_space
from kinoray.tune.results import TrialRow, tune_page
from report_sites import Site, Truth, catalog_of, make_site, predictions, row, windows_of, write_predictions
from test_compare import catalog_at, evaluated

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium is installed (Debian: apt-get install chromium)"),
]

VIDEO = "document.querySelector('#videos video')"
FIRST = "#videos > li:nth-child(1)"
PHONE = (390, 844)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def quiet(page: Page) -> Iterator[Page]:
    """The page; the test fails if the browser had anything to complain about."""
    before = len(page.complaints)
    page.resize(1280, 900)
    yield page
    assert page.complaints[before:] == []


@pytest.fixture(scope="module")
def video() -> bytes:
    """Two seconds and more."""
    return make_video(make_clip("star", "up", np.random.default_rng(0)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, video: bytes) -> Path:
    """A file with an odd name, and a shard of two members."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "a #1%20?.mp4").write_bytes(video)
    (folder / "shard.tar").write_bytes(bytes(512) + video + bytes(512))
    return folder


@pytest.fixture(scope="module")
def rows(library: Path, video: bytes) -> Rows:
    return [
        row("file", uri=str(library / "a #1%20?.mp4"), margin=0.1, windows=2),
        row("member", uri=str(library / "shard.tar"), offset=512, length=len(video), margin=0.2, windows=2),
        row("bucket", uri="s3://bucket/a.mp4", margin=0.3),
        row("gone", uri=str(library / "gone.mp4"), margin=0.4),
    ]


@pytest.fixture(scope="module")
def site(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Made for a server: it is the same on the disk."""
    folder = tmp_path_factory.mktemp("site")
    labels = write_predictions(
        folder / "labels", predictions(rows), 10, windows=windows_of(rows, [("dog", 0.9), ("cat", 0.5)])
    )
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setattr("kinoray.library.report.serve", lambda *_: None)  # the tests serve it themselves
        report(ReportConfig(predictions=labels, out=str(folder / "report"), max_strips=0, serve=True))
    return Site({}, folder / "report", (folder / "report" / "index.html").read_text())


@contextlib.contextmanager
def served(site: Site, rows: Rows) -> Iterator[str]:
    """The address of the site on a server of its own, without index.html."""
    names = [str(path.relative_to(site.folder)) for path in site.folder.rglob("*.*")]
    videos = {
        f"k{number:016x}": Reference(item["uri"], item.get("offset"), item.get("length"))
        for number, item in enumerate(rows)
    }
    with SiteServer(Storage(), str(site.folder), names, videos, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.address.removesuffix("/index.html")
        finally:
            server.shutdown()
            thread.join()


def visit(page: Page, base: str, fragment: str = "#view=videos") -> None:
    page.goto(f"{base}/index.html{fragment}")
    page.wait("document.body.dataset.ready")


def plays(page: Page) -> None:
    """Wait until the open player shows moving pictures."""
    page.wait(f"{VIDEO} && {VIDEO}.currentTime > 0.1 && {VIDEO}.videoWidth === 96")


def card(number: int) -> str:
    return f"#videos > li:nth-child({number})"


# Play


def test_a_served_site_plays_files_and_members_of_shards(quiet: Page, site: Site, rows: Rows) -> None:
    with served(site, rows) as base:
        visit(quiet, base)
        asked = len(quiet.requests)
        for number in (1, 2):
            quiet.click(f"{card(number)} [data-play]")
            plays(quiet)
            assert quiet.js(f"{VIDEO}.closest('li') === document.querySelector('{card(number)}')")
            assert quiet.js("document.querySelectorAll('video').length") == 1  # the one before has closed
        quiet.js(f"{VIDEO}.currentTime = 1.5")
        quiet.wait(f"!{VIDEO}.seeking && {VIDEO}.currentTime >= 1.5")
        assert {url.removeprefix(base) for url in quiet.requests[asked:]} == {
            f"/media/k{number:016x}" for number in (0, 1)
        }
        quiet.click(f"{card(2)} [data-play]")
        assert quiet.js("document.querySelectorAll('video').length") == 0
        quiet.js("document.querySelector('#videos article').focus()")
        quiet.press("v")
        plays(quiet)
        quiet.press("v")
        assert quiet.js("document.querySelectorAll('video').length") == 0
        quiet.goto("about:blank")


def test_a_window_is_marked_and_plays_in_a_loop(quiet: Page, site: Site, rows: Rows) -> None:
    with served(site, rows) as base:
        visit(quiet, base)
        quiet.wait(f"document.querySelectorAll('{FIRST} .mark').length === 2")
        options = quiet.js(f"[...document.querySelectorAll('{FIRST} option')].map((option) => option.textContent)")
        assert options == ["All 2 windows", "0:00 to 0:01: dog 90.0%", "0:01 to 0:02: cat 50.0%"]
        assert quiet.js(f"[...document.querySelectorAll('{FIRST} .mark')].map((mark) => mark.className)") == [
            "mark same",
            "mark",
        ]
        quiet.js(f"document.querySelector('{FIRST} select').focus()")
        quiet.press("ArrowDown", "ArrowDown")
        assert quiet.js(f"document.querySelector('{FIRST} select').value") == "1"
        plays(quiet)
        quiet.js(f"window.seen = []; {VIDEO}.addEventListener('timeupdate', () => seen.push({VIDEO}.currentTime))")
        quiet.js(f"window.seeks = 0; {VIDEO}.addEventListener('seeked', () => {{ window.seeks += 1; }})")
        quiet.wait("window.seeks >= 2")
        assert quiet.js("Math.min(...seen)") >= 1
        assert quiet.js("Math.max(...seen)") < 2.2
        assert quiet.js(f"document.querySelector('{FIRST} .mark.chosen').dataset.window") == "1"
        quiet.click(f"{FIRST} .mark")
        quiet.wait(f"{VIDEO}.currentTime < 1 && {VIDEO}.currentTime > 0.3")
        assert quiet.js(f"document.querySelector('{FIRST} select').value") == "0"
        quiet.js(f"document.querySelector('{FIRST} select').focus()")
        quiet.press("ArrowUp")
        assert quiet.js(f"document.querySelector('{FIRST} select').value") == ""
        quiet.wait(f"{VIDEO}.currentTime > 1.2")  # all of it: no window ends it
        assert quiet.js(f"document.querySelectorAll('{FIRST} .mark.chosen').length") == 0
        quiet.goto("about:blank")


def test_a_site_on_the_disk_plays_files_links_them_and_copies_the_address_of_others(
    quiet: Page, site: Site, library: Path, video: bytes
) -> None:
    visit(quiet, site.folder.as_uri())
    quiet.click(f"{FIRST} [data-play]")
    plays(quiet)
    link = quiet.js(f"document.querySelector('{FIRST} details a').href")
    assert link == (library / "a #1%20?.mp4").as_uri()
    for number, text in ((2, f"{library}/shard.tar bytes 512 to {511 + len(video)}"), (3, "s3://bucket/a.mp4")):
        assert quiet.js(f"document.querySelectorAll('{card(number)} :is([data-play], details a)').length") == 0
        quiet.js("window.copied = null; navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        quiet.click(f"{card(number)} .badges [data-copy]")
        quiet.wait(f"document.querySelector('{card(number)} [data-copy]').textContent === 'Copied'")
        assert quiet.js("window.copied") == text
    quiet.js("navigator.clipboard.writeText = async () => { throw new DOMException('no', 'NotAllowedError'); }")
    quiet.click(f"{card(3)} .badges [data-copy]")
    quiet.wait("window.getSelection().toString() === 's3://bucket/a.mp4'")


def test_what_cannot_be_played_says_so_on_its_card(page: Page, tmp_path: Path, site: Site, rows: Rows) -> None:
    visit(page, site.folder.as_uri())
    page.click(f"{card(4)} [data-play]")
    page.wait(f"document.querySelector('{card(4)} .player .empty')")
    assert "This browser cannot play it" in page.js(f"document.querySelector('{card(4)} .player').textContent")
    (tmp_path / "old.mp4").write_bytes(
        make_video(make_clip("star", "up", np.random.default_rng(0)), codec="mpeg4", container="mp4")
    )
    old = make_site(tmp_path, [row("old", uri=str(tmp_path / "old.mp4"))], max_strips=0)
    visit(page, old.folder.as_uri())
    page.click(f"{FIRST} [data-play]")
    page.wait(f"document.querySelector('{FIRST} .player .empty')")
    with served(site, rows) as base:
        visit(page, base)
        page.click(f"{card(4)} [data-play]")
        page.wait(f"document.querySelector('{card(4)} .player .empty')")
        page.goto("about:blank")


def test_presigned_addresses_play_from_a_bucket(
    quiet: Page, tmp_path: Path, bucket: str, s3_config: StorageConfig, video: bytes
) -> None:
    Storage(s3_config).put(f"{bucket}/a.mp4", video)
    labels = write_predictions(tmp_path / "labels", predictions([row("a", uri=f"{bucket}/a.mp4")]))
    config = ReportConfig(predictions=labels, out=str(tmp_path / "report"), max_strips=0, storage=s3_config)
    report(config)
    visit(quiet, (tmp_path / "report").as_uri())
    assert quiet.js("document.querySelectorAll('[data-play]').length") == 0
    report(replace(config, presign_hours=1.0))
    visit(quiet, (tmp_path / "report").as_uri())
    quiet.click(f"{FIRST} [data-play]")
    plays(quiet)
    assert quiet.js(f"{VIDEO}.src").startswith(f"{s3_config.endpoint_url}/")


def test_the_policy_refuses_videos_from_elsewhere(page: Page, site: Site, rows: Rows) -> None:
    with served(site, rows) as base:
        visit(page, base)
        refused = page.js(
            "new Promise((done) => { document.addEventListener('securitypolicyviolation', (event) =>"
            " done(event.effectiveDirective)); const video = document.createElement('video');"
            " video.src = 'http://127.0.0.1:9/x.mp4'; document.body.append(video); })"
        )
        assert refused == "media-src"
        page.goto("about:blank")


# Find, and correct many at once


NAMES = ("archery", "bowling", "yoga")


@pytest.fixture(scope="module")
def many_rows() -> Rows:
    """120 videos in folders, a third with an id as `label` makes it, of which every class has 40."""
    return [
        row(
            f"{('indoor/', 'outdoor/sea/', 'outdoor__land__')[number % 3]}clip {number}",
            label_topk=[NAMES[number % 3], NAMES[(number + 1) % 3]],
            score_topk=[0.6, 0.4],
            margin=number / 200,
        )
        for number in range(120)
    ]


@pytest.fixture(scope="module")
def many_site(many_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """With lengths of 0 to 119 s, and codecs."""
    truth: Truth = [(item["video_id"], "yoga", "val") for item in many_rows]
    catalog = catalog_of(truth, NAMES)
    table = catalog.table
    columns = {
        "duration_s": pa.array([float(number) for number in range(120)]),
        "codec": pa.array([("h264", "vp9")[number % 2] for number in range(120)]),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return make_site(tmp_path_factory.mktemp("many"), many_rows, Catalog(table, NAMES), labels=NAMES, max_strips=0)


def shown(page: Page) -> list[str]:
    found: list[str] = page.js("[...document.querySelectorAll('#videos h3')].map((title) => title.textContent)")
    return found


def expect(page: Page, wanted: list[str]) -> None:
    page.wait(f"document.getElementById('matching').textContent.startsWith('{len(wanted)} of 120 ')")
    assert shown(page) == wanted[:50]


def test_folders_lengths_and_codecs_filter_as_their_figures_count(
    quiet: Page, many_site: Site, many_rows: Rows
) -> None:
    ids = [item["video_id"] for item in many_rows]
    visit(quiet, many_site.folder.as_uri())
    quiet.fill("input[name=folder]", "outdoor")
    expect(quiet, [name for name in ids if name.startswith(("outdoor/", "outdoor__land__"))])
    quiet.fill("input[name=folder]", "outdoor/sea/")
    expect(quiet, [name for name in ids if name.startswith("outdoor/sea/")])
    assert quiet.js("location.hash") == "#folder=outdoor%2Fsea"
    quiet.choose("select[name=codec]", "vp9")
    expect(quiet, [name for place, name in enumerate(ids) if name.startswith("outdoor/sea/") and place % 2])
    quiet.fill("input[name=duration-from]", "10")
    quiet.fill("input[name=duration-to]", "31")
    expect(quiet, [ids[place] for place in (13, 19, 25)])
    quiet.choose("select[name=sort]", "-duration")
    assert shown(quiet) == [ids[place] for place in (25, 19, 13)]
    folders = quiet.js("[...document.querySelectorAll('#all-folders option')].map((option) => option.value)")
    assert folders == ["indoor", "outdoor", "outdoor/land", "outdoor/sea"]
    visit(quiet, many_site.folder.as_uri(), "#view=overview")
    for fragment, number in (("duration=30..60", 30), ("codec=h264", 60), ("label=bowling", 40)):
        bar = f"table.kinds a[href='#{fragment}']"
        cell = quiet.js(f"document.querySelector(\"{bar}\").closest('tr').querySelector('.number').textContent")
        assert cell == str(number)
        quiet.click(bar)
        quiet.wait(f"document.getElementById('matching').textContent.startsWith('{number} of 120 ')")
        quiet.js("history.back()")
        quiet.wait("!document.querySelector('[data-section=overview]').hidden")


def corrections(page: Page) -> dict[str, str]:
    found: dict[str, str] = page.js(
        "Object.fromEntries([...kinoray.app.corrections.records.values()].map((item) => [item.video_id, item.label]))"
    )
    return found


def test_all_of_these_are_said_to_be_a_class_and_it_can_be_undone(
    quiet: Page, many_site: Site, many_rows: Rows, tmp_path: Path
) -> None:
    ids = [item["video_id"] for item in many_rows]
    visit(quiet, many_site.folder.as_uri())
    quiet.js("kinoray.app.corrections.clear()")
    quiet.click(f"{FIRST} [data-answer='1']")
    before = corrections(quiet)
    assert before == {ids[0]: "bowling"}
    quiet.fill("input[name=folder]", "indoor")
    expect(quiet, ids[::3])
    assert quiet.js("document.getElementById('bulk-bad').disabled")
    quiet.click("#pick-all")
    assert quiet.js("document.getElementById('num-picked').textContent") == "40 of 120 selected"
    quiet.fill("#bulk-label", "no such class")
    quiet.press("Enter")
    assert corrections(quiet) == before
    quiet.fill("#bulk-label", "yoga")
    quiet.press("Enter")
    assert corrections(quiet) == dict.fromkeys(ids[::3], "yoga")
    assert quiet.js("document.querySelector('#bulk-said span').textContent") == "40 videos: yoga"
    quiet.click("#bulk-undo")
    assert corrections(quiet) == before
    # One by one, a range with shift, and over pages
    quiet.click("#controls button[type=reset]")
    expect(quiet, ids)
    quiet.click(f"{card(2)} [data-pick]")
    quiet.js(
        f"document.querySelector('{card(5)} [data-pick]')"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true, shiftKey: true}))"
    )
    quiet.click(f"{card(4)} [data-pick]")
    quiet.js("document.querySelector('#videos > li:nth-child(7) article').focus()")
    quiet.press("x", "n")
    quiet.wait("location.hash === '#page=2'")
    quiet.click(f"{FIRST} [data-pick]")
    picked = [ids[place] for place in (1, 2, 4, 6, 50)]
    assert quiet.js("document.getElementById('num-picked').textContent") == "5 of 120 selected"
    quiet.choose("select[name=codec]", "h264")
    found = quiet.js("document.getElementById('picked-elsewhere').textContent")
    assert found == f"{sum(ids.index(name) % 2 for name in picked)} of them not in this list"
    quiet.click("#bulk-bad")
    assert corrections(quiet) == before | dict.fromkeys(picked, "__bad__")
    # To a file, to another person, to a catalog
    quiet.js("location.hash = '#view=corrections'")
    path = quiet.download("#download")
    said, repeated = read_corrections(Storage(), [str(path)], NAMES)
    assert {item.video_id: item.label for item in said.values()} == corrections(quiet)
    assert repeated == 0
    quiet.js("kinoray.app.corrections.clear()")
    quiet.upload("#load", path)
    quiet.wait("!document.getElementById('loaded').hidden")
    assert corrections(quiet) == before | dict.fromkeys(picked, "__bad__")
    assert quiet.js("document.querySelector('#loaded span').textContent") == f"6 corrections loaded from {path.name}"
    again = quiet.download("#download")
    assert again.read_bytes() == path.read_bytes()
    totals = correct(
        CorrectConfig(
            predictions=str(many_site.folder.parent / "labels"), corrections=(str(path),), out=str(tmp_path / "set")
        )
    )
    assert (totals["corrected"], totals["bad"]) == (1, 5)
    quiet.js("kinoray.app.corrections.clear()")


def test_a_file_of_corrections_joins_what_is_there_and_a_wrong_one_changes_nothing(
    quiet: Page, many_site: Site, many_rows: Rows, tmp_path: Path
) -> None:
    ids = [item["video_id"] for item in many_rows]
    visit(quiet, many_site.folder.as_uri(), "#view=corrections")
    quiet.js("kinoray.app.corrections.clear()")
    for row_number, label in ((0, "yoga"), (1, "bowling")):
        quiet.js(f"kinoray.app.corrections.choose(kinoray.app.table, {row_number}, '{label}')")
    before = corrections(quiet)

    def load(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(text.encode())
        quiet.js("document.getElementById('loaded').hidden = true")
        quiet.upload("#load", tmp_path / name)
        quiet.wait("!document.getElementById('loaded').hidden")
        found: str = quiet.js("document.querySelector('#loaded span').textContent")
        return found

    excel = '\ufeffsep=;\r\nlabel;note;row_key\r\nyoga;"two\r\nlines; ""q""";k0000000000000001\r\n'
    excel += "archery;;0000000000000002\r\n'=1+1;;kffffffffffffffff\r\n;;\r\n"
    said = load("excel.csv", excel)
    assert said == (
        "3 corrections loaded from excel.csv; 1 of them replace what was said here; "
        "1 are of videos that this site does not list"
    )
    assert corrections(quiet) == {ids[0]: "yoga", ids[1]: "yoga", ids[2]: "archery", "": "=1+1"}
    quiet.click("#undo-load")
    assert corrections(quiet) == before
    for name, text, message in [
        ("a.csv", "row_key,label\nk0000000000000001,\n", "line 2: row_key or label is empty"),
        ("b.csv", "row_key,label\n\n,yoga\n", "line 3: row_key or label is empty"),
        ("c.csv", 'row_key,label\nk0000000000000001,"yoga\n', "line 2: a quote is not closed"),
        ("d.csv", "video,label\na,yoga\n", "there are no columns row_key and label"),
        ("e.csv", "", "there are no columns row_key and label"),
    ]:
        assert message in load(name, text)
        assert "nothing was loaded" in quiet.js("document.querySelector('#loaded span').textContent")
        assert quiet.js("document.getElementById('undo-load').hidden")
    assert corrections(quiet) == before
    quiet.js("kinoray.app.corrections.clear()")


def test_corrections_of_an_older_site_are_still_there(quiet: Page, many_site: Site) -> None:
    visit(quiet, many_site.folder.as_uri())
    quiet.js("kinoray.app.corrections.clear()")
    old = json.dumps([{"row_key": "k0000000000000003", "video_id": "v", "label": "yoga", "predicted": "", "uri": "u"}])
    quiet.js(f"localStorage.setItem(kinoray.app.corrections.place, {json.dumps(old)})")
    visit(quiet, many_site.folder.as_uri())
    assert corrections(quiet) == {"v": "yoga"}
    quiet.js("kinoray.app.corrections.clear()")


def test_twenty_thousand_corrections_at_once_are_kept(quiet: Page, many_site: Site, tmp_path: Path) -> None:
    """The most that a site lists by itself; a browser keeps some five million characters."""
    visit(quiet, many_site.folder.as_uri())
    with (tmp_path / "many.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row_key", "label", "video_id", "uri", "predicted"])
        for number in range(20_000):
            name = f"some/longer/path/to/a/video-{number:05d}"
            writer.writerow([f"k{number + 10**6:016x}", "yoga", name, f"s3://bucket/library/{name}.mp4", "bowling"])
    quiet.js("location.hash = '#view=corrections'")
    quiet.upload("#load", tmp_path / "many.csv")
    quiet.wait("kinoray.app.corrections.size === 20000")
    assert quiet.js("kinoray.app.corrections.trouble") == ""
    visit(quiet, many_site.folder.as_uri())
    assert quiet.js("kinoray.app.corrections.size") == 20_000
    quiet.js("kinoray.app.corrections.clear()")


# On a phone


def fits(page: Page) -> None:
    """Nothing is wider than the window, but what scrolls by itself."""
    assert page.js("document.documentElement.scrollWidth") <= PHONE[0]


def test_every_view_fits_a_phone(quiet: Page, many_site: Site, site: Site, tmp_path: Path) -> None:
    quiet.resize(*PHONE, mobile=True)
    for view in ("overview", "videos", "classes", "corrections"):
        visit(quiet, many_site.folder.as_uri(), f"#view={view}")
        fits(quiet)
        quiet.screenshot(tmp_path / f"{view}.png")
        assert (tmp_path / f"{view}.png").stat().st_size > 5000
    visit(quiet, site.folder.as_uri())
    quiet.wait(f"document.querySelectorAll('{FIRST} .mark').length === 2")
    quiet.click(f"{FIRST} [data-play]")
    plays(quiet)
    fits(quiet)
    assert quiet.js(f"{VIDEO}.getBoundingClientRect().width") > 300


def test_the_cards_of_a_comparison_stay_clear_of_its_tables(quiet: Page, tmp_path: Path, video: bytes) -> None:
    source = catalog_at(str(tmp_path / "set"), 60)
    for number in range(60):
        (tmp_path / "set" / f"v{number:03d}.mp4").write_bytes(video)
    for name, seed in (("a", 1), ("b", 2)):
        evaluated(str(tmp_path / name), source, seed, skill=1.5)
    compare(CompareConfig(a=str(tmp_path / "a"), b=str(tmp_path / "b"), out=str(tmp_path / "compare.html")))
    for size in (PHONE, (1280, 900)):
        quiet.resize(*size, mobile=size == PHONE)
        quiet.goto((tmp_path / "compare.html").as_uri())
        assert quiet.js("document.documentElement.scrollWidth") <= size[0]
        boxes = quiet.js(
            "[...document.querySelectorAll('figure, h2, .cards > li')].map((item) => item.getBoundingClientRect())"
            ".map((box) => [box.left, box.top, box.right, box.bottom])"
        )
        for place, one in enumerate(boxes):
            for other in boxes[:place]:
                gaps = (one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3])
                assert max(gaps) > 6, (size, one, other)
        inside = quiet.js(
            "[...document.querySelectorAll('article, figure')].every((element) => [...element.children].every("
            "(child) => child.getBoundingClientRect().bottom <= element.getBoundingClientRect().bottom + 1))"
        )
        assert inside, size


def test_the_page_of_a_sweep_fits_a_phone_and_its_headers_stay_in_one_line(quiet: Page, tmp_path: Path) -> None:
    paths = ("optim.lr", "clip.sample.num_segments", "model.options.dropout", "optim.weight_decay")
    trials = [
        TrialRow(
            trial=f"{number:08x}",
            settings={path: (number + place) / 8 for place, path in enumerate(paths)},
            status="finished",
            best_val_top1=number / 20,
            best_epoch=2,
            epochs=5,
            run=f"{tmp_path}/trials/{number:08x}",
            decode_cpu_s=1.0,
            error="",
            curve=tuple((epoch, number * epoch / 100) for epoch in range(1, 6)),
        )
        for number in range(9)
    ]
    summary = {"out": str(tmp_path), "catalog": "sets/mine", "search": "random", "grace_epochs": 2, "status": {}}
    (tmp_path / "tune.html").write_text(tune_page(summary, parse_space(dict.fromkeys(paths, "0.1,0.2")), trials))
    for size in (PHONE, (1280, 900)):
        quiet.resize(*size, mobile=size == PHONE)
        quiet.goto((tmp_path / "tune.html").as_uri())
        assert quiet.js("document.documentElement.scrollWidth") <= size[0]
        heights = quiet.js("[...document.querySelectorAll('thead th code')].map((cell) => cell.offsetHeight)")
        assert max(heights) < 30, heights
        rows = quiet.js("[...document.querySelectorAll('tbody tr')].map((line) => line.offsetHeight)")
        assert max(rows) < 120, rows
    epochs = quiet.js("[...document.querySelectorAll('.curves text')].map((text) => text.textContent)")
    assert [text for text in epochs if text.isdigit() and len(text) == 1] == ["1", "2", "3", "4", "5"]
    quiet.js("document.querySelector('.curves a').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    quiet.wait("location.hash.startsWith('#trial-')")
    assert quiet.js("document.querySelectorAll('tr:target').length") == 1


# What is alike


@pytest.fixture(scope="module")
def map_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """90 videos whose embeddings are three directions and a little noise; one has none."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(90):
        vector = (np.eye(3, 16)[number % 3] + 0.05 * rng.normal(size=16)).astype(np.float16)
        rows.append(
            row(
                f"clip {number}",
                label_topk=[NAMES[number % 3], NAMES[(number + 1) % 3]],
                score_topk=[0.6, 0.4],
                margin=number / 200,
                embedding=None if number == 9 else vector.tolist(),
            )
        )
    return make_site(tmp_path_factory.mktemp("map"), rows, embeddings=True, max_strips=0)


def test_similar_videos_are_found_from_a_card(quiet: Page, map_site: Site) -> None:
    visit(quiet, map_site.folder.as_uri())
    quiet.click(f"{card(4)} a[title^='Videos that']")
    quiet.wait("!document.getElementById('like').hidden")
    found = shown(quiet)
    assert len(found) == 25
    assert found[0] == "clip 3"
    assert {int(name.removeprefix("clip ")) % 3 for name in found} == {0}
    assert "most like clip 3," in quiet.js("document.getElementById('like').textContent")
    quiet.choose("select[name=corrected]", "yes")
    assert shown(quiet) == []
    visit(quiet, map_site.folder.as_uri(), "#like=k0000000000000009")
    quiet.wait("!document.getElementById('like').hidden")
    assert shown(quiet) == []
    quiet.click("#like a")
    quiet.wait("document.querySelectorAll('#videos article').length === 50")


def test_a_box_on_the_map_selects_what_lies_together(quiet: Page, map_site: Site) -> None:
    visit(quiet, map_site.folder.as_uri(), "#view=map")
    quiet.wait("document.querySelectorAll('#map-legend li').length === 3")
    places = [place for chunk in [map_site.data("map-0")] for place in chunk]
    assert [row for row, place in enumerate(places) if place is None] == [9]
    group = np.array([place for row, place in enumerate(places) if place and row % 3 == 1])
    box = quiet.js("document.getElementById('map').getBoundingClientRect().toJSON()")
    half = min(box["width"], box["height"]) / 2 - 14

    def pixel(x: float, y: float) -> dict[str, float]:
        return {
            "x": box["x"] + box["width"] / 2 + half * x,
            "y": box["y"] + box["height"] / 2 - half * y,
        }

    low, high = group.min(axis=0) - 0.03, group.max(axis=0) + 0.03
    quiet.ask("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **pixel(low[0], high[1]))
    for share in (0.3, 0.7, 1.0):
        at = low + share * (high - low), high - share * (high - low)
        quiet.ask("Input.dispatchMouseEvent", type="mouseMoved", button="left", **pixel(at[0][0], at[1][1]))
    quiet.ask("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **pixel(high[0], low[1]))
    assert quiet.js("document.querySelector('[data-section=map] .num-picked').textContent") == "30 of 90 selected"
    at = pixel(*places[4])
    for kind in ("mousePressed", "mouseReleased"):
        quiet.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    quiet.wait("document.querySelector('#map-card h3')")
    assert int(quiet.js("document.querySelector('#map-card h3').textContent").removeprefix("clip ")) % 3 == 1
    quiet.click("[data-section=map] .summary a")
    quiet.wait("document.querySelectorAll('#videos article').length === 30")
    assert {int(name.removeprefix("clip ")) % 3 for name in shown(quiet)} == {1}
    quiet.click("#pick-none")
    quiet.resize(*PHONE, mobile=True)
    visit(quiet, map_site.folder.as_uri(), "#view=map")
    quiet.wait("document.querySelectorAll('#map-legend li').length === 3")
    fits(quiet)
