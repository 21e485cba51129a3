"""One rank's copy of the model: training steps whose gradient is exactly that of the global batch, and exact totals.

The loss of a rank is the sum over its readable videos times world size / readable videos of the global batch: the mean
that DistributedDataParallel (and FSDP) takes over the ranks is then the mean over the global batch, however it is
divided. Easy to break: every rank must make the same calls in the same order, also one that has no readable video.

Frozen backbones that the network parts from its head are given one clip at a time. What they make of it then depends on
nothing else of the batch, and may as well come from a file (kinoray.train.features): bit for bit the same loss.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinoray.errors import CheckpointCorrupt, ConfigError, ModelError
from kinoray.network.batch import FLOW_CHANNELS, FeatureBatch, VideoBatch, model_inputs
from kinoray.network.build import SplitModel, VideoModel, is_split
from kinoray.train.config import TrainConfig
from kinoray.train.recipe import (
    Mix,
    batch_norms,
    freeze,
    loss_sum,
    make_optimizer,
    mix_inputs,
    multilabel_loss_sum,
    recompute,
    set_rate,
    still_parts,
    trained_parameters,
)
from kinoray.train.state import HISTORY, Average, Snapshot, TrainState, is_sharded, shard

__all__ = ["Replica", "Totals"]

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over all ranks; means are NaN where nothing was counted."""

    videos: int
    """Videos that went through the model."""
    quarantined: int
    """Videos that could not be decoded."""
    loss_sum: float
    """Sum of their losses: cross entropies, in training smoothed, weighted and mixed as the recipe says."""
    top1_hits: int
    """Videos whose label came first; of a video that has several, one of them."""
    top5_hits: int
    """Videos whose label was among the first 5."""

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.loss_sum / self.videos if self.videos else math.nan

    @property
    def top1(self) -> float:
        """Share with the label first."""
        return self.top1_hits / self.videos if self.videos else math.nan

    @property
    def top5(self) -> float:
        """Share with the label among the first 5."""
        return self.top5_hits / self.videos if self.videos else math.nan


