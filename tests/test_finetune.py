"""Starting from another run's checkpoint: what is taken, what is left out, what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    SampleConfig,
    ViewConfig,
)
from kinoray.errors import CheckpointMismatch, CheckpointNotFound
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from kinoray.train.state import start_from

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
