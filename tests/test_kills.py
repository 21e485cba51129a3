"""kinoray label under kill -9: decoders, model actors, raylets and the command itself, on a cluster of three raylets.

Counted is what the store was asked for, by a proxy before it. A video counts as decoded again for every time that its
bytes were fetched again, and once for every decoder that was killed: that is never less than what was decoded, since a
worker decodes nothing that it did not fetch, and a video whose decoder dies is tried once more without a fetch.
"""

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bombs import box
from conftest import bucket_at, config_at
from faulty_s3 import FaultyS3, faulty_s3
from kills import Driver, Gate, Reader, kill_while_labelling, member_reads
from kills_cluster import Cluster, ray_cluster
from kinoray.catalog.table import Catalog, save_catalog
from kinoray.config.shared import ClipConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import make_broken
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, find_labellings, read_predictions, read_windows
from kinoray.label.verb import label
from kinoray.storage.objects import Storage, join
from label_models import save_untrained
from small_sets import LABELS, catalog_of, colour_video
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
NUM_BASES = 24
NUM_FILES = 3  # of the catalog
SHARD_VIDEOS = 50
BROKEN = {17: "random", 37: "index_lost"}  # of each 40
MAX_REPEATED = 0.05


@dataclass(frozen=True)
class Library:
    """A packed set on a store."""

    uri: str
    catalog: Catalog
    members: dict[str, list[tuple[str, int, int]]]
    """Shard's name -> (video_id, offset, length) of each video."""

    @property
    def num_broken(self) -> int:
        """Videos that cannot be decoded."""
        return sum(number % 40 in BROKEN for number in range(len(self.catalog)))


