"""Catalogs: what a source means, what a table must be, and reading videos by reference."""

import hashlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faulty_s3 import faulty_s3
from kinoray.catalog.folders import unique_ids
from kinoray.catalog.source import SourceFile, find_files
from kinoray.catalog.table import (
    CATALOG_SCHEMA,
    Catalog,
    Reference,
    catalog_of_files,
    catalog_of_source,
    load_catalog,
    read_video,
    read_videos,
    references,
    save_catalog,
)
from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, InvalidReference, KinorayError, ObjectNotFound
from kinoray.storage.objects import Storage, join

STORAGE = Storage()


def make_catalog(num_rows: int, **columns: list[Any]) -> Catalog:
    """Rows v0, v1, ... with what is given; labels are a and b."""
    values = {
        "video_id": [f"v{i}" for i in range(num_rows)],
        "uri": [f"/videos/v{i}.mp4" for i in range(num_rows)],
        "split": ["val" if i % 4 == 0 else "train" for i in range(num_rows)],
        "label": ["ab"[i % 2] for i in range(num_rows)],
        "label_id": [i % 2 for i in range(num_rows)],
        "fps": [None if i % 3 else 29.97 + i for i in range(num_rows)],
        **columns,
    }
    arrays = [pa.array(values.get(field.name, [None] * num_rows), field.type) for field in CATALOG_SCHEMA]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), ("a", "b"))


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


# --- the table


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_saved_catalog_is_the_same_catalog(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, s3_config: StorageConfig
) -> None:
    storage = Storage(s3_config)
    base = str(tmp_path) if where == "folder" else request.getfixturevalue("bucket")
    catalog = make_catalog(10, uri=[join(base, f"v{i}.mp4") for i in range(10)])
    save_catalog(storage, join(base, "catalog.parquet"), catalog)
    for uri in (base, join(base, "catalog.parquet")):
        loaded = load_catalog(storage, uri)
        assert loaded.table.equals(catalog.table)
        assert loaded.labels == ("a", "b")
        assert loaded.digest == catalog.digest


def test_the_digest_does_not_depend_on_how_parquet_encodes(tmp_path: Path) -> None:
    catalog = make_catalog(5_000)
    save_catalog(STORAGE, str(tmp_path / "a.parquet"), catalog)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=7, compression="gzip", use_dictionary=False)
    dictionary = table.set_column(4, "label", table.column("label").dictionary_encode())
    pq.write_table(dictionary, tmp_path / "c.parquet", row_group_size=4097)
    digests = {load_catalog(STORAGE, str(tmp_path / f"{name}.parquet")).digest for name in "abc"}
    assert digests == {catalog.digest}
    assert len(catalog.digest) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda c: Catalog(c.table.set_column(1, CATALOG_SCHEMA.field("uri"), pa.array(["/x"] * 10)), c.labels),
        lambda c: Catalog(c.table.take(list(reversed(range(10)))), c.labels),
        lambda c: Catalog(c.table.slice(0, 9), c.labels),
        lambda c: Catalog(c.table, ("a", "c")),
    ],
    ids=["value", "order", "rows", "labels"],
)
def test_the_digest_changes_with_the_content(change: Callable[[Catalog], Catalog]) -> None:
    catalog = make_catalog(10)
    assert change(catalog).digest != catalog.digest


def test_label_lists_are_in_the_digest_and_catalogs_without_them_keep_theirs() -> None:
    assert make_catalog(10).digest == "4cdd3530823fc268"
    lists = {"label": [None] * 4, "label_id": [None] * 4, "label_ids": [[0, 1], None, [], [1]]}
    catalog = make_catalog(4, **lists)
    cut = pa.concat_tables([catalog.table.slice(0, 1), catalog.table.slice(1, 2), catalog.table.slice(3)])
    assert Catalog(cut, catalog.labels).digest == catalog.digest
    others = [[[0, 1], [], None, [1]], [[0], [1], [], [1]], [[0, 1], None, [], [0]], [None] * 4]
    digests = {make_catalog(4, **{**lists, "label_ids": ids}).digest for ids in [lists["label_ids"], *others]}
    assert len(digests) == 5
    with pytest.raises(CatalogError, match="some rows have a label_id and others label_ids"):
        make_catalog(4, label_id=[0, None, None, None], label_ids=[None, [1], None, None])
    with pytest.raises(CatalogError, match="label_ids 2 has no name: the catalog names 2 classes"):
        make_catalog(4, **{**lists, "label_ids": [[2], None, None, None]})
    for odd in ([1, 0], [1, 1]):
        with pytest.raises(CatalogError, match="label_ids must rise in each list, each class once"):
            make_catalog(4, **{**lists, "label_ids": [[1], odd, [], None]})


