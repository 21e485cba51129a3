"""`kinoray labels --summary`, `kinoray runs RUN`: where the time went, against numbers that were put in."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinoray.cli import main
from kinoray.config.shared import ModelConfig, OptimConfig, StorageConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger
from kinoray.label.times import Span, covered_s, summarise, trace_events
from kinoray.label.unit import Times
from kinoray.library.config import LabelsConfig
from kinoray.library.labels import labels
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.runfolder import RunFolder
from small_sets import catalog_of, epoch_row
from small_tables import ROOT_NAME, answer, job_record, ledger_in, library, planned, rows_for

LOCAL = Storage(StorageConfig())
BEGIN_S = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


def times(worker: str, begin_s: float, end_s: float, store: float, decode: float, model: float) -> Times:
    spent = {"store": store, "decode": decode, "model": model}
    return Times(worker=worker, begin_s=BEGIN_S + begin_s, end_s=BEGIN_S + end_s, **spent)


@pytest.fixture
def labelled(tmp_path: Path) -> Ledger:
    """Two workers for 100 s: one is busy for all of it, the other for half. One unit has no times, one another run."""
    ledger, catalog = ledger_in(LOCAL, tmp_path / "labels"), library(40)
    keys = row_keys(catalog.table)
    plan = planned(ledger, catalog.digest, keys, 8)
    said = [
        ("aaaa", times("one/7", 0, 60, 6, 40, 10)),
        ("aaaa", times("one/7", 60, 100, 4, 20, 10)),
        ("aaaa", times("two/9", 50, 100, 0, 10, 30)),
        ("aaaa", None),
        ("bbbb", times("one/8", 500, 510, 0, 0, 10)),
    ]
    for unit, (run, when) in zip(plan.units, said, strict=True):
        ledger.commit(unit, rows_for(catalog, unit.keys), run, None, when)
    ledger.summarize("aaaa", {"began": "2027-01-15T07:59:45+00:00", "wall_s": 130.0})
    return ledger


def test_each_run_of_a_labelling_has_its_shares(labelled: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", labelled.root, "--summary"]) == 0
    said = capsys.readouterr().out
    assert "40 videos in 5 units" in said
    assert "1 unit committed without times" in said
    first, second = said.split("run bbbb")
    lines = {line.strip().split("  ")[0]: line for line in first.splitlines()}
    assert "3 units by 2 workers on 2 nodes, 2027-01-15 08:00:00 UTC to 2027-01-15 08:01:40 UTC" in first
    assert "2 min 10 s in all; its first unit began 15 s after the job" in first
    shares = {
        "store": (10, "5%"),
        "decode": (70, "35%"),
        "model": (50, "25%"),
        "other (start-up, rows)": (20, "10%"),
    }
    shares["between units"] = (50, "25%")  # of 2 x 100 s
    for name, (seconds, share) in shares.items():
        shown = f"{seconds} s" if seconds < 60 else f"1 min {seconds - 60:02d} s"
        assert f"{shown} " in lines[name], name
        assert f" {share} " in lines[name], name
    slowest = [line for line in first.splitlines() if ", on " in line]
    assert [line.split()[1] for line in slowest] == ["60.0", "50.0", "40.0"]
    assert "67% of it decode, on one/7" in slowest[0]
    assert "60% of it model, on two/9" in slowest[1]
    assert "no summary: it still runs, was killed, or failed" in second
    labelled.summarize("cccc", {"began": "2027-01-15T08:10:00+00:00", "wall_s": 1.0})
    assert main(["labels", labelled.root, "--summary"]) == 0
    assert "no summary: it was killed, or failed" in capsys.readouterr().out


def test_a_summary_counts_the_classes_the_largest_first(labelled: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    found = labels(LabelsConfig(predictions=labelled.root, summary=True))
    said = [answer(index) for index in range(40)]
    scores: dict[str, list[float]] = {}
    for row in said:
        if row["status"] == "labelled":
            scores.setdefault(row["label_topk"][0], []).append(row["score_topk"][0])
    ranking = sorted(scores, key=lambda name: (-len(scores[name]), name))
    assert list(found["classes"][labelled.root].items()) == [(name, len(scores[name])) for name in ranking]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{labelled.root}: 40 videos = 32 labelled + 8 quarantined + 0 skipped; 0 abstained"
    shown = [[name, str(len(scores[name])), f"{np.mean(scores[name]):.3f}"] for name in ranking]
    assert [line.split() for line in lines[2:5]] == shown


def test_a_summary_folds_a_long_list_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"class-{number:02d}" for number in range(25))
    ledger, catalog = Ledger(LOCAL, str(tmp_path / ROOT_NAME)), library(25 * 26 // 2)
    ledger.pin_job(job_record(labels=names, scores="sigmoid"))
    keys = row_keys(catalog.table)
    plan = planned(ledger, catalog.digest, keys, len(keys))
    parts, end = [], 0
    for number in range(25):  # of the last class there are 25, of the first 1; each video has the first class, too
        place, end = end, end + number + 1
        both = {"label_topk": [names[number], names[0]], "id_topk": [number, 0], "score_topk": [0.75, 0.25]}
        parts.append(rows_for(catalog, plan.units[0].keys[place:end], status="labelled", **both))
    ledger.commit(plan.units[0], pa.concat_tables(parts), "run")
    found = labels(LabelsConfig(predictions=ledger.root, summary=True))["classes"][ledger.root]
    assert found == {names[0]: 326, **{names[number]: number + 1 for number in range(24, 0, -1)}}
    said = capsys.readouterr().out
    assert "and 5 classes more, of 20 videos" in said
    assert "class-05" not in said
    assert re.search(r"class-00 +326 +0.252\n +class-24 +25 +0.750\n", said)


def test_the_file_for_a_viewer_has_each_span_where_it_was(labelled: Ledger, tmp_path: Path) -> None:
    to = tmp_path / "trace.json"
    assert main(["labels", str(tmp_path / "labels"), "--summary", "--to", str(to)]) == 0
    assert len(summarise(LOCAL, labelled.root)) == 4
    events = json.loads(to.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["one/7", "one/8", "two/9"]
    units = [event for event in events if event["ph"] == "X" and event["name"].startswith("unit ")]
    assert sorted((names[event["tid"]], event["ts"] / 1e6 - BEGIN_S, event["dur"] / 1e6) for event in units) == [
        ("one/7", 0, 60),
        ("one/7", 60, 40),
        ("one/8", 500, 10),
        ("two/9", 50, 50),
    ]
    for unit in units:  # stages lie inside their unit, one after the other
        parts = [event for event in events if event["ph"] == "X" and event["name"] in ("store", "decode", "model")]
        inside = [p for p in parts if p["tid"] == unit["tid"] and unit["ts"] <= p["ts"] < unit["ts"] + unit["dur"]]
        assert sum(part["dur"] for part in inside) <= unit["dur"]
        assert {part["name"] for part in inside} >= {"model"}


def test_time_that_is_covered_twice_counts_once() -> None:
    spans = [Span(name="", worker="", begin_s=a, end_s=b) for a, b in ((5, 6), (0, 2), (1, 4), (1, 2), (6, 7))]
    assert covered_s(spans) == 6
    assert covered_s([]) == 0
    assert trace_events([], "nothing")["traceEvents"][0]["args"]["name"] == "nothing"


def test_a_training_says_what_its_epochs_were_spent_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    catalog = catalog_of([{"video_id": "v", "uri": "u", "split": "train"}])
    settings = TrainConfig(
        catalog="set", out=out, model=ModelConfig(factory="tiny_models:mean_colour"), optim=OptimConfig(epochs=2)
    )
    folder = RunFolder(LOCAL, out)
    folder.claim(settings, catalog)
    assert main(["runs", out]) == 0
    assert "no epoch is done" in capsys.readouterr().out
    scored = {"epoch_s": 100.0, "train_s": 80.0, "decode_wait": 0.25, "val_videos": 3}
    folder.write_epoch(epoch_row(1, time_s=BEGIN_S + 100, **scored))
    unscored = {"epoch_s": 60.0, "train_s": 60.0, "decode_wait": 0.5}
    folder.write_epoch(epoch_row(2, time_s=BEGIN_S + 200, **unscored))
    assert main(["runs", str(tmp_path)]) == 0
    assert "waiting for decoders" not in capsys.readouterr().out  # a list of runs stays a list
    assert main(["runs", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs_done"] == 2
    assert main(["runs", out]) == 0
    said = capsys.readouterr().out
    assert "2 epochs, 2027-01-15 08:00:00 UTC to 2027-01-15 08:03:20 UTC, 3 min 20 s" in said
    for name, seconds, share in (
        ("waiting for decoders", "50 s", "25%"),
        ("training steps", "1 min 30 s", "45%"),
        ("scoring", "20 s", "10%"),
        ("between epochs", "40 s", "20%"),
    ):
        assert any(
            line.split(name)[1].split("#")[0].split() == [*seconds.split(), share]
            for line in said.splitlines()
            if name in line
        ), name
    assert "slowest: epoch 1 with 1 min 20 s" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"epoch": 1, "time_s": 1e9, "epoch_s": 1, "train_s": 1e308, "decode_wait": 0}',
            "train_s is 1e+308, expected seconds",
        ),
        (
            '{"epoch": 1, "time_s": 1e9, "epoch_s": 1, "train_s": 1e9, "decode_wait": 1e300}',
            "decode_wait of train_s is inf, expected seconds",
        ),
        ('{"epoch": 1}', "KeyError('time_s')"),
        (
            '{"epoch": 1, "time_s": 1e30, "epoch_s": 1, "train_s": 1, "decode_wait": 0}',
            "time_s is 1e+30, expected seconds",
        ),
        (
            '{"epoch": 1, "time_s": 1e9, "epoch_s": 1e30, "train_s": 1, "decode_wait": 0}',
            "time_s less epoch_s is -1e+30, expected seconds",
        ),
    ],
)
def test_a_run_whose_metrics_are_damaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    catalog = catalog_of([{"video_id": "v", "uri": "u", "split": "train"}])
    out = tmp_path / "run"
    RunFolder(LOCAL, str(out)).claim(TrainConfig(catalog="set", out=str(out)), catalog)
    (out / "metrics.jsonl").write_text(f"{line}\n")
    assert main(["runs", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"ChecksumMismatch: {out / 'metrics.jsonl'} does not hold what kinoray wrote: " in said
    assert reason in said


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": None},
        {"run_id": [1]},
        {"began": 5},
        {"began": None},
        {"began": "0001-01-01T00:00:00+00:00"},
        {"wall_s": "x"},
        {"wall_s": 1e300},
    ],
    ids=str,
)
def test_a_job_that_says_no_times_is_left_out_and_named(
    labelled: Ledger, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    bad = Path(labelled.root, "jobs", "bad.json")
    bad.write_text(json.dumps({"run_id": "bbbb", "began": "2027-01-15T08:08:00+00:00", "wall_s": 9} | change))
    assert main(["labels", labelled.root, "--summary"]) == 0
    said = capsys.readouterr()
    assert "2 min 10 s in all" in said.out
    assert "no summary: it still runs, was killed, or failed" in said.out.split("run bbbb")[1]
    (line,) = [line for line in said.err.splitlines() if line.startswith("WARNING")]
    assert f"{bad} does not hold what kinoray wrote" in line


def test_a_place_without_a_labelling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", str(tmp_path), "--summary"]) == 2
    assert "holds no labelling (job.json); give the --out of kinoray label or evaluate" in capsys.readouterr().err
