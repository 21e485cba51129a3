"""Libraries and catalogs of strangers: a bad entry is a row with its reason, and nothing is read that must not be."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faulty_s3 import faulty_s3
from kinoray.catalog.read import Reference, read_videos, time_problem
from kinoray.catalog.rows import Refusal, judge, load_quarantine
from kinoray.catalog.source import find_files
from kinoray.catalog.table import catalog_of_source, save_catalog
from kinoray.config.file import load_config
from kinoray.config.files import translated
from kinoray.config.shared import (
    ClipConfig,
    DecodeConfig,
    ResourcesConfig,
    SampleConfig,
    StorageConfig,
    ViewConfig,
)
from kinoray.doctor.source import open_source, source_section
from kinoray.errors import (
    AccessDenied,
    BadCredentials,
    ChecksumMismatch,
    ConfigError,
    KinorayError,
    MediaOverBudget,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
)
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.verb import label
from kinoray.pack.config import PackConfig
from kinoray.pack.plan import plan_of_catalog
from kinoray.pack.unit import PackSettings, pack_unit
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage, join
from kinoray.video.sandbox.pool import shared_sandbox
from kinoray.video.sandbox.process import DecoderProcess
from label_models import save_untrained
from small_sets import LABELS, catalog_of, colour_video

STORAGE = Storage()
ONE = ResourcesConfig(num_workers=1)


def listed(folder: Path, said: list[str] | None = None) -> list[str]:
    return [file.name for file in find_files(STORAGE, str(folder), say=(said if said is not None else []).append)]


# --- the listing


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    """Nine folders, each with links to all of them: once there were factorially many paths."""
    for one in range(9):
        (tmp_path / f"f{one}").mkdir()
        (tmp_path / f"f{one}" / "v.mp4").write_bytes(b"x")
        for other in range(9):
            (tmp_path / f"f{one}" / f"to{other}").symlink_to(tmp_path / f"f{other}")
    said: list[str] = []
    begin = time.monotonic()
    assert listed(tmp_path, said) == [f"f{one}/v.mp4" for one in range(9)]
    assert time.monotonic() - begin < 5
    assert len(said) == 11  # ten of them, and how many more
    assert said[0] == f"{tmp_path}/f0/to0/ is left out: it is listed under another name, too"
    assert said[-1] == f"71 more folders below {tmp_path} are left out"


def test_a_link_to_a_folder_is_followed_once_and_real_names_come_first(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.mp4").write_bytes(b"x")
    (outside / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "in" / "real" / "a.mp4").write_bytes(b"x")
    (tmp_path / "in" / "0link").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "one").symlink_to(outside)
    (tmp_path / "in" / "two").symlink_to(outside)
    said: list[str] = []
    assert listed(tmp_path / "in", said) == ["one/b.mp4", "real/a.mp4"]
    assert len(said) == 3


def test_links_that_lead_nowhere_are_entries(tmp_path: Path) -> None:
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    (tmp_path / "x.mp4").symlink_to("y.mp4")
    (tmp_path / "y.mp4").symlink_to("x.mp4")
    (tmp_path / "dangling.mp4").symlink_to("absent")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "in.mp4").write_bytes(b"in")
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        (tmp_path / "good.mp4").write_bytes(b"good")
        names = [
            "dangling.mp4",
            "folder.mp4/in.mp4",
            "good.mp4",
            "pipe.mp4",
            "self.mp4",
            "socket.mp4",
            "x.mp4",
            "y.mp4",
        ]
        assert listed(tmp_path) == names
        answers = dict(
            zip(names, read_videos(STORAGE, [Reference(str(tmp_path / name)) for name in names]), strict=True)
        )
    assert {name for name, answer in answers.items() if isinstance(answer, bytes)} == {"folder.mp4/in.mp4", "good.mp4"}
    assert "Too many levels of symbolic links" in str(answers["self.mp4"])
    assert "not a regular file" in str(answers["pipe.mp4"])
    assert "not a regular file" in str(answers["socket.mp4"])
    assert isinstance(answers["dangling.mp4"], ObjectNotFound)
    (tmp_path / "list.csv").write_text("path\n" + "\n".join([*names, "/dev/zero", "/proc/kmsg", "folder.mp4"]) + "\n")
    table = catalog_of_source(STORAGE, str(tmp_path / "list.csv")).table
    sizes = dict(zip(table["uri"].to_pylist(), table["size_bytes"].to_pylist(), strict=True))
    assert len(sizes) == len(names) + 3
    assert {size for uri, size in sizes.items() if not uri.endswith(("good.mp4", "in.mp4"))} == {0}


@pytest.fixture
def deep() -> Iterator[Path]:
    """A folder for trees that pytest itself cannot remove."""
    folder = tempfile.mkdtemp(prefix="kinoray-deep-")
    yield Path(folder)
    subprocess.run(["rm", "-rf", folder], check=True)


def nest(folder: Path, name: str, depth: int) -> None:
    """depth folders inside each other, and a video in the last one."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("v.mp4", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def test_a_tree_deeper_than_python_recurses_is_listed(deep: Path) -> None:
    depth = sys.getrecursionlimit() + 200
    nest(deep, "d", depth)
    assert listed(deep) == ["d/" * depth + "v.mp4"]


