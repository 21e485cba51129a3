"""A closed `ray start --head`: strangers get nothing, secrets stay where they are, submitted verbs run, fail and go on.

What is easy to break: other Rays run on this machine. Only what the head here started is ended, by its ids.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import config_at
from kills_cluster import Process, below, processes
from kinoray.catalog.table import load_catalog
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.storage.objects import Storage
from ports import free_port, wait_until

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canarySecret0123456789abcdefghijklmnopqr",
    "AWS_SESSION_TOKEN": "canarySession0123456789abcdefghijklmnopqr",
}
TOKEN = "ca9a47" * 10
NUM_VIDEOS = 24

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@dataclass
class Head:
    """A closed head with the jobs API, and the environment of somebody who may use it."""

    url: str
    environment: dict[str, str]
    folder: Path
    process: "subprocess.Popen[bytes]"

    def kinoray(self, *arguments: str) -> "subprocess.Popen[str]":
        """A kinoray command of that somebody."""
        return subprocess.Popen(
            [sys.executable, "-m", "kinoray", *arguments],
            env={**self.environment, "PYTHONPATH": os.environ["PYTHONPATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code and output."""
        process = self.kinoray(*arguments, "--address", self.url) if "--" not in arguments else self.kinoray(*arguments)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def ray(self, *arguments: str) -> tuple[int, str]:
        """Ray's own command for jobs, with that somebody's token."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", *arguments, "--address", self.url],
            env={**self.environment, "RAY_AUTH_MODE": "token"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout

    def jobs(self, run: str) -> list[dict[str, Any]]:
        """The tries of a run, as the cluster lists them."""
        found = [job for job in json.loads(self.get("/api/jobs/")) if job["metadata"].get("kinoray_run") == run]
        return sorted(found, key=lambda job: str(job["submission_id"]))

    def submit(self, verb: str, *flags: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        return self.run("submit", verb, "--address", self.url, *options, "--", *flags)

    def get(self, path: str) -> str:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return str(reply.read().decode())

    def driver(self) -> Process | None:
        """The job's driver, once it runs."""
        tree = below(self.process.pid, processes())
        return next((one for one in tree if one.title.startswith("python -m kinoray ")), None)


@pytest.fixture(scope="module")
def head(_environment: None, s3_server: str) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="kr-"))  # short: Ray's sockets lie below it
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    dashboard, gcs = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_AUTH_TOKEN")}
    environment |= {
        **CANARIES,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "AWS_ENDPOINT_URL": s3_server,
        "RAY_TMPDIR": str(folder / "ray"),
    }
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", f"--temp-dir={folder / 'ray'}"]
    start += [
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        "--object-store-memory=80000000",
    ]
    start += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    start += ["--include-log-monitor=false", "--no-monitor"]  # quicker to start
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    client = {name: value for name, value in environment.items() if name not in ("RAY_AUTH_MODE", "RAY_TMPDIR")}
    made = Head(f"http://127.0.0.1:{dashboard}", client, folder, process)

    def answers() -> bool:
        assert process.poll() is None, (folder / "head.log").read_text()
        return "[" in made.get("/api/jobs/")

    try:
        wait_until(answers, 120, "the head's jobs API answers")
        yield made
    finally:
        for one in below(process.pid, processes()):
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


