"""Sweeps: the search space, what fits a cluster, the page; and whole sweeps under Ray Tune, killed and gone on."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinoray.cli import main
from kinoray.config.file import load_config
from kinoray.config.shared import (
    CacheConfig,
    ClipConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    StorageConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.errors import ClusterError, ConfigError, JobError
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from kinoray.tune.config import (
    Settings,
    TuneConfig,
    apply,
    draw_trials,
    grid_trials,
    parse_space,
    train_config,
    trial_id,
)
from kinoray.tune.job import optuna_searcher, planned_trials, shared_cache, trial_run, trials_at_once
from kinoray.tune.results import TrialRow, best_row, heat_map, ranked, read_trial, tune_page, write_outcome
from kinoray.tune.verb import tune
from ports import wait_until
from small_sets import colour_set, epoch_row, set_in

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=24))
SPACE = {"optim.lr": "0.001,0.05", "clip.sample.num_segments": "1,2"}


def make_config(catalog: str, out: str, **changes: Any) -> TuneConfig:
    """Four trials of seconds, of which a Ray with four CPUs holds two at a time."""
    settings: dict[str, Any] = {
        "clip": CLIP,
        "model": ModelConfig(factory="tiny_models:mean_colour"),
        "optim": OptimConfig(epochs=2, batch_size=8),
        "resources": TrainResourcesConfig(num_workers=1, decode_tasks=1, local_cpus=4),
        "space": SPACE,
    }
    return TuneConfig(catalog=catalog, out=out, **(settings | changes))


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return set_in(tmp_path_factory.mktemp("set"), train=12, val=6)


# The search space


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("4,8,16", (4, 8, 16)),
        ("frobenius, dim", ("frobenius", "dim")),
        ("1e-4,0.5", (1e-4, 0.5)),
        ("true,false", (True, False)),
        ("[[1.0], [1.0, 0.75]]", ([1.0], [1.0, 0.75])),
        ([8, 16], (8, 16)),
        (0.5, (0.5,)),
        ("log:1e-4..1e-2/3", (1e-4, 1e-3, 1e-2)),
        ("lin:0..1/5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("int:2..4/3", (2, 3, 4)),
    ],
)
def test_the_space_lists_values(spec: Any, expected: tuple[Any, ...]) -> None:
    (axis,) = parse_space({"a.b": spec})
    assert axis.values == expected
    assert [type(value) for value in axis.values] == [type(value) for value in expected]


@pytest.mark.parametrize("spec", ["log:1e-4..1e-2", "lin:1e-4..1e-2", "int:3..9"])
def test_ranges_are_drawn_evenly_in_their_scale(spec: str) -> None:
    (axis,) = parse_space({"a": spec})
    rng = np.random.default_rng(0)
    drawn = [axis.draw(rng) for _ in range(4000)]
    assert all(axis.low <= value <= axis.high for value in drawn)
    if spec.startswith("int"):
        counts = np.bincount(drawn, minlength=10)[3:]
        assert len(counts) == 7
        assert np.abs(counts - 4000 / 7).max() < 5 * np.sqrt(4000 / 7)
    else:
        middle = 1e-3 if spec.startswith("log") else 0.00505
        assert abs(sum(value < middle for value in drawn) - 2000) < 5 * np.sqrt(1000)
        assert all(value == float(f"{value:.3g}") for value in drawn)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space must name at least one setting"),
        ({"optim.lr": "log:0..1"}, r"optim\.lr=log:0\.\.1: a log range must begin above 0"),
        ({"optim.lr": "log:1..1"}, r"optim\.lr=log:1\.\.1: expected a range whose low end is below"),
        ({"optim.lr": "lin:1"}, r"optim\.lr=lin:1: expected lin:LOW\.\.HIGH or"),
        ({"a": "int:0.5..3"}, "a=int:0.5..3: the ends of an int range must be whole numbers"),
        ({"a": "int:1..2/5"}, r"a=int:1\.\.2/5: /COUNT must be 2 or more, and give different values"),
        ({"a": "4,4"}, "a=4,4: expected one or more different values"),
        ({"a": "["}, r"a=\[: '\[' is not YAML"),
        ({"a": "1,,2"}, "a=1,,2: '' is no value"),
        ({"a": "inf"}, "a=inf: 'inf' is not a finite number"),
        ({"storage.region": "x,y"}, "storage is the same for all trials"),
        ({"out": "x"}, "out is the same for all trials"),
    ],
)
def test_a_wrong_entry_is_named(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(space)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim.lrr": 1}, r"optim\.lrr is not a setting; optim has .*lr, "),
        ({"optim": 1}, "optim is a group of settings; name one of epochs"),
        ({"optin.lr": 1}, r"optin\.lr is not a setting; the tree has .*catalog"),
        ({"optim.lr.x": 1}, r"optim\.lr\.x is not a setting; optim\.lr is a value"),
        ({"optim.epochs": 1.5}, r"optim\.epochs must be a whole number, got 1\.5 \(trial optim\.epochs=1\.5\)"),
        ({"optim.lr": "fast"}, r"optim\.lr must be a number, got 'fast'"),
        ({"clip.view.resize": "none"}, "must be 'stretch' or 'short_side', got 'none'"),
        ({"optim.lr": -1.0}, r"optim\.lr must be greater than 0"),
    ],
)
def test_settings_are_checked_against_the_config_tree(settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=f"space: .*{message}"):
        apply(TrainConfig(catalog="c", out="o"), settings)


def test_settings_go_where_their_paths_lead() -> None:
    base = TrainConfig(catalog="c", out="o", model=ModelConfig(options={"heads": 8}))
    made = apply(base, {"optim.lr": 1, "clip.view.train_scales": [1.0, 0.5], "model.options.scale": "dim"})
    assert made == dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=1.0),
        clip=dataclasses.replace(base.clip, view=dataclasses.replace(base.clip.view, train_scales=(1.0, 0.5))),
        model=ModelConfig(options={"heads": 8, "scale": "dim"}),
    )


def test_drawn_trials_are_different_the_same_again_and_begin_alike_when_there_are_more() -> None:
    axes = parse_space({"optim.lr": "log:1e-4..1e-2", "clip.sample.num_segments": "4,8,16"})
    eight = draw_trials(axes, 8, seed=3)
    assert eight == draw_trials(axes, 8, seed=3)
    assert draw_trials(axes, 12, seed=3)[:8] == eight
    assert eight != draw_trials(axes, 8, seed=4)
    assert len({trial_id(settings) for settings in eight}) == 8
    small = parse_space({"a": "1,2", "b": "x,y,z"})
    assert draw_trials(small, 50, seed=0) == grid_trials(small)
    assert grid_trials(small)[:4] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": "z"}, {"a": 2, "b": "x"}]
    with pytest.raises(ConfigError, match=r"a grid needs a list of values for optim\.lr; add /COUNT"):
        grid_trials(axes)


@pytest.mark.parametrize(("epochs", "grace"), [(3, 3), (8, 8), (20, 8), (24, 8), (25, 9), (100, 34)])
def test_no_trial_is_judged_before_a_third_of_its_epochs_nor_before_eight(epochs: int, grace: int) -> None:
    assert TuneConfig(catalog="c", out="o", optim=OptimConfig(epochs=epochs)).grace == grace


def test_flags_and_files_give_the_same_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--space", "optim.lr=log:1e-4..1e-2", "clip.sample.num_segments=4,8", "--grace-epochs", "20"]
    assert main(["tune", "set", "--out", "o", *flags, "--print-config"]) == 0
    path = tmp_path / "sweep.yaml"
    path.write_text(capsys.readouterr().out)
    config = load_config(TuneConfig, str(path))
    assert config.space == {"optim.lr": "log:1e-4..1e-2", "clip.sample.num_segments": "4,8"}
    assert config.grace == 20
    assert main(["tune", "set", "--out", "o", "--space", "optim.lr", "--print-config"]) == 2
    assert "space must be PATH=VALUES" in capsys.readouterr().err


# What fits a cluster


@pytest.mark.parametrize(
    ("nodes", "resources", "expected"),
    [
        ([4], TrainResourcesConfig(num_workers=2, decode_tasks=2), 1),
        ([4], TrainResourcesConfig(num_workers=1, decode_tasks=1), 2),
        ([8, 8], TrainResourcesConfig(num_workers=2, decode_tasks=2), 4),
        ([3, 3], TrainResourcesConfig(num_workers=1, cpus_per_worker=2, decode_tasks=1), 2),
        ([2, 2], TrainResourcesConfig(num_workers=1, cpus_per_worker=2, decode_tasks=1), 1),
        ([16], TrainResourcesConfig(num_workers=4, cpus_per_worker=0.5, decode_tasks=3), 3),
    ],
)
def test_as_many_trials_run_as_have_room_for_workers_and_decoders(
    nodes: list[float], resources: TrainResourcesConfig, expected: int
) -> None:
    assert trials_at_once([{"CPU": float(cpus)} for cpus in nodes], resources) == expected


def test_gpus_are_counted_node_by_node() -> None:
    nodes = [{"CPU": 0.0}, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 16.0}]
    resources = TrainResourcesConfig(num_workers=2, cpus_per_worker=4, gpus_per_worker=1, decode_tasks=8)
    assert trials_at_once(nodes, resources) == 2
    with pytest.raises(ClusterError, match="but the cluster has 0 CPU and 0 GPU, 32 CPU and 4 GPU, 16 CPU and 0 GPU"):
        trials_at_once(nodes, dataclasses.replace(resources, gpus_per_worker=3))


def test_a_trial_that_cannot_fit_is_refused_with_the_sum() -> None:
    resources = TrainResourcesConfig(num_workers=3, cpus_per_worker=1.5, decode_tasks=2)
    with pytest.raises(ClusterError) as caught:
        trials_at_once([{"CPU": 6.0}], resources)
    message = str(caught.value)
    assert "3 workers x 1.5 CPU + 2 CPU to decode (its driver takes none) = 6.5 CPU" in message
    assert "the cluster has 6 CPU" in message


# What is refused before Ray starts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"optim.speed": "1,2"}}, r"optim\.speed is not a setting"),
        ({"space": {"clip.sample.num_segments": "4,0"}}, "num_segments must be at least 1"),
        ({"space": {"model.options.dropout": "0.1,0.2", "model.options.depth": "1,2"}}, r"options\.depth is not"),
        ({"search": "grid", "space": {"optim.lr": "log:1e-3..1"}}, "add /COUNT"),
    ],
)
def test_what_a_trial_would_fail_of_is_refused_first(
    small_set: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tune(make_config(small_set, str(tmp_path / "sweep"), **changes))
    assert not (tmp_path / "sweep").exists()


def test_optuna_is_asked_for_by_name_where_it_is_missing(
    small_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'kinoray\[optuna\]'"):
        tune(make_config(small_set, str(tmp_path / "sweep"), search="optuna"))


def test_optuna_goes_on_from_what_is_known_and_never_tries_the_same_twice() -> None:
    pytest.importorskip("optuna")
    config = TuneConfig(catalog="c", out="o", search="optuna", space={"optim.lr": "log:1e-4..1e-2", "a": "1,2"})
    axes = parse_space(config.space)
    known: Settings = {"optim.lr": 0.003, "a": 1}
    open_trial: Settings = {"optim.lr": 0.0001, "a": 2}
    searcher = optuna_searcher(config, axes, {trial_id(known): (known, 0.75)}, [open_trial])
    found = [searcher.suggest(str(number))["choice"] for number in range(6)]
    assert found[0] == {"trial": trial_id(open_trial), "settings": open_trial}
    assert len({choice["trial"] for choice in found} | {trial_id(known)}) == 7
    few = parse_space({"a": "1,2,3"})
    searcher = optuna_searcher(dataclasses.replace(config, space={"a": "1,2,3"}), few, {}, [])
    assert sorted(searcher.suggest(str(number))["choice"]["settings"]["a"] for number in range(3)) == [1, 2, 3]
    assert searcher.suggest("4") == searcher.FINISHED


def test_all_samplings_of_a_sweep_share_its_cache(tmp_path: Path) -> None:
    config = make_config("set", "out", cache=CacheConfig(gb=1, folder=str(tmp_path)))
    trials = planned_trials(config, parse_space(config.space))
    assert len(trials) == 4
    shared = shared_cache(train_config(config), trials.values()).cache
    assert shared.grids == ("1x2", "2x2")
    assert Path(shared.folder).parent == tmp_path


# What is read from run folders


def test_the_table_is_what_the_run_folders_say(tmp_path: Path) -> None:
    storage, out = Storage(), str(tmp_path)
    run = trial_run(out, "abc")
    for epoch, value in enumerate((0.2, 0.5, 0.4, 0.5, 0.3), 1):
        RunFolder(storage, run).write_epoch(epoch_row(epoch, val_top1=value, decode_cpu_s=0.5))
    row = read_trial(storage, out, "abc", {"optim.lr": 1.0})
    assert (row.best_val_top1, row.best_epoch, row.epochs, row.status) == (0.5, 2, 5, "unfinished")
    assert (row.settings, row.run, row.decode_cpu_s) == ({"optim.lr": 1.0}, run, 2.5)
    assert row.curve == ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.5), (5, 0.3))
    write_outcome(storage, out, "abc", {"status": "failed", "error_class": "TrainingDiverged", "error_text": "nan"})
    assert read_trial(storage, out, "abc", {}).error == "TrainingDiverged: nan"
    waiting = read_trial(storage, out, "new", {"optim.lr": 3.0})
    assert (waiting.status, waiting.best_val_top1, waiting.epochs) == ("waiting", None, 0)
    with pytest.raises(JobError, match=r"no trial of .* has a score"):
        best_row([waiting], out)
    failed = read_trial(storage, out, "abc", {})
    poor = dataclasses.replace(failed, trial="poor", status="stopped", best_val_top1=0.1, error="")
    assert [row.trial for row in ranked([waiting, failed, poor])] == ["poor", "new", "abc"]
    assert best_row(ranked([failed, poor]), out) == poor
    with pytest.raises(JobError, match="TrainingDiverged: nan"):
        best_row([failed], out)


# The page


HOSTILE = '</style><script>alert(1)</script><img src=x onerror="alert(2)">$\\frac{'


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rows_of(scores: dict[tuple[float, Any], float | None], error: str = "") -> list[TrialRow]:
    return [
        TrialRow(
            trial=trial_id({"lr": lr, "other": other}),
            settings={"optim.lr": lr, "clip.sample.num_segments": other},
            status="finished",
            best_val_top1=score,
            best_epoch=2,
            epochs=2,
            run=f"/sweep/{error}",
            decode_cpu_s=1.0,
            error=error,
            curve=((1, 0.1), (2, score)) if score is not None else (),
        )
        for (lr, other), score in scores.items()
    ]


def test_the_heat_map_shows_the_best_of_each_cell() -> None:
    axes = parse_space({"optim.lr": "log:1e-3..1", "clip.sample.num_segments": "4,8"})
    rows = rows_of({(0.001, 4): 0.25, (0.1, 8): 0.5, (0.1, 4): 0.75, (1.0, 8): None})
    grid = heat_map(axes, rows)
    assert (grid.column_path, grid.row_path) == ("optim.lr", "clip.sample.num_segments")
    assert (grid.columns, grid.rows) == (["0.001", "0.1"], ["4", "8"])
    np.testing.assert_array_equal(grid.values, [[0.25, 0.75], [np.nan, 0.5]])
    many = heat_map(axes, rows_of({(10 ** (-number / 5), 4): number / 20 for number in range(16)}))
    assert len(many.columns) == 8
    assert np.nanmax(many.values) == 0.75
    alone = heat_map(parse_space({"optim.lr": "0.1,0.2"}), rows_of({(0.1, 4): 0.5, (0.2, 4): 0.25}))
    np.testing.assert_array_equal(alone.values, [[0.5, 0.25]])


def test_the_page_is_inert_and_has_every_trial() -> None:
    axes = parse_space({"optim.lr": "0.001,0.1", "clip.sample.num_segments": [HOSTILE, "8"]})
    rows = rows_of({(0.001, HOSTILE): 0.25, (0.1, "8"): 0.5, (0.1, HOSTILE): None}, error=HOSTILE)
    summary = {
        "out": HOSTILE,
        "catalog": HOSTILE,
        "search": "random",
        "grace_epochs": 8,
        "status": {"finished": 3},
    }
    page = tune_page(summary, axes, rows)
    parser = _Tags()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "iframe", "object", "link", "form"}
    links = [attrs["href"] for tag, attrs in parser.tags if tag == "a"]
    assert sorted(links) == ["#trial-1", "#trial-1", "#trial-2", "#trial-2"]  # curves and their names lead to the table
    assert [attrs["id"] for tag, attrs in parser.tags if tag == "tr" and "id" in attrs] == [
        "trial-1",
        "trial-2",
        "trial-3",
    ]
    assert not [attrs for _, attrs in parser.tags if any(name.startswith("on") for name in attrs)]
    assert [attrs["class"] for tag, attrs in parser.tags if tag == "svg"] == ["heat", "curves"]
    assert not names & {"img", "image", "use", "style-src"}
    cells = [(attrs["x"], attrs["y"], attrs["fill-opacity"]) for _, attrs in parser.tags if "fill-opacity" in attrs]
    assert cells == [("200", "20", "0.90"), ("130", "54", "0.10")]  # 50% at 0.1 and "8", 25% at 0.001 and the other
    assert [attrs["points"] for tag, attrs in parser.tags if tag == "polyline"] == [
        "0.0,180.0 400.0,100.0",
        "0.0,180.0 400.0,150.0",
    ]
    (policy,) = [attrs["content"] for tag, attrs in parser.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy or "")
    text = "".join(parser.text)
    assert HOSTILE in text
    for row in rows:
        assert row.trial in text
    assert "50.00%" in text
    assert tune_page(summary, axes, rows_of({(0.1, 4): None})).count("<svg") == 0


def test_the_axis_has_whole_epochs_and_a_trial_leads_to_its_own_file() -> None:
    axes = parse_space({"optim.lr": "0.001,0.1"})
    for last, expected in [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (23, [1, 4, 7, 10, 13, 16, 19, 23])]:
        curve = tuple((epoch, 0.5) for epoch in range(1, last + 1))
        (one,) = rows_of({(0.1, 4): 0.5})
        row = dataclasses.replace(one, curve=curve, run="/sweeps/a b/trials/abc")
        summary = {"out": "/sweeps/a b", "catalog": "set", "search": "grid", "grace_epochs": 8, "status": {}}
        parser = _Tags()
        page = tune_page(summary, axes, [row])
        parser.feed(page)
        assert [text for text in parser.text if text.isdigit()][: len(expected)] == [str(item) for item in expected]
        assert "trials/abc/metrics.jsonl" in [attrs.get("href") for tag, attrs in parser.tags if tag == "a"]
        elsewhere = tune_page(summary, axes, [dataclasses.replace(row, run="/sweeps/other/abc")])
        assert "metrics.jsonl" not in elsewhere


# Whole sweeps


@pytest.mark.ray
@pytest.mark.slow
def test_four_trials_run_where_two_have_room_and_the_best_can_be_trained_again(
    small_set: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four drivers of one CPU each, as Tune starts them by itself, would hold all CPUs of this Ray for ever."""
    cache = CacheConfig(gb=0.1, folder=str(tmp_path / "cache"))
    config = make_config(small_set, str(tmp_path / "sweep"), cache=cache, grace_epochs=99)
    summary = tune(config)

    assert "tune: 2 trials at a time" in capsys.readouterr().out
    assert summary["status"] == {"finished": 4}
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    assert sorted((line["settings"]["optim.lr"], line["settings"]["clip.sample.num_segments"]) for line in lines) == [
        (0.001, 1),
        (0.001, 2),
        (0.05, 1),
        (0.05, 2),
    ]
    rows = {line["trial"]: RunFolder(Storage(), line["run"]).epochs() for line in lines}
    for line in lines:
        assert [row.epoch for row in rows[line["trial"]]] == [1, 2]
        assert line["best_val_top1"] == max(row.val_top1 for row in rows[line["trial"]])
    assert summary["best"]["trial"] == lines[0]["trial"]
    assert summary["decode_cpu_s"] > 0
    # Of 4 trials x 2 epochs x 18 videos, 2 x 12 draws and 6 videos to score are decoded.
    assert sum(row.cached for trial in rows.values() for row in trial) == 4 * 2 * 18 - 2 * 12 - 6
    assert not list((tmp_path / "cache").iterdir())
    page = (tmp_path / "sweep" / "tune.html").read_text()
    assert all(name in page for name in rows)

    best = dataclasses.replace(load_config(TrainConfig, str(tmp_path / "sweep" / "best.yaml")), out=str(tmp_path / "b"))
    assert best.cache.gb == 0
    again = train(best)["metrics"]
    for row, expected in zip(again, rows[lines[0]["trial"]], strict=True):
        for name in ("loss", "top1", "val_loss", "val_top1", "lr"):
            assert row[name] == getattr(expected, name), name  # bit for bit, without the cache

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "trials").rglob("*") if path.is_file()}
    assert tune(config)["best"] == summary["best"]
    said = capsys.readouterr().out
    assert "4 have ended already" in said
    assert re.search(r"tune: 4 trials \([^)]*\); best is", said)  # without a time that nothing took
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "trials").rglob("*") if path.is_file()
    }
    with pytest.raises(ConfigError, match=r"holds a sweep with other settings: .*optim\.epochs is 2 there, 3 here"):
        tune(dataclasses.replace(config, optim=OptimConfig(epochs=3, batch_size=8)))


