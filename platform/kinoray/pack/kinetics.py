"""Pack a Kinetics set: annotations, a Ray task for each archive or part of the loose files, verdicts that add up.

Replacements are packed before all else, so that the files they replace are not even decoded. What is easy to break:
everything is decided by annotations, names, contents and the order of units, never by which task ends first.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from kinoray.catalog.annotations import read_annotations, read_label_names
from kinoray.catalog.kinetics import OFFICIAL_CLASSES, AnnotationRow, RowPlan, plan_rows
from kinoray.catalog.quarantine import save_quarantine
from kinoray.catalog.source import SourceFile, find_files
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.cluster.connect import connect, require_fit
from kinoray.config.shared import digest
from kinoray.console import Progress
from kinoray.errors import CatalogError, ConfigError, TooManyBad
from kinoray.pack.config import PackConfig
from kinoray.pack.job import Job, committed, pin_plan, require_apart, require_tars, run_jobs
from kinoray.pack.kinetics_settle import Settlement, settle
from kinoray.pack.kinetics_unit import PackSettings, Unit, pack_unit, plan_units, read_unit
from kinoray.storage.objects import Storage, absolute, is_s3, join
from kinoray.video.transcode import TRANSCODE

__all__ = ["pack_kinetics", "transcode_record"]

_COMMIT_THREADS = 16


def pack_kinetics(config: PackConfig) -> dict[str, Any]:
    """Pack `config.source` by its annotations and return the totals; the same call again does what is missing.

    Raises:
        CatalogError: the annotations cannot be understood, or no file is one of their clips.
        ConfigError: out lies inside the source, or holds the pack of other files or settings.
        StorageError: the source cannot be read or out cannot be written.
        TooManyBad: everything is written, but more than max_bad_fraction of the wanted files were unreadable.
        IncompleteOutput: a row or a file has no verdict, or the sums do not agree.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    require_apart(config.source, out)
    names = read_label_names(storage, config.label_names) if config.label_names else {}
    rows = read_annotations(storage, config.annotations, names)
    plan = plan_rows(rows, limit=config.limit, keep_leaks=config.leaks == "keep")
    files = _find(storage, config.source)
    units = plan_units(files, config.shard_mb * 2**20)
    pin_plan(storage, out, _pinned(config, rows, units))
    done = committed(storage, out)
    print(
        f"pack: {len(rows)} annotation rows ({len(plan.labels)} classes), {len(files)} files "
        f"({sum(file.size_bytes for file in files) / 1e6:.1f} MB) in {config.source}: {len(units)} archives or parts, "
        f"{sum(unit.name in done for unit in units)} done already",
        flush=True,
    )
    if any(unit.name not in done for unit in units):
        connect(config.resources)
        require_fit(config.resources)
        _pack_units(storage, out, config, plan, units, done)
    with ThreadPoolExecutor(_COMMIT_THREADS) as pool:
        commits = list(pool.map(lambda unit: read_unit(storage, out, unit.name), units))
    require_tars(storage, out, {uri: (size, commit.name) for commit in commits for uri, size in commit.shards})
    settled = settle(rows, plan, units, commits, keep_leaks=config.leaks == "keep")
    return _finish(storage, out, config, plan, settled)


def transcode_record(config: PackConfig) -> dict[str, Any]:
    """What pack.json says of transcoding."""
    return {"transcode": {**asdict(TRANSCODE), "digest": TRANSCODE.digest} if config.transcode else None}


def _find(storage: Storage, source: str) -> list[SourceFile]:
    """Everything below a folder or prefix, or one archive."""
    if source.lower().endswith((".csv", ".parquet")):
        raise ConfigError(f"source {source}: with --kinetics a folder, a prefix or an archive is expected")
    if (not is_s3(source) and Path(source).is_file()) or (is_s3(source) and storage.exists(source)):
        uri = absolute(source)
        return [SourceFile(uri.rpartition("/")[2], uri, storage.stat(uri).size_bytes)]
    files = find_files(storage, source)
    if not files:
        raise CatalogError(f"{source}: found nothing; expected archives or videos")
    return files


def _pinned(config: PackConfig, rows: Sequence[AnnotationRow], units: Sequence[Unit]) -> dict[str, Any]:
    about = [(unit.name, [(file.name, file.size_bytes) for file in unit.files]) for unit in units]
    return {
        "source": absolute(config.source).rstrip("/"),
        "num_found": sum(len(unit.files) for unit in units),
        "kinetics": config.kinetics,
        "annotations": digest([row[2:] for row in rows]),
        "limit": config.limit,
        "leaks": config.leaks,
        "shard_mb": config.shard_mb,
        "decode": asdict(config.decode),
        **({"transcode": TRANSCODE.digest} if config.transcode else {}),
        "files": digest(about),
    }


def _pack_task(
    storage: Storage, out: str, unit: Unit, shared: tuple[Any, ...], settings: PackSettings
) -> tuple[int, int]:
    """(packed, found) of one unit; the verdicts stay in its commit."""
    clips, replaced = shared
    commit = pack_unit(storage, out, unit, clips, replaced, settings)
    return len(commit.packed), commit.num_found


