"""Pack videos into tar shards and a catalog: plan, pin the plan, pack each unit in a Ray task, settle, finish.

A folder, a list, a catalog and a Kinetics set differ in their plans only. What is easy to break: a plan is pinned
before the first task, so that a second run can only go on with the same files and settings; and a unit that is
committed is never touched again.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from kinoray.errors import ConfigError
from kinoray.pack.config import PackConfig
from kinoray.pack.job import pack_units
from kinoray.pack.kinetics import KineticsPlan, plan_kinetics
from kinoray.pack.plan import Plan, plan_source
from kinoray.pack.settle import finish, settle
from kinoray.pack.unit import PackSettings, read_commit
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json
from kinoray.video.transcode import TRANSCODE

__all__ = ["pack", "pin_plan"]

_THREADS = 16
_MAX_PLAN_BYTES = 2**30


def pack(config: PackConfig) -> dict[str, Any]:
    """Pack `config.source` into `config.out` and return the totals; the same call again does what is missing.

    Raises:
        CatalogError: there is nothing to pack, or a list or the annotations are malformed.
        ConfigError: out lies inside the source, or holds the pack of other files or settings.
        StorageError: the source cannot be listed or out cannot be written.
        TooManyBad: everything is written, but more than max_bad_fraction of the files were refused.
        IncompleteOutput: a file or an annotation row has no verdict, or the sums do not agree.
    """
    storage = Storage(config.storage)
    out = absolute(config.out).rstrip("/")
    _require_apart(config.source, out)
    plan = plan_kinetics(storage, config) if config.kinetics else plan_source(storage, config)
    pin_plan(storage, out, _pinned(config, plan))
    done = _committed(storage, out)
    num_done = sum(unit.name in done for unit in plan.units)
    wanted = f"{len(plan.rows)} annotation rows, " if isinstance(plan, KineticsPlan) else ""
    print(
        f"pack: {wanted}found {plan.num_found} files ({plan.size_bytes / 1e6:.1f} MB, {len(plan.labels)} classes) in "
        f"{config.source}: {len(plan.units)} {plan.word}, {num_done} done already",
        flush=True,
    )
    if num_done < len(plan.units):
        settings = PackSettings(config.decode, config.transcode, config.shard_mb * 2**20)
        pack_units(storage, out, plan, settings, config.resources, done)
    with ThreadPoolExecutor(_THREADS) as pool:
        commits = list(pool.map(lambda unit: read_commit(storage, out, unit.name), plan.units))
    settled = settle(storage, out, plan, commits)
    finish(storage, out, config, plan, settled)
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
