"""Config trees of the verbs that work on predictions: `labels`, `report`, `export` and `correct`."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import DecodeConfig, StoreConfig, require

__all__ = [
    "CorrectConfig",
    "ExportConfig",
    "LabelsConfig",
    "PredictionsConfig",
    "ReportConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionsConfig(StoreConfig):
    """Predictions, and where they are: what each of these verbs asks."""

    predictions: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")]
    """What `label` or `evaluate` wrote: the --out, or the folder of one labelling in it."""


def _check_share(name: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, name, "in 0 .. 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsConfig(PredictionsConfig):
    """Read predictions: filter them, join them with a catalog, and print them or write them to a file or a table.

    Example: kinoray labels labels/library --status labelled --margin 0 0.1 --sort margin --limit 20

    All filters must hold. Without --format it prints a table for the eyes, the first 50 rows unless --limit says more;
    all other formats have all rows. A CSV is safe to open in a spreadsheet: text that would be taken for a formula
    starts with a quote sign. lance, iceberg and delta are tables, which each run replaces in one commit.
    """

    status: tuple[Literal["labelled", "quarantined", "skipped", "abstained"], ...] = ()
    """Only rows of these states; labelled has the rows that abstained, too."""
    label: tuple[str, ...] = ()
    """Only rows whose first class is one of these; where videos may have several classes, any class."""
    score: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="FROM TO")] = None
    """Only rows whose first class has a score from the first number to the second one, such as 0 0.5."""
    margin: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="FROM TO")] = None
    """Only rows whose first class leads the second by so much: from, and to."""
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
    format: Literal["table", "csv", "jsonl", "parquet", "lance", "iceberg", "delta"] = "table"
    """What is printed or written. lance, iceberg and delta each need an extra: pip install 'kinoray[delta]'."""
    to: str = ""
    """File or s3:// object to write, in the --format given; for lance, iceberg and delta a folder or s3:// prefix.
    Default: print it."""
    summary: bool = False
    """Say instead how many videos have each class, with which mean score, and where the labelling's time went: the
    start, what workers waited for, the slowest units. It may be asked while the job runs; --to then writes the units'
    spans for https://ui.perfetto.dev."""
    windows: bool = False
    """Rows of the windows of long videos (label --window-s) instead of rows of videos."""

    def __post_init__(self) -> None:
        for name in ("score", "margin"):
            span = getattr(self, name)
            fits = span is None or 0 <= span[0] <= span[1] <= 1
            require(fits, name, "two numbers in 0 .. 1, the smaller one first", span)
        require(self.limit is None or self.limit >= 0, "limit", "at least 0", self.limit)
        require(not self.descending or bool(self.sort), "descending", "given with --sort only", self.descending)
        require(self.format != "parquet" or bool(self.to), "to", "a file with --format parquet", self.to)
        ending = PurePosixPath(self.to).suffix.removeprefix(".")
        known = ending if ending in ("csv", "jsonl") else "parquet"
        is_written = self.format != "table" or self.summary or not self.to
        require(
            is_written, "format", f"given with --to, such as --format {known}: a table is only printed", self.format
        )
        is_printed = self.format in ("table", "csv", "jsonl", "parquet")
        require(is_printed or bool(self.to), "to", f"a folder or s3:// prefix with --format {self.format}", self.to)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(PredictionsConfig):
    """Hand predictions over to another tool, with one entry for every labelled video.

    Example: kinoray export labels/library --format label-studio --to handover

    What has no answer is in quarantined.jsonl beside it, and both are counted: entries + quarantined = rows. In csv and
    jsonl every row is there, quarantined ones too. docs/labels.md says how each tool takes it in.

      fiftyone      a dataset that FiftyOne loads (dataset_type FiftyOneDataset), predictions with confidence
      label-studio  tasks.json with pre-annotations, and labeling-config.xml for the project
      datumaro      Datumaro's own JSON: a video and a label each
      jsonl, csv    the table with all its columns
    """

    format: Literal["fiftyone", "label-studio", "datumaro", "jsonl", "csv"]
    """For which tool."""
    to: str
    """Folder on this machine for the files; new or empty, or what an export was writing before."""
    copy_videos: str = ""
    """Copy the videos there, too (videos/): these tools cannot read a video inside a shard, nor all of them s3://.

    Name what was labelled (folder, prefix, pack or list): only its videos are copied, whatever files the table names.
    """
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of what is decoded of a video for it."""

    def __post_init__(self) -> None:
        require(self.decode.device == "cpu", "decode.device", "cpu for so few frames", self.decode.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectConfig(PredictionsConfig):
    """Corrected labels (and confident ones) -> a catalog to train on; videos stay where they are.

    Example: kinoray correct labels/library --corrections corrections.csv --accept-score 0.95 --out sets/second

    It is trained on with: kinoray train sets/second/catalog.parquet --out runs/second --init-from runs/first

    A correction is a line of the CSV that a report lets you download: row_key and label are what counts. The label
    `__bad__` leaves the video out. A video is in the catalog if it was corrected, has a label in --catalog, or was
    labelled with at least --accept-score, in this order. Classes keep the model's order, so that a network can be
    trained on from where it is. `kinoray pack sets/second/catalog.parquet --out ...` copies the videos into shards.

    Where videos may have several classes, a label is all of them: `red|round`, or `|` for none. Those that the model
    named are accepted where the lowest of their scores is at least --accept-score.
    """

    out: str
    """Folder or s3:// prefix for catalog.parquet and corrections.json."""
    corrections: tuple[str, ...] = ()
    """CSV files (local or s3://) with the columns row_key and label, as the report's download has them."""
    accept_score: float | None = None
    """Take the model's label, too, where its score is at least this. Default: never."""
    catalog: str = ""
    """The catalog that was labelled (a pack's folder, .parquet): its labels, splits, checksums and sizes are kept."""
    new_classes: tuple[str, ...] = ()
    """Classes that corrections may name although the model does not know them; they come last."""
    val_fraction: float = 0.0
    """Share of each class, of videos without a split, that goes to split `val`; as `kinoray pack` draws it."""

    def __post_init__(self) -> None:
        _check_share("accept_score", self.accept_score)
        _check_share("val_fraction", self.val_fraction)
        some = bool(self.corrections) or self.accept_score is not None
        require(some, "corrections", "one or more files, or --accept-score be given", self.corrections)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig(PredictionsConfig):
    """Make a static site from predictions: numbers, contact strips, filters, classes, quarantine, corrections.

    Example: kinoray report s3://bucket/labels --out report

    OUT becomes a folder (or an s3:// prefix) with index.html, assets/ and data/. Open index.html where it lies, or
    serve the folder from a bucket: it needs no program of ours and no network. What you correct there stays in the
    browser until you download it as a CSV, which the next person loads and `kinoray correct` takes.

    Videos that are files play where index.html is opened on the machine that has them. --serve plays all: members of
    shards, and s3:// with your credentials.
    """

    out: str = "report"
    """The site's folder or s3:// prefix; a site that is there is replaced."""
    catalog: str = ""
    """Labelled catalog to compare with; adds accuracy, precision, recall and confusion."""
    title: str = "kinoray report"
    """Heading of the site."""
    max_videos: int = 20_000
    """Videos listed, least certain first; the numbers always cover all."""
    max_strips: int = 2_000
    """Listed videos that get a contact strip, least certain first; each is read and decoded for it. 0: none."""
    serve: bool = False
    """Serve the site and its videos to a browser on this machine (127.0.0.1) until Ctrl-C."""
    presign_hours: float = 0.0
    """Put addresses into the site that play s3:// videos for so many hours, at most 168. Whoever has the site can read
    these videos until then; a signature by a role ends with the role's session. 0: none."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of what is decoded of a video for it."""

    def __post_init__(self) -> None:
        require(self.max_videos >= 0, "max_videos", "at least 0", self.max_videos)
        require(self.max_strips >= 0, "max_strips", "at least 0", self.max_strips)
        require(0 <= self.presign_hours <= 168, "presign_hours", "in 0 .. 168", self.presign_hours)
        require(self.decode.device == "cpu", "decode.device", "cpu for so few frames", self.decode.device)
        require(bool(self.out), "out", "a folder or s3:// prefix", self.out)
        is_page = self.out.rstrip("/").lower().endswith((".html", ".htm"))
        require(not is_page, "out", "a folder or s3:// prefix (the report is a site now, no single page)", self.out)
