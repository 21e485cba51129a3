"""The settings of `kinoray train` and `kinoray runs`, and whole recipes by name.

A preset (`kinoray train SET --out RUN --preset NAME`; flags override what it says) holds the network, its input and the
recipe. Machines, storage and limits are the user's. Its options are those of its own network, and go to no other one.

Flags are read twice where what they are laid upon (a preset, a run, a network's own recipe) follows from them. Easy to
break: a flag that says what is the default anyway is the user's word, too, so nothing here may be found out by
comparing settings with their defaults. And torch, which takes seconds, is imported only where a network must be built.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import tyro

from kinoray.config.file import MAX_FILE_BYTES, config_from_bytes
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    FlowConfig,
    JobConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    StoreConfig,
    TrainResourcesConfig,
    ViewConfig,
    require,
)
from kinoray.errors import ConfigError, StorageError
from kinoray.network.resolve import is_whole

__all__ = [
    "PRESETS",
    "RunsConfig",
    "TrainConfig",
    "demo",
    "finetune",
    "k400_paper",
    "k600_paper",
    "like",
    "on_its_network",
    "preset_of",
    "small",
]

Settings = TypeVar("Settings", bound="TrainConfig")
_FED_BY_DEFAULT = ("vcm_sdd", "vcm_sdd_r101")  # the defaults of the settings are theirs


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(JobConfig):
    """Train a model on a packed catalog.

    Example: kinoray train s3://bucket/set --out s3://bucket/runs/first --model.options backbone=resnet18

    Everything goes to the run folder: checkpoints, metrics.jsonl, TensorBoard events, config. The same command again
    resumes from the newest whole checkpoint.
    """

    catalog: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CATALOG")]
    """A pack's folder, or its catalog.parquet."""
    out: str
    """Run folder (a folder or an s3:// prefix)."""
    split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split that is scored after epochs; empty for none."""
    eval_every: int = 1
    """Epochs between two scorings; the last epoch is always scored."""
    patience: int = 0
    """Stop after so many scorings without a higher val_top1; 0 never stops early. A larger number lets a run that was
    stopped go on."""
    init_from: str = ""
    """Fine-tune: a checkpoint, or a run folder (its best), whose weights the first step starts from. All must fit but
    the classifier's, which start anew unless the classes are the same; what was left out is listed. Or a published
    network as `kinoray import` lists them: network and clips are then its own and the recipe is --preset finetune, all
    but what other settings say. Or timm:NAME[:FILE], the backbone of tsn, tsm, vcm_sdd and vcm_sdd_x."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, of those after epochs, and the best one (by val_top1) besides."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints inside an epoch (the newest is kept), written while training goes on; 0 for none."""
    max_failures: int = 3
    """How often dead workers are started again from the newest checkpoint, and Ray Train's controller likewise."""
    track: Literal["mlflow", "wandb"] | None = None
    """Tell a tracker of each epoch, too: MLflow or Weights & Biases, by its own client (pip install 'kinoray[mlflow]'),
    whose own variables say where (MLFLOW_TRACKING_URI, WANDB_MODE). One that is down stops nothing (docs/tuning.md)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """What it is fed."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What training does to the clips beyond crops and flips."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The recipe."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Decoded frames, or features of frozen backbones, on disk; off by default."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several workers share the network: a copy each, or weights, gradients and moments in shards (FSDP2: less
    memory, more traffic). Checkpoints are the same, so a run may go on with the other one."""
    resources: TrainResourcesConfig = field(default_factory=TrainResourcesConfig)
    """Workers and decoders."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        for name in ("keep_checkpoints", "eval_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.patience >= 0, "patience", "at least 0", self.patience)
        require(not self.patience or bool(self.val_split), "patience", "0 without val_split", self.patience)
        every = self.checkpoint_every_steps
        require(every >= 0, "checkpoint_every_steps", "at least 0", every)
        require(self.max_failures >= 0, "max_failures", "at least 0", self.max_failures)
        workers = self.resources.num_workers
        batch = self.optim.batch_size
        require(batch >= workers, "optim.batch_size", f"at least resources.num_workers ({workers})", batch)
        precision = self.optim.precision
        on_gpu = self.resources.gpus_per_worker > 0
        require(on_gpu or precision != "fp16", "optim.precision", "fp32 or bf16 on CPUs (fp16 needs GPUs)", precision)
        decoder = self.clip.decode.device
        expected = "cpu in training; label and evaluate have --decode.device"
        require(decoder == "cpu", "clip.decode.device", expected, decoder)
        on_device = self.clip.flow_on_device and self.cache.keep == "frames"
        expected = f"0 with clip.flow.estimator {self.clip.flow.estimator}"
        require(not (self.cache.gb and on_device), "cache.gb", expected, self.cache.gb)
        if self.cache.keep == "features":
            frozen, expected = self.optim.backbone_lr_factor == 0, "frames unless optim.backbone_lr_factor is 0"
            require(frozen, "cache.keep", expected, self.cache.keep)
            expected = "frames with augment.mixup_alpha or cutmix_alpha, which mix pixels"
            require(not self.augment.mixes, "cache.keep", expected, self.cache.keep)
            require(self.parallel == "ddp", "cache.keep", "frames with parallel fsdp", self.cache.keep)
        if self.parallel == "fsdp":
            require(precision != "fp16", "optim.precision", "fp32 or bf16 with parallel fsdp", precision)
            require(not self.optim.compile, "optim.compile", "off with parallel fsdp", self.optim.compile)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsConfig(StoreConfig):
    """List the training runs below a folder or s3:// prefix: how they stand, epochs, best metric, network.

    Example: kinoray runs s3://bucket/runs

    It reads what the runs have written, and needs no cluster. STATUS is one of

      running   its driver gave a sign of life within the last two minutes
      finished  all epochs are done
      stopped   it was interrupted, or its driver was killed; the command that started it goes on with it
      failed    it ended with an error, which is shown below the table
      damaged   its files cannot be read

    BEST is the highest top-1 on the validation split, or the lowest loss where none is scored. All of a run's metrics
    are in its metrics.jsonl, its curves in learning_curves.svg. Of a single run (PREFIX is its folder) it also says
    where the time went: waiting for decoders, steps, scoring, and between epochs.
    """

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """A run folder, or a folder or s3:// prefix with runs at any depth."""
    json: bool = False
    """One JSON object a run instead of the table, with times in seconds."""


