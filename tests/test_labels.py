"""`kinoray labels`: filters, joins, sorts and formats against plain Python over the whole table."""

import csv
import fnmatch
import io
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from kinoray.catalog.table import Catalog, save_catalog
from kinoray.config.scoring import WindowsConfig
from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, ConfigError
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.unit import WINDOW_SCHEMA, labelling_id
from kinoray.library.config import LabelsConfig
from kinoray.library.labels import labels
from kinoray.library.numbers import read_result
from kinoray.library.rows import LABEL_SCHEMA, Where, count_rows, defused, scan, undefused
from kinoray.storage.objects import Storage, join
from small_sets import catalog_of
from small_tables import answer, job_record, label_library, ledger_in, library, planned, rows_for

CATALOG = library(43)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished table of 43 videos in units of 8."""
    folder = tmp_path_factory.mktemp("out")
    label_library(ledger_in(Storage(), folder), CATALOG)
    return str(folder)


def plain_rows(out: str) -> list[Row]:
    """All rows, with the first class and score worked out by hand."""
    rows: list[Row] = read_predictions(Storage(), out).to_pylist()
    for row in rows:
        row["label"] = row["label_topk"][0] if row["label_topk"] else None
        row["score"] = row["score_topk"][0] if row["score_topk"] else None
    return rows


def written(config: LabelsConfig, to: Path) -> list[Row]:
    """What it writes as JSON lines."""
    labels(replace(config, format="jsonl", to=str(to)))
    return [json.loads(line) for line in to.read_text().splitlines()]


def at_least(row: Row, name: str, value: float) -> bool:
    return row[name] is not None and row[name] >= value


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, lambda row: True),
        ({"status": ("quarantined",)}, lambda row: row["status"] == "quarantined"),
        ({"status": ("labelled", "skipped")}, lambda row: row["status"] == "labelled"),
        ({"status": ("abstained",)}, lambda row: row["abstained"]),
        ({"label": ("red",)}, lambda row: row["label"] == "red"),
        ({"label": ("red", "blue")}, lambda row: row["label"] in ("red", "blue")),
        ({"score": (0.75, 1.0)}, lambda row: at_least(row, "score", 0.75)),
        ({"score": (0.0, 0.7)}, lambda row: row["score"] is not None and row["score"] <= 0.7),
        ({"margin": (0.21, 0.59)}, lambda row: at_least(row, "margin", 0.21) and row["margin"] < 0.59),
        ({"video_id": "v00?[13]"}, lambda row: fnmatch.fnmatchcase(row["video_id"], "v00?[13]")),
        (
            {"video_id": "*1*", "label": ("green",), "score": (0.6, 1.0)},
            lambda row: "1" in row["video_id"] and row["label"] == "green" and at_least(row, "score", 0.6),
        ),
    ],
)
def test_filters_keep_what_plain_python_keeps(
    out: str, tmp_path: Path, changes: Row, wanted: Callable[[Row], bool]
) -> None:
    expected = [row["video_id"] for row in plain_rows(out) if wanted(row)]
    found = written(LabelsConfig(predictions=out, **changes), tmp_path / "rows.jsonl")
    assert [row["video_id"] for row in found] == expected
    assert expected or changes == {"status": ("abstained",)}  # the others ask for something that is there


def test_abstained_rows_are_found_and_are_labelled_ones_too(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(4), abstained=True)
    for status in ("abstained", "labelled"):
        found = written(LabelsConfig(predictions=str(tmp_path), status=(status,)), tmp_path / "rows.jsonl")
        assert [row["video_id"] for row in found] == ["v0000", "v0001", "v0002", "v0003"]


def test_all_classes_are_named_and_filtered_by_where_there_may_be_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(Storage(), join(str(tmp_path), "several"))
    ledger.pin_job(job_record(scores="sigmoid"))
    catalog = library(12)
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 5)
    for unit in plan.units:
        ledger.commit(unit, rows_for(catalog, unit.keys), "run")
    rows = read_predictions(Storage(), ledger.root).to_pylist()
    for wanted in (("red",), ("blue", "green")):
        found = written(LabelsConfig(predictions=ledger.root, label=wanted), tmp_path / "rows")
        assert [row["video_id"] for row in found] == [
            row["video_id"] for row in rows if set(wanted) & set(row["label_topk"] or ())
        ]
        assert 0 < len(found) < 12
    lists = {"v0000": [0, 2], "v0001": [], "v0002": None}
    known = [{"video_id": name, "uri": "u", "label_ids": ids} for name, ids in lists.items()]
    capsys.readouterr()
    labels(LabelsConfig(predictions=ledger.root, join=write_catalog(tmp_path, known)))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[2:4] == ["LABEL_TOPK", "SCORE_TOPK"]
    assert "|".join(rows[0]["label_topk"]) in lines[0]
    assert [line.split()[-1] for line in lines[:2]] == ["blue|red", "|"]
    assert "CATALOG_LABEL" in head


@pytest.mark.parametrize("name", ["score", "margin", "entropy", "video_id"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("limit", [None, 7])
def test_sorting_and_limits(out: str, tmp_path: Path, name: Any, descending: bool, limit: int | None) -> None:
    rows = sorted(plain_rows(out), key=lambda row: row["video_id"])
    known = [row for row in rows if row[name] is not None]
    known.sort(key=lambda row: row[name], reverse=descending)
    expected = (known + [row for row in rows if row[name] is None])[:limit]
    config = LabelsConfig(predictions=out, sort=name, descending=descending, limit=limit, columns=("video_id",))
    assert written(config, tmp_path / "rows.jsonl") == [{"video_id": row["video_id"]} for row in expected]


def test_a_sort_with_a_limit_drops_what_cannot_come_first(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinoray.library.labels._SORT_BLOCK", 3)  # so that it drops rows many times
    config = LabelsConfig(predictions=out, sort="score", limit=5, columns=("video_id",))
    rows = [row for row in plain_rows(out) if row["score"] is not None]
    expected = sorted(rows, key=lambda row: (row["score"], row["video_id"]))[:5]
    assert [row["video_id"] for row in written(config, tmp_path / "rows")] == [row["video_id"] for row in expected]


# Formats


def test_parquet_has_every_row_and_column_exactly(out: str, tmp_path: Path) -> None:
    totals = labels(LabelsConfig(predictions=out, format="parquet", to=str(tmp_path / "rows.parquet")))
    assert (totals["rows"], totals["matched"]) == (43, 43)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == LABEL_SCHEMA.names
    assert table.drop_columns(["label", "score"]).equals(read_predictions(Storage(), out))
    assert table["label"].to_pylist() == [row["label"] for row in plain_rows(out)]


@pytest.mark.parametrize(
    ("to", "format"),
    [("a.parquet", "parquet"), ("s3://bucket/a.csv", "csv"), ("a.jsonl", "jsonl"), ("folder", "parquet")],
)
def test_a_file_to_write_needs_its_format(to: str, format: str) -> None:
    with pytest.raises(ConfigError, match=f"^format must be given with --to, such as --format {format}: .*got 'table'"):
        LabelsConfig(predictions="labels", to=to)
    assert LabelsConfig(predictions="labels", to=to, summary=True).to == to  # there it is the trace


def test_csv_and_json_lines_say_the_same(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LabelsConfig(predictions=out, columns=("video_id", "label", "score", "label_topk", "abstained"))
    capsys.readouterr()
    labels(replace(config, format="csv"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    expected = written(config, tmp_path / "rows.jsonl")
    assert len(rows) == 43
    for row, other in zip(rows, expected, strict=True):
        assert row["video_id"] == other["video_id"]
        assert row["label"] == (other["label"] or "")
        assert row["score"] == ("" if other["score"] is None else str(other["score"]))
        assert (json.loads(row["label_topk"]) if row["label_topk"] else None) == other["label_topk"]
        assert json.loads(row["abstained"]) == other["abstained"]
    assert expected[0]["score"] == 0.5
    assert expected[1]["score"] == 0.87  # not 0.8700000047683716


HOSTILE = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "'=1", "a,b", 'a"b', "a\nb", "<b>")


def test_a_csv_holds_no_formula_and_gives_every_name_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = catalog_of([{"video_id": name, "uri": f"{name}.mp4"} for name in HOSTILE])
    ledger = ledger_in(Storage(), tmp_path)
    keys = row_keys(catalog.table)
    plan = planned(ledger, catalog.digest, keys, 64)
    numbered = catalog_of([{"video_id": f"v{index:04d}", "uri": "u"} for index in range(len(keys))])
    said = rows_for(numbered, row_keys(numbered.table))
    for name, values in (("video_id", list(HOSTILE)), ("row_key", keys), ("uri", [f"{name}.mp4" for name in HOSTILE])):
        said = said.set_column(said.column_names.index(name), said.schema.field(name), pa.array(values))
    ledger.commit(plan.units[0], said, "run")
    capsys.readouterr()
    labels(LabelsConfig(predictions=str(tmp_path), columns=("video_id", "uri"), format="csv"))
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out, newline="")))[1:]
    assert not [
        cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"))
    ]
    ids = [undefused(cell) for cell, _ in rows]
    assert [name for name in HOSTILE if name != "'=1"] == [name for name in ids if name != "=1"]
    assert defused("a=1") == "a=1"

    labels(LabelsConfig(predictions=str(tmp_path), columns=("video_id",)))
    table = capsys.readouterr().out
    assert "\r" not in table
    assert "a\\u000ab" in table


def test_the_table_is_aligned_shows_50_rows_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_library(ledger_in(Storage(), tmp_path), library(70))
    capsys.readouterr()
    totals = labels(LabelsConfig(predictions=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["VIDEO_ID", "STATUS", "LABEL", "SCORE", "MARGIN", "ERROR_CLASS"]
    assert lines[1].split() == ["v0000", "labelled", "blue", "0.500", "0.000"]
    assert lines[5].split() == ["v0004", "quarantined", "EmptyMedia"]
    assert len({line.index("labelled") for line in lines[1:51] if "labelled" in line}) == 1
    assert lines[51:] == ["labels: 50 of 70 rows; --limit N shows more"]
    assert (totals["rows"], totals["matched"]) == (50, 70)
    assert labels(LabelsConfig(predictions=str(tmp_path), limit=60, sort="margin"))["rows"] == 60
    assert "labels: 60 of 70 rows" in capsys.readouterr().out


def test_a_few_rows_are_shown_and_the_rest_counted_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label_library(ledger_in(Storage(), tmp_path), library(200), unit_size=2)
    for path in sorted(tmp_path.rglob("parts/*.parquet"))[:3]:
        path.unlink()  # and unfinished units do not count
    monkeypatch.setattr("kinoray.library.labels.Storage", Counting)
    Counting.seen.clear()
    totals = labels(LabelsConfig(predictions=str(tmp_path), limit=10))
    assert (totals["rows"], totals["matched"]) == (10, 194)
    assert "labels: 10 of 194 rows; --limit N shows more; 6 of 200 inputs have no row yet\n" in capsys.readouterr().out
    assert len([uri for uri in Counting.seen if "/parts/" in uri]) <= 50


def test_a_job_that_still_lists_its_videos_has_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger_in(Storage(), tmp_path)
    assert labels(LabelsConfig(predictions=str(tmp_path)))["rows"] == 0
    assert "labels: 0 of 0 rows\n" in capsys.readouterr().out


def test_an_empty_result_is_a_header(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LabelsConfig(predictions=out, video_id="nothing")
    capsys.readouterr()
    assert labels(config)["rows"] == 0
    assert "labels: 0 of 0 rows" in capsys.readouterr().out
    labels(replace(config, format="parquet", to=str(tmp_path / "none.parquet")))
    assert pq.read_table(tmp_path / "none.parquet").column_names == LABEL_SCHEMA.names


def test_s3_takes_what_is_written(bucket: str, s3_config: StorageConfig) -> None:
    storage = Storage(s3_config)
    label_library(ledger_in(storage, join(bucket, "out")), CATALOG)
    to = join(bucket, "rows.jsonl")
    labels(LabelsConfig(predictions=join(bucket, "out"), format="jsonl", to=to, storage=s3_config))
    assert [json.loads(line)["video_id"] for line in storage.read(to).splitlines()] == [
        f"v{index:04d}" for index in range(43)
    ]


# Joins


def write_catalog(folder: Path, rows: list[Row]) -> str:
    save_catalog(Storage(), str(folder / "known.parquet"), catalog_of(rows))
    return str(folder / "known.parquet")


def test_a_join_adds_columns_of_the_catalog_by_video_id(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = write_catalog(
        tmp_path,
        [
            {"video_id": f"v{index:04d}", "uri": "elsewhere", "split": f"s{index % 2}", "duration_s": index / 8}
            for index in reversed(range(0, 43, 2))
        ],
    )
    columns = ("catalog_duration_s", "video_id", "catalog_split")
    config = LabelsConfig(predictions=out, join=known, columns=columns, score=(0.6, 1.0), sort="score")
    rows = written(config, tmp_path / "rows.jsonl")
    assert "rows have no video in" in capsys.readouterr().err
    assert len(rows) > 10
    for row in rows:
        index = int(row["video_id"][1:])
        expected = (index / 8, "s0") if index % 2 == 0 else (None, None)
        assert (row["catalog_duration_s"], row["catalog_split"]) == expected
    everything = written(LabelsConfig(predictions=out, join=known, limit=1), tmp_path / "rows.jsonl")[0]
    assert {"catalog_label", "catalog_codec", "label_topk"} <= set(everything)
    assert "catalog_uri" not in everything


def test_a_wrong_catalog_is_refused(out: str, tmp_path: Path) -> None:
    known = write_catalog(tmp_path, [{"video_id": "other", "uri": "u"}])
    with pytest.raises(CatalogError, match=r"none of the 43 videos is in .*known.parquet, whose ids look like other"):
        labels(LabelsConfig(predictions=out, join=known))


# What is read


class Counting(Storage):
    """Notes what is read."""

    seen: list[str] = []  # noqa: RUF012  (one test, one list)

    def read(self, uri: str, *, max_bytes: int = 2**40) -> bytes:
        self.seen.append(uri)
        return super().read(uri, max_bytes=max_bytes)


def test_a_grown_library_reads_as_the_whole_table_does_and_hidden_rows_stay_hidden(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(10))
    label_library(ledger, library(20, first=10))
    label_library(ledger, replaced_catalog(), status="skipped")
    expected = read_predictions(Storage(), ledger.root)
    for where in (Where(), Where(status=("labelled",)), Where(status=("quarantined",))):
        found = pa.concat_tables(scan(ledger, expected.column_names, where))
        assert found.equals(expected.filter(pa.array(where.mask(with_first(expected)).to_pylist())))
    assert "v0000" in expected["video_id"].to_pylist()


def test_of_a_library_that_grew_no_part_is_read_twice_and_no_row_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units of older plans are in the newest; but for what has left the library, only that one is read."""
    ledger = ledger_in(Storage(), tmp_path)
    for size in (8, 20, 32):
        label_library(ledger, library(size), unit_size=4)
    monkeypatch.delattr("kinoray.label.planfile._places_of")
    Counting.seen.clear()
    counted = Ledger(Counting(), ledger.root)
    assert count_rows(counted) == 32
    assert pa.concat_tables(scan(counted, ["video_id"]))["video_id"].to_pylist() == [f"v{i:04d}" for i in range(32)]
    assert len([uri for uri in Counting.seen if "/parts/" in uri]) == 8


