"""Starting and joining Ray."""

from typing import Any

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from kinoray.cluster.connect import connect, has_autoscaler, refuses, require_fit, shortage, starting
from kinoray.config.shared import ResourcesConfig
from kinoray.errors import ClusterError, ConfigError


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("", "Ray does not start on this machine: The current node timed out", id="own"),
        pytest.param("10.0.0.1:1", "resources.address '10.0.0.1:1' cannot be joined: The current node", id="joined"),
    ],
)
def test_a_node_that_does_not_start_is_a_cluster_error(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times_out(**_: Any) -> None:  # what ray.init did on an overloaded machine; it cannot be provoked at will
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", times_out)
    with pytest.raises(ClusterError, match=message):
        connect(ResourcesConfig(address=address))


@pytest.mark.parametrize(
    ("gpus", "decode_cpus", "have", "expected"),
    [
        pytest.param(0, 0, {"CPU": 6.0}, "", id="just fits"),
        pytest.param(0, 0, {"CPU": 5.5}, "4 workers x 1.5 CPU = 6 CPU, but the cluster has 5.5", id="CPUs"),
        pytest.param(
            0, 2, {"CPU": 6.0}, "4 workers x 1.5 CPU + 2 to decode = 8 CPU, but the cluster has 6", id="decode"
        ),
        pytest.param(0.5, 0, {"CPU": 9.0}, "4 workers x 0.5 GPU = 2 GPU, but the cluster has 0", id="GPUs"),
        pytest.param(0.5, 0, {"CPU": 6.0, "GPU": 2.0}, "", id="GPUs fit"),
        pytest.param(0, 0, {}, "4 workers x 1.5 CPU = 6 CPU, but the cluster has 0", id="a head alone"),
    ],
)
def test_the_sum_names_what_is_missing(gpus: float, decode_cpus: float, have: dict[str, float], expected: str) -> None:
    config = ResourcesConfig(num_workers=4, cpus_per_worker=1.5, gpus_per_worker=gpus)
    assert shortage(config, have, decode_cpus=decode_cpus).removeprefix("resources: ") == expected


def test_one_worker_is_one_worker() -> None:
    config = ResourcesConfig(num_workers=1, cpus_per_worker=8)
    assert shortage(config, {"CPU": 4.0}) == "resources: 1 worker x 8 CPU = 8 CPU, but the cluster has 4"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("address", "remedy"),
    [("", "lower resources.num_workers or raise resources.local_cpus"), ("here", "lower resources.num_workers or add")],
)
def test_a_cluster_without_an_autoscaler_has_what_it_has(ray_local: None, address: str, remedy: str) -> None:
    assert not has_autoscaler()
    with pytest.raises(ClusterError, match=rf"9 workers x 1 CPU = 9 CPU, but the cluster has 4; {remedy}"):
        require_fit(ResourcesConfig(address=address, num_workers=9))


def test_what_the_autoscaler_is_about_is_said_in_words() -> None:
    state = AutoscalingState()
    assert starting(state) == "none starting"
    state.pending_instance_requests.add(ray_node_type_name="gpu", count=3)
    for name in ("decode", "gpu", "decode"):
        state.pending_instances.add(ray_node_type_name=name)
    assert starting(state) == "2 decode, 4 gpu starting"
    state.failed_instance_requests.add(ray_node_type_name="gpu", count=1, reason="no capacity")
    assert starting(state) == "2 decode, 4 gpu starting, gpu failed: no capacity"


def test_a_refusal_counts_for_the_placement_group_that_it_names() -> None:
    state = AutoscalingState()
    state.infeasible_gang_resource_requests.add(details="5f0c01:PACK|PENDING")
    assert refuses(state, "5f0c01")
    assert not refuses(state, "5f0c02")


def test_the_time_to_wait_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"resources\.wait_for_nodes_s must be at least 0"):
        ResourcesConfig(wait_for_nodes_s=-1)
