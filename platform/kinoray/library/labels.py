"""`kinoray labels`: predictions filtered, joined with a catalog, sorted, and printed or written to a file.

What is easy to break: rows pass through as a stream of small tables; only a sort holds them, and with a limit no more
than that many (and a block).
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from kinoray import console
from kinoray.catalog.table import CATALOG_SCHEMA, catalog_of_source
from kinoray.console import exact_stdout, many
from kinoray.errors import CatalogError, ConfigError, ObjectNotFound
from kinoray.label.ledger import Ledger, find_labellings, open_ledger
from kinoray.label.times import summarise
from kinoray.library.config import LabelsConfig
from kinoray.library.lakehouse import TABLE_FORMATS, require_table, write_table
from kinoray.library.numbers import true_lists
from kinoray.library.rows import (
    LABEL_SCHEMA,
    WINDOW_LABEL_SCHEMA,
    Where,
    class_names,
    count_missing,
    count_rows,
    is_multi_label,
    print_table,
    scan,
    scan_windows,
    write_parquet,
    write_text,
)
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import require_file

__all__ = ["Joined", "labels", "put_rows"]

_PREFIX = "catalog_"
_PLACE = ("video_id", "uri", "offset", "length")
_SHOWN = ("video_id", "status", "label", "score", "margin", "error_class")
_SHOWN_WINDOWS = ("video_id", "window", "begin_s", "end_s", "label", "score", "margin")
_SHOWN_JOINED = ("catalog_label", "catalog_split")
_OF_LISTS = {"label": "label_topk", "score": "score_topk"}
"""What is shown instead where a video may have several classes."""
_SHOWN_ROWS = 50
_SHOWN_CLASSES = 20
_SORT_BLOCK = 65_536  # rows that are gathered before those beyond the limit are dropped


class Joined:
    """Columns of a catalog, by video_id."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.uri = uri
        catalog = catalog_of_source(storage, absolute(uri))
        table = catalog.table
        names = [name for name in CATALOG_SCHEMA.names if name not in _PLACE]
        if catalog.is_multilabel:
            place = table.schema.get_field_index("label")
            table = table.set_column(place, table.schema.field(place), true_lists(catalog))
        else:
            names.remove("label_ids")
        self.ids = table["video_id"].combine_chunks()
        self.table = table.select(names).rename_columns([_PREFIX + name for name in names]).combine_chunks()
        self.num_met = 0
        self.num_unmet = 0

    def keep(self, columns: Sequence[str]) -> None:
        """Only these columns, of those that there are."""
        self.table = self.table.select([name for name in self.table.column_names if name in columns])

    def add(self, table: pa.Table) -> pa.Table:
        """The table with these columns; null where the catalog has no such video."""
        place = pc.index_in(table["video_id"], value_set=self.ids)
        self.num_unmet += place.null_count
        self.num_met += len(place) - place.null_count
        for field in self.table.schema:
            table = table.append_column(field, pc.take(self.table[field.name], place))
        return table

    def check(self) -> None:
        """Raise CatalogError if it is the wrong catalog."""
        if self.num_unmet and not self.num_met:
            raise CatalogError(
                f"join: none of the {self.num_unmet} videos is in {self.uri}, whose ids look like "
                f"{self.ids[0].as_py() if len(self.ids) else 'nothing'}; name the catalog that was labelled"
            )


