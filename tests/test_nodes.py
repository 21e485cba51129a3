"""Jobs on a cluster of several nodes: one node is killed whole in the middle of each, and another one joins.

The head has no CPUs, each worker node has two, and a token keeps the cluster closed. A job's workers take more than
half a node each, so they are on different nodes. A gate before the store holds each job in its middle until the node
is dead and the other one has joined.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest

from conftest import bucket_at, config_at
from faulty_s3 import FaultyS3, Request, faulty_s3
from kills import Driver
from kills_cluster import Cluster, ray_cluster
from kinoray.catalog.rows import load_quarantine
from kinoray.catalog.table import load_catalog
from kinoray.config.file import to_yaml
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    ResourcesConfig,
    SampleConfig,
    StorageConfig,
    TrainResourcesConfig,
    ViewConfig,
    WorkersConfig,
)
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.verb import label
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.verb import train
from kinoray.tune.config import TuneConfig
from label_models import save_untrained
from small_sets import LABELS, colour_set, colour_video
from test_resume import assert_bit_for_bit, curve_of
from tiny_models import OWN_NETWORKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))
A_NODE_EACH = ResourcesConfig(num_workers=2, cpus_per_worker=1.5, decoders_per_worker=1)
NUM_VIDEOS = 24
BROKEN = 5
LIMIT_S = 500.0

Config = TypeVar("Config", PackConfig, TrainConfig, TuneConfig, LabelConfig)


class Gate:
    """Lets the first writes of a job pass and holds those after them. It is a `FaultyS3.before`.

    Args:
        path: what the path of a write that counts holds.
        num_free: how many pass at once.
    """

    def __init__(self, path: str, num_free: int) -> None:
        self._path, self._free = path, threading.Semaphore(num_free)
        self._is_open = threading.Event()
        self.is_reached = threading.Event()

    def __call__(self, request: Request) -> None:
        counts = request.method == "PUT" and self._path in request.path
        if counts and not self._free.acquire(blocking=False):
            self.is_reached.set()
            self._is_open.wait()

    def open(self) -> None:
        """Let all pass, also what is held."""
        self._is_open.set()


@pytest.fixture(scope="module")
def server(s3_server: str) -> StorageConfig:
    return config_at(s3_server)


@pytest.fixture(scope="module")
def base(s3_server: str, server: StorageConfig) -> str:
    """A bucket with `videos`, one of them broken, `list.csv` (eight splits: a shard each), `set` and `run`."""
    uri, storage = bucket_at(s3_server), Storage(server)
    rows = ["path,label,split"]
    for number in range(NUM_VIDEOS):
        name = LABELS[number % len(LABELS)]
        data = colour_video(name, number) if number != BROKEN else bytes(2000)
        storage.put(join(uri, "videos", f"v{number:02d}.mp4"), data)
        rows.append(f"videos/v{number:02d}.mp4,{name},s{number % 8}")
    storage.put(join(uri, "list.csv"), "\n".join(rows).encode())
    colour_set(storage, join(uri, "set"), train=17, val=6, broken=(4,))
    save_untrained(storage, join(uri, "run"), LABELS, CLIP, "label_models:mixing")
    return uri


@pytest.fixture(scope="module")
def cluster(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and three worker nodes of two CPUs."""
    with ray_cluster(tmp_path_factory.mktemp("cluster"), 3) as started:
        yield started


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as started:
        yield started


def lose_a_node(cluster: Cluster, proxy: FaultyS3, config: Config, folder: Path, gate: Gate, work: str) -> str:
    """Run `kinoray VERB` on the cluster; once the gate holds it, kill a node that has `work`, and have another join.

    Returns:
        What the command said.
    """
    proxy.before = gate
    file = folder / "asked.yaml"
    verb = type(config).__name__.removesuffix("Config").lower()
    file.write_text(to_yaml(replace(config, storage=replace(config.storage, endpoint_url=proxy.url))))
    command = [sys.executable, "-m", "kinoray", verb, "--config", str(file)]
    driver = Driver([*command, "--resources.address", cluster.address], cluster.environment, folder)
    try:
        assert gate.is_reached.wait(LIMIT_S), f"the job wrote little: {driver.said()[-4000:]}"
        killed = cluster.kill_node(work)
        assert any("/raylet/raylet" in title for title in killed)
        cluster.add_node()
        cluster.wait_nodes()
        driver.check_runs()
        gate.open()
        return driver.finish(LIMIT_S)
    finally:
        gate.open()
        driver.close()


def elsewhere(config: Config, name: str) -> Config:
    """The same job with another output beside the first."""
    return replace(config, out=join(config.out.rpartition("/")[0], name))


