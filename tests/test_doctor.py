"""kinoray doctor: it counts what was made, wherever that lies; its estimate follows from what it measured."""

import functools
import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kinoray import errors
from kinoray.catalog.folders import unique_ids
from kinoray.catalog.source import find_files
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, Reference, catalog_of_source
from kinoray.cli import main
from kinoray.config.shared import ClipConfig, DecodeConfig, FlowConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.console import many
from kinoray.demo.videos import make_broken, make_video
from kinoray.doctor.config import DoctorConfig
from kinoray.doctor.decode import cost_class, estimate_total, spread_over_classes
from kinoray.doctor.probe import Video, probe_all
from kinoray.doctor.source import choose_sample, open_source, source_section
from kinoray.doctor.verb import doctor
from kinoray.doctor.videos import _REMEDIES
from kinoray.errors import AccessDenied, CatalogError, ObjectNotFound, StorageUnavailable, TooManyBad
from kinoray.pack.plan import make_plan
from kinoray.pack.unit import PackSettings, pack_unit
from kinoray.storage.objects import Storage, format_bytes, join
from kinoray.video.info import VideoInfo
from small_sets import save_as_pack

LOCAL = Storage()
CLIP = ClipConfig(
    sample=SampleConfig(num_segments=4, frames_per_segment=2),
    view=ViewConfig(resize_px=36, crop_px=32),
    flow=FlowConfig(estimator="none"),
)
BROKEN = {"empty": "EmptyMedia", "random": "UnreadableContainer", "audio_only": "NoVideoStream"}


