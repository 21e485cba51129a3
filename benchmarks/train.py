"""Training through Ray beside a plain PyTorch loop: `python benchmarks/train.py [--quick]`.

The same packed videos (340x256, 10 s, H.264), order, random frames, recipe and number of processes: `kinoray train`
with one worker and its decode tasks, and a loop over torch's DataLoader with as many workers, which read the members
of the shards and call kinoray's decode. The network costs next to nothing, so that what is measured is how fast
clips are fed: any real network hides some of it. Clips a second of whole epochs, the first left out; the two take
turns, and the ratio is the median over rounds. Bar: kinoray trains at least 0.90 times as many clips a second. Both
must arrive at the same loss, or the benchmark fails. Start-up is until the first epoch begins, with imports and Ray.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kinoray.catalog.table import Catalog, load_catalog, read_video, references, save_catalog
from kinoray.cluster.connect import disconnect
from kinoray.config.shared import (
    ClipConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainResourcesConfig,
    WorkersConfig,
)
from kinoray.demo.videos import make_video
from kinoray.network.batch import VideoBatch, collate, model_inputs
from kinoray.network.build import build_model
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.input import epoch_order, run_length
from kinoray.train.recipe import learning_rate, make_optimizer, set_rate
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled
from kinoray.video.sample import clip_rng

BAR = 0.9
LABELS = ("dark", "light")


def video(label: str, seed: int) -> bytes:
    """10 s of a texture that pans, with noise."""
    rng = np.random.default_rng(seed)
    low = 0 if label == "dark" else 96
    coarse = rng.integers(low, low + 160, (32, 90, 3)).astype(np.uint8)
    wide = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)  # 256 x 720
    noise = rng.integers(-6, 7, (8, 256, 340, 1))
    frames = np.stack([wide[:, shift : shift + 340] for shift in range(300)])
    return make_video(np.clip(frames + noise[np.arange(300) % 8], 0, 255).astype(np.uint8), fps=30, gop=12)


def make_set(folder: Path, num_videos: int, repeats: int, resources: WorkersConfig) -> str:
    """Videos in packed shards, each `repeats` times in the catalog, under other names."""
    for number in range(num_videos):
        path = folder / "videos" / "train" / LABELS[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video(LABELS[number % 2], number))
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "set"), resources=resources))
    packed = load_catalog(Storage(), str(folder / "set"))
    tables = []
    for number in range(repeats):
        names = pa.array([f"{name}#{number}" for name in packed.table["video_id"].to_pylist()])
        tables.append(packed.table.set_column(0, packed.table.schema.field(0), names))
    longer = Catalog(pa.concat_tables(tables).combine_chunks(), packed.labels)
    save_catalog(Storage(), str(folder / "many.parquet"), longer)
    return str(folder / "many.parquet")


def settings(catalog: str, out: str, epochs: int, decode_tasks: int) -> TrainConfig:
    """What both train."""
    return TrainConfig(
        catalog=catalog,
        out=out,
        val_split="",
        clip=ClipConfig(sample=SampleConfig(num_segments=8, frames_per_segment=1)),
        model=ModelConfig(factory="stream:mean_colour"),
        optim=OptimConfig(epochs=epochs, batch_size=16),
        resources=TrainResourcesConfig(num_workers=1, decode_tasks=decode_tasks, local_cpus=decode_tasks + 2),
        checkpoint_every_steps=0,
    )


class Clips(Dataset[tuple[Clip, int]]):
    """(clip, label) of a row, read and decoded where it is asked for."""

    def __init__(self, config: TrainConfig, catalog: Catalog) -> None:
        self.config = config
        self.references, self.labels = references(catalog.table), catalog.table["label_id"].to_pylist()
        self.names = catalog.table["video_id"].to_pylist()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Clip, int]:
        epoch, row = key
        rng = clip_rng(self.config.optim.seed, epoch, self.names[row])
        data = read_video(Storage(), self.references[row])
        return decode(data, Sampled(rng=rng), self.config.clip.without_flow()).clip(), self.labels[row]


class Steps:
    """The batches of an epoch in kinoray's order, as (epoch, row)."""

    def __init__(self, config: TrainConfig, catalog: Catalog) -> None:
        self.config, self.catalog, self.epoch = config, catalog, 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.config.optim.batch_size
        run = run_length(self.catalog, size)
        order = epoch_order(self.catalog, seed=self.config.optim.seed, epoch=self.epoch, run=run).tolist()
        for start in range(0, len(order), size):
            yield [(self.epoch, row) for row in order[start : start + size]]


def gather(items: Sequence[tuple[Clip, int]]) -> tuple[VideoBatch, Tensor]:
    """Clips and labels of a batch."""
    return collate([clip for clip, _ in items]), torch.tensor([label for _, label in items])


