"""`kinoray export`: predictions in the form that another tool takes in, with nothing lost on the way.

What is easy to break: what has no answer is no entry in the tool, so it goes to quarantined.jsonl, and entries +
quarantined = rows is checked before the export is called done. Every file has to end well-formed however many entries
there were, none too; and names come from strangers, so classes are data in the XML, too, and of a video's name only
letters, digits, `_` and `-` become part of a path.
"""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import pyarrow as pa

from kinoray.catalog.folders import extension
from kinoray.catalog.rows import Refusal, judge
from kinoray.catalog.table import Reference, catalog_of_source, lies_inside, read_videos
from kinoray.config.shared import DecodeConfig
from kinoray.console import many, visible
from kinoray.errors import (
    ChecksumMismatch,
    ConfigError,
    IncompleteOutput,
    KinorayError,
    MediaError,
    MediaOverBudget,
)
from kinoray.label.ledger import Ledger, open_ledger
from kinoray.library.config import ExportConfig
from kinoray.library.rows import BAD_VIDEO, LABEL_SCHEMA, class_names, is_multi_label, rows_of, scan, write_text
from kinoray.storage.objects import Storage, absolute, is_s3
from kinoray.storage.records import as_name, require_folder
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = ["Datumaro", "FiftyOne", "Format", "LabelStudio", "Source", "copied_videos", "export", "named_videos"]

Answers = list[tuple[str, float]]
"""(class, score) of a video: one, or any number where the network was trained so."""

_COLUMNS = (
    "video_id",
    "uri",
    "offset",
    "length",
    "row_key",
    "status",
    "label_topk",
    "score_topk",
    "margin",
    "entropy",
    "error_class",
    "error_text",
)
_REFUSED = ("video_id", "uri", "offset", "length", "row_key", "status", "error_class", "error_text")
_COPY_BATCH = 64  # videos that are fetched in one go
_MAX_STEM = 100  # characters of a copied video's name
_KINDS = ((4, b"ftyp", ".mp4"), (0, b"\x1a\x45\xdf\xa3", ".mkv"), (0, b"RIFF", ".avi"), (0, b"G", ".ts"))
_DATUMARO_VIDEO = 5  # datumaro.components.media.MediaType.VIDEO


# What each tool takes in: one entry for each labelled video, written as a stream


class Format(Protocol):
    """Writes one tool's files."""

    videos: Path
    """Where copies of videos belong."""

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """One labelled row, what is said of it, and its video: an address, or a path below `videos`."""

    def close(self) -> None:
        """End all files."""


class _JsonList:
    """A JSON file with one long list in it, an item a line."""

    def __init__(self, path: Path, head: str, tail: str) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write(head)
        self._tail = tail
        self._between = "\n"

    def add(self, item: dict[str, Any]) -> None:
        self._file.write(self._between + json.dumps(item))
        self._between = ",\n"

    def close(self) -> None:
        self._file.write(f"\n{self._tail}\n")
        self._file.close()


class FiftyOne:
    """`FiftyOneDataset` in the form without a version, which every FiftyOne migrates to its own when it loads it.

    Fields of a sample: prediction (Classification with confidence; Classifications where there may be several),
    video_id, row_key, margin, entropy.
    """

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.folder = folder
        self.videos = folder / "data"
        self._several = bool(about["multi_label"])
        metadata = {"media_type": "video", "default_classes": list(labels), "info": {**about, "classes": list(labels)}}
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        (folder / "frames").mkdir(exist_ok=True)
        (folder / "frames" / "none.json").write_text('{"frames": {}}', encoding="utf-8")
        self._samples = _JsonList(folder / "samples.json", '{"samples": [', "]}")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """A sample; a copied video is named relative to the folder."""
        said: list[dict[str, Any]] = [
            {"_cls": "Classification", "tags": [], "label": name, "confidence": score} for name, score in answers
        ]
        first = said[0] if said else None
        prediction = {"_cls": "Classifications", "classifications": said} if self._several else first
        self._samples.add(
            {
                "filepath": str(place.relative_to(self.folder)) if isinstance(place, Path) else place,
                "tags": [],
                "metadata": None,
                "frames": "frames/none.json",
                "prediction": prediction,
                **{name: row[name] for name in ("video_id", "row_key", "margin", "entropy")},
            }
        )

    def close(self) -> None:
        """End samples.json."""
        self._samples.close()


