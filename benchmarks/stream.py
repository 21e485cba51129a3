"""What the way from shards to results costs beyond decoding: `python benchmarks/stream.py [--quick]`.

Clips of 10 s at 340 x 256 in shards on this machine's disk, 16 segments x 6 frames. Four questions, one table:

read path    `read_videos` (ranges, threads, checksums), sampling, decoding and flow, beside a bare loop that opens the
             shard, reads the member and makes the same calls. CPU seconds; bar 1.08.
two decoders two threads, and two decoder processes of the sandbox, beside one. Clips per second; bar 1.8.
Ray job      `python jobs/label.py` for two minutes with a model of nearly no work, beside two bare loops side by side
             (read, decode, batch, model, one table at the end) on as many clips, half of them before and half after
             the job. Clips per CPU second of everything that the command started, imports and Ray included; bar 0.90.
flat memory  a decoder process after 3,000 videos beside itself after 300 (bar 1.05), and the object store at its
             fullest in the tenths of a stream: those of its second half beside those of its first (bar 1.1). Tenths,
             since the largest of ten times as many looks is larger by chance.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from torch import Tensor, nn

from kinoray.capacity.job import CpuWatch
from kinoray.catalog.table import Catalog, load_catalog, read_videos, references, save_catalog
from kinoray.cluster.connect import WORKER_ENV, disconnect, quiet_ray
from kinoray.config.shared import ClipConfig, ModelConfig, ResourcesConfig, SampleConfig, StorageConfig
from kinoray.network.batch import collate, model_inputs
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, load_model, save_checkpoint
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage
from kinoray.train.decoding import DecodeTask
from kinoray.train.input import rank_steps, stream
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled
from kinoray.video.sandbox.pool import Sandbox
from sandbox import film

ROOT = Path(__file__).resolve().parents[1]
BARS = {"read path": 1.08, "decoders": 1.8, "ray": 0.90, "decoder memory": 1.05, "object store": 1.1}
DENSE = ClipConfig(sample=SampleConfig(num_segments=16, frames_per_segment=6))
SPARSE = ClipConfig(sample=SampleConfig(num_segments=8, frames_per_segment=1))
LABELS = ("one", "two")
FACTORY = "stream:mean_colour"
BATCH = 8
STORE_MB = 512
LOCAL = Storage(StorageConfig())


class Spec:
    """What the platform asks of a network."""

    rgb, flow_channels, num_segments, frames_per_segment, crop_px = True, 0, None, None, None
    rgb_mean, rgb_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class MeanColour(nn.Module):
    """A linear classifier of the mean colour: nearly no work beside decoding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.input_spec = Spec()
        self.classify = nn.Linear(3, num_classes)

    def forward(self, *, rgb: Tensor, flow: Tensor | None) -> Tensor:
        logits: Tensor = self.classify(rgb.mean(dim=(1, 2, 4, 5)))
        return logits


def mean_colour(num_classes: int) -> MeanColour:
    """The factory that the checkpoint names."""
    return MeanColour(num_classes)


def make_set(folder: Path, num_videos: int) -> str:
    """A packed set with two classes."""
    for number in range(num_videos):
        path = folder / "videos" / LABELS[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(film(number, 250))
    resources = ResourcesConfig(num_workers=1)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "set"), shard_mb=2, resources=resources))
    disconnect()
    return str(folder / "set")


def repeated(catalog: Catalog, num_rows: int) -> Catalog:
    """The catalog's videos over and over, each row a video of its own."""
    table = catalog.table.take(pa.array(np.arange(num_rows) % len(catalog)))
    ids = pa.array([f"{number:06d}" for number in range(num_rows)])
    return Catalog(table.set_column(0, table.schema.field(0), ids), catalog.labels)


def bare_bytes(catalog: Catalog) -> Iterator[bytes]:
    """Open, seek, read: no checksum, nothing ahead."""
    for row in catalog.table.select(["uri", "offset", "length"]).to_pylist():
        with open(row["uri"], "rb") as shard:
            shard.seek(row["offset"])
            yield shard.read(row["length"])


def decode_all(videos: Iterator[Any]) -> None:
    """Decode with flow into one batch array, as a consumer would."""
    batch: dict[str, np.ndarray] = {}

    def empty(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        return batch.setdefault(name, np.zeros(shape, dtype))

    for data in videos:
        decode(data, Sampled(), DENSE, empty=empty).clip()


def read_path(catalog: Catalog, rounds: int) -> float:
    """Median over rounds of CPU seconds, ours / bare."""
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: read_videos(LOCAL, references(catalog.table)),
        "bare": lambda: bare_bytes(catalog),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first is for warming up
        for name in list(ways) if number % 2 else list(reversed(ways)):
            begin = time.process_time()
            decode_all(ways[name]())
            if number:
                times[name].append(time.process_time() - begin)
    return statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))


