"""Damaged files: whatever is in them, the decoder gives a clip that says what is missing, or one of our errors."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.errors import DecoderCrashed, DecodeTimeout, MediaError
from kinoray.video.frames import Clip, probe
from kinoray.video.request import Sampled
from kinoray.video.sandbox.pool import Sandbox
from mutations import MUTATIONS, NUM_FRAMES, SOURCES, Mutant, make_mutant, make_source

DEADLINE_S = 10.0
CONFIG = ClipConfig(
    sample=SampleConfig(num_segments=3, frames_per_segment=2),
    view=ViewConfig(resize_px=32, crop_px=24),
    decode=DecodeConfig(deadline_s=DEADLINE_S),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant."""

    mutant: Mutant
    clip: Clip | None
    error: MediaError | None
    seconds: float


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2) as made:
        yield made


def run_all(sandbox: Sandbox, numbers: range) -> list[Result]:
    """Every mutant through the sandbox. Anything but a clip or a MediaError ends the test."""

    def run(number: int) -> Result:
        mutant = make_mutant(number)
        begin = time.monotonic()
        try:
            clip, error = sandbox.decode(mutant.data, Sampled(), CONFIG).clip(), None
        except MediaError as caught:
            clip, error = None, caught
        return Result(mutant, clip, error, time.monotonic() - begin)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, numbers))


def check(results: list[Result]) -> None:
    """The promises; then the figures, for `pytest -s`."""
    for result in results:
        if result.error is not None:
            check_refusal(result.mutant, result.error)
        else:
            check_clip(result)
        assert result.seconds < 2 * DEADLINE_S + 5, f"{result.mutant.name} took {result.seconds:.0f} s"
    print(summary(results))


def check_refusal(mutant: Mutant, error: MediaError) -> None:
    """A refusal is of a definite kind, and its reason says what was found in this file."""
    assert type(error) is not MediaError, mutant.name
    text = str(error)
    assert re.fullmatch(r"[ -~]{20,400}", text), f"{mutant.name}: {text!r}"
    assert re.search(r"\d|stream|codec|packets", text), f"{mutant.name}: {text}"


def check_clip(result: Result) -> None:
    clip, mutant = result.clip, result.mutant
    assert clip is not None
    assert clip.frames.shape == (3, 2, 3, 24, 24)
    assert clip.flow is not None
    assert clip.flow.shape == (3, 2, 2, 24, 24)
    assert clip.indices.max() < clip.num_frames
    assert clip.frames.any() or clip.frames_corrupt, mutant.name
    if mutant.source.endswith((".mp4", ".mkv", ".webm")) and mutant.kind == "cut" and not clip.info.miscounted:
        lost = 1 if mutant.source.endswith(".mp4") else 4  # Matroska promises a duration: B-frames are missing unseen
        assert clip.num_frames >= NUM_FRAMES - lost, (
            f"{mutant.name}: {clip.num_frames} frames, {clip.info.claimed_frames}"
        )


def changed(result: Result) -> bool:
    """Whether the clip is of another number of frames than the source had, beyond one."""
    return result.clip is not None and abs(result.clip.num_frames - NUM_FRAMES) > 1


def flagged(result: Result) -> bool:
    """Whether the clip says that something is wrong with it."""
    return result.clip is not None and (result.clip.info.miscounted or result.clip.frames_corrupt > 0)


def summary(results: list[Result]) -> str:
    errors = Counter(type(result.error).__name__ for result in results if result.error is not None)
    count = [result for result in results if changed(result)]
    silent = Counter(f"{r.mutant.source}/{r.mutant.kind}" for r in count if not flagged(r))
    return (
        f"{len(results)} mutants: {sum(r.clip is not None for r in results)} clips, of them {len(count)} with another "
        f"number of frames, {len(count) - silent.total()} flagged (the others: {dict(silent)}); refused: "
        f"{dict(errors)}; slowest {max(r.seconds for r in results):.1f} s"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_whole_and_claim_what_they_hold(name: str) -> None:
    info = probe(make_source(name), CONFIG.decode)
    assert info.num_frames == NUM_FRAMES
    assert info.claimed_frames == (None if name.endswith(".ts") else NUM_FRAMES)
    assert not info.miscounted


def test_mutants_are_damaged_differently_and_the_same_again() -> None:
    numbers = range(len(SOURCES) * len(MUTATIONS))
    mutants = [make_mutant(number) for number in numbers]
    assert {(mutant.source, mutant.kind) for mutant in mutants} == {(s, k) for s in SOURCES for k in MUTATIONS}
    assert all(mutant.data != make_source(mutant.source) for mutant in mutants)
    assert [make_mutant(number) for number in numbers] == mutants


@pytest.mark.parametrize(("claimed", "expected"), [(None, False), (100, False), (101, False), (103, True), (60, True)])
def test_a_header_that_is_off_by_more_than_two_percent_is_a_miscount(claimed: int | None, expected: bool) -> None:
    good = probe(make_source("h264.mp4"), CONFIG.decode)
    info = type(good)(
        duration_s=1, fps=100, num_frames=100, width=1, height=1, codec="h264", rotation=0, claimed_frames=claimed
    )
    assert info.miscounted is expected


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mkv", "vp9.webm", "av1.mp4"])
def test_a_cut_file_says_how_many_frames_are_missing(name: str) -> None:
    good = make_source(name)
    info = probe(good[: len(good) * 2 // 3], CONFIG.decode)
    assert info.num_frames < NUM_FRAMES - 2
    assert info.miscounted
    assert info.claimed_frames is not None
    assert abs(info.claimed_frames - NUM_FRAMES) <= 1
    assert info.frames_missing == info.claimed_frames - info.num_frames


def test_300_mutants_give_clips_or_reasons(sandbox: Sandbox) -> None:
    results = run_all(sandbox, range(300))
    check(results)
    assert not any(isinstance(result.error, DecoderCrashed | DecodeTimeout) for result in results)
    counted = [r for r in results if changed(r) and not r.mutant.source.endswith(".ts")]
    assert len(counted) > 10
    # A flipped bit in an edit list hides frames as its author might have, and Matroska promises no count.
    assert sum(flagged(result) for result in counted) >= 0.95 * len(counted), summary(counted)
    good = sandbox.decode(make_source("h264.mp4"), Sampled(), CONFIG).clip()  # and the sandbox still works
    assert np.ptp(good.frames) > 100


@pytest.mark.slow
def test_10000_mutants_give_clips_or_reasons(sandbox: Sandbox) -> None:
    results = run_all(sandbox, range(10_000, 20_000))
    check(results)
    counted = [r for r in results if changed(r) and not r.mutant.source.endswith(".ts")]
    assert sum(flagged(result) for result in counted) >= 0.95 * len(counted), summary(counted)
