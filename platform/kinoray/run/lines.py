"""Lines that workers have to say, printed by the driver: in order, whole, and without Ray's prefixes."""

import threading
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

__all__ = ["Lines"]

_POLL_S = 0.5


class _Box:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def post(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


class Lines:
    """A context in which the driver prints what workers post: hand `box` to them and call `box.post.remote(line)`."""

    def __init__(self) -> None:
        self.box: Any = ray.remote(num_cpus=0)(_Box).remote()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="lines", daemon=True)

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
