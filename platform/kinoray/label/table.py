"""The result table as its readers see it, and where everything lies.

Under OUT, one folder for each (model, settings), named `labelling_id`:

    job.json                      the model, the settings and the class names that all rows share
    plans/<catalog digest>.json   which rows of that catalog are in which unit (see plan.py)
    parts/<unit>.parquet          the rows of a finished unit; its metadata says who wrote them, when, and how many
    windows/<unit>-<digest>.parquet   rows of the windows of its long videos, where the settings ask for them
    done/<catalog digest>.json    totals, once every row of the catalog is there
    jobs/<run id>.json            what each job did that came to its end: totals, rate, and what it waited for

What is easy to break: one labelling has rows of several catalogs, so readers go by plans, the newest first.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kinoray.config.shared import digest
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.label.ledger import JobRecord, Ledger, Totals
from kinoray.label.part import PREDICTION_SCHEMA, WINDOW_SCHEMA, Commit, Times
from kinoray.label.plan import Plan, Unit, row_keys
from kinoray.storage.objects import Storage, join

__all__ = [
    "PLACE",
    "PREDICTION_SCHEMA",
    "WINDOW_SCHEMA",
    "Commit",
    "JobRecord",
    "Ledger",
    "Plan",
    "Times",
    "Totals",
    "Unit",
    "find_labellings",
    "labelling_id",
    "leave_out_seen",
    "open_ledger",
    "read_predictions",
    "read_windows",
    "row_keys",
]

PLACE = ("video_id", "uri", "offset", "length")
"""Columns that say where a video lies; a file that was replaced is another input in the same place."""


def labelling_id(model_digest: str, config_digest: str) -> str:
    """The folder that holds what one model says under one setting."""
    return digest([model_digest, config_digest])


def find_labellings(storage: Storage, out: str) -> list[str]:
    """Roots of the labellings in a place that `label` wrote to, sorted; the place may be a labelling's root itself.

    Raises:
        ObjectNotFound: there is none.
    """
    out = out.rstrip("/")
    if storage.exists(join(out, "job.json")):
        return [out]
    infos = storage.list(out + "/")
    roots = [info.uri.rpartition("/")[0] for info in infos if info.uri.endswith("/job.json")]
    roots = [root for root in roots if root.count("/") == out.count("/") + 1]
    if not roots:
        raise ObjectNotFound(f"{out} holds no predictions; expected the --out of `kinoray label` or `evaluate`")
    return roots


def read_predictions(
    storage: Storage, out: str, *, catalog_digest: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows that are committed so far (PREDICTION_SCHEMA), unit by unit in the order of the catalog.

    Where several catalogs were labelled into one place, the newest one's rows come first, then the others' rows of
    videos that are not in it. Half-written parts never show.

    Args:
        out: the --out of `label` or `evaluate`, or the folder of one labelling in it.
        catalog_digest: only the rows of this catalog.
        columns: of PREDICTION_SCHEMA; nothing else is held in memory. Default: all.

    Raises:
        ObjectNotFound: nothing was labelled there.
        ConfigError: results of several models or settings are there, and none was named.
    """
    ledger = open_ledger(storage, out)
    plans = [plan for plan in ledger.plans() if catalog_digest in (None, plan.catalog_digest)]
    committed = ledger.committed()
    names = list(columns or PREDICTION_SCHEMA.names)
    stored = list(dict.fromkeys([*names, *(PLACE if len(plans) > 1 else ())]))
    tables = [PREDICTION_SCHEMA.empty_table().select(names)]
    places: set[tuple[Any, ...]] = set()
    for plan in reversed(plans):
        for table in ledger.read_units((unit for unit in plan.units if unit.unit_id in committed), stored):
            if len(plans) > 1:
                table = leave_out_seen(table, places)
            tables.append(table.select(names))
    return pa.concat_tables(tables)


def leave_out_seen(table: pa.Table, places: set[tuple[Any, ...]]) -> pa.Table:
    """The rows of a table (with the columns PLACE) whose place was not seen yet; the places are added to those seen.

    A video_id is unique in its plan, so from the newest plan on this leaves out rows of older plans only.
    """
    rows = list(zip(*(table.column(name).to_pylist() for name in PLACE), strict=True))
    kept = table.filter(pa.array([row not in places for row in rows], pa.bool_()))
    places.update(rows)
    return kept


def read_windows(storage: Storage, out: str) -> pa.Table:
    """The rows of the windows of all videos that are committed so far (WINDOW_SCHEMA), in the order of the newest plan.

    Args:
        out: as for `read_predictions`.

    Raises:
        ObjectNotFound: nothing was labelled there, or not in windows.
        ConfigError: results of several models or settings are there, and none was named.
    """
    ledger = open_ledger(storage, out)
    if ledger.job().windows is None:
        raise ObjectNotFound(f"{ledger.root} was labelled without windows; label with --window-s")
    committed, seen = ledger.committed(), set[str]()
    tables = [WINDOW_SCHEMA.empty_table()]
    for plan in reversed(ledger.plans()):
        units = [unit for unit in plan.units if unit.unit_id in committed and unit.unit_id not in seen]
        seen.update(unit.unit_id for unit in units)
        tables.extend(ledger.read_windows(units))
    return pa.concat_tables(tables)


def open_ledger(storage: Storage, out: str) -> Ledger:
    """The only labelling in a place that `label` wrote to. Raises as `read_predictions`."""
    roots = find_labellings(storage, out)
    if len(roots) > 1:
        jobs = [Ledger(storage, root).job() for root in roots]
        models = [job.checkpoint or ", ".join(job.members) for job in jobs]
        choices = ", ".join(f"{root} (by {model})" for root, model in zip(roots, models, strict=True))
        raise ConfigError(f"predictions must name one labelling; {out} holds {len(roots)}: {choices}")
    return Ledger(storage, roots[0])
