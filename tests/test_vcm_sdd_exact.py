"""The fast head against the equations taken one pair at a time (vcm_reference): values and every gradient."""

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import vcm_reference
from vcm_sdd.consistency import Consistency
from vcm_sdd.fusion import CrossModalFusion
from vcm_sdd.network import TwoStreamHead, vcm_sdd
from vcm_sdd.options import Options
from vcm_sdd.pooled import pooled_attention

TOLERANCE = 1e-10
SMALL = (1, 2, 2, 2, 2, 4)
"""Videos, segments, frames, rows, columns, channels."""

OPTIONS = {
    "default": Options(heads=2),
    "no stc": Options(heads=2, stc=False),
    "no mff": Options(mff=False),
    "neither": Options(stc=False, mff=False),
    "stc_residual, no mff": Options(mff=False, stc_residual=True),
    "one head": Options(heads=1),
    "head a channel": Options(heads=4),
    "scale=dim": Options(heads=2, scale="dim"),
    "scope=frame": Options(heads=2, scope="frame"),
    "eq12=literal": Options(heads=2, eq12="literal"),
    "eq12=literal, scale=dim": Options(heads=2, eq12="literal", scale="dim"),
    "mff_residual": Options(heads=2, mff_residual=True),
    "mff_norm": Options(heads=2, mff_norm=True),
    "mff_norm, residual, literal": Options(heads=2, mff_norm=True, mff_residual=True, eq12="literal"),
    "geometry=inverse_log": Options(heads=2, geometry="inverse_log"),
    "eps": Options(heads=2, eps=0.3),
    "metric=l1": Options(heads=2, metric="l1"),
    "metric=l2": Options(heads=2, metric="l2"),
    "radius=1": Options(heads=2, radius=1),
    "radius=0": Options(heads=2, radius=0),
    "radius=3": Options(heads=2, radius=3),
    "self_loop=False": Options(heads=2, self_loop=False),
    "share_stc=False": Options(heads=2, share_stc=False),
    "stc_residual": Options(heads=2, stc_residual=True),
    "stc_init=random": Options(heads=2, stc_init="random"),
    "consensus=probs": Options(heads=2, consensus="probs"),
    "shared_classifier": Options(heads=2, shared_classifier=True),
}

