"""How videos are scored: the settings that label, evaluate, calibrate and bench share, and the protocols by name.

A protocol says which views of a video are scored. A view is what the network is fed once: S segments x T frames of one
square crop. What is easy to break: a protocol changes where views lie and never how a frame is resized, so that the
network sees what it was trained on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import tyro

from kinoray.config.shared import (
    AllowedFactories,
    ClipConfig,
    DecodeConfig,
    InferenceConfig,
    JobConfig,
    ResourcesConfig,
    require,
)
from kinoray.errors import check_fraction

__all__ = [
    "CPU_BATCH",
    "NUM_CROPS",
    "PROTOCOLS",
    "Crops",
    "EarlyExit",
    "LabelWorkConfig",
    "Prompts",
    "Protocol",
    "ScoreKind",
    "ScorerConfig",
    "ScoringConfig",
    "SegmentConsensus",
    "ViewAverage",
    "ViewsConfig",
    "WindowsConfig",
    "protocol_named",
    "rows_a_unit",
    "shared_settings",
]

Prompts = tyro.conf.UseAppendAction[tuple[str, ...]]
"""Sentences with {} for the name of a class, as often as it is given."""
Crops = Literal["center", "three", "ten"]
ScoreKind = Literal["softmax", "sigmoid"]
ViewAverage = Literal["probs", "logits"]
SegmentConsensus = Literal["logits", "probs"]
"""What a network averages over its segments; those of which `segment_consensus` says so run on any part of them."""

CPU_BATCH = 1
"""Clips a forward pass on a CPU: no more, or its digits would depend on who is beside it, and where."""
NUM_CROPS: Mapping[Crops, int] = {"center": 1, "three": 3, "ten": 10}
"""Crops of one frame: the centre; three along the longer side; four corners and the centre, each also mirrored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowsConfig:
    """How long videos are cut; part of a result's digest."""

    length_s: float
    """Videos that are longer than this, in seconds, are cut into windows of this length."""
    stride_s: float
    """Seconds from the start of one window to the start of the next."""
    at_cuts: bool = False
    """Whether each shot is cut into windows by itself."""

    def __post_init__(self) -> None:
        require(self.length_s > 0, "window_s", "greater than 0", self.length_s)
        fits = 0 < self.stride_s <= self.length_s
        require(fits, "window_stride_s", f"greater than 0 and at most window_s ({self.length_s:g})", self.stride_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """Which views of a video are scored; part of a result's digest."""

    temporal: int = 1
    """Clips along time: of spread clips interleaved samplings of the whole video (kinoray.video.sample.view_indices),
    of dense clips so many stretches of it (kinoray.video.sample)."""
    placed: bool = False
    """Whether a single dense clip lies where its sampler puts one, and not in the middle."""
    crops: Crops = "center"
    """Crops of each frame (kinoray.video.transform.crop_views)."""
    average: ViewAverage = "probs"
    """What is averaged over the views: probabilities, or logits before the softmax."""
    windows: WindowsConfig | None = None
    """Long videos in windows, each with all of these views; None: a video is one window, however long."""

    def __post_init__(self) -> None:
        require(self.temporal >= 1, "views.temporal", "at least 1", self.temporal)

    @property
    def num_views(self) -> int:
        """How often the network runs for one video (for each window of it)."""
        return self.temporal * NUM_CROPS[self.crops]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What a name stands for; None: as in training."""

    num_segments: int | None = None
    """S of each view."""
    frames_per_segment: int | None = None
    """T of each view."""
    temporal: int = 1
    """Temporal views."""
    placed: bool = False
    """Of a single dense clip: see ViewsConfig."""
    crops: Crops = "center"
    """Spatial views."""

    def clip(self, trained: ClipConfig) -> ClipConfig:
        """What each view holds, for a network that was trained on `trained`."""
        sample = replace(
            trained.sample,
            num_segments=self.num_segments or trained.sample.num_segments,
            frames_per_segment=self.frames_per_segment or trained.sample.frames_per_segment,
        )
        return replace(trained, sample=sample)

    def views(self, average: ViewAverage, windows: WindowsConfig | None = None) -> ViewsConfig:
        """Where the views lie, and how they are averaged."""
        return ViewsConfig(
            temporal=self.temporal, placed=self.placed, crops=self.crops, average=average, windows=windows
        )


PROTOCOLS: Mapping[str, Protocol] = {
    "center": Protocol(),
    "8x6": Protocol(num_segments=8, frames_per_segment=6),
    "16x6": Protocol(num_segments=16, frames_per_segment=6),
    "25x10": Protocol(num_segments=25, crops="ten"),
}
"""Names with a meaning of their own; docs/protocols.md says where they come from."""

_CROPS_OF: Mapping[str, Crops] = {str(number): crops for crops, number in NUM_CROPS.items()}
_CLIPS_BY_CROPS = re.compile(r"([1-9][0-9]{0,2})x(1|3|10)", re.ASCII)


_UNIT_ROWS = 64
_UNITS_A_WORKER = 4
_MOST_UNITS = 2**16  # of a library: each is an object in the store, and takes memory of the driver


def rows_a_unit(num_rows: int, num_workers: int, least: int) -> int:
    """Videos a unit that a labelling of so many by so many workers has, unless it is told another number."""
    share = -(-num_rows // (_UNITS_A_WORKER * num_workers))
    size = min(_UNIT_ROWS, max(share, least, 1))
    while num_rows > size * _MOST_UNITS:
        size *= 2
    return size


def protocol_named(name: str) -> Protocol:
    """A name of PROTOCOLS, or KxC: K temporal clips, each in C crops.

    Raises:
        ConfigError: it is neither.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    found = _CLIPS_BY_CROPS.fullmatch(name)
    expected = f"{', '.join(PROTOCOLS)}, or CLIPSxCROPS with 1, 3 or 10 crops, such as 10x3"
    require(found is not None, "protocol", expected, name)
    assert found is not None
    temporal = int(found[1])
    return Protocol(temporal=temporal, placed=temporal == 1, crops=_CROPS_OF[found[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig(JobConfig):
    """What every verb asks that runs a checkpoint on videos; the verb's own settings build upon it."""

    checkpoint: str
    """A checkpoint, or a run folder (its best checkpoint); or a published network as `kinoray import` lists them, such
    as torchvision:mvit_v2_s or i3d, which is imported once into your cache."""
    classes: str = ""
    """Text file of classes in words, one a line, as `name` or `name: text`, for a checkpoint hf:... of a network that
    compares pictures with texts (CLIP, SigLIP, X-CLIP)."""
    prompts: Prompts = ()
    """A sentence with {} for the name of a class, instead of the usual ones (docs/models.md). May be given several
    times: the mean of what all say stands for the class."""
    allow_factory: AllowedFactories = ()
    """PACKAGE:FUNCTION of a network of your own that the checkpoint names: its code runs here with your rights. Without
    it only networks that ship with kinoray are built. May be given several times."""
    protocol: str = "center"
    """Views of each video. center: one, the middle frames and centre crop, segments and frames as in training. KxC,
    such as 1x1, 5x1, 4x3, 10x3: K clips along time x C crops; C is 1 (centre), 3 (left, centre, right along the longer
    side) or 10 (corners and centre, and their mirror images). Three names mean something else, as in their papers: 8x6,
    16x6 are 8 or 16 segments x 6 frames in one view, 25x10 is 25 segments in 10 crops."""
    view_average: ViewAverage = "probs"
    """What is averaged over the views: probabilities, or logits."""
    num_segments: int | None = None
    """Segments of each view. Default: as in training, or what the protocol names."""
    batch_size: int = 8
    """Clips a forward pass on a GPU; a video is one clip for each view. 0: as many as its memory holds, found by the
    first worker and kept for the labelling. On CPUs each clip is run by itself: its digits depend on no other then."""
    unit_size: int = 0
    """Videos a unit of work: what is committed at once, and what at most is done again after a kill. Default: 64, and
    less in a small library, so that each worker gets four units."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """What a video may cost, and what decodes it; never taken from the checkpoint."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How the network runs."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Workers."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        require(self.num_segments is None or self.num_segments >= 1, "num_segments", "at least 1", self.num_segments)
        protocol = protocol_named(self.protocol)
        if self.num_segments is not None and protocol.num_segments is not None:
            wanted = f"left out with protocol {self.protocol}, which names it"
            require(False, "num_segments", wanted, self.num_segments)
        require(self.batch_size >= 0, "batch_size", "at least 0", self.batch_size)
        fits = self.decode.device == "cpu" or self.resources.gpus_per_worker > 0
        require(fits, "decode.device", "cpu without resources.gpus_per_worker", self.decode.device)
        require(self.unit_size >= 0, "unit_size", "at least 0", self.unit_size)

    def rows_a_unit(self, num_rows: int) -> int:
        """Videos a unit of a library of so many. On GPUs a unit fills a batch."""
        if self.unit_size:
            return self.unit_size
        least = self.batch_size if self.resources.gpus_per_worker else 1
        return rows_a_unit(num_rows, self.resources.num_workers, least)

    @property
    def has_one_view(self) -> bool:
        """Whether each video is one clip."""
        return protocol_named(self.protocol).views(self.view_average).num_views == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelWorkConfig(ScoringConfig):
    """What makes a labelling more work, or less: what `label` asks besides, and `bench` measures."""

    window_s: float = 0.0
    """Videos longer than this many seconds are cut into windows of this length. Each window is labelled (`kinoray
    labels --windows`), and the video's row is the mean over its windows. Default: a video is one clip."""
    window_stride_s: float = 0.0
    """Seconds from one window's start to the next one's. Default: window_s, so that they touch."""
    window_at_cuts: bool = False
    """Each shot of a video has windows of its own, or is one if it is shorter: no window goes across a cut. Cuts are
    found by an extra look at the frames (docs/answers.md)."""
    early_exit: Literal["off", "exact", "margin"] = "off"
    """Look at a video's segments one after the other and stop early. exact: when the others cannot change its top-1
    (networks with consensus=probs; scores are those of the segments seen). margin: when the lead reaches a margin
    that the calibration found to change at most max_changed of the labels."""
    calibration: str = ""
    """calibration.json of `kinoray calibrate`, made with this checkpoint: its temperature, and the margins of
    early_exit."""
    max_changed: float = 0.001
    """Share of videos that early_exit=margin may give another top-1."""
    embeddings: bool = False
    """Store what goes into the network's classifiers (column `embedding`, float16)."""

    def __post_init__(self) -> None:
        ScoringConfig.__post_init__(self)
        for name in ("window_s", "window_stride_s"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        stride_s = self.window_stride_s
        require(not stride_s or stride_s <= self.window_s, "window_stride_s", f"at most {self.window_s:g}", stride_s)
        fits = self.window_s > 0 or not self.window_at_cuts
        require(fits, "window_at_cuts", "off without window_s", self.window_at_cuts)
        check_fraction("max_changed", self.max_changed)
        if self.early_exit == "margin":
            wanted = "calibration.json of kinoray calibrate with early_exit margin"
            require(bool(self.calibration), "calibration", wanted, self.calibration)
        if self.early_exit != "off":
            self.require_whole_videos("early_exit")

    def require_whole_videos(self, name: str) -> None:
        """Refuse a setting that needs each video to be one clip."""
        wanted = "off with window_s or a protocol of several views"
        require(self.has_one_view and not self.window_s, name, wanted, getattr(self, name))

    @property
    def windows(self) -> WindowsConfig | None:
        """How long videos are cut."""
        if not self.window_s:
            return None
        stride_s = self.window_stride_s or self.window_s
        return WindowsConfig(length_s=self.window_s, stride_s=stride_s, at_cuts=self.window_at_cuts)


def shared_settings(config: ScoringConfig, part: type[ScoringConfig]) -> dict[str, Any]:
    """The settings of `part`, upon which the config's class builds, by name: for another class that builds upon it."""
    return {item.name: getattr(config, item.name) for item in fields(part)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyExit:
    """When a video may stop; part of a result's digest."""

    margin: float | None = None
    """Lead of the running answer's first probability above its second from which it counts as settled. None: only what
    cannot change any more stops (exactly the full pass's top-1)."""

    def __post_init__(self) -> None:
        require(self.margin is None or 0 <= self.margin <= 1, "margin", "in 0 .. 1", self.margin)

    def stages(self, num_segments: int) -> list[int]:
        """Segments that have been seen at the end of each stage, rising, the last one all of them.

        No lead can exceed the rest before more than half are seen; a margin is asked for from the second one on.
        """
        first = num_segments // 2 + 1 if self.margin is None else min(2, num_segments)
        return list(range(min(first, num_segments), num_segments + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """What is run, and what is kept of it."""

    batch_size: int = 8
    """Clips a forward pass: 1 in a job on CPUs; 0 for what the first worker finds (kinoray.network.forward)."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """Precision and compiling."""
    embeddings: bool = False
    """Keep what goes into the classifiers."""
    segment_logits: bool = False
    """Keep the answer of each segment."""
    early_exit: EarlyExit | None = None
    """Segments in nested order until a clip is settled; None: all at once."""
