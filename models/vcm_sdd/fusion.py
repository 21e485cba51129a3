"""MFF, the multi-modal feature fusion of section 3.2: RGB and flow nodes ask each other.

Shapes: M segments of all videos, N nodes, D channels, G heads, K = D / G channels a head
"""

from typing import Literal

from torch import Tensor, nn

from vcm_sdd.pooled import pooled_attention, scaled_scores

__all__ = ["CrossModalFusion"]


class CrossModalFusion(nn.Module):
    """Cross-modal attention without projections, then the mean over nodes (section 3.2, Eq. 11, 12, 14).

        S_GNN    = rgb_GNK @ flow_GNK^T                  for each head
        r_G      = sqrt(|| S ||_F)                       scale="frobenius", as printed; "dim": sqrt(K)
        A_rgb    = softmax_rows(S / r) @ flow_GNK        Eq. 11  RGB asks, flow answers
        A_flow   = softmax_rows(S^T / r) @ rgb_GNK       Eq. 12  flow asks, RGB answers
        out_MD   = mean over nodes of each               avg_F of Eq. 14

    Departures: Eq. 12 prints S where the text needs its transpose (eq12="literal" keeps the print). `residual` adds
    the asking nodes, `norm_channels` a LayerNorm of each answer; the latter is not linear, so it needs the answers
    themselves, everything else takes the short cut of vcm_sdd.pooled.
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
        frobenius, literal = self.scale == "frobenius", self.eq12 == "literal"
        rgb_MD, flow_MD = pooled_attention(rgb_MND, flow_MND, heads=self.heads, frobenius=frobenius, literal=literal)
        if self.residual:
            rgb_MD, flow_MD = rgb_MD + rgb_MND.mean(dim=1), flow_MD + flow_MND.mean(dim=1)
        return rgb_MD, flow_MD

    def nodes(self, rgb_MND: Tensor, flow_MND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers A_rgb and A_flow themselves, [M, N, D] each: for whatever is not linear after them."""
        rgb_MGNK, flow_MGNK = self._split(rgb_MND), self._split(flow_MND)
        logits = scaled_scores(rgb_MGNK, flow_MGNK, frobenius=self.scale == "frobenius")
        back = logits if self.eq12 == "literal" else logits.transpose(-1, -2)
        rgb_out = (logits.softmax(dim=-1).to(flow_MND.dtype) @ flow_MGNK).transpose(1, 2).flatten(2)
        flow_out = (back.softmax(dim=-1).to(rgb_MND.dtype) @ rgb_MGNK).transpose(1, 2).flatten(2)
        if self.residual:
            rgb_out, flow_out = rgb_out + rgb_MND, flow_out + flow_MND
        if self.rgb_norm is not None and self.flow_norm is not None:
            # A prepared network has bfloat16 nodes and float32 norms, which CUDA does not mix.
            dtype = self.rgb_norm.weight.dtype
            rgb_out, flow_out = self.rgb_norm(rgb_out.to(dtype)), self.flow_norm(flow_out.to(dtype))
        return rgb_out, flow_out

    def _split(self, x_MND: Tensor) -> Tensor:
        return x_MND.reshape(*x_MND.shape[:2], self.heads, -1).transpose(1, 2)

    def extra_repr(self) -> str:
        """Options in the module's print."""
        return f"heads={self.heads}, scale={self.scale}, eq12={self.eq12}, residual={self.residual}"
