"""Whatever the bytes are, there is a clip with a count of what was damaged, or one of our errors that says why."""

import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from decode_reference import Collect, moving, plain_decode, remux
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import (
    DecoderCrashed,
    EmptyMedia,
    MediaError,
    MediaOverBudget,
    NoVideoStream,
    UndecodableVideo,
    UnreadableContainer,
)
from kinoray.label.stage import Outcome
from kinoray.video.frames import decode, probe
from kinoray.video.pyav import PyavVideo
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.transcode import transcode

NUM_FRAMES = 60
CLIP = ClipConfig(sample=SampleConfig(num_segments=4, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))


def clip_config(**decode: Any) -> ClipConfig:
    return ClipConfig(sample=CLIP.sample, view=CLIP.view, decode=DecodeConfig(**decode))


@pytest.fixture(scope="module")
def good() -> bytes:
    return make_video(moving(NUM_FRAMES), fps=30, gop=24, options={"preset": "medium", "x264-params": "b-pyramid=none"})


@pytest.fixture(scope="module")
def reference(good: bytes) -> list[np.ndarray]:
    return plain_decode(good)


@pytest.mark.parametrize("container", ["avi", "matroska"])
def test_counts_that_a_header_makes_up_fit_a_table(container: str) -> None:
    data = make_video(moving(20), fps=60, codec="mpeg4", container=container)
    if container == "avi":
        place = data.index(b"strh") + 8 + 32  # dwLength
        data = data[:place] + b"\xff" * 4 + data[place + 4 :]
    else:
        data, num_times = re.subn(rb"\d\d:\d\d:\d\d\.\d{9}", b"9999:59:59.9999999", data)
        assert num_times
    outcome = Outcome()
    outcome.add(decode(data, Sampled(), CLIP.without_flow()))
    assert pa.array([outcome.frames_missing], pa.int32()).to_pylist() == [2**31 - 1 - 20]


def patched(data: bytes, name: bytes, place: int, value: int) -> bytes:
    """A 32-bit number of a box, so many bytes behind its name, is another."""
    at = data.index(name) + len(name) + place
    return data[:at] + value.to_bytes(4) + data[at + 4 :]


def ending_empty(data: bytes, count: int) -> bytes:
    """The AVI with so many empty chunks at its end, as a screen recorder writes them while nothing moves."""
    chunk = b"00dc" + bytes(4)
    movi, index, length = data.index(b"movi"), data.index(b"idx1"), data.index(b"strh") + 8 + 32

    def longer(place: int, by: int) -> bytes:
        return (int.from_bytes(data[place : place + 4], "little") + by).to_bytes(4, "little")

    return (
        (data[:4] + longer(4, count * 24) + data[8:length] + longer(length, count))
        + (data[length + 4 : movi - 4] + longer(movi - 4, count * 8) + data[movi:index] + chunk * count)
        + (b"idx1" + longer(index + 4, count * 16) + data[index + 8 :] + (b"00dc" + bytes(12)) * count)
    )


@pytest.fixture(scope="module")
def whole_files() -> dict[str, tuple[bytes, int, float]]:
    """Whole files whose headers count otherwise than they hold frames: (file, frames, seconds)."""
    plain = make_video(moving(48), fps=24, codec="mpeg4", gop=12)
    ordered = make_video(moving(48), fps=24, gop=12, options={"preset": "medium"})
    dropped = make_video(moving(24), fps=24, codec="mpeg4", container="avi", pts=[2 * number for number in range(24)])
    few = patched(ordered, b"stsz", 8 + 4 * 48, 0)  # the last sample is empty
    return {
        "matroska, late": (remux(ordered, "matroska", shift=Fraction(-100_000)), 48, 2),
        "matroska, early": (
            remux(ordered, "matroska", shift=Fraction(1, 3), options={"avoid_negative_ts": "0"}),
            48,
            2,
        ),
        "matroska, the last frame stays": (
            make_video(moving(4), fps=10, container="matroska", pts=[0, 1, 2, 90]),
            4,
            9.1,
        ),
        "avi, dropped": (dropped, 24, 47 / 24),
        "avi, dropped at its end": (ending_empty(dropped, 25), 24, 72 / 24),
        "fragments": (remux(plain, "mp4", options={"movflags": "frag_keyframe"}), 48, 2),
        "fragments, empty index": (remux(plain, "mp4", options={"movflags": "frag_keyframe+empty_moov"}), 48, 2),
        "mp4, early": (remux(ordered, "mp4", shift=Fraction(1, 3)), 40, 40 / 24),
        "edit list, shorter": (patched(ordered, b"elst", 8, 1000), 24, 1),
        "empty sample": (few, 47, 47 / 24),
    }


