"""The plan of an epoch, and the stream of decoded clips along it: every row exactly once, for any number of workers."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from kinoray.catalog.table import Catalog, read_videos, references
from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.errors import JobError
from kinoray.storage.objects import Storage
from kinoray.train import input as train_input
from kinoray.train.decoding import DecodeTask
from kinoray.train.input import epoch_order, rank_part, rank_steps, run_length, stream
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from kinoray.video.sample import clip_rng
from small_sets import catalog_of, colour_set

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))


def shards_catalog(*sizes: int, label: str = "mixed") -> Catalog:
    """Rows of shards of the given sizes; labels in turn, or one class after the other."""
    total = sum(sizes)
    places = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    return catalog_of(
        [
            {
                "video_id": f"v{row}",
                "uri": f"shard-{shard}",
                "offset": 100 * index,
                "length": 100,
                "label_id": row % 3 if label == "mixed" else row * 3 // total,
            }
            for row, (shard, index) in enumerate(places)
        ]
    )


@pytest.mark.parametrize("sizes", [(1,), (7,), (5, 1, 30), (1,) * 20, (5000, 3, 5000)])
@pytest.mark.parametrize("run", [1, 4])
def test_an_epoch_has_every_row_once(sizes: tuple[int, ...], run: int) -> None:
    order = epoch_order(shards_catalog(*sizes), seed=3, epoch=2, run=run)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    catalog = shards_catalog(40, 40)
    orders = {
        (seed, epoch): epoch_order(catalog, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (1, 2)
    }
    assert epoch_order(catalog, seed=0, epoch=1).tolist() == orders[0, 1]
    assert len({tuple(order) for order in orders.values()}) == 4
    # Pinned: a resumed run, on any machine and with any numpy, must go on along the same order.
    assert orders[0, 1][:10] == [50, 60, 51, 56, 31, 78, 43, 21, 44, 6]


def test_rows_are_near_their_shard_and_runs_of_neighbours_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_input, "_WINDOW_ROWS", 100)
    order = epoch_order(shards_catalog(*[50] * 20), seed=0, epoch=1, run=5)
    runs = order.reshape(-1, 5)
    assert (np.diff(runs, axis=1) == 1).all()  # neighbours, ascending
    assert (runs[:, 0] % 5 == 0).all()
    assert (np.diff(runs[:, 0]) != 5).mean() > 0.8  # but the runs themselves are mixed
    for start in range(0, 1000, 100):  # 100 rows in a row come from at most 2 windows of 2 to 3 shards
        assert len(set((order[start : start + 100] // 50).tolist())) <= 6


def test_every_place_of_an_epoch_sees_every_row_in_the_long_run() -> None:
    # 2000 epochs of 8 rows in 2 shards: each row is first in 1/8 of them, give or take 5 standard deviations.
    catalog = shards_catalog(4, 4)
    first = Counter(int(epoch_order(catalog, seed=0, epoch=epoch)[0]) for epoch in range(2000))
    assert sorted(first) == list(range(8))
    assert all(abs(count - 250) < 5 * (2000 * 7 / 64) ** 0.5 for count in first.values())


def test_neighbours_of_one_class_are_not_kept_together() -> None:
    assert run_length(shards_catalog(300), 128) == 8
    assert run_length(shards_catalog(300), 64) == 4
    assert run_length(shards_catalog(300), 8) == 1
    assert run_length(shards_catalog(300, label="grouped"), 128) == 1


@pytest.mark.parametrize(("count", "world"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 1), (2, 5)])
def test_parts_of_ranks_are_even_and_cover_everything(count: int, world: int) -> None:
    parts = [list(range(count))[rank_part(count, rank, world)] for rank in range(world)]
    assert [item for part in parts for item in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(17, 5), (20, 5), (4, 8), (21, 5)])
def test_global_batches_do_not_depend_on_the_number_of_workers(world: int, num_rows: int, batch_size: int) -> None:
    order = epoch_order(shards_catalog(num_rows), seed=0, epoch=1)
    ranks = [rank_steps(order, batch_size=batch_size, rank=rank, world_size=world) for rank in range(world)]
    num_steps = -(-num_rows // batch_size)
    assert [len(steps) for steps in ranks] == [num_steps] * world
    for step in range(num_steps):
        batch = np.concatenate([steps[step] for steps in ranks])
        assert batch.tolist() == order[step * batch_size : (step + 1) * batch_size].tolist()


def test_an_epoch_can_start_at_any_step() -> None:
    order = np.arange(17)
    whole = rank_steps(order, batch_size=4, rank=1, world_size=2)
    for first_step in range(6):
        rest = rank_steps(order, batch_size=4, rank=1, world_size=2, first_step=first_step)
        assert [rows.tolist() for rows in rest] == [rows.tolist() for rows in whole[first_step:]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return colour_set(Storage(), str(tmp_path_factory.mktemp("set")), train=13, val=0, broken=(4, 9))


def test_a_decoded_row_is_the_clip_of_its_seed_epoch_and_name(videos: Catalog) -> None:
    table = videos.table.append_column("row", [list(range(len(videos)))])
    data = list(read_videos(Storage(), references(videos.table)))
    for epoch in (None, 1, 2):
        columns = DecodeTask(storage=Storage(), clip=CLIP, seed=5, epoch=epoch)(table)
        assert columns["row"].tolist() == list(range(13))
        assert np.flatnonzero(~columns["ok"]).tolist() == [4, 9]
        for row in (0, 6, 12):
            rng = None if epoch is None else clip_rng(5, epoch, f"v{row:03d}")
            assert isinstance(data[row], bytes)
            clip = decode(data[row], Sampled(rng=rng), CLIP).clip()
            assert np.array_equal(columns["rgb"][row], clip.frames)
            assert clip.flow is not None
            assert np.array_equal(columns["flow"][row], clip.flow)
        assert not columns["rgb"][[4, 9]].any()
        assert columns["error_class"][4] == "UnreadableContainer"
        assert columns["error_text"][4]
        assert columns["error_class"][0] == columns["error_text"][0] == ""


def test_a_video_that_storage_cannot_give_is_a_row_too(videos: Catalog) -> None:
    gone = catalog_of([{"video_id": "a", "uri": "/nowhere/a.mp4"}]).table.append_column("row", [[0]])
    columns = DecodeTask(storage=Storage(), clip=CLIP.without_flow())(gone)
    assert not columns["ok"][0]
    assert columns["error_class"][0] == "ObjectNotFound"
    assert "/nowhere/a.mp4" in columns["error_text"][0]
    assert "flow" not in columns


def test_decode_workers_need_neither_torch_nor_ray() -> None:
    code = "import sys, kinoray.train.decoding; bad = {'torch', 'ray'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.ray
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_stream_gives_every_row_once_to_any_number_of_ranks(videos: Catalog, ray_local: None, world: int) -> None:
    task = DecodeTask(storage=Storage(), clip=CLIP, seed=5, epoch=1)
    order = epoch_order(videos, seed=5, epoch=1)
    seen: list[int] = []
    for rank in range(world):
        steps = rank_steps(order, batch_size=4, rank=rank, world_size=world)
        batches = list(stream(videos, steps, task, decode_tasks=2, world_size=world))
        assert len(batches) == sum(len(rows) > 0 for rows in steps)
        for planned, samples in zip((rows for rows in steps if len(rows)), batches, strict=True):
            bad = [item.row for item in samples.quarantined]
            assert sorted([*samples.rows.tolist(), *bad]) == sorted(planned.tolist())
            assert samples.rows.tolist() == [row for row in planned.tolist() if row not in bad]
            assert len(samples.clips) == len(samples.rows)
            seen += planned.tolist()
            for index, row in enumerate(samples.rows.tolist()):
                data = next(read_videos(Storage(), references(videos.table.slice(row, 1))))
                assert isinstance(data, bytes)
                clip = decode(data, Sampled(rng=clip_rng(5, 1, f"v{row:03d}")), CLIP).clip()
                assert samples.clips.rgb is not None
                assert np.array_equal(samples.clips.rgb[index].numpy(), clip.frames)
        assert {item.row for samples in batches for item in samples.quarantined} <= {4, 9}
    assert sorted(seen) == list(range(13))


@pytest.mark.ray
def test_a_stream_that_loses_rows_is_noticed(videos: Catalog, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    task = DecodeTask(storage=Storage(), clip=CLIP.without_flow())
    whole = train_input._dataset

    def loses_the_last(catalog: Catalog, rows: np.ndarray, *args: object) -> object:
        return whole(catalog, rows[:-1], *args)  # type: ignore[arg-type]

    monkeypatch.setattr(train_input, "_dataset", loses_the_last)
    with pytest.raises(JobError, match=r"broke the plan of the epoch: expected rows \[3, 4, 5\], got rows \[3, 4\]"):
        list(stream(videos, [np.arange(3), np.arange(3, 6)], task, decode_tasks=1, world_size=1))
