"""Tars: the members of an archive, gzipped or not, as a stream that is read once, in order; and a shard as it grows.

A member is a name and bytes in memory: no path of an archive is ever opened. Shards are plain tar files that WebDataset
reads too (`<key>.mp4`, `<key>.json`). What is easy to break: an archive is
hostile input, so nothing in a header may make us take much memory (sizes, long names, chains of headers), and what is
wrong with it ends the stream with a reason, not with an exception. And the same videos in the same order must give the
same shard, byte for byte, whoever writes it.
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Protocol, Self

from kinoray.config.shared import DecodeConfig
from kinoray.console import many
from kinoray.errors import ChecksumMismatch, DamagedArchive
from kinoray.pack.plan import PlannedVideo
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, join
from kinoray.video.info import VideoInfo
from kinoray.video.transcode import Transcoded

__all__ = [
    "Archive",
    "Decoder",
    "Examined",
    "Member",
    "MemberKind",
    "ShardWriter",
    "examine",
    "is_archive",
    "open_archive",
    "write_tar",
]

MemberKind = Literal["file", "folder", "link", "special"]
"""`link` is a hard or symbolic link; `special` is a device, a pipe, a sparse file, or something malformed."""

_BLOCK_BYTES = 512
_CHUNK_BYTES = 4 * 2**20
_PREFETCHED_CHUNKS = 2
_SLICE_BYTES = 2**18
_MAX_EXTENSION_BYTES = 2**20  # of a header that extends the next one: long names, times, attributes
_MAX_EXTENSIONS = 64  # such headers in a row
_MAX_EXPANSION = (64, 2**32)  # times the packed bytes, plus this: videos hardly shrink, so this is no archive of them

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_OTHER_FORMATS = {b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z": "7z"}
_EXTENSIONS = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME}
_SKIPPED = {tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK}  # what they say, we have no use for
_KINDS: dict[bytes, MemberKind] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
}
_WITHOUT_DATA = {tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive."""

    name: str
    """As the archive has it: any text at all, perhaps with surrogates for bytes that are not UTF-8."""
    kind: MemberKind
    """What it claims to be."""
    size_bytes: int
    """How many bytes the header promises."""


class _DamagedError(Exception):
    """The stream cannot be read on from here; the reason, in words."""


def is_archive(name: str) -> bool:
    """Whether a file's name says that it is an archive (.tar, .tar.gz, .tgz); its content decides what is inside."""
    return name.lower().endswith(_ENDINGS)


def open_archive(storage: Storage, uri: str) -> "Archive":
    """The archive at uri, fetched a few MiB at a time while it is read.

    Raises (also while it is read):
        StorageError: it cannot be read; ChecksumMismatch if it is replaced meanwhile.
    """
    return Archive(_fetch(storage, uri))


