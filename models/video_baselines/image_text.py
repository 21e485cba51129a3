"""Classes from words: networks of Hugging Face's transformers that compare pictures with texts.

    f_t = image tower(frame t) / |.|        v = mean_t f_t / |.|        CLIP, SigLIP, SigLIP 2
    logit_k = exp(logit_scale) * (v . t_k) + logit_bias                 t_k: the unit feature of class k (no bias: CLIP)

X-CLIP (Ni et al., 2022) sees the frames together, and moves each t_k by what it saw. Texts are read once, when a folder
is imported: what is easy to break is that t_k are weights then, those of the classifier, so that whoever labels needs
neither tokenizer nor text tower, and other classes are another network. What goes into that classifier, v, is the
embedding, so a text's own unit feature (embed_text) finds videos in a table of them.

Shapes: M videos, T frames, C channels, Y X pixels, P side of a patch, N patches, D features, K classes
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinoray.network import Words, WordsError
from vcm_sdd.weights import WeightsMismatch, open_regular
from video_baselines.huggingface import (
    build_errors,
    declared_entries,
    fed_spec,
    library,
    quiet,
    require_bounded,
    require_small_table,
)
from video_baselines.huggingface_folder import HubNetwork, loaded, processing, read_json, read_weights
from video_baselines.streams import ClipClassifier, require_count

__all__ = ["PROMPTS", "TEXT_TYPES", "embed_text", "image_text", "model_type_of", "read_words"]

TEXT_TYPES = ("clip", "siglip", "siglip2", "xclip")
"""Model types of the library that are built here."""

PROMPTS = ("a video of {}.", "a video of a person {}.", "a photo of {}.", "a photo of a person {}.")
"""What is said of a class whose user says nothing. X-CLIP was trained on names alone."""

_FRAMES = 8  # of a video, for a tower that sees one picture: spread over all of it
_NO_TEXT = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 1
)
_TEXTS_AT_ONCE = 64
_MAX_TOKENIZER_BYTES = 2**27  # Gemma's, with 256,000 words, has 34 MB
_ABOUT = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "_name_or_path"}


# The network


class WordClassifier(nn.Module):
    """The towers for pictures of one network, and the features of the classes: [M, T, C, Y, X] -> logits [M, K]."""

    def __init__(self, net: nn.Module, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.net = net
        self.classifier = nn.Linear(num_features, num_classes, bias=False)
        self.classifier.is_classifier = True  # type: ignore[assignment]

    def forward(self, frames_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]."""
        net = cast(Any, self.net)
        moves_MKD = None
        if net.config.model_type == "xclip":
            video_MD, moves_MKD = self._frames_together(frames_MTCYX)
        else:
            images_MTD = self._pictures(frames_MTCYX.flatten(0, 1)).unflatten(0, frames_MTCYX.shape[:2])
            video_MD = F.normalize(images_MTD.float(), dim=-1).mean(dim=1)
        with _float32(frames_MTCYX.device.type):  # a scale of 100 makes half a logit of bfloat16's third digit
            video_MD = F.normalize(video_MD.float(), dim=-1)
            cosine_MK: Tensor = self.classifier(video_MD)
            if moves_MKD is not None:
                moves_MKD = moves_MKD.float()
                cosine_MK = cosine_MK + (moves_MKD @ video_MD[..., None]).squeeze(-1)
                cosine_MK = cosine_MK / (self.classifier.weight + moves_MKD).norm(dim=-1)
            logits_MK = net.logit_scale.exp() * cosine_MK
            return logits_MK + net.logit_bias if hasattr(net, "logit_bias") else logits_MK

    def _pictures(self, frames_FCYX: Tensor) -> Tensor:
        """Features [F, D] of frames, each by itself."""
        net = cast(Any, self.net)
        if net.config.model_type != "siglip2":
            return cast(Tensor, net.get_image_features(pixel_values=frames_FCYX).pooler_output)
        side = net.config.vision_config.patch_size
        grid_FCNPNP = frames_FCYX.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches_FN = grid_FCNPNP.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.tensor(grid_FCNPNP.shape[2:5:2], device=frames_FCYX.device)
        answer = net.get_image_features(
            pixel_values=patches_FN,
            pixel_attention_mask=None,  # no frame is padded
            spatial_shapes=grid.expand(len(frames_FCYX), 2),
        )
        return cast(Tensor, answer.pooler_output)

    def _frames_together(self, frames_MTCYX: Tensor) -> tuple[Tensor, Tensor]:
        """X-CLIP's feature of each video [M, D], and by how much it moves the feature of each class [M, K, D]."""
        net, shape = cast(Any, self.net), frames_MTCYX.shape[:2]
        seen = net.vision_model(pixel_values=frames_MTCYX.flatten(0, 1))
        frames_MTD = net.visual_projection(seen.pooler_output).unflatten(0, shape)
        patches = net.prompts_visual_layernorm(seen.last_hidden_state[:, 1:]) @ net.prompts_visual_projection
        patches_MND = patches.unflatten(0, shape).mean(dim=1)
        texts_MKD = self.classifier.weight.expand(shape[0], -1, -1)
        return net.mit(frames_MTD).pooler_output, net.prompts_generator(texts_MKD, patches_MND)


