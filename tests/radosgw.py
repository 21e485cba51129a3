"""A Ceph radosgw on loopback, with one monitor and one OSD in memory: a second, real S3 server for the storage tests.

Needs Debian's packages: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-mgr ceph-common
"""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port, wait_until

__all__ = ["ACCESS_KEY", "SECRET_KEY", "missing_programs", "radosgw"]

ACCESS_KEY, SECRET_KEY = "testing", "testing"  # what the fixtures put into AWS_ACCESS_KEY_ID and its secret

_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-mgr", "monmaptool")

_TRIES = 5
"""A client of Ceph may send its first command before it knows the cluster's id: EPERM. The next try works."""

_CONF = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/$name.log
pid file = {folder}/run/$name.pid
ms bind msgr2 = false
keyring = {folder}/keyring
[mon.a]
mon data = {folder}/mon
mon data avail crit = 1
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def missing_programs() -> list[str]:
    """Programs of Ceph that are not installed; empty where the server can run."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


@contextmanager
def radosgw(folder: Path) -> Iterator[str]:
    """Address of a server that lives as long as the block; its data is in memory, its logs are in `folder`."""
    port = free_port()
    conf = folder / "ceph.conf"
    for name in ("mon", "osd", "mgr", "run"):
        (folder / name).mkdir(parents=True)
    fsid = str(uuid.uuid4())
    conf.write_text(_CONF.format(fsid=fsid, folder=folder, port=port, mon_port=free_port()), encoding="ascii")
    environment = os.environ | {"CEPH_CONF": str(conf)}

    def call(*command: str) -> None:
        for left in reversed(range(_TRIES)):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            if not done.returncode:
                return
            if not left or not re.search("EPERM|not permitted", done.stderr):
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
            time.sleep(1)

    def answers() -> bool:
        with urllib.request.urlopen(url, timeout=1):
            return True

    url = f"http://127.0.0.1:{port}"
    try:
        mon_address = conf.read_text(encoding="ascii").split("v1:")[1].split("]")[0]
        monitor = ("--addv", "a", f"v1:{mon_address}")
        call("monmaptool", "--create", "--clobber", *monitor, "--fsid", fsid, f"{folder}/monmap")
        call("ceph-mon", "-i", "a", "--mkfs", "--monmap", f"{folder}/monmap")
        call("ceph-mon", "-i", "a")
        osd_fsid = str(uuid.uuid4())
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_fsid)
        call("ceph", "--connect-timeout", "20", "osd", "create", osd_fsid)
        call("ceph-osd", "-i", "0")
        call("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=h", "root=default")
        call("ceph-mgr", "-i", "x", "--mgr-data", f"{folder}/mgr")
        user = ("--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        call("radosgw-admin", "user", "create", *user)
        call("radosgw", "-n", "client.rgw")
        wait_until(answers, 200, "radosgw answers")
        yield url
    finally:
        _end(sorted((folder / "run").glob("*.pid")))


def _end(pid_files: list[Path]) -> None:
    """End the daemons that this folder's files name, and wait until they are gone."""
    pids = [int(file.read_text(encoding="ascii")) for file in pid_files if file.read_text(encoding="ascii").strip()]
    for pid in pids:
        _signal(pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(_signal(pid, 0) for pid in pids):
        time.sleep(0.1)
    for pid in pids:
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> bool:
    """Whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
