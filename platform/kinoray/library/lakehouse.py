"""Rows as a table of a lakehouse: Lance, Iceberg or Delta, written by the format's own library in one commit.

A second write replaces all rows by one commit, too, and what the table held before stays readable as its last version;
a write that is killed, or whose rows end in an error, commits nothing. Rows pass through in record batches, and files
have up to a million rows or about 128 MB.

What is easy to break: the libraries make one text of whatever ends the rows, so our own errors are kept aside; and they
wait in native code where Ctrl-C is not heard, so they run in a thread.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.console import visible
from kinoray.errors import ConfigError, KinorayError, ObjectNotFound, StorageError
from kinoray.library.rows import blocks
from kinoray.storage.objects import Storage, absolute, arrow_filesystem, is_s3, join
from kinoray.storage.records import require_folder

__all__ = ["TABLE_FORMATS", "Commit", "TableFormat", "require_table", "write_table"]

TableFormat = Literal["lance", "iceberg", "delta"]

TABLE_FORMATS: dict[str, str] = {"lance": "lance", "iceberg": "pyiceberg", "delta": "deltalake"}
"""The formats, and the module of each that must be installed."""

_RECORD = "_by_kinoray.json"  # "_": no reader takes it for data and no vacuum removes it; sorted before _delta_log/
_FROM = "kinoray.predictions"  # names, in each version of a table, the labelling that its rows are of
_SHOWN = 5  # columns that differ
_FILE_BYTES = 128 * 2**20
_FILE_ROWS = 2**20
_ID = b"PARQUET:field_id"
_NOT_IN_PLACES = frozenset("%?#\\[]^|")  # what one library or another decodes, cuts off, or panics at


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What became of a write."""

    num_rows: int = 0
    version: str
    """As the format calls it: version 3, snapshot 123."""
    replaced: str = ""
    """That of the rows that were there before; empty for a new table."""
    num_replaced: int = 0


def require_table(storage: Storage, to: str, kind: str) -> None:
    """Refuse what cannot become a table of this format; nothing is changed by asking.

    Raises:
        ConfigError: the format's library is not installed; or the folder holds what is not ours, or cannot be written.
    """
    try:
        importlib.import_module(TABLE_FORMATS[kind])
    except ModuleNotFoundError as error:
        raise ConfigError(f"format {kind} needs {TABLE_FORMATS[kind]}: pip install 'kinoray[{kind}]'") from error
    place = absolute(to).rstrip("/")
    if wrong := sorted({letter for letter in place if letter in _NOT_IN_PLACES or not letter.isprintable()}):
        raise ConfigError(
            f"to {visible(place)}: choose a folder without {visible(' '.join(wrong))} in its name, which the libraries "
            f"of tables take for something else"
        )
    if kind != "iceberg" and is_s3(place) and storage.config.addressing == "virtual" and storage.config.endpoint:
        raise ConfigError(f"storage.addressing must be path or auto for {kind} at an endpoint of its own, got virtual")
    require_folder(storage, "to", to, "labels")
    try:
        found = storage.read(join(place, _RECORD))
    except ObjectNotFound:
        return
    if found != _record_of(kind):
        raise ConfigError(f"to {place} is a table of another format ({_RECORD}), not {kind}: choose an empty folder")


def write_table(
    storage: Storage, to: str, kind: TableFormat, tables: Iterable[pa.Table], schema: pa.Schema, origin: str
) -> Commit:
    """Write the rows as all that the table holds.

    float16 becomes float32, since neither Iceberg nor Delta nor those who read Arrow for DuckDB know it.

    Args:
        to: folder or s3:// prefix that `require_table` has let pass.
        origin: the labelling that the rows are of; the commit names it.

    Raises:
        ConfigError: the table that is there has other columns.
        StorageError: it could not be written, or somebody else changed it meanwhile.
        Else what the rows end in; nothing was committed then.
    """
    place = absolute(to).rstrip("/")
    storage.put_if_absent(join(place, _RECORD), _record_of(kind))
    schema = pa.schema([field.with_type(_widened(field.type)) for field in schema])
    source = _Source(blocks(tables, schema))
    target = _Target(storage, place, pa.RecordBatchReader.from_batches(schema, iter(source)), {_FROM: origin})
    writers: dict[TableFormat, Callable[[_Target], Commit]] = {
        "lance": _write_lance,
        "iceberg": _write_iceberg,
        "delta": _write_delta,
    }
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="write-table") as pool:
            future = pool.submit(writers[kind], target)
            try:
                return replace(future.result(), num_rows=source.num_rows)
            except KeyboardInterrupt:
                source.is_stopped = True
                raise
    except Exception as error:
        if source.error is not None:
            raise source.error from None
        if isinstance(error, KinorayError):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise StorageError(f"{place}: the {kind} table could not be written: {lines[0]}") from error


def _record_of(kind: str) -> bytes:
    return f'{{"format": "{kind}"}}\n'.encode()


def _widened(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_widened(kind.value_type))
    return pa.float32() if pa.types.is_float16(kind) else kind


