"""`kinoray train`: check everything that can be checked without a cluster, run the workers, say what came of it."""

import time
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.func import functional_call

from kinoray.catalog.folders import set_problems
from kinoray.catalog.table import Catalog, load_catalog
from kinoray.config.shared import ClipConfig, ModelConfig, OptimConfig, require
from kinoray.console import draw_step, format_duration, kept_if_interrupted, many, visible
from kinoray.errors import CatalogError, ConfigError
from kinoray.network.batch import FLOW_CHANNELS
from kinoray.network.build import (
    START_OPTIONS,
    VideoModel,
    build_model,
    build_outline,
    check_clip,
    is_shipped,
    is_split,
    recipe_departures,
    require_known_model,
    without_start_weights,
)
from kinoray.network.checkpoint import CheckpointMeta, best_of, load_meta
from kinoray.network.published import checkpoint_of
from kinoray.network.resolve import Source, is_whole, parse_source
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import require_folder
from kinoray.train.config import TrainConfig
from kinoray.train.job import Gate, run_workers
from kinoray.train.recipe import rate_factors
from kinoray.train.recorder import draw_curves
from kinoray.train.runfolder import RunFolder, run_settings, stopped_early
from kinoray.train.runs import Heartbeat
from kinoray.train.state import start_from
from kinoray.train.tracking import require_tracker, tracked

__all__ = ["check_training", "train", "with_start"]

Checkpoint = tuple[str, CheckpointMeta]
Settings = TypeVar("Settings", bound=TrainConfig)
Part = TypeVar("Part", bound=Any)
_TIMM_NETWORKS = ("tsn", "tsm", "vcm_sdd", "vcm_sdd_x")


def train(config: TrainConfig, gate: Gate | None = None) -> dict[str, Any]:
    """Train to the last epoch, or go on with the run that is in config.out; returns its totals.

    A gate is shown each epoch's row and may end the run there: the totals are then those so far.

    Raises:
        ConfigError: a setting is wrong, or config.out holds what is not this run's, or cannot be written.
        CatalogError: the catalog lacks the split, or labels in it.
        ClusterError: the job does not fit the cluster.
        TooManyBad: more than max_bad_fraction of the training videos could not be read.
        TrainingDiverged: the loss is no longer a number.
        JobError: workers failed more than max_failures times.
        StorageError, CheckpointError: as named.
    """
    start_s = time.monotonic()
    storage = Storage(config.storage)
    require_folder(storage, "out", config.out, "train")
    config = replace(config, catalog=absolute(config.catalog), out=absolute(config.out))
    if config.init_from:
        config = with_start(config, "train")
    init_from = config.init_from
    folder = RunFolder(storage, config.out)
    require_known_model(config.model)  # before anything is read: a wrong name is the first thing to say
    require_tracker(config.track)
    draw_step(f"train: reading {config.catalog}")
    catalog = load_catalog(storage, config.catalog)
    draw_step("train: building the network, to see whether the settings fit it")
    num_train, num_val = check_training(config, catalog)
    _say_departures(config)
    broken: list[str] = []
    before = newest = folder.newest(warn=broken.append)
    if init_from and newest is None:
        _check_start(storage, config, catalog)
    folder.claim(config, catalog)
    with tracked(folder, config.track, run_settings(config, catalog)):
        if newest is None or not _is_finished(folder, config, newest):
            sizes = f"{many(num_train, 'video')}, {num_val} to score, {many(len(catalog.labels), 'class')}"
            print(f"train: {sizes}, {many(config.optim.epochs, 'epoch')}, to {config.out}", flush=True)
            _say_problems(config, catalog)
            newest = _train_on(folder, config, catalog, gate)  # its first worker says what is broken
        else:
            for line in broken:
                print(f"train: {visible(line)}")
            done = many(newest[1].epoch, "epoch")
            print(f"train: {config.out} is finished ({done}); nothing is left to do", flush=True)
    num_before = before[1].samples if before else 0
    return _result(folder, newest, num_before, time.monotonic() - start_s)


def _train_on(folder: RunFolder, config: TrainConfig, catalog: Catalog, gate: Gate | None) -> Checkpoint:
    """Run the workers, keep status.json true meanwhile, draw the curves; the newest checkpoint then."""
    with Heartbeat(folder.storage, folder.uri) as heart, kept_if_interrupted(lambda: _kept(folder, config)):
        stopped = run_workers(folder, config, catalog, gate)
        found = folder.checkpoints()
        heart.stopped = not found or not _is_finished(folder, config, found[-1])
        draw_curves(folder)
        if heart.stopped and not stopped:  # Ray Train ends a run on Ctrl-C without an error
            raise KeyboardInterrupt
    return found[-1]


