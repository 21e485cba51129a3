"""`kinoray tune`: plan the trials, let Ray Tune run as many at a time as the cluster holds, say which was best.

Everything that counts is in the trials' own run folders; Tune's folder, OUT/ray, holds nothing that a sweep needs.
Easy to break: a trial must end by itself when Tune stops it, since what a killed one leaves keeps its CPUs.

    sweep.json     what all starts of the sweep must share
    trials/ID/     one run folder a trial, see job.py
    trials.jsonl   one line a trial, best first; tune.json: totals; best.yaml: the best settings; tune.html: a page
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import tune as ray_tune

from kinoray.catalog.table import Catalog, load_catalog
from kinoray.cluster.connect import connect, has_autoscaler, require_fit
from kinoray.config.file import dump_yaml, parse_yaml, to_yaml
from kinoray.config.shared import CacheConfig, TrainResourcesConfig, digest
from kinoray.console import Progress, format_duration, kept_if_interrupted, many, visible
from kinoray.errors import ClusterError, ConfigError, JobError
from kinoray.storage.objects import Storage, absolute, arrow_filesystem, join
from kinoray.storage.records import parse_json, read_record, require_folder
from kinoray.train.config import TrainConfig
from kinoray.train.job import open_desk
from kinoray.train.runfolder import run_settings
from kinoray.train.verb import check_training, with_start
from kinoray.tune.config import Axis, Settings, TuneConfig, apply, grid_trials, parse_space, train_config, trial_id
from kinoray.tune.job import (
    METRIC,
    TrialContext,
    TrialRun,
    drop_cache,
    make_scheduler,
    optuna_searcher,
    planned_trials,
    require_optuna,
    shared_cache,
    trials_at_once,
)
from kinoray.tune.results import (
    REPEATED,
    TrialRow,
    best_row,
    known_trials,
    print_table,
    ranked,
    read_outcome,
    read_trial,
    require_own_trials,
    tune_page,
    write_outcome,
    write_table,
)

__all__ = ["tune"]

_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV and TensorBoard files of Tune's own beside our run folders
    "RAY_AIR_NEW_OUTPUT": "0",  # tables of its own on stdout, which verbose=0 does not turn off
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends every job; it can go on
}
_MAX_CHECKS = 64  # networks that are built before Ray starts, to find options that they refuse


def tune(config: TuneConfig, given: Sequence[Settings] = ()) -> dict[str, Any]:
    """Run the sweep to its end, or go on with the one in config.out; returns what tune.json holds.

    Args:
        given: the settings of each trial, in place of config.space and search: a study, whose trials are no grid. Later
            calls may bring more trials.

    Raises:
        ConfigError: the space names no setting, or values that it refuses; or config.out holds what is not this
            sweep's, or cannot be written.
        CatalogError: as for train.
        ClusterError: not even one trial fits the cluster.
        JobError: no trial has a score.
        StorageError: out cannot be read or written.
    """
    start_s = time.monotonic()
    storage = Storage(config.storage)
    require_folder(storage, "out", config.out, "tune")
    config = replace(config, catalog=absolute(config.catalog), out=absolute(config.out).rstrip("/"))
    if config.init_from:
        config = with_start(config, "tune")
    base = train_config(config)
    axes = _axes_of(given) if given else parse_space(config.space)
    if config.search == "optuna":
        require_optuna()
    catalog = load_catalog(storage, config.catalog)
    trials = {trial_id(settings): settings for settings in given} or planned_trials(config, axes)
    tried = [*([] if given else _corners(axes)), *trials.values()]
    _check_trials(base, tried, catalog)
    if base.cache.gb:
        base = shared_cache(base, trials.values() or _combinations(axes))
    _claim_sweep(storage, config, catalog, is_study=bool(given))
    if not given:
        require_own_trials(storage, config.out, axes)
    known = trials or known_trials(storage, config.out)
    status = {name: _ended(storage, config.out, name) for name in known}
    num_trials = len(trials) or config.num_trials
    search = "given" if given else config.search
    num_before = sum(map(bool, status.values()))
    print(
        f"tune: {many(num_trials, 'trial')} (search {search}, none stopped before epoch {config.grace}), "
        f"{num_before} have ended already; to {config.out}",
        flush=True,
    )
    if len(status) < num_trials or not all(status.values()):
        with kept_if_interrupted(lambda: _kept(storage, config, trials)):
            _run_trials(storage, config, base, axes, trials, status)
        if base.cache.gb:
            drop_cache(base)
    known = trials or known_trials(storage, config.out)
    rows = [read_trial(storage, config.out, name, settings) for name, settings in known.items()]
    return _finish(storage, config, axes, rows, num_before, time.monotonic() - start_s)


def _axes_of(given: Sequence[Settings]) -> tuple[Axis, ...]:
    """Every setting that any trial names, with the values that it takes."""
    values: dict[str, dict[str, Any]] = {}
    for settings in given:
        for path, value in settings.items():
            values.setdefault(path, {})[repr(value)] = value
    return tuple(Axis(path, tuple(values[path].values())) for path in sorted(values))


def _corners(axes: Sequence[Axis]) -> list[Settings]:
    """The first and the last value of every axis."""
    return [
        {axis.path: axis.values[end] if axis.values else axis.clip((axis.low, axis.high)[end]) for axis in axes}
        for end in (0, -1)
    ]


def _combinations(axes: Sequence[Axis]) -> list[Settings]:
    """What Optuna may choose, as far as it can be listed: every combination of lists, with one value of each range."""
    return grid_trials([replace(axis, values=axis.values or (axis.at(0.0),)) for axis in axes])


def _check_trials(base: TrainConfig, tried: Sequence[Settings], catalog: Catalog) -> None:
    """Refuse what some trial would fail of, before anything starts."""
    if catalog.is_multilabel:
        raise ConfigError(
            f"{base.catalog}: its videos may have several classes, and trials are compared by top-1, which says little "
            "of such; train it with each of the settings"
        )
    checked: set[str] = set()
    for settings in tried:
        config = apply(base, settings)
        key = digest([to_yaml(config.model), to_yaml(config.clip), config.split, config.val_split])
        if key not in checked and len(checked) < _MAX_CHECKS:
            checked.add(key)
            check_training(config, catalog)


def _claim_sweep(storage: Storage, config: TuneConfig, catalog: Catalog, *, is_study: bool) -> None:
    """Make config.out this sweep's folder, or check that it is; only the number of trials may grow."""
    ours = run_settings(config, catalog)
    for name in ("space", "search", "grace"):
        ours[name] = getattr(config, name)
    if is_study:
        ours["space"] = ours["search"] = "given"
    uri = join(config.out, "sweep.json")
    text = json.dumps(ours, indent=1, sort_keys=True)
    if storage.put_if_absent(uri, text.encode()):
        return
    theirs = read_record(storage, uri, dict)
    ours = parse_json(text)  # tuples are lists there
    if theirs == ours:
        return
    names = [name for name in sorted(set(theirs) | set(ours)) if theirs.get(name) != ours.get(name)]
    changes = [f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names[:4]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise ConfigError(
        f"out {config.out} holds a sweep with other settings: {'; '.join(changes)}{more}; go on with the same "
        "settings, or give another --out"
    )


def _ended(storage: Storage, out: str, name: str) -> str:
    """finished, stopped or failed; "" for a trial that has to be run (on)."""
    outcome = read_outcome(storage, out, name)
    return "" if outcome["error_class"] in REPEATED else outcome["status"]


class _Watch(ray_tune.Callback):  # type: ignore[misc]
    """Writes down how trials end, and says what happens."""

    def __init__(self, storage: Storage, base: TrainConfig, ended: set[str], progress: Progress) -> None:
        self._storage = storage
        self._base = base
        self._ended = ended
        self._progress: Progress | None = progress
        self._best = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """For the snapshots that Tune makes, which nobody reads."""
        return {**self.__dict__, "_progress": None}

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        if self._progress:
            self._progress.tick()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._best = max(self._best, result[METRIC])
        if result.get("replayed"):
            return
        done = sum(other.is_finished() for other in trials)
        print(
            f"tune: trial {trial} epoch {result['epoch']}: val top-1 {result[METRIC]:.3f} (best {self._best:.3f}); "
            f"{done} of {len(trials)} trials have ended",
            flush=True,
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        epochs = apply(self._base, dict(trial.config["choice"]["settings"])).optim.epochs
        status = "failed" if "error_class" in result else "finished" if result["epoch"] >= epochs else "stopped"
        self._end(str(trial), status, result.get("error_class", ""), result.get("error_text", ""))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error()
        reason = " ".join(str(error).split()) or "its process died"
        self._end(str(trial), "failed", "JobError", reason[-300:])

    def _end(self, name: str, status: str, error_class: str, error_text: str) -> None:
        if name in self._ended:
            return
        outcome = {"status": status, "error_class": error_class, "error_text": error_text}
        write_outcome(self._storage, self._base.out, name, outcome)
        if self._progress:
            self._progress.update()
        print(f"tune: trial {name} {status}{': ' if error_text else ''}{visible(error_text)}", flush=True)


def _room(resources: TrainResourcesConfig) -> int:
    """How many trials the cluster holds; where it has shrunk to nothing, nodes for one are brought up first."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        return trials_at_once(nodes, resources)
    except ClusterError:
        if not has_autoscaler():
            raise
        require_fit(resources, decode_cpus=resources.decode_tasks)
        return trials_at_once([node["Resources"] for node in ray.nodes() if node["Alive"]], resources)


def _run_trials(
    storage: Storage,
    config: TuneConfig,
    base: TrainConfig,
    axes: Sequence[Axis],
    trials: Mapping[str, Settings],
    status: Mapping[str, str],
) -> None:
    """Run what has not ended, under Ray Tune."""
    os.environ.update(_TUNE_ENV)
    connect(config.resources)
    num_trials = len(trials) or config.num_trials
    at_once = min(_room(config.resources), num_trials)
    print(f"tune: {many(at_once, 'trial')} at a time; each is heard of after its first epoch", flush=True)
    progress = Progress(num_trials, "tune", "trials", already=sum(map(bool, status.values())), is_for_eyes=True)
    desk = open_desk()
    context = TrialContext(base=base, desk=desk)
    ended = {name for name, how in status.items() if how}
    epochs = _most_epochs(base, trials)
    if trials:
        choices = _choices(trials, status, is_judged=config.grace < epochs)
        space = {"choice": ray_tune.grid_search(choices)}
        search = {}
    else:
        space = {}
        search = _optuna(storage, config, axes, status)
    filesystem, path = arrow_filesystem(config.storage, join(config.out, "ray"))
    tuner = ray_tune.Tuner(
        # A driver waits for its workers and takes no CPU; Tune refuses a claim of nothing: one byte of memory.
        ray_tune.with_resources(ray_tune.with_parameters(TrialRun, context=context), {"memory": 1}),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            scheduler=make_scheduler(config, epochs),
            max_concurrent_trials=at_once,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
            **search,
        ),
        run_config=ray_tune.RunConfig(
            name=f"{time.time_ns()}",  # never Tune's own snapshot: it may lag behind the run folders
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[_Watch(storage, base, ended, progress)],
            failure_config=ray_tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        ray.kill(desk)


def _kept(storage: Storage, config: TuneConfig, trials: Mapping[str, Settings]) -> str:
    ended = sum(bool(_ended(storage, config.out, name)) for name in trials or known_trials(storage, config.out))
    num_trials = many(len(trials) or config.num_trials, "trial")
    return f"{ended} of {num_trials} have ended and stay; the same command goes on with the others' checkpoints"


def _trial_name(trial: Any) -> str:
    return str(trial.config["choice"]["trial"])


def _most_epochs(base: TrainConfig, trials: Mapping[str, Settings]) -> int:
    return max(apply(base, settings).optim.epochs for settings in [{}, *trials.values()])


def _choices(trials: Mapping[str, Settings], status: Mapping[str, str], *, is_judged: bool) -> list[dict[str, Any]]:
    """What Tune is to run. ASHA compares with trials that have ended: those are shown to it once more."""
    choices = []
    for name, settings in sorted(trials.items(), key=lambda item: not status.get(item[0])):  # stable: ended ones first
        ended = bool(status.get(name))
        if status.get(name) == "failed" or (ended and not is_judged):
            continue
        choices.append({"trial": name, "settings": settings, "ended": ended})
    return choices


def _optuna(storage: Storage, config: TuneConfig, axes: Sequence[Axis], status: Mapping[str, str]) -> dict[str, Any]:
    """The searcher, told what is known, and how many trials it is asked for."""
    ended: dict[str, tuple[Settings, float | None]] = {}
    open_trials = []
    for name, settings in known_trials(storage, config.out).items():
        if status.get(name):
            ended[name] = settings, read_trial(storage, config.out, name, settings).best_val_top1
        else:
            open_trials.append(settings)
    searcher = optuna_searcher(config, axes, ended, open_trials)
    return {"search_alg": searcher, "num_samples": config.num_trials - len(ended)}


def _finish(
    storage: Storage, config: TuneConfig, axes: Sequence[Axis], rows: list[TrialRow], num_before: int, took_s: float
) -> dict[str, Any]:
    """Write the tables, the best settings and the page; of the trials, num_before had ended when this command began."""
    rows = ranked(rows)
    write_table(storage, config.out, rows)
    best = best_row(rows, config.out)
    base = train_config(config)
    status: dict[str, int] = {}
    for row in rows:
        status[row.status] = status.get(row.status, 0) + 1
    summary: dict[str, Any] = {
        "out": config.out,
        "catalog": config.catalog,
        "search": config.search,
        "grace_epochs": config.grace,
        "trials": len(rows),
        "status": status,
        "best": {"trial": best.trial, "settings": best.settings, "val_top1": best.best_val_top1, "run": best.run},
        "decode_cpu_s": round(sum(row.decode_cpu_s for row in rows), 2),
        "took_s": round(took_s, 1),
    }
    storage.put(join(config.out, "best.yaml"), _best_yaml(base, best).encode())
    storage.put(join(config.out, "tune.html"), tune_page(summary, axes, rows).encode())
    storage.put(join(config.out, "tune.json"), json.dumps(summary, indent=1).encode() + b"\n")
    print_table(rows)
    settings = ", ".join(f"{path}={value}" for path, value in best.settings.items())
    how_many = ", ".join(f"{number} {how}" for how, number in status.items())
    now = f", {len(rows) - num_before:,} of them now" if num_before else ""
    took = f"{now} in {format_duration(took_s)}" if num_before < len(rows) else ""
    print(
        f"tune: {many(len(rows), 'trial')} ({how_many}){took}; "
        f"best is {best.trial} ({settings}), val top-1 {best.best_val_top1:.3f}; "
        f"{join(config.out, 'best.yaml')}, {join(config.out, 'tune.html')}",
        flush=True,
    )
    unsettled = [row.trial for row in rows if row.status in ("unfinished", "waiting")]
    if unsettled:
        raise JobError(f"of {config.out} {many(len(unsettled), 'trial')} not ended yet; the same command goes on")
    return summary


def _best_yaml(base: TrainConfig, best: TrialRow) -> str:
    """The best trial's settings as `kinoray train --config` takes them: all but --out."""
    tree = parse_yaml(to_yaml(apply(replace(base, cache=CacheConfig()), best.settings)), "settings")
    del tree["out"]
    found = f"trial {best.trial}, epoch {best.best_epoch}, val top-1 {best.best_val_top1}"
    head = f"# Best of the sweep {base.out!r}: {found}.\n"
    return head + dump_yaml(tree)
