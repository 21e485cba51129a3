"""Train and test one network on clips that are decoded already: a small, single-threaded, repeatable study run.

Nothing is chosen by looking at the test clips: the weights after the last step are the ones that are scored.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kinoray.config.shared import ModelConfig, OptimConfig
from kinoray.network.batch import VideoBatch, model_inputs
from kinoray.network.build import InputSpec, VideoModel, build_model
from kinoray.train.recipe import learning_rate, make_optimizer

__all__ = ["ClipBlock", "ClipSet", "Fit", "fit", "whole_video_order"]

# Shapes: B videos, S segments, T frames a segment, H W pixels


@dataclass(frozen=True, slots=True)
class ClipBlock:
    """Some decoded videos: frames uint8 [B, S, T, 3, H, W], flow int8 [B, S, T, 2, H, W], labels int64 [B]."""

    frames: np.ndarray
    flow: np.ndarray
    labels: np.ndarray


class ClipSet:
    """Blocks of one clip shape, addressed as one table. The blocks may lie in shared memory and are never copied."""

    def __init__(self, blocks: Sequence[ClipBlock]) -> None:
        self._blocks = list(blocks)
        self._where = [(block, row) for block in self._blocks for row in range(len(block.labels))]
        self.labels: np.ndarray = np.concatenate([block.labels for block in self._blocks])
        shape = self._blocks[0].frames.shape
        self.num_segments, self.frames_per_segment, self.crop_px = int(shape[1]), int(shape[2]), int(shape[-1])

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._where)

    def batch(self, rows: Sequence[int] | np.ndarray, spec: InputSpec) -> VideoBatch:
        """Videos by number, as decoded, in the streams that the spec asks for."""
        chosen = [self._where[row] for row in rows]
        rgb = torch.from_numpy(np.stack([block.frames[row] for block, row in chosen])) if spec.rgb else None
        flow = torch.from_numpy(np.stack([block.flow[row] for block, row in chosen])) if spec.flow_channels else None
        return VideoBatch(rgb=rgb, flow=flow)


@dataclass(frozen=True, slots=True)
class Fit:
    """What came out of one run."""

    predicted: np.ndarray
    """int64 [test videos]: the class with the largest logit."""
    losses: list[float]
    """Mean training loss of each epoch."""
    num_params: int
    cpu_s: float
    """CPU seconds of this process for training and testing."""
    notes: dict[str, float]
    """What the model says of itself after training: `model.notes(num_frames=, crop_px=)`, if it has such a method."""


def _select(batch: VideoBatch, index: torch.Tensor) -> VideoBatch:
    """Frames of each video by number in order of time: index int64 [B, S', T'] -> clips [B, S', T', ...]."""
    rows = torch.arange(len(batch))[:, None, None]
    rgb, flow = (None if x is None else x.flatten(1, 2)[rows, index] for x in (batch.rgb, batch.flow))
    return VideoBatch(rgb=rgb, flow=flow)


def _shift(batch: VideoBatch, rng: np.random.Generator) -> VideoBatch:
    """Each video moved by a random vector, what leaves on one side enters on the other; frames and flow alike.

    The cards of the study's videos wrap around in the same way, so the label stays; without it, even a network that
    sees no motion learns 1,600 videos by heart.
    """
    streams = [x for x in (batch.rgb, batch.flow) if x is not None]
    size = streams[0].shape[-1]
    for video in range(len(batch)):
        move = rng.integers(0, size, 2).tolist()
        for x in streams:
            x[video] = torch.roll(x[video], move, dims=(-2, -1))
    return batch


def _training_frames(num_videos: int, num_frames: int, frames_per_clip: int, rng: np.random.Generator) -> torch.Tensor:
    """One random frame of each of frames_per_clip equal slots, int64 [B, 1, T]."""
    slot = num_frames // frames_per_clip
    drawn = rng.integers(0, slot, (num_videos, 1, frames_per_clip)) + slot * np.arange(frames_per_clip)
    return torch.from_numpy(drawn)


def whole_video_order(num_segments: int, frames_per_segment: int) -> torch.Tensor:
    """Frames of S clips that each span the whole video, int64 [S, T]: every S-th frame, from the first, second, ...

    For networks that read the video as one sequence: each clip then has the frame rate that training had.
    """
    return torch.arange(num_segments * frames_per_segment).view(frames_per_segment, num_segments).T.contiguous()


def _as_videos(x: torch.Tensor | None) -> torch.Tensor | None:
    """Segments as videos of one segment: [B, S, T, ...] -> [B * S, 1, T, ...]."""
    return None if x is None else x.flatten(0, 1)[:, None]


@torch.inference_mode()
def _predict(model: VideoModel, clips: ClipSet, batch_size: int, *, one_sequence: bool) -> np.ndarray:
    predicted = []
    for start in range(0, len(clips), batch_size):
        batch = clips.batch(range(start, min(start + batch_size, len(clips))), model.input_spec)
        num_videos = len(batch)
        if one_sequence:
            order = whole_video_order(clips.num_segments, clips.frames_per_segment)
            batch = _select(batch, order.expand(num_videos, -1, -1))
            batch = VideoBatch(**{name: _as_videos(getattr(batch, name)) for name in ("rgb", "flow")})
        logits = model(**model_inputs(batch, model.input_spec, "cpu"))
        predicted.append(logits.reshape(num_videos, -1, logits.shape[-1]).mean(dim=1).argmax(dim=1).numpy())
    return np.concatenate(predicted).astype(np.int64)


def _epoch(
    model: VideoModel,
    optimizer: torch.optim.Optimizer,
    clips: ClipSet,
    optim: OptimConfig,
    *,
    epoch: int,
) -> float:
    """One pass over the training clips in the order of (optim.seed, epoch); returns the mean loss."""
    rng = np.random.Generator(np.random.PCG64([optim.seed, epoch]))
    num_frames = clips.num_segments * clips.frames_per_segment
    order = rng.permutation(len(clips))
    starts = range(0, len(clips), optim.batch_size)
    labels = torch.from_numpy(clips.labels)
    total = 0.0
    for number, start in enumerate(starts):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, epoch * len(starts) + number, optim.epochs * len(starts))
        rows = order[start : start + optim.batch_size]
        drawn = _training_frames(len(rows), num_frames, clips.frames_per_segment, rng)
        batch = _shift(_select(clips.batch(rows, model.input_spec), drawn), rng)
        loss = nn.functional.cross_entropy(model(**model_inputs(batch, model.input_spec, "cpu")), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if optim.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(clips)


def fit(
    config: ModelConfig, train: ClipSet, test: ClipSet, optim: OptimConfig, *, num_classes: int, one_sequence: bool
) -> Fit:
    """Train a network from random weights with AdamW and score its last state. The same digits for the same arguments.

    Training clips are one segment (n = 1) of T frames, one drawn at random from each of T slots over the decoded
    S x T frames and moved around the edges by a random vector; testing uses all S segments, unmoved. A network that
    reads the video as one sequence (one_sequence) is tested on S clips that each span the whole video instead, logits
    averaged. Weights, order and draws follow optim.seed.

    Raises:
        ConfigError, ModelError: the model cannot be built or fed.
    """
    start = time.process_time()
    torch.manual_seed(optim.seed)
    model = build_model(config, num_classes)
    assert isinstance(model, nn.Module)
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, optim)
    model.train()
    losses = [_epoch(model, optimizer, train, optim, epoch=epoch) for epoch in range(optim.epochs)]
    model.eval()
    predicted = _predict(model, test, optim.batch_size, one_sequence=one_sequence)
    notes = getattr(model, "notes", None)
    return Fit(
        predicted=predicted,
        losses=losses,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        cpu_s=time.process_time() - start,
        notes=dict(notes(num_frames=train.frames_per_segment, crop_px=train.crop_px)) if callable(notes) else {},
    )
