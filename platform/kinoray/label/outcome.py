"""What becomes of one video of a unit, from its clips' answers to its row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kinoray.errors import AccessDenied, BucketNotFound, KinorayError
from kinoray.network.scorer import ClipAnswer
from kinoray.video.views import ViewClips

__all__ = ["Outcome", "Place", "Window", "extras", "keep", "refuse_if_none_readable", "stack"]


@dataclass(slots=True)
class Window:
    """One window of a video: the answers for its views, in the end one."""

    begin_s: float
    end_s: float
    views: list[ClipAnswer] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What became of one video: an error, or windows with views whose logits become a score."""

    error: KinorayError | None = None
    windows: list[Window] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    window_answers: list[dict[str, Any]] = field(default_factory=list)
    frames_decoded: int = 0
    frames_corrupt: int = 0
    frames_missing: int = 0

    @property
    def answers(self) -> list[ClipAnswer]:
        """Of all views of all windows."""
        return [view for window in self.windows for view in window.views]

    def add(self, part: ViewClips) -> None:
        """Make room for the windows of a part, and count its frames."""
        self.frames_decoded += part.frames_decoded
        self.frames_corrupt += part.frames_corrupt
        self.frames_missing = part.info.frames_missing
        rate = part.info.fps or 1.0
        self.windows += [Window(begin / rate, end / rate) for begin, end in part.windows.tolist()]


class Place(NamedTuple):
    """Where a clip's answer belongs."""

    outcome: Outcome
    window: int


def keep(answers: Iterable[tuple[Place, ClipAnswer]]) -> None:
    """Put each answer where it belongs."""
    for place, answer in answers:
        place.outcome.windows[place.window].views.append(answer)


def stack(views: Sequence[ClipAnswer]) -> np.ndarray:
    """Their logits, float64 [V, C]."""
    return np.stack([view.logits for view in views])


def extras(views: Sequence[ClipAnswer]) -> dict[str, Any]:
    """Embedding (mean over the views) and segment logits (of the only view), where they were kept."""
    kept: dict[str, Any] = {}
    vectors = [view.embedding for view in views if view.embedding is not None]
    if vectors:
        kept["embedding"] = np.mean(vectors, axis=0, dtype=np.float64).astype(np.float16)
    if views[0].segment_logits is not None:
        kept["segment_logits"] = views[0].segment_logits.reshape(-1)
    return kept


def refuse_if_none_readable(outcomes: Sequence[Outcome]) -> None:
    """One forbidden object is a quarantine row; a unit of nothing else means that the job cannot read its input."""
    kinds = {type(outcome.error) for outcome in outcomes}
    if len(outcomes) > 1 and len(kinds) == 1 and (kind := kinds.pop()) in (AccessDenied, BucketNotFound):
        raise kind(
            f"none of the {len(outcomes)} videos of a unit may be read, so nothing was quarantined; the first: "
            f"{outcomes[0].error}; check credentials and buckets, or leave these videos out of the source"
        )
