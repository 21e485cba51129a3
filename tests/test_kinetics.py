"""Packing Kinetics: every annotation row and every file gets the one verdict that the set's maker wrote down for it."""

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import wait_until
from kinetics_set import LABELS, KineticsSet, archived_set, clip, folder_set, key
from kinoray.catalog.annotations import read_annotations, read_label_names
from kinoray.catalog.kinetics import AnnotationRow, judge_name, key_of_name, plan_rows, printable, window_of_key
from kinoray.catalog.rows import load_quarantine
from kinoray.catalog.table import load_catalog, read_videos, references
from kinoray.cli import main
from kinoray.config.shared import ClipConfig, StorageConfig
from kinoray.errors import CatalogError, ConfigError, IncompleteOutput, TooManyBad
from kinoray.pack.config import PackConfig
from kinoray.pack.kinetics import FILE_VERDICTS, ROW_VERDICTS
from kinoray.storage.objects import Storage, join
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from kinoray.video.transcode import transcode

STORAGE = Storage()
ANNOTATIONS = ("train.csv", "val.csv", "test.csv")


# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("abcdefghijk_000010_000020.mp4", "abcdefghijk_000010_000020"),
        ("a/b c/abcdefghijk_10_20.WEBM", "abcdefghijk_000010_000020"),
        ("-a_b_c_10_d__000010_000020.mp4", "-a_b_c_10_d__000010_000020"),
        ("abcdefghijk_000010_000020", "abcdefghijk_000010_000020"),
        ("any thing.mp4", "any thing"),
        ("abc.tar.mp4", "abc.tar"),
        ("abc.txt", "abc.txt"),
    ],
)
def test_a_file_is_known_by_the_key_in_its_base_name(name: str, expected: str) -> None:
    assert key_of_name(name) == expected


def test_a_key_names_its_window() -> None:
    assert window_of_key("abcdefghijk_000010_000020") == (10.0, 20.0)
    assert window_of_key("abcdefghijk_000020_000010") is None
    assert window_of_key("any thing") is None


@pytest.mark.parametrize(
    "name",
    [
        "../x.mp4",
        "a/../x.mp4",
        "/x.mp4",
        "\\x.mp4",
        "c:/x.mp4",
        "a\0b.mp4",
        "\udcff.mp4",
        "x" * 2000 + ".mp4",
        "a\u202eb.mp4",
    ],
)
def test_names_that_lead_elsewhere_or_cannot_be_shown_are_unsafe(name: str) -> None:
    assert judge_name(name, {})[1] == "unsafe_name"
    assert printable(name).isprintable()
    assert len(printable(name)) < 240
    printable(name).encode()


# --- annotation files


def read(
    tmp_path: Path, name: str, content: str | bytes, label_names: dict[int, str] | None = None
) -> list[AnnotationRow]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_annotations(STORAGE, [str(path)], label_names)


def parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


