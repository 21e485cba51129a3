"""The settings of `kinoray label`, and the checks that all verbs share which score videos."""

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
from kinoray.video.protocol import PROTOCOLS, ProtocolName, ScoreKind, ViewAverage, WindowsConfig

__all__ = ["LabelConfig", "check_scoring", "check_segments"]


def check_segments(protocol: ProtocolName, num_segments: int | None) -> None:
    require(num_segments is None or num_segments >= 1, "num_segments", "at least 1", num_segments)
    if num_segments is not None and PROTOCOLS[protocol].num_segments is not None:
        require(False, "num_segments", f"left out with protocol {protocol}, which names it", num_segments)


def check_scoring(batch_size: int, decode_device: str, resources: ResourcesConfig) -> None:
    require(batch_size >= 0, "batch_size", "at least 0", batch_size)
    fits = decode_device == "cpu" or resources.gpus_per_worker > 0
    require(fits, "decode_device", "cpu without resources.gpus_per_worker", decode_device)


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
    allow_factory: AllowedFactories = ()
    """PACKAGE:FUNCTION of a network of your own that the checkpoint names: its code runs here with your rights. Without
    it only networks that ship with kinoray are built. May be given several times."""
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
    """Clips a forward pass on a GPU; a video is one clip for each view. 0: as many as its memory holds, found by the
    first worker and kept for the labelling. On CPUs each clip is run by itself: its digits depend on no other then."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: decode with the workers' GPUs (NVDEC), where the model runs; see docs/decoders.md."""
    unit_size: int = 64
    """Videos a unit of work: what is committed at once, and what at most is done again after a kill."""
    max_bad_fraction: float = 0.2
    """More quarantined videos than this share make the job exit non-zero (the table is complete all the same)."""
    decode: OwnDecodeConfig = field(default_factory=OwnDecodeConfig)
    """What a video may cost, and what decodes it; never taken from the checkpoint."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the model runs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        for name in ("top_k", "unit_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        check_scoring(self.batch_size, self.decode_device, self.resources)
        for name in ("temperature", "window_s", "window_stride_s"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("threshold", "min_margin", "max_changed", "max_bad_fraction"):
            check_fraction(name, getattr(self, name))
        check_segments(self.protocol, self.num_segments)
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
