"""`kinoray runs`: which training runs lie under a folder or s3:// prefix, and how they stand; from storage alone.

A run is a folder with a run.json. Its driver writes status.json every 30 seconds; the store's own time of that file
is the run's last sign of life, so that nobody's clock needs to agree with another's but the reader's with the store's.

Easy to break: a driver that was killed says "running" for ever; how old that word is decides whether it is believed.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal

from kinoray.config.files import local_path
from kinoray.console import format_duration, many, shortened, table, visible
from kinoray.errors import ChecksumMismatch, KinorayError, ObjectNotFound, StorageError, StorageUnavailable
from kinoray.label.times import Span, bar_line, clock, covered_s
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.storage.records import as_seconds, parse_json, parse_lines, read_record
from kinoray.train.config import RunsConfig
from kinoray.train.runfolder import numbers

__all__ = ["Heartbeat", "RunSummary", "State", "find_runs", "runs", "train_spans"]

_BEAT_S = 30.0
_STATUS_FILE = "status.json"
_SILENT_S = 4 * _BEAT_S  # a store that fails for a minute is no dead driver
_READERS = 16  # requests at a time
_MAX_TEXT = 2000
_HASTE_S = 5.0  # for a word that is said again soon, or that must not hold up the news that the store is down

_SILENT = (
    "its driver gives no sign of life and said nothing of its end: it was killed, or its machine lost; the command "
    "that started it goes on with it"
)

State = Literal["running", "finished", "stopped", "failed", "damaged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run as it stands in storage."""

    uri: str
    """The run folder."""
    state: State
    """`stopped`: its driver was interrupted, or gives no sign of life any more; the same command goes on with it."""
    age_s: float
    """Seconds since the last sign of life."""
    epochs_done: int
    """Whole epochs in metrics.jsonl."""
    epochs: int
    """Epochs that were asked for."""
    best: str
    """The best metric: val_map or val_top1, or loss where nothing is scored; empty before the first epoch."""
    best_value: float | None
    """Its value."""
    best_epoch: int | None
    """When it was reached."""
    model: str
    """The network's name and options."""
    started_s: float
    """When it was first started, in seconds since 1970."""
    error: str
    """What it failed with."""


def runs(config: RunsConfig) -> list[RunSummary]:
    """Print the runs below config.prefix, the newest last, and return them; of one run, where its time went as well.

    Raises:
        ChecksumMismatch: the metrics.jsonl of that one is not what train wrote.
        StorageError: there is no such folder, or it cannot be listed.
    """
    prefix = absolute(config.prefix)
    storage = Storage(config.storage)
    if not is_s3(prefix) and not os.path.isdir(local_path(prefix)):
        raise ObjectNotFound(f"{prefix}: no such folder; name a run, or a folder of runs")
    found = find_runs(storage, prefix)
    if config.json:
        for run in found:
            print(json.dumps(asdict(run)))
    elif not found:
        print(f"no run below {prefix} (a run is a folder that kinoray train has written run.json to)")
    else:
        print(_table(found, prefix))
        if [run.uri for run in found] == [prefix.rstrip("/")] and found[0].state != "damaged":
            _print_time(storage, found[0].uri)
    return found


def find_runs(storage: Storage, prefix: str) -> list[RunSummary]:
    """The runs in folder `prefix` and at any depth below it, by the time of their first start."""
    files = {info.uri: info.modified_s for info in storage.list(prefix.rstrip("/") + "/")}
    folders = {uri.rpartition("/")[0]: uri for uri in files if uri.endswith(("/run.json", "/trial.json"))}
    now_s = time.time()
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda uri: _summary(storage, uri, files, now_s), folders))
    return sorted(found, key=lambda run: (run.started_s, run.uri))


def _summary(storage: Storage, uri: str, files: dict[str, float], now_s: float) -> RunSummary:
    """One run; what of it cannot be read makes it `damaged`, with the reason, and hides no other run."""
    made_s = min(files[join(uri, name)] for name in ("run.json", "trial.json") if join(uri, name) in files)
    seen_s = max(files.get(join(uri, name), made_s) for name in (_STATUS_FILE, "metrics.jsonl", "run.json"))
    run = RunSummary(
        uri=uri,
        state="damaged",
        age_s=max(0.0, now_s - seen_s),
        epochs_done=0,
        epochs=0,
        best="",
        best_value=None,
        best_epoch=None,
        model="?",
        started_s=made_s,
        error="",
    )
    try:
        if join(uri, "run.json") not in files:
            return _unbegun(storage, run)
        settings = read_record(storage, join(uri, "run.json"), dict)["settings"]
        run = replace(run, epochs=_count(settings["optim.epochs"]), model=_model(settings))
        run = _with_progress(run, _lines(storage, join(uri, "metrics.jsonl")))
        said = "running"
        for status in _lines(storage, join(uri, _STATUS_FILE)):
            said = status["state"]
            run = replace(run, started_s=as_seconds(status["started_s"], "started_s"), error=str(status["error"]))
        run = replace(run, state=_state(said, run))
        return replace(run, error=_SILENT) if (run.state, said) == ("stopped", "running") else run
    except KinorayError as error:
        return replace(run, error=str(error))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        return replace(run, error=f"{uri}: run.json, status.json or metrics.jsonl is not ours: {error!r}")


