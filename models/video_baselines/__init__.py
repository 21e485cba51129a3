"""The networks that VCM-SDD is compared with, behind one interface: `tsm(num_classes=400)` builds one.

Every factory returns a module with an `input_spec` (kinoray.network.InputSpec) and
`forward(rgb=[B, S, T, 3, H, W] | None, flow=[B, S, T, flow_channels, H, W] | None) -> logits [B, num_classes]`.
docs/models.md says what each is, what it costs, and what was published of it.
"""

from video_baselines.artnet import artnet
from video_baselines.eco import eco
from video_baselines.huggingface import huggingface
from video_baselines.i3d import i3d, i3d_nl, s3dg, two_stream_i3d
from video_baselines.image_text import image_text
from video_baselines.lgd3d import lgd3d
from video_baselines.slowfast import slowfast, slowfast_nl
from video_baselines.stcnet import stcnet
from video_baselines.stnet import stnet
from video_baselines.streams import ClipClassifier
from video_baselines.torchvision_video import (
    mc3_18,
    mvit_v1_b,
    mvit_v2_s,
    r2plus1d_18,
    r2plus1d_34,
    r3d_18,
    s3d,
    swin3d_b,
    swin3d_s,
    swin3d_t,
)
from video_baselines.tsn import tsm, tsn

__all__ = [
    "ClipClassifier",
    "artnet",
    "eco",
    "huggingface",
    "i3d",
    "i3d_nl",
    "image_text",
    "lgd3d",
    "mc3_18",
    "mvit_v1_b",
    "mvit_v2_s",
    "r2plus1d_18",
    "r2plus1d_34",
    "r3d_18",
    "s3d",
    "s3dg",
    "slowfast",
    "slowfast_nl",
    "stcnet",
    "stnet",
    "swin3d_b",
    "swin3d_s",
    "swin3d_t",
    "tsm",
    "tsn",
    "two_stream_i3d",
]
