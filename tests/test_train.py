"""Training: the recipe, the run folder, and whole runs under Ray Train against a plain loop in one process."""

import dataclasses
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from torch import nn
from torch.nn import functional as F

import tiny_models
from kinoray.catalog.rows import QuarantineRow, Refusal, load_quarantine
from kinoray.catalog.table import Catalog, load_catalog, read_videos, references
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    StorageConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.errors import (
    CatalogError,
    ChecksumMismatch,
    ConfigError,
    JobError,
    MediaError,
    ModelError,
    ObjectNotFound,
    StorageError,
    TooManyBad,
    TrainingDiverged,
)
from kinoray.network.batch import collate, model_inputs
from kinoray.network.checkpoint import find_checkpoint, list_checkpoints, load_meta, load_model, save_checkpoint
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.input import epoch_order, rank_steps, run_length
from kinoray.train.recipe import learning_rate, make_optimizer
from kinoray.train.recorder import write_events
from kinoray.train.runfolder import RunFolder, StepRow
from kinoray.train.state import load_optimizer_state, optimizer_state
from kinoray.train.verb import _fewest_videos, _say_problems, train
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled
from kinoray.video.sample import clip_rng
from small_sets import colour_set, epoch_row, set_in
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))


def make_config(catalog: str, out: str, **changes: Any) -> TrainConfig:
    """A run of seconds; 17 videos in batches of 8 leave one for the last step, so one of two workers has none."""
    settings: dict[str, Any] = {
        "clip": CLIP,
        "model": ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}),
        "optim": OptimConfig(epochs=3, batch_size=8, lr=0.05),
        "resources": TrainResourcesConfig(num_workers=2, decode_tasks=2),
    }
    return TrainConfig(catalog=catalog, out=out, **(settings | changes))


# The recipe


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    config = OptimConfig(lr=0.5, warmup_fraction=0.2)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-12)
    assert rates[4] == 0.5
    for step in range(4, 21):
        assert rates[step] == pytest.approx(0.5 * math.cos(math.pi * (step - 4) / 32) ** 2, abs=1e-15)
    assert learning_rate(OptimConfig(lr=0.5, warmup_fraction=0.0), 0, 20) == 0.5


def test_an_optimizer_that_is_saved_and_loaded_goes_on_exactly() -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            module(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    straight = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.BatchNorm1d(2))
    straight[0].bias.requires_grad_(False)  # what is not trained has no moments
    straight.register_parameter("unused", nn.Parameter(torch.ones(2)))  # nor has what never had a gradient
    optimizer = make_optimizer(straight, OptimConfig())
    steps(straight, optimizer, 3, seed=1)
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer_state(straight, optimizer).items()}
    steps(straight, optimizer, 3, seed=2)

    resumed = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.BatchNorm1d(2))
    resumed[0].bias.requires_grad_(False)
    resumed.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    resumed.load_state_dict(weights)
    second = make_optimizer(resumed, OptimConfig())
    load_optimizer_state(resumed, second, moments)
    assert optimizer_state(resumed, second).keys() == moments.keys()
    steps(resumed, second, 3, seed=2)

    assert "0.weight/exp_avg" in moments
    assert not {name for name in moments if name.startswith(("0.bias", "unused"))}
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# The run folder


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return set_in(tmp_path_factory.mktemp("set"), train=17, val=7, broken=(4, 20))


def test_a_run_folder_is_resumed_only_with_the_settings_that_decide_the_result(small_set: str, tmp_path: Path) -> None:
    storage, out = Storage(), str(tmp_path / "run")
    config = make_config(small_set, out)
    catalog = load_catalog(storage, small_set)
    folder = RunFolder(storage, out)
    folder.claim(config, catalog)
    folder.claim(
        dataclasses.replace(config, keep_checkpoints=9, resources=TrainResourcesConfig(num_workers=1)), catalog
    )
    assert "keep_checkpoints: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert "multilabel_loss" not in (tmp_path / "run" / "run.json").read_text()  # as before there was such a setting

    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5, epochs=9), val_split="")
    with pytest.raises(ConfigError) as caught:
        folder.claim(other, catalog)
    message = str(caught.value)
    for part in (
        "optim.lr is 0.05 there, 0.5 here",
        "optim.epochs is 3 there, 9 here",
        'val_split is "val" there, "" here',
    ):
        assert part in message
    assert out in message

    options = dataclasses.replace(config, model=ModelConfig(factory="tiny_models:mean_colour"))
    with pytest.raises(ConfigError, match=r"model\.options\.flow_channels is 2 there, not set here"):
        folder.claim(options, catalog)
    half = Catalog(catalog.table.slice(0, 9), catalog.labels)
    with pytest.raises(ConfigError, match=r"catalog\.digest is"):
        folder.claim(config, half)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        folder.claim(config, catalog)


