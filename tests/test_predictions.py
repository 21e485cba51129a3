"""The result table without Ray: plans, exactly-once commits, readers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kinoray.config.shared import StorageConfig
from kinoray.errors import CatalogError, ChecksumMismatch, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.label.keys import Keys, row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.plan import Plan
from kinoray.label.planfile import parse_units, to_units
from kinoray.label.unit import (
    PREDICTION_SCHEMA,
    WINDOW_SCHEMA,
    Unit,
    labelling_id,
    parse_commit,
    parse_part,
    parse_windows,
)
from kinoray.storage.objects import Storage, join
from small_tables import drafted, job_record, planned

LABELLING = labelling_id("model", "config")


def inputs(names: str, size_bytes: int = 10) -> pa.Table:
    """The columns of a catalog that name its rows: one video for each letter."""
    return pa.table(
        {
            "video_id": list(names),
            "uri": [f"s3://b/{name}.mp4" for name in names],
            "offset": pa.array([None] * len(names), pa.int64()),
            "length": pa.array([None] * len(names), pa.int64()),
            "size_bytes": pa.array([size_bytes] * len(names), pa.int64()),
            "sha256": pa.array([None] * len(names), pa.string()),
        }
    )


def rows_of(table: pa.Table, unit: Unit, **changes: Any) -> pa.Table:
    """What a labeller would say of a unit: every video is labelled, but those named `x`."""
    known = dict(zip(row_keys(table), table.to_pylist(), strict=True))
    rows = []
    for key in unit.keys:
        bad = known[key]["video_id"] == "x"
        rows.append(
            {name: known[key][name] for name in ("video_id", "uri", "offset", "length")}
            | {"row_key": key, "status": "quarantined" if bad else "labelled"}
            | {"error_class": "EmptyMedia" if bad else None, "error_text": "no bytes" if bad else None}
            | {"label_topk": None if bad else ["cat"], "id_topk": None if bad else [0]}
            | {"score_topk": None if bad else [0.5], "abstained": False, "views": 1}
            | {"windows": 1, "segments_run": 1}
            | {"frames_decoded": 4, "frames_corrupt": int(known[key]["video_id"] == "d"), "frames_missing": 0}
            | {"model_digest": "m", "config_digest": "c", "run_id": "r"}
            | changes
        )
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def ids(table: pa.Table) -> str:
    return "".join(table.column("video_id").to_pylist())


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    """A storage and an --out in it."""
    if request.param == "folder":
        return Storage(StorageConfig()), str(tmp_path / "out")
    config: StorageConfig = request.getfixturevalue("s3_config")
    return Storage(config), join(request.getfixturevalue("bucket"), "out")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(Storage(StorageConfig()), str(tmp_path / "out" / LABELLING))
    ledger.pin_job(job_record())
    return ledger


def label_all(ledger: Ledger, table: pa.Table, catalog: str, unit_size: int, **changes: Any) -> Plan:
    """Plan a catalog and commit what is missing."""
    plan = planned(ledger, catalog, row_keys(table), unit_size)
    done = ledger.committed()
    for unit in plan.units:
        if unit.unit_id not in done:
            ledger.commit(unit, rows_of(table, unit, **changes), "run")
    return plan


# Keys and plans


def test_a_row_key_is_the_digest_of_name_place_and_content() -> None:
    truth = hashlib.sha256(json.dumps(["a", "s3://b/a.mp4", None, None, 10, None], separators=(",", ":")).encode())
    assert row_keys(inputs("ab"))[0] == "k" + truth.hexdigest()[:16]
    assert row_keys(inputs("a", size_bytes=11)) != row_keys(inputs("a"))


def test_an_input_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(CatalogError, match=r"s3://b/b.mp4 \(video b\) is in the catalog 2 times"):
        row_keys(inputs("abcb"))


def test_a_first_plan_is_the_catalog_in_slices() -> None:
    keys = row_keys(inputs("abcdefg"))
    plan = drafted(LABELLING, "one", keys, 3)
    assert [unit.keys for unit in plan.units] == [keys[:3], keys[3:6], keys[6:]]
    assert all(unit.is_whole for unit in plan.units)
    assert plan.num_rows == 7


def test_unit_ids_name_the_labelling_and_the_rows_but_not_the_catalog() -> None:
    keys = row_keys(inputs("abcd"))
    ids_of = lambda plan: [unit.unit_id for unit in plan.units]  # noqa: E731
    first = ids_of(drafted(LABELLING, "one", keys, 2))
    assert first == ids_of(drafted(LABELLING, "two", keys, 2))
    assert first[0] == ids_of(drafted(LABELLING, "two", keys[:2], 2))[0]
    assert not set(first) & set(ids_of(drafted("other", "one", keys, 2)))
    assert not set(first) & set(ids_of(drafted(LABELLING, "one", keys, 3)))


def test_a_grown_catalog_adds_units_for_what_is_new_only() -> None:
    old, grown = row_keys(inputs("bdf")), row_keys(inputs("abcdef"))
    first = drafted(LABELLING, "one", old, 2)
    second = drafted(LABELLING, "two", grown, 64, older=[first])
    a, b, c, d, e, f = grown
    assert [unit.keys for unit in second.units] == [(a, c, e), (b, d), (f,)]
    assert {unit.unit_id for unit in first.units} < {unit.unit_id for unit in second.units}
    assert second.sequence == 1


def test_a_finished_unit_of_which_a_row_is_gone_is_used_and_an_unfinished_one_is_cut_anew() -> None:
    before, after = row_keys(inputs("abcd")), row_keys(inputs("acd"))
    first = drafted(LABELLING, "one", before, 2)
    done = drafted(LABELLING, "two", after, 2, older=[first], committed={first.units[0].unit_id})
    assert [(unit.keys, unit.num_rows) for unit in done.units] == [((after[0],), 2), (tuple(after[1:]), 2)]
    assert not done.units[0].is_whole
    undone = drafted(LABELLING, "two", after, 2, older=[first])
    assert [(unit.keys, unit.num_rows) for unit in undone.units] == [((after[0],), 1), (tuple(after[1:]), 2)]


@settings(deadline=None, derandomize=True)
@given(
    catalogs=st.lists(st.lists(st.integers(0, 30), unique=True, min_size=1), min_size=1, max_size=5),
    unit_size=st.integers(1, 7),
    finished=st.sets(st.integers(0, 60)),
)
@example(catalogs=[[1, 2], [1], [1, 2]], unit_size=2, finished={7})  # an unfinished unit holds a finished row
def test_any_history_of_plans_covers_each_row_once_and_repeats_nothing_finished(
    catalogs: list[list[int]], unit_size: int, finished: set[int]
) -> None:
    plans: list[Plan] = []
    committed: dict[str, set[str]] = {}
    for number, catalog in enumerate(catalogs):
        keys = [f"k{row:016x}" for row in catalog]
        plan = drafted(LABELLING, str(number), keys, unit_size, older=plans, committed=committed)
        covered = [key for unit in plan.units for key in unit.keys]
        assert sorted(covered) == sorted(keys)
        done_before = set().union(*committed.values())
        for unit in plan.units:
            if unit.unit_id not in committed:
                assert unit.is_whole
                assert not set(unit.keys) & done_before
        assert parse_units(to_units(plan), plan.keys) == plan.units
        plans.append(plan)
        for index, unit in enumerate(plan.units):
            if unit.is_whole and (index + 7 * number) in finished:
                committed[unit.unit_id] = set(unit.keys)


def test_the_stored_plan_is_the_one_that_counts(place: tuple[Storage, str]) -> None:
    storage, out = place
    ledger = Ledger(storage, join(out, LABELLING))
    keys = row_keys(inputs("abcdefgh"))
    plan = planned(ledger, "one", keys, 3)
    assert [len(unit.keys) for unit in plan.units] == [3, 3, 2]
    assert planned(ledger, "one", keys, 5) == plan


def test_jobs_that_plan_at_once_agree(ledger: Ledger) -> None:
    keys = row_keys(inputs("abcdefgh"))
    barrier = threading.Barrier(8)

    def plan(unit_size: int) -> Plan:
        barrier.wait()
        return planned(ledger, "one", keys, unit_size)

    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(plan, range(1, 9)))
    assert set(plans) == {planned(ledger, "one", keys, 64)}


# Commits


def test_of_8_writers_exactly_one_wins_and_the_others_leave_nothing(ledger: Ledger) -> None:
    table = inputs("abcdefghijklmnopqrst")
    plan = planned(ledger, "one", row_keys(table), 1)  # 20 units: 20 rounds
    with ThreadPoolExecutor(8) as pool:
        for unit in plan.units:
            barrier = threading.Barrier(8)

            def write(run_id: str, unit: Unit = unit, barrier: threading.Barrier = barrier) -> str:
                rows = rows_of(table, unit, run_id=run_id)
                barrier.wait()
                return ledger.commit(unit, rows, run_id).run_id

            says = list(pool.map(write, [f"run{number}" for number in range(8)]))
            assert len(set(says)) == 1  # all writers name the same winner,
            assert ledger.read_unit(unit).column("run_id").to_pylist() == says[:1]  # and its rows are what is read
    assert len(list(Path(ledger.root, "parts").iterdir())) == 20


def test_late_writers_on_s3_change_nothing(bucket: str, s3_config: StorageConfig) -> None:
    """Late, not at once: the test server looks before it writes, without a lock between."""
    ledger = Ledger(Storage(s3_config), join(bucket, LABELLING))
    ledger.pin_job(job_record())
    table = inputs("ab")
    unit = planned(ledger, "one", row_keys(table), 2).units[0]
    first = ledger.commit(unit, rows_of(table, unit, run_id="first"), "first")
    with ThreadPoolExecutor(7) as pool:
        late = [f"late{number}" for number in range(7)]
        says = list(pool.map(lambda run_id: ledger.commit(unit, rows_of(table, unit, run_id=run_id), run_id), late))
    assert says == [first] * 7
    assert ledger.read_unit(unit).column("run_id").to_pylist() == ["first"] * 2
    assert [info.uri for info in ledger.storage.list(join(ledger.root, "parts/"))] == [
        join(ledger.root, "parts", f"{unit.unit_id}.parquet")
    ]


class LostAnswer(Storage):
    """A store that writes, but whose answer gets lost, so that a retry finds the object there."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        super().put_if_absent(uri, data)
        return False


