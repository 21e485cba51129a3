"""What `kinoray submit` decides before a cluster is asked: what is sent, where, with which token; how a job ended."""

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from kinoray.cluster.client import Attempt, JobsClient, find_token, find_url, is_here, is_open
from kinoray.cluster.config import SubmitConfig
from kinoray.cluster.connect import private_token_file
from kinoray.cluster.submit import build_folder, check_settings, entrypoint, metadata, runtime_env
from kinoray.config.file import load_config, to_yaml
from kinoray.errors import ClusterError, ConfigError
from kinoray.pack.config import PackConfig
from kinoray.train.config import PRESETS, TrainConfig

TOKEN = "c0ffee" * 8


def attempt(**changes: Any) -> Attempt:
    values: dict[str, Any] = {
        "submission_id": "pack-1",
        "run": "pack-1",
        "verb": "pack",
        "number": 1,
        "out": "s3://b/s",
    }
    values |= {"settings": "0" * 16, "status": "SUCCEEDED", "started_s": 1000.0, "ended_s": 1010.0, "driver_code": 0}
    return Attempt(**(values | {"error_type": "", "message": ""} | changes))


def submission(settings: Any, **changes: Any) -> SubmitConfig:
    return SubmitConfig(verb="pack", settings=to_yaml(settings), **changes)


# What is sent


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"out": "set"}, "out must be s3:// or an absolute folder .* got 'set'", id="relative out"),
        pytest.param({"source": "videos/"}, "source must be s3:// or an absolute", id="relative source"),
        pytest.param({"annotations": ["/a.csv", "b.csv"]}, "annotations must be .* got 'b.csv'", id="one of many"),
        pytest.param(
            {"resources": {"address": "auto"}}, "resources.address must be left out", id="a cluster of its own"
        ),
    ],
)
def test_settings_that_mean_nothing_on_another_machine_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_settings({"source": "s3://bucket/videos", "out": "/shared/set", "label_names": ""} | changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("storage.endpoint_url", "https://me:canary-0123456789@s3.example.org", id="user and password"),
        pytest.param("out", "https://s3.example.org/b?X-Amz-Signature=canary-0123456789", id="presigned"),
        pytest.param("model.options.key", "canary-0123456789", id="a secret of the environment"),
    ],
)
def test_credentials_in_settings_are_refused_and_not_repeated(
    field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-0123456789")
    settings: dict[str, Any] = {"source": "s3://bucket/videos", "out": "s3://bucket/set"}
    *parents, last = field.split(".")
    place = settings
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    with pytest.raises(ConfigError, match=f"{field} holds a credential") as caught:
        check_settings(settings)
    assert "canary" not in str(caught.value)


def test_the_payload_reads_back_to_an_equal_config(tmp_path: Path) -> None:
    recipe = PRESETS["k400_paper"]()
    fields = {name: getattr(recipe, name) for name in ("model", "clip", "augment", "optim")}
    config = TrainConfig(catalog="s3://bucket/set", out="s3://bucket/run", **fields)
    build_folder(tmp_path, SubmitConfig(verb="train", settings=to_yaml(config)))
    assert load_config(TrainConfig, str(tmp_path / "job.yaml")) == config


def test_the_folder_has_all_code_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my_networks"
    for name in ("__init__.py", ".env", "server.pem", "id.key", "__pycache__/a.pyc", ".git/config"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("secret")
    folder = tmp_path / "sent"
    folder.mkdir()
    config = submission(PackConfig(source="s3://b/v", out="s3://b/s"), code=(str(own),))
    build_folder(folder, config)
    sent = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for package in ("platform/kinoray", "models/vcm_sdd", "models/video_baselines"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= sent
        sent -= sources
    assert {name for name in sent if not name.startswith(("platform/kinoray/page/", "models/"))} == {
        "job.yaml",
        "packages/my_networks/__init__.py",
        "platform/kinoray/py.typed",
    }
    assert {Path(name).suffix for name in sent} <= {".py", ".typed", ".yaml", ".html", ".css", ".js", ".j2"}


def test_code_that_is_missing_double_or_huge_is_refused(tmp_path: Path) -> None:
    pack = PackConfig(source="s3://b/v", out="s3://b/s")
    for name in ("one/net", "two/net", "weights"):
        (tmp_path / name).mkdir(parents=True)
    with (tmp_path / "weights" / "big.bin").open("wb") as file:
        file.truncate(81 * 2**20)
    for code, expected in (
        (("missing",), r"code\[0\] must be a folder with a Python package, got '.*missing'"),
        (("one/net", "two/net"), r"code\[1\] must have another name"),
        (("weights",), r"code must be at most 80 MiB, found 8\d MiB"),
    ):
        folder = tmp_path / f"sent-{code[0].replace('/', '-')}"
        folder.mkdir()
        with pytest.raises(ConfigError, match=expected):
            build_folder(folder, submission(pack, code=tuple(str(tmp_path / name) for name in code)))


def test_nothing_of_the_environment_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-0123456789")
    config = submission(PackConfig(source="s3://b/v", out="s3://b/s"))
    assert runtime_env(tmp_path) == {
        "working_dir": str(tmp_path),
        "env_vars": {"PYTHONPATH": "platform:models:packages", "PYTHONUNBUFFERED": "1"},
    }
    assert entrypoint(config) == "python -m kinoray pack --config job.yaml"
    said = metadata(config, "nightly", 2)
    assert said["kinoray_out"] == "s3://b/s"
    assert "canary" not in json.dumps(said) + yaml.safe_dump(config.settings)


def test_run_ids_are_plain() -> None:
    for wrong in ("a/b", "../x", "a b", "x" * 81, "-x"):
        with pytest.raises(ConfigError, match="run_id must be 1 to 80 letters"):
            SubmitConfig(verb="pack", run_id=wrong)


# Where to


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example.org/team", "https://ray.example.org/team"),
        ("ray://head:10001", "http://head:8265"),
        ("http://[::1]:8265", "http://[::1]:8265"),
        ("head:8265", "http://head:8265"),
    ],
)
def test_forms_of_an_address(address: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_url(address) == url
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_url("") == url
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert find_url("") == "http://other:1"
    assert find_url(address) == url


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        pytest.param("", "address must be given .*or RAY_ADDRESS be set", id="none"),
        pytest.param("ftp://head", "address must be one of .* got 'ftp://head'", id="another scheme"),
        pytest.param("http://head:port", "address must be one of .* malformed", id="no port"),
        pytest.param("http://u:canary@head", "address must not hold credentials", id="credentials"),
        pytest.param("http://head/?token=canary", "address must not hold credentials", id="token"),
    ],
)
def test_an_address_that_is_none_names_the_field(address: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=expected) as caught:
        find_url(address)
    assert "canary" not in str(caught.value)


