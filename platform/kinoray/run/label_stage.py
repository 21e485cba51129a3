"""What a labelling worker does: read, decode, run the model and commit, one unit of work after the other.

Decoders are the worker's own processes, so decoded frames never leave its machine. What is easy to break: batches are
formed across the videos of a unit in its order, so that a unit gives the same digits on any number of workers and after
any kill.
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
from kinoray.sandbox import shared_sandbox
from kinoray.storage import Storage

__all__ = ["UNIT_COLUMNS", "LabelJob", "LabelUnits", "pack_unit", "top_predictions"]

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
    device: str = "cpu"


@dataclass(slots=True)
class _Outcome:
    """What became of one video: an error, or a clip that becomes a score."""

    error: KinorayError | None = None
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


def top_predictions(logits: np.ndarray, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """The prediction columns of each video: the likeliest classes, margin and entropy.

    Args:
        logits: float [B, C].
        labels: C class names.
        top_k: classes named; all of them if there are fewer. Of equal scores the lower id comes first.

    Raises:
        ModelError: a logit is not a finite number.
    """
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ModelError(f"the model gave NaN or infinite logits for {bad} of {len(logits)} videos of a batch")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_p = shifted - log_sum
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
        )
    return results


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
        for outcome, clip in zip(
            outcomes, self._clips(rows, with_flow=bool(model.input_spec.flow_channels)), strict=True
        ):
            if isinstance(clip, KinorayError):
                outcome.error = clip
                continue
            outcome.frames_decoded, outcome.frames_corrupt = clip.frames_decoded, clip.frames_corrupt
            outcome.frames_missing = clip.info.frames_missing
            waiting.append((outcome, clip))
            if len(waiting) == self.job.batch_size:
                self._score(model, waiting)
                waiting = []
        if waiting:
            self._score(model, waiting)
        return outcomes

    def _clips(self, rows: pa.Table, *, with_flow: bool) -> Iterator[Clip | KinorayError]:
        """Read and decode in order, some clips ahead of the consumer.

        Raises:
            StorageUnavailable, DecoderStartFailed: the store is down, or this machine; that is no fault of a video.
        """
        ahead = self.job.batch_size + self.job.decode_tasks
        pending: deque[Future[Clip | MediaError] | KinorayError] = deque()
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

    def _decode(self, data: bytes, with_flow: bool) -> Clip | MediaError:
        try:
            return self.sandbox.decode_clip(data, self.job.clip, with_flow=with_flow)
        except MediaError as error:  # whatever a video does is one of these; what else goes wrong is not its fault
            return error

    def _score(self, model: VideoModel, waiting: list[tuple[_Outcome, Clip]]) -> None:
        """Run the model on a batch and give each outcome its score."""
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
        for (outcome, _), score in zip(waiting, top_predictions(logits, self.labels, self.job.top_k), strict=True):
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
                | {"views": int(bad is None)}
                | {name: getattr(outcome, name) for name in ("frames_decoded", "frames_corrupt", "frames_missing")}
                | outcome.score
                | shared
            )
        return pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA)


def _result(entry: Future[Clip | MediaError] | KinorayError) -> Clip | KinorayError:
    return entry.result() if isinstance(entry, Future) else entry


def _refuse_if_all_denied(outcomes: Sequence[_Outcome]) -> None:
    """One forbidden object is a quarantine row; a unit of nothing else means that the job may not read its input."""
    if len(outcomes) > 1 and all(isinstance(outcome.error, AccessDenied) for outcome in outcomes):
        raise AccessDenied(
            f"none of the {len(outcomes)} videos of a unit may be read, so nothing was quarantined; the first: "
            f"{outcomes[0].error}; check the credentials, or leave these videos out of the source"
        )