ENDPOINTS = (
    ("GET", "/api/version"),
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/jobs/none"),
    ("GET", "/api/jobs/none/logs"),
    ("POST", "/api/jobs/none/stop"),
    ("DELETE", "/api/jobs/none"),
    ("PUT", "/api/packages/gcs/none.zip"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/api/v0/logs?node_ip=127.0.0.1"),
    ("GET", "/api/cluster_status"),
    ("GET", "/api/v0/actors"),
)


def answer_to(url: str, method: str, headers: dict[str, str]) -> int:
    data = b'{"entrypoint": "touch stranger"}' if method in ("POST", "PUT") else None
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_strangers_are_refused_everywhere(head: Head) -> None:
    """12 endpoints x (no token, a wrong one); with the right one the reading ones do answer, so they exist."""
    wrong = {"Authorization": f"Bearer {TOKEN[::-1]}"}
    assert [answer_to(head.url + path, method, {}) for method, path in ENDPOINTS] == [401] * 12
    assert [answer_to(head.url + path, method, wrong) for method, path in ENDPOINTS] == [403] * 12
    right = {"Authorization": f"Bearer {TOKEN}"}
    reading = [path for method, path in ENDPOINTS if method == "GET" and "none" not in path and "v0/logs" not in path]
    assert [answer_to(head.url + path, "GET", right) for path in reading] == [200] * len(reading)
    assert json.loads(head.get("/api/jobs/")) == []


def test_wrong_settings_and_strangers_submit_nothing(head: Head, tmp_path: Path) -> None:
    before = head.get("/api/jobs/")
    code, output = head.submit("pack", "/none", "--out", "/none/set", "--shard-mb", "0")
    assert code == 2
    assert "shard_mb must be at least 1, got 0" in output
    stolen = tmp_path / "token"
    stolen.write_text("of another cluster")
    stolen.chmod(0o600)
    other = Head(head.url, {**head.environment, "RAY_AUTH_TOKEN_PATH": str(stolen)}, head.folder, head.process)
    code, output = other.submit("pack", "s3://b/videos", "--out", "s3://b/set")
    assert code == 1
    assert "does not take the token" in output
    assert head.get("/api/jobs/") == before


@pytest.mark.slow
def test_a_submitted_pack_and_its_secrets(head: Head, bucket: str, s3_server: str, tmp_path: Path) -> None:
    """Done: 0. Nobody's key is in what the cluster shows, in what was stored, or in what was printed."""
    storage = Storage(config_at(s3_server))
    num_videos = make_demo_set(tmp_path, videos_per_class=1, seed=1)
    for path in tmp_path.rglob("*.mp4"):
        storage.put(f"{bucket}/videos/{path.relative_to(tmp_path)}", path.read_bytes())
    flags = (f"{bucket}/videos/", "--out", f"{bucket}/set")
    code, output = head.submit("pack", *flags, options=("--run-id", "nightly"))
    assert code == 0, output
    assert f"pack: found {num_videos} files" in output
    assert "nightly: done" in output
    assert load_catalog(storage, f"{bucket}/set").table.num_rows == num_videos

    [job] = head.jobs("nightly")
    assert (job["submission_id"], job["status"], job["driver_exit_code"]) == ("nightly", "SUCCEEDED", 0)
    assert (job["metadata"]["kinoray_verb"], job["metadata"]["kinoray_out"]) == ("pack", f"{bucket}/set")
    code, listed = head.ray("list")
    assert code == 0, listed
    assert "nightly" in listed
    code, said = head.ray("logs", "nightly")
    assert code == 0, said
    assert f"pack: found {num_videos} files" in said

    shown = [output, listed, said, head.get("/api/jobs/"), head.get("/api/jobs/nightly/logs")]
    stored = [storage.read(info.uri) for info in storage.list(f"{bucket}/set/")]
    kept = []
    for path in head.folder.rglob("*"):
        if path.is_file() and path.name != "token":
            with suppress(FileNotFoundError):  # Ray works there
                kept.append(path.read_bytes())
    assert len(stored) > 3
    assert len(kept) > 20
    for content in [*map(str.encode, shown), *stored, *kept]:
        assert not [name for name, value in CANARIES.items() if value.encode() in content]
        assert TOKEN.encode() not in content


@pytest.mark.slow
def test_a_job_that_fails_gives_its_own_code_and_is_not_tried_again(head: Head, tmp_path: Path) -> None:
    """1 for a job that failed; 2 for a setting that only the job could see; 130 for one that was stopped."""
    videos = tmp_path / "videos" / "class"
    videos.mkdir(parents=True)
    for number in range(3):
        (videos / f"{number}.mp4").write_bytes(make_broken("random", b""))
    failing = ("submit", "pack", "--address", head.url, "--run-id", "bad", "--", str(videos.parent), "--out")
    code, output = head.run(*failing, str(tmp_path / "set"))
    assert code == 1, output
    assert "TooManyBad" in output
    assert "bad: the job failed (exit code 1)" in output
    inside = head.submit("pack", str(videos.parent), "--out", str(videos / "set"), options=("--run-id", "inside"))
    assert inside[0] == 2, inside[1]
    assert "a setting is wrong (exit code 2)" in inside[1]
    for run, expected in (("bad", 1), ("inside", 2)):
        assert [job["driver_exit_code"] for job in head.jobs(run)] == [expected]


def slow_pack(folder: Path) -> tuple[str, ...]:
    """Flags of a pack with many shards, which takes a while: each video is made long with an atom that says nothing."""
    make_demo_set(folder / "videos", videos_per_class=NUM_VIDEOS // 6, seed=2)
    size = 700_000
    for path in sorted((folder / "videos").rglob("*.mp4")):
        with path.open("ab") as file:
            file.write((size + 8).to_bytes(4, "big") + b"free" + bytes(size))
    flags = (str(folder / "videos"), "--out", str(folder / "set"), "--shard-mb", "1", "--transcode")
    return (*flags, "--resources.num-workers", "1")


def num_commits(folder: Path) -> int:
    return len(list((folder / "set" / "shards").glob("*.json")))


@pytest.mark.slow
def test_a_killed_driver_is_submitted_again_and_goes_on(head: Head, tmp_path: Path) -> None:
    flags = slow_pack(tmp_path)
    process = head.kinoray("submit", "pack", "--address", head.url, "--run-id", "again", "--", *flags)
    wait_until(lambda: num_commits(tmp_path) >= 1, 120, "a shard is committed")
    victim = head.driver()
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "again: was killed (signal 9); submitted again" in output
    assert "again-try2: done" in output
    first, second = [line for line in output.splitlines() if line.startswith("pack: found")]
    assert ", 0 done already" in first
    assert ", 0 done already" not in second
    tries = head.jobs("again")
    assert [job["submission_id"] for job in tries] == ["again", "again-try2"]
    assert (tries[0]["status"], tries[1]["driver_exit_code"]) == ("FAILED", 0)
    config = config_at("http://127.0.0.1:1")
    assert load_catalog(Storage(config), str(tmp_path / "set")).table.num_rows == NUM_VIDEOS


@pytest.mark.slow
def test_watching_ends_without_the_job_and_rays_stop_ends_it(head: Head, tmp_path: Path) -> None:
    """Ctrl-C leaves it running; the same command follows it; another of its name is refused; ray job stop ends it."""
    flags = slow_pack(tmp_path)
    command = ("submit", "pack", "--address", head.url, "--run-id", "watched", "--", *flags)
    process = head.kinoray(*command)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("pack: found"):
            driver = head.driver()
            assert driver is not None
            os.kill(driver.pid, signal.SIGSTOP)  # so that it is not done before we are
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen
    assert "the job goes on" in rest
    assert "ray job logs watched --follow --address" in rest
    assert head.driver() is not None
    code, output = head.submit("pack", *flags[:-1], "2", options=("--run-id", "watched"))
    assert code == 2
    assert "run_id: watched is running with other settings" in output

    again = head.kinoray(*command)
    assert again.stdout is not None
    assert "watched is running already; following it" in again.stdout.readline()
    code, output = head.ray("stop", "watched")
    assert code == 0, output
    again.communicate(timeout=60)
    assert again.returncode == 130
    wait_until(lambda: head.driver() is None, 20, "the driver is gone")
