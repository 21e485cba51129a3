"""kinoray beside what one would write oneself: `python benchmarks/peers.py [--quick] [--videos DIR] [--model-bound]`.

A folder of ten-second clips becomes a Parquet table of labels, by whole commands that take turns:

kinoray      `kinoray label`.
dataloader   decord in the workers of a torch DataLoader, the network in the main process.
ray fused    Ray Data: decord and the network in one map_batches of actors, one a core.
ray stages   Ray Data: decord in tasks, then one actor with the network.
pipeline     transformers.pipeline("video-classification"), its own decoding, in workers.

All have the same VideoMAE of random weights, as save_pretrained writes it, 8 frames of each clip in the middles of 8
equal slots (pipeline: 8 frames as it chooses), and scale and crop them alike. The clips are the films of --videos,
looped and cut to ten seconds at 256 px, or generated ones; each is in the folder many times, under other names.

CPU seconds are of all processes of a command, Ray's too. "a clip" is the difference of two sizes over that of their
clips, so without the start; "whole" is the larger size with it. Bars, of medians over the turns, for clips per CPU
second without the start over those of the best of the others: 1.5, and with --model-bound (a larger network) 0.95,
which then is the bar of clips per second, too.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORES = os.cpu_count() or 1
FRAMES, BATCH = 8, 8
NUM_CLASSES = 10
FPS, SECONDS, HEIGHT = 30, 10, 256
NUM_FILMS = 12
FILM_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
BAR, MODEL_BAR = 1.5, 0.95
NETWORKS = {
    "decode-bound": {"image_size": 112, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "model-bound": {"image_size": 224, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
}
CLIPS = {"decode-bound": (64, 640), "model-bound": (16, 80)}


# The others: what each process imports is in the functions, so that none pays for another's


class Decoder:
    """Frames of a file, uint8 [FRAMES, 3, side, side]."""

    def __init__(self, network: str) -> None:
        self.side = json.loads(Path(network, "config.json").read_text())["image_size"]

    def __call__(self, path: str) -> Any:
        import decord
        import torch
        from torchvision.transforms.v2 import functional as transforms

        reader = decord.VideoReader(path, num_threads=1)
        numbers = [(2 * slot + 1) * len(reader) // (2 * FRAMES) for slot in range(FRAMES)]
        frames = torch.from_numpy(reader.get_batch(numbers).asnumpy()).permute(0, 3, 1, 2)
        frames = transforms.resize(frames, [self.side * 8 // 7], antialias=True)
        return transforms.center_crop(frames, [self.side, self.side]).contiguous()


class Network:
    """Labels and scores of a batch of clips, uint8 [B, FRAMES, 3, side, side]."""

    def __init__(self, network: str, threads: int) -> None:
        import torch
        from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = VideoMAEForVideoClassification.from_pretrained(network).eval()
        processor = VideoMAEImageProcessor.from_pretrained(network)
        self.mean = torch.tensor(processor.image_mean)[:, None, None]
        self.std = torch.tensor(processor.image_std)[:, None, None]

    def __call__(self, clips: Any) -> tuple[list[str], list[float]]:
        with self.torch.inference_mode():
            probs = self.model((clips.float() / 255 - self.mean) / self.std).logits.softmax(dim=1)
        scores, best = probs.max(dim=1)
        return [self.model.config.id2label[number] for number in best.tolist()], scores.tolist()


class FusedActor:
    """Paths to labels."""

    def __init__(self, network: str, threads: int) -> None:
        self.decode, self.network = Decoder(network), Network(network, 1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        labels, scores = self.network(torch.stack([self.decode(path) for path in batch["path"]]))
        return {"path": batch["path"], "label": labels, "score": scores}


class DecodeTask:
    """Paths to frames."""

    def __init__(self, network: str) -> None:
        self.decode = Decoder(network)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        return {"path": batch["path"], "frames": np.stack([self.decode(path).numpy() for path in batch["path"]])}


class ModelActor:
    """Frames to labels."""

    def __init__(self, network: str, threads: int) -> None:
        self.network = Network(network, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        labels, scores = self.network(torch.from_numpy(batch["frames"].copy()))
        return {"path": batch["path"], "label": labels, "score": scores}


def by_ray(paths: list[str], network: str, out: Path, threads: int, *, fused: bool) -> None:
    import ray

    ray.init(address="local", num_cpus=CORES, include_dashboard=False)
    rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=-(-len(paths) // (2 * BATCH)))
    arguments = {"network": network, "threads": threads}
    if fused:
        table = rows.map_batches(
            FusedActor, fn_constructor_kwargs=arguments, batch_size=BATCH, num_cpus=1, concurrency=CORES
        )
    else:
        frames = rows.map_batches(DecodeTask(network).__call__, batch_size=BATCH, num_cpus=1)
        table = frames.map_batches(  # with hardly any CPU for Ray, so that the tasks have all the cores
            ModelActor, fn_constructor_kwargs=arguments, batch_size=BATCH, num_cpus=0.01, concurrency=1
        )
    table.write_parquet(str(out))


def by_dataloader(paths: list[str], network: str, out: Path, threads: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from torch.utils.data import DataLoader

    class Clips:
        def __init__(self) -> None:
            self.decode = Decoder(network)

        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, number: int) -> Any:
            return self.decode(paths[number])

    model = Network(network, threads)
    labels: list[str] = []
    scores: list[float] = []
    for clips in DataLoader(Clips(), batch_size=BATCH, num_workers=CORES):
        found = model(clips)
        labels.extend(found[0])
        scores.extend(found[1])
    out.mkdir()
    pq.write_table(pa.table({"path": paths, "label": labels, "score": scores}), out / "labels.parquet")


def by_pipeline(paths: list[str], network: str, out: Path, threads: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import pipeline

    torch.set_num_threads(threads)
    classify = pipeline("video-classification", model=network, device="cpu")
    found = classify(paths, batch_size=BATCH, num_workers=CORES, top_k=1)
    columns = {
        "path": paths,
        "label": [best["label"] for (best,) in found],
        "score": [best["score"] for (best,) in found],
    }
    out.mkdir()
    pq.write_table(pa.table(columns), out / "labels.parquet")


PEERS: dict[str, Callable[..., None]] = {
    "dataloader": by_dataloader,
    "ray fused": lambda *places: by_ray(*places, fused=True),
    "ray stages": lambda *places: by_ray(*places, fused=False),
    "pipeline": by_pipeline,
}


# What they are given


def real_films(folder: Path) -> list[bytes]:
    """Ten seconds of each film in a folder, looped where it is shorter."""
    import av
    import numpy as np

    from kinoray.demo.videos import make_video

    made = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in FILM_SUFFIXES)[:NUM_FILMS]:
        frames = []
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                width = round(HEIGHT * frame.width / frame.height / 2) * 2
                frames.append(frame.to_ndarray(format="rgb24", width=width, height=HEIGHT, interpolation="BICUBIC"))
                if len(frames) == FPS * SECONDS:
                    break
        looped = np.stack([frames[number % len(frames)] for number in range(FPS * SECONDS)])
        made.append(make_video(looped, fps=FPS, gop=250, options={"preset": "medium", "crf": "23"}))
    return made


def make_clips(folder: Path, films: list[bytes], count: int) -> Path:
    """A folder of so many clips."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.mp4").write_bytes(films[number % len(films)])
    return folder


