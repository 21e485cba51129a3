"""Submitting and following where things break on cue: the connection, the driver, the head, a second submitter.

The jobs API here is a small server that says what Ray 2.60 says; test_closed_cluster.py submits to Ray itself.
"""

import asyncio
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from kinoray.cluster import submit as submit_module
from kinoray.cluster.client import JobsClient
from kinoray.cluster.config import SubmitConfig
from kinoray.cluster.submit import metadata, submit
from kinoray.config.file import to_yaml
from kinoray.errors import ClusterError, ConfigError
from kinoray.pack.config import PackConfig

TEXT = "".join(f"line {number}\n" for number in range(5))
DONE: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}
KILLED: dict[str, Any] = {"status": "FAILED", "driver_exit_code": -9, "message": "exited with -9\nlast lines"}
NODE_DIED: dict[str, Any] = {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "actor died"}


def failed(code: int) -> dict[str, Any]:
    return {"status": "FAILED", "driver_exit_code": code, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}


@dataclass
class Cluster:
    """Its jobs end, one after the other, as `ends` says, once somebody has read all their output."""

    ends: list[dict[str, Any]] = field(default_factory=lambda: [DONE])
    breaks: list[int] = field(default_factory=list)
    """Connections to a job's output break after so many characters each."""
    forgets: bool = False
    """The first job that was read to its end is forgotten, as by a new head."""
    stumbles: int = 0
    """So often it fails to say how a job stands."""
    quicker: dict[str, str] | None = None
    """What another submitter says of the same job, which it submits while this one packs."""
    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: list[bytes] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def make(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/gcs/{name}", self._no_package),
                web.put("/api/packages/gcs/{name}", self._package),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/", self._list),
                web.get("/api/jobs/{id}", self._info),
                web.post("/api/jobs/{id}/stop", self._stop),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        return app

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": "2.60.0", "version": "4"})

    async def _no_package(self, _: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _package(self, request: web.Request) -> web.Response:
        self.packages.append(await request.read())
        if self.quicker is not None:
            self._add({"submission_id": "nightly", "entrypoint": "", "metadata": self.quicker})
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if name in self.jobs:
            text = (
                f"Traceback (most recent call last):\n  ...\nValueError: Job with submission_id {name} already exists."
            )
            return web.Response(status=500, text=text)
        self._add(asked)
        return web.json_response({"job_id": name, "submission_id": name})

    def _add(self, asked: dict[str, Any]) -> None:
        self.submitted.append(asked)
        self.jobs[asked["submission_id"]] = {
            **{name: asked[name] for name in ("submission_id", "entrypoint", "metadata")},
            **{"type": "SUBMISSION", "status": "RUNNING", "start_time": 1000 * (1000 + len(self.submitted))},
        }

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _info(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if self.stumbles and len(self.submitted) == 1:
            self.stumbles -= 1
            return web.Response(status=503, text="no head")
        return web.json_response(job) if job else web.Response(status=404, text="Job does not exist")

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": TEXT})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        name = request.match_info["id"]
        if self.breaks:
            await socket.send_str(TEXT[: self.breaks.pop(0)])
            assert request.transport is not None
            request.transport.abort()
            return socket
        for begin in range(0, len(TEXT), 9):
            await socket.send_str(TEXT[begin : begin + 9])
        if self.forgets:
            self.forgets = False
            del self.jobs[name]
        elif self.ends and self.jobs[name]["status"] == "RUNNING":
            self.jobs[name] |= {"end_time": self.jobs[name]["start_time"] + 5000, **self.ends.pop(0)}
        return socket


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(submit_module, "_POLL_S", 0.02)
    made = Cluster()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(made.make(), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield made
    with suppress(RuntimeError):
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def command(cluster: Cluster, shard_mb: int = 256, **changes: Any) -> SubmitConfig:
    settings = to_yaml(PackConfig(source="s3://bucket/videos", out="s3://bucket/set", shard_mb=shard_mb))
    return SubmitConfig(verb="pack", address=cluster.url, settings=settings, **({"run_id": "nightly"} | changes))


def test_a_job_is_followed_to_its_end(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(command(cluster)) == 0
    printed = capsys.readouterr()
    assert printed.out == TEXT
    assert f"nightly submitted to {cluster.url}" in printed.err
    assert printed.err.rstrip().endswith("nightly: done")
    [asked] = cluster.submitted
    assert asked["entrypoint"] == "python -m kinoray pack --config job.yaml"
    assert asked["runtime_env"]["env_vars"]["PYTHONPATH"] == "platform:models:packages"
    with zipfile.ZipFile(io.BytesIO(cluster.packages[0])) as package:
        names = package.namelist()
        assert b"s3://bucket/videos" in package.read("job.yaml")
    assert {"platform/kinoray/cli.py", "models/vcm_sdd/__init__.py"} <= set(names)
    assert not [name for name in names if re.search("tests|[.]venv|[.]git|__pycache__", name)]


def test_output_after_a_broken_connection_is_printed_once(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.breaks = [3, 12, 12, 30]
    assert submit(command(cluster)) == 0
    assert capsys.readouterr().out == TEXT
    assert not cluster.breaks


@pytest.mark.parametrize(
    ("ends", "code", "tries"),
    [
        pytest.param([KILLED, NODE_DIED, DONE], 0, 3, id="killed twice, then done"),
        pytest.param([KILLED, failed(1)], 1, 2, id="killed, then failed by itself"),
        pytest.param([failed(1)], 1, 1, id="failed"),
        pytest.param([failed(2)], 2, 1, id="a wrong setting"),
        pytest.param([failed(42)], 42, 1, id="another code"),
        pytest.param([KILLED] * 4, 137, 4, id="killed once too often"),
        pytest.param([{"status": "STOPPED"}], 130, 1, id="stopped by somebody"),
    ],
)
def test_only_what_was_killed_is_submitted_again(
    cluster: Cluster,
    ends: list[dict[str, Any]],
    code: int,
    tries: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.ends = list(ends)
    assert submit(command(cluster)) == code
    names = ["nightly", "nightly-try2", "nightly-try3", "nightly-try4"]
    assert [asked["submission_id"] for asked in cluster.submitted] == names[:tries]
    assert {asked["metadata"]["kinoray_run"] for asked in cluster.submitted} == {"nightly"}
    said = capsys.readouterr().err
    assert said.count("submitted again") == tries - 1
    assert ("it was submitted 4 times" in said) == (tries == 4)
    known = JobsClient(cluster.url, allow_open=False).run("nightly")
    assert [one.submission_id for one in known] == names[:tries]
    assert known[-1].exit_code == code


def test_a_head_that_forgot_the_job_gets_it_again(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.forgets = True
    assert submit(command(cluster)) == 0
    assert [asked["submission_id"] for asked in cluster.submitted] == ["nightly", "nightly"]
    assert "its head was replaced" in capsys.readouterr().err


def test_the_same_command_follows_what_runs_and_goes_on_with_what_ended(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(command(cluster, wait=False)) == 0
    assert "Follow it: the same command again, or ray job logs nightly --follow --address" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"nightly is running with other settings; stop it \(ray job stop nightly\)"):
        submit(command(cluster, shard_mb=1))
    assert submit(command(cluster)) == 0
    assert "nightly is running already; following it" in capsys.readouterr().err
    assert len(cluster.submitted) == 1
    cluster.ends = [DONE]
    assert submit(command(cluster)) == 0
    assert [asked["submission_id"] for asked in cluster.submitted] == ["nightly", "nightly-try2"]


def test_a_head_that_stumbles_is_asked_again(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(command(cluster, wait=False)) == 0
    cluster.stumbles = 3
    assert submit(command(cluster)) == 0
    assert cluster.stumbles == 0
    assert capsys.readouterr().out == TEXT


def test_two_who_submit_at_once_meet_on_one_job(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    config = command(cluster)
    cluster.quicker = metadata(config, "nightly", 1)
    assert submit(config) == 0
    assert "nightly was submitted by another command to" in capsys.readouterr().err
    assert len(cluster.submitted) == 1
    cluster.jobs.clear()
    cluster.quicker = metadata(command(cluster, shard_mb=1), "nightly", 1)
    with pytest.raises(ConfigError, match="run_id: nightly was submitted with other settings just now; name another"):
        submit(config)


def test_equal_settings_are_one_run_without_a_name(cluster: Cluster) -> None:
    for shard_mb in (1, 1, 2):
        assert submit(command(cluster, shard_mb=shard_mb, run_id="", wait=False)) == 0
    first, second = [asked["submission_id"] for asked in cluster.submitted]
    assert first != second
    assert all(re.fullmatch("pack-[0-9a-f]{10}", name) for name in (first, second))


def test_a_cluster_that_stays_silent_ends_the_watching_with_an_error(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module, "_SILENCE_S", 0.0)
    attempt_of = submit_module.JobsClient.attempt

    def cut_off(client: submit_module.JobsClient, submission_id: str) -> Any:
        if cluster.submitted and threading.current_thread() is not threading.main_thread():  # while following
            client._client._address = "http://127.0.0.1:9"
        return attempt_of(client, submission_id)

    monkeypatch.setattr(submit_module.JobsClient, "attempt", cut_off)
    with pytest.raises(ClusterError, match=r"does not answer.*The job may go on: the same command follows it again"):
        submit(command(cluster))
