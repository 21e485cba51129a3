"""Tables that lie in a folder which a user names: a pack's stands for it, and none leads out of it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinoray.catalog.table import catalog_of_source, is_catalog, load_catalog, rows_of_source, save_catalog
from kinoray.config.shared import (
    DecodeConfig,
    StorageConfig,
)
from kinoray.doctor.source import open_source, source_section
from kinoray.errors import (
    CatalogError,
)
from kinoray.storage.objects import Storage, join
from small_sets import catalog_of

STORAGE = Storage()


def stray(folder: Path, uri: str) -> Path:
    """A library of one video, and a table beside it that names another file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.mp4").write_bytes(b"a")
    save_catalog(STORAGE, str(folder / "catalog.parquet"), catalog_of([{"video_id": "x", "uri": uri}]))
    return folder


def test_a_table_among_videos_does_not_take_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stray(tmp_path / "library", "/etc/passwd")
    for record in (None, "{}", "[1", '{"catalog_digest": 3}'):
        if record is not None:
            (folder / "pack.json").write_text(record)
        assert catalog_of_source(STORAGE, str(folder)).table["uri"].to_pylist() == [f"{folder}/a.mp4"]
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{folder}/catalog.parquet is ignored and the videos of its folder are listed" in said
        assert f"name it itself: {folder}/catalog.parquet" in said
    named = catalog_of_source(STORAGE, str(folder / "catalog.parquet"))
    assert named.table["uri"].to_pylist() == ["/etc/passwd"]
    inventory = open_source(STORAGE, str(folder))
    assert "catalog.parquet is ignored" in source_section(inventory, DecodeConfig()).warnings[0].found
    (folder / "a.mp4").unlink()
    with pytest.raises(CatalogError, match=r"name the table itself to use it: .*library/catalog\.parquet"):
        catalog_of_source(STORAGE, str(folder))


@pytest.mark.parametrize("name", ["catalog.parquet", "pack.json"])
@pytest.mark.parametrize("target", ["itself", "nothing", "a folder", "a pipe", "the kernel", "a name that is too long"])
def test_a_table_that_cannot_be_read_keeps_no_videos_from_being_listed(name: str, target: str, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"a")
    save_catalog(STORAGE, str(folder / "catalog.parquet"), catalog_of([{"video_id": "x", "uri": "/etc/passwd"}]))
    path = folder / name
    path.unlink(missing_ok=True)
    if target == "a pipe":
        os.mkfifo(path)
    else:
        leads = {"itself": name, "nothing": "absent", "a folder": str(tmp_path), "the kernel": "/proc/self/mem"}
        path.symlink_to(leads.get(target, "x" * 300))
    said: list[str] = []
    assert catalog_of_source(STORAGE, str(folder), say=said.append).table["uri"].to_pylist() == [f"{folder}/a.mp4"]
    assert not is_catalog(STORAGE, str(folder), say=said.append)


def test_a_table_that_one_may_not_look_at_keeps_no_videos_from_being_listed(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    (folder / "dark").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(b"a")
    (folder / "catalog.parquet").symlink_to("dark/catalog.parquet")
    (folder / "dark").chmod(0)
    with as_nobody(tmp_path):
        said: list[str] = []
        table = catalog_of_source(STORAGE, str(folder), say=said.append).table
    (folder / "dark").chmod(0o755)
    assert table["uri"].to_pylist() == [f"{folder}/a.mp4"]
    assert any("catalog.parquet is ignored" in line for line in said)


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Modes of files mean nothing to root. The folder, and those of ours above it, are open to others from now on."""
    user = os.geteuid()
    for place in (folder, *folder.parents):
        if place.stat().st_uid == user and place.stat().st_mode & 0o055 != 0o055:
            place.chmod(place.stat().st_mode | 0o055)
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_of_tables_alone_says_how_they_are_named(tmp_path: Path) -> None:
    for number in range(3):
        table = catalog_of([{"video_id": f"{number}", "uri": "/x"}])
        save_catalog(STORAGE, str(tmp_path / "tables" / f"{number}.parquet"), table)
    said = rf"none of them a video \(\.parquet 3\).* tables are named as '{tmp_path}/tables/\*\.parquet'"
    for list_it in (catalog_of_source, lambda storage, uri: rows_of_source(storage, uri, tmp_path)):
        with pytest.raises(CatalogError, match=said):
            list_it(STORAGE, f"{tmp_path}/tables/")


def test_a_huge_record_of_a_pack_is_none_and_is_not_read(tmp_path: Path) -> None:
    folder = stray(tmp_path / "library", "/etc/passwd")
    with (folder / "pack.json").open("wb") as file:
        file.truncate(3 * 2**30)
    begin_s = time.process_time()
    assert catalog_of_source(STORAGE, str(folder)).table["uri"].to_pylist() == [f"{folder}/a.mp4"]
    assert time.process_time() - begin_s < 5  # reading it took 36


def test_a_pack_refers_to_nothing_outside_of_itself(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "inside").write_bytes(b"x")
    (folder / "pack.json").write_text('{"catalog_digest": "0"}')
    outside = [
        "/etc/passwd",
        f"{tmp_path}/secret",
        "../secret",
        f"{folder}/../secret",
        f"{folder}/link/secret",
        f"file://{folder}/..%2Fsecret",
        f"file://{tmp_path}/secret",
        f"{folder}-other/x",
        "s3://bucket/x",
        "",
        "http://host/x",
    ]
    for uri in outside:
        rows = [{"video_id": "good", "uri": f"{folder}/inside"}, {"video_id": "bad", "uri": uri}]
        save_catalog(STORAGE, str(folder / "catalog.parquet"), catalog_of(rows))
        for load in (catalog_of_source, load_catalog):
            with pytest.raises(CatalogError, match=r"pack/catalog\.parquet row 1 \(bad\) refers to .* outside of"):
                load(STORAGE, str(folder))
        assert len(load_catalog(STORAGE, str(folder / "catalog.parquet"))) == 2
    for uri in (f"{folder}/inside", f"{folder}/shards/absent.tar", "inside", "./inside", f"file://{folder}/ins%69de"):
        save_catalog(STORAGE, str(folder / "catalog.parquet"), catalog_of([{"video_id": "v", "uri": uri}]))
        assert len(load_catalog(STORAGE, str(folder))) == 1
    (tmp_path / "other-name").symlink_to(folder)
    assert len(load_catalog(STORAGE, str(tmp_path / "other-name"))) == 1


def test_addresses_of_a_table_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.mp4").write_bytes(b"a")
    save_catalog(STORAGE, "set/x.parquet", catalog_of([{"video_id": "v", "uri": "a.mp4"}]))
    assert load_catalog(STORAGE, "set/x.parquet").table["uri"].to_pylist() == [f"{tmp_path}/set/a.mp4"]


def test_a_pack_in_a_bucket_refers_to_nothing_outside_of_itself(bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    folder = join(bucket, "pack")
    storage.put(join(folder, "pack.json"), b'{"catalog_digest": "0"}')
    for uri in (join(bucket, "other", "x"), f"{folder}-other/x", "s3://other/pack/x", "/etc/passwd"):
        save_catalog(storage, join(folder, "catalog.parquet"), catalog_of([{"video_id": "v", "uri": uri}]))
        with pytest.raises(CatalogError, match=r"row 0 \(v\) refers to"):
            catalog_of_source(storage, folder)
    save_catalog(storage, join(folder, "catalog.parquet"), catalog_of([{"video_id": "v", "uri": f"{folder}/s.tar"}]))
    assert len(catalog_of_source(storage, folder)) == 1
