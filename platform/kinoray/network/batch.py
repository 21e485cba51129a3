"""Decoded clips -> one checked batch -> what a model is called with.

Frames stay uint8 and flow int8 until they are on the model's device: that is a quarter of the bytes to move, and
training and labelling get the same numbers because both come through `model_inputs`. Frames in YUV 4:2:0
(decode.frames=yuv420), half as many bytes again, become RGB in one place, `yuv420_to_rgb`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kinoray.errors import ModelError
from kinoray.network.build import InputSpec

if TYPE_CHECKING:
    from kinoray.video.clip import Clip

__all__ = ["FLOW_CHANNELS", "FLOW_SCALE", "RawBatch", "VideoBatch", "collate", "model_inputs", "yuv420_to_rgb"]

# Shapes: B videos, S segments, T frames a segment, C channels, H W pixels

FLOW_CHANNELS = 2
"""Channels of a decoded flow field: x and y."""
FLOW_SCALE = 127.0
"""The int8 value that stands for flow.bound_px; dividing by it gives flow in -1 .. 1."""
_CONVERTED_PIXELS = 2**23  # at a time: what lies between YUV and RGB takes 36 bytes of each
_KR, _KG, _KB = 0.299, 0.587, 0.114  # BT.601: Y = KR R + KG G + KB B


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if x.dtype != dtype or not fits:
        raise ModelError(
            f"batch.{name} must be {str(dtype).removeprefix('torch.')} [B, S, T, {shape}], "
            f"got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        )


def _is_i420(x: Tensor) -> bool:
    return x.ndim == 5 and x.shape[3] % 3 == 0 and x.shape[4] % 2 == 0


def yuv420_to_rgb(yuv: Tensor) -> Tensor:
    """I420, uint8 [..., H * 3 / 2, W], on any device -> RGB, uint8 [..., 3, H, W], there.

    With y = (Y - 16) / 219, u = (U - 128) / 224, v = (V - 128) / 224 (BT.601, limited range):

        R = y + 2 (1 - KR) v    B = y + 2 (1 - KB) u    G = y - (2 KB (1 - KB) u + 2 KR (1 - KR) v) / KG

    times 255, in float32, rounded to whole levels, so that augmentation sees what it sees of decode.frames=rgb. Chroma
    samples lie in the middle of their 2 x 2 pixels; between them the interpolation is bilinear.
    """
    *lead, rows, width = yuv.shape
    height = rows * 2 // 3
    frames = yuv.reshape(-1, rows, width)
    rgb = torch.empty((len(frames), 3, height, width), dtype=torch.uint8, device=yuv.device)
    step = max(1, _CONVERTED_PIXELS // max(1, height * width))
    for part, out in zip(torch.split(frames, step), torch.split(rgb, step), strict=True):
        y = (part[:, :height].float() - 16.0).mul_(255 / 219)
        small = part[:, height:].reshape(-1, 2, height // 2, width // 2).float().sub_(128.0).mul_(255 / 224)
        u, v = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False).unbind(1)
        red, blue = y + 2 * (1 - _KR) * v, y + 2 * (1 - _KB) * u
        green = y.sub_(u, alpha=2 * _KB * (1 - _KB) / _KG).sub_(v, alpha=2 * _KR * (1 - _KR) / _KG)
        for channel, colour in enumerate((red, green, blue)):
            out[:, channel] = colour.round_().clamp_(0, 255)
    return rgb.reshape(*lead, 3, height, width)


@dataclass(frozen=True, slots=True)
class VideoBatch:
    """Clips of one shape, as decoded.

    `rgb` is uint8 [B, S, T, 3, H, W] or None; `flow` is int8 [B, S, T, 2, H, W] or None (x then y, 127 = the bound);
    `yuv` takes the place of `rgb` with decode.frames=yuv420: I420, uint8 [B, S, T, H * 3 / 2, W].

    Raises:
        ModelError: all are None, rgb and yuv are not, a dtype or shape is not the one above, or frames and flow differ
            in B, S, T, H or W.
    """

    rgb: Tensor | None
    flow: Tensor | None
    yuv: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rgb is None and self.flow is None and self.yuv is None:
            raise ModelError("a batch needs rgb or flow, got neither")
        if self.rgb is not None and self.yuv is not None:
            raise ModelError("a batch needs its frames once, got rgb and yuv")
        if self.rgb is not None:
            _check("rgb", self.rgb, torch.uint8, "3, H, W", self.rgb.ndim == 6 and self.rgb.shape[3] == 3)
        if self.yuv is not None:
            _check("yuv", self.yuv, torch.uint8, "H * 3 / 2, W", _is_i420(self.yuv))
        if self.flow is not None:
            fits = self.flow.ndim == 6 and self.flow.shape[3] == FLOW_CHANNELS
            _check("flow", self.flow, torch.int8, f"{FLOW_CHANNELS}, H, W", fits)
            self._check_agreement(self.flow)

    def _check_agreement(self, flow: Tensor) -> None:
        where = [*flow.shape[:3], *flow.shape[4:]]
        for name, x in (("rgb", self.rgb), ("yuv", self.yuv)):
            if x is None:
                continue
            height = x.shape[-2] if name == "rgb" else x.shape[-2] * 2 // 3
            if [*x.shape[:3], height, x.shape[-1]] != where:
                raise ModelError(
                    f"batch.{name} and batch.flow must agree in B, S, T, H, W, "
                    f"got {name} {list(x.shape)} and flow {list(flow.shape)}"
                )

    def __len__(self) -> int:
        """Number of videos."""
        tensor = next(x for x in (self.rgb, self.yuv, self.flow) if x is not None)
        return int(tensor.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the clips are."""
        return next(x.device for x in (self.rgb, self.yuv, self.flow) if x is not None)

    def select(self, videos: slice | Tensor) -> "VideoBatch":
        """Some of the videos, by place, with a tensor on the clips' device; a slice copies nothing."""
        rgb, flow, yuv = (None if x is None else x[videos] for x in (self.rgb, self.flow, self.yuv))
        return VideoBatch(rgb=rgb, flow=flow, yuv=yuv)


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Clips that the device has yet to finish (device_input.py), each of a size of its own; one entry a clip.

    Raises:
        ModelError: partners without `last`, or lists of different lengths.
    """

    frames: list[Tensor]
    """uint8 [S, T, 3, h, w], or I420 [S, T, h * 3 / 2, w] each."""
    partners: list[Tensor] | None = None
    """uint8 [S, T, 1, h, w] each: green or Y of the other frame of each frame's flow; None where flow is not found."""
    last: Tensor | None = None
    """bool [B, S, T]: the video's last frame, whose flow leads from its partner to it."""
    views: Tensor | None = None
    """int64 [B, 6], the fields of a View: what is to be made of the frames; None if they are scaled."""

    def __post_init__(self) -> None:
        if (self.partners is None) != (self.last is None):
            raise ModelError("a batch needs partners and last together, got one of them")
        found = {len(x) for x in (self.frames, self.partners, self.last, self.views) if x is not None}
        if len(found) > 1:
            raise ModelError(f"a batch needs one entry a clip, got {' and '.join(map(str, sorted(found)))} entries")

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.frames)


