"""Whether a cluster can be used and trusted: it answers, it is closed, and each of its nodes can work.

    dashboard -> open or closed -> token -> a job -> a task on each node -> checks

What is easy to break: nothing is sent to an open cluster on another machine, neither a token nor code.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from kinoray import __version__
from kinoray.cluster.client import Attempt, JobsClient, find_token, find_url, is_here, is_open
from kinoray.console import many
from kinoray.doctor.config import Check, Section, checked, clock_check, over_nodes
from kinoray.doctor.host import MARK, host_facts
from kinoray.doctor.machine import host_checks, version_checks
from kinoray.errors import ClusterError, ConfigError
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.records import parse_record

__all__ = ["cluster_section"]

_MODULES = (
    "kinoray",
    "kinoray.doctor",
    "kinoray.doctor.host",
)
_JOB_S = 180.0
_POLL_S = 0.5


def cluster_section(address: str) -> Section:
    """Examine the cluster at an address as `kinoray submit` takes it; "" for that of the environment.

    Raises:
        ConfigError: the address is malformed, or there is none.
    """
    checks: list[Check] = []
    try:
        url = find_url(address)
        is_opened = is_open(url)
    except ClusterError as error:
        return checked("cluster", [Check("answer", "wrong", str(error))], address=address)
    checks += [Check("answer", "ok", url), _closed(url, is_opened=is_opened), _token(url, is_opened=is_opened)]
    found: dict[str, Any] = {"nodes": []}
    if all(check.status != "wrong" for check in checks):
        try:
            before_s = time.time()
            found = _ask_nodes(url)
            checks += _node_checks(found, before_s, time.time())
        except ClusterError as error:
            checks.append(Check("job", "wrong", str(error)))
    return checked("cluster", checks, address=url, is_open=is_opened, nodes=found["nodes"])


def _closed(url: str, *, is_opened: bool) -> Check:
    name, text = "closed", "a request without a token is answered: whoever reaches it runs code there"
    if not is_opened:
        return Check(name, "ok", "a request without a token is refused")
    remedy = "start all nodes with RAY_AUTH_MODE=token and a token (docs/cluster.md)"
    if is_here(url):
        return Check(name, "warning", f"{text}, as far as this machine can be reached", remedy)
    return Check(name, "wrong", text, f"{remedy}; its nodes were not looked at, since that would send it code")


def _token(url: str, *, is_opened: bool) -> Check:
    if is_opened:
        return Check("token", "ok", "none is asked for, and none was sent")
    try:
        find_token(url)
    except (ClusterError, ConfigError) as error:  # both name the file and the remedy
        return Check("token", "wrong", str(error))
    return Check("token", "ok", "there is one, and only its owner can read it")


def _ask_nodes(url: str) -> dict[str, Any]:
    """What host.py says, as a job on the cluster.

    Raises:
        ClusterError: the job is refused, fails, or is not over in three minutes.
    """
    jobs = JobsClient(url, allow_open=True)
    run = f"doctor-{uuid4().hex[:12]}"
    about = {"kinoray_run": run, "kinoray_verb": "doctor", "kinoray_attempt": "1", "kinoray_version": __version__}
    with scratch_folder("doctor") as folder:
        _copy_modules(Path(folder))
        jobs.submit(run, f"python -m {_MODULES[-1]}", {"working_dir": folder}, about)
    end = _wait(jobs, run)
    output = jobs.logs(run)
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    if end.status != "SUCCEEDED" or not lines:
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), end.message)
        raise ClusterError(f"job {run} {end.status.lower()}: {last}; `ray job logs {run} --address {url}` says more")
    return parse_record(lines[-1].encode(), f"the answer of job {run}", dict)


def _copy_modules(folder: Path) -> None:
    for name in _MODULES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ClusterError(f"{name} has no file to send; install kinoray as files, not as a zip")
        source = Path(spec.origin)
        parts = name.split(".") if source.name == "__init__.py" else name.split(".")[:-1]
        place = folder.joinpath(*parts, source.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def _wait(jobs: JobsClient, run: str) -> Attempt:
    limit_s = time.monotonic() + _JOB_S
    while time.monotonic() < limit_s:
        attempt = jobs.attempt(run)
        if attempt is not None and attempt.ended:
            return attempt
        time.sleep(_POLL_S)
    jobs.stop(run)
    raise ClusterError(
        f"job {run} was not over after {_JOB_S:g} s and was stopped; has its head memory left for a driver?"
    )


def _node_checks(found: Mapping[str, Any], before_s: float, after_s: float) -> Iterator[Check]:
    """`before_s` and `after_s` are this machine's times around the job."""
    nodes = found["nodes"]
    yield _answers(nodes)
    yield _head(nodes)
    answered = [node for node in nodes if node["facts"]]
    yield _same_versions(answered)
    shift_s = _shift_s(found["time_s"], before_s, after_s)
    asked_s, answered_s = found["asked_s"] + shift_s, found["answered_s"] + shift_s
    by_node: dict[str, list[Check]] = {}
    for node in answered:
        facts = {**node["facts"], "object_store_bytes": node["object_store_bytes"]}
        clock = clock_check(facts["time_s"], asked_s, answered_s)
        by_node[_name(node, len(by_node))] = [clock, *host_checks(facts), *version_checks(facts)]
    yield from over_nodes(by_node)


