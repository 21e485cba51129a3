"""What may stand where a network is asked for: a checkpoint, or the name of weights that somebody published.

    runs/first, s3://bucket/runs/first     a checkpoint or a run folder
    torchvision:NAME[:WEIGHTS]             a video weight set of the installed torchvision
    hf:FOLDER, hf:REPO[@REVISION]          a video classifier as Hugging Face's save_pretrained writes it; or a network
                                           that compares pictures with texts, and takes its classes in words
    i3d                                    DeepMind's I3D of Kinetics-400, by the user's own pip
    FILE.pth, FILE.safetensors             a state dict of a network that ships (import, or --init-from)
    timm:NAME[:FILE]                       a backbone (--init-from of tsn, tsm, vcm_sdd and vcm_sdd_x)

What is easy to break: a wrong name is refused before torch is imported, which takes seconds. So nothing here imports
it, and the names of torchvision's weights are read from its sources.
"""

import ast
import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from kinoray.config.files import FILE_SCHEME, foreign, local_path, local_uri
from kinoray.errors import CheckpointNotFound, ConfigError

__all__ = [
    "EXAMPLES",
    "SHORT_NAMES",
    "Source",
    "WeightName",
    "is_published",
    "is_whole",
    "parse_source",
    "torchvision_weights",
    "with_places",
]

SHORT_NAMES: Mapping[str, str] = {
    "vcm_sdd": "vcm_sdd:vcm_sdd",
    "vcm_sdd_r101": "vcm_sdd:vcm_sdd_r101",
    "vcm_sdd_x": "vcm_sdd:vcm_sdd_x",
    "artnet": "video_baselines:artnet",
    "eco": "video_baselines:eco",
    "huggingface": "video_baselines:huggingface",
    "i3d": "video_baselines:i3d",
    "i3d_nl": "video_baselines:i3d_nl",
    "image_text": "video_baselines:image_text",
    "lgd3d": "video_baselines:lgd3d",
    "mc3_18": "video_baselines:mc3_18",
    "mvit_v1_b": "video_baselines:mvit_v1_b",
    "mvit_v2_s": "video_baselines:mvit_v2_s",
    "r2plus1d_18": "video_baselines:r2plus1d_18",
    "r2plus1d_34": "video_baselines:r2plus1d_34",
    "r3d_18": "video_baselines:r3d_18",
    "s3d": "video_baselines:s3d",
    "s3dg": "video_baselines:s3dg",
    "slowfast": "video_baselines:slowfast",
    "slowfast_nl": "video_baselines:slowfast_nl",
    "stcnet": "video_baselines:stcnet",
    "stnet": "video_baselines:stnet",
    "swin3d_b": "video_baselines:swin3d_b",
    "swin3d_s": "video_baselines:swin3d_s",
    "swin3d_t": "video_baselines:swin3d_t",
    "tsm": "video_baselines:tsm",
    "tsn": "video_baselines:tsn",
    "two_stream_i3d": "video_baselines:two_stream_i3d",
}
"""Short names for the networks that ship with kinoray; anything else is `package:function`."""

Config = TypeVar("Config")
Kind = Literal["checkpoint", "torchvision", "hf", "i3d", "file", "timm"]

EXAMPLES = (
    "a checkpoint or run folder (runs/first, s3://bucket/runs/first), torchvision:mvit_v2_s, i3d, "
    "hf:FOLDER, hf:MCG-NJU/videomae-base-finetuned-kinetics, FILE.pth (`kinoray import` lists them)"
)
"""What can be given, for messages."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PREFIXES = ("torchvision", "hf", "timm")
_FILE_ENDINGS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
_TIMM_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A network that was asked for, by where it is."""

    kind: Kind
    name: str
    """The uri of a checkpoint, a network of torchvision or timm, a folder or repository, or a file."""
    variant: str = ""
    """Weight set of torchvision, revision of a repository, file of a timm backbone; empty for the default."""

    def __str__(self) -> str:
        """As it is written on a command line."""
        if self.kind in ("checkpoint", "file", "i3d"):
            return self.name
        mark = "@" if self.kind == "hf" else ":"
        return f"{self.kind}:{self.name}{mark if self.variant else ''}{self.variant}"

    @property
    def short(self) -> str:
        """Its name as part of the name of a folder."""
        text = "-".join(part for part in (self.kind, Path(self.name).name, self.variant) if part and part != "i3d")
        return re.sub(r"[^A-Za-z0-9_.]+", "-", text or self.kind).strip("-.")[:80] or self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightName:
    """A weight set of torchvision, as far as its source text says."""

    network: str
    name: str
    is_default: bool
    top1: float | None
    """Published accuracy on Kinetics-400 in percent."""


