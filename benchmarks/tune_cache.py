"""CPU seconds of decoding in a sweep of 8 trials, beside one trial: `python benchmarks/tune_cache.py [--quick]`.

A real `kinoray tune` of lr x {4, 8, 16} segments of 6 frames, RGB and flow, on generated 340x256 videos of 10 s, with
the shared cache; and one training of each segment count without it. What is counted is what the decode tasks used,
their decoder processes, reading the cache and its checksums included (`decode_cpu_s` in metrics.jsonl). Bar: the sweep
takes at most 1.5 times the decode CPU of one trial of 16 segments. The last columns set it beside 8 trials that decode
for themselves. All numbers of a trial that runs with and without the cache must be equal, or the benchmark fails.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinoray.cluster.connect import disconnect
from kinoray.config.shared import CacheConfig, ClipConfig, ModelConfig, OptimConfig, SampleConfig, TrainResourcesConfig
from kinoray.demo.videos import make_video
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from kinoray.tune.config import TuneConfig
from kinoray.tune.verb import tune

SEGMENTS, FRAMES, NUM_TRIALS = (4, 8, 16), 6, 8
BAR = 1.5
LABELS = ("left", "right")
RATES = "0.001,0.002,0.004"
RESOURCES = TrainResourcesConfig(num_workers=1, decode_tasks=1, local_cpus=4)


class Spec:
    """What the platform asks of a network."""

    rgb, flow_channels, num_segments, frames_per_segment, crop_px = True, 2, None, None, None
    rgb_mean, rgb_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class MeanMotion(nn.Module):
    """A linear classifier of the mean colour and motion: training it costs nothing beside decoding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.input_spec = Spec()
        self.classify = nn.Linear(5, num_classes)

    def forward(self, *, rgb: Tensor, flow: Tensor) -> Tensor:
        logits: Tensor = self.classify(torch.cat([rgb.mean(dim=(1, 2, 4, 5)), flow.mean(dim=(1, 2, 4, 5))], dim=1))
        return logits


def mean_motion(num_classes: int) -> MeanMotion:
    """The factory that the trials name."""
    return MeanMotion(num_classes)


def video(label: str, seed: int) -> bytes:
    """10 s of a texture that pans to one side, with noise; a key frame every 250 frames."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (32, 90, 3)).astype(np.uint8)
    wide = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)  # 256 x 720
    shifts = np.arange(300) if label == "left" else 380 - np.arange(300)
    frames = np.stack([wide[:, shift : shift + 340] for shift in shifts])
    noise = rng.integers(-6, 7, (8, 256, 340, 1))
    return make_video(np.clip(frames + noise[np.arange(300) % 8], 0, 255).astype(np.uint8), fps=30, gop=250)


def make_set(folder: Path, num_train: int, num_val: int) -> str:
    """Class folders, packed."""
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            path = folder / "videos" / split / LABELS[number % 2] / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(video(LABELS[number % 2], number + 1000 * (split == "val")))
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "set"), resources=RESOURCES))
    return str(folder / "set")


def settings(catalog: str, out: Path, num_segments: int, epochs: int) -> dict[str, Any]:
    """What a trial and a training alone have in common."""
    return {
        "catalog": catalog,
        "out": str(out),
        "clip": ClipConfig(sample=SampleConfig(num_segments=num_segments, frames_per_segment=FRAMES)),
        "model": ModelConfig(factory="tune_cache:mean_motion"),
        "optim": OptimConfig(epochs=epochs, batch_size=4),
        "resources": RESOURCES,
    }


def decode_cpu_s(run: str) -> float:
    """CPU seconds of the decode tasks of a run folder."""
    return sum(row.decode_cpu_s for row in RunFolder(Storage(), run).epochs())


def losses(run: str) -> list[tuple[float | None, float | None]]:
    """Loss and validation loss of every epoch."""
    return [(row.loss, row.val_loss) for row in RunFolder(Storage(), run).epochs()]


def main() -> int:
    """Print the table and, last, the figures beside the bar as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 videos and 1 epoch instead of 20 and 3")
    quick = parser.parse_args().quick
    num_train, num_val, epochs = (4, 2, 1) if quick else (16, 4, 3)
    here = Path(__file__).resolve().parent
    roots = [str(path) for path in (here, here.parent / "platform", here.parent / "models")]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)  # workers import the network above
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        catalog = make_set(Path(folder), num_train, num_val)
        alone, runs = {}, {}
        for count in SEGMENTS:
            runs[count] = str(Path(folder) / f"alone-{count}")
            train(TrainConfig(**settings(catalog, Path(runs[count]), count, epochs)))
            alone[count] = decode_cpu_s(runs[count])
        summary = tune(
            TuneConfig(
                **settings(catalog, Path(folder) / "sweep", SEGMENTS[0], epochs),
                space={"optim.lr": RATES, "clip.sample.num_segments": "4,8,16"},
                num_trials=NUM_TRIALS,
                grace_epochs=epochs,
                cache=CacheConfig(gb=20, folder=str(Path(folder) / "cache")),
            )
        )
        trials = [json.loads(line) for line in (Path(folder) / "sweep" / "trials.jsonl").read_text().splitlines()]
        same = [
            losses(trial["run"]) == losses(runs[trial["settings"]["clip.sample.num_segments"]])
            for trial in trials
            if trial["settings"]["optim.lr"] == OptimConfig().lr
        ]
        disconnect()
    apart = sum(alone[trial["settings"]["clip.sample.num_segments"]] for trial in trials)
    print(f"{num_train} videos to train on, {num_val} to score, {epochs} epochs; CPU seconds of the decode tasks")
    for count in SEGMENTS:
        print(f"one trial, {count:>2}x{FRAMES}, no cache {alone[count]:>10.1f}")
    for trial in trials:
        chosen = trial["settings"]
        name = f"{chosen['clip.sample.num_segments']:>2}x{FRAMES}, lr {chosen['optim.lr']:g}"
        print(f"  trial of the sweep, {name:<18} {trial['decode_cpu_s']:>6.1f}")
    print(f"the sweep of {len(trials)}, shared cache {summary['decode_cpu_s']:>7.1f}")
    print(f"8 such trials on their own {apart:>12.1f}")
    ratio = round(summary["decode_cpu_s"] / alone[16], 3)
    result = {
        "sweep / one trial of 16 segments": {"value": ratio, "bar": f"<= {BAR}"},
        "sweep / mean trial": {"value": round(summary["decode_cpu_s"] / (apart / len(trials)), 3)},
        "trials on their own / sweep": {"value": round(apart / summary["decode_cpu_s"], 2)},
        "losses with the cache equal those without": {"value": all(same), "trials": len(same)},
        "ok": ratio <= BAR and all(same) and bool(same),
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