def make_network(folder: Path, name: str) -> str:
    """A VideoMAE of random weights, as the library saves it."""
    import torch
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

    torch.manual_seed(0)
    shape = NETWORKS[name]
    names = {number: f"class {number}" for number in range(NUM_CLASSES)}
    config = VideoMAEConfig(
        **shape,
        num_frames=FRAMES,
        intermediate_size=4 * shape["hidden_size"],
        id2label=names,
        label2id={label: number for number, label in names.items()},
    )
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    side = shape["image_size"]
    processor = VideoMAEImageProcessor(size={"shortest_edge": side * 8 // 7}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)
    return str(folder)


# The measurement


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a command, or of a clip."""

    cpu_s: float
    wall_s: float


def labels_of(name: str, out: Path) -> dict[str, str]:
    """What a command said of each clip, by the name of its file."""
    import pyarrow.parquet as pq

    from kinoray.label.ledger import read_predictions
    from kinoray.storage.objects import Storage

    if name == "kinoray":
        table = read_predictions(Storage(), str(out), columns=["uri", "label_topk"])
        found = [labels[0] for labels in table.column("label_topk").to_pylist()]
        paths = table.column("uri").to_pylist()
    else:
        table = pq.read_table(out)
        paths, found = table.column("path").to_pylist(), table.column("label").to_pylist()
    return {Path(path).name: label for path, label in zip(paths, found, strict=True)}


class Race:
    """Commands on folders of two sizes."""

    def __init__(self, folder: Path, case: str, films: list[bytes], sizes: tuple[int, int]) -> None:
        self.folder, self.sizes = folder, sizes
        self.network = make_network(folder / "network", case)
        self.threads = 1 if case == "decode-bound" else CORES  # of the one process that has the network
        self.clips = {size: make_clips(folder / str(size), films, size) for size in sizes}
        self.checkpoint = str(folder / "checkpoint")
        made = [sys.executable, "-m", "kinoray", "import", f"hf:{self.network}", "--out", self.checkpoint]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        self.said: dict[str, dict[str, str]] = {}

    def run(self, name: str, size: int) -> Cost:
        """Run a command to the end of all its processes."""
        from stream import adopting, cost

        out = self.folder / "out"
        command = [sys.executable, __file__, "--be", name, str(self.clips[size]), self.network, str(out)]
        command.append(str(self.threads))
        if name == "kinoray":
            command = [sys.executable, "-m", "kinoray", "label", str(self.clips[size]), "--out", str(out)]
            command += ["--checkpoint", self.checkpoint, "--workers", str(CORES)]
        with adopting():
            taken = Cost(*cost([command]))
        self.said[name] = labels_of(name, out)
        if len(self.said[name]) != size:
            raise RuntimeError(f"{name}: {len(self.said[name])} labels of {size} clips")
        shutil.rmtree(out)
        return taken

    def turns(self, rounds: int) -> dict[str, list[tuple[Cost, Cost]]]:
        """(whole, a clip) of each command and turn."""
        few, many = self.sizes
        names = ["kinoray", *PEERS]
        found: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                less, whole = self.run(name, few), self.run(name, many)
                clip = Cost((whole.cpu_s - less.cpu_s) / (many - few), (whole.wall_s - less.wall_s) / (many - few))
                found[name].append((whole, clip))
                print(f"turn {number + 1}, {name}: {whole.cpu_s:.1f} CPU s, {whole.wall_s:.1f} s", flush=True)
        return found


def measure(race: Race, rounds: int) -> dict[str, float]:
    """How many times the clips of the best of the others; prints the table."""
    turns = race.turns(rounds)
    print(f"\n{race.sizes[1]} clips, medians of {rounds}; as kinoray: of how many clips the label is the same")
    print(f"{'':<12}{'whole CPU s':>12}{'s':>8}{'a clip CPU ms':>15}{'ms':>8}{'as kinoray':>12}")
    kinds: dict[str, Callable[[tuple[Cost, Cost]], float]] = {
        "clips per CPU second, whole": lambda turn: turn[0].cpu_s,
        "clips per second, whole": lambda turn: turn[0].wall_s,
        "clips per CPU second": lambda turn: turn[1].cpu_s,
        "clips per second": lambda turn: turn[1].wall_s,
    }
    medians = {
        name: {kind: statistics.median(map(figure, found)) for kind, figure in kinds.items()}
        for name, found in turns.items()
    }
    for name, (cpu_s, wall_s, clip_cpu_s, clip_s) in {n: m.values() for n, m in medians.items()}.items():
        alike = statistics.mean(label == race.said["kinoray"][clip] for clip, label in race.said[name].items())
        print(f"{name:<12}{cpu_s:>12.1f}{wall_s:>8.1f}{1e3 * clip_cpu_s:>15.1f}{1e3 * clip_s:>8.1f}{alike:>12.0%}")
    return {kind: min(medians[name][kind] for name in PEERS) / medians["kinoray"][kind] for kind in kinds}


def main() -> int:
    """Print the table, pass or miss of each bar and, last, the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 turn instead of 3, a quarter of the clips")
    parser.add_argument("--videos", type=Path, help="a folder of films; default: generated ones")
    parser.add_argument("--model-bound", action="store_true", help="a larger network")
    parser.add_argument("--clips", type=int, nargs=2, metavar=("FEW", "MANY"), help="clips of both folders")
    parser.add_argument("--be", nargs=5, metavar=("NAME", "CLIPS", "NETWORK", "OUT", "THREADS"), help="be one of them")
    arguments = parser.parse_args()
    if arguments.be:
        name, clips, network, out, threads = arguments.be
        paths = sorted(str(path) for path in Path(clips).iterdir())
        PEERS[name](paths, network, Path(out), int(threads))
        return 0
    from sandbox import film

    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("platform", "models"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    case = "model-bound" if arguments.model_bound else "decode-bound"
    few, many = arguments.clips or [count // (4 if arguments.quick else 1) for count in CLIPS[case]]
    films = real_films(arguments.videos) if arguments.videos else [film(seed, 250) for seed in range(NUM_FILMS)]
    size_kb = statistics.mean(map(len, films)) / 1e3
    print(f"{case}: {len(films)} films of {SECONDS} s, {size_kb:.0f} kB each; VideoMAE {NETWORKS[case]}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        ratios = measure(Race(Path(folder), case, films, (few, many)), 1 if arguments.quick else 3)
    bars = {"clips per CPU second": BAR}
    if arguments.model_bound:
        bars = dict.fromkeys(("clips per CPU second", "clips per second"), MODEL_BAR)
    result: dict[str, dict[str, object]] = {}
    for kind, ratio in ratios.items():
        result[f"{case}: {kind}, kinoray / best"] = {"value": round(ratio, 3)}
        said = ""
        if kind in bars:
            result[f"{case}: {kind}, kinoray / best"]["bar"] = f">= {bars[kind]}"
            said = f"bar {bars[kind]:<5}{'pass' if ratio >= bars[kind] else 'miss'}"
        print(f"{kind + ', kinoray / best of the others':<56}{ratio:>8.3f}  {said}")
    ok = all(ratios[kind] >= bar for kind, bar in bars.items())
    print(json.dumps({**result, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
