"""How many trials a cluster holds at a time: arithmetic, so that a sweep never waits for what cannot come.

Ray starts as many trials as it has room for their drivers, and their drivers need next to nothing: without this sum,
all CPUs could be given to workers whose decoders then wait for ever.
"""

from collections.abc import Mapping, Sequence

from kinoray.config.shared import ResourcesConfig
from kinoray.errors import ClusterError

__all__ = ["trials_at_once"]


def trials_at_once(nodes: Sequence[Mapping[str, float]], resources: ResourcesConfig) -> int:
    """How many trials fit on nodes with these resources (such as {"CPU": 8.0, "GPU": 1.0}), at least 1.

    A trial takes num_workers times cpus_per_worker CPUs and gpus_per_worker GPUs, each worker on one node, and
    decode_tasks times one CPU anywhere. Its driver waits for them and takes none.

    Raises:
        ClusterError: not even one fits; the message has the sum.
    """
    count = 0
    while _fits(nodes, resources, count + 1):
        count += 1
    if count:
        return count
    workers = resources.num_workers
    cpus = resources.cpus_per_worker
    gpus = resources.gpus_per_worker
    gpu_text = f" and {gpus:g} GPU" if gpus else ""
    total = f"{workers * cpus + resources.decode_tasks:g} CPU" + (f" and {workers * gpus:g} GPU" if gpus else "")
    have = [f"{node.get('CPU', 0.0):g} CPU" + (f" and {node.get('GPU', 0.0):g} GPU" if gpus else "") for node in nodes]
    raise ClusterError(
        f"resources: a trial takes {workers} workers x {cpus:g} CPU{gpu_text} + {resources.decode_tasks} CPU to decode "
        f"(its driver takes none) = {total}, each worker and decoder on one node, but the cluster has "
        f"{', '.join(have) or 'no nodes'}; lower resources.num_workers, cpus_per_worker or decode_tasks, or raise "
        "resources.local_cpus"
    )


def _fits(nodes: Sequence[Mapping[str, float]], resources: ResourcesConfig, trials: int) -> bool:
    """Whether all workers of so many trials find a place, and then all their decoders."""
    free_cpus = [node.get("CPU", 0.0) for node in nodes]
    free_gpus = [node.get("GPU", 0.0) for node in nodes]
    left = trials * resources.num_workers
    for index in range(len(nodes)):
        while left and _has(free_cpus[index], resources.cpus_per_worker):
            if not _has(free_gpus[index], resources.gpus_per_worker):
                break
            free_cpus[index] -= resources.cpus_per_worker
            free_gpus[index] -= resources.gpus_per_worker
            left -= 1
    decoders = sum(int(cpus + 1e-6) for cpus in free_cpus)
    return not left and decoders >= trials * resources.decode_tasks


def _has(free: float, wanted: float) -> bool:
    return free + 1e-6 >= wanted  # 10 x 0.1 is not 1