WHOLE = [
    "matroska, late",
    "matroska, early",
    "matroska, the last frame stays",
    "avi, dropped",
    "avi, dropped at its end",
    "fragments",
    "fragments, empty index",
    "mp4, early",
    "edit list, shorter",
    "empty sample",
]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_not_said_to_be_cut(name: str, whole_files: dict[str, tuple[bytes, int, float]]) -> None:
    data, num_frames, seconds = whole_files[name]
    info = probe(data, DecodeConfig())
    assert (info.num_frames, info.frames_missing, info.miscounted) == (num_frames, 0, False)
    assert info.duration_s == pytest.approx(seconds, abs=0.06)


@pytest.mark.parametrize(("name", "share"), [("matroska, late", 0.6), ("avi, dropped", 0.9)])
def test_the_same_files_cut_short_lack_frames(
    name: str, share: float, whole_files: dict[str, tuple[bytes, int, float]]
) -> None:
    data, num_frames, _ = whole_files[name]
    info = probe(data[: int(len(data) * share)], DecodeConfig())
    assert info.num_frames < num_frames
    assert (
        num_frames - 2 <= info.num_frames + info.frames_missing < 1.2 * num_frames
    )  # chunks that are gone were empty?


def test_counts_of_many_windows_that_add_up_to_more_than_a_table_holds_refuse_the_video(good: bytes) -> None:
    part = replace(decode(good, Sampled(), CLIP.without_flow()), frames_decoded=2**31 - 1)
    outcome = Outcome()
    outcome.add(part)
    with pytest.raises(DecoderCrashed, match="its decoder counts 4,294,967,294 frames"):
        outcome.add(part)


# Files that give an error


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("empty", EmptyMedia, r"^the file has 0 bytes"),
        ("random", UnreadableContainer, r"^20,000 bytes are no video file of a known format, or its index is lost: "),
        ("index_lost", UnreadableContainer, r"bytes are no video file .* index is lost: Invalid data found"),
        ("audio_only", NoVideoStream, r"^no video stream: the file holds audio$"),
    ],
)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_broken_files_give_typed_errors(
    kind: str, error: type[MediaError], message: str, backend: str, good: bytes
) -> None:
    data, config = make_broken(kind, good), clip_config(backend=backend)
    for attempt in (
        lambda: decode(data, Sampled(), config).clip(),
        lambda: probe(data, config.decode),
        lambda: decode(data, Thumbnails(num_frames=3, height=32), config),
    ):
        with pytest.raises(error, match=message) as caught:
            attempt()
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))  # errors travel between processes
        assert (type(again), str(again)) == (error, str(caught.value))


@pytest.mark.parametrize("kind", ["cut_front_index", "one_frame"])
def test_damaged_files_that_hold_frames_give_clips(kind: str, good: bytes) -> None:
    clip = decode(make_broken(kind, good), Sampled(), CLIP).clip()
    assert clip.frames.any()
    assert (clip.num_frames == 1) is (kind == "one_frame")


def test_a_file_without_a_decodable_frame_is_undecodable(good: bytes) -> None:
    spoilt = remux(good, "mp4", spoil=frozenset(range(NUM_FRAMES)))
    with pytest.raises(
        UndecodableVideo, match=r"no frame comes out of 60 h264 packets \(\d\d refused by the decoder\)"
    ):
        decode(spoilt, Sampled(), CLIP.without_flow()).clip()
    with pytest.raises(UndecodableVideo, match="no frame comes out"):
        probe(spoilt, DecodeConfig())


KEYS = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0123456789abcdef" * 2, "encryption_kid": "1" * 32}


def encrypted(good: bytes, form: str) -> bytes:
    if form == "mp4":
        return remux(good, "mp4", options=KEYS)
    if form == "mp4 in fragments":
        return remux(good, "mp4", options=KEYS | {"movflags": "frag_keyframe+empty_moov"})
    if form == "matroska":
        return matroska_encrypted(remux(good, "matroska"))
    if form == "mpegts, scrambled":
        data = remux(good, "mpegts")
        packets = np.frombuffer(data, np.uint8).reshape(-1, 188).copy()
        is_video = (packets[:, 1] & 31 == 1) & (packets[:, 2] == 0)  # PID 256
        packets[is_video, 3] |= 0x80
        return packets.tobytes()
    if form == "mpegts, sample-aes":
        return sample_aes(remux(good, "mpegts"))
    data = make_video(moving(20), fps=30, codec="wmv2", container="asf")
    place = data.index(bytes.fromhex("9107DCB7B7A9CF118EE600C00C205365"))  # the stream properties, last of the header
    box = bytes.fromhex("FBB3112223BDD211B4B700A0C955FC6E") + (40).to_bytes(8, "little") + bytes(16)
    size = int.from_bytes(data[16:24], "little") + len(box)
    count = int.from_bytes(data[24:28], "little") + 1
    head = data[:16] + size.to_bytes(8, "little") + count.to_bytes(4, "little")
    return head + data[28:place] + box + data[place:]


