"""Decoded clips -> one checked batch -> the device -> what a model is called with.

Frames stay uint8 and flow int8 until they are on the model's device: that is a quarter of the bytes to move, and
training and labelling get the same numbers because both come through `model_inputs`. Flow that decoding leaves to the
device (TV-L1) is found there: what comes out is the batch that decoding on the CPU would have given, but for the
estimator. What is easy to break: flow is found before colours are changed, and nothing here may wait for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kinoray.errors import ModelError
from kinoray.network import InputSpec
from kinoray.network.flow_tvl1 import tvl1_flow

if TYPE_CHECKING:
    from kinoray.video.frames import Clip

__all__ = [
    "FLOW_CHANNELS",
    "FLOW_SCALE",
    "DeviceInput",
    "FeatureBatch",
    "Feeder",
    "RawBatch",
    "VideoBatch",
    "collate",
    "collate_raw",
    "model_inputs",
    "quantised",
    "sent",
]

# Shapes: B videos, S segments, T frames a segment, C channels, H W pixels

FLOW_CHANNELS = 2
"""Channels of a decoded flow field: x and y."""
FLOW_SCALE = 127.0
"""The int8 value that stands for flow.bound_px; dividing by it gives flow in -1 .. 1."""
_ALIGN_BYTES = 64


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if x.dtype != dtype or not fits:
        raise ModelError(
            f"batch.{name} must be {str(dtype).removeprefix('torch.')} [B, S, T, {shape}], "
            f"got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        )


@dataclass(frozen=True, slots=True)
class VideoBatch:
    """Clips of one shape, as decoded.

    `rgb` is uint8 [B, S, T, 3, H, W] or None; `flow` is int8 [B, S, T, 2, H, W] or None (x then y, 127 = the bound).

    Raises:
        ModelError: both are None, a dtype or shape is not the one above, or they differ in B, S, T, H or W.
    """

    rgb: Tensor | None
    flow: Tensor | None

    def __post_init__(self) -> None:
        if self.rgb is None and self.flow is None:
            raise ModelError("a batch needs rgb or flow, got neither")
        if self.rgb is not None:
            _check("rgb", self.rgb, torch.uint8, "3, H, W", self.rgb.ndim == 6 and self.rgb.shape[3] == 3)
        if self.flow is not None:
            fits = self.flow.ndim == 6 and self.flow.shape[3] == FLOW_CHANNELS
            _check("flow", self.flow, torch.int8, f"{FLOW_CHANNELS}, H, W", fits)
            self._check_agreement(self.flow)

    def _check_agreement(self, flow: Tensor) -> None:
        if self.rgb is None:
            return
        frames, motion = ([*x.shape[:3], *x.shape[4:]] for x in (self.rgb, flow))
        if frames != motion:
            raise ModelError(
                f"batch.rgb and batch.flow must agree in B, S, T, H, W, "
                f"got rgb {list(self.rgb.shape)} and flow {list(flow.shape)}"
            )

    def _any(self) -> Tensor:
        x = self.flow if self.rgb is None else self.rgb
        assert x is not None
        return x

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._any())

    @property
    def device(self) -> torch.device:
        """Where the clips are."""
        return self._any().device

    def select(self, videos: slice | Tensor) -> "VideoBatch":
        """Some of the videos, by place, with a tensor on the clips' device; a slice copies nothing."""
        rgb, flow = (None if x is None else x[videos] for x in (self.rgb, self.flow))
        return VideoBatch(rgb=rgb, flow=flow)


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """What a network's backbones made of clips (kinoray.network.build.SplitModel): never empty of names."""

    tensors: Mapping[str, Tensor]
    """[B, ...] each, by the network's own names."""

    def __len__(self) -> int:
        """Number of videos."""
        return len(next(iter(self.tensors.values())))

    def select(self, videos: slice) -> "FeatureBatch":
        """Some of the videos, without a copy."""
        return FeatureBatch({name: x[videos] for name, x in self.tensors.items()})

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on the device."""
        return {name: x.to(device, non_blocking=True) for name, x in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Clips whose flow the device has yet to find (DeviceInput).

    Raises:
        ModelError: the three are not of one batch.
    """

    frames: Tensor
    """uint8 [B, S, T, 3, H, W]."""
    partners: Tensor
    """uint8 [B, S, T, 1, H, W]: green of the other frame of each frame's flow."""
    last: Tensor
    """bool [B, S, T]: the video's last frame, whose flow leads from its partner to it."""

    def __post_init__(self) -> None:
        lead = [list(x.shape[:3]) for x in (self.frames, self.partners, self.last)]
        sides = [list(x.shape[4:]) for x in (self.frames, self.partners)]
        if lead[1:] != lead[:-1] or sides[0] != sides[1]:
            raise ModelError(
                "frames, partners and last must agree in B, S, T, H, W, "
                f"got {list(self.frames.shape)}, {list(self.partners.shape)} and {list(self.last.shape)}"
            )


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
    rgb, *rest = stack(lists) if stack else [torch.stack(tensors) for tensors in lists]
    return VideoBatch(rgb=rgb, flow=rest[0] if rest else None)


def collate_raw(clips: Sequence["Clip"]) -> RawBatch:
    """Clips whose flow the device has to find, in order.

    Raises:
        ModelError: there are none, one has no partners, or they differ in shape.
    """
    if not clips:
        raise ModelError("a batch needs at least one clip, got none")
    shapes = sorted({clip.frames.shape for clip in clips})
    if len(shapes) > 1:
        raise ModelError(f"clips of a batch must have one shape [S, T, 3, H, W], got {' and '.join(map(str, shapes))}")
    partners = [torch.from_numpy(clip.partners) for clip in clips if clip.partners is not None]
    if len(partners) < len(clips):
        raise ModelError(f"all clips of a batch must have partners, got {len(partners)} of {len(clips)}")
    return RawBatch(
        frames=torch.stack([torch.from_numpy(clip.frames) for clip in clips]),
        partners=torch.stack(partners),
        last=torch.from_numpy(np.stack([clip.last for clip in clips])),
    )


