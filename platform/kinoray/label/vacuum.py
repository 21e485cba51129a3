"""`kinoray vacuum`: remove the parts that no commit names, and temporary files, beside jobs that may be at work.

What is easy to break: a writer stores its part first and commits it later, so the parts are listed before the commits
are read, and a part that was removed is put back if a commit has come to name it meanwhile. A writer that checks its
part after its commit closes the last gap: one of the two always sees the other.
"""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kinoray.errors import IncompleteOutput, ObjectNotFound, StorageError
from kinoray.label.config import VacuumConfig
from kinoray.label.table import Commit, Ledger, find_labellings
from kinoray.storage.objects import ObjectInfo, Storage, absolute, is_s3, join

__all__ = ["vacuum"]

_FOLDERS = ("parts", "windows")
_THREADS = 16
_HOUR_S = 3600.0
_TEMPORARY = ".kinoray-tmp-"  # how FolderStore names what it has not finished; its listings leave them out
_MAX_DAMAGE = 10
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*-[0-9a-f]{12}\.parquet")  # as Ledger.commit names it


@dataclass(slots=True)
class _Found:
    """What was seen under one labelling."""

    kept: int = 0
    """Parts that a commit names."""
    young: int = 0
    """Parts and temporary files that nobody names, too young to go."""
    strange: int = 0
    """Other files among the parts, which no labelling has written: they stay."""
    parts: list[ObjectInfo] = field(default_factory=list)
    """Parts to remove."""
    temporary: list[ObjectInfo] = field(default_factory=list)
    """Temporary files to remove."""
    damage: list[str] = field(default_factory=list)
    """Parts that a commit names and that are gone or have another size, with the remedy."""


def vacuum(config: VacuumConfig) -> dict[str, Any]:
    """Remove the leftovers and print counts and bytes.

    Returns:
        `labellings`, `kept`, `young`, `removed`, `removed_bytes`, `restored` (named by a commit meanwhile: they
        stay, or were put back) and `dry_run`.

    Raises:
        IncompleteOutput: a commit names a part that is gone or changed; all that could be removed was.
        ObjectNotFound: there is no result table.
        StorageError: a commit cannot be read, or a folder of parts is a link (then nothing of that labelling is
            removed), or the store fails.
    """
    storage = Storage(config.storage)
    now_s = time.time()
    totals: dict[str, Any] = {"labellings": 0, "kept": 0, "young": 0, "removed": 0, "removed_bytes": 0, "restored": 0}
    damage: list[str] = []
    for root in find_labellings(storage, absolute(config.out)):
        ledger = Ledger(storage, root)
        found = _look(ledger, now_s - config.older_than_h * _HOUR_S)
        restored = 0 if config.dry_run else _remove(ledger, found)
        gone = [*found.parts, *found.temporary]
        num_bytes = sum(info.size_bytes for info in gone)
        changes = {"labellings": 1, "kept": found.kept, "young": found.young, "restored": restored}
        changes |= {"removed": len(gone) - restored, "removed_bytes": num_bytes}
        totals = {name: totals[name] + changes[name] for name in totals}
        damage += found.damage
        _say(root, found, num_bytes, restored, config)
    if damage:
        more = f"; and {len(damage) - _MAX_DAMAGE} more" if len(damage) > _MAX_DAMAGE else ""
        raise IncompleteOutput(f"{len(damage)} committed parts are damaged: {'; '.join(damage[:_MAX_DAMAGE])}{more}")
    return {**totals, "dry_run": config.dry_run}


def _look(ledger: Ledger, before_s: float) -> _Found:
    """What is there. Parts are listed first: a commit that comes after the listing cannot make one look unnamed."""
    storage, root = ledger.storage, ledger.root
    there = {info.uri: info for folder in _FOLDERS for info in _list(storage, join(root, folder) + "/")}
    found = _Found()
    with ThreadPoolExecutor(_THREADS) as pool:
        for commit in pool.map(ledger.find_commit, sorted(ledger.committed())):
            for uri, size_bytes in _named(root, commit):
                info = there.pop(uri, None) or _stat(storage, uri)  # a part may be younger than our listing
                if info is not None and info.size_bytes == size_bytes:
                    found.kept += 1
                else:
                    found.damage.append(_damage(root, uri, size_bytes, info))
    for info in there.values():
        if not any(_PART.fullmatch(info.uri.removeprefix(join(root, folder) + "/")) for folder in _FOLDERS):
            found.strange += 1
        elif info.modified_s < before_s:
            found.parts.append(info)
        else:
            found.young += 1
    for info in _temporary_files(root):
        if info.modified_s < before_s:
            found.temporary.append(info)
        else:
            found.young += 1
    return found


