"""Plans of libraries larger than memory: keys in files, catalogs in many files, what is taken over and read."""

import hashlib
import io
import tracemalloc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinoray.catalog.pieces import Pieces, find_pieces
from kinoray.catalog.read import time_problem
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, load_catalog, open_pieces, save_catalog
from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, IncompleteOutput, ObjectNotFound
from kinoray.label import keys as pairs_module
from kinoray.label import plan as plan_module
from kinoray.label.keys import Keys, Pairs, Tally, join_pairs, numbers_of, row_keys
from kinoray.label.plan import Plan, StoredKeys, Survey, draft_plan, gone_rows, survey
from kinoray.label.work import work_of
from kinoray.storage.objects import Storage
from small_tables import drafted, library

LOCAL = Storage()
LABELLING = "labelling"


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few are held at once that a handful of rows are many runs, buckets and chunks."""
    monkeypatch.setattr(pairs_module, "_RUN", 8)
    monkeypatch.setattr(plan_module, "_CHUNK", 16)
    monkeypatch.setattr(plan_module, "_SPREAD_ROWS", 2)
    monkeypatch.setattr(plan_module, "_SPREAD", 2)


# Numbers that are sorted on disk


@settings(deadline=None, derandomize=True)
@given(numbers=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=100), cut=st.integers(1, 20))
def test_pairs_come_back_sorted_and_equal_keys_in_the_order_in_which_they_came(
    numbers: list[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "_RUN", 8)
        pairs = Pairs(tmp_path_factory.getbasetemp())
        keys = np.array(numbers, np.uint64)
        for start in range(0, len(keys), cut):
            part = keys[start : start + cut]
            pairs.add(part, np.arange(start, start + len(part)))
        order = np.argsort(keys, kind="stable")
        for bits in (None, 0, 3):
            found = list(pairs.buckets(bits))
            assert np.concatenate([bucket for bucket, _ in found]).tolist() == keys[order].tolist()
            assert np.concatenate([places for _, places in found]).tolist() == order.tolist()
        assert len(pairs) == len(numbers)
        several = {number for number in numbers if numbers.count(number) > 1}
        assert {key for bucket, _ in pairs.repeated() for key in bucket.tolist()} == several


def test_two_sets_are_joined_bucket_by_bucket(small_runs: None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    left, right = random.integers(2**64, size=(2, 300), dtype=np.uint64)
    right[:100] = left[:100]
    one, other = Pairs(tmp_path), Pairs(tmp_path)
    one.add(left, np.arange(300))
    other.add(right[::-1], np.arange(300))
    met = [np.intersect1d(a, b) for (a, _), (b, _) in join_pairs(one, other)]
    assert np.concatenate(met).tolist() == sorted(left[:100].tolist())


# Keys


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_keys_are_the_same_as_numbers_and_as_texts(numbers: list[int]) -> None:
    keys = Keys.of(np.array(numbers, np.uint64))
    texts = [f"k{number:016x}" for number in numbers]
    assert list(keys) == texts
    assert numbers_of(pa.array(texts, pa.string())).tolist() == numbers
    assert Keys.from_texts(texts) == keys
    assert keys[3:9] == texts[3:9]


@pytest.mark.parametrize(
    "text", ["", "k", "0" * 17, "K" + "0" * 16, "k" + "0" * 15, "k" + "G" * 16, "k\u00e9" + "0" * 14]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not `k` and 16 hex digits"):
        numbers_of(pa.array(["k" + "0" * 16, text, "k" + "1" * 16]))


def test_a_tally_tells_collections_apart_and_not_their_orders() -> None:
    keys = np.random.default_rng(0).integers(2**64, size=1000, dtype=np.uint64)

    def tally(*parts: Any) -> Tally:
        found = Tally()
        for part in parts:
            found.add(np.asarray(part, np.uint64))
        return found

    assert tally(keys) == tally(keys[500:], keys[:500][::-1])
    assert tally(keys) != tally(keys[1:])
    assert tally(keys) != tally(keys[1:], keys[1:2])
    assert tally([1, 4]) != tally([2, 3])


WRONG_TIMES = [(5.0, 3.0), (-1.0, None), (None, -1.0), (float("nan"), 3.0), (0.0, float("inf")), (float("nan"), None)]
RIGHT_TIMES = [(None, None), (0.0, 0.0), (3.0, 5.0), (2.0, None), (None, 7.0)]


def with_times(catalog: Catalog, times: Sequence[tuple[float | None, float | None]]) -> Catalog:
    """The catalog with these times in its first rows."""
    table = catalog.table
    for number, name in enumerate(("time_start_s", "time_end_s")):
        values = [pair[number] for pair in times] + [None] * (len(catalog) - len(times))
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.float64()))
    return replace(catalog, table=table)


def test_times_are_part_of_a_key_only_where_they_refuse_the_row() -> None:
    """So that a row that was mended is labelled again, and labellings that are there stay valid."""
    keys = row_keys(library(6).table)
    assert all(time_problem(*times) for times in WRONG_TIMES)
    assert not any(time_problem(*times) for times in RIGHT_TIMES)
    assert row_keys(with_times(library(6), RIGHT_TIMES).table) == keys
    wrong = row_keys(with_times(library(6), WRONG_TIMES).table)
    assert not set(wrong) & set(keys)
    assert set(wrong).isdisjoint(row_keys(with_times(library(6), WRONG_TIMES[1:] + WRONG_TIMES[:1]).table))


def test_only_a_row_that_was_mended_is_planned_again(tmp_path: Path) -> None:
    before = survey(with_times(library(20), [(1.0, 2.0), (5.0, 3.0)]), tmp_path)
    first = draft_plan(LABELLING, before, 8, tmp_path)
    done = {unit.unit_id for unit in first.units}
    mended = with_times(library(20), [(1.0, 4.0), (3.0, 5.0)])
    found = survey(mended, tmp_path)
    plan = draft_plan(LABELLING, found, 8, tmp_path, older=[first], committed=done)
    work = work_of(mended, found.keys, LABELLING, [unit for unit in plan.units if unit.unit_id not in done])
    assert [table["video_id"].to_pylist() for _, table in work] == [["v0001"]]


# Plans, against the plainest way to make them


def plain_plan(
    keys: Sequence[str], unit_size: int, older: Sequence[Plan], committed: Collection[str]
) -> list[tuple[list[str], int]]:
    """Keys and rows of each unit, with everything in memory, as docs/guarantees.md has it."""
    position = {key: row for row, key in enumerate(keys)}
    free = set(keys)
    taken: dict[str, tuple[list[str], int]] = {}
    units = [unit for plan in older for unit in plan.units]
    for finished in (True, False):
        for unit in units:
            mine = [key for key in unit.keys if key in free]
            rows = sorted(position[key] for key in mine)
            near = not rows or rows[-1] - rows[0] < 2 * unit.num_rows + 2
            fits = unit.unit_id in committed if finished else len(mine) == unit.num_rows and near
            if mine and fits and unit.unit_id not in taken:
                taken[unit.unit_id] = (mine, unit.num_rows)
                free.difference_update(mine)
    new = [key for key in keys if key in free]
    found = [*taken.values(), *((new[at : at + unit_size], 0) for at in range(0, len(new), unit_size))]
    found.sort(key=lambda unit: min(position[key] for key in unit[0]))
    return [(mine, num_rows or len(mine)) for mine, num_rows in found]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    catalogs=st.lists(st.lists(st.integers(0, 80), unique=True, min_size=1), min_size=1, max_size=4),
    unit_size=st.integers(1, 20),
    finished=st.sets(st.integers(0, 60)),
)
def test_plans_are_those_that_are_made_in_memory(
    catalogs: list[list[int]], unit_size: int, finished: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (pairs_module, "_RUN", 8),
            (plan_module, "_CHUNK", 16),
            (plan_module, "_SPREAD", 2),
            (plan_module, "_SPREAD_ROWS", 2),
        ):
            patch.setattr(module, name, value)
        plans: list[Plan] = []
        committed: set[str] = set()
        for number, catalog in enumerate(catalogs):
            keys = [f"k{hashlib.sha256(b'%d' % row).hexdigest()[:16]}" for row in catalog]
            plan = drafted(LABELLING, str(number), keys, unit_size, older=plans, committed=committed)
            expected = plain_plan(keys, unit_size, plans, committed)
            assert [(list(unit.keys), unit.num_rows) for unit in plan.units] == expected
            for unit in plan.units:
                places = [keys.index(key) for key in unit.keys]
                assert (unit.first, unit.last) == (min(places), max(places))
                assert (unit.mask is None) == unit.is_whole
            gone = {
                (unit_id, row)
                for unit_id, rows in gone_rows(Keys.from_texts(keys), plans, committed, folder)
                for row in rows.tolist()
            }
            made = {unit.unit_id: unit for older in reversed(plans) for unit in older.units if unit.is_whole}
            assert gone == {
                (unit_id, row) for unit_id in committed for row, key in enumerate(made[unit_id].keys) if key not in keys
            }
            plans.append(plan)
            committed |= {unit.unit_id for at, unit in enumerate(plan.units) if unit.is_whole and at in finished}


@pytest.mark.parametrize("what", ["finished", "open", "gone"])
def test_of_the_rows_that_older_plans_hold_a_few_are_in_memory_at_once(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are found by sorting on disk; what is read back at once is a range of them, and not the library."""
    num_rows, run = 2**13, 2**8
    monkeypatch.setattr(pairs_module, "_RUN", run)
    monkeypatch.setattr(plan_module, "_CHUNK", run)
    read, buckets = [], Pairs.buckets

    def watched(self: Pairs, bits: int | None = None) -> Iterator[tuple[Any, Any]]:
        for found in buckets(self, bits):
            read.append(len(found[0]))
            yield found

    monkeypatch.setattr(Pairs, "buckets", watched)
    grown = Keys.of(np.random.default_rng(0).integers(2**64, size=num_rows + 50, dtype=np.uint64))
    before = draft_plan(LABELLING, Survey("before", grown[:num_rows]), 2**5, tmp_path)
    done = {unit.unit_id for unit in before.units}
    if what == "gone":
        rows = gone_rows(grown[num_rows // 2 :], [before], done, tmp_path)
        assert sum(len(places) for _, places in rows) == num_rows // 2
    else:
        committed = done if what == "finished" else set()
        plan = draft_plan(LABELLING, Survey("grown", grown), 2**5, tmp_path, older=[before], committed=committed)
        assert [len(unit.keys) for unit in plan.units] == [2**5] * (num_rows >> 5) + [32, 18]
    assert 0 < max(read) <= 2 * run


# Catalogs of many files


def cut_in_files(catalog: Catalog, folder: Path, sizes: Sequence[int], group_rows: int = 7) -> str:
    """The catalog as files; the address of all of them."""
    folder.mkdir()
    start = 0
    for number, size in enumerate(sizes):
        part = Catalog(catalog.table.slice(start, size), catalog.labels)
        save_catalog(LOCAL, str(folder / f"part-{number}.parquet"), part)
        table = pq.read_table(folder / f"part-{number}.parquet")
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=group_rows)
        start += size
    assert start == len(catalog)
    return str(folder / "*.parquet")


def test_a_catalog_of_many_files_is_the_one_that_they_make(tmp_path: Path) -> None:
    whole = library(50)
    source = cut_in_files(whole, tmp_path / "parts", (20, 0, 1, 29))
    assert load_catalog(LOCAL, source).table.equals(whole.table)
    rows = open_pieces(LOCAL, source)
    assert isinstance(rows, Pieces)
    found = survey(rows, tmp_path)
    assert (found.digest, found.keys) == (whole.digest, row_keys(whole.table))
    for begin in (0, 6, 7, 19, 20, 21, 49):
        assert pa.concat_tables(rows.batches(begin)).equals(whole.table.slice(begin))
    assert list(rows.batches(50)) == []


def test_files_of_a_catalog_in_a_bucket(bucket: str, s3_config: StorageConfig, tmp_path: Path) -> None:
    storage, whole = Storage(s3_config), library(30)
    for number in range(3):
        part = replace(whole, table=whole.table.slice(10 * number, 10))
        save_catalog(storage, f"{bucket}/c/part-{number}.parquet", part)
    save_catalog(storage, f"{bucket}/c/deeper/part-9.parquet", whole)
    storage.put(f"{bucket}/c/part-list.txt", b"x")
    assert len(find_pieces(storage, f"{bucket}/c/*.parquet")) == 3
    assert survey(open_pieces(storage, f"{bucket}/c/part-*.parquet"), tmp_path).digest == whole.digest
    with pytest.raises(ObjectNotFound, match=r"d\*.parquet: no file there has such a name"):
        find_pieces(storage, f"{bucket}/c/d*.parquet")


def test_what_two_files_of_a_catalog_both_hold_is_refused(small_runs: None, tmp_path: Path) -> None:
    twice = pa.concat_tables([library(40).table, library(1, first=17).table])
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(twice.slice(0, 30), folder / "a.parquet")
    pq.write_table(twice.slice(30), folder / "b.parquet")
    said = r"video_id 'v0017' is used 2 times \(\S*a\.parquet row 17 and \S*b\.parquet row 10\)"
    rows = open_pieces(LOCAL, str(folder / "*.parquet"))
    for load in (lambda: survey(rows, tmp_path), lambda: load_catalog(LOCAL, str(folder / "*.parquet"))):
        with pytest.raises(CatalogError, match=said):
            load()
    splits = pa.array(["val" if row % 3 == 2 else "train" for row in range(41)])
    whole = twice.set_column(6, CATALOG_SCHEMA.field("split"), splits.take(pa.array([*range(40), 17])))
    pq.write_table(whole.slice(0, 30), folder / "a.parquet")
    pq.write_table(whole.slice(30), folder / "b.parquet")
    rows = open_pieces(LOCAL, str(folder / "*.parquet"))
    assert isinstance(rows, Pieces)
    with pytest.raises(CatalogError, match=said):
        survey(rows.select("val", tmp_path), tmp_path)


def test_a_bad_row_of_a_file_is_named(tmp_path: Path) -> None:
    table = library(10).table
    bad = table.set_column(
        1, CATALOG_SCHEMA.field("uri").with_nullable(True), pa.array([None, *["u"] * 9], pa.string())
    )
    source = cut_in_files(library(5), tmp_path / "parts", (5,))
    bad = bad.replace_schema_metadata(pq.read_schema(tmp_path / "parts" / "part-0.parquet").metadata)
    pq.write_table(bad, tmp_path / "parts" / "x.parquet")
    with pytest.raises(CatalogError, match=r"x\.parquet: uri may not be null: 1 row without it"):
        survey(open_pieces(LOCAL, source), tmp_path)
    (tmp_path / "parts" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(CatalogError, match=r"x\.parquet is not a catalog"):
        open_pieces(LOCAL, source)
    pq.write_table(table.drop_columns(["uri"]), tmp_path / "parts" / "x.parquet")
    with pytest.raises(CatalogError, match=r"x\.parquet lacks the column uri"):
        open_pieces(LOCAL, source)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "size_bytes",
            pa.array([1, 2, 1.5]),
            r"x\.parquet row 3: the column size_bytes \(double\).*1\.50* was truncated",
        ),
        ("duration_s", pa.array(["1", "long", "x"]), r"x\.parquet row 2: the column duration_s \(string\).*'long'"),
        ("width", pa.array([1, None, 2**40]), r"x\.parquet row 3: the column width \(int64\).*not in range"),
        ("size_bytes", pa.array([True, False, None]), r"x\.parquet: the column size_bytes holds values of type bool"),
        ("size_bytes", pa.array([1, 2, 3], pa.timestamp("s")), r"holds values of type timestamp\[.s\], expected int64"),
        ("time_end_s", pa.array([1, 2, 3], pa.date32()), r"holds values of type date32"),
        ("size_bytes", pa.array([1, -1, -2]), r"x\.parquet row 2: size_bytes is -1, expected 0 or more, or null"),
    ],
)
def test_a_value_that_is_none_of_its_column_is_named(
    column: str, values: pa.Array, message: str, tmp_path: Path
) -> None:
    names = pa.array(["a", "b", "c"])
    table = pa.table({"video_id": names, "uri": names, column: values})
    pq.write_table(pa.concat_tables([table.slice(0, 1), table]), tmp_path / "x.parquet", row_group_size=1)
    with pytest.raises(CatalogError, match=message):
        list(open_pieces(LOCAL, str(tmp_path / "x.parquet")).batches())