def _normalised(rgb: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    # Made on the host and sent: made on a GPU, they would wait for all that it computes.
    mean, std = (torch.tensor(x).to(device, non_blocking=True).view(3, 1, 1) for x in (spec.rgb_mean, spec.rgb_std))
    return rgb.float().div_(255.0).sub_(mean).div_(std)


def model_inputs(batch: VideoBatch, spec: InputSpec, device: torch.device | str) -> dict[str, Tensor | None]:
    """What the model is called with: `logits = model(**model_inputs(batch, spec, device))`.

    `rgb` becomes float32 (x / 255 - mean) / std, `flow` float32 in -1 .. 1, both on the device
    and in the shape of the batch; a stream that the spec does not ask for is None.

    Raises:
        ModelError: the spec asks for a stream that the batch lacks, or for another number of flow channels.
    """
    place = torch.device(device)
    rgb = flow = None
    if spec.rgb:
        if batch.rgb is None:
            raise ModelError("the model needs rgb, but the batch has none")
        rgb = _normalised(batch.rgb.to(place, non_blocking=True), spec, place)
    if spec.flow_channels:
        if spec.flow_channels != FLOW_CHANNELS:
            raise ModelError(f"the model needs {spec.flow_channels} flow channels, but decoding gives {FLOW_CHANNELS}")
        if batch.flow is None:
            raise ModelError("the model needs flow, but the batch has none")
        flow = batch.flow.to(place, non_blocking=True).float().div_(FLOW_SCALE)
    return {"rgb": rgb, "flow": flow}


class Feeder:
    """Tensors from the host to the device through two buffers in turn: one is filled while the other is on its way.

    On CUDA the buffers are pinned and emptied by a stream of their own, beside what the device computes; the caller's
    stream waits for it, the host does not. On the CPU the same copies are made at once.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._turn = 0
        if self._on_gpu:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device, in order; the caller's may be overwritten at once."""
        return [x[0] for x in self.stacked([[x] for x in tensors])]

    def stacked(self, lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Each list of B tensors of one shape as one tensor [B, ...] on the device, copied once on the way."""
        sizes = [sum(x.nbytes for x in tensors) for tensors in lists]
        ends = np.cumsum([-(-size // _ALIGN_BYTES) * _ALIGN_BYTES for size in sizes]).tolist()
        starts = [0, *ends[:-1]]
        staged = self._buffer(ends[-1] if ends else 0)
        for start, size, tensors in zip(starts, sizes, lists, strict=True):
            for place, x in zip(staged[start : start + size].chunk(len(tensors)), tensors, strict=True):
                place.copy_(x.contiguous().reshape(-1).view(torch.uint8))
        sent = self._send(staged)
        return [
            sent[start : start + size].view(tensors[0].dtype).reshape(len(tensors), *tensors[0].shape)
            for start, size, tensors in zip(starts, sizes, lists, strict=True)
        ]

    def _buffer(self, size_bytes: int) -> Tensor:
        """The buffer whose turn it is, once it is empty."""
        self._turn = 1 - self._turn
        if self._on_gpu:
            self._sent[self._turn].synchronize()
        if len(self._buffers[self._turn]) < size_bytes:
            self._buffers[self._turn] = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        return self._buffers[self._turn][:size_bytes]

    def _send(self, staged: Tensor) -> Tensor:
        if not self._on_gpu:
            return staged.to(self._device, copy=True)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = staged.to(self._device, non_blocking=True)
            self._sent[self._turn].record(self._stream)
        current.wait_stream(self._stream)
        sent.record_stream(current)  # its memory is not given to the next batch before this stream is done with it
        return sent


def sent(batch: VideoBatch, feed: Feeder) -> VideoBatch:
    """The batch on the feeder's device."""
    parts = {"rgb": batch.rgb, "flow": batch.flow}
    present = {name: x for name, x in parts.items() if x is not None}
    return VideoBatch(**parts | dict(zip(present, feed(list(present.values())), strict=True)))


def quantised(flow: Tensor, bound_px: float) -> Tensor:
    """Flow in pixels to int8, clipped to +- bound_px, which becomes +- 127: as video.transform.quantise does it."""
    return (flow * (FLOW_SCALE / bound_px)).round().clamp(-FLOW_SCALE, FLOW_SCALE).to(torch.int8)


class DeviceInput:
    """Finds the flow of raw batches on a device. `ClipConfig.flow_on_device` says whether it is needed."""

    def __init__(self, bound_px: float, device: torch.device | str) -> None:
        self._bound_px = bound_px
        self._feed = Feeder(device)

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> VideoBatch:
        """The batch on the device, as `collate` would give it of clips that the decoder finished.

        Flow is of the frames as they are seen: of mirrored ones, where the view is mirrored.
        """
        frames, partners, last = self._feed([raw.frames, raw.partners, raw.last])
        own, theirs, swapped = frames[:, :, :, 1], partners[:, :, :, 0], last[..., None, None]
        first, second = torch.where(swapped, theirs, own), torch.where(swapped, own, theirs)
        flow = tvl1_flow(first.flatten(0, 2), second.flatten(0, 2))
        flow = quantised(flow, self._bound_px).reshape(*frames.shape[:3], *flow.shape[1:])
        return VideoBatch(rgb=frames, flow=flow)
