"""What a video model needs to be fed: the one thing that the platform asks of every network."""

from dataclasses import dataclass

__all__ = ["InputSpec"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """Shapes and scaling of a model's inputs. None means that any number is accepted at run time.

    `rgb` goes in as float [B, S, T, 3, H, W], `(x / 255 - rgb_mean) / rgb_std`; `flow` as float
    [B, S, T, flow_channels, H, W], the flow in pixels divided by its bound, so within -1 .. 1.
    """

    rgb: bool = True
    flow_channels: int = 0
    num_segments: int | None = None
    frames_per_segment: int | None = None
    crop_px: int | None = None
    rgb_mean: tuple[float, float, float] = IMAGENET_MEAN
    rgb_std: tuple[float, float, float] = IMAGENET_STD
