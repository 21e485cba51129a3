"""What a plan is made of, measured: decoding alone, the model alone, and one whole labelling on Ray.

The two loops run without Ray, with the job's own reader and scorer, and as many decoder processes, threads and clips a
batch. The whole job is timed by its commits: when the first label is there, how fast it goes, what it costs.

What is easy to break: a loop is warm before its clock runs, since starting is the job's business and is measured there.
All figures of the job but the core seconds come from the ledger, so it is run as users run it. Idle time is charged to
the job, since it could have been used; what others use is not: on a machine with nothing else on it the two together
are cores x wall time.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray
import torch

from kinoray.catalog.rows import Refusal, error_of, judge
from kinoray.config.shared import ResourcesConfig
from kinoray.errors import MediaError
from kinoray.label.job import LabelWorker
from kinoray.label.open import Labelling
from kinoray.label.plan import survey
from kinoray.label.read import VideoReader
from kinoray.label.stage import LabelJob, pack_unit
from kinoray.label.times import StageClock
from kinoray.label.verb import run_labelling
from kinoray.network.checkpoint import load_model
from kinoray.network.process import set_up_to_compute
from kinoray.network.scorer import ClipScorer
from kinoray.storage.objects import join
from kinoray.video.frames import Clip
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = [
    "CpuUse",
    "CpuWatch",
    "DecodeLoop",
    "JobFigures",
    "ModelLoop",
    "StartFigures",
    "decode_loop",
    "driver_costs",
    "measure_job",
    "measure_start",
    "model_loop",
]

_KEPT_BYTES = 2**30  # decoded clips that the model loop goes over again and again
_MODEL_S = 10.0


@dataclass(kw_only=True, slots=True)
class DecodeLoop:
    """What reading and decoding some videos took."""

    videos: int = 0
    """All of them, bad ones, too."""
    bad: int = 0
    clips: int = 0
    bytes_read: int = 0
    duration_s: float = 0.0
    """Length of the good ones together."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process and of the decoders."""
    kept: list[Clip] = field(default_factory=list)
    """The first clips, for the model loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoop:
    """What running the network on some clips took, all workers side by side."""

    clips: int
    wall_s: float
    cpu_s: float


def decode_loop(job: LabelJob, rows: pa.Table, num_workers: int, *, keep: int) -> DecodeLoop:
    """Read and decode the rows with the decoders of all workers, and drop the clips, but for the first `keep`.

    Raises:
        KinorayError: none of the videos can be decoded, or the store or this machine fails.
    """
    num_decoders = num_workers * job.num_decoders
    batch_size = num_workers * job.scorer.batch_size
    reader = VideoReader(
        job.storage, job.clip, job.views, StageClock(), num_decoders=num_decoders, batch_size=batch_size
    )
    sandbox = shared_sandbox(num_decoders)
    for _ in reader.videos(rows.slice(0, 2 * num_decoders)):
        pass  # starts the decoders
    loop = DecodeLoop(videos=rows.num_rows)
    last: Refusal | None = None
    cpu_s, begin = time.process_time() + sandbox.cpu_s, time.perf_counter()
    for video in reader.videos(rows):
        if isinstance(video, Refusal):
            loop.bad += 1
            last = video
            continue
        loop.bytes_read += len(video.data)
        loop.duration_s += video.first.info.duration_s or 0.0
        try:
            for part in reader.parts(video):
                for clip in part.clips():
                    loop.clips += 1
                    if len(loop.kept) < keep and _bytes_of(loop.kept) < _KEPT_BYTES:
                        loop.kept.append(clip)
        except MediaError as error:
            loop.bad += 1
            last = judge(error, "decode")
    loop.wall_s = time.perf_counter() - begin
    loop.cpu_s = time.process_time() + sandbox.cpu_s - cpu_s
    if not loop.clips and last is not None:
        raise error_of(last)
    return loop


def _bytes_of(clips: Sequence[Clip]) -> int:
    return sum(clip.frames.nbytes + (0 if clip.flow is None else clip.flow.nbytes) for clip in clips)


def model_loop(job: LabelJob, clips: Sequence[Clip], num_clips: int, num_workers: int) -> ModelLoop:
    """Run the prepared network on the clips over and over, in so many threads side by side as the job has workers.

    Each runs whole batches, at most its share of `num_clips`, and begins none after 10 s. With a GPU there is one
    thread, since each worker has a GPU of its own.

    Raises:
        ModelError, CheckpointError: it cannot be run.
    """
    num_threads = num_workers if job.device == "cpu" else 1
    share = max(1, -(-num_clips // num_threads) // job.scorer.batch_size) * job.scorer.batch_size
    before = torch.get_num_threads()
    set_up_to_compute(job.torch_threads)
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(job.torch_threads,)) as pool:
            # One after the other: folding traces the network, and tracing is not thread-safe.
            scorers = [pool.submit(_warm_scorer, job, clips).result() for _ in range(num_threads)]
            cpu_s, begin = time.process_time(), time.perf_counter()
            running = [pool.submit(_run_clips, scorer, clips, job.scorer.batch_size, share) for scorer in scorers]
            done = sum(future.result() for future in running)
            wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
    finally:
        torch.set_num_threads(before)
    return ModelLoop(clips=done, wall_s=wall_s, cpu_s=cpu_s)


def _warm_scorer(job: LabelJob, clips: Sequence[Clip]) -> ClipScorer[None]:
    """The prepared network, after its first batch, which is slower."""
    model, meta = load_model(job.storage, job.checkpoint, job.allow_factory)
    scorer = ClipScorer[None](model, job.clip, job.scorer, num_classes=len(meta.labels), device=job.device)
    _put(scorer, itertools.islice(itertools.cycle(clips), job.scorer.batch_size))
    return scorer


def _run_clips(scorer: ClipScorer[None], clips: Sequence[Clip], batch_size: int, share: int) -> int:
    """Run whole batches, as many as `share` clips make or as begin in time; the clips that were run."""
    source, end, done = itertools.cycle(clips), time.perf_counter() + _MODEL_S, 0
    while done < share and time.perf_counter() < end:
        _put(scorer, itertools.islice(source, batch_size))
        done += batch_size
    for _ in scorer.flush():  # the last batch may still be under way on a GPU
        pass
    return done


def _put(scorer: ClipScorer[None], clips: Iterable[Clip]) -> None:
    for clip in clips:
        for _ in scorer.put(None, clip):
            pass


_IDLE, _IOWAIT = 3, 4  # fields of a line of /proc/stat
_NUM_FIELDS = 8  # user to steal; guests are in user already


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuUse:
    """Core seconds of this machine between two times."""

    own_s: float
    """Used by this process and its descendants."""
    idle_s: float
    others_s: float
    """Used by others, or kept back by the hypervisor."""

    @property
    def had_s(self) -> float:
        """What was there for this process: used or idle."""
        return self.own_s + self.idle_s

    @property
    def others_share(self) -> float:
        """What others took of all cores."""
        return self.others_s / (self.had_s + self.others_s)


class CpuWatch:
    """A context in which the machine is looked at some times a second; needs Linux."""

    def __init__(self, every_s: float = 0.25) -> None:
        self._every_s, self._done = every_s, threading.Event()
        self._seen: dict[int, float] = {}
        self._samples: list[tuple[float, float, float, float]] = []
        self._thread = threading.Thread(target=self._watch, name="cpu-watch", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def use(self, begin: float, end: float) -> CpuUse:
        """Whose the cores were between two times, in seconds since 1970."""
        times, *columns = np.array(self._samples).T
        own_s, idle_s, all_s = (float(np.diff(np.interp([begin, end], times, column))[0]) for column in columns)
        return CpuUse(own_s=own_s, idle_s=idle_s, others_s=max(0.0, all_s - own_s - idle_s))

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        self._seen |= _cpu_of_family(os.getpid())  # processes that have ended stay in the sum
        self._samples.append((time.time(), sum(self._seen.values()), *_idle_and_all()))


def _idle_and_all() -> tuple[float, float]:
    """Core seconds since the start of the machine, of the cores that this process may use."""
    tick, names = os.sysconf("SC_CLK_TCK"), {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    ours = [[int(field) for field in line[1 : 1 + _NUM_FIELDS]] for line in lines if line[0] in names]
    return sum(line[_IDLE] + line[_IOWAIT] for line in ours) / tick, sum(map(sum, ours)) / tick


def _cpu_of_family(root: int) -> dict[int, float]:
    """CPU seconds by process id."""
    parents, seconds = {}, {}
    tick = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / tick
    family = found = {root}
    while found:
        found = {pid for pid, parent in parents.items() if parent in family} - family
        family = family | found
    return {pid: seconds[pid] for pid in family if pid in seconds}


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFigures:
    """Workers by themselves, as Ray actors that are given one unit each."""

    first_s: float
    """Until the first of them has committed its unit."""
    unit_s: float
    """Of it, labelling that unit."""
    commit_s: float
    """Of that, its commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFigures:
    """A whole labelling."""

    wall_s: float
    first_s: float
    """From its beginning, with Ray running, until the first unit is committed."""
    end_s: float
    """From the last commit to its end."""
    videos_per_s: float
    """Between the commits: without start and end."""
    cpu_s: float
    """CPU seconds a video meanwhile, of all processes: workers, decoders, driver and Ray."""
    core_s: float
    """Core seconds a video that were there for it meanwhile: used by the job, or idle (see CpuWatch)."""
    others_share: float
    """What others took of the cores meanwhile."""


