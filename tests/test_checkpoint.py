"""Checkpoints: whole or absent, digests checked, readable refusals."""

import dataclasses
import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound, ObjectNotFound
from kinoray.network import checkpoint
from kinoray.network.checkpoint import (
    CheckpointMeta,
    best_of,
    delete_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_meta,
    load_model,
    load_model_state,
    load_train_state,
    save_checkpoint,
)
from kinoray.storage.objects import Storage, join
from tiny_models import OWN_NETWORKS

META = CheckpointMeta(
    model=ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}),
    clip=ClipConfig(sample=SampleConfig(num_segments=3), view=ViewConfig(train_scales=(1.0, 0.5))),
    labels=("left", "right", "up"),
    epoch=2,
    step=40,
    samples=200,
    metrics={"loss": 0.5, "val_top1": 0.25},
)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    """A storage and an empty run folder in it."""
    if request.param == "folder":
        return Storage(), str(tmp_path / "run")
    config = cast(StorageConfig, request.getfixturevalue("s3_config"))
    return Storage(config), join(cast(str, request.getfixturevalue("bucket")), "run")


def tiny_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"classify.weight": torch.randn(3, 5), "classify.bias": torch.randn(3)}


def save(storage: Storage, run: str, epoch: int, **metrics: float) -> str:
    uri = join(run, "checkpoints", f"epoch-{epoch:04d}")
    meta = dataclasses.replace(META, epoch=epoch, step=10 * epoch, metrics=metrics)
    save_checkpoint(storage, uri, model_state=tiny_state(epoch), meta=meta, train_state={"m": torch.zeros(2)})
    return uri