def _shift_s(said_s: float, before_s: float, after_s: float) -> float:
    """What to add to times of the job's driver: 0 if its clock agrees with ours."""
    return min(0.0, after_s - said_s) or max(0.0, before_s - said_s)


def _name(node: Mapping[str, Any], number: int) -> str:
    return f"{node['facts']['hostname']} ({node['address']}, {number})"


def _answers(nodes: Sequence[Mapping[str, Any]]) -> Check:
    silent = [node for node in nodes if not node["facts"]]
    if silent:
        text = f"{len(silent)} of {many(len(nodes), 'node')} run no task: {silent[0]['address']}: {silent[0]['error']}"
        return Check("nodes", "wrong", text, "look at that node's raylet.err and dashboard_agent.log; replace the node")
    kinds = Counter((node["cpus"], node["gpus"]) for node in nodes)
    shown = [f"{count} with {cpus:g} CPU, {gpus:g} GPU" for (cpus, gpus), count in sorted(kinds.items())]
    text = f"{many(len(nodes), 'node')}, each ran a task: {'; '.join(shown)}"
    if not any(node["cpus"] for node in nodes):
        remedy = "start a node with CPUs, or see that the autoscaler may add some; until then all jobs wait"
        return Check("nodes", "warning", text, remedy)
    return Check("nodes", "ok", text)


def _head(nodes: Sequence[Mapping[str, Any]]) -> Check:
    cpus = sum(node["cpus"] for node in nodes if node["is_head"])
    if not cpus:
        return Check("head", "ok", "it has no CPUs, so no work is placed beside the cluster's own services")
    if len(nodes) == 1:
        return Check("head", "ok", f"it is the only node, with {cpus:g} CPUs")
    text = f"it has {cpus:g} CPUs: work that fills its memory ends the cluster"
    return Check("head", "warning", text, "start it with --num-cpus=0 (cluster.yaml: resources: {CPU: 0})")


def _same_versions(nodes: Sequence[Mapping[str, Any]]) -> Check:
    """Ray and Python must be one version on all nodes; this machine's matter only where it joins itself."""
    name = "versions"
    found = Counter(f"Ray {node['facts']['packages']['ray']}, Python {node['facts']['python']}" for node in nodes)
    facts = host_facts()
    here = f"Ray {facts['packages']['ray']}, Python {facts['python']}"
    if len(found) > 1:
        text = "; ".join(f"{many(count, 'node')} with {version}" for version, count in found.most_common())
        return Check(name, "wrong", text, "install the same Ray and Python on all nodes")
    if found and here not in found:
        text = f"the nodes have {next(iter(found))}, this machine {here}"
        remedy = "`kinoray submit` works; --resources.address from here needs the same versions"
        return Check(name, "warning", text, remedy)
    return Check(name, "ok", f"{here} on all nodes and here")