# Presets


def k400_paper() -> TrainConfig:
    """VCM-SDD on Kinetics-400 as published (section 4.1): 16 x 6 frames, ResNet-101 twice, batch 128, 100 epochs.

    Frames are resized to 256 x 256, aspect not kept, and cropped to 224 x 224, in training with multi-scale crops and
    flips; AdamW with rate 0.008; the segments' logits are averaged. Not published, and ours: weight decay, warm-up,
    gradient norm. Weights start at random; `--model.options backbone_weights=imagenet` takes ImageNet's. The paper
    used 8 GPUs: 16 videos each. recompute changes no number and makes room; for more of it see optim.accumulate and
    optim.precision.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(factory="vcm_sdd_r101", options={"consensus": "logits", "scale": "frobenius"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=16, frames_per_segment=6),
            view=ViewConfig(
                resize="stretch", resize_px=256, crop_px=224, train_scales=(1.0, 0.875, 0.75, 0.66), train_flip=True
            ),
        ),
        optim=OptimConfig(epochs=100, batch_size=128, lr=0.008, recompute="all"),
    )


def k600_paper() -> TrainConfig:
    """The same on Kinetics-600, with rate 0.012."""
    base = k400_paper()
    return replace(base, optim=replace(base.optim, lr=0.012))


def small() -> TrainConfig:
    """For hundreds to thousands of videos on one machine: smaller frames, ResNet-18 twice, the scale that we recommend.

    Mild colours, smoothed labels and a moving average stand against learning a small set by heart.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(options={"backbone": "resnet18", "scale": "dim"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=4, frames_per_segment=4),
            view=ViewConfig(resize_px=128, crop_px=112),
            flow=FlowConfig(bound_px=10.0),
        ),
        augment=AugmentConfig(colour_jitter=0.2),
        optim=OptimConfig(epochs=30, batch_size=16, lr=1e-3, label_smoothing=0.1, ema_decay=0.99),
    )