class Archive:
    """A pass over an archive's members: iterate, and `read` the member at hand before going on.

        for member in archive:
            data = archive.read()

    Iterating never raises for what is in the archive: where it cannot be read on, it ends and `damage` says why.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.damage = ""
        """Why the archive could not be read to its end; empty if it was."""
        self.num_members = 0
        """Members that were found so far."""
        self._stream = _Stream(_plain(iter(chunks)))
        self._left = 0  # bytes of the member at hand, with its padding, that were not read
        self._size_bytes = 0
        self._cut = ""  # why the member at hand could not be read

    def __iter__(self) -> Iterator[Member]:
        try:
            while (member := self._next()) is not None:
                self.num_members += 1
                yield member
                if self._cut:
                    raise _DamagedError(self._cut)
                self._stream.skip(self._left)
                self._left = 0
            self._stream.require_zeros()
        except _DamagedError as error:
            behind = f"behind member {self.num_members}" if self.num_members else "at its start"
            self.damage = f"{behind}: {error}"

    def read(self) -> bytes:
        """The bytes of the member at hand, once; the caller has looked at size_bytes before.

        Raises:
            DamagedArchive: the archive ends or is damaged inside the member.
        """
        wanted, self._left = self._size_bytes, -self._size_bytes % _BLOCK_BYTES
        try:
            return self._stream.take(wanted)
        except _DamagedError as error:
            self._cut = str(error)
            raise DamagedArchive(f"the archive is damaged inside this member: {error}") from error

    def _next(self) -> Member | None:
        """The next member's header, with what the headers before it say of it."""
        name: str | None = None
        size_bytes: int | None = None
        odd = False
        for _ in range(_MAX_EXTENSIONS):
            info = self._header()
            if info is None:
                return None
            if info.type in _SKIPPED or (info.type in _EXTENSIONS and info.size > _MAX_EXTENSION_BYTES):
                odd = odd or info.type in _EXTENSIONS
                self._stream.skip(_padded(info.size))
            elif info.type in _EXTENSIONS:
                data = self._stream.take(_padded(info.size))[: info.size]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
                else:
                    extended = _parse_pax(data)
                    odd = odd or extended is None
                    name, size_bytes, sparse = extended or (None, None, False)
                    odd = odd or sparse
            else:
                return self._member(info, name, size_bytes, odd=odd)
        raise _DamagedError(f"{_MAX_EXTENSIONS} extended headers in a row and no member")

    def _member(self, info: tarfile.TarInfo, name: str | None, size_bytes: int | None, *, odd: bool) -> Member:
        kind = _KINDS.get(info.type, "special")
        if info.type == tarfile.GNUTYPE_SPARSE and getattr(info, "_sparse_structs", ((), False))[1]:
            while self._stream.take(_BLOCK_BYTES)[504]:  # more of its map, in blocks of their own
                pass
        size_bytes = info.size if size_bytes is None else size_bytes
        name = info.name if name is None else name
        if info.type == tarfile.AREGTYPE and name.endswith("/"):
            kind = "folder"
        if kind == "file" and odd:
            kind = "special"
        self._size_bytes = 0 if info.type in _WITHOUT_DATA else size_bytes
        self._left = _padded(self._size_bytes)
        return Member(name, kind, size_bytes)

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end mark."""
        block = self._stream.take(_BLOCK_BYTES, or_nothing=True)
        if not block:
            reason = "it ends without an end mark, so members may be missing"
            raise _DamagedError(reason if self.num_members else "it has no bytes")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not any(block):
                return None
            what = f"a damaged header ({error})" if self.num_members else _name_format(block)
            raise _DamagedError(what) from error
        if info.size < 0:
            raise _DamagedError(f"a header with a size of {info.size}")
        return info


def _name_format(block: bytes) -> str:
    """What an archive is that is not what we read, by its first bytes."""
    found = next((name for magic, name in _OTHER_FORMATS.items() if block.startswith(magic)), "something else")
    return f"it is {found}; only tar and gzipped tar are read, pack it again as one of these"


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _BLOCK_BYTES


def _parse_pax(data: bytes) -> tuple[str | None, int | None, bool] | None:
    """(path, size, whether it is a sparse file) of records `<length> <key>=<value>\\n`; None if they are malformed."""
    path: str | None = None
    size_bytes: int | None = None
    sparse = False
    position = 0
    while position < len(data) and data[position]:
        digits, space, _ = data[position : position + 20].partition(b" ")
        if not (space and digits.isdigit() and len(digits) + 1 < int(digits) <= len(data) - position):
            return None
        record = data[position + len(digits) + 1 : position + int(digits)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        if key == b"path":
            path = value[:-1].decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > 20:
                return None
            size_bytes = int(value)
        sparse = sparse or key.startswith(b"GNU.sparse.")
        position += int(digits)
    return path, size_bytes, sparse


class _Stream:
    """Exactly so many bytes at a time from an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")

    def take(self, count: int, *, or_nothing: bool = False) -> bytes:
        """`count` bytes. At the very end of the stream: b"" if or_nothing."""
        if count <= len(self._chunk):
            taken, self._chunk = self._chunk[:count], self._chunk[count:]
            return bytes(taken)
        gathered = bytearray()
        for part in self._pull(count):
            gathered += part
        if len(gathered) < count and not (or_nothing and not gathered):
            raise _DamagedError(f"it ends {count - len(gathered)} bytes early")
        return bytes(gathered)

    def skip(self, count: int) -> None:
        """Leave out `count` bytes."""
        skipped = sum(len(part) for part in self._pull(count))
        if skipped < count:
            raise _DamagedError(f"it ends {count - skipped} bytes early")

    def require_zeros(self) -> None:
        """Read to the end, where only padding may follow: this also checks a gzip's checksum."""
        for part in self._pull(None):
            if any(part):
                raise _DamagedError("more data follows its end mark")

    def _pull(self, count: int | None) -> Iterator[memoryview]:
        """Parts of the next `count` bytes, or of all that is left; fewer at the end of the stream."""
        while count is None or count > 0:
            if not self._chunk:
                self._chunk = memoryview(next(self._chunks, b""))
                if not self._chunk:
                    return
            part = self._chunk if count is None else self._chunk[:count]
            self._chunk = self._chunk[len(part) :]
            count = None if count is None else count - len(part)
            yield part