def measure_start(labelling: Labelling, resources: ResourcesConfig) -> StartFigures:
    """Start the job's workers as plain actors, each on a unit of its own. Ray must run.

    Raises:
        KinorayError: what a worker reports.
    """
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(LabelWorker)
    packed = _packed(labelling)[: resources.num_workers]
    begin = time.perf_counter()
    workers = [actor.remote(labelling.job) for _ in packed]
    for worker in workers:
        worker.start.remote()
    answers = [worker.label.remote(unit) for worker, unit in zip(workers, packed, strict=True)]
    first, _ = ray.wait(answers, num_returns=1)
    first_s = time.perf_counter() - begin
    for _, failure in ray.get(answers):
        if failure is not None:
            raise error_of(failure)
    for worker in workers:
        ray.kill(worker)
    counts, _ = ray.get(first[0])
    waited = {name: value for name, value in counts.items() if name.endswith("_s")}  # for each stage
    return StartFigures(first_s=first_s, unit_s=sum(waited.values()), commit_s=waited["commit_s"])


def _packed(labelling: Labelling) -> list[dict[str, Any]]:
    """All units, as they are handed out."""
    return [pack_unit(unit, rows) for unit, rows in labelling.work(labelling.plan.units)]


def measure_job(labelling: Labelling, resources: ResourcesConfig) -> JobFigures:
    """Run the labelling. Ray must run, and nothing of the labelling may be done yet.

    Raises:
        KinorayError: as `run_labelling`.
    """
    ledger, plan, num_workers = labelling.ledger, labelling.plan, resources.num_workers
    with CpuWatch() as watch:
        begin = time.time()
        run_labelling(labelling, resources, "bench", is_kept=False)
        end = time.time()
    parts = ledger.storage.list(join(ledger.root, "parts") + "/")
    times = {info.uri.rpartition("/")[2].removesuffix(".parquet"): info.modified_s for info in parts}
    rows = {unit.unit_id: len(unit.keys) for unit in plan.units}
    order = sorted(times, key=lambda unit_id: times[unit_id])
    first, last = times[order[num_workers - 1]], times[order[-1]]  # from when each worker has done a unit, about
    videos = sum(rows[unit_id] for unit_id in order[num_workers:])
    use = watch.use(first, last)
    return JobFigures(
        wall_s=end - begin,
        first_s=times[order[0]] - begin,
        end_s=end - last,
        videos_per_s=videos / (last - first),
        cpu_s=use.own_s / videos,
        core_s=use.had_s / videos,
        others_share=use.others_share,
    )


def driver_costs(labelling: Labelling) -> tuple[float, float]:
    """Seconds of the driver: a video, to name it and hand it out; a unit, to read it back at the end."""
    begin = time.perf_counter()
    keys = survey(labelling.rows, labelling.scratch.folder).keys
    _packed(labelling)
    plan_s = (time.perf_counter() - begin) / len(keys)
    begin = time.perf_counter()
    labelling.ledger.check(labelling.plan, keys)
    return plan_s, (time.perf_counter() - begin) / len(labelling.plan.units)
