"""A training on Ray: the driver starts workers under Ray Train until the run is over, each worker runs the loop.

The newest whole checkpoint in the run folder is where a run goes on, whatever died: a worker, the controller or this
process. Ray Train's own folder holds nothing that a run needs.

Trials of a sweep are watched: one Desk serves all of them. It belongs to the process that made it, so it outlives a
trial's process, and can say what a trial that died has left behind. Easy to break: a run that is no longer watched must
end, not wait for ever.
"""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray._raylet import PlacementGroupID
from ray.exceptions import ActorDiedError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from kinoray.catalog.table import Catalog
from kinoray.cluster.connect import OUT_OF_MEMORY, connect, loss_of, quiet_ray, require_fit
from kinoray.cluster.lines import Lines, Teller, beside_me
from kinoray.console import Progress, many
from kinoray.errors import (
    CatalogError,
    CheckpointError,
    ClusterError,
    ConfigError,
    JobError,
    KinorayError,
    ModelError,
    StorageUnavailable,
    TooManyBad,
    TrainingDiverged,
)
from kinoray.network.process import set_up_to_compute
from kinoray.storage.objects import arrow_filesystem
from kinoray.train.config import TrainConfig
from kinoray.train.loop import TrainLoop
from kinoray.train.recorder import commits
from kinoray.train.runfolder import EpochRow, RunFolder, run_digest

__all__ = ["Desk", "Gate", "TrainJob", "open_desk", "run_workers"]

_FINAL = (
    ConfigError,
    CatalogError,
    CheckpointError,
    ModelError,
    StorageUnavailable,  # every request was made again for storage.retry_s, so another start would wait as long again
    TooManyBad,
    TrainingDiverged,
)


# Between a run and who watches it: after each epoch the run shows its row and waits to hear if it goes on


class _Run:
    """One run: the row that waits for a verdict, and the placement group of the run's workers."""

    def __init__(self) -> None:
        self.rows: asyncio.Queue[EpochRow | None] = asyncio.Queue()
        self.verdict: asyncio.Future[bool] | None = None
        self.stopping = False
        self.group = ""


class Desk:
    """The actor behind gates; see Gate for what its methods are for."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    async def take_over(self, name: str) -> str:
        """A new watcher: what the last one left ends. Returns the placement group of its workers, or ""."""
        last = self._runs.pop(name, None)
        if last is None:
            return ""
        self._answer(last, False)
        return last.group

    async def begin(self, name: str) -> None:
        """A run starts that shows its rows under this name."""
        self._runs[name] = _Run()

    async def attach(self, name: str, group: str) -> None:
        """The workers of the run live in this placement group."""
        self._runs[name].group = group

    async def ask(self, name: str, row: EpochRow) -> bool:
        """Show a row; returns, once the watcher has decided, whether to go on."""
        run = self._runs[name]
        if run.stopping:
            return False
        run.verdict = asyncio.get_running_loop().create_future()
        run.rows.put_nowait(row)
        return await run.verdict

    async def take(self, name: str) -> EpochRow | None:
        """The next row, once there is one; None after `end`."""
        return await self._runs[name].rows.get()

    async def answer(self, name: str, go_on: bool) -> None:
        """Let the run go on from the row that was taken last, or end it there or at its next row."""
        run = self._runs[name]
        run.stopping = run.stopping or not go_on
        self._answer(run, go_on)

    async def end(self, name: str) -> None:
        """The run is over, however it ended."""
        self._runs[name].group = ""
        self._runs[name].rows.put_nowait(None)

    def _answer(self, run: _Run, go_on: bool) -> None:
        if run.verdict is not None and not run.verdict.done():
            run.verdict.set_result(go_on)


def open_desk() -> Any:
    """An actor handle of a Desk that ends with this process."""
    # Every run may wait in `ask` and its watcher in `take`.
    return beside_me(Desk, max_concurrency=10_000).remote()


@dataclass(frozen=True, slots=True)
class Gate:
    """A run's way to a Desk; small, and picklable to the workers."""

    desk: Any
    name: str

    def take_over(self) -> None:
        """Watch from now on. Workers of a watcher that died lose their place: Ray keeps it until the whole job ends."""
        group = ray.get(self.desk.take_over.remote(self.name))
        if group:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))

    def begin(self) -> None:
        """A run is about to start."""
        ray.get(self.desk.begin.remote(self.name))

    def attach(self) -> None:
        """Called by a worker: remember the placement group that it runs in."""
        group = get_current_placement_group()
        if group is not None:
            ray.get(self.desk.attach.remote(self.name, group.id.hex()))

    def go_on(self, row: EpochRow) -> bool:
        """Called by a worker after an epoch, with its row: whether to train another."""
        return bool(ray.get(self.desk.ask.remote(self.name, row)))

    def take(self) -> EpochRow | None:
        """Wait for the next epoch's row; None when the run is over."""
        row: EpochRow | None = ray.get(self.desk.take.remote(self.name))
        return row

    def answer(self, go_on: bool) -> None:
        """Let the run train on, or end it after the epoch it is in."""
        ray.get(self.desk.answer.remote(self.name, go_on))

    def end(self) -> None:
        """The run is over."""
        ray.get(self.desk.end.remote(self.name))


# The job


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What goes to every worker."""

    config: TrainConfig
    catalog_digest: str
    """Of the catalog that the driver has checked."""
    commits: Mapping[str, str]
    """Of the driver's code."""
    gate: Gate | None
    """Who decides after each epoch whether the run goes on."""
    box: Any
    """Where lines for the driver go: an actor handle, see kinoray.cluster.connect."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How the workers ended, all alike."""

    stopped: bool = False
    """By the gate, before the last epoch."""
    error: KinorayError | None = None
    """What another try would meet again: for an error that is raised, Ray Train would start the workers over."""


