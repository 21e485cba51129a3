"""Reading annotation files: Kinetics CSV, `path label` lists, `path,label` CSV, JSONL and Parquet.

A format is known by its content, since names lie (`train.csv` may be a space-separated list). What is easy to break: a
row that cannot be understood is an error that names file, line and field, never a row left out.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kinoray.catalog.folders import VIDEO_EXTENSIONS, class_name, split_named
from kinoray.catalog.kinetics import AnnotationRow, clip_key, key_of_name, window_of_key
from kinoray.catalog.source import (
    UNLABELLED_SPLITS,
    cells_of,
    check_names,
    decode_text,
    parse_records,
    parse_table_text,
    text_lines,
    unquoted,
)
from kinoray.console import many, shortened
from kinoray.errors import CatalogError
from kinoray.storage.objects import MAX_TABLE_BYTES, Storage, absolute
from kinoray.storage.records import parse_json
from kinoray.storage.tables import parse_table

__all__ = ["read_annotations", "read_label_names"]

_PATH_FIELDS = ("path", "video", "uri", "video_path")
_FIELDS = ("youtube_id", *_PATH_FIELDS, "time_start", "time_end", "split", "label")
_MAX_DIGITS = 18
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
        data = storage.read(uri, max_bytes=MAX_TABLE_BYTES)
        rows.extend(_row(uri, line, fields, label_names) for line, fields in _read_fields(uri, data))
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
    text = decode_text(uri, storage.read(uri))
    pairs: list[tuple[Any, Any]]
    if text.lstrip().startswith(("[", "{")):
        try:
            found = parse_json(text)
        except ValueError as error:
            raise CatalogError(f"label_names {uri} is not JSON: {error}") from error
        pairs = list(enumerate(found)) if isinstance(found, list) else list(found.items())
        pairs = [(value, key) if isinstance(value, int) else (key, value) for key, value in pairs]
    else:
        pairs = _numbered_lines(uri, text)
    names: dict[int, str] = {}
    for number, name in pairs:
        place = _number(str(number))
        if place is None or not isinstance(name, str) or place in names:
            raise CatalogError(
                f"label_names {uri}: number {number!r:.40} with name {name!r:.80}; expected each number once"
            )
        names[place] = class_name(name, f"label_names {uri}")
    if not names:
        raise CatalogError(f"label_names {uri} is empty; expected one class name a line, in the order of their numbers")
    return names


def _number(text: str) -> int | None:
    """The number of a class."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def _numbered_lines(uri: str, text: str) -> list[tuple[Any, Any]]:
    """(number, name) of each line: counted from 0, or as the lines say."""
    lines = [(number, line.strip()) for number, line in enumerate(text_lines(text), 1) if line.strip()]
    numbered = [re.fullmatch(r"(\d+)\s*([,\t ])\s*(.+)", line) for _, line in lines]
    names = [
        unquoted(f"label_names {uri} line {at}", match[3] if all(numbered) and match else line)
        for (at, line), match in zip(lines, numbered, strict=True)
    ]
    if all(numbered):
        return [(match[1], name) for match, name in zip(numbered, names, strict=True) if match]
    odd = next(at for (at, _), match in zip(lines, numbered, strict=True) if match is None)
    if any(match and match[2] != " " for match in numbered):  # such as a header: it would be the first class
        raise CatalogError(f"label_names {uri} line {odd} has no number, but others have; remove the line or number it")
    return list(enumerate(names))


def _read_fields(uri: str, data: bytes) -> Iterator[_Fields]:
    """(line, fields by lower-case name) of each row, whatever the format."""
    if data.startswith(b"PAR1"):
        yield from _read_parquet(uri, data)
        return
    text = decode_text(uri, data)
    head = next((line.strip() for line in text_lines(text) if line.strip()), "")
    if head.startswith("{"):
        yield from _read_jsonl(uri, text)
    elif _is_header(head):
        yield from _read_table(uri, text)
    elif "," in head and not (_LISTED.fullmatch(head) and "," not in _LISTED.sub(r"\g<path>", head)):
        yield from _read_csv(uri, text)
    else:
        yield from _read_list(uri, text)


def _is_header(line: str) -> bool:
    cells = {cell.strip(' "') for cell in re.split("[,;\t]", line.lower())}
    names_clip = bool({"youtube_id", *_PATH_FIELDS} & cells) and not any(map(_is_video, cells))
    return names_clip or line.lower().startswith("sep=")


