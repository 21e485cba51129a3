"""What a labelling says before, while and after it runs; and what it does where the disk is full."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
import ray

from kinoray.cluster.connect import Kept
from kinoray.cluster.lines import Lines, Teller
from kinoray.config.shared import ClipConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.console import Progress
from kinoray.demo.videos import class_names, make_demo_set
from kinoray.errors import StorageUnavailable, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.label.times import StageClock, bound_stage
from kinoray.label.unit import Totals
from kinoray.label.verb import label, refuse_too_many_bad
from kinoray.library.config import LabelsConfig
from kinoray.library.labels import labels
from kinoray.storage.objects import Storage
from label_models import save_untrained
from ports import wait_until
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
LABELS = tuple(class_names())
LOCAL = Storage(StorageConfig())


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twelve good videos in class folders, and a file that is none."""
    folder = tmp_path / "library"
    make_demo_set(folder, videos_per_class=2, seed=3)
    (folder / "no-video.mp4").write_bytes(b"nothing")
    return folder


@pytest.fixture
def config(library: Path, tmp_path: Path) -> LabelConfig:
    checkpoint = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, CLIP, "label_models:mixing")
    one = ResourcesConfig(num_workers=1)
    return LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=str(library),
        checkpoint=checkpoint,
        out=str(tmp_path / "out"),
        unit_size=4,
        resources=one,
    )


def label_here(config: LabelConfig) -> list[dict[str, Any]]:
    """All units that are missing, by a worker in this process, as label would; what it says of them."""
    labelling = open_labelling(config, "label")
    worker, done, said = LabelUnits(labelling.job), labelling.ledger.committed(), []
    for unit, rows in labelling.work(unit for unit in labelling.plan.units if unit.unit_id not in done):
        said += worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
    return said


# Before


def files_in(folder: str) -> set[Path]:
    return {path for path in Path(folder).rglob("*") if path.is_file()}


def test_large_counts_have_separators() -> None:
    reasons = {"EmptyMedia": 2_147}
    totals = Totals(inputs=8_147, labelled=6_000, quarantined=2_147, skipped=0, reasons=reasons, damaged=0, examples=())
    with pytest.raises(TooManyBad, match=r"^2,147 of 8,147 videos \(26\.4%\) were quarantined, .*: EmptyMedia 2,147;"):
        refuse_too_many_bad(totals, 0.1, "labels")


