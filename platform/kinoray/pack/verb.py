"""Pack videos into tar shards and a catalog: plan, pin the plan, pack each shard in a Ray task, add up, finish.

Kinetics sets go their own way from here, see kinetics.py. What is easy to break: a shard that is committed is
never touched again.
"""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from kinoray.catalog.quarantine import Refusal, count_reasons, save_quarantine
from kinoray.catalog.source import find_files, stat_size
from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, is_catalog, load_catalog, save_catalog
from kinoray.cluster.connect import connect, require_fit
from kinoray.config.shared import DecodeConfig
from kinoray.console import Progress
from kinoray.errors import IncompleteOutput, TooManyBad
from kinoray.pack.config import PackConfig
from kinoray.pack.job import Job, committed, pin_plan, require_apart, require_tars, run_jobs
from kinoray.pack.kinetics import pack_kinetics, transcode_record
from kinoray.pack.plan import PackPlan, ShardPlan, make_plan, plan_of_catalog
from kinoray.pack.shard import ShardCommit, pack_shard, read_commit
from kinoray.storage.objects import Storage, absolute, join
from kinoray.video.transcode import TRANSCODE

__all__ = ["pack"]

_THREADS = 16


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack `config.source` into `config.out` and return the totals; the same call again does what is missing.

    Raises:
        CatalogError: there is nothing to pack, or the CSV is malformed.
        ConfigError: out lies inside the source, or holds the pack of other files or settings.
        StorageError: the source cannot be listed or out cannot be written.
        TooManyBad: everything is written, but more than max_bad_fraction of the files were refused.
        IncompleteOutput: packed and refused do not add up to what was found.
    """
    if config.kinetics:
        return pack_kinetics(config)
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    require_apart(config.source, out)
    plan = _plan(storage, config)
    pin_plan(storage, out, _pinned(config, plan))
    done = committed(storage, out)
    left = [shard for shard in plan.shards if shard.name not in done]
    size_bytes = sum(video.size_bytes for shard in plan.shards for video in shard.videos)
    print(
        f"pack: found {plan.num_found} files ({size_bytes / 1e6:.1f} MB, {len(plan.labels)} classes) in "
        f"{config.source}: {len(plan.shards)} shards, {len(plan.shards) - len(left)} done already",
        flush=True,
    )
    if left:
        connect(config.resources)
        require_fit(config.resources)
        _pack_shards(storage, out, config, plan, left)
    return _finish(storage, out, config, plan)


def _plan(storage: Storage, config: PackConfig) -> PackPlan:
    """The files of a folder or CSV; or the videos of a catalog, which may be members of other shards."""
    shard_bytes, source = config.shard_mb * 2**20, config.source
    if is_catalog(storage, source):
        catalog = _with_sizes(storage, load_catalog(storage, source))
        return plan_of_catalog(source, catalog, shard_bytes=shard_bytes, val_fraction=config.val_fraction)
    files = find_files(storage, source)
    return make_plan(source, files, shard_bytes=shard_bytes, val_fraction=config.val_fraction)


def _with_sizes(storage: Storage, catalog: Catalog) -> Catalog:
    """The catalog with the sizes of whole objects that it does not know; what is not there will be refused by name."""
    table = catalog.table
    columns = [table.column(name).to_pylist() for name in ("uri", "offset", "size_bytes")]

    def size_of(row: tuple[str, int | None, int | None]) -> int | None:
        uri, offset, size_bytes = row
        if offset is not None or size_bytes is not None:
            return size_bytes
        return stat_size(storage, uri)

    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = pa.array(list(pool.map(size_of, zip(*columns, strict=True))), pa.int64())
    place = table.schema.get_field_index("size_bytes")
    return Catalog(table.set_column(place, table.schema.field(place), sizes), catalog.labels)


def _pinned(config: PackConfig, plan: PackPlan) -> dict[str, Any]:
    return {
        "source": absolute(config.source).rstrip("/"),
        "num_found": plan.num_found,
        "shard_mb": config.shard_mb,
        "val_fraction": config.val_fraction,
        "decode": asdict(config.decode),
        **({"transcode": TRANSCODE.digest} if config.transcode else {}),
        "files": plan.digest,
    }


def _pack_task(storage: Storage, out: str, shard: ShardPlan, decode: DecodeConfig, transcoded: bool) -> tuple[int, int]:
    """(packed, refused) of one shard; the rows stay in its commit."""
    commit = pack_shard(storage, out, shard, decode, transcoded=transcoded)
    return len(commit.rows), len(commit.refused)


def _pack_shards(storage: Storage, out: str, config: PackConfig, plan: PackPlan, left: Sequence[ShardPlan]) -> None:
    """Run a task for each shard, num_workers at a time."""
    num_left = sum(len(shard.videos) for shard in left)
    progress = Progress(plan.num_found, "pack", "files", already=plan.num_found - num_left)
    jobs = [
        Job(
            shard.name,
            f"{len(shard.videos)} files from {shard.videos[0].uri} on are not packed",
            (storage, out, shard, config.decode, config.transcode),
        )
        for shard in left
    ]
    for _, (packed, refused) in run_jobs(config.resources, _pack_task, jobs):
        progress.update(packed + refused, quarantined=refused)
    progress.close()


def _finish(storage: Storage, out: str, config: PackConfig, plan: PackPlan) -> dict[str, Any]:
    """Write catalog, labels, quarantine and totals from the commits; say what became of every file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        commits = list(pool.map(lambda shard: read_commit(storage, out, shard.name), plan.shards))
    _require_whole(storage, out, plan, commits)
    rows = [row for commit in commits for row in commit.rows]
    refused = [*plan.refused, *(refusal for commit in commits for refusal in commit.refused)]
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    catalog = Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), plan.labels)
    totals = _totals(plan, catalog, refused)
    save_quarantine(storage, join(out, "quarantine.parquet"), refused)
    storage.put(join(out, "labels.json"), json.dumps(list(plan.labels), ensure_ascii=False, indent=1).encode())
    save_catalog(storage, join(out, "catalog.parquet"), catalog)
    about = {**totals, "config": asdict(config), "catalog_digest": catalog.digest, **transcode_record(config)}
    storage.put(join(out, "pack.json"), json.dumps(about, indent=1).encode())
    _report(out, totals)
    _require_few_bad(config, plan, refused)
    return totals


