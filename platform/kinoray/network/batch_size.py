"""How many clips a forward pass takes: one on a CPU, on a GPU what is asked for, or found out there (batch_size 0).

Logits of another batch size differ in their last digits, and so do those of another place in the batch: libraries
choose their algorithm by the number of rows, and take the last few rows of a product another way than the first. So on
a CPU, where a batch saves little, each clip is run by itself: then its digits are its own, whatever the unit of work.
On a GPU a labelling has one size: the first worker finds it out, writes it down, and all others take it, also after a
kill and on other GPUs. What is easy to break: what is written is never replaced.
"""

import json
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from kinoray.config.shared import ClipConfig, InferenceConfig
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.network.batch import FLOW_CHANNELS, VideoBatch, model_inputs
from kinoray.network.build import VideoModel, prepare_model
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record

__all__ = ["CPU_BATCH", "agreed_batch_size", "auto_batch_size", "largest_batch"]

CPU_BATCH = 1
"""Clips a forward pass on a CPU: no more, or its digits would depend on who is beside it, and where."""
_MOST = 64  # clips; a GPU is full before
_SHARE = 0.8  # of the memory that is free: recorded calls and the next batch's inputs come on top


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The last of 1, 2, 4, ... up to `most` that fits; 0 if one does not. Running out of memory is not fitting."""
    size, found = 1, 0
    while size <= most:
        try:
            if not fits(size):
                break
        except torch.OutOfMemoryError:
            break
        found, size = size, 2 * size
    return found


def auto_batch_size(model: VideoModel, clip: ClipConfig, inference: InferenceConfig, device: str) -> int:
    """Clips a forward pass of this network: CPU_BATCH on a CPU, else what fits in the GPU's memory.

    The network is moved to the device.

    Raises:
        ConfigError: the GPU's memory does not hold one clip.
    """
    if device == "cpu":
        return CPU_BATCH
    cast(nn.Module, model).to(device)
    plain = InferenceConfig(precision=inference.precision)  # compiling takes minutes for each size, and less memory
    prepared = prepare_model(model, clip, plain)
    budget = _SHARE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            prepared(**model_inputs(_blank(size, model, clip), model.input_spec, device))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() <= budget

    size = largest_batch(fits, _MOST)
    torch.cuda.empty_cache()
    if not size:
        raise ConfigError(
            f"batch_size 0 finds no room for one clip in {budget / 2**30:.1f} GiB of GPU memory; give "
            "--inference.precision bf16, fewer --num-segments, or a larger GPU"
        )
    return size


def _blank(size: int, model: VideoModel, clip: ClipConfig) -> VideoBatch:
    side, spec = clip.view.crop_px, model.input_spec
    shape = (size, clip.sample.num_segments, clip.sample.frames_per_segment)
    rgb = torch.zeros(*shape, 3, side, side, dtype=torch.uint8)
    flow = torch.zeros(*shape, FLOW_CHANNELS, side, side, dtype=torch.int8) if spec.flow_channels else None
    return VideoBatch(rgb=rgb, flow=flow)


def agreed_batch_size(storage: Storage, root: str, find: Callable[[], int]) -> int:
    """The size written down in the labelling's folder `root`; if there is none yet, what `find` gives is written."""
    uri = join(root, "batch_size.json")
    try:
        return _read(storage, uri)
    except ObjectNotFound:
        storage.put_if_absent(uri, json.dumps({"batch_size": find()}).encode())
        return _read(storage, uri)  # another worker may have been first


def _read(storage: Storage, uri: str) -> int:
    return read_record(storage, uri, lambda record: int(record["batch_size"]))
