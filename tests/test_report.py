"""The report's site: its numbers against plain loops, its frames against the videos, its files against the table."""

import base64
import dataclasses
import json
import os
import re
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from kinoray.catalog.table import Catalog, Reference
from kinoray.config.shared import ClipConfig, DecodeConfig, ModelConfig, StorageConfig
from kinoray.console import visible
from kinoray.demo.videos import make_clip, make_video
from kinoray.errors import CatalogError, ConfigError, ObjectNotFound
from kinoray.evaluation.metrics import wilson_interval
from kinoray.label.ledger import Ledger
from kinoray.library.config import ReportConfig
from kinoray.library.numbers import choose, count, count_codecs, count_durations, join_truth
from kinoray.library.report import HISTOGRAM_HEIGHT, histogram_bars, report
from kinoray.library.site import ROWS_PER_FILE, STRIPS_PER_FILE, id_ranks
from kinoray.network.checkpoint import CheckpointMeta, Origin, save_checkpoint
from kinoray.storage.objects import Storage
from kinoray.video.strips import MAX_FRAME_BYTES, jpeg_uri
from report_sites import (
    CLASSES,
    HOSTILE,
    Site,
    Truth,
    catalog_of,
    hostile_site,
    lists_of,
    make_site,
    predictions,
    refused,
    row,
    windows_of,
    write_predictions,
)
from small_tables import job_record


def picture_of(data: str) -> np.ndarray:
    """A JPEG or PNG in base64, RGB (and alpha)."""
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
    return np.concatenate([pixels[..., 2::-1], pixels[..., 3:]], axis=2)


# Numbers


def random_rows(number: int, seed: int) -> tuple[list[dict[str, Any]], Truth]:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    truth: Truth = []
    for index in range(number):
        video_id = f"v{index:03d}"
        order = rng.permutation(3)
        scores = np.sort(rng.dirichlet(np.ones(3)))[::-1]
        if rng.random() < 0.15:
            rows.append(refused(video_id))
        else:
            names = [CLASSES[place] for place in order]
            rows.append(row(video_id, label_topk=names, score_topk=scores.tolist(), margin=scores[0] - scores[1]))
        label = CLASSES[rng.integers(3)] if rng.random() < 0.9 else None
        truth.append((video_id, label, str(rng.choice(["train", "val", "test"]))))
    return rows, truth


def test_a_row_without_any_class_has_no_answer_and_lowers_the_accuracy_of_all() -> None:
    """label --scores sigmoid leaves a video without a class where none is likely enough."""
    rows = [
        row("a", label_topk=["cat"], score_topk=[0.9]),
        row("b", label_topk=["dog"], score_topk=[0.8]),
        row("c", label_topk=[], score_topk=[]),
        refused("d"),
    ]
    truth: Truth = [(name, "cat", "val") for name in "abcd"]
    numbers = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES)
    assert numbers.accuracy is not None
    top1 = numbers.accuracy.top1
    assert (top1.right, top1.evaluated, top1.quarantined, top1.missing) == (1, 2, 1, 1)
    assert (top1.value, top1.of_all) == (1 / 2, 1 / 4)
    assert numbers.confusion is not None
    assert numbers.confusion.counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert numbers.calibration is not None
    assert numbers.calibration.videos.sum() == 2


def test_videos_of_several_classes_count_for_each_of_them() -> None:
    rows = [
        row("a", label_topk=["dog", "cat"], score_topk=[0.9, 0.6]),
        row("b", label_topk=["dog"], score_topk=[0.8]),
        row("c", label_topk=[], score_topk=[]),
        row("d", label_topk=["emu"], score_topk=[0.7]),
        row("e", label_topk=["emu"], score_topk=[0.5]),
        refused("f"),
    ]
    truth = [("a", [0, 1]), ("b", [0, 1]), ("c", []), ("d", [2]), ("e", None), ("f", [0])]
    numbers = count(join_truth(predictions(rows), lists_of(truth), several=True), CLASSES, several=True)
    assert CLASSES == ("cat", "dog", "emu")
    assert numbers.accuracy is not None
    top1 = numbers.accuracy.top1
    assert (top1.right, top1.evaluated, top1.quarantined, top1.missing) == (3, 4, 1, 0)  # c has no class, and says so
    assert [(row.counts.videos, row.counts.called, row.counts.right) for row in numbers.classes] == [
        (2, 1, 1),
        (2, 2, 2),
        (1, 1, 1),
    ]
    assert [row.num_predicted for row in numbers.classes] == [1, 2, 2]
    assert [row.mean_score for row in numbers.classes] == pytest.approx([0.6, 0.85, 0.6])
    assert (numbers.confusion, numbers.calibration) == (None, None)
    with pytest.raises(CatalogError, match="no labels to compare with; it has label lists, the predictions one class"):
        join_truth(predictions(rows), lists_of(truth))


