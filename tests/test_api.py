"""The names that a Python program calls: what they say, that they are quiet and light, and that their digits are the
job's."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import boto3
import numpy as np
import pyarrow as pa
import pytest
import torch

import kinoray
from conftest import ROOT, bucket_at
from decode_reference import moving
from kinoray.catalog.table import catalog_of_source
from kinoray.cli import main
from kinoray.config.shared import ClipConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import CatalogError, ConfigError, ObjectNotFound
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.video.sandbox.pool import shared_sandbox
from label_models import save_untrained
from small_sets import LABELS, colour_set

LOCAL = Storage(StorageConfig())
CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of several sizes and lengths, one of them broken."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(make_video(moving(9 + number, 48 + 8 * number, 64, number)))
    (folder / "broken.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained VCM-SDD whose rounding would show in another batch or with other threads."""
    uri = str(tmp_path_factory.mktemp("run") / "checkpoint")
    options = {"backbone": "tiny", "consensus": "probs", "scale": "dim"}
    return save_untrained(LOCAL, uri, LABELS, CLIP, "vcm_sdd", **options)


def children(of: int) -> set[int]:
    """Processes whose parent it is."""
    return {int(pid) for task in Path(f"/proc/{of}/task").iterdir() for pid in (task / "children").read_text().split()}


# What `import kinoray` is


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(kinoray.__file__).read_text(encoding="utf-8"))
    (choice,) = (node for node in tree.body if isinstance(node, ast.If))
    (seen,) = choice.body
    assert isinstance(seen, ast.ImportFrom)
    assert {alias.name for alias in seen.names} | {"__version__"} == set(kinoray.__all__)
    assert set(kinoray.__all__) <= set(dir(kinoray))
    from kinoray import api

    assert set(api.__all__) | {"__version__"} == set(kinoray.__all__)
    for name in api.__all__:
        assert callable(getattr(kinoray, name)), name
    with pytest.raises(AttributeError, match="no attribute 'labels'"):
        kinoray.labels  # noqa: B018


def test_folders_of_the_package_stay_modules_that_can_be_called() -> None:
    import kinoray.label.config
    import kinoray.train.config

    for folder in (kinoray.label, kinoray.train):
        assert isinstance(folder, ModuleType)
        assert folder.config.__name__ == f"{folder.__name__}.config"
    with pytest.raises(ConfigError, match="out must be a run folder"):
        kinoray.train("set")


