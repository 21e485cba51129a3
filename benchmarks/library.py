"""Embeddings in use: `python benchmarks/library.py [--quick] [--rows N]`.

A labelling of 10^6 made-up videos with embeddings of 512 (float16, 1 GB), in parts of 1,024 rows that Ledger.commit
writes: 2,000 clusters around a common mean, and 5% copies with a similarity of 0.985 to 0.9999 to their originals. Each
step is a process of its own with one thread of BLAS, and its figures are of the whole process, its start included. Bars
are on CPU seconds: what it takes at most on a machine that does nothing else.

first         `kinoray labels search OUT --like ID --cache`, which reads all parts and keeps the embeddings in one file.
again         the same again. Bar: 2 s.
dedup         `kinoray labels dedup OUT --cache`. Bar: 10 minutes. Of 500 copies drawn at random, all pairs of at least
              that similarity are found by comparing with every row. Bar: 99% of these pairs are in one group.
select        `kinoray labels select OUT --budget 200 --cache`.

Peak memory is the kernel's (VmHWM). Bar, of 10^6: twice the embeddings.

The curves: what a linear classifier on embeddings is right about (mean over classes, of videos that nobody labelled)
after so many labels were bought, 40 at a time: at random, those with the smallest margin, and as `labels select` does.
20 classes of several clusters each, the largest with 20 times the videos of the smallest; mean of 5 draws.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.cli import main as kinoray
from kinoray.label.keys import Keys
from kinoray.label.ledger import Ledger
from kinoray.label.plan import Survey
from kinoray.label.unit import PREDICTION_SCHEMA, JobRecord, Unit
from kinoray.library.config import DedupConfig
from kinoray.library.selection import to_label_next
from kinoray.library.similar import Vectors
from kinoray.library.vectors import nearest
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage
from scale import LABELS, answers, names

ROWS, QUICK_ROWS = 10**6, 4 * 10**4
WIDTH = 512
UNIT_ROWS = 1024
COPIES = 51  # of the rows of a unit, each of one of its first rows
NUM_CLUSTERS = 2000
SAMPLE = 500
THRESHOLD = DedupConfig(predictions="out").threshold
BARS = {"again s": 2.0, "dedup s": 600.0, "memory": 2.0, "found": 0.99}

CLASSES = 20
STEP = 40
BOUGHT = (40, 80, 160, 240, 400)
DRAWS = 5


# The labelling


def embeddings(unit: int, clusters: np.ndarray) -> np.ndarray:
    """Of the rows of a unit: float16 [UNIT_ROWS, WIDTH]."""
    rng = np.random.default_rng(unit)
    own = rng.standard_normal((UNIT_ROWS, WIDTH), np.float32)
    rows = 1 + 0.7 * clusters[rng.integers(NUM_CLUSTERS, size=UNIT_ROWS)] + 0.7 * own
    noise = rng.standard_normal((COPIES, WIDTH), np.float32)
    length = np.linalg.norm(rows[:COPIES], axis=1, keepdims=True)
    share = rng.uniform(0.014, 0.17, (COPIES, 1)).astype(np.float32)
    rows[-COPIES:] = rows[:COPIES] + share * length * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return rows.astype(np.float16)


def clusters() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_CLUSTERS, WIDTH), np.float32)


def make_labelling(folder: Path, num_rows: int) -> None:
    """A finished labelling, by two processes."""
    ledger = Ledger(Storage(), root_in(folder))
    ledger.pin_job(JobRecord(checkpoint="none", model_digest="m", config_digest="c", labels=LABELS, settings={}))
    keys = Keys.from_texts([f"k{number:016x}" for number in range(num_rows)])
    with scratch_folder("library") as scratch:
        plan = ledger.plan(Survey("made-up", keys), UNIT_ROWS, scratch)
    shares = np.array_split(np.arange(len(plan.units)), 8)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(commit_some, [folder] * len(shares), [(int(share[0]), int(share[-1]) + 1) for share in shares]))


def commit_some(folder: Path, span: tuple[int, int]) -> None:
    ledger = Ledger(Storage(), root_in(folder))
    centres = clusters()
    for number, unit in enumerate(ledger.plans()[0].units[slice(*span)], start=span[0]):
        commit(ledger, unit, embeddings(number, centres)[: unit.num_rows])


def commit(ledger: Ledger, unit: Unit, vectors: np.ndarray) -> None:
    rows = answers(unit.num_rows)
    video_id, uri = names(unit.first, unit.last + 1)
    offsets = np.arange(unit.num_rows + 1, dtype=np.int32) * WIDTH
    columns = {
        "video_id": video_id,
        "uri": uri,
        "row_key": pa.array(unit.keys, pa.string()),
        "status": pa.array(["labelled"] * unit.num_rows),
        "margin": pa.array(np.random.default_rng(unit.first).random(unit.num_rows, np.float32)),
        "embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel())),
    }
    for name, column in columns.items():
        rows = rows.set_column(PREDICTION_SCHEMA.get_field_index(name), PREDICTION_SCHEMA.field(name), column)
    ledger.commit(unit, rows, "r" * 16)


def root_in(folder: Path) -> str:
    return str(folder / "out" / "labelling")


# Steps


def be_command(words: list[str]) -> None:
    """Run a command of kinoray, and say what this process took at most."""
    if code := kinoray(words):
        raise SystemExit(code)
    peak_kib = int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak_bytes": peak_kib * 1024, "cpu_s": used.ru_utime + used.ru_stime}))


def run_command(name: str, embeddings_bytes: int, *words: str) -> dict[str, float]:
    """A command in a process of its own: `s` of CPU, and `peak` in sizes of the embeddings, also printed."""
    begin = time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--command", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wall_s = time.perf_counter() - begin
    *_, said, figures = done.stdout.splitlines()
    peak, cpu_s = (json.loads(figures)[key] for key in ("peak_bytes", "cpu_s"))
    ratio = peak / embeddings_bytes
    print(f"{name:<8}{cpu_s:>8.1f}{wall_s:>9.1f}{peak / 2**20:>10.0f}{ratio:>7.2f}  {said}", flush=True)
    return {"s": cpu_s, "peak": ratio}


def share_found(folder: Path, num_rows: int) -> tuple[float, int]:
    """Of the pairs that a comparison with every row finds for a sample of copies, those that share a group."""
    table = pq.read_table(folder / "found.parquet", columns=["row_key", "group"])
    groups = dict(zip(table["row_key"].to_pylist(), table["group"].to_pylist(), strict=True))
    rows, vectors = Vectors(Storage(), str(folder / "out"), str(folder / "cache")).whole()
    keys = rows["row_key"]
    sample = np.random.default_rng(1).choice(num_rows // UNIT_ROWS, min(SAMPLE, num_rows // UNIT_ROWS), replace=False)
    sample = sample * UNIT_ROWS + UNIT_ROWS - 1
    places, similarities = nearest(vectors, vectors[sample], 8)
    found = total = 0
    for row, others, near in zip(sample.tolist(), places, similarities >= THRESHOLD, strict=True):
        group = groups.get(keys[row].as_py())
        for other in others[near].tolist():
            if other != row:
                total += 1
                found += group is not None and groups.get(keys[other].as_py()) == group
    return found / total, total


def measure(folder: Path, num_rows: int) -> dict[str, float]:
    """All steps on a labelling of so many rows."""
    begin = time.perf_counter()
    make_labelling(folder, num_rows)
    size = num_rows * WIDTH * 2
    print(f"{num_rows:,} rows of {WIDTH}, {size / 2**20:,.0f} MiB, made in {time.perf_counter() - begin:.0f} s")
    print(f"{'':<8}{'CPU s':>8}{'wall s':>9}{'peak MiB':>10}{'ratio':>7}")
    out, cache = str(folder / "out"), ["--cache", str(folder / "cache")]
    like = ["--like", names(num_rows // 2, num_rows // 2 + 1)[0][0].as_py()]
    steps = {
        "first": run_command("first", size, "labels", "search", out, *like, *cache),
        "again": run_command("again", size, "labels", "search", out, *like, *cache),
    }
    target = ["--format", "parquet", "--to", str(folder / "found.parquet")]
    steps["dedup"] = run_command("dedup", size, "labels", "dedup", out, *cache, *target)
    to = ["--budget", "200", "--out", str(folder / "next.csv")]
    steps["select"] = run_command("select", size, "labels", "select", out, *cache, *to)
    found, total = share_found(folder, num_rows)
    print(f"{found:.2%} of {total:,} pairs of a similarity of {THRESHOLD} on are in one group")
    figures = {f"{name} s": round(step["s"], 2) for name, step in steps.items()}
    peak = max(step["peak"] for step in steps.values())
    return figures | {"memory": round(peak, 3), "found": round(found, 4)}


# The curves


def drawn_set(seed: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, float16 [N, 64], and classes: each is some clusters, of which some lie near another class."""
    rng = np.random.default_rng(seed)
    num_modes = rng.integers(2, 7, CLASSES)
    centres = [rng.standard_normal((count, 64)) for count in num_modes]
    frequency = np.geomspace(20, 1, CLASSES)
    classes = rng.choice(CLASSES, num_rows, p=frequency / frequency.sum())
    modes = [centres[label][rng.integers(num_modes[label])] for label in classes]
    return (2 + np.array(modes) + 0.9 * rng.standard_normal((num_rows, 64))).astype(np.float16), classes


