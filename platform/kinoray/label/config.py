"""The settings of `kinoray label`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from kinoray.catalog.folders import is_video
from kinoray.config.scoring import LabelWorkConfig, ScoreKind
from kinoray.config.shared import require
from kinoray.errors import check_fraction

__all__ = ["LabelConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig(LabelWorkConfig):
    """Label every video of a catalog, a bucket prefix or a folder, exactly once.

    Example: kinoray label s3://bucket/library/ --checkpoint s3://bucket/runs/first --out s3://bucket/labels

    The result is one row for every input: labelled, or quarantined with a reason. The same command again, after a kill
    or from another machine, does what is missing and nothing else; --plan says what that is.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder or s3:// prefix of videos, a CSV that lists them, an S3 Inventory (its manifest.json), a catalog (a
    pack's folder, a .parquet, or several as 'PLACE/*.parquet'), or one video."""
    out: str = ""
    """Folder or s3:// prefix for the result table. Without it the answer for one video is printed, and nothing is
    written."""
    split: str = ""
    """Only this split of the catalog; empty for all of it."""
    top_k: int | None = None
    """Classes named for each video; all, where the network has fewer. Default: 5; all that reach their threshold, where
    the network was trained on label lists."""
    scores: ScoreKind | None = None
    """`softmax`: one class a video. `sigmoid`: any number of classes; those that reach the threshold are named.
    Default: what the network was trained for."""
    temperature: float = 0.0
    """Logits are divided by it before they become scores. Default: the calibration's, else 1."""
    threshold: float = 0.0
    """Rows whose first score is lower are marked `abstained`; with sigmoid, classes whose score is lower are not named.
    Default: none; of a network that was trained on label lists those of the calibration, one a class, or 0.5."""
    min_margin: float = 0.0
    """Rows whose first score is less than this above the second are, too."""
    all_scores: bool = False
    """Store the score of every class, too (column `scores`, in the order of the model's classes)."""
    segment_scores: bool = False
    """Store the logits of each segment (column `segment_logits`, segments x classes in one list)."""
    plan: bool = False
    """Say how many videos are done, new and changed, and stop there."""

    def __post_init__(self) -> None:
        LabelWorkConfig.__post_init__(self)
        if self.source and not self.out:
            wanted = f"given, since {self.source} is not one video by its name (.mp4 and others)"
            require(is_video(self.source.rpartition("/")[2]), "out", wanted, self.out)
            require(not self.plan, "out", "given with plan", self.out)
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1", self.top_k)
        require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        check_fraction("threshold", self.threshold)
        check_fraction("min_margin", self.min_margin)
        if self.segment_scores:
            self.require_whole_videos("segment_scores")
            wanted = f"off with early_exit {self.early_exit}, which does not run all segments"
            require(self.early_exit == "off", "segment_scores", wanted, self.segment_scores)
