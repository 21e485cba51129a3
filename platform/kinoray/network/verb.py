"""`kinoray import`: weights that somebody published become a checkpoint; without a source, what there is to import."""

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from kinoray.config.clip import ClipConfig
from kinoray.config.scoring import Prompts
from kinoray.config.shared import ModelConfig, StoreConfig
from kinoray.console import table
from kinoray.errors import ConfigError
from kinoray.network.resolve import SHORT_NAMES, Source, is_published, parse_source, torchvision_weights

__all__ = [
    "ImportConfig",
    "import_network",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(StoreConfig):
    """Make a checkpoint of a network that somebody published: weights, classes, how it was fed, where it is from.

    Example: kinoray import torchvision:mvit_v2_s --out networks/mvit

    Without SOURCE it lists the networks that ship and what can be imported. With the name of one that ships, or
    `package:function`, and without --out it says what that one costs, part by part. `label`, `evaluate`, `calibrate`
    and `bench` take a SOURCE as --checkpoint, `train` and `tune` as --init-from, and import it by themselves; import it
    to s3:// for a cluster. No code of a source runs: weights are read as data, and the networks are those that ship.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = ""
    """torchvision:NAME[:WEIGHTS], i3d, hf:FOLDER, hf:OWNER/NAME[@REVISION], or a .safetensors or .pth file with
    model.factory; or a network to describe. Default: list them."""
    out: str = ""
    """Folder or s3:// prefix of the new checkpoint."""
    labels: str = ""
    """Text file of class names, one a line in the order of the network's logits. Default: the source's own."""
    classes: str = ""
    """Text file of classes in words, one a line, as `name` or `name: text`, for a hf: source that compares pictures
    with texts (CLIP, SigLIP, X-CLIP)."""
    prompts: Prompts = ()
    """A sentence with {} for the name of a class, instead of the usual ones (docs/models.md). May be given several
    times: the mean of what all say stands for the class."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(factory=""))
    """The network that a file of weights is of, other sources say it themselves; options of one to describe."""


def import_network(config: ImportConfig) -> None:
    """Write the source's checkpoint to config.out and say what it is; list what can be imported where none is given.

    Raises:
        ConfigError: the source or another setting is wrong.
        CheckpointNotFound: nothing is where the source says.
        KinorayError: as `kinoray.network.published.import_source`.
    """
    if not config.source:
        _print_known()
        return
    if not config.out and _names_network(config.source):
        from kinoray.network.cost import describe_model  # torch, which takes seconds

        describe_model(replace(config.model, factory=config.source))
        return
    source = parse_source(config.source, "source")
    if source.kind == "checkpoint":
        raise ConfigError(f"source: {source} is a checkpoint or run folder already: give it to --checkpoint as it is")
    if not config.out:
        raise ConfigError("out must be the folder or s3:// prefix of the new checkpoint")
    _import(source, config)


def _names_network(text: str) -> bool:
    """Whether it is a factory: a short name, or `package:function`."""
    return text in SHORT_NAMES or (":" in text and "/" not in text and not is_published(text))


def _import(source: Source, config: ImportConfig) -> None:
    from kinoray.network.checkpoint import META_FILE  # torch, which takes seconds
    from kinoray.network.published import import_source, read_lines, words_of
    from kinoray.storage.objects import Storage, absolute, join
    from kinoray.storage.records import require_folder

    labels = read_lines(config.labels, "labels") if config.labels else ()
    words = words_of(source, config.classes, config.prompts)
    if labels and words:
        raise ConfigError("labels must be left out with classes, which are the network's class names")
    storage, out = Storage(config.storage), absolute(config.out)
    require_folder(storage, "out", config.out, "import")
    if storage.exists(join(out, META_FILE)):
        raise ConfigError(f"out {out} holds a checkpoint already; give another folder, or delete it")
    meta, notes = import_source(storage, source, out, model=config.model, labels=labels, words=words)
    origin = meta.origin
    assert origin is not None
    accuracy = " and ".join(
        f"top-{k} {value:g}%" for k, value in ((1, origin.top1), (5, origin.top5)) if value is not None
    )
    rows = [
        ("wrote", out),
        ("network", meta.model.factory),
        ("classes", f"{len(meta.labels)}: {', '.join(meta.labels[:3])}{', ...' if len(meta.labels) > 3 else ''}"),
        ("prompts", " | ".join(next(iter(origin.fed.get("prompts", {"": ()}).values())))),
        ("clip", _clip_in_words(meta.clip)),
        ("from", origin.source),
        ("sha256", origin.sha256),
        ("licence", origin.licence or "the source names none"),
        ("published", accuracy or "the source names no accuracy"),
        ("recipe", origin.recipe),
        *(("note", note) for note in notes),
    ]
    print("\n".join(table([row for row in rows if row[1]])))
    print(f"next: kinoray label VIDEOS --checkpoint {config.out} --out OUT", flush=True)


def _clip_in_words(clip: ClipConfig) -> str:
    """`1 x 64 frames 1 apart at 25 fps, short_side 256 px, bilinear, crop 224 px`."""
    sample, view = clip.sample, clip.view
    frames = f"{sample.num_segments} x {sample.frames_per_segment} frames"
    if sample.is_dense:
        frames += f" {sample.stride} apart" + (f" at {sample.fps:g} fps" if sample.fps else "")
    else:
        frames += " spread over the video"
    sides = f"{view.resize_px} x {view.resize_width_px}" if view.resize_width_px else f"{view.resize_px}"
    return f"{frames}, {view.resize} {sides} px, {view.interpolation}, crop {view.crop_px} px"


def _print_known() -> None:
    print(f"networks that ship (kinoray import NAME says what one costs): {', '.join(sorted(SHORT_NAMES))}\n")
    rows = [("SOURCE", "TOP-1", "WHAT IT IS")]
    for sets in torchvision_weights().values():
        for one in sets:
            name = f"torchvision:{one.network}" + ("" if one.is_default else f":{one.name}")
            rows.append((name, f"{one.top1:.1f}" if one.top1 else "", "Kinetics-400, of the installed torchvision"))
    rows += [
        ("i3d", "71.1", "Kinetics-400, DeepMind's I3D, by your pip (47 MB)"),
        ("hf:FOLDER", "", "what Hugging Face's save_pretrained wrote: VideoMAE, TimeSformer, ViViT, V-JEPA 2, ..."),
        ("", "", "with --classes FILE what compares pictures with texts: CLIP, SigLIP, SigLIP 2, X-CLIP"),
        ("hf:OWNER/NAME[@REVISION]", "", "the same from the hub (pip install 'kinoray[hf]')"),
        ("FILE.pth, FILE.safetensors", "", "a state dict of a network that ships: --model.factory NAME --labels FILE"),
    ]
    print("\n".join(table(rows)))
    print("TOP-1 as published, in percent. kinoray import SOURCE --out DIR makes a checkpoint of one; --checkpoint and")
    print("--init-from take SOURCE, too. timm:NAME[:FILE] is a backbone: --init-from of tsn, tsm, vcm_sdd, vcm_sdd_x.")