def test_the_site_of_label_lists_says_what_is_right_as_a_whole(tmp_path: Path) -> None:
    rows = [
        row("a", label_topk=["dog", "cat"], score_topk=[0.9, 0.6]),
        row("b", label_topk=["dog"], score_topk=[0.8]),
        row("c", label_topk=[], score_topk=[]),
    ]
    site = make_site(tmp_path, rows, lists_of([("a", [0, 1]), ("b", [0, 1]), ("c", None)]), several=True)
    assert site.totals["top1"] == 0.5
    assert "All classes right, and no other, split val 50.0%" in site.text
    about, columns = site.data("site"), site.data("rows-0")
    assert about["truths"] == ["cat|dog"]
    assert about["labels"] == ["cat", "dog", "emu"]
    found = dict(zip(columns["id"], zip(columns["truth"], columns["right"], strict=True), strict=True))
    assert found == {"a": (0, 1), "b": (0, 0), "c": (-1, -1)}
    assert [item["true"] for item in about["classes"]] == [2, 2, 0]


def test_numbers_equal_plain_loops() -> None:
    rows, truth = random_rows(300, seed=1)
    known = {video_id: (label, split) for video_id, label, split in truth}
    numbers = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES)
    labelled = [item for item in rows if item["status"] == "labelled"]
    assert (numbers.num_videos, numbers.num_labelled) == (300, len(labelled))
    assert numbers.num_quarantined == 300 - len(labelled)
    assert numbers.mean_margin == pytest.approx(float(np.mean([item["margin"] for item in labelled])), rel=1e-6)

    pairs: Counter[tuple[str, str]] = Counter()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    for item in rows:
        label, split = known[item["video_id"]]
        if label is None:
            continue
        assert split is not None
        if item["status"] != "labelled":
            quarantined[split] += 1
            continue
        total[split] += 1
        right[split] += item["label_topk"][0] == label
        if split != "train":
            pairs[label, item["label_topk"][0]] += 1
    assert numbers.confusion is not None
    assert numbers.confusion.counts.tolist() == [[pairs[true, called] for called in CLASSES] for true in CLASSES]
    assert [(item.split, item.top1.right, item.top1.evaluated, item.top1.quarantined) for item in numbers.splits] == [
        (split, right[split], total[split], quarantined[split]) for split in ("test", "train", "val")
    ]
    assert numbers.accuracy is not None
    counted = total["val"] + total["test"]
    assert (numbers.accuracy.split, numbers.accuracy.top1.evaluated) == ("test + val", counted)
    assert numbers.accuracy.top1.value == (right["val"] + right["test"]) / counted
    assert numbers.accuracy.top1.interval == wilson_interval(right["val"] + right["test"], counted)
    for item in numbers.classes:
        scores = [answer["score_topk"][0] for answer in labelled if answer["label_topk"][0] == item.counts.label]
        assert item.num_predicted == len(scores)
        assert item.mean_score == pytest.approx(float(np.mean(scores)), rel=1e-6)
        called = sum(pairs[true, item.counts.label] for true in CLASSES)
        true = sum(pairs[item.counts.label, called] for called in CLASSES)
        assert (item.counts.precision, item.counts.recall) == (
            pairs[item.counts.label, item.counts.label] / called,
            pairs[item.counts.label, item.counts.label] / true,
        )

    for name, histogram in (("score", numbers.histogram), ("margin", numbers.margin_histogram)):
        verdicts: Counter[tuple[int, int]] = Counter()
        for answer in labelled:
            label = known[answer["video_id"]][0]
            place = 2 if label is None else (0 if answer["label_topk"][0] == label else 1)
            value = answer["score_topk"][0] if name == "score" else answer["margin"]
            verdicts[place, min(19, int(float(np.float32(value)) * 20))] += 1
        assert histogram.tolist() == [[verdicts[kind, place] for place in range(20)] for kind in range(3)]


def test_accuracy_counts_training_videos_only_where_there_are_no_others() -> None:
    rows = [row("a"), row("b")]
    cases: list[tuple[Truth, tuple[str | None, int, int]]] = [
        ([("a", "dog", "train"), ("b", "cat", "train")], ("train", 1, 2)),
        ([("a", "dog", "train"), ("b", "cat", "val")], ("val", 0, 1)),
        ([("a", "dog", None), ("b", "dog", None)], (None, 2, 2)),
        ([("a", "dog", "train"), ("b", None, "val")], ("train", 1, 1)),
    ]
    for truth, expected in cases:
        found = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES).accuracy
        assert found is not None
        assert (found.split, found.top1.right, found.top1.evaluated) == expected


def test_a_class_that_only_the_model_knows_has_its_place_in_the_confusion() -> None:
    truth: Truth = [("a", "dog", "val"), ("b", "cat", "val")]
    rows = [row("a"), row("b", label_topk=["yak", "dog"], score_topk=[0.9, 0.1], id_topk=[3, 1])]
    confusion = count(join_truth(predictions(rows), catalog_of(truth)), CLASSES).confusion
    assert confusion is not None
    assert confusion.names == (*CLASSES, "yak")
    assert np.argwhere(confusion.counts).tolist() == [[0, 3], [1, 1]]


def test_histogram_bars_stack_to_the_counts() -> None:
    histogram = np.array([[0, 3, 1], [2, 1, 0], [0, 4, 0]])
    bars = histogram_bars(histogram, "score")
    unit = HISTOGRAM_HEIGHT / 8
    heights = {(bar.kind, round(bar.x)): bar.height / unit for bar in bars}
    first, second, third = sorted({round(bar.x) for bar in bars})
    assert heights == pytest.approx(
        {("wrong", first): 2, ("right", second): 3, ("wrong", second): 1, ("unknown", second): 4, ("right", third): 1}
    )
    assert min(bar.y for bar in bars) == 0
    for bar in bars:
        below = [other for other in bars if other.x == bar.x and other.y == pytest.approx(bar.y + bar.height)]
        assert below or bar.y + bar.height == pytest.approx(HISTOGRAM_HEIGHT)


