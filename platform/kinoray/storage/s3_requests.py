"""Requests to S3 that are made again, and answers that are read on: counted in time, so that outages are survived.

boto3 retries a request but not the body of an answer, and says nothing when an answer comes back short. Here a cut,
stalled or slow body goes on from its last good byte, with If-Match, so that two versions of an object are never glued
together. A whole object is compared with its stored checksum, and with its ETag where that is an MD5; where there is
neither, at least with its size.

What is easy to break: a store that is down for good is one fact, not one per request. All threads of a client share
what they know of the endpoint, so the hundredth read after the outage began fails at once, not after another minute.
"""

import base64
import contextlib
import hashlib
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import botocore.exceptions as aws
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from kinoray.errors import ChecksumMismatch, ObjectTooLarge, StorageError, StorageUnavailable

__all__ = ["DIGEST_CODES", "Retries", "code_of", "pauses", "read_object", "status_of"]

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
_PROGRESS_BYTES = 2**20  # an answer that brought as much starts a new count of failures
_WHOLE_TRIES = 5  # after a wrong checksum, or when the object was replaced meanwhile
_CHUNK_BYTES = 2**15
_SLOW_BYTES_PER_S = 2**17
_SLOW_TURNS = 3  # a slow connection is left as often as this; then it is the network, and we wait
_BODY_ERRORS = (aws.HTTPClientError, aws.IncompleteReadError, urllib3.exceptions.HTTPError, OSError)


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


# Reading one object, or a range of it, over as many answers as it takes


class _ReplacedError(Exception):
    """The object was replaced while it was being read."""


class _SlowError(Exception):
    """The body comes, but very slowly."""


class _WrongError(Exception):
    """The bytes are not those of the object, by its ETag or its size."""

    def __init__(self, data: bytes) -> None:
        super().__init__(f"{len(data)} bytes of another digest or length")
        self.data = data


def read_object(
    ask: Callable[..., Any],
    bucket: str,
    key: str,
    span: tuple[int, int] | None,
    *,
    max_bytes: int,
    size_of: Callable[[], int],
    retry_s: float,
    stall_timeout_s: float,
) -> bytes:
    """The whole object, or `span` = (offset, length) of it, length > 0: exactly those bytes.

    Args:
        ask: boto3's get_object, with retries of its own.
        max_bytes: the most that a whole object may have.
        size_of: tells the object's size by another request; called for whole objects that nothing else can vouch for.
        retry_s: for how long a body that breaks off again and again is asked for.
        stall_timeout_s: silence in a body after which its connection is left; also how long a slow one is watched.

    Raises:
        ObjectTooLarge: it has more than max_bytes; nothing of it was read.
        ChecksumMismatch: shorter than asked for, or wrong, or replaced, at every try.
        StorageUnavailable: the answer was cut too often.
        What `ask` raises: no answer.
    """
    error: Exception | None = None
    for _ in range(_WHOLE_TRIES):
        try:
            return _Read(ask, bucket, key, span, max_bytes, size_of, retry_s, stall_timeout_s).run()
        except _WrongError as reason:
            again = isinstance(error, _WrongError) and error.data == reason.data
            if again and len(reason.data) == size_of():
                return reason.data  # damage does not come twice alike: this server's ETags are no MD5s
            error = reason
        except (aws.FlexibleChecksumError, _ReplacedError) as reason:
            error = reason
    what = "was replaced while it was read" if isinstance(error, _ReplacedError) else "does not match its checksum"
    raise ChecksumMismatch(f"s3://{bucket}/{key} {what}, {_WHOLE_TRIES} times in a row; upload it again") from error


