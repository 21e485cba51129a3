"""The part of a labelling that is on Ray: workers that label units of work, and one row of counts from each unit.

What is easy to break: nothing is kept here. A worker that dies, or all of Ray, costs the units in flight and no more.
And nothing here grows with the catalog: a unit is taken from its iterator when a worker is about to be free for it.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
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

from kinoray.catalog.quarantine import Refusal, error_of, refusals_of_columns
from kinoray.cluster.connect import OUT_OF_MEMORY, Lines, Teller, connect, loss_of, require_fit
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress, format_duration, many, visible
from kinoray.errors import ClusterError
from kinoray.label.open import Labelling
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.unit import Unit

__all__ = ["LabelWorker", "run_units"]

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
) -> Iterator[dict[str, Any]]:
    """Label units: one row of counts for each, as they finish (see `LabelUnits`).

    Args:
        work: each unit with its rows of the catalog (UNIT_COLUMNS); taken when a worker is about to be free for it.
        num_units: how many they are.
        progress: sees of a unit, by its id, how many of its videos are done; the units' rows are not added to it.

    Raises:
        ClusterError: the workers cannot be placed, or died again and again.
        KinorayError: a unit could not be labelled; what is committed stays.
    """
    connect(resources)
    require_fit(resources)
    num_workers = min(resources.num_workers, num_units)
    with Lines(progress) as lines:
        print(f"{task}: {many(num_workers, 'worker')} load{'s' if num_workers == 1 else ''} the network", flush=True)
        yield from _Pool(labelling.job, Teller(lines.box, num_workers), num_workers, resources, task).run(work)


class LabelWorker:
    """A worker, as an actor."""

    def __init__(self, job: LabelJob, tell: Teller | None = None) -> None:
        self._units = LabelUnits(job, tell) if tell else LabelUnits(job)

    def start(self) -> None:
        """Nothing: who hears that it is done knows that the worker has a place, and runs."""

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


class _Pool:
    """Actors, each with one unit at most, so that no unit waits behind a slow one or for a worker without a place."""

    def __init__(self, job: LabelJob, tell: Teller, num_workers: int, resources: WorkersConfig, task: str) -> None:
        self._job, self._tell, self._num_workers, self._task = job, tell, num_workers, task
        self._actor = ray.remote(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            max_restarts=0,  # who is lost is replaced here: a unit may not wait for a restart that has no place
            scheduling_strategy="SPREAD",
        )(LabelWorker)
        self._turns: dict[Any, _Turn] = {}
        """By the reference to what the worker will say."""
        self._free: deque[Any] = deque()
        self._ahead: deque[_Given] = deque()
        """Units that come next: those of workers that died, and one of `work`."""

    def run(self, work: Iterable[tuple[Unit, pa.Table]]) -> Iterator[dict[str, Any]]:
        """The counts of each unit as they finish. Raises as `run_units`."""
        packed = (_Given(unit.unit_id, pack_unit(unit, rows)) for unit, rows in work)
        try:
            for _ in range(self._num_workers):
                self._start()
            while True:
                while self._prefetch(packed) and self._free:
                    self._give(self._free.popleft(), self._ahead.popleft())
                if not self._ahead and not self._at_work():
                    return
                yield from self._settle(self._wait())
        finally:
            for worker in [*self._free, *(turn.worker for turn in self._turns.values())]:
                ray.kill(worker)

    def _prefetch(self, packed: Iterator[_Given]) -> bool:
        """See to it that a unit is at hand; whether there is one."""
        if not self._ahead:
            self._ahead.extend(islice(packed, 1))
        return bool(self._ahead)

    def _at_work(self) -> bool:
        return any(turn.given is not None for turn in self._turns.values())

    def _start(self, num_deaths: int = 0) -> None:
        worker = self._actor.remote(self._job, self._tell)
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
                print(f"{self._task}: no worker runs yet; the cluster has not started them in {waited}", flush=True)

    def _settle(self, reference: Any) -> Iterator[dict[str, Any]]:
        """Hear what a worker says: the counts of its unit, if it had one."""
        turn = self._turns.pop(reference)
        try:
            said = ray.get(reference)
        except RayTaskError:
            raise  # a bug: its traceback is what is needed
        except _DEATHS as error:
            self._replace(turn, error)
            return
        except RayError as error:
            raise ClusterError(f"the workers were lost: {loss_of(error)}; {_GO_ON}") from error
        self._free.append(turn.worker)
        if turn.given is not None:
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
