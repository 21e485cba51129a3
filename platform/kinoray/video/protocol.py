"""Evaluation protocols by name: which views of a video are scored, and how their scores become one answer.

A view is what the network is fed once: S segments x T frames of one square cut. What is easy to break: a protocol
changes where views lie and never how a frame is resized, so that the network sees what it was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kinoray.config.shared import ClipConfig, require

__all__ = [
    "NUM_CROPS",
    "PROTOCOLS",
    "Crops",
    "Protocol",
    "ProtocolName",
    "ScoreKind",
    "ViewAverage",
    "ViewsConfig",
    "WindowsConfig",
]

ProtocolName = Literal["center", "8x6", "16x6", "10x3", "5x3", "25x10"]
Crops = Literal["center", "three", "ten"]
ScoreKind = Literal["softmax", "sigmoid"]
ViewAverage = Literal["probs", "logits"]

NUM_CROPS: Mapping[Crops, int] = {"center": 1, "three": 3, "ten": 10}
"""Cuts of one frame: the centre; three along the longer side; four corners and the centre, each also mirrored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowsConfig:
    """How long videos are cut; part of a result's digest."""

    length_s: float
    """Videos that are longer than this, in seconds, are cut into windows of this length."""
    stride_s: float
    """Seconds from the start of one window to the start of the next."""

    def __post_init__(self) -> None:
        require(self.length_s > 0, "window_s", "greater than 0", self.length_s)
        fits = 0 < self.stride_s <= self.length_s
        require(fits, "window_stride_s", f"greater than 0 and at most window_s ({self.length_s:g})", self.stride_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """Which views of a video are scored; part of a result's digest."""

    temporal: int = 1
    """Interleaved samplings of the whole video (kinoray.video.sample.view_indices)."""
    crops: Crops = "center"
    """Cuts of each frame (kinoray.video.transform.crop_views)."""
    average: ViewAverage = "probs"
    """What is averaged over the views: probabilities, or logits before the softmax."""
    windows: WindowsConfig | None = None
    """Long videos in windows, each with all of these views; None: a video is one window, however long."""

    def __post_init__(self) -> None:
        require(self.temporal >= 1, "views.temporal", "at least 1", self.temporal)

    @property
    def num_views(self) -> int:
        """How often the network runs for one video (for each window of it)."""
        return self.temporal * NUM_CROPS[self.crops]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What a name stands for; None: as in training."""

    num_segments: int | None = None
    """S of each view."""
    frames_per_segment: int | None = None
    """T of each view."""
    temporal: int = 1
    """Temporal views."""
    crops: Crops = "center"
    """Spatial views."""

    def clip(self, trained: ClipConfig) -> ClipConfig:
        """What each view holds, for a network that was trained on `trained`."""
        sample = replace(
            trained.sample,
            num_segments=self.num_segments or trained.sample.num_segments,
            frames_per_segment=self.frames_per_segment or trained.sample.frames_per_segment,
        )
        return replace(trained, sample=sample)

    def views(self, average: ViewAverage, windows: WindowsConfig | None = None) -> ViewsConfig:
        """Where the views lie, and how they are averaged."""
        return ViewsConfig(temporal=self.temporal, crops=self.crops, average=average, windows=windows)


PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    "center": Protocol(),
    "8x6": Protocol(num_segments=8, frames_per_segment=6),
    "16x6": Protocol(num_segments=16, frames_per_segment=6),
    "10x3": Protocol(temporal=10, crops="three"),
    "5x3": Protocol(temporal=5, crops="three"),
    "25x10": Protocol(num_segments=25, crops="ten"),
}
"""The names that `evaluate` and `label` take; docs/protocols.md says what they are and where they come from."""
