"""STC, the spatio-temporal consistency of section 3.1: every node becomes a weighted mean of its neighbours.

The weights depend on positions only, so they are one matrix for all videos and channels; it must be rebuilt whenever
the 128 parameters change.

Shapes: M segments of all videos, T frames, H W feature grid, N = T*H*W nodes in the order t, y, x; D channels,
E hidden units, O distinct offsets (dt, dy, dx)
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vcm_sdd.precision import no_autocast

__all__ = ["Consistency", "Grid"]

Grid = tuple[int, int, int]
"""Frames, rows and columns of a segment's feature grid."""

_CACHED_GRIDS = 8


class Consistency(nn.Module):
    """Mix each node with its neighbours in space and time (section 3.1, Eq. 3-10).

        geom(i, j) = (g(|dx|), g(|dy|), g(|dt| / T))     Eq. 3-6  g(u) = -log(u + eps); dx, dy in cells
        sim_NN     = relu(geom_NN3 @ w_p) @ w_g          Eq. 7    w_p: 3 x 32, w_g: 32 x 1, no bias
        s_NN       = softmax over the neighbours of i    Eq. 8    others get weight 0
        out_MND    = s_NN @ x_MND                        Eq. 9-10

    Departures: the paper prints 1 / log, which is singular at distance 1 and not monotone, and says "the farther, the
    smaller", so g is -log; eps keeps distance 0 finite. Neighbours are at most `radius` cells away in each of time,
    height and width (`metric` chooses another distance). A node without neighbours (a grid of one node with
    self_loop=False) keeps itself.

    sim has at most (radius + 1)^3 distinct values, so s is a small table, one gather and one softmax.
    """

    def __init__(
        self,
        *,
        hidden: int = 32,
        geometry: Literal["log", "inverse_log"] = "log",
        eps: float = 1e-3,
        metric: Literal["box", "l1", "l2"] = "box",
        radius: int = 2,
        self_loop: bool = True,
        residual: bool = False,
        init: Literal["near", "random"] = "near",
    ) -> None:
        super().__init__()
        self.geometry, self.eps = geometry, eps
        self.metric, self.radius, self.self_loop = metric, radius, self_loop
        self.residual, self.init = residual, init
        self.w_p = nn.Parameter(torch.empty(3, hidden))
        self.w_g = nn.Parameter(torch.empty(hidden, 1))
        self.reset_parameters()
        self._constants: dict[tuple[object, ...], Tensor] = {}
        self._matrix: dict[tuple[object, ...], Tensor] = {}

    def reset_parameters(self) -> None:
        """Draw the magnitudes as nn.Linear does; `near` makes them positive, so that nearer means larger.

        `near` also scales them to their expected total, so that the draw does not decide the self weight (it would
        range over 0.79-0.99).
        """
        bounds = [1 / math.sqrt(weight.shape[0]) for weight in (self.w_p, self.w_g)]
        for weight, bound in zip((self.w_p, self.w_g), bounds, strict=True):
            nn.init.uniform_(weight, 0.0 if self.init == "near" else -bound, bound)
        if self.init == "near" and not self.w_g.is_meta:  # an outline has no numbers
            expected = self.w_p.numel() * math.prod(bounds) / 4
            with torch.no_grad():
                self.w_g.mul_(expected / (self.w_p @ self.w_g).sum())

    def train(self, mode: bool = True) -> "Consistency":
        """As nn.Module.train; also forgets the cached matrices, which writes through `.data` would leave stale."""
        self._matrix.clear()
        return super().train(mode)

    def matrix(self, grid: Grid) -> Tensor:
        """Return s_NN (Eq. 8) in the parameters' dtype, rows summing to 1. Cached in eval mode without gradients."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.w_p.is_inference():
            return self._build(grid)
        weights = (self.w_p, self.w_g)
        state = tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)
        if (grid, state) not in self._matrix:
            if len(self._matrix) >= _CACHED_GRIDS:
                self._matrix.clear()
            self._matrix[grid, state] = self._build(grid)
        return self._matrix[grid, state]

    def forward(self, x_MND: Tensor, grid: Grid, *, pooled: bool = False) -> Tensor:
        """Return the mixed nodes [M, N, D], or their mean over nodes [M, D]; N must be the product of the grid.

        The mean needs no mixed nodes: mean_i sum_j s_ij x_j = sum_j c_j x_j with c the column means of s. STC in front
        of an average pool is a fixed weighting of positions and nothing more.
        """
        s_NN = self.matrix(grid)
        if pooled:
            c_N = s_NN.mean(dim=0) + (1 / s_NN.shape[0] if self.residual else 0)
            return c_N.to(x_MND.dtype) @ x_MND
        # `s @ x` would copy x and its answer, each transposed: twice to three times the time on a CPU.
        out_MND = s_NN.to(x_MND.dtype).expand(x_MND.shape[0], -1, -1).bmm(x_MND)
        return x_MND + out_MND if self.residual else out_MND

    def extra_repr(self) -> str:
        """Options in the module's print."""
        return (
            f"geometry={self.geometry}, eps={self.eps}, metric={self.metric}, radius={self.radius}, "
            f"self_loop={self.self_loop}, residual={self.residual}, init={self.init}"
        )

    def _build(self, grid: Grid) -> Tensor:
        # Autocast would round the 128 parameters and the logarithms to 8 bits; the table is tiny, keep it exact.
        with no_autocast(self.w_p):
            sim_O = (self._constant(self._geometry, grid[0], self.w_p.dtype) @ self.w_p).relu() @ self.w_g
            table = torch.cat([sim_O[:, 0], sim_O.new_full((1,), -math.inf)])
            return table[self._constant(self._pairs, grid, torch.int64)].softmax(dim=-1)

    def _constant(self, make: Callable[[Any], Tensor], of: object, dtype: torch.dtype) -> Tensor:
        """What follows from the grid alone, kept on the parameters' device: sending it anew would stop the host."""
        key = (make.__name__, of, dtype, self.w_p.device)
        if key not in self._constants:
            if len(self._constants) >= 2 * _CACHED_GRIDS:
                self._constants.clear()
            with torch.inference_mode(False):  # training may follow
                self._constants[key] = make(of).to(self.w_p.device, dtype)
        return self._constants[key]

    def _geometry(self, num_frames: int) -> Tensor:
        steps = range(self.radius + 1)
        rows = [(dx, dy, dt / num_frames) for dt, dy, dx in itertools.product(steps, steps, steps)]
        u_O3 = torch.tensor(rows, dtype=torch.float64)
        return -(u_O3 + self.eps).log() if self.geometry == "log" else 1 / (u_O3 + math.e).log()

    def _pairs(self, grid: Grid) -> Tensor:
        """Row of the table for each pair of nodes, int64 [N, N]; its last row stands for "not neighbours"."""
        axes = [torch.arange(size) for size in grid]
        node_N3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        step_NN3 = (node_N3[:, None] - node_N3[None]).abs()
        near_NN = _distance(step_NN3, self.metric) <= self.radius
        if not self.self_loop:
            near_NN.fill_diagonal_(False)
            near_NN |= torch.diag(~near_NN.any(dim=1))
        base = self.radius + 1
        row_NN = (step_NN3 * torch.tensor([base * base, base, 1])).sum(dim=-1)
        return torch.where(near_NN, row_NN, base**3)


def _distance(step_NN3: Tensor, metric: str) -> Tensor:
    if metric == "box":
        return step_NN3.amax(dim=-1)
    if metric == "l1":
        return step_NN3.sum(dim=-1)
    return step_NN3.square().sum(dim=-1).sqrt()