def is_published(text: str) -> bool:
    """Whether it is no checkpoint of ours, nor a file, but names one that others have published."""
    return bool(text) and (text == "i3d" or text.partition(":")[0] in _PREFIXES) and not _is_checkpoint(text)


def is_whole(text: str) -> bool:
    """Whether it is published, or a file, and has weights of a whole network, as far as its name says."""
    if is_published(text):
        return not text.startswith("timm:")
    return text.endswith(_FILE_ENDINGS) and not (_SCHEME.match(text) or _is_checkpoint(text))


_PLACES = (
    *("source", "catalog", "out", "predictions", "corrections", "annotations", "label_names", "labels", "join", "to"),
    *("add", "cache", "copy_videos", "rates", "prefix", "bucket", "a", "b", "checkpoint", "init_from", "ensemble"),
    *("videos", "classes"),
)
"""Settings that are addresses, in any verb."""


def with_places(config: Config) -> Config:
    """A verb's settings with ~/ and file:// as the paths that they mean; each is looked at before anything is imported.

    Raises:
        ConfigError: an address of another kind of store.
        What parse_source raises: of `checkpoint` and `init_from`.
    """
    changed: dict[str, Any] = {}
    for option in _PLACES:
        value = getattr(config, option, None)
        if isinstance(value, str):
            changed[option] = _place(option, value)
        elif isinstance(value, tuple):
            changed[option] = tuple(_place(option, item) if isinstance(item, str) else item for item in value)
    config = dataclasses.replace(cast(Any, config), **changed)
    for option in ("checkpoint", "init_from"):
        text = changed.get(option, "")
        if text:
            parse_source(text, option)
    return config


def _place(option: str, address: str) -> str:
    if problem := foreign(address):
        raise ConfigError(f"{option} {problem}")
    if address.startswith(("~", FILE_SCHEME)):
        return local_uri(os.path.expanduser(local_path(address)))
    return address


def parse_source(text: str, option: str) -> Source:
    """What the text names; a local checkpoint is looked for, other machines are not asked.

    A folder of that name with a checkpoint in it wins over the meaning of `i3d` and of prefixes.

    Args:
        option: the setting's name: checkpoint, init_from or source.

    Raises:
        CheckpointNotFound: no such file or folder, and no such source.
        ConfigError: a source that is malformed, or not one for this setting.
    """
    if not text or not text.isprintable():
        raise ConfigError(f"{option} must name a network, got {text!r}; what can be given: {EXAMPLES}")
    if _SCHEME.match(text) or _is_checkpoint(text):
        return Source(kind="checkpoint", name=text)
    prefix, _, rest = text.partition(":")
    if prefix == "torchvision":
        source = _torchvision(rest, option)
    elif prefix == "hf":
        source = _hugging_face(rest, option)
    elif prefix == "timm":
        source = _timm(rest, option)
    elif text == "i3d":
        source = Source(kind="i3d", name=text)
    else:
        source = _local(text, option)
    _require_fit(source, option)
    return source


def _is_checkpoint(text: str) -> bool:
    folder = Path(text).expanduser()
    return (folder / "checkpoint.json").is_file() or (folder / "checkpoints").is_dir()


def _require_fit(source: Source, option: str) -> None:
    """Refuse what is no network by itself, or needs to be told more than this setting can."""
    if source.kind == "timm" and option != "init_from":
        raise ConfigError(
            f"{option}: {source} is a backbone, which has no classes of its own: kinoray train SET --model.factory tsn "
            f"--init-from {source} --out RUN trains a network on it"
        )
    if source.kind == "file" and option == "checkpoint":
        raise ConfigError(
            f"{option}: {source} is a file of weights, which names no network and no classes: kinoray import {source} "
            "--model.factory NAME --labels FILE --out DIR makes a checkpoint of it, and --checkpoint DIR takes that"
        )


def _torchvision(rest: str, option: str) -> Source:
    name, _, weights = rest.partition(":")
    known = torchvision_weights()
    if name not in known:
        raise ConfigError(
            f"{option}: torchvision has no video weights of {name!r}{_meant(name, known)}; it has "
            f"{', '.join(known)} (such as torchvision:mvit_v2_s)"
        )
    names = [one.name for one in known[name]]
    if weights and weights not in (*names, "DEFAULT"):
        raise ConfigError(
            f"{option}: torchvision's {name} has no weight set {weights!r}{_meant(weights, names)}; it has "
            f"{', '.join(names)} (such as torchvision:{name}:{names[0]})"
        )
    if not weights or weights == "DEFAULT":
        weights = next(one.name for one in known[name] if one.is_default)
    return Source(kind="torchvision", name=name, variant=weights)


