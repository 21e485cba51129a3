"""Decoding wanted frames gives, bit for bit, what decoding everything gives; and clips are those frames, cut."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av  # before decord, whose libraries would stand in front of PyAV's
import decord
import numpy as np
import pytest

from decode_reference import Collect, h264_fields, moving, mpeg2_fields, mux_fields, plain_decode, remux
from kinoray.config.shared import ClipConfig, DecodeConfig, FlowConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video import media as decode_media
from kinoray.video.frames import Clip, decode, probe
from kinoray.video.plan import PacketBits
from kinoray.video.pyav import PyavVideo
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.sample import clip_rng, segment_indices
from kinoray.video.transcode import open_output, transcode
from kinoray.video.transform import dis_flow, test_view, train_view

NUM_FRAMES = 90
X265 = "log-level=none:"
OPEN_GOP = "open-gop=1:keyint=24:min-keyint=24:bframes=4:scenecut=0"
SVT = {"preset": "12", "crf": "40"}
FILES: dict[str, dict[str, Any]] = {
    "h264 gop 12": {"gop": 12},
    "h264 gop 250, several b-frames": {"gop": 250, "options": {"preset": "medium", "bf": "5"}},
    "h264 without b-frames": {"gop": 30, "options": {"bf": "0"}},
    "h264 open gop": {"gop": 24, "options": {"preset": "medium", "x264-params": OPEN_GOP}},
    "h264 open gop, mpeg-ts": {
        "gop": 24,
        "container": "mpegts",
        "options": {"preset": "slow", "x264-params": OPEN_GOP + ":ref=6"},
    },
    "h264 gop 250, mpeg-ts": {"gop": 250, "container": "mpegts", "options": {"preset": "medium"}},
    "h264 matroska": {"gop": 24, "container": "matroska", "options": {"preset": "medium"}},
    "h264 avi, where times lie": {"gop": 24, "container": "avi", "options": {"preset": "medium"}},
    "h264 flv": {"gop": 24, "container": "flv"},
    "h264 interlaced": {"gop": 24, "options": {"x264-params": "interlaced=1"}},
    "h264 interlaced, mpeg-ts": {"gop": 24, "container": "mpegts", "options": {"x264-params": "interlaced=1"}},
    "h264 intra refresh, without key frames": {"options": {"x264-params": "intra-refresh=1:keyint=30"}},
    "h264 10 bit": {"gop": 24, "pix_fmt": "yuv420p10le"},
    "h264 variable frame rate": {
        "gop": 24,
        "pts": np.random.default_rng(1).choice(400, NUM_FRAMES, replace=False).cumsum().tolist(),
    },
    "hevc gop 12": {"codec": "libx265", "gop": 12, "options": {"x265-params": X265 + "keyint=12"}},
    "hevc open gop": {"codec": "libx265", "options": {"preset": "medium", "x265-params": X265 + OPEN_GOP}},
    "hevc open gop, mpeg-ts": {
        "codec": "libx265",
        "container": "mpegts",
        "options": {"preset": "medium", "x265-params": X265 + OPEN_GOP},
    },
    "hevc temporal layers": {
        "codec": "libx265",
        "options": {"preset": "medium", "x265-params": X265 + "keyint=24:temporal-layers=3:bframes=8"},
    },
    "vp8": {"codec": "libvpx", "container": "webm", "gop": 24, "options": {"deadline": "realtime", "b": "500k"}},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "gop": 24, "options": {"cpu-used": "5", "b": "500k"}},
    "vp8, hidden frames": {
        "codec": "libvpx",
        "container": "matroska",
        "gop": 20,
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5", "b": "200k"},
    },
    "vp9, superframes": {
        "codec": "libvpx-vp9",
        "container": "mp4",
        "gop": 24,
        "options": {"auto-alt-ref": "6", "lag-in-frames": "25", "cpu-used": "4", "b": "200k"},
    },
    "av1 closed gop": {"codec": "libsvtav1", "container": "webm", "gop": 16, "options": SVT},
    "av1 closed gop, mp4, film grain": {
        "codec": "libsvtav1",
        "gop": 16,
        "options": SVT | {"svtav1-params": "film-grain=20"},
    },
    "av1 open gop": {
        "codec": "libsvtav1",
        "container": "webm",
        "gop": 16,
        "options": SVT | {"svtav1-params": "irefresh-type=1"},
    },
    "mpeg-4 part 2, mp4": {"codec": "mpeg4", "gop": 24, "options": {"bf": "2"}},
    "mpeg-4 part 2, quarter pixels": {
        "codec": "mpeg4",
        "container": "matroska",
        "gop": 12,
        "options": {"bf": "2", "flags": "+qpel+mv4", "mpeg_quant": "1"},
    },
    "mpeg-2 open gop, mpeg-ts": {"codec": "mpeg2video", "container": "mpegts", "gop": 12, "options": {"bf": "2"}},
    "mpeg-2 closed gop, interlaced": {
        "codec": "mpeg2video",
        "gop": 12,
        "options": {"bf": "2", "flags": "+cgop+ildct+ilme", "sc_threshold": "1000000000"},
    },
    "mpeg-1": {"codec": "mpeg1video", "container": "matroska", "gop": 12, "options": {"bf": "2"}},
    "motion jpeg": {"codec": "mjpeg", "container": "mov", "pix_fmt": "yuvj420p"},
    "motion jpeg, avi": {
        "codec": "mjpeg",
        "container": "avi",
        "pix_fmt": "yuvj420p",
        "pts": [3 * number // 2 for number in range(NUM_FRAMES)],
    },
    "prores": {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuv422p10le"},
    "mpeg-4 part 2, avi": {"codec": "mpeg4", "container": "avi", "gop": 24, "options": {"bf": "2"}},
    "mpeg-2 program stream": {"codec": "mpeg2video", "container": "mpeg", "gop": 24, "options": {"bf": "2"}},
    "wmv": {"codec": "wmv2", "container": "asf", "gop": 24},
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return moving(NUM_FRAMES)


@pytest.fixture(scope="module")
def gop12(pictures: np.ndarray) -> bytes:
    return make_video(pictures, fps=30, gop=12)


def read(data: bytes, wanted: np.ndarray) -> tuple[dict[int, np.ndarray], int, int]:
    """(frames by number, frames decoded, frames corrupt)"""
    with PyavVideo(data, DecodeConfig()) as video:
        sink = Collect()
        reading = video.read(wanted, sink)
        return sink.frames, reading.frames_decoded, reading.frames_corrupt


def assert_exact(data: bytes, reference: list[np.ndarray], *, lost: int = 0) -> dict[str, int]:
    """Several samplings of the file equal the reference; returns how many frames each had to decode.

    `lost`: frames before the first key frame, of which the reference knows nothing.
    """
    rng = np.random.default_rng(0)
    samplings = {
        f"{s}x{t}": np.unique(segment_indices(len(reference), SampleConfig(num_segments=s, frames_per_segment=t)))
        for s, t in ((16, 6), (8, 1), (3, 1), (1, 1))
    }
    samplings |= {f"random {k}": np.unique(rng.integers(0, len(reference), 6)) for k in range(3)}
    samplings |= {"first": np.array([0]), "last": np.array([len(reference) - 1])}
    decoded = {}
    for name, wanted in samplings.items():
        frames, decoded[name], corrupt = read(data, wanted)
        assert sorted(frames) == wanted.tolist()
        assert corrupt == lost
        different = [index for index in wanted.tolist() if not np.array_equal(frames[index], reference[index])]
        assert different == [], name
    return decoded


@pytest.mark.parametrize("name", FILES)
def test_wanted_frames_equal_a_plain_decode(name: str, pictures: np.ndarray) -> None:
    data = make_video(pictures, **{"fps": 30, **FILES[name]})
    reference = plain_decode(data)
    assert len(reference) == NUM_FRAMES
    assert_exact(data, reference)


ENTERED = ["vp8, hidden frames", "vp9, superframes", "av1 closed gop", "mpeg-4 part 2, mp4", "motion jpeg, avi"]


@pytest.mark.parametrize("name", ENTERED)
def test_only_the_group_of_a_wanted_frame_is_decoded(name: str, pictures: np.ndarray) -> None:
    data = make_video(pictures, fps=30, **FILES[name])
    gop = FILES[name].get("gop", 1)
    with PyavVideo(data, DecodeConfig(max_frames=2 * gop)) as video:
        reading = video.read(np.array([NUM_FRAMES - 1]), Collect())
    assert 0 < reading.frames_decoded <= gop


@pytest.mark.parametrize("name", ["vp8", "vp9, superframes", "mpeg-4 part 2, mp4", "mpeg-1"])
def test_key_frame_flags_are_believed_only_where_the_packet_is_one(name: str, pictures: np.ndarray) -> None:
    data = make_video(pictures, fps=30, **FILES[name])
    lying = remux(data, "matroska", all_keys=True)
    assert probe(lying, DecodeConfig()).num_keyframes == probe(data, DecodeConfig()).num_keyframes > 1
    assert_exact(lying, plain_decode(data))


def test_key_frames_of_av1_are_found_in_its_packets(pictures: np.ndarray) -> None:
    data = make_video(pictures, fps=30, **FILES["av1 closed gop"])
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        bits = PacketBits("av1", b"")
        assert [bits.begins(memoryview(packet)) for packet in packets] == [packet.is_keyframe for packet in packets]
    assert 1 < sum(packet.is_keyframe for packet in packets) < NUM_FRAMES


def test_the_plan_leaves_most_frames_undecoded(pictures: np.ndarray) -> None:
    """Else the comparison above would compare a plain decode with itself."""
    for codec, options in (("libx264", {"preset": "medium"}), ("libx265", {"x265-params": X265 + "keyint=12"})):
        data = make_video(pictures, fps=30, gop=12, codec=codec, options=options)
        _, decoded, _ = read(data, np.array([6, 40, 77]))
        assert decoded <= 20
        _, decoded, _ = read(data, np.array([0, 84]))
        assert decoded == 2


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_hevc_with_temporal_layers_is_decoded_in_full(container: str, pictures: np.ndarray) -> None:
    """There a frame that its own layer does not refer to may still be needed by a higher one; libav would drop it."""
    for params, exactly in (("temporal-layers=3:bframes=8", False), ("bframes=8", True)):
        data = make_video(pictures[:20], codec="libx265", container=container, options={"x265-params": X265 + params})
        with PyavVideo(data, DecodeConfig()) as video:
            assert video.leaves_out_exactly() is exactly


@pytest.mark.parametrize("whole", [set(), {1, 4, 5}], ids=["fields", "fields and frames"])
@pytest.mark.parametrize("together", [False, True], ids=["a field a packet", "a frame a packet"])
@pytest.mark.parametrize("container", ["mpegts", "mp4", "matroska"])
def test_a_frame_coded_as_two_fields_is_one_frame(container: str, together: bool, whole: set[int]) -> None:
    grey = np.random.default_rng(0).integers(16, 236, (10, 64, 32)).astype(np.uint8)
    data = mux_fields(h264_fields(grey, whole=frozenset(whole)), container, together=together)
    with PyavVideo(data, DecodeConfig(max_frames=10)) as video:
        assert (video.info.num_frames, video.info.num_keyframes, video.info.frames_missing) == (10, 3, 0)
        found = [np.frombuffer(frame.planes[0], np.uint8).reshape(64, -1)[:, :32] for frame in video.shown_frames()]
        np.testing.assert_array_equal(found, grey)
        if container != "matroska":  # which knows no length of the last frame
            assert video.info.fps == pytest.approx(25)
            assert float(video.frame_rate) == pytest.approx(25)
    decoded = assert_exact(data, plain_decode(data))
    assert decoded["last"] == 2
    assert transcode(data, DecodeConfig()).info.num_frames == 10


def two_streams(container: str, defaults: tuple[bool, bool], frames: tuple[int, int], sizes: tuple[int, int]) -> bytes:
    """Two video streams: how many frames each has, their heights, and which are the default."""
    buffer = io.BytesIO()
    with open_output(buffer, container) as output:
        streams = []
        for is_default, height in zip(defaults, sizes, strict=True):
            stream = output.add_stream("mpeg4", rate=30)
            stream.width, stream.height, stream.pix_fmt = height * 2, height, "yuv420p"
            stream.disposition = av.stream.Disposition(int(is_default))
            streams.append(stream)
        pictures = [moving(count, height, 2 * height) for count, height in zip(frames, sizes, strict=True)]
        for number in range(max(frames)):
            for stream, shown in zip(streams, pictures, strict=True):
                if number < len(shown):
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(shown[number])))
        for stream in streams:
            output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize(
    ("defaults", "frames", "shown"),
    [
        pytest.param((True, False), (20, 20), 0, id="the default"),
        pytest.param((False, True), (20, 20), 1, id="the default, though it is the second"),
        pytest.param((True, False), (1, 20), 1, id="one that moves, though a still is the default"),
        pytest.param((False, True), (20, 1), 0, id="one that moves, though a still follows"),
        pytest.param((True, True), (20, 1), 0, id="one that moves, of two defaults"),
    ],
)
def test_the_stream_that_players_show_is_read(
    defaults: tuple[bool, bool], frames: tuple[int, int], shown: int, container: str
) -> None:
    sizes = (32, 64) if shown == 0 else (64, 32)  # the other has more pixels
    data = two_streams(container, defaults, frames, sizes)
    info = probe(data, DecodeConfig())
    assert (info.num_frames, info.width, info.height) == (20, 64, 32)

    def clip(backend: Any) -> np.ndarray:
        decoder = DecodeConfig(backend=backend)
        config = ClipConfig(decode=decoder, flow=FlowConfig(estimator="none"))
        return decode(data, Sampled(), config).clip().frames.astype(int)

    difference = np.abs(clip("torchcodec") - clip("pyav")).mean()
    assert difference < 8
    with pytest.raises(UndecodableVideo, match="several video streams, of which decord takes its own"):
        clip("decord")


def test_of_streams_that_no_flag_tells_apart_libavs_choice_is_read() -> None:
    data = two_streams("mpegts", (False, False), (20, 20), (32, 64))
    with av.open(io.BytesIO(data)) as container:
        best = container.streams.best("video")
        assert best is not None
        expected = best.height
    assert probe(data, DecodeConfig()).height == expected


@pytest.mark.parametrize("together", [False, True], ids=["a field a packet", "a frame a packet"])
@pytest.mark.parametrize("container", ["mpegts", "vob", "mp4", "matroska"])
def test_fields_of_mpeg_2_are_one_frame(container: str, together: bool) -> None:
    levels = [5 * number - 25 for number in range(10)]
    data = mux_fields(mpeg2_fields(levels), container, together=together, codec="mpegvideo")
    with PyavVideo(data, DecodeConfig()) as video:
        assert (video.info.num_frames, video.info.num_keyframes, video.info.miscounted) == (10, 3, False)
        assert video.info.fps == pytest.approx(25)
        found = [np.frombuffer(frame.planes[0], np.uint8)[0] for frame in video.shown_frames()]
    assert found == [128 + level for level in levels]
    assert_exact(data, plain_decode(data))


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_back_ends_refuse_frames_in_two_packets(backend: Any) -> None:
    data = mux_fields(h264_fields(np.full((4, 64, 32), 99, np.uint8)), "mp4")
    with pytest.raises(UndecodableVideo, match=r"a field in each.*use decode.backend=pyav"):
        decode(data, Sampled(), ClipConfig(decode=DecodeConfig(backend=backend), flow=FlowConfig(estimator="none")))


def test_a_lone_field_costs_no_other_frame() -> None:
    grey = np.random.default_rng(0).integers(16, 236, (8, 64, 32)).astype(np.uint8)
    coded = h264_fields(grey)
    coded[2] = coded[2][:1]
    data = mux_fields(coded, "mpegts")
    with PyavVideo(data, DecodeConfig()) as video:
        sink = Collect()
        video.read(np.array([0, 1, 3, 7]), sink)
        assert video.info.num_frames == 8
    last = plain_decode(data)[-1]
    np.testing.assert_array_equal(sink.frames[7], last)


def test_frames_hidden_by_an_edit_list_are_not_counted(pictures: np.ndarray) -> None:
    whole = make_video(pictures, fps=30, gop=24)
    edited = remux(whole, "mp4", shift=Fraction(10, 30), options={"avoid_negative_ts": "disabled"})
    reference = plain_decode(edited)
    assert len(reference) == NUM_FRAMES - 10
    assert_exact(edited, reference)


def test_a_stream_that_begins_inside_a_group_starts_at_its_first_key_frame(pictures: np.ndarray) -> None:
    whole = make_video(pictures, fps=30, gop=24, container="mpegts", options={"preset": "medium"})
    cut = whole[len(whole) // 5 // 188 * 188 :]
    reference = plain_decode(cut)
    with av.open(io.BytesIO(cut)) as container:
        num_packets = sum(1 for packet in container.demux(video=0) if packet.size)
    assert 24 < len(reference) < num_packets < NUM_FRAMES
    assert_exact(cut, reference, lost=num_packets - len(reference))


def test_streams_joined_with_another_size_are_read_in_order(pictures: np.ndarray) -> None:
    """Times begin again in the middle, and the frames become smaller."""
    parts = [
        make_video(part, fps=30, gop=24, container="mpegts")
        for part in (pictures[:40], pictures[40:80, ::2, ::2].copy())
    ]
    joined = b"".join(parts)
    reference = plain_decode(joined)
    assert len(reference) == 80
    assert_exact(joined, reference)


def test_wrong_times_in_a_container_that_stores_them_are_found_out(pictures: np.ndarray) -> None:
    """B-frames with times in decoding order: frames come out with times going back and forth."""
    data = remux(make_video(pictures, fps=30, gop=24, options={"preset": "medium"}), "matroska", pts_from_dts=True)
    assert_exact(data, plain_decode(data))


def test_hidden_vp8_frames_are_not_counted(pictures: np.ndarray) -> None:
    whole = make_video(pictures[:40], codec="libvpx", container="webm", gop=60, options={"b": "500k"})
    data = remux(whole, "webm", hide=frozenset({7, 8, 21}))
    reference = plain_decode(data)
    assert len(reference) == 37
    assert_exact(data, reference)


def test_large_files_are_read_a_second_time_instead_of_held_twice(
    gop12: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_media, "_KEEP_BYTES", 1000)
    decoded = assert_exact(gop12, plain_decode(gop12))
    monkeypatch.undo()
    assert decoded == assert_exact(gop12, plain_decode(gop12))


def test_a_large_file_is_read_a_second_time_and_not_once_for_each_group(
    gop12: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_media, "_KEEP_BYTES", 1000)
    with PyavVideo(gop12, DecodeConfig()) as video:
        assert len(video.table.runs_for(np.array([0, 13, 25]))) == 3
        opened: list[None] = []
        open_again = video._open
        monkeypatch.setattr(video, "_open", lambda: opened.append(None) or open_again())
        sink = Collect()
        video.read(np.array([0, 13, 25]), sink)
    assert len(opened) == 1


# Pictures: size, rotation, colour


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied(rotation: int, pictures: np.ndarray) -> None:
    upright = plain_decode(make_video(pictures[:3], gop=12), 64, 96)
    data = make_video(pictures[:3], gop=12, rotation=rotation)
    info = probe(data, DecodeConfig())
    assert (info.rotation, info.width, info.height) == (rotation, *((64, 96) if rotation % 180 else (96, 64)))
    shown = decode(data, Thumbnails(num_frames=3, height=info.height), ClipConfig()).pictures()
    for image, frame in zip(shown, upright, strict=True):
        assert np.array_equal(image, np.rot90(frame.transpose(1, 2, 0), rotation // 90))


@pytest.mark.parametrize("rotation", [90, 270])
def test_rotation_is_the_one_that_decord_applies(rotation: int, pictures: np.ndarray) -> None:
    data = make_video(pictures[:3], gop=12, rotation=rotation)
    theirs = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1).get_batch([1]).asnumpy()[0]
    ours = decode(data, Thumbnails(num_frames=3, height=96), ClipConfig()).pictures()[1].astype(int)
    assert ours.shape == theirs.shape
    # decord repeats chroma where we interpolate it: 4 grey levels here. Turned the other way it is 30.
    assert np.abs(ours - theirs).mean() < 5 < 20 < np.abs(ours[::-1, ::-1] - theirs).mean()


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        pytest.param((255, 255, 255), (255, 255, 255), id="white"),
        pytest.param((0, 0, 0), (0, 0, 0), id="black"),
        pytest.param((250, 20, 30), (250, 20, 30), id="red"),
        pytest.param((20, 240, 40), (20, 240, 40), id="green"),
        pytest.param((30, 20, 230), (30, 20, 230), id="blue"),
    ],
)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_colours_come_back_in_full_range_and_in_order(
    colour: tuple[int, ...], expected: tuple[int, ...], backend: Any
) -> None:
    flat = np.broadcast_to(np.array(colour, np.uint8), (3, 64, 64, 3))
    (image,) = decode(
        make_video(flat, options={"crf": "1"}),
        Thumbnails(num_frames=1, height=64),
        ClipConfig(decode=DecodeConfig(backend=backend)),
    ).pictures()
    assert np.abs(image.reshape(-1, 3).mean(axis=0) - expected).max() <= 2


def test_conversion_is_close_to_a_float_reference(pictures: np.ndarray) -> None:
    """BT.601 in float64 on the decoder's own planes, at full size: mean error under half a grey level."""
    data = make_video(pictures[:4], pix_fmt="yuv444p", options={"crf": "10"})
    with av.open(io.BytesIO(data)) as container:
        yuv = np.stack([frame.to_ndarray() for frame in container.decode(video=0)]).astype(float)
    luma, blue, red = 255 / 219 * (yuv[:, 0] - 16), 255 / 224 * (yuv[:, 1] - 128), 255 / 224 * (yuv[:, 2] - 128)
    green = luma - 0.344136 * blue - 0.714136 * red
    rgb = np.clip(np.stack([luma + 1.402 * red, green, luma + 1.772 * blue], axis=-1), 0, 255)
    ours = np.stack(decode(data, Thumbnails(num_frames=4, height=64), ClipConfig()).pictures())
    assert np.abs(ours - rgb).mean() < 0.5


