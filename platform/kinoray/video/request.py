"""What can be asked for: which frames of a video, in which cuts. kinoray.video.frames.decode carries it out.

The frames of a clip, or of the clips that several samplings draw (what a cache keeps for all trials of a sweep); all
views of a video or of its windows; a few to look at. What is easy to break: a request is asked anew where a video turns
out to have fewer frames than its packets promise, and its generator then goes on from where it is.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kinoray.config.scoring import NUM_CROPS, ViewsConfig, WindowsConfig
from kinoray.config.shared import ClipConfig, SampleConfig
from kinoray.errors import UndecodableVideo
from kinoray.video.sample import clip_indices, cut_by_time, cut_windows, dense_reach, segment_indices, window_indices
from kinoray.video.transform import Cut, WholeFrame, crop_views, test_view, train_view

__all__ = ["Choice", "Rate", "Request", "Sampled", "Thumbnails", "Views"]

_WINDOWS_BYTES = 256 * 2**20
_SHORTEST_S = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Frames a second of a video, 0 where nothing says; and their times where they do not come evenly."""

    measured: float
    """Frames by their duration: what windows are cut by, if frames come evenly."""
    claimed: float
    """As the container has it (25, 30000/1001) where that is near what was measured: published samplers count by it,
    and a rate of 24.9999 would give them another frame than 25."""
    times: np.ndarray | None = None
    """float64 [F + 1]: when each frame begins, and when the last one is over, in seconds; None if they come evenly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The frames that a request wants of a video, once it is known how many there are."""

    indices: tuple[np.ndarray, ...]
    windows: np.ndarray
    window_times: np.ndarray
    num_windows: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A clip: middle frames and the centre crop (testing); with a generator random frames, scale, place and flip.

    With `samples` the clips of several samplings, which all begin their draws at the generator's state: each is bit for
    bit the clip that would be decoded alone, as long as the answer is `exact`.
    """

    rng: np.random.Generator | None = None
    """Draws; None for testing."""
    samples: tuple[SampleConfig, ...] = ()
    """Samplings; none: that of the clip's settings."""

    first_window = 0
    mirrored = False

    def settings(self, clip: ClipConfig) -> ClipConfig:
        """The clip's settings, as this request sees them."""
        return clip

    def reach(self, clip: ClipConfig) -> float:
        """Share of the frames that is passed for certain before the last wanted one."""
        drawn = self.rng is not None
        return max(_reach(sample, drawn=drawn) for sample in self.samples or (clip.sample,))

    def choose(self, num_frames: int, rate: Rate, clip: ClipConfig) -> Choice:
        """Which frames of so many."""
        state = self.rng.bit_generator.state if self.rng is not None else {}
        indices = []
        for sample in self.samples or (clip.sample,):
            if self.rng is not None:
                self.rng.bit_generator.state = state
            indices.append(clip_indices(num_frames, rate.claimed, sample, self.rng)[None])
        windows, times = _cut(num_frames, rate, None)
        return Choice(indices=tuple(indices), windows=windows, window_times=times)

    def cuts(self, clip: ClipConfig, width: int, height: int) -> Sequence[Cut]:
        """Which parts of a frame that is shown as width x height."""
        if self.rng is None:
            return [test_view(clip.view, width, height)]
        return [train_view(clip.view, width, height, self.rng)]

    def shapes(self, clip: ClipConfig) -> list[tuple[int, int, int]]:
        """(V, S, T) of each sampling; V is that of one window."""
        return [(1, sample.num_segments, sample.frames_per_segment) for sample in self.samples or (clip.sample,)]

    def num_cuts(self) -> int:
        """Cuts of each frame, without the mirrored ones."""
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """All views of a video, or of its windows from `first_window` on: as many windows as fit into 256 MiB.

    Each view is what Sampled gives for its frames and its cut, flow included, which is estimated on the cut.
    """

    views: ViewsConfig = field(default_factory=ViewsConfig)
    first_window: int = 0
    shots: tuple[int, ...] | None = None
    """The first frames of the video's shots, from the second one on (kinoray.video.shots), if views.windows.at_cuts."""

    def __post_init__(self) -> None:
        windows = self.views.windows
        assert (self.shots is not None) == (windows is not None and windows.at_cuts), "shots, if and only if at_cuts"

    @property
    def mirrored(self) -> bool:
        """Whether each cut is seen mirrored as well."""
        return self.views.crops == "ten"

    def settings(self, clip: ClipConfig) -> ClipConfig:
        """See Sampled."""
        return clip

    def reach(self, clip: ClipConfig) -> float:
        """See Sampled."""
        if self.views.windows is not None:
            return 0.0
        return _reach(clip.sample, self.views.temporal, placed=self.views.placed)

    def choose(self, num_frames: int, rate: Rate, clip: ClipConfig) -> Choice:
        """See Sampled."""
        every, times = _cut(num_frames, rate, self.views.windows, self.shots or ())
        if self.first_window >= len(every):
            raise UndecodableVideo(
                f"window {self.first_window} is gone: {num_frames} frames, fewer than before, make {len(every)} windows"
            )
        frames_a_window = clip.sample.num_frames * self.views.num_views
        at_once = max(1, _WINDOWS_BYTES // (frames_a_window * clip.frame_bytes))
        here = slice(self.first_window, self.first_window + at_once)
        rates = np.full(len(every), rate.claimed)
        if rate.times is not None and len(every) > 1:  # each is a video of its own
            lengths_s = np.diff(times)[:, 0]  # a shot may have frames that all begin at once
            rates = np.where(lengths_s > 0, np.diff(every)[:, 0] / np.maximum(lengths_s, _SHORTEST_S), rate.claimed)
        indices = window_indices(every[here], rates[here].tolist(), clip.sample, self.views)
        return Choice(indices=(indices,), windows=every[here], window_times=times[here], num_windows=len(every))

    def cuts(self, clip: ClipConfig, width: int, height: int) -> Sequence[Cut]:
        """See Sampled."""
        return crop_views(clip.view, width, height, self.views.crops)[: self.num_cuts()]

    def shapes(self, clip: ClipConfig) -> list[tuple[int, int, int]]:
        """See Sampled."""
        return [(self.views.temporal, clip.sample.num_segments, clip.sample.frames_per_segment)]

    def num_cuts(self) -> int:
        """See Sampled."""
        return NUM_CROPS[self.views.crops] // (1 + self.mirrored)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnails:
    """Evenly spaced whole frames, for people to look at: `height` pixels tall, the first one's aspect kept."""

    num_frames: int
    height: int

    first_window = 0
    mirrored = False

    def settings(self, clip: ClipConfig) -> ClipConfig:
        """See Sampled."""
        sample = SampleConfig(num_segments=self.num_frames, frames_per_segment=1)
        view = replace(clip.view, interpolation="direct", antialias=True)
        return replace(clip.without_flow(), sample=sample, view=view)

    def reach(self, clip: ClipConfig) -> float:
        """See Sampled."""
        return _reach(clip.sample)

    def choose(self, num_frames: int, rate: Rate, clip: ClipConfig) -> Choice:
        """See Sampled."""
        windows, times = _cut(num_frames, rate, None)
        indices = segment_indices(num_frames, clip.sample)[None]
        return Choice(indices=(indices,), windows=windows, window_times=times)

    def cuts(self, clip: ClipConfig, width: int, height: int) -> Sequence[Cut]:
        """See Sampled."""
        return [WholeFrame(height=self.height, width=max(1, round(width * self.height / height)))]

    def shapes(self, clip: ClipConfig) -> list[tuple[int, int, int]]:
        """See Sampled."""
        return [(1, self.num_frames, 1)]

    def num_cuts(self) -> int:
        """See Sampled."""
        return 1


Request = Sampled | Views | Thumbnails


def _cut(
    num_frames: int, rate: Rate, config: WindowsConfig | None, shots: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """All windows, shot by shot: int64 [W, 2], frames; float64 [W, 2], seconds."""
    windows, times = [], []
    for first, stop in itertools.pairwise([0, *(first for first in shots if first < num_frames), num_frames]):
        if rate.times is not None and config is not None:
            begin_s = rate.times[first]
            frames, seconds = cut_by_time(rate.times[first : stop + 1] - begin_s, config)
            times.append(begin_s + seconds)
        else:
            frames = cut_windows(stop - first, rate.measured, config)
            times.append((first + frames) / (rate.measured or 1.0))
        windows.append(first + frames)
    return np.concatenate(windows), np.concatenate(times)


def _reach(sample: SampleConfig, num_views: int = 1, *, placed: bool = False, drawn: bool = False) -> float:
    """Share of the frames before the last slot, whose frame is wanted whichever it is; see dense_reach."""
    if sample.is_dense:
        return dense_reach(num_views, placed=placed, drawn=drawn)
    return 1 - 1 / (sample.num_frames * num_views)