def _hugging_face(rest: str, option: str) -> Source:
    if rest and (Path(rest).expanduser() / "config.json").is_file():
        return Source(kind="hf", name=str(Path(rest).expanduser().resolve()))
    name, _, revision = rest.partition("@")
    is_path = rest.startswith((".", "/", "~")) or (rest != "" and Path(rest).expanduser().exists())
    if is_path or not _REPO.fullmatch(name) or (revision and not _REVISION.fullmatch(revision)) or rest.endswith("@"):
        if rest and Path(rest).expanduser().is_dir():
            reason = "is a folder without a config.json"
        elif is_path:
            reason = "is no such folder"
        else:
            reason = "is neither a folder nor a repository" + (f": there is no folder {name} here" if name else "")
        raise ConfigError(
            f"{option}: hf:{rest} {reason}; expected a folder that save_pretrained wrote, or hf:OWNER/NAME[@REVISION], "
            "such as hf:MCG-NJU/videomae-base-finetuned-kinetics"
        )
    return Source(kind="hf", name=name, variant=revision)


def _timm(rest: str, option: str) -> Source:
    name, _, file = rest.partition(":")
    if not _TIMM_NAME.fullmatch(name):
        raise ConfigError(f"{option}: timm:{rest} names no network of timm, such as timm:vit_small_patch16_224[:FILE]")
    if file and not Path(file).expanduser().is_file():
        raise ConfigError(f"{option}: timm:{rest}: {file} is not a file; expected a .safetensors or .pth of timm's")
    return Source(kind="timm", name=name, variant=os.path.abspath(os.path.expanduser(file)) if file else "")


def _local(text: str, option: str) -> Source:
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            raise ConfigError(
                f"{option}: {text} is no checkpoint of kinoray; it looks like a folder of Hugging Face's "
                f"save_pretrained: give it as hf:{text}"
            )
        return Source(kind="checkpoint", name=text)  # an s3 prefix and a folder say alike what they lack
    if path.is_file() and path.suffix in _FILE_ENDINGS:
        return Source(kind="file", name=str(path.resolve()))
    what = "is a file, but no weights (.pth, .safetensors)" if path.is_file() else "is not there"
    raise CheckpointNotFound(
        f"{option}: {text} is neither a checkpoint nor a run folder: it {what}{_near(text)}; what can be given: "
        f"{EXAMPLES}"
    )


def _near(text: str) -> str:
    """What may be meant by a text that is nothing: the right prefix, or a folder with nearly this name."""
    weights = torchvision_weights()
    if text in weights:
        return f" (did you mean torchvision:{text}?)"
    if text in SHORT_NAMES or text in SHORT_NAMES.values():
        return (
            f", and {text} is a network without weights (kinoray train SET --model.factory {text} --out RUN trains it)"
        )
    names = [f"torchvision:{name}" for name in weights] + ["i3d"]
    names += [f"torchvision:{name}:{one.name}" for name, sets in weights.items() for one in sets]
    parent = Path(text).expanduser().parent
    try:
        beside = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and _is_checkpoint(entry.path))
    except OSError:
        beside = []
    found = difflib.get_close_matches(Path(text).name, beside, n=1)
    if found:
        return f" (did you mean {Path(text).parent / found[0]}?)"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not parent.exists():
        return f" (did you mean hf:{text}?)"
    return _meant(text, names)


def _meant(text: str, known: Sequence[str] | Mapping[str, object]) -> str:
    found = difflib.get_close_matches(text, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def torchvision_weights() -> dict[str, tuple[WeightName, ...]]:
    """The video weight sets of the installed torchvision, by network; nothing of it is imported.

    In its sources a network is a function under `register_model`, whose `weights` is annotated with an enum.
    """
    spec = importlib.util.find_spec("torchvision")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found: dict[str, tuple[WeightName, ...]] = {}
    for path in sorted(path for folder in folders for path in Path(folder).glob("models/video/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        enums = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any("register_model" in ast.dump(x) for x in node.decorator_list):
                annotated = [argument.annotation for argument in node.args.kwonlyargs if argument.arg == "weights"]
                named = {x.id for part in annotated if part for x in ast.walk(part) if isinstance(x, ast.Name)}
                for enum in named & enums.keys():
                    found[node.name] = _members(node.name, enums[enum])
    return dict(sorted(found.items()))


def _members(network: str, enum: ast.ClassDef) -> tuple[WeightName, ...]:
    values = {
        target.id: node.value
        for node in enum.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    default = values.pop("DEFAULT", None)
    return tuple(
        WeightName(
            network=network,
            name=name,
            is_default=isinstance(default, ast.Name) and default.id == name,
            top1=_top1(value),
        )
        for name, value in values.items()
    )


def _top1(weights: ast.expr) -> float | None:
    for node in ast.walk(weights):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "acc@1" and isinstance(value, ast.Constant):
                    return float(value.value)  # type: ignore[arg-type]
    return None
