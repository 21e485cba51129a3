"""`kinoray bench`: the decode loop, the model loop and the whole Ray job on the user's own videos, in one run.

What is easy to break: on shared cores a job cannot reach the slower of its two halves, since the other half takes its
cores away; `shared` below is what it can reach, and what it is judged by.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinoray.capacity.config import BenchConfig
from kinoray.capacity.estimate import Rates
from kinoray.capacity.job import (
    DecodeLoop,
    JobFigures,
    ModelLoop,
    StartFigures,
    decode_loop,
    driver_costs,
    measure_job,
    measure_start,
    model_loop,
)
from kinoray.catalog.table import Catalog, catalog_of_source, save_catalog
from kinoray.cluster.connect import connect, require_fit
from kinoray.config.scoring import LabelWorkConfig, rows_a_unit, shared_settings
from kinoray.console import many, table
from kinoray.errors import ConfigError, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.open import Labelling, open_labelling
from kinoray.network.checkpoint import load_model
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import require_file
from kinoray.train.recorder import host

__all__ = ["Bounds", "advice", "bench", "bounds_of", "print_bench", "refuse_too_many_bad"]

_UNITS_A_WORKER = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """One turn of the three."""

    start: StartFigures
    decode: DecodeLoop
    model: ModelLoop
    job: JobFigures


def bench(config: BenchConfig, *, rounds: int = 1) -> dict[str, Any]:
    """Measure, print a table and a sentence of advice, and write the rates to config.out.

    Args:
        rounds: how often the three are measured in turn; medians are reported.

    Returns:
        rates (see kinoray.capacity.estimate.Rates), bounds (videos a second) and start (seconds).

    Raises:
        ConfigError: this would measure another machine than the one it runs on.
        TooManyBad: more than max_bad_fraction could not be decoded; the rates are written all the same.
        KinorayError: as `kinoray label`.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "resources.address: RAY_ADDRESS is set, but the loops and the job must share one machine; unset it, and "
            "run this on a node of the cluster"
        )
    storage = Storage(config.storage)
    if config.out:
        require_file("out", config.out)
    catalog, unit_size = _sample(storage, config)
    turns = []
    with scratch_folder("bench") as scratch:
        folder = str(scratch)
        begin = time.perf_counter()
        labelling = _open(config, folder, catalog, "first", unit_size)
        connect(config.resources)
        require_fit(config.resources)
        driver_s = time.perf_counter() - begin
        for number in range(rounds):
            alone = _open(config, folder, catalog, f"start-{number}", unit_size, quiet=True)
            labelling = _open(config, folder, catalog, f"round-{number}", unit_size, quiet=True)
            turns.append(_measure(config, alone, labelling))
        plan_s, check_s = driver_costs(labelling)
    rates = _rates(labelling, turns, config, (driver_s, plan_s, check_s), unit_size)
    bounds = bounds_of(rates, [(turn.decode, turn.model, turn.job) for turn in turns])
    rates = replace(rates, job_videos_per_s=bounds.job)
    times = _times(turns)
    print_bench(rates, bounds, times, turns[-1].decode, config)
    record = {"rates": rates.to_record(), "bounds": bounds.to_record(), "start": times}
    if config.out:
        body = rates.to_record() | {"bounds": bounds.to_record(), "start": times}
        storage.put(absolute(config.out), json.dumps(body, indent=1).encode())
        print(f"bench: wrote {absolute(config.out)}; next: kinoray plan --rates {config.out} --node ...", flush=True)
    refuse_too_many_bad(turns[-1].decode, config.max_bad_fraction)
    return record


def refuse_too_many_bad(decode: DecodeLoop, max_bad_fraction: float) -> None:
    """Raise TooManyBad where more than this share of the videos could not be decoded."""
    if decode.bad > max_bad_fraction * decode.videos:
        raise TooManyBad(
            f"{decode.bad} of {decode.videos} videos ({decode.bad / decode.videos:.1%}) could not be decoded, "
            f"max_bad_fraction allows {max_bad_fraction:.1%}; the rates are those of the others. To see why: kinoray "
            "doctor CATALOG"
        )


