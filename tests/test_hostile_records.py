"""JSON, YAML and names from strangers: bounded and typed before use, each refused with one line that names the file."""

import contextlib
import hashlib
import io
import json
import math
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinoray.cli import main
from kinoray.config.file import config_from_mapping, first_repeated, load_config, parse_yaml, to_yaml
from kinoray.config.shared import DecodeConfig, StorageConfig, parse_options
from kinoray.errors import ChecksumMismatch, ConfigError, KinorayError, ObjectTooLarge
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.planfile import parse_units
from kinoray.label.unit import PREDICTION_SCHEMA
from kinoray.library.export import Source, copied_videos
from kinoray.storage import tables
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import as_name, is_name, parse_json, parse_record, read_record
from kinoray.storage.tables import parse_table
from kinoray.train.config import TrainConfig
from small_tables import label_library, ledger_in, library, part_of

DEEP = "[" * 200_000
BAD_JSON = {
    "200,000 brackets": DEEP,
    "200,000 brackets that close": DEEP + "]" * 200_000,
    "200,000 objects": '{"a":' * 200_000,
    "deeper than is used": "[" * 65 + "]" * 65,
    "deeper than is used, behind others": "[" + "[]," * 100 + "[" * 65 + "]" * 65 + "]",
    "a number of 5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "a number of 4,000 digits": '{"a": ' + "9" * 4000 + "}",
    "a number of 65 bits": '{"a": 18446744073709551616}',
    "a number too large for a float": '{"a": 1e999}',
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": -Infinity}',
    "a key twice": '{"a": 1, "a": 2}',
    "30,000 keys, the last one twice": "{" + "".join(f'"k{n}":1,' for n in range(30_000)) + '"k29999":1}',
    "a key twice, spelled apart": '{"a": 1, "\\u0061": 2}',
    "half a surrogate pair": '{"a": "\\ud800"}',
    "half a surrogate pair as a key": '{"\\udfff": 1}',
    "no JSON": "{a: 1}",
    "nothing": "",
    "half": '{"a": [1, 2',
    "more containers than fit": "[" + "[]," * 4_000_001 + "0]",
}
NO_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "..\\x",
    ".hidden",
    "a\x00b",
    "a\nb",
    "name\n",
    "a b",
    "x" * 201,
]
NO_NAMES += ["caf\u00e9", "a\u202eb", "\x1b[2J", "s3://b/x", "~", None, 1, ["a"], {"a": "b"}]


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_not_ours_is_one_error(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=r"."):
            parse_json(data)
    with pytest.raises(ChecksumMismatch, match=r"^/x/a\.json does not hold what kinoray wrote \(") as caught:
        parse_record(text.encode(), "/x/a.json", dict)
    assert len(str(caught.value)) < 400


def test_json_that_is_ours_is_read_as_it_is() -> None:
    value = {"a": [1, -(2**63), 2**63 - 1, 0.5, 1e308, None, True], "\U0001f600": "\u00e9\x1b\u202e", "b": {"c": {}}}
    assert parse_json(json.dumps(value)) == value  # the pair of surrogates of an emoji is one character
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    deep: Any = "end"
    for _ in range(64):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep
    assert parse_json(str(2**100), bits=128) == 2**100


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "[[1, 2]]"])
def test_a_record_is_an_object(text: str) -> None:
    with pytest.raises(ChecksumMismatch, match="expected an object"):
        parse_record(text.encode(), "/x/a.json", dict)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no disk, and reading it would take all memory
    remote = join(bucket, "large.json")
    Storage(s3_config).put(remote, b" " * 2**20)
    tracemalloc.start()
    with pytest.raises(ObjectTooLarge, match=f"{path} has {2**40:,} bytes, 268,435,456 are allowed"):
        read_record(Storage(), str(path), dict)
    with pytest.raises(ObjectTooLarge, match=f"{remote} has {2**20:,} bytes, 1,000 are allowed"):
        read_record(Storage(s3_config), remote, dict, max_bytes=1000)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(Storage(s3_config).read(remote, max_bytes=2**20)) == 2**20


@pytest.mark.parametrize("text", NO_NAMES, ids=repr)
def test_what_is_joined_to_a_folder_is_a_name(text: object) -> None:
    assert not is_name(text)
    with pytest.raises(ValueError, match=r"^part .* is not a name"):
        as_name(text, "part")