def _kept(folder: RunFolder, config: TrainConfig) -> str:
    found = folder.checkpoints()
    if not found:
        return "there is no checkpoint yet; the same command starts over"
    uri, meta = found[-1]
    done = f"{meta.epoch} of {many(config.optim.epochs, 'epoch')}"
    steps = f" and {many(meta.epoch_steps, 'step')}" if meta.epoch_steps else ""
    return f"{done}{steps} are in {uri}; the same command goes on from there"


def _is_finished(folder: RunFolder, config: TrainConfig, newest: Checkpoint) -> bool:
    """Whether the last epoch is done, or the one after which patience was out."""
    epoch = newest[1].epoch
    if epoch >= config.optim.epochs:
        return True
    return stopped_early([row for row in folder.epochs() if row.epoch <= epoch], config)


# Where it starts


def with_start(config: Settings, task: str) -> Settings:
    """The settings with init_from as a checkpoint: published weights are imported, here and once.

    Network and clips are those of the published network, but for what is set: options join its own, and each setting
    of the clip that is not our default stays. A network of another name keeps all of the user's settings. A backbone of
    timm becomes the network's options, and nothing of init_from is left.

    Raises:
        ConfigError: a source that is malformed, or a backbone for a network that takes none, or has another one.
        KinorayError: as checkpoint_of.
    """

    def say(line: str) -> None:
        print(f"{task}: {visible(line)}", flush=True)

    source = parse_source(config.init_from, "init_from")
    if source.kind == "timm":
        return replace(config, init_from="", model=_with_backbone(config.model, source))
    network: dict[str, Any] = {"model": config.model} if source.kind == "file" else {}
    where = checkpoint_of(config.init_from, "init_from", say, resources=config.resources, **network)
    is_own = not is_whole(config.init_from)
    config = replace(config, init_from=where)
    if is_own:
        return config
    meta = load_meta(Storage(), where)
    if config.model.factory in (ModelConfig().factory, meta.model.factory):
        model = replace(meta.model, options={**meta.model.options, **config.model.options})
        config = replace(config, model=model, clip=_set_upon(meta.clip, config.clip, ClipConfig()))
        say(f"network {model.factory} and its clips are those of {source}: {_clip_in_words(config.clip)}")
    say(f"fine-tuning: {_recipe_in_words(config.optim)}")
    return config


def _set_upon(base: Part, given: Part, default: Part) -> Part:
    """`base` with what `given` says that `default` does not, field by field."""
    changes = {}
    for item in fields(given):
        ours, theirs, usual = (getattr(tree, item.name) for tree in (base, given, default))
        if theirs != usual:
            changes[item.name] = _set_upon(ours, theirs, usual) if is_dataclass(theirs) else theirs
    return replace(base, **changes)


def _clip_in_words(clip: ClipConfig) -> str:
    sample = clip.sample
    rate = f" of {sample.fps:g} a second" if sample.fps else ""
    which = f", every {sample.stride}.{rate}" if sample.stride > 1 else f", in a row{rate}"
    which = which if sample.is_dense else " over the whole video"
    return f"{sample.num_segments} x {sample.frames_per_segment} frames{which}, {clip.view.crop_px} px"


def _recipe_in_words(optim: OptimConfig) -> str:
    """The recipe in a line."""
    frozen = ", batch norms as they are" if optim.freeze_bn else ""
    return (
        f"{many(optim.epochs, 'epoch')}, batch {optim.batch_size}, rate {optim.lr:g}, backbone x "
        f"{optim.backbone_lr_factor:g}, layer decay {optim.layer_decay:g}, weight decay {optim.weight_decay:g}, label "
        f"smoothing {optim.label_smoothing:g}{frozen} (--optim.* and --model.options drop_path=... change it)"
    )