def test_a_tree_deeper_than_paths_may_be_long_is_named_and_the_rest_is_listed(deep: Path) -> None:
    nest(deep, "d" * 250, 20)
    (deep / "a.mp4").write_bytes(b"x")
    said: list[str] = []
    assert listed(deep, said) == ["a.mp4"]
    assert len(said) == 1
    assert "File name too long" in said[0]


@pytest.fixture
def library() -> Iterator[Path]:
    """A folder to which the modes of files apply, also where tests are run by root."""
    folder = Path(tempfile.mkdtemp(prefix="kinoray-test-"))
    folder.chmod(0o777)
    shared_sandbox(1).probe(colour_video("blue", 0), DecodeConfig())  # nobody may not start one everywhere
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_listed_is_named_and_the_rest_is_listed(library: Path) -> None:
    (library / "lost+found").mkdir(parents=True)
    (library / "dark").mkdir()
    for name in ("a.mp4", "dark/b.mp4", "lost+found/c.mp4"):
        (library / name).write_bytes(name.encode())
    (library / "lost+found").chmod(0)
    (library / "dark").chmod(0o444)  # its names may be read, and nothing of what they name
    said: list[str] = []
    assert listed(library, said) == ["a.mp4", "dark/b.mp4"]
    assert said == [f"{library}/lost+found/ is left out: {library}/lost+found/: Permission denied"]
    with pytest.raises(AccessDenied, match=r"lost\+found/: Permission denied"):
        list(STORAGE.list(f"{library}/"))
    answers = list(read_videos(STORAGE, [Reference(f"{library}/{name}") for name in ("a.mp4", "dark/b.mp4")]))
    assert answers[0] == b"a.mp4"
    assert isinstance(answers[1], AccessDenied)
    inventory = open_source(STORAGE, str(library))
    warnings = source_section(inventory, DecodeConfig()).warnings
    assert any("lost+found/ is left out" in warning.found for warning in warnings)


def test_a_file_that_may_not_be_read_is_refused_and_the_others_packed(library: Path) -> None:
    for index in range(3):
        (library / f"v{index}.mp4").write_bytes(colour_video("blue", index))
    (library / "v1.mp4").chmod(0)
    files = find_files(STORAGE, str(library))
    rows = [{"video_id": file.name, "uri": file.uri, "label_id": 0, "label": "blue"} for file in files]
    plan = plan_of_catalog("x", catalog_of(rows), shard_bytes=2**26, val_fraction=0.0)
    commit = pack_unit(STORAGE, str(library / "out"), plan.units[0], PackSettings())
    assert [(refusal.uri, refusal.error_class) for refusal in commit.refused] == [(f"{library}/v1.mp4", "AccessDenied")]
    assert len(commit.rows) == 2


@pytest.mark.parametrize("kind", [StorageUnavailable, BadCredentials])
def test_what_says_nothing_of_a_video_is_never_its_fault(kind: type[KinorayError]) -> None:
    """Credentials that expired must not be committed as refused videos."""
    with pytest.raises(kind):
        judge(kind("x"), "read")
    assert judge(AccessDenied("x"), "read") == Refusal("read", "AccessDenied", "x")
    assert judge(ObjectNotFound("two\nlines"), "read") == Refusal("read", "ObjectNotFound", "two lines")


