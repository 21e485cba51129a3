"""The files of a checkpoint, read as data of a stranger: every type, size and digest is compared before it is used.

torch is imported where tensors are read, since who asks only what a checkpoint says of itself need not wait for it.
What is easy to break: sizes come before reading, and the header of a safetensors file before its tensors, so that none
is read or hashed that is not one, and none takes more memory than it has bytes (of which holes are none: config.files).
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import tyro
from safetensors import SafetensorError

from kinoray.config.file import config_from_mapping
from kinoray.config.scoring import ScoreKind
from kinoray.config.shared import ClipConfig, ModelConfig, digest
from kinoray.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    ChecksumMismatch,
    ConfigError,
    ObjectNotFound,
    ObjectTooLarge,
)
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import parse_record

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FORMAT",
    "MAX_CLASSES",
    "MAX_LABEL",
    "META_FILE",
    "MODEL_FILE",
    "TRAIN_FILE",
    "CheckpointMeta",
    "Document",
    "Origin",
    "Shaped",
    "model_digest",
    "read_document",
    "read_shapes",
    "read_tensors",
    "require_digests",
]

FORMAT = 1
MAX_CLASSES = 2**20
"""Classes of a checkpoint at most."""
MAX_LABEL = 2**12
"""Characters of a class name at most."""
MODEL_FILE, TRAIN_FILE, META_FILE = "model.safetensors", "train_state.safetensors", "checkpoint.json"

_MAX_META_BYTES = 2**26
_MAX_HEADER_BYTES = 2**24  # names and shapes of 100,000 tensors
_LARGEST_ITEM = 16  # bytes of a complex128
_CHUNK = 2**26

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where weights come from that were not trained here; as `kinoray import` found it."""

    source: str = ""
    """What was imported: the weight set, the repository and its commit, or the file."""
    sha256: str = ""
    """Digest of the files that were read."""
    licence: str = ""
    """Licence of the weights, in the source's words; empty where it names none."""
    top1: float | None = None
    """Published accuracy in percent, by the network's own protocol."""
    top5: float | None = None
    """The same within five answers."""
    recipe: str = ""
    """Where its training is described."""
    library: str = ""
    """Package and version that it was read with."""
    fed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How its publishers fed it: ClipRecipe, mean and deviation."""


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
    """Metrics of the last epoch; val_map, or else val_top1, decides which checkpoint is best."""
    scores: ScoreKind = "softmax"
    """What it was trained for: sigmoid where a video may have several classes."""
    catalog_digest: str = ""
    """Catalog that it was trained on."""
    run_digest: str = ""
    """Settings that a resumed run must share."""
    model_digest: str = ""
    """Names the weights and the network; save_checkpoint fills it in."""
    origin: Origin | None = None
    """Of imported weights; None for those that were trained here, wherever they started from."""


class Shaped(Protocol):
    """A tensor, or what is known of one that was not read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """What checkpoint.json says of a file."""

    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """What a sound checkpoint.json holds."""

    uri: str
    """The checkpoint."""
    files: dict[str, _Entry]
    meta: CheckpointMeta

    def file(self, name: str) -> tuple[str, _Entry]:
        """Where a file of the checkpoint is, and what it must be. Raises CheckpointNotFound."""
        if name not in self.files:
            raise CheckpointNotFound(f"{self.uri} was saved without {name}, so training cannot go on from it")
        return join(self.uri, name), self.files[name]


def model_digest(weights_sha256: str, model: ModelConfig) -> str:
    """What names a model: 16 hex digits of its weights and its network."""
    return digest([weights_sha256, dataclasses.asdict(model)])