# Which rows are listed


def test_the_least_certain_are_listed_and_every_reason_in_turn() -> None:
    margins = dict(zip("abcdefgh", (0.5, 0.1, 0.3, 0.2, 0.6, 0.4, 0.05, 0.7), strict=True))
    rows = [row(name, margin=margin) for name, margin in margins.items()]
    rows += [refused(f"z{number}", "Frequent") for number in range(5)] + [refused("y", "Rare"), refused("x", None)]
    table = join_truth(predictions(rows), None)

    def listed(most: int) -> list[str]:
        found: list[str] = choose(table, most)["video_id"].to_pylist()
        return found

    assert listed(8) == ["g", "b", "d", "c", "f", "a", "z0", "y"]
    assert listed(12) == ["g", "b", "d", "c", "f", "a", "e", "h", "z0", "y", "x", "z1"]
    assert listed(100) == [*listed(12), "z2", "z3", "z4"]
    assert listed(0) == []
    assert choose(join_truth(predictions(rows[:3]), None), 2)["video_id"].to_pylist() == ["b", "c"]
    assert choose(join_truth(predictions(rows[8:]), None), 2)["video_id"].to_pylist() == ["z0", "y"]


def test_ids_are_ranked_as_people_count() -> None:
    ids = ["v10", "v9", "v2b", "v02a", "V2", "", "10", "9", "v1000000000000000000000000", "v999"]
    ranks = id_ranks(ids)
    assert [ids[ranks.index(place)] for place in range(len(ids))] == [
        *("", "9", "10", "V2", "v02a", "v2b", "v9", "v10", "v999", "v1000000000000000000000000"),
    ]


# The site's files


def test_the_files_hold_every_row_and_the_numbers_count_all(tmp_path: Path) -> None:
    rows, truth = random_rows(240, seed=2)
    rows[5] |= {"abstained": True, "offset": 512, "length": 1000}
    rows[6] |= {"status": "skipped"}
    catalog = catalog_of(truth)
    site = make_site(tmp_path, rows, catalog, max_strips=0)
    known = {video_id: (label, split) for video_id, label, split in truth}
    table = {item["id"]: item for item in site.rows()}
    assert len(site.rows()) == len(table) == 240
    for number, item in enumerate(rows):
        found = table[item["video_id"]]
        assert found["key"] == f"k{number:016x}"
        assert (found["truth"], found["split"]) == known[item["video_id"]]
        assert (found["uri"], found["status"], found["strip"]) == (item["uri"], item["status"], -1)
        assert (found["offset"], found["length"]) == (item.get("offset"), item.get("length"))
        assert (found["top"], found["abstained"]) == (item["label_topk"] or [], int(item["abstained"]))
        assert found["scores"] == [round(float(np.float32(score)), 6) for score in item["score_topk"] or []]
        assert found["reason"] == (None if item["status"] == "labelled" else item.get("error_class") or "skipped")
    statuses = Counter(item["status"] for item in rows)
    assert [site.totals[name] for name in statuses] == list(statuses.values())
    sums = " + ".join(f"{statuses[name]} {name}" for name in ("labelled", "quarantined", "skipped"))
    assert f"240 inputs = {sums}: complete." in site.text
    numbers = count(join_truth(predictions(rows), catalog), CLASSES)
    assert numbers.accuracy is not None
    assert site.totals["top1"] == numbers.accuracy.top1.value
    low, high = numbers.accuracy.top1.interval
    assert f"{numbers.accuracy.top1.value:.1%} 95% interval {100 * low:.1f} to {high:.1%}" in site.text
    for record, item in zip(site.data("site")["classes"], numbers.classes, strict=True):
        assert (record["predicted"], record["meanScore"]) == (item.num_predicted, item.mean_score)
        counts = item.counts
        assert (record["called"], record["true"], record["right"]) == (counts.called, counts.videos, counts.right)


