"""`kinoray vacuum`: what goes, what stays, and writers that are at work meanwhile."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kinoray.config.shared import StorageConfig
from kinoray.errors import ChecksumMismatch, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.label import vacuum as vacuum_module
from kinoray.label.config import VacuumConfig
from kinoray.label.table import WINDOW_SCHEMA, Ledger, Plan, read_predictions, row_keys
from kinoray.label.vacuum import vacuum
from kinoray.storage.folder import Skipped
from kinoray.storage.objects import ObjectInfo, Storage, join
from small_tables import label_library, ledger_in, library, rows_for

ANY_AGE_H = 1e-9
CATALOG = library(20)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return ledger_in(Storage(), tmp_path / "out")


def make_old(path: Path, hours: float = 48) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600 * hours))


def leave_part(ledger: Ledger, plan: Plan, unit: int, attempt: str, *, old: bool = True) -> Path:
    """The part of a writer that was killed before its commit."""
    rows = rows_for(CATALOG, plan.units[unit].keys)
    path = Path(ledger.root, "parts", f"{plan.units[unit].unit_id}-{attempt}.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    ledger.storage.put(str(path), sink.getvalue().to_pybytes())
    if old:
        make_old(path)
    return path


def names(ledger: Ledger) -> set[str]:
    return {path.name for path in Path(ledger.root, "parts").iterdir()}


def test_what_no_commit_names_goes_and_everything_else_stays(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = label_library(ledger, CATALOG)
    before, table = names(ledger), read_predictions(ledger.storage, ledger.root)
    for name in before:
        make_old(Path(ledger.root, "parts", name))
    lost = [leave_part(ledger, plan, unit, f"{unit:012d}") for unit in (0, 0, 1)]
    young = leave_part(ledger, plan, 2, "f" * 12, old=False)
    size_bytes = sum(path.stat().st_size for path in set(lost))
    out = str(Path(ledger.root).parent)
    expected = {"labellings": 1, "kept": 3, "young": 1, "removed": 2, "removed_bytes": size_bytes, "restored": 0}

    assert vacuum(VacuumConfig(out=out, dry_run=True)) == expected | {"dry_run": True}
    assert names(ledger) == before | {path.name for path in [*lost, young]}
    assert "would remove 2 parts that no commit names" in capsys.readouterr().out

    assert vacuum(VacuumConfig(out=out)) == expected | {"dry_run": False}
    assert names(ledger) == before | {young.name}
    assert "1 more are younger than 24 h and stay" in capsys.readouterr().out
    assert read_predictions(ledger.storage, ledger.root).equals(table)

    make_old(young)
    assert vacuum(VacuumConfig(out=ledger.root))["removed"] == 1
    assert names(ledger) == before


def test_all_labellings_of_a_place_are_cleaned_and_one_that_is_named_alone(tmp_path: Path) -> None:
    roots = [Ledger(Storage(), str(tmp_path / name)) for name in ("one", "two")]
    for one in roots:
        one.pin_job({"checkpoint": "run"})
        leave_part(one, label_library(one, CATALOG), 0, "a" * 12)
    assert vacuum(VacuumConfig(out=roots[0].root, dry_run=True))["removed"] == 1
    assert vacuum(VacuumConfig(out=str(tmp_path))) | {"removed_bytes": 0} == {
        "labellings": 2,
        "kept": 6,
        "young": 0,
        "removed": 2,
        "removed_bytes": 0,
        "restored": 0,
        "dry_run": False,
    }


def test_on_s3(bucket: str, s3_config: StorageConfig) -> None:
    ledger = ledger_in(Storage(s3_config), join(bucket, "out"))
    plan = label_library(ledger, CATALOG)
    table = read_predictions(ledger.storage, ledger.root)
    ledger.storage.put(join(ledger.root, "parts", f"{plan.units[0].unit_id}-{'a' * 12}.parquet"), b"left")
    assert vacuum(VacuumConfig(out=join(bucket, "out"), storage=s3_config))["young"] == 1
    totals = vacuum(VacuumConfig(out=join(bucket, "out"), older_than_h=ANY_AGE_H, storage=s3_config))
    assert (totals["removed"], totals["removed_bytes"], totals["kept"]) == (1, 4, 3)
    assert read_predictions(ledger.storage, ledger.root).equals(table)


def test_the_temporary_file_of_a_killed_writer_goes(ledger: Ledger) -> None:
    """A real one: the writer dies between writing its bytes and publishing them."""
    label_library(ledger, CATALOG)
    code = (
        "import os, sys\nfrom kinoray.storage import folder\nfrom kinoray.storage.objects import Storage\n"
        "folder._flush = lambda path: os._exit(9)\nStorage().put(sys.argv[1], b'12345')\n"
    )
    target = Path(ledger.root, "parts", "new.parquet")
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    (left,) = [path for path in target.parent.iterdir() if path.name.startswith(".")]
    assert vacuum(VacuumConfig(out=ledger.root))["young"] == 1
    make_old(left)
    totals = vacuum(VacuumConfig(out=ledger.root))
    assert (totals["removed"], totals["removed_bytes"]) == (1, 5)
    assert not left.exists()


def test_the_windows_of_long_videos_go_and_stay_with_their_parts(ledger: Ledger) -> None:
    keys = row_keys(CATALOG.table)
    (unit,) = ledger.plan(CATALOG.digest, keys, 64).units
    commit = ledger.commit(unit, rows_for(CATALOG, keys), "run", WINDOW_SCHEMA.empty_table())
    left = Path(ledger.root, "windows", f"{unit.unit_id}-{'a' * 12}.parquet")
    left.write_bytes(b"left")
    for path in left.parent.iterdir():
        make_old(path)
    totals = vacuum(VacuumConfig(out=ledger.root))
    assert (totals["kept"], totals["removed"], totals["removed_bytes"]) == (2, 1, 4)
    assert [path.name for path in left.parent.iterdir()] == [commit.part]
    (left.parent / commit.part).unlink()
    with pytest.raises(IncompleteOutput, match=rf"windows/{commit.part} is gone: delete .*commits/{unit.unit_id}.json"):
        vacuum(VacuumConfig(out=ledger.root))


# Writers at work


@dataclass(frozen=True, slots=True)
class Meddled(Storage):
    """A store in which something else happens at one moment of the vacuum's work."""

    moment: str = ""
    act: Callable[[], object] = lambda: None

    def list(self, prefix: str, *, skipped: Skipped | None = None) -> Iterator[ObjectInfo]:
        found = list(Storage.list(self, prefix, skipped=skipped))
        if self.moment == "parts were listed" and prefix.endswith("/parts/"):
            self.act()
        if self.moment == "commits were listed" and prefix.endswith("/commits/"):
            self.act()
        return iter(found)

    def delete(self, uri: str) -> None:
        if self.moment == "before a removal":
            self.act()
        Storage.delete(self, uri)
        if self.moment == "after a removal":
            self.act()


