"""Published weights as ordinary checkpoints: read, checked against the network that ships, written, and kept.

`--checkpoint SOURCE` is resolved once, by the driver, into a folder of the user's cache; from then on it is a
checkpoint as any other. What is easy to break: that folder appears whole, under a name that says what it was made of,
so two processes may make it at once, and none finds a half.
"""

import json
import os
import shutil
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kinoray.catalog.source import decode_text, text_lines
from kinoray.config.files import read_file, translated
from kinoray.config.shared import ModelConfig, WorkersConfig, digest
from kinoray.errors import (
    CatalogError,
    CheckpointMismatch,
    ConfigError,
    KinorayError,
    ModelError,
    StorageError,
    StorageUnavailable,
)
from kinoray.network import InputSpec, PublishedNetwork, Words, WordsError
from kinoray.network.build import (
    build_outline,
    clip_for,
    is_shipped,
    require_known_model,
    source_reader,
    text_reader,
    trusted_network,
)
from kinoray.network.checkpoint import (
    META_FILE,
    CheckpointMeta,
    Origin,
    find_checkpoint,
    load_meta,
    require_weights,
    save_checkpoint,
)
from kinoray.network.checkpoint_files import MAX_CLASSES, MAX_LABEL
from kinoray.network.resolve import Source, parse_source
from kinoray.storage.leftovers import Claim, scratch_folder, sweep
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cache_folder", "checkpoint_of", "embed_text", "import_source", "read_lines", "words_of"]

_IMPORT_FORMAT = 1  # of what is made of a source: another one makes the cache's folders anew
_NO_MODEL = ModelConfig(factory="")
_MAX_LINES_BYTES = 2**24


def checkpoint_of(
    text: str,
    option: str,
    say: Callable[[str], object],
    *,
    resources: WorkersConfig | None = None,
    model: ModelConfig = _NO_MODEL,
    classes: str = "",
    prompts: Sequence[str] = (),
) -> str:
    """The uri of the checkpoint (or run folder) that the text names; a published network is imported, once a user.

    Args:
        option: the setting's name, for messages.
        say: is told what is fetched, and where it lies.
        resources: of the job that will read it: a cluster may not see this machine's folders.
        model: network of a file of weights.
        classes, prompts: as for words_of.

    Raises:
        CheckpointNotFound, ConfigError: as parse_source, words_of.
        KinorayError: as import_source.
    """
    source = parse_source(text, option)
    words = words_of(source, classes, prompts)
    if source.kind == "checkpoint":
        return absolute(source.name)
    folder = cache_folder() / f"{source.short}-{_key(source, model, words)}"
    if (folder / META_FILE).is_file():
        say(f"{source} was imported before: {folder}")
    else:
        say(f"importing {source}")
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        sweep(folder.parent.glob(".*"))
        try:
            claim = _claim(aside)
            import_source(Storage(), source, str(aside), model=model, words=words, any_names=option == "init_from")
            claim.release()
            _put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        say(f"imported {source}: {folder}")
    if resources and (resources.address or os.environ.get("RAY_ADDRESS")):
        say(
            f"{folder} is a folder of this machine; on a cluster whose nodes do not see it the job fails: kinoray "
            f"import {text}{' --classes FILE' if words else ''} --out s3://BUCKET/NAME, and "
            f"--{option.replace('_', '-')} s3://BUCKET/NAME"
        )
    return str(folder)


def cache_folder() -> Path:
    """Where imported networks are kept: kinoray/networks in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kinoray" / "networks"


def _key(source: Source, model: ModelConfig, words: Words | None) -> str:
    """16 hex digits of what decides the checkpoint, as far as it is known before anything is read."""
    found: list[Any] = [_IMPORT_FORMAT, str(source), asdict(model), *([asdict(words)] if words else [])]
    path = Path(source.name)
    try:
        if source.kind in ("hf", "file") and path.exists():
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found.extend([file.name, *_state(file)] for file in files)
    except OSError as error:
        raise StorageUnavailable(f"{source} cannot be read: {error}") from error
    return digest(found)


def _state(file: Path) -> tuple[int, int]:
    """Size and time of a file; of a link that leads nowhere its own: whoever needs it says so."""
    try:
        about = file.stat()
    except OSError:
        about = file.lstat()
    return about.st_size, about.st_mtime_ns


def _claim(aside: Path) -> Claim:
    """Make a folder that a later import removes if this process is killed."""
    try:
        aside.mkdir(parents=True)
        return Claim(aside)
    except OSError as error:
        raise ConfigError(f"{aside.parent} cannot be written: {error}; give another XDG_CACHE_HOME") from error


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename a finished folder; where another process was faster, its folder stays."""
    try:
        aside.rename(folder)
    except OSError as error:
        if not (folder / META_FILE).is_file():
            raise ConfigError(
                f"{folder} cannot be put in place: {error}; delete what is there, or give another XDG_CACHE_HOME"
            ) from error


