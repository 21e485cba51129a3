"""The settings of `kinoray evaluate`, `calibrate`, `ensemble` and `compare`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kinoray.config.check import check_fraction
from kinoray.config.shared import (
    AllowedFactories,
    InferenceConfig,
    OwnDecodeConfig,
    ResourcesConfig,
    StorageConfig,
    require,
)
from kinoray.label.config import check_scoring, check_segments
from kinoray.video.protocol import PROTOCOLS, ProtocolName, ViewAverage

__all__ = ["CalibrateConfig", "CompareConfig", "EnsembleConfig", "EvaluateConfig"]


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
    allow_factory: AllowedFactories = ()
    """PACKAGE:FUNCTION of a network of your own that the checkpoint names: its code runs here with your rights. Without
    it only networks that ship with kinoray are built. May be given several times."""
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
    """Clips a forward pass on a GPU; a video is one clip for each view. 0: as many as its memory holds, found by the
    first worker and kept for the labelling. On CPUs each clip is run by itself: its digits depend on no other then."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: decode with the workers' GPUs (NVDEC), where the model runs; see docs/decoders.md."""
    unit_size: int = 64
    """Videos a unit of work."""
    max_bad_fraction: float = 0.2
    """More quarantined videos than this share make the job exit non-zero."""
    decode: OwnDecodeConfig = field(default_factory=OwnDecodeConfig)
    """What a video may cost, and what decodes it, as in `kinoray label`."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the model runs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        require(self.unit_size >= 1, "unit_size", "at least 1", self.unit_size)
        check_scoring(self.batch_size, self.decode_device, self.resources)
        check_segments(self.protocol, self.num_segments)
        check_fraction("max_bad_fraction", self.max_bad_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Fit on a labelled catalog what makes scores honest: a temperature, and margins at which labelling may stop early.

    Example: kinoray calibrate s3://bucket/set --checkpoint s3://bucket/runs/first --out s3://bucket/calibration

    Take videos that the checkpoint was not trained on, a thousand or more: 0.1% of changed labels cannot be told from
    none on fewer. `kinoray label --calibration OUT/calibration.json` then uses it; both must look at the same segments.
    """

    catalog: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CATALOG")]
    """A pack's folder, or its catalog.parquet; its rows need labels."""
    checkpoint: str
    """A checkpoint, or a run folder (its best checkpoint)."""
    out: str
    """Folder or s3:// prefix for the predictions and calibration.json."""
    allow_factory: AllowedFactories = ()
    """PACKAGE:FUNCTION of a network of your own that the checkpoint names: its code runs here with your rights. Without
    it only networks that ship with kinoray are built. May be given several times."""
    split: str = "val"
    """Split to fit on; empty for all of the catalog."""
    protocol: ProtocolName = "center"
    """As for `label`; of one view."""
    num_segments: int | None = None
    """Segments of each video. Default: as in training, or what the protocol names."""
    batch_size: int = 8
    """Clips a forward pass on a GPU; on CPUs each is run by itself."""
    max_bad_fraction: float = 0.2
    """More quarantined videos than this share make the job exit non-zero."""
    decode: OwnDecodeConfig = field(default_factory=OwnDecodeConfig)
    """What a video may cost, and what decodes it, as in `kinoray label`."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the model runs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        one_view = PROTOCOLS[self.protocol].views("probs").num_views == 1
        require(one_view, "protocol", "one of a single view (center, 8x6, 16x6)", self.protocol)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleConfig:
    """Average the scores of several evaluations of the same videos, video by video, and score the result.

    Example: kinoray ensemble runs/rgb/eval runs/flow/eval --weights 1 1.5 --out runs/both/eval

    It decodes nothing: `evaluate` stored the score of every class. All must be of the same classes and videos; a video
    that one of them could not read has no answer here either. What is written is an evaluation itself: report, compare
    and ensemble take it.
    """

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="EVAL EVAL [EVAL ...]")]
    """What `evaluate` or `ensemble` wrote: the --out, or the folder of one labelling in it."""
    out: str
    """Folder or s3:// prefix for the predictions and evaluation.json."""
    weights: tuple[float, ...] = ()
    """Weight of each evaluation, in their order. Default: all alike."""
    catalog: str = ""
    """Where the catalog is. Default: where it was when it was evaluated."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        require(len(self.evaluations) >= 2, "evaluations", "two or more", self.evaluations)
        fits = not self.weights or len(self.weights) == len(self.evaluations)
        require(fits, "weights", f"{len(self.evaluations)} numbers, one for each evaluation", self.weights)
        require(all(weight > 0 for weight in self.weights), "weights", "greater than 0", self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Compare two evaluations on the videos that both scored: classes that moved, videos that flipped, McNemar's test.

    Example: kinoray compare runs/first/eval runs/second/eval --out compare.html

    One self-contained HTML page, and the same as JSON beside it (compare.json).
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EVAL_A")]
    """What `evaluate` or `ensemble` wrote: the --out, or the folder of one labelling in it."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EVAL_B")]
    """The one it is compared with; differences are B less A."""
    out: str = "compare.html"
    """The page (a file or an s3:// object)."""
    catalog: str = ""
    """Where the catalog of both is. Default: where each was when it was evaluated."""
    frames_per_video: int = 4
    """Frames in each contact strip; 0 for none."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        require(0 <= self.frames_per_video <= 16, "frames_per_video", "in 0 .. 16", self.frames_per_video)
