"""Archives as streams: the members that tarfile finds, a reason where there is damage, little memory."""

import bz2
import gzip
import io
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kinoray.errors import ChecksumMismatch, DamagedArchive, ObjectNotFound
from kinoray.pack.tars import Archive, is_archive, open_archive
from kinoray.storage.objects import Storage

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
NOISE = np.random.default_rng(0).bytes(2**20)


def make_tar(members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def read_all(data: bytes, size: int = 1000) -> tuple[list[tuple[str, str, bytes | None]], str]:
    """(name, kind, data; None if it cannot be read) of each member, and the damage."""
    archive = Archive(chunks(data, size))
    found: list[tuple[str, str, bytes | None]] = []
    for member in archive:
        try:
            found.append((member.name, member.kind, archive.read() if member.kind == "file" else b""))
        except DamagedArchive:
            found.append((member.name, member.kind, None))
    assert archive.num_members == len(found)
    return found, archive.damage


MEMBERS = {"a.mp4": NOISE[:700], "d/b c'.mp4": NOISE[:512], "empty": b"", "\u00e4/\u4e2d.mp4": NOISE[:5000]}
GOOD = make_tar(MEMBERS)


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("size", [1, 511, 4096, 10**7])
def test_members_are_those_of_tarfile_however_the_chunks_fall(
    tar_format: str, pack: Callable[[bytes], bytes], size: int
) -> None:
    members = dict(MEMBERS)
    if tar_format != "ustar":
        members["long/" * 60 + "name.mp4"] = b"x" * 300
    made = make_tar(members, FORMATS[tar_format])
    found, damage = read_all(pack(made), size)
    assert damage == ""
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        expected = [(header.name, "file", tar.extractfile(header).read()) for header in tar]  # type: ignore[union-attr]
    assert found == expected == [(name, "file", data) for name, data in members.items()]


def test_unread_members_are_passed_over() -> None:
    archive = Archive(chunks(GOOD))
    assert [archive.read() for member in archive if member.name == "empty" or "\u4e2d" in member.name] == [
        b"",
        MEMBERS["\u00e4/\u4e2d.mp4"],
    ]


def test_links_devices_folders_and_sparse_files_are_named_as_such() -> None:
    buffer = io.BytesIO()
    kinds = {
        tarfile.SYMTYPE: "link",
        tarfile.LNKTYPE: "link",
        tarfile.CHRTYPE: "special",
        tarfile.BLKTYPE: "special",
        tarfile.FIFOTYPE: "special",
        tarfile.DIRTYPE: "folder",
        b"?": "special",
        tarfile.CONTTYPE: "file",
    }
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in kinds:
            header = tarfile.TarInfo("x")
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        for key in ("GNU.sparse.major", "GNU.sparse.map"):
            header = tarfile.TarInfo("sparse")
            header.pax_headers = {key: "1"}
            header.size = 10
            tar.addfile(header, io.BytesIO(b"0123456789"))
        tar.addfile(tarfile.TarInfo("last"))
    found, damage = read_all(buffer.getvalue())
    assert [kind for _, kind, _ in found] == [*kinds.values(), "special", "special", "file"]
    assert damage == ""


def test_an_old_sparse_file_made_by_gnu_tar_is_passed_over_exactly(tmp_path: Path) -> None:
    with open(tmp_path / "holes", "wb") as file:
        for number in range(40):  # more pieces than fit into one header
            file.seek(number * 2**20)
            file.write(b"data")
    (tmp_path / "last").write_bytes(b"last")
    command = ["tar", "--sparse", "--format=gnu", "-cf", "x.tar", "holes", "last"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found, damage = read_all((tmp_path / "x.tar").read_bytes())
    assert found == [("holes", "special", b""), ("last", "file", b"last")]
    assert damage == ""


def corrupted(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]


def with_size(data: bytes, field: bytes) -> bytes:
    """The first header with another size and a right checksum."""
    header = bytearray(data[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


PACKED = gzip.compress(make_tar({"a": NOISE[:100_000], "b": NOISE[100_000:300_000], "c": b"c"}))
TEXT = gzip.compress(make_tar({name: NOISE[:50_000].hex().encode() for name in "ab"}))


@pytest.mark.parametrize(
    ("data", "readable", "damage"),
    [
        pytest.param(b"", [], "at its start: it has no bytes", id="empty"),
        pytest.param(b"<html>404 Not Found</html>" * 50, [], "it is something else; only tar", id="a web page"),
        pytest.param(b"PK\3\4" + bytes(1000), [], "it is zip; only tar", id="zip"),
        pytest.param(bz2.compress(NOISE), [], "it is bzip2; only tar", id="bzip2"),
        pytest.param(GOOD[:300], [], "it ends 212 bytes early", id="cut in the first header"),
        pytest.param(GOOD[:1000], [("a.mp4", False)], "behind member 1: it ends 212 bytes early", id="cut in a member"),
        pytest.param(GOOD[:1536], [("a.mp4", True)], "behind member 1: it ends without an end mark", id="cut between"),
        pytest.param(corrupted(GOOD, 1540), [("a.mp4", True)], r"behind member 1: a damaged header", id="bad header"),
        pytest.param(GOOD + b"x" * 600, [(name, True) for name in MEMBERS], "more data follows its end", id="tail"),
        pytest.param(PACKED[:150_000], [("a", True), ("b", False)], "behind member 2: the gzip is cut", id="cut gzip"),
        pytest.param(corrupted(TEXT, 80_000), [("a", True), ("b", False)], "behind member 2: the gzip is", id="bits"),
        pytest.param(
            corrupted(PACKED, len(PACKED) - 6),
            [("a", True), ("b", False)],  # zlib gives nothing of the piece in which it finds a fault
            r"behind member 2: the gzip is damaged \(.*incorrect data check",
            id="wrong checksum of gzip",
        ),
        pytest.param(with_size(GOOD, b"\xff" * 12), [], "a header with a size of -", id="negative size"),
    ],
)
def test_damage_is_a_reason_and_what_came_before_is_read(
    data: bytes, readable: list[tuple[str, bool]], damage: str
) -> None:
    found, reason = read_all(data)
    assert [(name, content is not None) for name, _, content in found] == readable
    assert re.search(damage, reason)


def test_a_size_of_exabytes_takes_no_memory() -> None:
    archive = Archive(chunks(with_size(GOOD, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7)))
    assert [member.size_bytes for member in archive] == [2**63 - 1]  # a caller would not read it
    assert "behind member 1: it ends" in archive.damage


def test_gzips_in_a_row_and_padding_are_one_archive() -> None:
    half = len(GOOD) // 2
    data = gzip.compress(GOOD[:half]) + gzip.compress(GOOD[half:]) + bytes(5000)
    for size in (1, 700, 10**6):
        found, damage = read_all(data, size)
        assert [name for name, _, _ in found] == list(MEMBERS)
        assert damage == ""


def test_headers_without_end_are_given_up() -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 0
    found, damage = read_all(header.tobuf(tarfile.USTAR_FORMAT) * 1000)
    assert found == []
    assert "64 extended headers in a row" in damage


@pytest.mark.parametrize(
    "records",
    [b"x", b"5", b"99 path=x\n", b"0 path=x\n", b"11 path=abcd", b"12 size=-100\n", b"999999999999999999 a=b\n"],
)
def test_a_malformed_extended_header_marks_its_member(records: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    data = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + make_tar({"y": b"data", "z": b""})
    found, damage = read_all(data)
    assert [(name, kind) for name, kind, _ in found] == [("y", "special"), ("z", "file")]
    assert damage == ""


def test_a_gzip_that_swells_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandfold, for ever."""
    monkeypatch.setattr("kinoray.pack.tars._MAX_EXPANSION", (64, 2**26))
    header = tarfile.TarInfo("zeros")
    header.size = 2**40

    def swell() -> Iterator[bytes]:
        packer = zlib.compressobj(9, wbits=31)
        yield packer.compress(header.tobuf()) + packer.flush(zlib.Z_FULL_FLUSH)
        again = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
        again = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
        for _ in range(1000):
            yield again

    archive = Archive(swell())
    assert [member.name for member in archive] == ["zeros"]
    assert "this is no archive of videos" in archive.damage


def test_an_archive_that_is_replaced_while_it_is_read_is_the_store_changing(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD)
    archive = open_archive(Storage(), str(path))
    members = iter(archive)
    next(members)
    path.write_bytes(GOOD + bytes(512))
    with pytest.raises(ChecksumMismatch, match=r"x\.tar was replaced while it was read"):
        list(members)
    with pytest.raises(ObjectNotFound):
        list(open_archive(Storage(), str(tmp_path / "absent.tar")))


def test_a_name_says_whether_it_is_an_archive() -> None:
    assert all(is_archive(name) for name in ("a.tar", "b/A.TAR.GZ", "x.tgz"))
    assert not any(is_archive(name) for name in ("tar", "x.gz", "x.tar.mp4", "x.zip"))


MEASURE = """
import sys
from kinoray.pack.tars import open_archive
from kinoray.storage.objects import Storage
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024  # ru_maxrss: also the parent
idle, total = peak(), 0
archive = open_archive(Storage(), sys.argv[1])
for member in archive:
    total += len(archive.read()) if member.size_bytes < 2**21 else 0
assert not archive.damage, archive.damage
print(archive.num_members, total, peak() - idle)
"""


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_large_archive_takes_little_memory(tmp_path: Path, packed: bool) -> None:
    """200 members of 1 MiB that are read, and one of 256 MiB that is passed over."""
    path = tmp_path / "large.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) if packed else tarfile.open(path, "w") as tar:
        for number in range(200):
            header = tarfile.TarInfo(f"{number}.mp4")
            header.size = len(NOISE)
            tar.addfile(header, io.BytesIO(NOISE))
        header = tarfile.TarInfo("zeros.mp4")
        header.size = 2**28
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(header, zeros)
    answer = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True)
    num_members, total, grown_mb = answer.stdout.split()
    assert (int(num_members), int(total)) == (201, 200 * 2**20)
    assert float(grown_mb) < 60
