"""Nothing of a killed command stays: temporary folders, Ray's agents, a server that was started for it.

A folder is its owner's while the owner holds the lock in it; the kernel lets go of a lock when its process dies,
however it dies. Folders without an owner are removed at the next start, and at once by the reaper: a process of its own
that waits for the end of its command. It runs this file by itself, so only the standard library is imported here.

Easy to break: a lock that is taken after its folder can be seen leaves a moment in which the folder looks abandoned.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["Claim", "Scratch", "reap", "scratch_folder", "sweep"]

_PREFIX = "kinoray-"
_LOCK = ".kinoray-lock"
_KILL_S = 20.0  # how long the reaper looks for processes that come to their end


class Claim:
    """A lock in a folder: until `release`, or the end of this process, the folder is in use."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        aside = folder / f"{_LOCK}-new"
        self._file = aside.open("w", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside.rename(self._path)

    def release(self) -> None:
        """From now on the folder is none of ours, and stays."""
        self._path.unlink(missing_ok=True)
        self._file.close()


@contextlib.contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """A temporary folder `kinoray-WHAT-...` that goes with its context, and with this process however it ends."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{what}-"))
    try:
        claim = Claim(folder)
        try:
            inside = folder / "files"
            inside.mkdir()
            yield inside
        finally:  # files first: of a process that is killed in here, a sweep removes the rest
            shutil.rmtree(inside, ignore_errors=True)
            claim.release()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """A `scratch_folder` that goes when it is closed, or nobody has it any more."""

    def __init__(self, what: str) -> None:
        stack = contextlib.ExitStack()
        self.folder = stack.enter_context(scratch_folder(what))
        self.close = weakref.finalize(self, stack.close)


def sweep(claimed: Iterable[Path] = ()) -> None:
    """Remove what processes that are gone have left: scratch folders, and others that they had a `Claim` on."""
    for folder in [*Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"), *claimed]:
        with contextlib.suppress(OSError):  # somebody else's, in use, or just removed by another sweep
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("r+", encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink:  # else it was released just now, and the folder stays
                    shutil.rmtree(folder, ignore_errors=True)


_reapers: dict[int, "subprocess.Popen[bytes]"] = {}  # by the process that has it: a fork must not speak to its parent's
_lock = threading.Lock()


def reap(kind: str, value: str) -> None:
    """After this process has ended: `process PID` is killed; `session FOLDER` is Ray's, and its processes are.

    `starting PATTERN` is said before Ray makes its session, and holds until `session` names it, or `started` says no.
    """
    with _lock:
        reaper = _reapers.get(os.getpid())
        if reaper is None:
            command = [sys.executable, "-I", "-S", __file__]
            # In a session of its own: Ctrl-C and a terminal that closes are for the command, and not for who cleans up.
            reaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
            _reapers[os.getpid()] = reaper
        assert reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed: then the next start cleans up
            reaper.stdin.write(f"{kind} {value}\n".encode())
            reaper.stdin.flush()


def _started_at(pid: int) -> str:
    """When a process was started, in the kernel's ticks: with its id it names a process for ever. OSError: none."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]


def _main() -> None:
    """Collect what is to be cleaned up; do it when the other end of the pipe is gone."""
    sessions: list[Path] = []
    processes: list[tuple[int, str]] = []
    begun_s, starting = time.time(), ""
    for line in sys.stdin:
        kind, _, value = line.rstrip("\n").partition(" ")
        if kind in ("starting", "started", "session"):
            starting = value if kind == "starting" else ""
        if kind == "session":
            sessions.append(Path(value))
        elif kind == "process":
            with contextlib.suppress(OSError):
                processes.append((int(value), _started_at(int(value))))
    for pid, start in processes:
        with contextlib.suppress(OSError):
            if _started_at(pid) == start:
                os.kill(pid, signal.SIGKILL)
    named = Path(starting).parent.glob(Path(starting).name) if starting else ()
    unclaimed = [path for path in named if path.stat().st_ctime > begun_s - 1]  # not of a process with the same id
    sessions += unclaimed
    end_s = time.monotonic() + _KILL_S
    quiet = 0
    while sessions and quiet < 3 and time.monotonic() < end_s:
        found = [pid for folder in sessions for pid in _ray_processes(folder)]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(0.2)
    for folder in unclaimed:
        shutil.rmtree(folder, ignore_errors=True)
    sweep(sessions[0].parent.glob("session_*") if sessions else ())


def _ray_processes(session: Path) -> list[int]:
    """Agents and workers of a session: they are called ray::..., and have its logs or sockets open."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if not Path(entry.path, "cmdline").read_bytes().startswith(b"ray::"):
                continue
            opened = (os.readlink(item.path) for item in os.scandir(f"{entry.path}/fd"))
            if any(Path(target).is_relative_to(session) for target in opened):
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    _main()