def shown_in(ledger: Ledger) -> list[str]:
    """The videos in the table, which all readers agree on."""
    found: list[str] = pa.concat_tables(scan(ledger, ["video_id"]))["video_id"].to_pylist()
    assert read_predictions(Storage(), ledger.root)["video_id"].to_pylist() == found
    assert read_result(Storage(), ledger.root).rows["video_id"].to_pylist() == found
    assert count_rows(ledger) in (None, len(found))
    return found


def named(*numbers: int) -> list[str]:
    return [f"v{number:04d}" for number in numbers]


def test_rows_that_left_the_library_show_until_the_rest_is_labelled(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(12), unit_size=4)
    keys = row_keys(library(12, first=6).table)
    planned(ledger, library(12, first=6).digest, keys, 4)
    assert shown_in(ledger) == named(*range(6, 12), *range(6))
    assert count_rows(ledger) is None
    label_library(ledger, library(12, first=6), unit_size=4)
    assert shown_in(ledger) == named(*range(6, 18))
    label_library(ledger, library(10, first=6), unit_size=4)  # nothing is to be labelled
    assert shown_in(ledger) == named(*range(6, 16))
    assert count_rows(ledger) == 10
    label_library(ledger, library(12), unit_size=4)  # they are back
    assert shown_in(ledger) == named(*range(12))
    label_library(ledger, library(13), unit_size=4)
    assert shown_in(ledger) == named(*range(13))