def read_events(path: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of a TensorBoard event file: records of length, checksum, Event, checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        events += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return events


def test_an_epoch_that_is_trained_again_replaces_what_it_wrote(tmp_path: Path) -> None:
    folder = RunFolder(Storage(), str(tmp_path))
    for epoch, loss in [(1, 0.5), (2, 0.25), (3, 9.0), (2, 0.125)]:
        row = epoch_row(epoch, loss=loss, val_top1=0.75, videos_per_s=8.0)
        step = StepRow(epoch=epoch, step=epoch, videos=4, quarantined=0, lr=0.5, loss=loss)
        folder.write_epoch(row)
        write_events(folder, row, [step])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(json.loads(line)["epoch"], json.loads(line)["loss"]) for line in lines] == [(1, 0.5), (2, 0.125)]
    assert [row.epoch for row in folder.epochs()] == [1, 2]
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert all("tfevents" in path.name for path in files)
    found = read_events(files[1])
    expected = {("train/loss", 2, 0.125), ("val/top1", 2, 0.75), ("run/videos_per_s", 2, 8.0), ("step/loss", 2, 0.125)}
    assert expected <= set(found)
    groups = Counter(tag.partition("/")[0] for tag, _, _ in found)
    assert groups == {"train": 2, "val": 1, "run": 8, "step": 2}  # loss and rate, and what else was measured


@pytest.mark.parametrize(
    "line", ['{"epoch": 2}', '{"epoch": "2", "step": 1}', '{"epoch": 2, "step": true}', "[2]", '{"no": 1}']
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    folder = RunFolder(Storage(), str(tmp_path))
    folder.write_epoch(epoch_row(1, loss=0.5))
    folder.write_steps(1, [StepRow(epoch=1, step=1, videos=4, quarantined=0, lr=0.5, loss=0.5)])
    for name, read in (("metrics.jsonl", folder.epochs), ("losses/epoch-000001.jsonl", folder.steps)):
        (row,) = read()
        assert row.loss == 0.5
        path = tmp_path / name
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(ChecksumMismatch, match=rf"{name} line 2 does not hold what kinoray wrote"):
            read()


def test_a_video_is_quarantined_once_with_its_first_reason(tmp_path: Path) -> None:
    def refusal(video_id: str, reason: str) -> QuarantineRow:
        return QuarantineRow(video_id, "u", Refusal("train on train", "EmptyMedia", reason))

    folder = RunFolder(Storage(), str(tmp_path))
    folder.quarantine([])
    assert not list(tmp_path.iterdir())
    folder.quarantine([refusal("b", "first"), refusal("b", "second")])
    folder.quarantine([refusal("b", "third"), refusal("a", "first")])
    rows = load_quarantine(Storage(), folder.quarantine_uri)
    assert [(row.video_id, row.error_text) for row in rows] == [("b", "first"), ("a", "first")]


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path) -> None:
    from test_checkpoint import META, tiny_state

    storage, out = Storage(), str(tmp_path)
    for epoch, top1 in enumerate([0.25, 0.75, 0.5, 0.5, 0.25], start=1):
        meta = dataclasses.replace(META, epoch=epoch, step=epoch, metrics={"val_top1": top1})
        save_checkpoint(storage, join(out, "checkpoints", f"e{epoch}"), model_state=tiny_state(), meta=meta)
    RunFolder(storage, out).prune_checkpoints(keep=2)
    assert [meta.epoch for _, meta in list_checkpoints(storage, out)] == [2, 4, 5]


