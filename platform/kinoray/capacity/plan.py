"""`kinoray plan`: measured stage rates -> nodes, hours and cost, with everything that is assumed in words.

Kinds of nodes come first, as a user writes them, and how fast their GPUs are. What is easy to break: nothing here is
measured, so each figure that does not come from rates.json has its line among the assumptions.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.compute as pc

from kinoray.capacity.config import PlanConfig
from kinoray.capacity.estimate import (
    Conditions,
    Estimate,
    Rates,
    Site,
    Work,
    calibration,
    driver_seconds,
    fewest_nodes,
    work_of,
)
from kinoray.catalog.table import Catalog, catalog_of_source
from kinoray.console import format_duration, many, table
from kinoray.errors import ConfigError, JobError
from kinoray.storage.objects import Storage, absolute, format_bytes
from kinoray.storage.records import parse_json, require_file

__all__ = [
    "TFLOPS",
    "Library",
    "NodeType",
    "gpu_seconds",
    "layout",
    "load_rates",
    "parse_duration",
    "parse_gpu_rates",
    "parse_node",
    "plan",
]

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


def parse_duration(text: str) -> float:
    """Seconds in `90min`, `24h`, `2d`, `45s`: a deadline. Raises ConfigError that names the field."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h|d)", text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not seconds:
        raise ConfigError(f"deadline must be a time like 45s, 90min, 24h or 2d, got {text!r}")
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
            f"with --resources.gpus-per-worker 1 on one, or give --gpu-clips-per-s {gpu}=CLIPS_A_SECOND"
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


_NODE_START_S = 180.0  # from asking for a node until its Ray runs: what clouds take, image and all
_HEAD_ROOM = 0.2  # of every rate, that is not counted on
_RETRY_FRACTION = 0.01  # of the work is done twice: retries, and units that two workers do at once

_Row = tuple[NodeType, Work, Site, Estimate | None]

_BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """What is to be labelled."""

    num_videos: int
    bytes_per_video: float
    decode_factor: float
    """Decoding time of its videos / that of the measured ones."""
    notes: tuple[str, ...]
    """Where these come from."""


def load_rates(storage: Storage, uri: str) -> Rates:
    """What `kinoray bench --out` wrote.

    Raises:
        ConfigError: it is not JSON, or a rate is missing or cannot be.
        StorageError: it cannot be read.
    """
    data = storage.read(absolute(uri))
    try:
        record = parse_json(data)
    except ValueError as error:
        raise ConfigError(f"rates: {uri} is not JSON: {error}; take what kinoray bench --out wrote") from error
    return Rates.from_record(record, uri)


