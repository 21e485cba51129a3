"""Dense clips: index by index against the published samplers, and as they are decoded, cached and labelled.

torchvision runs here. MMAction2 and PySlowFast do not: theirs are written anew below, a frame at a time, from what
their sources do (mmaction/datasets/transforms/loading.py of MMAction2 1.2; slowfast/datasets/decoder.py), and tables.
"""

import itertools
import math
import warnings
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets.samplers import RandomClipSampler, UniformClipSampler
from torchvision.datasets.video_utils import VideoClips

from decode_reference import moving
from kinoray.config.scoring import ViewsConfig, WindowsConfig
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, MediaOverBudget
from kinoray.video.frames import decode
from kinoray.video.request import Sampled, Views
from kinoray.video.sample import clip_rng, cut_windows, dense_indices, dense_reach, segment_indices

LENGTHS = (1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 128, 250, 299, 300, 1000)
RATES = (24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0)
SHAPES = ((16, 4), (8, 8), (32, 2), (64, 1), (5, 3))


def dense(frames: int, stride: int, **others: Any) -> SampleConfig:
    return SampleConfig(num_segments=1, frames_per_segment=frames, stride=stride, **others)


def flat(indices: np.ndarray) -> list[list[int]]:
    return indices.reshape(len(indices), -1).tolist()


# MMAction2


