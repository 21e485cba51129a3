"""Shots: where they begin, on scenes that are joined here and on joined real clips; and windows that end at cuts.

The real clips are no part of the repository: what needs them skips where ../shared/data/real_clips is absent.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from decode_reference import remux
from guide_blocks import ROOT
from kinoray.config.scoring import ViewsConfig, WindowsConfig
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, MediaOverBudget
from kinoray.label.config import LabelConfig
from kinoray.video.frames import decode
from kinoray.video.request import Views
from kinoray.video.sandbox import pool
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.sandbox.process import Answer
from kinoray.video.shots import Shots, first_frames, shots_in

FPS = 25
REAL = ROOT.parent / "shared" / "data" / "real_clips"
NEVER_AT_CUTS = {"x264-params": "scenecut=0"}
CONFIG = DecodeConfig()


def scene(seed: int, num_frames: int, pan_px: int = 1, height: int = 64, width: int = 96) -> np.ndarray:
    """A camera that turns over a picture of its own, uint8 [N, H, W, 3]."""
    grain = np.random.default_rng(seed).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    picture = cv2.resize(grain, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([np.roll(picture, -pan_px * number, axis=1)[:, :width] for number in range(num_frames)])


def joined(*lengths: int, **how: Any) -> bytes:
    """Scenes of so many frames, one after the other, each another one."""
    return make_video(np.concatenate([scene(seed, length) for seed, length in enumerate(lengths)]), fps=FPS, **how)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as one:
        yield one


# What is a cut


def pictures(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).reshape(-1, 64 * 96 * 3).astype(np.int16)


ONE, OTHER = scene(1, 20, pan_px=0), scene(2, 20)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        pytest.param(pictures(ONE, OTHER), [20], id="a cut"),
        pytest.param(pictures(ONE, OTHER[:8], ONE), [20, 28], id="there and back"),
        pytest.param(pictures(ONE, OTHER[:3], ONE), [], id="too short for a shot"),
        pytest.param(pictures(ONE, np.full_like(ONE[:1], 255), ONE), [], id="a flash"),
        pytest.param(pictures(scene(1, 40, pan_px=12)), [], id="a camera that turns fast"),
        pytest.param(
            pictures(ONE, np.stack([ONE[-1] * (1 - t) + OTHER[0] * t for t in np.linspace(0, 1, 25)]), OTHER),
            [],
            id="a fade",
        ),
        pytest.param(pictures(ONE // 8, OTHER // 8), [], id="too dark to tell"),
        pytest.param(pictures(ONE[:1]), [], id="a single picture"),
    ],
)
def test_a_cut_changes_the_picture_at_once_and_for_good(frames: np.ndarray, expected: list[int]) -> None:
    assert first_frames(frames, 5) == expected


def test_pictures_that_are_repeated_do_not_make_motion_a_cut() -> None:
    """5 frames a second, brought to 25."""
    assert first_frames(pictures(scene(1, 8, pan_px=12).repeat(5, axis=0)), 5) == []


def test_a_cut_with_a_mixed_frame_is_one_cut() -> None:
    """As conversions of the frame rate leave them."""
    mixed = (ONE[-1:].astype(int) + OTHER[:1]) // 2
    (found,) = first_frames(pictures(ONE, mixed, OTHER), 5)
    assert found in (20, 21)


# Of videos


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"gop": 12}, id="key frames at cuts, too"),
        pytest.param({"gop": 250, "options": NEVER_AT_CUTS}, id="one key frame"),
        pytest.param({"gop": 40, "options": NEVER_AT_CUTS | {"bf": "3"}}, id="key frames elsewhere, B-frames"),
        pytest.param({"gop": 1}, id="nothing but key frames"),
        pytest.param({"codec": "mpeg4", "container": "avi", "gop": 30}, id="AVI without times"),
        pytest.param({"codec": "mpeg2video", "container": "mpegts", "gop": 15}, id="MPEG-TS"),
    ],
)
def test_shots_begin_where_scenes_were_joined(how: dict[str, Any], sandbox: Sandbox) -> None:
    data = joined(30, 45, 20, 8, 60, **how)
    found = sandbox.shots(data, CONFIG)
    assert (found.firsts.tolist(), found.num_frames) == ([30, 75, 95, 103], 163)
    assert sandbox.shots(data, CONFIG).firsts.tolist() == found.firsts.tolist()


def test_a_single_shot_is_hardly_decoded(sandbox: Sandbox) -> None:
    """Twelve key frames, and what follows the last one."""
    found = sandbox.shots(make_video(scene(3, 300, pan_px=0), fps=FPS, gop=25), CONFIG)
    assert (found.firsts.tolist(), found.frames_decoded) == ([], 12 + 25)


@pytest.mark.parametrize("size", [31, 50, 75])
def test_shots_do_not_depend_on_the_stretches_that_are_looked_at(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = joined(30, 45, 20, 8, 60, gop=40, options=NEVER_AT_CUTS)
    monkeypatch.setattr("kinoray.video.shots.NUM_FRAMES_AT_ONCE", size)
    found = [first for begin in range(0, 163, size) for first in shots_in(data, begin, CONFIG).firsts.tolist()]
    assert found == [30, 75, 95, 103]
    assert shots_in(data, 163, CONFIG).firsts.tolist() == []


def test_a_large_frame_is_looked_at_like_any_other() -> None:
    """libswscale shrinks by no more than 120 times at once."""
    frames = np.concatenate([np.full((6, 32, 4096, 3), value, np.uint8) for value in (40, 200)])
    assert shots_in(make_video(frames, fps=FPS), 0, CONFIG).firsts.tolist() == [6]


def test_what_is_damaged_hides_no_cuts_elsewhere(sandbox: Sandbox) -> None:
    data = joined(40, 40, 40, gop=20)
    assert 40 in sandbox.shots(remux(data, "mp4", spoil=frozenset(range(70, 90))), CONFIG).firsts
    assert sandbox.shots(remux(data, "mp4", spoil=frozenset(range(1, 120))), CONFIG).firsts.tolist() == []


# Of real clips


def real_clip(path: Path, begin_s: float, num_frames: int) -> np.ndarray:
    """Frames from a time on, at 25 a second, uint8 [N, 96, 160, 3]."""
    found: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or FPS)
        for number, frame in enumerate(container.decode(stream)):
            while len(found) < num_frames and number / fps >= begin_s + len(found) / FPS:
                found.append(frame.to_ndarray(format="rgb24", width=160, height=96))
            if len(found) == num_frames:
                return np.stack(found)
    raise AssertionError(f"{path} has fewer than {num_frames} frames")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_cuts_of_joined_real_clips_are_found(sandbox: Sandbox) -> None:
    """Nine clips, of which none has a cut of its own: shaken cameras, one of 5 frames a second. Cuts lie at key frames,
    or between them; two clips come in turn. One is found that is none: the first camera is pushed (frame 42)."""
    names = sorted(path for path in REAL.iterdir() if path.suffix in (".mp4", ".avi", ".mkv"))
    lengths = (95, 60, 81, 32, 70, 46, 25, 66, 38)
    clips = [real_clip(path, 0.0, length) for path, length in zip(names, lengths, strict=True)]
    parts = [*clips, *(clips[number][:20] for number in (0, 1, 0, 1, 0))]
    cuts = np.cumsum([len(part) for part in parts])[:-1].tolist()
    for how in ({"gop": 250}, {"gop": 250, "options": NEVER_AT_CUTS}, {"gop": 48, "options": NEVER_AT_CUTS}):
        data = make_video(np.concatenate(parts), fps=FPS, **how)
        assert sandbox.shots(data, CONFIG).firsts.tolist() == [42, *cuts]


@pytest.mark.parametrize(
    ("firsts", "num_frames"),
    [([0, 5], 10), ([5, 5], 10), ([7, 5], 10), ([5, 10], 10), ([-1], 10), ([1], -1)],
)
def test_shots_that_cannot_be_are_refused(firsts: list[int], num_frames: int) -> None:
    with pytest.raises(ValueError, match=r"shots at|num_frames"):
        Shots(np.array(firsts, np.int64), num_frames, 0)


def test_a_decoder_is_not_believed_shots_of_another_stretch() -> None:
    read = pool._shots_from(3000)
    record = {"firsts": "array", "num_frames": 9000, "frames_decoded": 0}
    assert read(Answer({"record": record}, {"firsts": np.array([3000, 5999])})).firsts.tolist() == [3000, 5999]
    for wrong in ([2999], [6000]):
        with pytest.raises(ValueError, match=f"shots at {wrong[0]}|stretch that begins at frame 3000"):
            read(Answer({"record": record}, {"firsts": np.array(wrong)}))


def test_more_shots_than_a_video_may_have_are_refused() -> None:
    some = Shots(np.arange(1, 10_001), 20_000, 0)
    with pytest.raises(MediaOverBudget, match=r"10,001 cuts are more than the 10,000 .* without window_at_cuts"):
        some + Shots(np.array([10_001]), 20_000, 0)


# Windows


def windows_of(data: bytes, shots: tuple[int, ...], length_s: float, stride_s: float) -> Any:
    clip = ClipConfig(
        sample=SampleConfig(num_segments=2, frames_per_segment=1), view=ViewConfig(resize_px=36, crop_px=32)
    )
    views = ViewsConfig(windows=WindowsConfig(length_s=length_s, stride_s=stride_s, at_cuts=True))
    return decode(data, Views(views=views, shots=shots), clip.without_flow())


def test_each_shot_has_windows_of_its_own() -> None:
    found = windows_of(joined(30, 45, 20), (30, 75), 1.0, 0.8)
    assert found.windows.tolist() == [[0, 25], [5, 30], [30, 55], [50, 75], [75, 95]]
    assert found.window_times == pytest.approx(found.windows / FPS)
    assert found.indices[0][-1].tolist() == [[80], [90]]


def test_each_shot_has_windows_of_its_own_where_frames_do_not_come_evenly() -> None:
    """Frames 0 .. 9 come at 5 a second, the others at 25; one shot begins at 2 s, another at 3."""
    pts = [*range(0, 50, 5), *range(50, 100)]
    found = windows_of(make_video(scene(0, 60), fps=FPS, pts=pts), (10, 35), 0.8, 0.8)
    assert found.window_times == pytest.approx(
        np.array([[0, 0.8], [0.8, 1.6], [1.2, 2], [2, 2.8], [2.2, 3], [3, 3.8], [3.2, 4]])
    )
    assert found.windows[:, 0].tolist() == [0, 4, 6, 10, 15, 35, 40]
    assert found.windows[[2, 4], 1].tolist() == [10, 35]


def test_windows_at_cuts_need_windows() -> None:
    with pytest.raises(ConfigError, match=r"^window_at_cuts must be off without window_s, got True"):
        LabelConfig(source="videos", checkpoint="run", out="out", window_at_cuts=True)