# On a worker


def _work(settings: Mapping[str, TrainJob]) -> _Outcome:
    """Train to the end, from the newest whole checkpoint on."""
    job = settings["job"]
    quiet_ray()
    set_up_to_compute(max(1, int(job.config.resources.cpus_per_worker)))
    is_first = dist.get_rank() == 0
    place = get_current_placement_group()
    if is_first and place is not None:
        ray.get(job.box.settle.remote(place.id.hex()))
    if is_first and job.gate is not None:
        job.gate.attach()

    def say(line: str) -> None:
        job.box.post.remote(line)

    def report(row: EpochRow) -> None:
        ray.train.report(row.record())

    try:
        device = ray.train.torch.get_device()
        go_on = None if job.gate is None else job.gate.go_on
        saw = partial(Teller(job.box, 1), "steps")
        loop = TrainLoop(job.config, job.catalog_digest, device, say=say, saw=saw, report=report, go_on=go_on)
        loop.note_start(job.commits)
        return _Outcome(stopped=not loop.run())
    except _FINAL as error:
        return _Outcome(error=error)


# In the driver


class _ControllerDied(Exception):
    """Ray Train's controller was killed; Ray does not start it again."""


def run_workers(folder: RunFolder, config: TrainConfig, catalog: Catalog, gate: Gate | None) -> bool:
    """Run the workers to the end of the run, under as many controllers as it takes; whether the gate ended it.

    Raises:
        ClusterError: the job does not fit the cluster, or controllers died more than max_failures times.
        JobError: workers failed more than max_failures times.
        KinorayError: what ended the run on all ranks.
    """
    connect(config.resources)
    require_fit(config.resources, decode_cpus=config.resources.decode_tasks)
    for failures_left in range(config.max_failures, -1, -1):
        try:
            return _run_controller(folder, config, catalog, gate)
        except _ControllerDied as error:
            times = many(config.max_failures - failures_left + 1, "time")
            what = f"the training controller died {times}, last with: {error}"
            if not failures_left:
                raise ClusterError(f"{what}; the same command goes on") from error
            print(f"train: {what}; it is started again", flush=True)
    raise AssertionError("max_failures is at least 0")


def _run_controller(folder: RunFolder, config: TrainConfig, catalog: Catalog, gate: Gate | None) -> bool:
    num_steps = -(-len(catalog.select(config.split)) // config.optim.batch_size) * config.optim.epochs
    progress = Progress(num_steps, "train", "steps", is_for_eyes=True)
    with Lines(progress) as lines, _own_interrupts():
        job = TrainJob(config=config, catalog_digest=catalog.digest, commits=commits(), gate=gate, box=lines.box)
        print(f"train: starting {many(config.resources.num_workers, 'worker')}", flush=True)
        trainer = _trainer(folder, job, name=f"{run_digest(config, catalog)}-{time.time_ns()}")
        try:
            outcome = trainer.fit().return_value or _Outcome()
        except SystemExit as stop:  # how Ray Train's Ctrl-C handler ends
            raise KeyboardInterrupt from stop
        except TrainingFailedError as error:
            raise _as_ours(error, config) from error
        except ActorDiedError as error:
            lines.free_place()
            raise _ControllerDied(_loss(error)) from error
        except RayError as error:
            raise ClusterError(f"training ended: {_loss(error)}; the same command goes on") from error
    if outcome.error is not None:
        raise outcome.error
    return bool(outcome.stopped)


class _Trainer(TorchTrainer):  # type: ignore[misc]  # ray is not typed
    """Without Ray Train's own cleaner of placement groups, for which there is Lines.free_place.

    It is one more process, and asks the dashboard: where there is none, as in a Ray that is started here, each training
    would wait 12 s at its end for an answer.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        return [callback for callback in every if not isinstance(callback, PlacementGroupCleanerCallback)]


def _trainer(folder: RunFolder, job: TrainJob, name: str) -> TorchTrainer:
    """`name` must be new for each start: Ray Train would go on from its own snapshot, not from ours."""
    resources = job.config.resources
    filesystem, path = arrow_filesystem(job.config.storage, folder.ray_uri)
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return _Trainer(
        _work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Put this process's Ctrl-C handler back afterwards: Ray Train's own would end later work of this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _loss(error: BaseException) -> str:
    """Why workers or their controller were lost, and what helps."""
    lost = loss_of(error)
    remedy = ": lower optim.batch_size, resources.num_workers or what a clip holds (--preset small is for one machine)"
    return lost + remedy if lost == OUT_OF_MEMORY else lost


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _as_ours(error: TrainingFailedError, config: TrainConfig) -> KinorayError:
    """The failure that ended the run as one line; an error of ours keeps its class."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    # Ray Train wraps what a worker raised, to carry the traceback, and gives no public way to the exception itself.
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, KinorayError):
            return cause
    lost = _loss(error)
    if OUT_OF_MEMORY in lost:
        return JobError(f"training failed: {lost}; the same command goes on from the newest checkpoint")
    print(error, file=sys.stderr, flush=True)  # with tracebacks: it is most likely in the user's own network
    if not causes:  # it was Ray Train's own part, which is not tried again
        return JobError(
            f"training failed: {lost}; the same command goes on from the newest checkpoint, if there is one"
        )
    reasons = "; ".join(f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}" for rank, cause in causes.items())
    return JobError(
        f"training failed {many(config.max_failures + 1, 'time')}, last with {reasons}; the same command goes on from "
        "the newest checkpoint"
    )
