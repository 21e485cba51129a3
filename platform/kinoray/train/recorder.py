"""What rank 0 writes while a run goes on: checkpoints after epochs and inside them, losses, metrics, refusals, curves;
and what a run was made with: versions, the code's commit, the hosts, nothing of the process's environment variables.

Training goes on meanwhile: every method of the recorder is a job for the uploader's thread. Easy to break:
checkpoint.json comes last, so that whatever a resumed run will not do again is in the run folder already.

Ray's metrics have the same numbers, where Ray runs, all by run (the name of its folder):
`ray_kinoray_train_videos_total`; `ray_kinoray_train_quarantined_total` by reason; `ray_kinoray_train_seconds_total` by
stage (`decode`: a worker waited for clips, `step`: the rest of its training, `score`); `ray_kinoray_train_score` by
name.
"""

import io
import math
import os
import platform
import shutil
import socket
import subprocess
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import ray
import torch
from ray.util.metrics import Counter, Gauge
from torch import Tensor

import kinoray
from kinoray.catalog.rows import QuarantineRow
from kinoray.catalog.table import Catalog
from kinoray.config.shared import OptimConfig
from kinoray.console import format_duration, many
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.leftovers import scratch_folder
from kinoray.train.config import TrainConfig
from kinoray.train.input import NoClip
from kinoray.train.recipe import learning_rate
from kinoray.train.runfolder import EpochRow, RunFolder, StepRow, run_digest
from kinoray.train.state import Snapshot
from kinoray.train.step import Replica

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Pace",
    "Recorder",
    "TrainMetrics",
    "Uploader",
    "commits",
    "draw_curves",
    "epoch_line",
    "git_commit",
    "host",
    "software",
    "write_events",
]

_CURVES_S = 60.0  # drawing costs half a second: not after each of many short epochs
_MAX_POINTS = 1000
_TRAIN_COLOUR = "#4c78a8"
_VAL_COLOUR = "#e45756"
_PROGRESS_S = 5.0
_SURE_STEPS = 3  # before which a rate is an accident
_SCORES = ("loss", "top1", "lr", "val_loss", "val_top1", "val_top5", "val_map")
_TRAIN_SCALARS = ("loss", "top1", "top5", "lr")

_PACKAGES = ("ray", "torch", "torchvision", "av", "decord", "numpy", "pyarrow", "opencv-python-headless", "safetensors")
_GIT_S = 10.0


class Uploader:
    """A thread that writes: one job at a time, nothing piles up, no error is lost.

    A context: leaving it waits for the job that is being done, and raises its error unless another is on its way.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._last: Future[object] | None = None

    def ready(self) -> bool:
        """Whether a job can be submitted without waiting. Raises the error of the job before."""
        if self._last is not None and not self._last.done():
            return False
        self.wait()
        return True

    def submit(self, job: Callable[[], object]) -> None:
        """Start the job, after waiting for the one before. Raises the error of that one."""
        self.wait()
        self._last = self._pool.submit(job)

    def wait(self) -> None:
        """Return when nothing is being written. Raises the error of the last job, once."""
        last = self._last
        self._last = None
        if last is not None:
            last.result()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        late = self._last.exception() if self._last is not None else None
        self._last = None
        if late is None:
            return
        if error is None:
            raise late
        error.add_note(f"the upload that was under way failed, too: {type(late).__name__}: {late}")


class Recorder:
    """Writes to the run folder; `num_steps` is the number of steps of an epoch."""

    def __init__(self, folder: RunFolder, config: TrainConfig, catalog: Catalog, num_steps: int) -> None:
        self._folder = folder
        self._config = config
        self._num_steps = num_steps
        self._meta = CheckpointMeta(
            model=config.model,
            clip=config.clip,
            labels=catalog.labels,
            epoch=0,
            step=0,
            samples=0,
            catalog_digest=catalog.digest,
            run_digest=run_digest(config, catalog),
            scores="sigmoid" if catalog.is_multilabel else "softmax",
        )
        self._drawn_s = time.monotonic()

    def keep_step(
        self, state: Snapshot, history: Tensor, *, epoch: int, samples: int, refusals: Sequence[QuarantineRow]
    ) -> None:
        """Make the run resumable inside `epoch`, after the steps in history (Replica.history)."""
        self._folder.quarantine(refusals)
        self._folder.write_steps(epoch, self._step_rows(epoch, history))
        done = len(history)
        step = (epoch - 1) * self._num_steps + done
        self._save(state, replace(self._meta, epoch=epoch - 1, epoch_steps=done, step=step, samples=samples))

    def keep_epoch(self, state: Snapshot, history: Tensor, row: EpochRow, refusals: Sequence[QuarantineRow]) -> None:
        """Write a finished epoch; a kill before its end costs the epoch's result, and the next try replaces it."""
        self._folder.quarantine(refusals)
        steps = self._step_rows(row.epoch, history)
        self._folder.write_steps(row.epoch, steps)
        self._folder.write_epoch(row)
        write_events(self._folder, row, steps)
        metrics = {name: float(value) for name, value in row.record().items()}
        meta = replace(self._meta, epoch=row.epoch, step=row.step, samples=row.samples, metrics=metrics)
        self._save(state, meta)
        if time.monotonic() - self._drawn_s > _CURVES_S:
            draw_curves(self._folder)
            self._drawn_s = time.monotonic()

    def _save(self, state: Snapshot, meta: CheckpointMeta) -> None:
        uri = self._folder.checkpoint_uri(meta.epoch, meta.step)
        save_checkpoint(self._folder.storage, uri, model_state=state.weights, meta=meta, train_state=state.train)
        self._folder.prune_checkpoints(self._config.keep_checkpoints, written=(meta.epoch, meta.step))

    def _step_rows(self, epoch: int, history: Tensor) -> list[StepRow]:
        optim = self._config.optim
        rows = []
        for index, (videos, quarantined, loss_sum, _, _) in enumerate(history.tolist()):
            step = (epoch - 1) * self._num_steps + index
            rows.append(
                StepRow(
                    epoch=epoch,
                    step=step + 1,
                    videos=int(videos),
                    quarantined=int(quarantined),
                    lr=learning_rate(optim, step, optim.epochs * self._num_steps),
                    loss=loss_sum / videos if videos else None,
                )
            )
        return rows


