"""Evaluations read back for comparing and ensembling: the numbers, the catalog and the rows they came from."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kinoray.catalog.table import Catalog, catalog_of_source
from kinoray.errors import CatalogError, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.evaluation.summary import ANSWER_COLUMNS, FILE_NAME, Answers, join_answers, true_classes
from kinoray.label.table import Ledger
from kinoray.storage.objects import Storage, absolute, join

__all__ = ["Evaluation", "read_evaluation"]

_KEYS = {"labels", "top1", "calibration", "catalog", "split", "catalog_digest"}
_KEYS |= {"model_digest", "config_digest", "predictions"}


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
    for moved in (beside, join(beside, root.rpartition("/")[2])):
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
        record = json.loads(storage.read(uri))
    except ObjectNotFound:
        raise ObjectNotFound(f"there is no {uri}; expected the --out of `kinoray evaluate` or `ensemble`") from None
    except ValueError as error:
        raise ConfigError(f"{uri} is not what evaluate wrote: {error}") from error
    missing = sorted(_KEYS - set(record)) if isinstance(record, dict) else sorted(_KEYS)
    if missing:
        raise ConfigError(f"{uri} lacks {', '.join(missing)}: it is not what this version wrote; evaluate again")
    return dict(record)


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
