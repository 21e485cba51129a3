"""What is printed only shows: no name, class or error of a stranger moves a terminal's cursor or reorders its text."""

import csv
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kinoray.catalog.table import catalog_of_source
from kinoray.cli import main
from kinoray.console import (
    PlainStream,
    Progress,
    exact_stdout,
    format_duration,
    many,
    plain_streams,
    shortened,
    table,
    visible,
)
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger
from kinoray.label.unit import Times
from kinoray.storage.objects import Storage
from small_tables import ledger_in, library, planned, rows_for

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b5m\r\u202egnp.exe\u200b\x7f\x00\nforged: done"
MARKS = ["\x1b", "\x07", "\x9b", "\u202e", "\u200b", "\x7f", "\x00", "\x08"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 100 %, \u00e9\u4e2d\U0001f600", "plain text, 100 %, \u00e9\u4e2d\U0001f600"),
        ("a\tb\nc\r\nd\n", "a\tb\nc\r\nd\n"),
        ("a\rb", "a\\u000db"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b2J", "\\u009b2J"),
        ("a\x08\x7fb", "a\\u0008\\u007fb"),
        ("\u202etxt\u2066\u2069\u061c", "\\u202etxt\\u2066\\u2069\\u061c"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\u0085d"),
        ("\udcff.mp4", "\\udcff.mp4"),
        ("\ufeff\u00ad", "\\ufeff\\u00ad"),
    ],
)
def test_a_plain_stream_spells_out_what_a_terminal_would_obey(text: str, shown: str) -> None:
    below = io.StringIO(newline="")
    assert PlainStream(below).write(text) == len(text)
    assert below.getvalue() == shown


def test_all_controls_and_direction_marks_are_spelled_out() -> None:
    controls = [*range(0x20), *range(0x7F, 0xA0)]
    marks = [
        0xAD,
        0x61C,
        *range(0x200B, 0x2010),
        *range(0x2028, 0x202F),
        *range(0x2060, 0x2065),
        *range(0x2066, 0x2070),
    ]
    marks += [0xFEFF, *range(0xFFF9, 0xFFFC), 0xE0001, *range(0xE0020, 0xE0080)]
    for code in controls + marks:
        assert visible(f"a{chr(code)}b") == f"a\\u{code:04x}b"


def test_streams_are_as_before_after_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with plain_streams():
        with plain_streams():  # a verb that calls another one
            print("a\x1bb")
        print("c\x1bd", file=sys.stderr)
        assert exact_stdout() is before[0]
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a\\u001bb\n", "c\\u001bd\n")
    assert main(["evil\x1b[2J"]) == 2
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().err.startswith("kinoray evil\\u001b[2J: ConfigError: unknown verb 'evil\\x1b[2J'")


TABLE = """
from kinoray.console import table
print("\\n".join(table([("v" * 20, "why " * 30, "1")], head=("VIDEO", "ERROR_TEXT", "N"), right=(2,), fits=True)))
"""


def test_a_table_is_cut_to_the_terminal_and_whole_in_a_pipe(tmp_path: Path) -> None:
    piped = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True).stdout
    assert ("v" * 20 + "  " + "why " * 30) in piped
    head, row = on_terminal(TABLE, cwd=tmp_path).splitlines()  # 80 columns, where it does not say
    assert len(head) == len(row) == 80
    assert row.startswith("v" * 20 + "  why ")
    assert row.endswith("...  1")


def hostile_table(folder: Path) -> Ledger:
    """A labelling whose videos, classes, reasons and job have hostile names."""
    ledger = ledger_in(Storage(), folder)
    catalog = library(10, uri=f"s3://{EVIL}")
    times = Times(worker=EVIL, begin_s=1.0, end_s=2.0, store=0.1, decode=0.1, model=0.1)
    for unit in planned(ledger, catalog.digest, row_keys(catalog.table), 8).units:
        rows = rows_for(catalog, unit.keys, error_text=EVIL, label_topk=[EVIL], error_class=EVIL)
        ledger.commit(unit, rows, EVIL, None, times)
    return ledger


