"""What a labelling worker does: read, decode, run the model and commit, one unit of work after the other.

`LabelVideos` is the part that knows neither Ray nor ledger, for whoever wants an answer at once (kinoray.api).

What is easy to break: a video's digits depend on nothing but the settings. On a CPU each clip is run by itself; on a
GPU batches are formed across the views and videos of a unit in its order, so that at least the same units give the same
digits on any number of workers and after any kill.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kinoray.catalog.rows import Refusal, error_of, judge, refusal_columns, report
from kinoray.config.scoring import CPU_BATCH
from kinoray.console import log_event
from kinoray.errors import (
    AccessDenied,
    BucketNotFound,
    CheckpointMismatch,
    ConfigError,
    DecoderCrashed,
    KinorayError,
    MediaError,
)
from kinoray.label.answers import average_logits, top_predictions
from kinoray.label.ledger import Ledger
from kinoray.label.read import VideoReader
from kinoray.label.times import STAGES, LabelMetrics, StageClock, UnitTimes
from kinoray.label.unit import PREDICTION_SCHEMA, WINDOW_SCHEMA, Unit
from kinoray.label.work import UNIT_COLUMNS, LabelJob, NetworkFacts, pack_unit
from kinoray.network.build import VideoModel, check_clip, recipe_departures
from kinoray.network.checkpoint import CheckpointMeta, load_model
from kinoray.network.forward import agreed_batch_size, auto_batch_size
from kinoray.network.prepare import compile_advice
from kinoray.network.process import set_up_to_compute
from kinoray.network.scorer import ClipAnswer, ClipScorer, check_scorer, segment_consensus
from kinoray.video.frames import Frames
from kinoray.video.info import MAX_COUNT

__all__ = ["UNIT_COLUMNS", "LabelJob", "LabelUnits", "LabelVideos", "Outcome", "look_at", "pack_unit"]

Saw = Callable[[int], None]


@dataclass(slots=True)
class _Window:
    """One window of a video: the answers for its views, in the end one."""

    begin_s: float
    end_s: float
    views: list[ClipAnswer] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What became of one video: a refusal, or windows with views whose logits become a score."""

    refusal: Refusal | None = None
    duration_s: float | None = None
    """Of the whole video; None where it could not be opened."""
    windows: list[_Window] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    window_answers: list[dict[str, Any]] = field(default_factory=list)
    frames_decoded: int = 0
    frames_corrupt: int = 0
    frames_missing: int = 0

    @property
    def answers(self) -> list[ClipAnswer]:
        """Of all views of all windows."""
        return [view for window in self.windows for view in window.views]

    def add(self, part: Frames) -> None:
        """Make room for the windows of a part, and count its frames.

        Raises:
            DecoderCrashed: they are more than the table can hold, so a decoder made them up.
        """
        self.frames_decoded += part.frames_decoded
        self.frames_corrupt += part.frames_corrupt
        self.frames_missing = part.info.frames_missing
        if max(self.frames_decoded, self.frames_corrupt) > MAX_COUNT:
            raise DecoderCrashed(f"its decoder counts {self.frames_decoded:,} frames, {self.frames_corrupt:,} corrupt")
        self.duration_s = part.info.duration_s
        self.windows += [_Window(begin_s, end_s) for begin_s, end_s in part.window_times.tolist()]


class _Place(NamedTuple):
    """Where a clip's answer belongs."""

    outcome: Outcome
    window: int


def look_at(model: VideoModel, meta: CheckpointMeta, job: LabelJob) -> NetworkFacts:
    """What is to be known of a network before it labels.

    Raises:
        ConfigError: the settings ask for what it does not take, or cannot give.
    """
    try:
        check_clip(model.input_spec, job.clip)
    except ConfigError as error:
        raise ConfigError(f"protocol {job.protocol}: {error}") from None
    check_scorer(model, job.scorer, len(meta.labels))
    advice, departures = [], ""
    if job.clip.sample != meta.clip.sample:  # a training's own choice stands
        departures = recipe_departures(model.input_spec, replace(job.clip, view=meta.clip.view))
    if departures:
        advice.append(f"warning: {meta.model.factory} is not fed as it was made to be: {departures}")
    if len(meta.labels) == 1 and job.answer.scores == "softmax":
        advice.append(
            f"warning: the network knows one class, {meta.labels[0]!r:.100}, so every video is that with a score of 1; "
            "give it classes of what else the videos may show"
        )
    if job.device == "cpu" and job.clips_a_worker:
        advice.append(compile_advice(model.input_spec, job.clip, job.scorer.inference, job.clips_a_worker))
    return NetworkFacts(consensus=segment_consensus(model), advice=tuple(filter(None, advice)))


