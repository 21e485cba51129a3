"""deploy/grafana/kinoray.json shows every metric of kinoray, and none that does not exist.

Grafana itself is not part of these tests: the file's form is looked at as far as its parts refer to each other.
"""

import ast
import functools
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

from kinoray.catalog.rows import Refusal
from kinoray.label.times import LabelMetrics, UnitTimes
from kinoray.train.input import NoClip
from kinoray.train.recorder import TrainMetrics
from kinoray.train.runfolder import EpochRow
from ports import wait_until

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"Counter": "_total", "Gauge": "", "Histogram": "_bucket"}
"""Classes of ray.util.metrics, and what Prometheus appends to the name of such a metric."""


@pytest.fixture
def board() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "kinoray.json").read_text(encoding="ascii"))
    return content


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def names_in(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bray_\w+", text)}


@functools.cache
def registered() -> dict[str, set[str]]:
    """The metrics that kinoray's code makes, as Prometheus names them, with their tags."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "platform" / "kinoray").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        classes = {alias.name for node in imports if node.module == "ray.util.metrics" for alias in node.names}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in classes:
                name = ast.literal_eval(call.args[0])
                tags = next(ast.literal_eval(item.value) for item in call.keywords if item.arg == "tag_keys")
                found[f"ray_{name}{KINDS[call.func.id]}"] = set(tags)
    return found


def test_every_metric_of_kinoray_is_shown_and_no_other(board: dict[str, Any]) -> None:
    shown = {name for name in names_in(expressions(board)) if name.startswith("ray_kinoray_")}
    assert len(registered()) >= 8
    assert shown == set(registered())


def test_expressions_name_tags_that_the_metrics_have(board: dict[str, Any]) -> None:
    for expression in expressions(board):
        names = names_in([expression])
        tags = set().union(*(registered().get(name, set()) for name in names))
        if not tags:
            continue
        named = {tag.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for tag in group.split(",")}
        named |= set(re.findall(r"(\w+)=~?\"", expression))
        assert named <= tags, expression


def test_metrics_of_ray_are_those_of_its_own_dashboard(board: dict[str, Any]) -> None:
    source = Path(default_dashboard_panels.__file__).read_text(encoding="utf-8")
    known = names_in([source])
    variables = [item["definition"] for item in board["templating"]["list"] if "definition" in item]
    shown = {name for name in names_in([*expressions(board), *variables]) if not name.startswith("ray_kinoray_")}
    assert shown <= known
    assert shown >= {"ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_object_store_memory"}


def test_panels_are_whole_and_do_not_overlap(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells = {(y, x) for y in rows for x in columns}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        assert panel["type"] == "row" or panel["targets"]


def test_every_variable_that_is_used_is_there(board: dict[str, Any]) -> None:
    variables = {item["name"] for item in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(board)))
    assert used == variables
    assert not re.findall(r'"uid": "(?!kinoray"|\$\{datasource\})', json.dumps(board))  # no data source of somebody's


@pytest.mark.slow
def test_prometheus_sees_the_names_and_tags_of_the_dashboard(ray_local: None) -> None:
    unit = UnitTimes(counts={"labelled": 3}, reasons={"NotAVideo": 1}, seconds={"decode": 1.5}, prefetched=2.0)
    LabelMetrics("0123456789abcdef").add(unit)
    training = TrainMetrics("first")
    training.step(8, [NoClip(0, Refusal("decode", "NotAVideo", "no video"))])
    training.spent("decode", 1.5)
    numbers = dict.fromkeys(("lr", "videos_per_s", "decode_wait", "train_s", "decode_cpu_s", "epoch_s", "time_s"), 1.0)
    training.epoch(EpochRow(epoch=1, step=1, samples=8, quarantined=0, loss=0.5, **numbers))
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def text() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            content: str = answer.read().decode()
        return content

    wait_until(lambda: all(f"\n{name}{{" in text() for name in registered()), 60, "Ray exports the metrics")
    lines = text().splitlines()
    for name, tags in registered().items():
        line = next(line for line in lines if line.startswith(f"{name}{{"))
        assert all(f'{tag}="' in line for tag in tags), line
