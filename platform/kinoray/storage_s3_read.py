"""Reading one S3 object, or a range of it, over as many answers as it takes.

boto3 retries a request but not the body of an answer, and says nothing when a range comes back short. Here a cut or
stalled body goes on from its last good byte, with If-Match, so that two versions of an object are never glued together.
"""

import base64
import contextlib
import random
import re
import time
import zlib
from typing import Any

import botocore.exceptions as aws
import urllib3.exceptions

from kinoray.errors import ChecksumMismatch, StorageError, StorageUnavailable

__all__ = ["back_off", "read_object"]

_CUTS_IN_A_ROW = 10  # answers that each brought less than _PROGRESS_BYTES
_PROGRESS_BYTES = 2**20
_WHOLE_TRIES = 3  # after a wrong checksum, or when the object was replaced meanwhile
_CHUNK_BYTES = 2**20
_BODY_ERRORS = (aws.HTTPClientError, aws.IncompleteReadError, urllib3.exceptions.HTTPError, OSError)


class _ReplacedError(Exception):
    """The object was replaced while it was being read."""


def back_off(attempt: int) -> None:
    """Sleep a random part of 0.1 s x 2^attempt, at most of 5 s, so that many clients do not come back as one."""
    time.sleep(random.random() * min(0.1 * 2**attempt, 5.0))


def read_object(client: Any, bucket: str, key: str, span: tuple[int, int] | None) -> bytes:
    """The whole object, or `span` = (offset, length) of it, length > 0: exactly those bytes.

    Raises:
        ChecksumMismatch: shorter than asked for, or wrong, or replaced, at every try.
        StorageUnavailable: the answer was cut too often.
        botocore's errors: no answer, after botocore's own retries.
    """
    error: Exception | None = None
    for _ in range(_WHOLE_TRIES):
        try:
            return _Read(client, bucket, key, span).run()
        except (aws.FlexibleChecksumError, _ReplacedError) as reason:
            error = reason
    what = "was replaced while it was read" if isinstance(error, _ReplacedError) else "does not match its checksum"
    raise ChecksumMismatch(f"s3://{bucket}/{key} {what}, {_WHOLE_TRIES} times in a row; upload it again") from error


class _Read:
    """The state of one read: what came so far, and of which version of the object."""

    def __init__(self, client: Any, bucket: str, key: str, span: tuple[int, int] | None) -> None:
        self._client, self._target = client, {"Bucket": bucket, "Key": key}
        self._uri = f"s3://{bucket}/{key}"
        self._ranged = span is not None
        self._offset = span[0] if span else 0
        self._length = span[1] if span else None  # None: unknown until the first answer
        self._chunks: list[bytes] = []
        self._received = 0
        self._etag = ""
        self._crc32 = ""

    def run(self) -> bytes:
        cuts, answers = 0, 0
        while self._length is None or self._received < self._length:
            before, answer = self._received, self._ask()
            answers += 1
            reason: object = "it ended early"
            try:
                self._take(answer["Body"])
            except _BODY_ERRORS as error:
                reason = error
            if self._received < (self._length or 0):
                cuts = cuts + 1 if self._received - before < _PROGRESS_BYTES else 1
                if cuts == _CUTS_IN_A_ROW:
                    raise StorageUnavailable(
                        f"{self._uri}: the answer broke off {cuts} times in a row, the last time behind byte "
                        f"{self._received} of {self._length} ({reason})"
                    )
                back_off(cuts)
        data = b"".join(self._chunks)
        if len(data) != self._length:
            raise ChecksumMismatch(f"{self._uri}: {len(data)} bytes came, {self._length} were announced")
        if answers > 1 and self._crc32 not in ("", base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()):
            raise aws.FlexibleChecksumError(error_msg="CRC32 of an object that came in pieces")
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
            answer = self._client.get_object(**request)
        except aws.ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") == 412:
                raise _ReplacedError from error
            raise
        self._etag = answer["ETag"]
        if ranged:
            self._check_range(answer.get("ContentRange", ""), first)
        if self._length is None:
            self._length = int(answer["ContentLength"])
            crc32 = answer.get("ChecksumCRC32", "")
            self._crc32 = "" if "-" in crc32 else crc32  # "...-3" is a checksum of the parts' checksums
        return answer

    def _check_range(self, content_range: str, first: int) -> None:
        """Refuse an answer that is not the asked range, before its bytes are taken for it."""
        last = self._offset + (self._length or 0) - 1
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range)
        if match is None or int(match[1]) != first or int(match[2]) > last:
            raise StorageError(
                f"{self._uri}: bytes {first} .. {last} were asked for, the server answered {content_range!r}; "
                "it does not do ranged reads as S3 does"
            )
        if int(match[2]) < last:
            raise ChecksumMismatch(
                f"{self._uri} is too short: bytes up to {last} were asked for, it has {match[3]}; it was cut or "
                "replaced after its catalog was made"
            )

    def _take(self, body: Any) -> None:
        with contextlib.closing(body):
            while chunk := body.read(_CHUNK_BYTES):
                self._chunks.append(chunk)
                self._received += len(chunk)
