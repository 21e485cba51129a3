"""All views of a video from one reading: every wanted frame decoded and scaled once, then cut several times.

Each view is what `decode_clip` gives for its frames and its cut, flow included, which is estimated on the cut. What is
easy to break: frames that views share are held once, so memory grows with the video's frames and not with the views;
and a long video in windows is read a few windows at a time, so that memory does not grow with its length either.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kinoray.config.scoring import NUM_CROPS, ViewsConfig
from kinoray.config.shared import ClipConfig
from kinoray.errors import UndecodableVideo
from kinoray.video.backend import reach, read_frames
from kinoray.video.clip import Clip, VideoInfo, video_info
from kinoray.video.pyav import PyavVideo
from kinoray.video.sink import ClipSink, Empty, clip_frame_bytes, mirror, new_array
from kinoray.video.transform import View, crop_views
from kinoray.video.windows import cut_windows, window_indices

__all__ = ["ViewClips", "decode_views"]

_WINDOWS_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ViewClips:
    """The views of a video's windows: V temporal ones each, each cut in C places, and mirrored too if `mirrored`.

    Of a video with many windows (kinoray.video.windows) these are some; a short one has one window.
    """

    frames: np.ndarray
    """uint8 [C, U, 3, H, W]: the U distinct frames of all temporal views, in order, in each cut."""
    flow: np.ndarray | None
    """int8 [C, U, 2, H, W] to the next frame of the video; None if it was not asked for, or is left to the device."""
    indices: np.ndarray
    """int64 [W * V, S, T]: the frames' numbers in the video, window by window."""
    windows: np.ndarray
    """int64 [W, 2]: the windows that are here, first frame and the frame after the last."""
    first_window: int
    """Place of the first of them among all windows of the video."""
    num_windows: int
    """All windows of the video."""
    mirrored: bool
    """Whether the cuts are seen mirrored as well, after all others (the x component of their flow is negated)."""
    num_frames: int
    """Frames of the video."""
    frames_decoded: int
    """As in Clip, for all views together."""
    frames_corrupt: int
    """As in Clip, for all views together."""
    info: VideoInfo
    partners: np.ndarray | None = None
    """uint8 [C, U, 1, H, W], as in Clip, where the device finds the flow."""

    def __len__(self) -> int:
        """Number of views."""
        return len(self.indices) * len(self.frames) * (1 + self.mirrored)

    def clips(self) -> Iterator[Clip]:
        """The views one after the other: for each temporal view of each window all cuts, then all cuts mirrored."""
        unique = np.unique(self.indices)
        for indices in self.indices:
            places = np.searchsorted(unique, indices.reshape(-1))
            for flip in range(1 + self.mirrored):
                for cut in range(len(self.frames)):
                    yield self._clip(indices, places, cut, bool(flip))

    def _clip(self, indices: np.ndarray, places: np.ndarray, cut: int, flip: bool) -> Clip:
        frames, flow, partners = (
            None if rows is None else _chosen(rows[cut], places, copy=flip)
            for rows in (self.frames, self.flow, self.partners)
        )
        if flip:
            for rows in (frames, flow, partners):
                if rows is not None:
                    mirror(rows)
            if flow is not None:
                flow[:, 0] *= -1
        frames, flow, partners = (
            None if rows is None else rows.reshape(*indices.shape, *rows.shape[1:]) for rows in (frames, flow, partners)
        )
        assert frames is not None
        return Clip(
            frames=frames,
            flow=flow,
            indices=indices,
            num_frames=self.num_frames,
            frames_decoded=self.frames_decoded,
            frames_corrupt=self.frames_corrupt,
            info=self.info,
            partners=partners,
        )


def _chosen(rows: np.ndarray, places: np.ndarray, *, copy: bool) -> np.ndarray:
    """rows[places], without a copy where they are all the rows in order and none is asked for."""
    if not copy and len(places) == len(rows):
        return rows  # places never fall and reach every row
    chosen: np.ndarray = rows[places]
    return chosen


