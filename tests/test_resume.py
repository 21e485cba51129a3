"""Training that goes on exactly: real processes are killed, and the curves are compared bit for bit.

The networks here (tiny_models.Mortal) have dropout and a batch norm, whose draws and statistics a resumed run must
have again. What was read again is counted by a proxy before the S3 server, which sees every request.
"""

import dataclasses
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from faulty_s3 import FaultyS3, Request, faulty_s3
from kinoray.catalog.table import Catalog
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    StorageConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.errors import JobError, StorageUnavailable
from kinoray.network.checkpoint import list_checkpoints, load_model_state, load_train_state
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.input import epoch_order, run_length
from kinoray.train.recorder import Recorder
from kinoray.train.runfolder import RunFolder, StepRow
from kinoray.train.runs import find_runs
from kinoray.train.state import HISTORY, Snapshot
from kinoray.train.verb import train
from small_sets import LABELS, catalog_of, colour_set, colour_video, epoch_row, save_as_pack, set_in
from test_train import assert_equals_plain_training
from test_train import make_config as plain_config

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))
STEPS_AN_EPOCH = 5  # 17 videos in batches of 4: the last step has one video, so one of two workers has none


def mortal(deaths: Path | str = "", **options: Any) -> ModelConfig:
    known = {"dropout": 0.25, "batch_norm": True, **options}
    return ModelConfig(factory="tiny_models:mortal", options={"deaths": str(deaths), **known})


def make_config(catalog: str, out: Path | str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "clip": CLIP,
        "val_split": "",
        "model": mortal(),
        "optim": OptimConfig(epochs=2, batch_size=4, lr=0.05),
        "resources": TrainResourcesConfig(num_workers=2, decode_tasks=2),
        "checkpoint_every_steps": 1,
    }
    return TrainConfig(catalog=catalog, out=str(out), **(settings | changes))


def plan_deaths(folder: Path, *deaths: str) -> Path:
    """See tiny_models.Mortal: one death for each start of the workers."""
    folder.mkdir()
    for number, death in enumerate(deaths):
        (folder / f"{number:03d}").write_text(death)
    return folder


Curve = tuple[list[StepRow], dict[str, Tensor]]


def curve_of(config: TrainConfig) -> Curve:
    """What must be equal to the last bit: each step's loss, and the state in the end."""
    storage = Storage(config.storage)
    newest, _ = list_checkpoints(storage, config.out)[-1]
    state = load_model_state(storage, newest)
    return RunFolder(storage, config.out).steps(), state | load_train_state(storage, newest)


def assert_bit_for_bit(found: Curve, expected: Curve) -> None:
    assert [row.step for row in found[0]] == list(range(1, len(expected[0]) + 1))
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """17 videos, one of them broken."""
    return set_in(tmp_path_factory.mktemp("set"), train=17, val=0, broken=(4,))


@pytest.fixture(scope="module")
def undisturbed(small_set: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Curve:
    config = make_config(small_set, tmp_path_factory.mktemp("undisturbed") / "run")
    train(config)
    rows, state = curve_of(config)
    assert len(rows) == 2 * STEPS_AN_EPOCH
    assert sum(row.videos for row in rows) == 2 * 16
    assert len({row.loss for row in rows}) == len(rows)
    return rows, state


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    if request.param == "folder":
        return Storage(), str(tmp_path / "run")
    config = cast(StorageConfig, request.getfixturevalue("s3_config"))
    return Storage(config), join(cast(str, request.getfixturevalue("bucket")), "run")


# --- bit for bit


@pytest.mark.slow
def test_a_second_fresh_run_has_the_same_curve(small_set: str, tmp_path: Path, undisturbed: Curve) -> None:
    """Without checkpoints inside epochs: writing them changes no number."""
    config = make_config(small_set, tmp_path / "run", checkpoint_every_steps=0)
    train(config)
    assert_bit_for_bit(curve_of(config), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("self", "2 workers start on cpu after step "),
        ("controller", "the training controller died 1 time, last with"),
    ],
)
def test_a_killed_process_leaves_the_curve_as_it_was(
    small_set: str, tmp_path: Path, undisturbed: Curve, capsys: pytest.CaptureFixture[str], who: str, said: str
) -> None:
    deaths = plan_deaths(tmp_path / "deaths", f"4 {who} {tmp_path / 'run'}")
    config = make_config(small_set, tmp_path / "run", model=mortal(deaths))
    train(config)
    assert not list(deaths.iterdir())
    text = capsys.readouterr().out
    assert said in text
    assert "workers start on cpu after " in text  # workers whose controller dies may train on to the epoch's end
    assert_bit_for_bit(curve_of(config), undisturbed)


