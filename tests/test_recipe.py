"""The recipe, piece by piece, against independent truth: no Ray, one process."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from kinoray.config.shared import AugmentConfig, ClipConfig, ModelConfig, OptimConfig, SampleConfig, ViewConfig
from kinoray.errors import ConfigError
from kinoray.network.batch import VideoBatch, model_inputs
from kinoray.network.build import backbone_names, build_model, build_outline, classifier_names, depths
from kinoray.train.config import TrainConfig
from kinoray.train.recipe import (
    PHOTOMETRIC,
    Augmenter,
    Mix,
    class_weights,
    colour_clip,
    freeze,
    learning_rate,
    loss_sum,
    make_optimizer,
    mix_inputs,
    multilabel_loss_sum,
    set_rate,
)
from kinoray.train.runfolder import stopped_early
from kinoray.train.state import seed_step
from kinoray.train.step import Replica
from small_baselines import SMALL
from small_sets import epoch_row

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=32))
TINY = ModelConfig(options={"backbone": "tiny", "heads": 2, "scale": "dim"})
COLOUR = ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2})
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small steps: threads would only wait for each other
    yield
    torch.set_num_threads(num_threads)
    dist.destroy_process_group()


def config_of(model: ModelConfig = TINY, **optim: Any) -> TrainConfig:
    return TrainConfig(catalog="c", out="o", model=model, clip=CLIP, optim=OptimConfig(**optim))


def make_replica(config: TrainConfig, **changes: Any) -> Replica:
    torch.manual_seed(config.optim.seed)
    return Replica(build_model(config.model, 3), 3, config, CPU, **changes)


def some_clips(count: int, seed: int = 0) -> tuple[VideoBatch, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (count, 2, 2, 3, 32, 32), generator=noise, dtype=torch.uint8)
    flow = torch.randint(-127, 128, (count, 2, 2, 2, 32, 32), generator=noise, dtype=torch.int8)
    return VideoBatch(rgb=rgb, flow=flow), torch.arange(count) % 3


def weights_after(config: TrainConfig, steps: int = 2, **changes: Any) -> dict[str, Tensor]:
    replica = make_replica(config, **changes)
    replica.train()
    for step in range(steps):
        seed_step(0, 1, step, 0)
        replica.train_step(*some_clips(6, seed=step), 0, 0.01)
    return {name: value.clone() for name, value in replica.module.state_dict().items()}


# Rates and groups


def test_the_rate_drops_at_the_named_epochs() -> None:
    config = OptimConfig(epochs=5, lr=0.5, step_epochs=(2, 4), warmup_fraction=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]  # 4 steps an epoch, 2 of warm-up
    assert rates[:2] == pytest.approx([0.5 / 3, 1.0 / 3])
    assert rates[2:] == pytest.approx([0.5] * 6 + [0.05] * 8 + [0.005] * 4)


def test_a_network_says_what_its_backbones_are_and_of_others_it_is_all_but_the_classifier() -> None:
    model = build_model(TINY, 3)
    head = {name for name, _ in model.named_parameters()} - backbone_names(model, TINY, 3)  # type: ignore[attr-defined]
    assert {name.split(".")[0] for name in head} == {"head"}
    assert {name.rpartition(".")[0] for name in classifier_names(model, TINY, 3)} == {
        "head.rgb_classifier",
        "head.flow_classifier",
    }
    tsn = ModelConfig(factory="tsn", options={"backbone": "tiny"})
    model = build_model(tsn, 3)
    assert classifier_names(model, tsn, 3) == {"rgb_net.classifier.weight", "rgb_net.classifier.bias"}
    rest = {name for name, _ in model.named_parameters()} - backbone_names(model, tsn, 3)  # type: ignore[attr-defined]
    assert rest == {"rgb_net.classifier.weight", "rgb_net.classifier.bias"}


def test_backbones_step_at_their_own_rate() -> None:
    """AdamW's first step is lr * sign(gradient), nearly, whatever the gradient's size: the rate can be read off."""
    config = config_of(backbone_lr_factor=0.25, weight_decay=0.0, clip_norm=0.0)
    model = build_model(TINY, 3)
    assert isinstance(model, nn.Module)
    before = {name: value.clone() for name, value in model.named_parameters()}
    backbone = backbone_names(model, TINY, 3)
    replica = Replica(model, 3, config, CPU, backbone=backbone)
    replica.train()
    replica.train_step(*some_clips(6), 0, 0.01)
    for name, value in replica.module.named_parameters():
        expected = 0.0025 if name in backbone else 0.01
        moved = (value - before[name]).abs().max().item()
        assert moved == pytest.approx(expected, rel=2e-2), name


DEEP = ModelConfig(factory="mvit_v2_s", options={"crop_px": 32, "frames": 2})


@pytest.mark.parametrize(
    ("model", "depth_of"),
    [
        (TINY, {"rgb_backbone.stem.0.weight": 3, "flow_backbone.down.1.0.weight": 2, "rgb_backbone.block.2.bias": 1}),
        (ModelConfig(factory="tsm", options={"backbone": "tiny"}), {"rgb_net.backbone.grid.stem.0.weight": 3}),
        (
            DEEP,
            {"rgb_net.net.conv_proj.weight": 17, "rgb_net.net.blocks.0.norm1.weight": 16}
            | {"rgb_net.net.blocks.15.norm1.weight": 1, "rgb_net.net.norm.weight": 0},
        ),
    ],
    ids=["vcm_sdd", "tsm", "mvit_v2_s"],
)
def test_the_rate_falls_with_the_depth(model: ModelConfig, depth_of: dict[str, int]) -> None:
    """lr_factor ** depth, and the backbone's own factor once."""
    net = cast(nn.Module, build_outline(model, 3))
    config = OptimConfig(layer_decay=0.8, backbone_lr_factor=0.5, lr=0.25)
    backbone = backbone_names(cast(Any, net), model, 3)
    optimizer = make_optimizer(net, config, backbone)
    set_rate(optimizer, 0.25)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    rates = {names[id(value)]: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert set(rates) == set(names.values())
    for name, depth in depth_of.items():
        assert rates[name] == pytest.approx(0.25 * 0.5 * 0.8**depth), name
    for name in classifier_names(cast(Any, net), model, 3):
        assert rates[name] == 0.25
    plain = make_optimizer(net, OptimConfig(backbone_lr_factor=0.5), backbone)
    assert [group["lr_factor"] for group in plain.param_groups] == [1.0, 0.5]


def test_steps_follow_the_rates_of_the_depths() -> None:
    """AdamW's first step is lr * sign(gradient), nearly."""
    replica = make_replica(config_of(layer_decay=0.5, weight_decay=0.0, clip_norm=0.0))
    before = {name: value.clone() for name, value in replica.module.named_parameters()}
    replica.train()
    replica.train_step(*some_clips(6), 0, 0.01)
    for name, value in replica.module.named_parameters():
        depth = {"stem": 3, "down": 2, "block": 1}.get(name.split(".")[1], 0) if "backbone" in name else 0
        moved = (value - before[name]).abs().max().item()
        assert moved == pytest.approx(0.01 * 0.5**depth, rel=2e-2), name


@pytest.mark.parametrize("case", [*SMALL, "vcm_sdd"])
def test_every_network_names_its_depths_in_the_order_of_its_forward_pass(case: str) -> None:
    factory, options, (segments, frames), crop = SMALL.get(case, ("vcm_sdd", {"backbone": "resnet18"}, (2, 2), 32))
    model = ModelConfig(factory=factory, options=options)
    net = build_outline(model, 3).eval()
    found = depths(net)
    assert set(found.values()) == set(range(len(cast(Any, net).depth_parts) + 1))
    assert {name for name, depth in found.items() if depth == 0} >= classifier_names(cast(Any, net), model, 3)
    named = [part for group in cast(Any, net).depth_parts for part in group]
    for name, depth in found.items():
        assert sum(name == part or name.startswith(f"{part}.") for part in named) == (depth > 0), name
    called: dict[str, list[int]] = {}

    def note(stream: list[int], depth: int, *_: Any) -> None:
        stream.append(depth)

    for name, module in net.named_modules():
        own = [found[f"{name}.{one}"] for one, _ in module.named_parameters(recurse=False)]
        if own and max(own):
            stream = called.setdefault(name.split(".")[0], [])
            module.register_forward_pre_hook(partial(note, stream, max(own)))
    spec = cast(Any, net).input_spec
    shape = (1, segments, frames, 3, crop, crop)
    rgb = torch.empty(shape, device="meta") if spec.rgb else None
    flow = torch.empty((*shape[:3], 2, crop, crop), device="meta") if spec.flow_channels else None
    with torch.no_grad():
        cast(Any, net)(rgb=rgb, flow=flow)
    for stream in called.values():
        if factory == "eco":  # its tails lie side by side
            stream = stream[: stream.index(3) if 3 in stream else None]
        assert stream
        assert stream == sorted(stream, reverse=True)


def test_a_network_without_named_depths_has_one_rate() -> None:
    net = cast(nn.Module, build_model(COLOUR, 3))
    with pytest.raises(ConfigError, match=r"optim\.layer_decay must be 1 for MeanColour, which names no depth_parts"):
        make_optimizer(net, OptimConfig(layer_decay=0.9))
    with pytest.raises(ValueError, match=r"optim\.layer_decay must be above 0 and at most 1, got 1\.5"):
        OptimConfig(layer_decay=1.5)


def test_frozen_backbones_and_batch_norms_stay() -> None:
    config = config_of(backbone_lr_factor=0.0, freeze_bn=True)
    replica = make_replica(config, backbone=backbone_names(build_model(TINY, 3), TINY, 3))
    before = {name: value.clone() for name, value in replica.module.state_dict().items()}
    replica.train()
    replica.train_step(*some_clips(6), 0, 0.01)
    moved = {name for name, value in replica.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} == {"head"}

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    freeze(net, OptimConfig(freeze_bn=True), ())
    assert [name for name, value in net.named_parameters() if value.requires_grad] == ["0.weight", "0.bias"]
    assert len(make_optimizer(net, OptimConfig(freeze_bn=True)).param_groups[0]["params"]) == 2


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_what_its_docstring_says(smoothing: float, weighted: bool, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    labels, partners = torch.tensor([0, 3, 2, 2, 1]), torch.tensor([1, 0, 3, 2, 2])
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64) if weighted else None
    share = 0.7 if mixed else 1.0
    found = loss_sum(
        logits, labels, partners=partners if mixed else None, share=share, smoothing=smoothing, weights=weights
    )
    expected = 0.0
    for video in range(5):
        scores = [math.exp(value) for value in logits[video].tolist()]
        for c in range(4):
            q = share * (c == labels[video].item()) + (1 - share) * (c == partners[video].item())
            w = 1.0 if weights is None else weights[c].item()
            expected -= w * ((1 - smoothing) * q + smoothing / 4) * math.log(scores[c] / sum(scores))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["bce", "focal", "asymmetric"])