def scores_of(train: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Softmax scores of a linear classifier that was trained to the end on a few rows."""
    middle, scale = train.mean(axis=0), train.std() + 1e-6
    x = np.concatenate([(train - middle) / scale, np.ones((len(train), 1))], axis=1)
    wanted = np.eye(CLASSES)[classes]
    weights = np.zeros((x.shape[1], CLASSES))
    velocity = np.zeros_like(weights)
    for _ in range(300):
        step = x.T @ (wanted - softmax(x @ weights)) / len(x) - 1e-3 * weights
        velocity = 0.9 * velocity + step
        weights += 0.2 * velocity
    return softmax(np.concatenate([(rows - middle) / scale, np.ones((len(rows), 1))], axis=1) @ weights)


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logits / logits.sum(axis=1, keepdims=True)


def bought_by(how: str, scores: np.ndarray, pool: np.ndarray, labelled: np.ndarray, seed: int) -> np.ndarray:
    """The next STEP rows of the pool."""
    left = np.setdiff1d(np.arange(len(pool)), labelled)
    if how == "random":
        return np.random.default_rng([seed, len(labelled)]).choice(left, STEP, replace=False)
    first_two = np.sort(scores[left], axis=1)[:, -2:]
    margins = first_two[:, 1] - first_two[:, 0]
    if how == "margin":
        return left[np.argsort(margins, kind="stable")[:STEP]]
    return left[to_label_next(margins, pool[left], STEP, pool[labelled])]


def curve(how: str, seed: int) -> list[float]:
    """Mean recall over classes after each number of BOUGHT."""
    rows, classes = drawn_set(seed, 9000)
    pool, test = rows[:5000], rows[5000:].astype(np.float32)
    labelled = np.random.default_rng(seed).choice(len(pool), STEP, replace=False)
    found = []
    for count in range(STEP, max(BOUGHT) + 1, STEP):
        train = pool[labelled].astype(np.float32), classes[labelled]
        if count in BOUGHT:
            right = scores_of(*train, test).argmax(axis=1) == classes[5000:]
            found.append(float(np.mean([right[classes[5000:] == label].mean() for label in range(CLASSES)])))
        more = bought_by(how, scores_of(*train, pool.astype(np.float32)), pool, labelled, seed)
        labelled = np.concatenate([labelled, more])
    return found


def curves() -> dict[str, list[float]]:
    """Of each way to choose, the mean over draws; also printed."""
    print(f"{'labels bought':<18}" + "".join(f"{count:>7}" for count in BOUGHT))
    found = {}
    for how in ("random", "margin", "labels select"):
        found[how] = np.mean([curve(how, seed) for seed in range(DRAWS)], axis=0).round(3).tolist()
        print(f"{how:<18}" + "".join(f"{value:>7.1%}" for value in found[how]), flush=True)
    return found


def main() -> int:
    """Print the table, pass or miss of each bar and, last, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows")
    parser.add_argument("--rows", type=int, metavar="N")
    parser.add_argument("--curves-only", action="store_true")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="be one command")
    arguments = parser.parse_args()
    if arguments.command:
        be_command(arguments.command)
        return 0
    result: dict[str, Any] = {}
    ok = True
    if not arguments.curves_only:
        num_rows = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
        with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as place:
            figures = measure(Path(place), num_rows)
        if num_rows < ROWS:
            figures["memory"] = 0.0  # a process takes 0.3 GB, whatever it reads
        for name, value in figures.items():
            bar = BARS.get(name)
            is_met = bar is None or (value >= bar if name == "found" else value <= bar)
            result[name] = {"value": value, "bar": f"{'>=' if name == 'found' else '<='} {bar}"} if bar else value
            ok = ok and is_met
    result["curves"] = curves()
    print(json.dumps(result | {"ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