def labels(config: LabelsConfig) -> dict[str, Any]:
    """Print or write the rows that are wanted; what is said about them goes to stderr where they are printed.

    Returns:
        `root`, `rows` (printed or written), `matched` (passed the filters, where all were looked at, else None) and
        `to`; with --summary the `spans` of the units, and of each labelling how many videos have each of the `classes`.

    Raises:
        ConfigError: a class or column is unknown, or several labellings are there and none was named.
        CatalogError: the catalog to join has none of the videos.
        KinorayError: the table cannot be read, or the file not be written.
    """
    storage = Storage(config.storage)
    if config.format in TABLE_FORMATS and not config.summary:
        require_table(storage, config.to, config.format)
    elif config.to:
        require_file("to", config.to)
    if config.summary:
        return _summary(storage, config)
    ledger = open_ledger(storage, absolute(config.predictions))
    joined = Joined(storage, config.join) if config.join else None
    known = WINDOW_LABEL_SCHEMA if config.windows else LABEL_SCHEMA
    columns = _columns(config, known, joined, several=is_multi_label(ledger))
    if joined:
        joined.keep(columns)
    where = _where(config, ledger)
    limit = _SHOWN_ROWS if config.format == "table" and config.limit is None else config.limit
    seen = _Seen()
    tables = _rows(ledger, config, [name for name in columns if name in known.names], where, joined, seen)
    if config.sort:
        tables = _sorted(tables, config, limit)
    tables = (table.select(columns) for table in _limited(tables, limit, seen))
    schema = _schema(known, columns)
    if config.format == "table":
        table = pa.concat_tables([schema.empty_table(), *tables])
        num_rows = len(table)
        is_plain = where == Where() and not (joined or config.windows or config.sort)
        total = count_rows(ledger) if is_plain else None
        if total is None:
            for _ in seen.rest:
                pass  # to say how many more there are
        else:
            seen.matched = total
        if joined:
            joined.check()
        print_table(table)
        more = "; --limit N shows more" if num_rows < seen.matched else ""
        missing, inputs = count_missing(ledger)
        wait = f"; {missing:,} of {many(inputs, 'input')} have no row yet" if missing else ""
        print(f"labels: {num_rows:,} of {many(seen.matched, 'row')}{more}{wait}")
    else:
        num_rows = _write(storage, config, _checked(tables, joined), schema, ledger.root)
    if joined and joined.num_unmet:
        have = "has" if joined.num_unmet == 1 else "have"
        print(f"labels: {many(joined.num_unmet, 'row')} {have} no video in {joined.uri}", file=sys.stderr)
    is_all = config.format == "table" or limit is None or bool(config.sort)
    return {
        "root": ledger.root,
        "rows": num_rows,
        "matched": seen.matched if is_all else None,
        "to": absolute(config.to) if config.to else "",
    }


def _summary(storage: Storage, config: LabelsConfig) -> dict[str, Any]:
    place = absolute(config.predictions)
    try:
        roots = find_labellings(storage, place)
    except ObjectNotFound:
        raise ConfigError(
            f"{place} holds no labelling (job.json); give the --out of kinoray label or evaluate"
        ) from None
    classes = {root: _print_classes(Ledger(storage, root)) for root in roots}
    return {"root": place, "classes": classes, "spans": summarise(storage, place, config.to)}


def _print_classes(ledger: Ledger) -> dict[str, int]:
    """Print how many videos of a labelling have each class, and with which mean score; the counts, the largest first.

    Of a labelling whose videos may have any number of classes, all of them count.
    """
    is_many = is_multi_label(ledger)
    status, videos, sums = Counter[str](), Counter[str](), Counter[str]()
    names = ("label_topk", "score_topk") if is_many else ("label", "score")
    for rows in scan(ledger, ["status", "abstained", *names]):
        status.update(rows["status"].to_pylist())
        status["abstained"] += rows["abstained"].to_pylist().count(True)
        labels, scores = (pc.list_flatten(rows[name]) if is_many else rows[name] for name in names)
        found = pa.table({"label": labels, "score": pc.cast(scores, pa.float64())}).drop_null()
        for row in found.group_by("label").aggregate([("score", "sum"), ("score", "count")]).to_pylist():
            videos[row["label"]] += row["score_count"]
            sums[row["label"]] += row["score_sum"]
    abstained = status.pop("abstained", 0)
    parts = [f"{status[name]:,} {name}" for name in ("labelled", "quarantined", "skipped")]
    print(f"{ledger.root}: {many(status.total(), 'video')} = {' + '.join(parts)}; {abstained:,} abstained")
    ranking = sorted(videos, key=lambda name: (-videos[name], name))
    shown = [(name, f"{videos[name]:,}", f"{sums[name] / videos[name]:.3f}") for name in ranking[:_SHOWN_CLASSES]]
    if shown:
        head = ("CLASS", "VIDEOS", "MEAN SCORE")
        print("\n".join(console.table(shown, head=head, right=(1, 2), indent="  ", fits=True)))
    if left := ranking[_SHOWN_CLASSES:]:
        rest = sum(videos[name] for name in left)
        print(f"  and {many(len(left), 'class')} more, of {many(rest, 'video')}")
    return {name: videos[name] for name in ranking}


def _columns(config: LabelsConfig, schema: pa.Schema, joined: Joined | None, *, several: bool) -> list[str]:
    known = [*schema.names, *(joined.table.column_names if joined else ())]
    for name in config.columns:
        if name not in known:
            remedy = "; name the catalog with --join" if name.startswith(_PREFIX) and not joined else ""
            raise ConfigError(f"columns: there is no {name!r}{remedy}; there are {', '.join(known)}")
    if config.columns:
        return list(dict.fromkeys(config.columns))
    if config.format == "table":
        shown = [*(_SHOWN_WINDOWS if config.windows else _SHOWN), *(_SHOWN_JOINED if joined else ())]
        return [_OF_LISTS.get(name, name) for name in shown] if several else shown
    return known