@pytest.mark.parametrize(("share", "smoothing"), [(1.0, 0.0), (0.75, 0.2)])
def test_the_loss_of_several_labels_equals_its_formula(
    kind: Literal["bce", "focal", "asymmetric"], share: float, smoothing: float
) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (5, 4)))
    labels, partners = (torch.from_numpy(rng.integers(0, 2, (5, 4)).astype(float)) for _ in range(2))
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    found = multilabel_loss_sum(
        logits, labels, kind, partners=partners, share=share, smoothing=smoothing, weights=weights
    )
    expected = 0.0
    for video in range(5):
        for c in range(4):
            q = share * labels[video, c].item() + (1 - share) * partners[video, c].item()
            y = (1 - smoothing) * q + smoothing / 2
            p = 1 / (1 + math.exp(-logits[video, c].item()))
            has, lacks = {
                "bce": (-math.log(p), -math.log(1 - p)),
                "focal": (-((1 - p) ** 2) * math.log(p), -(p**2) * math.log(1 - p)),
                "asymmetric": (-math.log(p), -(max(p - 0.05, 0) ** 4) * math.log(1 - max(p - 0.05, 0))),
            }[kind]
            expected += weights[c].item() * (y * has + (1 - y) * lacks)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    plain = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").item()
    if kind == "bce":
        assert multilabel_loss_sum(logits, labels, kind).item() == pytest.approx(plain, rel=1e-12)


