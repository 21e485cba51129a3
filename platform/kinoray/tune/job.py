"""A sweep's part on Ray: one trial as Ray Tune drives it, what Tune is given and stops, and how many trials fit.

A trial is `kinoray train` on a run folder of its own, with a cache of frames that all trials share.

Tune sees an epoch a step. The run waits after each epoch until Tune has decided, so a trial that is stopped ends where
it was judged and leaves a whole checkpoint. Nothing of Tune's own is needed to go on: a trial that is started again
shows the epochs in its metrics.jsonl once more and trains on from its newest checkpoint.

    OUT/trials/ID/trial.json       its settings
    OUT/trials/ID/outcome.json     how it ended, once it has

What is easy to break: Ray starts as many trials as it has room for their drivers, and their drivers need next to
nothing. Without `trials_at_once`, all CPUs could be given to workers whose decoders then wait for ever.
"""

import json
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kinoray.config.shared import TrainResourcesConfig, digest
from kinoray.console import many
from kinoray.errors import ClusterError, ConfigError, KinorayError
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.job import Gate
from kinoray.train.runfolder import EpochRow, RunFolder
from kinoray.train.verb import train
from kinoray.tune.config import Axis, Settings, TuneConfig, apply, draw_trials, grid_trials
from kinoray.tune.config import trial_id as settings_id
from kinoray.video.cache import cache_folder, grid_name

__all__ = [
    "METRIC",
    "TrialContext",
    "TrialRun",
    "drop_cache",
    "make_scheduler",
    "optuna_searcher",
    "planned_trials",
    "require_optuna",
    "shared_cache",
    "trial_run",
    "trials_at_once",
]

METRIC = "val_top1"
"""What trials are compared by: the accuracy on val_split after an epoch; higher is better."""


@dataclass(frozen=True, slots=True)
class TrialContext:
    """What all trials of a sweep share."""

    base: TrainConfig
    """Settings that are not searched; out is the sweep's."""
    desk: Any
    """The sweep's Desk."""


def trial_run(out: str, name: str) -> str:
    """Run folder of a trial."""
    return join(out, "trials", name)


class TrialRun(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """What Tune calls; `config["choice"]` holds trial (its id), settings, and ended: whether it is only shown again."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Take up the trial's run folder, or begin it."""
        self._store = Storage(context.base.storage)
        self._gate = Gate(context.desk, self.trial_name)
        self._gate.take_over()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._epoch = 0
        self._best = 0.0
        settings = dict(config["choice"]["settings"])
        self._config = replace(apply(context.base, settings), out=trial_run(context.base.out, self.trial_name))
        folder = RunFolder(self._store, self._config.out)
        whole = folder.checkpoints()
        rows = [row for row in folder.epochs() if whole and row.epoch <= whole[-1][1].epoch]
        self._replay: deque[EpochRow] = deque(rows)
        about = join(self._config.out, "trial.json")
        if not self._store.exists(about):  # without it the folder does not count
            self._store.put(about, json.dumps({"trial": self.trial_name, "settings": settings}, indent=1).encode())

    def step(self) -> dict[str, Any]:
        """The next epoch as a result for Tune."""
        if self._replay:
            result = self._result(self._replay.popleft()) | {"replayed": True}
            is_over = self.config["choice"].get("ended", False) and not self._replay
            return result | {"done": result["done"] or is_over}
        row = self._next_row()
        return self._after_end() if row is None else self._result(row)

    def _next_row(self) -> EpochRow | None:
        """Train until the next epoch that was not shown yet; None when the run ended by itself."""
        if self._thread is None:
            self._gate.begin()
            self._error = None
            self._thread = threading.Thread(target=self._train, name="train", daemon=True)
            self._thread.start()
        else:
            self._gate.answer(True)
        while (row := self._gate.take()) is not None and row.epoch <= self._epoch:
            self._gate.answer(True)  # trained again, after workers died
        return row

    def _train(self) -> None:
        try:
            train(self._config, self._gate)
        except BaseException as error:  # noqa: BLE001  (raised again by step)
            self._error = error
        finally:
            self._gate.end()

    def _result(self, row: EpochRow) -> dict[str, Any]:
        self._epoch = row.epoch
        value = row.val_top1 or 0.0  # None where no video of val_split could be read
        self._best = max(self._best, value)
        is_last = self._epoch >= self._config.optim.epochs
        return {"epoch": self._epoch, METRIC: value, "best": self._best, "done": is_last}

    def _after_end(self) -> dict[str, Any]:
        """The run ended without a new epoch: it failed, or there was nothing left to train."""
        self._end_training()
        if self._error is not None and not isinstance(self._error, KinorayError):
            raise self._error
        result: dict[str, Any] = {"epoch": self._epoch, METRIC: self._best, "best": self._best, "done": True}
        if self._error is not None:
            text = " ".join(str(self._error).split())
            result |= {"error_class": type(self._error).__name__, "error_text": text}
        return result

    def _end_training(self) -> None:
        """End the run after the epoch it is in, if one is going on; its workers and their CPUs are free afterwards."""
        if self._thread is not None:
            self._gate.answer(False)
            self._thread.join()
            self._thread = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the checkpoints are in the run folder."""

    def load_checkpoint(self, checkpoint: str) -> None:
        """Nothing, as above."""

    def cleanup(self) -> None:
        """Called when the trial is over, stopped or paused."""
        self._end_training()


_REDUCTION_FACTOR = 3  # of ASHA: how far apart rungs are, and that a third passes each
_TRIES = 200  # draws that have been tried already, after which a space counts as used up


def planned_trials(config: TuneConfig, axes: Sequence[Axis]) -> dict[str, Settings]:
    """Every trial of the sweep by its id; empty where Optuna chooses them on the way.

    Raises:
        ConfigError: a grid needs lists of values.
    """
    if config.search == "optuna":
        return {}
    is_grid = config.search == "grid"
    trials = grid_trials(axes) if is_grid else draw_trials(axes, config.num_trials, config.optim.seed)
    return {settings_id(settings): settings for settings in trials}


def make_scheduler(config: TuneConfig, epochs: int) -> TrialScheduler | None:
    """Tune's scheduler, counting in epochs; None trains all trials to the end."""
    if config.grace >= epochs:
        return None
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=config.grace,
        reduction_factor=_REDUCTION_FACTOR,
    )


