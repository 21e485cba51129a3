"""Long videos in windows: where they lie, their frames, and both tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinoray.catalog.table import catalog_of_source
from kinoray.config.scoring import ViewsConfig, WindowsConfig
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import ConfigError, ObjectNotFound, UndecodableVideo
from kinoray.label.answers import AnswerRule
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_windows
from kinoray.label.open import open_network
from kinoray.label.read import DecodedVideo, VideoReader
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.times import StageClock
from kinoray.label.unit import JobRecord
from kinoray.network.build import build_model
from kinoray.network.checkpoint import load_meta
from kinoray.network.scorer import ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.storage.records import record_of
from kinoray.video.frames import decode
from kinoray.video.request import Sampled, Views
from kinoray.video.sample import cut_windows, view_indices
from label_models import save_untrained
from small_tables import job_record, planned
from tiny_models import OWN_NETWORKS

LOCAL = Storage(StorageConfig())
LABELS = ("left", "right", "up")
CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
WINDOWS = WindowsConfig(length_s=1.0, stride_s=0.5)  # 30 frames every 15


def moving(num_frames: int, seed: int = 0) -> np.ndarray:
    picture = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8).repeat(1, axis=0)
    return np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(num_frames)])


# Where they lie


@given(st.integers(1, 5000), st.floats(1, 120), st.floats(0.05, 100), st.floats(0.01, 1))
def test_windows_are_equal_and_leave_no_frame_out(num_frames: int, fps: float, length_s: float, share: float) -> None:
    windows = cut_windows(num_frames, fps, WindowsConfig(length_s=length_s, stride_s=length_s * share))
    assert windows[0, 0] == 0
    assert windows[-1, 1] == num_frames
    assert len(set((windows[:, 1] - windows[:, 0]).tolist())) == 1
    assert (np.diff(windows[:, 0]) > 0).all()
    covered = np.zeros(num_frames, bool)
    for begin, end in windows:
        covered[begin:end] = True
    assert covered.all()
    if num_frames / fps > length_s + 1 / fps:
        assert len(windows) > 1


def test_windows_of_a_known_video() -> None:
    assert cut_windows(70, 30.0, WINDOWS).tolist() == [[0, 30], [15, 45], [30, 60], [40, 70]]
    assert cut_windows(30, 30.0, WINDOWS).tolist() == [[0, 30]]
    assert cut_windows(70, 0.0, WINDOWS).tolist() == [[0, 70]]
    assert cut_windows(70, 30.0, None).tolist() == [[0, 70]]


def test_a_stride_that_leaves_gaps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^window_stride_s must be greater than 0 and at most window_s \(2\)"):
        WindowsConfig(length_s=2, stride_s=3)


# Their frames


def all_frames(data: bytes, num_frames: int) -> Any:
    sample = SampleConfig(num_segments=num_frames, frames_per_segment=1)
    return decode(data, Sampled(), ClipConfig(sample=sample, view=CLIP.view)).clip()


def test_each_window_gets_the_frames_that_lie_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at once, and two windows at a time; the reference takes every frame of the video in one clip."""
    data = make_video(moving(70), fps=30, gop=12)
    every = all_frames(data, 70)
    views = ViewsConfig(temporal=2, crops="three", windows=WINDOWS)
    (whole,) = parts_of(data, views)
    assert whole.num_windows == 4
    found = list(whole.clips())
    assert len(found) == len(whole) == 4 * 2 * 3
    for number, clip in enumerate(found):
        begin, end = cut_windows(70, 30.0, WINDOWS)[number // 6]
        wanted = begin + view_indices(int(end - begin), CLIP.sample, 2)[number % 6 // 3]
        assert clip.indices.tolist() == wanted.tolist()
        if number % 3 == 1:  # the cut in the middle
            assert np.array_equal(clip.frames, every.frames[wanted.reshape(-1), 0].reshape(clip.frames.shape))
            assert np.array_equal(clip.flow, every.flow[wanted.reshape(-1), 0].reshape(clip.flow.shape))
    monkeypatch.setattr("kinoray.video.request._WINDOWS_BYTES", 2 * 24 * 32 * 32 * 5)
    parts = parts_of(data, views)
    assert [(part.first_window, len(part.windows), part.num_windows) for part in parts] == [(0, 2, 4), (2, 2, 4)]
    for one, other in zip(found, (clip for part in parts for clip in part.clips()), strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.flow, other.flow)
    with pytest.raises(UndecodableVideo, match="window 4 is gone: 70 frames"):
        decode(data, Views(views=views, first_window=4), CLIP.without_flow())


def parts_of(data: bytes, views: ViewsConfig) -> list[Any]:
    parts = [decode(data, Views(views=views), CLIP)]
    while (end := parts[-1].first_window + len(parts[-1].windows)) < parts[-1].num_windows:
        parts.append(decode(data, Views(views=views, first_window=end), CLIP))
    return parts


# Both tables


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 20, 70 and 100 frames, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("library")
    for number, num_frames in enumerate((20, 70, 100)):
        (folder / f"{number}.mp4").write_bytes(make_video(moving(num_frames, number), fps=30, gop=12))
    (folder / "bad.mp4").write_bytes(make_broken("random", (folder / "0.mp4").read_bytes()))
    return folder


def labelled(library: Path, root: Path, clip: ClipConfig, views: ViewsConfig, **scorer: Any) -> Ledger:
    """The library, labelled by one worker in this process."""
    checkpoint = save_untrained(LOCAL, str(root / "run"), LABELS, clip, "label_models:mixing")
    catalog = catalog_of_source(LOCAL, str(library))
    ledger = Ledger(LOCAL, str(root / "out"))
    ledger.pin_job(job_record(checkpoint=checkpoint, windows=views.windows))
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 2)
    job = LabelJob(
        allow_factory=OWN_NETWORKS,
        storage=LOCAL,
        root=ledger.root,
        checkpoint=checkpoint,
        model_digest=load_meta(LOCAL, checkpoint).model_digest,
        config_digest="c" * 16,
        run_id="r" * 16,
        clip=clip,
        views=views,
        answer=AnswerRule(top_k=3, all_scores=True),
        scorer=ScorerConfig(**scorer),
        num_decoders=2,
        torch_threads=1,
    )
    worker, start = LabelUnits(job), 0
    for unit in plan.units:
        rows = catalog.table.slice(start, len(unit.keys))
        start += len(unit.keys)
        (result,) = worker(pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        assert result["error_text"] == ""
    return ledger


def test_a_window_is_labelled_as_a_video_and_the_video_is_their_mean(library: Path, tmp_path: Path) -> None:
    """Reference: each window decoded by hand, one forward pass, softmax and means in float64."""
    ledger = labelled(library, tmp_path, CLIP, ViewsConfig(windows=WINDOWS), batch_size=1)
    torch.manual_seed(7)
    model = build_model(ModelConfig(factory="label_models:mixing"), len(LABELS))
    (plan,) = ledger.plans()
    rows = pa.concat_tables(ledger.read_units(plan.units)).to_pylist()
    windows = read_windows(LOCAL, ledger.root).to_pylist()
    assert [row["windows"] for row in rows] == [1, 4, 6, 0]
    for row, num_frames in zip(rows[:3], (20, 70, 100), strict=True):
        every = all_frames(Path(row["uri"]).read_bytes(), num_frames)
        mine = [window for window in windows if window["row_key"] == row["row_key"]]
        expected = []
        for number, (begin, end) in enumerate(cut_windows(num_frames, 30.0, WINDOWS).tolist()):
            place = begin + view_indices(end - begin, CLIP.sample, 1)[0].reshape(-1)
            rgb = torch.from_numpy(every.frames[place, 0].reshape(1, 2, 2, 3, 32, 32)).float() / 255
            flow = torch.from_numpy(every.flow[place, 0].reshape(1, 2, 2, 2, 32, 32)).float() / 127
            with torch.no_grad():
                expected.append(model(rgb=(rgb - 0.5) / 0.25, flow=flow)[0].double().softmax(dim=0).numpy())
            np.testing.assert_allclose(mine[number]["scores"], expected[-1], rtol=1e-4)
            assert mine[number]["window"] == number
            assert (mine[number]["begin_s"], mine[number]["end_s"]) == pytest.approx((begin / 30, end / 30))
        assert len(mine) == len(expected) == row["windows"] == row["views"]
        np.testing.assert_allclose(row["scores"], np.mean(expected, axis=0), rtol=1e-4)
    assert rows[3]["status"] == "quarantined"
    assert {window["row_key"] for window in windows} == {row["row_key"] for row in rows[:3]}


LARGE = ClipConfig(
    sample=SampleConfig(num_segments=32, frames_per_segment=3), view=ViewConfig(resize_px=224, crop_px=224)
)
"""96 frames of 224 x 224 with flow are 24 MB: about ten windows at a time, and the longest video has 17."""
MANY_WINDOWS = ViewsConfig(windows=WindowsConfig(length_s=0.3, stride_s=0.2))


def test_windows_that_are_read_in_parts_are_all_there(library: Path, tmp_path: Path) -> None:
    ledger = labelled(library, tmp_path, LARGE, MANY_WINDOWS, batch_size=2)
    rows = pa.concat_tables(ledger.read_units(ledger.plans()[0].units)).to_pylist()
    assert [row["windows"] for row in rows] == [3, 12, 17, 0]
    counts = [window["window"] for window in read_windows(LOCAL, ledger.root).to_pylist()]
    assert counts == [*range(3), *range(12), *range(17)]


def test_parts_that_are_asked_for_at_once_wait_for_the_decoder(library: Path) -> None:
    """The one decoder is at work on the next videos while a consumer in a hurry asks for the rest of the first."""
    reader = VideoReader(LOCAL, LARGE, MANY_WINDOWS, StageClock(), num_decoders=1, batch_size=3)
    rows = catalog_of_source(LOCAL, str(library)).table
    parts = [list(reader.parts(video)) for video in reader.videos(rows) if isinstance(video, DecodedVideo)]
    assert [len(video) for video in parts] == [1, 2, 2]
    assert [sum(len(part.windows) for part in video) for video in parts] == [3, 12, 17]
    reader.close()


def test_rows_of_windows_say_when_they_are_shown(tmp_path: Path) -> None:
    """A screen recording (1 s at 3 fps, then 1 s at 30), and two parts of a transport stream an hour apart."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(make_video(moving(33), fps=30, pts=[0, 10, 20, *range(30, 60)]))
    parts = [make_video(moving(30), fps=30, pts=range(begin, begin + 30), container="mpegts") for begin in (0, 108_000)]
    (folder / "b.ts").write_bytes(b"".join(parts))
    windows = WindowsConfig(length_s=1, stride_s=1)
    ledger = labelled(folder, tmp_path, CLIP, ViewsConfig(windows=windows), batch_size=1)
    rows = read_windows(LOCAL, ledger.root).to_pylist()
    assert [(row["video_id"], row["begin_s"], row["end_s"]) for row in rows] == [
        (video, begin_s, begin_s + 1) for video in ("a", "b") for begin_s in (0, 1)
    ]


def test_a_table_without_windows_says_so(library: Path, tmp_path: Path) -> None:
    ledger = labelled(library, tmp_path, CLIP, ViewsConfig())
    with pytest.raises(ObjectNotFound, match="was labelled without windows; label with --window-s"):
        read_windows(LOCAL, ledger.root)


# At cuts


def test_windows_of_a_labelled_video_end_at_its_cuts(tmp_path: Path) -> None:
    """A cut 1.5 s from the beginning, one 0.4 s later; and a video that is shorter than a window."""
    folder = tmp_path / "videos"
    folder.mkdir()
    flat = [np.full((number, 48, 64, 3), value, np.uint8) for number, value in ((45, 40), (12, 200), (30, 90))]
    (folder / "a.mp4").write_bytes(make_video(np.concatenate(flat), fps=30, gop=20))
    (folder / "b.mp4").write_bytes(make_video(np.concatenate(flat[1:2] + flat[:1])[:24], fps=30, gop=20))
    windows = WindowsConfig(length_s=1, stride_s=1, at_cuts=True)
    ledger = labelled(folder, tmp_path, CLIP, ViewsConfig(windows=windows), batch_size=1)
    found = [(row["video_id"], row["begin_s"], row["end_s"]) for row in read_windows(LOCAL, ledger.root).to_pylist()]
    times = {"a": [(0, 1), (0.5, 1.5), (1.5, 1.9), (1.9, 2.9)], "b": [(0, 0.4), (0.4, 0.8)]}
    expected = [(video, begin_s, end_s) for video, bounds in times.items() for begin_s, end_s in bounds]
    assert [name for name, *_ in found] == [name for name, *_ in expected]
    np.testing.assert_allclose([bounds for _, *bounds in found], [bounds for _, *bounds in expected])
    rows = pa.concat_tables(ledger.read_units(ledger.plans()[0].units)).to_pylist()
    assert [row["windows"] for row in rows] == [4, 2]
    assert rows[0]["frames_decoded"] > 87  # the look at the cuts is counted


def test_whether_windows_end_at_cuts_is_in_the_digest_which_else_stays_as_it_was(tmp_path: Path) -> None:
    checkpoint = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, CLIP, "label_models:mixing")
    config = LabelConfig(source="videos", checkpoint=checkpoint, out="out", window_s=2.0, allow_factory=OWN_NETWORKS)
    before, at_cuts = (
        open_network(replace(config, window_at_cuts=answer), say=print, warn=print).record for answer in (False, True)
    )
    assert before.settings["views"]["windows"] == {"length_s": 2.0, "stride_s": 2.0}
    assert at_cuts.settings["views"]["windows"] == {"length_s": 2.0, "stride_s": 2.0, "at_cuts": True}
    assert before.config_digest != at_cuts.config_digest


def test_a_labelling_in_windows_from_before_shots_is_read() -> None:
    record = {
        "checkpoint": "run",
        "model_digest": "m",
        "config_digest": "c",
        "labels": ["a"],
        "windows": {"length_s": 2.0, "stride_s": 1.0},
        "settings": {},
    }
    assert record_of(JobRecord)(record).windows == WindowsConfig(length_s=2.0, stride_s=1.0, at_cuts=False)
