"""Every baseline at a size that trains in seconds on one core."""

from typing import Any

SMALL: dict[str, tuple[str, dict[str, Any], tuple[int, int], int]] = {
    "tsn rgb": ("tsn", {"backbone": "tiny"}, (2, 2), 32),
    "tsn flow": ("tsn", {"backbone": "tiny", "modality": "flow"}, (2, 2), 32),
    "tsn two-stream": ("tsn", {"backbone": "tiny", "modality": "two_stream"}, (2, 2), 32),
    "tsm": ("tsm", {"backbone": "resnet18"}, (4, 1), 32),
    "tsm online": ("tsm", {"backbone": "tiny", "shift": "online"}, (2, 2), 32),
    "i3d": ("i3d", {"backbone": "resnet18"}, (1, 4), 32),
    "i3d_nl": ("i3d_nl", {"backbone": "resnet18"}, (1, 4), 32),
    "two_stream_i3d": ("two_stream_i3d", {"backbone": "resnet18"}, (1, 2), 32),
    "slowfast": ("slowfast", {"backbone": "resnet18"}, (1, 8), 32),
    "slowfast_nl": ("slowfast_nl", {"backbone": "resnet18"}, (1, 8), 32),
    "s3dg": ("s3dg", {}, (1, 8), 32),
    "i3d inception": ("i3d", {"backbone": "inception_v1"}, (1, 8), 32),
    "r2plus1d_18": ("r2plus1d_18", {"crop_px": 16}, (1, 4), 16),
    "r2plus1d_34 flow": ("r2plus1d_34", {"crop_px": 16, "modality": "flow"}, (1, 4), 16),
    "s3d": ("s3d", {"crop_px": 32}, (1, 8), 32),
    "mvit_v2_s": ("mvit_v2_s", {"crop_px": 32, "frames": 4}, (1, 4), 32),
    "swin3d_t": ("swin3d_t", {"crop_px": 32}, (1, 4), 32),
    "eco": ("eco", {}, (4, 1), 32),
    "eco lite": ("eco", {"lite": True}, (4, 1), 32),
    "artnet": ("artnet", {}, (1, 4), 32),
    "stcnet": ("stcnet", {"backbone": "resnext50_32x4d", "frames": 4}, (1, 4), 32),
    "stnet": ("stnet", {"backbone": "resnet18", "frames": 2}, (3, 2), 32),
    "lgd3d": ("lgd3d", {"backbone": "resnet50"}, (1, 8), 32),
}
"""Case: name of the factory, its options, (segments, frames), side of the crop in pixels."""