def test_select_keeps_the_rows_of_a_split() -> None:
    catalog = make_catalog(10)
    assert catalog.select("val").table.column("video_id").to_pylist() == ["v0", "v4", "v8"]
    assert catalog.select("val").labels == ("a", "b")
    assert len(catalog.select("")) == 10
    with pytest.raises(CatalogError, match=r"split 'test'; its splits are: train \(7\), val \(3\)"):
        catalog.select("test")
    with pytest.raises(CatalogError, match="empty"):
        make_catalog(0).select("")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video_id": ["x", "y", "x"]}, "video_id 'x' is used 2 times"),
        ({"label_id": [0, 1, 2]}, "label_id 2 has no name"),
        ({"label_id": [0, -1, 1]}, "has no name"),
    ],
)
def test_a_wrong_table_is_refused(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        make_catalog(3, **columns)


def test_another_tool_may_write_the_parquet(tmp_path: Path) -> None:
    """Columns that are missing are null, others are left out, integers may be of another width."""
    table = pa.table(
        {"uri": ["/a", "/b"], "offset": pa.array([5, 7], pa.int32()), "video_id": ["a", "b"], "mood": [1, 2]}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    catalog = load_catalog(STORAGE, str(tmp_path / "x.parquet"))
    assert catalog.table.schema.equals(CATALOG_SCHEMA)
    assert catalog.table.select(["video_id", "offset", "label"]).to_pylist() == [
        {"video_id": "a", "offset": 5, "label": None},
        {"video_id": "b", "offset": 7, "label": None},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not parquet", "is not a catalog"),
        (pa.table({"uri": ["/a"]}), "lacks the column video_id"),
        (pa.table({"uri": ["/a"], "video_id": ["a"], "fps": ["fast"]}), "fast"),
        (pa.table({"uri": ["/a", "/b"], "video_id": ["a", "a"]}), "used 2 times"),
        (pa.table({"uri": ["/a"], "video_id": pa.nulls(1, pa.string())}), "null"),
    ],
)
def test_a_parquet_that_is_no_catalog_is_named(content: bytes | pa.Table, message: str, tmp_path: Path) -> None:
    if isinstance(content, pa.Table):
        sink = io.BytesIO()
        pq.write_table(content, sink)
        content = sink.getvalue()
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(CatalogError, match=rf"x\.parquet.*{message}"):
        load_catalog(STORAGE, str(tmp_path / "x.parquet"))


def test_a_folder_without_a_catalog_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"catalog\.parquet: no such file; expected a folder that `kinoray pack`"):
        load_catalog(STORAGE, str(tmp_path))


# --- what a source means


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_folder_of_videos_is_known_by_extension(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, s3_config: StorageConfig
) -> None:
    storage = Storage(s3_config)
    source = str(tmp_path) if where == "folder" else request.getfixturevalue("bucket") + "/library"
    for name in ("a/x.mp4", "a/b/y.MKV", "z.3gp", "notes.txt", "mp4", ".mp4", "a/x.json"):
        storage.put(join(source, name), name.encode())
    catalog = catalog_of_source(storage, source)
    assert catalog.table.select(["video_id", "uri", "size_bytes", "label", "status"]).to_pylist() == [
        {"video_id": "a__b__y", "uri": f"{source}/a/b/y.MKV", "size_bytes": 9, "label": None, "status": "listed"},
        {"video_id": "a__x", "uri": f"{source}/a/x.mp4", "size_bytes": 7, "label": None, "status": "listed"},
        {"video_id": "z", "uri": f"{source}/z.3gp", "size_bytes": 5, "label": None, "status": "listed"},
    ]
    assert list(read_videos(storage, references(catalog.table))) == [b"a/b/y.MKV", b"a/x.mp4", b"z.3gp"]


