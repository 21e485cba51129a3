"""The cache of decoded frames: the same bytes as decoding, one decode for all samplings, and no trust in its files."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kinoray.config.shared import CacheConfig, ClipConfig, SampleConfig, ViewConfig, digest
from kinoray.errors import ConfigError, MediaError
from kinoray.storage.objects import Storage
from kinoray.train.decoding import DecodeTask
from kinoray.video.cache import CacheFolder, FrameCache, grid_name
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from kinoray.video.sample import clip_rng
from kinoray.video.sandbox.pool import Sandbox
from small_sets import colour_video

VIEW = ViewConfig(resize_px=80, crop_px=64)  # frames of several of the blocks that checksums are sums of
GRIDS = tuple(SampleConfig(num_segments=count, frames_per_segment=2) for count in (1, 2, 4))
NAMES = tuple(grid_name(sample) for sample in GRIDS)


def clip_of(sample: SampleConfig) -> ClipConfig:
    return ClipConfig(sample=sample, view=VIEW)


@pytest.fixture(scope="module")
def videos() -> list[bytes]:
    """More frames than any sampling wants, about as many, and fewer."""
    return [colour_video("red", seed, num_frames=count, side=48) for seed, count in enumerate((30, 9, 3))]


@pytest.mark.parametrize("epoch", [None, 1, 2])
def test_a_bank_holds_what_each_sampling_alone_would_decode(videos: list[bytes], epoch: int | None) -> None:
    for data in videos:
        bank = decode(data, Sampled(samples=GRIDS, rng=epoch and clip_rng(0, epoch, "v")), clip_of(GRIDS[0]))
        assert bank.exact
        for sample, places in zip(GRIDS, bank.places(), strict=True):
            clip = decode(data, Sampled(rng=epoch and clip_rng(0, epoch, "v")), clip_of(sample)).clip()
            assert np.array_equal(bank.frames[0, places].reshape(clip.frames.shape), clip.frames)
            assert bank.flow is not None
            assert clip.flow is not None
            assert np.array_equal(bank.flow[0, places].reshape(clip.flow.shape), clip.flow)


@pytest.mark.parametrize("epoch", [None, 1, 2])
def test_a_bank_of_spread_and_dense_clips_serves_each_of_them(
    videos: list[bytes], epoch: int | None, tmp_path: Path
) -> None:
    """The grids of a sweep over stride; the middle one begins again in short videos."""
    own = SampleConfig(num_segments=1, frames_per_segment=4, stride=3)
    samples = [own, dataclasses.replace(own, stride=8), dataclasses.replace(own, stride=0)]
    names = tuple(grid_name(sample) for sample in samples)
    assert names == ("1x4/3", "1x4/8", "1x4")
    for sample in samples:
        config = CacheConfig(gb=1, folder=str(tmp_path / "cache"), grids=names)
        assert FrameCache(config, clip_of(sample)).samples == sorted(samples, key=grid_name)
    for data in videos:
        cache = FrameCache(config, clip_of(samples[0]))
        bank = decode(data, Sampled(samples=tuple(cache.samples), rng=epoch and clip_rng(0, epoch, "v")), cache.clip)
        assert cache.add("ab" * 16, bank)
        for sample in samples:
            clip = decode(data, Sampled(rng=epoch and clip_rng(0, epoch, "v")), clip_of(sample)).clip()
            found, flow = np.empty_like(clip.frames), np.empty_like(clip.flow)
            assert FrameCache(config, clip_of(sample)).load("ab" * 16, found, flow)
            assert np.array_equal(found, clip.frames)
            assert np.array_equal(flow, clip.flow)


def test_a_bank_of_a_damaged_file_is_either_what_each_sampling_would_decode_or_says_that_it_is_not(
    videos: list[bytes],
) -> None:
    exact = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        damaged = bytearray(videos[0])
        begin = int(rng.integers(len(damaged) // 4, len(damaged) - 400))
        damaged[begin : begin + 300] = rng.bytes(300)
        try:
            bank = decode(bytes(damaged), Sampled(samples=GRIDS), clip_of(GRIDS[0]).without_flow())
        except MediaError:
            continue
        exact.append(bank.exact)
        for sample, places in zip(GRIDS, bank.places(), strict=True):
            clip = decode(bytes(damaged), Sampled(), clip_of(sample).without_flow()).clip()
            if bank.exact:
                assert np.array_equal(bank.frames[0, places].reshape(clip.frames.shape), clip.frames)
    assert False in exact
    assert True in exact


def block_of(tmp_path: Path, videos: list[bytes]) -> pa.Table:
    rows = []
    for row, data in enumerate(videos):
        path = tmp_path / f"{row}.mp4"
        path.write_bytes(data)
        video = {"video_id": f"v{row}", "uri": str(path), "offset": None, "length": None, "sha256": None, "row": row}
        rows.append(video)
    fields = {"video_id": pa.string(), "uri": pa.string(), "offset": pa.int64(), "length": pa.int64()}
    fields |= {"time_start_s": pa.float64(), "time_end_s": pa.float64()}
    return pa.Table.from_pylist(rows, schema=pa.schema({**fields, "sha256": pa.string(), "row": pa.int64()}))


def task_of(cache: CacheConfig, sample: SampleConfig, **changes: Any) -> DecodeTask:
    settings = {"clip": clip_of(sample), "seed": 3, "epoch": 1, "cache": cache} | changes
    return DecodeTask(storage=Storage(), **settings)


def test_tasks_give_the_same_bytes_with_and_without_a_cache_and_decode_once(
    tmp_path: Path, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []
    real = Sandbox.decode
    monkeypatch.setattr(
        Sandbox,
        "decode",
        lambda *given: readings.append(len(given[2].samples)) or real(*given),  # type: ignore[func-returns-value]
    )
    block = block_of(tmp_path, [*videos, b"not a video"])
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), grids=NAMES)
    for epoch in (1, None):
        for sample in GRIDS:
            plain = task_of(CacheConfig(), sample, epoch=epoch)(block)
            readings.clear()
            cold_or_warm = task_of(cache, sample, epoch=epoch)(block)
            # The video that cannot be read is tried each time; the others once, for the first sampling.
            assert readings == ([len(GRIDS)] * 4 if sample is GRIDS[0] else [len(GRIDS)])
            assert cold_or_warm["cached"].tolist() == [sample is not GRIDS[0]] * 3 + [False]
            for column in ("row", "ok", "rgb", "flow", "error_class", "error_text"):
                assert np.array_equal(plain[column], cold_or_warm[column]), column
            assert plain["ok"].tolist() == [True, True, True, False]
            assert plain["cpu_s"].sum() > 0
    other = task_of(cache, GRIDS[0], seed=4)(block)  # another draw: nothing of it is there
    assert not other["cached"].any()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.frames"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "description", "magic"])
def test_a_damaged_file_is_found_out_and_made_again(tmp_path: Path, videos: list[bytes], damage: str) -> None:
    block = block_of(tmp_path, videos[:1])
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), grids=NAMES)
    task = task_of(cache, GRIDS[2])
    first = task(block)
    (path,) = files_of(tmp_path / "cache")
    content = path.read_bytes()
    at = {"flip": len(content) - 5, "description": 40, "magic": 0}.get(damage)
    if at is None:
        path.write_bytes(content[: len(content) - 1 if damage == "cut" else 0])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    again = task(block)
    assert again["cached"].tolist() == [False]
    assert np.array_equal(again["rgb"], first["rgb"])
    assert np.array_equal(again["flow"], first["flow"])
    assert path.read_bytes() == content
    assert task(block)["cached"].tolist() == [True]


def test_another_file_in_the_place_of_one_without_a_checksum_is_decoded(tmp_path: Path, videos: list[bytes]) -> None:
    block = block_of(tmp_path, videos[:1])
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"))
    assert [task_of(cache, GRIDS[0])(block)["cached"].tolist() for _ in range(2)] == [[False], [True]]
    Path(block["uri"][0].as_py()).write_bytes(videos[1])
    again = task_of(cache, GRIDS[0])(block)
    assert again["cached"].tolist() == [False]
    assert np.array_equal(again["rgb"], task_of(CacheConfig(), GRIDS[0])(block)["rgb"])


def test_the_cache_stays_within_its_size_and_what_is_there_stays(tmp_path: Path, videos: list[bytes]) -> None:
    block = block_of(tmp_path, [videos[0]] * 4)
    size = 8 * 64 * 64 * 5 / 1e9  # a file holds up to 8 frames and as much flow
    cache = CacheConfig(gb=2.5 * size, folder=str(tmp_path / "cache"))
    task = task_of(cache, GRIDS[2])
    first, second = task(block), task(block)
    assert sum(path.stat().st_size for path in files_of(tmp_path / "cache")) <= 2.5 * size * 1e9
    assert first["cached"].tolist() == [False] * 4
    assert second["cached"].tolist() == [True, True, False, False]
    assert np.array_equal(first["rgb"], second["rgb"])

    for path in files_of(tmp_path / "cache"):  # what is deleted makes room only once it is found out
        path.write_bytes(b"")
    third = task(block)
    assert not third["cached"].any()
    assert task(block)["cached"].sum() == 2
    assert not list((tmp_path / "cache").glob("??/*.part"))


def test_a_run_whose_sampling_is_not_among_the_shared_ones_keeps_its_own(tmp_path: Path, videos: list[bytes]) -> None:
    cache = CacheConfig(gb=1, folder=str(tmp_path / "cache"), grids=NAMES[:2])
    block = block_of(tmp_path, videos[:1])
    assert not task_of(cache, GRIDS[0])(block)["cached"].any()
    assert not task_of(cache, GRIDS[2])(block)["cached"].any()
    assert task_of(cache, GRIDS[1])(block)["cached"].all()
    assert task_of(cache, GRIDS[2])(block)["cached"].all()


def test_everything_that_decides_the_frames_is_in_the_key(tmp_path: Path) -> None:
    cache = CacheConfig(gb=1, folder=str(tmp_path), grids=NAMES)
    video = {"video_id": "v", "uri": "u", "offset": 1, "length": 2, "sha256": "s"}
    base = FrameCache(cache, clip_of(GRIDS[0]))
    keys = {base.key(video, 0, 1), base.key(video, 0, 2), base.key(video, 1, 1), base.key(video, 0, None)}
    keys |= {base.key(video | {name: "other"}, 0, 1) for name in video}
    view = dataclasses.replace(VIEW, train_flip=False)
    keys.add(FrameCache(cache, dataclasses.replace(clip_of(GRIDS[0]), view=view)).key(video, 0, 1))
    keys.add(FrameCache(cache, clip_of(GRIDS[0]).without_flow()).key(video, 0, 1))
    keys.add(FrameCache(dataclasses.replace(cache, grids=NAMES[:1]), clip_of(GRIDS[0])).key(video, 0, 1))
    assert len(keys) == 4 + 5 + 3
    assert FrameCache(cache, clip_of(GRIDS[2])).key(video, 0, 1) == base.key(video, 0, 1)
    assert base.key(video, 0, None) == base.key(video, 9, None)  # what is scored has no seed


def test_what_another_release_of_a_decoder_has_made_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CacheFolder(CacheConfig(gb=1.0, folder=str(tmp_path)))
    assert folder.put(folder.path("ab" * 16, "frames"), 3, [b"old"])
    assert folder.path("ab" * 16, "frames").exists()
    monkeypatch.setattr("kinoray.video.cache._SOFTWARE", digest(["of a later release"])[:8])
    assert not folder.path("ab" * 16, "frames").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FrameCache(CacheConfig(gb=1, folder=str(tmp_path / "theirs")), clip_of(GRIDS[0]).without_flow())
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 123456)
    with pytest.raises(ConfigError, match=r"cache\.folder .*theirs belongs to another user"):
        cache.has_room()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = FrameCache(CacheConfig(gb=1, folder=str(tmp_path / "file" / "cache")), clip_of(GRIDS[0]))
    with pytest.raises(ConfigError, match=r"cache\.folder .*file/cache cannot be used: Not a directory; name a folder"):
        cache.has_room()


def test_a_full_folder_is_looked_at_again_once_a_while(tmp_path: Path) -> None:
    """Files that were deleted make room again, and what killed writers have left goes once it is old."""
    folder = CacheFolder(CacheConfig(gb=3.5e-8, folder=str(tmp_path)))
    for number in range(4):
        assert folder.put(folder.path(f"0{number}", "frames"), 10, [b"0123456789"]) == (number < 3)
    folder.path("00", "frames").unlink()
    assert not folder.has_room(10)  # who was here a moment ago counted right
    (tmp_path / "01" / "01.frames.aa.part").write_bytes(bytes(10))
    old = tmp_path / "01" / "01.frames.bb.part"
    old.write_bytes(bytes(10))
    os.utime(old, (1e9, 1e9))
    (tmp_path / "01" / "gone").symlink_to("nowhere")  # as a file is that went between two looks
    (tmp_path / "used").write_text(f"{30:31d} {0:31d} ")
    assert not folder.has_room(10)
    assert not old.exists()
    (tmp_path / "01" / "01.frames.aa.part").unlink()
    (tmp_path / "used").write_text(f"{30:31d} {0:31d} ")
    assert folder.has_room(10)
    folder.remove(folder.path("02", "frames"))
    assert folder.put(folder.path("04", "frames"), 20, [bytes(20)])
    assert not folder.has_room(6)


@pytest.mark.parametrize("grids", [("8",), ("0x4",), ("8x6x2",), ("8x-1",)])
def test_grids_are_checked(grids: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"cache\.grids must be like 8x6"):
        CacheConfig(grids=grids)
