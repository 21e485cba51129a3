"""The Ray tasks of a pack: one for each unit that is not done yet, num_workers at a time.

What is easy to break: replacements are packed before all else, so that what they replace is the same whichever task
ends first.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kinoray.cluster.connect import connect, loss_of, require_fit
from kinoray.cluster.lines import Lines, Teller
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress
from kinoray.errors import JobError, KinorayError, StorageUnavailable
from kinoray.pack.kinetics import ClipJudge, KineticsPlan
from kinoray.pack.plan import Plan, Unit
from kinoray.pack.unit import PackSettings, pack_unit, read_commit
from kinoray.storage.objects import Storage

__all__ = ["pack_units"]

_TASK_RETRIES = 3  # of a unit whose worker died, or whose store stayed away


def pack_units(
    storage: Storage,
    out: str,
    plan: Plan,
    settings: PackSettings,
    resources: WorkersConfig,
    done: AbstractSet[str],
) -> None:
    """Pack the units of a plan that are not done.

    Raises:
        ClusterError: there is no Ray cluster, or it has no room.
        KinorayError: what a task raised.
        JobError: a task's worker died again and again.
    """
    connect(resources)
    require_fit(resources)
    left = [unit for unit in plan.units if unit.name not in done]
    already = plan.num_found - sum(unit.num_files for unit in left)
    progress = Progress(plan.num_found, "pack", "files", already=already)
    with Lines(progress) as lines:
        _pack_stages(storage, out, plan, settings, resources, left, progress, Teller(lines.box, resources.num_workers))
    progress.close()


def _pack_stages(
    storage: Storage,
    out: str,
    plan: Plan,
    settings: PackSettings,
    resources: WorkersConfig,
    left: Sequence[Unit],
    progress: Progress,
    tell: Teller,
) -> None:
    judge = ClipJudge(plan.wanted.clips) if isinstance(plan, KineticsPlan) else None
    for is_replacement in (True, False):
        stage = [unit for unit in left if unit.is_replacement == is_replacement]
        replaced = frozenset() if is_replacement else _replaced(storage, out, plan.units)
        shared = ray.put((judge, replaced))
        tasks = ((unit, (storage, out, unit, settings, shared, tell)) for unit in stage)
        for unit, (packed, refused) in _run(resources, _pack_task, tasks):
            progress.update(unit.num_files, part=unit.name, packed=packed, quarantined=refused)


def _pack_task(
    storage: Storage,
    out: str,
    unit: Unit,
    settings: PackSettings,
    shared: tuple[ClipJudge | None, frozenset[str]],
    tell: Teller,
) -> tuple[int, int]:
    """(packed, unreadable) of one unit; the rest stays in its commit."""
    judge, replaced = shared
    saw = partial(tell, unit.name)
    commit = pack_unit(storage, out, unit, settings, judge_member=judge, replaced=replaced, saw=saw)
    return len(commit.packed), len(commit.refused)


def _replaced(storage: Storage, out: str, units: Sequence[Unit]) -> frozenset[str]:
    """Clips of which a replacement is packed."""
    commits = [read_commit(storage, out, unit.name) for unit in units if unit.is_replacement]
    return frozenset(commit.files[packed.position].key for commit in commits for packed in commit.packed)


def _run(
    resources: WorkersConfig, function: Callable[..., Any], tasks: Iterator[tuple[Unit, tuple[Any, ...]]]
) -> Iterator[tuple[Unit, Any]]:
    """Run a task for each unit; the units come out with their results as they end."""
    task = ray.remote(function).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=_TASK_RETRIES,
        retry_exceptions=[StorageUnavailable],
    )
    running: dict[ray.ObjectRef, Unit] = {}
    try:
        while True:
            for _, (unit, arguments) in zip(range(resources.num_workers - len(running)), tasks, strict=False):
                running[task.remote(*arguments)] = unit
            if not running:
                break
            ready, _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready[0])
            yield unit, _result(ready[0], unit)
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any, unit: Unit) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KinorayError):  # without Ray's traceback of the worker
            raise error.cause from error
        raise
    except RayError as error:
        raise JobError(
            f"pack: the worker of {unit.name} died {_TASK_RETRIES + 1} times, {unit.what} not packed "
            f"({loss_of(error)}); the same command goes on from here"
        ) from error