class _Source:
    """Record batches of blocks, how many rows have passed, and what ended them before their time."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = tables
        self.num_rows = 0
        self.error: Exception | None = None
        self.is_stopped = False

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for table in self._tables:
                if self.is_stopped:
                    raise InterruptedError("stopped")
                self.num_rows += len(table)
                yield from table.combine_chunks().to_batches()
        except Exception as error:
            self.error = error
            raise


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@dataclass(frozen=True, slots=True)
class _Target:
    """What is written, and where."""

    storage: Storage
    place: str
    rows: pa.RecordBatchReader
    about: dict[str, str]

    def require_columns(self, there: pa.Schema, ours: pa.Schema) -> None:
        """Refuse to replace a table by one of other columns: what reads it would break."""
        found, wanted = ({field.name: str(field.type) for field in schema} for schema in (there, ours))
        if list(found.items()) == list(wanted.items()):
            return
        lacks = [name for name in wanted if name not in found]
        more = [name for name in found if name not in wanted]
        changed = [
            f"{name} is {found[name]} there and would be {kind}"
            for name, kind in wanted.items()
            if found.get(name, kind) != kind
        ]
        parts = [f"it lacks {_some(lacks)}"] if lacks else []
        parts += [f"it also has {_some(more)}"] if more else []
        parts += [_some(changed)] if changed else []
        raise ConfigError(
            f"to {self.place} is a table of other columns ({'; '.join(parts) or 'the same in another order'}): choose "
            f"an empty folder, or the --columns that it has"
        )

    def lost(self, version: str) -> StorageError:
        """What the slower of two writers is told."""
        return StorageError(
            f"{self.place}: somebody else wrote {version} meanwhile, so nothing was changed; run it again"
        )


# Lance and Delta find their files by themselves, with the credentials of the usual AWS chain


def _s3_options(target: _Target) -> dict[str, str]:
    if not is_s3(target.place):
        return {}
    config = target.storage.config
    endpoint = config.endpoint
    options = {"aws_virtual_hosted_style_request": str(config.addressing == "virtual").lower()}
    if config.region:
        options["aws_region"] = config.region
    if endpoint:
        options |= {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
    return options


def _write_lance(target: _Target) -> Commit:
    import lance

    options = _s3_options(target)
    is_there = any(target.storage.list(f"{target.place}/_versions/"))
    if is_there:
        there = lance.dataset(target.place, storage_options=options).schema
        target.require_columns(there, target.rows.schema)
    try:
        made = lance.write_dataset(
            target.rows,
            target.place,
            mode="overwrite" if is_there else "create",
            max_rows_per_file=_FILE_ROWS,
            max_bytes_per_file=_FILE_BYTES,
            storage_options=options,
            transaction_properties=target.about,
        )
    except OSError as error:
        if not is_there and any(target.storage.list(f"{target.place}/_versions/")):
            raise target.lost("version 1") from error
        raise
    if not is_there:
        return Commit(version=f"version {made.version}")
    before = made.checkout_version(made.version - 1)
    return Commit(
        version=f"version {made.version}", replaced=f"version {before.version}", num_replaced=before.count_rows()
    )


def _write_delta(target: _Target) -> Commit:
    from deltalake import CommitProperties, DeltaTable, Schema, WriterProperties, write_deltalake
    from deltalake.exceptions import DeltaError

    options = _s3_options(target)
    uri = target.place if is_s3(target.place) else Path(target.place).as_uri()
    there = DeltaTable(uri, storage_options=options) if DeltaTable.is_deltatable(uri, options) else None
    if there:
        schemas = (there.schema(), Schema.from_arrow(target.rows.schema))
        target.require_columns(*(pa.schema(schema.to_arrow()) for schema in schemas))
    ours = there.version() + 1 if there else 0
    before = {"replaced": f"version {ours - 1}", "num_replaced": there.count()} if there else {}
    try:
        write_deltalake(
            there or uri,
            target.rows,
            mode="overwrite" if there else "error",
            storage_options=options,
            target_file_size=_FILE_BYTES,
            writer_properties=WriterProperties(compression="ZSTD", max_row_group_size=65_536),
            # A retry would append: a create that lost, and an overwrite of no rows, remove nothing of the winner's
            commit_properties=CommitProperties(custom_metadata=target.about, max_commit_retries=0),
        )
    except DeltaError as error:
        if DeltaTable.is_deltatable(uri, options) and DeltaTable(uri, storage_options=options).version() >= ours:
            raise target.lost(f"version {ours}") from error
        raise
    return Commit(version=f"version {ours}", **before)


# Iceberg leaves it to a catalog which metadata are the table's. Ours is the folder itself, as Hadoop tables have it:
# metadata/vN.metadata.json with the highest N, of which the first to write it wins; version-hint.text says where to
# begin looking. Metadata name all files by full paths, so a table that was copied or moved still names the old ones,
# and a stranger's may name any: nothing is read or written outside of the folder.

_CHOOSES_PLACES = ("write.data.path", "write.metadata.path", "write.location-provider.py-impl")


def _require_own_place(target: _Target, location: str, properties: dict[str, str]) -> None:
    if location.rstrip("/") != target.place:
        raise ConfigError(
            f"to {target.place} is an Iceberg table that was written at {location} and copied or moved from there; "
            f"Iceberg names files by full paths, so choose an empty folder, or write to {location}"
        )
    for name in _CHOOSES_PLACES:
        if name in properties:
            raise ConfigError(
                f"to {target.place} is an Iceberg table that keeps its files elsewhere ({name}: {properties[name]}): "
                f"choose an empty folder"
            )


def _iceberg_files(target: _Target) -> Any:
    """Iceberg's way to files, which goes nowhere but to those of this table."""
    from pyiceberg.io import InputFile, OutputFile
    from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

    def own(uri: str) -> str:
        if not uri.startswith(target.place + "/") or ".." in uri.split("/"):
            raise ConfigError(
                f"to {target.place} is an Iceberg table whose metadata name {uri}, which is not below it: choose an "
                f"empty folder"
            )
        return uri

    class OwnFiles(PyArrowFileIO):  # type: ignore[misc]
        def new_input(self, location: str) -> PyArrowFile:
            return super().new_input(own(location))

        def new_output(self, location: str) -> PyArrowFile:
            return super().new_output(own(location))

        def delete(self, location: str | InputFile | OutputFile) -> None:
            super().delete(own(location if isinstance(location, str) else location.location))

    files = OwnFiles()
    if is_s3(target.place):
        filesystem, _ = arrow_filesystem(target.storage.config, target.place)
        files.fs_by_scheme = lambda scheme, netloc: filesystem
    return files


