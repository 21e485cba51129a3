"""Where a cluster's dashboard is, and whether strangers may use it.

Easy to break: the token goes to no dashboard that does not ask for one. So it is asked without first, and an open
cluster is never told what the closed ones' token is. (Ray itself sends it to a GCS that is asked for its dashboard.)
"""

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from ray.dashboard.utils import get_address_for_submission_client

from kinoray.errors import ClusterError, ConfigError
from kinoray.storage.records import parse_json

__all__ = ["find_url", "is_here", "is_open", "only_address"]

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
