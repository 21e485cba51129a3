"""The sweep's cache of decoded frames: which samplings share it, and its end on every node."""

import shutil
from collections.abc import Iterable
from dataclasses import replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kinoray.config.shared import digest
from kinoray.train.config import TrainConfig
from kinoray.tune.space import Settings, apply
from kinoray.video.cache import cache_folder, grid_name

__all__ = ["drop_cache", "shared_cache"]

_MAX_GRIDS = 8  # more than that read together would be most frames of a video


def shared_cache(base: TrainConfig, trials: Iterable[Settings]) -> TrainConfig:
    """The settings of all trials with a cache of the sweep's own, which serves all their samplings at once."""
    grids = sorted({grid_name(apply(base, settings).clip.sample) for settings in trials})
    folder = str(cache_folder(base.cache) / digest(base.out))
    shared = tuple(grids) if len(grids) <= _MAX_GRIDS else ()
    return replace(base, cache=replace(base.cache, folder=folder, grids=shared))


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def drop_cache(base: TrainConfig) -> None:
    """Delete the cache on every node that is there; needs a Ray that is connected."""
    remove = ray.remote(num_cpus=0)(_remove)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node_id=node, soft=True) for node in nodes]
    ray.get([remove.options(scheduling_strategy=place).remote(base.cache.folder) for place in strategies])
