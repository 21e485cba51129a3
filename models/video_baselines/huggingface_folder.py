"""A folder that Hugging Face's save_pretrained wrote, as options, weights and class names of a kinoray model.

Its JSON is read as data and its tensors as tensors; no code of the folder runs and the hub is not asked. What is easy
to break: the library's classes do what entries tell them, files and addresses included, so only entries that are known
here reach one, each of its type and range; and sizes are compared before memory is taken.

Shapes: T frames, Y X pixels, C channels
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.preprocess import preprocess
from vcm_sdd.weights import WeightsMismatch, open_regular, read_state
from video_baselines.huggingface import (
    HubFrames,
    build_errors,
    declared_entries,
    huggingface,
    known_model_types,
    library,
    quiet,
    square_side,
)

__all__ = [
    "HF_FILES",
    "HubNetwork",
    "loaded",
    "processing",
    "read_folder",
    "read_json",
    "read_weights",
]

HF_FILES = (
    *("config.json", "processor_config.json", "*preprocessor_config.json", "model*.safetensors*"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
"""What is read of a repository, here and by image_text_folder (glob patterns); `pytorch_model*.bin*` where it
has no safetensors."""

_FRAME_FIELDS = ("num_frames", "frames_per_clip")
# Frames of the video from one frame of a clip to the next, which no config holds, by type and frames of a clip: of the
# Kinetics networks of VideoMAE (Tong et al., 2022), TimeSformer, its HR and L (Bertasius et al., 2021) and ViViT (Arnab
# et al., 2021).
_STRIDES = {
    ("videomae", 16): 4,
    ("timesformer", 8): 32,
    ("timesformer", 16): 16,
    ("timesformer", 96): 4,
    ("vivit", 32): 2,
}
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Those of the library's processors that the networks' own publishers name, and two plain ones that other people's do.
# (Not ConvNeXt's: it crops by a share of its own up to 384 px, and squeezes the whole picture from there on.)
_PROCESSORS = (
    *("CLIPImageProcessor", "ViTImageProcessor", "VideoMAEImageProcessor", "VivitImageProcessor"),
    *("LlavaOnevisionVideoProcessor", "TimesformerVideoProcessor", "VJEPA2VideoProcessor", "VideoMAEVideoProcessor"),
    *("VivitVideoProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor"),
)
_MAX_SIDE = 2048
_MAX_FACTOR = 1e6
_SLACK = 2**24  # bytes, or numbers
# Names that the library still translates to entries that it declares.
_OLDER_NAMES: Mapping[str, frozenset[str]] = {"videomae": frozenset({"qkv_bias"})}
# Entries that every config may have and that say nothing about the network's arithmetic.
_ABOUT = {
    "architectures",
    "auto_map",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "model_type",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubNetwork:
    """What a folder of save_pretrained holds, as kinoray keeps it."""

    options: dict[str, Any]
    """Options of `video_baselines.huggingface:huggingface`, plain JSON: config, rgb_mean, rgb_std, recipe."""
    state: dict[str, Tensor]
    """State dict of `huggingface(num_classes=len(class_names), **options)`, float32."""
    class_names: tuple[str, ...]
    """The config's id2label, in the order of ids."""
    spec: InputSpec
    """That network's input_spec."""
    ignored: tuple[str, ...]
    """Entries of config.json that the installed library does not know and that were therefore left out."""
    library: str
    """`transformers` and its version, which the names of the weights belong to."""
    files: tuple[Path, ...]
    """The files that the weights were read from, by name."""
    prompts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Of classes that were given in words: the texts that stand for each."""


_MAX_JSON_BYTES = 2**24  # an index of shards names every weight


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON. Raises ValueError: there is none, or it is too large."""
    try:
        with open_regular(file) as opened:
            data = opened.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES:,} bytes")
        body = json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{file} holds a {type(body).__name__}, expected an object")
    return body


