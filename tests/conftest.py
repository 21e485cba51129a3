"""Fixtures that every test may use: an S3 server of its own process, and one Ray for the whole session."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from kinoray.config import StorageConfig

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll until the condition holds; an OSError counts as not yet. Fails the test after limit_s."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {limit_s:g} s in vain until {what}")


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


@pytest.fixture(scope="session")
def s3_server(_environment: None) -> Iterator[str]:
    """Address of an S3 protocol server (moto) that runs as a process of its own, on loopback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"the S3 server ended with {process.returncode}") from None
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_config(s3_server: str) -> StorageConfig:
    return StorageConfig(endpoint_url=s3_server, region="us-east-1", addressing="path")


@pytest.fixture
def bucket(s3_server: str) -> str:
    """`s3://` address of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_local(_environment: None) -> Iterator[None]:
    """One Ray for the whole session, as the jobs start it."""
    from kinoray.config import ResourcesConfig
    from kinoray.run.cluster import connect, disconnect

    connect(ResourcesConfig(local_cpus=4))
    yield
    disconnect()
