"""Which frames are sampled: tables, slow loops and statistics of the random draw."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinoray.config.shared import SampleConfig
from kinoray.video.sample import clip_rng, segment_indices, view_indices

SHAPES = st.builds(
    lambda s, t: SampleConfig(num_segments=s, frames_per_segment=t), st.integers(1, 16), st.integers(1, 6)
)


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        pytest.param(8, [[1, 3], [5, 7]], id="two frames per slot"),
        pytest.param(4, [[0, 1], [2, 3]], id="one frame per slot"),
        pytest.param(10, [[1, 3], [6, 8]], id="slots of two and a half frames"),
        pytest.param(2, [[0, 0], [1, 1]], id="short video repeats frames"),
        pytest.param(1, [[0, 0], [0, 0]], id="single frame"),
    ],
)
def test_segments_take_the_middle_of_equal_slots(num_frames: int, expected: list[list[int]]) -> None:
    indices = segment_indices(num_frames, SampleConfig(num_segments=2, frames_per_segment=2))
    assert indices.dtype == np.int64
    assert indices.tolist() == expected


@given(num_frames=st.integers(1, 10**9), config=SHAPES)
@settings(max_examples=200, deadline=None)
def test_middles_equal_exact_fractions(num_frames: int, config: SampleConfig) -> None:
    slots = config.num_segments * config.frames_per_segment
    expected = [floor(Fraction(num_frames, slots) * (i + Fraction(1, 2))) for i in range(slots)]
    assert segment_indices(num_frames, config).reshape(-1).tolist() == expected


@given(num_frames=st.integers(1, 10**6), config=SHAPES, seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_random_frames_lie_in_their_slots(num_frames: int, config: SampleConfig, seed: int) -> None:
    slots = config.num_segments * config.frames_per_segment
    indices = segment_indices(num_frames, config, np.random.default_rng(seed))
    assert indices.shape == (config.num_segments, config.frames_per_segment)
    for i, index in enumerate(indices.reshape(-1).tolist()):
        # the frame [index, index + 1) has a part in the slot [i, i + 1) * num_frames / slots
        assert floor(Fraction(num_frames * i, slots)) <= index < ceil(Fraction(num_frames * (i + 1), slots))
    assert (np.diff(indices.reshape(-1)) >= 0).all()


@pytest.mark.parametrize("num_frames", [3, 8, 10, 13])
def test_random_frames_are_drawn_equally_often(num_frames: int) -> None:
    config = SampleConfig(num_segments=4, frames_per_segment=2)
    rng, rounds = np.random.default_rng(0), 8000
    counts = np.zeros(num_frames)
    for _ in range(rounds):
        np.add.at(counts, segment_indices(num_frames, config, rng).reshape(-1), 1)
    expected = rounds * 8 / num_frames
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)  # five standard deviations, fixed seed


@pytest.mark.parametrize("num_frames", [3, 48, 96, 300, 777])
def test_random_frames_of_few_segments_are_among_those_of_many(num_frames: int) -> None:
    """But for frames that lie on a slot's border, and the generator is left alike: a crop drawn next is the same."""
    missing = total = 0
    for seed in range(50):
        draws, after = {}, set()
        for num_segments in (4, 8, 16):
            rng = np.random.default_rng(seed)
            config = SampleConfig(num_segments=num_segments, frames_per_segment=6)
            draws[num_segments] = set(segment_indices(num_frames, config, rng).reshape(-1).tolist())
            after.add(int(rng.integers(2**62)))
        assert len(after) == 1
        missing += len((draws[4] | draws[8]) - draws[16])
        total += len(draws[16])
    if num_frames in (3, 48, 96):  # slots end where frames end, or every slot of 96 is within a frame
        assert missing == 0
    assert missing <= 0.03 * total


@given(num_frames=st.integers(1, 10**8), config=SHAPES, num_views=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_temporal_views_take_the_middles_of_the_parts_of_each_slot(
    num_frames: int, config: SampleConfig, num_views: int
) -> None:
    slots = config.num_segments * config.frames_per_segment
    views = view_indices(num_frames, config, num_views)
    assert views.shape == (num_views, config.num_segments, config.frames_per_segment)
    for v, view in enumerate(views):
        expected = [floor(Fraction(num_frames, slots) * (i + Fraction(2 * v + 1, 2 * num_views))) for i in range(slots)]
        assert view.reshape(-1).tolist() == expected


def test_temporal_views_by_hand() -> None:
    """Two slots of 6 frames, three views: parts of 2 frames, whose middles are 1, 3, 5 and 7, 9, 11."""
    config = SampleConfig(num_segments=2, frames_per_segment=1)
    assert view_indices(12, config, 3).tolist() == [[[1], [7]], [[3], [9]], [[5], [11]]]
    assert view_indices(12, config, 1)[0].tolist() == segment_indices(12, config).tolist() == [[3], [9]]
    assert view_indices(1, config, 2).tolist() == [[[0], [0]], [[0], [0]]]


@pytest.mark.parametrize(("num_frames", "num_views"), [(0, 1), (5, 0)])
def test_no_frames_or_no_views_are_an_error(num_frames: int, num_views: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, got {num_frames} and {num_views}"):
        view_indices(num_frames, SampleConfig(), num_views)


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        segment_indices(0, SampleConfig())


def test_clip_generator_is_the_same_on_every_machine() -> None:
    """Golden numbers: another platform, Python hash seed or worker must not change what an epoch looks like."""
    assert clip_rng(0, 0, "a").integers(0, 1000, 4).tolist() == [949, 984, 638, 868]
    assert clip_rng(7, 3, "birds/01").integers(0, 1000, 4).tolist() == [664, 917, 145, 195]


def test_clip_generators_differ_by_seed_epoch_and_video() -> None:
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "b"), (11, 1, "a"), (1, 11, "a")]
    draws = {tuple(clip_rng(*key).integers(0, 2**62, 4).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert clip_rng(0, 0, "a").random() == clip_rng(0, 0, "a").random()
