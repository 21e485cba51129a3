"""The driver's word on its run: status.json, written again and again while it works, and once more when it ends.

The word of a driver that was killed stays "running": kinoray.train.runs looks at how old it is.
"""

import json
import threading
import time
from dataclasses import replace
from types import TracebackType

from kinoray.errors import ObjectNotFound, StorageError, StorageUnavailable
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json
from kinoray.train.runs import BEAT_S, STATUS_FILE, State

__all__ = ["Heartbeat"]

_HASTE_S = 5.0  # for a word that is said again soon, or that must not hold up the news that the store is down


class Heartbeat:
    """A context around the work of a run in folder `out`; `stopped` says that it ends before its last epoch."""

    def __init__(self, storage: Storage, out: str, every_s: float = BEAT_S) -> None:
        self._storage, self._uri, self._every_s = storage, join(out, STATUS_FILE), every_s
        hasty = replace(storage.config, retry_s=min(_HASTE_S, storage.config.retry_s))
        self._hasty_storage = replace(storage, config=hasty)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.stopped = False

    def __enter__(self) -> "Heartbeat":
        """Raises StorageError: the run folder cannot be written."""
        self._started_s = self._first_start()
        self._write(self._storage, "running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        if error is None or self.stopped:
            self._try(self._storage, "stopped" if self.stopped else "finished")
        elif isinstance(error, Exception):
            storage = self._hasty_storage if isinstance(error, StorageUnavailable) else self._storage
            self._try(storage, "failed", " ".join(f"{type(error).__name__}: {error}".split()))
        else:  # Ctrl-C and its like
            self._try(self._hasty_storage, "stopped")

    def _first_start(self) -> float:
        """When a run that is resumed was started first."""
        try:
            return float(parse_json(self._storage.read(self._uri, max_bytes=MAX_RECORD_BYTES))["started_s"])
        except ObjectNotFound:
            return time.time()
        except (ValueError, KeyError, TypeError) as error:
            print(f"{self._uri} cannot be read ({error}) and is written anew", flush=True)
            return time.time()

    def _beat(self) -> None:
        while not self._end.wait(self._every_s):
            self._try(self._hasty_storage, "running")

    def _try(self, storage: Storage, state: State, error: str = "") -> None:
        """Write; a store that refuses must not end a training, nor hide how it ended."""
        try:
            self._write(storage, state, error)
        except StorageError as problem:
            print(f"{self._uri} does not say that the run is {state}: {problem}", flush=True)

    def _write(self, storage: Storage, state: State, error: str = "") -> None:
        content = {"state": state, "error": error, "started_s": self._started_s}
        storage.put(self._uri, (json.dumps(content) + "\n").encode())
