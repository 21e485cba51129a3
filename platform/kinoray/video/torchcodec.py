"""The third reader, torchcodec: the same frame numbers, the same cuts, another decoder. An extra; for comparison.

What torchcodec does differently, and why it is not the default:
- It needs torch in the decoding process (785 MB, seconds to start), and FFmpeg's shared libraries on the machine.
- It decodes every frame between two wanted ones, also those that nobody refers to.
- In MPEG-TS it refuses some files and seeks to the wrong place in others. It says nothing of damaged frames, and
  refuses a file that is cut inside a frame.
- It applies rotation by itself.
The limits and the count of frames come from our own look at the packets, before torchcodec sees the file. It is always
opened with seek_mode="exact": "approximate" trusts the header and gives wrong frames at variable frame rates.
"""

import re

import numpy as np

from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo

__all__ = ["read_with_torchcodec"]

_ERRORS = (RuntimeError, LookupError, ValueError, OSError, MemoryError)
"""What torchcodec is known to raise on damaged input."""


def read_with_torchcodec(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink) -> Reading:
    """Put the frames with these numbers (int64, sorted, each once) into the sink, as PyavVideo.read does.

    `video` is the same file, opened by us. Frames beyond torchcodec's own count are replaced by its last one and
    counted as corrupt; how many frames it decoded it does not say, so frames_decoded is what seeking by groups needs.

    Raises:
        UndecodableVideo: torchcodec cannot read the file.
        MediaOverBudget: more than decode.max_frames would have to be decoded, or a frame would be scaled too large.
        ConfigError: torchcodec is not installed, or finds no FFmpeg.
    """
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"decode.backend torchcodec cannot be imported ({reason}); pip install torchcodec and FFmpeg's shared "
            "libraries (versions 4 to 8), or use pyav"
        ) from error
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
        frames = reader.get_frames_at(unique.tolist()).data.numpy()
    except _ERRORS as cause:
        # torchcodec puts its source file and line in front of the reason
        reason = re.sub(r"^.*\.cpp:\d+, ", "", " ".join((str(cause) or type(cause).__name__).split()))[:200]
        raise UndecodableVideo(
            f"torchcodec cannot read this {video.codec} file: {reason}; try decode.backend=pyav"
        ) from cause
    for index, row in zip(wanted.tolist(), place.tolist(), strict=True):
        red, green, blue = frames[row]
        sink.put(index, (red, green, blue))
    return Reading(sum(run.end - run.begin for run in runs), int((within != wanted).sum()))
