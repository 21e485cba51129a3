"""Videos that may have several classes, from a list to corrections; and six words at once on real video (GRID).

GRID is no part of the repository: what needs it skips where ../shared/data/grid_s1 is absent.
"""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from guide_blocks import ROOT, commands, run_blocks
from guide_world import small
from kinoray.catalog.source import find_files
from kinoray.catalog.table import catalog_of_source, load_catalog, save_catalog
from kinoray.cli import main
from kinoray.evaluation.metrics import average_precisions
from kinoray.label.ledger import read_predictions
from kinoray.network.checkpoint import list_checkpoints, load_meta
from kinoray.pack.plan import PlannedVideo, make_plan
from kinoray.storage.objects import Storage
from small_sets import COLOURS, colour_video

GRID = ROOT.parent / "shared" / "data" / "grid_s1"


def write_set(folder: Path, number: int) -> Path:
    """Colours that are seen, and whether a video is long; every seventh has neither and is listed with no class."""
    folder.mkdir()
    lines = ["path,labels"]
    for index in range(number):
        colour = sorted(COLOURS)[index % 3]
        is_long = index % 2 == 1
        names = [colour, "long"] if is_long else [colour]
        (folder / f"{index}.mp4").write_bytes(colour_video(colour, index, num_frames=10 if is_long else 5))
        lines.append(f"{index}.mp4,{'|'.join(names) if index % 7 else '|'}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


@pytest.mark.ray
def test_a_set_of_label_lists_is_trained_on(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The linear network on the mean colour finds the colours; the checkpoint knows what it was trained for."""
    monkeypatch.chdir(tmp_path)
    source = write_set(tmp_path / "videos", 30)
    lines = source.read_text().splitlines()
    split = [f"{line},{'val' if number % 3 == 0 else 'train'}" for number, line in enumerate(lines[1:])]
    source.write_text("\n".join([f"{lines[0]},split", *split]))
    catalog = catalog_of_source(Storage(), str(source))
    save_catalog(Storage(), "set.parquet", catalog)
    train = [
        "train",
        "set.parquet",
        "--out",
        "run",
        "--model.factory",
        "tiny_models:mean_colour",
        "--optim.epochs",
        "6",
    ]
    train += ["--optim.batch-size", "6", "--optim.lr", "0.2", "--workers", "1", "--resources.decode-tasks", "1"]
    train += ["--clip.view.resize-px", "32", "--clip.view.crop-px", "32", "--clip.sample.num-segments", "1"]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "val mAP" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_map"] > 0.6  # how long a video is, the network cannot see
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert "val_top5" not in rows[-1]
    found = list_checkpoints(Storage(), "run")
    best = max(found, key=lambda item: (item[1].metrics["val_map"], item[1].epoch))
    assert load_meta(Storage(), best[0]).scores == "sigmoid"
    assert f"val mAP {best[1].metrics['val_map']:.3f} of 10 videos" in said
    assert best[1].labels == catalog.labels == ("blue", "green", "long", "red")
    assert main([*train, "--optim.multilabel-loss", "focal"]) == 2
    assert 'optim.multilabel_loss is "bce" there, "focal" here' in capsys.readouterr().err
    assert main(["tune", "set.parquet", "--out", "sweep", "--space", "optim.lr=0.1,0.2"]) == 2
    assert "trials are compared by top-1, which says little of such" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_shows_the_way_from_a_list_to_corrections(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = run_blocks("docs/answers.md", "tests/test_multilabel.py")
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "videos", 30)
    (tmp_path / "library").symlink_to(tmp_path / "videos")
    for words in commands(block, "kinoray"):
        if words[1] == "correct":
            rows = read_predictions(Storage(), str(tmp_path / "labels" / "several")).to_pylist()
            with (tmp_path / "corrections.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["row_key", "label"])
                writer.writerows([row["row_key"], "red|long" if place % 2 else "|"] for place, row in enumerate(rows))
        assert main(small(words[1:])) == 0, words
    record = json.loads((tmp_path / "runs" / "several" / "eval" / "evaluation.json").read_text())
    predictions = next((tmp_path / "runs" / "several" / "eval").glob("*/job.json")).parent
    rows = read_predictions(Storage(), str(predictions)).to_pylist()
    known = dict(zip(*(_val(tmp_path)), strict=True))
    truth = np.array([[name in known[row["video_id"]] for name in record["labels"]] for row in rows])
    expected = average_precisions(np.array([row["scores"] for row in rows]), truth)
    assert [item["ap"] for item in record["classes"]] == pytest.approx(expected.tolist())
    calibration = json.loads((tmp_path / "runs" / "several" / "calibration" / "calibration.json").read_text())
    assert [item["threshold"] for item in record["classes"]] == calibration["thresholds"]
    corrected = load_catalog(Storage(), str(tmp_path / "sets" / "corrected" / "catalog.parquet"))
    assert Counter(corrected.class_names()) == {("long", "red"): 15, (): 15}


def _val(folder: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """Ids and classes of the videos that validate."""
    part = load_catalog(Storage(), str(folder / "sets" / "several")).select("val")
    return part.table["video_id"].to_pylist(), part.class_names()


@pytest.mark.skipif(not GRID.is_dir(), reason=f"{GRID} is not there")
def test_six_words_a_clip_are_shared_out_evenly(tmp_path: Path) -> None:
    """Every word of GRID has its share of clips to validate on, though each clip has six."""
    with (GRID / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("command", "colour", "preposition", "letter", "digit", "adverb")
    (tmp_path / "grid").symlink_to(GRID)  # names, and so the draw, are the same on every machine
    lines = [f"grid/{row['path']},{'|'.join(f'{word} {row[word]}' for word in words)}" for row in rows]
    (tmp_path / "grid.csv").write_text("\n".join(["path,labels", *lines]))
    source = str(tmp_path / "grid.csv")
    plan = make_plan(source, find_files(Storage(), source), shard_bytes=2**26, val_fraction=0.2)
    videos = [video for unit in plan.units for video in unit.files if isinstance(video, PlannedVideo)]
    assert len(videos) == len(rows) == 1000
    assert len(plan.labels) == 51
    counts = Counter((name, video.split) for video in videos for name in video.class_names)
    shares = [counts[name, "val"] / (counts[name, "val"] + counts[name, "train"]) for name in plan.labels]
    assert min(shares) > 0.18
    assert max(shares) < 0.3
    assert 200 <= sum(video.split == "val" for video in videos) <= 230