def import_source(
    storage: Storage,
    source: Source,
    out: str,
    *,
    model: ModelConfig = _NO_MODEL,
    labels: Sequence[str] = (),
    words: Words | None = None,
    any_names: bool = False,
) -> tuple[CheckpointMeta, tuple[str, ...]]:
    """Read a published network and write it to `out` as a checkpoint; what it says of itself, and notes for the user.

    Args:
        model: network of a file of weights.
        labels: class names, in place of the source's own.
        words: the classes of a network that compares pictures with texts.
        any_names: invent names where nothing says them, for weights that are trained on with other classes.

    Raises:
        ConfigError: a file's network is not named or does not ship, or the class names do not fit.
        StorageUnavailable: it cannot be fetched.
        CheckpointMismatch: the weights are not those of the network.
        ModelError: what was read is not what it should be, or a package is missing.
    """
    found, config = _read(source, model, words)
    num_classes = _num_classes(found.state, config, str(source))
    names = tuple(labels) or (found.class_names if len(found.class_names) == num_classes else ())
    if not names and any_names:
        names = tuple(f"class {number}" for number in range(num_classes))
    _require_names(names, num_classes, str(source), is_given=bool(labels))
    outline = build_outline(config, num_classes)
    require_weights(outline, found.state, str(source))
    spec = getattr(outline, "input_spec", InputSpec())
    origin = Origin(
        source=found.source,
        sha256=found.sha256,
        licence=found.licence,
        top1=found.top1,
        top5=found.top5,
        recipe=found.recipe,
        library=found.library,
        fed=_plain(
            {"recipe": asdict(spec.recipe), "rgb_mean": spec.rgb_mean, "rgb_std": spec.rgb_std}
            | ({"prompts": dict(found.prompts)} if found.prompts else {})
        ),
    )
    clip = clip_for(spec)
    meta = CheckpointMeta(model=config, clip=clip, labels=names, epoch=0, step=0, samples=0, origin=origin)
    try:
        _plain(asdict(meta))
    except ValueError as error:
        raise ModelError(f"{source}: a checkpoint of it could not be read again: {error}") from error
    begun = join(out, "import.json")  # where this was killed, the same import goes on
    storage.put(begun, json.dumps({"source": str(source)}).encode())
    saved = save_checkpoint(storage, out, model_state=found.state, meta=meta)
    storage.delete(begun)
    return saved, found.notes


def _read(source: Source, model: ModelConfig, words: Words | None) -> tuple[PublishedNetwork, ModelConfig]:
    """The weights, and the network that they are of, as a checkpoint may name it."""
    reader = source_reader(source.kind)
    with _read_errors(source, "classes"):
        if source.kind == "file":
            _require_network(source, model)
            found = reader(source.name, model.factory)
            return found, trusted_network(model, str(source), ())
        if source.kind == "i3d":
            with scratch_folder("i3d") as folder:
                found = reader(folder)
        else:
            found = reader(source.name, source.variant, *([words] if words else []))
        config = ModelConfig(factory=found.factory, options=_plain(found.options))
    return found, trusted_network(config, str(source), ())


@contextmanager
def _read_errors(source: Source, words_option: str) -> Iterator[None]:
    """What readers of published networks raise, as errors that name the source, or the setting with the words."""
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(f"{source} cannot be fetched: {error}") from error
    except ConfigError:
        raise
    except WordsError as error:
        raise ConfigError(f"{words_option}: {error}") from error
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{source} holds what no network has: {reason}") from error


def read_lines(path: str, option: str) -> list[str]:
    """The lines of a text file that are not empty. Raises ConfigError."""
    try:
        with translated(path):
            text = decode_text(path, read_file(path, _MAX_LINES_BYTES))
    except (StorageError, CatalogError) as error:
        raise ConfigError(f"{option}: {error}") from error
    return [line.strip() for line in text_lines(text) if line.strip()]


def words_of(source: Source, path: str, prompts: Sequence[str]) -> Words | None:
    """The classes that a file names, one a line, as `name` or `name: text`; None without a file.

    Args:
        source: of the network that is to know them.
        prompts: sentences with {} for the name.

    Raises:
        ConfigError: the file names no class, or one twice; the source or a prompt is not one for it.
    """
    if not path:
        if prompts:
            raise ConfigError("prompts must be left out without classes, whose names stand in them")
        return None
    if source.kind != "hf":
        raise ConfigError(
            f"classes must be left out with {source}, which has classes of its own; networks that take them in words "
            "are hf:FOLDER or hf:OWNER/NAME of a CLIP, SigLIP or X-CLIP"
        )
    for prompt in prompts:
        if "{}" not in prompt:
            raise ConfigError(f"prompts must each have {{}} where the name of a class stands, got {prompt!r:.200}")
    said: dict[str, str] = {}
    for line in read_lines(path, "classes"):
        name, _, text = (part.strip() for part in unicodedata.normalize("NFC", line).partition(": "))
        if line.endswith(":") or not name:
            raise ConfigError(
                f"classes: {path} says nothing of {name!r:.200}: write `name`, or `name: text` in one line"
            )
        if name in said:
            raise ConfigError(f"classes: {path} names {name!r:.200} twice; names of classes must differ")
        said[name] = text
    if not said:
        raise ConfigError(f"classes: {path} names no class; it must have one a line, as `name` or `name: text`")
    return Words(names=tuple(said), texts=tuple(said.values()), prompts=tuple(prompts))


