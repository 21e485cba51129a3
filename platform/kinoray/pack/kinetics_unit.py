"""One unit of a Kinetics pack: an archive, or a part of the loose files, read once, judged, packed and committed.

What is easy to break: every file or member of the unit gets exactly one verdict here, in the order in which it was
found; and the commit is written last, once, so that a unit is done or is done again from its start.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kinoray.catalog.kinetics import Wanted, judge_name, key_of_name, printable
from kinoray.catalog.read import Reference, is_store_fault, read_videos
from kinoray.catalog.source import SourceFile
from kinoray.config.shared import DecodeConfig
from kinoray.errors import (
    CatalogError,
    ChecksumMismatch,
    DamagedArchive,
    KinorayError,
    MediaError,
    StorageError,
)
from kinoray.pack.archive import Archive, Member, is_archive, open_archive
from kinoray.pack.plan import PlannedVideo, cut_evenly, share, split_name
from kinoray.pack.tar import Examined, ShardWriter, examine
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json, record_of
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = ["FileVerdict", "PackSettings", "Packed", "Unit", "UnitCommit", "pack_unit", "plan_units", "read_unit"]

_MIN_CLIP_FRACTION = 0.2  # of its window that a clip must last at least


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task packs."""

    name: str
    """`archive-00012` or `part-00003`; its commit is shards/<name>.json."""
    files: tuple[SourceFile, ...]
    """The archive, or the loose files of the part, in the order in which they are looked at."""
    is_archive: bool
    """Whether it is the members of its one file that are packed."""
    is_replacement: bool
    """Whether its clips take the place of others of the same key."""


@dataclass(frozen=True, slots=True)
class PackSettings:
    """What decides whether and how a file is packed."""

    decode: DecodeConfig
    transcoded: bool
    shard_bytes: int


class FileVerdict(NamedTuple):
    """What became of one file or member."""

    source: str
    """The file, or the archive that holds the member."""
    member: str | None
    """The member's name, made printable; None for a file."""
    position: int
    """Its number in the unit, from 0."""
    key: str
    """The clip that its name says it is; empty if none."""
    verdict: str
    """One of settle.FILE_VERDICTS."""
    reason: str
    """Error class, or what the name says; empty if packed."""
    detail: str
    """One line for a person."""


class Packed(NamedTuple):
    """A clip in a shard."""

    position: int
    """Whose verdict in the unit this is."""
    source_sha256: str
    """Of the bytes that were found, before any transcoding."""
    row: dict[str, Any]
    """Its row of the catalog."""


@dataclass(frozen=True, slots=True)
class UnitCommit:
    """What became of everything in a unit."""

    name: str
    num_found: int
    """Files or members, counted where they were found."""
    damage: str
    """Why an archive could not be read to its end; empty if it was."""
    shards: tuple[tuple[str, int], ...]
    """(uri, size in bytes) of what was written."""
    packed: tuple[Packed, ...]
    files: tuple[FileVerdict, ...]


def plan_units(files: Sequence[SourceFile], part_bytes: int) -> list[Unit]:
    """Cut a source into units: replacements first, then archives by name, then loose files in parts of part_bytes.

    Whatever lies in a folder or archive whose name has `replacement` in it is a replacement. Loose files are mixed by a
    hash of their clip, so that a part is a fair sample of the classes; files of one clip stay in the order of names.
    """
    units: list[Unit] = []
    for first in (True, False):
        found = [file for file in files if ("replacement" in file.name.lower()) == first]
        archives = [file for file in found if is_archive(file.name)]
        loose = [file for file in found if not is_archive(file.name)]
        start = sum(unit.is_archive for unit in units)
        units += [
            Unit(f"archive-{start + index:05d}", (file,), is_archive=True, is_replacement=first)
            for index, file in enumerate(sorted(archives, key=lambda file: file.name))
        ]
        mixed = sorted(loose, key=lambda file: (share("order", key_of_name(file.name)), file.name))
        start = sum(not unit.is_archive for unit in units)
        units += [
            Unit(f"part-{start + index:05d}", tuple(part), is_archive=False, is_replacement=first)
            for index, part in enumerate(cut_evenly(mixed, [file.size_bytes for file in mixed], part_bytes))
        ]
    return units


