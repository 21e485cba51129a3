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
    """The commits of this process's working folder and, unless it is an installed copy, of kinoray's own code."""
    package = Path(kinoray.__file__).resolve().parent
    found = {"commit": git_commit(Path.cwd())}
    if "site-packages" not in package.parts:
        found["kinoray_commit"] = git_commit(package)
    return {name: commit for name, commit in found.items() if commit}


def git_commit(folder: Path) -> str:
    """The commit that the folder's repository is at, with `+` where files differ from it; empty if there is none."""
    git = shutil.which("git")
    if git is None:
        return ""

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if not commit:
        return ""
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


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