def _float32(device: str) -> contextlib.AbstractContextManager[object]:
    """No autocast inside; where there is none (meta) nothing."""
    is_there = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_there else contextlib.nullcontext()


def image_text(
    *,
    num_classes: int,
    config: Mapping[str, Any],
    rgb_mean: tuple[float, float, float],
    rgb_std: tuple[float, float, float],
    recipe: Mapping[str, Any] | None = None,
) -> ClipClassifier:
    """Build the towers for pictures of a network of TEXT_TYPES, random, and a classifier for what was said of classes.

    config: model_type, `vision_config`, and the other entries of that type's config but `text_config`. The others: as
    of video_baselines.huggingface. All frames of a video, S x T, are seen at once; X-CLIP takes its number, one of each
    segment. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    if not isinstance(config, Mapping) or config.get("model_type") not in TEXT_TYPES:
        found = config.get("model_type") if isinstance(config, Mapping) else config
        raise ValueError(f"config.model_type must be one of {', '.join(TEXT_TYPES)}, got {found!r:.100}")
    kind = config["model_type"]
    entries = {name: value for name, value in config.items() if name != "model_type"}
    _require_declared(entries, declared_entries(kind) - {"text_config"}, "config")
    _require_declared(entries.get("vision_config"), declared_entries(f"{kind}_vision_model"), "config.vision_config")
    built = _config(kind, {**entries, "vision_config": dict(entries["vision_config"]), "text_config": dict(_NO_TEXT)})
    vision = built.vision_config
    spec = fed_spec(vision, rgb_mean, rgb_std, recipe)
    if kind == "xclip":
        spec = dataclasses.replace(spec, num_segments=vision.num_frames, frames_per_segment=1)
    with quiet(library()), build_errors("config: its network cannot be built"):
        net = library().AutoModel.from_config(built, trust_remote_code=False)
        for name in ("text_model", "text_projection"):
            if hasattr(net, name):
                delattr(net, name)
        num_features = built.projection_dim if kind in ("clip", "xclip") else vision.hidden_size
        return ClipClassifier(spec, rgb_net=WordClassifier(net, num_classes, num_features), grouping="video")


def _require_declared(entries: Any, declared: set[str], where: str) -> None:
    """Raise ValueError unless they are entries of that config: the library would take any other name, too."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} must be entries of a config, got {entries!r:.100}")
    if unknown := sorted(set(entries) - declared):
        raise ValueError(f"{where}.{unknown[0]:.100} is not an entry of such a config")


def _config(kind: str, entries: Mapping[str, Any]) -> Any:
    """The library's config of both towers, bounded. Raises ValueError."""
    transformers = library()
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.for_model(kind, **entries)
    except Exception as error:  # its checks raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config is not one of {kind}: {reason}") from error
    require_bounded(config, declared_entries(kind))
    for tower in ("vision", "text"):
        require_bounded(getattr(config, f"{tower}_config"), declared_entries(f"{kind}_{tower}_model"))
    require_small_table(config.vision_config)
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError("config.vision_config.vision_use_head must be true: without it a picture has no feature")
    return config


# A folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """Both towers of a folder, with their weights."""

    root: Path
    net: Any
    config: dict[str, Any]
    """As image_text takes it."""
    ignored: tuple[str, ...]
    files: tuple[Path, ...]


def model_type_of(folder: str | Path) -> str:
    """What config.json calls its network; "" where it says nothing. Raises ValueError: there is none."""
    kind = read_json(Path(folder) / "config.json").get("model_type")
    return kind if isinstance(kind, str) else ""