class LabelStudio:
    """tasks.json with a prediction each, and labeling-config.xml: a video and one choice called `label`.

    What Label Studio exports as CSV has the columns row_key and label, which `kinoray correct` reads.
    """

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.folder = folder
        self.videos = folder / "videos"
        self._version = str(about["model_digest"])
        kind = "multiple" if about["multi_label"] else "single"
        config = [
            "<View>",
            '  <Video name="video" value="$video"/>',
            f'  <Choices name="label" toName="video" choice="{kind}" showInline="true">',
            *(f"    <Choice value={quoteattr(visible(name))}/>" for name in (*labels, BAD_VIDEO)),
            "  </Choices>",
            "</View>",
        ]
        (folder / "labeling-config.xml").write_text("\n".join(config) + "\n", encoding="utf-8")
        self._tasks = _JsonList(folder / "tasks.json", "[", "]")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """A task; local files are named as Label Studio serves them, relative to its document root."""
        result = {
            "id": row["row_key"],
            "from_name": "label",
            "to_name": "video",
            "type": "choices",
            "value": {"choices": [visible(name) for name, _ in answers]},
        }
        data = {
            "video": self._url(place),
            "video_id": row["video_id"],
            "row_key": row["row_key"],
            "uri": row["uri"],
            "predicted": ", ".join(name for name, _ in answers),
        }
        prediction = {"model_version": self._version, "score": answers[0][1] if answers else 0.0, "result": [result]}
        self._tasks.add({"data": data, "predictions": [prediction] if answers else []})

    def _url(self, place: str | Path) -> str:
        if isinstance(place, Path):
            return f"/data/local-files/?d={quote(str(place.relative_to(self.folder)))}"
        return place if is_s3(place) else f"/data/local-files/?d={quote(place.lstrip('/'))}"

    def close(self) -> None:
        """End tasks.json."""
        self._tasks.close()


class Datumaro:
    """annotations/default.json of Datumaro's own format 1.0: items of media type video with a label each."""

    def __init__(self, folder: Path, labels: tuple[str, ...], about: dict[str, Any]) -> None:
        self.videos = folder / "videos" / "default"
        self._ids = {name: index for index, name in enumerate(labels)}
        self._seen: set[str] = set()
        names = [{"name": name, "parent": "", "attributes": []} for name in labels]
        head = {
            "dm_format_version": "1.0",
            "media_type": _DATUMARO_VIDEO,
            "infos": about,
            "categories": {"label": {"labels": names, "label_groups": [], "attributes": []}},
        }
        (folder / "annotations").mkdir(exist_ok=True)
        opening = json.dumps(head).removesuffix("}") + ', "items": ['
        self._items = _JsonList(folder / "annotations" / "default.json", opening, "]}")

    def add(self, row: dict[str, Any], answers: Answers, place: str | Path) -> None:
        """An item; ids are those of the videos (two catalogs may share one: then the row's key is added)."""
        item_id = row["video_id"] if row["video_id"] not in self._seen else f"{row['video_id']}-{row['row_key']}"
        self._seen.add(item_id)
        if unknown := [name for name, _ in answers if name not in self._ids]:
            raise ConfigError(
                f"predictions: {row['video_id']} has the class {unknown[0]!r}, which job.json does not name; they are "
                "not of one labelling"
            )
        said = [
            {"id": index, "type": "label", "attributes": {"score": score}, "group": 0, "label_id": self._ids[name]}
            for index, (name, score) in enumerate(answers)
        ]
        video = {"path": place.name if isinstance(place, Path) else place, "step": 1, "start_frame": 0}
        attr = {"row_key": row["row_key"], "uri": row["uri"], "margin": row["margin"]}
        self._items.add({"id": item_id, "annotations": said, "attr": attr, "video": video})

    def close(self) -> None:
        """End default.json."""
        self._items.close()


# Where the tool finds each video: as it lies, or copied out of its shard into a file of its own