def test_a_denied_object_is_a_row_and_denied_ones_alone_end_the_job(
    tmp_path: Path, bucket: str, s3_config: StorageConfig, s3_server: str
) -> None:
    storage = Storage(s3_config)
    for index in range(3):
        storage.put(f"{bucket}/v{index}.mp4", colour_video("blue", index))
    rows = [{"video_id": f"v{i}", "uri": f"{bucket}/v{i}.mp4", "label_id": 0, "label": "blue"} for i in range(3)]
    unit = plan_of_catalog("x", catalog_of(rows), shard_bytes=2**26, val_fraction=0.0).units[0]
    with faulty_s3(s3_server) as faulty:
        through = Storage(replace(s3_config, endpoint_url=faulty.url))
        faulty.outage, faulty.outage_path = "403", ".mp4"
        with pytest.raises(AccessDenied, match="none of the 3 files of shard-train-00000 may be read"):
            pack_unit(through, str(tmp_path / "out"), unit, PackSettings())
        assert not (tmp_path / "out").exists()
        faulty.outage_path = "v1.mp4"
        commit = pack_unit(through, str(tmp_path / "out"), unit, PackSettings())
    assert [(row.uri, row.error_class) for row in commit.refused] == [(f"{bucket}/v1.mp4", "AccessDenied")]
    assert len(commit.rows) == 2


