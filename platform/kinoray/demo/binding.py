"""Real videos that ask "which thing moves, and which way": labels that need appearance, motion and their binding.

Two cards with different things on them lie over a background that pans. The background carries one card along; the
other moves left or right relative to it. The label is (thing of the mover) x (direction). Ceilings by construction:
a single picture shows both things and no motion, 1 of 4; flow alone shows a direction and no thing, 1 of 4; adding
the two answers without binding them, 1 of 2; all are needed for more. What keeps the ceilings true: each card is
equally likely to be anywhere in any one frame, whatever moves (they wrap around the edges); both have one outline;
things are drawn in red and blue only, and flow is estimated on green, so its errors do not depend on the thing either.

Train and test share no background, no card texture and no drawing of a thing.
"""

import functools
import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from kinoray.console import Progress
from kinoray.demo.videos import make_video

__all__ = [
    "BINDING_DIRECTIONS",
    "BINDING_THINGS",
    "BINDING_VERSION",
    "CARD_PX",
    "SIDE_PX",
    "BindingTruth",
    "Split",
    "binding_classes",
    "binding_clip",
    "binding_truth",
    "drawing",
    "make_binding_set",
    "picture",
]

Split = Literal["train", "test"]

BINDING_THINGS = ("ring", "cross", "zigzag", "bars")
"""What is drawn on the cards."""
BINDING_DIRECTIONS = ("left", "right")
"""Which way the mover goes, relative to the background."""
BINDING_VERSION = 3
"""Raised whenever the same arguments give other pixels, so that results of both are never mixed."""
SIDE_PX = 64
CARD_PX = 20
NUM_FRAMES = 24
NUM_PICTURES = 24
"""Pictures a split has; backgrounds and cards are cut from them."""
NUM_DRAWINGS = 128
"""Drawings of each thing that a split has."""
PICTURE_PX = 128
_NOISE = 0.01


@dataclass(frozen=True, slots=True)
class BindingTruth:
    """How one video was made. Pixels; x to the right, y down; cards are named by their upper left corner."""

    mover: int
    """Index into BINDING_THINGS of the thing that moves."""
    other: int
    """Index of the thing that the background carries, never the mover's."""
    direction: int
    """Index into BINDING_DIRECTIONS."""
    speed_px: float
    """Mover against background, pixels a frame, always positive."""
    pan_px: tuple[float, float]
    """Motion of the background and of everything on it, pixels a frame."""
    mover_xy: tuple[float, float]
    """Mover's corner in frame 0; positions are modulo SIDE_PX."""
    other_xy: tuple[float, float]
    """The other card's corner in frame 0."""
    pictures: tuple[int, int, int]
    """Numbers of the split's pictures under background, mover and other card."""
    drawings: tuple[int, int]
    """Numbers of the split's drawings on the mover and on the other card."""

    @property
    def label_id(self) -> int:
        """Index into binding_classes()."""
        return self.mover * len(BINDING_DIRECTIONS) + self.direction

    @property
    def step_px(self) -> tuple[float, float]:
        """Motion of the mover in the frame: its own and the background's."""
        sign = (-1.0, 1.0)[self.direction]
        return self.pan_px[0] + sign * self.speed_px, self.pan_px[1]


def binding_classes() -> list[str]:
    """The eight classes in the order of their ids: `ring-left`, `ring-right`, `cross-left`, ..."""
    return [f"{thing}-{direction}" for thing in BINDING_THINGS for direction in BINDING_DIRECTIONS]


def _rng(*key: object) -> np.random.Generator:
    """A generator that depends on the key only: not on order, worker or platform."""
    text = "\n".join(map(str, (BINDING_VERSION, *key)))
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")))


