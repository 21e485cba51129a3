"""The study's set in the object store: generated, encoded as H.264, decoded as any video is, once for all runs."""

from collections import deque
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from kinoray.config.shared import ClipConfig, FlowConfig, ResourcesConfig, SampleConfig, ViewConfig
from kinoray.console import Progress
from kinoray.demo.ablate_fit import ClipBlock
from kinoray.demo.binding import SIDE_PX, Split, binding_clip
from kinoray.demo.videos import make_video
from kinoray.errors import JobError, KinorayError
from kinoray.video.clip import decode_clip

__all__ = ["CLIP", "TASK_RETRIES", "make_block", "make_set", "task_result"]

CLIP = ClipConfig(
    sample=SampleConfig(num_segments=2, frames_per_segment=4),
    view=ViewConfig(resize_px=SIDE_PX, crop_px=SIDE_PX, train_scales=(1.0,), train_flip=False),
    flow=FlowConfig(preset="medium", bound_px=4.0),
)
"""What a network sees of a video: 2 segments x 4 frames in testing; no mirror, since it would swap left and right."""

TASK_RETRIES = 3
"""Retries of a task whose worker died."""
_BLOCK_VIDEOS = 50


def make_block(split: Split, numbers: range, data_seed: int) -> ClipBlock:
    """Generate, encode and decode some videos of the set."""
    made = [binding_clip(split, number, data_seed) for number in numbers]
    clips = [decode_clip(make_video(frames), CLIP, with_flow=True) for frames, _ in made]
    flows = [clip.flow for clip in clips if clip.flow is not None]
    labels = np.array([truth.label_id for _, truth in made], np.int64)
    return ClipBlock(np.stack([clip.frames for clip in clips]), np.stack(flows), labels)


def _make_counted_block(split: Split, numbers: range, data_seed: int) -> tuple[int, ClipBlock]:
    return len(numbers), make_block(split, numbers, data_seed)


def task_result(reference: Any, what: str) -> Any:
    """A finished task's value.

    Raises:
        KinorayError: the one that the task raised, without Ray's traceback; JobError for any other failure.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KinorayError):
            raise error.cause from None
        raise JobError(f"{what} failed: {error.cause!r}; finished runs are kept, the same command goes on") from error
    except RayError as error:
        raise JobError(f"{what} failed: {error}; finished runs are kept, the same command goes on") from error


def make_set(num_train: int, num_test: int, data_seed: int, resources: ResourcesConfig) -> dict[Split, list[Any]]:
    """Both splits as references to ClipBlocks in the object store, in the order of the videos."""
    # Two values: the driver fetches the count, the clips stay where the runs need them.
    task = ray.remote(_make_counted_block).options(
        num_cpus=resources.cpus_per_worker, max_retries=TASK_RETRIES, num_returns=2
    )
    counts: dict[Split, int] = {"train": num_train, "test": num_test}
    todo = deque(
        (split, range(start, min(start + _BLOCK_VIDEOS, count)))
        for split, count in counts.items()
        for start in range(0, count, _BLOCK_VIDEOS)
    )
    blocks: dict[Split, dict[int, Any]] = {"train": {}, "test": {}}
    running: dict[Any, tuple[Split, range]] = {}
    progress = Progress(num_train + num_test, "ablate: making the set", "videos")
    while todo or running:
        while todo and len(running) < resources.num_workers:
            split, numbers = todo.popleft()
            count, block = task.remote(split, numbers, data_seed)
            running[count] = (split, numbers)
            blocks[split][numbers.start] = block
        done = ray.wait(list(running), num_returns=1)[0][0]
        split, numbers = running.pop(done)
        progress.update(task_result(done, f"videos {numbers.start} to {numbers.stop - 1} of {split}"))
    progress.close()
    return {split: [found[start] for start in sorted(found)] for split, found in blocks.items()}