def test_a_step_learns_several_labels_and_scores_are_kept_for_the_mean_precision() -> None:
    replica = make_replica(config_of(COLOUR))
    clips, _ = some_clips(6)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.uint8)
    replica.eval()
    replica.score(clips, labels, 0)
    before = replica.finish()
    logits, truth = replica.scored()
    assert torch.equal(truth, labels)
    expected = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum").item()
    assert before.loss_sum == pytest.approx(expected, rel=1e-6)
    assert before.top1_hits == sum(labels[row, int(logits[row].argmax())] for row in range(6))
    assert before.top5_hits == 5  # one video has no class
    replica.reset()
    replica.train()
    for step in range(30):
        seed_step(0, 1, step, 0)
        replica.train_step(clips, labels, 0, 0.05)
    replica.reset()
    replica.eval()
    replica.score(clips, labels, 0)
    assert len(replica.scored()[0]) == 6
    assert replica.finish().loss < 0.95 * before.loss


def test_class_weights_have_mean_one_and_balance_the_classes() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2 + [3] * 4)  # no video of class 2
    for power, expected in [(0.0, [1, 1, 0, 1]), (1.0, [14 / 24, 14 / 6, 0, 14 / 12])]:
        weights = class_weights(labels, 4, power)
        assert weights.tolist() == pytest.approx(expected)
        assert weights[labels].mean().item() == pytest.approx(1.0)
    lists = torch.tensor([[1.0, 1, 0]] * 3 + [[1, 0, 0]])
    assert class_weights(lists, 3, 1.0).tolist() == pytest.approx([7 / 8, 7 / 6, 7 / 2])  # a class may be without video
    assert class_weights(torch.zeros(4, 3), 3, 0.5).tolist() == [1, 1, 1]
    half = class_weights(labels, 4, 0.5)
    assert (half[1] / half[0]).item() == pytest.approx(2.0)


