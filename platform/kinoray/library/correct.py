"""`kinoray correct`: what people said of predictions, and what the model was sure of, become a catalog to train on.

What is easy to break: a correction belongs to a row_key, which names the very file that was looked at; a key or a class
that is not known is an error with its line, never a row that is left out in silence. Files come back from spreadsheets,
which write 000001 as 1 and a date as another text: the key alone says which row is meant.

Where a video may have several classes, a label is all of them: `red|round`, `|` for none, or what Label Studio writes.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kinoray.catalog.folders import BETWEEN_CLASSES, class_name, in_label_list, label_list, set_problems
from kinoray.catalog.source import decode_text, parse_table_text, warn
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, Reference, catalog_of_source, load_catalog, save_catalog
from kinoray.console import many
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, open_ledger
from kinoray.library.config import CorrectConfig
from kinoray.library.joined import Found, join_set, names_of, rename, sizes_of
from kinoray.library.rows import BAD_VIDEO, class_names, is_multi_label, scan, undefused
from kinoray.pack.splits import Candidate, contents_of, draw_splits
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, absolute, join
from kinoray.storage.records import parse_json, require_folder

__all__ = ["Correction", "correct", "read_corrections"]

_COLUMNS = ("video_id", "uri", "offset", "length", "row_key", "status", "label", "score")
_NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?\s*", re.ASCII | re.IGNORECASE)
_MAX_NUMBER = 40  # characters
_Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Correction:
    """What one line of a file says."""

    row_key: str
    """Of the row, without its letter."""
    label: str
    """A class, or BAD_VIDEO; of a label list all its classes, in the order of their names, `red|round`."""
    video_id: str
    """As the file has it; empty where it has no such column."""
    predicted: str
    """What the model had said, as the file has it; empty where it has no such column."""
    where: str
    """File and line, for messages."""


def correct(config: CorrectConfig) -> dict[str, Any]:
    """Write OUT/catalog.parquet and OUT/corrections.json, and print what went in and what did not.

    With config.add the catalog is that of a set, which the videos join.

    Returns:
        Counts of rows: `corrected`, `kept` (label of --catalog), `accepted` (the model's), `bad`, `quarantined`
        (quarantined or skipped), `unlabelled`; `videos` in the catalog, `changed` (corrected to another class than the
        model's), `renamed` (whose video_id was another one's), `splits`, `classes` and `catalog_digest`; with
        config.add those of Joined, too.

    Raises:
        CatalogError: a line names no row, no class, or one video twice; or no video is left.
        ConfigError: out holds what `correct` has not written, or cannot be written.
        KinorayError: something cannot be read or written.
    """
    storage = Storage(config.storage)
    require_folder(storage, "out", config.out, "correct")
    if config.add and join(absolute(config.add), "").removesuffix("catalog.parquet/") == join(absolute(config.out), ""):
        raise ConfigError(f"out {config.out} is the set that is added to, which would be lost: choose another folder")
    ledger = open_ledger(storage, absolute(config.predictions))
    known = Catalog(CATALOG_SCHEMA.empty_table())
    if config.catalog:
        known = catalog_of_source(storage, absolute(config.catalog))
    base = load_catalog(storage, absolute(config.add)) if config.add else None
    labels = _classes(ledger, config, known, base)
    several = _gives_lists(ledger, config, (known, base), labels)
    corrections, repeated = read_corrections(storage, config.corrections, labels, several=several)
    counts: Counter[str] = Counter()
    found = list(_labelled_rows(ledger, config, known, corrections, counts, several=several))
    _require_used(corrections, counts, ledger)
    counts["respelled"] = _require_same_videos(corrections, ledger)
    rows = [item.row for item in found if item.what != "bad"]
    joined = None
    if base is not None:
        joined = join_set(storage, base, found, labels, new_classes=config.new_classes, several=several)
        rows, labels = joined.rows, joined.labels
    if not rows:
        raise CatalogError(
            f"no video of {ledger.root} has a label now: give --corrections with classes, or a lower --accept-score"
        )
    ids = {name: index for index, name in enumerate(labels)}
    counts["renamed"] = rename(rows)
    splits = _splits(storage, ledger.root, absolute(config.out), rows, config.val_fraction, several=several)
    for row in rows:
        row["split"] = splits[row["video_id"]]
        said = row["label"]
        if several:
            row["label_ids"] = None if said is None else sorted(ids[name] for name in in_label_list(said))
            row["label"] = row["label_id"] = None
        else:
            row["label_id"] = None if said is None else ids[said]
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    catalog = Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), labels)
    out = absolute(config.out)
    totals = _totals(counts, catalog, repeated) | (joined.totals if joined else {})
    _save_record(storage, config, out, ledger, totals)  # first: it says whose the folder is
    save_catalog(storage, join(out, "catalog.parquet"), catalog)
    _report(config, out, totals)
    return totals


def _gives_lists(
    ledger: Ledger, config: CorrectConfig, catalogs: tuple[Catalog, Catalog | None], labels: Sequence[str]
) -> bool:
    """Whether a video may have several classes.

    Raises:
        CatalogError: a catalog says otherwise than the predictions, or a class cannot be written in a list.
    """
    several = is_multi_label(ledger)
    for name, catalog in zip(("catalog", "add"), catalogs, strict=True):
        if catalog and any(catalog.class_names()) and catalog.is_multilabel != several:
            lists, one = "label lists", "one class a video"
            raise CatalogError(
                f"{name}: {getattr(config, name)} has {one if several else lists}, the predictions "
                f"{lists if several else one}; name the catalog that the network was trained for"
            )
    if several and (odd := [name for name in labels if BETWEEN_CLASSES in name]):
        raise CatalogError(f"the class {odd[0]!r} holds {BETWEEN_CLASSES!r}, which divides classes; rename the class")
    return several


def _splits(
    storage: Storage, source: str, out: str, rows: Sequence[_Row], val_fraction: float, *, several: bool
) -> dict[str, str]:
    """video_id -> split, as `pack` finds it; what is odd of the set in `out` is said."""
    contents = [row.get("sha256") for row in rows]
    if val_fraction:
        places = [Reference(row["uri"], row["offset"], row["length"], row.get("sha256")) for row in rows]
        contents = contents_of(storage, list(zip(places, sizes_of(storage, rows), strict=True)))
    candidates = [
        Candidate(row["video_id"], names_of(row, several=several), row["split"], content)
        for row, content in zip(rows, contents, strict=True)
    ]
    splits = draw_splits(source, candidates, val_fraction)
    counts: Counter[tuple[tuple[str, ...], str | None]] = Counter(
        (video.labels or (), splits[video.name]) for video in candidates
    )
    for problem, remedy in set_problems(counts, several=several):
        warn(f"{out}: {problem}; {remedy}")
    return splits


def _classes(ledger: Ledger, config: CorrectConfig, known: Catalog, base: Catalog | None) -> tuple[str, ...]:
    """The model's classes in its order, then those that the catalogs or the user add."""
    labels = dict.fromkeys([*class_names(ledger), *known.labels, *(base.labels if base else ()), *config.new_classes])
    if BAD_VIDEO in labels:
        raise CatalogError(f"a class is called {BAD_VIDEO}, which means a video to leave out; rename the class")
    return tuple(labels)


def read_corrections(
    storage: Storage, uris: Sequence[str], labels: Sequence[str], *, several: bool = False
) -> tuple[dict[str, Correction], int]:
    """The corrections of all files by row_key, and how many lines said again what another one says.

    Args:
        several: whether a cell holds all classes of its video.

    Raises:
        CatalogError: a column is missing, a label is no class, or two lines disagree; with file, line and column.
        StorageError: a file cannot be read.
    """
    found: dict[str, Correction] = {}
    repeated = 0
    classes = _Lists(labels) if several else _Classes(labels)
    for uri in uris:
        for correction in _read_file(storage, uri, classes):
            before = found.setdefault(correction.row_key, correction)
            if before is correction:
                continue
            if before.label != correction.label:
                raise CatalogError(
                    f"{correction.where}, column label: video {correction.video_id or correction.row_key} is "
                    f"{correction.label!r} here and {before.label!r} in {before.where}; keep one of the two lines"
                )
            repeated += 1
    return found, repeated


class _Classes:
    """Finds the class that a cell means."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self._exact = {class_name(label, "the classes"): label for label in (*labels, BAD_VIDEO)}

    def find(self, cell: str, where: str) -> str | None:
        """The class, or BAD_VIDEO; None if there is none. `where` it stands, for messages."""
        for text in (cell, undefused(cell), undefused(cell).strip()):  # a quote sign defuses formulas
            name = class_name(text, where)
            if name in self._exact:
                return self._exact[name]
        number = _as_number(cell.strip())
        alike = [label for name, label in self._exact.items() if _as_number(name) == number]
        return alike[0] if len(alike) == 1 else None


class _Lists(_Classes):
    """Finds the classes that a cell means, where it may mean several: as one label list."""

    def find(self, cell: str, where: str) -> str | None:
        """The label list, or BAD_VIDEO; None if it names what is no class, or nothing at all."""
        parts = self._parts(undefused(cell).strip())
        found = [super(_Lists, self).find(part, where) for part in parts or ()]
        if parts is None or None in found:
            return None
        if BAD_VIDEO in found:
            return BAD_VIDEO if len(found) == 1 else None
        return label_list(name for name in found if name)

    def _parts(self, text: str) -> list[str] | None:
        """What stands between the signs, or in Label Studio's {"choices": [...]}; None of an empty cell."""
        choices: Any = None
        if text.startswith("{"):
            with suppress(ValueError, KeyError, TypeError):  # a class may begin so, too
                choices = parse_json(text.encode())["choices"]
        if isinstance(choices, list) and all(isinstance(name, str) for name in choices):
            return choices
        return [part for part in text.split(BETWEEN_CLASSES) if part.strip()] if text else None


def _as_number(text: str) -> str | float:
    """A text as a spreadsheet has it: `007` is the number 7."""
    is_number = len(text) <= _MAX_NUMBER and _NUMBER.fullmatch(text)
    return float(text) if is_number else text


def _bare(row_key: str) -> str:
    """A key without its letter: early tables had none."""
    return row_key.removeprefix("k")


def _read_file(storage: Storage, uri: str, classes: _Classes) -> Iterator[Correction]:
    text = decode_text(uri, storage.read(absolute(uri), max_bytes=MAX_TABLE_BYTES))
    expected = "expected the CSV that a report lets you download, or one with the columns row_key,label"
    table = parse_table_text(uri, text, ("row_key", "label"), f"there is no column row_key; {expected}")
    for name in ("row_key", "label"):
        if name not in table.columns:
            raise CatalogError(
                f"{uri} line 1: there is no column {name}, found {','.join(table.columns)!r}; {expected}"
            )
    for record in table.records:
        yield _correction(uri, record.line, record.cells, classes)


def _correction(uri: str, number: int, line: Mapping[str, str], classes: _Classes) -> Correction:
    where = f"{uri} line {number}"
    row_key, label = line["row_key"].strip(), line["label"]
    if not row_key:
        raise CatalogError(f"{where}, column row_key: it is empty; it must name a row of the predictions")
    if not label.strip():
        none = " (| for none of them)" if isinstance(classes, _Lists) else ""
        what = f"fill in a class{none} or {BAD_VIDEO}, which leaves the video out, or delete the line"
        raise CatalogError(f"{where}, column label: it is empty; {what}")
    found = classes.find(label, f"{where}, column label")
    if found is None:
        some = ", ".join(sorted(classes.labels)[:20]) + " ..." * (len(classes.labels) > 20)
        known = f"there are {some}, and {BAD_VIDEO} to leave a video out; --new-classes adds one"
        raise CatalogError(f"{where}, column label: there is no class {label!r:.80}; {known}")
    return Correction(_bare(row_key), found, line.get("video_id", ""), undefused(line.get("predicted", "")), where)


def _labelled_rows(
    ledger: Ledger,
    config: CorrectConfig,
    known: Catalog,
    corrections: Mapping[str, Correction],
    counts: Counter[str],
    *,
    several: bool,
) -> Iterator[Found]:
    """Every video that has a label now, or is bad; `counts` says what became of each row."""
    place = {key: row for row, key in enumerate(row_keys(known.table))}
    most = _most_classes(ledger)
    if several and most < math.inf and config.accept_score is not None:
        warn(
            f"{ledger.root} names at most {many(int(most), 'class')} a video (label --top-k): an answer that names so "
            "many may lack others, so it is not accepted"
        )
    met = 0
    for table in scan(ledger, [*_COLUMNS, "label_topk", "score_topk"] if several else _COLUMNS):
        places = pa.array([place.get(key) for key in table["row_key"].to_pylist()], pa.int64())
        met += len(places) - places.null_count
        for said, before in zip(table.to_pylist(), known.table.take(places).to_pylist(), strict=True):
            before = before if before["video_id"] is not None else None
            if several:
                said["label"] = None if said["label_topk"] is None else label_list(said["label_topk"])
                said["score"] = min(said["score_topk"] or (), default=None)  # sure of all that it names
                if len(said["score_topk"] or ()) >= most:
                    said["score"] = None  # and of those that it might have named besides, nothing is known
                if before and before["label_ids"] is not None:
                    before["label"] = label_list(known.labels[index] for index in before["label_ids"])
            correction = corrections.get(_bare(said["row_key"]))
            if correction:
                counts["used"] += 1
            label, what = _label_of(said, before, correction, config.accept_score)
            counts[what] += 1
            if label is None:
                continue
            if what == "corrected" and label != said["label"]:
                counts["changed"] += 1
            yield Found(_catalog_row(said, before, label, what), what, correction.where if correction else "")
    if place and not met:
        raise CatalogError(
            f"catalog: no row of {config.catalog} is an input of {ledger.root}; name the catalog that was labelled"
        )


def _most_classes(ledger: Ledger) -> float:
    """How many classes an answer names before others are cut off; infinite where all of them may be named."""
    job = ledger.job()
    answer = job.settings.get("answer")
    top_k = answer.get("top_k") if isinstance(answer, dict) else None
    return top_k if isinstance(top_k, int) and top_k < len(job.labels) else math.inf


def _require_same_videos(corrections: Mapping[str, Correction], ledger: Ledger) -> int:
    """How many video_ids are not as the table has them. One that is another row's means that rows were mixed up."""
    named = {key: _as_number(undefused(found.video_id)) for key, found in corrections.items() if found.video_id}
    odd: list[tuple[Correction, str]] = []
    for table in scan(ledger, ["row_key", "video_id"]) if named else ():
        for row_key, video_id in zip(table["row_key"].to_pylist(), table["video_id"].to_pylist(), strict=True):
            key = _bare(row_key)
            if key in named and named[key] != _as_number(video_id):
                odd.append((corrections[key], video_id))
    if not odd:
        return 0
    ids = {_as_number(name) for table in scan(ledger, ["video_id"]) for name in table["video_id"].to_pylist()}
    for correction, video_id in odd:
        if _as_number(undefused(correction.video_id)) in ids:
            raise CatalogError(
                f"{correction.where}, column video_id: it says {correction.video_id!r}, but row_key "
                f"{correction.row_key} is {video_id!r}; were the lines of a spreadsheet sorted without all columns?"
            )
    return len(odd)


def _label_of(
    said: _Row, before: _Row | None, correction: Correction | None, accept_score: float | None
) -> tuple[str | None, str]:
    """The label that a row has now (None: nothing is known of it), and the word for why."""
    if correction and correction.label == BAD_VIDEO:
        return BAD_VIDEO, "bad"
    if said["status"] != "labelled":
        return None, "quarantined"
    if correction:
        return correction.label, "corrected"
    if before and before["label"] is not None:
        return before["label"], "kept"
    if accept_score is not None and said["score"] is not None and said["score"] >= np.float32(accept_score):
        return said["label"], "accepted"
    return None, "unlabelled"


def _catalog_row(said: _Row, before: _Row | None, label: str, what: str) -> _Row:
    row = dict(before) if before else {name: said[name] for name in ("video_id", "uri", "offset", "length")}
    row = {"status": "listed", "split": None, **row, "label": label}
    if what == "corrected":
        before_it = "nothing" if said["label"] is None else said["label"]
        before_it += "" if said["label"] is None or "label_topk" in said else f" ({said['score']:.3f})"
        row["reason"] = f"corrected; the model said {before_it}"
    elif what == "accepted":
        row["reason"] = f"labelled by the model with {said['score']:.3f}"
    return row


def _require_used(corrections: Mapping[str, Correction], counts: Counter[str], ledger: Ledger) -> None:
    """Every correction met its row."""
    if counts["used"] == len(corrections):
        return
    present = {_bare(key) for table in scan(ledger, ["row_key"]) for key in table["row_key"].to_pylist()}
    strange = [correction for correction in corrections.values() if correction.row_key not in present]
    first = strange[0]
    raise CatalogError(
        f"{first.where}, column row_key: {first.row_key!r} is no row of {ledger.root} ({len(strange)} of "
        f"{many(len(corrections), 'correction')} are not); were they made from the report of another table, or was the "
        "file replaced since? Without their lines the others are taken"
    )


def _totals(counts: Counter[str], catalog: Catalog, repeated: int) -> dict[str, Any]:
    names = ("corrected", "kept", "accepted", "bad", "quarantined", "unlabelled", "changed", "respelled", "renamed")
    return {
        **{name: counts[name] for name in names},
        "repeated": repeated,
        "videos": len(catalog),
        "splits": dict(sorted(Counter(catalog.table["split"].to_pylist()).items())),
        "classes": len(catalog.labels),
        "catalog_digest": catalog.digest,
    }


def _save_record(storage: Storage, config: CorrectConfig, out: str, ledger: Ledger, totals: dict[str, Any]) -> None:
    """Where every label came from, so that the set can be made again."""
    files = {
        uri: hashlib.sha256(storage.read(absolute(uri), max_bytes=MAX_TABLE_BYTES)).hexdigest()
        for uri in config.corrections
    }
    record = {**totals, "predictions": ledger.root, "sha256": files, "config": asdict(config)}
    storage.put(join(out, "corrections.json"), json.dumps(record, indent=1).encode())


def _report(config: CorrectConfig, out: str, totals: dict[str, Any]) -> None:
    splits = ", ".join(f"{count} {split}" for split, count in totals["splits"].items())
    corrected = f"{totals['corrected']} corrected ({totals['changed']} to another class than the model's)"
    known = f"{corrected} + {totals['kept']} as the catalog has them + {totals['accepted']} as the model has them"
    videos = f"{many(totals['videos'], 'video')} ({splits})"
    if config.add:
        kept = totals["videos"] - totals["added"]
        print(f"correct: {videos} = {kept} of {config.add} + {totals['added']} that joined it; found were {known}")
        if totals["unread"]:
            warn(
                f"{config.add}: {many(totals['unread'], 'video')} of it or of those found could not be read, so copies "
                "of them are not known, and may be in two splits now"
            )
        print(
            f"correct: {totals['in_set']} of those found are in the set already: {totals['relabelled']} got another "
            f"label there, {totals['removed']} were taken out as bad; {totals['copies']} others were further copies"
        )
    else:
        print(f"correct: {videos} = {known}")
    print(
        f"correct: left out: {many(totals['bad'], 'bad video')}, {totals['quarantined']} that could not be read, "
        f"{totals['unlabelled']} without a label"
    )
    if totals["respelled"]:
        print(
            f"correct: {totals['respelled']} video_ids are not as the table has them; row_key said which rows are meant"
        )
    if totals["renamed"]:
        print(
            f"correct: {many(totals['renamed'], 'video')} had the video_id of another one: a part of its place's "
            "digest was added"
        )
    if totals["repeated"]:
        print(f"correct: {many(totals['repeated'], 'correction')} said twice, with the same label")
    catalog = join(out, "catalog.parquet")
    print(f"correct: wrote {catalog}; train on it with: kinoray train {catalog} --out RUN", flush=True)
