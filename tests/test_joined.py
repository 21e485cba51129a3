"""`kinoray correct --add SET`: one catalog of a set and of what people said of other videos."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kinoray.catalog.table import Catalog, load_catalog, save_catalog
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    SampleConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.library.config import CorrectConfig
from kinoray.library.correct import correct
from kinoray.pack.config import PackConfig
from kinoray.pack.plan import FileVerdict
from kinoray.pack.unit import Commit, Packed, Tar
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from label_models import save_untrained
from small_sets import LABELS, catalog_of, colour_video, save_as_pack
from small_tables import job_record, label_library, ledger_in, planned, rows_for
from tiny_models import OWN_NETWORKS

Row = dict[str, Any]


def put(folder: Path, name: str, data: bytes) -> str:
    """A file; returns where it is."""
    uri = str(folder / f"{name}.mp4")
    Storage().put(uri, data)
    return uri


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def library_of(tmp_path: Path, contents: Mapping[str, bytes]) -> tuple[Ledger, dict[str, str]]:
    """Predictions of files with these contents by video_id, and their row keys."""
    rows: list[Row] = [
        {"video_id": name, "uri": put(tmp_path / "library", name, data)} for name, data in contents.items()
    ]
    catalog = catalog_of(rows)
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, catalog)
    return ledger, dict(zip(contents, row_keys(catalog.table), strict=True))


def corrections(tmp_path: Path, keys: Mapping[str, str], changes: Mapping[str, str]) -> tuple[str, ...]:
    """A file that says so."""
    path = tmp_path / "c.csv"
    path.write_text("\n".join(["row_key,label", *(f"{keys[name]},{label}" for name, label in changes.items())]))
    return (str(path),)


def in_set(tmp_path: Path, name: str, data: bytes, label: str | None, split: str, **more: Any) -> Row:
    """A row of the set, of a file of its own."""
    label_id = None if label is None else LABELS.index(label)
    row = {"video_id": name, "uri": put(tmp_path / "set", name, data), "label": label, "label_id": label_id}
    return {**row, "split": split, "size_bytes": len(data), "sha256": sha(data), "status": "packed", **more}


def joined(config: CorrectConfig) -> tuple[Catalog, list[Row], dict[str, Any]]:
    totals = correct(config)
    catalog = load_catalog(Storage(), join(config.out, "catalog.parquet"))
    return catalog, catalog.table.to_pylist(), totals


def test_a_set_keeps_its_rows_and_splits_and_gets_what_it_lacks_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network calls v0000 blue, v0001 green, v0002 red, and so on; v0004 cannot be read."""
    known = [
        in_set(tmp_path, "v0007", b"in train", "red", "train"),
        in_set(tmp_path, "b", b"in val", "blue", "val"),
        in_set(tmp_path, "c", b"in val, not packed", "green", "val", sha256=None, size_bytes=None),
        in_set(tmp_path, "d", b"no video", "red", "train"),
        in_set(tmp_path, "e", b"in test, without a class", None, "test"),
    ]
    save_as_pack(Storage(), str(tmp_path / "set"), catalog_of(known))
    contents = {
        "v0000": b"in val",
        "v0001": b"in val, not packed",
        "v0002": b"a new one",
        "v0003": b"a new one",
        "v0004": b"unreadable",
        "v0005": b"no video",
        "v0006": b"in train",
        "v0007": b"other by",  # as long as that in train
        "v0008": b"in test, without a class",
    }
    ledger, keys = library_of(tmp_path, contents)
    said = {"v0000": "red", "v0001": "green", "v0002": "pink", "v0005": "__bad__", "v0007": "red", "v0008": "green"}
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, said),
        accept_score=0.0,
        add=str(tmp_path / "set"),
        new_classes=("pink",),
        out=str(tmp_path / "second"),
    )
    catalog, rows, totals = joined(config)
    assert catalog.labels == (*LABELS, "pink")
    pink = len(LABELS)
    library = str(tmp_path / "library")
    new: Row = dict.fromkeys(known[0] | {"label_ids": None})
    assert [{name: row[name] for name in new} for row in rows] == [
        known[0] | {"label_ids": None},
        known[1] | {"label": "red", "label_id": LABELS.index("red"), "label_ids": None},
        known[2] | {"label_ids": None},
        known[4] | {"label": "green", "label_id": LABELS.index("green"), "label_ids": None},
        new | {"video_id": "v0002", "uri": f"{library}/v0002.mp4", "label": "pink", "label_id": pink, "split": "train"}
        | {"status": "listed", "sha256": sha(b"a new one"), "size_bytes": 9},
        new | {"video_id": rows[5]["video_id"], "uri": f"{library}/v0007.mp4", "label": "red", "label_id": 2}
        | {"status": "listed", "split": "train", "sha256": sha(b"other by"), "size_bytes": 8},
    ]  # fmt: skip
    assert rows[5]["video_id"].startswith("v0007_")
    assert rows[1]["reason"] == "corrected; the set said blue"
    assert rows[3]["reason"] == "corrected; the set said nothing"
    counts = {"added": 2, "in_set": 5, "relabelled": 2, "removed": 1, "copies": 1, "renamed": 1, "videos": 6}
    assert totals.items() >= counts.items()
    assert totals["splits"] == {"test": 1, "train": 3, "val": 2}
    assert json.loads((tmp_path / "second" / "corrections.json").read_text()).items() >= counts.items()
    text = capsys.readouterr().out
    assert "6 videos (1 test, 3 train, 2 val) = 4 of" in text
    assert (
        "5 of those found are in the set already: 2 got another label there, 1 were taken out as bad; 1 others" in text
    )

    with pytest.raises(ConfigError, match=r"out .*second is the set that is added to, which would be lost"):
        correct(replace(config, add=str(tmp_path / "second" / "catalog.parquet")))
    again, _, totals = joined(
        replace(config, add=str(tmp_path / "second" / "catalog.parquet"), out=str(tmp_path / "3"))
    )
    assert (totals["added"], totals["relabelled"], totals["in_set"]) == (0, 0, 7)
    assert len(again) == 6