@pytest.mark.parametrize("width", [340, 344, 352, 96])
def test_a_frame_of_the_target_size_is_converted_as_any_other(width: int) -> None:
    """4:2:0 at its own size against float64, chroma bilinear between its places (left-sited), up to the last column."""
    data = make_video(moving(2, 64, width), options={"crf": "10"})
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    )

    def enlarged(chroma: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(64) - 0.5) / 2, np.arange(width) / 2
        by_row = np.stack([np.interp(rows, np.arange(32), column) for column in chroma.T], axis=1)
        return np.stack([np.interp(columns, np.arange(width // 2), row) for row in by_row])

    luma, blue, red = 255 / 219 * (luma - 16), *(255 / 224 * (enlarged(chroma) - 128) for chroma in (blue, red))
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    ours = decode(data, Thumbnails(num_frames=2, height=64), ClipConfig()).pictures()[0]
    error = np.abs(ours - np.clip(rgb, 0, 255))
    assert error.mean() < 0.3
    assert error.max() < 2


@pytest.mark.parametrize(("height", "width"), [(63, 97), (17, 33), (2, 2)])
def test_odd_sizes_work(height: int, width: int) -> None:
    data = make_video(moving(5, height, width), pix_fmt="yuv444p")
    assert_exact(data, plain_decode(data))
    clip = decode(data, Sampled(), ClipConfig(view=ViewConfig(resize_px=32, crop_px=24))).clip()
    assert clip.frames.shape == (8, 6, 3, 24, 24)
    assert (clip.info.width, clip.info.height) == (width, height)


# Clips


CLIP = ClipConfig(
    sample=SampleConfig(num_segments=4, frames_per_segment=3),
    view=ViewConfig(resize="short_side", resize_px=56, crop_px=48),
    flow=FlowConfig(preset="fast", bound_px=7.5),
)


def naive_clip(
    data: bytes, rng: np.random.Generator | None, config: ClipConfig = CLIP
) -> tuple[np.ndarray, np.ndarray]:
    """Frames [S, T, 3, H, W] and unquantised flow [S, T, H, W, 2] from a decode of everything, step by step."""
    total = len(plain_decode(data))
    indices = segment_indices(total, config.sample, rng)
    view = test_view(config.view, 96, 64) if rng is None else train_view(config.view, 96, 64, rng)
    cut = [
        frame[:, view.top : view.top + view.size, view.left : view.left + view.size]
        for frame in plain_decode(data, view.height, view.width)
    ]
    frames = np.stack([np.stack([cut[index] for index in row]) for row in indices])
    flows = np.zeros((*indices.shape, view.size, view.size, 2))
    for place, index in np.ndenumerate(indices):
        start = index if index + 1 < total else index - 1
        if start >= 0:
            green = [np.ascontiguousarray(cut[t][1]) for t in (start, start + 1)]
            flows[place] = dis_flow(green[0], green[1], config.flow.preset)
    if view.flip:
        frames, flows = frames[..., ::-1], flows[..., ::-1, :] * [-1, 1]
    return frames, flows


def assert_same_clip(clip: Clip, expected: tuple[np.ndarray, np.ndarray], bound_px: float = 7.5) -> None:
    frames, flows = expected
    assert np.array_equal(clip.frames, frames)
    assert clip.flow is not None
    pixels = clip.flow.transpose(0, 1, 3, 4, 2) * bound_px / 127
    assert np.abs(pixels - np.clip(flows, -bound_px, bound_px)).max() <= bound_px / 127 / 2 + 1e-4


def test_a_test_clip_is_the_centre_cut_of_the_middle_frames(gop12: bytes) -> None:
    clip = decode(gop12, Sampled(), CLIP).clip()
    assert_same_clip(clip, naive_clip(gop12, None))
    assert clip.indices.tolist() == segment_indices(NUM_FRAMES, CLIP.sample).tolist()
    assert (clip.num_frames, clip.frames_corrupt) == (NUM_FRAMES, 0)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.flags.c_contiguous
    assert clip.flow is not None
    assert clip.flow.dtype == np.int8
    assert clip.flow.flags.c_contiguous


def test_training_clips_follow_their_generator_and_negate_mirrored_flow(gop12: bytes) -> None:
    flips = set()
    for epoch in range(6):
        clip = decode(gop12, Sampled(rng=clip_rng(0, epoch, "a")), CLIP).clip()
        assert_same_clip(clip, naive_clip(gop12, clip_rng(0, epoch, "a")))
        assert clip.frames.flags.c_contiguous
        rng = clip_rng(0, epoch, "a")
        segment_indices(NUM_FRAMES, CLIP.sample, rng)
        flips.add(train_view(CLIP.view, 96, 64, rng).flip)
    assert flips == {True, False}


def test_frames_do_not_depend_on_whether_flow_is_asked_for(gop12: bytes) -> None:
    without = decode(gop12, Sampled(rng=clip_rng(0, 0, "a")), CLIP.without_flow()).clip()
    assert without.flow is None
    assert np.array_equal(without.frames, decode(gop12, Sampled(rng=clip_rng(0, 0, "a")), CLIP).clip().frames)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_short_videos_repeat_frames(num_frames: int, pictures: np.ndarray) -> None:
    data = make_video(pictures[:num_frames], gop=12)
    clip = decode(data, Sampled(), CLIP).clip()
    assert_same_clip(clip, naive_clip(data, None))
    assert clip.num_frames == clip.frames_decoded == num_frames
    assert clip.flow is not None
    assert bool(clip.flow.any()) is (num_frames > 1)


def test_the_last_frames_flow_is_that_of_the_frame_before(pictures: np.ndarray) -> None:
    data = make_video(pictures[:2], gop=12)
    clip = decode(data, Sampled(), CLIP).clip()
    assert clip.flow is not None
    assert np.array_equal(clip.flow[0, 0], clip.flow[-1, -1])
    assert clip.flow[0, 0].any()


# decord


def test_decord_gives_the_same_cuts_within_its_own_scaling(gop12: bytes) -> None:
    """Measured 1.0 grey levels on these noisy pictures; a frame or a pixel off would give over 10."""
    config = ClipConfig(sample=CLIP.sample, view=CLIP.view, flow=CLIP.flow, decode=DecodeConfig(backend="decord"))
    for seed in (None, 0, 1):
        ours, theirs = (
            decode(gop12, Sampled(rng=None if seed is None else clip_rng(seed, 0, "a")), c).clip()
            for c in (CLIP, config)
        )
        assert np.array_equal(ours.indices, theirs.indices)
        assert ours.info == theirs.info
        assert ours.flow is not None
        assert theirs.flow is not None
        assert ours.flow.shape == theirs.flow.shape
        assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 4
        assert np.abs(np.roll(ours.frames, 1, axis=0).astype(int) - theirs.frames).mean() > 10


def test_decords_bridge_is_taken_as_it_is(gop12: bytes) -> None:
    pytest.importorskip("torch")
    config = ClipConfig(sample=CLIP.sample, view=CLIP.view, decode=DecodeConfig(backend="decord"))
    native = decode(gop12, Sampled(), config.without_flow()).clip()
    decord.bridge.set_bridge("torch")
    try:
        other = decode(gop12, Sampled(), config.without_flow()).clip()
        assert decord.bridge._CURRENT_BRIDGE.type == "torch"
    finally:
        decord.bridge.reset_bridge()
    assert np.array_equal(native.frames, other.frames)


# Around it


@pytest.mark.parametrize(
    ("name", "codec", "seconds"),
    [
        ("h264 gop 12", "h264", 3.0),
        ("h264 matroska", "h264", 3.0),
        ("h264 gop 250, mpeg-ts", "h264", 3.0),
        ("h264 avi, where times lie", "h264", 3.0),
        ("hevc gop 12", "hevc", 3.0),
        ("vp9", "vp9", 3.0),
    ],
)
def test_probe_tells_what_a_video_is(name: str, codec: str, seconds: float, pictures: np.ndarray) -> None:
    info = probe(make_video(pictures, **{"fps": 30, **FILES[name]}), DecodeConfig())
    assert (info.width, info.height, info.codec, info.rotation) == (96, 64, codec, 0)
    assert info.num_frames == NUM_FRAMES
    assert info.duration_s == pytest.approx(seconds, abs=0.002)  # Matroska counts in milliseconds
    assert info.fps == pytest.approx(30, abs=0.03)


def test_probe_of_a_variable_frame_rate_gives_its_mean() -> None:
    info = probe(make_video(moving(5), fps=10, pts=[0, 1, 10, 30, 49]), DecodeConfig())
    assert info.duration_s == pytest.approx(5.0, abs=0.2)  # the last frame's own length is the muxer's guess
    assert info.fps == pytest.approx(5 / info.duration_s)


def test_thumbnails_are_evenly_spaced_whole_frames(gop12: bytes) -> None:
    images = decode(gop12, Thumbnails(num_frames=5, height=32), ClipConfig()).pictures()
    reference = plain_decode(gop12, 32, 48)
    assert [image.shape for image in images] == [(32, 48, 3)] * 5
    for image, index in zip(images, (9, 27, 45, 63, 81), strict=True):
        assert np.array_equal(image, reference[index].transpose(1, 2, 0))


def test_more_thumbnails_than_frames_repeat(pictures: np.ndarray) -> None:
    images = decode(make_video(pictures[:2]), Thumbnails(num_frames=4, height=32), ClipConfig()).pictures()
    assert len(images) == 4
    assert np.array_equal(images[0], images[1])


def test_frames_check_their_shapes_and_say_both_sides(gop12: bytes) -> None:
    found = decode(gop12, Sampled(samples=(CLIP.sample, SampleConfig(num_segments=1, frames_per_segment=1))), CLIP)
    _, count, _, side, _ = found.frames.shape
    assert repr(found) == f"Frames({count} of 90 frames, 1 x {side} x {side} px, flow, {len(found)} clips, 0 corrupt)"
    assert found.flow is not None
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"flow": found.flow[:, 1:]}, rf"flow: expected int8 \[1, {count}, 2, .*found int8 \[1, {count - 1}, 2, "),
        ({"flow": found.flow.view(np.uint8)}, r"flow: expected int8 .*found uint8"),
        ({"frames": found.frames[0]}, rf"frames: expected uint8 .*C, U, 3, H, W.*found uint8 \[{count}, 3, "),
        ({"partners": found.frames[:, :, :2]}, r"partners: expected uint8 .*, 1, .*found uint8 .*, 2, "),
        ({"indices": found.indices[1:]}, rf"indices name 1 distinct frames .*expected the {count} of"),
        ({"num_frames": 20}, r"expected the \d+ of `frames`, in 0 \.\. 19"),
        ({"windows": found.windows[:0]}, r"windows: expected int64 \[1, 2\] .*found int64 \[0, 2\]"),
        ({"num_windows": 0}, r"1 windows from window 0 on, expected at least one, of 0"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(found, **change)


def test_a_clip_has_flow_if_its_network_looks_at_it(gop12: bytes) -> None:
    rgb_only, both = CLIP.for_network(0), CLIP.for_network(2)
    assert both is CLIP
    assert rgb_only == replace(CLIP, flow=replace(CLIP.flow, estimator="none"))
    assert decode(gop12, Sampled(), rgb_only).flow is None
    assert decode(gop12, Sampled(), both).flow is not None
    device = replace(CLIP, flow=FlowConfig(estimator="tvl1"))
    assert [clip.frame_bytes // CLIP.view.crop_px**2 for clip in (rgb_only, both, device)] == [3, 5, 4]
    with pytest.raises(ConfigError, match=r"clip\.flow\.estimator must be dis or tvl1: the network has 2 channels of"):
        rgb_only.for_network(2)


def test_threads_do_not_disturb_each_other(pictures: np.ndarray) -> None:
    files = [make_video(pictures[k : k + 40], gop=12) for k in range(4)]
    expected = [decode(data, Sampled(), CLIP).clip() for data in files]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            clips = list(pool.map(lambda data: decode(data, Sampled(), CLIP).clip(), files))
            for clip, other in zip(clips, expected, strict=True):
                assert np.array_equal(clip.frames, other.frames)
                assert np.array_equal(clip.flow, other.flow)


def test_decode_workers_stay_small() -> None:
    """Importing torch costs a decode worker 700 MB, decord is only for who asks for it."""
    code = (
        "import sys, kinoray.video.frames, kinoray.demo.videos;"
        "print(sorted({'torch', 'ray', 'decord', 'pyarrow', 'boto3'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