def read_words(folder: str | Path, words: Words) -> HubNetwork:
    """Read a folder of save_pretrained, with its tokenizer, as a network whose classes are these.

    Raises:
        ValueError: a file is missing or does not hold what it should.
        WordsError: a class cannot be said to this network.
        WeightsMismatch: weights are missing, left over or of another shape; the message names them.
    """
    opened = _open(Path(folder))
    kind, vision = opened.config["model_type"], opened.config["vision_config"]
    recipe, mean, std = processing(opened.root, {"model_type": kind, **vision}, library())
    if kind == "siglip2":  # which sees pictures in their own shape: the square in the middle, not a squeezed one
        recipe = dataclasses.replace(recipe, resize="shortest", crop_px=max(recipe.resize_px or (0,)))
    frames = vision["num_frames"] if kind == "xclip" else _FRAMES
    recipe = dataclasses.replace(recipe, frames=1, segments=frames, stride=None, fps=None)
    options = {"config": opened.config, "rgb_mean": mean, "rgb_std": std, "recipe": dataclasses.asdict(recipe)}
    options = json.loads(json.dumps(options))  # tuples become lists here, not only when a checkpoint is written
    prompts = _prompts(words, kind)
    texts = list(dict.fromkeys(text for said in prompts.values() for text in said))
    features = dict(zip(texts, _features(opened, texts), strict=True))
    classes_KD = [torch.stack([_heard(features[text], kind) for text in said]).mean(dim=0) for said in prompts.values()]
    weights = {
        f"rgb_net.net.{name}": tensor.detach()
        for name, tensor in opened.net.state_dict().items()
        if not name.startswith(("text_model.", "text_projection."))
    }
    weights["rgb_net.classifier.weight"] = torch.stack([_heard(mean_D, kind) for mean_D in classes_KD])
    with torch.device("meta"):
        spec = image_text(num_classes=len(prompts), **options).input_spec
    return HubNetwork(
        options=options,
        state=weights,
        class_names=words.names,
        spec=spec,
        ignored=opened.ignored,
        library=f"transformers {library().__version__}",
        files=opened.files,
        prompts=prompts,
    )


def embed_text(folder: str | Path, text: str) -> tuple[Tensor, tuple[Path, ...]]:
    """The unit feature of a text, float32 [D], and the files of weights that it is of.

    It is in the space of the embeddings of read_words's network. (X-CLIP's are compared with texts that it moves; this
    one is as it was read.)

    Raises:
        ValueError, WordsError, WeightsMismatch: as read_words.
    """
    opened = _open(Path(folder))
    return F.normalize(_features(opened, [text])[0], dim=-1), opened.files


def _open(root: Path) -> _Opened:
    """The folder's network. Raises as read_words."""
    found = read_json(root / "config.json")
    kind = model_type_of(root)
    if kind not in TEXT_TYPES:
        raise WordsError(
            f"{root} is of type {kind!r:.100}, which does not compare pictures with texts "
            f"({', '.join(TEXT_TYPES)} do), so it takes no classes in words"
        )
    own = declared_entries(kind) - {"text_config", "vision_config"}
    entries: dict[str, Any] = {name: value for name, value in found.items() if name in own}
    for tower in ("vision", "text"):
        given: dict[str, Any] = {}
        for name in (f"{tower}_config", f"{tower}_config_dict"):  # the second is of older versions, and wins there
            part = found.get(name)
            if part is not None and not isinstance(part, dict):
                raise ValueError(f"{root / 'config.json'}: {name} must be an object, got {part!r:.100}")
            given.update(part or {})
        known = declared_entries(f"{kind}_{tower}_model")
        entries[f"{tower}_config"] = {name: value for name, value in given.items() if name in known}
    config = _config(kind, entries)
    with torch.device("meta"), quiet(library()), build_errors("config.json: its network cannot be built"):
        outline = library().AutoModel.from_config(config, trust_remote_code=False)
    files, weights = read_weights(root, outline)
    if not any("text_model." in name for name in weights):
        raise WeightsMismatch(f"{root} has no text tower in its weights: save the whole {type(outline).__name__}")
    towers = {name: value for name, value in weights.items() if not name.endswith("position_ids")}  # of older versions
    vision = {name: getattr(config.vision_config, name) for name in declared_entries(f"{kind}_vision_model")}
    plain = {name: getattr(config, name) for name in own}
    left_out = (
        found.keys() - own - _ABOUT - {f"{tower}_config{end}" for tower in ("text", "vision") for end in ("", "_dict")}
    )
    return _Opened(
        root=root,
        net=loaded(root, outline, towers).eval(),
        config={"model_type": kind, **dict(sorted(plain.items())), "vision_config": dict(sorted(vision.items()))},
        ignored=tuple(sorted(name for name in left_out if not name.startswith("_"))),
        files=tuple(files),
    )


