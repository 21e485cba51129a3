"""Decoding on the GPU: which frames it takes, with torchcodec's processor decoder; what it refuses; what it needs.

The GPU itself is for tests/test_gpu.py.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from decode_reference import Collect, moving, plain_decode, remux, with_matrix
from kinoray.config.shared import ClipConfig, DecodeConfig, digest
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import ConfigError, MediaOverBudget, UndecodableVideo
from kinoray.video.frames import decode
from kinoray.video.pyav import PyavVideo
from kinoray.video.readers import read_on_device, require_nvdec
from kinoray.video.request import Sampled
from kinoray.video.sandbox.pool import DeviceDecoder, Sandbox
from test_torchcodec import needs_torchcodec

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def frames_of(data: bytes, wanted: list[int], config: DecodeConfig | None = None) -> dict[int, np.ndarray]:
    sink = Collect()
    with PyavVideo(data, config or DecodeConfig()) as video:
        reading = read_on_device(data, video, np.array(wanted), sink, "cpu")
    assert reading.frames_corrupt == 0
    return sink.frames


@without_gpu
def test_without_a_gpu_the_error_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"^decode\.device cuda needs an NVIDIA GPU .* use decode\.device cpu$"):
        require_nvdec()


@without_gpu
def test_a_clip_is_not_decoded_on_a_gpu_that_is_not_there() -> None:
    clip = ClipConfig(decode=DecodeConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"^decode\.device cuda needs an NVIDIA GPU"):
        decode(make_video(moving(3)), Sampled(), clip.without_flow()).clip()
    with Sandbox(1) as sandbox, pytest.raises(ConfigError, match=r"^decode\.device cuda decodes where the model runs"):
        sandbox.decode(make_video(moving(3)), Sampled(), clip.without_flow()).clip()
    with Sandbox(1) as sandbox, pytest.raises(ConfigError, match=r"^decode\.device cuda needs an NVIDIA GPU"):
        DeviceDecoder(sandbox)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_ways_to_decode_stay_with_the_processor(backend: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^decode\.device must be cpu with decode\.backend {backend}, got 'cuda'$"):
        DecodeConfig(device="cuda", backend=backend)


def test_the_device_is_part_of_the_digest() -> None:
    assert digest(ClipConfig(decode=DecodeConfig(device="cuda"))) != digest(ClipConfig())


def test_a_decoder_process_refuses_and_does_not_load_torch() -> None:
    script = (
        "import sys\n"
        "from kinoray.video.readers import require_nvdec\n"
        "try:\n    require_nvdec()\n"
        "except ValueError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("decode.device cuda decodes where the model runs, and this is a decoder process")


@needs_torchcodec
@pytest.mark.parametrize(
    ("codec", "gop", "options"),
    [
        ("libx264", 12, {"preset": "medium"}),
        ("libx264", 60, {"preset": "medium"}),
        ("libx264", 12, {"preset": "medium", "x264-params": "open-gop=1"}),
        ("libvpx-vp9", 30, {"deadline": "realtime"}),
    ],
)
def test_the_frames_are_the_wanted_ones(codec: str, gop: int, options: dict[str, str]) -> None:
    data = make_video(moving(60), codec=codec, fps=30, gop=gop, options=options)
    every = np.stack(plain_decode(data)).astype(int)
    found = frames_of(data, [0, 1, 11, 12, 13, 29, 30, 47, 59])
    for number, frame in found.items():
        off = np.abs(every - frame).mean(axis=(1, 2, 3))
        assert off.argmin() == number
        assert off[number] < 4  # another scaler


@needs_torchcodec
def test_large_frames_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_video(moving(20), fps=30, gop=12)
    at_once = frames_of(data, list(range(20)))
    monkeypatch.setattr("kinoray.video.readers._CHUNK_BYTES", 3 * 64 * 96 * 7)
    in_parts = frames_of(data, list(range(20)))
    assert at_once.keys() == in_parts.keys()
    assert all(np.array_equal(at_once[number], in_parts[number]) for number in at_once)


def odd_video(kind: str) -> bytes:
    good = make_video(moving(24), fps=30, gop=12)
    if kind == "mpegts":
        return remux(good, "mpegts")
    if kind == "rotated":
        return make_video(moving(6), rotation=90)
    if kind == "mirrored":
        return with_matrix(make_video(moving(6)), (1, 0, 0, -1))
    if kind == "avi":
        return make_video(moving(24), codec="mpeg4", container="avi")
    return make_broken("cut_front_index", good)


@needs_torchcodec
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mpegts", "torchcodec seeks to wrong places in MPEG-TS"),
        ("rotated", "it is shown turned or mirrored"),
        ("mirrored", "it is shown turned or mirrored"),
        ("avi", "its packets have no times that tell frames apart"),
        ("cut", "torchcodec counts 10 frames, the packets 9"),
    ],
)
def test_what_it_may_get_wrong_is_left_to_the_plan(kind: str, reason: str) -> None:
    with pytest.raises(UndecodableVideo, match=f"^not decoded by NVDEC: {reason}"):
        frames_of(odd_video(kind), [0, 3])


@needs_torchcodec
def test_limits_hold_before_torchcodec_sees_the_file() -> None:
    with pytest.raises(MediaOverBudget, match=r"decode\.max_frames"):
        frames_of(make_video(moving(60), gop=60), list(range(0, 60, 5)), DecodeConfig(max_frames=10))
