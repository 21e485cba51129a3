"""Storage in a folder of a local or shared file system: written aside, flushed, then renamed.

What is easy to break: nothing may be visible under its final name before all of its bytes are on disk.
"""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from kinoray.errors import AccessDenied, ChecksumMismatch, ObjectNotFound, StorageError, StorageUnavailable

__all__ = ["FolderStore"]

_TEMP_PREFIX = ".kinoray-tmp-"  # left out of listings: what a killed writer leaves behind
_UNAVAILABLE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


class FolderStore:
    """The operations of `storage.Storage` on local paths. Raises only StorageError and its kinds."""

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """All bytes of a regular file; ChecksumMismatch for one of more than `max_bytes`."""
        with _translated(path):
            size_bytes = _require_file(path).st_size
            if max_bytes is not None and size_bytes > max_bytes:
                raise ChecksumMismatch(f"{path} has {size_bytes} bytes, at most {max_bytes} are expected here")
            return Path(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on, or ChecksumMismatch."""
        with _translated(path):
            size_bytes = _require_file(path).st_size
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        if len(data) != length:
            raise ChecksumMismatch(
                f"{path} is too short: bytes {offset} .. {offset + length} were asked for, it has {size_bytes}; "
                "it was cut or replaced after its catalog was made"
            )
        return data

    def put(self, path: str, data: bytes) -> None:
        """Replace or make the file, with its folders."""
        with _translated(path), _aside(path, lambda temp: temp.write_bytes(data)) as temp:
            os.replace(temp, path)

    def put_file(self, path: str, source: Path) -> None:
        """Replace or make the file with a copy of another."""
        with _translated(str(source)):
            _require_file(source)
        with _translated(path), _aside(path, lambda temp: shutil.copyfile(source, temp)) as temp:
            os.replace(temp, path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Make the file unless it exists; the file system makes a hard link for exactly one of several writers."""
        with _translated(path), _aside(path, lambda temp: temp.write_bytes(data)) as temp:
            try:
                os.link(temp, path)
            except FileExistsError:
                # NFS may repeat a request whose answer got lost: two links to our own file mean that we won.
                return temp.stat().st_nlink == 2
            return True

    def list(self, prefix: str) -> Iterator[tuple[str, int, float, str]]:
        """(path, size, time, "") of all files whose path starts with prefix, sorted by path."""
        folder = prefix[: prefix.rfind("/") + 1]
        with _translated(prefix):
            there = os.path.isdir(folder or ".")
            paths = [path for path in _walk(folder, set()) if path.startswith(prefix)] if there else []
        for path in sorted(paths):
            with _translated(path):
                try:
                    info = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a dangling link is itself
                except FileNotFoundError:
                    continue  # deleted since the folder was read
            yield path, info.st_size if stat.S_ISREG(info.st_mode) else 0, info.st_mtime, ""

    def stat(self, path: str) -> tuple[int, float, str]:
        """(size, time, "") of a regular file."""
        with _translated(path):
            info = _require_file(path)
        return info.st_size, info.st_mtime, ""

    def delete(self, path: str) -> None:
        """Remove the file if it is there."""
        with _translated(path):
            Path(path).unlink(missing_ok=True)


def _require_file(path: str | Path) -> os.stat_result:
    """Stat of a regular file; opening a pipe or a device could wait for ever."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ObjectNotFound(f"{path} is {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a regular file'}")
    return info


def _walk(folder: str, parents: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of everything below folder that is not a folder; links to folders are followed, but not in circles."""
    info = os.stat(folder or ".")
    here = (info.st_dev, info.st_ino)
    if here in parents:
        return
    with os.scandir(folder or ".") as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(f"{folder}{entry.name}/", parents | {here})
            elif not entry.name.startswith(_TEMP_PREFIX):
                yield folder + entry.name


@contextlib.contextmanager
def _aside(path: str, write: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary file beside `path` with its bytes on disk; the body publishes it, then the folder is flushed."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    temp = folder / f"{_TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        write(temp)
        _flush(temp)
        yield temp
        _flush(folder)  # without it, a power cut could keep a commit and lose the file it names
    finally:
        temp.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, with the path in the message."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectNotFound(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ObjectNotFound(f"{path} is a folder, a file is expected") from error
    except PermissionError as error:
        raise AccessDenied(f"{path}: {error.strerror or 'permission denied'}") from error
    except ValueError as error:  # a zero byte in the path
        raise ObjectNotFound(f"{path!r} is not a path: {error}") from error
    except OSError as error:
        kind = StorageUnavailable if error.errno in _UNAVAILABLE else StorageError
        raise kind(f"{path}: {error.strerror or error}") from error
