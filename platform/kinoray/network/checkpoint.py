"""Checkpoints: weights as safetensors, everything else as JSON; nothing here can run code when it is loaded.

A checkpoint is a folder. `checkpoint.json` is written last and names every other file with its size and sha256, so a
checkpoint is whole or absent: never write it before the files it names, never delete it after them.

It may be a stranger's. What is easy to break: its text chooses among the networks that ship, and nothing else
(kinoray.network.build.trusted_network); sizes are compared before bytes are read, and shapes before memory is taken.

    model.safetensors        weights
    train_state.safetensors  what training needs to go on (optimizer moments and more), if it was given
    checkpoint.json          CheckpointMeta, and the digests
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kinoray.config.shared import digest
from kinoray.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointNotFound
from kinoray.network.build import VideoModel, build_model, build_outline, is_shipped, trusted_network
from kinoray.network.checkpoint_files import (
    FORMAT,
    META_FILE,
    MODEL_FILE,
    TRAIN_FILE,
    CheckpointMeta,
    Origin,
    Shaped,
    model_digest,
    read_document,
    read_shapes,
    read_tensors,
    require_digests,
)
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, join

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "META_FILE",
    "MODEL_FILE",
    "TRAIN_FILE",
    "CheckpointMeta",
    "Origin",
    "Shaped",
    "best_of",
    "choose_checkpoint",
    "delete_checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "load_meta",
    "load_model",
    "load_model_state",
    "load_train_state",
    "load_weights",
    "newest_checkpoint",
    "require_weights",
    "save_checkpoint",
    "weight_shapes",
]

_LOG = logging.getLogger(__name__)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(storage: Storage, uri: str, state: "Mapping[str, Tensor]", folder: Path) -> dict[str, Any]:
    import safetensors.torch

    # Clones: safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    path = folder / "tensors"
    safetensors.torch.save_file(tensors, path)
    entry = {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    storage.put_file(uri, path)
    path.unlink()
    return entry


def save_checkpoint(
    storage: Storage,
    uri: str,
    *,
    model_state: "Mapping[str, Tensor]",
    meta: CheckpointMeta,
    train_state: "Mapping[str, Tensor] | None" = None,
) -> CheckpointMeta:
    """Write a checkpoint under uri and return its meta with model_digest filled in.

    A whole checkpoint that is at uri already is replaced; in between there is none, never a mixture.
    """
    storage.delete(join(uri, META_FILE))
    with scratch_folder("checkpoint") as folder:
        files = {MODEL_FILE: _write_tensors(storage, join(uri, MODEL_FILE), model_state, folder)}
        if train_state is not None:
            files[TRAIN_FILE] = _write_tensors(storage, join(uri, TRAIN_FILE), train_state, folder)
    saved = dataclasses.replace(meta, model_digest=model_digest(files[MODEL_FILE]["sha256"], meta.model))
    about = dataclasses.asdict(saved)
    if saved.scores == "softmax":
        del about["scores"]  # which older versions do not know; it is what it is where nothing is said
    body = {"format": FORMAT, "files": files, "meta": about}
    text = json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True)
    storage.put(join(uri, META_FILE), text.encode())
    return saved


def load_meta(storage: Storage, uri: str) -> CheckpointMeta:
    """What the checkpoint at uri says about itself.

    Raises:
        CheckpointNotFound: there is no checkpoint.json.
        CheckpointCorrupt: it was damaged.
        CheckpointMismatch: another version of kinoray wrote it.
    """
    return read_document(storage, uri).meta


def weight_shapes(storage: Storage, uri: str) -> dict[str, Shaped]:
    """Names and shapes of the weights, which are not read. Raises CheckpointNotFound, CheckpointCorrupt."""
    return read_shapes(storage, read_document(storage, uri), MODEL_FILE)


def load_model_state(storage: Storage, uri: str) -> "dict[str, Tensor]":
    """The weights, on the CPU. Raises CheckpointNotFound, CheckpointCorrupt."""
    return read_tensors(storage, read_document(storage, uri), MODEL_FILE)


def load_train_state(storage: Storage, uri: str) -> "dict[str, Tensor]":
    """What was saved as train_state, on the CPU.

    Raises:
        CheckpointNotFound: no checkpoint, or one that was saved without it.
        CheckpointCorrupt: it was damaged.
    """
    return read_tensors(storage, read_document(storage, uri), TRAIN_FILE)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_weights(module: "nn.Module", state: "Mapping[str, Tensor]", what: str) -> None:
    """Copy the weights into the module, all of them or none. Raises as require_weights."""
    require_weights(module, state, what)
    module.load_state_dict(dict(state))


def require_weights(module: "nn.Module", state: Mapping[str, Shaped], what: str) -> None:
    """Check that the weights are the module's, by name and shape.

    Raises:
        CheckpointMismatch: naming the weights that are missing, not wanted, or of another shape.
    """
    wanted = module.state_dict()
    problems = []
    if missing := sorted(set(wanted) - set(state)):
        problems.append(f"{len(missing)} weights of the model are missing ({_some(missing)})")
    if unknown := sorted(set(state) - set(wanted)):
        problems.append(f"{len(unknown)} weights are not the model's ({_some(unknown)})")
    shapes = [
        f"{name} is {list(state[name].shape)}, the model's is {list(tensor.shape)}"
        for name, tensor in sorted(wanted.items())
        if name in state and tuple(state[name].shape) != tuple(tensor.shape)
    ]
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise CheckpointMismatch(f"{what} does not fit the model: {'; '.join(problems)}")


def load_model(storage: Storage, uri: str, allowed: Collection[str] = ()) -> tuple[VideoModel, CheckpointMeta]:
    """Build the network that the checkpoint names, with its weights, in eval mode on the CPU.

    Args:
        allowed: networks that do not ship with kinoray and may be imported all the same, as `package:function`.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: as load_model_state.
        CheckpointMismatch: the weights are not those of the network that the factory builds now.
        ConfigError: the network does not ship with kinoray and is not allowed; nothing of it was imported.
        ConfigError, ModelError: the factory is not there, or refuses the options.
    """
    document = read_document(storage, uri)
    meta, num_classes = document.meta, len(document.meta.labels)
    config = trusted_network(meta.model, uri, allowed)
    shapes = read_shapes(storage, document, MODEL_FILE)
    if is_shipped(config.factory):  # the memory that its options ask for must be that of the weights in the file
        require_weights(build_outline(config, num_classes), shapes, uri)
    model = build_model(config, num_classes)
    module = cast("nn.Module", model)
    require_weights(module, shapes, uri)
    load_weights(module, read_tensors(storage, document, MODEL_FILE), uri)
    module.eval()
    return model, meta


_Found = tuple[str, CheckpointMeta]


def _scan(storage: Storage, run: str) -> tuple[list[_Found], list[CheckpointError]]:
    """Checkpoints under run/checkpoints/: the whole ones, oldest first, and what is wrong with each of the others.

    Whole: checkpoint.json is sound, and the files it names are there in their full size.
    """
    prefix = join(run, "checkpoints") + "/"
    sizes = {info.uri: info.size_bytes for info in storage.list(prefix)}
    found: list[_Found] = []
    broken: list[CheckpointError] = []
    for uri in sorted(sizes):
        folder, _, name = uri.rpartition("/")
        if name != META_FILE:
            continue
        try:
            document = read_document(storage, folder)
        except CheckpointNotFound:  # deleted meanwhile
            continue
        except CheckpointError as error:
            broken.append(error)
            continue
        cut = [file for file, entry in document.files.items() if sizes.get(join(folder, file)) != entry.size_bytes]
        if cut:
            broken.append(CheckpointCorrupt(f"{join(folder, cut[0])} is not there in its full size"))
        else:
            found.append((folder, document.meta))
    return sorted(found, key=lambda item: (item[1].epoch, item[1].step)), broken


def list_checkpoints(storage: Storage, run: str) -> list[tuple[str, CheckpointMeta]]:
    """Whole checkpoints of a run folder as (uri, meta), oldest first; none if there is no such folder.

    Broken ones are left out: `find_checkpoint` and `newest_checkpoint` say so.
    """
    return _scan(storage, run)[0]


def best_of(checkpoints: list[tuple[str, CheckpointMeta]]) -> tuple[str, CheckpointMeta]:
    """The one with the highest val_map, or else val_top1; the newest of equals, and of all if none was scored.

    The list is not empty.

    A checkpoint inside an epoch comes after all others: it was not scored, and is there to go on from.
    """
    return max(checkpoints, key=_rank)


def _rank(item: tuple[str, CheckpointMeta]) -> tuple[bool, float, int, int]:
    meta = item[1]
    score = meta.metrics.get("val_map", meta.metrics.get("val_top1", -math.inf))
    return meta.epoch_steps == 0, score, meta.epoch, meta.step


def choose_checkpoint(
    storage: Storage,
    run: str,
    order: Callable[[list[_Found]], list[_Found]],
    *,
    resumable: bool = False,
    warn: Callable[[str], object] = _LOG.warning,
) -> _Found | None:
    """The first of the run's checkpoints in `order` whose files have the digests that they should; None without any.

    Args:
        order: sorts and selects; it gets the whole ones, oldest first.
        resumable: training must be able to go on from it.
        warn: is told of each broken one that is left out.

    Raises:
        CheckpointError: some are there, but none is sound.
    """
    found, broken = _scan(storage, run)
    files = (MODEL_FILE, TRAIN_FILE) if resumable else (MODEL_FILE,)
    chosen = None
    for uri, meta in order(found):
        try:
            require_digests(storage, read_document(storage, uri), files)
        except CheckpointError as error:
            broken.append(error)
        else:
            chosen = uri, meta
            break
    if broken and chosen is None:
        more = f", and {len(broken) - 1} more are broken" if len(broken) > 1 else ""
        raise type(broken[0])(f"{run} has no sound checkpoint: {broken[0]}{more}")
    for reason in broken:
        warn(f"a broken checkpoint is left out: {reason}")
    return chosen


def newest_checkpoint(storage: Storage, run: str, warn: Callable[[str], object] = _LOG.warning) -> _Found | None:
    """Where training goes on: the newest sound checkpoint of the run. Arguments and errors as choose_checkpoint."""
    return choose_checkpoint(storage, run, lambda found: found[::-1], resumable=True, warn=warn)


def find_checkpoint(storage: Storage, uri: str, warn: Callable[[str], object] = _LOG.warning) -> str:
    """The checkpoint at uri itself, or the best (by val_map or val_top1, else the newest) of the run folder at uri.

    In a run folder broken ones are left out, and `warn` is told.

    Raises:
        CheckpointNotFound: neither is there.
        CheckpointCorrupt, CheckpointMismatch: no checkpoint of the run is sound.
    """
    if storage.exists(join(uri, META_FILE)):
        return uri
    chosen = choose_checkpoint(storage, uri, lambda found: sorted(found, key=_rank, reverse=True), warn=warn)
    if chosen is None:
        raise CheckpointNotFound(
            f"{uri} is neither a checkpoint nor a run folder with a whole checkpoint in checkpoints/"
        )
    return chosen[0]


def delete_checkpoint(storage: Storage, uri: str) -> None:
    """Delete a checkpoint; checkpoint.json goes first, so that a half-deleted one is absent, not broken."""
    for name in (META_FILE, MODEL_FILE, TRAIN_FILE):
        storage.delete(join(uri, name))
