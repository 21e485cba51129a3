"""Two real ranks on gloo, started by test_recipe_ranks.py: `recipe_ranks.py RANK FOLDER JOB...` trains and saves.

A job is NAME:SETTING=VALUE,... ; its weights go to FOLDER/NAME.safetensors. `from` continues a state that an earlier
job saved after half of its steps.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinoray.config.shared import ClipConfig, ModelConfig, OptimConfig, SampleConfig, ViewConfig
from kinoray.network.batch import VideoBatch
from kinoray.network.build import build_model
from kinoray.train.config import TrainConfig
from kinoray.train.input import rank_part
from kinoray.train.step import Replica

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=32, crop_px=32))
SIZES = (6, 5, 1, 4)  # videos of each global batch; of one video, one rank has none


def global_batch(step: int) -> tuple[VideoBatch, Tensor]:
    noise = torch.Generator().manual_seed(step)
    shape = (SIZES[step], 1, 2)
    rgb = torch.randint(0, 256, (*shape, 3, 32, 32), generator=noise, dtype=torch.uint8)
    flow = torch.randint(-127, 128, (*shape, 2, 32, 32), generator=noise, dtype=torch.int8)
    return VideoBatch(rgb=rgb, flow=flow), torch.arange(SIZES[step]) % 3


def run_job(folder: Path, name: str, settings: dict[str, Any]) -> None:
    parallel, source = settings.pop("parallel", "ddp"), settings.pop("from", "")
    model = ModelConfig(options={"backbone": "tiny", "heads": 2, "scale": "dim"})
    # Frozen batch norms: statistics of parts of a batch are another computation.
    optim = OptimConfig(freeze_bn=settings.pop("freeze_bn", True), **settings)
    config = TrainConfig(catalog="c", out="o", model=model, clip=CLIP, optim=optim, parallel=parallel)
    torch.manual_seed(0)
    replica = Replica(build_model(model, 3), 3, config, torch.device("cpu"))
    steps = range(len(SIZES))
    if source:
        replica.resume(*(load_file(folder / f"{source}.half.{part}") for part in ("weights", "train")), "here")
        steps = range(2, len(SIZES))
    replica.train()
    for step in steps:
        if step == 2 and not source:
            replica.finish()
            keep_state(folder, name, replica)
        clips, labels = global_batch(step)
        part = rank_part(len(labels), dist.get_rank(), dist.get_world_size())
        assert clips.rgb is not None
        assert clips.flow is not None
        mine = VideoBatch(rgb=clips.rgb[part], flow=clips.flow[part])
        replica.train_step(mine if len(labels[part]) else None, labels[part], 0, 0.003)
    totals = replica.finish()
    replica.state.share_buffers()
    state = replica.snapshot(in_epoch=False).weights
    replica.reset()
    replica.eval()
    if dist.get_rank() == 0:  # the other rank scores nothing, and waits for no one
        replica.score(*global_batch(0), 0)
    state["loss"] = torch.tensor([totals.loss_sum, replica.finish().loss_sum])
    if dist.get_rank() == 0:
        save_file(state, folder / f"{name}.safetensors")


def keep_state(folder: Path, name: str, replica: Replica) -> None:
    first = dist.get_rank() == 0
    state = replica.snapshot(in_epoch=True, keep=first)
    if first:
        save_file(state.weights, folder / f"{name}.half.weights")
        save_file(state.train, folder / f"{name}.half.train")
    dist.barrier()


def main() -> None:
    rank, world_size, folder, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / f"store-{world_size}"), int(world_size))
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=timeout)
    for job in jobs:
        name, _, text = job.partition(":")
        pairs = [item.split("=") for item in text.split(",") if item]
        run_job(Path(folder), name, {key: yaml.safe_load(value) for key, value in pairs})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
