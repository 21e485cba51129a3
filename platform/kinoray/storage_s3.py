"""Storage in S3, or a server that speaks its protocol, through boto3; the reading of bodies is in storage_s3_read.py.

What is easy to break: a conditional put whose answer got lost is repeated by boto3 and then meets its own object.
"""

import base64
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlparse
from uuid import uuid4

import boto3
import botocore.exceptions as aws
import urllib3.exceptions
from botocore.config import Config

from kinoray.config import StorageConfig
from kinoray.errors import (
    AccessDenied,
    ChecksumMismatch,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage_s3_read import back_off, read_object

__all__ = ["S3Store", "endpoint_of"]

T = TypeVar("T")

_ATTEMPTS = 10  # of one request, by botocore: half a minute in all (a minute and a half in older releases)
_FIRST_CONTACT_ATTEMPTS = 5  # while the endpoint has never answered: up to 15 s where it refuses, 40 s where it is mute
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
_DENIED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
_BUSY_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_DIGEST_CODES = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}


def endpoint_of(config: StorageConfig) -> str | None:
    """The address that the config or the environment gives, or None for AWS and what a profile says."""
    return config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


class S3Store:
    """The operations of `storage.Storage` on names `bucket/key`. Raises StorageError and its kinds, ConfigError."""

    def __init__(self, config: StorageConfig) -> None:
        self._client = _make_client(config)
        self._custom_endpoint = not _is_aws(self._client.meta.endpoint_url)

    def read(self, name: str) -> bytes:
        """All bytes of the object."""
        return self._guard(name, lambda: read_object(self._client, *_split(name), None))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on, or ChecksumMismatch."""
        if length == 0:
            return b""
        return self._guard(name, lambda: read_object(self._client, *_split(name), (offset, length)))

    def put(self, name: str, data: bytes) -> None:
        """Replace or make the object; the server checks a checksum of the data."""
        self._guard(name, lambda: self._client.put_object(Body=data, **_target(name), **self._checksum(data)))

    def put_file(self, name: str, path: Path) -> None:
        """Replace or make the object from a local file, in parts that the server checks one by one."""
        try:
            size_bytes = path.stat().st_size
            if size_bytes <= _PART_BYTES:
                self.put(name, path.read_bytes())
            else:
                self._guard(name, lambda: self._put_parts(name, path, size_bytes))
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}") from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make the object unless it exists; the server decides (If-None-Match: *)."""
        return self._guard(name, lambda: self._put_if_absent(name, data))

    def list(self, prefix: str) -> Iterator[tuple[str, int, float, str]]:
        """(bucket/key, size, time, etag) of all objects below `bucket/prefix`, in the order of their keys."""
        bucket, key = _split(prefix)
        pages = iter(self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key))
        while (page := self._guard(prefix, lambda: next(pages, None))) is not None:
            for item in page.get("Contents", ()):
                if not (item["Key"].endswith("/") and item["Size"] == 0):  # the marker of an empty "folder"
                    etag = item["ETag"].strip('"')
                    yield f"{bucket}/{item['Key']}", item["Size"], item["LastModified"].timestamp(), etag

    def stat(self, name: str) -> tuple[int, float, str]:
        """(size, time, etag) of one object."""
        head = self._guard(name, lambda: self._client.head_object(**_target(name)))
        return head["ContentLength"], head["LastModified"].timestamp(), head["ETag"].strip('"')

    def delete(self, name: str) -> None:
        """Remove the object if it is there."""
        self._guard(name, lambda: self._client.delete_object(**_target(name)))

    def _checksum(self, data: bytes) -> dict[str, str]:
        """What makes the server check an upload: boto3's own CRC32 on AWS; elsewhere Content-MD5, which all know."""
        if not self._custom_endpoint:
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

    def _put_if_absent(self, name: str, data: bytes) -> bool:
        writer = uuid4().hex
        for attempt in range(_ATTEMPTS):
            try:
                self._client.put_object(
                    Body=data, IfNoneMatch="*", Metadata={"writer": writer}, **_target(name), **self._checksum(data)
                )
                return True
            except aws.ClientError as error:
                status = error.response["ResponseMetadata"].get("HTTPStatusCode")
                if status == 412:
                    # Our first try may have been stored and its answer lost: then boto3's retry met our own object.
                    head = self._client.head_object(**_target(name))
                    return bool(head["Metadata"].get("writer") == writer)
                if status != 409 or attempt == _ATTEMPTS - 1:  # 409: another conditional put is under way
                    raise
                back_off(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _put_parts(self, name: str, path: Path, size_bytes: int) -> None:
        target = _target(name)
        part_bytes = max(_PART_BYTES, -(-size_bytes // 10_000))  # S3 takes at most 10,000 parts
        algorithm = {} if self._custom_endpoint else {"ChecksumAlgorithm": "CRC32"}
        upload_id = self._client.create_multipart_upload(**target, **algorithm)["UploadId"]

        def put_part(offset: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(part_bytes)
            number = offset // part_bytes + 1
            answer = self._client.upload_part(
                Body=data, PartNumber=number, UploadId=upload_id, **target, **algorithm, **self._checksum(data)
            )
            return {"PartNumber": number, **{key: answer[key] for key in ("ETag", "ChecksumCRC32") if key in answer}}

        try:
            with ThreadPoolExecutor(_PART_THREADS) as pool:
                parts = list(pool.map(put_part, range(0, size_bytes, part_bytes)))
            self._client.complete_multipart_upload(UploadId=upload_id, MultipartUpload={"Parts": parts}, **target)
        except BaseException:
            with contextlib.suppress(aws.ClientError, aws.BotoCoreError):  # the first error is the one to report
                self._client.abort_multipart_upload(UploadId=upload_id, **target)
            raise

    def _guard(self, name: str, call: Callable[[], T]) -> T:
        """Run a call of boto3 and translate what it raises."""
        try:
            return call()
        except aws.ClientError as error:
            self._raise_client_error(name, error)
        except _CREDENTIAL_ERRORS as error:
            raise AccessDenied(
                f"s3://{name}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile, or an instance role"
            ) from error
        except aws.ParamValidationError as error:
            reason = " ".join(str(error).split()).partition(": Bucket name must match")[0]  # two regexes follow
            raise ObjectNotFound(f"s3://{name} is not a valid address: {reason}") from error
        except (aws.ConnectionError, aws.HTTPClientError, urllib3.exceptions.HTTPError) as error:
            endpoint = self._client.meta.endpoint_url
            raise StorageUnavailable(f"s3://{name}: {endpoint} does not answer ({error})") from error
        except aws.BotoCoreError as error:
            raise StorageError(f"s3://{name}: {error}") from error

    def _raise_client_error(self, name: str, error: aws.ClientError) -> NoReturn:
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        code = error.response["Error"].get("Code", "")
        text = " ".join(f"{code} {error.response['Error'].get('Message', '')}".split())
        bucket = _split(name)[0]
        if code == "NoSuchBucket" or (status == 404 and code != "NoSuchKey" and not self._has_bucket(bucket)):
            raise ObjectNotFound(f"s3://{name}: there is no bucket {bucket!r}") from error
        if status == 404:
            raise ObjectNotFound(f"s3://{name}: no such object") from error
        if status in (401, 403) or code in _DENIED_CODES:
            raise AccessDenied(f"s3://{name}: the credentials may not do this ({text})") from error
        if status == 416:
            raise ChecksumMismatch(
                f"s3://{name} is too short: bytes behind its end were asked for; it was cut or replaced after its "
                "catalog was made"
            ) from error
        if code in _DIGEST_CODES:
            raise ChecksumMismatch(f"s3://{name}: the data changed on its way to the server ({text})") from error
        if status >= 500 or status == 429 or code in _BUSY_CODES:
            raise StorageUnavailable(f"s3://{name}: still failing after {_ATTEMPTS} attempts ({text})") from error
        raise StorageError(f"s3://{name}: {error.operation_name} was refused, {status} {text}") from error

    def _has_bucket(self, bucket: str) -> bool:
        """A 404 to HEAD does not say what is missing; when in doubt, the bucket is there."""
        try:
            self._client.head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            return bool(error.response["ResponseMetadata"].get("HTTPStatusCode") != 404)
        return True


def _split(name: str) -> tuple[str, str]:
    bucket, _, key = name.partition("/")
    return bucket, key


def _target(name: str) -> dict[str, str]:
    bucket, key = _split(name)
    return {"Bucket": bucket, "Key": key}


class _FirstContact:
    """Gives up early on an endpoint that has never answered: a typing error should not cost a minute.

    Once it has answered, an outage is met with all of _ATTEMPTS. Handlers of `needs-retry` may raise, as botocore's
    own legacy ones do.
    """

    def __init__(self) -> None:
        self._answered = False

    def __call__(self, *, response: object, attempts: int, caught_exception: Exception | None, **_: object) -> None:
        if response is not None:
            self._answered = True
        elif caught_exception and not self._answered and attempts >= _FIRST_CONTACT_ATTEMPTS:
            raise caught_exception


def _is_aws(url: str) -> bool:
    host = urlparse(url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _make_client(config: StorageConfig) -> Any:
    """A boto3 client of its own session, since sessions are not safe to share between threads."""
    try:
        session = boto3.Session()

        def client(checksums: str) -> Any:
            return session.client(
                "s3",
                endpoint_url=config.endpoint_url,
                region_name=config.region or session.region_name or "us-east-1",
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                    connect_timeout=5,
                    read_timeout=20,
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
        raise ConfigError(f"storage.endpoint_url {endpoint_of(config)!r} is not an address: {error}") from error
    except aws.BotoCoreError as error:
        raise AccessDenied(f"AWS settings cannot be used: {error}") from error
    made.meta.events.register_first("needs-retry.s3", _FirstContact())
    return made
