"""No verb writes among what is not its own: said first, in one line that names the flag, and nothing is changed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kinoray.catalog.table import catalog_of_source
from kinoray.cli import main
from kinoray.config.shared import StorageConfig
from kinoray.doctor.source import open_source
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.label.config import LabelConfig
from kinoray.library.config import CorrectConfig, ReportConfig
from kinoray.library.correct import correct
from kinoray.library.report import report
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import Writer, require_file, require_folder, require_places
from small_sets import catalog_of, save_as_pack
from small_tables import label_library, ledger_in, library
from test_found_catalogs import as_nobody

STORAGE = Storage()

COMMANDS = {
    "pack": ["pack", "videos"],
    "train": ["train", "set"],
    "tune": ["tune", "set", "--num-trials", "2"],
    "label": ["label", "videos", "--checkpoint", "run"],
    "label --plan": ["label", "videos", "--checkpoint", "run", "--plan"],
    "evaluate": ["evaluate", "set", "--checkpoint", "run"],
    "evaluate --ensemble": ["evaluate", "set", "--ensemble", "run/a", "run/b"],
    "calibrate": ["calibrate", "set", "--checkpoint", "run"],
    "correct": ["correct", "labels", "--accept-score", "0.5"],
    "export": ["export", "labels", "--format", "csv"],
    "report": ["report", "labels"],
    "import": ["import", "torchvision:r3d_18"],
    "demo": ["demo"],
    "doctor": ["doctor", "videos"],
}
WRITERS = {"label --plan": "label", "evaluate": "label", "evaluate --ensemble": "label", "calibrate": "label"}
RECORDS = {
    "pack": "plan.json",
    "train": "run.json",
    "tune": "sweep.json",
    "label": "0f/job.json",
    "labels": "_by_kinoray.json",
    "correct": "corrections.json",
    "export": "quarantined.jsonl",
    "report": "data/site.js",
    "import": "checkpoint.json",
    "demo": "demo.json",
    "doctor": "doctor.json",
}


def run(command: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must be refused says."""
    words = COMMANDS[command]
    code = main([*words, "--to" if words[0] == "export" else "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def put(path: Path, data: bytes = b"{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that the commands name; that is all that is looked at before the output."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "run" / "checkpoint.json")
    put(tmp_path / "videos" / "bus" / "a.mp4")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_verb_writes_into_no_library_no_pack_no_file_and_nothing_denied(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "to" if command == "export" else "out"
    there = tmp_path / "there"
    for name in ("a.mp4", "b.mp4", "bus/c.mp4", "d.txt"):
        put(there / name, b"mine")
    other = tmp_path / "other"
    record, what = ("run.json", "a training run") if command == "pack" else ("pack.json", "a pack")
    put(other / record)
    put(other / "catalog.parquet", b"table")
    put(tmp_path / "denied" / ".keep").parent.chmod(0o555)
    before = files_in(tmp_path)
    said = run(command, there, capsys)
    assert f"ConfigError: {flag} {there} holds files that are not kinoray's (a.mp4, b.mp4, bus/, ...)" in said
    assert f"{flag} {other} holds {what} ({record}): choose an empty folder" in run(command, other, capsys)
    assert f"{flag} {there}/a.mp4 is a file" in run(command, there / "a.mp4", capsys)
    assert f"since {there}/a.mp4 is a file" in run(command, there / "a.mp4" / "x", capsys)
    assert f"{flag} /proc/x cannot be written" in run(command, Path("/proc/x"), capsys)
    with as_nobody(tmp_path):
        for place in (tmp_path / "denied", tmp_path / "denied" / "new" / "below"):
            said = run(command, place, capsys)
            assert f"{flag} {place} cannot be written: no permission; choose another folder" in said
            assert f"write {tmp_path}/denied" in said
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("writer", get_args(Writer))
def test_what_a_verb_has_begun_it_goes_on_with_and_no_other_one_takes(writer: Writer, tmp_path: Path) -> None:
    for name in (".DS_Store", ".kinoray-tmp-x", "lost+found/x", "empty/.x"):
        put(tmp_path / "out" / name)
    require_folder(STORAGE, "out", str(tmp_path / "out"), writer)
    put(tmp_path / "out" / RECORDS[writer])
    put(tmp_path / "out" / "more" / "x")
    require_folder(STORAGE, "out", str(tmp_path / "out"), writer)
    for other in RECORDS:
        if other != writer:
            with pytest.raises(ConfigError, match=f"^out .*/out holds a?.* \\({RECORDS[writer]}\\): choose"):
                require_folder(STORAGE, "out", str(tmp_path / "out"), other)  # type: ignore[arg-type]


def test_a_trial_of_a_sweep_is_a_run_that_train_may_begin(tmp_path: Path) -> None:
    """The sweep says in it which trial it is, before any training."""
    put(tmp_path / "trial" / "trial.json")
    require_folder(STORAGE, "out", str(tmp_path / "trial"), "train")
    with pytest.raises(ConfigError, match=r"holds a training run \(trial.json\)"):
        require_folder(STORAGE, "out", str(tmp_path / "trial"), "tune")


def test_prefixes_are_looked_at_like_folders(bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    out = join(bucket, "out")
    require_folder(storage, "out", out, "label")
    storage.put(join(out, "0f", "done", "x.json"), b"{}")
    with pytest.raises(ConfigError, match=rf"^out {out} holds files that are not kinoray's \(0f/\)"):
        require_folder(storage, "out", out, "label")
    storage.put(join(out, "0f", "job.json"), b"{}")
    require_folder(storage, "out", out, "label")
    with pytest.raises(ConfigError, match=rf"^out {out} holds labellings \(0f/job.json\)"):
        require_folder(storage, "out", out, "pack")
    with pytest.raises(ConfigError, match=r"^out .*/job.json is an object"):
        require_folder(storage, "out", join(out, "0f", "job.json"), "pack")
    with pytest.raises(ConfigError, match=r"^out s3://absent-bucket/x/: there is no bucket"):
        require_folder(storage, "out", "s3://absent-bucket/x", "pack")


def test_files_are_written_over_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_file("to", str(put(tmp_path / "a.csv")))
    require_file("to", str(tmp_path / "new" / "a.csv"))
    for words in (
        ["labels", "labels", "--format", "csv", "--to"],
        ["compare", "a", "b", "--out"],
        ["bench", "videos", "--checkpoint", "run", "--out"],
        ["plan", "--rates", "rates.json", "--videos", "9", "--deadline", "1h", "--node", "a:1cpu,1gbit", "--out"],
    ):
        flag = words[-1].removeprefix("--")
        assert main([*words, str(tmp_path)]) == 2
        assert f"{flag} {tmp_path} is a folder: choose the name of a file" in capsys.readouterr().err
        assert main([*words, "/proc/x"]) == 2
        assert f"{flag} /proc/x cannot be written" in capsys.readouterr().err


# What a verb writes first is its record, so that a killed one can go on

KILLED = """
import os, sys
from kinoray.storage.folder import FolderStore
from kinoray.library.config import CorrectConfig, ReportConfig
from kinoray.library.correct import correct
from kinoray.library.report import report
put = FolderStore.put
def put_one(self, path, data):
    put(self, path, data)
    print(path, flush=True)
    os.kill(os.getpid(), 9)
FolderStore.put = put_one
verb, labels, out = sys.argv[1:]
if verb == "correct":
    correct(CorrectConfig(predictions=labels, out=out, accept_score=0.5))
else:
    report(ReportConfig(predictions=labels, out=out, max_strips=0))
"""


@pytest.mark.parametrize(("verb", "last"), [("correct", "catalog.parquet"), ("report", "index.html")])
def test_a_verb_that_was_killed_behind_its_first_file_goes_on(verb: str, last: str, tmp_path: Path) -> None:
    ledger = ledger_in(STORAGE, tmp_path / "labels")
    label_library(ledger, library(10))
    out = str(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, verb, ledger.root, out], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / last).exists()
    assert killed.stdout.decode().strip() == f"{out}/{RECORDS[verb]}"
    if verb == "correct":
        correct(CorrectConfig(predictions=ledger.root, out=out, accept_score=0.5))
    else:
        report(ReportConfig(predictions=ledger.root, out=out, max_strips=0))
    assert (tmp_path / "out" / last).exists()


def test_two_that_start_at_once_do_not_take_each_other_for_strangers(tmp_path: Path) -> None:
    """One makes a folder, the record aside, then the record, then the rest; the other asks all the while."""
    script = (
        "import sys\nfrom kinoray.storage.objects import Storage\n"
        "for i in range(150):\n"
        "    Storage().put_if_absent(f'{sys.argv[1]}/{i}/out/0f/job.json', b'{}')\n"
        "    Storage().put(f'{sys.argv[1]}/{i}/out/0f/plans/x.json', b'{}')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "w")])
    asked = 0
    try:
        while other.poll() is None:
            for place in sorted((tmp_path / "w").glob("*"), key=lambda path: int(path.name))[-2:]:
                require_folder(STORAGE, "out", str(place / "out"), "label")
                asked += 1
            time.sleep(0)
    finally:
        other.kill()
        other.wait()
    assert other.returncode == 0
    assert asked > 0


# A folder that is both a pack and a library


def test_videos_beside_a_pack_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lib = tmp_path / "lib"
    rows = [{"video_id": "v", "uri": str(put(lib / "shards" / "a.tar"))}]
    save_as_pack(STORAGE, str(lib), catalog_of(rows))
    assert len(catalog_of_source(STORAGE, str(lib))) == 1
    assert capsys.readouterr().err == ""
    inside = put(lib / "bus" / "in.mp4")
    for name in ("a.mp4", "bus/b.mkv", "notes.txt", ".trash/c.mp4"):
        put(lib / name)
    save_as_pack(STORAGE, str(lib), catalog_of([*rows, {"video_id": "in", "uri": str(inside)}]))
    assert len(catalog_of_source(STORAGE, str(lib))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{lib} stands for the pack in it (pack.json), and 2 videos that are not in it lie beside it" in said
    assert any("2 videos that are not in it" in note for note in open_source(STORAGE, str(lib)).notes)


GPU = ["--resources.gpus-per-worker", "1"]
HERE = ["label", "{there}", "--checkpoint", "i3d", "--out", "{there}/new"]


def test_files_that_are_named_together_are_looked_for_in_their_folder(tmp_path: Path) -> None:
    place = str(tmp_path / "*.parquet")
    config = LabelConfig(source=place, checkpoint="run", out=str(tmp_path / "new"))
    require_places(config, "label")
    with pytest.raises(ObjectNotFound, match=r"absent/\*\.parquet: no such folder or video"):
        require_places(replace(config, source=str(tmp_path / "absent" / "*.parquet")), "label")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(
            ["train", "set", "--out", "run", "--optim.lr", "0"], 2, "optim.lr must be greater than 0", id="setting"
        ),
        pytest.param(["label", "{absent}", *HERE[2:]], 1, "{absent}: no such folder or video", id="source"),
        pytest.param(["bench", "{absent}", *HERE[2:4]], 1, "{absent}: no such folder or video", id="bench"),
        pytest.param(["train", "{absent}", "--out", "x"], 1, "{absent}: no such file; expected a folder", id="catalog"),
        pytest.param([*HERE[:5], "/proc/x"], 2, "out /proc/x cannot be written", id="unwritable"),
        pytest.param(["tune", "{there}", "--out", "{there}"], 2, "files that are not kinoray's (a.txt", id="taken"),
        pytest.param(["demo", "--out", "{there}"], 2, "files that are not kinoray's (a.txt", id="demo"),
        pytest.param([*HERE, "--storage.access", "b"], 2, "storage.access must be BUCKET=unsigned or", id="access"),
        pytest.param(["evaluate", "az://c/x", *HERE[2:]], 2, "az://c/x: only s3:// addresses and local", id="store"),
        pytest.param([*HERE[:2], *GPU, *HERE[2:]], 2, "this machine has no GPU that can be used", id="no GPU"),
    ],
)
def test_what_is_wrong_is_said_before_ray_or_torch_are_even_imported(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    if arguments[2:4] == GPU and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    (tmp_path / "a.txt").write_text("somebody's")
    places = {"there": str(tmp_path), "absent": str(tmp_path / "absent")}
    command = [sys.executable, "-X", "importtime", "-m", "kinoray", *(word.format(**places) for word in arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == code, done.stderr[-500:]
    assert said.format(**places) in done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "tyro" in imported
    assert not imported & {"ray", "torch"}


@pytest.mark.parametrize("home", ["~", "file://{home}"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["label", "@", "--checkpoint", "i3d", "--out", "new"],
        ["label", "videos", "--checkpoint", "@", "--out", "new"],
        ["label", "--config", "@"],
        ["labels", "@"],
        ["report", "@", "--out", "new"],
        ["correct", "@", "--corrections", "c.csv", "--out", "new"],
        ["export", "@", "--format", "csv", "--to", "new"],
        ["import", "@.pth", "--out", "new"],
        ["pack", "@", "--out", "new"],
        ["pack", "videos", "--kinetics", "k400", "--annotations", "@", "--out", "new"],
        ["train", "@", "--out", "new"],
        ["train", "set", "--out", "new", "--like", "@"],
        ["tune", "@", "--out", "new"],
        ["evaluate", "@", "--checkpoint", "i3d", "--out", "new"],
        ["evaluate", "videos", "--ensemble", "@", "@b", "--out", "new"],
        ["calibrate", "@", "--checkpoint", "i3d", "--out", "new"],
        ["compare", "@", "run"],
        ["runs", "@"],
        ["doctor", "@"],
        ["bench", "@", "--checkpoint", "i3d"],
        ["plan", "--rates", "@", "--node", "a:1cpu", "--videos", "10"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_home_and_a_file_address_are_that_path_in_every_verb(
    arguments: list[str], home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is there, and the message names the path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place = home.format(home=tmp_path) + "/absent"
    assert main([word.replace("@", place) for word in arguments]) != 0
    said = capsys.readouterr().err
    assert f"{tmp_path}/absent" in said
    assert "file://" not in said