def make_library(storage: Storage, uri: str, num_videos: int, *, padding_bytes: int = 0) -> Library:
    """Tar shards of 12-frame videos, no two of them the same file, and some broken ones."""
    bases = [colour_video(LABELS[seed % len(LABELS)], seed, num_frames=12, side=16) for seed in range(NUM_BASES)]
    rows: list[dict[str, object]] = []
    members: dict[str, list[tuple[str, int, int]]] = {}
    for first in range(0, num_videos, SHARD_VIDEOS):
        name = f"shard-{first // SHARD_VIDEOS:05d}.tar"
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for number in range(first, min(first + SHARD_VIDEOS, num_videos)):
                data = bases[number % NUM_BASES] + box(b"free", b"%06d" % number + bytes(padding_bytes))
                if number % 40 in BROKEN:
                    data = make_broken(BROKEN[number % 40], data)
                info = tarfile.TarInfo(f"v{number:06d}.mp4")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        data = sink.getvalue()
        storage.put(join(uri, name), data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members[name] = [(one.name.removesuffix(".mp4"), one.offset_data, one.size) for one in tar.getmembers()]
        rows += [
            {"video_id": video_id, "uri": join(uri, name), "offset": offset, "length": length, "status": "packed"}
            for video_id, offset, length in members[name]
        ]
    catalog = catalog_of(rows)
    share = -(-len(catalog) // NUM_FILES)
    for number in range(NUM_FILES):
        part = replace(catalog, table=catalog.table.slice(number * share, share))
        save_catalog(storage, join(uri, f"catalog-{number}.parquet"), part)
    return Library(join(uri, "catalog-*.parquet"), catalog, members)


@dataclass(frozen=True)
class Calm:
    """A library, the job on it that nobody disturbed, and the table which that made."""

    library: Library
    config: LabelConfig
    table: pa.Table
    windows: pa.Table | None

    @property
    def num_units(self) -> int:
        """Units of work of the library."""
        return -(-len(self.library.catalog) // self.config.unit_size)

    def disturbed(self, proxy: FaultyS3, out: str) -> LabelConfig:
        """The same job through a proxy, with another output."""
        bucket = self.config.out.rpartition("/")[0]
        storage = replace(self.config.storage, endpoint_url=proxy.url)
        return replace(self.config, out=join(bucket, out), storage=storage)


def label_calmly(
    server: StorageConfig,
    bucket: str,
    num_videos: int,
    unit_size: int,
    *,
    padding_bytes: int = 0,
    window_s: float = 0.0,
    clip: ClipConfig = CLIP,
    factory: str = "label_models:mixing",
    **options: Any,
) -> Calm:
    """Make a library and label it, by an untrained network."""
    storage = Storage(server)
    library = make_library(storage, join(bucket, "set"), num_videos, padding_bytes=padding_bytes)
    config = LabelConfig(
        allow_factory=OWN_NETWORKS,
        source=library.uri,
        checkpoint=save_untrained(storage, join(bucket, "run"), LABELS, clip, factory, **options),
        out=join(bucket, "calm"),
        unit_size=unit_size,
        window_s=window_s,
        storage=server,
        resources=ResourcesConfig(num_workers=2, decoders_per_worker=1),
    )
    label(config)
    return Calm(library, config, table_of(storage, config.out), windows_of(storage, config))


@pytest.fixture(scope="module")
def small(s3_server: str, ray_local: None) -> Calm:
    """200 videos of 34 kB in units of two; each, one second of 12 frames, is cut into three windows."""
    return label_calmly(config_at(s3_server), bucket_at(s3_server), 200, 2, padding_bytes=2**15, window_s=5 / 12)


@pytest.fixture(scope="module")
def cluster(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two worker nodes of two CPUs, as processes of their own."""
    with ray_cluster(tmp_path_factory.mktemp("cluster"), 2) as started:
        yield started


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as started:
        yield started


def start_driver(cluster: Cluster, config: LabelConfig, logs: Path) -> Driver:
    """`kinoray label` with these settings, as a process that joins the cluster."""
    logs.mkdir()
    command = [sys.executable, "-m", "kinoray", "label", config.source, "--checkpoint", config.checkpoint]
    command += ["--allow-factory", "label_models:mixing"]
    command += ["--out", config.out, "--unit-size", str(config.unit_size), "--window-s", str(config.window_s)]
    command += ["--resources.num-workers", "2", "--resources.decoders-per-worker", "1"]
    command += ["--resources.address", cluster.address, "--storage.endpoint-url", str(config.storage.endpoint_url)]
    command += ["--storage.region", "us-east-1", "--storage.addressing", "path"]
    return Driver(command, cluster.environment, logs)


def table_of(storage: Storage, out: str) -> pa.Table:
    """The rows of a job, without what names its run."""
    return read_predictions(storage, out).drop_columns(["run_id"]).sort_by("video_id").combine_chunks()


def windows_of(storage: Storage, config: LabelConfig) -> pa.Table | None:
    """The rows of the windows of a job that cuts videos into windows."""
    if not config.window_s:
        return None
    return read_windows(storage, config.out).sort_by([("video_id", "ascending"), ("window", "ascending")])


def assert_same(storage: Storage, config: LabelConfig, calm: Calm) -> None:
    """Both tables of a job are those of the job that nobody disturbed."""
    assert table_of(storage, config.out).equals(calm.table)
    windows = windows_of(storage, config)
    assert (windows is None) == (calm.windows is None)
    if windows is not None:
        assert windows.num_rows >= 3 * (len(calm.library.catalog) - calm.library.num_broken)
        assert windows.equals(calm.windows)


def assert_exactly_once(storage: Storage, out: str, library: Library) -> Ledger:
    """Predictions + quarantine = catalog, and there is one part for each unit, none else; returns the ledger."""
    table = read_predictions(storage, out)
    assert sorted(table.column("row_key").to_pylist()) == sorted(row_keys(library.catalog.table))
    assert sorted(table.column("video_id").to_pylist()) == library.catalog.table.column("video_id").to_pylist()
    assert table.column("status").to_pylist().count("quarantined") == library.num_broken
    (root,) = find_labellings(storage, out)
    ledger = Ledger(storage, root)
    (plan,) = ledger.plans()
    assert sorted(info.uri for info in storage.list(join(root, "parts") + "/")) == sorted(
        join(root, "parts", f"{unit.unit_id}.parquet") for unit in plan.units
    )
    return ledger


def first_commits(ledger: Ledger, started_s: Sequence[float]) -> list[int]:
    """How long each run that committed something took to its first commit, from the start of its command."""
    first: dict[str, float] = {}
    for info in ledger.storage.list(join(ledger.root, "parts") + "/"):
        commit = ledger.find_commit(info.uri.rpartition("/")[2].removesuffix(".parquet"))
        assert commit is not None
        first[commit.run_id] = min(info.modified_s, first.get(commit.run_id, info.modified_s))
    return [round(at - max(one for one in started_s if one <= at + 1)) for at in sorted(first.values())]


def kill_and_check(
    cluster: Cluster,
    calm: Calm,
    proxy: FaultyS3,
    logs: Path,
    kinds: Sequence[str],
    *,
    seed: int,
    limit_s: float = 240.0,
    max_repeated: float = MAX_REPEATED,
) -> None:
    """Do a calm job again under kills, with a reader all the time: the table must be the same."""
    storage, gate = Storage(calm.config.storage), Gate()
    proxy.before = gate
    config, library = calm.disturbed(proxy, "killed"), calm.library
    order = [kinds[place] for place in np.random.default_rng(seed).permutation(len(kinds))]
    driver, reader = start_driver(cluster, config, logs), Reader(storage, config.out)
    reader.start()
    try:
        kills, said = kill_while_labelling(cluster, driver, gate, order, calm.num_units, seed=seed, limit_s=limit_s)
    finally:
        gate.open_to(10**9)
        driver.close()
        reader.stop()
    assert f"{len(library.catalog):,} inputs = " in said
    ledger = assert_exactly_once(storage, config.out, library)
    assert_same(storage, config, calm)
    reads = member_reads(proxy, library.members)
    assert sorted(reads) == library.catalog.table.column("video_id").to_pylist()
    repeated = reads.total() - len(reads) + kinds.count("decoder")
    print(f"{repeated} of {len(reads)} videos decoded again, {reader.num_reads} reads")
    print(f"seconds from a start to its first commit: {first_commits(ledger, driver.started_s)}; {kills}")
    assert repeated <= max_repeated * len(reads)
    num_windows = sum(1 for _ in storage.list(join(ledger.root, "windows") + "/"))
    assert num_windows == (calm.num_units if calm.config.window_s else 0)  # who did a unit again wrote the same file
    assert reader.num_growths >= 3
    assert len(driver.started_s) == 1 + kinds.count("driver")


@pytest.mark.ray
def test_five_kills_lose_and_repeat_nothing(cluster: Cluster, small: Calm, proxy: FaultyS3, tmp_path: Path) -> None:
    kinds = ("decoder", "decoder", "actor", "raylet", "driver")
    kill_and_check(cluster, small, proxy, tmp_path / "logs", kinds, seed=0)


@pytest.mark.parametrize(
    ("tens", "num_clips", "limit_s"),
    [
        pytest.param(2, 2000, 1200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(6, 6000, 1800, marks=[pytest.mark.kills, pytest.mark.timeout(7200)], id="about an hour"),
    ],
)
def test_many_kills_lose_and_repeat_nothing(
    cluster: Cluster,
    bucket: str,
    s3_config: StorageConfig,
    proxy: FaultyS3,
    ray_local: None,
    tmp_path: Path,
    tens: int,
    num_clips: int,
    limit_s: float,
) -> None:
    kinds = (["decoder"] * 2 + ["actor"] * 2 + ["raylet"] * 3 + ["driver"] * 3) * tens
    calm = label_calmly(s3_config, bucket, num_clips, 3)
    kill_and_check(cluster, calm, proxy, tmp_path / "logs", kinds, seed=tens // 2, limit_s=limit_s)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("crop_px", [32, 40, 64, 80, 84, 88, 96, 112, 224])
def test_undisturbed_and_killed_jobs_agree_in_every_bit(
    cluster: Cluster,
    bucket: str,
    s3_config: StorageConfig,
    proxy: FaultyS3,
    ray_local: None,
    tmp_path: Path,
    crop_px: int,
) -> None:
    """RGB and flow through a real network: two workers with units of two videos, one with units of 64, and kills."""
    clip = replace(CLIP, view=ViewConfig(resize_px=crop_px + 8, crop_px=crop_px))
    calm = label_calmly(s3_config, bucket, 24, 2, clip=clip, factory="vcm_sdd", backbone="tiny", scale="dim")
    scores = calm.table.column("score_topk").to_pylist()
    assert len({str(row) for row in scores if row}) == 24 - calm.library.num_broken
    other = replace(calm.config, out=join(bucket, "other"), unit_size=64, resources=ResourcesConfig(num_workers=1))
    label(other)
    assert_same(Storage(s3_config), other, calm)
    kinds = ("decoder", "actor", "decoder", "driver")
    kill_and_check(cluster, calm, proxy, tmp_path / "logs", kinds, seed=crop_px, max_repeated=1.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_commands_at_once_on_one_output_both_succeed(
    cluster: Cluster, small: Calm, proxy: FaultyS3, tmp_path: Path
) -> None:
    """Four workers of two commands, let in at the same moment: every unit counts once, and nothing else is left."""
    storage, gate = Storage(small.config.storage), Gate()
    proxy.before = gate
    config = small.disturbed(proxy, "both")
    drivers = [start_driver(cluster, config, tmp_path / f"logs-{number}") for number in range(2)]
    reader = Reader(storage, config.out)
    reader.start()
    try:
        gate.wait_held(3)  # more than one command's workers
        gate.open_to(10**9)
        said = [driver.finish(240) for driver in drivers]
    finally:
        gate.open_to(10**9)
        for driver in drivers:
            driver.close()
        reader.stop()
    assert all("200 inputs = 190 labelled + 10 quarantined + 0 skipped" in text for text in said)
    ledger = assert_exactly_once(storage, config.out, small.library)
    assert sum(1 for _ in storage.list(join(ledger.root, "windows") + "/")) == small.num_units
    assert_same(storage, config, small)


@pytest.mark.slow
def test_a_resumed_job_fetches_what_is_unfinished_and_no_more(small: Calm, proxy: FaultyS3) -> None:
    """Every third unit is finished. Between two members that are fetched at once lies a tar header, fetched, too."""
    storage, library = Storage(small.config.storage), small.library
    (root,) = find_labellings(storage, small.config.out)
    (plan,) = Ledger(storage, root).plans()
    unfinished = [unit for number, unit in enumerate(plan.units) if number % 3]
    for unit in unfinished:  # as if their workers had been killed between the windows and the part
        storage.delete(join(root, "parts", f"{unit.unit_id}.parquet"))

    label(small.disturbed(proxy, "calm"))
    rows = dict(zip(row_keys(library.catalog.table), library.catalog.table.to_pylist(), strict=True))
    lengths = {rows[key]["video_id"]: rows[key]["length"] for unit in unfinished for key in unit.keys}
    assert member_reads(proxy, library.members) == dict.fromkeys(lengths, 1)
    shards = [request for request in proxy.gets() if request.path.endswith(".tar")]
    spans = [str(request.range).removeprefix("bytes=").split("-") for request in shards]
    fetched = sum(int(last) - int(first) + 1 for first, last in spans)
    assert sum(lengths.values()) <= fetched <= 1.05 * sum(lengths.values())
    assert_exactly_once(storage, small.config.out, library)
    assert_same(storage, small.config, small)
