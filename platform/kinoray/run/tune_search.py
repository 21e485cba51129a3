"""Which settings Ray Tune is given, in what order, and what it stops: the searchers and schedulers of a sweep."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from kinoray.errors import ConfigError
from kinoray.run.tune_trial import METRIC
from kinoray.tune_config import PERTURBED, TuneConfig
from kinoray.tune_space import Axis, Settings, draw_trials, grid_trials, trial_id

__all__ = ["make_scheduler", "optuna_searcher", "planned_trials", "require_optuna"]


def planned_trials(config: TuneConfig, axes: Sequence[Axis]) -> dict[str, Settings]:
    """Every trial of the sweep by its id; empty where Optuna chooses them on the way.

    Raises:
        ConfigError: a grid needs lists of values; pbt needs two trials.
    """
    if config.search == "optuna":
        return {}
    is_grid = config.search == "grid"
    trials = grid_trials(axes) if is_grid else draw_trials(axes, config.num_trials, config.search_seed)
    if config.scheduler == "pbt" and len(trials) < 2:
        raise ConfigError(f"scheduler pbt needs at least 2 trials to exchange anything, got {len(trials)}")
    return {trial_id(settings): settings for settings in trials}


def make_scheduler(config: TuneConfig, axes: Sequence[Axis], epochs: int) -> TrialScheduler | None:
    """Tune's scheduler, counting in epochs; None trains all trials to the end."""
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=epochs,
            grace_period=min(config.grace, epochs),
            reduction_factor=config.reduction_factor,
        )
    if config.scheduler == "pbt":
        random.seed(config.search_seed)  # Ray perturbs with Python's own generator
        moved = [axis for axis in axes if axis.path in PERTURBED]

        def keep_inside(new: dict[str, Any]) -> dict[str, Any]:
            settings = new["choice"]["settings"]
            settings |= {axis.path: axis.clip(settings[axis.path]) for axis in moved if not axis.values}
            return new

        return PopulationBasedTraining(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            perturbation_interval=config.perturb_epochs,
            hyperparam_mutations={"choice": {"settings": {axis.path: _mutation(axis) for axis in moved}}},
            custom_explore_fn=keep_inside,
            log_config=False,
        )
    return None


def _mutation(axis: Axis) -> Any:
    """What PBT draws a new value from, now and then; else it multiplies by 0.8 or 1.2, or takes a neighbour."""
    return list(axis.values) if axis.values else _domain(axis)


def _domain(axis: Axis) -> Any:
    if axis.values:
        return tune.choice(list(axis.values))
    if axis.scale == "int":
        return tune.randint(int(axis.low), int(axis.high) + 1)
    return tune.loguniform(axis.low, axis.high) if axis.scale == "log" else tune.uniform(axis.low, axis.high)


def require_optuna() -> None:
    """Raises ConfigError if search optuna was asked for and Optuna is not installed."""
    try:
        import optuna  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ConfigError("search optuna needs Optuna: pip install 'kinoray[optuna]'; or search random") from error


def optuna_searcher(
    config: TuneConfig,
    axes: Sequence[Axis],
    ended: Mapping[str, tuple[Settings, float | None]],
    open_trials: Sequence[Settings],
) -> Searcher:
    """Optuna's TPE: told what ended trials reached, it takes up the open ones, then chooses; never the same twice."""
    from ray.tune.search.optuna import OptunaSearch

    class Distinct(OptunaSearch):  # type: ignore[misc]
        """Lists of values are soon used up: a trial that is there already is not trained again."""

        def suggest(self, trial_id_of_ray: str) -> Any:
            for _ in range(100):
                suggested = super().suggest(trial_id_of_ray)
                if not isinstance(suggested, dict):
                    return suggested
                settings = {axis.path: _rounded(axis, suggested["settings"][axis.path]) for axis in axes}
                name = trial_id(settings)
                if name not in seen:
                    seen.add(name)
                    return {"choice": {"trial": name, "settings": settings}}
                self.on_trial_complete(trial_id_of_ray, error=True)
            return Searcher.FINISHED

    seen = set(ended)
    searcher = Distinct(
        space={f"settings/{axis.path}": _distribution(axis) for axis in axes},
        metric=METRIC,
        mode="max",
        seed=config.search_seed,
        points_to_evaluate=[_point(settings) for settings in open_trials] or None,
    )
    for settings, score in ended.values():
        if score is not None:
            searcher.add_evaluated_point(_point(settings), score)
    return searcher


def _rounded(axis: Axis, value: Any) -> Any:
    return value if axis.values else axis.clip(value)


def _point(settings: Settings) -> dict[str, Any]:
    return {f"settings/{path}": value for path, value in settings.items()}


def _distribution(axis: Axis) -> Any:
    from optuna import distributions  # type: ignore[import-not-found,unused-ignore]

    if axis.values:
        return distributions.CategoricalDistribution(axis.values)
    if axis.scale == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high))
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.scale == "log")