def test_contact_strips_are_packed_and_show_the_videos(tmp_path: Path) -> None:
    frames = make_clip("star", "up", np.random.default_rng(0))
    video = tmp_path / "star.mp4"
    video.write_bytes(make_video(frames))
    rows = [row(f"v{number:02d}", uri=str(video), margin=number / 100) for number in range(STRIPS_PER_FILE + 3)]
    rows[2] |= {"uri": str(tmp_path / "gone.mp4")}
    site = make_site(tmp_path, [*rows, refused("empty")], max_strips=STRIPS_PER_FILE + 2)
    strips = [item["strip"] for item in site.rows()]
    assert strips == [*range(STRIPS_PER_FILE + 2), -1, -1]
    assert sorted(path.name for path in (site.folder / "data").glob("strips*")) == ["strips-0.js", "strips-1.js"]
    first, second = site.data("strips-0"), site.data("strips-1")
    assert (len(first), len(second)) == (STRIPS_PER_FILE, 2)
    assert first[2].startswith("ObjectNotFound: ")
    (tmp_path / "less").mkdir()
    small = make_site(tmp_path / "less", rows[:1], decode=DecodeConfig(max_bytes=1000))
    assert small.data("strips-0")[0].startswith("MediaOverBudget: ")
    assert site.totals["without_frames"] == 1
    with av.open(str(video)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for strip in (first[0], second[1]):
        assert len(strip) == 4
        for width, height, data in strip:
            shown = picture_of(data).astype(int)
            assert shown.shape == (height, width, 3) == (96, 96, 3)
            assert min(float(np.abs(shown - frame).mean()) for frame in decoded) < 6


def test_a_site_that_is_served_again_keeps_its_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("kinoray.library.report.serve", lambda *given: served.append(given))
    video = tmp_path / "star.mp4"
    video.write_bytes(make_video(make_clip("star", "up", np.random.default_rng(0))))
    rows = [row(f"v{number:02d}", uri=str(video), margin=number / 100) for number in range(STRIPS_PER_FILE + 1)]
    rows[1] |= {"uri": str(tmp_path / "gone.mp4")}
    labels = write_predictions(tmp_path / "labels", predictions(rows))
    config = ReportConfig(predictions=labels, out=str(tmp_path / "report"), serve=True)
    first = report(config)
    files = {str(path.relative_to(tmp_path / "report")): path for path in (tmp_path / "report").rglob("*.*")}
    before = {name: path.read_bytes() for name, path in files.items()}
    assert served[0][2] == files.keys()
    assert served[0][3]["k" + "0" * 16] == Reference(str(video))
    video.unlink()  # whatever is made anew now has no frames
    assert report(config) | {"bytes": 0} == first | {"bytes": 0}
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert served[1][2] == files.keys()
    files["data/strips-1.js"].unlink()
    assert report(config)["without_frames"] == len(rows)
    assert report(dataclasses.replace(config, serve=False))["without_frames"] == len(rows)


def test_lengths_and_codecs_come_from_the_catalog_or_from_the_strips(tmp_path: Path) -> None:
    video = tmp_path / "star.mp4"
    video.write_bytes(make_video(make_clip("star", "up", np.random.default_rng(0))))
    with av.open(str(video)) as container:
        seconds = container.streams.video[0].frames / 12
    rows = [row(f"v{number}", uri=str(video), margin=number / 10) for number in range(3)]
    opened = make_site(tmp_path / "opened", [*rows, refused("x")], max_strips=2)
    assert opened.data("media-0") == {
        "codecs": ["h264"],
        "codec": [0, 0, -1, -1],
        "duration": [round(seconds, 3), round(seconds, 3), None, None],
    }
    assert "Of 2 videos that were opened for contact strips." in opened.text
    links = [link["href"] for link in opened.all("a")]
    assert "#duration=2..5" in links
    assert "#codec=h264" in links
    truth: Truth = [(f"v{number}", "dog", "val") for number in range(3)]
    catalog = catalog_of(truth)
    columns = {"duration_s": pa.array([0.5, 90.0, None]), "codec": pa.array(["vp9", "h264", None])}
    table = catalog.table
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    known = make_site(tmp_path / "known", rows, Catalog(table, catalog.labels), max_strips=0)
    assert known.data("media-0") == {"codecs": ["h264", "vp9"], "codec": [1, 0, -1], "duration": [0.5, 90.0, None]}
    assert known.text.count("Of 2 videos of which the catalog says it.") == 2
    assert "#duration=60..120" in [link["href"] for link in known.all("a")]
    nothing = make_site(tmp_path / "nothing", rows, max_strips=0)
    assert not (nothing.folder / "data" / "media-0.js").exists()
    assert "Codec" not in nothing.text


def test_lengths_are_counted_from_each_step_to_below_the_next() -> None:
    seconds = np.array([0.0, 0.999, 1.0, 9.99, 10.0, 10.0, 19.9, 59.0, 60.0, 3599.0, 3600.0, 1e9])
    found = {(kind.name, kind.value): kind.num_videos for kind in count_durations(seconds)}
    assert {name: number for name, number in found.items() if number} == {
        ("0 to 1 s", "0..1"): 2,
        ("1 to 2 s", "1..2"): 1,
        ("5 to 10 s", "5..10"): 1,
        ("10 to 20 s", "10..20"): 3,
        ("30 to 60 s", "30..60"): 1,
        ("1 to 2 min", "60..120"): 1,
        ("30 to 60 min", "1800..3600"): 1,
        ("1 h and more", "3600.."): 2,
    }
    assert len(found) == 13  # those between them that no video has are shown, too
    assert [kind.name for kind in count_durations(np.array([12.0, 40.0]))] == ["10 to 20 s", "20 to 30 s", "30 to 60 s"]
    assert count_durations(np.array([])) == ()
    assert [kind.name for kind in count_codecs(["vp9", "h264", "av1", "h264"])] == ["h264", "av1", "vp9"]


def test_windows_are_told_for_the_videos_that_are_listed(tmp_path: Path) -> None:
    rows = [row(f"v{number:02d}", margin=number / 100, windows=2) for number in range(STRIPS_PER_FILE + 2)]
    rows.append(refused("x"))
    windows = windows_of(rows, [("dog", 0.75), ("cat", 0.5)])
    site = make_site(tmp_path, rows, windows=windows, max_videos=STRIPS_PER_FILE + 1, max_strips=0)
    labels = site.data("site")["labels"]
    lists = [[0.0, 1.0], [1.0, 2.0], [labels.index("dog"), labels.index("cat")], [0.75, 0.5]]
    listed = [item["id"] for item in site.rows()]
    found = site.data("windows-0") + site.data("windows-1")
    assert dict(zip(listed, found, strict=True)) == {name: None if name == "x" else lists for name in listed}
    assert [item["windows"] for item in site.rows()] == [1 if name == "x" else 2 for name in listed]
    plain = make_site(tmp_path / "plain", [row("a")], max_strips=0)
    assert not list((plain.folder / "data").glob("windows*"))


def test_similar_videos_are_those_of_the_largest_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 8)).astype(np.float16)
    rows = [row(f"v{number:02d}", margin=number / 100, embedding=vectors[number].tolist()) for number in range(40)]
    rows[5]["embedding"] = None
    rows[6]["embedding"] = [0.0] * 8
    site = make_site(tmp_path / "site", rows, embeddings=True, max_strips=0, max_videos=38)
    x = vectors[:38].astype(np.float64)
    x[[5, 6]] = np.nan
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = [item for number in range(4) for item in site.data(f"similar-{number}")]
    places = site.data("map-0")
    assert len(found) == len(places) == 38
    for number, item in enumerate(found):
        if number in (5, 6):
            assert item is places[number] is None
            continue
        cosines = np.where(np.isnan(x @ x[number]) | (np.arange(38) == number), -2, x @ x[number])
        assert item[0] == np.argsort(-cosines)[:24].tolist()
        np.testing.assert_allclose(item[1], np.sort(cosines)[::-1][:24], atol=2e-3)
        assert np.abs(places[number]).max() <= 1
    assert site.data("site")["similar"]
    monkeypatch.setattr("kinoray.library.report.MAX_SIMILAR", 37)
    more = make_site(tmp_path / "more", rows, embeddings=True, max_strips=0)
    assert not more.data("site")["similar"]
    assert len(more.data("map-0")) == 40
    plain = make_site(tmp_path / "plain", rows[:2], max_strips=0)
    assert not plain.data("site")["map"]
    assert 'data-view="map"' not in plain.html