def test_a_part_with_rows_of_videos_that_have_left_can_be_labelled_again(tmp_path: Path) -> None:
    """Its unit cannot, so what is left of it becomes another one; units that are there stay."""
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(12), unit_size=4)
    plan = label_library(ledger, library(12, first=2), unit_size=4)
    damaged = next(unit for unit in plan.units if not unit.is_whole)
    path = Path(ledger.root, "parts", f"{damaged.unit_id}.parquet")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=rf"delete {path} and run the label command again"):
        read_predictions(Storage(), ledger.root)
    path.unlink()
    again = label_library(ledger, library(12, first=2), unit_size=4)
    assert {unit.unit_id for unit in again.units} & {unit.unit_id for unit in plan.units} == {
        unit.unit_id for unit in plan.units if unit.is_whole
    }
    assert sorted(shown_in(ledger)) == named(*range(2, 14))
    assert label_library(ledger, library(12, first=2), unit_size=4) == again


def test_keys_that_are_not_those_that_were_written_are_named_with_a_remedy_that_works(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(12), unit_size=4)
    (path,) = Path(ledger.root, "plans").glob("*.keys")
    data = path.read_bytes()
    path.write_bytes(data[8:16] + data[:8] + data[16:])
    with pytest.raises(ChecksumMismatch, match=rf"^{path} is not what was written: .* remove (\S+) and") as caught:
        label_library(ledger, library(20), unit_size=4)
    parts = {part: part.read_bytes() for part in Path(ledger.root, "parts").iterdir()}
    Path(re.findall(r"remove (\S+) and", str(caught.value))[0]).unlink()
    label_library(ledger, library(20), unit_size=4)
    assert shown_in(ledger) == named(*range(20))
    assert len(parts) == 3
    assert len(list(Path(ledger.root, "parts").iterdir())) == 5
    label_library(ledger, library(12), unit_size=4)
    assert shown_in(ledger) == named(*range(12))
    assert {part: part.read_bytes() for part in parts} == parts