def test_a_step_follows_the_gradient_of_the_weighted_smoothed_loss() -> None:
    config = config_of(COLOUR, label_smoothing=0.1, clip_norm=0.0)
    weights = torch.tensor([0.5, 1.0, 2.0])
    replica = make_replica(config, class_weights=weights)
    clips, labels = some_clips(6)
    model = build_model(COLOUR, 3)
    assert isinstance(model, nn.Module)
    model.load_state_dict(replica.module.state_dict())
    replica.train()
    replica.train_step(clips, labels, 0, 0.01)
    logits = model(**model_inputs(clips, model.input_spec, CPU))  # type: ignore[arg-type]
    (F.cross_entropy(logits, labels, weight=weights, reduction="none", label_smoothing=0.1).sum() / 6).backward()
    for (name, ours), theirs in zip(replica.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


# Computing a step


@pytest.mark.parametrize("mix", [None, Mix(0.75, torch.tensor([3, 4, 5, 0, 1, 2]), (4, 6, 16, 16))])
@pytest.mark.parametrize("accumulate", [2, 4, 9])
def test_parts_of_a_batch_add_up_to_its_gradient(accumulate: int, mix: Mix | None) -> None:
    """freeze_bn: a batch norm that sees parts computes something else. Tolerance: float32 sums in another order."""
    gradients = []
    for number in (1, accumulate):
        replica = make_replica(config_of(accumulate=number, freeze_bn=True, clip_norm=0.0))
        replica.train()
        replica.train_step(*some_clips(6), 0, 0.01, mix)
        gradients.append([p.grad.clone() for p in replica.module.parameters() if p.grad is not None])
        assert replica.finish().videos == 6
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("what", ["head", "all"])
def test_recomputing_changes_no_number(what: str) -> None:
    """Bit for bit, batch norms' statistics included."""
    plain, twice = weights_after(config_of()), weights_after(config_of(recompute=what))
    assert plain.keys() == twice.keys()
    for name, value in plain.items():
        assert torch.equal(value, twice[name]), name


def test_recomputing_keeps_fewer_activations() -> None:
    kept = {}
    for what in ("none", "head", "all"):
        replica = make_replica(config_of(recompute=what))
        replica.train()
        sizes: list[int] = []
        pack = lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = replica.module(**model_inputs(some_clips(2)[0], replica.module.input_spec, CPU))  # type: ignore[arg-type]
        kept[what] = sum(sizes)
        assert logits.requires_grad
    assert kept["none"] > kept["head"] > kept["all"]
    assert kept["all"] < 0.5 * kept["none"]


@pytest.mark.parametrize(
    ("model", "message"),
    [(COLOUR, "MeanColour, which names no backbone_parts"), (ModelConfig(factory="tsm"), "names no")],
)
def test_recompute_is_refused_where_it_would_do_nothing(model: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_replica(config_of(model, recompute="head"))


@pytest.mark.slow  # a minute of the compiler
def test_a_compiled_network_takes_the_same_step() -> None:
    """Tolerance: compiled kernels add in another order."""
    plain, compiled = weights_after(config_of(COLOUR), 1), weights_after(config_of(COLOUR, compile=True), 1)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "fp32 or bf16 on CPUs"),
        ({"step_epochs": (3, 2)}, "rising whole numbers"),
        ({"step_epochs": (0, 2)}, "rising whole numbers"),
        ({"compile": True, "recompute": "all"}, "none with optim.compile"),
        ({"class_balance": 2.0}, "in 0 .. 1"),
        ({"seed": -1}, "in 0 .. 2"),
        ({"seed": 2**63}, "in 0 .. 2"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


# Moving average


def test_the_average_is_the_recursion_and_is_what_is_scored() -> None:
    replica = make_replica(config_of(ema_decay=0.2))
    assert replica.state.average is not None
    expected = {name: value.double() for name, value in replica.module.state_dict().items()}
    replica.train()
    for step, decay in enumerate([0.1, 2 / 11, 0.2, 0.2]):  # (1 + t) / (10 + t), at most 0.2
        replica.train_step(*some_clips(6, seed=step), 0, 0.01)
        for name, value in replica.module.state_dict().items():
            known = expected[name]
            expected[name] = decay * known + (1 - decay) * value.double() if value.is_floating_point() else value
    averaged = replica.state.weights()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name].double(), value.double(), atol=1e-6, rtol=1e-5, msg=name)

    clips, labels = some_clips(5, seed=9)
    replica.finish()
    replica.reset()
    replica.eval()
    replica.score(clips, labels, 0)
    model = build_model(TINY, 3)
    assert isinstance(model, nn.Module)
    model.load_state_dict(averaged)
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(**model_inputs(clips, model.input_spec, CPU)), labels)  # type: ignore[arg-type]
    assert replica.finish().loss == pytest.approx(loss.item(), rel=1e-5)