KEY = "abcdefghijk_000010_000020"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "label,youtube_id,time_start,time_end,split,is_cc\nriding a bike,abcdefghijk,10,20,train,0\n"),
        ("x.csv", '\ufeffyoutube_id,Split,label,time_end,time_start\r\nabcdefghijk,train,"riding a bike",20.0,10\r\n'),
        ("train.csv", f"{KEY}.mp4 riding a bike\n"),
        ("train.csv", f"\nsome folder/{KEY}.mp4  riding a bike\n"),
        ("my_train_list.txt", f"s3://b/{KEY}.mp4 2\n"),
        ("x.csv", f"path,label,split\na/{KEY}.mp4,riding a bike,train\n"),
        ("train.csv", f"a/{KEY}.mp4,riding a bike\n"),
        ("x.csv", f'"a, b/{KEY}.mp4",riding a bike,train\n'),
        ("x.jsonl", json.dumps({"video": f"{KEY}.mp4", "label": "riding a bike", "split": "train"}) + "\n\n"),
        (
            "train.jsonl",
            json.dumps({"youtube_id": "abcdefghijk", "label": 2, "time_start": 10, "time_end": 20}),
        ),
        ("train.parquet", parquet({"path": [f"x/{KEY}.mp4"], "label": ["riding a bike"]})),
        (
            "x.parquet",
            parquet(
                {
                    "youtube_id": ["abcdefghijk"],
                    "time_start": [10.0],
                    "time_end": [20.0],
                    "label": [2.0],
                    "split": ["train"],
                }
            ),
        ),
    ],
    ids=range(12),
)
def test_every_format_says_the_same(tmp_path: Path, name: str, content: str | bytes) -> None:
    rows = read(tmp_path, name, content, {2: "riding a bike"})
    assert [row[2:] for row in rows] == [(KEY, "riding a bike", "train", 10.0, 20.0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", r"x\.csv line 1: found 'a,b'; expected label,youtube_id"),
        ("x.csv", "label,youtube_id,time_start,time_end,split\nx,,1,2,train", "line 2: youtube_id and path are empty"),
        ("x.csv", "label,youtube_id,time_start,time_end\nx,abc,1,2", r"line 2: no split, and the file's name does not"),
        (
            "train.csv",
            "label,youtube_id,time_start,time_end\nx,abc,ten,2",
            "line 2: time_start is 'ten'; expected seconds",
        ),
        ("train.csv", "label,youtube_id,time_start,time_end\nx,abc,20,10", "line 2: time_start 20.0 and time_end 10.0"),
        ("train.csv", "label,youtube_id,time_start,time_end\nx,abc,1,", "line 2: time_start and time_end are needed"),
        ("train.csv", "label,youtube_id,time_start,time_end\n,abc,1,2", "line 2: the label is empty; only the splits"),
        ("train.csv", "path,label\na.mp4,x,y,z", "line 2: 4 cells are more than the 2 columns .*quotes"),
        ("train.txt", "a.mp4 x\nb x", r"train\.txt line 2: found 'b x', no video and label"),
        ("train.jsonl", '{"path": "a.mp4", "label": "x"}\n{"path"', r"line 2 is not JSON"),
        ("train.jsonl", '{"path": "a.mp4", "label": "x"}\n[]', "line 2: expected an object"),
        ("train.csv", "path,label\na.mp4,7", "line 2: label 7 has no name; label_names names 1 class"),
        ("train.csv", "", "has no row"),
        ("train.csv", b"\xfe\xfd\x00", "line 1 is not UTF-8 text"),
        ("train.parquet", b"PAR1xxxx", "is not Parquet"),
        ("train.csv", 'path,label\n"a.mp4,x\nb.mp4,y', "line 2, cell 1: a quote is not closed in its line"),
        ("train.csv", f"path,label\na.mp4,{'9' * 5000}", "line 2: label 9{40} has no name"),
        ("train.csv", f"path,label\na.mp4,{'x' * 5000}", "line 2: the class 'x{40}' ... has 5,000 characters, at most"),
        ("train.jsonl", '{"path": "a.mp4", "label": "x", "LABEL": "y"}', "line 1: two columns are called 'label'"),
        (
            "train.jsonl",
            '{"path": "a.mp4", "label\\u200b": "x"}',
            r"line 1: the column 'label\\u200b' holds characters",
        ),
        ("train.jsonl", '{"path": "a.mp4", "label": ["x", "y"]}', r"line 1: label is .*; expected text or a number"),
        ("train.jsonl", '{"path": "a.mp4", "label": true}', "line 1: label is 'True'; expected text or a number"),
        ("train.jsonl", '{"path": ["d.mp4"], "label": "x"}', r"line 1: path is .*; expected text or a number"),
        ("train.parquet", parquet({"path": ["a.mp4"], "label": ["x"], "Label": ["y"]}), "two columns are called"),
        ("train.parquet", parquet({"path": ["a.mp4"], "label": [b"x"]}), "column label is binary; expected text or"),
        ("train.parquet", parquet({"path": ["a.mp4"], "label": [["x"]]}), "column label is list<.*; expected text or"),
        (
            "train.parquet",
            parquet({"path": ["a.mp4"], "label": [math.nan]}),
            "line 1: label is 'nan'; expected text or",
        ),
    ],
    ids=range(27),
)
def test_a_row_that_cannot_be_understood_is_an_error_by_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(CatalogError, match=message):
        read(tmp_path, name, content, {0: "zero"})


