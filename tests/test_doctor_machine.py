"""kinoray doctor of a machine: it says what is there, and its judgements follow from the numbers."""

import json
import os
import platform
import re
import resource
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from kinoray.cli import main
from kinoray.demo.videos import make_video
from kinoray.doctor.config import Check, DoctorConfig, checked, clock_check, over_nodes
from kinoray.doctor.host import PACKAGES, host_facts, ray_temp_folder
from kinoray.doctor.machine import _decoder_check, host_checks, required_versions, version_checks
from kinoray.doctor.verb import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_this_machine_is_told_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = doctor(DoctorConfig(out=str(tmp_path)))
    machine = record["machine"]
    assert (machine["python"], machine["cores"]) == (platform.python_version(), len(os.sched_getaffinity(0)))
    assert machine["packages"] == {name: _installed(name) for name in PACKAGES}
    assert machine["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert tuple(machine["open_files"].values()) == resource.getrlimit(resource.RLIMIT_NOFILE)
    checks = {check["name"]: check for check in machine["checks"]}
    for backend in ("pyav", "decord"):
        assert checks[f"decoder {backend}"]["status"] == "ok"
    assert {"gpus", "cores", "memory", "shared memory", "disk", "open files", *required_versions()} <= set(checks)
    assert json.loads((tmp_path / "doctor.json").read_text()) == json.loads(json.dumps(record))
    assert not (tmp_path / "bad.parquet").exists()
    said = capsys.readouterr().out
    assert f"  ok       python: {platform.python_version()}\n" in said
    assert re.search(r"\nChecks: \d+ ok, \d+ warnings?, 0 wrong\n", said)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_the_required_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["torchcodec"]]
    split = [re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?(.*)", text) for text in stated]
    wanted = {match[1]: SpecifierSet(match[2]) for match in split if match}
    found = required_versions()
    assert set(found) == {"python", *PACKAGES}
    assert {name: wanted[name] for name in PACKAGES} == {name: found[name] for name in PACKAGES}
    assert found["python"] == SpecifierSet(project["requires-python"])


def facts(**changes: Any) -> dict[str, Any]:
    """Of a machine on which all is well."""
    least = {
        name: [one.version for one in wanted if one.operator == ">="] for name, wanted in required_versions().items()
    }
    packages = {name: least[name][0] for name in PACKAGES}
    space = {"size_bytes": 10**12, "free_bytes": 5 * 10**11}
    return {
        "hostname": "node",
        "python": "3.11.0",
        "packages": packages,
        "cores": 8,
        "cpu_quota": None,
        "memory_bytes": 32 * 10**9,
        "memory_free_bytes": 30 * 10**9,
        "memory_limit_bytes": None,
        "shared_memory": {"size_bytes": 16 * 10**9, "free_bytes": 16 * 10**9},
        "ray_folder": {"path": "/tmp/ray", **space},
        "open_files": {"soft": 1024, "hard": 65536},
        **changes,
    }


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("torch", "2.13.0", "wrong"),
        ("torch", "2.13.0+cu130", "wrong"),
        ("torch", "2.13.1", "ok"),
        ("torch", "2.9.1", "wrong"),
        ("torch", "2.11", "ok"),
        ("torch", None, "wrong"),
        ("ray", "3.0.0", "wrong"),
        ("ray", "2.60.0", "ok"),
        ("ray", "2.100.0", "ok"),
        ("ray", "3.0.0rc1", "wrong"),
        ("pyarrow", "9.0", "wrong"),
        ("torchcodec", None, "ok"),
        ("torchcodec", "0.9.1", "warning"),
    ],
)
def test_versions_are_compared_as_numbers(package: str, version: str | None, status: str) -> None:
    found = facts()
    found["packages"][package] = version
    by_name = {check.name: check for check in version_checks(found)}
    assert by_name.pop(package).status == status
    assert {check.status for check in by_name.values()} == {"ok"}


def test_an_old_python_is_wrong() -> None:
    assert next(map(str, version_checks(facts(python="3.10.14")))) == (
        "wrong    python: 3.10.14; install Python >=3.11"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param(
            {"cpu_quota": 2.0}, r"warning  cores: 8, .* may keep 2 busy; start Ray with --num-cpus=2,", id="cpus"
        ),
        pytest.param(
            {"memory_limit_bytes": 2 * 10**9}, r"warning  memory: .* 2.0 GB allowed here; .* 4.0 GB", id="memory"
        ),
        pytest.param(
            {"shared_memory": {"size_bytes": 67_108_864, "free_bytes": 67_108_864}},
            r"warning  shared memory: /dev/shm has 67.1 MB, .* store of 9.0 GB; give the container --shm-size=9g",
            id="docker's shared memory",
        ),
        pytest.param({"shared_memory": None}, "warning  shared memory: there is no /dev/shm", id="no shared memory"),
        pytest.param(
            {"ray_folder": {"path": "/r", "size_bytes": 10**12, "free_bytes": 4 * 10**10}},
            "wrong    disk: 40.0 GB of 1.0 TB free .* in /r; Ray writes nothing to a disk that is 96% full; delete",
            id="full disk",
        ),
        pytest.param(
            {"ray_folder": {"path": "/r", "size_bytes": 10**10, "free_bytes": 9 * 10**9}},
            "warning  disk: 9.0 GB of 10.0 GB free .*; delete old session",
            id="small disk",
        ),
        pytest.param(
            {"open_files": {"soft": 1024, "hard": 4096}}, "warning  open files: 1,024 .*4,096.*ulimit", id="files"
        ),
    ],
)
def test_what_is_scarce_is_said_with_a_remedy(changes: dict[str, Any], line: str) -> None:
    assert [check for check in host_checks(facts()) if check.status != "ok"] == []
    found = [str(check) for check in host_checks(facts(**changes)) if check.status != "ok"]
    assert len(found) == 1
    assert re.match(line, found[0]), found[0]


