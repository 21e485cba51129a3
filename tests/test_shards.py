"""Shards: the plan of a pack, the tar it writes, and the commit that makes a shard count."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from kinoray.catalog.quarantine import Refusal, count_reasons, load_quarantine, save_quarantine
from kinoray.catalog.source import SourceFile, find_files
from kinoray.config.files import local_uri
from kinoray.config.shared import DecodeConfig
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.pack.plan import PackPlan, PlannedVideo, ShardPlan, make_plan
from kinoray.pack.shard import pack_shard, read_commit
from kinoray.pack.tar import write_tar
from kinoray.storage.objects import Storage

STORAGE = Storage()


def plan_of(
    *names: str, size_bytes: int = 1000, shard_bytes: int = 10**6, val_fraction: float = 0.0, source: str = "/set"
) -> PackPlan:
    files = [SourceFile(name, local_uri(f"/set/{name}"), size_bytes) for name in names]
    return make_plan(source, files, shard_bytes=shard_bytes, val_fraction=val_fraction)


def placed(plan: PackPlan) -> dict[str, tuple[str, str]]:
    """name -> (label, split)"""
    return {video.name: (video.label, video.split) for shard in plan.shards for video in shard.videos}


# --- the plan


def test_classes_are_the_first_folders() -> None:
    plan = plan_of("walk/a.mp4", "run fast/deep/er/b.mp4", "walk/c")
    assert placed(plan) == {
        "walk/a.mp4": ("walk", "train"),
        "run fast/deep/er/b.mp4": ("run fast", "train"),
        "walk/c": ("walk", "train"),
    }
    assert plan.labels == ("run fast", "walk")
    ids = {video.label: video.label_id for shard in plan.shards for video in shard.videos}
    assert ids == {"run fast": 0, "walk": 1}


def test_split_folders_are_known_by_their_names() -> None:
    plan = plan_of("train/walk/a.mp4", "validation/walk/b.mp4", "test/run/c.mp4", "Val/run/d.mp4", val_fraction=1.0)
    assert placed(plan) == {
        "train/walk/a.mp4": ("walk", "train"),
        "validation/walk/b.mp4": ("walk", "val"),
        "test/run/c.mp4": ("run", "test"),
        "Val/run/d.mp4": ("run", "val"),
    }


@pytest.mark.parametrize(
    "names",
    [("train/a.mp4", "bus/b.mp4"), ("train/deep/a.mp4", "bus/b.mp4"), ("train/a.mp4", "test/b.mp4")],
    ids=["a class called train", "with folders inside", "no folders inside"],
)
def test_a_class_may_be_called_train(names: tuple[str, str]) -> None:
    plan = plan_of(*names)
    assert set(plan.labels) == {name.split("/")[0] for name in names}


def test_what_is_no_video_by_its_place_is_refused_with_a_reason() -> None:
    plan = plan_of(
        "walk/a.mp4", "walk/._a.mp4", ".DS_Store", "__MACOSX/walk/a.mp4", ".git/x/y", "readme", "bad\udcff/x.mp4"
    )
    assert placed(plan) == {"walk/a.mp4": ("walk", "train")}
    assert {refusal.uri: refusal.error_class for refusal in plan.refused} == {
        "/set/walk/._a.mp4": "HiddenFile",
        "/set/.DS_Store": "HiddenFile",
        "/set/__MACOSX/walk/a.mp4": "HiddenFile",
        "/set/.git/x/y": "HiddenFile",
        "/set/readme": "NoClassFolder",
        "file:///set/bad%FF/x.mp4": "UnusableName",
    }
    assert {refusal.stage for refusal in plan.refused} == {"list"}
    assert plan.num_found == 7


def test_nothing_in_class_folders_is_an_error() -> None:
    with pytest.raises(CatalogError, match="/set: found nothing; expected folders of one class each"):
        plan_of()
    with pytest.raises(CatalogError, match="/set: found 2 files, but none in a class folder"):
        plan_of("a.mp4", "b.mp4")


def test_a_csv_says_class_and_split(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", ".c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    source = tmp_path / "list.csv"
    source.write_text("path,label,split\na.mp4,walk,train\nb.mp4,run,../../odd split\n.c.mp4,run,\n")
    plan = make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=100, val_fraction=1.0)
    assert placed(plan) == {
        "a.mp4": ("walk", "train"),
        "b.mp4": ("run", "../../odd split"),
        ".c.mp4": ("run", "val"),
    }
    names = sorted(shard.name for shard in plan.shards)
    assert re.fullmatch(r"shard-oddsplit-[0-9a-f]{8}-00000 shard-train-00000 shard-val-00000", " ".join(names))
    source.write_text("path,label\na.mp4,walk\nb.mp4,\n")
    with pytest.raises(CatalogError, match=r"list\.csv: b\.mp4 has no label"):
        make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=100, val_fraction=0)


def test_a_video_keeps_its_split_when_the_source_grows() -> None:
    names = [f"c{i % 5}/{i}.mp4" for i in range(2000)]
    small, large = placed(plan_of(*names[:1000], val_fraction=0.25)), placed(plan_of(*names, val_fraction=0.25))
    assert all(large[name] == small[name] for name in small)
    share = sum(split == "val" for _, split in large.values()) / len(large)
    assert 0.21 < share < 0.29  # four standard deviations of 2000 fair draws
    assert {split for _, split in placed(plan_of(*names, val_fraction=0.0)).values()} == {"train"}
    assert {split for _, split in placed(plan_of(*names, val_fraction=1.0)).values()} == {"val"}


def test_shards_hold_one_split_are_of_like_size_and_mix_the_classes() -> None:
    plan = plan_of(*(f"{'ab'[i % 2]}/{i:04d}.mp4" for i in range(1000)), shard_bytes=100_000, val_fraction=0.3)
    names = [shard.name for shard in plan.shards]
    assert len(set(names)) == len(names)
    assert 10 <= len(names) <= 11
    assert all(name.startswith(("shard-train-0000", "shard-val-0000")) for name in names)
    for shard in plan.shards:
        assert len({video.split for video in shard.videos}) == 1
        assert 80 <= len(shard.videos) <= 101
        assert 25 <= Counter(video.label for video in shard.videos)["a"] <= 75
    assert len(placed(plan)) == 1000


def test_huge_and_empty_files_get_a_shard_too() -> None:
    files = [SourceFile(f"a/{i}", f"/set/a/{i}", size) for i, size in enumerate([0, 10**9, 0, 5, 10**9, 0])]
    plan = make_plan("/set", files, shard_bytes=1000, val_fraction=0)
    assert sorted(placed(plan)) == [f"a/{i}" for i in range(6)]
    assert all(shard.videos for shard in plan.shards)
    assert len(make_plan("/set", files[:1], shard_bytes=1000, val_fraction=0).shards) == 1


def test_the_plan_is_a_function_of_the_listing() -> None:
    names = [f"{'ab'[i % 2]}/{i}.mp4" for i in range(50)]
    assert plan_of(*names) == plan_of(*names)
    assert plan_of(*names).digest == plan_of(*names).digest
    others = [plan_of(*names, "a/new.mp4"), plan_of(*names, size_bytes=999), plan_of(*names, val_fraction=0.5)]
    assert len({plan_of(*names).digest, *(other.digest for other in others)}) == 4


# --- the tar


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder `mixed` of six good videos and of files broken in four ways."""
    folder = tmp_path_factory.mktemp("videos")
    make_demo_set(folder / "demo", 1, 0)
    (folder / "set" / "mixed").mkdir(parents=True)
    good = sorted((folder / "demo").rglob("*.mp4"))
    for index, path in enumerate(good):
        path.rename(folder / "set" / "mixed" / f"odd name.{index}.mp4")
    data = (folder / "set" / "mixed" / "odd name.0.mp4").read_bytes()
    for kind in ("empty", "random", "index_lost", "audio_only"):
        (folder / "set" / "mixed" / f"{kind}.mp4").write_bytes(make_broken(kind, data))
    (folder / "set" / "mixed" / "no_extension").write_bytes(data)
    (folder / "set" / "mixed" / "video.json").write_bytes(data)
    return folder / "set"