def plain(config: TrainConfig) -> dict[str, object]:
    """Train in this process: seconds since 1970 at the first epoch's begin, clips a second and loss of each epoch."""
    torch.set_num_threads(1)
    catalog = load_catalog(Storage(), config.catalog)
    optim, steps = config.optim, Steps(config, catalog)
    torch.manual_seed(optim.seed)
    model = build_model(config.model, len(catalog.labels))
    assert isinstance(model, nn.Module)
    optimizer = make_optimizer(model, optim)
    loader = DataLoader(
        Clips(config, catalog),
        batch_sampler=steps,
        num_workers=config.resources.decode_tasks,
        collate_fn=gather,
        persistent_workers=True,
    )
    num_steps = -(-len(catalog) // optim.batch_size)
    begun_s, rates, losses = time.time(), [], []
    for epoch in range(1, optim.epochs + 1):
        steps.epoch, start_s, loss_sum = epoch, time.monotonic(), 0.0
        for index, (clips, labels) in enumerate(loader):
            set_rate(optimizer, learning_rate(optim, (epoch - 1) * num_steps + index, optim.epochs * num_steps))
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(**model_inputs(clips, model.input_spec, "cpu")), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            loss_sum += float(loss.detach()) * len(labels)
        rates.append(len(catalog) / (time.monotonic() - start_s))
        losses.append(loss_sum / len(catalog))
    return {"begun_s": begun_s, "rates": rates, "losses": losses}


def through_ray(config: TrainConfig) -> dict[str, object]:
    """As `plain`, by kinoray's own job, on a Ray of its own."""
    train(config)
    disconnect()
    starts = json.loads((Path(config.out) / "environment.json").read_text())["starts"]
    rows = RunFolder(Storage(), config.out).epochs()
    rates = [row.videos_per_s for row in rows]
    return {"begun_s": starts[0]["time_s"], "rates": rates, "losses": [row.loss for row in rows]}


def measure(form: str, catalog: str, out: str, epochs: int, decode_tasks: int) -> dict[str, object]:
    """One form in a process of its own; its start-up in seconds is added."""
    asked_s = time.time()
    command = [sys.executable, __file__, "--form", form, catalog, out, str(epochs), str(decode_tasks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found | {"startup_s": float(found["begun_s"]) - asked_s}


def main() -> int:
    """Print the table and, last, the figures beside the bar as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 192 clips an epoch instead of 5 of 600")
    parser.add_argument("--decode-tasks", type=int, default=1, help="tasks or DataLoader workers (default 1)")
    parser.add_argument("--form", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in (here, here.parent / "platform"))
    if arguments.form:
        form, catalog, out, epochs, decode_tasks = arguments.form
        config = settings(catalog, out, int(epochs), int(decode_tasks))
        print(json.dumps(plain(config) if form == "plain" else through_ray(config)))
        return 0

    rounds, num_videos, repeats, epochs = (2, 8, 24, 2) if arguments.quick else (5, 20, 30, 2)
    results: dict[str, list[dict[str, object]]] = {"ray": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        resources = WorkersConfig(num_workers=1)
        catalog = make_set(Path(folder), num_videos, repeats, resources)
        disconnect()
        for number in range(rounds):
            for form in ("ray", "plain") if number % 2 == 0 else ("plain", "ray"):
                out = str(Path(folder) / f"{form}-{number}")
                results[form].append(measure(form, catalog, out, epochs, arguments.decode_tasks))

    rates = {form: [statistics.median(run["rates"][1:]) for run in runs] for form, runs in results.items()}
    startup = {form: statistics.median(run["startup_s"] for run in runs) for form, runs in results.items()}
    print(
        f"{num_videos * repeats} clips an epoch, {epochs - 1} epochs timed, {arguments.decode_tasks} decoding processes"
    )
    print(f"{'':<20}{'clips/s':>10}{'start-up s':>12}")
    for form, name in (("plain", "PyTorch DataLoader"), ("ray", "kinoray train")):
        print(f"{name:<20}{statistics.median(rates[form]):>10.1f}{startup[form]:>12.1f}")
    ratios = [through / bare for through, bare in zip(rates["ray"], rates["plain"], strict=True)]
    ratio = round(statistics.median(ratios), 3)
    losses = [np.array(run["losses"]) for runs in results.values() for run in runs]
    same = all(np.allclose(found, losses[0], rtol=0, atol=1e-4) for found in losses)
    result = {
        "clips/s, kinoray / DataLoader": {"value": ratio, "bar": f">= {BAR}", "rounds": [round(x, 3) for x in ratios]},
        "start-up s": {form: round(value, 1) for form, value in startup.items()},
        "same losses": {"value": same},
        "ok": ratio >= BAR and same,
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
