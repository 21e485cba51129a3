"""kinoray doctor of a store: right ones pass, each broken promise is found, and nothing of the probe is left."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from conftest import bucket_at, config_at
from kinoray.config.shared import StorageConfig
from kinoray.doctor.config import Check, DoctorConfig
from kinoray.doctor.store import _PROMISES, _removed, _tried, store_section
from kinoray.errors import ConfigError
from kinoray.storage.folder import Skipped
from kinoray.storage.objects import ObjectInfo, Storage


def by_name(checks: tuple[Check, ...]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_a_folder_keeps_every_promise_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("stays")
    section = store_section(StorageConfig(), str(tmp_path))
    assert set(by_name(section.checks).values()) == {"ok"}, section.lines
    assert {*_PROMISES, "access", "store's checksums", "removing"} == set(by_name(section.checks))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert section.values["uri"] == str(tmp_path)


def test_an_s3_server_keeps_every_promise_and_is_left_as_it_was(bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    storage.put(f"{bucket}/kinoray-doctor-mine", b"stays")
    section = store_section(s3_config, f"{bucket}/")
    found = by_name(section.checks)
    assert found.pop("damaged uploads") == "warning"  # moto compares no Content-MD5
    assert set(found.values()) == {"ok"}, section.lines
    assert {*_PROMISES, "store's checksums"} <= set(found)
    assert [info.uri for info in storage.list(f"{bucket}/")] == [f"{bucket}/kinoray-doctor-mine"]


def test_a_bucket_that_is_not_there_is_one_wrong_line(s3_config: StorageConfig) -> None:
    section = store_section(s3_config, "s3://no-such-bucket-here/x")
    (access,) = section.checks  # nothing was written, so nothing is said to be left
    assert (access.name, access.status) == ("access", "wrong")
    assert "there is no bucket 'no-such-bucket-here'" in access.found
    assert "--storage.endpoint-url" in access.remedy


def test_a_malformed_address_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="bucket must be s3://bucket/prefix or a folder, got 'gs://bucket/x'"):
        DoctorConfig(bucket="gs://bucket/x")
    with pytest.raises(ConfigError, match="expected s3://bucket/key, found no bucket"):
        store_section(StorageConfig(), "s3:///x")


# Stores that break a promise


class Overwriting(Storage):
    """Takes no notice of If-None-Match, as some S3 servers."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        self.put(uri, data)
        return True


class Stale(Storage):
    """Goes on to give the first content of an object that was overwritten."""

    seen: dict[str, bytes] = {}  # noqa: RUF012

    def read(self, uri: str, *, max_bytes: int = 2**40) -> bytes:
        return self.seen.setdefault(uri, super().read(uri, max_bytes=max_bytes))

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        return self.read(uri)[offset : offset + length]


class Forgetful(Storage):
    """Lists everything but the last object."""

    def list(self, prefix: str, *, skipped: Skipped | None = None) -> Iterator[ObjectInfo]:
        yield from list(super().list(prefix, skipped=skipped))[:-1]


class Whole(Storage):
    """Answers a range with the beginning of the object."""

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        return super().read(uri)[:length]


class Short(Storage):
    """Answers a range beyond the end with what there is."""

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        return super().read(uri)[offset : offset + length]


class Keeping(Storage):
    """Deletes nothing."""

    def delete(self, uri: str) -> None:
        self.stat(uri)


class Late(Storage):
    """Its clock is a quarter of an hour ahead."""

    def stat(self, uri: str) -> ObjectInfo:
        found = super().stat(uri)
        return replace(found, modified_s=found.modified_s + 900)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Overwriting, {"put if absent", "concurrent puts"}),
        (Stale, {"read after write", "range reads", "wrong bytes"}),
        (Forgetful, {"list after write"}),
        (Whole, {"range reads", "wrong bytes"}),
        (Short, {"range reads"}),
        (Keeping, {"list after write", "delete"}),
        (Late, {"clock"}),
    ],
)
def test_a_broken_promise_is_found(kind: type[Storage], wrong: set[str], tmp_path: Path) -> None:
    checks = [_tried(name, partial(check, kind(), str(tmp_path))) for name, check in _PROMISES.items()]
    assert {check.name for check in checks if check.status != "ok"} == wrong
    assert all(check.remedy for check in checks if check.status != "ok")


def test_what_cannot_be_removed_is_said(bucket: str, s3_config: StorageConfig) -> None:
    uri = f"{bucket}/probe/left"
    Storage(s3_config).put(uri, b"x")
    check = _removed(Keeping(s3_config), f"{bucket}/probe")
    assert (check.status, check.found) == ("warning", f"1 object of the probe left, such as {uri}")
    assert _removed(Storage(s3_config), f"{bucket}/probe").status == "ok"
    assert list(Storage(s3_config).list(f"{bucket}/probe/")) == []


@pytest.mark.radosgw
def test_a_server_that_checks_uploads_has_nothing_to_warn_of(radosgw_server: str) -> None:
    section = store_section(config_at(radosgw_server), bucket_at(radosgw_server))
    assert set(by_name(section.checks).values()) == {"ok"}, section.lines
