"""What a run was made with: versions, the code's commit, the hosts. Nothing of the process's environment variables."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kinoray

__all__ = ["commits", "git_commit", "host", "software"]

_PACKAGES = ("ray", "torch", "torchvision", "av", "decord", "numpy", "pyarrow", "opencv-python-headless", "safetensors")
_GIT_S = 10.0


def software() -> dict[str, str]:
    """Versions of Python, the system, kinoray and the packages that decide its numbers; absent ones are left out."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found["kinoray"] = kinoray.__version__
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commits() -> dict[str, str]:
    """The commits of this process's working folder and, unless it is an installed copy, of kinoray's own code.

    Only of the latter it is said that files differ, with `+`: git looks through files with filters and monitors that
    a repository's own config names, and the working folder may be a stranger's.
    """
    package = Path(kinoray.__file__).resolve().parent
    found = {"commit": git_commit(Path.cwd())}
    if "site-packages" not in package.parts:
        own = git_commit(package)
        found["kinoray_commit"] = own + ("+" if own and _git(package, "status", "--porcelain", "-uno") else "")
    return {name: commit for name, commit in found.items() if commit}


def git_commit(folder: Path) -> str:
    """The commit that the folder's repository is at; empty if there is none. Runs nothing that its config names."""
    return _git(folder, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str) -> str:
    """What git says; empty where it cannot."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(folder), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def host(rank: int) -> dict[str, Any]:
    """The machine that this rank runs on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names: Sequence[str] = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
