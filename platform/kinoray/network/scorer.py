"""Clips in, in batches that form across videos; the logits of each out, and what else of it is asked for.

What is easy to break: which clips share a batch follows from their order alone, so the same clips give the same digits
after any kill; only with batch_size 1 do they not depend on the others (kinoray.network.forward). A batch's answers
come with the batch after it, or with `flush`: the device computes while the host prepares (kinoray.network.forward).

Anytime labelling: segments of a video one by one, until the others cannot change, or hardly change, its top-1. For a
network whose answer is the mean over segments of probabilities, the running sum of k of S segments leads by
sum_1 - sum_2, and each of the S - k others adds at most 1 to that of another class: a lead of more than S - k is final.
What is easy to break: segments come in nested order, so that those seen first are spread over the whole video.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kinoray.config.scoring import EarlyExit, ScorerConfig, SegmentConsensus
from kinoray.config.shared import ClipConfig
from kinoray.errors import ConfigError, ModelError
from kinoray.network.batch import DeviceInput
from kinoray.network.build import VideoModel
from kinoray.network.forward import Forward, Launched, collate_for
from kinoray.network.prepare import prepare_model
from kinoray.video.frames import Clip

__all__ = [
    "ClipAnswer",
    "ClipScorer",
    "EarlyExit",
    "RunningAnswer",
    "ScorerConfig",
    "SegmentConsensus",
    "check_scorer",
    "nested_order",
    "segment_consensus",
]

Ticket = TypeVar("Ticket")

_ROUNDING = 1e-5  # a lead by less than this, in segments, is not taken for one: other batches round otherwise


def nested_order(num_segments: int) -> np.ndarray:
    """All segments, int64 [S], any beginning of it spread over the video: 0, 8, 4, 12, 2, ... of 16 (van der Corput).

    The places of the bit-reversed numbers below the next power of two, those that are not segments left out.
    """
    bits = max(1, math.ceil(math.log2(max(2, num_segments))))
    reversed_places = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(2**bits)]
    return np.array([place for place in reversed_places if place < num_segments], np.int64)


class RunningAnswer:
    """The mean over the segments seen so far of one video."""

    def __init__(self, num_segments: int, consensus: SegmentConsensus) -> None:
        self.num_segments, self.consensus = num_segments, consensus
        self.seen = 0
        self._total: np.ndarray | float = 0.0

    def add(self, logits: np.ndarray, count: int) -> None:
        """The network's answer, float64 [C], for `count` more segments."""
        self._total = self._total + count * (np.exp(logits) if self.consensus == "probs" else logits)
        self.seen += count

    @property
    def logits(self) -> np.ndarray:
        """float64 [C]: what the network says of the segments seen, as it says it (logarithms with "probs")."""
        mean = np.asarray(self._total) / self.seen
        return np.log(np.maximum(mean, np.finfo(np.float64).tiny)) if self.consensus == "probs" else mean

    @property
    def lead(self) -> float:
        """Of the mean's first probability above its second, in 0 .. 1."""
        logits = self.logits
        if len(logits) < 2:
            return 1.0
        shifted = np.exp(logits - logits.max())
        second, first = np.sort(shifted / shifted.sum())[-2:]
        return float(first - second)

    def is_settled(self, rule: EarlyExit) -> bool:
        """Whether no more segments are needed. Without a margin only a mean of probabilities can be."""
        left = self.num_segments - self.seen
        if left == 0:
            return True
        if rule.margin is not None:
            return self.lead >= rule.margin
        return self.consensus == "probs" and self.seen * self.lead > left + _ROUNDING


@dataclass(frozen=True, slots=True)
class ClipAnswer:
    """What the network says of one clip."""

    logits: np.ndarray
    """float64 [C]"""
    segments_run: int
    """Segments that it looked at."""
    embedding: np.ndarray | None
    """float32 [D], mean over the segments, the streams' vectors one after the other."""
    segment_logits: np.ndarray | None
    """float32 [S, C], in order of time."""


