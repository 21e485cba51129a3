"""When a video's frames are shown: windows by time stamps, clocks that jump, and what is made of both.

The truth is the times with which the videos are written, and the parts of which they are joined, read one by one.
"""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_reference import moving
from kinoray.config.scoring import ViewsConfig, WindowsConfig
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import MediaOverBudget
from kinoray.video.frames import Frames, decode, probe
from kinoray.video.info import comes_evenly, frame_times, jumps_closed
from kinoray.video.pyav import PyavVideo
from kinoray.video.request import Sampled, Views
from kinoray.video.sample import cut_by_time, cut_windows
from kinoray.video.transcode import transcode

VIEW = ViewConfig(resize_px=36, crop_px=32)
CONFIG = DecodeConfig()
SCREEN = [0, 30, 60, 90, *range(120, 180)]  # at 30 fps: 4 s with a frame each, then 2 s of 30
KINDS: list[dict[str, Any]] = [
    {"container": "mp4"},
    {"container": "mov", "options": {"bf": "0"}},
    {"container": "matroska"},
    {"container": "webm", "codec": "libvpx"},
    {"container": "mpegts"},
    {"container": "avi", "codec": "mpeg4"},
    {"container": "asf", "codec": "wmv2"},
]


def windows_of(data: bytes, length_s: float, sample: SampleConfig | None = None) -> Frames:
    clip = ClipConfig(sample=sample or SampleConfig(num_segments=2, frames_per_segment=2), view=VIEW).without_flow()
    views = ViewsConfig(windows=WindowsConfig(length_s=length_s, stride_s=length_s))
    return decode(data, Views(views=views), clip)


def every_frame(data: bytes) -> np.ndarray:
    """uint8 [F, 3, H, W]"""
    sample = SampleConfig(num_segments=probe(data, CONFIG).num_frames, frames_per_segment=1)
    return decode(data, Sampled(), ClipConfig(sample=sample, view=VIEW).without_flow()).clip().frames[:, 0]


# Uneven rates


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how["container"])
def test_windows_of_an_uneven_video_are_its_seconds(how: dict[str, Any]) -> None:
    found = windows_of(make_video(moving(64), fps=30, pts=SCREEN, **how), 2.0)
    assert found.windows.tolist() == [[0, 2], [2, 4], [4, 64]]
    assert found.window_times == pytest.approx(np.array([[0, 2], [2, 4], [4, 6]]), abs=2e-3)
    assert found.info.duration_s == pytest.approx(6, abs=2e-3)
    assert found.info.frames_missing == 0 or how["container"] == "avi"  # its index counts empty chunks
    for clip, (begin_s, end_s) in zip(found.clips(), found.window_times, strict=True):
        shown_s = np.array(SCREEN)[clip.indices] / 30
        assert (begin_s - 1e-3 <= shown_s).all()
        assert (shown_s < end_s).all()


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how["container"])
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)], ids=str)
def test_even_videos_are_cut_by_their_mean_rate(how: dict[str, Any], fps: Fraction) -> None:
    """Exactly, though Matroska and ASF round times to milliseconds."""
    data = make_video(moving(70), fps=fps, **({"codec": "mpeg4"} if how["container"] == "asf" else {}) | how)
    found = windows_of(data, 1.0)
    assert found.windows.tolist() == cut_windows(70, found.info.fps, WindowsConfig(length_s=1, stride_s=1)).tolist()
    assert found.window_times.tolist() == (found.windows / found.info.fps).tolist()


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_a_picture_that_stays_is_in_every_window_in_which_it_is_shown(container: str) -> None:
    """A slide show: its gaps are real in MPEG-TS too, since they are what is usual in it."""
    data = make_video(moving(4), fps=1, pts=[0, 60, 90, 150], container=container, options={"bf": "0"})
    found = windows_of(data, 30.0)
    assert found.windows.tolist() == [[0, 1], [0, 1], [1, 2], [2, 3], [2, 4]]
    assert found.window_times.tolist() == [[0, 30], [30, 60], [60, 90], [90, 120], [120, 151]]


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 20), min_size=2, max_size=60),
    st.floats(0.05, 30),
    st.floats(0.1, 1),
)
def test_windows_by_time_leave_nothing_out(steps: list[float], length_s: float, share: float) -> None:
    times = np.append(0, np.cumsum(steps))
    config = WindowsConfig(length_s=length_s, stride_s=length_s * share)
    windows, spans = cut_by_time(times, config)
    assert spans[0, 0] == 0
    assert spans[-1, 1] == times[-1]
    assert (spans[1:, 0] <= spans[:-1, 1] + 1e-9).all()
    assert (np.diff(spans[:-1], axis=1) == pytest.approx(length_s)) or len(spans) == 1
    assert spans[-1, 1] - spans[-1, 0] <= 1.1 * length_s + 1e-9
    for (first, stop), (begin_s, end_s) in zip(windows, spans, strict=True):
        within = np.flatnonzero((times[:-1] >= begin_s - 1e-6) & (times[:-1] < end_s - 1e-6)).tolist()
        if not within or times[within[0]] - begin_s >= (end_s - begin_s) / 2:
            within = sorted({*within, int(np.flatnonzero(times[:-1] <= begin_s + 1e-6)[-1])})
        if end_s == times[-1]:
            within = list(range(within[0], len(steps)))
        assert list(range(first, stop)) == within
    assert set(range(len(steps))) == {frame for first, stop in windows for frame in range(first, stop)}