def test_the_official_test_file_has_no_labels(tmp_path: Path) -> None:
    rows = read(tmp_path, "x.csv", "youtube_id,time_start,time_end,split\nabcdefghijk,10,20,test\n", {})
    assert [row[2:] for row in rows] == [(KEY, None, "test", 10.0, 20.0)]


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("path,label\na.mp4,x\n")
    with pytest.raises(CatalogError, match=r"train\.csv is named twice"):
        read_annotations(STORAGE, [str(tmp_path / "train.csv"), f"{tmp_path}/./train.csv"], {})


@pytest.mark.parametrize(
    "content",
    ["a\nb c\n", "0 a\n1 b c\n", '0,a\n1,"b c"\n', '["a", "b c"]', '{"a": 0, "b c": 1}', '{"0": "a", "1": "b c"}'],
)
def test_label_names_come_in_lists_and_maps(tmp_path: Path, content: str) -> None:
    (tmp_path / "names").write_text(content)
    assert read_label_names(STORAGE, str(tmp_path / "names")) == {0: "a", 1: "b c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 a\n0 b\n", "each number once"),
        ("", "is empty"),
        ("[1", "not JSON"),
        ('{"\u00b2": "a"}', "each number once"),
        (f'{{"{"1" * 5000}": "a"}}', "number '1{39} with name 'a'; expected each number once"),
        (f"{'1' * 5000} a\n", "number '1{39} with name 'a'; expected each number once"),
    ],
    ids=range(6),
)
def test_label_names_that_cannot_be_used_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "names").write_text(content)
    with pytest.raises(CatalogError, match=message):
        read_label_names(STORAGE, str(tmp_path / "names"))


# --- which rows want a file


def row(name: str, split: str = "train", label: str | None = "x", line: int = 1) -> AnnotationRow:
    return AnnotationRow("f.csv", line, name, label, split, None, None)


def verdicts_of(rows: list[AnnotationRow], *, limit: int | None = None, keep_leaks: bool = False) -> list[str]:
    return [known[0] if known else "" for known in plan_rows(rows, limit=limit, keep_leaks=keep_leaks).verdicts]


def test_train_gives_way_to_other_splits_whatever_the_order() -> None:
    rows = [row("a_1_2"), row("b_1_2"), row("a_5_6", "val"), row("b_1_2", "test", None), row("c_1_2"), row("c_7_8")]
    assert verdicts_of(rows) == ["leak", "leak", "", "", "", ""]
    assert verdicts_of(rows, keep_leaks=True) == ["", "duplicate", "", "", "", ""]
    shuffled = [rows[index] for index in (3, 2, 1, 0)]
    assert verdicts_of(shuffled) == ["", "", "leak", "leak"]


def test_splits_other_than_train_are_left_as_they_are_and_counted() -> None:
    plan = plan_rows([row("a_1_2", "val"), row("a_3_4", "test"), row("b_1_2", "val")], limit=None, keep_leaks=False)
    assert list(plan.verdicts) == [None, None, None]
    assert (plan.num_leaks, plan.num_between) == (0, 1)


def test_the_limit_counts_what_is_left_of_each_split() -> None:
    rows = [row("a"), row("a"), row("v_1_2"), row("v_3_4", "val"), row("b"), row("c"), row("w", "val"), row("x", "val")]
    assert verdicts_of(rows, limit=2) == ["", "duplicate", "leak", "", "", "beyond_limit", "", "beyond_limit"]


def test_columns_that_are_not_asked_for_may_be_of_any_type(tmp_path: Path) -> None:
    when = pa.array([0], pa.timestamp("us", tz="Nowhere/None"))
    columns = {"path": ["a.mp4"], "label": pa.array(["x"]).dictionary_encode(), "when": when, "raw": [b"\xff"]}
    (row,) = read(tmp_path, "train.parquet", parquet(columns))
    assert row.label == "x"
    with pytest.raises(
        CatalogError, match=r"column label is timestamp\[us, tz=Nowhere/None\]; expected text or numbers"
    ):
        read(tmp_path, "train.parquet", parquet({"path": ["a.mp4"], "label": when}))


