"""The settings that decide the numbers a model is fed from a video: frames, decoding, views, flow."""

from dataclasses import dataclass, field, replace
from typing import Literal

from kinoray.errors import require

__all__ = [
    "MAX_STRIDE",
    "ClipConfig",
    "DecodeConfig",
    "DecodeLimits",
    "FlowConfig",
    "Interpolation",
    "Placement",
    "SampleConfig",
    "Short",
    "ViewConfig",
    "said_limit",
]

Backend = Literal["pyav", "decord", "torchcodec"]
Placement = Literal["mmaction2", "slowfast", "torchvision", "even"]
Short = Literal["loop", "repeat_last"]
Interpolation = Literal["direct", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

MAX_STRIDE = 1000
_MAX_FPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which frames of a video the model sees.

    Spread over the whole video (stride 0): num_segments x frames_per_segment equal slots, one frame each; testing takes
    the middle of each slot, training a random frame of it. Dense (stride 1 and more): as many frames from one stretch
    of the video, which lies in its middle, where a protocol says, or in training anywhere.
    """

    num_segments: int = 8
    """Equal parts the video is cut into (n in the paper, section 4.1: 8 or 16)."""
    frames_per_segment: int = 6
    """Frames taken evenly from each segment (T in the paper: 6)."""
    stride: int = 0
    """Frames of the video from one frame of a dense clip to the next; 0: the clip is spread over the whole video."""
    fps: float = 0.0
    """Frame rate to which the video is brought before stride counts its frames, so that 25, 30 and 60 fps show the same
    motion; 0: the video's own. Dense clips only."""
    placement: Placement = "mmaction2"
    """Whose arithmetic dense clips follow, frame by frame: MMAction2's SampleFrames, PySlowFast's or torchvision's
    (docs/protocols.md has the formulas). They differ in where several clips lie, and by a frame here and there. `even`:
    MMAction2's, but fps only chooses the nearest whole stride, so that frames are equally far apart."""
    short: Short = "loop"
    """A video that is shorter than a dense clip is seen again from its start, or its last frame is repeated."""

    def __post_init__(self) -> None:
        require(self.num_segments >= 1, "sample.num_segments", "at least 1", self.num_segments)
        require(self.frames_per_segment >= 1, "sample.frames_per_segment", "at least 1", self.frames_per_segment)
        require(0 <= self.stride <= MAX_STRIDE, "sample.stride", f"in 0 .. {MAX_STRIDE}", self.stride)
        require(0 <= self.fps <= _MAX_FPS, "sample.fps", f"in 0 .. {_MAX_FPS}", self.fps)
        require(self.is_dense or not self.fps, "sample.fps", "0 with sample.stride 0", self.fps)

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.num_segments * self.frames_per_segment

    @property
    def is_dense(self) -> bool:
        """Whether a clip is one stretch of the video."""
        return self.stride > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one video may cost; one that asks for more is quarantined. Always the user's, never a checkpoint's."""

    max_pixels: int = 2**25
    """Largest frame, in pixels; larger videos are quarantined after the probe."""
    max_duration_s: float = 4 * 3600.0
    """Longest video, in seconds."""
    max_bytes: int = 2**31
    """Largest encoded video, in bytes."""
    max_frames: int = 60_000
    """Most frames that one video may make the decoder decode."""
    max_memory_mb: int = 2048
    """Address space, in MiB, that a decoder process may take for one video beside the file itself."""
    deadline_s: float = 120.0
    """Seconds after which a decoder process that gives no answer is replaced (60,000 frames of 1280 x 720: 115 s)."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_duration_s", "max_bytes", "max_frames", "max_memory_mb", "deadline_s"):
            require(getattr(self, name) > 0, f"decode.{name}", "greater than 0", getattr(self, name))


