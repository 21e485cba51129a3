"""Hugging Face's video classifiers as kinoray models: whatever AutoModelForVideoClassification knows, from a config.

Nothing here asks the hub or runs code that comes with a network: classes are the installed library's own
(trust_remote_code stays off), and a config may hold only the entries that its class declares. So a network can be built
again from its options, without the folder it came from (video_baselines.huggingface_folder reads one).

Shapes: M clips, T frames, C channels, Y X pixels, K classes
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from video_baselines.streams import ClipClassifier, DepthParts, require_count, require_fraction

__all__ = [
    "HubFrames",
    "build_errors",
    "declared_entries",
    "fed_spec",
    "huggingface",
    "known_model_types",
    "library",
    "quiet",
    "require_bounded",
    "require_small_table",
    "square_side",
]

_SIZE_FIELDS = ("image_size", "crop_size")
_FRAME_FIELDS = ("num_frames", "frames_per_clip")
# Building takes time and memory for these before anybody can compare shapes: the largest of the field has 48 layers and
# 18 million numbers in the table of its positions. VideoMAE's table is computed number by number in Python, wherever
# the network is built: its huge one has 2 million, 6 at 384 px.
_MAX_LAYERS = 128
_MAX_TABLE = 2**27
_MAX_COMPUTED_TABLE = 2**23
_MAX_SIZE = 2**20
_SIZES = ("_size", "_frames", "_per_clip", "_heads", "_channels", "_chans", "_tokens", "max_position_embeddings")


def library() -> Any:
    """The package transformers. Raises ValueError saying what to install."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("Hugging Face networks need the package transformers: pip install 'kinoray[hf]'") from error
    return transformers


def known_model_types() -> tuple[str, ...]:
    """The model types that the installed library has video classifiers for."""
    library()
    from transformers.models.auto import modeling_auto

    return tuple(sorted(modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES))


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """The library's progress bars and load reports stay off the terminal; what they say is in our errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def declared_entries(model_type: str) -> set[str]:
    """Names of the entries that the config class of a known type declares, without those that all configs share."""
    transformers = library()
    shared = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[model_type])} - shared


@contextlib.contextmanager
def build_errors(what: str) -> Iterator[None]:
    """What the library raises for values that do not go together, as ValueError: it has no kind of its own for it."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{what}: {reason}") from error


def _config(entries: Mapping[str, Any], num_classes: int) -> Any:
    """The library's config object. Raises ValueError naming what is not known or not allowed."""
    transformers = library()
    known = known_model_types()
    if not isinstance(entries, Mapping) or entries.get("model_type") not in known:
        found = entries.get("model_type") if isinstance(entries, Mapping) else entries
        raise ValueError(f"config.model_type must be one of {', '.join(known)}, got {found!r:.100}")
    rest = {name: value for name, value in entries.items() if name != "model_type"}
    declared = declared_entries(entries["model_type"])
    if unknown := sorted(set(rest) - declared):  # before the library sees it: any name would be an attribute there
        raise ValueError(f"config.{unknown[0]:.100} is not an entry of a {entries['model_type']} config")
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.for_model(entries["model_type"], num_labels=num_classes, **rest)
    except Exception as error:  # its checks raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config is not one of {entries['model_type']}: {reason}") from error
    require_bounded(config, declared)
    require_small_table(config)
    return config


def require_bounded(config: Any, names: set[str]) -> None:
    """Raise ValueError for entries that no network has, or whose network would take long to lay out."""
    from transformers.activations import ACT2FN

    for name in sorted(names):
        value = getattr(config, name)
        if name.endswith("_layers") and not 0 <= value <= _MAX_LAYERS:
            raise ValueError(f"config.{name} must be at most {_MAX_LAYERS}, got {value}")
        if name.endswith(_SIZES) and not all(1 <= size <= _MAX_SIZE for size in _numbers(value)):
            raise ValueError(f"config.{name} must be 1 .. {_MAX_SIZE:,}, got {value!r:.100}")
        if name.endswith("_act") and value not in ACT2FN:
            raise ValueError(f"config.{name} must be an activation that the library knows, got {value!r:.100}")


