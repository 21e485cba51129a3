"""The settings of `kinoray model`."""

from dataclasses import dataclass, field

from kinoray.config.shared import ModelOptions, require

__all__ = ["ModelVerbConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVerbConfig:
    """Say what a network costs: parameters and multiply-accumulates, part by part, for a whole video.

    Example: kinoray model --describe vcm_sdd_r101

    Without --describe it lists the networks that ship with kinoray. Nothing is trained or downloaded.
    """

    describe: str = ""
    """A short name, or `package:function`."""
    options: ModelOptions = field(default_factory=dict)
    """Keyword arguments of the network's factory, such as backbone=resnet50."""
    num_classes: int = 400
    """Classes (Kinetics-400)."""
    num_segments: int | None = None
    """Segments a video. Default: what the network demands, else the paper's 16."""
    frames_per_segment: int | None = None
    """Frames a segment. Default: what the network demands, else the paper's 6."""
    crop_px: int | None = None
    """Side of a frame, in pixels. Default: what the network demands, else 224."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 1, "num_classes", "at least 1", self.num_classes)
