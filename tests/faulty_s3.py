"""An HTTP proxy before the S3 server that hurts chosen answers: what networks do, made to happen on demand."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

__all__ = ["FaultyS3", "Request", "faulty_s3"]


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    range: str | None
    if_match: str | None
    content_md5: str | None


@dataclass
class FaultyS3:
    """The proxy's address, what it was asked, and the faults that the next requests meet.

    Faults: cut (half of the body, then the connection ends), stall (half, then silence), flip (one bit), short (a range
    that says honestly that it is shorter), whole (a range answered with the whole object), 403, 500, lost (the server
    does it, the answer never comes), ok. A fault applies to one GET or PUT; when they are used up, all is well.
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    before: Callable[[Request], None] | None = None
    """Called before a request is passed on."""
    page_size: int = 0
    """Most objects in one answer to a listing; 0 for the server's choice."""
    released: threading.Event = field(default_factory=threading.Event)
    """Ends all stalls."""

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and "list-type" not in request.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    state: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        names = ("Range", "If-Match", "Content-MD5")
        request = Request(self.command, self.path, *(self.headers.get(name) for name in names))
        self.state.requests.append(request)
        if self.state.before:
            self.state.before(request)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_object = self.command in ("GET", "PUT") and "list-type" not in self.path
        fault = self.state.faults.pop(0) if is_object and self.state.faults else "ok"
        if fault in ("403", "500"):
            self._answer(int(fault), {}, b"<Error><Code>AccessDenied</Code></Error>" if fault == "403" else b"")
            return
        headers = dict(self.headers.items())
        if fault == "whole":
            headers.pop("Range")
        connection = http.client.HTTPConnection(urlparse(self.upstream).netloc, timeout=60)
        paged = f"&max-keys={self.state.page_size}" if self.state.page_size and "list-type" in self.path else ""
        connection.request(self.command, self.path + paged, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._hurt(fault, answer.status, {name.lower(): value for name, value in answer.getheaders()}, data)

    def _hurt(self, fault: str, status: int, headers: dict[str, str], data: bytes) -> None:
        if fault == "flip":
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        if fault == "short":
            data = data[:-10]
            first, _, rest = headers["content-range"].removeprefix("bytes ").partition("-")
            last, _, size = rest.partition("/")
            headers["content-range"] = f"bytes {first}-{int(last) - 10}/{size}"
        length = headers.get("content-length") if self.command == "HEAD" else None
        if fault not in ("cut", "stall"):
            self._answer(status, headers, data, length)
            return
        self._answer(status, headers, data[: len(data) // 2], str(len(data)))
        self.close_connection = True
        if fault == "stall":
            self.wfile.flush()
            self.state.released.wait(30)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815


@contextmanager
def faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """A proxy of its own for the time of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    state = FaultyS3(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"upstream": upstream, "state": state})
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
