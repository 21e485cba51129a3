"""What a network must say to be trained and run: the contract between the platform and every network.

A network is a torch module with an `input_spec` and `forward(*, rgb, flow) -> logits [B, num_classes]`; any object with
the attributes of InputSpec will do. It may also say, as attributes of the module:

    backbone_parts         submodules that training may freeze, recompute and shard (kinoray.network.build)
    to_features, from_features
                           forward in two halves: to_features(*, rgb, flow) -> {name: [B, ...]} is what the backbones
                           make of clips, each by itself, and from_features(features) -> logits is all the rest; so
                           that frozen backbones need see a clip only once (kinoray.train.features)
    depth_parts            groups of submodules or parameters in order from input to answer, one for each depth, such as
                           (("stem",), ("blocks.0",), ("blocks.1",)); training may let the rate fall with the depth
    segment_consensus      "logits" or "probs": what the answer is the mean of, over segments that do not see each other
    reads_bf16_features    what follows its folded parts takes bfloat16 (kinoray.network.prepare)
    compile_parts          submodules that are compiled on a GPU besides its folded parts
    is_classifier          on a linear layer: what goes into it is the embedding, whichever others have as many outputs
    cost_parts, cost_note  how its costs are added up, and a line below them (kinoray.network.cost)

This module imports nothing, so that a network costs no more to import than it needs itself. In those beside it: where
networks come from, their checkpoints, and clips through them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ClipRecipe", "InputSpec", "PublishedNetwork", "Words", "WordsError"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRecipe:
    """How a published network was fed, as far as its source says; None where it does not.

    The order: frames are chosen, resized, cropped in the middle, then scaled as InputSpec says. A recipe is advice to
    the platform; what a network insists on is in InputSpec.
    """

    frames: int | None = None
    """Frames of one clip; with segments, of each of them."""
    segments: int | None = None
    """Clips that are spread over the whole video, in so many segments; None: a clip is one stretch of the video."""
    stride: int | None = None
    """Frames of the video from one frame of the clip to the next; 1 where a frame rate is given."""
    fps: float | None = None
    """Frames a second that the video is brought to before frames are counted; None: those of the video itself."""
    placement: Literal["mmaction2", "slowfast", "torchvision", "even"] = "mmaction2"
    """Whose sampler it was fed by (clip.sample.placement)."""
    short: Literal["loop", "repeat_last"] = "loop"
    """What a video that is shorter than a clip shows: itself again, or its last frame."""
    resize: Literal["shortest", "exact"] | None = None
    """Resized to a shortest side, or to height and width whatever the picture's shape; None: not resized."""
    resize_px: tuple[int, int] | None = None
    """Height and width after an exact resize; the shortest side, twice, after the other."""
    crop_px: int | None = None
    """Side of the square cropped from the middle; None: no crop."""
    middle: Literal["floor", "even"] = "floor"
    """How half a pixel is rounded where the margins are odd: down, or to an even number (torchvision)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bilinear"
    """Filter of the resize."""
    antialias: bool = True
    """Whether the filter grows with the factor when the picture shrinks."""

    def __post_init__(self) -> None:
        assert (self.resize is None) == (self.resize_px is None)
        assert self.resize != "shortest" or (self.resize_px is not None and len(set(self.resize_px)) == 1)


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
    recipe: ClipRecipe = ClipRecipe()
    """How its published weights were fed; nothing is known of a network without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Classes that a user gives in words, for a network that compares pictures with texts."""

    names: tuple[str, ...]
    """Their names, index = number of the logit."""
    texts: tuple[str, ...]
    """Of each class the text that stands for it; empty where that is its name in the prompts."""
    prompts: tuple[str, ...] = ()
    """Sentences with {} in place of the name; the mean of all of them stands for a class. None: the network's usual."""

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.texts)


class WordsError(ValueError):
    """The network takes no classes in words, or needs some, or cannot read these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedNetwork:
    """Weights that somebody published, under the names of a network that ships, and what is known of them."""

    factory: str
    """Short name of the network."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of its factory, plain JSON."""
    state: Mapping[str, Any]
    """State dict: name -> tensor, on the CPU."""
    class_names: tuple[str, ...]
    """Index = number of the logit; empty where nothing says them."""
    source: str
    """What names it for ever: with the weight set, or the revision."""
    sha256: str
    """Digest of the files that the weights were read from."""
    licence: str = ""
    """Licence of the weights, in their source's words."""
    top1: float | None = None
    """Published accuracy on the classes' own data set, in percent."""
    top5: float | None = None
    """The same within five answers."""
    recipe: str = ""
    """Where its training is described."""
    library: str = ""
    """Package and version that the weights were read with, where their names belong to it."""
    notes: tuple[str, ...] = ()
    """What the user should know: entries that were left out, say."""
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of classes that were given in words: the texts that stand for each."""