def moving(num_frames: int, width: int, height: int, seed: int) -> np.ndarray:
    """Frames of coarse noise that moves sideways."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(picture, 2 * number, axis=1) for number in range(num_frames)])


@functools.cache
def small(seed: int) -> bytes:
    """H.264 in MP4, 64 x 48, 24 frames at 12 a second, a key frame every 6."""
    return make_video(moving(24, 64, 48, seed), fps=12, gop=6)


@functools.cache
def large(seed: int) -> bytes:
    """MPEG-4 in Matroska, 400 x 304, 60 frames at 30 a second, one key frame."""
    return make_video(moving(60, 400, 304, seed), fps=30, codec="mpeg4", container="matroska", gop=600)


def write_set(storage: Storage, uri: str) -> dict[str, bytes]:
    """Name -> bytes: 8 small and 4 large videos, 1 rotated, 1 copy, 3 broken, and 2 files that are none."""
    files = {f"bus/s{seed}.mp4": small(seed) for seed in range(8)}
    files |= {f"car/l{seed}.MKV": large(seed) for seed in range(4)}
    files["car/turned.mp4"] = make_video(moving(24, 64, 48, 9), fps=12, gop=6, rotation=90)
    files["car/copy.mp4"] = small(0)
    files |= {f"bus/{kind}.mp4": make_broken(kind, small(0)) for kind in BROKEN}
    files |= {"README.txt": b"read me", "old/videos.tar": b"x" * 100}
    for name, data in files.items():
        storage.put(join(uri, name), data)
    return files


def config_of(source: Path | str, **changes: Any) -> DoctorConfig:
    return replace(DoctorConfig(source=str(source), clip=CLIP, decode_sample=4), **changes)


def check_set(record: dict[str, Any], files: dict[str, bytes]) -> None:
    """What write_set wrote, as numbers."""
    videos = {name: data for name, data in files.items() if not name.endswith((".txt", ".tar"))}
    source, probe = record["source"], record["probe"]
    assert (source["num_videos"], source["video_bytes"]) == (17, sum(map(len, videos.values())))
    assert (source["by_extension"], source["num_empty"]) == ({".mp4": 13, ".mkv": 4}, 1)
    assert (source["num_ignored"], source["ignored_bytes"]) == (2, 107)
    assert source["ignored_by_extension"] == {".txt": 1, ".tar": 1}
    assert (probe["num_probed"], probe["num_good"], probe["is_whole"]) == (17, 14, True)
    assert probe["bytes_read"] == source["video_bytes"]
    assert probe["codecs"] == {"h264": 10, "mpeg4": 4}
    assert probe["containers"] == {"mov/mp4": 10, "matroska/webm": 4}
    assert probe["sizes"] == {"<= 256": 10, "<= 360": 4}
    assert probe["frame_rates"] == {"12": 10, "30": 4}
    assert probe["duration_s"] == pytest.approx(
        {"count": 14, "min": 2, "median": 2, "mean": 2, "p95": 2, "max": 2, "sum": 28}
    )
    assert probe["num_frames"]["sum"] == 10 * 24 + 4 * 60
    assert (probe["keyframe_distance"]["min"], probe["keyframe_distance"]["max"]) == (6, 60)
    assert (probe["num_rotated"], probe["num_miscounted"]) == (1, 0)
    assert (probe["num_large"], probe["num_long_gop"]) == (4, 4)
    assert probe["hours_estimated"] == pytest.approx(28 / 3600)
    assert [sorted(re.sub(r".*/|\..*", "", name) for name in ids) for ids in probe["copies"]] == [["copy", "s0"]]
    assert record["bad"]["reasons"] == dict(Counter(BROKEN.values()))
    assert record["bad"]["fraction"] == 3 / 17


def test_a_folder_is_counted_as_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_set(LOCAL, str(tmp_path / "set"))
    record = doctor(config_of(tmp_path / "set", out=str(tmp_path / "out")))
    check_set(record, files)
    labels = record["source"]["labels"]
    assert labels["classes"] == {"bus": 11, "car": 6}
    assert (labels["num_unlabelled"], labels["few"]) == (0, ["car"])
    assert json.loads((tmp_path / "out" / "doctor.json").read_text()) == json.loads(json.dumps(record))
    bad = pq.read_table(tmp_path / "out" / "bad.parquet").to_pylist()
    assert {(row["video_id"], row["uri"], row["error_class"], row["stage"]) for row in bad} == {
        (f"bus__{kind}", str(tmp_path / "set" / "bus" / f"{kind}.mp4"), error, "probe")
        for kind, error in BROKEN.items()
    }
    assert all(row["error_text"] for row in bad)
    said = capsys.readouterr().out
    for words in (
        "17 videos",
        "2 files are no videos (.txt 1, .tar 1), left out: 107 B, such as README.txt, old/videos.tar",
        "3 of 17 (17.6%)",
        "of 14 probed videos 4 with more than 48 frames per key frame",
        "of 14 probed videos 4 with a short side over 256",
        "of 14 probed videos 1 rotated",
        "1 video with 0 bytes",
        f"same bytes, such as {tmp_path}/set/bus/s0.mp4 and {tmp_path}/set/car/copy.mp4",
        "ignored: 1 archive, such as old/videos.tar",
        f"{record['probe']['bytes_read'] + record['decode']['bytes_read']:,} bytes of videos were read",
    ):
        assert words in said
    assert re.search("h264 in mov/mp4 +10 +71% +64 x 48 +12 +2.0 +6\n", said)
    assert re.search("mpeg4 in matroska/webm +4 +29% +400 x 304 +30 +2.0 +60\n", said)


def test_a_prefix_in_s3_gives_what_a_folder_gives(
    tmp_path: Path, bucket: str, s3_server: str, s3_config: StorageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(s3_config)
    files = write_set(storage, f"{bucket}/set")
    sizes = ["--clip.view.resize-px", "36", "--clip.view.crop-px", "32"]
    command = ["doctor", f"{bucket}/set/", "--out", f"{bucket}/out", "--storage.endpoint-url", s3_server, *sizes]
    assert main([*command, "--storage.addressing", "path"]) == 0
    assert f"wrote {bucket}/out/doctor.json" in capsys.readouterr().out
    check_set(json.loads(storage.read(f"{bucket}/out/doctor.json")), files)
    bad = pq.read_table(io.BytesIO(storage.read(f"{bucket}/out/bad.parquet"))).to_pylist()
    assert {row["uri"] for row in bad} == {f"{bucket}/set/bus/{kind}.mp4" for kind in BROKEN}


def test_an_empty_label_list_is_no_missing_label(tmp_path: Path) -> None:
    """A test row without labels is not missed either; one of train is."""
    for index in range(6):
        (tmp_path / f"{index}.mp4").write_bytes(bytes([index]))
    rows = ["path,labels,split", "0.mp4,red|round,train", "1.mp4,|,train", "2.mp4,red,val", "3.mp4,,test"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    labels = source_section(open_source(LOCAL, str(tmp_path / "list.csv")), DecodeConfig()).values["labels"]
    assert (labels["classes"], labels["num_unlabelled"]) == ({"red": 1, "round": 1}, 0)
    (tmp_path / "list.csv").write_text("\n".join([*rows, "4.mp4,,train"]))
    labels = source_section(open_source(LOCAL, str(tmp_path / "list.csv")), DecodeConfig()).values["labels"]
    assert labels["num_unlabelled"] == 1


def test_a_csv_shows_missing_files_and_classes_that_cannot_be_learnt(tmp_path: Path) -> None:
    write_set(LOCAL, str(tmp_path))
    rows = ["path,label,split"]
    rows += [f"bus/s{seed}.mp4,bus,{'train' if seed < 6 else 'val'}" for seed in range(8)]
    rows += ["car/l0.MKV,car,train", "car/l1.MKV,van,val", "car/l2.MKV,,train", "gone.mp4,bus,train"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    record = doctor(config_of(tmp_path / "list.csv"))
    source = record["source"]
    assert (source["kind"], source["num_videos"], source["num_empty"], source["num_ignored"]) == ("csv", 12, 1, 0)
    labels = source["labels"]
    assert labels["classes"] == {"bus": 7, "car": 1, "van": 0}
    assert (labels["not_in_train"], labels["not_in_val"], labels["num_unlabelled"]) == (["van"], ["car"], 1)
    assert labels["few"] == ["bus", "car"]
    assert labels["splits"]["train"] == {"num_videos": 9, "num_classes": 2, "fewest": ("car", 1), "most": ("bus", 7)}
    assert record["bad"]["reasons"] == {"ObjectNotFound": 1}
    found = " ".join(warning["found"] for warning in record["warnings"])
    assert "1 class without a video in train: van" in found
    assert "1 class without a video in val: car" in found
    assert "1 video without a label" in found


def test_members_of_shards_are_read_and_copies_across_splits_are_named(tmp_path: Path) -> None:
    for split, seeds in (("train", range(6)), ("val", range(4, 8))):
        for seed in seeds:
            LOCAL.put(str(tmp_path / "set" / split / "bus" / f"{split}{seed}.mp4"), small(seed))
    source, out = str(tmp_path / "set"), str(tmp_path / "packed")
    plan = make_plan(source, find_files(LOCAL, source), shard_bytes=2**20, val_fraction=0.0)
    rows = [row for unit in plan.units for row in pack_unit(LOCAL, out, unit, PackSettings()).rows]
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    save_as_pack(LOCAL, out, Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), plan.labels))

    record = doctor(config_of(out))
    source_numbers, probe = record["source"], record["probe"]
    assert (source_numbers["kind"], source_numbers["num_videos"], source_numbers["num_objects"]) == ("catalog", 10, 2)
    assert (
        source_numbers["video_bytes"]
        == probe["bytes_read"]
        == sum(len(small(seed)) for seed in [*range(6), 4, 5, 6, 7])
    )
    assert source_numbers["by_extension"] == {".tar": 10}
    duplicates = source_numbers["duplicates"]
    assert (duplicates["num_groups"], duplicates["num_extra"], duplicates["num_across_splits"]) == (2, 2, 2)
    assert any("2 videos in more than one split" in warning["found"] for warning in record["warnings"])
    assert (probe["num_good"], probe["codecs"]) == (10, {"h264": 10})
    assert doctor(config_of(join(out, "catalog.parquet")))["source"]["num_videos"] == 10

    shard = next((tmp_path / "packed" / "shards").glob("*train*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[rows[0]["offset"] + 100] ^= 1
    shard.write_bytes(damaged)
    assert doctor(config_of(out))["bad"]["reasons"] == {"ChecksumMismatch": 1}


# The sample


def test_the_sample_is_a_matter_of_the_names_alone(tmp_path: Path) -> None:
    write_set(LOCAL, str(tmp_path))
    catalog = catalog_of_source(LOCAL, str(tmp_path))
    ids = catalog.table.column("video_id").to_pylist()
    expected = sorted(sorted(range(len(ids)), key=lambda place: hashlib.sha256(ids[place].encode()).digest())[:5])
    assert choose_sample(catalog, 5) == expected
    assert choose_sample(catalog, 0) == choose_sample(catalog, 99) == list(range(17))
    chosen = {ids[place] for place in expected}
    LOCAL.put(str(tmp_path / "new" / "other.mp4"), small(1))
    grown = catalog_of_source(LOCAL, str(tmp_path))
    again = {grown.table.column("video_id")[place].as_py() for place in choose_sample(grown, 5)}
    assert len(again & chosen) >= 4
    assert again <= chosen | {"new__other"}


def test_a_sample_reads_no_more_than_itself_and_speaks_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"v/{number:03d}.mp4": small(number % 8) + bytes(number) for number in range(60)}
    for name, data in files.items():
        LOCAL.put(str(tmp_path / name), data)
    record = doctor(config_of(tmp_path, sample=12, decode_sample=2))
    ids = unique_ids(sorted(files))
    by_hash = sorted(zip(ids, sorted(files), strict=True), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    assert record["probe"]["bytes_read"] == sum(len(files[name]) for _, name in by_hash[:12])
    assert (record["probe"]["num_probed"], record["probe"]["is_whole"]) == (12, False)
    assert record["probe"]["hours_estimated"] == pytest.approx(60 * 2 / 3600)
    said = capsys.readouterr().out
    assert "12 of 60 videos read and probed" in said
    assert "about 0.0 h in all 60 videos" in said


def test_bad_videos_are_named_by_their_paths_and_a_pipe_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cut.mp4", "cut.mkv"):
        LOCAL.put(str(tmp_path / "set" / name), small(0)[:200])
    os.mkfifo(tmp_path / "set" / "pipe.mp4")
    assert main(["doctor", str(tmp_path / "set"), "--decode-sample", "0"]) == 1
    said, error = capsys.readouterr()
    for name in ("cut.mp4", "cut.mkv"):
        assert f"{tmp_path}/set/{name}: NoVideoStream: no video stream" in said
    assert f"1 name of what is no file (a pipe, a socket, a device, a folder), such as {tmp_path}/set/pipe.mp4" in said
    assert "correct the list, or upload them" not in said
    assert error.startswith("kinoray doctor: TooManyBad: 3 of 3 probed videos of ")
    assert error.count("cut.mkv") == 1


def test_what_is_over_the_byte_limit_is_refused_unread(tmp_path: Path) -> None:
    LOCAL.put(str(tmp_path / "a.mp4"), small(0))
    LOCAL.put(str(tmp_path / "b.mp4"), small(1) + bytes(100_000))
    decode = DecodeConfig(max_bytes=50_000)
    record = doctor(config_of(tmp_path, clip=replace(CLIP, decode=decode), max_bad_fraction=0.5))
    assert record["source"]["num_over_max_bytes"] == 1
    assert record["probe"]["bytes_read"] == len(small(0))
    flags = "--decode.max-bytes; in train, tune and doctor --clip.decode.max-bytes"
    size = len(small(1)) + 100_000
    reason = f"{size:,} bytes are more than decode.max_bytes = 50,000 ({flags}); it was not read"
    assert record["bad"]["examples"] == [f"{tmp_path}/b.mp4: MediaOverBudget: {reason}"]
    assert {
        "found": "1 bad video of class MediaOverBudget",
        "remedy": "cut them, or raise the limit that it names",
    } in record["warnings"]


# The cost


def test_the_estimate_is_the_weighted_sum_of_what_was_measured(tmp_path: Path) -> None:
    """12 cheap videos and 3 dear ones, of which 4 are decoded: two of each, so that the plain mean would be wrong."""
    for number in range(12):
        LOCAL.put(str(tmp_path / f"small{number:02d}.mp4"), small(number % 8) + bytes(number))
    for number in range(3):
        LOCAL.put(str(tmp_path / f"large{number}.mkv"), large(number))
    LOCAL.put(str(tmp_path / "broken.mp4"), b"broken")
    decode = doctor(config_of(tmp_path, decode_sample=4, clip=replace(CLIP, flow=FlowConfig())))["decode"]
    videos = decode["videos"]
    assert Counter(row["class"] for row in videos) == {"h264 <= 256": 2, "mpeg4 <= 360": 2}
    for key, name in (("rgb_cpu_s", "rgb"), ("rgb_and_flow_cpu_s", "rgb_and_flow")):
        cheap = [row[key] for row in videos if row["class"] == "h264 <= 256"]
        dear = [row[key] for row in videos if row["class"] == "mpeg4 <= 360"]
        assert min(cheap + dear) > 0
        total = decode["library_cpu_s"][name]
        assert total["total"] == pytest.approx(12 * sum(cheap) / 2 + 3 * sum(dear) / 2)
        assert total["low"] <= total["total"] <= total["high"]
        assert 12 * min(cheap) + 3 * min(dear) <= total["low"] * (1 + 1e-9)
        assert total["high"] <= (12 * max(cheap) + 3 * max(dear)) * (1 + 1e-9)
        assert decode["classes"]["h264 <= 256"][key]["mean"] == pytest.approx(sum(cheap) / 2)
    assert decode["library_cpu_s"]["rgb"]["guessed"] == []
    frames = {row["class"]: row["frames_decoded"] for row in videos}
    assert frames["mpeg4 <= 360"] > frames["h264 <= 256"]


def test_transcoding_is_measured_where_it_can_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 90, 120, 3), np.uint8)
    frames = noise.repeat(8, axis=1).repeat(8, axis=2)
    LOCAL.put(str(tmp_path / "big.mkv"), make_video(frames, fps=30, container="matroska", gop=600))
    LOCAL.put(str(tmp_path / "small.mp4"), small(0))
    decode = doctor(config_of(tmp_path))["decode"]
    made = decode["transcode"]
    assert made["num_transcoded"] == 1
    assert made["bytes_before"] == (tmp_path / "big.mkv").stat().st_size
    assert made["decode_before_cpu_s"] > 1.5 * made["decode_after_cpu_s"] > 0
    assert made["cpu_s"] > made["decode_before_cpu_s"]
    assert "times cheaper to decode:\n    `kinoray pack --transcode` pays after" in capsys.readouterr().out


def test_a_video_that_is_probed_but_not_decoded_is_bad(tmp_path: Path) -> None:
    """The last of eight frames needs more packets than the limit; the first one, which the probe takes, does not."""
    LOCAL.put(str(tmp_path / "long.mkv"), large(0))
    LOCAL.put(str(tmp_path / "short.mp4"), small(0))
    clip = replace(CLIP, decode=DecodeConfig(max_frames=40))
    record = doctor(config_of(tmp_path, clip=clip, max_bad_fraction=0.5, out=str(tmp_path / "out")))
    assert record["probe"]["num_good"] == 2
    assert record["bad"]["reasons"] == {"MediaOverBudget": 1}
    (row,) = pq.read_table(tmp_path / "out" / "bad.parquet").to_pylist()
    assert (row["video_id"], row["stage"]) == ("long", "decode")
    assert record["decode"]["library_cpu_s"]["rgb"]["guessed"] == ["mpeg4 <= 360"]


def test_the_estimate_by_hand() -> None:
    """100 videos; probed: 6 of class a, 3 of b, 1 bad. a takes 2 s and 4 s, b takes 10 s."""
    found = estimate_total(100, {"a": 6, "b": 3}, 1, {"a": [2.0, 4.0], "b": [10.0]})
    assert found is not None
    assert found.total_s == pytest.approx(100 * (0.6 * 3 + 0.3 * 10))
    assert found.low_s is not None
    assert found.high_s is not None
    assert found.low_s < found.total_s < found.high_s
    guessed = estimate_total(9, {"a": 6, "b": 3}, 0, {"a": [2.0, 4.0]})
    assert guessed is not None
    assert (guessed.total_s, guessed.guessed) == (pytest.approx(27.0), ("b",))
    exact = estimate_total(2, {"a": 1, "b": 1}, 0, {"a": [2.0], "b": [5.0]})
    assert exact is not None
    assert (exact.total_s, exact.low_s, exact.high_s) == (7.0, None, None)
    assert estimate_total(5, {"a": 5}, 0, {}) is None
    assert estimate_total(5, {}, 5, {}) is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """A library of 5,000 with three classes and skewed costs, of which 300 are probed and 60 decoded, 100 times."""
    rng = np.random.default_rng(0)
    names = rng.choice(["a", "b", "c"], 5000, p=[0.6, 0.3, 0.1])
    costs = rng.lognormal(0.0, 0.5, 5000) * np.select([names == "a", names == "b"], [1.0, 3.0], 12.0)
    held = 0
    for seed in range(100):
        sample = rng.choice(5000, 300, replace=False)
        decoded = sample[spread_over_classes(names[sample].tolist(), 60)]
        times = {name: costs[decoded[names[decoded] == name]].tolist() for name in "abc"}
        found = estimate_total(5000, Counter(names[sample].tolist()), 0, times, seed=seed)
        assert found is not None
        assert found.low_s is not None
        assert found.high_s is not None
        held += found.low_s <= costs.sum() <= found.high_s
    assert held >= 85


@pytest.mark.parametrize(
    ("classes", "count", "expected"),
    [
        pytest.param("aaaaaabb", 4, [0, 1, 6, 7], id="two of each"),
        pytest.param("aaaaaabb", 6, [0, 1, 2, 3, 6, 7], id="then by share"),
        pytest.param("abcabc", 2, [0, 1], id="too few for all classes"),
        pytest.param("aab", 9, [0, 1, 2], id="all"),
        pytest.param("", 3, [], id="none"),
    ],
)
def test_decoded_videos_are_spread_over_the_classes(classes: str, count: int, expected: list[int]) -> None:
    assert spread_over_classes(list(classes), count) == expected


def test_classes_go_by_codec_and_short_side() -> None:
    info = VideoInfo(duration_s=1, fps=1, num_frames=1, width=1280, height=720, codec="vp9", rotation=0)
    assert cost_class(info) == "vp9 <= 720"
    assert cost_class(replace(info, width=256, height=9999)) == "vp9 <= 256"
    assert cost_class(replace(info, width=4096, height=2161)) == "vp9 > 2160"


# What ends it


def test_too_many_bad_videos_are_exit_code_one_with_everything_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(LOCAL, str(tmp_path / "set"))
    out = tmp_path / "out"
    with pytest.raises(TooManyBad, match=r"3 of 17 probed videos of .* are bad \(1 .*more than max_bad_fraction 0\.1;"):
        doctor(config_of(tmp_path / "set", max_bad_fraction=0.1, out=str(out), decode_sample=0))
    assert json.loads((out / "doctor.json").read_text())["bad"]["num_bad"] == 3
    assert pq.read_table(out / "bad.parquet").num_rows == 3
    capsys.readouterr()
    arguments = ["doctor", str(tmp_path / "set"), "--decode-sample", "0"]
    assert main([*arguments, "--max-bad-fraction", "0.1"]) == 1
    assert capsys.readouterr().err.startswith("kinoray doctor: TooManyBad: ")
    assert main(arguments) == 0


def test_a_set_of_broken_videos_only_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LOCAL.put(str(tmp_path / "a.mp4"), b"a")
    record = doctor(config_of(tmp_path, max_bad_fraction=1.0))
    assert record["decode"]["library_cpu_s"] == {"rgb": None, "rgb_and_flow": None}
    assert "no video was decoded" in capsys.readouterr().out


def test_a_source_without_videos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="no such folder"):
        doctor(config_of(tmp_path / "nowhere"))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(CatalogError, match="found 1 file, and it is no video"):
        doctor(config_of(tmp_path))


class Faulty(Storage):
    """A store in which what has a marked name cannot be read."""

    def read(self, uri: str, *, max_bytes: int = 2**40) -> bytes:
        if "denied" in uri:
            raise AccessDenied(f"{uri}: forbidden")
        if "down" in uri:
            raise StorageUnavailable(f"{uri}: still failing")
        return super().read(uri, max_bytes=max_bytes)


def test_a_store_that_fails_is_not_blamed_on_the_videos(tmp_path: Path) -> None:
    for name in ("a", "denied", "down"):
        LOCAL.put(str(tmp_path / f"{name}.mp4"), small(0))

    def probe(*names: str) -> list[str]:
        references = [Reference(str(tmp_path / f"{name}.mp4")) for name in names]
        videos = [Video(video_id=item.uri, reference=item, size_bytes=None) for item in references]
        refusals = [found.refusal for found in probe_all(Faulty(), videos, DecodeConfig(), 2)]
        return ["" if refusal is None else refusal.error_class for refusal in refusals]

    assert probe("a", "denied") == ["", "AccessDenied"]
    with pytest.raises(AccessDenied, match="no video of 1 may be read"):
        probe("denied")
    with pytest.raises(StorageUnavailable, match="still failing"):
        probe("a", "down", "denied")


def test_remedies_are_for_errors_that_there_are() -> None:
    assert set(_REMEDIES) <= set(errors.__all__)


def test_names_that_collide_are_counted(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "b.mp4"):
        LOCAL.put(str(tmp_path / name), b"x")
    assert open_source(LOCAL, str(tmp_path)).num_renamed == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_560_000, "2.6 MB"), (3e9, "3.0 GB"), (1.5e15, "1,500.0 TB")],
)
def test_sizes_are_decimal(value: float, expected: str) -> None:
    assert format_bytes(value) == expected


def test_nouns_agree_with_their_counts() -> None:
    assert [many(1, "class"), many(2000, "class"), many(0, "video")] == ["1 class", "2,000 classes", "0 videos"]
