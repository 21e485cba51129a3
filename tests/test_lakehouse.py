"""`kinoray labels --format lance|iceberg|delta`: read back by each format's own library, and by DuckDB over it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import duckdb
import pyarrow as pa
import pytest

from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, ConfigError, StorageError
from kinoray.label.ledger import read_predictions
from kinoray.library.config import LabelsConfig
from kinoray.library.labels import labels
from kinoray.library.lakehouse import Commit, TableFormat, write_table
from kinoray.library.rows import LABEL_SCHEMA
from kinoray.storage.objects import Storage, join
from ports import wait_until
from small_tables import label_library, ledger_in, library

KINDS = get_args(TableFormat)
EMBEDDING = [0.5, -2.25, 0.0999755859375]  # the last is what float16 has for 0.1
SCHEMA = pa.schema([pa.field("video_id", pa.string(), nullable=False), pa.field("score", pa.float32())])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished labelling of 43 videos with embeddings, in six parts."""
    folder = tmp_path_factory.mktemp("out")
    label_library(ledger_in(Storage(), folder), library(43), embedding=EMBEDDING)
    return str(folder)


def read(kind: str, place: str, config: StorageConfig | None = None, version: Any = None) -> Any:
    """The table, or a version of it, as what its own library gives DuckDB: an Arrow dataset, or a table."""
    options: dict[str, Any] = {}
    if config and config.endpoint_url:
        options = {"aws_endpoint": config.endpoint_url, "allow_http": "true", "aws_region": "us-east-1"}
    if kind == "lance":
        import lance

        return lance.dataset(place, version=version, storage_options=options)
    if kind == "delta":
        from deltalake import DeltaTable

        return DeltaTable(place, version=version, storage_options=options).to_pyarrow_dataset()
    from pyiceberg.table import StaticTable

    options = {"s3.endpoint": config.endpoint_url, "s3.region": "us-east-1"} if config else {}
    return StaticTable.from_metadata(place, options).scan(snapshot_id=version).to_arrow()


def rows_in(found: Any) -> list[dict[str, Any]]:
    table = found if isinstance(found, pa.Table) else found.to_table()
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def versions(kind: str, place: str) -> list[Any]:
    """Of a local table, as `read` takes them, the oldest first."""
    if kind == "lance":
        import lance

        return [version["version"] for version in lance.dataset(place).versions()]
    if kind == "delta":
        from deltalake import DeltaTable

        return sorted(entry["version"] for entry in DeltaTable(place).history())
    from pyiceberg.table import StaticTable

    return [snapshot.snapshot_id for snapshot in StaticTable.from_metadata(place).snapshots()]


def data_files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.suffix in (".lance", ".parquet")]


def write(kind: Any, place: Path, tables: Any) -> Commit:
    return write_table(Storage(), str(place), kind, tables, SCHEMA, "labelling")


