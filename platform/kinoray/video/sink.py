"""Frames -> the array of a clip: cut, kept where they belong, mirrored. Shared by all that decodes.

A frame is uint8 [3, H, W] (decode.frames=rgb) or I420, uint8 [H * 3 / 2, W] (yuv420): H rows of Y, then U, then V, each
H / 2 x W / 2 and packed, all in BT.601, limited range, a chroma sample in the middle of its 2 x 2 pixels. With
decode.scale_on=device frames are kept whole, in their own size, and the device does what the clip's view says. What is
easy to break: in I420 sizes and places are even, and what moves pixels moves each plane by itself.
"""

import math
from collections.abc import Callable

import numpy as np

from kinoray.config.shared import ClipConfig
from kinoray.video.flow_dis import dis_flow, quantise
from kinoray.video.transform import View, test_view, train_view

__all__ = ["ClipSink", "Empty", "clip_frame_bytes", "frame_shape", "i420_planes", "mirror", "new_array"]

Empty = Callable[[str, tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes an array by name, shape and dtype, with anything in it."""


def new_array(_: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """The `Empty` that takes ordinary memory."""
    return np.empty(shape, dtype)


def frame_shape(config: ClipConfig, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """(3, H, W), or (H * 3 / 2, W) of I420, of frames of this (height, width); the cut's if none is given."""
    height, width = size or (config.view.crop_px, config.view.crop_px)
    return (height * 3 // 2, width) if config.decode.frames == "yuv420" else (3, height, width)


def clip_frame_bytes(config: ClipConfig, *, with_flow: bool, size: tuple[int, int] | None = None) -> int:
    """Bytes of one decoded frame of this (height, width), with its flow or, if the device finds that, its partner."""
    height, width = size or (config.view.crop_px, config.view.crop_px)
    planes = 0 if not with_flow else 2 if config.flow.estimator == "dis" else 1
    return math.prod(frame_shape(config, size)) + planes * height * width


def i420_planes(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y [H, W], U and V [H / 2, W / 2] of a frame [H * 3 / 2, W]: views, if it lies in one piece."""
    height, width = frame.shape[0] * 2 // 3, frame.shape[1]
    chroma = frame[height:].reshape(2, height // 2, width // 2)
    return frame[:height], chroma[0], chroma[1]


def mirror(rows: np.ndarray) -> None:
    """Left becomes right, in place (the array may be where the caller wants it): frames, flow or partners [N, C, H, W],
    or I420 [N, H * 3 / 2, W]. The x component of flow is not negated."""
    for row in rows:
        for plane in (row,) if rows.ndim == 4 else i420_planes(row):
            plane[...] = plane[..., ::-1].copy()


class ClipSink:
    """Cuts scaled frames, or keeps whole ones, where they belong: of successors only what flow looks at (green, or Y).

    `frames` is there once the size of the first frame is known.
    """

    frames: np.ndarray

    def __init__(
        self, indices: np.ndarray, num_frames: int, config: ClipConfig, rng: np.random.Generator | None, empty: Empty
    ) -> None:
        self._indices = indices.reshape(-1)
        self._config, self._rng, self._empty = config, rng, empty
        self._is_i420 = config.decode.frames == "yuv420"
        self._size, self._kept = (0, 0), (slice(0), slice(0))  # of what is put in, and its part that is kept
        self._filled: set[int] = set()
        self.view: View | None = None
        unique, first = np.unique(self._indices, return_index=True)
        self._slot = dict(zip(unique.tolist(), first.tolist(), strict=True))
        # Flow looks from t to t + 1; from t - 1 to t at the video's last frame.
        self._partner = {t: t + 1 if t + 1 < num_frames else max(0, t - 1) for t in self._slot}
        self._grey: dict[int, np.ndarray] = {}

    def wanted(self, *, with_flow: bool) -> np.ndarray:
        """Numbers of the frames to decode, sorted, each once."""
        frames = {*self._slot, *self._partner.values()} if with_flow else set(self._slot)
        return np.array(sorted(frames), np.int64)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """See FrameSink; the first frame decides."""
        if self.view is None:
            view, step = self._config.view, 2 if self._is_i420 else 1
            drawn = (
                test_view(view, width, height, step)
                if self._rng is None
                else train_view(view, width, height, self._rng, step)
            )
            self.begin(drawn, width, height)
        return self._size

    def begin(self, view: View, width: int, height: int) -> None:
        """Cut this view out of the frames, the first of which is shown as width x height."""
        self.view = view
        if self._config.decode.scale_on == "device":
            step = 2 if self._is_i420 else 1
            self._size = step * -(-height // step), step * -(-width // step)
            top, left, kept = 0, 0, self._size
        else:
            self._size = view.height, view.width
            top, left, kept = view.top, view.left, (view.size, view.size)
        self._kept = slice(top, top + kept[0]), slice(left, left + kept[1])
        self.frames = self._empty("frames", (len(self._indices), *frame_shape(self._config, kept)), np.uint8)

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """See FrameSink."""
        rows, columns = self._kept
        slot = self._slot.get(index)
        if slot is None:
            self._grey[index] = planes[0 if self._is_i420 else 1][rows, columns].copy()
            return
        if self._is_i420:
            luma, *chroma = i420_planes(self.frames[slot])
            luma[...] = planes[0][rows, columns]
            halves = slice(rows.start // 2, rows.stop // 2), slice(columns.start // 2, columns.stop // 2)
            for place, plane in zip(chroma, planes[1:], strict=True):
                place[...] = plane[halves]
        else:
            for channel, plane in enumerate(planes):
                self.frames[slot, channel] = plane[rows, columns]
        self._filled.add(index)

    def finish(self) -> None:
        """Copy frames that several slots share to all of them."""
        assert self._filled == self._slot.keys()  # the array began with anything in it
        self._share(self.frames)

    def _share(self, rows: np.ndarray) -> None:
        for slot, index in enumerate(self._indices.tolist()):
            if slot != self._slot[index]:
                rows[slot] = rows[self._slot[index]]

    def motion(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Flow, int8 [S * T, 2, H, W]; or, where the device finds it, the partners of all frames: uint8 [S * T, 1, H,
        W], green or Y of the frame after each, at the video's last frame of the frame before. Not mirrored yet."""
        return (self._flow(), None) if self._config.flow.estimator == "dis" else (None, self._partners())

    def _partners(self) -> np.ndarray:
        rows, columns = self._kept
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        out = self._empty("partners", (len(self._indices), 1, *shape), np.uint8)
        for index, slot in self._slot.items():
            out[slot, 0] = self._grey_of(self._partner[index])
        self._share(out)
        return out

    def _flow(self) -> np.ndarray:
        size, flow_config = self._config.view.crop_px, self._config.flow
        out = self._empty("flow", (len(self._indices), 2, size, size), np.int8)
        for index, slot in self._slot.items():
            partner = self._partner[index]
            if partner == index:
                out[slot] = 0
            else:
                pair = (self._grey_of(min(index, partner)), self._grey_of(max(index, partner)))
                out[slot] = quantise(dis_flow(*pair, flow_config.preset), flow_config.bound_px)
        self._share(out)
        return out

    def _grey_of(self, index: int) -> np.ndarray:
        slot = self._slot.get(index)
        if slot is None:
            return self._grey[index]
        return i420_planes(self.frames[slot])[0] if self._is_i420 else self.frames[slot, 1]

    def mirrored(self, flow: np.ndarray | None, partners: np.ndarray | None) -> None:
        """Mirror the frames, the flow and the partners, in place, if the view says so and the device does not do it."""
        if self.view is None or not self.view.flip or self._config.decode.scale_on == "device":
            return
        mirror(self.frames)
        if flow is not None:
            mirror(flow)
            flow[:, 0] *= -1
        if partners is not None:
            mirror(partners)
