"""What the processes of a job tell its driver, through one actor: lines that are printed, and how far they are.

What is easy to break: nothing may depend on it. A job goes on without the actor, and only what it would say is lost.
"""

import threading
import time
from types import TracebackType
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kinoray.cluster.connect import loss_of
from kinoray.console import Notes, Progress, visible

__all__ = ["Lines", "Teller", "beside_me"]

_POLL_S = 0.5
_WAIT_S = 2.0
_MOST_A_SECOND = 200  # messages of all workers to one box
_START_S = 10.0  # for which the actor is waited for in the end, if it has said nothing yet


def beside_me(actor: type, **options: Any) -> Any:
    """A class as an actor without CPUs on the node of this process: elsewhere, the loss of any node could end the job.

    Args:
        options: of `ray.remote`.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(actor)


class Lines:
    """A context in which the driver prints what workers post: hand `box` to them and call `box.post.remote(line)`.

    Workers call `box.settle.remote(id)` with their placement group's id in hex. What they count (see Teller) goes to
    `progress`. Nothing depends on the box: without it the job goes on, and only this is lost.
    """

    def __init__(self, progress: Progress) -> None:
        self.box: Any = beside_me(Notes).remote()
        self._progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="lines", daemon=True)

    def free_place(self) -> None:
        """Remove the placement group of the workers, and what is left of them."""
        if place := ray.get(self.box.place.remote()):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(place))))

    def __enter__(self) -> "Lines":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        ray.kill(self.box)

    def _pump(self) -> None:
        done, is_there = False, False
        while not done:
            done = self._stop.wait(_POLL_S)  # what was posted before the stop is still printed
            try:
                wait_s = _START_S if done and not is_there else _WAIT_S
                lines, counts = ray.get(self.box.take.remote(), timeout=wait_s)
                is_there = True
            except GetTimeoutError:
                lines, counts = [], {}  # it is still starting
            except RayError as error:
                print(f"what workers say is no longer shown: {loss_of(error)}", flush=True)
                return
            for line in lines:
                print(visible(line), flush=True)
            for part, count in counts.items():
                self._progress.saw(part, count)
            self._progress.tick()


class Teller:
    """A worker's way to say, through a box, how much of a part of its work is done; small, and picklable.

    It says so now and then, waits for nothing, and does not mind if the box is gone.
    """

    def __init__(self, box: Any, num_workers: int) -> None:
        self._box = box
        self._every_s = max(_POLL_S, num_workers / _MOST_A_SECOND)
        self._told_s = 0.0

    def __call__(self, part: str, count: int) -> None:
        """So much of a part is done."""
        now_s = time.monotonic()
        if now_s - self._told_s >= self._every_s:
            self._told_s = now_s
            self._box.tell.remote(part, count)
