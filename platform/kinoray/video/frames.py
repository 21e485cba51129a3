"""Bytes of a video in, the frames that are wanted out: the one way from a file to what a network is fed.

A request (request.py) says which frames. Whatever is asked for, every wanted frame is decoded and scaled once and held
once, then cut in one place or several; so memory grows with the video's frames and not with its views, and not with its
length either, since long videos in windows are read a few windows at a time.

What is easy to break: frame numbers and their count come from the packets that are really there, never from what the
header claims; where fewer frames come out than the packets promise, frames are chosen again from those that there are.
Nothing that libav can raise gets past here, and nothing here imports torch or ray: decode workers stay small.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinoray.config.shared import ClipConfig, DecodeConfig
from kinoray.video.info import VideoInfo, check_counts
from kinoray.video.pyav import PyavVideo
from kinoray.video.readers import read_frames
from kinoray.video.request import Rate, Request, Thumbnails
from kinoray.video.transform import Empty, FrameArrays, mirror, new_array

__all__ = ["Clip", "Frames", "check_answer", "decode", "probe"]

_RATES_AGREE = 0.01  # of a rate: more is a container that is wrong, or a video whose rate changes
_SHAPES = {
    "frames": ("uint8", "C U 3 H W"),
    "flow": ("int8", "C U 2 H W"),
    "partners": ("uint8", "C U 1 H W"),
    "windows": ("int64", "N 2"),
    "window_times": ("float64", "N 2"),
}


@dataclass(frozen=True, slots=True)
class Clip:
    """The part of a video that a model is fed, S segments x T frames, and how it came to be."""

    frames: np.ndarray
    """uint8 [S, T, 3, H, W], RGB, H = W = view.crop_px."""
    flow: np.ndarray | None
    """int8 [S, T, 2, H, W], (x, y) to the next frame, 127 = flow.bound_px; None without flow, or if it is left to the
    device."""
    indices: np.ndarray
    """int64 [S, T]: the frames' numbers in the video."""
    num_frames: int
    """Frames of the video."""
    frames_decoded: int
    """Frames that the decoder had to give, wanted or not, for all that was asked for with this clip."""
    frames_corrupt: int
    """Distinct frames refused or flagged as damaged by the decoder, replaced, or before the first key frame."""
    info: VideoInfo
    partners: np.ndarray | None = None
    """With a flow.estimator on the device: uint8 [S, T, 1, H, W], green of the frame after each frame; of the frame
    before it where there is none after. network/batch.py makes the flow of them."""

    @property
    def last(self) -> np.ndarray:
        """bool [S, T]: the video's last frame, whose flow leads from its partner to it."""
        return np.asarray(self.indices == self.num_frames - 1)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Frames:
    """The frames of a video that a request wants, and which of them each clip takes.

    Raises (when made):
        ValueError: an array is not of the shape that the others say, or a count is none.
    """

    frames: np.ndarray
    """uint8 [C, U, 3, H, W], RGB: the U distinct frames, in order, in each of C cuts."""
    flow: np.ndarray | None
    """int8 [C, U, 2, H, W] to the next frame of the video; None without flow, or if it is left to the device."""
    partners: np.ndarray | None
    """uint8 [C, U, 1, H, W], as in Clip, where the device finds the flow."""
    indices: tuple[np.ndarray, ...]
    """For each sampling (there is one, but for Sampled.samples): int64 [V, S, T], the numbers in the video of the
    frames of each clip; of the temporal views window by window."""
    windows: np.ndarray
    """int64 [N, 2]: the windows that are here, first frame and the frame after the last. A short video is one."""
    window_times: np.ndarray
    """float64 [N, 2]: when they begin and end, in seconds from the video's beginning."""
    first_window: int
    """Place of the first of them among all windows of the video."""
    num_windows: int
    """All windows of the video."""
    mirrored: bool
    """Whether the cuts are seen mirrored as well, after all others (the x component of their flow is negated)."""
    exact: bool
    """Whether any other request would see the same frames: none was missing or damaged."""
    num_frames: int
    """Frames of the video."""
    frames_decoded: int
    """As in Clip."""
    frames_corrupt: int
    """As in Clip."""
    info: VideoInfo

    def __post_init__(self) -> None:
        check_counts(self, "num_frames", "first_window", "num_windows", "frames_decoded", "frames_corrupt")
        sizes: dict[str, int] = {}
        for name, (dtype, letters) in _SHAPES.items():
            array = getattr(self, name)
            if array is not None:
                _check_array(name, array, dtype, letters, sizes)
        for indices in self.indices:
            _check_array("indices", indices, "int64", "V S T", {})
        wanted = self._wanted()
        if len(wanted) != sizes["U"] or not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise ValueError(
                f"indices name {len(wanted)} distinct frames in {wanted[0]} .. {wanted[-1]}, expected the "
                f"{sizes['U']} of `frames`, in 0 .. {self.num_frames - 1}"
            )
        if not (self.windows >= 0).all() or not (self.windows <= self.num_frames).all():
            raise ValueError(f"windows {self.windows.tolist()!s:.80} of a video of {self.num_frames} frames")
        begins, ends = self.window_times.T
        if not (np.isfinite(ends) & (begins >= 0) & (begins <= ends)).all():
            raise ValueError(f"windows at {self.window_times.tolist()!s:.80} s")
        if not 0 <= self.first_window < self.first_window + len(self.windows) <= self.num_windows:
            raise ValueError(
                f"{len(self.windows)} windows from window {self.first_window} on, expected at least one, of "
                f"{self.num_windows}"
            )

    def __repr__(self) -> str:
        cuts, count, _, height, width = self.frames.shape
        flow = "flow" if self.flow is not None else "partners" if self.partners is not None else "no flow"
        return (
            f"Frames({count} of {self.num_frames} frames, {cuts} x {height} x {width} px, {flow}, {len(self)} clips, "
            f"{self.frames_corrupt} corrupt)"
        )

    def __len__(self) -> int:
        """Number of clips of the first sampling."""
        return len(self.indices[0]) * len(self.frames) * (1 + self.mirrored)

    def _wanted(self) -> np.ndarray:
        """Numbers of the U frames."""
        return _distinct(self.indices)

    def places(self) -> list[np.ndarray]:
        """For each sampling: int64 [V * S * T], which of the U frames its clips take."""
        wanted = self._wanted()
        return [np.searchsorted(wanted, indices.reshape(-1)) for indices in self.indices]

    def clips(self, sampling: int = 0) -> Iterator[Clip]:
        """The clips one after the other: for each temporal view of each window all cuts, then all cuts mirrored."""
        wanted = self._wanted()
        for indices in self.indices[sampling]:
            places = np.searchsorted(wanted, indices.reshape(-1))
            for flip in range(1 + self.mirrored):
                for cut in range(len(self.frames)):
                    yield self._clip(indices, places, cut, bool(flip))

    def clip(self, sampling: int = 0) -> Clip:
        """The first clip; the only one of a sampling, unless views were asked for."""
        return next(self.clips(sampling))

    def pictures(self) -> list[np.ndarray]:
        """For people: the frames of the first clip in order, uint8 [H, W, 3] each."""
        return [np.moveaxis(self.frames[0, place], 0, -1) for place in self.places()[0]]

    def _clip(self, indices: np.ndarray, places: np.ndarray, cut: int, flip: bool) -> Clip:
        in_order = np.array_equal(places, np.arange(self.frames.shape[1]))  # not of a dense clip that begins again

        def chosen(rows: np.ndarray | None) -> np.ndarray | None:
            if rows is None:
                return None
            if not flip and in_order:
                return np.asarray(rows[cut])
            return np.asarray(rows[cut][places])

        def shaped(rows: np.ndarray | None) -> np.ndarray | None:
            return None if rows is None else rows.reshape(*indices.shape, *rows.shape[1:])

        frames, flow, partners = chosen(self.frames), chosen(self.flow), chosen(self.partners)
        assert frames is not None
        if flip:
            mirror(frames, flow, partners)
        return Clip(
            frames=frames.reshape(*indices.shape, *frames.shape[1:]),
            flow=shaped(flow),
            indices=indices,
            num_frames=self.num_frames,
            frames_decoded=self.frames_decoded,
            frames_corrupt=self.frames_corrupt,
            info=self.info,
            partners=shaped(partners),
        )