def require_optuna() -> None:
    """Raises ConfigError if search optuna was asked for and Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("search optuna needs Optuna: pip install 'kinoray[optuna]'; or search random") from error


class _OptunaTrials(Searcher):  # type: ignore[misc]
    """Asks an Optuna study for settings, and tells it what came of them."""

    def __init__(self, study: Any, axes: Sequence[Axis], seen: set[str]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study = study
        self._axes = axes
        self._seen = seen
        self._distributions = {axis.path: _distribution(axis) for axis in axes}
        self._asked: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> Any:
        """Settings that no trial has; FINISHED if there seem to be none. `trial_id` is Ray's."""
        for _ in range(_TRIES):
            asked = self._study.ask(self._distributions)
            settings = {axis.path: _value(axis, asked.params[axis.path]) for axis in self._axes}
            name = settings_id(settings)
            if name not in self._seen:
                self._seen.add(name)
                self._asked[trial_id] = asked
                return {"choice": {"trial": name, "settings": settings}}
            self._study.tell(asked, state=_state("FAIL"))
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take down the best accuracy of a trial, or that it failed."""
        failed = error or not result or "error_class" in result
        value = None if failed else float((result or {})["best"])
        self._study.tell(self._asked.pop(trial_id), value, state=_state("FAIL") if failed else None)

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune wants a file now and then; what a sweep goes on from is in its run folders."""
        Path(checkpoint_path).write_text("")


