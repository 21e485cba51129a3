"""Bytes from and to `s3://` objects and local files through one small interface.

Every failure leaves here as a StorageError of one line that names the uri; a caller never sees boto3 or OSError. What
is easy to break: a prefix means the same in both kinds of storage, plain text that uris start with, so a folder's
prefix ends in "/".
"""

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import pyarrow.fs as pafs

from kinoray.config.files import FILE_SCHEME, foreign, local_path, local_uri
from kinoray.config.shared import StorageConfig
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.storage.folder import FolderStore, Skipped
from kinoray.storage.stretches import WHOLE, Gap, Stretch, is_marker

if TYPE_CHECKING:
    from kinoray.storage.s3 import S3Store

__all__ = [
    "MAX_RECORD_BYTES",
    "MAX_TABLE_BYTES",
    "ObjectInfo",
    "Storage",
    "absolute",
    "arrow_filesystem",
    "format_bytes",
    "is_s3",
    "join",
]

_SCHEME = "s3://"

MAX_RECORD_BYTES = 2**28
"""The largest file that is read of what is neither a video nor a table."""
MAX_TABLE_BYTES = 2**34
"""The largest table or list: those of 100 million videos are smaller."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of an object or file."""

    uri: str
    """Address that `Storage.read` takes."""
    size_bytes: int
    """Size; 0 for what is not a regular file (a dangling link, a pipe)."""
    modified_s: float
    """Last change, in seconds since 1970."""
    etag: str
    """S3's name for this version of the content; empty for files."""


def is_s3(uri: str) -> bool:
    """Whether the uri names an object or prefix in S3 (else it is a local path)."""
    return uri.startswith(_SCHEME)


def join(base: str, *parts: str) -> str:
    """`join("s3://b/p/", "x", "y")` -> `s3://b/p/x/y`; the same for folders. A last part that ends in "/" keeps it."""
    uri = base
    for part in parts:
        uri = f"{uri.rstrip('/')}/{part.lstrip('/')}" if uri else part
    return uri


def absolute(uri: str) -> str:
    """The uri as every process understands it: local paths made absolute (a last "/" is kept), the others unchanged.

    A file:// uri is a local path, and stays one where its name is not UTF-8.

    Raises:
        ConfigError: the address is of a store that is not understood.
    """
    if problem := foreign(uri):
        raise ConfigError(problem)
    if uri.startswith(FILE_SCHEME):
        return local_uri(local_path(uri))
    if is_s3(uri):
        return uri
    path = os.path.abspath(os.path.expanduser(uri))
    return path + "/" if uri.endswith("/") and path != "/" else path


# One S3 client a process and config: making one costs 0.1 s, and one must not be carried through a fork or a pickle.
_stores: "dict[tuple[int, StorageConfig], S3Store]" = {}
_stores_lock = threading.Lock()
_folder = FolderStore()


def _s3_store(config: StorageConfig) -> "S3Store":
    key = (os.getpid(), config)
    with _stores_lock:
        if key not in _stores:
            from kinoray.storage.s3 import S3Store  # here: boto3 takes a fifth of a second, of which folders need none

            _stores[key] = S3Store(config)
        return _stores[key]


