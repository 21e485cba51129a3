"""The result table as the report reads it: its rows, what is still to come, its classes and its name.

What is easy to break: a table may be read while it is being written; what is to come is counted from commits that were
listed before the rows were read, so no input is lost between the two.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.config.shared import digest
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.table import Ledger, open_ledger, read_predictions
from kinoray.storage.objects import Storage

__all__ = ["ResultTable", "choose", "read_result"]

_COLUMNS = ["video_id", "uri", "offset", "length", "row_key", "status", "error_class", "error_text", "label_topk"]
_COLUMNS += ["score_topk", "margin", "entropy", "abstained", "model_digest", "config_digest", "run_id"]
_OTHERS_SHARE = 4  # at least a fourth of the list is for videos without an answer, where there are so many


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTable:
    """What there is of a labelling."""

    rows: pa.Table
    """PREDICTION_SCHEMA without the columns that a report does not show."""
    labels: tuple[str, ...]
    """The model's classes in its order; empty where the labelling does not name them."""
    num_pending: int
    """Inputs that have no row yet."""
    digest: str
    """Names the labelling and its newest catalog; the same before and after it is finished."""

    @property
    def num_inputs(self) -> int:
        """All inputs: those with a row and those to come."""
        return len(self.rows) + self.num_pending


def read_result(storage: Storage, predictions: str) -> ResultTable:
    """Read all rows that are committed.

    Raises:
        StorageError: it cannot be read, or nothing was labelled there.
        ConfigError: results of several models or settings are there.
        CatalogError: no rows yet.
    """
    ledger = open_ledger(storage, predictions)
    committed = ledger.committed()
    rows = read_predictions(storage, predictions, columns=_COLUMNS)
    if not len(rows):
        raise CatalogError(
            f"{predictions} holds no finished rows yet; run kinoray label, or wait for its first unit, then this"
        )
    plans = ledger.plans()
    pending = {key for plan in plans for unit in plan.units if unit.unit_id not in committed for key in unit.keys}
    if pending:
        pending.difference_update(rows["row_key"].to_pylist())
    return ResultTable(
        rows=rows,
        labels=_labels(ledger),
        num_pending=len(pending),
        digest=digest([ledger.labelling_id, plans[-1].catalog_digest if plans else ""]),
    )


def _labels(ledger: Ledger) -> tuple[str, ...]:
    labels = ledger.job().get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"{ledger.root}/job.json: labels must be a list of class names; label into another --out")
    return tuple(labels)


def choose(rows: pa.Table, most: int) -> pa.Table:
    """The at most `most` rows to list: labelled ones, least certain first, then the others, every reason in turn.

    Args:
        rows: what `numbers.join_truth` gave.
    """
    is_labelled = pc.equal(rows["status"], "labelled")
    labelled, others = rows.filter(is_labelled), rows.filter(pc.invert(is_labelled))
    num_others = min(len(others), max(most // _OTHERS_SHARE, most - len(labelled)))
    labelled = labelled.sort_by([("margin", "ascending"), ("video_id", "ascending")])
    return pa.concat_tables([labelled.slice(0, most - num_others), _by_turns(others).slice(0, num_others)])


def _by_turns(others: pa.Table) -> pa.Table:
    """The first row of every reason, then the second of each, so that a cut list lacks no reason."""
    reason = pc.coalesce(others["error_class"], others["status"])
    others = others.append_column("reason", reason)
    others = others.sort_by([("reason", "ascending"), ("status", "ascending"), ("video_id", "ascending")])
    codes = others["reason"].combine_chunks().dictionary_encode().indices.to_numpy()
    place = np.arange(len(codes))
    is_first = np.ones(len(codes), bool)
    is_first[1:] = codes[1:] != codes[:-1]
    turn = place - np.maximum.accumulate(np.where(is_first, place, 0)) if len(codes) else place
    return others.take(pa.array(np.argsort(turn, kind="stable"))).drop_columns(["reason"])
