"""Kinds of nodes as a user writes them, and how fast their GPUs are; a rate is never guessed without a word."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kinoray.capacity.estimate import Rates
from kinoray.errors import ConfigError

__all__ = ["TFLOPS", "NodeType", "gpu_seconds", "parse_duration", "parse_gpu_rates", "parse_node"]

TFLOPS: Mapping[str, float] = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "T4": 65.0,
    "V100": 125.0,
}
"""Dense half-precision tensor TFLOPS that the vendor publishes: what one GPU's rate is scaled to another's with."""

_PARTS = {
    "cpu": re.compile(r"(\d+)cpu"),
    "gpu": re.compile(r"(\d+)x([A-Za-z][\w-]*)"),
    "gbit": re.compile(r"(\d+(?:\.\d+)?)gbit"),
    "usd": re.compile(r"(\d+(?:\.\d+)?)usd"),
}
_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeType:
    """One kind of node."""

    name: str
    cpus: int
    gpus: int = 0
    gpu: str = ""
    """Kind of its GPUs."""
    gbit: float = math.inf
    """Network, in Gbit/s; inf where it is not given."""
    usd_per_hour: float | None = None


def parse_node(text: str) -> NodeType:
    """`big:16cpu,1xH100,25gbit,4.10usd`, in any order; only cpu is needed.

    Raises:
        ConfigError: it is not that.
    """
    name, colon, rest = text.partition(":")
    if not (name and colon):
        raise ConfigError(f"node must be NAME:PART,PART..., like small:16cpu,0.50usd; got {text!r}")
    found: dict[str, re.Match[str]] = {}
    for part in rest.split(","):
        kind, match = next(((kind, m) for kind, p in _PARTS.items() if (m := p.fullmatch(part.strip()))), ("", None))
        if match is None or kind in found:
            what = f"{part.strip()!r} twice" if match else f"{part.strip()!r}"
            raise ConfigError(
                f"node must be NAME:PART,... with parts like 16cpu, 1xH100, 25gbit and 4.10usd, once each; "
                f"got {what} in {text!r}"
            )
        found[kind] = match
    if "cpu" not in found or int(found["cpu"][1]) < 1:
        raise ConfigError(f"node must have at least 1 CPU, like small:16cpu,0.50usd; got {text!r}")
    gpus = int(found["gpu"][1]) if "gpu" in found else 0
    gbit = float(found["gbit"][1]) if "gbit" in found else math.inf
    if not gbit:
        raise ConfigError(f"node must have a network above 0gbit, or none given for no limit; got {text!r}")
    return NodeType(
        name=name,
        cpus=int(found["cpu"][1]),
        gpus=gpus,
        gpu=found["gpu"][2] if gpus else "",
        gbit=gbit,
        usd_per_hour=float(found["usd"][1]) if "usd" in found else None,
    )


def parse_duration(text: str, name: str) -> float:
    """Seconds in `90min`, `24h`, `2d`, `45s`. Raises ConfigError that names the field."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h|d)", text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if match is None or (seconds == 0 and name == "deadline"):
        raise ConfigError(f"{name} must be a time like 45s, 90min, 24h or 2d, got {text!r}")
    return seconds


def parse_gpu_rates(items: Sequence[str]) -> dict[str, float]:
    """`["H100=180"]` -> `{"h100": 180.0}`. Raises ConfigError."""
    rates = {}
    for item in items:
        match = re.fullmatch(r"([A-Za-z][\w-]*)=(\d+(?:\.\d+)?)", item)
        if match is None or float(match[2]) == 0:
            raise ConfigError(f"gpu_clips_per_s must be GPU=CLIPS_A_SECOND above 0, like H100=180, got {item!r}")
        rates[match[1].lower()] = float(match[2])
    return rates


def gpu_seconds(rates: Rates, gpu: str, given: Mapping[str, float]) -> tuple[float, str]:
    """Seconds of one such GPU for a video, and in words where that comes from.

    Raises:
        ConfigError: it was neither given nor measured, on this GPU or on one that it can be compared with.
    """
    if gpu.lower() in given:
        clips_per_s = given[gpu.lower()]
        return rates.clips_per_video / clips_per_s, f"{gpu}: {clips_per_s:g} clips/s, as gpu_clips_per_s says"
    if rates.gpu and _names(rates.gpu, gpu):
        return rates.model_s, f"{gpu}: {rates.clips_per_video / rates.model_s:.1f} clips/s, measured on {rates.gpu}"
    measured = next((name for name in TFLOPS if rates.gpu and _names(rates.gpu, name)), "")
    wanted = next((name for name in TFLOPS if name.lower() == gpu.lower()), "")
    if not (measured and wanted):
        where = rates.gpu or f"a CPU ({rates.cpu})"
        raise ConfigError(
            f"gpu_clips_per_s: no rate is known for a {gpu}: the rates were measured on {where}; run kinoray bench "
            f"label with --resources.gpus-per-worker 1 on one, or give --gpu-clips-per-s {gpu}=CLIPS_A_SECOND"
        )
    times = TFLOPS[wanted] / TFLOPS[measured]
    seconds = rates.model_s / times
    return seconds, (
        f"{gpu}: {rates.clips_per_video / seconds:.1f} clips/s, NOT measured: {rates.gpu}'s rate x {times:.2f}, the "
        f"ratio of published TFLOPS ({TFLOPS[wanted]:g} / {TFLOPS[measured]:g}); measure before you buy"
    )


def _names(full: str, short: str) -> bool:
    """Whether `NVIDIA A100-SXM4-80GB` is an `A100`."""
    return short.lower() in re.split(r"[^a-z0-9]+", full.lower())
