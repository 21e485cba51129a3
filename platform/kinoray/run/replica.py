"""One rank's copy of the model: training steps whose gradient is exactly that of the global batch, and exact totals.

The loss of a rank is the sum over its readable videos times world size / readable videos of the global batch: the mean
that DistributedDataParallel takes over the ranks is then the mean over the global batch, however it is divided. Easy to
break: every rank must make the same calls in the same order, also one that has no readable video.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kinoray.batch import FLOW_CHANNELS, VideoBatch, model_inputs
from kinoray.config import ClipConfig, OptimConfig
from kinoray.errors import ModelError
from kinoray.model import VideoModel
from kinoray.run.recipe import make_optimizer

__all__ = ["Replica", "Totals"]


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over all ranks; means are NaN where nothing was counted."""

    videos: int
    """Videos that went through the model."""
    unreadable: int
    """Videos that could not be decoded."""
    loss_sum: float
    """Sum of their cross entropies."""
    top1_hits: int
    """Videos whose label came first."""
    top5_hits: int
    """Videos whose label was among the first 5."""

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return self.loss_sum / self.videos if self.videos else math.nan

    @property
    def top1(self) -> float:
        """Share with the label first."""
        return self.top1_hits / self.videos if self.videos else math.nan

    @property
    def top5(self) -> float:
        """Share with the label among the first 5."""
        return self.top5_hits / self.videos if self.videos else math.nan


class Replica:
    """The model and its optimizer on this rank's device. Needs an initialised process group, also for one rank.

    All ranks must start from equal weights and make a Replica together.
    """

    def __init__(
        self, model: VideoModel, num_classes: int, clip: ClipConfig, optim: OptimConfig, device: torch.device
    ) -> None:
        self.module = cast(nn.Module, model).to(device)
        self.optimizer = make_optimizer(self.module, optim)
        self._spec, self._num_classes = model.input_spec, num_classes
        self._clip, self._optim, self.device = clip, optim, device
        self._world_size = dist.get_world_size()
        self._parallel = DistributedDataParallel(self.module) if self._world_size > 1 else self.module
        # Per step: videos, unreadable, loss, top-1 and top-5 hits; pending ones are this rank's, not yet added up.
        self._pending = torch.zeros(5, dtype=torch.float64, device=device)
        self._totals = torch.zeros(5, dtype=torch.float64, device=device)
        self._history: list[Tensor] = []  # of training steps, over all ranks
        self._stepped = False  # whether what is pending is a training step's

    def train_step(self, clips: VideoBatch | None, labels: Tensor, unreadable: int, lr: float) -> None:
        """One optimizer step at rate lr on this rank's part of a global batch.

        `clips` holds the readable videos ([B, ...], B may be 0; None is no video at all), `labels` int64 [B] theirs.
        """
        num_videos = torch.tensor(float(len(labels)), dtype=torch.float64, device=self.device)
        global_videos = self._exchange(num_videos)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        if clips is not None and len(clips):
            loss_sum = self._forward(self._parallel, clips, labels)
        else:
            loss_sum = self._forward_nothing()
        # Where no rank has a readable video the gradient is zero, not 0 / 0.
        loss = loss_sum * (self._world_size / global_videos.clamp(min=1.0)).to(loss_sum.dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._optim.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._optim.clip_norm)
        self.optimizer.step()
        self._pending[1] += unreadable
        self._stepped = True

    @torch.no_grad()
    def score(self, clips: VideoBatch, labels: Tensor, unreadable: int) -> None:
        """Count the model's predictions on clips; call `module.eval()` first. Ranks may call it unequally often."""
        if len(clips):
            self._forward(self.module, clips, labels)
        self._pending[1] += unreadable

    def totals(self) -> Totals:
        """Totals over all ranks since `reset`, without the last training step (see `finish`). The same on all ranks."""
        videos, unreadable, loss, top1, top5 = self._totals.tolist()
        return Totals(int(videos), int(unreadable), loss, int(top1), int(top5))

    def finish(self) -> Totals:
        """Add up what is pending on all ranks and return the totals; all ranks must call it."""
        self._exchange(torch.zeros((), dtype=torch.float64, device=self.device))
        return self.totals()

    def history(self) -> Tensor:
        """What each training step since `reset` counted over all ranks, without the last (see `finish`).

        float64 [steps, 5] on the CPU: videos, unreadable, sum of cross entropies, top-1 hits, top-5 hits.
        """
        return torch.stack(self._history).cpu() if self._history else torch.zeros(0, 5, dtype=torch.float64)

    def restore(self, history: Tensor) -> None:
        """Count on from where `history` was taken."""
        self.reset()
        for numbers in history.to(self.device, torch.float64):
            self._totals += numbers  # one by one, as they were added then: sums in another order differ in last bits
            self._history.append(numbers)

    def reset(self) -> None:
        """Start to count anew."""
        self._pending.zero_()
        self._totals.zero_()
        self._history.clear()
        self._stepped = False

    def share_buffers(self) -> None:
        """Give all ranks the buffers (BatchNorm's statistics) of rank 0, whose they are in a checkpoint."""
        if self._world_size > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)

    def _exchange(self, videos_now: Tensor) -> Tensor:
        """The sum of videos_now over the ranks; what is pending travels with it, to spare a second round."""
        numbers = torch.cat([videos_now.reshape(1), self._pending])
        dist.all_reduce(numbers)
        self._totals += numbers[1:]
        if self._stepped:
            self._history.append(numbers[1:])
            self._stepped = False
        self._pending.zero_()
        return numbers[0]

    def _forward(self, module: nn.Module, clips: VideoBatch, labels: Tensor) -> Tensor:
        """Sum of the cross entropies of the clips; counts them."""
        labels = labels.to(self.device, non_blocking=True)
        logits = self._logits(module, clips)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            hits = logits.topk(min(5, self._num_classes), dim=1).indices == labels[:, None]
            counts = [torch.full_like(loss_sum, len(labels)), torch.zeros_like(loss_sum), loss_sum.detach()]
            self._pending += torch.stack([*counts, hits[:, 0].sum(), hits.sum()]).double()
        return loss_sum

    def _logits(self, module: nn.Module, clips: VideoBatch) -> Tensor:
        inputs = model_inputs(clips, self._spec, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._optim.precision == "bf16"):
            logits: Tensor = module(**inputs)
        if logits.shape != (len(clips), self._num_classes):
            expected = [len(clips), self._num_classes]
            raise ModelError(f"{type(self.module).__name__} must return logits {expected}, got {list(logits.shape)}")
        return logits.float()

    def _forward_nothing(self) -> Tensor:
        """A zero that depends on all parameters, for a rank without a video; leaves BatchNorm's statistics alone."""
        before = [buffer.clone() for buffer in self.module.buffers()]
        sample, size = self._clip.sample, self._clip.view.crop_px
        shape = (2, sample.num_segments, sample.frames_per_segment)  # BatchNorm refuses a single value a channel
        # Noise, since a norm has no gradient at zero, and 0 * NaN is NaN.
        noise = torch.Generator().manual_seed(0)
        rgb = torch.randint(0, 256, (*shape, 3, size, size), generator=noise, dtype=torch.uint8)
        flow = None
        if self._spec.flow_channels:
            flow = torch.randint(-127, 128, (*shape, FLOW_CHANNELS, size, size), generator=noise, dtype=torch.int8)
        zero = self._logits(self._parallel, VideoBatch(rgb=rgb, flow=flow)).sum() * 0.0
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(value)
        return zero
