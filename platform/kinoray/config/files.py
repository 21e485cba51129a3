"""Opening local files that somebody else named: regular files only, never more bytes than asked for, never a wait.

What is easy to break: between a look at a name and opening it, anything can take its place. So the name is opened
first, in a way that waits for nothing, and what was opened is looked at. Every local name that a user, a list or a
catalog gives is opened here.
"""

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from kinoray.errors import (
    AccessDenied,
    ChecksumMismatch,
    KinorayError,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
)

__all__ = [
    "FILE_SCHEME",
    "foreign",
    "local_path",
    "local_uri",
    "open_file",
    "read_file",
    "read_file_range",
    "translated",
]

FILE_SCHEME = "file://"
"""What the uri of a file begins with whose name is not UTF-8: `file:///videos/a%FF.mp4` can be written to a table."""

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a pipe without a writer, or a modem, would wait
_KERNEL = (
    *("proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs"),
    *("cgroup", "cgroup2", "bpf", "pstore", "efivarfs", "binfmt_misc", "fusectl"),
)
"""File systems whose files are the kernel's: they have no end, fail oddly, or show what is nobody's video."""
_SMALL_BYTES = 2**24
_MAX_EXPANSION = 64  # bytes of a larger file for each that is on the disk
_UNAVAILABLE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


def local_uri(path: str) -> str:
    """The path as a uri that any table can hold: itself, or percent-encoded behind file:// if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:  # Python stands surrogates for bytes that are not UTF-8
        return FILE_SCHEME + quote_from_bytes(os.fsencode(path))
    return path


def local_path(uri: str) -> str:
    """The path that `local_uri` was made of; also of a file:// uri that another tool wrote."""
    if not uri.startswith(FILE_SCHEME):
        return uri
    return os.fsdecode(unquote_to_bytes(uri[len(FILE_SCHEME) :].removeprefix("localhost")))


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(dbfs):/")
_OURS = ("s3", "file")
_GCS = (
    "give s3://BUCKET/KEY with --storage.endpoint-url https://storage.googleapis.com and an HMAC key of yours, or "
    "mount the bucket (gcsfuse)"
)
_AZURE = "mount the container (blobfuse2), or copy it (azcopy, rclone)"
_WEB = "download it first; what an S3 server serves there is s3://BUCKET/KEY with --storage.endpoint-url"
_REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(("gs", "gcs"), _GCS),
    **dict.fromkeys(("az", "abfs", "abfss", "adl", "wasb", "wasbs"), _AZURE),
    **dict.fromkeys(("http", "https"), _WEB),
    **dict.fromkeys(("s3a", "s3n"), "give it as s3://"),
    "hf": "download it first (hf download); a network there is hf:OWNER/NAME",
    "dbfs": "give the path under which it is mounted, /dbfs/...",
}


def foreign(uri: str) -> str:
    """Why an address of another kind of store is not understood, and what to do; empty for s3://, file:// and paths."""
    match = _SCHEME.match(uri)
    if match is None or (match[1] or match[2]) in _OURS:
        return ""
    remedy = _REMEDIES.get((match[1] or match[2]).lower(), "mount it, or copy it to one of these")
    return f"{uri}: only s3:// addresses and local paths are understood; {remedy}"


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[int]:
    """A descriptor of a regular file, to read from; closed behind the body.

    Raises:
        ObjectNotFound: there is none, or what is there is no regular file.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        raise ObjectNotFound(f"{path} is not a regular file") from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder, a file is expected" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise ObjectNotFound(f"{path} is {kind}")
        if info.st_dev in _kernel_devices():
            raise ObjectNotFound(f"{path} is a file of the kernel's (/proc, /sys), which are not read")
        yield descriptor
    finally:
        os.close(descriptor)


@functools.cache
def _kernel_devices() -> frozenset[int]:
    devices = set()
    table = Path("/proc/self/mountinfo")
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if table.exists() else []:
        mounted, _, kind = line.partition(" - ")
        if kind.split()[0] in _KERNEL:
            major, _, minor = mounted.split()[2].partition(":")
            devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        ObjectTooLarge: it has more than max_bytes, or far more than it takes on the disk; none, or only so many, were
            read.
        ChecksumMismatch: it grew or shrank meanwhile.
    """
    with open_file(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > max_bytes:
            raise ObjectTooLarge(f"{path} has {size_bytes:,} bytes, {max_bytes:,} are allowed; it was not read")
        _refuse_holes(path, descriptor, size_bytes)
        data = file.read(size_bytes + 1)
    if len(data) != size_bytes:
        what = "more" if len(data) > size_bytes else f"{len(data):,}"
        raise ChecksumMismatch(
            f"{path} had {size_bytes:,} bytes when it was opened, and {what} came: somebody writes to it; "
            "run the same command again when it is finished"
        )
    return data


def _refuse_holes(path: str | Path, descriptor: int, size_bytes: int) -> None:
    """Raise ObjectTooLarge for a large file of nearly nothing but holes: a few bytes that say they are gigabytes.

    Where the file system does not tell holes, there are none.
    """
    enough = size_bytes // _MAX_EXPANSION
    there = offset = 0
    while size_bytes > _SMALL_BYTES and there < enough:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
            end = os.lseek(descriptor, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # behind the last data
                break
            raise ObjectTooLarge(
                f"{path} has {size_bytes:,} bytes, of which {there:,} are on the disk and the others are holes; it was "
                "not read; fetch it again"
            ) from error
        there += end - offset
        offset = end
    os.lseek(descriptor, 0, os.SEEK_SET)


def read_file_range(path: str | Path, offset: int, length: int) -> bytes:
    """Exactly `length` bytes from byte `offset` on.

    Raises:
        ChecksumMismatch: the file ends before.
        ObjectTooLarge: it has far more bytes than it takes on the disk.
    """
    data = b""
    with open_file(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        size_bytes = os.fstat(descriptor).st_size
        if offset + length <= size_bytes:  # compared first: what a table claims may be anything
            _refuse_holes(path, descriptor, size_bytes)
            file.seek(offset)
            data = file.read(length)
    if len(data) != length:
        raise ChecksumMismatch(
            f"{path} is too short: bytes {offset} .. {offset + length} were asked for, it has {size_bytes}; "
            "it was cut or replaced after its catalog was made"
        )
    return data


@contextlib.contextmanager
def translated(path: str, *, to_read: bool = False) -> Iterator[None]:
    """Turn the operating system's errors into ours, with the path in the message.

    Args:
        to_read: the body reads the file; where its folder still answers, an I/O error is that of this file alone.
    """
    try:
        yield
    except KinorayError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectNotFound(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ObjectNotFound(f"{path} is a folder, a file is expected") from error
    except PermissionError as error:
        raise AccessDenied(f"{path}: {error.strerror or 'permission denied'}") from error
    except ValueError as error:  # a zero byte in the path
        raise ObjectNotFound(f"{path!r} is not a path: {error}") from error
    except MemoryError as error:
        raise StorageError(f"{path}: no memory for its bytes") from error
    except OSError as error:
        is_its_own = to_read and error.errno == errno.EIO and _answers(os.path.dirname(path) or ".")
        kind = StorageUnavailable if error.errno in _UNAVAILABLE and not is_its_own else StorageError
        raise kind(f"{path}: {error.strerror or error}") from error


def _answers(folder: str) -> bool:
    """Whether a folder and its file system can be looked at; of the latter no answer is kept by the system."""
    try:
        os.statvfs(folder)
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError:
        return False
    return True
