"""Following a job: its output as it comes, until it has ended, through broken connections.

Easy to break: after a break the output comes from its beginning again; what was printed is not printed twice.
"""

import asyncio
import time
from contextlib import suppress
from typing import TextIO

from kinoray.cluster.client import Attempt, JobsClient, NoAnswer
from kinoray.console import exact_stdout
from kinoray.errors import ClusterError

__all__ = ["follow", "how_it_ended"]

_POLL_S = 1.0
_DRAIN_S = 10.0
_SILENCE_S = 300.0  # a head that is replaced is back by then


def follow(jobs: JobsClient, attempt: Attempt, *, stream: TextIO | None = None) -> Attempt | None:
    """Copy the job's output until it ends; how it stands then. None where the cluster forgot it (a new head).

    Raises:
        ClusterError: the cluster gave no answer for five minutes. The job may go on.
    """
    return asyncio.run(_follow(jobs, attempt, stream or exact_stdout()))


async def _follow(jobs: JobsClient, attempt: Attempt, stream: TextIO) -> Attempt | None:
    output = _Output(jobs, attempt.submission_id, stream)
    copying = asyncio.create_task(output.copy())
    heard_s = time.monotonic()
    try:
        while True:
            try:
                now = await asyncio.to_thread(jobs.attempt, attempt.submission_id)
                heard_s = time.monotonic()
            except NoAnswer as error:
                if time.monotonic() - heard_s > _SILENCE_S:
                    raise ClusterError(
                        f"{error}; for {_SILENCE_S:g} s now. The job may go on: the same command follows it again"
                    ) from error
            else:
                if now is None or now.ended:
                    break
                if copying.done():
                    copying.result()  # an output that nobody reads any more ends this
                    copying = asyncio.create_task(output.copy())
            await asyncio.wait({copying}, timeout=_POLL_S)
            await asyncio.sleep(_POLL_S / 4)  # where copying fails at once
        if now is not None:
            if copying.done() and not output.complete:
                copying = asyncio.create_task(output.copy())
            await asyncio.wait({copying}, timeout=_DRAIN_S)
        return now
    finally:
        copying.cancel()
        with suppress(asyncio.CancelledError):
            await copying
        output.close()


class _Output:
    """What a job prints, copied to a stream once."""

    def __init__(self, jobs: JobsClient, submission_id: str, stream: TextIO) -> None:
        self._jobs, self._submission_id, self._stream = jobs, submission_id, stream
        self._printed = 0
        self._in_line = False
        self.complete = False

    async def copy(self) -> None:
        """From where the last copying stopped to the end, or to the next break."""
        place, self.complete = 0, False
        with suppress(NoAnswer):
            async for text in self._jobs.tail(self._submission_id):
                fresh = text[max(0, self._printed - place) :]
                place += len(text)
                self._printed = max(self._printed, place)
                if fresh:
                    self._stream.write(fresh)
                    self._stream.flush()
                    self._in_line = not fresh.endswith("\n")
            self.complete = True

    def close(self) -> None:
        """End the last line, so that ours is not glued to it."""
        if self._in_line:
            self._stream.write("\n")
            self._stream.flush()


def how_it_ended(end: Attempt | None) -> str:
    """In words."""
    if end is None:
        return "the cluster does not know it any more (its head was replaced)"
    if end.status == "SUCCEEDED":
        return "done"
    if end.status == "STOPPED":
        return "was stopped"
    if end.was_killed:
        by = f"signal {end.exit_code - 128}" if end.driver_code is not None and end.exit_code else end.message
        return f"was killed ({by})"
    if end.driver_code is None:
        return f"did not start: {end.message}"
    what = "a setting is wrong" if end.exit_code == 2 else "the job failed"
    return f"{what} (exit code {end.exit_code}); its last lines say why"