def _schema(known: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    fields = []
    for name in columns:
        if name in known.names:
            fields.append(known.field(name))
        else:
            fields.append(CATALOG_SCHEMA.field(name.removeprefix(_PREFIX)).with_name(name).with_nullable(True))
    return pa.schema(fields)


def _where(config: LabelsConfig, ledger: Ledger) -> Where:
    if config.label:
        known = class_names(ledger)
        for name in config.label:
            if name not in known:
                some = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
                raise ConfigError(f"label: the model knows no class {name!r}; it knows {some}")
    several = is_multi_label(ledger)
    return Where(
        status=config.status,
        label=() if several else config.label,
        named=config.label if several else (),
        score=config.score,
        margin=config.margin,
        video_id=config.video_id,
    )


class _Seen:
    """How many rows passed the filters, and the tables that nobody has asked for yet."""

    def __init__(self) -> None:
        self.matched = 0
        self.rest: Iterator[pa.Table] = iter(())


def _rows(
    ledger: Ledger, config: LabelsConfig, own: Sequence[str], where: Where, joined: Joined | None, seen: _Seen
) -> Iterator[pa.Table]:
    keys = [name for name, _ in _sort_keys(config)]
    if joined:
        keys.append("video_id")
    needed = list(dict.fromkeys([*own, *keys]))
    tables = scan_windows(ledger, needed, where) if config.windows else scan(ledger, needed, where)
    for table in tables:
        seen.matched += len(table)
        yield joined.add(table) if joined else table


def _sort_keys(config: LabelsConfig) -> list[tuple[str, str]]:
    """Columns and directions: what was asked for, then what tells equal rows apart."""
    if not config.sort:
        return []
    ties = ("video_id", "window") if config.windows else ("video_id",)
    direction = "descending" if config.descending else "ascending"
    return [(config.sort, direction), *((name, "ascending") for name in ties if name != config.sort)]


def _sorted(tables: Iterator[pa.Table], config: LabelsConfig, limit: int | None) -> Iterator[pa.Table]:
    keys = _sort_keys(config)
    held: list[pa.Table] = []
    num_held = 0
    for table in tables:
        held.append(table)
        num_held += len(table)
        if limit is not None and num_held > limit + _SORT_BLOCK:
            held = [pa.concat_tables(held).sort_by(keys).slice(0, limit).combine_chunks()]
            num_held = limit
    if held:
        table = pa.concat_tables(held).sort_by(keys)
        for start in range(0, len(table), _SORT_BLOCK):
            yield table.slice(start, _SORT_BLOCK)


def _limited(tables: Iterator[pa.Table], limit: int | None, seen: _Seen) -> Iterator[pa.Table]:
    """The first `limit` rows; the tables behind them stay in seen.rest."""
    seen.rest = tables
    left = limit
    while left is None or left > 0:
        table = next(tables, None)
        if table is None:
            return
        if left is not None:
            table = table.slice(0, left)
            left -= len(table)
        yield table


def _checked(tables: Iterator[pa.Table], joined: Joined | None) -> Iterator[pa.Table]:
    """The tables; of a wrong catalog they end in an error, before a file or a table is there."""
    yield from tables
    if joined:
        joined.check()


def _write(storage: Storage, config: LabelsConfig, tables: Iterator[pa.Table], schema: pa.Schema, origin: str) -> int:
    if config.format in ("lance", "iceberg", "delta"):
        target = absolute(config.to)
        made = write_table(storage, target, config.format, tables, schema, origin)
        before = f"; until now it had {many(made.num_replaced, 'row')}, which {made.replaced} still has"
        print(
            f"labels: {many(made.num_rows, 'row')} in {target}, {made.version}{before if made.replaced else ''}",
            flush=True,
        )
        return made.num_rows
    return put_rows(storage, config.format, config.to, tables, schema)


def put_rows(storage: Storage, kind: str, to: str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write rows to a file or an object, or print them where `to` is empty, and return how many there were.

    Args:
        kind: csv, jsonl or parquet.
    """
    text: Literal["csv", "jsonl"] = "csv" if kind == "csv" else "jsonl"
    if not to:
        return write_text(tables, schema.names, text, exact_stdout())
    target = absolute(to)
    with scratch_folder("labels") as folder:
        path = Path(folder) / "rows"
        if kind == "parquet":
            num_rows = write_parquet(tables, schema, path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                num_rows = write_text(tables, schema.names, text, file)
        storage.put_file(target, path)
    print(f"labels: {many(num_rows, 'row')} in {target}", flush=True)
    return num_rows