# What is refused before Ray starts


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"catalog": "/nowhere/set"}, ObjectNotFound, "/nowhere/set"),
        ({"split": "test"}, CatalogError, r"no video of split 'test'.*train \(17\)"),
        ({"val_split": "test"}, CatalogError, 'val_split "" trains without scoring'),
        ({"model": ModelConfig(factory="tiny_models:nothing")}, ConfigError, "model.factory"),
        (
            {"optim": OptimConfig(multilabel_loss="focal")},
            ConfigError,
            r"optim\.multilabel_loss must be bce with .*whose videos have one class each",
        ),
        (
            {"model": ModelConfig(factory="tiny_models:mean_colour", options={"x": 1})},
            ConfigError,
            r"options\.x is not",
        ),
        (
            {"model": ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 10})},
            ConfigError,
            "wants 10 flow channels, but decoding gives 2",
        ),
        (
            {"model": ModelConfig(factory="lgd3d", options={"backbone": "resnet50"})},
            ConfigError,
            r"lgd3d cannot be trained on clips of 1 x 2 frames, 24 px, 1 video at a time .optim\.batch_size 8.: lgd3d "
            "needs a multiple of stride=4 frames a segment, got 2",
        ),
        (  # the last batch of an epoch is one video, and behind its super-image a batch norm sees one number a channel
            {"model": ModelConfig(factory="stnet", options={"backbone": "resnet18", "frames": 2})},
            ConfigError,
            "stnet cannot be trained on clips of .*, 1 video at a time .*Expected more than 1 value per channel",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    small_set: str, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = dataclasses.replace(make_config(small_set, str(tmp_path / "run")), **changes)
    with pytest.raises(error, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_unlabelled_split_is_refused(small_set: str, tmp_path: Path) -> None:
    from kinoray.catalog.table import save_catalog
    from small_sets import catalog_of

    rows = [{"video_id": f"v{i}", "uri": "u", "split": "train", "label_id": 0 if i else None} for i in range(3)]
    save_catalog(Storage(), str(tmp_path / "set.parquet"), catalog_of(rows))
    with pytest.raises(CatalogError, match="1 of 3 videos of split 'train' have no label"):
        train(make_config(str(tmp_path / "set.parquet"), str(tmp_path / "run")))


def test_the_fewest_videos_of_a_forward_pass_are_those_of_the_smallest_part() -> None:
    def fewest(num_videos: int, batch_size: int, workers: int, accumulate: int = 1) -> int:
        optim = OptimConfig(batch_size=batch_size, accumulate=accumulate)
        resources = TrainResourcesConfig(num_workers=workers)
        return _fewest_videos(TrainConfig(catalog="c", out="o", optim=optim, resources=resources), num_videos)

    for num_videos, batch_size, workers, accumulate in itertools.product(
        (1, 2, 7, 16, 17), (3, 4, 8), (1, 2, 3), (1, 2, 5)
    ):
        smallest = []
        for rank in range(workers):
            for rows in rank_steps(np.arange(num_videos), batch_size=batch_size, rank=rank, world_size=workers):
                size = max(1, -(-len(rows) // accumulate))  # as Replica cuts its share
                smallest += [len(rows[start : start + size]) for start in range(0, len(rows), size)]
        assert fewest(num_videos, batch_size, workers, accumulate) == min(smallest)


def test_label_lists_without_any_class_are_refused(tmp_path: Path) -> None:
    from kinoray.catalog.table import save_catalog
    from small_sets import catalog_of

    rows = [
        {"video_id": f"v{i}", "uri": "u", "split": split, "label_ids": []} for i, split in enumerate(("train", "val"))
    ]
    catalog = Catalog(catalog_of(rows).table)
    save_catalog(Storage(), str(tmp_path / "set.parquet"), catalog)
    with pytest.raises(CatalogError, match=r"set\.parquet: every label list is empty, so there is no class to learn"):
        train(make_config(str(tmp_path / "set.parquet"), str(tmp_path / "run")))


def test_frozen_backbones_without_weights_are_warned_of(small_set: str, capsys: pytest.CaptureFixture[str]) -> None:
    optim = OptimConfig(backbone_lr_factor=0.0)
    catalog = load_catalog(Storage(), small_set)
    for options, is_said in (({}, True), ({"backbone_weights": "imagenet"}, False)):
        config = make_config(small_set, "o", optim=optim, model=ModelConfig(options={"backbone": "tiny", **options}))
        _say_problems(config, catalog)
        assert ("the backbones are frozen, and their weights are random" in capsys.readouterr().out) == is_said


# Whole runs


def readable(catalog: Catalog, rows: Sequence[int], rng_of: Any) -> tuple[list[Clip], list[int]]:
    """Clips of the rows that can be decoded, and those rows."""
    clips, good = [], []
    for row in rows:
        (data,) = read_videos(Storage(), references(catalog.table.slice(row, 1)))
        assert isinstance(data, bytes)
        try:
            clips.append(decode(data, Sampled(rng=rng_of(catalog.table["video_id"][row].as_py())), CLIP).clip())
        except MediaError:
            continue
        good.append(row)
    return clips, good


def plain_training(config: TrainConfig) -> tuple[nn.Module, list[dict[str, float]]]:
    """The same training as a loop over whole batches in one process: no Ray, no ranks."""
    catalog = load_catalog(Storage(), config.catalog)
    train_rows, val_rows = catalog.select("train"), catalog.select("val")
    optim = config.optim
    torch.manual_seed(optim.seed)
    model = tiny_models.mean_colour(3, flow_channels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    num_steps = math.ceil(len(train_rows) / optim.batch_size)
    history = []

    def forward(part: Catalog, rows: Sequence[int], rng_of: Any) -> tuple[torch.Tensor, torch.Tensor]:
        clips, good = readable(part, rows, rng_of)
        inputs = model_inputs(collate(clips), model.input_spec, "cpu")
        return model(**inputs), torch.tensor([part.table["label_id"][row].as_py() for row in good])

    for epoch in range(1, optim.epochs + 1):
        order = epoch_order(
            train_rows, seed=optim.seed, epoch=epoch, run=run_length(train_rows, optim.batch_size)
        ).tolist()
        loss_sum = videos = 0.0
        for index in range(num_steps):
            batch = order[index * optim.batch_size : (index + 1) * optim.batch_size]
            logits, labels = forward(train_rows, batch, lambda name, epoch=epoch: clip_rng(optim.seed, epoch, name))
            loss = F.cross_entropy(logits, labels)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, (epoch - 1) * num_steps + index, optim.epochs * num_steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            loss_sum, videos = loss_sum + float(loss.detach()) * len(labels), videos + len(labels)
        with torch.no_grad():
            logits, labels = forward(val_rows, range(len(val_rows)), lambda name: None)
        top1 = float((logits.argmax(dim=1) == labels).double().mean())
        val_loss = float(F.cross_entropy(logits, labels))
        history.append({"loss": loss_sum / videos, "val_loss": val_loss, "val_top1": top1})
    return model, history


def assert_equals_plain_training(result: dict[str, Any], config: TrainConfig) -> None:
    """Loss, accuracy and weights are those of the plain loop, up to float32 sums in another order."""
    model, history = plain_training(config)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row, expected in zip(rows, history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
        assert row["val_top1"] == expected["val_top1"]
        assert (row["quarantined"], row["val_quarantined"], row["val_videos"]) == (1, 1, 6)
    trained, meta = load_model(Storage(), result["newest"], OWN_NETWORKS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, atol=1e-5, rtol=0)
    assert (meta.epoch, meta.step, meta.samples) == (3, 9, 48)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_worker_and_two_equal_a_plain_loop(
    small_set: str, tmp_path: Path, ray_local: None, num_workers: int
) -> None:
    """The same global batches: both are within 1e-5 of it, which is what float32 sums in another order make."""
    config = make_config(
        small_set, str(tmp_path / "run"), resources=TrainResourcesConfig(num_workers=num_workers, decode_tasks=1)
    )
    assert_equals_plain_training(train(config), config)


@pytest.mark.ray
def test_a_run_whose_worker_is_killed_equals_a_plain_loop(
    small_set: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("self")
    options = {"flow_channels": 2, "victim": str(victim), "at_step": 5}  # in the second epoch
    config = make_config(
        small_set, str(tmp_path / "run"), model=ModelConfig(factory="tiny_models:deadly", options=options)
    )

    result = train(config)

    assert not victim.exists()
    said = capsys.readouterr().out
    assert "2 workers start on cpu\n" in said
    assert "val loss" in said
    assert "top-5" not in said  # there are three classes
    assert "2 workers start on cpu after epoch 1, from " in said
    assert_equals_plain_training(result, config)
    rows = load_quarantine(Storage(), join(config.out, "quarantine.parquet"))
    found = {(row.video_id, row.stage, row.error_class) for row in rows}
    assert found == {
        ("v004", "train on train", "UnreadableContainer"),
        ("v020", "train on val", "UnreadableContainer"),
    }
    losses = [row["loss"] for row in result["metrics"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]

    assert f", {result['samples']} videos trained on in " in said
    again = train(config)
    said = capsys.readouterr().out
    assert "nothing is left to do" in said
    assert f", {result['samples']} videos trained on; quarantined" in said
    assert again["metrics"] == result["metrics"]
    assert find_checkpoint(Storage(), config.out) == result["best"]
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, seed=1)))


@pytest.mark.slow
def test_vcm_sdd_trains_on_s3_and_the_checkpoint_scores_what_the_metrics_say(
    s3_config: StorageConfig, bucket: str, ray_local: None
) -> None:
    storage = Storage(s3_config)
    catalog = colour_set(storage, join(bucket, "set"), train=10, val=7)
    config = make_config(
        join(bucket, "set"),
        join(bucket, "run"),
        model=ModelConfig(factory="vcm_sdd", options={"backbone": "tiny", "heads": 2}),
        clip=dataclasses.replace(CLIP, view=ViewConfig(resize_px=40, crop_px=32)),
        optim=OptimConfig(epochs=2, batch_size=4, precision="bf16"),
        storage=s3_config,
    )

    result = train(config)

    names = {info.uri.removeprefix(config.out + "/") for info in storage.list(config.out + "/")}
    assert {"run.json", "config.yaml", "metrics.jsonl"} <= names
    assert "tensorboard/events.out.tfevents.0000000002.kinoray" in names
    assert "checkpoints/epoch-0002-step-000006/checkpoint.json" in names
    rows = RunFolder(storage, config.out).epochs()
    assert [row.epoch for row in rows] == [1, 2]
    # BatchNorm's statistics differ between ranks while training: what is scored must be what is saved.
    model, meta = load_model(storage, result["newest"], OWN_NETWORKS)
    val = catalog.select("val")
    clips = [decode(data, Sampled(), config.clip).clip() for data in read_videos(storage, references(val.table))]  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**model_inputs(collate(clips), model.input_spec, "cpu")).float()
    labels = torch.from_numpy(val.table["label_id"].to_numpy().astype(np.int64))
    assert meta.metrics["val_loss"] == rows[-1].val_loss
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(rows[-1].val_loss, abs=2e-2)  # bfloat16
    assert meta.clip == config.clip
    assert meta.labels == catalog.labels


@pytest.mark.slow
def test_a_run_ends_at_once_for_what_another_try_would_meet_again(
    small_set: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(small_set, str(tmp_path / "bad"), max_bad_fraction=0.05)
    with pytest.raises(TooManyBad, match="1 of 17 training videos could not be read in epoch 1"):
        train(config)
    assert capsys.readouterr().out.count("workers start") == 1
    assert load_quarantine(Storage(), join(config.out, "quarantine.parquet"))[0].video_id == "v004"
    assert list_checkpoints(Storage(), config.out) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "lr", "error", "message"),
    [
        ("tiny_models:wrong_shape", 0.1, ModelError, r"MeanColour must return logits \[\d, 3\], got \[\d, 4\]"),
        ("tiny_models:mean_colour", 1e36, TrainingDiverged, "the loss is .* in epoch 1; lower optim.lr"),
        ("tiny_models:refuses", 0.1, JobError, "failed 2 times, last with rank 0: ValueError: this network has a bug"),
    ],
)
def test_a_network_that_fails_ends_the_run_in_one_clear_line(
    small_set: str, tmp_path: Path, ray_local: None, model: str, lr: float, error: type[Exception], message: str
) -> None:
    config = make_config(
        small_set,
        str(tmp_path / "run"),
        model=ModelConfig(factory=model),
        optim=OptimConfig(epochs=2, batch_size=8, lr=lr, clip_norm=0.0),
        max_failures=1,
    )
    with pytest.raises(error, match=message):
        train(config)


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on_with_the_same_command(
    small_set: str, tmp_path: Path, ray_local: None
) -> None:
    victim = tmp_path / "victim"
    options = {"flow_channels": 2, "victim": str(victim), "at_step": 5}
    config = make_config(
        small_set, str(tmp_path / "run"), model=ModelConfig(factory="tiny_models:deadly", options=options)
    )
    code = (
        "import os, pathlib, test_train as t, kinoray.config.shared as c\n"
        f"pathlib.Path({str(victim)!r}).write_text(str(os.getpid()))\n"
        f"model = c.ModelConfig(factory='tiny_models:deadly', options={options!r})\n"
        f"t.train(t.make_config({small_set!r}, {config.out!r}, model=model))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], timeout=280, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert load_meta(Storage(), list_checkpoints(Storage(), config.out)[-1][0]).epoch == 1
    assert_equals_plain_training(train(config), config)


@pytest.mark.slow
def test_a_machine_without_memory_is_said_in_one_line(small_set: str, tmp_path: Path) -> None:
    """Ray ends workers as soon as a hundredth of the machine's memory is used."""
    command = [sys.executable, "-m", "kinoray", "train", small_set, "--out", str(tmp_path / "run"), "--preset", "small"]
    environment = {**os.environ, "RAY_memory_usage_threshold": "0.01"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "the machine ran out of memory, and Ray ended workers: lower optim.batch_size" in done.stderr
    assert "low on memory" not in done.stdout + done.stderr
