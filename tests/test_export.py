"""`kinoray export`: nothing is lost on the way, and the tools themselves take in what is written.

The tools are large and are no dependency of kinoray. The tests that are marked slow run their importers in an
interpreter of its own: the one that KINORAY_EXPORT_PYTHON names, else this one; a tool that it cannot import is a skip
with that reason. Such an interpreter: python -m venv tools && tools/bin/pip install fiftyone label-studio-sdk datumaro
"""

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinoray.catalog.rows import Refusal
from kinoray.catalog.table import load_catalog, save_catalog
from kinoray.config.shared import DecodeConfig, StorageConfig
from kinoray.errors import ConfigError
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.library.config import CorrectConfig, ExportConfig
from kinoray.library.correct import correct
from kinoray.library.export import Source, copied_videos, export
from kinoray.storage.objects import Storage, join
from small_sets import LABELS, catalog_of, colour_video
from small_tables import job_record, label_library, ledger_in, library, planned, rows_for

CATALOG = library(20)
VIDEO = colour_video("blue", 0)
GOOD = [f"v{index:04d}" for index in range(20) if index % 5 != 4]
Row = dict[str, Any]


@pytest.fixture
def out(tmp_path: Path) -> str:
    """A finished table of 20 videos, of which 4 are quarantined."""
    label_library(ledger_in(Storage(), tmp_path / "out"), CATALOG)
    return str(tmp_path / "out")


@pytest.fixture
def files(tmp_path: Path) -> str:
    """The same, of videos in a shard and in files of their own; v0002 has been removed since it was labelled."""
    videos = tmp_path / "videos"
    videos.mkdir()
    rows: list[dict[str, object]] = []
    shard = b""
    for index in range(10):
        name = f"v{index:04d}"
        data = VIDEO + name.encode()
        if index % 2:
            rows.append({"video_id": name, "uri": str(videos / "s.tar"), "offset": len(shard), "length": len(data)})
            shard += data
        else:
            (videos / f"{name}.mkv").write_bytes(data)
            rows.append({"video_id": name, "uri": str(videos / f"{name}.mkv")})
    (videos / "s.tar").write_bytes(shard)
    label_library(ledger_in(Storage(), tmp_path / "out"), catalog_of(rows))
    save_catalog(Storage(), videos_of(str(tmp_path / "out")), catalog_of(rows))
    (videos / "v0002.mkv").unlink()
    return str(tmp_path / "out")


def videos_of(out: str) -> str:
    """The catalog of `files`."""
    return str(Path(out).parent / "videos.parquet")


def aside(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "quarantined.jsonl").read_text().splitlines()]


def said(out: str) -> dict[str, Row]:
    return {row["video_id"]: row for row in read_predictions(Storage(), out).to_pylist()}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "label-studio", "fiftyone", "datumaro"])