def mmaction2(
    num_frames: int, count: int, interval: int, num_clips: int, ratio: float | None, short: Literal["loop", "repeat"]
) -> list[list[int]]:
    """SampleFrames(clip_len=count, frame_interval=interval, num_clips, test_mode=True), target_fps where ratio is."""
    length: float = (count - 1) * interval + 1 if ratio is None else max(1, count * interval * ratio)
    free = max(num_frames - length, 0)
    spread = [int(place) for place in np.linspace(0, length - 1, count)]
    clips = []
    for number in range(num_clips):
        if num_clips == 1:
            start = int(free // 2)
        elif ratio is None:
            start = round(number * (free / (num_clips - 1)))
        else:
            start = number * math.floor(free / (num_clips - 1))
        clip: list[int] = []
        for place in range(count):
            within = place * interval if ratio is None else spread[place]
            index = start + within
            if index >= num_frames:
                index = index % num_frames if short == "loop" else clip[-1]
            clip.append(index)
        clips.append(clip)
    return clips


@pytest.mark.parametrize("ratio", [None, 1.0, 0.8, 25 / 30, 2.0], ids=str)
@pytest.mark.parametrize("short", ["loop", "repeat"])
def test_mmaction2_index_by_index(short: Literal["loop", "repeat"], ratio: float | None) -> None:
    setting: Literal["loop", "repeat_last"] = "loop" if short == "loop" else "repeat_last"
    for num_frames, (count, interval), num_clips in itertools.product(LENGTHS, SHAPES, (1, 2, 3, 10)):
        config = dense(count, interval, placement="mmaction2", short=setting, fps=30.0 if ratio else 0.0)
        found = dense_indices(num_frames, 30.0 * (ratio or 1), config, num_clips, placed=True)
        assert flat(found) == mmaction2(num_frames, count, interval, num_clips, ratio, short), (num_frames, config)
        if num_clips == 1:
            assert flat(dense_indices(num_frames, 30.0 * (ratio or 1), config)) == flat(found)


def test_mmaction2_by_hand() -> None:
    """100 frames, 4 every 8th: a clip is 25 frames long and may start at 0 .. 75."""
    config = dense(4, 8, short="repeat_last")
    assert flat(dense_indices(100, 30.0, config)) == [[37, 45, 53, 61]]
    assert [clip[0] for clip in flat(dense_indices(100, 30.0, config, 3))] == [0, 38, 75]  # 37.5 to the even one
    assert flat(dense_indices(20, 30.0, config)) == [[0, 8, 16, 16]]
    assert flat(dense_indices(20, 30.0, replace(config, short="loop"))) == [[0, 8, 16, 4]]


def test_mmaction2_samples_single_frames_as_spread_clips_are() -> None:
    """Its 2D networks (clip_len 1, num_clips S): the middle of each of S parts."""
    for num_frames, count in itertools.product(LENGTHS, (3, 8, 25)):
        average = num_frames / count
        expected = [min(int(number * average + average / 2), num_frames - 1) for number in range(count)]
        found = segment_indices(num_frames, SampleConfig(num_segments=count, frames_per_segment=1))
        assert found.reshape(-1).tolist() == expected


# PySlowFast


def slowfast(num_frames: int, count: int, rate: int, num_clips: int, fps: float, target: float) -> list[list[int]]:
    """get_start_end_idx and temporal_sampling with NUM_FRAMES=count, SAMPLING_RATE=rate, TARGET_FPS=target."""
    size = count * rate * fps / target
    delta = max(num_frames - size, 0)
    clips = []
    for number in range(num_clips):
        start = delta * number / num_clips
        index = torch.linspace(start, start + size - 1, count)
        clips.append(torch.clamp(index, 0, num_frames - 1).long().tolist())
    return clips


@pytest.mark.parametrize("fps", RATES)
def test_slowfast_index_by_index(fps: float) -> None:
    for num_frames, (count, rate), num_clips in itertools.product(LENGTHS, SHAPES, (1, 3, 10)):
        config = dense(count, rate, placement="slowfast", short="repeat_last", fps=30.0)
        found = dense_indices(num_frames, fps, config, num_clips, placed=True)
        assert flat(found) == slowfast(num_frames, count, rate, num_clips, fps, 30.0), (num_frames, config)


def test_slowfast_by_hand() -> None:
    """300 frames at 30 fps, 8x8: 64 frames of which the first and the last are taken, 236 are free, 23.6 a step."""
    config = dense(8, 8, placement="slowfast", short="repeat_last", fps=30.0)
    clips = flat(dense_indices(300, 30.0, config, 10))
    assert clips[0] == [0, 9, 18, 27, 36, 45, 54, 63]
    assert clips[1] == [23, 32, 41, 50, 59, 68, 77, 86]
    assert clips[9][-1] == 212 + 63
    assert flat(dense_indices(300, 30.0, config))[0][0] == 118
    assert flat(dense_indices(300, 60.0, config, 10))[0] == [0, 18, 36, 54, 72, 90, 108, 127]


# torchvision, which runs here


class Clips(VideoClips):
    """torchvision's clips of videos that need not exist."""

    def __init__(self, num_frames: int, fps: float) -> None:
        self.video_pts, self.video_fps = [torch.arange(num_frames)], [fps]


def torchvision_clips(num_frames: int, count: int, fps: float, rate: float | None, num_clips: int) -> list[list[int]]:
    clips = Clips(num_frames, fps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clips.compute_clips(count, 1, rate)
    if not len(clips.clips[0]):
        return []
    return [clips.clips[0][place].tolist() for place in UniformClipSampler(clips, num_clips)]


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("rate", [None, 7.5, 15.0, 25.0, 30.0])
def test_torchvision_index_by_index(fps: float, rate: float | None) -> None:
    compared = 0
    for num_frames, count, num_clips in itertools.product(LENGTHS, (16, 32, 128), (1, 2, 5, 12)):
        if num_frames == 1 and rate and fps < rate:
            continue  # torchvision fails on it
        expected = torchvision_clips(num_frames, count, fps, rate, num_clips)
        config = dense(count, 1, placement="torchvision", short="repeat_last", fps=rate or 0.0)
        found = flat(dense_indices(num_frames, fps, config, num_clips, placed=True))
        if expected:
            assert found == expected, (num_frames, config)
            compared += 1
        else:  # it leaves such videos out
            assert all(clip[0] == 0 and clip[-1] == max(clip) for clip in found)
    assert compared >= 36


def test_torchvision_draws_from_the_same_clips() -> None:
    clips = Clips(100, 30.0)
    clips.compute_clips(16, 1, 15.0)
    every = {tuple(clips.clips[0][place].tolist()) for place in RandomClipSampler(clips, 1000)}
    config = dense(16, 1, placement="torchvision", fps=15.0)
    drawn = {tuple(flat(dense_indices(100, 30.0, config, rng=clip_rng(0, n, "v")))[0]) for n in range(1000)}
    assert drawn == every
    assert len(every) == 50 - 16 + 1


# Ours


@pytest.mark.parametrize(
    ("fps", "steps"), [(25.0, 1), (30.0, 1), (15.0, 1), (50.0, 2), (60.0, 2), (120.0, 5), (0.0, 1)]
)
def test_even_takes_the_nearest_whole_stride(fps: float, steps: int) -> None:
    config = dense(8, 1, fps=25.0, placement="even")
    found = flat(dense_indices(300, fps, config, 5))
    assert found == mmaction2(300, 8, steps, 5, None, "loop")


# What holds for all of them

CONFIGS = st.builds(
    lambda s, t, stride, fps, placement, short: SampleConfig(
        num_segments=s, frames_per_segment=t, stride=stride, fps=fps, placement=placement, short=short
    ),
    st.integers(1, 4),
    st.integers(1, 32),
    st.integers(1, 40),
    st.sampled_from([0.0, 7.5, 15.0, 25.0, 30.0]),
    st.sampled_from(["mmaction2", "slowfast", "torchvision", "even"]),
    st.sampled_from(["loop", "repeat_last"]),
)


@given(
    num_frames=st.integers(1, 20_000),
    fps=st.sampled_from([0.0, 12.0, 29.97, 30.0, 59.94, 120.0]),
    config=CONFIGS,
    num_clips=st.integers(1, 12),
    seed=st.none() | st.integers(0, 100),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_frames_are_of_the_video_and_never_fall(
    num_frames: int, fps: float, config: SampleConfig, num_clips: int, seed: int | None
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    num_clips = num_clips if seed is None else 1
    indices = dense_indices(num_frames, fps, config, num_clips, rng=rng)
    assert indices.dtype == np.int64
    assert indices.shape == (num_clips, config.num_segments, config.frames_per_segment)
    assert indices.min() >= 0
    assert indices.max() < num_frames
    clips = indices.reshape(num_clips, -1)
    if config.short == "repeat_last":
        assert (np.diff(clips, axis=1) >= 0).all()
        assert (np.diff(clips[:, 0]) >= 0).all()
    if config.short == "repeat_last" or num_frames > 2000:
        step = config.stride * (fps / config.fps if fps and config.fps else 1.0)  # of a clip, in frames of the video
        slack = 64 + math.ceil(config.num_segments * config.frames_per_segment * step / 2)
        place = int(dense_reach(num_clips, placed=False, drawn=seed is not None) * num_frames) - slack
        assert indices.max() >= min(place, num_frames - 1 - config.stride * 10)


@pytest.mark.parametrize("placement", ["mmaction2", "slowfast", "torchvision"])
def test_25_30_and_60_fps_show_the_same_motion(placement: Literal["mmaction2", "slowfast", "torchvision"]) -> None:
    """Ten seconds each: the frames of a clip are of the same times, within a frame of each video and a rounding."""
    config = dense(16, 4, placement=placement, fps=30.0)
    times = [dense_indices(round(10 * fps), fps, config, 5)[:, 0] / fps for fps in (25.0, 30.0, 60.0)]
    for other in times[1:]:
        assert np.abs(other - times[0]).max() < 2 / 25 + 4 * 2 / 30


@pytest.mark.parametrize("placement", ["mmaction2", "slowfast", "torchvision"])
def test_every_start_is_drawn_equally_often(placement: Literal["mmaction2", "slowfast", "torchvision"]) -> None:
    config, rng = dense(4, 2, placement=placement), np.random.default_rng(0)
    starts = [int(dense_indices(20, 30.0, config, rng=rng)[0, 0, 0]) for _ in range(2600)]
    counts = np.bincount(starts)
    assert len(counts) == (14 if placement == "torchvision" else 13)  # it ends at the last frame, the others before it
    expected = len(starts) / len(counts)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_draws_leave_the_generator_as_spread_clips_do() -> None:
    """So that a sweep over both draws the same crops; and clips of other lengths often begin together."""
    after, same = set(), 0
    for seed in range(40):
        starts = []
        for config in (dense(8, 2), dense(8, 4), SampleConfig()):
            rng = np.random.default_rng(seed)
            if config.is_dense:
                starts.append(int(dense_indices(300, 30.0, config, rng=rng)[0, 0, 0]))
            else:
                segment_indices(300, config, rng)
            after.add((seed, int(rng.integers(2**62))))
        same += starts[0] == starts[1]
    assert len(after) == 40
    assert same > 30


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample.fps must be 0 with sample.stride 0, got 25"):
        SampleConfig(fps=25.0)
    with pytest.raises(ConfigError, match=r"sample.stride must be in 0 .. 1000, got -1"):
        SampleConfig(stride=-1)
    with pytest.raises(ValueError, match="got 0 and 1"):
        dense_indices(0, 30.0, dense(4, 2))


# Decoding


@pytest.fixture(scope="module")
def long_video() -> bytes:
    """50 s of 24 fps in groups of 12 frames."""
    return make_video(moving(1200, 32, 32), fps=24, gop=12, options={"preset": "ultrafast"})


SMALL = ViewConfig(resize_px=16, crop_px=16)


def test_only_the_groups_of_pictures_that_a_dense_clip_touches_are_decoded(long_video: bytes) -> None:
    clip = ClipConfig(sample=dense(16, 4), view=SMALL).without_flow()
    found = decode(long_video, Sampled(), clip).clip()
    first, last = 569, 569 + 60
    assert found.indices.reshape(-1).tolist() == list(range(first, last + 1, 4))
    # 61 frames in 6 groups, the last one up to its wanted frame.
    assert found.frames_decoded <= last + 1 - first // 12 * 12
    spread = decode(long_video, Sampled(), replace(clip, sample=SampleConfig(num_segments=16, frames_per_segment=1)))
    assert spread.clip().indices.max() > 1100
    drawn = decode(long_video, Sampled(rng=clip_rng(0, 0, "v")), clip).clip()
    assert drawn.frames_decoded <= 61 + 11
    views = decode(long_video, Views(views=ViewsConfig(temporal=3)), clip)
    assert views.indices[0][:, 0, 0].tolist() == [0, 570, 1139]  # 569.5 to the even one
    assert views.frames_decoded <= 3 * (61 + 11)


def test_a_dense_clip_of_a_long_video_needs_few_of_max_frames() -> None:
    """In groups it needs those it touches; in one long group all before it, which the index tells beforehand."""
    frames = moving(400, 32, 32)
    clip = ClipConfig(sample=dense(8, 1), view=SMALL, decode=DecodeConfig(max_frames=30)).without_flow()
    assert decode(make_video(frames, gop=12), Sampled(), clip).clip().frames_decoded <= 30
    in_one = make_video(frames, gop=400, options={"sc_threshold": "0"})
    with pytest.raises(MediaOverBudget, match=r"136 or more frames to decode are more than decode.max_frames = 30"):
        decode(in_one, Sampled(), clip)
    with pytest.raises(MediaOverBudget, match=r"256 or more frames"):
        decode(in_one, Views(views=ViewsConfig(temporal=5)), clip)


def test_a_clip_that_begins_again_shows_its_frames_in_that_order() -> None:
    """5 frames, every third: 0, 3, 1 are three different frames, as many as the clip has, and not in order."""
    data = make_video(moving(5, 32, 32), fps=24)
    every = decode(data, Sampled(), ClipConfig(sample=dense(5, 1), view=SMALL)).clip()
    found = decode(data, Sampled(), ClipConfig(sample=dense(3, 3), view=SMALL)).clip()
    assert found.indices.tolist() == [[0, 3, 1]]
    assert np.array_equal(found.frames, every.frames[:, [0, 3, 1]])
    assert np.array_equal(found.flow, every.flow[:, [0, 3, 1]])  # type: ignore[index]


def test_clips_lie_over_each_window_of_a_long_video(long_video: bytes) -> None:
    windows = WindowsConfig(length_s=20.0, stride_s=20.0)
    sample = dense(8, 2, fps=12.0, placement="torchvision")
    clip = ClipConfig(sample=sample, view=SMALL).without_flow()
    for views in (ViewsConfig(temporal=2, windows=windows), ViewsConfig(placed=True, windows=windows)):
        found = decode(long_video, Views(views=views), clip)
        expected = [
            begin + dense_indices(end - begin, 24.0, sample, views.temporal, placed=views.placed)
            for begin, end in cut_windows(1200, 24.0, windows).tolist()
        ]
        assert found.indices[0].tolist() == np.concatenate(expected).tolist()
    assert found.indices[0][:, 0, 0].tolist() == [0, 480, 720]


def test_each_window_of_an_uneven_video_has_its_own_rate() -> None:
    """2 s at 6 fps, then 2 s at 24 fps: a published sampler would count each as a video of that rate."""
    data = make_video(moving(60, 32, 32), fps=24, pts=[*range(0, 48, 4), *range(48, 96)])
    sample = dense(4, 2, fps=12.0, placement="torchvision")
    views = ViewsConfig(windows=WindowsConfig(length_s=2.0, stride_s=2.0))
    found = decode(data, Views(views=views), ClipConfig(sample=sample, view=SMALL).without_flow())
    expected = [dense_indices(12, 6.0, sample), 12 + dense_indices(48, 24.0, sample)]
    assert found.indices[0].tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
def test_a_rate_of_25_counts_as_25_and_not_as_what_its_packets_last(fps: Fraction) -> None:
    """At its own rate a video keeps every frame: at 24.9999 instead of 25 each would be the one before."""
    data = make_video(moving(48, 32, 32), fps=fps)
    clip = ClipConfig(sample=dense(48, 1, fps=float(fps), placement="torchvision"), view=SMALL).without_flow()
    assert decode(data, Sampled(), clip).clip().indices.reshape(-1).tolist() == list(range(48))
