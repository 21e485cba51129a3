"""manifest.json of a result table: the Parquet files that count, for DuckDB, Spark and everything else that reads them.

What is easy to break: a folder of parts also holds what losing writers left; only commits say which parts count.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kinoray.errors import IncompleteOutput
from kinoray.label.table import Commit, Ledger, Plan, Unit
from kinoray.storage.objects import join

__all__ = ["MANIFEST_FILE", "write_manifest"]

MANIFEST_FILE = "manifest.json"
_THREADS = 16


def write_manifest(ledger: Ledger, plan: Plan) -> dict[str, Any]:
    """Write which parts hold the rows of a finished plan, as JSON beside them.

    Returns:
        What is in it, and its `uri`: `parts` (relative to the labelling's root), `rows` (of the catalog),
        `catalog_digest`, `foreign_rows` (rows in the parts of videos that have left the catalog), and `windows`: the
        files with the rows of windows, where long videos were cut.

    Raises:
        IncompleteOutput: the plan is not finished.
        StorageError: it cannot be written.
    """

    def commit_of(unit: Unit) -> Commit:
        commit = ledger.find_commit(unit.unit_id)
        if commit is None:
            raise IncompleteOutput(f"{ledger.root}: unit {unit.unit_id} is not finished; run the label command again")
        return commit

    with ThreadPoolExecutor(_THREADS) as pool:
        commits = list(pool.map(commit_of, plan.units))
    num_rows = sum(commit.rows for commit in commits)
    record = {
        "catalog_digest": plan.catalog_digest,
        "rows": plan.num_rows,
        "foreign_rows": num_rows - plan.num_rows,
        "parts": [f"parts/{commit.part}" for commit in commits],
        "windows": [f"windows/{commit.part}" for commit in commits if commit.windows is not None],
    }
    uri = join(ledger.root, MANIFEST_FILE)
    ledger.storage.put(uri, json.dumps(record, indent=1).encode())
    return {**record, "uri": uri}
