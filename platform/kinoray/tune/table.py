"""What came of a sweep, read from the trials' own run folders: Ray Tune's snapshots may lag behind them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kinoray.console import table
from kinoray.errors import JobError, ObjectNotFound
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record
from kinoray.train.runfolder import RunFolder
from kinoray.tune.page import TrialRow
from kinoray.tune.space import Axis, Settings, require_of_space
from kinoray.tune.trial import trial_run

__all__ = [
    "REPEATED",
    "best_row",
    "known_trials",
    "print_table",
    "ranked",
    "read_outcome",
    "read_trial",
    "require_own_trials",
    "write_outcome",
    "write_table",
]

REPEATED = ("JobError", "ClusterError", "StorageError", "StorageUnavailable", "AccessDenied", "ObjectNotFound")
"""Failures that are not the settings' fault: such a trial is tried again when the sweep goes on."""


def write_outcome(storage: Storage, out: str, name: str, outcome: dict[str, str]) -> None:
    """Say how a trial ended: status (finished, stopped or failed), error_class and error_text."""
    storage.put(join(trial_run(out, name), "outcome.json"), json.dumps(outcome).encode())


def read_outcome(storage: Storage, out: str, name: str) -> dict[str, str]:
    """What write_outcome wrote; status "" for a trial that has not ended, or is to be tried again."""
    try:
        return read_record(storage, join(trial_run(out, name), "outcome.json"), _to_outcome)
    except ObjectNotFound:
        return {"status": "", "error_class": "", "error_text": ""}


def _to_outcome(record: dict[str, Any]) -> dict[str, str]:
    return {name: str(record[name]) for name in ("status", "error_class", "error_text")}


def known_trials(storage: Storage, out: str) -> dict[str, Settings]:
    """Trials that have a folder under OUT/trials, with the settings that they began with."""
    prefix = join(out, "trials") + "/"
    found = {}
    for info in storage.list(prefix):
        name, _, rest = info.uri.removeprefix(prefix).partition("/")
        if rest == "trial.json":
            found[name] = read_record(storage, info.uri, lambda record: dict(record["settings"]))
    return found


def require_own_trials(storage: Storage, out: str, axes: Sequence[Axis]) -> None:
    """Refuse a sweep's folder with a trial.json that this sweep cannot have written.

    Raises:
        ConfigError: it holds a setting or a value that is not in the space.
    """
    for info in storage.list(join(out, "trials") + "/"):
        if info.uri.endswith("/trial.json"):
            settings = read_record(storage, info.uri, lambda record: record["settings"])
            require_of_space(axes, settings, info.uri)


def read_trial(storage: Storage, out: str, name: str, settings: Settings) -> TrialRow:
    """One row of the table."""
    outcome = read_outcome(storage, out, name)
    run = trial_run(out, name)
    epochs = RunFolder(storage, run).epochs()
    curve = [(row.epoch, row.val_top1) for row in epochs if row.val_top1 is not None]
    best = max(curve, key=lambda point: (point[1], -point[0])) if curve else None
    return TrialRow(
        trial=name,
        settings=settings,
        status=outcome["status"] or ("unfinished" if curve else "waiting"),
        best_val_top1=best[1] if best else None,
        best_epoch=best[0] if best else None,
        epochs=curve[-1][0] if curve else 0,
        run=run,
        decode_cpu_s=round(sum(row.decode_cpu_s for row in epochs), 2),
        error=": ".join(part for part in (outcome["error_class"], outcome["error_text"]) if part),
        curve=tuple(curve),
    )


def write_table(storage: Storage, out: str, rows: Iterable[TrialRow]) -> None:
    """trials.jsonl, best first."""
    lines = (json.dumps(asdict(row)) for row in rows)
    storage.put(join(out, "trials.jsonl"), ("\n".join(lines) + "\n").encode())


def print_table(rows: Sequence[TrialRow]) -> None:
    """The table for people."""
    paths = sorted({path for row in rows for path in row.settings})
    head = ["trial", *paths, "best val top-1", "epoch", "epochs", "status"]
    cells = [
        (
            row.trial,
            *(_text(row.settings.get(path, "")) for path in paths),
            "-" if row.best_val_top1 is None else f"{row.best_val_top1:.4f}",
            "-" if row.best_epoch is None else str(row.best_epoch),
            str(row.epochs),
            row.status,
        )
        for row in rows
    ]
    numbers = [place for place, path in enumerate(paths, 1) if all(_is_number(row.settings.get(path)) for row in rows)]
    for line in table(cells, head=head, right=[*numbers, *range(len(paths) + 1, len(paths) + 4)]):
        print(line)
    for row in rows:
        if row.error:
            print(f"trial {row.trial}: {row.error}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ranked(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Best first; trials that failed come last, whatever they reached before: their settings do not work."""

    def key(row: TrialRow) -> tuple[bool, float, str]:
        return row.status == "failed", -(row.best_val_top1 if row.best_val_top1 is not None else -1.0), row.trial

    return sorted(rows, key=key)


def best_row(rows: Sequence[TrialRow], out: str) -> TrialRow:
    """The best of ranked trials. Raises JobError if none has a score and has not failed."""
    scored = [row for row in rows if row.best_val_top1 is not None and row.status != "failed"]
    if not scored:
        reasons = "; ".join(f"trial {row.trial}: {row.error}" for row in rows if row.error) or "none has ended an epoch"
        raise JobError(f"no trial of {out} has a score: {reasons}")
    return scored[0]
