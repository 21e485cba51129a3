"""Storage in S3, or a server that speaks its protocol, through boto3.

How long requests are retried, and how bodies are read, is in s3_requests.py. What is easy to break: a write whose
answer got lost is repeated, and then meets its own object.
"""

import base64
import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import urlparse
from uuid import uuid4

import boto3
import botocore.exceptions as aws
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.parsers import DEFAULT_TIMESTAMP_PARSER

from kinoray.config.files import open_file, translated
from kinoray.config.shared import Access, StorageConfig
from kinoray.errors import (
    AccessDenied,
    BadCredentials,
    BucketNotFound,
    ChecksumMismatch,
    ConfigError,
    ObjectNotFound,
    StorageError,
)
from kinoray.storage.folder import Skipped
from kinoray.storage.s3_requests import DIGEST_CODES, Retries, code_of, pauses, read_object, status_of
from kinoray.storage.stretches import Gap, Page, Stretch, in_stretches, is_marker

__all__ = ["S3Store", "agree_to_pay"]

T = TypeVar("T")

_CONFLICT_TRIES = 10  # of a conditional put, while others are under way
_TOKEN_TRIES = 5  # with credentials that the server calls expired: fresh ones may be in the file or the role already
_CONNECT_TIMEOUT_S = 5.0
_PAGE_KEYS = 1000  # of one answer to a listing: the most that S3 gives
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_PART_BYTES = 16 * 2**20
_PART_THREADS = 4