RUNNER = """
import sys
from kinoray.config.file import load_config
from kinoray.tune.verb import tune
from kinoray.tune.config import TuneConfig
if __name__ == "__main__":
    tune(load_config(TuneConfig, sys.argv[1]))
"""


def start_sweep(config: TuneConfig, folder: Path) -> "subprocess.Popen[bytes]":
    """The sweep as a process of its own, with a Ray of its own."""
    from kinoray.config.file import to_yaml

    (folder / "sweep.yaml").write_text(to_yaml(config))
    (folder / "runner.py").write_text(RUNNER)
    with (folder / "log").open("ab") as log:
        command = [sys.executable, str(folder / "runner.py"), str(folder / "sweep.yaml")]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_asha_stops_nothing_before_the_grace_period(small_set: str, tmp_path: Path) -> None:
    config = make_config(
        small_set,
        str(tmp_path / "sweep"),
        optim=OptimConfig(epochs=6, batch_size=8),
        space={"optim.lr": "0.2,0.1,0.05,0.02,0.0001,0.00001"},
        search="grid",
        grace_epochs=2,
        resources=TrainResourcesConfig(num_workers=1, decode_tasks=3, local_cpus=4),  # one at a time
    )
    trials = tmp_path / "sweep" / "trials"
    process = start_sweep(config, tmp_path)

    def first_ended_second_begun() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return len(list(trials.glob("*/outcome.json"))) >= 1 and len(list(trials.glob("*/metrics.jsonl"))) >= 2

    try:
        wait_until(first_ended_second_begun, 600, "one trial has ended and another has an epoch")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (ended,) = [path.parent for path in trials.glob("*/outcome.json")]
    before = {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    begun = {path.parent.name: path.read_text() for path in trials.glob("*/metrics.jsonl") if path.parent != ended}

    assert start_sweep(config, tmp_path).wait(timeout=1200) == 0, (tmp_path / "log").read_text()
    assert before == {path: path.read_bytes() for path in ended.rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["epochs"] >= 2 for row in rows)
    assert {row["status"] for row in rows} == {"finished", "stopped"}
    for name, text in begun.items():  # what was trained before the kill stayed as it was
        first = text.splitlines()[0]
        assert (trials / name / "metrics.jsonl").read_text().startswith(first)


@pytest.mark.slow
def test_a_sweep_on_s3_survives_a_trial_that_fails(s3_config: StorageConfig, bucket: str, ray_local: None) -> None:
    storage = Storage(s3_config)
    colour_set(storage, join(bucket, "set"), train=12, val=6)
    config = make_config(
        join(bucket, "set"),
        join(bucket, "sweep"),
        storage=s3_config,
        optim=OptimConfig(epochs=2, batch_size=8, clip_norm=0.0),
        space={"optim.lr": [0.05, 1e36]},
    )
    summary = tune(config)
    assert summary["status"] == {"finished": 1, "failed": 1}
    names = {info.uri.removeprefix(config.out + "/") for info in storage.list(config.out + "/")}
    assert {"sweep.json", "tune.json", "trials.jsonl", "best.yaml", "tune.html"} <= names
    rows = [json.loads(line) for line in storage.read(join(config.out, "trials.jsonl")).decode().splitlines()]
    assert rows[0]["settings"]["optim.lr"] == 0.05
    assert rows[1]["error"].startswith("TrainingDiverged: the loss is")
    assert summary["best"]["run"] == trial_run(config.out, rows[0]["trial"])


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below this one."""
    below: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(path.parent.name))
    found, left = {}, [pid]
    while left:
        for child in below.get(left.pop(), []):
            left.append(child)
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on_and_what_it_held_is_free_again(
    small_set: str, tmp_path: Path, ray_local: None
) -> None:
    """Its worker holds three of four CPUs: the trial could not go on if they stayed taken."""
    config = make_config(
        small_set,
        str(tmp_path / "sweep"),
        optim=OptimConfig(epochs=40, batch_size=8),
        space={"optim.lr": "0.05"},
        resources=TrainResourcesConfig(num_workers=1, cpus_per_worker=3, decode_tasks=1, local_cpus=4),
    )
    killed: list[int] = []

    def kill_the_driver() -> None:
        trials = tmp_path / "sweep" / "trials"
        wait_until(lambda: len(list(trials.glob("*/metrics.jsonl"))) == 1, 600, "the trial has an epoch")
        killed.extend(pid for pid, command in descendants(os.getpid()).items() if "ResourceTrainable" in command)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_the_driver)
    thread.start()
    summary = tune(config)
    thread.join()
    assert len(killed) == 1
    assert summary["status"] == {"finished": 1}
    (row,) = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    assert [epoch for epoch, _ in row["curve"]] == list(range(1, 41))
