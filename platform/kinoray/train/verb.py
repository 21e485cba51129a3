"""`kinoray train`: check everything that can be checked without a cluster, then run the workers under Ray Train.

The newest whole checkpoint in the run folder is where a run goes on, whatever died: a worker, the controller or this
process. Ray Train's own folder, OUT/ray, holds nothing that a run needs.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from kinoray import errors
from kinoray.catalog.table import Catalog, load_catalog
from kinoray.cluster.connect import connect, require_fit
from kinoray.cluster.environment import commits
from kinoray.cluster.lines import Lines
from kinoray.config.shared import require
from kinoray.console import format_duration
from kinoray.errors import CatalogError, ClusterError, ConfigError, JobError, KinorayError
from kinoray.network.batch import FLOW_CHANNELS
from kinoray.network.build import build_model, check_clip, require_known_model, without_start_weights
from kinoray.network.checkpoint import CheckpointMeta, best_of, list_checkpoints, newest_checkpoint
from kinoray.storage.objects import Storage, absolute, arrow_filesystem, join
from kinoray.train.config import TrainConfig
from kinoray.train.curves import draw_curves
from kinoray.train.gate import Gate
from kinoray.train.heartbeat import Heartbeat
from kinoray.train.loop import worker_loop
from kinoray.train.runfolder import claim_run, read_metrics, run_digest, stopped_early
from kinoray.train.state import start_from

__all__ = ["check_training", "train"]


def train(config: TrainConfig, gate: Gate | None = None) -> dict[str, Any]:
    """Train to the last epoch, or go on with the run that is in config.out; returns its totals.

    A gate is shown each epoch's row and may end the run there: the totals are then those so far.

    Raises:
        ConfigError: a setting is wrong, or config.out holds a run with other settings.
        CatalogError: the catalog lacks the split, or labels in it.
        ClusterError: the job does not fit the cluster.
        TooManyBad: more than max_bad_fraction of the training videos could not be read.
        TrainingDiverged: the loss is no longer a number.
        JobError: workers failed more than max_failures times.
        StorageError, CheckpointError: as named.
    """
    start_s = time.monotonic()
    init_from = absolute(config.init_from) if config.init_from else ""
    config = replace(config, catalog=absolute(config.catalog), out=absolute(config.out), init_from=init_from)
    storage = Storage(config.storage)
    require_known_model(config.model)  # before anything is read: a wrong name is the first thing to say
    catalog = load_catalog(storage, config.catalog)
    num_train, num_val = check_training(config, catalog)
    broken: list[str] = []
    newest = newest_checkpoint(storage, config.out, warn=broken.append)
    if init_from and newest is None:
        _check_start(storage, config, catalog)
    claim_run(storage, config, catalog)
    if newest is None or not _is_finished(storage, config, newest):
        sizes = f"{num_train} videos, {num_val} to score, {len(catalog.labels)} classes"
        print(f"train: {sizes}, {config.optim.epochs} epochs, to {config.out}", flush=True)
        newest = _train_on(storage, config, catalog, gate)  # its first worker says what is broken
    else:
        for line in broken:
            print(f"train: {line}")
        print(f"train: {config.out} is finished ({newest[1].epoch} epochs); nothing is left to do", flush=True)
    return _result(storage, config, newest, time.monotonic() - start_s)


def _train_on(storage: Storage, config: TrainConfig, catalog: Catalog, gate: Gate | None) -> tuple[str, CheckpointMeta]:
    """Run the workers, keep status.json true meanwhile, draw the curves; the newest checkpoint then."""
    with Heartbeat(storage, config.out) as heart:
        stopped = _run_workers(config, catalog, gate)
        found = list_checkpoints(storage, config.out)
        heart.stopped = not found or not _is_finished(storage, config, found[-1])
        draw_curves(storage, config.out)
        if heart.stopped and not stopped:  # Ray Train ends a run on Ctrl-C without an error
            done = f"{found[-1][1].epoch if found else 0} of {config.optim.epochs} epochs"
            raise JobError(f"training was stopped after {done}; the same command goes on")
    return found[-1]


def _is_finished(storage: Storage, config: TrainConfig, newest: tuple[str, CheckpointMeta]) -> bool:
    """Whether the last epoch is done, or the one after which patience was out."""
    epoch = newest[1].epoch
    if epoch >= config.optim.epochs:
        return True
    return stopped_early([row for row in read_metrics(storage, config.out) if row["epoch"] <= epoch], config)


def _check_start(storage: Storage, config: TrainConfig, catalog: Catalog) -> None:
    """Try init_from here, where what does not fit is one clear line and not a dead worker group."""
    known = without_start_weights(config.model)
    model = build_model(known, len(catalog.labels))
    start_from(storage, config.init_from, model, known, catalog.labels)


def check_training(config: TrainConfig, catalog: Catalog) -> tuple[int, int]:
    """Check all that can be checked without a cluster; how many videos are to train on and to score.

    Raises:
        ConfigError: the network is unknown or refuses its options, or the clip.
        CatalogError: the catalog lacks a split, or labels in it.
    """
    require_known_model(config.model)
    sizes = _check_splits(config, catalog)
    _check_model(config, catalog)
    return sizes


def _check_splits(config: TrainConfig, catalog: Catalog) -> tuple[int, int]:
    """Sizes of both splits; every video of them must have a label."""
    counts = []
    for name, split in (("split", config.split), ("val_split", config.val_split)):
        if name == "val_split" and not split:
            counts.append(0)
            continue
        try:
            part = catalog.select(split)
        except CatalogError as error:
            hint = '; val_split "" trains without scoring' if name == "val_split" else ""
            raise CatalogError(f"{config.catalog}: {error} ({name} is {split!r}{hint})") from error
        unlabelled = part.table.column("label_id").null_count
        if unlabelled:
            raise CatalogError(
                f"{config.catalog}: {unlabelled} of {len(part)} videos of {name} {split!r} have no label; pack class "
                "folders or a CSV with labels, or choose another split"
            )
        counts.append(len(part))
    return counts[0], counts[1]


def _check_model(config: TrainConfig, catalog: Catalog) -> None:
    """Build the network once, here, where a wrong option is one clear line and not a dead worker group."""
    spec = build_model(config.model, len(catalog.labels)).input_spec
    check_clip(spec, config.clip)
    changes_colours = config.augment.changes_colours
    require(spec.rgb or not changes_colours, "augment", "without colours for a network that sees flow only", "some")
    if spec.flow_channels not in (0, FLOW_CHANNELS):
        raise ConfigError(
            f"model.options: the network wants {spec.flow_channels} flow channels, but decoding gives {FLOW_CHANNELS}"
        )


class _ControllerDied(Exception):
    """Ray Train's controller was killed; Ray does not start it again."""