# Clocks that jump


def part(start_s: float, num_frames: int = 24, seed: int = 0, **how: Any) -> bytes:
    """Seconds of video at 12 fps whose clock begins at start_s."""
    frames = np.roll(moving(num_frames), 7 * seed, axis=1)
    begin = round(12 * start_s)
    return make_video(frames, fps=12, pts=list(range(begin, begin + num_frames)), **{"container": "mpegts"} | how)


JOINED: dict[str, tuple[list[float], dict[str, Any]]] = {
    "both begin at 0": ([0, 0], {}),
    "an hour ahead": ([0, 3600], {}),
    "ten hours ahead": ([0, 36000], {}),
    "back": ([3600, 0], {}),
    "a minute ahead, and back": ([0, 60, 0, 30000], {}),
    "without B-frames": ([0, 3600], {"options": {"bf": "0"}}),
    "MPEG-4 part 2": ([0, 3600], {"codec": "mpeg4", "options": {"bf": "2"}}),
    "over the end of 33 bits": ([95442], {}),
    "Matroska": ([0, 0], {"container": "matroska"}),
    "WebM": ([0, 0], {"container": "webm", "codec": "libvpx"}),
}


@pytest.mark.parametrize("read_again", [False, True], ids=["kept", "read again"])
@pytest.mark.parametrize("name", JOINED)
def test_joined_parts_are_as_long_as_they_are_together(
    name: str, read_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of a second, each frame as in its part."""
    starts, how = JOINED[name]
    parts = [part(start_s, seed=seed, **how) for seed, start_s in enumerate(starts)]
    if read_again:
        monkeypatch.setattr("kinoray.video.media._KEEP_BYTES", 0)
    data = b"".join(parts)
    found = windows_of(data, 1.0, SampleConfig(num_segments=12, frames_per_segment=1))
    seconds = 2 * len(parts)
    assert found.info.duration_s == pytest.approx(seconds, abs=2e-3)
    assert found.window_times == pytest.approx(np.stack([np.arange(seconds), np.arange(seconds) + 1], 1), abs=2e-3)
    assert (found.num_frames, found.frames_corrupt, found.exact) == (12 * seconds, 0, True)
    assert np.array_equal(found.frames[0], np.concatenate([every_frame(one) for one in parts]))
    assert found.frames_decoded <= 12 * seconds  # at once: times still tell the frames apart


def test_a_gap_is_closed_only_where_clocks_jump() -> None:
    """In MP4 the picture stays for an hour; in MPEG-TS 8 s are what was lost, and more than 10 s is another clock."""
    gap = [*range(24), *range(12 * 3600, 12 * 3600 + 24)]
    assert probe(make_video(moving(48), fps=12, pts=gap), CONFIG).duration_s == 3602
    with pytest.raises(MediaOverBudget, match=r"^3,60\d\.\d s are more than decode\.max_duration_s"):
        probe(make_video(moving(48), fps=12, pts=gap), DecodeConfig(max_duration_s=3600))
    assert probe(part(0) + part(10), CONFIG).duration_s == pytest.approx(12, abs=0.2)  # the first is moved
    assert probe(part(0) + part(13), CONFIG).duration_s == 4


def test_packets_without_a_time_come_between_their_neighbours() -> None:
    """Two of three PES headers lose theirs, at the join as well."""
    data = bytearray(part(0, options={"bf": "0"}) + part(3600, options={"bf": "0"}))
    number = 0
    for at in range(0, len(data), 188):
        head = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        if data[at + 1] & 0x40 and data[head : head + 4] == b"\0\0\1\xe0":
            number += 1
            if number % 3:
                data[head + 7] &= 0x3F
    with PyavVideo(bytes(data), CONFIG) as video:
        assert not video.table.timed
    found = windows_of(bytes(data), 1.0)
    assert found.info.duration_s == pytest.approx(4)
    assert found.windows.tolist() == [[0, 12], [12, 24], [24, 36], [36, 48]]


def test_frames_that_do_not_come_out_move_no_others() -> None:
    """The second part lacks its first packets, key frame included; windows before and after are what they are alone."""
    whole = [part(3600 * number, 48, seed=number, gop=48) for number in range(3)]
    torn = whole[1][188 * (len(whole[1]) // 188 // 2) :]
    found = windows_of(whole[0] + torn + whole[2], 1.0)
    assert found.num_frames < PyavVideo(whole[0] + torn + whole[2], CONFIG).num_frames
    assert found.window_times[:, 0].tolist() == list(range(10))
    assert found.windows[:4].tolist() == [[12 * second, 12 * second + 12] for second in range(4)]
    assert (np.diff(found.windows[-4:]) == 12).all()


@pytest.mark.parametrize(
    ("pts", "dts", "ahead", "expected"),
    [
        pytest.param([0, 1, 2, 3], [0, 1, 2, 3], True, None, id="none"),
        pytest.param([0, 1, 900, 901], [0, 1, 900, 901], True, [0, 0, -898, -898], id="ahead"),
        pytest.param([0, 1, 900, 901], [0, 1, 900, 901], False, None, id="a picture that stays"),
        pytest.param([5, 6, 0, 1], [5, 6, 0, 1], True, [0, 0, 7, 7], id="back"),
        pytest.param([0, 60, 120, 180], [0, 60, 120, 180], True, None, id="usual steps"),
        pytest.param([0, 1, 2, 3, None, 90], [0, 1, 2, 3, None, 90], True, [0] * 5 + [-85], id="one is missing"),
        pytest.param([None] * 4, [None] * 4, True, None, id="no times"),
        pytest.param([*range(40), 0, 1], [*range(40), 0, 1], False, [0] * 40 + [40] * 2, id="back to a key frame"),
    ],
)
def test_jumps(pts: list[int | None], dts: list[int | None], ahead: bool, expected: list[int] | None) -> None:
    found = jumps_closed(pts, dts, [None] * len(pts), [True] * len(pts), Fraction(1), ahead=ahead)
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("pts", "durations", "expected"),
    [
        pytest.param([10, 40, 20, 30], [10] * 4, ([10, 20, 30, 40], 50), id="in order of showing"),
        pytest.param([10, 20, 30, 90], [10, 10, 60, 80], ([10, 20, 30, 90], 170), id="the last one stays"),
        pytest.param([10, 90, 20, 80], [10, 10, 70, 80], ([10, 20, 80, 90], 100), id="the last decoded one stays"),
        pytest.param([10, 40, 20, 30], [0, 0, None, 0], ([10, 20, 30, 40], 50), id="durations unknown"),
        pytest.param([0, None, 20, None], [10] * 4, ([0, 10, 20, 30], 40), id="two are missing"),
        pytest.param([0, 10, 10, 20], [10] * 4, ([0, 10, 10, 20], 30), id="two at once"),
        pytest.param([None, None, None], [10] * 3, None, id="none"),
        pytest.param([*range(100, 200), *range(100)], [1] * 200, None, id="second half first"),
    ],
)
def test_times_of_frames(pts: list[int | None], durations: list[int | None], expected: Any) -> None:
    found = frame_times(pts, durations, np.ones(len(pts), bool), Fraction(1))
    assert (None if found is None else (found[0].tolist(), found[1])) == expected


def test_what_comes_evenly() -> None:
    assert comes_evenly(np.arange(31) / 30)
    assert comes_evenly(np.round(np.arange(3001) / 30, 3))  # Matroska
    assert comes_evenly(np.array([0, 2, 5, 7, 10]) / 60)  # film at 60 Hz
    assert not comes_evenly(np.append(np.arange(30), 31) / 30)  # a frame was dropped
    assert comes_evenly(np.array([0.0, 0.0]))


# What is made of them


def shown_times(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how["container"])
def test_transcoding_keeps_uneven_times(how: dict[str, Any]) -> None:
    made = transcode(make_video(moving(64), fps=30, pts=SCREEN, **how), CONFIG)
    assert shown_times(made.data) == pytest.approx([at / 30 for at in SCREEN], abs=2e-3)
    assert made.info.duration_s == pytest.approx(6, abs=3e-3)


def test_transcoding_closes_jumps() -> None:
    made = transcode(part(0) + part(3600), CONFIG)
    assert shown_times(made.data) == pytest.approx([number / 12 for number in range(48)], abs=1e-4)
    assert (made.info.num_frames, made.info.duration_s) == (48, 4)
