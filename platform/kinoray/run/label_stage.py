"""What a labelling worker does: read, decode, run the model and commit, one unit of work after the other.

Decoders are the worker's own processes, so decoded frames never leave its machine. What is easy to break: batches are
formed across the views and videos of a unit in its order, so that a unit gives the same digits on any number of workers
and after any kill.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from kinoray.batch import collate, model_inputs
from kinoray.catalog import read_videos, references
from kinoray.checkpoint import load_model
from kinoray.config import ClipConfig, InferenceConfig
from kinoray.decode import Clip
from kinoray.decode_views import ViewClips
from kinoray.errors import (
    AccessDenied,
    CheckpointMismatch,
    KinorayError,
    MediaError,
    ModelError,
    StorageUnavailable,
)
from kinoray.model import VideoModel, prepare_model
from kinoray.predictions import PREDICTION_SCHEMA, Ledger, Unit
from kinoray.protocol import ViewAverage, ViewsConfig
from kinoray.sandbox import shared_sandbox
from kinoray.storage import Storage

__all__ = ["UNIT_COLUMNS", "LabelJob", "LabelUnits", "average_views", "pack_unit", "top_predictions"]

UNIT_COLUMNS = ("video_id", "uri", "offset", "length", "sha256")
"""Columns of a catalog that a worker needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelJob:
    """What all workers of a job share; small, since it is pickled to each."""

    storage: Storage
    root: str
    """Folder of the labelling, where units are committed."""
    checkpoint: str
    model_digest: str
    config_digest: str
    run_id: str
    clip: ClipConfig
    top_k: int
    batch_size: int
    inference: InferenceConfig
    decode_tasks: int
    """Decoder processes of each worker."""
    torch_threads: int
    views: ViewsConfig = field(default_factory=ViewsConfig)
    all_scores: bool = False
    device: str = "cpu"


@dataclass(slots=True)
class _Outcome:
    """What became of one video: an error, or views whose logits become a score."""

    error: KinorayError | None = None
    logits: list[np.ndarray] = field(default_factory=list)
    score: dict[str, Any] = field(default_factory=dict)
    frames_decoded: int = 0
    frames_corrupt: int = 0
    frames_missing: int = 0


def pack_unit(unit: Unit, rows: pa.Table) -> dict[str, Any]:
    """A unit as one row of a Dataset: references, never bytes of videos.

    Args:
        rows: the unit's rows of the catalog, in its order.
    """
    table = rows.select(list(UNIT_COLUMNS)).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"unit_id": unit.unit_id, "keys": list(unit.keys), "rows": sink.getvalue().to_pybytes()}


def top_predictions(
    logits: np.ndarray, labels: Sequence[str], top_k: int, *, all_scores: bool = False
) -> list[dict[str, Any]]:
    """The prediction columns of each video: the likeliest classes, margin and entropy.

    Args:
        logits: float [B, C], all finite.
        labels: C class names.
        top_k: classes named; all of them if there are fewer. Of equal scores the lower id comes first.
        all_scores: the column `scores`, too.
    """
    log_p = _log_softmax(logits)
    p = np.exp(log_p)
    order = np.argsort(-p, axis=1, kind="stable")
    results = []
    for row, ids in enumerate(order):
        best = ids[:top_k]
        second = p[row, ids[1]] if len(ids) > 1 else 0.0
        results.append(
            {
                "label_topk": [labels[index] for index in best],
                "id_topk": best.tolist(),
                "score_topk": p[row, best].tolist(),
                "margin": float(p[row, ids[0]] - second),
                "entropy": float(-(p[row] * log_p[row]).sum()),
            }
            | ({"scores": p[row]} if all_scores else {})
        )
    return results


