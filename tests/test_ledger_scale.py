"""What a driver that resumes needs in memory: the catalog and its keys, and nothing for what is finished.

The ledgers are real ones in a folder, written by Ledger.commit; only the rows are made up. Peaks are the kernel's
(VmHWM), of a process of its own that does what `kinoray label` does where nothing is missing.
"""

import ctypes
import gc
import hashlib
import json
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.label.config import LabelConfig
from kinoray.label.keys import Keys
from kinoray.label.ledger import Ledger
from kinoray.label.open import open_labelling
from kinoray.label.plan import Plan
from kinoray.label.unit import PREDICTION_SCHEMA, Unit
from kinoray.label.verb import run_labelling
from kinoray.storage.objects import Storage
from label_models import save_untrained
from small_tables import job_record, planned
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
LABELS = ("blue", "green", "red")
MIB = 2**20
FLAT_MIB = 24


def made_up_rows(unit: Unit, *, every_bad: int = 100) -> pa.Table:
    """What a worker would commit: three classes, and every hundredth video quarantined."""
    count = unit.num_rows
    bad = np.arange(count) % every_bad == every_bad - 1
    columns = {
        "video_id": [f"video-{key}" for key in unit.keys],
        "uri": ["s3://bucket/set/shard-00000.tar"] * count,
        "offset": np.arange(count) * 600_000,
        "length": np.full(count, 600_000),
        "row_key": list(unit.keys),
        "status": np.where(bad, "quarantined", "labelled"),
        "error_class": pa.array(np.where(bad, "UnreadableContainer", ""), mask=~bad),
        "error_text": pa.array(np.where(bad, "no video file of a known format", ""), mask=~bad),
        "label_topk": [list(LABELS)] * count,
        "id_topk": [[0, 1, 2]] * count,
        "score_topk": [[0.5, 0.3, 0.2]] * count,
        "margin": np.full(count, 0.2),
        "entropy": np.full(count, 1.0),
        "model_digest": ["m" * 16] * count,
        "config_digest": ["c" * 16] * count,
        "run_id": ["r" * 16] * count,
    }
    zeros = pa.array(np.zeros(count, np.int32))
    arrays = []
    for field in PREDICTION_SCHEMA:
        if field.name in columns:
            arrays.append(pa.array(columns[field.name], field.type))
        elif field.nullable:
            arrays.append(pa.nulls(count, field.type))
        else:
            arrays.append(zeros.cast(field.type))
    return pa.table(arrays, schema=PREDICTION_SCHEMA)


def made_up_catalog(num_rows: int) -> Catalog:
    """A packed set: names of 17 letters, 256 videos a shard, a checksum each."""
    numbers = range(num_rows)
    columns = {
        "video_id": [f"video-{number:011d}" for number in numbers],
        "uri": [f"s3://bucket/set/shard-{number // 256:05d}.tar" for number in numbers],
        "offset": [number % 256 * 600_000 for number in numbers],
        "length": [600_000] * num_rows,
        "sha256": [hashlib.sha256(b"%d" % number).hexdigest() for number in numbers],
        "size_bytes": [600_000] * num_rows,
    }
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(num_rows, field.type)
        for field in CATALOG_SCHEMA
    ]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA))


def config_in(folder: Path, unit_size: int) -> LabelConfig:
    return LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=str(folder / "catalog.parquet"),
        checkpoint=str(folder / "checkpoint"),
        out=str(folder / "out"),
        unit_size=unit_size,
    )


def finish(folder: Path, num_rows: int, unit_size: int) -> None:
    """A catalog of so many rows, all of them labelled."""
    storage = Storage()
    save_catalog(storage, str(folder / "catalog.parquet"), made_up_catalog(num_rows))
    save_untrained(storage, str(folder / "checkpoint"), LABELS, CLIP, "tiny_models:mean_colour")
    labelling = open_labelling(config_in(folder, unit_size), "label")
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda unit: labelling.ledger.commit(unit, made_up_rows(unit), "r" * 16).rows, labelling.plan.units
            )
        )