def matroska_encrypted(data: bytes) -> bytes:
    """A ContentEncryption is put into the only track, and what is around it made so much longer."""
    inner = bytes.fromhex("50338101") + bytes.fromhex("503580")
    encoding = bytes.fromhex("6240") + bytes([0x80 | len(inner)]) + inner
    added = bytes.fromhex("6d80") + bytes([0x80 | len(encoding)]) + encoding
    place = 0
    for name in ("18538067", "1654ae6b", "ae"):
        while (place := data.index(bytes.fromhex(name), place)) and name == "1654ae6b" and data[place + 4] == 0x53:
            place += 4  # only named in the index
        size_at = place + len(name) // 2
        length = 9 - data[size_at].bit_length()
        size = int.from_bytes(data[size_at : size_at + length]) + len(added)
        data = data[:size_at] + size.to_bytes(length) + data[size_at + length :]
        place = size_at + length
    return data[:place] + added + data[place:]


def sample_aes(data: bytes) -> bytes:
    """The program map says H.264 in SAMPLE-AES (0xDB) instead of H.264 (0x1B)."""
    packets = [bytearray(data[place : place + 188]) for place in range(0, len(data), 188)]
    for packet in packets:
        if packet[5:6] == b"\x02" and packet[1] & 0x40:  # a section of a program map, after its pointer
            size = int.from_bytes(packet[6:8]) & 0xFFF
            section = packet[5 : 5 + 3 + size - 4]
            section[section.index(b"\x1b\xe1\x00")] = 0xDB
            packet[5 : 5 + 3 + size] = section + mpeg_crc(section)
    return b"".join(bytes(packet) for packet in packets)


def mpeg_crc(data: bytes) -> bytes:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value.to_bytes(4)


FORMS = ["mp4", "mp4 in fragments", "matroska", "mpegts, scrambled", "mpegts, sample-aes", "asf"]


@pytest.mark.parametrize("form", FORMS)
def test_encrypted_files_are_refused_by_name(form: str, good: bytes) -> None:
    data = encrypted(good, form)
    with pytest.raises(UndecodableVideo, match="the video is encrypted"):
        probe(data, DecodeConfig())


def noisy(packet: bytes) -> bytes:
    """An MP4's H.264 packet as SAMPLE-AES leaves it: the first bytes of each slice are clear."""
    noise = np.random.default_rng(0).integers(4, 256, len(packet)).astype(np.uint8).tobytes()
    place = 0
    while place < len(packet):
        end = place + 4 + int.from_bytes(packet[place : place + 4])
        if packet[place + 4] & 31 in (1, 5):
            packet = packet[: place + 20] + noise[place + 20 : end] + packet[max(end, place + 20) :]
        place = end
    return packet


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_a_video_whose_frames_are_all_damaged_is_no_label(container: str) -> None:
    """Encrypted, say, though the container does not tell."""
    sound = make_video(moving(20, 240, 320), fps=30, gop=24, options={"preset": "medium", "crf": "10"})
    data = remux(sound, container, change=noisy)
    assert probe(data, DecodeConfig()).num_frames == 20
    for num_frames in (4, 20):  # one frame of noise decodes by chance
        with pytest.raises(UndecodableVideo, match=r"(all 4 wanted|19 of 20 decoded) frames are damaged; .* encrypted"):
            decode(data, Thumbnails(num_frames=num_frames, height=32), CLIP)
    with pytest.raises(UndecodableVideo, match="19 of 20 decoded frames are damaged"):
        transcode(data, DecodeConfig())


def test_a_clip_with_one_whole_frame_is_a_label(good: bytes) -> None:
    places = iter(range(NUM_FRAMES))
    data = remux(good, "mp4", change=lambda packet: packet if next(places) < 25 else noisy(packet))
    clip = decode(data, Sampled(), CLIP).clip()
    assert 0 < clip.frames_corrupt < NUM_FRAMES