class Source:
    """The videos that a user says were labelled."""

    def __init__(self, storage: Storage, uri: str) -> None:
        table = catalog_of_source(storage, absolute(uri)).table
        self._uri = uri
        self._root = absolute(uri).rstrip("/") if not is_s3(uri) and os.path.isdir(absolute(uri)) else ""
        columns = [table.column(name).to_pylist() for name in ("uri", "offset", "length")]
        self._places = set(zip(*columns, strict=True))

    def problem(self, row: dict[str, Any]) -> str:
        """Why the video of a row is none of these; empty if it is."""
        if (row["uri"], row["offset"], row["length"]) not in self._places:
            return f"{row['uri']} is no video of {self._uri} (copy_videos), so it was not copied"
        if self._root and not lies_inside(self._root, row["uri"]):
            return (
                f"{row['uri']} is a link that leads out of {self._uri} (copy_videos), so it was not copied; if it "
                "should be, name a list of the videos (.csv) there"
            )
        return ""


def named_videos(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The address of each row's video.

    Raises:
        ConfigError: one lies inside a shard, where no other tool can read it.
    """
    for row in rows:
        if row["offset"] is not None:
            raise ConfigError(
                f"copy_videos: {row['video_id']} lies inside {row['uri']} (byte {row['offset']} on), where no other "
                "tool reads it; give --copy-videos SOURCE, or choose the format jsonl or csv"
            )
        yield row["uri"]


def copied_videos(
    storage: Storage, rows: Sequence[dict[str, Any]], folder: Path, source: Source, decode: DecodeConfig
) -> Iterator[Path | Refusal]:
    """Copy each row's video into a file in the folder: its path, or why there is none.

    A table can be a stranger's, and name any file that its reader may read: only those that `source` has are copied,
    and of them only what opens as a video.

    Raises:
        StorageUnavailable: the store is at fault, not a video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [Reference(row["uri"], row["offset"], row["length"], row_problem=source.problem(row)) for row in rows]
    for row, data in zip(rows, read_videos(storage, places, max_bytes=decode.max_bytes), strict=True):
        if isinstance(data, KinorayError):
            yield judge(data, "read")
            continue
        path = folder / _file_name(row, data)
        try:
            shared_sandbox(1).probe(data, decode)
        except MediaOverBudget:
            pass  # it opened, and was labelled with other limits
        except MediaError as error:
            yield judge(error, "probe")
            continue
        aside = folder / f".{uuid.uuid4().hex}"
        aside.write_bytes(data)
        os.replace(aside, path)
        yield path


def _file_name(row: dict[str, Any], data: bytes) -> str:
    """`bus__a-<row_key>.mp4`: the key keeps apart what looks alike without the characters that are left out."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", row["video_id"])[:_MAX_STEM]
    known = extension(row["uri"]) if row["offset"] is None else ""
    ending = known if re.fullmatch(r"\.[a-z0-9]{1,8}", known) else _sniffed(data)
    try:
        key = as_name(row["row_key"], "row_key")
    except ValueError as error:
        raise ChecksumMismatch(f"{row['uri']}: {error}; this table is not what kinoray wrote") from error
    return f"{stem}-{key}{ending}"


def _sniffed(data: bytes) -> str:
    for offset, mark, ending in _KINDS:
        if data[offset : offset + len(mark)] == mark:
            return ending
    return ".video"


# The verb


_Maker = Callable[[Path, tuple[str, ...], dict[str, Any]], Format]
_FORMATS: dict[str, _Maker] = {"fiftyone": FiftyOne, "label-studio": LabelStudio, "datumaro": Datumaro}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the files; of a network, as `kinoray.library.portable.export_network` says.

    Returns:
        `rows`, `exported`, `quarantined` (and skipped), `not_copied`, `unfinished` (no row yet) and `to`.

    Raises:
        ConfigError: the folder is not of this machine, holds what no export wrote or cannot be written; or videos in
            shards are not to be copied.
        IncompleteOutput: entries and quarantined rows are not the rows of the table.
        KinorayError: the table cannot be read.
    """
    if is_s3(config.to):
        raise ConfigError(f"to must be a folder on this machine, got {config.to}; copy it up when it is finished")
    storage = Storage(config.storage)
    require_folder(storage, "to", config.to, "export")
    if config.is_of_network:
        from kinoray.library.portable import export_network  # torch, which takes seconds

        return export_network(config)
    ledger = open_ledger(storage, absolute(config.predictions))
    folder = Path(absolute(config.to))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "quarantined.jsonl").open("w", encoding="utf-8") as side:
            totals = _export_rows(storage, config, ledger, folder, side)
    except OSError as error:
        raise ConfigError(f"to: {folder} cannot be written: {error.strerror or error}") from error
    if totals["rows"] != totals["exported"] + totals["quarantined"] + totals["not_copied"]:
        raise IncompleteOutput(f"{folder} does not hold every row: {totals}; export again")
    if unfinished := _num_unfinished(ledger):
        print(f"export: {many(unfinished, 'video')} not labelled yet and not in it; run the label command, then this")
    not_copied = f" + {totals['not_copied']} that could not be copied" if totals["not_copied"] else ""
    side_file = folder / "quarantined.jsonl"
    if config.format in ("csv", "jsonl"):
        said = (
            f"{many(totals['rows'], 'row')} in {folder / f'labels.{config.format}'} = {totals['exported']} labelled + "
            f"{totals['quarantined']} quarantined or skipped; the latter are in {side_file}, too"
        )
    else:
        said = (
            f"{many(totals['rows'], 'row')} = {totals['exported']} in {folder} for {config.format} + "
            f"{totals['quarantined']} quarantined or skipped{not_copied}; the others are in {side_file}"
        )
    print(f"export: {said}", flush=True)
    return {**totals, "unfinished": unfinished, "to": str(folder)}


