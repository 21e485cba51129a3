"""Config trees of the verbs that work on a finished result table: `labels`, `vacuum`, `export` and `correct`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import StorageConfig, require

__all__ = ["CorrectConfig", "ExportConfig", "LabelsConfig", "VacuumConfig"]

_Table = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")]


def _check_share(name: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, name, "in 0 .. 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsConfig:
    """Read a result table: filter it, join it with a catalog, and print it or write it to a file.

    Example: kinoray labels labels/library --status labelled --max-margin 0.1 --sort margin --limit 20

    All filters must hold. Without --format it prints a table for the eyes, the first 50 rows unless --limit says more;
    csv, jsonl and parquet have all rows. A CSV is safe to open in a spreadsheet: text that would be taken for a formula
    starts with a quote sign.
    """

    predictions: _Table
    """What `label`, `evaluate` or `ensemble` wrote: the --out, or the folder of one labelling in it."""
    status: tuple[Literal["labelled", "quarantined", "skipped", "abstained"], ...] = ()
    """Only rows of these states; labelled has the rows that abstained, too."""
    label: tuple[str, ...] = ()
    """Only rows whose first class is one of these."""
    min_score: float | None = None
    """Only rows whose first class has at least this probability."""
    max_score: float | None = None
    """Only rows whose first class has at most this probability."""
    min_margin: float | None = None
    """Only rows whose first class leads the second by at least this."""
    max_margin: float | None = None
    """Only rows whose first class leads the second by at most this."""
    video_id: str = ""
    """Only videos whose id is like this pattern: * stands for any text, ? for a character, [ab] for one of them."""
    join: str = ""
    """A catalog (a pack's folder, .parquet, .csv) whose columns are added as catalog_label, catalog_split, ...; rows
    meet by video_id."""
    columns: tuple[str, ...] = ()
    """Columns, in this order: those of the table, `label` and `score` (the first class), and catalog_* with --join."""
    sort: Literal["", "score", "margin", "entropy", "video_id"] = ""
    """Sort by this, the smallest first and rows without it last. Default: the order of the catalog."""
    descending: bool = False
    """Sort with the largest first."""
    limit: int | None = None
    """At most so many rows."""
    format: Literal["table", "csv", "jsonl", "parquet"] = "table"
    """What is printed or written."""
    to: str = ""
    """File or s3:// object to write. Default: print it."""
    windows: bool = False
    """Rows of the windows of long videos (label --window-s) instead of rows of videos."""
    manifest: bool = False
    """Write manifest.json beside the table instead: the names of the Parquet files that count (see docs/labels.md)."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        for name in ("min_score", "max_score", "min_margin", "max_margin"):
            _check_share(name, getattr(self, name))
        require(self.limit is None or self.limit >= 0, "limit", "at least 0", self.limit)
        require(not self.descending or bool(self.sort), "descending", "given with --sort only", self.descending)
        require(self.format != "parquet" or bool(self.to), "to", "a file with --format parquet", self.to)


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumConfig:
    """Remove what killed or losing writers left under a result table. What a commit names is never touched.

    Example: kinoray vacuum s3://bucket/labels --dry-run

    It is safe beside running jobs: files that are younger than --older-than-h stay, since a job may be about to commit
    them. A commit whose rows are gone or changed is reported with what to do, and makes the exit code 1.
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The --out of `label`, `evaluate` or `ensemble` (all labellings in it), or the folder of one labelling."""
    older_than_h: float = 24.0
    """Hours since a file was written, by the store's clock, before it may go."""
    dry_run: bool = False
    """Say what would go, and remove nothing."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        require(self.older_than_h > 0, "older_than_h", "greater than 0", self.older_than_h)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Hand a result table over to another tool, with one entry for every labelled video.

    Example: kinoray export labels/library --format label-studio --to handover

    What has no answer is in quarantined.jsonl beside it, and both are counted: entries + quarantined = rows. In csv and
    jsonl every row is there, quarantined ones too. docs/labels.md says how each tool takes it in.

      fiftyone      a dataset that FiftyOne loads (dataset_type FiftyOneDataset), predictions with confidence
      label-studio  tasks.json with pre-annotations, and labeling-config.xml for the project
      datumaro      Datumaro's own JSON: a video and a label each
      jsonl, csv    the table with all its columns
    """

    predictions: _Table
    """What `label`, `evaluate` or `ensemble` wrote: the --out, or the folder of one labelling in it."""
    format: Literal["fiftyone", "label-studio", "datumaro", "jsonl", "csv"]
    """For which tool."""
    to: str
    """Folder on this machine for the files; new or empty, or what an export was writing before."""
    copy_videos: bool = False
    """Copy the videos there, too (videos/): these tools cannot read a video inside a shard, nor all of them s3://."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectConfig:
    """Corrected labels (and confident ones) -> a catalog to train on; videos stay where they are.

    Example: kinoray correct labels/library --corrections corrections.csv --accept-score 0.95 --out sets/second

    What it writes is trained on with: kinoray train sets/second --out runs/second --init-from runs/first

    A correction is a line of the CSV that a report lets you download: row_key and label are what counts. The label
    `__bad__` leaves the video out. A video is in the catalog if it was corrected, has a label in --catalog, or was
    labelled with at least --accept-score, in this order. Classes keep the model's order, so that a network can be
    trained on from where it is. `kinoray pack sets/second --out ...` copies the videos into shards of their own.
    """

    predictions: _Table
    """What `label` or `evaluate` wrote: the --out, or the folder of one labelling in it."""
    out: str
    """Folder or s3:// prefix for catalog.parquet and corrections.json."""
    corrections: tuple[str, ...] = ()
    """CSV files (local or s3://) with the columns row_key and label, as the report's download has them."""
    accept_score: float | None = None
    """Take the model's word, too, where its probability is at least this. Default: never."""
    catalog: str = ""
    """The catalog that was labelled (a pack's folder, .parquet): its labels, splits, checksums and sizes are kept."""
    new_classes: tuple[str, ...] = ()
    """Classes that corrections may name although the model does not know them; they come last."""
    val_fraction: float = 0.0
    """Share of the videos without a split that goes to split `val` (by a hash of the video's id)."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        _check_share("accept_score", self.accept_score)
        _check_share("val_fraction", self.val_fraction)
        some = bool(self.corrections) or self.accept_score is not None
        require(some, "corrections", "one or more files, or --accept-score be given", self.corrections)