def test_an_unknown_codec_is_undecodable(good: bytes) -> None:
    with pytest.raises(UndecodableVideo, match="no decoder for the video stream's codec"):
        probe(good.replace(b"avc1", b"zzzz"), DecodeConfig())


def test_a_video_without_packets_is_undecodable(good: bytes) -> None:
    nothing = good[: good.index(b"mdat") + 8]
    with pytest.raises(UndecodableVideo, match="holds no packet of the video stream"):
        probe(nothing, DecodeConfig())


def test_decord_names_the_way_out(good: bytes) -> None:
    with pytest.raises(UndecodableVideo, match=r"^decord cannot read this h264 file: .*; try decode\.backend=pyav$"):
        decode(make_broken("cut_front_index", good), Sampled(), clip_config(backend="decord").without_flow()).clip()


# Damage inside


def read_all(data: bytes) -> tuple[dict[int, np.ndarray], int]:
    """(every frame by number, how many are corrupt)"""
    with PyavVideo(data, DecodeConfig()) as video:
        sink = Collect()
        reading = video.read(np.arange(video.num_frames), sink)
        return sink.frames, reading.frames_corrupt


def test_a_cut_file_gives_the_frames_that_are_there(good: bytes, reference: list[np.ndarray]) -> None:
    frames, corrupt = read_all(make_broken("cut_front_index", good))
    known = {frame.tobytes(): number for number, frame in enumerate(reference)}
    numbers = [known[frames[index].tobytes()] for index in sorted(frames)]
    assert corrupt == 0
    assert numbers == sorted(set(numbers))
    assert 20 < len(numbers) < 50


def test_a_missing_frame_is_replaced_by_the_one_before_and_counted(good: bytes, reference: list[np.ndarray]) -> None:
    """Frame numbers stay right behind it. Frames shown before the packet that was decoded last are b-frames here."""
    with PyavVideo(good, DecodeConfig()) as video:
        number = video.table.frame_of.tolist()
    places = [place for place in range(3, NUM_FRAMES) if number[place] < number[place - 1]][2::4]
    lost = [number[place] for place in places]
    frames, corrupt = read_all(remux(good, "mp4", spoil=frozenset(places)))
    assert corrupt == len(lost) >= 3
    assert sorted(frames) == list(range(NUM_FRAMES))
    for index in range(NUM_FRAMES):
        assert np.array_equal(frames[index], reference[index - 1 if index in lost else index])


def test_damage_is_counted_even_where_it_is_not_sampled(good: bytes) -> None:
    one = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=1), view=CLIP.view)
    clip = decode(remux(good, "mp4", spoil=frozenset({22})), Sampled(), one.without_flow()).clip()
    assert clip.indices.tolist() == [[30]]
    assert clip.num_frames == NUM_FRAMES
    assert clip.frames_corrupt >= 1


def test_frames_whose_key_frame_is_lost_do_not_exist_but_are_counted(good: bytes, reference: list[np.ndarray]) -> None:
    with PyavVideo(good, DecodeConfig()) as video:
        second_key = video.table.runs_for(np.array([25]))[0].begin
    frames, corrupt = read_all(remux(good, "mp4", spoil=frozenset({0})))
    assert 10 < second_key < 50
    assert corrupt == second_key
    assert len(frames) == NUM_FRAMES - second_key
    assert all(np.array_equal(frames[index], reference[second_key + index]) for index in frames)


def test_leading_frames_of_a_stream_that_begins_with_an_open_group_are_replaced() -> None:
    """They are shown before the first key frame and refer to the group that is not there."""
    params = "log-level=none:open-gop=1:keyint=24:min-keyint=24:bframes=4:scenecut=0"
    whole = make_video(moving(72), fps=30, codec="libx265", options={"preset": "medium", "x265-params": params})
    with PyavVideo(whole, DecodeConfig()) as video:
        key = video.table.runs_for(np.array([50]))[0].begin
    begins_open = remux(whole, "matroska", first=key)
    frames, corrupt = read_all(begins_open)
    out = plain_decode(begins_open)
    num_leading = len(frames) - len(out)
    assert 1 <= corrupt == num_leading <= 4
    assert all(np.array_equal(frames[index], out[0]) for index in range(num_leading + 1))
    assert all(np.array_equal(frames[num_leading + index], frame) for index, frame in enumerate(out))