def test_an_average_that_is_saved_and_loaded_goes_on_exactly() -> None:
    config = config_of(ema_decay=0.9)

    def steps(replica: Replica, numbers: range) -> None:
        replica.train()
        for step in numbers:
            seed_step(0, 1, step, 0)
            replica.train_step(*some_clips(6, seed=step), 0, 0.01)

    straight = make_replica(config)
    steps(straight, range(2))
    straight.finish()
    saved = straight.snapshot(in_epoch=True)
    steps(straight, range(2, 4))

    resumed = make_replica(dataclasses.replace(config, optim=dataclasses.replace(config.optim, seed=5)))
    resumed.resume(saved.weights, saved.train, "here")
    steps(resumed, range(2, 4))
    ends = [replica.snapshot(in_epoch=False) for replica in (straight, resumed)]
    for first, second in ((ends[0].weights, ends[1].weights), (ends[0].train, ends[1].train)):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
    live = {name.removeprefix("live/") for name in saved.train if name.startswith("live/")}
    assert live == set(saved.weights)
    assert torch.equal(straight.finish().loss_sum + torch.zeros(()), resumed.finish().loss_sum + torch.zeros(()))


# Colours and mixtures


def a_clip(seed: int = 0) -> Tensor:
    """A smooth picture that moves and brightens: every frame has another histogram."""
    t, y, x = np.meshgrid(np.arange(6), np.arange(20), np.arange(24), indexing="ij")
    planes = [100 + 15 * t + 60 * np.sin((x + 3 * t) / (3 + c)) + 30 * np.cos(y / (2 + c)) for c in range(3)]
    clip = np.clip(np.stack(planes, axis=1), 0, 255).astype(np.uint8)
    return torch.from_numpy(clip).reshape(2, 3, 3, 20, 24)