def read_document(storage: Storage, uri: str) -> Document:
    """The JSON of the checkpoint at uri, checked as far as it can be without the files that it names.

    Raises:
        CheckpointNotFound: there is no checkpoint.json.
        CheckpointCorrupt: it was damaged.
        CheckpointMismatch: another version of kinoray wrote it.
    """
    where = join(uri, META_FILE)
    try:
        with _sized():
            data = storage.read(where, max_bytes=_MAX_META_BYTES)
    except ObjectNotFound as error:
        raise CheckpointNotFound(f"{uri} is not a checkpoint: {META_FILE} is not there") from error
    files, content = _parsed(data, where, lambda document: _body(document, where))
    meta = _meta_of(content, where)
    if meta.model_digest != model_digest(files[MODEL_FILE].sha256, meta.model):
        raise CheckpointCorrupt(
            f"{where} calls its model {meta.model_digest[:100]!r}, which is not what its weights and network are "
            "called; take another checkpoint"
        )
    return Document(uri, files, meta)


@contextmanager
def _sized() -> Iterator[None]:
    """A file that is too large, or of holes, as CheckpointCorrupt."""
    try:
        yield
    except ObjectTooLarge as error:
        raise CheckpointCorrupt(f"{error}, or take another checkpoint of the run") from error


def _parsed(data: bytes, where: str, make: Callable[[dict[str, Any]], T]) -> T:
    """`parse_record` of a checkpoint's file. Raises CheckpointCorrupt."""
    try:
        return parse_record(data, where, make)
    except ChecksumMismatch as error:
        raise CheckpointCorrupt(f"{error}, or take another checkpoint of the run") from error
    except RecursionError as error:
        raise CheckpointCorrupt(f"{where} is nested too deeply; take another checkpoint of the run") from error


def _body(document: dict[str, Any], where: str) -> tuple[dict[str, _Entry], Any]:
    """The files that it names, and its meta as it stands."""
    body = {name: document[name] for name in ("format", "files", "meta")}
    found, expected = digest(body), document["digest"]
    if found != expected:
        raise CheckpointCorrupt(
            f"{where} was changed after it was written: digest {found}, expected {str(expected)[:100]}; take another "
            "checkpoint"
        )
    if body["format"] != FORMAT:
        found = str(body["format"])[:100]
        raise CheckpointMismatch(f"{where} has format {found}, this version reads {FORMAT}; upgrade kinoray")
    files = {name: _entry(name, about) for name, about in body["files"].items()}
    if MODEL_FILE not in files:
        raise ValueError(f"{MODEL_FILE} is not among its files")
    return files, body["meta"]


def _entry(name: str, about: dict[str, Any]) -> _Entry:
    if name not in (MODEL_FILE, TRAIN_FILE):
        raise ValueError(f"files must be {MODEL_FILE} and {TRAIN_FILE}, found {name[:100]!r}")
    size_bytes, sha256 = about["size_bytes"], about["sha256"]
    if type(size_bytes) is not int or size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{name} must have a size and a sha256, found {str(about)[:100]}")
    return _Entry(size_bytes, sha256)


def _meta_of(content: Any, where: str) -> CheckpointMeta:
    """CheckpointMeta out of JSON; every value has its type. Raises CheckpointMismatch."""
    try:
        if not isinstance(content, dict):
            raise ConfigError(f"meta must be a mapping, got {str(content)[:100]}")
        meta = config_from_mapping(CheckpointMeta, content)
        for field in dataclasses.fields(meta):
            if getattr(meta, field.name) is tyro.MISSING:
                raise ConfigError(f"{field.name} is not there")
        for name in ("epoch", "step", "epoch_steps", "samples"):
            if not 0 <= getattr(meta, name) < 2**53:
                raise ConfigError(f"{name} must be a count, got {str(getattr(meta, name))[:100]}")
        for name, value in meta.metrics.items():
            if type(value) not in (int, float) or math.isnan(value):
                raise ConfigError(f"metrics.{name[:100]} must be a number, got {str(value)[:100]}")
        if not 1 <= len(meta.labels) <= MAX_CLASSES or max(map(len, meta.labels)) > MAX_LABEL:
            raise ConfigError(
                f"labels must name 1 .. {MAX_CLASSES:,} classes of at most {MAX_LABEL:,} characters, got "
                f"{len(meta.labels):,}"
            )
    except (ConfigError, OverflowError) as error:
        text = f"{where} was written by another version of kinoray: {str(error)[:1000]}"
        raise CheckpointMismatch(text) from error
    return meta


