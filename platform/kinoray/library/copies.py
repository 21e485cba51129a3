"""Where another tool finds each video: as it lies, or copied out of its shard into a file of its own.

What is easy to break: a name that came from a stranger never becomes a path; only its letters, digits, `_` and `-` do.
"""

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kinoray.catalog.folders import extension
from kinoray.catalog.quarantine import Refusal, judge
from kinoray.catalog.table import Reference, catalog_of_source, read_videos
from kinoray.errors import ChecksumMismatch, ConfigError, KinorayError
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import as_name

__all__ = ["Source", "copied_videos", "named_videos"]

_MAX_STEM = 100
_KINDS = ((4, b"ftyp", ".mp4"), (0, b"\x1a\x45\xdf\xa3", ".mkv"), (0, b"RIFF", ".avi"), (0, b"G", ".ts"))


class Source:
    """The videos that a user says were labelled."""

    def __init__(self, storage: Storage, uri: str) -> None:
        table = catalog_of_source(storage, absolute(uri)).table
        self._uri = uri
        columns = [table.column(name).to_pylist() for name in ("uri", "offset", "length")]
        self._places = set(zip(*columns, strict=True))

    def problem(self, row: dict[str, Any]) -> str:
        """Why the video of a row is none of these; empty if it is."""
        if (row["uri"], row["offset"], row["length"]) in self._places:
            return ""
        return f"{row['uri']} is no video of {self._uri} (copy_videos), so it was not copied"


def named_videos(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The address of each row's video.

    Raises:
        ConfigError: one lies inside a shard, where no other tool can read it.
    """
    for row in rows:
        if row["offset"] is not None:
            raise ConfigError(
                f"copy_videos: {row['video_id']} lies inside {row['uri']} (byte {row['offset']} on), where no other "
                "tool reads it; give --copy-videos SOURCE, or choose the format jsonl or csv"
            )
        yield row["uri"]


def copied_videos(
    storage: Storage, rows: Sequence[dict[str, Any]], folder: Path, source: Source
) -> Iterator[Path | Refusal]:
    """Copy each row's video into a file in the folder: its path, or why there is none.

    A table can be a stranger's, and name any file that its reader may read: only those that `source` has are copied.

    Raises:
        StorageUnavailable: the store is at fault, not a video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [Reference(row["uri"], row["offset"], row["length"], row_problem=source.problem(row)) for row in rows]
    for row, data in zip(rows, read_videos(storage, places), strict=True):
        if isinstance(data, KinorayError):
            yield judge(data, "read")
            continue
        path = folder / _file_name(row, data)
        aside = folder / f".{uuid.uuid4().hex}"
        aside.write_bytes(data)
        os.replace(aside, path)
        yield path


def _file_name(row: dict[str, Any], data: bytes) -> str:
    """`bus__a-<row_key>.mp4`: the key keeps apart what looks alike without the characters that are left out."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", row["video_id"])[:_MAX_STEM]
    known = extension(row["uri"]) if row["offset"] is None else ""
    ending = known if re.fullmatch(r"\.[a-z0-9]{1,8}", known) else _sniffed(data)
    try:
        key = as_name(row["row_key"], "row_key")
    except ValueError as error:
        raise ChecksumMismatch(f"{row['uri']}: {error}; this table is not what kinoray wrote") from error
    return f"{stem}-{key}{ending}"


def _sniffed(data: bytes) -> str:
    for offset, mark, ending in _KINDS:
        if data[offset : offset + len(mark)] == mark:
            return ending
    return ".video"