def test_labels_that_are_numbers_are_sorted_as_numbers() -> None:
    plan = plan_rows([row("a", label="10"), row("b", label="9"), row("c", label="0")], limit=None, keep_leaks=False)
    assert plan.labels == ("0", "9", "10")
    mixed = plan_rows([row("a", label="10"), row("b", label="9"), row("c", label="x")], limit=None, keep_leaks=False)
    assert mixed.labels == ("10", "9", "x")


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinetics": "k400"}, "annotations must be one or more files"),
        ({"annotations": ("x.csv",)}, "annotations must be given with --kinetics only"),
        ({"limit": 3}, "limit must be given with --kinetics only"),
        ({"leaks": "keep"}, "leaks must be given with --kinetics only"),
        ({"kinetics": "k400", "annotations": ("x",), "limit": 0}, "limit must be at least 1"),
        ({"kinetics": "k400", "annotations": ("x",), "val_fraction": 0.5}, "val_fraction must be 0 with --kinetics"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackConfig(source="x", out="y", **change)


@pytest.mark.parametrize(
    "line",
    [
        "SRC --kinetics k400 --annotations a.csv b.csv --out DST --workers 3",
        "--kinetics k400 --annotations a.csv b.csv SRC --out DST --workers 3",
        "--kinetics k400 --out DST --workers 3 --annotations a.csv b.csv SRC",
        "--kinetics k400 --annotations a.csv b.csv --workers 3 --out DST SRC",
    ],
)
def test_the_source_may_stand_anywhere(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", *line.split(), "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["source"], found["out"], found["annotations"]) == ("SRC", "DST", ["a.csv", "b.csv"])
    assert found["resources"]["num_workers"] == 3


def test_a_command_line_without_source_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "--kinetics", "k400", "--annotations", "a.csv", "--out", "DST"]) == 2
    assert "Missing: SOURCE" in capsys.readouterr().err


# --- the whole pack


def config_of(folder: Path, **more: Any) -> PackConfig:
    """Pack what KineticsSet.write wrote into `folder`; every second wanted file may be bad, as the set wants it."""
    return PackConfig(
        **{
            "source": str(folder / "source"),
            "out": str(folder / "out"),
            "kinetics": "k400",
            "annotations": tuple(str(folder / name) for name in ANNOTATIONS),
            "max_bad_fraction": 0.5,
            **more,
        }
    )


def pack(config: PackConfig) -> dict[str, Any]:
    from kinoray.pack.verb import pack

    return pack(config)


def check(made: KineticsSet, config: PackConfig, totals: dict[str, Any], storage: Storage = STORAGE) -> None:
    """The verdicts are those of the set's maker, one for each row and file, and all tables agree with them."""
    table = pq.read_table(pa.BufferReader(storage.read(join(config.out, "verdicts.parquet")))).to_pylist()
    rows = [line for line in table if line["subject"] == "row"]
    assert {
        (line["source"].rpartition("/")[2], line["number"]): line["verdict"] for line in rows
    } == made.row_verdicts()
    assert len(rows) == len(made.row_verdicts())
    files = [line for line in table if line["subject"] == "file"]
    base = config.source.rstrip("/") + "/"
    found = [
        (
            line["source"].removeprefix(base),
            line["member"],
            line["verdict"],
            line["reason"] if line["verdict"] in ("unreadable", "too_short") else "",
        )
        for line in files
    ]
    expected = made.file_verdicts()
    archives = {line["source"].removeprefix(base): line for line in table if line["subject"] == "archive"}
    assert sorted(found, key=str) == expected
    assert archives.keys() == made.archives.keys()
    for path, line in archives.items():
        assert (line["verdict"] == "damaged") == (path in made.damaged)
        assert made.damaged.get(path, "") in line["detail"]
    assert totals["rows"] == Counter(made.row_verdicts().values())
    assert totals["files"] == Counter(verdict for _, _, verdict, _ in expected)
    check_catalog(made, config, totals, storage)


