"""A training on Ray: the driver starts workers under Ray Train until the run is over, each worker runs the loop.

The newest whole checkpoint in the run folder is where a run goes on, whatever died: a worker, the controller or this
process. Ray Train's own folder holds nothing that a run needs.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import get_current_placement_group

from kinoray.catalog.table import Catalog
from kinoray.cluster.connect import Lines, connect, quiet_ray, require_fit
from kinoray.cluster.environment import commits
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
from kinoray.storage.objects import arrow_filesystem
from kinoray.train.config import TrainConfig
from kinoray.train.gate import Gate
from kinoray.train.loop import TrainLoop
from kinoray.train.runfolder import EpochRow, RunFolder, run_digest

__all__ = ["TrainJob", "run_workers"]

_FINAL = (
    ConfigError,
    CatalogError,
    CheckpointError,
    ModelError,
    StorageUnavailable,  # every request was made again for storage.retry_s, so another start would wait as long again
    TooManyBad,
    TrainingDiverged,
)


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
    torch.set_num_threads(max(1, int(job.config.resources.cpus_per_worker)))
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
        loop = TrainLoop(job.config, job.catalog_digest, device, say=say, report=report, go_on=go_on)
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
            what = f"the training controller died {config.max_failures - failures_left + 1} times, last with: {error}"
            if not failures_left:
                raise ClusterError(f"{what}; the same command goes on") from error
            print(f"train: {what}; it is started again", flush=True)
    raise AssertionError("max_failures is at least 0")


def _run_controller(folder: RunFolder, config: TrainConfig, catalog: Catalog, gate: Gate | None) -> bool:
    with Lines() as lines, _own_interrupts():
        job = TrainJob(config=config, catalog_digest=catalog.digest, commits=commits(), gate=gate, box=lines.box)
        trainer = _trainer(folder, job, name=f"{run_digest(config, catalog)}-{time.time_ns()}")
        try:
            outcome = trainer.fit().return_value or _Outcome()
        except SystemExit as stop:  # how Ray Train's Ctrl-C handler ends
            raise KeyboardInterrupt from stop
        except TrainingFailedError as error:
            raise _as_ours(error, config) from error
        except ActorDiedError as error:
            lines.free_place()
            raise _ControllerDied(_first_line(error)) from error
        except RayError as error:
            raise ClusterError(f"training ended: {_first_line(error)}; the same command goes on") from error
    if outcome.error is not None:
        raise outcome.error
    return bool(outcome.stopped)


def _trainer(folder: RunFolder, job: TrainJob, name: str) -> TorchTrainer:
    """`name` must be new for each start: Ray Train would go on from its own snapshot, not from ours."""
    resources = job.config.resources
    filesystem, path = arrow_filesystem(job.config.storage, folder.ray_uri)
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
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
    print(error, file=sys.stderr, flush=True)  # with tracebacks: it is most likely in the user's own network
    reasons = [f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}" for rank, cause in causes.items()]
    return JobError(
        f"training failed {config.max_failures + 1} times, last with {'; '.join(reasons) or _first_line(error)}; "
        "the same command goes on from the newest checkpoint"
    )
