"""Reading videos by reference: a whole object, or a member of a tar shard; one code for both.

Every checksum that a reference carries is compared on every read. What is easy to break: the order of `read_videos`
is that of its input, although neighbours in a shard are fetched together.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kinoray.config.clip import DecodeConfig, said_limit
from kinoray.config.files import foreign, local_path
from kinoray.errors import (
    ChecksumMismatch,
    ConfigError,
    InvalidReference,
    KinorayError,
    MediaOverBudget,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage.objects import Storage

__all__ = ["Reference", "read_video", "read_videos", "stat_size", "time_problem"]

_GAP_BYTES = 64 * 2**10  # tar headers and a small member between two wanted ones cost less than another request
_WINDOW_BYTES = 32 * 2**20
_MAX_VIDEO_BYTES = DecodeConfig().max_bytes
_MAX_OFFSET = 2**63 - 1
_READ_TRIES = 5


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the bytes of one video are, as a row says: that it can be is checked when it is read."""

    uri: str
    """The object, or the shard that holds it."""
    offset: int | None = None
    """First byte in the shard; None for a whole object."""
    length: int | None = None
    """Number of bytes in the shard; None for a whole object."""
    sha256: str | None = None
    """Hex digest that the bytes must have; None if it is not known."""
    row_problem: str = ""
    """What else is wrong with the row, so that its video is not read; empty if nothing is."""

    @property
    def problem(self) -> str:
        """Why this can be no place of a video; empty if it can."""
        if self.row_problem:
            return self.row_problem
        if (self.offset is None) != (self.length is None):
            return f"offset and length go together, got {self.offset} and {self.length}"
        offset, length = self.offset or 0, self.length or 0
        if offset < 0 or length < 0 or offset + length > _MAX_OFFSET:
            return f"offset {offset} and length {length} can be no part of an object"
        path = local_path(self.uri)
        if "\0" in path or self.uri in ("", "s3://") or self.uri.startswith("s3:///"):
            return f"{self.uri!r} is no address"
        return foreign(self.uri)


def time_problem(start_s: float | None, end_s: float | None) -> str:
    """Why a clip cannot begin and end then; empty if it can, or nothing is said of it."""
    times = [time for time in (start_s, end_s) if time is not None]
    if all(math.isfinite(time) and time >= 0 for time in times) and times == sorted(times):
        return ""
    return f"time_start_s {start_s} and time_end_s {end_s}: no clip can begin and end then"


@dataclass(frozen=True, slots=True)
class _Span:
    """One request: a whole object, or a range that covers one or more members of a shard."""

    uri: str
    offset: int | None
    length: int | None
    members: tuple[int, ...]


def read_video(storage: Storage, reference: Reference, *, max_bytes: int = _MAX_VIDEO_BYTES) -> bytes:
    """The encoded bytes of one video. Bytes with a wrong checksum are fetched again before they are refused.

    The same wrong bytes twice are what the store holds; other wrong bytes each time are a bad network.

    Raises:
        InvalidReference: there can be no such bytes.
        MediaOverBudget: it has more than max_bytes; they were not read.
        ChecksumMismatch: the bytes are not those of the catalog.
        StorageError: they could not be read.
    """
    if reference.problem:
        raise InvalidReference(f"{reference.problem}; mend its row in the catalog")
    found, expected = "", reference.sha256
    for _ in range(_READ_TRIES):
        data = _read_once(storage, reference, max_bytes)
        if expected is None:
            return data
        before, found = found, hashlib.sha256(data).hexdigest()
        if found == expected:
            return data
        if found == before:
            break
    where = "" if reference.offset is None else f" (bytes {reference.offset} + {reference.length})"
    raise ChecksumMismatch(
        f"{reference.uri}{where}: sha256 {found[:16]}... found, {(expected or '')[:16]}... expected by the catalog; "
        "the file was changed or damaged after it was packed"
    )


def _read_once(storage: Storage, reference: Reference, max_bytes: int) -> bytes:
    """The sizes are compared before anything is read: the listing's, or the catalog's, may be old."""
    if reference.offset is not None and reference.length is not None:
        if reference.length > max_bytes:
            raise MediaOverBudget(
                f"{reference.uri} (bytes {reference.offset} + {reference.length}): {reference.length:,} bytes are "
                f"more than {said_limit('max_bytes', max_bytes)}; they were not read"
            )
        return storage.read_range(reference.uri, reference.offset, reference.length)
    try:
        return storage.read(reference.uri, max_bytes=max_bytes)
    except ObjectTooLarge as error:
        raise MediaOverBudget(f"{error}: {said_limit('max_bytes', max_bytes)}") from error


