"""How long a labelling takes on which machines: arithmetic on measured stage rates, without a clock and without Ray.

A worker labels units of U videos. D decoders work ahead of one model, which takes batches of B videos; each unit fills
and drains that pipe once. On a node of C cores with W workers a unit takes at least

    B (n + e + m) + commit_s + (U - B) x    for x = n, e and m: network, decoders and model
    W U n                                   the network, which all workers share
    W U (d + c) / C                         the cores, likewise

n = bytes / network; d: CPU seconds to decode a video, e = d / min(D, C); m: seconds of the model, c: CPU seconds among
them. Stages that take about as long wait for each other now and then, so the time is not the largest of these but
a soft maximum of them, (sum of their 6th powers) ^ (1/6), within 15 % of a simulation (tests/simulated_labelling.py).

What is easy to break: on shared cores the seconds of decoding and of the model add up; only stages with resources of
their own (a GPU) run beside each other for nothing.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kinoray.config.scoring import rows_a_unit
from kinoray.errors import ConfigError

__all__ = [
    "Conditions",
    "Estimate",
    "Rates",
    "Site",
    "Work",
    "calibration",
    "driver_seconds",
    "estimate",
    "fewest_nodes",
    "job_s",
    "unit_s",
    "work_of",
]

_AGAIN = "measure again with: kinoray bench CATALOG --checkpoint CHECKPOINT --out rates.json"
_MAX_NODES = 100_000
_FEW = (
    10_000  # a bench of fewer videos measures how the driver starts; these two are of a million (benchmarks/scale.py)
)
_ROW_S = 5.6e-6  # a video: 3.6 us to plan it, 2 us to read its row back at the end
_PART_S = 6e-3  # a unit, to open and check its part
_SHARPNESS = 6  # of the maximum; what fits the simulation best (tests/test_capacity.py)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What `kinoray bench` measured on one machine; times are seconds a video unless they say otherwise."""

    decode_cpu_s: float
    """CPU seconds to read and decode, in the decoder and in its worker."""
    model_cpu_s: float
    """CPU seconds of the model: all of it on a CPU, the host's part with a GPU."""
    model_s: float
    """Seconds of one worker's model loop, with `torch_threads` threads or on its GPU."""
    bytes_per_video: float
    """Bytes read."""
    clips_per_video: float
    """Clips that the model sees of one video."""
    duration_s: float | None
    """Mean length of the videos measured; None if nobody knows it."""
    commit_s: float
    """Seconds to commit a unit, during which its worker does nothing else."""
    driver_s: float
    """Seconds of the driver, whatever the size of the library: Ray's start, the checkpoint, the end."""
    actor_start_s: float
    """Seconds until a worker has its imports and its model, prepared, and the job has given it a unit."""
    plan_s: float
    """Seconds that the driver takes for each video before and beside the work."""
    check_s: float
    """Seconds that the driver takes for each unit at the end."""
    job_videos_per_s: float
    """Videos a second of the whole Ray job, start and end left out."""
    num_videos: int
    """Videos measured."""
    num_workers: int
    """Workers of that job."""
    cpus_per_worker: float
    """CPUs that each asked for."""
    decoders_per_worker: int
    """Decoders of each."""
    torch_threads: int
    """Threads of each model."""
    batch_size: int
    """Clips a forward pass."""
    unit_size: int
    """Videos a unit of work."""
    cores: int
    """Cores of that machine."""
    cpu: str
    """Name of its processor."""
    gpu: str
    """Name of its GPU; empty where the model ran on the CPU."""

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: object, where: str) -> "Rates":
        """What `to_record` gave; other keys are left alone.

        Raises:
            ConfigError: a field is missing or cannot be; `where` is the file's name.
        """
        if not isinstance(record, dict):
            raise ConfigError(f"rates: {where} must hold a JSON object, found {type(record).__name__}; {_AGAIN}")
        values = {}
        for field in fields(cls):
            if field.name not in record:
                raise ConfigError(f"rates: {where} has no {field.name}; {_AGAIN}")
            values[field.name] = _checked(record[field.name], field.name, field.type, where)
        return cls(**values)


_MOST = 1e12
_MAY_BE_ZERO = frozenset({"model_cpu_s", "commit_s", "driver_s", "plan_s", "check_s"})


