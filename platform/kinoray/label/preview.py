"""What a labelling would do, before it does anything: how many videos are done, new and changed. Nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kinoray.catalog.table import Catalog
from kinoray.label.ledger import Ledger
from kinoray.label.plan import Plan

__all__ = ["Preview", "preview"]

_NAMED = ["video_id", "uri", "row_key"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """done + new + changed = videos."""

    videos: int
    """Inputs of the catalog."""
    done: int
    """That have their row."""
    new: int
    """That were never labelled with this model and these settings."""
    changed: int
    """That have a row under the same name and place, but are other files now: another size, checksum or shard place."""
    gone: int
    """Rows of videos that are not in this catalog; they stay, and do not show in its table."""
    size_bytes: int | None
    """Bytes of the videos to do; None where the catalog does not know all their sizes."""
    units: int
    """Units of work to do."""


def preview(ledger: Ledger, catalog: Catalog, keys: Sequence[str], plan: Plan) -> Preview:
    """Compare a catalog with what is committed.

    Args:
        keys: `row_keys` of the catalog.
        plan: its plan, stored or not.
    """
    committed = ledger.committed()
    missing = [unit for unit in plan.units if unit.unit_id not in committed]
    to_do = {key for unit in missing for key in unit.keys}
    places = [place for place, key in enumerate(keys) if key in to_do]
    rows = catalog.table.select(["video_id", "uri", "size_bytes"]).take(pa.array(places, pa.int64())).to_pylist()
    known = set(keys)
    older = {unit.unit_id: unit for before in ledger.plans() for unit in before.units if unit.unit_id in committed}
    gone = [unit for unit in older.values() if not known.issuperset(unit.keys)]
    left: dict[tuple[str, str], str] = {}
    for table in ledger.read_units(gone, _NAMED):
        for row in table.to_pylist():
            if row["row_key"] not in known:
                left[row["video_id"], row["uri"]] = row["row_key"]
    changed = sum((row["video_id"], row["uri"]) in left for row in rows)
    sizes = [row["size_bytes"] for row in rows]
    return Preview(
        videos=len(keys),
        done=len(keys) - len(to_do),
        new=len(to_do) - changed,
        changed=changed,
        gone=len(left) - changed,
        size_bytes=None if None in sizes else sum(sizes),
        units=len(missing),
    )