def train_in_a_process_of_its_own(config: TrainConfig) -> "subprocess.CompletedProcess[str]":
    """The whole job, with a Ray of its own."""
    code = (
        "import test_resume as t\nfrom kinoray.config.shared import StorageConfig\n"
        f"t.train(t.make_config({config.catalog!r}, {config.out!r}, model=t.mortal(**{config.model.options!r}),"
        f" optim=t.{config.optim!r}, storage={config.storage!r}, max_failures=20))\n"
    )
    return subprocess.run([sys.executable, "-c", code], timeout=600, capture_output=True, text=True)


LONGER = OptimConfig(epochs=8, batch_size=4, lr=0.05)  # a controller that is killed leaves workers that train on


@pytest.fixture(scope="module")
def longer_undisturbed(small_set: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Curve:
    config = make_config(small_set, tmp_path_factory.mktemp("longer") / "run", optim=LONGER)
    train(config)
    return curve_of(config)


@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize(("place", "seed"), [("folder", 0), ("s3", 1)], indirect=["place"])
def test_ten_kills_at_random_steps_leave_the_curve_as_it_was(
    place: tuple[Storage, str], tmp_path: Path, longer_undisturbed: Curve, seed: int
) -> None:
    """Workers, controllers and whole jobs; a start may die at its first step, so some make no progress at all."""
    storage, out = place
    colour_set(storage, out + "-set", train=17, val=0, broken=(4,))
    rng = random.Random(seed)
    kinds = ["self"] * 5 + ["controller"] * 3 + ["driver"] * 2
    rng.shuffle(kinds)
    deaths = plan_deaths(tmp_path / "deaths", *(f"{rng.randint(1, 2)} {who}" for who in kinds))
    config = make_config(out + "-set", out, storage=storage.config, model=mortal(deaths), optim=LONGER)
    for _ in range(kinds.count("driver") + 1):
        done = train_in_a_process_of_its_own(config)
        if done.returncode != -signal.SIGKILL:
            break
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [path.read_text() for path in deaths.iterdir()] == [], "the run ended before all its deaths"
    assert_bit_for_bit(curve_of(config), longer_undisturbed)


# --- another number of workers


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path, ray_local: None) -> None:
    """One worker finishes what two began; both together equal a plain loop in one process, to 1e-5 of float32 sums."""
    catalog, out = set_in(tmp_path / "set", train=17, val=7, broken=(4, 20)), str(tmp_path / "run")
    deaths = plan_deaths(tmp_path / "deaths", f"3 self {out}")
    model = mortal(deaths, dropout=0.0, batch_norm=False, flow_channels=2)
    config = plain_config(catalog, out, model=model, max_failures=0, checkpoint_every_steps=1)
    with pytest.raises(JobError, match="training failed 1 time,"):
        train(config)
    before = list_checkpoints(Storage(), out)[-1][1]
    assert (before.epoch, 1 <= before.epoch_steps < 3) == (0, True)
    fewer = dataclasses.replace(config, resources=TrainResourcesConfig(num_workers=1, decode_tasks=1))
    assert_equals_plain_training(train(fewer), config)


# --- on s3://, counted by the requests


def files_set(storage: Storage, uri: str, num_videos: int) -> Catalog:
    """Every video an object of its own, so that each request names its video."""
    rows: list[dict[str, object]] = []
    for index in range(num_videos):
        video = join(uri, f"video-{index:03d}.mp4")
        storage.put(video, colour_video(LABELS[index % 3], index))
        rows.append({"video_id": f"v{index}", "uri": video, "label_id": index % 3, "split": "train"})
    catalog = catalog_of(rows)
    save_as_pack(storage, uri, catalog)
    return catalog


@pytest.fixture
def faulty(s3_server: str) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server) as proxy:
        yield proxy


def video_reads(proxy: FaultyS3) -> Counter[int]:
    """How often each video was asked for."""
    paths = [request.path.partition("?")[0] for request in proxy.gets()]
    return Counter(int(path[-7:-4]) for path in paths if path.endswith(".mp4"))


