"""Bad input to every verb ends in one clear line and a non-zero exit, never in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinoray.cli import main
from kinoray.config.shared import StorageConfig
from kinoray.storage.objects import Storage

CHECKPOINT = ["--checkpoint", "run", "--out", "out"]


def run(arguments: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """The command line in a process of its own: exit code and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "kinoray", *arguments],
        env=environment or dict(os.environ),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "no-such-folder", "--out", "o"], "no-such-folder"),
        (["pack", "list.csv", "--out", "o"], "list.csv"),
        (["train", "no-set", "--out", "o"], "no-set"),
        (["evaluate", "no-set", *CHECKPOINT], "run is neither a checkpoint"),
        (["label", "no-folder", *CHECKPOINT], "run is neither a checkpoint"),
        (["report", "no-labels"], "no-labels"),
        (["train", "set.parquet", "--out", "o", "--model.factory", "no_such:net"], "model.factory"),
        (["train", "set.parquet", "--out", "o", "--model.options", "colour=red"], "model.options.colour"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.parquet").touch()  # whether it is one is seen when it is read
    code = main(arguments)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert error.count("\n") == 1, error
    assert message in error
    assert error.startswith(f"kinoray {arguments[0]}: ")


@pytest.mark.parametrize("verb", ["pack", "train", "label", "evaluate", "report", "doctor"])
def test_a_wrong_bucket_is_named(
    verb: str, s3_server: str, s3_config: StorageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [verb, "s3://no-such-bucket-here/x", "--storage.endpoint-url", s3_server]
    arguments += {"report": [], "doctor": [], "pack": ["--out", "o"], "train": ["--out", "o"]}.get(verb, CHECKPOINT)
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("\n") == 1, error
    if verb not in ("label", "evaluate"):  # these look for the checkpoint first, or for the source: both are absent
        assert "no-such-bucket-here" in error


def test_no_credentials_is_said(s3_server: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    code, error = run(["report", "s3://some-bucket/x", "--storage.endpoint-url", s3_server], environment)
    assert code == 1
    assert error.count("\n") == 1, error
    assert "credentials" in error


def test_an_empty_folder_and_an_empty_prefix_are_refused(
    tmp_path: Path, bucket: str, s3_server: str, s3_config: StorageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    Storage(s3_config).put(f"{bucket}/other/x.mp4", b"x")
    assert main(["pack", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 1
    assert "empty" in capsys.readouterr().err
    command = ["pack", f"{bucket}/nothing/", "--out", str(tmp_path / "o"), "--storage.endpoint-url", s3_server]
    assert main(command) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_named() -> None:
    code, error = run(["report", "s3://some-bucket/x", "--storage.endpoint-url", "http://127.0.0.1:9"])
    assert code == 1
    assert error.count("\n") == 1, error
    assert "127.0.0.1:9" in error
