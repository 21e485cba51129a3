"""The generated videos are real files, repeat to the byte, and need both appearance and motion to be told apart."""

import functools
import io
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from kinoray.demo.videos import (
    BROKEN_KINDS,
    MOTIONS,
    THINGS,
    class_names,
    make_broken,
    make_clip,
    make_demo_set,
    make_video,
)

CARD_PX = 36


@functools.cache
def clip(thing: str, motion: str, seed: int) -> np.ndarray:
    return make_clip(thing, motion, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def good() -> bytes:
    return make_video(clip("star", "up", 0))


def test_demo_set_is_class_folders_of_small_h264_files(tmp_path: Path) -> None:
    assert make_demo_set(tmp_path, 2, seed=5) == 12
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert files == [f"{name}/{name}-{number:04d}.mp4" for name in class_names() for number in range(2)]
    assert class_names() == sorted(class_names())
    assert len(set(class_names())) == len(THINGS) * len(MOTIONS) == 6
    for path in tmp_path.rglob("*.mp4"):
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height, stream.average_rate) == ("h264", 96, 96, 12)
            assert 24 <= sum(1 for _ in container.decode(stream)) <= 32
        assert 2_000 < path.stat().st_size < 40_000


def test_demo_set_repeats_to_the_byte_and_grows_without_changing(tmp_path: Path) -> None:
    make_demo_set(tmp_path / "small", 1, seed=5)
    make_demo_set(tmp_path / "large", 2, seed=5)
    make_demo_set(tmp_path / "other", 1, seed=6)
    for path in (tmp_path / "small").rglob("*.mp4"):
        relative = path.relative_to(tmp_path / "small")
        assert path.read_bytes() == (tmp_path / "large" / relative).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / relative).read_bytes()


@pytest.mark.parametrize("thing", THINGS)
def test_one_frame_does_not_tell_the_motion(thing: str) -> None:
    """From the same random state all motions begin with the same picture, and the card starts anywhere."""
    for seed in range(3):
        first = [clip(thing, motion, seed)[0] for motion in MOTIONS]
        assert all(np.array_equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_differ_only_on_the_card(motion: str) -> None:
    """Outline and movement are the same for both things, so that the flow does not tell them apart."""
    for seed in range(3):
        disc, star = clip("disc", motion, seed), clip("star", motion, seed)
        assert disc.shape == star.shape
        changed = (disc[0] != star[0]).any(axis=2)
        assert changed.sum() > 50
        for axis in (0, 1):  # the changed places fit into a card, which may lie across the edge
            lines = np.flatnonzero(changed.any(axis=axis))
            gaps = np.diff(np.append(lines, lines[0] + 96))
            assert 96 - gaps.max() + 1 <= CARD_PX + 1


@pytest.mark.parametrize(("motion", "axis", "sign"), [("up", 1, -1), ("down", 1, 1), ("sideways", 0, 0)])
def test_the_card_moves_as_its_class_says(motion: str, axis: int, sign: int) -> None:
    """Follow the card by matching it from frame to frame, away from the edges."""
    seen, signs = 0, set()
    expected = {sign} if sign else {-1, 1}
    for seed in range(40):
        frames = clip("disc", motion, seed)
        start = np.argwhere((frames[0] != clip("star", motion, seed)[0]).any(axis=2))
        top, left = start.min(axis=0) - 2
        bottom, right = start.max(axis=0) + 3
        if min(top, left, 96 - bottom, 96 - right) < 12 or max(bottom - top, right - left) > CARD_PX + 4:
            continue  # on its way over the edge
        match = cv2.matchTemplate(frames[4], frames[0][top:bottom, left:right], cv2.TM_SQDIFF)
        x, y = cv2.minMaxLoc(match)[2]
        moved = np.array([x - left, y - top]) / 4
        assert 1.2 <= abs(moved[axis]) <= 2.8
        assert abs(moved[1 - axis]) <= 0.3
        signs.add(int(np.sign(moved[axis])))
        seen += 1
        if seen >= 3 and signs == expected:
            return
    pytest.fail(f"{seen} cards followed, going {signs}")


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {}),
        ("libx264", "matroska", {"bf": "0"}),
        ("libx265", "mp4", {"x265-params": "log-level=none"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}),
    ],
)
def test_an_encoded_video_shows_what_was_put_in(codec: str, container: str, options: dict[str, str]) -> None:
    frames = clip("star", "sideways", 1)[:12]
    data = make_video(frames, fps=25, codec=codec, container=container, options=options)
    with av.open(io.BytesIO(data)) as opened:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 8  # lossy; another frame of the clip is over 8 away
    assert np.abs(np.roll(decoded, 3, axis=0).astype(int) - frames).mean() > 8


def test_frame_times_and_rotation_are_stored() -> None:
    times = [0, 1, 4, 5, 9, 20]
    data = make_video(clip("star", "up", 1)[:6], fps=10, pts=times, rotation=90)
    with av.open(io.BytesIO(data)) as opened:
        frames = list(opened.decode(video=0))
    assert [round(frame.time * 10) for frame in frames] == times
    assert frames[0].rotation == 90


def test_unfinished_files_are_broken_as_promised(good: bytes) -> None:
    assert make_broken("empty", good) == b""
    assert len(make_broken("random", good)) == 20_000
    assert make_broken("random", good)[4:8] != b"ftyp"
    lost = make_broken("index_lost", good)
    assert b"mdat" in lost
    assert b"moov" not in lost
    cut = make_broken("cut_front_index", good)
    assert 0 < cut.index(b"moov") < cut.index(b"mdat")
    assert len(cut) < len(good)


def test_whole_but_odd_files_are_as_promised(good: bytes) -> None:
    with av.open(io.BytesIO(make_broken("audio_only", good))) as opened:
        assert [stream.type for stream in opened.streams] == ["audio"]
        assert sum(frame.samples for frame in opened.decode(audio=0)) >= 32_000
    with av.open(io.BytesIO(make_broken("one_frame", good))) as opened:
        assert len(list(opened.decode(video=0))) == 1


@pytest.mark.parametrize("kind", BROKEN_KINDS)
def test_broken_files_repeat_to_the_byte(kind: str, good: bytes) -> None:
    assert make_broken(kind, good) == make_broken(kind, good)


def test_an_unknown_kind_is_refused(good: bytes) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of empty, random, .*, got 'odd'"):
        make_broken("odd", good)