def test_only_what_was_of_the_same_source_or_of_the_same_units_gives_way(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    for first, source in ((0, "s3://a"), (10, "s3://b"), (20, ""), (30, "")):
        label_library(ledger, library(4, first=first), source=source)
    assert sorted(shown_in(ledger)) == named(*range(4), *range(10, 14), *range(20, 24), *range(30, 34))
    label_library(ledger, library(3, first=40), source="s3://a")
    assert sorted(shown_in(ledger)) == named(*range(10, 14), *range(20, 24), *range(30, 34), *range(40, 43))
    label_library(ledger, library(3, first=10), source="s3://c")
    assert sorted(shown_in(ledger)) == named(*range(10, 13), *range(20, 24), *range(30, 34), *range(40, 43))


def replaced_catalog() -> Catalog:
    """v0001 in the same place with another size: its older row gives way."""
    return catalog_of([{"video_id": "v0001", "uri": "s3://library/v0001.mp4", "size_bytes": 99}])


def with_first(table: pa.Table) -> pa.Table:
    labels_of = [row[0] if row else None for row in table["label_topk"].to_pylist()]
    return table.append_column("label", pa.array(labels_of, pa.string()))


def test_a_slow_reader_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads fetch ahead, but no more than a window: else a slow writer would hold the whole table."""
    monkeypatch.setattr("kinoray.label.planfile._WINDOW", 3)
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, library(40), unit_size=2)
    Counting.seen.clear()
    tables = scan(Ledger(Counting(), ledger.root), ["video_id"])
    for number in range(1, 21):
        assert next(tables)["video_id"].to_pylist() == [f"v{index:04d}" for index in (2 * number - 2, 2 * number - 1)]
        assert len([uri for uri in Counting.seen if "/parts/" in uri]) <= -(-number // 3) * 3


@pytest.mark.slow
def test_a_large_table_is_not_held(tmp_path: Path) -> None:
    """What grows with the table is its plan (a key of 16 digits a row), not the rows themselves."""

    def peak(num_videos: int) -> int:
        catalog = library(num_videos)
        out = ledger_in(Storage(), tmp_path / str(num_videos))
        label_library(out, catalog, unit_size=500)
        del catalog
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        labels(LabelsConfig(predictions=out.root, format="csv", to=str(tmp_path / "rows.csv"), status=("labelled",)))
        _, python_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return python_peak + pa.total_allocated_bytes() - before

    assert (peak(10_000) - peak(2_500)) / 7_500 < 150  # bytes for each row


# Errors


def test_unknown_names_are_refused_with_those_that_there_are(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label: the model knows no class 'pink'; it knows blue, green, red"):
        labels(LabelsConfig(predictions=out, label=("pink",)))
    with pytest.raises(ConfigError, match=r"columns: there is no 'x'; there are video_id, uri, .*label, score"):
        labels(LabelsConfig(predictions=out, columns=("x",)))
    with pytest.raises(ConfigError, match=r"columns: there is no 'catalog_split'; name the catalog with --join"):
        labels(LabelsConfig(predictions=out, columns=("catalog_split",)))
    other = Ledger(Storage(), join(out, labelling_id("another", "config")))
    other.pin_job(job_record(checkpoint="runs/second"))
    with pytest.raises(ConfigError, match=r"predictions must name one labelling; .* holds 2: .* \(by runs/second\)"):
        labels(LabelsConfig(predictions=out))
    Path(other.root, "job.json").unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": (0.5, 1.5)}, r"score must be two numbers in 0 .. 1, the smaller one first, got \(0.5, 1.5\)"),
        ({"limit": -1}, "limit must be at least 0, got -1"),
        ({"descending": True}, "descending must be given with --sort only"),
        ({"format": "parquet"}, "to must be a file with --format parquet"),
    ],
)
def test_wrong_settings_are_named(changes: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(predictions="x", **changes)


# Windows of long videos


def test_windows_are_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """v0000 has one window, v0001 two, v0002 three; the class of window n is that of the video with that number."""
    from deltalake import DeltaTable

    ledger = Ledger(Storage(), str(tmp_path / "out"))
    ledger.pin_job(job_record(windows=WindowsConfig(length_s=2.0, stride_s=2.0)))
    catalog = library(3)
    keys = row_keys(catalog.table)
    for unit in planned(ledger, catalog.digest, keys, 2).units:
        rows = []
        for key in unit.keys:
            for window in range(keys.index(key) + 1):
                said = {name: value for name, value in answer(window).items() if name in WINDOW_SCHEMA.names}
                place = {"video_id": f"v{keys.index(key):04d}", "row_key": key, "window": window, "abstained": False}
                rows.append(place | {"begin_s": 2.0 * window, "end_s": 2.0 * window + 2} | said)
        ledger.commit(unit, rows_for(catalog, unit.keys), "run", pa.Table.from_pylist(rows, schema=WINDOW_SCHEMA))
    config = LabelsConfig(predictions=ledger.root, windows=True, columns=("video_id", "window", "label", "begin_s"))
    expected = [
        {
            "video_id": f"v{index:04d}",
            "window": window,
            "label": ("blue", "green", "red")[window],
            "begin_s": 2.0 * window,
        }
        for index in range(3)
        for window in range(index + 1)
    ]
    assert written(config, tmp_path / "rows") == expected
    labels(replace(config, format="delta", to=str(tmp_path / "table")))
    assert DeltaTable(tmp_path / "table").to_pyarrow_table().to_pylist() == expected
    some = written(replace(config, label=("green",), status=("labelled",)), tmp_path / "rows")
    assert some == [row for row in expected if row["label"] == "green"]
    last = written(replace(config, sort="video_id", descending=True, limit=2), tmp_path / "rows")
    assert [(row["video_id"], row["window"]) for row in last] == [("v0002", 0), ("v0002", 1)]
    capsys.readouterr()
    labels(LabelsConfig(predictions=ledger.root, windows=True))
    assert capsys.readouterr().out.splitlines()[2].split() == ["v0001", "0", "0.000", "2.000", "blue", "0.500", "0.000"]


def test_a_table_without_windows_says_so(out: str) -> None:
    with pytest.raises(ConfigError, match=r"windows: .* was labelled without windows; label with --window-s"):
        labels(LabelsConfig(predictions=out, windows=True))


# Other readers


def test_other_readers_of_parquet_take_the_parts_as_they_lie(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, CATALOG)
    (Path(ledger.root, "parts") / ".kinoray-tmp-1").write_bytes(b"a writer is at work")
    table = pads.dataset(f"{ledger.root}/parts", format="parquet").to_table()
    assert table.sort_by("video_id").equals(read_predictions(Storage(), ledger.root).sort_by("video_id"))


def test_duckdb_reads_the_parts_as_they_lie(tmp_path: Path) -> None:
    """The query of docs/labels.md, by the real DuckDB."""
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed (pip install duckdb)")
    ledger = ledger_in(Storage(), tmp_path)
    label_library(ledger, CATALOG)
    (Path(ledger.root, "parts") / ".kinoray-tmp-1").write_bytes(b"a writer is at work")
    text = (Path(__file__).resolve().parents[1] / "docs" / "labels.md").read_text(encoding="utf-8")
    query = text.partition("```sql\n")[2].partition("```")[0].replace("labels/library/0123456789abcdef", ledger.root)
    first = Counter(row["label"] for row in plain_rows(str(tmp_path)) if row["label"])
    found = duckdb.connect().execute(query).fetchall()
    assert {label: number for label, number, _ in found} == first
