"""One decoded frame -> its red, green and blue planes at another size, with one scaling.

libswscale keeps the scaler of the last size and pixels; used for two in turn it would make it anew for each frame.
"""

from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kinoray.errors import UndecodableVideo
from kinoray.video.media import media_stage

__all__ = ["FrameScaler"]

# Without ACCURATE_RND, 4:2:0 frames that already have the target size take a short cut to RGB: black columns at the
# right of some widths (340), and blocky colours. At any other size it changes no bit and costs nothing.
_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND


class FrameScaler:
    """Scales the frames of one video, bilinear."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def planes(self, frame: Any, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Red, green and blue, uint8 [height, width]; the frame is not turned.

        Raises:
            UndecodableVideo: libswscale does not know the frame's pixels.
        """
        with media_stage(UndecodableVideo, f"a {frame.width} x {frame.height} {frame.format.name} frame to RGB"):
            scaled = self._reformatter.reformat(
                frame, width=width, height=height, format="gbrp", interpolation=_TO_RGB, threads=1
            )
        green, blue, red = (_pixels(plane) for plane in scaled.planes)
        return red, green, blue


def _pixels(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