def only_shard(source: Path) -> ShardPlan:
    plan = make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=10**9, val_fraction=0)
    (shard,) = plan.shards
    return shard


def test_offsets_lead_to_the_original_bytes(videos: Path, tmp_path: Path) -> None:
    """Read back by range, by tarfile, and compared with the source files: three ways to the same sha256."""
    shard = only_shard(videos)
    commit = pack_shard(STORAGE, str(tmp_path), shard, DecodeConfig())
    assert commit.uri == str(tmp_path / "shards" / "shard-train-00000.tar")
    assert commit.size_bytes == os.path.getsize(commit.uri)
    sources = {video.video_id: Path(video.uri) for video in shard.videos}
    assert len(commit.rows) == 8
    with tarfile.open(commit.uri) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert len(members) == 2 * len(commit.rows)
        for row in commit.rows:
            original = sources[row["video_id"]].read_bytes()
            (name,) = (n for n in members if n.startswith(row["video_id"] + ".") and not n.endswith(".json"))
            assert members[name].offset_data == row["offset"]
            extracted = tar.extractfile(name)
            assert extracted is not None
            assert extracted.read() == original
            assert STORAGE.read_range(row["uri"], row["offset"], row["length"]) == original
            assert hashlib.sha256(original).hexdigest() == row["sha256"]
            about = tar.extractfile(row["video_id"] + ".json")
            assert about is not None
            assert json.load(about) == {
                "video_id": row["video_id"],
                "label": "mixed",
                "label_id": 0,
                "split": "train",
                "source": str(sources[row["video_id"]]),
            }
    assert [row["offset"] for row in commit.rows] == sorted(row["offset"] for row in commit.rows)
    assert {(row["width"], row["height"], row["codec"]) for row in commit.rows} == {(96, 96, "h264")}