def test_entries_and_quarantined_rows_are_all_rows(
    out: str, tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "handover"
    totals = export(ExportConfig(predictions=out, format=kind, to=str(folder)))
    assert totals == {
        "rows": 20,
        "exported": 16,
        "quarantined": 4,
        "not_copied": 0,
        "unfinished": 0,
        "to": str(folder),
    }
    refused = aside(folder)
    assert [row["video_id"] for row in refused] == ["v0004", "v0009", "v0014", "v0019"]
    assert refused[0]["error_text"] == "no bytes in 4"
    assert entries(folder, kind) == ([f"v{index:04d}" for index in range(20)] if kind in ("csv", "jsonl") else GOOD)
    said = capsys.readouterr().out
    if kind in ("csv", "jsonl"):
        assert f"20 rows in {folder}/labels.{kind} = 16 labelled + 4 quarantined or skipped; the latter are in" in said
    else:
        assert f"20 rows = 16 in {folder} for {kind} + 4 quarantined or skipped; the others are in" in said


def entries(folder: Path, kind: str) -> list[str]:
    """Ids of the videos that the files name."""
    if kind == "csv":
        with (folder / "labels.csv").open(newline="") as file:
            return [row["video_id"] for row in csv.DictReader(file)]
    if kind == "jsonl":
        return [json.loads(line)["video_id"] for line in (folder / "labels.jsonl").read_text().splitlines()]
    if kind == "label-studio":
        return [task["data"]["video_id"] for task in json.loads((folder / "tasks.json").read_text())]
    if kind == "fiftyone":
        return [sample["video_id"] for sample in json.loads((folder / "samples.json").read_text())["samples"]]
    items = json.loads((folder / "annotations" / "default.json").read_text())["items"]
    return [item["id"] for item in items]


def test_what_label_studio_gets(out: str, tmp_path: Path) -> None:
    export(ExportConfig(predictions=out, format="label-studio", to=str(tmp_path / "handover")))
    tasks = json.loads((tmp_path / "handover" / "tasks.json").read_text())
    row = said(out)["v0001"]
    task = tasks[1]
    assert task["data"] == {
        "video": "s3://library/v0001.mp4",
        "video_id": "v0001",
        "row_key": row["row_key"],
        "uri": "s3://library/v0001.mp4",
        "predicted": "green",
    }
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("m", 0.87)
    (result,) = prediction["result"]
    config = ET.parse(tmp_path / "handover" / "labeling-config.xml").getroot()
    choices = config.find("Choices")
    assert choices is not None
    assert (result["from_name"], result["to_name"]) == (choices.get("name"), choices.get("toName"))
    assert [choice.get("value") for choice in choices] == [*LABELS, "__bad__"]
    assert result["value"] == {"choices": ["green"]}


def test_names_of_classes_stay_data(tmp_path: Path) -> None:
    names = ('"/><x a="', "a\nb\u202e\uffff", "<!--", "&amp;")
    ledger = Ledger(Storage(), str(tmp_path / "out"))
    ledger.pin_job(job_record(labels=(*names, *LABELS)))
    label_library(ledger, CATALOG)
    for kind in ("label-studio", "fiftyone", "datumaro"):
        export(ExportConfig(predictions=ledger.root, format=kind, to=str(tmp_path / kind)))
    choices = ET.parse(tmp_path / "label-studio" / "labeling-config.xml").getroot().find("Choices")
    assert choices is not None
    assert [choice.get("value") for choice in choices][:4] == ['"/><x a="', "a\\u000ab\\u202e\\uffff", "<!--", "&amp;"]
    assert json.loads((tmp_path / "fiftyone" / "metadata.json").read_text())["default_classes"][:4] == list(names)


def test_any_number_of_classes_is_handed_over(tmp_path: Path) -> None:
    """Of a network with a yes or no for each class: two classes for some videos, none for the others."""
    ledger = Ledger(Storage(), str(tmp_path / "out"))
    ledger.pin_job(job_record(scores="sigmoid"))
    catalog = library(4)
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 2)
    ledger.commit(plan.units[0], rows_for(catalog, plan.units[0].keys), "run")
    none: Row = {"label_topk": [], "id_topk": [], "score_topk": [], "abstained": True}
    ledger.commit(plan.units[1], rows_for(catalog, plan.units[1].keys, **none), "run")
    for kind in ("label-studio", "fiftyone", "datumaro"):
        totals = export(ExportConfig(predictions=ledger.root, format=kind, to=str(tmp_path / kind)))
        assert (totals["exported"], totals["quarantined"]) == (4, 0)
    tasks = json.loads((tmp_path / "label-studio" / "tasks.json").read_text())
    assert tasks[0]["predictions"][0]["result"][0]["value"] == {"choices": ["blue", "green"]}
    assert [len(task["predictions"]) for task in tasks] == [1, 1, 0, 0]
    assert 'choice="multiple"' in (tmp_path / "label-studio" / "labeling-config.xml").read_text()
    samples = json.loads((tmp_path / "fiftyone" / "samples.json").read_text())["samples"]
    said = [[one["label"] for one in sample["prediction"]["classifications"]] for sample in samples]
    assert said == [["blue", "green"], ["green", "red"], [], []]
    items = json.loads((tmp_path / "datumaro" / "annotations" / "default.json").read_text())["items"]
    assert [[one["label_id"] for one in item["annotations"]] for item in items] == [[0, 1], [1, 2], [], []]
    totals = correct(CorrectConfig(predictions=ledger.root, accept_score=0.0, out=str(tmp_path / "set")))
    assert (totals["accepted"], totals["unlabelled"]) == (2, 2)
    catalog = load_catalog(Storage(), str(tmp_path / "set" / "catalog.parquet"))
    assert catalog.class_names() == [("blue", "green"), ("green", "red")]


