"""A local S3 server (moto) for the demo: a process of its own on a free port, that ends with the demo.

Its keys are test keys, and they are in the environment of this process only while the server runs.
"""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3

from kinoray.config.shared import StorageConfig
from kinoray.errors import ConfigError, StorageUnavailable
from kinoray.storage.leftovers import reap

__all__ = ["s3_server"]

_START_TIMEOUT_S = 60.0
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@contextlib.contextmanager
def s3_server(bucket: str, log: Path) -> Iterator[StorageConfig]:
    """Start the server, make the bucket, and give the settings that lead to it. What it holds ends with it.

    Args:
        bucket: name of the bucket to make.
        log: file for what the server says.

    Raises:
        ConfigError: moto's server is not installed.
        StorageUnavailable: it does not start.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise ConfigError("storage s3 needs the server of the s3-demo extra: pip install 'kinoray[s3-demo]'")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        _environment(),
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            reap("process", str(process.pid))
            _wait(process, url, log)
            config = StorageConfig(endpoint_url=url, region="us-east-1", addressing="path")
            boto3.client("s3", endpoint_url=url, region_name=config.region).create_bucket(Bucket=bucket)
            yield config
        finally:
            process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return as soon as the server answers."""
    end = time.monotonic() + _START_TIMEOUT_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            direct.open(url, timeout=2).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                what = "does not answer" if process.poll() is None else f"ended with {process.returncode}"
                raise StorageUnavailable(f"the demo's S3 server at {url} {what}; it said: {log}") from error
        time.sleep(0.1)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The demo's keys instead of the user's, for this process and those that it starts."""
    saved = dict(os.environ)
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(_ENVIRONMENT)
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [saved.get(name, ""), "127.0.0.1"]))
    try:
        yield
    finally:
        for name in {*_UNSET, *_ENVIRONMENT, "NO_PROXY", "no_proxy"}:
            os.environ.pop(name, None)
            if name in saved:
                os.environ[name] = saved[name]
