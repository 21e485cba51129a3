"""S3 Inventory as a source: the rows of a listing of its bucket, and a stranger's manifest that leads nowhere else."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import bucket_at
from kinoray.catalog.listing import spool_listing
from kinoray.catalog.table import catalog_of_source, is_catalog
from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, ObjectNotFound
from kinoray.storage.objects import Storage, join

COLUMNS = ("Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "ETag")
NAMES = (
    "a/x.mp4",
    "a/y z.mp4",
    "a/y_z.mp4",
    'b/"q",+%20.mkv',
    "caf\u00e9/\u4e2d.mov",
    "notes.txt",
    "raw",
    "sub/none.bin",
)
DATE = "2026-01-04T01-00Z"

Row = tuple[str, str, str, str, str, str, str]


def rows_of(bucket: str, sizes: dict[str, int]) -> list[Row]:
    """As S3 lists them, but not in order, with an older version and a deleted object."""
    rows: list[Row] = [(bucket, key, "v2", "true", "false", str(size), "e") for key, size in sizes.items()]
    rows.insert(1, (bucket, "a/x.mp4", "v1", "false", "false", "999", "e"))
    rows.insert(3, (bucket, "a/deleted.mp4", "v3", "true", "true", "", ""))
    rows.append((bucket, "a/folder/", "", "true", "false", "0", "e"))
    return rows[::-1]


def as_csv(rows: list[Row], columns: tuple[str, ...] = COLUMNS, encode: Any = quote_plus) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        cells = dict(zip(COLUMNS, row, strict=True)) | {"Key": encode(row[1])}
        writer.writerow([cells[name] for name in columns])
    text = sink.getvalue().encode()
    return gzip.compress(text[:50], mtime=0) + gzip.compress(text[50:], mtime=0)  # two members, a line in both


def as_parquet(rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> bytes:
    bucket, key, version, latest, deleted, size, _ = zip(*rows, strict=True)
    table = pa.table(
        {
            "bucket": bucket,
            "key": key,
            "version_id": version,
            "is_latest": [text == "true" for text in latest],
            "is_delete_marker": [text == "true" for text in deleted],
            "size": pa.array([int(text) if text else None for text in size], pa.int64()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table if "Size" in columns else table.drop_columns(["size"]), sink, row_group_size=3)
    return sink.getvalue()


def write_inventory(
    storage: Storage,
    place: str,
    bucket: str,
    data_files: dict[str, bytes],
    *,
    date: str = DATE,
    kind: str = "CSV",
    **changes: Any,
) -> str:
    """The address of its manifest."""
    items = []
    for name, data in data_files.items():
        storage.put(join(place, "data", name), data)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        items.append({"key": f"inv/{bucket}/all/data/{name}", "size": len(data), "MD5checksum": digest})
    record = {
        "sourceBucket": bucket,
        "destinationBucket": "arn:aws:s3:::elsewhere",
        "version": "2016-11-30",
        "creationTimestamp": "1767488400000",
        "fileFormat": kind,
        "fileSchema": ", ".join(COLUMNS),
        "files": items,
    }
    manifest = json.dumps(record | changes).encode()
    uri = join(place, date, "manifest.json")
    storage.put(uri, manifest)
    storage.put(
        join(place, date, "manifest.checksum"), hashlib.md5(manifest, usedforsecurity=False).hexdigest().encode()
    )
    return uri


@pytest.fixture
def storage(s3_config: StorageConfig) -> Storage:
    return Storage(s3_config)


@pytest.fixture
def sizes(bucket: str, storage: Storage) -> dict[str, int]:
    """A bucket with some objects; the names and sizes of them."""
    found = {name: 4 + number for number, name in enumerate(NAMES)}
    for name, size in found.items():
        storage.put(f"{bucket}/{name}", (b"FLV\x01" if name == "raw" else b"text") + bytes(size - 4))
    return found


@pytest.mark.parametrize("kind", ["CSV", "CSV with %20", "Parquet"])
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_an_inventory_gives_the_rows_of_a_listing(
    kind: str, where: str, bucket: str, sizes: dict[str, int], storage: Storage, s3_server: str, tmp_path: Path
) -> None:
    name = bucket.removeprefix("s3://")
    base = str(tmp_path / "inv") if where == "folder" else f"{bucket_at(s3_server)}/inv"
    place = f"{base}/{name}/all"
    rows = rows_of(name, sizes)
    halves = (rows[:4], rows[4:])
    if kind == "Parquet":
        files = {f"{number}.parquet": as_parquet(half) for number, half in enumerate(halves)}
    else:
        encode = quote_plus if kind == "CSV" else quote
        files = {f"{number}.csv.gz": as_csv(half, encode=encode) for number, half in enumerate(halves)}
    uri = write_inventory(storage, place, name, files, kind=kind[:7].strip() if kind == "Parquet" else "CSV")
    expected_said: list[str] = []
    expected = catalog_of_source(storage, bucket, say=expected_said.append).table
    said: list[str] = []
    assert catalog_of_source(storage, uri, say=said.append).table.equals(expected)
    assert said == [
        f"{uri}: an S3 Inventory of 2026-01-04 01:00 UTC in 2 files; videos are read from {bucket}",
        f"{uri}: 1 older versions and 1 delete markers are left out",
        expected_said[0].replace(bucket, uri),
    ]
    storage.put(join(place, "2026-01-03T01-00Z", "manifest.json"), b"{}")  # older
    storage.put(join(place, "2026-01-03T01-00Z", "manifest.checksum"), b"x")
    storage.put(join(place, "2026-01-05T01-00Z", "manifest.json"), b"{}")  # not finished
    storage.put(join(place, "hive/dt=2026-01-04-01-00/symlink.txt"), b"x")
    assert not is_catalog(storage, uri)
    for source in (place, f"{place}/", f"{place}/{DATE}"):
        said.clear()
        assert catalog_of_source(storage, source, say=said.append).table.equals(expected)
        paths = spool_listing(storage, source, tmp_path / source.replace("/", "-"), say=said.append)
        assert pa.concat_tables([pq.read_table(path) for path in paths]).equals(expected)
        assert sum(line.startswith(f"{uri}: an S3 Inventory of 2026-01-04") for line in said) == 2


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_sizes_may_be_missing(kind: str, bucket: str, sizes: dict[str, int], storage: Storage, tmp_path: Path) -> None:
    name = bucket.removeprefix("s3://")
    columns = ("Bucket", "Key")
    rows = [row for row in rows_of(name, sizes) if row[3:5] == ("true", "false")]
    data = as_csv(rows, columns) if kind == "CSV" else as_parquet(rows, columns)
    file = {"x.csv.gz" if kind == "CSV" else "x.parquet": data}
    uri = write_inventory(storage, str(tmp_path / "x"), name, file, kind=kind, fileSchema="Bucket, Key")
    found = catalog_of_source(storage, uri).table
    expected = catalog_of_source(storage, bucket).table
    assert found.drop_columns("size_bytes").equals(expected.drop_columns("size_bytes"))
    assert found["size_bytes"].null_count == len(found)


def test_a_folder_stands_only_for_an_inventory_of_the_bucket_that_it_is_called_after(
    bucket: str, sizes: dict[str, int], storage: Storage, tmp_path: Path
) -> None:
    name = bucket.removeprefix("s3://")
    uri = write_inventory(storage, str(tmp_path / "other/all"), name, {"x.csv.gz": as_csv(rows_of(name, sizes))})
    place = str(tmp_path / "other/all")
    refused = rf"lists objects of {bucket}, and its folder is not called so.*name the manifest itself: {uri}"
    with pytest.raises(CatalogError, match=refused):
        catalog_of_source(storage, place)
    with pytest.raises(CatalogError, match=refused):
        spool_listing(storage, place, tmp_path / "out")
    assert len(catalog_of_source(storage, uri)) == 6


ITEM = {"key": "inv/b/all/data/x.csv.gz", "size": 3, "MD5checksum": "0" * 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fileFormat": "ORC"}, "an inventory in 'ORC' is not read; have S3 write the next one as Apache Parquet"),
        ({"sourceBucket": "../x"}, "sourceBucket '../x' is not a name"),
        ({"sourceBucket": "b/../c"}, "is not a name"),
        ({"fileSchema": "Bucket, Size"}, "expected Bucket, Key"),
        ({"fileSchema": "Bucket, Key, Key"}, "expected Bucket, Key"),
        ({"files": [ITEM | {"key": "/etc/passwd"}]}, "does not lie in the folder data"),
        ({"files": [ITEM | {"key": "inv/data/.."}]}, r"a file '\.\.' is not a name"),
        ({"files": [ITEM | {"size": 2**40}]}, "has no size up to"),
        ({"files": [ITEM | {"size": -1}]}, "has no size up to"),
        ({"files": [ITEM | {"MD5checksum": ""}]}, "MD5checksum"),
        ({"files": [ITEM, ITEM]}, "named twice"),
        ({"files": {}}, "found nothing"),
        ({"files": 3}, "TypeError"),
        ({"creationTimestamp": "1e9"}, "ValueError"),
        ({"creationTimestamp": "9" * 18}, "creationTimestamp"),
    ],
)
def test_a_manifest_is_read_strictly(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", {}, **changes)
    with pytest.raises(CatalogError, match=message):
        catalog_of_source(Storage(), uri)


def test_what_is_no_manifest_is_said(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"videos": []}')
    with pytest.raises(
        CatalogError, match=r"is not the manifest of an S3 Inventory \(KeyError: 'fileFormat'\); to label a"
    ):
        catalog_of_source(Storage(), f"{tmp_path}/manifest.json")
    with pytest.raises(ObjectNotFound):
        catalog_of_source(Storage(), f"{tmp_path}/absent/manifest.json")


GOOD: Row = ("b", "a.mp4", "", "true", "false", "3", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (as_csv([GOOD, ("other", *GOOD[1:])]), r"x\.csv\.gz line 2: an object of s3://other, expected those of s3://b"),
        (as_csv([GOOD], COLUMNS[:-1]), "line 1: 6 cells, its manifest names 7 columns"),
        (as_csv([("b", "a.mp4", "", "true", "false", "-3", "")]), "size is '-3', expected int"),
        (as_csv([("b", "a.mp4", "", "maybe", "false", "3", "")]), "is_latest is 'maybe', expected bool"),
        (as_csv([("b", "", "", "true", "false", "3", "")]), "key is None, expected str"),
        (as_csv([("b", "x" * 1025, "", "true", "false", "3", "")]), "no object has the key"),
        (as_csv([GOOD], encode=lambda key: "%FF.mp4"), "is no URL-encoded text"),
        (gzip.compress(b'"b","a.mp4', mtime=0), "line 1: unexpected end of data"),
        (gzip.compress(b'"b","a"mp4","","","","",""\n', mtime=0), "line 1: ',' expected after"),
        (gzip.compress(b"\xff\n", mtime=0), "line 1 is no UTF-8"),
        pytest.param(gzip.compress(b"x" * 2**20, mtime=0), "line 1 has more text than a line", id="a bomb"),
        (as_csv([GOOD])[:-9], "is cut: its gzip does not end"),
        (b"not packed", "is damaged"),
    ],
)
def test_a_file_of_an_inventory_is_read_strictly(data: bytes, message: str, tmp_path: Path) -> None:
    uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", {"x.csv.gz": data})
    with pytest.raises(CatalogError, match=message):
        catalog_of_source(Storage(), uri)


def test_a_key_that_comes_twice_is_one_video(tmp_path: Path) -> None:
    uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", {"x.csv.gz": as_csv([GOOD] * 1000)})
    said: list[str] = []
    assert len(catalog_of_source(Storage(), uri, say=said.append)) == 1
    assert said[1:] == [f"{uri}: 999 rows of keys that it has twice are left out"]


def test_a_key_with_two_sizes_of_which_none_is_the_latest_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [GOOD, ("b", "a.mp4", "", "", "", "4", "")]
    columns = ("Bucket", "Key", "Size")
    data = {"x.csv.gz": as_csv(rows, columns)}
    uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", data, fileSchema=", ".join(columns))
    with pytest.raises(CatalogError, match=r"key 'a\.mp4' is there with 3 and with 4 bytes, and nothing says which"):
        catalog_of_source(Storage(), uri)


@pytest.mark.parametrize("name", ["x.csv.gz", "x.csv.GZ"])
def test_text_of_a_csv_is_kept_as_it_is(name: str, tmp_path: Path) -> None:
    text = gzip.decompress(as_csv([GOOD, ("b", "x\ny.mp4", "", "true", "false", "5", "")], encode=lambda key: key))
    data = {name: gzip.compress(b"\xef\xbb\xbf" + text, mtime=0)}
    uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", data)
    found = catalog_of_source(Storage(), uri).table
    assert found["uri"].to_pylist() == ["s3://b/a.mp4", "s3://b/x\ny.mp4"]


def test_who_names_another_part_of_an_inventory_is_told_of_its_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "b/all")
    uri = write_inventory(Storage(), place, "b", {"x.csv.gz": as_csv([GOOD])})
    Storage().put(f"{place}/data/y.parquet", as_parquet([GOOD]))
    for source in (str(tmp_path / "b"), f"{place}/data/x.csv.gz", f"{place}/data/y.parquet"):
        with pytest.raises(CatalogError, match=r"manifest\.json"):
            catalog_of_source(Storage(), source)
    with pytest.raises(CatalogError, match=f"an S3 Inventory is named by its manifest: {uri}"):
        spool_listing(Storage(), str(tmp_path / "b"), tmp_path / "out")
    capsys.readouterr()
    catalog_of_source(Storage(), uri)
    assert capsys.readouterr().err.startswith(f"{uri}: an S3 Inventory of 2026-01-04")


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "b/all")
    data = as_csv([GOOD])
    for changed, message in ((data + b"x", "bytes, its manifest says"), (data[:-1] + b"x", "has the MD5")):
        uri = write_inventory(Storage(), place, "b", {"x.csv.gz": data})
        (tmp_path / "b/all/data/x.csv.gz").write_bytes(changed)
        with pytest.raises(ChecksumMismatch, match=message):
            catalog_of_source(Storage(), uri)
    (tmp_path / f"b/all/{DATE}/manifest.checksum").write_text("0" * 32)
    with pytest.raises(ChecksumMismatch, match=r"its manifest\.checksum says '0000"):
        catalog_of_source(Storage(), uri)


def test_a_table_of_an_inventory_is_read_strictly(tmp_path: Path) -> None:
    def tried(table: pa.Table, **options: Any) -> str:
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        uri = write_inventory(Storage(), str(tmp_path / "b/all"), "b", {"x.parquet": sink.getvalue()}, kind="Parquet")
        with pytest.raises(CatalogError) as error:
            catalog_of_source(Storage(), uri)
        return str(error.value)

    assert "it has no column key" in tried(pa.table({"bucket": ["b"]}))
    assert "row 1: an object of s3://c" in tried(pa.table({"bucket": ["b", "c"], "key": ["a.mp4", "b.mp4"]}))
    assert "size is 'x', expected int" in tried(pa.table({"bucket": ["b"], "key": ["a.mp4"], "size": ["x"]}))
    assert "key is None" in tried(pa.table({"bucket": ["b"], "key": pa.nulls(1, pa.string())}))
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 2**20, pa.int32()), pa.array(["k" * 2**12]))
    assert "more memory" in tried(pa.table({"bucket": ["b"] * 2**20, "key": long}), row_group_size=2**20)
    nested = pa.table({"bucket": ["b"], "key": [["a.mp4"]]})
    assert "whose values are not plain data" in tried(nested)
