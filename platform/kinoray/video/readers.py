"""Which back end reads the wanted frames: our own plan over PyAV, NVDEC, or one of two for comparison.

All give the same frame numbers and the same cuts; what decodes is another. The limits and the count of frames come from
our own look at the packets, before decord or torchcodec sees the file. Why those two are not the default:

- decord 0.6 seeks by what the container promises: in MPEG-TS it gives frames up to dozens too late, without an error.
  It refuses files that are cut short or damaged, of which PyAV reads what is there, and knows no AV1. It fails on
  frames that libswscale pads, such as those of 48 pixels' width, and scales with its own, older libswscale. On damaged
  files it has aborted its process (6 of 4,000 mutated files) or kept decoding without end (its issue 373). Its shared
  libraries are loaded for the whole process: imported before PyAV, they stand in front of PyAV's libvpx. Its `bridge`,
  which decides the type of what it returns, is one for the whole process: it is never set here, and whatever another
  user of decord has set is taken as it comes.
- torchcodec needs torch in the decoding process (785 MB, seconds to start), and FFmpeg's shared libraries on the
  machine. It decodes every frame between two wanted ones, also those that nobody refers to. In MPEG-TS it refuses some
  files and seeks to the wrong place in others. It says nothing of damaged frames, and refuses a file that is cut inside
  a frame. It is always opened with seek_mode="exact": "approximate" trusts the header and gives wrong frames at
  variable frame rates.

Both turn frames by themselves, as their display matrix says, and neither mirrors them; that is done here.

NVDEC is the GPU's own video decoder, through torchcodec, in the process that runs the model: a CUDA context costs each
process hundreds of megabytes of the GPU's memory, so decoder processes must not have one; the model's process has it
already. What that gives up is the sandbox. So a decoder process looks at each file first, and whatever NVDEC does not
take or gets wrong is decoded by the plan, in the sandbox (kinoray.video.sandbox.pool). What nothing guards against is a
file that crashes the GPU's driver: it takes the worker with it. So this is for videos that one trusts, and off by
default. A frame counts only if it comes with the time that the packets say it has; NVDEC does not say which frames are
damaged, so `frames_corrupt` is 0.
"""

import importlib
import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from kinoray.config.shared import DecodeConfig
from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo, Turn

__all__ = [
    "NotForNvdec",
    "not_in_sandbox",
    "read_frames",
    "read_on_device",
    "require_backend",
    "require_nvdec",
]

_TORCHCODEC_ERRORS = (RuntimeError, LookupError, ValueError, OSError, MemoryError)
"""What torchcodec is known to raise on damaged input."""


_MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "pyav": ((), ""),
    "decord": (("decord",), "pip install decord"),
    "torchcodec": (
        ("torchcodec.decoders", "torchcodec.transforms"),
        "pip install torchcodec and FFmpeg's shared libraries (versions 4 to 8)",
    ),
}
"""What a back end imports, and how one gets it."""

_CHUNK_BYTES = 2**27  # of decoded frames at their own size; four times as much while they are scaled
_streams = threading.local()


def require_backend(backend: str) -> None:
    """Import what a decode.backend needs.

    Raises:
        ConfigError: saying what is missing.
    """
    modules, remedy = _MODULES[backend]
    try:
        for module in modules:
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"decode.backend {backend} cannot be imported ({reason}); {remedy}, or use pyav") from error


def read_frames(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink, config: DecodeConfig) -> Reading:
    """Put the wanted frames into the sink with config.backend; `video` is `data`, opened. See PyavVideo.read.

    Raises:
        MediaError: one of its subclasses.
        ConfigError: the back end is not installed, or decode.device is cuda and this process may not use a GPU.
    """
    if config.device == "cuda":
        require_nvdec()
        return read_on_device(data, video, wanted, sink, "cuda")
    if config.backend != "pyav" and video.table.halved:
        text = f"its frames are spread over two packets, a field in each, and {config.backend} counts packets"
        raise UndecodableVideo(f"{text}; use decode.backend=pyav")
    if config.backend == "decord" and not video.is_only_stream:
        raise UndecodableVideo("it has several video streams, of which decord takes its own; use decode.backend=pyav")
    if config.backend == "decord":
        return _read_with_decord(data, video, wanted, sink)
    if config.backend == "torchcodec":
        return _read_with_torchcodec(data, video, wanted, sink)
    return video.read(wanted, sink)