def _write_iceberg(target: _Target) -> Commit:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.io.pyarrow import parquet_file_to_data_file, pyarrow_to_schema, schema_to_pyarrow
    from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC
    from pyiceberg.serializers import FromInputFile
    from pyiceberg.table import Table
    from pyiceberg.table.metadata import new_table_metadata
    from pyiceberg.table.sorting import UNSORTED_SORT_ORDER

    io = _iceberg_files(target)
    arrow_schema = _numbered(target.rows.schema)
    schema = pyarrow_to_schema(arrow_schema)
    version = _iceberg_version(target)
    if version:
        metadata = FromInputFile.table_metadata(io.new_input(_iceberg_metadata(target, version)))
        _require_own_place(target, metadata.location, metadata.properties)
        target.require_columns(*(schema_to_pyarrow(known) for known in (metadata.schema(), schema)))
    else:
        metadata = new_table_metadata(schema, UNPARTITIONED_PARTITION_SPEC, UNSORTED_SORT_ORDER, target.place)
    table = Table(("labels",), metadata, _iceberg_metadata(target, version), io, NoopCatalog("folder"))
    transaction = table.transaction()
    num_replaced = 0
    with transaction.update_snapshot(snapshot_properties=target.about).overwrite() as snapshot:
        for task in table.scan().plan_files():
            snapshot.delete_data_file(task.file)
            num_replaced += task.file.record_count
        for uri in _write_parquet_files(target, arrow_schema, io):
            snapshot.append_data_file(parquet_file_to_data_file(io, metadata, uri))
    made = transaction.table_metadata
    ours = _iceberg_metadata(target, version + 1)
    if not target.storage.put_if_absent(ours, made.model_dump_json().encode()):
        raise target.lost(ours)
    target.storage.put(join(target.place, "metadata", "version-hint.text"), str(version + 1).encode())
    replaced = f"snapshot {metadata.current_snapshot_id}" if metadata.current_snapshot_id else ""
    return Commit(version=f"snapshot {made.current_snapshot_id}", replaced=replaced, num_replaced=num_replaced)


def _iceberg_metadata(target: _Target, version: int) -> str:
    return join(target.place, "metadata", f"v{version}.metadata.json")


def _iceberg_version(target: _Target) -> int:
    """The latest; 0 if there is none."""
    try:
        version = int(target.storage.read(join(target.place, "metadata", "version-hint.text")))
    except ObjectNotFound:
        version = 0
    while target.storage.exists(_iceberg_metadata(target, version + 1)):  # its writer was killed before the hint
        version += 1
    return version


def _numbered(schema: pa.Schema) -> pa.Schema:
    """The schema with Iceberg's ids: columns first, then what is inside of lists, as Iceberg itself gives them out."""
    fields = []
    inner = len(schema)
    for number, field in enumerate(schema, 1):
        kind = field.type
        if pa.types.is_list(kind):
            inner += 1
            kind = pa.list_(pa.field("element", kind.value_type, metadata={_ID: str(inner)}))
        fields.append(pa.field(field.name, kind, field.nullable, {_ID: str(number)}))
    return pa.schema(fields)


def _write_parquet_files(target: _Target, schema: pa.Schema, io: Any) -> Iterator[str]:
    """Write the rows as files of a useful size, and say where each is."""
    batches = iter(target.rows)
    for first in batches:
        uri = join(target.place, "data", f"{uuid4().hex}.parquet")
        num_rows = 0
        with io.new_output(uri).create() as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for batch in chain((first,), batches):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
                num_rows += len(batch)
                if num_rows >= _FILE_ROWS or sink.tell() >= _FILE_BYTES:
                    break
        yield uri
