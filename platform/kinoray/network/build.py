"""How a network gets in: an import string, a factory, a Protocol. The platform never imports models/ by name.

What is easy to break: a checkpoint is somebody's data. It may choose among the networks that ship, by plain options;
any other name in it is imported only if the user gave the same name on the command line (`trusted_network`).
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, ViewConfig
from kinoray.errors import CheckpointCorrupt, ConfigError, ModelError
from kinoray.network import ClipRecipe, InputSpec, PublishedNetwork
from kinoray.network.resolve import SHORT_NAMES

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "SHORT_NAMES",
    "SOURCE_READERS",
    "START_OPTIONS",
    "SplitModel",
    "VideoModel",
    "backbone_names",
    "backbone_parts",
    "build_model",
    "build_outline",
    "check_clip",
    "classifier_names",
    "clip_for",
    "clip_of_network",
    "clip_on",
    "depths",
    "factory_options",
    "is_shipped",
    "is_split",
    "recipe_departures",
    "require_known_model",
    "source_reader",
    "text_reader",
    "trusted_network",
    "without_start_weights",
]

SOURCE_READERS: Mapping[str, str] = {
    "file": "video_baselines.sources:from_file",
    "hf": "video_baselines.sources:from_huggingface",
    "i3d": "video_baselines.sources:from_i3d",
    "torchvision": "video_baselines.sources:from_torchvision",
}
"""What reads published weights, by the kind of their source (kinoray.network.resolve); each a PublishedNetwork."""
_TEXT_READER = "video_baselines.sources:text_of_huggingface"

_SHIPPED = frozenset(SHORT_NAMES) | frozenset(SHORT_NAMES.values())
_IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_PLAIN_TEXT = re.compile(r"[\w.-]{1,100}(:[\w.-]{1,100})?", re.ASCII)  # `timm:NAME`; no path, no URL, no hub
_ENTRY = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_MAX_OPTION = 2**31

# Options that are JSON and no single value: only the factories of Hugging Face's networks take them, and of them only
# what the installed library's own class of that model_type declares.
_JSON_OPTIONS: Mapping[str, frozenset[str]] = dict.fromkeys(
    ("huggingface", "image_text"), frozenset({"config", "recipe", "rgb_mean", "rgb_std"})
)
_MAX_JSON_DEPTH = 3
_MAX_JSON_VALUES = 1000

_RECIPE_SETTINGS = {
    "sample": ("num_segments", "frames_per_segment", "stride", "fps"),
    "view": ("resize", "resize_px", "resize_width_px", "crop_px"),
}

START_OPTIONS = frozenset({"backbone_weights", "pretrained", "weights"})
"""Options of these names only choose the weights that training starts from; they must not change the network itself."""


class VideoModel(Protocol):
    """A torch module that maps clips to logits [B, num_classes]; rgb and flow are None where the spec asks for none."""

    @property
    def input_spec(self) -> InputSpec: ...
    def __call__(self, *, rgb: "Tensor | None", flow: "Tensor | None") -> "Tensor": ...
    def state_dict(self) -> "dict[str, Tensor]": ...
    def parameters(self) -> "Iterator[nn.Parameter]": ...


class SplitModel(VideoModel, Protocol):
    """One whose forward is from_features(to_features(...)); see kinoray.network."""

    def to_features(self, *, rgb: "Tensor | None", flow: "Tensor | None") -> "dict[str, Tensor]": ...
    def from_features(self, features: "Mapping[str, Tensor]") -> "Tensor": ...


def is_split(model: "VideoModel | nn.Module") -> "TypeGuard[SplitModel]":
    """Whether the network says which half of it is its backbones."""
    return all(callable(getattr(model, name, None)) for name in ("to_features", "from_features"))


def is_shipped(factory: str) -> bool:
    """Whether it is one of kinoray's own networks, by its short or its full name, letter by letter."""
    return factory in _SHIPPED