def embed_text(
    storage: Storage, checkpoint: str, text: str, *, labelled_by: tuple[str, str] | None = None
) -> np.ndarray:
    """The unit vector of a text, float32 [D], in the space of the embeddings that a network of words stores.

    Args:
        checkpoint: hf:..., or a checkpoint or run folder that came from there. Then its text tower is read where it was
            imported from, if that is a folder or in the hub's cache: a checkpoint, which may be a stranger's, lets no
            hub be asked.
        labelled_by: checkpoint and model_digest of the network whose embeddings are looked at. Of an hf:... the weights
            are compared, where that checkpoint can still be read.

    Raises:
        ConfigError: it is of no network that compares pictures with texts, or of another one than labelled_by; or the
            text is too long for it.
        CheckpointMismatch: what is there now is not what the checkpoint was imported from.
        KinorayError: as import_source.
    """
    source, expected = parse_source(checkpoint, "checkpoint"), None
    is_own = source.kind == "checkpoint"
    if is_own:
        meta = load_meta(storage, find_checkpoint(storage, absolute(source.name)))
        is_of_words = meta.model.factory.rpartition(":")[2] == "image_text" and is_shipped(meta.model.factory)
        if not (is_of_words and meta.origin):
            raise ConfigError(
                f"checkpoint: {checkpoint} is of {meta.model.factory:.200}, which does not compare pictures with "
                "texts; a text is looked for among embeddings of a CLIP, SigLIP or X-CLIP (label --classes FILE)"
            )
        if labelled_by and meta.model_digest != labelled_by[1]:
            raise ConfigError(
                f"checkpoint: {checkpoint} is not the network that labelled these videos ({meta.model_digest}, "
                f"expected {labelled_by[1]}); name it with --checkpoint"
            )
        source, expected = parse_source(meta.origin.source, "checkpoint"), meta.origin.sha256
    elif labelled_by and labelled_by[0]:
        checkpoint = labelled_by[0]
        with suppress(KinorayError):  # it is gone: then the length of the vector has to do
            origin = load_meta(storage, checkpoint).origin
            expected = origin.sha256 if origin else None
    if source.kind != "hf":
        raise ConfigError(f"checkpoint: {source} has no text tower; hf:FOLDER or hf:OWNER/NAME of a CLIP has one")
    with _read_errors(source, "text"):
        vector, sha256 = text_reader()(source.name, source.variant, text, ask_hub=not is_own)
    if expected not in (None, sha256):
        raise CheckpointMismatch(
            f"{source} is not what {checkpoint} was imported from: its weights have sha256 {sha256[:16]}..., expected "
            f"{str(expected)[:16]}...; name the right one, as hf:FOLDER"
        )
    return np.asarray(vector, np.float32)


def _require_network(source: Source, model: ModelConfig) -> None:
    if not model.factory:
        raise ConfigError(
            f"model.factory must be given for {source}: a file of weights does not say which network it is of "
            "(such as --model.factory r3d_18; `kinoray import` lists them)"
        )
    if not is_shipped(model.factory):
        raise ConfigError(f"model.factory must be a network that ships with kinoray, got {model.factory!r}")
    require_known_model(model)


def _num_classes(state: "Mapping[str, Tensor]", model: ModelConfig, where: str) -> int:
    """How many classes the weights know: the size that only the number of classes decides."""
    few, more = (build_outline(model, number).state_dict() for number in (2, 3))
    for name, tensor in few.items():
        for axis, (size, other) in enumerate(zip(tensor.shape, more[name].shape, strict=True)):
            if size == other:
                continue
            if name in state and state[name].ndim == tensor.ndim:
                return int(state[name].shape[axis] * 2 // size)
            raise CheckpointMismatch(f"{where} does not fit {model.factory}: {name} is missing, or of another shape")
    raise ModelError(f"{model.factory}: no weight's shape follows from the number of classes")


def _require_names(names: Sequence[str], num_classes: int, where: str, *, is_given: bool) -> None:
    if len(names) != num_classes:
        found = f"got {len(names)}" if is_given else "nothing says them"
        raise ConfigError(
            f"labels must be a text file of {num_classes} lines, one class each in the order of the network's logits, "
            f"since {where} has so many classes; {found}"
        )
    if len(set(names)) != len(names) or not all(names):
        twice = next(name for name in names if not name or names.count(name) > 1)
        raise ConfigError(f"labels: class names of {where} must differ and not be empty, got {twice!r:.100} twice")
    if len(names) > MAX_CLASSES or max(map(len, names), default=0) > MAX_LABEL:
        raise ConfigError(
            f"labels: {where} must have at most {MAX_CLASSES:,} classes with names of {MAX_LABEL:,} characters, got "
            f"{len(names):,} with names of up to {max(map(len, names)):,}"
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return parse_json(json.dumps(value))