def check_scorer(model: VideoModel, config: ScorerConfig, num_classes: int) -> None:
    """Refuse what this network cannot give.

    Raises:
        ConfigError: saying which option, and why.
    """
    consensus = segment_consensus(model)
    if (config.early_exit or config.segment_logits) and consensus is None:
        name = "early_exit" if config.early_exit else "segment_scores"
        raise ConfigError(
            f"{name} needs a network whose answer is a mean over segments that it sees one by one (listed in "
            "docs/models.md); "
            f"{type(model).__name__} looks at all of them together"
        )
    if config.early_exit and config.early_exit.margin is None and consensus != "probs":
        raise ConfigError(
            "early_exit exact needs a network that averages probabilities over its segments (model.options.consensus "
            "probs): logits have no bound, so no lead is ever final; use early_exit margin with a calibration"
        )
    if config.embeddings and config.inference.compile:
        raise ConfigError("embeddings cannot be kept of a compiled network; leave out inference.compile")
    if config.embeddings and not _classifiers(cast(nn.Module, model), num_classes):
        raise ConfigError(
            f"embeddings are what goes into a network's linear classifiers, and {type(model).__name__} has no linear "
            f"layer with {num_classes} outputs"
        )


def segment_consensus(model: VideoModel) -> SegmentConsensus | None:
    """How the network makes one answer of its segments; None for one that sees them together."""
    return cast("SegmentConsensus | None", getattr(model, "segment_consensus", None))


def _classifiers(model: nn.Module, num_classes: int) -> list[nn.Linear]:
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == num_classes]
    return [part for part in found if getattr(part, "is_classifier", False)] or found


@dataclass(slots=True)
class _Waiting(Generic[Ticket]):
    """A clip on its way."""

    ticket: Ticket
    clip: Clip
    running: RunningAnswer | None = None
    embedding: np.ndarray | float = 0.0


