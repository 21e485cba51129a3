"""`kinoray bench`: what it measures on a real small library, what it says of it, and what a plan makes of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinoray.capacity.bench import Bounds, advice, bench, bounds_of, refuse_too_many_bad
from kinoray.capacity.config import BenchConfig, PlanConfig
from kinoray.capacity.estimate import Conditions, Rates, calibration, estimate
from kinoray.capacity.job import CpuWatch, DecodeLoop, JobFigures, ModelLoop, decode_loop, model_loop
from kinoray.capacity.plan import Library, layout, load_rates, parse_node, plan
from kinoray.catalog.table import catalog_of_source
from kinoray.config.shared import ClipConfig, InferenceConfig, ResourcesConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import class_names, make_demo_set
from kinoray.errors import ConfigError, MediaError, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.storage.objects import Storage
from label_models import save_untrained
from test_capacity import RATES

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=72, crop_px=64))
LABELS = tuple(class_names())
NUM_VIDEOS = 48
BOUNDS = Bounds(
    decode=20.0,
    model=6.7,
    min_both=6.7,
    shared=5.0,
    job=4.8,
    job_over_min_both=0.72,
    job_over_shared=0.96,
    cpu_over_job=0.95,
    others_share=0.0,
)
BENCH = BenchConfig(source="library", checkpoint="checkpoint")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    assert make_demo_set(folder, videos_per_class=NUM_VIDEOS // len(LABELS), seed=3) == NUM_VIDEOS
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return save_untrained(Storage(), uri, LABELS, CLIP, "vcm_sdd", backbone="tiny")


def test_rates_of_a_library_that_is_mostly_bad_end_with_an_error() -> None:
    refuse_too_many_bad(DecodeLoop(videos=10, bad=2), 0.2)
    with pytest.raises(
        TooManyBad, match=r"3 of 10 videos \(30\.0%\) could not be decoded, max_bad_fraction allows 20\.0%"
    ):
        refuse_too_many_bad(DecodeLoop(videos=10, bad=3), 0.2)


# The words


@pytest.mark.parametrize(
    ("rates", "bounds", "config", "message"),
    [
        ({}, {}, {}, "the model binds: it takes 75% of the CPU time; --inference.precision bf16 takes about half of"),
        ({}, {}, {"inference": InferenceConfig(precision="bf16")}, "of the CPU time; a GPU (--resources.gpus-per-wor"),
        ({"decode_cpu_s": 1.2}, {"shared": 1.33}, {}, "decoding binds: it takes 80% of the CPU time and all cores are"),
        ({}, {"job_over_shared": 0.7}, {}, "the job reaches 70% of what these cores allow: give each worker larger"),
        (
            {"unit_size": 1},
            {"job_over_shared": 0.7},
            {},
            "in units of 1 video, which are larger in a larger librar",
        ),
        ({"unit_size": 1}, {"job_over_shared": 0.7}, {"unit_size": 1}, "give each worker larger units (--unit-size)"),
        (
            {"cores": 16, "decode_cpu_s": 1.2},
            {"decode": 3.3, "model": 6.7, "shared": 3.3},
            {},
            "4 decoders cannot use all 16 cores: set --resources.decoders-per-worker 8",
        ),
        ({"cores": 16}, {}, {}, "2 workers of 1 thread cannot use all 16 cores: set --workers 16"),
        ({"gpu": "NVIDIA L4"}, {}, {}, "the model on NVIDIA L4 binds: --inference.precision bf16"),
    ],
)
def test_the_advice_names_what_binds_and_the_flag_that_helps(
    rates: dict[str, Any], bounds: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    said = advice(replace(RATES, **rates), replace(BOUNDS, **bounds), replace(BENCH, **config), has_bf16=True)
    assert message in said
    assert "\n" not in said


def test_bounds_are_medians_of_ratios_within_a_turn() -> None:
    figures = {"wall_s": 0.0, "first_s": 0.0, "end_s": 0.0, "videos_per_s": 4.0, "others_share": 0.0}
    job = JobFigures(cpu_s=0.45, core_s=0.5, **figures)
    decode = DecodeLoop(videos=10, clips=10, wall_s=9.0, cpu_s=1.0)
    model = ModelLoop(clips=10, wall_s=1.5, cpu_s=3.0)
    slow = (decode, model, replace(job, cpu_s=1.0, core_s=1.0))
    bounds = bounds_of(RATES, [(decode, model, job), slow, (decode, model, job)])
    assert (bounds.decode, bounds.model, bounds.min_both) == (20.0, pytest.approx(20 / 3), pytest.approx(20 / 3))
    assert bounds.shared == pytest.approx(2 / (0.1 + 0.3))
    assert bounds.job == pytest.approx(4.0)
    assert bounds.job_over_shared == pytest.approx(4.0 / 5.0)
    assert bounds.job_over_min_both == pytest.approx(4.0 / (20 / 3))
    assert bounds.cpu_over_job == pytest.approx(0.4 / 0.45)
    one_thread = bounds_of(replace(RATES, num_workers=1, decoders_per_worker=1), [(decode, model, job)])
    assert (one_thread.decode, one_thread.model) == (10.0, pytest.approx(10 / 3))  # the other core cannot be used
    with_gpu = bounds_of(replace(RATES, gpu="NVIDIA L4"), [(decode, model, job)])
    assert with_gpu.model == pytest.approx(2 * 20 / 3)  # two workers, each with a GPU like the one of the loop


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": 5}, r"videos must be at least 3 a worker \(6\), got 5"),
        ({"resources": ResourcesConfig(address="head:6379")}, "resources.address must be left out: the loops and the"),
    ],
)
def test_a_wrong_setting_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BENCH, **changes)


def test_a_cluster_that_is_joined_by_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is set, but the loops and the job must share one machine"):
        bench(BENCH)


def test_a_library_with_too_few_videos_is_refused(library: Path, checkpoint: str, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(library.rglob("*.mp4"))[:2]:
        (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"few has 2 videos, but at least 3 a worker \(6\) are needed"):
        bench(replace(BENCH, source=str(few), checkpoint=checkpoint))


# The loops, without Ray


@pytest.mark.ray
def test_the_loops_count_what_they_did(library: Path, checkpoint: str, tmp_path: Path) -> None:
    (library / LABELS[0] / "broken.mp4").write_bytes(b"no video")
    try:
        config = LabelConfig(source=str(library), checkpoint=checkpoint, out=str(tmp_path), batch_size=4)
        labelling = open_labelling(config, "bench")
        rows = labelling.catalog.table
        loop = decode_loop(labelling.job, rows, 1, keep=6)
        (bad,) = [row for row in rows.to_pylist() if row["uri"].endswith("broken.mp4")]
        only = rows.filter(np.array([row["video_id"] == bad["video_id"] for row in rows.to_pylist()]))
        with pytest.raises(MediaError):
            decode_loop(labelling.job, only, 1, keep=0)
    finally:
        (library / LABELS[0] / "broken.mp4").unlink()
    assert (loop.videos, loop.bad, loop.clips, len(loop.kept)) == (NUM_VIDEOS + 1, 1, NUM_VIDEOS, 6)
    assert loop.bytes_read == sum(path.stat().st_size for path in library.rglob("*.mp4"))
    assert loop.cpu_s > 0
    found = model_loop(labelling.job, loop.kept, 13, 2)
    assert found.clips == 2 * 7  # two threads, each with its share of 13 clips, rounded up
    assert found.cpu_s > 0


def test_the_watch_counts_what_children_use() -> None:
    code = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ninput()"
    with CpuWatch(every_s=0.05) as watch:
        begin = time.time()
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        while watch.use(begin, time.time()).own_s < 0.5:
            time.sleep(0.05)
            assert child.poll() is None
        child.communicate(b"\n")
        wall_s = time.time() - begin
    assert child.returncode == 0
    use = watch.use(begin, begin + wall_s)
    num_cores = len(os.sched_getaffinity(0))
    assert use.had_s + use.others_s == pytest.approx(num_cores * wall_s, rel=0.15, abs=0.1)  # the kernel's ticks
    assert 0 <= use.others_share <= 1


# The whole thing


@pytest.mark.slow
def test_bench_measures_a_real_job_and_plan_takes_its_rates(
    library: Path, checkpoint: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "rates.json")
    one = ResourcesConfig(num_workers=1)
    config = BenchConfig(source=str(library), checkpoint=checkpoint, out=out, videos=24, resources=one)
    record = bench(config)
    shown = capsys.readouterr().out
    assert "bench: units of 8 videos, so that each worker gets 3" in shown
    for part in ("decode alone", "model alone", "min(both)", "shared cores", "Ray job", "job / shared cores"):
        assert part in shown
    assert "of 24 videos" in shown
    rates, bounds = load_rates(Storage(), out), record["bounds"]
    assert rates.to_record() == record["rates"]
    assert (rates.num_videos, rates.unit_size, rates.num_workers, rates.clips_per_video) == (24, 6, 1, 1.0)
    chosen = catalog_of_source(Storage(), str(library))
    assert rates.bytes_per_video == pytest.approx(np.mean(chosen.table.column("size_bytes").to_pylist()), rel=0.3)
    assert bounds["shared"] <= bounds["min_both"] <= bounds["decode"]
    assert bounds["job"] < 1.3 * bounds["shared"]  # nothing is faster than light, but for the grain of short units
    found = plan(PlanConfig(rates=out, videos=100_000, node=("small:8cpu,0.4usd",)))["nodes"][0]
    assert found["fits"]
    assert found["videos_per_s"] < found["nodes"] * 8 * bounds["job"]  # one worker a CPU, and head-room


SCRIPT = """
import json, sys, time
from kinoray.config.shared import ResourcesConfig
from kinoray.capacity.bench import bench
from kinoray.capacity.job import CpuWatch
from kinoray.label.verb import label
from kinoray.label.config import LabelConfig
from kinoray.capacity.config import BenchConfig
task, source, checkpoint, out, workers = sys.argv[1:]
resources = ResourcesConfig(num_workers=int(workers))
if task == "bench":
    bench(BenchConfig(source=source, checkpoint=checkpoint, out=out, videos=96, resources=resources))
