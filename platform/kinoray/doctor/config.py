"""Config tree of the verb `doctor`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from kinoray.config.shared import ClipConfig, JobConfig, require
from kinoray.console import many

__all__ = [
    "Check",
    "DoctorConfig",
    "Section",
    "Status",
    "Warn",
    "checked",
    "clock_check",
    "over_nodes",
    "spread",
]

Status = Literal["ok", "warning", "wrong"]
_RISING: tuple[Status, ...] = ("ok", "warning", "wrong")
_SHOWN_NODES = 3
_SKEW_S = 5.0
_MOST_SKEW_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(JobConfig):
    """Say what is wrong with a set of videos, a machine, a store or a cluster, before money is spent.

    Example: kinoray doctor s3://bucket/library/ --out s3://bucket/checkup

    Example: kinoray doctor --bucket s3://bucket/prefix --address http://head:8265

    With SOURCE, its videos: everything is listed; a sample (by a hash of the names, so the same each time) is read and
    probed, and some of that is decoded, on this machine and without Ray. Without, this machine: versions, GPUs,
    decoders, memory, disk. With --bucket, what a store promises, tried in a folder that is removed again; with
    --address, a cluster and each of its nodes.

    Exits with 1 if a check is wrong, or more than max_bad_fraction of the sample is bad.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = ""
    """A folder or s3:// prefix of videos, a CSV, a pack's folder or a catalog (.parquet). Default: none, and this
    machine is examined."""
    bucket: Annotated[str, tyro.conf.arg(aliases=["--storage"], metavar="URI")] = ""
    """Folder or s3:// prefix that jobs will write to, whose semantics are tried. Default: none."""
    address: str = ""
    """Cluster to examine, in the forms that submit takes: http://HOST:8265, HOST:PORT of its GCS, auto. Default: none
    with SOURCE; without it, RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, if one is set."""
    out: str = ""
    """Folder or s3:// prefix for doctor.json (everything, and more than is printed) and bad.parquet. Default: none."""
    sample: int = 500
    """Videos that are read whole and probed; 0 for all."""
    decode_sample: int = 20
    """Probed videos that are decoded for the estimate of the cost, spread over codecs and sizes; 0 for none."""
    clip: ClipConfig = field(default_factory=lambda: ClipConfig().without_flow())
    """What would be decoded: frames, sizes, limits; with --clip.flow.estimator dis flow, too, as networks with a flow
    stream need it."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        is_known = self.bucket.startswith("s3://") or "://" not in self.bucket
        require(is_known, "bucket", "s3://bucket/prefix or a folder", self.bucket)
        for name in ("sample", "decode_sample"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Warn:
    """Something that a user should know before a job is started."""

    found: str
    """What was found, with numbers."""
    remedy: str
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried, and what came of it."""

    name: str
    """What was tried."""
    status: Status
    """`warning`: jobs run, but worse than they could; `wrong`: they fail, or lose what kinoray promises."""
    found: str
    """What was found, with numbers."""
    remedy: str = ""
    """What to do about it; empty where all is well."""

    def __str__(self) -> str:
        return f"{self.status:<9}{self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What one check found."""

    name: str
    """Its key in doctor.json."""
    values: dict[str, Any]
    """The numbers, as JSON."""
    lines: tuple[str, ...] = ()
    """The same for people."""
    warnings: tuple[Warn, ...] = ()
    """What needs attention."""
    checks: tuple[Check, ...] = ()
    """What was tried; the wrong ones fail the checkup."""


def checked(name: str, checks: Sequence[Check], **values: Any) -> Section:
    """A section of checks: a line each, and in its values the list `checks` beside those given."""
    lines = tuple(map(str, checks))
    return Section(name=name, values={**values, "checks": [*map(asdict, checks)]}, lines=lines, checks=tuple(checks))


def clock_check(said_s: float, before_s: float, after_s: float) -> Check:
    """Whether a clock that said `said_s` was right, if it was asked between two times of another clock."""
    skew_s = min(0.0, said_s - before_s) or max(0.0, said_s - after_s)
    if not skew_s:
        return Check("clock", "ok", "agrees with this machine's")
    status = _RISING[(abs(skew_s) > _SKEW_S) + (abs(skew_s) > _MOST_SKEW_S)]
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    remedy = "set all clocks by NTP: `runs` and signed requests compare the times of machines"
    return Check("clock", status, text, "" if status == "ok" else remedy)


def over_nodes(nodes: Mapping[str, Sequence[Check]]) -> list[Check]:
    """The same checks on many nodes (name -> checks) as one line each: the worst, and where that is."""
    by_name: dict[str, list[tuple[str, Check]]] = {}
    for node, checks in nodes.items():
        for check in checks:
            by_name.setdefault(check.name, []).append((node, check))
    merged = []
    for name, found in by_name.items():
        status = max((check.status for _, check in found), key=_RISING.index)
        worst = [(node, check) for node, check in found if check.status == status]
        if status == "ok":
            text, count = Counter(check.found for _, check in found).most_common(1)[0]
            same = "" if count == len(found) else f"such as {text}"
            merged.append(Check(name, status, f"{many(len(found), 'node')}: {same or text}"))
            continue
        shown = ", ".join(f"{node}: {check.found}" for node, check in worst[:_SHOWN_NODES])
        more = ", ..." if len(worst) > _SHOWN_NODES else ""
        text = f"{len(worst)} of {many(len(found), 'node')} ({shown}{more})"
        merged.append(Check(name, status, text, worst[0][1].remedy))
    return merged


def spread(values: Sequence[float]) -> dict[str, float]:
    """Count, minimum, median, mean, 95th percentile, maximum and sum; of nothing: only the count."""
    if not len(values):
        return {"count": 0}
    array = np.asarray(values, np.float64)
    low, median, p95, high = np.percentile(array, [0, 50, 95, 100])
    numbers = {"min": low, "median": median, "mean": array.mean(), "p95": p95, "max": high, "sum": array.sum()}
    return {"count": len(array), **{name: float(number) for name, number in numbers.items()}}