def read_videos(
    storage: Storage, references: Sequence[Reference], *, max_bytes: int = _MAX_VIDEO_BYTES, ahead: int = 4
) -> Iterator[bytes | KinorayError]:
    """The videos of the references, in their order; an error takes its video's place and ends nothing.

    Members of one shard that lie side by side come in one ranged read (at most 32 MiB), also when their order in
    `references` is a local shuffle. `ahead` requests are under way in threads while the caller works. Of a video of
    more than max_bytes (decode.max_bytes) nothing is read.
    """
    spans = deque(_plan_spans(references))
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="read-videos")
    running: deque[tuple[_Span, Future[list[bytes | KinorayError]]]] = deque()
    arrived: dict[int, bytes | KinorayError] = {}
    try:
        for index in range(len(references)):
            while index not in arrived:
                while spans and len(running) < ahead:
                    span = spans.popleft()
                    running.append((span, pool.submit(_read_span, storage, span, references, max_bytes)))
                span, future = running.popleft()
                arrived.update(zip(span.members, future.result(), strict=True))
            yield arrived.pop(index)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _plan_spans(references: Sequence[Reference]) -> list[_Span]:
    """Requests in the order in which they are needed. Members join only inside a window of _WINDOW_BYTES."""
    spans: list[_Span] = []
    window: list[int] = []
    window_bytes = 0
    for index, reference in enumerate(references):
        length = 0 if reference.problem else reference.length or 0
        if window and window_bytes + length > _WINDOW_BYTES:
            spans.extend(_join_neighbours(references, window))
            window, window_bytes = [], 0
        window.append(index)
        window_bytes += length
    spans.extend(_join_neighbours(references, window))
    return spans


def _join_neighbours(references: Sequence[Reference], window: Sequence[int]) -> list[_Span]:
    spans: list[_Span] = []
    inside: list[tuple[str, int, int, int]] = []
    for index in window:
        reference = references[index]
        if reference.offset is None or reference.length is None or reference.problem:
            spans.append(_Span(reference.uri, None, None, (index,)))
        else:
            inside.append((reference.uri, reference.offset, reference.length, index))
    for uri, offset, length, index in sorted(inside):
        last = spans[-1] if spans else None
        if last and last.uri == uri and last.offset is not None and last.length is not None:
            end = last.offset + last.length
            joined = max(end, offset + length) - last.offset  # gaps add up, too
            if offset <= end + _GAP_BYTES and joined <= _WINDOW_BYTES:
                spans[-1] = _Span(uri, last.offset, joined, (*last.members, index))
                continue
        spans.append(_Span(uri, offset, length, (index,)))
    return sorted(spans, key=lambda span: min(span.members))


def _read_span(
    storage: Storage, span: _Span, references: Sequence[Reference], max_bytes: int
) -> list[bytes | KinorayError]:
    """What belongs to each member. Where the joint read fails, or a checksum does, members are read one by one.

    But not where the store is down: each member would wait as long as the joint read did, to say the same.
    """
    block = None
    if len(span.members) > 1 and span.offset is not None and span.length is not None:
        try:
            block = memoryview(storage.read_range(span.uri, span.offset, span.length))
        except StorageUnavailable as error:
            return [error] * len(span.members)
        except KinorayError:
            block = None  # a shard that was cut still has its first members
    found: list[bytes | KinorayError] = []
    for index in span.members:
        reference = references[index]
        is_small = reference.length is not None and 0 < reference.length <= max_bytes
        if block is not None and span.offset is not None and reference.offset is not None and is_small:
            start = reference.offset - span.offset
            data = bytes(block[start : start + (reference.length or 0)])
            if reference.sha256 in (None, hashlib.sha256(data).hexdigest()):
                found.append(data)
                continue
        try:
            found.append(read_video(storage, reference, max_bytes=max_bytes))
        except KinorayError as error:
            found.append(error)
    return found


def stat_size(storage: Storage, uri: str) -> int:
    """The size of an object; 0 where it cannot be looked at: one that is not there, denied, or a link to itself.

    Raises:
        StorageUnavailable: the store is down.
    """
    try:
        return storage.stat(uri).size_bytes
    except StorageUnavailable:
        raise
    except (StorageError, ConfigError):
        return 0