def read_folder(folder: str | Path) -> HubNetwork:
    """Read a folder of save_pretrained: config, the processor's config, weights.

    Raises:
        ValueError: a file is missing or does not hold what it should, or the network is none that the library knows.
        WeightsMismatch: weights are missing, left over or of another shape; the message names them.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise ValueError(f"{root} has no config.json: expected a folder that save_pretrained wrote")
    transformers = library()
    found = read_json(root / "config.json")
    names = _class_names(found, root)
    config, ignored = _known_entries(found, len(names))
    recipe, mean, std = processing(root, config, transformers)
    options = {
        "config": config,
        "rgb_mean": list(mean),
        "rgb_std": list(std),
        "recipe": dataclasses.asdict(recipe),
    }
    options = json.loads(json.dumps(options))  # tuples become lists here, not only when a checkpoint is written
    with torch.device("meta"):  # names and shapes, no memory
        model = huggingface(num_classes=len(names), **options)
    files, given = read_weights(root, model)
    wrapped = cast(HubFrames, model.rgb_net)
    wrapped.net = loaded(root, wrapped.net, given)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return HubNetwork(
        options=options,
        state=state,
        class_names=names,
        spec=model.input_spec,
        ignored=ignored,
        library=f"transformers {transformers.__version__}",
        files=tuple(files),
    )


def _class_names(config: Mapping[str, Any], root: Path) -> tuple[str, ...]:
    labels = config.get("id2label")
    where = f"{root / 'config.json'}: id2label"
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{where} must name the classes, got {labels!r:.100}")
    by_id = {str(key): value for key, value in labels.items()}
    wanted = [str(number) for number in range(len(by_id))]
    if set(by_id) != set(wanted) or not all(isinstance(name, str) for name in by_id.values()):
        raise ValueError(f"{where} must map the ids 0 to {len(by_id) - 1} to names, got {sorted(by_id)[:5]!r:.100}")
    return tuple(by_id[number] for number in wanted)


def _known_entries(found: Mapping[str, Any], num_classes: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Every entry that the type's config declares, older names translated by the library, and what is left over."""
    transformers = library()
    known = known_model_types()
    if found.get("model_type") not in known:
        raise ValueError(f"config.model_type must be one of {', '.join(known)}, got {found.get('model_type')!r:.100}")
    declared = declared_entries(found["model_type"])
    accepted = declared | _OLDER_NAMES.get(found["model_type"], frozenset())
    entries = {name: value for name, value in found.items() if name in accepted and name not in _ABOUT}
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.for_model(found["model_type"], num_labels=num_classes, **entries)
    except Exception as error:  # its checks raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config.json is not one of {found['model_type']}: {reason}") from error
    plain = {name: getattr(config, name) for name in sorted(declared)}
    left_out = found.keys() - accepted - _ABOUT
    ignored = tuple(sorted(name for name in left_out if not name.startswith("_")))
    return {"model_type": found["model_type"], **plain}, ignored


def _processor(root: Path, transformers: Any, side: int) -> Any:
    """The folder's video processor, or its image processor, built by the library's own class out of plain entries.

    SigLIP 2's own for pictures of any shape does to a square what SigLIP's does, which is built in its place.
    """
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        if not (root / name).is_file():
            continue
        found = read_json(root / name)
        entries = found.get("video_processor") or found.get("image_processor") or found
        if not isinstance(entries, dict):
            raise ValueError(f"{root / name}: its processor must be an object, got {entries!r:.100}")
        kinds = ("video_processor_type", "image_processor_type", "feature_extractor_type")
        kind = next((entries[key] for key in kinds if entries.get(key)), None)
        if name == "processor_config.json" and kind is None:
            continue  # of a tokenizer, say
        base = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        if base.removesuffix("Pil") not in _PROCESSORS:
            raise ValueError(f"{root / name} must name one of {', '.join(_PROCESSORS)}, got {kind!r:.100}")
        plain = _plain_entries(entries, root / name)
        if base.removesuffix("Pil") == "Siglip2ImageProcessor":
            base, plain = "SiglipImageProcessor", {"resample": 2, **plain, "size": {"height": side, "width": side}}
        made = getattr(transformers, base, None)
        if made is None:
            raise ValueError(f"{root / name}: the installed transformers has no {base}")
        with quiet(transformers), build_errors(f"{root / name}: {base} does not take it"):
            return made(**plain)
    raise ValueError(
        f"{root} has no preprocessor_config.json: without it nobody knows how its network was fed; "
        "save the processor beside the model (processor.save_pretrained)"
    )


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_number(value: object, least: float) -> bool:
    return type(value) in (int, float) and least <= cast(float, value) <= _MAX_FACTOR


def _is_size(value: object) -> bool:
    """A side, or sides by name; the library takes a pair, too."""
    if isinstance(value, dict):
        if not value.keys() <= {"shortest_edge", "longest_edge", "height", "width"}:
            return False
        sides = [side for side in value.values() if side is not None]
    else:
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides)


def _is_scale(value: object, least: float) -> bool:
    """A number, or one for each of the three colours."""
    many = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(_is_number(one, least) for one in many)