def two_decoders(decode: Callable[[bytes], Clip], videos: list[bytes], rounds: int) -> float:
    """Median over rounds of clips per second, two threads / one."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds + 1):
        for threads in (1, 2) if number % 2 else (2, 1):
            with ThreadPoolExecutor(threads) as pool:
                begin = time.perf_counter()
                for clip in pool.map(decode, videos):
                    del clip
                if number:
                    rates[threads].append(len(videos) / (time.perf_counter() - begin))
    return statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))


def bare_job(catalog_uri: str, checkpoint: str, out: str) -> None:
    """What the labelling job does, as a script of one process would: one video after the other, batches of 8."""
    torch.set_num_threads(1)
    catalog = load_catalog(LOCAL, catalog_uri)
    model, meta = load_model(LOCAL, checkpoint, [FACTORY])
    scores, clips = [], []
    for data in bare_bytes(catalog):
        clips.append(decode(data, Sampled(), meta.clip.without_flow()).clip())
        if len(clips) == BATCH or len(scores) * BATCH + len(clips) == len(catalog):
            with torch.inference_mode():
                logits = model(**model_inputs(collate(clips), model.input_spec, "cpu"))
            scores.append(logits.softmax(dim=1).numpy())
            clips = []
    best = np.concatenate(scores)
    columns = {"video_id": catalog.table.column("video_id"), "id": best.argmax(axis=1), "score": best.max(axis=1)}
    pq.write_table(pa.table(columns), out)


@contextmanager
def adopting() -> Iterator[None]:
    """Processes that outlive their parent become children of this one, so that their CPU time can be counted."""
    libc, set_child_subreaper = ctypes.CDLL(None, use_errno=True), 36
    if libc.prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def children() -> set[int]:
    """Ids of this process's children."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has just ended
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(pid))
    return found


def cost(commands: list[list[str]]) -> tuple[float, float]:
    """CPU seconds of these commands side by side, with all that they started, and wall seconds.

    Processes are looked at ten times a second: a raylet ignores SIGCHLD, so the kernel counts its workers nowhere.

    Raises:
        RuntimeError: one failed.
    """
    before = children()
    with CpuWatch(every_s=0.1) as watch:
        begin_s, here_s = time.time(), time.process_time()
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
        for process in running:
            output, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{' '.join(process.args)} failed:\n{output.decode()}")  # type: ignore[arg-type]
        wall_s = time.time() - begin_s
        while left := children() - before:  # those before them, such as who clears scratch folders, stay
            for pid in left:
                os.waitpid(pid, 0)
        end_s, here_s = time.time(), time.process_time() - here_s
    return watch.use(begin_s, end_s).own_s - here_s, wall_s


