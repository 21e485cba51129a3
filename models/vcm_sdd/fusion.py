"""MFF, the multi-modal feature fusion of section 3.2: RGB and flow nodes ask each other.

Only means of the answers are used later, so they are not formed: the mean of A @ V is (mean of A) @ V. Sums of squares
stay in float32 or wider, and the norm keeps its epsilon: without it all-zero features give NaN forward and backward.

Shapes: M segments of all videos, N nodes, D channels, G heads, K = D / G channels a head
"""

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["CrossModalFusion"]

_NORM_EPS = 1e-12


class CrossModalFusion(nn.Module):
    """Cross-modal attention without projections, then the mean over nodes (section 3.2, Eq. 11, 12, 14).

        S_GNN    = rgb_GNK @ flow_GNK^T                  for each head
        r_G      = sqrt(|| S ||_F)                       scale="frobenius", as printed; "dim": sqrt(K)
        A_rgb    = softmax_rows(S / r) @ flow_GNK        Eq. 11  RGB asks, flow answers
        A_flow   = softmax_rows(S^T / r) @ rgb_GNK       Eq. 12  flow asks, RGB answers
        out_MD   = mean over nodes of each               avg_F of Eq. 14

    Departures: Eq. 12 prints S where the text needs its transpose (eq12="literal" keeps the print).

    Cost of a segment: one product S serves both equations, and with a = column means of softmax_rows(S / r) and
    b = row means of softmax_columns(S / r) the two means are a @ flow and b @ rgb. Exact, gradients too.
    """

    def __init__(
        self,
        *,
        heads: int = 8,
        scale: Literal["frobenius", "dim"] = "frobenius",
        eq12: Literal["text", "literal"] = "text",
        residual: bool = False,
        norm_channels: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.eq12, self.residual = heads, scale, eq12, residual
        self.rgb_norm = nn.LayerNorm(norm_channels) if norm_channels else None
        self.flow_norm = nn.LayerNorm(norm_channels) if norm_channels else None

    def forward(self, rgb_MND: Tensor, flow_MND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled answers to the RGB and to the flow nodes, [M, D] each."""
        if self.rgb_norm is not None:
            rgb_answer, flow_answer = self.nodes(rgb_MND, flow_MND)
            return rgb_answer.mean(dim=1), flow_answer.mean(dim=1)
        if rgb_MND.device.type == "cpu" and not torch.compiler.is_compiling():
            # One segment's scores (2.8 MB) stay in the cache; those of a whole batch do not.
            pairs = [self._pool(rgb_MND[m : m + 1], flow_MND[m : m + 1]) for m in range(rgb_MND.shape[0])]
            rgb_out, flow_out = (torch.cat(part) for part in zip(*pairs, strict=True))
        else:
            rgb_out, flow_out = self._pool(rgb_MND, flow_MND)
        if self.residual:
            rgb_out, flow_out = rgb_out + rgb_MND.mean(dim=1), flow_out + flow_MND.mean(dim=1)
        return rgb_out, flow_out

    def nodes(self, rgb_MND: Tensor, flow_MND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers A_rgb and A_flow themselves, [M, N, D] each: for whatever is not linear after them."""
        rgb_MGNK, flow_MGNK = self._split(rgb_MND), self._split(flow_MND)
        scores = rgb_MGNK @ flow_MGNK.transpose(-1, -2)
        logits = self._scaled(scores, rgb_MGNK.shape[-1])
        back = logits if self.eq12 == "literal" else logits.transpose(-1, -2)
        rgb_out = self._merge(logits.softmax(dim=-1).to(flow_MND.dtype) @ flow_MGNK)
        flow_out = self._merge(back.softmax(dim=-1).to(rgb_MND.dtype) @ rgb_MGNK)
        if self.residual:
            rgb_out, flow_out = rgb_out + rgb_MND, flow_out + flow_MND
        if self.rgb_norm is not None and self.flow_norm is not None:
            rgb_out, flow_out = self.rgb_norm(rgb_out), self.flow_norm(flow_out)
        return rgb_out, flow_out

    def _pool(self, rgb_MND: Tensor, flow_MND: Tensor) -> tuple[Tensor, Tensor]:
        rgb_MGNK, flow_MGNK = self._split(rgb_MND), self._split(flow_MND)
        logits = self._scaled(rgb_MGNK @ flow_MGNK.transpose(-1, -2), rgb_MGNK.shape[-1])
        a_MGN = logits.softmax(dim=-1).mean(dim=-2)
        b_MGN = a_MGN if self.eq12 == "literal" else logits.softmax(dim=-2).mean(dim=-1)
        rgb_out = a_MGN.to(flow_MND.dtype)[:, :, None] @ flow_MGNK
        flow_out = b_MGN.to(rgb_MND.dtype)[:, :, None] @ rgb_MGNK
        return rgb_out.flatten(1), flow_out.flatten(1)

    def _scaled(self, scores_MGNN: Tensor, channels: int) -> Tensor:
        """Scores divided by their scale, in float32 or wider."""
        wide = scores_MGNN if scores_MGNN.dtype == torch.float64 else scores_MGNN.float()
        if self.scale == "dim":
            return wide * channels**-0.5
        # The fourth root's slope is infinite at 0, and float16 sums of squares overflow at ordinary magnitudes.
        squares_MG11 = wide.square().sum(dim=(-1, -2), keepdim=True)
        return wide / (squares_MG11 + _NORM_EPS).pow(0.25)

    def _split(self, x_MND: Tensor) -> Tensor:
        if x_MND.shape[-1] % self.heads:
            raise ValueError(f"heads must divide the {x_MND.shape[-1]} channels, got heads={self.heads}")
        return x_MND.reshape(*x_MND.shape[:2], self.heads, -1).transpose(1, 2)

    @staticmethod
    def _merge(x_MGNK: Tensor) -> Tensor:
        return x_MGNK.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Options in the module's print."""
        return f"heads={self.heads}, scale={self.scale}, eq12={self.eq12}, residual={self.residual}"