def memory_mib(name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def settle() -> float:
    """Give back what is free, forget the peak; returns what is in use now."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib("VmRSS")


def measure_here(folder: str, unit_size: int) -> None:
    """Print what opening the labelling holds and peaks at, and what the rest of the job peaks at, above it."""
    config = config_in(Path(folder), unit_size)
    idle = settle()
    labelling = open_labelling(config, "label")
    opening = memory_mib("VmHWM") - idle
    held = settle()
    totals = run_labelling(labelling, config.resources, "label")
    finishing = memory_mib("VmHWM") - held
    found = {"inputs": totals.inputs, "opening": opening, "held": held - idle, "finishing": finishing}
    print(json.dumps(found))


def measured(folder: Path, unit_size: int) -> dict[str, float]:
    """`measure_here` in a process of its own, in MiB."""
    code = f"import test_ledger_scale as t; t.measure_here({str(folder)!r}, {unit_size})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("num_rows", "unit_size"), [(100_000, 64), (1_000_000, 1000)])
def test_what_is_finished_adds_no_memory_to_a_driver(tmp_path: Path, num_rows: int, unit_size: int) -> None:
    """Beside a thousand finished rows; the catalog and its keys may grow with the catalog."""
    found = {}
    for count in (1000, num_rows):
        folder = tmp_path / str(count)
        finish(folder, count, unit_size)
        found[count] = measured(folder, unit_size)
        assert found[count]["inputs"] == count
    print(found)
    assert found[num_rows]["finishing"] <= found[1000]["finishing"] + FLAT_MIB, found


def small_ledger(root: Path, num_rows: int, unit_size: int) -> tuple[Ledger, Plan, Keys]:
    keys = Keys.from_texts([f"k{hashlib.sha256(b'%d' % number).hexdigest()[:16]}" for number in range(num_rows)])
    ledger = Ledger(Storage(), str(root))
    ledger.pin_job(job_record(labels=LABELS))
    plan = planned(ledger, "d" * 16, keys, unit_size)
    for unit in plan.units:
        ledger.commit(unit, made_up_rows(unit), "r" * 16)
    return ledger, plan, keys


def peak_of_check(root: Path, num_rows: int) -> int:
    """Python's own bytes; Arrow's are in the slow test.

    In a process of its own, which ends traced: before Python 3.12.9 tracemalloc.stop() can crash a process whose
    other threads allocate (https://github.com/python/cpython/issues/128679).
    """
    ledger, plan, keys = small_ledger(root, num_rows, 500)
    tracemalloc.start()
    totals = ledger.check(plan, keys)
    assert (totals.inputs, totals.quarantined) == (len(keys), len(keys) // 100)
    return tracemalloc.get_traced_memory()[1]


def test_the_check_of_twenty_times_the_rows_needs_no_more_memory(tmp_path: Path) -> None:
    counts = (2000, 40_000)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = list(pool.map(peak_of_check, [tmp_path / str(count) for count in counts], counts))
    assert peaks[1] <= peaks[0] + 3 * MIB, peaks


class Counting(Storage):
    """Says when more than 64 parts were read."""

    num_parts = 0
    lock = threading.Lock()
    too_many = threading.Event()

    def read(self, uri: str, *, max_bytes: int = 2**40) -> bytes:
        with Counting.lock:
            Counting.num_parts += "/parts/" in uri
            if Counting.num_parts > 64:
                Counting.too_many.set()
        return super().read(uri, max_bytes=max_bytes)


def test_parts_are_read_a_few_ahead_of_who_takes_them_in(tmp_path: Path) -> None:
    """While the consumer is busy with the first of 200, the others wait in the store and not in memory."""
    ledger, plan, _ = small_ledger(tmp_path / "out", 400, 2)
    tables = Ledger(Counting(), ledger.root).read_units(plan.units)
    assert next(tables).num_rows == 2
    assert not Counting.too_many.wait(0.5), "more than 64 parts were read for a consumer that took one"
    assert sum(table.num_rows for table in tables) == 398
    assert Counting.num_parts == 200
