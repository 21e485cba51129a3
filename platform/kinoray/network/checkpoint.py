"""Checkpoints: weights as safetensors, everything else as JSON; nothing here can run code when it is loaded.

A checkpoint is a folder. `checkpoint.json` is written last and names every other file with its size and sha256, so a
checkpoint is whole or absent: never write it before the files it names, never delete it after them.

    model.safetensors        weights
    train_state.safetensors  what training needs to go on (optimizer moments and more), if it was given
    checkpoint.json          CheckpointMeta, and the digests
"""

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kinoray.config.file import config_from_mapping
from kinoray.config.shared import ClipConfig, ModelConfig, digest
from kinoray.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound, ConfigError, ObjectNotFound
from kinoray.network.build import VideoModel, build_model, without_start_weights
from kinoray.storage.objects import Storage, join

__all__ = [
    "CheckpointMeta",
    "best_of",
    "delete_checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "load_meta",
    "load_model",
    "load_model_state",
    "load_train_state",
    "load_weights",
    "require_weights",
    "save_checkpoint",
]

FORMAT = 1
MODEL_FILE, TRAIN_FILE, META_FILE = "model.safetensors", "train_state.safetensors", "checkpoint.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeta:
    """What is known about a checkpoint besides its weights."""

    model: ModelConfig
    """The network; with the labels it is enough to build it again."""
    clip: ClipConfig
    """What it was fed."""
    labels: tuple[str, ...]
    """Class names, index = label_id."""
    epoch: int
    """Whole epochs trained."""
    step: int
    """Optimizer steps taken."""
    epoch_steps: int = 0
    """Those of them that belong to the epoch after `epoch`; above 0 the checkpoint is one inside that epoch."""
    samples: int
    """Videos trained on, counted over all epochs; unreadable ones not counted."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the last epoch; val_top1 decides which checkpoint is best."""
    catalog_digest: str = ""
    """Catalog that it was trained on."""
    run_digest: str = ""
    """Settings that a resumed run must share."""
    model_digest: str = ""
    """Names the weights and the network; save_checkpoint fills it in."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(storage: Storage, uri: str, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
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
    model_state: Mapping[str, Tensor],
    meta: CheckpointMeta,
    train_state: Mapping[str, Tensor] | None = None,
) -> CheckpointMeta:
    """Write a checkpoint under uri and return its meta with model_digest filled in.

    A whole checkpoint that is at uri already is replaced; in between there is none, never a mixture.
    """
    storage.delete(join(uri, META_FILE))
    with tempfile.TemporaryDirectory(prefix="kinoray-") as folder:
        files = {MODEL_FILE: _write_tensors(storage, join(uri, MODEL_FILE), model_state, Path(folder))}
        if train_state is not None:
            files[TRAIN_FILE] = _write_tensors(storage, join(uri, TRAIN_FILE), train_state, Path(folder))
    name = digest([files[MODEL_FILE]["sha256"], dataclasses.asdict(meta.model)])
    saved = dataclasses.replace(meta, model_digest=name)
    body = {"format": FORMAT, "files": files, "meta": dataclasses.asdict(saved)}
    text = json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True)
    storage.put(join(uri, META_FILE), text.encode())
    return saved


def _read_document(storage: Storage, uri: str) -> dict[str, Any]:
    """The JSON of the checkpoint at uri, its own digest checked."""
    where = join(uri, META_FILE)
    try:
        data = storage.read(where)
    except ObjectNotFound as error:
        raise CheckpointNotFound(f"{uri} is not a checkpoint: {META_FILE} is not there") from error
    try:
        document = json.loads(data)
        body = {name: document[name] for name in ("format", "files", "meta")}
        found, expected = digest(body), document["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{where} cannot be read ({error}); take another checkpoint of the run") from error
    if found != expected:
        raise CheckpointCorrupt(
            f"{where} was changed after it was written: digest {found}, expected {expected}; take another checkpoint"
        )
    if body["format"] != FORMAT:
        raise CheckpointMismatch(f"{where} has format {body['format']}, this version reads {FORMAT}; upgrade kinoray")
    return body


def _meta_of(document: Mapping[str, Any], uri: str) -> CheckpointMeta:
    try:
        return config_from_mapping(CheckpointMeta, document["meta"])
    except ConfigError as error:
        raise CheckpointMismatch(
            f"{join(uri, META_FILE)} was written by another version of kinoray: {error}"
        ) from error


def load_meta(storage: Storage, uri: str) -> CheckpointMeta:
    """What the checkpoint at uri says about itself.

    Raises:
        CheckpointNotFound: there is no checkpoint.json.
        CheckpointCorrupt: it was damaged.
        CheckpointMismatch: another version of kinoray wrote it.
    """
    return _meta_of(_read_document(storage, uri), uri)


def _load_tensors(storage: Storage, uri: str, name: str) -> dict[str, Tensor]:
    entry = _read_document(storage, uri)["files"].get(name)
    where = join(uri, name)
    if entry is None:
        raise CheckpointNotFound(f"{uri} was saved without {name}, so training cannot go on from it")
    try:
        data = storage.read(where)
    except ObjectNotFound as error:
        raise CheckpointCorrupt(f"{where} is gone, but {META_FILE} names it; take another checkpoint") from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise CheckpointCorrupt(
            f"{where} does not match its digest: {len(data)} bytes, sha256 {found[:16]}..., expected "
            f"{entry['size_bytes']} bytes, sha256 {entry['sha256'][:16]}...; take another checkpoint of the run"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {error}") from error


def load_model_state(storage: Storage, uri: str) -> dict[str, Tensor]:
    """The weights, on the CPU. Raises CheckpointNotFound, CheckpointCorrupt."""
    return _load_tensors(storage, uri, MODEL_FILE)


def load_train_state(storage: Storage, uri: str) -> dict[str, Tensor]:
    """What was saved as train_state, on the CPU.

    Raises:
        CheckpointNotFound: no checkpoint, or one that was saved without it.
        CheckpointCorrupt: it was damaged.
    """
    return _load_tensors(storage, uri, TRAIN_FILE)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy the weights into the module, all of them or none. Raises as require_weights."""
    require_weights(module, state, what)
    module.load_state_dict(dict(state))