class LabelVideos:
    """Videos in, what became of each and their rows out, in one process; nothing is written.

    The network is loaded at the first videos, unless it is given. Not for two threads at once.
    """

    def __init__(
        self, job: LabelJob, clock: StageClock, network: tuple[VideoModel, CheckpointMeta] | None = None
    ) -> None:
        self.job = job
        self._clock, self._network = clock, network
        self._scorer: ClipScorer[_Place] | None = None
        self._labels: tuple[str, ...] = ()
        self._facts: NetworkFacts | None = None
        self.reader = self._reader(job.scorer.batch_size or CPU_BATCH)

    def load(self) -> NetworkFacts:
        """Load the network, unless it is loaded. Raises as `look_at` and `load_model`."""
        self._load()
        assert self._facts is not None
        return self._facts

    def label(self, rows: pa.Table, saw: Saw = lambda done: None) -> list[Outcome]:
        """One outcome for each row (UNIT_COLUMNS), in order.

        Args:
            saw: is told how many are done; for the eyes only.

        Raises:
            ModelError, CheckpointError, StorageError: what is wrong is no video's fault.
        """
        scorer = self._load()
        try:
            return self._label(scorer, rows, saw)
        except BaseException:  # Ctrl-C, too
            scorer.clear()  # else its clips would share a batch with the next videos'
            raise

    def close(self) -> None:
        """End the decoder processes; later videos start new ones."""
        self.reader.close()

    def table(self, keys: Sequence[str], rows: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        """The rows of the result (PREDICTION_SCHEMA); `keys` are their row_key."""
        shared = {
            "abstained": False,
            "model_digest": self.job.model_digest,
            "config_digest": self.job.config_digest,
            "run_id": self.job.run_id,
        }
        records = []
        for key, row, outcome in zip(keys, rows.to_pylist(), outcomes, strict=True):
            bad = outcome.refusal
            answers = [] if bad else outcome.answers
            records.append(
                {name: row[name] for name in ("video_id", "uri", "offset", "length")}
                | {"row_key": key, "status": "labelled" if bad is None else "quarantined"}
                | {"error_class": None if bad is None else bad.error_class}
                | {"error_text": None if bad is None else bad.error_text}
                | {"views": len(answers), "windows": 0 if bad else len(outcome.windows)}
                | {"segments_run": sum(answer.segments_run for answer in answers)}
                | {name: getattr(outcome, name) for name in ("frames_decoded", "frames_corrupt", "frames_missing")}
                | shared
                | outcome.answer
            )
        return pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA)

    @staticmethod
    def windows_table(keys: Sequence[str], rows: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        """The rows of the windows of those that were labelled (WINDOW_SCHEMA)."""
        records = [
            {"video_id": video_id, "row_key": key, "window": number, "begin_s": window.begin_s, "end_s": window.end_s}
            | answer
            for key, video_id, outcome in zip(keys, rows.column("video_id").to_pylist(), outcomes, strict=True)
            if outcome.refusal is None
            for number, (window, answer) in enumerate(zip(outcome.windows, outcome.window_answers, strict=True))
        ]
        return pa.Table.from_pylist(records, schema=WINDOW_SCHEMA)

    def _reader(self, batch_size: int) -> VideoReader:
        job = self.job
        return VideoReader(
            job.storage, job.clip, job.views, self._clock, num_decoders=job.num_decoders, batch_size=batch_size
        )

    def _batch_size(self, model: VideoModel) -> int:
        """Clips a forward pass: what the job says, or for 0 what the labelling's first worker found."""
        job = self.job
        if job.scorer.batch_size:
            return job.scorer.batch_size
        find = partial(auto_batch_size, model, job.clip, job.scorer.inference, job.device)
        return agreed_batch_size(job.storage, job.root, find) if job.root else find()

    def _load(self) -> ClipScorer[_Place]:
        if self._scorer is None:
            job = self.job
            model, meta = self._network or load_model(job.storage, job.checkpoint, job.allow_factory)
            if meta.model_digest != job.model_digest:
                raise CheckpointMismatch(
                    f"{job.checkpoint} was replaced while the job ran: model {meta.model_digest}, "
                    f"expected {job.model_digest}; run the command again"
                )
            self._labels, self._facts = meta.labels, look_at(model, meta, job)
            job = self.job = replace(job, clip=job.clip.for_network(model.input_spec.flow_channels))
            batch_size = self._batch_size(model)
            self.reader = self._reader(batch_size)
            self._scorer = ClipScorer(
                model,
                job.clip,
                replace(job.scorer, batch_size=batch_size),
                num_classes=len(self._labels),
                device=job.device,
            )
        return self._scorer

    def _label(self, scorer: ClipScorer[_Place], rows: pa.Table, saw: Saw) -> list[Outcome]:
        """One outcome for each row, in order."""
        outcomes = [Outcome() for _ in range(rows.num_rows)]
        for done, (outcome, video) in enumerate(zip(outcomes, self.reader.videos(rows), strict=True)):
            saw(done)
            if isinstance(video, Refusal):
                outcome.refusal = video
                continue
            try:
                for part in self.reader.parts(video):
                    outcome.add(part)
                    views_a_window = len(part) // len(part.windows)
                    for view, clip in enumerate(part.clips()):
                        place = _Place(outcome, part.first_window + view // views_a_window)
                        with self._clock.timing("model"):
                            _keep(scorer.put(place, clip))
            except MediaError as error:  # of a later window; what waits of the earlier ones is dropped with the video
                outcome.refusal = judge(error, "decode")
        with self._clock.timing("model"):
            _keep(scorer.flush())
        self._score([outcome for outcome in outcomes if outcome.refusal is None])
        return outcomes

    def _score(self, outcomes: list[Outcome]) -> None:
        """Make one answer of the views of each window, and one of the windows of each video."""
        if not outcomes:
            return
        average, rule = self.job.views.average, self.job.answer
        windows = [
            [average_logits(_stack(window.views), average, rule.scores) for window in outcome.windows]
            for outcome in outcomes
        ]
        videos = np.stack([average_logits(np.stack(logits), average, rule.scores) for logits in windows])
        for outcome, logits, answer in zip(outcomes, windows, top_predictions(videos, self._labels, rule), strict=True):
            outcome.answer = answer | _extras(outcome.answers)
            if self.job.views.windows:
                outcome.window_answers = top_predictions(np.stack(logits), self._labels, rule)


class LabelUnits:
    """Unit rows in (see `pack_unit`), one small row of counts out for each; the predictions go to the ledger.

    The model is loaded at the first unit, so that what is wrong with it comes back as a row: the
    refusal_columns of a KinorayError that must end the job. Nothing is committed for such a unit.
    """

    def __init__(self, job: LabelJob, tell: Callable[[str, int], None] = lambda unit_id, done: None) -> None:
        self.job = job
        self._tell = tell
        self.ledger = Ledger(job.storage, job.root)
        set_up_to_compute(job.torch_threads)
        self.clock, self.metrics = StageClock(), LabelMetrics(self.ledger.labelling_id)
        self._reasons: Counter[str] = Counter()
        self.videos = LabelVideos(job, self.clock)

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = []
        failures: list[Refusal | None] = []
        for row in batch.to_pylist():
            unit = Unit(row["unit_id"], tuple(row["keys"]), len(row["keys"]))
            counts, failure = {}, None
            try:
                counts = self.label_unit(unit, pa.ipc.open_stream(row["rows"]).read_all())
            except KinorayError as error:
                failure = report(error, "label")
            seconds = self.clock.take()
            reasons, self._reasons = self._reasons, Counter()
            depth = self.videos.reader.take_depth()
            self.metrics.add(UnitTimes(counts=counts, reasons=reasons, seconds=seconds, prefetched=depth))
            rows = {"rows": sum(counts.values()), "quarantined": counts.get("quarantined", 0)}
            results.append({"unit_id": unit.unit_id, **rows, **{f"{name}_s": seconds[name] for name in STAGES}})
            failures.append(failure)
        table = pa.Table.from_pylist(results)
        for name, column in refusal_columns(failures).items():
            table = table.append_column(name, pa.array(column))
        return table

    def label_unit(self, unit: Unit, rows: pa.Table) -> dict[str, int]:
        """Label and commit one unit, unless it is committed already; its counts by status.

        Raises:
            ModelError, CheckpointError, StorageError: the job cannot go on; nothing was committed.
        """
        commit = self.ledger.find_commit(unit.unit_id)  # by another job, or by this one before its worker was killed
        if commit is None:
            begin_s = time.time()
            outcomes = self.videos.label(rows, partial(self._tell, unit.unit_id))
            _refuse_if_none_readable(outcomes)
            windows = self.videos.windows_table(unit.keys, rows, outcomes) if self.job.views.windows else None
            times = self.clock.times(begin_s)
            with self.clock.timing("commit"):
                table = self.videos.table(unit.keys, rows, outcomes)
                commit = self.ledger.commit(unit, table, self.job.run_id, windows, times)
            self._log(unit, rows, outcomes, times.end_s - begin_s)
        return commit.counts

    def _log(self, unit: Unit, rows: pa.Table, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Count the reasons of what was quarantined, and log the unit with the ids that belong to it."""
        ids: dict[str, str | int | float] = {
            "run": self.job.run_id,
            "labelling": self.ledger.labelling_id,
            "unit": unit.unit_id,
        }
        for video_id, outcome in zip(rows.column("video_id").to_pylist(), outcomes, strict=True):
            if outcome.refusal is not None:
                reason = outcome.refusal.error_class
                self._reasons[reason] += 1
                row = {"video": video_id, "reason": reason, "text": outcome.refusal.error_text}
                log_event("quarantined", ids | row, bad=True)
        for reason, count in self.videos.reader.take_refused().items():
            log_event("not decoded by the GPU", ids | {"reason": reason, "readings": count})
        log_event("unit committed", ids | {"videos": unit.num_rows, "seconds": round(seconds, 3)})


def _keep(answers: Iterable[tuple[_Place, ClipAnswer]]) -> None:
    """Put each answer where it belongs."""
    for place, answer in answers:
        place.outcome.windows[place.window].views.append(answer)


def _stack(views: Sequence[ClipAnswer]) -> np.ndarray:
    """Their logits, float64 [V, C]."""
    return np.stack([view.logits for view in views])


def _extras(views: Sequence[ClipAnswer]) -> dict[str, Any]:
    """Embedding (mean over the views) and segment logits (of the only view), where they were kept."""
    kept: dict[str, Any] = {}
    vectors = [view.embedding for view in views if view.embedding is not None]
    if vectors:
        kept["embedding"] = np.mean(vectors, axis=0, dtype=np.float64).astype(np.float16)
    if views[0].segment_logits is not None:
        kept["segment_logits"] = views[0].segment_logits.reshape(-1)
    return kept


def _refuse_if_none_readable(outcomes: Sequence[Outcome]) -> None:
    """One forbidden object is a quarantine row; a unit of nothing else means that the job cannot read its input."""
    refusals = [outcome.refusal for outcome in outcomes if outcome.refusal is not None]
    kinds = {refusal.error_class for refusal in refusals}
    if len(refusals) < max(2, len(outcomes)) or len(kinds) != 1:
        return
    first = error_of(refusals[0])
    if isinstance(first, AccessDenied | BucketNotFound):
        raise type(first)(
            f"none of the {len(outcomes)} videos of a unit may be read, so nothing was quarantined; the first: "
            f"{first}; check credentials and buckets, or leave these videos out of the source"
        )
