"""Optical flow between two frames: OpenCV's DIS, and its int8 form that travels to the model.

The same frames must give the same flow whatever came before them. DIS makes that easy to get wrong: for frames whose
pyramid has fewer levels than the preset's finest one, `calc` chooses both ends of the pyramid itself, from the width
alone; the finest stays for all later calls, the coarsest is found anew, so that the second call is another estimate
than the first (and of thin frames the coarsest can have no rows, and the process dies). So the finest level is chosen
here, where `calc` has nothing to change, and each shape has its estimator.
"""

import math
import threading

import cv2
import numpy as np

__all__ = ["dis_flow", "quantise"]

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
_estimators = threading.local()  # an estimator keeps buffers between calls, so threads must not share one


def _coarsest_scale(shape: tuple[int, ...], patch_px: int) -> int:
    """The coarsest level of the pyramid, as `calc` finds it (0: the frames themselves)."""
    widest = math.log2(max(shape) / (4 * patch_px)) + 0.5  # patches move a quarter of the longer side at most
    return min(int(widest), int(math.log2(max(1, min(shape) // patch_px))))


def _estimator(preset: str, shape: tuple[int, ...]) -> cv2.DISOpticalFlow:
    """This thread's estimator for frames of one shape."""
    if not hasattr(_estimators, "made"):
        _estimators.made = {}
    made: dict[tuple[str, tuple[int, ...]], cv2.DISOpticalFlow] = _estimators.made
    if (preset, shape) not in made:
        estimator = cv2.DISOpticalFlow.create(_PRESETS[preset])
        if _coarsest_scale(shape, estimator.getPatchSize()) < estimator.getFinestScale():
            estimator.setFinestScale(0)  # what `calc` chooses for such frames
        made[preset, shape] = estimator
    return made[preset, shape]


def dis_flow(prev: np.ndarray, next: np.ndarray, preset: str) -> np.ndarray:
    """Motion from prev to next (uint8 [H, W]) in pixels, float32 [H, W, 2] as (x, y): x to the right, y down.

    What is at (x, y) in prev is at (x, y) + flow in next. `preset` is one of flow.preset's choices.

    Raises:
        ValueError: the frames are not two uint8 images of one shape, or the preset is unknown.
    """
    if prev.shape != next.shape or prev.ndim != 2 or prev.dtype != np.uint8 or next.dtype != np.uint8:
        raise ValueError(
            f"dis_flow needs two uint8 [H, W] images of one shape, got {prev.dtype} {prev.shape} and "
            f"{next.dtype} {next.shape}"
        )
    if preset not in _PRESETS:
        raise ValueError(f"flow.preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    if cv2.getNumThreads() != 1:  # the cores are busy with other clips; more threads would only wait for each other
        cv2.setNumThreads(1)
    # The third argument must stay None: DIS takes a given output array as its starting flow.
    flow: np.ndarray = _estimator(preset, prev.shape).calc(prev, next, None)
    return flow


def quantise(flow: np.ndarray, bound_px: float) -> np.ndarray:
    """Flow in pixels, float [H, W, 2], to int8 [2, H, W]: clipped to +- bound_px, which becomes +- 127; 0 stays 0."""
    scaled = cv2.addWeighted(flow, 127.0 / bound_px, flow, 0.0, 0.0, dtype=cv2.CV_8S)  # rounds half to even, saturates
    return np.stack(cv2.split(np.maximum(scaled, -127)))