def test_a_writer_whose_answer_got_lost_keeps_its_part(tmp_path: Path) -> None:
    ledger = Ledger(LostAnswer(StorageConfig()), str(tmp_path / LABELLING))
    ledger.pin_job(job_record())
    table = inputs("ab")
    plan = planned(ledger, "one", row_keys(table), 2)
    ledger.commit(plan.units[0], rows_of(table, plan.units[0]), "run")
    assert ids(ledger.read_unit(plan.units[0])) == "ab"


def test_rows_of_another_unit_cannot_be_committed(ledger: Ledger) -> None:
    table = inputs("abcd")
    first, second = planned(ledger, "one", row_keys(table), 2).units
    with pytest.raises(IncompleteOutput, match="are not its 2 inputs"):
        ledger.commit(first, rows_of(table, second), "run")
    with pytest.raises(IncompleteOutput, match="1 rows are not its 2 inputs"):
        ledger.commit(first, rows_of(table, first).slice(1), "run")
    assert ledger.committed() == set()


class Watched(Storage):
    """Notes what a reader sees just before and after each object is written."""

    seen: ClassVar[list[tuple[str, str, str]]] = []

    def _watch(self, uri: str, write: Callable[[], Any]) -> Any:
        folder = uri.split("/")[-2]
        reader = Storage(self.config)
        root = uri.rpartition(f"/{folder}/")[0]
        before = ids(read_predictions(reader, root))
        done = write()
        if folder in ("parts", "windows"):
            self.seen.append((folder, before, ids(read_predictions(reader, root))))
        return done

    def put(self, uri: str, data: bytes) -> None:
        self._watch(uri, lambda: Storage.put(self, uri, data))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        return bool(self._watch(uri, lambda: Storage.put_if_absent(self, uri, data)))