@dataclass(frozen=True, slots=True)
class Storage:
    """Reads and writes whole objects, ranges and listings; small, picklable and safe to share between threads.

    All methods raise:
        ObjectNotFound: no such object, file or bucket (the message says which).
        AccessDenied: no credentials were found, or they may not do this.
        StorageUnavailable: the store kept failing until the retries were used up.
        ChecksumMismatch: bytes arrived, but not those that were written, or fewer than there should be.
        ObjectTooLarge: it has more bytes than are allowed.
        StorageError: anything else that the store refused.
        ConfigError: the uri or the endpoint is malformed.
    """

    config: StorageConfig = field(default_factory=StorageConfig)
    """Where s3:// leads."""

    def read(self, uri: str, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
        """All bytes of the object. A cut or stalled answer is continued from its last good byte.

        One of more than max_bytes is ObjectTooLarge, and is not read.
        """
        store, name = self._locate(uri)
        return store.read(name, max_bytes)

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on; an object that ends before is a ChecksumMismatch."""
        if offset < 0 or length < 0:
            raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
        store, name = self._locate(uri)
        return store.read_range(name, offset, length)

    def put(self, uri: str, data: bytes) -> None:
        """Write an object whole: a reader sees the old content or the new, never a part."""
        store, name = self._locate(uri)
        store.put(name, data)

    def put_file(self, uri: str, path: Path) -> None:
        """Write a local file of any size, as whole as `put`; S3 takes it in checksummed parts."""
        store, name = self._locate(uri)
        store.put_file(name, path)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Write unless the object exists. Of any number of writers at once, exactly one gets True."""
        store, name = self._locate(uri)
        return store.put_if_absent(name, data)

    def list(self, prefix: str, *, skipped: Skipped | None = None) -> Iterator[ObjectInfo]:
        """All objects whose uri starts with `prefix` ("dir/" for a folder), at any depth, sorted by uri.

        Nothing there is an empty listing; a missing bucket is ObjectNotFound. A folder below the prefix that may not be
        listed is an error, or is left out and `skipped` is told.
        """
        store, name = self._locate(prefix, is_prefix=True)
        start = prefix[: len(prefix) - len(name)]
        for found, size_bytes, modified_s, etag in store.list(name, skipped):
            yield ObjectInfo(start + found, size_bytes, modified_s, etag)

    def list_unsorted(self, prefix: str, *, skipped: Skipped | None = None) -> Iterator[ObjectInfo]:
        """As `list`, in no order: a large bucket by several requests at once, and a folder as it is walked."""
        store, name = self._locate(prefix, is_prefix=True)
        if isinstance(store, FolderStore):
            for path, size_bytes, modified_s, etag in store.list_unsorted(name, skipped):
                yield ObjectInfo(prefix[: len(prefix) - len(name)] + path, size_bytes, modified_s, etag)
            return
        start = f"{_SCHEME}{name.partition('/')[0]}/"
        for stretch in self.stretches(prefix):
            for key, size_bytes, modified_s, etag in stretch.entries:
                yield ObjectInfo(start + key, size_bytes, modified_s, etag)

    def stretches(self, prefix: str, gaps: Iterable[Gap] = WHOLE) -> Iterator[Stretch]:
        """The objects below an s3:// prefix whose keys lie in the gaps, by several requests at once, in no order."""
        store, name = self._locate(prefix, is_prefix=True)
        if isinstance(store, FolderStore):
            raise ValueError(f"{prefix} is a folder, whose files have no keys")
        for stretch in store.stretches(name, gaps):
            entries = [entry for entry in stretch.entries if not is_marker(entry[0], entry[1])]
            yield replace(stretch, entries=entries)

    def server(self, uri: str) -> str:
        """Which server an s3:// uri leads to, and in which region; empty for a path."""
        store, _ = self._locate(uri, is_prefix=True)
        return "" if isinstance(store, FolderStore) else store.server

    def exists(self, uri: str) -> bool:
        """Whether the object is there (False for a folder, and in a bucket that does not exist)."""
        try:
            self.stat(uri)
        except ObjectNotFound:
            return False
        return True

    def stat(self, uri: str) -> ObjectInfo:
        """Size, time and etag of one object."""
        store, name = self._locate(uri)
        size_bytes, modified_s, etag = store.stat(name)
        return ObjectInfo(uri, size_bytes, modified_s, etag)

    def delete(self, uri: str) -> None:
        """Remove an object; one that is gone already is no error."""
        store, name = self._locate(uri)
        store.delete(name)

    def presign(self, uri: str, expires_s: int) -> str:
        """An address with which anybody may read an s3:// object for so long; nobody is asked whether it is there.

        One that ends with the credentials that sign it, where these end before.
        """
        store, name = self._locate(uri)
        if isinstance(store, FolderStore):
            raise ValueError(f"{uri} is a file, which has no such address")
        return store.presign(name, expires_s)

    def sweep(self, folder: str, before_s: float) -> None:
        """Remove what killed writers left in a folder before then; S3 shows no object before it is whole."""
        store, name = self._locate(folder, is_prefix=True)
        if isinstance(store, FolderStore):
            store.sweep(name, before_s)

    def _locate(self, uri: str, *, is_prefix: bool = False) -> "tuple[S3Store | FolderStore, str]":
        """The store that holds the uri, and its name there: a path, or `bucket/key`."""
        if not is_s3(uri):
            if problem := foreign(uri):
                raise ConfigError(problem)
            return _folder, local_path(uri)
        name = uri[len(_SCHEME) :]
        bucket, _, key = name.partition("/")
        if not bucket:
            raise ConfigError(f"{uri}: expected s3://bucket/key, found no bucket")
        if not key and not is_prefix:
            raise ObjectNotFound(f"{uri} names a bucket; an object is expected (s3://bucket/key)")
        return _s3_store(self.config), name


def arrow_filesystem(config: StorageConfig, uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system for a uri, and the path in it; for Ray Train's storage_path only: it checks less than we.

    Side effect for a custom endpoint: AWS_REQUEST_CHECKSUM_CALCULATION is set in this process (unless the user set it),
    since pyarrow's checksum trailers are refused, or stored as content, by older S3 servers.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    endpoint = config.endpoint
    options: dict[str, object] = {
        "region": config.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        "connect_timeout": 5,
        "request_timeout": 20,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=10),
        "force_virtual_addressing": config.addressing == "virtual",
    }
    if config.access_of(uri[len(_SCHEME) :].partition("/")[0]) == "unsigned":
        options["anonymous"] = True
    if endpoint:
        parts = urlparse(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme or "https"}
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return pafs.S3FileSystem(**options), uri[len(_SCHEME) :].rstrip("/")


def format_bytes(size_bytes: float) -> str:
    """`123 B`, `4.6 MB`, `7.8 TB`: decimal, as stores bill it."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