def _read_with_decord(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink) -> Reading:
    """Put the frames with these numbers (int64, sorted, each once) into the sink, as PyavVideo.read does.

    `video` is the same file, opened by us. Frames beyond decord's own count are replaced by its last one and counted
    as corrupt; how many frames it decoded decord does not say, so frames_decoded is what its seeking by groups needs.

    Raises:
        UndecodableVideo: decord cannot read the file.
        MediaOverBudget: more than decode.max_frames would have to be decoded, or a frame would be scaled too large.
        ConfigError: decord is not installed.
    """
    require_backend("decord")
    import decord

    runs = video.table.runs_for(wanted)
    video.check_frames(runs)
    height, width = sink.scaled_size(*video.size)
    video.check_scaled_size(width, height)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), width=width, height=height, num_threads=1)
        within = np.minimum(wanted, len(reader) - 1)
        unique, place = np.unique(within, return_inverse=True)
        batch = reader.get_batch(unique.tolist())
    except (decord.DECORDError, AssertionError, RuntimeError, LookupError, ValueError, OSError, MemoryError) as cause:
        # decord puts the time of day and its source file in front of the reason
        reason = re.sub(r"\[[\d:]+\] \S+: ", "", " ".join((str(cause) or type(cause).__name__).split()))[:200]
        raise UndecodableVideo(
            f"decord cannot read this {video.codec} file: {reason}; try decode.backend=pyav"
        ) from cause
    frames = _mirrored(np.moveaxis(np.asarray(batch.asnumpy() if hasattr(batch, "asnumpy") else batch), 3, 1), video)
    for index, row in zip(wanted.tolist(), place.tolist(), strict=True):
        red, green, blue = frames[row]
        sink.put(index, (red, green, blue))
    num_replaced = int((within != wanted).sum())
    return Reading(sum(run.end - run.begin for run in runs), num_replaced)


def _read_with_torchcodec(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink) -> Reading:
    """Put the frames with these numbers (int64, sorted, each once) into the sink, as PyavVideo.read does.

    `video` is the same file, opened by us. Frames beyond torchcodec's own count are replaced by its last one and
    counted as corrupt; how many frames it decoded it does not say, so frames_decoded is what seeking by groups needs.

    Raises:
        UndecodableVideo: torchcodec cannot read the file.
        MediaOverBudget: more than decode.max_frames would have to be decoded, or a frame would be scaled too large.
        ConfigError: torchcodec is not installed, or finds no FFmpeg.
    """
    require_backend("torchcodec")
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    runs = video.table.runs_for(wanted)
    video.check_frames(runs)
    height, width = sink.scaled_size(*video.size)
    video.check_scaled_size(width, height)
    try:
        reader = VideoDecoder(
            data,
            stream_index=video.stream_index,
            num_ffmpeg_threads=1,
            seek_mode="exact",
            transforms=[Resize((height, width))],
        )
        within = np.minimum(wanted, len(reader) - 1)
        unique, place = np.unique(within, return_inverse=True)
        frames = _mirrored(reader.get_frames_at(unique.tolist()).data.numpy(), video)
    except _TORCHCODEC_ERRORS as cause:
        # torchcodec puts its source file and line in front of the reason
        reason = re.sub(r"^.*\.cpp:\d+, ", "", " ".join((str(cause) or type(cause).__name__).split()))[:200]
        raise UndecodableVideo(
            f"torchcodec cannot read this {video.codec} file: {reason}; try decode.backend=pyav"
        ) from cause
    for index, row in zip(wanted.tolist(), place.tolist(), strict=True):
        red, green, blue = frames[row]
        sink.put(index, (red, green, blue))
    return Reading(sum(run.end - run.begin for run in runs), int((within != wanted).sum()))


def _mirrored(frames: np.ndarray, video: PyavVideo) -> np.ndarray:
    """Frames [N, 3, H, W] that were turned and not mirrored, as displayed."""
    if not video.turn.mirrored:
        return frames
    return np.flip(frames, axis=3 if video.turn.across else 2)


if TYPE_CHECKING:
    from torch import Tensor


