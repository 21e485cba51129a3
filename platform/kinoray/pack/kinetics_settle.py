"""From what the units of a Kinetics pack found to its tables: one verdict for every row and every file, added up.

Units know nothing of each other, so what concerns two of them is decided here: duplicates, and equal content in two
splits. What is easy to break: the sums are checked against counts that were made elsewhere (rows read, files listed,
members counted by the reader), never against themselves.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from kinoray.catalog.kinetics import TRAIN, AnnotationRow, RowPlan, Wanted
from kinoray.catalog.quarantine import Refusal
from kinoray.errors import IncompleteOutput
from kinoray.pack.kinetics_unit import FileVerdict, Packed, Unit, UnitCommit

__all__ = ["FILE_VERDICTS", "QUARANTINED", "ROW_VERDICTS", "VERDICT_SCHEMA", "Settlement", "settle"]

ROW_VERDICTS = {
    "packed": "the clip is in the catalog",
    "missing": "no usable file of the clip was found",
    "unreadable": "every file of the clip was refused by the decoder, or cut",
    "too_short": "the best file of the clip is much shorter than its window",
    "duplicate": "another row has the same clip",
    "leak": "a row of train whose source video, or content, is in another split, too",
    "beyond_limit": "behind the first --limit rows of its split",
}
"""What can become of an annotation row."""

FILE_VERDICTS = {
    "packed": "in the catalog",
    "unreadable": "the decoder refused it, or it could not be read; the reason is an error class",
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
"""Verdicts whose files are refused for what they are: rows of quarantine.parquet."""

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

_READ_ERRORS = {"DamagedArchive", "ObjectNotFound", "ChecksumMismatch", "StorageError", "AccessDenied"}
_BEST = ("packed", "leak", "too_short", "unreadable")  # what a row gets of the verdicts on its files


class _Winner(NamedTuple):
    commit: int
    packed: Packed


@dataclass(frozen=True, slots=True)
class Settlement:
    """The tables of a finished pack."""

    catalog: Sequence[dict[str, Any]]
    """Rows of CATALOG_SCHEMA."""
    verdicts: pa.Table
    """Rows of VERDICT_SCHEMA: annotation rows, then files, then archives."""
    refused: Sequence[Refusal]
    """Rows of the quarantine table."""
    totals: dict[str, Any]
    """Numbers of all of it."""


def settle(
    rows: Sequence[AnnotationRow],
    plan: RowPlan,
    units: Sequence[Unit],
    commits: Sequence[UnitCommit],
    *,
    keep_leaks: bool,
) -> Settlement:
    """Decide what concerns several units, and add up. `commits` are those of `units`, in their order.

    Raises:
        IncompleteOutput: a row or a file has no verdict, or the sums do not agree.
    """
    winners: dict[str, _Winner] = {}
    changed: dict[tuple[int, int], tuple[str, str]] = {}
    for number, commit in enumerate(commits):
        for packed in commit.packed:
            key = commit.files[packed.position].key
            if winners.setdefault(key, _Winner(number, packed)).packed is not packed:
                changed[number, packed.position] = ("duplicate", f"packed from {commits[winners[key].commit].name}")
    leaks = _equal_content(winners)
    if not keep_leaks:
        for key, other in leaks.items():
            changed[winners[key].commit, winners[key].packed.position] = ("leak", f"its content is that of {other}")
            del winners[key]
    files = [list(_changed(commit, number, changed)) for number, commit in enumerate(commits)]
    row_verdicts = _row_verdicts(rows, plan, files)
    catalog = [winner.packed.row for winner in sorted(winners.values(), key=lambda w: (w.commit, w.packed.position))]
    _require_accounted(rows, row_verdicts, units, commits, files, catalog)
    refused = [_refusal(verdict) for found in files for verdict in found if verdict.verdict in QUARANTINED]
    totals = {
        "rows": _counts(verdict for verdict, _, _ in row_verdicts),
        "files": _counts(verdict.verdict for found in files for verdict in found),
        "unreadable": _counts(
            verdict.reason for found in files for verdict in found if verdict.verdict == "unreadable"
        ),
        "archives": sum(unit.is_archive for unit in units),
        "damaged": {unit.files[0].uri: c.damage for unit, c in zip(units, commits, strict=True) if c.damage},
        "leaks": {"source_video": plan.num_leaks, "content": len(leaks), "between_other_splits": plan.num_between},
        "not_in_catalog": sum(len(commit.packed) for commit in commits) - len(catalog),
    }
    return Settlement(catalog, _table(rows, plan, row_verdicts, units, commits, files), refused, totals)


def _equal_content(winners: dict[str, _Winner]) -> dict[str, str]:
    """Clips of train whose bytes are those of a clip of another split, and that clip."""
    others = {
        winner.packed.source_sha256: f"{winner.packed.row['video_id']} in split {winner.packed.row['split']}"
        for winner in winners.values()
        if winner.packed.row["split"] != TRAIN
    }
    return {
        key: others[winner.packed.source_sha256]
        for key, winner in winners.items()
        if winner.packed.row["split"] == TRAIN and winner.packed.source_sha256 in others
    }


def _changed(commit: UnitCommit, number: int, changed: dict[tuple[int, int], tuple[str, str]]) -> Iterator[FileVerdict]:
    for verdict in commit.files:
        new = changed.get((number, verdict.position))
        yield verdict if new is None else verdict._replace(verdict=new[0], detail=new[1])


def _row_verdicts(
    rows: Sequence[AnnotationRow], plan: RowPlan, files: Sequence[Sequence[FileVerdict]]
) -> list[tuple[str, str, str]]:
    """(verdict, reason, detail) of each row: what was known before, or the best that its files have."""
    best: dict[str, FileVerdict] = {}
    for found in files:
        for verdict in found:
            if verdict.key and verdict.verdict in _BEST:
                there = best.setdefault(verdict.key, verdict)
                if _BEST.index(verdict.verdict) < _BEST.index(there.verdict):
                    best[verdict.key] = verdict
    result = []
    for row, known in zip(rows, plan.verdicts, strict=True):
        file = best.get(row.key)
        if known is not None:
            result.append((known[0], "", known[1]))
        elif file is None:
            result.append(("missing", "", "no file of this clip was found"))
        else:
            result.append((file.verdict, file.reason, file.detail))
    return result


def _require_accounted(
    rows: Sequence[AnnotationRow],
    row_verdicts: Sequence[tuple[str, str, str]],
    units: Sequence[Unit],
    commits: Sequence[UnitCommit],
    files: Sequence[Sequence[FileVerdict]],
    catalog: Sequence[dict[str, Any]],
) -> None:
    for unit, commit, found in zip(units, commits, files, strict=True):
        expected = commit.num_found if unit.is_archive else len(unit.files)
        unknown = {verdict.verdict for verdict in found} - FILE_VERDICTS.keys()
        if len(found) != expected or unknown or [verdict.position for verdict in found] != list(range(expected)):
            raise IncompleteOutput(
                f"pack: {unit.name} ({unit.files[0].uri}) has {len(found)} verdicts for {expected} files, unknown "
                f"ones: {sorted(unknown) or 'none'}; remove shards/{unit.name}.json and run the same command again"
            )
    num_rows = sum(verdict == "packed" for verdict, _, _ in row_verdicts)
    num_files = sum(verdict.verdict == "packed" for found in files for verdict in found)
    unknown = {verdict for verdict, _, _ in row_verdicts} - ROW_VERDICTS.keys()
    if len(row_verdicts) != len(rows) or unknown or not num_rows == num_files == len(catalog):
        raise IncompleteOutput(
            f"pack: {len(row_verdicts)} verdicts for {len(rows)} rows; {num_rows} rows and {num_files} files are "
            f"packed, the catalog has {len(catalog)}; these must agree: this is a fault of kinoray, please report it"
        )


def _refusal(verdict: FileVerdict) -> Refusal:
    error_class, text = verdict.reason, verdict.detail
    stage = "read" if error_class in _READ_ERRORS else "probe"
    if verdict.verdict not in ("unreadable", "too_short"):
        error_class, text, stage = verdict.verdict, verdict.reason, "list"
    where = "" if verdict.member is None else f"{verdict.member}: "
    return Refusal(verdict.key, verdict.source, error_class, f"{where}{text}", stage)


def _table(
    rows: Sequence[AnnotationRow],
    plan: RowPlan,
    row_verdicts: Sequence[tuple[str, str, str]],
    units: Sequence[Unit],
    commits: Sequence[UnitCommit],
    files: Sequence[Sequence[FileVerdict]],
) -> pa.Table:
    def video_id(key: str) -> str | None:
        wanted = plan.clips.get(key)
        return wanted.video_id if isinstance(wanted, Wanted) else key or None

    lines: list[tuple[Any, ...]] = [
        ("row", row.source, row.line, None, video_id(row.key), row.label, row.split, verdict, reason, detail)
        for row, (verdict, reason, detail) in zip(rows, row_verdicts, strict=True)
    ]
    lines += [
        ("file", f.source, f.position, f.member, video_id(f.key), None, None, f.verdict, f.reason, f.detail)
        for found in files
        for f in found
    ]
    lines += [
        ("archive", unit.files[0].uri, None, None, None, None, None, "damaged" if c.damage else "whole", "", c.damage)
        for unit, c in zip(units, commits, strict=True)
        if unit.is_archive
    ]
    columns = zip(*lines, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, VERDICT_SCHEMA, strict=True)],
        schema=VERDICT_SCHEMA,
    )


def _counts(verdicts: Iterator[str]) -> dict[str, int]:
    return dict(Counter(verdicts).most_common())