def test_the_footer_says_which_network_and_when_and_folds_the_digests_away(tmp_path: Path) -> None:
    storage = Storage()
    model = torch.nn.Linear(2, 3)
    origin = Origin(source="torchvision R3D_18_Weights.KINETICS400_V1", licence="BSD <3")
    meta = CheckpointMeta(
        model=ModelConfig(factory="r3d_18"), clip=ClipConfig(), labels=CLASSES, epoch=2, step=9, samples=50
    )
    for place, about in (("here", meta), ("imported", dataclasses.replace(meta, origin=origin))):
        folder = tmp_path / place
        saved = save_checkpoint(storage, str(folder / "run"), model_state=model.state_dict(), meta=about)
        labels = write_predictions(
            folder / "labels",
            predictions([row("a")]),
            checkpoint=str(folder / "run"),
            model_digest=saved.model_digest,
        )
        (ledger,) = (folder / "labels").iterdir()
        (ledger / "jobs").mkdir()
        for number, day in enumerate(("2026-02-03", "2026-02-05")):
            record = {"run_id": f"run-{number}", "began": f"{day}T10:00:00+00:00", "wall_s": 1.0}
            (ledger / "jobs" / f"run-{number}.json").write_text(json.dumps(record))
        os.utime(folder / "run" / "checkpoint.json", (1_700_000_000, 1_700_000_000))
        report(ReportConfig(predictions=labels, out=str(folder / "report"), max_strips=0))
        page = (folder / "report" / "index.html").read_text()
        footer = " ".join(re.sub("<[^>]+>", " ", page.partition("<footer>")[2]).split())
        assert f"Checkpoint {folder}/run" in footer
        assert "Saved 2023-11-14 Labelled 2026-02-03 to 2026-02-05" in footer
        if place == "here":
            assert "From trained with kinoray: 2 epochs, 50 videos seen" in footer
        else:
            assert "From torchvision R3D_18_Weights.KINETICS400_V1 Licence of the weights BSD &lt;3" in footer
        assert page.index("<summary>Digests</summary>") < page.index("c" * 16)
        save_checkpoint(storage, str(folder / "run"), model_state=torch.nn.Linear(2, 3).state_dict(), meta=about)
        report(ReportConfig(predictions=labels, out=str(folder / "report"), max_strips=0))
        replaced = (folder / "report" / "index.html").read_text()  # another checkpoint has its place: not this one
        assert "Saved" not in replaced
        assert f"{folder}/run" in replaced