def test_the_rows_of_a_unit_show_with_its_part_and_their_windows_are_there_before(ledger: Ledger) -> None:
    Watched.seen.clear()
    watched = Ledger(Watched(StorageConfig()), ledger.root)
    table = inputs("abcd")
    for unit in planned(ledger, "one", row_keys(table), 2).units:
        watched.commit(unit, rows_of(table, unit), "run", windows_of(table, unit))
    assert Watched.seen == [("windows", "", ""), ("parts", "", "ab"), ("windows", "ab", "ab"), ("parts", "ab", "abcd")]


def test_a_reader_that_polls_sees_whole_units_and_counts_that_only_grow(ledger: Ledger) -> None:
    names = "".join(chr(0x4E00 + number) for number in range(120))
    table = inputs(names)
    plan = planned(ledger, "one", row_keys(table), 4)
    progress = threading.Semaphore(0)

    def write(units: list[Unit]) -> None:
        for unit in units:
            progress.acquire()  # the reader lets the writers go on, so every poll meets a writer at work
            ledger.commit(unit, rows_of(table, unit), "run")

    def poll() -> Iterator[int]:
        while len(ledger.committed()) < len(plan.units):
            progress.release()
            yield read_predictions(ledger.storage, ledger.root).num_rows

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, list(plan.units[side::2])) for side in (0, 1)]
        counts = list(poll())
        for _ in plan.units:
            progress.release()
        for writer in writers:
            writer.result()
    assert counts == sorted(counts)
    assert all(count % 4 == 0 for count in counts)
    assert len(set(counts)) > 1
    assert ids(read_predictions(ledger.storage, ledger.root)) == names
    few = read_predictions(ledger.storage, ledger.root, columns=["margin", "video_id"])
    assert few.equals(read_predictions(ledger.storage, ledger.root).select(["margin", "video_id"]))


