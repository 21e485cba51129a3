"""Bytes of a video in, the sampled and cropped frames of one clip out; nothing that libav can raise gets past here.

Frame numbers and their count come from the packets that are really there, never from what the header claims. Nothing
here imports torch or ray: decode workers stay small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kinoray.config import ClipConfig, DecodeConfig, SampleConfig
from kinoray.decode_decord import read_with_decord
from kinoray.decode_plan import FrameSink, Reading
from kinoray.decode_pyav import PyavVideo
from kinoray.decode_torchcodec import read_with_torchcodec
from kinoray.flow import dis_flow, quantise
from kinoray.sample import segment_indices
from kinoray.transform import View, test_view, train_view

__all__ = ["Clip", "VideoInfo", "decode_clip", "probe", "thumbnails"]


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is, as displayed: rotation is already applied to width and height."""

    duration_s: float
    fps: float
    """Mean frames per second."""
    num_frames: int
    """Counted from the packets that are there."""
    width: int
    height: int
    codec: str
    rotation: int
    """Degrees counterclockwise from the stored to the displayed picture: 0, 90, 180 or 270."""
    claimed_frames: int | None = None
    """Frames that the file's header promises; None where it makes no promise (MPEG-TS and others).

    More than num_frames: the file was cut. Less: something was added, or its index is damaged.
    """
    num_keyframes: int = 0
    """Frames from which decoding can begin, by the packets."""
    container: str = ""
    """The kind of file, as libav calls it: `mov/mp4`, `matroska/webm`, `mpegts`, ..."""

    @property
    def miscounted(self) -> bool:
        """Whether the header promises another number of frames: off by more than one and more than 2 percent."""
        claimed = self.num_frames if self.claimed_frames is None else self.claimed_frames
        return abs(claimed - self.num_frames) > max(1.0, 0.02 * self.num_frames)

    @property
    def frames_missing(self) -> int:
        """How many frames fewer there are than the header promises; 0 unless `miscounted`."""
        return max(0, (self.claimed_frames or 0) - self.num_frames) if self.miscounted else 0


@dataclass(frozen=True, slots=True)
class Clip:
    """The part of a video that a model is fed, S segments x T frames, and how it came to be."""

    frames: np.ndarray
    """uint8 [S, T, 3, H, W], RGB, H = W = view.crop_px."""
    flow: np.ndarray | None
    """int8 [S, T, 2, H, W], (x, y) to the next frame, 127 = flow.bound_px; None if it was not asked for."""
    indices: np.ndarray
    """int64 [S, T]: the frames' numbers in the video."""
    num_frames: int
    """Frames of the video."""
    frames_decoded: int
    """Frames that the decoder had to give, wanted or not."""
    frames_corrupt: int
    """Distinct frames refused or flagged as damaged by the decoder, replaced, or before the first key frame."""
    info: VideoInfo


