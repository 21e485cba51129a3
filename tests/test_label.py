"""The labelling job: every input a row, exactly once, whatever dies. The ledger's own tests are test_predictions.py."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from conftest import wait_until
from kinoray.catalog.table import catalog_of_source
from kinoray.config.shared import (
    ClipConfig,
    InferenceConfig,
    ModelConfig,
    ResourcesConfig,
    SampleConfig,
    StorageConfig,
    ViewConfig,
)
from kinoray.console import Progress
from kinoray.demo.videos import BROKEN_KINDS, class_names, make_broken, make_demo_set
from kinoray.errors import (
    AccessDenied,
    CatalogError,
    CheckpointNotFound,
    ClusterError,
    ConfigError,
    MediaError,
    ModelError,
    StorageUnavailable,
    TooManyBad,
)
from kinoray.label.answers import AnswerRule, top_predictions
from kinoray.label.config import LabelConfig
from kinoray.label.job import run_units
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.open import open_labelling
from kinoray.label.plan import Plan
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.unit import Unit
from kinoray.label.verb import label
from kinoray.network.build import build_model
from kinoray.network.checkpoint import load_meta
from kinoray.network.scorer import ScorerConfig
from kinoray.storage.objects import Storage, join
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from label_models import save_untrained
from small_tables import job_record, planned
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
LABELS = tuple(class_names())
UNREADABLE = {"empty": "EmptyMedia", "random": "UnreadableContainer", "index_lost": "UnreadableContainer"}
UNREADABLE |= {"audio_only": "NoVideoStream"}
GOOD, NUM_VIDEOS = 54, 60
NUM_LABELLED = NUM_VIDEOS - len(UNREADABLE)
UNIT_SIZE = 4
UNITS = NUM_VIDEOS // UNIT_SIZE
LOCAL = Storage(StorageConfig())
ONE, TWO = ResourcesConfig(num_workers=1), ResourcesConfig(num_workers=2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 good videos in class folders, and one broken in each known way, spread among them."""
    folder = tmp_path_factory.mktemp("library")
    assert make_demo_set(folder, videos_per_class=GOOD // len(LABELS), seed=5) == GOOD
    for name, kind in zip(LABELS, BROKEN_KINDS, strict=True):
        good = (folder / name / f"{name}-0000.mp4").read_bytes()
        (folder / name / f"{name}-0002-{kind}.mp4").write_bytes(make_broken(kind, good))
    return folder


def make_checkpoint(storage: Storage, uri: str, factory: str = "label_models:mixing", **options: Any) -> str:
    return save_untrained(storage, uri, LABELS, CLIP, factory, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(LOCAL, str(tmp_path_factory.mktemp("run") / "checkpoint"))


def config_of(source: Path | str, checkpoint: str, out: Path | str, **changes: Any) -> LabelConfig:
    config = LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=str(source),
        checkpoint=checkpoint,
        out=str(out),
        unit_size=UNIT_SIZE,
        resources=TWO,
    )
    return replace(config, **changes)


def same_for_all(table: pa.Table) -> list[dict[str, Any]]:
    """All of a table that two jobs must agree on, exactly."""
    dropped = [name for name in ("run_id", "model_digest", "config_digest") if name in table.column_names]
    return table.drop_columns(dropped).sort_by("video_id").to_pylist()


def names_of(videos: Path) -> set[str]:
    return {str(path) for path in videos.rglob("*.mp4")}


# Without Ray: scores and the worker itself


def test_scores_are_the_softmax_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 4
    for row, result in zip(
        logits.astype(np.float64), top_predictions(logits, list("abcdefg"), AnswerRule(top_k=3)), strict=True
    ):
        p = [np.exp(x) / sum(np.exp(row)) for x in row]
        ranking = sorted(range(7), key=lambda index: -p[index])
        assert result["id_topk"] == ranking[:3]
        assert result["label_topk"] == ["abcdefg"[index] for index in ranking[:3]]
        np.testing.assert_allclose(result["score_topk"], [p[index] for index in ranking[:3]], rtol=1e-12)
        np.testing.assert_allclose(result["margin"], p[ranking[0]] - p[ranking[1]], rtol=1e-12)
        np.testing.assert_allclose(result["entropy"], -sum(x * np.log(x) for x in p), rtol=1e-12)


def test_equal_scores_rank_by_class_id_and_far_apart_logits_stay_finite() -> None:
    tie, far = top_predictions(
        np.array([[0, 2, 1, 2], [1e4, 0, -1e4, 0]], np.float32), list("abcd"), AnswerRule(top_k=4)
    )
    assert tie["id_topk"] == [1, 3, 2, 0]
    assert tie["margin"] == 0.0
    assert far["score_topk"] == [1.0, 0.0, 0.0, 0.0]
    assert (far["margin"], far["entropy"]) == (1.0, 0.0)
    (many,) = top_predictions(
        np.tile(np.float32([0, 1]), 200)[None], [str(index) for index in range(400)], AnswerRule(top_k=4)
    )
    assert many["id_topk"] == [1, 3, 5, 7]
    (single,) = top_predictions(np.array([[3.0]], np.float32), ["a"], AnswerRule())
    assert (single["score_topk"], single["margin"], single["entropy"]) == ([1.0], 1.0, 0.0)


class Faulty(Storage):
    """A store in which what has a marked name cannot be read."""

    def read(self, uri: str, *, max_bytes: int = 2**40) -> bytes:
        name = uri.rpartition("/")[2]
        if name.startswith("denied"):
            raise AccessDenied(f"{uri}: forbidden")
        if name.startswith("down"):
            raise StorageUnavailable(f"{uri}: still failing after 10 attempts")
        return super().read(uri, max_bytes=max_bytes)


class Bench:
    """One worker, in this process, on a folder of videos."""

    def __init__(self, folder: Path, checkpoint: str, root: Path, *, unit_size: int = 8, batch_size: int = 3) -> None:
        storage = Faulty(StorageConfig())
        self.catalog = catalog_of_source(storage, str(folder))
        self.ledger = Ledger(storage, str(root))
        self.ledger.pin_job(job_record(labels=load_meta(storage, checkpoint).labels))
        self.plan: Plan = planned(self.ledger, self.catalog.digest, row_keys(self.catalog.table), unit_size)
        self.job = LabelJob(
            allow_factory=OWN_NETWORKS,
            storage=storage,
            root=str(root),
            checkpoint=checkpoint,
            model_digest=load_meta(storage, checkpoint).model_digest,
            config_digest="c" * 16,
            run_id="r" * 16,
            clip=CLIP,
            answer=AnswerRule(top_k=3),
            scorer=ScorerConfig(batch_size=batch_size),
            num_decoders=2,
            torch_threads=1,
        )
        self.worker = LabelUnits(self.job)

    def work(self) -> list[dict[str, Any]]:
        """Feed all units, in one batch a unit, and return the worker's rows."""
        results = []
        start = 0
        for unit in self.plan.units:
            rows = self.catalog.table.slice(start, len(unit.keys))
            start += len(unit.keys)
            results += self.worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        return results


def test_a_worker_writes_what_a_plain_loop_computes(library: Path, checkpoint: str, tmp_path: Path) -> None:
    """Reference: decode one after the other, batches of 3 good videos inside each unit of 8, softmax by torch."""
    bench = Bench(library, checkpoint, tmp_path / "out")
    torch.manual_seed(7)
    model = build_model(ModelConfig(factory="label_models:mixing"), len(LABELS))
    expected: dict[str, tuple[torch.Tensor, int] | str] = {}
    uris = bench.catalog.table.column("uri").to_pylist()
    for start in range(0, len(uris), 8):
        good = []
        for uri in uris[start : start + 8]:
            try:
                good.append((uri, decode(Path(uri).read_bytes(), Sampled(), CLIP).clip()))
            except MediaError as error:
                expected[uri] = type(error).__name__
        for first in range(0, len(good), 3):
            batch = good[first : first + 3]
            rgb = torch.stack([(torch.from_numpy(clip.frames) / 255.0 - 0.5) / 0.25 for _, clip in batch])
            flow = torch.stack([torch.from_numpy(clip.flow) / 127.0 for _, clip in batch])
            with torch.no_grad():
                p = model(rgb=rgb, flow=flow).double().softmax(dim=1)
            expected |= {uri: (row, clip.frames_decoded) for (uri, clip), row in zip(batch, p, strict=True)}

    results = bench.work()
    assert [row["error_class"] for row in results] == [""] * 8
    assert sum(row["rows"] for row in results) == NUM_VIDEOS
    assert sum(row["quarantined"] for row in results) == len(UNREADABLE)
    table = pa.concat_tables(bench.ledger.read_units(bench.plan.units)).to_pylist()
    assert [row["uri"] for row in table] == uris
    for row in table:
        truth = expected[row["uri"]]
        if isinstance(truth, str):
            assert (row["status"], row["error_class"], row["views"]) == ("quarantined", truth, 0)
            assert row["error_text"]
            assert row["label_topk"] is None
            continue
        scores, ids = truth[0].topk(3)
        assert (row["status"], row["error_class"], row["views"]) == ("labelled", None, 1)
        assert row["id_topk"] == ids.tolist()
        assert row["label_topk"] == [LABELS[index] for index in ids]
        np.testing.assert_allclose(row["score_topk"], scores.numpy(), rtol=1e-5)
        assert row["frames_decoded"] == truth[1]
    quarantined = {row["uri"].rpartition("-")[2]: row["error_class"] for row in table if row["status"] != "labelled"}
    assert quarantined == {f"{kind}.mp4": reason for kind, reason in UNREADABLE.items()}


def copy_as(library: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    good = sorted(library.rglob(f"{LABELS[0]}-000[0-9].mp4"))
    for name, path in zip(names, good, strict=False):
        (folder / f"{name}.mp4").write_bytes(path.read_bytes())
    return folder


def test_what_was_moved_away_or_is_forbidden_is_a_row(library: Path, checkpoint: str, tmp_path: Path) -> None:
    videos = copy_as(library, tmp_path / "videos", "a", "denied", "gone", "z")
    bench = Bench(videos, checkpoint, tmp_path / "out")
    (videos / "gone.mp4").unlink()
    assert bench.work()[0]["quarantined"] == 2
    (table,) = bench.ledger.read_units(bench.plan.units)
    assert table.column("error_class").to_pylist() == [None, "AccessDenied", "ObjectNotFound", None]


@pytest.mark.parametrize(
    ("names", "error_class", "message"),
    [
        (["denied-1", "denied-2"], "AccessDenied", "none of the 2 videos of a unit may be read"),
        (["a", "down", "z"], "StorageUnavailable", "down.mp4: still failing after 10 attempts"),
    ],
)
def test_a_store_that_fails_ends_the_job_and_quarantines_nothing(
    library: Path, checkpoint: str, tmp_path: Path, names: list[str], error_class: str, message: str
) -> None:
    bench = Bench(copy_as(library, tmp_path / "videos", *names), checkpoint, tmp_path / "out")
    (result,) = bench.work()
    assert result["error_class"] == error_class
    assert message in result["error_text"]
    assert bench.ledger.committed() == set()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "NaN or infinite logits for 1 of 2 clips"),
        ("inf", "NaN or infinite logits for 1 of 2 clips"),
        ("-inf", "NaN or infinite logits for 1 of 2 clips"),
        ("wide", r"the model gave logits \[2, 7\], expected \[2, 6\]"),
        ("raises", r"the model failed on a batch .*'rgb': \[2, 1, 2, 3, 32, 32\].*: out of memory"),
    ],
)
def test_a_model_that_fails_commits_nothing(library: Path, tmp_path: Path, how: str, message: str) -> None:
    checkpoint = make_checkpoint(LOCAL, str(tmp_path / "checkpoint"), "label_models:wrong", how=how)
    bench = Bench(copy_as(library, tmp_path / "videos", "a", "b"), checkpoint, tmp_path / "out")
    (result,) = bench.work()
    assert result["error_class"] == "ModelError"
    with pytest.raises(ModelError, match=message):
        raise ModelError(result["error_text"])
    assert bench.ledger.committed() == set()


