"""Evaluations read back for comparing and ensembling: the numbers, the catalog and the rows they came from."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

import pyarrow as pa

from kinoray.catalog.table import Catalog, catalog_of_source
from kinoray.errors import CatalogError, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.evaluation.summary import ANSWER_COLUMNS, FILE_NAME, Answers, join_answers, true_classes
from kinoray.label.table import Ledger
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import MAX_RECORD_BYTES, is_name, parse_json, record_of

__all__ = ["Evaluation", "read_evaluation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """What is used of evaluation.json; it holds more, for people."""

    labels: tuple[str, ...]
    top1: float | None
    calibration: dict[str, Any]
    catalog: str
    split: str
    catalog_digest: str
    model_digest: str
    config_digest: str
    predictions: str
    top1_interval: tuple[float, float] | None = None
    evaluated: int = 0
    unreadable: int = 0
    views: int = 1
    checkpoint: str = ""
    members: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    protocol: str = ""


_FIELDS = {field.name: field.default is MISSING for field in fields(_Stored)}  # name -> whether it must be there


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """One evaluation: what evaluation.json says, and what it was made of."""

    uri: str
    """As it was named."""
    record: dict[str, Any]
    """What is in evaluation.json."""
    labels: tuple[str, ...]
    """The model's classes."""
    catalog: Catalog
    """The videos of the split."""
    answers: Answers
    predictions: pa.Table
    """The rows: ANSWER_COLUMNS and what was asked for besides."""

    @property
    def name(self) -> str:
        """The checkpoint, or the members of an ensemble."""
        return str(self.record.get("checkpoint") or " + ".join(self.record.get("members", ())))


def read_evaluation(storage: Storage, uri: str, *, catalog: str = "", columns: tuple[str, ...] = ()) -> Evaluation:
    """What `evaluate` or `ensemble` wrote.

    Args:
        uri: its --out, the folder of one of its labellings, or an evaluation.json.
        catalog: where the catalog is now, if it was moved.
        columns: of the predictions, besides ANSWER_COLUMNS.

    Raises:
        ObjectNotFound: nothing was evaluated there, or the catalog is gone.
        ConfigError: the file is no evaluation, or of an older kinoray.
        CatalogError: the catalog is not the one that was evaluated.
        IncompleteOutput: the predictions are gone or unfinished.
    """
    uri = absolute(uri).rstrip("/")
    record = _record(storage, uri if uri.endswith(".json") else join(uri, FILE_NAME))
    videos = _catalog(storage, uri, record, catalog)
    root = record["predictions"]
    beside = uri.rpartition("/")[0] if uri.endswith(".json") else uri
    name = root.rpartition("/")[2]
    for moved in (beside, *([join(beside, name)] if is_name(name) else [])):
        if not storage.exists(join(root, "job.json")) and storage.exists(join(moved, "job.json")):
            root = moved
    ledger = Ledger(storage, root)
    plans = [plan for plan in ledger.plans() if plan.catalog_digest == videos.digest]
    if not plans:
        raise IncompleteOutput(f"{uri}: the predictions in {root} are gone; evaluate again")
    predictions = pa.concat_tables(ledger.read_units(plans[0].units, [*ANSWER_COLUMNS, *columns]))
    labels = tuple(record["labels"])
    return Evaluation(
        uri=uri,
        record=record,
        labels=labels,
        catalog=videos,
        answers=join_answers(videos, true_classes(videos, labels), predictions, len(labels)),
        predictions=predictions,
    )


def _record(storage: Storage, uri: str) -> dict[str, Any]:
    try:
        record = parse_json(storage.read(uri, max_bytes=MAX_RECORD_BYTES))
    except ObjectNotFound:
        raise ObjectNotFound(f"there is no {uri}; expected the --out of `kinoray evaluate` or `ensemble`") from None
    except ValueError as error:
        raise ConfigError(f"{uri} is not what evaluate wrote: {error}") from error
    found = record if isinstance(record, dict) else {}
    missing = sorted(name for name, is_needed in _FIELDS.items() if is_needed and name not in found)
    if missing:
        raise ConfigError(f"{uri} lacks {', '.join(missing)}: it is not what this version wrote; evaluate again")
    try:
        record_of(_Stored)({name: found[name] for name in _FIELDS if name in found})
        if not isinstance(found["calibration"].get("ece"), float | int | None):
            raise ValueError("calibration.ece must be a number")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{uri} is not what evaluate wrote: {error}") from error
    return found


def _catalog(storage: Storage, uri: str, record: dict[str, Any], named: str) -> Catalog:
    source = absolute(named or record["catalog"])
    try:
        videos = catalog_of_source(storage, source).select(record["split"])
    except ObjectNotFound as error:
        raise ObjectNotFound(f"{uri}: its catalog is gone ({error}); name where it is now with --catalog") from error
    if videos.digest != record["catalog_digest"]:
        raise CatalogError(
            f"{uri} was made with another catalog ({record['catalog_digest']}) than {source} holds now "
            f"({videos.digest}, split {record['split']!r}); evaluate again, or name that catalog with --catalog"
        )
    return videos
