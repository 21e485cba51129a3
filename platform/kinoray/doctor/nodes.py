"""What each node of a cluster has, asked from inside: `python -m kinoray.doctor.nodes`, as a job.

What is easy to break: the job holds this file and kinoray.doctor.host, nothing else of kinoray, so it imports no more.
"""

import json
import logging
import time
from pathlib import PurePosixPath
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kinoray.doctor.host import host_facts

__all__ = ["MARK", "main"]

MARK = "kinoray-doctor: "
"""Begins the line with the answer, which is JSON."""

_ANSWER_S = 60.0
_HEAD = "node:__internal_head__"


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator, unused-ignore]
def _look(ray_folder: str) -> dict[str, Any]:
    return {**host_facts(ray_folder), "time_s": time.time()}


def main() -> None:
    """Run a task on every node that is alive, and print what they say."""
    now_s = time.time()
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked_s = time.time()
    tasks = [_ask(node) for node in nodes]
    ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_ANSWER_S)
    answers = [_answer(node, task if task in ready else None) for node, task in zip(nodes, tasks, strict=True)]
    print(MARK + json.dumps({"time_s": now_s, "asked_s": asked_s, "answered_s": time.time(), "nodes": answers}))


def _ask(node: dict[str, Any]) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    folder = str(PurePosixPath(node["ObjectStoreSocketName"]).parents[1])  # above SESSION/sockets
    return _look.options(scheduling_strategy=strategy).remote(folder)


def _answer(node: dict[str, Any], task: Any) -> dict[str, Any]:
    resources = node["Resources"]
    about = {
        "address": node["NodeManagerAddress"],
        "is_head": _HEAD in resources,
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "object_store_bytes": resources.get("object_store_memory", 0.0),
        "facts": None,
        "error": f"no task has run there in {_ANSWER_S:g} s",
    }
    if task is None:
        return about
    try:
        return {**about, "facts": ray.get(task), "error": ""}
    except ray.exceptions.RayError as error:
        return {**about, "error": " ".join(str(error).split())[:300]}


if __name__ == "__main__":
    main()