def check_catalog(made: KineticsSet, config: PackConfig, totals: dict[str, Any], storage: Storage) -> None:
    """Each packed row leads to the bytes that were laid down for it, and carries what its line says."""
    catalog = load_catalog(storage, config.out)
    wanted = {}
    for name, lines in made.lines.items():
        header = next(csv.reader([lines[0][0]]))
        for line, verdict in lines[1:]:
            fields = dict(zip(header, next(csv.reader([line])), strict=True))
            if verdict == "packed":
                video_id = f"{fields['youtube_id']}_{int(fields['time_start']):06d}_{int(fields['time_end']):06d}"
                wanted[video_id] = (fields.get("label"), name.removesuffix(".csv"))
    files = [*made.files, *(member for members in made.archives.values() for member in members)]
    originals = {}
    for file in files:
        if file.verdict == "packed":
            stem = re.fullmatch(r"(?:.*/)?(.{11})_0*(\d+)_0*(\d+)\.\w+", file.name)
            assert stem
            originals[f"{stem[1]}_{int(stem[2]):06d}_{int(stem[3]):06d}"] = file.data
    assert originals.keys() == wanted.keys()
    assert catalog.labels == LABELS
    assert json.loads(storage.read(join(config.out, "labels.json"))) == list(LABELS)
    table = catalog.table.to_pylist()
    assert {line["video_id"]: (line["label"], line["split"]) for line in table} == wanted
    for line, data in zip(table, read_videos(storage, references(catalog.table)), strict=True):
        assert line["label_id"] == (None if line["label"] is None else LABELS.index(line["label"]))
        assert (line["time_start_s"], line["time_end_s"]) == window_of_key(line["video_id"])
        assert decode(data, Sampled(), ClipConfig().without_flow()).clip().num_frames == line["num_frames"] > 0
        if not config.transcode:
            assert data == originals[line["video_id"]]
    refused = load_quarantine(storage, join(config.out, "quarantine.parquet"))
    counted = {"unreadable", "too_short", "not_a_video", "not_regular", "unsafe_name"}
    assert len(refused) == sum(verdict in counted for _, _, verdict, _ in made.file_verdicts()) == totals["quarantined"]
    assert json.loads(storage.read(join(config.out, "pack.json"))).items() >= totals.items()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("make", [archived_set, folder_set], ids=["archives", "folders"])
