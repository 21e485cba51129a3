"""Kill -9 of whatever takes part in a labelling, while a reader looks on.

A gate before the store keeps the job from running away between two kills: so every kill meets a job at work, and no
test depends on how fast the machine is.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faulty_s3 import FaultyS3, Request
from kills_cluster import Cluster, Process, state_of
from kinoray.errors import ObjectNotFound
from kinoray.label.ledger import Ledger, find_labellings, read_predictions
from kinoray.storage.objects import Storage
from ports import wait_until

__all__ = ["Driver", "Gate", "Kill", "Reader", "kill_while_labelling", "member_reads"]

_LIMIT_S = 240.0
_BUSY_TRIES = 5000


class Gate:
    """Counts the commits that a proxy passes on, and holds back those beyond `limit` (0). It is a `FaultyS3.before`.

    What was held goes on when the limit is raised, also if its writer is dead by then: as a packet that was late.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.limit = 0
        self.held = 0
        self._changed = threading.Condition()

    def __call__(self, request: Request) -> None:
        if request.method == "PUT" and "/parts/" in request.path:
            with self._changed:
                self.held += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.passed < self.limit)
                self.held -= 1
                self.passed += 1

    def open_to(self, limit: int) -> None:
        """Let so many pass in all."""
        with self._changed:
            self.limit = limit
            self._changed.notify_all()

    def wait_held(self, num_commits: int) -> None:
        """Until so many commits wait."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.held >= num_commits, _LIMIT_S), f"{self.held} commits wait"


class Driver:
    """The command that labels, as a process that can be killed and started again."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], logs: Path) -> None:
        self.command, self.environment, self.logs = command, environment, logs
        self.started_s: list[float] = []
        """When it was started, in seconds since 1970."""
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Run the command (again)."""
        self.started_s.append(time.time())
        with self._log().open("wb") as log:
            self._process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _log(self) -> Path:
        return self.logs / f"driver-{len(self.started_s)}.log"

    def kill(self) -> int:
        """Kill -9; returns the process's id."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return self._process.pid

    def check_runs(self) -> None:
        """Fail if the command has ended."""
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"the command ended with {code}: {self.said()[-4000:]}"

    def finish(self, limit_s: float) -> str:
        """Wait until the command ends well; returns what it said."""
        assert self._process is not None
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command still runs after {limit_s:g} s: {self.said()[-4000:]}") from None
        assert code == 0, f"the command ended with {code}: {self.said()[-4000:]}"
        return self.said()

    def said(self) -> str:
        """Output and errors of the newest start."""
        return self._log().read_text(errors="replace")

    def close(self) -> None:
        """End the process if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Kill:
    """One that was carried out."""

    kind: str
    pid: int
    after_commits: int
    state: str
    """Of the victim just before: R it ran, S it waited."""


@dataclass
class Chaos:
    """Kills at random moments of one job, in the order given."""

    cluster: Cluster
    driver: Driver
    gate: Gate
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)

    def run(self, kinds: Sequence[str], num_units: int, limit_s: float) -> str:
        """Carry out the kills, then let the job end; returns what its last start said."""
        points = sorted(self.rng.sample(range(1, num_units * 9 // 10), len(kinds)))
        for kind, point, following in zip(kinds, points, [*points[1:], num_units - 1], strict=True):
            self._reach(point)
            self.gate.open_to(following)
            time.sleep(self.rng.uniform(0, 0.3))  # else every kill would come just after a commit
            self._strike(kind)
        self.gate.open_to(10**9)
        return self.driver.finish(limit_s)

    def _reach(self, point: int) -> None:
        self.gate.open_to(max(point, self.gate.limit))
        end = time.monotonic() + _LIMIT_S
        while self.gate.passed < point:
            self.driver.check_runs()
            assert time.monotonic() < end, f"no commit {point} in {_LIMIT_S:g} s: {self.driver.said()[-4000:]}"
            time.sleep(0.002)

    def _strike(self, kind: str) -> None:
        if kind == "driver":
            self.kills.append(Kill(kind, self.driver.kill(), self.gate.passed, "R"))
            self.driver.start()
            return
        self.kills.append(self._kill_one(kind))
        if kind == "raylet":
            self.cluster.add_node()

    def _kill_one(self, kind: str) -> Kill:
        while True:
            victim = self._choose(kind)
            state = state_of(victim)
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it had just ended by itself: that is no kill
            return Kill(kind, victim.pid, self.gate.passed, state)

    def _choose(self, kind: str) -> Process:
        """Any of that kind; of decoders one that is at work, if one is met before the gate holds the job."""
        found: list[Process] = []
        busy: list[Process] = []

        def has_some() -> bool:
            found[:] = self.cluster.find(kind)
            return bool(found)

        wait_until(has_some, _LIMIT_S, f"there is a {kind} to kill")
        for _ in range(_BUSY_TRIES if kind == "decoder" else 0):
            busy = [process for process in found if state_of(process) == "R"]
            if busy or self.gate.passed >= self.gate.limit:
                break
        return self.rng.choice(busy or found)


def kill_while_labelling(
    cluster: Cluster, driver: Driver, gate: Gate, kinds: Sequence[str], num_units: int, *, seed: int, limit_s: float
) -> tuple[list[Kill], str]:
    """Kill what `kinds` says while the driver's job is at work, then let it end; also what its last start said."""
    chaos = Chaos(cluster, driver, gate, random.Random(seed))
    said = chaos.run(kinds, num_units, limit_s)
    assert Counter(kill.kind for kill in chaos.kills) == Counter(kinds)
    wait_until(lambda: not cluster.left_behind(), 60, f"no worker outlives the job: {cluster.left_behind()}")
    return chaos.kills, said