class _Read:
    """The state of one read: what came so far, and of which version of the object."""

    def __init__(
        self,
        ask: Callable[..., Any],
        bucket: str,
        key: str,
        span: tuple[int, int] | None,
        max_bytes: int,
        size_of: Callable[[], int],
        retry_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._get, self._target = ask, {"Bucket": bucket, "Key": key}
        self._uri = f"s3://{bucket}/{key}"
        self._max_bytes, self._size_of = max_bytes, size_of
        self._retry_s, self._stall_timeout_s = retry_s, stall_timeout_s
        self._ranged = span is not None
        self._offset = span[0] if span else 0
        self._length = span[1] if span else None  # None: unknown until the first answer
        self._chunks: list[bytes] = []
        self._received = 0
        self._etag = ""
        self._crc32 = ""
        self._md5 = ""
        self._slow_turns = 0

    def run(self) -> bytes:
        waits, broken, answers, since = pauses(self._retry_s), 0, 0, time.monotonic()
        while self._length is None or self._received < self._length:
            before, answer = self._received, self._ask()
            answers += 1
            reason: object = "it ended early"
            try:
                self._take(answer["Body"])
            except _SlowError as error:
                self._slow_turns, reason = self._slow_turns + 1, error
            except _BODY_ERRORS as error:
                reason = error
            if self._received >= (self._length or 0):
                break
            if self._received - before >= _PROGRESS_BYTES:
                waits, broken, since = pauses(self._retry_s), 0, time.monotonic()
            broken += 1
            pause = next(waits, None)
            if pause is None or time.monotonic() - since > self._retry_s:
                raise StorageUnavailable(
                    f"{self._uri}: the answer broke off {broken} times in a row, the last time behind byte "
                    f"{self._received} of {self._length} ({reason})"
                )
            time.sleep(pause)
        return self._checked(b"".join(self._chunks), answers)

    def _checked(self, data: bytes, answers: int) -> bytes:
        if len(data) != self._length:
            raise ChecksumMismatch(f"{self._uri}: {len(data)} bytes came, {self._length} were announced")
        if answers > 1 and self._crc32 not in ("", base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()):
            raise aws.FlexibleChecksumError(error_msg="CRC32 of an object that came in pieces")
        if self._md5:
            wrong = hashlib.md5(data, usedforsecurity=False).hexdigest() != self._md5
        else:
            wrong = not (self._ranged or self._crc32) and len(data) != self._size_of()
        if wrong:
            raise _WrongError(data)
        return data

    def _ask(self) -> Any:
        request = dict(self._target)
        first = self._offset + self._received
        ranged = self._ranged or self._received > 0
        if ranged:
            request["Range"] = f"bytes={first}-{self._offset + (self._length or 0) - 1}"
        else:
            request["ChecksumMode"] = "ENABLED"  # the stored checksum, if there is one; of whole objects only
        if self._etag:
            request["IfMatch"] = self._etag
        try:
            answer = self._get(**request)
        except aws.ClientError as error:
            if status_of(error) == 412:
                raise _ReplacedError from error
            raise
        self._etag = answer["ETag"]
        if ranged:
            self._check_range(answer.get("ContentRange", ""), first)
        if self._length is None:
            self._length = int(answer["ContentLength"])
            if self._length > self._max_bytes:
                answer["Body"].close()
                raise ObjectTooLarge(
                    f"{self._uri} has {self._length:,} bytes, {self._max_bytes:,} are allowed; it was not read"
                )
            crc32 = answer.get("ChecksumCRC32", "")
            self._crc32 = "" if "-" in crc32 else crc32  # "...-3" is a checksum of the parts' checksums
            self._md5 = _md5_of(answer)
        return answer

    def _check_range(self, content_range: str, first: int) -> None:
        """Refuse an answer that is not the asked range, before its bytes are taken for it.

        An answer that stops early although the object does not is taken; its rest is asked for next.
        """
        last = self._offset + (self._length or 0) - 1
        match = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", content_range)
        if match is None or int(match[1]) != first or int(match[2]) > last:
            raise StorageError(
                f"{self._uri}: bytes {first} .. {last} were asked for, the server answered {content_range!r}; "
                "it does not do ranged reads as S3 does"
            )
        if match[3] != "*" and int(match[3]) <= last:
            raise ChecksumMismatch(
                f"{self._uri} is too short: bytes up to {last} were asked for, it has {match[3]}; it was cut or "
                "replaced after its catalog was made"
            )

    def _take(self, body: Any) -> None:
        """Add what comes of a body; silence and trickling end it with an error."""
        with contextlib.closing(body):
            with contextlib.suppress(AttributeError):  # an empty body has given its connection back
                body.set_socket_timeout(self._stall_timeout_s)
            since, before = time.monotonic(), self._received
            while self._received <= (self._length or 0) and (chunk := body.read(_CHUNK_BYTES)):
                self._chunks.append(chunk)
                self._received += len(chunk)
                watched_s = time.monotonic() - since
                if watched_s > self._stall_timeout_s:
                    rate = (self._received - before) / watched_s
                    if rate < _SLOW_BYTES_PER_S and self._slow_turns < _SLOW_TURNS:
                        raise _SlowError(f"only {rate:,.0f} bytes/s")
                    since, before = time.monotonic(), self._received


def _md5_of(answer: Any) -> str:
    """The MD5 that the ETag of a plain object is; "" for uploads in parts and for encryption that hides it."""
    etag = str(answer["ETag"]).strip('"')
    hidden = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    return etag if re.fullmatch(r"[0-9a-f]{32}", etag) and not hidden else ""
