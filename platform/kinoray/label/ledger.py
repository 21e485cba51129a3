"""Exactly-once commits of units of work: the folder of one labelling, and the rules by which rows come to count.

What is easy to break: a part exists for readers only when a commit names it, and only `put_if_absent` makes a commit.
"""

import hashlib
import io
import json
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kinoray.errors import ChecksumMismatch, IncompleteOutput, ObjectNotFound
from kinoray.label.plan import Plan, Unit, make_plan
from kinoray.label.schema import PREDICTION_SCHEMA, WINDOW_SCHEMA
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import MAX_RECORD_BYTES, as_name, parse_table, read_record, record_of

__all__ = ["Commit", "Ledger", "Totals"]

_READERS = 16  # threads that fetch parts and commits, which are small
_AHEAD = 2 * _READERS  # results that wait for who takes them
_NUM_EXAMPLES = 10
_MAX_PLAN_BYTES = 2**30  # of 40 million videos
_TOTAL_COLUMNS = ["video_id", "row_key", "status", "error_class", "error_text", "frames_corrupt", "frames_missing"]
_SCHEMAS = {"parts": PREDICTION_SCHEMA, "windows": WINDOW_SCHEMA}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What makes a unit finished: the part that holds its rows."""

    unit_id: str
    part: str
    """File name under parts/."""
    rows: int
    size_bytes: int
    sha256: str
    """Of the part."""
    counts: dict[str, int]
    """Rows by status."""
    run_id: str
    """The job that wrote it."""
    windows: dict[str, Any] | None = None
    """rows, size_bytes and sha256 of the part of the same name under windows/; None where nothing is cut."""
    times: dict[str, Any] | None = None
    """worker, begin_s, end_s (seconds since 1970, before the commit) and seconds by stage (labels --summary)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What a commit says of its windows."""

    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What became of a catalog: labelled + quarantined + skipped = inputs."""

    inputs: int
    labelled: int
    quarantined: int
    skipped: int
    reasons: dict[str, int]
    """Quarantined rows by error class."""
    damaged: int
    """Labelled videos of which some frames would not decode."""
    examples: tuple[tuple[str, str], ...]
    """The first quarantined rows: video_id, and reason as text."""