class Reader(threading.Thread):
    """Reads a job's table over and over while it is made, and keeps the first thing that no reader may see."""

    def __init__(self, storage: Storage, out: str) -> None:
        super().__init__(name="reader")
        self.storage, self.out = storage, out
        self.num_reads, self.num_growths = 0, 0
        self.wrong: list[str] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        before: set[str] = set()
        rest_s = 0.05
        while not self._stopped.wait(rest_s) and not self.wrong:
            begun = time.monotonic()
            try:
                found = self._read()
            except ObjectNotFound:
                continue  # the job has not begun
            except Exception as error:  # noqa: BLE001  (any error is what must not be seen; `stop` raises it)
                self.wrong.append(f"{type(error).__name__}: {error}")
                return
            if before - found:
                self.wrong.append(f"{len(before - found)} rows were there and are gone")
            self.num_reads += 1
            self.num_growths += before < found
            before, rest_s = found, 2 * (time.monotonic() - begun)  # the store has others to serve

    def _read(self) -> set[str]:
        keys = read_predictions(self.storage, self.out).column("row_key").to_pylist()
        found = set(keys)
        if len(found) != len(keys):
            self.wrong.append(f"{len(keys) - len(found)} rows are there twice")
        (root,) = find_labellings(self.storage, self.out)
        for plan in Ledger(self.storage, root).plans():
            for unit in plan.units:
                if 0 < len(found.intersection(unit.keys)) < len(unit.keys):
                    self.wrong.append(f"half of unit {unit.unit_id}")
        return found

    def stop(self) -> None:
        """End, and fail if something was wrong."""
        self._stopped.set()
        self.join()
        assert not self.wrong, f"read {self.num_reads}: {self.wrong[0]}"


def member_reads(proxy: FaultyS3, members: Mapping[str, Sequence[tuple[str, int, int]]]) -> Counter[str]:
    """How often each video's bytes were asked for.

    Args:
        members: name of a shard -> (video_id, offset, length) of what it holds.
    """
    times: Counter[str] = Counter()
    for request in proxy.gets():
        inside = members.get(request.path.rpartition("/")[2], ())
        if inside and request.range:
            first, last = (int(text) for text in request.range.removeprefix("bytes=").split("-"))
            times.update(name for name, offset, length in inside if first <= offset and offset + length - 1 <= last)
    return times
