"""Frame counts and pixels of over a hundred kinds of files are ffmpeg's, and docs/decoders.md says so."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from decode_reference import moving
from kinoray.config.shared import DecodeConfig
from kinoray.demo.videos import make_video
from kinoray.errors import UnreadableContainer
from kinoray.video.frames import probe
from kinoray.video.sandbox.pool import Sandbox
from zoo import LIMIT, PAGE, ZOO, look, make, row

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is not on this machine")
REMEDIES = {"animated WebP": "make a GIF", "RealMedia": "make an MP4", "YUV4MPEG": "make an MP4"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as sandbox:
        yield sandbox


def rows() -> list[str]:
    """The table's lines."""
    return (
        re.split(r"\| file \| frames \|.*\n.*\n", PAGE.read_text(encoding="ascii"))[1].partition("\n\n")[0].split("\n")
    )


def test_the_table_has_a_line_for_each_file_and_none_is_off() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows()]
    assert [name for name, *_ in cells] == list(ZOO)
    assert len(ZOO) >= 60
    for name, frames, off in cells:
        assert frames == "`UnreadableContainer`" or (frames.isdigit() and float(off) <= LIMIT), name


@pytest.mark.parametrize(("container", "codec"), [("h264", "libx264"), ("mpeg2video", "mpeg2video"), ("ivf", "libvpx")])
def test_without_a_container_the_rate_is_that_of_the_codec(container: str, codec: str) -> None:
    data = make_video(moving(20), fps=50, container=container, codec=codec)
    info = probe(data, DecodeConfig())
    assert (info.num_frames, info.fps, info.duration_s) == (20, 50, 0.4)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("name", ZOO)
def test_a_file_is_what_ffmpeg_sees(name: str, tmp_path: Path, sandbox: Sandbox) -> None:
    path = make(ZOO[name], tmp_path)
    seen = look(path)
    written = next(line for line in rows() if line.startswith(f"| {name} | "))
    assert row(name, seen).rpartition(" | ")[0] == written.rpartition(" | ")[0]
    if isinstance(seen.found, str):
        with pytest.raises(UnreadableContainer, match=REMEDIES.get(name, "no video file of a known format")):
            sandbox.probe(path.read_bytes(), DecodeConfig())
        return
    assert seen.found == seen.num_frames
    assert seen.difference <= LIMIT
    info = sandbox.probe(path.read_bytes(), DecodeConfig())
    assert info.num_frames == seen.num_frames
    made = sandbox.transcode(path.read_bytes(), DecodeConfig())
    assert (made.info.num_frames, made.frames_lost) == (seen.num_frames, 0)
    assert abs(made.info.width / made.info.height - info.width / info.height) < 0.05