def rows_of(*ids: str) -> pa.Table:
    return pa.table({"video_id": list(ids), "score": [0.5] * len(ids)}, SCHEMA)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_table_has_every_row_and_column_for_its_library_and_duckdb(
    kind: Any, where: str, out: str, tmp_path: Path, bucket: str, s3_config: StorageConfig
) -> None:
    place = join(bucket, "lake/labels") if where == "s3" else str(tmp_path / "lake" / "labels of it")
    config = LabelsConfig(predictions=out, format=kind, to=place, storage=s3_config)
    assert labels(config)["rows"] == 43
    expected = read_predictions(Storage(), out).to_pylist()
    found = read(kind, place, s3_config if where == "s3" else None)
    assert found.schema.names == LABEL_SCHEMA.names
    rows = rows_in(found)
    firsts = [(row.pop("label"), row.pop("score")) for row in rows]
    assert rows == expected  # float16 is exact in float32
    assert rows[0]["embedding"] == EMBEDDING
    assert firsts == [
        (row["label_topk"][0], row["score_topk"][0]) if row["label_topk"] else (None, None) for row in expected
    ]
    sources = ["found"]
    if (
        where == "folder" and kind != "lance"
    ):  # the first version is all files that there are, which DuckDB reads itself
        sources.append(f"read_parquet('{place}/**/*.parquet')")
    for source in sources:
        sql = f"SELECT status, count(*), count(label), max(embedding[1]) FROM {source} GROUP BY ALL ORDER BY 1"
        assert duckdb.sql(sql).fetchall() == [("labelled", 35, 35, 0.5), ("quarantined", 8, 0, 0.5)]
    if where == "s3":
        storage = Storage(s3_config)
        written = [storage.read(info.uri) for info in storage.list(place)]
        assert len(written) >= 3
        assert not any(os.environ["AWS_SECRET_ACCESS_KEY"].encode() in data for data in written)
        labels(replace(config, limit=5))
        assert len(rows_in(read(kind, place, s3_config))) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_is_one_new_version_and_the_old_one_stays(
    kind: Any, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "table")
    config = LabelsConfig(
        predictions=out, format=kind, to=place, columns=("video_id", "margin"), sort="margin", limit=20
    )
    labels(config)
    before = read(kind, place)
    first = rows_in(before)
    assert first == sorted(first, key=lambda row: (row["margin"], row["video_id"]))
    assert len(first) == 20
    capsys.readouterr()
    labels(replace(config, status=("quarantined",), sort="", limit=None))
    said = capsys.readouterr().out
    assert [row["video_id"] for row in rows_in(read(kind, place))] == [f"v{index:04d}" for index in range(4, 43, 5)]
    assert rows_in(before) == first
    known = versions(kind, place)
    assert len(known) == 2
    assert rows_in(read(kind, place, version=known[0])) == first
    word = "snapshot" if kind == "iceberg" else "version"
    before = f"until now it had 20 rows, which {word} {known[0]} still has"
    assert said == f"labels: 8 rows in {place}, {word} {known[1]}; {before}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_an_empty_version(kind: Any, tmp_path: Path) -> None:
    for tables in ([], [rows_of("a")], []):
        write(kind, tmp_path / "table", tables)
        assert len(rows_in(read(kind, str(tmp_path / "table")))) == len(tables)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_other_columns_is_not_replaced(kind: Any, out: str, tmp_path: Path) -> None:
    place = tmp_path / "table"
    config = LabelsConfig(predictions=out, format=kind, to=str(place), columns=("video_id", "score"))
    labels(config)
    for columns, told in (
        (("video_id", "score", "label"), "it lacks label"),
        (("video_id",), "it also has score"),
        (("video_id", "entropy"), "it lacks entropy; it also has score"),
        (("score", "video_id"), "the same in another order"),
        ((), "it lacks uri, offset, length, row_key, status and 21 more"),
    ):
        with pytest.raises(ConfigError, match=rf"^to {place} is a table of other columns \({told}\): choose an empty"):
            labels(replace(config, columns=columns))
    with pytest.raises(
        ConfigError, match=r"columns \(score is float there and would be (string|large_string)\): choose"
    ):
        write_table(Storage(), str(place), kind, [], SCHEMA.set(1, pa.field("score", pa.string())), "labelling")
    assert len(versions(kind, str(place))) == 1
    assert len(rows_in(read(kind, str(place)))) == 43


def test_a_folder_that_is_not_ours_or_of_another_format_is_refused(out: str, tmp_path: Path) -> None:
    from deltalake import write_deltalake

    place = tmp_path / "table"
    config = LabelsConfig(predictions=out, format="delta", to=str(place))
    write_deltalake(place, rows_of("theirs"))
    with pytest.raises(ConfigError, match=r"to .*table holds files that are not kinoray's \(_delta_log/, part-"):
        labels(config)
    with pytest.raises(ConfigError, match=r"to .*out.* holds labellings"):
        labels(replace(config, to=out))
    write("lance", tmp_path / "other", [rows_of("a")])
    with pytest.raises(ConfigError, match=r"other is a table of another format .*, not delta: choose an empty folder"):
        labels(replace(config, to=str(tmp_path / "other")))
    for name, said in (
        ("a%2#b", "# %"),
        ("a\\b", "\\"),
        ("a\tb", r"\u0009"),
        ("b\n", r"\u000a"),
        ("[a", r"["),
        ("^", "^"),
    ):
        with pytest.raises(ConfigError, match=rf"^to .*: choose a folder without {re.escape(said)} in its name, which"):
            labels(replace(config, to=str(tmp_path / name)))
    assert {path.name for path in tmp_path.iterdir()} == {"table", "other"}
    server = StorageConfig(endpoint_url="http://nowhere.invalid", addressing="virtual")
    with pytest.raises(ConfigError, match=r"storage.addressing must be path or auto for delta .*, got virtual"):
        labels(replace(config, to="s3://bucket/table", storage=server))
    with pytest.raises(ConfigError, match=r"to must be a folder or s3:// prefix with --format delta"):
        replace(config, to="")


