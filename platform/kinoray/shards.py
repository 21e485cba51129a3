"""Packing videos into tar shards: probe, checksum, write, commit. A shard is whole and committed, or it is not there.

Shards are plain tar files that WebDataset reads too (`<key>.mp4`, `<key>.json`); the original bytes are not touched.
The commit (shards/<name>.json, put if absent) holds the rows of catalog and quarantine, so that a restart needs to look
at nothing else. What is easy to break: the same plan must give the same tar, byte for byte, whoever writes it.
"""

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinoray.catalog_read import Reference, read_videos
from kinoray.config import DecodeConfig
from kinoray.decode import VideoInfo
from kinoray.errors import (
    AccessDenied,
    CatalogError,
    KinorayError,
    MediaError,
    MediaOverBudget,
    StorageUnavailable,
)
from kinoray.quarantine import Refusal
from kinoray.sandbox import shared_sandbox
from kinoray.shards_plan import PlannedVideo, ShardPlan
from kinoray.storage import Storage, absolute, join

__all__ = ["ShardCommit", "pack_shard", "read_commit", "write_tar"]

_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class ShardCommit:
    """What became of the files of one shard."""

    name: str
    """The shard's name."""
    uri: str
    """The tar; empty if no file was good."""
    size_bytes: int
    """Size of the tar."""
    rows: tuple[dict[str, Any], ...]
    """Rows of the catalog, in the order of their offsets."""
    refused: tuple[Refusal, ...]
    """Rows of the quarantine table."""


def pack_shard(storage: Storage, out: str, shard: ShardPlan, decode: DecodeConfig) -> ShardCommit:
    """Read, probe and pack the files of one shard, then commit it. Of several that do the same, one commits.

    Raises:
        StorageUnavailable, AccessDenied: the store is at fault, not a video; nothing was committed.
        DecoderStartFailed: the machine is.
    """
    rows: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    uri = absolute(join(out, "shards", f"{shard.name}.tar"))
    with tempfile.TemporaryDirectory(prefix="kinoray-pack-") as folder:
        path = Path(folder) / "shard.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for video, outcome in _probed(storage, shard, decode):
                if isinstance(outcome, Refusal):
                    refused.append(outcome)
                else:
                    data, info = outcome
                    offset = write_tar(tar, video, data)
                    rows.append(_row(video, uri, offset, data, info))
        size_bytes = path.stat().st_size if rows else 0
        if rows:
            storage.put_file(uri, path)
    commit = ShardCommit(shard.name, uri if rows else "", size_bytes, tuple(rows), tuple(refused))
    target = _commit_uri(out, shard.name)
    return commit if storage.put_if_absent(target, _dump(commit)) else read_commit(storage, out, shard.name)


def read_commit(storage: Storage, out: str, name: str) -> ShardCommit:
    """The commit of a shard.

    Raises:
        ObjectNotFound: it is not committed.
        CatalogError: it is not one of ours.
    """
    uri = _commit_uri(out, name)
    try:
        found = json.loads(storage.read(uri))
        refused = tuple(Refusal(**item) for item in found.pop("refused"))
        return ShardCommit(**{**found, "rows": tuple(found["rows"]), "refused": refused})
    except (ValueError, TypeError, KeyError) as error:
        raise CatalogError(f"{uri} is not the commit of a shard ({error}); remove it and pack again") from error


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


def _probed(
    storage: Storage, shard: ShardPlan, decode: DecodeConfig
) -> Iterator[tuple[PlannedVideo, tuple[bytes, VideoInfo] | Refusal]]:
    small = [video for video in shard.videos if video.size_bytes <= decode.max_bytes]
    sandbox = shared_sandbox(1)
    blobs = read_videos(storage, [Reference(video.uri) for video in small])
    for video in shard.videos:
        if video.size_bytes > decode.max_bytes:  # not even read
            text = f"{video.uri} has {video.size_bytes} bytes; decode.max_bytes allows {decode.max_bytes}"
            yield video, _refuse(video, MediaOverBudget(text), "list")
            continue
        data = next(blobs)
        if isinstance(data, StorageUnavailable | AccessDenied):
            raise data
        if isinstance(data, KinorayError):
            yield video, _refuse(video, data, "read")
            continue
        try:
            yield video, (data, sandbox.probe(data, decode))
        except MediaError as error:
            yield video, _refuse(video, error, "probe")


def _refuse(video: PlannedVideo, error: KinorayError, stage: str) -> Refusal:
    return Refusal(video.video_id, video.uri, type(error).__name__, " ".join(str(error).split()), stage)


def _row(video: PlannedVideo, uri: str, offset: int, data: bytes, info: VideoInfo) -> dict[str, Any]:
    """One row of CATALOG_SCHEMA."""
    return {
        "video_id": video.video_id,
        "uri": uri,
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
    }


def _header(name: str, size_bytes: int) -> tarfile.TarInfo:
    """A member of no owner and no date: the same files give the same tar."""
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    return header


def _commit_uri(out: str, name: str) -> str:
    return join(out, "shards", f"{name}.json")


def _dump(commit: ShardCommit) -> bytes:
    return json.dumps(asdict(commit), ensure_ascii=False).encode()