def _checked(value: object, name: str, kind: object, where: str) -> Any:
    found = f"rates: {where}: {name} must be"
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{found} text, got {value!r:.80}; {_AGAIN}")
        return value
    if value is None and kind == float | None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    least = 0.0 if name in _MAY_BE_ZERO else 1e-12
    if not (is_number and value >= least):  # type: ignore[operator]
        words = "a number of at least 0" if name in _MAY_BE_ZERO else "a number greater than 0"
        raise ConfigError(f"{found} {words}, got {value!r:.80}; {_AGAIN}")
    if value > _MOST:  # type: ignore[operator]
        raise ConfigError(f"{found} at most {_MOST:g}, got {value!r}; {_AGAIN}")
    if kind is int and not isinstance(value, int):
        raise ConfigError(f"{found} a whole number, got {value!r:.80}; {_AGAIN}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one video asks of a worker, and how the worker goes about it."""

    decode_cpu_s: float
    """d: CPU seconds to read and decode it."""
    model_s: float
    """m: seconds of the model, where nothing else wants its cores."""
    model_cpu_s: float
    """c: CPU seconds of the model."""
    decoders: int
    """D: decoder processes."""
    threads: int
    """Cores that the model can use at a time."""
    batch: float
    """B: videos a forward pass."""
    unit: int
    """U: videos committed at once."""
    commit_s: float = 0.0
    """Seconds for that."""
    bytes_per_video: float = 0.0
    """Bytes read."""

    @property
    def cpu_s(self) -> float:
        """d + c: CPU seconds of a video."""
        return self.decode_cpu_s + self.model_cpu_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A node, and how many workers share it."""

    cores: float
    """C: cores as fast as those that were measured."""
    workers: int
    """W."""
    bytes_per_s: float = math.inf
    """Its network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What surrounds the work; seconds unless it says otherwise."""

    node_start_s: float = 0.0
    """From asking for a node until its Ray runs."""
    driver_s: float = 0.0
    """Of the driver, whatever the size of the library."""
    actor_start_s: float = 0.0
    """Start of a worker, alone on a core."""
    plan_s: float = 0.0
    """Driver, a video."""
    check_s: float = 0.0
    """Driver, a unit."""
    losses_per_node_hour: float = 0.0
    """How often a node is taken away (spot), to come back after another start."""
    retry_fraction: float = 0.0
    """Share of the work that is done twice."""
    head_room: float = 0.0
    """Share of every rate that is not counted on."""
    calibration: float = 1.0
    """Measured rate of a whole job / the rate that these formulas give for it."""


def work_of(rates: Rates, *, decoders: int | None = None, threads: int | None = None) -> Work:
    """The work that was measured, done with other numbers of decoders and threads if they are given."""
    num_threads = threads or rates.torch_threads
    return Work(
        decode_cpu_s=rates.decode_cpu_s,
        model_s=rates.model_s if rates.gpu else rates.model_cpu_s / num_threads,
        model_cpu_s=rates.model_cpu_s,
        decoders=decoders or rates.decoders_per_worker,
        threads=1 if rates.gpu else num_threads,
        batch=max(1.0, rates.batch_size / rates.clips_per_video),
        unit=rates.unit_size,
        commit_s=rates.commit_s,
        bytes_per_video=rates.bytes_per_video,
    )


def driver_seconds(rates: Rates) -> tuple[float, float]:
    """Seconds of the driver a video and a unit."""
    if rates.num_videos >= _FEW:
        return rates.plan_s, rates.check_s
    return min(rates.plan_s, _ROW_S), min(rates.check_s, _PART_S)


def _limits(work: Work, site: Site, workers: int, videos: float) -> dict[str, float]:
    """Seconds that a unit of `videos` takes at least, by what stands in the way."""
    batch = min(work.batch, videos)
    fetch_s = work.bytes_per_video / site.bytes_per_s
    decode_s = work.decode_cpu_s / min(work.decoders, site.cores)
    once_s = batch * (fetch_s + decode_s + work.model_s) + work.commit_s
    each_s = {"network": fetch_s, "decoders": decode_s, "model": work.model_s}
    limits = {name: once_s + (videos - batch) * seconds for name, seconds in each_s.items()}
    limits["network"] = max(limits["network"], workers * videos * fetch_s)
    cpu_s = videos * work.cpu_s / site.cores
    return limits | {"cores": max(workers * cpu_s, cpu_s + work.commit_s)}


def unit_s(work: Work, site: Site, workers: int | None = None, videos: float | None = None) -> float:
    """Seconds from a unit's first byte to its commit, with so many workers busy (default: all) on so many videos."""
    limits = _limits(work, site, site.workers if workers is None else workers, videos or work.unit).values()
    largest = max(limits)
    return largest * math.pow(sum(math.pow(limit / largest, _SHARPNESS) for limit in limits), 1 / _SHARPNESS)


def calibration(rates: Rates) -> float:
    """The measured job's videos a second / what the closed form gives for the same workers on the same machine."""
    site = Site(cores=rates.cores, workers=rates.num_workers)
    return rates.job_videos_per_s * unit_s(work_of(rates), site) / (site.workers * rates.unit_size)


def job_s(work: Work, site: Site, num_videos: int, num_nodes: int) -> float:
    """Seconds from the first unit's start to the last one's commit: full rounds of units, then what is left.

    A last round with fewer units spreads over the nodes, so that each of them has its node more to itself.
    """
    num_units, last = divmod(num_videos, work.unit)
    rounds, rest = divmod(num_units, num_nodes * site.workers)
    whole_s = rounds * unit_s(work, site)
    if not rest and not last:
        return whole_s
    busy = math.ceil((rest + bool(last)) / num_nodes)
    return whole_s + unit_s(work, site, busy, None if rest else last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A labelling on `nodes` nodes of one kind."""

    nodes: int
    unit: int
    """Videos a unit of work."""
    wall_s: float
    """From asking for the nodes to the end."""
    start_s: float
    """Of it, until the first worker works."""
    work_s: float
    """Of it, labelling."""
    videos_per_s: float
    """All nodes together, once they work; head-room, losses and retries taken off."""
    bound: str
    """What limits it: cores, model, decoders or network."""
    decode_share: float
    """Share of decoding in the CPU seconds of a video."""


def estimate(work: Work, site: Site, conditions: Conditions, num_videos: int, num_nodes: int) -> Estimate:
    """How long `num_nodes` nodes take."""
    start_s = (
        conditions.node_start_s + conditions.driver_s + conditions.actor_start_s * max(1.0, site.workers / site.cores)
    )
    start_s += conditions.plan_s * num_videos
    again_s = conditions.node_start_s + conditions.actor_start_s + unit_s(work, site) / 2
    lost = conditions.losses_per_node_hour / 3600 * again_s
    slower = (1 + lost) * (1 + conditions.retry_fraction) / (conditions.calibration * (1 - conditions.head_room))
    work_s = slower * job_s(work, site, num_videos, num_nodes)
    limits = _limits(work, site, site.workers, work.unit)
    check_s = conditions.check_s * math.ceil(num_videos / work.unit)
    steady = num_nodes * site.workers * work.unit / (unit_s(work, site) * slower)
    return Estimate(
        nodes=num_nodes,
        unit=work.unit,
        wall_s=start_s + work_s + check_s,
        start_s=start_s,
        work_s=work_s,
        videos_per_s=steady,
        bound=max(limits, key=lambda name: limits[name]),
        decode_share=work.decode_cpu_s / work.cpu_s,
    )


def fewest_nodes(
    work: Work,
    site: Site,
    conditions: Conditions,
    num_videos: int,
    deadline_s: float,
    *,
    least_unit: int | None = None,
    most: int = _MAX_NODES,
) -> Estimate | None:
    """The estimate for the fewest nodes that meet the deadline; None if no number up to `most` does.

    Args:
        least_unit: units are what `label` makes for so many workers, and no smaller than this. Default: as in `work`.
    """

    def by(nodes: int) -> Estimate:
        unit = work.unit if least_unit is None else rows_a_unit(num_videos, nodes * site.workers, least_unit)
        return estimate(replace(work, unit=unit), site, conditions, num_videos, nodes)

    low, high = 0, 1
    while by(high).wall_s > deadline_s:  # from below: very many nodes may be slower again, by units that are checked
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:  # high meets it, low does not
        middle = (low + high) // 2
        if by(middle).wall_s <= deadline_s:
            high = middle
        else:
            low = middle
    return by(high)
