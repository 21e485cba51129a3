"""Clips as decoded -> clips as the network is fed, on its device: scaled, cut, mirrored and with flow found there.

What comes out is the batch that decoding on the CPU would have given, up to rounding: uint8 frames of the cut and int8
flow, so augmentation and normalisation do not know the difference. What is easy to break: flow is found before colours
are changed, and nothing here may wait for the device.

A View is two small matrices, one for the rows and one for the columns; a frame is scaled, cut and mirrored by
multiplying with them. So clips of a batch may have different sizes and views, and only the pixels that are kept are
computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor

from kinoray.config.shared import ClipConfig
from kinoray.errors import ModelError
from kinoray.network.batch import FLOW_SCALE, RawBatch, VideoBatch
from kinoray.storage.objects import Storage
from kinoray.video.clip import Clip
from kinoray.video.flow_raft import load_raft
from kinoray.video.flow_tvl1 import tvl1_flow

__all__ = ["DeviceInput", "Feeder", "collate_raw", "quantised", "scaled", "sent"]

# Shapes: B videos, S segments, T frames a segment, N images, H W pixels

_SCALED_PIXELS = 2**25  # at a time, of the frames before scaling: in float32 they take 4 bytes each
_ALIGN_BYTES = 64


def collate_raw(clips: Sequence[Clip]) -> RawBatch:
    """Clips that the device has to finish, in order.

    Raises:
        ModelError: there are none, or only some have partners, or a view.
    """
    if not clips:
        raise ModelError("a batch needs at least one clip, got none")
    partners = [torch.from_numpy(clip.partners) for clip in clips if clip.partners is not None]
    views = [astuple(clip.view) for clip in clips if clip.view is not None]
    for name, found in (("partners", partners), ("a view", views)):
        if found and len(found) < len(clips):
            raise ModelError(f"all clips of a batch must have {name} or none, got {len(found)} of {len(clips)}")
    return RawBatch(
        frames=[torch.from_numpy(clip.frames) for clip in clips],
        partners=partners or None,
        last=torch.from_numpy(np.stack([clip.last for clip in clips])) if partners else None,
        views=torch.tensor(views, dtype=torch.int64) if views else None,
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
    parts = {"rgb": batch.rgb, "flow": batch.flow, "yuv": batch.yuv}
    present = {name: x for name, x in parts.items() if x is not None}
    return VideoBatch(**parts | dict(zip(present, feed(list(present.values())), strict=True)))


def _weights(begin: Tensor, extent: Tensor, flip: Tensor, size: int, source: int) -> Tensor:
    """float32 [size, source]: how much of each source pixel goes into each pixel begin .. begin + size of `extent`.

    A triangle as wide as a pixel of the result, at least one of the source, as libswscale's and torch's antialiased
    bilinear scaling have it.
    """
    place = torch.arange(size, device=begin.device)
    place = torch.where(flip, size - 1 - place, place)
    ratio = source / extent.float()
    centre = (begin + place + 0.5) * ratio - 0.5
    distance = (torch.arange(source, device=begin.device) - centre[:, None]).abs()
    weights = (1 - distance / ratio.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(1, keepdim=True)


def scaled(planes: Tensor, view: Tensor, size: int, share: int = 1) -> Tensor:
    """Planes, uint8 [N, h, w], scaled, cut and mirrored as a view says: uint8 [N, size, size], on their device.

    Args:
        view: int64 [6], the fields of a View in their order, on the device.
        share: 2 for chroma planes, whose view has half the numbers (and `size` is half of the cut's).
    """
    height, width, top, left, _, flip = view.unbind()
    rows = _weights(top // share, height // share, torch.zeros_like(flip, dtype=torch.bool), size, planes.shape[1])
    columns = _weights(left // share, width // share, flip.bool(), size, planes.shape[2])
    out = torch.empty((len(planes), size, size), dtype=torch.uint8, device=planes.device)
    step = max(1, _SCALED_PIXELS // (planes.shape[1] * planes.shape[2]))
    for part, place in zip(torch.split(planes, step), torch.split(out, step), strict=True):
        place.copy_((rows @ (part.float() @ columns.T)).round_())
    return out


def quantised(flow: Tensor, bound_px: float) -> Tensor:
    """Flow in pixels to int8, clipped to +- bound_px, which becomes +- 127: as video.flow_dis.quantise does it."""
    return (flow * (FLOW_SCALE / bound_px)).round().clamp(-FLOW_SCALE, FLOW_SCALE).to(torch.int8)


class DeviceInput:
    """Finishes raw batches on a device. `ClipConfig.on_device` says whether it is needed.

    Args:
        storage: where flow.weights are read from.

    Raises:
        ConfigError: flow.weights are not there, or are none of RAFT's.
    """

    def __init__(self, clip: ClipConfig, device: torch.device | str, storage: Storage) -> None:
        self._size, self._bound_px = clip.view.crop_px, clip.flow.bound_px
        self._is_i420 = clip.decode.frames == "yuv420"
        self._grid = (clip.sample.num_segments, clip.sample.frames_per_segment)
        self._feed = Feeder(device)
        self._estimator: Callable[[Tensor, Tensor], Tensor] = tvl1_flow
        if clip.flow.estimator == "raft":
            self._estimator = load_raft(storage, clip.flow.weights, device)

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> VideoBatch:
        """The batch on the device, as kinoray.network.batch.collate would give it of clips that the decoder finished.

        Flow is of the frames as they are seen: of mirrored ones, where the view is mirrored.
        """
        if not len(raw):
            return self._nothing()
        small = [x for x in (raw.views, raw.last) if x is not None]
        num_frames = len(raw.frames)
        fed = self._feed([*raw.frames, *(raw.partners or []), *small])
        frames, partners = fed[:num_frames], fed[num_frames : len(fed) - len(small)]
        if raw.views is not None:
            views = fed[-len(small)].unbind()
            frames = [self._cut(x, view) for x, view in zip(frames, views, strict=True)]
            partners = [self._cut_planes(x, view) for x, view in zip(partners, views[: len(partners)], strict=True)]
        stacked = torch.stack(frames)
        flow = self._flow(stacked, torch.stack(partners), fed[-1]) if partners else None
        return VideoBatch(rgb=None if self._is_i420 else stacked, flow=flow, yuv=stacked if self._is_i420 else None)

    def _nothing(self) -> VideoBatch:
        shape = (self._size * 3 // 2, self._size) if self._is_i420 else (3, self._size, self._size)
        frames = torch.empty((0, *self._grid, *shape), dtype=torch.uint8)
        return VideoBatch(rgb=None if self._is_i420 else frames, flow=None, yuv=frames if self._is_i420 else None)

    def _cut_planes(self, x: Tensor, view: Tensor, share: int = 1) -> Tensor:
        """[..., h, w] -> [..., size, size]."""
        size = self._size // share
        return scaled(x.reshape(-1, *x.shape[-2:]), view, size, share).reshape(*x.shape[:-2], size, size)

    def _cut(self, frames: Tensor, view: Tensor) -> Tensor:
        """One clip, [S, T, 3, h, w] or I420 [S, T, h * 3 / 2, w]."""
        if not self._is_i420:
            return self._cut_planes(frames, view)
        *lead, rows, width = frames.shape
        height = rows * 2 // 3
        luma = self._cut_planes(frames[..., :height, :], view)
        chroma = self._cut_planes(frames[..., height:, :].reshape(*lead, 2, height // 2, width // 2), view, 2)
        return torch.cat([luma, chroma.reshape(*lead, self._size // 2, self._size)], -2)

    def _flow(self, frames: Tensor, partners: Tensor, last: Tensor) -> Tensor:
        """int8 [B, S, T, 2, H, W] from frames, their partners [B, S, T, 1, H, W] and which are a video's last."""
        own = frames[..., : self._size, :] if self._is_i420 else frames[:, :, :, 1]
        theirs, swapped = partners[:, :, :, 0], last[..., None, None]
        first, second = torch.where(swapped, theirs, own), torch.where(swapped, own, theirs)
        flow = self._estimator(first.flatten(0, 2), second.flatten(0, 2))
        return quantised(flow, self._bound_px).reshape(*frames.shape[:3], *flow.shape[1:])