def _run_workers(config: TrainConfig, catalog: Catalog, gate: Gate | None) -> bool:
    """Run the workers to the end of the run, under as many controllers as it takes; whether the gate ended it."""
    connect(config.resources)
    require_fit(config.resources, decode_cpus=config.resources.decode_tasks)
    for failures_left in range(config.max_failures, -1, -1):
        try:
            return _run_controller(config, catalog, gate)
        except _ControllerDied as error:
            what = f"the training controller died {config.max_failures - failures_left + 1} times, last with: {error}"
            if not failures_left:
                raise ClusterError(f"{what}; the same command goes on") from error
            print(f"train: {what}; it is started again", flush=True)
    raise AssertionError("max_failures is at least 0")


def _run_controller(config: TrainConfig, catalog: Catalog, gate: Gate | None) -> bool:
    resources = config.resources
    job = {"config": config, "catalog_digest": catalog.digest, "commits": commits(), "gate": gate}
    filesystem, path = arrow_filesystem(config.storage, join(config.out, "ray"))
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    with Lines() as lines, _own_interrupts():
        trainer = TorchTrainer(
            worker_loop,
            train_loop_config=job | {"box": lines.box},
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=per_worker,
            ),
            run_config=RunConfig(
                # A name of its own for each start: Ray Train would go on from its own snapshot, not from ours.
                name=f"{run_digest(config, catalog)}-{time.time_ns()}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=config.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            outcome = trainer.fit().return_value or {}
        except SystemExit as stop:  # how Ray Train's Ctrl-C handler ends
            raise KeyboardInterrupt from stop
        except TrainingFailedError as error:
            raise _as_ours(error, config) from error
        except ActorDiedError as error:
            lines.free_place()
            raise _ControllerDied(_first_line(error)) from error
        except RayError as error:
            raise ClusterError(f"training ended: {_first_line(error)}; the same command goes on") from error
    if "error_class" in outcome:
        raise getattr(errors, outcome["error_class"])(outcome["error_text"])
    return "stopped" in outcome


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


def _result(storage: Storage, config: TrainConfig, last: tuple[str, CheckpointMeta], took_s: float) -> dict[str, Any]:
    """Totals of the run, printed and returned."""
    newest_uri, newest = last
    best_uri, best = best_of(list_checkpoints(storage, config.out))
    rows = read_metrics(storage, config.out)
    totals: dict[str, Any] = {
        "run": config.out,
        "epochs": newest.epoch,
        "steps": newest.step,
        "samples": newest.samples,
        "unreadable": int(newest.metrics.get("unreadable", 0)),
        "newest": newest_uri,
        "best": best_uri,
        "best_epoch": best.epoch,
        "loss": newest.metrics.get("loss"),
        "val_top1": best.metrics.get("val_top1"),
        "val_top5": best.metrics.get("val_top5"),
        "metrics": rows,
        "took_s": took_s,
    }
    scored = f", val top-1 {totals['val_top1']:.3f}" if totals["val_top1"] is not None else ""
    print(
        f"train: {newest.epoch} epochs, {newest.step} steps, {newest.samples} samples in {format_duration(took_s)}; "
        f"unreadable {totals['unreadable']}; best is epoch {best.epoch}{scored}: {best_uri}",
        flush=True,
    )
    return totals
