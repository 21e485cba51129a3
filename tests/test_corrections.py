"""`kinoray correct` and what follows: corrections and confident answers become a catalog that pack and train take."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kinoray.catalog.table import Catalog, load_catalog, read_videos, references, save_catalog
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    SampleConfig,
    StorageConfig,
    ViewConfig,
)
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.unit import PREDICTION_SCHEMA
from kinoray.library.config import CorrectConfig
from kinoray.library.correct import correct
from kinoray.library.rows import defused
from kinoray.pack.config import PackConfig
from kinoray.pack.plan import PlannedVideo, plan_of_catalog
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from label_models import save_untrained
from small_sets import LABELS, catalog_of, colour_set, colour_video
from small_tables import job_record, label_library, ledger_in, library, planned, rows_for
from tiny_models import OWN_NETWORKS

CATALOG = library(20)
Row = dict[str, Any]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """v0000 .. v0019, every fifth from v0004 on quarantined."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, CATALOG)
    return ledger


def said(ledger: Ledger) -> dict[str, Row]:
    return {row["video_id"]: row for row in read_predictions(ledger.storage, ledger.root).to_pylist()}


def write_csv(ledger: Ledger, path: Path, changes: dict[str, str]) -> str:
    """What a report lets one download: corrections of these videos."""
    rows = said(ledger)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "row_key", "uri", "offset", "length", "predicted", "label"])
        for video_id, label in changes.items():
            row = rows[video_id]
            predicted = row["label_topk"][0] if row["label_topk"] else ""
            cells = [video_id, row["row_key"], row["uri"], row["offset"], row["length"], predicted, label]
            writer.writerow([defused(cell) if isinstance(cell, str) else cell for cell in cells])
    return str(path)


def rows_in(out: str | Path) -> dict[str, Row]:
    return {
        row["video_id"]: row for row in load_catalog(Storage(), join(str(out), "catalog.parquet")).table.to_pylist()
    }


