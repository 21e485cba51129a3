"""From a command to its first result: `python benchmarks/startup.py [--quick] [--against TREE]`.

Whole commands, as a user starts them, on a folder of four small videos and a small network, two workers on a Ray of
their own. With --against the same commands of another tree of this repository (a git worktree, say) take turns with
ours, so that a noisy machine is noisy for both; their ratios are of one turn each.

label: first unit        from the command until the file of its first unit is there. Bar 8 s.
label: whole             until the command has ended.
label: CPU seconds       of all processes of the command, which say more than seconds where others are at work.
label: driver            the most memory that the command's own process had (VmHWM). Bar 400 MB.
label --plan             the same command with --plan. Bar 2 s.
labels, --help           `kinoray labels` on the result; `kinoray --help`.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import class_names, make_demo_set
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.02
_LEFT_S = 30.0
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)
_LOOK_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


def make_source(folder: Path) -> Path:
    """Four small videos."""
    make_demo_set(folder / "all", videos_per_class=1, seed=1)
    source = folder / "four"
    source.mkdir()
    for number, path in enumerate(sorted((folder / "all").rglob("*.mp4"))[:4]):
        (source / f"{number}.mp4").write_bytes(path.read_bytes())
    return source


def make_run(folder: Path) -> str:
    """A small network of random weights."""
    labels = tuple(class_names())
    clip = ClipConfig(
        sample=SampleConfig(num_segments=4, frames_per_segment=2), view=ViewConfig(resize_px=72, crop_px=64)
    )
    model = ModelConfig(options={"backbone": "tiny"})
    torch.manual_seed(0)
    meta = CheckpointMeta(model=model, clip=clip, labels=labels, epoch=1, step=1, samples=1)
    uri = str(folder / "run")
    state = build_model(model, len(labels)).state_dict()
    save_checkpoint(Storage(StorageConfig()), uri, model_state=state, meta=meta)
    return uri


def environment(tree: Path) -> dict[str, str]:
    """In which a command is this tree's."""
    path = os.pathsep.join(str(tree / name) for name in ("platform", "models"))
    return {**os.environ, "PYTHONPATH": path}


@dataclass(frozen=True, slots=True)
class Run:
    """What a command took."""

    whole_s: float
    first_s: float
    """NaN where nothing was committed."""
    cpu_s: float
    """Of all its processes."""
    driver_mb: float


def run(tree: Path, cwd: Path, out: Path, *arguments: str) -> Run:
    """Run a command of a tree to its end, and all that it leaves behind to theirs."""
    watch = CpuWatch()
    command = [sys.executable, "-m", "kinoray", *arguments]
    first_s, driver_mb, begun = math.nan, 0.0, time.monotonic()
    with (cwd / "said").open("wb") as said:
        process = subprocess.Popen(command, env=environment(tree), cwd=cwd, stdout=said, stderr=said)
    while process.poll() is None:
        if math.isnan(first_s) and any(out.glob("*/parts/*.parquet")):
            first_s = time.monotonic() - begun
        with contextlib.suppress(OSError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            driver_mb = max([driver_mb, *(int(size) / 1000 for size in _PEAK.findall(status))])
        watch.look()
        time.sleep(_POLL_S)
    whole_s = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {(cwd / 'said').read_text()[-4000:]}")
    _reap()
    return Run(whole_s, first_s, watch.cpu_s, driver_mb)


class CpuWatch:
    """CPU seconds of all processes below this one that began after it, as far as it looked.

    They are asked while they run: Ray does not wait for its workers, so that no parent has their seconds in the end.
    """

    def __init__(self) -> None:
        self._before = set(self._below())
        self._seen: dict[tuple[int, int], float] = {}
        self._looked_s = 0.0

    @property
    def cpu_s(self) -> float:
        """The sum."""
        return sum(self._seen.values())

    def look(self) -> None:
        """Ask all of them, unless that has just been done."""
        if time.monotonic() - self._looked_s >= _LOOK_S:
            self._seen |= {one: cpu_s for one, cpu_s in self._below().items() if one not in self._before}
            self._looked_s = time.monotonic()

    @staticmethod
    def _below() -> dict[tuple[int, int], float]:
        """(Id, start) of all processes below this one -> CPU seconds."""
        parents: dict[int, int] = {}
        found: dict[tuple[int, int], float] = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has just ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                parents[int(pid)] = int(fields[1])
                found[int(pid), int(fields[19])] = (int(fields[11]) + int(fields[12])) / _TICKS
        ours = {os.getpid()}
        for pid in parents:
            line = [pid]
            while line[-1] in parents and line[-1] not in ours:
                line.append(parents[line[-1]])
            if line[-1] in ours:
                ours.update(line)
        return {(pid, start): cpu_s for (pid, start), cpu_s in found.items() if pid in ours and pid != os.getpid()}


def _adopt() -> None:
    """Be the parent of whatever a command leaves behind, so that it is seen and waited for."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _reap() -> None:
    end = time.monotonic() + _LEFT_S
    while time.monotonic() < end:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(_POLL_S)


def measure(tree: Path, source: str, checkpoint: str) -> dict[str, float]:
    """All figures of one tree, once."""
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        folder = Path(place)
        out = folder / "out"
        wanted = ("label", source, "--checkpoint", checkpoint, "--out", str(out))
        plan = run(tree, folder, out, *wanted, "--plan")
        label = run(tree, folder, out, *wanted)
        labels = run(tree, folder, out, "labels", str(out))
        overview = run(tree, folder, out, "--help")
    return {
        "label: first unit, s": label.first_s,
        "label: whole, s": label.whole_s,
        "label: CPU seconds": label.cpu_s,
        "label: driver, MB": label.driver_mb,
        "label --plan: s": plan.whole_s,
        "label --plan: CPU seconds": plan.cpu_s,
        "labels: s": labels.whole_s,
        "--help: s": overview.whole_s,
    }


BARS = {"label: first unit, s": 8.0, "label: driver, MB": 400.0, "label --plan: s": 2.0}


def main() -> int:
    """Print the figures, of both trees where there are two, and last of all the ones with bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 turns instead of 5")
    parser.add_argument("--against", type=Path, help="another tree of this repository")
    arguments = parser.parse_args()
    trees = {"this tree": ROOT}
    if arguments.against:
        trees["other"] = arguments.against.resolve()
    _adopt()
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        source, checkpoint = make_source(Path(place)), make_run(Path(place))
        for tree in trees.values():  # compiles its modules, and has the disk's cache filled
            measure(tree, str(source), checkpoint)
        turns = range(2 if arguments.quick else 5)
        found = {name: [] for name in trees}
        for _ in turns:
            for name, tree in trees.items():
                found[name].append(measure(tree, str(source), checkpoint))
    medians = {name: {key: median(one[key] for one in many) for key in many[0]} for name, many in found.items()}
    print(f"\n{'median of ' + str(len(turns)):28}" + "".join(f"{name:>12}" for name in trees))
    for key in medians["this tree"]:
        print(f"{key:28}" + "".join(f"{medians[name][key]:12.2f}" for name in trees))
    result = {key: {"value": round(medians["this tree"][key], 2), "bar": f"<= {bar:g}"} for key, bar in BARS.items()}
    if arguments.against:
        for key in medians["this tree"]:
            ratio = median(ours[key] / theirs[key] for ours, theirs in zip(*found.values(), strict=True))
            result[f"{key}: this tree / other"] = {"value": round(ratio, 3)}
    ok = all(medians["this tree"][key] <= bar for key, bar in BARS.items())
    print(json.dumps({**result, "ok": ok}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