# --- sizes


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    """200 GB that take no room on the disk, by name, in a shard, and beside a good video."""
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(200 * 10**9)
    (tmp_path / "good.mp4").write_bytes(b"good")
    huge, good = str(tmp_path / "huge.mp4"), str(tmp_path / "good.mp4")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = list(
        read_videos(
            STORAGE,
            [
                Reference(huge),
                Reference(good),
                Reference(huge, 0, 150 * 10**9),
                Reference(huge, 5, 2**62),
                Reference(good, 1, 2**62),
                Reference(good, 0, 5),
                Reference(good, 2**40, 2),
                Reference(good, 2, 2),
                Reference(good, 4, 0),
            ],
        )
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [MediaOverBudget, bytes, *[MediaOverBudget] * 3, *[ChecksumMismatch] * 2, bytes, bytes]
    assert [answers[1], answers[7], answers[8]] == [b"good", b"od", b""]
    assert "200,000,000,000 bytes, 2,147,483,648 are allowed; it was not read" in str(answers[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    with pytest.raises(ObjectTooLarge, match=r"list\.csv has 200,000,000,000 bytes"):
        catalog_of_source(STORAGE, _renamed(tmp_path / "huge.mp4", "list.csv"))


def test_a_file_of_holes_is_not_read(tmp_path: Path) -> None:
    """A few bytes on the disk that say they are gigabytes; one that is half there is read."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(2**30)
        file.seek(2**30 - 4096)
        file.write(b"y" * 4096)
    message = r"file has 1,073,741,824 bytes, of which 8,192 are on the disk and the others are holes; it was not read"
    with pytest.raises(ObjectTooLarge, match=message):
        STORAGE.read(str(path), max_bytes=2**31)
    with pytest.raises(ObjectTooLarge, match=message):
        STORAGE.read_range(str(path), 0, 8)
    with pytest.raises(ObjectTooLarge, match=r"268,435,456 are allowed; it was not read"):
        STORAGE.read(str(path))
    os.truncate(path, 2**24 + 1)
    with path.open("r+b") as file:
        file.seek(2**20)
        file.write(b"z" * 2**19)
    data = STORAGE.read(str(path))
    assert (len(data), data.count(b"x"), data.count(b"z")) == (2**24 + 1, 4096, 2**19)
    assert STORAGE.read_range(str(path), 2**20 - 1, 2) == b"\0z"


def _renamed(path: Path, name: str) -> str:
    return str(path.rename(path.parent / name))


def test_the_limit_is_the_callers_and_exact(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    for storage, base in ((STORAGE, str(tmp_path)), (Storage(s3_config), bucket)):
        storage.put(join(base, "x"), b"0123456789")
        one = [Reference(join(base, "x")), Reference(join(base, "x"), 1, 9), Reference(join(base, "x"), 0, 9)]
        for limit, sizes in ((10, [10, 9, 9]), (9, [None, 9, 9]), (8, [None, None, None])):
            answers = read_videos(storage, one, max_bytes=limit)
            assert [len(answer) if isinstance(answer, bytes) else None for answer in answers] == sizes
        with pytest.raises(ObjectTooLarge, match="10 bytes, 9 are allowed; it was not read"):
            storage.read(join(base, "x"), max_bytes=9)


def test_members_far_apart_are_not_joined_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps between tiny members add up: 2,000 of one byte, 64 KiB apart, were once one read of 128 MB."""
    with (tmp_path / "shard").open("wb") as file:
        file.write(bytes(2**22))
        file.truncate(2000 * 2**16)
    spans: list[int] = []
    read_range = Storage.read_range

    def watched(self: Storage, uri: str, offset: int, length: int) -> bytes:
        spans.append(length)
        return read_range(self, uri, offset, length)

    monkeypatch.setattr(Storage, "read_range", watched)
    answers = list(
        read_videos(STORAGE, [Reference(str(tmp_path / "shard"), index * 2**16, 1) for index in range(2000)])
    )
    assert answers == [b"\0"] * 2000
    assert max(spans) <= 32 * 2**20


@pytest.mark.parametrize(
    "name", ["/proc/self/mem", "/proc/self/environ", "/proc/self/pagemap", "/sys/kernel/uevent_seqnum"]
)
def test_files_of_the_kernel_are_not_read(name: str, tmp_path: Path) -> None:
    """They have no end, give back what no disk holds, or fail as a broken disk does; links lead to them."""
    (tmp_path / "link.mp4").symlink_to(name)
    for path in (name, str(tmp_path / "link.mp4")):
        with pytest.raises(ObjectNotFound, match=r"is a file of the kernel's"):
            STORAGE.read(path)
        with pytest.raises(ObjectNotFound, match=r"is a file of the kernel's"):
            STORAGE.read_range(path, 0, 1)


def test_a_bad_sector_is_its_files_and_a_folder_that_is_gone_is_the_stores(tmp_path: Path) -> None:
    def read(path: Path, *, to_read: bool) -> None:
        with translated(str(path), to_read=to_read), open("/proc/self/mem", "rb", buffering=0) as file:
            file.read(1)  # the one file that always gives an I/O error

    with pytest.raises(StorageError, match=r"bad\.mp4: Input/output error") as bad:
        read(tmp_path / "bad.mp4", to_read=True)
    assert type(bad.value) is StorageError
    assert judge(bad.value, "read").error_class == "StorageError"
    for path, to_read in ((tmp_path / "gone" / "bad.mp4", True), (tmp_path / "bad.mp4", False)):
        with pytest.raises(StorageUnavailable, match=r"bad\.mp4: Input/output error"):
            read(path, to_read=to_read)


def test_a_file_that_grows_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "growing.mp4"
    path.write_bytes(b"x" * 10**6)
    stop = threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(b"y" * 4096)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        found = None
        for _ in range(2000):
            try:
                found = len(STORAGE.read(str(path), max_bytes=2**40))
            except ChecksumMismatch as error:
                assert "somebody writes to it" in str(error)  # noqa: PT017
                break
        else:
            pytest.fail(f"it never grew under the reader: {found}")
    finally:
        stop.set()
        thread.join()


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    """The name is opened before it is looked at, so it does not matter when a pipe took its place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        path = str(tmp_path / name)
        with pytest.raises(ObjectNotFound, match="is not a regular file"):
            STORAGE.read(path)
        with pytest.raises(ObjectNotFound, match="is not a regular file"):
            STORAGE.read_range(path, 0, 5)
        with pytest.raises(ObjectNotFound, match="is not a regular file"):
            STORAGE.put_file(str(tmp_path / "copy"), Path(path))
        with pytest.raises(ConfigError, match=r"--config .* is not a regular file"):
            load_config(PackConfig, path)
    assert not (tmp_path / "copy").exists()


def test_put_file_to_s3_takes_regular_files_only(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ObjectNotFound, match="is not a regular file"):
        Storage(s3_config).put_file(join(bucket, "x"), tmp_path / "pipe")


# --- rows of a catalog


@pytest.mark.parametrize(
    ("start_s", "end_s", "is_good"),
    [
        (None, None, True),
        (1.0, 2.0, True),
        (0.0, None, True),
        (2.0, 1.0, False),
        (-1.0, 2.0, False),
        (float("nan"), 2.0, False),
        (0.0, float("nan"), False),
        (0.0, float("inf"), False),
        (float("-inf"), None, False),
    ],
)
def test_times_that_cannot_be(start_s: float | None, end_s: float | None, is_good: bool) -> None:
    assert (time_problem(start_s, end_s) == "") == is_good


def hostile_rows(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of a catalog, and the error_class of each that is bad; the good ones are two files and a member."""
    data = [colour_video(label, seed) for seed, label in enumerate(("blue", "red", "green"))]
    for index, video in enumerate(data):
        (folder / f"v{index}.mp4").write_bytes(video)
    with (folder / "huge.mp4").open("wb") as file:
        file.truncate(200 * 10**9)
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "mem.mp4").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "not\udcff.mp4").write_bytes(data[0])
    whole, length = str(folder / "v0.mp4"), len(data[0])
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "good-0": ({"uri": whole}, ""),
        "good-1": ({"uri": str(folder / "v1.mp4"), "time_start_s": 1.0, "time_end_s": 2.0}, ""),
        "good-2": ({"uri": str(folder / "v2.mp4"), "offset": 0, "length": len(data[2])}, ""),
        "good-3": ({"uri": f"file://{folder}/not%FF.mp4"}, ""),
        "huge": ({"uri": str(folder / "huge.mp4")}, "MediaOverBudget"),
        "long": ({"uri": whole, "offset": 0, "length": 2**62}, "MediaOverBudget"),
        "end": ({"uri": whole, "offset": 5, "length": length}, "ChecksumMismatch"),
        "far": ({"uri": whole, "offset": 2**50, "length": 5}, "ChecksumMismatch"),
        "zero": ({"uri": whole, "offset": 3, "length": 0}, "EmptyMedia"),
        "half": ({"uri": whole, "offset": 3}, "InvalidReference"),
        "other-half": ({"uri": whole, "length": 3}, "InvalidReference"),
        "before": ({"uri": whole, "offset": -3, "length": 30}, "InvalidReference"),
        "negative": ({"uri": whole, "offset": 3, "length": -30}, "InvalidReference"),
        "nan": ({"uri": whole, "time_start_s": float("nan")}, "InvalidReference"),
        "backwards": ({"uri": whole, "time_start_s": 2.0, "time_end_s": 1.0}, "InvalidReference"),
        "http": ({"uri": "http://host/v.mp4"}, "InvalidReference"),
        "nowhere": ({"uri": ""}, "InvalidReference"),
        "self": ({"uri": str(folder / "self.mp4")}, "StorageError"),
        "pipe": ({"uri": str(folder / "pipe.mp4")}, "ObjectNotFound"),
        "mem": ({"uri": str(folder / "mem.mp4")}, "ObjectNotFound"),
        "folder": ({"uri": str(folder)}, "ObjectNotFound"),
    }
    labels = {"label": "blue", "label_id": 0, "split": "train"}
    return [{"video_id": name, **labels, **row} for name, (row, _) in rows.items()], {
        name: reason for name, (_, reason) in rows.items()
    }