@functools.lru_cache(maxsize=2 * NUM_PICTURES)
def picture(seed: int, split: Split, number: int) -> np.ndarray:
    """One of a split's NUM_PICTURES textures, float32 [PICTURE_PX, PICTURE_PX, 3] in 0 .. 1 (read-only).

    Dead leaves: shapes of all sizes that cover one another (radii from a power law), which gives the edges, the flat
    parts and the spectrum of photographs; cloudy shading lies over them.
    """
    rng = _rng(seed, split, "picture", number)
    scale = 2  # drawn large and averaged down
    side = PICTURE_PX * scale
    palette = rng.uniform(0.1, 0.9, (5, 3))
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = palette[0]
    smallest, largest = 1.5 * scale, 24.0 * scale
    for _ in range(900):
        # Inverse of the distribution with density r^-3 between smallest and largest.
        u = rng.random()
        radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
        centre = rng.integers(0, side, 2).tolist()
        axes = (max(1, round(radius)), max(1, round(radius * rng.uniform(0.5, 1.0))))
        colour = np.clip(palette[rng.integers(5)] + rng.normal(0, 0.08, 3), 0.0, 1.0).tolist()
        cv2.ellipse(canvas, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1)
    small = cv2.resize(canvas, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA)
    clouds = cv2.resize(rng.normal(0, 1, (9, 9, 1)).astype(np.float32), (PICTURE_PX, PICTURE_PX))[..., None]
    shaded: np.ndarray = np.clip(small * (1.0 + 0.15 * clouds), 0.0, 1.0).astype(np.float32)
    shaded.setflags(write=False)  # the cache hands out this very array
    return shaded


