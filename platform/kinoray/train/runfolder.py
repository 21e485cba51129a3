"""What a training run leaves in its folder besides checkpoints: what it is, its metrics, what it could not read.

Every file is written whole, by the driver or by rank 0, so the same code serves a folder and s3://. Epochs that are
trained again after a failure replace what the first try wrote.

    run.json           the settings that decide the result, and the catalog's digest; a run resumes only with the same
    config.yaml        all settings, as --config reads them
    environment.json   for each start of the workers: versions, commit, hosts
    status.json        what the driver last said about the run; see kinoray.train.runs
    metrics.jsonl      one JSON object an epoch
    losses/            one file of JSON lines an epoch, one object a step
    tensorboard/       one event file an epoch
    learning_curves.svg
    quarantine.parquet videos that could not be read
    checkpoints/       see kinoray.network.checkpoint
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from kinoray.catalog.quarantine import Refusal, load_quarantine, save_quarantine
from kinoray.catalog.table import Catalog
from kinoray.config.file import to_yaml
from kinoray.config.shared import digest
from kinoray.errors import ConfigError, ObjectNotFound, StorageError
from kinoray.network.checkpoint import META_FILE, best_of, delete_checkpoint, list_checkpoints
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json, parse_lines
from kinoray.train.config import TrainConfig

__all__ = [
    "add_refusals",
    "add_start",
    "checkpoint_uri",
    "claim_run",
    "prune_checkpoints",
    "read_losses",
    "read_metrics",
    "run_digest",
    "run_settings",
    "stopped_early",
    "write_losses",
    "write_metrics",
]

_TRAIN = ("loss", "top1", "top5", "lr")
_OURS = re.compile(r"epoch-\d+-step-\d+")


def run_settings(config: TrainConfig, catalog: Catalog) -> dict[str, Any]:
    """The settings that a resumed run must share, flat: `optim.lr` and so on.

    Resources, storage, limits and what is kept may differ. optim.epochs may not: the learning rate's course depends
    on it, so more epochs are another training and need another run folder.
    """
    tree = asdict(config)
    flat = {name: tree[name] for name in ("split", "val_split", "init_from")}
    for name in ("model", "clip", "augment", "optim"):
        flat |= _flatten(tree[name], f"{name}.")
    flat["catalog.digest"] = catalog.digest
    settings: dict[str, Any] = parse_json(json.dumps(flat))  # tuples become lists, as they come back from run.json
    return settings


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def run_digest(config: TrainConfig, catalog: Catalog) -> str:
    """16 hex digits of run_settings."""
    return digest(run_settings(config, catalog))


def claim_run(storage: Storage, config: TrainConfig, catalog: Catalog) -> None:
    """Make config.out this run's folder, or check that it is already.

    Raises:
        ConfigError: the folder holds a run with other settings; the message names them.
        StorageError: run.json cannot be read or written.
    """
    uri = join(config.out, "run.json")
    ours = run_settings(config, catalog)
    text = json.dumps({"digest": digest(ours), "settings": ours}, indent=1, sort_keys=True)
    if storage.put_if_absent(uri, text.encode()):
        storage.put(join(config.out, "config.yaml"), to_yaml(config).encode())
        return
    try:
        theirs = dict(parse_json(storage.read(uri, max_bytes=MAX_RECORD_BYTES))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri} is damaged ({error}); give another --out") from error
    missing = object()
    differences = [
        f"{name} is {_shown(theirs.get(name, missing), missing)} there, {_shown(ours.get(name, missing), missing)} here"
        for name in sorted(set(theirs) | set(ours))
        if theirs.get(name, missing) != ours.get(name, missing)
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ConfigError(
            f"out {config.out} holds a run with other settings: {'; '.join(differences[:4])}{more}; "
            "resume it with the same settings, or give another --out"
        )


def _shown(value: object, missing: object) -> str:
    return "not set" if value is missing else json.dumps(value)


def checkpoint_uri(out: str, epoch: int, step: int) -> str:
    """Where the checkpoint after `epoch` whole epochs and `step` steps goes."""
    return join(out, "checkpoints", f"epoch-{epoch:04d}-step-{step:06d}")


def read_metrics(storage: Storage, out: str) -> list[dict[str, Any]]:
    """The epochs of metrics.jsonl, in order; none if there is no such file."""
    try:
        data = storage.read(join(out, "metrics.jsonl"), max_bytes=MAX_RECORD_BYTES)
    except ObjectNotFound:
        return []
    return parse_lines(data, join(out, "metrics.jsonl"))


def add_start(storage: Storage, out: str, start: Mapping[str, Any]) -> None:
    """Append a start of the workers to environment.json."""
    uri = join(out, "environment.json")
    try:
        starts = list(parse_json(storage.read(uri, max_bytes=MAX_RECORD_BYTES))["starts"])
    except ObjectNotFound:
        starts = []
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri} is damaged ({error}); delete it, and the same command goes on") from error
    storage.put(uri, (json.dumps({"starts": [*starts, start]}, indent=1) + "\n").encode())


def read_losses(storage: Storage, out: str) -> list[dict[str, Any]]:
    """The training steps of the run, in order: epoch, step (from 1), videos, unreadable, lr, loss (mean of the batch).

    Equal losses are equal bits: JSON keeps all of a float64.
    """
    uris = sorted(info.uri for info in storage.list(join(out, "losses") + "/"))
    return [row for uri in uris for row in parse_lines(storage.read(uri, max_bytes=MAX_RECORD_BYTES), uri)]


def write_losses(storage: Storage, out: str, epoch: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the steps of an epoch so far; they replace those of a try that failed."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    storage.put(join(out, "losses", f"epoch-{epoch:06d}.jsonl"), text.encode())


def write_metrics(storage: Storage, out: str, row: Mapping[str, Any], losses: Sequence[Mapping[str, Any]] = ()) -> None:
    """Append the row of an epoch to metrics.jsonl; its event file in tensorboard/ has the losses of its steps, too.

    Rows of this and later epochs, from a try that failed after them, are dropped.
    """
    rows = [earlier for earlier in read_metrics(storage, out) if earlier["epoch"] < row["epoch"]]
    lines = [json.dumps(item) for item in [*rows, row]]
    storage.put(join(out, "metrics.jsonl"), ("\n".join(lines) + "\n").encode())
    # One file an epoch, named by it: TensorBoard reads the files of a folder in order of their names, and the same
    # epoch trained again overwrites its own.
    name = f"events.out.tfevents.{row['epoch']:010d}.kinoray"
    storage.put(join(out, "tensorboard", name), _event_file(row, losses))


def _event_file(row: Mapping[str, Any], losses: Sequence[Mapping[str, Any]]) -> bytes:
    """The numbers of a row as TensorBoard scalars: val_* in val/, loss and accuracy in train/, others in run/.

    Those are by epoch; loss and rate of the steps are by step, in step/.
    """
    with scratch_folder("events") as folder:
        with SummaryWriter(folder) as writer:
            for name, number in row.items():
                if name in ("epoch", "time_s") or not isinstance(number, int | float):
                    continue
                group, tag = (
                    ("val", name[4:]) if name.startswith("val_") else ("train" if name in _TRAIN else "run", name)
                )
                writer.add_scalar(f"{group}/{tag}", number, global_step=row["epoch"], walltime=row["time_s"])
            for step in losses:
                for name in step.keys() & {"loss", "lr"}:
                    writer.add_scalar(f"step/{name}", step[name], global_step=step["step"], walltime=row["time_s"])
        (written,) = Path(folder).iterdir()
        return written.read_bytes()


def add_refusals(storage: Storage, out: str, refusals: Sequence[Refusal]) -> None:
    """Add videos that could not be read to the run's quarantine table, each once (the first reason stays)."""
    if not refusals:
        return
    uri = join(out, "quarantine.parquet")
    known = load_quarantine(storage, uri) if storage.exists(uri) else []
    seen = {refusal.video_id for refusal in known}
    first = {refusal.video_id: refusal for refusal in reversed(refusals) if refusal.video_id not in seen}
    if first:
        save_quarantine(storage, uri, [*known, *(first[video_id] for video_id in sorted(first))])


