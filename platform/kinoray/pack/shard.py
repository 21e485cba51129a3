"""Packing videos into tar shards: probe, checksum, write, commit. A shard is whole and committed, or it is not there.

The tar itself is written by tar.py. The commit (shards/<name>.json, put if absent) holds the rows of catalog and
quarantine, so that a restart needs to look at nothing else. What is easy to break: nothing of a shard counts before its
commit, and nothing that a commit names is ever written again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kinoray.catalog.quarantine import Refusal
from kinoray.catalog.read import is_store_fault, read_videos
from kinoray.config.shared import DecodeConfig
from kinoray.errors import (
    CatalogError,
    KinorayError,
    MediaError,
    MediaOverBudget,
)
from kinoray.pack.plan import PlannedVideo, ShardPlan
from kinoray.pack.tar import Examined, ShardWriter, examine
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json, record_of
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = ["ShardCommit", "pack_shard", "read_commit"]


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


def pack_shard(
    storage: Storage, out: str, shard: ShardPlan, decode: DecodeConfig, *, transcoded: bool = False
) -> ShardCommit:
    """Read, probe and pack the files of one shard, then commit it. Of several that do the same, one commits.

    The original bytes are packed, or what transcode.py makes of them if `transcoded`.

    Raises:
        StorageUnavailable, AccessDenied: the store is at fault, not a video; nothing was committed.
        DecoderStartFailed: the machine is.
    """
    rows: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    uri, size_bytes = "", 0
    with ShardWriter() as writer:
        for video, outcome in _examined(storage, shard, decode, transcoded=transcoded):
            if isinstance(outcome, Refusal):
                refused.append(outcome)
            else:
                rows.append(writer.add(video, outcome))
        if rows:
            uri, size_bytes = writer.put(storage, out, shard.name, tagged=transcoded)
    commit = ShardCommit(shard.name, uri, size_bytes, tuple(rows), tuple(refused))
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
        commit = record_of(ShardCommit)(parse_json(storage.read(uri, max_bytes=MAX_RECORD_BYTES)))
        if commit.name != name or any(row.get("uri") != commit.uri for row in commit.rows):
            raise ValueError(f"it is that of {commit.name!r:.80}, or its rows lie in another shard")
        return commit
    except (ValueError, TypeError) as error:
        raise CatalogError(f"{uri} is not the commit of a shard ({error}); remove it and pack again") from error


def _examined(
    storage: Storage, shard: ShardPlan, decode: DecodeConfig, *, transcoded: bool
) -> Iterator[tuple[PlannedVideo, Examined | Refusal]]:
    small = [video for video in shard.videos if video.size_bytes <= decode.max_bytes]
    sandbox = shared_sandbox(1)
    blobs = read_videos(storage, [video.reference for video in small], max_bytes=decode.max_bytes)
    for video in shard.videos:
        if video.size_bytes > decode.max_bytes:  # not even read
            text = f"{video.uri} has {video.size_bytes} bytes; decode.max_bytes allows {decode.max_bytes}"
            yield video, _refuse(video, MediaOverBudget(text), "list")
            continue
        data = next(blobs)
        if isinstance(data, KinorayError):
            if is_store_fault(video.uri, data):
                raise data
            yield video, _refuse(video, data, "read")
            continue
        try:
            yield video, examine(sandbox, data, decode, transcoded=transcoded)
        except MediaError as error:
            yield video, _refuse(video, error, "probe")


def _refuse(video: PlannedVideo, error: KinorayError, stage: str) -> Refusal:
    place = video.reference
    reason = " ".join(str(error).split())
    return Refusal(video.video_id, video.uri, type(error).__name__, reason, stage, place.offset, place.length)


def _commit_uri(out: str, name: str) -> str:
    return join(out, "shards", f"{name}.json")


def _dump(commit: ShardCommit) -> bytes:
    return json.dumps(asdict(commit), ensure_ascii=False).encode()