def pack_unit(
    storage: Storage,
    out: str,
    unit: Unit,
    clips: Mapping[str, Wanted | str],
    replaced: AbstractSet[str],
    settings: PackSettings,
) -> UnitCommit:
    """Pack what is wanted of a unit and commit it. Of several that do the same, one commits; the winner's is returned.

    Raises:
        StorageError: the source cannot be read or out cannot be written; nothing was committed.
        DecoderStartFailed: no decoder process can be started here.
    """
    damage, num_found = "", len(unit.files)
    with ExitStack() as stack:
        packer = _Packer(storage, out, unit, clips, replaced, settings, stack)
        if unit.is_archive:
            damage, num_found = _archive_problem(storage, unit.files[0].uri), 0
            if not damage:
                archive = open_archive(storage, unit.files[0].uri)
                packer.pack_archive(archive)
                damage, num_found = archive.damage, archive.num_members
        else:
            packer.pack_files()
        packer.finish()
    commit = UnitCommit(unit.name, num_found, damage, tuple(packer.shards), tuple(packer.packed), tuple(packer.files))
    data = json.dumps(asdict(commit), ensure_ascii=False).encode()
    return commit if storage.put_if_absent(_commit_uri(out, unit.name), data) else read_unit(storage, out, unit.name)


def read_unit(storage: Storage, out: str, name: str) -> UnitCommit:
    """The commit of a unit.

    Raises:
        ObjectNotFound: it is not committed.
        CatalogError: it is not one of ours.
    """
    uri = _commit_uri(out, name)
    try:
        commit = record_of(UnitCommit)(parse_json(storage.read(uri, max_bytes=MAX_RECORD_BYTES)))
        shards = {uri for uri, _ in commit.shards}
        if commit.name != name or any(packed.row.get("uri") not in shards for packed in commit.packed):
            raise ValueError(f"it is that of {commit.name!r:.80}, or its rows lie in another shard")
        return commit
    except (ValueError, TypeError) as error:
        raise CatalogError(f"{uri} is not the commit of a unit ({error}); remove it and pack again") from error


def _archive_problem(storage: Storage, uri: str) -> str:
    """Why none of an archive can be read; empty if it can, or its reader is to say so.

    Raises:
        StorageUnavailable, AccessDenied: the store is at fault, or the credentials are.
    """
    try:
        storage.read_range(uri, 0, 1)
    except ChecksumMismatch:
        return ""
    except StorageError as error:
        if is_store_fault(uri, error):
            raise
        return f"at its start: {error}"
    return ""


def _commit_uri(out: str, name: str) -> str:
    return join(out, "shards", f"{name}.json")


