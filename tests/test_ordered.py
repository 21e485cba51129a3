"""VCM-SDD/X against a naive reference in float64, what it sees that the paper's head cannot, and what it costs."""

import math
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinoray.network.cost import describe
from vcm_sdd.network import vcm_sdd
from vcm_sdd.ordered import ContentOrderHead, vcm_sdd_x

Array = NDArray[np.float64]


def clip(videos: int = 2, segments: int = 2, frames: int = 3, size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Random rgb and flow of float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (videos, segments, frames)
    return {
        name: torch.randn(*shape, channels, size, size, generator=generator)
        for name, channels in (("rgb", 3), ("flow", 2))
    }


# ---- a naive reference: loops over videos, frames and queries


def linear(x: Array, layer: Any) -> Array:
    y = x @ layer.weight.detach().double().numpy().T
    return y if layer.bias is None else y + layer.bias.detach().double().numpy()


def normed(x: Array, layer: Any) -> Array:
    y = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + layer.eps)
    return y * layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def waves(place: int, count: int) -> list[float]:
    angles = [2 * math.pi * (place + 0.5) / count * wave for wave in (0.5, 1, 2, 4)]
    return [*map(math.sin, angles), *map(math.cos, angles)]


def means(things: Array, module: Any) -> Array:
    """One weighted mean a query of things [N, E], side by side."""
    scores = linear(normed(things, module.norm), module.scores)
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    return np.concatenate(
        [sum(w * x for w, x in zip(weights[:, k], things, strict=True)) for k in range(weights.shape[1])]
    )


def reference(head: Any, grids: dict[str, Array]) -> Array:
    some = next(iter(grids.values()))
    num_videos, num_segments, num_frames, height, width, _ = some.shape
    logits = []
    for video in range(num_videos):
        seen: list[Array] = []
        for segment in range(num_segments):
            frames: list[Array] = []
            for frame in range(num_frames):
                nodes = []
                for y in range(height):
                    for x in range(width):
                        node = linear(np.array(waves(y, height) + waves(x, width)), head.place)
                        for name, grid in grids.items():
                            binder, there = head.binders[name], grid[video, segment, frame, y, x]
                            change = there - grid[video, segment, :, y, x].mean(axis=0)
                            both = np.concatenate([normed(there, binder.norm), normed(change, binder.change_norm)])
                            node = node + linear(both, binder.linear)
                        nodes.append(gelu(node))
                frames.append(linear(means(np.array(nodes), head.place_queries), head.frame))
            for change in head.changes:
                inputs = [normed(x, change.norm) for x in frames]
                kernel = change.conv.weight.detach().double().numpy()[:, 0]
                changed = []
                for frame in range(num_frames):
                    total = change.conv.bias.detach().double().numpy().copy()
                    for tap in range(5):
                        if 0 <= frame + tap - 2 < num_frames:
                            total += kernel[:, tap] * inputs[frame + tap - 2]
                    changed.append(frames[frame] + linear(gelu(total), change.linear))
                frames = changed
            seen += frames
        things = np.array([x + linear(np.array(waves(u, len(seen))), head.time) for u, x in enumerate(seen)])
        logits.append(linear(normed(means(things, head.time_queries), head.norm), head.classifier))
    return np.array(logits)