def test_what_label_studio_exports_comes_back_as_corrections(out: str, tmp_path: Path) -> None:
    """Its CSV has a column for each field of the data and one for the choice."""
    export(ExportConfig(predictions=out, format="label-studio", to=str(tmp_path / "handover")))
    task = json.loads((tmp_path / "handover" / "tasks.json").read_text())[0]
    columns = [*task["data"], "id", "label", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"]
    with (tmp_path / "export.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerow({**task["data"], "id": 1, "label": "red", "annotator": 1, "annotation_id": 1})
    config = CorrectConfig(predictions=out, corrections=(str(tmp_path / "export.csv"),), out=str(tmp_path / "set"))
    assert correct(config).items() >= {"videos": 1, "corrected": 1, "changed": 1}.items()


# Videos


def test_videos_are_copied_out_of_shards_and_one_that_is_gone_is_counted(files: str, tmp_path: Path) -> None:
    folder = tmp_path / "handover"
    config = ExportConfig(predictions=files, format="fiftyone", to=str(folder), copy_videos=videos_of(files))
    totals = export(config)
    assert (totals["rows"], totals["exported"], totals["quarantined"], totals["not_copied"]) == (10, 7, 2, 1)
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    for sample in samples:
        path = folder / sample["filepath"]
        assert path.read_bytes() == VIDEO + sample["video_id"].encode()
        assert path.suffix == (".mp4" if int(sample["video_id"][1:]) % 2 else ".mkv")  # sniffed, or as it was
    assert len(list((folder / "data").iterdir())) == 7
    gone = [row for row in aside(folder) if row["status"] == "labelled"]
    assert [(row["video_id"], row["error_class"]) for row in gone] == [("v0002", "ObjectNotFound")]
    assert export(config) == totals


def test_only_videos_of_the_named_source_are_copied(tmp_path: Path) -> None:
    """A stranger's table may name any file of its reader; none but those of the source gets into the hand-over."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "a.mp4").write_bytes(VIDEO)
    (library / "notes.txt").write_bytes(b"private")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.mp4").write_bytes(VIDEO)
    (library / "link.mp4").symlink_to(tmp_path / "secret" / "key.mp4")
    (library / "folder").symlink_to(tmp_path / "secret")
    (library / "not\udcff.mp4").symlink_to(tmp_path / "secret" / "key.mp4")
    (library / "kernel.mp4").symlink_to("/proc/self/environ")
    leads_out = ["link.mp4", "folder/key.mp4", "kernel.mp4"]
    hostile = [
        *(f"{library}/{name}" for name in leads_out),
        f"file://{library}/not%FF.mp4",
        str(tmp_path / "secret"),
        f"{library}/../secret",
        f"file://{tmp_path}/secret",
        "/etc/passwd",
        str(library / "notes.txt"),
    ]
    rows: list[dict[str, object]] = [
        {"video_id": "v0000", "uri": str(library / "a.mp4")},
        {"video_id": "v0001", "uri": str(library / "a.mp4"), "offset": 0, "length": 1},
        *({"video_id": f"v{index:04d}", "uri": uri} for index, uri in enumerate(hostile, 2)),
    ]
    label_library(ledger_in(Storage(), tmp_path / "out"), catalog_of(rows))
    to = tmp_path / "to"
    config = ExportConfig(
        predictions=str(tmp_path / "out"), format="label-studio", to=str(to), copy_videos=str(library)
    )
    totals = export(config)
    good = {row["video_id"] for row in said(str(tmp_path / "out")).values() if row["status"] == "labelled"}
    assert totals["exported"] == 1
    assert totals["not_copied"] == len(good) - 1 >= 4
    assert [path.name.split("-")[0] for path in (to / "videos").iterdir()] == ["v0000"]
    refused = [row for row in aside(to) if row["status"] == "labelled"]
    assert {row["error_class"] for row in refused} == {"InvalidReference"}
    texts = {row["uri"]: row["error_text"] for row in refused}
    for uri in hostile[:4]:
        assert uri not in texts or f"is a link that leads out of {library} (copy_videos)" in texts.pop(uri)
    assert len(texts) < len(refused)
    assert all(f"is no video of {library} (copy_videos), so it was not copied" in text for text in texts.values())


def test_what_is_no_video_is_not_copied(tmp_path: Path) -> None:
    """Not by a list, nor by a hard link: whatever it is called, it has to open as a video."""
    (tmp_path / "secret").write_bytes(b"-----BEGIN PRIVATE KEY-----")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.mp4").write_bytes(VIDEO)
    os.link(tmp_path / "secret", tmp_path / "library" / "b.mp4")
    (tmp_path / "list.csv").write_text(f"path\nlibrary/a.mp4\n{tmp_path}/secret\n")
    for source, other in ((tmp_path / "library", "library/b.mp4"), (tmp_path / "list.csv", "secret")):
        rows = [
            {"video_id": name, "row_key": "0", "uri": str(tmp_path / name), "offset": None, "length": None}
            for name in ("library/a.mp4", other)
        ]
        copied = list(copied_videos(Storage(), rows, tmp_path / "to", Source(Storage(), str(source)), DecodeConfig()))
        assert isinstance(copied[0], Path)
        assert isinstance(copied[1], Refusal)
        assert copied[1].error_class == "UnreadableContainer"
    assert [path.read_bytes() for path in (tmp_path / "to").iterdir()] == [VIDEO]


def test_videos_in_shards_need_to_be_copied(files: str, tmp_path: Path) -> None:
    for kind in ("fiftyone", "label-studio", "datumaro"):
        with pytest.raises(ConfigError, match=r"copy_videos: v0001 lies inside .*s.tar .* give --copy-videos"):
            export(ExportConfig(predictions=files, format=kind, to=str(tmp_path / kind)))
    assert export(ExportConfig(predictions=files, format="csv", to=str(tmp_path / "csv")))["rows"] == 10


def test_hostile_names_make_no_path(tmp_path: Path) -> None:
    """The copy of a video lies in the folder, whatever the video is called, and no two are the same."""
    names = ["../../v1", "/etc/v2", "a/../v3", "v4\0", ".v5", "v6" * 99, "v7\u202egpj", "v8 a", "v8.a", "", "-rf"]
    (tmp_path / "video.mp4").write_bytes(VIDEO)
    place = {"uri": str(tmp_path / "video.mp4"), "offset": None, "length": None}
    rows = [{**place, "video_id": name, "row_key": f"{index:016x}"} for index, name in enumerate(names)]
    paths = list(copied_videos(Storage(), rows, tmp_path / "copies", Source(Storage(), str(tmp_path)), DecodeConfig()))
    assert len(set(paths)) == len(names)
    for path in paths:
        assert isinstance(path, Path)
        assert path.parent == tmp_path / "copies"
        assert len(path.name) < 150
        assert path.read_bytes() == VIDEO
    assert sorted(tmp_path.rglob("*.*")) == sorted([tmp_path / "video.mp4", *(Path(str(path)) for path in paths)])


def test_an_unfinished_table_and_a_wrong_folder_are_said(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    planned(ledger, "more", row_keys(library(30).table), 8)
    totals = export(ExportConfig(predictions=out, format="csv", to=str(tmp_path / "csv")))
    assert totals["unfinished"] == 10
    assert "10 videos not labelled yet" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="to must be a folder on this machine, got s3://b/x"):
        export(ExportConfig(predictions=out, format="csv", to="s3://b/x"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"^to .*file is a file: "):
        export(ExportConfig(predictions=out, format="csv", to=str(tmp_path / "file")))


def test_from_s3(bucket: str, s3_config: StorageConfig, tmp_path: Path) -> None:
    storage = Storage(s3_config)
    names = [f"v{index:04d}" for index in range(3)]
    for name in names:
        storage.put(join(bucket, f"{name}.mp4"), VIDEO + name.encode())
    catalog = catalog_of([{"video_id": name, "uri": join(bucket, f"{name}.mp4")} for name in names])
    label_library(ledger_in(storage, join(bucket, "out")), catalog)
    config = ExportConfig(
        predictions=join(bucket, "out"), format="label-studio", to=str(tmp_path / "to"), storage=s3_config
    )
    export(replace(config, copy_videos=bucket))
    copies = sorted(path.read_bytes() for path in (tmp_path / "to" / "videos").iterdir())
    assert copies == [VIDEO + name.encode() for name in names]
    export(config)
    tasks = json.loads((tmp_path / "to" / "tasks.json").read_text())
    assert [task["data"]["video"] for task in tasks] == [join(bucket, f"{name}.mp4") for name in names]


# The tools themselves


def by_tool(module: str, code: str, *arguments: str) -> Any:
    """What the code prints last, as JSON, in an interpreter that has the tool."""
    python = os.environ.get("KINORAY_EXPORT_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["?"])[-1]
        pytest.skip(f"{python} cannot import {module} ({last}); KINORAY_EXPORT_PYTHON names one that can")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


FIFTYONE = """
import json, sys
import fiftyone as fo
dataset = fo.Dataset.from_dir(sys.argv[1], dataset_type=fo.types.FiftyOneDataset, name="kinoray-test", overwrite=True)
rows = [[s.video_id, s.filepath, s.prediction.label, s.prediction.confidence, s.row_key] for s in dataset]
counts = dataset.count_values("prediction.label")
about = [dataset.media_type, dataset.default_classes, type(dataset.first().prediction).__name__]
dataset.delete()
print(json.dumps([about, counts, rows]))
"""


@pytest.mark.slow
def test_fiftyone_loads_the_dataset(files: str, tmp_path: Path) -> None:
    folder = tmp_path / "handover"
    export(ExportConfig(predictions=files, format="fiftyone", to=str(folder), copy_videos=videos_of(files)))
    about, counts, rows = by_tool("fiftyone", FIFTYONE, str(folder))
    assert about == ["video", list(LABELS), "Classification"]
    truth = said(files)
    assert len(rows) == 7 == sum(counts.values())
    for video_id, filepath, label, confidence, row_key in rows:
        assert Path(filepath).read_bytes().endswith(video_id.encode())
        assert label == truth[video_id]["label_topk"][0]
        assert confidence == pytest.approx(truth[video_id]["score_topk"][0], abs=1e-6)  # printed as a short decimal
        assert row_key == truth[video_id]["row_key"]


LABEL_STUDIO = """
import json, sys
from label_studio_sdk.label_interface import LabelInterface
folder = sys.argv[1]
interface = LabelInterface(open(folder + "/labeling-config.xml").read())
interface.validate()
tasks = json.load(open(folder + "/tasks.json"))
errors = [error for task in tasks for p in task["predictions"] for error in interface.validate_prediction(p, True)]
wrong = dict(tasks[0]["predictions"][0], result=[dict(tasks[0]["predictions"][0]["result"][0])])
wrong["result"][0]["value"] = {"choices": ["no such class"]}
control, thing = interface.get_control("label"), interface.get_object("video")
print(json.dumps([len(tasks), errors, bool(interface.validate_prediction(wrong, True)), control.tag, thing.tag,
                  list(control.labels), all("video" in task["data"] for task in tasks)]))
"""


@pytest.mark.slow
def test_label_studios_own_schema_takes_the_tasks(out: str, tmp_path: Path) -> None:
    export(ExportConfig(predictions=out, format="label-studio", to=str(tmp_path / "to")))
    found = by_tool("label_studio_sdk", LABEL_STUDIO, str(tmp_path / "to"))
    assert found == [16, [], True, "Choices", "Video", [*LABELS, "__bad__"], True]


DATUMARO = """
import json, sys
from datumaro import Dataset
from datumaro.components.media import Video
dataset = Dataset.import_from(sys.argv[1], "datumaro")
names = [label.name for label in dataset.categories()[list(dataset.categories())[0]].items]
rows = [[item.id, item.media.path, names[item.annotations[0].label], item.annotations[0].attributes["score"]]
        for item in dataset]
print(json.dumps([dataset.media_type() is Video, names, rows]))
"""


@pytest.mark.slow
def test_datumaro_imports_the_videos(files: str, tmp_path: Path) -> None:
    export(ExportConfig(predictions=files, format="datumaro", to=str(tmp_path / "to"), copy_videos=videos_of(files)))
    is_video, names, rows = by_tool("datumaro", DATUMARO, str(tmp_path / "to"))
    assert is_video
    assert names == list(LABELS)
    truth = said(files)
    assert len(rows) == 7
    for video_id, path, label, score in rows:
        assert Path(path).read_bytes().endswith(video_id.encode())
        assert label == truth[video_id]["label_topk"][0]
        assert score == pytest.approx(truth[video_id]["score_topk"][0], abs=1e-6)