def write_events(folder: RunFolder, row: EpochRow, steps: Sequence[StepRow] = ()) -> None:
    """An epoch's TensorBoard events: val_* in val/, loss and accuracy in train/, others in run/.

    Those are by epoch; loss and rate of the steps are by step, in step/.
    """
    from tensorboardX import SummaryWriter  # here, as what draws: a second, which a training's start need not wait for

    with scratch_folder("events") as place:
        with SummaryWriter(place) as writer:
            for name, number in row.record().items():
                if name not in ("epoch", "time_s"):
                    writer.add_scalar(_tag(name), number, global_step=row.epoch, walltime=row.time_s)
            for step in steps:
                writer.add_scalar("step/lr", step.lr, global_step=step.step, walltime=row.time_s)
                if step.loss is not None:
                    writer.add_scalar("step/loss", step.loss, global_step=step.step, walltime=row.time_s)
        (written,) = place.iterdir()
        folder.storage.put(folder.events_uri(row.epoch), written.read_bytes())


def _tag(name: str) -> str:
    if name.startswith("val_"):
        return f"val/{name.removeprefix('val_')}"
    return f"train/{name}" if name in _TRAIN_SCALARS else f"run/{name}"


def draw_curves(folder: RunFolder) -> None:
    """Draw the learning curves: loss of steps and epochs, accuracy, rate; nothing before the first step's loss."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    epochs = folder.epochs()
    steps = folder.steps()
    if not steps:
        return
    figure = Figure(figsize=(9, 7), layout="constrained")  # not pyplot: a worker's thread draws, too
    FigureCanvasSVG(figure)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    last = {row.epoch: row.step for row in steps}
    first = {row.epoch: row.step for row in reversed(steps)}
    longest = max(last[epoch] - first[epoch] + 1 for epoch in last)  # the newest epoch may have only begun
    at = [row.step / longest for row in steps]
    places, values = _thinned(at, [math.nan if row.loss is None else row.loss for row in steps])
    loss.plot(places, values, color=_TRAIN_COLOUR, alpha=0.35, linewidth=0.8, label="train, steps")
    _line(loss, epochs, "loss", _TRAIN_COLOUR, "train")
    _line(loss, epochs, "val_loss", _VAL_COLOUR, "val")
    loss.set_ylabel("loss" if any(row.val_map is not None for row in epochs) else "cross entropy")
    _line(accuracy, epochs, "top1", _TRAIN_COLOUR, "train top-1")
    _line(accuracy, epochs, "val_top1", _VAL_COLOUR, "val top-1")
    _line(accuracy, epochs, "val_top5", "#f2a29b", "val top-5")
    _line(accuracy, epochs, "val_map", "#b279a2", "val mAP")
    accuracy.set_ylabel("accuracy")
    accuracy.set_ylim(0, 1)
    places, values = _thinned(at, [row.lr for row in steps])
    rate.plot(places, values, color="#54a24b", linewidth=1.0)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epochs")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    folder.storage.put(folder.curves_uri, content.getvalue())


def _line(axes: "Axes", rows: Sequence[EpochRow], name: str, colour: str, label: str) -> None:
    """The metric of the epochs that have it, each at its end."""
    known = [(row.epoch, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, linewidth=1.5, label=label)


def _thinned(places: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _MAX_POINTS points: means of neighbours, where there are more."""
    size = -(-len(values) // _MAX_POINTS)
    if size == 1:
        return list(places), list(values)
    means = []
    middles = []
    for start in range(0, len(values), size):
        group = [value for value in values[start : start + size] if not math.isnan(value)]
        means.append(sum(group) / len(group) if group else math.nan)
        middles.append(places[min(start + size // 2, len(places) - 1)])
    return middles, means


# How a run gets on: lines to read, and counters for Ray's metrics


class Pace:
    """Measures from the end of the first step on: what came before it is the start of decoders."""

    def __init__(self, optim: OptimConfig, num_steps: int) -> None:
        self._optim = optim
        self._num_steps = optim.epochs * num_steps
        self._first: tuple[float, int] | None = None
        self._said_s = time.monotonic()

    def line(self, replica: Replica, epoch: int, step: int) -> str:
        """What to say after so many steps in all; empty where it was said just now."""
        now = time.monotonic()
        first_s, first_step = self._first = self._first or (now, step)
        if now - self._said_s < _PROGRESS_S:
            return ""
        self._said_s = now
        totals = replica.totals()
        done = step - first_step
        parts = [f"train: epoch {epoch}/{self._optim.epochs}, step {step}/{self._num_steps}"]
        parts += [f"loss {totals.loss:.3f}"] if totals.videos else []
        if done >= _SURE_STEPS:
            left_s = (now - first_s) / done * (self._num_steps - step)  # evaluations so far are in it
            rate = done * self._optim.batch_size / (now - first_s)
            parts += [f"{rate:.1f} videos/s", f"{format_duration(left_s)} left"]
        parts += [f"quarantined {totals.quarantined}"] if totals.quarantined else []
        return ", ".join(parts)


def epoch_line(row: EpochRow, epochs: int) -> str:
    """An epoch as a sentence."""
    parts = [f"train: epoch {row.epoch}/{epochs} done in {format_duration(row.epoch_s)}"]
    parts.append(f"loss {_shown(row.loss)}, top-1 {_shown(row.top1)}")
    if row.val_videos is not None:
        numbers = f"loss {_shown(row.val_loss)}, top-1 {_shown(row.val_top1)}"
        numbers += "" if row.val_top5 is None else f", top-5 {_shown(row.val_top5)}"
        numbers += "" if row.val_map is None else f", mAP {_shown(row.val_map)}"
        parts.append(f"val {numbers} ({many(row.val_videos, 'video')})")
    parts.append(f"{row.videos_per_s:.1f} videos/s, {row.decode_wait:.0%} of it waiting for decoders")
    bad = row.quarantined + (row.val_quarantined or 0)
    if bad:
        parts.append(f"quarantined {bad}")
    return "; ".join(parts)


def _shown(mean: float | None) -> str:
    return "nan" if mean is None else f"{mean:.3f}"


class TrainMetrics:
    """Counters of one worker; nothing where Ray does not run."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._runs = ray.is_initialized()
        if self._runs:
            self._videos = Counter("kinoray_train_videos", "videos that were trained on", tag_keys=("run",))
            self._quarantined = Counter(
                "kinoray_train_quarantined", "videos that gave no clip, by reason", tag_keys=("run", "reason")
            )
            self._seconds = Counter(
                "kinoray_train_seconds", "seconds of training workers, by stage", tag_keys=("run", "stage")
            )
            self._score = Gauge("kinoray_train_score", "numbers of the last epoch, by name", tag_keys=("run", "name"))

    def step(self, videos: int, quarantined: Iterable[NoClip]) -> None:
        """Count a step."""
        if not self._runs:
            return
        if videos:
            self._videos.inc(videos, tags=self._tags)
        for reason, count in Count(item.refusal.error_class for item in quarantined).items():
            self._quarantined.inc(count, tags={**self._tags, "reason": reason})

    def spent(self, stage: Literal["decode", "step", "score"], seconds: float) -> None:
        """Count time."""
        if self._runs and seconds > 0:
            self._seconds.inc(seconds, tags={**self._tags, "stage": stage})

    def epoch(self, row: EpochRow) -> None:
        """Show the numbers of an epoch."""
        if not self._runs:
            return
        for name in _SCORES:
            value = getattr(row, name)
            if value is not None:
                self._score.set(float(value), tags={**self._tags, "name": name})


def software() -> dict[str, str]:
    """Versions of Python, the system, kinoray and the packages that decide its numbers; absent ones are left out."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found["kinoray"] = kinoray.__version__
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commits() -> dict[str, str]:
    """The commits of this process's working folder and, unless it is an installed copy, of kinoray's own code.

    Only of the latter it is said that files differ, with `+`: git looks through files with filters and monitors that
    a repository's own config names, and the working folder may be a stranger's.
    """
    package = Path(kinoray.__file__).resolve().parent
    found = {"commit": git_commit(Path.cwd())}
    if "site-packages" not in package.parts:
        own = git_commit(package)
        found["kinoray_commit"] = own + ("+" if own and _git(package, "status", "--porcelain", "-uno") else "")
    return {name: commit for name, commit in found.items() if commit}


def git_commit(folder: Path) -> str:
    """The commit that the folder's repository is at; empty if there is none. Runs nothing that its config names."""
    return _git(folder, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str) -> str:
    """What git says; empty where it cannot."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(folder), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def host(rank: int) -> dict[str, Any]:
    """The machine that this rank runs on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names: Sequence[str] = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
