"""A video can end a decoder process, but no other video, no job, and not more than two processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import wait_until
from decode_reference import moving
from kinoray.config.shared import ClipConfig, DecodeConfig, ResourcesConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import BROKEN_KINDS, make_broken, make_video
from kinoray.errors import (
    ConfigError,
    DecoderCrashed,
    DecoderStartFailed,
    DecodeTimeout,
    JobError,
    MediaError,
    MediaOverBudget,
)
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.verb import label
from kinoray.storage.objects import Storage
from kinoray.train.decoding import DecodeTask
from kinoray.video.frames import Clip, decode, probe
from kinoray.video.request import Sampled, Thumbnails
from kinoray.video.sandbox import pool as sandbox_module
from kinoray.video.sandbox.pool import Sandbox, shared_sandbox
from kinoray.video.sandbox.process import DecoderProcess
from kinoray.video.transcode import transcode
from label_models import save_untrained
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=4, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))
MEMORY_MB = 48
"""Enough for small videos, too little for a decoder's frames of 4096 x 4096."""


def clip_config(**limits: Any) -> ClipConfig:
    return ClipConfig(sample=CLIP.sample, view=CLIP.view, decode=DecodeConfig(**limits))


@pytest.fixture(scope="module")
def good() -> bytes:
    return make_video(moving(40), fps=30, gop=12)


