"""What `kinoray bench` says: a small table, which stage binds, and one sentence of advice."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kinoray.capacity.config import BenchConfig
from kinoray.capacity.estimate import Rates
from kinoray.capacity.job import JobFigures
from kinoray.capacity.loops import DecodeLoop, ModelLoop
from kinoray.console import table

__all__ = ["Bounds", "advice", "bounds_of", "print_bench"]

_CLOSE = 0.9
_OTHERS = 0.1


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
        decode_rate = min(rates.cores, rates.num_workers * rates.decode_tasks) / decode_s
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
    where = rates.gpu or f"{rates.torch_threads} threads each"
    rows = [
        ("decode alone", bounds.decode, rates.decode_cpu_s, f"{rates.num_workers * rates.decode_tasks} decoders"),
        ("model alone", bounds.model, rates.model_cpu_s, f"{rates.num_workers} workers, {where}"),
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
        f"read: {decode.bytes_read / 1e6:.1f} MB of {decode.videos} videos{bad}, "
        f"{rates.bytes_per_video / 1e3:.0f} kB each"
    )
    if bounds.others_share > _OTHERS:
        print(
            f"others took {bounds.others_share:.0%} of the cores: figures by CPU seconds hold, the start is too long, "
            "and a job that waits would not show; measure again on a quiet machine"
        )
    print(f"bench: {advice(rates, bounds, config, has_bf16=_has_bf16())}", flush=True)


def advice(rates: Rates, bounds: Bounds, config: BenchConfig, *, has_bf16: bool) -> str:
    """Which stage binds, and what would help, in one sentence."""
    decoders = rates.num_workers * rates.decode_tasks
    if rates.gpu and bounds.model < bounds.decode:
        return f"the model on {rates.gpu} binds: {_model_remedy(config, on_gpu=True, has_bf16=True)}"
    cpu_s = rates.decode_cpu_s + rates.model_cpu_s
    saturated = bounds.shared >= _CLOSE * rates.cores / cpu_s
    if not saturated and bounds.decode <= bounds.model:
        wanted = -(-rates.cores // rates.num_workers)
        return (
            f"decoding binds, and {decoders} decoders do not use {rates.cores} cores: set --resources.decode-tasks "
            f"{max(wanted, rates.decode_tasks + 1)}"
        )
    if not saturated:
        return (
            f"the model binds, and {rates.num_workers} workers of {rates.torch_threads} threads do not use "
            f"{rates.cores} cores: set --workers {max(rates.num_workers + 1, rates.cores // rates.torch_threads)}"
        )
    if bounds.job_over_shared < _CLOSE:
        return (
            f"the job reaches {bounds.job_over_shared:.0%} of what these cores allow: give each worker larger units "
            "(--unit-size), and see that nothing else runs here"
        )
    share = rates.decode_cpu_s / cpu_s
    if share >= 0.5:
        return (
            f"decoding binds: it takes {share:.0%} of the CPU time and all cores are busy, so more decode_tasks would "
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
