"""docs/cluster.md: what of it is run, and that Ray takes what needs a cloud. test_guide_text.py looks at all pages."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from guide_blocks import ROOT, commands, pages, shell_blocks
from kinoray.cli import VERBS, main

GUIDE = "docs/cluster.md"
TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)\n"
WHEEL = "python -m pip wheel --no-deps --wheel-dir dist .\n"


def words_of(*start: str) -> list[list[str]]:
    """The words of each command that begins so, on all pages."""
    return [words for page in pages() for block in shell_blocks(page) for words in commands(block, *start)]


def test_what_runs_without_a_cloud_is_run() -> None:
    runs = {(block.run_by, block.script) for block in shell_blocks(GUIDE) if block.run_by}
    assert {("tests/test_cluster_guide.py", TOKEN), ("tests/test_dockerfile.py", WHEEL)} <= runs


@pytest.mark.ray
def test_the_token_is_made_for_its_owner_only(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", TOKEN], env=environment, check=True, timeout=100)
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text(encoding="utf-8").strip()) >= 32
    assert token.stat().st_mode & 0o777 == 0o600


def test_verbs_of_the_guide_are_there() -> None:
    found = {words[1] for block in shell_blocks(GUIDE) for words in commands(block, "kinoray")}
    assert {"submit"} <= found <= set(VERBS)


def test_rays_own_command_takes_its_options() -> None:
    found = words_of("ray", "job", "submit")
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
