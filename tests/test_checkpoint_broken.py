"""A broken checkpoint in a run is named and left out; labelling and training take the best or newest of the rest."""

import dataclasses
import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kinoray.config.shared import OptimConfig, digest
from kinoray.errors import CheckpointError, CheckpointMismatch
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.network.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_model_state,
    load_train_state,
    newest_checkpoint,
    save_checkpoint,
)
from kinoray.storage.objects import Storage, join
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from small_sets import colour_video, set_in
from test_checkpoint import META, tiny_state
from test_train import make_config
from tiny_models import OWN_NETWORKS

LOCAL = Storage()
META_FILE, MODEL_FILE, TRAIN_FILE = "checkpoint.json", "model.safetensors", "train_state.safetensors"

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def nest(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


def later_format(path: Path) -> None:
    document = json.loads(path.read_bytes())
    body = {**{name: document[name] for name in ("files", "meta")}, "format": 2}
    path.write_text(json.dumps({**body, "digest": digest(body)}))


JSON_DAMAGE = [(META_FILE, damage) for damage in (cut, flip, empty, nest, later_format)]
MODEL_DAMAGE = [(MODEL_FILE, damage) for damage in (cut, flip, empty, remove)]
TRAIN_DAMAGE = [(TRAIN_FILE, damage) for damage in (cut, flip, empty, remove)]


def named(cases: list[tuple[str, Damage]]) -> pytest.MarkDecorator:
    ids = [f"{name}-{damage.__name__}" for name, damage in cases]  # type: ignore[attr-defined]
    return pytest.mark.parametrize(("name", "damage"), cases, ids=ids)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Epochs 1, 2 and 3, of which the second is the best, and then the third."""
    for epoch, top1 in ((1, 0.1), (2, 0.9), (3, 0.5)):
        save(tmp_path / "run", epoch, top1)
    return tmp_path / "run"


def save(run: Path, epoch: int, top1: float = 0.0, *, epoch_steps: int = 0) -> str:
    step = 10 * epoch + epoch_steps
    uri = join(str(run), "checkpoints", f"epoch-{epoch:04d}-step-{step:06d}")
    metrics = {} if epoch_steps else {"val_top1": top1}
    meta = dataclasses.replace(META, epoch=epoch, step=step, epoch_steps=epoch_steps, metrics=metrics)
    save_checkpoint(LOCAL, uri, model_state=tiny_state(epoch), meta=meta, train_state={"m": torch.zeros(8)})
    return uri


def folder_of(run: Path, epoch: int) -> Path:
    return next((run / "checkpoints").glob(f"epoch-{epoch:04d}-*"))


@named(JSON_DAMAGE + MODEL_DAMAGE)
def test_a_run_with_a_broken_best_checkpoint_gives_the_next_best(name: str, damage: Damage, run: Path) -> None:
    damage(folder_of(run, 2) / name)
    said: list[str] = []
    assert find_checkpoint(LOCAL, str(run), warn=said.append) == str(folder_of(run, 3))
    (line,) = said
    assert line.startswith("a broken checkpoint is left out: ")
    assert str(folder_of(run, 2) / name) in line
    assert line.isprintable()
    with pytest.raises(CheckpointError):  # asked for itself, it is an error
        load_model_state(LOCAL, find_checkpoint(LOCAL, str(folder_of(run, 2))))


@named(JSON_DAMAGE + MODEL_DAMAGE + TRAIN_DAMAGE)
def test_training_goes_on_from_the_newest_sound_checkpoint(name: str, damage: Damage, run: Path) -> None:
    damage(folder_of(run, 3) / name)
    said: list[str] = []
    found = newest_checkpoint(LOCAL, str(run), warn=said.append)
    assert found is not None
    assert (found[0], found[1].epoch) == (str(folder_of(run, 2)), 2)
    (line,) = said
    assert str(folder_of(run, 3) / name) in line
    load_train_state(LOCAL, found[0])


@named(JSON_DAMAGE + MODEL_DAMAGE)
def test_a_run_with_no_sound_checkpoint_is_an_error(name: str, damage: Damage, run: Path) -> None:
    for epoch in (1, 2, 3):
        damage(folder_of(run, epoch) / name)
    for look in (find_checkpoint, newest_checkpoint):
        with pytest.raises(CheckpointError, match=r"has no sound checkpoint: .*, and 2 more are broken") as caught:
            look(LOCAL, str(run))
        assert str(run) in str(caught.value)
    assert isinstance(caught.value, CheckpointMismatch) == (damage is later_format)


def test_a_checkpoint_of_holes_is_left_out_without_being_hashed(run: Path) -> None:
    """6 GiB that take 8 kB on the disk, with the best accuracy; its JSON and its header are as they should be."""
    folder = folder_of(run, 2)
    size_bytes = 6 * 2**30
    header = json.dumps({"a": {"dtype": "F32", "shape": [size_bytes // 4], "data_offsets": [0, size_bytes]}}).encode()
    with (folder / MODEL_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size_bytes)
    document = json.loads((folder / META_FILE).read_bytes())
    document["files"][MODEL_FILE]["size_bytes"] = 8 + len(header) + size_bytes
    body = {name: document[name] for name in ("format", "files", "meta")}
    (folder / META_FILE).write_text(json.dumps({**body, "digest": digest(body)}))
    said: list[str] = []
    begin_s = time.process_time()
    assert find_checkpoint(LOCAL, str(run), warn=said.append) == str(folder_of(run, 3))
    assert time.process_time() - begin_s < 5  # hashing it took 80
    assert re.search(r"left out: .*model\.safetensors has 6,442,\d+,\d+ bytes, of which .* are holes", said[0])


def test_a_sound_run_says_nothing_and_a_deleted_checkpoint_is_none(run: Path) -> None:
    said: list[str] = []
    (folder_of(run, 2) / META_FILE).unlink()  # what a killed delete, or a killed save, leaves
    assert find_checkpoint(LOCAL, str(run), warn=said.append) == str(folder_of(run, 3))
    assert newest_checkpoint(LOCAL, str(run), warn=said.append) is not None
    assert newest_checkpoint(LOCAL, str(run / "none"), warn=said.append) is None
    assert said == []


def test_broken_checkpoints_take_no_place_and_stay(run: Path) -> None:
    """After a broken third epoch the run goes on from the second, keeps it, and deletes nothing that it cannot read."""
    flip(folder_of(run, 3) / MODEL_FILE)
    save(run, 4)
    flip(folder_of(run, 4) / META_FILE)
    in_epoch = save(run, 2, epoch_steps=5)
    RunFolder(LOCAL, str(run)).prune_checkpoints(keep=1, written=(2, 25))
    kept = {Path(uri).name[:10] for uri, _ in list_checkpoints(LOCAL, str(run))}
    assert kept == {"epoch-0002", "epoch-0003"}
    assert (folder_of(run, 4) / META_FILE).exists()
    found = newest_checkpoint(LOCAL, str(run), warn=lambda line: None)
    assert found is not None
    assert found[0] == in_epoch


def test_label_names_what_it_leaves_out(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "red.mp4").write_bytes(colour_video("red", 0))
    flip(folder_of(run, 2) / MODEL_FILE)
    config = LabelConfig(source=str(tmp_path / "videos"), checkpoint=str(run), out=str(tmp_path / "out"))
    config = dataclasses.replace(config, allow_factory=OWN_NETWORKS)
    for plan in (True, False):
        assert open_labelling(dataclasses.replace(config, plan=plan), "label").meta.epoch == 3
        said = capsys.readouterr().out
        assert said.count("label: a broken checkpoint is left out: ") == 1
        assert f"checkpoint {folder_of(run, 3)}" in said


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_whose_last_checkpoint_broke_is_trained_to_the_same_end(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(set_in(tmp_path / "set", train=9, val=0), str(tmp_path / "run"), val_split="")
    config = dataclasses.replace(config, optim=OptimConfig(epochs=2, batch_size=8, lr=0.05))
    first = train(config)
    weights = load_model_state(LOCAL, first["newest"])
    steps = RunFolder(LOCAL, config.out).steps()
    flip(Path(first["newest"]) / MODEL_FILE)
    capsys.readouterr()
    again = train(config)
    assert again["newest"] == first["newest"]
    assert again["epochs"] == 2
    for name, value in load_model_state(LOCAL, again["newest"]).items():
        assert torch.equal(value, weights[name]), name
    assert RunFolder(LOCAL, config.out).steps() == steps
    said = capsys.readouterr().out
    assert said.count("a broken checkpoint is left out: ") == 1
    assert f"{first['newest']}/{MODEL_FILE} does not match its digest" in said
    assert "workers start on cpu after epoch 1" in said