CONTAINERS = {
    "mp4": "mpeg4",
    "mov": "mpeg4",
    "avi": "mpeg4",
    "matroska": "mpeg4",
    "asf": "msmpeg4v3",
    "flv": "flv",
    "mpegts": "mpeg2video",
    "vob": "mpeg2video",
    "mxf": "mpeg2video",
    "rm": "rv10",
    "ivf": "libvpx",
    "nut": "mpeg4",
    "h264": "libx264",
    "hevc": "libx265",
    "gif": "gif",
    "apng": "apng",
}
PIXELS = {"gif": "rgb8", "apng": "rgb24"}
NO_VIDEOS = {
    "README": b"The free software, and more of it.\n",
    "page": b"<html>\xc3\xa9 G" + b"G" * 700,
    "picture": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "photo": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
    "song": b"\0\0\0\x1cftypM4A \0\0\0\0isom",
    "sound": b"RIFF\x24\0\0\0WAVEfmt ",
    "sticker": b"RIFF\x24\0\0\0WEBPVP8 ",
    "vorbis": b"OggS\0\2" + bytes(20) + b"\x01\x1e\x01vorbis" + bytes(500),
    "random.bin": hashlib.sha512(b"x").digest() * 9,
    "nothing": b"",
}


def gif(num_pictures: int, delay_ms: int) -> bytes:
    """As Pillow writes it, with as many colours as a GIF can have and without a word of repetition."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)) for _ in range(num_pictures)]
    sink = io.BytesIO()
    if num_pictures > 1:
        pictures[0].save(sink, "gif", save_all=True, append_images=pictures[1:], duration=delay_ms)
    else:
        pictures[0].save(sink, "gif")
    return sink.getvalue()


def webp(num_pictures: int) -> bytes:
    """With an alpha plane, so that a still one has the long header, too."""
    pictures = [Image.new("RGBA", (16, 16), (100 * shade, 0, 0, 99)) for shade in range(num_pictures)]
    sink = io.BytesIO()
    pictures[0].save(sink, "webp", save_all=num_pictures > 1, append_images=pictures[1:])
    return sink.getvalue()


def container(kind: str) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format=kind) as file:
        stream = file.add_stream(CONTAINERS[kind], rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, PIXELS.get(kind, "yuv420p")
        if kind == "hevc":
            stream.options = {"x265-params": "log-level=none:pools=none"}
        for number in range(2):
            frame = av.VideoFrame(176, 144, "yuv420p")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return sink.getvalue()


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_where_a_name_does_not_say_what_a_file_is_its_first_bytes_do(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, s3_config: StorageConfig
) -> None:
    storage = Storage(s3_config)
    source = str(tmp_path) if where == "folder" else request.getfixturevalue("bucket") + "/library"
    videos = {kind: container(kind) for kind in CONTAINERS}
    videos["moves.gif"] = gif(2, 200)
    videos["moves.webp"] = webp(2)
    videos["avchd.odd"] = b"".join(bytes(4) + b"G" + bytes(187) for _ in range(3))
    videos["theora.ogg"] = b"OggS\0\2" + bytes(22) + b"\x80theora" + bytes(500)
    videos["quicktime"] = b"\x29\xb9\x27\0mdat" + bytes(100)
    for name, data in {**videos, **NO_VIDEOS, "still.gif": gif(1, 0), "still.webp": webp(1)}.items():
        storage.put(join(source, name), data)
    said: list[str] = []
    catalog = catalog_of_source(storage, source, say=said.append)
    assert sorted(uri.rpartition("/")[2] for uri in catalog.table["uri"].to_pylist()) == sorted(videos)
    assert said == [f"{source}: 12 files are no videos (no ending 9, .bin 1, .gif 1, .webp 1), and left out"]
    assert [file.name for file in find_files(storage, f"{source}/avi")] == ["avi"]
    with pytest.raises(CatalogError, match="README is a file, and no video"):
        find_files(storage, f"{source}/README")


class Counted(Storage):
    """Keeps what was looked at."""

    looks: ClassVar[list[str]] = []

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        self.looks.append(uri)
        return Storage.read_range(self, uri, offset, length)


def test_few_files_are_looked_at(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"{index}{ending}" for index in range(50) for ending in (".mp4", ".MTS", ".json")))
    assert sum(file.is_video for file in find_files(Counted(), str(tmp_path))) == 100
    assert Counted.looks == []
    for index in range(1000):
        (tmp_path / f"{index:04d}").write_bytes(b"FLV\x01")
        (tmp_path / f"{index:04d}.bin").write_bytes(b"FLW\x01")
    said: list[str] = []
    files = find_files(Counted(), str(tmp_path), say=said.append)
    assert sum(file.is_video for file in files) == 1100
    assert len(Counted.looks) == len(set(Counted.looks)) == 668
    remedy = "; to choose, list them in a .csv"
    assert [text.removeprefix(f"{tmp_path}: of 1000 ").removesuffix(remedy) for text in said] == [
        "files without an ending 334 were looked at and 334 of them are videos, so the others are taken for videos, "
        "too",
        ".bin files 334 were looked at and 0 of them are videos, so the others are taken for none",
    ]


def test_names_of_lists_mean_what_they_mean_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "home/a.mp4", "b c.mp4", "set/d.mp4")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = ["~/a.mp4,cafe\u0301", f"file://{tmp_path}/b%20c.mp4,caf\u00e9", "d.mp4,x"]
    (tmp_path / "set" / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    catalog = catalog_of_source(STORAGE, f"file://{tmp_path}/set/list.csv")
    expected = [f"{tmp_path}/{name}" for name in ("set/d.mp4", "b c.mp4", "home/a.mp4")]
    assert catalog.table["uri"].to_pylist() == expected
    assert catalog.labels == ("caf\u00e9", "x")
    assert [file.uri for file in find_files(STORAGE, f"file://{tmp_path}/set") if file.is_video] == expected[:1]


def test_relative_sources_give_absolute_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "in/a.mp4")
    monkeypatch.chdir(tmp_path)
    assert catalog_of_source(STORAGE, "in/").table.column("uri").to_pylist() == [f"{tmp_path}/in/a.mp4"]
    assert catalog_of_source(STORAGE, ".").table.column("uri").to_pylist() == [f"{tmp_path}/in/a.mp4"]


def test_a_csv_names_videos_relative_to_itself(tmp_path: Path) -> None:
    write_files(tmp_path, "set/clips/a.mp4", "elsewhere/b.bin")
    (tmp_path / "set" / "list.csv").write_text(
        f'\ufeffPath, Label ,split\nclips/a.mp4,walking,validation\n{tmp_path}/elsewhere/b.bin,"run, fast",\n'
        "clips/absent.mp4,,test\n",
        encoding="utf-8",
    )
    catalog = catalog_of_source(STORAGE, str(tmp_path / "set" / "list.csv"))
    rows = catalog.table.select(["uri", "label", "label_id", "split", "size_bytes"]).to_pylist()
    assert sorted(rows, key=lambda row: row["uri"]) == [
        {"uri": f"{tmp_path}/elsewhere/b.bin", "label": "run, fast", "label_id": 0, "split": None, "size_bytes": 15},
        {"uri": f"{tmp_path}/set/clips/a.mp4", "label": "walking", "label_id": 1, "split": "val", "size_bytes": 15},
        {"uri": f"{tmp_path}/set/clips/absent.mp4", "label": None, "label_id": None, "split": "test", "size_bytes": 0},
    ]
    assert catalog.labels == ("run, fast", "walking")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.mp4,x\n", r"no column path: .* found 'file,label'"),
        ("", "no column path"),
        ("path,label\na.mp4,x\n,x\n", "line 3: the path is empty"),
        ("path\na.mp4\n./a.mp4\n", "line 3: ./a.mp4 is listed twice"),
        ("path,label\n", "lists no video"),
    ],
)
def test_a_malformed_csv_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(CatalogError, match=rf"list\.csv.*{message}"):
        catalog_of_source(STORAGE, str(tmp_path / "list.csv"))


def test_a_csv_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path\n\xff\xfe\n")
    with pytest.raises(CatalogError, match="is not UTF-8"):
        catalog_of_source(STORAGE, str(tmp_path / "list.csv"))


def test_a_packs_catalog_stands_for_its_folder(tmp_path: Path) -> None:
    write_files(tmp_path, "a.mp4")
    catalog = make_catalog(3, uri=[str(tmp_path / "shards" / "x.tar")] * 3)
    save_catalog(STORAGE, str(tmp_path / "catalog.parquet"), catalog)
    (tmp_path / "pack.json").write_text('{"catalog_digest": "x"}')
    assert catalog_of_source(STORAGE, str(tmp_path)).digest == catalog.digest
    assert catalog_of_source(STORAGE, str(tmp_path / "catalog.parquet")).digest == catalog.digest


def test_nothing_to_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="absent: no such folder"):
        catalog_of_source(STORAGE, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="found nothing; expected videos"):
        catalog_of_source(STORAGE, str(tmp_path / "empty"))
    write_files(tmp_path, "texts/a.txt")
    with pytest.raises(CatalogError, match=r"found 1 file, and it is no video \(\.txt 1\); expected videos"):
        catalog_of_source(STORAGE, str(tmp_path / "texts"))
    with pytest.raises(CatalogError, match=r"a\.txt is a file, and no video; expected a folder"):
        catalog_of_source(STORAGE, str(tmp_path / "texts" / "a.txt"))


def test_a_name_that_is_not_utf8_is_percent_encoded_and_read(tmp_path: Path) -> None:
    """Beside a name that looks like its encoding, and a folder of that kind."""
    (tmp_path / "bad\udcff.mp4").write_bytes(b"x")
    (tmp_path / "bad%FF.mp4").write_bytes(b"y")
    (tmp_path / "\udce9 %").mkdir()
    (tmp_path / "\udce9 %" / "a\udc80.mp4").write_bytes(b"z")
    catalog = catalog_of_source(STORAGE, str(tmp_path))
    answers = dict(zip(catalog.table["uri"].to_pylist(), read_videos(STORAGE, references(catalog.table)), strict=True))
    assert answers == {
        f"{tmp_path}/bad%FF.mp4": b"y",
        f"file://{tmp_path}/bad%FF.mp4": b"x",
        f"file://{tmp_path}/%E9%20%25/a%80.mp4": b"z",
    }
    save_catalog(STORAGE, str(tmp_path / "x.parquet"), catalog)
    assert load_catalog(STORAGE, str(tmp_path / "x.parquet")).digest == catalog.digest
    (tmp_path / "list.csv").write_text(f"path\nfile://{tmp_path}/bad%FF.mp4\n")
    (answer,) = read_videos(STORAGE, references(catalog_of_source(STORAGE, str(tmp_path / "list.csv")).table))
    assert answer == b"x"


# --- ids


def test_ids_are_paths_without_dots_slashes_and_extension() -> None:
    assert unique_ids(["bus/a.b.mp4", "c", "d/.hidden", "e f/\u4e16 \u754c.mkv"]) == [
        "bus__a_b",
        "c",
        "d___hidden",
        "e_f__\u4e16_\u754c",
    ]


def test_names_that_come_out_equal_get_a_digest_each() -> None:
    ids = unique_ids(["a/x.mp4", "a/x.avi", "b.mp4"])
    assert ids[2] == "b"
    assert ids[0] == "a__x-" + hashlib.sha256(b"a/x.mp4").hexdigest()[:10]
    assert ids[1] == "a__x-" + hashlib.sha256(b"a/x.avi").hexdigest()[:10]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=40), unique=True, max_size=20))
def test_ids_are_unique_safe_and_independent_of_order(names: list[str]) -> None:
    ids = unique_ids(names)
    assert len(set(ids)) == len(ids)
    assert not any(set(video_id) & set("./\\\0 ") for video_id in ids)
    assert all(0 < len(video_id.encode()) < 200 for video_id in ids)
    assert dict(zip(reversed(names), unique_ids(names[::-1]), strict=True)) == dict(zip(names, ids, strict=True))


def test_names_that_are_chosen_to_come_out_equal_do_not() -> None:
    """A digest that is another file's plain name, a digest of that one, one of a cut name, and two that begin alike."""

    def digest(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    first = f"a_b-{digest('a b.mp4')[:10]}"
    second = f"{first}-{digest(first + '.mp4')[:10]}"
    long = "x" * 200
    names = ["a b.mp4", "a_b.mp4", f"{first}.mp4", f"{first}.avi", f"{second}.mp4", f"{long}.mp4", "c.mp4"]
    names += [f"{long[:180]}-{digest(long + '.mp4')[:10]}.mp4"]
    names += [f"a_b-{digest('a b.mp4')}.mp4"]
    twins = ['!$%%(".mp4', "#((%+*.mp4"]  # found by trying
    assert len({digest(name)[:10] for name in twins}) == 1
    names += twins
    for chosen in (names, names[::-1], names[:3]):
        ids = unique_ids(chosen)
        assert len(set(ids)) == len(chosen)
        assert all(len(video_id.encode()) <= 191 for video_id in ids)
        assert dict(zip(chosen, ids, strict=True)) == dict(zip(reversed(chosen), unique_ids(chosen[::-1]), strict=True))
    assert dict(zip(names, unique_ids(names), strict=True))["c.mp4"] == "c"
    table = catalog_of_files("folder", [SourceFile(name, f"/folder/{name}", 1) for name in names]).table
    assert len(table) == len(names)


def test_a_long_name_is_cut_and_stays_unique() -> None:
    accents = "\u0315\u0300\u0327" * 100_000  # to sort them all would take minutes
    ids = unique_ids(["\u4e16" * 100 + ".mp4", "\u4e16" * 100 + "a.mp4", f"{accents}.mp4", f"{accents}a.mp4"])
    assert len(set(ids)) == 4
    assert all(len(video_id.encode()) < 200 for video_id in ids)


def test_find_files_leaves_nothing_out(tmp_path: Path) -> None:
    write_files(tmp_path, ".DS_Store", "a/._b.mp4", "a/b.mp4", "c")
    assert [(file.name, file.size_bytes) for file in find_files(STORAGE, str(tmp_path))] == [
        (".DS_Store", 9),
        ("a/._b.mp4", 9),
        ("a/b.mp4", 7),
        ("c", 1),
    ]


# --- reading by reference


@pytest.fixture
def shard(tmp_path: Path) -> tuple[str, bytes]:
    """A file of 3 MiB and its content."""
    data = random.Random(1).randbytes(3 * 2**20)
    (tmp_path / "shard").write_bytes(data)
    return str(tmp_path / "shard"), data


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"offset": 3}, "offset and length go together, got 3 and None"),
        ({"length": 3}, "offset and length go together, got None and 3"),
        ({"offset": -1, "length": 3}, "offset -1 and length 3 can be no part of an object"),
        ({"offset": 0, "length": -3}, "offset 0 and length -3 can be no part"),
        ({"offset": 2**63 - 2, "length": 5}, "can be no part"),
        ({"uri": ""}, "'' is no address"),
        ({"uri": "/a\0b"}, "is no address"),
        ({"uri": "s3://"}, "is no address"),
        ({"uri": "s3:///key"}, "is no address"),
        ({"uri": "https://host/a.mp4"}, "only s3:// addresses and local paths"),
    ],
)
def test_a_reference_that_cannot_be_is_the_answer_for_its_video_only(
    place: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, "a.mp4")
    good = Reference(str(tmp_path / "a.mp4"))
    bad = Reference(**({"uri": str(tmp_path / "a.mp4")} | place))
    before, answer, after = read_videos(STORAGE, [good, bad, good])
    assert before == after == b"a.mp4"
    assert isinstance(answer, InvalidReference)
    assert message in str(answer)


