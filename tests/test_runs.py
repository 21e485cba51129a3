"""`kinoray runs` and what it reads: status.json of a driver that works, ends, fails or dies; curves; environment."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, cast

import pytest

from kinoray.cli import main
from kinoray.config.file import load_config
from kinoray.config.shared import ModelConfig, OptimConfig, StorageConfig
from kinoray.errors import ClusterError, StorageError, TooManyBad
from kinoray.storage.objects import Storage, join
from kinoray.train.config import RunsConfig, TrainConfig
from kinoray.train.recorder import commits, draw_curves, git_commit, host, software
from kinoray.train.runfolder import RunFolder, StepRow
from kinoray.train.runs import Heartbeat, RunSummary, find_runs, runs
from ports import wait_until
from small_sets import catalog_of, epoch_row


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StorageConfig, str]:
    """A storage and a place for runs in it."""
    if request.param == "folder":
        return StorageConfig(), str(tmp_path / "runs")
    config = cast(StorageConfig, request.getfixturevalue("s3_config"))
    return config, join(cast(str, request.getfixturevalue("bucket")), "runs")


def start(config: StorageConfig, out: str, /, *, epochs: int = 4, **options: object) -> Storage:
    """A run folder as train begins it."""
    storage = Storage(config)
    catalog = catalog_of([{"video_id": f"v{index}", "uri": "u", "split": "train"} for index in range(3)])
    model = ModelConfig(factory="tiny_models:mean_colour", options=cast(dict[str, Any], options))
    settings = TrainConfig(catalog="set", out=out, model=model, optim=OptimConfig(epochs=epochs), storage=config)
    RunFolder(storage, out).claim(settings, catalog)
    return storage


def test_a_network_of_hugging_face_is_named_by_what_it_is_and_not_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "tuned")
    config = {"attention_probs_dropout_prob": 0.0, "model_type": "videomae", "hidden_size": 24}
    start(StorageConfig(), out, config=config, drop_path=0.1)
    (run,) = runs(RunsConfig(prefix=out))
    assert run.model == "tiny_models:mean_colour videomae drop_path=0.1"
    assert run.model in capsys.readouterr().out  # whole, in a pipe


def epoch(storage: Storage, out: str, number: int, **metrics: float) -> None:
    RunFolder(storage, out).write_epoch(epoch_row(number, **metrics))


def test_a_listing_says_how_each_run_stands(
    place: tuple[StorageConfig, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, prefix = place
    storage = start(config, join(prefix, "done"), epochs=3, depth=2)
    with Heartbeat(storage, join(prefix, "done")):
        for number, top1 in enumerate((0.25, 0.75, 0.5), start=1):
            epoch(storage, join(prefix, "done"), number, loss=1.0, val_top1=top1)
    start(config, join(prefix, "sweep/t1"))
    epoch(storage, join(prefix, "sweep/t1"), 1, loss=0.5)
    with pytest.raises(TooManyBad), Heartbeat(storage, join(prefix, "sweep/t1")):
        raise TooManyBad("3 of 4 videos\nare bad \x1b[31m")
    start(config, join(prefix, "working"))
    beat = Heartbeat(storage, join(prefix, "working"))
    beat.__enter__()
    start(config, join(prefix, "interrupted"))
    with pytest.raises(KeyboardInterrupt), Heartbeat(storage, join(prefix, "interrupted")):
        raise KeyboardInterrupt
    storage.put(join(prefix, "odd/run.json"), b"[]")
    storage.put(join(prefix, "done/checkpoints/epoch-0001-step-000001/checkpoint.json"), b"{}")
    capsys.readouterr()

    found = {run.uri.removeprefix(prefix + "/"): run for run in runs(RunsConfig(prefix=prefix, storage=config))}
    beat.__exit__(None, None, None)

    assert {name: run.state for name, run in found.items()} == {
        "done": "finished",
        "sweep/t1": "failed",
        "working": "running",
        "interrupted": "stopped",
        "odd": "damaged",
    }
    done, failed = found["done"], found["sweep/t1"]
    assert (done.epochs_done, done.epochs, done.best, done.best_value, done.best_epoch) == (3, 3, "val_top1", 0.75, 2)
    assert done.model == "tiny_models:mean_colour depth=2"
    assert (failed.epochs_done, failed.epochs, failed.best, failed.best_value) == (1, 4, "loss", 0.5)
    assert failed.error == "TooManyBad: 3 of 4 videos are bad \x1b[31m"
    assert all(0 <= run.age_s < 60 for run in found.values())
    table = capsys.readouterr().out
    assert "\x1b" not in table
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert "finished" in lines["done"]
    assert "3/3  val top-1 0.750 (epoch 2)" in lines["done"]
    assert "1/4  loss 0.500 (epoch 1)" in lines["sweep/t1"]
    assert "sweep/t1: TooManyBad: 3 of 4 videos are bad \\u001b[31m" in table
    assert find_runs(storage, join(prefix, "done")) == [dataclasses.replace(done, age_s=pytest.approx(0, abs=60))]


def test_a_killed_driver_is_told_by_its_silence(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    storage = start(StorageConfig(), out)
    code = (
        "import sys, time\nfrom kinoray.train.runs import Heartbeat\n"
        "from kinoray.storage.objects import Storage\n"
        "with Heartbeat(Storage(), sys.argv[1], every_s=0.05):\n    time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, out])
    status = Path(out) / "status.json"
    wait_until(status.exists, 60, "the driver says that it runs")
    first = status.stat().st_mtime_ns
    wait_until(lambda: status.stat().st_mtime_ns > first, 60, "it says so again")
    assert [run.state for run in find_runs(storage, out)] == ["running"]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert json.loads(status.read_text())["state"] == "running"

    for path in Path(out).iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 300))
    (run,) = find_runs(storage, out)
    assert (run.state, run.epochs_done) == ("stopped", 0)
    assert "no sign of life" in run.error
    assert 300 <= run.age_s < 360
    with Heartbeat(storage, out) as heart:  # the same command goes on, and the first start stays
        heart.stopped = True
    (again,) = find_runs(storage, out)
    assert (again.state, again.started_s) == ("stopped", run.started_s)
    assert again.age_s < 60


def test_a_run_that_died_before_its_first_step_says_so_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = start(StorageConfig(), str(tmp_path / "run"))
    with pytest.raises(ClusterError), Heartbeat(storage, str(tmp_path / "run")):
        raise ClusterError("Ray does not start")
    trial = {"trial": "t1", "settings": {}}
    for name in ("failed", "begins"):
        storage.put(str(tmp_path / name / "trial.json"), json.dumps(trial).encode())
    outcome = {"status": "failed", "error_class": "ConfigError", "error_text": "optim.lr is too low"}
    storage.put(str(tmp_path / "failed" / "outcome.json"), json.dumps(outcome).encode())
    found = {Path(run.uri).name: (run.state, run.error) for run in runs(RunsConfig(prefix=str(tmp_path)))}
    assert found == {
        "run": ("failed", "ClusterError: Ray does not start"),
        "failed": ("failed", "ConfigError: optim.lr is too low"),
        "begins": ("running", "it has not begun to train"),
    }
    assert "failed: ConfigError: optim.lr is too low" in capsys.readouterr().out
    runs(RunsConfig(prefix=str(tmp_path / "failed")))
    assert "failed" in capsys.readouterr().out


class Refuses(Storage):
    """A storage that takes the first word and no other."""

    def put(self, uri: str, data: bytes) -> None:
        if b"running" not in data:
            raise StorageError(f"{uri}: no")
        super().put(uri, data)


def test_a_status_that_cannot_be_written_neither_ends_nor_hides_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    with Heartbeat(Refuses(), str(tmp_path)):
        pass
    assert "status.json does not say that the run is finished: " in capsys.readouterr().out
    with pytest.raises(TooManyBad), Heartbeat(Refuses(), str(tmp_path)):
        raise TooManyBad("x")
    assert threading.active_count() <= before


def test_an_empty_prefix_and_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run below" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    start(StorageConfig(), str(tmp_path / "a"))
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert {field.name for field in dataclasses.fields(RunSummary)} == set(json.loads(line))
    assert main(["runs", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("kinoray runs s3://bucket/runs", "sign of life", "goes on with it", "highest top-1"):
        assert part in text


def test_the_config_of_a_run_folder_starts_the_same_run(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    start(StorageConfig(region="eu-west-3"), out, depth=3)
    config = load_config(TrainConfig, str(tmp_path / "run" / "config.yaml"))
    assert (config.out, config.optim.epochs, config.model.options) == (out, 4, {"depth": 3})
    assert config.storage.region == "eu-west-3"


def test_the_environment_names_versions_commit_and_host_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-key")
    monkeypatch.setenv("SOME_TOKEN", "canary-token")
    for number in (1, 2):
        start_entry = {"time_s": number, "software": software(), "hosts": [host(0)]}
        RunFolder(Storage(), str(tmp_path)).add_start(start_entry)
    text = (tmp_path / "environment.json").read_text()
    assert "canary" not in text
    starts = json.loads(text)["starts"]
    assert [entry["time_s"] for entry in starts] == [1, 2]
    assert {"python", "kinoray", "ray", "torch", "av"} <= set(starts[0]["software"])
    (machine,) = starts[0]["hosts"]
    assert machine["cpus"] == os.cpu_count()
    total_kb = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert machine["memory_bytes"] == pytest.approx(int(total_kb) * 1024, rel=0.02)
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(StorageError, match=r"environment\.json is damaged"):
        RunFolder(Storage(), str(tmp_path)).add_start({})


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_commit(tmp_path) == ""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kinoray.__file__", str(tmp_path / "kinoray" / "__init__.py"))
    (tmp_path / "kinoray").mkdir()
    assert commits() == {"commit": commit, "kinoray_commit": commit}
    (tmp_path / "file").write_text("2")
    assert commits() == {"commit": commit, "kinoray_commit": commit + "+"}


@pytest.mark.parametrize("place", ["itself", "a .git file", "a submodule"])
def test_no_command_of_a_strangers_repository_runs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = tmp_path / "library", tmp_path / "mark"
    folder.mkdir()
    run = f"touch {mark}"
    git(folder, "init", "-q")
    (folder / "file").write_text("1")
    (folder / ".gitattributes").write_text("* filter=evil diff=evil\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    commit = git(folder, "rev-parse", "HEAD")
    (folder / ".git" / "hooks").mkdir(exist_ok=True)
    for name in ("core.fsmonitor", "filter.evil.clean", "diff.evil.command", "core.pager"):
        git(folder, "config", name, run)
    git(folder, "config", "core.hooksPath", str(tmp_path))
    (folder / "file").write_text("2")
    if place == "a .git file":
        (folder / ".git").rename(tmp_path / "elsewhere")
        (folder / ".git").write_text(f"gitdir: {tmp_path / 'elsewhere'}\n")
    if place == "a submodule":
        (tmp_path / "outer").mkdir()
        git(tmp_path / "outer", "init", "-q")
        folder = folder.rename(tmp_path / "outer" / "library")
        git(tmp_path / "outer", "add", "library")
        git(tmp_path / "outer", "commit", "-q", "-m", "two")
        commit = git(tmp_path / "outer", "rev-parse", "HEAD")
        folder = tmp_path / "outer"
    monkeypatch.chdir(folder)
    mark.unlink(missing_ok=True)  # adding it to the outer repository asked it already
    assert commits()["commit"] == commit
    assert not mark.exists()
    if place != "a submodule":
        git(folder, "status")
        assert mark.exists()


def test_curves_show_every_metric_at_its_place(tmp_path: Path) -> None:
    storage, out = Storage(), str(tmp_path)
    draw_curves(RunFolder(storage, out))
    assert not list(tmp_path.iterdir())
    for number in (1, 2):
        rows = [
            StepRow(
                epoch=number,
                step=3000 * (number - 1) + step,
                videos=8,
                quarantined=0,
                lr=0.1,
                loss=None if step == 8 else 1.0 / number,  # a batch of which nothing could be read
            )
            for step in range(1, 3001)
        ]
        RunFolder(storage, out).write_steps(number, rows)
        epoch(storage, out, number, loss=1.0, top1=0.5, val_loss=1.5, val_top1=0.25, val_top5=0.75)
    draw_curves(RunFolder(storage, out))
    picture = ET.parse(tmp_path / "learning_curves.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    lines = [element for element in picture.iter() if element.get("id", "").startswith("line2d")]
    assert len(lines) >= 7
    assert (tmp_path / "learning_curves.svg").stat().st_size < 200_000  # 6,000 steps are drawn as at most 1,000 points
