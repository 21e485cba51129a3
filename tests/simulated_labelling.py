"""A labelling event by event: what the closed form of kinoray.capacity.estimate is checked against.

Videos are fetched, decoded in order by a pool with a bounded look-ahead, batched, run and committed, as a worker does
it; nodes start, and may be taken away. What is easy to break: cores and network are shared by processor sharing, so
every event changes how fast everything else on its node goes.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from kinoray.capacity.estimate import Site, Work

__all__ = ["Simulation", "simulate"]

_FETCHES = 4  # requests that a worker has under way
_EPSILON = 1e-12


@dataclass(slots=True, eq=False)
class _Task:
    """Something that takes time: `left` seconds (or bytes) at the rate that its resource gives it."""

    kind: str
    """cpu, net or wait."""
    left: float
    weight: float
    """cpu: cores that it can use at a time."""
    worker: "_Worker"
    then: str
    """What has happened when it ends."""
    video: int = -1
    rate: float = 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker with at most one unit; videos of it are numbered in order."""

    node: "_Node"
    videos: int = 0
    fetched: int = 0
    """Fetches begun."""
    waiting: deque[int] = field(default_factory=deque)
    """Fetched videos without a decoder."""
    decoding: int = 0
    decoded: set[int] = field(default_factory=set)
    taken: int = 0
    """Videos that the model has been given or has finished."""
    batch: int = 0
    """Of them, those that it has been given last."""
    is_busy: bool = False
    """The model runs, or the unit is being committed."""


@dataclass(slots=True, eq=False)
class _Node:
    """A machine: its tasks share its cores and its network."""

    workers: list[_Worker] = field(default_factory=list)
    tasks: list[_Task] = field(default_factory=list)
    dies_at: float = math.inf


