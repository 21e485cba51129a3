"""SlowFast (Feichtenhofer et al., 2019): a wide network on few frames, a thin one on all, joined sideways.

A clip is one segment of T frames: the fast pathway sees all T, the slow one every alpha-th. The logits of the S
segments are averaged.

Shapes: M clips, T frames, C channels, Y X pixels, K classes; x slow and f fast features [M, C, T, H, W]
"""

import functools

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from video_baselines.nonlocal_block import NonLocalBlock, nonlocal_positions
from video_baselines.resnet3d import DEPTHS, BasicBlock3d, Bottleneck3d, TimeConv3d, make_stage
from video_baselines.streams import (
    ClipClassifier,
    DepthParts,
    build_streams,
    require_choice,
    require_count,
    require_fraction,
)

__all__ = ["SlowFast", "slowfast", "slowfast_nl", "slowfast_recipe"]


def slowfast_recipe(frames: int, stride: int) -> ClipRecipe:
    """How PySlowFast feeds its networks: frames at 30 a second, resized to a shortest side of 256 without antialiasing.

    16x8 is 64 frames of the fast pathway, every second one. It trains on crops of 224 and tests on 256.
    """
    return ClipRecipe(
        frames=frames,
        stride=stride,
        fps=30.0,
        placement="slowfast",
        short="repeat_last",
        resize="shortest",
        resize_px=(256, 256),
        crop_px=224,
        antialias=False,
    )


class _Stem(nn.Module):
    def __init__(self, outputs: int, time: int) -> None:
        super().__init__()
        self.conv = TimeConv3d(3, outputs, time=time, space=7, stride=(1, 2))
        self.bn = nn.BatchNorm3d(outputs)
        self.pool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(torch.relu(self.bn(self.conv(x))))
        return pooled


class _Lateral(nn.Module):
    """slow <- [slow, relu(BN(conv(fast)))], kernel k x 1 x 1, temporal stride alpha (time-strided convolution)."""

    def __init__(self, fast_channels: int, outputs: int, kernel: int, alpha: int) -> None:
        super().__init__()
        self.conv = TimeConv3d(fast_channels, outputs, time=kernel, stride=(alpha, 1))
        self.bn = nn.BatchNorm3d(outputs)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        return torch.cat((slow, torch.relu(self.bn(self.conv(fast)))), dim=1)


class SlowFast(nn.Module):
    """Section 3, table 1 of the paper, for any ResNet depth.

        slow frames   every alpha-th                     temporal kernels 1 in stem, res2, res3; 3 in res4, res5
        fast frames   all; 1 / beta_inv of the width     temporal kernels 5 in the stem, 3 in every stage
        lateral       after the stem, res2, res3, res4: fast -> fusion_ratio x its channels, joined to slow's
        logits        W [mean slow; mean fast] + b

    max_temporal_blocks: only that many blocks of a stage have temporal kernels of 3 (the released 16x8 ResNet-101: 6,
    as many as ResNet-50 has; None: all).
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        alpha: int,
        beta_inv: int,
        fusion_ratio: int,
        fusion_kernel: int,
        max_temporal_blocks: int | None,
        nonlocal_blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        expansion = 1 if name in ("resnet18", "resnet34") else 4
        slow_out = [64, *(64 * 2**i * expansion for i in range(4))]
        fast_out = [channels // beta_inv for channels in slow_out]
        self.slow_stem, self.fast_stem = _Stem(slow_out[0], time=1), _Stem(fast_out[0], time=5)
        self.slow_stages, self.fast_stages, self.laterals = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(DEPTHS[name]):
            side = fast_out[i] * fusion_ratio
            self.laterals.append(_Lateral(fast_out[i], side, fusion_kernel, alpha))
            timed = depth if max_temporal_blocks is None else min(depth, max_temporal_blocks)
            fast_times = [3] * timed + [1] * (depth - timed)
            slow_times = fast_times if i >= 2 else [1] * depth
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            self.slow_stages.append(make_stage(name, slow_out[i] + side, width, stride=stride, times=slow_times))
            self.fast_stages.append(make_stage(name, fast_out[i], width // beta_inv, stride=stride, times=fast_times))
        self.nonlocal_blocks = nn.ModuleDict(
            {str(i): NonLocalBlock(slow_out[3]) for i in nonlocal_positions(DEPTHS[name][2], nonlocal_blocks)}
        )
        pathways = ("laterals", "slow_stages", "fast_stages")
        stages = [tuple(f"{pathway}.{i}" for pathway in pathways) for i in range(4)]
        stages[2] += ("nonlocal_blocks",)
        self.depth_parts: DepthParts = (("slow_stem", "fast_stem"), *stages)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(slow_out[4] + fast_out[4], num_classes)
        _zero_residuals(self)

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K] for clips [M, T, 3, Y, X]; T must be a multiple of alpha (ValueError)."""
        num_frames = clips_MTCYX.shape[1]
        if num_frames % self.alpha:
            raise ValueError(
                f"slowfast needs a multiple of alpha={self.alpha} frames a segment, got {num_frames} "
                "(set clip.sample.frames_per_segment)"
            )
        frames = clips_MTCYX.transpose(1, 2)
        slow, fast = self.slow_stem(frames[:, :, :: self.alpha]), self.fast_stem(frames)
        for i, lateral in enumerate(self.laterals):
            slow = self._slow_stage(i, lateral(slow, fast))
            fast = self.fast_stages[i](fast)
        vector_MD = torch.cat((slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))), dim=1)
        logits_MK: Tensor = self.classifier(self.dropout(vector_MD))
        return logits_MK

    def _slow_stage(self, i: int, x: Tensor) -> Tensor:
        stage = self.slow_stages[i]
        assert isinstance(stage, nn.Sequential)
        for index, block in enumerate(stage):
            x = block(x)
            if i == 2 and str(index) in self.nonlocal_blocks:
                x = self.nonlocal_blocks[str(index)](x)
        return x


