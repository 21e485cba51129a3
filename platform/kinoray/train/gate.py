"""Between a training run and what watches it: after each epoch the run shows its row and waits to hear if it goes on.

One Desk serves all trials of a sweep. It belongs to the process that made it, so it outlives a trial's process, and can
say what a trial that died has left behind. Easy to break: a run that is no longer watched must end, not wait for ever.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from kinoray.cluster.connect import beside_me
from kinoray.train.runfolder import EpochRow

__all__ = ["Desk", "Gate", "open_desk"]


class _Run:
    """One run: the row that waits for a verdict, and the placement group of the run's workers."""

    def __init__(self) -> None:
        self.rows: asyncio.Queue[EpochRow | None] = asyncio.Queue()
        self.verdict: asyncio.Future[bool] | None = None
        self.stopping = False
        self.group = ""


class Desk:
    """The actor behind gates; see Gate for what its methods are for."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    async def take_over(self, name: str) -> str:
        """A new watcher: what the last one left ends. Returns the placement group of its workers, or ""."""
        last = self._runs.pop(name, None)
        if last is None:
            return ""
        self._answer(last, False)
        return last.group

    async def begin(self, name: str) -> None:
        """A run starts that shows its rows under this name."""
        self._runs[name] = _Run()

    async def attach(self, name: str, group: str) -> None:
        """The workers of the run live in this placement group."""
        self._runs[name].group = group

    async def ask(self, name: str, row: EpochRow) -> bool:
        """Show a row; returns, once the watcher has decided, whether to go on."""
        run = self._runs[name]
        if run.stopping:
            return False
        run.verdict = asyncio.get_running_loop().create_future()
        run.rows.put_nowait(row)
        return await run.verdict

    async def take(self, name: str) -> EpochRow | None:
        """The next row, once there is one; None after `end`."""
        return await self._runs[name].rows.get()

    async def answer(self, name: str, go_on: bool) -> None:
        """Let the run go on from the row that was taken last, or end it there or at its next row."""
        run = self._runs[name]
        run.stopping = run.stopping or not go_on
        self._answer(run, go_on)

    async def end(self, name: str) -> None:
        """The run is over, however it ended."""
        self._runs[name].group = ""
        self._runs[name].rows.put_nowait(None)

    def _answer(self, run: _Run, go_on: bool) -> None:
        if run.verdict is not None and not run.verdict.done():
            run.verdict.set_result(go_on)


def open_desk() -> Any:
    """An actor handle of a Desk that ends with this process."""
    # Every run may wait in `ask` and its watcher in `take`.
    return beside_me(Desk, max_concurrency=10_000).remote()


@dataclass(frozen=True, slots=True)
class Gate:
    """A run's way to a Desk; small, and picklable to the workers."""

    desk: Any
    name: str

    def take_over(self) -> None:
        """Watch from now on. Workers of a watcher that died lose their place: Ray keeps it until the whole job ends."""
        group = ray.get(self.desk.take_over.remote(self.name))
        if group:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))

    def begin(self) -> None:
        """A run is about to start."""
        ray.get(self.desk.begin.remote(self.name))

    def attach(self) -> None:
        """Called by a worker: remember the placement group that it runs in."""
        group = get_current_placement_group()
        if group is not None:
            ray.get(self.desk.attach.remote(self.name, group.id.hex()))

    def go_on(self, row: EpochRow) -> bool:
        """Called by a worker after an epoch, with its row: whether to train another."""
        return bool(ray.get(self.desk.ask.remote(self.name, row)))

    def take(self) -> EpochRow | None:
        """Wait for the next epoch's row; None when the run is over."""
        row: EpochRow | None = ray.get(self.desk.take.remote(self.name))
        return row

    def answer(self, go_on: bool) -> None:
        """Let the run train on, or end it after the epoch it is in."""
        ray.get(self.desk.answer.remote(self.name, go_on))

    def end(self) -> None:
        """The run is over."""
        ray.get(self.desk.end.remote(self.name))