@pytest.mark.ray
def test_addresses_of_a_bucket_are_put_in_only_when_asked_for_and_go_with_the_next_report(
    tmp_path: Path, bucket: str, s3_config: StorageConfig
) -> None:
    video = make_video(make_clip("star", "up", np.random.default_rng(0)))
    storage = Storage(s3_config)
    storage.put(f"{bucket}/a b&c.mp4", video)
    rows = [
        row("a", uri=f"{bucket}/a b&c.mp4"),
        row("b", uri=f"{bucket}/shard.tar", offset=0, length=100),
        row("c"),
        row("d", uri="s3://not a bucket!/x.mp4"),
    ]
    labels = write_predictions(tmp_path / "labels", predictions(rows))
    out = tmp_path / "report"
    config = ReportConfig(predictions=labels, out=str(out), max_strips=0, storage=s3_config, presign_hours=2)
    report(config)
    text = (out / "data" / "links-0.js").read_text()
    links = json.loads(text.removeprefix("kinoray.deliver(...").removesuffix(");\n"))[2]
    ids = json.loads((out / "data" / "rows-0.js").read_text().partition("(...")[2].removesuffix(");\n"))[2]["id"]
    by_id = dict(zip(ids, links, strict=True))
    assert by_id == {"a": by_id["a"], "b": None, "c": None, "d": None}
    signed = parse_qs(urlsplit(by_id["a"]).query)
    assert (signed["X-Amz-Algorithm"], signed["X-Amz-Expires"]) == (["AWS4-HMAC-SHA256"], ["7200"])
    with urllib.request.urlopen(by_id["a"], timeout=30) as answer:
        assert answer.read() == video
    page = (out / "index.html").read_text()
    assert f"media-src file: {s3_config.endpoint_url};" in page
    report(dataclasses.replace(config, presign_hours=0.0))
    assert not (out / "data" / "links-0.js").exists()
    assert "X-Amz" not in "".join(path.read_text() for path in out.rglob("*.*"))
    assert "media-src file:;" in (out / "index.html").read_text()


def test_what_is_not_listed_is_counted_and_the_page_says_so(tmp_path: Path) -> None:
    rows = [row(f"v{number}", margin=number / 10) for number in range(8)] + [refused("z")]
    site = make_site(tmp_path, rows, max_videos=4, max_strips=0)
    assert [item["id"] for item in site.rows()] == ["v0", "v1", "v2", "z"]
    assert (site.totals["videos"], site.totals["shown"]) == (9, 4)
    assert "This list has 4 of 9 videos, the least certain ones first" in site.text
    nothing = make_site(tmp_path / "none", rows, max_videos=0)
    assert nothing.rows() == []
    assert "This list has 0 of 9 videos" in nothing.text


def test_an_unfinished_labelling_says_what_is_to_come(tmp_path: Path) -> None:
    rows = [row(f"v{number}") for number in range(10)]
    labels = write_predictions(tmp_path / "labels", predictions(rows), 3, num_units=2)
    config = ReportConfig(predictions=labels, out=str(tmp_path / "report"), max_strips=0)
    totals = report(config)
    assert (totals["inputs"], totals["videos"]) == (10, 6)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "10 inputs = 6 labelled + 0 quarantined + 0 skipped + 4 to come" in page
    record = (tmp_path / "report" / "data" / "site.js").read_text()
    write_predictions(tmp_path / "labels", predictions(rows), 3)
    assert report(config)["videos"] == 10
    digests = [re.findall('"digest":"([0-9a-f]+)"', text) for text in (record, _text(tmp_path, "data/site.js"))]
    assert digests[0] == digests[1] != []  # corrections of the first rows are there after the last ones came


def _text(folder: Path, name: str) -> str:
    return (folder / "report" / name).read_text(encoding="utf-8")


def test_quarantine_is_grouped_by_its_reason_the_most_frequent_first(tmp_path: Path) -> None:
    rows = [refused("a"), *(refused(name, "NoVideoStream", "sound only") for name in "bcd")]
    rows += [refused("e", "NoVideoStream", "other words"), refused("f", "Unlike", status="skipped")]
    site = make_site(tmp_path, rows)
    links = [parse_qs((link["href"] or "").lstrip("#")) for link in site.all("a") if "reason=" in (link["href"] or "")]
    assert [(link["status"], link["reason"]) for link in links] == [
        (["quarantined"], ["NoVideoStream"]),
        (["quarantined"], ["EmptyMedia"]),
        (["skipped"], ["Unlike"]),
    ]
    cells = [text for text in site.texts("td") if text.strip()]
    assert cells == ["quarantined", "4", "66.67%", "quarantined", "1", "16.67%", "skipped", "1", "16.67%"]
    words = site.texts("bdi")
    assert words.index("sound only") + 1 == words.index("other words")
    assert site.totals["top1"] is None


def test_many_classes_are_a_picture_and_a_list_of_mistakes(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(40))
    rows = [row(f"v{n}", label_topk=[names[n]], score_topk=[1.0], id_topk=[n], margin=None) for n in range(40)]
    truth: Truth = [(f"v{n}", names[max(n, 1)], "val") for n in range(40)]
    site = make_site(tmp_path, rows, catalog_of(truth, names), max_strips=0)
    (image,) = site.all("img")
    picture = picture_of((image["src"] or "").partition(",")[2])
    expected = np.zeros((40, 40), bool)
    expected[range(40), range(40)] = True
    expected[0, 0], expected[1, 0] = False, True
    assert ((picture[..., 3] > 0) == expected).all()
    (mistake,) = [link["href"] for link in site.all("a") if "true=" in (link["href"] or "")]
    assert parse_qs((mistake or "").lstrip("#")) == {"true": ["class 1"], "label": ["class 0"]}