def _strokes(thing: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The lines of a drawing, each [points, 2], in a square from -1 to 1; every drawing has its own proportions."""
    if thing == "ring":
        angles = np.linspace(0, 2 * math.pi, 33)
        radii = rng.uniform(0.5, 0.7, 2)
        return [np.stack([radii[0] * np.cos(angles), radii[1] * np.sin(angles)], axis=1)]
    corners: dict[str, list[list[tuple[float, float]]]] = {
        "cross": [[(-0.65, 0), (0.65, 0)], [(0, -0.65), (0, 0.65)]],
        "zigzag": [[(-0.55, -0.6), (0.55, -0.6), (-0.55, 0.6), (0.55, 0.6)]],
        "bars": [[(-0.4, -0.65), (-0.4, 0.65)], [(0.4, -0.65), (0.4, 0.65)]],
    }
    return [np.array(line) + rng.normal(0, 0.07, (len(line), 2)) for line in corners[thing]]


@functools.lru_cache(maxsize=2 * NUM_DRAWINGS * len(BINDING_THINGS))
def drawing(seed: int, split: Split, thing: str, number: int) -> np.ndarray:
    """Where the ink is in one of a split's NUM_DRAWINGS drawings of a thing.

    float32 [CARD_PX, CARD_PX] in 0 .. 1 (read-only).
    """
    rng = _rng(seed, split, "drawing", thing, number)
    scale = 8
    side = CARD_PX * scale
    angle, size, width = rng.uniform(-0.4, 0.4), rng.uniform(0.8, 1.05), rng.uniform(0.11, 0.16)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    canvas = np.zeros((side, side), np.uint8)
    for line in _strokes(thing, rng):
        points = np.rint((1.0 + size * line @ turn) * side / 2).astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, round(width * side), cv2.LINE_AA)
    small: np.ndarray = cv2.resize(canvas, (CARD_PX, CARD_PX), interpolation=cv2.INTER_AREA)
    ink: np.ndarray = small.astype(np.float32) / 255.0
    ink.setflags(write=False)
    return ink


def binding_truth(split: Split, number: int, seed: int = 0) -> BindingTruth:
    """How video `number` of a split is made. Any 8 videos in a row hold each class once, any 24 each (class, other)."""
    rng = _rng(seed, split, "video", number)
    label_id, num_things = number % len(binding_classes()), len(BINDING_THINGS)
    mover, direction = divmod(label_id, len(BINDING_DIRECTIONS))
    other = (mover + 1 + number // len(binding_classes()) % (num_things - 1)) % num_things
    mover_xy = rng.uniform(0, SIDE_PX, 2)
    # At least CARD_PX + 2 apart above and below, also around the edge: the cards never touch.
    other_xy = (rng.uniform(0, SIDE_PX), (mover_xy[1] + SIDE_PX / 2 + rng.uniform(-10, 10)) % SIDE_PX)
    heading, pan = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.4)
    chosen = rng.choice(NUM_PICTURES, 3, replace=False)
    return BindingTruth(
        mover=mover,
        other=other,
        direction=direction,
        speed_px=float(rng.uniform(0.9, 1.5)),
        pan_px=(float(pan * math.cos(heading)), float(pan * math.sin(heading))),
        mover_xy=(float(mover_xy[0]), float(mover_xy[1])),
        other_xy=(float(other_xy[0]), float(other_xy[1])),
        pictures=(int(chosen[0]), int(chosen[1]), int(chosen[2])),
        drawings=(int(rng.integers(NUM_DRAWINGS)), int(rng.integers(NUM_DRAWINGS))),
    )


def _card(texture: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A card with its opacity, float32 [SIDE_PX, SIDE_PX, 4], in the upper left corner of an empty layer.

    Green shows the texture and nothing of the drawing, with equal contrast on every card so that its motion can be
    measured; red and blue show the drawing and nothing of the texture, light on dark.
    """
    top, left = rng.integers(0, PICTURE_PX - CARD_PX, 2)
    cut = texture[top : top + CARD_PX, left : left + CARD_PX, 1]
    contrast = cut - cut.mean()
    layer = np.zeros((SIDE_PX, SIDE_PX, 4), np.float32)
    layer[:CARD_PX, :CARD_PX, 1] = 0.5 + 0.2 * contrast / max(float(contrast.std()), 0.05)
    for channel in (0, 2):
        layer[:CARD_PX, :CARD_PX, channel] = rng.uniform(0.05, 0.25) * (1 - ink) + rng.uniform(0.7, 0.95) * ink
    layer[:CARD_PX, :CARD_PX, 3] = 1.0
    return np.clip(layer, 0.0, 1.0, out=layer)


def _moved(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The SIDE_PX square at the upper left after moving the image by (x, y), fractions too; edges wrap around."""
    move = np.array([[1, 0, x], [0, 1, y]], np.float32)
    moved: np.ndarray = cv2.warpAffine(
        image, move, (SIDE_PX, SIDE_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    return moved


def binding_clip(split: Split, number: int, seed: int = 0) -> tuple[np.ndarray, BindingTruth]:
    """Frames of one video, uint8 [24, 64, 64, 3] RGB, and how it was made. The same for the same arguments."""
    truth = binding_truth(split, number, seed)
    rng = _rng(seed, split, "pixels", number)
    background, *textures = [picture(seed, split, index) for index in truth.pictures]
    things = (BINDING_THINGS[truth.mover], BINDING_THINGS[truth.other])
    inks = [drawing(seed, split, thing, index) for thing, index in zip(things, truth.drawings, strict=True)]
    cards = [_card(texture, ink, rng) for texture, ink in zip(textures, inks, strict=True)]
    reach = math.ceil(0.4 * NUM_FRAMES)  # the window never leaves the picture
    window = rng.uniform(reach, PICTURE_PX - SIDE_PX - reach, 2)
    starts, steps = (truth.mover_xy, truth.other_xy), (truth.step_px, truth.pan_px)
    frames = np.empty((NUM_FRAMES, SIDE_PX, SIDE_PX, 3), np.uint8)
    for t in range(NUM_FRAMES):
        image: np.ndarray = _moved(background, truth.pan_px[0] * t - window[0], truth.pan_px[1] * t - window[1])
        for card, start, step in zip(cards, starts, steps, strict=True):
            layer = _moved(card, (start[0] + step[0] * t) % SIDE_PX, (start[1] + step[1] * t) % SIDE_PX)
            image = layer[..., :3] + image * (1 - layer[..., 3:])
        image = image + _NOISE * rng.standard_normal(image.shape, dtype=np.float32)
        frames[t] = np.clip(image * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return frames, truth


def make_binding_set(folder: Path, num_videos: int, seed: int = 0) -> None:
    """Write `num_videos` H.264 files (a multiple of the classes) of each split, <folder>/train|val/<class>/N.mp4.

    Split val is `test` of the functions above. The folder is whole or absent; one that is there is left as it is.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    names: dict[Split, str] = {"train": "train", "test": "val"}
    progress = Progress(num_videos * len(names), "making the set", "videos")
    for split, name in names.items():
        for number in range(num_videos):
            frames, truth = binding_clip(split, number, seed)
            path = unfinished / name / binding_classes()[truth.label_id] / f"{number:05d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_video(frames))
            progress.update()
    progress.close()
    unfinished.rename(folder)
