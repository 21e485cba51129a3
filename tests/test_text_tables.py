"""Lists, annotations and corrections that people write: read as they are meant, or refused with the line."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kinoray.catalog.annotations import read_annotations, read_label_names
from kinoray.catalog.source import cells_of, decode_text, find_files, parse_table_text, text_lines
from kinoray.catalog.table import catalog_of_source
from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError
from kinoray.pack.plan import make_plan
from kinoray.storage.objects import Storage

STORAGE = Storage(StorageConfig())


def rows_of(folder: Path, data: bytes) -> list[tuple[Any, ...]]:
    """(name, label, split) of each row of the catalog that a list makes."""
    (folder / "list.csv").write_bytes(data)
    table = catalog_of_source(STORAGE, str(folder / "list.csv")).table
    names = [uri.removeprefix(f"{folder}/") for uri in table["uri"].to_pylist()]
    return list(zip(names, table["label"].to_pylist(), table["split"].to_pylist(), strict=True))


TWO = [("a.mp4", "walk", None), ("b.mp4", "run", None)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"path,label\na.mp4,walk\nb.mp4,run\n", id="plain"),
        pytest.param(b"path,label\r\na.mp4,walk\r\nb.mp4,run", id="windows"),
        pytest.param(b"path,label\ra.mp4,walk\rb.mp4,run\r", id="lone carriage returns"),
        pytest.param(b"\xef\xbb\xbfpath,label\na.mp4,walk\nb.mp4,run\n", id="byte order mark"),
        pytest.param("path\tlabel\na.mp4\twalk\nb.mp4\trun\n".encode("utf-16"), id="UTF-16 of a spreadsheet"),
        pytest.param(b"path;label\na.mp4;walk\nb.mp4;run\n", id="semicolons"),
        pytest.param(b'"path";"label"\n"a.mp4";"walk"\n"b.mp4";"run"\n', id="semicolons and quotes"),
        pytest.param(b"sep=;\r\npath;label\r\na.mp4;walk\r\nb.mp4;run\r\n", id="sep line"),
        pytest.param(b"\n  \npath,label\n\na.mp4,walk\n,\n   \nb.mp4,run\n,,"[:-2] + b"\n", id="empty lines"),
        pytest.param(b" Path , LABEL ,\na.mp4 , walk,\nb.mp4,run ,\n", id="spaces and a nameless column"),
        pytest.param(b",path,label\n0,a.mp4,walk\n1,b.mp4,run\n", id="the index of pandas"),
        pytest.param(b"label,uri,note\nwalk,a.mp4,x\nrun,b.mp4,\n", id="another order"),
    ],
)
def test_a_list_is_read_as_it_is_meant(data: bytes, tmp_path: Path) -> None:
    assert rows_of(tmp_path, data) == TWO


def test_cells_are_what_rfc_4180_says(tmp_path: Path) -> None:
    assert cells_of("x", '"a,b.mp4","say ""hi""",,c d') == ["a,b.mp4", 'say "hi"', "", "c d"]
    assert cells_of("x", '""') == [""]
    assert cells_of("x", "a;b\tc") == ["a;b\tc"]
    long = "a" * 300_000 + ".mp4"
    assert cells_of("x", f'"{long}",walk') == [long, "walk"]  # Python's own reader stops at 131,072
    assert text_lines("a\x0b\x0c\x1c\x85\u2028b\nc\r\rd\r\n") == ["a\x0b\x0c\x1c\x85\u2028b", "c", "", "d"]
    assert rows_of(tmp_path, 'path,label\n"x\u2028\x85.mp4",walk\n'.encode()) == [("x\u2028\x85.mp4", "walk", None)]


@pytest.mark.parametrize("text", ["x", '""'])
def test_a_long_cell_takes_no_more_memory_than_its_text(text: str) -> None:
    line = f'"{text * 1_000_000}",walk'
    tracemalloc.start()
    cells = cells_of("x", line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(cell) for cell in cells] == [1_000_000, 4]
    assert peak < 5_000_000