class Ledger:
    """The folder of one labelling. Any number of jobs may write to it at once; all methods raise StorageError."""

    def __init__(self, storage: Storage, root: str) -> None:
        self.storage = storage
        self.root = root
        self.labelling_id = root.rpartition("/")[2]

    def pin_job(self, record: dict[str, Any]) -> bool:
        """Say what this labelling is; the first writer's record stays. Whether this was the first."""
        return self.storage.put_if_absent(self._uri("job.json"), _to_json(record))

    def job(self) -> dict[str, Any]:
        """What `pin_job` wrote."""
        return self._read_json(self._uri("job.json"))

    def plan(self, catalog_digest: str, keys: Sequence[str], unit_size: int) -> Plan:
        """The plan of a catalog, made and stored at the first call: later calls, and jobs at once, get the same one."""
        uri = self._uri("plans", f"{catalog_digest}.json")
        try:
            return self._read_plan(uri)
        except ObjectNotFound:
            pass  # the first job on this catalog
        plan = self.draft(catalog_digest, keys, unit_size)
        if self.storage.put_if_absent(uri, _to_json(plan.to_record())):
            return plan
        return self._read_plan(uri)

    def draft(self, catalog_digest: str, keys: Sequence[str], unit_size: int) -> Plan:
        """The plan that `plan` would store now; nothing is written."""
        return make_plan(
            self.labelling_id, catalog_digest, keys, unit_size, older=self.plans(), committed=self.committed()
        )

    def plans(self) -> list[Plan]:
        """All plans, oldest first."""
        uris = [info.uri for info in self.storage.list(self._uri("plans") + "/")]
        plans = list(_in_threads(self._read_plan, uris))
        return sorted(plans, key=lambda plan: (plan.sequence, plan.catalog_digest))

    def committed(self) -> set[str]:
        """Ids of all finished units."""
        uris = (info.uri for info in self.storage.list(self._uri("commits") + "/"))
        return {uri.rpartition("/")[2].removesuffix(".json") for uri in uris if uri.endswith(".json")}

    def find_commit(self, unit_id: str) -> Commit | None:
        """The commit of a unit, or None while it is unfinished."""
        try:
            return self._read_commit(unit_id)
        except ObjectNotFound:
            return None

    def commits(self) -> Iterator[Commit]:
        """All commits, fetched in threads."""
        return (commit for commit in _in_threads(self.find_commit, sorted(self.committed())) if commit is not None)

    def jobs(self) -> list[dict[str, Any]]:
        """What each job that came to its end wrote with `summarize`."""
        return list(_in_threads(self._read_json, [info.uri for info in self.storage.list(self._uri("jobs") + "/")]))

    def commit(
        self,
        unit: Unit,
        rows: pa.Table,
        run_id: str,
        windows: pa.Table | None = None,
        times: dict[str, Any] | None = None,
    ) -> Commit:
        """Write the rows of a unit and make them count, unless another writer was first: then ours are dropped.

        Args:
            rows: PREDICTION_SCHEMA, in the unit's order.
            windows: WINDOW_SCHEMA, of the same videos.
            times: see `Commit.times`.

        Returns:
            The commit that stands; its run_id tells whose it is.

        Raises:
            IncompleteOutput: the rows are not those of the unit.
        """
        if rows.column("row_key").to_pylist() != list(unit.keys):
            raise IncompleteOutput(f"unit {unit.unit_id}: {rows.num_rows} rows are not its {len(unit.keys)} inputs")
        name = f"{unit.unit_id}-{uuid.uuid4().hex[:12]}.parquet"
        commit = Commit(
            unit_id=unit.unit_id,
            part=name,
            counts=dict(Counter(rows.column("status").to_pylist())),
            run_id=run_id,
            windows=None if windows is None else self._put_part("windows", name, windows),
            times=times,
            **self._put_part("parts", name, rows),
        )
        if self.storage.put_if_absent(self._uri("commits", f"{unit.unit_id}.json"), _to_json(asdict(commit))):
            self._put_missing(commit, rows, windows)
            return commit
        winner = self._read_commit(unit.unit_id)
        if winner.part == commit.part:  # ours was stored, and only the store's answer got lost
            self._put_missing(commit, rows, windows)
        else:
            for folder in ("parts", "windows") if commit.windows else ("parts",):
                self.storage.delete(self._uri(folder, commit.part))
        return winner

    def _put_missing(self, commit: Commit, rows: pa.Table, windows: pa.Table | None) -> None:
        """A vacuum may have taken our parts for leftovers before the commit was there: write them again."""
        for folder, table in (("parts", rows), ("windows", windows)):
            if table is not None and not self.storage.exists(self._uri(folder, commit.part)):
                self._put_part(folder, commit.part, table)

    def _put_part(self, folder: str, name: str, table: pa.Table) -> dict[str, Any]:
        """Write a table; rows, size_bytes and sha256 of it."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        self.storage.put(self._uri(folder, name), data)
        return {"rows": table.num_rows, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def read_unit(self, unit: Unit, columns: list[str] | None = None) -> pa.Table:
        """The rows of a finished unit that are in the plan's catalog.

        Raises:
            IncompleteOutput: the unit is unfinished, or its part is gone.
            ChecksumMismatch: the part is not what was committed.
        """
        commit = self._commit_of(unit)
        return self._read_part("parts", commit, unit, columns, commit.sha256)

    def read_windows(self, units: Iterable[Unit]) -> Iterator[pa.Table]:
        """The windows of the videos of finished units that are in the plan's catalog. Raises as `read_unit`."""

        def read(unit: Unit) -> pa.Table:
            commit = self._commit_of(unit)
            if commit.windows is None:
                raise IncompleteOutput(f"{self.root}: unit {unit.unit_id} was committed without windows")
            return self._read_part("windows", commit, unit, None, commit.windows["sha256"])

        return _in_threads(read, units)

    def _commit_of(self, unit: Unit) -> Commit:
        commit = self.find_commit(unit.unit_id)
        if commit is None:
            raise IncompleteOutput(f"{self.root}: unit {unit.unit_id} is not finished; run the same command again")
        return commit

    def _read_part(self, folder: str, commit: Commit, unit: Unit, columns: list[str] | None, sha256: str) -> pa.Table:
        """A committed part, checked, without the rows of videos that have left the catalog."""
        uri = self._uri(folder, commit.part)
        again = f"delete {self._uri('commits', unit.unit_id + '.json')} and run the label command again"
        try:
            data = self.storage.read(uri)
        except ObjectNotFound:
            raise IncompleteOutput(f"{uri} was committed but is gone; {again}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ChecksumMismatch(f"{uri} is not what was committed ({len(data)} bytes are there); {again}")
        wanted = None if columns is None or unit.is_whole else list(dict.fromkeys([*columns, "row_key"]))
        try:
            table = parse_table(data, wanted or columns)
            _require_types(table.schema, _SCHEMAS[folder])
        except pa.ArrowException as error:
            raise ChecksumMismatch(f"{uri} is not a part that kinoray wrote: {error}; {again}") from error
        if unit.is_whole:
            return table
        return table.filter(pc.is_in(table.column("row_key"), value_set=pa.array(unit.keys, pa.string())))

    def read_units(self, units: Iterable[Unit], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """`read_unit` of each, in order, fetched in threads."""
        return _in_threads(lambda unit: self.read_unit(unit, columns), units)

    def check(self, plan: Plan, keys: Sequence[str]) -> Totals:
        """Read back what the commits name and compare it with the catalog: each key exactly once.

        Args:
            keys: `row_keys` of the catalog.

        Raises:
            IncompleteOutput: with the counts.
        """
        status: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        examples: list[tuple[str, str]] = []
        damaged = 0
        exact = plan.covers(keys)
        for unit, table in zip(plan.units, self.read_units(plan.units, _TOTAL_COLUMNS), strict=True):
            exact = exact and table.column("row_key").to_pylist() == list(unit.keys)
            status.update(table.column("status").to_pylist())
            bad = pc.add(table.column("frames_corrupt"), table.column("frames_missing"))
            damaged += pc.sum(pc.greater(bad, 0)).as_py() or 0
            for row in table.filter(pc.equal(table.column("status"), "quarantined")).to_pylist():
                reasons[row["error_class"]] += 1
                if len(examples) < _NUM_EXAMPLES:
                    examples.append((row["video_id"], f"{row['error_class']}: {row['error_text']}"))
        if not exact:
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

    def _incomplete(self, plan: Plan, keys: Sequence[str]) -> IncompleteOutput:
        """What is wrong, in counts. All keys are in memory for this; while all is well, they never are."""
        found: Counter[str] = Counter()
        for table in self.read_units(plan.units, ["row_key"]):
            found.update(table.column("row_key").to_pylist())
        missing = len(set(keys) - set(found))
        foreign = len(set(found) - set(keys))
        repeated = sum(count - 1 for count in found.values())
        return IncompleteOutput(
            f"{self.root}: {len(keys)} inputs, {found.total()} rows: {missing} inputs have no row, {repeated} have "
            f"more than one, {foreign} rows are of no input; run the same command again, with another --out if it "
            "stays so"
        )

    def finish(self, plan: Plan, totals: Totals) -> None:
        """Declare the catalog's table complete. Call it only with what `check` returned."""
        units = [unit.unit_id for unit in plan.units]
        record = {"catalog_digest": plan.catalog_digest, **asdict(totals), "units": units}
        self.storage.put(self._uri("done", f"{plan.catalog_digest}.json"), _to_json(record))

    def summarize(self, run_id: str, record: dict[str, Any]) -> str:
        """Write what one job did; returns where."""
        uri = self._uri("jobs", f"{run_id}.json")
        self.storage.put(uri, _to_json({"run_id": run_id, **record}))
        return uri

    def _uri(self, *parts: str) -> str:
        return join(self.root, *parts)

    def _read_json(self, uri: str) -> dict[str, Any]:
        return self._read(uri, dict)

    def _read_plan(self, uri: str) -> Plan:
        plan = self._read(uri, Plan.from_record, _MAX_PLAN_BYTES)
        if uri != self._uri("plans", f"{plan.catalog_digest}.json"):
            raise ChecksumMismatch(f"{uri} is the plan of another catalog ({plan.catalog_digest}); remove it")
        return plan

    def _read_commit(self, unit_id: str) -> Commit:
        uri = self._uri("commits", f"{unit_id}.json")
        commit = self._read(uri, _to_commit)
        if commit.unit_id != unit_id:
            raise ChecksumMismatch(f"{uri} is the commit of another unit ({commit.unit_id}); remove it")
        return commit

    def _read(self, uri: str, make: Callable[[dict[str, Any]], _Result], max_bytes: int = MAX_RECORD_BYTES) -> _Result:
        return read_record(self.storage, uri, make, max_bytes)


def _require_types(found: pa.Schema, schema: pa.Schema) -> None:
    """Raise ArrowInvalid unless the columns are those of the schema."""
    for field in found:
        if field.name in schema.names and not field.equals(schema.field(field.name)):
            raise pa.ArrowInvalid(f"column {field.name} is {field.type}, expected {schema.field(field.name).type}")


def _to_commit(record: dict[str, Any]) -> Commit:
    """What `commit` wrote: a part is a name, since it is joined to a folder, read, deleted and shown."""
    commit = record_of(Commit)(record)
    as_name(commit.unit_id, "unit_id")
    as_name(commit.part, "part")
    if commit.windows is not None:
        record_of(_Part)(commit.windows)
    return commit


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def _in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The results in the order of the items, made a few ahead of who takes them: no more of them wait in memory."""
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
