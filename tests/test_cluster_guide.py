"""docs/cluster.md: each command is run here, or marked as one that needs a cloud and parsed as far as it can be."""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from kinoray.cli import VERBS, main
from kinoray.verbs_submit import SubmitConfig

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "cluster.md"
TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)"
WHEEL = "python -m pip wheel --no-deps --wheel-dir dist ."


def blocks() -> list[list[str]]:
    """The lines of each shell block, without their indentation."""
    found = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block) for block in found]
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in joined]


def commands(*start: str) -> list[list[str]]:
    """The words of each command that begins so."""
    lines = [shlex.split(line, comments=True) for block in blocks() for line in block[1:] if line.startswith(start[0])]
    return [words for words in lines if words[: len(start)] == list(start)]


def test_each_block_is_run_by_a_test_or_says_that_it_needs_a_cloud() -> None:
    marks = {(block[0], tuple(block[1:]) if "run by" in block[0] else ()) for block in blocks()}
    assert marks == {
        ("# needs a cloud", ()),
        ("# run by tests/test_cluster_guide.py", (TOKEN,)),
        ("# run by tests/test_dockerfile.py", (WHEEL,)),
    }
    assert len(commands("kinoray")) >= 4


def test_shell_blocks_are_shell() -> None:
    for block in blocks():
        subprocess.run(["bash", "-n", "-c", "\n".join(block)], check=True, timeout=30)


@pytest.mark.ray
def test_the_token_is_made_for_its_owner_only(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", TOKEN], env=environment, check=True, timeout=100)
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text(encoding="utf-8").strip()) >= 32
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("words", commands("kinoray", "submit"), ids=lambda words: words[2])
def test_submitted_settings_are_those_of_the_verb(words: list[str]) -> None:
    split = words.index("--")
    verb, own, flags = words[2], words[3:split], words[split + 1 :]
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(SubmitConfig)}
    assert {word.removeprefix("--") for word in own if word.startswith("--")} <= fields
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([verb, *flags, "--print-config"]) == 0


def test_verbs_that_watch_jobs_are_there() -> None:
    assert {words[1] for words in commands("kinoray")} == {"submit", "jobs", "logs", "stop"} <= set(VERBS)


def test_rays_own_command_takes_its_options() -> None:
    found = commands("ray", "job", "submit")
    assert found
    for words in found:
        context = ray_job_submit.make_context("submit", words[3:])  # raises where an option is none
        entrypoint = list(context.params["entrypoint"])
        assert entrypoint[0] == "python"
        if entrypoint[1] == "-c":
            compile(entrypoint[2], "entrypoint", "exec")
        else:
            assert (ROOT / entrypoint[1]).is_file()
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([Path(entrypoint[1]).stem, *entrypoint[2:], "--print-config"]) == 0


def test_files_that_are_named_exist() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:deploy|docs|tests)/[\w./-]+\.\w+", text):
        assert (ROOT / name).exists(), name
