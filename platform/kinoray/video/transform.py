"""From frames to arrays: which part of a frame the model sees, each wanted frame once, and the flow between two.

A crop of a smaller region "resized to crop_px" is written as a larger scaling followed by a cut of exactly crop_px:
the decoder scales once, straight from YUV, and no second resize follows. For view.interpolation other than `direct` it
does not scale at all, and `resized_cut` does it as Pillow and torchvision do.

What is easy to break: the arrays may lie where the caller wants them (shared memory), so they are made by its `Empty`
and filled in place; and of the frames that only flow looks at no more is held than their green plane.

The same frames must give the same flow whatever came before them. OpenCV's DIS makes that easy to get wrong: for frames
whose pyramid has fewer levels than the preset's finest one, `calc` chooses both ends of the pyramid itself, from the
width alone; the finest stays for all later calls, the coarsest is found anew, so that the second call is another
estimate than the first (and of thin frames the coarsest can have no rows, and the process dies). So the finest level is
chosen here, where `calc` has nothing to change, and each shape has its estimator.
"""

import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from kinoray.config.scoring import Crops
from kinoray.config.shared import ClipConfig, ViewConfig

__all__ = [
    "Cut",
    "Empty",
    "FrameArrays",
    "ReusedMemory",
    "View",
    "WholeFrame",
    "crop_views",
    "dis_flow",
    "mirror",
    "new_array",
    "quantise",
    "resized_cut",
    "test_view",
    "train_view",
]

_HELD_BYTES = 2**27  # of an array
_OURS = 2  # references to an array that only its holder has: a variable, and the argument of getrefcount
_WITHOUT_ANTIALIAS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
_estimators = threading.local()  # an estimator keeps buffers between calls, so threads must not share one


@dataclass(frozen=True, slots=True)
class View:
    """Scale the frame to height x width, cut size x size at (top, left), then mirror it if flip. All in pixels."""

    height: int
    width: int
    top: int
    left: int
    size: int
    flip: bool

    def __post_init__(self) -> None:
        inside = 0 <= self.top <= self.height - self.size and 0 <= self.left <= self.width - self.size
        if self.size < 1 or not inside:
            raise ValueError(
                f"a cut of {self.size} x {self.size} at ({self.top}, {self.left}) is not inside "
                f"{self.height} x {self.width}"
            )

    @property
    def rows(self) -> slice:
        """Of the scaled frame."""
        return slice(self.top, self.top + self.size)

    @property
    def columns(self) -> slice:
        """Of the scaled frame."""
        return slice(self.left, self.left + self.size)


@dataclass(frozen=True, slots=True)
class WholeFrame:
    """Scale the frame to height x width, in pixels, and cut nothing off: for people to look at."""

    height: int
    width: int
    flip = False

    @property
    def rows(self) -> slice:
        """Of the scaled frame."""
        return slice(0, self.height)

    @property
    def columns(self) -> slice:
        """Of the scaled frame."""
        return slice(0, self.width)


Cut = View | WholeFrame


def resized_cut(plane: np.ndarray, cut: Cut, config: ViewConfig) -> np.ndarray:
    """A plane of a whole frame, uint8 [h, w], resized by view.interpolation, in the cut: uint8 [rows, columns]."""
    if not config.antialias and config.interpolation in _WITHOUT_ANTIALIAS:
        how = _WITHOUT_ANTIALIAS[config.interpolation]
        whole = cv2.resize(np.ascontiguousarray(plane), (cut.width, cut.height), interpolation=how)
        return np.asarray(whole[cut.rows, cut.columns])
    picture = Image.fromarray(np.ascontiguousarray(plane))
    across, down = picture.width / cut.width, picture.height / cut.height
    rows, columns = cut.rows, cut.columns
    part = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(picture.resize(size, Image.Resampling[config.interpolation.upper()], part))


