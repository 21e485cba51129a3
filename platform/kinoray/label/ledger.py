"""The folder of one labelling: where everything lies, who may write what, and how its table is read and checked.

Under OUT, one folder for each (model, settings), named `labelling_id`:

    job.json                      the model, the settings and the class names that all rows share
    plans/<catalog digest>.json   which rows of that catalog are in which unit (see planfile.py): it names two files
        beside it, <catalog digest>-<digest>.parquet, the units, and .keys, the keys of all of them
    parts/<unit>.parquet          the rows of a finished unit; its metadata says who wrote them, when, and how many
    windows/<unit>-<digest>.parquet   rows of the windows of its long videos, where the settings ask for them
    done/<catalog digest>.json    totals, once every row of the catalog is there
    jobs/<run id>.json            what each job did that came to its end: totals, rate, and what it waited for

What is easy to break: a part is its own commit. It appears whole or not at all, by `put_if_absent`, under its unit's
name; from then on it counts, so everything that belongs to it (its windows) has to be there before. And one labelling
has rows of several catalogs, so readers go by plans (see shown.py), the newest first.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.errors import ChecksumMismatch, ConfigError, IncompleteOutput, ObjectNotFound
from kinoray.label.keys import Keys, Tally, numbers_of
from kinoray.label.plan import Plan, Survey, draft_plan
from kinoray.label.planfile import StoredPlans, read_shown, read_shown_windows
from kinoray.label.unit import (
    PREDICTION_SCHEMA,
    WINDOW_SCHEMA,
    Commit,
    Finished,
    JobEnd,
    JobRecord,
    Times,
    Totals,
    Unit,
    parse_commit,
    parse_part,
    parse_windows,
    to_part,
    to_windows,
    unit_id_of,
)
from kinoray.storage.objects import MAX_RECORD_BYTES, MAX_TABLE_BYTES, Storage, join
from kinoray.storage.records import is_name, read_record, record_of

__all__ = [
    "Ledger",
    "find_labellings",
    "open_ledger",
    "read_predictions",
    "read_windows",
]


_READERS = 16  # threads that fetch parts, which are small
_PREFETCHED = 2 * _READERS  # results that wait for who takes them
_NUM_EXAMPLES = 10
_TAIL_BYTES = 2**18  # of a part: more than its footer, whose statistics have at most 8 kB a column
_DAY_S = 86400.0
_SUFFIX = ".parquet"
_TOTAL_COLUMNS = ["video_id", "row_key", "status", "error_class", "error_text", "frames_corrupt", "frames_missing"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Ledger:
    """The folder of one labelling. Any number of jobs may write to it at once; all methods raise StorageError."""

    def __init__(self, storage: Storage, root: str) -> None:
        self.storage = storage
        self.root = root
        self.labelling_id = root.rpartition("/")[2]
        self._plans = StoredPlans(storage, join(root, "plans"))

    def pin_job(self, record: JobRecord) -> bool:
        """Say what this labelling is; the first writer's record stays. Whether this was the first."""
        return self.storage.put_if_absent(self._uri("job.json"), _to_json(asdict(record)))

    def job(self) -> JobRecord:
        """What `pin_job` wrote."""
        return self._read(self._uri("job.json"), record_of(JobRecord))

    @cached_property
    def _num_classes(self) -> int | None:
        """How many classes its rows can name; None where job.json does not say."""
        return len(self.job().labels) or None

    def plan(self, found: Survey, unit_size: int, folder: Path) -> Plan:
        """The plan of a catalog, made and stored at the first call: later calls, and jobs at once, get the same one.

        But where a part is gone of which only some rows are in this catalog, what is left of them is planned anew.
        """
        try:
            standing = self._plans.read(found.digest)
        except ObjectNotFound:  # the first job on this catalog
            return self._plans.put_if_absent(self.draft(found, unit_size, folder))
        masked = {unit.unit_id for unit in standing.units if not unit.is_whole}
        if not masked or masked <= self.committed():
            return standing
        return self._plans.put(replace(self.draft(found, unit_size, folder), sequence=standing.sequence))

    def draft(self, found: Survey, unit_size: int, folder: Path) -> Plan:
        """The plan that `plan` would store now; nothing is written but to a folder of this machine."""
        return draft_plan(self.labelling_id, found, unit_size, folder, older=self.plans(), committed=self.committed())

    def plans(self) -> list[Plan]:
        """All plans, oldest first; one that was labelled again after others comes behind them."""
        again = {digest: done.sequence for digest, done in self.finished().items()}
        found = list(_in_threads(self._plans.read, self._plans.names()))
        plans = [replace(plan, sequence=max(plan.sequence, again.get(plan.catalog_digest, -1))) for plan in found]
        return sorted(plans, key=lambda plan: (plan.sequence, plan.catalog_digest))

    def finished(self) -> dict[str, Finished]:
        """The catalogs that were labelled whole, by their digests."""
        prefix = self._uri("done") + "/"
        uris = [info.uri for info in self.storage.list(prefix) if info.uri.endswith(".json")]
        found = _in_threads(lambda uri: self._read(uri, Finished.from_record), uris)
        return {uri.removeprefix(prefix).removesuffix(".json"): done for uri, done in zip(uris, found, strict=True)}

    def committed(self) -> set[str]:
        """Ids of all finished units."""
        return {unit_id for unit_id, _ in self._parts()}

    def _parts(self) -> Iterator[tuple[str, int]]:
        """(id, size in bytes) of all finished units; whatever else lies there is none."""
        prefix = self._uri("parts") + "/"
        for info in self.storage.list(prefix):
            name = info.uri.removeprefix(prefix)
            if is_name(name) and name.endswith(_SUFFIX):
                yield name.removesuffix(_SUFFIX), info.size_bytes

    def commits(self) -> Iterator[Commit]:
        """What all parts say of themselves, fetched in threads: no more of each than its end.

        Raises:
            ChecksumMismatch: a part is not what was committed.
        """
        return _in_threads(lambda part: self._read_commit(*part), self._parts())

    def _read_commit(self, unit_id: str, size_bytes: int) -> Commit:
        uri = self._part_uri(unit_id)
        tail_bytes = min(size_bytes, _TAIL_BYTES)
        tail = self.storage.read_range(uri, size_bytes - tail_bytes, tail_bytes)
        with self._refused(uri, unit_id):
            return _of_unit(parse_commit(tail), unit_id)

    def jobs(self, say: Callable[[str], None]) -> list[JobEnd]:
        """What each job that came to its end wrote with `summarize`; `say` is told of files that say something else."""

        def read(uri: str) -> JobEnd | str:
            try:
                return self._read(uri, JobEnd.from_record)
            except ChecksumMismatch as error:
                return str(error)

        found = list(_in_threads(read, [info.uri for info in self.storage.list(self._uri("jobs") + "/")]))
        for problem in found:
            if isinstance(problem, str):
                say(problem)
        return [job for job in found if isinstance(job, JobEnd)]

    def commit(
        self, unit: Unit, rows: pa.Table, run_id: str, windows: pa.Table | None = None, times: Times | None = None
    ) -> Commit:
        """Write the rows of a unit, which makes them count, unless another writer was first: then ours are dropped.

        Args:
            rows: PREDICTION_SCHEMA, in the unit's order.
            windows: WINDOW_SCHEMA, of the same videos.

        Returns:
            The commit that stands; its run_id tells whose it is.

        Raises:
            IncompleteOutput: the rows are not those of the unit.
        """
        if rows.column("row_key").to_pylist() != list(unit.keys):
            raise IncompleteOutput(f"unit {unit.unit_id}: {rows.num_rows} rows are not its {len(unit.keys)} inputs")
        commit = Commit(
            unit_id=unit.unit_id,
            run_id=run_id,
            counts=dict(Counter(rows.column("status").to_pylist())),
            windows=None if windows is None else self._put_windows(unit.unit_id, windows),
            times=times,
        )
        if self.storage.put_if_absent(self._part_uri(unit.unit_id), to_part(rows, commit)):
            return commit
        winner, _ = self._read_part(unit, [])
        if commit.windows not in (None, winner.windows):
            self.storage.delete(self._windows_uri(unit.unit_id, commit.windows))
        return winner

    def _put_windows(self, unit_id: str, windows: pa.Table) -> str:
        """Write windows for a part that will name them; their digest.

        It is in the file's name, so that writers that do not agree do not meet: a part has the windows of its writer.
        """
        data = to_windows(windows, unit_id)
        sha256 = hashlib.sha256(data).hexdigest()
        self.storage.put(self._windows_uri(unit_id, sha256), data)
        return sha256

    def find_commit(self, unit_id: str) -> Commit | None:
        """What the part of a unit says of itself, or None while it is unfinished. Raises as `read_unit`."""
        found = self._find_part(unit_id, [])
        return None if found is None else found[0]

    def read_unit(self, unit: Unit, columns: list[str] | None = None) -> pa.Table:
        """The rows of a finished unit that are in the plan's catalog.

        Raises:
            IncompleteOutput: the unit is unfinished.
            ChecksumMismatch: the part is not what was committed.
        """
        return _of_plan(self._read_part(unit, columns)[1], unit)

    def read_windows(self, units: Iterable[Unit]) -> Iterator[pa.Table]:
        """The windows of the videos of finished units that are in the plan's catalog. Raises as `read_unit`."""

        def read(unit: Unit) -> pa.Table:
            commit, rows = self._read_part(unit, ["row_key"])
            if commit.windows is None:
                raise IncompleteOutput(f"{self.root}: unit {unit.unit_id} was committed without windows")
            uri = self._windows_uri(unit.unit_id, commit.windows)
            try:
                data = self.storage.read(uri, max_bytes=MAX_TABLE_BYTES)
            except ObjectNotFound:
                raise IncompleteOutput(f"{uri} was committed but is gone; {self._again(unit.unit_id)}") from None
            with self._refused(uri, unit.unit_id):
                windows = parse_windows(data, commit, self._num_classes)
            if unit.is_whole:
                return windows
            kept = _of_plan(rows, unit).column("row_key")
            return windows.filter(pc.is_in(windows.column("row_key"), value_set=kept.combine_chunks()))

        return _in_threads(read, units)

    def _read_part(self, unit: Unit, columns: list[str] | None) -> tuple[Commit, pa.Table]:
        found = self._find_part(unit.unit_id, columns)
        if found is None:
            raise IncompleteOutput(f"{self.root}: unit {unit.unit_id} is not finished; run the same command again")
        return found

    def _find_part(self, unit_id: str, columns: list[str] | None) -> tuple[Commit, pa.Table] | None:
        uri = self._part_uri(unit_id)
        try:
            data = self.storage.read(uri, max_bytes=MAX_TABLE_BYTES)
        except ObjectNotFound:
            return None
        num_classes = self._num_classes if columns is None or "scores" in columns or "id_topk" in columns else None
        with self._refused(uri, unit_id):
            commit, table = parse_part(data, columns, num_classes)
            return _of_unit(commit, unit_id), table

    @contextmanager
    def _refused(self, uri: str, unit_id: str) -> Iterator[None]:
        """What goes wrong inside with the bytes of a file, as one error that says what to do."""
        try:
            yield
        except (ValueError, TypeError, LookupError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ChecksumMismatch(f"{uri} is not what was committed: {reason}; {self._again(unit_id)}") from error

    def _again(self, unit_id: str) -> str:
        return f"delete {self._part_uri(unit_id)} and run the label command again"

    def read_units(self, units: Iterable[Unit], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """`read_unit` of each, in order, fetched in threads."""
        return _in_threads(lambda unit: self.read_unit(unit, columns), units)

    def check(self, plan: Plan, keys: Keys) -> Totals:
        """Read back all parts and compare them with the catalog: each key exactly once.

        Args:
            keys: of the catalog.

        Raises:
            IncompleteOutput: with the counts.
        """
        status: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        examples: list[tuple[str, str]] = []
        damaged = 0
        exact = True
        found, expected = Tally(), Tally()
        parts = _in_threads(lambda unit: self._read_part(unit, _TOTAL_COLUMNS)[1], plan.units)
        for unit, part in zip(plan.units, parts, strict=True):
            with self._refused(self._part_uri(unit.unit_id), unit.unit_id):
                numbers = numbers_of(part.column("row_key"))
                table = _of_plan(part, unit)
            exact = exact and unit_id_of(self.labelling_id, numbers) == unit.unit_id
            found.add(numbers if unit.is_whole else numbers_of(table.column("row_key")))
            status.update(_counts(table.column("status")))
            bad = pc.or_(*(pc.greater(table.column(name), 0) for name in ("frames_corrupt", "frames_missing")))
            damaged += pc.sum(bad).as_py() or 0
            for row in table.filter(pc.equal(table.column("status"), "quarantined")).to_pylist():
                reasons[row["error_class"]] += 1
                if len(examples) < _NUM_EXAMPLES:
                    examples.append((row["video_id"], f"{row['error_class']}: {row['error_text']}"))
        for chunk in keys.chunks():
            expected.add(chunk)
        if not exact or found != expected:
            raise self._incomplete(plan, keys)
        return Totals(
            inputs=len(keys),
            labelled=status["labelled"],
            quarantined=status["quarantined"],
            skipped=status["skipped"],
            reasons=dict(sorted(reasons.items())),
            damaged=damaged,
            examples=tuple(examples),
        )

    def _incomplete(self, plan: Plan, keys: Keys) -> IncompleteOutput:
        """What is wrong, in counts. All keys are in memory for this; while all is well, they never are."""
        read = [numbers_of(table.column("row_key")) for table in self.read_units(plan.units, ["row_key"])]
        rows = np.concatenate([np.empty(0, np.uint64), *read])
        found, counts = np.unique(rows, return_counts=True)
        known = np.unique(keys.numbers())
        missing = len(np.setdiff1d(known, found))
        foreign = len(np.setdiff1d(found, known))
        repeated = int((counts - 1).sum())
        return IncompleteOutput(
            f"{self.root}: {len(keys)} inputs, {len(rows)} rows: {missing} inputs have no row, {repeated} have "
            f"more than one, {foreign} rows are of no input; run the same command again, with another --out if it "
            "stays so"
        )

    def finish(self, plan: Plan, totals: Totals, source: str = "") -> None:
        """Declare the table of a catalog of this source complete and the newest. Call it with what `check` gave."""
        others = [other.sequence for other in self.plans() if other.catalog_digest != plan.catalog_digest]
        sequence = max([plan.sequence, *(other + 1 for other in others)])
        record = {"catalog_digest": plan.catalog_digest, "source": source, "sequence": sequence, **asdict(totals)}
        record["units"] = [unit.unit_id for unit in plan.units]
        self.storage.put(self._uri("done", f"{plan.catalog_digest}.json"), _to_json(record))

    def summarize(self, run_id: str, record: dict[str, Any]) -> str:
        """Write what one job did, and remove what writers that were killed left a day ago; returns where."""
        uri = self._uri("jobs", f"{run_id}.json")
        self.storage.put(uri, _to_json({"run_id": run_id, **record}))
        now_s = self.storage.stat(uri).modified_s  # by the store's clock, as the age of what lies there
        self.storage.sweep(self.root, now_s - _DAY_S)
        return uri

    def _uri(self, *parts: str) -> str:
        return join(self.root, *parts)

    def _part_uri(self, unit_id: str) -> str:
        return self._uri("parts", unit_id + _SUFFIX)

    def _windows_uri(self, unit_id: str, sha256: str) -> str:
        return self._uri("windows", f"{unit_id}-{sha256[:16]}{_SUFFIX}")

    def _read(self, uri: str, make: Callable[[dict[str, Any]], _Result]) -> _Result:
        return read_record(self.storage, uri, make, MAX_RECORD_BYTES)


def _of_unit(commit: Commit, unit_id: str) -> Commit:
    if commit.unit_id != unit_id:
        raise ValueError(f"it is the part of another unit, {commit.unit_id}")
    return commit


def _of_plan(table: pa.Table, unit: Unit) -> pa.Table:
    """Without the rows of videos that have left the catalog."""
    if unit.mask is None or not table.num_columns:
        return table
    bits = np.unpackbits(np.frombuffer(unit.mask, np.uint8), bitorder="little")[: unit.num_rows]
    if len(bits) != table.num_rows:
        raise ValueError(f"it has {table.num_rows} rows, and its plan says {unit.num_rows}")
    return table.filter(pa.array(bits.astype(np.bool_)))


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def _in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The results in the order of the items, a few of them prefetched: no more of them wait in memory."""
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > _PREFETCHED:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def find_labellings(storage: Storage, out: str) -> list[str]:
    """Roots of the labellings in a place that `label` wrote to, sorted; the place may be a labelling's root itself.

    Raises:
        ObjectNotFound: there is none.
    """
    out = out.rstrip("/")
    if storage.exists(join(out, "job.json")):
        return [out]
    infos = storage.list(out + "/")
    roots = [info.uri.rpartition("/")[0] for info in infos if info.uri.endswith("/job.json")]
    roots = [root for root in roots if root.count("/") == out.count("/") + 1]
    if not roots:
        raise ObjectNotFound(f"{out} holds no predictions; expected the --out of `kinoray label` or `evaluate`")
    return roots


def read_predictions(
    storage: Storage, out: str, *, catalog_digest: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows that are committed so far (PREDICTION_SCHEMA), unit by unit in the order of the catalog.

    Where several catalogs were labelled into one place, the newest one's rows come first, then the others' rows of
    videos that are not in it, unless they have left their source (see shown.py). Half-written parts never show.

    Args:
        out: the --out of `label` or `evaluate`, or the folder of one labelling in it.
        catalog_digest: the rows of this catalog, whichever was labelled since.
        columns: of PREDICTION_SCHEMA; nothing else is held in memory. Default: all.

    Raises:
        ObjectNotFound: nothing was labelled there.
        ConfigError: results of several models or settings are there, and none was named.
    """
    ledger = open_ledger(storage, out)
    names = list(columns or PREDICTION_SCHEMA.names)
    if catalog_digest is None:
        found = read_shown(ledger, names)
    else:
        done = ledger.committed()
        plans = [plan for plan in ledger.plans() if plan.catalog_digest == catalog_digest]
        found = ledger.read_units([unit for plan in plans for unit in plan.units if unit.unit_id in done], names)
    return pa.concat_tables([PREDICTION_SCHEMA.empty_table().select(names), *(table.select(names) for table in found)])


def read_windows(storage: Storage, out: str) -> pa.Table:
    """The rows of the windows of all videos that are committed so far (WINDOW_SCHEMA), in the order of the newest plan.

    Args:
        out: as for `read_predictions`.

    Raises:
        ObjectNotFound: nothing was labelled there, or not in windows.
        ConfigError: results of several models or settings are there, and none was named.
    """
    ledger = open_ledger(storage, out)
    if ledger.job().windows is None:
        raise ObjectNotFound(f"{ledger.root} was labelled without windows; label with --window-s")
    return pa.concat_tables([WINDOW_SCHEMA.empty_table(), *read_shown_windows(ledger)])


def open_ledger(storage: Storage, out: str) -> Ledger:
    """The only labelling in a place that `label` wrote to. Raises as `read_predictions`."""
    roots = find_labellings(storage, out)
    if len(roots) > 1:
        jobs = [Ledger(storage, root).job() for root in roots]
        models = [job.checkpoint or ", ".join(job.members) for job in jobs]
        choices = ", ".join(f"{root} (by {model})" for root, model in zip(roots, models, strict=True))
        raise ConfigError(f"predictions must name one labelling; {out} holds {len(roots)}: {choices}")
    return Ledger(storage, roots[0])
