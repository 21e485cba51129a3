"""Config trees of the verbs `bench` and `plan`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from kinoray.config.scoring import LabelWorkConfig
from kinoray.config.shared import StoreConfig, require

__all__ = ["BenchConfig", "PlanConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig(LabelWorkConfig):
    """Say how fast this machine could label your videos, how fast `kinoray label` does, and what to change.

    Example: kinoray bench s3://bucket/library/ --checkpoint s3://bucket/runs/first --out rates.json

    In one run, on some of the videos: decoding alone, the model alone (both without Ray, with as many processes and
    threads as the job has), and the whole Ray job. The job is held against two figures:

      min(both)      the slower of the two loops, each with all the cores: reached only if the model has a GPU
      shared cores   cores / (CPU seconds to decode + CPU seconds of the model): all that a CPU-only job can reach

    rates.json is what `kinoray plan` turns into nodes, hours and cost. It measures the machine that it runs on, so run
    it on a node like those of the cluster (also with --resources.gpus-per-worker 1), and on nothing else meanwhile.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CATALOG")]
    """What `kinoray label` takes: a catalog (folder of a pack, or .parquet), or a folder or s3:// prefix of videos."""
    out: str = ""
    """File or s3:// object for the measured rates, as JSON. Default: they are printed only."""
    videos: int = 256
    """Videos that are measured, spread evenly over the catalog; all of them if there are fewer."""

    def __post_init__(self) -> None:
        LabelWorkConfig.__post_init__(self)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        least = 3 * self.resources.num_workers
        require(self.videos >= least, "videos", f"at least 3 a worker ({least})", self.videos)
        require(
            not self.resources.address,
            "resources.address",
            "left out: the loops and the job must share one machine; run this on a node of the cluster",
            self.resources.address,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(StoreConfig):
    """Say how many nodes of which kind label a library by a deadline, for how many hours, and what that costs.

    Example: kinoray plan --catalog s3://bucket/library/ --rates rates.json --deadline 24h
             --node big:16cpu,1xH100,25gbit,4.10usd small:16cpu,0.50usd

    Without a catalog: kinoray plan --videos 5000000 --mean-duration 10 --rates rates.json --node cpu:32cpu,1.2usd

    The rates come from `kinoray bench`, run on a machine like the nodes. Everything that is assumed beside them
    (CPU speed, starts, losses, head-room) is printed with the result. Start-up, reading of the result by the driver,
    and the network of each node are in the hours; prices count from when the nodes are asked for.
    """

    rates: str
    """What `kinoray bench --out` wrote (a file or an s3:// object)."""
    node: tuple[str, ...]
    """Kinds of nodes, each NAME:PART,PART...: 16cpu, 1xH100 (GPUs), 25gbit (network), 4.10usd (an hour). Only cpu is
    needed."""
    catalog: str = ""
    """The library: anything that `kinoray label` takes. Its sizes are taken from it."""
    videos: int | None = None
    """Videos of the library, instead of a catalog."""
    mean_duration: float | None = None
    """Their mean length in seconds. Bytes and decoding are scaled by it, which needs to be known of the measured ones,
    too. Default: as long as those that were measured."""
    deadline: str = "24h"
    """Time from asking for the nodes to the finished table: 90min, 24h, 2d."""
    losses_per_node_hour: float = 0.0
    """How often an hour a node is taken away (spot: 0.05 is once in 20 hours); another one then starts."""
    cpu_speed: float = 1.0
    """How fast a CPU of the nodes is, as a multiple of a core of the machine that was measured (cloud vCPUs are mostly
    half a core: measure on one)."""
    gpu_clips_per_s: tuple[str, ...] = ()
    """Clips a second of one GPU, measured elsewhere: H100=180 L4=21. Without it a GPU's rate comes from rates.json, if
    those were taken on a GPU; on another kind of GPU they are scaled by published TFLOPS, and that is said."""
    out: str = ""
    """File or s3:// object for the plan, as JSON. Default: it is printed only."""

    def __post_init__(self) -> None:
        require(bool(self.node), "node", "one or more kinds, like big:16cpu,1xH100,25gbit,4.10usd", self.node)
        both = bool(self.catalog) != (self.videos is not None)
        require(both, "catalog", "given, or videos instead of it (one of the two)", self.catalog)
        require(self.videos is None or self.videos >= 1, "videos", "at least 1", self.videos)
        if self.mean_duration is not None:
            require(self.mean_duration > 0, "mean_duration", "greater than 0", self.mean_duration)
            require(not self.catalog, "mean_duration", "left out with a catalog", self.mean_duration)
        require(self.losses_per_node_hour >= 0, "losses_per_node_hour", "at least 0", self.losses_per_node_hour)
        require(self.cpu_speed > 0, "cpu_speed", "greater than 0", self.cpu_speed)
