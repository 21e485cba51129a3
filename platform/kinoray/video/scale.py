"""One decoded frame -> its planes at another size: RGB, or YUV 4:2:0 in one standard, with one scaling.

libswscale keeps the scaler of the last size and pixels; used for two in turn it would make it anew for each frame.
"""

from typing import Any, Literal

import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from kinoray.errors import UndecodableVideo
from kinoray.video.colour import LEFT_SITED, chroma_to_centre, to_bt601
from kinoray.video.media import media_stage

__all__ = ["FrameScaler"]

# Without ACCURATE_RND, 4:2:0 frames that already have the target size take a short cut to RGB: black columns at the
# right of some widths (340), and blocky colours. At any other size it changes no bit and costs nothing.
_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]


class FrameScaler:
    """Scales the frames of one video, bilinear."""

    def __init__(self, frames: Literal["rgb", "yuv420"], codec: str) -> None:
        self._frames, self._codec = frames, codec
        self._reformatter = VideoReformatter()

    def planes(self, frame: Any, height: int, width: int) -> Planes:
        """Red, green and blue, uint8 [height, width]; or Y and, of half the height and width (even), U and V.

        The frame is not turned.

        Raises:
            UndecodableVideo: libswscale does not know the frame's pixels.
        """
        if self._frames == "yuv420":
            return self._yuv420(frame, height, width)
        green, blue, red = self._scaled(frame, height, width, "gbrp")
        return red, green, blue

    def _yuv420(self, frame: Any, height: int, width: int) -> Planes:
        kind = frame.format
        is_yuv = len(kind.components) >= 3 and not kind.is_rgb and not kind.has_palette
        if is_yuv:  # scaled in its own colours
            is_full = frame.color_range == ColorRange.JPEG or kind.name.startswith("yuvj")
            levels = ColorRange.JPEG if is_full else ColorRange.MPEG
            y, u, v = self._scaled(frame, height, width, "yuv420p", src_color_range=levels, dst_color_range=levels)
        else:
            is_full = False
            colours = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
            y, u, v = self._scaled(frame, height, width, "yuv420p", **colours)
        if self._codec in LEFT_SITED:
            u, v = chroma_to_centre(u), chroma_to_centre(v)
        return to_bt601((y, u, v), int(frame.colorspace) if is_yuv else Colorspace.ITU601, full_range=is_full)

    def _scaled(self, frame: Any, height: int, width: int, pixels: str, **colours: int) -> Planes:
        """The planes in libav's order."""
        what = "RGB" if pixels == "gbrp" else "YUV 4:2:0"
        with media_stage(UndecodableVideo, f"a {frame.width} x {frame.height} {frame.format.name} frame to {what}"):
            scaled = self._reformatter.reformat(
                frame,
                width=width,
                height=height,
                format=pixels,
                interpolation=_TO_RGB if pixels == "gbrp" else Interpolation.BILINEAR,
                threads=1,
                **colours,
            )
        first, second, third = (_pixels(plane) for plane in scaled.planes)
        return first, second, third


def _pixels(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