def _check_array(name: str, array: np.ndarray, dtype: str, letters: str, sizes: dict[str, int]) -> None:
    """A letter that is new takes the array's size; one that is known, and a number, must be it."""
    expected = letters.split()
    if array.ndim == len(expected):
        for letter, size in zip(expected, array.shape, strict=True):
            sizes.setdefault(letter, int(letter) if letter.isdigit() else max(1, size))
    if array.dtype != dtype or list(array.shape) != [sizes.get(letter) for letter in expected]:
        known = ", ".join(str(sizes.get(letter, letter)) for letter in expected)
        raise ValueError(
            f"{name}: expected {dtype} [{known}] ({', '.join(expected)}), found {array.dtype} {list(array.shape)}"
        )


def _distinct(indices: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([numbers.reshape(-1) for numbers in indices]))


def decode(data: bytes, request: Request, clip: ClipConfig, *, empty: Empty = new_array) -> Frames:
    """Decode what a request wants of a video, in one reading: scaled, cut and, if clip.flow says so, with optical flow.

    Flow is estimated on the cut frames (green plane) before they are mirrored; mirroring negates its x component.

    Args:
        empty: makes the arrays, given "frames", "flow" or "partners", a shape and a dtype, with anything in
            them; it may be asked for the same one again, and then the earlier one is not used any more.

    Raises:
        MediaError: one of its subclasses; any bytes give frames or that. UndecodableVideo if there is no such window.
        ConfigError: the back end is not installed.
    """
    clip = request.settings(clip)
    with PyavVideo(data, clip.decode, request.reach(clip)) as video:
        promised = video.num_frames
        while True:
            num_frames = video.num_frames
            chosen = request.choose(num_frames, _rate(video), clip)
            sink = FrameArrays(
                _distinct(chosen.indices),
                num_frames,
                clip,
                lambda width, height: request.cuts(clip, width, height),
                empty,
            )
            reading = read_frames(data, video, sink.numbers(), sink, clip.decode)
            if video.num_frames == num_frames:
                break
        arrays = sink.finish()
        return Frames(
            frames=arrays["frames"],
            flow=arrays.get("flow"),
            partners=arrays.get("partners"),
            indices=chosen.indices,
            windows=chosen.windows,
            window_times=chosen.window_times,
            first_window=request.first_window,
            num_windows=chosen.num_windows,
            mirrored=request.mirrored,
            exact=num_frames == promised and reading.frames_corrupt == 0,
            num_frames=num_frames,
            frames_decoded=reading.frames_decoded,
            frames_corrupt=reading.frames_corrupt,
            info=video.info,
        )