def test_a_share_of_what_joins_validates_and_what_is_in_the_set_stays_where_it_is(tmp_path: Path) -> None:
    known = [in_set(tmp_path, f"s{index}", b"set" + bytes([index]), "red", "train") for index in range(4)]
    save_as_pack(Storage(), str(tmp_path / "set"), catalog_of(known))
    ledger, keys = library_of(tmp_path, {f"v{index:04d}": b"library" + bytes([index]) for index in range(4)})
    changes = dict.fromkeys(keys, "red")
    changes.pop(next(iter(changes)))
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, changes),
        add=str(tmp_path / "set"),
        val_fraction=0.4,
        out=str(tmp_path / "second"),
    )
    _, rows, totals = joined(config)
    assert [row["split"] for row in rows[:4]] == ["train"] * 4
    assert sorted(row["split"] for row in rows[4:]) == ["train", "train", "val"]
    assert totals["added"] == 3


def test_predictions_of_the_set_itself_correct_it_and_nothing_is_read(tmp_path: Path) -> None:
    """A video at the same place is the same: none of these is there."""
    known: list[Row] = [
        {"video_id": f"v{index:04d}", "uri": "s3://nowhere/shards/a.tar", "offset": 512 * index, "length": 100}
        | {"label": "red", "label_id": 2, "split": "val", "sha256": f"{index:064d}" if index else None}
        for index in range(4)
    ]
    save_catalog(Storage(), str(tmp_path / "set.parquet"), catalog_of(known))
    ledger = ledger_in(Storage(), tmp_path / "out")
    label_library(ledger, catalog_of(known))
    keys = dict(zip("0123", row_keys(catalog_of(known).table), strict=True))
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, {"0": "blue", "1": "__bad__", "2": "red"}),
        add=str(tmp_path / "set.parquet"),
        out=str(tmp_path / "second"),
    )
    _, rows, totals = joined(config)
    assert [(row["video_id"], row["label"], row["split"], row["sha256"]) for row in rows] == [
        ("v0000", "blue", "val", None),
        ("v0002", "red", "val", f"{2:064d}"),
        ("v0003", "red", "val", f"{3:064d}"),
    ]
    assert (totals["in_set"], totals["added"], totals["relabelled"], totals["removed"]) == (3, 0, 1, 1)