def require_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
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
        if name in state and state[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise CheckpointMismatch(f"{what} does not fit the model: {'; '.join(problems)}")


def load_model(storage: Storage, uri: str) -> tuple[VideoModel, CheckpointMeta]:
    """Build the network that the checkpoint names, with its weights, in eval mode on the CPU.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: as load_model_state.
        CheckpointMismatch: the weights are not those of the network that the factory builds now.
        ConfigError, ModelError: the factory is not there, or refuses the options.
    """
    meta = load_meta(storage, uri)
    model = build_model(without_start_weights(meta.model), len(meta.labels))
    module = cast(nn.Module, model)
    load_weights(module, load_model_state(storage, uri), uri)
    module.eval()
    return model, meta


def _whole(storage: Storage, run: str) -> Iterator[str]:
    """Uris of the folders under run/checkpoints/ whose checkpoint.json and all files it names are there, in full."""
    prefix = join(run, "checkpoints") + "/"
    sizes = {info.uri: info.size_bytes for info in storage.list(prefix)}
    for uri in sorted(sizes):
        folder, _, name = uri.rpartition("/")
        if name != META_FILE:
            continue
        files = _read_document(storage, folder)["files"]
        if all(sizes.get(f"{folder}/{file}") == entry["size_bytes"] for file, entry in files.items()):
            yield folder


def list_checkpoints(storage: Storage, run: str) -> list[tuple[str, CheckpointMeta]]:
    """Whole checkpoints of a run folder as (uri, meta), oldest first; none if there is no such folder.

    Raises:
        CheckpointCorrupt, CheckpointMismatch: a checkpoint.json cannot be read.
    """
    found = [(uri, load_meta(storage, uri)) for uri in _whole(storage, run)]
    return sorted(found, key=lambda item: (item[1].epoch, item[1].step))


def best_of(checkpoints: list[tuple[str, CheckpointMeta]]) -> tuple[str, CheckpointMeta]:
    """The one with the highest val_top1; the newest of equals, and of all if none was scored. The list is not empty.

    A checkpoint inside an epoch comes after all others: it was not scored, and is there to go on from.
    """

    def rank(item: tuple[str, CheckpointMeta]) -> tuple[bool, float, int, int]:
        meta = item[1]
        return meta.epoch_steps == 0, meta.metrics.get("val_top1", -math.inf), meta.epoch, meta.step

    return max(checkpoints, key=rank)


def find_checkpoint(storage: Storage, uri: str) -> str:
    """The checkpoint at uri itself, or the best (by val_top1, else the newest) of the run folder at uri.

    Raises:
        CheckpointNotFound: neither is there.
        CheckpointCorrupt, CheckpointMismatch: a checkpoint.json cannot be read.
    """
    if storage.exists(join(uri, META_FILE)):
        return uri
    if found := list_checkpoints(storage, uri):
        return best_of(found)[0]
    raise CheckpointNotFound(f"{uri} is neither a checkpoint nor a run folder with a whole checkpoint in checkpoints/")


def delete_checkpoint(storage: Storage, uri: str) -> None:
    """Delete a checkpoint; checkpoint.json goes first, so that a half-deleted one is absent, not broken."""
    for name in (META_FILE, MODEL_FILE, TRAIN_FILE):
        storage.delete(join(uri, name))