def finetune() -> TrainConfig:
    """For a published network on a small set; what `--init-from` takes by itself where no preset or file is named.

    A new classifier learns at lr, the network below it at a tenth of that and less with each block towards the input.
    Batch norms stay as they are, so what a step computes does not depend on how few videos it has.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        optim=OptimConfig(
            epochs=15,
            batch_size=16,
            lr=1e-3,
            weight_decay=0.05,
            backbone_lr_factor=0.1,
            layer_decay=0.9,
            freeze_bn=True,
            label_smoothing=0.1,
            accumulate=4,
        ),
    )


def demo() -> TrainConfig:
    """What `kinoray demo` trains: four small frames a video, a tiny network, two minutes on two cores.

    Flips are safe in its set: no class becomes another one in the mirror.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(options={"backbone": "tiny", "heads": 4, "scale": "dim"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=2, frames_per_segment=2),
            view=ViewConfig(resize_px=88, crop_px=80, train_scales=(1.0, 0.875)),
            flow=FlowConfig(bound_px=4.0),
        ),
        optim=OptimConfig(epochs=10, batch_size=16),
    )


PRESETS: Mapping[str, Callable[[], TrainConfig]] = {
    "k400_paper": k400_paper,
    "k600_paper": k600_paper,
    "small": small,
    "finetune": finetune,
    "demo": demo,
}
"""The presets by name."""


def preset_of(cls: type[Settings], preset: str) -> Settings:
    """The config with a preset's recipe in it; what a verb needs besides stays open.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    recipe = PRESETS[preset]()
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    if recipe.cache == CacheConfig():  # tune has a cache of its own accord
        del own["cache"]
    return cls(**own)


def like(cls: type[Settings], run: str, parse: Callable[[Any], Settings]) -> Settings:
    """The settings of a run. Where to write, the store, the cluster and the cache's folder are this command's own.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    from kinoray.storage.objects import Storage, join

    own = parse(cls(catalog="", out=""))
    try:
        data = Storage(own.storage).read(join(run, "config.yaml"), max_bytes=MAX_FILE_BYTES)
    except StorageError as error:
        raise ConfigError(f"--like must name the run folder of a training, got {run}: {error}") from error
    found = config_from_bytes(cls, data, f"--like {run}: config.yaml")
    resources = dataclasses.replace(found.resources, address=own.resources.address)
    cache = dataclasses.replace(found.cache, gb=found.cache.gb or own.cache.gb, folder=own.cache.folder)
    return dataclasses.replace(found, out=tyro.MISSING, storage=own.storage, resources=resources, cache=cache)


def on_its_network(
    cls: type[Settings],
    config: Settings,
    default: Settings | None,
    parse: Callable[[Any], Settings],
    *,
    is_preset: bool,
) -> Settings:
    """Settings that were made for one network, where flags name another one, and those that a network brings along.

    Options go to the network that they were written for. Published weights bring the recipe of fine-tuning, and later
    their own clips (kinoray.train.verb.with_start). A preset's clips are fitted to another network. What a file or a
    run says stays.

    Args:
        config: the flags, laid upon `default`; None: upon nothing.
        parse: lays the flags upon other settings.
    """
    is_published = is_whole(config.init_from)
    if default is None:
        if is_published:
            return parse(preset_of(cls, "finetune"))
        return config if config.model.factory in _FED_BY_DEFAULT else parse(_fed_by_recipe(cls, config.model))
    is_other = config.model.factory != default.model.factory
    bare = ModelConfig(factory=config.model.factory)
    if is_preset and is_published:
        model = bare if is_other else ModelConfig()
        return parse(dataclasses.replace(default, model=model, clip=ClipConfig()))
    if not is_other:  # options that flags name join those of the file or preset, as all other flags do
        options = {**default.model.options, **config.model.options}
        return dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))
    config = parse(dataclasses.replace(default, model=bare))
    if not is_preset:
        return config
    return parse(dataclasses.replace(default, model=bare, clip=_fitted(config.model, default)))


def _fed_by_recipe(cls: type[Settings], model: ModelConfig) -> Settings:
    """The defaults of a verb, with the clip of the network's own recipe."""
    from kinoray.network.build import clip_of_network

    values: dict[str, Any] = {"clip": clip_of_network(model), "model": model}
    for one in dataclasses.fields(cls):
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            values[one.name] = tyro.MISSING
    return cls(**values)


def _fitted(model: ModelConfig, preset: TrainConfig) -> ClipConfig:
    """A preset's clip for another network than its own; the network's where the preset says nothing of clips."""
    from kinoray.network.build import clip_of_network, clip_on

    return clip_of_network(model) if preset.clip == ClipConfig() else clip_on(model, preset.clip, preset.model)
