"""Files that ask for much or point elsewhere are refused at once, with the reason, by a decoder that lives on."""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import bombs
from decode_reference import moving
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig
from kinoray.demo.videos import make_video
from kinoray.errors import MediaError, MediaOverBudget
from kinoray.video.frames import decode, probe
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.sandbox.pool import Sandbox
from test_decode_damage import REFERRING, contacts

__all__ = ["contacts"]  # a fixture

CPU_LIMIT_S = 0.2
MEMORY_LIMIT_MB = 64


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One decoder, which has decoded before."""
    with Sandbox(1) as sandbox:
        sandbox.decode(bombs.tiny(), Sampled(), ClipConfig().without_flow()).clip()
        yield sandbox


def idle_pid(sandbox: Sandbox) -> int:
    (process,) = sandbox._idle
    return process.pid


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_bombs_are_refused_at_once(name: str, sandbox: Sandbox) -> None:
    make, error, message = bombs.BOMBS[name]
    data = make()
    assert len(data) < 2_000_000
    pid = idle_pid(sandbox)
    if os.geteuid() == 0:  # nobody else may touch a decoder
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    idle_mb, before_s = memory_mb(pid, "VmRSS"), cpu_s(pid)
    with pytest.raises(error, match=message) as caught:
        sandbox.decode(data, Sampled(), ClipConfig()).clip()
    assert type(caught.value) is error
    assert idle_pid(sandbox) == pid
    assert cpu_s(pid) - before_s <= CPU_LIMIT_S
    if os.geteuid() == 0:
        assert memory_mb(pid, "VmHWM") - idle_mb <= MEMORY_LIMIT_MB


@pytest.mark.parametrize("name", bombs.LIES)
def test_lies_that_cost_nothing_are_read(name: str, sandbox: Sandbox) -> None:
    clip = sandbox.decode(bombs.LIES[name](), Sampled(), ClipConfig().without_flow()).clip()
    assert clip.num_frames in (2, 3)
    assert (clip.info.width, clip.info.height) == (16, 16)


def test_what_is_odd_but_honest_is_read() -> None:
    """A hundred edits, a compressed index of its true size, a file cut short whose index lists five hours."""
    frame = bombs.key_frame()
    entry = bombs.sample_entry(b"avc1", 16, 16, bombs.avc_header())

    def index(begin: int) -> bytes:
        edit = bombs.box(b"edts", bombs.full(b"elst", bombs.u32(100), bombs.u32(2, 0, 0x10000) * 100))
        return bombs.track(entry, num_samples=2, sizes=len(frame), offset=begin, keys=(1, 2), edits=edit)

    assert probe(bombs.mp4(index, frame * 2), DecodeConfig()).num_frames >= 2
    whole = bombs.h264(540_000, frame)
    begin = whole.index(b"mdat") + 4
    assert probe(whole[: begin + 5 * len(frame)], DecodeConfig()).num_frames == 5


def test_the_index_refuses_only_what_must_be_decoded() -> None:
    """The middle of 390 frames behind one key frame needs 196 of them, 48 frames all over it need at least 317."""
    video, limit = bombs.h264(390, bombs.key_frame()), DecodeConfig(max_frames=200)
    with pytest.raises(
        MediaOverBudget,
        match=r"^317 or more frames to decode are more than decode\.max_frames = 200 ",
    ):
        decode(video, Sampled(), ClipConfig(decode=limit).without_flow()).clip()
    one = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=1), decode=limit)
    assert decode(video, Sampled(), one.without_flow()).clip().indices.tolist() == [[195]]


# Files that point elsewhere


def test_playlists_are_refused_and_nothing_is_contacted(
    contacts: tuple[str, list[str]], sandbox: Sandbox, tmp_path: Path
) -> None:
    address, seen = contacts
    local = tmp_path / "other.mp4"
    local.write_bytes(make_video(moving(8)))
    for form, text in REFERRING.items():
        for target in (f"{address}/{form}.mp4", str(local), f"file://{local}"):
            data = text.format(target=target).encode()
            for attempt in (
                sandbox.probe,
                lambda data, config: sandbox.decode(
                    data, Thumbnails(num_frames=2, height=32), ClipConfig(decode=config)
                ),
            ):
                with pytest.raises(MediaError) as caught:
                    attempt(data, DecodeConfig())
                assert str(tmp_path) not in str(caught.value)
    assert seen == []


def alias(path: Path) -> bytes:
    """QuickTime's data reference to a file of another name, as libav reads it."""
    name = str(path).encode()
    record = bytes(10) + bytes([1]) + b"v".ljust(27, b"\0") + bytes(12)
    record += bytes([len(path.name)]) + path.name.encode().ljust(63, b"\0") + bytes(16)
    record += struct.pack(">HH", 1, 1) + bytes(16)
    record += struct.pack(">hH", 2, len(name) + len(name) % 2) + name + bytes(len(name) % 2)
    return bombs.full(b"alis", record + struct.pack(">hH", -1, 0))


def test_pictures_in_another_file_are_not_read(sandbox: Sandbox, tmp_path: Path) -> None:
    """libav told to follow the reference shows the marker; we never do."""
    marker = tmp_path / "marker.bin"
    frame = bombs.key_frame()
    marker.write_bytes(frame * 2)
    entry = bombs.sample_entry(b"avc1", 16, 16, bombs.avc_header())

    def index(_: int) -> bytes:
        return bombs.track(entry, num_samples=2, sizes=len(frame), offset=0, keys=(1, 2), data_reference=alias(marker))

    data = bombs.mp4(index, bytes(len(frame) * 2))
    file = tmp_path / "refers.mov"
    file.write_bytes(data)
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(file), container_options=options) as container:
        packets: list[Any] = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert packets == [frame, frame]
    with pytest.raises(MediaError):
        sandbox.probe(data, DecodeConfig())
    # Where the file itself holds pictures, those are the ones that are read.
    own = make_video(np.full((2, 16, 16, 3), 255, np.uint8), options={"preset": "ultrafast"})
    assert sandbox.probe(own.replace(b"url ", b"alis", 1), DecodeConfig()).num_frames == 2