def test_the_videos_of_a_transcoded_pack_are_known_by_the_bytes_before(tmp_path: Path) -> None:
    storage, pack, before, after = Storage(), str(tmp_path / "set"), b"the original", b"transcoded to more bytes"
    tar = Tar(join(pack, "shards", "shard-val-00000.tar"), len(after))
    none: Row = dict.fromkeys(("time_start_s", "time_end_s", "reason", "label_ids"))
    numbers: Row = {"duration_s": 1.0, "fps": 8.0, "num_frames": 8, "width": 32, "height": 32, "codec": "h264"}
    packed = Packed(position=0, tar=0, offset=0, length=len(after), sha256=sha(after), source_sha256=sha(before),
                    video_id="x", label="red", label_id=2, split="val", **none, **numbers)  # fmt: skip
    verdict = FileVerdict("x.mp4", None, "x", "packed")
    commit = Commit("shard-val-00000", 1, "", (tar,), (packed,), (verdict,))
    storage.put(tar.uri, after)
    catalog = catalog_of(commit.rows)
    save_as_pack(storage, pack, catalog)
    ledger, keys = library_of(tmp_path, {"v0000": before, "v0001": b"another"})
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, {"v0000": "blue", "v0001": "blue"}),
        add=pack,
        out=str(tmp_path / "second"),
    )
    assert joined(config)[2]["added"] == 2  # nothing says that it was transcoded
    storage.put(join(pack, "shards", "shard-val-00000.json"), json.dumps(asdict(commit)).encode())
    record = {"catalog_digest": catalog.digest, "transcode": {"digest": "d"}}
    storage.put(join(pack, "pack.json"), json.dumps(record).encode())
    _, rows, totals = joined(config)
    assert [(row["video_id"], row["label"], row["split"]) for row in rows] == [
        ("x", "blue", "val"),
        ("v0001", "blue", "train"),
    ]
    assert (totals["added"], totals["relabelled"]) == (1, 1)


def test_label_lists_join_and_stay_lists(tmp_path: Path) -> None:
    storage = Storage()
    known = [
        in_set(tmp_path, "a", b"1", None, "train", label_ids=[0, 2]),
        in_set(tmp_path, "b", b"22", None, "val", label_ids=[]),
        in_set(tmp_path, "c", b"333", None, "test"),
    ]
    save_as_pack(storage, str(tmp_path / "set"), catalog_of(known))
    library = catalog_of(
        [
            {"video_id": f"v{i:04d}", "uri": put(tmp_path / "library", f"v{i}", data)}
            for i, data in enumerate((b"22", b"n"))
        ]
    )
    ledger = Ledger(storage, join(str(tmp_path / "out"), "several"))
    ledger.pin_job(job_record(scores="sigmoid"))
    keys = row_keys(library.table)
    plan = planned(ledger, library.digest, keys, 8)
    ledger.commit(plan.units[0], rows_for(library, plan.units[0].keys), "run")
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, {"b": keys[0], "n": keys[1]}, {"b": "red|green", "n": "pink|blue"}),
        new_classes=("pink",),
        add=str(tmp_path / "set"),
        out=str(tmp_path / "second"),
    )
    catalog, rows, _ = joined(config)
    assert catalog.labels == (*LABELS, "pink")
    assert [(row["video_id"], row["label_ids"], row["label"], row["split"]) for row in rows] == [
        ("a", [0, 2], None, "train"),
        ("b", [1, 2], None, "val"),
        ("c", None, None, "test"),
        ("v0001", [0, 3], None, "train"),
    ]
    save_as_pack(storage, str(tmp_path / "one"), catalog_of([in_set(tmp_path, "a", b"1", "red", "train")]))
    with pytest.raises(
        CatalogError, match=r"add: .*one/catalog.parquet has one class a video, the predictions label lists"
    ):
        correct(replace(config, add=str(tmp_path / "one" / "catalog.parquet")))


def test_videos_that_cannot_be_compared_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [in_set(tmp_path, f"s{number}", b"in val", "red", "val", sha256=None) for number in range(2)]
    known[1]["size_bytes"] = None
    save_catalog(Storage(), str(tmp_path / "set.parquet"), catalog_of(known))
    for row in known:
        Path(row["uri"]).unlink()
    ledger, keys = library_of(tmp_path, {"v0000": b"in val"})
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, {"v0000": "red"}),
        add=str(tmp_path / "set.parquet"),
        out=str(tmp_path / "second"),
    )
    assert joined(config)[2]["unread"] == 2
    assert "2 videos of it or of those found could not be read, so copies of them are not" in capsys.readouterr().err