def test_pack_loses_a_node(
    cluster: Cluster, base: str, server: StorageConfig, proxy: FaultyS3, ray_local: None, tmp_path: Path
) -> None:
    storage = Storage(server)
    resources = WorkersConfig(num_workers=2, cpus_per_worker=1.5)
    calm = PackConfig(source=join(base, "list.csv"), out=join(base, "calm-set"), storage=server, resources=resources)
    pack(calm)
    config = elsewhere(calm, "set-of-nodes")
    said = lose_a_node(cluster, proxy, config, tmp_path, Gate("/shards/", 4), "ray::_pack_task")
    assert f"{NUM_VIDEOS - 1} packed" in said
    assert objects_of(storage, config.out) == objects_of(storage, calm.out)
    assert packed_rows(storage, config.out) == packed_rows(storage, calm.out)
    assert [one.video_id for one in load_quarantine(storage, join(config.out, "quarantine.parquet"))] == [
        one.video_id for one in load_quarantine(storage, join(calm.out, "quarantine.parquet"))
    ]


def objects_of(storage: Storage, out: str) -> dict[str, bytes]:
    """Name -> bytes of every shard."""
    tars = [info.uri for info in storage.list(join(out, "shards") + "/") if info.uri.endswith(".tar")]
    assert tars
    return {uri.rpartition("/")[2]: storage.read(uri) for uri in tars}


def packed_rows(storage: Storage, out: str) -> list[dict[str, Any]]:
    """The rows of a pack's catalog, with the shard's name in place of its uri."""
    rows = load_catalog(storage, out).table.to_pylist()
    return [row | {"uri": row["uri"].removeprefix(out)} for row in rows]


def test_train_loses_a_node(
    cluster: Cluster, base: str, server: StorageConfig, proxy: FaultyS3, ray_local: None, tmp_path: Path
) -> None:
    """Dropout, batch norm, two ranks: the loss of every step and all weights are those of a laptop, to the last bit."""
    calm = train_config(base, server)
    train(calm)
    config = elsewhere(calm, "run-of-nodes")
    said = lose_a_node(cluster, proxy, config, tmp_path, Gate("/checkpoints/", 9), "ray::RayTrainWorker")
    assert "2 workers start on cpu after step " in said
    assert_bit_for_bit(curve_of(config), curve_of(calm))


def train_config(base: str, server: StorageConfig) -> TrainConfig:
    return TrainConfig(
        catalog=join(base, "set"),
        out=join(base, "calm-run"),
        clip=CLIP,
        val_split="",
        model=ModelConfig(factory="tiny_models:mortal", options={"dropout": 0.25, "batch_norm": True}),
        optim=OptimConfig(epochs=3, batch_size=4, lr=0.05),
        checkpoint_every_steps=1,
        storage=server,
        resources=TrainResourcesConfig(num_workers=2, cpus_per_worker=1.5, decode_tasks=1),
    )


def test_label_loses_a_node(
    cluster: Cluster, base: str, server: StorageConfig, proxy: FaultyS3, ray_local: None, tmp_path: Path
) -> None:
    storage = Storage(server)
    calm = LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=join(base, "videos"),
        checkpoint=join(base, "run"),
        out=join(base, "calm-labels"),
        unit_size=2,
        storage=server,
        resources=A_NODE_EACH,
    )
    label(calm)
    config = elsewhere(calm, "labels-of-nodes")
    said = lose_a_node(cluster, proxy, config, tmp_path, Gate("/parts/", 4), "LabelWorker")
    assert f"{NUM_VIDEOS} inputs = {NUM_VIDEOS - 1} labelled + 1 quarantined + 0 skipped" in said
    found, expected = (table_of(storage, one.out) for one in (config, calm))
    assert len(set(found.column("row_key").to_pylist())) == found.num_rows == NUM_VIDEOS
    assert found.equals(expected)


def table_of(storage: Storage, out: str) -> pa.Table:
    """The rows of a job, without what names its run."""
    return read_predictions(storage, out).drop_columns(["run_id"]).sort_by("video_id").combine_chunks()


def test_tune_loses_a_node(cluster: Cluster, base: str, server: StorageConfig, proxy: FaultyS3, tmp_path: Path) -> None:
    """Three trials of two CPUs at a time: when a node goes, the trial on it needs the node that joins."""
    config = TuneConfig(
        catalog=join(base, "set"),
        out=join(base, "sweep"),
        clip=CLIP,
        model=ModelConfig(factory="tiny_models:mean_colour"),
        optim=OptimConfig(epochs=2, batch_size=8),
        space={"optim.lr": "0.001,0.01,0.05"},
        search="grid",
        grace_epochs=2,
        storage=server,
        resources=TrainResourcesConfig(num_workers=1, decode_tasks=1),
    )
    said = lose_a_node(cluster, proxy, config, tmp_path, Gate("/checkpoints/", 2), "ray::RayTrainWorker")
    assert "tune: 3 trials (3 finished)" in said
