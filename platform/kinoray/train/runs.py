"""`kinoray runs`: which training runs lie under a folder or s3:// prefix, and how they stand; from storage alone.

A run is a folder with a run.json. Its driver writes status.json every BEAT_S seconds; the store's own time of that file
is the run's last sign of life, so that nobody's clock needs to agree with another's but the reader's with the store's.

Easy to break: a driver that was killed says "running" for ever; how old that word is decides whether it is believed.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kinoray.console import format_duration, many, shortened, table, visible
from kinoray.errors import ChecksumMismatch, KinorayError, ObjectNotFound
from kinoray.label.spans import Span, bar_line, clock, covered_s
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_lines, read_record
from kinoray.train.config import RunsConfig

__all__ = ["BEAT_S", "STATUS_FILE", "RunSummary", "State", "find_runs", "runs", "train_spans"]

BEAT_S = 30.0
STATUS_FILE = "status.json"
_SILENT_S = 4 * BEAT_S  # a store that fails for a minute is no dead driver
_READERS = 16  # requests at a time
_MAX_CELL = 44
_MAX_MOMENT_S = 2**35  # a thousand years after 1970

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
    """The best metric: val_top1, or loss where nothing is scored; empty before the first epoch."""
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
        StorageError: the prefix cannot be listed.
    """
    prefix = absolute(config.prefix)
    storage = Storage(config.storage)
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
    folders = [uri.removesuffix("/run.json") for uri in files if uri.endswith("/run.json")]
    now_s = time.time()
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda uri: _summary(storage, uri, files, now_s), folders))
    return sorted(found, key=lambda run: (run.started_s, run.uri))


def _summary(storage: Storage, uri: str, files: dict[str, float], now_s: float) -> RunSummary:
    """One run; what of it cannot be read makes it `damaged`, with the reason, and hides no other run."""
    made_s = files[join(uri, "run.json")]
    seen_s = max(files.get(join(uri, name), made_s) for name in (STATUS_FILE, "metrics.jsonl", "run.json"))
    values: dict[str, Any] = {"uri": uri, "age_s": max(0.0, now_s - seen_s), "error": ""}
    values |= {"epochs_done": 0, "epochs": 0, "model": "?", "started_s": made_s}
    values |= {"best": "", "best_value": None, "best_epoch": None}
    try:
        settings = read_record(storage, join(uri, "run.json"), dict)["settings"]
        values |= {"epochs": int(settings["optim.epochs"]), "model": _model(settings)}
        values |= _progress(_lines(storage, join(uri, "metrics.jsonl")))
        status = _lines(storage, join(uri, STATUS_FILE))
        if status:
            values |= {"started_s": _moment(status[0]["started_s"]), "error": str(status[0]["error"])}
        state = _state(status[0]["state"] if status else "running", values)
    except KinorayError as error:
        state, values["error"] = "damaged", str(error)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        state, values["error"] = "damaged", f"{uri}: run.json, status.json or metrics.jsonl is not ours: {error!r}"
    return RunSummary(state=state, **values)


def _state(said: str, values: dict[str, Any]) -> State:
    """What the driver said last, if it may still be so."""
    if said == "running":
        if values["age_s"] <= _SILENT_S:
            return "running"
        return "finished" if values["epochs_done"] == values["epochs"] else "stopped"
    if said not in ("finished", "stopped", "failed"):
        raise ValueError(f"state is {said!r}")
    return said  # type: ignore[return-value]


def _lines(storage: Storage, uri: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if it is not there."""
    try:
        return parse_lines(storage.read(uri, max_bytes=MAX_RECORD_BYTES), uri)
    except ObjectNotFound:
        return []


def _moment(value: Any) -> float:
    """A time that a calendar has."""
    if not 0 <= float(value) < _MAX_MOMENT_S:
        raise ValueError(f"started_s is {value!r:.40}")
    return float(value)


def _model(settings: dict[str, Any]) -> str:
    options = {name: value for name, value in settings.items() if name.startswith("model.options.")}
    parts = [str(settings["model.factory"])]
    parts += [f"{name.removeprefix('model.options.')}={value}" for name, value in sorted(options.items())]
    return " ".join(parts)


def _progress(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """epochs_done and the best metric of the rows of metrics.jsonl; of equal ones the newest."""
    scored = [row for row in rows if "val_top1" in row]
    known = scored or [row for row in rows if "loss" in row]
    if not known:
        return {"epochs_done": len(rows)}
    if scored:
        name, best = "val_top1", max(known, key=lambda row: (row["val_top1"], row["epoch"]))
    else:
        name, best = "loss", min(known, key=lambda row: (row["loss"], -row["epoch"]))
    return {"epochs_done": len(rows), "best": name, "best_value": float(best[name]), "best_epoch": int(best["epoch"])}


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
            shortened(visible(run.model), _MAX_CELL),
        )
        for name, run in zip(names, found, strict=True)
    ]
    lines = table(rows, head=head, right=(2,))
    problems = [f"{name}: {run.error}" for name, run in zip(names, found, strict=True) if run.error]
    if problems:
        lines += ["", *map(visible, problems)]
    return "\n".join(lines)


def _best(run: RunSummary) -> str:
    if run.best_value is None:
        return ""
    name = {"val_top1": "val top-1", "loss": "loss"}[run.best]
    return f"{name} {run.best_value:.3f} (epoch {run.best_epoch})"


def _status(run: RunSummary) -> str:
    ago = f"{format_duration(run.age_s)} ago"
    return {"running": f"running (last sign {ago})", "stopped": f"stopped (last sign {ago})"}.get(run.state, run.state)


def train_spans(storage: Storage, out: str) -> list[Span]:
    """The epochs of a run: a span for training, with the seconds that rank 0 waited for decoders, and one for scoring.

    Raises:
        ChecksumMismatch: metrics.jsonl is not what train wrote.
    """
    uri = join(out, "metrics.jsonl")
    spans = []
    try:
        rows = parse_lines(storage.read(uri, max_bytes=MAX_RECORD_BYTES), uri)
    except ObjectNotFound:
        return []  # no epoch is done
    try:
        for row in rows:
            begin_s, train_s = row["time_s"] - row["epoch_s"], row.get("train_s", row["epoch_s"])
            parts = {"waiting for decoders": row["decode_wait"] * train_s}
            about = {"epoch": row["epoch"]}
            at_s = begin_s + train_s
            name = f"epoch {row['epoch']}"
            spans.append(
                Span(name=name, worker="training", begin_s=begin_s, end_s=at_s, parts=parts, about={**about, **row})
            )
            if "val_videos" in row:
                about["val_videos"] = row["val_videos"]
                spans.append(
                    Span(name=f"{name}, scoring", worker="training", begin_s=at_s, end_s=row["time_s"], about=about)
                )
    except (ValueError, KeyError, TypeError) as error:
        raise ChecksumMismatch(f"{uri} does not hold what kinoray wrote: {error!r}") from error
    return spans


def _print_time(storage: Storage, place: str) -> None:
    """Where the time of one run went."""
    spans = train_spans(storage, place)
    if not spans:
        print("no epoch is done yet")
        return
    epochs = [span for span in spans if span.parts]
    scoring_s = sum(span.seconds for span in spans if not span.parts)
    begin_s, end_s = spans[0].begin_s, spans[-1].end_s
    whole_s, train_s = end_s - begin_s, sum(span.seconds for span in epochs)
    wait_s = sum(span.parts["waiting for decoders"] for span in epochs)
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
