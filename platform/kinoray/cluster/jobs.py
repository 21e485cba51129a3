"""`kinoray jobs`, `logs` and `stop`: the jobs that `kinoray submit` sent to a cluster, as the cluster knows them.

They read and stop; they submit nothing. Easy to break: metadata is what anybody who may submit wrote there, so none of
it reaches the terminal as it is.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kinoray.cluster.client import Attempt, JobsClient, Status
from kinoray.cluster.config import JobsConfig, LogsConfig, StopConfig
from kinoray.cluster.follow import follow, how_it_ended
from kinoray.console import format_duration
from kinoray.errors import ConfigError
from kinoray.terminal import exact_stdout

__all__ = ["RunOnCluster", "jobs", "logs", "stop"]

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOnCluster:
    """A run: its newest try, and what holds for all of them."""

    run: str
    verb: str
    status: Status
    tries: int
    started_s: float
    """Of the first try, in seconds since 1970; 0 before it starts."""
    duration_s: float
    """From there to the end of the newest try, or to now."""
    exit_code: int | None
    """None while it runs."""
    out: str
    submission_id: str
    """Of the newest try: what Ray's own tools call it."""
    message: str
    """What Ray says of it; one line."""


def jobs(config: JobsConfig) -> list[RunOnCluster]:
    """Print the runs on the cluster, the newest last, and return them.

    Raises:
        ClusterError: the cluster does not answer, or does not take the token.
    """
    client = JobsClient(config.address, allow_open=True)
    found = _runs(client.attempts(), time.time())
    if config.json:
        for run in found:
            print(json.dumps(asdict(run)))
    elif not found:
        print(f"no job of kinoray at {client.url} (a cluster forgets its jobs when its head is replaced)")
    else:
        print(_table(found))
    return found


def logs(config: LogsConfig) -> None:
    """Print the run's output, with --follow to its end.

    Raises:
        ConfigError: the cluster does not know the run.
        ClusterError: the cluster does not answer.
    """
    client = JobsClient(config.address, allow_open=True)
    tries = {one.number: one for one in _known(client, config.run)}
    number = config.attempt or max(tries)
    if number not in tries:
        raise ConfigError(f"attempt must be one of {', '.join(map(str, tries))} for {config.run}, got {number}")
    if not config.follow:
        print(client.logs(tries[number].submission_id), end="", file=exact_stdout())
        return
    end = follow(client, tries[number])
    print(f"kinoray logs: {tries[number].submission_id}: {how_it_ended(end)}", file=sys.stderr)


def stop(config: StopConfig) -> int:
    """Stop the run's newest try and wait for its end; 1 if it did not come within config.timeout_s.

    Raises:
        ConfigError: the cluster does not know the run.
        ClusterError: the cluster does not answer.
    """
    client = JobsClient(config.address, allow_open=True)
    newest = _known(client, config.run)[-1]
    if newest.ended:
        print(f"{newest.submission_id} had ended before: {how_it_ended(newest)}")
        return 0
    client.stop(newest.submission_id)
    begin_s = time.monotonic()
    end: Attempt | None = newest
    while end is not None and not end.ended:
        if time.monotonic() - begin_s > config.timeout_s:
            print(f"{newest.submission_id} is {end.status.lower()} after {config.timeout_s:g} s; it may need more")
            return 1
        time.sleep(_POLL_S)
        end = client.attempt(newest.submission_id)
    print(f"{newest.submission_id}: {how_it_ended(end)}, after {format_duration(time.monotonic() - begin_s)}")
    return 0


def _known(client: JobsClient, run: str) -> list[Attempt]:
    """The run's tries, oldest first; the id may be that of a try, too."""
    found = client.attempts()
    own = [one for one in found if one.run == run] or [one for one in found if one.submission_id == run]
    if not own:
        known = ", ".join(dict.fromkeys(one.run for one in reversed(found))) or "none"
        raise ConfigError(f"run must be one that {client.url} knows (newest first: {_plain(known)}), got {run!r}")
    return sorted(own, key=lambda one: one.number)


def _runs(attempts: Sequence[Attempt], now_s: float) -> list[RunOnCluster]:
    """The runs of a cluster's submissions, the newest last."""
    groups: dict[str, list[Attempt]] = {}
    for one in attempts:
        groups.setdefault(one.run, []).append(one)
    found = []
    for run, tries in groups.items():
        newest, started_s = max(tries, key=lambda one: one.number), min(one.started_s for one in tries)
        found.append(
            RunOnCluster(
                run=run,
                verb=newest.verb,
                status=newest.status,
                tries=len(tries),
                started_s=started_s,
                duration_s=max(0.0, (newest.ended_s or now_s) - started_s) if started_s else 0.0,
                exit_code=newest.exit_code,
                out=newest.out,
                submission_id=newest.submission_id,
                message=newest.message,
            )
        )
    return sorted(found, key=lambda run: (run.started_s, run.run))


def _table(found: Sequence[RunOnCluster]) -> str:
    rows = [("RUN", "VERB", "STATUS", "TRIES", "STARTED", "TOOK", "EXIT", "OUT")]
    for run in found:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_s)) if run.started_s else ""
        code = "" if run.exit_code is None else str(run.exit_code)
        took = format_duration(run.duration_s)
        cells = (run.run, run.verb, run.status.lower(), str(run.tries), started, took, code, run.out)
        rows.append(tuple(map(_plain, cells)))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that does nothing to a terminal but show."""
    return "".join(character if character.isprintable() else "?" for character in text)