def test_webdataset_groups_the_members_by_key(videos: Path, tmp_path: Path) -> None:
    """WebDataset's rule: the key is the name up to the first dot behind the last slash; a sample's files follow."""
    commit = pack_shard(STORAGE, str(tmp_path), only_shard(videos), DecodeConfig())
    with tarfile.open(commit.uri) as tar:
        names = tar.getnames()
    keys = [name.split("/")[-1].split(".", 1) for name in names]
    assert [key for key, _ in keys[::2]] == [key for key, _ in keys[1::2]] == [row["video_id"] for row in commit.rows]
    assert {extension for _, extension in keys[1::2]} == {"json"}
    assert Counter(extension for _, extension in keys[::2]) == {"mp4": 6, "video": 2}


def test_every_file_is_packed_or_refused(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    commit = pack_shard(STORAGE, str(tmp_path), shard, DecodeConfig())
    assert len(commit.rows) + len(commit.refused) == len(shard.videos)
    assert {refusal.video_id: (refusal.error_class, refusal.stage) for refusal in commit.refused} == {
        "mixed__empty": ("EmptyMedia", "probe"),
        "mixed__random": ("UnreadableContainer", "probe"),
        "mixed__index_lost": ("UnreadableContainer", "probe"),
        "mixed__audio_only": ("NoVideoStream", "probe"),
    }
    assert all("\n" not in refusal.error_text and refusal.error_text for refusal in commit.refused)


def test_the_same_plan_gives_the_same_tar_and_the_first_commit_stands(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    commits = [pack_shard(STORAGE, str(tmp_path / name), shard, DecodeConfig()) for name in ("a", "b")]
    assert Path(commits[0].uri).read_bytes() == Path(commits[1].uri).read_bytes()
    assert read_commit(STORAGE, str(tmp_path / "a"), shard.name) == commits[0]
    stricter = DecodeConfig(max_duration_s=0.001)
    assert pack_shard(STORAGE, str(tmp_path / "a"), shard, stricter) == commits[0]


def test_budgets_and_missing_files_are_reasons(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    absent = PlannedVideo("absent", "absent.mp4", "/absent.mp4", 0, "mixed", 0, "train")
    shard = ShardPlan(shard.name, (*shard.videos, absent))
    commit = pack_shard(STORAGE, str(tmp_path), shard, DecodeConfig(max_bytes=100))
    assert (commit.rows, commit.uri, commit.size_bytes) == ((), "", 0)
    assert not (tmp_path / "shards" / "shard-train-00000.tar").exists()
    reasons = {refusal.video_id: (refusal.error_class, refusal.stage) for refusal in commit.refused}
    assert reasons["absent"] == ("ObjectNotFound", "read")
    assert reasons["mixed__empty"] == ("EmptyMedia", "probe")
    assert reasons["mixed__odd_name_0"] == ("MediaOverBudget", "list")
    assert len(reasons) == len(shard.videos)


def test_a_commit_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"shards/shard-x\.json"):
        read_commit(STORAGE, str(tmp_path), "shard-x")
    for content in (b"not json", b"{}", b"[]", b'{"name": "x", "refused": [{}]}'):
        STORAGE.put(str(tmp_path / "shards" / "shard-x.json"), content)
        with pytest.raises(CatalogError, match=r"shard-x\.json is not the commit of a shard"):
            read_commit(STORAGE, str(tmp_path), "shard-x")


@pytest.mark.parametrize("length", [1, 511, 512, 513, 5000])
def test_long_and_foreign_names_keep_offsets_right(length: int) -> None:
    """pax headers of another size come before such members."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        offsets = []
        for key in ("short", "x" * 150, "\u4e16\u754c"):
            video = PlannedVideo(key, f"{key}.MP4", f"/{key}", length, "label", 0, "train")
            offsets.append(write_tar(tar, video, key.encode()[:1] * length))
    for offset, key in zip(offsets, ("short", "x" * 150, "\u4e16\u754c"), strict=True):
        assert sink.getvalue()[offset : offset + length] == key.encode()[:1] * length
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as tar:
        assert [member.offset_data for member in tar.getmembers()[::2]] == offsets
        assert [member.name for member in tar.getmembers()[::2]] == [
            "short.mp4",
            "x" * 150 + ".mp4",
            "\u4e16\u754c.mp4",
        ]


# --- the quarantine table


def test_a_quarantine_table_comes_back_as_it_was(tmp_path: Path) -> None:
    refusals = [
        Refusal("a", "/a", "EmptyMedia", "no bytes", "probe"),
        Refusal("b", "s3://b/t.tar", "ChecksumMismatch", "wrong", "read", 512, 7),
        Refusal("c", "/c", "EmptyMedia", "no bytes", "probe"),
    ]
    save_quarantine(STORAGE, str(tmp_path / "q.parquet"), refusals)
    assert load_quarantine(STORAGE, str(tmp_path / "q.parquet")) == refusals
    assert count_reasons(refusals) == {"EmptyMedia": 2, "ChecksumMismatch": 1}
    save_quarantine(STORAGE, str(tmp_path / "q.parquet"), [])
    assert load_quarantine(STORAGE, str(tmp_path / "q.parquet")) == []
    (tmp_path / "q.parquet").write_bytes(b"x")
    with pytest.raises(CatalogError, match="is not a quarantine table"):
        load_quarantine(STORAGE, str(tmp_path / "q.parquet"))