def test_one_quote_loses_no_row(tmp_path: Path) -> None:
    """150 rows, one unbalanced quote: an error with the line where it opens, not 100 rows."""
    lines = ["path,label", *(f"v{index:03d}.mp4,walk" for index in range(150))]
    for number, odd in ((40, '"v039.mp4,walk'), (91, 'v090.mp4,"walk'), (150, 'v149.mp4,walk"'), (7, 'v"006.mp4,walk')):
        text = "\n".join([*lines[: number - 1], odd, *lines[number:]]) + "\n"
        with pytest.raises(CatalogError, match=rf"list\.csv line {number}, cell \d: a quote is not closed in its line"):
            rows_of(tmp_path, text.encode())
    closed_later = [*lines[:39], '"v038.mp4,walk', *lines[40:89], 'v088.mp4",walk', *lines[90:]]
    with pytest.raises(CatalogError, match="line 40, cell 1: a quote is not closed in its line"):
        rows_of(tmp_path, "\n".join(closed_later).encode())
    assert len(rows_of(tmp_path, "\n".join(lines).encode())) == 150


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path,label\na,b.mp4,walk\n", "line 2: 3 cells are more than the 2 columns .path,label.; put quotes around"),
        (b"path,label\na.mp4,walk\nb.mp4\n", "line 3: 1 cells are fewer than the 2 columns"),
        (b"path,label,split\na.mp4,walk,train,\n", "line 2: 4 cells are more"),
        (b'path,label\n"a.mp4,walk"\n', "line 2: 1 cells are fewer"),
        (b'path,label\na.mp4, "walk, fast"\n', "line 2, cell 2: a quote"),
        (b'path,label\n"a.mp4" ,walk\n', "line 2, cell 1: a quote"),
        (b'path,label\n"a\nb.mp4",walk\n', "line 2, cell 1: a quote is not closed in its line"),
        (b"path,label\na.mp4,walk\n\0\0\n", "line 3 holds a zero byte"),
        ("path,label\na.mp4,walk\n".encode("utf-16-le"), "line 1 holds a zero byte"),
        (b"path,label\na.mp4,walk\nb.mp4,caf\xe9\n", r"line 3 is not UTF-8 text \(byte 0xe9\); save the file as UTF-8"),
        (b"path,label\rcaf\xe9.mp4,walk\r", r"line 2 is not UTF-8 text"),
        (b"\xff\xfep\0a\0t", "not UTF-16 text"),
        ("path,\ufefflabel\na.mp4,walk\n".encode(), r"line 1: the column '\\ufefflabel' holds characters that do not"),
        ("path,label\u200b\na.mp4,walk\n".encode(), r"line 1: the column 'label\\u200b' holds characters that do not"),
        (
            f"path,{'x' * 230}\na.mp4\n".encode(),
            r"line 2: 1 cells are fewer than the 2 columns .path,x{192}\.\.\.\); put",
        ),
        (b"path,label,Label\na.mp4,x,y\n", "line 1: two columns are called 'label'"),
        (b"path,label;split\na.mp4,x;y\n", "line 1: the column 'label;split' holds what may be meant to divide"),
        (b"sep=|\npath|label\n", r"line 1: cells divided by '\|' are not read"),
        (b"path|label\na.mp4|walk\n", "line 1: there is no column path"),
        (b"path,label\n ,walk\n", "line 2: the path is empty"),
        (b'path,label\na.mp4,walk\n",",\n', "line 3: its cells hold quotes and commas alone"),
        (b'path,label\n"""",\n', "line 2: its cells hold quotes and commas alone"),
    ],
)
def test_what_is_odd_is_named_by_its_line(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=rf"list\.csv {message}" if message[0] != "n" else message):
        rows_of(tmp_path, data)


