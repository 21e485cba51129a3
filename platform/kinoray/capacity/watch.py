"""Whose the cores were: CPU seconds of this process with all its descendants, idle time, and what others took.

What is easy to break: idle time is charged to the job that is measured, since it could have been used; what others use
is not. On a machine with nothing else on it the two together are cores x wall time.
"""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

__all__ = ["CpuUse", "CpuWatch"]

_IDLE, _IOWAIT = 3, 4  # fields of a line of /proc/stat
_NUM_FIELDS = 8  # user to steal; guests are in user already


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuUse:
    """Core seconds of this machine between two times."""

    own_s: float
    """Used by this process and its descendants."""
    idle_s: float
    others_s: float
    """Used by others, or kept back by the hypervisor."""

    @property
    def had_s(self) -> float:
        """What was there for this process: used or idle."""
        return self.own_s + self.idle_s

    @property
    def others_share(self) -> float:
        """What others took of all cores."""
        return self.others_s / (self.had_s + self.others_s)


class CpuWatch:
    """A context in which the machine is looked at some times a second; needs Linux."""

    def __init__(self, every_s: float = 0.25) -> None:
        self._every_s, self._done = every_s, threading.Event()
        self._seen: dict[int, float] = {}
        self._samples: list[tuple[float, float, float, float]] = []
        self._thread = threading.Thread(target=self._watch, name="cpu-watch", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def use(self, begin: float, end: float) -> CpuUse:
        """Whose the cores were between two times, in seconds since 1970."""
        times, *columns = np.array(self._samples).T
        own_s, idle_s, all_s = (float(np.diff(np.interp([begin, end], times, column))[0]) for column in columns)
        return CpuUse(own_s=own_s, idle_s=idle_s, others_s=max(0.0, all_s - own_s - idle_s))

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        self._seen |= _cpu_of_family(os.getpid())  # processes that have ended stay in the sum
        self._samples.append((time.time(), sum(self._seen.values()), *_idle_and_all()))


def _idle_and_all() -> tuple[float, float]:
    """Core seconds since the start of the machine, of the cores that this process may use."""
    tick, names = os.sysconf("SC_CLK_TCK"), {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    ours = [[int(field) for field in line[1 : 1 + _NUM_FIELDS]] for line in lines if line[0] in names]
    return sum(line[_IDLE] + line[_IOWAIT] for line in ours) / tick, sum(map(sum, ours)) / tick


def _cpu_of_family(root: int) -> dict[int, float]:
    """CPU seconds by process id."""
    parents, seconds = {}, {}
    tick = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / tick
    family = found = {root}
    while found:
        found = {pid for pid, parent in parents.items() if parent in family} - family
        family = family | found
    return {pid: seconds[pid] for pid in family if pid in seconds}
