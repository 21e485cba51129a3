"""What decoding gives depends on the file and the settings, not on what the process did before.

Nothing here imports torch, so that a new process is cheap. The flow of each shape: tests/test_flow.py.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from decode_reference import moving
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import MediaError
from kinoray.video.frames import decode
from kinoray.video.request import Views
from mutations import make_mutant


def clip_of(crop_px: int) -> ClipConfig:
    return ClipConfig(
        sample=SampleConfig(num_segments=2, frames_per_segment=2),
        view=ViewConfig(resize_px=crop_px + 8, crop_px=crop_px),
    )


KINDS: dict[str, dict[str, Any]] = {
    "h264": {},
    "h264 10 bit": {"pix_fmt": "yuv420p10le"},
    "h264 4:4:4": {"pix_fmt": "yuv444p"},
    "h264 turned by 90": {"rotation": 90},
    "h264 turned by 180": {"rotation": 180},
    "h264 transport stream": {"container": "mpegts"},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "mpeg-4": {"codec": "mpeg4", "container": "avi"},
    "mpeg-2": {"codec": "mpeg2video", "container": "mpeg"},
    "jpeg, full range": {"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"},
    "rgb": {"codec": "ffv1", "container": "matroska", "pix_fmt": "bgr0"},
    "grey": {"codec": "ffv1", "container": "matroska", "pix_fmt": "gray"},
}
SIZES = ((48, 64), (96, 72), (80, 80))


def write_videos(folder: Path, num_mutants: int) -> list[str]:
    """Files of every kind and several sizes, and damaged ones; their names."""
    for place, (kind, how) in enumerate(KINDS.items()):
        height, width = SIZES[place % len(SIZES)]
        (folder / kind).write_bytes(make_video(moving(12, height, width, place), **how))
    for number in range(num_mutants):
        (folder / f"mutant {number}").write_bytes(make_mutant(number).data)
    return sorted(path.name for path in folder.iterdir())


def digest_of(data: bytes, clip: ClipConfig) -> str:
    """Of all that decoding gives, frames and flow of several cuts; or of the reason why there is none."""
    try:
        views = decode(data, Views(views=ViewsConfig(temporal=1, crops="three")), clip)
    except MediaError as error:
        return f"{type(error).__name__}: {error}"
    assert views.flow is not None
    parts = b"".join(x.tobytes() for x in (views.frames, views.flow, *views.indices))
    return hashlib.sha256(parts).hexdigest() + f" {views.frames_decoded} {views.frames_corrupt}"


def decode_in_order(folder: str, names: Sequence[str], crops: Sequence[int]) -> dict[str, str]:
    """Name and crop -> digest, in one process."""
    return {
        f"{name}, {crop}": digest_of((Path(folder) / name).read_bytes(), clip_of(crop))
        for name in names
        for crop in crops
    }


def decode_elsewhere(folder: Path, names: Sequence[str], crops: Sequence[int], fill: int) -> dict[str, str]:
    """The same in a new process in which memory that nobody wrote to holds another value, as after other videos."""
    script = "import json, sys, test_same_frames as t; print(json.dumps(t.decode_in_order(*json.loads(sys.argv[1]))))"
    # As decoders have it: large arrays, too, are from the heap and not from fresh pages, which are zero.
    memory = {"MALLOC_PERTURB_": str(fill), "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
    command = [sys.executable, "-c", script, json.dumps([str(folder), list(names), list(crops)])]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=os.environ | memory, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("num_mutants", "crops"),
    [
        pytest.param(0, (80,), id="sound"),
        pytest.param(66, (40,), id="damaged"),
        pytest.param(1000, (32, 44, 80, 224), marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id="1,000 damaged"),
    ],
)
def test_what_decoding_gives_does_not_depend_on_what_the_process_did_before(
    num_mutants: int, crops: tuple[int, ...], tmp_path: Path
) -> None:
    """Three processes, three orders: each video comes first, or after others, or again, in dirty memory."""
    names = write_videos(tmp_path, num_mutants)
    if num_mutants:
        names = [name for name in names if name.startswith("mutant")]
    expected = decode_in_order(str(tmp_path), names, crops)
    assert len(expected) == len(names) * len(crops)
    shuffled = random.Random(0).sample(names, len(names))
    for order, fill in ((names[::-1], 0x55), (shuffled, 0xAA)):
        found = decode_elsewhere(tmp_path, order, crops, fill)
        assert {name: value for name, value in found.items() if value != expected[name]} == {}
    again = [*names[:6], *names[:6]]
    assert decode_in_order(str(tmp_path), again, crops).items() <= expected.items()
