"""`kinoray export CHECKPOINT --format onnx` and torch-export: the file says what the network says, without kinoray."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kinoray
from kinoray.config.shared import ClipConfig, FlowConfig, ModelConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import CatalogError, ConfigError, ModelError
from kinoray.library import portable
from kinoray.library.config import ExportConfig
from kinoray.library.export import export
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from label_models import save_untrained
from small_baselines import SMALL
from small_sets import LABELS, colour_video
from tiny_models import OWN_NETWORKS
from video_baselines.nonlocal_block import NonLocalBlock

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))


def saved(folder: Path, factory: str, options: dict[str, Any], shape: tuple[int, int], side: int) -> str:
    """An untrained checkpoint, whose batch norms have seen something, so that they do more than nothing."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(factory=factory, options=options), len(LABELS))
    for part in cast(nn.Module, model).modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.uniform_(-0.1, 0.1)
            cast(torch.Tensor, part.running_var).uniform_(0.5, 1.5)
    clip = ClipConfig(
        sample=SampleConfig(num_segments=shape[0], frames_per_segment=shape[1]),
        view=ViewConfig(resize_px=side + 4, crop_px=side),
        flow=FlowConfig(estimator="dis"),
    )
    config = ModelConfig(factory=factory, options=options)
    meta = CheckpointMeta(model=config, clip=clip, labels=LABELS, epoch=1, step=1, samples=1)
    save_checkpoint(Storage(), str(folder), model_state=model.state_dict(), meta=meta)
    return str(folder)


def exported(checkpoint: str, kind: Any, to: Path, **settings: Any) -> dict[str, Any]:
    """What network.json says, which is what export returned; its checksums are those of the files."""
    found = export(ExportConfig(predictions=checkpoint, format=kind, to=str(to), **settings))
    record = json.loads((to / "network.json").read_text())
    assert record == json.loads(json.dumps(found))
    for name, entry in record["files"].items():
        data = (to / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size_bytes"], entry["sha256"])
    return cast(dict[str, Any], record)


VCM = ("vcm_sdd", {"backbone": "tiny", "heads": 4}, (4, 2), 32)
CASES = {
    "vcm_sdd": VCM,
    "vcm_sdd_x": ("vcm_sdd_x", {"backbone": "tiny"}, (4, 2), 32),
    **{name: SMALL[name] for name in ("tsn two-stream", "tsm", "r2plus1d_18", "mvit_v2_s")},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
@pytest.mark.parametrize("name", CASES)
def test_networks_leave_with_their_logits_for_batches_of_any_size(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = exported(saved(tmp_path / "run", *CASES[name]), kind, tmp_path / "to")
    assert record["parity"]["max_difference"] <= 1e-4
    assert record["parity"]["same_top1"] == record["parity"]["clips"]
    assert record["parity"]["largest_logit"] > 1e-2  # else all would be close to all
    assert record["parity"]["batches"] == [1, 2]
    assert record["inputs"]["rgb" if "rgb" in record["inputs"] else "flow"]["shape"][0] == "batch"
    assert "batches of any size" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_a_network_of_hugging_face_leaves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**sizes, image_size=32, num_frames=4, id2label={0: "running", 1: "jumping"})
    model = transformers.VideoMAEForVideoClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hub")
    square = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}}
    transformers.VideoMAEImageProcessor(**square).save_pretrained(tmp_path / "hub")
    (tmp_path / "videos").mkdir()
    for number in range(3):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(colour_video("red", number, num_frames=20, side=64))
    record = exported(f"hf:{tmp_path / 'hub'}", kind, tmp_path / "to", videos=str(tmp_path / "videos"))
    assert record["parity"]["max_difference"] <= 1e-4
    assert (record["parity"]["clips"], record["parity"]["batches"]) == (3, [1, 2])
    assert record["labels"] == ["running", "jumping"]


RAMP = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, (12, 48, 64, 3))


