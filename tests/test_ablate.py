"""The ablation study: its set keeps its promises, its arithmetic is right, its job resumes."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoray.cli import main
from kinoray.config.shared import ModelConfig, OptimConfig, ResourcesConfig
from kinoray.demo.ablate_fit import ClipBlock, ClipSet, fit, whole_video_order
from kinoray.demo.ablate_page import doc_page, table_page
from kinoray.demo.ablate_rows import ROWS, Row, RunResult, tabulate
from kinoray.demo.ablate_set import CLIP, make_block
from kinoray.demo.ablate_verb import ablate, planned_runs, read_results
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
    picture,
)
from kinoray.demo.config import AblateConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError
from kinoray.run.ablate import verb as job
from kinoray.storage.objects import Storage
from kinoray.video.clip import decode_clip
from vcm_sdd import vcm_sdd


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the job: small steps on several threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        clip = decode_clip(make_video(frames), CLIP, with_flow=True)
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


# ---- training in memory


def colour_block(num_videos: int, seed: int) -> ClipBlock:
    """Two classes by mean colour; frame number f of a video is f all over in red."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_videos, dtype=np.int64) % 2
    frames = rng.integers(0, 60, (num_videos, 2, 4, 3, 16, 16)).astype(np.uint8)
    frames += (labels * 150).astype(np.uint8)[:, None, None, None, None, None]
    frames[:, :, :, 0] = np.arange(8).reshape(2, 4, 1, 1)
    return ClipBlock(frames, np.zeros((num_videos, 2, 4, 2, 16, 16), np.int8), labels)


def test_blocks_are_addressed_as_one_table() -> None:
    blocks = [colour_block(3, 0), colour_block(4, 1)]
    clips = ClipSet(blocks)
    assert (len(clips), clips.num_segments, clips.frames_per_segment, clips.crop_px) == (7, 2, 4, 16)
    assert clips.labels.tolist() == [0, 1, 0, 0, 1, 0, 1]
    spec = vcm_sdd(num_classes=2, backbone="tiny", heads=4).input_spec
    batch = clips.batch([5, 2], spec)
    assert batch.rgb is not None
    assert np.array_equal(batch.rgb[0].numpy(), blocks[1].frames[2])
    assert np.array_equal(batch.rgb[1].numpy(), blocks[0].frames[2])


def test_a_run_learns_and_repeats_to_the_digit() -> None:
    train, test = ClipSet([colour_block(64, 0)]), ClipSet([colour_block(10, 1), colour_block(11, 2)])
    model = ModelConfig(factory="tiny_models:mean_colour")
    optim = OptimConfig(epochs=20, lr=0.1, seed=3)
    first = fit(model, train, test, optim, num_classes=2, one_sequence=False)
    assert first.predicted.tolist() == test.labels.tolist()
    assert first.losses[-1] < 0.1 < first.losses[0]
    assert first.num_params == 8
    second = fit(model, train, test, optim, num_classes=2, one_sequence=False)
    assert second.losses == first.losses
    whole = fit(model, train, test, optim, num_classes=2, one_sequence=True)
    assert whole.predicted.tolist() == test.labels.tolist()


