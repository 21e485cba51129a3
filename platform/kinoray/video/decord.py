"""The second reader, decord 0.6: the same frame numbers, the same cuts, another decoder. Here for comparison.

What decord does differently, and why it is not the default:
- It seeks by what the container promises. In MPEG-TS it gives frames up to dozens too late, without an error.
- It refuses files that are cut short or damaged, of which PyAV reads what is there, and knows no AV1.
- It fails on frames that libswscale pads, such as those of 48 pixels' width.
- It applies rotation by itself, and scales with its own, older libswscale.
- On damaged files it has aborted its process (6 of 4,000 mutated files) or kept decoding without end (its issue 373).
- Its shared libraries are loaded for the whole process: imported before PyAV, they stand in front of PyAV's libvpx.
- Its `bridge`, which decides the type of what it returns, is one for the whole process: it is never set here, and
  whatever another user of decord has set is taken as it comes.
The limits and the count of frames come from our own look at the packets, before decord sees the file.
"""

import io
import re

import numpy as np

from kinoray.errors import ConfigError, UndecodableVideo
from kinoray.video.plan import FrameSink, Reading
from kinoray.video.pyav import PyavVideo

__all__ = ["read_with_decord"]


def read_with_decord(data: bytes, video: PyavVideo, wanted: np.ndarray, sink: FrameSink) -> Reading:
    """Put the frames with these numbers (int64, sorted, each once) into the sink, as PyavVideo.read does.

    `video` is the same file, opened by us. Frames beyond decord's own count are replaced by its last one and counted
    as corrupt; how many frames it decoded decord does not say, so frames_decoded is what its seeking by groups needs.

    Raises:
        UndecodableVideo: decord cannot read the file.
        MediaOverBudget: more than decode.max_frames would have to be decoded, or a frame would be scaled too large.
        ConfigError: decord is not installed.
    """
    try:
        import decord
    except ImportError as error:
        raise ConfigError(
            f"decode.backend decord cannot be imported ({error}); pip install decord, or use pyav"
        ) from error
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
    frames = np.asarray(batch.asnumpy() if hasattr(batch, "asnumpy") else batch)
    for index, row in zip(wanted.tolist(), place.tolist(), strict=True):
        red, green, blue = (frames[row, :, :, channel] for channel in range(3))
        sink.put(index, (red, green, blue))
    num_replaced = int((within != wanted).sum())
    return Reading(sum(run.end - run.begin for run in runs), num_replaced)
