"""What packs of every kind share: the pinned plan, a Ray task for each piece of work, and the check of the tars.

What is easy to break: a plan is pinned before the first task, so that a second run can only go on with the same files
and settings.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kinoray.config.shared import ResourcesConfig
from kinoray.errors import ConfigError, IncompleteOutput, JobError, KinorayError, StorageUnavailable
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json

__all__ = ["Job", "committed", "pin_plan", "require_apart", "require_tars", "run_jobs"]

_MAX_PLAN_BYTES = 2**30
_TASK_RETRIES = 3  # of a job whose worker died, or whose store stayed away


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work for one task."""

    name: str
    """Names its commit, shards/<name>.json."""
    what: str
    """What is not done if it fails, in words."""
    arguments: tuple[Any, ...]
    """Of the function; a Ray reference stands for its value."""


def require_apart(source: str, out: str) -> None:
    """Refuse to write into what is read.

    Raises:
        ConfigError: out lies inside the source.
    """
    if (out + "/").startswith(absolute(source).rstrip("/") + "/"):
        raise ConfigError(f"out {out} lies inside the source {source}: a second run would find its own shards there")


def pin_plan(storage: Storage, out: str, pinned: Mapping[str, Any]) -> None:
    """Write plan.json, or compare with the one that is there.

    Raises:
        ConfigError: out holds the pack of other files or settings; the message names what differs.
    """
    uri = join(out, "plan.json")
    if storage.put_if_absent(uri, json.dumps(pinned, indent=1).encode()):
        return
    pinned = parse_json(json.dumps(pinned))
    try:
        there = parse_json(storage.read(uri, max_bytes=_MAX_PLAN_BYTES))
        if not isinstance(there, dict) or not there["files"]:
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"out: {uri} is not the plan of a pack ({error}); choose another folder") from error
    names = [*pinned, *(name for name in there if name not in pinned)]
    changed = [
        f"{name} was {there.get(name)!s:.200}, is {pinned.get(name)!s:.200}"
        for name in names
        if there.get(name) != pinned.get(name)
    ]
    if changed:
        raise ConfigError(
            f"out {out} holds another pack: {'; '.join(changed)}; choose another folder, or remove this one"
        )


def committed(storage: Storage, out: str) -> set[str]:
    """Names of the jobs that have a commit."""
    prefix = join(out, "shards") + "/"
    names = (info.uri[len(prefix) :] for info in storage.list(prefix))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def run_jobs(
    resources: ResourcesConfig, function: Callable[..., Any], jobs: Sequence[Job]
) -> Iterator[tuple[Job, Any]]:
    """Run a task for each job, num_workers at a time; the jobs come out with their results as they end.

    Raises:
        KinorayError: what a task raised.
        JobError: a task's worker died again and again.
    """
    task = ray.remote(function).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=_TASK_RETRIES,
        retry_exceptions=[StorageUnavailable],
    )
    waiting = iter(jobs)
    running: dict[ray.ObjectRef, Job] = {}
    try:
        while True:
            for _, job in zip(range(resources.num_workers - len(running)), waiting, strict=False):
                running[task.remote(*job.arguments)] = job
            if not running:
                break
            ready, _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready[0])
            yield job, _result(ready[0], job)
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any, job: Job) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KinorayError):  # without Ray's traceback of the worker
            raise error.cause from error
        raise
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise JobError(
            f"pack: the worker of {job.name} died {_TASK_RETRIES + 1} times, {job.what} ({reason}); the same command "
            "goes on from here"
        ) from error


def require_tars(storage: Storage, out: str, tars: Mapping[str, tuple[int, str]]) -> None:
    """Check that every tar is there in full: uri -> (size in bytes, name of the job that wrote it).

    Raises:
        IncompleteOutput: one is not.
    """
    sizes = {info.uri: info.size_bytes for info in storage.list(join(out, "shards") + "/")}
    for uri, (size_bytes, name) in tars.items():
        if sizes.get(uri) != size_bytes:
            raise IncompleteOutput(
                f"pack: {uri} should have {size_bytes} bytes, found {sizes.get(uri, 'nothing')}; remove "
                f"{join(out, 'shards', name)}.json and run the same command again"
            )