@pytest.mark.slow
def test_what_was_trained_on_is_not_read_again(
    s3_config: StorageConfig, bucket: str, faulty: FaultyS3, tmp_path: Path, ray_local: None
) -> None:
    """One epoch: what came before the checkpoint is read once in all; the rest at most once for each start."""
    num_videos, step = 60, 9
    files_set(Storage(s3_config), join(bucket, "set"), num_videos)
    through = dataclasses.replace(s3_config, endpoint_url=faulty.url)
    config = make_config(
        join(bucket, "set"),
        join(bucket, "run"),
        storage=through,
        model=mortal(plan_deaths(tmp_path / "deaths", f"{step} self {bucket}/run {s3_config.endpoint_url}")),
        optim=OptimConfig(epochs=1, batch_size=4, lr=0.05),
        resources=TrainResourcesConfig(num_workers=2, decode_tasks=2),
    )
    result = train(config)

    assert (result["samples"], result["quarantined"]) == (num_videos, 0)
    starts = json.loads(Storage(s3_config).read(join(config.out, "environment.json")))["starts"]
    assert [bool(start["after"]) for start in starts] == [False, True]
    resumed_at = int(starts[1]["after"].split()[1])  # "step N of epoch 1"
    assert 1 <= resumed_at < step
    times = Counter(video_reads(faulty).values())
    assert set(times) <= {1, 2}
    assert times.total() == num_videos
    assert times[1] >= 4 * resumed_at
    rows, _ = curve_of(config)
    assert [(row.step, row.videos) for row in rows] == [(number, 4) for number in range(1, 16)]


# --- a store that is down


def assert_an_outage_ends_the_run(config: TrainConfig, faulty: FaultyS3, said: pytest.CaptureFixture[str]) -> None:
    """With StorageUnavailable, no other start of the workers and no video blamed; the same command then finishes."""
    storage = Storage(dataclasses.replace(config.storage, endpoint_url=faulty.url))
    with pytest.raises(StorageUnavailable, match=r"video-\d\d\d\.mp4"):
        train(config)
    assert said.readouterr().out.count("workers start on cpu") == 1
    (run,) = find_runs(storage, config.out)
    assert (run.state, run.error.partition(":")[0]) == ("failed", "StorageUnavailable")
    faulty.outage = ""
    result = train(config)
    assert (result["quarantined"], result["samples"]) == (0, 17)
    assert not storage.exists(join(config.out, "quarantine.parquet"))


def impatient_config(bucket: str, s3_config: StorageConfig, faulty: FaultyS3) -> TrainConfig:
    """One epoch through the proxy, that gives a request up after 2 s."""
    return make_config(
        join(bucket, "set"),
        join(bucket, "run"),
        storage=dataclasses.replace(s3_config, endpoint_url=faulty.url, retry_s=2.0),
        optim=OptimConfig(epochs=1, batch_size=4, lr=0.05),
    )


