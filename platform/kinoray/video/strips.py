"""Contact strips: a few small frames of each video as JPEG data URIs, for the report.

A video that cannot be read or decoded any more becomes a strip without frames that says why; it never ends the report.
"""

import base64
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from kinoray.catalog.table import Reference, read_videos
from kinoray.config.shared import ClipConfig, DecodeConfig
from kinoray.errors import KinorayError, MediaError
from kinoray.storage.objects import Storage
from kinoray.video.info import VideoInfo
from kinoray.video.request import Thumbnails
from kinoray.video.sandbox.pool import Sandbox

__all__ = ["FRAME_HEIGHT_PX", "MAX_FRAME_BYTES", "Strip", "Thumbnail", "contact_strips", "jpeg_uri"]

FRAME_HEIGHT_PX = 96
"""Height of a frame in a strip, in pixels: more than a card shows, so that it is sharp on dense screens."""
MAX_FRAME_BYTES = 5 * 1024
"""Aimed size of one JPEG; its quality goes down until it fits, so that 500 videos x 4 frames stay below 15 MB."""

_MAX_FRAME_WIDTH_PX = 2 * FRAME_HEIGHT_PX
_QUALITIES = (80, 65, 50, 35, 20)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One frame, ready for an `img` element: its data URI, and its width and height in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Strip:
    """The frames of one video, in time order; none of them with the reason why."""

    frames: tuple[Thumbnail, ...]
    reason: str = ""
    info: VideoInfo | None = None
    """What the video is; None without frames."""


def contact_strips(
    storage: Storage, references: Sequence[Reference], num_frames: int, decode: DecodeConfig
) -> Iterator[Strip]:
    """One strip of num_frames evenly spaced frames for each reference, in order.

    Reading runs ahead in threads (`read_videos`), decoding in as many processes as there are cores; at most two videos
    a process are held in memory.

    Raises:
        DecoderStartFailed: no decoder process can be started here.
    """
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[Strip]] = deque()
    with Sandbox(workers) as sandbox, ThreadPoolExecutor(workers, thread_name_prefix="strips") as pool:
        for answer in read_videos(storage, references, max_bytes=decode.max_bytes):
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_strip, sandbox, answer, num_frames, decode))
        while waiting:
            yield waiting.popleft().result()


def _strip(sandbox: Sandbox, answer: bytes | KinorayError, num_frames: int, decode: DecodeConfig) -> Strip:
    if isinstance(answer, KinorayError):
        return Strip((), _reason(answer))
    try:
        wanted = Thumbnails(num_frames=num_frames, height=FRAME_HEIGHT_PX)
        frames = sandbox.decode(answer, wanted, ClipConfig(decode=decode))
        return Strip(tuple(jpeg_uri(picture) for picture in frames.pictures()), info=frames.info)
    except MediaError as error:
        return Strip((), _reason(error))


def _reason(error: KinorayError) -> str:
    return f"{type(error).__name__}: {error}"


def jpeg_uri(frame: np.ndarray) -> Thumbnail:
    """uint8 RGB [h, w, 3] as a small JPEG in a data URI. Very wide frames lose their sides."""
    height, width = frame.shape[:2]
    if width > _MAX_FRAME_WIDTH_PX:
        left = (width - _MAX_FRAME_WIDTH_PX) // 2
        frame = frame[:, left : left + _MAX_FRAME_WIDTH_PX]
    bgr = np.ascontiguousarray(frame[..., ::-1])
    for quality in _QUALITIES:
        _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1])
        if jpeg.nbytes <= MAX_FRAME_BYTES:
            break
    encoded = base64.b64encode(jpeg.tobytes()).decode("ascii")
    return Thumbnail(f"data:image/jpeg;base64,{encoded}", frame.shape[1], height)
