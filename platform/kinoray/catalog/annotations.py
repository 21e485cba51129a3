"""Reading annotation files: Kinetics CSV, `path label` lists, `path,label` CSV, JSONL and Parquet.

A format is known by its content, since names lie (`train.csv` may be a space-separated list). What is easy to break: a
row that cannot be understood is an error that names file, line and field, never a row left out.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kinoray.catalog.kinetics import AnnotationRow, clip_key, key_of_name, window_of_key
from kinoray.catalog.table import VIDEO_EXTENSIONS
from kinoray.errors import CatalogError
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import parse_json, parse_table

__all__ = ["read_annotations", "read_label_names"]

_SPLIT_NAMES = {"validation": "val", "validate": "val", "valid": "val", "training": "train", "testing": "test"}
_UNLABELLED = {"test", "holdout", "unlabelled"}
_PATH_FIELDS = ("path", "video", "uri", "video_path")
_REMEDY = (
    "expected label,youtube_id,time_start,time_end[,split] (Kinetics), path,label[,split], lines `path label`, JSON "
    "lines or Parquet with these fields"
)
_Fields = tuple[int, Mapping[str, Any]]
_ENDINGS = "|".join(re.escape(ending) for ending in sorted(VIDEO_EXTENSIONS))
_LISTED = re.compile(rf"(?P<path>.+?(?:{_ENDINGS}))\s+(?P<label>\S.*)", re.IGNORECASE)


def read_annotations(storage: Storage, uris: Sequence[str], label_names: Mapping[int, str]) -> list[AnnotationRow]:
    """All rows of all files, in their order. A row without a split has that of its file's name (train, val, test).

    Labels that are numbers become names if `label_names` has any.

    Raises:
        CatalogError: a file is named twice, is of no known format, or has a row that cannot be understood.
        StorageError: a file cannot be read.
    """
    rows: list[AnnotationRow] = []
    for index, uri in enumerate(uris):
        if absolute(uri) in map(absolute, uris[:index]):
            raise CatalogError(f"annotations: {uri} is named twice; name each file once")
        before = len(rows)
        rows.extend(_row(uri, line, fields, label_names) for line, fields in _read_fields(uri, storage.read(uri)))
        if len(rows) == before:
            raise CatalogError(f"{uri} has no row; {_REMEDY}")
    return rows


def read_label_names(storage: Storage, uri: str) -> dict[int, str]:
    """The classes' names by number: one name a line (counted from 0), lines `number,name`, or JSON (list, or object).

    A JSON object maps names to numbers, or numbers to names.

    Raises:
        CatalogError: it is none of these, or names a number twice.
        StorageError: it cannot be read.
    """
    text = _decode(uri, storage.read(uri))
    pairs: list[tuple[Any, Any]]
    if text.lstrip().startswith(("[", "{")):
        try:
            found = parse_json(text)
        except ValueError as error:
            raise CatalogError(f"label_names {uri} is not JSON: {error}") from error
        pairs = list(enumerate(found)) if isinstance(found, list) else list(found.items())
        pairs = [(value, key) if isinstance(value, int) else (key, value) for key, value in pairs]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        numbered = [re.fullmatch(r"(\d+)\s*[,\t ]\s*(.+)", line) for line in lines]
        pairs = [(m[1], m[2].strip('"')) for m in numbered if m] if all(numbered) else list(enumerate(lines))
    names: dict[int, str] = {}
    for number, name in pairs:
        if not str(number).isdigit() or not isinstance(name, str) or int(number) in names:
            raise CatalogError(f"label_names {uri}: number {number!r} with name {name!r}; expected each number once")
        names[int(number)] = name
    if not names:
        raise CatalogError(f"label_names {uri} is empty; expected one class name a line, in the order of their numbers")
    return names


def _decode(uri: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{uri} is not UTF-8 text ({error}); {_REMEDY}") from error


def _read_fields(uri: str, data: bytes) -> Iterator[_Fields]:
    """(line, fields by lower-case name) of each row, whatever the format."""
    if data.startswith(b"PAR1"):
        yield from _read_parquet(uri, data)
        return
    text = _decode(uri, data)
    head = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if head.startswith("{"):
        yield from _read_jsonl(uri, text)
    elif "," in head and not (_LISTED.fullmatch(head) and "," not in _LISTED.sub(r"\g<path>", head)):
        yield from _read_csv(uri, text)
    else:
        yield from _read_list(uri, text)


def _read_parquet(uri: str, data: bytes) -> Iterator[_Fields]:
    try:
        table = parse_table(data)
    except pa.ArrowException as error:
        raise CatalogError(f"{uri} is not Parquet: {' '.join(str(error).split())}") from error
    names = [name.lower() for name in table.schema.names]
    for number, row in enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True), 1):
        yield number, dict(zip(names, row, strict=True))


def _read_jsonl(uri: str, text: str) -> Iterator[_Fields]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise CatalogError(f"{uri} line {number} is not JSON ({error}); expected one object a line") from error
        if not isinstance(found, dict):
            raise CatalogError(f"{uri} line {number}: expected an object, found {line.strip()[:60]!r}")
        yield number, {str(key).lower(): value for key, value in found.items()}


def _read_csv(uri: str, text: str) -> Iterator[_Fields]:
    """With a header that names a clip, or rows `path,label[,split]` without one."""
    rows = csv.reader(io.StringIO(text, newline=""))
    names: list[str] | None = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [cell.strip().lower() for cell in row]
                if {"youtube_id", *_PATH_FIELDS} & set(names):
                    continue
                if not _is_video(row[0].strip()):
                    raise CatalogError(f"{uri} line {rows.line_num}: found {','.join(row)[:100]!r}; {_REMEDY}")
                names = ["path", "label", "split"]
            if len(row) > len(names):
                raise CatalogError(
                    f"{uri} line {rows.line_num}: {len(row)} fields, expected at most {len(names)} "
                    f"({','.join(names)}); put quotes around a name that holds a comma"
                )
            yield rows.line_num, dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise CatalogError(f"{uri} line {rows.line_num} is not CSV ({error}); {_REMEDY}") from error


def _read_list(uri: str, text: str) -> Iterator[_Fields]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LISTED.fullmatch(line.strip())
        if match is None and not _is_video(line.strip()):
            raise CatalogError(f"{uri} line {number}: found {line.strip()[:100]!r}, no video and label; {_REMEDY}")
        yield number, match.groupdict() if match else {"path": line.strip()}


def _is_video(name: str) -> bool:
    return bool(re.fullmatch(rf".+(?:{_ENDINGS})", name, re.IGNORECASE))


def _row(uri: str, line: int, fields: Mapping[str, Any], label_names: Mapping[int, str]) -> AnnotationRow:
    where = f"{uri} line {line}"
    window = (_time(where, "time_start", fields), _time(where, "time_end", fields))
    youtube_id = _text(fields, "youtube_id")
    path = next((text for name in _PATH_FIELDS if (text := _text(fields, name))), "")
    if youtube_id:
        if window[0] is None or window[1] is None:
            raise CatalogError(f"{where}: time_start and time_end are needed beside youtube_id {youtube_id!r}")
        key = clip_key(youtube_id, window[0], window[1])
    elif path:
        key = key_of_name(path)
    else:
        raise CatalogError(f"{where}: youtube_id and path are empty; a row needs one of them")
    if window == (None, None):
        window = window_of_key(key) or window
    start, end = window
    if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start < end):
        raise CatalogError(f"{where}: time_start {start} and time_end {end}; expected 0 <= time_start < time_end")
    split = _split(where, uri, _text(fields, "split"))
    label = _label(where, _text(fields, "label"), label_names)
    if label is None and split not in _UNLABELLED:
        raise CatalogError(
            f"{where}: the label is empty; only the splits {', '.join(sorted(_UNLABELLED))} may have none"
        )
    return AnnotationRow(uri, line, key, label, split, start, end)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps, written by pandas
        value = int(value)
    return "" if value is None else str(value).strip()


def _time(where: str, name: str, fields: Mapping[str, Any]) -> float | None:
    text = _text(fields, name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CatalogError(f"{where}: {name} is {text!r}; expected seconds, such as 10")
    return value


def _split(where: str, uri: str, text: str) -> str:
    if text:
        name = text.lower()
        return _SPLIT_NAMES.get(name, name)
    words = re.split(r"[^a-z0-9]+", uri.rpartition("/")[2].lower())
    named = {_SPLIT_NAMES.get(word, word) for word in words} & {"train", "val", "test"}
    if len(named) != 1:
        raise CatalogError(
            f"{where}: no split, and the file's name does not say train, val or test; add a column split, or rename "
            "the file"
        )
    return named.pop()


def _label(where: str, text: str, label_names: Mapping[int, str]) -> str | None:
    if not text:
        return None
    if label_names and text.isascii() and text.isdigit():
        if int(text) not in label_names:
            raise CatalogError(f"{where}: label {text} has no name; label_names names {len(label_names)} classes")
        return label_names[int(text)]
    return text
