"""Decoded clips -> one checked batch -> what a model is called with.

Frames stay uint8 and flow int8 until they are on the model's device: that is a quarter of the bytes to move, and
training and labelling get the same numbers because both come through `model_inputs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kinoray.errors import ModelError
from kinoray.model import InputSpec

if TYPE_CHECKING:
    from kinoray.decode import Clip

__all__ = ["FLOW_CHANNELS", "FLOW_SCALE", "VideoBatch", "collate", "model_inputs"]

# Shapes: B videos, S segments, T frames a segment, C channels, H W pixels

FLOW_CHANNELS = 2
"""Channels of a decoded flow field: x and y."""
FLOW_SCALE = 127.0
"""The int8 value that stands for flow.bound_px; dividing by it gives flow in -1 .. 1."""


def _check(name: str, x: Tensor, dtype: torch.dtype, channels: int) -> None:
    if x.dtype != dtype or x.ndim != 6 or x.shape[3] != channels:
        raise ModelError(
            f"batch.{name} must be {str(dtype).removeprefix('torch.')} [B, S, T, {channels}, H, W], "
            f"got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        )


@dataclass(frozen=True, slots=True)
class VideoBatch:
    """Clips of one shape, as decoded.

    `rgb` is uint8 [B, S, T, 3, H, W] or None; `flow` is int8 [B, S, T, 2, H, W] or None (x then y, 127 = the bound).

    Raises:
        ModelError: both are None, or a dtype or shape is not the one above, or the two differ in B, S, T, H or W.
    """

    rgb: Tensor | None
    flow: Tensor | None

    def __post_init__(self) -> None:
        if self.rgb is None and self.flow is None:
            raise ModelError("a batch needs rgb or flow, got neither")
        if self.rgb is not None:
            _check("rgb", self.rgb, torch.uint8, 3)
        if self.flow is not None:
            _check("flow", self.flow, torch.int8, FLOW_CHANNELS)
        if self.rgb is not None and self.flow is not None:
            rgb, flow = list(self.rgb.shape), list(self.flow.shape)
            if rgb[:3] + rgb[4:] != flow[:3] + flow[4:]:
                raise ModelError(f"batch.rgb and batch.flow must agree in B, S, T, H, W, got rgb {rgb} and flow {flow}")

    def __len__(self) -> int:
        """Number of videos."""
        tensor = self.rgb if self.rgb is not None else self.flow
        assert tensor is not None  # __post_init__ refuses a batch of neither
        return int(tensor.shape[0])


def collate(clips: Sequence["Clip"]) -> VideoBatch:
    """Stack clips of one shape to a batch, in order; flow only if every clip has it.

    Raises:
        ModelError: no clips, clips of different shapes, or only some with flow.
    """
    if not clips:
        raise ModelError("a batch needs at least one clip, got none")
    shapes = sorted({clip.frames.shape for clip in clips})
    if len(shapes) > 1:
        raise ModelError(f"clips of a batch must have one shape [S, T, 3, H, W], got {' and '.join(map(str, shapes))}")
    flows = [clip.flow for clip in clips if clip.flow is not None]
    if flows and len(flows) < len(clips):
        raise ModelError(f"all clips of a batch must have flow or none, got {len(flows)} with flow of {len(clips)}")
    rgb = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return VideoBatch(rgb=rgb, flow=torch.stack([torch.from_numpy(flow) for flow in flows]) if flows else None)


def _normalised(rgb: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    mean = torch.tensor(spec.rgb_mean, device=device).view(3, 1, 1)
    std = torch.tensor(spec.rgb_std, device=device).view(3, 1, 1)
    return rgb.to(device, non_blocking=True).float().div_(255.0).sub_(mean).div_(std)


def model_inputs(batch: VideoBatch, spec: InputSpec, device: torch.device | str) -> dict[str, Tensor | None]:
    """What the model is called with: `logits = model(**model_inputs(batch, spec, device))`.

    `rgb` becomes float32 (x / 255 - mean) / std, `flow` float32 in -1 .. 1, both on the device and in the shape of
    the batch; a stream that the spec does not ask for is None.

    Raises:
        ModelError: the spec asks for a stream that the batch lacks, or for another number of flow channels.
    """
    place = torch.device(device)
    rgb = flow = None
    if spec.rgb:
        if batch.rgb is None:
            raise ModelError("the model needs rgb, but the batch has none")
        rgb = _normalised(batch.rgb, spec, place)
    if spec.flow_channels:
        if spec.flow_channels != FLOW_CHANNELS:
            raise ModelError(f"the model needs {spec.flow_channels} flow channels, but decoding gives {FLOW_CHANNELS}")
        if batch.flow is None:
            raise ModelError("the model needs flow, but the batch has none")
        flow = batch.flow.to(place, non_blocking=True).float().div_(FLOW_SCALE)
    return {"rgb": rgb, "flow": flow}
