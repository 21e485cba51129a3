"""Config trees of the verbs that send the others to a cluster and watch them there: submit, jobs, logs and stop."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import require

__all__ = ["JobsConfig", "LogsConfig", "StopConfig", "SubmitConfig", "SubmittedVerb"]

SubmittedVerb = Literal["pack", "train", "tune", "evaluate", "label"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def _check_run(name: str, value: str) -> None:
    plain = bool(_RUN_ID.fullmatch(value))
    require(plain, name, "1 to 80 letters, digits, dots, dashes and underscores", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Run a verb as a job on a Ray cluster and follow it; its exit code becomes this command's.

    Example: kinoray submit train --address http://head:8265 -- s3://bucket/set --out s3://bucket/runs/first

    What follows `--` are the verb's own flags (and its --config FILE.yaml or --preset NAME). They are checked here,
    before anything is sent. Sent are kinoray's code, the networks, what --code names, and all settings as job.yaml;
    never credentials: nodes have their own access to the bucket. Paths must be s3:// or absolute folders that all nodes
    share.

    Ctrl-C stops watching; the job goes on. The same command again (or the same --run-id) follows the running job
    instead of starting a second one, and starts it anew once it has ended: the verbs go on from what is there.

    Exit codes: 0 done, 1 the job failed, 2 a setting is wrong, 130 stopped or no longer watched, else the job's own.
    """

    verb: Annotated[SubmittedVerb, tyro.conf.Positional, tyro.conf.arg(metavar="VERB")]
    """pack, train, tune, evaluate or label."""
    flags: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- FLAGS OF THE VERB")] = ()
    """Its flags, after `--`."""
    address: str = ""
    """Where the cluster's dashboard is: http://HOST:8265, https://..., ray://HOST:10001 (its dashboard is taken to be
    on port 8265), HOST:PORT of its GCS, or auto (the cluster on this machine). Default: RAY_API_SERVER_ADDRESS, then
    RAY_ADDRESS."""
    run_id: str = ""
    """Name of the run, which makes submitting idempotent. Default: the verb and a digest of its settings."""
    retries: int = 3
    """How often a job is submitted again whose driver was killed or whose node died; others are not."""
    wait: bool = True
    """Follow the job's output to its end; --no-wait returns once it is submitted, and nobody submits it again then."""
    code: tuple[str, ...] = ()
    """Folders of Python packages of your own to send, too (a network that --model.factory names)."""
    allow_open_cluster: bool = False
    """Submit to a cluster on another machine that takes jobs from anybody who reaches it."""
    settings: Annotated[str, tyro.conf.Suppress] = ""
    """The verb's whole config as YAML; made of `flags`."""

    def __post_init__(self) -> None:
        if self.run_id:
            _check_run("run_id", self.run_id)
        require(self.retries >= 0, "retries", "at least 0", self.retries)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsConfig:
    """List the jobs that `kinoray submit` sent to a cluster: verb, status, when, how long, exit code, --out.

    Example: kinoray jobs --address http://head:8265

    A run that was submitted again after its node died is one line; TRIES says how often.
    """

    address: str = ""
    """The cluster, as in submit."""
    json: bool = False
    """One JSON object a run instead of the table, with times in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogsConfig:
    """Print what a submitted job has printed.

    Example: kinoray logs train-1f2e3d4c5b -f --address http://head:8265
    """

    run: _Run
    """The run's id, as submit and jobs print it."""
    address: str = ""
    """The cluster, as in submit."""
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on until the job ends."""
    attempt: int = 0
    """Which of its tries; 0 for the newest."""

    def __post_init__(self) -> None:
        _check_run("run", self.run)
        require(self.attempt >= 0, "attempt", "at least 0", self.attempt)


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """Stop a submitted job, wait until it has ended, and say what came of it.

    Example: kinoray stop train-1f2e3d4c5b --address http://head:8265

    Nothing finished is lost: the command that submitted it goes on from there. Exit code 1: it did not end in time.
    """

    run: _Run
    """The run's id, as submit and jobs print it."""
    address: str = ""
    """The cluster, as in submit."""
    timeout_s: float = 60.0
    """How long to wait for its end, in seconds."""

    def __post_init__(self) -> None:
        _check_run("run", self.run)
        require(self.timeout_s > 0, "timeout_s", "greater than 0", self.timeout_s)
