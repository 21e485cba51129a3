"""Whether a folder or bucket keeps what kinoray relies on: each promise is tried with real bytes in a probe folder.

    Storage -> PROBE/name: put, read, list, delete -> Check

What is easy to break: nothing outside the probe folder is touched, and the folder is gone afterwards, whatever failed.
"""

import base64
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import uuid4

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kinoray.catalog.table import Reference, read_video
from kinoray.config.shared import StorageConfig
from kinoray.console import many
from kinoray.doctor.config import Check, Section, checked, clock_check
from kinoray.errors import ChecksumMismatch, KinorayError, ObjectNotFound, StorageError
from kinoray.storage.objects import Storage, absolute, arrow_filesystem, is_s3, join
from kinoray.storage.s3 import agree_to_pay

__all__ = ["server_checks", "store_section"]

_PREFIX = "kinoray-doctor-"
_WRITERS = 8
_ROUNDS = 3
_NUM_LISTED = 12
_RANGE_BYTES = 2**20
_RESOLUTION_S = 1.0  # of S3's times

_NOT_ATOMIC = "two jobs would overwrite each other's results; use a store with conditional writes (If-None-Match: *)"
_STALE = "results would be read that are not those written; use a store that is consistent, without a cache between"


def store_section(config: StorageConfig, bucket: str) -> Section:
    """Try a folder or s3:// prefix under a new folder `kinoray-doctor-...` in it, which is removed afterwards.

    Raises:
        ConfigError: the address or the endpoint is malformed.
    """
    storage = Storage(config)
    probe = join(absolute(bucket), f"{_PREFIX}{uuid4().hex}")
    checks = [_access(storage, probe)]
    try:
        if checks[0].status == "ok":
            checks += [_tried(name, partial(check, storage, probe)) for name, check in _PROMISES.items()]
            checks += server_checks(config, join(probe, "server"))
    finally:
        if checks[0].status == "ok" or _is_anything_left(storage, probe):
            checks.append(_tried("removing", lambda: _removed(storage, probe)))
    return checked("storage", checks, uri=absolute(bucket))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    """What the check says; what the store raises is what is wrong with it."""
    try:
        return check()
    except (StorageError, pa.ArrowException, OSError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Check(name, "wrong", text, "a store that does not do this cannot hold kinoray's results")


def _access(storage: Storage, probe: str) -> Check:
    try:
        start = time.monotonic()
        storage.put(join(probe, "first"), b"first")
        storage.read(join(probe, "first"))
        return Check("access", "ok", f"written and read in {1000 * (time.monotonic() - start):.0f} ms")
    except StorageError as error:
        text = f"{type(error).__name__}: {error}"
        remedy = "see that the bucket or folder exists, that --storage.endpoint-url is right, and who may write there"
        return Check("access", "wrong", text, remedy)


def _overwrites(storage: Storage, probe: str) -> Check:
    uri, name = join(probe, "overwritten"), "read after write"
    for number in range(2 * _ROUNDS):
        data = f"content {number}".encode() * (1 + number % 2)
        storage.put(uri, data)
        if storage.read(uri) != data or storage.stat(uri).size_bytes != len(data):
            return Check(name, "wrong", "an object that was overwritten gave its old content", _STALE)
    return Check(name, "ok", f"{2 * _ROUNDS} times overwritten, and each time the new content came back")


def _put_if_absent(storage: Storage, probe: str) -> Check:
    uri, name = join(probe, "absent"), "put if absent"
    first, second = storage.put_if_absent(uri, b"first"), storage.put_if_absent(uri, b"second")
    kept = storage.read(uri)
    if (first, second, kept) == (True, False, b"first"):
        return Check(name, "ok", "the second put of a name is refused, and the first bytes stay")
    found = f"first put {first}, second put {second}, then {kept.decode(errors='replace')!r} is there"
    return Check(name, "wrong", f"{found}; True, False, 'first' is right", _NOT_ATOMIC)


def _concurrent_puts(storage: Storage, probe: str) -> Check:
    name, wins = "concurrent puts", []
    with ThreadPoolExecutor(_WRITERS) as pool:
        for number in range(_ROUNDS):
            uri = join(probe, "raced", str(number))
            contents = [f"writer {writer}".encode() for writer in range(_WRITERS)]
            won = list(pool.map(partial(storage.put_if_absent, uri), contents))
            winners = [data for data, is_first in zip(contents, won, strict=True) if is_first]
            wins.append(len(winners))
            if winners != [storage.read(uri)]:
                found = f"of {_WRITERS} writers at once {len(winners)} were told that they were first"
                return Check(name, "wrong", f"{found}, and the bytes there are {storage.read(uri)!r}", _NOT_ATOMIC)
    return Check(name, "ok", f"{_ROUNDS} times {_WRITERS} writers at once: one was first, and its bytes are there")


def _lists(storage: Storage, probe: str) -> Check:
    name = "list after write"
    folder = join(probe, "listed") + "/"
    uris = sorted(join(folder, f"{number % 3}", f"{number}") for number in range(_NUM_LISTED))
    for uri in uris:
        storage.put(uri, b"x")
    if [info.uri for info in storage.list(folder)] != uris:
        return Check(name, "wrong", "a listing lacks what was just written, or is not sorted", _STALE)
    storage.delete(uris[0])
    if [info.uri for info in storage.list(folder)] != uris[1:]:
        return Check(name, "wrong", "a listing still has what was just deleted", _STALE)
    return Check(name, "ok", f"{_NUM_LISTED} new objects are listed in order, and a deleted one is not")


def _ranges(storage: Storage, probe: str) -> Check:
    uri, name, data = join(probe, "ranges"), "range reads", os.urandom(_RANGE_BYTES)
    storage.put(uri, data)
    remedy = "shards are read in ranges; without them, pack nothing there"
    for offset, length in ((0, 1), (12_345, 70_000), (_RANGE_BYTES - 7, 7)):
        if storage.read_range(uri, offset, length) != data[offset : offset + length]:
            return Check(name, "wrong", f"{length} bytes from {offset} are not those that were written", remedy)
    try:
        storage.read_range(uri, _RANGE_BYTES - 7, 8)
    except ChecksumMismatch:
        return Check(name, "ok", f"3 ranges of {_RANGE_BYTES:,} bytes are right, and one beyond the end is refused")
    return Check(name, "wrong", "a range beyond the end of an object is not refused", remedy)


def _wrong_bytes(storage: Storage, probe: str) -> Check:
    """A flipped bit in a stored object must not pass kinoray's own checksum."""
    uri, name, data = join(probe, "flipped"), "wrong bytes", os.urandom(1000)
    storage.put(uri, data)
    reference = Reference(uri, 100, 500, hashlib.sha256(data[100:600]).hexdigest())
    if read_video(storage, reference) != data[100:600]:
        return Check(name, "wrong", "what was read is not what was written", _STALE)
    storage.put(uri, data[:300] + bytes([data[300] ^ 1]) + data[301:])
    try:
        read_video(storage, reference)
    except ChecksumMismatch:
        return Check(name, "ok", "a flipped bit in a stored object is noticed when a video is read")
    return Check(name, "wrong", "a flipped bit is not noticed: the store gave the old bytes", _STALE)


def _deletes(storage: Storage, probe: str) -> Check:
    uri, name = join(probe, "deleted"), "delete"
    storage.put(uri, b"x")
    storage.delete(uri)
    storage.delete(uri)  # one that is gone is no error
    try:
        storage.read(uri)
    except ObjectNotFound:
        return Check(name, "ok", "a deleted object is gone at once; deleting it again is no error")
    return Check(name, "wrong", "a deleted object can still be read", _STALE)


def _arrow(storage: Storage, probe: str) -> Check:
    """Ray writes through pyarrow, whose checksum trailers old servers store as content."""
    uri, name = join(probe, "table.parquet"), "pyarrow"
    table = pa.table({"number": list(range(100_000))})
    filesystem, path = arrow_filesystem(storage.config, uri)
    pq.write_table(table, path, filesystem=filesystem)
    remedy = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required on all nodes, or upgrade the server"
    try:
        found = pq.read_table(pa.BufferReader(storage.read(uri)))
    except (pa.ArrowException, OSError) as error:
        return Check(name, "wrong", f"Parquet that pyarrow wrote there is damaged: {error}", remedy)
    if found.equals(table):
        return Check(name, "ok", "a Parquet file that pyarrow writes there comes back whole")
    return Check(name, "wrong", "a Parquet file that pyarrow wrote there holds other rows", remedy)


def _clock(storage: Storage, probe: str) -> Check:
    uri = join(probe, "clock")
    before = time.time()
    storage.put(uri, b"x")
    after = time.time()
    return clock_check(storage.stat(uri).modified_s, before - _RESOLUTION_S, after)


_PROMISES: dict[str, Callable[[Storage, str], Check]] = {
    "read after write": _overwrites,
    "put if absent": _put_if_absent,
    "concurrent puts": _concurrent_puts,
    "list after write": _lists,
    "range reads": _ranges,
    "wrong bytes": _wrong_bytes,
    "delete": _deletes,
    "pyarrow": _arrow,
    "clock": _clock,
}


def _is_anything_left(storage: Storage, probe: str) -> bool:
    """Whether the first object is there, although it could not be written and read; who may not look wrote none."""
    try:
        return storage.exists(join(probe, "first"))
    except KinorayError:
        return False


def _removed(storage: Storage, probe: str) -> Check:
    left = list(_delete_all(storage, probe))
    if not is_s3(probe) and os.path.isdir(probe):
        shutil.rmtree(probe)
    if left:
        return Check(
            "removing", "warning", f"{many(len(left), 'object')} of the probe left, such as {left[0]}", "delete them"
        )
    return Check("removing", "ok", "nothing of the probe is left")


def _delete_all(storage: Storage, probe: str) -> Iterator[str]:
    """Delete what is there; what is there still."""
    try:
        for info in list(storage.list(probe + "/")):
            storage.delete(info.uri)
        yield from (info.uri for info in storage.list(probe + "/"))
    except KinorayError as error:
        yield f"{probe} ({error})"


_DATA = b"the bytes of a probe" * 50
_OTHER = b"the bytes of a robe." * 50


def server_checks(config: StorageConfig, uri: str) -> Iterator[Check]:
    """Checks of the server behind an s3:// uri; a folder has no server, and kinoray's own checksums stand alone."""
    if not is_s3(uri):
        text = "a folder keeps none: kinoray's own are compared when videos, parts and checkpoints are read"
        yield Check("store's checksums", "ok", text)
        return
    client = boto3.Session().client(
        "s3",
        endpoint_url=config.endpoint,
        region_name=config.region or boto3.Session().region_name or "us-east-1",
        config=Config(
            s3={"addressing_style": config.addressing},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=5,
            read_timeout=config.answer_timeout_s,
        ),
    )
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if config.access_of(bucket) == "requester_pays":
        agree_to_pay(client)
    yield _refuses(client, {"Bucket": bucket, "Key": key})
    yield _returns(client, {"Bucket": bucket, "Key": key})


def _refuses(client: Any, target: dict[str, str]) -> Check:
    name, wrong = "damaged uploads", base64.b64encode(hashlib.md5(_OTHER, usedforsecurity=False).digest()).decode()
    remedy = "damage on the way to the store is found only when it is read; use https, or a server that checks"
    try:
        client.put_object(**target, Body=_DATA, ContentMD5=wrong)
    except ClientError as error:
        code = error.response["Error"].get("Code", "")
        return Check(name, "ok", f"bytes that are not those of their checksum are refused ({code})")
    except BotoCoreError as error:
        return Check(name, "warning", " ".join(str(error).split()), remedy)
    return Check(name, "warning", "the server takes bytes that are not those of the checksum sent with them", remedy)


def _returns(client: Any, target: dict[str, str]) -> Check:
    name, crc32 = "store's checksums", base64.b64encode(zlib.crc32(_DATA).to_bytes(4, "big")).decode()
    own = "kinoray compares its own when videos, parts and checkpoints are read"
    try:
        client.put_object(**target, Body=_DATA, ChecksumCRC32=crc32)
        found = client.get_object(**target, ChecksumMode="ENABLED")
        is_same = found["Body"].read() == _DATA
    except (ClientError, BotoCoreError) as error:
        text = f"an upload with a CRC32 is refused: {' '.join(str(error).split())}"
        return Check(name, "warning", text, f"{own}; upgrade the server, since other programs may need it")
    given = sorted(
        key.removeprefix("Checksum") for key in found if key.startswith("Checksum") and key != "ChecksumType"
    )
    if not is_same or found.get("ChecksumCRC32", crc32) != crc32:
        return Check(name, "wrong", "an object or its CRC32 comes back changed", "use another server: it damages data")
    if given:
        return Check(name, "ok", f"the server gives back {', '.join(given)}")
    is_md5 = found["ETag"].strip('"') == hashlib.md5(_DATA, usedforsecurity=False).hexdigest()
    return Check(name, "ok", f"the server gives back none{' but the MD5 as ETag' if is_md5 else ''}; {own}")