SHAPES = {
    "one node": (2, 1, 1, 1, 1, 4),
    "one frame": (1, 2, 1, 3, 2, 4),
    "one row": (1, 1, 4, 1, 4, 2),
    "one column of one frame": (1, 3, 1, 5, 1, 4),
    "no interior": (2, 2, 2, 1, 2, 6),
    "odd sizes": (1, 1, 3, 3, 1, 2),
    "further than the radius": (1, 1, 5, 1, 2, 4),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_features(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rgb, flow = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rgb.requires_grad_(), flow.requires_grad_()


def make_head(num_channels: int, options: Options, seed: int) -> TwoStreamHead:
    torch.manual_seed(seed)
    head = TwoStreamHead(num_channels, 3, options).double()
    with torch.no_grad():
        for norm in head.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                torch.nn.init.normal_(norm.weight)
                torch.nn.init.normal_(norm.bias)
    return head


NAMES = {
    "rgb_stc.w_p": "w_p",
    "rgb_stc.w_g": "w_g",
    "flow_stc.w_p": "flow_w_p",
    "flow_stc.w_g": "flow_w_g",
    "rgb_classifier.weight": "rgb_m",
    "rgb_classifier.bias": "rgb_bias",
    "flow_classifier.weight": "flow_m",
    "flow_classifier.bias": "flow_bias",
    "mff.rgb_norm.weight": "rgb_gain",
    "mff.rgb_norm.bias": "rgb_shift",
    "mff.flow_norm.weight": "flow_gain",
    "mff.flow_norm.bias": "flow_shift",
}


def run_head(head: TwoStreamHead, rgb: Tensor, flow: Tensor) -> Tensor:
    num_segments, num_frames, rows, columns = rgb.shape[1:5]
    nodes = [x.flatten(0, 1).flatten(1, 3) for x in (rgb, flow)]
    result: Tensor = head(*nodes, grid=(num_frames, rows, columns), num_segments=num_segments)
    return result


def assert_head_matches(shape: tuple[int, ...], options: Options, seed: int) -> None:
    """Logits and the gradients of both inputs and of every parameter, against the reference."""
    head = make_head(shape[-1], options, seed)
    rgb, flow = random_features(shape, seed)
    weights = {NAMES[name]: parameter for name, parameter in head.named_parameters()}
    inputs = [rgb, flow, *weights.values()]
    names = ["rgb", "flow", *weights]

    fast = run_head(head, rgb, flow)
    slow = vcm_reference.logits(rgb, flow, weights, options)
    torch.testing.assert_close(fast, slow, rtol=TOLERANCE, atol=TOLERANCE)

    # A random direction, so that no gradient vanishes by symmetry.
    direction = torch.randn(fast.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    fast_grads = torch.autograd.grad((fast * direction).sum(), inputs, allow_unused=True)
    slow_grads = torch.autograd.grad((slow * direction).sum(), inputs, allow_unused=True)
    for name, ours, theirs in zip(names, fast_grads, slow_grads, strict=True):
        assert (ours is None) == (theirs is None), f"{name} takes part in only one of the two"
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_head_equals_the_equations_for_every_option(options: Options) -> None:
    assert_head_matches(SMALL, options, seed=1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("self_loop", [True, False])
def test_head_equals_the_equations_for_every_shape(shape: tuple[int, ...], self_loop: bool) -> None:
    assert_head_matches(shape, Options(heads=2, self_loop=self_loop, mff_residual=not self_loop), seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [1, 2])
def test_head_equals_the_equations_on_a_grid_with_an_interior(radius: int) -> None:
    assert_head_matches((1, 1, 3, 3, 3, 4), Options(heads=2, radius=radius), seed=2)
    assert_head_matches((2, 2, 3, 3, 5, 4), Options(heads=2, radius=radius, metric="l2"), seed=2)


def random_options(seed: int) -> Options:
    draw = random.Random(seed)
    switches = ("mff_residual", "mff_norm", "self_loop", "share_stc", "stc_residual", "shared_classifier")
    return Options(
        heads=draw.choice([1, 2, 4]),
        scale=draw.choice(["frobenius", "dim"]),
        scope=draw.choice(["segment", "frame"]),
        eq12=draw.choice(["text", "literal"]),
        geometry=draw.choice(["log", "inverse_log"]),
        metric=draw.choice(["box", "l1", "l2"]),
        radius=draw.choice([1, 2, 3]),
        stc_init=draw.choice(["near", "random"]),
        consensus=draw.choice(["logits", "probs"]),
        **{name: draw.random() < 0.5 for name in switches},
    )


@pytest.mark.parametrize("seed", range(12))
def test_head_equals_the_equations_for_options_in_combination(seed: int) -> None:
    shape = random.Random(seed).choice([SMALL, *SHAPES.values()])
    options = random_options(seed)
    while shape[-1] % options.heads:
        options = dataclasses.replace(options, heads=options.heads // 2)
    assert_head_matches(shape, options, seed)


def test_options_of_the_reference_tests_cover_every_option() -> None:
    default = Options()
    changed = {
        field.name
        for options, field in itertools.product(OPTIONS.values(), dataclasses.fields(Options))
        if getattr(options, field.name) != getattr(default, field.name)
    }
    backbones = {"backbone", "backbone_weights", "flow_channels"}
    assert changed == {field.name for field in dataclasses.fields(Options)} - backbones


def test_whole_network_equals_its_backbones_and_the_equations() -> None:
    torch.manual_seed(3)
    model = vcm_sdd(num_classes=3, backbone="tiny", heads=4).double().eval()
    rgb = torch.randn(2, 2, 2, 3, 40, 24, dtype=torch.float64)
    flow = torch.randn(2, 2, 2, 2, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        grids = [
            backbone(x.flatten(0, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:3])
            for backbone, x in ((model.rgb_backbone, rgb), (model.flow_backbone, flow))
        ]
        weights = {NAMES[name]: value for name, value in model.head.named_parameters()}
        expected = vcm_reference.logits(*grids, weights, model.head.options)
        torch.testing.assert_close(model(rgb=rgb, flow=flow), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_fast_forms_equal_the_slow_ones_at_the_papers_size() -> None:
    """294 nodes are too many for the loops: here the pooled form meets the answers themselves, in float64."""
    torch.manual_seed(4)
    fusion = CrossModalFusion(heads=8).double()
    rgb, flow = (torch.randn(2, 294, 64, dtype=torch.float64).relu().requires_grad_() for _ in range(2))
    fast = fusion(rgb, flow)
    slow = [answer.mean(dim=1) for answer in fusion.nodes(rgb, flow)]
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    fast_grads = torch.autograd.grad(sum(x.square().sum() for x in fast), (rgb, flow))
    slow_grads = torch.autograd.grad(sum(x.square().sum() for x in slow), (rgb, flow))
    for ours, theirs in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parametrize("frobenius", [True, False])
@pytest.mark.parametrize("literal", [True, False])
def test_pooled_gradients_pass_the_numerical_check(frobenius: bool, literal: bool) -> None:
    rgb, flow = random_features((3, 5, 4), seed=5)
    assert torch.autograd.gradcheck(
        lambda r, f: tuple(pooled_attention(r, f, heads=2, frobenius=frobenius, literal=literal)), (rgb, flow)
    )


def test_result_does_not_depend_on_how_many_segments_share_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb, flow = random_features((7, 5, 4), seed=6)

    def run() -> list[Tensor]:
        outputs = pooled_attention(rgb, flow, heads=2, frobenius=True, literal=False)
        return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), (rgb, flow))]

    whole = run()
    for scores in (1, 2 * 25 * 2, 2 * 25 * 3):
        monkeypatch.setattr("vcm_sdd.pooled._CPU_SCORES", scores)
        for ours, theirs in zip(run(), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1.0, 1e3, 1e5])
def test_large_and_tiny_values_still_equal_the_equations(factor: float) -> None:
    options = Options(heads=2)
    head = make_head(4, options, seed=7)
    rgb, flow = (x.detach() * factor for x in random_features((1, 1, 2, 2, 1, 4), seed=7))
    rgb.requires_grad_()
    weights = {NAMES[name]: parameter for name, parameter in head.named_parameters()}
    fast, slow = run_head(head, rgb, flow), vcm_reference.logits(rgb, flow, weights, options)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(fast.sum(), rgb), torch.autograd.grad(slow.sum(), rgb)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", ["both", "flow", "one video"])
@pytest.mark.parametrize("pooled", [True, False])
def test_zero_features_give_no_nan(dtype: torch.dtype, zero: str, pooled: bool) -> None:
    rgb, flow = (x.detach()[0].to(dtype) for x in random_features((1, 2, 6, 4), seed=8))
    if zero == "both":
        rgb.zero_()
    flow[slice(None) if zero != "one video" else slice(1)] = 0
    rgb.requires_grad_()
    flow.requires_grad_()
    fusion = CrossModalFusion(heads=2)
    outputs = fusion(rgb, flow) if pooled else [x.mean(dim=1) for x in fusion.nodes(rgb, flow)]
    grads = torch.autograd.grad(sum(x.float().sum() for x in outputs), (rgb, flow))
    assert all(x.isfinite().all() for x in (*outputs, *grads))


def test_float32_stays_finite_and_right_where_half_precision_would_overflow() -> None:
    """Scores of 1e7 and more: their squares sum to 1e17, above float16's 65,504 and far below float32's limit."""
    rgb, flow = (x.detach()[0].abs() * 2e3 for x in random_features((1, 2, 6, 16), seed=9))
    exact = CrossModalFusion(heads=2)(rgb, flow)
    single = CrossModalFusion(heads=2)(rgb.float(), flow.float())
    for ours, theirs in zip(single, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=0)


def test_bf16_autocast_keeps_the_scale_in_float32() -> None:
    """Scores summed in bfloat16 put the norm off by 0.2-0.3 %; under autocast only the products are rounded."""
    rgb, flow = (x.detach()[0].float().relu() for x in random_features((1, 4, 96, 64), seed=10))
    fusion = CrossModalFusion(heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = fusion(rgb, flow)
    for ours, theirs in zip(fast, fusion(rgb, flow), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=1e-3)


def test_stc_matrix_under_autocast_is_not_rounded() -> None:
    torch.manual_seed(0)
    stc = Consistency()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stc.matrix((2, 3, 3)), stc.matrix((2, 3, 3)).float())
        rounded = stc.matrix((2, 3, 3))
    assert torch.equal(rounded, stc.matrix((2, 3, 3)))