def _resized(config: ViewConfig, width: int, height: int) -> tuple[int, int]:
    """(height, width) of a width x height frame after view.resize."""
    if width < 1 or height < 1:
        raise ValueError(f"a frame must have at least 1 x 1 pixels, got {width} x {height}")
    if config.resize == "stretch":
        return config.resize_px, config.resize_width_px or config.resize_px
    scale = config.resize_px / min(width, height)
    tall, wide = (round(side * scale) for side in (height, width))
    if config.interpolation != "direct":  # as torchvision, Hugging Face and PySlowFast have it
        tall, wide = (config.resize_px * side // min(width, height) for side in (height, width))
    return max(config.resize_px, tall), max(config.resize_px, wide)


def test_view(config: ViewConfig, width: int, height: int) -> View:
    """Resize, then the centre crop: the view of testing and labelling. width x height is the frame as displayed."""
    tall, wide = _resized(config, width, height)
    size = config.crop_px
    # round() takes a half to the even neighbour
    top, left = (round((side - size) / 2) if config.middle == "even" else (side - size) // 2 for side in (tall, wide))
    return View(height=tall, width=wide, top=top, left=left, size=size, flip=False)


test_view.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it where a test imports it


def crop_views(config: ViewConfig, width: int, height: int, crops: Crops) -> list[View]:
    """Resize, then one or more cuts: the views of a protocol. width x height as for `test_view`.

    center: `test_view`. three: left, centre, right; top, centre, bottom where the frame is taller than wide
    (SlowFast). ten: top left, top right, bottom left, bottom right, centre, then the same five mirrored (TSN).
    """
    centre = test_view(config, width, height)
    bottom, right = centre.height - centre.size, centre.width - centre.size
    if crops == "center":
        return [centre]
    if crops == "three":
        if height > width:
            return [replace(centre, top=top) for top in (0, centre.top, bottom)]
        return [replace(centre, left=left) for left in (0, centre.left, right)]
    corners = [replace(centre, top=top, left=left) for top in (0, bottom) for left in (0, right)]
    five = [*corners, centre]
    return [*five, *(replace(view, flip=True) for view in five)]


def train_view(config: ViewConfig, width: int, height: int, rng: np.random.Generator) -> View:
    """A random crop for training, as in TSN: scale, place and flip are drawn from rng, once for the whole clip.

    The crop's height and width are each a fraction (view.train_scales) of the resized frame's short side, at most one
    place of the list apart, so that shapes are distorted a little and never much. width x height as for `test_view`.
    """
    tall, wide = _resized(config, width, height)
    short = min(tall, wide)
    scales = config.train_scales
    pairs = [(a, b) for a in range(len(scales)) for b in range(len(scales)) if abs(a - b) <= 1]
    row, column = pairs[int(rng.integers(len(pairs)))]
    size = config.crop_px
    scaled_height = max(size, round(tall * size / (scales[row] * short)))
    scaled_width = max(size, round(wide * size / (scales[column] * short)))
    return View(
        height=scaled_height,
        width=scaled_width,
        top=int(rng.integers(scaled_height - size + 1)),
        left=int(rng.integers(scaled_width - size + 1)),
        size=size,
        flip=bool(rng.random() < 0.5) and config.train_flip,
    )


Empty = Callable[[str, tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes an array by name, shape and dtype, with anything in it."""


def new_array(_: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """The `Empty` that takes ordinary memory."""
    return np.empty(shape, dtype)


class ReusedMemory:
    """An `Empty` that takes the same memory again for a name once nobody looks at it any more.

    New pages cost more than the clip that is copied into them (6 ms beside 2.5 for 24 MB of RGB and flow).
    """

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
        """An array with anything in it."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.pop(name, None)
        if held is None or held.nbytes < size_bytes or sys.getrefcount(held) > _OURS:
            held = np.empty(size_bytes, np.uint8)
        if size_bytes <= _HELD_BYTES:
            self._held[name] = held
        return held[:size_bytes].view(dtype).reshape(shape)


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


def _coarsest_scale(shape: tuple[int, ...], patch_px: int) -> int:
    """The coarsest level of the pyramid, as `calc` finds it (0: the frames themselves)."""
    widest = math.log2(max(shape) / (4 * patch_px)) + 0.5  # patches move a quarter of the longer side at most
    return min(int(widest), int(math.log2(max(1, min(shape) // patch_px))))


def _estimator(preset: str, shape: tuple[int, ...]) -> cv2.DISOpticalFlow:
    """This thread's estimator for frames of one shape."""
    if not hasattr(_estimators, "made"):
        _estimators.made = {}
    made: dict[tuple[str, tuple[int, ...]], cv2.DISOpticalFlow] = _estimators.made
    if (preset, shape) not in made:
        estimator = cv2.DISOpticalFlow.create(_PRESETS[preset])
        if _coarsest_scale(shape, estimator.getPatchSize()) < estimator.getFinestScale():
            estimator.setFinestScale(0)  # what `calc` chooses for such frames
        made[preset, shape] = estimator
    return made[preset, shape]


def dis_flow(prev: np.ndarray, next: np.ndarray, preset: str) -> np.ndarray:
    """Motion from prev to next (uint8 [H, W]) in pixels, float32 [H, W, 2] as (x, y): x to the right, y down.

    What is at (x, y) in prev is at (x, y) + flow in next. `preset` is one of flow.preset's choices.

    Raises:
        ValueError: the frames are not two uint8 images of one shape, or the preset is unknown.
    """
    if prev.shape != next.shape or prev.ndim != 2 or prev.dtype != np.uint8 or next.dtype != np.uint8:
        raise ValueError(
            f"dis_flow needs two uint8 [H, W] images of one shape, got {prev.dtype} {prev.shape} and "
            f"{next.dtype} {next.shape}"
        )
    if preset not in _PRESETS:
        raise ValueError(f"flow.preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    if cv2.getNumThreads() != 1:  # the cores are busy with other clips; more threads would only wait for each other
        cv2.setNumThreads(1)
    # The third argument must stay None: DIS takes a given output array as its starting flow.
    flow: np.ndarray = _estimator(preset, prev.shape).calc(prev, next, None)
    return flow


def quantise(flow: np.ndarray, bound_px: float) -> np.ndarray:
    """Flow in pixels, float [H, W, 2], to int8 [2, H, W]: clipped to +- bound_px, which becomes +- 127; 0 stays 0."""
    height, width, _ = flow.shape
    scaled = cv2.addWeighted(flow, 127.0 / bound_px, flow, 0.0, 0.0, dtype=cv2.CV_8S)  # rounds half to even, saturates
    scaled = cv2.max(scaled.reshape(height, -1), -127.0).reshape(height, width, 2)  # numpy takes five times as long
    out = np.empty((2, height, width), np.int8)
    cv2.split(scaled, [out[0], out[1]])
    return out
