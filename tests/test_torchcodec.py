"""The torchcodec back end: the frames that the plan gives, within its own scaling, or a typed refusal."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from decode_reference import moving
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import ConfigError, MediaOverBudget, UndecodableVideo
from kinoray.video.frames import decode, probe
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.sample import clip_rng
from kinoray.video.sandbox.pool import Sandbox

PYAV = ClipConfig(
    sample=SampleConfig(num_segments=4, frames_per_segment=3),
    view=ViewConfig(resize="short_side", resize_px=56, crop_px=48),
)
TORCHCODEC = replace(PYAV, decode=DecodeConfig(backend="torchcodec"))


def why_not() -> str:
    """Why torchcodec cannot be used here; "" where it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return " ".join(str(error).split())[:100]
    return ""


REASON = why_not()
needs_torchcodec = pytest.mark.skipif(bool(REASON), reason=f"torchcodec cannot be imported: {REASON}")


@pytest.fixture(scope="module")
def good() -> bytes:
    return make_video(moving(60), fps=30, gop=24, options={"preset": "medium"})


def test_without_torchcodec_the_error_says_what_to_install(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ConfigError, match=r"^decode\.backend torchcodec cannot be imported .* pip install torchcodec"):
        decode(good, Sampled(), TORCHCODEC.without_flow()).clip()


@needs_torchcodec
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_cuts_are_the_same_within_its_own_scaling(good: bytes, seed: int | None) -> None:
    ours, theirs = (
        decode(good, Sampled(rng=None if seed is None else clip_rng(seed, 0, "a")), config).clip()
        for config in (PYAV, TORCHCODEC)
    )
    assert np.array_equal(ours.indices, theirs.indices)
    assert ours.info == theirs.info
    assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 4
    assert np.abs(np.roll(ours.frames, 1, axis=0).astype(int) - theirs.frames).mean() > 10


@needs_torchcodec
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied_once(rotation: int) -> None:
    data = make_video(moving(3), rotation=rotation)
    info = probe(data, DecodeConfig())
    ours, theirs = (
        decode(
            data, Thumbnails(num_frames=3, height=info.height), ClipConfig(decode=DecodeConfig(backend=backend))
        ).pictures()  # type: ignore[arg-type]
        for backend in ("pyav", "torchcodec")
    )
    assert np.abs(np.stack(ours).astype(int) - np.stack(theirs)).mean() < 4


@needs_torchcodec
def test_one_frame_may_be_asked_for_many_times() -> None:
    clip = decode(make_video(moving(1)), Sampled(), TORCHCODEC.without_flow()).clip()
    assert clip.num_frames == 1
    assert (clip.frames == clip.frames[0, 0]).all()


@needs_torchcodec
def test_a_file_that_is_cut_inside_a_frame_is_refused_with_the_way_out(good: bytes) -> None:
    with pytest.raises(UndecodableVideo, match=r"^torchcodec cannot read this h264 file: Could not .*=pyav$"):
        decode(make_broken("cut_front_index", good), Sampled(), TORCHCODEC.without_flow()).clip()


@needs_torchcodec
def test_limits_hold_before_it_sees_the_file(good: bytes) -> None:
    narrow = replace(TORCHCODEC, decode=replace(TORCHCODEC.decode, max_frames=10))
    with pytest.raises(MediaOverBudget, match=r"decode\.max_frames"):
        decode(good, Sampled(), narrow.without_flow()).clip()


@needs_torchcodec
def test_it_works_in_the_sandbox(good: bytes) -> None:
    with Sandbox(1) as sandbox:
        there = sandbox.decode(good, Sampled(), TORCHCODEC.without_flow()).clip()
    assert np.array_equal(there.frames, decode(good, Sampled(), TORCHCODEC.without_flow()).clip().frames)
