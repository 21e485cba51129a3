"""Pack videos into tar shards and a catalog: plan, pin the plan, pack each unit in a Ray task, settle, finish.

A folder, a list, a catalog and a Kinetics set differ in their plans only. What is easy to break: a plan is pinned
before the first task, so that a second run can only go on with the same files and settings; a unit that is committed
is never touched again; and the sums at the end are checked against counts that were made elsewhere (files planned,
members counted by the reader, annotation rows read), never against themselves.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinoray.catalog.folders import said_of_others
from kinoray.catalog.rows import QuarantineRow, count_reasons, save_quarantine
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.console import kept_if_interrupted, many, visible
from kinoray.errors import ConfigError, IncompleteOutput, TooManyBad
from kinoray.pack.config import PackConfig
from kinoray.pack.job import pack_units
from kinoray.pack.kinetics import (
    FILE_VERDICTS,
    QUARANTINED,
    KineticsPlan,
    choose_winners,
    kinetics_totals,
    plan_kinetics,
    print_kinetics,
    require_usable_kinetics,
    row_verdicts,
    verdict_table,
)
from kinoray.pack.plan import Plan, PlannedVideo, plan_source
from kinoray.pack.unit import Commit, PackSettings, quarantine_row, read_commit
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json, require_folder
from kinoray.video.transcode import TRANSCODE

__all__ = ["pack", "pin_plan"]

_THREADS = 16
_MAX_PLAN_BYTES = 2**30


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack `config.source` into `config.out` and return the totals; the same call again does what is missing.

    Raises:
        CatalogError: there is nothing to pack, or a list or the annotations are malformed.
        ConfigError: out lies inside the source, or holds what is not this pack's, or cannot be written.
        StorageError: the source cannot be listed or out cannot be written.
        TooManyBad: everything is written, but more than max_bad_fraction of the files were quarantined.
        IncompleteOutput: a file or an annotation row has no verdict, or the sums do not agree.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    _require_apart(config.source, out)
    require_folder(storage, "out", config.out, "pack")
    plan = plan_kinetics(storage, config) if config.kinetics else plan_source(storage, config)
    pin_plan(storage, out, _pinned(config, plan))
    done = _committed(storage, out)
    num_done = sum(unit.name in done for unit in plan.units)
    wanted = f"{len(plan.rows)} annotation rows, " if isinstance(plan, KineticsPlan) else ""
    what = f"{plan.size_bytes / 1e6:.1f} MB, {many(len(plan.labels), 'class')}"
    print(
        f"pack: {wanted}found {many(plan.num_found, 'file')} ({what}) in {config.source}: "
        f"{many(len(plan.units), plan.word)}, {num_done} done already",
        flush=True,
    )
    if num_done < len(plan.units):
        settings = PackSettings(config.decode, config.transcode, config.shard_mb * 2**20)
        with kept_if_interrupted(lambda: _kept(storage, out, plan)):
            pack_units(storage, out, plan, settings, config.resources, done)
    with ThreadPoolExecutor(_THREADS) as pool:
        commits = list(pool.map(lambda unit: read_commit(storage, out, unit.name), plan.units))
    settled = _settle(storage, out, plan, commits)
    _finish(storage, out, config, plan, settled)
    return settled.totals


def _require_apart(source: str, out: str) -> None:
    """Refuse to write into what is read."""
    if (out + "/").startswith(absolute(source).rstrip("/") + "/"):
        raise ConfigError(f"out {out} lies inside the source {source}: a second run would find its own shards there")


def _pinned(config: PackConfig, plan: Plan) -> dict[str, Any]:
    return {
        "source": absolute(config.source).rstrip("/"),
        "num_found": plan.num_found,
        **plan.about,
        "shard_mb": config.shard_mb,
        "decode": asdict(config.decode),
        **({"transcode": TRANSCODE.digest} if config.transcode else {}),
        "files": plan.digest,
    }


def pin_plan(storage: Storage, out: str, pinned: Mapping[str, Any]) -> None:
    """Write plan.json, or compare with the one that is there.

    Raises:
        ConfigError: out holds the pack of other files or settings; the message names what differs.
    """
    uri = join(out, "plan.json")
    if storage.put_if_absent(uri, json.dumps(pinned, indent=1).encode()):
        return
    pinned = parse_json(json.dumps(pinned))
    try:
        there = parse_json(storage.read(uri, max_bytes=_MAX_PLAN_BYTES))
        if not isinstance(there, dict) or not there["files"]:
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"out: {uri} is not the plan of a pack ({error}); choose another folder") from error
    names = [*pinned, *(name for name in there if name not in pinned)]
    changed = [
        f"{name} was {there.get(name)!s:.200}, is {pinned.get(name)!s:.200}"
        for name in names
        if there.get(name) != pinned.get(name)
    ]
    if changed:
        raise ConfigError(
            f"out {out} holds another pack: {'; '.join(changed)}; choose another folder, or remove this one"
        )


def _committed(storage: Storage, out: str) -> set[str]:
    """Names of the units that have a commit."""
    prefix = join(out, "shards") + "/"
    names = (info.uri[len(prefix) :] for info in storage.list(prefix))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def _kept(storage: Storage, out: str, plan: Plan) -> str:
    done = _committed(storage, out)
    files = sum(unit.num_files for unit in plan.units if unit.name in done)
    return f"{files} of {many(plan.num_found, 'file')} are done and stay in {out}; the same command packs the rest"


# From what the units found to the tables of a pack: catalog, quarantine, for Kinetics verdicts; and the sums


@dataclass(frozen=True, slots=True)
class _Settled:
    """The tables of a finished pack."""

    catalog: Catalog
    """What is packed, and counts."""
    refused: Sequence[QuarantineRow]
    """Rows of the quarantine table: by place or name first, then in the order of units."""
    totals: dict[str, Any]
    """Numbers of all of it."""
    verdicts: pa.Table | None = None
    """Kinetics: rows of VERDICT_SCHEMA."""


def _settle(storage: Storage, out: str, plan: Plan, commits: Sequence[Commit]) -> _Settled:
    """Decide what concerns several units, and add up. `commits` are those of the plan's units, in their order.

    Raises:
        IncompleteOutput: a file or a row has no verdict, a tar is not there in full, or the sums do not agree.
    """
    for unit, commit in zip(plan.units, commits, strict=True):
        expected = commit.num_found if unit.archive else len(unit.files)
        unknown = {verdict.verdict for verdict in commit.files} - FILE_VERDICTS.keys()
        planned = [file.key for file in unit.files if isinstance(file, PlannedVideo)]
        found = [
            verdict.key
            for verdict, file in zip(commit.files, unit.files, strict=False)
            if isinstance(file, PlannedVideo)
        ]
        if len(commit.files) != expected or unknown or planned != found or _misplaced(commit):
            raise IncompleteOutput(
                f"pack: {unit.name} ({unit.what} packed) has {len(commit.files)} verdicts for {expected} files, "
                f"unknown ones: {sorted(unknown) or 'none'}; remove shards/{unit.name}.json and run the same command "
                "again"
            )
    _require_tars(storage, out, commits)
    if isinstance(plan, KineticsPlan):
        return _settle_clips(plan, commits)
    catalog = _catalog_of(plan, [row for commit in commits for row in commit.rows])
    refused = [*plan.refused, *(row for commit in commits for row in commit.refused)]
    num_others = len(plan.others)
    if len(catalog) + len(refused) + num_others != plan.num_found:
        raise IncompleteOutput(
            f"pack: {len(catalog)} packed + {len(refused)} quarantined + {num_others} no videos is not the "
            f"{plan.num_found} files found"
        )
    counts = {"found": plan.num_found, "others": num_others, "reasons": count_reasons(refused)}
    return _Settled(catalog, refused, _totals(catalog, refused, counts))


def _settle_clips(plan: KineticsPlan, commits: Sequence[Commit]) -> _Settled:
    winners = choose_winners(plan, commits)
    rows = row_verdicts(plan, winners.files)
    catalog = _catalog_of(plan, [commits[number].row(packed) for number, packed in winners.packed])
    num_packed = sum(verdict.verdict == "packed" for found in winners.files for verdict in found)
    if num_packed != len(catalog):
        raise IncompleteOutput(f"pack: {num_packed} files are packed, the catalog has {len(catalog)}; please report it")
    refused = [
        quarantine_row(verdict) for found in winners.files for verdict in found if verdict.verdict in QUARANTINED
    ]
    counts = kinetics_totals(plan, rows, commits, winners)
    table = verdict_table(plan, rows, commits, winners.files)
    return _Settled(catalog, refused, _totals(catalog, refused, counts), table)


def _misplaced(commit: Commit) -> bool:
    """Whether what is packed is not what the verdicts say."""
    packed = [position for position, verdict in enumerate(commit.files) if verdict.verdict == "packed"]
    return packed != [packed.position for packed in commit.packed]


def _require_tars(storage: Storage, out: str, commits: Sequence[Commit]) -> None:
    """Every tar is there in full."""
    sizes = {info.uri: info.size_bytes for info in storage.list(join(out, "shards") + "/")}
    for commit in commits:
        for tar in commit.tars:
            if sizes.get(tar.uri) != tar.size_bytes:
                raise IncompleteOutput(
                    f"pack: {tar.uri} should have {tar.size_bytes} bytes, found {sizes.get(tar.uri, 'nothing')}; "
                    f"remove {join(out, 'shards', commit.name)}.json and run the same command again"
                )


def _catalog_of(plan: Plan, rows: Sequence[dict[str, Any]]) -> Catalog:
    arrays = [pa.array([row[field.name] for row in rows], field.type) for field in CATALOG_SCHEMA]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), plan.labels)


def _totals(catalog: Catalog, refused: Sequence[QuarantineRow], counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "packed": len(catalog),
        "quarantined": len(refused),
        **counts,
        "splits": dict(sorted(Counter(catalog.table.column("split").to_pylist()).items())),
        "classes": len(catalog.labels),
        "shards": len(set(catalog.table.column("uri").to_pylist())),
        "video_bytes": sum(catalog.table.column("size_bytes").to_pylist()),
    }


def _finish(storage: Storage, out: str, config: PackConfig, plan: Plan, settled: _Settled) -> None:
    """Write the tables, pack.json last; say what became of every file.

    Raises:
        TooManyBad: more than max_bad_fraction of the files were quarantined.
        CatalogError: no file is a clip of the annotations.
    """
    catalog, totals = settled.catalog, settled.totals
    if settled.verdicts is not None:
        sink = io.BytesIO()
        pq.write_table(settled.verdicts, sink, compression="zstd")
        storage.put(join(out, "verdicts.parquet"), sink.getvalue())
    save_quarantine(storage, join(out, "quarantine.parquet"), settled.refused)
    storage.put(join(out, "labels.json"), json.dumps(list(catalog.labels), ensure_ascii=False, indent=1).encode())
    save_catalog(storage, join(out, "catalog.parquet"), catalog)
    transcode = {**asdict(TRANSCODE), "digest": TRANSCODE.digest} if config.transcode else None
    about = {**totals, "config": asdict(config), "catalog_digest": catalog.digest, "transcode": transcode}
    storage.put(join(out, "pack.json"), json.dumps(about, indent=1).encode())
    if isinstance(plan, KineticsPlan):
        print_kinetics(out, config, totals)
        require_usable_kinetics(out, config, totals)
        return
    _print_totals(out, plan, totals)
    _require_few_bad(out, config, plan, settled.refused)


def _print_totals(out: str, plan: Plan, totals: dict[str, Any]) -> None:
    splits = ", ".join(f"{count} {split}" for split, count in totals["splits"].items())
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["reasons"].items())
    others = f" + {totals['others']} no videos" if plan.others else ""
    if plan.others:
        print(f"pack: {visible(said_of_others(plan.others))}, and left out")
    print(
        f"pack: {totals['packed']} packed ({splits or 'none'}) + {totals['quarantined']} quarantined"
        f"{f' ({reasons})' if reasons else ''}{others} = {totals['found']} found\n"
        f"pack: {many(totals['classes'], 'class')}, {many(totals['shards'], 'shard')}, "
        f"{totals['video_bytes'] / 1e6:.1f} MB; wrote {join(out, 'catalog.parquet')}",
        flush=True,
    )


def _require_few_bad(out: str, config: PackConfig, plan: Plan, refused: Sequence[QuarantineRow]) -> None:
    """Files that are no videos by their place or name do not count: they say nothing of the videos."""
    num_tried = plan.num_found - len(plan.refused) - len(plan.others)
    bad = refused[len(plan.refused) :]
    if len(bad) > config.max_bad_fraction * num_tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())
        raise TooManyBad(
            f"pack: {len(bad)} of {num_tried} files were quarantined ({reasons}), more than max_bad_fraction "
            f"{config.max_bad_fraction:g}; the reasons are in {join(out, 'quarantine.parquet')}, the good files "
            "are packed"
        )
