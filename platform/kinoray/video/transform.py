"""Which part of a frame the model sees: one scaling, one cut, one mirror, chosen once a clip.

A crop of a smaller region "resized to crop_px" is written as a larger scaling followed by a cut of exactly crop_px:
the decoder scales once, straight from YUV, and no second resize follows. For view.interpolation other than `direct` it
does not scale at all, and `resized_cut` does it as Pillow and torchvision do.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from kinoray.config.scoring import Crops
from kinoray.config.shared import ViewConfig

__all__ = ["Cut", "View", "WholeFrame", "crop_views", "resized_cut", "test_view", "train_view"]

_WITHOUT_ANTIALIAS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


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