def on_terminal(code: str, *arguments: str, cwd: Path) -> str:
    """What a program writes to a terminal, stdout and stderr together."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=cwd) as process:
        os.close(follower)
        written = b""
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the last one that had it open is gone
                break
            if not chunk:
                break
            written += chunk
        process.wait(60)
    os.close(leader)
    return written.decode("utf-8")


COMMANDS = """
import sys
from kinoray.cli import main
folder, evil = sys.argv[1].rsplit("/", 1)[0], open(sys.argv[1]).read()
columns = ["video_id", "uri", "status", "label", "error_class", "error_text", "label_topk"]
for line in (
    ["labels", folder + "/out", "--columns", *columns],
    ["labels", folder + "/out", "--format", "csv", "--columns", *columns],
    ["labels", folder + "/out", "--format", "jsonl"],
    ["labels", folder + "/out", "--label", evil],
    ["labels", folder + "/" + evil.replace(chr(0), "")],
    ["labels", folder + "/out", "--summary"],
    ["runs", folder],
    ["runs", folder, "--json"],
    ["compare", evil, evil, "--out", "x.html"],
    ["label", "x", "--checkpoint", "x", "--out", "y", "--protocol", evil],
    ["train", "x", "--out", evil, "--print-config"],
    ["train", "--config", evil],
    [evil],
):
    print(main(line), line[0].isalpha() and line[0], flush=True)
import kinoray.train.runs
def fails(config):
    raise RuntimeError(evil)
