"""The settings that jobs share: frozen dataclasses, one docstring a field. The verbs' own are in their stages.

Everything that changes a number in a result is in ClipConfig and ModelConfig, and their digest goes into that result.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, cast

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from kinoray.config.clip import (
    ClipConfig,
    DecodeConfig,
    DecodeLimits,
    FlowConfig,
    SampleConfig,
    ViewConfig,
)
from kinoray.config.file import parse_yaml
from kinoray.errors import ConfigError, check_fraction, require

__all__ = [
    "Access",
    "AllowedFactories",
    "AugmentConfig",
    "CacheConfig",
    "ClipConfig",
    "DecodeConfig",
    "DecodeLimits",
    "FlowConfig",
    "InferenceConfig",
    "JobConfig",
    "ModelConfig",
    "ModelOptions",
    "OptimConfig",
    "ResourcesConfig",
    "SampleConfig",
    "StorageConfig",
    "StoreConfig",
    "TrainResourcesConfig",
    "ViewConfig",
    "WorkersConfig",
    "digest",
    "parse_options",
    "require",
    "require_gpus",
]


def digest(config: Any) -> str:
    """16 hex digits that name a config (or any JSON-able value): equal settings, equal digest, on every machine."""
    value = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """`["heads=8", "stc=false"]` -> `{"heads": 8, "stc": False}`: values are read as YAML scalars."""
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ConfigError(f"model.options must be KEY=VALUE, got {item!r}")
        options[key] = parse_yaml(value, f"model.options.{key}: {value!r:.80}")
    return options


ModelOptions = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE [KEY=VALUE ...]",
        instance_from_str=parse_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={json.dumps(item)}" for key, item in value.items()],
    ),
]


AllowedFactories = tyro.conf.UseAppendAction[tuple[str, ...]]
"""`PACKAGE:FUNCTION` as often as it is given: networks that a checkpoint may name though kinoray does not have them."""


Access = Literal["signed", "unsigned", "requester_pays"]
"""How requests to a bucket are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Where s3:// addresses lead. Credentials come from the usual AWS chain, never from here."""

    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS (MinIO, Ceph, R2). Default: AWS_ENDPOINT_URL if set, else AWS."""
    region: str | None = None
    """AWS region. Default: what the AWS environment or profile says, else us-east-1."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """How buckets are addressed; `path` for servers without bucket host names."""
    access: tuple[str, ...] = ()
    """BUCKET=unsigned for buckets that anyone may read: requests to these need no credentials and carry none.
    BUCKET=requester_pays for those whose owner has the reader pay: you agree to. All others: signed, the owner pays."""
    retry_s: float = 60.0
    """How long a request to a failing store is made again, in seconds, before the job ends with StorageUnavailable."""
    answer_timeout_s: float = 20.0
    """Seconds until the first byte of an answer, after which a request is made again."""
    stall_timeout_s: float = 5.0
    """Seconds of silence, or of trickling, in an answer after which its rest is asked for again."""

    def __post_init__(self) -> None:
        for name in ("retry_s", "answer_timeout_s", "stall_timeout_s"):
            require(getattr(self, name) > 0, f"storage.{name}", "greater than 0", getattr(self, name))
        for item in self.access:
            is_one = re.fullmatch(r"[^=/]+=(unsigned|requester_pays)", item) is not None
            require(is_one, "storage.access", "BUCKET=unsigned or BUCKET=requester_pays", item)
        buckets = [item.partition("=")[0] for item in self.access]
        require(len(set(buckets)) == len(buckets), "storage.access", "one way for each bucket", " ".join(self.access))

    @property
    def endpoint(self) -> str | None:
        """The address that this or the environment gives, or None for AWS and what a profile says."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None

    def access_of(self, bucket: str) -> Access:
        """How requests to a bucket are made."""
        return cast(Access, dict(item.split("=") for item in self.access).get(bucket, "signed"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Decoded frames, or features, on the disk of each node, for runs that see the same (the trials of a sweep).

    A run gives the same numbers with and without it. Every epoch draws other frames and crops, so one run alone gains
    only where videos are scored, which it sees alike in every epoch, and where augment.num_views lets epochs repeat.
    """

    gb: float = 0.0
    """Size on each node, in GB; 0 for no cache. What does not fit is decoded."""
    keep: Literal["frames", "features"] = "frames"
    """`features`: what frozen backbones (optim.backbone_lr_factor 0) make of the frames, in place of these: an epoch
    that finds them costs the head only. For vcm_sdd, vcm_sdd_x, tsn, tsm, and others with to_features."""
    folder: str = ""
    """Where. Default: a folder of this user's in the node's temporary folder."""
    grids: tuple[str, ...] = ()
    """SEGMENTSxFRAMES of all runs that share it, of dense clips with /STRIDE, such as 8x6 16x6 1x16/4: one reading then
    serves them all. Default: this run's alone. `kinoray tune` fills it in."""

    def __post_init__(self) -> None:
        require(self.gb >= 0, "cache.gb", "at least 0", self.gb)
        has_place = self.keep == "frames" or self.gb > 0
        require(has_place, "cache.gb", f"greater than 0 with cache.keep {self.keep}", self.gb)
        is_grid = all(re.fullmatch(r"[1-9][0-9]{0,3}x[1-9][0-9]{0,3}(/[1-9][0-9]{0,3})?", name) for name in self.grids)
        require(is_grid, "cache.grids", "like 8x6 (segments x frames) or 1x16/4 (every fourth frame)", self.grids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network: a short name or an import string, and the options of its factory."""

    factory: str = "vcm_sdd"
    """A short name (vcm_sdd, ...) or `package:function`; called as function(num_classes=..., **options)."""
    options: ModelOptions = field(default_factory=dict)
    """Keyword arguments of the factory, such as backbone=resnet18 heads=8 scale=dim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What training does to decoded clips, on the model's device; crops and flips are clip.view's, before the flow.

    Every draw holds for all frames of a clip. Colours change RGB only, never its geometry, so RGB and flow stay in
    register; mixing treats both alike.
    """

    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are scaled by numbers in 1 - x .. 1 + x, in random order (usual: 0.4)."""
    randaugment_ops: int = 0
    """RandAugment: so many operations a clip, drawn from its photometric ones: identity, brightness, colour, contrast,
    sharpness, posterize, solarize, autocontrast, equalize. The geometric ones are left out for every network: they
    would move RGB against the flow."""
    randaugment_magnitude: int = 9
    """RandAugment: strength of each, in 0 .. 30."""
    mixup_alpha: float = 0.0
    """Mixup: each clip becomes a weighted mean with another, weights from Beta(alpha, alpha), and so does its label
    (0.2 to 0.8 is usual)."""
    cutmix_alpha: float = 0.0
    """CutMix: a box of each frame comes from another clip, its area from Beta(alpha, alpha), the label in proportion
    (1.0 is usual). With both, each step draws one of the two."""
    num_views: int = 0
    """So many epochs draw frames, crops, flips and colours; the later ones see these views again, in turn. 0: each
    epoch draws its own."""

    def __post_init__(self) -> None:
        require(0 <= self.colour_jitter <= 1, "augment.colour_jitter", "in 0 .. 1", self.colour_jitter)
        require(self.randaugment_ops >= 0, "augment.randaugment_ops", "at least 0", self.randaugment_ops)
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, "augment.randaugment_magnitude", "in 0 .. 30", magnitude)
        require(self.mixup_alpha >= 0, "augment.mixup_alpha", "at least 0", self.mixup_alpha)
        require(self.cutmix_alpha >= 0, "augment.cutmix_alpha", "at least 0", self.cutmix_alpha)
        require(self.num_views >= 0, "augment.num_views", "at least 0", self.num_views)

    @property
    def changes_colours(self) -> bool:
        """Whether RGB is changed at all."""
        return self.colour_jitter > 0 or self.randaugment_ops > 0

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed with each other."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def view_of(self, epoch: int) -> int:
        """The epoch, from 1, that drew what this one sees."""
        return (epoch - 1) % self.num_views + 1 if self.num_views else epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The training recipe: AdamW, its schedule, the loss, and how a step is computed."""

    epochs: int = 20
    """Passes over the training split (paper: 100)."""
    batch_size: int = 32
    """Videos a step over all workers together (paper: 128)."""
    lr: float = 2e-3
    """Peak learning rate of AdamW (paper: 0.008 on K400, 0.012 on K600)."""
    weight_decay: float = 0.02
    """AdamW's weight decay."""
    step_epochs: tuple[int, ...] = ()
    """After so many epochs each the rate falls to a tenth, such as 20 40 of 50 (TSN). Default: after the warm-up it
    falls along a cosine to zero."""
    warmup_fraction: float = 0.1
    """Share of all steps over which the rate rises linearly."""
    backbone_lr_factor: float = 1.0
    """The backbones' rate as a multiple of lr; less than 1 spares pretrained weights. 0 freezes the backbones: weights
    and statistics stay, and they compute as in scoring, clip by clip. A network says what its backbones are; of others
    it is all but the classifier."""
    layer_decay: float = 1.0
    """Each block's rate as a multiple of the rate of the block behind it, towards the input: x ** depth, times
    backbone_lr_factor (fine-tuned transformers: 0.65 to 0.9). 1 for one rate; a network names its blocks."""
    freeze_bn: bool = False
    """Batch norms keep their statistics, scales and offsets: for small batches and pretrained backbones (TSN)."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes (0.1 is usual)."""
    multilabel_loss: Literal["bce", "focal", "asymmetric"] = "bce"
    """Loss of a set whose videos may have several classes, summed over the classes of a video: bce is the binary cross
    entropy; focal weighs each term by (1 - p) ** 2, p that of the truth (Lin et al. 2017); asymmetric weighs those of
    classes that a video lacks by p ** 4, p lowered by 0.05 (Ridnik et al. 2021): for many classes of which few hold."""
    class_balance: float = 0.0
    """Weigh the loss of a video by (videos of its class) ** -x, mean weight 1: 0 none, 1 as if all classes had equally
    many, 0.5 between. Videos are never drawn more or less often: each comes once an epoch."""
    ema_decay: float = 0.0
    """Keep a moving average of the weights with this decay (0.999 is usual); it is what is scored, saved and labelled
    with. The decay rises from 0.1 in the first steps. 0 turns it off."""
    accumulate: int = 1
    """Parts into which each worker cuts its share of a batch: the gradient stays that of the whole batch (but for batch
    norms, which see the parts), the memory falls to that of one part."""
    recompute: Literal["none", "head", "all"] = "none"
    """Activation checkpointing: keep no activations inside the head, or inside the blocks of the backbones, either, and
    compute them again for the gradient. The same numbers, less memory, up to a third more work."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16` and `fp16` run the forward pass under autocast; fp16 scales the loss, and needs GPUs."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start of each worker, then faster steps."""
    seed: int = 0
    """Seeds weights, order and augmentation."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        require(self.batch_size >= 1, "optim.batch_size", "at least 1", self.batch_size)
        require(self.lr > 0, "optim.lr", "greater than 0", self.lr)
        require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        require(0 <= self.seed < 2**63, "optim.seed", "in 0 .. 2^63 - 1", self.seed)
        rising = self.step_epochs == tuple(sorted(set(self.step_epochs))) and all(x >= 1 for x in self.step_epochs)
        require(rising, "optim.step_epochs", "rising whole numbers of at least 1", self.step_epochs)
        require(0 <= self.warmup_fraction < 1, "optim.warmup_fraction", "in 0 .. 1", self.warmup_fraction)
        require(self.backbone_lr_factor >= 0, "optim.backbone_lr_factor", "at least 0", self.backbone_lr_factor)
        require(0 < self.layer_decay <= 1, "optim.layer_decay", "above 0 and at most 1", self.layer_decay)
        require(self.clip_norm >= 0, "optim.clip_norm", "at least 0", self.clip_norm)
        require(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in 0 .. 1", self.label_smoothing)
        require(0 <= self.class_balance <= 1, "optim.class_balance", "in 0 .. 1", self.class_balance)
        require(0 <= self.ema_decay < 1, "optim.ema_decay", "in 0 .. 1", self.ema_decay)
        require(self.accumulate >= 1, "optim.accumulate", "at least 1", self.accumulate)
        both = self.compile and self.recompute != "none"
        require(not both, "optim.recompute", "none with optim.compile, which decides for itself", self.recompute)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceConfig:
    """How a trained model runs. Batch norms are folded in any case; the settings are part of a result's digest."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` takes about half the time on processors that have it; `evaluate` shows what it does to the accuracy."""
    compile: bool = False
    """Compile the network with torch.compile: takes minutes in each worker, then saves time on each video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """What a job asks of the cluster. A job that cannot fit is refused before it starts, with the arithmetic."""

    address: str = ""
    """Ray cluster to use. Default: the cluster this job was submitted to (RAY_ADDRESS), else a Ray of its own, here."""
    local_cpus: int = 4
    """Logical CPUs of a Ray that this command starts itself (more than the cores is fine: stages wait)."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["--workers"])] = 2
    """Processes that run the model (train, label, evaluate) or pack files (pack)."""
    cpus_per_worker: float = 1.0
    """CPUs of each; its thread counts follow from this."""
    gpus_per_worker: float = 0.0
    """GPUs of each; above 0 the model runs on CUDA."""
    logs: Literal["off", "json"] = "off"
    """`json`: workers log each unit, epoch and refused video as a line of JSON with the ids of run, unit and video,
    where Ray keeps its logs (and with what the driver prints, where Ray passes that on)."""
    wait_for_nodes_s: float = 900.0
    """How long a job waits for nodes that the cluster's autoscaler starts for it, in seconds; 0 for none: what is there
    must do. A cluster without an autoscaler has what it has."""

    def __post_init__(self) -> None:
        require(self.local_cpus >= 1, "resources.local_cpus", "at least 1", self.local_cpus)
        require(self.num_workers >= 1, "resources.num_workers", "at least 1", self.num_workers)
        require(self.cpus_per_worker > 0, "resources.cpus_per_worker", "greater than 0", self.cpus_per_worker)
        require(self.gpus_per_worker >= 0, "resources.gpus_per_worker", "at least 0", self.gpus_per_worker)
        require(self.wait_for_nodes_s >= 0, "resources.wait_for_nodes_s", "at least 0", self.wait_for_nodes_s)


_GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvmap", "/dev/kfd")  # of a server, of WSL, of a Jetson, of AMD


def require_gpus(config: object) -> None:
    """Refuse a job that wants GPUs for a Ray of its own on a machine that has none: no library has to be asked.

    Raises:
        ConfigError: as said.
    """
    resources = getattr(config, "resources", None)
    wanted = getattr(resources, "gpus_per_worker", 0.0)
    if not wanted or getattr(resources, "address", None) or os.environ.get("RAY_ADDRESS"):
        return
    if not any(glob.glob(pattern) for pattern in _GPUS):
        raise ConfigError(
            f"resources.gpus_per_worker {wanted:g}: this machine has no GPU that can be used ({_GPUS[0]}); leave it "
            "out and the model runs on CPUs, or name a cluster that has some (resources.address)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig(WorkersConfig):
    """What a job asks of the cluster whose workers decode what they score."""

    decoders_per_worker: int = 2
    """Decoder processes of each worker; they take its CPUs."""

    def __post_init__(self) -> None:
        WorkersConfig.__post_init__(self)
        require(self.decoders_per_worker >= 1, "resources.decoders_per_worker", "at least 1", self.decoders_per_worker)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResourcesConfig(WorkersConfig):
    """What a training asks of the cluster: decoding is beside the workers, on any node."""

    decode_tasks: int = 2
    """Decoders of all workers together: tasks of one CPU each, beside the workers."""

    def __post_init__(self) -> None:
        WorkersConfig.__post_init__(self)
        require(self.decode_tasks >= 1, "resources.decode_tasks", "at least 1", self.decode_tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """What every verb asks that reads or writes objects."""

    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig(StoreConfig):
    """What a job asks that reads videos and may not be able to read some of them."""

    max_bad_fraction: float = 0.2
    """Exit with 1 if more than this share is quarantined; what is good is written all the same."""

    def __post_init__(self) -> None:
        check_fraction("max_bad_fraction", self.max_bad_fraction)
