"""Shards: the plan of a pack, the tar it writes, and the commit that makes a shard count."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from kinoray.catalog.folders import is_other, said_of_others
from kinoray.catalog.rows import QuarantineRow, Refusal, count_reasons, load_quarantine, save_quarantine
from kinoray.catalog.source import SourceFile, find_files
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, catalog_of_files, load_catalog, save_catalog
from kinoray.config.files import local_uri
from kinoray.config.shared import DecodeConfig
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.errors import CatalogError, ObjectNotFound
from kinoray.pack.config import PackConfig
from kinoray.pack.plan import Plan, PlannedVideo, Unit, make_plan, plan_of_catalog, plan_source
from kinoray.pack.splits import Candidate, draw_splits
from kinoray.pack.tars import write_tar
from kinoray.pack.unit import PackSettings, pack_unit, read_commit
from kinoray.storage.objects import Storage

STORAGE = Storage()


def listed(name: str, size_bytes: int = 1) -> SourceFile:
    return SourceFile(name, local_uri(f"/set/{name}"), size_bytes, is_video=not is_other(name))


def plan_of(
    *names: str, size_bytes: int = 1000, shard_bytes: int = 10**6, val_fraction: float = 0.0, source: str = "/set"
) -> Plan:
    files = [listed(name, size_bytes) for name in names]
    return make_plan(source, files, shard_bytes=shard_bytes, val_fraction=val_fraction)


def placed(plan: Plan) -> dict[str, tuple[str, str]]:
    """name -> (label, split)"""
    return {video.name: (video.label, video.split) for shard in plan.units for video in shard.files}


# --- the plan


def test_classes_are_the_first_folders() -> None:
    plan = plan_of("walk/a.mp4", "run fast/deep/er/b.mp4", "walk/c")
    assert placed(plan) == {
        "walk/a.mp4": ("walk", "train"),
        "run fast/deep/er/b.mp4": ("run fast", "train"),
        "walk/c": ("walk", "train"),
    }
    assert plan.labels == ("run fast", "walk")
    ids = {video.label: video.label_id for shard in plan.units for video in shard.files}
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
    ("folders", "expected"),
    [
        (("train", "valid", "test"), ("train", "val", "test")),
        (("Training", "Validation", "Testing"), ("train", "val", "test")),
        (("TRAIN", "Validate", "testing"), ("train", "val", "test")),
    ],
)
def test_splits_have_any_usual_name_in_folders_and_lists(
    tmp_path: Path, folders: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    plan = plan_of(*(f"{folder}/walk/{index}.mp4" for index, folder in enumerate(folders)))
    assert [split for _, split in placed(plan).values()] == sorted(expected)
    assert plan.labels == ("walk",)
    source = tmp_path / "list.csv"
    rows = [f"{index}.mp4,walk,{folder}" for index, folder in enumerate(folders)]
    source.write_text("\n".join(["path,label,split", *rows]))
    assert tuple(file.split for file in find_files(STORAGE, str(source))) == expected


def test_a_folder_without_videos_beside_splits_is_no_class() -> None:
    plan = plan_of("train/walk/a.mp4", "val/run/b.mp4", "annotations/train.csv", "annotations/old/x.json", "c.mp4")
    assert placed(plan) == {"train/walk/a.mp4": ("walk", "train"), "val/run/b.mp4": ("run", "val")}
    assert Counter(row.error_class for row in plan.refused) == {"NoClassFolder": 1}
    assert plan.others == ("annotations/train.csv", "annotations/old/x.json")
    assert set(plan_of("train/walk/a.mp4", "val/run/b.mp4", "extra/c.mp4").labels) == {"extra", "train", "val"}


def test_what_is_no_video_by_its_name_is_counted_and_not_refused(tmp_path: Path) -> None:
    names = ["walk/a.mp4", "walk/a.info.JSON", "walk/a.en.vtt", "walk/a.jpg", "run/b.MTS", "run/b"]
    plan = plan_of(*names)
    assert sorted(placed(plan)) == ["run/b", "run/b.MTS", "walk/a.mp4"]
    assert (plan.refused, plan.num_found, len(plan.others)) == ((), 6, 3)
    assert said_of_others(plan.others) == "3 files are no videos (.json 1, .vtt 1, .jpg 1)"
    (tmp_path / "l.csv").write_text("path,label\na.json,walk\n")  # who lists a file by name means it
    files = find_files(STORAGE, str(tmp_path / "l.csv"))
    assert make_plan(str(tmp_path / "l.csv"), files, shard_bytes=1, val_fraction=0).others == ()


SYSTEMS = (
    "walk/._a.mp4",
    ".Trash-1000/files/b.mp4",
    ".snapshot/hourly.0/walk/a.mp4",
    "walk/@eaDir/a.mp4/SHOT.jpg",
    "@eaDir/walk/a.mp4",
    "#recycle/old/c.mp4",
    "$RECYCLE.BIN/S-1/$R1.mp4",
    "System Volume Information/x/d.mp4",
    "__MACOSX/walk/._a.mp4",
)


def test_what_systems_leave_is_neither_video_nor_class() -> None:
    plan = plan_of("walk/a.mp4", *SYSTEMS)
    assert placed(plan) == {"walk/a.mp4": ("walk", "train")}
    assert (plan.refused, plan.others) == ((), SYSTEMS)
    files = [listed(name) for name in ("walk/a.mp4", *SYSTEMS)]
    assert catalog_of_files("/set", files).table.column("uri").to_pylist() == ["/set/walk/a.mp4"]


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
        "walk/a.mp4", "walk/._a.mp4", ".DS_Store", "__MACOSX/walk/a.mp4", ".git/x/y", "b.mp4", "bad\udcff/x.mp4"
    )
    assert placed(plan) == {"walk/a.mp4": ("walk", "train")}
    assert {refusal.uri: refusal.error_class for refusal in plan.refused} == {
        "/set/b.mp4": "NoClassFolder",
        "file:///set/bad%FF/x.mp4": "UnusableName",
    }
    assert {refusal.stage for refusal in plan.refused} == {"list"}
    assert plan.num_found == 7


def test_nothing_in_class_folders_is_an_error() -> None:
    with pytest.raises(CatalogError, match="/set: found nothing; expected folders of one class each"):
        plan_of()
    with pytest.raises(CatalogError, match="/set: found 2 videos, but none in a class folder; expected folders"):
        plan_of("a.mp4", "b.mp4", "walk/a.txt")


def test_class_folders_of_pictures_are_told_from_videos_outside_of_class_folders() -> None:
    names = ("walk/1.jpg", "walk/2.jpg", "run/1.jpg")
    found = (
        r"/set: found 3 files, none of them a video \(\.jpg 3\); a video is one file, .*FOLDER/%05d\.jpg FOLDER\.mp4"
    )
    with pytest.raises(CatalogError, match=found):
        plan_of(*names)
    with pytest.raises(CatalogError, match=found):
        catalog_of_files("/set", [listed(name) for name in names])
    with pytest.raises(CatalogError, match=r"\(\.jpg 1, \.txt 1\); expected folders of one class each"):
        plan_of("walk/1.jpg", "walk/a.txt")


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
    names = sorted(shard.name for shard in plan.units)
    assert re.fullmatch(r"shard-oddsplit-[0-9a-f]{8}-00000 shard-train-00000 shard-val-00000", " ".join(names))
    source.write_text("path,label\na.mp4,walk\nb.mp4,\n")
    with pytest.raises(CatalogError, match=r"list\.csv: b\.mp4 has no label"):
        make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=100, val_fraction=0)


def test_few_videos_change_their_split_when_the_source_grows() -> None:
    names = [f"c{i % 5}/{i}.mp4" for i in range(2000)]
    small, large = placed(plan_of(*names[:1000], val_fraction=0.25)), placed(plan_of(*names, val_fraction=0.25))
    assert sum(large[name] != small[name] for name in small) < 50
    assert Counter(large.values()) == {
        (f"c{i}", split): n for i in range(5) for split, n in (("val", 100), ("train", 300))
    }
    assert {split for _, split in placed(plan_of(*names, val_fraction=0.0)).values()} == {"train"}
    assert {split for _, split in placed(plan_of(*names, val_fraction=1.0)).values()} == {"val"}


def validating(sizes: list[int], fraction: float) -> list[int]:
    """Videos of each class that validate, of classes with so many."""
    found = placed(plan_of(*(f"c{c}/{i}.mp4" for c, n in enumerate(sizes) for i in range(n)), val_fraction=fraction))
    counts = Counter(found.values())
    return [counts[f"c{c}", "val"] for c in range(len(sizes))]


def test_every_class_gives_its_share_to_val() -> None:
    assert validating([5] * 12, 0.2) == [1] * 12
    assert validating([1, 2, 3, 10], 0.5) == [0, 1, 2, 5]  # of 15, 7.5: the halves of one class of three go up
    assert validating([7, 7, 7], 0.2) == [2, 1, 1]  # 4.2 of 21, 1.4 each: the fourth to the first by name
    assert validating([2, 100], 0.01) == [1, 1]
    assert validating([2, 2], 0.99) == [1, 1]
    assert validating([1, 1], 0.5) == [0, 0]


def test_copies_are_on_one_side_of_a_split(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[index % 2] / f"{index}.mp4").write_bytes(bytes(100_000) + bytes([index % 6]))
    plan = plan_source(STORAGE, PackConfig(source=str(tmp_path), out="o", val_fraction=0.34))
    sides = {(int(name[2:-4]) % 6, split) for name, (_, split) in placed(plan).items()}
    assert sorted(number for number, _ in sides) == list(range(6))
    assert Counter(split for _, split in sides) == {"val": 2, "train": 4}


def test_a_list_may_give_each_video_several_classes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    source = tmp_path / "list.csv"
    source.write_text("path,labels,split\na.mp4, round |red|round,train\nb.mp4,|,train\nc.mp4,red,val\nd.mp4,,test\n")
    files = find_files(STORAGE, str(source))
    plan = make_plan(str(source), files, shard_bytes=100, val_fraction=0.0)
    videos = {video.name: video for unit in plan.units for video in unit.files if isinstance(video, PlannedVideo)}
    assert plan.labels == ("red", "round")
    assert {name: video.label_ids for name, video in videos.items()} == {
        "a.mp4": (0, 1),
        "b.mp4": (),
        "c.mp4": (0,),
        "d.mp4": None,
    }
    assert videos["a.mp4"].labels == ("red", "round")
    assert {(video.label, video.label_id) for video in videos.values()} == {(None, None)}
    catalog = catalog_of_files(str(source), files)
    assert catalog.table["label_ids"].to_pylist() == [[0, 1], [], [0], None]
    assert (catalog.is_multilabel, catalog.class_names()) == (True, [("red", "round"), (), ("red",), ()])
    uri = str(tmp_path / "catalog.parquet")
    save_catalog(STORAGE, uri, catalog)
    again = load_catalog(STORAGE, uri)
    assert (again.digest, again.table.equals(catalog.table)) == (catalog.digest, True)
    packed = plan_of_catalog(uri, again.select("train"), shard_bytes=100, val_fraction=0.0)
    assert {video.video_id: video.label_ids for unit in packed.units for video in unit.files} == {"a": (0, 1), "b": ()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        write_tar(tar, videos["a.mp4"], b"x")
    assert b'"labels": ["red", "round"], "label_ids": [0, 1]}' in buffer.getvalue()
    source.write_text("path,label,labels\na.mp4,red,red\n")
    with pytest.raises(CatalogError, match="line 1: there are the columns label and labels; keep label where each"):
        find_files(STORAGE, str(source))
    source.write_text("path,labels\na.mp4,red\nb.mp4,\n")
    with pytest.raises(CatalogError, match=r"b\.mp4 has no label.*as in a\.mp4,red\|round, and \| alone for none"):
        make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=100, val_fraction=0.0)


def draw(*rows: tuple[str, str, str | None, str | None], fraction: float = 0.5) -> dict[str, str]:
    """Splits of (name, classes divided by a comma, split, content)."""
    videos = [Candidate(name, tuple(labels.split(",")), split, content) for name, labels, split, content in rows]
    return draw_splits("set", videos, fraction)


def test_a_copy_goes_where_the_source_says_that_its_original_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "x", "val", "1"), ("b", "x", "train", "2"), ("c", "y", "test", "3"), ("d", "y", "train", "3")]
    free = [(f"{name}{copy}", label, None, name) for name, label in zip("123", "xxy", strict=True) for copy in range(9)]
    found = draw(*rows, *free)
    assert {(name[0], split) for name, split in found.items() if name[0].isdigit()} == {
        ("1", "val"),
        ("2", "train"),
        ("3", "test"),
    }
    said = capsys.readouterr().err
    assert "set: 1 video of split train with the same content as one of another split, such as d;" in said


def test_more_copies_than_a_class_is_to_give_do_not_validate() -> None:
    """Of 20 videos 9 are one content, which is a fourth of the contents; what is small is drawn as before."""
    for seed in range(20):
        rows = [(f"{seed}copy{copy}", "x", None, "1") for copy in range(9)]
        rows += [(f"{seed}one{number}", "x", None, f"other {number}") for number in range(11)]
        found = draw(*rows, fraction=0.25)
        assert Counter(split for name, split in found.items() if "copy" in name) == {"train": 9}
        assert Counter(found.values()) == {"train": 17, "val": 3}
    assert Counter(draw(*rows[:9], ("b", "x", None, None), fraction=0.5).values()) == {"train": 9, "val": 1}
    two = [(f"{name}{copy}", "x", None, name) for name in "ab" for copy in range(9)]
    assert Counter(draw(*two, fraction=0.2).values()) == {"train": 9, "val": 9}  # it is that or nothing


def test_a_copy_of_a_video_with_an_empty_label_list_stays_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    videos = [Candidate("a", (), "val", "1"), Candidate("b", (), "train", "1"), Candidate("c", None, "test", "2")]
    videos += [Candidate(f"{copy}{content}", ("x",), None, content) for copy in range(9) for content in "12"]
    found = draw_splits("set", videos, 0.3)
    assert {found[f"{copy}1"] for copy in range(9)} == {"val"}
    assert {found[f"{copy}2"] for copy in range(9)} == {"train"}  # one content, and a split without labels is none
    assert "1 video of split train with the same content as one of another split, such as b" in capsys.readouterr().err


def test_each_class_validates_though_a_copy_of_one_of_its_videos_is_called_otherwise() -> None:
    """Two contents a class; the one that they share may be drawn for one of them, and then counts for both."""
    for seed in range(50):
        rows = [(f"{seed}a", "x", None, "1"), (f"{seed}b", "y", None, "1")]
        rows += [(f"{seed}c", "x", None, None), (f"{seed}d", "y", None, None)]
        found = draw(*rows)
        assert found[f"{seed}a"] == found[f"{seed}b"]
        assert found[f"{seed}a"] != found[f"{seed}c"]
        assert found[f"{seed}c"] == found[f"{seed}d"]
    assert set(draw(("a", "x", None, "1"), ("b", "y", None, "1")).values()) == {"train"}


def test_videos_of_several_classes_give_each_class_its_share() -> None:
    rows = [(f"{i}", f"c{i % 4},d{i % 9},e{i % 25}", None, None) for i in range(900)]
    found = draw(*rows, fraction=0.2)
    shares = {
        (kind, number): [found[f"{i}"] == "val" for i in range(900) if i % size == number]
        for kind, size in (("c", 4), ("d", 9), ("e", 25))
        for number in range(size)
    }
    assert all(0.19 < sum(drawn) / len(drawn) < 0.28 for drawn in shares.values())
    assert {name: split for name, split in found.items() if split == "val"} == {
        name: split for name, split in draw(*reversed(rows), fraction=0.2).items() if split == "val"
    }


def test_a_poor_set_is_named_with_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "walk").mkdir()
    for index in range(10):
        (tmp_path / "walk" / f"{index}.mp4").write_bytes(bytes([index]))
    plan_source(STORAGE, PackConfig(source=str(tmp_path), out="o", val_fraction=0.2))
    said = capsys.readouterr().err
    assert "WARNING: " + str(tmp_path) + ": all 10 labelled videos are of one class, 'walk'; a network learns" in said
    assert "2 videos to validate on, for 1 class: each is 50 % of a top-1" in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "only.mp4").write_bytes(b"one")
    plan_source(STORAGE, PackConfig(source=str(tmp_path), out="o", val_fraction=0.2))
    assert "1 class without a video in val: run; their accuracy stays unknown" in capsys.readouterr().err


def test_a_set_of_label_lists_is_named_for_what_is_poor_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To have a class or not is something to learn; none at all is not."""

    def said(*labels: str, fraction: float = 0.2, column: str = "labels") -> str:
        for index in range(len(labels)):
            (tmp_path / f"{index}.mp4").write_bytes(bytes([index]))
        lines = [f'{index}.mp4,"{label}"' for index, label in enumerate(labels)]
        (tmp_path / "list.csv").write_text("\n".join([f"path,{column}", *lines]))
        plan_source(STORAGE, PackConfig(source=str(tmp_path / "list.csv"), out="o", val_fraction=fraction))
        return capsys.readouterr().err

    found = said(*["red", "|"] * 20)
    assert "of one class" not in found
    assert "list.csv: 8 videos to validate on, for 1 class; accuracies on so few say little" in found
    assert "all 4 labelled videos are of one class, 'red'" in said(*["red"] * 4)
    assert "every label list is empty; there is no class to learn" in said(*["|"] * 4)
    odd = "no label list is divided by |, so 'red, round' is read as the name of one class (2 cells like it)"
    assert odd in said("red, round", "red", "|", "round;red")
    assert "so '[red, round]' is read as" in said("[red, round]", "red", "|")
    assert "is read as" not in said("red, round|square", "red", "a|b")
    odd = "'red|round' is read as the name of one class; where videos may have several, the column is called labels"
    assert odd in said("red|round", "red", column="label")
    (tmp_path / "1.mp4").write_bytes(bytes([0]))
    lines = ["path,label", "0.mp4,red", "1.mp4,red"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    plan_source(STORAGE, PackConfig(source=str(tmp_path / "list.csv"), out="o", val_fraction=0.5))
    assert "no class has two videos of different content without a split" in capsys.readouterr().err


def test_copies_that_a_catalog_has_no_checksum_of_are_on_one_side(tmp_path: Path) -> None:
    """Some rows have a checksum, others have none, and one is a member of a shard: their bytes tell them apart."""
    shard = tmp_path / "shard.tar"
    shard.write_bytes(bytes(512) + bytes([3]) * 50)
    rows: list[dict[str, object]] = [
        {"video_id": "member", "uri": str(shard), "offset": 512, "length": 50, "label": "a", "label_id": 0},
    ]
    for index in range(40):
        data = bytes([index % 8]) * 50
        path = tmp_path / f"{index}.mp4"
        path.write_bytes(data)
        known = {"sha256": hashlib.sha256(data).hexdigest()} if index % 3 == 0 else {}
        rows.append({"video_id": f"v{index}", "uri": str(path), "label": "a", "label_id": 0, **known})
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    uri = str(tmp_path / "list.parquet")
    save_catalog(STORAGE, uri, Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), ("a",)))
    plan = plan_source(STORAGE, PackConfig(source=uri, out="o", val_fraction=0.25))
    split_of = {video.video_id: video.split for unit in plan.units for video in unit.files}
    sides = {(int(name[1:]) % 8, split) for name, split in split_of.items() if name != "member"}
    assert Counter(split for _, split in sides) == {"val": 2, "train": 6}
    assert (3, split_of["member"]) in sides


