"""What the head can and cannot do, whatever its weights: facts that follow from the equations."""

import math
import statistics
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vcm_sdd.consistency import Consistency, Grid
from vcm_sdd.network import TwoStreamHead
from vcm_sdd.options import Options

PAPER: Grid = (6, 7, 7)
GRIDS: list[Grid] = [(1, 1, 1), (1, 3, 2), (4, 1, 1), (2, 5, 3), PAPER]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_nodes(grid: Grid, num_channels: int, num_segments: int = 2) -> tuple[Tensor, Tensor]:
    shape = (num_segments, math.prod(grid), num_channels)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("metric", ["box", "l1", "l2"])
@pytest.mark.parametrize("self_loop", [True, False])
def test_rows_of_s_are_weights_over_the_neighbours_only(grid: Grid, metric: str, self_loop: bool) -> None:
    s_NN = Consistency(metric=metric, self_loop=self_loop, init="random").double().matrix(grid).detach()
    torch.testing.assert_close(s_NN.sum(dim=1), torch.ones(len(s_NN), dtype=torch.float64), rtol=0, atol=1e-12)
    nodes = torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(-1, 3).double()
    norm = {"box": math.inf, "l1": 1, "l2": 2}[metric]
    near_NN = torch.linalg.vector_norm(nodes[:, None] - nodes[None], ord=norm, dim=-1) <= 2
    if not self_loop and len(nodes) > 1:
        near_NN.fill_diagonal_(False)
    assert torch.equal(s_NN > 0, near_NN)


def test_papers_graph_has_20184_edges_and_27_values() -> None:
    stc = Consistency(init="random").double()
    s_NN = stc.matrix(PAPER).detach()
    assert int((s_NN > 0).sum()) == 20_184
    # Ratios to the row's self weight undo the normalisation of the row.
    ratios = (s_NN / s_NN.diagonal()[:, None])[s_NN > 0]
    assert len(torch.unique(ratios.round(decimals=12))) <= 27


def test_near_init_starts_close_to_the_identity_whatever_the_seed() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        self_weight = float(Consistency(init="near").matrix(PAPER).detach().diagonal().mean())
        assert 0.88 <= self_weight <= 0.96, f"seed {seed}"


def test_random_init_starts_as_a_blur() -> None:
    self_weights, neighbours = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        s_NN = Consistency(init="random").matrix(PAPER).detach()
        self_weights.append(float(s_NN.diagonal().mean()))
        neighbours.append(float((-torch.special.xlogy(s_NN, s_NN).sum(dim=1)).exp().mean()))
    assert statistics.median(self_weights) < 0.05
    assert 55 < statistics.median(neighbours) < 20_184 / 294


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_stc_before_a_mean_is_only_a_position_weighting(grid: Grid, residual: bool) -> None:
    """Why the row `STC No_MFF` of table 2 can hardly differ from `No_STC No_MFF`."""
    stc = Consistency(init="random", residual=residual).double()
    x, other = make_nodes(grid, 5)
    weights_N = stc.matrix(grid).mean(dim=0) + (1 / math.prod(grid) if residual else 0)
    for values in (x, other):
        expected = torch.einsum("n,mnd->md", weights_N, values)
        torch.testing.assert_close(stc(values, grid).mean(dim=1), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stc(values, grid, pooled=True), expected, rtol=1e-12, atol=1e-12)


def run_head(options: Options, rgb: Tensor, flow: Tensor, grid: Grid) -> Tensor:
    torch.manual_seed(1)
    head = TwoStreamHead(rgb.shape[-1], 5, options).double()
    with torch.no_grad():
        result: Tensor = head(rgb, flow, grid=grid, num_segments=2)
    return result


@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (1, 2, 3)], ids=["time", "height", "width", "all"])
@pytest.mark.parametrize("changed", [{}, {"mff": False}, {"scale": "dim", "mff_residual": True}, {"metric": "l2"}])
def test_head_is_blind_to_reversed_frames_and_mirrored_grids(axes: tuple[int, ...], changed: dict[str, str]) -> None:
    """So direction has to come from inside the flow images, and a mirror image has to negate their x component."""
    grid = (3, 4, 5)
    nodes = make_nodes(grid, 8)
    mirrored = [x.unflatten(1, grid).flip(axes).flatten(1, 3) for x in nodes]
    options = Options(heads=2, stc_init="random", **changed)
    torch.testing.assert_close(
        run_head(options, *mirrored, grid), run_head(options, *nodes, grid), rtol=1e-12, atol=1e-12
    )


