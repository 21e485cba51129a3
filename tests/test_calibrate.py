"""`kinoray calibrate` from videos to the file, and `label` with it; units are committed here, so Ray is not needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinoray.catalog.table import catalog_of_source, save_catalog
from kinoray.config.shared import ClipConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import class_names, make_demo_set
from kinoray.errors import CatalogError, CheckpointMismatch, ConfigError
from kinoray.evaluation.calibrate import (
    best_threshold,
    binary_likelihood_and_error,
    calibrate,
    doubts,
    fit_binary_temperature,
    fit_margins,
    fit_temperature,
    logits_of,
)
from kinoray.evaluation.config import CalibrateConfig, EvaluateConfig
from kinoray.evaluation.metrics import average_precisions, f1_of
from kinoray.evaluation.multilabel import MultilabelRecord
from kinoray.evaluation.record import read_evaluation
from kinoray.evaluation.verb import evaluate
from kinoray.label.answers import Calibrated, load_calibration
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.storage.objects import Storage
from label_models import save_untrained

S, T = 4, 2
CLIP = ClipConfig(sample=SampleConfig(num_segments=S, frames_per_segment=T), view=ViewConfig(resize_px=36, crop_px=32))
LABELS = tuple(class_names())
LOCAL = Storage(StorageConfig())


def commit_here(config: LabelConfig) -> None:
    """All units, by a worker of this process."""
    labelling = open_labelling(config, "label")
    worker = LabelUnits(labelling.job)
    for unit, rows in labelling.work(labelling.plan.units):
        (result,) = worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        assert result["error_text"] == ""


@pytest.fixture
def config(tmp_path: Path) -> CalibrateConfig:
    make_demo_set(tmp_path / "videos", videos_per_class=3, seed=9)
    paths = sorted((tmp_path / "videos").rglob("*.mp4"))
    lines = ["path,label,split", *(f"{path},{path.parent.name},val" for path in paths)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    save_catalog(LOCAL, str(tmp_path / "set" / "catalog.parquet"), catalog_of_source(LOCAL, str(tmp_path / "list.csv")))
    options = {"backbone": "tiny", "heads": 4, "consensus": "probs"}
    run = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, CLIP, "vcm_sdd", **options)
    return CalibrateConfig(
        catalog=str(tmp_path / "set" / "catalog.parquet"), checkpoint=run, out=str(tmp_path / "calibration")
    )


def labelling_of(config: CalibrateConfig, *, segment_scores: bool = False) -> LabelConfig:
    """The labelling that `calibrate` makes."""
    return LabelConfig(
        source=config.catalog,
        checkpoint=config.checkpoint,
        out=config.out,
        split=config.split,
        all_scores=True,
        segment_scores=segment_scores,
    )


def test_the_file_holds_what_the_stored_segments_give_and_label_uses_it(
    config: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_here(labelling_of(config, segment_scores=True))
    found = calibrate(config)
    uri = tmp_path / "calibration" / "calibration.json"
    assert load_calibration(LOCAL, str(uri), found.model_digest) == found
    record = json.loads(uri.read_text())
    assert (record["num_videos"], record["num_segments"], record["frames_per_segment"]) == (18, S, T)
    rows = read_predictions(LOCAL, config.out).to_pylist()
    truth = np.array([LABELS.index(Path(row["uri"]).parent.name) for row in rows])
    logits = np.log(np.array([row["scores"] for row in rows], np.float64))
    assert record["temperature"] == pytest.approx(fit_temperature(logits, truth))
    segments = np.array([row["segment_logits"] for row in rows], np.float32).reshape(18, S, len(LABELS))
    mean = np.exp(segments.astype(np.float64)).mean(axis=1)
    np.testing.assert_allclose(mean, np.exp(logits), rtol=1e-4)
    points = fit_margins(segments, "probs")
    assert [point["margin"] for point in record["margins"]] == [point.margin for point in points]
    said = capsys.readouterr().out
    assert f"temperature {record['temperature']:.3f} on 18 videos" in said
    assert f"--calibration {uri}" in said

    labels = LabelConfig(source=str(tmp_path / "videos"), checkpoint=config.checkpoint, out=str(tmp_path / "labels"))
    early = replace(labels, calibration=str(uri), early_exit="margin", max_changed=0.01)
    job = open_labelling(early, "label").job
    assert job.answer.temperature == pytest.approx(record["temperature"])
    assert job.scorer.early_exit is not None
    assert job.scorer.early_exit.margin == next(point.margin for point in points if point.max_changed == 0.01)
    commit_here(early)
    kept = {row["video_id"].rpartition("__")[2]: row for row in read_predictions(LOCAL, early.out).to_pylist()}
    point = next(point for point in points if point.max_changed == 0.01)
    run = sum(row["segments_run"] for row in kept.values())
    assert run == round((1 - point.segments_saved) * 18 * S)
    with pytest.raises(ConfigError, match="calibration was made for 4 x 2 frames, this labelling has 8 x 6"):
        open_labelling(replace(early, protocol="8x6"), "label")
    other = save_untrained(LOCAL, str(tmp_path / "other"), LABELS, CLIP, "vcm_sdd", backbone="tiny", heads=2)
    with pytest.raises(CheckpointMismatch, match="run kinoray calibrate with this checkpoint"):
        open_labelling(replace(early, checkpoint=other), "label")
    (tmp_path / "list.csv").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not the calibration\.json of kinoray calibrate"):
        open_labelling(replace(early, calibration=str(tmp_path / "list.csv")), "label")


def test_a_network_that_sees_its_segments_together_gets_a_temperature_only(
    config: CalibrateConfig, tmp_path: Path
) -> None:
    run = save_untrained(LOCAL, str(tmp_path / "tsm"), LABELS, CLIP, "tsm", backbone="tiny")
    config = replace(config, checkpoint=run)
    commit_here(labelling_of(config))
    found = calibrate(config)
    assert found.margins == ()
    assert 0.05 <= found.temperature <= 20
    assert found.nll[1] <= found.nll[0]


def test_a_fit_that_is_not_to_be_trusted_is_doubted() -> None:
    good = Calibrated(
        model_digest="m",
        num_segments=S,
        frames_per_segment=T,
        num_videos=1000,
        temperature=1.5,
        nll=(1.0, 0.9),
        ece=(0.06, 0.04),
        margins=(),
    )
    assert doubts(good) == []
    few, limit, worse = doubts(replace(good, num_videos=16, temperature=19.99, ece=(0.041, 0.061)))
    assert "16 videos are few; fit on 1,000 or more" in few
    assert "at its limit (0.05 .. 20)" in limit
    assert "the calibration error has grown" in worse
    (low,) = doubts(replace(good, temperature=0.05))
    assert "at its limit" in low


# Several classes a video


def test_the_threshold_of_a_class_is_that_of_its_highest_f1() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        scores = rng.integers(0, 12, 15) / 12
        truth = rng.random(15) < scores
        if not truth.any():
            assert best_threshold(scores, truth) == 0.5
            continue

        def f1(least: float, scores: np.ndarray = scores, truth: np.ndarray = truth) -> float:
            called = scores >= least
            return f1_of(int(truth.sum()), int(called.sum()), int((truth & called).sum()))[0] or 0.0

        found = best_threshold(scores, truth)
        best = max(f1(level) for level in np.unique(scores))
        assert f1(found) == best
        assert found not in scores
        assert all(f1(level) < best for level in np.unique(scores) if level > found and f1(level) != f1(found))


def test_the_temperature_of_label_lists_has_the_lowest_cross_entropy() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 4, (300, 5))
    truth = rng.random((300, 5)) < 1 / (1 + np.exp(-logits / 2.5))
    found = fit_binary_temperature(logits, truth)
    assert found == pytest.approx(2.5, rel=0.15)
    best, error = binary_likelihood_and_error(logits, truth, found)
    p = 1 / (1 + np.exp(-logits / found))
    assert best == pytest.approx(-np.where(truth, np.log(p), np.log(1 - p)).mean(), rel=1e-9)
    assert error < binary_likelihood_and_error(logits, truth, 1.0)[1]
    for other in (found * 0.99, found * 1.01):
        assert binary_likelihood_and_error(logits, truth, other)[0] > best
    np.testing.assert_allclose(logits_of((1 / (1 + np.exp(-logits))).astype(np.float32)), logits, atol=0.2)
    assert np.isfinite(logits_of(np.array([0.0, 1.0], np.float32))).all()


def test_label_lists_are_scored_calibrated_and_labelled_with_a_threshold_a_class(
    config: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted again from the stored scores; labelling with the file names what its thresholds say."""
    names = ("moves", "round", "square")
    paths = sorted((tmp_path / "videos").rglob("*.mp4"))
    sets = [[name for bit, name in enumerate(names) if index >> bit & 1] for index in range(len(paths))]
    lines = [f"{path},{'|'.join(found) or '|'},val" for path, found in zip(paths, sets, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,labels,split", *lines]))
    save_catalog(LOCAL, config.catalog, catalog_of_source(LOCAL, str(tmp_path / "list.csv")))
    options = {"backbone": "tiny", "heads": 4}
    run = save_untrained(LOCAL, str(tmp_path / "several"), names, CLIP, "vcm_sdd", scores="sigmoid", **options)
    config = replace(config, checkpoint=run)
    commit_here(labelling_of(config))
    (ledger,) = (path for path in (tmp_path / "calibration").iterdir() if path.is_dir())
    ask = EvaluateConfig(catalog=config.catalog, checkpoint=run, out=config.out)
    record = evaluate(ask)
    assert isinstance(record, MultilabelRecord)
    rows = read_predictions(LOCAL, config.out).to_pylist()
    of_video = {path.stem: found for path, found in zip(paths, sets, strict=True)}
    truth = np.array([[name in of_video[row["video_id"].rpartition("__")[2]] for name in names] for row in rows])
    scores = np.array([row["scores"] for row in rows])
    assert [row["label_topk"] == [] for row in rows] == [bool((row["scores"] < np.array(0.5)).all()) for row in rows]
    known = average_precisions(scores, truth)
    assert [item.ap for item in record.classes] == pytest.approx(known.tolist())
    assert record.map == pytest.approx(known.mean())
    assert record.map_interval[0] < record.map < record.map_interval[1]
    called = scores >= 0.5
    assert record.exact == pytest.approx((called == truth).all(axis=1).mean())
    assert [item.right for item in record.classes] == (called & truth).sum(axis=0).tolist()
    assert (record.evaluated, record.coverage, record.total) == (18, 1.0, 18)
    assert json.loads((ledger / "evaluation.json").read_text())["kind"] == "multilabel"
    with pytest.raises(ConfigError, match="this takes evaluations of one class a video"):
        read_evaluation(LOCAL, config.out)

    found = calibrate(config)
    file = str(tmp_path / "calibration" / "calibration.json")
    assert load_calibration(LOCAL, file, found.model_digest) == found
    assert (len(found.thresholds), found.margins) == (3, ())
    assert found.macro_f1 is not None
    assert found.macro_f1[1] >= found.macro_f1[0]
    labels = LabelConfig(source=config.catalog, checkpoint=run, out=str(tmp_path / "labels"), calibration=file)
    commit_here(labels)
    for row in read_predictions(LOCAL, labels.out).to_pylist():
        (before,) = (np.array(old["scores"]) for old in rows if old["row_key"] == row["row_key"])
        cooled = 1 / (1 + np.exp(-np.log(before / (1 - before)) / found.temperature))
        expected = [name for name, p, least in zip(names, cooled, found.thresholds, strict=True) if p >= least]
        assert sorted(row["label_topk"]) == expected
        assert row["abstained"] == (not expected)
    said = capsys.readouterr().out
    assert "evaluate: mAP " in said
    assert "one a class: mean F1 " in said
    assert "no video of the set is of" not in said
    with pytest.raises(ConfigError, match="early_exit must be off with sigmoid scores"):
        open_labelling(replace(labels, calibration="", early_exit="exact", num_segments=2), "label")
    (tmp_path / "list.csv").write_text("\n".join(["path,labels,split", *lines[:3], f"{paths[3]},|,val"]))
    fewer = replace(config, catalog=str(tmp_path / "fewer.parquet"), out=str(tmp_path / "fewer"))
    save_catalog(LOCAL, fewer.catalog, catalog_of_source(LOCAL, str(tmp_path / "list.csv")))
    commit_here(labelling_of(fewer))
    assert calibrate(fewer).thresholds[2] == 0.5
    said = capsys.readouterr().out
    assert "calibrate: warning: no video of the set is of square: from 0.5 on a video is called so" in said
    plain = save_untrained(LOCAL, str(tmp_path / "plain"), names, CLIP, "vcm_sdd", **options)
    with pytest.raises(CatalogError, match="the videos have label lists, and this checkpoint gives each one class"):
        evaluate(replace(ask, checkpoint=plain))
    assert "scores" not in json.loads((tmp_path / "plain" / "checkpoint.json").read_text())["meta"]