@pytest.mark.slow
def test_a_store_that_fails_one_rank_ends_the_run_for_all(
    s3_config: StorageConfig,
    bucket: str,
    faulty: FaultyS3,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One video cannot be had from a store that gives all others: the other rank must not wait for ever."""
    catalog = files_set(Storage(s3_config), join(bucket, "set"), 17)
    order = epoch_order(catalog, seed=0, epoch=1, run=run_length(catalog, 4))
    faulty.outage, faulty.outage_path = "503", f"video-{order[10]:03d}"
    config = impatient_config(bucket, s3_config, faulty)
    assert_an_outage_ends_the_run(config, faulty, capsys)
    rows, _ = curve_of(config)
    assert [row.videos for row in rows] == [4, 4, 4, 4, 1]


@pytest.mark.slow
def test_an_outage_that_lasts_ends_the_run_and_the_curve_is_as_if_it_had_not_been(
    s3_config: StorageConfig,
    bucket: str,
    faulty: FaultyS3,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing of the videos can be read from the tenth read on."""
    files_set(Storage(s3_config), join(bucket, "set"), 17)

    def pull_the_plug(request: Request) -> None:
        if video_reads(faulty).total() == 10:
            faulty.outage, faulty.outage_path = "down", "video-"

    faulty.before = pull_the_plug
    config = impatient_config(bucket, s3_config, faulty)
    assert_an_outage_ends_the_run(config, faulty, capsys)
    twin = dataclasses.replace(config, out=join(bucket, "twin"))
    train(twin)
    assert_bit_for_bit(curve_of(config), curve_of(twin))


def test_a_decode_task_tells_a_store_that_is_down_from_a_video_that_may_not_be_read(
    s3_config: StorageConfig, bucket: str, faulty: FaultyS3
) -> None:
    storage = Storage(s3_config)
    table = files_set(storage, join(bucket, "set"), 5).table.append_column("row", [list(range(5))])
    impatient = dataclasses.replace(s3_config, endpoint_url=faulty.url, retry_s=1.0)
    task = DecodeTask(storage=Storage(impatient), clip=CLIP.without_flow())

    faulty.outage, faulty.outage_path = "403", "video-002"
    assert task(table)["error_class"].tolist() == ["", "", "AccessDenied", "", ""]

    faulty.outage = "503"
    begun = time.monotonic()
    columns = task(table)
    assert columns["error_class"].tolist() == ["", "", *["StorageUnavailable"] * 3]
    assert columns["ok"].tolist() == [True, True, False, False, False]
    assert time.monotonic() - begun < 10  # once the time that a request is made again, not once for each video


# --- a checkpoint is whole or absent


def state_of(number: int) -> Snapshot:
    """Tensors that name their checkpoint: some megabytes, as writing takes most of the time then."""
    generator = torch.Generator().manual_seed(number)
    weights = {f"w{index}": torch.randn(64, 1024, generator=generator) for index in range(8)}
    return Snapshot(weights, {"optimizer/w0/step": torch.tensor(float(number)), HISTORY: torch.zeros(0, 5)})


def save_for_ever(storage: Storage, config: TrainConfig, catalog: Catalog) -> None:
    """Write epoch after epoch, from the newest whole checkpoint on, as rank 0 does; ends by being killed."""
    torch.set_num_threads(1)
    recorder = Recorder(RunFolder(storage, config.out), config, catalog, num_steps=1)
    found = list_checkpoints(storage, config.out)
    number = found[-1][1].epoch if found else 0
    while True:
        number += 1
        recorder.keep_epoch(state_of(number), torch.zeros(1, 5), epoch_row(number, samples=number, loss=1.0), [])


def kill_while_saving(storage: Storage, out: str, num_kills: int) -> int:
    """Check after every kill that all that is listed is whole; how many kills left a part of a checkpoint behind."""
    config = make_config("set", out, storage=storage.config, keep_checkpoints=2)
    catalog = catalog_of([{"video_id": "v", "uri": "u", "label_id": 0}])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    rng = random.Random(0)
    last, num_parts = 0, 0
    for _ in range(num_kills):
        process = context.Process(target=save_for_ever, args=(storage, config, catalog))
        process.start()
        begun = time.monotonic()
        while not has_newer(storage, out, last) and time.monotonic() - begun < 60:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()

        found = list_checkpoints(storage, out)
        folders = {info.uri.rpartition("/")[0] for info in storage.list(join(out, "checkpoints") + "/")}
        num_parts += bool(folders - {uri for uri, _ in found})
        for uri, meta in found:
            expected = state_of(meta.epoch)
            weights, train_state = load_model_state(storage, uri), load_train_state(storage, uri)
            assert all(torch.equal(weights[name], value) for name, value in expected.weights.items())
            assert weights.keys() == expected.weights.keys()
            assert train_state["optimizer/w0/step"] == meta.epoch
        newest = found[-1][1].epoch
        assert newest > last
        epochs = [row.epoch for row in RunFolder(storage, out).epochs()]
        assert epochs[:newest] == list(range(1, newest + 1))
        last = newest
    return num_parts


def has_newer(storage: Storage, out: str, last: int) -> bool:
    names = [info.uri.rsplit("/", 2)[1] for info in storage.list(join(out, "checkpoints") + "/")]
    return any(int(name.split("-")[1]) > last + 1 for name in names)


def test_kills_while_a_checkpoint_is_written_leave_whole_ones(place: tuple[Storage, str]) -> None:
    kill_while_saving(*place, num_kills=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_while_a_checkpoint_is_written_leave_whole_ones(place: tuple[Storage, str]) -> None:
    num_parts = kill_while_saving(*place, num_kills=50)
    assert num_parts >= 5  # or the kills were not where it hurts