@pytest.mark.parametrize("text", ["a", "0f" * 8, "epoch-0001-step-000002", "a_b.c-d", "-", "x" * 200])
def test_names_of_ours_are_names(text: str) -> None:
    assert as_name(text, "part") == text


def change_first(ledger: Ledger, folder: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the first record of a folder of the labelling."""
    path = sorted(Path(ledger.root, folder).glob("*.json"))[0]
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))
    return path


TIMES = {"worker": "w", "begin_s": 1, "end_s": 2, "store": 0, "decode": 0, "model": 0}
BAD_COMMITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unit_id climbs": lambda record: record.update(unit_id="../x"),
    "unit_id is of another unit": lambda record: record.update(unit_id="f" * 16),
    "unit_id is missing": lambda record: record.pop("unit_id"),
    "run_id is an object": lambda record: record.update(run_id={"a": 1}),
    "run_id is null": lambda record: record.update(run_id=None),
    "counts are texts": lambda record: record.update(counts={"labelled": "x"}),
    "counts are a list": lambda record: record.update(counts=[20]),
    "counts are negative": lambda record: record.update(counts={"labelled": 10**18, "quarantined": 20 - 10**18}),
    "counts are of something else": lambda record: record.update(counts={"\x1b[31m": 20}),
    "windows climb": lambda record: record.update(windows="../../../secret"),
    "windows are a path": lambda record: record.update(windows="/etc/passwd"),
    "windows are an object": lambda record: record.update(windows={"rows": 1, "size_bytes": 1}),
    "times are a text": lambda record: record.update(times="x"),
    "times are of no calendar": lambda record: record.update(times=TIMES | {"begin_s": 1e300}),
    "times are before all clocks": lambda record: record.update(times=TIMES | {"end_s": -1e18}),
    "times are endless": lambda record: record.update(times=TIMES | {"decode": 1e300}),
    "times lack a stage": lambda record: record.update(times={"worker": "w", "begin_s": 1, "end_s": 2, "store": 0}),
    "a field is unknown": lambda record: record.update(run_as="root"),
}


@pytest.mark.parametrize("change", BAD_COMMITS.values(), ids=BAD_COMMITS)
def test_a_commit_that_is_not_ours_is_refused_by_all_readers(
    change: Callable[[dict[str, Any]], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.parquet").write_bytes(b"secret")
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, library(20))
    path = sorted(Path(ledger.root, "parts").iterdir())[0]
    record = json.loads(pq.read_metadata(path).metadata[b"kinoray"])
    rows = pq.read_table(path)
    path.write_bytes(part_of(rows, record))
    assert read_predictions(Storage(), ledger.root).num_rows == 20
    change(record)
    path.write_bytes(part_of(rows, record))
    there = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    with pytest.raises(ChecksumMismatch, match=f"{path}"):
        read_predictions(Storage(), ledger.root)
    for flags in ([], ["--summary"]):
        assert main(["labels", str(tmp_path / "out"), *flags]) == 1
        said = capsys.readouterr().err
        assert str(path) in said
        assert said.count("\n") == 1
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == there


BAD_ROWS: dict[str, dict[str, Any]] = {
    "scores are no numbers": {"score_topk": [math.nan, 0.5]},
    "a score is more than 1": {"score_topk": [1.5, 0.5]},
    "a margin is none": {"margin": math.nan},
    "an entropy is endless": {"entropy": math.inf},
    "a label is null": {"label_topk": [None, "cat"]},
    "no labels": {"label_topk": None},
    "fewer scores than labels": {"score_topk": [0.5]},
    "fewer labels than classes": {"label_topk": []},
    "a class that is not there": {"id_topk": [0, 10**6]},
    "a class below 0": {"id_topk": [-1, 0]},
    "scores of other classes": {"scores": [0.5, 0.5]},
    "another status": {"status": "\x1b[31mhi"},
    "frames below 0": {"frames_corrupt": -1},
}


@pytest.mark.parametrize("change", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_no_labelling_gives_are_refused_by_all_readers(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their digests are right: who makes a folder makes them, too. What a command does not read, it does not judge."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, library(4))
    (path,) = Path(ledger.root, "parts").iterdir()
    record = json.loads(pq.read_metadata(path).metadata[b"kinoray"])
    rows = pq.read_table(path)
    path.write_bytes(part_of(rows, record | {"counts": {"labelled": 5}}))
    with pytest.raises(ChecksumMismatch, match="it has 4 rows, and says 5"):
        read_predictions(Storage(), ledger.root)
    bad = pa.Table.from_pylist([row | change for row in rows.to_pylist()], schema=PREDICTION_SCHEMA)
    path.write_bytes(part_of(bad, record))
    with pytest.raises(ChecksumMismatch, match=f"{path} is not what was committed: column .*{next(iter(change))}"):
        read_predictions(Storage(), ledger.root)
    out = str(tmp_path / "out")
    for arguments in (
        ["report", out, "--out", str(tmp_path / "site")],
        ["export", out, "--format", "datumaro", "--to", str(tmp_path / "datumaro")],
        ["labels", out, "--format", "jsonl", "--to", str(tmp_path / "rows.jsonl")],
    ):
        failed = main(arguments)
        said = capsys.readouterr().err
        assert failed == (f"{path} is not what was committed" in said)


BAD_PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "catalog_digest climbs": lambda record: record.update(catalog_digest="../../x"),
    "catalog_digest is of another catalog": lambda record: record.update(catalog_digest="f" * 16),
    "keys climb": lambda record: record.update(keys="../../x"),
    "units climb": lambda record: record.update(units="../../x"),
    "units are others": lambda record: record.update(units="f" * 64),
    "num_rows is more than the keys": lambda record: record.update(num_rows=21),
    "num_rows is negative": lambda record: record.update(num_rows=-1),
    "num_rows is a fraction": lambda record: record.update(num_rows=8.5),
    "units is an object": lambda record: record.update(units={"a": 1}),
    "sequence is a text": lambda record: record.update(sequence="x"),
}


BAD_UNITS: dict[str, dict[str, Any]] = {
    "unit_id climbs": {"unit_id": "../../x"},
    "num_rows is less than the keys": {"num_rows": 0},
    "num_rows is more than the keys": {"num_rows": 9},
    "num_keys is negative": {"num_keys": -1},
    "num_keys is more than there are": {"num_keys": 9, "num_rows": 9},
    "mask is of other rows": {"num_rows": 9, "mask": b"\xff"},
    "mask is of other keys": {"num_rows": 9, "mask": b"\xff\x01"},
    "first is null": {"first": None},
    "first is negative": {"first": -1},
    "first is behind last": {"first": 19},
    "last is no row": {"last": 20},
    "rows do not fit between first and last": {"last": 6},
    "num_keys overflows": {"num_keys": 2**63 - 1, "num_rows": 2**63 - 1},
}


@pytest.mark.parametrize("change", BAD_UNITS.values(), ids=BAD_UNITS)
def test_units_that_are_not_ours_are_refused_also_where_their_digest_fits(
    change: dict[str, Any], tmp_path: Path
) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, library(20))
    (path,) = Path(ledger.root, "plans").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[0] |= change
    schema = pa.schema([field.with_nullable(True) for field in pq.read_schema(path)])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    sha256 = hashlib.sha256(sink.getvalue()).hexdigest()
    head = change_first(ledger, "plans", lambda record: record.update(units=sha256))
    path.with_name(f"{head.stem}-{sha256[:16]}.parquet").write_bytes(sink.getvalue())
    with pytest.raises(ChecksumMismatch, match=f"{head}"):
        ledger.plans()


@pytest.mark.parametrize("wrong", ["id", "sum"])
def test_sums_of_units_do_not_overflow_and_an_id_is_there_once(wrong: str, tmp_path: Path) -> None:
    """Three units of 2 ** 63 - 1, 2 ** 63 - 1 and 22 keys add up to 20 in 64 bits."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    plan = label_library(ledger, library(20))
    (path,) = Path(ledger.root, "plans").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    if wrong == "id":
        rows[1]["unit_id"] = rows[0]["unit_id"]
    else:
        for row, keys in zip(rows, (2**63 - 1, 2**63 - 1, 22), strict=True):
            row |= {"num_keys": keys, "num_rows": keys}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), sink)
    with pytest.raises(ValueError, match="the same id" if wrong == "id" else "keys, and there are 20"):
        parse_units(sink.getvalue(), plan.keys)


