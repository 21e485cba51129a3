"""The blocks of README.md and docs/*.md that say so are run here as printed, in a checkout of each page's own.

Commands go through the real shell and the real kinoray, each with a Ray of its own, on small real videos and an S3
server on loopback. Only settings are appended, by verb (guide_world.small): one epoch, a tiny network, two trials, one
worker. test_guide_text.py looks at what is not run.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from guide_blocks import Block, fenced, pages, run_blocks
from guide_world import (
    BUCKET,
    NUM_VIDEOS,
    copy_into,
    environment_of,
    fill_bucket,
    kill_when,
    make_checkout,
    make_kinetics,
    make_videos,
    run_block,
)
from kinoray.catalog.table import load_catalog
from kinoray.label.ledger import read_predictions
from kinoray.storage.objects import Storage
from kinoray.train.runs import find_runs

HERE = "tests/test_guides.py"
WORLD = """# what pages presuppose
kinoray pack videos/ --out sets/mine --val-fraction 0.25
kinoray train sets/mine --out runs/first
kinoray evaluate sets/mine --checkpoint runs/first --out runs/first/eval
kinoray label library/ --checkpoint runs/first --out labels/library
kinoray labels labels/library --status labelled --columns row_key label --format csv --to corrections.csv
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Path:
    """A checkout with a packed set, a trained run, its evaluation, a labelled library and corrections."""
    checkout = make_checkout(tmp_path_factory.mktemp("world"))
    for name in ("videos", "library"):
        make_videos(checkout / name)
    run_block(Block("the world", "sh", WORLD), checkout, environment_of(checkout, s3_server))
    return checkout


def rows_in(place: Path | str, storage: Storage | None = None) -> int:
    return read_predictions(storage or Storage(), str(place)).num_rows


