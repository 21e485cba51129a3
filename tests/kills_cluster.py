"""A Ray cluster whose nodes are processes of this machine, and who is who among what they started.

What is easy to break: only processes below those that were started here are ever killed, by their ids; other Rays run
on the same machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ports import free_port, wait_until

__all__ = ["Cluster", "Process", "ray_cluster", "state_of"]

_LIMIT_S = 120.0
_ALL = (
    *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    *("--include-log-monitor=false", "--object-store-memory=80000000"),
)
_TYPE = "RAY_NODE_TYPE_NAME="  # in the environment of a node that an autoscaler started
_NODE_DEATH = {  # a dead raylet is noticed after 2 s instead of 15
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass(frozen=True)
class Process:
    """A line of /proc. Ids are used again; the time of the start tells them apart."""

    pid: int
    parent: int
    state: str
    started: int
    title: str


def processes() -> dict[int, Process]:
    """All processes that run now; zombies do not."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it ended while we looked
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if stat[0] != "Z":
                    found[int(folder.name)] = Process(int(folder.name), int(stat[1]), stat[0], int(stat[19]), title)
    return found


def state_of(process: Process) -> str:
    """R while it runs, S while it waits, empty once it is gone."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def below(root: int, found: Mapping[int, Process]) -> list[Process]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for process in found.values():
        children.setdefault(process.parent, []).append(process.pid)
    tree, todo = [], [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        tree += [found[pid]] if pid in found else []
    return tree


class Cluster:
    """A closed Ray: a head without CPUs, where drivers are at home, and worker nodes of two CPUs each."""

    def __init__(
        self,
        folder: Path,
        logs: Path,
        port: int,
        head_options: Sequence[str] = ("--no-monitor",),
        head_environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the head, at this port."""
        self._folder, self._logs = folder, logs
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            **_NODE_DEATH,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        }
        self.seen: dict[int, Process] = {}
        """Every actor and decoder that `find` has met."""
        arguments = ["--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0", "--include-dashboard=false"]
        self._workers: list[subprocess.Popen[bytes]] = []
        self._head = self._start(0, [*arguments, *head_options], {**self.environment, **(head_environment or {})})

    def add_node(self) -> None:
        """Start one worker node; it takes part some seconds later. Two that start at once would take one socket."""
        self.wait_nodes()
        arguments = [f"--address={self.address}", "--num-cpus=2"]
        self._workers.append(self._start(1 + len(self._workers), arguments, self.environment))

    def kill_node(self, work: str) -> list[str]:
        """Kill -9 all of a worker node, at once: one that has a process whose title holds `work`.

        Returns:
            The titles of what was killed.
        """
        victims: list[Process] = []

        def is_at_work() -> bool:
            found = processes()
            for worker in self._workers:
                tree = below(worker.pid, found)
                if any(work in process.title for process in tree):
                    victims[:] = tree
                    return True
            return False

        wait_until(is_at_work, _LIMIT_S, f"a node has a process {work}")
        kill_all(victims)
        return [process.title for process in victims]

    def node_types(self) -> list[str]:
        """The node types of the raylets that an autoscaler started below the head, sorted."""
        found = processes()
        types = []
        for process in below(self._head.pid, found):
            if "/raylet/raylet" in process.title.split(" ")[0]:
                with suppress(OSError):  # it ended while we looked
                    variables = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
                    types += [one.removeprefix(_TYPE) for one in variables if one.startswith(_TYPE)]
        return sorted(types)

    def wait_nodes(self) -> None:
        """Until the head and every worker node that was added take part, or did."""
        for number, node in enumerate([self._head, *self._workers]):
            log = self._logs / f"node-{number}.log"
            wait_until(lambda node=node, log=log: _has_started(node, log), _LIMIT_S, f"a node runs; see {log}")

    def _start(self, number: int, arguments: list[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", "--block", *arguments, *_ALL, f"--ray-client-server-port={free_port()}"]
        with (self._logs / f"node-{number}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )

    def find(self, kind: str) -> list[Process]:
        """The running decoders, actors or raylets of the worker nodes, by their ids."""
        found = processes()
        tree = [process for worker in self._workers for process in below(worker.pid, found)]
        kinds: dict[str, list[Process]] = {"decoder": [], "actor": [], "raylet": []}
        for process in tree:
            if "kinoray.video.sandbox.child" in process.title:
                kinds["decoder"].append(process)
            elif process.title.startswith("ray::") and "LabelWorker" in process.title:
                kinds["actor"].append(process)
            elif "/raylet/raylet" in process.title.split(" ")[0]:
                kinds["raylet"].append(process)
        self.seen |= {process.pid: process for name in ("decoder", "actor") for process in kinds[name]}
        if kind == "raylet":  # of a node that has work, if there is one
            parents = {process.parent for process in kinds["actor"]}
            kinds["raylet"] = [one for one in kinds["raylet"] if one.pid in parents] or kinds["raylet"]
        return sorted(kinds[kind], key=lambda process: process.pid)

    def left_behind(self) -> list[Process]:
        """Actors and decoders that `find` met once and that still run."""
        now = processes()
        return [old for old in self.seen.values() if old.pid in now and now[old.pid].started == old.started]

    def close(self) -> None:
        """End the nodes and all that they started; `ray stop` would end every Ray of the machine."""
        found = processes()
        tree = [one for root in (*self._workers, self._head) for one in below(root.pid, found)] + self.left_behind()
        kill_all(tree)
        for node in (*self._workers, self._head):
            node.kill()
            node.wait()


def kill_all(victims: Iterable[Process]) -> None:
    """Kill -9 of these processes, as far as they still run."""
    for process in victims:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _has_started(node: "subprocess.Popen[bytes]", log: Path) -> bool:
    said = log.read_text(errors="replace")
    if "Ray runtime started" in said:
        return True
    ended = os.waitid(os.P_PID, node.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # not reaped: its id stays its own
    assert ended is None, f"a node of Ray did not start: {said}"
    return False


@contextmanager
def ray_cluster(logs: Path, num_nodes: int) -> Iterator[Cluster]:
    """A cluster for the time of the block; its sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="kr-"))
    cluster = Cluster(folder, logs, free_port())
    try:
        for _ in range(num_nodes):
            cluster.add_node()
        cluster.wait_nodes()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
