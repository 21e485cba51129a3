"""What a huge library takes of the driver: `python benchmarks/scale.py [--quick] [--rows N ...] [--plan-only]`.

Catalogs of 10^5, 10^6 and 10^7 made-up rows (10^8: --rows 100000000) in Parquet files of a million. Each step is a
process of its own, and its figures are of the whole process, its start included:

plan     the command `kinoray label CATALOG --plan`. Bar at the largest catalog: 4 us of CPU a row.
store    the plan is made and written.
resume   all but 50 rows are done: survey, plan, what is finished, and the 50 rows at hand. Bar: it reads at most 1.05
         times the catalog, the plan's units and the row group in which the 50 are.
check    everything is done: survey, plan, and every part is read back and compared with the catalog.
grown    everything is done, and the library has 50 rows more: survey, and a plan that takes over what is finished.
labels   the command `kinoray labels OUT --limit 10`.

Peak memory is the kernel's (VmHWM), of the process with the most. Bar: at 10^7 rows 1.25 times that at 10^6. "read" and
"written" count all calls, of imports and scratch files too. Parts are made up, and written by Ledger.commit.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.catalog.rows import CATALOG_SCHEMA, GROUP_ROWS, OF_FEW_VALUES
from kinoray.catalog.table import open_pieces
from kinoray.cli import main as kinoray
from kinoray.label.config import LabelConfig
from kinoray.label.keys import Keys, keys_in
from kinoray.label.ledger import Ledger
from kinoray.label.plan import Survey, survey
from kinoray.label.unit import PREDICTION_SCHEMA, JobRecord, Unit
from kinoray.label.work import work_of
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage

SIZES = (10**5, 10**6, 10**7)
FILE_ROWS = 16 * GROUP_ROWS
LEFT = 50
BARS = {"us a row": 4.0, "peak": 1.25, "read": 1.05}
LABELS = ("blue", "green", "red")
ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)


# The library


def texts(*columns: bytes | np.ndarray) -> pa.Array:
    """Texts of one length: each column is of letters, uint8 [N, width], or the same for all rows."""
    num_rows = max(len(column) for column in columns if isinstance(column, np.ndarray))
    letters = [np.frombuffer(c, np.uint8)[None].repeat(num_rows, 0) if isinstance(c, bytes) else c for c in columns]
    data = np.concatenate(letters, axis=1)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * np.int32(data.shape[1])
    return pa.StringArray.from_buffers(num_rows, pa.py_buffer(offsets), pa.py_buffer(data.tobytes()))


def digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Decimal numbers as letters, uint8 [N, width]."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.uint64)
    return (numbers[:, None] // powers % np.uint64(10) + np.uint64(48)).astype(np.uint8)


def names(begin: int, end: int) -> tuple[pa.Array, pa.Array]:
    """(video_id, uri) of rows: names as those of Kinetics, eleven letters and two times, below prefixes."""
    number = np.arange(begin, end, dtype=np.uint64)
    mixed = (number ^ (number >> np.uint64(7))) * np.uint64(0x9E3779B97F4A7C15)  # odd: no two are alike
    letters = ALPHABET[(mixed[:, None] >> (np.arange(11, dtype=np.uint64) * np.uint64(6))) & np.uint64(63)]
    second = mixed % np.uint64(600)
    name = (letters, b"_", digits(second, 6), b"_", digits(second + np.uint64(10), 6))
    return texts(*name), texts(b"s3://library/videos/", digits(number // np.uint64(1000), 6), b"/", *name, b".mp4")


def make_catalog(folder: Path, num_rows: int) -> None:
    """Write the catalog's files, a row group at a time."""
    folder.mkdir()
    for first in range(0, num_rows, FILE_ROWS):
        path, last = folder / f"{first // FILE_ROWS:05d}.parquet", min(first + FILE_ROWS, num_rows)
        with pq.ParquetWriter(path, CATALOG_SCHEMA, compression="zstd", use_dictionary=list(OF_FEW_VALUES)) as writer:
            for begin in range(first, last, GROUP_ROWS):
                video_id, uri = names(begin, min(begin + GROUP_ROWS, last))
                sizes = 400_000 + np.arange(begin, begin + len(uri)) * 7919 % 400_000
                known = {"video_id": video_id, "uri": uri, "size_bytes": pa.array(sizes)}
                known["status"] = pa.array(["listed"] * len(uri))
                columns = [known.get(field.name, pa.nulls(len(uri), field.type)) for field in CATALOG_SCHEMA]
                writer.write_table(pa.table(columns, schema=CATALOG_SCHEMA), row_group_size=GROUP_ROWS)


