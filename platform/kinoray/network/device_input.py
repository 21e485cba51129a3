"""What the network's device does to clips before the network: it gets them from the host, and finds their flow (TV-L1).

What comes out is the batch that decoding on the CPU would have given, but for the estimator: uint8 frames, int8 flow.
What is easy to break: flow is found before colours are changed, and nothing here may wait for the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kinoray.errors import ModelError
from kinoray.network.batch import FLOW_SCALE, RawBatch, VideoBatch
from kinoray.video.clip import Clip
from kinoray.video.flow_tvl1 import tvl1_flow

__all__ = ["DeviceInput", "Feeder", "collate_raw", "quantised", "sent"]

# Shapes: B videos, S segments, T frames a segment, H W pixels

_ALIGN_BYTES = 64


def collate_raw(clips: Sequence[Clip]) -> RawBatch:
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
    """Flow in pixels to int8, clipped to +- bound_px, which becomes +- 127: as video.flow_dis.quantise does it."""
    return (flow * (FLOW_SCALE / bound_px)).round().clamp(-FLOW_SCALE, FLOW_SCALE).to(torch.int8)


class DeviceInput:
    """Finds the flow of raw batches on a device. `ClipConfig.flow_on_device` says whether it is needed."""

    def __init__(self, bound_px: float, device: torch.device | str) -> None:
        self._bound_px = bound_px
        self._feed = Feeder(device)

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> VideoBatch:
        """The batch on the device, as kinoray.network.batch.collate would give it of clips that the decoder finished.

        Flow is of the frames as they are seen: of mirrored ones, where the view is mirrored.
        """
        frames, partners, last = self._feed([raw.frames, raw.partners, raw.last])
        own, theirs, swapped = frames[:, :, :, 1], partners[:, :, :, 0], last[..., None, None]
        first, second = torch.where(swapped, theirs, own), torch.where(swapped, own, theirs)
        flow = tvl1_flow(first.flatten(0, 2), second.flatten(0, 2))
        flow = quantised(flow, self._bound_px).reshape(*frames.shape[:3], *flow.shape[1:])
        return VideoBatch(rgb=frames, flow=flow)