# What is said of classes


def _prompts(words: Words, kind: str) -> dict[str, tuple[str, ...]]:
    """The texts that stand for each class."""
    usual = ("{}",) if kind == "xclip" else PROMPTS
    return {
        name: (text,) if text else tuple(said.replace("{}", name.replace("_", " ")) for said in words.prompts or usual)
        for name, text in zip(words.names, words.texts, strict=True)
    }


def _heard(feature_D: Tensor, kind: str) -> Tensor:
    """A text's feature as it is averaged and compared: X-CLIP's has a length until it was moved."""
    return feature_D if kind == "xclip" else F.normalize(feature_D, dim=-1)


def _features(opened: _Opened, texts: Sequence[str]) -> Tensor:
    """Features of texts, float32 [texts, D], as the text tower gives them. Raises as read_words."""
    tokens = _tokens(opened, texts)
    by_length: dict[int, list[int]] = {}
    for place, found in enumerate(tokens):
        by_length.setdefault(len(found), []).append(place)
    rows: dict[int, Tensor] = {}
    for places in by_length.values():  # of equal length, so that none is padded
        for begin in range(0, len(places), _TEXTS_AT_ONCE):
            some = places[begin : begin + _TEXTS_AT_ONCE]
            with torch.no_grad(), build_errors(f"{opened.root}: its text tower fails"):
                answer = opened.net.get_text_features(input_ids=torch.tensor([tokens[place] for place in some]))
            rows.update(zip(some, answer.pooler_output.float(), strict=True))
    return torch.stack([rows[place] for place in range(len(texts))])


def _tokens(opened: _Opened, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. Raises WordsError where one has more than the text tower takes."""
    config, kind = opened.net.config.text_config, opened.config["model_type"]
    is_siglip = kind.startswith("siglip")  # trained on lower case, and on texts of full length, padding and all
    tokenizer = _tokenizer(opened.root)
    padding, side = _padding(opened.root, tokenizer, config) if is_siglip else (0, "right")
    found = []
    for text in texts:
        ids: list[int] = tokenizer.encode(text.lower() if is_siglip else text).ids
        limit = config.max_position_embeddings
        if len(ids) > limit:
            raise WordsError(
                f"{text!r:.300} has {len(ids)} tokens, its text tower takes {limit}: say it in fewer words"
            )
        if is_siglip:
            pad = [padding] * (limit - len(ids))
            ids = pad + ids if side == "left" else ids + pad
        elif kind == "clip" and config.eos_token_id not in (2, *ids):  # 2: older files, which look for the highest
            raise ValueError(
                f"{opened.root / 'tokenizer.json'} ends no text with token {config.eos_token_id}, where the text tower "
                "looks for its feature: it is of another network"
            )
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(
                f"{opened.root / 'tokenizer.json'} makes tokens {ids[:8]} of {text!r:.100}, the text tower knows "
                f"0 .. {config.vocab_size - 1}: it is of another network"
            )
        found.append(ids)
    return found


def _tokenizer(root: Path) -> Any:
    """The folder's tokenizer.json, read by the library's own parser: a vocabulary and rules, no code."""
    file = root / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{root} has no tokenizer.json: save the tokenizer beside the model "
            "(transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        )
    from tokenizers import Tokenizer  # comes with transformers, whose lack was said before

    try:
        with open_regular(file) as opened:
            data = opened.read(_MAX_TOKENIZER_BYTES + 1)
        if len(data) > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"it has more than {_MAX_TOKENIZER_BYTES:,} bytes")
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the parser has no kind of its own
        raise ValueError(f"{file} cannot be read as a tokenizer: {' '.join(str(error).split())[:300]}") from error
    tokenizer.no_truncation()  # a text that is too long is refused
    tokenizer.no_padding()
    return tokenizer


def _padding(root: Path, tokenizer: Any, config: Any) -> tuple[int, str]:
    """The token that a short text is filled up with, and at which end."""
    token, side = None, "right"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(root / name) if (root / name).is_file() else {}
        entry = found.get("pad_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        token = content if isinstance(content, str) else token
        side = "left" if found.get("padding_side") == "left" else side
    number = None if token is None else tokenizer.token_to_id(token)
    return (config.pad_token_id or 0) if number is None else number, side
