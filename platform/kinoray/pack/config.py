"""The settings of `kinoray pack`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import DecodeConfig, JobConfig, WorkersConfig, require
from kinoray.errors import check_fraction

__all__ = ["PackConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig(JobConfig):
    """Pack a folder of class folders, or a CSV (path,label[,split]), into tar shards and a catalog.

    Example: kinoray pack videos/ --out s3://bucket/set

    Where a video may have several classes, or none, the CSV has a column labels instead: a.mp4,red|round and b.mp4,|

    Every file that is found is either packed or listed in quarantine.parquet with a reason, but for what is no video by
    its name (.json, .vtt, .jpg, hidden, ...), or by its first bytes where the name does not say: that is counted. The
    same command again goes on where a killed run stopped.

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
    """Folder or s3:// prefix of class folders (or of train/, val/ with class folders), a CSV path,label[,split]
    (or path,labels[,split]), or a catalog (a pack's folder, or .parquet), whose videos are packed anew."""
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
    limit: int | None = None
    """Kinetics: only the first so many annotation rows of each split, duplicates and leaks not counted."""
    transcode: bool = False
    """Pack H.264, short side 256 (never enlarged), a key frame every 12 frames, no sound, instead of the original."""
    shard_mb: int = 256
    """Aimed size of a shard, in MiB."""
    val_fraction: float = 0.0
    """Share of each class that goes to split `val` where the source names no splits: at least one video of each class
    with two or more. Copies of a video go to one side."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits that a file is probed against."""
    resources: WorkersConfig = field(default_factory=WorkersConfig)
    """Workers."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        require(self.shard_mb >= 1, "shard_mb", "at least 1", self.shard_mb)
        check_fraction("val_fraction", self.val_fraction)
        require(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)
        if self.kinetics is None:
            for name, default in (("annotations", ()), ("label_names", ""), ("leaks", "remove"), ("limit", None)):
                require(getattr(self, name) == default, name, "given with --kinetics only", getattr(self, name))
        else:
            require(bool(self.annotations), "annotations", "one or more files with --kinetics", self.annotations)
            require(
                self.val_fraction == 0, "val_fraction", "0 with --kinetics (annotations name it)", self.val_fraction
            )