Empty = Callable[[str, tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes an array by name, shape and dtype, with anything in it."""


def _new_array(_: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    return np.empty(shape, dtype)


def _info(video: PyavVideo) -> VideoInfo:
    width, height = video.size
    duration_s, num_frames = video.duration_s, video.num_frames
    return VideoInfo(
        duration_s=duration_s,
        fps=num_frames / duration_s if duration_s > 0 else 0.0,
        num_frames=num_frames,
        width=width,
        height=height,
        codec=video.codec,
        rotation=video.rotation,
        claimed_frames=video.claimed_frames,
        num_keyframes=video.table.num_keyframes,
        container=video.container,
    )


def probe(data: bytes, config: DecodeConfig) -> VideoInfo:
    """Read a video's packets and decode its first frame.

    Raises:
        MediaError: one of its subclasses, with the reason; MediaOverBudget for what decode.max_* does not allow.
    """
    with PyavVideo(data, config) as video:
        return _info(video)


def _reach(sample: SampleConfig) -> float:
    """Share of the frames before the last slot: its frame is wanted, whichever it is."""
    return 1 - 1 / (sample.num_segments * sample.frames_per_segment)


def _read(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink, config: DecodeConfig) -> Reading:
    if config.backend == "decord":
        return read_with_decord(data, video, wanted, sink)
    if config.backend == "torchcodec":
        return read_with_torchcodec(data, video, wanted, sink)
    return video.read(wanted, sink)


class _ClipSink:
    """Cuts scaled frames and keeps them where they belong: sampled ones in RGB, their successors in green only."""

    def __init__(
        self, indices: np.ndarray, num_frames: int, config: ClipConfig, rng: np.random.Generator | None, empty: Empty
    ) -> None:
        self._indices = indices.reshape(-1)
        self._config, self._rng, self._empty = config, rng, empty
        size = config.view.crop_px
        self.frames = empty("frames", (len(self._indices), 3, size, size), np.uint8)
        self._filled: set[int] = set()
        self.view: View | None = None
        unique, first = np.unique(self._indices, return_index=True)
        self._slot = dict(zip(unique.tolist(), first.tolist(), strict=True))
        # Flow looks from t to t + 1; from t - 1 to t at the video's last frame.
        self._partner = {t: t + 1 if t + 1 < num_frames else max(0, t - 1) for t in self._slot}
        self._green: dict[int, np.ndarray] = {}

    def wanted(self, *, with_flow: bool) -> np.ndarray:
        """Numbers of the frames to decode, sorted, each once."""
        frames = {*self._slot, *self._partner.values()} if with_flow else set(self._slot)
        return np.array(sorted(frames), np.int64)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        if self.view is None:
            view = self._config.view
            self.view = (
                test_view(view, width, height) if self._rng is None else train_view(view, width, height, self._rng)
            )
        return self.view.height, self.view.width

    def put(self, index: int, rgb: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        assert self.view is not None
        rows = slice(self.view.top, self.view.top + self.view.size)
        columns = slice(self.view.left, self.view.left + self.view.size)
        slot = self._slot.get(index)
        if slot is None:
            self._green[index] = rgb[1][rows, columns].copy()
            return
        for channel, plane in enumerate(rgb):
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

    def flow(self) -> np.ndarray:
        """int8 [S * T, 2, H, W], before any mirror."""
        size, flow_config = self._config.view.crop_px, self._config.flow
        out = self._empty("flow", (len(self._indices), 2, size, size), np.int8)
        for index, slot in self._slot.items():
            partner = self._partner[index]
            if partner == index:
                out[slot] = 0
            else:
                pair = (self._green_of(min(index, partner)), self._green_of(max(index, partner)))
                out[slot] = quantise(dis_flow(*pair, flow_config.preset), flow_config.bound_px)
        self._share(out)
        return out

    def _green_of(self, index: int) -> np.ndarray:
        slot = self._slot.get(index)
        return self._green[index] if slot is None else self.frames[slot, 1]


def _mirror(rows: np.ndarray) -> None:
    """Left becomes right, in place: the arrays may be where the caller wants them."""
    for row in rows:
        row[...] = row[..., ::-1].copy()


def decode_clip(
    data: bytes,
    config: ClipConfig,
    *,
    with_flow: bool,
    rng: np.random.Generator | None = None,
    empty: Empty = _new_array,
) -> Clip:
    """Decode the sampled frames of a video, scaled, cropped and, if asked for, with optical flow.

    Without rng: middle frames and the centre crop (testing). With rng: random frames, scale, place and flip.
    Flow is estimated on the cropped frames (green plane) before the mirror; mirroring negates its x component.

    Args:
        empty: makes the arrays for frames and flow, given "frames" or "flow", a shape and a dtype, with anything in
            them; it may be asked for the same one again, and then the earlier one is not used any more.

    Raises:
        MediaError: one of its subclasses; any bytes give a clip or that.
    """
    with PyavVideo(data, config.decode, _reach(config.sample)) as video:
        while True:
            num_frames = video.num_frames
            indices = segment_indices(num_frames, config.sample, rng)
            sink = _ClipSink(indices, num_frames, config, rng, empty)
            reading = _read(data, video, sink.wanted(with_flow=with_flow), sink, config.decode)
            if video.num_frames == num_frames:
                break
        sink.finish()
        flow = sink.flow() if with_flow else None
        frames = sink.frames
        if sink.view is not None and sink.view.flip:
            _mirror(frames)
            if flow is not None:
                _mirror(flow)
                flow[:, 0] *= -1
        shape = indices.shape
        return Clip(
            frames=frames.reshape(*shape, *frames.shape[1:]),
            flow=None if flow is None else flow.reshape(*shape, *flow.shape[1:]),
            indices=indices,
            num_frames=num_frames,
            frames_decoded=reading.frames_decoded,
            frames_corrupt=reading.frames_corrupt,
            info=_info(video),
        )


class _ThumbnailSink:
    """Keeps whole frames at a given height."""

    def __init__(self, height: int) -> None:
        self._height = height
        self.images: dict[int, np.ndarray] = {}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        return self._height, max(1, round(width * self._height / height))

    def put(self, index: int, rgb: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self.images[index] = np.stack(rgb, axis=-1)


def thumbnails(data: bytes, config: DecodeConfig, num_frames: int, height: int) -> list[np.ndarray]:
    """`num_frames` evenly spaced frames, `height` pixels tall, aspect kept: RGB, uint8 [h, w, 3] each.

    Raises:
        MediaError: as for `decode_clip`.
    """
    sample = SampleConfig(num_segments=num_frames, frames_per_segment=1)
    with PyavVideo(data, config, _reach(sample)) as video:
        while True:
            total = video.num_frames
            indices = segment_indices(total, sample).reshape(-1)
            sink = _ThumbnailSink(height)
            _read(data, video, np.unique(indices), sink, config)
            if video.num_frames == total:
                return [sink.images[index] for index in indices.tolist()]
