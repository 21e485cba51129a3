"""What a file's header promises, to be compared with what is there; never used for anything else."""

import re
from typing import Any

from kinoray.video.plan import PacketTable

__all__ = ["claimed_frames"]


def claimed_frames(stream: Any, table: PacketTable, duration_s: float) -> int | None:
    """Frames that the header promises, without those that an edit list hides; None where it makes no promise.

    MP4, MOV and AVI store a count. Matroska stores the track's duration, taken at the rate of the packets: frames lost
    from its middle are not noticed. MPEG-TS stores nothing.

    Args:
        stream: libav's, of the file.
        duration_s: of the packets that are there.
    """
    if stream.frames:
        hidden = table.num_packets - table.num_frames
        return max(0, int(stream.frames) - hidden)
    claimed_s = _seconds(stream.metadata.get("DURATION", ""))
    if claimed_s is None or duration_s <= 0:
        return None
    return round(table.num_frames * claimed_s / duration_s)


def _seconds(text: str) -> float | None:
    """`00:01:02.500000000` -> 62.5; None for anything else."""
    match = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d{1,9})?)", text)
    return 3600.0 * int(match[1]) + 60.0 * int(match[2]) + float(match[3]) if match else None
