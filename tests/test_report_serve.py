"""`kinoray report --serve` over real sockets: ranges, members of shards, names that try to get out, lost clients."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from kinoray.catalog.table import Reference
from kinoray.config.shared import StorageConfig
from kinoray.library.serve import SiteServer, byte_range
from kinoray.storage.objects import Storage
from report_sites import predictions, row, write_predictions

HEAD = b"\x00\x00\x00\x18ftypisom"
NAMES = ("index.html", "assets/report.js", "data/site.js")


def video_bytes(size: int, seed: int = 0) -> bytes:
    """Begins as MP4, and no two stretches of it are alike."""
    return HEAD + np.random.default_rng(seed).bytes(size - len(HEAD))


@contextlib.contextmanager
def serving(
    folder: Path | str, videos: Mapping[str, Reference], storage: Storage | None = None
) -> Iterator[SiteServer]:
    with SiteServer(storage or Storage(), str(folder), NAMES, videos, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


Answer = tuple[int, dict[str, str], bytes]


def ask(server: SiteServer, name: str, method: str = "GET", **headers: str) -> Answer:
    """Of a name below the address that nobody can guess; header names with _ for -."""
    return ask_path(server, server.folder + name, method, **headers)


def ask_path(server: SiteServer, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 100)),
        ("bytes=99-", (99, 1)),
        ("bytes=10-19", (10, 10)),
        ("bytes=10-1000", (10, 90)),
        ("bytes=-1", (99, 1)),
        ("bytes=-1000", (0, 100)),
        (" BYTES=0-9 ", (0, 10)),
        *((header, None) for header in ("", "bytes", "bytes=", "bytes=-", "bytes=5-4", "bytes=a-b", "frames=0-1")),
        *((header, None) for header in ("bytes=0-1,5-6", "bytes=+1-2", "bytes=0--1", "bytes=1_0-", f"bytes={9**99}-")),
    ],
)
def test_a_range_is_read_as_rfc_9110_says(header: str, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0", f"bytes={10**29}-"])
def test_a_range_behind_the_end_is_none(header: str) -> None:
    with pytest.raises(ValueError, match="no byte of 'bytes="):
        byte_range(header, 100)


def test_ranges_are_the_bytes_of_the_file_and_head_says_the_same_without_them(site: Path, tmp_path: Path) -> None:
    data = video_bytes(700_000)
    (tmp_path / "a.mp4").write_bytes(data)
    rng = np.random.default_rng(1)
    with serving(site, {"k1": Reference(str(tmp_path / "a.mp4"))}) as server:
        status, about, found = ask(server, "media/k1")
        assert (status, found) == (200, data)
        assert about["content-type"] == "video/mp4"
        assert (about["accept-ranges"], about["content-length"]) == ("bytes", "700000")
        for first, last in [*np.sort(rng.integers(0, len(data), (20, 2)), axis=1).tolist(), [0, 0], [699_999, 10**6]]:
            asked = f"bytes={first}-{last}"
            status, part, found = ask(server, "media/k1", Range=asked)
            last = min(last, len(data) - 1)
            assert (status, found) == (206, data[first : last + 1])
            assert part["content-range"] == f"bytes {first}-{last}/700000"
            head = ask(server, "media/k1", "HEAD", Range=asked)
            assert (head[0], head[2]) == (206, b"")
            assert {**head[1], "date": ""} == {**part, "date": ""}
        assert ask(server, "media/k1", Range="bytes=-5")[2] == data[-5:]
        status, about, found = ask(server, "media/k1", Range="bytes=700000-")
        assert (status, about["content-range"]) == (416, "bytes */700000")
        assert b"no byte of" in found
        etag = ask(server, "media/k1", "HEAD")[1]["etag"]
        assert ask(server, "media/k1", Range="bytes=0-4", If_Range=etag)[0] == 206
        os.utime(tmp_path / "a.mp4", (1, 1))  # it is another file now: the rest of the old one is not for it
        assert ask(server, "media/k1", Range="bytes=0-4", If_Range=etag)[0] == 200


def test_one_connection_serves_many_requests(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes(5000))
    with serving(site, {"k1": Reference(str(tmp_path / "a.mp4"))}) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        with contextlib.closing(connection):
            connection.connect()
            port = connection.sock.getsockname()
            for name, status in [("media/k1", 200), ("media/k2", 404), ("index.html", 200), ("media/k1", 200)]:
                connection.request("GET", server.folder + name)
                answer = connection.getresponse()
                assert (answer.status, len(answer.read()) > 0) == (status, True)
                assert connection.sock.getsockname() == port


def test_a_member_of_a_shard_is_all_that_is_seen_of_it(site: Path, tmp_path: Path) -> None:
    members = [video_bytes(3000, seed=1), video_bytes(2000, seed=2), b"secret" * 100]
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"".join(members))
    videos = {
        "k1": Reference(str(shard), 0, 3000),
        "k2": Reference(str(shard), 3000, 2000),
        "k3": Reference(str(shard), 5000, 600),
        "k4": Reference(str(shard), 3000, 2601),
        "k5": Reference(str(shard), -1, 10),
    }
    with serving(site, videos) as server:
        assert [ask(server, f"media/{key}")[2] for key in ("k1", "k2")] == members[:2]
        assert ask(server, "media/k2", Range="bytes=-700")[2] == members[1][-700:]
        assert ask(server, "media/k2", Range="bytes=1990-99999")[2] == members[1][1990:]
        assert ask(server, "media/k2", Range="bytes=2000-")[0] == 416
        assert ask(server, "media/k3")[:1] == (415,)
        assert ask(server, "media/k4")[0] == 404  # it would end behind the shard
        assert ask(server, "media/k5")[0] == 415


def test_no_name_leads_out_of_what_was_written_and_what_the_table_names(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes(100))
    (tmp_path / "secret.mp4").write_bytes(video_bytes(100))
    (site / "mine.html").write_text("not the report's")
    with serving(site, {"k1": Reference(str(tmp_path / "a.mp4"))}) as server:
        assert ask(server, "data/site.js")[2] == b"this is data/site.js"
        assert ask(server, "")[2] == b"this is index.html"
        assert ask(server, "assets/report.js?v=1")[1]["content-type"].startswith("text/javascript")
        for name in (
            *("mine.html", "data/", "data", "../secret.mp4", "%2e%2e/secret.mp4", "data/../../secret.mp4"),
            *(
                "media/",
                "media/k2",
                "media/../index.html",
                "media/k1/",
                "media/k1/../../secret.mp4",
                "media//etc/passwd",
            ),
            *("media/k1%00", f"media{tmp_path}/secret.mp4", "/etc/passwd", "//etc/passwd", "data\\site.js"),
        ):
            status, _, found = ask(server, name)
            assert (status, found) == (404, b"there is no such file in this report\n"), name
        for path in ("/", "/index.html", "/media/k1", "/kinoray-/media/k1", server.folder[:-2] + "x/media/k1", "*"):
            assert ask_path(server, path)[0] == 404, path
        for host in ("evil.example", f"evil.example:{server.server_port}", "", "[", "127.0.0.1.evil.example"):
            assert ask(server, "media/k1", Host=host)[0] == 403, host
        for host in ("localhost:9999", "127.0.0.1", f"LOCALHOST:{server.server_port}"):
            assert ask(server, "media/k1", Host=host)[0] == 200, host
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, "media/k1", method)[0] == 501
        about = ask(server, "media/k1")[1]
        assert about["x-content-type-options"] == "nosniff"
        assert about["cross-origin-resource-policy"] == "same-origin"
        assert about["content-security-policy"] == "frame-ancestors 'none'"


def test_it_listens_to_this_machine_alone(site: Path) -> None:
    with serving(site, {}) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", server.server_port), timeout=5).close()
        with serving(site, {}) as other:
            assert server.folder != other.folder
            assert ask_path(other, server.folder + "index.html")[0] == 404


def test_what_a_row_names_leaves_only_as_a_video(site: Path, tmp_path: Path) -> None:
    """A stranger's table may name whatever its reader may read."""
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (tmp_path / "a.mp4").write_bytes(video_bytes(100))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "old.avi").write_bytes(b"RIFF\x00\x00\x00\x00AVI LIST")
    (tmp_path / "to-video").symlink_to("a.mp4")
    (tmp_path / "to-key.mp4").symlink_to("key")
    (tmp_path / "to-itself.mp4").symlink_to("to-itself.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    expected = {
        str(tmp_path / "key"): 415,
        str(tmp_path / "empty.mp4"): 415,
        str(tmp_path / "old.avi"): 415,
        str(tmp_path / "to-video"): 200,
        str(tmp_path / "to-key.mp4"): 415,
        str(tmp_path / "to-itself.mp4"): 404,
        str(tmp_path / "pipe.mp4"): 404,
        str(tmp_path / "gone.mp4"): 404,
        str(tmp_path): 404,
        "/dev/zero": 404,
        "/proc/self/environ": 404,
        "": 415,
        "a\0b": 415,
        "https://example.com/a.mp4": 415,
    }
    with serving(site, {f"k{place}": Reference(uri) for place, uri in enumerate(expected)}) as server:
        for place, (uri, status) in enumerate(expected.items()):
            found = ask(server, f"media/k{place}")
            assert found[0] == status, uri
            assert b"OPENSSH" not in found[2]
            assert status == 200 or found[2].count(b"\n") == 1


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (HEAD, "video/mp4"),
        (b"\x00\x00\x00\x08wide\x00\x00", "video/mp4"),
        (b"\x1a\x45\xdf\xa3\x01", "video/webm"),
        (b"OggS\x00", "video/ogg"),
    ],
)
def test_the_kind_is_told_by_the_first_bytes_and_not_by_the_name(
    head: bytes, kind: str, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.html").write_bytes(head)
    with serving(site, {"k1": Reference(str(tmp_path / "a.html"))}) as server:
        assert ask(server, "media/k1")[1]["content-type"] == kind


def test_a_file_of_five_gigabytes_is_read_at_its_end(site: Path, tmp_path: Path) -> None:
    size, place = 5 * 2**30, 2**32 + 7
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.write(HEAD)
        file.truncate(size)
        file.seek(place)
        file.write(b"here")
    with serving(site, {"k1": Reference(str(tmp_path / "huge.mp4"))}) as server:
        assert ask(server, "media/k1", "HEAD")[1]["content-length"] == str(size)
        status, about, found = ask(server, "media/k1", Range=f"bytes={place}-{place + 3}")
        assert (status, found, about["content-range"]) == (206, b"here", f"bytes {place}-{place + 3}/{size}")
        assert ask(server, "media/k1", Range="bytes=-2")[1]["content-range"] == f"bytes {size - 2}-{size - 1}/{size}"
        assert ask(server, "media/k1", Range=f"bytes={size}-")[0] == 416


def begun(server: SiteServer, name: str) -> socket.socket:
    """A client that has asked for all of a file and read a little."""
    client = socket.create_connection(("127.0.0.1", server.server_port), timeout=30)
    client.sendall(f"GET {server.folder}{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert client.recv(1000).startswith(b"HTTP/1.1 200")
    return client


def wait_until_idle(before: int) -> None:
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "a thread still serves who has gone away"
        time.sleep(0.01)


def test_clients_that_go_away_leave_nothing_behind(
    site: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "large.mp4").open("wb") as file:
        file.write(HEAD)
        file.truncate(2**30)
    with serving(site, {"k1": Reference(str(tmp_path / "large.mp4"))}) as server:
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        clients = [begun(server, "media/k1") for _ in range(20)]
        assert ask(server, "index.html")[0] == 200  # others are answered meanwhile
        for client in clients:
            client.close()
        for text in (b"GET ", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
                client.sendall(text)
        wait_until_idle(threads)
        end = time.monotonic() + 30  # a thread that has ended may still be closing its socket
        while (left := len(os.listdir("/proc/self/fd"))) > files and time.monotonic() < end:
            time.sleep(0.01)
        assert left <= files
        assert ask(server, "media/k1", Range="bytes=0-11")[2] == HEAD
    assert capfd.readouterr() == ("", "")


def test_a_file_that_shrinks_while_it_is_read_is_cut_and_not_filled(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with path.open("wb") as file:
        file.write(HEAD)
        file.truncate(2**30)
    with serving(site, {"k1": Reference(str(path))}) as server, contextlib.closing(begun(server, "media/k1")) as client:
        os.truncate(path, 1000)
        num_bytes = 0
        while data := client.recv(2**20):
            num_bytes += len(data)
        assert num_bytes < 2**28  # what was on its way; then the connection ended
        assert ask(server, "media/k1", "HEAD")[1]["content-length"] == "1000"


@pytest.mark.ray
def test_videos_in_a_bucket_are_read_in_ranges_too(site: Path, bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    data = video_bytes(5 * 2**20)
    storage.put(f"{bucket}/a.mp4", data)
    storage.put(f"{bucket}/note.txt", b"no video")
    videos = {
        "k1": Reference(f"{bucket}/a.mp4"),
        "k2": Reference(f"{bucket}/a.mp4", 0, 1000),
        "k3": Reference(f"{bucket}/gone.mp4"),
        "k4": Reference(f"{bucket}/note.txt"),
    }
    with serving(site, videos, storage) as server:
        assert ask(server, "media/k1")[2] == data
        assert ask(server, "media/k1", Range="bytes=3000000-")[2] == data[3_000_000:]
        assert ask(server, "media/k2")[2] == data[:1000]
        assert [ask(server, f"media/{key}")[0] for key in ("k3", "k4")] == [404, 415]


@pytest.mark.ray
def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes(100))
    labels = write_predictions(tmp_path / "labels", predictions([row("a", uri=str(tmp_path / "a.mp4"))]))
    command = [sys.executable, "-m", "kinoray", "report", labels, "--out", str(tmp_path / "report"), "--serve"]
    process = subprocess.Popen(
        [*command, "--max-strips", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith("report: open ")):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        address = urlsplit(lines[-1].split()[2].rstrip(";"))
        connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=30)
        with contextlib.closing(connection):
            for path, begin in [
                (address.path, b"<!DOCTYPE html>"),
                (address.path.replace("index.html", "data/site.js"), b"kinoray.deliver("),
                (address.path.replace("index.html", f"media/k{0:016x}"), HEAD),
            ]:
                connection.request("GET", path)
                answer = connection.getresponse()
                assert (answer.status, answer.read()[: len(begin)]) == (200, begin), path
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, ("report: no longer served\n", ""))
    finally:
        process.kill()
        process.wait()