@pytest.mark.parametrize("change", BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_is_not_ours_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, library(20))
    path = change_first(ledger, "plans", change)
    with pytest.raises(ChecksumMismatch, match=f"{path}"):
        ledger.plans()


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    plan = label_library(ledger, library(20))
    assert ledger.plans() == [plan]


@pytest.mark.parametrize("text", [DEEP, "[]", '{"labels": {}}', '{"labels": [1]}', '{"views": 3, "labels": ["a"]}'])
def test_a_job_that_is_not_ours_ends_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, library(20))
    Path(ledger.root, "job.json").write_text(text)
    for line in (["labels", "--windows"], ["labels", "--label", "x"], ["export", "--format", "datumaro", "--to", "x"]):
        flags = [str(tmp_path / flag) if flag == "x" and line[0] == "export" else flag for flag in line[1:]]
        assert main([line[0], str(tmp_path / "out"), *flags]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith(f"kinoray {line[0]}: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("where", "text"),
    [
        *((where, text) for where in ("run.json", "metrics.jsonl", "status.json") for text in (DEEP, "[]", "{a}")),
        ("run.json", '{"settings": []}'),
        ("run.json", '{"settings": {"optim.epochs": {}, "model.factory": "x"}}'),
        ("status.json", '{"state": "running", "started_s": 1e300, "error": ""}'),
        ("status.json", '{"state": ["running"], "started_s": 1, "error": ""}'),
        ("metrics.jsonl", '{"epoch": "x", "val_top1": {}}'),
        ("metrics.jsonl", '{"epoch": 1, "decode_wait": "x", "train_s": 30000000000}'),
        ("metrics.jsonl", '{"epoch": 1, "decode_wait": [0]}'),
        ("metrics.jsonl", '{"epoch": 1e300, "loss": 1}'),
        ("run.json", '{"settings": {"optim.epochs": 1e300, "model.factory": "x"}}'),
        ("metrics.jsonl", '{"epoch": 1, "loss": NaN}'),
    ],
)
def test_runs_shows_a_run_that_is_not_ours_as_damaged(
    where: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"settings": {"optim.epochs": 1, "model.factory": "x"}}')
    (tmp_path / "bad" / where).write_text(text)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    states = {Path(run["uri"]).name: run["state"] for run in map(json.loads, capsys.readouterr().out.splitlines())}
    assert states["good"] == "running"
    assert states["bad"] == "damaged"
    assert main(["runs", str(tmp_path)]) == 0  # the table, too


def test_what_no_labelling_wrote_is_no_unit_and_stays(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    plan = label_library(ledger, library(20))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (mine / ".kinoray-tmp-mine").write_text("mine, too")
    parts = Path(ledger.root, "parts")
    (parts / "linked").symlink_to(mine)
    (parts / ".kinoray-tmp-linked").symlink_to(mine / "thesis.tex")
    (parts / "notes.txt").write_text("why")
    (parts / "deeper").mkdir()
    (parts / "deeper" / "a.parquet").write_text("x")
    there = set(tmp_path.rglob("*"))
    for path in there:
        os.utime(path, (0, 0), follow_symlinks=False)
    assert ledger.committed() == {unit.unit_id for unit in plan.units}
    ledger.summarize("a", {})
    assert set(tmp_path.rglob("*")) == there | {
        Path(ledger.root, "jobs"),
        Path(ledger.root, "jobs", "a.json"),
    }
    assert read_predictions(Storage(), ledger.root).num_rows == 20


@pytest.mark.parametrize("key", ["../../climbed", "/tmp/absolute", "a/b", ""])
def test_a_row_key_is_no_path_of_a_copied_video(key: str, tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"\0\0\0\0ftyp")
    row = {"video_id": "a", "uri": str(video), "offset": None, "length": None, "row_key": key}
    with pytest.raises(ChecksumMismatch, match=r"row_key .* is not a name"):
        list(
            copied_videos(Storage(), [row], tmp_path / "to" / "deep", Source(Storage(), str(tmp_path)), DecodeConfig())
        )
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.mp4"]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)
BAD_YAML = {
    "aliases of aliases": BOMB,
    "a long text, many times": f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 1000)}]",
    "merges of merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 30)}]}}\n" for level in range(1, 10)),
    "an alias of itself": "a: &a [*a]",
    "deep": "[" * 10_000,
    "deep objects": "{a: " * 10_000,
    "deep by blocks": "\n".join("  " * level + "- " for level in range(500)),
    "a key twice": "optim: {lr: 1}\noptim: {lr: 2}",
    "a key twice in a branch": "optim:\n  lr: 1\n  lr: 2",
    "a number of 5,000 digits": "a: " + "9" * 5000,
    "a number with a leading zero": "a: 010",
    "a hexadecimal number of 5,000 digits": "a: 0x" + "f" * 5000,
    "a day that is none": "a: 2024-99-99",
    "a day": "a: 2024-01-01",
    "bytes": "a: !!binary aGVsbG8=",
    "a set": "a: !!set {b}",
    "a key that is no text": "1: a",
    "a key that is a list": "? [a]\n: b",
    "no truth": "a: !!bool maybe",
    "no time": "a: !!timestamp x",
    "an object of Python": "a: !!python/object/apply:os.system [id]",
    "no number": "a: .nan",
    "without end": "a: .inf",
    "two documents": "a: 1\n---\nb: 2",
    "too long": "a: " + "x" * 2**20,
}


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_too_much_is_one_error_and_no_memory(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    tracemalloc.start()
    begin_s = time.process_time()
    with pytest.raises(ConfigError, match=r"--config .*config\.yaml") as caught:
        load_config(TrainConfig, str(path))
    with pytest.raises(ConfigError, match=r"^model\.options\.a"):
        parse_options([f"a={text}"])
    assert time.process_time() - begin_s < 20  # the bomb took 60 s; under tracemalloc the longest takes 3
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert len(str(caught.value)) < 500 + len(str(path))
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_found_in_one_pass() -> None:
    assert first_repeated([*range(10**6), 999_999]) == 999_999


def test_numbers_of_yaml_are_decimal() -> None:
    for text in ("1:" * 20_000 + "1", "1:" * 20_000 + "1.5", "1" * 1000, "0x1F", "0b11"):
        with pytest.raises(ConfigError, match="is not a short decimal one; put text in quotes"):
            parse_yaml(f"a: {text}", "x")
    begun = time.process_time()
    text = "1" * 200_000 + "x"  # nearly a number: what says that it is none must not look at each digit again
    assert parse_yaml(f"a: {text}", "x") == {"a": text}
    assert time.process_time() - begun < 2
    text = "a: [1e-3, 1.e3, .5e2, 0, -1, +2, 1_000, 1.5, .5, 6.0e-05, 2., 9007199254740993]\nb: '1:30'"
    assert parse_yaml(text, "x") == {
        "a": [1e-3, 1e3, 50.0, 0, -1, 2, 1000, 1.5, 0.5, 6e-05, 2.0, 9007199254740993],
        "b": "1:30",
    }
    assert parse_yaml(to_yaml({"a": [1e300, 1e-300, 0.1, 2**62]}), "x") == {"a": [1e300, 1e-300, 0.1, 2**62]}


def test_yaml_with_an_alias_that_stays_small_is_read() -> None:
    text = "base: &base {lr: 0.1, tags: [a, b]}\nfirst: *base\nsecond: {<<: *base, lr: 0.2}\n"
    found = parse_yaml(text, "x")
    assert found["first"] == {"lr": 0.1, "tags": ["a", "b"]}
    assert found["second"] == {"lr": 0.2, "tags": ["a", "b"]}


def test_a_value_that_is_there_twice_is_written_out_and_reads_back() -> None:
    shared = [1, 2]
    config = config_from_mapping(
        TrainConfig,
        {"catalog": "a", "out": "b", "model": {"factory": "x:y", "options": {"a": shared, "b": shared}}},
    )
    assert "&" not in (text := to_yaml(config))
    assert config_from_mapping(TrainConfig, parse_yaml(text, "x")) == config


def test_a_whole_number_that_no_float_holds_is_a_wrong_value() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        config_from_mapping(TrainConfig, {"catalog": "a", "out": "b", "optim": {"lr": 10**400}})


@pytest.mark.parametrize("text", [DEEP, "[]", "{}", '{"labels": {}}', "not JSON"])
def test_evaluations_and_calibrations_that_are_not_ours_end_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert main(["compare", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "evaluation.json" in said
    assert said.count("\n") == 1


NUM_BOMB_ROWS = 400_000
REPEATED = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), NUM_BOMB_ROWS), ["a" * 200])
TABLES_OF_NOTHING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one text in millions of rows": ({"a": REPEATED}, {}),
    "one number in millions of rows": (dict.fromkeys("abcdefghij", pa.repeat(1, NUM_BOMB_ROWS)), {}),
    "one long text in some rows": ({"a": pa.array(["x" * 2**20] * 400)}, {}),
    "a long text": ({"a": pa.array(["x" * 2**26])}, {"use_dictionary": False}),
    "a long list": ({"a": pa.array([[1.0] * 2**20] * 5)}, {}),
    "a long list of texts": ({"a": pa.array([["x" * 1000] * 2**16])}, {}),
    "a long prefix": (
        {"a": pa.array(["x" * 2**20 + f"{n}" for n in range(300)])},
        {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}},
    ),
}