def _require_size(storage: Storage, where: str, entry: _Entry) -> None:
    """Refuse a file that is gone, or has another size than it should, before it is read."""
    try:
        found = storage.stat(where).size_bytes
    except ObjectNotFound as error:
        raise CheckpointCorrupt(f"{where} is gone, but {META_FILE} names it; take another checkpoint") from error
    if found != entry.size_bytes:
        raise CheckpointCorrupt(
            f"{where} has {found:,} bytes, expected {entry.size_bytes:,}; take another checkpoint of the run"
        )


def _require_sha256(found: str, where: str, entry: _Entry) -> None:
    if found != entry.sha256:
        raise CheckpointCorrupt(
            f"{where} does not match its digest: {entry.size_bytes} bytes with sha256 {found[:16]}..., expected "
            f"{entry.sha256[:16]}...; take another checkpoint of the run"
        )


def require_digests(storage: Storage, document: Document, names: Iterable[str]) -> None:
    """Read these files of a checkpoint, without keeping them, and compare what was written with what is there.

    Raises:
        CheckpointNotFound: it was saved without one of them.
        CheckpointCorrupt: one is gone, or was damaged.
    """
    for name in names:
        read_shapes(storage, document, name)  # before it is hashed
        where, entry = document.file(name)
        found = hashlib.sha256()
        for offset in range(0, entry.size_bytes, _CHUNK):
            found.update(storage.read_range(where, offset, min(_CHUNK, entry.size_bytes - offset)))
        _require_sha256(found.hexdigest(), where, entry)


def read_shapes(storage: Storage, document: Document, name: str) -> dict[str, Shaped]:
    """Names and shapes of the tensors in a file of the checkpoint, from its header alone.

    The file is then no larger than these tensors take, whatever their type: neither is what reading it takes.

    Raises:
        CheckpointNotFound: it was saved without.
        CheckpointCorrupt: the file is gone, of another size, or no safetensors file.
    """
    where, entry = document.file(name)
    _require_size(storage, where, entry)
    if entry.size_bytes < 8:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: it has {entry.size_bytes} bytes")
    with _sized():
        num_bytes = int.from_bytes(storage.read_range(where, 0, 8), "little")
    left = entry.size_bytes - 8 - num_bytes
    if left < 0 or num_bytes > _MAX_HEADER_BYTES:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: its header would have {num_bytes:,} bytes")
    shapes = _parsed(storage.read_range(where, 8, num_bytes), where, _header)
    items = sum(math.prod(one.shape) for one in shapes.values())
    if left > items * _LARGEST_ITEM:
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {left:,} bytes for {items:,} numbers")
    return shapes


def _header(header: dict[str, Any]) -> dict[str, Shaped]:
    shapes: dict[str, Shaped] = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(about["shape"])
        if len(shape) > 16 or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise ValueError(f"the shape of {name[:100]!r} is {str(shape)[:100]}")
        shapes[name] = _Shape(shape)
    return shapes


def read_tensors(storage: Storage, document: Document, name: str) -> "dict[str, Tensor]":
    """The tensors in a file of the checkpoint, on the CPU, its digest compared. Raises as read_shapes."""
    import safetensors.torch

    read_shapes(storage, document, name)
    where, entry = document.file(name)
    with _sized():
        data = storage.read(where, max_bytes=entry.size_bytes)
    _require_sha256(hashlib.sha256(data).hexdigest(), where, entry)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that torch does not have
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointCorrupt(f"{where} is not a safetensors file: {reason}") from error
