"""The command line: one tree as flags and file, wrong settings refused in one line before anything starts."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import tyro
import yaml

from kinoray import __version__
from kinoray.cli import VERBS, main
from kinoray.config.file import config_from_mapping, dump_yaml, load_config, parse_yaml, to_yaml
from kinoray.config.help import Setting, settings_of, what_is_wrong
from kinoray.config.scoring import LabelWorkConfig, ScoringConfig
from kinoray.config.shared import (
    CacheConfig,
    ClipConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    StorageConfig,
    TrainResourcesConfig,
    digest,
    parse_options,
)
from kinoray.console import kept_if_interrupted
from kinoray.errors import ConfigError, StorageUnavailable
from kinoray.network.build import SHORT_NAMES, build_outline, check_clip, require_known_model
from kinoray.train.config import PRESETS, TrainConfig

TRAIN = ["train", "set", "--out", "run"]
RULES = r"[a-z_.]+ must .*"  # what a setting itself says of its value


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "unknown verb 'nope'"),
        ([*TRAIN, "--optim.lr", "-1"], "optim.lr must be greater than 0, got -1.0"),
        ([*TRAIN, "--optim.epochs", "many"], "--optim.epochs"),
        ([*TRAIN, "--optm.lr", "1"], "there is no --optm.lr; did you mean --optim.lr? kinoray train --help-all"),
        (
            [*TRAIN, "--clip.view.crop-px", "512"],
            "clip.view.crop_px must be between 16 and clip.view.resize_px, got 512",
        ),
        ([*TRAIN, "--clip.decode.backend", "cv2"], "'cv2'"),
        ([*TRAIN, "--model.options", "heads"], "model.options must be KEY=VALUE, got 'heads'"),
        ([*TRAIN, "--optim.batch-size", "1"], "optim.batch_size must be at least resources.num_workers (2), got 1"),
        (["train", "set"], "ConfigError: Missing: --out; kinoray train --help explains"),
        (["label"], "ConfigError: Missing: SOURCE, --checkpoint; kinoray label --help explains"),
        (["label", "x", "--bach-size", "3"], "there is no --bach-size; did you mean --batch-size? kinoray label"),
        (["label", "--hlep"], "there is no --hlep; did you mean --help?"),
        (
            ["label", "x", "y.mp4", "z.mp4", "--checkpoint", "c"],
            "'y.mp4' is one too many: SOURCE is a folder or s3:// prefix of videos, a CSV that lists them, an S3 "
            "Inventory (its manifest.json), a catalog (a pack's folder, a .parquet, or several as 'PLACE/*.parquet'), "
            "or one video; put quotes around what holds spaces",
        ),
        (
            ["label", "c/a.parquet", "c/b.parquet", "c/d.parquet", "--checkpoint", "c"],
            "or one video; put quotes around a pattern: 'PLACE/*.parquet'",
        ),
        (
            ["label", "x", "--checkpoint", "c", "--out", "my", "videos"],
            "--out takes one value, and 'videos' is one more",
        ),
        (["label", "x", "--checkpoint", "c", "--plan", "yes"], "--plan takes no value, got 'yes'"),
        (["label", "x", "--checkpoint", "c", "--allow-factory", "a:b", "c:d"], "say --allow-factory again before each"),
        (["demo", "x"], "kinoray demo takes nothing but flags, got 'x'"),
        (["label", "x", "--checkpoint", "c", "--workers", "x"], "--workers must be a whole number, got 'x'"),
        (["labels", "x", "--score", "0.9"], "--score must be two numbers, FROM TO, got '0.9'"),
        (["labels", "x", "--margin=0.1"], "--margin must be two numbers, FROM TO, got '0.1'"),
        (["label", "x", "--checkpoint", "c", "--num_segments", "x"], "--num-segments must be a whole number, got 'x'"),
        (["submit", "x"], "VERB must be one of pack, train, tune, evaluate, label, got 'x'"),
        ([*TRAIN, "--optim.lr"], "Missing: a value of --optim.lr"),
        ([*TRAIN, "--optim.epochs", "1.5"], "--optim.epochs must be a whole number, got '1.5'"),
        ([*TRAIN, "--optim.lr", "fast"], "--optim.lr must be a number, got 'fast'"),
        (["labels", "x", "--sort", "foo"], "--sort must be one of score, margin, entropy, video_id, got 'foo'"),
        (["correct", "x", "--out", "o"], "one or more files, or --accept-score be given, got nothing"),
        (["label", "x", "--checkpoint", "c", "--out", "o", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["pack", "x", "--out", "o", "--val-fraction", "2"], "val_fraction must be in 0 .. 1, got 2.0"),
        (["report", "x", "--max-strips", "-1"], "max_strips must be at least 0, got -1"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--config"], "--config needs"),
        (
            [*TRAIN, "--preset", "k300"],
            "--preset must be one of k400_paper, k600_paper, small, finetune, demo, got 'k300'",
        ),
        ([*TRAIN, "--preset"], "--preset needs one of k400_paper"),
        ([*TRAIN, "--preset", "demo", "--config", "x.yaml"], "--preset and --config exclude each other"),
        (["report", "x", "--preset", "demo"], "--preset is for train and tune, not for report"),
        ([*TRAIN, "--augment.mixup-alpha", "-1"], "augment.mixup_alpha must be at least 0, got -1.0"),
        ([*TRAIN, "--parallel", "fsdp", "--optim.compile"], "optim.compile must be off with parallel fsdp"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lrr: 1}", "optim.lrr is not a setting; there are"),
        ("optim: {lr: fast}", "optim.lr must be a number, got 'fast'"),
        ("optim: {epochs: 1.5}", "optim.epochs must be a whole number, got 1.5"),
        ("clip: {decode: {backend: cv2}}", "clip.decode.backend must be 'pyav' or 'decord' or 'torchcodec', got 'cv2'"),
        ("clip: 3", "clip must be a mapping, got 3"),
        ("clip: {view: {train_scales: [1, x]}}", "clip.view.train_scales[1] must be a number, got 'x'"),
        ("resources: {num_workers: true}", "resources.num_workers must be a whole number, got True"),
        ("- 1", "must hold a mapping"),
        ("clip: {view: {crop_px: 512}}", "clip.view.crop_px must be between 16 and clip.view.resize_px, got 512"),
        ("a: [", "is not YAML that can be read here: while parsing a flow node"),
        ("a: [", "found '<stream end>', line 1, column 5"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_field(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    assert main([*TRAIN, "--config", str(path)]) == 2
    error = one_line(capsys)
    assert message in error
    assert "bad.yaml" in error


def test_no_type_of_setting_is_refused_in_the_words_of_the_parser() -> None:
    """One setting of each type in any verb's tree, as all of a tree: tyro takes a third of a second for a whole one."""
    of_type: dict[tuple[Any, ...], tuple[str, Setting, Any]] = {}
    for verb in VERBS:
        tree = VERBS[verb].config()
        for setting in settings_of(tree):
            kind = (setting.wanted, setting.num_values, setting.is_repeated, "None" in setting.flag)
            if re.match("--[a-z]", setting.flag) and kind not in of_type:
                *parts, last = setting.path.split(".")
                part = functools.reduce(lambda cls, name: get_type_hints(cls)[name], parts, tree)
                of_type[kind] = (verb, setting, get_type_hints(part, include_extras=True)[last])
    assert len(of_type) > 30
    num_refused = 0
    for verb, setting, tree in of_type.values():
        for part in reversed(setting.path.split(".")):
            tree = dataclasses.make_dataclass("Tree", [(part, tree)])
        flag = "--" + setting.path.replace("_", "-")
        for wrong in (["x"], ["0.9"], []):
            messages = io.StringIO()
            try:
                with contextlib.redirect_stderr(messages):
                    tyro.cli(tree, args=[flag, *wrong])
            except SystemExit:
                said = what_is_wrong(verb, VERBS[verb].config(), [flag, *wrong], messages.getvalue())
                num_refused += 1
                ours = rf"{re.escape(flag)} (must be|takes) (one|two|any|no|a|whole|numbers)\b.*"
                assert re.fullmatch(rf"{ours}|Missing: a value of {re.escape(flag)}|{RULES}", said), said
            except ConfigError:
                pass  # in our own words
    assert num_refused > 50


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("catalog: set\nout: run\noptim: {lr: 0.5, epochs: 7}\nmodel: {options: {heads: 4}}\n", "utf-8")
    assert main(["train", "--config", str(path), "--optim.lr", "0.25", "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["optim"]["lr"], tree["optim"]["epochs"]) == (0.25, 7)
    assert (tree["model"]["options"], tree["catalog"], tree["split"]) == ({"heads": 4}, "set", "train")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    short = capsys.readouterr().out
    assert short.startswith(f"usage: kinoray {verb} ")
    assert "Example: kinoray" in short
    assert "--config" in short
    assert main(["help", *verb.split()]) == 0
    assert capsys.readouterr().out == short
    assert main([*verb.split(), "--help-all"]) == 0
    full = capsys.readouterr().out
    assert set(short.splitlines()) - set(full.splitlines()) <= {
        line for line in short.splitlines() if line.endswith(" settings.")
    }
    assert max(map(len, full.splitlines())) <= 110
    assert not re.search(r"^usage:.*(  |\[\[|-$)|^ *:$|\{,|,,", full, re.MULTILINE)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_flag_in_an_example_of_a_help_page_is_explained_on_it(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = re.compile(r"(?<![\w-])--[a-z][a-z.-]*")
    assert main([*verb.split(), "--help"]) == 0
    page = capsys.readouterr().out
    examples = re.findall(r"^Example: .*?\n\n", page, re.MULTILINE | re.DOTALL)
    used = {name for example in examples for name in flag.findall(example.partition(" -- ")[0])}
    explained = {name for line in page.splitlines() if line.startswith("  --") for name in flag.findall(line)}
    assert examples
    assert used <= explained | {"--config", "--preset", "--like", "--print-config"}


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_names_the_flags_that_are_parsed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro, which parses them, says what they are."""
    with pytest.raises(SystemExit):
        tyro.cli(VERBS[verb].config(), args=["--help"], prog="kinoray")
    flag = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*")
    parsed = set()
    for line in capsys.readouterr().out.splitlines():
        if line[1:3] == " -":  # behind the box
            parsed.update(flag.findall(line.strip("|\u2502 ").split("  ")[0]))
    explained = {name for setting in settings_of(VERBS[verb].config()) for name in flag.findall(setting.flag)}
    assert explained == parsed - {"--help"}


@pytest.mark.parametrize("verb", list(VERBS))
def test_what_matters_of_a_verb_are_settings_of_it(verb: str) -> None:
    settings = list(settings_of(VERBS[verb].config()))
    assert set(VERBS[verb].main) <= {setting.path for setting in settings}
    assert len({setting.path for setting in settings if setting.is_needed} | set(VERBS[verb].main)) <= 6
    assert all(setting.text for setting in settings)


def test_the_overview_has_every_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  ([a-z]+) ", text, re.MULTILINE) == [
        name
        for wish in dict.fromkeys(verb.wish for verb in VERBS.values())
        for name in VERBS
        if VERBS[name].wish == wish and " " not in name
    ]
    assert len(re.findall(r"^  [a-z]+ ", text, re.MULTILINE)) <= 18
    assert max(map(len, text.splitlines())) <= 110
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text


def test_the_help_of_a_verb_names_those_of_two_words_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    below = [name for name in VERBS if " " in name]
    assert below == ["labels search", "labels dedup", "labels select"]
    for name in below:
        assert main(["help", name.split()[0]]) == 0
        assert f"kinoray {name} " in capsys.readouterr().out
        assert main([*name.split(), "--nope"]) == 2
        assert f"kinoray {name}: ConfigError: there is no --nope" in one_line(capsys)


@pytest.mark.parametrize("word", ["-V", "--version", "version"])
def test_the_version_is_said(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"kinoray {__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("lable", "label"), ("trian", "train"), ("reprot", "report")])
def test_a_near_miss_gets_a_suggestion(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([typed, "x"], ["help", typed], [typed, "--help"]):
        assert main(arguments) == 2
        assert f"unknown verb {typed!r}; did you mean {meant}?" in one_line(capsys)


def test_verbs_that_score_videos_share_their_settings() -> None:
    """One class says and checks them; flags and files are flat, as the tree is."""
    shared = {setting.path: setting for setting in settings_of(ScoringConfig)}
    for verb in ("label", "evaluate", "calibrate", "bench"):
        found = {setting.path: setting for setting in settings_of(VERBS[verb].config())}
        differing = {path for path, setting in shared.items() if found[path] != setting}
        assert differing == ({"checkpoint"} if verb == "evaluate" else set())
    both = settings_of(LabelWorkConfig)
    assert {setting.path for setting in both} <= {setting.path for setting in settings_of(VERBS["bench"].config())}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "-1"], "batch_size must be at least 0, got -1"),
        (["--unit-size", "-1"], "unit_size must be at least 0, got -1"),
        (["--num-segments", "0"], "num_segments must be at least 1, got 0"),
        (["--protocol", "8x6", "--num-segments", "4"], "num_segments must be left out with protocol 8x6"),
        (["--max-bad-fraction", "2"], "max_bad_fraction must be in 0 .. 1, got 2.0"),
        (["--decode.device", "cuda"], "decode.device must be cpu without resources.gpus_per_worker, got 'cuda'"),
    ],
)
@pytest.mark.parametrize("verb", ["label", "evaluate", "calibrate", "bench"])
def test_what_verbs_share_is_checked_alike(
    verb: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "x", "--checkpoint", "c", "--out", "o", *flags]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [["report", "x", "--out", "o"], ["export", "x", "--format", "csv", "--to", "o"], ["compare", "x", "y"]],
    ids=lambda arguments: arguments[0],
)
def test_who_looks_at_a_few_frames_refuses_a_gpu_before_anything_is_read(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--decode.device", "cuda"]) == 2
    assert "decode.device must be cpu for so few frames, got 'cuda'" in one_line(capsys)


def test_print_config_round_trips(tmp_path: Path) -> None:
    config = TrainConfig(catalog="s3://b/set", out="run", resources=TrainResourcesConfig(num_workers=3))
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(TrainConfig, str(path)) == config


def test_digest_follows_the_content_and_nothing_else() -> None:
    one = TrainConfig(catalog="set", out="run")
    assert digest(one) == digest(config_from_mapping(TrainConfig, {"out": "run", "catalog": "set"}))
    assert digest(one) != digest(config_from_mapping(TrainConfig, {"out": "run2", "catalog": "set"}))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len(digest(one)) == 16


def test_options_are_read_as_yaml() -> None:
    assert parse_options(["a=1", "b=false", "c=x", "d=1.5", "e=null"]) == {
        "a": 1, "b": False, "c": "x", "d": 1.5, "e": None,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_options(["=1"])


ENDS = """
import atexit, ctypes, sys, threading, time
import kinoray.cli, kinoray.console
c = ctypes.CDLL(None)
c.on_exit(c.abort, None)  # as a native library that Python takes apart with its threads alive
atexit.register(print, "atexit ran")
threading.Thread(target=lambda: (time.sleep(0.1), print("the thread ended"))).start()
def run():
    {work}
    return kinoray.cli.main(sys.argv[1:])
kinoray.console.end_process(run)
"""


@pytest.mark.parametrize(
    ("work", "argument", "code", "said"),
    [
        ("", "--version", 0, ""),
        ("", "nothing-like-this", 2, "ConfigError: unknown verb"),
        ("raise SystemExit(143)", "", 143, ""),
        ("1 / 0", "", 1, "ZeroDivisionError"),
    ],
)
def test_a_command_ends_with_its_own_code_whatever_native_threads_do(
    work: str, argument: str, code: int, said: str
) -> None:
    program = ENDS.replace("{work}", work or "pass")
    done = subprocess.run(
        [sys.executable, "-c", program, argument], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout.splitlines()[-2:] == ["the thread ended", "atexit ran"]


NOISY = """
import os, sys
from pathlib import Path
from kinoray import cli, console, errors
def verb():
    os.write(2, b"before\\n")
    file = console.keep_native_messages(Path(sys.argv[1]))
    os.write(2, b"core_worker.cc: as native code does\\n")
    print("as Ray's loggers do", file=file)
    print("ours", file=sys.stderr)
    {end}
console.end_process(lambda: cli.guarded("label", verb))
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return 0", 0, []),
        ("raise errors.JobError('x')", 1, ["kinoray label: JobError: x", "kinoray label: {kept}"]),
        ("raise errors.TooManyBad('x')", 1, ["kinoray label: TooManyBad: x"]),
        ("raise errors.StorageUnavailable('x')", 1, ["kinoray label: StorageUnavailable: x"]),
        ("1 / 0", 1, ["ZeroDivisionError: division by zero", "{kept}"]),
        ("raise KeyboardInterrupt", 130, ["kinoray label: interrupted"]),
        ("raise KeyboardInterrupt('3 of 4 stay')", 130, ["kinoray label: interrupted; 3 of 4 stay"]),
    ],
)
def test_native_messages_are_kept_in_a_file_that_is_named_when_something_fails(
    end: str, code: int, said: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "ray.err"
    program = [sys.executable, "-c", NOISY.replace("{end}", end), str(file)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:2] == ["before", "ours"]
    kept = f"what Ray said meanwhile is in {file}"
    assert lines[2:][-len(said) :] == [line.replace("{kept}", kept) for line in said] if said else len(lines) == 2
    assert file.read_text() == "core_worker.cc: as native code does\nas Ray's loggers do\n"


def test_the_innermost_that_is_interrupted_says_what_is_kept() -> None:
    def unreadable() -> str:
        raise StorageUnavailable("the store is down")

    outer = pytest.raises(KeyboardInterrupt, match="3 of 4")
    with outer, kept_if_interrupted(unreadable), kept_if_interrupted(lambda: "3 of 4"):
        raise KeyboardInterrupt
    told = pytest.raises(KeyboardInterrupt, match="cannot be read now: the store is down")
    with told, kept_if_interrupted(unreadable):
        raise KeyboardInterrupt


SLOW_END = """
import atexit, time
from kinoray import cli, console
atexit.register(lambda: (print("cleaning up", flush=True), time.sleep(600)))
def verb():
    print("works", flush=True)
    time.sleep(600)
console.end_process(lambda: cli.guarded("label", verb))
"""


def test_ctrl_c_once_more_does_not_wait_for_what_ends_slowly() -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW_END], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in (b"works\n", b"cleaning up\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b"kinoray label: interrupted\n"


@pytest.mark.parametrize(
    "command", [["-m", "kinoray"], ["-c", "from kinoray.cli import main; raise SystemExit(main())"]]
)
def test_every_way_to_call_it_ends_the_process(command: list[str], tmp_path: Path) -> None:
    """Also the installed script, which is the second one."""
    (tmp_path / "sitecustomize.py").write_text("import ctypes\nc = ctypes.CDLL(None)\nc.on_exit(c.abort, None)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    for arguments, code in ((["--version"], 0), (["nothing-like-this"], 2)):
        done = subprocess.run(
            [sys.executable, *command, *arguments], capture_output=True, env=environment, timeout=200, check=False
        )
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("+1.5e3", 1.5e3), ("-.5e-2", -0.5e-2), ("2.e1", 20.0), ("1.0e-3", 1e-3)]
    + [(text, text) for text in ("1e", "e5", "1e-3x", "a1e-3", "1e5e5", "1e5 b", "v1e5")],
)
def test_numbers_are_written_as_everybody_writes_them(text: str, value: float | str, tmp_path: Path) -> None:
    assert parse_options([f"eps={text}"]) == {"eps": value}
    (tmp_path / "c.yaml").write_text(f"optim:\n  lr: {text}\n")
    if isinstance(value, float) and value > 0:
        assert load_config(TrainConfig, str(tmp_path / "c.yaml")).optim.lr == value
    named = parse_yaml(dump_yaml({"out": text}), "x")  # what is text stays text
    assert named == {"out": text}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_file_with_flags_on_top(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TRAIN, "--optim.epochs", "3", "--print-config"]
    assert main([*arguments, f"--preset={name}"]) == 0
    shown = capsys.readouterr().out
    recipe = PRESETS[name]()
    expected = dataclasses.replace(recipe, catalog="set", out="run", optim=dataclasses.replace(recipe.optim, epochs=3))
    assert config_from_mapping(TrainConfig, yaml.safe_load(shown)) == expected
    path = tmp_path / "preset.yaml"
    path.write_text(to_yaml(recipe), "utf-8")
    assert main([*arguments, "--config", str(path)]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("name", PRESETS)
def test_a_sweep_of_a_preset_decodes_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "set", "--out", "sweep", f"--preset={name}", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cache"]["gb"] == 20.0  # tune's own; a training has none


def test_an_option_of_the_network_joins_those_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    def options(*flags: str) -> object:
        assert main([*TRAIN, "--preset=small", *flags, "--print-config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)["model"]["options"]

    assert options() == {"backbone": "resnet18", "scale": "dim"}
    assert options("--model.options", "backbone=resnet50", "heads=4") == {
        "backbone": "resnet50",
        "scale": "dim",
        "heads": 4,
    }
    assert options("--model.factory", "tsn", "--model.options", "backbone=resnet50") == {"backbone": "resnet50"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> TrainConfig:
    assert main([*arguments, "--print-config"]) == 0, capsys.readouterr().err
    return config_from_mapping(TrainConfig, yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize("factory", [name for name in SHORT_NAMES if name not in ("huggingface", "image_text")])
def test_a_small_set_trains_every_network(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The network is built, and sees the preset's clip, without memory (Hugging Face's come by --init-from)."""
    config = printed(capsys, *TRAIN, "--preset", "small", "--model.factory", factory)
    assert config.optim == PRESETS["small"]().optim
    net: Any = build_outline(config.model, 3)
    check_clip(net.input_spec, config.clip)
    sample, crop = config.clip.sample, config.clip.view.crop_px
    assert sample.num_frames == 16 or sample.frames_per_segment == net.input_spec.frames_per_segment
    assert crop == (net.input_spec.crop_px or 112)
    shape = (1, sample.num_segments, sample.frames_per_segment)
    streams = {"rgb": 3 if net.input_spec.rgb else 0, "flow": net.input_spec.flow_channels}
    clips = {name: torch.empty((*shape, c, crop, crop), device="meta") if c else None for name, c in streams.items()}
    with torch.no_grad():
        assert net.eval()(**clips).shape == (1, 3)


def test_a_presets_or_files_options_go_to_its_own_network_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = PRESETS["small"]()
    other = [*TRAIN, "--model.factory", "r3d_18", "--clip.sample.frames-per-segment", "8"]
    config = printed(capsys, *other, "--preset", "small")
    assert config.model == ModelConfig(factory="r3d_18")
    assert (config.clip.sample.num_segments, config.clip.sample.frames_per_segment) == (1, 8)
    (tmp_path / "small.yaml").write_text(to_yaml(small), "utf-8")
    config = printed(capsys, *other, "--config", str(tmp_path / "small.yaml"))
    assert config.model == ModelConfig(factory="r3d_18")
    assert config.clip.sample.num_segments == small.clip.sample.num_segments  # a file is taken as it is


def test_published_weights_bring_the_recipe_of_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, start = PRESETS["finetune"](), ["--init-from", "torchvision:mvit_v2_s"]
    config = printed(capsys, *TRAIN, *start)
    assert (config.optim, config.model, config.clip) == (recipe.optim, ModelConfig(), ClipConfig())
    usual = OptimConfig()
    own = ["--optim.epochs", str(usual.epochs), "--optim.layer-decay", "1"]  # a default that is set is set
    optim = dataclasses.replace(recipe.optim, epochs=usual.epochs, layer_decay=1.0)
    assert printed(capsys, *TRAIN, *start, *own).optim == optim
    small = printed(capsys, *TRAIN, *start, "--preset", "small", "--model.options", "drop_path=0.3")
    assert small.optim == PRESETS["small"]().optim
    assert small.model == ModelConfig(options={"drop_path": 0.3})
    assert small.clip == ClipConfig()  # the published network's, not the preset's
    (tmp_path / "own.yaml").write_text("init_from: torchvision:mvit_v2_s\n", "utf-8")
    assert printed(capsys, *TRAIN, "--config", str(tmp_path / "own.yaml")).optim == usual
    backbone = printed(capsys, *TRAIN, "--init-from", "timm:resnet18", "--model.factory", "tsn")
    assert backbone.optim == usual


@pytest.fixture
def run(tmp_path: Path) -> TrainConfig:
    """Settings of a run whose folder is there."""
    config = TrainConfig(
        catalog="/sets/theirs",
        out=str(tmp_path / "theirs"),
        model=ModelConfig(factory="tsm", options={"backbone": "tiny"}),
        clip=ClipConfig(sample=SampleConfig(num_segments=3)),
        optim=OptimConfig(epochs=7),
        storage=StorageConfig(endpoint_url="http://theirs:9000"),
        cache=CacheConfig(gb=1.0, folder="/theirs"),
        resources=TrainResourcesConfig(num_workers=3, address="ray://theirs:10001"),
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text(to_yaml(config), "utf-8")
    return config


def test_a_training_like_another_takes_its_settings_but_not_its_places(
    run: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "train", "--like", run.out, "--out", "mine", "--model.options", "shift_div=4")
    assert found == dataclasses.replace(
        run,
        out="mine",
        model=ModelConfig(factory="tsm", options={"backbone": "tiny", "shift_div": 4}),
        storage=StorageConfig(),
        cache=CacheConfig(gb=1.0),
        resources=TrainResourcesConfig(num_workers=3),
    )
    config = Path(run.out) / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("gb: 1.0", "gb: 0.0"), "utf-8")
    assert printed(capsys, "train", "--like", run.out, "--out", "mine").cache.gb == 0
    assert main(["tune", "--like", run.out, "--out", "mine", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cache"]["gb"] == 20.0  # trials share one decode
    store = ["--storage.endpoint-url", "http://mine:9000"]
    found = printed(capsys, "train", "set", "--like", run.out, "--out", "mine", "--optim.epochs", "20", *store)
    assert (found.catalog, found.optim.epochs, found.clip) == ("set", 20, run.clip)
    assert found.storage.endpoint_url == "http://mine:9000"


def test_a_run_that_is_no_run_or_no_ones_word_is_refused(run: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(run.out) / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("factory: tsm", "factory: os:system"), "utf-8")
    for arguments, message in (
        (["train", "--like", run.out], f"--like {run.out} names the network 'os:system', which does not ship"),
        (["train", "--like", f"{run.out}/x", "--out", "o"], "--like must name the run folder of a training, got"),
        ([*TRAIN, "--like", run.out, "--preset", "demo"], "--preset and --like exclude each other"),
        (["report", "x", "--like", run.out], "--like is for train and tune, not for report"),
    ):
        assert main(arguments) == 2
        assert message in one_line(capsys)
    assert printed(capsys, "train", "--like", run.out, "--out", "o", "--model.factory", "tsn").model.options == {}
    config.write_text("optim: {lrr: 1}", "utf-8")
    assert main(["train", "--like", run.out, "--out", "o"]) == 2
    assert "config.yaml: optim.lrr is not a setting" in one_line(capsys)
    config.write_text(to_yaml(run), "utf-8")
    assert main(["train", "--like", run.out]) == 2
    assert "--out" in one_line(capsys)


def test_the_papers_recipes_are_the_papers() -> None:
    for name, rate in (("k400_paper", 0.008), ("k600_paper", 0.012)):
        recipe = PRESETS[name]()
        optim, sample, view = recipe.optim, recipe.clip.sample, recipe.clip.view
        assert (optim.lr, optim.epochs, optim.batch_size) == (rate, 100, 128)
        assert (sample.num_segments, sample.frames_per_segment) == (16, 6)
        assert (view.resize, view.resize_px, view.crop_px, view.train_flip) == ("stretch", 256, 224, True)
        assert len(view.train_scales) > 1
        assert recipe.model.factory == "vcm_sdd_r101"
        require_known_model(recipe.model)