def test_every_row_and_file_gets_its_verdict(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = make()
    made.write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "source").rglob("*")}
    config = config_of(tmp_path)
    totals = pack(config)
    said = capsys.readouterr().out
    check(made, config, totals)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "source").rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", *sorted(ANNOTATIONS)]
    assert "4 classes (official k400: 400)" in said
    assert "leaks into train: 2 by source video, 1 by content, removed from train" in said
    for archive in made.damaged:
        assert re.search(rf"WARNING: .*{archive} is damaged", said)
    first = load_catalog(STORAGE, config.out).digest
    assert pack(config) == totals
    assert load_catalog(STORAGE, config.out).digest == first


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_archives_in_a_bucket_are_packed_into_a_bucket(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    made, storage = archived_set(), Storage(s3_config)
    for path, data in made.content().items():
        storage.put(f"{bucket}/set/{path}", data)
    for name in ANNOTATIONS:
        storage.put(f"{bucket}/{name}", made.annotations(name))
    names = tuple(f"{bucket}/{name}" for name in ANNOTATIONS)
    more = {"source": f"{bucket}/set", "out": f"{bucket}/out", "annotations": names, "storage": s3_config}
    config = config_of(tmp_path, **more)
    check(made, config, pack(config), storage)
    assert not list(tmp_path.iterdir())


def small_set(num_archives: int, per_archive: int) -> KineticsSet:
    """Good clips only."""
    made = KineticsSet()
    made.row("packed", 9990, split="val")
    made.add("val.tar", f"{key(9990)}.mp4", clip(9990), "packed")
    made.test_row("packed", 9991)
    made.add("val.tar", f"{key(9991)}.mp4", clip(9991), "packed")
    for archive in range(num_archives):
        for number in range(archive * per_archive, (archive + 1) * per_archive):
            made.row("packed", number)
            made.add(f"part_{archive}.tar.gz", f"{key(number)}.mp4", clip(number % 4 + 100), "packed")
    return made


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_killed_pack_goes_on_with_unfinished_archives_only(tmp_path: Path) -> None:
    """kill -9 of the driver once two of five archives are committed; then the same command, to the same catalog."""
    made = small_set(4, 30)
    made.write(tmp_path)
    undisturbed = config_of(tmp_path, out=str(tmp_path / "undisturbed"))
    pack(undisturbed)
    config = config_of(tmp_path)
    shards = tmp_path / "out" / "shards"
    names = [str(tmp_path / name) for name in ANNOTATIONS]
    command = [
        sys.executable,
        "-m",
        "kinoray",
        "pack",
        config.source,
        "--kinetics",
        "k400",
        "--annotations",
        *names,
    ]
    command += ["--out", config.out, "--workers", "1", "--max-bad-fraction", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as driver:
        try:
            wait_until(lambda: len(list(shards.glob("*.json"))) >= 2, 120, "two archives are committed")
        finally:
            os.killpg(driver.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert 2 <= len(before) < 5
    assert not (tmp_path / "out" / "catalog.parquet").exists()
    totals = pack(config)
    check(made, config, totals)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    there, here = (load_catalog(STORAGE, one.out).table.to_pylist() for one in (undisturbed, config))
    for line in there:
        line["uri"] = line["uri"].replace(undisturbed.out, config.out)
    assert here == there


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_limit_leaks_and_transcoding(tmp_path: Path) -> None:
    made = folder_set()
    made.write(tmp_path)
    plain = config_of(tmp_path, out=str(tmp_path / "plain"))
    originals = pack(plain)
    totals = pack(config_of(tmp_path, limit=2, out=str(tmp_path / "limited")))
    assert totals["splits"] == {"test": 2, "train": 2, "val": 2}
    assert totals["rows"] == {"beyond_limit": 20, "packed": 6, "leak": 2, "duplicate": 1}
    assert totals["classes"] == len(LABELS)
    kept = pack(config_of(tmp_path, leaks="keep", out=str(tmp_path / "kept")))
    assert kept["packed"] == originals["packed"] + 2
    assert kept["rows"]["duplicate"] == 2
    transcoded = config_of(tmp_path, transcode=True, out=str(tmp_path / "transcoded"))
    totals = pack(transcoded)
    check(made, transcoded, totals)
    again = replace(transcoded, out=str(tmp_path / "again"))
    pack(again)
    tables = [load_catalog(STORAGE, one.out).table for one in (plain, transcoded, again)]
    assert tables[1].column("sha256") == tables[2].column("sha256") != tables[0].column("sha256")
    for name in ("video_id", "num_frames", "duration_s"):
        assert tables[1].column(name) == tables[0].column(name)
    record = json.loads((tmp_path / "transcoded" / "pack.json").read_bytes())["transcode"]
    assert record["gop"] == 12
    assert record["short_side_px"] == 256
    with pytest.raises(ConfigError, match="transcode was None, is "):
        pack(replace(transcoded, out=plain.out))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_ordinary_pack_transcodes_too(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "source" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / "x" / f"{number}.webm").write_bytes(clip(number))
    (tmp_path / "source" / "x" / "bad.mp4").write_bytes(b"bad")
    config = PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "out"), max_bad_fraction=0.5)
    assert pack(replace(config, transcode=True))["packed"] == 3
    catalog = load_catalog(STORAGE, config.out)
    for data, line in zip(read_videos(STORAGE, references(catalog.table)), catalog.table.to_pylist(), strict=True):
        assert data == transcode(clip(int(line["video_id"].removeprefix("x__"))), config.decode).data
        assert re.search(r"shard-train-00000-[0-9a-f]{8}\.tar$", line["uri"])
    with tarfile.open(catalog.table["uri"][0].as_py()) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".mp4", ".json"}
    with pytest.raises(ConfigError, match=r"transcode was \w+, is None"):
        pack(config)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_cannot_be_called_a_success_fails(tmp_path: Path) -> None:
    made = small_set(1, 4)
    made.add("part_0.tar.gz", f"{key(9)}.mp4", b"broken", "unreadable", "UnreadableContainer")
    made.row("unreadable", 9)
    made.write(tmp_path)
    config = config_of(tmp_path, max_bad_fraction=0.1)
    with pytest.raises(TooManyBad, match=r"1 of 7 wanted files were quarantined \(1 UnreadableContainer\)"):
        pack(config)
    check(made, config, pack(replace(config, max_bad_fraction=0.2)))
    (tmp_path / "other.csv").write_text(f"path,label,split\n{key(5000)}.mp4,x,train\n")
    strangers = replace(config, annotations=(str(tmp_path / "other.csv"),), out=str(tmp_path / "strangers"))
    with pytest.raises(
        CatalogError, match=r"none of 7 files and members is a clip of the annotations; .*verdicts\.parquet"
    ):
        pack(strangers)
    with pytest.raises(ConfigError, match="holds another pack: annotations was"):
        pack(replace(config, annotations=(str(tmp_path / "other.csv"),)))
    commit = next(
        path
        for path in (tmp_path / "out" / "shards").glob("archive-*.json")
        if b"UnreadableContainer" in path.read_bytes()
    )
    content = json.loads(commit.read_bytes())
    content["files"].pop()
    commit.write_text(json.dumps(content))
    with pytest.raises(IncompleteOutput, match=r"has 4 verdicts for 5 files.*remove shards/archive-"):
        pack(replace(config, max_bad_fraction=0.2))


