"""What a network must say to be trained and run: the contract between the platform and every network.

A network is a torch module with an `input_spec` and `forward(*, rgb, flow) -> logits [B, num_classes]`; any object with
the attributes of InputSpec will do. It may also say, as attributes of the module:

    backbone_parts         submodules that training may freeze, recompute and shard (kinoray.network.build)
    segment_consensus      "logits" or "probs": what the answer is the mean of, over segments that do not see each other
    reads_bf16_features    what follows its folded parts takes bfloat16 (kinoray.network.prepare)
    compile_parts          submodules that are compiled on a GPU besides its folded parts
    cost_parts, cost_note  how its costs are added up, and a line below them (kinoray.network.cost)

This module imports nothing, so that a network costs no more to import than it needs itself.
"""

from dataclasses import dataclass

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "InputSpec"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """Shapes and scaling of a network's inputs. None means that any number is accepted at run time.

    `rgb` goes in as float [B, S, T, 3, H, W], `(x / 255 - rgb_mean) / rgb_std`; `flow` as float
    [B, S, T, flow_channels, H, W], the flow in pixels divided by its bound, so within -1 .. 1. A stream that it does
    not ask for is None.
    """

    rgb: bool = True
    flow_channels: int = 0
    num_segments: int | None = None
    frames_per_segment: int | None = None
    crop_px: int | None = None
    rgb_mean: tuple[float, float, float] = IMAGENET_MEAN
    rgb_std: tuple[float, float, float] = IMAGENET_STD
