"""Fixtures that every test may use: an S3 server of its own process, and one Ray for the whole session."""

import os
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import boto3
import pytest

from kinoray.config.shared import StorageConfig
from ports import free_port, wait_until
from radosgw import missing_programs, radosgw

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails, unless it is about a GPU")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` has two processes (pytest-xdist): one takes all that use Ray, so that one Ray runs at a time."""
    items.sort(key=_uses_ray, reverse=True)
    for item in items:
        group = "ray" if _uses_ray(item) else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


def _uses_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if "GPU" not in reason and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {reason}; --no-skips allows no skip but for a GPU"
    return report


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """Every process that a test starts sees these: our packages, fake S3 keys, quiet Ray."""
    saved = dict(os.environ)
    path = [str(ROOT / "platform"), str(ROOT / "models"), str(ROOT / "tests"), saved.get("PYTHONPATH", "")]
    os.environ.update(
        PYTHONPATH=os.pathsep.join(part for part in path if part),
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
    )
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection, or a question for an address, ends the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a connection: {args}")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def s3_server(moto_server: str) -> str:
    """Address of an S3 server; the storage tests take Ceph's radosgw as well."""
    return moto_server


@pytest.fixture(scope="session")
def radosgw_server(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of Ceph's radosgw, where its packages are installed; 13 s."""
    if missing := missing_programs():
        pytest.skip(f"radosgw is not installed ({', '.join(missing)} missing); tests/radosgw.py names the packages")
    with radosgw(tmp_path_factory.mktemp("radosgw")) as url:
        yield url


@pytest.fixture(scope="session")
def moto_server(_environment: None) -> Iterator[str]:
    """Address of an S3 protocol server (moto) that runs as a process of its own, on loopback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(url, process), 200, "the S3 server answers")
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the S3 server ended with {process.returncode}")
    with urllib.request.urlopen(url, timeout=1):
        return True


def config_at(url: str) -> StorageConfig:
    """How a server of ours is reached."""
    return StorageConfig(endpoint_url=url, region="us-east-1", addressing="path")


def bucket_at(url: str) -> str:
    """`s3://` address of a new, empty bucket of that server."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def s3_config(s3_server: str) -> StorageConfig:
    return config_at(s3_server)


@pytest.fixture
def bucket(s3_server: str) -> str:
    return bucket_at(s3_server)


@pytest.fixture(scope="session")
def ray_local(_environment: None) -> Iterator[None]:
    """One Ray for the whole session, as the jobs start it."""
    from kinoray.cluster.connect import connect, disconnect
    from kinoray.config.shared import ResourcesConfig

    connect(ResourcesConfig(local_cpus=4))
    yield
    disconnect()
