"""One unit of a pack: its files are read once, judged, packed into tars, and what became of them is committed.

A unit is whole and committed, or it is not there: the commit (shards/<name>.json, put if absent) is written last, and
holds all that a restart needs. What is easy to break: every file or member of a unit gets exactly one verdict, in the
order in which it was found; and nothing that a commit names is ever written again.
"""

import json
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from kinoray.catalog.read import read_videos
from kinoray.catalog.rows import QuarantineRow, Refusal, judge
from kinoray.config.clip import said_limit
from kinoray.config.shared import DecodeConfig
from kinoray.errors import (
    AccessDenied,
    CatalogError,
    ChecksumMismatch,
    DamagedArchive,
    KinorayError,
    MediaError,
    StorageError,
)
from kinoray.pack.plan import FileVerdict, PlannedVideo, Unit, split_name
from kinoray.pack.tars import Archive, Examined, Member, ShardWriter, examine, open_archive
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_json, record_of
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = ["Commit", "MemberJudge", "PackSettings", "Packed", "Tar", "pack_unit", "quarantine_row", "read_commit"]

MemberJudge = Callable[[str, Member], PlannedVideo | FileVerdict]
"""What is wanted of a member of the archive at a uri."""

_MIN_CLIP_FRACTION = 0.2  # of its window that a clip must last at least