def _with_backbone(model: ModelConfig, source: Source) -> ModelConfig:
    """The network on a backbone of timm, with the file's weights, or those that timm has for it."""
    if model.factory not in _TIMM_NETWORKS:
        names = ", ".join(_TIMM_NETWORKS)
        raise ConfigError(f"init_from: {source} is a backbone for {names}; model.factory is {model.factory}")
    options = {"backbone": f"timm:{source.name}", "backbone_weights": source.variant or "imagenet"}
    for name, value in options.items():
        if model.options.get(name, value) != value:
            raise ConfigError(
                f"model.options.{name} is {model.options[name]!r}, but init_from {source} sets {value!r}; leave one out"
            )
    return replace(model, options={**model.options, **options})


# What is checked


def check_training(config: TrainConfig, catalog: Catalog) -> tuple[int, int]:
    """Check all that can be checked without a cluster; how many videos are to train on and to score.

    Raises:
        ConfigError: the network is unknown or refuses its options, or the clip.
        CatalogError: the catalog lacks a split, or labels in it.
    """
    require_known_model(config.model)
    sizes = _check_splits(config, catalog)
    _check_recipe(config, catalog)
    _check_model(config, catalog, sizes[0])
    return sizes


def _check_splits(config: TrainConfig, catalog: Catalog) -> tuple[int, int]:
    """Sizes of both splits; every video of them must have a label."""
    counts = []
    for name, split in (("split", config.split), ("val_split", config.val_split)):
        if name == "val_split" and not split:
            counts.append(0)
            continue
        try:
            part = catalog.select(split)
        except CatalogError as error:
            hint = '; val_split "" trains without scoring' if name == "val_split" else ""
            raise CatalogError(f"{config.catalog}: {error} ({name} is {split!r}{hint})") from error
        unlabelled = part.table.column("label_ids" if catalog.is_multilabel else "label_id").null_count
        if unlabelled:
            raise CatalogError(
                f"{config.catalog}: {unlabelled} of {len(part)} videos of {name} {split!r} have no label; pack class "
                "folders or a CSV with labels, or choose another split"
            )
        counts.append(len(part))
    if not catalog.labels:
        raise CatalogError(
            f"{config.catalog}: every label list is empty, so there is no class to learn; name those that videos have, "
            "as in a.mp4,red|round, and pack again"
        )
    return counts[0], counts[1]


def _check_recipe(config: TrainConfig, catalog: Catalog) -> None:
    """What is set for label lists must meet some."""
    kind = config.optim.multilabel_loss
    expected = f"bce with {config.catalog}, whose videos have one class each: their loss is the cross entropy"
    require(catalog.is_multilabel or kind == "bce", "optim.multilabel_loss", expected, kind)


def _check_model(config: TrainConfig, catalog: Catalog, num_videos: int) -> None:
    """Build the network once, here, where a wrong option is one clear line and not a dead worker group."""
    model = build_model(config.model, len(catalog.labels))
    rate_factors(cast(nn.Module, model), config.optim)
    if config.cache.keep == "features" and not is_split(model):
        raise ConfigError(
            f"cache.keep must be frames for {config.model.factory}, which does not part its backbones from its head "
            "(to_features and from_features, kinoray.network); vcm_sdd, vcm_sdd_x, tsn and tsm do"
        )
    spec = model.input_spec
    check_clip(spec, config.clip)
    changes_colours = config.augment.changes_colours
    require(spec.rgb or not changes_colours, "augment", "without colours for a network that sees flow only", "some")
    if spec.flow_channels not in (0, FLOW_CHANNELS):
        raise ConfigError(
            f"model.options: the network wants {spec.flow_channels} flow channels, but decoding gives {FLOW_CHANNELS}"
        )
    if is_shipped(config.model.factory):
        _check_forward(config, model, _fewest_videos(config, num_videos))