def test_what_is_saved_is_what_is_loaded(place: tuple[Storage, str]) -> None:
    storage, run = place
    uri = join(run, "one")
    tied = torch.arange(6.0).reshape(2, 3)
    state = {"a": tied, "b": tied, "t": tied.T, "half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7)}
    moments = {"classify.weight/exp_avg": torch.randn(3, 5), "step": torch.tensor(3)}

    saved = save_checkpoint(storage, uri, model_state=state, meta=META, train_state=moments)

    loaded = load_model_state(storage, uri)
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert torch.equal(load_train_state(storage, uri)["step"], torch.tensor(3))
    assert load_meta(storage, uri) == saved == dataclasses.replace(META, model_digest=saved.model_digest)
    assert len(saved.model_digest) == 16


def test_the_model_digest_names_weights_and_network_and_nothing_else(tmp_path: Path) -> None:
    def model_digest(name: str, seed: int, meta: CheckpointMeta) -> str:
        return save_checkpoint(Storage(), str(tmp_path / name), model_state=tiny_state(seed), meta=meta).model_digest

    same = model_digest("a", 0, META)
    assert model_digest("b", 0, dataclasses.replace(META, epoch=9, metrics={})) == same
    assert model_digest("c", 1, META) != same
    assert model_digest("d", 0, dataclasses.replace(META, model=ModelConfig(factory="tiny_models:other"))) != same


def test_a_loaded_model_is_the_saved_one_in_eval_mode(tmp_path: Path) -> None:
    uri = str(tmp_path / "one")
    state = tiny_state()
    save_checkpoint(Storage(), uri, model_state=state, meta=META)
    model, meta = load_model(Storage(), uri, OWN_NETWORKS)
    assert meta.labels == META.labels
    assert not cast(nn.Module, model).training
    rgb, flow = torch.randn(2, 1, 2, 3, 4, 4), torch.randn(2, 1, 2, 2, 4, 4)
    features = torch.cat([rgb.mean(dim=(1, 2, 4, 5)), flow.mean(dim=(1, 2, 4, 5))], dim=1)
    expected = features @ state["classify.weight"].T + state["classify.bias"]
    torch.testing.assert_close(model(rgb=rgb, flow=flow), expected)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    uri = str(tmp_path / "one")
    state = {"classify.weight": torch.zeros(4, 5), "extra": torch.zeros(1)}
    save_checkpoint(Storage(), uri, model_state=state, meta=META)
    with pytest.raises(CheckpointMismatch) as caught:
        load_model(Storage(), uri, OWN_NETWORKS)
    message = str(caught.value)
    assert uri in message
    assert "1 weights of the model are missing (classify.bias)" in message
    assert "1 weights are not the model's (extra)" in message
    assert "classify.weight is [4, 5], the model's is [3, 5]" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors", "checkpoint.json"])
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    uri = str(tmp_path / "one")
    save_checkpoint(Storage(), uri, model_state=tiny_state(), meta=META, train_state={"m": torch.zeros(4)})
    path = tmp_path / "one" / name
    data = path.read_bytes()
    for position in range(0, len(data), 1 + len(data) // 60):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises((CheckpointCorrupt, CheckpointMismatch)):
            load_train_state(Storage(), uri) if name.startswith("train") else load_model_state(Storage(), uri)
    path.write_bytes(data)
    load_model_state(Storage(), uri)


def test_a_missing_file_and_a_missing_train_state_are_told_apart(tmp_path: Path) -> None:
    uri = str(tmp_path / "one")
    save_checkpoint(Storage(), uri, model_state=tiny_state(), meta=META)
    with pytest.raises(CheckpointNotFound, match="saved without train_state"):
        load_train_state(Storage(), uri)
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors is gone"):
        load_model_state(Storage(), uri)


class DiesAfter(Storage):
    """A storage whose process dies after so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        object.__setattr__(self, "writes_left", writes)  # Storage is frozen

    writes_left: int

    def _count(self) -> None:
        if self.writes_left == 0:
            raise KeyboardInterrupt
        object.__setattr__(self, "writes_left", self.writes_left - 1)

    def put(self, uri: str, data: bytes) -> None:
        self._count()
        super().put(uri, data)

    def put_file(self, uri: str, path: Path) -> None:
        self._count()
        super().put_file(uri, path)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_save_that_dies_leaves_no_checkpoint_and_the_run_keeps_the_one_before(tmp_path: Path, writes: int) -> None:
    run = str(tmp_path)
    first = save(Storage(), run, 1, val_top1=0.5)
    with pytest.raises(KeyboardInterrupt):
        save(DiesAfter(writes), run, 2, val_top1=0.9)
    assert [uri for uri, _ in list_checkpoints(Storage(), run)] == [first]
    with pytest.raises(CheckpointNotFound):
        load_meta(Storage(), join(run, "checkpoints", "epoch-0002"))
    with pytest.raises(KeyboardInterrupt):  # nor does a second save over a whole one leave a mixture
        save(DiesAfter(writes), run, 1, val_top1=0.9)
    assert list_checkpoints(Storage(), run) == []


def test_a_delete_that_dies_in_the_middle_leaves_no_checkpoint(tmp_path: Path) -> None:
    class DeletesOne(DiesAfter):
        def delete(self, uri: str) -> None:
            self._count()
            super().delete(uri)

    uri = save(Storage(), str(tmp_path), 1)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(DeletesOne(1), uri)
    assert list_checkpoints(Storage(), str(tmp_path)) == []


def test_a_checkpoint_with_a_cut_file_is_not_whole(tmp_path: Path) -> None:
    uri = save(Storage(), str(tmp_path), 1)
    path = Path(uri) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert list_checkpoints(Storage(), str(tmp_path)) == []


def test_a_run_folder_means_its_best_checkpoint(place: tuple[Storage, str]) -> None:
    storage, run = place
    with pytest.raises(CheckpointNotFound, match="neither a checkpoint nor a run folder"):
        find_checkpoint(storage, run)
    first = save(storage, run, 1)
    second = save(storage, run, 2)
    assert find_checkpoint(storage, run) == second  # none scored: the newest
    third = save(storage, run, 3, val_top1=0.75)
    fourth = save(storage, run, 10, val_top1=0.5)
    fifth = save(storage, run, 11, val_top1=0.75)
    assert find_checkpoint(storage, run) == fifth  # of equals the newer
    assert find_checkpoint(storage, first) == first
    assert [uri for uri, _ in list_checkpoints(storage, run)] == [first, second, third, fourth, fifth]
    delete_checkpoint(storage, fifth)
    assert best_of(list_checkpoints(storage, run))[0] == third
    assert not list(storage.list(fifth + "/"))


def test_a_missing_bucket_is_named(s3_config: StorageConfig) -> None:
    with pytest.raises(ObjectNotFound, match="no-such-bucket"):
        find_checkpoint(Storage(s3_config), "s3://no-such-bucket/run")


def test_a_checkpoint_of_a_later_version_says_so(tmp_path: Path) -> None:
    uri = str(tmp_path / "one")
    save_checkpoint(Storage(), uri, model_state=tiny_state(), meta=META)
    path = tmp_path / "one" / "checkpoint.json"
    body = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "digest"}

    body["meta"]["clip"]["sample"]["later"] = 2
    path.write_text(json.dumps({**body, "digest": checkpoint.digest(body)}))
    with pytest.raises(CheckpointMismatch, match=r"another version of kinoray: clip\.sample\.later"):
        load_meta(Storage(), uri)

    body["format"] = 2
    path.write_text(json.dumps({**body, "digest": checkpoint.digest(body)}))
    with pytest.raises(CheckpointMismatch, match="has format 2, this version reads 1"):
        load_meta(Storage(), uri)
