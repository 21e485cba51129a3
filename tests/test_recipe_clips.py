"""Networks are fed by their own recipes: clip_for, the defaults of train, and what is said of other settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinoray.cli import parse_settings
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.errors import ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.network import ClipRecipe, InputSpec
from kinoray.network.build import clip_for, clip_of_network, recipe_departures
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from label_models import save_untrained

LOCAL = Storage(StorageConfig())


def dense(frames: int, stride: int, fps: float, placement: str, short: str) -> SampleConfig:
    return SampleConfig(
        num_segments=1,
        frames_per_segment=frames,
        stride=stride,
        fps=fps,
        placement=placement,  # type: ignore[arg-type]
        short=short,  # type: ignore[arg-type]
    )


FED: dict[str, tuple[dict[str, Any], SampleConfig, tuple[str, int, int, int]]] = {
    "slowfast": ({}, dense(64, 2, 30.0, "slowfast", "repeat_last"), ("short_side", 256, 0, 224)),
    "i3d": ({"backbone": "inception_v1"}, dense(64, 1, 25.0, "even", "loop"), ("short_side", 256, 0, 224)),
    "i3d_nl": ({}, dense(8, 8, 30.0, "slowfast", "repeat_last"), ("short_side", 256, 0, 224)),
    "r2plus1d_18": ({}, dense(16, 1, 15.0, "torchvision", "repeat_last"), ("stretch", 128, 171, 112)),
    "r2plus1d_34": ({}, dense(32, 1, 0.0, "torchvision", "repeat_last"), ("stretch", 128, 171, 112)),
    "s3d": ({}, dense(128, 1, 15.0, "torchvision", "repeat_last"), ("stretch", 256, 0, 224)),
    "s3dg": ({}, dense(64, 1, 25.0, "even", "loop"), ("short_side", 256, 0, 224)),
    "mvit_v2_s": ({}, dense(16, 1, 7.5, "torchvision", "repeat_last"), ("short_side", 256, 0, 224)),
    "swin3d_t": ({}, dense(32, 1, 15.0, "torchvision", "repeat_last"), ("short_side", 256, 0, 224)),
    "artnet": ({}, dense(16, 1, 0.0, "mmaction2", "loop"), ("stretch", 128, 170, 112)),
    "lgd3d": ({}, dense(16, 1, 0.0, "mmaction2", "loop"), ("short_side", 256, 0, 224)),
    "stcnet": ({}, dense(32, 1, 0.0, "mmaction2", "loop"), ("short_side", 112, 0, 112)),
    "stnet": ({}, SampleConfig(num_segments=7, frames_per_segment=5), ("short_side", 256, 0, 224)),
    "tsm": ({}, SampleConfig(num_segments=8, frames_per_segment=1), ("short_side", 256, 0, 224)),
}


@pytest.mark.parametrize("name", FED)
def test_published_networks_are_fed_as_their_papers_do(name: str) -> None:
    options, sample, (resize, height, width, crop) = FED[name]
    clip = clip_of_network(ModelConfig(factory=name, options=options))
    assert clip.sample == sample
    view = clip.view
    assert (view.resize, view.resize_px, view.resize_width_px, view.crop_px) == (resize, height, width, crop)
    assert view.interpolation == "bilinear"
    # torchvision, PySlowFast and OpenCV resize without antialiasing, Pillow with it
    assert view.antialias == (name in ("i3d", "s3dg", "lgd3d", "stcnet", "stnet"))


@pytest.mark.parametrize("name", ["vcm_sdd", "vcm_sdd_r101", "tsn", "eco"])
def test_the_paper_and_networks_without_a_recipe_keep_the_defaults(name: str) -> None:
    assert clip_of_network(ModelConfig(factory=name)) == ClipConfig()


def test_what_a_network_insists_on_goes_before_its_recipe() -> None:
    """Frames and crop by its options; frames are then resized in the recipe's proportion."""
    clip = clip_of_network(ModelConfig(factory="mvit_v2_s", options={"frames": 8, "crop_px": 128}))
    assert clip.sample.frames_per_segment == 8
    assert (clip.view.resize_px, clip.view.crop_px) == (146, 128)
    bare = clip_for(InputSpec(num_segments=4, frames_per_segment=5, crop_px=112))
    assert bare.sample == SampleConfig(num_segments=4, frames_per_segment=5)
    assert bare.view == ViewConfig(resize_px=128, crop_px=112)