def test_shards_hold_one_split_are_of_like_size_and_mix_the_classes() -> None:
    plan = plan_of(*(f"{'ab'[i % 2]}/{i:04d}.mp4" for i in range(1000)), shard_bytes=100_000, val_fraction=0.3)
    names = [shard.name for shard in plan.units]
    assert len(set(names)) == len(names)
    assert 10 <= len(names) <= 11
    assert all(name.startswith(("shard-train-0000", "shard-val-0000")) for name in names)
    for shard in plan.units:
        assert len({video.split for video in shard.files}) == 1
        assert 80 <= len(shard.files) <= 101
        assert 25 <= Counter(video.label for video in shard.files)["a"] <= 75
    assert len(placed(plan)) == 1000


def test_huge_and_empty_files_get_a_shard_too() -> None:
    files = [SourceFile(f"a/{i}", f"/set/a/{i}", size) for i, size in enumerate([0, 10**9, 0, 5, 10**9, 0])]
    plan = make_plan("/set", files, shard_bytes=1000, val_fraction=0)
    assert sorted(placed(plan)) == [f"a/{i}" for i in range(6)]
    assert all(shard.files for shard in plan.units)
    assert len(make_plan("/set", files[:1], shard_bytes=1000, val_fraction=0).units) == 1


def test_the_plan_is_a_function_of_the_listing() -> None:
    names = [f"{'ab'[i % 2]}/{i}.mp4" for i in range(50)]
    assert plan_of(*names) == plan_of(*names)
    assert plan_of(*names).digest == plan_of(*names).digest
    others = [plan_of(*names, "a/new.mp4"), plan_of(*names, size_bytes=999), plan_of(*names, val_fraction=0.5)]
    assert len({plan_of(*names).digest, *(other.digest for other in others)}) == 4
    quarter = plan_of(*names, shard_bytes=10_000, val_fraction=0.25)
    assert quarter.digest == "b2c6b7915626c70e"  # as it was before a video could have several classes


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
    (folder / "set" / "mixed" / "video.!!").write_bytes(data)
    return folder / "set"


