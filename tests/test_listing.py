"""Listings that go through the disk: the rows of the in-memory way, in memory that does not grow, and going on."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import bucket_at
from faulty_s3 import FaultyS3, faulty_s3
from kinoray.catalog.folders import unique_ids
from kinoray.catalog.listing import CATALOG_SCHEMA, spool_listing
from kinoray.catalog.source import find_files
from kinoray.catalog.table import catalog_of_source
from kinoray.config.shared import StorageConfig
from kinoray.errors import AccessDenied, BucketNotFound
from kinoray.storage.objects import Storage, join

STORAGE = Storage()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few thousand files are many."""
    for name, value in {"GROUP_ROWS": 16, "FILE_ROWS": 64, "_PARTITION_ROWS": 100}.items():
        monkeypatch.setattr(f"kinoray.catalog.listing.{name}", value)
    for name, value in {"_RUN_ROWS": 50, "_BATCH_ROWS": 16, "_MAX_RUNS": 5}.items():
        monkeypatch.setattr(f"kinoray.catalog.runs.{name}", value)
    monkeypatch.setattr("kinoray.catalog.source._MAX_LOOKS", 20)
    monkeypatch.setattr("kinoray.catalog.runs._PIECE_ROWS", 40)
    monkeypatch.setattr("kinoray.storage.s3._PAGE_KEYS", 10)
    monkeypatch.setattr("kinoray.storage.stretches._PAGES_ALONE", 2)
    monkeypatch.setattr("kinoray.storage.stretches._THREADS", 4)


