"""The settings of `kinoray train` and `kinoray runs`, and whole recipes by name.

A preset (`kinoray train SET --out RUN --preset NAME`; flags override what it says) holds the network, its input and the
recipe. Machines, storage and limits are the user's. Its options are those of its own network, and go to no other one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

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

__all__ = ["PRESETS", "RunsConfig", "TrainConfig", "demo", "finetune", "k400_paper", "k600_paper", "small"]


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
    but what other settings say. Or timm:NAME[:FILE], the backbone of tsn, tsm and vcm_sdd."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, of those after epochs, and the best one (by val_top1) besides."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints inside an epoch (the newest is kept), written while training goes on; 0 for none."""
    max_failures: int = 3
    """How often dead workers are started again from the newest checkpoint, and Ray Train's controller likewise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """What it is fed."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What training does to the clips beyond crops and flips."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The recipe."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Decoded frames on disk; off by default."""
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
        on_device = self.clip.flow_on_device
        expected = f"0 with clip.flow.estimator {self.clip.flow.estimator}"
        require(not (self.cache.gb and on_device), "cache.gb", expected, self.cache.gb)
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
