"""Ray's jobs API, with our errors: every request has a deadline, and no message holds more than one line of Ray's."""

import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from kinoray.cluster.address import find_url, is_here, is_open, only_address
from kinoray.cluster.token import find_token
from kinoray.errors import ClusterError, ConfigError

__all__ = ["Attempt", "JobsClient", "NoAnswer", "Status"]

T = TypeVar("T")
Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]

_REQUEST_S = 60.0
_CHATTER = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
_KILLED = (  # what Ray says of a driver that did not end by itself
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
)
_SIGINT, _SIGTERM = 130, 143


class NoAnswer(ClusterError):
    """The dashboard does not answer just now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One submission of a run, as Ray knows it."""

    submission_id: str
    run: str
    verb: str
    number: int
    """1 for the first try of the run, counted on."""
    out: str
    settings: str
    """Digest of the verb's config."""
    status: Status
    started_s: float
    """Seconds since 1970; 0 before it starts."""
    ended_s: float
    """0 until it ends."""
    driver_code: int | None
    """As Ray tells it: negative for a signal, None where the driver did not end by itself."""
    error_type: str
    message: str
    """One line."""

    @property
    def ended(self) -> bool:
        """Whether it is over, in whichever way."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int | None:
        """What a shell would say: 128 + signal for a killed driver, 130 for a stopped job; None while it runs."""
        if not self.ended:
            return None
        if self.status == "STOPPED":
            return _SIGINT
        if self.driver_code is None:
            return 0 if self.status == "SUCCEEDED" else 1
        return self.driver_code if self.driver_code >= 0 else 128 - self.driver_code

    @property
    def was_killed(self) -> bool:
        """Whether something else ended it: a signal (not Ctrl-C), or its node went away."""
        if self.status != "FAILED":
            return False
        if self.driver_code is None:
            return self.error_type in _KILLED
        return (self.exit_code or 0) > 128 and self.exit_code != _SIGINT


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's own client waits for ever for a head that took the connection and died."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        options.setdefault("timeout", _REQUEST_S)
        return super()._do_request(*arguments, **options)


class JobsClient:
    """A cluster's jobs API.

    Raises:
        ConfigError: the address or the token's file is wrong, or the cluster is open and on another machine.
        ClusterError: it does not answer, or does not take the token.
    """

    def __init__(self, address: str, *, allow_open: bool) -> None:
        for name in _CHATTER:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        self.url = find_url(address)
        self.open = is_open(self.url)
        here = is_here(self.url)
        if self.open and not here and not allow_open:
            raise ConfigError(
                f"address {self.url} is an open cluster: whoever reaches it runs code there and reads its data. Start "
                "its nodes with RAY_AUTH_MODE=token and a token (cluster.yaml shows how), or say --allow-open-cluster"
            )
        self.warning = ""
        """What is not safe about it."""
        if self.open:
            self.warning = f"{self.url} is open: whoever reaches it runs code there; start it with RAY_AUTH_MODE=token"
        elif not here and self.url.startswith("http://"):
            self.warning = (
                f"{self.url} gets the token and the job unencrypted; https or a tunnel (ssh -L) would hide them"
            )
        # An empty header, since Ray would add the token by itself where RAY_AUTH_MODE says so.
        headers = {"Authorization": "" if self.open else f"Bearer {find_token(self.url)}"}
        with only_address(self.url):
            self._client = self._ask(lambda: _Client(self.url, headers=headers))

    def attempts(self) -> list[Attempt]:
        """All that kinoray submitted there, oldest first."""
        found = [_attempt(details) for details in self._ask(lambda: self._client.list_jobs())]
        return sorted((one for one in found if one), key=lambda one: (one.started_s, one.number))

    def attempt(self, submission_id: str) -> Attempt | None:
        """One of them; None where the cluster does not know it (any more)."""
        try:
            return _attempt(self._ask(lambda: self._client.get_job_info(submission_id)))
        except ClusterError as error:
            if "status code 404" in str(error):
                return None
            raise

    def run(self, run: str) -> list[Attempt]:
        """The tries of one run, oldest first."""
        return sorted((one for one in self.attempts() if one.run == run), key=lambda one: one.number)

    def submit(
        self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> bool:
        """Submit; False where another submitter was quicker with the same id."""
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env, metadata=metadata
                )
            )
        except ClusterError:
            if self.attempt(submission_id) is None:
                raise
            return False
        return True

    def stop(self, submission_id: str) -> None:
        """Ask the job to end; returns at once."""
        self._ask(lambda: self._client.stop_job(submission_id))

    def logs(self, submission_id: str) -> str:
        """What it has printed so far."""
        return str(self._ask(lambda: self._client.get_job_logs(submission_id)))

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What it prints, from the beginning to its end; NoAnswer where the connection breaks before that."""
        try:
            async for text in self._client.tail_job_logs(submission_id):
                yield text
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise NoAnswer(f"{self.url} broke off: {_line(error)}") from error

    def _ask(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.url} does not take the token: {_line(error)}; RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must be "
                "that of this cluster"
            ) from error
        except (requests.RequestException, ConnectionError) as error:
            raise NoAnswer(f"{self.url} does not answer: {_line(error)}") from error
        except RuntimeError as error:  # all that Ray's client raises for an answer other than 200
            if re.search("status code 5[0-9][0-9]", str(error)):  # a head that just starts, or a proxy without one
                raise NoAnswer(f"{self.url} fails: {_line(error)}") from error
            raise ClusterError(f"{self.url} refuses: {_line(error)}") from error


def _attempt(details: Any) -> Attempt | None:
    """A job of ours from Ray's record; None for others' jobs."""
    said = details.metadata or {}
    if "kinoray_run" not in said or not details.submission_id:
        return None
    return Attempt(
        submission_id=details.submission_id,
        run=said["kinoray_run"],
        verb=said.get("kinoray_verb", ""),
        number=int(number) if (number := said.get("kinoray_attempt", "")).isdecimal() else 1,
        out=said.get("kinoray_out", ""),
        settings=said.get("kinoray_settings", ""),
        status=str(getattr(details.status, "value", details.status)),  # type: ignore[arg-type]
        started_s=(details.start_time or 0) / 1000,
        ended_s=(details.end_time or 0) / 1000,
        driver_code=details.driver_exit_code,
        error_type=details.error_type or "",
        message=_line(details.message or "").removesuffix(", last available logs (truncated to 20,000 chars):"),
    )


def _line(error: object) -> str:
    """The last line of a traceback, else the first; Ray sends whole tracebacks as the text of an answer."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[-1] if "Traceback" in str(error) and len(lines) > 1 else lines[0]
    return re.sub(r"[^\x20-\x7e]", "?", text)[:300]
