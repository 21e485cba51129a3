"""The report's site and its videos over HTTP, for one person's browser on this machine: `kinoray report --serve`.

A player asks for ranges of a video, and so do those who jump in it; a member of a shard is a range of the shard.

What is easy to break: it listens on 127.0.0.1 alone, and answers only below a path that nobody can guess, so that other
users of the machine and pages from elsewhere get nothing. No name in a request ever becomes a path: files of the site
go by the names that were written, videos by the row_key of their row. And of what a row names, which may be a
stranger's table, only what begins as a video that browsers play leaves this machine's disk. A client that goes away, or
reads as slowly as it likes, costs one thread and nobody else.
"""

import os
import re
import secrets
import socketserver
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from kinoray.catalog.table import Reference
from kinoray.config.files import local_path, open_file, translated
from kinoray.errors import ChecksumMismatch, InvalidReference, KinorayError
from kinoray.storage.objects import Storage, is_s3, join

__all__ = ["SiteServer", "byte_range", "serve"]

_PORT = 8764  # the same each time: a browser keeps corrections by address
_NUM_PORTS = 10
_IDLE_S = 120.0  # that a connection may say nothing, or a client take for a block
_BLOCK = 2**18
_BLOCK_IN_STORE = 2**21  # each is a request
_HEAD_BYTES = 12
_HOSTS = ("127.0.0.1", "localhost")
_RANGE = re.compile(r"bytes=\s*(\d{0,30})-(\d{0,30})\s*", re.ASCII | re.IGNORECASE)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
}
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # of MP4 and QuickTime