# Check and totals


def test_the_totals_add_up_and_name_the_reasons(ledger: Ledger) -> None:
    table = inputs("abcdx")
    plan = label_all(ledger, table, "one", 2)
    totals = ledger.check(plan, row_keys(table))
    assert (totals.inputs, totals.labelled, totals.quarantined, totals.skipped) == (5, 4, 1, 0)
    assert totals.reasons == {"EmptyMedia": 1}
    assert totals.damaged == 1
    ledger.finish(plan, totals)
    done = json.loads(Path(ledger.root, "done", "one.json").read_text())
    assert done["units"] == [unit.unit_id for unit in plan.units]
    assert done["labelled"] + done["quarantined"] + done["skipped"] == done["inputs"]


def test_the_check_finds_what_is_missing_foreign_or_repeated(ledger: Ledger) -> None:
    table = inputs("abcdef")
    plan = label_all(ledger, table, "one", 2)
    keys = row_keys(table)
    with pytest.raises(IncompleteOutput, match="7 inputs, 6 rows: 1 inputs have no row"):
        ledger.check(plan, Keys.from_texts([*keys, "k" + "0" * 16]))
    with pytest.raises(IncompleteOutput, match=r"5 inputs, 6 rows: .* 1 rows are of no input"):
        ledger.check(plan, keys[:5])
    twice = replace(plan, units=(*plan.units, plan.units[0]))
    with pytest.raises(IncompleteOutput, match=r"6 inputs, 8 rows: .* 2 have more than one"):
        ledger.check(twice, keys)


def test_an_unfinished_and_a_changed_part_are_told_apart(ledger: Ledger) -> None:
    table = inputs("abcdef")
    plan = planned(ledger, "one", row_keys(table), 2)
    for unit in plan.units[1:]:
        ledger.commit(unit, rows_of(table, unit), "run")
    with pytest.raises(IncompleteOutput, match="is not finished; run the same command again"):
        ledger.check(plan, row_keys(table))
    lost, changed = (part_path(ledger, unit) for unit in plan.units[1:])
    lost.unlink()
    with pytest.raises(IncompleteOutput, match="is not finished; run the same command again"):
        ledger.read_unit(plan.units[1])
    pq.write_table(pq.read_table(changed).slice(1), changed)
    with pytest.raises(ChecksumMismatch, match=rf"{changed} is not what was committed: .*; delete {changed} and run"):
        ledger.read_unit(plan.units[2])
    changed.unlink()  # as it says
    label_all(ledger, table, "one", 2)
    assert ledger.check(plan, row_keys(table)).inputs == 6