else:
    with CpuWatch() as watch:
        begin = time.time()
        label(LabelConfig(source=source, checkpoint=checkpoint, out=out, unit_size=16, resources=resources))
        end = time.time()
    print(json.dumps([end - begin, watch.use(begin, end).others_share]))
"""


def run_script(*arguments: str) -> str:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def predicted(rates: Rates, num_videos: int, workers: int) -> float:
    """Seconds of a labelling on this machine, already started."""
    library = Library(num_videos=num_videos, bytes_per_video=rates.bytes_per_video, decode_factor=1.0, notes=())
    config = PlanConfig(rates="rates.json", node=("this:2cpu",), videos=num_videos)
    work, site, _ = layout(rates, parse_node(f"this:{rates.cores}cpu"), config, library)
    conditions = Conditions(
        driver_s=rates.driver_s,
        actor_start_s=rates.actor_start_s,
        plan_s=rates.plan_s,
        check_s=rates.check_s,
        calibration=calibration(rates),
    )
    return estimate(work, replace(site, workers=workers), conditions, num_videos, 1).wall_s


@pytest.mark.slow
def test_a_real_labelling_takes_as_long_as_the_closed_form_says(tmp_path: Path) -> None:
    """Within 20 % of the wall time, with 1 worker and with 2, from rates that were measured with 2.

    What others take of the cores meanwhile is taken off the time.
    """
    source = tmp_path / "library"
    num_videos = make_demo_set(source, videos_per_class=32, seed=4)
    clip = ClipConfig(
        sample=SampleConfig(num_segments=4, frames_per_segment=2), view=ViewConfig(resize_px=128, crop_px=112)
    )
    options = {"backbone": "resnet18"}
    checkpoint = save_untrained(Storage(), str(tmp_path / "checkpoint"), LABELS, clip, "vcm_sdd", **options)
    run_script("bench", str(source), checkpoint, str(tmp_path / "rates.json"), "2")
    rates = load_rates(Storage(), str(tmp_path / "rates.json"))
    for workers in (1, 2):
        out = str(tmp_path / f"labels-{workers}")
        shown = run_script("label", str(source), checkpoint, out, str(workers))
        wall_s, others_share = json.loads(shown.splitlines()[-1])
        expected_s = predicted(rates, num_videos, workers)
        print(f"{workers} workers: {expected_s:.1f} s predicted, {wall_s:.1f} s found, others took {others_share:.0%}")
        assert expected_s == pytest.approx(wall_s * (1 - others_share), rel=0.2)