def test_another_program_feeds_the_file_from_network_json_alone(tmp_path: Path) -> None:
    """PyAV and Pillow see colours up to two grey levels otherwise; the frames of this video are twenty apart."""
    view = ViewConfig(resize="short_side", resize_px=36, crop_px=32, interpolation="bilinear")
    clip = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=view)
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, clip, "tiny_models:mean_colour")
    video = tmp_path / "ramp.mp4"
    video.write_bytes(make_video(RAMP))
    own: Any = {"allow_factory": OWN_NETWORKS}
    exported(checkpoint, "torch-export", tmp_path / "to", videos=str(video), **own)
    with kinoray.load(checkpoint, **own) as model:
        expected = dict(model.predict(video).top)

    recipe = json.loads((tmp_path / "to" / "network.json").read_text())
    asked = recipe["clip"]
    assert (asked["resize"], asked["interpolation"], asked["stride"]) == ("short_side", "bilinear", 0)
    with av.open(io.BytesIO(video.read_bytes())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    num_wanted = asked["segments"] * asked["frames_per_segment"]
    middles = [int((place + 0.5) * len(frames) / num_wanted) for place in range(num_wanted)]  # of equal slots
    pictures = []
    for middle in middles:
        height, width = frames[middle].shape[:2]
        scale = asked["resize_px"] / min(height, width)
        small = Image.fromarray(frames[middle]).resize((round(width * scale), round(height * scale)), Image.BILINEAR)
        left, top = ((side - asked["crop_px"]) // 2 for side in small.size)
        picture = np.asarray(small.crop((left, top, left + asked["crop_px"], top + asked["crop_px"])), np.float32)
        pictures.append((picture / 255 - np.array(asked["mean"])) / np.array(asked["std"]))
    x = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
    x = x.reshape(1, *recipe["inputs"]["rgb"]["shape"][1:])
    program = torch.export.load(tmp_path / "to" / recipe["file"]).module()
    (scores,) = program(rgb=torch.from_numpy(x), flow=None).softmax(dim=1).tolist()
    for name, score in zip(recipe["labels"], scores, strict=True):
        assert score == pytest.approx(expected[name], abs=0.002)
    (others,) = program(rgb=torch.from_numpy(x + 20 / 255 / 0.25), flow=None).softmax(dim=1).tolist()
    assert max(abs(other - score) for other, score in zip(others, scores, strict=True)) > 0.008


def test_a_batch_of_any_size_has_no_largest_one(tmp_path: Path) -> None:
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    record = exported(checkpoint, "torch-export", tmp_path / "to", allow_factory=OWN_NETWORKS)
    program = torch.export.load(tmp_path / "to" / record["file"]).module()
    rgb = torch.rand(1025, 2, 2, 3, 32, 32)
    assert torch.equal(program(rgb=rgb, flow=None)[-1:], program(rgb=rgb[-1:], flow=None))


@pytest.mark.slow
def test_a_nonlocal_block_leaves_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    x = torch.zeros(2, 4, 2, 4, 4)
    program = torch.export.export(NonLocalBlock(4).eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.onnx.export(program, f=tmp_path / "block.onnx", verbose=False)


def test_why_a_network_cannot_leave_is_what_the_exporter_stumbled_over() -> None:
    advice = RuntimeError("\x1b[96mThis is step 3/3\x1b[0m of exporting the model")
    advice.__cause__ = AssertionError("only 4D query,\nkey and value are supported")
    assert portable._reason(advice) == "AssertionError: only 4D query, key and value are supported"


def test_a_network_that_counts_its_clips_leaves_for_one_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tiny_models:one_by_one")
    record = exported(checkpoint, "torch-export", tmp_path / "to", allow_factory=OWN_NETWORKS)
    assert record["batch"] == 1
    assert record["inputs"]["rgb"]["shape"] == [1, 2, 2, 3, 32, 32]
    assert record["outputs"]["logits"]["shape"] == [1, len(LABELS)]
    assert (record["parity"]["batches"], record["parity"]["clips"]) == ([1], 3)
    assert "OneByOne cannot be exported for batches of any size, so its file takes one clip" in capsys.readouterr().out


def test_files_of_another_export_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    """Who finds two networks and one network.json would take the older one for what it describes."""
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    (tmp_path / "to").mkdir()
    for name in ("network.json", "network.onnx", "network.onnx.data", ".DS_Store"):
        (tmp_path / "to" / name).write_text("{}")
    exported(checkpoint, "torch-export", tmp_path / "to", allow_factory=OWN_NETWORKS)
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"network.json", "network.pt2", ".DS_Store"}


def test_a_file_that_says_something_else_is_not_handed_over(tmp_path: Path) -> None:
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tiny_models:fickle")
    with pytest.raises(ModelError, match=r"its logits differ from the network's by up to \d.*nothing was written"):
        exported(checkpoint, "torch-export", tmp_path / "to", allow_factory=OWN_NETWORKS)
    assert not (tmp_path / "to").exists()


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    settings: Any = {"predictions": checkpoint, "format": "torch-export", "to": str(tmp_path / "to")}
    with pytest.raises(ConfigError, match=r"allow_factory: .*names the network tiny_models:mean_colour"):
        export(ExportConfig(**settings))
    with pytest.raises(CatalogError, match=r"videos: 1 of 1 video of .*bad.mp4 cannot be read; the first: "):
        export(ExportConfig(**settings, allow_factory=OWN_NETWORKS, videos=str(tmp_path / "bad.mp4")))
    with pytest.raises(ConfigError, match="videos must be given with --format onnx or torch-export only, got 'x'"):
        ExportConfig(predictions="x", format="csv", to="x", videos="x")
    with pytest.raises(ConfigError, match="copy_videos must be left out with --format onnx or torch-export, got 'x'"):
        ExportConfig(**settings, copy_videos="x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"to .*taken holds files that are not kinoray.s .notes.txt."):
        export(ExportConfig(**{**settings, "to": str(tmp_path / "taken")}))
