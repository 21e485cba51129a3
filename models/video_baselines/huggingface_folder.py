"""A folder that Hugging Face's save_pretrained wrote, as options, weights and class names of a kinoray model.

Its JSON is read as data and its tensors as tensors; no code of the folder runs and the hub is not asked.

Shapes: T frames, Y X pixels, C channels
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from kinoray.network import ClipRecipe, InputSpec
from vcm_sdd.preprocess import preprocess
from vcm_sdd.weights import WeightsMismatch, read_state
from video_baselines.huggingface import (
    HubFrames,
    declared_entries,
    huggingface,
    known_model_types,
    library,
    quiet,
    square_side,
)
from video_baselines.streams import ClipClassifier

__all__ = ["HF_FILES", "HubNetwork", "read_folder"]

HF_FILES = ("config.json", "processor_config.json", "*preprocessor_config.json", "model*.safetensors*")
"""What read_folder needs of a repository (glob patterns); `pytorch_model*.bin*` where there are no safetensors."""

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


_MAX_JSON_CHARS = 2**26  # an index of shards names every weight


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_MAX_JSON_CHARS + 1)
        if len(text) > _MAX_JSON_CHARS:
            raise ValueError(f"it has more than {_MAX_JSON_CHARS:,} characters")
        body = json.loads(text)
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
    found = _read_json(root / "config.json")
    names = _class_names(found, root)
    config, ignored = _known_entries(found, len(names))
    recipe, mean, std = _processing(root, config, transformers)
    options = {
        "config": config,
        "rgb_mean": list(mean),
        "rgb_std": list(std),
        "recipe": dataclasses.asdict(recipe),
    }
    options = json.loads(json.dumps(options))  # tuples become lists here, not only when a checkpoint is written
    model = huggingface(num_classes=len(names), **options)
    state = _converted(root, model, transformers)
    return HubNetwork(
        options=options,
        state=state,
        class_names=names,
        spec=model.input_spec,
        ignored=ignored,
        library=f"transformers {transformers.__version__}",
    )


def _class_names(config: Mapping[str, Any], root: Path) -> tuple[str, ...]:
    labels = config.get("id2label")
    where = f"{root / 'config.json'}: id2label"
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{where} must name the classes, got {labels!r}")
    by_id = {str(key): value for key, value in labels.items()}
    wanted = [str(number) for number in range(len(by_id))]
    if set(by_id) != set(wanted) or not all(isinstance(name, str) for name in by_id.values()):
        raise ValueError(f"{where} must map the ids 0 to {len(by_id) - 1} to names, got {sorted(by_id)[:5]} and more")
    return tuple(by_id[number] for number in wanted)


def _known_entries(found: Mapping[str, Any], num_classes: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Every entry that the type's config declares, older names translated by the library, and what is left over."""
    transformers = library()
    known = known_model_types()
    if found.get("model_type") not in known:
        raise ValueError(f"config.model_type must be one of {', '.join(known)}, got {found.get('model_type')!r}")
    entries = {name: value for name, value in found.items() if name not in _ABOUT and not name.startswith("_")}
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.for_model(found["model_type"], num_labels=num_classes, **entries)
    except Exception as error:  # its checks raise kinds of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json is not one of {found['model_type']}: {reason}") from error
    declared = declared_entries(config, transformers)
    plain = {name: getattr(config, name) for name in sorted(declared)}
    # An older name that the library took over (VideoMAE's qkv_bias) is not left as an attribute of its own.
    ignored = tuple(sorted(name for name in entries if name not in declared and hasattr(config, name)))
    return {"model_type": found["model_type"], **plain}, ignored


def _processor(root: Path, transformers: Any) -> Any:
    """The folder's video processor, or its image processor, built by the library's own class out of the JSON."""
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
    from transformers.models.auto.video_processing_auto import video_processor_class_from_name

    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        if not (root / name).is_file():
            continue
        found = _read_json(root / name)
        entries = found.get("video_processor") or found.get("image_processor") or found
        kind = entries.get("video_processor_type")
        if kind is not None:
            made = video_processor_class_from_name(kind)
        else:
            kind = entries.get("image_processor_type") or entries.get("feature_extractor_type")
            base = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
            made = get_image_processor_class_from_name(base)
        if not (isinstance(made, type) and issubclass(made, BaseImageProcessor)):
            if name == "processor_config.json" and kind is None:
                continue  # of a tokenizer, say
            raise ValueError(f"{root / name}: the installed transformers has no processor {kind!r}")
        with quiet(transformers):
            return cast(Any, made).from_dict({key: value for key, value in entries.items() if key != "auto_map"})
    raise ValueError(
        f"{root} has no preprocessor_config.json: without it nobody knows how its network was fed; "
        "save the processor beside the model (processor.save_pretrained)"
    )


def _entry(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


def _processing(root: Path, config: Mapping[str, Any], transformers: Any) -> tuple[ClipRecipe, Any, Any]:
    """The processor as a recipe, a mean and a deviation; its own answer on a clip of noise must be the same."""
    processor = _processor(root, transformers)
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
    side = square_side(SimpleNamespace(**config))
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
    with quiet(library()):
        answer = processor(clip, return_tensors="pt", **arguments)
    theirs = cast(Tensor, next(iter(answer.values())))[0]
    ours = preprocess(frames, spec)
    level = 2 / 255 / min(spec.rgb_std)
    if theirs.shape != ours.shape or float((theirs - ours).abs().max()) > level * 1.01:
        raise ValueError(f"{where} does more to frames than resize, crop and scale them: its networks cannot be fed")


def _tensors(root: Path) -> dict[str, Tensor]:
    """All tensors of the folder: safetensors if there are any, else a .bin of tensors only; one file, or by index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (root / name).is_file():
            return read_state(root / name, option="weights")
        index = root / f"{name}.index.json"
        if not index.is_file():
            continue
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: weight_map must map names to files")
        state: dict[str, Tensor] = {}
        for file in sorted(set(places.values())):
            if Path(file).name != file:
                raise ValueError(f"{index}: shards lie beside their index, got {file!r}")
            state.update(read_state(root / file, option="weights"))
        if set(state) != set(places):
            odd = sorted(set(state) ^ set(places))
            raise WeightsMismatch(f"{index} and its shards do not hold the same names: {', '.join(odd[:8])}")
        return state
    raise ValueError(f"{root} has no model.safetensors and no pytorch_model.bin (nor an index of either)")


def _converted(root: Path, model: ClipClassifier, transformers: Any) -> dict[str, Tensor]:
    """The folder's weights under the names of the installed library, which translates those of older versions."""
    wrapped = cast(HubFrames, model.rgb_net)
    net = cast(Any, wrapped.net)
    with quiet(transformers):
        loaded, report = type(net).from_pretrained(
            None,
            config=net.config,
            state_dict=_tensors(root),
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
    wrapped.net = loaded
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
