"""The closed form of a labelling's time: by hand, against a simulation, and as a plan that a user reads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinoray.capacity.config import PlanConfig
from kinoray.capacity.estimate import Conditions, Rates, Site, Work, estimate, fewest_nodes, job_s, unit_s, work_of
from kinoray.capacity.plan import gpu_seconds, parse_duration, parse_gpu_rates, parse_node, plan
from kinoray.catalog.table import save_catalog
from kinoray.config.shared import ResourcesConfig
from kinoray.errors import ConfigError, JobError, ObjectNotFound
from kinoray.label.config import LabelConfig
from kinoray.storage.objects import Storage
from simulated_labelling import Simulation, simulate
from small_sets import catalog_of

WORK = Work(decode_cpu_s=0.1, model_s=0.2, model_cpu_s=0.2, decoders=2, threads=1, batch=8, unit=64, commit_s=0.05)
RATES = Rates(
    decode_cpu_s=0.1,
    model_cpu_s=0.3,
    model_s=0.3,
    bytes_per_video=1e6,
    clips_per_video=1.0,
    duration_s=10.0,
    commit_s=0.02,
    driver_s=5.0,
    actor_start_s=6.0,
    plan_s=2e-5,
    check_s=1e-3,
    job_videos_per_s=4.6,
    num_videos=256,
    num_workers=2,
    cpus_per_worker=1.0,
    decoders_per_worker=2,
    torch_threads=1,
    batch_size=8,
    unit_size=64,
    cores=2,
    cpu="some CPU",
    gpu="",
)


NUM_VIDEOS = 50_000_000


# The closed form by hand


@pytest.mark.parametrize(
    ("work", "site", "expected"),
    [
        pytest.param(
            WORK, Site(cores=16, workers=1), 8 * 0.05 + 64 * 0.2 + 0.05, id="the model, and one batch to fill"
        ),
        pytest.param(
            replace(WORK, decode_cpu_s=2.0), Site(cores=16, workers=1), 64 * 1.0 + 8 * 0.2 + 0.05, id="two decoders"
        ),
        pytest.param(WORK, Site(cores=2, workers=8), 8 * 64 * 0.3 / 2, id="the cores, which eight workers share"),
        pytest.param(
            replace(WORK, bytes_per_video=1e6), Site(cores=99, workers=4, bytes_per_s=1e6), 4 * 64, id="the network"
        ),
    ],
)
def test_one_thing_that_binds_by_far_decides(work: Work, site: Site, expected: float) -> None:
    assert unit_s(work, site) == pytest.approx(expected, rel=0.03)


def test_a_job_is_rounds_of_units_and_a_last_one_that_has_its_node_to_itself() -> None:
    site = Site(cores=2, workers=2)
    whole, alone = unit_s(WORK, site), unit_s(WORK, site, 1)
    assert alone < whole
    assert job_s(WORK, site, 64 * 4, 1) == 2 * whole
    assert job_s(WORK, site, 64 * 5, 1) == 2 * whole + alone
    assert job_s(WORK, site, 64 * 4 + 10, 1) == 2 * whole + unit_s(WORK, site, 1, 10)
    assert job_s(WORK, site, 64 * 6, 2) == whole + alone  # the last two units lie on two nodes


def test_more_of_anything_is_never_slower() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        work, site, _, nodes = random_setting(rng)
        videos = work.unit * site.workers * 12 * nodes
        now = unit_s(work, site)
        assert unit_s(work, replace(site, cores=site.cores + 1)) <= now * (1 + 1e-9)
        assert unit_s(replace(work, decoders=work.decoders + 1), site) <= now * (1 + 1e-9)
        assert unit_s(work, replace(site, bytes_per_s=2 * site.bytes_per_s)) <= now * (1 + 1e-9)
        assert job_s(work, site, videos, 2 * nodes) <= job_s(work, site, videos, nodes) * (1 + 1e-9)


def test_the_fewest_nodes_meet_the_deadline_and_one_less_does_not() -> None:
    site, conditions = Site(cores=16, workers=8), Conditions(node_start_s=180, actor_start_s=6, head_room=0.2)
    found = fewest_nodes(WORK, site, conditions, NUM_VIDEOS, 24 * 3600)
    assert found is not None
    assert found.wall_s <= 24 * 3600
    assert found.nodes > 1
    assert estimate(WORK, site, conditions, NUM_VIDEOS, found.nodes - 1).wall_s > 24 * 3600
    assert fewest_nodes(WORK, site, conditions, NUM_VIDEOS, 170) is None  # before the nodes have started


def test_what_surrounds_the_work_is_in_the_time() -> None:
    site = Site(cores=2, workers=2)
    bare = estimate(WORK, site, Conditions(), 6400, 1)
    assert bare.wall_s == job_s(WORK, site, 6400, 1)
    started = estimate(WORK, site, Conditions(node_start_s=100, driver_s=4, actor_start_s=10, plan_s=0.01), 6400, 1)
    assert started.start_s == pytest.approx(100 + 4 + 10 + 64)
    assert started.wall_s == pytest.approx(started.start_s + bare.work_s)
    assert estimate(WORK, site, Conditions(check_s=0.5), 6400, 1).wall_s == pytest.approx(bare.wall_s + 50)
    assert estimate(WORK, site, Conditions(head_room=0.5), 6400, 1).work_s == pytest.approx(2 * bare.work_s)
    assert estimate(WORK, site, Conditions(retry_fraction=0.1), 6400, 1).work_s == pytest.approx(1.1 * bare.work_s)
    assert estimate(WORK, site, Conditions(calibration=0.8), 6400, 1).work_s == pytest.approx(bare.work_s / 0.8)


def test_starting_more_workers_than_cores_takes_longer() -> None:
    conditions = Conditions(actor_start_s=10)
    assert estimate(WORK, Site(cores=4, workers=4), conditions, 64, 1).start_s == 10
    assert estimate(WORK, Site(cores=2, workers=4), conditions, 64, 1).start_s == 20


# The closed form against the simulation


def random_setting(rng: np.random.Generator) -> tuple[Work, Site, int, int]:
    """Work, site, videos and nodes: CPUs or GPUs, any of decoders, model, cores and network as what binds."""
    on_gpu = bool(rng.random() < 0.4)
    cores, threads = int(rng.integers(2, 17)), 1 if on_gpu else int(rng.integers(1, 3))
    workers = int(rng.integers(1, 3)) if on_gpu else int(rng.integers(1, max(2, min(6, cores // threads)) + 1))
    host_s = rng.uniform(0.001, 0.02) if on_gpu else rng.uniform(0.005, 1.5)
    work = Work(
        decode_cpu_s=rng.uniform(0.02, 0.5),
        model_s=host_s + rng.uniform(0.002, 0.2) if on_gpu else host_s / threads,
        model_cpu_s=host_s,
        decoders=int(rng.integers(1, 9)),
        threads=threads,
        batch=float(rng.choice([1, 4, 8])),
        unit=int(rng.choice([16, 32, 64])),
        commit_s=rng.uniform(0, 0.3),
        bytes_per_video=1.0,
    )
    site = Site(cores=cores, workers=workers)
    if rng.random() < 0.3:
        needed = workers * work.unit / unit_s(work, site)
        site = replace(site, bytes_per_s=needed * rng.uniform(0.5, 3))
    nodes = int(rng.integers(1, 3))
    videos = work.unit * workers * nodes * int(rng.integers(2, 4)) + int(rng.integers(0, work.unit * workers))
    return work, site, videos, nodes


def test_the_closed_form_agrees_with_the_simulation_over_many_settings() -> None:
    rng = np.random.default_rng(3)
    ratios = []
    for seed in range(150):
        work, site, videos, nodes = random_setting(rng)
        ratios.append(job_s(work, site, videos, nodes) / simulate(work, site, videos, nodes, spread=0.3, seed=seed))
    off = np.abs(np.array(ratios) - 1)
    assert np.median(off) < 0.05
    assert np.mean(off < 0.15) >= 0.93
    assert off.max() < 0.40


def test_a_loss_costs_what_the_closed_form_says() -> None:
    work, site, start_s, losses = replace(WORK, unit=32), Site(cores=4, workers=4), 60.0, 3.0
    videos = 32 * 4 * 40
    conditions = Conditions(node_start_s=start_s, losses_per_node_hour=losses)
    expected = estimate(work, site, conditions, videos, 1).wall_s
    undisturbed = estimate(work, site, Conditions(node_start_s=start_s), videos, 1).wall_s
    found = [
        simulate(work, site, videos, start_s=start_s, losses_per_node_hour=losses, seed=seed) for seed in range(40)
    ]
    assert expected > 1.03 * undisturbed
    assert np.mean(found) == pytest.approx(expected, rel=0.04)


def test_the_simulation_does_all_the_work_and_no_more() -> None:
    simulation = Simulation(WORK, Site(cores=3, workers=2), 200, 2)
    simulation.run()
    assert simulation.cpu_s == pytest.approx(200 * WORK.cpu_s, rel=1e-6)
    assert simulation.units_left == 0


def test_the_simulation_of_one_worker_is_the_sum_that_a_hand_makes() -> None:
    work = replace(WORK, decoders=1, batch=1, unit=10, decode_cpu_s=0.1, model_s=0.3, model_cpu_s=0.3)
    assert simulate(work, Site(cores=2, workers=1), 20) == pytest.approx(2 * (0.1 + 10 * 0.3 + 0.05))
    slow = replace(work, decode_cpu_s=0.5)
    assert simulate(slow, Site(cores=2, workers=1), 20) == pytest.approx(2 * (10 * 0.5 + 0.3 + 0.05))
    fetched = replace(work, bytes_per_video=1.0)
    found = simulate(fetched, Site(cores=2, workers=1, bytes_per_s=1.0), 10)
    assert found == pytest.approx(10 + 0.1 + 0.3 + 0.05, rel=0.03)


# What a user writes


def test_nodes_are_read_in_any_order() -> None:
    node = parse_node("big:25gbit,4.10usd,2xH100,16cpu")
    assert (node.name, node.cpus, node.gpus, node.gpu, node.gbit, node.usd_per_hour) == ("big", 16, 2, "H100", 25, 4.1)
    small = parse_node("small:8cpu")
    assert (small.gpus, small.gpu, small.gbit, small.usd_per_hour) == (0, "", math.inf, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16cpu", "node must be NAME:PART,PART..., like small:16cpu,0.50usd; got '16cpu'"),
        ("big:1xH100", "node must have at least 1 CPU"),
        ("big:0cpu", "at least 1 CPU"),
        ("big:16cpus", "got '16cpus' in"),
        ("big:16cpu,8cpu", "got '8cpu' twice in"),
        ("big:16cpu,0gbit", "a network above 0gbit"),
        ("big:16cpu,4.10", "with parts like 16cpu, 1xH100, 25gbit and 4.10usd"),
    ],
)
def test_a_wrong_node_is_said_with_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_node(text)


def test_durations_and_gpu_rates_are_read() -> None:
    assert [parse_duration(text) for text in ("45s", "90min", "24h", "1.5d")] == [45, 5400, 86400, 129600]
    assert parse_gpu_rates(["H100=180", "l4=20.5"]) == {"h100": 180.0, "l4": 20.5}
    for text in ("24", "h", "-1h", "0h"):
        with pytest.raises(ConfigError, match="deadline must be a time like"):
            parse_duration(text)
    for item in ("H100", "H100=fast", "H100=0"):
        with pytest.raises(ConfigError, match="gpu_clips_per_s must be GPU=CLIPS_A_SECOND"):
            parse_gpu_rates([item])


def test_a_gpu_rate_is_given_or_measured_or_scaled_aloud_or_refused() -> None:
    on_a100 = replace(RATES, gpu="NVIDIA A100-SXM4-80GB", model_s=0.01)
    assert gpu_seconds(RATES, "H100", {"h100": 50.0}) == (0.02, "H100: 50 clips/s, as gpu_clips_per_s says")
    assert gpu_seconds(on_a100, "A100", {})[0] == 0.01
    seconds, note = gpu_seconds(on_a100, "H100", {})
    assert seconds == pytest.approx(0.01 * 312 / 989)
    assert "NOT measured" in note
    assert "TFLOPS (989 / 312)" in note
    with pytest.raises(
        ConfigError, match=r"no rate is known for a H100: the rates were measured on a CPU \(some CPU\)"
    ):
        gpu_seconds(RATES, "H100", {})
    with pytest.raises(ConfigError, match="gpu_clips_per_s: no rate is known for a MI300"):
        gpu_seconds(on_a100, "MI300", {})


# The plan


@pytest.fixture
def rates_file(tmp_path: Path) -> str:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(RATES.to_record()))
    return str(path)


def config_of(rates: str, **changes: Any) -> PlanConfig:
    return PlanConfig(**{"rates": rates, "node": ("cpu:16cpu,0.50usd",), "videos": NUM_VIDEOS} | changes)


def test_rates_come_back_as_they_were_written() -> None:
    assert Rates.from_record(json.loads(json.dumps(RATES.to_record())) | {"more": 1}, "rates.json") == RATES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "rates: .*rates.json is not JSON"),
        ("[1]", "rates: .*rates.json must hold a JSON object, found list; measure again with: kinoray bench"),
        ("{}", "rates: .*rates.json has no decode_cpu_s"),
        (json.dumps(RATES.to_record() | {"decode_cpu_s": 0}), "decode_cpu_s must be a number greater than 0, got 0"),
        (json.dumps(RATES.to_record() | {"commit_s": -1}), "commit_s must be a number of at least 0, got -1"),
        (json.dumps(RATES.to_record() | {"unit_size": 1.5}), "unit_size must be a whole number, got 1.5"),
        (
            json.dumps(RATES.to_record() | {"job_videos_per_s": 1e308}),
            r"job_videos_per_s must be at most 1e\+12, got 1e\+308",
        ),
        (json.dumps(RATES.to_record() | {"gpu": None}), "gpu must be text, got None"),
        (json.dumps(RATES.to_record() | {"model_s": "fast"}), "model_s must be a number greater than 0, got 'fast'"),
    ],
)
def test_bad_rates_name_the_file_the_field_and_the_remedy(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        plan(config_of(str(path)))


def test_missing_rates_are_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"absent\.json"):
        plan(config_of(str(tmp_path / "absent.json")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": ()}, "node must be one or more kinds"),
        ({"videos": None}, "catalog must be given, or videos instead"),
        ({"catalog": "library"}, "catalog must be given, or videos instead"),
        ({"videos": 0}, "videos must be at least 1"),
        ({"mean_duration": 0.0}, "mean_duration must be greater than 0"),
        ({"deadline": "soon"}, "deadline must be a time like"),
        ({"node": ("gpu:16cpu,1xH100",)}, "gpu_clips_per_s: no rate is known for a H100"),
    ],
)
def test_a_wrong_setting_names_the_field(rates_file: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config_of(rates_file, **changes))


def test_cpu_nodes_share_their_cores(rates_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(config_of(rates_file))["nodes"][0]
    # As many workers a core as in the measured job; 1 % of the work is done twice, 20 % of the rate is kept back.
    per_node = RATES.job_videos_per_s / RATES.cores * 16 / 1.01 * 0.8
    assert found["videos_per_s"] == pytest.approx(found["nodes"] * per_node, rel=0.01)
    assert found["work_s"] == pytest.approx(NUM_VIDEOS / found["videos_per_s"], rel=0.02)
    assert found["bound"] == "CPU: the model"
    assert found["usd"] == pytest.approx(found["nodes"] * found["hours"] * 0.5)
    assert found["hours"] < 24
    shown = capsys.readouterr().out
    assert "the model is the limit: --inference.precision bf16, or a GPU, would help" in shown
    assert f"--workers {found['workers']} --resources.cpus-per-worker 1 --resources.decoders-per-worker 2" in shown
    assert "a CPU of a node is 1 x a core of some CPU (cpu_speed)" in shown
    assert "no node is lost" in shown


def test_a_gpu_moves_the_limit_to_decoding_and_a_slow_network_to_the_network(rates_file: str) -> None:
    nodes = ("gpu:16cpu,1xH100,25gbit,4usd", "thin:16cpu,1xH100,0.1gbit,4usd", "fat:96cpu,1xH100,6usd")
    fast = plan(config_of(rates_file, node=nodes, gpu_clips_per_s=("H100=400",)))["nodes"]
    assert [node["bound"] for node in fast] == ["CPU: decoding", "network", "GPU (H100)"]
    assert fast[1]["nodes"] > fast[0]["nodes"] > fast[2]["nodes"]
    assert fast[0]["decoders_per_worker"] == 16
    assert "--resources.gpus-per-worker 1 --resources.decoders-per-worker 16" in fast[0]["flags"]


def test_every_assumption_has_its_line(rates_file: str) -> None:
    lines = "\n".join(
        plan(
            config_of(
                rates_file,
                mean_duration=20.0,
                losses_per_node_hour=0.05,
                node=("gpu:16cpu,1xH100,25gbit",),
                gpu_clips_per_s=("H100=400",),
                cpu_speed=0.5,
            )
        )["assumptions"]
    )
    for part in (
        "x 2.00: 20 s a video instead of 10.0 s",
        "each node is lost 0.05 times an hour",
        "H100: 400 clips/s, as gpu_clips_per_s says",
        "feeding a GPU takes was not measured",
        "a CPU of a node is 0.5 x a core",
        "20% of every rate is kept back",
        "a node takes 3 min 00 s to start",
    ):
        assert part in lines


def test_longer_videos_take_more_bytes_and_more_decoding(rates_file: str) -> None:
    short, long = (plan(config_of(rates_file, mean_duration=seconds)) for seconds in (10.0, 40.0))
    assert long["library"]["bytes_per_video"] == 4 * short["library"]["bytes_per_video"]
    assert long["nodes"][0]["nodes"] / short["nodes"][0]["nodes"] == pytest.approx((0.4 + 0.3) / 0.4, rel=0.1)


def test_a_catalog_gives_its_own_count_sizes_and_lengths(rates_file: str, tmp_path: Path) -> None:
    rows = [{"video_id": f"v{n}", "uri": f"/v{n}", "size_bytes": 3_000_000, "duration_s": 30.0} for n in range(7)]
    save_catalog(Storage(), str(tmp_path / "library.parquet"), catalog_of(rows))
    found = plan(config_of(rates_file, videos=None, catalog=str(tmp_path / "library.parquet"), deadline="10min"))
    assert found["library"]["num_videos"] == 7
    assert found["library"]["bytes_per_video"] == 3e6
    assert found["library"]["decode_factor"] == 3.0
    assert found["nodes"][0]["nodes"] == 1


def test_a_deadline_that_nothing_meets_is_said(
    rates_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    with pytest.raises(JobError, match="no kind of node meets the deadline"):
        plan(config_of(rates_file, deadline="2min", out=str(out)))
    assert "no number of nodes is enough" in capsys.readouterr().out
    assert json.loads(out.read_text())["nodes"][0]["fits"] is False


@pytest.mark.parametrize("num_videos", [8_147, NUM_VIDEOS, 1_000_000_000])
def test_units_are_those_of_label_and_a_bench_of_seven_videos_does_not_price_the_driver(
    num_videos: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = replace(RATES, num_videos=7, unit_size=1, plan_s=0.004, check_s=0.03)
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(rates.to_record()))
    nodes = ("cpu:16cpu,0.50usd", "gpu:16cpu,1xH100,4usd")
    days = "60d" if num_videos > 10_000 else "1h"
    found = plan(config_of(str(path), videos=num_videos, deadline=days, node=nodes, gpu_clips_per_s=("H100=400",)))
    for node, gpus in zip(found["nodes"], (0, 1), strict=True):
        resources = ResourcesConfig(num_workers=node["workers"], gpus_per_worker=gpus)
        ours = LabelConfig(source="s", checkpoint="c", out="o", resources=resources).rows_a_unit(num_videos)
        assert node["unit"] == ours
        assert "--unit-size" not in node["flags"]
        # by hand, as docs/capacity.md has it: 5.6 us a video, 6 ms a unit
        ends = num_videos * 5.6e-6 + math.ceil(num_videos / ours) * 6e-3
        start_s = 180 + rates.driver_s + rates.actor_start_s
        assert node["wall_s"] - node["work_s"] == pytest.approx(start_s + ends, rel=1e-6)
    said = capsys.readouterr().out
    assert "the driver takes 5.6 us a video and 6.0 ms a unit" in said
    assert "--unit-size" not in said
    large = replace(rates, num_videos=20_000)  # measured well enough to be believed
    path.write_text(json.dumps(large.to_record()))
    one = plan(config_of(str(path), videos=8_147, deadline="60d"))["nodes"][0]
    assert one["start_s"] == pytest.approx(180 + rates.driver_s + rates.actor_start_s + 8_147 * 0.004)


def test_small_libraries_have_their_size_in_words(rates_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(config_of(rates_file, videos=7))
    assert "plan: 7 videos, 7.0 MB, within 24h\n" in capsys.readouterr().out


def test_the_cheapest_kind_is_named(rates_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ("dear:16cpu,9usd", "cheap:16cpu,1usd")
    found = plan(config_of(rates_file, node=nodes))["nodes"]
    assert found[0]["usd"] == pytest.approx(9 * found[1]["usd"])
    assert "x cheap is the cheapest" in capsys.readouterr().out


def test_work_with_other_threads_keeps_its_cpu_seconds() -> None:
    two = work_of(RATES, threads=2)
    assert (two.model_cpu_s, two.model_s) == (0.3, 0.15)