class ClipScorer(Generic[Ticket]):
    """Runs a network on clips as they come; answers come back with the ticket that a clip was put in with.

    With early exit they may come back in another order: clips that need another segment wait until a batch of them has
    gathered.

    Args:
    """

    def __init__(
        self,
        model: VideoModel,
        clip: ClipConfig,
        config: ScorerConfig,
        *,
        num_classes: int,
        device: str,
    ) -> None:
        self._config, spec = config, model.input_spec
        self._consensus = segment_consensus(model)
        self._num_segments = clip.sample.num_segments
        finish = None
        if clip.for_network(spec.flow_channels).flow_on_device:
            finish = DeviceInput(clip.flow.bound_px, device)
        cast(nn.Module, model).to(device)
        prepared = prepare_model(model, clip, config.inference)
        tap = _Tap(cast(nn.Module, prepared), num_classes) if config.embeddings else None
        self._forward = Forward(
            prepared,
            spec,
            device,
            num_classes,
            collate=collate_for(device, finish),
            embeddings=tap.take if tap else None,
        )
        self._under_way: tuple[list[Ticket], Launched] | None = None
        self._order = nested_order(self._num_segments)
        self._stages = config.early_exit.stages(self._num_segments) if config.early_exit else [self._num_segments]
        self._queues: list[deque[_Waiting[Ticket]]] = [deque() for _ in self._stages]

    def put(self, ticket: Ticket, clip: Clip) -> Iterator[tuple[Ticket, ClipAnswer]]:
        """Take a clip; gives the answers that became ready.

        Raises:
            ModelError: the network fails, or gives NaN, infinity or another number of classes.
        """
        running = None
        if self._config.early_exit:
            assert self._consensus is not None  # check_scorer
            running = RunningAnswer(self._num_segments, self._consensus)
        self._queues[0].append(_Waiting(ticket, clip, running))
        for stage, queue in enumerate(self._queues):
            if len(queue) >= self._config.batch_size:
                yield from self._run(stage)

    def flush(self) -> Iterator[tuple[Ticket, ClipAnswer]]:
        """The answers of all clips that still wait. Raises as `put`."""
        for stage, queue in enumerate(self._queues):
            while queue:
                yield from self._run(stage)
        yield from self._arrived()

    def clear(self) -> None:
        """Forget all clips that wait and what is under way: after an error, so that it changes no later batch."""
        self._under_way = None
        for queue in self._queues:
            queue.clear()

    def _run(self, stage: int) -> Iterator[tuple[Ticket, ClipAnswer]]:
        """One batch of a stage: answers, or a place in the next stage's queue."""
        queue = self._queues[stage]
        batch = [queue.popleft() for _ in range(min(len(queue), self._config.batch_size))]
        rule = self._config.early_exit
        if rule is None:
            yield from self._run_whole(batch)
            return
        begin, end = self._stages[stage - 1] if stage else 0, self._stages[stage]
        parts = [_part(one.clip, np.sort(self._order[begin:end])) for one in batch]
        logits, embeddings = self._forward.launch(parts).fetch()  # they decide what comes next
        for row, one in enumerate(batch):
            assert one.running is not None
            one.running.add(logits[row], end - begin)
            if embeddings is not None:
                one.embedding = one.embedding + (end - begin) * embeddings[row].astype(np.float64)
            if one.running.is_settled(rule):
                vector = None if embeddings is None else (one.embedding / end).astype(np.float32)  # type: ignore[union-attr]
                yield one.ticket, ClipAnswer(one.running.logits, end, vector, None)
            else:
                self._queues[stage + 1].append(one)

    def _run_whole(self, batch: list[_Waiting[Ticket]]) -> Iterator[tuple[Ticket, ClipAnswer]]:
        if not self._config.segment_logits:
            launched = self._forward.launch([one.clip for one in batch])
            before = list(self._arrived())
            self._under_way = [one.ticket for one in batch], launched
            yield from before
            return
        assert self._consensus is not None  # check_scorer
        for one in batch:  # each segment is a clip of its own: as many forward passes as videos, each of S segments
            parts = [_part(one.clip, np.array([segment])) for segment in range(self._num_segments)]
            logits, embeddings = self._forward.launch(parts).fetch()
            running = RunningAnswer(self._num_segments, self._consensus)
            for segment in logits:
                running.add(segment, 1)
            vector = None if embeddings is None else embeddings.mean(axis=0)
            yield one.ticket, ClipAnswer(running.logits, self._num_segments, vector, logits.astype(np.float32))

    def _arrived(self) -> Iterator[tuple[Ticket, ClipAnswer]]:
        """The answers of the batch that was launched last, if they were not fetched yet."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        tickets, launched = under_way
        logits, embeddings = launched.fetch()
        for row, ticket in enumerate(tickets):
            vector = None if embeddings is None else embeddings[row]
            yield ticket, ClipAnswer(logits[row], self._num_segments, vector, None)


def _part(clip: Clip, segments: np.ndarray) -> Clip:
    """Some segments of a clip, in order of time."""
    flow, partners = (None if x is None else x[segments] for x in (clip.flow, clip.partners))
    return replace(clip, frames=clip.frames[segments], flow=flow, partners=partners, indices=clip.indices[segments])


class _Tap:
    """Listens at the classifiers: what goes into them is a clip's embedding."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        self._heard: list[Tensor] = []
        self._handles: list[RemovableHandle] = [
            part.register_forward_pre_hook(self._hear) for part in _classifiers(model, num_classes)
        ]

    def _hear(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._heard.append(arguments[0])

    def take(self, num_clips: int) -> Tensor:
        """The embeddings of the last forward pass, float32 [B, D]: means over a clip's segments or frames."""
        heard, self._heard = self._heard, []
        if not heard:
            raise ModelError("the network did not use its classifiers, so there are no embeddings; leave them out")
        vectors = [x.float().reshape(num_clips, -1, x.shape[-1]).mean(dim=1) for x in heard]
        return torch.cat(vectors, dim=1)