def test_corrections_and_confident_answers_become_a_catalog(
    ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """v0000 is called blue, v0001 green, v0002 red, and so on; v0004 and every fifth cannot be read."""
    changes = {"v0000": "red", "v0001": "green", "v0002": "__bad__", "v0004": "red"}
    file = write_csv(ledger, tmp_path / "c.csv", changes)
    out = str(tmp_path / "set")
    config = CorrectConfig(predictions=ledger.root, corrections=(file,), accept_score=0.8, out=out)
    totals = correct(config)
    before, found = said(ledger), rows_in(out)
    confident = {
        video_id
        for video_id, row in before.items()
        if video_id not in changes and row["score_topk"] and row["score_topk"][0] >= np.float32(0.8)
    }
    assert 3 < len(confident) < 12
    assert set(found) == {"v0000", "v0001"} | confident
    assert (found["v0000"]["label"], found["v0001"]["label"]) == ("red", "green")
    assert found["v0000"]["reason"] == "corrected; the model said blue (0.500)"
    for video_id in confident:
        assert found[video_id]["label"] == before[video_id]["label_topk"][0]
        assert found[video_id]["reason"].startswith("labelled by the model with 0.")
    for video_id, row in found.items():
        assert row["uri"] == before[video_id]["uri"]
        assert row["label_id"] == LABELS.index(row["label"])
        assert (row["split"], row["status"]) == ("train", "listed")
    counts = {"corrected": 2, "changed": 1, "kept": 0, "accepted": len(confident), "bad": 1, "quarantined": 4}
    assert totals.items() >= counts.items()
    assert totals["unlabelled"] == 20 - 2 - len(confident) - 1 - 4
    assert load_catalog(Storage(), join(out, "catalog.parquet")).labels == LABELS
    record = json.loads((tmp_path / "set" / "corrections.json").read_text())
    assert record.items() >= counts.items()
    assert record["predictions"] == ledger.root
    text = capsys.readouterr().out
    assert "2 corrected (1 to another class than the model's)" in text
    assert "left out: 1 bad video, 4 that could not be read" in text
    assert correct(config)["catalog_digest"] == totals["catalog_digest"]


def test_what_the_labelled_catalog_knows_is_kept(ledger: Ledger, tmp_path: Path) -> None:
    known = CATALOG.table.to_pylist()
    for index, row in enumerate(known):
        row |= {"label": "blue", "label_id": 0, "split": f"s{index % 2}", "duration_s": index / 4, "status": "packed"}
        row["label"], row["label_id"] = (None, None) if index > 10 else ("blue", 0)
    save_catalog(Storage(), str(tmp_path / "known.parquet"), catalog_of(known))
    file = write_csv(ledger, tmp_path / "c.csv", {"v0000": "red", "v0012": "green"})
    config = CorrectConfig(
        predictions=ledger.root, corrections=(file,), catalog=str(tmp_path / "known.parquet"), out=str(tmp_path / "set")
    )
    totals = correct(config)
    found = rows_in(tmp_path / "set")
    assert {video_id: row["label"] for video_id, row in found.items()} == {
        **{f"v{index:04d}": "blue" for index in range(1, 11) if index % 5 != 4},
        "v0000": "red",
        "v0012": "green",
    }
    assert (totals["kept"], totals["corrected"]) == (8, 2)
    for video_id, row in found.items():
        index = int(video_id[1:])
        assert (row["split"], row["duration_s"], row["status"]) == (f"s{index % 2}", index / 4, "packed")
    other = str(tmp_path / "other.parquet")
    save_catalog(Storage(), other, library(3, uri="s3://elsewhere"))
    with pytest.raises(CatalogError, match=r"catalog: no row of .*other.parquet is an input of"):
        correct(replace(config, catalog=other))


def test_corrections_of_label_lists_become_label_lists(
    tmp_path: Path,
) -> None:
    """Of each video the model names two classes; a catalog has lists of some."""
    storage = Storage()
    ledger = Ledger(storage, join(str(tmp_path / "out"), "several"))
    ledger.pin_job(job_record(scores="sigmoid"))
    catalog = library(8)
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 8)
    ledger.commit(plan.units[0], rows_for(catalog, plan.units[0].keys), "run")
    names = {video_id: sorted(row["label_topk"] or ()) for video_id, row in said(ledger).items()}
    changes = {
        "v0000": "red| blue ",
        "v0001": "|",
        "v0002": '{"choices": ["green", "a new one"]}',
        "v0003": "__bad__",
        "v0005": "|".join(names["v0005"]),
        "v0007": "{odd}|red",
    }
    file = write_csv(ledger, tmp_path / "c.csv", changes)
    known = [{**row, "label_ids": [2]} for row in catalog.table.to_pylist() if row["video_id"] in ("v0005", "v0006")]
    save_catalog(storage, str(tmp_path / "known.parquet"), catalog_of(known))
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=(file,),
        catalog=str(tmp_path / "known.parquet"),
        new_classes=("a new one", "{odd}"),
        accept_score=0.0,
        out=str(tmp_path / "set"),
    )
    totals = correct(config)
    assert (totals["corrected"], totals["changed"], totals["kept"], totals["accepted"]) == (5, 4, 1, 0)
    assert (totals["bad"], totals["quarantined"]) == (1, 1)
    found = load_catalog(storage, str(tmp_path / "set" / "catalog.parquet"))
    assert found.is_multilabel
    assert dict(zip(found.table["video_id"].to_pylist(), found.class_names(), strict=True)) == {
        "v0000": ("blue", "red"),
        "v0001": (),
        "v0002": ("green", "a new one"),
        "v0005": tuple(names["v0005"]),
        "v0006": ("red",),
        "v0007": ("red", "{odd}"),
    }
    reasons = dict(zip(found.table["video_id"].to_pylist(), found.table["reason"].to_pylist(), strict=True))
    assert reasons["v0001"] == f"corrected; the model said {'|'.join(names['v0001'])}"
    file = write_csv(ledger, tmp_path / "odd.csv", {"v0000": "red|pink"})
    with pytest.raises(CatalogError, match=r"odd\.csv line 2, column label: there is no class 'red\|pink'"):
        correct(replace(config, corrections=(file,)))
    save_catalog(storage, str(tmp_path / "one.parquet"), catalog_of([{**known[0], "label_ids": None, "label": "red"}]))
    with pytest.raises(CatalogError, match=r"has one class a video, the predictions label lists"):
        correct(replace(config, catalog=str(tmp_path / "one.parquet")))


