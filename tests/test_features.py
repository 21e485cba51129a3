"""Frozen backbones and the cache of their features: every number is that of a training without the cache."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kinoray.catalog.table import load_catalog
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.errors import ConfigError, ModelError
from kinoray.network.batch import FeatureBatch, VideoBatch, model_inputs
from kinoray.network.build import SplitModel, backbone_names, build_model
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.features import FeatureCache, FeatureFeed, backbone_digest
from kinoray.train.loop import TrainLoop
from kinoray.train.recipe import Mix
from kinoray.train.runfolder import RunFolder
from kinoray.train.state import seed_step
from kinoray.train.step import Replica
from kinoray.train.verb import check_training, train
from kinoray.tune.config import TuneConfig
from kinoray.tune.verb import tune
from small_sets import set_in

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))
TINY = ModelConfig(options={"backbone": "tiny", "heads": 2, "scale": "dim"})
TSN = ModelConfig(factory="tsn", options={"backbone": "tiny"})
TSM = ModelConfig(factory="tsm", options={"backbone": "tiny"})
NETWORKS = {
    "vcm_sdd": TINY,
    "vcm_sdd resnet18": ModelConfig(options={"backbone": "resnet18", "heads": 2}),
    "vcm_sdd efficientnet": ModelConfig(options={"backbone": "timm:test_efficientnet", "heads": 2, "stc": False}),
    "vcm_sdd_x": ModelConfig(factory="vcm_sdd_x", options={"backbone": "tiny"}),
    "tsn two_stream": ModelConfig(factory="tsn", options={"backbone": "tiny", "modality": "two_stream"}),
    "tsn resnet18": ModelConfig(factory="tsn", options={"backbone": "resnet18"}),
    "tsm": TSM,
    "tsm mobilenet": ModelConfig(factory="tsm", options={"backbone": "timm:mobilenetv3_small_050"}),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    dist.destroy_process_group()


def make_replica(model: ModelConfig, **optim: Any) -> Replica:
    config = TrainConfig(
        catalog="c", out="o", model=model, clip=CLIP, optim=OptimConfig(**{"backbone_lr_factor": 0.0} | optim)
    )
    torch.manual_seed(0)
    network = build_model(model, 3)
    backbone = backbone_names(network, model, 3) if config.optim.backbone_lr_factor != 1 else frozenset[str]()
    return Replica(network, 3, config, CPU, backbone=backbone)


def some_clips(count: int, seed: int = 0) -> tuple[VideoBatch, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (count, 2, 2, 3, 32, 32), generator=noise, dtype=torch.uint8)
    flow = torch.randint(-127, 128, (count, 2, 2, 2, 32, 32), generator=noise, dtype=torch.int8)
    return VideoBatch(rgb=rgb, flow=flow), torch.arange(count) % 3


# The split


@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_a_network_is_its_two_halves(model: ModelConfig) -> None:
    torch.manual_seed(0)
    network = build_model(model, 3)
    split, module = cast(SplitModel, network), cast(nn.Module, network).eval()
    inputs: dict[str, Any] = model_inputs(some_clips(3)[0], network.input_spec, CPU)
    frozen = backbone_names(network, model, 3)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    features = split.to_features(**inputs)
    assert {len(x) for x in features.values()} == {3}
    assert not any(x.requires_grad for x in features.values())  # all that is trained lies in the other half
    for parameter in module.parameters():
        parameter.requires_grad_(requires_grad=True)
    detached = {name: x.detach() for name, x in features.items()}
    split.from_features(detached).sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None}.isdisjoint(frozen)
    with torch.no_grad():
        assert torch.equal(split.from_features(detached), network(**inputs))


# Steps


@pytest.mark.parametrize("name", ["vcm_sdd", "vcm_sdd efficientnet", "vcm_sdd_x", "tsn two_stream", "tsm"])
@pytest.mark.usefixtures("one_rank")
def test_steps_on_features_are_steps_on_clips_bit_for_bit(name: str) -> None:
    """With dropout, a moving average, and parts of batches; features come from other batches than they go into."""
    model, ends = NETWORKS[name], []
    for source in ("clips", "features"):
        replica = make_replica(model, ema_decay=0.5, accumulate=2, label_smoothing=0.1)
        before = {name: value.clone() for name, value in replica.module.state_dict().items()}
        replica.train()
        for step in range(3):
            clips, labels = some_clips(5, seed=step)
            given: VideoBatch | FeatureBatch = clips
            if source == "features":
                alone = [replica.features(clips.select(slice(i, i + 1))).tensors for i in range(5)]
                given = FeatureBatch({name: torch.cat([x[name] for x in alone]) for name in alone[0]})
            seed_step(0, 1, step, 0)
            replica.train_step(given, labels, 0, 0.01)
        trained = replica.finish()
        frozen = backbone_names(build_model(model, 3), model, 3)
        owners = {name.rpartition(".")[0] for name in frozen}
        after = replica.module.state_dict()
        for name, value in before.items():  # weights, and statistics of the batch norms among them
            assert torch.equal(after[name], value) == (name.rpartition(".")[0] in owners), name
        replica.reset()
        replica.eval()
        clips, labels = some_clips(4, seed=9)
        replica.score(clips if source == "clips" else replica.features(clips), labels, 0)
        ends.append((trained.loss, replica.finish().loss, {name: value.clone() for name, value in after.items()}))
    (loss, val_loss, weights), (other_loss, other_val_loss, others) = ends
    assert (loss, val_loss) == (other_loss, other_val_loss)
    assert all(torch.equal(others[name], value) for name, value in weights.items())


@pytest.mark.parametrize("mix", [None, Mix(0.75, torch.tensor([3, 4, 5, 0, 1, 2]), (4, 6, 16, 16))])
@pytest.mark.usefixtures("one_rank")
def test_a_frozen_backbone_computes_as_in_scoring(mix: Mix | None) -> None:
    """The loss is that of the plain network in eval mode. Tolerance: its convolutions see the clips together."""
    replica = make_replica(TINY)
    clips, labels = some_clips(6)
    network = build_model(TINY, 3)
    module = cast(nn.Module, network)
    module.load_state_dict(replica.module.state_dict())
    module.eval()
    inputs = model_inputs(clips, network.input_spec, CPU)
    if mix is not None:
        top, left, height, width = mix.box or (0, 0, 0, 0)
        for x in inputs.values():
            assert x is not None
            inside = (..., slice(top, top + height), slice(left, left + width))
            x[inside] = x[mix.partners][inside]
    logits = network(**cast(dict[str, Any], inputs))
    expected = F.cross_entropy(logits, labels)
    if mix is not None:
        expected = mix.share * expected + (1 - mix.share) * F.cross_entropy(logits, labels[mix.partners])
    replica.train()
    replica.train_step(clips, labels, 0, 0.01, mix)
    assert replica.finish().loss == pytest.approx(expected.item(), rel=1e-5)


class Leaky(nn.Module):
    """Trains a weight in the half that is to be frozen."""

    backbone_parts = ("backbone",)

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = build_model(TSN, 3).input_spec
        self.backbone, self.scale, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 4), nn.Linear(4, 3)

    def to_features(self, *, rgb: Tensor, flow: None) -> dict[str, Tensor]:
        return {"all": self.scale(self.backbone(rgb[:, 0, 0]).mean(dim=(2, 3)))}

    def from_features(self, features: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(features["all"])
        return logits

    def forward(self, *, rgb: Tensor, flow: None) -> Tensor:
        return self.from_features(self.to_features(rgb=rgb, flow=flow))


@pytest.mark.usefixtures("one_rank")
def test_a_half_that_is_trained_is_not_kept_as_features() -> None:
    optim = OptimConfig(backbone_lr_factor=0.0)
    config = TrainConfig(catalog="c", out="o", model=TSN, clip=CLIP, optim=optim)
    network = Leaky()
    replica = Replica(cast(Any, network), 3, config, CPU, backbone={"backbone.weight", "backbone.bias"})
    before = network.scale.weight.clone()
    replica.train()
    replica.train_step(*some_clips(3), 0, 0.01)
    assert not torch.equal(network.scale.weight, before)  # without the cache it learns
    with pytest.raises(ModelError, match=r"Leaky\.to_features uses weights that are trained"):
        replica.features(some_clips(1)[0])


class Wet(Leaky):
    """Drops some of what its backbone makes, in front of where it is cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.scale.requires_grad_(False)
        self.drop = nn.Dropout(0.5)

    def to_features(self, *, rgb: Tensor, flow: None) -> dict[str, Tensor]:
        return {"all": self.drop(super().to_features(rgb=rgb, flow=flow)["all"])}


