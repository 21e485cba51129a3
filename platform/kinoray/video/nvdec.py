"""The fourth reader: the GPU's own video decoder (NVDEC) through torchcodec, in the process that runs the model.

Where it runs, and why there: a CUDA context costs each process hundreds of megabytes of the GPU's memory, so decoder
processes must not have one; the model's process has it already. What that gives up is the sandbox. So a decoder process
looks at each file first, and whatever NVDEC does not take or gets wrong is decoded by the plan, in the sandbox
(kinoray.video.sandbox.pool). What nothing guards against is a file that crashes the GPU's
driver: it takes the worker with it. So this is for videos that one trusts, and off by default.

What is easy to break: a frame counts only if it comes with the time that the packets say it has. NVDEC does not say
which frames are damaged, so `frames_corrupt` is 0 here.
"""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo, Turn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NotForNvdec", "not_in_sandbox", "read_on_device", "require_nvdec"]

_CHUNK_BYTES = 2**27  # of decoded frames at their own size; four times as much while they are scaled
_ERRORS = (RuntimeError, LookupError, ValueError, OSError, MemoryError)
"""What torchcodec is known to raise."""
_streams = threading.local()


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
    except _ERRORS as cause:
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
