"""One whole labelling on Ray, timed by its commits: when the first label is there, how fast it goes, what it costs.

What is easy to break: all figures but the core seconds come from the ledger, so the job is run as users run it.
"""

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from kinoray.capacity.watch import CpuWatch
from kinoray.catalog.quarantine import Refusal, error_of, refusals_of_columns
from kinoray.config.shared import ResourcesConfig
from kinoray.label.open import Labelling
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.unit import row_keys
from kinoray.label.verb import run_labelling
from kinoray.storage.objects import join

__all__ = ["JobFigures", "StartFigures", "driver_costs", "measure_job", "measure_start"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFigures:
    """Workers by themselves, as Ray actors that are given one unit each."""

    first_s: float
    """Until the first of them has committed its unit."""
    unit_s: float
    """Of it, labelling that unit."""
    commit_s: float
    """Of that, its commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFigures:
    """A whole labelling."""

    wall_s: float
    first_s: float
    """From its beginning, with Ray running, until the first unit is committed."""
    end_s: float
    """From the last commit to its end."""
    videos_per_s: float
    """Between the commits: without start and end."""
    cpu_s: float
    """CPU seconds a video meanwhile, of all processes: workers, decoders, driver and Ray."""
    core_s: float
    """Core seconds a video that were there for it meanwhile: used by the job, or idle (see CpuWatch)."""
    others_share: float
    """What others took of the cores meanwhile."""


class _Worker:
    """The job's worker, as an actor."""

    def __init__(self, job: LabelJob) -> None:
        self.units = LabelUnits(job)

    def label(self, unit: dict[str, Any]) -> tuple[dict[str, Any], Refusal | None]:
        table = self.units(pa.Table.from_pylist([unit]))
        (counts,) = table.to_pylist()
        (failure,) = refusals_of_columns(table.to_pydict())
        return dict(counts), failure


def measure_start(labelling: Labelling, resources: ResourcesConfig) -> StartFigures:
    """Start the job's workers as plain actors, each on a unit of its own. Ray must run.

    Raises:
        KinorayError: what a worker reports.
    """
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_Worker)
    packed = _packed(labelling)[: resources.num_workers]
    begin = time.perf_counter()
    workers = [actor.remote(labelling.job) for _ in packed]
    answers = [worker.label.remote(unit) for worker, unit in zip(workers, packed, strict=True)]
    first, _ = ray.wait(answers, num_returns=1)
    first_s = time.perf_counter() - begin
    for _, failure in ray.get(answers):
        if failure is not None:
            raise error_of(failure)
    for worker in workers:
        ray.kill(worker)
    counts, _ = ray.get(first[0])
    waited = {name: value for name, value in counts.items() if name.endswith("_s")}  # for each stage
    return StartFigures(first_s=first_s, unit_s=sum(waited.values()), commit_s=waited["commit_s"])


def _packed(labelling: Labelling) -> list[dict[str, Any]]:
    """All units, as they are handed out."""
    position = {key: row for row, key in enumerate(labelling.keys)}
    table = labelling.catalog.table
    return [pack_unit(unit, table.take([position[key] for key in unit.keys])) for unit in labelling.plan.units]


def measure_job(labelling: Labelling, resources: ResourcesConfig) -> JobFigures:
    """Run the labelling. Ray must run, and nothing of the labelling may be done yet.

    Raises:
        KinorayError: as `run_labelling`.
    """
    ledger, plan, num_workers = labelling.ledger, labelling.plan, resources.num_workers
    with CpuWatch() as watch:
        begin = time.time()
        run_labelling(labelling, resources, "bench")
        end = time.time()
    parts = ledger.storage.list(join(ledger.root, "parts") + "/")
    times = {info.uri.rpartition("/")[2].removesuffix(".parquet"): info.modified_s for info in parts}
    rows = {unit.unit_id: len(unit.keys) for unit in plan.units}
    order = sorted(times, key=lambda unit_id: times[unit_id])
    first, last = times[order[num_workers - 1]], times[order[-1]]  # from when each worker has done a unit, about
    videos = sum(rows[unit_id] for unit_id in order[num_workers:])
    use = watch.use(first, last)
    return JobFigures(
        wall_s=end - begin,
        first_s=times[order[0]] - begin,
        end_s=end - last,
        videos_per_s=videos / (last - first),
        cpu_s=use.own_s / videos,
        core_s=use.had_s / videos,
        others_share=use.others_share,
    )


def driver_costs(labelling: Labelling) -> tuple[float, float]:
    """Seconds of the driver: a video, to name it and hand it out; a unit, to read it back at the end."""
    begin = time.perf_counter()
    row_keys(labelling.catalog.table)
    _packed(labelling)
    plan_s = (time.perf_counter() - begin) / len(labelling.keys)
    begin = time.perf_counter()
    labelling.ledger.check(labelling.plan, labelling.keys)
    return plan_s, (time.perf_counter() - begin) / len(labelling.plan.units)