def test_classes_without_a_video_fold_into_one_line(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(400))
    rows = [row(f"v{n}", label_topk=[names[n]], score_topk=[1.0], id_topk=[n], margin=None) for n in (3, 7)]
    truth: Truth = [("v3", names[5], "val"), ("v7", names[7], "val")]
    page = make_site(tmp_path, rows, catalog_of(truth, names), max_strips=0).html
    table, _, rest = page.partition('<table class="classes">')[2].partition("</table>")
    assert re.findall(r"<bdi>(class \d+)</bdi>", table) == [names[3], names[7], names[5]]
    folded = rest.partition("<details")[2].partition("</details>")[0]
    assert "397 classes with no video" in folded
    assert re.findall(r"<bdi>(class \d+)</bdi>", folded) == [name for name in names if name not in names[3:8:2]]


def test_a_second_report_replaces_the_first_and_leaves_other_files(tmp_path: Path) -> None:
    rows = [row(f"v{number}") for number in range(ROWS_PER_FILE + 1)]
    first = make_site(tmp_path / "first", rows, max_strips=0)
    assert (first.folder / "data" / "rows-1.js").exists()
    for name in ("data/notes.txt", "data/rows-1.js.bak", "mine.html"):
        (first.folder / name).write_text("mine")
    labels = write_predictions(tmp_path / "second", predictions(rows[:2]))
    report(ReportConfig(predictions=labels, out=str(first.folder), max_strips=0))
    left = sorted(str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file())
    assert left == [
        *("assets/report.css", "assets/report.js", "data/notes.txt", "data/rows-0.js", "data/rows-1.js.bak"),
        *("data/site.js", "index.html", "mine.html"),
    ]


def test_the_same_table_gives_the_same_files(tmp_path: Path) -> None:
    rows, truth = random_rows(50, seed=3)
    one, two = (make_site(tmp_path / name, rows, catalog_of(truth), max_strips=0) for name in ("one", "two"))
    for path in (path for path in one.folder.rglob("*.*") if path.name != "index.html"):
        assert path.read_bytes() == (two.folder / path.relative_to(one.folder)).read_bytes()
    assert one.html.replace("/one/", "/two/") == two.html


@pytest.mark.ray
def test_a_site_in_a_bucket_is_the_same_as_in_a_folder(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    rows, _ = random_rows(30, seed=4)
    site = make_site(tmp_path, rows, max_strips=0)
    storage = Storage(s3_config)
    labels = str(tmp_path / "labels")
    for path in Path(labels).rglob("*.*"):
        storage.put(f"{bucket}/labels/{path.relative_to(labels)}", path.read_bytes())
    totals = report(
        ReportConfig(predictions=f"{bucket}/labels", out=f"{bucket}/site/", max_strips=0, storage=s3_config)
    )
    assert totals["out"] == f"{bucket}/site/index.html"
    names = sorted(str(path.relative_to(site.folder)) for path in site.folder.rglob("*.*"))
    assert [info.uri.partition("/site/")[2] for info in storage.list(f"{bucket}/site/")] == names
    for name in names:
        there = storage.read(f"{bucket}/site/{name}").decode()
        assert there.replace(f"{bucket}/labels", labels) == (site.folder / name).read_text(encoding="utf-8")


# Strangers' names


def test_the_policy_allows_the_site_and_nothing_else(tmp_path: Path) -> None:
    site = make_site(tmp_path, [row("a")], max_strips=0)
    (meta,) = site.all("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = dict(rule.strip().split(" ", 1) for rule in (meta["content"] or "").split(";"))
    (script,), (style,) = site.all("script"), site.all("link", rel="stylesheet")
    assert script["nonce"] == style["nonce"]
    assert len(script["nonce"] or "") == 32
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "media-src": "file:",
        "style-src": f"'nonce-{style['nonce']}'",
        "script-src": f"'nonce-{script['nonce']}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "kinoray",
    }
    assert site.texts("script") == site.texts("style") == []
    for tag, attributes in site.elements:  # what the policy would block must not be there in the first place
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("iframe", "object", "base", "style")
    for path in site.folder.rglob("*.*"):
        assert not re.search(r"https?://", path.read_text(encoding="utf-8")), path
    code = _text(tmp_path, "assets/report.js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", code)


def test_videos_may_come_from_where_they_are_and_from_nowhere_else(tmp_path: Path) -> None:
    def policy(name: str, *rows: dict[str, Any]) -> str:
        site = make_site(tmp_path / name, list(rows), max_strips=0)
        (meta,) = site.all("meta", **{"http-equiv": "Content-Security-Policy"})
        return meta["content"] or ""

    assert "media-src" not in policy("bucket", row("a", uri="s3://bucket/a.mp4"))
    assert "media-src" not in policy("shard", row("a", uri="/nowhere/a.tar", offset=0, length=1))
    assert " media-src file:;" in policy("both", row("a"), row("b", uri="s3://bucket/a.mp4"))


def test_hostile_names_add_no_element_no_attribute_and_no_code(tmp_path: Path) -> None:
    plain_names = tuple(f"n{number}" for number in range(len(HOSTILE)))
    plain = hostile_site(tmp_path / "plain", plain_names, "title")
    hostile = hostile_site(tmp_path / "hostile", HOSTILE, HOSTILE[1] + HOSTILE[2])
    assert len(HOSTILE) >= 40

    def shape(site: Site) -> Counter[tuple[str, ...]]:
        return Counter((tag, *sorted(attributes)) for tag, attributes in site.elements)

    assert shape(hostile) == shape(plain)
    for tag, attributes in hostile.elements:
        assert re.match(r"#|data:,$|assets/report\.css\?v=[0-9a-f]+$", attributes.get("href") or "#"), tag
        assert re.match(r"data:image/png;|assets/report\.js\?v=[0-9a-f]+$", attributes.get("src") or "data:image/png;")
    # They are shown as what they are, and none hides or reorders what is around it.
    shown = set(hostile.texts("bdi"))
    assert {visible(name) for name in HOSTILE} - {" leading and trailing "} <= shown
    assert not set(hostile.html) & {"\x00", "\u202e", "\r", "\u2028", "\u2066"}
    for path in hostile.folder.rglob("data/*.js"):  # names are ASCII strings in which no tag can start or end
        assert not re.search(rb"[^\x20-\x7e\n]|[<>&]", path.read_bytes()), path
        assert path.read_bytes().count(b"\n") == 1
    listed = {item["id"]: item for item in hostile.rows()}
    for index, name in enumerate(HOSTILE):  # and are the very same in the data
        item, bad = listed[name], listed[f"q{index:02d}{name}"]
        assert (item["top"][0], item["split"], item["truth"]) == (name, name, HOSTILE[index - index % 2])
        assert (item["uri"], bad["reason"], bad["text"]) == (f"/{name}", name, name)


def test_visible_spells_out_what_cannot_be_seen() -> None:
    assert visible("a\x00b\u202ec\n\u200d\ud800") == "a\\u0000b\\u202ec\\u000a\\u200d\\ud800"
    assert visible("Stra\u00dfe \u0627\u0644\u0639 <b>") == "Stra\u00dfe \u0627\u0644\u0639 <b>"


# Size


@pytest.mark.parametrize("width", [54, 96, 170, 400])
def test_no_frame_is_larger_than_its_share(width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, width, 3), dtype=np.uint8)
    thumbnail = jpeg_uri(noise)
    head, _, data = thumbnail.uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert picture_of(data).shape == (96, min(width, 192), 3)
    assert (thumbnail.width, thumbnail.height) == (min(width, 192), 96)
    assert len(base64.b64decode(data)) <= MAX_FRAME_BYTES


