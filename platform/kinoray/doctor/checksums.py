"""What an S3 server itself checks and tells of checksums: an upload with a wrong one, and what it gives back.

Storage only ever sends right checksums, so this speaks to the server through a client of its own.
"""

import base64
import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kinoray.config.shared import StorageConfig
from kinoray.doctor.section import Check
from kinoray.storage.objects import is_s3
from kinoray.storage.s3 import endpoint_of

__all__ = ["server_checks"]

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
        endpoint_url=endpoint_of(config),
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