def test_forty_damaged_places_cost_few_frames() -> None:
    data = bytearray(make_video(moving(300, 48, 64), fps=30, gop=250, options={"preset": "medium"}))
    rng = np.random.default_rng(0)
    begin = data.index(b"mdat") + 3000  # the first key frame stays whole
    for place in rng.integers(begin, len(data) - 20, 40):
        data[place : place + 20] = rng.bytes(20)
    with PyavVideo(bytes(data), DecodeConfig()) as video:
        sink = Collect()
        reading = video.read(np.arange(300), sink)
    assert sorted(sink.frames) == list(range(300))
    assert 5 <= reading.frames_corrupt <= 60
    assert len({frame.tobytes() for frame in sink.frames.values()}) >= 280  # the rest are replaced


def test_where_frames_are_counted_a_shorter_count_is_sampled_again() -> None:
    """In AVI a lost frame cannot be placed: what comes out is counted, and the clip is spread over that many."""
    whole = make_video(moving(NUM_FRAMES), fps=30, codec="mpeg4", container="avi", gop=30)
    spoilt = remux(whole, "avi", spoil=frozenset({3, 4, 31, 50}))
    clip = decode(spoilt, Sampled(), CLIP.without_flow()).clip()
    assert clip.num_frames < NUM_FRAMES
    assert clip.frames_corrupt >= 1
    assert clip.indices.max() < clip.num_frames
    assert clip.info.num_frames == clip.num_frames
    assert clip.frames.reshape(8, -1).any(axis=1).all()


def test_damage_is_not_talked_about_on_stderr(good: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    read_all(remux(good, "mp4", spoil=frozenset({3, 8})))
    assert capfd.readouterr() == ("", "")


# Limits


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_bytes": 1000},
            r"^[\d,]+ bytes are more than decode\.max_bytes = 1,000 \(--decode\.max-bytes; ",
        ),
        (
            {"max_pixels": 96 * 64 - 1},
            r"^96 x 64 = 6,144 pixels are more than decode\.max_pixels = 6,143 \(--",
        ),
        ({"max_duration_s": 1.9}, r"^2\.0 s are more than decode\.max_duration_s = 1\.9 \(--"),
        ({"max_frames": 40}, r"^\d\d frames to decode are more than decode\.max_frames = 40 \(--"),
    ],
)
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_videos_over_a_limit_are_refused_with_the_numbers(
    limits: dict[str, Any], message: str, backend: str, good: bytes
) -> None:
    with pytest.raises(MediaOverBudget, match=message):
        decode(good, Sampled(), clip_config(backend=backend, **limits).without_flow()).clip()


def test_videos_at_the_limits_are_read(good: bytes) -> None:
    config = clip_config(max_bytes=len(good), max_pixels=96 * 64, max_duration_s=2.0, max_frames=NUM_FRAMES)
    assert decode(good, Sampled(), config).clip().num_frames == NUM_FRAMES


def test_only_frames_that_must_be_decoded_count_against_the_limit(good: bytes) -> None:
    one = ClipConfig(
        sample=SampleConfig(num_segments=1, frames_per_segment=1), view=CLIP.view, decode=DecodeConfig(max_frames=12)
    )
    assert decode(good, Sampled(), one.without_flow()).clip().indices.tolist() == [[30]]
    assert probe(good, one.decode).num_frames == NUM_FRAMES


@pytest.mark.parametrize("size", [48, 1024])
def test_frames_that_grow_over_the_limit_are_refused(size: int) -> None:
    """The growth comes 30 s into the stream, after what libav looks at when it opens a file."""
    small = make_video(moving(30, 32, 32), fps=1, container="mpegts")
    large = make_video(moving(2, size, size), fps=1, container="mpegts", pts=[100, 101])
    with PyavVideo(small + large, DecodeConfig()) as video:
        assert video.context.width == 32
    config = clip_config(max_pixels=32 * 32)
    if size == 48:
        with pytest.raises(MediaOverBudget, match="48 x 48 = 2,304 pixels are more than"):
            decode(small + large, Sampled(), config.without_flow()).clip()
    else:  # so large that libav does not begin to decode them: damage like any other
        clip = decode(small + large, Sampled(), config.without_flow()).clip()
        assert clip.frames_corrupt >= 1
        assert (clip.info.width, clip.info.height) == (32, 32)


