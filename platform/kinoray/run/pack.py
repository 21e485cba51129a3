"""Pack videos into tar shards and a catalog: plan, pin the plan, pack each shard in a Ray task, add up, finish.

What is easy to break: a shard that is committed is never touched again, and the plan is pinned before the first one,
so that a second run can only go on with the same files and settings.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from kinoray.catalog import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.catalog_source import find_files
from kinoray.config import DecodeConfig
from kinoray.errors import ConfigError, IncompleteOutput, JobError, KinorayError, StorageUnavailable, TooManyBad
from kinoray.progress import Progress
from kinoray.quarantine import Refusal, count_reasons, save_quarantine
from kinoray.run.cluster import connect, require_fit
from kinoray.shards import ShardCommit, pack_shard, read_commit
from kinoray.shards_plan import PackPlan, ShardPlan, make_plan
from kinoray.storage import Storage, absolute, join
from kinoray.verbs import PackConfig

__all__ = ["pack"]

_TASK_RETRIES = 3  # of a shard whose worker died, or whose store stayed away
_COMMIT_THREADS = 16


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack `config.source` into `config.out` and return the totals; the same call again does what is missing.

    Raises:
        CatalogError: there is nothing to pack, or the CSV is malformed.
        ConfigError: out lies inside the source, or holds the pack of other files or settings.
        StorageError: the source cannot be listed or out cannot be written.
        TooManyBad: everything is written, but more than max_bad_fraction of the files were refused.
        IncompleteOutput: packed and refused do not add up to what was found.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    _require_apart(config.source, out)
    plan = make_plan(
        config.source,
        find_files(storage, config.source),
        shard_bytes=config.shard_mb * 2**20,
        val_fraction=config.val_fraction,
    )
    _pin(storage, out, config, plan)
    done = _committed(storage, out, plan)
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


def _require_apart(source: str, out: str) -> None:
    if (out + "/").startswith(absolute(source).rstrip("/") + "/"):
        raise ConfigError(f"out {out} lies inside the source {source}: a second run would find its own shards there")


def _pin(storage: Storage, out: str, config: PackConfig, plan: PackPlan) -> None:
    """Write plan.json, or compare with the one that is there."""
    pinned = {
        "source": absolute(config.source).rstrip("/"),
        "num_found": plan.num_found,
        "shard_mb": config.shard_mb,
        "val_fraction": config.val_fraction,
        "decode": asdict(config.decode),
        "files": plan.digest,
    }
    uri = join(out, "plan.json")
    if storage.put_if_absent(uri, json.dumps(pinned, indent=1).encode()):
        return
    try:
        there = json.loads(storage.read(uri))
        changed = [f"{name} was {there[name]}, is {pinned[name]}" for name in pinned if there[name] != pinned[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"out: {uri} is not the plan of a pack ({error}); choose another folder") from error
    if changed:
        raise ConfigError(
            f"out {out} holds another pack: {'; '.join(changed)}; choose another folder, or remove this one"
        )


def _committed(storage: Storage, out: str, plan: PackPlan) -> set[str]:
    """Names of the plan's shards that have a commit."""
    prefix = join(out, "shards") + "/"
    names = {info.uri[len(prefix) :] for info in storage.list(prefix)}
    return {shard.name for shard in plan.shards if f"{shard.name}.json" in names}


def _pack_task(storage: Storage, out: str, shard: ShardPlan, decode: DecodeConfig) -> tuple[int, int]:
    """(packed, refused) of one shard; the rows stay in its commit."""
    commit = pack_shard(storage, out, shard, decode)
    return len(commit.rows), len(commit.refused)


def _pack_shards(storage: Storage, out: str, config: PackConfig, plan: PackPlan, left: Sequence[ShardPlan]) -> None:
    """Run a task for each shard, num_workers at a time."""
    num_left = sum(len(shard.videos) for shard in left)
    progress = Progress(plan.num_found, "pack", "files", already=plan.num_found - num_left)
    resources = config.resources
    task = ray.remote(_pack_task).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=_TASK_RETRIES,
        retry_exceptions=[StorageUnavailable],
    )
    waiting = iter(left)
    running: dict[ray.ObjectRef, ShardPlan] = {}
    try:
        while True:
            for shard in _take(waiting, resources.num_workers - len(running)):
                running[task.remote(storage, out, shard, config.decode)] = shard
            if not running:
                break
            ready, _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(ready[0])
            packed, refused = _result(ready[0], shard)
            progress.update(packed + refused, quarantined=refused)
    finally:
        for reference in running:
            ray.cancel(reference)
    progress.close()


def _take(shards: Iterator[ShardPlan], count: int) -> Iterator[ShardPlan]:
    yield from (shard for _, shard in zip(range(count), shards, strict=False))


def _result(reference: Any, shard: ShardPlan) -> tuple[int, int]:
    try:
        packed, refused = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KinorayError):  # without Ray's traceback of the worker
            raise error.cause from error
        raise
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise JobError(
            f"pack: the worker of {shard.name} died {_TASK_RETRIES + 1} times, {len(shard.videos)} files from "
            f"{shard.videos[0].uri} on are not packed ({reason}); the same command goes on from here"
        ) from error
    return int(packed), int(refused)


def _finish(storage: Storage, out: str, config: PackConfig, plan: PackPlan) -> dict[str, Any]:
    """Write catalog, labels, quarantine and totals from the commits; say what became of every file."""
    with ThreadPoolExecutor(_COMMIT_THREADS) as pool:
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
    about = {**totals, "config": asdict(config), "catalog_digest": catalog.digest}
    storage.put(join(out, "pack.json"), json.dumps(about, indent=1).encode())
    _report(out, totals)
    _require_few_bad(config, plan, refused)
    return totals


def _require_whole(storage: Storage, out: str, plan: PackPlan, commits: Sequence[ShardCommit]) -> None:
    """Every planned file is in its shard's commit, and every tar is there in full."""
    sizes = {info.uri: info.size_bytes for info in storage.list(join(out, "shards") + "/")}
    for shard, commit in zip(plan.shards, commits, strict=True):
        accounted = {row["video_id"] for row in commit.rows} | {refusal.video_id for refusal in commit.refused}
        if accounted != {video.video_id for video in shard.videos}:
            raise IncompleteOutput(
                f"pack: {shard.name} accounts for {len(accounted)} of its {len(shard.videos)} files; remove "
                f"{join(out, 'shards', shard.name)}.json and run the same command again"
            )
        if commit.uri and sizes.get(commit.uri) != commit.size_bytes:
            raise IncompleteOutput(
                f"pack: {commit.uri} should have {commit.size_bytes} bytes, found {sizes.get(commit.uri, 'nothing')}; "
                "remove the .json of that name and run the same command again"
            )


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
