"""What one host has: versions, cores, memory, disk and limits, as plain numbers.

What is easy to break: it is sent to cluster nodes by itself, so it needs the standard library and nothing else.
"""

import os
import platform
import resource
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "host_facts", "ray_temp_folder"]

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "av", "decord", "numpy", "torchcodec")
"""Packages whose versions are told."""

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
