"""The non-local block of Wang et al. (2018): every position of a clip asks every other.

Shapes: M clips, C channels, I inner channels, T frames, H W grid, N = T*H*W positions, P positions after pooling
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NonLocalBlock", "nonlocal_positions"]


class NonLocalBlock(nn.Module):
    """Embedded Gaussian non-local block with a zero-initialised last BN (section 3.2-3.3, Eq. 1, 4, 6).

        y_i = sum_j softmax_j(theta(x_i)^T phi(x^_j) / sqrt(I)) g(x^_j)        x^ = max pool 1x2x2 of x
        z_i = BN(W y_i) + x_i

    theta, phi, g and W are 1x1x1 convolutions, I = C / 2. BN's scale starts at 0, so a new block is the identity.
    Departure: Eq. 4 prints no division by sqrt(I); the authors' released code divides (scaled=False: as printed).
    """

    def __init__(self, num_channels: int, *, subsample: bool = True, scaled: bool = True) -> None:
        super().__init__()
        inner = num_channels // 2
        self.theta = nn.Conv3d(num_channels, inner, kernel_size=1)
        self.phi = nn.Conv3d(num_channels, inner, kernel_size=1)
        self.g = nn.Conv3d(num_channels, inner, kernel_size=1)
        self.out = nn.Conv3d(inner, num_channels, kernel_size=1)
        self.bn = nn.BatchNorm3d(num_channels)
        self.subsample = subsample
        self.scale = inner**-0.5 if scaled else 1.0
        for conv in (self.theta, self.phi, self.g, self.out):
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x_MCTHW: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        # A grid of one row or column has nothing to pool along it.
        kernel = (1, min(2, x_MCTHW.shape[3]), min(2, x_MCTHW.shape[4]))
        pooled = F.max_pool3d(x_MCTHW, kernel) if self.subsample else x_MCTHW
        theta_MNI = self.theta(x_MCTHW).flatten(2).transpose(1, 2)
        phi_MPI = self.phi(pooled).flatten(2).transpose(1, 2)
        g_MPI = self.g(pooled).flatten(2).transpose(1, 2)
        # One head of its own, since ONNX knows no attention without heads.
        query, key, value = (x_MNI.unsqueeze(1) for x_MNI in (theta_MNI, phi_MPI, g_MPI))
        y_MNI = F.scaled_dot_product_attention(query, key, value, scale=self.scale).squeeze(1)
        y_MITHW = y_MNI.transpose(1, 2).reshape(y_MNI.shape[0], -1, *x_MCTHW.shape[2:])
        return torch.add(x_MCTHW, self.bn(self.out(y_MITHW)))


def nonlocal_positions(num_blocks: int, wanted: int) -> tuple[int, ...]:
    """Return the residual blocks of a stage that a non-local block follows: evenly spaced, as in the paper's code.

    4 blocks, 2 wanted: 1, 3; 6 blocks, 3 wanted: 1, 3, 5; 23 blocks, 3 wanted: 6, 13, 20.
    """
    count = min(wanted, num_blocks)
    step = num_blocks // max(count, 1)
    return tuple(step * (index + 1) - 1 for index in range(count))
