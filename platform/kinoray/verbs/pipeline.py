"""One config tree a verb: flags of `kinoray <verb>`, keys of `--config file.yaml` and payload of jobs/<verb>.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    DecodeConfig,
    InferenceConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    StorageConfig,
    require,
)
from kinoray.protocol import PROTOCOLS, ProtocolName, ScoreKind, ViewAverage, WindowsConfig

__all__ = [
    "EvaluateConfig",
    "LabelConfig",
    "PackConfig",
    "RunsConfig",
    "TrainConfig",
]


def _check_segments(protocol: ProtocolName, num_segments: int | None) -> None:
    require(num_segments is None or num_segments >= 1, "num_segments", "at least 1", num_segments)
    if num_segments is not None and PROTOCOLS[protocol].num_segments is not None:
        require(False, "num_segments", f"left out with protocol {protocol}, which names it", num_segments)


def _check_scoring(batch_size: int, decode_device: str, resources: ResourcesConfig) -> None:
    require(batch_size >= 0, "batch_size", "at least 0", batch_size)
    fits = decode_device == "cpu" or resources.gpus_per_worker > 0
    require(fits, "decode_device", "cpu without resources.gpus_per_worker", decode_device)


def _check_fraction(name: str, value: float) -> None:
    require(0 <= value <= 1, name, "in 0 .. 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Pack a folder of class folders, or a CSV (path,label[,split]), into tar shards and a catalog.

    Example: kinoray pack videos/ --out s3://bucket/set

    Every file that is found is either packed or listed in quarantine.parquet with a reason. The same command again goes
    on where a killed run stopped.

    Kinetics: kinoray pack --kinetics k400 --annotations train.csv val.csv s3://bucket/k400/ --out s3://bucket/set

    SOURCE then holds archives (.tar, .tar.gz, .tgz; read as a stream, never unpacked) or loose files at any depth,
    named <youtube id>_000010_000020.mp4; folders mean nothing, but what lies in a folder or archive with `replacement`
    in its name takes the place of other files of the same clip. verdicts.parquet has one row for each annotation row
    and each file or member: packed, missing, duplicate, unreadable, too_short, not_annotated, replaced, leak, ...

    Annotations are known by their content: CSV label,youtube_id,time_start,time_end[,split] as Kinetics has it, lists
    of `path label`, CSV path,label[,split] with or without that header, JSON lines or Parquet with these fields. Where
    rows name no split, the file's name has to (train, val, test). Only rows of test may have no label.

    Leaks: clips of train whose source video (by YouTube id) or content (by checksum) is in another split, too, are
    removed from train; clips of other splits always stay. A clip listed in two splits is packed once, never in train.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder or s3:// prefix of class folders (or of train/, val/ with class folders), a CSV path,label[,split],
    or a catalog (a pack's folder, or .parquet), whose videos are packed anew."""
    out: str
    """Folder or s3:// prefix for shards/, catalog.parquet, labels.json, quarantine.parquet (and verdicts.parquet)."""
    kinetics: Literal["k400", "k600", "k700"] | None = None
    """Pack a Kinetics set by its annotations. Another count of classes than the official one is reported."""
    annotations: tuple[str, ...] = ()
    """Kinetics: annotation files, in any of the formats above."""
    label_names: str = ""
    """Kinetics: names for labels that are numbers: a name a line, lines `number,name`, or JSON."""
    leaks: Literal["remove", "keep"] = "remove"
    """Kinetics: what to do with clips of train that leak from another split."""
    min_clip_fraction: float = 0.2
    """Kinetics: a file that lasts less than this share of its clip's window is too_short."""
    limit: int | None = None
    """Kinetics: only the first so many annotation rows of each split, duplicates and leaks not counted."""
    transcode: bool = False
    """Pack H.264, short side 256 (never enlarged), a key frame every 12 frames, no sound, instead of the original."""
    shard_mb: int = 256
    """Aimed size of a shard, in MiB."""
    val_fraction: float = 0.0
    """Share of each class that goes to split `val` where the source names no splits (by a hash of the file's path)."""
    max_bad_fraction: float = 0.2
    """More unreadable files than this share make the job fail (after writing what is good)."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits that a file is probed against."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        require(self.shard_mb >= 1, "shard_mb", "at least 1", self.shard_mb)
        _check_fraction("val_fraction", self.val_fraction)
        _check_fraction("max_bad_fraction", self.max_bad_fraction)
        _check_fraction("min_clip_fraction", self.min_clip_fraction)
        require(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)
        if self.kinetics is None:
            for name, default in (("annotations", ()), ("label_names", ""), ("leaks", "remove"), ("limit", None)):
                require(getattr(self, name) == default, name, "given with --kinetics only", getattr(self, name))
            require(
                self.min_clip_fraction == 0.2, "min_clip_fraction", "given with --kinetics only", self.min_clip_fraction
            )
        else:
            require(bool(self.annotations), "annotations", "one or more files with --kinetics", self.annotations)
            require(
                self.val_fraction == 0, "val_fraction", "0 with --kinetics (annotations name it)", self.val_fraction
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
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
    the classifier's, which start anew unless the classes are the same; what was left out is listed."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, of those after epochs."""
    keep_best: int = 1
    """Best checkpoints (by val_top1) that are kept besides."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints inside an epoch (the newest is kept), written while training goes on; 0 for none."""
    max_failures: int = 3
    """How often dead workers are started again from the newest checkpoint, and Ray Train's controller likewise."""
    max_bad_fraction: float = 0.2
    """More unreadable training videos than this share end the run."""
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
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers and decoders."""

    def __post_init__(self) -> None:
        for name in ("keep_checkpoints", "keep_best", "eval_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.patience >= 0, "patience", "at least 0", self.patience)
        require(not self.patience or bool(self.val_split), "patience", "0 without val_split", self.patience)
        every = self.checkpoint_every_steps
        require(every >= 0, "checkpoint_every_steps", "at least 0", every)
        require(self.max_failures >= 0, "max_failures", "at least 0", self.max_failures)
        _check_fraction("max_bad_fraction", self.max_bad_fraction)
        workers, batch = self.resources.num_workers, self.optim.batch_size
        require(batch >= workers, "optim.batch_size", f"at least resources.num_workers ({workers})", batch)
        precision, on_gpu = self.optim.precision, self.resources.gpus_per_worker > 0
        require(on_gpu or precision != "fp16", "optim.precision", "fp32 or bf16 on CPUs (fp16 needs GPUs)", precision)
        decoder, expected = self.clip.decode.device, "cpu in training; label and evaluate have decode_device"
        require(decoder == "cpu", "clip.decode.device", expected, decoder)
        on_device = self.clip.decode.scale_on == "device" or self.clip.flow.estimator != "dis"
        expected = "0 with clip.decode.scale_on device and with clip.flow.estimator tvl1 or raft"
        require(not (self.cache.gb and on_device), "cache.gb", expected, self.cache.gb)
        if self.parallel == "fsdp":
            require(precision != "fp16", "optim.precision", "fp32 or bf16 with parallel fsdp", precision)
            require(not self.optim.compile, "optim.compile", "off with parallel fsdp", self.optim.compile)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """Label every video of a catalog, a bucket prefix or a folder, exactly once.

    Example: kinoray label s3://bucket/library/ --checkpoint s3://bucket/runs/first --out s3://bucket/labels

    The result is one row for every input: labelled, or quarantined with a reason. The same command again, after a kill
    or from another machine, does what is missing and nothing else; --plan says what that is.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A catalog (folder of a pack, or .parquet), or a folder or s3:// prefix of videos."""
    checkpoint: str
    """A checkpoint, or a run folder (its best checkpoint)."""
    out: str
    """Folder or s3:// prefix for the result table."""
    split: str = ""
    """Only this split of the catalog; empty for all of it."""
    protocol: ProtocolName = "center"
    """Views of each video. center: one, the middle frames and centre crop, segments and frames as in training. 8x6,
    16x6: the same with 8 or 16 segments x 6 frames. 10x3, 5x3: 10 or 5 interleaved temporal views x 3 crops along the
    longer side (left, centre, right). 25x10: 25 segments x 10 crops (corners and centre, and their mirror images)."""
    view_average: ViewAverage = "probs"
    """What is averaged over the views: probabilities, or logits."""
    num_segments: int | None = None
    """Segments of each view. Default: as in training, or what the protocol names."""
    top_k: int = 5
    """Classes named for each video."""
    scores: ScoreKind = "softmax"
    """`softmax`: one class a video. `sigmoid`: any number of classes, for a network that was trained so; those that
    reach the threshold are named."""
    calibration: str = ""
    """calibration.json of `kinoray calibrate`, made with this checkpoint: its temperature, and the margins of
    early_exit."""
    temperature: float = 0.0
    """Logits are divided by it before they become scores. Default: the calibration's, else 1."""
    threshold: float = 0.0
    """Rows whose first score is lower are marked `abstained`."""
    min_margin: float = 0.0
    """Rows whose first score is less than this above the second are, too."""
    all_scores: bool = False
    """Store the score of every class, too (column `scores`, in the order of the model's classes)."""
    embeddings: bool = False
    """Store what goes into the network's classifiers (column `embedding`, float16)."""
    segment_scores: bool = False
    """Store the logits of each segment (column `segment_logits`, segments x classes in one list)."""
    window_s: float = 0.0
    """Videos longer than this many seconds are cut into windows of this length. Each window is labelled (`kinoray
    labels --windows`), and the video's row is the mean over its windows. Default: a video is one clip."""
    window_stride_s: float = 0.0
    """Seconds from one window's start to the next one's. Default: window_s, so that they touch."""
    early_exit: Literal["off", "exact", "margin"] = "off"
    """Look at a video's segments one after the other and stop early. exact: when the others cannot change its top-1
    (networks with consensus=probs; scores are those of the segments seen). margin: when the lead reaches a margin
    that the calibration found to change at most max_changed of the labels."""
    max_changed: float = 0.001
    """Share of videos that early_exit=margin may give another top-1."""
    plan: bool = False
    """Say how many videos are done, new and changed, and stop there."""
    batch_size: int = 8
    """Clips a forward pass; a video is one clip for each view. 0: as many as the GPU's memory holds, found by the first
    worker and kept for the labelling (8 on CPUs)."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: decode with the workers' GPUs (NVDEC), where the model runs; see docs/decoders.md."""
    unit_size: int = 64
    """Videos a unit of work: what is committed at once, and what at most is done again after a kill."""
    max_bad_fraction: float = 0.2
    """More quarantined videos than this share make the job exit non-zero (the table is complete all the same)."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the model runs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        for name in ("top_k", "unit_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check_scoring(self.batch_size, self.decode_device, self.resources)
        for name in ("temperature", "window_s", "window_stride_s"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("threshold", "min_margin", "max_changed", "max_bad_fraction"):
            _check_fraction(name, getattr(self, name))
        _check_segments(self.protocol, self.num_segments)
        strided = self.window_stride_s
        require(not strided or strided <= self.window_s, "window_stride_s", f"at most {self.window_s:g}", strided)
        self._check_early_exit()

    def _check_early_exit(self) -> None:
        if self.early_exit == "margin":
            named = bool(self.calibration)
            require(
                named, "calibration", "calibration.json of kinoray calibrate with early_exit margin", self.calibration
            )
        if self.early_exit != "off" or self.segment_scores:
            name = "segment_scores" if self.early_exit == "off" else "early_exit"
            one_view = PROTOCOLS[self.protocol].views(self.view_average).num_views == 1
            wanted = "off with window_s or a protocol of several views"
            require(one_view and not self.window_s, name, wanted, getattr(self, name))
        both = self.early_exit != "off" and self.segment_scores
        wanted = f"off with early_exit {self.early_exit}, which does not run all segments"
        require(not both, "segment_scores", wanted, self.segment_scores)

    @property
    def windows(self) -> WindowsConfig | None:
        """How long videos are cut."""
        if not self.window_s:
            return None
        return WindowsConfig(length_s=self.window_s, stride_s=self.window_stride_s or self.window_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score a checkpoint on a labelled catalog: top-1, top-5, per class, confusion, coverage.

    Example: kinoray evaluate s3://bucket/set --checkpoint s3://bucket/runs/first --out s3://bucket/eval

    It runs the labelling job, so every video counts exactly once, and videos that could not be read are named.
    """

    catalog: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CATALOG")]
    """A pack's folder, or its catalog.parquet; its rows need labels."""
    checkpoint: str
    """A checkpoint, or a run folder (its best checkpoint)."""
    out: str
    """Folder or s3:// prefix for the predictions and evaluation.json."""
    split: str = "val"
    """Split to score; empty for all of the catalog."""
    protocol: ProtocolName = "center"
    """Views of each video. center: one, the middle frames and centre crop, segments and frames as in training. 8x6,
    16x6: the same with 8 or 16 segments x 6 frames. 10x3, 5x3: 10 or 5 interleaved temporal views x 3 crops along the
    longer side (left, centre, right). 25x10: 25 segments x 10 crops (corners and centre, and their mirror images)."""
    view_average: ViewAverage = "probs"
    """What is averaged over the views: probabilities, or logits."""
    num_segments: int | None = None
    """Segments of each view. Default: as in training, or what the protocol names."""
    batch_size: int = 8
    """Clips a forward pass; a video is one clip for each view. 0: as many as the GPU's memory holds, found by the first
    worker and kept for the labelling (8 on CPUs)."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: decode with the workers' GPUs (NVDEC), where the model runs; see docs/decoders.md."""
    unit_size: int = 64
    """Videos a unit of work."""
    max_bad_fraction: float = 0.2
    """More quarantined videos than this share make the job exit non-zero."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the model runs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        require(self.unit_size >= 1, "unit_size", "at least 1", self.unit_size)
        _check_scoring(self.batch_size, self.decode_device, self.resources)
        _check_segments(self.protocol, self.num_segments)
        _check_fraction("max_bad_fraction", self.max_bad_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsConfig:
    """List the training runs below a folder or s3:// prefix: how they stand, epochs, best metric, network.

    Example: kinoray runs s3://bucket/runs

    It reads what the runs have written, and needs no cluster. STATUS is one of

      running   its driver gave a sign of life within the last two minutes
      finished  all epochs are done
      stopped   it was interrupted, or its driver was killed; the command that started it goes on with it
      failed    it ended with an error, which is shown below the table
      damaged   its files cannot be read

    BEST is the highest top-1 on the validation split, or the lowest loss where none is scored. All of a run's metrics
    are in its metrics.jsonl, its curves in learning_curves.svg.
    """

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """A run folder, or a folder or s3:// prefix with runs at any depth."""
    json: bool = False
    """One JSON object a run instead of the table, with times in seconds."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