class FrameNumbers(torch.nn.Module):
    """Records the frame numbers that it is fed (see colour_block)."""

    seen: list[list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = vcm_sdd(num_classes=2, backbone="tiny", heads=4).input_spec
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen = []

    def forward(self, *, rgb: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(value)[0] for value in (self.input_spec.rgb_mean, self.input_spec.rgb_std))
        numbers = ((rgb[..., 0, -1, -1] * std + mean) * 255).round().int()
        self.seen.extend(numbers.flatten(1).tolist())
        return self.weight.expand(len(rgb), 2)


@pytest.mark.parametrize("one_sequence", [False, True])
def test_frames_of_training_and_testing(one_sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = FrameNumbers()
    monkeypatch.setattr("kinoray.demo.ablate_fit.build_model", lambda config, num_classes: network)
    train, test = ClipSet([colour_block(40, 0)]), ClipSet([colour_block(2, 1)])
    fit(ModelConfig(), train, test, OptimConfig(epochs=2), num_classes=2, one_sequence=one_sequence)
    training, testing = network.seen[:80], network.seen[80:]
    for frames in training:
        assert [frame // 2 for frame in frames] == [0, 1, 2, 3]  # one of each of 4 slots of 2
    assert {tuple(frames) for frames in training} > {(0, 2, 4, 6), (1, 3, 5, 7)}
    whole = [[0, 2, 4, 6], [1, 3, 5, 7]] * 2
    assert testing == (whole if one_sequence else [[0, 1, 2, 3, 4, 5, 6, 7]] * 2)


class Marks(torch.nn.Module):
    """Records where the one bright pixel of frames and flow is: [B, (y, x)] of both."""

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = vcm_sdd(num_classes=2, backbone="tiny", heads=4).input_spec
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def forward(self, *, rgb: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        places = []
        for x in (rgb, flow):
            brightest = x.flatten(-2).argmax(dim=-1).flatten(1)
            assert (brightest == brightest[:, :1]).all()  # the same in all frames and channels
            places.append([list(divmod(number, x.shape[-1])) for number in brightest[:, 0].tolist()])
        self.seen.append((places[0], places[1]))
        return self.weight.expand(len(rgb), 2)


def test_training_videos_are_moved_around_the_edges_with_their_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Marks()
    monkeypatch.setattr("kinoray.demo.ablate_fit.build_model", lambda config, num_classes: network)
    block = colour_block(64, 0)
    frames, flow = np.zeros_like(block.frames), np.zeros_like(block.flow)
    frames[..., 3, 5], flow[..., 4, 2] = 255, 127
    clips = ClipSet([ClipBlock(frames, flow, block.labels)])
    fit(ModelConfig(), clips, clips, OptimConfig(epochs=1, batch_size=64), num_classes=2, one_sequence=False)
    (rgb, flows), *testing = network.seen
    assert [[(y + 1) % 16, (x - 3) % 16] for y, x in rgb] == flows
    assert len({tuple(place) for place in rgb}) > 40
    assert all(place == [3, 5] for places, _ in testing for place in places)


def test_whole_video_order_spreads_every_clip_over_the_video() -> None:
    assert whole_video_order(2, 4).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert whole_video_order(3, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert whole_video_order(1, 4).tolist() == [[0, 1, 2, 3]]


def test_notes_of_the_network_describe_its_stc() -> None:
    torch.manual_seed(0)
    assert vcm_sdd(num_classes=2, backbone="tiny", heads=4, stc=False).notes(num_frames=4, crop_px=64) == {}
    identity = vcm_sdd(num_classes=2, backbone="tiny", heads=4, radius=0).notes(num_frames=4, crop_px=64)
    assert identity == {"stc_self_weight": 1.0, "stc_effective_neighbours": 1.0}
    blur = vcm_sdd(num_classes=2, backbone="tiny", heads=4)
    assert blur.head.rgb_stc is not None
    with torch.no_grad():
        blur.head.rgb_stc.w_g.zero_()  # equal weights for all neighbours
    notes = blur.notes(num_frames=4, crop_px=64)
    reach = [sum(abs(a - b) <= 2 for b in range(4)) for a in range(4)]
    sizes = [a * b * c for a in reach for b in reach for c in reach]
    assert notes["stc_effective_neighbours"] == pytest.approx(np.mean(sizes), rel=1e-6)
    assert notes["stc_self_weight"] == pytest.approx(np.mean([1 / size for size in sizes]), rel=1e-6)


# ---- the table


def result(row: str, scale: str | None, seed: int, top1: float, **notes: float) -> RunResult:
    return RunResult(
        row=row,
        scale=scale,  # type: ignore[arg-type]
        seed=seed,
        digest="d",
        top1=top1,
        mover_top1=top1 + 1,
        direction_top1=top1 + 2,
        losses=(2.0, 1.0),
        num_params=10,
        cpu_s=60.0,
        notes=notes,
    )


STUDY = [
    result("tsn_rgb", None, 0, 24.0),
    result("tsn_flow", None, 0, 31.0),
    result("tsm_rgb", None, 0, 26.0),
    result("neither", None, 2, 46.0),
    result("neither", None, 0, 44.0),
    result("neither", None, 1, 45.0),
    result("stc", None, 0, 45.5, stc_self_weight=0.9, stc_effective_neighbours=1.5),
    result("mff", "frobenius", 0, 64.0),
    result("mff", "dim", 0, 96.0),
    result("mff", "dim", 1, 98.0),
    result("both", "frobenius", 0, 70.5, stc_self_weight=0.75, stc_effective_neighbours=3.0),
    result("both", "dim", 0, 95.0, stc_self_weight=0.5, stc_effective_neighbours=2.0),
    result("both", "dim", 1, 92.0, stc_self_weight=1.0, stc_effective_neighbours=1.0),
]


def test_the_table_is_means_and_sample_deviations() -> None:
    study = tabulate(STUDY)
    neither = study.scores["neither", None]
    assert neither.values == (44.0, 45.0, 46.0)  # by seed, not by line
    assert (neither.mean, neither.spread, neither.mover, neither.direction) == (45.0, 1.0, 46.0, 47.0)
    both = study.scores["both", "dim"]
    assert (both.mean, both.spread) == (93.5, pytest.approx(3 / math.sqrt(2)))
    assert both.notes == {"stc_self_weight": 0.75, "stc_effective_neighbours": 1.5}
    assert study.scores["mff", "frobenius"].spread is None
    assert study.gain("mff", "neither", "frobenius") == 19.0
    assert study.gain("mff", "neither", "dim") == 52.0
    assert study.gain("both_random", "mff", "dim") is None
    assert table_page(study).splitlines() == [
        "| top-1, % | scale as printed | scale sqrt(d) | paper, K400 |",
        "| --- | ---: | ---: | ---: |",
        "| TSN, RGB | 24.0 | same | 71.3 |",
        "| TSN, flow | 31.0 | same | - |",
        "| TSM, RGB | 26.0 | same | 75.1 |",
        "| No_STC No_MFF | 45.0 +- 1.0 | same | 71.7 |",
        "| STC No_MFF | 45.5 | same | 73.9 |",
        "| No_STC MFF | 64.0 | 97.0 +- 1.4 | 78.5 |",
        "| STC MFF | 70.5 | 93.5 +- 2.1 | 80.1 |",
        "| STC MFF, random STC init | - | - | - |",
    ]


def test_checks_say_what_came_out() -> None:
    found = {check.name: (check.value, check.ok) for check in tabulate(STUDY).checks}
    assert found == {
        "tsn_rgb_below_ceiling": (24.0, True),
        "tsn_flow_below_ceiling": (31.0, False),
        "neither_below_late_fusion": (45.0, True),
        "mff_gain_frobenius": (19.0, False),
        "near_stc_harmless_frobenius": (6.5, False),
        "mff_gain_dim": (52.0, True),
        "near_stc_harmless_dim": (-3.5, True),
    }
    assert tabulate([]).checks == ()


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    config = AblateConfig(out=str(tmp_path / "somewhere"), seeds=(0, 1))
    page = doc_page(tabulate(STUDY), config, CLIP, STUDY)
    assert table_page(tabulate(STUDY)) in page
    assert "--seeds 0 1 --doc docs/ablation.md" in page
    assert "+19.0 points with the scale as printed, +52.0 with sqrt(d)" in page
    assert "| No_STC MFF, sqrt(d) | 96.0 / 98.0 | 98.0 | 99.0 | - | - |" in page
    assert "| STC MFF, sqrt(d) | 95.0 / 92.0 | 94.5 | 95.5 | 0.750 | 1.50 |" in page
    assert "the scale decides" in page
    assert "13 runs took 13 minutes of CPU" in page
    assert str(tmp_path) not in page
    assert page.isascii()
    assert "{" not in page
    partial = doc_page(tabulate(STUDY[:5]), config, CLIP, STUDY[:5])  # a study of which half is there still has a page
    assert "STC with MFF" not in partial


# ---- the job


def test_rows_name_networks_that_exist_and_differ() -> None:
    runs = planned_runs(AblateConfig(out="out"))
    assert len(runs) == 33
    assert len({run.digest for run in runs}) == 33
    assert [run.optim.seed for run in runs] == sorted(run.optim.seed for run in runs)
    one = planned_runs(AblateConfig(out="elsewhere", doc="x.md", seeds=(2,), resources=ResourcesConfig(num_workers=1)))
    assert {run.digest for run in one} == {run.digest for run in runs if run.optim.seed == 2}
    for changed in (
        AblateConfig(out="out", num_train=800),
        AblateConfig(out="out", data_seed=1),
        AblateConfig(out="out", optim=OptimConfig(lr=1e-3)),
        AblateConfig(out="out", quick=True),
    ):
        assert not {run.digest for run in planned_runs(changed)} & {run.digest for run in runs}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-train", "12"], "num_train must be a multiple of 8, at least 8, got 12"),
        (["--seeds", "0", "0"], r"seeds must be different whole numbers of at least 0, got \(0, 0\)"),
        (["--optim.precision", "bf16"], "optim.precision must be fp32 in this study, got 'bf16'"),
    ],
)
def test_bad_settings_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--out", "out", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "results.jsonl")
    assert read_results(Storage(), uri) == []
    lines = [json.dumps(job.asdict(item)) for item in STUDY]
    Path(uri).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_results(Storage(), uri) == STUDY
    Path(uri).write_text("\n".join([*lines[:2], lines[2][:-9]]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 3 of .*results.jsonl is not a result"):
        read_results(Storage(), uri)


def tiny(out: Path, **changes: object) -> AblateConfig:
    return AblateConfig(
        **{  # type: ignore[arg-type]
            "out": str(out),
            "seeds": (0,),
            "num_train": 16,
            "num_test": 8,
            "optim": OptimConfig(epochs=1, batch_size=8),
            **changes,
        }
    )


@pytest.mark.ray
def test_the_whole_study_runs_and_resumes(ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, doc=str(tmp_path / "doc.md"))
    summary = ablate(config)
    printed = capsys.readouterr().out
    assert "ablate: making the set: 24/24 videos" in printed
    assert "11/11 runs" in printed
    assert printed.count("ok: ") == len(summary["checks"]) == 7
    results = read_results(Storage(), str(tmp_path / "results.jsonl"))
    assert {(item.row, item.scale) for item in results} == {(row.name, s) for row in ROWS for s in row.scales()}
    assert all(item.top1 * 8 % 100 == 0 for item in results)  # 8 test videos, each counted once
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8")) == json.loads(json.dumps(summary))
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") in (tmp_path / "doc.md").read_text(encoding="utf-8")

    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    stranger = json.dumps({**json.loads(lines[0]), "digest": "of another study", "top1": 99.0}) + "\n"
    (tmp_path / "results.jsonl").write_text("".join([stranger, *lines[:9]]), encoding="utf-8")
    again = ablate(config)
    printed = capsys.readouterr().out
    assert "9 done already; 1 results of other settings" in printed
    assert "2/2 runs" in printed
    written = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert written[:10] == [stranger, *lines[:9]]  # what was finished is as it was
    # Two runs at a time: which of them ends first is not decided.
    assert by_digest(written[10:]) == by_digest(lines[9:])
    assert again["scores"] == summary["scores"]

    assert ablate(config)["scores"] == summary["scores"]
    assert "making the set" not in capsys.readouterr().out


def by_digest(lines: list[str]) -> dict[str, dict[str, object]]:
    """Results by the digest of their settings, without the time they took."""
    results = [json.loads(line) for line in lines]
    return {item["digest"]: {name: value for name, value in item.items() if name != "cpu_s"} for item in results}


@pytest.mark.ray
def test_a_run_that_fails_keeps_those_before_it(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Row("bad", "Bad", "vcm_sdd:vcm_sdd", {"backbone": "resnet7"})
    monkeypatch.setattr(job, "ROWS", (ROWS[0], bad, ROWS[1]))
    with pytest.raises(ConfigError, match=r"model.options: backbone must be .* got 'resnet7'"):
        ablate(tiny(tmp_path, resources=ResourcesConfig(num_workers=1)))
    assert [item.row for item in read_results(Storage(), str(tmp_path / "results.jsonl"))] == ["tsn_rgb"]


def test_a_block_is_what_the_platform_decodes() -> None:
    block = make_block("test", range(3, 5), 0)
    assert block.labels.tolist() == [3, 4]
    frames, _ = binding_clip("test", 4)
    clip = decode_clip(make_video(frames), CLIP, with_flow=True)
    assert clip.flow is not None
    assert np.array_equal(block.frames[1], clip.frames)
    assert np.array_equal(block.flow[1], clip.flow)
    sampled = frames[clip.indices].transpose(0, 1, 4, 2, 3)  # what was drawn, before H.264
    assert np.corrcoef(clip.frames.ravel(), sampled.ravel())[0, 1] > 0.9
    earlier = frames[np.maximum(clip.indices - 2, 0)].transpose(0, 1, 4, 2, 3)
    assert (
        np.corrcoef(clip.frames.ravel(), earlier.ravel())[0, 1]
        < np.corrcoef(clip.frames.ravel(), sampled.ravel())[0, 1]
    )


def test_the_plane_that_flow_looks_at_does_not_show_the_drawing() -> None:
    """The decoded cards' ink, as a contrast in grey levels: plain in red and blue, lost in the texture in green."""
    contrast: list[list[float]] = []
    for number in range(48):
        frames, truth = binding_clip("train", number)
        clip = decode_clip(make_video(frames), CLIP, with_flow=False)
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
