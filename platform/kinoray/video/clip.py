"""Bytes of a video in, the sampled and cropped frames of one clip out; nothing that libav can raise gets past here.

Frame numbers and their count come from the packets that are really there, never from what the header claims. Nothing
here imports torch or ray: decode workers stay small.
"""

from dataclasses import dataclass

import numpy as np

from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig
from kinoray.video.backend import reach, read_frames
from kinoray.video.pyav import PyavVideo
from kinoray.video.sample import segment_indices
from kinoray.video.sink import ClipSink, Empty, new_array

__all__ = ["Clip", "VideoInfo", "decode_clip", "probe", "thumbnails", "video_info"]


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
    """int8 [S, T, 2, H, W], (x, y) to the next frame, 127 = flow.bound_px; None if it was not asked for, or is left to
    the device."""
    indices: np.ndarray
    """int64 [S, T]: the frames' numbers in the video."""
    num_frames: int
    """Frames of the video."""
    frames_decoded: int
    """Frames that the decoder had to give, wanted or not."""
    frames_corrupt: int
    """Distinct frames refused or flagged as damaged by the decoder, replaced, or before the first key frame."""
    info: VideoInfo
    partners: np.ndarray | None = None
    """With a flow.estimator on the device, if flow was asked for: uint8 [S, T, 1, H, W], green of the frame after each
    frame; of the frame before it where there is none after."""

    @property
    def last(self) -> np.ndarray:
        """bool [S, T]: the video's last frame, whose flow leads from its partner to it."""
        return np.asarray(self.indices == self.num_frames - 1)


def video_info(video: PyavVideo) -> VideoInfo:
    """What an opened video is.

    Raises:
        UndecodableVideo: no frame can be decoded.
    """
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
        return video_info(video)


def decode_clip(
    data: bytes,
    config: ClipConfig,
    *,
    with_flow: bool,
    rng: np.random.Generator | None = None,
    empty: Empty = new_array,
) -> Clip:
    """Decode the sampled frames of a video, scaled, cropped and, if asked for, with optical flow.

    Without rng: middle frames and the centre crop (testing). With rng: random frames, scale, place and flip.
    Flow is estimated on the cropped frames (green plane) before the mirror; mirroring negates its x component. With
    another flow.estimator than dis frames come with partners instead, of which network/batch.py makes the flow.

    Args:
        empty: makes the arrays, given "frames", "flow" or "partners", a shape and a dtype, with anything in
            them; it may be asked for the same one again, and then the earlier one is not used any more.

    Raises:
        MediaError: one of its subclasses; any bytes give a clip or that.
    """
    with PyavVideo(data, config.decode, reach(config.sample)) as video:
        while True:
            num_frames = video.num_frames
            indices = segment_indices(num_frames, config.sample, rng)
            sink = ClipSink(indices, num_frames, config, rng, empty)
            reading = read_frames(data, video, sink.wanted(with_flow=with_flow), sink, config.decode)
            if video.num_frames == num_frames:
                break
        sink.finish()
        flow, partners = sink.motion() if with_flow else (None, None)
        sink.mirrored(flow, partners)
        shape = indices.shape
        frames, flow, partners = (
            None if rows is None else rows.reshape(*shape, *rows.shape[1:]) for rows in (sink.frames, flow, partners)
        )
        assert frames is not None
        return Clip(
            frames=frames,
            flow=flow,
            indices=indices,
            num_frames=num_frames,
            frames_decoded=reading.frames_decoded,
            frames_corrupt=reading.frames_corrupt,
            info=video_info(video),
            partners=partners,
        )


class _ThumbnailSink:
    """Keeps whole frames at a given height."""

    def __init__(self, height: int) -> None:
        self._height = height
        self.images: dict[int, np.ndarray] = {}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        return self._height, max(1, round(width * self._height / height))

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self.images[index] = np.stack(planes, axis=-1)


def thumbnails(data: bytes, config: DecodeConfig, num_frames: int, height: int) -> list[np.ndarray]:
    """`num_frames` evenly spaced frames, `height` pixels tall, aspect kept: RGB, uint8 [h, w, 3] each.

    Raises:
        MediaError: as for `decode_clip`.
    """
    sample = SampleConfig(num_segments=num_frames, frames_per_segment=1)
    with PyavVideo(data, config, reach(sample)) as video:
        while True:
            total = video.num_frames
            indices = segment_indices(total, sample).reshape(-1)
            sink = _ThumbnailSink(height)
            read_frames(data, video, np.unique(indices), sink, config)
            if video.num_frames == total:
                return [sink.images[index] for index in indices.tolist()]