def test_a_packs_bad_rows_are_refused_and_the_others_packed(tmp_path: Path) -> None:
    rows, expected = hostile_rows(tmp_path)
    plan = plan_of_catalog("x", catalog_of(rows), shard_bytes=2**26, val_fraction=0.0)
    commits = [pack_unit(STORAGE, str(tmp_path / "out"), unit, PackSettings()) for unit in plan.units]
    found = {refusal.video_id: refusal.error_class for commit in commits for refusal in commit.refused}
    assert found == {name: reason for name, reason in expected.items() if reason}
    packed = {row["video_id"] for commit in commits for row in commit.rows}
    assert packed == {name for name, reason in expected.items() if not reason}


# --- whole jobs


@pytest.mark.ray
def test_every_good_video_of_a_hostile_catalog_is_labelled_and_packed(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    rows, expected = hostile_rows(tmp_path / "library")
    source = str(tmp_path / "set.parquet")
    save_catalog(STORAGE, source, catalog_of(rows))
    out = str(tmp_path / "out")
    label(label_config(source, tmp_path, out))
    found = {row["video_id"]: row for row in read_predictions(STORAGE, out).to_pylist()}
    assert {name: row["error_class"] or "" for name, row in found.items()} == expected
    assert {row["status"] for name, row in found.items() if not expected[name]} == {"labelled"}
    assert "no clip can begin and end then; mend its row in the catalog" in found["nan"]["error_text"]
    assert "offset and length go together, got 3 and None" in found["half"]["error_text"]
    assert "Too many levels of symbolic links" in found["self"]["error_text"]

    packed = str(tmp_path / "packed")
    totals = pack(PackConfig(source=source, out=packed, max_bad_fraction=1.0, resources=ONE))
    reasons = {row.video_id: row.error_class for row in load_quarantine(STORAGE, join(packed, "quarantine.parquet"))}
    assert reasons == {name: reason for name, reason in expected.items() if reason}
    assert totals["packed"] == len(expected) - len(reasons)
    assert len(catalog_of_source(STORAGE, packed)) == totals["packed"]


@pytest.mark.ray
def test_every_good_video_of_a_hostile_folder_is_labelled(ray_local: None, tmp_path: Path) -> None:
    """Found by listing: what is huge, linked to itself, a pipe or not UTF-8, beside a stranger's table and loops."""
    folder = tmp_path / "library"
    folder.mkdir()
    hostile_rows(folder)
    save_catalog(STORAGE, str(folder / "catalog.parquet"), catalog_of([{"video_id": "x", "uri": "/etc/passwd"}]))
    for one in "xy":
        (folder / one).mkdir()
        for other in "xy":
            (folder / one / other).symlink_to(folder / other)
    out = str(tmp_path / "out")
    label(label_config(str(folder), tmp_path, out))
    found = {row["uri"]: row["error_class"] or "" for row in read_predictions(STORAGE, out).to_pylist()}
    assert found == {
        f"{folder}/v0.mp4": "",
        f"{folder}/v1.mp4": "",
        f"{folder}/v2.mp4": "",
        f"file://{folder}/not%FF.mp4": "",
        f"{folder}/huge.mp4": "MediaOverBudget",
        f"{folder}/self.mp4": "StorageError",
        f"{folder}/pipe.mp4": "ObjectNotFound",
        f"{folder}/mem.mp4": "ObjectNotFound",
    }


MODULES = "numpy cv2 av torch pyarrow pandas safetensors yaml tyro vcm_sdd video_baselines sitecustomize usercustomize"


def poisoned(folder: Path) -> Path:
    """A library with files that are called like modules; each leaves a mark where it is imported. Returns the mark."""
    mark = folder.parent / "imported"
    for name in MODULES.split():
        (folder / f"{name}.py").write_text(f"print({name!r}, file=open({str(mark)!r}, 'a'))\n")
    return mark


@pytest.mark.ray
def test_files_of_a_library_are_no_modules(tmp_path: Path) -> None:
    """Commands are given in the library itself: neither they, nor Ray's workers, nor decoders import from there."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "v.mp4").write_bytes(colour_video("blue", 0))
    mark = poisoned(folder)
    out = tmp_path / "out"
    checkpoint = label_config(str(folder), tmp_path, str(out)).checkpoint
    command = [sys.executable, "-m", "kinoray", "label", ".", "--checkpoint", checkpoint, "--out", "../out"]
    done = subprocess.run(
        [*command, "--workers", "1"], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 input = 1 labelled + 0 quarantined" in done.stdout
    assert not mark.exists(), mark.read_text()
    found = read_predictions(STORAGE, str(out)).to_pylist()
    assert [row["uri"] for row in found] == [str(folder / "v.mp4")]


def test_a_decoder_imports_nothing_from_the_folder_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    mark = poisoned(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sys, "path", [str(folder), "", *sys.path])
    process = DecoderProcess(DecodeConfig())
    process.kill()
    assert not mark.exists(), mark.read_text()


def label_config(source: str, folder: Path, out: str) -> LabelConfig:
    clip = ClipConfig(
        sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32)
    )
    checkpoint = save_untrained(
        STORAGE, str(folder / "checkpoint"), LABELS, clip, "video_baselines:tsn", backbone="tiny"
    )
    return LabelConfig(source=source, checkpoint=checkpoint, out=out, max_bad_fraction=1.0, resources=ONE)