_CREDENTIAL_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.SSOError,
    aws.ProfileNotFound,
)
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_ARCHIVED = "InvalidObjectState"  # a 403 of one object in Glacier, which says nothing of the credentials
_BAD_CODES = _EXPIRED_CODES | {"InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}


class S3Store:
    """The operations of `storage.Storage` on names `bucket/key`. Raises StorageError and its kinds, ConfigError."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        kinds = {"signed", *(item.partition("=")[2] for item in config.access)}
        self._clients = {kind: _make_client(config, cast(Access, kind)) for kind in kinds}
        self._presigners: dict[Access, Any] = {}
        meta = self._clients["signed"].meta
        endpoint = meta.endpoint_url
        self.server = f"{endpoint} {meta.region_name}"
        self._custom_endpoint = not _is_aws(endpoint)
        self._retries = Retries(config.retry_s, endpoint)

    def read(self, name: str, max_bytes: int) -> bytes:
        """All bytes of an object of at most max_bytes."""
        return self._guard(name, lambda: self._read(name, None, max_bytes))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on, or ChecksumMismatch."""
        if length == 0:
            return b""
        return self._guard(name, lambda: self._read(name, (offset, length), length))

    def put(self, name: str, data: bytes) -> None:
        """Replace or make the object; the server checks a checksum of the data."""
        kind = _CONTENT_TYPES.get(Path(name).suffix)  # without it a browser saves a page instead of showing it
        about = {"ContentType": kind} if kind else {}
        self._guard(name, lambda: self._call(name, "put_object", Body=data, **about, **self._checksum(data)))

    def put_file(self, name: str, path: Path) -> None:
        """Replace or make the object from a local file, in parts that the server checks one by one."""
        with translated(str(path)), open_file(path) as descriptor:
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes <= _PART_BYTES:
                self.put(name, os.pread(descriptor, _PART_BYTES, 0))
            else:
                self._guard(name, lambda: self._put_parts(name, descriptor, size_bytes))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make the object unless it exists; the server decides (If-None-Match: *)."""
        return self._guard(name, lambda: self._put_if_absent(name, data))

    def list(self, prefix: str, skipped: Skipped | None = None) -> Iterator[tuple[str, int, float, str]]:
        """(bucket/key, size, time, etag) of all objects below `bucket/prefix`, in the order of their keys."""
        bucket, token = _split(prefix)[0], None
        while True:
            page = self._page(prefix, "", token)
            for key, size_bytes, modified_s, etag in page.entries:
                if not is_marker(key, size_bytes):
                    yield f"{bucket}/{key}", size_bytes, modified_s, etag
            if page.token is None:
                return
            token = page.token

    def stretches(self, prefix: str, gaps: Iterable[Gap]) -> Iterator[Stretch]:
        """The objects below `bucket/prefix` whose keys lie in the gaps, by several requests at once, in no order."""
        return in_stretches(partial(self._page, prefix), _split(prefix)[1], gaps)

    def _page(self, prefix: str, after: str, token: str | None) -> Page:
        """The next keys below `bucket/prefix`: those that a token stands for, or the first ones behind `after`."""
        bucket, key = _split(prefix)
        target = {"Bucket": bucket, "Prefix": key, "MaxKeys": _PAGE_KEYS}
        if token is not None:
            target["ContinuationToken"] = token
        elif after:
            target["StartAfter"] = after
        page = self._guard(prefix, partial(self._run, prefix, "list_objects_v2", target))
        entries = [
            (item["Key"], item["Size"], item["LastModified"].timestamp(), item["ETag"].strip('"'))
            for item in page.get("Contents", ())
        ]
        return Page(entries, page["NextContinuationToken"] if page.get("IsTruncated") else None)

    def stat(self, name: str) -> tuple[int, float, str]:
        """(size, time, etag) of one object."""
        head = self._guard(name, lambda: self._call(name, "head_object"))
        return head["ContentLength"], head["LastModified"].timestamp(), head["ETag"].strip('"')

    def delete(self, name: str) -> None:
        """Remove the object if it is there."""
        self._guard(name, lambda: self._call(name, "delete_object"))

    def presign(self, name: str, expires_s: int) -> str:
        """An address with which anybody may read the object for so long; no request is made."""
        access = self._config.access_of(_split(name)[0])
        if access not in self._presigners:
            self._presigners[access] = _make_client(self._config, access, signature="s3v4")
        client = self._presigners[access]
        arguments = {"Params": _target(name), "ExpiresIn": expires_s}
        return self._guard(name, lambda: str(client.generate_presigned_url("get_object", **arguments)))

    def _client_of(self, name: str) -> Any:
        return self._clients[self._config.access_of(_split(name)[0])]

    def _checksum(self, data: bytes) -> dict[str, str]:
        """What makes the server check an upload: boto3's own CRC32 on AWS; elsewhere Content-MD5, which all know."""
        if not self._custom_endpoint:
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

    def _call(self, name: str, operation: str, **arguments: Any) -> Any:
        """One operation of boto3 on the object, with retries; raises botocore's errors and StorageUnavailable."""
        return self._run(name, operation, _target(name) | arguments)

    def _run(self, name: str, operation: str, arguments: dict[str, Any]) -> Any:
        kind = self._config.access_of(_split(name)[0])
        waits = pauses(self._config.retry_s)
        for _ in range(_TOKEN_TRIES - 1):
            try:
                return self._retries.run(name, lambda: getattr(self._clients[kind], operation)(**arguments))
            except aws.ClientError as error:
                pause = next(waits, None)
                bare = code_of(error) == "403"  # an answer to HEAD, which cannot say why
                if pause is None or kind == "unsigned" or not (bare or code_of(error) in _EXPIRED_CODES):
                    raise
                time.sleep(pause)
                self._clients[kind] = _make_client(self._config, kind)  # a new session reads the credentials again
        return self._retries.run(name, lambda: getattr(self._clients[kind], operation)(**arguments))

    def _read(self, name: str, span: tuple[int, int] | None, max_bytes: int) -> bytes:
        def ask(**request: Any) -> Any:
            return self._run(name, "get_object", request)

        def size_of() -> int:
            return int(self._call(name, "head_object")["ContentLength"])

        config = self._config
        return read_object(
            ask,
            *_split(name),
            span,
            max_bytes=max_bytes,
            size_of=size_of,
            retry_s=config.retry_s,
            stall_timeout_s=config.stall_timeout_s,
        )

    def _put_if_absent(self, name: str, data: bytes) -> bool:
        writer = {"writer": uuid4().hex}
        waits = pauses(self._config.retry_s)
        for attempt in range(_CONFLICT_TRIES):
            try:
                self._call(name, "put_object", Body=data, IfNoneMatch="*", Metadata=writer, **self._checksum(data))
                return True
            except aws.ClientError as error:
                status = status_of(error)
                if status == 412:
                    # Our first try may have been stored and its answer lost: then the retry met our own object.
                    return self._is_written_by(name, writer)
                if status != 409 or attempt == _CONFLICT_TRIES - 1:  # 409: another conditional put is under way
                    raise
                time.sleep(next(waits, 0.0))
        raise AssertionError("the last attempt returns or raises")

    def _is_written_by(self, name: str, writer: dict[str, str]) -> bool:
        """Whether the object that is there came from this very call."""
        try:
            return bool(self._call(name, "head_object")["Metadata"].get("writer") == writer["writer"])
        except aws.ClientError as error:
            if status_of(error) == 404:  # deleted meanwhile
                return False
            raise

    def _put_parts(self, name: str, descriptor: int, size_bytes: int) -> None:
        part_bytes = max(_PART_BYTES, -(-size_bytes // 10_000))  # S3 takes at most 10,000 parts
        algorithm = {} if self._custom_endpoint else {"ChecksumAlgorithm": "CRC32"}
        writer = {"writer": uuid4().hex}
        upload_id = self._call(name, "create_multipart_upload", Metadata=writer, **algorithm)["UploadId"]

        def put_part(offset: int) -> dict[str, Any]:
            data = os.pread(descriptor, part_bytes, offset)
            number = {"PartNumber": offset // part_bytes + 1}
            answer = self._call(
                name, "upload_part", Body=data, UploadId=upload_id, **number, **algorithm, **self._checksum(data)
            )
            return {**number, **{key: answer[key] for key in ("ETag", "ChecksumCRC32") if key in answer}}

        pool = ThreadPoolExecutor(_PART_THREADS, thread_name_prefix="put-parts")
        try:
            parts = list(pool.map(put_part, range(0, size_bytes, part_bytes)))
            self._complete(name, upload_id, parts, writer)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # no part may arrive after the upload is given up
            with contextlib.suppress(aws.ClientError, aws.BotoCoreError):  # the first error is the one to report
                self._client_of(name).abort_multipart_upload(UploadId=upload_id, **_target(name))
            raise
        finally:
            pool.shutdown()

    def _complete(self, name: str, upload_id: str, parts: Sequence[dict[str, Any]], writer: dict[str, str]) -> None:
        """Make the object of its parts. Where the answer got lost, the retry finds no upload, but our object."""
        try:
            self._call(name, "complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts})
        except aws.ClientError as error:
            if code_of(error) != "NoSuchUpload" or not self._is_written_by(name, writer):
                raise

    def _guard(self, name: str, call: Callable[[], T]) -> T:
        """Run a call of boto3 and translate what it raises."""
        try:
            return call()
        except aws.ClientError as error:
            self._raise_client_error(name, error)
        except _CREDENTIAL_ERRORS as error:
            raise BadCredentials(
                f"s3://{name}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"a profile, or an instance role (or, if anyone may read it, storage.access {_split(name)[0]}=unsigned)"
            ) from error
        except aws.ParamValidationError as error:
            reason = " ".join(str(error).split()).partition(": Bucket name must match")[0]  # two regexes follow
            raise ObjectNotFound(f"s3://{name} is not a valid address: {reason}") from error
        except aws.BotoCoreError as error:
            raise StorageError(f"s3://{name}: {error}") from error

    def _raise_client_error(self, name: str, error: aws.ClientError) -> NoReturn:
        status, code = status_of(error), code_of(error)
        text = " ".join(f"{code} {error.response['Error'].get('Message', '')}".split())
        bucket = _split(name)[0]
        if code == "NoSuchBucket" or (status == 404 and code != "NoSuchKey" and not self._has_bucket(bucket)):
            raise BucketNotFound(f"s3://{name}: there is no bucket {bucket!r}") from error
        if status == 404:
            raise ObjectNotFound(f"s3://{name}: no such object") from error
        if code == _ARCHIVED:
            raise StorageError(
                f"s3://{name} is archived, and must be restored before it can be read ({text})"
            ) from error
        if status == 401 or code in _BAD_CODES:
            what = "have expired" if code in _EXPIRED_CODES else "are not accepted"
            raise BadCredentials(f"s3://{name}: the credentials {what} ({text})") from error
        if status == 403 and self._config.access_of(bucket) == "unsigned":
            raise AccessDenied(
                f"s3://{name}: not everybody may do this ({text}), and storage.access {bucket}=unsigned has requests "
                "go without credentials: leave it out to use yours"
            ) from error
        if status == 403:
            raise AccessDenied(f"s3://{name}: the credentials may not do this ({text})") from error
        if status == 416:
            raise ChecksumMismatch(
                f"s3://{name} is too short: bytes behind its end were asked for; it was cut or replaced after its "
                "catalog was made"
            ) from error
        if code in DIGEST_CODES:
            raise ChecksumMismatch(f"s3://{name}: the data changed on its way to the server ({text})") from error
        raise StorageError(f"s3://{name}: {error.operation_name} was refused, {status} {text}") from error

    def _has_bucket(self, bucket: str) -> bool:
        """A 404 to HEAD does not say what is missing; when in doubt, the bucket is there."""
        try:
            self._client_of(bucket).head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            return status_of(error) != 404
        except aws.BotoCoreError:
            return True
        return True


def _split(name: str) -> tuple[str, str]:
    bucket, _, key = name.partition("/")
    return bucket, key


def _target(name: str) -> dict[str, str]:
    bucket, key = _split(name)
    return {"Bucket": bucket, "Key": key}


def _is_aws(url: str) -> bool:
    host = urlparse(url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _time_of(value: Any) -> datetime:
    """A time in an answer. Those of listings are read here: botocore takes 80 us for each, four times all the rest."""
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return cast(datetime, DEFAULT_TIMESTAMP_PARSER(value))
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def agree_to_pay(client: Any) -> None:
    """Have every request of a boto3 client say that the requester pays; no parameter of each call can be forgotten."""

    def add_header(params: dict[str, Any], **_: Any) -> None:
        params["headers"]["x-amz-request-payer"] = "requester"

    client.meta.events.register("before-call.s3", add_header)  # before it is signed


def _make_client(config: StorageConfig, access: Access, signature: str | None = None) -> Any:
    """A boto3 client of its own session, since sessions are not safe to share between threads.

    Args:
        signature: how requests are signed. Default: as boto3 chooses, which signs addresses of some regions in a way
            that newer buckets refuse.
    """
    try:
        core = botocore.session.Session()
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time_of)
        session = boto3.Session(botocore_session=core)

        def client(checksums: str) -> Any:
            return session.client(
                "s3",
                endpoint_url=config.endpoint_url,
                region_name=config.region or session.region_name or "us-east-1",
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": 1},  # ours go by time
                    connect_timeout=min(_CONNECT_TIMEOUT_S, config.answer_timeout_s),
                    read_timeout=config.answer_timeout_s,
                    signature_version=UNSIGNED if access == "unsigned" else signature,
                    max_pool_connections=32,
                    s3={"addressing_style": config.addressing},
                    request_checksum_calculation=checksums,
                    response_checksum_validation=checksums,
                ),
            )

        made = client("when_supported")
        if not _is_aws(made.meta.endpoint_url):  # older servers refuse checksum trailers, or store them as content
            made = client("when_required")
    except ValueError as error:
        raise ConfigError(f"storage.endpoint_url {config.endpoint!r} is not an address: {error}") from error
    except aws.BotoCoreError as error:
        raise BadCredentials(f"AWS settings cannot be used: {error}") from error
    if access == "requester_pays":
        agree_to_pay(made)
    return made
