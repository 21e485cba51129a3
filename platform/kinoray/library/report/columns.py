"""The data files of the report's site: columns of rows as JavaScript calls, so that a page opened from a disk can load
them (a browser lets no such page fetch JSON).

What is easy to break: names come from strangers. They are in these files only as JSON strings in ASCII, with `<`, `>`
and `&` escaped, never as code, keys or file names.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinoray.library.report.numbers import Numbers

__all__ = [
    "ROWS_PER_FILE",
    "STRIPS_PER_FILE",
    "Names",
    "collect_names",
    "data_file",
    "id_ranks",
    "row_columns",
    "site_record",
]

ROWS_PER_FILE = 2_000
STRIPS_PER_FILE = 10
"""So many that a page of 50 needs 5 files in the first order, so few that any other order does not load too much."""

_STATUSES = ("labelled", "quarantined", "skipped")
_NUM_CONFUSED = 3
_DIGITS = 6
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def data_file(name: str, build: str, value: Any) -> bytes:
    """One data file: a call that hands `value` (JSON-able) to the page under this name."""
    text = json.dumps([name, build, value], separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return f"kinoray.deliver(...{text});\n".encode("ascii")


@dataclass(frozen=True, slots=True)
class Names:
    """What rows refer to by number."""

    labels: tuple[str, ...]
    """Those of the numbers in their order, then those that are never a first answer."""
    reasons: tuple[str, ...]
    splits: tuple[str, ...]


def collect_names(listed: pa.Table, numbers: Numbers) -> Names:
    """All names of the listed rows."""
    labels = dict.fromkeys(row.name for row in numbers.classes)
    labels |= dict.fromkeys(sorted(_distinct(pc.list_flatten(listed["label_topk"])) | _distinct(listed["true_label"])))
    reasons = pc.coalesce(listed["error_class"], listed["status"]).filter(pc.not_equal(listed["status"], "labelled"))
    return Names(tuple(labels), tuple(sorted(_distinct(reasons))), tuple(sorted(_distinct(listed["split"]))))


def _distinct(column: pa.ChunkedArray) -> set[str]:
    return {value for value in pc.unique(column).to_pylist() if value is not None}


def row_columns(rows: pa.Table, names: Names) -> dict[str, list[Any]]:
    """Rows as lists, one a column; names are numbers (-1 for none), addresses are told once."""
    uris, uri = _coded(rows["uri"])
    labelled = pc.equal(rows["status"], "labelled")
    reason = pc.if_else(labelled, None, pc.coalesce(rows["error_class"], rows["status"]))
    tops = [item or [] for item in rows["label_topk"].to_pylist()]
    place = {name: index for index, name in enumerate(names.labels)}
    return {
        "id": rows["video_id"].to_pylist(),
        "rank": rows["rank"].to_pylist(),
        "uris": uris,
        "uri": uri,
        "offset": rows["offset"].to_pylist(),
        "length": rows["length"].to_pylist(),
        "key": rows["row_key"].to_pylist(),
        "status": _places(rows["status"], _STATUSES),
        "reason": _places(reason, names.reasons),
        "text": rows["error_text"].to_pylist(),
        "top": [[place[label] for label in item] for item in tops],
        "scores": [[round(score, _DIGITS) for score in item or []] for item in rows["score_topk"].to_pylist()],
        "margin": _rounded(rows["margin"]),
        "entropy": _rounded(rows["entropy"]),
        "abstained": [int(value) for value in rows["abstained"].to_pylist()],
        "truth": _places(rows["true_label"], names.labels),
        "split": _places(rows["split"], names.splits),
        "strip": rows["strip"].to_pylist(),
    }


def _coded(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_pylist()


def _places(column: pa.ChunkedArray, names: Sequence[str]) -> list[int]:
    found: list[int] = pc.fill_null(pc.index_in(column, value_set=pa.array(names, pa.string())), -1).to_pylist()
    return found


def _rounded(column: pa.ChunkedArray) -> list[float | None]:
    return [None if value is None else round(value, _DIGITS) for value in column.to_pylist()]


def id_ranks(ids: Sequence[str]) -> list[int]:
    """The place of each id in the order of people: v2 before v10."""
    order = sorted(range(len(ids)), key=lambda index: (_natural(ids[index]), ids[index]))
    ranks = [0] * len(ids)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def _natural(text: str) -> list[tuple[int, str]]:
    """Pieces of text, digits as (number of digits, digits): longer numbers are larger."""
    parts = re.split(r"0*([0-9]+)", text)
    return [(len(part) if index % 2 else 0, part.casefold()) for index, part in enumerate(parts)]


def site_record(numbers: Numbers, names: Names, listed: pa.Table, title: str, table_digest: str) -> dict[str, Any]:
    """What the page must know before any row."""
    return {
        "title": title,
        "digest": table_digest,
        "labels": names.labels,
        "reasons": names.reasons,
        "splits": names.splits,
        "classes": _class_records(numbers),
        "videos": numbers.num_videos,
        "listed": len(listed),
        "rows": -(-len(listed) // ROWS_PER_FILE),
        "perStripFile": STRIPS_PER_FILE,
        "truth": numbers.accuracy is not None,
    }


def _class_records(numbers: Numbers) -> list[dict[str, Any]]:
    """Counts of each class, in the order of the labels, and what it is most often taken for."""
    records = []
    confusion = numbers.confusion
    for index, row in enumerate(numbers.classes):
        record: dict[str, Any] = {
            "predicted": row.num_predicted,
            "meanScore": row.mean_score,
            "called": row.num_called,
            "true": row.num_true,
            "right": row.num_right,
        }
        if confusion is not None:
            taken = confusion.counts[index].copy()
            taken[index] = 0
            most = (-taken).argsort(kind="stable")[:_NUM_CONFUSED].tolist()
            record["takenFor"] = [[other, int(taken[other])] for other in most if taken[other]]
        records.append(record)
    return records
