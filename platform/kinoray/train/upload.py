"""A thread that writes while training goes on: one job at a time, nothing piles up, no error is lost."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

__all__ = ["Uploader"]


class Uploader:
    """A context: leaving it waits for the job that is being done, and raises its error unless another is on its way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._last: Future[object] | None = None

    def ready(self) -> bool:
        """Whether a job can be submitted without waiting. Raises the error of the job before."""
        if self._last is not None and not self._last.done():
            return False
        self.wait()
        return True

    def submit(self, job: Callable[[], object]) -> None:
        """Start the job, after waiting for the one before. Raises the error of that one."""
        self.wait()
        self._last = self._pool.submit(job)

    def wait(self) -> None:
        """Return when nothing is being written. Raises the error of the last job, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        late = self._last.exception() if self._last is not None else None
        self._last = None
        if late is not None and error is None:
            raise late
        if late is not None and error is not None:
            error.add_note(f"the upload that was under way failed, too: {type(late).__name__}: {late}")