def trusted_network(config: ModelConfig, where: str, allowed: Collection[str]) -> ModelConfig:
    """The network that the checkpoint at `where` names, as it may be built. Nothing is imported here.

    Of a network that ships, options are plain numbers and names, or (Hugging Face's) JSON of such: none is a path or an
    address. Start weights are left out, since the checkpoint's replace them. Another network is the user's word, in
    `allowed`, and so are its options.

    Raises:
        ConfigError: the network does not ship and is not allowed; the message says how to allow it.
        CheckpointCorrupt: what it names is no network at all, or an option is not plain.
    """
    name = config.factory
    if is_shipped(name):
        config = without_start_weights(config)
        for option, value in config.options.items():
            is_json = option in _JSON_OPTIONS.get(SHORT_NAMES.get(name, name).partition(":")[2], ())
            if not (_PLAIN_TEXT.fullmatch(option) and (_is_plain_json(value) if is_json else _is_plain(value))):
                raise CheckpointCorrupt(
                    f"{where}: option {option[:100]!r} of {name} must be a number, true, false or a plain name, found "
                    f"{str(value)[:100]!r}; a checkpoint may name no file and no address"
                )
        return config
    if len(name) > 200 or not _IMPORT_STRING.fullmatch(name):
        raise CheckpointCorrupt(f"{where} names {name[:200]!r} as its network, which is no package:function")
    if name not in allowed:
        raise ConfigError(
            f"allow_factory: {where} names the network {name}, which does not ship with kinoray; nothing of it was "
            f"imported, since its code would run with your rights. If you trust it, add --allow-factory {name}"
        )
    return without_start_weights(config)


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return _PLAIN_TEXT.fullmatch(value) is not None
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < _MAX_OPTION)


def _is_plain_json(value: object, depth: int = 0) -> bool:
    """Whether it is lists and mappings, bounded, whose names and values are all plain."""
    if isinstance(value, Mapping):
        names, items = list(value), list(value.values())
    elif isinstance(value, list | tuple):
        names, items = [], list(value)
    else:
        return _is_plain(value)
    return (
        depth < _MAX_JSON_DEPTH
        and len(items) <= _MAX_JSON_VALUES
        and all(isinstance(name, str) and _ENTRY.fullmatch(name) for name in names)
        and all(_is_plain_json(item, depth + 1) for item in items)
    )


def source_reader(kind: str) -> Callable[..., PublishedNetwork]:
    """The function that reads published weights of that kind."""
    return cast(Callable[..., PublishedNetwork], _factory(SOURCE_READERS[kind]))


def text_reader() -> Callable[..., tuple[list[float], str]]:
    """What reads the text tower of a published network: a text's unit vector, and the digest of its files."""
    return cast(Callable[..., tuple[list[float], str]], _factory(_TEXT_READER))


def _factory(name: str) -> Any:
    target = SHORT_NAMES.get(name, name)
    module_name, colon, function = target.partition(":")
    if not (module_name and colon and function):
        known = ", ".join(sorted(SHORT_NAMES))
        raise ConfigError(f"model.factory must be one of {known}, or package:function, got {name!r}")
    try:
        _import_torchvision()
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.factory {name!r} cannot be imported: {error}") from error


def _import_torchvision() -> None:
    """Import torchvision without torch._dynamo, which costs each process 2 s of CPU and 150 MB.

    torchvision.ops.roi_align imports it for one function, which it calls much later; it then gets the real one.
    """
    if "torchvision" in sys.modules or "torch._dynamo" in sys.modules:
        return
    package, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    utils.__dict__["is_compile_supported"] = lambda device: importlib.import_module(
        "torch._dynamo.utils"
    ).is_compile_supported(device)
    sys.modules |= {module.__name__: module for module in (package, utils)}
    try:
        importlib.import_module("torchvision")
    finally:
        for module in (package, utils):
            del sys.modules[module.__name__]


def factory_options(factory: str) -> dict[str, inspect.Parameter]:
    """The arguments of a factory but for num_classes, in their order. Raises ConfigError: there is no such factory."""
    parameters = dict(inspect.signature(_factory(factory)).parameters)
    parameters.pop("num_classes", None)
    return parameters


def require_known_model(config: ModelConfig) -> None:
    """Raise ConfigError if the factory does not exist or an option is not one of its arguments."""
    parameters = factory_options(config.factory)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = sorted(parameters)
    for option in config.options:
        if option not in known:
            raise ConfigError(f"model.options.{option} is not an option of {config.factory}; known: {', '.join(known)}")


def build_model(config: ModelConfig, num_classes: int) -> VideoModel:
    """Build the configured network for num_classes. Raises ConfigError for a bad setting, ModelError for the rest."""
    require_known_model(config)
    try:
        model = _factory(config.factory)(num_classes=num_classes, **config.options)
    except ValueError as error:
        raise ConfigError(f"model.options: {error}") from error
    except TypeError as error:
        raise ModelError(f"{config.factory} cannot be built with options {dict(config.options)}: {error}") from error
    return cast(VideoModel, model)