class _CutsSink:
    """Hands each scaled frame to one sink for each cut."""

    def __init__(
        self, unique: np.ndarray, num_frames: int, config: ClipConfig, views: ViewsConfig, empty: Empty
    ) -> None:
        self._config, self._views, self._empty = config, views, empty
        self.mirrored = views.crops == "ten"
        self._num_cuts = NUM_CROPS[views.crops] // (1 + self.mirrored)
        self._arrays: dict[str, np.ndarray] = {}
        self._sinks = [
            ClipSink(unique, num_frames, config, None, lambda *array, cut=cut: self._part(cut, *array))
            for cut in range(self._num_cuts)
        ]
        self._cuts: list[View] = []

    def _part(self, cut: int, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """A cut's part of the array of that name, which is made for all cuts at once: space is asked for once."""
        if name not in self._arrays:
            self._arrays[name] = self._empty(name, (self._num_cuts, *shape), dtype)
        part: np.ndarray = self._arrays[name][cut]
        return part

    def wanted(self, *, with_flow: bool) -> np.ndarray:
        """Numbers of the frames to decode, sorted, each once."""
        return self._sinks[0].wanted(with_flow=with_flow)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        if not self._cuts:
            self._cuts = crop_views(self._config.view, width, height, self._views.crops)[: self._num_cuts]
            for sink, cut in zip(self._sinks, self._cuts, strict=True):
                sink.begin(cut)
        return self._sinks[0].scaled_size(width, height)

    def put(self, index: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        for sink in self._sinks:
            sink.put(index, planes)

    def finish(self, *, with_flow: bool) -> dict[str, np.ndarray]:
        """`frames`, and `flow` or `partners` if asked for, of all cuts."""
        for sink in self._sinks:
            sink.finish()
            if with_flow:
                sink.motion()
        return self._arrays


def decode_views(
    data: bytes,
    config: ClipConfig,
    views: ViewsConfig,
    *,
    with_flow: bool,
    first_window: int = 0,
    empty: Empty = new_array,
) -> ViewClips:
    """Decode the frames that any view of a video needs, in one reading.

    Args:
        first_window: where to go on in a video of many windows: as many as fit into 256 MiB are decoded at a time.
        empty: as for `decode_clip`.

    Raises:
        MediaError: one of its subclasses; any bytes give views or that. UndecodableVideo if there is no such window.
    """
    sample = config.sample
    share = reach(replace(sample, num_segments=sample.num_segments * views.temporal))
    with PyavVideo(data, config.decode, share if views.windows is None else 0.0) as video:
        while True:
            num_frames = video.num_frames
            every = cut_windows(num_frames, num_frames / video.duration_s if video.duration_s > 0 else 0, views.windows)
            if first_window >= len(every):
                raise UndecodableVideo(
                    f"window {first_window} is gone: {num_frames} frames, fewer than before, make {len(every)} windows"
                )
            at_once = _windows_at_once(config, views, with_flow=with_flow)
            windows = every[first_window : first_window + at_once]
            indices = window_indices(windows, sample, views.temporal)
            sink = _CutsSink(np.unique(indices), num_frames, config, views, empty)
            reading = read_frames(data, video, sink.wanted(with_flow=with_flow), sink, config.decode)
            if video.num_frames == num_frames:
                break
        arrays = sink.finish(with_flow=with_flow)
        return ViewClips(
            frames=arrays["frames"],
            flow=arrays.get("flow"),
            indices=indices,
            windows=windows,
            first_window=first_window,
            num_windows=len(every),
            mirrored=sink.mirrored,
            num_frames=num_frames,
            frames_decoded=reading.frames_decoded,
            frames_corrupt=reading.frames_corrupt,
            info=video_info(video),
            partners=arrays.get("partners"),
        )


def _windows_at_once(config: ClipConfig, views: ViewsConfig, *, with_flow: bool) -> int:
    """How many windows' frames, all cuts and flow included, fit into _WINDOWS_BYTES; at least one."""
    sample = config.sample
    num_frames = sample.num_segments * sample.frames_per_segment * views.temporal
    num_frames *= NUM_CROPS[views.crops]
    return max(1, _WINDOWS_BYTES // (num_frames * clip_frame_bytes(config, with_flow=with_flow)))