def part_path(ledger: Ledger, unit: Unit) -> Path:
    return Path(ledger.root, "parts", f"{unit.unit_id}.parquet")


def flipped(good: bytes, places: range) -> Iterator[bytes]:
    """The bytes with one bit flipped, for every bit of every place."""
    for place in places:
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            yield bytes(bad)


def test_every_flipped_bit_is_found(ledger: Ledger) -> None:
    """In pages, their headers, digests, footer, metadata, length and magic; in the end alone, which is all of a part
    that is read for what it says of itself; and in windows."""
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    commit = ledger.commit(unit, rows_of(table, unit), "run", windows_of(table, unit))
    good = part_path(ledger, unit).read_bytes()
    assert parse_part(good, ["video_id"])[0] == parse_commit(good) == commit
    for bad in flipped(good, range(len(good))):
        with pytest.raises(ValueError, match=r"^it.*(not those that were|not the one that was|cut short)"):
            parse_part(bad, ["video_id"])
    footer_bytes = int.from_bytes(good[-8:-4], "little")
    end = good[-footer_bytes - 8 - 2 * 32 :]
    assert parse_commit(end) == commit
    for bad in flipped(end, range(32, len(end))):
        with pytest.raises(ValueError, match=r"^it.*(not the one that was|cut short)"):
            parse_commit(bad)
    (path,) = Path(ledger.root, "windows").iterdir()
    good = path.read_bytes()
    for bad in flipped(good, range(len(good))):
        with pytest.raises(ValueError, match="its windows are not those"):
            parse_windows(bad, commit)


@pytest.mark.parametrize("where", [0, 4, 1000, -9, -200, -5, -1])
def test_a_flipped_bit_in_a_file_is_one_error_for_every_reader(ledger: Ledger, where: int) -> None:
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    ledger.commit(unit, rows_of(table, unit), "run")
    path = part_path(ledger, unit)
    bad = bytearray(path.read_bytes())
    bad[where] ^= 4
    path.write_bytes(bad)
    with pytest.raises(ChecksumMismatch, match=rf"{path} is not what was committed: .*; delete {path} and run"):
        ledger.read_unit(unit, ["video_id"])
    with pytest.raises(ChecksumMismatch, match="is not what was committed"):
        ledger.find_commit(unit.unit_id)
    if where < 0:
        with pytest.raises(ChecksumMismatch, match="is not what was committed"):
            list(ledger.commits())


@pytest.mark.parametrize("size_bytes", [0, 1, 7, 8, 71, 72, 1000])
def test_a_part_that_is_cut_is_found(ledger: Ledger, size_bytes: int) -> None:
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    ledger.commit(unit, rows_of(table, unit), "run")
    path = part_path(ledger, unit)
    for bad in (path.read_bytes()[:size_bytes], path.read_bytes()[-size_bytes:] if size_bytes else b""):
        path.write_bytes(bad)
        with pytest.raises(ChecksumMismatch, match="is not what was committed"):
            ledger.read_unit(unit)
        with pytest.raises(ChecksumMismatch, match="is not what was committed"):
            list(ledger.commits())
        path.unlink()
        ledger.commit(unit, rows_of(table, unit), "run")