@pytest.mark.usefixtures("one_rank")
def test_dropout_in_front_of_the_cut_stands_still() -> None:
    """Else a cache would drop the same values in every epoch, and a digest of it would never come again."""
    config = TrainConfig(catalog="c", out="o", model=TSN, clip=CLIP, optim=OptimConfig(backbone_lr_factor=0.0))
    torch.manual_seed(0)
    network = Wet()
    replica = Replica(cast(Any, network), 3, config, CPU, backbone={"backbone.weight", "backbone.bias"})
    clips, labels = some_clips(4)
    replica.train()
    kept = replica.features(clips)
    assert network.training
    assert network.drop.training
    assert torch.equal(kept.tensors["all"], replica.features(clips).tensors["all"])
    with torch.no_grad():
        expected = F.cross_entropy(network.from_features(dict(kept.tensors)), labels)
    replica.train_step(clips, labels, 0, 0.01)
    assert replica.finish().loss == pytest.approx(expected.item(), rel=1e-6)


# The cache


def cache_in(folder: Path, *, gb: float = 1.0, clip: ClipConfig = CLIP, backbone: str = "b", **augment: Any) -> Any:
    like = FeatureBatch({"rgb": torch.zeros(1, 2, 3), "flow": torch.zeros(1, 5, dtype=torch.bfloat16)})
    config = CacheConfig(gb=gb, folder=str(folder), keep="features")
    return FeatureCache(config, clip, AugmentConfig(**augment), backbone, like)