kinoray.train.runs.runs = fails
main(["runs", folder])
"""


def test_no_command_sends_a_stranger_s_controls_to_a_terminal(tmp_path: Path) -> None:
    hostile_table(tmp_path / "out")
    run = tmp_path / "runs" / "a\x1b[2Jb"
    run.mkdir(parents=True)
    settings = {"optim.epochs": 1, "model.factory": EVIL}
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    (run / "status.json").write_text(json.dumps({"state": "failed", "started_s": 1.0, "error": EVIL}))
    (tmp_path / "evil").write_text(EVIL, newline="")
    shown = on_terminal(COMMANDS, str(tmp_path / "evil"), cwd=tmp_path)
    assert not [mark for mark in MARKS if mark in shown]
    shown = re.sub(r"\r\w+: starting\r +\r", "", shown)  # the step that was drawn until the first line
    assert "\r" not in shown.replace("\r\r\n", "").replace("\r\n", "")  # a terminal's line ends, of CSV, too
    assert "\\u001b]0;owned\\u0007" in shown
    assert "RuntimeError: \\u001b]0;owned" in shown
    lines = shown.partition("Traceback")[0].splitlines()
    assert not [line for line in lines if line.startswith("forged") and '"' not in line]  # in CSV a cell may go on
    for verb in ("labels", "runs"):
        assert f"0 {verb}" in shown
    assert len(shown.splitlines()) > 40


def test_the_name_of_a_folder_is_no_line_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "v.mp4").write_bytes(b"x")
    (tmp_path / "x\nlabel: complete in 1 s; the table is in out").symlink_to("a")
    (tmp_path / "y.\nlabel: complete").write_bytes(b"x")
    assert len(catalog_of_source(Storage(), str(tmp_path))) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("WARNING: ") for line in said)
    assert "x\\u000alabel: complete in 1 s" in said[0]


def test_an_error_is_a_line_of_some_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", f"/{'x' * 100_000}"]) != 0
    said = capsys.readouterr().err
    assert len(said) < 9000
    assert said.startswith("kinoray runs: ObjectNotFound: /xxx")
    assert said.endswith("no such folder; name a run, or a folder of runs\n")


def test_csv_and_settings_stay_exact_in_a_pipe(tmp_path: Path) -> None:
    hostile_table(tmp_path / "out")
    command = [sys.executable, "-m", "kinoray"]
    flags = ["labels", str(tmp_path / "out"), "--format", "csv", "--columns", "uri", "error_text"]
    done = subprocess.run([*command, *flags], capture_output=True, check=True)
    rows = list(csv.reader(io.StringIO(done.stdout.decode("utf-8"), newline="")))
    assert {row[1] for row in rows[1:]} == {EVIL}
    assert rows[1][0].startswith(f"s3://{EVIL}/v0000")
    done = subprocess.run(
        [*command, "train", "x", "--out", "a\u202eb", "--print-config"], capture_output=True, check=True
    )
    assert "out: a\u202eb\n" in done.stdout.decode("utf-8") or "a\\u202Eb" in done.stdout.decode("utf-8")


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_stand_to_the_right() -> None:
    rows = [("ant", "7", "ok"), ("a longer name", "1,234", "")]
    assert table(rows, head=("class", "videos", "state"), right=(1,)) == [
        "class          videos  state",
        "ant                 7  ok",
        "a longer name   1,234",
    ]
    assert table(rows, right=(0, 1), indent="  ") == ["            ant      7  ok", "  a longer name  1,234"]


def test_a_table_of_nothing_is_its_head() -> None:
    assert table([], head=("node", "hours")) == ["node  hours"]
    assert table([]) == []


def test_a_row_of_other_length_is_our_mistake_and_no_short_table() -> None:
    with pytest.raises(ValueError, match="zip"):
        table([("a", "b"), ("c",)])


@pytest.mark.parametrize("hostile", ["two\nlines", "\x1b[31mred", "a\u202eb", "tab\there"])
def test_a_cell_cannot_break_its_line(hostile: str) -> None:
    lines = table([(hostile, "1"), ("plain", "22")], right=(1,))
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert len(lines[0]) == len(lines[1])


def test_a_length_of_time_is_short_whatever_it_is() -> None:
    known = {0.4: "0 s", 59.6: "1 min 00 s", 185: "3 min 05 s", 7800: "2 h 10 min", -5: "-5 s"}
    assert {seconds: format_duration(seconds) for seconds in known} == known
    assert {format_duration(odd) for odd in (math.inf, -math.inf, math.nan, 1e300, 2**2000)} == {"?"}


def test_one_of_a_thing_is_singular() -> None:
    assert [many(number, "video") for number in (0, 1, 2, 1000)] == ["0 videos", "1 video", "2 videos", "1,000 videos"]
    assert (many(1, "class"), many(2, "class")) == ("1 class", "2 classes")


def test_a_long_text_says_that_it_was_cut() -> None:
    assert [shortened("0123456789", most) for most in (10, 9)] == ["0123456789", "012345..."]


# Progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("kinoray.console.time.monotonic", lambda: self.now_s)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_rate_counts_from_the_first_result_and_is_not_said_before_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    progress = Progress(100, "label", "videos", already=20, stream=log)
    clock.wait(60)  # the start of the workers
    progress.saw("a", 1)
    clock.wait(5)
    progress.saw("a", 3)
    clock.wait(5)
    progress.saw("a", 21)
    clock.wait(5)
    progress.update(16, part="b", quarantined=2)
    assert log.getvalue().splitlines() == [
        "label: 21/100 videos",
        "label: 23/100 videos",
        "label: 41/100 videos, 2.0/s, 30 s left",
        "label: 57/100 videos, 2.4/s, 18 s left, quarantined 2 this run",
    ]
    clock.wait(5)
    progress.update(43)
    progress.close()
    assert log.getvalue().endswith("label: 100/100 videos, 4.0/s, took 1 min 20 s, quarantined 2 this run\n")


def test_what_came_at_once_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    progress = Progress(3, "label", "videos", stream=log)
    clock.wait(34)
    progress.update(3)
    progress.close()
    assert log.getvalue().endswith("label: 3/3 videos, took 34 s\n")


def test_large_numbers_have_separators(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    log = io.StringIO()
    Progress(81_470, "label", "videos", stream=log).update(8_147, quarantined=1_234)
    assert log.getvalue() == "label: 8,147/81,470 videos, quarantined 1,234\n"


def test_what_is_seen_of_a_unit_gives_way_to_what_it_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    progress = Progress(10, "label", "videos", every_s=0, stream=log)
    for part, seen in (("a", 5), ("b", 4), ("a", 1), ("a", 6)):  # the worker of `a` died, and it was begun again
        progress.saw(part, seen)
    progress.update(6, part="a")
    progress.saw("a", 3)  # too late
    progress.saw("b", 9)  # more than there are
    progress.update(4, part="b")
    clock.wait(4)
    progress.close()
    counts = [int(count) for count in re.findall(r"(\d+)/10", log.getvalue())]
    assert counts == [5, 9, 5, 10, 10, 10, 10, 10]
    assert log.getvalue().endswith("label: 10/10 videos, 1.2/s, took 4 s\n")


ON_TERMINAL = """
from kinoray.console import Progress, draw_step, plain_streams
with plain_streams():
    draw_step("label: reading a\\rb")
    print("label: 4 videos")
    progress = Progress(4, "label", "videos", every_s=1e9)
    progress.update(1)
    print("half ", end="")
    progress._print()
    print("a line")
    progress._print()
    progress.update(3, quarantined=1)
    progress.close()
"""


def test_a_terminal_shows_one_bar_that_lines_never_run_into(tmp_path: Path) -> None:
    shown = on_terminal(ON_TERMINAL, cwd=tmp_path)
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]  # what is left to see of each
    assert lines[:2] == ["label: 4 videos", "half a line"]
    assert re.fullmatch("label: 4/4 videos, took 0 s, quarantined 1", lines[2])
    assert "\rlabel: reading a\\u000db\r" in shown
    assert "\rlabel: [-----" in shown
    assert "\rlabel: [#####---------------] 1/4 videos" in shown
