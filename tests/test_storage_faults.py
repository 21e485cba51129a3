"""Storage trouble costs time, not data: every fault of tests/faulty_s3.py, met by reads, writes and listings."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from faulty_s3 import READ_FAULTS, WRITE_FAULTS, FaultyS3, faulty_s3
from kinoray.catalog.table import Reference, read_video, read_videos
from kinoray.config.shared import ConfigError, StorageConfig
from kinoray.errors import BadCredentials, ChecksumMismatch, ObjectNotFound, StorageUnavailable
from kinoray.storage.objects import Storage

# What a listing can recover from. A flipped bit in one is not among them: S3 sends no checksum with a listing.
LIST_FAULTS = ("500", "503", "reset", "mute", "cut", "stall", "few", "expired")
SLACK_S = 10.0
# For what moto does not do as S3 does: it looks at no Content-MD5.
RADOSGW = pytest.mark.parametrize(
    "s3_server", [pytest.param("radosgw", marks=pytest.mark.radosgw)], indirect=True, scope="session"
)


@pytest.fixture(scope="session", params=["moto", pytest.param("radosgw", marks=pytest.mark.radosgw)])
def s3_server(request: pytest.FixtureRequest) -> str:
    """Both servers."""
    return str(request.getfixturevalue(f"{request.param}_server"))


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def through(faulty: FaultyS3, s3_config: StorageConfig) -> Storage:
    """Storage with little patience whose requests pass the proxy."""
    patience = {"retry_s": 8.0, "answer_timeout_s": 0.6, "stall_timeout_s": 0.3}
    return Storage(replace(s3_config, endpoint_url=faulty.url, **patience))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts."""
    monkeypatch.setattr("kinoray.storage.s3_requests._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("kinoray.storage.s3_requests._LONGEST_PAUSE_S", 0.05)


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def member_of(uri: str, shard: bytes, offset: int, length: int) -> Reference:
    """A reference with its checksum."""
    return Reference(uri, offset, length, hashlib.sha256(shard[offset : offset + length]).hexdigest())


# --- one kind at a time


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_read_outlives_a_fault(bucket: str, faulty: FaultyS3, through: Storage, fault: str, times: int) -> None:
    data = random_bytes(60_000)
    through.put(f"{bucket}/x", data)
    for read in (
        lambda: through.read(f"{bucket}/x"),
        lambda: read_video(through, member_of(f"{bucket}/x", data, 0, 60_000)),
    ):
        faulty.requests.clear()
        faulty.faults = [fault] * times
        assert read() == data
        assert len(faulty.gets()) <= times + 1
        assert not faulty.faults or fault == "slow"  # three slow connections bring it all
        faulty.faults.clear()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_write_outlives_a_fault(bucket: str, faulty: FaultyS3, through: Storage, fault: str, times: int) -> None:
    faulty.faults = [fault]
    through.put(f"{bucket}/x", b"data")
    assert not faulty.faults
    faulty.faults = [fault] * times
    assert through.put_if_absent(f"{bucket}/once", b"mine")
    assert not faulty.faults
    assert not through.put_if_absent(f"{bucket}/once", b"other")
    assert through.read(f"{bucket}/x") == b"data"
    assert through.read(f"{bucket}/once") == b"mine"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["500", "lost", "late500"])
