"""Nodes that a cluster's autoscaler starts for a job: asked for, waited for, and given up where they cannot come.

What is easy to break: what is asked for must end with the job. `ray.autoscaler.sdk.request_resources` is one slot for
the whole cluster: it would replace what others asked for, and hold paid nodes after a driver was killed. A placement
group is the job's own, and goes with it.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply, NodeStatus
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util import placement_group, remove_placement_group

from kinoray.console import format_duration

__all__ = ["bring_nodes", "has_autoscaler", "refuses", "starting"]

_POLL_S = 1.0
_LINE_S = 30.0
_ANSWER_S = 10.0
_REFUSED_S = 10.0  # a refusal that lasts: while nodes end, their places are not free yet


def has_autoscaler() -> bool:
    """Whether something starts and ends nodes of the joined cluster: such nodes carry an id of their provider."""
    nodes = _status().cluster_resource_state.node_states
    return any(node.instance_id for node in nodes if node.status != NodeStatus.DEAD)


def bring_nodes(bundles: Sequence[Mapping[str, float]], shortage: Callable[[], str], *, limit_s: float) -> str:
    """Have the autoscaler start nodes that hold these bundles, such as {"CPU": 1.0}; waits while `shortage` says more.

    What the nodes have is free again on return: the job takes it from there.

    Returns:
        "" once there is no shortage, else why it is not waited for any longer.
    """
    claim = placement_group([{kind: count for kind, count in bundle.items() if count} for bundle in bundles])
    try:
        return _wait(claim.id.hex(), shortage, limit_s)
    finally:
        remove_placement_group(claim)


def _wait(claim: str, shortage: Callable[[], str], limit_s: float) -> str:
    begun, said, said_s = time.monotonic(), "", -_LINE_S
    held_s = begun  # when the autoscaler last seemed to be able to
    while missing := shortage():
        state = _status().autoscaling_state
        now = time.monotonic()
        if not refuses(state, claim) or _others_work():
            held_s = now
        if now - held_s > _REFUSED_S:
            return (
                "its autoscaler may not start the nodes for that; raise max_workers of its node types, or ask for less"
            )
        if now - begun > limit_s:
            return (
                f"nodes did not come within resources.wait_for_nodes_s, {format_duration(limit_s)} "
                f"({starting(state)}); `ray status` on the head says more; the same command tries again"
            )
        line = f"{missing}; waiting for nodes, {starting(state)}"
        if line != said or now - said_s >= _LINE_S:
            print(f"{line} ({format_duration(now - begun)} of {format_duration(limit_s)})", flush=True)
            said, said_s = line, now
        time.sleep(_POLL_S)
    if said:
        print(f"resources: the nodes are there after {format_duration(time.monotonic() - begun)}", flush=True)
    return ""


def refuses(state: AutoscalingState, claim: str) -> bool:
    """Whether the autoscaler has found that it may start no nodes that hold the placement group with this id."""
    return any(claim in request.details for request in state.infeasible_gang_resource_requests)


def starting(state: AutoscalingState) -> str:
    """What the autoscaler is about, in words: `2 decode starting`, `none starting, gpu failed: no capacity`."""
    types = Counter(node.ray_node_type_name for node in state.pending_instances)
    for request in state.pending_instance_requests:
        types[request.ray_node_type_name] += request.count
    named = ", ".join(f"{count} {name}" for name, count in sorted(types.items())) or "none"
    failed = [f", {one.ray_node_type_name} failed: {one.reason}" for one in state.failed_instance_requests]
    return f"{named} starting{''.join(failed[-1:])}"


def _others_work() -> bool:
    """Whether other jobs hold something now: what they give back may be what is missing."""
    free = ray.available_resources()
    return any(free.get(kind, 0.0) < count for kind, count in ray.cluster_resources().items() if kind in ("CPU", "GPU"))


def _status() -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_ANSWER_S))
    return reply
