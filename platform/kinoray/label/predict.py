"""Answers at once: a network and its settings in this process, without Ray, and with nothing written.

The row of a video is the job's, made by the same code (`LabelVideos`) with the same number of threads, so that on a CPU
a score is the same digit for digit. What is easy to break: this runs inside somebody's program. It prints nothing,
leaves torch's settings as they were, and an unreadable video is an answer, not an exception that loses the others.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
import pyarrow as pa
import torch

from kinoray.catalog.folders import VIDEO_EXTENSIONS, extension
from kinoray.catalog.table import CATALOG_SCHEMA, catalog_of_source
from kinoray.config.files import local_path, local_uri
from kinoray.label.config import LabelConfig
from kinoray.label.open import Say, as_in, open_network
from kinoray.label.stage import LabelVideos, Outcome, look_at
from kinoray.label.times import StageClock
from kinoray.label.unit import JobRecord
from kinoray.label.work import UNIT_COLUMNS
from kinoray.network.checkpoint import load_model
from kinoray.storage.objects import Storage, absolute, is_s3

__all__ = ["Model", "Prediction", "is_one_video"]

_LOG = logging.getLogger("kinoray")
_ROWS = pa.schema([CATALOG_SCHEMA.field(name) for name in UNIT_COLUMNS])


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Prediction:
    """What a network says of one video, or why it could not be read."""

    uri: str
    """Where the video lies."""
    status: Literal["labelled", "quarantined"]
    label: str | None
    """The likeliest class; None for a quarantined video, and where no class reaches the threshold of sigmoid scores."""
    score: float | None
    """Of the label."""
    top: tuple[tuple[str, float], ...]
    """The likeliest classes with their scores, the first one first."""
    abstained: bool
    """Whether the score, or its lead, is below what the settings ask for."""
    error_class: str | None
    """Of a quarantined video: the name of an error of kinoray.errors."""
    error_text: str | None
    """And the reason."""
    duration_s: float | None
    """Of the whole video; None where it could not be opened."""
    views: int
    """Clips of it that the network saw."""
    frames_decoded: int
    frames_corrupt: int
    """Frames that would not decode."""
    frames_missing: int
    """Frames that the file's header promises, and that are not in it: it was cut short."""
    embedding: np.ndarray | None = field(default=None, compare=False)
    """float16 [D], with the setting embeddings: what goes into the network's classifiers."""

    def __repr__(self) -> str:
        if self.status == "quarantined":
            return f"Prediction({self.uri!r}: quarantined, {self.error_class})"
        return f"Prediction({self.uri!r}: {self.label!r} {self.score or 0.0:.3f})"


class Model:
    """A network that answers in this process; made by `kinoray.load`.

    Its decoders are child processes. They end with `close`, with a `with` block, and with this process; a prediction
    after `close` starts new ones. Threads may share it: they take turns.

    Args:
        seen_as_in: the record of a labelling: embeddings are those that its table would have, whatever `config` says of
            clips and views.
    """

    def __init__(
        self,
        config: LabelConfig,
        *,
        seen_as_in: JobRecord | None = None,
        say: Say = _LOG.info,
        warn: Say = _LOG.warning,
    ) -> None:
        opened = open_network(config, say=say, warn=warn)
        job = as_in(opened.job, seen_as_in) if seen_as_in else opened.job
        network = load_model(job.storage, job.checkpoint, job.allow_factory)
        self.config = config
        self.checkpoint = job.checkpoint
        """The checkpoint: of a run folder its best."""
        self.labels = opened.meta.labels
        """The names of its classes."""
        self._warn = warn
        self._job = job
        self._lock = threading.Lock()
        self._videos = LabelVideos(job, StageClock(), network)
        for line in look_at(*network, job).advice:
            warn(line)

    def __repr__(self) -> str:
        return f"Model({self.checkpoint!r}, {len(self.labels)} classes)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End its decoder processes."""
        with self._lock:
            self._videos.close()

    @overload
    def predict(self, videos: str | os.PathLike[str]) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, videos: Iterable[str | os.PathLike[str]]) -> list[Prediction]: ...
    def predict(self, videos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Any:
        """One answer for a path or s3:// address, a list of them, in order, for several.

        A folder, a prefix, a catalog or a list (.csv) stands for its videos: in a list of paths, or by itself, which
        gives a list, too (for type checkers, put it into a list).

        Raises:
            CatalogError, ObjectNotFound: a folder holds no video, or a list cannot be read.
            StorageUnavailable: the store is down.
            ModelError: the network fails.
        """
        alone = isinstance(videos, str | os.PathLike)
        paths = [videos] if isinstance(videos, str | os.PathLike) else list(videos)
        uris = [absolute(os.fspath(path)) for path in paths]
        alone = alone and is_one_video(self._job.storage, uris[0])
        tables = [self._rows(uri) for uri in uris]
        found = self._predict(pa.concat_tables([_ROWS.empty_table(), *tables]).combine_chunks())
        return found[0] if alone else found

    def _rows(self, uri: str) -> pa.Table:
        """The videos of an address, as a worker of a job gets them."""
        if is_one_video(self._job.storage, uri):
            row = {"video_id": uri, "uri": local_uri(uri)}
            return pa.Table.from_pylist([row], schema=_ROWS)
        return catalog_of_source(self._job.storage, uri, say=self._warn).table.select(_ROWS.names)

    def _predict(self, rows: pa.Table) -> list[Prediction]:
        with self._lock, _threads(self._job.torch_threads):
            outcomes = self._videos.label(rows)
            table = self._videos.table(rows.column("video_id").to_pylist(), rows, outcomes)
        return [_prediction(row, outcome) for row, outcome in zip(table.to_pylist(), outcomes, strict=True)]


def is_one_video(storage: Storage, uri: str) -> bool:
    """Whether an address is that of one file, whatever is in it, and not of a folder, a prefix or a table."""
    if uri.endswith("/") or extension(uri) in (".csv", ".parquet"):
        return False
    if not is_s3(uri):
        return not os.path.isdir(local_path(uri))
    return extension(uri) in VIDEO_EXTENSIONS or storage.exists(uri)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch with so many threads, as a worker of the job has: sums round otherwise with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prediction(row: dict[str, Any], outcome: Outcome) -> Prediction:
    """The row of a table (PREDICTION_SCHEMA) as an answer."""
    top = tuple(zip(row["label_topk"] or (), row["score_topk"] or (), strict=True))
    label, score = top[0] if top else (None, None)
    vector = row["embedding"]
    return Prediction(
        **{name: row[name] for name in ("uri", "status", "abstained", "error_class", "error_text")},
        **{name: row[name] for name in ("views", "frames_decoded", "frames_corrupt", "frames_missing")},
        label=label,
        score=score,
        top=top,
        duration_s=outcome.duration_s,
        embedding=None if vector is None else np.asarray(vector, np.float16),
    )