@pytest.mark.parametrize(("kind", "module"), [("lance", "lance"), ("iceberg", "pyiceberg"), ("delta", "deltalake")])
def test_without_the_library_the_extra_is_named_and_nothing_is_written(
    kind: Any, module: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=re.escape(f"format {kind} needs {module}: pip install 'kinoray[{kind}]'")):
        labels(LabelsConfig(predictions=out, format=kind, to=str(tmp_path / "table")))
    assert not list(tmp_path.iterdir())


# What goes wrong on the way


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_in_an_error_commit_nothing(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinoray.library.rows._ROW_GROUP", 1)  # so that the first row is on its way

    def broken() -> Iterator[pa.Table]:
        yield rows_of("b")
        raise ChecksumMismatch("part x is not what was committed")

    place = tmp_path / "table"
    with pytest.raises(ChecksumMismatch, match=r"^part x is not what was committed$"):
        write(kind, place, broken())
    write(kind, place, [rows_of("a")])  # what was left there is no hindrance
    with pytest.raises(ChecksumMismatch):
        write(kind, place, broken())
    assert [row["video_id"] for row in rows_in(read(kind, str(place)))] == ["a"]
    assert len(versions(kind, str(place))) == 1


def test_a_wrong_catalog_to_join_is_told_before_the_commit(out: str, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("video_id,uri,label\nx,x.mp4,a\n")
    with pytest.raises(CatalogError, match=r"join: none of the 43 videos is in "):
        labels(LabelsConfig(predictions=out, format="delta", to=str(tmp_path / "table"), join=str(other)))
    assert not (tmp_path / "table" / "_delta_log").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [None, (), ("a",)], ids=["nothing", "no rows", "a row"])
def test_of_two_writers_at_once_the_table_is_the_one_or_the_other(
    kind: Any, before: tuple[str, ...] | None, tmp_path: Path
) -> None:
    place = tmp_path / "table"
    if before is not None:
        write(kind, place, [rows_of(*before)])

    def late() -> Iterator[pa.Table]:
        yield rows_of("late", "later")
        write(kind, place, [rows_of("early")])

    if kind == "lance" and before is not None:  # an overwrite does not depend on what it replaces: it comes second
        made = write(kind, place, late())
        expected = ["late", "later"]
        ours = versions(kind, str(place))[-1]
        assert made == Commit(num_rows=2, version=f"version {ours}", replaced=f"version {ours - 1}", num_replaced=1)
    else:
        with pytest.raises(
            StorageError, match=rf"^{place}: somebody else wrote .* so nothing was changed; run it again"
        ):
            write(kind, place, late())
        expected = ["early"]
    assert [row["video_id"] for row in rows_in(read(kind, str(place)))] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_a_write_without_a_commit(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinoray.library.rows._ROW_GROUP", 1)
    num_rows = 0

    def endless() -> Iterator[pa.Table]:
        nonlocal num_rows
        os.kill(os.getpid(), signal.SIGINT)
        while num_rows < 1_000_000:
            num_rows += 1
            yield rows_of("b")

    write(kind, tmp_path / "table", [rows_of("a")])
    with pytest.raises(KeyboardInterrupt):
        write(kind, tmp_path / "table", endless())
    assert num_rows < 1_000_000
    assert [row["video_id"] for row in rows_in(read(kind, str(tmp_path / "table")))] == ["a"]


KILLED = """
import sys, threading, time
from pathlib import Path
from test_lakehouse import KINDS, rows_of, write

def endless(kind):
    yield rows_of(*(f"new{row}" for row in range(100_000)))
    Path(sys.argv[1], kind + ".begun").touch()
    time.sleep(600)

for kind in KINDS:
    threading.Thread(target=write, args=(kind, Path(sys.argv[1], kind), endless(kind))).start()
time.sleep(600)
"""


@pytest.mark.slow  # 3 s: it imports all again
def test_a_killed_writer_leaves_the_last_version_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    for kind in KINDS:
        write(kind, tmp_path / kind, [rows_of("a")])
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == len(KINDS), 100, "all have written rows")
    writer.kill()
    writer.wait()
    for kind in KINDS:
        assert [row["video_id"] for row in rows_in(read(kind, str(tmp_path / kind)))] == ["a"]
        write(kind, tmp_path / kind, [rows_of("c")])
        assert [row["video_id"] for row in rows_in(read(kind, str(tmp_path / kind)))] == ["c"]
        assert len(versions(kind, str(tmp_path / kind))) == 2


def test_an_iceberg_commit_counts_from_its_metadata_on_not_from_the_hint(tmp_path: Path) -> None:
    place = tmp_path / "table"
    write("iceberg", place, [rows_of("a")])
    write("iceberg", place, [rows_of("b")])
    hint = place / "metadata" / "version-hint.text"
    hint.write_text("1")  # as if the second writer had been killed before it
    write("iceberg", place, [rows_of("c")])
    assert hint.read_text() == "3"
    assert [row["video_id"] for row in rows_in(read("iceberg", str(place)))] == ["c"]
    assert len(versions("iceberg", str(place))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_was_moved_is_written_where_it_is_or_not_at_all(kind: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write(kind, old, [rows_of("a")])
    shutil.copytree(old, new)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    if kind == "iceberg":
        copied = sorted(new.rglob("*"))
        with pytest.raises(ConfigError, match=rf"^to {new} is an Iceberg table that was written at {old} and copied"):
            write(kind, new, [rows_of("b")])
        assert sorted(new.rglob("*")) == copied
    else:
        write(kind, new, [rows_of("b")])
        assert [row["video_id"] for row in rows_in(read(kind, str(new)))] == ["b"]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["write.metadata.path", "write.data.path", "write.location-provider.py-impl"])
def test_an_iceberg_table_does_not_choose_where_its_rows_go(key: str, tmp_path: Path) -> None:
    place, other = tmp_path / "table", tmp_path / "other"
    write("iceberg", place, [rows_of("a")])
    latest = place / "metadata" / "v1.metadata.json"
    known = json.loads(latest.read_text())
    latest.write_text(json.dumps(known | {"properties": {key: str(other)}}))
    with pytest.raises(ConfigError, match=rf"table that keeps its files elsewhere \({key}: {other}\): choose an empty"):
        write("iceberg", place, [rows_of("b")])
    snapshot = known["snapshots"][0]
    for wrong in (f"{other}/list.avro", f"{place}/../other/list.avro"):
        latest.write_text(json.dumps(known | {"snapshots": [snapshot | {"manifest-list": wrong}]}))
        with pytest.raises(ConfigError, match=rf"whose metadata name {wrong}, which is not below it"):
            write("iceberg", place, [rows_of("b")])
    assert not other.exists()


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_parts_become_files_of_a_useful_size(
    kind: Any, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "table"
    config = LabelsConfig(predictions=out, format=kind, to=str(place))
    labels(config)
    assert len(data_files(place)) == 1  # of six parts
    if kind != "delta":  # its library counts bytes only, and rounds them up to row groups
        monkeypatch.setattr("kinoray.library.rows._ROW_GROUP", 8)
        monkeypatch.setattr("kinoray.library.lakehouse._FILE_ROWS", 16)
        labels(config)
        assert len(data_files(place)) == 1 + 3
    assert len(rows_in(read(kind, str(place)))) == 43
