"""The ablation study: its set keeps its promises, its arithmetic is right, its job resumes."""

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kinoray.catalog.table import load_catalog
from kinoray.cli import guarded
from kinoray.config.shared import ClipConfig, FlowConfig, SampleConfig, ViewConfig
from kinoray.demo.binding import (
    BINDING_THINGS,
    CARD_PX,
    NUM_DRAWINGS,
    NUM_PICTURES,
    SIDE_PX,
    BindingTruth,
    binding_classes,
    binding_clip,
    binding_truth,
    drawing,
    make_binding_set,
    picture,
)
from kinoray.demo.videos import make_video
from kinoray.network.build import build_model
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.tune.config import apply, trial_id
from kinoray.tune.results import ROWS, Row, TrialRow, study_page, study_trials
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from small_sets import set_in

CLIP = ClipConfig(
    sample=SampleConfig(num_segments=2, frames_per_segment=4),
    view=ViewConfig(resize_px=SIDE_PX, crop_px=SIDE_PX, train_scales=(1.0,), train_flip=False),
    flow=FlowConfig(preset="medium", bound_px=4.0),
)


# ---- the set: ceilings by construction


def best_accuracy(truths: Iterable[BindingTruth], seen: Callable[[BindingTruth], Hashable]) -> float:
    """Share right of the best possible guess of the label for somebody who is told `seen` and nothing else."""
    groups: dict[Hashable, Counter[int]] = {}
    for truth in truths:
        groups.setdefault(seen(truth), Counter())[truth.label_id] += 1
    return sum(max(group.values()) for group in groups.values()) / sum(group.total() for group in groups.values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_ceilings_of_what_each_stream_can_know(split: str) -> None:
    truths = [binding_truth(split, number) for number in range(480)]  # type: ignore[arg-type]
    assert Counter(truth.label_id for truth in truths) == dict.fromkeys(range(8), 60)

    def pair(truth: BindingTruth) -> frozenset[int]:
        return frozenset((truth.mover, truth.other))

    assert all(len(pair(truth)) == 2 for truth in truths)
    assert best_accuracy(truths, pair) == 0.25
    assert best_accuracy(truths, lambda truth: truth.direction) == 0.25
    assert best_accuracy(truths, lambda truth: (pair(truth), truth.direction)) == 0.5
    assert best_accuracy(truths, lambda truth: (truth.mover, truth.direction)) == 1.0


def test_label_names_thing_and_direction() -> None:
    assert binding_classes()[binding_truth("train", 5).label_id] == "zigzag-right"
    for number in range(8):
        truth = binding_truth("test", number)
        relative = truth.step_px[0] - truth.pan_px[0]
        thing, way = binding_classes()[truth.label_id].split("-")
        assert thing == BINDING_THINGS[truth.mover]
        assert relative == pytest.approx(truth.speed_px if way == "right" else -truth.speed_px)
        assert 0.9 <= truth.speed_px <= 1.5
        assert math.hypot(*truth.pan_px) <= 0.4 + 1e-9


@pytest.mark.parametrize("frame", [0, 12, 23])
def test_one_frame_tells_nothing_of_the_motion(frame: int) -> None:
    """Positions on the circle of SIDE_PX are uniform for mover and other card, whichever way the mover goes.

    The length of the mean of n random unit vectors is about 1 / sqrt(n) = 0.03 here; 0.1 is beyond 1 in 10,000.
    """
    truths = [binding_truth("train", number) for number in range(2000)]
    for direction in (0, 1):
        chosen = [truth for truth in truths if truth.direction == direction]
        movers = np.array([truth.mover_xy[0] + frame * truth.step_px[0] for truth in chosen])
        others = np.array([truth.other_xy[0] + frame * truth.pan_px[0] for truth in chosen])
        for positions in (movers, others, movers - others):
            for harmonic in (1, 2):
                mean = np.exp(2j * math.pi * harmonic * positions / SIDE_PX).mean()
                assert abs(mean) < 0.1


def test_cards_never_touch() -> None:
    for number in range(500):
        truth = binding_truth("train", number)
        gap = (truth.mover_xy[1] - truth.other_xy[1]) % SIDE_PX
        assert CARD_PX + 1.9 <= gap <= SIDE_PX - CARD_PX - 1.9


def inside(corner: tuple[float, float], margin: float) -> np.ndarray:
    """Mask [SIDE_PX, SIDE_PX] of a card's inner part, positions modulo the frame."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    dx, dy = (x - corner[0]) % SIDE_PX, (y - corner[1]) % SIDE_PX
    return (dx >= margin) & (dx <= CARD_PX - margin) & (dy >= margin) & (dy <= CARD_PX - margin)


def test_measured_flow_shows_the_movers_direction() -> None:
    """Flow of the decoded H.264 against how the video was made, each relative to the background; medians.

    DIS smooths a card of 20 px into what lies around it: it finds 0.4 to 0.9 of the speed.
    """
    for number in range(16):
        frames, truth = binding_clip("train", number)
        clip = decode(make_video(frames), Sampled(), CLIP).clip()
        assert clip.flow is not None
        assert clip.num_frames == 24
        flow = clip.flow.reshape(-1, 2, SIDE_PX, SIDE_PX) * (CLIP.flow.bound_px / 127)
        measured = []
        for t, field in zip(clip.indices.reshape(-1).tolist(), flow, strict=True):
            mover, other = (
                ((start[0] + t * step[0]) % SIDE_PX, (start[1] + t * step[1]) % SIDE_PX)
                for start, step in ((truth.mover_xy, truth.step_px), (truth.other_xy, truth.pan_px))
            )
            regions = (inside(mover, 5), inside(other, 5), ~(inside(mover, -4) | inside(other, -4)))
            measured.append([np.median(field[:, region], axis=1) for region in regions])
        mover_px, other_px, background_px = np.median(measured, axis=0)
        own_px = mover_px - background_px
        sign = 1 if truth.direction else -1
        assert 0.3 < sign * own_px[0] / truth.speed_px < 1.05
        assert abs(own_px[1]) < 0.2
        assert np.abs(other_px - background_px).max() < 0.1
        assert background_px == pytest.approx(truth.pan_px, abs=0.12)


def test_the_same_arguments_give_the_same_pixels() -> None:
    frames, truth = binding_clip("test", 7)
    picture.cache_clear()
    drawing.cache_clear()
    again, truth_again = binding_clip("test", 7)
    assert frames.shape == (24, SIDE_PX, SIDE_PX, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, again)
    assert truth == truth_again
    assert make_video(frames) == make_video(again)
    for other in (binding_clip("test", 15), binding_clip("train", 7), binding_clip("test", 7, seed=1)):
        assert other[1].label_id == truth.label_id
        assert not np.array_equal(other[0], frames)


def test_train_and_test_share_no_picture_and_no_drawing() -> None:
    pictures = {
        split: np.stack([picture(0, split, number) for number in range(NUM_PICTURES)]).reshape(NUM_PICTURES, -1)
        for split in ("train", "test")
    }
    for one in pictures["train"]:
        assert np.abs(pictures["test"] - one).mean(axis=1).min() > 0.05
    for thing in BINDING_THINGS:
        drawings = {
            split: np.stack([drawing(0, split, thing, number) for number in range(NUM_DRAWINGS)])
            for split in ("train", "test")
        }
        for one in drawings["train"]:
            assert np.abs(drawings["test"] - one).max(axis=(1, 2)).min() > 0.05


def test_drawings_can_be_told_apart_across_the_splits() -> None:
    """Nearest neighbour on the pixels: appearance that is learnt on training drawings holds on test drawings."""
    known = np.stack([drawing(0, "train", thing, n) for thing in BINDING_THINGS for n in range(NUM_DRAWINGS)])
    right = 0
    for index, thing in enumerate(BINDING_THINGS):
        for number in range(NUM_DRAWINGS):
            distance = np.square(known - drawing(0, "test", thing, number)).sum(axis=(1, 2))
            right += int(distance.argmin()) // NUM_DRAWINGS == index
    assert right / (len(BINDING_THINGS) * NUM_DRAWINGS) > 0.97


# ---- the table

OPTIONS = {"backbone": "tiny", "heads": 4}


def trial(row: Row, scale: str, seed: int, *top1: float, status: str = "finished") -> TrialRow:
    """A trial with these accuracies after its epochs, percent."""
    settings = row.settings(scale, seed, OPTIONS)
    return TrialRow(
        trial=trial_id(settings),
        settings=settings,
        status=status,
        best_val_top1=max(top1) / 100,
        best_epoch=1,
        epochs=len(top1),
        run="run",
        decode_cpu_s=0.0,
        error="",
        curve=tuple((epoch, value / 100) for epoch, value in enumerate(top1, 1)),
    )


TSN, _, _, NEITHER, STC, MFF, BOTH = ROWS
FOUND = [
    trial(TSN, "dim", 0, 24.0),
    trial(NEITHER, "dim", 1, 99.0, 45.0),  # the last epoch counts, not the best one
    trial(NEITHER, "dim", 0, 44.0),
    trial(STC, "dim", 0, 45.5),
    trial(STC, "dim", 1, 90.0, status="failed"),
    trial(MFF, "frobenius", 0, 64.0),
    trial(MFF, "dim", 0, 96.0),
    trial(MFF, "dim", 1, 98.0),
    trial(BOTH, "dim", 0, 95.0),
    trial(BOTH, "dim", 1, 92.0),
]


def test_the_table_is_means_and_sample_deviations_and_differences_of_equal_seeds() -> None:
    assert study_page(FOUND, OPTIONS, (0, 1)).splitlines() == [
        "| top-1, % | scale as printed | scale sqrt(d) | paper, K400 |",
        "| --- | ---: | ---: | ---: |",
        "| TSN, RGB | 24.0 | same | 71.3 |",
        "| TSN, flow | - | same | - |",
        "| TSM, RGB | - | same | 75.1 |",
        "| No_STC No_MFF | 44.5 +- 0.7 | same | 71.7 |",
        "| STC No_MFF | 45.5 | same | 73.9 |",
        "| No_STC MFF | 64.0 | 97.0 +- 1.4 | 78.5 |",
        "| STC MFF | - | 93.5 +- 2.1 | 80.1 |",
        "",
        "| points | scale as printed | scale sqrt(d) | paper, K400 |",
        "| --- | ---: | ---: | ---: |",
        "| STC No_MFF over No_STC No_MFF | +1.5 | same | +2.2 |",
        "| No_STC MFF over No_STC No_MFF | +20.0 | +52.5 +- 0.7 | +6.8 |",
        "| STC MFF over No_STC MFF | - | -3.5 +- 3.5 | +1.6 |",
        "| STC MFF over No_STC No_MFF | - | +49.0 +- 2.8 | +8.4 |",
    ]


def test_trials_are_networks_that_exist_and_differ_and_more_seeds_keep_those_before() -> None:
    trials = study_trials(OPTIONS, (0, 1))
    assert len(trials) == 2 * 9
    assert [settings["optim.seed"] for settings in trials] == [0] * 9 + [1] * 9
    assert trials[:9] == study_trials(OPTIONS, (0,))
    base = TrainConfig(catalog="c", out="o")
    for settings in trials[:9]:
        model = apply(base, settings).model
        assert model.options["backbone"] == "tiny"
        network = build_model(model, 8)
        assert network.input_spec.rgb or network.input_spec.flow_channels
    assert {settings["model.factory"] for settings in trials if "model.options.heads" in settings} == {"vcm_sdd"}


# ---- the job


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "jobs"))
    return importlib.import_module("ablate")


def run(job: Any, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablate.py", *arguments])
        return cast(int, guarded("ablate", job.main))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-videos", "12"], "num_videos must be a multiple of 8, got 12"),
        (["--seeds", "0", "0"], r"seeds must be different whole numbers of at least 0, got \(0, 0\)"),
        (["--model.factory", "tsn"], "model.factory must be left out: the rows name it, got 'tsn'"),
        (["--optim.epochs", "0"], "optim.epochs must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(job: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job, "set", "--out", "out", *flags) == 2
    assert re.search(f"^kinoray ablate: ConfigError: {message}$", capsys.readouterr().err.strip())


def test_the_settings_are_printed_as_a_file_that_is_read_back(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(job, "set", "--out", "out", "--seeds", "4", "5", "--print-config") == 0
    text = capsys.readouterr().out
    assert "factory: vcm_sdd" in text
    (tmp_path / "study.yaml").write_text(text)
    assert run(job, "--config", str(tmp_path / "study.yaml"), "--print-config") == 0
    assert capsys.readouterr().out == text


@pytest.mark.ray
@pytest.mark.slow
def test_the_study_of_a_packed_set_runs_and_resumes(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kinoray.tune.results.ROWS", (TSN, NEITHER))  # single stream and two; all rows are in `slow`
    (tmp_path / "set").mkdir()
    flags = [
        *(set_in(tmp_path / "set", train=12, val=6), "--out", str(tmp_path / "out"), "--quick"),
        *("--clip.view.resize-px", "32", "--clip.view.crop-px", "32", "--clip.sample.frames-per-segment", "1"),
        *("--optim.batch-size", "6", "--resources.num-workers", "1", "--resources.decode-tasks", "1"),
    ]
    assert run(job, *flags) == 0
    out = capsys.readouterr().out
    assert "tune: 2 trials (search given, none stopped before epoch 1), 0 have ended already" in out
    page = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8")
    assert page in out
    cells = dict(line.split(" | ")[:2] for line in page.splitlines() if " | " in line)
    assert float(cells["| TSN, RGB"]) in np.round(np.arange(7) / 6 * 100, 1)  # 6 videos, each counted once
    assert run(job, *flags) == 0
    assert "2 have ended already" in capsys.readouterr().out
    assert (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8") == page


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_study_of_the_generated_set_runs_whole(job: Any, tmp_path: Path) -> None:
    catalog = tmp_path / "set"
    assert run(job, str(catalog), "--generate", "--num-videos", "16", "--out", str(tmp_path / "out"), "--quick") == 0
    table = load_catalog(Storage(), str(catalog)).table
    assert Counter(zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        (split, label): 2 for split in ("train", "val") for label in binding_classes()
    }
    page = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8").splitlines()
    assert len(page) == 2 + len(ROWS) + 1 + 2 + 4
    assert all(" | - | " not in line.rpartition(" | ")[0] for line in page)


def test_the_generated_set_is_whole_or_absent_and_made_once(tmp_path: Path) -> None:
    left_by_a_kill = tmp_path / "videos.unfinished"
    left_by_a_kill.mkdir()
    (left_by_a_kill / "half.mp4").write_bytes(b"half")
    make_binding_set(tmp_path / "videos", 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]
    files = sorted(path.relative_to(tmp_path / "videos") for path in (tmp_path / "videos").glob("*/*/*"))
    assert {str(path.parent) for path in files} == {f"{s}/{c}" for s in ("train", "val") for c in binding_classes()}
    assert len(files) == 16
    truth = binding_truth("test", 3)
    video = tmp_path / "videos" / "val" / binding_classes()[truth.label_id] / "00003.mp4"
    assert video.read_bytes() == make_video(binding_clip("test", 3)[0])
    made = video.stat().st_mtime_ns
    make_binding_set(tmp_path / "videos", 8)
    assert video.stat().st_mtime_ns == made


def test_the_plane_that_flow_looks_at_does_not_show_the_drawing() -> None:
    """The decoded cards' ink, as a contrast in grey levels: plain in red and blue, lost in the texture in green."""
    contrast: list[list[float]] = []
    for number in range(48):
        frames, truth = binding_clip("train", number)
        clip = decode(make_video(frames), Sampled(), CLIP.without_flow()).clip()
        ink = drawing(0, "train", BINDING_THINGS[truth.other], truth.drawings[1])
        for t, frame in zip(
            clip.indices.reshape(-1).tolist(), clip.frames.reshape(-1, 3, SIDE_PX, SIDE_PX), strict=True
        ):
            x, y = (
                round((start + t * step) % SIDE_PX) for start, step in zip(truth.other_xy, truth.pan_px, strict=True)
            )
            if max(x, y) + CARD_PX <= SIDE_PX:
                card = frame[:, y : y + CARD_PX, x : x + CARD_PX].astype(float)
                contrast.append([abs(plane[ink > 0.8].mean() - plane[ink < 0.1].mean()) for plane in card])
    red, green, blue = np.mean(contrast, axis=0)
    assert len(contrast) > 100
    assert min(red, blue) > 80
    assert green < 25  # what the texture alone gives between two regions of these shapes
