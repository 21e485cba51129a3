"""The Kinetics planner: units of archives and loose files, what is wanted of each file, and the verdict on every row.

Units know nothing of each other, so what concerns two of them is decided here once all are done: duplicates, and equal
content in two splits. What is easy to break: everything is decided by annotations, names, contents and the order of
units, never by which task ends first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from kinoray.catalog.annotations import read_annotations, read_label_names
from kinoray.catalog.kinetics import (
    OFFICIAL_CLASSES,
    TRAIN,
    AnnotationRow,
    RowPlan,
    Wanted,
    judge_name,
    key_of_name,
    plan_rows,
    printable,
)
from kinoray.catalog.rows import Refusal
from kinoray.catalog.source import SourceFile, find_files
from kinoray.config.shared import digest
from kinoray.console import many, visible
from kinoray.errors import CatalogError, ConfigError, IncompleteOutput, TooManyBad
from kinoray.pack.config import PackConfig
from kinoray.pack.plan import FileVerdict, Plan, PlannedVideo, Unit, cut_evenly
from kinoray.pack.splits import share
from kinoray.pack.tars import Member, is_archive
from kinoray.pack.unit import Commit, Packed
from kinoray.storage.objects import Storage, absolute, is_s3, join

__all__ = [
    "FILE_VERDICTS",
    "QUARANTINED",
    "ROW_VERDICTS",
    "VERDICT_SCHEMA",
    "ClipJudge",
    "KineticsPlan",
    "Winners",
    "choose_winners",
    "kinetics_totals",
    "plan_kinetics",
    "print_kinetics",
    "require_usable_kinetics",
    "row_verdicts",
    "verdict_table",
]

ROW_VERDICTS = {
    "packed": "the clip is in the catalog",
    "missing": "no usable file of the clip was found",
    "unreadable": "no file of the clip can be decoded, or all are cut",
    "too_short": "the best file of the clip is much shorter than its window",
    "duplicate": "another row has the same clip",
    "leak": "a row of train whose source video, or content, is in another split, too",
    "beyond_limit": "behind the first --limit rows of its split",
}
"""What can become of an annotation row."""

FILE_VERDICTS = {
    "packed": "in the catalog",
    "unreadable": "it could not be read or decoded; the reason is an error class",
    "too_short": "much shorter than its window",
    "duplicate": "an earlier file of the same clip is packed",
    "replaced": "a replacement of the same clip is packed",
    "leak": "its row leaks",
    "beyond_limit": "its row is behind the limit",
    "not_annotated": "no annotation row has this clip",
    "not_a_video": "hidden (also `._*`), or its name does not end as a video's does",
    "not_regular": "a link, a device, a pipe, a sparse file or a malformed header",
    "unsafe_name": "absolute, with .., with control characters, too long, or not UTF-8",
    "folder": "a folder's entry in an archive",
}
"""What can become of a file or a member of an archive."""

QUARANTINED = frozenset({"unreadable", "too_short", "not_a_video", "not_regular", "unsafe_name"})
"""Verdicts whose files are quarantined for what they are: rows of quarantine.parquet."""

VERDICT_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("subject", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("number", pa.int64()),
        pa.field("member", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
"""subject is `row`, `file` (also a member) or `archive`; number is the line, or the place in archive or part."""

_BEST = ("packed", "leak", "too_short", "unreadable")  # what a row gets of the verdicts on its files


@dataclass(frozen=True, slots=True, kw_only=True)
class KineticsPlan(Plan):
    """A plan by annotations."""

    rows: Sequence[AnnotationRow]
    """Of all annotation files."""
    wanted: RowPlan
    """What each row asks for."""
    keep_leaks: bool
    """Whether clips of train stay whose content is in another split, too."""


@dataclass(frozen=True, slots=True)
class ClipJudge:
    """Says what is wanted of a file or member, by its name."""

    clips: Mapping[str, Wanted | str]
    """As of a RowPlan."""

    def __call__(self, uri: str, member: Member) -> PlannedVideo | FileVerdict:
        """Of a member of the archive at `uri`."""
        name = printable(member.name)
        if member.kind == "folder":
            return FileVerdict(uri, name, "", "folder", Refusal("list", "folder", "a folder"))
        key, verdict, reason = judge_name(member.name, self.clips)
        if member.kind != "file" and verdict != "unsafe_name":
            verdict = "not_regular"
            reason = f"a {member.kind}" if member.kind == "link" else "a device, pipe or sparse file"
        if verdict:
            return FileVerdict(uri, name, key, verdict, Refusal("list", verdict, reason))
        return self._planned(key, SourceFile(member.name, f"{uri}#{name}", member.size_bytes), name)

    def file(self, file: SourceFile) -> PlannedVideo | FileVerdict:
        """Of a loose file."""
        key, verdict, reason = judge_name(file.name, self.clips)
        if verdict:
            return FileVerdict(printable(file.uri), None, key, verdict, Refusal("list", verdict, reason))
        return self._planned(key, file, None)

    def _planned(self, key: str, file: SourceFile, member: str | None) -> PlannedVideo:
        wanted = self.clips[key]
        assert not isinstance(wanted, str)
        return PlannedVideo(
            video_id=wanted.video_id,
            name=file.name,
            uri=file.uri,
            size_bytes=file.size_bytes,
            label=wanted.label,
            label_id=wanted.label_id,
            split=wanted.split,
            member=member,
            clip=key,
            time_start_s=wanted.time_start_s,
            time_end_s=wanted.time_end_s,
        )


def plan_kinetics(storage: Storage, config: PackConfig) -> KineticsPlan:
    """The plan of a Kinetics set: replacements first, so that the files they replace are not even decoded.

    Raises:
        CatalogError: the annotations cannot be understood, or the source is empty.
        ConfigError: the source is a list or a catalog.
        StorageError: the source or the annotations cannot be read.
    """
    names = read_label_names(storage, config.label_names) if config.label_names else {}
    rows = read_annotations(storage, config.annotations, names)
    keep_leaks = config.leaks == "keep"
    wanted = plan_rows(rows, limit=config.limit, keep_leaks=keep_leaks)
    files = _find(storage, config.source)
    units = _plan_units(files, ClipJudge(wanted.clips), config.shard_mb * 2**20)
    about = {
        "kinetics": config.kinetics,
        "annotations": digest([row[2:] for row in rows]),
        "limit": config.limit,
        "leaks": config.leaks,
    }
    size_bytes = sum(file.size_bytes for file in files)
    return KineticsPlan(
        labels=wanted.labels,
        units=tuple(units),
        size_bytes=size_bytes,
        about=about,
        word="unit",
        rows=rows,
        wanted=wanted,
        keep_leaks=keep_leaks,
    )


def _find(storage: Storage, source: str) -> list[SourceFile]:
    """Everything below a folder or prefix, or one archive."""
    if source.lower().endswith((".csv", ".parquet")):
        raise ConfigError(f"source {source}: with --kinetics a folder, a prefix or an archive is expected")
    if (not is_s3(source) and Path(source).is_file()) or (is_s3(source) and storage.exists(source)):
        uri = absolute(source)
        return [SourceFile(uri.rpartition("/")[2], uri, storage.stat(uri).size_bytes)]
    files = find_files(storage, source)
    if not files:
        raise CatalogError(f"{source}: found nothing; expected archives or videos")
    return files


def _plan_units(files: Sequence[SourceFile], judge: ClipJudge, part_bytes: int) -> list[Unit]:
    """Cut a source into units: replacements first, then archives by name, then loose files in parts of part_bytes.

    Whatever lies in a folder or archive whose name has `replacement` in it is a replacement. Loose files are mixed by a
    hash of their clip, so that a part is a fair sample of the classes; files of one clip stay in the order of names.
    """
    units: list[Unit] = []
    for first in (True, False):
        found = [file for file in files if ("replacement" in file.name.lower()) == first]
        archives = [file for file in found if is_archive(file.name)]
        loose = [file for file in found if not is_archive(file.name)]
        start = sum(unit.archive is not None for unit in units)
        units += [
            Unit(f"archive-{start + index:05d}", archive=file, is_replacement=first)
            for index, file in enumerate(sorted(archives, key=lambda file: file.name))
        ]
        mixed = sorted(loose, key=lambda file: (share("order", key_of_name(file.name)), file.name))
        start = sum(unit.archive is None for unit in units)
        units += [
            Unit(f"part-{start + index:05d}", tuple(map(judge.file, part)), is_replacement=first)
            for index, part in enumerate(cut_evenly(mixed, [file.size_bytes for file in mixed], part_bytes))
        ]
    return units


@dataclass(frozen=True, slots=True)
class Winners:
    """Which of the packed clips are in the catalog, and what the others are."""

    packed: Sequence[tuple[int, Packed]]
    """(place of the commit, clip), in the order of units."""
    files: Sequence[Sequence[FileVerdict]]
    """The verdicts of each commit, those of clips that did not win changed."""
    num_leaks: int
    """Clips of train whose content is in another split, too."""


def choose_winners(plan: KineticsPlan, commits: Sequence[Commit]) -> Winners:
    """Of each clip the first file, in the order of units; none of train whose bytes are in another split."""
    winners: dict[str, tuple[int, Packed]] = {}
    files = [list(commit.files) for commit in commits]
    for number, commit in enumerate(commits):
        for packed in commit.packed:
            verdict = commit.files[packed.position]
            winner, _ = winners.setdefault(verdict.key, (number, packed))
            if winners[verdict.key][1] is not packed:
                note = f"packed from {commits[winner].name}"
                files[number][packed.position] = replace(verdict, verdict="duplicate", note=note)
    leaks = _equal_content(winners)
    if not plan.keep_leaks:
        for key, other in leaks.items():
            number, packed = winners.pop(key)
            verdict = files[number][packed.position]
            files[number][packed.position] = replace(verdict, verdict="leak", note=f"its content is that of {other}")
    ordered = sorted(winners.values(), key=lambda winner: (winner[0], winner[1].position))
    return Winners(ordered, files, len(leaks))


def _equal_content(winners: Mapping[str, tuple[int, Packed]]) -> dict[str, str]:
    """Clips of train whose bytes are those of a clip of another split, and that clip."""
    others = {
        packed.source_sha256: f"{packed.video_id} in split {packed.split}"
        for _, packed in winners.values()
        if packed.split != TRAIN
    }
    return {
        key: others[packed.source_sha256]
        for key, (_, packed) in winners.items()
        if packed.split == TRAIN and packed.source_sha256 in others
    }


def _reason(verdict: FileVerdict) -> tuple[str, str]:
    """(reason, detail) of a file: an error's class and text, or what its name or another file says."""
    refusal = verdict.refusal
    if refusal is None:
        return "", verdict.note
    if refusal.error_class == verdict.verdict:
        return refusal.error_text, ""
    return refusal.error_class, refusal.error_text