@cache
def answers(count: int) -> pa.Table:
    """What a worker would commit, but for the names: three classes, and every hundredth video quarantined."""
    bad = np.arange(count) % 100 == 99
    known = {
        "status": np.where(bad, "quarantined", "labelled"),
        "error_class": pa.array(np.where(bad, "UnreadableContainer", ""), mask=~bad),
        "error_text": pa.array(np.where(bad, "no video file of a known format", ""), mask=~bad),
        "label_topk": [list(LABELS)] * count,
        "id_topk": [[0, 1, 2]] * count,
        "score_topk": [[0.5, 0.3, 0.2]] * count,
        "margin": np.full(count, 0.2),
        "entropy": np.full(count, 1.0),
        **dict.fromkeys(("model_digest", "config_digest", "run_id"), ["0123456789abcdef"] * count),
    }
    zeros = pa.array(np.zeros(count, np.int32))
    columns = []
    for field in PREDICTION_SCHEMA:
        if field.name in known:
            columns.append(pa.array(known[field.name], field.type))
        elif field.nullable or pa.types.is_string(field.type):
            columns.append(pa.nulls(count, field.type))
        else:
            columns.append(zeros.cast(field.type))
    return pa.table(columns, schema=PREDICTION_SCHEMA)


def commit(ledger: Ledger, unit: Unit) -> None:
    """Have a unit labelled, by nobody."""
    rows = answers(unit.num_rows)
    video_id, uri = names(unit.first, unit.last + 1)
    for name, column in {"video_id": video_id, "uri": uri, "row_key": pa.array(unit.keys, pa.string())}.items():
        place = PREDICTION_SCHEMA.get_field_index(name)
        rows = rows.set_column(place, PREDICTION_SCHEMA.field(name), column)
    ledger.commit(unit, rows, "r" * 16)


def commit_some(folder: Path, begin: int, end: int) -> None:
    """Have some units labelled."""
    ledger = Ledger(Storage(), ledger_root(folder))
    for unit in ledger.plans()[0].units[begin:end]:
        commit(ledger, unit)


def ledger_root(folder: Path) -> str:
    return str(folder / "out" / "labelling")


# Steps: each is given a folder, and says how long its parts took


class Counted(Storage):
    """Counts the bytes that are read."""

    num_bytes = 0

    def read(self, uri: str, **limit: int) -> bytes:
        return self._count(super().read(uri, **limit))

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        return self._count(super().read_range(uri, offset, length))

    def _count(self, data: bytes) -> bytes:
        Counted.num_bytes += len(data)
        return data


class Opened:
    """The catalog, its plan and its ledger, found or made as `kinoray label` does."""

    def __init__(self, folder: Path, num_rows: int, scratch: Path) -> None:
        self._begin = time.perf_counter()
        self.took: dict[str, float] = {}
        storage = Counted()
        self.rows = open_pieces(storage, catalog_in(folder))
        self.found = survey(self.rows, scratch)
        self.note("survey")
        self.ledger = Ledger(storage, ledger_root(folder))
        self.ledger.pin_job(
            JobRecord(checkpoint="none", model_digest="m", config_digest="c", labels=LABELS, settings={})
        )
        self.plan = self.ledger.plan(self.found, unit_size(num_rows), scratch)
        self.note("plan")

    def note(self, what: str) -> None:
        """Say that a part of a step is done."""
        now = time.perf_counter()
        self.took[what], self._begin = now - self._begin, now


