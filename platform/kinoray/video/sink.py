"""Scaled frames -> arrays: each wanted frame once, in one cut or several, with its flow. Shared by all that decodes.

What is easy to break: the arrays may lie where the caller wants them (shared memory), so they are made by its `Empty`
and filled in place; and of the frames that only flow looks at no more is held than their green plane.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kinoray.config.shared import ClipConfig
from kinoray.video.flow_dis import dis_flow, quantise
from kinoray.video.transform import Cut, resized_cut

__all__ = ["Empty", "FrameArrays", "mirror", "new_array"]

Empty = Callable[[str, tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes an array by name, shape and dtype, with anything in it."""


def new_array(_: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """The `Empty` that takes ordinary memory."""
    return np.empty(shape, dtype)


def mirror(rows: np.ndarray, flow: np.ndarray | None, partners: np.ndarray | None) -> None:
    """Left becomes right, in place: frames, flow and partners [N, C, H, W]; the x component of the flow is negated."""
    for array in (rows, flow, partners):
        if array is not None:
            for row in array:
                row[...] = row[..., ::-1].copy()
    if flow is not None:
        flow[:, 0] *= -1


class FrameArrays:
    """A FrameSink that cuts U distinct frames in C places.

    `frames`, uint8 [C, U, 3, H, W], is there once the size of the first frame is known.

    Args:
        wanted: int64 [U], numbers of frames, rising.
        cuts: the cuts of a frame that is shown as width x height, all of one size and scaled alike; asked for once.
    """

    frames: np.ndarray

    def __init__(
        self,
        wanted: np.ndarray,
        num_frames: int,
        clip: ClipConfig,
        cuts: Callable[[int, int], Sequence[Cut]],
        empty: Empty,
    ) -> None:
        self._clip, self._choose_cuts, self._empty = clip, cuts, empty
        self._direct = clip.view.interpolation == "direct"
        self._slot = {index: slot for slot, index in enumerate(wanted.tolist())}
        # Flow looks from t to t + 1; from t - 1 to t at the video's last frame.
        self._partner = {t: t + 1 if t + 1 < num_frames else max(0, t - 1) for t in self._slot}
        self._filled: set[int] = set()
        self._cuts: Sequence[Cut] = ()
        self._green: dict[int, list[np.ndarray]] = {}

    def numbers(self) -> np.ndarray:
        """Numbers of the frames to decode, sorted, each once."""
        with_flow = self._clip.flow.estimator != "none"
        frames = {*self._slot, *self._partner.values()} if with_flow else set(self._slot)
        return np.array(sorted(frames), np.int64)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """See FrameSink; the first frame decides. Frames that are resized here come as large as they are."""
        if not self._cuts:
            self._cuts = self._choose_cuts(width, height)
            first = self._cuts[0]
            sides = (first.rows.stop - first.rows.start, first.columns.stop - first.columns.start)
            self.frames = self._empty("frames", (len(self._cuts), len(self._slot), 3, *sides), np.uint8)
        return (self._cuts[0].height, self._cuts[0].width) if self._direct else (height, width)

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """See FrameSink."""
        slot = self._slot.get(index)
        if slot is None:
            self._green[index] = [self._cut(planes[1], cut).copy() for cut in self._cuts]
            return
        for number, cut in enumerate(self._cuts):
            for channel, plane in enumerate(planes):
                self.frames[number, slot, channel] = self._cut(plane, cut)
        self._filled.add(index)

    def _cut(self, plane: np.ndarray, cut: Cut) -> np.ndarray:
        return plane[cut.rows, cut.columns] if self._direct else resized_cut(plane, cut, self._clip.view)

    def finish(self) -> dict[str, np.ndarray]:
        """`frames`; `flow`, int8 [C, U, 2, H, W], or, where the device finds it, `partners`, uint8 [C, U, 1, H, W]:
        green of the frame after each, at the video's last frame of the frame before."""
        assert self._filled == self._slot.keys()  # the array began with anything in it
        arrays = {"frames": self.frames}
        if self._clip.flow.estimator == "dis":
            arrays["flow"] = self._flow()
        elif self._clip.flow_on_device:
            arrays["partners"] = self._partners()
        for number, cut in enumerate(self._cuts):
            if cut.flip:
                flow, partners = (arrays[name][number] if name in arrays else None for name in ("flow", "partners"))
                mirror(self.frames[number], flow, partners)
        return arrays

    def _partners(self) -> np.ndarray:
        out = self._array("partners", 1, np.uint8)
        for number in range(len(self._cuts)):
            for index, slot in self._slot.items():
                out[number, slot, 0] = self._green_of(number, self._partner[index])
        return out

    def _flow(self) -> np.ndarray:
        flow_config = self._clip.flow
        out = self._array("flow", 2, np.int8)
        for number in range(len(self._cuts)):
            for index, slot in self._slot.items():
                partner = self._partner[index]
                if partner == index:
                    out[number, slot] = 0
                    continue
                before, after = (self._green_of(number, t) for t in sorted((index, partner)))
                out[number, slot] = quantise(dis_flow(before, after, flow_config.preset), flow_config.bound_px)
        return out

    def _array(self, name: str, num_channels: int, dtype: type[np.generic]) -> np.ndarray:
        num_cuts, num_frames, _, height, width = self.frames.shape
        return self._empty(name, (num_cuts, num_frames, num_channels, height, width), dtype)

    def _green_of(self, number: int, index: int) -> np.ndarray:
        """The green plane of a frame in one cut, of whatever flow looks at."""
        slot = self._slot.get(index)
        return self._green[index][number] if slot is None else np.asarray(self.frames[number, slot, 1])