def _without_memory() -> AbstractContextManager[object]:
    """Networks that are built inside take no memory, and draw no numbers to start weights with.

    Without memory there is nothing to fill, and torch would load dynamo for it.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutStart(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            named = kwargs or {}
            draws = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
            if draws or getattr(func, "__module__", "") == torch.nn.init.__name__:
                return args[0] if args else named["tensor"]
            return func(*args, **named)

    stack = ExitStack()
    stack.enter_context(WithoutStart())
    stack.enter_context(torch.device("meta"))
    return stack


def build_outline(config: ModelConfig, num_classes: int) -> "nn.Module":
    """A network that ships, without memory: names and shapes of its weights, whatever their size.

    Raises:
        ConfigError, ModelError: it cannot be built with these options.
    """
    try:
        with _without_memory():
            return cast("nn.Module", build_model(config, num_classes))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{config.factory} cannot be built with options {dict(config.options)}: {reason}") from error


def without_start_weights(config: ModelConfig) -> ModelConfig:
    """The same network for weights that come from a checkpoint: nothing is downloaded or read to be overwritten."""
    options = {name: value for name, value in config.options.items() if name not in START_OPTIONS}
    return replace(config, options=options)


def check_clip(spec: InputSpec, clip: ClipConfig) -> None:
    """Raise ConfigError where the clip's shape is not one that the model accepts, or its flow cannot be found."""
    wanted = {
        "clip.sample.num_segments": (spec.num_segments, clip.sample.num_segments),
        "clip.sample.frames_per_segment": (spec.frames_per_segment, clip.sample.frames_per_segment),
        "clip.view.crop_px": (spec.crop_px, clip.view.crop_px),
    }
    for name, (expected, found) in wanted.items():
        if expected is not None and expected != found:
            raise ConfigError(f"{name} must be {expected} for this model, got {found}")
    clip.for_network(spec.flow_channels)


def clip_for(spec: InputSpec) -> ClipConfig:
    """What a network is fed where nobody says otherwise: what it insists on, else what its recipe says, else ours.

    A recipe without a stride or frame rate is taken as spread over the video. Where the network was built for another
    crop than its recipe's, frames are resized in proportion.

    Raises:
        ConfigError: the recipe does not lead to square frames.
    """
    recipe = getattr(spec, "recipe", ClipRecipe())
    return ClipConfig(sample=_recipe_sample(spec, recipe), view=_recipe_view(spec, recipe))


def clip_of_network(config: ModelConfig) -> ClipConfig:
    """`clip_for` the configured network, which is built without memory or weights; ours for one that does not ship.

    Raises:
        ConfigError, ModelError: it cannot be built with these options.
    """
    if not is_shipped(config.factory):
        return ClipConfig()
    outline = cast(VideoModel, build_outline(without_start_weights(config), num_classes=2))
    return clip_for(outline.input_spec)


def recipe_departures(spec: InputSpec, clip: ClipConfig) -> str:
    """Where a clip is not what the network's recipe says, setting by setting with both values; "" for nowhere."""
    if getattr(spec, "recipe", ClipRecipe()).frames is None:
        return ""
    own = clip_for(spec)
    pairs = [
        (f"clip.{part}.{name}", getattr(getattr(clip, part), name), getattr(getattr(own, part), name))
        for part, names in _RECIPE_SETTINGS.items()
        for name in names
    ]
    return ", ".join(f"{name} {found} (its recipe: {expected})" for name, found, expected in pairs if found != expected)


def _recipe_sample(spec: InputSpec, recipe: ClipRecipe) -> SampleConfig:
    ours = SampleConfig()
    frames = spec.frames_per_segment or recipe.frames or ours.frames_per_segment
    if recipe.frames is None:
        return replace(ours, num_segments=spec.num_segments or ours.num_segments, frames_per_segment=frames)
    return SampleConfig(
        num_segments=spec.num_segments or recipe.segments or 1,
        frames_per_segment=frames,
        stride=0 if recipe.segments else recipe.stride or 0,
        fps=0.0 if recipe.segments or not recipe.stride else recipe.fps or 0.0,
        placement=recipe.placement,
        short=recipe.short,
    )