def test_two_sources_in_one_table_that_call_videos_alike_become_one_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    for name in ("one", "other"):
        rows: list[Row] = [{"video_id": "v0000", "uri": put(tmp_path / name, "v0000", name.encode())}]
        label_library(ledger, catalog_of(rows), source=name)
    config = CorrectConfig(predictions=ledger.root, accept_score=0.0, out=str(tmp_path / "second"))
    _, rows, totals = joined(config)
    assert (totals["renamed"], totals["videos"]) == (1, 2)
    assert {row["uri"] for row in rows} == {str(tmp_path / name / "v0000.mp4") for name in ("one", "other")}
    assert "correct: 1 video had the video_id of another one" in capsys.readouterr().out


def test_two_lines_that_disagree_on_copies_of_a_video_end_it(tmp_path: Path) -> None:
    save_as_pack(Storage(), str(tmp_path / "set"), catalog_of([in_set(tmp_path, "a", b"1", "red", "train")]))
    ledger, keys = library_of(tmp_path, {"v0000": b"same", "v0001": b"same"})
    config = CorrectConfig(
        predictions=ledger.root,
        corrections=corrections(tmp_path, keys, {"v0000": "red", "v0001": "__bad__"}),
        add=str(tmp_path / "set"),
        out=str(tmp_path / "second"),
    )
    message = (
        r"c.csv line 3, column label: v0001 is '__bad__' here, and v0000, which has the same bytes, is 'red' in .*2"
    )
    with pytest.raises(CatalogError, match=message):
        correct(config)
    assert not (tmp_path / "second").exists()


CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))


@pytest.mark.slow
def test_pack_label_correct_and_train_on_both(ray_local: None, tmp_path: Path) -> None:
    """A library with two copies of a packed set, one of which validates, and six videos of its own."""
    from kinoray.label.verb import label
    from kinoray.pack.verb import pack
    from kinoray.train.verb import train

    storage, resources = Storage(), ResourcesConfig(num_workers=1, decoders_per_worker=1)
    videos = {f"{name}{seed}": colour_video(name, seed) for seed in range(4) for name in LABELS}
    for name, data in videos.items():
        put(tmp_path / "videos" / name[:-1], name, data)
    source, first = str(tmp_path / "videos"), str(tmp_path / "set")
    pack(PackConfig(source=source, out=first, val_fraction=0.25, transcode=True, resources=resources))
    before = load_catalog(storage, first).table.to_pylist()
    validating, trained = (next(row for row in before if row["split"] == split) for split in ("val", "train"))
    for number in range(6):
        put(tmp_path / "library", f"new{number}", colour_video(LABELS[number % 3], 100 + number))
    for name, row in (("copy0", validating), ("copy1", trained)):
        put(tmp_path / "library", name, videos[row["video_id"].rpartition("__")[2]])
    checkpoint = save_untrained(storage, str(tmp_path / "run"), LABELS, CLIP, "tiny_models:mean_colour")
    root = label(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=str(tmp_path / "library"),
            checkpoint=checkpoint,
            out=str(tmp_path / "out"),
            resources=resources,
        )
    )["root"]
    columns = read_predictions(storage, root, columns=["video_id", "row_key"]).to_pydict()
    keys = dict(zip(columns["video_id"], columns["row_key"], strict=True))
    said = {f"new{number}": LABELS[number % 3] for number in range(6)} | {"copy0": "red", "copy1": "__bad__"}
    config = CorrectConfig(
        predictions=root, corrections=corrections(tmp_path, keys, said), add=first, out=str(tmp_path / "second")
    )
    _, rows, totals = joined(config)
    assert (totals["added"], totals["in_set"], totals["removed"]) == (6, 2, 1)
    assert totals["splits"] == {"train": 9 - 1 + 6, "val": 3}
    kept = [row for row in before if row["video_id"] != trained["video_id"]]
    assert [row["video_id"] for row in rows[: len(kept)]] == [row["video_id"] for row in kept]
    (found,) = [row for row in rows if row["video_id"] == validating["video_id"]]
    assert (found["split"], found["label"], found["uri"]) == ("val", "red", validating["uri"])
    done = train(
        TrainConfig(
            catalog=join(config.out, "catalog.parquet"),
            out=str(tmp_path / "trained"),
            init_from=checkpoint,
            model=ModelConfig(factory="tiny_models:mean_colour"),
            clip=CLIP,
            optim=OptimConfig(epochs=1, batch_size=7, lr=0.05),
            resources=TrainResourcesConfig(num_workers=1, decode_tasks=1),
        )
    )
    assert (done["samples"], done["quarantined"]) == (9 - 1 + 6, 0)
