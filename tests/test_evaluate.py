"""Evaluation: classes matched by name, every video counted once, all numbers checked by plain loops."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinoray.catalog.table import Catalog, catalog_of_source, save_catalog
from kinoray.config.shared import ClipConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import class_names, make_broken, make_demo_set
from kinoray.errors import CatalogError, CheckpointMismatch, TooManyBad
from kinoray.evaluation.compare import compare
from kinoray.evaluation.config import CompareConfig, EvaluateConfig
from kinoray.evaluation.metrics import Confused, confused_classes, wilson_interval
from kinoray.evaluation.record import EvaluationRecord, Origin, evaluation_record, join_answers, true_classes
from kinoray.evaluation.verb import evaluate
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.storage.objects import Storage
from label_models import save_untrained
from tiny_models import OWN_NETWORKS

LABELS = tuple(class_names())
NOWHERE = Origin(catalog="", split="x", catalog_digest="", model_digest="", config_digest="", predictions="")
LOCAL = Storage(StorageConfig())
CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))


def catalog_with(folder: Path, rows: list[tuple[str, str, str]]) -> Catalog:
    """Of (file, label, split); the files need not be there."""
    lines = ["path,label,split", *(",".join(row) for row in rows)]
    (folder / "list.csv").write_text("\n".join(lines))
    return catalog_of_source(LOCAL, str(folder / "list.csv"))


def stored(folder: Path) -> EvaluationRecord:
    """What evaluation.json of the folder holds."""
    path = folder / "evaluation.json"
    return EvaluationRecord.from_json(path.read_bytes(), str(path))


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, [("a.mp4", "dog", ""), ("b.mp4", "ant", ""), ("c.mp4", "dog", "")])
    assert catalog.labels == ("ant", "dog")
    assert true_classes(catalog, ("cat", "dog", "ant")).tolist() == [1, 2, 1]


def test_a_class_that_the_checkpoint_does_not_know_is_named(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, [("a.mp4", "dog", ""), ("b.mp4", "ant", ""), ("c.mp4", "yak", "")])
    with pytest.raises(
        CheckpointMismatch, match=r"has 2 classes, the catalog 3; the checkpoint does not know ant, yak;"
    ):
        true_classes(catalog, ("cat", "dog"))


def test_a_video_without_a_label_is_named(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, [("a.mp4", "dog", ""), ("b.mp4", "", ""), ("c.mp4", "", "")])
    with pytest.raises(CatalogError, match=r"2 of 3 videos have no label, 'b' is the first; .* kinoray label"):
        true_classes(catalog, ("dog",))


def test_scores_agree_with_a_plain_count(tmp_path: Path) -> None:
    """200 videos of 7 classes with random predictions, some quarantined, some without any row."""
    rng = np.random.default_rng(1)
    labels = tuple("ABCDEFG")
    catalog = catalog_with(tmp_path, [(f"{n:03d}.mp4", labels[rng.integers(7)], "") for n in range(200)])
    truth = true_classes(catalog, labels)
    rows = []
    for video_id in catalog.table.column("video_id").to_pylist():
        fate = rng.random()
        ids = rng.permutation(7)[:5].tolist()
        if fate > 0.1:
            readable = fate > 0.2
            rows.append({"video_id": video_id, "status": "labelled" if readable else "quarantined"})
            rows[-1]["id_topk"] = ids if readable else None
            rows[-1]["score_topk"] = sorted(rng.random(5).tolist(), reverse=True) if readable else None
    rng.shuffle(rows)  # type: ignore[arg-type]
    answers = join_answers(catalog, truth, pa.Table.from_pylist(rows), 7)
    scores = answers.scores

    by_id = {row["video_id"]: row for row in rows}
    pairs = Counter()
    quarantined = missing = top5 = 0
    for video_id, label in zip(catalog.table.column("video_id").to_pylist(), truth, strict=True):
        row = by_id.get(video_id)
        if row is None:
            missing += 1
        elif row["status"] == "quarantined":
            quarantined += 1
        else:
            pairs[(int(label), row["id_topk"][0])] += 1
            top5 += int(label) in row["id_topk"]
    evaluated = 200 - quarantined - missing
    right = sum(count for (true, said), count in pairs.items() if true == said)
    assert min(quarantined, missing, right) > 0
    assert (scores.top1.evaluated, scores.quarantined, scores.missing) == (evaluated, quarantined, missing)
    assert scores.top1.value == right / evaluated
    assert scores.top5.value == top5 / evaluated
    assert scores.top1.of_all == right / 200
    assert scores.top1.coverage == evaluated / 200
    for row in range(7):
        of_class = [video for video in range(200) if truth[video] == row and answers.answered[video]]
        record = evaluation_record(answers, labels, NOWHERE).classes[row]
        hits = pairs[(row, row)]
        assert record.videos == len(of_class)
        assert record.top1 == hits / len(of_class)
        assert record.top1_interval == wilson_interval(hits, len(of_class))
        found = [row in by_id[answers.video_ids[video]]["id_topk"] for video in of_class]
        assert record.top5 == sum(found) / len(of_class)
    firsts = [np.float32(row["score_topk"][0]) for row in rows if row["score_topk"]]
    assert answers.calibration.mean_score == pytest.approx(np.mean(firsts, dtype=np.float64), abs=1e-9)
    wrong = sorted(((-count, *pair) for pair, count in pairs.items() if pair[0] != pair[1]))
    expected = [Confused(labels[true], labels[said], -count) for count, true, said in wrong[:8]]
    assert confused_classes(scores.confusion, labels, 8) == expected


def test_scores_of_nothing_readable_are_empty_and_not_an_error(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, [("a.mp4", "x", "")])
    nothing = [pa.array([None], pa.list_(kind)) for kind in (pa.int32(), pa.float32())]
    rows = pa.table({"video_id": ["a"], "status": ["quarantined"], "id_topk": nothing[0], "score_topk": nothing[1]})
    answers = join_answers(catalog, np.zeros(1, np.int64), rows, 6)
    scores = answers.scores
    assert (scores.top1.evaluated, scores.quarantined, scores.top1.of_all) == (0, 1, 0.0)
    assert confused_classes(scores.confusion, "abcdef", 10) == []
    record = json.loads(evaluation_record(answers, "abcdef", NOWHERE).to_json(), parse_constant=pytest.fail)
    assert (record["top1"], record["calibration"]["ece"], record["classes"][0]["top1"]) == (None, None, None)


@pytest.mark.ray
def test_evaluate_scores_the_split_and_writes_all_numbers(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    make_demo_set(videos, videos_per_class=4, seed=2)
    rows = [
        (str(path), path.parent.name, "val" if number % 4 else "train")
        for number, path in enumerate(sorted(videos.rglob("*.mp4")))
    ]
    bad = videos / "bad.mp4"
    bad.write_bytes(make_broken("random", Path(rows[0][0]).read_bytes()))
    catalog = catalog_with(tmp_path, [*rows, (str(bad), LABELS[0], "val")])
    save_catalog(LOCAL, str(tmp_path / "set" / "catalog.parquet"), catalog)
    checkpoint = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, CLIP, "label_models:mixing")
    config = EvaluateConfig(
        allow_factory=OWN_NETWORKS,
        catalog=str(tmp_path / "set" / "catalog.parquet"),
        checkpoint=checkpoint,
        out=str(tmp_path / "eval"),
        resources=ResourcesConfig(num_workers=1),
    )
    result = evaluate(config)
    said = capsys.readouterr().out

    label_of = {path: label for path, label, _ in rows}
    table = [row for row in read_predictions(LOCAL, config.out).to_pylist() if row["status"] == "labelled"]
    assert len(table) == 18
    assert {row["uri"] for row in table} == {path for path, _, split in rows if split == "val"}
    right = sum(row["label_topk"][0] == label_of[row["uri"]] for row in table)
    top5 = sum(label_of[row["uri"]] in row["label_topk"] for row in table)
    scores = result.scores
    assert (scores.top1, scores.top5) == (right / 18, top5 / 18)
    assert (scores.top1_of_all, scores.coverage) == (right / 19, 18 / 19)
    assert (scores.evaluated, scores.quarantined, scores.missing) == (18, 1, 0)
    assert scores.top1_interval == wilson_interval(right, 18)
    confusion = np.zeros((6, 6), int)
    for row in table:
        confusion[LABELS.index(label_of[row["uri"]]), LABELS.index(row["label_topk"][0])] += 1
    written = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert written["confusion"] == confusion.tolist()
    assert (written["top1"], written["evaluated"], written["predictions"]) == (
        right / 18,
        18,
        result.origin.predictions,
    )
    assert stored(tmp_path / "eval") == result
    assert f"evaluate: top-1 {right / 18:.1%} (95% interval " in said
    assert "19 videos = 18 evaluated + 1 quarantined + 0 missing (coverage 94.7%)" in said
    shares = [f"{confusion[index, index] / 3:.1%}" for index in range(6)]
    width = max(map(len, shares))
    for label, share in zip(LABELS, shares, strict=True):
        assert f"  {label:<13}  {share:>{width}}  of 3\n" in said
    first = result.confused[0]
    assert f"  {first.true} -> {first.predicted}: {first.videos}\n" in said

    (tmp_path / "eval" / "evaluation.json").unlink()
    with pytest.raises(TooManyBad, match="1 of 19 videos"):
        evaluate(replace(config, max_bad_fraction=0.0))
    assert stored(tmp_path / "eval") == result
    other = save_untrained(LOCAL, str(tmp_path / "other"), LABELS[:5], CLIP, "label_models:mixing")
    with pytest.raises(CheckpointMismatch, match="has 5 classes, the catalog 6"):
        evaluate(replace(config, checkpoint=other, out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()


def small_evaluation(folder: Path) -> EvaluateConfig:
    """Of 12 real videos by a network that is sensitive to everything, in six units."""
    videos = folder / "videos"
    make_demo_set(videos, videos_per_class=2, seed=3)
    rows = [(str(path), path.parent.name, "val") for path in sorted(videos.rglob("*.mp4"))]
    save_catalog(LOCAL, str(folder / "set" / "catalog.parquet"), catalog_with(folder, rows))
    return EvaluateConfig(
        allow_factory=OWN_NETWORKS,
        catalog=str(folder / "set" / "catalog.parquet"),
        checkpoint=save_untrained(LOCAL, str(folder / "run"), LABELS, CLIP, "label_models:mixing"),
        out=str(folder / "1"),
        protocol="5x3",
        unit_size=2,
    )


def label_here(config: EvaluateConfig) -> None:
    """Commit all units of an evaluation by a worker of this process, so that `evaluate` needs no Ray."""
    labelling = open_labelling(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=config.catalog,
            checkpoint=config.checkpoint,
            out=config.out,
            split=config.split,
            protocol=config.protocol,
            all_scores=True,
            unit_size=config.unit_size,
        ),
        "label",
    )
    worker = LabelUnits(labelling.job)
    for unit, rows in labelling.work(labelling.plan.units):
        (result,) = worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        assert result["error_text"] == ""


def test_evaluations_with_other_protocols_make_an_ensemble_and_a_comparison(tmp_path: Path) -> None:
    config = replace(small_evaluation(tmp_path), protocol="center")
    many = replace(config, out=str(tmp_path / "many"), protocol="10x3")
    for one in (config, many):
        label_here(one)
    single, record = evaluate(config), evaluate(many)
    assert (single.origin.views, record.origin.views, record.origin.protocol) == (1, 30, "10x3")
    assert single.origin.config_digest != record.origin.config_digest
    members = (config.out, many.out)
    both = evaluate(EvaluateConfig(catalog=config.catalog, ensemble=members, out=str(tmp_path / "both")))
    assert (both.scores.evaluated, both.origin.views) == (12, 31)
    tables = [{row["video_id"]: row for row in read_predictions(LOCAL, out).to_pylist()} for out in members]
    for row in read_predictions(LOCAL, str(tmp_path / "both")).to_pylist():
        mean = sum(np.array(table[row["video_id"]]["scores"]) for table in tables) / 2
        np.testing.assert_allclose(row["scores"], mean, rtol=1e-6)
    named = CompareConfig(
        a=members[0], b=members[1], catalog=config.catalog, out=str(tmp_path / "c.html"), frames_per_video=2
    )
    found = compare(named)
    assert found.paired.total == 12
    first, second = ([row["id_topk"][0] for row in table.values()] for table in tables)
    assert found.agreement == np.mean([a == b for a, b in zip(first, second, strict=True)])
    flips = len(found.gained) + len(found.lost)
    assert (tmp_path / "c.html").read_text().count("data:image/jpeg") == 2 * flips


def test_a_split_that_is_not_there_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        CatalogError, match=r"no video of split 'gone'; its splits are: .*; name one .* --split '' for all"
    ):
        evaluate(replace(small_evaluation(tmp_path), split="gone"))


def test_videos_without_any_label_are_told_so_before_another_split_is_proposed(tmp_path: Path) -> None:
    config = replace(small_evaluation(tmp_path), catalog=str(tmp_path / "videos"))
    with pytest.raises(CatalogError, match=r"12 of 12 videos have no label, .*to label videos use kinoray label"):
        evaluate(config)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven workers are started
def test_a_protocol_gives_the_same_digits_on_any_number_of_workers_and_after_a_kill(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_evaluation(tmp_path)

    def digits(workers: int) -> tuple[list[dict[str, object]], EvaluationRecord]:
        out = str(tmp_path / str(workers))
        record = evaluate(replace(config, out=out, resources=ResourcesConfig(num_workers=workers)))
        table = read_predictions(LOCAL, out).drop_columns(["run_id"]).to_pylist()
        return table, replace(record, origin=replace(record.origin, predictions=""))

    table, record = digits(1)
    assert (record.origin.protocol, record.origin.views, record.scores.evaluated) == ("5x3", 15, 12)
    assert {row["views"] for row in table} == {15}
    assert digits(2) == (table, record)
    shutil.copytree(tmp_path / "2", tmp_path / "4")
    parts = sorted(tmp_path.glob("4/*/parts/*.parquet"))
    assert len(parts) == 6
    for path in parts[:4]:  # as a kill leaves it
        path.unlink()
    capsys.readouterr()
    assert digits(4) == (table, record)
    assert "4 of 12 videos are labelled already, 8 to do" in capsys.readouterr().out
