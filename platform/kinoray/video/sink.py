"""Frames -> the array of a clip: cut, kept where they belong, mirrored. Shared by all that decodes."""

from collections.abc import Callable

import numpy as np

from kinoray.config.shared import ClipConfig
from kinoray.video.flow_dis import dis_flow, quantise
from kinoray.video.transform import View, test_view, train_view

__all__ = ["ClipSink", "Empty", "clip_frame_bytes", "mirror", "new_array"]

Empty = Callable[[str, tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes an array by name, shape and dtype, with anything in it."""


def new_array(_: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """The `Empty` that takes ordinary memory."""
    return np.empty(shape, dtype)


def clip_frame_bytes(config: ClipConfig, *, with_flow: bool) -> int:
    """Bytes of one decoded frame, with its flow or, if the device finds that, its partner."""
    flow_planes = 0 if not with_flow else 2 if config.flow.estimator == "dis" else 1
    return (3 + flow_planes) * config.view.crop_px**2


def mirror(rows: np.ndarray) -> None:
    """Left becomes right, in place (the array may be where the caller wants it): frames, flow or partners [N, C, H, W].
    The x component of flow is not negated."""
    for row in rows:
        row[...] = row[..., ::-1].copy()


class ClipSink:
    """Cuts scaled frames and keeps them where they belong: of successors only what flow looks at, the green plane.

    `frames` is there once the size of the first frame is known.
    """

    frames: np.ndarray

    def __init__(
        self, indices: np.ndarray, num_frames: int, config: ClipConfig, rng: np.random.Generator | None, empty: Empty
    ) -> None:
        self._indices = indices.reshape(-1)
        self._config, self._rng, self._empty = config, rng, empty
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
            config = self._config.view
            if self._rng is None:
                self.begin(test_view(config, width, height))
            else:
                self.begin(train_view(config, width, height, self._rng))
        assert self.view is not None
        return self.view.height, self.view.width

    def begin(self, view: View) -> None:
        """Cut this view out of the frames."""
        self.view = view
        self._rows = slice(view.top, view.top + view.size)
        self._columns = slice(view.left, view.left + view.size)
        self.frames = self._empty("frames", (len(self._indices), 3, view.size, view.size), np.uint8)

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """See FrameSink."""
        slot = self._slot.get(index)
        if slot is None:
            self._grey[index] = planes[1][self._rows, self._columns].copy()
            return
        for channel, plane in enumerate(planes):
            self.frames[slot, channel] = plane[self._rows, self._columns]
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
        W], green of the frame after each, at the video's last frame of the frame before. Not mirrored yet."""
        return (self._flow(), None) if self._config.flow.estimator == "dis" else (None, self._partners())

    def _partners(self) -> np.ndarray:
        size = self._config.view.crop_px
        out = self._empty("partners", (len(self._indices), 1, size, size), np.uint8)
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
        return self._grey[index] if slot is None else self.frames[slot, 1]

    def mirrored(self, flow: np.ndarray | None, partners: np.ndarray | None) -> None:
        """Mirror the frames, the flow and the partners, in place, if the view says so."""
        if self.view is None or not self.view.flip:
            return
        mirror(self.frames)
        if flow is not None:
            mirror(flow)
            flow[:, 0] *= -1
        if partners is not None:
            mirror(partners)