def row_verdicts(plan: KineticsPlan, files: Sequence[Sequence[FileVerdict]]) -> list[tuple[str, str, str]]:
    """(verdict, reason, detail) of each row: what was known before, or the best that its files have.

    Raises:
        IncompleteOutput: rows and files that are packed are not the same number.
    """
    best: dict[str, FileVerdict] = {}
    for found in files:
        for verdict in found:
            if verdict.key and verdict.verdict in _BEST:
                there = best.setdefault(verdict.key, verdict)
                if _BEST.index(verdict.verdict) < _BEST.index(there.verdict):
                    best[verdict.key] = verdict
    result = []
    for row, known in zip(plan.rows, plan.wanted.verdicts, strict=True):
        file = best.get(row.key)
        if known is not None:
            result.append((known[0], "", known[1]))
        elif file is None:
            result.append(("missing", "", "no file of this clip was found"))
        else:
            result.append((file.verdict, *_reason(file)))
    num_rows = sum(verdict == "packed" for verdict, _, _ in result)
    num_files = sum(verdict.verdict == "packed" for found in files for verdict in found)
    unknown = {verdict for verdict, _, _ in result} - ROW_VERDICTS.keys()
    if unknown or num_rows != num_files:
        raise IncompleteOutput(
            f"pack: {num_rows} rows and {num_files} files are packed, unknown verdicts: {sorted(unknown) or 'none'}; "
            "these must agree: this is a fault of kinoray, please report it"
        )
    return result