def test_a_committed_unit_is_not_read_again(library: Path, checkpoint: str, tmp_path: Path) -> None:
    videos = copy_as(library, tmp_path / "videos", "a", "b")
    bench = Bench(videos, checkpoint, tmp_path / "out")
    first = bench.work()
    for path in videos.iterdir():
        path.unlink()
    counts = ("unit_id", "rows", "quarantined", "error_class")
    assert [[row[name] for name in counts] for row in bench.work()] == [[row[name] for name in counts] for row in first]


def test_a_checkpoint_that_is_replaced_under_way_is_noticed(library: Path, checkpoint: str, tmp_path: Path) -> None:
    bench = Bench(copy_as(library, tmp_path / "videos", "a"), checkpoint, tmp_path / "out")
    bench.worker = LabelUnits(replace(bench.job, model_digest="0" * 16))
    (result,) = bench.work()
    assert result["error_class"] == "CheckpointMismatch"
    assert "was replaced while the job ran" in result["error_text"]


# Without Ray: what is refused before it starts


def test_a_wrong_source_checkpoint_or_setting_is_named(library: Path, checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="empty"):
        label(config_of(tmp_path / "empty", checkpoint, out))
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        label(config_of(library, str(tmp_path / "nowhere"), out))
    with pytest.raises(CatalogError, match="split 'test'"):
        label(config_of(library, checkpoint, out, split="test"))
    assert not out.exists()