def _require_whole(storage: Storage, out: str, plan: PackPlan, commits: Sequence[ShardCommit]) -> None:
    """Every planned file is in its shard's commit, and every tar is there in full."""
    for shard, commit in zip(plan.shards, commits, strict=True):
        accounted = {row["video_id"] for row in commit.rows} | {refusal.video_id for refusal in commit.refused}
        if accounted != {video.video_id for video in shard.videos}:
            raise IncompleteOutput(
                f"pack: {shard.name} accounts for {len(accounted)} of its {len(shard.videos)} files; remove "
                f"{join(out, 'shards', shard.name)}.json and run the same command again"
            )
    tars = {commit.uri: (commit.size_bytes, commit.name) for commit in commits if commit.uri}
    require_tars(storage, out, tars)


def _totals(plan: PackPlan, catalog: Catalog, refused: Sequence[Refusal]) -> dict[str, Any]:
    if len(catalog) + len(refused) != plan.num_found:
        raise IncompleteOutput(
            f"pack: {len(catalog)} packed + {len(refused)} quarantined is not the {plan.num_found} files found"
        )
    return {
        "found": plan.num_found,
        "packed": len(catalog),
        "quarantined": len(refused),
        "reasons": count_reasons(refused),
        "splits": dict(sorted(Counter(catalog.table.column("split").to_pylist()).items())),
        "classes": len(plan.labels),
        "shards": len(set(catalog.table.column("uri").to_pylist())),
        "video_bytes": sum(catalog.table.column("size_bytes").to_pylist()),
    }


def _report(out: str, totals: dict[str, Any]) -> None:
    splits = ", ".join(f"{count} {split}" for split, count in totals["splits"].items())
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals["reasons"].items())
    print(
        f"pack: {totals['packed']} packed ({splits or 'none'}) + {totals['quarantined']} quarantined"
        f"{f' ({reasons})' if reasons else ''} = {totals['found']} found\n"
        f"pack: {totals['classes']} classes, {totals['shards']} shards, {totals['video_bytes'] / 1e6:.1f} MB; "
        f"wrote {join(out, 'catalog.parquet')}",
        flush=True,
    )


def _require_few_bad(config: PackConfig, plan: PackPlan, refused: Sequence[Refusal]) -> None:
    """Files that are no videos by their place or name do not count: they say nothing of the videos."""
    num_tried = plan.num_found - len(plan.refused)
    bad = refused[len(plan.refused) :]
    if len(bad) > config.max_bad_fraction * num_tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())
        raise TooManyBad(
            f"pack: {len(bad)} of {num_tried} files were refused ({reasons}), more than max_bad_fraction "
            f"{config.max_bad_fraction:g}; the reasons are in {join(config.out, 'quarantine.parquet')}, the good files "
            "are packed"
        )
