"""Storage in a folder of a local or shared file system: written aside, flushed, then renamed.

What is easy to break: nothing may be visible under its final name before all of its bytes are on disk.
"""

import contextlib
import errno
import heapq
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from kinoray.config.files import open_file, read_file, read_file_range, translated
from kinoray.errors import ObjectNotFound, StorageError, StorageUnavailable

__all__ = ["FolderStore", "Skipped"]

_COPY_BYTES = 2**20
_TEMP_PREFIX = ".kinoray-tmp-"  # left out of listings: what a killed writer leaves behind, until `sweep`


Skipped = Callable[[str, str], None]
"""Told of a folder below the listed one that is left out, and why."""


class FolderStore:
    """The operations of `storage.Storage` on local paths. Raises only StorageError and its kinds."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """All bytes of a regular file of at most max_bytes."""
        with translated(path, to_read=True):
            return read_file(path, max_bytes)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on, or ChecksumMismatch."""
        with translated(path, to_read=True):
            return read_file_range(path, offset, length)

    def put(self, path: str, data: bytes) -> None:
        """Replace or make the file, with its folders."""
        with translated(path), _aside(path, lambda temp: temp.write_bytes(data)) as temp:
            os.replace(temp, path)

    def put_file(self, path: str, source: Path) -> None:
        """Replace or make the file with a copy of another."""
        with (
            translated(str(source)),
            open_file(source) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
            translated(path),
            _aside(path, partial(_copy, file)) as temp,
        ):
            os.replace(temp, path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Make the file unless it exists; the file system makes a hard link for exactly one of several writers."""
        with translated(path), _aside(path, lambda temp: temp.write_bytes(data)) as temp:
            try:
                os.link(temp, path)
            except FileExistsError:
                # NFS may repeat a request whose answer got lost: two links to our own file mean that we won.
                return temp.stat().st_nlink == 2
            return True

    def list(self, prefix: str, skipped: Skipped | None) -> Iterator[tuple[str, int, float, str]]:
        """(path, size, time, "") of all files whose path starts with prefix, sorted by path; each folder's once."""
        return _described(sorted(_paths(prefix, skipped)))

    def list_unsorted(self, prefix: str, skipped: Skipped | None) -> Iterator[tuple[str, int, float, str]]:
        """As `list`, in no order; holds in memory what folders there are, but not what files."""
        return _described(_paths(prefix, skipped))

    def stat(self, path: str) -> tuple[int, float, str]:
        """(size, time, "") of a regular file."""
        with translated(path, to_read=True):
            info = _require_file(path)
        return info.st_size, info.st_mtime, ""

    def delete(self, path: str) -> None:
        """Remove the file if it is there."""
        with translated(path):
            Path(path).unlink(missing_ok=True)

    def sweep(self, folder: str, before_s: float) -> None:
        """Remove what killed writers left in or below a folder before then; behind links lie others' files."""
        with translated(folder):
            for place, _, names in os.walk(folder):
                for name in names:
                    temp = os.path.join(place, name)
                    if name.startswith(_TEMP_PREFIX) and _is_older(temp, before_s):
                        Path(temp).unlink(missing_ok=True)


def _paths(prefix: str, skipped: Skipped | None) -> Iterator[str]:
    folder = prefix[: prefix.rfind("/") + 1]
    with translated(folder):
        there = os.path.isdir(folder or ".")
    if there:
        yield from (path for path in _walk(folder, skipped) if path.startswith(prefix))


def _described(paths: Iterable[str]) -> Iterator[tuple[str, int, float, str]]:
    for path in paths:
        found = _size_and_time(path)
        if found is not None:
            yield path, *found, ""


def _is_older(path: str, before_s: float) -> bool:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False  # its writer has just finished
    return stat.S_ISREG(info.st_mode) and info.st_mtime < before_s


def _require_file(path: str | Path) -> os.stat_result:
    """Stat of a regular file; opening a pipe or a device could wait for ever."""
    try:
        info = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise ObjectNotFound(f"{path}: no file can be there ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode):
        raise ObjectNotFound(f"{path} is {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a regular file'}")
    return info


def _size_and_time(path: str) -> tuple[int, float] | None:
    """Size (0 for what is no regular file) and time of what a folder lists; None if it was deleted since."""
    try:
        info = os.stat(path)
    except OSError:
        try:
            info = os.lstat(path)  # a link that leads nowhere, or to itself, is itself
        except FileNotFoundError:
            return None
        except OSError:  # its folder may be listed, but not looked into; who reads it will say so
            return 0, 0.0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0, info.st_mtime


def _walk(root: str, skipped: Skipped | None) -> Iterator[str]:
    """Paths of everything below root that is not a folder. Links to folders are followed, but lead to each only once.

    Real folders come before linked ones, and both in the order of their names, so that it is always the same of its
    names under which the files of a folder are listed. A stack of our own: trees may be deeper than Python recurses.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [(root, False)], list[str]()
    while folders or links:
        folder, is_linked = folders.pop() if folders else (heapq.heappop(links), True)
        try:
            with translated(folder):
                info = os.stat(folder or ".")
                place = (info.st_dev, info.st_ino)
                if is_linked and place in seen:  # not asked of real folders: some file systems have no true inodes
                    if skipped:
                        skipped(folder, "it is listed under another name, too")
                    continue
                seen.add(place)
                inside: list[str] = []
                with os.scandir(folder or ".") as entries:
                    for entry in entries:  # not kept: there may be millions
                        if not _is_folder(entry):
                            if not entry.name.startswith(_TEMP_PREFIX):
                                yield folder + entry.name
                        elif entry.is_symlink():
                            heapq.heappush(links, f"{folder}{entry.name}/")
                        else:
                            inside.append(f"{folder}{entry.name}/")
        except StorageError as error:
            if folder != root and isinstance(error, ObjectNotFound):
                continue  # deleted since its name was read
            if skipped is None or folder == root or isinstance(error, StorageUnavailable):
                raise
            skipped(folder, str(error))
            continue
        folders += [(name, is_linked) for name in sorted(inside, reverse=True)]  # the first is the next that is popped


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be looked into
        return False


def _copy(source: BinaryIO, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, _COPY_BYTES)


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