def layout(rates: Rates, node: NodeType, config: PlanConfig, library: Library) -> tuple[Work, Site, list[str]]:
    """How workers sit on a node: one a GPU with all cores to decode, or as many as were measured for its CPUs."""
    notes = []
    if node.gpus:
        seconds, note = gpu_seconds(rates, node.gpu, parse_gpu_rates(config.gpu_clips_per_s))
        notes.append(note)
        workers = node.gpus
        host_s = rates.model_cpu_s if rates.gpu else 0.0
        if not rates.gpu:
            notes.append(f"{node.name}: the CPU time that feeding a GPU takes was not measured and is left out")
        work = replace(
            work_of(rates, decoders=max(1, node.cpus // workers), threads=1), model_s=seconds, model_cpu_s=host_s
        )
    elif rates.gpu:
        raise ConfigError(
            f"rates: {config.rates} was measured with a GPU, so nothing is known of the model on the CPUs of node "
            f"{node.name}; measure again without --resources.gpus-per-worker"
        )
    else:
        workers = max(1, int(node.cpus // rates.cpus_per_worker))
        work = work_of(rates)
    work = replace(
        work,
        decode_cpu_s=work.decode_cpu_s * library.decode_factor / config.cpu_speed,
        model_cpu_s=work.model_cpu_s / config.cpu_speed,
        model_s=work.model_s / (1.0 if node.gpus else config.cpu_speed),
        bytes_per_video=library.bytes_per_video,
    )
    return work, Site(cores=node.cpus, workers=workers, bytes_per_s=node.gbit * _BYTES_PER_GBIT), notes


def plan(config: PlanConfig) -> dict[str, Any]:
    """Print nodes, hours and cost for each kind of node; the same as JSON to config.out.

    Raises:
        ConfigError: a setting, a node or the rates cannot be.
        StorageError: rates or catalog cannot be read.
        CatalogError: the catalog is none.
        JobError: no kind of node meets the deadline; the rest is printed and written all the same.
    """
    storage = Storage(config.storage)
    if config.out:
        require_file("out", config.out)
    nodes = [parse_node(text) for text in config.node]
    deadline_s = parse_duration(config.deadline)
    rates = load_rates(storage, config.rates)
    library = _library(storage, config, rates)
    measured = calibration(rates)
    plan_s, check_s = driver_seconds(rates)
    conditions = Conditions(
        node_start_s=_NODE_START_S,
        driver_s=rates.driver_s,
        actor_start_s=rates.actor_start_s,
        plan_s=plan_s,
        check_s=check_s,
        losses_per_node_hour=config.losses_per_node_hour,
        retry_fraction=_RETRY_FRACTION,
        head_room=_HEAD_ROOM,
        calibration=measured,
    )
    notes, rows = [*library.notes, *_notes(config, rates, measured)], []
    for node in nodes:
        work, site, more = layout(rates, node, config, library)
        notes += [note for note in more if note not in notes]
        least = rates.batch_size if node.gpus else 1
        found = fewest_nodes(work, site, conditions, library.num_videos, deadline_s, least_unit=least)
        rows.append((node, work, site, found))
    _print(config, rates, library, rows, notes)
    record = {
        "config": asdict(config),
        "rates": rates.to_record(),
        "library": asdict(library),
        "nodes": [_record(*row) for row in rows],
        "assumptions": notes,
    }
    if config.out:
        storage.put(absolute(config.out), json.dumps(record, indent=1).encode())
        print(f"plan: wrote {absolute(config.out)}", flush=True)
    if not any(found for *_, found in rows):
        raise JobError("no kind of node meets the deadline; give it more time, or nodes with more CPUs or GPUs")
    return record


def _library(storage: Storage, config: PlanConfig, rates: Rates) -> Library:
    """What is known of the library, and how its videos compare with the measured ones."""
    if config.catalog:
        catalog = catalog_of_source(storage, absolute(config.catalog))
        return _library_of(catalog, rates)
    num_videos, notes, factor = config.videos or 0, [], 1.0
    if config.mean_duration is not None:
        if rates.duration_s is None:
            raise ConfigError(
                f"mean_duration: {config.rates} does not know how long the measured videos were, so nothing can be "
                "scaled; leave mean_duration out if yours are as long, or measure again"
            )
        factor = config.mean_duration / rates.duration_s
        notes.append(
            f"bytes and decoding are the measured ones x {factor:.2f}: {config.mean_duration:g} s a video instead of "
            f"{rates.duration_s:.1f} s"
        )
    else:
        notes.append("videos are taken to be like the measured ones: in size, length and codec")
    return Library(
        num_videos=num_videos, bytes_per_video=rates.bytes_per_video * factor, decode_factor=factor, notes=tuple(notes)
    )


def _library_of(catalog: Catalog, rates: Rates) -> Library:
    table = catalog.table
    sizes = pc.coalesce(table.column("length"), table.column("size_bytes"))
    durations = table.column("duration_s")
    durations = durations.filter(pc.is_finite(durations))  # a table may hold any number
    mean_bytes, mean_s = pc.mean(sizes).as_py(), pc.mean(durations).as_py()
    factor, notes = 1.0, []
    if mean_bytes is None:
        notes.append("the catalog names no sizes: videos are taken to be as large as the measured ones")
        mean_bytes = rates.bytes_per_video
    if mean_s and rates.duration_s:
        factor = mean_s / rates.duration_s
    if abs(factor - 1) > 0.05:
        notes.append(f"decoding is the measured one x {factor:.2f}: videos of {mean_s:.1f} s, not {rates.duration_s} s")
    elif abs(mean_bytes / rates.bytes_per_video - 1) > 0.2:
        notes.append(
            f"videos have {format_bytes(mean_bytes)}, those measured {format_bytes(rates.bytes_per_video)}; decoding "
            "is not scaled by that"
        )
    return Library(num_videos=len(catalog), bytes_per_video=float(mean_bytes), decode_factor=factor, notes=tuple(notes))


def _notes(config: PlanConfig, rates: Rates, measured: float) -> list[str]:
    notes = [
        f"a CPU of a node is {config.cpu_speed:g} x a core of {rates.cpu} (cpu_speed)",
        f"{_HEAD_ROOM:.0%} of every rate is kept back; {_RETRY_FRACTION:.0%} of the work is done twice",
        f"a node takes {format_duration(_NODE_START_S)} to start, a worker {rates.actor_start_s:.0f} s (measured)",
        f"rates are x {measured:.2f}: what the measured job reached of what these formulas give for it",
    ]
    if config.losses_per_node_hour:
        notes.append(f"each node is lost {config.losses_per_node_hour:g} times an hour, and starts anew")
    else:
        notes.append("no node is lost (losses_per_node_hour; give it for spot nodes)")
    notes.append("units of work have the size that label gives them, for so many videos and workers")
    plan_s, check_s = driver_seconds(rates)
    if (plan_s, check_s) != (rates.plan_s, rates.check_s):
        notes.append(
            f"the driver takes {plan_s * 1e6:.1f} us a video and {check_s * 1e3:.1f} ms a unit, no more than it took "
            f"of a million (docs/capacity.md); with {many(rates.num_videos, 'video')} it was mostly starting"
        )
    if rates.num_videos < 100:
        notes.append(f"only {many(rates.num_videos, 'video')} measured; 256 or more make these figures steadier")
    return notes


def _record(node: NodeType, work: Work, site: Site, found: Estimate | None) -> dict[str, Any]:
    record: dict[str, Any] = {"node": asdict(node) | {"gbit": None if math.isinf(node.gbit) else node.gbit}}
    if found is None:
        return record | {"fits": False}
    return record | {
        "fits": True,
        **asdict(found),
        "bound": _bound(node, found),
        "workers": found.nodes * site.workers,
        "decoders_per_worker": work.decoders,
        "hours": found.wall_s / 3600,
        "usd": _usd(node, found),
        "flags": _flags(node, work, site, found),
    }


def _bound(node: NodeType, found: Estimate) -> str:
    if found.bound == "model":
        return f"GPU ({node.gpu})" if node.gpus else "CPU: the model"
    if found.bound == "decoders" and node.gpus:
        return "CPU: decoding"  # there are as many decoders as CPUs
    if found.bound == "cores":
        rest = "feeding the GPU" if node.gpus else "the model"
        return "CPU: decoding" if found.decode_share >= 0.5 else f"CPU: {rest}"
    return found.bound


def _usd(node: NodeType, found: Estimate) -> float | None:
    return None if node.usd_per_hour is None else node.usd_per_hour * found.nodes * found.wall_s / 3600


def _flags(node: NodeType, work: Work, site: Site, found: Estimate) -> str:
    """How `kinoray label` is told so."""
    gpus = f" --resources.gpus-per-worker {1 if node.gpus else 0}"
    return (
        f"--workers {found.nodes * site.workers} --resources.cpus-per-worker {node.cpus / site.workers:g}"
        f"{gpus if node.gpus else ''} --resources.decoders-per-worker {work.decoders}"
    )


def _print(config: PlanConfig, rates: Rates, library: Library, rows: Sequence[_Row], notes: Sequence[str]) -> None:
    size = format_bytes(library.num_videos * library.bytes_per_video)
    print(f"plan: {many(library.num_videos, 'video')}, {size}, within {config.deadline}")
    head = ("node", "nodes", "workers", "videos/s", "hours", "cost", "bound by")
    print("\n".join(table(map(_cells, rows), head=head, right=range(1, 6))))
    if any(found for *_, found in rows):
        print(f"\nplan: {_advice(rows)}")
    for node, work, site, found in rows:
        if found is not None:
            print(f"plan: {node.name}: kinoray label ... {_flags(node, work, site, found)}")
    print("\nassumed:")
    for note in notes:
        print(f"  - {note}")
    print(flush=True)


def _cells(row: _Row) -> Sequence[str]:
    node, _, site, found = row
    if found is None:
        why = "no number of nodes is enough: starting, planning and checking take too long"
        return node.name, "-", "-", "-", "-", "-", why
    usd = _usd(node, found)
    return (
        node.name,
        f"{found.nodes:,}",
        f"{found.nodes * site.workers:,}",
        f"{found.videos_per_s:,.1f}",
        f"{found.wall_s / 3600:,.2f}",
        "-" if usd is None else f"{usd:,.2f} usd",
        _bound(node, found),
    )


def _advice(rows: Sequence[_Row]) -> str:
    fitting = [(node, site, found) for node, _, site, found in rows if found is not None]
    priced = [(usd, node, found) for node, _, found in fitting if (usd := _usd(node, found)) is not None]
    if priced and len(priced) == len(fitting):
        usd, node, found = min(priced, key=lambda row: row[0])
        which = f"{found.nodes} x {node.name} is the cheapest" if len(fitting) > 1 else f"{found.nodes} x {node.name}"
        price = f", about {usd:,.2f} usd"
    else:
        node, _, found = min(fitting, key=lambda row: row[2].nodes)
        which, price = f"{found.nodes} x {node.name}", ""
    return f"{which}{price}, in {format_duration(found.wall_s)}; {_remedy(node, found)}"


def _remedy(node: NodeType, found: Estimate) -> str:
    if found.bound == "network":
        return "the nodes' network is the limit: take nodes with more Gbit/s, or smaller videos (pack --transcode)"
    if found.bound == "decoders" and not node.gpus:
        return "the decoders are the limit, not the cores: measure again with more --resources.decoders-per-worker"
    if found.bound == "model" and node.gpus:
        return "the GPUs are the limit"
    if found.decode_share < 0.5 and not node.gpus:
        return "the model is the limit: --inference.precision bf16, or a GPU, would help"
    share = f"decoding takes {found.decode_share:.0%} of the CPU time"
    return (
        f"{share}: nodes with more CPUs" + (" for each GPU" if node.gpus else "") + ", or pack --transcode, would help"
    )
