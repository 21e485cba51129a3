"""Cross-modal attention followed by a mean over nodes, without ever forming an answer: the fast form of MFF.

Scores are made for a few segments at a time and made again in the backward pass, so memory does not grow with the
batch. What is easy to break: sums of squares stay in float32 or wider, and the norm is differentiated through.

Shapes: M segments of all videos, N nodes, D channels, G heads, K = D / G channels a head
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcm_sdd.precision import autocast_dtype, no_autocast

__all__ = ["NORM_EPS", "pooled_attention", "scaled_scores"]

NORM_EPS = 1e-12
"""Added to the sum of squares under the fourth root, whose slope is infinite at 0 (all-zero features gave NaN)."""

# Scores held at once: on a CPU one segment of the paper's size (8 x 294 x 294, 2.8 MB), which stays in the cache
# (the whole batch at once took twice the time); elsewhere 0.5 GB, so that a training batch of 2,048 segments fits.
_CPU_SCORES = 2**20
_DEVICE_SCORES = 2**27


def pooled_attention(rgb_MND: Tensor, flow_MND: Tensor, *, heads: int, frobenius: bool, literal: bool) -> list[Tensor]:
    """Return the means over nodes of the answers to RGB and to flow (Eq. 11, 12, 14), [M, D] each.

        S_GNN = rgb_GNK @ flow_GNK^T,  Z = S / r
        a_GN  = column means of softmax_rows(Z);      mean of A_rgb  = a @ flow
        b_GN  = row means of softmax_columns(Z);      mean of A_flow = b @ rgb      literal: b = a

    r is the root of the Frobenius norm of each head's S, or sqrt(K). Differentiable once; exact.
    """
    wanted = autocast_dtype(rgb_MND)
    if wanted is not None:
        # float16 scores overflow at ordinary magnitudes; bfloat16 has float32's range.
        dtype = torch.float32 if wanted == torch.float16 else wanted
        rgb_MND, flow_MND = rgb_MND.to(dtype), flow_MND.to(dtype)
    if torch.is_grad_enabled():
        return list(_PooledAttention.apply(rgb_MND, flow_MND, heads, frobenius, literal))
    return list(_answers(rgb_MND, flow_MND, heads, frobenius, literal))


def _answers(rgb_MND: Tensor, flow_MND: Tensor, heads: int, frobenius: bool, literal: bool) -> tuple[Tensor, ...]:
    outputs = []
    with no_autocast(rgb_MND):
        for part in _chunks(rgb_MND, heads):
            q, k = _split(rgb_MND[part], heads), _split(flow_MND[part], heads)
            z, _ = _scaled_in_place(q, k, frobenius)
            a_MGN = z.softmax(dim=-1).mean(dim=-2)
            b_MGN = a_MGN if literal else z.softmax(dim=-2).mean(dim=-1)
            outputs.append((_weighted(a_MGN, k), _weighted(b_MGN, q)))
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))


def scaled_scores(q_MGNK: Tensor, k_MGNK: Tensor, *, frobenius: bool) -> Tensor:
    """Return Z = S / r, [M, G, N, N] in float32 or wider, differentiable as often as wanted."""
    scores = _wide(q_MGNK @ k_MGNK.transpose(-1, -2))
    if not frobenius:
        return scores / math.sqrt(q_MGNK.shape[-1])
    return scores / (scores.square().sum(dim=(-1, -2), keepdim=True) + NORM_EPS).pow(0.25)


def _scaled_in_place(q_MGNK: Tensor, k_MGNK: Tensor, frobenius: bool) -> tuple[Tensor, Tensor | float]:
    """Z and r, without the temporaries that autograd needs."""
    scores = _wide(q_MGNK @ k_MGNK.transpose(-1, -2))
    if not frobenius:
        root = math.sqrt(q_MGNK.shape[-1])
        return scores.div_(root), root
    norm_MG11 = torch.linalg.vector_norm(scores, dim=(-1, -2), keepdim=True)
    r_MG11 = norm_MG11.square().add_(NORM_EPS).pow_(0.25)
    return scores.div_(r_MG11), r_MG11


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _PooledAttention(torch.autograd.Function):
    """pooled_attention with a backward pass that makes the scores again instead of keeping them.

    With da_j = g_rgb . flow_j, db_i = g_flow . rgb_i, P and R the row and column softmaxes of Z:

        dZ_ij = P_ij (da_j - (P da)_i) / N + R_ij (db_i - (R^T db)_j) / N
        dS    = dZ / r - Z sum(dZ * Z) / (2 r^3)                             (frobenius: r depends on S)
        d_rgb = dS @ flow + b g_flow^T,   d_flow = dS^T @ rgb + a g_rgb^T
    """

    @staticmethod
    def forward(ctx: Any, rgb_MND: Tensor, flow_MND: Tensor, heads: int, frobenius: bool, literal: bool) -> Any:
        ctx.save_for_backward(rgb_MND, flow_MND)
        ctx.options = (heads, frobenius, literal)
        return _answers(rgb_MND, flow_MND, heads, frobenius, literal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_rgb_MD: Tensor, g_flow_MD: Tensor) -> Any:
        rgb_MND, flow_MND = ctx.saved_tensors
        heads, frobenius, literal = ctx.options
        d_rgb, d_flow = torch.empty_like(rgb_MND), torch.empty_like(flow_MND)
        with no_autocast(rgb_MND):
            for part in _chunks(rgb_MND, heads):
                q, k = _split(rgb_MND[part], heads), _split(flow_MND[part], heads)
                g_rgb, g_flow = _split(g_rgb_MD[part, None], heads), _split(g_flow_MD[part, None], heads)
                dq, dk = _gradients(q, k, g_rgb, g_flow, frobenius=frobenius, literal=literal)
                for whole_MND, found_MGNK in ((d_rgb, dq), (d_flow, dk)):
                    whole_MND[part] = found_MGNK.transpose(1, 2).flatten(2)
        return d_rgb, d_flow, None, None, None


def _gradients(
    q: Tensor, k: Tensor, g_rgb: Tensor, g_flow: Tensor, *, frobenius: bool, literal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k [M, G, N, K] for those of the two outputs [M, G, 1, K]."""
    z, r = _scaled_in_place(q, k, frobenius)
    num_nodes = z.shape[-1]
    da_row = _wide(g_rgb @ k.transpose(-1, -2)) / num_nodes
    db_row = _wide(g_flow @ q.transpose(-1, -2)) / num_nodes
    p = z.softmax(dim=-1)
    a_row = p.mean(dim=-2, keepdim=True)
    if literal:
        da_row, b_row = da_row + db_row, a_row
    dz = p * da_row
    dz.addcmul_(p, dz.sum(dim=-1, keepdim=True), value=-1)
    if not literal:
        c = z.softmax(dim=-2)
        b_row = c.mean(dim=-1)[..., None, :]
        dz.addcmul_(c, db_row.transpose(-1, -2) - db_row @ c)
    if frobenius:
        inner = (dz * z).sum(dim=(-1, -2), keepdim=True)
        dz.addcmul_(z, inner / (2 * cast(Tensor, r) ** 2), value=-1)
    ds, a_row, b_row = dz.div_(r).to(q.dtype), a_row.to(q.dtype), b_row.to(q.dtype)
    dq = ds @ k + b_row.transpose(-1, -2) * g_flow
    dk = ds.transpose(-1, -2) @ q + a_row.transpose(-1, -2) * g_rgb
    return dq, dk


def _chunks(x_MND: Tensor, heads: int) -> list[slice]:
    num_segments, num_nodes = x_MND.shape[:2]
    if torch.compiler.is_exporting():  # a graph has no loop as long as its batch
        return [slice(0, num_segments)]
    budget = _CPU_SCORES if x_MND.device.type == "cpu" else _DEVICE_SCORES
    size = max(1, budget // (heads * num_nodes * num_nodes))
    return [slice(start, start + size) for start in range(0, num_segments, size)]


def _split(x_MND: Tensor, heads: int) -> Tensor:
    # Contiguous: each product would copy strided heads again.
    return x_MND.reshape(*x_MND.shape[:2], heads, -1).transpose(1, 2).contiguous()


def _weighted(weights_MGN: Tensor, x_MGNK: Tensor) -> Tensor:
    return (weights_MGN[:, :, None].to(x_MGNK.dtype) @ x_MGNK).flatten(1)