def features(seed: int) -> FeatureBatch:
    noise = torch.Generator().manual_seed(seed)
    flow = torch.randn(1, 5, generator=noise).to(torch.bfloat16)
    return FeatureBatch({"rgb": torch.randn(1, 2, 3, generator=noise), "flow": flow})


@pytest.mark.parametrize("damage", ["flip", "head", "cut", "longer", "empty"])
def test_a_damaged_file_is_not_read_and_is_made_again(tmp_path: Path, damage: str) -> None:
    cache, key = cache_in(tmp_path), "ab" * 16
    cache.add(key, features(1))
    into = cache.empty(1)
    assert cache.load(key, into)
    assert all(torch.equal(into.tensors[name], x) for name, x in features(1).tensors.items())
    (path,) = tmp_path.glob("??/*")
    content = path.read_bytes()
    at = {"flip": len(content) - 3, "head": 9}.get(damage, 0)
    flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    path.write_bytes({"cut": content[:-1], "longer": content + b"0", "empty": b""}.get(damage, flipped))
    assert not cache.load(key, into)
    assert not cache.has(key)
    cache.add(key, features(1))
    assert path.read_bytes() == content


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    size = 24 + 6 * 4 + 5 * 2
    cache = cache_in(tmp_path, gb=2.5 * size / 1e9)
    for number in range(4):
        assert cache.has_room() == (number < 2)
        cache.add(f"{number}" * 32, features(number))
    assert [cache.has(f"{number}" * 32) for number in range(4)] == [True, True, False, False]
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) == 2 * size


def test_everything_that_decides_features_is_in_the_key(tmp_path: Path) -> None:
    base = cache_in(tmp_path)
    wider = dataclasses.replace(CLIP, view=ViewConfig(resize_px=48, crop_px=32))
    keys = [
        base.key("r", "v", 0, 1),
        base.key("other", "v", 0, 1),
        base.key("r", "other", 0, 1),
        base.key("r", "v", 1, 1),
        base.key("r", "v", 0, 2),
        base.key("r", "v", 0, None),
        cache_in(tmp_path, backbone="c").key("r", "v", 0, 1),
        cache_in(tmp_path, backbone="c").key("r", "v", 0, None),
        cache_in(tmp_path, clip=wider).key("r", "v", 0, 1),
        cache_in(tmp_path, clip=wider).key("r", "v", 0, None),
        cache_in(tmp_path, colour_jitter=0.1).key("r", "v", 0, 1),
    ]
    assert len(set(keys)) == len(keys)
    assert base.key("r", "v", 0, None) == base.key("r", "other", 9, None)  # what is scored is drawn for nobody
    assert base.key("r", "v", 0, None) == cache_in(tmp_path, colour_jitter=0.1).key("r", "v", 0, None)


def test_one_process_at_a_time_has_the_turn(tmp_path: Path) -> None:
    folder = cache_in(tmp_path).folder
    first = folder.try_lock("turn-a")
    assert first is not None
    assert folder.try_lock("turn-a") is None
    other = folder.try_lock("turn-b")
    assert other is not None
    os.close(first)
    again = folder.try_lock("turn-a")
    assert again is not None
    for descriptor in (other, again):
        os.close(descriptor)