class NotForNvdec(UndecodableVideo):
    """NVDEC does not take this video, or cannot be trusted with it: the plan may.

    `reason`, for the count: codec, container, rotation, times, count, damage or error.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"not decoded by NVDEC: {text}")
        self.reason = reason


def require_nvdec() -> None:
    """Find out whether this process may decode on its GPU.

    Raises:
        ConfigError: saying what is missing.
    """
    if "torch" not in sys.modules:
        raise not_in_sandbox()
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "decode.device cuda needs an NVIDIA GPU that torch can use, and torch finds none here; give the workers "
            "one (--resources.gpus-per-worker 1), or use decode.device cpu"
        )
    _import_torchcodec()


def not_in_sandbox() -> ConfigError:
    """The error of a decoder process that is asked for the GPU."""
    return ConfigError(
        "decode.device cuda decodes where the model runs, and this is a decoder process without it; use "
        "decode.device cpu here"
    )


def _import_torchcodec() -> Any:
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"decode.device cuda needs torchcodec, which cannot be imported ({reason}); pip install torchcodec, with "
            "CUDA as torch has it, and FFmpeg's shared libraries (versions 4 to 8), or use decode.device cpu"
        ) from error
    return torchcodec.decoders


def read_on_device(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink, device: str) -> Reading:
    """Put the frames with these numbers (int64, sorted, each once) into the sink, as PyavVideo.read does.

    They are decoded and scaled (bilinear, antialiased) on the device, and come to the host at the sink's size. `video`
    is the same file, opened by us. `device` is "cuda", or "cpu" for the same with torchcodec's processor decoder.

    Raises:
        UndecodableVideo: torchcodec cannot read it, or its frames are not certain to be the wanted ones.
        MediaOverBudget: more than decode.max_frames would have to be decoded, or a frame would be scaled too large.
        ConfigError: torchcodec is not installed, or finds no FFmpeg.
    """
    decoders = _import_torchcodec()
    _check_certain(video)
    runs = video.table.runs_for(wanted)
    video.check_frames(runs)
    height, width = sink.scaled_size(*video.size)
    video.check_scaled_size(width, height)
    step = max(1, _CHUNK_BYTES // (3 * video.context.width * video.context.height))
    with _own_stream(device), _refusals(video):
        with decoders.set_cuda_backend("beta"):  # NVDEC itself; newer versions take it without being told
            reader = decoders.VideoDecoder(
                data, stream_index=video.stream_index, num_ffmpeg_threads=1, seek_mode="exact", device=device
            )
        _check_reader(reader, video)
        times = _times(video)
        for start in range(0, len(wanted), step):
            numbers = wanted[start : start + step].tolist()
            batch = reader.get_frames_at(numbers)
            _check_times([times[number] for number in numbers], batch.pts_seconds.tolist(), float(video.time_base))
            for number, planes in zip(numbers, _scaled(batch.data, height, width), strict=True):
                red, green, blue = planes
                sink.put(number, (red, green, blue))
    return Reading(sum(run.end - run.begin for run in runs), 0)


def _check_certain(video: PyavVideo) -> None:
    """Refuse what torchcodec was seen to count or turn otherwise than libav (docs/decoders.md)."""
    if not video.table.timed:
        raise NotForNvdec("times", "its packets have no times that tell frames apart")
    if video.table.num_headless or video.num_frames != video.table.num_frames:
        raise NotForNvdec("damage", "it does not begin with a key frame")
    if video.table.halved:
        raise NotForNvdec("count", "its frames are spread over two packets, a field in each")
    if video.container == "mpegts":
        raise NotForNvdec("container", "torchcodec seeks to wrong places in MPEG-TS")
    if video.turn != Turn():
        raise NotForNvdec("rotation", "it is shown turned or mirrored")


def _check_reader(reader: Any, video: PyavVideo) -> None:
    if reader.cpu_fallback:
        raise NotForNvdec("codec", f"{video.codec}, {reader.cpu_fallback}")
    if len(reader) != video.num_frames:
        raise NotForNvdec("count", f"torchcodec counts {len(reader)} frames, the packets {video.num_frames}")


def _times(video: PyavVideo) -> dict[int, float]:
    """Seconds at which each frame is shown, by its number."""
    unit = float(video.time_base)
    return {number: time * unit for time, number in video.table.index_of_time().items() if number >= 0}


def _check_times(expected: list[float], found: list[float], unit: float) -> None:
    for wanted_s, found_s in zip(expected, found, strict=True):
        if abs(wanted_s - found_s) > unit / 2:
            raise NotForNvdec("times", f"the frame of {found_s:.6f} s came out where {wanted_s:.6f} s was wanted")


def _scaled(frames: "Tensor", height: int, width: int) -> np.ndarray:
    """uint8 [N, 3, height, width] on the host of frames uint8 [N, 3, H, W] on any device."""
    from torch.nn import functional as F

    if frames.shape[2:] != (height, width):
        frames = F.interpolate(frames.float(), (height, width), mode="bilinear", antialias=True, align_corners=False)
    return np.asarray(frames.round().clamp(0, 255).byte().cpu().numpy() if frames.is_floating_point() else frames.cpu())


@contextmanager
def _refusals(video: PyavVideo) -> Iterator[None]:
    """What torchcodec raises, as a MediaError."""
    try:
        yield
    except _TORCHCODEC_ERRORS as cause:
        # torchcodec puts its source file and line in front of the reason
        text = re.sub(r"^.*\.cpp:\d+, ", "", " ".join((str(cause) or type(cause).__name__).split()))[:200]
        raise NotForNvdec("error", f"torchcodec cannot read this {video.codec} file: {text}") from cause


def _own_stream(device: str) -> AbstractContextManager[object]:
    """A CUDA stream of this thread's: on the model's, a thread that fetches frames would wait for the model."""
    if device == "cpu":
        return nullcontext()
    import torch

    if not hasattr(_streams, "stream"):
        _streams.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return torch.cuda.stream(_streams.stream)