@pytest.mark.parametrize("name", TABLES_OF_NOTHING)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_table_of_few_bytes_that_becomes_much_is_refused_before_it_is_read(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, options = TABLES_OF_NOTHING[name]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", data_page_version=version, **options)
    assert len(sink.getvalue()) < 20_000
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    monkeypatch.setattr("kinoray.storage.tables._TABLE_BYTES", 2**20)
    with pytest.raises(
        pa.ArrowInvalid, match=r"would take more memory than 1,024 times|is encoded in a way that is not"
    ):
        parse_table(sink.getvalue())


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "brotli", "lz4", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_table_of_ordinary_rows_is_read_however_it_is_compressed(compression: str, version: str) -> None:
    """Ordinary in length, extraordinary in order: names that differ by a number take two bytes each in the file."""
    names = [f"video-{number:07d}.mp4" for number in range(50_000)]
    table = pa.table(
        {
            "id": names,
            "shard": [f"s3://bucket/set/train-{number // 1000:05d}.tar" for number in range(50_000)],
            "nothing": pa.nulls(50_000, pa.string()),
            "size": range(50_000),
            "labels": [["cat", "dog"][: number % 3] for number in range(50_000)],
            "half": pa.array(np.zeros(50_000, np.float16)),
        }
    )
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression=compression, data_page_version=version, row_group_size=20_000, write_page_checksum=True
    )
    assert parse_table(sink.getvalue()).equals(table)
    assert parse_table(sink.getvalue(), ["labels", "id"]).equals(table.select(["labels", "id"]))