def step_plan(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    place = ["--checkpoint", str(folder.parent / "decode-bound"), "--out", str(folder / "never")]
    require(kinoray(["label", catalog_in(folder), *place, "--plan"]))
    return {}


def step_store(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    return Opened(folder, num_rows, scratch).took


def step_resume(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    opened = Opened(folder, num_rows, scratch)
    done = opened.ledger.committed()
    opened.note("committed")
    missing = [unit for unit in opened.plan.units if unit.unit_id not in done]
    work = work_of(opened.rows, opened.found.keys, opened.ledger.labelling_id, missing)
    if sum(table.num_rows for _, table in work) != LEFT:
        raise RuntimeError(f"not {LEFT} rows were left")
    opened.note("work")
    return opened.took | {"store_bytes": Counted.num_bytes}


def step_check(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    opened = Opened(folder, num_rows, scratch)
    totals = opened.ledger.check(opened.plan, opened.found.keys)
    if totals.inputs != num_rows:
        raise RuntimeError(f"{totals.inputs} inputs of {num_rows}")
    opened.note("check")
    return opened.took


def step_grown(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    opened = Opened(folder, num_rows, scratch)
    with (scratch / "grown").open("wb") as file:
        for chunk in opened.found.keys.chunks():
            file.write(keys_in(chunk))
        file.write(keys_in(np.arange(LEFT, dtype=np.uint64)))
    grown = Survey("grown", Keys.in_file(scratch / "grown"))
    plan = opened.ledger.draft(grown, unit_size(num_rows), scratch)
    if len(plan.units) != len(opened.plan.units) + 1 or plan.num_rows != num_rows + LEFT:
        raise RuntimeError(f"{len(plan.units)} units of {plan.num_rows} rows")
    opened.note("grown")
    return opened.took


def step_labels(folder: Path, num_rows: int, scratch: Path) -> dict[str, float]:
    require(kinoray(["labels", str(folder / "out"), "--limit", "10"]))
    return {}


STEPS: dict[str, Callable[[Path, int, Path], dict[str, float]]] = {
    "plan": step_plan,
    "store": step_store,
    "resume": step_resume,
    "check": step_check,
    "grown": step_grown,
    "labels": step_labels,
}


def require(code: int) -> None:
    """Stop where a command failed."""
    if code:
        raise SystemExit(code)


def catalog_in(folder: Path) -> str:
    return str(folder / "catalog" / "*.parquet")


def unit_size(num_rows: int) -> int:
    return LabelConfig(source="catalog.parquet", checkpoint="run", out="out").rows_a_unit(num_rows)


def be_step(name: str, folder: Path, num_rows: int) -> None:
    """Do a step and print what this process took, whole."""
    with scratch_folder("scale") as scratch:
        took = STEPS[name](folder, num_rows, scratch)
    status = Path("/proc/self/status").read_text()
    io = dict(re.findall(r"(\w+): (\d+)", Path("/proc/self/io").read_text()))
    mine, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peaks = [int(kb) for kb in re.findall(r"VmHWM:\s*(\d+)", status)] + [children.ru_maxrss]
    figures = {
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in (mine, children)),
        "peak_mib": max(peaks) / 1024,
        "read_mb": int(io["rchar"]) / 1e6,
        "written_mb": int(io["wchar"]) / 1e6,
        "torch": "torch" in sys.modules,
        "took": took,
    }
    print(json.dumps(figures))


# The measurement


def run_step(name: str, folder: Path, num_rows: int) -> dict[str, Any]:
    """A step in a process of its own: its figures, also printed."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--step", name, str(folder), str(num_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) | {"wall_s": time.perf_counter() - begin}
    stored = [path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file()]
    figures |= {"us_a_row": 1e6 * figures["cpu_s"] / num_rows, "objects": len(stored), "stored_mb": sum(stored) / 1e6}
    took = figures["took"]
    note = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in took.items() if not part.endswith("bytes"))
    print(
        f"{num_rows:>11,} {name:<6}{figures['wall_s']:>8.1f}{figures['cpu_s']:>8.1f}{figures['us_a_row']:>9.2f}"
        f"{figures['peak_mib']:>10.0f}{figures['read_mb']:>9.0f}{figures['written_mb']:>9.0f}{figures['objects']:>9,}"
        f"{figures['stored_mb']:>10.1f}  {note}{'torch is imported' * figures['torch']}",
        flush=True,
    )
    return figures


def make_parts(folder: Path, num_units: int) -> float:
    """Have units labelled by as many processes as there are cores; seconds."""
    begin, share = time.perf_counter(), -(-num_units // (4 * (os.cpu_count() or 1)))
    starts = range(0, num_units, share)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        ends = [min(start + share, num_units) for start in starts]
        list(pool.map(commit_some, [folder] * len(starts), starts, ends))
    return time.perf_counter() - begin


def measure(folder: Path, about: int, plan_only: bool) -> dict[str, dict[str, Any]]:
    """The figures of all steps on a catalog of about so many rows, of which the last unit has 50."""
    folder.mkdir()
    size = unit_size(about)
    num_units = about // size
    num_rows = num_units * size + LEFT
    begin = time.perf_counter()
    make_catalog(folder / "catalog", num_rows)
    catalog_bytes = sum(path.stat().st_size for path in (folder / "catalog").iterdir())
    made = f"catalog of {catalog_bytes / 1e6:.1f} MB made in {time.perf_counter() - begin:.1f} s"
    print(f"{num_rows:>11,} rows, {num_units + 1:,} units of {size}; {made}", flush=True)
    found = {name: run_step(name, folder, num_rows) for name in ("plan", "store")}
    if plan_only:
        return found
    print(f"{'':>12}{num_units:,} parts made in {make_parts(folder, num_units):.0f} s", flush=True)
    found["resume"] = run_step("resume", folder, num_rows)
    units_bytes = sum(path.stat().st_size for path in Path(ledger_root(folder), "plans").glob("*.parquet"))
    group = (num_rows - 1) % GROUP_ROWS + 1
    least = catalog_bytes * (1 + group / num_rows) + units_bytes
    found["resume"]["read_ratio"] = found["resume"]["took"]["store_bytes"] / least
    commit_some(folder, num_units, num_units + 1)
    return found | {name: run_step(name, folder, num_rows) for name in ("check", "grown", "labels")}


def judged(found: dict[int, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, float, float]]:
    """(what, figure, bar: the figure is at most that)."""
    largest = max(found)
    yield f"plan of {largest:,}: us of CPU a row", found[largest]["plan"]["us_a_row"], BARS["us a row"]
    for rows, steps in found.items():
        if "resume" in steps:
            yield f"resume of {rows:,}: bytes read / least", steps["resume"]["read_ratio"], BARS["read"]
    for less, more in zip(sorted(found), sorted(found)[1:], strict=False):
        if less >= 10**6:
            for name in found[more].keys() & found[less].keys():
                ratio = found[more][name]["peak_mib"] / found[less][name]["peak_mib"]
                yield f"{name}: peak at {more:,} / {less:,}", ratio, BARS["peak"]


def main() -> int:
    """Print the table, pass or miss of each bar and, last, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^5 and 10^6 rows")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="sizes of the catalogs")
    parser.add_argument("--plan-only", action="store_true", help="plan and store; no parts are made up")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "FOLDER", "ROWS"), help="be one step")
    arguments = parser.parse_args()
    if arguments.step:
        name, folder, num_rows = arguments.step
        be_step(name, Path(folder), int(num_rows))
        return 0
    from label import make_checkpoint  # here: it imports torch, and the steps must not

    sizes = arguments.rows or (SIZES[:2] if arguments.quick else SIZES)
    head = f"{'rows':>11} {'step':<6}{'wall s':>8}{'CPU s':>8}{'us/row':>9}{'peak MiB':>10}{'read MB':>9}"
    print(f"{head}{'written':>9}{'objects':>9}{'MB stored':>10}")
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as place:
        make_checkpoint(Path(place), "decode-bound")
        found = {size: measure(Path(place) / str(size), size, arguments.plan_only) for size in sorted(sizes)}
    result, ok = {}, True
    for what, value, bar in judged(found):
        print(f"{what:<52}{value:>8.3f}  bar {bar:<5} {'pass' if value <= bar else 'miss'}")
        result[what] = {"value": round(value, 3), "bar": f"<= {bar}"}
        ok = ok and value <= bar
    print(json.dumps(result | {"ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
