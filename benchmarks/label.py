"""How near `kinoray label` comes to the speed of light of this machine: `python benchmarks/label.py [--quick]`.

`kinoray bench` on generated videos of 10 s, 340 x 256, in two cases: a network that takes nearly all of the time
(VCM-SDD, two ResNet-18), and one that takes nearly none (backbone tiny, small frames) with 16 x 6 frames to decode.
Decode loop, model loop and Ray job take turns; each ratio is of one turn, the median over the turns is reported.

job / shared cores   what the job does / cores over (CPU seconds to decode + CPU seconds of the model), or what the
                     slower loop does if that is less. Bar 0.90: on a CPU both halves want the same cores, so this is
                     what can be reached, and CPU seconds say what each half takes of them. What the job does is
                     videos over the core seconds that were there for it, its own and the idle ones: videos a second
                     on a quiet machine, and on another one as if it were quiet.
job / min(both)      the same over the slower loop with all cores to itself. No bar: a job that wastes nothing is below
                     1 by the other half's share of the CPU time.
first label          from the job's beginning until its first unit is committed, beside bare Ray actors that start and
                     label such units. Bar 1.5.
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
import pyarrow as pa
import torch

from kinoray.capacity.bench import bench
from kinoray.capacity.config import BenchConfig
from kinoray.catalog.table import Catalog, catalog_of_source, save_catalog
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from sandbox import film

ROOT = Path(__file__).resolve().parents[1]
LOCAL = Storage(StorageConfig())
LABELS = ("one", "two", "three")
SHARED_BAR, FIRST_BAR = 0.90, 1.5
CASES = {
    "model-bound": ("resnet18", SampleConfig(num_segments=8, frames_per_segment=2), 256, 224, 48),
    "decode-bound": ("tiny", SampleConfig(num_segments=16, frames_per_segment=6), 72, 64, 128),
}
"""Name -> backbone, frames, resized side, crop, videos."""


def make_library(folder: Path, num_films: int, num_rows: int) -> str:
    """A catalog in which each film stands many times, each row a video of its own."""
    for number in range(num_films):
        path = folder / "videos" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(film(number, 250))
    catalog = catalog_of_source(LOCAL, str(folder / "videos"))
    table = catalog.table.take(pa.array(np.arange(num_rows) % len(catalog)))
    ids = pa.array([f"{number:06d}" for number in range(num_rows)])
    uri = str(folder / f"{num_rows}.parquet")
    save_catalog(LOCAL, uri, Catalog(table.set_column(0, table.schema.field(0), ids), catalog.labels))
    return uri


def make_checkpoint(folder: Path, name: str) -> str:
    """A network of random weights: it takes as long as a trained one."""
    backbone, sample, resize_px, crop_px, _ = CASES[name]
    clip = ClipConfig(sample=sample, view=ViewConfig(resize_px=resize_px, crop_px=crop_px))
    model = ModelConfig(options={"backbone": backbone})
    torch.manual_seed(0)
    meta = CheckpointMeta(model=model, clip=clip, labels=LABELS, epoch=1, step=1, samples=1)
    uri = str(folder / name)
    save_checkpoint(LOCAL, uri, model_state=build_model(model, len(LABELS)).state_dict(), meta=meta)
    return uri


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All ratios beside their bars."""
    result: dict[str, Any] = {}
    for name, case in CASES.items():
        num_videos = case[-1] // 2 if quick else case[-1]
        print(f"\n{name}: backbone {case[0]}, {num_videos} videos", flush=True)
        config = BenchConfig(
            source=make_library(folder, 4 if quick else 12, num_videos),
            checkpoint=make_checkpoint(folder, name),
            videos=num_videos,
            unit_size=num_videos // 6,
        )
        found = bench(config, rounds=2 if quick else 3)
        bounds, start = found["bounds"], found["start"]
        first = start["first_over_actor_and_unit"]
        result |= {
            f"{name}: job / shared cores": {"value": round(bounds["job_over_shared"], 3), "bar": f">= {SHARED_BAR}"},
            f"{name}: job / min(both)": {"value": round(bounds["job_over_min_both"], 3)},
            f"{name}: CPU seconds, loops / job": {"value": round(bounds["cpu_over_job"], 3)},
            f"{name}: taken by others": {"value": round(bounds["others_share"], 3)},
            f"{name}: first label / actor and unit": {"value": round(first, 3), "bar": f"<= {FIRST_BAR}"},
        }
    return result


def main() -> int:
    """Print the tables and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half as many videos, 2 turns instead of 3")
    quick = parser.parse_args().quick
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("platform", "models"))
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        result = measure(Path(folder), quick)
    ok = all(
        figure["value"] >= SHARED_BAR if figure["bar"].startswith(">=") else figure["value"] <= FIRST_BAR
        for figure in result.values()
        if "bar" in figure
    )
    print(json.dumps({**result, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