def test_without_stc_the_head_is_blind_to_any_order_of_nodes() -> None:
    grid = (3, 4, 5)
    order = torch.randperm(math.prod(grid))
    rgb, flow = make_nodes(grid, 8)
    options = Options(heads=2, stc=False)
    shuffled = run_head(options, rgb[:, order], flow[:, torch.randperm(len(order))], grid)
    torch.testing.assert_close(shuffled, run_head(options, rgb, flow, grid), rtol=1e-12, atol=1e-12)
    # With STC places matter: the same shuffle must show, or the test above says nothing.
    options = Options(heads=2, stc_init="random")
    difference = run_head(options, rgb[:, order], flow[:, order], grid) - run_head(options, rgb, flow, grid)
    assert float(difference.abs().max()) > 1e-3


def test_order_of_segments_does_not_matter_and_one_repeated_segment_counts_once() -> None:
    grid = (2, 2, 2)
    rgb, flow = make_nodes(grid, 8)
    for consensus in ("logits", "probs"):
        options = Options(heads=2, consensus=consensus)
        swapped = run_head(options, rgb.flip(0), flow.flip(0), grid)
        torch.testing.assert_close(swapped, run_head(options, rgb, flow, grid), rtol=1e-12, atol=1e-12)
    options = Options(heads=2)
    twice = run_head(options, rgb[:1].repeat(2, 1, 1), flow[:1].repeat(2, 1, 1), grid)
    torch.manual_seed(1)
    once = TwoStreamHead(8, 5, options).double()(rgb[:1], flow[:1], grid=grid, num_segments=1)
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-12)


def test_probs_consensus_returns_log_probabilities() -> None:
    rgb, flow = make_nodes((2, 2, 2), 8)
    log_probs = run_head(Options(heads=2, consensus="probs"), rgb, flow, (2, 2, 2))
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_frobenius_scale_makes_logits_grow_with_the_features_and_dim_scale_with_their_square() -> None:
    """Attention gets sharper as features grow; measured on the scores' spread in vcm_sdd.pooled."""
    from vcm_sdd.pooled import scaled_scores

    q, k = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    for frobenius, growth in ((True, 3.0), (False, 9.0)):
        small = scaled_scores(q, k, frobenius=frobenius)
        large = scaled_scores(3 * q, 3 * k, frobenius=frobenius)
        torch.testing.assert_close(large, growth * small, rtol=1e-9, atol=1e-12)


class TestMatrixCache:
    """In eval mode s is built once for a grid and a state of the parameters."""

    def test_is_used_in_eval_mode_and_not_in_training(self) -> None:
        stc = Consistency()
        with torch.no_grad():
            assert stc.matrix(PAPER) is not stc.matrix(PAPER)
            stc.eval()
            assert stc.matrix(PAPER) is stc.matrix(PAPER)
        assert stc.matrix(PAPER).requires_grad

    def test_follows_every_way_in_which_parameters_change(self) -> None:
        stc = Consistency().eval()
        other = Consistency(init="random")
        optimizer = torch.optim.SGD(stc.parameters(), lr=0.5)

        def step() -> None:
            optimizer.zero_grad()
            stc.matrix(PAPER).diagonal().sum().backward()
            optimizer.step()

        def write_data() -> None:
            stc.train()
            stc.w_p.data.copy_(torch.rand(3, 32))
            stc.eval()

        changes = [step, lambda: stc.load_state_dict(other.state_dict()), write_data, stc.double]
        with torch.no_grad():
            last = stc.matrix(PAPER)
        for change in changes:
            change()
            fresh = Consistency().to(stc.w_p.dtype)
            fresh.load_state_dict(stc.state_dict())
            with torch.no_grad():
                assert torch.equal(stc.matrix(PAPER), fresh.matrix(PAPER))
                assert stc.matrix(PAPER).dtype == stc.w_p.dtype
                assert not torch.equal(stc.matrix(PAPER), last)
                last = stc.matrix(PAPER)

    def test_keeps_only_a_few_grids(self) -> None:
        stc = Consistency().eval()
        with torch.inference_mode():
            for size in range(1, 40):
                stc.matrix((1, 1, size))
        assert len(stc._matrix) <= 8
        assert len(stc._constants) <= 16
