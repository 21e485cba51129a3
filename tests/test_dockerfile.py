"""The Dockerfile, read line by line: what it copies is there, what it installs is pinned, and nobody is root.

Docker itself is not part of these tests. What its steps rest on is: a wheel is made of exactly the files that the first
stage copies, and a job runs from that wheel.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {"CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its arguments, continued lines joined, comments left out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    found = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(arguments.split())) for name, arguments in found]


def of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY from the repository."""
    words = [arguments.split() for arguments in of("COPY") if not arguments.startswith("--from=")]
    return [(line[:-1], line[-1]) for line in words]


def canonical(requirement: str) -> str:
    """The name of a package, as pip compares it: `ray[data]>=2.60` -> `ray`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(line): line.split("==")[1] for line in lines if not line.startswith("#")}


def dependencies() -> list[str]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed: list[str] = content["project"]["dependencies"]
    return listed


def test_only_instructions_that_are_looked_at_here() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"  # all is left out but what follows
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    sources = {source for names, _ in copied() for source in names}
    assert sources == kept
    for source in sources:
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", [".venv", "demo-out", "auth_token", "tests", ".git", "cluster.yaml"])
def test_nothing_else_goes_to_the_build(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("!") and fnmatch(name, line[1:])]


def test_every_stage_is_the_same_slim_python() -> None:
    images = {arguments.split()[0] for arguments in of("FROM")}
    assert len(images) == 1
    assert re.fullmatch(r"python:3\.11-slim-\w+", images.pop())


def test_the_user_is_not_root() -> None:
    names = [name for name, _ in instructions()]
    last_user = len(names) - 1 - names[::-1].index("USER")
    user, group = of("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0  # numbers: Kubernetes checks runAsNonRoot by number
    assert f"useradd --uid {user} --user-group" in " ".join(of("RUN"))
    assert not {"COPY", "RUN", "FROM"} & set(names[last_user:])


def test_what_pip_installs_is_pinned() -> None:
    installs = [part for line in of("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 2
    [constraints] = [f"{place}" for names, place in copied() if names == ["constraints.txt"]]
    for install in installs:
        assert f"--constraint {constraints} " in install or "--no-deps" in install, install
    unpinned = {canonical(item) for item in dependencies()} - set(pinned())
    assert not unpinned, f"constraints.txt has no version of {sorted(unpinned)}"


def test_the_requirements_are_those_of_the_project() -> None:
    """The step's own line of Python, run on the pyproject.toml here."""
    [step] = [line for line in of("RUN") if "tomllib" in line]
    python, flag, code, *_ = shlex.split(step)
    assert (python, flag) == ("python", "-c")
    assert "/tmp/project/pyproject.toml" in code
    code = code.replace("/tmp/project/pyproject.toml", str(ROOT / "pyproject.toml"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == dependencies()


def test_no_ffmpeg_is_installed() -> None:
    """Decoding takes the libraries inside the av package; a second FFmpeg would be one more parser of foreign files."""
    assert "ffmpeg" not in " ".join(of("RUN"))


def test_what_kuberay_and_the_launcher_call_is_installed() -> None:
    [apt] = [line for line in of("RUN") if "apt-get install" in line]
    assert {"wget", "openssh-client", "rsync"} <= set(apt.split())


@pytest.mark.ray
def test_a_job_runs_from_the_wheel(tmp_path: Path) -> None:
    """The first stage's copies and its wheel; then jobs/ beside that wheel alone, as in the image."""
    source, wheels, site = tmp_path / "source", tmp_path / "dist", tmp_path / "site"
    source.mkdir()
    first_stage = [arguments for name, arguments in instructions()][1:]
    for names, destination in copied():
        if f"{' '.join(names)} {destination}" not in first_stage or "constraints.txt" in names or "jobs" in names:
            continue
        for name in names:
            target = source / (name if destination == "./" else destination)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(ROOT / name, target)
    # offline: without build isolation, which would fetch setuptools
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=200)
    [wheel] = wheels.glob("kinoray-*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    names = ["kinoray/page/report.html.j2", "kinoray/label/verb.py", "vcm_sdd/py.typed", "video_baselines"]
    assert [name for name in names if not (site / name).exists()] == []

    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import kinoray, runpy, sys; sys.argv[1:] = ['--help']; print(kinoray.__file__); " + (
        "runpy.run_path('jobs/label.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "--checkpoint" in done.stdout