def _rate(video: PyavVideo) -> Rate:
    measured = video.num_frames / video.duration_s if video.duration_s > 0 else 0.0
    claimed = float(video.frame_rate)
    return Rate(
        measured=measured,
        claimed=claimed if abs(claimed - measured) <= _RATES_AGREE * measured else measured,
        times=video.frame_times,
    )


def check_answer(frames: Frames, request: Request, clip: ClipConfig) -> None:
    """Whether frames from elsewhere can be what was asked for, as far as that can be told without the file.

    Raises:
        ValueError: they cannot, with what was expected and what was found.
    """
    clip = request.settings(clip)
    size = (request.height,) if isinstance(request, Thumbnails) else (clip.view.crop_px, clip.view.crop_px)
    shapes = [(number * len(frames.windows), *grid) for number, *grid in request.shapes(clip)]
    pairs: dict[str, tuple[Any, Any]] = {
        "number of cuts": (request.num_cuts(), len(frames.frames)),
        "size": (size, frames.frames.shape[3 : 3 + len(size)]),
        "indices": (shapes, [indices.shape for indices in frames.indices]),
        "flow": (clip.flow.estimator == "dis", frames.flow is not None),
        "partners": (clip.flow_on_device, frames.partners is not None),
        "first window": (request.first_window, frames.first_window),
        "mirrored": (request.mirrored, frames.mirrored),
    }
    for name, (expected, found) in pairs.items():
        if expected != found:
            raise ValueError(f"{name}: expected {expected}, found {found}")


def probe(data: bytes, config: DecodeConfig) -> VideoInfo:
    """Read a video's packets and decode its first frame.

    Raises:
        MediaError: one of its subclasses, with the reason; MediaOverBudget for what decode.max_* does not allow.
    """
    with PyavVideo(data, config) as video:
        return video.info