@pytest.mark.usefixtures("one_rank")
def test_backbones_are_told_apart_and_heads_are_not() -> None:
    def digest_of(model: ModelConfig, *, change: str = "", **optim: Any) -> str:
        replica = make_replica(model, **optim)
        if change:
            replica.module.state_dict()[change].view(-1)[:1].add_(1e-3)
        return backbone_digest(replica.module, replica.probe())

    frobenius = dataclasses.replace(TINY, options={**TINY.options, "scale": "frobenius", "radius": 1})
    assert digest_of(TINY) == digest_of(TINY) == digest_of(frobenius)
    others = [
        digest_of(TINY, change="rgb_backbone.stem.0.weight"),
        digest_of(TINY, change="flow_backbone.stem.1.running_var"),
        digest_of(TINY, precision="bf16"),
        digest_of(TSM),
        digest_of(dataclasses.replace(TSM, options={**TSM.options, "shift_div": 4})),  # of equal weights
    ]
    assert len({digest_of(TINY), *others}) == 6

    replica = make_replica(TINY, freeze_bn=False)
    before = backbone_digest(replica.module, replica.probe())
    replica.train()
    replica.train_step(*some_clips(4), 0, 0.1)
    assert backbone_digest(replica.module, replica.probe()) == before  # a resumed run finds what it kept


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OptimConfig()}, r"cache\.keep must be frames unless optim\.backbone_lr_factor is 0"),
        ({"augment": AugmentConfig(cutmix_alpha=1.0)}, r"cache\.keep must be frames with augment\.mixup_alpha"),
        ({"parallel": "fsdp"}, r"cache\.keep must be frames with parallel fsdp"),
    ],
)
def test_what_features_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    frozen = {"optim": OptimConfig(backbone_lr_factor=0.0), "cache": CacheConfig(gb=1, keep="features")}
    with pytest.raises(ConfigError, match=message):
        TrainConfig(catalog="c", out="o", **cast(dict[str, Any], frozen | changes))
    with pytest.raises(ConfigError, match=r"cache\.gb must be greater than 0 with cache\.keep features, got 0"):
        CacheConfig(keep="features")


def test_a_network_without_halves_is_refused(tmp_path: Path) -> None:
    catalog = set_in(tmp_path, train=3, val=3)
    config = TrainConfig(
        catalog=catalog,
        out="o",
        model=ModelConfig(factory="tiny_models:mean_colour"),
        optim=OptimConfig(backbone_lr_factor=0.0),
        cache=CacheConfig(gb=1, keep="features"),
    )
    with pytest.raises(ConfigError, match=r"cache\.keep must be frames for tiny_models:mean_colour, which does not"):
        check_training(config, load_catalog(Storage(), catalog))


def test_views_come_again_in_turn() -> None:
    assert [AugmentConfig(num_views=2).view_of(epoch) for epoch in range(1, 6)] == [1, 2, 1, 2, 1]
    assert [AugmentConfig().view_of(epoch) for epoch in range(1, 4)] == [1, 2, 3]


# Whole runs


def run_config(catalog: str, out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "catalog": catalog,
        "out": str(out),
        "model": ModelConfig(options={"backbone": "tiny", "heads": 2, "scale": "dim"}),
        "clip": dataclasses.replace(CLIP, flow=FlowConfig(bound_px=4.0)),
        "augment": AugmentConfig(colour_jitter=0.2, num_views=2),
        "optim": OptimConfig(epochs=3, batch_size=4, backbone_lr_factor=0.0),
        "resources": TrainResourcesConfig(num_workers=1, decode_tasks=1, local_cpus=4),
    }
    return settings | changes


def numbers_of(run: str) -> tuple[list[float | None], list[float | None], list[int | None]]:
    """Loss of every step, validation loss of every epoch, videos from the cache in every epoch."""
    folder = RunFolder(Storage(), run)
    epochs = folder.epochs()
    return [row.loss for row in folder.steps()], [row.val_loss for row in epochs], [row.cached for row in epochs]


def ignore(_: object) -> None:
    """Say nothing."""


def run_here(config: TrainConfig, say: Callable[[str], None] = ignore, saw: Callable[[int], None] = ignore) -> None:
    """A rank of a training in this process: a fraction of the start of Ray Train's workers."""
    catalog = load_catalog(Storage(), config.catalog)
    RunFolder(Storage(), config.out).claim(config, catalog)
    assert TrainLoop(config, catalog.digest, CPU, say=say, saw=saw, report=ignore, go_on=None).run()


