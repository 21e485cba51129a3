"""What one host has: versions, cores, memory, disk and limits, as plain numbers.

`python -m kinoray.doctor.host`, as a job, asks every node of a cluster. What is easy to break: this file is sent there
by itself, so it needs the standard library and, for that job, ray; nothing else of kinoray.
"""

import json
import logging
import os
import platform
import resource
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["MARK", "PACKAGES", "host_facts", "main", "ray_temp_folder"]

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "av", "decord", "numpy", "torchcodec")
"""Packages whose versions are told."""

MARK = "kinoray-doctor: "
"""Begins the line with the job's answer, which is JSON."""

_ANSWER_S = 60.0
_HEAD = "node:__internal_head__"
_SHARED_MEMORY = "/dev/shm"
_CGROUP = "/sys/fs/cgroup"


def host_facts(ray_folder: str = "") -> dict[str, Any]:
    """What this host has, as JSON; sizes in bytes.

    Args:
        ray_folder: where Ray's temporary files are. Default: where Ray would put them.
    """
    folder = _existing(ray_folder or ray_temp_folder())
    memory = _memory()
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": len(os.sched_getaffinity(0)),
        "cpu_quota": _cpu_quota(),
        "memory_bytes": memory["MemTotal"],
        "memory_free_bytes": memory["MemAvailable"],
        "memory_limit_bytes": _memory_limit(),
        "shared_memory": _space(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else None,
        "ray_folder": {"path": folder, **_space(folder)},
        "open_files": dict(zip(("soft", "hard"), resource.getrlimit(resource.RLIMIT_NOFILE), strict=True)),
    }


def ray_temp_folder() -> str:
    """Where Ray puts sessions, logs and what it spills, unless `ray start --temp-dir` says otherwise."""
    return os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    place = os.path.abspath(path)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place


def _space(folder: str) -> dict[str, int]:
    usage = shutil.disk_usage(folder)
    return {"size_bytes": usage.total, "free_bytes": usage.free}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def _memory_limit() -> int | None:
    """What the container may take; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _first_line(f"{_CGROUP}/{name}")
        if text.isdecimal() and int(text) < 2**60:  # version 1 says a huge number instead of `max`
            return int(text)
    return None


def _cpu_quota() -> float | None:
    """How many cores the container may keep busy; None without a limit."""
    quota, _, period = _first_line(f"{_CGROUP}/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().partition("\n")[0].strip()
    except OSError:
        return ""


def main() -> None:
    """Run a task on every node that is alive, and print what they say."""
    import ray

    now_s = time.time()
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked_s = time.time()
    tasks = [_ask(node) for node in nodes]
    ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_ANSWER_S)
    answers = [_answer(node, task if task in ready else None) for node, task in zip(nodes, tasks, strict=True)]
    print(MARK + json.dumps({"time_s": now_s, "asked_s": asked_s, "answered_s": time.time(), "nodes": answers}))


def _look(ray_folder: str) -> dict[str, Any]:
    return {**host_facts(ray_folder), "time_s": time.time()}


def _ask(node: dict[str, Any]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    folder = str(PurePosixPath(node["ObjectStoreSocketName"]).parents[1])  # above SESSION/sockets
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_look).remote(folder)


def _answer(node: dict[str, Any], task: Any) -> dict[str, Any]:
    import ray

    resources = node["Resources"]
    about = {
        "address": node["NodeManagerAddress"],
        "is_head": _HEAD in resources,
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "object_store_bytes": resources.get("object_store_memory", 0.0),
        "facts": None,
        "error": f"no task has run there in {_ANSWER_S:g} s",
    }
    if task is None:
        return about
    try:
        return {**about, "facts": ray.get(task), "error": ""}
    except ray.exceptions.RayError as error:
        return {**about, "error": " ".join(str(error).split())[:300]}


if __name__ == "__main__":
    main()
