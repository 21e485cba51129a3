"""Config trees of the verbs that work on predictions: `labels` and those below it, `report`, `export`, `correct`."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import AllowedFactories, DecodeConfig, StoreConfig, require

__all__ = [
    "CorrectConfig",
    "DedupConfig",
    "ExportConfig",
    "FoundConfig",
    "LabelsConfig",
    "PredictionsConfig",
    "ReportConfig",
    "SearchConfig",
    "SelectConfig",
    "VectorsConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionsConfig(StoreConfig):
    """Predictions, and where they are: what each of these verbs asks."""

    predictions: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")]
    """What `label` or `evaluate` wrote: the --out, or the folder of one labelling in it."""


def _check_share(name: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, name, "in 0 .. 1", value)


def _check_written(kind: str, to: str) -> None:
    """Refuse a file for what is printed for the eyes, and Parquet without a file."""
    require(kind != "parquet" or bool(to), "to", "a file with --format parquet", to)
    ending = PurePosixPath(to).suffix.removeprefix(".")
    known = ending if ending in ("csv", "jsonl") else "parquet"
    wanted = f"given with --to, such as --format {known}: a table is only printed"
    require(kind != "table" or not to, "format", wanted, kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsConfig(PredictionsConfig):
    """Read predictions: filter them, join them with a catalog, and print them or write them to a file or a table.

    Example: kinoray labels labels/library --status labelled --margin 0 0.1 --sort margin --limit 20

    All filters must hold. Without --format it prints a table for the eyes, the first 50 rows unless --limit says more;
    all other formats have all rows. A CSV is safe to open in a spreadsheet: text that would be taken for a formula
    starts with a quote sign. lance, iceberg and delta are tables, which each run replaces in one commit.

    Three verbs below it work on embeddings (label --embeddings); each has a --help of its own:

      kinoray labels search OUT --like VIDEO                     what is most similar to a video
      kinoray labels dedup OUT                                   near duplicates, and which of them to keep
      kinoray labels select OUT --budget 200 --out next.csv      what to label next
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
        if not (self.summary and self.format == "table"):
            _check_written(self.format, self.to)
        is_printed = self.format in ("table", "csv", "jsonl", "parquet")
        require(is_printed or bool(self.to), "to", f"a folder or s3:// prefix with --format {self.format}", self.to)


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorsConfig(PredictionsConfig):
    """What verbs ask that read embeddings."""

    cache: str = ""
    """Folder of this machine where the embeddings are kept as one file (1 GB for 10^6 of 512 numbers), so that the next
    question need not read all parts again; it is made anew once there are other rows. Default: keep nothing."""

    def __post_init__(self) -> None:
        require("://" not in self.cache, "cache", "a folder of this machine", self.cache)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundConfig(VectorsConfig):
    """What verbs ask that show rows which they found by embeddings."""

    format: Literal["table", "csv", "jsonl", "parquet"] = "table"
    """What is printed or written; a table is for the eyes, and shows 50 rows at most."""
    to: str = ""
    """File or s3:// object to write, in the --format given. Default: print it."""

    def __post_init__(self) -> None:
        VectorsConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        _check_written(self.format, self.to)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig(FoundConfig):
    """Find the videos whose embeddings are most similar to that of one video, or to a text.

    Example: kinoray labels search labels/library --like videos/holiday.mp4 --limit 20

    Every embedding is compared (cosine of the float16 column, summed in float32), so what is printed is exactly the
    nearest. The videos must have been labelled with --embeddings; for a text, by an image-text network (--classes).
    """

    like: str = ""
    """A video of the table, by its video_id or row_key; or a video file or s3:// object, which is decoded here and seen
    by the network that labelled the others, under the same settings."""
    text: str = ""
    """What the videos show, in place of --like: "a dog runs along a beach". It is read as it is, without a prompt."""
    limit: int = 10
    """So many videos."""
    checkpoint: str = ""
    """Where the network lies now, for a text or a video that is not in the table. Default: where it lay when it
    labelled."""
    allow_factory: AllowedFactories = ()
    """PACKAGE:FUNCTION of a network of your own that the checkpoint names: its code runs here with your rights. May be
    given several times."""

    def __post_init__(self) -> None:
        FoundConfig.__post_init__(self)
        fits = bool(self.like) != bool(self.text.strip())
        require(fits, "like", "a video, or left out with a --text", self.like)
        require(self.limit >= 1, "limit", "at least 1", self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupConfig(FoundConfig):
    """Find near duplicates by their embeddings: copies that were encoded again, scaled, or cut a little.

    Example: kinoray labels dedup labels/library --format csv --to duplicates.csv

    One row for each video that has a duplicate, group by group; the first of a group, with keep = true, is the one to
    keep: of those within 2% of the longest the one with the most pixels, then with the most bytes, then the first in
    the table; what decodes without damage goes before all that. Lengths, sizes and pixels are those of the catalog in
    --join; without it only the damage and the order count. `similarity` is to the one to keep.

    Two videos are of one group if they are as similar as --threshold, or others of it lie between them that are.

    Example: kinoray labels dedup labels/set --join sets/mine --across catalog_split -- the same content in train and
    val
    """

    threshold: float = 0.98
    """From which similarity (cosine) on two videos are duplicates. It depends on the network: look at the rows with the
    lowest similarity, raise it where they are no copies, and lower it (0.85) where copies are missing. docs/labels.md
    says what was measured."""
    join: str = ""
    """A catalog (a pack's folder, .parquet, .csv) whose columns are added as catalog_label, catalog_split, ...; rows
    meet by video_id."""
    across: str = ""
    """Only groups whose videos differ in this column, such as catalog_split with --join."""

    def __post_init__(self) -> None:
        FoundConfig.__post_init__(self)
        require(0 < self.threshold <= 1, "threshold", "greater than 0, and at most 1", self.threshold)
        if self.across.startswith("catalog_"):
            require(bool(self.join), "join", f"the catalog that has {self.across}, with --across", self.join)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig(VectorsConfig):
    """Choose the videos to label next: those that the network is unsure of and that lie far from each other.

    Example: kinoray labels select labels/library --budget 200 --out next.csv

    Of the 10 x BUDGET videos with the smallest margin each choice takes the one with the largest (1 - margin) x
    (distance to the nearest one that was chosen, or that --corrections have). The CSV has an empty column `label`: fill
    it in, remove the lines that you leave out, and give the file to `kinoray correct --corrections`.
    """

    budget: int
    """So many videos."""
    out: str
    """CSV file or s3:// object to write."""
    stratified: bool = False
    """The same number of videos of each class that the network names, as far as it names so many; the rarest first
    where --budget is smaller than the number of classes."""
    corrections: tuple[str, ...] = ()
    """CSV files with a column row_key of videos that were labelled before: they are not chosen again."""

    def __post_init__(self) -> None:
        VectorsConfig.__post_init__(self)
        require(self.budget >= 1, "budget", "at least 1", self.budget)
        require(bool(self.out), "out", "a file", self.out)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(PredictionsConfig):
    """Hand predictions over to another tool, with one entry for every labelled video; or a network to another program.

    Example: kinoray export labels/library --format label-studio --to handover

    Of a network: kinoray export runs/first --format onnx --videos samples/ --to network

    What has no answer is in quarantined.jsonl beside it, and both are counted: entries + quarantined = rows. In csv and
    jsonl every row is there, quarantined ones too. docs/labels.md says how each tool takes it in.

      fiftyone      a dataset that FiftyOne loads (dataset_type FiftyOneDataset), predictions with confidence
      label-studio  tasks.json with pre-annotations, and labeling-config.xml for the project
      datumaro      Datumaro's own JSON: a video and a label each
      jsonl, csv    the table with all its columns
      onnx, torch-export
                    a checkpoint's network for ONNX Runtime (pip install 'kinoray[onnx]') or torch.export.load,
                    and network.json: how its clips are made, how its logits differ (docs/models.md)
    """

    predictions: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What `label` or `evaluate` wrote: the --out, or the folder of one labelling in it. For onnx and torch-export what
    --checkpoint of label takes: a checkpoint, a run folder, or a published network."""
    format: Literal["fiftyone", "label-studio", "datumaro", "jsonl", "csv", "onnx", "torch-export"]
    """For which tool."""
    to: str
    """Folder on this machine for the files; new or empty, or what an export was writing before."""
    copy_videos: str = ""
    """Copy the videos there, too (videos/): these tools cannot read a video inside a shard, nor all of them s3://.

    Name what was labelled (folder, prefix, pack or list): only its videos are copied, whatever files the table names.
    """
    videos: str = ""
    """Of a network: videos (folder, pack, list or one), on the first eight of which the file is compared with it.
    Default: on three clips of noise."""
    allow_factory: AllowedFactories = ()
    """Of a network: PACKAGE:FUNCTION of one of your own that the checkpoint names; its code runs with your rights."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of what is decoded of a video for it."""

    @property
    def is_of_network(self) -> bool:
        """Whether a network is exported, and not predictions."""
        return self.format in ("onnx", "torch-export")

    def __post_init__(self) -> None:
        for name in ("videos", "allow_factory"):
            fits = self.is_of_network or not getattr(self, name)
            require(fits, name, "given with --format onnx or torch-export only", getattr(self, name))
        fits = not (self.is_of_network and self.copy_videos)
        require(fits, "copy_videos", "left out with --format onnx or torch-export", self.copy_videos)
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

    With --add SET they join the set that the network was trained on: its videos, in their splits, and after them those
    that it lacks, each content once. A correction of a video that the set has changes its label there.

    Where videos may have several classes, a label is all of them: `red|round`, or `|` for none. Those that the model
    named are accepted where the lowest of their scores is at least --accept-score.
    """

    out: str
    """Folder or s3:// prefix for catalog.parquet and corrections.json."""
    corrections: tuple[str, ...] = ()
    """CSV files (local or s3://) with the columns row_key and label, as the report's download has them."""
    accept_score: float | None = None
    """Take the model's label, too, where its score is at least this. Default: never."""
    add: str = ""
    """The set (a pack's folder, or its catalog.parquet) that they join. Classes keep its order, new ones come last.
    Copies are known by their bytes (those before --transcode, too), and are read where sizes are equal."""
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
