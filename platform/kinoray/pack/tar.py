"""One shard while it is written: a tar on local disk that grows by a video at a time, and its rows of the catalog.

Shards are plain tar files that WebDataset reads too (`<key>.mp4`, `<key>.json`). What is easy to break: the same videos
in the same order must give the same tar, byte for byte, whoever writes it.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from kinoray.config.shared import DecodeConfig
from kinoray.pack.plan import PlannedVideo
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, join
from kinoray.video.clip import VideoInfo
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
    transcoded: bool = False
    """Whether it was."""
    note: str | None = None
    """What the catalog should say of it, if anything."""


class Decoder(Protocol):
    """Where untrusted bytes are looked at: a kinoray.video.sandbox.pool.Sandbox."""

    def probe(self, data: bytes, config: DecodeConfig) -> VideoInfo:
        """kinoray.video.clip.probe."""

    def transcode(self, data: bytes, config: DecodeConfig) -> Transcoded:
        """kinoray.video.transcode.transcode."""


def examine(decoder: Decoder, data: bytes, decode: DecodeConfig, *, transcoded: bool) -> Examined:
    """Probe a video and, if asked for, transcode it.

    Raises:
        MediaError: it is not to be packed, and why.
    """
    if not transcoded:
        return Examined(data, decoder.probe(data, decode))
    made = decoder.transcode(data, decode)
    note = f"{made.frames_lost} frames could not be decoded when it was transcoded" if made.frames_lost else None
    return Examined(made.data, made.info, transcoded=True, note=note)


class ShardWriter:
    """Writes one shard. Use it in a `with` block, and `put` it at the end."""

    def __init__(self) -> None:
        self.num_videos = 0
        """Videos written so far."""
        self.size_bytes = 0
        """Bytes of them."""
        self._rows: list[dict[str, Any]] = []
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

    def add(self, video: PlannedVideo, examined: Examined, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Append a video; returns its row of CATALOG_SCHEMA (with `extra`), whose uri `put` fills in."""
        data, info = examined.data, examined.info
        offset = write_tar(self._tar, replace(video, name="x.mp4") if examined.transcoded else video, data)
        row = {
            "video_id": video.video_id,
            "uri": "",
            "offset": offset,
            "length": len(data),
            "label": video.label,
            "label_id": video.label_id,
            "split": video.split,
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "duration_s": info.duration_s,
            "fps": info.fps,
            "num_frames": info.num_frames,
            "width": info.width,
            "height": info.height,
            "codec": info.codec,
            "status": "packed",
            **({"reason": examined.note} if examined.note else {}),
            **(extra or {}),
        }
        self._rows.append(row)
        self.num_videos += 1
        self.size_bytes += len(data)
        return row

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
        for row in self._rows:
            row["uri"] = uri
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
