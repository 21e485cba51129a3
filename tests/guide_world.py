"""What the blocks of a page find when they run: a checkout with an environment, videos, a bucket, earlier results.

The `kinoray` of that environment is the real one behind a filter (`small`): it appends small settings by verb, since a
page's own would take hours. Everything else runs as printed. Easy to break: a filter that hides a mistake of the page.
So options of a network keep all but the backbone, and what comes from a --config file stays as it is.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import boto3

from conftest import config_at
from guide_blocks import ROOT, Block
from kinetics_set import KineticsSet, clip, key
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.storage.objects import Storage
from ports import wait_until

__all__ = [
    "BUCKET",
    "NUM_VIDEOS",
    "copy_into",
    "environment_of",
    "fill_bucket",
    "kill_when",
    "make_checkout",
    "make_kinetics",
    "make_videos",
    "run_block",
    "small",
]

BUCKET = "s3://bucket"
NUM_VIDEOS = 25
_LINKED = ("Makefile", "pyproject.toml", "constraints.txt", "platform", "models", "jobs", "docs", "cluster.yaml")

_KINORAY = """#!{python}
import sys

from kinoray.cli import main

sys.path.append({tests!r})
from guide_world import small

if __name__ == "__main__":
    sys.exit(main(small(sys.argv[1:])))
"""

_ONE = ["--resources.num-workers", "1"]
_VIEW = ["--clip.sample.num-segments", "1", "--clip.sample.frames-per-segment", "2"]
_VIEW += ["--clip.view.resize-px", "36", "--clip.view.crop-px", "32"]
_RECIPE = [*_VIEW, "--optim.epochs", "1", "--optim.batch-size", "8", *_ONE, "--resources.decode-tasks", "1"]
_SMALL = {
    "pack": _ONE,
    "train": _RECIPE,
    "tune": [*_RECIPE, "--num-trials", "2"],
    "evaluate": _ONE,
    "calibrate": _ONE,
    "label": [*_ONE, "--unit-size", "2"],
    "bench": _ONE,
}


def small(arguments: Sequence[str]) -> list[str]:
    """The command line with the small settings of its verb."""
    verb = arguments[0] if arguments else ""
    if verb == "demo":  # how much it does is no setting
        from kinoray.demo.verb import demo

        demo.__kwdefaults__ = {"videos_per_class": 4, "epochs": 1}
    if "--config" in arguments or "--ensemble" in arguments:  # an ensemble runs nothing
        return list(arguments)
    options = _tiny(arguments) if verb in ("train", "tune") else []
    return [*arguments, *_SMALL.get(verb, []), *options]


def _tiny(arguments: Sequence[str]) -> list[str]:
    """The options of the network with a tiny backbone; those of a network of one's own as they are."""
    if any(":" in word for before, word in pairwise(arguments) if before == "--model.factory"):
        return []
    given: list[str] = []
    if "--model.options" in arguments:
        for word in arguments[arguments.index("--model.options") + 1 :]:
            if word.startswith("--"):
                break
            given.append(word)
    kept = [word for word in given if not word.startswith(("backbone=", "backbone_weights=", "heads="))]
    heads = [] if "--model.factory" in arguments else ["heads=4"]
    return ["--model.options", *kept, "backbone=tiny", *heads]


def make_checkout(folder: Path) -> Path:
    """A folder that looks like the repository after `make setup`; its kinoray goes through `small`."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in _LINKED:
        (folder / name).symlink_to(ROOT / name)
    write_program(binaries / "kinoray", _KINORAY.format(python=sys.executable, tests=str(ROOT / "tests")))
    write_program(binaries / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "activate").write_text(f'export PATH="{binaries}:$PATH"\n')
    (folder / ".venv" / "ready").touch()
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_videos(folder: Path) -> None:
    """Six classes of four videos, and a file that is none."""
    assert make_demo_set(folder, videos_per_class=4, seed=7) == NUM_VIDEOS - 1
    first = min(folder.rglob("*.mp4"))
    (first.parent / "broken.mp4").write_bytes(make_broken("index_lost", first.read_bytes()))


def make_kinetics(folder: Path, storage: Storage) -> KineticsSet:
    """Archives below s3://bucket/k400/ and annotations in the folder, with a clip that is missing and a bad one."""
    made = KineticsSet()
    for number in range(12):
        made.row("packed", number)
        made.add(f"train/part_{number % 2}.tar.gz", f"{key(number)}.mp4", clip(number), "packed")
    for number in range(20, 24):
        made.row("packed", number, split="val")
        made.add("val/part_0.tar.gz", f"{key(number)}.mp4", clip(number), "packed")
    made.test_row("packed", 30)
    made.add("test/part_0.tar.gz", f"{key(30)}.mp4", clip(30), "packed")
    made.row("missing", 40)
    made.row("unreadable", 41)
    made.add("train/part_0.tar.gz", f"{key(41)}.mp4", b"", "unreadable", "EmptyMedia")
    for path, data in made.content().items():
        storage.put(f"{BUCKET}/k400/{path}", data)
    for name in made.lines:
        (folder / name).write_bytes(made.annotations(name))
    return made


def fill_bucket(server: str, contents: dict[str, Path]) -> Storage:
    """Make s3://bucket anew with these folders (prefix -> folder)."""
    client = boto3.resource("s3", endpoint_url=server, region_name="us-east-1").Bucket(BUCKET.removeprefix("s3://"))
    client.create()
    client.objects.all().delete()
    for prefix, folder in contents.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(path), f"{prefix}/{path.relative_to(folder)}")
    return Storage(config_at(server))


def environment_of(checkout: Path, server: str) -> dict[str, str]:
    """What blocks see: the environment's programs first, and S3 at the server."""
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "AWS_ENDPOINT_URL": server}


def run_block(block: Block, checkout: Path, environment: dict[str, str]) -> str:
    """Run it as printed; returns its output. Raises AssertionError with it where the exit code is not 0."""
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    if block.language == "python":
        command = ["python", "-c", block.text]
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, f"{block.page}:\n{block.text}\nexit code {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def kill_when(block: Block, checkout: Path, environment: dict[str, str], happened: Callable[[], bool]) -> None:
    """Run it, and kill its processes with SIGKILL as soon as something has happened; it must not have ended before."""
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    with (checkout / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until(lambda: happened() or process.poll() is not None, 600, f"{block.script} has begun its work")
            assert process.poll() is None, (checkout / "killed.log").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy_into(checkout: Path, world: Path, names: Sequence[str]) -> None:
    """Copies of what was made in the world; links to its sets, since a copied catalog would name shards elsewhere."""
    for name in names:
        if name != "sets":
            shutil.copytree(world / name, checkout / name, dirs_exist_ok=True)
            continue
        (checkout / name).mkdir(exist_ok=True)
        for packed in (world / name).iterdir():
            (checkout / name / packed.name).symlink_to(packed)
