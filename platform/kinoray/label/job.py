"""The part of a labelling that is on Ray: workers that label units of work, and one row of counts from each unit.

What is easy to break: nothing is kept here. A worker that dies, or all of Ray, costs the units in flight and no more.
And nothing here grows with the catalog: a unit is taken from its iterator when a worker is about to be free for it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Thread
from types import TracebackType
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from kinoray.catalog.rows import Refusal, error_of, refusals_of_columns, report
from kinoray.cluster.connect import OUT_OF_MEMORY, connect, loss_of, require_fit
from kinoray.cluster.lines import Lines, Teller
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress, format_duration, many, visible
from kinoray.errors import ClusterError, KinorayError
from kinoray.label.open import Labelling
from kinoray.label.unit import Unit
from kinoray.label.work import LabelJob, NetworkFacts, pack_unit
from kinoray.storage.tables import leave_pandas_out

__all__ = ["LabelWorker", "Workers", "run_units"]

_MAX_DEATHS = 5  # of workers at one unit, and of workers that should start one after the other
_SAY_S = 30.0
_DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)


def run_units(
    labelling: Labelling,
    work: Iterable[tuple[Unit, pa.Table]],
    num_units: int,
    resources: WorkersConfig,
    task: str,
    progress: Progress,
    workers: "Workers | None" = None,
) -> Iterator[dict[str, Any]]:
    """Label units: one row of counts for each, as they finish (see `LabelUnits`).

    Args:
        work: each unit with its rows of the catalog (UNIT_COLUMNS); taken when a worker is about to be free for it.
        num_units: how many they are.
        progress: sees of a unit, by its id, how many of its videos are done; the units' rows are not added to it.
        workers: of this labelling. Default: others, which end with it.

    Raises:
        ClusterError: the workers cannot be placed, or died again and again.
        KinorayError: a unit could not be labelled; what is committed stays.
    """
    if workers is None:
        with Workers(resources, task) as own:
            yield from own.run(labelling.job, work, num_units, progress)
    else:
        yield from workers.run(labelling.job, work, num_units, progress)


class LabelWorker:
    """A worker, as an actor. What it imports takes seconds, so that is left to `start`, for which nobody waits."""

    def __init__(self, job: LabelJob) -> None:
        self._job = job
        self._tell: Callable[[str, int], None] = lambda unit_id, done: None
        self._units: Any = None

    def hear(self, tell: Callable[[str, int], None]) -> None:
        """Whom to tell of each video that is done."""
        self._tell = tell

    def start(self) -> NetworkFacts | Refusal:
        """Load the network; or why the job cannot go on."""
        from kinoray.video.sandbox.pool import shared_sandbox

        leave_pandas_out()
        decoders = shared_sandbox(self._job.num_decoders)
        Thread(target=decoders.warm, args=(self._job.clip.decode,), name="decoders", daemon=True).start()
        from kinoray.label.stage import LabelUnits  # here: it imports torch, while a decoder starts

        self._units = LabelUnits(self._job, lambda unit_id, done: self._tell(unit_id, done))
        try:
            facts: NetworkFacts = self._units.videos.load()
        except KinorayError as error:
            return report(error, "label")
        return facts

    def label(self, unit: dict[str, Any]) -> tuple[dict[str, Any], Refusal | None]:
        """The counts of a unit (see `pack_unit`), or why the job cannot go on."""
        table = self._units(pa.Table.from_pylist([unit]))
        (counts,) = table.to_pylist()
        (failure,) = refusals_of_columns(table.to_pydict())
        return dict(counts), failure


@dataclass(slots=True)
class _Given:
    """A unit, until it is done."""

    unit_id: str
    packed: dict[str, Any]
    num_deaths: int = 0
    """Of workers that had it."""


@dataclass(slots=True)
class _Turn:
    """What a worker is at."""

    worker: Any
    given: _Given | None
    """None while it starts."""
    num_deaths: int = 0
    """Of workers in its place that did not start."""


class Workers:
    """A context in which the workers of one labelling run: actors, each with one unit at most.

    So no unit waits behind a slow one, or for a worker that has no place. They start with `look` or `run`.
    """

    def __init__(self, resources: WorkersConfig, task: str) -> None:
        self._resources, self._task = resources, task
        self._new: Callable[[], Any] | None = None
        self._tell: Teller | None = None
        self._facts: NetworkFacts | None = None
        self._turns: dict[Any, _Turn] = {}
        """By the reference to what the worker will say."""
        self._free: deque[Any] = deque()
        self._ahead: deque[_Given] = deque()
        """Units that come next: those of workers that died, and one of `work`."""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._all():
            ray.kill(worker)

    def _all(self) -> list[Any]:
        return [*self._free, *(turn.worker for turn in self._turns.values())]

    def look(self, job: LabelJob, num_units: int) -> NetworkFacts:
        """What only the network knows, as soon as one worker has loaded it. Raises as `run_units`.

        Args:
            num_units: how many will be labelled: there are no more workers than that.
        """
        self._begin(job, num_units)
        while self._facts is None:
            list(self._settle(self._wait()))
        return self._facts

    def run(
        self, job: LabelJob, work: Iterable[tuple[Unit, pa.Table]], num_units: int, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """The counts of each unit as they finish. Arguments and errors as of `run_units`."""
        packed = (_Given(unit.unit_id, pack_unit(unit, rows)) for unit, rows in work)
        is_new = self._new is None
        if is_new:
            self._begin(job, num_units)
        with Lines(progress) as lines:
            self._tell = Teller(lines.box, len(self._all()))
            for worker in self._all():
                worker.hear.remote(self._tell)
            while True:
                while self._prefetch(packed) and self._free:
                    self._give(self._free.popleft(), self._ahead.popleft())
                if not self._ahead and not self._at_work():
                    return
                yield from self._settle(self._wait())
                if is_new and self._facts is not None:
                    is_new = False
                    for line in self._facts.advice:
                        print(f"{self._task}: {visible(line)}", flush=True)

    def _begin(self, job: LabelJob, num_units: int) -> None:
        connect(self._resources)
        require_fit(self._resources)
        actor = ray.remote(
            num_cpus=self._resources.cpus_per_worker,
            num_gpus=self._resources.gpus_per_worker,
            max_restarts=0,  # who is lost is replaced here: a unit may not wait for a restart that has no place
            scheduling_strategy="SPREAD",
        )(LabelWorker)
        self._new = partial(actor.remote, job)
        num_workers = min(self._resources.num_workers, num_units)
        load = "worker loads" if num_workers == 1 else "workers load"
        print(f"{self._task}: {num_workers} {load} the network", flush=True)
        for _ in range(num_workers):
            self._start()

    def _prefetch(self, packed: Iterator[_Given]) -> bool:
        """See to it that a unit is at hand; whether there is one."""
        if not self._ahead:
            self._ahead.extend(islice(packed, 1))
        return bool(self._ahead)

    def _at_work(self) -> bool:
        return any(turn.given is not None for turn in self._turns.values())

    def _start(self, num_deaths: int = 0) -> None:
        assert self._new is not None
        worker = self._new()
        if self._tell is not None:
            worker.hear.remote(self._tell)
        self._turns[worker.start.remote()] = _Turn(worker, None, num_deaths)

    def _give(self, worker: Any, given: _Given) -> None:
        self._turns[worker.label.remote(given.packed)] = _Turn(worker, given)

    def _wait(self) -> Any:
        """The reference to something that a worker has said, or to the loss of a worker."""
        begun_s = time.monotonic()
        while True:
            ready, _ = ray.wait(list(self._turns), num_returns=1, timeout=_SAY_S)
            if ready:
                return ready[0]
            if not self._at_work():
                waited = format_duration(time.monotonic() - begun_s)
                print(f"{self._task}: no worker is ready yet after {waited}", flush=True)

    def _settle(self, reference: Any) -> Iterator[dict[str, Any]]:
        """Hear what a worker says: the counts of its unit, if it had one."""
        turn = self._turns.pop(reference)
        try:
            said = ray.get(reference)
        except RayTaskError:
            raise  # a bug: its traceback is what is needed
        except _DEATHS as error:
            if getattr(error, "actor_init_failed", False):
                raise  # a bug, too
            self._replace(turn, error)
            return
        except RayError as error:
            raise ClusterError(f"the workers were lost: {loss_of(error)}; {_GO_ON}") from error
        self._free.append(turn.worker)
        if turn.given is None:
            if isinstance(said, Refusal):
                raise error_of(said)
            self._facts = self._facts or said
            return
        counts, failure = said
        if failure is not None:
            raise error_of(failure)
        yield counts

    def _replace(self, turn: _Turn, error: RayError) -> None:
        """Start another worker for one that is gone, and have its unit done again, before all others."""
        ray.kill(turn.worker)  # it may only be out of reach
        given, num_deaths = turn.given, turn.num_deaths + 1
        what = f"{many(num_deaths, 'worker')} in a row died before they were there"
        if given is not None:
            given.num_deaths += 1
            self._ahead.appendleft(given)
            num_deaths = given.num_deaths
            videos = many(len(given.packed["keys"]), "video")
            what = f"{many(num_deaths, 'worker')} died at the same unit, {given.unit_id} ({videos})"
        if num_deaths >= _MAX_DEATHS:
            loss = loss_of(error)
            remedy = ", with fewer resources.num_workers or decoders_per_worker" if loss == OUT_OF_MEMORY else ""
            raise ClusterError(f"{what}: {visible(loss)}; {_GO_ON}{remedy}") from error
        if given is not None:
            print(f"{self._task}: a worker was lost, and its unit is done again: {visible(loss_of(error))}", flush=True)
        self._start(0 if given else num_deaths)


_GO_ON = "what is committed stays, run the same command again"
