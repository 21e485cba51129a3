"""A folder of Hugging Face's save_pretrained with a text tower, and classes in words, as a network of image_text.

Read as video_baselines.huggingface_folder reads: JSON and tensors as data, no code of the folder, no hub. What is easy
to break: a text is read as the network was trained to read it (case, length, padding), and never cut.

Shapes: D features, K classes
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kinoray.network import Words, WordsError
from vcm_sdd.weights import WeightsMismatch, open_regular
from video_baselines.huggingface import build_errors, declared_entries, library, quiet
from video_baselines.huggingface_folder import HubNetwork, loaded, processing, read_json, read_weights
from video_baselines.image_text import TEXT_TYPES, both_towers, image_text

__all__ = ["PROMPTS", "embed_text", "model_type_of", "read_words"]

PROMPTS = ("a video of {}.", "a video of a person {}.", "a photo of {}.", "a photo of a person {}.")
"""What is said of a class whose user says nothing. X-CLIP was trained on names alone."""

_FRAMES = 8  # of a video, for a tower that sees one picture: spread over all of it
_TEXTS_AT_ONCE = 64
_MAX_TOKENIZER_BYTES = 2**27  # Gemma's, with 256,000 words, has 34 MB
_TOKENIZER_MEMORY = 2**33
_TOKENIZER_S = 60.0  # and a millisecond a text
_ABOUT = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "_name_or_path"}


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
    options = _as_json(options)  # here, and not only when a checkpoint is written
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
    config = both_towers(kind, entries)
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


def _as_json(value: Any) -> Any:
    """With lists for tuples, as it is read back from a file."""
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


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
    token, side = _padding(opened.root) if is_siglip else (None, "right")
    file, limit = opened.root / "tokenizer.json", config.max_position_embeddings
    answer = _tokenized(file, [text.lower() if is_siglip else text for text in texts], limit, token)
    padding = (config.pad_token_id or 0) if answer["padding"] is None else answer["padding"]
    found = []
    for text, (count, ids) in zip(texts, answer["tokens"], strict=True):
        if count > limit:
            raise WordsError(f"{text!r:.300} has {count} tokens, its text tower takes {limit}: say it in fewer words")
        if is_siglip:
            pad = [padding] * (limit - len(ids))
            ids = pad + ids if side == "left" else ids + pad
        elif kind == "clip" and config.eos_token_id not in (2, *ids):  # 2: older files, which look for the highest
            raise ValueError(
                f"{file} ends no text with token {config.eos_token_id}, where the text tower looks for its feature: it "
                "is of another network"
            )
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(
                f"{file} makes tokens {ids[:8]} of {text!r:.100}, the text tower knows 0 .. {config.vocab_size - 1}: "
                "it is of another network"
            )
        found.append(ids)
    return found


_TOKENIZE = """
import json, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from tokenizers import Tokenizer
asked = json.loads(sys.stdin.buffer.readline())
tokenizer = Tokenizer.from_str(sys.stdin.buffer.read().decode())
tokenizer.no_truncation()  # a text that is too long is refused
tokenizer.no_padding()
tokens = []
for text in asked["texts"]:
    ids = tokenizer.encode(text).ids
    tokens.append([len(ids), ids if len(ids) <= asked["limit"] else []])
padding = asked["padding"]
print(json.dumps({"tokens": tokens, "padding": None if padding is None else tokenizer.token_to_id(padding)}))
"""


def _tokenized(file: Path, texts: Sequence[str], limit: int, padding: str | None) -> dict[str, Any]:
    """By a folder's tokenizer.json: of each text the number of its tokens and, of at most `limit`, these; and the
    number of the token `padding`.

    It is a vocabulary and rules, no code, and the library's own parser reads it. But rules may double a text forty
    times, or look for a pattern for ever, so that runs in a process of its own, of bounded memory and time.

    Raises:
        ValueError: it is no tokenizer, or one that gives no tokens.
    """
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has no tokenizer.json: save the tokenizer beside the model "
            "(transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        )
    with open_regular(file) as opened:
        data = opened.read(_MAX_TOKENIZER_BYTES + 1)
    if len(data) > _MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} has more than {_MAX_TOKENIZER_BYTES:,} bytes")
    asked = json.dumps({"texts": list(texts), "limit": limit, "padding": padding}).encode()
    timeout_s = _TOKENIZER_S + len(texts) / 1000
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TOKENIZE, str(_TOKENIZER_MEMORY)],
            input=asked + b"\n" + data,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{file} gave no tokens in {timeout_s:.0f} s") from error
    if done.returncode < 0:
        most = f"{_TOKENIZER_MEMORY / 2**30:g} GiB"
        raise ValueError(f"{file} cannot be read as a tokenizer: its rules take more than {most}, or end the reader")
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(said) if line.strip()), f"its process ended with {done.returncode}")
        raise ValueError(f"{file} cannot be read as a tokenizer: {reason[:300]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _padding(root: Path) -> tuple[str | None, str]:
    """The token that a short text is filled up with, where a file says it, and at which end."""
    token, side = None, "right"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(root / name) if (root / name).is_file() else {}
        entry = found.get("pad_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        token = content if isinstance(content, str) else token
        side = "left" if found.get("padding_side") == "left" else side
    return token, side
