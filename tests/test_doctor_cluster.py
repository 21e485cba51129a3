"""kinoray doctor of a cluster: a closed one is looked at from inside, and what is not right about it is said."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kinoray.cluster import connect as connecting
from kinoray.doctor.cluster import _closed, _node_checks, cluster_section
from kinoray.errors import ConfigError
from ports import free_port
from test_closed_cluster import TOKEN, Head, head  # noqa: F401  (a fixture)
from test_doctor_machine import facts


def node(**changes: Any) -> dict[str, Any]:
    """What a node of a good cluster says."""
    about = {"address": "10.0.0.1", "is_head": False, "cpus": 4.0, "gpus": 0.0, "object_store_bytes": 1e9, "error": ""}
    return {**about, "facts": {**facts(), "time_s": 105.0}, **changes}


def checks_of(*nodes: dict[str, Any], time_s: float = 102.0) -> dict[str, str]:
    """Lines that are not ok, by name; the job ran from 100 s to 110 s of this machine's time."""
    found = {"time_s": time_s, "asked_s": time_s + 1, "answered_s": time_s + 5, "nodes": list(nodes)}
    return {check.name: str(check) for check in _node_checks(found, 100.0, 110.0) if check.status != "ok"}


HEAD = {"is_head": True, "cpus": 0.0, "address": "10.0.0.9"}


@pytest.fixture(autouse=True)
def _same_versions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes with the versions of facts() are those of this machine."""
    monkeypatch.setattr("kinoray.doctor.cluster.host_facts", facts)


def test_a_good_cluster_has_nothing_to_say() -> None:
    assert checks_of(node(**HEAD), node(), node()) == {}


def test_what_is_wrong_with_nodes_is_said() -> None:
    silent = node(facts=None, error="no task has run there in 60 s", address="10.0.0.7")
    assert checks_of(node(**HEAD), node(), silent)["nodes"].startswith(
        "wrong    nodes: 1 of 3 nodes run no task: 10.0.0.7: no task has run there in 60 s; look at"
    )
    busy = checks_of(node(is_head=True, cpus=8.0), node())
    assert busy["head"].startswith("warning  head: it has 8 CPUs")
    assert "--num-cpus=0" in busy["head"]
    assert checks_of(node(is_head=True, cpus=8.0)) == {}  # alone, it has to work itself
    assert checks_of(node(**HEAD))["nodes"].startswith("warning  nodes: 1 node, each ran a task")
    other = {**facts(python="3.12.1"), "time_s": 105.0}
    assert (
        "wrong    versions: 2 nodes with Ray 2.60, Python 3.11.0; 1 node with Ray 2.60, Python 3.12.1"
        in (checks_of(node(**HEAD), node(), node(facts=other))["versions"])
    )
    assert checks_of(node(facts=other))["versions"].startswith(
        "warning  versions: the nodes have Ray 2.60, Python 3.12"
    )


def test_clocks_are_compared_with_this_machines() -> None:
    fast = {**facts(), "time_s": 145.0}
    assert "1 of 2 nodes (node (10.0.0.1, 1): 38 s ahead" in checks_of(node(), node(facts=fast))["clock"]
    # The job's own driver is 100 s behind, and the node with it: both are wrong by this machine's clock.
    slow = {**facts(), "time_s": 5.0}
    assert checks_of(node(facts=slow), time_s=2.0)["clock"].startswith("wrong    clock: 1 of 1 node")


def test_an_open_cluster_on_another_machine_gets_nothing() -> None:
    there = _closed("http://192.0.2.77:8265", is_opened=True)
    assert (there.status, "RAY_AUTH_MODE=token" in there.remedy) == ("wrong", True)
    assert _closed("http://127.0.0.1:8265", is_opened=True).status == "warning"
    assert _closed("http://192.0.2.77:8265", is_opened=False).status == "ok"


def test_a_cluster_that_is_down_is_one_wrong_line() -> None:
    [check] = cluster_section(f"http://127.0.0.1:{free_port()}").checks
    assert (check.name, check.status) == ("answer", "wrong")
    assert "is the cluster up" in check.found
    with pytest.raises(ConfigError, match="must not hold credentials"):
        cluster_section("http://user:word@head:8265")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_closed_head_is_looked_at_from_inside(head: Head, tmp_path: Path) -> None:  # noqa: F811
    code, output = head.run("doctor", "--out", str(tmp_path))
    assert code == 0, output
    text = (tmp_path / "doctor.json").read_text()
    found = json.loads(text)["cluster"]
    status = {check["name"]: check["status"] for check in found["checks"]}
    for name in ("answer", "closed", "token", "nodes", "head", "versions", "clock", "ray", "torch"):
        assert status[name] == "ok", found["checks"]
    assert {"memory", "shared memory", "disk", "cores", "open files"} <= set(status)
    [one] = found["nodes"]
    assert (one["is_head"], one["cpus"], one["gpus"], one["object_store_bytes"]) == (True, 4, 0, 80_000_000)
    assert one["facts"]["ray_folder"]["path"].startswith(str(head.folder))
    assert TOKEN not in output + text

    before = head.get("/api/jobs/")
    readable = tmp_path / "token"
    readable.write_text(TOKEN)
    readable.chmod(0o644)
    other = Head(head.url, {**head.environment, "RAY_AUTH_TOKEN_PATH": str(readable)}, head.folder, head.process)
    code, output = other.run("doctor")
    assert code == 1
    assert f"wrong    token: RAY_AUTH_TOKEN_PATH: {readable} can be read by others" in output
    readable.write_text("of another cluster")
    readable.chmod(0o600)
    code, output = other.run("doctor")
    assert code == 1
    assert "does not take the token" in output
    assert head.get("/api/jobs/") == before


# The token file of a Ray that a job starts itself


@pytest.mark.parametrize(
    ("environment", "makes"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "x" * 20}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/somewhere"}, False),
    ],
)
def test_a_token_file_is_made_only_where_ray_would_make_one(
    environment: dict[str, str], makes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert connecting._makes_token() is makes


@pytest.mark.ray
@pytest.mark.slow
def test_the_token_file_of_a_local_ray_is_its_owners_alone(tmp_path: Path) -> None:
    """Ray itself makes it with the mode that the umask leaves: 0644."""
    code = (
        "import os; os.umask(0o022)\n"
        "from kinoray.config.shared import ResourcesConfig\n"
        "from kinoray.cluster.connect import connect, disconnect\n"
        "connect(ResourcesConfig(local_cpus=1)); disconnect()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True, timeout=200)
    path = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64