def _pack_units(
    storage: Storage, out: str, config: PackConfig, plan: RowPlan, units: Sequence[Unit], done: set[str]
) -> None:
    """Run a task for each unit that has no commit: replacements first, since others need to know what they replace."""
    settings = PackSettings(config.decode, config.transcode, config.shard_mb * 2**20)
    left = [unit for unit in units if unit.name not in done]
    progress = Progress(len(units), "pack", "archives or parts", already=len(units) - len(left))
    replaced: set[str] = set()
    for is_replacement in (True, False):
        stage = [unit for unit in left if unit.is_replacement == is_replacement]
        if not is_replacement:
            replaced = _replaced(storage, out, units)
        shared = ray.put((plan.clips, replaced))
        jobs = [
            Job(unit.name, f"{unit.files[0].uri} is not packed", (storage, out, unit, shared, settings))
            for unit in stage
        ]
        for _, (packed, found) in run_jobs(config.resources, _pack_task, jobs):
            progress.update(1, packed=packed, found=found)
    progress.close()


def _replaced(storage: Storage, out: str, units: Sequence[Unit]) -> set[str]:
    """Clips of which a replacement is packed."""
    commits = [read_unit(storage, out, unit.name) for unit in units if unit.is_replacement]
    return {commit.files[packed.position].key for commit in commits for packed in commit.packed}


def _finish(storage: Storage, out: str, config: PackConfig, plan: RowPlan, settled: Settlement) -> dict[str, Any]:
    """Write catalog, labels, quarantine, verdicts and totals; say what became of every row and file."""
    arrays = [pa.array([row.get(field.name) for row in settled.catalog], field.type) for field in CATALOG_SCHEMA]
    catalog = Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), plan.labels)
    totals = {
        "packed": len(catalog),
        "quarantined": len(settled.refused),
        **settled.totals,
        "splits": dict(sorted(Counter(catalog.table.column("split").to_pylist()).items())),
        "classes": len(plan.labels),
        "shards": len(set(catalog.table.column("uri").to_pylist())),
        "video_bytes": sum(catalog.table.column("size_bytes").to_pylist()),
    }
    sink = io.BytesIO()
    pq.write_table(settled.verdicts, sink, compression="zstd")
    storage.put(join(out, "verdicts.parquet"), sink.getvalue())
    save_quarantine(storage, join(out, "quarantine.parquet"), settled.refused)
    storage.put(join(out, "labels.json"), json.dumps(list(plan.labels), ensure_ascii=False, indent=1).encode())
    save_catalog(storage, join(out, "catalog.parquet"), catalog)
    about = {**totals, "config": asdict(config), "catalog_digest": catalog.digest, **transcode_record(config)}
    storage.put(join(out, "pack.json"), json.dumps(about, indent=1).encode())
    _report(out, config, totals)
    _require_usable(out, config, totals)
    return totals


def _report(out: str, config: PackConfig, totals: dict[str, Any]) -> None:
    def added_up(counts: dict[str, int]) -> str:
        return " + ".join(f"{count} {name}" for name, count in counts.items()) or "none"

    print(f"pack: {sum(totals['rows'].values())} annotation rows = {added_up(totals['rows'])}")
    print(f"pack: {sum(totals['files'].values())} files and members = {added_up(totals['files'])}")
    if totals["unreadable"]:
        print(f"pack: unreadable: {added_up(totals['unreadable'])}")
    for uri, damage in totals["damaged"].items():
        print(f"pack: WARNING: {uri} is damaged {damage}; its rest is not packed, fetch it again for another pack")
    leaks = totals["leaks"]
    if any(leaks.values()):
        kept = "removed from train" if config.leaks == "remove" else "kept in train (leaks=keep)"
        print(
            f"pack: leaks into train: {leaks['source_video']} by source video, {leaks['content']} by content, {kept}; "
            f"{leaks['between_other_splits']} source videos are shared by other splits and stay"
        )
    official = OFFICIAL_CLASSES[config.kinetics] if config.kinetics else totals["classes"]
    differs = "" if totals["classes"] == official else f" (official {config.kinetics}: {official})"
    if totals["not_in_catalog"]:
        print(f"pack: {totals['not_in_catalog']} videos in the shards are duplicates or leaks, not in the catalog")
    splits = ", ".join(f"{count} {split}" for split, count in totals["splits"].items())
    print(
        f"pack: {totals['packed']} packed ({splits or 'none'}), {totals['classes']} classes{differs}, "
        f"{totals['shards']} shards, {totals['video_bytes'] / 1e6:.1f} MB; wrote {join(out, 'catalog.parquet')}",
        flush=True,
    )


def _require_usable(out: str, config: PackConfig, totals: dict[str, Any]) -> None:
    files = totals["files"]
    bad = files.get("unreadable", 0)
    tried = bad + files.get("packed", 0) + files.get("too_short", 0)
    verdicts = join(out, "verdicts.parquet")
    if not tried:
        raise CatalogError(
            f"pack: none of {sum(files.values())} files and members is a clip of the annotations; {verdicts} says what "
            "each is taken for; names such as <youtube id>_000010_000020.mp4 are expected"
        )
    if bad > config.max_bad_fraction * tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in totals["unreadable"].items())
        raise TooManyBad(
            f"pack: {bad} of {tried} wanted files were refused ({reasons}), more than max_bad_fraction "
            f"{config.max_bad_fraction:g}; the reasons are in {verdicts}, the good files are packed"
        )