def test_another_setting_is_another_labelling(
    library: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(library, checkpoint, tmp_path / "out")
    first = open_labelling(config, "label")
    assert open_labelling(replace(config, resources=ONE, unit_size=7), "label").plan == first.plan
    assert "stay apart" not in capsys.readouterr().out
    bf16, wide = InferenceConfig(precision="bf16"), ResourcesConfig(cpus_per_worker=2.0)
    changes: list[dict[str, Any]] = [{"num_segments": 3}, {"top_k": 2}, {"resources": wide}, {"inference": bf16}]
    others = [replace(config, **change) for change in changes]
    opened = [open_labelling(other, "label") for other in others]
    assert opened[0].job.clip == replace(CLIP, sample=replace(CLIP.sample, num_segments=3))
    assert len({labelling.ledger.root for labelling in [first, *opened]}) == 5
    said = capsys.readouterr().out
    assert said.count("stay apart") == 4
    assert first.ledger.root in said.partition("stay apart")[0]
    with pytest.raises(ConfigError, match="holds 5"):
        read_predictions(LOCAL, config.out)


# With Ray


@pytest.fixture(scope="module")
def undisturbed(
    library: Path, checkpoint: str, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """What one quiet run with one worker says."""
    out = tmp_path_factory.mktemp("undisturbed")
    return label(config_of(library, checkpoint, out, resources=ONE)), out


@pytest.mark.ray
def test_every_input_is_a_row(library: Path, undisturbed: tuple[dict[str, Any], Path]) -> None:
    totals, out = undisturbed
    assert (totals["inputs"], totals["labelled"], totals["quarantined"], totals["skipped"]) == (60, 56, 4, 0)
    assert totals["reasons"] == {"EmptyMedia": 1, "NoVideoStream": 1, "UnreadableContainer": 2}
    table = read_predictions(LOCAL, str(out))
    assert table.num_rows == NUM_VIDEOS
    assert set(table.column("uri").to_pylist()) == names_of(library)
    assert len(set(table.column("video_id").to_pylist())) == NUM_VIDEOS
    labelled = [row for row in table.to_pylist() if row["status"] == "labelled"]
    assert len({tuple(row["score_topk"]) for row in labelled}) == len(labelled)  # no row is another's
    done = json.loads(Path(totals["root"], "done", f"{totals['catalog_digest']}.json").read_text())
    assert (done["inputs"], len(done["units"])) == (NUM_VIDEOS, UNITS)
    job = json.loads(Path(totals["root"], "job.json").read_text())
    assert job["labels"] == list(LABELS)
    assert job["settings"]["clip"]["sample"]["frames_per_segment"] == 2


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_and_two_jobs_at_once_give_the_table_of_one(
    library: Path, checkpoint: str, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Two jobs of two workers each, started together on one --out."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as pool:
        totals = list(pool.map(lambda _: label(config_of(library, checkpoint, out)), range(2)))
    for result in totals:
        assert {**result, "run_id": "", "root": ""} == {**undisturbed[0], "run_id": "", "root": ""}
    assert len(list(Path(totals[0]["root"], "parts").iterdir())) == UNITS
    assert same_for_all(read_predictions(LOCAL, str(out))) == same_for_all(read_predictions(LOCAL, str(undisturbed[1])))


def is_alive(process_id: int) -> bool:
    """Whether the process runs (an ended one may be a zombie until its parent looks)."""
    stat = Path(f"/proc/{process_id}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


class Held:
    """A checkpoint whose model notes every batch, here one clip, and, after `hold_after` of them, waits for `go`."""

    def __init__(self, folder: Path, hold_after: int) -> None:
        self.journal = folder / "journal"
        self.checkpoint = make_checkpoint(LOCAL, str(folder / "held"), journal=str(self.journal), hold_after=hold_after)

    def batches(self) -> list[int]:
        """Process ids of the batches that were begun."""
        return [int(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def go(self) -> None:
        Path(f"{self.journal}.go").touch()

    def when_held(self, num_batches: int, action: Callable[[], None]) -> threading.Thread:
        """Run the action, then let go, once that many batches were begun."""

        def wait() -> None:
            try:
                wait_until(lambda: len(self.batches()) >= num_batches, 200, "the model is held")
                action()
            finally:
                self.go()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_repeats_only_what_was_in_flight(
    library: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    held = Held(tmp_path, hold_after=6 * UNIT_SIZE)
    command = [sys.executable, "-m", "kinoray", "label", str(library), "--checkpoint", held.checkpoint]
    command += ["--allow-factory", "label_models:mixing"]
    command += ["--out", str(out), "--unit-size", str(UNIT_SIZE), "--resources.num-workers", "2"]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: len(held.batches()) > 6 * UNIT_SIZE, 200, f"the model is held; see {log.name}")
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    # Its Ray notices and ends; until then a worker may still finish what it has begun.
    wait_until(lambda: not any(is_alive(process_id) for process_id in held.batches()), 60, "its workers are gone")
    (parts,) = out.glob("*/parts")
    finished = {path.name: path.read_bytes() for path in parts.glob("*.parquet")}
    assert 4 <= len(finished) <= 8  # units of four clips, or three and a broken one; two were in flight
    held.go()

    totals = label(config_of(library, held.checkpoint, out))
    assert f"{len(finished) * UNIT_SIZE} of {NUM_VIDEOS} videos are labelled already" in capsys.readouterr().out
    assert {name: (parts / name).read_bytes() for name in finished} == finished
    assert totals["inputs"] == NUM_VIDEOS
    assert same_for_all(read_predictions(LOCAL, str(out))) == same_for_all(read_predictions(LOCAL, str(undisturbed[1])))
    assert NUM_LABELLED < len(held.batches()) <= NUM_LABELLED + 2 * UNIT_SIZE  # two workers, so two units in flight


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced(library: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    held = Held(tmp_path, hold_after=6 * UNIT_SIZE)
    killer = held.when_held(6 * UNIT_SIZE + 1, lambda: os.kill(held.batches()[-1], signal.SIGKILL))
    label(config_of(library, held.checkpoint, tmp_path / "out", resources=ONE))
    killer.join()
    assert len(set(held.batches())) == 2  # the worker, and the one that took its place
    assert NUM_LABELLED < len(held.batches()) <= NUM_LABELLED + UNIT_SIZE
    table = read_predictions(LOCAL, str(tmp_path / "out"))
    assert same_for_all(table) == same_for_all(read_predictions(LOCAL, str(undisturbed[1])))


@pytest.mark.slow
@pytest.mark.ray
def test_a_grown_folder_labels_what_is_new_and_a_finished_job_nothing(
    library: Path, ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is new has a broken file in it, of which max_bad_fraction allows none."""
    held = Held(tmp_path, hold_after=10**9)
    videos = copy_as(library, tmp_path / "videos", "b", "c", "d", "e", "f", "g")
    config = config_of(videos, held.checkpoint, tmp_path / "out", resources=ONE, max_bad_fraction=0.0)
    label(config)
    assert len(held.batches()) == 6
    (videos / "a.mp4").write_bytes((videos / "b.mp4").read_bytes())
    (videos / "bad.mp4").write_bytes(b"")
    with pytest.raises(TooManyBad, match=r"1 of 8 videos \(12.5%\) .* allows 0.0%: EmptyMedia 1; the table in .*"):
        label(config)
    assert "6 of 8 videos are labelled already, 2 to do" in capsys.readouterr().out
    assert len(held.batches()) == 7
    assert label(replace(config, max_bad_fraction=0.125))["labelled"] == 7
    assert "8 of 8 videos are labelled already, 0 to do" in capsys.readouterr().out
    assert len(held.batches()) == 7
    ids = read_predictions(LOCAL, str(tmp_path / "out")).column("video_id").to_pylist()
    assert sorted(ids) == ["a", "b", "bad", "c", "d", "e", "f", "g"]


@pytest.mark.ray
def test_label_on_s3(
    library: Path,
    undisturbed: tuple[dict[str, Any], Path],
    bucket: str,
    s3_config: StorageConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = Storage(s3_config)
    for path in sorted(library.rglob("*.mp4")):
        storage.put(join(bucket, "library", str(path.relative_to(library))), path.read_bytes())
    checkpoint = make_checkpoint(storage, join(bucket, "run", "checkpoint"))
    out = join(bucket, "labels")
    totals = label(config_of(join(bucket, "library/"), checkpoint, out, storage=s3_config, resources=ONE))
    assert totals["inputs"] == totals["labelled"] + totals["quarantined"] == NUM_VIDEOS
    table = read_predictions(storage, out)
    assert all(uri.startswith(f"{bucket}/library/") for uri in table.column("uri").to_pylist())
    local = read_predictions(LOCAL, str(undisturbed[1]))
    differ = {"uri", "row_key", "error_text"}
    for found, expected in zip(same_for_all(table), same_for_all(local), strict=True):
        assert {name: found[name] for name in found if name not in differ} == {
            name: expected[name] for name in expected if name not in differ
        }
    said = capsys.readouterr().out
    assert "60 inputs = 56 labelled + 4 quarantined + 0 skipped" in said
    assert "quarantined: EmptyMedia 1, NoVideoStream 1, UnreadableContainer 2" in said


@pytest.mark.slow
@pytest.mark.ray
def test_a_unit_that_kills_worker_after_worker_ends_the_job_in_one_error(
    library: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kinoray.label.job._MAX_DEATHS", 2)
    checkpoint = make_checkpoint(LOCAL, str(tmp_path / "checkpoint"), "label_models:wrong", how="dies")
    videos = copy_as(library, tmp_path / "videos", "a", "b", "c")
    with pytest.raises(
        ClusterError, match=r"2 workers died at the same unit, \w{16} \(3 videos\): .*; what is committed"
    ):
        label(config_of(videos, checkpoint, tmp_path / "out", resources=ONE))
    assert capsys.readouterr().out.count("a worker was lost, and its unit is done again: ") == 1
    wait_until(lambda: ray.available_resources().get("CPU") == 4.0, 30, "the failed job's workers are given back")


@pytest.mark.ray
def test_units_are_taken_when_a_worker_is_about_to_be_free(
    library: Path, checkpoint: str, ray_local: None, tmp_path: Path
) -> None:
    """So that the driver holds nothing that grows with the catalog."""
    labelling = open_labelling(config_of(library, checkpoint, tmp_path / "out"), "label")
    units, taken = labelling.plan.units, []

    def work() -> Iterator[tuple[Unit, pa.Table]]:
        for unit, rows in labelling.work(units):
            taken.append(unit.unit_id)
            yield unit, rows

    progress, done = Progress(NUM_VIDEOS, "label", "videos"), []
    for counts in run_units(labelling, work(), len(units), TWO, "label", progress):
        done.append(counts["unit_id"])
        assert len(taken) <= len(done) + 2  # one that the other worker has, and one that comes next
    assert sorted(done) == sorted(taken) == sorted(unit.unit_id for unit in units)
    assert labelling.ledger.check(labelling.plan, labelling.found.keys).inputs == NUM_VIDEOS


@pytest.mark.ray
def test_what_a_worker_cannot_do_ends_the_job_in_one_error(library: Path, ray_local: None, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(LOCAL, str(tmp_path / "checkpoint"), "label_models:wrong", how="nan")
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        label(config_of(library, checkpoint, tmp_path / "out", resources=ONE))
    assert read_predictions(LOCAL, str(tmp_path / "out")).num_rows == 0
    strict = make_checkpoint(LOCAL, str(tmp_path / "strict"), "label_models:two_segments")
    with pytest.raises(ConfigError, match=r"protocol center: clip.sample.num_segments must be 2 for this model, got 1"):
        label(config_of(library, strict, tmp_path / "refused", resources=ONE))
    assert not list((tmp_path / "refused").rglob("*"))  # what only a worker finds comes before anything is written
    with pytest.raises(ClusterError, match=r"99 workers x 1 CPU = 99 CPU, but the cluster has 4"):
        label(config_of(library, checkpoint, tmp_path / "out", resources=ResourcesConfig(num_workers=99)))
    wait_until(lambda: ray.available_resources().get("CPU") == 4.0, 30, "the failed job's workers are given back")
