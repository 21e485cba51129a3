"""Storage: the same words for a folder and for S3, and the right bytes whatever the network does."""

import base64
import hashlib
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import botocore.exceptions
import pyarrow.fs
import pytest

from conftest import bucket_at, config_at
from faulty_s3 import FaultyS3, faulty_s3
from kinoray.config.shared import StorageConfig
from kinoray.errors import (
    AccessDenied,
    ChecksumMismatch,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from kinoray.storage.objects import Storage, absolute, arrow_filesystem, is_s3, join
from kinoray.storage.records import require_folder
from kinoray.storage.s3 import S3Store

Place = tuple[Storage, str]
MOTO = pytest.mark.parametrize("s3_server", ["moto"], indirect=True, scope="session")


@pytest.fixture(scope="session", params=["moto", pytest.param("radosgw", marks=pytest.mark.radosgw)])
def s3_server(request: pytest.FixtureRequest) -> str:
    """Both servers."""
    return str(request.getfixturevalue(f"{request.param}_server"))


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture(params=["folder", "moto", pytest.param("radosgw", marks=pytest.mark.radosgw)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A storage and an empty place in it."""
    if request.param == "folder":
        return Storage(), str(tmp_path / "place")
    url = str(request.getfixturevalue(f"{request.param}_server"))
    return Storage(config_at(url)), bucket_at(url) + "/place"


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def through(faulty: FaultyS3, s3_config: StorageConfig) -> Storage:
    """Storage whose requests pass the proxy."""
    return Storage(replace(s3_config, endpoint_url=faulty.url))


# --- the interface, in both kinds of storage


@pytest.mark.parametrize("length", [0, 1, 70_000, 3 * 2**20])
def test_what_is_put_is_read(place: Place, length: int) -> None:
    storage, base = place
    data = random_bytes(length)
    uri = join(base, "deep", "er", "object with space + plus % ?.bin")
    storage.put(uri, b"before")
    storage.put(uri, data)
    assert storage.read(uri) == data
    assert storage.stat(uri).size_bytes == length
    assert storage.exists(uri)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 10_000), (9_999, 1), (137, 4_096), (5, 0)])
def test_a_range_is_exactly_that_range(place: Place, offset: int, length: int) -> None:
    storage, base = place
    data = random_bytes(10_000)
    storage.put(join(base, "x"), data)
    assert storage.read_range(join(base, "x"), offset, length) == data[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (99, 2), (100, 1), (500, 3)])
def test_a_range_behind_the_end_is_an_error(place: Place, offset: int, length: int) -> None:
    storage, base = place
    storage.put(join(base, "x"), bytes(100))
    with pytest.raises(ChecksumMismatch, match=r"place/x is too short: .* asked for"):
        storage.read_range(join(base, "x"), offset, length)


def test_a_file_of_several_parts_arrives_whole(place: Place, tmp_path: Path) -> None:
    storage, base = place
    data = random_bytes(33 * 2**20 + 5)
    (tmp_path / "big").write_bytes(data)
    storage.put_file(join(base, "big"), tmp_path / "big")
    assert storage.read(join(base, "big")) == data
    assert storage.read_range(join(base, "big"), 16 * 2**20 - 3, 7) == data[16 * 2**20 - 3 :][:7]


def test_put_file_of_a_missing_file_says_so(place: Place, tmp_path: Path) -> None:
    storage, base = place
    with pytest.raises(StorageError, match="absent"):
        storage.put_file(join(base, "x"), tmp_path / "absent")
    assert not storage.exists(join(base, "x"))


def test_put_if_absent_keeps_the_first(place: Place) -> None:
    storage, base = place
    assert storage.put_if_absent(join(base, "x"), b"first")
    assert not storage.put_if_absent(join(base, "x"), b"second")
    assert storage.read(join(base, "x")) == b"first"


def test_of_eight_writers_exactly_one_wins(place: Place) -> None:
    storage, base = place
    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            uri = join(base, f"commit-{turn}")
            won = list(pool.map(lambda i, uri=uri: storage.put_if_absent(uri, b"%d" % i), range(8)))
            assert won.count(True) == 1
            assert storage.read(uri) == b"%d" % won.index(True)


def test_a_listing_is_recursive_and_sorted_by_uri(place: Place) -> None:
    storage, base = place
    names = ["a/b/c", "a-b", "a/b-c", "a/b", "b"] if is_s3(base) else ["a/b/c", "a-b", "a/b-c", "b"]
    for name in names:
        storage.put(join(base, name), name.encode())
    found = list(storage.list(base + "/"))
    assert [info.uri for info in found] == sorted(f"{base}/{name}" for name in names)
    assert [storage.read(info.uri).decode() for info in found] == [info.uri[len(base) + 1 :] for info in found]
    assert [info.size_bytes for info in found] == [len(info.uri) - len(base) - 1 for info in found]
    assert all(abs(info.modified_s - time.time()) < 3600 for info in found)


def test_a_prefix_without_a_slash_is_the_start_of_names(place: Place) -> None:
    storage, base = place
    for name in ("ab/1", "ac", "b"):
        storage.put(join(base, name), b"")
    assert [info.uri for info in storage.list(join(base, "a"))] == [join(base, "ab/1"), join(base, "ac")]
    assert [info.uri for info in storage.list(join(base, "a") + "/")] == []


def test_a_listing_goes_over_as_many_pages_as_it_takes(
    bucket: str, faulty: FaultyS3, through: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.storage.s3._PAGE_KEYS", 3)
    for number in range(10):
        through.put(f"{bucket}/{number}", b"")
    assert [info.uri for info in through.list(bucket + "/")] == [f"{bucket}/{number}" for number in range(10)]
    assert sum("list-type" in request.path for request in faulty.requests) == 4


def test_delete_is_quiet_about_what_is_gone(place: Place) -> None:
    storage, base = place
    storage.put(join(base, "x"), b"x")
    storage.delete(join(base, "x"))
    storage.delete(join(base, "x"))
    assert not storage.exists(join(base, "x"))


def test_a_missing_object_is_named(place: Place) -> None:
    storage, base = place
    for call in (storage.read, storage.stat, lambda uri: storage.read_range(uri, 0, 1)):
        with pytest.raises(ObjectNotFound, match=r"place/absent: no such"):
            call(join(base, "absent"))


def test_storage_can_be_pickled_after_use(place: Place) -> None:
    storage, base = place
    storage.put(join(base, "x"), b"data")
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage
    assert again.read(join(base, "x")) == b"data"


def test_join_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert join("s3://b/p/", "x", "y.tar") == join("s3://b/p", "x/y.tar") == "s3://b/p/x/y.tar"
    assert join("dir", "x") == "dir/x"
    assert join("/", "x") == "/x"
    monkeypatch.chdir(tmp_path)
    assert absolute("x/../y/") == f"{tmp_path}/y/"
    assert absolute("s3://b/../p") == "s3://b/../p"


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("gs://b/x", "--storage.endpoint-url https://storage.googleapis.com"),
        ("az://container/x", "blobfuse2"),
        ("abfss://container@account.dfs.core.windows.net/x", "blobfuse2"),
        ("http://host/x.mp4", "download it first"),
        ("HTTPS://host/x.mp4", "download it first"),
        ("hf://datasets/owner/name", "hf download"),
        ("dbfs:/videos", "/dbfs/"),
        ("s3a://b/x", "give it as s3://"),
        ("hdfs://node/x", "mount it, or copy it"),
    ],
)
def test_an_address_of_another_store_says_what_to_do(uri: str, remedy: str, tmp_path: Path) -> None:
    said = re.escape(f"{uri}: only s3:// addresses and local paths are understood; ") + f".*{re.escape(remedy)}"
    calls = (Storage().read, absolute, lambda uri: require_folder(Storage(), "out", uri, "label"))
    for call in calls:
        with pytest.raises(ConfigError, match=said):
            call(uri)


def test_nameless_buckets_are_settings_errors() -> None:
    with pytest.raises(ConfigError, match="no bucket"):
        Storage().read("s3:///x")
    with pytest.raises(ObjectNotFound, match="names a bucket"):
        Storage().read("s3://bucket/")


# --- whose requests are signed, and who pays for them


def calls(storage: Storage, bucket: str) -> None:
    """Every kind of request to a bucket."""
    large = bytes(17 * 2**20)
    with tempfile.NamedTemporaryFile() as file:
        file.write(large)
        file.flush()
        storage.put_file(f"{bucket}/large", Path(file.name))
    storage.put(f"{bucket}/x", b"data")
    storage.put_if_absent(f"{bucket}/x", b"other")
    assert storage.read(f"{bucket}/x") == b"data"
    assert storage.read_range(f"{bucket}/large", 5, 7) == bytes(7)
    assert [info.uri for info in storage.list(f"{bucket}/")] == [f"{bucket}/large", f"{bucket}/x"]
    assert not storage.exists(f"{bucket}/absent")
    storage.delete(f"{bucket}/large")


def test_every_request_to_a_bucket_whose_requester_pays_says_so_and_no_other(
    bucket: str, faulty: FaultyS3, through: Storage, s3_server: str
) -> None:
    name = bucket.removeprefix("s3://")
    storage = Storage(replace(through.config, access=(f"{name}=requester_pays",)))
    calls(storage, bucket)
    assert {request.method for request in faulty.requests} == {"GET", "HEAD", "PUT", "POST", "DELETE"}
    assert {request.payer for request in faulty.requests} == {"requester"}
    assert all("x-amz-request-payer" in request.signed_headers for request in faulty.requests)
    faulty.requests.clear()
    calls(storage, bucket_at(s3_server))
    assert {request.payer for request in faulty.requests} == {None}


def test_a_public_bucket_is_read_without_credentials_and_another_one_with_them(
    bucket: str, faulty: FaultyS3, through: Storage, s3_server: str
) -> None:
    name, own = bucket.removeprefix("s3://"), bucket_at(s3_server)
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").put_bucket_acl(Bucket=name, ACL="public-read")
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").put_object(
        Bucket=name, Key="x", Body=b"data", ACL="public-read"
    )
    storage = Storage(replace(through.config, access=(f"{name}=unsigned",)))
    assert storage.read(f"{bucket}/x") == b"data"
    assert [info.uri for info in storage.list(f"{bucket}/")] == [f"{bucket}/x"]
    assert storage.stat(f"{bucket}/x").size_bytes == 4
    assert {request.key_id for request in faulty.requests} == {""}
    faulty.requests.clear()
    storage.put(f"{own}/x", b"labels")
    assert storage.read(f"{own}/x") == b"labels"
    assert {request.key_id for request in faulty.requests} == {os.environ["AWS_ACCESS_KEY_ID"]}
    filesystem, path = arrow_filesystem(storage.config, f"{bucket}/x")
    faulty.requests.clear()
    with filesystem.open_input_file(path) as file:
        assert file.read() == b"data"
    assert {request.key_id for request in faulty.requests} == {""}


def test_a_bucket_that_is_not_public_says_why_its_requests_were_refused(
    bucket: str, faulty: FaultyS3, through: Storage
) -> None:
    name = bucket.removeprefix("s3://")
    faulty.faults = ["403"]
    storage = Storage(replace(through.config, access=(f"{name}=unsigned",)))
    with pytest.raises(AccessDenied, match=rf"{bucket}/x: not everybody may do this .*storage.access {name}=unsigned"):
        storage.read(f"{bucket}/x")


@pytest.mark.radosgw
def test_a_server_that_checks_gives_a_public_object_to_requests_without_credentials(radosgw_server: str) -> None:
    bucket = bucket_at(radosgw_server)
    client = boto3.client("s3", endpoint_url=radosgw_server, region_name="us-east-1")
    for key, acl in (("open", "public-read"), ("closed", "private")):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"data", ACL=acl)
    storage = Storage(replace(config_at(radosgw_server), access=(f"{bucket.removeprefix('s3://')}=unsigned",)))
    assert storage.read(f"{bucket}/open") == b"data"
    with pytest.raises(AccessDenied, match="not everybody may do this"):
        storage.read(f"{bucket}/closed")


@pytest.mark.parametrize("access", [("bucket",), ("bucket=public",), ("s3://bucket=unsigned",), ("a=unsigned",) * 2])
def test_ways_to_a_bucket_are_checked(access: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.access"):
        StorageConfig(access=access)


# --- folders


def test_a_folder_is_not_an_object(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="is a folder"):
        Storage().read(str(tmp_path))
    with pytest.raises(ObjectNotFound, match="no such file"):
        Storage().read(str(tmp_path / "absent" / "x"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ObjectNotFound, match="no such file"):
        Storage().read(str(tmp_path / "file" / "x"))
    with pytest.raises(ObjectNotFound):
        Storage().put(str(tmp_path), b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_file_that_is_deleted_during_a_listing_is_left_out(tmp_path: Path) -> None:
    storage, base = Storage(), str(tmp_path)
    for name in "abc":
        storage.put(join(base, name), b"")
    listing = storage.list(base + "/")
    assert next(listing).uri == join(base, "a")
    storage.delete(join(base, "b"))
    assert [info.uri for info in listing] == [join(base, "c")]


def test_pipes_and_dangling_links_do_not_stop_a_listing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert [(Path(info.uri).name, info.size_bytes) for info in Storage().list(f"{tmp_path}/")] == [
        ("link", 0),
        ("pipe", 0),
    ]
    for name in ("pipe", "link"):
        with pytest.raises(ObjectNotFound):
            Storage().read(str(tmp_path / name))


def test_a_writer_that_is_killed_leaves_nothing_visible(tmp_path: Path) -> None:
    """kill -9 while the bytes are being copied: only a temporary file remains, and listings leave it out."""
    source = tmp_path / "source"
    source.write_bytes(b"12345678")
    code = f"""
from pathlib import Path
import shutil
def copy_half(source, target, length):
    target.write(b"1234")
    target.flush()
    print("half", flush=True)
    input()
shutil.copyfileobj = copy_half
from kinoray.storage.objects import Storage
Storage().put_file({str(tmp_path / "out" / "x")!r}, Path({str(source)!r}))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert list(Storage().list(f"{tmp_path}/out/")) == []


# --- S3: what goes wrong, and how it is said


def test_a_missing_bucket_is_named(s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    for call in (storage.read, storage.stat, storage.delete, lambda uri: storage.put(uri, b"")):
        with pytest.raises(ObjectNotFound, match="there is no bucket 'no-such-bucket'"):
            call("s3://no-such-bucket/x")
    with pytest.raises(ObjectNotFound, match="there is no bucket 'no-such-bucket'"):
        list(storage.list("s3://no-such-bucket/x/"))
    assert not storage.exists("s3://no-such-bucket/x")


def test_an_impossible_bucket_name_is_one_short_line(s3_config: StorageConfig) -> None:
    with pytest.raises(ObjectNotFound, match=r"^s3://Bad_Name!/x is not a valid address: .{1,100}$"):
        Storage(s3_config).read("s3://Bad_Name!/x")


@pytest.mark.slow
def test_an_endpoint_that_refuses_is_given_up_soon() -> None:
    start = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"s3://bucket/x: http://127.0.0.1:9 does not answer"):
        Storage(StorageConfig(endpoint_url="http://127.0.0.1:9")).read("s3://bucket/x")
    assert time.monotonic() - start < 30


def test_an_endpoint_that_is_no_address_is_a_settings_error() -> None:
    with pytest.raises(ConfigError, match=r"storage\.endpoint_url 'nonsense'"):
        Storage(StorageConfig(endpoint_url="nonsense")).read("s3://bucket/x")


def test_no_credentials_is_said(s3_server: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    code = f"""
from kinoray.config.shared import StorageConfig
from kinoray.errors import BadCredentials
from kinoray.storage.objects import Storage
try:
    Storage(StorageConfig(endpoint_url={s3_server!r})).read("s3://bucket/x")
except BadCredentials as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("s3://bucket/x: no usable AWS credentials")
    assert said.stdout.count("\n") == 1


def test_forbidden_is_access_denied(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    faulty.faults = ["403"]
    with pytest.raises(AccessDenied, match="may not do this"):
        through.read(f"{bucket}/x")


@pytest.mark.parametrize("fault", ["500", "cut", "lost"])
def test_trouble_costs_time_not_data(bucket: str, faulty: FaultyS3, through: Storage, fault: str) -> None:
    data = random_bytes(3 * 2**20 + 17)
    through.put(f"{bucket}/x", data)
    faulty.requests.clear()
    faulty.faults = [fault, fault, "ok"]
    assert through.read(f"{bucket}/x") == data
    assert len(faulty.gets()) == 3
    faulty.faults = [fault]
    assert through.read_range(f"{bucket}/x", 1000, 2_000_000) == data[1000:2_001_000]


def test_a_cut_body_goes_on_behind_its_last_byte_of_the_same_version(
    bucket: str, faulty: FaultyS3, through: Storage
) -> None:
    data = random_bytes(4 * 2**20)
    through.put(f"{bucket}/x", data)
    etag = through.stat(f"{bucket}/x").etag
    faulty.requests.clear()
    faulty.faults = ["cut"]
    assert through.read(f"{bucket}/x") == data
    first, second = faulty.gets()
    assert (first.range, first.if_match) == (None, None)
    assert second.if_match == f'"{etag}"'
    assert second.range is not None
    start, end = second.range.removeprefix("bytes=").split("-")
    assert 2**20 <= int(start) <= 2 * 2**20  # whole chunks of the first half are kept
    assert int(end) == len(data) - 1


def test_two_versions_are_never_glued_together(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    old, new = random_bytes(4 * 2**20, 1), random_bytes(4 * 2**20, 2)
    through.put(f"{bucket}/x", old)
    client = boto3.client("s3", endpoint_url=through.config.endpoint_url, region_name="us-east-1")

    def replace_before_the_second_get(_: object) -> None:
        if len(faulty.gets()) == 2:
            faulty.before = None
            client.put_object(Bucket=bucket.removeprefix("s3://"), Key="x", Body=new)

    faulty.faults = ["cut"]
    faulty.before = replace_before_the_second_get
    assert through.read(f"{bucket}/x") == new


def test_a_stalled_body_goes_on(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    data = random_bytes(4 * 2**20)
    through.put(f"{bucket}/x", data)
    faulty.requests.clear()
    faulty.faults = ["stall", "stall"]
    impatient = Storage(replace(through.config, stall_timeout_s=0.3))
    assert impatient.read(f"{bucket}/x") == data
    assert len(faulty.gets()) == 3


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_waiting")
def test_a_body_that_is_always_cut_ends_in_an_error(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    through.put(f"{bucket}/x", random_bytes(100))
    faulty.requests.clear()
    faulty.faults = ["cut"] * 50
    with pytest.raises(StorageUnavailable, match=r"the answer broke off \d+ times in a row"):
        through.read(f"{bucket}/x")
    assert 10 < len(faulty.gets()) < 35


@pytest.mark.usefixtures("no_waiting")
def test_a_server_that_is_always_down_ends_in_an_error(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    faulty.faults = ["500"] * 50
    with pytest.raises(StorageUnavailable, match=r"is still failing after \d+ attempts in .* \(500 InternalError"):
        through.put(f"{bucket}/x", b"data")
    assert 10 < len(faulty.requests) < 35


def test_a_range_that_is_answered_in_part_goes_on(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    data = random_bytes(1000)
    through.put(f"{bucket}/x", data)
    faulty.faults = ["short", "few", "short"]
    assert through.read_range(f"{bucket}/x", 100, 500) == data[100:600]
    assert [request.range for request in faulty.gets()] == [
        "bytes=100-599",
        "bytes=590-599",
        "bytes=595-599",
        "bytes=598-599",
    ]


@MOTO  # radosgw signs the range, so the proxy cannot drop it
def test_a_server_without_ranges_is_noticed(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    through.put(f"{bucket}/x", random_bytes(1000))
    faulty.faults = ["whole"]
    with pytest.raises(StorageError, match="does not do ranged reads"):
        through.read_range(f"{bucket}/x", 100, 500)


@pytest.mark.parametrize("first", ["ok", "cut"])
def test_a_flipped_bit_is_noticed_where_s3_keeps_a_checksum(
    bucket: str, faulty: FaultyS3, through: Storage, first: str
) -> None:
    data = random_bytes(3 * 2**20)
    client = boto3.client("s3", endpoint_url=through.config.endpoint_url, region_name="us-east-1")
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="x", Body=data, ChecksumAlgorithm="CRC32")
    faulty.requests.clear()
    faulty.faults = [first, "flip", "ok"] if first == "cut" else ["flip", "ok"]
    assert through.read(f"{bucket}/x") == data
    assert len(faulty.gets()) == (3 if first == "cut" else 2)
    faulty.faults = ["flip"] * 10
    with pytest.raises(ChecksumMismatch, match="does not match its checksum, 5 times"):
        through.read(f"{bucket}/x")


def test_the_winner_whose_answer_got_lost_still_wins(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    faulty.faults = ["lost"]
    assert through.put_if_absent(f"{bucket}/x", b"mine")
    assert sum(request.method == "PUT" for request in faulty.requests) == 2
    assert not through.put_if_absent(f"{bucket}/x", b"mine")


@MOTO  # radosgw 16 keeps no checksums
def test_uploads_to_aws_keep_their_checksum_there(
    bucket: str, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The settings for AWS, tried on the test server: CRC32 of an object, and of each of its parts."""
    monkeypatch.setattr("kinoray.storage.s3._is_aws", lambda url: True)
    store, name = S3Store(s3_config), bucket.removeprefix("s3://")
    data = random_bytes(20 * 2**20)
    (tmp_path / "big").write_bytes(data)
    store.put(f"{name}/small", data[:1000])
    assert store.put_if_absent(f"{name}/commit", data[:1000])
    store.put_file(f"{name}/big", tmp_path / "big")
    assert store.read(f"{name}/big", len(data)) == data
    client = boto3.client("s3", endpoint_url=s3_config.endpoint_url, region_name="us-east-1")
    expected = base64.b64encode(zlib.crc32(data[:1000]).to_bytes(4, "big")).decode()
    for key in ("small", "commit"):
        assert client.head_object(Bucket=name, Key=key, ChecksumMode="ENABLED")["ChecksumCRC32"] == expected


def test_uploads_elsewhere_carry_a_content_md5(bucket: str, faulty: FaultyS3, through: Storage, tmp_path: Path) -> None:
    data = random_bytes(20 * 2**20)
    (tmp_path / "big").write_bytes(data)
    through.put(f"{bucket}/small", data[:1000])
    through.put_file(f"{bucket}/big", tmp_path / "big")
    sums = {request.content_md5 for request in faulty.requests if request.method == "PUT"}
    pieces = (data[:1000], data[: 16 * 2**20], data[16 * 2**20 :])
    assert sums == {base64.b64encode(hashlib.md5(piece).digest()).decode() for piece in pieces}


def test_a_failed_upload_in_parts_leaves_nothing(
    bucket: str, faulty: FaultyS3, through: Storage, tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(bytes(20 * 2**20))
    faulty.faults = ["403"] * 4
    with pytest.raises(AccessDenied):
        through.put_file(f"{bucket}/big", tmp_path / "big")
    faulty.faults.clear()
    client = boto3.client("s3", endpoint_url=through.config.endpoint_url, region_name="us-east-1")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    with pytest.raises(botocore.exceptions.ClientError):
        client.head_object(Bucket=bucket.removeprefix("s3://"), Key="big")


def test_arrow_reads_what_we_write(place: Place) -> None:
    storage, base = place
    storage.put(join(base, "x"), b"data")
    filesystem, path = arrow_filesystem(storage.config, base)
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem if is_s3(base) else pyarrow.fs.LocalFileSystem)
    with filesystem.open_input_file(f"{path}/x") as file:
        assert file.read() == b"data"
    with filesystem.open_output_stream(f"{path}/y") as file:
        file.write(b"theirs")
    assert storage.read(join(base, "y")) == b"theirs"


def test_a_page_in_a_bucket_says_what_it_is(s3_config: StorageConfig, bucket: str) -> None:
    """A browser shows what is served as text/html, and saves what is not."""
    storage = Storage(s3_config)
    for name, kind in (("index.html", "text/html; charset=utf-8"), ("rows.js", "text/javascript; charset=utf-8")):
        storage.put(f"{bucket}/{name}", b"<p>")
        head = boto3.client("s3", endpoint_url=s3_config.endpoint_url).head_object
        assert head(Bucket=bucket.removeprefix("s3://"), Key=name)["ContentType"] == kind
