"""What workers tell the driver: lines that it prints, in order, whole and without prefixes; and where they live.

Ray keeps the place of workers whose controller was killed until the whole job ends: `free_place` gives it back.
"""

import threading
from types import TracebackType
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["Lines", "beside_me"]

_POLL_S = 0.5


def beside_me(actor: type, **options: Any) -> Any:
    """A class as an actor without CPUs on the node of this process: elsewhere, the loss of any node could end the job.

    Args:
        options: of `ray.remote`.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, **options)(actor)


class _Box:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._place = ""

    def settle(self, place: str) -> None:
        self._place = place

    def place(self) -> str:
        return self._place

    def post(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


class Lines:
    """A context in which the driver prints what workers post: hand `box` to them and call `box.post.remote(line)`.

    Workers call `box.settle.remote(id)` with their placement group's id in hex.
    """

    def __init__(self) -> None:
        self.box: Any = beside_me(_Box).remote()
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
        done = False
        while not done:
            done = self._stop.wait(_POLL_S)  # what was posted before the stop is still printed
            try:
                for line in ray.get(self.box.take.remote()):
                    print(line, flush=True)
            except RayError as error:
                print(f"progress is no longer shown: {str(error).splitlines()[0]}", flush=True)
                return
