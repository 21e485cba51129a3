"""Packing as a whole: every file accounted for, on folders and S3, and whatever is killed on the way."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faulty_s3 import FaultyS3, Request, faulty_s3
from kinoray.catalog.rows import load_quarantine
from kinoray.catalog.table import load_catalog, read_videos, references
from kinoray.config.shared import DecodeConfig, ResourcesConfig, StorageConfig
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.errors import (
    CatalogError,
    ClusterError,
    ConfigError,
    IncompleteOutput,
    JobError,
    ObjectNotFound,
    TooManyBad,
)
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage, join

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

BROKEN = ("empty", "random", "index_lost", "audio_only")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good videos in 6 class folders, 4 broken ones, and 3 files that are not meant as videos."""
    folder = tmp_path_factory.mktemp("pack") / "videos"
    make_demo_set(folder, 2, 0)
    good = next(folder.rglob("*.mp4")).read_bytes()
    for kind in BROKEN:
        (folder / "disc-up" / f"{kind}.mp4").write_bytes(make_broken(kind, good))
    for name in (".DS_Store", "star-up/._x.mp4", "README"):
        (folder / name).write_bytes(b"x")
    return folder


def upload(storage: Storage, folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put_file(join(uri, str(path.relative_to(folder))), path)


def write_list(storage: Storage, uri: str, videos: Path, num_splits: int) -> list[str]:
    """Good videos at `uri`/v, and a CSV over them that makes a shard of each of its splits s0, s1, ...; their names."""
    good = sorted(path for path in videos.rglob("*.mp4") if path.stem not in BROKEN and not path.name.startswith("."))
    for path in good:
        storage.put_file(join(uri, "v", path.name), path)
    rows = [f"v/{path.name},{path.parent.name},s{index % num_splits}" for index, path in enumerate(good)]
    storage.put(join(uri, "list.csv"), "\n".join(["path,label,split", *rows]).encode())
    return [path.name for path in good]


def check_pack(storage: Storage, out: str, totals: dict[str, Any], originals: dict[str, bytes]) -> None:
    """What a finished pack promises: the catalog leads to the original bytes, and all tables agree."""
    catalog = load_catalog(storage, out)
    assert len(catalog) == totals["packed"] == len(originals)
    for row, data in zip(catalog.table.to_pylist(), read_videos(storage, references(catalog.table)), strict=True):
        assert data == originals.pop(row["video_id"])
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["label"] == catalog.labels[row["label_id"]]
        assert row["status"] == "packed"
    assert not originals
    refused = load_quarantine(storage, join(out, "quarantine.parquet"))
    assert len(refused) == totals["quarantined"] == totals["found"] - totals["packed"] - totals["others"]
    assert json.loads(storage.read(join(out, "labels.json"))) == list(catalog.labels)
    assert json.loads(storage.read(join(out, "pack.json"))).items() >= totals.items()


def good_videos(videos: Path) -> dict[str, bytes]:
    """video_id -> bytes of the fixture's good files."""
    found = {}
    for path in videos.glob("*/*.mp4"):
        if path.stem not in BROKEN and not path.name.startswith("."):
            found[f"{path.parent.name}__{path.stem}"] = path.read_bytes()
    return found


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_every_file_is_packed_or_quarantined(
    where: str,
    videos: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    s3_config: StorageConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = Storage(s3_config)
    source, out = str(videos), str(tmp_path / "out")
    if where == "s3":
        source, out = (f"{request.getfixturevalue('bucket')}/{name}" for name in ("videos", "out"))
        upload(storage, videos, source)
    config = PackConfig(source=source, out=out, val_fraction=0.3, max_bad_fraction=0.25, storage=s3_config)
    totals = pack(config)
    said = capsys.readouterr().out
    assert totals["found"] == 19
    assert totals["packed"] == 12
    assert totals["reasons"] == {
        "UnreadableContainer": 2,
        "EmptyMedia": 1,
        "NoVideoStream": 1,
    }
    assert totals["others"] == 3
    assert sum(totals["splits"].values()) == 12
    assert set(totals["splits"]) == {"train", "val"}
    assert "12 packed (" in said
    assert "3 files are no videos (hidden 2, no ending 1), and left out" in said
    assert "+ 4 quarantined (" in said
    assert ") + 3 no videos = 19 found" in said
    check_pack(storage, out, totals, good_videos(videos))
    first = load_catalog(storage, out).digest
    assert pack(config) == totals
    assert load_catalog(storage, out).digest == first
    assert "2 shards, 2 done already" in capsys.readouterr().out


def test_split_folders_become_splits_and_shards(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "set"
    shutil.copytree(videos / "disc-up", source / "train" / "disc-up", ignore=shutil.ignore_patterns(*("*lost*",)))
    shutil.copytree(videos / "star-up", source / "validation" / "star-up")
    totals = pack(PackConfig(source=str(source), out=str(tmp_path / "out"), max_bad_fraction=1.0))
    assert totals["splits"] == {"train": 2, "val": 2}
    assert sorted(path.name for path in (tmp_path / "out" / "shards").glob("*.tar")) == [
        "shard-train-00000.tar",
        "shard-val-00000.tar",
    ]
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "out" / "shards" / f"shard-{split}-00000.tar") as tar:
            assert len(tar.getnames()) == 4


def test_too_many_bad_files_fail_after_the_good_ones_are_packed(videos: Path, tmp_path: Path) -> None:
    config = PackConfig(source=str(videos), out=str(tmp_path / "out"), max_bad_fraction=0.2)
    with pytest.raises(
        TooManyBad, match=r"4 of 16 files were quarantined \(2 UnreadableContainer, .*max_bad_fraction 0\.2"
    ):
        pack(config)
    assert len(load_catalog(Storage(), str(tmp_path / "out"))) == 12
    assert len(load_quarantine(Storage(), str(tmp_path / "out" / "quarantine.parquet"))) == 4
    assert pack(replace(config, max_bad_fraction=0.25))["packed"] == 12


def test_only_broken_files_give_an_empty_catalog_and_a_failure(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "x").mkdir(parents=True)
    for kind in BROKEN:
        shutil.copy(videos / "disc-up" / f"{kind}.mp4", tmp_path / "set" / "x")
    with pytest.raises(TooManyBad, match="4 of 4 files were quarantined"):
        pack(PackConfig(source=str(tmp_path / "set"), out=str(tmp_path / "out")))
    assert len(load_catalog(Storage(), str(tmp_path / "out"))) == 0
    assert not list((tmp_path / "out" / "shards").glob("*.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_mb": 7}, "shard_mb was 256, is 7"),
        ({"val_fraction": 0.5}, r"val_fraction was 0\.0, is 0\.5"),
        ({"decode": DecodeConfig(max_pixels=99)}, "decode was"),
        ({"source": "other"}, "source was .*, is .*other"),
    ],
    ids=["shard_mb", "val_fraction", "decode", "source"],
)
def test_another_pack_is_not_mixed_in(
    change: dict[str, Any], message: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(videos / "star-up", tmp_path / "set" / "star-up")
    shutil.copytree(videos / "star-up", tmp_path / "other" / "star-up")
    monkeypatch.chdir(tmp_path)
    config = PackConfig(source="set", out="out")
    pack(config)
    with pytest.raises(ConfigError, match=f"holds another pack: .*{message}"):
        pack(replace(config, **change))
    (tmp_path / "set" / "star-up" / "new.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match="num_found was 3, is 4"):
        pack(config)


def test_bad_sources_and_places_are_refused_before_any_work(tmp_path: Path, s3_config: StorageConfig) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    with pytest.raises(CatalogError, match="found nothing"):
        pack(PackConfig(source=str(tmp_path / "set"), out=str(tmp_path / "out")))
    (tmp_path / "set" / "a" / "x.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match="lies inside the source"):
        pack(PackConfig(source=str(tmp_path / "set"), out=str(tmp_path / "set" / "packed")))
    with pytest.raises(ConfigError, match="no bucket 'no-such-bucket'"):
        pack(PackConfig(source=str(tmp_path / "set"), out="s3://no-such-bucket/x", storage=s3_config))
    crowd = ResourcesConfig(num_workers=1000)
    with pytest.raises(ClusterError, match="1,000 workers"):
        pack(PackConfig(source=str(tmp_path / "set"), out=str(tmp_path / "out"), resources=crowd))


def test_a_tar_that_vanished_is_noticed(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos / "star-up", tmp_path / "set" / "star-up")
    config = PackConfig(source=str(tmp_path / "set"), out=str(tmp_path / "out"))
    pack(config)
    (tmp_path / "out" / "shards" / "shard-train-00000.tar").unlink()
    with pytest.raises(IncompleteOutput, match=r"shard-train-00000\.tar should have \d+ bytes, found nothing; remove"):
        pack(config)
    (tmp_path / "out" / "shards" / "shard-train-00000.json").unlink()
    assert pack(config)["packed"] == 2


# --- kills, at a chosen moment: while the proxy holds back a video that a worker asked for


def children(pid: int) -> Iterator[int]:
    """All processes below one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
        yield from new


def pack_workers(pid: int) -> list[int]:
    """Processes below one that run the pack's task at this moment."""
    lines = {}
    for child in children(pid):
        try:
            lines[child] = Path(f"/proc/{child}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [child for child, line in lines.items() if line.startswith(b"ray::_pack_task")]


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as proxy:
        yield proxy


def test_a_killed_worker_costs_a_retry(
    videos: Path, tmp_path: Path, bucket: str, faulty: FaultyS3, s3_config: StorageConfig
) -> None:
    through = replace(s3_config, endpoint_url=faulty.url)
    names = write_list(Storage(s3_config), bucket, videos, num_splits=2)
    killed: list[int] = []
    lock = threading.Lock()

    def kill_all_once(request: Request) -> None:
        with lock:
            if not killed and request.method == "GET" and request.path.endswith(names[5]):
                killed.extend(pack_workers(os.getpid()))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    faulty.before = kill_all_once
    out = str(tmp_path / "out")
    totals = pack(PackConfig(source=f"{bucket}/list.csv", out=out, storage=through))
    assert killed
    assert (totals["found"], totals["packed"]) == (12, 12)
    check_pack(Storage(), out, totals, {f"v__{key.split('__')[1]}": data for key, data in good_videos(videos).items()})


def test_a_killed_driver_leaves_work_that_the_next_run_finishes(
    videos: Path, tmp_path: Path, bucket: str, faulty: FaultyS3, s3_config: StorageConfig
) -> None:
    """kill -9 when the third of four shards is being read: the first two are neither read nor written again."""
    through = replace(s3_config, endpoint_url=faulty.url)
    write_list(Storage(s3_config), bucket, videos, num_splits=4)
    source, out = f"{bucket}/list.csv", f"{bucket}/out"
    code = f"""
from kinoray.config.shared import ResourcesConfig, StorageConfig
from kinoray.pack.verb import pack
from kinoray.pack.config import PackConfig
pack(PackConfig(source={source!r}, out={out!r}, storage={through!r}, resources=ResourcesConfig(num_workers=1)))
"""
    reached = threading.Event()

    def stop_at_third(request: Request) -> None:
        shards = [info.uri for info in Storage(s3_config).list(f"{out}/shards/") if info.uri.endswith(".json")]
        if request.method == "GET" and "/v/" in request.path and len(shards) == 2:
            reached.set()
            gate.wait(60)

    gate = threading.Event()
    faulty.before = stop_at_third
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as driver:
        try:
            assert reached.wait(100)
        finally:  # with all that it started, as when its machine is lost: a worker left alive would finish its shard
            for pid in [driver.pid, *children(driver.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    faulty.before = None
    gate.set()
    storage = Storage(s3_config)
    before = {info.uri: (info.etag, info.modified_s) for info in storage.list(f"{out}/shards/")}
    assert sorted(uri.rpartition("/")[2] for uri in before) == [
        "shard-s0-00000.json",
        "shard-s0-00000.tar",
        "shard-s1-00000.json",
        "shard-s1-00000.tar",
    ]
    with pytest.raises(ObjectNotFound, match="kinoray pack"):
        load_catalog(storage, out)
    faulty.requests.clear()
    totals = pack(PackConfig(source=source, out=out, storage=through))
    read = [request for request in faulty.gets() if "/v/" in request.path]
    assert len(read) == 6
    after = {info.uri: (info.etag, info.modified_s) for info in storage.list(f"{out}/shards/")}
    assert {uri: after[uri] for uri in before} == before
    assert totals["splits"] == {"s0": 3, "s1": 3, "s2": 3, "s3": 3}
    check_pack(storage, out, totals, {f"v__{key.split('__')[1]}": data for key, data in good_videos(videos).items()})


def test_an_object_that_may_not_be_read_is_a_row(
    videos: Path, tmp_path: Path, bucket: str, faulty: FaultyS3, s3_config: StorageConfig
) -> None:
    through = replace(s3_config, endpoint_url=faulty.url)
    names = write_list(Storage(s3_config), bucket, videos, num_splits=1)
    out = str(tmp_path / "out")
    config = PackConfig(source=f"{bucket}/list.csv", out=out, storage=through)

    faulty.outage, faulty.outage_path = "403", f"v/{names[3]}"
    totals = pack(config)
    assert (totals["packed"], totals["reasons"]) == (11, {"AccessDenied": 1})
    (row,) = load_quarantine(Storage(), f"{out}/quarantine.parquet")
    assert row.uri == f"{bucket}/v/{names[3]}"


@pytest.mark.slow
def test_a_shard_whose_worker_always_dies_ends_the_job_by_name(
    videos: Path, tmp_path: Path, bucket: str, faulty: FaultyS3, s3_config: StorageConfig
) -> None:
    through = replace(s3_config, endpoint_url=faulty.url)
    names = write_list(Storage(s3_config), bucket, videos, num_splits=1)
    config = PackConfig(source=f"{bucket}/list.csv", out=str(tmp_path / "out"), storage=through)

    def kill_all(request: Request) -> None:
        if request.method == "GET" and request.path.endswith(names[0]):
            for pid in pack_workers(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    faulty.before = kill_all
    with pytest.raises(JobError, match=r"the worker of shard-s0-00000 died 4 times, 12 files from s3://"):
        pack(config)
    faulty.before = None
    assert pack(config)["packed"] == 12
