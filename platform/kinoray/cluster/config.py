"""Config tree of `submit`, which sends other verbs to a cluster and watches them there."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from kinoray.config.shared import require

__all__ = ["SubmitConfig", "SubmittedVerb"]

SubmittedVerb = Literal["pack", "train", "tune", "evaluate", "label"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Run a verb as a job on a Ray cluster and follow it; its exit code becomes this command's.

    Example: kinoray submit train --address http://head:8265 -- s3://bucket/set --out s3://bucket/runs/first

    What follows `--` are the verb's own flags (and its --config FILE.yaml or --preset NAME). They are checked here,
    before anything is sent. Sent are kinoray's code, the networks, what --code names, and all settings as job.yaml;
    never credentials: nodes have their own access to the bucket. Paths must be s3:// or absolute folders that all nodes
    share.

    Ctrl-C stops watching; the job goes on. The same command again (or the same --run-id) follows the running job
    instead of starting a second one, and starts it anew once it has ended: the verbs go on from what is there. A job
    whose driver was killed or whose node died is submitted again, three times at most; others are not. Ray's
    own commands list, show and stop what was submitted: ray job list, ray job logs RUN --follow, ray job stop RUN.

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
    wait: bool = True
    """Follow the job's output to its end; --no-wait returns once it is submitted, and nobody submits it again then."""
    code: tuple[str, ...] = ()
    """Folders of Python packages of your own to send, too (a network that --model.factory names)."""
    allow_open_cluster: bool = False
    """Submit to a cluster on another machine that takes jobs from anybody who reaches it."""
    settings: Annotated[str, tyro.conf.Suppress] = ""
    """The verb's whole config as YAML; made of `flags`."""

    def __post_init__(self) -> None:
        plain = not self.run_id or bool(_RUN_ID.fullmatch(self.run_id))
        require(plain, "run_id", "1 to 80 letters, digits, dots, dashes and underscores", self.run_id)