def said_limit(name: str, value: float) -> str:
    """For an error: `decode.max_frames = 60,000`, and the flag that sets it."""
    flag = f"decode.{name.replace('_', '-')}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return f"decode.{name} = {number} (--{flag}; in train, tune and doctor --clip.{flag})"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig(DecodeLimits):
    """How bytes become frames. Back ends differ by 1-2 grey levels, so the choice is part of the digest."""

    backend: Backend = "pyav"
    """`pyav` decodes only what the wanted frames need; the others are there for comparison (docs/decoders.md)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: the GPU's own decoder (NVDEC) through torchcodec, in the process that runs the model and so without the
    sandbox's walls: for videos that one trusts (docs/decoders.md). What it does not take goes to backend pyav."""

    def __post_init__(self) -> None:
        DecodeLimits.__post_init__(self)  # super() does not work in a dataclass with slots
        fits = self.device == "cpu" or self.backend == "pyav"
        require(fits, "decode.device", f"cpu with decode.backend {self.backend}", self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Which part of each frame the model sees. Testing: the centre crop; training: random scale, place and flip."""

    resize: Literal["stretch", "short_side"] = "stretch"
    """`stretch` to resize_px x resize_px, aspect not kept (the paper's words), or scale the short side to it."""
    resize_px: int = 256
    """Side of the resized frame, in pixels (paper: 256)."""
    resize_width_px: int = 0
    """Width of a stretched frame where it is not its height, resize_px (torchvision's R(2+1)D: 171 beside 128)."""
    interpolation: Interpolation = "direct"
    """`direct`: from the decoder's own planes to the scaled RGB in one step, bilinear and antialiased. The others:
    first to RGB as large as the video, then by this filter, as Pillow and torchvision do it and published networks were
    fed: closer to them by some grey levels, and slower."""
    antialias: bool = True
    """Whether the filter grows with the factor where a frame shrinks (direct: it always does)."""
    middle: Literal["floor", "even"] = "floor"
    """Half a pixel of margin around the centre crop goes down, or to the even number (torchvision)."""
    crop_px: int = 224
    """Side of the square that is cut out, in pixels (paper: 224)."""
    train_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of training crops, as fractions of the resized frame's short side (multi-scale crops, as in TSN)."""
    train_flip: bool = True
    """Mirror half of the training clips; the x component of the flow is negated with it."""

    def __post_init__(self) -> None:
        require(self.resize_px >= 16, "view.resize_px", "at least 16", self.resize_px)
        require(16 <= self.crop_px <= self.resize_px, "view.crop_px", "between 16 and view.resize_px", self.crop_px)
        width = self.resize_width_px
        fits = not width or (self.resize == "stretch" and width >= self.crop_px)
        require(fits, "view.resize_width_px", "0, or with resize stretch at least view.crop_px", width)
        plain = self.antialias or self.interpolation in ("nearest", "bilinear", "bicubic")
        require(plain, "view.antialias", f"on with view.interpolation {self.interpolation}", self.antialias)
        scales_ok = bool(self.train_scales) and all(0.1 <= scale <= 1.0 for scale in self.train_scales)
        require(scales_ok, "view.train_scales", "one or more numbers in 0.1 .. 1.0", self.train_scales)

    @property
    def resize_pixels(self) -> int:
        """Pixels of a resized frame; at least, where its aspect is kept."""
        return self.resize_px * (self.resize_width_px or self.resize_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Optical flow from each sampled frame to the frame after it, for models that look at motion."""

    estimator: Literal["none", "dis", "tvl1"] = "dis"
    """`none`: no flow, which is what a network without a flow stream gets, whatever is set here. `dis`: OpenCV's DIS,
    by the decoder. `tvl1`: TV-L1 in fixed steps on the model's device, which is meant for GPUs; about as exact as DIS
    medium."""
    preset: Literal["ultrafast", "fast", "medium"] = "ultrafast"
    """OpenCV DIS preset: end-point error about 0.3 / 0.2 / 0.12 px at 1 : 2 : 10 times the cost."""
    bound_px: float = 20.0
    """Flow is clipped to +- this many pixels of the crop and scaled so that the bound becomes 1 (TSN: 20)."""

    def __post_init__(self) -> None:
        require(self.bound_px > 0, "flow.bound_px", "greater than 0", self.bound_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Everything that decides the numbers a model is fed from a video."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    """Which frames."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How they are decoded."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """Which part of them."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Optical flow between them."""

    @property
    def flow_on_device(self) -> bool:
        """Whether the model's device finds the flow (kinoray.network.batch)."""
        return self.flow.estimator == "tvl1"

    @property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame, with its flow or, if the device finds that, its partner."""
        flow_planes = {"none": 0, "dis": 2, "tvl1": 1}[self.flow.estimator]
        return (3 + flow_planes) * self.view.crop_px**2

    def without_flow(self) -> "ClipConfig":
        """The same frames alone."""
        return replace(self, flow=replace(self.flow, estimator="none"))

    def for_network(self, flow_channels: int) -> "ClipConfig":
        """What a network with so many channels of flow is fed: a job's decoders ask no more whether it looks at flow.

        Digests and checkpoints keep the settings as they were given.

        Raises:
            ConfigError: it looks at flow, and flow.estimator is none.
        """
        if not flow_channels:
            return self.without_flow()
        expected = f"dis or tvl1: the network has {flow_channels} channels of flow"
        require(self.flow.estimator != "none", "clip.flow.estimator", expected, self.flow.estimator)
        return self

    def decoded_by(self, own: DecodeConfig) -> "ClipConfig":
        """The same numbers from a video, but limits, back end and device are those of the job that decodes.

        Raises:
            ConfigError: the back end cannot make these frames, or one clip is larger than the limits allow.
        """
        clip = replace(self, decode=own)
        num_frames, sides = clip.sample.num_frames, clip.view
        expected = f"at least {sides.resize_pixels:,}: frames are scaled to {sides.resize_px} px"
        require(sides.resize_pixels <= own.max_pixels, "decode.max_pixels", expected, own.max_pixels)
        needed_mb = 5 * num_frames * sides.crop_px**2 // 2**20  # three channels of colour, two of flow
        expected = f"at least {needed_mb:,}: a clip has {num_frames:,} frames of {sides.crop_px} x {sides.crop_px} px"
        require(needed_mb <= own.max_memory_mb, "decode.max_memory_mb", expected, own.max_memory_mb)
        return clip
