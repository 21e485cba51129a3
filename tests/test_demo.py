"""The demo: its files, its command lines, its S3 server; and (slow) the whole of it on both kinds of storage."""

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import test_huggingface as hub
from kinoray.cli import VERBS, main
from kinoray.config.file import to_yaml
from kinoray.config.shared import StorageConfig
from kinoray.demo.config import DemoConfig
from kinoray.demo.verb import Recipe, Steps, ask_published, command_line, demo, make_recipe, make_videos, s3_server
from kinoray.errors import ConfigError, MediaError
from kinoray.storage.objects import Storage
from kinoray.train.config import PRESETS
from kinoray.video.frames import probe
from small_sets import LABELS, colour_video

UNREADABLE = {"empty", "random", "index_lost", "audio_only"}
READABLE = {"cut_front_index", "one_frame"}


def steps(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(name, getattr(recipe, name)) for name in recipe.__dataclass_fields__]


@pytest.mark.parametrize("storage", [StorageConfig(), StorageConfig(endpoint_url="http://h:1", addressing="path")])
@pytest.mark.parametrize("out", ["demo-out", "a folder's name"])
def test_the_printed_command_line_gives_the_config_that_was_run(
    storage: StorageConfig, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(DemoConfig(out=out), f"{out}/videos", "s3://bucket", storage, epochs=3)
    assert [name for name, _ in steps(recipe)] == ["pack", "train", "evaluate", "label", "report"]
    for name, config in steps(recipe):
        assert isinstance(config, VERBS[name].config())
        words = shlex.split(command_line(name, config))
        assert words[:2] == ["kinoray", name]
        assert main([*words[1:], "--print-config"]) == 0
        assert capsys.readouterr().out == to_yaml(config)


def test_a_command_line_says_only_what_differs_from_the_defaults() -> None:
    recipe = make_recipe(DemoConfig(), "videos", "out", StorageConfig(), epochs=20)
    assert command_line("label", recipe.label) == "kinoray label videos --checkpoint out/run --out out/labels"
    assert "epochs" not in command_line("train", recipe.train)


def test_a_published_network_is_asked_about_videos_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub.save(tmp_path / "saved", "videomae")
    good, bad = tmp_path / "one.mp4", tmp_path / "two.mp4"
    good.write_bytes(colour_video(LABELS[0], 1))
    bad.write_bytes(b"no video")
    steps = Steps()
    ask_published(f"hf:{tmp_path / 'saved'}", [str(good), str(bad)], steps)
    ask_published(f"hf:{tmp_path}", [str(good)], steps)
    said = capsys.readouterr().out
    rows = [line.split(maxsplit=1) for line in said.splitlines() if ".mp4 " in line and "kinoray label" not in line]
    assert [row[0] for row in rows] == ["one.mp4", "two.mp4"]
    assert rows[0][1].rpartition("  ")[0].strip() in hub.NAMES
    assert rows[1][1].split() == ["UnreadableContainer", "0.00"]
    assert "everything else of the demo is done" in said
    assert [result for _, _, result in steps.done] == ["2 videos asked about", f"hf:{tmp_path} could not be asked"]


def test_the_set_is_whole_or_absent_and_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    left_by_a_kill = tmp_path / "videos.unfinished" / "disc-up"
    left_by_a_kill.mkdir(parents=True)
    (left_by_a_kill / "half.mp4").write_bytes(b"half")
    assert make_videos(folder, videos_per_class=4, seed=3) == 6 * 4 + 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]
    broken = {path.stem.removeprefix("broken-"): path for path in folder.glob("*/broken-*.mp4")}
    assert set(broken) == UNREADABLE | READABLE
    assert len({path.parent for path in broken.values()}) == 6
    for path in folder.glob("*/*.mp4"):
        if path.stem.removeprefix("broken-") in UNREADABLE:
            with pytest.raises(MediaError):
                probe(path.read_bytes(), PRESETS["demo"]().clip.decode)
        else:
            probe(path.read_bytes(), PRESETS["demo"]().clip.decode)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.mp4")}
    assert make_videos(folder, videos_per_class=4, seed=3) == 30
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*.mp4")} == before


def test_a_folder_with_another_demo_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"videos_per_class": 4, "epochs": 1}')
    with pytest.raises(ConfigError, match=r"holds a demo with .*'epochs': 1.* not .*'epochs': 2"):
        demo(DemoConfig(out=str(tmp_path)), videos_per_class=4, epochs=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^out .*file is a file"):
        demo(DemoConfig(out=str(tmp_path / "file")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "file"]


def test_the_s3_server_works_with_its_own_keys_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "of-the-user")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-user")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    before = dict(os.environ)
    with s3_server("shelf") as config:
        storage = Storage(config)
        storage.put("s3://shelf/a", b"data")
        assert storage.read("s3://shelf/a") == b"data"
        assert os.environ["AWS_ACCESS_KEY_ID"] == "demo"
        assert "AWS_PROFILE" not in os.environ
    assert dict(os.environ) == before
    assert config.endpoint_url is not None
    port = urlsplit(config.endpoint_url).port
    with socket.socket() as probe_socket:
        assert probe_socket.connect_ex(("127.0.0.1", port)) != 0


def test_without_moto_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moto.server", None)
    with (
        pytest.raises(ConfigError, match=r"storage s3 needs .* pip install 'kinoray\[s3-demo\]'"),
        s3_server("shelf"),
    ):
        pass


def check(totals: dict[str, Any], videos_per_class: int) -> None:
    """Every file that was made is a row, and the page shows it."""
    assert totals["videos"] == 6 * videos_per_class + 6
    assert totals["labelled"] + totals["quarantined"] == totals["videos"]
    assert totals["quarantined"] == len(UNREADABLE)
    assert totals["chance"] == 1 / 6
    data = Path(totals["report"]).parent / "data"
    rows = "".join(path.read_text(encoding="utf-8") for path in data.glob("rows-*.js"))
    assert f'"listed":{totals["videos"]},' in (data / "site.js").read_text(encoding="utf-8")
    assert all(f"broken-{kind}" in rows for kind in UNREADABLE | READABLE)


@pytest.mark.slow
def test_a_small_demo_runs_whole_and_a_second_time_goes_on_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DemoConfig(out=str(tmp_path / "demo"))
    first = demo(config, videos_per_class=4, epochs=1)
    check(first, 4)
    said = capsys.readouterr().out
    for verb in ("pack", "train", "evaluate", "label", "report"):
        assert f"\n== {verb}: " in said
        assert f"\n   kinoray {verb} " in said
    assert list(first["seconds"]) == ["videos", "pack", "train", "evaluate", "label", "report"]
    metrics = (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes()
    second = demo(config, videos_per_class=4, epochs=1)
    check(second, 4)
    assert second["top1"] == first["top1"]
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_the_demo_runs_on_s3(tmp_path: Path) -> None:
    config = DemoConfig(out=str(tmp_path / "demo"), storage="s3")
    check(demo(config, videos_per_class=4, epochs=1), 4)
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert left == {"demo.json", "videos", "report"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_learns_things_and_motions(tmp_path: Path) -> None:
    config = DemoConfig(out=str(tmp_path / "demo"))
    totals = demo(config)
    check(totals, 80)
    assert totals["top1"] >= 3 * totals["chance"]