def _unbegun(storage: Storage, run: RunSummary) -> RunSummary:
    """A trial of a sweep that came to its end, if it did, before its run was begun."""
    for outcome in _lines(storage, join(run.uri, "outcome.json")):
        return replace(run, state="failed", error=f"{outcome['error_class']}: {outcome['error_text']}")
    return replace(run, state="running" if run.age_s <= _SILENT_S else "stopped", error="it has not begun to train")


def _state(said: str, run: RunSummary) -> State:
    """What the driver said last, if it may still be so."""
    if said == "running":
        if run.age_s <= _SILENT_S:
            return "running"
        return "finished" if run.epochs_done == run.epochs else "stopped"
    if said not in ("finished", "stopped", "failed"):
        raise ValueError(f"state is {said!r}")
    return said  # type: ignore[return-value]


def _lines(storage: Storage, uri: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if it is not there."""
    try:
        return parse_lines(storage.read(uri), uri)
    except ObjectNotFound:
        return []


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no number of epochs")
    return value


def _model(settings: dict[str, Any]) -> str:
    options = {name: value for name, value in settings.items() if name.startswith("model.options.")}
    parts = [str(settings["model.factory"])]
    whole = "model.options.config."  # of a network of Hugging Face, in dozens of entries; what it is stands in one
    if kind := options.get(f"{whole}model_type"):
        parts.append(str(kind))
        options = {name: value for name, value in options.items() if not name.startswith(whole)}
    parts += [f"{name.removeprefix('model.options.')}={value}" for name, value in sorted(options.items())]
    return " ".join(parts)


def _with_progress(run: RunSummary, rows: Sequence[dict[str, Any]]) -> RunSummary:
    """With the epochs done and the best metric, by these rows of metrics.jsonl; of equal ones the newest."""
    rows = [numbers(row) for row in rows]
    run = replace(run, epochs_done=len(rows))
    name = "val_map" if any("val_map" in row for row in rows) else "val_top1"
    scored = [row for row in rows if name in row]
    losses = [row for row in rows if "loss" in row]
    if scored:
        best = max(scored, key=lambda row: (row[name], row["epoch"]))
    elif losses:
        name = "loss"
        best = min(losses, key=lambda row: (row[name], -row["epoch"]))
    else:
        return run
    return replace(run, best=name, best_value=float(best[name]), best_epoch=_count(best["epoch"]))


def _table(found: Sequence[RunSummary], prefix: str) -> str:
    """The runs as aligned columns, errors as lines below them."""
    head = ("RUN", "STATUS", "EPOCHS", "BEST", "STARTED", "MODEL")
    names = [run.uri[len(prefix.rstrip("/")) :].strip("/") or "." for run in found]
    rows = [
        (
            name,
            _status(run),
            f"{run.epochs_done}/{run.epochs}",
            _best(run),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_s)),
            shortened(run.model, _MAX_TEXT),
        )
        for name, run in zip(names, found, strict=True)
    ]
    lines = table(rows, head=head, right=(2,), fits=True)
    problems = [
        f"{name}: {shortened(run.error, _MAX_TEXT)}" for name, run in zip(names, found, strict=True) if run.error
    ]
    if problems:
        lines += ["", *map(visible, problems)]
    return "\n".join(lines)


def _best(run: RunSummary) -> str:
    if run.best_value is None:
        return ""
    name = {"val_map": "val mAP", "val_top1": "val top-1", "loss": "loss"}[run.best]
    value = f"{run.best_value:.3f}" if abs(run.best_value) < 1e6 else f"{run.best_value:.3g}"
    return f"{name} {value} (epoch {run.best_epoch})"


def _status(run: RunSummary) -> str:
    ago = f"{format_duration(run.age_s)} ago"
    return {"running": f"running (last sign {ago})", "stopped": f"stopped (last sign {ago})"}.get(run.state, run.state)


def train_spans(storage: Storage, out: str) -> list[Span]:
    """The epochs of a run: a span for training, with the seconds that rank 0 waited for decoders, and one for scoring.

    Raises:
        ChecksumMismatch: metrics.jsonl is not what train wrote.
    """
    uri = join(out, "metrics.jsonl")
    spans: list[Span] = []
    try:
        for row in _lines(storage, uri):
            spans += _epoch_spans(numbers(row))
    except (ValueError, KeyError, TypeError) as error:
        raise ChecksumMismatch(f"{uri} does not hold what kinoray wrote: {error!r}") from error
    return spans


def _epoch_spans(row: dict[str, Any]) -> list[Span]:
    name = f"epoch {row['epoch']}"
    end_s = as_seconds(row["time_s"], "time_s")
    begin_s = as_seconds(end_s - row["epoch_s"], "time_s less epoch_s")
    train_s = as_seconds(row["train_s"], "train_s")
    trained_s = begin_s + train_s
    training = Span(
        name=name,
        worker="training",
        begin_s=begin_s,
        end_s=trained_s,
        parts={"waiting for decoders": as_seconds(row["decode_wait"] * train_s, "decode_wait of train_s")},
        about=row,
    )
    if "val_videos" not in row:
        return [training]
    about = {"epoch": row["epoch"], "val_videos": row["val_videos"]}
    scoring = Span(name=f"{name}, scoring", worker="training", begin_s=trained_s, end_s=end_s, about=about)
    return [training, scoring]


def _print_time(storage: Storage, place: str) -> None:
    """Where the time of one run went."""
    spans = train_spans(storage, place)
    if not spans:
        print("no epoch is done")
        return
    epochs = [span for span in spans if span.parts]
    begin_s = spans[0].begin_s
    end_s = spans[-1].end_s
    whole_s = end_s - begin_s
    train_s = sum(span.seconds for span in epochs)
    wait_s = sum(span.parts["waiting for decoders"] for span in epochs)
    scoring_s = sum(span.seconds for span in spans if not span.parts)
    print(f"\n{many(len(epochs), 'epoch')}, {clock(begin_s)} to {clock(end_s)}, {format_duration(whole_s)}")
    for name, seconds in (
        ("waiting for decoders", wait_s),
        ("training steps", train_s - wait_s),
        ("scoring", scoring_s),
        ("between epochs", whole_s - covered_s(spans)),
    ):
        print(bar_line(name, seconds, whole_s))
    slowest = max(epochs, key=lambda span: span.seconds)
    print(f"  slowest: {slowest.name} with {format_duration(slowest.seconds)}")


# The driver's word


class Heartbeat:
    """A context around the work of a run in folder `out`; `stopped` says that it ends before its last epoch."""

    def __init__(self, storage: Storage, out: str, every_s: float = _BEAT_S) -> None:
        self._storage = storage
        self._uri = join(out, _STATUS_FILE)
        self._every_s = every_s
        hasty = replace(storage.config, retry_s=min(_HASTE_S, storage.config.retry_s))
        self._hasty_storage = replace(storage, config=hasty)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.stopped = False

    def __enter__(self) -> "Heartbeat":
        """Raises StorageError: the run folder cannot be written."""
        self._started_s = self._first_start()
        self._write(self._storage, "running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        if error is None or self.stopped:
            self._try(self._storage, "stopped" if self.stopped else "finished")
        elif isinstance(error, Exception):
            storage = self._hasty_storage if isinstance(error, StorageUnavailable) else self._storage
            self._try(storage, "failed", " ".join(f"{type(error).__name__}: {error}".split()))
        else:  # Ctrl-C and its like
            self._try(self._hasty_storage, "stopped")

    def _first_start(self) -> float:
        """When a run that is resumed was started first."""
        try:
            return as_seconds(parse_json(self._storage.read(self._uri))["started_s"], "started_s")
        except ObjectNotFound:
            return time.time()
        except (ValueError, KeyError, TypeError) as error:
            print(f"{self._uri} cannot be read ({error}) and is written anew", flush=True)
            return time.time()

    def _beat(self) -> None:
        while not self._end.wait(self._every_s):
            self._try(self._hasty_storage, "running")

    def _try(self, storage: Storage, state: State, error: str = "") -> None:
        """Write; a store that refuses must not end a training, nor hide how it ended."""
        try:
            self._write(storage, state, error)
        except StorageError as problem:
            print(f"{self._uri} does not say that the run is {state}: {problem}", flush=True)

    def _write(self, storage: Storage, state: State, error: str = "") -> None:
        content = {"state": state, "error": error, "started_s": self._started_s}
        storage.put(self._uri, (json.dumps(content) + "\n").encode())