def odd_names(count: int) -> list[str]:
    """Of every kind: videos, other files, hidden ones, unknown endings, and many whose ids collide."""
    rng = random.Random(1)
    endings = [".mp4", ".MKV", ".mov", ".json", ".vtt", "", ".bin", ".odd", ".x1", ".jpg", ".gif"]
    names: set[str] = set()
    while len(names) < count:
        folders = "".join(
            rng.choice(["a/", "b b/", "b_b/", ".hidden/", "\u00e9/", "e\u0301/", "x.y/", "\U0001f3a5/"])
            for _ in range(rng.randrange(3))
        )
        stem = rng.choice(["clip", "cl ip", "cl_ip", "\u4e2d\u6587", "l" * 100, "\u0451" * 100, "a+b%20", '"quoted"'])
        names.add(f"{folders}{stem}{rng.randrange(count // 8)}{rng.choice(endings)}")
    names |= {f"many/{number}{rng.choice(['.unk', ''])}" for number in range(count // 3)}
    first, second = sorted(names)[:2], [name for name in sorted(names) if name.endswith(".mp4")][:9]
    for name in [*first, *second]:  # called as another one's id with a digest
        names |= {f"{video_id}.mp4" for video_id in unique_ids([name, name.rpartition(".")[0] + ".mov"])}
    return sorted(names)


def spooled(storage: Storage, source: str, folder: Path, **options: str) -> tuple[pa.Table, list[str], list[Path]]:
    said: list[str] = []
    paths = spool_listing(storage, source, folder, say=said.append, **options)
    assert sorted(paths) == paths == sorted(folder.iterdir())
    tables = [pq.read_table(path) for path in paths]
    assert all(table.schema.equals(CATALOG_SCHEMA) for table in tables)
    return pa.concat_tables(tables), said, paths


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_the_rows_are_those_of_the_way_through_memory(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, s3_config: StorageConfig
) -> None:
    storage = Storage(s3_config)
    rng = random.Random(0)
    names = odd_names(2_500 if where == "folder" else 250)
    if where == "folder":
        source = str(tmp_path / "library")
        for number, name in enumerate(names):
            path = tmp_path / "library" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.choice([b"FLV\x01", b"text", b""]) + bytes(number % 7))
        (tmp_path / "library" / "not-\udcff-text.mp4").write_bytes(b"x")
        (tmp_path / "library" / "a" / "link").symlink_to("..")
    else:
        source = request.getfixturevalue("bucket") + "/library"
        client = boto3.client("s3", endpoint_url=s3_config.endpoint_url, region_name="us-east-1")
        bucket = source.split("/")[2]
        for number, name in enumerate(names):
            client.put_object(
                Bucket=bucket, Key=f"library/{name}", Body=rng.choice([b"FLV\x01", b"text"]) + bytes(number % 7)
            )
        client.put_object(Bucket=bucket, Key="library/marker/", Body=b"")
    said: list[str] = []
    expected = catalog_of_source(storage, source, say=said.append)
    found, told, paths = spooled(storage, source, tmp_path / "out")
    assert found.equals(expected.table)
    assert told == said
    assert len(said) >= 2
    assert len(paths) > 2
    assert pq.ParquetFile(paths[0]).metadata.num_row_groups == 4
    digests = sum(video_id[-11:-10] == "-" for video_id in found["video_id"].to_pylist())
    assert digests > len(found) / 20, "too few names collide for this test"


@pytest.mark.usefixtures("small")
def test_ids_that_collide_in_a_chain_come_out_as_in_memory(tmp_path: Path) -> None:
    """Each name is called as the id that the one before gets, once that collides."""
    names = ["a b.mp4", "a_b.mp4"]
    for _ in range(8):
        names.append(
            f"{unique_ids(names[:2] if len(names) == 2 else [names[-1], names[-1].replace('.mp4', '.mov')])[0]}.mp4"
        )
        names.append(f"{names[-1][:-4]}.mov")
    names += [f"{number:05d}.mp4" for number in range(600)]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    found, _, _ = spooled(STORAGE, str(tmp_path / "in"), tmp_path / "out")
    assert found["video_id"].to_pylist() == unique_ids(sorted(names))


def test_a_listing_that_takes_long_says_how_far_it_is(
    tmp_path: Path, library: str, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.catalog.listing._SAY_EVERY_S", 0.0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    for number, (source, count) in enumerate(((str(tmp_path / "in"), 1), (library, 500))):
        _, said, _ = spooled(Storage(s3_config), source, tmp_path / f"out-{number}")
        assert [line.partition(" in ")[0] for line in said] == [f"{source}: {count} files listed"]


def test_one_video_and_what_is_none(tmp_path: Path, bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    for base in (str(tmp_path / "in"), bucket):
        storage.put(join(base, "a b.mp4"), b"x")
        storage.put(join(base, "notes/x.txt"), b"x")
        found, said, _ = spooled(storage, join(base, "a b.mp4"), tmp_path / f"one-{base[:2]}")
        assert found.equals(catalog_of_source(storage, join(base, "a b.mp4")).table)
        assert not said
        for source in (join(base, "notes"), join(base, "absent"), join(base, "notes/x.txt")):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                catalog_of_source(storage, source)
            with pytest.raises(type(expected.value)) as error:
                spool_listing(storage, source, tmp_path / f"none-{random.random()}")
            assert str(error.value) == str(expected.value)
    with pytest.raises(BucketNotFound):
        spool_listing(storage, "s3://no-such-bucket/x", tmp_path / "none")


# --- a bucket


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def through(faulty: FaultyS3, s3_config: StorageConfig) -> Storage:
    """Storage with little patience whose requests pass the proxy."""
    return Storage(replace(s3_config, endpoint_url=faulty.url, retry_s=8.0, answer_timeout_s=5.0))


@pytest.fixture(scope="module")
def library(s3_server: str) -> str:
    """A prefix of 500 videos."""
    bucket = bucket_at(s3_server)
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    for number in range(500):
        client.put_object(
            Bucket=bucket.removeprefix("s3://"), Key=f"library/{number % 7}/{number:04d}.mp4", Body=b"x" * (number % 5)
        )
    return f"{bucket}/library"


def listings(faulty: FaultyS3, prefix: str = "library") -> int:
    return sum("list-type" in request.path and f"prefix={prefix}%2F" in request.path for request in faulty.requests)


@pytest.mark.usefixtures("small")
def test_every_page_of_a_large_listing_may_fail_once(
    library: str, faulty: FaultyS3, through: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.storage.s3_requests._FIRST_PAUSE_S", 0.01)
    expected = find_files(through, library)
    faulty.everything = True
    faulty.rate, faulty.kinds = 0.3, ("500", "503", "reset", "cut", "few")
    found, _, _ = spooled(through, library, tmp_path / "out")
    assert found["uri"].to_pylist() == [file.uri for file in expected]
    assert faulty.met.total() > 10
    faulty.rate, faulty.outage = 0.0, "403"
    with pytest.raises(AccessDenied):
        spool_listing(through, library, tmp_path / "denied")


def test_a_small_listing_takes_no_more_requests_than_before(
    library: str, faulty: FaultyS3, through: Storage, tmp_path: Path
) -> None:
    spool_listing(through, library, tmp_path / "out")
    assert len(faulty.requests) == 1
    spool_listing(through, library, tmp_path / "kept", keep=f"{library}-out/listing")
    assert len(faulty.requests) == 3


@pytest.mark.usefixtures("small")
def test_a_listing_that_was_interrupted_goes_on(
    library: str, faulty: FaultyS3, through: Storage, tmp_path: Path
) -> None:
    keep = f"{library.removesuffix('/library')}/out/listing"
    expected, _, _ = spooled(through, library, tmp_path / "whole")
    whole = listings(faulty)
    assert whole >= 50
    faulty.requests.clear()
    faulty.before = lambda request: setattr(faulty, "outage", "403" if listings(faulty) > 35 else "")
    faulty.outage_path = "list-type"
    with pytest.raises(AccessDenied):
        spool_listing(through, library, tmp_path / "cut", keep=keep)
    faulty.before, faulty.outage = None, ""
    pieces = [info.uri for info in through.list(f"{keep}/")]
    assert len(pieces) >= 3
    kept = sum(pq.read_table(pa.BufferReader(through.read(uri))).num_rows for uri in pieces)
    through.put(f"{pieces[0].rpartition('/')[0]}/damaged.parquet", b"PAR1 no piece PAR1")
    through.put(f"{keep}/{'0' * 16}/other.parquet", b"of another listing, which stays")

    faulty.requests.clear()
    found, said, _ = spooled(through, library, tmp_path / "rest", keep=keep)
    assert found.equals(expected)
    assert said == [f"{library}: goes on with a listing that was interrupted: {kept} objects are known from it"]
    assert listings(faulty) < whole - kept / 10 + 25
    assert [info.uri for info in through.list(f"{keep}/")] == [f"{keep}/{'0' * 16}/other.parquet"]


@pytest.mark.usefixtures("small")
def test_pieces_of_yesterday_and_pieces_that_lie_are_not_taken(
    library: str, s3_config: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, keep = Storage(s3_config), str(tmp_path / "keep")
    expected, _, _ = spooled(storage, library, tmp_path / "whole")
    monkeypatch.setattr("kinoray.catalog.runs.Kept.clear", lambda self: None)
    spool_listing(storage, library, tmp_path / "first", keep=keep)
    monkeypatch.undo()
    pieces = sorted((tmp_path / "keep").glob("*/*.parquet"), key=lambda path: -pq.read_table(path).num_rows)
    assert len(pieces) > 5
    for number, change in enumerate(("until", "after", "prefix", "order")):
        table = pq.read_table(pieces[number])
        about = table.schema.metadata[b"kinoray.listing"]
        if change == "order":
            table = table.take(list(range(table.num_rows))[::-1])
        elif change == "prefix":
            about = about.replace(b'library/", "after', b'other/", "after')
        else:
            about = about.replace(b'"%s": ' % change.encode(), b'"%s": 3, "x": ' % change.encode())
        pq.write_table(table.replace_schema_metadata({b"kinoray.listing": about}), pieces[number])
    os.utime(pieces[4], (time.time() - 86_500,) * 2)
    good = sum(pq.read_table(path).num_rows for path in pieces[5:])
    found, said, _ = spooled(storage, library, tmp_path / "again", keep=keep)
    assert found.equals(expected)
    assert said == [f"{library}: goes on with a listing that was interrupted: {good} objects are known from it"]
    assert not list((tmp_path / "keep").glob("*/*"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("other", ["endpoint", "region"])
def test_pieces_of_another_server_are_not_taken(
    other: str,
    library: str,
    s3_config: StorageConfig,
    faulty: FaultyS3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = str(tmp_path / "keep")
    monkeypatch.setattr("kinoray.catalog.runs.Kept.clear", lambda self: None)
    spool_listing(Storage(s3_config), library, tmp_path / "first", keep=keep)
    changes = {"endpoint_url": faulty.url} if other == "endpoint" else {"region": "eu-west-3"}
    elsewhere = Storage(replace(s3_config, **changes))
    _, said, _ = spooled(elsewhere, library, tmp_path / "second", keep=keep)
    assert not said
    pieces = {path.parent.name for path in (tmp_path / "keep").glob("*/*.parquet")}
    assert len(pieces) == 2
    for path in list((tmp_path / "keep").glob("*/*.parquet")):  # moved by whoever wants the rows of the other one
        for folder in pieces - {path.parent.name}:
            path.rename(path.parent.parent / folder / path.name)
    _, said, _ = spooled(elsewhere, library, tmp_path / "third", keep=keep)
    assert not said


MEASURE = """
import resource, sys
from pathlib import Path
from kinoray.catalog.listing import spool_listing
from kinoray.storage.objects import ObjectInfo, Storage

class Many(Storage):
    def list_unsorted(self, prefix, *, skipped=None):
        for number in range(int(sys.argv[1])):
            name = f"{number * 7919 % 1000:03d}/clip {number * 104729 % 9973}-{number:08d}"
            yield ObjectInfo(f"{prefix}{name}" + (".bin" if number % 10 == 0 else ".mp4"), number % 5, 0.0, "")
    def read_range(self, uri, offset, length):
        return b"FLV\\x01"

paths = spool_listing(Many(), sys.argv[2] + "/in", Path(sys.argv[2]) / "out", say=lambda text: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    peaks = []
    for count in (200_000, 1_000_000):
        command = [sys.executable, "-c", MEASURE, str(count), str(tmp_path / str(count))]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout))
    assert peaks[1] < 1.1 * peaks[0] + 10_000, f"{peaks} KiB"
