"""One shard while it is written: a tar on local disk that grows by a video at a time.

Shards are plain tar files that WebDataset reads too (`<key>.mp4`, `<key>.json`). What is easy to break: the same videos
in the same order must give the same tar, byte for byte, whoever writes it.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from kinoray.config.shared import DecodeConfig
from kinoray.pack.plan import PlannedVideo
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, join
from kinoray.video.media import VideoInfo
from kinoray.video.transcode import Transcoded

__all__ = ["Decoder", "Examined", "ShardWriter", "examine", "write_tar"]

_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Examined:
    """A video that may be packed."""

    data: bytes
    """What goes into the shard: an MP4 if it was transcoded, else the original bytes."""
    info: VideoInfo
    """The probe of these bytes."""
    sha256: str
    """Of these bytes."""
    source_sha256: str
    """Of the bytes that were found."""
    transcoded: bool = False
    """Whether it was."""
    note: str | None = None
    """What the catalog should say of it, if anything."""


class Decoder(Protocol):
    """Where untrusted bytes are looked at: a kinoray.video.sandbox.pool.Sandbox."""

    def probe(self, data: bytes, config: DecodeConfig) -> VideoInfo:
        """kinoray.video.frames.probe."""

    def transcode(self, data: bytes, config: DecodeConfig) -> Transcoded:
        """kinoray.video.transcode.transcode."""


def examine(decoder: Decoder, data: bytes, decode: DecodeConfig, *, transcoded: bool) -> Examined:
    """Probe a video and, if asked for, transcode it.

    Raises:
        MediaError: it is not to be packed, and why.
    """
    if not transcoded:
        info = decoder.probe(data, decode)
        sha256 = hashlib.sha256(data).hexdigest()
        return Examined(data, info, sha256, sha256)
    made = decoder.transcode(data, decode)
    note = f"{made.frames_lost} frames could not be decoded when it was transcoded" if made.frames_lost else None
    sha256, source_sha256 = (hashlib.sha256(each).hexdigest() for each in (made.data, data))
    return Examined(made.data, made.info, sha256, source_sha256, transcoded=True, note=note)


class ShardWriter:
    """Writes one shard. Use it in a `with` block, and `put` it at the end."""

    def __init__(self) -> None:
        self.size_bytes = 0
        """Bytes of the videos written so far."""
        self._folder = contextlib.ExitStack()
        self._path = self._folder.enter_context(scratch_folder("pack")) / "shard.tar"
        self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  (closed by close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the local file."""
        self._tar.close()
        self._folder.close()

    def add(self, video: PlannedVideo, examined: Examined) -> int:
        """Append a video; returns the offset of its first byte."""
        self.size_bytes += len(examined.data)
        return write_tar(self._tar, replace(video, name="x.mp4") if examined.transcoded else video, examined.data)

    def put(self, storage: Storage, out: str, name: str, *, tagged: bool) -> tuple[str, int]:
        """Store the tar as shards/<name>.tar, or shards/<name>-<digest>.tar if tagged; returns (uri, size in bytes).

        A tag keeps writers apart whose bytes may differ (other machines transcode to other bytes): none can overwrite
        what another one has committed.
        """
        self._tar.close()
        tag = ""
        if tagged:
            with self._path.open("rb") as file:
                tag = "-" + hashlib.file_digest(file, "sha256").hexdigest()[:8]
        uri = absolute(join(out, "shards", f"{name}{tag}.tar"))
        storage.put_file(uri, self._path)
        return uri, self._path.stat().st_size


def write_tar(tar: tarfile.TarFile, video: PlannedVideo, data: bytes) -> int:
    """Append `<key>.<extension>` and `<key>.json`; returns the offset of the video's first byte in the tar."""
    stem, _, ending = video.name.rpartition("/")[2].rpartition(".")
    extension = re.sub(r"[^a-z0-9]", "", ending.lower())[:8] if stem else ""
    if extension in ("", "json"):  # .json is the other member
        extension = "video"
    about = {
        "video_id": video.video_id,
        "label": video.label,
        "label_id": video.label_id,
        "split": video.split,
        "source": video.uri,
    }
    tar.addfile(_header(f"{video.video_id}.{extension}", len(data)), io.BytesIO(data))
    offset = tar.offset - -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
    text = json.dumps(about, ensure_ascii=False).encode()
    tar.addfile(_header(f"{video.video_id}.json", len(text)), io.BytesIO(text))
    return offset


def _header(name: str, size_bytes: int) -> tarfile.TarInfo:
    """A member of no owner and no date: the same files give the same tar."""
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    return header
