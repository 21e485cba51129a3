"""An HTTP proxy before the S3 server that hurts chosen answers: what networks and servers do, made to happen on demand.

What is easy to break: a fault must look to the client as it does in the field, so bytes are cut, held back and changed
on the wire, below the client's own checks.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

__all__ = ["READ_FAULTS", "WRITE_FAULTS", "FaultyS3", "Request", "faulty_s3"]

READ_FAULTS = ("500", "503", "reset", "cut", "stall", "slow", "short", "few", "flip", "expired", "mute")
"""What may happen to an answer that carries bytes."""
WRITE_FAULTS = ("500", "503", "reset", "lost", "late500", "expired", "mute")
"""What may happen to a request that changes something."""

_SLOW_BYTES_PER_S = 64 * 2**10
_ERRORS = {
    "403": (403, "AccessDenied"),
    "expired": (403, "ExpiredToken"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "gone": (404, "NoSuchUpload"),
    "late500": (500, "InternalError"),
}


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    range: str | None
    if_match: str | None
    content_md5: str | None
    payer: str | None
    """Who pays for it, where the client says so."""
    key_id: str
    """The access key that signed it; empty where it is not signed."""
    signed_headers: str
    """Which headers the signature covers."""


@dataclass
class FaultyS3:
    """The proxy's address, what it was asked, and the faults that the next requests meet.

    Faults:
        500, 503 (SlowDown), 403, expired (403 ExpiredToken), gone (404 NoSuchUpload): answered at once,
            the server never sees the request.
        reset: the connection is torn down without an answer. down: the same, to every kind of request.
        lost: the server does it, then the connection ends without an answer. late500: it does it and answers 500.
        mute: no answer, until the client leaves. smudge: one bit of the upload.
        cut: half of the body, then the connection ends. stall: half, then silence. slow: 64 kB/s.
        short: 10 bytes less (half, where there are fewer than 20), honestly so in Content-Range.
        few: as short, but Content-Range promises all. whole: a range answered with the whole object.
        flip: one bit of the answer.
        ok: nothing.

    A fault of the list applies to one GET or PUT of an object (or, with `everything`, to one request of any kind); when
    they are used up, `rate` decides.
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    """Which faults were dealt out."""
    rate: float = 0.0
    """Share of the requests that meet a fault of `kinds` (or of `write_kinds`), drawn by `rng`."""
    kinds: tuple[str, ...] = READ_FAULTS
    write_kinds: tuple[str, ...] = WRITE_FAULTS
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    everything: bool = False
    """Faults hurt listings, HEAD, POST and DELETE too."""
    outage: str = ""
    """A fault that every request meets, until it is set back to ""."""
    outage_path: str = ""
    """Only requests whose path holds this meet the outage."""
    before: Callable[[Request], None] | None = None
    """Called before a request is passed on."""
    etag: str = ""
    """An ETag that the server is made to give every object; it may be asked for with If-Match."""
    released: threading.Event = field(default_factory=threading.Event)
    """Ends all stalls."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    conditional: threading.Lock = field(default_factory=threading.Lock)
    """Held for a PUT with If-None-Match: moto looks whether the object is there, and then writes it, where S3 does both
    at once."""

    def gets(self) -> list[Request]:
        """The reads of objects."""
        return [request for request in self.requests if request.method == "GET" and "list-type" not in request.path]

    def next_fault(self, request: Request) -> str:
        """Which fault this request meets."""
        is_object = request.method in ("GET", "PUT") and "list-type" not in request.path
        with self.lock:
            outage = self.outage if self.outage_path in request.path else ""
            fault = outage or "ok"
            if not outage and (is_object or self.everything):
                if self.faults:
                    fault = self.faults.pop(0)
                elif self.rng.random() < self.rate:
                    fault = self.rng.choice(self.kinds if request.method == "GET" else self.write_kinds)
            if fault != "ok":
                self.met[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    state: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        names = ("Range", "If-Match", "Content-MD5", "x-amz-request-payer")
        signature = self.headers.get("Authorization", "")
        key_id = signature.partition("Credential=")[2].partition("/")[0]
        headers = signature.partition("SignedHeaders=")[2].partition(",")[0]
        request = Request(self.command, self.path, *(self.headers.get(name) for name in names), key_id, headers)
        self.state.requests.append(request)
        if self.state.before:
            self.state.before(request)
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.state.next_fault(request)
        if fault in ("500", "503", "403", "expired", "gone"):
            self._refuse(fault)
            return
        if fault in ("reset", "down"):
            self._reset()
            return
        if fault == "mute":
            self._wait()
            return
        if fault == "smudge":
            body = bytes([body[0] ^ 1]) + body[1:]
        status, headers, data = self._ask(fault, body)
        if fault == "late500":
            self._refuse(fault)
        elif fault == "lost":
            self.close_connection = True
        else:
            self._hurt(fault, status, headers, data)

    def _ask(self, fault: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The server's answer."""
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        if fault == "whole":
            headers.pop("Range")
        connection = http.client.HTTPConnection(urlparse(self.upstream).netloc, timeout=60)
        turn = self.state.conditional if "If-None-Match" in headers else contextlib.nullcontext()
        try:
            with turn:
                connection.request(self.command, self.path, body=body, headers=headers)
                answer = connection.getresponse()
                data = answer.read()
        finally:
            connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, data

    def _refuse(self, fault: str) -> None:
        status, code = _ERRORS[fault]
        body = f"<Error><Code>{code}</Code><Message>as asked for</Message></Error>".encode()
        self._answer(status, {}, b"" if self.command == "HEAD" else body)

    def _wait(self) -> None:
        """Be silent until the client leaves, or the test ends."""
        self.close_connection = True
        self.connection.settimeout(0.1)
        while not self.state.released.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _hurt(self, fault: str, status: int, headers: dict[str, str], data: bytes) -> None:
        if self.state.etag and "etag" in headers:
            headers["etag"] = self.state.etag
        if fault == "flip" and data:
            with self.state.lock:
                place = self.state.rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        if fault in ("short", "few"):
            lost = min(10, len(data) // 2)
            data = data[: len(data) - lost]
            if fault == "short" and "content-range" in headers:
                first, _, rest = headers["content-range"].removeprefix("bytes ").partition("-")
                last, _, size = rest.partition("/")
                headers["content-range"] = f"bytes {first}-{int(last) - lost}/{size}"
        length = headers.get("content-length") if self.command == "HEAD" else None
        if fault in ("cut", "stall"):
            self._answer(status, headers, data[: len(data) // 2], length or str(len(data)))
            self.close_connection = True
            if fault == "stall":
                self.wfile.flush()
                self._wait()
        elif fault == "slow":
            self._answer(status, headers, b"", length or str(len(data)))
            self._trickle(data)
        else:
            self._answer(status, headers, data, length)

    def _trickle(self, data: bytes) -> None:
        """Send the body at 64 kB/s, until the client leaves."""
        piece = _SLOW_BYTES_PER_S // 20
        try:
            for start in range(0, len(data), piece):
                self.wfile.write(data[start : start + piece])
                self.wfile.flush()
                if self.state.released.wait(1 / 20):
                    break
        except OSError:
            self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the middle of an answer is part of the game."""


@contextmanager
def faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """A proxy of its own for the time of the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    state = FaultyS3(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"upstream": upstream, "state": state})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