def collate(
    clips: Sequence["Clip"], stack: Callable[[Sequence[list[Tensor]]], list[Tensor]] | None = None
) -> VideoBatch:
    """Stack clips of one shape to a batch, in order; flow only if every clip has it.

    `stack` makes one tensor [B, ...] of each list of B tensors of one shape, where they are to be; here by default.

    Raises:
        ModelError: no clips, clips of different shapes, or only some with flow.
    """
    if not clips:
        raise ModelError("a batch needs at least one clip, got none")
    shapes = sorted({clip.frames.shape for clip in clips})
    if len(shapes) > 1:
        raise ModelError(f"clips of a batch must have one shape [S, T, 3, H, W], got {' and '.join(map(str, shapes))}")
    flows = [torch.from_numpy(clip.flow) for clip in clips if clip.flow is not None]
    if flows and len(flows) < len(clips):
        raise ModelError(f"all clips of a batch must have flow or none, got {len(flows)} with flow of {len(clips)}")
    frames = [torch.from_numpy(clip.frames) for clip in clips]
    lists = [frames, flows] if flows else [frames]
    stacked, *rest = stack(lists) if stack else [torch.stack(tensors) for tensors in lists]
    flow = rest[0] if rest else None
    is_rgb = stacked.ndim == 6
    return VideoBatch(rgb=stacked if is_rgb else None, flow=flow, yuv=None if is_rgb else stacked)


def _normalised(rgb: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    # Made on the host and sent: made on a GPU, they would wait for all that it computes.
    mean, std = (torch.tensor(x).to(device, non_blocking=True).view(3, 1, 1) for x in (spec.rgb_mean, spec.rgb_std))
    return rgb.float().div_(255.0).sub_(mean).div_(std)


def model_inputs(batch: VideoBatch, spec: InputSpec, device: torch.device | str) -> dict[str, Tensor | None]:
    """What the model is called with: `logits = model(**model_inputs(batch, spec, device))`.

    `rgb` becomes float32 (x / 255 - mean) / std (`yuv` first becomes RGB, see `yuv420_to_rgb`), `flow` float32 in
    -1 .. 1, both on the device and in the shape of the batch; a stream that the spec does not ask for is None.

    Raises:
        ModelError: the spec asks for a stream that the batch lacks, or for another number of flow channels.
    """
    place = torch.device(device)
    rgb = flow = None
    if spec.rgb:
        frames = batch.rgb if batch.rgb is not None else batch.yuv
        if frames is None:
            raise ModelError("the model needs rgb, but the batch has none")
        frames = frames.to(place, non_blocking=True)
        rgb = _normalised(frames if batch.yuv is None else yuv420_to_rgb(frames), spec, place)
    if spec.flow_channels:
        if spec.flow_channels != FLOW_CHANNELS:
            raise ModelError(f"the model needs {spec.flow_channels} flow channels, but decoding gives {FLOW_CHANNELS}")
        if batch.flow is None:
            raise ModelError("the model needs flow, but the batch has none")
        flow = batch.flow.to(place, non_blocking=True).float().div_(FLOW_SCALE)
    return {"rgb": rgb, "flow": flow}
