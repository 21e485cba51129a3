"""The settings of `kinoray evaluate`, `calibrate` and `compare`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.scoring import ScoringConfig, shared_settings
from kinoray.config.shared import DecodeConfig, StoreConfig, require

__all__ = ["CalibrateConfig", "CompareConfig", "EvaluateConfig", "TruthConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthConfig(ScoringConfig):
    """What the verbs ask that run a checkpoint on videos whose classes are known."""

    catalog: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CATALOG")]
    """A pack's folder, or its catalog.parquet; its rows need labels."""
    out: str
    """Folder or s3:// prefix for the predictions and what is found from them."""
    split: str = "val"
    """Split to look at; empty for all of the catalog. An ensemble's is that of its members."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(TruthConfig):
    """Score a checkpoint on a labelled catalog: top-1, top-5, per class, confusion, coverage.

    Example: kinoray evaluate s3://bucket/set --checkpoint s3://bucket/runs/first --out s3://bucket/eval

    A network that was trained on label lists is scored on such: mAP, and of each class average precision and F1, with
    95% intervals.

    It runs the labelling job, so every video counts exactly once, and videos that could not be read are named.

    With --ensemble it averages evaluations of the set that there are, video by video, and scores the result:
    kinoray evaluate s3://bucket/set --ensemble runs/rgb/eval runs/flow/eval --weights 1 1.5 --out runs/both/eval

    That decodes and runs nothing: `evaluate` stored the score of every class. All must be of the same classes and
    videos; a video that one of them could not read has no answer here either. What is written is an evaluation like any
    other.
    """

    checkpoint: str = ""
    """A checkpoint, or a run folder (its best checkpoint); or a published network as `kinoray import` lists them. Left
    out with ensemble."""
    calibration: str = ""
    """calibration.json of `kinoray calibrate`, made with this checkpoint on other videos: its temperature, and its
    thresholds where videos may have several classes."""
    ensemble: tuple[str, ...] = ()
    """Evaluations to average, two or more, instead of a checkpoint: the --out of each, or the folder of one labelling
    in it."""
    weights: tuple[float, ...] = ()
    """Weight of each evaluation of the ensemble, in their order. Default: all alike."""

    def __post_init__(self) -> None:
        ScoringConfig.__post_init__(self)
        if not self.ensemble:
            require(not self.weights, "weights", "left out without ensemble", self.weights)
            return
        require(len(self.ensemble) >= 2, "ensemble", "two evaluations or more", self.ensemble)
        fits = not self.weights or len(self.weights) == len(self.ensemble)
        require(fits, "weights", f"{len(self.ensemble)} numbers, one for each evaluation", self.weights)
        require(all(weight > 0 for weight in self.weights), "weights", "greater than 0", self.weights)
        require(self.split == "val", "split", "left out with ensemble: it is that of its members", self.split)
        require(not self.calibration, "calibration", "left out with ensemble", self.calibration)
        left_out = shared_settings(ScoringConfig(checkpoint="", storage=self.storage), ScoringConfig)
        for name, value in left_out.items():
            given = getattr(self, name)
            require(given == value, name, "left out with ensemble, which runs no network", given)

    def require_one(self) -> None:
        """Raise ConfigError where there is neither a checkpoint nor an ensemble (a file may leave it to the flags)."""
        one = bool(self.checkpoint or self.ensemble)
        require(one, "checkpoint", "given, or ensemble instead of it (one of the two)", self.checkpoint)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig(TruthConfig):
    """Fit on a labelled catalog what makes scores honest: a temperature, and margins at which labelling may stop early.

    For a network that was trained on label lists: a temperature, and for each class the threshold of its highest F1.

    Example: kinoray calibrate s3://bucket/set --checkpoint s3://bucket/runs/first --out s3://bucket/calibration

    Take videos that the checkpoint was not trained on, a thousand or more: 0.1% of changed labels cannot be told from
    none on fewer. `kinoray label --calibration OUT/calibration.json` then uses it; both must look at the same segments.
    """

    def __post_init__(self) -> None:
        ScoringConfig.__post_init__(self)
        require(self.has_one_view, "protocol", "one of a single view (center, 8x6, 16x6)", self.protocol)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(StoreConfig):
    """Compare two evaluations on the videos that both scored: classes that moved, videos that flipped, McNemar's test.

    Example: kinoray compare runs/first/eval runs/second/eval --out compare.html

    One self-contained HTML page, and the same as JSON beside it (compare.json).
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EVAL_A")]
    """What `evaluate` wrote: the --out, or the folder of one labelling in it."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EVAL_B")]
    """The one it is compared with; differences are B less A."""
    out: str = "compare.html"
    """The page (a file or an s3:// object)."""
    catalog: str = ""
    """Where the catalog of both is. Default: where each was when it was evaluated, if that is a pack or a .parquet on
    this machine or in the bucket of the evaluation; frames are then shown of videos in its folder."""
    frames_per_video: int = 4
    """Frames in each contact strip; 0 for none."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of what is decoded of a video for it."""

    def __post_init__(self) -> None:
        require(self.decode.device == "cpu", "decode.device", "cpu for so few frames", self.decode.device)
        require(0 <= self.frames_per_video <= 16, "frames_per_video", "in 0 .. 16", self.frames_per_video)
