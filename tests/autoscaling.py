"""A Ray that starts and ends nodes by itself: Ray's own fake provider, whose nodes are raylets of this machine.

Ray's wheel lacks the provider's example file, so `type: fake_multinode` fails: it is named as an external one.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kills_cluster import Cluster
from ports import free_port

__all__ = ["autoscaling_cluster"]

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # the provider's name of the head
_STORE_BYTES = 80_000_000
_IDLE_S = 15.0


def _config(port: int, node_types: Mapping[str, Mapping[str, float]], max_workers: int) -> dict[str, Any]:
    """What cluster.yaml is, for the fake provider: at most `max_workers` nodes of each type, none at first."""
    types = {
        name: {
            "resources": {**resources, "object_store_memory": _STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": max_workers,
        }
        for name, resources in node_types.items()
    }
    return {
        "cluster_name": "kinoray",
        "max_workers": max_workers * len(types),
        "idle_timeout_minutes": _IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "head_node_id": _HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **types,
        },
        "head_node_type": "ray.head.default",
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        **{"auth": {}, "docker": {}, "file_mounts": {}, "initialization_commands": [], "cluster_synced_files": []},
    }


@contextmanager
def autoscaling_cluster(
    logs: Path, node_types: Mapping[str, Mapping[str, float]], max_workers: int
) -> Iterator[Cluster]:
    """A closed cluster of a head alone, for the time of the block; nodes of these types come and go.

    Args:
        node_types: name -> resources, such as {"gpu": {"CPU": 2, "GPU": 1}}.
        max_workers: nodes of each type, at most.
    """
    folder, port = Path(tempfile.mkdtemp(prefix="kr-")), free_port()
    file = folder / "cluster.json"
    file.write_text(json.dumps(_config(port, node_types, max_workers)))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    cluster = Cluster(folder, logs, port, [f"--autoscaling-config={file}"], environment)
    try:
        cluster.wait_nodes()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
