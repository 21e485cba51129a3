"""`train --track`: what MLflow and W&B themselves say of a run afterwards, and what it costs where one is down."""

import json
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from kinoray.errors import ConfigError
from kinoray.storage.objects import Storage
from kinoray.train import tracking
from kinoray.train.runfolder import RunFolder
from kinoray.train.tracking import require_tracker, tracked
from small_sets import epoch_row

SETTINGS = {"optim.lr": 0.1, "optim.betas": [0.9, 0.999], "init_from": "", **{f"a.{n}": "x" * 900 for n in range(120)}}


def train(folder: RunFolder, kind: str, *epochs: int, error: type[BaseException] | None = None) -> None:
    """A training of these epochs, as the tracker sees it."""
    with tracked(folder, kind, SETTINGS):
        for epoch in epochs:
            folder.write_epoch(epoch_row(epoch, loss=1 / epoch, val_top1=epoch / 10))
        if error:
            raise error


def known(folder: RunFolder, kind: str) -> dict[str, Any]:
    return dict(json.loads(Storage().read(f"{folder.uri}/tracker.json"))[kind])


@pytest.mark.slow
def test_mlflow_has_each_epoch_once_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow-skinny")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gestures")
    monkeypatch.setattr(tracking, "_LAST_S", 600)
    folder = RunFolder(Storage(), str(tmp_path / "runs" / "first"))
    with pytest.raises(KeyboardInterrupt):
        train(folder, "mlflow", 1, 2, error=KeyboardInterrupt)
    client = mlflow.MlflowClient(store)
    run = client.get_run(known(folder, "mlflow")["id"])
    assert (run.info.status, run.info.run_name) == ("KILLED", "first")
    train(folder, "mlflow", 3)
    train(folder, "mlflow")
    (experiment,) = [found for found in client.search_experiments() if found.name == "gestures"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert known(folder, "mlflow") == {"id": run.info.run_id, "epoch": 3}
    assert run.data.params == {key: str(value)[:500] for key, value in SETTINGS.items()}
    for name, expected in (("loss", [1.0, 1 / 2, 1 / 3]), ("val_top1", [0.1, 0.2, 0.3])):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(one.step, one.value) for one in history] == list(enumerate(expected, 1))
    assert set(run.data.metrics) == set(epoch_row(1, loss=1.0, val_top1=1.0).record()) - {"epoch", "time_s"}
    assert capsys.readouterr().out.count(f"train: mlflow has the 3 epochs of this run as {run.info.run_id}") == 2


@pytest.mark.slow
def test_wandb_has_each_epoch_once_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a connection, as the files that `wandb sync` sends: one for each start, all of one run."""
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(tracking, "_LAST_S", 600)
    folder = RunFolder(Storage(), str(tmp_path / "runs" / "first"))
    train(folder, "wandb", 1, 2)
    train(folder, "wandb", 3)
    name = known(folder, "wandb")["id"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert len(files) == 2
    rows = [row for file in files for row in wandb_history(file)]
    assert [(row["epoch"], row["loss"], row["val_top1"]) for row in rows] == [(n, 1 / n, n / 10) for n in (1, 2, 3)]
    assert f"train: wandb has the 3 epochs of this run as {name}" in capsys.readouterr().out


def wandb_history(file: Path) -> list[dict[str, float]]:
    """The rows that a file of W&B's holds: behind seven bytes a LevelDB log, whose records are cut at its blocks."""
    from wandb.proto import wandb_internal_pb2

    data, place, content, rows = file.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place < len(data):
        if 0 < -place % 2**15 < 7:  # no head of a record fits into what is left of the block
            place += -place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, content = wandb_internal_pb2.Record.FromString(content), b""
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items()})
    return rows


@pytest.mark.slow
def test_a_tracker_that_is_down_costs_a_line_and_a_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that takes connections and never answers; later there is one that does."""
    pytest.importorskip("mlflow", reason="needs the package mlflow-skinny")
    folder = RunFolder(Storage(), str(tmp_path / "runs" / "first"))
    monkeypatch.setattr(tracking, "_LAST_S", 6)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin_s = time.monotonic()
        train(folder, "mlflow", 1, 2)
        assert time.monotonic() - begin_s < 20
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "train: warning: mlflow was not told of all epochs: it gave no answer in 6 s; training is not harmed, and the "
        "same command tells it again"
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(tracking, "_LAST_S", 600)
    train(folder, "mlflow")
    assert known(folder, "mlflow")["epoch"] == 2


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process ended with -9"),
        ("raise SystemExit('no licence')", "its process ended with 1"),
    ],
)
def test_a_client_that_dies_is_said(
    client: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed for its memory, say, or by a library of its own that ends the process."""
    (tmp_path / "mlflow.py").write_text(client)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tracking, "_LAST_S", 600)
    train(RunFolder(Storage(), str(tmp_path / "runs" / "first")), "mlflow", 1)
    assert capsys.readouterr().out.splitlines() == [
        f"train: warning: mlflow was not told of all epochs: {said}; training is not harmed, and the same command "
        "tells it again"
    ]


@pytest.mark.slow
def test_a_tracker_without_a_password_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="needs the package wandb")
    for name, value in (("HOME", str(tmp_path)), ("WANDB_DIR", str(tmp_path)), ("WANDB_MODE", "online")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "_LAST_S", 600)
    train(RunFolder(Storage(), str(tmp_path / "runs" / "first")), "wandb", 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r"train: warning: wandb was not told of all epochs: \w+: .*(api_key|API key|login)", line)


def test_without_a_tracker_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.subprocess, "Popen", None)
    with tracked(RunFolder(Storage(), str(tmp_path)), None, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tracker(None)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track wandb needs its client: pip install 'kinoray\[wandb\]'"):
        require_tracker("wandb")
