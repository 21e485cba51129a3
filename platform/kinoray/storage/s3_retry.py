"""How long a request to S3 is made again: counted in time, so that an outage of a known length is survived.

What is easy to break: a store that is down for good is one fact, not one per request. All threads of a client share
what they know of the endpoint, so the hundredth read after the outage began fails at once, not after another minute.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import botocore.exceptions as aws
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from kinoray.errors import StorageUnavailable

__all__ = ["DIGEST_CODES", "Retries", "code_of", "pauses", "status_of"]

T = TypeVar("T")

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_FIRST_CONTACT_S = 15.0  # where the endpoint has never answered and refuses: a typing error should not cost a minute
_FORGET_S = 30.0  # failures farther apart are two outages

_BUSY_CODES = {
    "IncompleteBody",
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
DIGEST_CODES = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
"""How servers call an upload whose bytes changed on the way."""
_BROKEN_TALK = (aws.ConnectionError, aws.HTTPClientError, ResponseParserError, urllib3.exceptions.HTTPError)
_NEVER_REACHED = (aws.EndpointConnectionError, aws.ProxyConnectionError, aws.SSLError)


def status_of(error: aws.ClientError) -> int:
    """HTTP status of an answer that botocore made an error of; 0 if it had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: aws.ClientError) -> str:
    """S3's name of the error (`SlowDown`), or the status as text where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def pauses(retry_s: float) -> Iterator[float]:
    """Seconds to wait before each further attempt: growing, random by half, `retry_s` in all.

    The last attempt is made when at least `retry_s` have passed, however fast the attempts before it failed.
    """
    longest, left = _FIRST_PAUSE_S, retry_s
    while left > 0:
        pause = min(left, longest * random.uniform(0.5, 1.0))
        yield pause
        left -= pause
        longest = min(2 * longest, _LONGEST_PAUSE_S)


def _is_transient(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    if not isinstance(error, aws.ClientError):
        return isinstance(error, _BROKEN_TALK)
    status, code = status_of(error), code_of(error)
    return (status >= 500 and status != 501) or status == 429 or code in _BUSY_CODES or code in DIGEST_CODES


class Retries:
    """Makes requests until they are answered, or the endpoint has failed for `retry_s`; safe to share between threads.

    `retry_s` bounds the time until the last attempt begins; that attempt takes as long as its own timeouts allow.
    """

    def __init__(self, retry_s: float, endpoint: str) -> None:
        self._retry_s, self._endpoint = retry_s, endpoint
        self._lock = threading.Lock()
        self._reached = False
        self._down_since: float | None = None
        self._last_failure = 0.0

    def run(self, name: str, call: Callable[[], T]) -> T:
        """What `call`, one request about s3://`name`, returns.

        Raises:
            StorageUnavailable: it kept failing.
            botocore's errors: what trying again does not change.
        """
        begin = time.monotonic()
        waits = pauses(self._retry_s)
        attempts = 0
        while True:
            attempts += 1
            try:
                answer = call()
            except (aws.ClientError, aws.BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError) as error:
                if not _is_transient(error):
                    if isinstance(error, aws.ClientError):
                        self._succeeded()
                    raise
                down_s = self._failed(error)
                elapsed_s = time.monotonic() - begin
                pause = next(waits, None)
                limit_s = self._limit_s(error)
                if pause is None or max(elapsed_s + pause, down_s) > limit_s + _FIRST_PAUSE_S:
                    self._give_up(name, error, attempts, elapsed_s, down_s)
                time.sleep(pause)
            else:
                self._succeeded()
                return answer

    def _limit_s(self, error: Exception) -> float:
        if isinstance(error, _NEVER_REACHED) and not self._reached:
            return min(self._retry_s, _FIRST_CONTACT_S)
        return self._retry_s

    def _succeeded(self) -> None:
        with self._lock:
            self._reached = True
            self._down_since = None

    def _failed(self, error: Exception) -> float:
        """Take note; for how long now nobody got an answer."""
        now = time.monotonic()
        with self._lock:
            self._reached = self._reached or isinstance(error, aws.ClientError)
            if self._down_since is None or now - self._last_failure > _FORGET_S:
                self._down_since = now
            self._last_failure = now
            return now - self._down_since

    def _give_up(self, name: str, error: Any, attempts: int, elapsed_s: float, down_s: float) -> NoReturn:
        if isinstance(error, aws.ClientError) and code_of(error) in DIGEST_CODES:
            raise error
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''} in {elapsed_s:.1f} s"
        if down_s > elapsed_s + 1:
            tried += f", other requests failing for {down_s:.0f} s"
        state, reason = "does not answer", " ".join(str(error).split())
        if isinstance(error, aws.ClientError):
            message = error.response.get("Error", {}).get("Message", "")
            state, reason = "is still failing", " ".join(f"{status_of(error)} {code_of(error)} {message}".split())
        raise StorageUnavailable(
            f"s3://{name}: {self._endpoint} {state} after {tried} ({reason}); run the same command again when it is "
            "back, or raise storage.retry_s"
        ) from error