def _fewest_videos(config: TrainConfig, num_videos: int) -> int:
    """How many a forward pass of an epoch has at least."""
    optim, workers = config.optim, config.resources.num_workers
    batches = {min(optim.batch_size, num_videos), num_videos % optim.batch_size}
    shares = {share for batch in batches for share in (batch // workers, -(-batch // workers)) if share}
    sizes = {share: -(-share // optim.accumulate) for share in shares}
    return min(share % size or size for share, size in sizes.items())


def _check_forward(config: TrainConfig, model: VideoModel, count: int) -> None:
    """Whether the network takes such clips, so many at a time; nothing is computed.

    Raises:
        ConfigError: it says that it does not.
    """
    network, spec = cast(nn.Module, model), model.input_spec
    sample, size = config.clip.sample, config.clip.view.crop_px
    shape = (count, sample.num_segments, sample.frames_per_segment)
    inputs = {
        name: torch.empty(*shape, channels, size, size, device="meta") if channels else None
        for name, channels in (("rgb", 3 * spec.rgb), ("flow", spec.flow_channels))
    }
    state = {name: value.to("meta") for name, value in [*network.named_parameters(), *network.named_buffers()]}
    network.train(config.optim.backbone_lr_factor > 0 and not config.optim.freeze_bn)
    try:
        with torch.no_grad():
            functional_call(network, state, kwargs=inputs)
    except ValueError as error:
        clips = f"{sample.num_segments} x {sample.frames_per_segment} frames, {size} px"
        raise ConfigError(
            f"clip: {config.model.factory} cannot be trained on clips of {clips}, {many(count, 'video')} at a time "
            f"(optim.batch_size {config.optim.batch_size}): {error}"
        ) from error
    except RuntimeError:  # without numbers it cannot be run: the first step will tell
        return


def _say_problems(config: TrainConfig, catalog: Catalog) -> None:
    """What is poor about the set: few videos to score make a high accuracy by chance."""
    roles: dict[str, str | None] = {config.split: "train", config.val_split: "val"}
    rows = zip(catalog.class_names(), catalog.table["split"].to_pylist(), strict=True)
    places = Counter((names, roles[split]) for names, split in rows if split and split in roles)
    for problem, remedy in set_problems(places, several=catalog.is_multilabel):
        print(f"train: warning: {visible(problem)}; {remedy}", flush=True)
    started = config.init_from or any(config.model.options.get(name) for name in START_OPTIONS)
    if config.optim.backbone_lr_factor == 0 and not started and is_shipped(config.model.factory):
        print(
            "train: warning: the backbones are frozen, and their weights are random; --model.options "
            "backbone_weights=imagenet or --init-from names better ones",
            flush=True,
        )


def _say_departures(config: TrainConfig) -> None:
    """Whether the network is fed otherwise than its authors did; it may well be meant so."""
    if not is_shipped(config.model.factory):
        return
    outline = cast(VideoModel, build_outline(without_start_weights(config.model), num_classes=2))
    if departures := recipe_departures(outline.input_spec, config.clip):
        print(f"train: warning: {config.model.factory} is not fed as in its paper: {departures}", flush=True)


def _check_start(storage: Storage, config: TrainConfig, catalog: Catalog) -> None:
    """Try init_from here, where what does not fit is one clear line and not a dead worker group."""
    known = without_start_weights(config.model)
    model = build_model(known, len(catalog.labels))
    start_from(storage, config.init_from, model, known, catalog.labels)


# What came of it


def _result(folder: RunFolder, last: Checkpoint, num_before: int, took_s: float) -> dict[str, Any]:
    """Totals of the run, printed and returned.

    Args:
        num_before: videos that were trained on when this command began, which took none of its time.
    """
    newest_uri, newest = last
    best_uri, best = best_of(folder.checkpoints())
    totals: dict[str, Any] = {
        "run": folder.uri,
        "epochs": newest.epoch,
        "steps": newest.step,
        "samples": newest.samples,
        "quarantined": int(newest.metrics.get("quarantined", 0)),
        "newest": newest_uri,
        "best": best_uri,
        "best_epoch": best.epoch,
        "loss": newest.metrics.get("loss"),
        "val_top1": best.metrics.get("val_top1"),
        "val_top5": best.metrics.get("val_top5"),
        "val_map": best.metrics.get("val_map"),
        "metrics": [row.record() for row in folder.epochs()],
        "took_s": took_s,
    }
    scored = ""
    if totals["val_top1"] is not None:
        of = many(int(best.metrics.get("val_videos", 0)), "video")
        scored = f", val top-1 {totals['val_top1']:.3f} of {of}"
    if totals["val_map"] is not None:
        scored = f", val mAP {totals['val_map']:.3f} of {of}"
    done = ", ".join((many(newest.epoch, "epoch"), many(newest.step, "step"), many(newest.samples, "video")))
    num_now = newest.samples - num_before
    now = f", {num_now:,} of them now" if num_before and num_now else ""
    took = f"{now} in {format_duration(took_s)}" if num_now else ""
    print(
        f"train: {done} trained on{took}; quarantined {totals['quarantined']}; best is epoch "
        f"{best.epoch}{scored}: {best_uri}",
        flush=True,
    )
    return totals