def test_every_checksum_is_compared(shard: tuple[str, bytes]) -> None:
    uri, data = shard
    right = hashlib.sha256(data[10:30]).hexdigest()
    assert read_video(STORAGE, Reference(uri, 10, 20, right)) == data[10:30]
    with pytest.raises(ChecksumMismatch, match=r"shard \(bytes 11 \+ 20\): sha256 [0-9a-f]{16}\.\.\. found"):
        read_video(STORAGE, Reference(uri, 11, 20, right))
    with pytest.raises(ChecksumMismatch, match="shard: sha256"):
        read_video(STORAGE, Reference(uri, sha256=right))


def test_a_bit_that_flips_once_costs_a_second_read(bucket: str, s3_server: str, s3_config: StorageConfig) -> None:
    with faulty_s3(s3_server) as proxy:
        storage = Storage(StorageConfig(endpoint_url=proxy.url, region="us-east-1", addressing="path"))
        data = bytes(1000)
        storage.put(f"{bucket}/x", data)
        reference = Reference(f"{bucket}/x", 0, 1000, hashlib.sha256(data).hexdigest())
        proxy.faults = ["flip"]
        assert read_video(storage, reference) == data
        proxy.faults = ["flip"] * 10
        with pytest.raises(ChecksumMismatch):
            read_video(storage, reference)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3 * 2**20 - 5000), st.integers(1, 5000)), max_size=40), st.integers(1, 5))
