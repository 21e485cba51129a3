"""`train --track`: a run's epochs to MLflow or Weights & Biases, through their own clients.

A child process follows metrics.jsonl and tells the tracker. RUN/tracker.json says under which id the run is known
there and which epoch was told last, so the same command goes on under that id. What is easy to break: a tracker that is
down, hangs or asks for a password must not hold up, slow or end a training. So its client shares neither process nor
terminal with the driver, is waited for only _LAST_S, and whatever goes wrong with it is one line.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from typing import IO, Any

from kinoray.config.file import config_from_mapping
from kinoray.config.shared import StorageConfig
from kinoray.console import draw_step, many, visible
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_json, read_record
from kinoray.train.runfolder import RunFolder

__all__ = ["require_tracker", "tracked"]

_EVERY_S = 10.0
_LAST_S = 20.0  # that the end of a command waits for the tracker
_UNTOLD = ("epoch", "time_s")
_MAX_PARAMS = 100  # that MLflow takes at once
_MAX_VALUE = 500  # characters of one


def require_tracker(kind: str | None) -> None:
    """Raises ConfigError: the tracker's client is not installed."""
    if kind and importlib.util.find_spec(kind) is None:
        raise ConfigError(f"track {kind} needs its client: pip install 'kinoray[{kind}]'")


@contextmanager
def tracked(folder: RunFolder, kind: str | None, settings: Mapping[str, Any]) -> Iterator[None]:
    """What is written to the folder's metrics.jsonl inside is told to the tracker; nothing is done without a `kind`."""
    if not kind:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # what a terminal sends to the driver (Ctrl-C) is not for the tracker
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told = {"kind": kind, "run": folder.uri, "settings": settings, "storage": asdict(folder.storage.config)}
    said: list[str] = []
    printer = threading.Thread(target=_print_lines, args=(process.stdout, said), daemon=True)
    printer.start()
    _tell(process.stdin, json.dumps(told))
    word = "FAILED"
    try:
        yield
        word = "FINISHED"
    except KeyboardInterrupt:
        word = "KILLED"
        raise
    finally:
        _tell(process.stdin, word)
        draw_step(f"train: waiting for {kind}")
        try:
            why = f"its process ended with {process.wait(_LAST_S)}"  # killed for its memory, say
        except subprocess.TimeoutExpired:
            why = f"it gave no answer in {_LAST_S:g} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printer.join(_LAST_S)
        if not said:
            print(f"train: warning: {_not_told(kind, why)}", flush=True)


def _tell(stdin: IO[bytes], line: str) -> None:
    with suppress(BrokenPipeError):  # it ended, and has said why
        stdin.write(line.encode() + b"\n")


def _print_lines(stdout: IO[bytes], said: list[str]) -> None:
    for line in stdout:
        said.append(visible(line.decode(errors="replace").rstrip()))
        print(f"train: {said[-1]}", flush=True)


def _not_told(kind: str, why: str) -> str:
    return f"{kind} was not told of all epochs: {why}; training is not harmed, and the same command tells it again"


# In the child process


class _MLflow:
    def __init__(self, run_id: str, name: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        self.id: str = mlflow.start_run(run_id=run_id or None, run_name=name).info.run_id
        params = [(key, str(value)[:_MAX_VALUE]) for key, value in settings.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            mlflow.log_params(dict(params[start : start + _MAX_PARAMS]))

    def log(self, epoch: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=epoch, timestamp=int(time_s * 1000), synchronous=True)

    def end(self, word: str) -> None:
        self._mlflow.end_run(word)


class _Wandb:
    def __init__(self, run_id: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.id = run_id or uuid.uuid4().hex[:8]
        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        self._run = wandb.init(id=self.id, name=name, config=dict(settings), resume="allow", settings=quiet)
        self._run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._run.log({"epoch": epoch, **numbers})

    def end(self, word: str) -> None:
        self._run.finish(exit_code=0 if word == "FINISHED" else 1)


_CLIENTS: Mapping[str, Any] = {"mlflow": _MLflow, "wandb": _Wandb}


def _follow(told: Mapping[str, Any], stdin: FileIO) -> str:
    """Tell the tracker of each epoch once, until the driver says how the run ended, or is gone; what to say of it."""
    kind, run = told["kind"], told["run"]
    folder = RunFolder(Storage(config_from_mapping(StorageConfig, told["storage"], complete=True)), run)
    uri = join(run, "tracker.json")
    try:
        known: dict[str, Any] = read_record(folder.storage, uri, dict)
    except ObjectNotFound:
        known = {}
    mine = known.setdefault(kind, {"id": "", "epoch": 0})
    client: _MLflow | _Wandb = _CLIENTS[kind](mine["id"], run.rstrip("/").rpartition("/")[2], told["settings"])
    mine["id"] = client.id
    folder.storage.put(uri, json.dumps(known).encode())
    word = ""
    while True:
        for row in folder.epochs():
            if row.epoch > mine["epoch"]:
                numbers = {name: float(value) for name, value in row.record().items() if name not in _UNTOLD}
                client.log(row.epoch, row.time_s, numbers)
                mine["epoch"] = row.epoch
                folder.storage.put(uri, json.dumps(known).encode())
        if word:
            client.end(word)
            return f"{kind} has the {many(mine['epoch'], 'epoch')} of this run as {client.id}"
        if select.select([stdin], [], [], _EVERY_S)[0]:
            word = stdin.readline().decode().strip() or "KILLED"


def _main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the clients' own words would mix with the driver's
        os.dup2(nowhere, stream)
    stdin = FileIO(0)
    told = parse_json(stdin.readline())
    try:
        line = _follow(told, stdin)
    except Exception as error:  # noqa: BLE001  (whatever a tracker's client does is no business of the training)
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        line = f"warning: {_not_told(told['kind'], why)}"
    print(line, file=lines, flush=True)


if __name__ == "__main__":
    _main()
