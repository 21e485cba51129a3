"""`kinoray submit`: a verb as a job on a cluster, followed to its end, and submitted again if its driver was killed.

A run is one or more tries with the same settings: the first has the run's id as submission id, the others that and
-try2, -try3. Ray takes an id once, so two submitters of one run meet on one job.

What is sent is a folder with the code and job.yaml, the command, and nothing else. The folder is built of what is
named, not of a checkout less what is excluded: a file that nobody thought of (a key, a data set) is not in it. Easy to
break: all of this can be read by whoever may list the cluster's jobs; and after a broken connection a job's output
comes from its beginning again, so what was printed is not printed twice.
"""

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from kinoray import __version__
from kinoray.cluster.client import Attempt, JobsClient, NoAnswer
from kinoray.cluster.config import SubmitConfig
from kinoray.config.file import parse_yaml
from kinoray.config.shared import digest
from kinoray.console import exact_stdout
from kinoray.errors import ClusterError, ConfigError
from kinoray.network.resolve import is_published
from kinoray.storage.leftovers import scratch_folder

__all__ = [
    "build_folder",
    "check_settings",
    "entrypoint",
    "follow",
    "how_it_ended",
    "metadata",
    "read_settings",
    "runtime_env",
    "submit",
]

_INTERRUPTED = 130
_RETRIES = 3  # of a job whose driver was killed; one that is killed a fourth time is a case for a person


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
    for left in range(_RETRIES, -1, -1):
        end = follow(jobs, attempt)
        lost = end is None or end.was_killed
        said = f"{attempt.submission_id}: {how_it_ended(end)}"
        if not (lost and left):
            _say(said + (f"; it was submitted {_RETRIES + 1} times" if lost else ""))
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


_PAYLOAD = "job.yaml"
_PLACES = {"kinoray": "platform", "vcm_sdd": "models", "video_baselines": "models"}
_OWN = "packages"
_SUFFIXES = (".py", ".typed", ".html", ".css", ".js", ".j2")  # of what we send ourselves
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.pem", "*.key", "*.egg-info")
_MAX_BYTES = 80 * 2**20  # Ray's dashboard takes 100 MiB, zipped
_SHARED = ("source", "catalog", "checkpoint", "out", "init_from", "calibration", "label_names", "annotations", "doc")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
_MIN_SECRET = 12  # characters; a shorter one is no secret and may be a word
_SIGNED = re.compile(r"[?&](X-Amz-Signature|X-Amz-Credential|Signature|AWSAccessKeyId)=", re.IGNORECASE)


def read_settings(config: SubmitConfig) -> dict[str, Any]:
    """The verb's config as a mapping."""
    content = parse_yaml(config.settings, "settings")
    if not isinstance(content, dict):
        raise ConfigError(f"settings must be the config of {config.verb} as YAML; give its flags after `--`")
    return content


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what would go wrong on another machine, or would show a secret to all who see the cluster's jobs.

    Raises:
        ConfigError: naming the field, never its value where that is the secret.
    """
    for name in _SHARED:
        values = settings.get(name) or ()
        for value in (values,) if isinstance(values, str) else values:
            if "://" not in value and not os.path.isabs(value):
                is_network = name in ("checkpoint", "init_from") and is_published(value)
                own = f"; kinoray import {value} --out s3://BUCKET/NAME puts it there" if is_network else ""
                place = "s3:// or an absolute folder that all nodes share when submitted"
                raise ConfigError(f"{name} must be {place}, got {value!r}{own}")
    address = settings.get("resources", {}).get("address")
    if address:
        raise ConfigError(f"resources.address must be left out: the job joins the cluster it runs on, got {address!r}")
    secrets = [value for name in _SECRETS if len(value := os.environ.get(name, "")) >= _MIN_SECRET]
    for name, value in _texts(settings):
        holds = any(secret in value for secret in secrets) or bool(_SIGNED.search(value))
        if holds or ("://" in value and "@" in urlsplit(value).netloc):
            raise ConfigError(
                f"{name} holds a credential, which all who see the cluster's jobs could read; take it out, and give "
                "the nodes an instance role, or AWS variables in the environment of `ray start`"
            )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree, and its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}" if name else str(key))
            yield name, str(key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, f"{name}[{index}]")


def build_folder(folder: Path, config: SubmitConfig) -> None:
    """Fill an empty folder: platform/, models/, packages/ (the user's own) and job.yaml.

    Raises:
        ConfigError: a folder of --code is not there, or it is too much to send.
    """
    for package, place in _PLACES.items():
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            _copy_package(Path(spec.submodule_search_locations[0]), folder / place / package)
    for index, item in enumerate(config.code):
        _copy_own(Path(item).expanduser(), folder / _OWN, f"code[{index}]")
    (folder / _PAYLOAD).write_text(config.settings, encoding="utf-8")
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size_bytes > _MAX_BYTES:
        raise ConfigError(
            f"code must be at most {_MAX_BYTES >> 20} MiB, found {size_bytes >> 20} MiB; data and weights belong into "
            "object storage"
        )


def _copy_package(source: Path, target: Path) -> None:
    """Our own package: sources and templates, whatever else lies beside them."""
    for path in sorted(source.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _copy_own(source: Path, target: Path, name: str) -> None:
    """A package of the user's, under its own name; hidden files and keys stay here."""
    if not source.is_dir():
        raise ConfigError(f"{name} must be a folder with a Python package, got {str(source)!r}")
    place = target / source.resolve().name
    if place.exists():
        raise ConfigError(f"{name} must have another name than the other packages that are sent, got {str(source)!r}")
    shutil.copytree(source, place, ignore=_LEFT_OUT)


def runtime_env(folder: Path) -> dict[str, Any]:
    """What Ray is told of the job's environment: the code and where it is."""
    path = os.pathsep.join(["platform", "models", _OWN])
    return {"working_dir": str(folder), "env_vars": {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}}


def entrypoint(config: SubmitConfig) -> str:
    """The job's command."""
    return f"python -m kinoray {config.verb} --config {_PAYLOAD}"


def metadata(config: SubmitConfig, run: str, number: int) -> dict[str, str]:
    """What the dashboard shows of it, and what tells two submissions with one id apart."""
    settings = read_settings(config)
    return {
        "kinoray_run": run,
        "kinoray_verb": config.verb,
        "kinoray_attempt": str(number),
        "kinoray_out": str(settings.get("out", "")),
        "kinoray_settings": digest(settings),
        "kinoray_version": __version__,
    }


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
