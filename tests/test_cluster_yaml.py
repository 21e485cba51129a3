"""cluster.yaml passes Ray's own schema and launcher preparation, and keeps the cluster closed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def raw() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return content


def test_ray_accepts_the_file(raw: dict[str, Any]) -> None:
    validate_config(prepare_config(raw))


def test_ray_would_refuse_a_misspelt_key(raw: dict[str, Any]) -> None:
    raw["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(raw))


def test_the_cluster_is_closed_and_the_head_runs_no_work(raw: dict[str, Any]) -> None:
    for command in (raw["head_start_ray_commands"][-1], raw["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in raw["head_start_ray_commands"][-1]
    assert raw["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}


def test_no_key_is_written_in_the_file() -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "AWS_SECRET" not in text
    assert "AKIA" not in text