@pytest.mark.parametrize("streams", [("rgb", "flow"), ("rgb",)])
@pytest.mark.parametrize("grid", [(1, 1, 1, 1), (2, 3, 2, 3), (1, 7, 3, 2)])
def test_the_head_equals_loops_in_float64(streams: tuple[str, ...], grid: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = ContentOrderHead(streams, 6, 3, width=8, queries=2, dropout=0.5).double().eval()
    for parameter in head.parameters():  # norms and biases, too
        nn.init.normal_(parameter, std=0.7)
    grids = {name: torch.randn(2, *grid, 6, dtype=torch.float64) for name in streams}
    expected = reference(head, {name: x.numpy() for name, x in grids.items()})
    np.testing.assert_allclose(head(grids).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


# ---- what it sees


def reordered(inputs: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(x) for name, x in inputs.items()}


@pytest.mark.parametrize(
    "change",
    [lambda x: x.flip(2), lambda x: x.flip(1), lambda x: x[:, :, [1, 0, 2]]],
    ids=["frames reversed", "segments reversed", "two frames exchanged"],
)
def test_it_sees_the_order_that_the_papers_head_cannot(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs = clip()
    ours = vcm_sdd_x(num_classes=4, backbone="tiny").eval()
    paper = vcm_sdd(num_classes=4, backbone="tiny", heads=4, stc=False).eval()
    with torch.no_grad():
        assert (ours(**inputs) - ours(**reordered(inputs, change))).abs().max() > 1e-3
        torch.testing.assert_close(paper(**inputs), paper(**reordered(inputs, change)), rtol=1e-4, atol=1e-5)


def test_it_sees_which_thing_moves() -> None:
    """Two clips with the same pictures and the same flow, bound to each other differently in place."""
    torch.manual_seed(0)
    head = ContentOrderHead(("rgb", "flow"), 6, 3, width=8, queries=2, dropout=0.0).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    rgb, flow = torch.randn(2, 1, 1, 2, 1, 4, 6)
    other = flow.flip(4)
    with torch.no_grad():
        assert (head({"rgb": rgb, "flow": flow}) - head({"rgb": rgb, "flow": other})).abs().max() > 1e-3


# ---- how it learns


@pytest.mark.parametrize("num_classes", [4, 400])
@pytest.mark.parametrize("grid", [(1, 1, 1, 1), (2, 3, 2, 5)])
def test_it_starts_at_chance_and_every_weight_gets_a_finite_gradient(num_classes: int, grid: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = ContentOrderHead(("rgb", "flow"), 96, num_classes, width=128, queries=4, dropout=0.4)
    grids = {name: torch.randn(32, *grid, 96).relu().requires_grad_() for name in ("rgb", "flow")}
    loss = nn.functional.cross_entropy(head(grids), torch.arange(32) % num_classes)
    assert loss.item() == pytest.approx(math.log(num_classes), abs=0.6)  # with dropout
    loss.backward()
    for value in (*head.parameters(), *grids.values()):
        assert value.grad is not None
        assert value.grad.isfinite().all()
        assert value.grad.abs().max() < 10


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_a_still_picture_without_contrast_is_no_trouble(size: float) -> None:
    """All features equal: nothing varies over channels, places or times."""
    torch.manual_seed(0)
    head = ContentOrderHead(("rgb", "flow"), 6, 3, width=8, queries=2, dropout=0.0)
    grids = {name: torch.full((2, 2, 3, 2, 2, 6), size, requires_grad=True) for name in ("rgb", "flow")}
    logits = head(grids)
    logits.sum().backward()
    assert logits.isfinite().all()
    for value in (*head.parameters(), *grids.values()):
        assert value.grad is not None
        assert value.grad.isfinite().all()


def test_bfloat16_changes_the_logits_by_little() -> None:
    """Of the backbones alone, as inference prepares them, and of the whole head under autocast, as in training."""
    torch.manual_seed(0)
    head = ContentOrderHead(("rgb", "flow"), 96, 10, width=128, queries=4, dropout=0.0).eval()
    grids = {name: torch.randn(4, 2, 3, 2, 2, 96).relu() for name in ("rgb", "flow")}
    with torch.no_grad():
        exact = head(grids)
        rounded = head({name: x.bfloat16() for name, x in grids.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast_in_it = head(grids)
    assert rounded.dtype == torch.float32
    for found in (rounded, cast_in_it):
        assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


class NothingFromTheHost(TorchFunctionMode):
    """Refuses tensors that are made of numbers of Python's."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        return func(*args, **(kwargs or {}))


def test_a_forward_pass_sends_nothing_to_the_device() -> None:
    """A GPU would wait for it, and a CUDA graph of the call could not be recorded."""
    model = vcm_sdd_x(num_classes=4, backbone="tiny").eval()
    with pytest.raises(AssertionError), NothingFromTheHost():
        torch.zeros(2).new_tensor([1.0])
    with torch.no_grad(), NothingFromTheHost():
        model(**clip())


# ---- what it takes and costs


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "timm:tf_efficientnet_lite0", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("modality", ["rgb", "flow", "two_stream"])
def test_it_works_on_any_grid_and_on_one_stream(backbone: str, modality: str) -> None:
    model = vcm_sdd_x(num_classes=3, backbone=backbone, modality=cast(Any, modality)).eval()
    inputs = clip(videos=1, segments=1, frames=2, size=64)
    wanted = {"rgb": ("rgb",), "flow": ("flow",), "two_stream": ("rgb", "flow")}[modality]
    given: dict[str, Tensor | None] = {name: x if name in wanted else None for name, x in inputs.items()}
    with torch.no_grad():
        logits = model(**given)  # type: ignore[arg-type]
        assert logits.shape == (1, 3)
        features = model.to_features(**given)  # type: ignore[arg-type]
        assert set(features) == set(wanted)
        assert torch.equal(model.from_features(features), logits)
    assert all(hasattr(model, part.split(".")[0]) for part in model.backbone_parts)
    with pytest.raises(ValueError, match=f"this model needs {wanted[0]}"):
        model(rgb=None, flow=None)


@pytest.mark.parametrize(
    ("backbone", "frames", "size"),
    [("resnet101", 6, 224), ("resnet18", 6, 112), ("timm:tf_efficientnet_lite0", 8, 224), ("tiny", 24, 64)],
)
def test_it_costs_at_most_a_twentieth_more_than_vcm_sdd(backbone: str, frames: int, size: int) -> None:
    with torch.device("meta"):
        ours = vcm_sdd_x(num_classes=400, backbone=backbone)
        paper = vcm_sdd(num_classes=400, backbone=backbone)
    mine, theirs = (describe(model, 8, frames, size).macs for model in (ours, paper))
    assert mine <= 1.05 * theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "sound"}, "modality must be one of rgb, flow, two_stream, got 'sound'"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"queries": 1.5}, "queries must be a whole number of at least 1, got 1.5"),
        ({"dropout": 1.0}, "dropout must be a number in 0 .. 1 (1 excluded), got 1.0"),
        ({"dropout": True}, "dropout must be a number in 0 .. 1 (1 excluded), got True"),
        ({"backbone": "no"}, "backbone must be tiny, timm:NAME or one of"),
    ],
)
def test_options_that_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        vcm_sdd_x(num_classes=3, **{"backbone": "tiny", **options})