def test_jitter_is_torchvisions_with_one_draw_for_all_frames() -> None:
    """Without contrast, which looks at the whole picture, each frame is what torchvision makes of it alone."""
    clip, seen = a_clip(), set()
    config = AugmentConfig(colour_jitter=0.4)
    for seed in range(20):
        ours = colour_clip(clip, config, np.random.Generator(np.random.PCG64(seed)))
        draws = np.random.Generator(np.random.PCG64(seed))
        factors = [float(draws.uniform(0.6, 1.4)) for _ in range(3)]
        order = draws.permutation(3).tolist()
        frames = clip.flatten(0, 1)
        for which in order:
            if which == 1:  # mean grey of the whole clip: PIL and torchvision take that of the picture
                grey = V.rgb_to_grayscale(frames).float().floor().mean()
                frames = (factors[1] * frames + (1 - factors[1]) * grey).clamp(0, 255).to(torch.uint8)
            else:
                adjust = {0: V.adjust_brightness, 2: V.adjust_saturation}[which]
                frames = torch.stack([adjust(frame, factors[which]) for frame in frames])
        # Rounding of the mean grey may move a pixel by one level before later operations scale it.
        assert (ours.flatten(0, 1).int() - frames.int()).abs().max() <= 3
        seen.add(tuple(order))
    assert len(seen) == 6


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_randaugments_operations_treat_the_clip_as_one_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinoray.train import recipe

    monkeypatch.setattr(recipe, "PHOTOMETRIC", (name,))
    clip = a_clip()
    config = AugmentConfig(randaugment_ops=1, randaugment_magnitude=15)
    frames = clip.flatten(0, 1).numpy().astype(np.int64)
    for seed in range(4):
        draws = np.random.Generator(np.random.PCG64(seed))
        draws.integers(1)
        factor = 1 + (-0.45 if draws.random() < 0.5 else 0.45)
        ours = colour_clip(clip, config, np.random.Generator(np.random.PCG64(seed))).flatten(0, 1).numpy()
        grey = (0.2989 * frames[:, 0] + 0.587 * frames[:, 1] + 0.114 * frames[:, 2])[:, None]
        low, high = frames.min(axis=(0, 2, 3), keepdims=True), frames.max(axis=(0, 2, 3), keepdims=True)
        expected = {
            "identity": frames,
            "brightness": factor * frames,
            "colour": factor * frames + (1 - factor) * grey,
            "contrast": factor * frames + (1 - factor) * np.floor(grey).mean(),
            "posterize": frames & 0b11111100,
            "solarize": np.where(frames >= 127.5, 255 - frames, frames),
            "autocontrast": (frames - low) * (255 / (high - low)),
        }
        if name in expected:
            # Levels are cut to whole ones at the end, and the grey that 0.45 of comes in is cut before.
            assert np.abs(ours - np.clip(expected[name], 0, 255)).max() < 1.46, name
        elif name == "sharpness":
            alone = [V.adjust_sharpness(frame, factor).numpy() for frame in clip.flatten(0, 1)]
            assert np.array_equal(ours, np.stack(alone))
        else:  # equalize: one rising map of levels for each channel of the whole clip
            for channel in range(3):
                levels: dict[int, int] = {}
                for before, after in zip(frames[:, channel].flat, ours[:, channel].flat, strict=True):
                    assert levels.setdefault(int(before), int(after)) == int(after)
                assert [levels[key] for key in sorted(levels)] == sorted(levels.values())
            assert ours.min() == 0
            assert ours.max() == 255