def test_an_upload_in_parts_outlives_a_fault_at_every_step(
    bucket: str, faulty: FaultyS3, through: Storage, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its four requests: begin, two parts, and the end, which must not be done twice although its answer was lost."""
    monkeypatch.setattr("kinoray.storage.s3._PART_BYTES", 5 * 2**20)
    faulty.everything = True
    for step in range(4):
        data = random_bytes(5 * 2**20 + 1000, seed=step)
        (tmp_path / "big").write_bytes(data)
        faulty.faults = ["ok"] * step + [fault]
        through.put_file(f"{bucket}/big", tmp_path / "big")
        assert not faulty.faults
        assert through.read(f"{bucket}/big") == data


def test_an_upload_that_is_gone_is_no_success_because_an_object_is_there(
    bucket: str, faulty: FaultyS3, through: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.storage.s3._PART_BYTES", 5 * 2**20)
    (tmp_path / "big").write_bytes(bytes(5 * 2**20 + 1))
    through.put(f"{bucket}/big", b"older")
    faulty.everything, faulty.faults = True, ["ok"] * 3 + ["gone"]
    with pytest.raises(ObjectNotFound):
        through.put_file(f"{bucket}/big", tmp_path / "big")
    assert through.read(f"{bucket}/big") == b"older"
    client = boto3.client("s3", endpoint_url=through.config.endpoint_url, region_name="us-east-1")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_a_listing_outlives_a_fault_on_every_page(
    bucket: str, faulty: FaultyS3, through: Storage, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.storage.s3._PAGE_KEYS", 2)
    for number in range(5):
        through.put(f"{bucket}/{number}", b"")
    faulty.everything = True
    faulty.faults = [fault, "ok", fault, "ok", fault]
    assert [info.uri for info in through.list(bucket + "/")] == [f"{bucket}/{number}" for number in range(5)]
    assert not faulty.faults
    if fault not in ("cut", "stall", "few"):  # an answer to HEAD has no body
        faulty.faults = [fault]
        assert through.stat(f"{bucket}/1").size_bytes == 0
        assert not faulty.faults


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "s3_server", [pytest.param("radosgw", marks=pytest.mark.radosgw)], indirect=True
)  # moto is blind
def test_an_upload_that_is_changed_on_its_way_is_made_again(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    data = random_bytes(1000)
    faulty.faults = ["smudge"]
    through.put(f"{bucket}/x", data)
    assert through.read(f"{bucket}/x") == data
    faulty.faults = ["smudge"] * 1000
    impatient = Storage(replace(through.config, retry_s=0.3))
    with pytest.raises(ChecksumMismatch, match="changed on its way"):
        impatient.put(f"{bucket}/y", data)


# --- wrong bytes


@pytest.mark.usefixtures("quick")
def test_bytes_that_are_always_wrong_are_refused(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    data = random_bytes(5000)
    through.put(f"{bucket}/x", data)
    member = member_of(f"{bucket}/x", data, 1000, 3000)
    through.put(f"{bucket}/x", bytes(5000))
    with pytest.raises(ChecksumMismatch, match="expected by the catalog"):
        read_video(through, member)
    assert len(faulty.gets()) == 2  # the same wrong bytes twice: the object is another, and asking again is no help


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["short", "few"])
def test_an_object_in_parts_that_comes_short_is_noticed(
    bucket: str, faulty: FaultyS3, through: Storage, fault: str, tmp_path: Path
) -> None:
    """Its ETag is no MD5, and the answer looks complete: only its size, asked for, tells."""
    data = random_bytes(17 * 2**20)
    (tmp_path / "big").write_bytes(data)
    through.put_file(f"{bucket}/big", tmp_path / "big")
    faulty.faults = [fault]
    assert through.read(f"{bucket}/big") == data
    assert not faulty.faults


@pytest.mark.usefixtures("quick")
def test_etags_that_are_no_md5_do_not_stop_a_read(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    """Some servers name a version by any 32 hex digits: then two equal answers are believed."""
    data = random_bytes(5000)
    through.put(f"{bucket}/x", data)
    faulty.etag = '"' + "0123456789abcdef" * 2 + '"'
    assert through.read(f"{bucket}/x") == data
    assert len(faulty.gets()) == 2


@pytest.mark.usefixtures("quick")
def test_expired_credentials_are_read_again(
    bucket: str, faulty: FaultyS3, through: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(key_id: str) -> None:
        secret = os.environ["SAVED_SECRET"]
        (tmp_path / "keys").write_text(f"[default]\naws_access_key_id={key_id}\naws_secret_access_key={secret}\n")

    through.put(f"{bucket}/x", b"data")
    monkeypatch.setenv("SAVED_SECRET", os.environ["AWS_SECRET_ACCESS_KEY"])
    good = os.environ["AWS_ACCESS_KEY_ID"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    write("older")
    fresh = Storage(replace(through.config, retry_s=7.5))  # a client of its own
    faulty.requests.clear()
    faulty.faults = ["expired"]
    faulty.before = lambda request: write(good)
    assert fresh.read(f"{bucket}/x") == b"data"
    assert [request.key_id for request in faulty.requests] == ["older", good]


@pytest.mark.usefixtures("quick")
def test_credentials_that_stay_expired_are_an_error(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    faulty.faults = ["expired"] * 50
    with pytest.raises(BadCredentials, match=r"have expired \(ExpiredToken"):
        through.read(f"{bucket}/x")
    assert len(faulty.requests) == 5


# --- many at once


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("percent", [2, 5, 10])
def test_mixed_faults_change_no_byte(bucket: str, faulty: FaultyS3, through: Storage, percent: int) -> None:
    """Members of shards too far apart to be joined, one request each; then whole objects, written under faults too."""
    shard = random_bytes(60 * 100_000)
    through.put(f"{bucket}/shard", shard)
    members = [member_of(f"{bucket}/shard", shard, start * 100_000, 10_000 + start) for start in range(60)]
    faulty.rate, faulty.rng = percent / 100, random.Random(percent)
    faulty.requests.clear()
    for _ in range(2):
        found = list(read_videos(through, members))
        assert found == [shard[member.offset : member.offset + member.length] for member in members]  # type: ignore[operator]
    for number in range(40):
        through.put(f"{bucket}/{number}", random_bytes(1000, number))
    assert [through.read(f"{bucket}/{number}") for number in range(40)] == [random_bytes(1000, n) for n in range(40)]
    assert faulty.met.total() >= percent
    assert len(faulty.requests) <= 200 + 3 * faulty.met.total()


@pytest.mark.usefixtures("quick")
def test_faults_make_no_second_winner_and_lose_none(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    faulty.rate, faulty.rng, faulty.everything = 0.2, random.Random(3), True
    faulty.write_kinds = ("500", "503", "reset", "lost", "late500")
    with ThreadPoolExecutor(8) as pool:
        for number in range(6):

            def write(writer: int, uri: str = f"{bucket}/{number}") -> bool:
                return through.put_if_absent(uri, b"%d" % writer)

            winners = [writer for writer, won in enumerate(pool.map(write, range(8))) if won]
            assert len(winners) == 1
            assert through.read(f"{bucket}/{number}") == b"%d" % winners[0]
    assert faulty.met["lost"] + faulty.met["late500"] > 0


# --- outages


@pytest.mark.parametrize("kind", ["down", "503"])
def test_an_outage_shorter_than_the_patience_is_survived(
    bucket: str, faulty: FaultyS3, through: Storage, kind: str
) -> None:
    data = random_bytes(200_000)
    through.put(f"{bucket}/x", data)
    members = [member_of(f"{bucket}/x", data, start, 1000) for start in range(0, 200_000, 100_000)]
    faulty.outage = kind
    threading.Timer(2.0, lambda: setattr(faulty, "outage", "")).start()
    assert list(read_videos(through, members)) == [data[:1000], data[100_000:101_000]]
    assert faulty.met[kind] >= 2


@pytest.mark.parametrize("kind", ["down", "503", "mute"])
def test_a_lasting_outage_is_one_clear_error(bucket: str, faulty: FaultyS3, through: Storage, kind: str) -> None:
    """Also for the reads after the first: they do not wait as long again."""
    through.put(f"{bucket}/x", bytes(1000))
    impatient = Storage(replace(through.config, retry_s=1.5, answer_timeout_s=0.5))
    impatient.read(f"{bucket}/x")
    faulty.outage = kind
    start = time.monotonic()
    with pytest.raises(StorageUnavailable, match=rf"^s3://\S+/x: {faulty.url} .* after \d+ attempts in .* storage.ret"):
        impatient.read(f"{bucket}/x")
    assert time.monotonic() - start < 1.5 + 0.5 + SLACK_S
    before = len(faulty.requests)
    members = [Reference(f"{bucket}/x", start, 1) for start in (0, 500)]
    assert all(isinstance(answer, StorageUnavailable) for answer in read_videos(impatient, members))
    assert len(faulty.requests) - before <= 2 * 3  # two members, read together first


def test_one_object_that_always_fails_does_not_hide_behind_the_others(
    bucket: str, faulty: FaultyS3, through: Storage
) -> None:
    through.put(f"{bucket}/good", b"good")
    impatient = Storage(replace(through.config, retry_s=0.5))
    done = threading.Event()

    def read_good() -> None:
        while not done.is_set():
            assert impatient.read(f"{bucket}/good") == b"good"

    faulty.outage, faulty.outage_path = "500", "/bad"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(read_good)
        try:
            with pytest.raises(StorageUnavailable, match="500 InternalError"):
                impatient.put(f"{bucket}/bad", b"")
        finally:
            done.set()
        other.result()


def test_the_default_patience_outlives_30_s_and_ends_within_120_s() -> None:
    from kinoray.storage.s3 import _CONNECT_TIMEOUT_S

    config = StorageConfig()
    assert config.retry_s >= 45
    assert config.retry_s + _CONNECT_TIMEOUT_S + config.answer_timeout_s <= 100
    with pytest.raises(ConfigError, match=r"storage\.stall_timeout_s must be greater than 0"):
        StorageConfig(stall_timeout_s=0)


@pytest.mark.slow
def test_30_s_without_a_server_are_survived(bucket: str, faulty: FaultyS3, s3_config: StorageConfig) -> None:
    storage = Storage(replace(s3_config, endpoint_url=faulty.url))
    storage.put(f"{bucket}/x", b"data")
    for kind in ("down", "mute"):
        faulty.outage = kind
        threading.Timer(30, lambda: setattr(faulty, "outage", "")).start()
        start = time.monotonic()
        assert storage.read(f"{bucket}/x") == b"data"
        assert time.monotonic() - start > 29


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["down", "503", "mute"])
def test_a_server_that_stays_away_is_given_up_within_120_s(
    bucket: str, faulty: FaultyS3, s3_config: StorageConfig, kind: str
) -> None:
    storage = Storage(replace(s3_config, endpoint_url=faulty.url))
    storage.put(f"{bucket}/x", b"data")
    faulty.outage = kind
    start = time.monotonic()
    with pytest.raises(StorageUnavailable, match="attempts in"):
        storage.read(f"{bucket}/x")
    assert 45 < time.monotonic() - start < 120


# --- how many requests


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        pytest.param(range(0, 120_000, 10_000), 1, id="side by side"),
        pytest.param(range(110_000, -1, -10_000), 1, id="from behind"),
        pytest.param((50_000, 0, 110_000, 20_000, 80_000), 1, id="shuffled, with small gaps"),
        pytest.param((0, 10_000, 400_000, 410_000, 800_000), 3, id="three places"),
    ],
)
def test_neighbours_come_in_one_request(
    bucket: str, faulty: FaultyS3, through: Storage, starts: Sequence[int], expected: int
) -> None:
    shard = random_bytes(1_000_000)
    through.put(f"{bucket}/shard", shard)
    members = [member_of(f"{bucket}/shard", shard, start, 9_000) for start in starts]
    assert list(read_videos(through, members)) == [shard[start : start + 9_000] for start in starts]
    ranges = [request.range for request in faulty.gets()]
    assert len(ranges) == expected
    if expected == 1:
        assert ranges == [f"bytes={min(starts)}-{max(starts) + 8_999}"]


def test_members_of_different_shards_are_never_joined(bucket: str, faulty: FaultyS3, through: Storage) -> None:
    shards = {f"{bucket}/{name}": random_bytes(50_000, seed) for seed, name in enumerate("ab")}
    for uri, shard in shards.items():
        through.put(uri, shard)
    members = [member_of(uri, shard, start, 10_000) for start in (0, 10_000) for uri, shard in shards.items()]
    expected: list[Any] = [shards[member.uri][member.offset :][:10_000] for member in members]
    assert list(read_videos(through, members)) == expected
    assert len(faulty.gets()) == 2
