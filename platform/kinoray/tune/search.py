"""Which settings Ray Tune is given, in what order, and what it stops: the searchers and schedulers of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from kinoray.errors import ConfigError
from kinoray.tune.config import TuneConfig
from kinoray.tune.space import Axis, Settings, draw_trials, grid_trials
from kinoray.tune.space import trial_id as settings_id
from kinoray.tune.trial import METRIC

__all__ = ["make_scheduler", "optuna_searcher", "planned_trials", "require_optuna"]

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
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=epochs,
            grace_period=min(config.grace, epochs),
            reduction_factor=_REDUCTION_FACTOR,
        )
    return None


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
