"""Starting and joining Ray."""

from typing import Any

import pytest
import ray

from kinoray.config import ResourcesConfig
from kinoray.errors import ClusterError
from kinoray.run.cluster import connect


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