def check_readme(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert (checkout / "demo-out" / "report" / "index.html").is_file()
    assert (checkout / "report" / "index.html").is_file()
    assert rows_in(checkout / "labels" / "library") == NUM_VIDEOS
    assert [run.state for run in find_runs(Storage(), str(checkout / "runs"))] == ["finished", "finished"]


def check_quickstart(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert "30 videos = 30 done + 0 new + 0 changed" in said[2]
    assert "30 of 31 videos are labelled already, 1 to do" in said[2]
    assert rows_in(checkout / "demo-out" / "labels") == 31
    table = read_predictions(Storage(), str(checkout / "demo-out" / "top2")).to_pylist()
    assert {len(row["label_topk"]) for row in table if row["status"] == "labelled"} == {2}
    assert said[1].count("Unreadable") + said[1].count("EmptyMedia") + said[1].count("NoVideoStream") == 4


def check_your_videos(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert pq.read_table(checkout / "checkup" / "bad.parquet").num_rows == 1
    totals = json.loads((checkout / "sets" / "mine" / "pack.json").read_text())
    assert (totals["found"], totals["packed"], totals["quarantined"]) == (NUM_VIDEOS, NUM_VIDEOS - 1, 1)
    assert "finished" in said[2]
    assert 0 <= json.loads((checkout / "runs" / "first" / "eval" / "evaluation.json").read_text())["top1"] <= 1
    assert rows_in(checkout / "labels" / "library") == NUM_VIDEOS
    assert (checkout / "report" / "index.html").is_file()


def check_kinetics(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert len(load_catalog(storage, f"{BUCKET}/sets/k400")) == 12 + 4 + 1
    assert len(load_catalog(storage, f"{BUCKET}/sets/k400-first")) == 8 + 4 + 1
    assert "19 annotation rows = 17 packed + 1 missing + 1 unreadable" in said[1]
    assert "18 files and members = 17 packed + 1 unreadable" in said[1]
    for name, views in (("eval", 1), ("eval-10x3", 30)):
        assert json.loads(storage.read(f"{BUCKET}/runs/k400/{name}/evaluation.json"))["views"] == views


def check_labelling(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert f"{NUM_VIDEOS} videos = 0 done + {NUM_VIDEOS} new + 0 changed" in said[0]
    assert f" of {NUM_VIDEOS} videos are labelled already" in said[2]
    assert rows_in(f"{BUCKET}/labels/library", storage) == NUM_VIDEOS
    assert "UnreadableContainer" in said[3]
    assert len(load_catalog(storage, f"{BUCKET}/sets/second/catalog.parquet")) == NUM_VIDEOS - 1
    (run,) = find_runs(storage, f"{BUCKET}/runs/second")
    assert run.state == "finished"
    assert len(json.loads((checkout / "handover" / "tasks.json").read_text())) == NUM_VIDEOS - 1
    assert pq.read_table(io.BytesIO(storage.read(f"{BUCKET}/labels/library.parquet"))).num_rows == NUM_VIDEOS


def check_labels(checkout: Path, storage: Storage, said: list[str]) -> None:
    with (checkout / "answers.csv").open(newline="") as file:
        assert sum(1 for row in csv.DictReader(file) if row["catalog_split"] in ("train", "val")) == NUM_VIDEOS - 1
    assert len(json.loads((checkout / "handover" / "tasks.json").read_text())) == NUM_VIDEOS - 1
    for name in ("second", "third"):
        assert len(load_catalog(Storage(), str(checkout / "sets" / name / "catalog.parquet"))) == NUM_VIDEOS - 1
    assert (checkout / "runs" / "second" / "metrics.jsonl").is_file()
    with (checkout / "next.csv").open(newline="") as file:
        assert len([row["row_key"] for row in csv.DictReader(file)]) == 8


def check_answers(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert json.loads((checkout / "runs" / "first" / "calibration" / "calibration.json").read_text())["temperature"] > 0
    rows = read_predictions(Storage(), str(checkout / "labels" / "library")).to_pylist()
    assert len(rows) == NUM_VIDEOS
    for row in rows:
        if row["status"] == "labelled":
            assert row["abstained"] == (row["score_topk"][0] < 0.6)


def check_capacity(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert json.loads((checkout / "rates.json").read_text())["num_videos"] == NUM_VIDEOS
    assert "H100: 180 clips/s" in said[0]
    assert all(name in said[0] for name in ("big", "small", "videos"))


def check_protocols(checkout: Path, storage: Storage, said: list[str]) -> None:
    assert json.loads((checkout / "runs" / "both" / "eval" / "evaluation.json").read_text())["evaluated"] > 0
    assert (checkout / "compare.html").stat().st_size > 1000


def check_python(checkout: Path, storage: Storage, said: list[str]) -> None:
    answers = [line for line in said[0].splitlines() if line.startswith("Prediction(")]
    assert len(answers) == NUM_VIDEOS + 1
    assert "no-such-file.mp4': quarantined, ObjectNotFound)" in answers[-1]
    assert "frames decoded, 1 clip; 6 classes of " in said[1]
    assert said[2].startswith(f"{NUM_VIDEOS} {NUM_VIDEOS - 1} 1 {{'UnreadableContainer': 1}}")
    assert rows_in(checkout / "labels" / "python") == NUM_VIDEOS
    assert said[3].startswith(f"{checkout}/runs/python/checkpoints/")


def check_tuning(checkout: Path, storage: Storage, said: list[str]) -> None:
    for name in ("lr", "scale"):
        assert len((checkout / "sweeps" / name / "trials.jsonl").read_text().splitlines()) == 2
        assert (checkout / "sweeps" / name / "tune.html").is_file()
    scales = [yaml.safe_load((checkout / "sweeps" / "scale" / "best.yaml").read_text())["model"]["options"]["scale"]]
    assert scales[0] in ("frobenius", "dim")
    assert (checkout / "runs" / "best" / "metrics.jsonl").is_file()


Check = Callable[[Path, Storage, list[str]], None]
MADE_FIRST: dict[str, tuple[tuple[str, ...], Check | None]] = {
    "README.md": (("videos", "library"), check_readme),
    "docs/answers.md": (("library", "sets", "runs"), check_answers),
    "docs/capacity.md": (("bucket",), check_capacity),
    "docs/kinetics.md": (("archives",), check_kinetics),
    "docs/labelling.md": (("bucket",), check_labelling),
    "docs/labels.md": (("sets", "runs", "labels"), check_labels),
    "docs/protocols.md": (("sets", "runs"), check_protocols),
    "docs/python.md": (("library", "sets", "runs"), check_python),
    "docs/quickstart.md": ((), check_quickstart),
    "docs/tuning.md": (("sets",), check_tuning),
    "docs/your-videos.md": (("videos", "library"), check_your_videos),
}
"""Page -> what it presupposes, and what is looked at when all of its blocks have run."""
EVERYTHING = ("videos", "library", "sets", "runs", "labels", "bucket")
PAGES = [page for page in pages() if run_blocks(page, HERE)]


def prepare(page: str, checkout: Path, server: str, request: pytest.FixtureRequest) -> Storage:
    """Put into the checkout and the bucket what the page presupposes."""
    needed = MADE_FIRST.get(page, (EVERYTHING, None))[0]
    for name in needed:
        if name in ("videos", "library"):
            make_videos(checkout / name)
        elif name in ("sets", "runs", "labels"):
            copy_into(checkout, request.getfixturevalue("world"), [name])
    if "labels" in needed:
        shutil.copy(request.getfixturevalue("world") / "corrections.csv", checkout)
    if page == "docs/protocols.md":
        for name in ("rgb", "flow", "second"):
            shutil.copytree(checkout / "runs" / "first" / "eval", checkout / "runs" / name / "eval")
    if page == "README.md":
        (module,) = (block for block in fenced(page) if block.mark == "# my_package.py")
        (checkout / "my_package.py").write_text(module.text)
    contents = {}
    if "bucket" in needed:
        made = request.getfixturevalue("world")
        contents = {"library": made / "library", "runs/first": made / "runs" / "first"}
    storage = fill_bucket(server, contents)
    if "archives" in needed:
        make_kinetics(checkout, storage)
    return storage


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_printed(page: str, tmp_path: Path, s3_server: str, request: pytest.FixtureRequest) -> None:
    checkout = make_checkout(tmp_path)
    storage = prepare(page, checkout, s3_server, request)
    environment = environment_of(checkout, s3_server)
    said: list[str] = []

    def has_committed() -> bool:
        return any("/parts/" in info.uri for info in storage.list(f"{BUCKET}/labels/library/"))

    for number, block in enumerate(run_blocks(page, HERE)):
        if page == "docs/labelling.md" and number == 1:  # it says: kill it; the next block is the same command
            kill_when(block, checkout, environment, has_committed)
            said.append("killed")
        else:
            said.append(run_block(block, checkout, environment))
    check = MADE_FIRST.get(page, ((), None))[1]
    if check is not None:
        check(checkout, storage, said)