def test_only_this_machine_is_here() -> None:
    assert is_here("http://127.0.0.1:8265")
    assert is_here("http://localhost:8265")
    assert not is_here("http://192.0.2.7:8265")  # TEST-NET-1: nobody's
    assert not is_here("http://cluster.invalid:8265")


# Who may use it

Answer = Callable[[http.server.BaseHTTPRequestHandler], tuple[int, str]]


@contextmanager
def dashboard(answer: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers every request so; its address, and the headers it got."""
    headers: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append({name.lower(): value for name, value in self.headers.items()})
            code, text = answer(self)
            self.send_response(code)
            self.send_header("Location", "/login")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", headers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})


def closed(request: http.server.BaseHTTPRequestHandler) -> tuple[int, str]:
    said = request.headers.get("Authorization")
    return (200, VERSION) if said == f"Bearer {TOKEN}" else (403, "Forbidden") if said else (401, "Unauthorized")


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def test_the_token_goes_only_to_those_who_ask_for_one(token_file: Path) -> None:
    with dashboard(lambda _: (200, VERSION)) as (url, headers):
        client = JobsClient(url, allow_open=False)  # on this machine
        assert client.open
        assert "is open: whoever reaches it runs code" in client.warning
        assert "authorization" not in headers[0]
        assert {one["authorization"] for one in headers[1:]} == {""}  # so that Ray adds none by itself
        assert not any(TOKEN in value for one in headers for value in one.values())
    with dashboard(closed) as (url, headers):
        client = JobsClient(url, allow_open=False)
        assert (client.open, client.warning) == (False, "")
        assert "authorization" not in headers[0]
        assert len(headers) > 1
        assert {one["authorization"] for one in headers[1:]} == {f"Bearer {TOKEN}"}


def test_an_open_cluster_elsewhere_is_refused_unless_told(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard(lambda _: (200, VERSION)) as (proxy, headers):
        monkeypatch.setenv("http_proxy", proxy)  # so that another machine's name is answered
        with pytest.raises(ConfigError, match=r"open cluster.*RAY_AUTH_MODE=token.*--allow-open-cluster"):
            JobsClient("http://cluster.invalid:8265", allow_open=False)
        assert JobsClient("http://cluster.invalid:8265", allow_open=True).open
        assert not any(TOKEN in value for one in headers for value in one.values())


def test_a_wrong_token_is_refused_without_repeating_it(token_file: Path) -> None:
    token_file.write_text("canary-of-another-cluster")
    with dashboard(closed) as (url, _), pytest.raises(ClusterError, match="does not take the token") as caught:
        JobsClient(url, allow_open=False)
    chain = [caught.value, caught.value.__cause__]
    assert not any("canary" in f"{error!r}" for error in chain)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        pytest.param(302, "", "answers with 302", id="a login page"),
        pytest.param(500, "", "answers with 500", id="broken"),
        pytest.param(200, "<html>", "answers with something else", id="a web page"),
        pytest.param(200, "[1]", "answers with something else", id="another service"),
    ],
)
def test_what_is_no_dashboard_is_said_to_be_none(code: int, text: str, expected: str) -> None:
    with (
        dashboard(lambda _: (code, text)) as (url, _),
        pytest.raises(ClusterError, match=f"no Ray dashboard.*{expected}"),
    ):
        is_open(url)


def test_a_cluster_that_is_down_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard(closed) as (url, _):
        pass
    with pytest.raises(ClusterError, match=r"does not answer .*refused.*ssh -L"):
        is_open(url)


# The token's file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_file_is_made_for_its_owner_alone_and_kept(home: Path) -> None:
    old = os.umask(0)
    try:
        path = private_token_file()
    finally:
        os.umask(old)
    assert path == home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    token = path.read_text()
    assert len(token) == 64
    assert private_token_file().read_text() == token == find_token("http://head:8265")


def test_a_token_that_others_can_read_or_that_is_not_there_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=r"asks for a token.*auth_token: .*No such file.*RAY_AUTH_TOKEN_PATH"):
        find_token("http://head:8265")
    path = private_token_file()
    for mode in (0o644, 0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=rf"can be read by others \(mode {mode:04o}\); chmod 600") as caught:
            find_token("http://head:8265")
        assert path.read_text() not in str(caught.value)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(ClusterError, match="is empty"):
        find_token("http://head:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", f" {TOKEN}\n")
    assert find_token("http://head:8265") == TOKEN


# How it ended


@pytest.mark.parametrize(
    ("changes", "exit_code", "was_killed"),
    [
        pytest.param({}, 0, False, id="done"),
        pytest.param({"status": "RUNNING", "driver_code": None}, None, False, id="running"),
        pytest.param({"status": "FAILED", "driver_code": 1}, 1, False, id="the job failed"),
        pytest.param({"status": "FAILED", "driver_code": 2}, 2, False, id="a wrong setting"),
        pytest.param({"status": "FAILED", "driver_code": -9}, 137, True, id="killed"),
        pytest.param({"status": "FAILED", "driver_code": 137}, 137, True, id="killed below a shell"),
        pytest.param({"status": "FAILED", "driver_code": 143}, 143, True, id="terminated with its node"),
        pytest.param({"status": "FAILED", "driver_code": 130}, 130, False, id="interrupted by somebody"),
        pytest.param({"status": "STOPPED", "driver_code": None}, 130, False, id="stopped"),
        pytest.param(
            {"status": "FAILED", "driver_code": None, "error_type": "JOB_SUPERVISOR_ACTOR_DIED"},
            1,
            True,
            id="node died",
        ),
        pytest.param(
            {"status": "FAILED", "driver_code": None, "error_type": "RUNTIME_ENV_SETUP_FAILURE"}, 1, False, id="no code"
        ),
    ],
)
def test_which_ends_are_tried_again(changes: dict[str, Any], exit_code: int | None, was_killed: bool) -> None:
    end = attempt(**changes)
    assert (end.exit_code, end.was_killed) == (exit_code, was_killed)