def ray_job(folder: Path, catalog: Catalog, seconds: float, clip_s: float) -> tuple[float, float, int]:
    """(clips per CPU second of the job / of the bare loops, wall seconds of the job, clips)."""
    num_clips = max(4 * BATCH, round(2 * seconds / clip_s / (4 * BATCH)) * 4 * BATCH)
    model = ModelConfig(factory=FACTORY)
    meta = CheckpointMeta(model=model, clip=DENSE, labels=LABELS, epoch=1, step=1, samples=1)
    checkpoint = str(folder / "checkpoint")
    save_checkpoint(LOCAL, checkpoint, model_state=build_model(model, len(LABELS)).state_dict(), meta=meta)
    whole, quarter = str(folder / "whole.parquet"), str(folder / "quarter.parquet")
    save_catalog(LOCAL, whole, repeated(catalog, num_clips))
    save_catalog(LOCAL, quarter, repeated(catalog, num_clips // 4))
    bare = [
        [sys.executable, __file__, "--bare", quarter, checkpoint, str(folder / f"bare-{side}.parquet")]
        for side in ("left", "right")
    ]
    job = [sys.executable, str(ROOT / "jobs" / "label.py"), whole, "--checkpoint", checkpoint]
    job += ["--out", str(folder / "labels"), "--allow-factory", FACTORY]
    job += ["--workers", "1", "--resources.decoders-per-worker", "2"]
    with adopting():
        first, _ = cost(bare)
        job_s, wall_s = cost([job])
        second, _ = cost(bare)
    return (first + second) / job_s, wall_s, num_clips


def resident_mb(pid: int) -> float:
    """MiB of a process in memory, what it shares with others included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def decoder_memory(videos: list[bytes], count: int) -> tuple[float, float]:
    """MiB of a decoder process after a tenth of `count` videos, and after all of them."""
    with Sandbox(1) as sandbox:
        sizes = []
        for number in range(count):
            sandbox.decode(videos[number % len(videos)], Sampled(), SPARSE.without_flow()).clip()
            if number + 1 in (count // 10, count):
                sizes.append(resident_mb(*sandbox.pids()))
    return sizes[0], sizes[1]


def fullest_store(catalog: Catalog, num_rows: int) -> list[float]:
    """MiB of the object store at its fullest in each tenth of a training stream of so many rows, slowly consumed."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    fullest, done, tenth = [0.0] * 10, threading.Event(), 0

    def watch() -> None:
        while not done.wait(0.2):
            used = get_memory_info_reply(state).store_stats.object_store_bytes_used / 2**20
            fullest[tenth] = max(fullest[tenth], used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        steps = rank_steps(np.arange(num_rows), batch_size=BATCH, rank=0, world_size=1)
        task = DecodeTask(storage=LOCAL, clip=SPARSE.without_flow())
        for number, _ in enumerate(stream(repeated(catalog, num_rows), steps, task, decode_tasks=2, world_size=1)):
            tenth = 10 * number // len(steps)
            time.sleep(0.02 * BATCH)  # a model that is slower than two decoders, so that clips pile up
    finally:
        done.set()
        watcher.join()
    return fullest


def start_small_ray() -> None:
    """A Ray whose object store is soon full."""
    settings = {"object_store_memory": STORE_MB * 2**20, "include_dashboard": False, "log_to_driver": False}
    quiet_ray()
    ray.init(address="local", num_cpus=4, runtime_env={"env_vars": WORKER_ENV}, logging_level="ERROR", **settings)


def measure(folder: Path, quick: bool) -> dict[str, dict[str, object]]:
    """All figures beside their bars; prints the table."""
    rounds, job_s, num_decoded, rows = (2, 20.0, 300, 150) if quick else (7, 120.0, 3000, 600)
    result: dict[str, dict[str, object]] = {}

    def note(name: str, value: float, kind: str, sign: str, detail: str) -> None:
        result[name] = {"value": round(value, 3), "bar": f"{sign} {BARS[kind]}"}
        print(f"{name:<48}{value:>8.3f}   {detail}", flush=True)

    catalog = load_catalog(LOCAL, make_set(folder, 16))
    videos = list(bare_bytes(catalog))
    begin = time.process_time()
    decode_all(iter(videos))
    print(
        f"{len(videos)} clips of 10 s, 340 x 256, {sum(map(len, videos)) / len(videos) / 1e3:.0f} kB each; with flow "
    )
    print(f"a clip of 16 x 6 takes {1e3 * (time.process_time() - begin) / len(videos):.0f} CPU ms")
    note("read path / bare loop, RGB and flow", read_path(catalog, rounds), "read path", "<=", "CPU seconds")
    threads = two_decoders(lambda data: decode(data, Sampled(), DENSE.without_flow()).clip(), videos, rounds)
    note("two decoder threads / one", threads, "decoders", ">=", "clips per second")
    with Sandbox(2) as sandbox:
        children = two_decoders(
            lambda data: sandbox.decode(data, Sampled(), DENSE.without_flow()).clip(), videos, rounds
        )
    note("two decoder processes / one", children, "decoders", ">=", "clips per second")
    begin = time.process_time()
    for data in videos:
        decode(data, Sampled(), DENSE.without_flow()).clip()
    clip_s = 1.5 * (time.process_time() - begin) / len(videos)  # and the batch and the model, about
    ratio, wall_s, num_clips = ray_job(folder, catalog, job_s, clip_s)
    note("Ray job / bare loops", ratio, "ray", ">=", f"clips per CPU second; {num_clips} clips, job {wall_s:.0f} s")
    early, late = decoder_memory(videos, num_decoded)
    detail = f"{early:.0f} and {late:.0f} MiB after {num_decoded // 10} and {num_decoded} videos"
    note("decoder's memory, late / early", late / early, "decoder memory", "<=", detail)
    start_small_ray()
    tenths = fullest_store(catalog, 10 * rows)
    disconnect()
    early, late = statistics.median(tenths[:5]), statistics.median(tenths[5:])
    detail = (
        f"medians of tenths: {early:.0f} and {late:.0f}, most {max(tenths):.0f} MiB of {STORE_MB}; {10 * rows} rows"
    )
    note("object store's fullest, late / early", late / early, "object store", "<=", detail)
    return result


def main() -> int:
    """Print the table and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a job of 20 s, 300 videos, 2 rounds")
    parser.add_argument("--bare", nargs=3, metavar=("CATALOG", "CHECKPOINT", "OUT"), help="be the bare loop")
    arguments = parser.parse_args()
    if arguments.bare:
        bare_job(*arguments.bare)
        return 0
    path = [str(ROOT / name) for name in ("platform", "models", "benchmarks")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # workers import the network above
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        result = measure(Path(folder), arguments.quick)
    ok = all(
        figure["value"] <= float(bar[3:]) if bar.startswith("<=") else figure["value"] >= float(bar[3:])
        for figure in result.values()
        for bar in [str(figure["bar"])]
    )
    print(json.dumps({**result, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