def _fetch(storage: Storage, uri: str) -> Iterator[bytes]:
    """The object's bytes, the next ranges under way in threads."""
    before = storage.stat(uri)
    offsets = iter(range(0, before.size_bytes, _CHUNK_BYTES))
    running: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(_PREFETCHED_CHUNKS, thread_name_prefix="read-archive")
    try:
        while True:
            while len(running) < _PREFETCHED_CHUNKS and (offset := next(offsets, None)) is not None:
                length = min(_CHUNK_BYTES, before.size_bytes - offset)
                running.append(pool.submit(storage.read_range, uri, offset, length))
            if not running:
                break
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if storage.stat(uri) != before:  # ranges carry no version: the parts may be of two archives
        raise ChecksumMismatch(f"{uri} was replaced while it was read; run the same command again")


def _plain(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks, inflated if they begin as a gzip does, whatever the file is called."""
    first = b""
    while len(first) < 2 and (more := next(chunks, b"")):
        first += more
    if not first.startswith(b"\x1f\x8b"):
        yield first
        yield from chunks
        return
    packed = unpacked = 0
    inflater = zlib.decompressobj(wbits=31)
    for chunk in _slices(first, chunks):
        packed += len(chunk)
        data = chunk
        while True:
            if inflater.eof:  # another gzip may follow, or padding
                data = data.lstrip(b"\0")
                if not data:
                    break
                inflater = zlib.decompressobj(wbits=31)
            try:
                piece = inflater.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise _DamagedError(f"the gzip is damaged ({error})") from error
            unpacked += len(piece)
            if unpacked > _MAX_EXPANSION[0] * packed + _MAX_EXPANSION[1]:
                raise _DamagedError(f"{packed} bytes became {unpacked}: this is no archive of videos")
            if piece:
                yield piece
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            if not data and (inflater.eof or len(piece) < _CHUNK_BYTES):  # a full piece may have left some inside
                break
    if not inflater.eof:
        raise _DamagedError("the gzip is cut short")


def _slices(first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Smaller chunks: zlib copies what it has not consumed at every call."""
    for chunk in itertools.chain((first,), chunks):
        for start in range(0, len(chunk), _SLICE_BYTES):
            yield chunk[start : start + _SLICE_BYTES]


# One shard while it is written: a tar on local disk that grows by a video at a time


@dataclass(frozen=True, slots=True)
class Examined:
    """A video that may be packed."""

    data: bytes
    """What goes into the shard: an MP4 if it was transcoded, else the original bytes."""
    info: VideoInfo
    """The probe of these bytes."""
    sha256: str
    """Of these bytes."""
    source_sha256: str
    """Of the bytes that were found."""
    transcoded: bool = False
    """Whether it was."""
    note: str | None = None
    """What the catalog should say of it, if anything."""


class Decoder(Protocol):
    """Where untrusted bytes are looked at: a kinoray.video.sandbox.pool.Sandbox."""

    def probe(self, data: bytes, config: DecodeConfig) -> VideoInfo:
        """kinoray.video.frames.probe."""

    def transcode(self, data: bytes, config: DecodeConfig) -> Transcoded:
        """kinoray.video.transcode.transcode."""


def examine(decoder: Decoder, data: bytes, decode: DecodeConfig, *, transcoded: bool) -> Examined:
    """Probe a video and, if asked for, transcode it.

    Raises:
        MediaError: it is not to be packed, and why.
    """
    if not transcoded:
        info = decoder.probe(data, decode)
        sha256 = hashlib.sha256(data).hexdigest()
        return Examined(data, info, sha256, sha256)
    made = decoder.transcode(data, decode)
    note = (
        f"{many(made.frames_lost, 'frame')} could not be decoded when it was transcoded" if made.frames_lost else None
    )
    sha256, source_sha256 = (hashlib.sha256(each).hexdigest() for each in (made.data, data))
    return Examined(made.data, made.info, sha256, source_sha256, transcoded=True, note=note)


class ShardWriter:
    """Writes one shard. Use it in a `with` block, and `put` it at the end."""

    def __init__(self) -> None:
        self.size_bytes = 0
        """Bytes of the videos written so far."""
        self._folder = contextlib.ExitStack()
        self._path = self._folder.enter_context(scratch_folder("pack")) / "shard.tar"
        self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  (closed by close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the local file."""
        self._tar.close()
        self._folder.close()

    def add(self, video: PlannedVideo, examined: Examined) -> int:
        """Append a video; returns the offset of its first byte."""
        self.size_bytes += len(examined.data)
        return write_tar(self._tar, replace(video, name="x.mp4") if examined.transcoded else video, examined.data)

    def put(self, storage: Storage, out: str, name: str, *, tagged: bool) -> tuple[str, int]:
        """Store the tar as shards/<name>.tar, or shards/<name>-<digest>.tar if tagged; returns (uri, size in bytes).

        A tag keeps writers apart whose bytes may differ (other machines transcode to other bytes): none can overwrite
        what another one has committed.
        """
        self._tar.close()
        tag = ""
        if tagged:
            with self._path.open("rb") as file:
                tag = "-" + hashlib.file_digest(file, "sha256").hexdigest()[:8]
        uri = absolute(join(out, "shards", f"{name}{tag}.tar"))
        storage.put_file(uri, self._path)
        return uri, self._path.stat().st_size


def write_tar(tar: tarfile.TarFile, video: PlannedVideo, data: bytes) -> int:
    """Append `<key>.<extension>` and `<key>.json`; returns the offset of the video's first byte in the tar."""
    stem, _, ending = video.name.rpartition("/")[2].rpartition(".")
    extension = re.sub(r"[^a-z0-9]", "", ending.lower())[:8] if stem else ""
    if extension in ("", "json"):  # .json is the other member
        extension = "video"
    about: dict[str, object] = {
        "video_id": video.video_id,
        "label": video.label,
        "label_id": video.label_id,
        "split": video.split,
        "source": video.uri,
    }
    if video.labels is not None:
        about |= {"labels": video.labels, "label_ids": video.label_ids}
    tar.addfile(_header(f"{video.video_id}.{extension}", len(data)), io.BytesIO(data))
    offset = tar.offset - -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
    text = json.dumps(about, ensure_ascii=False).encode()
    tar.addfile(_header(f"{video.video_id}.json", len(text)), io.BytesIO(text))
    return offset


def _header(name: str, size_bytes: int) -> tarfile.TarInfo:
    """A member of no owner and no date: the same files give the same tar."""
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    return header