def _recipe_view(spec: InputSpec, recipe: ClipRecipe) -> ViewConfig:
    ours = ViewConfig()
    if recipe.resize is None or recipe.resize_px is None:
        crop = spec.crop_px or recipe.crop_px or ours.crop_px
        return replace(ours, resize_px=round(ours.resize_px * crop / ours.crop_px), crop_px=crop)
    height, width = recipe.resize_px
    if recipe.crop_px is None and height != width:
        raise ConfigError(f"its recipe resizes to {height} x {width} and crops nothing: networks here take squares")
    published = recipe.crop_px or height
    crop = spec.crop_px or published
    height, width = (max(crop, round(side * crop / published)) for side in (height, width))
    return replace(
        ours,
        resize="short_side" if recipe.resize == "shortest" else "stretch",
        resize_px=height,
        resize_width_px=0 if height == width else width,
        crop_px=crop,
        interpolation=recipe.interpolation,
        antialias=recipe.antialias,
        middle=recipe.middle,
    )


def clip_on(model: ModelConfig, clip: ClipConfig, made_for: ModelConfig) -> ClipConfig:
    """The clip of a recipe that was made for one network, as another one takes it.

    Segments that do not see each other are a way to label of that network's own family: elsewhere their frames are one
    clip. What the network insists on, it gets; frames are resized in proportion. A network that does not ship gets it
    as it is.

    Raises:
        ConfigError, ModelError: the network cannot be built.
    """
    if not is_shipped(model.factory):
        return clip
    net = build_outline(without_start_weights(model), 2)
    spec: InputSpec = cast(Any, net).input_spec
    sample, view = clip.sample, clip.view
    ours, theirs = (SHORT_NAMES.get(name, name).partition(":")[0] for name in (model.factory, made_for.factory))
    is_one_clip = ours != theirs and getattr(net, "segment_consensus", None) is not None
    segments = spec.num_segments or (1 if is_one_clip else sample.num_segments)
    frames = spec.frames_per_segment or (sample.num_frames // segments if is_one_clip else sample.frames_per_segment)
    crop = spec.crop_px or view.crop_px
    return replace(
        clip,
        sample=replace(sample, num_segments=segments, frames_per_segment=frames),
        view=replace(view, crop_px=crop, resize_px=round(view.resize_px * crop / view.crop_px)),
    )


def backbone_parts(model: "VideoModel | nn.Module") -> tuple[str, ...]:
    """Names of the submodules that the network calls its backbones; none if it does not say.

    Its forward calls them. Of a network that names none, all but the classifier counts as backbone.
    """
    return tuple(getattr(model, "backbone_parts", ()))


def depths(model: "nn.Module") -> dict[str, int]:
    """How deep each parameter lies: 1 in the last of the network's depth_parts, their number in the first, else 0.

    Raises:
        ConfigError: the network names no depth_parts.
    """
    parts = tuple(getattr(model, "depth_parts", ()))
    if not parts:
        raise ConfigError(
            f"optim.layer_decay must be 1 for {type(model).__name__}, which names no depth_parts "
            "(kinoray.network); optim.backbone_lr_factor gives all but its classifier a rate of their own"
        )
    found = {}
    for name, _ in model.named_parameters():
        depth = (len(parts) - place for place, group in enumerate(parts) if any(_is_of(name, part) for part in group))
        found[name] = next(depth, 0)
    return found


def _is_of(name: str, part: str) -> bool:
    """Whether a parameter is this one, or of this submodule."""
    return name == part or name.startswith(f"{part}.")


def classifier_names(model: VideoModel, config: ModelConfig, num_classes: int) -> frozenset[str]:
    """Weights of the model, built by config for num_classes, whose shape follows from the number of classes.

    The classifier needs no name: it is whatever the number of classes shapes.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # building draws weights: leave the caller's generator as it is
        other = build_model(without_start_weights(config), num_classes + 1).state_dict()
    return frozenset(
        name for name, tensor in model.state_dict().items() if name in other and other[name].shape != tensor.shape
    )


def backbone_names(model: VideoModel, config: ModelConfig, num_classes: int) -> frozenset[str]:
    """Parameters of the backbones."""
    names = [name for name, _ in cast("nn.Module", model).named_parameters()]
    if parts := backbone_parts(model):
        return frozenset(name for name in names if name.startswith(tuple(f"{part}." for part in parts)))
    return frozenset(names) - classifier_names(model, config, num_classes)