def stopped_early(metrics: Sequence[Mapping[str, Any]], config: TrainConfig) -> bool:
    """Whether the last config.patience scorings in these rows of metrics.jsonl brought no higher val_top1."""
    scores = [row["val_top1"] for row in metrics if "val_top1" in row]
    return bool(config.patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= config.patience


def prune_checkpoints(
    storage: Storage, out: str, keep: int, keep_best: int = 1, *, written: tuple[int, int] | None = None
) -> None:
    """Delete all checkpoints but the newest, the newest `keep` of those after epochs, and the `keep_best` best ones.

    With them goes what writers that were killed have left: files in a folder of ours without checkpoint.json. So this
    must not run while a checkpoint is being written. Those that cannot be read stay: what they hold may be wanted.

    Args:
        written: (epoch, step) of the newest that the run has. Later ones are those that it could not go on from: they
            stay until they are written anew, and take no place from the others.
    """
    last = written or (sys.maxsize, sys.maxsize)
    found = [item for item in list_checkpoints(storage, out) if (item[1].epoch, item[1].step) <= last]
    if not found:
        return
    after_epochs = [item for item in found if not item[1].epoch_steps]
    kept = {found[-1][0], best_of(found)[0]} | {uri for uri, _ in after_epochs[-keep:]}
    scored = [item for item in after_epochs if "val_top1" in item[1].metrics]
    for _ in range(min(keep_best, len(scored))):
        kept.add(best_of(scored)[0])
        scored.remove(best_of(scored))
    there = {info.uri for info in storage.list(join(out, "checkpoints") + "/")}
    folders = {uri.rpartition("/")[0] for uri in there}
    unfinished = {
        uri for uri in folders if _OURS.fullmatch(uri.rpartition("/")[2]) and join(uri, META_FILE) not in there
    }
    for uri in sorted(unfinished | {uri for uri, _ in found if uri not in kept}):
        delete_checkpoint(storage, uri)