class _Head(nn.Module):
    """A split network as a step trains it: features in, logits out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **features: Tensor) -> Tensor:
        return cast(SplitModel, self.network).from_features(features)


class Replica:
    """The model and its optimizer on this rank's device. Needs an initialised process group, also for one rank.

    All ranks must start from equal weights and make a Replica together. `backbone` names the parameters that
    optim.backbone_lr_factor is about, `class_weights` float [C] weighs the losses of training.
    """

    def __init__(
        self,
        model: VideoModel,
        num_classes: int,
        config: TrainConfig,
        device: torch.device,
        *,
        backbone: Collection[str] = (),
        class_weights: Tensor | None = None,
    ) -> None:
        self.module = cast(nn.Module, model).to(device)
        self.device = device
        self._spec = model.input_spec
        self._num_classes = num_classes
        self._clip = config.clip
        self._optim = config.optim
        self._weights = None if class_weights is None else class_weights.to(device)
        self._world_size = dist.get_world_size()
        freeze(self.module, config.optim, backbone)
        self._still = still_parts(self.module, config.optim)
        for part in self._still:
            part.eval()
        # Shards are gathered by a forward pass of the whole.
        split = is_split(self.module) and config.optim.backbone_lr_factor == 0 and config.parallel != "fsdp"
        averages = config.optim.ema_decay > 0
        # What is scored where the module itself cannot be: shards make every forward pass a collective.
        self._scorer = copy.deepcopy(self.module) if averages or config.parallel == "fsdp" else self.module
        self._recomputed = recompute(self.module, config.optim.recompute)
        whole: nn.Module = _Head(self.module) if split else self.module
        own = _Head(self._scorer) if split else self._scorer
        self._scored = whole if self._scorer is self.module else own
        self._to_features: Callable[..., dict[str, Tensor]] | None = None
        if split:
            self._to_features = cast(SplitModel, self.module).to_features
        if config.optim.compile:
            whole.compile()
            self._to_features = self._to_features and torch.compile(self._to_features)
        self._parallel = self._spread(whole, config)
        self.state = TrainState(
            module=self.module,
            average=Average(self.module, config.optim.ema_decay) if averages else None,
            optimizer=make_optimizer(self.module, config.optim, backbone),
            scaler=torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16"),
        )
        # Per step: videos, quarantined, loss, top-1 and top-5 hits; pending ones are this rank's, not yet added up.
        self._pending = torch.zeros(5, dtype=torch.float64, device=device)
        self._totals = torch.zeros(5, dtype=torch.float64, device=device)
        self._history: list[Tensor] = []  # of training steps, over all ranks
        self._answers: list[tuple[Tensor, Tensor]] = []  # logits and labels, of videos that may have several
        self._stepped = False  # whether what is pending is a training step's
        self._halts = torch.zeros(1, dtype=torch.float64, device=device)  # of this rank, not yet told
        self._halted = torch.zeros(1, dtype=torch.float64, device=device)  # over all ranks
        self._order_buckets()

    def _spread(self, whole: nn.Module, config: TrainConfig) -> nn.Module:
        if config.parallel == "fsdp":
            shard(self.module, self.device.type)
            return self.module
        if self._world_size == 1:
            return whole
        # Gradients lie in the buckets that are sent, not beside them: a copy of all parameters less.
        return DistributedDataParallel(whole, gradient_as_bucket_view=True)

    def train(self) -> None:
        """Get ready for training steps."""
        self.module.train()
        for part in self._still:
            part.eval()

    def eval(self) -> None:
        """Get ready to `score` the weights as they are now; all ranks must call it."""
        if self._scorer is not self.module:
            self._scorer.load_state_dict(self.state.weights())
        self._scorer.eval()

    def train_step(
        self,
        clips: VideoBatch | FeatureBatch | None,
        labels: Tensor,
        quarantined: int,
        lr: float,
        mix: Mix | None = None,
    ) -> None:
        """One optimizer step at rate lr on this rank's part of a global batch.

        `clips` holds the readable videos, or their `features` ([B, ...], B may be 0; None is no video at all), `labels`
        theirs: int64 [B], or [B, C] of 0 and 1. Features cannot be mixed.
        """
        if is_sharded(self.module):
            self.state.share_buffers()  # as DistributedDataParallel does before each step
        num_videos = torch.tensor(float(len(labels)), dtype=torch.float64, device=self.device)
        global_videos = self._exchange(num_videos)
        optimizer = self.state.optimizer
        scaler = self.state.scaler
        set_rate(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        # Where no rank has a readable video the gradient is zero, not 0 / 0.
        scale = self._world_size / global_videos.clamp(min=1.0)
        parts = self._parts(len(labels))
        for number, videos in enumerate(parts, start=1):
            with self._synchronised(number == len(parts)):
                if clips is not None and len(labels[videos]):
                    total = self._train_part(clips, labels, videos, mix)
                else:
                    total = self._forward_nothing()
                scaler.scale(total * scale.to(total.dtype)).backward()  # type: ignore[no-untyped-call]
        if self._optim.clip_norm > 0:
            scaler.unscale_(optimizer)
            trained = [parameter for _, parameter in trained_parameters(self.module)]
            nn.utils.clip_grad_norm_(trained, self._optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if self.state.average is not None:
            self.state.average.update(self.module)
        self._require_recomputed()
        self._pending[1] += quarantined
        self._stepped = True

    def _parts(self, count: int) -> list[slice]:
        """Into which the rank's videos are cut for optim.accumulate; under FSDP, equally many on all ranks."""
        size = max(1, -(-count // self._optim.accumulate))
        number = self._optim.accumulate if is_sharded(self.module) else max(1, -(-count // size))
        return [slice(index * size, (index + 1) * size) for index in range(number)]

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks add up their gradients with the last part only."""
        if is_sharded(self.module):
            self.module.set_requires_gradient_sync(last)
        elif isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return nullcontext()

    def _require_recomputed(self) -> None:
        if self._recomputed is not None and not self._recomputed.ran:
            raise ConfigError(
                f"optim.recompute must be none for {type(self.module).__name__}: its forward calls none of the blocks"
            )

    @torch.no_grad()
    def score(self, clips: VideoBatch | FeatureBatch, labels: Tensor, quarantined: int) -> None:
        """Count the model's predictions on clips; call `eval` first. Ranks may call it unequally often."""
        if len(clips):
            labels = labels.to(self.device, non_blocking=True)
            logits = self._logits(self._scored, self._inputs(clips), len(clips))
            self._count(logits, labels, self._loss(logits, labels))
            if labels.dim() == 2:
                self._answers.append((logits.cpu(), labels.cpu()))
        self._pending[1] += quarantined

    def scored(self) -> tuple[Tensor, Tensor]:
        """Logits and labels, [N, C] each, of what all ranks scored since `reset`; all ranks must call it.

        Of videos that may have several classes; the order depends on the number of ranks.
        """
        parts: list[Any] = [None] * self._world_size
        dist.all_gather_object(parts, self._answers)
        pairs = [pair for part in parts for pair in part]
        if not pairs:
            return torch.zeros(0, self._num_classes), torch.zeros(0, self._num_classes, dtype=torch.uint8)
        return torch.cat([logits for logits, _ in pairs]), torch.cat([found for _, found in pairs])

    def features(self, clips: VideoBatch) -> FeatureBatch:
        """What the frozen backbones make of clips; a step or a score on it is one on the clips, to the last bit.

        Raises:
            ModelError: something in this half of the network is trained.
        """
        tensors = self._features(model_inputs(clips, self._spec, self.device))
        if any(x.requires_grad for x in tensors.values()):
            raise ModelError(
                f"{type(self.module).__name__}.to_features uses weights that are trained; it must be its backbones only"
            )
        return FeatureBatch(tensors)

    def probe(self) -> FeatureBatch:
        """The features of a clip of noise, the same for all replicas."""
        return self.features(self._noise(1))

    def halt(self) -> None:
        """Tell all ranks, with the next training step or `finish`, that this one cannot go on."""
        self._halts.fill_(1.0)

    def halted(self) -> bool:
        """Whether a rank has told that it cannot go on. The same on all ranks."""
        return bool(self._halted.item())

    def totals(self) -> Totals:
        """Totals over all ranks since `reset`, without the last training step (see `finish`). The same on all ranks."""
        videos, quarantined, loss, top1, top5 = self._totals.tolist()
        return Totals(int(videos), int(quarantined), loss, int(top1), int(top5))

    def finish(self) -> Totals:
        """Add up what is pending on all ranks and return the totals; all ranks must call it."""
        self._exchange(torch.zeros((), dtype=torch.float64, device=self.device))
        return self.totals()

    def history(self) -> Tensor:
        """What each training step since `reset` counted over all ranks, without the last (see `finish`).

        float64 [steps, 5] on the CPU: videos, quarantined, sum of losses, top-1 hits, top-5 hits.
        """
        return torch.stack(self._history).cpu() if self._history else torch.zeros(0, 5, dtype=torch.float64)

    def snapshot(self, *, in_epoch: bool, keep: bool = True) -> Snapshot:
        """Copy the state of this rank; in_epoch adds what the epoch has counted so far (call `finish` before).

        All ranks must call it; one that does not keep the state gets an empty one.
        """
        copied = self.state.snapshot(keep=keep)
        if in_epoch and keep:
            copied.train[HISTORY] = self.history()
        return copied

    def resume(self, weights: Mapping[str, Tensor], train: Mapping[str, Tensor], uri: str) -> None:
        """Go on from where `snapshot` was taken, as the checkpoint at uri kept it; all ranks must call it.

        Raises:
            CheckpointMismatch: it is of another network, or of a run with another optim.ema_decay.
            CheckpointCorrupt: the counts of the epoch have another form.
        """
        self.state.load(weights, train, uri)
        self.reset()
        history = train.get(HISTORY)
        if history is None:
            return
        if history.dim() != 2 or history.shape[1] != 5:
            raise CheckpointCorrupt(f"{uri}: {HISTORY} must be [steps, 5], found {list(history.shape)}")
        for numbers in history.to(self.device, torch.float64):
            self._totals += numbers  # one by one, as they were added then: sums in another order differ in last bits
            self._history.append(numbers)

    def reset(self) -> None:
        """Start to count anew."""
        self._pending.zero_()
        self._totals.zero_()
        self._history.clear()
        self._answers.clear()
        self._stepped = False

    def _exchange(self, videos_now: Tensor) -> Tensor:
        """The sum of videos_now over the ranks; what is pending travels with it, to spare a second round."""
        numbers = torch.cat([videos_now.reshape(1), self._pending, self._halts])
        dist.all_reduce(numbers)
        counted = numbers[1:-1]
        self._totals += counted
        if self._stepped:
            self._history.append(counted)
            self._stepped = False
        self._pending.zero_()
        self._halted += numbers[-1:]
        return numbers[0]

    def _train_part(self, clips: VideoBatch | FeatureBatch, labels: Tensor, videos: slice, mix: Mix | None) -> Tensor:
        """Sum of the losses of some of the clips; counts them."""
        part = labels[videos].to(self.device, non_blocking=True)
        mixing: dict[str, Any] = {}
        if isinstance(clips, FeatureBatch) or mix is None:
            inputs = self._inputs(clips.select(videos))
        else:
            mine = mix.part(videos)
            inputs = self._mixed(clips, videos, mine)
            mixing = {"partners": labels[mine.partners].to(self.device, non_blocking=True), "share": mine.share}
        logits = self._logits(self._parallel, inputs, len(part))
        smoothing = self._optim.label_smoothing
        total = self._loss(logits, part, smoothing=smoothing, weights=self._weights, **mixing)
        self._count(logits, part, total)
        return total

    def _loss(self, logits: Tensor, labels: Tensor, **recipe: Any) -> Tensor:
        if labels.dim() == 1:
            return loss_sum(logits, labels, **recipe)
        return multilabel_loss_sum(logits, labels, self._optim.multilabel_loss, **recipe)

    def _inputs(self, clips: VideoBatch | FeatureBatch) -> dict[str, Any]:
        """What `_parallel` and `_scored` are called with."""
        if isinstance(clips, FeatureBatch):
            return clips.to(self.device)
        inputs = model_inputs(clips, self._spec, self.device)
        return self._features(inputs) if self._to_features else inputs

    def _mixed(self, clips: VideoBatch, videos: slice, mix: Mix) -> dict[str, Any]:
        """The same for some of the clips, mixed with others."""
        own = model_inputs(clips.select(videos), self._spec, self.device)
        partners = clips.select(mix.partners.to(clips.device, non_blocking=True))
        inputs = mix_inputs(own, model_inputs(partners, self._spec, self.device), mix)
        return self._features(inputs) if self._to_features else inputs

    def _features(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the backbones make of a model's inputs: clip by clip, and as in scoring, dropout included."""
        assert self._to_features is not None
        count = next(len(x) for x in inputs.values() if x is not None)
        parts = [{name: None if x is None else x[i : i + 1] for name, x in inputs.items()} for i in range(count)]
        is_training = self.module.training
        self.module.eval()
        with self._autocast():
            each = [self._to_features(**part) for part in parts]
        if is_training:
            self.train()
        return {name: torch.cat([one[name].contiguous() for one in each]) for name in each[0]}

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self._optim.precision
        return torch.autocast(self.device.type, dtype=_AUTOCAST[precision], enabled=precision != "fp32")

    @torch.no_grad()
    def _count(self, logits: Tensor, labels: Tensor, total: Tensor) -> None:
        first = logits.topk(min(5, self._num_classes), dim=1).indices
        if labels.dim() == 1:
            hits = first == labels[:, None]
        else:
            hits = labels.gather(1, first) > 0
            hits = hits & (hits.cumsum(dim=1) == 1)  # a video counts once, with the first that it has
        counts = [torch.full_like(total, len(labels)), torch.zeros_like(total), total.detach()]
        self._pending += torch.stack([*counts, hits[:, 0].sum(), hits.sum()]).double()

    def _logits(self, module: nn.Module, inputs: Mapping[str, Any], count: int) -> Tensor:
        with self._autocast():
            logits: Tensor = module(**inputs)
        if logits.shape != (count, self._num_classes):
            expected = [count, self._num_classes]
            raise ModelError(f"{type(self.module).__name__} must return logits {expected}, got {list(logits.shape)}")
        return logits.float()

    def _order_buckets(self) -> None:
        """Have DistributedDataParallel order its buckets, as it does after its first backward pass.

        With more than two ranks their order decides in which order gradients are added up: the first step of a resumed
        run would add in another order than that step did in the run before, and differ in the last bits.
        """
        if self._world_size > 2 and isinstance(self._parallel, DistributedDataParallel):
            self._forward_nothing().backward()  # type: ignore[no-untyped-call]
            self.state.optimizer.zero_grad(set_to_none=True)

    def _forward_nothing(self) -> Tensor:
        """A zero that depends on all parameters, for a rank without a video; leaves BatchNorm's statistics alone."""
        # Not written back: the gradient needs the norms' statistics as they are in the forward pass, and
        # DistributedDataParallel shares all buffers in it.
        momenta = {norm: norm.momentum for norm in batch_norms(self.module)}
        for norm in momenta:
            norm.momentum = 0.0
        statistics = {id(buffer) for norm in momenta for buffer in (norm.running_mean, norm.running_var)}
        others = [buffer for buffer in self.module.buffers() if id(buffer) not in statistics]
        before = [buffer.clone() for buffer in others]
        # Noise, since a norm has no gradient at zero, and 0 * NaN is NaN; BatchNorm refuses a single value a channel.
        zero = self._logits(self._parallel, self._inputs(self._noise(2)), 2).sum() * 0.0
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        with torch.no_grad():
            for buffer, value in zip(others, before, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        return zero

    def _noise(self, count: int) -> VideoBatch:
        """Clips of the same noise each time."""
        sample = self._clip.sample
        size = self._clip.view.crop_px
        shape = (count, sample.num_segments, sample.frames_per_segment)
        noise = torch.Generator().manual_seed(0)
        rgb = torch.randint(0, 256, (*shape, 3, size, size), generator=noise, dtype=torch.uint8)
        flow = None
        if self._spec.flow_channels:
            flow = torch.randint(-127, 128, (*shape, FLOW_CHANNELS, size, size), generator=noise, dtype=torch.int8)
        return VideoBatch(rgb=rgb, flow=flow)