class _Packer:
    """The state of packing one unit: shards that are open (one a split), what is packed, and the verdicts so far."""

    def __init__(
        self,
        storage: Storage,
        out: str,
        unit: Unit,
        clips: Mapping[str, Wanted | str],
        replaced: AbstractSet[str],
        settings: PackSettings,
        stack: ExitStack,
    ) -> None:
        self._storage, self._out, self._unit, self._settings, self._stack = storage, out, unit, settings, stack
        self._clips = clips
        self._replaced = frozenset() if unit.is_replacement else replaced
        self._decoder = shared_sandbox(1)
        self._writers: dict[str, ShardWriter] = {}
        self._num_shards: dict[str, int] = {}
        self._keys: set[str] = set()
        self.shards: list[tuple[str, int]] = []
        self.packed: list[Packed] = []
        self.files: list[FileVerdict] = []

    def pack_archive(self, archive: Archive) -> None:
        """Judge and pack the members, as they come."""
        source = self._unit.files[0]
        for member in archive:
            name = printable(member.name)
            key, verdict, reason = _judge_member(member, self._clips)
            if verdict:
                self._note(source.uri, name, key, verdict, reason, "")
            elif not self._is_taken(source.uri, name, key, member.size_bytes):
                try:
                    data = archive.read()
                except DamagedArchive as error:
                    self._refuse(source.uri, name, key, error)
                    continue
                video = PlannedVideo("", member.name, f"{source.uri}#{name}", 0, None, None, "")
                self._pack(source.uri, name, key, video, data)

    def pack_files(self) -> None:
        """Judge and pack the part's files; those that are wanted are read a few ahead."""
        judged = [(file, *judge_name(file.name, self._clips)) for file in self._unit.files]
        max_bytes = self._settings.decode.max_bytes
        wanted = [
            file for file, key, verdict, _ in judged if self._is_read(key, verdict) and file.size_bytes <= max_bytes
        ]
        blobs = read_videos(self._storage, [Reference(file.uri) for file in wanted], max_bytes=max_bytes)
        for file, key, verdict, reason in judged:
            uri = printable(file.uri)
            if verdict:
                self._note(uri, None, key, verdict, reason, "")
                continue
            read = self._is_read(key, verdict) and file.size_bytes <= max_bytes
            data = next(blobs) if read else b""
            if self._is_taken(uri, None, key, file.size_bytes):
                continue
            if isinstance(data, KinorayError):
                if is_store_fault(file.uri, data):
                    raise data
                self._refuse(uri, None, key, data)
                continue
            self._pack(uri, None, key, PlannedVideo("", file.name, file.uri, 0, None, None, ""), data)

    def _is_read(self, key: str, verdict: str) -> bool:
        return not verdict and key not in self._replaced

    def _is_taken(self, source: str, member: str | None, key: str, size_bytes: int) -> bool:
        """Whether a wanted file need not be looked at; then its verdict is noted."""
        if key in self._replaced:
            self._note(source, member, key, "replaced", "", "a replacement of this clip is packed")
        elif key in self._keys:
            self._note(source, member, key, "duplicate", "", "an earlier file of this clip is packed")
        elif size_bytes > self._settings.decode.max_bytes:
            text = f"{size_bytes} bytes are more than decode.max_bytes = {self._settings.decode.max_bytes}"
            self._note(source, member, key, "unreadable", "MediaOverBudget", text)
        else:
            return False
        return True

    def _pack(self, source: str, member: str | None, key: str, video: PlannedVideo, data: bytes) -> None:
        wanted = self._clips[key]
        assert not isinstance(wanted, str)
        try:
            examined = examine(self._decoder, data, self._settings.decode, transcoded=self._settings.transcoded)
        except MediaError as error:
            self._refuse(source, member, key, error)
            return
        short = self._too_short(wanted, examined.info.duration_s)
        if short:
            self._note(source, member, key, "too_short", "TooShort", short)
            return
        self._add(wanted, key, video, examined, hashlib.sha256(data).hexdigest())
        self._note(source, member, key, "packed", "", "")

    def _too_short(self, wanted: Wanted, duration_s: float) -> str:
        if wanted.time_start_s is None or wanted.time_end_s is None:
            return ""
        window_s = wanted.time_end_s - wanted.time_start_s
        if duration_s >= _MIN_CLIP_FRACTION * window_s:
            return ""
        return f"{duration_s:.2f} s of a clip of {window_s:g} s; {_MIN_CLIP_FRACTION:.0%} of it must be there"

    def _add(self, wanted: Wanted, key: str, video: PlannedVideo, examined: Examined, source_sha256: str) -> None:
        writer = self._writers.get(wanted.split)
        if writer and writer.size_bytes + len(examined.data) > self._settings.shard_bytes:
            self._put(wanted.split)
            writer = None
        if writer is None:
            writer = self._writers[wanted.split] = self._stack.enter_context(ShardWriter())
        named = PlannedVideo(
            wanted.video_id,
            video.name,
            video.uri,
            len(examined.data),
            wanted.label,
            wanted.label_id,
            wanted.split,
        )
        extra = {"time_start_s": wanted.time_start_s, "time_end_s": wanted.time_end_s}
        row = writer.add(named, examined, extra)
        self.packed.append(Packed(len(self.files), source_sha256, row))
        self._keys.add(key)

    def _put(self, split: str) -> None:
        number = self._num_shards.get(split, 0)
        self._num_shards[split] = number + 1
        name = f"shard-{split_name(split)}-{self._unit.name}-{number:03d}"
        writer = self._writers.pop(split)
        self.shards.append(writer.put(self._storage, self._out, name, tagged=True))
        writer.close()

    def finish(self) -> None:
        """Store the shards that are still open."""
        for split in sorted(self._writers):
            self._put(split)

    def _refuse(self, source: str, member: str | None, key: str, error: KinorayError) -> None:
        self._note(source, member, key, "unreadable", type(error).__name__, " ".join(str(error).split()))

    def _note(self, source: str, member: str | None, key: str, verdict: str, reason: str, detail: str) -> None:
        self.files.append(FileVerdict(source, member, len(self.files), key, verdict, reason, detail))


def _judge_member(member: Member, clips: Mapping[str, Wanted | str]) -> tuple[str, str, str]:
    if member.kind == "folder":
        return "", "folder", "a folder"
    key, verdict, reason = judge_name(member.name, clips)
    if member.kind != "file" and verdict != "unsafe_name":
        return key, "not_regular", f"a {member.kind}" if member.kind == "link" else "a device, pipe or sparse file"
    return key, verdict, reason