def _list(storage: Storage, prefix: str) -> Iterator[ObjectInfo]:
    """What lies in a folder of the labelling. Behind a link lies what somebody else wrote, and may not be removed."""
    if not is_s3(prefix) and os.path.islink(prefix.rstrip("/")):
        raise StorageError(f"{prefix} is a link to another folder, where nothing may be removed; vacuum that one's own")
    return storage.list(prefix)


def _named(root: str, commit: Commit | None) -> list[tuple[str, int]]:
    """(uri, size in bytes) of what a commit names; nothing if it was removed by hand meanwhile."""
    if commit is None:
        return []
    named = [(join(root, "parts", commit.part), commit.size_bytes)]
    if commit.windows is not None:
        named.append((join(root, "windows", commit.part), int(commit.windows["size_bytes"])))
    return named


def _stat(storage: Storage, uri: str) -> ObjectInfo | None:
    try:
        return storage.stat(uri)
    except ObjectNotFound:
        return None


def _damage(root: str, uri: str, size_bytes: int, info: ObjectInfo | None) -> str:
    what = "is gone" if info is None else f"has {info.size_bytes} bytes, not {size_bytes}"
    commit = join(root, "commits", f"{_unit_of(uri)}.json")
    return f"{uri} {what}: delete {commit} and run the label command again"


def _unit_of(uri: str) -> str:
    """`.../<unit>-<attempt>.parquet` -> its unit's id."""
    return uri.rpartition("/")[2].rpartition("-")[0]


def _temporary_files(root: str) -> Iterator[ObjectInfo]:
    """What writers that were killed left in a folder. S3 shows no object before it is whole, so there are none."""
    if is_s3(root):
        return
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(_TEMPORARY):
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except FileNotFoundError:
                    continue  # its writer has finished
                yield ObjectInfo(path, status.st_size, status.st_mtime, "")


def _remove(ledger: Ledger, found: _Found) -> int:
    """Remove them; how many had to stay or be put back."""
    with ThreadPoolExecutor(_THREADS) as pool:
        restored = sum(pool.map(lambda info: _remove_part(ledger, info.uri), found.parts))
        list(pool.map(lambda info: ledger.storage.delete(info.uri), found.temporary))
    return restored


def _remove_part(ledger: Ledger, uri: str) -> bool:
    """Remove a part; whether its unit's commit names it by now, so that it stays or is put back.

    The commit is read again after the removal: from then on a writer that commits this part finds it gone, and writes
    it again, if it looks (Ledger.commit should).
    """

    def is_named() -> bool:
        return uri in dict(_named(ledger.root, ledger.find_commit(_unit_of(uri))))

    try:
        data = ledger.storage.read(uri)
    except ObjectNotFound:
        return False  # its writer lost, and has removed it itself
    if is_named():  # since we looked: readers must not miss it even for a moment
        return True
    ledger.storage.delete(uri)
    if not is_named():
        return False
    ledger.storage.put(uri, data)
    return True


def _say(root: str, found: _Found, num_bytes: int, restored: int, config: VacuumConfig) -> None:
    verb = "would remove" if config.dry_run else "removed"
    print(
        f"vacuum: {root}: {verb} {len(found.parts)} parts that no commit names and {len(found.temporary)} temporary "
        f"files ({num_bytes / 1e6:.1f} MB); kept {found.kept} committed parts"
    )
    if found.young:
        print(f"vacuum: {root}: {found.young} more are younger than {config.older_than_h:g} h and stay")
    if found.strange:
        print(f"vacuum: {root}: {found.strange} files among the parts are none of a labelling's, and stay")
    if restored:
        print(f"vacuum: {root}: {restored} of them were committed meanwhile, and stay")
    for line in found.damage[:_MAX_DAMAGE]:
        print(f"vacuum: damaged: {line}", flush=True)