def test_any_references_come_back_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]], ahead: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-references"
    data = random.Random(1).randbytes(3 * 2**20)
    if not path.exists():
        path.write_bytes(data)
    refs = [Reference(str(path), offset, length) for offset, length in spans] + [Reference(str(path))]
    expected = [data[offset : offset + length] for offset, length in spans] + [data]
    assert list(read_videos(STORAGE, refs, ahead=ahead)) == expected


def test_neighbours_come_in_one_request_also_when_shuffled(
    bucket: str, s3_server: str, s3_config: StorageConfig
) -> None:
    with faulty_s3(s3_server) as proxy:
        storage = Storage(StorageConfig(endpoint_url=proxy.url, region="us-east-1", addressing="path"))
        data = random.Random(2).randbytes(2**20)
        storage.put(f"{bucket}/shard", data)
        near = [Reference(f"{bucket}/shard", offset, 900) for offset in range(0, 20_000, 1000)]
        far = Reference(f"{bucket}/shard", 900_000, 100)
        refs = [*near, far]
        random.Random(3).shuffle(refs)
        got = list(read_videos(storage, refs))
        assert got == [data[ref.offset or 0 :][: ref.length] for ref in refs]
        assert sorted(request.range or "" for request in proxy.gets()) == ["bytes=0-19899", "bytes=900000-900099"]


def test_an_error_takes_the_place_of_its_video_only(shard: tuple[str, bytes], tmp_path: Path) -> None:
    """The third member is damaged, the last lies behind the end, one object is absent: the others arrive."""
    uri, data = shard
    sums = [hashlib.sha256(data[i * 100 : i * 100 + 100]).hexdigest() for i in range(4)]
    sums[2] = "0" * 64
    refs = [
        *(Reference(uri, i * 100, 100, sums[i]) for i in range(4)),
        Reference(str(tmp_path / "absent")),
        Reference(uri, 300, 4 * 2**20),
    ]
    answers = list(read_videos(STORAGE, refs))
    kinds = [type(answer) if isinstance(answer, KinorayError) else len(answer) for answer in answers]
    assert kinds == [100, 100, ChecksumMismatch, 100, ObjectNotFound, ChecksumMismatch]


def test_a_reader_that_stops_early_leaves_no_thread(shard: tuple[str, bytes]) -> None:
    import threading

    uri, _ = shard
    before = threading.active_count()
    reader = read_videos(STORAGE, [Reference(uri) for _ in range(50)])
    next(reader)
    reader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read-videos"):
            thread.join(10)
    assert threading.active_count() == before
