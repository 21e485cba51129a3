"""What code that has taken over a decoder process cannot do there, and that decoding is the same in the jail."""

import errno
import io
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from conftest import wait_until
from decode_reference import moving
from kinoray.config.scoring import ViewsConfig
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.doctor.machine import jail_checks
from kinoray.errors import DecoderCrashed, MediaError
from kinoray.video.frames import decode
from kinoray.video.request import Sampled, Thumbnails, Views
from kinoray.video.sandbox.jail import LAYERS
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.sandbox.process import Answer, DecoderLost, DecoderProcess

CLIP = ClipConfig(sample=SampleConfig(num_segments=4, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))
SECRET = "canary-of-the-test"

Start = Callable[..., DecoderProcess]


@pytest.fixture(scope="module")
def good() -> bytes:
    return make_video(moving(20), fps=30, gop=12)


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on, decoder processes have attacks in place of two operations; the kernel refuses them layers."""
    script = Path(__file__).with_name("jail_attacks.py")

    def use(lacks: str) -> None:
        python = tmp_path / "python"
        command = shlex.join([sys.executable, str(script), lacks])
        python.write_text(f'#!/bin/sh\nshift 4\nexec {command} "$@"\n')  # without -P -s -m kinoray.video.sandbox.child
        python.chmod(0o755)
        monkeypatch.setattr("kinoray.video.sandbox.process._PYTHON", str(python))

    return use


@pytest.fixture
def hostile(arm: Callable[[str], None]) -> Iterator[Start]:
    """Starts one such decoder process; `lacks` names what the kernel refuses it."""
    made = []

    def start(lacks: str = "", backend: Any = "pyav", max_memory_mb: int = 2048) -> DecoderProcess:
        arm(lacks)
        made.append(DecoderProcess(DecodeConfig(backend=backend, max_memory_mb=max_memory_mb)))
        return made[-1]

    yield start
    for process in made:
        process.kill()


def ask(process: DecoderProcess, what: str, **arguments: Any) -> Answer:
    return process.ask("probe", b"video", DecodeConfig(), {"what": what, **arguments})


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A server, a unix socket, a file and a folder that are there for everybody; and this process."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.getuid() and above.stat().st_mode & 0o005 != 0o005:
            above.chmod(above.stat().st_mode | 0o005)
    readable = folder / "readable"
    readable.write_text("for everybody")
    readable.chmod(0o666)
    with closing(socket.create_server(("127.0.0.1", 0))) as server, closing(socket.socket(socket.AF_UNIX)) as unix:
        name = os.path.relpath(folder / "unix") if len(str(folder)) > 90 else str(folder / "unix")
        unix.bind(name)
        unix.listen()
        (folder / "unix").chmod(0o777)
        yield {
            "parent": os.getpid(),
            "port": server.getsockname()[1],
            "unix": str(folder / "unix"),
            "readable": str(readable),
            "folder": str(folder),
        }
        for listener in (server, unix):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody has come
                listener.accept()
    assert readable.read_text() == "for everybody"
    assert sorted(path.name for path in folder.iterdir()) == ["readable", "unix"]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_code_in_a_decoder_reaches_nothing(backend: str, hostile: Start, targets: dict[str, Any]) -> None:
    process = hostile(backend=backend)
    if process.layers["system calls"]:
        pytest.skip(process.layers["system calls"])
    answer = ask(process, "attack", **targets).fields
    assert len(answer["found"]) > 60
    assert {name: code for name, code in answer["found"].items() if code not in (errno.EPERM, errno.ENOSYS)} == {}
    assert answer["found"]["clone3"] == errno.ENOSYS  # so that glibc takes clone for threads
    if platform.machine() == "x86_64":
        assert answer["x32"] == errno.ENOSYS
    assert answer["thread"] == ("can't start new thread" if backend == "pyav" else "")
    assert process.is_alive()


# What no layer but the filter refuses: it harms the decoder alone. kill(-1) is success where no process may be killed.
ONLY_FILTERED = {
    "socketpair", "pipe", "memfd_create", "memfd_secret", "io_uring", "userfaultfd", "dup2", "keyctl", "bpf", "kcmp",
    "seals", "setsid", "chdir", "write to standard output", "write to the input", "truncate the input", "core files",
    "dumpable again", "live on without the parent", "netlink", "another filter", "signals by descriptor", "unshare",
    "more open files", "send descriptors", "receive descriptors", "perf_event_open", "shared memory of System V",
    "open_tree", "name to handle", "pidfd_open", "open by handle", "kill all",
}  # fmt: skip


def test_the_other_layers_hold_without_the_filter(hostile: Start, targets: dict[str, Any]) -> None:
    process = hostile("filter")
    assert process.layers["system calls"] == "seccomp: Operation not permitted"
    missing = [name for name in LAYERS if name != "system calls" and process.layers[name]]
    if missing:
        pytest.skip(f"not in force here: {', '.join(missing)}")
    found = ask(process, "attack", **targets).fields["found"]
    reached = {name for name, code in found.items() if not code}
    assert reached <= ONLY_FILTERED


def test_the_32_bit_entry_of_the_kernel_is_closed(hostile: Start) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("x86_64 only")
    with pytest.raises(DecoderLost, match=r"killed by SIG(SYS|SEGV) "):  # SEGV: a kernel without that entry
        ask(hostile(), "32 bit")


def test_a_decoder_that_aborts_in_its_jail_says_so(hostile: Start) -> None:
    with pytest.raises(DecoderLost, match="was killed by SIGABRT while it read this video") as lost:
        ask(hostile(), "abort")
    assert type(lost.value.error) is DecoderCrashed


def test_code_in_a_decoder_takes_no_more_memory_than_its_limits_give(hostile: Start) -> None:
    process = hostile(max_memory_mb=64)
    found = ask(process, "fill memory", room_bytes=process.room_bytes).fields
    assert {name: found.get(name) for name in ("memory", "output")} == {"memory": errno.ENOMEM, "output": errno.EFBIG}


def test_an_answer_that_nobody_asked_for_is_no_videos(hostile: Start) -> None:
    process = hostile()
    assert process.serves(DecodeConfig(), 5)
    ask(process, "two answers")
    wait_until(lambda: not process.serves(DecodeConfig(), 5), 10, "the second answer is there")
    assert process.is_alive()


def test_what_a_decoder_was_given_holds_no_secret(hostile: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", f"/home/{SECRET}")
    world = ask(hostile(), "world").fields
    assert SECRET not in str(world["environment"])
    assert not {"torch", "ray", "boto3"} & set(world["modules"])
    assert world["uid"] != 0


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_real_decoder_is_in_the_jail_as_it_says(good: bytes) -> None:
    with Sandbox(1) as sandbox:
        sandbox.decode(good, Sampled(), CLIP).clip()
        (process,) = sandbox._idle
        assert tuple(process.layers) == LAYERS
        status = status_of(process.pid)
        assert status["NoNewPrivs"] == "1"
        assert status["Threads"] == "1"
        if not process.layers["system calls"]:
            assert status["Seccomp"] == "2"
        if not process.layers["capabilities"]:
            assert {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {
                "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapAmb": 0,
            }  # fmt: skip
        if not process.layers["user"]:
            assert "0" not in status["Uid"].split()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        assert re.search(r"Max processes +0 +0 ", limits)
        assert re.search(r"Max open files +64 +64 ", limits)
        assert re.search(rf"Max file size +{process.room_bytes} +{process.room_bytes} ", limits)
        space = re.search(r"Max address space +(\d+) +(\d+) ", limits)
        assert space
        assert space[1] == space[2]
        assert int(space[2]) < 2 * process.room_bytes + 2**32
        if os.geteuid() != 0:
            return  # nobody but root looks further into a decoder
        if not process.layers["network"]:
            assert os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) <= 7  # 3, 3, and Python's map of the output


@pytest.mark.parametrize("lacks", ["filter,namespaces,landlock", "namespaces,landlock"])
def test_a_decoder_works_with_the_layers_that_there_are(lacks: str, arm: Callable[[str], None], good: bytes) -> None:
    arm(lacks)
    refused = {"filter": ("system calls",), "namespaces": ("network", "root folder"), "landlock": ("files",)}
    names = {name for lack in lacks.split(",") for name in refused[lack]}
    with Sandbox(1) as sandbox:
        found = sandbox.decode(good, Thumbnails(num_frames=3, height=24), ClipConfig()).pictures()
        (process,) = sandbox._idle
    assert {name for name in LAYERS if "Operation not permitted" in process.layers[name]} == names
    assert np.array_equal(found, decode(good, Thumbnails(num_frames=3, height=24), ClipConfig()).pictures())


def test_a_process_serves_one_back_end_and_is_replaced_for_another(good: bytes) -> None:
    decord = DecodeConfig(backend="decord")
    with Sandbox(1) as sandbox:
        pids = []
        for config in (DecodeConfig(), DecodeConfig(), decord, decord):
            sandbox.decode(good, Thumbnails(num_frames=2, height=24), ClipConfig(decode=config))
            (process,) = sandbox._idle
            assert process.backend == config.backend
            pids.append(process.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3]


def with_subtitles() -> bytes:
    """For streams of subtitles, PyAV imports modules when it meets the first one."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        video, _ = output.add_stream("libx264", rate=30), output.add_mux_stream("subrip")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for frame in moving(4):
            output.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(video.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_nothing_is_imported_or_opened_once_the_jail_is_closed(backend: Any, hostile: Start, good: bytes) -> None:
    process = hostile(backend=backend)
    ask(process, "events")
    decode = DecodeConfig(backend=backend)
    clip = replace(CLIP, decode=decode)
    two = Sampled(samples=(CLIP.sample, SampleConfig(num_segments=1, frames_per_segment=1)))
    rngs = [np.random.Generator(kind(5)) for kind in (np.random.PCG64, np.random.MT19937, np.random.SFC64)]
    works: list[tuple[str, dict[str, Any]]] = [
        *(("decode", {"request": Sampled(rng=rng), "clip": clip}) for rng in rngs),
        ("decode", {"request": Views(views=ViewsConfig()), "clip": clip.without_flow()}),
        ("decode", {"request": two, "clip": clip.without_flow()}),
        ("decode", {"request": Thumbnails(num_frames=2, height=24), "clip": clip}),
        ("shots", {"begin": 0, "config": decode}),
        ("transcode", {"config": decode}),
        ("decode", {"clip": clip}),  # TypeError: an answer for what is nobody's fault
    ]
    videos = [
        good,
        with_subtitles(),
        make_video(moving(4), codec="mpeg4", container="avi"),
        make_broken("random", good),
    ]
    for operation, arguments in works:
        for video in videos:
            with suppress(MediaError):
                process.ask(operation, video, decode, arguments)
    assert ask(process, "events").fields["events"] == []


LIES = ("depth", "size", "job error", "setting error", "too many frames", "words for numbers", "another size")
MORE_LIES = (
    "no frames",
    "no arrays",
    "truth for a number",
    "two counts",
    "other fields",
    "a list",
    "no record",
    "another type",
    "flow that was not asked for",
    "a frame that is not there",
    "another window",
    "many samplings",
    "infinite count",
    "too many promised",
    "too wide",
    "a negative count",
    "no rate",
    "a turn",
    "an odd codec",
    "windows elsewhere",
    "windows before the video",
)


@pytest.mark.parametrize("lies", [LIES, pytest.param(MORE_LIES, marks=pytest.mark.slow)], ids=["few", "more"])
def test_a_decoder_that_lies_harms_its_video_only(
    lies: tuple[str, ...], arm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    arm("")
    monkeypatch.setattr("kinoray.video.sandbox.pool._TRIES", 1)
    with Sandbox(1) as sandbox:
        truth = sandbox.decode(b"lie: nothing but the truth", Sampled(), CLIP.without_flow())
        assert (truth.frames == 128).all()
        for lie in lies:
            with pytest.raises(
                DecoderCrashed, match=r"^the decoder process gave an answer that makes no sense \(\w+: "
            ):
                sandbox.decode(f"lie: {lie}".encode(), Sampled(), CLIP.without_flow())
            assert sandbox.pids() == []  # it is replaced


# What doctor says


def lines(**lost: str) -> list[str]:
    """For a decoder that has all layers but those, for the reason given."""
    return [
        str(check)
        for check in jail_checks(
            dict.fromkeys(LAYERS, "") | {name.replace("_", " "): why for name, why in lost.items()}
        )
    ]


def test_doctor_says_of_each_promise_what_holds_it() -> None:
    network, files, others, rights = lines()
    assert network == "ok       decoder's network: none (system calls are filtered; a network namespace of its own)"
    assert files == "ok       decoder's files: none (system calls are filtered; Landlock; an empty root folder)"
    assert others == "ok       decoder's programs: none, and no other processes (system calls are filtered)"
    assert rights == "ok       decoder's rights: none (not root; no capabilities)"


def test_doctor_warns_where_nothing_holds_a_promise() -> None:
    network, files, _, _ = lines(network="unshare: no", files="Landlock: no")
    assert network.startswith("ok ")
    assert network.endswith("none (system calls are filtered; not: a network namespace of its own, unshare: no)")
    assert files.startswith("ok ")
    assert files.endswith("none (system calls are filtered; an empty root folder; not: Landlock, Landlock: no)")
    lost = lines(system_calls="seccomp: no", network="unshare: no", user="root without CAP_SETUID")
    assert [line.split()[0] for line in lost] == ["warning", "ok", "warning", "warning"]
    assert re.search(r"network: it could use it \(seccomp: no; unshare: no\); .*user namespaces", lost[0])
    assert re.search(r"programs: it could start .*\(seccomp: no\); .*seccomp", lost[2])
    assert re.search(r"rights: .*root without CAP_SETUID.*; run as another user", lost[3])