def test_test_rows_need_no_label(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label,split\nv1.mp4,walk,train\nv2.mp4,run,train\nv3.mp4,,test\n")
    source = str(tmp_path / "list.csv")
    plan = make_plan(source, find_files(STORAGE, source), shard_bytes=100, val_fraction=0.0)
    packed = {video.name: (video.label, video.label_id, video.split) for unit in plan.units for video in unit.files}
    assert packed == {"v1.mp4": ("walk", 1, "train"), "v2.mp4": ("run", 0, "train"), "v3.mp4": (None, None, "test")}
    (tmp_path / "list.csv").write_text("path,label,split\nv1.mp4,walk,train\nv2.mp4,,train\n")
    with pytest.raises(
        CatalogError, match=r"v2\.mp4 has no label; .* whose split is not holdout or test or unlabelled"
    ):
        make_plan(source, find_files(STORAGE, source), shard_bytes=100, val_fraction=0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('label,youtube_id,time_start,time_end\nwalk,aaa,1,2\n"run,bbb,1,2\n', "line 3, cell 1: a quote"),
        ("label,youtube_id,time_start,time_end\nwalk,aaa,1\n", "line 2: 3 cells are fewer than the 4 columns"),
        ('a.mp4,walk\n"b.mp4,run\n', "line 2, cell 1: a quote"),
        ("a.mp4,walk\nb.mp4,run,train\n", "line 2: 3 cells are more than the 2 columns"),
        ("youtube_id,label,label,time_start,time_end\n", "two columns are called 'label'"),
    ],
)
def test_annotations_are_as_strict(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(CatalogError, match=rf"train\.csv .*{message}"):
        read_annotations(STORAGE, [str(tmp_path / "train.csv")], {})


def test_annotations_with_other_delimiters_and_line_ends_inside_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('label;youtube_id;time_start;time_end\n"a; b";aaa;1;2\nc;bbb;3;4\n')
    rows = read_annotations(STORAGE, [str(tmp_path / "train.csv")], {})
    assert [(row.key, row.label) for row in rows] == [("aaa_000001_000002", "a; b"), ("bbb_000003_000004", "c")]
    (tmp_path / "train.txt").write_text("my video 1.mp4 uri\nb.mp4 path\n")
    rows = read_annotations(STORAGE, [str(tmp_path / "train.txt")], {})
    assert [(row.key, row.label) for row in rows] == [("my video 1", "uri"), ("b", "path")]
    (tmp_path / "train.csv").write_text("a.mp4,video\nb.mp4,path\n")
    rows = read_annotations(STORAGE, [str(tmp_path / "train.csv")], {})
    assert [(row.key, row.label) for row in rows] == [("a", "video"), ("b", "path")]
    (tmp_path / "val.jsonl").write_text('{"path": "a\u2028b.mp4", "label": "x\x85y"}\n')
    (row,) = read_annotations(STORAGE, [str(tmp_path / "val.jsonl")], {})
    assert (row.key, row.label) == ("a\u2028b", "x\x85y")


def test_label_names_are_as_strict(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    for text, expected in (
        ('0,walk\n1,"run, fast"\n', {0: "walk", 1: "run, fast"}),
        ('walk\n"run, fast"\n', {0: "walk", 1: "run, fast"}),
        ("0\twalk\n1\trun\n", {0: "walk", 1: "run"}),
    ):
        path.write_text(text)
        assert read_label_names(STORAGE, str(path)) == expected
    for text, message in (
        ('0,walk\n1,"run\n', "line 2, cell 1: a quote"),
        ("id,name\n0,walk\n1,run\n", "line 1 has no"),
    ):
        path.write_text(text)
        with pytest.raises(CatalogError, match=message):
            read_label_names(STORAGE, str(path))


def test_every_line_is_a_row_or_an_error(tmp_path: Path) -> None:
    """Each character that divides or quotes, at each place of a list: all its rows, or an error with a line."""
    good = "path,label\na.mp4,walk\nb.mp4,run\nc.mp4,jump\n"
    outcomes = set()
    for place in range(len(good) + 1):
        for odd in ('"', ",", ";", "\t", "\r", "\n", "\0", "\x85"):
            text = good[:place] + odd + good[place:]
            try:
                outcomes.add(str(len(parse_table_text("x", decode_text("x", text.encode()), ("path",), "no").records)))
            except CatalogError as error:
                outcomes.add(str(error)[:7])
    assert outcomes == {"3", "x line "}