def only_shard(source: Path) -> Unit:
    plan = make_plan(str(source), find_files(STORAGE, str(source)), shard_bytes=10**9, val_fraction=0)
    (shard,) = plan.units
    return shard


def test_offsets_lead_to_the_original_bytes(videos: Path, tmp_path: Path) -> None:
    """Read back by range, by tarfile, and compared with the source files: three ways to the same sha256."""
    shard = only_shard(videos)
    commit = pack_unit(STORAGE, str(tmp_path), shard, PackSettings())
    (shard_tar,) = commit.tars
    assert shard_tar.uri == str(tmp_path / "shards" / "shard-train-00000.tar")
    assert shard_tar.size_bytes == os.path.getsize(shard_tar.uri)
    sources = {video.video_id: Path(video.uri) for video in shard.files}
    assert len(commit.rows) == 8
    with tarfile.open(commit.tars[0].uri) as tar:
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


def test_the_classes_of_a_video_that_has_several_are_in_its_row_and_beside_it(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    files = [
        replace(video, label=None, label_id=None, labels=("mixed", "odd"), label_ids=(0, 1))
        for video in shard.files
        if isinstance(video, PlannedVideo) and "odd_name" in video.video_id
    ]
    commit = pack_unit(STORAGE, str(tmp_path), replace(shard, files=tuple(files)), PackSettings())
    assert read_commit(STORAGE, str(tmp_path), shard.name) == commit
    assert [row["label_ids"] for row in commit.rows] == [(0, 1)] * len(files)
    with tarfile.open(commit.tars[0].uri) as tar:
        about = tar.extractfile(f"{files[0].video_id}.json")
        assert about is not None
        assert json.load(about)["labels"] == ["mixed", "odd"]


def test_webdataset_groups_the_members_by_key(videos: Path, tmp_path: Path) -> None:
    """WebDataset's rule: the key is the name up to the first dot behind the last slash; a sample's files follow."""
    commit = pack_unit(STORAGE, str(tmp_path), only_shard(videos), PackSettings())
    with tarfile.open(commit.tars[0].uri) as tar:
        names = tar.getnames()
    keys = [name.split("/")[-1].split(".", 1) for name in names]
    assert [key for key, _ in keys[::2]] == [key for key, _ in keys[1::2]] == [row["video_id"] for row in commit.rows]
    assert {extension for _, extension in keys[1::2]} == {"json"}
    assert Counter(extension for _, extension in keys[::2]) == {"mp4": 6, "video": 2}


def test_every_file_is_packed_or_refused(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    commit = pack_unit(STORAGE, str(tmp_path), shard, PackSettings())
    assert len(commit.rows) + len(commit.refused) == len(shard.files)
    assert {refusal.video_id: (refusal.error_class, refusal.stage) for refusal in commit.refused} == {
        "mixed__empty": ("EmptyMedia", "probe"),
        "mixed__random": ("UnreadableContainer", "probe"),
        "mixed__index_lost": ("UnreadableContainer", "probe"),
        "mixed__audio_only": ("NoVideoStream", "probe"),
    }
    assert all("\n" not in refusal.error_text and refusal.error_text for refusal in commit.refused)


def test_the_same_plan_gives_the_same_tar_and_the_first_commit_stands(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    commits = [pack_unit(STORAGE, str(tmp_path / name), shard, PackSettings()) for name in ("a", "b")]
    assert Path(commits[0].tars[0].uri).read_bytes() == Path(commits[1].tars[0].uri).read_bytes()
    assert read_commit(STORAGE, str(tmp_path / "a"), shard.name) == commits[0]
    stricter = PackSettings(DecodeConfig(max_duration_s=0.001))
    assert pack_unit(STORAGE, str(tmp_path / "a"), shard, stricter) == commits[0]


def test_budgets_and_missing_files_are_reasons(videos: Path, tmp_path: Path) -> None:
    shard = only_shard(videos)
    absent = PlannedVideo("absent", "absent.mp4", "/absent.mp4", 0, "mixed", 0, "train")
    shard = Unit(shard.name, (*shard.files, absent), is_one_shard=True)
    commit = pack_unit(STORAGE, str(tmp_path), shard, PackSettings(DecodeConfig(max_bytes=100)))
    assert (commit.rows, commit.tars) == ([], ())
    assert not (tmp_path / "shards" / "shard-train-00000.tar").exists()
    reasons = {refusal.video_id: (refusal.error_class, refusal.stage) for refusal in commit.refused}
    assert reasons["absent"] == ("ObjectNotFound", "read")
    assert reasons["mixed__empty"] == ("EmptyMedia", "probe")
    assert reasons["mixed__odd_name_0"] == ("MediaOverBudget", "list")
    assert len(reasons) == len(shard.files)


def test_a_commit_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"shards/shard-x\.json"):
        read_commit(STORAGE, str(tmp_path), "shard-x")
    for content in (b"not json", b"{}", b"[]", b'{"name": "x", "files": [{}]}'):
        STORAGE.put(str(tmp_path / "shards" / "shard-x.json"), content)
        with pytest.raises(CatalogError, match=r"shard-x\.json is not the commit of a unit"):
            read_commit(STORAGE, str(tmp_path), "shard-x")


def test_a_video_called_json_does_not_take_the_place_of_its_record() -> None:
    """Of a catalog's row: in a folder its name says that it is none."""
    with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT) as tar:
        write_tar(tar, PlannedVideo("key", "x.json", "/x.json", 1, "label", 0, "train"), b"v")
        assert tar.getnames() == ["key.video", "key.json"]


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
        QuarantineRow("a", "/a", Refusal("probe", "EmptyMedia", "no bytes")),
        QuarantineRow("b", "s3://b/t.tar", Refusal("read", "ChecksumMismatch", "wrong"), 512, 7),
        QuarantineRow("c", "/c", Refusal("probe", "EmptyMedia", "no bytes")),
    ]
    save_quarantine(STORAGE, str(tmp_path / "q.parquet"), refusals)
    assert load_quarantine(STORAGE, str(tmp_path / "q.parquet")) == refusals
    assert count_reasons(refusals) == {"EmptyMedia": 2, "ChecksumMismatch": 1}
    save_quarantine(STORAGE, str(tmp_path / "q.parquet"), [])
    assert load_quarantine(STORAGE, str(tmp_path / "q.parquet")) == []
    (tmp_path / "q.parquet").write_bytes(b"x")
    with pytest.raises(CatalogError, match="is not a quarantine table"):
        load_quarantine(STORAGE, str(tmp_path / "q.parquet"))
