"""Ray's jobs API, with our errors: where a cluster's dashboard is, whether strangers may use it, its token, its jobs.

Every request has a deadline, and no message holds more than one line of Ray's. Easy to break: the token goes to no
dashboard that does not ask for one. So it is asked without first, and an open cluster is never told what the closed
ones' token is. (Ray itself sends it to a GCS that is asked for its dashboard.) The token appears in no message, and it
is taken from no file that others can read: with it they run code there.
"""

import logging
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from kinoray.errors import ClusterError, ConfigError
from kinoray.storage.records import parse_json

__all__ = [
    "Attempt",
    "JobsClient",
    "NoAnswer",
    "Status",
    "find_token",
    "find_url",
    "is_here",
    "is_open",
    "only_address",
]

_PORT = 8265
_PROBE_S = 15.0
_ADDRESS_NAMES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the first wins, as in `ray job`
_FORMS = "http://HOST:8265, https://HOST, ray://HOST:10001, HOST:PORT of its GCS, or auto"


def find_url(address: str) -> str:
    """The dashboard's http(s) address for any form that submit's --address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS take.

    Raises:
        ConfigError: there is none, or it is malformed.
        ClusterError: a cluster that is asked for its dashboard's address does not answer.
    """
    name = "address"
    if not address:
        name = next((name for name in _ADDRESS_NAMES if os.environ.get(name)), "")
        if not name:
            raise ConfigError(f"address must be given ({_FORMS}), or RAY_ADDRESS be set")
        address = os.environ[name]
    if address != "auto" and "://" not in address:
        if not address.endswith(f":{_PORT}"):
            return _ask_gcs(name, address)
        address = f"http://{address}"
    return _ask_gcs(name, address) if address == "auto" else _checked(name, address)


def _checked(name: str, address: str) -> str:
    """An http, https or ray address as that of a dashboard; nothing of a malformed one is printed: it may be secret."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise ConfigError(f"{name} must be one of {_FORMS}; its port or host is malformed") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"{name} must not hold credentials or a query; the token belongs into RAY_AUTH_TOKEN_PATH")
    if parts.scheme not in ("http", "https", "ray") or not parts.hostname:
        raise ConfigError(f"{name} must be one of {_FORMS}, got {address!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if parts.scheme == "ray":  # Ray Client would run code there, with our token, before we know whose cluster it is
        return f"http://{host}:{_PORT}"
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def _ask_gcs(name: str, address: str) -> str:
    """The dashboard's address from the cluster itself."""
    try:
        with only_address(""):
            return str(get_address_for_submission_client(address))
    except Exception as error:  # Ray has a class of its own for each way in which there is no cluster
        what = "no Ray cluster is found on this machine" if address == "auto" else "no Ray cluster answers there"
        raise ClusterError(
            f"{name} {address!r}: {what} ({_first_line(error)}); give the dashboard's address, http://HOST:{_PORT}, "
            "and set RAY_AUTH_MODE=token if the cluster is closed"
        ) from error


@contextmanager
def only_address(url: str) -> Iterator[None]:
    """Make Ray take `url` (none if empty) as the cluster's address: its variables win over what its client is given."""
    saved = {name: os.environ.pop(name) for name in _ADDRESS_NAMES if name in os.environ}
    if url:
        os.environ[_ADDRESS_NAMES[0]] = url
    try:
        yield
    finally:
        os.environ.pop(_ADDRESS_NAMES[0], None)
        os.environ.update(saved)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A dashboard sends nobody elsewhere; a login page in front of one does."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def is_open(url: str) -> bool:
    """Whether the dashboard's API answers a request without a token; GET /api/version is guarded like the jobs' API.

    Raises:
        ClusterError: nothing answers there, or no Ray dashboard.
    """
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(f"{url}/api/version", timeout=_PROBE_S) as reply:
            parse_json(reply.read(1 << 16))["ray_version"]
            return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        raise ClusterError(f"address {url} is no Ray dashboard: /api/version answers with {error.code}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(
            f"address {url} does not answer ({_first_line(reason)}); is the cluster up, is this its dashboard's port, "
            f"and is there a tunnel to it (ssh -L {_PORT}:localhost:{_PORT} HOST)?"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"address {url} is no Ray dashboard: /api/version answers with something else") from error


def is_here(url: str) -> bool:
    """Whether the host is this machine: every address of its name can be bound to here."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return all(_can_bind(family, place) for family, _, _, _, place in found)


def _can_bind(family: int, place: object) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(place)  # type: ignore[arg-type]
        except OSError:
            return False
        return True


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def find_token(url: str) -> str:
    """The token for a closed cluster, from where Ray takes it, too.

    Raises:
        ClusterError: there is none.
        ConfigError: its file can be read by others.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"
    try:
        mode, token = path.stat().st_mode & 0o777, path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ClusterError(
            f"{url} asks for a token, and there is none: {path}: {error.strerror or error}; let RAY_AUTH_TOKEN_PATH "
            "name a file that holds it (mode 0600), or set RAY_AUTH_TOKEN"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} can be read by others (mode {mode:04o}); chmod 600 {path}")
    if not token:
        raise ClusterError(f"{url} asks for a token, and {path} is empty; write the cluster's token into it")
    return token


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
