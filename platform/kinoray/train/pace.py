"""How a training run gets on, as lines to read: every few seconds inside an epoch, and one after it."""

import math
import time
from collections.abc import Mapping

from kinoray.config.shared import OptimConfig
from kinoray.console import format_duration
from kinoray.train.step import Replica

__all__ = ["Pace", "epoch_line"]

_PROGRESS_S = 5.0


class Pace:
    """Measures from its making on, at `first_step` of epochs of `num_steps` each."""

    def __init__(self, optim: OptimConfig, num_steps: int, first_step: int) -> None:
        self._optim, self._num_steps, self._first_step = optim, optim.epochs * num_steps, first_step
        self._start_s = self._said_s = time.monotonic()

    def line(self, replica: Replica, epoch: int, step: int) -> str:
        """What to say after so many steps in all; empty where it was said just now."""
        now = time.monotonic()
        if now - self._said_s < _PROGRESS_S:
            return ""
        self._said_s = now
        totals = replica.totals()
        done = step - self._first_step
        left_s = (now - self._start_s) / done * (self._num_steps - step)  # evaluations so far are in it
        rate = done * self._optim.batch_size / (now - self._start_s)
        parts = [f"train: epoch {epoch}/{self._optim.epochs}, step {step}/{self._num_steps}"]
        parts += [f"loss {totals.loss:.3f}"] if totals.videos else []
        parts += [f"{rate:.1f} videos/s", f"{format_duration(left_s)} left"]
        parts += [f"unreadable {totals.unreadable}"] if totals.unreadable else []
        return ", ".join(parts)


def epoch_line(row: Mapping[str, float | int], epochs: int) -> str:
    """An epoch's row of metrics.jsonl as a sentence."""
    nan = math.nan
    parts = [f"train: epoch {row['epoch']}/{epochs} done in {format_duration(row['epoch_s'])}"]
    parts.append(f"loss {row.get('loss', nan):.3f}, top-1 {row.get('top1', nan):.3f}")
    if "val_videos" in row:
        numbers = f"loss {row.get('val_loss', nan):.3f}, top-1 {row.get('val_top1', nan):.3f}"
        parts.append(f"val {numbers}, top-5 {row.get('val_top5', nan):.3f} ({row['val_videos']} videos)")
    parts.append(f"{row['videos_per_s']:.1f} videos/s, {row['decode_wait']:.0%} of it waiting for decoders")
    if bad := int(row["unreadable"] + row.get("val_unreadable", 0)):
        parts.append(f"unreadable {bad}")
    return "; ".join(parts)