def optuna_searcher(
    config: TuneConfig,
    axes: Sequence[Axis],
    ended: Mapping[str, tuple[Settings, float | None]],
    open_trials: Sequence[Settings],
) -> Searcher:
    """Optuna's TPE: told what ended trials reached, it takes up the open ones, then chooses; never the same twice."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.optim.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {axis.path: _distribution(axis) for axis in axes}
    for settings, score in ended.values():
        if score is not None:
            known = {"params": _params(axes, settings), "distributions": distributions, "value": score}
            study.add_trial(optuna.trial.create_trial(**known))
    for settings in open_trials:
        study.enqueue_trial(_params(axes, settings))
    return _OptunaTrials(study, axes, set(ended))


def _state(name: str) -> Any:
    from optuna.trial import TrialState  # type: ignore[import-not-found,unused-ignore]

    return TrialState[name]


def _distribution(axis: Axis) -> Any:
    """A list is chosen from by place: Optuna takes no values that are lists themselves."""
    from optuna import distributions  # type: ignore[import-not-found,unused-ignore]

    if axis.values:
        return distributions.CategoricalDistribution(tuple(range(len(axis.values))))
    if axis.scale == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high))
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.scale == "log")


def _value(axis: Axis, param: Any) -> Any:
    return axis.values[param] if axis.values else axis.clip(param)


def _params(axes: Sequence[Axis], settings: Settings) -> dict[str, Any]:
    places = {axis.path: settings[axis.path] for axis in axes}
    return {axis.path: axis.values.index(places[axis.path]) if axis.values else places[axis.path] for axis in axes}


def trials_at_once(nodes: Sequence[Mapping[str, float]], resources: TrainResourcesConfig) -> int:
    """How many trials fit on nodes with these resources (such as {"CPU": 8.0, "GPU": 1.0}), at least 1.

    A trial takes num_workers times cpus_per_worker CPUs and gpus_per_worker GPUs, each worker on one node, and
    decode_tasks times one CPU anywhere. Its driver waits for them and takes none.

    Raises:
        ClusterError: not even one fits; the message has the sum.
    """
    count = 0
    while _fits(nodes, resources, count + 1):
        count += 1
    if count:
        return count
    workers = resources.num_workers
    cpus = resources.cpus_per_worker
    gpus = resources.gpus_per_worker
    gpu_text = f" and {gpus:g} GPU" if gpus else ""
    total = f"{workers * cpus + resources.decode_tasks:g} CPU" + (f" and {workers * gpus:g} GPU" if gpus else "")
    have = [f"{node.get('CPU', 0.0):g} CPU" + (f" and {node.get('GPU', 0.0):g} GPU" if gpus else "") for node in nodes]
    raise ClusterError(
        f"resources: a trial takes {many(workers, 'worker')} x {cpus:g} CPU{gpu_text} + {resources.decode_tasks} CPU "
        f"to decode (its driver takes none) = {total}, each worker and decoder on one node, but the cluster has "
        f"{', '.join(have) or 'no nodes'}; lower resources.num_workers, cpus_per_worker or decode_tasks, or raise "
        "resources.local_cpus"
    )


def _fits(nodes: Sequence[Mapping[str, float]], resources: TrainResourcesConfig, trials: int) -> bool:
    """Whether all workers of so many trials find a place, and then all their decoders."""
    free_cpus = [node.get("CPU", 0.0) for node in nodes]
    free_gpus = [node.get("GPU", 0.0) for node in nodes]
    left = trials * resources.num_workers
    for index in range(len(nodes)):
        while left and _has(free_cpus[index], resources.cpus_per_worker):
            if not _has(free_gpus[index], resources.gpus_per_worker):
                break
            free_cpus[index] -= resources.cpus_per_worker
            free_gpus[index] -= resources.gpus_per_worker
            left -= 1
    decoders = sum(int(cpus + 1e-6) for cpus in free_cpus)
    return not left and decoders >= trials * resources.decode_tasks


def _has(free: float, wanted: float) -> bool:
    return free + 1e-6 >= wanted  # 10 x 0.1 is not 1


_MAX_GRIDS = 8  # more than that read together would be most frames of a video


def shared_cache(base: TrainConfig, trials: Iterable[Settings]) -> TrainConfig:
    """The settings of all trials with a cache of the sweep's own, which serves all their samplings at once."""
    grids = sorted({grid_name(apply(base, settings).clip.sample) for settings in trials})
    folder = str(cache_folder(base.cache) / digest(base.out))
    shared = tuple(grids) if len(grids) <= _MAX_GRIDS else ()
    return replace(base, cache=replace(base.cache, folder=folder, grids=shared))


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def drop_cache(base: TrainConfig) -> None:
    """Delete the cache on every node that is there; needs a Ray that is connected."""
    remove = ray.remote(num_cpus=0)(_remove)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node_id=node, soft=True) for node in nodes]
    ray.get([remove.options(scheduling_strategy=place).remote(base.cache.folder) for place in strategies])
