"""`kinoray submit`: a verb as a job on a cluster, followed to its end, and submitted again if its driver was killed.

A run is one or more tries with the same settings: the first has the run's id as submission id, the others that and
-try2, -try3. Ray takes an id once, so two submitters of one run meet on one job.
"""

import sys
from pathlib import Path

from kinoray.cluster.client import Attempt, JobsClient
from kinoray.cluster.config import SubmitConfig
from kinoray.cluster.follow import follow, how_it_ended
from kinoray.cluster.package import build_folder, check_settings, entrypoint, metadata, read_settings, runtime_env
from kinoray.config.shared import digest
from kinoray.errors import ClusterError, ConfigError
from kinoray.storage.leftovers import scratch_folder

__all__ = ["submit"]

_INTERRUPTED = 130


def submit(config: SubmitConfig) -> int:
    """Run the verb on the cluster and return its exit code; 0 with --no-wait once it is submitted.

    Raises:
        ConfigError: a setting cannot work there, shows a secret, or the cluster is open. Nothing was submitted.
        ClusterError: the cluster does not answer, or refuses.
    """
    settings = read_settings(config)
    check_settings(settings)
    run = config.run_id or f"{config.verb}-{digest([settings, list(config.code)])[:10]}"
    jobs = JobsClient(config.address, allow_open=config.allow_open_cluster)
    if jobs.warning:
        _say(f"warning: {jobs.warning}")
    attempt = _running(jobs, run, digest(settings)) or _start(jobs, config, run)
    if not config.wait:
        _say(f"{run} is {attempt.status.lower()}. {_hints(jobs, attempt)}")
        return 0
    try:
        return _see_through(jobs, config, attempt)
    except KeyboardInterrupt:
        _say(f"no longer watched; the job goes on. {_hints(jobs, attempt)}")
        return _INTERRUPTED


def _see_through(jobs: JobsClient, config: SubmitConfig, attempt: Attempt) -> int:
    """Follow the try to its end, and the tries after it; the exit code of the last."""
    for left in range(config.retries, -1, -1):
        end = follow(jobs, attempt)
        lost = end is None or end.was_killed
        said = f"{attempt.submission_id}: {how_it_ended(end)}"
        if not (lost and left):
            _say(said + (f"; --retries {config.retries} are used up" if lost and config.retries else ""))
            return 1 if end is None or end.exit_code is None else end.exit_code
        _say(f"{said}; submitted again, {left - 1} more retries left")
        attempt = _running(jobs, attempt.run, attempt.settings) or _start(jobs, config, attempt.run)
    raise AssertionError("the loop returns in its last round")


def _running(jobs: JobsClient, run: str, settings: str) -> Attempt | None:
    """The run's try that has not ended yet, if it is the same job."""
    active = [one for one in jobs.run(run) if not one.ended]
    if not active:
        return None
    if active[-1].settings != settings:
        stop = f"ray job stop {active[-1].submission_id}"
        raise ConfigError(f"run_id: {run} is running with other settings; stop it ({stop}) or name another")
    _say(f"{active[-1].submission_id} is {active[-1].status.lower()} already; following it")
    return active[-1]


def _start(jobs: JobsClient, config: SubmitConfig, run: str) -> Attempt:
    """Submit the run's next try."""
    number = max((one.number for one in jobs.run(run)), default=0) + 1
    submission_id = run if number == 1 else f"{run}-try{number}"
    with scratch_folder("submit") as folder:
        build_folder(Path(folder), config)
        said = metadata(config, run, number)
        is_new = jobs.submit(submission_id, entrypoint(config), runtime_env(Path(folder)), said)
    attempt = jobs.attempt(submission_id)
    if attempt is None:
        raise ClusterError(f"{jobs.url} took {submission_id} and does not list it; was its head replaced just now?")
    if attempt.settings != said["kinoray_settings"]:
        raise ConfigError(f"run_id: {run} was submitted with other settings just now; name another")
    _say(f"{submission_id} {'submitted to' if is_new else 'was submitted by another command to'} {jobs.url}")
    return attempt


def _hints(jobs: JobsClient, attempt: Attempt) -> str:
    name, at = attempt.submission_id, f"--address {jobs.url}"
    return f"Follow it: the same command again, or ray job logs {name} --follow {at}; stop it: ray job stop {name} {at}"


def _say(text: str) -> None:
    print(f"kinoray submit: {text}", file=sys.stderr, flush=True)