def _sample(storage: Storage, config: BenchConfig) -> tuple[Catalog, int]:
    """Some videos, spread evenly over the catalog, and the size of units that gives each worker three.

    Raises:
        ConfigError: there are too few.
    """
    catalog = catalog_of_source(storage, absolute(config.source))
    least = _UNITS_A_WORKER * config.resources.num_workers
    if len(catalog) < least:
        raise ConfigError(
            f"{config.source} has {len(catalog)} videos, but at least {_UNITS_A_WORKER} a worker ({least}) are needed; "
            "point to more of them, or set --workers 1"
        )
    count = min(config.videos, len(catalog))
    as_labelled = config.rows_a_unit(len(catalog))
    unit_size = max(1, min(as_labelled, count // least))
    if unit_size < as_labelled:
        print(f"bench: units of {many(unit_size, 'video')}, so that each worker gets {_UNITS_A_WORKER}")
    places = np.unique(np.linspace(0, len(catalog) - 1, count).round().astype(np.int64))
    return Catalog(catalog.table.take(places), catalog.labels), unit_size


def _times(rounds: list[_Round]) -> dict[str, float]:
    """How long the start takes: medians over the rounds."""
    return {
        "first_label_s": statistics.median(turn.job.first_s for turn in rounds),
        "actor_and_unit_s": statistics.median(turn.start.first_s for turn in rounds),
        "actor_start_s": statistics.median(turn.start.first_s - turn.start.unit_s for turn in rounds),
        "first_over_actor_and_unit": statistics.median(turn.job.first_s / turn.start.first_s for turn in rounds),
    }


def _open(
    config: BenchConfig, folder: str, catalog: Catalog, name: str, unit_size: int, *, quiet: bool = False
) -> Labelling:
    """A labelling of the sample into a folder of its own; settings that `label` shares with `bench` are taken over."""
    source = join(folder, "catalog.parquet")
    if not Path(source).exists():
        save_catalog(Storage(), source, catalog)
    shared = shared_settings(replace(config, unit_size=unit_size), LabelWorkConfig)
    return open_labelling(LabelConfig(source=source, out=join(folder, name), **shared), "bench", quiet=quiet)


def _measure(config: BenchConfig, alone: Labelling, labelling: Labelling) -> _Round:
    """Workers alone, decode, model, job, one after the other."""
    start = measure_start(alone, config.resources)
    job, num_workers = labelling.job, config.resources.num_workers
    model, _ = load_model(job.storage, job.checkpoint, job.allow_factory)
    job = replace(job, clip=job.clip.for_network(model.input_spec.flow_channels))
    keep = 4 * job.scorer.batch_size
    decode = decode_loop(job, labelling.catalog.table, num_workers, keep=keep)
    model_figures = model_loop(job, decode.kept, decode.clips, num_workers)
    decode.kept.clear()
    job_figures = measure_job(labelling, config.resources)
    return _Round(start=start, decode=decode, model=model_figures, job=job_figures)


def _rates(
    labelling: Labelling,
    rounds: list[_Round],
    config: BenchConfig,
    driver: tuple[float, float, float],
    unit_size: int,
) -> Rates:
    """Medians over the rounds."""
    decodes, models, jobs = zip(*((turn.decode, turn.model, turn.job) for turn in rounds), strict=True)
    videos, clips = decodes[0].videos, decodes[0].clips
    good, clips_per_video = videos - decodes[0].bad, clips / videos
    num_loops = config.resources.num_workers if labelling.job.device == "cpu" else 1
    unit_s = unit_size * config.resources.num_workers / statistics.median(job.videos_per_s for job in jobs)
    this = host(0)
    return Rates(
        decode_cpu_s=statistics.median(loop.cpu_s for loop in decodes) / videos,
        model_cpu_s=clips_per_video * statistics.median(loop.cpu_s / loop.clips for loop in models),
        model_s=clips_per_video * statistics.median(num_loops * loop.wall_s / loop.clips for loop in models),
        bytes_per_video=decodes[0].bytes_read / videos,
        clips_per_video=clips_per_video,
        duration_s=decodes[0].duration_s / good or None,
        commit_s=statistics.median(turn.start.commit_s for turn in rounds),
        driver_s=driver[0] + statistics.median(job.end_s for job in jobs),
        actor_start_s=max(0.1, statistics.median(job.first_s for job in jobs) - unit_s),
        plan_s=driver[1],
        check_s=driver[2],
        job_videos_per_s=statistics.median(job.videos_per_s for job in jobs),
        num_videos=videos,
        num_workers=config.resources.num_workers,
        cpus_per_worker=config.resources.cpus_per_worker,
        decoders_per_worker=labelling.job.num_decoders,
        torch_threads=labelling.job.torch_threads,
        batch_size=labelling.job.scorer.batch_size,
        unit_size=unit_size,
        cores=len(os.sched_getaffinity(0)),
        cpu=str(this["cpu"]),
        gpu="" if labelling.job.device == "cpu" else torch.cuda.get_device_name(0),
    )


_CLOSE = 0.9
_OTHERS = 0.1
_UNIT_OF_MANY = rows_a_unit(1_000_000, 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Videos a second, from CPU seconds, so that they hold with other work on the machine; medians over the rounds."""

    decode: float
    """Decoding alone: cores (but no more than there are decoders) / CPU seconds a video."""
    model: float
    """The model alone, likewise; on a GPU as the clock says."""
    min_both: float
    """The slower of the two, each with all the cores."""
    shared: float
    """min_both, but no more than cores / (CPU seconds to decode + CPU seconds of the model)."""
    job: float
    """The whole job: cores / core seconds a video, its own and the idle ones. Alone on a machine: as the clock says."""
    job_over_min_both: float
    job_over_shared: float
    """Of each round by itself, as the ratio above and the one below."""
    cpu_over_job: float
    """CPU seconds a video of the two loops / of the job with all of Ray."""
    others_share: float
    """What others took of the cores while the job ran."""

    def to_record(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def bounds_of(rates: Rates, rounds: Sequence[tuple[DecodeLoop, ModelLoop, JobFigures]]) -> Bounds:
    """The bounds and the ratios of each round, and their medians. Of the rates, only what was asked for is used."""
    turns = []
    for decode, model, job in rounds:
        decode_s = decode.cpu_s / decode.videos
        model_s = rates.clips_per_video * model.cpu_s / model.clips
        decode_rate = min(rates.cores, rates.num_workers * rates.decoders_per_worker) / decode_s
        if rates.gpu:  # the loop ran on one of them
            model_rate = rates.num_workers * model.clips / model.wall_s / rates.clips_per_video
        else:
            model_rate = min(rates.cores, rates.num_workers * rates.torch_threads) / model_s
        min_both = min(decode_rate, model_rate)
        shared, job_rate = min(min_both, rates.cores / (decode_s + model_s)), rates.cores / job.core_s
        turns.append(
            Bounds(
                decode=decode_rate,
                model=model_rate,
                min_both=min_both,
                shared=shared,
                job=job_rate,
                job_over_min_both=job_rate / min_both,
                job_over_shared=job_rate / shared,
                cpu_over_job=(decode_s + model_s) / job.cpu_s,
                others_share=job.others_share,
            )
        )
    names = turns[0].to_record()
    return Bounds(**{name: statistics.median(getattr(turn, name) for turn in turns) for name in names})


def print_bench(
    rates: Rates, bounds: Bounds, times: Mapping[str, float], decode: DecodeLoop, config: BenchConfig
) -> None:
    """The table and the advice."""
    where = rates.gpu or f"{many(rates.torch_threads, 'thread')} each"
    rows = [
        (
            "decode alone",
            bounds.decode,
            rates.decode_cpu_s,
            many(rates.num_workers * rates.decoders_per_worker, "decoder"),
        ),
        ("model alone", bounds.model, rates.model_cpu_s, f"{many(rates.num_workers, 'worker')}, {where}"),
        ("min(both)", bounds.min_both, None, "each with all the cores to itself"),
        ("shared cores", bounds.shared, rates.decode_cpu_s + rates.model_cpu_s, f"both on {rates.cores} cores"),
        ("Ray job", bounds.job, (rates.decode_cpu_s + rates.model_cpu_s) / bounds.cpu_over_job, "all of it"),
    ]
    cells = [
        (name, f"{rate:.2f}", f"{rate * rates.clips_per_video:.2f}", "-" if cpu_s is None else f"{cpu_s:.3f}", note)
        for name, rate, cpu_s, note in rows
    ]
    head = ("", "videos/s", "clips/s", "CPU s a video", "")
    print("\n" + "\n".join(table(cells, head=head, right=(1, 2, 3))))
    print(f"job / shared cores {bounds.job_over_shared:.2f}, job / min(both) {bounds.job_over_min_both:.2f}")
    print(
        f"start: a worker {times['actor_start_s']:.1f} s, a worker and one unit {times['actor_and_unit_s']:.1f} s; "
        f"the job's first labels came after {times['first_label_s']:.1f} s"
    )
    bad = f", {decode.bad} of them bad" if decode.bad else ""
    print(
        f"read: {decode.bytes_read / 1e6:.1f} MB of {many(decode.videos, 'video')}{bad}, "
        f"{rates.bytes_per_video / 1e3:.0f} kB each"
    )
    if bounds.others_share > _OTHERS:
        print(
            f"other programs used {bounds.others_share:.0%} of the CPU: the CPU-second figures are valid, start-up is "
            "overstated, idle time is hidden; measure again on a quiet machine"
        )
    print(f"bench: {advice(rates, bounds, config, has_bf16=_has_bf16())}", flush=True)


def advice(rates: Rates, bounds: Bounds, config: BenchConfig, *, has_bf16: bool) -> str:
    """Which stage binds, and what would help, in one sentence."""
    decoders = rates.num_workers * rates.decoders_per_worker
    if rates.gpu and bounds.model < bounds.decode:
        return f"the model on {rates.gpu} binds: {_model_remedy(config, on_gpu=True, has_bf16=True)}"
    cpu_s = rates.decode_cpu_s + rates.model_cpu_s
    saturated = bounds.shared >= _CLOSE * rates.cores / cpu_s
    if not saturated and bounds.decode <= bounds.model:
        wanted = -(-rates.cores // rates.num_workers)
        return (
            f"decoding binds, and {many(decoders, 'decoder')} cannot use all {rates.cores} cores: set "
            f"--resources.decoders-per-worker {max(wanted, rates.decoders_per_worker + 1)}"
        )
    if not saturated:
        return (
            f"the model binds, and {many(rates.num_workers, 'worker')} of {many(rates.torch_threads, 'thread')} cannot "
            f"use all {rates.cores} cores: set --workers "
            f"{max(rates.num_workers + 1, rates.cores // rates.torch_threads)}"
        )
    if bounds.job_over_shared < _CLOSE and not config.unit_size and rates.unit_size < _UNIT_OF_MANY:
        return (
            f"the job reaches {bounds.job_over_shared:.0%} of what these cores allow in units of "
            f"{many(rates.unit_size, 'video')}, which are larger in a larger library: measure more of them (--videos), "
            "and see that nothing else runs here"
        )
    if bounds.job_over_shared < _CLOSE:
        return (
            f"the job reaches {bounds.job_over_shared:.0%} of what these cores allow: give each worker larger units "
            "(--unit-size), and see that nothing else runs here"
        )
    share = rates.decode_cpu_s / cpu_s
    if share >= 0.5:
        return (
            f"decoding binds: it takes {share:.0%} of the CPU time and all cores are busy, so more decoders would "
            "not help; more machines would, and videos that are cheap to decode (kinoray pack --transcode)"
        )
    remedy = _model_remedy(config, on_gpu=False, has_bf16=has_bf16)
    return f"the model binds: it takes {1 - share:.0%} of the CPU time; {remedy}"


def _model_remedy(config: BenchConfig, *, on_gpu: bool, has_bf16: bool) -> str:
    ways = []
    if config.inference.precision == "fp32" and has_bf16:
        ways.append("--inference.precision bf16 takes about half of it")
    if not on_gpu:
        ways.append("a GPU (--resources.gpus-per-worker 1) takes it off the CPUs")
    return " and ".join(ways) if ways else "more GPUs, or a smaller network, would help"


def _has_bf16() -> bool:
    """Whether this machine's CPUs multiply bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))