def _read_parquet(uri: str, data: bytes) -> Iterator[_Fields]:
    try:
        table = parse_table(data)
    except pa.ArrowException as error:
        raise CatalogError(f"{uri} is not Parquet: {' '.join(str(error).split())}") from error
    check_names(uri, [name.lower() for name in table.schema.names])
    table = table.select([name for name in table.schema.names if name.lower() in _FIELDS])
    for field in table.schema:
        if not _is_plain(field.type):
            raise CatalogError(f"{uri}: column {field.name} is {field.type!s:.80}; expected text or numbers")
    names = [name.lower() for name in table.schema.names]
    for number, row in enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True), 1):
        yield number, dict(zip(names, row, strict=True))


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type are text or numbers, or all null."""
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _read_jsonl(uri: str, text: str) -> Iterator[_Fields]:
    for number, line in enumerate(text_lines(text), 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise CatalogError(f"{uri} line {number} is not JSON ({error}); expected one object a line") from error
        if not isinstance(found, dict):
            raise CatalogError(f"{uri} line {number}: expected an object, found {line.strip()[:60]!r}")
        names = [key.lower() for key in found]
        check_names(f"{uri} line {number}", names)
        yield number, dict(zip(names, found.values(), strict=True))


def _read_table(uri: str, text: str) -> Iterator[_Fields]:
    """With a header that names a clip."""
    for record in parse_table_text(uri, text, ("youtube_id", *_PATH_FIELDS), _REMEDY).records:
        yield record.line, record.cells


def _read_csv(uri: str, text: str) -> Iterator[_Fields]:
    """Rows `path,label[,split]` without a header; the first one says how many cells there are."""
    lines = text_lines(text)
    start, head = next((index, line) for index, line in enumerate(lines) if line.strip())
    where = f"{uri} line {start + 1}"
    cells = cells_of(where, head)
    if not _is_video(cells[0].strip()):
        raise CatalogError(f"{where}: found {head[:100]!r}; {_REMEDY}")
    names = ["path", "label", "split"][: len(cells)]
    for record in parse_records(uri, lines, start, names, ","):
        yield record.line, record.cells


def _read_list(uri: str, text: str) -> Iterator[_Fields]:
    for number, line in enumerate(text_lines(text), 1):
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
    youtube_id = _text(where, "youtube_id", fields)
    path = next((text for name in _PATH_FIELDS if (text := _text(where, name, fields))), "")
    if youtube_id:
        if window[0] is None or window[1] is None:
            raise CatalogError(f"{where}: time_start and time_end are needed beside youtube_id {youtube_id!r:.80}")
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
    split = _split(where, uri, _text(where, "split", fields))
    label = _label(where, _text(where, "label", fields), label_names)
    if label is None and split not in UNLABELLED_SPLITS:
        raise CatalogError(
            f"{where}: the label is empty; only the splits {', '.join(sorted(UNLABELLED_SPLITS))} may have none"
        )
    return AnnotationRow(uri, line, key, label, split, start, end)


def _text(where: str, name: str, fields: Mapping[str, Any]) -> str:
    value = fields.get(name)
    is_odd = isinstance(value, bool) or not isinstance(value, str | int | float | None)
    if is_odd or (isinstance(value, float) and not math.isfinite(value)):
        raise CatalogError(f"{where}: {name} is {shortened(str(value), 80)!r}; expected text or a number")
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps, written by pandas
        value = int(value)
    return "" if value is None else str(value).strip()


def _time(where: str, name: str, fields: Mapping[str, Any]) -> float | None:
    text = _text(where, name, fields)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CatalogError(f"{where}: {name} is {text!r:.80}; expected seconds, such as 10")
    return value


def _split(where: str, uri: str, text: str) -> str:
    if text:
        return split_named(text) or text.lower()
    words = re.split(r"[^a-z0-9]+", uri.rpartition("/")[2].lower())
    named = {split for word in words if (split := split_named(word))}
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
        number = _number(text)
        if number is None or number not in label_names:
            raise CatalogError(
                f"{where}: label {text:.40} has no name; label_names names {many(len(label_names), 'class')}"
            )
        return label_names[number]
    return class_name(text, where)