def verdict_table(
    plan: KineticsPlan,
    rows: Sequence[tuple[str, str, str]],
    commits: Sequence[Commit],
    files: Sequence[Sequence[FileVerdict]],
) -> pa.Table:
    """Rows of VERDICT_SCHEMA: annotation rows, then files, then archives."""

    def video_id(key: str) -> str | None:
        wanted = plan.wanted.clips.get(key)
        return wanted.video_id if isinstance(wanted, Wanted) else key or None

    lines: list[tuple[Any, ...]] = [
        ("row", row.source, row.line, None, video_id(row.key), row.label, row.split, *verdict)
        for row, verdict in zip(plan.rows, rows, strict=True)
    ]
    lines += [
        ("file", f.source, position, f.member, video_id(f.key), None, None, f.verdict, *_reason(f))
        for found in files
        for position, f in enumerate(found)
    ]
    lines += [
        ("archive", unit.archive.uri, None, None, None, None, None, "damaged" if c.damage else "whole", "", c.damage)
        for unit, c in zip(plan.units, commits, strict=True)
        if unit.archive
    ]
    columns = zip(*lines, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, VERDICT_SCHEMA, strict=True)],
        schema=VERDICT_SCHEMA,
    )


def kinetics_totals(
    plan: KineticsPlan,
    rows: Sequence[tuple[str, str, str]],
    commits: Sequence[Commit],
    winners: Winners,
) -> dict[str, Any]:
    """Numbers of rows, files and archives."""
    files = [verdict for found in winners.files for verdict in found]
    unreadable = (verdict.refusal for verdict in files if verdict.verdict == "unreadable")
    return {
        "rows": _counts(verdict for verdict, _, _ in rows),
        "files": _counts(verdict.verdict for verdict in files),
        "unreadable": _counts(refusal.error_class for refusal in unreadable if refusal),
        "archives": sum(unit.archive is not None for unit in plan.units),
        "damaged": {
            unit.archive.uri: commit.damage
            for unit, commit in zip(plan.units, commits, strict=True)
            if unit.archive and commit.damage
        },
        "leaks": {
            "source_video": plan.wanted.num_leaks,
            "content": winners.num_leaks,
            "between_other_splits": plan.wanted.num_between,
        },
        "not_in_catalog": sum(len(commit.packed) for commit in commits) - len(winners.packed),
    }


