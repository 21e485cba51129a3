"""Jobs on a cluster that has scaled to nothing: nodes come for them, and go when nobody needs them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoscaling import autoscaling_cluster
from kills_cluster import Cluster
from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.label.ledger import read_predictions
from kinoray.storage.objects import Storage
from label_models import save_untrained
from ports import wait_until
from small_sets import LABELS, colour_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
NODE_TYPES = {"decode": {"CPU": 2}, "gpu": {"CPU": 2, "GPU": 1}}
LIMIT_S = 400.0


@pytest.fixture(scope="module")
def cluster(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """At most two decode nodes and two GPU nodes, none at first."""
    with autoscaling_cluster(tmp_path_factory.mktemp("cluster"), NODE_TYPES, 2) as started:
        yield started


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos in `videos`, and a checkpoint in `run`."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "videos").mkdir()
    for seed in range(6):
        video = colour_video(LABELS[seed % len(LABELS)], seed, num_frames=12)
        (folder / "videos" / f"v{seed}.mp4").write_bytes(video)
    save_untrained(Storage(), str(folder / "run"), LABELS, CLIP, "label_models:mixing")
    return folder


def command_of(cluster: Cluster, library: Path, out: Path, *flags: str) -> list[str]:
    """`kinoray label` on the cluster, in units of one video."""
    command = [sys.executable, "-m", "kinoray", "label", str(library / "videos"), "--out", str(out)]
    command += ["--checkpoint", str(library / "run"), "--unit-size", "1", "--resources.decoders-per-worker", "1"]
    command += ["--allow-factory", "label_models:mixing"]
    return [*command, "--resources.address", cluster.address, *flags]


def run_label(cluster: Cluster, library: Path, out: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = command_of(cluster, library, out, *flags)
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_job_on_an_empty_cluster_brings_its_nodes_up_and_lets_them_go(
    cluster: Cluster, library: Path, tmp_path: Path
) -> None:
    """Four CPUs are two decode nodes; GPU nodes have CPUs, too, and stay off."""
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the cluster is empty")
    done = run_label(cluster, library, tmp_path, "--resources.num-workers", "2", "--resources.cpus-per-worker", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "resources: 2 workers x 2 CPU = 4 CPU, but the cluster has 0; waiting for nodes, " in done.stdout
    assert " decode starting" in done.stdout
    assert "gpu starting" not in done.stdout
    assert "resources: the nodes are there after " in done.stdout
    assert "6 inputs = 6 labelled + 0 quarantined + 0 skipped" in done.stdout
    assert read_predictions(Storage(), str(tmp_path)).num_rows == 6
    assert cluster.node_types() == ["decode", "decode"]
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the nodes go")


def test_what_a_killed_job_asked_for_goes_with_it(cluster: Cluster, library: Path, tmp_path: Path) -> None:
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the cluster is empty")
    flags = ("--resources.num-workers", "2", "--resources.cpus-per-worker", "2")
    with (tmp_path / "log").open("wb") as log:
        command = command_of(cluster, library, tmp_path / "out", *flags)
        driver = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: "decode" in cluster.node_types(), LIMIT_S, "a node comes")
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the nodes go")


def test_more_than_the_node_types_may_hold_is_refused_before_any_node_comes(
    cluster: Cluster, library: Path, tmp_path: Path
) -> None:
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the cluster is empty")
    done = run_label(cluster, library, tmp_path, "--resources.num-workers", "9")
    assert done.returncode == 1
    assert "ClusterError: resources: 9 workers x 1 CPU = 9 CPU, but the cluster has 0; its autoscaler" in done.stderr
    assert "raise max_workers of its node types" in done.stderr
    assert not cluster.node_types()


@pytest.mark.parametrize(
    ("wait_s", "said"),
    [("0", "and resources.wait_for_nodes_s is 0"), ("0.1", "within resources.wait_for_nodes_s, 0 s")],
)
def test_a_job_that_may_not_wait_so_long_is_refused(
    cluster: Cluster, library: Path, tmp_path: Path, wait_s: str, said: str
) -> None:
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the cluster is empty")
    done = run_label(cluster, library, tmp_path, "--resources.wait-for-nodes-s", wait_s)
    assert done.returncode == 1
    assert "ClusterError: resources: 2 workers x 1 CPU = 2 CPU, but the cluster has 0" in done.stderr
    assert said in done.stderr


def test_a_task_with_a_gpu_brings_a_gpu_node_up(cluster: Cluster) -> None:
    """The GPU is Ray's word alone: no CUDA runs."""
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the cluster is empty")
    task = (
        "import os, ray; ray.init(address=os.environ['ADDRESS'], log_to_driver=False);"
        "task = ray.remote(num_gpus=1)(lambda: os.environ['CUDA_VISIBLE_DEVICES']);"
        "print('GPU', ray.get(task.remote()))"
    )
    environment = {**cluster.environment, "ADDRESS": cluster.address}
    done = subprocess.run(
        [sys.executable, "-c", task], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "GPU 0" in done.stdout
    assert cluster.node_types() == ["gpu"]
    wait_until(lambda: not cluster.node_types(), LIMIT_S, "the node goes")