@pytest.mark.parametrize(
    ("moment", "restored", "kept"),
    [
        ("parts were listed", 0, 3),
        ("commits were listed", 1, 2),
        ("before a removal", 1, 2),
        ("after a removal", 1, 2),
    ],
)
def test_a_part_that_is_committed_while_the_vacuum_works_survives(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, moment: str, restored: int, kept: int
) -> None:
    """The writer had stored its part long ago (it was stopped, say), and commits it just now."""
    plan = label_library(ledger, CATALOG)
    table = read_predictions(ledger.storage, ledger.root)
    commit = Path(ledger.root, "commits", f"{plan.units[1].unit_id}.json")
    for path in Path(ledger.root, "parts").iterdir():
        make_old(path)
    record = commit.read_bytes()
    commit.unlink()
    meddled = Meddled(moment=moment, act=lambda: commit.write_bytes(record))
    monkeypatch.setattr(vacuum_module, "Storage", lambda config: meddled)
    totals = vacuum(VacuumConfig(out=ledger.root))
    assert (totals["restored"], totals["removed"], totals["kept"]) == (restored, 0, kept)
    assert read_predictions(Storage(), ledger.root).equals(table)


def test_a_part_that_comes_and_is_committed_after_the_listing_is_no_damage(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ledger.plan(CATALOG.digest, row_keys(CATALOG.table), 8)
    ledger.commit(plan.units[0], rows_for(CATALOG, plan.units[0].keys), "run")
    late = Ledger(Storage(), ledger.root)
    rows = rows_for(CATALOG, plan.units[1].keys)
    meddled = Meddled(moment="parts were listed", act=lambda: late.commit(plan.units[1], rows, "late"))
    monkeypatch.setattr(vacuum_module, "Storage", lambda config: meddled)
    totals = vacuum(VacuumConfig(out=ledger.root, older_than_h=ANY_AGE_H))
    assert (totals["kept"], totals["removed"]) == (2, 0)
    assert len(read_predictions(Storage(), ledger.root)) == 16


# Damage


def test_a_commit_without_its_part_is_reported_with_the_remedy_and_the_rest_is_done(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = label_library(ledger, CATALOG)
    lost, cut = (ledger.find_commit(unit.unit_id) for unit in plan.units[:2])
    assert lost is not None
    assert cut is not None
    Path(ledger.root, "parts", lost.part).unlink()
    Path(ledger.root, "parts", cut.part).write_bytes(b"PAR1")
    left = leave_part(ledger, plan, 2, "a" * 12)
    with pytest.raises(
        IncompleteOutput, match=r"2 committed parts are damaged: .*is gone: delete .*run the label"
    ) as e:
        vacuum(VacuumConfig(out=ledger.root))
    assert f"has 4 bytes, not {cut.size_bytes}: delete {ledger.root}/commits/{cut.unit_id}.json" in str(e.value)
    assert not left.exists()
    assert "removed 1 parts" in capsys.readouterr().out

    for commit in (lost, cut):  # the remedy
        Path(ledger.root, "commits", f"{commit.unit_id}.json").unlink()
    label_library(ledger, CATALOG)
    assert vacuum(VacuumConfig(out=ledger.root, older_than_h=ANY_AGE_H))["kept"] == 3
    assert len(names(ledger)) == 3


def test_a_commit_that_cannot_be_read_keeps_everything(ledger: Ledger) -> None:
    plan = label_library(ledger, CATALOG)
    left = leave_part(ledger, plan, 0, "a" * 12)
    Path(ledger.root, "commits", f"{plan.units[2].unit_id}.json").write_text("{")
    with pytest.raises(ChecksumMismatch, match="does not hold what kinoray wrote"):
        vacuum(VacuumConfig(out=ledger.root))
    assert left.exists()


def test_wrong_settings_and_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"older_than_h must be greater than 0, got 0"):
        VacuumConfig(out="x", older_than_h=0)
    with pytest.raises(ObjectNotFound, match="holds no predictions"):
        vacuum(VacuumConfig(out=str(tmp_path)))