class Simulation:
    """One labelling; `run` gives the seconds until the last commit."""

    def __init__(
        self,
        work: Work,
        site: Site,
        num_videos: int,
        num_nodes: int,
        *,
        spread: float = 0.0,
        start_s: float = 0.0,
        losses_per_node_hour: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            spread: standard deviation of the videos' decoding times, as a multiple of their mean (log-normal).
            start_s: until a node's workers can work, at the beginning and after each loss.
        """
        self.work, self.site, self.start_s = work, site, start_s
        self.losses_per_s = losses_per_node_hour / 3600
        self.rng = np.random.default_rng(seed)
        self.sigma = math.sqrt(math.log1p(spread**2))
        full, rest = divmod(num_videos, work.unit)
        self.queue = deque([work.unit] * full + ([rest] if rest else []))
        self.units_left = len(self.queue)
        self.now, self.num_losses, self.cpu_s = 0.0, 0, 0.0
        self.nodes = [_Node() for _ in range(num_nodes)]
        for node in self.nodes:
            self._start(node)

    def run(self) -> float:
        """Seconds from the beginning to the last commit."""
        while self.units_left:
            for node in self.nodes:
                self._share(node)
            end = min(task.left / task.rate for node in self.nodes for task in node.tasks)
            death = min(node.dies_at for node in self.nodes) - self.now
            self._advance(max(0.0, min(end, death)))
            if death <= end:
                self._lose(min(self.nodes, key=lambda node: node.dies_at))
                continue
            for node in self.nodes:
                done = [task for task in node.tasks if task.left <= _EPSILON * (1 + self.now) * task.rate]
                node.tasks = [task for task in node.tasks if task not in done]
                for task in done:
                    self._finish(task)
        return self.now

    def _advance(self, seconds: float) -> None:
        self.now += seconds
        for node in self.nodes:
            for task in node.tasks:
                task.left -= seconds * task.rate
                self.cpu_s += seconds * task.rate * (task.kind == "cpu")

    def _share(self, node: _Node) -> None:
        """Cores and network are divided among what wants them, in proportion."""
        cpu = sum(task.weight for task in node.tasks if task.kind == "cpu")
        net = sum(1 for task in node.tasks if task.kind == "net")
        for task in node.tasks:
            if task.kind == "cpu":
                task.rate = task.weight * min(1.0, self.site.cores / cpu)
            else:
                task.rate = self.site.bytes_per_s / net if task.kind == "net" else 1.0

    def _start(self, node: _Node) -> None:
        node.workers = [_Worker(node) for _ in range(self.site.workers)]
        node.tasks = [_Task("wait", self.start_s, 0.0, worker, "started") for worker in node.workers]
        if self.losses_per_s:
            node.dies_at = self.now + self.start_s + self.rng.exponential(1 / self.losses_per_s)

    def _lose(self, node: _Node) -> None:
        """Its units go back into the queue; another node takes its place."""
        self.num_losses += 1
        self.queue.extendleft(worker.videos for worker in node.workers if worker.videos)
        self._start(node)
        for other in self.nodes:
            for worker in other.workers:
                started = not any(task.then == "started" and task.worker is worker for task in other.tasks)
                if other is not node and started and not worker.videos:
                    self._next_unit(worker)

    def _finish(self, task: _Task) -> None:
        worker = task.worker
        if task.then == "started":
            self._next_unit(worker)
        elif task.then == "fetched":
            worker.waiting.append(task.video)
        elif task.then == "decoded":
            worker.decoding -= 1
            worker.decoded.add(task.video)
        elif task.then == "host done":  # the GPU goes on where the host has prepared the batch
            self._add(worker, "wait", worker.batch * (self.work.model_s - self.work.model_cpu_s), "batch done")
        elif task.then == "batch done":
            worker.is_busy = False
        elif task.then == "committed":
            worker.is_busy = False
            self.units_left -= 1
            self._next_unit(worker)
        self._push(worker)

    def _next_unit(self, worker: _Worker) -> None:
        worker.videos = self.queue.popleft() if self.queue else 0
        worker.fetched = worker.taken = worker.decoding = 0
        worker.waiting.clear()
        worker.decoded.clear()
        self._push(worker)

    def _push(self, worker: _Worker) -> None:
        """Begin whatever can begin."""
        if not worker.videos:
            return
        self._fetch(worker)
        while worker.waiting and worker.decoding < self.work.decoders:
            worker.decoding += 1
            draw = math.exp(self.sigma * self.rng.standard_normal() - self.sigma**2 / 2) if self.sigma else 1.0
            self._add(worker, "cpu", self.work.decode_cpu_s * draw, "decoded", video=worker.waiting.popleft())
        if worker.is_busy:
            return
        if worker.taken == worker.videos:
            worker.is_busy = True
            self._add(worker, "wait", self.work.commit_s, "committed")
            return
        batch = min(max(1, round(self.work.batch)), worker.videos - worker.taken)
        if all(video in worker.decoded for video in range(worker.taken, worker.taken + batch)):
            worker.decoded.difference_update(range(worker.taken, worker.taken + batch))
            worker.batch, worker.is_busy = batch, True
            worker.taken += batch
            on_gpu = self.work.model_s > self.work.model_cpu_s
            then, weight = ("host done", 1) if on_gpu else ("batch done", self.work.threads)
            self._add(worker, "cpu", batch * self.work.model_cpu_s, then, weight=weight)
            self._push(worker)

    def _fetch(self, worker: _Worker) -> None:
        """Some videos ahead of the model: as many as fill a batch, and the decoders."""
        ahead = math.ceil(self.work.batch) + self.work.decoders + 1
        fetching = sum(1 for task in worker.node.tasks if task.worker is worker and task.then == "fetched")
        while worker.fetched < min(worker.videos, worker.taken + ahead + _FETCHES) and fetching < _FETCHES:
            if math.isinf(self.site.bytes_per_s):
                worker.waiting.append(worker.fetched)
            else:
                self._add(worker, "net", self.work.bytes_per_video, "fetched", video=worker.fetched)
                fetching += 1
            worker.fetched += 1

    def _add(self, worker: _Worker, kind: str, left: float, then: str, *, weight: float = 1.0, video: int = -1) -> None:
        worker.node.tasks.append(_Task(kind, max(left, _EPSILON), weight, worker, then, video))


def simulate(work: Work, site: Site, num_videos: int, num_nodes: int = 1, **changes: float | int) -> float:
    """Seconds until the last commit; `changes` as in Simulation."""
    return Simulation(work, site, num_videos, num_nodes, **changes).run()  # type: ignore[arg-type]