def test_the_pages_of_a_part_have_checksums_that_others_can_compare(ledger: Ledger) -> None:
    table = inputs("abcdefgh")
    (unit,) = planned(ledger, "one", row_keys(table), 8).units
    ledger.commit(unit, rows_of(table, unit), "run")
    path = part_path(ledger, unit)
    column = pq.read_metadata(path).row_group(0).column(0)
    bad = bytearray(path.read_bytes())
    bad[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    path.write_bytes(bad)
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(path, page_checksum_verification=True)


def test_the_part_of_another_unit_is_refused(ledger: Ledger) -> None:
    table = inputs("abcd")
    first, second = label_all(ledger, table, "one", 2).units
    part_path(ledger, first).write_bytes(part_path(ledger, second).read_bytes())
    with pytest.raises(ChecksumMismatch, match=f"{first.unit_id}.parquet .* part of another unit, {second.unit_id}"):
        ledger.read_unit(first, ["video_id"])
    with pytest.raises(ChecksumMismatch, match="part of another unit"):
        list(ledger.commits())


# Windows of long videos


def windows_of(table: pa.Table, unit: Unit, score: float = 0.5) -> pa.Table:
    """Two windows of each video."""
    known = dict(zip(row_keys(table), table.column("video_id").to_pylist(), strict=True))
    rows = [
        {"video_id": known[key], "row_key": key, "window": window, "begin_s": window, "end_s": window + 1}
        | {"label_topk": ["cat"], "id_topk": [0], "score_topk": [score], "abstained": False}
        for key in unit.keys
        for window in range(2)
    ]
    return pa.Table.from_pylist(rows, schema=WINDOW_SCHEMA)


def test_writers_that_agree_write_one_file_of_windows_and_the_loser_of_those_that_do_not_takes_its_own_away(
    ledger: Ledger,
) -> None:
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    for run_id, score in (("first", 0.25), ("same", 0.25), ("other", 0.75)):
        commit = ledger.commit(unit, rows_of(table, unit), run_id, windows_of(table, unit, score))
        assert commit.run_id == "first"
        assert len(list(Path(ledger.root, "windows").iterdir())) == 1
        (found,) = ledger.read_windows([unit])
        assert found.equals(windows_of(table, unit, 0.25))


def test_a_writer_that_was_killed_before_its_part_leaves_windows_that_nobody_reads(ledger: Ledger) -> None:
    """And that the next one writes again, or, where it does not agree, stand beside its own."""
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    dying = Ledger(Dying(StorageConfig()), ledger.root)
    with pytest.raises(SystemExit):
        dying.commit(unit, rows_of(table, unit), "killed", windows_of(table, unit, 0.25))
    assert ledger.committed() == set()
    with pytest.raises(IncompleteOutput, match="is not finished"):
        list(ledger.read_windows([unit]))
    ledger.commit(unit, rows_of(table, unit), "next", windows_of(table, unit, 0.75))
    (found,) = ledger.read_windows([unit])
    assert found.equals(windows_of(table, unit, 0.75))


class Dying(Storage):
    """A store whose writer is killed before its commit."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        raise SystemExit("killed")


def test_damaged_windows_come_back_with_their_part(ledger: Ledger) -> None:
    table = inputs("ab")
    (unit,) = planned(ledger, "one", row_keys(table), 2).units
    ledger.commit(unit, rows_of(table, unit), "run", windows_of(table, unit))
    (path,) = Path(ledger.root, "windows").iterdir()
    path.write_bytes(b"PAR1")
    with pytest.raises(ChecksumMismatch, match=rf"{path} is not .*; delete {part_path(ledger, unit)} and run"):
        list(ledger.read_windows([unit]))
    path.unlink()
    with pytest.raises(IncompleteOutput, match=rf"{path} was committed but is gone; delete .*/parts/.* and run"):
        list(ledger.read_windows([unit]))
    path.write_bytes(b"PAR1")
    part_path(ledger, unit).unlink()  # as it says
    ledger.commit(unit, rows_of(table, unit), "again", windows_of(table, unit))
    assert [found.num_rows for found in ledger.read_windows([unit])] == [4]


# What killed writers leave in a folder


def test_the_temporary_file_of_a_killed_writer_goes_when_it_is_a_day_old(ledger: Ledger) -> None:
    """A real one: the writer dies between writing its bytes and publishing them."""
    label_all(ledger, inputs("ab"), "one", 2)
    code = (
        "import os, sys\nfrom kinoray.storage import folder\nfrom kinoray.storage.objects import Storage\n"
        "folder._flush = lambda path: os._exit(9)\nStorage().put_if_absent(sys.argv[1], b'12345')\n"
    )
    target = Path(ledger.root, "parts", "new.parquet")
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    (left,) = [path for path in target.parent.iterdir() if path.name.startswith(".")]
    ledger.summarize("young", {})
    assert left.exists()
    os.utime(left, (0, left.stat().st_mtime - 25 * 3600))
    ledger.summarize("old", {})
    assert not left.exists()
    assert ids(read_predictions(ledger.storage, ledger.root)) == "ab"


# Reading


def test_predictions_come_in_the_order_of_the_catalog_with_all_columns(place: tuple[Storage, str]) -> None:
    storage, out = place
    ledger = Ledger(storage, join(out, LABELLING))
    ledger.pin_job(job_record())
    label_all(ledger, inputs("gfabx"), "one", 2)
    for where in (out, out + "/", ledger.root):
        table = read_predictions(storage, where)
        assert ids(table) == "gfabx"
        assert table.schema.equals(PREDICTION_SCHEMA)
    assert table.column("label_topk").to_pylist() == [["cat"]] * 4 + [None]


def test_a_started_labelling_reads_as_an_empty_table(ledger: Ledger) -> None:
    planned(ledger, "one", row_keys(inputs("ab")), 1)
    assert read_predictions(ledger.storage, ledger.root).schema.equals(PREDICTION_SCHEMA)


def test_a_grown_library_reads_as_one_table(ledger: Ledger) -> None:
    label_all(ledger, inputs("bd"), "one", 8)
    parts = {path.name for path in Path(ledger.root, "parts").iterdir()}
    grown = inputs("abcd")
    plan = label_all(ledger, grown, "two", 8)
    assert len({path.name for path in Path(ledger.root, "parts").iterdir()} - parts) == 1
    assert ledger.check(plan, row_keys(grown)).inputs == 4
    assert ids(read_predictions(ledger.storage, ledger.root)) == "acbd"
    assert ids(read_predictions(ledger.storage, ledger.root, catalog_digest="one")) == "bd"


def test_splits_that_were_labelled_apart_read_as_one_table(ledger: Ledger) -> None:
    label_all(ledger, inputs("abc"), "train", 2)
    label_all(ledger, inputs("de"), "val", 2)
    assert sorted(ids(read_predictions(ledger.storage, ledger.root))) == list("abcde")
    assert ids(read_predictions(ledger.storage, ledger.root, catalog_digest="val")) == "de"


def test_a_replaced_file_is_labelled_again_and_its_old_row_gives_way(ledger: Ledger) -> None:
    label_all(ledger, inputs("abc"), "one", 3, run_id="old")
    after = pa.concat_tables([inputs("a"), inputs("b", size_bytes=99), inputs("c")])
    plan = label_all(ledger, after, "two", 3, run_id="new")
    assert [unit.num_rows for unit in plan.units] == [3, 1]
    totals = ledger.check(plan, row_keys(after))
    assert totals.inputs == totals.labelled == 3
    table = read_predictions(ledger.storage, ledger.root)
    assert dict(zip(table["video_id"].to_pylist(), table["run_id"].to_pylist(), strict=True)) == {
        "a": "old",
        "b": "new",
        "c": "old",
    }
    assert table.num_rows == 3


def test_results_of_two_models_are_never_mixed(ledger: Ledger, tmp_path: Path) -> None:
    label_all(ledger, inputs("ab"), "one", 2)
    other = Ledger(ledger.storage, str(tmp_path / "out" / labelling_id("another", "config")))
    other.pin_job(job_record(checkpoint="runs/second"))
    label_all(other, inputs("ab"), "one", 2)
    with pytest.raises(ConfigError, match=rf"holds 2: .*{other.root} \(by runs/second\)"):
        read_predictions(ledger.storage, str(tmp_path / "out"))
    assert read_predictions(ledger.storage, other.root).num_rows == 2


def test_a_place_without_predictions_is_named(place: tuple[Storage, str]) -> None:
    storage, out = place
    with pytest.raises(ObjectNotFound, match="out holds no predictions"):
        read_predictions(storage, out)