def _zero_residuals(net: nn.Module) -> None:
    """Start every residual branch at zero: the network is trained from random weights (section 4 of the paper)."""
    for module in net.modules():
        if isinstance(module, Bottleneck3d):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, BasicBlock3d):
            nn.init.zeros_(module.bn2.weight)


def slowfast(
    *,
    num_classes: int,
    backbone: str = "resnet101",
    alpha: int = 4,
    beta_inv: int = 8,
    fusion_ratio: int = 2,
    fusion_kernel: int = 5,
    max_temporal_blocks: int | None = 6,
    nonlocal_blocks: int = 0,
    dropout: float = 0.5,
) -> ClipClassifier:
    """Build SlowFast from random weights, as the paper trains it. The defaults are 16x8, ResNet-101 (T = 64 frames).

    backbone: resnet18 to resnet152. alpha: frames of the fast pathway for one of the slow (T must be a multiple; 8x8 is
    alpha=4 T=32, 4x16 is alpha=8 T=32). beta_inv: how many times thinner the fast pathway is. fusion_ratio,
    fusion_kernel: channels and temporal size of the lateral convolutions. max_temporal_blocks: see SlowFast.
    nonlocal_blocks: non-local blocks in the slow res4 (the paper: 3). RGB only. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    require_choice("backbone", backbone, DEPTHS)
    require_choice("beta_inv", beta_inv, (1, 2, 4, 8, 16, 32))
    for name, value in (("alpha", alpha), ("fusion_ratio", fusion_ratio)):
        require_count(name, value)
    require_choice("fusion_kernel", fusion_kernel, (1, 3, 5, 7, 9))
    require_count("nonlocal_blocks", nonlocal_blocks, minimum=0)
    if max_temporal_blocks is not None:
        require_count("max_temporal_blocks", max_temporal_blocks, minimum=0)
    require_fraction("dropout", dropout)
    return build_streams(
        "rgb",
        lambda _: SlowFast(
            backbone,
            num_classes,
            alpha=alpha,
            beta_inv=beta_inv,
            fusion_ratio=fusion_ratio,
            fusion_kernel=fusion_kernel,
            max_temporal_blocks=max_temporal_blocks,
            nonlocal_blocks=nonlocal_blocks,
            dropout=dropout,
        ),
        spec=InputSpec(rgb_mean=(0.45, 0.45, 0.45), rgb_std=(0.225, 0.225, 0.225), recipe=slowfast_recipe(64, 2)),
    )


slowfast_nl = functools.partial(slowfast, nonlocal_blocks=3)
"""SlowFast with three non-local blocks in the slow res4 (the paper's `+NL`)."""