def test_colours_follow_seed_epoch_and_video_and_leave_flow_alone() -> None:
    clips, _ = some_clips(3)
    config = AugmentConfig(colour_jitter=0.4, randaugment_ops=2)
    augmenter = Augmenter(config, 0, CPU)
    found = augmenter.colour(clips, ["a", "b", "c"], 1)
    turned = augmenter.colour(VideoBatch(rgb=clips.rgb.flip(0), flow=clips.flow), ["c", "b", "a"], 1)  # type: ignore[union-attr]
    assert found.rgb is not None
    assert turned.rgb is not None
    assert torch.equal(found.rgb, turned.rgb.flip(0))
    assert found.flow is clips.flow
    for other in (
        Augmenter(config, 1, CPU).colour(clips, ["a", "b", "c"], 1),
        augmenter.colour(clips, ["a", "b", "c"], 2),
    ):
        assert other.rgb is not None
        assert not torch.equal(found.rgb, other.rgb)
    assert Augmenter(AugmentConfig(), 0, CPU).colour(clips, ["a", "b", "c"], 1) is clips


def test_mixtures_blend_both_streams_alike() -> None:
    clips, _ = some_clips(4)
    inputs = model_inputs(clips, build_model(TINY, 3).input_spec, CPU)
    partners = torch.tensor([2, 3, 0, 1])
    others = {name: None if x is None else x[partners] for name, x in inputs.items()}
    blended = mix_inputs(inputs, others, Mix(0.75, partners, None))
    cut = mix_inputs(inputs, others, Mix(0.75, partners, (8, 3, 16, 16)))
    inside = np.zeros((32, 32), bool)
    inside[8:24, 3:19] = True
    for name in ("rgb", "flow"):
        x, y = inputs[name], others[name]
        assert x is not None
        assert y is not None
        torch.testing.assert_close(blended[name], 0.75 * x + 0.25 * y)
        assert torch.equal(cut[name], torch.where(torch.from_numpy(inside), y, x))  # type: ignore[arg-type]


def test_mixtures_are_drawn_for_the_step() -> None:
    both = Augmenter(AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0), 0, CPU)
    drawn = [both.mix(8, 32, 1, step) for step in range(300)]
    kinds = ["none" if mix is None else "mixup" if mix.box is None else "cutmix" for mix in drawn]
    assert kinds.count("none") == 0
    assert 110 < kinds.count("mixup") < 190
    for mix in drawn:
        assert mix is not None
        assert 0.5 <= mix.share <= 1.0
        assert sorted(mix.partners.tolist()) == list(range(8))
        assert not any(index == partner for index, partner in enumerate(mix.partners.tolist()))
        if mix.box is not None:
            top, left, height, width = mix.box
            assert 0 <= top <= 32 - height
            assert 0 <= left <= 32 - width
            assert mix.share == 1 - height * width / 1024
    again = [both.mix(8, 32, 1, step) for step in range(300)]
    other = [both.mix(8, 32, 2, step) for step in range(300)]
    assert [(mix.share, mix.box) for mix in again if mix] == [(mix.share, mix.box) for mix in drawn if mix]
    assert [mix.share for mix in other if mix] != [mix.share for mix in drawn if mix]
    assert both.mix(1, 32, 1, 0) is None
    assert Augmenter(AugmentConfig(), 0, CPU).mix(8, 32, 1, 0) is None


# When to stop


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([0.1, 0.5, 0.4, 0.5], 2, True),  # an equal score is no higher one
        ([0.1, 0.5, 0.4, 0.6], 2, False),
        ([0.1, 0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.4], 0, False),
        ([], 1, False),
        ([None, 0.5, None, 0.4, None], 2, False),  # epochs that were not scored do not count
        ([None, 0.5, None, 0.4, None, 0.3], 2, True),
    ],
)
def test_patience_counts_scorings_without_a_higher_accuracy(
    scores: list[float | None], patience: int, expected: bool
) -> None:
    rows = [epoch_row(number, val_top1=score) for number, score in enumerate(scores, start=1)]
    config = TrainConfig(catalog="c", out="o", patience=patience)
    assert stopped_early(rows, config) is expected
