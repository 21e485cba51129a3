"""Nothing of a killed command stays: processes, scratch folders, Ray's session folder. A local Ray is on loopback."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinoray.storage.leftovers import Claim, scratch_folder, sweep
from ports import wait_until

CLAIMS = """
import sys
from pathlib import Path
from kinoray.storage.leftovers import Claim, scratch_folder
with scratch_folder("test") as folder:
    (folder / "large").write_bytes(b"x" * 1000)
    claim = Claim(Path(sys.argv[1]))
    print(folder, flush=True)
    sys.stdin.read()
"""
SERVER = """
import subprocess, sys
from kinoray.storage.leftovers import reap
server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
reap("process", str(server.pid))
print(server.pid, flush=True)
sys.stdin.read()
"""
COMMAND = """
import os, time, ray
from kinoray.config.clip import DecodeConfig
from kinoray.config.shared import ResourcesConfig
from kinoray.errors import MediaError
from kinoray.cluster.connect import connect
connect(ResourcesConfig(local_cpus=1))
@ray.remote
def decoder(path):
    from kinoray.storage.leftovers import scratch_folder
    from kinoray.video.sandbox.pool import shared_sandbox
    sandbox = shared_sandbox(1)
    try:
        sandbox.probe(b"no video", DecodeConfig())
    except MediaError:
        pass
    with scratch_folder("worker"):
        open(path, "w").write(str(sandbox.pids))
        time.sleep(1000)
work = decoder.remote("ready")
ray.get(work)
"""


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, of this process and those that it starts."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


def test_a_scratch_folder_goes_with_its_context(temp: Path) -> None:
    def fail() -> None:
        with scratch_folder("test") as folder:
            assert list(folder.iterdir()) == []  # the lock lies outside: some send or list the whole folder
            (folder / "a").write_text("x")
            assert [path.name.startswith("kinoray-test-") for path in temp.iterdir()] == [True]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert list(temp.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(temp: Path, tmp_path: Path) -> None:
    session = tmp_path / "ray" / "session_1"
    session.mkdir(parents=True)
    others = [temp / "kinoray-cache-0", temp / "kinoray-of-somebody", tmp_path / "ray" / "session_2"]
    for folder in others:
        folder.mkdir()
    (temp / "kinoray-linked").symlink_to(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(session)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        scratch = Path(process.stdout.readline().strip())
        with scratch_folder("mine") as mine:
            sweep(session.parent.glob("session_*"))
            assert (scratch / "large").exists()
            assert session.exists()
            process.send_signal(signal.SIGKILL)
            process.wait()
            sweep(session.parent.glob("session_*"))
            assert not scratch.parent.exists()
            assert not session.exists()
            assert mine.exists()
    assert all(folder.exists() for folder in others)


def test_a_session_that_ends_by_itself_keeps_its_logs(tmp_path: Path) -> None:
    session = tmp_path / "session_1"
    session.mkdir()
    claim = Claim(session)
    with (session / ".kinoray-lock").open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    claim.release()
    sweep(tmp_path.glob("session_*"))
    assert list(session.iterdir()) == []


STARTS = """
import os, sys
from pathlib import Path
from kinoray.storage.leftovers import reap
root = Path(sys.argv[1])
reap("starting", f"{root}/session_*_{os.getpid()}")
(root / f"session_2026-01-01_00-00-00_000000_{os.getpid()}").mkdir()
for kind in sys.argv[2:]:
    reap(kind, "")
print("made", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("then", [[], ["started"]])
def test_a_session_that_was_being_started_goes_and_one_that_failed_keeps_its_logs(
    temp: Path, tmp_path: Path, then: list[str]
) -> None:
    root = tmp_path / "ray"
    (root / "session_2026-01-01_00-00-00_000000_1").mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, str(root), *then], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        (reaper,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    wait_until(lambda: not Path(f"/proc/{reaper}").exists() or _is_zombie(reaper), 30, "the reaper ends")
    left = sorted(path.name for path in root.iterdir())
    assert left == [
        f"session_2026-01-01_00-00-00_000000_{pid}" for pid in sorted(["1", *([str(process.pid)] if then else [])])
    ]


def _is_zombie(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_was_started_for_a_command_ends_with_it(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.send_signal(number)
        process.wait()
    wait_until(lambda: not is_running(pid), 30, "the server is gone")


@pytest.mark.ray
@pytest.mark.parametrize(
    "to_group",
    [pytest.param(False, id="the command"), pytest.param(True, id="its whole group", marks=pytest.mark.slow)],
)
def test_a_killed_command_leaves_neither_processes_nor_folders(to_group: bool, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kr", dir="/tmp") as temp:  # a socket's path has no more than 107 bytes
        environment = {**os.environ, "TMPDIR": temp, "RAY_TMPDIR": temp}
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND], env=environment, cwd=tmp_path, start_new_session=True
        )
        ready = tmp_path / "ready"
        try:
            wait_until(ready.exists, 200, "the worker has a decoder")
            family = {pid: started(pid) for pid in descendants(process.pid)}
            names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in family}
            assert {"raylet", "gcs_server"} <= names
            assert len(family) > 6  # of Ray four, a worker, its decoder, and who cleans up
            assert any(Path(temp).glob("kinoray-worker-*"))
        finally:
            os.killpg(process.pid, signal.SIGKILL) if to_group else process.kill()
            process.wait()
        wait_until(lambda: not [pid for pid in family if started(pid) == family[pid]], 60, "all processes are gone")
        assert not list(Path(temp).glob("kinoray-*"))
        assert not [path for path in Path(temp).rglob("session_*") if path.is_dir() and not path.is_symlink()]


@pytest.mark.ray
def test_a_ray_of_our_own_listens_on_loopback_only_and_can_be_scraped(ray_local: None) -> None:
    import ray

    @ray.remote
    def work() -> int:
        return os.getpid()

    assert ray.get(work.remote()) != os.getpid()
    family = descendants(os.getpid())
    port = ray.nodes()[0]["MetricsExportPort"]

    def is_scraped() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            return b"ray_" in reply.read()

    wait_until(is_scraped, 60, "Ray's metrics are served")
    listening = list(sockets_of(family))
    names = {name for _, _, name in listening}
    assert {"gcs_server", "raylet"} <= names
    assert len(listening) >= 6
    assert [place for place in listening if not place[0].startswith("loopback")] == []


def is_running(pid: int) -> bool:
    return started(pid) is not None


def started(pid: int) -> str | None:
    """When a process was started; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def descendants(root: int) -> list[int]:
    """The processes below one, at any depth."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.append(pid)
            waiting.append(pid)
    return found


def sockets_of(pids: list[int]) -> Iterator[tuple[str, int, str]]:
    """(loopback or the address, port, name of the process) of what they listen on, from the kernel's tables."""
    places = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                places[f"socket:[{fields[9]}]"] = fields[1]
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            targets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        for target in targets:
            if target in places:
                address, port = places[target].split(":")
                on_loopback = address.endswith("0100007F") or address == "00000000000000000000000001000000"
                yield ("loopback" if on_loopback else address), int(port, 16), name