def test_a_running_store_counts_as_its_own() -> None:
    """The store of a running Ray is in use already: its size is compared with all of the shared memory."""
    space = {"shared_memory": {"size_bytes": 10**9, "free_bytes": 10**8}}
    status = {check.name: check.status for check in host_checks({**facts(**space), "object_store_bytes": 9e8})}
    assert status["shared memory"] == "ok"
    assert {check.name: check.status for check in host_checks(facts(**space))}["shared memory"] == "warning"


def test_a_decoder_that_gives_other_frames_is_found() -> None:
    """The clip is decoded by the real decoder; what it should hold is told wrongly, as if frames were others."""
    greys = np.linspace(30, 205, 8)
    frames = np.broadcast_to(greys[:, None, None, None], (8, 64, 64, 3)).round().astype(np.uint8)
    data = make_video(frames, gop=8)
    assert _decoder_check("pyav", data, greys).status == "ok"
    shifted = _decoder_check("pyav", data, np.roll(greys, 1))
    assert shifted.status == "wrong"
    assert "off by" in shifted.found
    assert _decoder_check("decord", data, np.roll(greys, 1)).status == "warning"
    broken = _decoder_check("pyav", b"", greys)
    assert (broken.status, broken.found.partition(":")[0]) == ("wrong", "EmptyMedia")
    assert broken.remedy


def test_rays_folder_is_where_ray_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_temp_folder() == f"{tmp_path}/ray"
    assert host_facts()["ray_folder"]["path"] == str(tmp_path)
    (tmp_path / "ray").mkdir()
    assert host_facts()["ray_folder"]["path"] == f"{tmp_path}/ray"


@pytest.mark.parametrize(
    ("said_s", "status", "found"),
    [
        (100.0, "ok", "agrees with this machine's"),
        (110.0, "ok", "agrees with this machine's"),
        (113.0, "ok", "3 s ahead of this machine's"),
        (80.0, "warning", "20 s behind this machine's"),
        (170.1, "wrong", "60 s ahead of this machine's"),
    ],
)
def test_a_clock_is_wrong_only_outside_the_time_of_the_question(said_s: float, status: str, found: str) -> None:
    check = clock_check(said_s, 100.0, 110.0)
    assert (check.status, check.found, bool(check.remedy)) == (status, found, status != "ok")


def test_many_nodes_are_one_line_each_check() -> None:
    good, small, full = (
        Check("disk", "ok", "9 GB"),
        Check("disk", "warning", "1 GB", "free some"),
        Check("disk", "wrong", "0 GB", "x"),
    )
    cores = Check("cores", "ok", "4")
    assert list(map(str, over_nodes({"a": [good, cores], "b": [good, cores]}))) == [
        "ok       disk: 2 nodes: 9 GB",
        "ok       cores: 2 nodes: 4",
    ]
    many = {"a": [good], **{f"n{number}": [small] for number in range(5)}}
    [line] = map(str, over_nodes(many))
    assert line == "warning  disk: 5 of 6 nodes (n0: 1 GB, n1: 1 GB, n2: 1 GB, ...); free some"
    [line] = map(str, over_nodes({**many, "z": [full]}))
    assert line == "wrong    disk: 1 of 7 nodes (z: 0 GB); x"


def test_a_wrong_check_is_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that is not there."""
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    assert main(["doctor", "--storage", str(nowhere), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("kinoray doctor: JobError: ")
    assert "1 wrong; the first that is wrong: access: " in captured.err
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["storage"]["checks"][0]["status"] == "wrong"
    assert re.search("  wrong    access: .*see that the bucket or folder exists", captured.out)


def test_a_section_of_checks_has_them_as_numbers_and_lines() -> None:
    section = checked("machine", [Check("a", "ok", "b")], cores=2)
    assert section.values == {"cores": 2, "checks": [{"name": "a", "status": "ok", "found": "b", "remedy": ""}]}
    assert section.lines == ("ok       a: b",)