@pytest.fixture(scope="module")
def long() -> bytes:
    """About half a second of decoding."""
    return make_video(np.tile(moving(20, 240, 320), (30, 1, 1, 1)), fps=30, gop=600, options={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def hungry() -> bytes:
    return make_video(np.broadcast_to(np.uint8(90), (4, 4096, 4096, 3)), options={"preset": "ultrafast"})


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as sandbox:
        yield sandbox


def idle_pids(sandbox: Sandbox) -> list[int]:
    return [process.pid for process in sandbox._idle]


def assert_same(clip: Clip, expected: Clip) -> None:
    for name in ("frames", "flow", "indices"):
        ours, theirs = getattr(clip, name), getattr(expected, name)
        assert (ours is None) is (theirs is None), name
        assert theirs is None or (ours.dtype == theirs.dtype and np.array_equal(ours, theirs)), name
    assert astuple(clip.info) == astuple(expected.info)
    for name in ("num_frames", "frames_decoded", "frames_corrupt"):
        assert getattr(clip, name) == getattr(expected, name)


# The same as in this process


VIDEOS: dict[str, Callable[[], bytes]] = {
    "h264": lambda: make_video(moving(40), fps=30, gop=12),
    "one frame": lambda: make_video(moving(1)),
    "rotated": lambda: make_video(moving(20), rotation=90),
    "vp9": lambda: make_video(moving(20, 32, 48), codec="libvpx-vp9", container="webm"),
    "avi": lambda: make_video(moving(20), codec="mpeg4", container="avi"),
    "damaged": lambda: make_broken("cut_front_index", make_video(moving(40), gop=40)),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_results_are_those_of_decoding_here_digit_by_digit(kind: str, sandbox: Sandbox) -> None:
    data = VIDEOS[kind]()
    for config in (CLIP.without_flow(), CLIP):
        assert_same(sandbox.decode(data, Sampled(), config).clip(), decode(data, Sampled(), config).clip())
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    flips = 0
    for _ in range(6):  # one generator for all, as it would be used here
        clip = sandbox.decode(data, Sampled(rng=ours), CLIP).clip()
        expected = decode(data, Sampled(rng=theirs), CLIP).clip()
        assert_same(clip, expected)
        flips += not np.array_equal(clip.frames, sandbox.decode(data, Sampled(), CLIP).clip().frames)
    assert flips
    assert ours.integers(2**60) == theirs.integers(2**60)
    assert astuple(sandbox.probe(data, CLIP.decode)) == astuple(probe(data, CLIP.decode))
    images = zip(
        sandbox.decode(data, Thumbnails(num_frames=3, height=24), CLIP).pictures(),
        decode(data, Thumbnails(num_frames=3, height=24), CLIP).pictures(),
        strict=True,
    )
    assert all(np.array_equal(image, expected) for image, expected in images)
    assert len(idle_pids(sandbox)) == 1


def test_other_generators_work_too(sandbox: Sandbox, good: bytes) -> None:
    ours, theirs = (np.random.Generator(np.random.MT19937(3)) for _ in range(2))
    for _ in range(2):
        assert_same(
            sandbox.decode(good, Sampled(rng=ours), CLIP.without_flow()).clip(),
            decode(good, Sampled(rng=theirs), CLIP.without_flow()).clip(),
        )


def test_transcoding_gives_the_same_file(sandbox: Sandbox, good: bytes) -> None:
    assert sandbox.transcode(good, DecodeConfig()) == transcode(good, DecodeConfig())


@pytest.mark.parametrize("kind", [kind for kind in BROKEN_KINDS if kind not in ("cut_front_index", "one_frame")])
def test_errors_are_those_of_decoding_here(kind: str, sandbox: Sandbox, good: bytes) -> None:
    data = make_broken(kind, good)
    pairs: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: sandbox.probe(data, CLIP.decode), lambda: probe(data, CLIP.decode)),
        (
            lambda: sandbox.decode(data, Sampled(), CLIP).clip(),
            lambda: decode(data, Sampled(), CLIP).clip(),
        ),
    ]
    for ours, theirs in pairs:
        with pytest.raises(MediaError) as expected:
            theirs()
        with pytest.raises(MediaError) as found:
            ours()
        assert (type(found.value), str(found.value)) == (type(expected.value), str(expected.value))


def test_limits_hold_and_a_refusal_does_not_cost_the_process(sandbox: Sandbox, good: bytes) -> None:
    sandbox.probe(good, DecodeConfig())
    (pid,) = idle_pids(sandbox)
    for limits in ({"max_bytes": 100}, {"max_pixels": 100}, {"max_duration_s": 0.1}, {"max_frames": 3}):
        with pytest.raises(MediaOverBudget, match=f"more than decode.{next(iter(limits))}"):
            sandbox.decode(good, Sampled(), clip_config(**limits).without_flow()).clip()
    assert idle_pids(sandbox) == [pid]


def test_a_clip_is_the_callers_own_and_sizes_may_change(sandbox: Sandbox, good: bytes) -> None:
    first = sandbox.decode(good, Sampled(), CLIP).clip()
    kept = first.frames.copy()
    large = ClipConfig(sample=SampleConfig(num_segments=16, frames_per_segment=3), view=ViewConfig())
    for config in (large, CLIP, large):
        assert_same(sandbox.decode(good, Sampled(), config).clip(), decode(good, Sampled(), config).clip())
    assert np.array_equal(first.frames, kept)
    first.frames[...] = 0


def test_a_process_is_replaced_for_a_file_or_a_limit_that_it_has_no_room_for(sandbox: Sandbox, good: bytes) -> None:
    pids = []
    for size_bytes, max_memory_mb in ((0, 64), (2**26, 64), (2**26 + 1, 64), (0, 64), (0, 192), (0, 193)):
        config = DecodeConfig(max_memory_mb=max_memory_mb)
        process = sandbox._idle_process(False, config, size_bytes)
        assert process.room_bytes >= max_memory_mb * 2**20 + size_bytes
        sandbox._idle.append(process)
        pids.append(process.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] != pids[5]


def test_a_back_end_that_is_missing_is_the_settings_error(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    script = "import sys; sys.modules['decord'] = None; from kinoray.video.sandbox import child; child.main()"
    python.write_text(f'#!/bin/sh\nshift 4\nexec {shlex.quote(sys.executable)} -c {shlex.quote(script)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("kinoray.video.sandbox.process._PYTHON", str(python))
    with (
        Sandbox(1) as sandbox,
        pytest.raises(ConfigError, match=r"^decode\.backend decord cannot be imported .* or use"),
    ):
        sandbox.probe(good, DecodeConfig(backend="decord"))


# What the process is


def test_a_decoder_has_no_torch_no_ray_and_no_credentials(
    sandbox: Sandbox, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-test")
    sandbox.decode(good, Sampled(), CLIP).clip()
    (pid,) = idle_pids(sandbox)
    if os.geteuid() != 0:
        pytest.skip("only root sees into a decoder; tests/test_jail.py asks from inside")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "_raylet" not in maps
    assert "libavcodec" in maps
    assert b"canary-of-the-test" not in Path(f"/proc/{pid}/environ").read_bytes()
    descriptors = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert len(descriptors) <= 6, descriptors


def gone(pid: int) -> bool:
    """Whether the process has ended; its zombie may wait for whoever inherits it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_decoders_end_with_close_and_with_the_last_reference(good: bytes) -> None:
    sandbox = Sandbox(2)
    sandbox.probe(good, DecodeConfig())
    (pid,) = idle_pids(sandbox)
    sandbox.close()
    assert gone(pid)
    sandbox.probe(good, DecodeConfig())
    (pid,) = idle_pids(sandbox)
    del sandbox
    wait_until(lambda: gone(pid), 10, "the decoder of a forgotten sandbox ends")


PARENT = """
import json, os, signal, sys, threading, time
from kinoray.config.shared import DecodeConfig
from kinoray.video.sandbox.pool import Sandbox
data = open(sys.argv[1], "rb").read()
sandbox = Sandbox(2)
threads = [threading.Thread(target=sandbox.probe, args=(data, DecodeConfig())) for _ in range(2)]
config = DecodeConfig()
with sandbox._process(config, 0, new=True) as first, sandbox._process(config, 0, new=True) as second:
    first.ask("probe", data, DecodeConfig(), {"config": DecodeConfig()})
    second.ask("probe", data, DecodeConfig(), {"config": DecodeConfig()})
    os.kill(second.pid, signal.SIGSTOP)
    print(json.dumps([first.pid, second.pid]), flush=True)
    time.sleep(600)
"""


def test_decoders_die_with_a_parent_that_is_killed_also_when_they_are_stopped(good: bytes, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(good)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(video)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert not any(gone(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: all(gone(pid) for pid in pids), 20, "the decoders are gone")


def test_a_thread_that_started_a_decoder_may_end(sandbox: Sandbox, good: bytes) -> None:
    """The kernel's signal for a parent's death is sent when the thread that started the process ends."""
    thread = threading.Thread(target=sandbox.probe, args=(good, DecodeConfig()))
    thread.start()
    thread.join()
    (pid,) = idle_pids(sandbox)
    sandbox.probe(good, DecodeConfig())
    assert idle_pids(sandbox) == [pid]


def test_the_shared_sandbox_is_one_and_grows() -> None:
    first = shared_sandbox(1)
    size = first.num_children
    assert shared_sandbox(size + 1) is first
    assert first.num_children == size + 1
    assert shared_sandbox(1).num_children == size + 1


# Deaths


def stop_idle(sandbox: Sandbox) -> int:
    """Stop the idle decoder: the next video waits in it."""
    (pid,) = idle_pids(sandbox)
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_video_whose_decoder_is_killed_is_tried_again_in_a_new_one(sandbox: Sandbox, good: bytes) -> None:
    sandbox.probe(good, DecodeConfig())
    pid = stop_idle(sandbox)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(sandbox.decode, good, Sampled(), CLIP)
        wait_until(lambda: sandbox.busy_pids() == [pid], 20, "the video is in the stopped decoder")
        os.kill(pid, signal.SIGKILL)
        assert_same(future.result().clip(), decode(good, Sampled(), CLIP).clip())
    assert idle_pids(sandbox) != [pid]
    assert gone(pid)


def kill_all_busy(sandbox: Sandbox, number: signal.Signals, seen: list[int], end: threading.Event) -> None:
    while not end.is_set():
        for pid in sandbox.busy_pids():
            if pid not in seen:
                seen.append(pid)
                os.kill(pid, number)
        end.wait(0.005)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGKILL, DecoderCrashed, r"^the decoder process was killed by SIGKILL while it read this video"),
        (signal.SIGSEGV, DecoderCrashed, r"^the decoder process was killed by SIGSEGV while it read this video"),
        (signal.SIGSTOP, DecodeTimeout, r"^no answer from the decoder within decode\.deadline_s = 1\.5"),
    ],
)
def test_a_video_that_loses_two_decoders_is_refused(
    number: signal.Signals, error: type[MediaError], message: str, sandbox: Sandbox, long: bytes, good: bytes
) -> None:
    config = ClipConfig(decode=DecodeConfig(deadline_s=1.5 if number is signal.SIGSTOP else 60))
    seen: list[int] = []
    end = threading.Event()
    killer = threading.Thread(target=kill_all_busy, args=(sandbox, number, seen, end))
    killer.start()
    try:
        with pytest.raises(error, match=message + r".*\(tried 2 times\)$"):
            sandbox.decode(long, Sampled(), config).clip()
    finally:
        end.set()
        killer.join()
    assert len(seen) == 2
    assert all(gone(pid) for pid in seen)
    assert sandbox.probe(good, DecodeConfig()).num_frames == 40


def test_a_decoder_that_dies_with_nothing_to_do_harms_no_video(sandbox: Sandbox, good: bytes) -> None:
    sandbox.probe(good, DecodeConfig())
    (pid,) = idle_pids(sandbox)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), 10, "the decoder is dead")
    process = sandbox._idle_process(False, DecodeConfig(), 0)
    assert process.pid != pid
    process.kill()


def test_too_much_memory_is_the_videos_error(sandbox: Sandbox, good: bytes, hungry: bytes) -> None:
    config = clip_config(max_memory_mb=MEMORY_MB)
    sandbox.decode(good, Sampled(), config).clip()
    message = (
        rf"^decoding takes more address space than decode\.max_memory_mb = {MEMORY_MB} \(--decode.*\(tried 2 times\)$"
    )
    with pytest.raises(MediaOverBudget, match=message):
        sandbox.decode(hungry, Sampled(), config.without_flow()).clip()
    assert sandbox.decode(hungry, Sampled(), CLIP.without_flow()).clip().num_frames == 4
    assert_same(sandbox.decode(good, Sampled(), config).clip(), decode(good, Sampled(), config).clip())


def test_among_four_decoders_each_death_is_its_own_videos(good: bytes, hungry: bytes) -> None:
    """Four threads, every fifth video poison, and one more decoder killed from outside."""
    config = clip_config(max_memory_mb=MEMORY_MB)
    expected = decode(good, Sampled(), config).clip()
    poison = {3, 8}
    with Sandbox(4) as sandbox, ThreadPoolExecutor(4) as pool:
        sandbox.probe(good, DecodeConfig())
        pid = stop_idle(sandbox)
        futures = [
            pool.submit(sandbox.decode, hungry if number in poison else good, Sampled(), config) for number in range(12)
        ]
        wait_until(lambda: pid in sandbox.busy_pids(), 20, "the stopped decoder has a video")
        os.kill(pid, signal.SIGKILL)
        for number, future in enumerate(futures):
            if number in poison:
                assert type(future.exception()) is MediaOverBudget
            else:
                assert_same(future.result().clip(), expected)
        assert len(idle_pids(sandbox)) <= 4
        assert sandbox.busy_pids() == []


@pytest.mark.parametrize("deaths", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_replacing_decoders_leaks_nothing(deaths: int, good: bytes) -> None:
    def held() -> tuple[int, int, int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children)

    with Sandbox(1) as sandbox:
        sandbox.probe(good, DecodeConfig())
        before, shared = held(), set(Path("/dev/shm").iterdir())
        for _ in range(deaths):
            os.kill(idle_pids(sandbox)[0], signal.SIGKILL)
            assert sandbox.probe(good, DecodeConfig()).num_frames == 40
        assert held() == before
        mine = {path for path in set(Path("/dev/shm").iterdir()) - shared if "kinoray" in path.name}
        assert not mine


def test_a_decoder_grows_with_no_video(sandbox: Sandbox, good: bytes) -> None:
    """Whatever a decoder keeps of each video adds up to its memory limit in a library of millions."""

    def resident_pages() -> int:
        (pid,) = idle_pids(sandbox)
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    def decode_some(count: int) -> None:
        for number in range(count):
            sandbox.decode(good, Sampled(rng=np.random.default_rng(number % 10)), ClipConfig().without_flow())

    decode_some(40)
    before = resident_pages()
    decode_some(160)
    assert resident_pages() - before <= 64


# What is no fault of a video


def test_decoders_that_cannot_start_are_the_jobs_error(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named av' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr("kinoray.video.sandbox.process._PYTHON", str(broken))
    message = (
        r"no decoder process can be started on \S+ \(3 tries\): ended with exit code 3 \(No module named av\); check"
    )
    with Sandbox(1) as sandbox, pytest.raises(DecoderStartFailed, match=message) as caught:
        sandbox.probe(good, DecodeConfig())
    assert isinstance(caught.value, JobError)
    monkeypatch.setattr(sandbox_module, "_shared", {})
    video = tmp_path / "video.mp4"
    video.write_bytes(good)
    unknown = {key: [None] for key in ("offset", "length", "sha256", "time_start_s", "time_end_s")}
    block = {"video_id": ["a"], "uri": [str(video)], **unknown, "row": [0]}
    with pytest.raises(DecoderStartFailed, match=message):
        DecodeTask(storage=Storage(), clip=CLIP.without_flow())(pa.table(block))
    monkeypatch.setattr("kinoray.video.sandbox.process._PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(DecoderStartFailed, match="No such file or directory"):
        DecoderProcess(DecodeConfig())


def test_answers_are_not_believed_without_a_look(sandbox: Sandbox, good: bytes) -> None:
    sandbox.probe(good, DecodeConfig())
    (process,) = sandbox._idle
    for place in ([0, "|O", [1]], [-1, "|u1", [1]], [0, "|u1", [2**40]], [2**50, "|u1", [1]], [0, "|u1", [1.5]]):
        with pytest.raises(ValueError, match="array of"):
            process._read_array("frames", *place, room_bytes=2**60)


# A job


@pytest.mark.ray
def test_a_labelling_with_poison_labels_every_good_video(
    ray_local: None, tmp_path: Path, good: bytes, hungry: bytes
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    poison = {"hungry": (hungry, "MediaOverBudget"), "random": (make_broken("random", good), "UnreadableContainer")}
    for number in range(12):
        (videos / f"good-{number:02d}.mp4").write_bytes(make_video(moving(8 + number)))
    for name, (data, _) in poison.items():
        (videos / f"good-05-{name}.mp4").write_bytes(data)
    clip = clip_config(max_memory_mb=MEMORY_MB)
    checkpoint = save_untrained(Storage(), str(tmp_path / "checkpoint"), ("a", "b"), clip, "label_models:mixing")
    label(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=str(videos),
            checkpoint=checkpoint,
            out=str(tmp_path / "out"),
            max_bad_fraction=0.5,
            decode=DecodeConfig(max_memory_mb=MEMORY_MB),
            resources=ResourcesConfig(num_workers=1),
        )
    )
    rows = read_predictions(Storage(), str(tmp_path / "out")).to_pylist()
    assert len(rows) == 14
    for row in rows:
        name = Path(row["uri"]).stem
        kind = name.rpartition("-")[2]
        if kind in poison:
            assert (row["status"], row["error_class"]) == ("quarantined", poison[kind][1])
        else:
            assert (row["status"], row["error_class"]) == ("labelled", None)


def test_a_relative_path_to_python_will_do(tmp_path: Path) -> None:
    """As of `PATH=.venv/bin:$PATH python`; decoders start in another folder."""
    code = (
        "import sys; from kinoray.config.shared import DecodeConfig; "
        "from kinoray.video.sandbox.process import DecoderProcess as D; print(sys.executable); D(DecodeConfig()).kill()"
    )
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder.name}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = ["/bin/sh", "-c", f"exec {Path(sys.executable).name} -c '{code}'"]
    done = subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Path(folder.name) / Path(sys.executable).name)