# Entries that say what is done to frames, with what each must be; no other reaches a processor. (What they then do is
# compared: see _require_same.)
_PLAIN: Mapping[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad", "offset"),
        (_is_flag, "true or false"),
    ),
    "default_to_square": (_is_flag, "true or false"),
    "size": (_is_size, f"sides of 1 .. {_MAX_SIDE} px"),
    "crop_size": (_is_size, f"sides of 1 .. {_MAX_SIDE} px"),
    "pad_size": (_is_size, f"sides of 1 .. {_MAX_SIDE} px"),
    "resample": (lambda value: type(value) is int and value in _PILLOW, f"a filter of Pillow, 0 .. {max(_PILLOW)}"),
    "image_mean": (lambda value: _is_scale(value, -_MAX_FACTOR), "a finite number, or three"),
    "image_std": (lambda value: _is_scale(value, 1 / _MAX_FACTOR), "a number above 0, or three"),
    "rescale_factor": (lambda value: _is_number(value, 1 / _MAX_FACTOR), "a number above 0"),
    "fps": (lambda value: _is_number(value, 1e-3) and cast(float, value) <= 1000, "frames a second, up to 1000"),
}


def _plain_entries(entries: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The entries that a processor is built of. Raises ValueError for a value that none of them can have."""
    plain = {name: entries[name] for name in _PLAIN if entries.get(name) is not None}
    for name, value in plain.items():
        fits, expected = _PLAIN[name]
        if not fits(value):
            raise ValueError(f"{file}: {name} must be {expected}, got {value!r:.100}")
    return plain


def _entry(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


def processing(root: Path, config: Mapping[str, Any], transformers: Any) -> tuple[ClipRecipe, Any, Any]:
    """The processor as a recipe, a mean and a deviation; its own answer on a clip of noise must be the same.

    config: of the network that sees the frames.
    """
    side = square_side(SimpleNamespace(**config))
    processor = _processor(root, transformers, side)
    where = f"{root}: {type(processor).__name__}"
    resize, resize_px = None, None
    if processor.do_resize:
        short = _entry(processor.size, "shortest_edge")
        exact = _entry(processor.size, "height"), _entry(processor.size, "width")
        if short is not None and _entry(processor.size, "longest_edge") is None:
            resize, resize_px = "shortest", (short, short)
        elif None not in exact:
            resize, resize_px = "exact", cast(Any, exact)
        else:
            raise ValueError(f"{where}: size must be shortest_edge, or height and width, got {processor.size}")
    crop = None
    if getattr(processor, "do_center_crop", False):
        sides = {_entry(processor.crop_size, "height"), _entry(processor.crop_size, "width")}
        if len(sides) != 1:
            raise ValueError(f"{where}: kinoray crops squares, got crop_size {processor.crop_size}")
        crop = next(iter(sides))
    fed = crop or (resize_px[0] if resize == "exact" and resize_px and len(set(resize_px)) == 1 else side)
    if fed != side:
        raise ValueError(f"{where} makes frames of {fed} px, the network is made for {side} px")
    frames = next((config[name] for name in _FRAME_FIELDS if name in config), None)
    fps = getattr(processor, "fps", None)
    recipe = ClipRecipe(
        frames=frames,
        stride=1 if fps else _STRIDES.get((config["model_type"], frames or 0)),
        fps=float(fps) if fps else None,
        resize=cast(Any, resize),
        resize_px=resize_px,
        # A shortest side without a crop leaves frames that no network of a fixed side takes: the middle it is.
        crop_px=crop or (side if resize != "exact" else None),
        interpolation=cast(Any, _PILLOW[int(processor.resample)]) if processor.do_resize else "bilinear",
    )
    mean, std = _scaling(processor)
    _require_same(processor, InputSpec(rgb_mean=mean, rgb_std=std, recipe=recipe), square=crop is None, where=where)
    return recipe, mean, std


def _scaling(processor: Any) -> tuple[Any, Any]:
    """Mean and deviation of x / 255 that do what rescaling (by any factor, ViViT's minus 1) and normalising do."""
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    offset = bool(getattr(processor, "offset", type(processor).__name__ == "VivitVideoProcessor"))
    shift = 1.0 if processor.do_rescale and offset else 0.0
    means, stds = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    means, stds = ([x] * 3 if isinstance(x, (int, float)) else list(x) for x in (means, stds))
    # (factor * x - shift - m) / s  =  (x / 255 - (m + shift) / (255 factor)) / (s / (255 factor))
    unit = 255 * factor
    unit = 1.0 if math.isclose(unit, 1.0, rel_tol=1e-9) else unit
    return tuple((m + shift) / unit for m in means), tuple(s / unit for s in stds)


def _require_same(processor: Any, spec: InputSpec, *, square: bool, where: str) -> None:
    """Raise ValueError unless the processor does to a clip of noise what spec and recipe say, within 2 grey levels."""
    side = max(spec.recipe.resize_px or (spec.recipe.crop_px or 0,)) + 14
    generator = torch.Generator().manual_seed(0)
    height, width = side, side if square else side + 30
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    clip: Any = [frame.numpy() for frame in frames]
    arguments = {"do_sample_frames": False} if hasattr(processor, "do_sample_frames") else {}
    with quiet(library()), build_errors(f"{where} cannot do that to frames"):
        answer = processor(clip, return_tensors="pt", **arguments)
    theirs = cast(Tensor, next(iter(answer.values())))
    theirs = theirs if theirs.ndim == 4 else theirs[0]  # a picture processor's are frames, a video processor's a clip
    ours = preprocess(frames, spec)
    level = 2 / 255 / min(spec.rgb_std)
    if theirs.shape != ours.shape or float((theirs - ours).abs().max()) > level * 1.01:
        raise ValueError(f"{where} does more to frames than resize, crop and scale them: its networks cannot be fed")


def read_weights(root: Path, net: nn.Module) -> tuple[list[Path], dict[str, Tensor]]:
    """The folder's files of weights for a network laid out without memory, and all tensors in them.

    Raises:
        ValueError: there are none, or they cannot be read.
        WeightsMismatch: they are far larger or smaller than the network, or other than their index says.
    """
    files, places = _weight_files(root)
    _require_as_large(files, net, root)
    return files, _tensors(files, places)


def _weight_files(root: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The folder's safetensors if there are any, else its .bin: one file, or several and the names in each."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (root / name).is_file():
            return [root / name], None
        index = root / f"{name}.index.json"
        if not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: weight_map must map names to files")
        names = sorted(set(places.values()))
        for file in names:
            if Path(file).name != file or not file.endswith(Path(name).suffix):
                raise ValueError(f"{index}: shards lie beside their index, got {file!r:.100}")
        return [root / file for file in names], places
    raise ValueError(f"{root} has no model.safetensors and no pytorch_model.bin (nor an index of either)")


def _require_as_large(files: Sequence[Path], net: nn.Module, root: Path) -> None:
    """Raise WeightsMismatch, before memory is taken, where files and network differ in size far more than types do."""
    size_bytes = 0
    for file in files:
        try:
            with open_regular(file) as opened:
                size_bytes += os.fstat(opened.fileno()).st_size
        except OSError as error:
            raise ValueError(f"{file} cannot be opened: {error.strerror or error}") from error
    numbers = sum(tensor.numel() for tensor in net.state_dict().values())
    if not numbers - _SLACK <= size_bytes <= 16 * numbers + _SLACK:  # 2 to 8 bytes each, and twice that at the most
        raise WeightsMismatch(
            f"weights of {root} have {size_bytes:,} bytes and the network of its config {numbers:,} numbers: they "
            "cannot be of each other"
        )


def _tensors(files: Sequence[Path], places: Mapping[str, str] | None) -> dict[str, Tensor]:
    """All tensors of the files, which hold the names that their index says."""
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_state(file, option="weights"))
    if places is not None and set(state) != set(places):
        odd = sorted(set(state) ^ set(places))
        raise WeightsMismatch(f"{files[0].parent}: index and shards hold other names: {', '.join(odd[:8]):.500}")
    return state


def loaded(root: Path, net: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    """The library's network with these weights in float32, whose names the library translates from older versions.

    Raises WeightsMismatch: weights are missing, left over or of another shape.
    """
    with quiet(library()):
        made, report = cast(Any, type(net)).from_pretrained(
            None,
            config=net.config,
            state_dict=given,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    parts = (
        ("missing", report["missing_keys"]),
        ("not known", report["unexpected_keys"]),
        ("of another shape", [key[0] for key in report["mismatched_keys"]]),
        ("in error", report["error_msgs"]),
    )
    problems = [f"{len(keys)} {what}: {', '.join(sorted(map(str, keys))[:8])}" for what, keys in parts if keys]
    if problems:
        raise WeightsMismatch(f"weights of {root} do not fit {type(net).__name__}: {'; '.join(problems)}")
    return cast(nn.Module, made)