@dataclass(frozen=True, slots=True)
class PackSettings:
    """What decides whether and how a file is packed."""

    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits that a file is probed against."""
    transcoded: bool = False
    """Whether the original bytes are packed, or what transcode.py makes of them."""
    shard_bytes: int = 2**28
    """Of a unit that is not one shard: how large its tars get."""


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar that was written."""

    uri: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A video in a tar."""

    position: int
    """Place of its verdict in the commit."""
    tar: int
    """Place of its tar in the commit."""
    offset: int
    length: int
    sha256: str
    source_sha256: str
    """Of the bytes that were found, before any transcoding."""
    video_id: str
    label: str | None
    label_id: int | None
    split: str
    time_start_s: float | None
    time_end_s: float | None
    duration_s: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str
    reason: str | None
    """What the catalog says of it, if anything."""
    label_ids: tuple[int, ...] | None = None
    """Of a video that may have several classes."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What became of everything in a unit."""

    name: str
    """The unit's."""
    num_found: int
    """Files or members, counted where they were found."""
    damage: str
    """Why an archive could not be read to its end; empty if it was."""
    tars: tuple[Tar, ...]
    packed: tuple[Packed, ...]
    """In the order of their verdicts, which is that of their offsets in each tar."""
    files: tuple[FileVerdict, ...]
    """One for each file or member, in the order in which they were found."""

    def row(self, packed: Packed) -> dict[str, Any]:
        """A video's row of CATALOG_SCHEMA."""
        row = asdict(packed)
        return {**row, "uri": self.tars[packed.tar].uri, "size_bytes": packed.length, "status": "packed"}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of CATALOG_SCHEMA for all that is packed."""
        return [self.row(packed) for packed in self.packed]

    @property
    def refused(self) -> list[QuarantineRow]:
        """Rows of the quarantine table for all that is unreadable."""
        return [quarantine_row(file) for file in self.files if file.verdict == "unreadable"]


def quarantine_row(file: FileVerdict) -> QuarantineRow:
    """The row of the quarantine table of a file that was quarantined."""
    refusal = file.refusal
    assert refusal is not None
    if file.member is not None:
        refusal = Refusal(refusal.stage, refusal.error_class, f"{file.member}: {refusal.error_text}")
    return QuarantineRow(file.key, file.source, refusal, file.offset, file.length)


def pack_unit(
    storage: Storage,
    out: str,
    unit: Unit,
    settings: PackSettings,
    *,
    judge_member: MemberJudge | None = None,
    replaced: AbstractSet[str] = frozenset(),
    saw: Callable[[int], None] = lambda done: None,
) -> Commit:
    """Pack what is wanted of a unit and commit it. Of several that do the same, one commits; the winner's is returned.

    Args:
        judge_member: of an archive, says what is wanted.
        replaced: keys of which a replacement is packed.
        saw: is told how many files of a unit that is no archive are done; for the eyes only.

    Raises:
        StorageUnavailable, AccessDenied: the store is at fault, or no file may be read; nothing was committed.
        StorageError: out cannot be written; nothing was committed.
        DecoderStartFailed: no decoder process can be started here.
    """
    damage, num_found = "", len(unit.files)
    with ExitStack() as stack:
        packer = _Packer(storage, out, unit, settings, frozenset() if unit.is_replacement else replaced, stack)
        if unit.archive:
            uri = unit.archive.uri
            assert judge_member is not None
            damage, num_found = _archive_problem(storage, uri), 0
            if not damage:
                archive = open_archive(storage, uri)
                packer.pack_archive(uri, archive, judge_member)
                damage, num_found = archive.damage, archive.num_members
        else:
            packer.pack_files(saw)
            _require_some_access(unit, packer.files)
        packer.finish()
    commit = Commit(unit.name, num_found, damage, tuple(packer.tars), tuple(packer.packed), tuple(packer.files))
    data = json.dumps(asdict(commit), ensure_ascii=False).encode()
    return commit if storage.put_if_absent(_commit_uri(out, unit.name), data) else read_commit(storage, out, unit.name)


def read_commit(storage: Storage, out: str, name: str) -> Commit:
    """The commit of a unit.

    Raises:
        ObjectNotFound: it is not committed.
        CatalogError: it is not one of ours.
    """
    uri = _commit_uri(out, name)
    try:
        commit = record_of(Commit)(parse_json(storage.read(uri)))
        if commit.name != name:
            raise ValueError(f"it is that of {commit.name!r:.80}")
        for packed in commit.packed:
            if not (0 <= packed.tar < len(commit.tars) and 0 <= packed.position < len(commit.files)):
                raise ValueError(f"{packed.video_id!r:.80} lies in another shard")
        return commit
    except (ValueError, TypeError) as error:
        raise CatalogError(f"{uri} is not the commit of a unit ({error}); remove it and pack again") from error


def _archive_problem(storage: Storage, uri: str) -> str:
    """Why none of an archive can be read; empty if it can, or its reader is to say so.

    Raises:
        StorageUnavailable, BadCredentials: the store is at fault, or the credentials are.
    """
    try:
        storage.read_range(uri, 0, 1)
    except ChecksumMismatch:
        return ""
    except StorageError as error:
        return f"at its start: {judge(error, 'read').error_text}"
    return ""


def _require_some_access(unit: Unit, files: Sequence[FileVerdict]) -> None:
    """One file that may not be read is a row; a unit of nothing else means that the job cannot read its source."""
    denied = [file.refusal.error_text for file in files if file.refusal and file.refusal.error_class == "AccessDenied"]
    if len(denied) == len(unit.files) > 1:
        raise AccessDenied(
            f"none of the {len(denied)} files of {unit.name} may be read, so nothing was quarantined; the first: "
            f"{denied[0]}; check the credentials, or leave these files out of the source"
        )


def _commit_uri(out: str, name: str) -> str:
    return join(out, "shards", f"{name}.json")


@dataclass(slots=True)
class _Open:
    """A tar that is being written."""

    number: int
    """Its place in the commit."""
    name: str
    writer: ShardWriter


class _Packer:
    """The state of packing one unit: tars that are open (one a split), what is packed, and the verdicts so far."""

    def __init__(
        self,
        storage: Storage,
        out: str,
        unit: Unit,
        settings: PackSettings,
        replaced: AbstractSet[str],
        stack: ExitStack,
    ) -> None:
        self._storage = storage
        self._out = out
        self._unit = unit
        self._settings = settings
        self._replaced = replaced
        self._stack = stack
        self._decoder = shared_sandbox(1)
        self._open: dict[str, _Open] = {}
        self._num_tars: dict[str, int] = {}
        self._keys: set[str] = set()
        self._stored: dict[int, Tar] = {}
        self.packed: list[Packed] = []
        self.files: list[FileVerdict] = []

    @property
    def tars(self) -> list[Tar]:
        """What was stored, in the order in which it was begun."""
        return [self._stored[number] for number in sorted(self._stored)]

    def pack_files(self, saw: Callable[[int], None]) -> None:
        """Pack the unit's files; a few of those that are wanted are prefetched."""
        wanted = [file for file in self._unit.files if isinstance(file, PlannedVideo) and self._is_read(file)]
        references = [video.reference for video in wanted]
        blobs = read_videos(self._storage, references, max_bytes=self._settings.decode.max_bytes)
        for done, file in enumerate(self._unit.files):
            saw(done)
            if isinstance(file, FileVerdict):
                self.files.append(file)
                continue
            data = next(blobs) if self._is_read(file) else b""
            if self._is_settled(file):
                continue
            if isinstance(data, KinorayError):
                self._refuse(file, judge(data, "read"))
            else:
                self._pack(file, data)

    def pack_archive(self, uri: str, archive: Archive, judge_member: MemberJudge) -> None:
        """Judge and pack the members, as they come."""
        for member in archive:
            wanted = judge_member(uri, member)
            if isinstance(wanted, FileVerdict):
                self.files.append(wanted)
                continue
            if self._is_settled(wanted):
                continue
            try:
                data = archive.read()
            except DamagedArchive as error:
                self._refuse(wanted, judge(error, "read"))
                continue
            self._pack(wanted, data)

    def _is_read(self, video: PlannedVideo) -> bool:
        return video.key not in self._replaced and video.size_bytes <= self._settings.decode.max_bytes

    def _is_settled(self, video: PlannedVideo) -> bool:
        """Whether a wanted file need not be looked at; then its verdict is noted."""
        max_bytes = self._settings.decode.max_bytes
        if video.key in self._replaced:
            self._note(video, "replaced", note="a replacement of this clip is packed")
        elif video.key in self._keys:
            self._note(video, "duplicate", note="an earlier file of this clip is packed")
        elif video.size_bytes > max_bytes:  # not even read
            text = f"{video.size_bytes:,} bytes are more than {said_limit('max_bytes', max_bytes)}"
            self._refuse(video, Refusal("list", "MediaOverBudget", text))
        else:
            return False
        return True

    def _pack(self, video: PlannedVideo, data: bytes) -> None:
        try:
            examined = examine(self._decoder, data, self._settings.decode, transcoded=self._settings.transcoded)
        except MediaError as error:
            self._refuse(video, judge(error, "probe"))
            return
        short = _too_short(video, examined.info.duration_s)
        if short:
            self._note(video, "too_short", Refusal("probe", "TooShort", short))
            return
        self._add(video, examined)
        self._note(video, "packed")

    def _add(self, video: PlannedVideo, examined: Examined) -> None:
        tar = self._tar_for(video.split, len(examined.data))
        offset = tar.writer.add(video, examined)
        info = examined.info
        self.packed.append(
            Packed(
                position=len(self.files),
                tar=tar.number,
                offset=offset,
                length=len(examined.data),
                sha256=examined.sha256,
                source_sha256=examined.source_sha256,
                video_id=video.video_id,
                label=video.label,
                label_id=video.label_id,
                split=video.split,
                time_start_s=video.time_start_s,
                time_end_s=video.time_end_s,
                duration_s=info.duration_s,
                fps=info.fps,
                num_frames=info.num_frames,
                width=info.width,
                height=info.height,
                codec=info.codec,
                reason=examined.note,
                label_ids=video.label_ids,
            )
        )
        self._keys.add(video.key)

    def _tar_for(self, split: str, num_bytes: int) -> _Open:
        """The tar that a video of a split goes into."""
        tar = self._open.get(split)
        if tar and not self._unit.is_one_shard and tar.writer.size_bytes + num_bytes > self._settings.shard_bytes:
            self._store(split)
            tar = None
        if tar is None:
            number = self._num_tars.get(split, 0)
            self._num_tars[split] = number + 1
            many = f"shard-{split_name(split)}-{self._unit.name}-{number:03d}"
            name = self._unit.name if self._unit.is_one_shard else many
            writer = self._stack.enter_context(ShardWriter())
            tar = self._open[split] = _Open(sum(self._num_tars.values()) - 1, name, writer)
        return tar

    def _store(self, split: str) -> None:
        tar = self._open.pop(split)
        tagged = self._settings.transcoded or not self._unit.is_one_shard
        self._stored[tar.number] = Tar(*tar.writer.put(self._storage, self._out, tar.name, tagged=tagged))
        tar.writer.close()

    def finish(self) -> None:
        """Store the tars that are still open."""
        for split in sorted(self._open):
            self._store(split)

    def _refuse(self, video: PlannedVideo, refusal: Refusal) -> None:
        self._note(video, "unreadable", refusal)

    def _note(self, video: PlannedVideo, verdict: str, refusal: Refusal | None = None, note: str = "") -> None:
        place = (video.offset, video.length)
        self.files.append(FileVerdict(video.source, video.member, video.key, verdict, refusal, note, *place))


def _too_short(video: PlannedVideo, duration_s: float) -> str:
    if video.time_start_s is None or video.time_end_s is None:
        return ""
    window_s = video.time_end_s - video.time_start_s
    if duration_s >= _MIN_CLIP_FRACTION * window_s:
        return ""
    return f"{duration_s:.2f} s of a clip of {window_s:g} s; {_MIN_CLIP_FRACTION:.0%} of it must be there"