def _varint(value: int) -> bytes:
    return bytes([*(value >> shift & 0x7F | 0x80 for shift in range(0, 63, 7)), value >> 63])


@pytest.mark.parametrize("kind", [1, 3, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("count", [100, 2**60])
def test_the_header_of_a_page_cannot_claim_a_list_that_is_longer_than_the_file(kind: int, count: int) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": ["x"]}), sink, compression="none", use_dictionary=False, write_statistics=False)
    data = sink.getvalue()
    _, end = tables._thrift(data, 4)
    odd = bytes([0xC0 + 9, 0xF0 + kind]) + _varint(count) + b"\0"  # one more field of the header: a list
    begun = time.process_time()
    with pytest.raises(pa.ArrowInvalid):
        parse_table(data[: end - 1] + odd + data[end:])
    assert time.process_time() - begun < 1


def test_a_table_whose_texts_are_not_utf8_is_refused_when_it_is_read() -> None:
    odd = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": odd}), sink)
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        parse_table(sink.getvalue())


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_table_with_a_changed_byte_is_read_or_refused(place: int, value: int) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": ["x", "y", "x"] * 20, "b": range(60)}), sink, write_page_checksum=True)
    data = bytearray(sink.getvalue())
    data[place % len(data)] = value
    with contextlib.suppress(pa.ArrowInvalid):
        parse_table(bytes(data))


def test_nothing_else_reads_json_or_yaml() -> None:
    root = Path(__file__).resolve().parents[1]
    found = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for folder in ("platform", "models", "jobs")
        for path in (root / folder).rglob("*.py")
    }
    loads = {name for name, text in found.items() if "json.load" in text}
    # models/ import nothing of the platform but the contract of networks; image_text reads what itself has written
    folders = {f"models/video_baselines/{name}_folder.py" for name in ("huggingface", "image_text")}
    assert loads == {"platform/kinoray/storage/records.py", *folders}
    assert {name for name, text in found.items() if "import yaml" in text} == {"platform/kinoray/config/file.py"}
    makes_folders = {name for name, text in found.items() if "TemporaryDirectory" in text or "mkdtemp" in text}
    assert makes_folders == {"platform/kinoray/storage/leftovers.py"}


def test_no_error_of_a_record_is_another_error(tmp_path: Path) -> None:
    """Whatever `make` raises of a value that it does not take."""
    record = b'{"a": 1e300}'
    makers: list[Callable[[dict[str, Any]], object]] = [
        lambda value: value["b"],
        lambda value: int(value["a"] * 1e300),
        lambda value: value["a"].lower(),
        lambda value: [][int(value["a"] > 0)],
    ]
    for make in makers:
        with pytest.raises(KinorayError):
            parse_record(record, os.fspath(tmp_path), make)