def test_a_listed_row_takes_less_than_400_bytes_and_the_page_does_not_grow(tmp_path: Path) -> None:
    rows = [row(f"some/longer/path/to/a/video-{number:05d}", margin=number % 50 / 50) for number in range(5000)]
    small, large = (make_site(tmp_path / str(len(part)), part, max_strips=0) for part in (rows[:50], rows))
    assert large.data("site")["rows"] == 3
    assert (large.totals["bytes"] - small.totals["bytes"]) / 4950 < 400
    assert abs(len(large.html) - len(small.html)) < 500


# Errors


def test_nothing_labelled_yet_is_said_plainly(tmp_path: Path) -> None:
    out = str(tmp_path / "report")
    with pytest.raises(ObjectNotFound, match="holds no predictions"):
        report(ReportConfig(predictions=str(tmp_path / "nothing"), out=out))
    Ledger(Storage(), str(tmp_path / "labels" / "0123456789abcdef")).pin_job(job_record())
    with pytest.raises(CatalogError, match="holds no finished rows yet; run kinoray label"):
        report(ReportConfig(predictions=str(tmp_path / "labels"), out=out))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("out", ["report.html", "s3://bucket/x.HTM/", ""])
def test_a_page_as_out_is_refused_since_the_report_is_a_folder(out: str) -> None:
    with pytest.raises(ConfigError, match=r"out must be a folder or s3:// prefix"):
        ReportConfig(predictions="x", out=out)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    labels = write_predictions(tmp_path / "labels", predictions([row("a")]))
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ConfigError, match=r"out .*report is a file: choose an empty folder"):
        report(ReportConfig(predictions=labels, out=str(tmp_path / "report")))
    assert (tmp_path / "report").read_text() == "mine"


def test_a_catalog_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"none of the 1 videos .* ids look like a and other"):
        make_site(tmp_path / "other", [row("a")], catalog_of([("other", "dog", None)]))
    with pytest.raises(CatalogError, match="the catalog has no labels"):
        make_site(tmp_path / "none", [row("a")], catalog_of([("a", None, None)]))


def test_a_table_of_nothing_but_quarantine_is_a_site(tmp_path: Path) -> None:
    site = make_site(tmp_path, [refused("a"), refused("b")], catalog_of([("a", "dog", "val"), ("b", "cat", "val")]))
    assert site.totals["labelled"] == 0
    assert [item["id"] for item in site.rows()] == ["a", "b"]
    assert "Top-1 accuracy" not in site.text


def test_an_empty_error_text_and_no_reason_are_shown(tmp_path: Path) -> None:
    site = make_site(tmp_path, [row("a"), refused("b", None) | {"error_text": None}], max_strips=0)
    assert "no reason was recorded" in site.text
    assert [item["reason"] for item in site.rows()] == [None, "quarantined"]