@pytest.mark.ray
@pytest.mark.usefixtures("one_rank", "ray_local")
def test_runs_with_and_without_the_cache_are_equal_whatever_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 videos to train on, one of them broken, and 4 to score: without a cache, and with one that is empty, that a
    killed run has left half full and with a damaged file, that is full after one epoch, that waits for another run, and
    that somebody empties."""
    catalog = set_in(tmp_path / "set", train=11, val=4, broken=(2,))
    run_here(TrainConfig(**run_config(catalog, tmp_path / "plain")))
    losses, val_losses, cached = numbers_of(str(tmp_path / "plain"))
    assert cached == [None] * 3
    assert len(set(losses)) == 9

    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), keep="features")
    run_here(TrainConfig(**run_config(catalog, tmp_path / "cold", cache=cache)))
    assert numbers_of(str(tmp_path / "cold")) == (losses, val_losses, [0, 4, 14])  # views 1, 2, and 1 again

    files = sorted((tmp_path / "cache").glob("??/*"))
    assert len(files) == 10 + 10 + 4
    size = files[0].stat().st_size
    for path in files[::3]:
        path.unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    run_here(TrainConfig(**run_config(catalog, tmp_path / "killed", cache=cache)))
    *same, cached = numbers_of(str(tmp_path / "killed"))
    assert same == [losses, val_losses]
    assert sum(number or 0 for number in cached) == 14 + 14 + 14 - 8 - 1  # each made once

    small = dataclasses.replace(cache, folder=str(tmp_path / "small"), gb=5.5 * size / 1e9)
    run_here(TrainConfig(**run_config(catalog, tmp_path / "full", cache=small)))
    assert numbers_of(str(tmp_path / "full")) == (losses, val_losses, [0, 0, 5])

    shard = tmp_path / "set" / "shard-1.bin"  # another file in the place of one that has no checksum: of videos 8 to 14
    os.utime(shard, (1e9, 1e9))
    turns = [os.open(path, os.O_RDWR) for path in (tmp_path / "cache").glob("turn-*")]
    for turn in turns:
        fcntl.flock(turn, fcntl.LOCK_EX)
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        while turns and "another run is making the features that this one wants next" in line:
            os.close(turns.pop())

    run_here(TrainConfig(**run_config(catalog, tmp_path / "other", cache=cache)), say)
    assert not turns
    assert sum("it waits for them" in line for line in lines) == 1
    assert numbers_of(str(tmp_path / "other")) == (losses, val_losses, [7, 7 + 4, 14])

    made = []
    make = FeatureFeed._make

    def counted(self: FeatureFeed, part: Any, rows: Any, *args: Any) -> Any:
        made.append(len(rows))
        return make(self, part, rows, *args)

    def saw(num_steps: int) -> None:
        for path in (tmp_path / "cache").glob("??/*"):
            if num_steps == 1:
                path.unlink()

    monkeypatch.setattr(FeatureFeed, "_make", counted)
    run_here(TrainConfig(**run_config(catalog, tmp_path / "emptied", cache=cache)), saw=saw)
    same = numbers_of(str(tmp_path / "emptied"))
    assert same[:2] == (losses, val_losses)
    num_read = same[2][0] or 0  # in the first step
    assert made == [1, 10 - num_read, 4, 11, 0, num_read + 1, 0]  # the broken one, then together all that went


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_read_what_they_have_kept(tmp_path: Path, ray_local: None) -> None:
    """Each in its turn; of the last batch, of one video, one of them has none."""
    two = TrainResourcesConfig(num_workers=2, decode_tasks=2, local_cpus=4)
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), keep="features")
    catalog = set_in(tmp_path / "set", train=9, val=3)
    train(TrainConfig(**run_config(catalog, tmp_path / "plain", resources=two)))
    train(TrainConfig(**run_config(catalog, tmp_path / "kept", resources=two, cache=cache)))
    losses, val_losses, _ = numbers_of(str(tmp_path / "plain"))
    assert numbers_of(str(tmp_path / "kept")) == (losses, val_losses, [0, 3, 12])


@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_a_sweep_make_features_once(tmp_path: Path, ray_local: None) -> None:
    """Two of four trials at a time, which differ in rate and head: each view of a video meets a backbone once."""
    settings = run_config(set_in(tmp_path / "set", train=8, val=4), tmp_path / "sweep")
    tune(
        TuneConfig(
            **settings,
            cache=CacheConfig(gb=1, folder=str(tmp_path / "cache"), keep="features"),
            space={"optim.lr": "0.001,0.01", "model.options.scale": "dim,frobenius"},
            search="grid",
            grace_epochs=99,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    rows = [row for line in lines for row in RunFolder(Storage(), line["run"]).epochs()]
    assert sum(8 + 4 - (row.cached or 0) for row in rows) == 2 * 8 + 4
    assert not list((tmp_path / "cache").iterdir())