def test_an_answer_that_was_cut_off_is_not_accepted_as_a_label_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --top-k 2 of three classes: who names two of them may have been about to name the third."""
    storage, catalog = Storage(), library(8)
    for top_k, num_accepted in ((2, 3), (3, 7)):
        ledger = Ledger(storage, join(str(tmp_path / f"top{top_k}"), "several"))
        ledger.pin_job(job_record(scores="sigmoid", settings={"answer": {"top_k": top_k}}))
        plan = planned(ledger, catalog.digest, row_keys(catalog.table), 8)
        rows = rows_for(catalog, plan.units[0].keys).to_pylist()
        good = [row for row in rows if row["status"] == "labelled"]
        for row in good[:3]:
            row |= {name: row[name][:1] for name in ("label_topk", "id_topk", "score_topk")}
        ledger.commit(plan.units[0], pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), "run")
        config = CorrectConfig(predictions=ledger.root, accept_score=0.0, out=str(tmp_path / f"set{top_k}"))
        totals = correct(config)
        assert (totals["accepted"], totals["unlabelled"]) == (num_accepted, len(good) - num_accepted)
        assert ("names at most 2 classes a video (label --top-k)" in capsys.readouterr().err) == (top_k == 2)


def test_new_classes_come_last_and_videos_without_a_split_are_shared_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The videos are files without checksums, of four contents: copies are on one side."""
    storage, folder = Storage(), tmp_path / "videos"
    for index in range(20):
        storage.put(str(folder / f"v{index:04d}.mp4"), bytes([index % 4]) * 10)
    ledger = ledger_in(storage, tmp_path / "out")
    label_library(ledger, library(20, uri=str(folder)))
    file = write_csv(ledger, tmp_path / "c.csv", {"v0000": "a new one", "v0001": "red"})
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=(file,),
        accept_score=0.0,
        new_classes=("a new one",),
        val_fraction=0.5,
        out=str(tmp_path / "set"),
    )
    totals = correct(config)
    catalog = load_catalog(Storage(), str(tmp_path / "set" / "catalog.parquet"))
    assert catalog.labels == (*LABELS, "a new one")
    rows = rows_in(tmp_path / "set")
    assert rows["v0000"]["label_id"] == 3
    sides = {(int(video_id[1:]) % 4, row["split"]) for video_id, row in rows.items()}
    assert sorted(content for content, _ in sides) == [0, 1, 2, 3]
    (said,) = [
        line for line in capsys.readouterr().err.splitlines() if "to validate on, for 4 classes: each is" in line
    ]
    assert said.startswith(f"WARNING: {tmp_path / 'set'}: ")
    assert set(totals["splits"]) == {"train", "val"}
    assert sum(totals["splits"].values()) == 16