def test_importing_kinoray_takes_no_time() -> None:
    code = (
        "import sys, time; before, begin = set(sys.modules), time.process_time(); import kinoray; "
        "print(time.process_time() - begin, *{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, *imported = min((run.stdout.split() for run in runs), key=lambda words: float(words[0]))
    assert float(seconds) < 0.1
    assert set(imported) <= {"kinoray"} | sys.stdlib_module_names


# predict


def test_a_path_gives_a_prediction_and_a_list_gives_a_list_in_order(
    library: Path, checkpoint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with kinoray.load(checkpoint, top_k=2, embeddings=True) as model:
            one = model.predict(library / "1.mp4")
            several = model.predict(iter([str(library / "broken.mp4"), library / "1.mp4", library / "absent.mp4"]))
            none = model.predict([])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert model.labels == LABELS
    assert repr(model) == f"Model({checkpoint!r}, 3 classes)"
    assert (one.uri, one.status, one.error_class) == (str(library / "1.mp4"), "labelled", None)
    assert (one.label, one.score) == one.top[0]
    assert len(one.top) == 2
    assert one.score is not None
    assert one.score >= one.top[1][1] > 0
    assert (one.views, one.frames_corrupt, one.abstained) == (1, 0, False)
    assert one.duration_s == pytest.approx(10 / 8, rel=0.5)
    assert one.embedding is not None
    assert one.embedding.dtype == np.float16
    assert repr(one) == f"Prediction({one.uri!r}: {one.label!r} {one.score:.3f})"
    bad, again, absent = several
    assert (again, none) == (one, [])
    assert np.array_equal(again.embedding, one.embedding)  # type: ignore[arg-type]
    assert (bad.status, bad.error_class, bad.label, bad.score, bad.top) == (
        *("quarantined", "UnreadableContainer", None, None, ()),
    )
    assert bad.error_text
    assert repr(bad) == f"Prediction({bad.uri!r}: quarantined, UnreadableContainer)"
    assert (absent.status, absent.error_class) == ("quarantined", "ObjectNotFound")
    assert capfd.readouterr() == ("", "")


def test_a_folder_stands_for_its_videos(library: Path, checkpoint: str, tmp_path: Path) -> None:
    model = kinoray.load(checkpoint)
    names = [f"{library}/{name}.mp4" for name in ("0", "1", "2", "3", "broken")]
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{name}\n" for name in names))
    found = model.predict([library, names[2]])
    assert [prediction.uri for prediction in found] == [*names, names[2]]
    assert found[:5] == model.predict(str(library)) == model.predict(tmp_path / "list.csv")
    assert found[5] == found[2] == model.predict(names[2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="found nothing; expected videos"):
        model.predict(tmp_path / "empty")


def test_videos_in_a_bucket_are_read(library: Path, checkpoint: str, s3_server: str) -> None:
    bucket = bucket_at(s3_server)
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    for key in ("videos/1.mp4", "no-ending"):
        client.upload_file(str(library / "1.mp4"), bucket.removeprefix("s3://"), key)
    store = {"endpoint_url": s3_server, "region": "us-east-1", "addressing": "path"}
    model = kinoray.load(checkpoint, storage=store)
    local = model.predict(library / "1.mp4")
    for address in (f"{bucket}/videos/1.mp4", f"{bucket}/no-ending"):
        found = model.predict(address)
        assert (found.uri, found.top, found.duration_s) == (address, local.top, local.duration_s)
    assert [found.top for found in model.predict([f"{bucket}/videos", f"{bucket}/videos/"])] == [local.top] * 2
    absent = model.predict(f"{bucket}/absent.mp4")
    assert (absent.status, absent.error_class) == ("quarantined", "ObjectNotFound")


def test_close_ends_the_decoders_and_a_later_prediction_starts_new_ones(library: Path, checkpoint: str) -> None:
    shared_sandbox(1).close()  # decoders belong to the process: other models may have left some
    before = children(os.getpid())
    model = kinoray.load(checkpoint)
    assert children(os.getpid()) == before  # none before there is something to do
    first = model.predict(library / "0.mp4")
    assert children(os.getpid()) > before
    model.close()
    assert children(os.getpid()) == before
    assert model.predict(library / "0.mp4") == first
    model.close()
    assert children(os.getpid()) == before


def test_settings_are_named_as_in_a_config_file(checkpoint: str) -> None:
    model = kinoray.load(
        checkpoint, resources={"num_workers": 3}, **{"resources.decoders_per_worker": 1, "decode.max_bytes": 7}
    )
    resources = model.config.resources
    assert (resources.num_workers, resources.decoders_per_worker, model.config.decode.max_bytes) == (3, 1, 7)
    for settings, message in (
        ({"resources.workers": 3}, "resources.workers is not a setting; there are"),
        ({"top_k": "3"}, "top_k must be a whole number, got '3'"),
        ({"top_k.more": 3}, "top_k.more must be|top_k must be a whole number"),
        ({"top_k": 3, "top_k.more": 3}, "top_k.more: top_k has no parts"),
        ({"out": "x"}, "out is no setting here"),
    ):
        with pytest.raises(ConfigError, match=message):
            kinoray.load(checkpoint, **settings)
    with pytest.raises(ConfigError, match="has all settings in it, got out as well"):
        kinoray.train(TrainConfig(catalog="set", out="run"), out="other")


ALONE = """
import contextlib, sys
from pathlib import Path
import kinoray
from kinoray.catalog.table import catalog_of_source
from kinoray.cli import main

checkpoint, video = sys.argv[1:]
kinoray.load(checkpoint).predict(video)
for task in Path("/proc/self/task").iterdir():
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
        print((task / "children").read_text(), end=" ")
print()
assert main(["label", video, "--checkpoint", checkpoint]) == 0
assert "ray" not in sys.modules
"""


def test_a_process_needs_no_ray_and_leaves_no_child(library: Path, checkpoint: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, checkpoint, str(library / "0.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=240)
    first, *_ = done.stdout.splitlines()
    assert first.split()
    assert not [pid for pid in first.split() if Path(f"/proc/{pid}").exists()]
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


# kinoray label of one video


def test_label_prints_the_answer_for_one_video(
    library: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = kinoray.load(checkpoint).predict(library / "2.mp4")
    assert main(["label", str(library / "2.mp4"), "--checkpoint", checkpoint, "--top-k", "2"]) == 0
    about, head, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith(f"label: {library}/2.mp4: ")
    assert "frames decoded, 1 clip; 3 classes of " in about
    assert head.split() == ["CLASS", "SCORE"]
    assert [tuple(row.split()) for row in rows] == [(name, f"{score:.4f}") for name, score in expected.top[:2]]
    assert list(tmp_path.iterdir()) == []

    assert main(["label", str(library / "2.mp4"), "--checkpoint", checkpoint, "--threshold", "1"]) == 0
    assert "abstained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        pytest.param("{library}/broken.mp4", 1, "UnreadableContainer: {library}/broken.mp4 is quarantined: ", id="bad"),
        pytest.param("{library}/absent.mp4", 1, "ObjectNotFound: {library}/absent.mp4: no such folder", id="absent"),
        pytest.param("{library}", 2, "ConfigError: out must be given, since {library} is not one video", id="folder"),
        pytest.param("s3://bucket/videos/", 2, "out must be given, since s3://bucket/videos/ is not one", id="prefix"),
    ],
)
def test_label_without_out_says_what_is_wrong(
    source: str, code: int, message: str, library: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", source.format(library=library), "--checkpoint", checkpoint]) == code
    printed = capsys.readouterr()
    assert message.format(library=library) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# The jobs


@pytest.mark.ray
def test_predictions_are_the_jobs_digit_for_digit(
    library: Path,
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with kinoray.load(checkpoint, embeddings=True, protocol="5x3") as model:
        found = model.predict([library])
        with caplog.at_level(logging.INFO, "kinoray"):
            done = kinoray.label(library, model, out=tmp_path / "out", unit_size=2, **{"resources.num_workers": 1})
    assert (done.inputs, done.labelled, done.quarantined, done.reasons) == (5, 4, 1, {"UnreadableContainer": 1})
    assert "label: 5 inputs = 4 labelled + 1 quarantined + 0 skipped" in caplog.messages
    assert capsys.readouterr() == ("", "")  # Ray's core, in C++, writes to the descriptor itself

    table = kinoray.read(tmp_path / "out")
    assert isinstance(table, pa.Table)
    assert table.equals(kinoray.read(done.folder))
    assert list(table.to_pandas()["uri"]) == [prediction.uri for prediction in found]
    for row, prediction in zip(table.to_pylist(), found, strict=True):
        assert row["status"] == prediction.status
        assert (row["error_class"], row["error_text"]) == (prediction.error_class, prediction.error_text)
        assert (row["label_topk"] or [], row["score_topk"] or []) == (
            [name for name, _ in prediction.top],
            [score for _, score in prediction.top],
        )
        assert (row["views"], row["frames_decoded"]) == (prediction.views, prediction.frames_decoded)
        assert (row["embedding"] is None) == (prediction.embedding is None)
        if prediction.embedding is not None:
            assert np.array_equal(np.array(row["embedding"], np.float16), prediction.embedding)
    with pytest.raises(ObjectNotFound, match="without windows"):
        kinoray.read(tmp_path / "out", windows=True)


def test_one_video_is_a_source_of_a_labelling(library: Path) -> None:
    video = library / "3.mp4"
    (row,) = catalog_of_source(LOCAL, str(video)).table.to_pylist()
    assert (row["video_id"], row["uri"], row["size_bytes"]) == ("3", str(video), video.stat().st_size)
    with pytest.raises(ObjectNotFound, match=r"absent\.mp4: no such folder or video"):
        catalog_of_source(LOCAL, str(library / "absent.mp4"))


@pytest.mark.ray
@pytest.mark.slow
def test_train_gives_the_best_checkpoint_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour_set(LOCAL, str(tmp_path / "set"), train=12, val=3)
    settings = {
        "model.factory": "tiny_models:mean_colour",
        "clip.sample": {"num_segments": 1, "frames_per_segment": 2},
        "clip.view": {"resize_px": 32, "crop_px": 32},
        "optim.epochs": 1,
        "optim.batch_size": 4,
        "resources": {"num_workers": 1, "decode_tasks": 1},
    }
    done = kinoray.train(tmp_path / "set", out=tmp_path / "run", **settings)
    assert (done.run, done.epochs, done.best_epoch, done.quarantined) == (str(tmp_path / "run"), 1, 1, 0)
    assert done.val_top1 is not None
    assert capsys.readouterr() == ("", "")
    model = kinoray.load(tmp_path / "run", allow_factory=["tiny_models:mean_colour"])
    assert model.checkpoint == done.checkpoint
    assert kinoray.train(tmp_path / "set", out=tmp_path / "run", **settings).checkpoint == done.checkpoint


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "platform" / "kinoray" / "py.typed").is_file()