def test_an_empty_file_is_no_catalog(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(CatalogError, match=r"x\.parquet is not a catalog: it has 0 bytes, and is no Parquet file"):
        open_pieces(LOCAL, str(tmp_path / "x.parquet"))


def test_a_catalog_of_many_small_files_and_groups_is_cheap(tmp_path: Path) -> None:
    whole = library(900)
    source = cut_in_files(whole, tmp_path / "parts", [3] * 300, group_rows=1)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    rows = open_pieces(LOCAL, source)
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 300 * 2_000
    assert isinstance(rows, Pieces)
    found = pa.concat_tables(rows.batches())
    assert found.sort_by("video_id").equals(whole.table)
    assert pa.concat_tables(rows.batches(451)).equals(found.slice(451))
    save_catalog(LOCAL, str(tmp_path / "parts" / "part-0.parquet"), library(4))
    with pytest.raises(CatalogError, match=r"part-0\.parquet has changed while the catalog was read"):
        list(rows.batches())


def test_row_groups_of_one_row_are_read_together(tmp_path: Path) -> None:
    pq.write_table(library(3000).table, tmp_path / "x.parquet", row_group_size=1)
    rows = Pieces(Watched(), [str(tmp_path / "x.parquet")])
    Watched.spans.clear()
    assert pa.concat_tables(rows.batches()).equals(library(3000).table)
    assert len(Watched.spans) < 60


PATTERNS = {
    "c/*.parquet": ["c/p000.parquet", "c/p001.parquet", "c/p003.parquet", "c/z.parquet/part-0.parquet"],
    "c/p00[0-2].parquet": ["c/p000.parquet", "c/p001.parquet"],
    "c/p00[!0-2].parquet": ["c/p003.parquet"],
    "c/p00?.parquet": ["c/p000.parquet", "c/p001.parquet", "c/p003.parquet"],
    "c*/p000.parquet": ["c/p000.parquet", "c2/p000.parquet"],
    "**/p000.parquet": ["c/p000.parquet", "c2/p000.parquet", "p000.parquet"],
    "c/**/p*.parquet": ["c/p000.parquet", "c/p001.parquet", "c/p003.parquet", "c/z.parquet/part-0.parquet"],
    "c/z.parquet": ["c/z.parquet/part-0.parquet"],
    "[d]/x[[]1].parquet": ["[d]/x[1].parquet"],
    "[d]/x[1].parquet": ["[d]/x[1].parquet"],
    "[d]/*.parquet": ["[d]/x[1].parquet"],
    "c/.*.parquet": ["c/.p004.parquet"],
}
TABLES = {name for names in PATTERNS.values() for name in names}


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_pattern_names_the_same_files_in_a_folder_and_in_a_bucket(
    where: str, tmp_path: Path, s3_config: StorageConfig, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path) if where == "folder" else f"{request.getfixturevalue('bucket')}/lake"
    storage = Storage(s3_config)
    for name in [*TABLES, "c/z.parquet/_temporary/0/part-1.parquet"]:
        table = pa.table({"video_id": [name], "uri": ["/x"]})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.put(f"{place}/{name}", sink.getvalue())
    storage.put(f"{place}/c/z.parquet/_SUCCESS", b"x")
    for pattern, names in PATTERNS.items():
        table = load_catalog(storage, f"{place}/{pattern}").table
        assert table["video_id"].to_pylist() == names, pattern
    for pattern in ("c/q*.parquet", "c/[z-a].parquet", "c3/*.parquet", "c/q.parquet"):
        with pytest.raises(ObjectNotFound):
            load_catalog(storage, f"{place}/{pattern}")
    storage.put(f"{place}/c2/odd.parquet/data.orc", b"x")
    with pytest.raises(CatalogError, match=r"c2/odd\.parquet is a folder, and no \.parquet file lies in it"):
        load_catalog(storage, f"{place}/c2/*.parquet")


def test_files_of_one_catalog_name_the_same_classes(tmp_path: Path) -> None:
    source = cut_in_files(library(5), tmp_path / "parts", (5,))
    save_catalog(LOCAL, str(tmp_path / "parts" / "z.parquet"), replace(library(3, first=9), labels=("a",)))
    with pytest.raises(CatalogError, match="names other classes than"):
        open_pieces(LOCAL, source)


def test_a_split_of_a_stream_is_that_of_the_table(tmp_path: Path) -> None:
    table = library(30).table
    splits = pa.array([(None, "train", "val")[row % 3] for row in range(30)])
    whole = Catalog(table.set_column(6, CATALOG_SCHEMA.field("split"), splits))
    rows = open_pieces(LOCAL, cut_in_files(whole, tmp_path / "parts", (11, 19)))
    assert isinstance(rows, Pieces)
    assert pa.concat_tables(rows.select("val", tmp_path).batches()).equals(whole.select("val").table)
    with pytest.raises(CatalogError, match=r"no video of split 'test'; its splits are: none \(10\), train \(10\), val"):
        rows.select("test", tmp_path)


# Work


class Watched(Storage):
    """Counts what is read."""

    spans: list[tuple[int, int]] = []  # noqa: RUF012

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        self.spans.append((offset, length))
        return super().read_range(uri, offset, length)


def test_what_is_left_of_a_library_is_all_that_is_read_of_its_catalog(tmp_path: Path) -> None:
    whole = library(2000)
    cut_in_files(whole, tmp_path / "parts", (2000,), group_rows=50)
    path = tmp_path / "parts" / "part-0.parquet"
    found = survey(whole, tmp_path)
    plan = draft_plan(LABELLING, found, 50, tmp_path)
    metadata = pq.read_metadata(path)
    group_bytes = max(metadata.row_group(group).total_byte_size for group in range(40))
    rows = Pieces(Watched(), [str(path)])
    Watched.spans.clear()
    ((unit, table),) = work_of(rows, found.keys, LABELLING, plan.units[30:31])
    assert table.equals(whole.table.slice(1500, 50))
    assert list(unit.keys) == list(plan.units[30].keys)
    assert sum(length for _, length in Watched.spans) <= 2 * group_bytes < path.stat().st_size / 10


def test_units_come_with_their_rows_in_any_order_also_where_they_lie_apart(small_runs: None, tmp_path: Path) -> None:
    first = library(20)
    order = np.random.default_rng(0).permutation(60)
    grown = Catalog(pa.concat_tables([library(40, first=20).table, first.table]).take(pa.array(order)))
    before = draft_plan(LABELLING, survey(first, tmp_path), 5, tmp_path)
    found = survey(grown, tmp_path)
    plan = draft_plan(LABELLING, found, 7, tmp_path, older=[before], committed={before.units[0].unit_id})
    rows = open_pieces(LOCAL, cut_in_files(grown, tmp_path / "parts", (33, 27)))
    of_key = dict(zip(row_keys(grown.table), grown.table.to_pylist(), strict=True))
    for unit, table in work_of(rows, found.keys, LABELLING, plan.units[::-1]):
        assert table.to_pylist() == [of_key[key] for key in unit.keys]


def test_damaged_keys_of_a_plan_are_no_change_of_the_catalog(tmp_path: Path) -> None:
    """Rows that lie apart are found by the stored keys; those of others that are put there are not labelled instead."""
    whole = library(12)
    found = survey(whole, tmp_path)
    plan = draft_plan(LABELLING, found, 4, tmp_path)
    swapped = Keys.of(found.keys.numbers()[[0, 5, 9, 1]])
    unit = replace(plan.units[0], keys=swapped, last=9)
    stored = StoredKeys("one.keys", "one.json", "")
    with pytest.raises(ChecksumMismatch, match=r"^one.keys is not what was written: .* remove one.json and label"):
        list(work_of(whole, found.keys, LABELLING, [unit], stored))


def test_a_catalog_that_changes_under_a_job_is_found(tmp_path: Path) -> None:
    source = cut_in_files(library(20), tmp_path / "parts", (20,))
    found = survey(open_pieces(LOCAL, source), tmp_path)
    plan = draft_plan(LABELLING, found, 4, tmp_path)
    save_catalog(LOCAL, str(tmp_path / "parts" / "part-0.parquet"), library(20, uri="s3://other"))
    with pytest.raises(CatalogError, match="the catalog has changed while it was read"):
        list(work_of(open_pieces(LOCAL, source), found.keys, LABELLING, plan.units))


def test_a_finished_unit_whose_part_is_gone_is_not_labelled_by_halves(tmp_path: Path) -> None:
    before = draft_plan(LABELLING, survey(library(4), tmp_path), 4, tmp_path)
    found = survey(library(3), tmp_path)
    plan = draft_plan(LABELLING, found, 4, tmp_path, older=[before], committed={before.units[0].unit_id})
    with pytest.raises(IncompleteOutput, match="its part is gone"):
        list(work_of(library(3), found.keys, LABELLING, plan.units))


def units_of(plan: Plan) -> Iterator[tuple[str, ...]]:
    for unit in plan.units:
        yield tuple(unit.keys)


def test_a_survey_is_what_a_plan_needs() -> None:
    keys = row_keys(library(5).table)
    plan = drafted(LABELLING, "one", keys, 2)
    assert list(units_of(plan)) == [tuple(keys[0:2]), tuple(keys[2:4]), tuple(keys[4:5])]
    assert Survey("one", keys).keys == plan.keys