def test_a_recipe_without_a_stride_is_spread_over_the_video() -> None:
    recipe = ClipRecipe(frames=64, resize="exact", resize_px=(256, 256))
    clip = clip_for(InputSpec(frames_per_segment=64, crop_px=256, recipe=recipe))
    assert clip.sample == SampleConfig(num_segments=1, frames_per_segment=64)
    assert (clip.view.resize, clip.view.resize_px, clip.view.crop_px) == ("stretch", 256, 256)
    with pytest.raises(ConfigError, match="its recipe resizes to 128 x 171 and crops nothing"):
        clip_for(InputSpec(recipe=ClipRecipe(frames=8, resize="exact", resize_px=(128, 171))))


def trained_with(*flags: str) -> TrainConfig:
    config = parse_settings("train", TrainConfig, ["set", "--out", "run", *flags])
    assert isinstance(config, TrainConfig)
    return config


def test_train_takes_the_clip_of_the_network_and_flags_win() -> None:
    assert trained_with().clip == ClipConfig()
    own = clip_of_network(ModelConfig(factory="slowfast"))
    assert trained_with("--model.factory", "slowfast").clip == own
    options = ("--model.options", "backbone=resnet18", "alpha=8")
    config = trained_with("--model.factory", "slowfast", *options, "--clip.sample.stride", "4", "--optim.lr", "0.1")
    assert config.clip == replace(own, sample=replace(own.sample, stride=4))
    assert (config.model.options, config.optim.lr) == ({"backbone": "resnet18", "alpha": 8}, 0.1)
    # A flag that says the platform's default is a flag all the same.
    assert trained_with("--model.factory", "tsm", "--clip.view.resize", "stretch").clip.view.resize == "stretch"


def test_a_file_or_a_preset_says_how_its_network_is_fed(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("model:\n  factory: tsm\n")
    assert trained_with("--config", str(tmp_path / "train.yaml")).clip == ClipConfig()
    small = trained_with("--preset", "small", "--model.factory", "tsm", "--model.options", "backbone=resnet18")
    assert small.clip.sample == SampleConfig(num_segments=4, frames_per_segment=4)


def test_departures_from_the_recipe_name_both() -> None:
    spec = InputSpec(recipe=ClipRecipe(frames=64, stride=2, fps=30.0, resize="shortest", resize_px=(256, 256)))
    own = clip_for(spec)
    assert recipe_departures(spec, own) == ""
    other = replace(own, sample=replace(own.sample, stride=4, fps=0.0), view=replace(own.view, resize="stretch"))
    assert recipe_departures(spec, other) == (
        "clip.sample.stride 4 (its recipe: 2), clip.sample.fps 0.0 (its recipe: 30.0), "
        "clip.view.resize stretch (its recipe: short_side)"
    )
    assert recipe_departures(InputSpec(), other) == ""


def test_a_flag_against_the_recipe_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training's own choice is not; num_segments and the protocols that name segments are."""
    (tmp_path / "a.mp4").write_bytes(b"never read")
    clip = clip_of_network(ModelConfig(factory="tsm", options={"backbone": "tiny"}))
    run = save_untrained(LOCAL, str(tmp_path / "run"), ("a", "b"), clip, "tsm", backbone="tiny")
    config = LabelConfig(source=str(tmp_path), checkpoint=run, out=str(tmp_path / "out"))
    open_labelling(config, "label")
    assert "warning" not in capsys.readouterr().out
    open_labelling(replace(config, protocol="8x6"), "label")
    text = "label: warning: tsm is not fed as it was made to be: clip.sample.frames_per_segment 6 (its recipe: 1)"
    assert text in capsys.readouterr().out
    open_labelling(replace(config, num_segments=16), "label")
    assert "clip.sample.num_segments 16 (its recipe: 8)" in capsys.readouterr().out


def test_early_exit_of_clips_of_one_segment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"never read")
    clip = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=8, stride=2))
    run = save_untrained(LOCAL, str(tmp_path / "run"), ("a", "b"), clip, "tsn", backbone="tiny")
    config = LabelConfig(source=str(tmp_path), checkpoint=run, out=str(tmp_path / "out"), early_exit="exact")
    with pytest.raises(ConfigError, match="early_exit must be off for clips of one segment, which is seen at once"):
        open_labelling(config, "label")
