"""Which back end reads the wanted frames: our own plan over PyAV, NVDEC (nvdec.py), or one of two for comparison.

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
"""

import importlib
import io
import re

import numpy as np

from kinoray.config.shared import DecodeConfig
from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video.nvdec import read_on_device, require_nvdec
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo

__all__ = ["read_frames", "require_backend"]

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
