"""`kinoray export`: a result table in the form that another tool takes in, with nothing lost on the way.

What is easy to break: what has no answer is no entry in the tool, so it goes to quarantined.jsonl, and entries +
quarantined = rows is checked before the export is called done.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from kinoray.errors import ConfigError, IncompleteOutput, KinorayError
from kinoray.label.table import Ledger, open_ledger
from kinoray.library.config import ExportConfig
from kinoray.library.copies import Source, copied_videos, named_videos
from kinoray.library.formats import Datumaro, FiftyOne, Format, LabelStudio
from kinoray.library.rows import LABEL_SCHEMA, class_names, is_multi_label, scan
from kinoray.library.write import rows_of, write_text
from kinoray.storage.objects import Storage, absolute, is_s3

__all__ = ["export"]

_Maker = Callable[[Path, tuple[str, ...], dict[str, Any]], Format]
_FORMATS: dict[str, _Maker] = {"fiftyone": FiftyOne, "label-studio": LabelStudio, "datumaro": Datumaro}
_COLUMNS = ["video_id", "uri", "offset", "length", "row_key", "status", "label_topk", "score_topk", "margin", "entropy"]
_COLUMNS += ["error_class", "error_text"]
_REFUSED = ("video_id", "uri", "offset", "length", "row_key", "status", "error_class", "error_text")
_COPY_BATCH = 64  # videos that are fetched in one go


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the files.

    Returns:
        `rows`, `exported`, `quarantined` (and skipped), `unreadable` (not copied), `unfinished` (no row yet) and `to`.

    Raises:
        ConfigError: the folder is no folder of this machine, or videos in shards are not to be copied.
        IncompleteOutput: entries and quarantined rows are not the rows of the table.
        KinorayError: the table cannot be read.
    """
    if is_s3(config.to):
        raise ConfigError(f"to must be a folder on this machine, got {config.to}; copy it up when it is finished")
    storage = Storage(config.storage)
    ledger = open_ledger(storage, absolute(config.predictions))
    folder = Path(absolute(config.to))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "quarantined.jsonl").open("w", encoding="utf-8") as side:
            totals = _export_rows(storage, config, ledger, folder, side)
    except OSError as error:
        raise ConfigError(f"to: {folder} cannot be written: {error.strerror or error}") from error
    if totals["rows"] != totals["exported"] + totals["quarantined"] + totals["unreadable"]:
        raise IncompleteOutput(f"{folder} does not hold every row: {totals}; export again")
    if unfinished := _num_unfinished(ledger):
        print(f"export: {unfinished} videos are not labelled yet and not in it; run the label command again, then this")
    unreadable = f" + {totals['unreadable']} that could not be copied" if totals["unreadable"] else ""
    print(
        f"export: {totals['rows']} rows = {totals['exported']} in {folder} for {config.format} + "
        f"{totals['quarantined']} quarantined or skipped{unreadable}; the others are in {folder / 'quarantined.jsonl'}",
        flush=True,
    )
    return {**totals, "unfinished": unfinished, "to": str(folder)}


def _num_unfinished(ledger: Ledger) -> int:
    """Videos of the newest catalog that have no row yet."""
    done = ledger.committed()
    return sum(len(unit.keys) for plan in ledger.plans()[-1:] for unit in plan.units if unit.unit_id not in done)


def _export_rows(storage: Storage, config: ExportConfig, ledger: Ledger, folder: Path, side: TextIO) -> dict[str, int]:
    if config.format == "csv" or config.format == "jsonl":
        return _export_table(config, ledger, folder, side)
    job = ledger.job()
    about = {"model_digest": job.get("model_digest", ""), "config_digest": job.get("config_digest", "")}
    several = is_multi_label(ledger)
    writer = _FORMATS[config.format](folder, class_names(ledger), {**about, "multi_label": several})
    source = Source(storage, config.copy_videos) if config.copy_videos else None
    totals = {"rows": 0, "exported": 0, "quarantined": 0, "unreadable": 0}
    for rows in _batches(scan(ledger, _COLUMNS)):
        totals["rows"] += len(rows)
        good = [row for row in rows if row["status"] == "labelled"]
        for row in rows:
            if row["status"] != "labelled":
                totals["quarantined"] += 1
                _put_aside(side, row)
        places: Iterable[str | Path | KinorayError]
        places = copied_videos(storage, good, writer.videos, source) if source else named_videos(good)
        for row, place in zip(good, places, strict=True):
            if isinstance(place, KinorayError):
                totals["unreadable"] += 1
                _put_aside(side, {**row, "error_class": type(place).__name__, "error_text": str(place)})
            else:
                totals["exported"] += 1
                names, scores = row["label_topk"] or [], row["score_topk"] or []
                answers = list(zip(names, scores, strict=True))
                writer.add(row, answers if several else answers[:1], place)
    writer.close()
    return totals


def _export_table(config: ExportConfig, ledger: Ledger, folder: Path, side: TextIO) -> dict[str, int]:
    """Every row is in the table itself; what has no answer is aside, too, as with the other formats."""
    totals = {"rows": 0, "exported": 0, "quarantined": 0, "unreadable": 0}

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