def test_the_same_correction_twice_counts_once(
    ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tuple(write_csv(ledger, tmp_path / f"{name}.csv", {"v0000": "red"}) for name in "ab")
    totals = correct(CorrectConfig(predictions=ledger.root, corrections=files, out=str(tmp_path / "set")))
    assert (totals["corrected"], totals["repeated"]) == (1, 1)
    assert "1 correction said twice" in capsys.readouterr().out


def test_the_csv_of_a_labelling_tool_and_defused_names_are_read(tmp_path: Path) -> None:
    """Other columns, another order, a byte order mark, and a quote sign before what looks like a formula."""
    labels = ("=sum", "'quoted", "red")
    ledger = Ledger(Storage(), str(tmp_path / "out"))
    ledger.pin_job(job_record(labels=labels))
    label_library(ledger, CATALOG)
    keys = {video_id: row["row_key"] for video_id, row in said(ledger).items()}
    lines = ["annotator,label,id,row_key", f"ann,'=sum,7,{keys['v0000']}", f"ann,'quoted,8,{keys['v0001']}"]
    (tmp_path / "c.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    config = CorrectConfig(predictions=ledger.root, corrections=(str(tmp_path / "c.csv"),), out=str(tmp_path / "set"))
    correct(config)
    found = rows_in(tmp_path / "set")
    assert {video_id: row["label"] for video_id, row in found.items()} == {"v0000": "=sum", "v0001": "'quoted"}


def test_corrections_survive_a_spreadsheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leading zeros go, dates change, semicolons come; the key is never a number, and says which row is meant."""
    names = ["000001", "000002", "000003", "000100"]
    rows = [{"video_id": name, "uri": f"/v/{name}.mp4", "label": None} for name in names]
    ledger = Ledger(Storage(), str(tmp_path / "out"))
    ledger.pin_job(job_record(labels=("007", "red", "caf\u00e9")))
    label_library(ledger, catalog_of(rows))
    keys = {video_id: row["row_key"] for video_id, row in said(ledger).items()}
    assert all(re.fullmatch("k[0-9a-f]{16}", key) for key in keys.values())
    ids = dict(zip(names, ["1", "2", "05.01.24", "1.00E+02"], strict=True))
    labels = dict(zip(names, ["7", "red", "cafe\u0301", "7.0"], strict=True))
    lines = [f"{keys[name].removeprefix('k')};{labels[name]};{ids[name]}" for name in names]
    (tmp_path / "c.csv").write_bytes("\r\n".join(["row_key;label;video_id", *lines]).encode("utf-16"))
    config = CorrectConfig(predictions=ledger.root, corrections=(str(tmp_path / "c.csv"),), out=str(tmp_path / "set"))
    totals = correct(config)
    found = {video_id: row["label"] for video_id, row in rows_in(tmp_path / "set").items()}
    assert found == dict(zip(names, ["007", "red", "caf\u00e9", "007"], strict=True))
    assert totals["respelled"] == 1
    assert "1 video_ids are not as the table has them; row_key said which" in capsys.readouterr().out
    lines[0] = lines[0].replace(";1", ";2")
    (tmp_path / "c.csv").write_text("\n".join(["row_key;label;video_id", *lines]), encoding="utf-8")
    with pytest.raises(CatalogError, match=r"line 2, column video_id: it says '2', but row_key [0-9a-f]+ is '000001'"):
        correct(config)


HEAD = "video_id,row_key,label\n"
LONG = {"ACCENTS": "\u0315\u0300\u0327" * 100_000, "DIGITS": "1" * 300_000 + "x"}  # what looks at them again and again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video_id,label\nv0000,red\n", r"c.csv line 1: there is no column row_key, found 'video_id,label'"),
        ("", r"c.csv line 1: there is no column row_key; expected .*, found ''"),
        (
            HEAD + "v0000,KEY0,red\nv0001,KEY1,pink\n",
            r"c.csv line 3, column label: there is no class 'pink'; there are",
        ),
        (HEAD + "v0000,KEY0,red\nv0001,KEY1,  \n", r"line 3, column label: it is empty; .* or delete the line"),
        (HEAD + f"v0000,KEY0,{'1' * 90}x\n", r"c.csv line 2, column label: there is no class '1{79}; there are"),
        (HEAD + "v0000,KEY0,ACCENTS\n", r"line 2, column label: the class '.*' ... has 300,000 characters, at most"),
        (HEAD + "DIGITS,KEY0,red\nv0000,KEY1,red\n", r"line 3, column video_id: it says 'v0000', but row_key \w+ is"),
        (HEAD + "v0000,,red\n", r"c.csv line 2, column row_key: it is empty"),
        (HEAD + "v0000,0123456789abcdef,red\n", r"line 2, column row_key: '0123456789abcdef' is no row of .*\(1 of 1"),
        (HEAD + "v0000,KEY0,red\nv0000,KEY0,blue\n", r"line 3, column label: video v0000 is 'blue' here and 'red' in "),
        (HEAD + "v0001,KEY0,red\n", r"line 2, column video_id: it says 'v0001', but row_key \w+ is 'v0000'"),
        (HEAD + "v0000,KEY0\n", r"c.csv line 2: 2 cells are fewer than the 3 columns"),
        (HEAD + "v0000,KEY0,red,more\n", r"c.csv line 2: 4 cells are more than the 3 columns"),
        (HEAD + 'v0000,KEY0,"red\n', r"c.csv line 2, cell 3: a quote is not closed in its line"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_by_line_and_column_and_nothing_is_written(
    ledger: Ledger, tmp_path: Path, text: str, message: str
) -> None:
    rows = said(ledger)
    for number in (0, 1):
        text = text.replace(f"KEY{number}", rows[f"v000{number}"]["row_key"])
    for word, long in LONG.items():
        text = text.replace(word, long)
    path = tmp_path / "c.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogError, match=message):
        correct(CorrectConfig(predictions=ledger.root, corrections=(str(path),), out=str(tmp_path / "set")))
    assert not (tmp_path / "set").exists()


def test_a_file_that_is_no_text_and_settings_that_ask_for_nothing_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"row_key,label\n\xff\xfe,red\n")
    config = CorrectConfig(predictions=ledger.root, corrections=(str(tmp_path / "c.csv"),), out=str(tmp_path / "set"))
    with pytest.raises(CatalogError, match=r"c.csv line 2 is not UTF-8 text"):
        correct(config)
    with pytest.raises(ConfigError, match="corrections must be one or more files, or --accept-score be given"):
        CorrectConfig(predictions="x", out="y")
    with pytest.raises(CatalogError, match=r"no video of .* has a label now"):
        correct(CorrectConfig(predictions=ledger.root, accept_score=1.0, out=str(tmp_path / "set")))
    with pytest.raises(CatalogError, match="a class is called __bad__"):
        correct(replace(config, new_classes=("__bad__",)))


# Packing a catalog


def test_the_plan_of_a_catalog_keeps_classes_splits_and_places() -> None:
    rows: list[dict[str, object]] = [
        {"video_id": "a.b/c", "uri": "s3://b/x.MOV", "label": "red", "label_id": 2, "size_bytes": 5, "sha256": "f"},
        {"video_id": "d", "uri": "s3://b/s.tar", "offset": 512, "length": 7, "label": "blue", "label_id": 0},
        {"video_id": "e", "uri": "s3://b/s.tar", "offset": 0, "length": 7, "split": "test"},
    ]
    plan = plan_of_catalog("set", catalog_of(rows), shard_bytes=100, val_fraction=0.0)
    assert plan.labels == LABELS
    assert {unit.name for unit in plan.units} == {"shard-test-00000", "shard-train-00000"}
    videos = {video.video_id: video for unit in plan.units for video in unit.files if isinstance(video, PlannedVideo)}
    assert set(videos) == {"a_b__c", "d", "e"}
    first, second = videos["a_b__c"], videos["d"]
    assert (first.label_id, first.split, first.size_bytes, first.name) == (2, "train", 5, "a_b__c.mov")
    assert (first.reference.uri, first.reference.offset, first.reference.sha256) == ("s3://b/x.MOV", None, "f")
    assert (second.reference.offset, second.reference.length, second.size_bytes) == (512, 7, 7)
    assert videos["e"].label is None
    rows[2]["split"] = "train"
    with pytest.raises(CatalogError, match=r"set: 1 of the 3 videos of split 'train' have no class, e is one"):
        plan_of_catalog("set", catalog_of(rows), shard_bytes=100, val_fraction=0.0)
    with pytest.raises(CatalogError, match="set: the catalog is empty"):
        plan_of_catalog("set", catalog_of([]), shard_bytes=100, val_fraction=0.0)


@pytest.mark.ray
def test_whole_videos_of_unknown_size_are_spread_over_shards_and_one_that_is_gone_is_refused(
    ray_local: None, tmp_path: Path
) -> None:
    from kinoray.pack.verb import pack

    storage, source = Storage(), tmp_path / "videos"
    rows: list[dict[str, object]] = []
    for index in range(5):
        data = colour_video("red", index) + bytes(600_000)  # what follows the last box of an MP4 is ignored
        storage.put(str(source / f"v{index}.mp4"), data)
        rows.append({"video_id": f"v{index}", "uri": str(source / f"v{index}.mp4"), "label": "red", "label_id": 2})
    (source / "v3.mp4").unlink()
    save_catalog(storage, str(tmp_path / "set" / "catalog.parquet"), catalog_of(rows))
    config = PackConfig(
        source=str(tmp_path / "set" / "catalog.parquet"), out=str(tmp_path / "packed"), shard_mb=1, max_bad_fraction=0.5
    )
    totals = pack(replace(config, resources=ResourcesConfig(num_workers=1)))
    assert (totals["packed"], totals["quarantined"], totals["reasons"]) == (4, 1, {"ObjectNotFound": 1})
    assert totals["shards"] == 3
    catalog = load_catalog(storage, str(tmp_path / "packed"))
    assert sorted(catalog.table["video_id"].to_pylist()) == ["v0", "v1", "v2", "v4"]


CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))


@pytest.mark.ray
def test_label_then_correct_then_pack_gives_the_labels_and_the_bytes(ray_local: None, tmp_path: Path) -> None:
    """Real videos in shards: labelled, corrected, and packed into shards of their own; one of them is broken."""
    from kinoray.label.verb import label
    from kinoray.pack.verb import pack

    storage = Storage(StorageConfig())
    source = str(tmp_path / "library")
    original = colour_set(storage, source, train=9, val=3, broken=(5,))
    checkpoint = save_untrained(storage, str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    resources = ResourcesConfig(num_workers=1)
    totals = label(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=source,
            checkpoint=checkpoint,
            out=str(tmp_path / "out"),
            resources=resources,
        )
    )
    ledger = Ledger(storage, totals["root"])
    truth = dict(zip(original.table["video_id"].to_pylist(), original.table["label"].to_pylist(), strict=True))
    changes = {video_id: label for video_id, label in truth.items() if video_id != "v000"} | {"v001": "__bad__"}
    file = write_csv(ledger, tmp_path / "c.csv", changes)
    done = correct(
        CorrectConfig(predictions=ledger.root, corrections=(file,), out=str(tmp_path / "second"), val_fraction=0.3)
    )
    assert (done["corrected"], done["bad"], done["quarantined"], done["unlabelled"]) == (9, 1, 1, 1)

    packed = pack(
        PackConfig(
            source=str(tmp_path / "second" / "catalog.parquet"), out=str(tmp_path / "packed"), resources=resources
        )
    )
    catalog = load_catalog(storage, str(tmp_path / "packed"))
    assert (packed["packed"], packed["quarantined"], catalog.labels) == (9, 0, LABELS)
    expected = {video_id: label for video_id, label in changes.items() if video_id not in ("v001", "v005")}
    rows = catalog.table.to_pylist()
    assert {row["video_id"]: row["label"] for row in rows} == expected
    assert all(row["sha256"] and str(tmp_path / "packed") in row["uri"] for row in rows)
    assert bytes_of(storage, catalog) == {name: bytes_of(storage, original)[name] for name in expected}
    again = pack(
        PackConfig(
            source=str(tmp_path / "second" / "catalog.parquet"), out=str(tmp_path / "packed"), resources=resources
        )
    )
    assert again == packed


@pytest.mark.slow
def test_a_network_is_trained_on_from_the_corrected_catalog(ray_local: None, tmp_path: Path) -> None:
    """In place, without a pack: an untrained network, corrected everywhere, learns the colours."""
    from kinoray.label.verb import label
    from kinoray.train.verb import train

    storage = Storage()
    source = str(tmp_path / "library")
    original = colour_set(storage, source, train=24, val=12)
    checkpoint = save_untrained(storage, str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    resources = ResourcesConfig(num_workers=1, decoders_per_worker=1)
    totals = label(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=source,
            checkpoint=checkpoint,
            out=str(tmp_path / "out"),
            resources=resources,
        )
    )
    truth = dict(zip(original.table["video_id"].to_pylist(), original.table["label"].to_pylist(), strict=True))
    file = write_csv(Ledger(storage, totals["root"]), tmp_path / "c.csv", truth)
    second = str(tmp_path / "second")
    done = correct(CorrectConfig(predictions=totals["root"], corrections=(file,), catalog=source, out=second))
    assert (done["corrected"], done["splits"]) == (36, {"train": 24, "val": 12})
    best = train(
        TrainConfig(
            catalog=join(second, "catalog.parquet"),
            out=str(tmp_path / "trained"),
            init_from=checkpoint,
            model=ModelConfig(factory="tiny_models:mean_colour"),
            clip=CLIP,
            optim=OptimConfig(epochs=8, batch_size=8, lr=0.05),
            resources=resources,
        )
    )
    assert best["val_top1"] > 0.9


def bytes_of(storage: Storage, catalog: Catalog) -> dict[str, bytes]:
    found = {}
    for video_id, data in zip(
        catalog.table["video_id"].to_pylist(), read_videos(storage, references(catalog.table)), strict=True
    ):
        assert isinstance(data, bytes)
        found[video_id] = data
    return found


def test_corrections_on_s3(bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    ledger = ledger_in(storage, join(bucket, "out"))
    label_library(ledger, CATALOG)
    key = row_keys(CATALOG.table)[3]
    storage.put(join(bucket, "c.csv"), f"row_key,label\n{key},red\n".encode())
    config = CorrectConfig(
        predictions=join(bucket, "out"),
        corrections=(join(bucket, "c.csv"),),
        out=join(bucket, "set"),
        storage=s3_config,
    )
    assert correct(config)["videos"] == 1
    assert load_catalog(storage, join(bucket, "set", "catalog.parquet")).table["video_id"].to_pylist() == ["v0003"]


def test_row_keys_of_the_new_catalog_are_its_own(ledger: Ledger, tmp_path: Path) -> None:
    """Without --catalog, sizes are not known: the corrected catalog is labelled as new inputs, never mixed up."""
    correct(CorrectConfig(predictions=ledger.root, accept_score=0.0, out=str(tmp_path / "set")))
    catalog = load_catalog(Storage(), str(tmp_path / "set" / "catalog.parquet"))
    assert catalog.table.schema.field("label").type == pa.string()
    assert not set(row_keys(catalog.table)) & set(row_keys(CATALOG.table))