def _num_unfinished(ledger: Ledger) -> int:
    """Videos of the newest catalog that have no row yet."""
    done = ledger.committed()
    return sum(len(unit.keys) for plan in ledger.plans()[-1:] for unit in plan.units if unit.unit_id not in done)


def _export_rows(storage: Storage, config: ExportConfig, ledger: Ledger, folder: Path, side: TextIO) -> dict[str, int]:
    if config.format == "csv" or config.format == "jsonl":
        return _export_table(config, ledger, folder, side)
    job = ledger.job()
    about = {"model_digest": job.model_digest, "config_digest": job.config_digest}
    several = is_multi_label(ledger)
    writer = _FORMATS[config.format](folder, class_names(ledger), {**about, "multi_label": several})
    source = Source(storage, config.copy_videos) if config.copy_videos else None
    totals = {"rows": 0, "exported": 0, "quarantined": 0, "not_copied": 0}
    with contextlib.closing(writer):
        for rows in _batches(scan(ledger, _COLUMNS)):
            totals["rows"] += len(rows)
            good = [row for row in rows if row["status"] == "labelled"]
            for row in rows:
                if row["status"] != "labelled":
                    totals["quarantined"] += 1
                    _put_aside(side, row)
            places: Iterable[str | Path | Refusal]
            places = named_videos(good)
            if source:
                places = copied_videos(storage, good, writer.videos, source, config.decode)
            for row, place in zip(good, places, strict=True):
                if isinstance(place, Refusal):
                    totals["not_copied"] += 1
                    _put_aside(side, {**row, "error_class": place.error_class, "error_text": place.error_text})
                else:
                    totals["exported"] += 1
                    names, scores = row["label_topk"] or [], row["score_topk"] or []
                    answers = list(zip(names, scores, strict=True))
                    writer.add(row, answers if several else answers[:1], place)
    return totals


def _export_table(config: ExportConfig, ledger: Ledger, folder: Path, side: TextIO) -> dict[str, int]:
    """Every row is in the table itself; what has no answer is aside, too, as with the other formats."""
    totals = {"rows": 0, "exported": 0, "quarantined": 0, "not_copied": 0}

    def watched() -> Iterator[pa.Table]:
        for table in scan(ledger, LABEL_SCHEMA.names):
            for row in rows_of(table.select(list(_REFUSED))):
                totals["rows"] += 1
                if row["status"] != "labelled":
                    totals["quarantined"] += 1
                    _put_aside(side, row)
            yield table

    kind = "csv" if config.format == "csv" else "jsonl"
    with (folder / f"labels.{kind}").open("w", encoding="utf-8", newline="") as file:
        written = write_text(watched(), LABEL_SCHEMA.names, "csv" if kind == "csv" else "jsonl", file)
    totals["exported"] = written - totals["quarantined"]
    return totals


def _batches(tables: Iterable[pa.Table]) -> Iterator[list[dict[str, Any]]]:
    for table in tables:
        for start in range(0, len(table), _COPY_BATCH):
            yield list(rows_of(table.slice(start, _COPY_BATCH)))


def _put_aside(side: TextIO, row: dict[str, Any]) -> None:
    side.write(json.dumps({name: row[name] for name in _REFUSED}) + "\n")