def test_verdicts_of_the_set_are_all_there_are() -> None:
    """No verdict goes untested, except where the limit test has it."""
    sets = [archived_set(), folder_set()]
    rows = {verdict for made in sets for verdict in made.row_verdicts().values()}
    files = {verdict for made in sets for _, _, verdict, _ in made.file_verdicts()}
    assert rows | {"beyond_limit"} == ROW_VERDICTS.keys()
    assert files | {"beyond_limit"} == FILE_VERDICTS.keys()


MEASURE = """
import sys
from kinoray.catalog.source import SourceFile
from kinoray.config.shared import DecodeConfig
from kinoray.catalog.kinetics import Wanted
from kinoray.pack.kinetics import ClipJudge
from kinoray.pack.plan import Unit
from kinoray.pack.unit import PackSettings, pack_unit
from kinoray.storage.objects import Storage
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024  # ru_maxrss: also the parent
archive, out = sys.argv[1:]
clips = {f"{n:011d}_000010_000020": Wanted(f"{n:011d}", "x", 0, "train", 10.0, 20.0) for n in range(300)}
unit = Unit("archive-00000", archive=SourceFile("large.tar", archive, 0))
idle = peak()
commit = pack_unit(Storage(), out, unit, PackSettings(DecodeConfig(), False, 2**26), judge_member=ClipJudge(clips))
print(len(commit.packed), commit.num_found, len(commit.tars), peak() - idle)
"""


@pytest.mark.slow
def test_packing_a_large_archive_takes_little_memory(tmp_path: Path) -> None:
    """300 members of 1 MiB; every second one is a video that is packed, the others are refused by the decoder."""
    good = clip(0)
    good += (2**20 - len(good)).to_bytes(4, "big") + b"free" + bytes(2**20 - len(good) - 8)
    bad = bytes(2**20)
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for number in range(300):
            header = tarfile.TarInfo(f"{number:011d}_000010_000020.mp4")
            header.size = 2**20
            tar.addfile(header, io.BytesIO(bad if number % 2 else good))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large.tar"), str(tmp_path / "out")]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    packed, found, shards, grown_mb = answer.stdout.split()
    assert (packed, found, shards) == ("150", "300", "3")
    assert float(grown_mb) < 100, grown_mb