def _counts(verdicts: Iterable[str]) -> dict[str, int]:
    return dict(Counter(verdicts).most_common())


def print_kinetics(out: str, config: PackConfig, totals: Mapping[str, Any]) -> None:
    """Say what became of every row and file."""

    def added_up(counts: Mapping[str, int]) -> str:
        return " + ".join(f"{count} {name}" for name, count in counts.items()) or "none"

    print(f"pack: {sum(totals['rows'].values())} annotation rows = {added_up(totals['rows'])}")
    print(f"pack: {sum(totals['files'].values())} files and members = {added_up(totals['files'])}")
    if totals["unreadable"]:
        print(f"pack: unreadable: {added_up(totals['unreadable'])}")
    for uri, damage in totals["damaged"].items():
        print(
            f"pack: WARNING: {visible(uri)} is damaged {damage}; its rest is not packed, fetch it again for another "
            "pack"
        )
    leaks = totals["leaks"]
    if any(leaks.values()):
        kept = "removed from train" if config.leaks == "remove" else "kept in train (leaks=keep)"
        print(
            f"pack: leaks into train: {leaks['source_video']} by source video, {leaks['content']} by content, {kept}; "
            f"{leaks['between_other_splits']} source videos are shared by other splits and stay"
        )
    official = OFFICIAL_CLASSES[config.kinetics] if config.kinetics else totals["classes"]
    differs = "" if totals["classes"] == official else f" (official {config.kinetics}: {official})"
    if totals["not_in_catalog"]:
        print(f"pack: {many(totals['not_in_catalog'], 'video')} in the shards, not in the catalog: duplicates or leaks")
    splits = ", ".join(f"{count} {split}" for split, count in totals["splits"].items())
    print(
        f"pack: {totals['packed']} packed ({splits or 'none'}), {many(totals['classes'], 'class')}{differs}, "
        f"{many(totals['shards'], 'shard')}, {totals['video_bytes'] / 1e6:.1f} MB; "
        f"wrote {join(out, 'catalog.parquet')}",
        flush=True,
    )


def require_usable_kinetics(out: str, config: PackConfig, totals: Mapping[str, Any]) -> None:
    """Raise CatalogError where no file is a clip, TooManyBad for more than max_bad_fraction of the wanted files."""
    files = totals["files"]
    bad = files.get("unreadable", 0)
    tried = bad + files.get("packed", 0) + files.get("too_short", 0)
    verdicts = join(out, "verdicts.parquet")
    if not tried:
        raise CatalogError(
            f"pack: none of {sum(files.values())} files and members is a clip of the annotations; {verdicts} says what "
            "each is taken for; names such as <youtube id>_000010_000020.mp4 are expected"
        )
    if bad > config.max_bad_fraction * tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in totals["unreadable"].items())
        raise TooManyBad(
            f"pack: {bad} of {tried} wanted files were quarantined ({reasons}), more than max_bad_fraction "
            f"{config.max_bad_fraction:g}; the reasons are in {verdicts}, the good files are packed"
        )