def test_a_huge_frame_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """libav by itself decodes a frame when it opens a file: 40 MB more, from 50 kB. Measured in a new process."""
    bomb = tmp_path / "bomb.mp4"
    bomb.write_bytes(make_video(np.zeros((1, 4096, 4096, 3), np.uint8), options={"preset": "ultrafast"}))
    assert bomb.stat().st_size < 100_000
    code = """
import re, sys
from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaOverBudget
from kinoray.video.frames import probe
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
data, before = open(sys.argv[1], "rb").read(), peak_mb()
try:
    probe(data, DecodeConfig(max_pixels=int(sys.argv[2])))
except MediaOverBudget:
    print("refused", end=" ")
print(peak_mb() - before)
"""
    command = [sys.executable, "-c", code, str(bomb)]
    refused = subprocess.run([*command, str(2**23)], capture_output=True, text=True, check=True).stdout.split()
    decoded = subprocess.run([*command, str(2**24)], capture_output=True, text=True, check=True).stdout.split()
    assert refused[0] == "refused"
    assert int(refused[1]) <= 16
    assert int(decoded[0]) >= 30


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_thin_frame_is_not_enlarged_without_limit(backend: Any) -> None:
    data = make_video(np.zeros((2, 16384, 16, 3), np.uint8), options={"preset": "ultrafast"})
    thin = ClipConfig(sample=CLIP.sample, view=ViewConfig(resize="short_side"), decode=DecodeConfig(backend=backend))
    with pytest.raises(MediaOverBudget, match=r"scaled to 256 x 262144, has 67,108,864 pixels, more than 33,554,432"):
        decode(data, Sampled(), thin.without_flow()).clip()
    assert decode(data, Sampled(), clip_config(backend=backend).without_flow()).clip().num_frames == 2


# Files that point elsewhere


@pytest.fixture
def contacts() -> Any:
    """(address, list of requests so far) of a server on loopback."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


REFERRING = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns={target}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
    "smil": '<smil><body><video src="{target}"/></body></smil>',
}


@pytest.mark.parametrize("form", REFERRING)
def test_files_that_refer_to_others_are_refused_and_nothing_is_contacted(
    form: str, contacts: tuple[str, list[str]], good: bytes, tmp_path: Path
) -> None:
    address, seen = contacts
    local = tmp_path / "other.mp4"
    local.write_bytes(good)
    for target in (f"{address}/{form}.mp4", str(local), f"file://{local}"):
        text = REFERRING[form].format(target=target).encode()
        with pytest.raises(UnreadableContainer) as caught:
            decode(text, Sampled(), CLIP.without_flow()).clip()
        assert str(tmp_path) not in str(caught.value)
    assert seen == []


@pytest.mark.parametrize("kind", ["png", "wav", "text", "one byte"])
def test_files_of_other_kinds_are_refused(kind: str) -> None:
    import cv2

    data = {
        "png": cv2.imencode(".png", moving(1)[0])[1].tobytes(),
        "wav": b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0@\x1f\0\0\1\0\x08\0data",
        "text": b"not a video\n" * 50,
        "one byte": b"x",
    }[kind]
    with pytest.raises(UnreadableContainer):
        probe(data, DecodeConfig())


# Anything


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    kind = rng.integers(4)
    place = int(rng.integers(0, len(out)))
    if kind == 0:
        for position in rng.integers(0, len(out), int(rng.integers(1, 20))):
            out[position] = rng.integers(256)
    elif kind == 1:
        del out[place : place + int(rng.integers(1, 300))]
    elif kind == 2:
        del out[max(1, place) :]
    else:
        place %= 1500
        out[place : place + 4] = rng.bytes(4)
    return bytes(out)


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {}),
        ("libx264", "matroska", {}),
        ("libx264", "mpegts", {}),
        ("libx265", "mp4", {"x265-params": "log-level=none"}),
        ("libvpx-vp9", "webm", {}),
        ("mpeg4", "avi", {}),
        ("wmv2", "asf", {}),
    ],
)
def test_mutated_files_give_a_clip_or_a_media_error(codec: str, container: str, options: dict[str, str]) -> None:
    data = make_video(moving(20, 32, 32), codec=codec, container=container, options=options)
    config = clip_config(max_pixels=2**18)  # a flipped bit can make a frame huge
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(80):
        try:
            clip = decode(mutate(data, rng), Sampled(), config.without_flow()).clip()
        except MediaError as error:
            outcomes.append(type(error).__name__)
            continue
        outcomes.append("clip")
        assert clip.frames.shape == (4, 2, 3, 24, 24)
        assert 0 <= clip.indices.min() <= clip.indices.max() < clip.num_frames
    assert outcomes.count("clip") >= 20
    assert len(set(outcomes)) >= 2
