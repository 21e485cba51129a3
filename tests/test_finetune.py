"""Starting from another run's checkpoint: what is taken, what is left out, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from kinoray.cli import main
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    SampleConfig,
    ViewConfig,
)
from kinoray.errors import CheckpointMismatch, CheckpointNotFound
from kinoray.network.build import build_model, classifier_names
from kinoray.network.checkpoint import (
    CheckpointMeta,
    find_checkpoint,
    load_meta,
    load_model_state,
    save_checkpoint,
)
from kinoray.storage.objects import Storage
from kinoray.train.state import start_from
from small_sets import set_in

TINY = ModelConfig(options={"backbone": "tiny", "heads": 2})
CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))


def state_of(
    labels: tuple[str, ...], seed: int, model: ModelConfig = TINY
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    module = build_model(model, len(labels))
    assert isinstance(module, nn.Module)
    return module, {name: value.clone() for name, value in module.state_dict().items()}


def saved(folder: Path, labels: tuple[str, ...], model: ModelConfig = TINY) -> tuple[str, dict[str, torch.Tensor]]:
    _, state = state_of(labels, seed=1, model=model)
    meta = CheckpointMeta(model=model, clip=CLIP, labels=labels, epoch=1, step=3, samples=9)
    save_checkpoint(Storage(), str(folder), model_state=state, meta=meta)
    return str(folder), state


@pytest.mark.parametrize("labels", [("x", "y", "z"), ("a", "b", "c", "d")], ids=["as many others", "more"])
def test_other_classes_get_a_new_classifier_and_every_other_weight(tmp_path: Path, labels: tuple[str, ...]) -> None:
    uri, source = saved(tmp_path / "source", ("a", "b", "c"))
    module, fresh = state_of(labels, seed=2)
    line = start_from(Storage(), uri, module, TINY, labels)  # type: ignore[arg-type]
    own = {f"head.{stream}_classifier.{kind}" for stream in ("rgb", "flow") for kind in ("weight", "bias")}
    for name, value in module.state_dict().items():
        assert torch.equal(value, (fresh if name in own else source)[name]), name
    assert all(name in line for name in own)
    assert f"{len(fresh) - 4} of {len(fresh)} weights" in line
    assert f"head.rgb_classifier.weight ([3, 96] there, [{len(labels)}, 96] here)" in line


def test_the_same_classes_keep_their_classifier(tmp_path: Path) -> None:
    uri, source = saved(tmp_path / "source", ("a", "b", "c"))
    module, _ = state_of(("a", "b", "c"), seed=2)
    assert "left out" not in start_from(Storage(), uri, module, TINY, ("a", "b", "c"))  # type: ignore[arg-type]
    for name, value in module.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_another_network_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    uri, _ = saved(tmp_path / "source", ("a", "b"), ModelConfig(options={"backbone": "tiny", "heads": 2, "stc": False}))
    module, fresh = state_of(("x", "y", "z"), seed=2)
    with pytest.raises(CheckpointMismatch, match=r"weights of the model are missing \(head\.rgb_stc"):
        start_from(Storage(), uri, module, TINY, ("x", "y", "z"))  # type: ignore[arg-type]
    assert all(torch.equal(value, fresh[name]) for name, value in module.state_dict().items())
    with pytest.raises(CheckpointNotFound):
        start_from(Storage(), str(tmp_path / "nowhere"), module, TINY, ("x", "y", "z"))  # type: ignore[arg-type]


# A published network on a small set, as a user types it


def tsm_file(folder: Path) -> list[str]:
    """A state dict of random weights, and the flags that name its network and the small clips of this set."""
    torch.manual_seed(1)
    net = build_model(ModelConfig(factory="tsm", options={"backbone": "tiny"}), 5)
    torch.save(net.state_dict(), folder / "net.pth")
    network = ["--model.factory", "tsm", "--model.options", "backbone=tiny"]
    clip = ["--clip.sample.num-segments", "2", "--clip.sample.frames-per-segment", "2"]
    view = ["--clip.view.resize-px", "36", "--clip.view.crop-px", "32"]
    return ["--init-from", str(folder / "net.pth"), *network, *clip, *view]


def videomae_folder(folder: Path) -> list[str]:
    """A tiny transformer as save_pretrained writes it, and dense clips: 4 of 6 frames, from 0, 1 or 2 on."""
    hub = pytest.importorskip("test_huggingface", reason="needs the package transformers")
    hub.save(folder / "saved", "videomae")
    return ["--init-from", f"hf:{folder / 'saved'}", "--clip.sample.stride", "1"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("published", "depth_of"),
    [
        (
            tsm_file,
            {"rgb_net.backbone.grid.stem": 3, "rgb_net.backbone.grid.down": 2, "rgb_net.backbone.grid.block": 1},
        ),
        (
            videomae_folder,
            {"rgb_net.net.videomae.embeddings": 3, "rgb_net.net.videomae.encoder.layer.0": 2}
            | {"rgb_net.net.videomae.encoder.layer.1": 1},
        ),
    ],
    ids=["file", "hugging face"],
)
def test_one_line_fine_tunes_a_published_network(
    published: Callable[[Path], list[str]],
    depth_of: dict[str, int],
    ray_local: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One step of AdamW moves each weight by its rate (weight decay off): 0.001 * 0.1 * 0.9 ** depth below the head."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = str(tmp_path / "run")
    command = ["train", set_in(tmp_path / "set", train=9, val=3), "--out", run, *published(tmp_path)]
    command += ["--optim.epochs", "1", "--optim.weight-decay", "0", "--resources.num-workers", "1"]
    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "train: fine-tuning: 1 epoch, batch 16, rate 0.001, backbone x 0.1, layer decay 0.9, weight decay 0" in said
    storage = Storage()
    (where,) = [str(path.parent) for path in (tmp_path / "cache").rglob("checkpoint.json")]
    trained = find_checkpoint(storage, run)
    meta, source = load_meta(storage, trained), load_meta(storage, where)
    assert meta.labels == ("blue", "green", "red")
    assert meta.model == source.model
    assert meta.clip.sample.is_dense == (published is videomae_folder)
    assert meta.step == 1
    before, after = load_model_state(storage, where), load_model_state(storage, trained)
    torch.manual_seed(0)
    start = build_model(meta.model, 3)
    start_from(storage, where, start, meta.model, meta.labels)
    moved: dict[int, float] = {}
    for name, parameter in cast(nn.Module, start).named_parameters():
        depth = next((depth for part, depth in depth_of.items() if name.startswith(f"{part}.")), 0)
        is_head = name in classifier_names(start, meta.model, 3)
        moved[-1 if is_head else depth] = max(
            moved.get(-1 if is_head else depth, 0.0), (after[name] - parameter.detach()).abs().max().item()
        )
        assert is_head or torch.equal(parameter, before[name])
    assert moved.pop(-1) == pytest.approx(1e-3, rel=2e-2)
    assert set(moved) >= {1, 2, 3}
    for depth, distance in moved.items():
        assert distance == pytest.approx(1e-3 * 0.1 * 0.9**depth, rel=2e-2), depth
    for name, value in after.items():
        if "running_" in name:
            assert torch.equal(value, before[name]), name  # batch norms stay as they are