def average_views(logits: np.ndarray, average: ViewAverage) -> np.ndarray:
    """Logits of a video from those of its views, float64 [V, C] -> [C]; a single view keeps its own.

    logits: their mean. probs: the logarithm of the mean of the views' probabilities (softmax gives that mean back).
    """
    if len(logits) == 1:
        return np.asarray(logits[0])
    if average == "logits":
        return np.asarray(logits.mean(axis=0))
    log_p = _log_softmax(logits)
    highest = log_p.max(axis=0)
    return np.asarray(highest + np.log(np.exp(log_p - highest).mean(axis=0)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [B, C]"""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


class LabelUnits:
    """Unit rows in (see `pack_unit`), one small row of counts out for each; the predictions go to the ledger.

    The model is loaded at the first unit, so that what is wrong with it comes back as a row: `error_class` and
    `error_text` of a KinorayError that must end the job. Nothing is committed for such a unit.
    """

    def __init__(self, job: LabelJob) -> None:
        self.job = job
        self.ledger = Ledger(job.storage, job.root)
        self.model: VideoModel | None = None
        self.labels: tuple[str, ...] = ()
        torch.set_num_threads(job.torch_threads)
        self.decoders = ThreadPoolExecutor(job.decode_tasks, thread_name_prefix="decode")
        self.sandbox = shared_sandbox(job.decode_tasks)

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = []
        for row in batch.to_pylist():
            unit = Unit(row["unit_id"], tuple(row["keys"]), len(row["keys"]))
            result = {"unit_id": unit.unit_id, "rows": 0, "quarantined": 0, "error_class": "", "error_text": ""}
            try:
                counts = self.label_unit(unit, pa.ipc.open_stream(row["rows"]).read_all())
                result |= {"rows": sum(counts.values()), "quarantined": counts.get("quarantined", 0)}
            except KinorayError as error:
                result |= {"error_class": type(error).__name__, "error_text": str(error)}
            results.append(result)
        return pa.Table.from_pylist(results)

    def label_unit(self, unit: Unit, rows: pa.Table) -> dict[str, int]:
        """Label and commit one unit, unless it is committed already; its counts by status.

        Raises:
            ModelError, CheckpointError, StorageError: the job cannot go on; nothing was committed.
        """
        commit = self.ledger.find_commit(unit.unit_id)  # by another job, or by this one before its worker was killed
        if commit is None:
            model = self._load()
            outcomes = self._label(model, rows)
            _refuse_if_all_denied(outcomes)
            commit = self.ledger.commit(unit, self._table(unit, rows, outcomes), self.job.run_id)
        return commit.counts

    def _load(self) -> VideoModel:
        if self.model is None:
            model, meta = load_model(self.job.storage, self.job.checkpoint)
            if meta.model_digest != self.job.model_digest:
                raise CheckpointMismatch(
                    f"{self.job.checkpoint} was replaced while the job ran: model {meta.model_digest}, "
                    f"expected {self.job.model_digest}; run the command again"
                )
            cast(nn.Module, model).to(self.job.device)
            self.model, self.labels = prepare_model(model, self.job.clip, self.job.inference), meta.labels
        return self.model

    def _label(self, model: VideoModel, rows: pa.Table) -> list[_Outcome]:
        """One outcome for each row, in order."""
        outcomes = [_Outcome() for _ in range(rows.num_rows)]
        waiting: list[tuple[_Outcome, Clip]] = []
        for outcome, views in zip(
            outcomes, self._views(rows, with_flow=bool(model.input_spec.flow_channels)), strict=True
        ):
            if isinstance(views, KinorayError):
                outcome.error = views
                continue
            outcome.frames_decoded, outcome.frames_corrupt = views.frames_decoded, views.frames_corrupt
            outcome.frames_missing = views.info.frames_missing
            for clip in views.clips():
                waiting.append((outcome, clip))
                if len(waiting) == self.job.batch_size:
                    self._run(model, waiting)
                    waiting = []
        if waiting:
            self._run(model, waiting)
        self._score([outcome for outcome in outcomes if outcome.error is None])
        return outcomes

    def _views(self, rows: pa.Table, *, with_flow: bool) -> Iterator[ViewClips | KinorayError]:
        """Read and decode in order, some videos ahead of the consumer: as many as fill a batch, and the decoders.

        Raises:
            StorageUnavailable, DecoderStartFailed: the store is down, or this machine; that is no fault of a video.
        """
        ahead = -(-self.job.batch_size // self.job.views.num_views) + self.job.decode_tasks
        pending: deque[Future[ViewClips | MediaError] | KinorayError] = deque()
        try:
            for data in read_videos(self.job.storage, references(rows)):
                if isinstance(data, StorageUnavailable):
                    raise data
                pending.append(
                    data if isinstance(data, KinorayError) else self.decoders.submit(self._decode, data, with_flow)
                )
                if len(pending) > ahead:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            for entry in pending:
                if isinstance(entry, Future):
                    entry.cancel()

    def _decode(self, data: bytes, with_flow: bool) -> ViewClips | MediaError:
        try:
            return self.sandbox.decode_views(data, self.job.clip, self.job.views, with_flow=with_flow)
        except MediaError as error:  # whatever a video does is one of these; what else goes wrong is not its fault
            return error

    def _run(self, model: VideoModel, waiting: list[tuple[_Outcome, Clip]]) -> None:
        """Run the model on a batch of views and give each outcome its logits."""
        inputs = model_inputs(collate([clip for _, clip in waiting]), model.input_spec, self.job.device)
        try:
            with torch.inference_mode():
                logits = model(**inputs).float().cpu().numpy()
        except (RuntimeError, TypeError, ValueError) as error:
            shapes = {name: list(tensor.shape) for name, tensor in inputs.items() if tensor is not None}
            raise ModelError(f"the model failed on a batch {shapes}: {error}") from error
        if logits.shape != (len(waiting), len(self.labels)):
            expected = [len(waiting), len(self.labels)]
            raise ModelError(f"the model gave logits {list(logits.shape)}, expected {expected} for its labels")
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits)).any(axis=1).sum())
            raise ModelError(f"the model gave NaN or infinite logits for {bad} of {len(logits)} clips of a batch")
        for (outcome, _), row in zip(waiting, logits.astype(np.float64), strict=True):
            outcome.logits.append(row)

    def _score(self, outcomes: list[_Outcome]) -> None:
        """Make one answer of the views of each video."""
        if not outcomes:
            return
        job = self.job
        logits = np.stack([average_views(np.stack(outcome.logits), job.views.average) for outcome in outcomes])
        for outcome, score in zip(
            outcomes, top_predictions(logits, self.labels, job.top_k, all_scores=job.all_scores), strict=True
        ):
            outcome.score = score

    def _table(self, unit: Unit, rows: pa.Table, outcomes: Sequence[_Outcome]) -> pa.Table:
        shared = {
            "abstained": False,
            "model_digest": self.job.model_digest,
            "config_digest": self.job.config_digest,
            "run_id": self.job.run_id,
        }
        records = []
        for key, row, outcome in zip(unit.keys, rows.to_pylist(), outcomes, strict=True):
            bad = outcome.error
            records.append(
                {name: row[name] for name in ("video_id", "uri", "offset", "length")}
                | {"row_key": key, "status": "labelled" if bad is None else "quarantined"}
                | {"error_class": None if bad is None else type(bad).__name__}
                | {"error_text": None if bad is None else " ".join(str(bad).split())}
                | {"views": len(outcome.logits)}
                | {name: getattr(outcome, name) for name in ("frames_decoded", "frames_corrupt", "frames_missing")}
                | outcome.score
                | shared
            )
        return pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA)


def _result(entry: Future[ViewClips | MediaError] | KinorayError) -> ViewClips | KinorayError:
    return entry.result() if isinstance(entry, Future) else entry


def _refuse_if_all_denied(outcomes: Sequence[_Outcome]) -> None:
    """One forbidden object is a quarantine row; a unit of nothing else means that the job may not read its input."""
    if len(outcomes) > 1 and all(isinstance(outcome.error, AccessDenied) for outcome in outcomes):
        raise AccessDenied(
            f"none of the {len(outcomes)} videos of a unit may be read, so nothing was quarantined; the first: "
            f"{outcomes[0].error}; check the credentials, or leave these videos out of the source"
        )
