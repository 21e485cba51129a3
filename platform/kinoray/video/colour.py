"""Scaled YUV 4:2:0 planes in whatever colours a file has -> one standard: BT.601, limited range, centred chroma.

libswscale scales the planes and could convert them as well, but from another matrix it does so through packed RGB: 2
grey levels too dark, and slower than all of decode.frames=rgb. Here it is one small matrix on the scaled planes, which
files in BT.601 (and untagged ones, which libswscale takes for that in RGB, too) do not need.

Chroma samples of H.264, HEVC and MPEG lie on the left pixel of their pair. They are moved by a quarter of a sample to
its middle, where those of other codecs are: only there a mirror image or a turned frame has its chroma where the
original has it, and the device needs to know one place.
"""

from functools import cache

import cv2
import numpy as np

__all__ = ["LEFT_SITED", "chroma_to_centre", "to_bt601"]

LEFT_SITED = frozenset({"h264", "hevc", "mpeg4", "mpeg2video"})
"""Codecs whose frames libav declares as left-sited unless they say otherwise; libswscale takes others for centred.
A frame that does say otherwise (`chroma_sample_loc`, rare) has its chroma half a pixel aside: PyAV does not tell."""

_QUARTER = np.array([[-9, 111, 29, -3]], np.float32) / 128  # Catmull-Rom a quarter to the right; linear would blur
_KR_KB = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
"""AVColorSpace -> weights of red and blue in Y: BT.709, FCC, SMPTE 240M, BT.2020 twice. All others count as BT.601."""


def chroma_to_centre(chroma: np.ndarray) -> np.ndarray:
    """Left-sited chroma, uint8 [h, w] as stored (not yet turned) -> the same colours in the middle of the pixels."""
    chroma = np.ascontiguousarray(chroma)
    return np.asarray(cv2.filter2D(chroma, -1, _QUARTER, anchor=(1, 0), borderType=cv2.BORDER_REPLICATE))


def _from_rgb(kr: float, kb: float) -> np.ndarray:
    """float64 [3, 3]: full-range R, G, B -> Y in 0 .. 1, U and V in -0.5 .. 0.5 of weights kr and kb."""
    luma = np.array([kr, 1 - kr - kb, kb])
    blue, red = (np.eye(3)[2] - luma) / (2 - 2 * kb), (np.eye(3)[0] - luma) / (2 - 2 * kr)
    return np.stack([luma, blue, red])


@cache
def _matrix(colorspace: int, full_range: bool) -> np.ndarray:
    """float64 [3, 3]: Y - offset, U - 128, V - 128 of a file -> the same of BT.601 limited."""
    source = np.linalg.inv(_from_rgb(*_KR_KB.get(colorspace, (0.299, 0.114))))
    scale = np.array([255, 255, 255] if full_range else [219, 224, 224])
    return np.asarray(np.array([[219], [224], [224]]) * (_from_rgb(0.299, 0.114) @ source) / scale)


def to_bt601(
    planes: tuple[np.ndarray, np.ndarray, np.ndarray], colorspace: int, *, full_range: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y [h, w], centred U and V [h / 2, w / 2], uint8, to BT.601 limited range; the same planes if they are that.

    Args:
        colorspace: an AVColorSpace; unknown and unspecified ones count as BT.601, as they do for libswscale.
    """
    if colorspace not in _KR_KB and not full_range:
        return planes
    matrix = _matrix(colorspace, full_range)
    y, u, v = (np.ascontiguousarray(plane) for plane in planes)
    chroma = [cv2.addWeighted(u, row[1], v, row[2], 128 * (1 - row[1] - row[2])) for row in matrix[1:]]
    offset = 16 - matrix[0, 0] * (0 if full_range else 16)
    if colorspace not in _KR_KB:
        return cv2.addWeighted(y, matrix[0, 0], y, 0, offset), chroma[0], chroma[1]
    cross = -128 * (matrix[0, 1] + matrix[0, 2])
    if cv2.getNumThreads() != 1:  # as for flow: the cores are busy with other clips
        cv2.setNumThreads(1)
    small = cv2.addWeighted(u, matrix[0, 1], v, matrix[0, 2], cross, dtype=cv2.CV_32F)
    more = cv2.resize(small, (y.shape[1], y.shape[0]), interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(y, matrix[0, 0], more, 1, offset, dtype=cv2.CV_8U), chroma[0], chroma[1]