def serve(storage: Storage, out: str, names: Collection[str], videos: Mapping[str, Reference]) -> None:
    """Answer until Ctrl-C.

    Args:
        out: the site's folder or s3:// prefix.
        names: its files.
        videos: where the video of each row_key lies.
    """
    with SiteServer(storage, out, names, videos) as server:
        if server.server_port != _PORT:
            print(
                f"report: port {_PORT} is taken, perhaps by another report; a browser keeps corrections by address, so "
                "what was corrected there is not seen here (download it there, load it here)"
            )
        print(f"report: open {server.address}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("report: no longer served", flush=True)


class SiteServer(ThreadingHTTPServer):
    """See `serve`. `address` is where a browser finds it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        storage: Storage,
        out: str,
        names: Collection[str],
        videos: Mapping[str, Reference],
        *,
        port: int | None = None,
    ) -> None:
        self.storage = storage
        self.out = out
        self.names = frozenset(names)
        self.videos = videos
        self.folder = f"/kinoray-{secrets.token_urlsafe(16)}/"  # the page knows by it that videos are below it
        self._bind(range(_PORT, _PORT + _NUM_PORTS) if port is None else [port])
        self.address = f"http://127.0.0.1:{self.server_port}{self.folder}index.html"

    def _bind(self, ports: Collection[int]) -> None:
        """Listen on the first of these ports that is free, or on any other."""
        for port in [*ports, 0]:
            try:
                super().__init__(("127.0.0.1", port), _Handler)
                return
            except OSError:
                if port == 0:
                    raise

    def server_bind(self) -> None:
        """Without the name of this machine, for which HTTPServer asks, perhaps for long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = "127.0.0.1"
        self.server_port = int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none; of all else, as ever, the traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@dataclass(frozen=True, slots=True)
class _Video:
    """A video that is open."""

    size_bytes: int
    kind: str
    etag: str
    blocks: Callable[[int, int], Iterator[bytes]]
    """Bytes from the first number on, so many, a piece at a time."""


@contextmanager
def _open_video(storage: Storage, place: Reference) -> Iterator[_Video]:
    """What a row names.

    Raises:
        InvalidReference: it is no video that a browser plays, or can be none at all.
        StorageError: it cannot be read.
    """
    if place.problem:
        raise InvalidReference(place.problem)
    if is_s3(place.uri):
        info = storage.stat(place.uri)
        yield _video(place, info.size_bytes, info.etag, lambda at, n: storage.read_range(place.uri, at, n), store=True)
        return
    path = local_path(place.uri)
    with ExitStack() as opened:
        with translated(path, to_read=True):  # not around the answer, whose errors are the client's
            descriptor = opened.enter_context(open_file(path))
        about = os.fstat(descriptor)
        version = f"{about.st_mtime_ns:x}-{about.st_ino:x}"

        def read(at: int, number: int) -> bytes:
            with translated(path, to_read=True):
                return os.pread(descriptor, number, at)

        yield _video(place, about.st_size, version, read, store=False)


def _video(
    place: Reference, size_bytes: int, version: str, read: Callable[[int, int], bytes], *, store: bool
) -> _Video:
    begin = place.offset or 0
    length = size_bytes if place.length is None else place.length
    if begin + length > size_bytes:
        raise ChecksumMismatch(f"{place.uri} has {size_bytes} bytes, and the video ends at byte {begin + length}")
    kind = _kind_of(read(begin, min(length, _HEAD_BYTES)) if length else b"")
    if not kind:
        raise InvalidReference(f"{place.uri} does not begin as MP4, QuickTime, Matroska, WebM or Ogg")

    def blocks(first: int, number: int) -> Iterator[bytes]:
        at, end = begin + first, begin + first + number
        while at < end:
            data = read(at, min(end - at, _BLOCK_IN_STORE if store else _BLOCK))
            if not data:
                raise ChecksumMismatch(f"{place.uri} was cut at byte {at} while it was read")
            yield data
            at += len(data)

    return _Video(length, kind, f'"{version}-{begin:x}-{length:x}"', blocks)


def _kind_of(head: bytes) -> str:
    """The media type of a file by its first bytes; empty for what no browser plays."""
    if head[4:8] in _FIRST_BOXES:
        return "video/mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video/webm"
    return "video/ogg" if head.startswith(b"OggS") else ""


def byte_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """The first byte and the number of bytes that a Range header asks of a file; None for all of it.

    All of it, too, where a server passes the header over (RFC 9110, 14.2): another unit, several ranges, no range.

    Raises:
        ValueError: there is no such range in the file.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        number = min(int(match[2]), size_bytes)
        first = size_bytes - number
    else:
        first = int(match[1])
        last = int(match[2]) if match[2] else size_bytes - 1
        if match[2] and last < first:
            return None
        number = min(last, size_bytes - 1) - first + 1
    if number <= 0:
        raise ValueError(f"no byte of {header!r:.80} is among {size_bytes}")
    return first, number


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: SiteServer
    protocol_version = "HTTP/1.1"
    server_version = "kinoray"
    sys_version = ""
    timeout = _IDLE_S

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        folder = self.server.folder
        if not self._has_our_name():
            self._say(403, "this server is for a browser on its own machine")
        elif not secrets.compare_digest(path[: len(folder)].encode(), folder.encode()):
            self._say(404, "nothing is here; kinoray report --serve says the whole address")
        else:
            name = path[len(folder) :] or "index.html"
            if name in self.server.names:
                self._send_file(name)
            elif (key := name.removeprefix("media/")) != name and key in self.server.videos:
                self._send_video(self.server.videos[key])
            else:
                self._say(404, "there is no such file in this report")

    def _has_our_name(self) -> bool:
        """Whether the browser believes to talk to this machine: a foreign name may have been made to lead here."""
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in _HOSTS
        except ValueError:
            return False

    def _send_file(self, name: str) -> None:
        try:
            data = self.server.storage.read(join(self.server.out, name))
        except KinorayError as error:
            self._say(404, str(error))
            return
        self._begin(200, _TYPES[name.rpartition(".")[2]], len(data))
        self._write(data)

    def _send_video(self, place: Reference) -> None:
        begun = False
        try:
            with _open_video(self.server.storage, place) as video:
                asked = self.headers.get("Range", "")
                if self.headers.get("If-Range", video.etag) != video.etag:
                    asked = ""  # the browser has a part of another file
                try:
                    part = byte_range(asked, video.size_bytes)
                except ValueError as error:
                    self._say(416, str(error), {"Content-Range": f"bytes */{video.size_bytes}"})
                    return
                more = {"Accept-Ranges": "bytes", "ETag": video.etag}
                first, number = part or (0, video.size_bytes)
                if part:
                    more["Content-Range"] = f"bytes {first}-{first + number - 1}/{video.size_bytes}"
                self._begin(206 if part else 200, video.kind, number, more)
                begun = True
                for block in video.blocks(first, number) if self.command == "GET" else ():
                    self._write(block)
        except KinorayError as error:
            if begun:
                self.close_connection = True  # too few bytes tell the browser
            else:
                self._say(415 if isinstance(error, InvalidReference) else 404, str(error))

    def _say(self, code: int, text: str, more: Mapping[str, str] | None = None) -> None:
        data = f"{text}\n".encode("utf-8", "backslashreplace")
        self._begin(code, "text/plain; charset=utf-8", len(data), more)
        self._write(data)

    def _begin(self, code: int, kind: str, length: int, more: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(length),
            "Cache-Control": "no-cache",
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *_: Any) -> None:
        """Nothing: the terminal is for people, and the page says what it could not play."""