def test_a_plan_counts_what_is_done_new_and_changed_and_writes_nothing(
    library: Path, config: LabelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = replace(config, plan=True)
    found = label(ask)
    assert (found["videos"], found["done"], found["new"], found["changed"], found["gone"]) == (13, 0, 13, 0, 0)
    assert found["size_bytes"] == sum(path.stat().st_size for path in files_in(str(library)))
    assert not files_in(config.out)
    assert "label: 13 videos = 0 done + 13 new + 0 changed" in capsys.readouterr().out
    label_here(config)
    found = label(ask)
    assert (found["done"], found["new"], found["units"], found["size_bytes"]) == (13, 0, 0, 0)

    videos = sorted(library.rglob("*.mp4"))
    videos[0].write_bytes(videos[0].read_bytes() + bytes(9))  # another file in its place
    videos[1].rename(library / "under-another-name.mp4")
    (library / "new.mp4").write_bytes(videos[3].read_bytes())
    before = files_in(config.out)
    found = label(ask)
    assert (found["videos"], found["done"], found["new"], found["changed"], found["gone"]) == (14, 11, 2, 1, 1)
    assert files_in(config.out) == before
    label_here(config)
    assert label(ask)["done"] == 14
    other = label(replace(ask, top_k=2))  # other settings: another table
    assert (other["done"], other["new"], other["gone"]) == (0, 14, 0)
    all_classes, more = (open_labelling(replace(ask, top_k=top_k), "label") for top_k in (len(LABELS), 1000))
    assert all_classes.ledger.root == more.ledger.root  # there are no more than that


def test_a_plan_of_a_list_says_which_of_its_files_are_not_there(
    library: Path, config: LabelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = next(library.rglob("*.mp4"))
    (tmp_path / "list.csv").write_text(f"path\n{here}\n/not/there.mp4\n")
    found = label(replace(config, source=str(tmp_path / "list.csv"), plan=True))
    assert (found["new"], found["empty"]) == (2, 1)
    said = capsys.readouterr().out
    assert "label: 1 of them is not there, or without a byte, and would be quarantined: /not/there.mp4\n" in said


IMPORTED = """
import sys
from kinoray.cli import main
assert not main(sys.argv[2:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
with open(sys.argv[1], "w") as file:
    print(status["VmHWM"].split()[0], *sys.modules, file=file)
"""


def imported_by(tmp_path: Path, *arguments: str) -> tuple[set[str], float]:
    """What a command imports into its own process, and the most memory that it had, in MB."""
    found = tmp_path / "imported"
    subprocess.run([sys.executable, "-c", IMPORTED, str(found), *arguments], check=True, timeout=200, cwd=tmp_path)
    peak_kb, *names = found.read_text().split()
    return set(names), int(peak_kb) / 1000


@pytest.mark.parametrize("verb", ["--help", "label --help", "label", "labels", "runs"])
def test_who_only_asks_waits_neither_for_torch_nor_for_ray(config: LabelConfig, tmp_path: Path, verb: str) -> None:
    arguments = verb.split()
    if verb == "label":
        arguments += [config.source, "--checkpoint", config.checkpoint, "--out", config.out, "--plan"]
        arguments += ["--allow-factory", "label_models:mixing"]
    elif verb == "labels":
        label_here(config)
        arguments.append(config.out)
    elif verb == "runs":
        arguments.append(str(tmp_path))
    names, peak_mb = imported_by(tmp_path, *arguments)
    assert not names & {"torch", "ray", "boto3", "av", "cv2", "pandas", "matplotlib"}
    assert ("pyarrow" in names) == ("help" not in verb)
    assert peak_mb < 200


@pytest.mark.ray
def test_the_driver_of_a_labelling_imports_no_network(config: LabelConfig, tmp_path: Path) -> None:
    """Its workers do; and what they find wrong with a network comes before anything is written."""
    command = ["label", config.source, "--checkpoint", config.checkpoint, "--out", config.out]
    command += ["--workers", "1", "--allow-factory", "label_models:mixing"]
    names, peak_mb = imported_by(tmp_path, *command)
    assert names.isdisjoint(("torch", "ray.data", "boto3", "av", "cv2", "pandas", "label_models"))
    assert peak_mb < 400
    assert read_predictions(LOCAL, config.out).num_rows == 13


# While it runs


def test_stages_are_timed_each_for_itself() -> None:
    clock = StageClock()
    with clock.timing("model"), clock.timing("decode"):
        for _ in range(10_000):
            pass
    seconds = clock.take()
    assert seconds["decode"] > seconds["model"] > 0
    assert seconds["store"] == seconds["commit"] == 0
    assert clock.take() == {"store": 0, "decode": 0, "model": 0, "commit": 0}
    assert bound_stage({"store": 1, "decode": 3, "model": 0, "commit": 0}) == "decode 75%"
    assert bound_stage({}) == ""


def test_a_worker_tells_of_each_video_as_it_is_done(config: LabelConfig) -> None:
    labelling, told = open_labelling(config, "label"), []
    worker = LabelUnits(labelling.job, lambda unit_id, done: told.append((unit_id, done)))
    for unit, rows in labelling.work(labelling.plan.units):
        packed = pa.Table.from_pylist([pack_unit(unit, rows)])
        worker(packed)
        worker(packed)  # it is committed: nothing is done again
    assert told == [(unit.unit_id, done) for unit in labelling.plan.units for done in range(unit.num_rows)]


def test_raylets_messages_are_kept_and_people_hear_once_that_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.StringIO()
    kept = Kept(file, tmp_path / "ray.err")

    def hear(line: str) -> None:
        kept({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)  # as Ray calls it

    hear("WARNING: 8 PYTHON worker processes have been started")
    assert capsys.readouterr().out == ""
    hear("A worker died")
    hear("Another one")
    assert file.getvalue().splitlines()[1:] == ["A worker died", "Another one"]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.endswith(str(tmp_path / "ray.err"))


@pytest.mark.ray
def test_what_workers_tell_is_heard_and_a_job_goes_on_when_nobody_hears(
    config: LabelConfig, ray_local: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = io.StringIO()
    with Lines(Progress(4, "label", "videos", stream=heard)) as lines:
        Teller(lines.box, 1)("unit", 3)
        lines.box.post.remote("a line \x1b[31m")
    assert heard.getvalue() == "label: 3/4 videos\n"
    assert capsys.readouterr().out == "a line \\u001b[31m\n"

    class Deaf(Lines):
        def __enter__(self) -> Lines:
            ray.kill(self.box)
            return super().__enter__()

    monkeypatch.setattr("kinoray.label.job.Lines", Deaf)
    assert label(config)["inputs"] == 13
    assert "what workers say is no longer shown: " in capsys.readouterr().out


@pytest.mark.ray
def test_progress_metrics_summary_and_parts_say_the_same(
    config: LabelConfig, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    totals = label(config)
    said = capsys.readouterr().out
    assert re.search(r"label: 13/13 videos, .*, quarantined 1, bound by (store|decode|model|commit) \d+%", said)
    root = Path(totals["root"])
    summary = json.loads((root / "jobs" / f"{totals['run_id']}.json").read_text())
    assert (summary["labelled_now"], summary["already"], summary["totals"]["quarantined"]) == (13, 0, 1)
    assert summary["videos_per_s"] == pytest.approx(13 / summary["wall_s"])
    assert summary["waited_s"]["decode"] > 0
    assert summary["waited_s"]["commit"] > 0
    commits = list(Ledger(LOCAL, str(root)).commits())
    assert (sum(commit.rows for commit in commits), len(commits)) == (13, 4)
    assert {path.stem for path in (root / "parts").iterdir()} == {commit.unit_id for commit in commits}
    assert {commit.run_id for commit in commits} == {totals["run_id"]}
    wait_until(lambda: counted(root.name) == {"labelled": 12, "quarantined": 1}, 60, "the metrics arrive")
    began_s = datetime.fromisoformat(summary["began"]).timestamp()
    spans = labels(LabelsConfig(predictions=config.out, summary=True))["spans"]
    assert len(spans) == 4
    for span in spans:
        assert began_s <= span.begin_s <= span.end_s <= began_s + 1 + summary["wall_s"]  # began is in whole seconds
        assert 0 < sum(span.parts.values()) <= span.seconds


def counted(labelling_id: str) -> dict[str, float]:
    """Videos by status of a labelling, as Prometheus would read them from this node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    mine = [line for line in lines if line.startswith("ray_kinoray_label_videos") and labelling_id in line]
    found: dict[str, float] = {}
    for line in mine:
        status = re.search(r'status="(\w+)"', line)
        if status and "_created" not in line.partition("{")[0]:
            found[status[1]] = float(line.rpartition(" ")[2])
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_workers_log_units_and_refusals_as_json_with_their_ids(config: LabelConfig) -> None:
    """In a Ray of the command's own, since Ray sets logging up once for all processes of a driver."""
    folder = Path(tempfile.mkdtemp(prefix="kr-"))  # Ray's sockets need a short path
    command = [sys.executable, "-m", "kinoray", "label", config.source, "--checkpoint", config.checkpoint]
    command += ["--allow-factory", "label_models:mixing"]
    command += ["--out", config.out, "--unit-size", "4", "--workers", "1", "--resources.logs", "json"]
    try:
        subprocess.run(command, env={**os.environ, "RAY_TMPDIR": str(folder)}, check=True, timeout=200)
        texts = [path.read_text() for path in folder.rglob("session_2*/logs/worker-*.err")]
    finally:
        shutil.rmtree(folder)
    records = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
    mine = [record for record in records if record["name"] == "kinoray.events"]
    (root,) = Path(config.out).iterdir()
    (run,) = ({"run": path.stem} for path in (root / "jobs").iterdir())
    units = [record for record in mine if record["message"] == "unit committed"]
    assert {record["unit"] for record in units} == {path.stem for path in (root / "parts").iterdir()}
    assert sum(record["videos"] for record in units) == 13
    (refused,) = [record for record in mine if record["message"] == "quarantined"]
    assert (refused["levelname"], refused["video"], refused["reason"]) == ("WARNING", "no-video", "UnreadableContainer")
    assert all(run.items() <= record.items() and record["labelling"] == root.name for record in mine)


# Where the disk is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs rights: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_commits_nothing_wrong_and_the_rest_comes_later(config: LabelConfig, small_disk: Path) -> None:
    config = replace(config, out=str(small_disk / "out"), unit_size=1)
    open_labelling(config, "label")
    ballast = small_disk / "ballast"
    free = 100 * 1024  # room for some parts, each at least one page
    ballast.write_bytes(bytes(max(0, 600 * 1024 - sum(path.stat().st_size for path in files_in(config.out)) - free)))
    said = label_here(config)
    failed = [row for row in said if row["error_class"]]
    assert failed
    assert len(failed) < len(said)
    assert {row["error_class"] for row in failed} == {StorageUnavailable.__name__}
    assert "No space left on device" in failed[0]["error_text"]
    table = read_predictions(LOCAL, config.out)
    assert len(table) == len(said) - len(failed)
    ballast.unlink()
    label_here(config)
    labelling = open_labelling(config, "label")
    assert Ledger(LOCAL, labelling.ledger.root).check(labelling.plan, labelling.found.keys).inputs == 13


# Where a bucket vanishes


def empty(storage: Storage, bucket: str) -> dict[str, bytes]:
    """Delete a bucket with all that is in it; what was there."""
    held = {info.uri: storage.read(info.uri) for info in storage.list(bucket + "/")}
    for uri in held:
        storage.delete(uri)
    boto3.client("s3", endpoint_url=storage.config.endpoint_url).delete_bucket(Bucket=bucket.removeprefix("s3://"))
    return held


def test_videos_of_a_bucket_that_vanishes_are_not_quarantined_and_a_rerun_goes_on(
    library: Path, config: LabelConfig, s3_config: StorageConfig, bucket: str
) -> None:
    storage = Storage(s3_config)
    for path in files_in(str(library)):
        storage.put(f"{bucket}/{path.name}", path.read_bytes())
    config = replace(config, source=bucket, storage=s3_config)
    labelling = open_labelling(config, "label")
    worker, units = LabelUnits(labelling.job), []
    for unit, rows in labelling.work(labelling.plan.units):
        units.append(pa.Table.from_pylist([pack_unit(unit, rows)]))
    (first,) = worker(units[0]).to_pylist()
    assert (first["rows"], first["error_class"]) == (4, "")
    held = empty(storage, bucket)
    (seen,) = worker(units[1]).to_pylist()  # by a worker that has read from it
    assert seen["error_class"] == "StorageUnavailable"
    assert "there is no bucket" in seen["error_text"]
    assert "nothing was quarantined" in seen["error_text"]
    (unseen,) = LabelUnits(labelling.job)(units[2]).to_pylist()  # and by one that has not
    assert unseen["error_class"] == "BucketNotFound"
    assert len(labelling.ledger.committed()) == 1
    boto3.client("s3", endpoint_url=s3_config.endpoint_url).create_bucket(Bucket=bucket.removeprefix("s3://"))
    for uri, data in held.items():
        storage.put(uri, data)
    assert [row["error_class"] for row in label_here(config)] == ["", "", ""]
    table = read_predictions(storage, config.out)
    assert table.column("status").to_pylist().count("labelled") == 12
    assert table.num_rows == 13


def test_one_row_of_a_bucket_that_is_not_there_is_a_row(
    library: Path, config: LabelConfig, s3_config: StorageConfig
) -> None:
    """As in a list of videos with a slip of the pen: one row must not end the job."""
    good = sorted(str(path) for path in library.rglob("*/*.mp4"))[:2]
    table = config.out + ".csv"
    Path(table).write_text(
        "path,label\n" + "".join(f"{uri},\n" for uri in [good[0], "s3://no-such-bucket/x.mp4", good[1]])
    )
    label_here(replace(config, source=table, storage=s3_config))
    rows = read_predictions(LOCAL, config.out).to_pylist()
    assert sorted((row["status"], row["error_class"]) for row in rows) == [
        ("labelled", None),
        ("labelled", None),
        ("quarantined", "BucketNotFound"),
    ]
