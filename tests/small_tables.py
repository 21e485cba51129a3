"""Result tables without a model: catalogs of references, and what a labeller would have said of them."""

import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.catalog.table import Catalog
from kinoray.label.keys import Keys, row_keys
from kinoray.label.ledger import Ledger
from kinoray.label.plan import Plan, Survey, draft_plan
from kinoray.label.unit import PREDICTION_SCHEMA, JobRecord, labelling_id
from kinoray.storage.objects import Storage, join
from small_sets import LABELS, catalog_of

ROOT_NAME = labelling_id("model", "config")


def library(num_videos: int, *, first: int = 0, uri: str = "s3://library") -> Catalog:
    """Videos v0000, v0001, ... in place."""
    names = [f"v{index:04d}" for index in range(first, first + num_videos)]
    return catalog_of([{"video_id": name, "uri": f"{uri}/{name}.mp4", "size_bytes": 10} for name in names])


def answer(index: int) -> dict[str, Any]:
    """What the labeller says of the video with this number: every fifth is quarantined."""
    if index % 5 == 4:
        return {"status": "quarantined", "error_class": "EmptyMedia", "error_text": f"no bytes in {index}"}
    score = 0.5 + (index * 37 % 50) / 100
    names = [LABELS[(index + shift) % len(LABELS)] for shift in range(2)]
    return {
        "status": "labelled",
        "label_topk": names,
        "id_topk": [LABELS.index(name) for name in names],
        "score_topk": [score, 1 - score],
        "margin": 2 * score - 1,
        "entropy": 1 - score,
    }


def rows_for(catalog: Catalog, keys: Sequence[str], **changes: Any) -> pa.Table:
    """Rows of PREDICTION_SCHEMA of these keys; the number in a video_id (v0012) decides what is said."""
    known = dict(zip(row_keys(catalog.table), catalog.table.to_pylist(), strict=True))
    rows = [
        {name: known[key][name] for name in ("video_id", "uri", "offset", "length")}
        | {"row_key": key, "abstained": False, "views": 1, "windows": 1, "segments_run": 1}
        | {
            "frames_decoded": 4,
            "frames_corrupt": 0,
            "frames_missing": 0,
            "model_digest": "m",
            "config_digest": "c",
            "run_id": "r",
        }
        | answer(int(known[key]["video_id"].lstrip("v")))
        | changes
        for key in keys
    ]
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def job_record(**changes: Any) -> JobRecord:
    """What job.json says of a labelling that was never run."""
    known = {"checkpoint": "run", "model_digest": "m", "config_digest": "c", "labels": tuple(LABELS), "settings": {}}
    return JobRecord(**{**known, **changes})


_SCRATCH = tempfile.TemporaryDirectory(prefix="kinoray-plans-")


def drafted(labelling: str, catalog_digest: str, keys: Sequence[str], unit_size: int, **older: Any) -> Plan:
    """The plan of a catalog with these keys."""
    found = Survey(catalog_digest, Keys.from_texts(keys))
    return draft_plan(labelling, found, unit_size, Path(_SCRATCH.name), **older)


def planned(ledger: Ledger, catalog_digest: str, keys: Sequence[str], unit_size: int) -> Plan:
    """The plan that a ledger has, or makes, of a catalog with these keys."""
    return ledger.plan(Survey(catalog_digest, Keys.from_texts(keys)), unit_size, Path(_SCRATCH.name))


def ledger_in(storage: Storage, out: str | Path) -> Ledger:
    """A labelling that has been started."""
    ledger = Ledger(storage, join(str(out), ROOT_NAME))
    ledger.pin_job(job_record())
    return ledger


def part_of(rows: pa.Table, record: dict[str, Any]) -> bytes:
    """A part as its format is described, with any record in its metadata."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, rows.schema) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({"kinoray": json.dumps(record)})
    return sealed(sink.getvalue())


def sealed(data: bytes) -> bytes:
    """Parquet with the two digests of a part before its footer."""
    (footer_bytes,) = struct.unpack("<I", data[-8:-4])
    pages, footer = data[: -8 - footer_bytes], data[-8 - footer_bytes :]
    return pages + hashlib.sha256(pages).digest() + hashlib.sha256(footer).digest() + footer


def label_library(ledger: Ledger, catalog: Catalog, *, unit_size: int = 8, source: str = "", **changes: Any) -> Plan:
    """Commit what is missing of a catalog, check it and declare it complete."""
    keys = row_keys(catalog.table)
    plan = planned(ledger, catalog.digest, keys, unit_size)
    done = ledger.committed()
    for unit in plan.units:
        if unit.unit_id not in done:
            ledger.commit(unit, rows_for(catalog, unit.keys, **changes), "run")
    ledger.finish(plan, ledger.check(plan, keys), source)
    return plan