def require_small_table(config: Any) -> None:
    """Raise ValueError for a network of pictures whose table of positions is larger than any has."""
    frames = next((getattr(config, name) for name in _FRAME_FIELDS if hasattr(config, name)), 1)
    tubelet = _numbers(getattr(config, "tubelet_size", 1))
    patch = min(_numbers(config.patch_size) if hasattr(config, "patch_size") else tubelet[1:], default=1)
    table = frames * max(1, square_side(config) // patch) ** 2 * config.hidden_size
    limit = _MAX_TABLE
    if config.model_type == "videomae":
        table, limit = table // tubelet[0], _MAX_COMPUTED_TABLE
    if table > limit:
        raise ValueError(f"config: {frames} frames of {square_side(config)} px are {table:,} numbers, over {limit:,}")


def _numbers(value: Any) -> tuple[int, ...]:
    """The whole numbers of an entry that is one of them, several or None."""
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


class HubFrames(nn.Module):
    """A network of the library over clips [M, T, C, Y, X], which is how the library takes them."""

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.input_name = str(cast(Any, net).main_input_name)

    @property
    def depth_parts(self) -> DepthParts:
        """The embeddings, then each layer of the network's own lists of layers, without those of its pooling."""
        base = cast(Any, self.net).base_model
        trained = [
            (f"net.{self.net.base_model_prefix}.{name}", module)
            for name, module in base.named_modules()
            if any(parameter.requires_grad for parameter in module.parameters())
        ]
        embeddings = tuple(name for name, _ in trained if name.endswith("embeddings"))
        lists = [(name, module) for name, module in trained if isinstance(module, nn.ModuleList)]
        return embeddings, *((f"{name}.{number}",) for name, layers in lists for number in range(len(layers)))

    def forward(self, clips_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]."""
        logits: Tensor = self.net(**{self.input_name: clips_MTCYX}).logits
        return logits.reshape(clips_MTCYX.shape[0], self.num_classes)  # VideoPrism's has an axis of 1 in between


def huggingface(
    *,
    num_classes: int,
    config: Mapping[str, Any],
    rgb_mean: tuple[float, float, float],
    rgb_std: tuple[float, float, float],
    recipe: Mapping[str, Any] | None = None,
    drop_path: float | None = None,
) -> ClipClassifier:
    """Build a video classifier of Hugging Face's transformers with random weights; logits averaged over S clips.

    config: model_type and entries of that type's config (read_folder makes it of a config.json). rgb_mean, rgb_std:
    as in InputSpec. recipe: entries of ClipRecipe. drop_path: stochastic depth while training, where the network has
    it (TimeSformer, V-JEPA 2); None leaves what config says. Frames and crop must be the config's, but that V-JEPA 2
    takes any number of frames. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    transformers = library()
    entries = dict(config) if isinstance(config, Mapping) else config
    built = _config(entries, num_classes)
    if drop_path is not None:
        require_fraction("drop_path", drop_path)
        if not hasattr(built, "drop_path_rate"):
            raise ValueError(f"drop_path: {built.model_type} has no stochastic depth, got {drop_path}")
        # Set on the object: TimeSformer's config declares a whole number and then reads any.
        object.__setattr__(built, "drop_path_rate", float(drop_path))
    spec = fed_spec(built, rgb_mean, rgb_std, recipe)
    with quiet(transformers), build_errors("config: its network cannot be built"):
        net = transformers.AutoModelForVideoClassification.from_config(built, trust_remote_code=False)
    _freeze_unused(net)
    return ClipClassifier(spec, rgb_net=HubFrames(net, num_classes))


def _freeze_unused(net: Any) -> None:
    """V-JEPA 2 carries the predictor of its pretraining along: classification does not run it, nothing trains it."""
    predictor = getattr(getattr(net, "vjepa2", None), "predictor", None)
    if predictor is not None:
        predictor.requires_grad_(False)


def square_side(config: Any) -> int:
    """Side of the square that the network is made for."""
    value = next((getattr(config, name) for name in _SIZE_FIELDS if hasattr(config, name)), None)
    sides = [value] if isinstance(value, int) else list(value or ())
    if value is None and hasattr(config, "num_patches"):  # SigLIP 2 of any shape: a square grid of patches
        grid = math.isqrt(config.num_patches)
        sides = [grid * config.patch_size] if grid * grid == config.num_patches else []
    if not sides or len(set(sides)) != 1:
        raise ValueError(f"config: the network must take square frames of a known side, got {value!r:.100}")
    return int(sides[0])


def fed_spec(config: Any, mean: Any, std: Any, recipe: Mapping[str, Any] | None) -> InputSpec:
    """What a network of that config is fed. Raises ValueError naming what no network is fed."""
    values = {}
    for name, triple in (("rgb_mean", mean), ("rgb_std", std)):
        numbers = tuple(float(number) for number in triple)
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} must be three numbers, got {triple!r}")
        values[name] = numbers
    if recipe is not None:
        entries = dict(recipe)
        if entries.get("resize_px") is not None:
            entries["resize_px"] = tuple(entries["resize_px"])
        try:
            clip = ClipRecipe(**entries)
        except TypeError as error:
            raise ValueError(f"recipe: {error}") from error
    else:
        clip = ClipRecipe()
    return InputSpec(
        # V-JEPA 2's positions are rotations, so its frames_per_clip is no limit.
        frames_per_segment=getattr(config, "num_frames", None),
        crop_px=square_side(config),
        rgb_mean=cast(Any, values["rgb_mean"]),
        rgb_std=cast(Any, values["rgb_std"]),
        recipe=clip,
    )
