"""From a label config to everything that a labelling needs, found and checked before anything is written.

`open_network` is the part that needs no source and no place for the result. Only what loads a network imports torch:
the driver of a labelling has that done by a worker, which needs the network anyway. What is easy to break: whatever can
change a row is in `_Settings`, whose digest names the folder of the results.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from kinoray.catalog.pieces import Pieces
from kinoray.catalog.rows import Rows
from kinoray.catalog.table import Catalog, catalog_of_source, rows_of_source
from kinoray.config.file import config_from_mapping
from kinoray.config.scoring import (
    CPU_BATCH,
    EarlyExit,
    ScorerConfig,
    SegmentConsensus,
    ViewsConfig,
    protocol_named,
)
from kinoray.config.shared import ClipConfig, digest
from kinoray.console import many, visible
from kinoray.errors import CatalogError, ConfigError, ObjectNotFound
from kinoray.label.answers import AnswerRule, Calibrated, load_calibration
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import Ledger, find_labellings
from kinoray.label.plan import Plan, Survey, survey
from kinoray.label.unit import JobRecord, Unit, labelling_id
from kinoray.label.work import UNIT_COLUMNS, LabelJob, NetworkFacts, work_of
from kinoray.network.build import is_shipped, trusted_network
from kinoray.network.checkpoint import CheckpointMeta, find_checkpoint, load_meta, load_model
from kinoray.network.published import checkpoint_of
from kinoray.storage.leftovers import Scratch
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import require_folder

__all__ = ["Labelling", "Opened", "Say", "as_in", "look_here", "open_labelling", "open_network"]

Say = Callable[[str], None]
"""Takes a line for people."""

_TOP = 5
_MAX_THREADS = 1024
_USUAL_THRESHOLD = 0.5  # of a network that was trained on label lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """A catalog, a model and the ledger where they meet."""

    rows: Rows
    """The catalog, as a stream."""
    found: Survey
    """Its digest, and the keys of its rows."""
    meta: CheckpointMeta
    job: LabelJob
    ledger: Ledger
    plan: Plan
    consensus: SegmentConsensus | None
    """How the network makes one answer of its segments, where their logits are stored."""
    scratch: Scratch
    """Holds the keys, until it is closed or nobody has it."""
    source: str
    """What the catalog was made of, with its split."""

    def work(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
        """Units of the plan with their rows (UNIT_COLUMNS). Raises as `work_of`."""
        stored = self.plan.stored
        for unit, rows in work_of(self.rows, self.found.keys, self.ledger.labelling_id, units, stored):
            yield unit, rows.select(list(UNIT_COLUMNS))

    @property
    def catalog(self) -> Catalog:
        """All rows in memory, for whoever needs them at once: of sets that are evaluated, or measured."""
        if isinstance(self.rows, Catalog):
            return self.rows
        return Catalog(pa.concat_tables(self.rows.batches()), self.rows.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a checkpoint says of its network, and the settings under which it labels."""

    meta: CheckpointMeta
    job: LabelJob
    """Without a root."""
    record: JobRecord
    consensus: SegmentConsensus | None
    """As of a Labelling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """Whatever can change a row, but for the model. Its digest is part of what a labelling is called."""

    clip: ClipConfig
    views: ViewsConfig
    answer: AnswerRule
    scorer: ScorerConfig
    labels: tuple[str, ...]
    torch_threads: int | None
    """Of CPUs. Sums are split among threads, which rounds them otherwise: a ResNet-50's logits by 4e-5."""

    @property
    def record(self) -> dict[str, Any]:
        """As JSON; without cuts where windows go across them, as it was before there were any."""
        tree = {**asdict(self), "answer": self.answer.record}
        if self.views.windows is not None and not self.views.windows.at_cuts:
            del tree["views"]["windows"]["at_cuts"]
        return tree


def look_here(job: LabelJob, num_units: int = 0) -> NetworkFacts:
    """Load the network in this process to see what only it knows. Raises as `look_at` and `load_model`."""
    from kinoray.label.stage import look_at  # here: it imports torch, which takes seconds

    return look_at(*load_model(job.storage, job.checkpoint, job.allow_factory), job)


def open_labelling(
    config: LabelConfig,
    task: str,
    *,
    check: Callable[[Catalog, CheckpointMeta], object] | None = None,
    segments: bool = False,
    quiet: bool = False,
    look: Callable[[LabelJob, int], NetworkFacts] = look_here,
) -> Labelling:
    """Find and check everything that a labelling needs, and pin its plan.

    What only the network knows is checked by `look`, before anything is written. That is not done again for a labelling
    that is there, and not with config.plan: the workers do it, too.

    Args:
        task: the verb, for the lines that are printed.
        check: called before anything is written; raises what it finds wrong.
        segments: store the logits of each segment if the network sees them one by one.
        quiet: print nothing.
        look: loads the network of a job, whose units will be so many, and checks it. Default: in this process.

    Raises:
        KinorayError: as `label`.
    """

    def say(line: str) -> None:
        if quiet:
            return
        print(f"{task}: {visible(line)}", flush=True)

    if not config.out:
        raise ConfigError("out must be a folder or an s3:// prefix for the result, got ''")
    require_folder(Storage(config.storage), "out", config.out, "label")
    opened = open_network(config, say=say, warn=say, segments=segments)
    meta, record, storage = opened.meta, opened.record, opened.job.storage
    scratch = Scratch("label")
    rows = _rows(storage, config, meta, scratch.folder, check)
    found = survey(rows, scratch.folder)
    out = absolute(config.out).rstrip("/")
    ledger = Ledger(storage, join(out, labelling_id(record.model_digest, record.config_digest)))
    clips = -(-len(rows) // config.resources.num_workers) * opened.job.views.num_views
    job = replace(opened.job, root=ledger.root, clips_a_worker=clips)
    say(f"{many(len(rows), 'video')}, {many(len(meta.labels), 'class')}, checkpoint {job.checkpoint}")
    if job.views.num_views > 1:
        say(f"protocol {config.protocol}, {job.views.num_views} views of each video")
    unit_rows = config.rows_a_unit(len(rows))
    if config.plan:
        plan = ledger.draft(found, unit_rows, scratch.folder)
    else:
        if not storage.exists(join(ledger.root, "job.json")):  # else this network was looked at under these settings
            for line in look(job, -(-len(rows) // unit_rows)).advice:
                say(line)
        if ledger.pin_job(record):
            _say_others(storage, out, ledger.root, say)
        plan = ledger.plan(found, unit_rows, scratch.folder)
    return Labelling(
        rows=rows,
        found=found,
        meta=meta,
        job=job,
        ledger=ledger,
        plan=plan,
        consensus=opened.consensus,
        scratch=scratch,
        source=absolute(config.source) + (f" (split {config.split})" if config.split else ""),
    )


def _rows(
    storage: Storage,
    config: LabelConfig,
    meta: CheckpointMeta,
    folder: Path,
    check: Callable[[Catalog, CheckpointMeta], object] | None,
) -> Rows:
    """The rows of the split that is asked for: in memory where they are to be checked, else as a stream."""
    source = absolute(config.source)
    if check is None:
        keep = join(absolute(config.out), ".listing")
        whole: Rows = rows_of_source(storage, source, folder, keep="" if config.plan else keep)
    else:
        whole = catalog_of_source(storage, source)
    try:
        if isinstance(whole, Pieces):
            return whole.select(config.split, folder)
        assert isinstance(whole, Catalog)
        rows = whole.select(config.split)
    except CatalogError as error:
        if check is not None and isinstance(whole, Catalog) and whole.table.column("label_id").null_count == len(whole):
            check(whole, meta)  # another split would not help
        remedy = "; name one of them with --split, or --split '' for all videos" if config.split else ""
        raise CatalogError(f"{config.source}: {error}{remedy}") from None
    if check is not None:
        check(rows, meta)
    return rows


def open_network(config: LabelConfig, *, say: Say, warn: Say, segments: bool = False) -> Opened:
    """Find the network, and check its settings as far as it need not be built; nothing is written.

    config.source and config.out are not read.

    Args:
        say: is told what is done.
        warn: is told what may not be what was meant.
        segments: as for `open_labelling`.

    Raises:
        KinorayError: as `label`.
    """
    storage = Storage(config.storage)
    named = checkpoint_of(
        config.checkpoint,
        "checkpoint",
        say,
        resources=config.resources,
        classes=config.classes,
        prompts=config.prompts,
    )
    checkpoint = find_checkpoint(storage, named, warn=warn)
    meta = _open_meta(storage, checkpoint, config, say)
    consensus = None
    if segments:
        from kinoray.network.scorer import segment_consensus  # here, as load_model: it imports torch

        consensus = segment_consensus(load_model(storage, checkpoint, config.allow_factory)[0])
        config = replace(config, segment_scores=consensus is not None)
    clip = _clip(config, meta.clip, warn)
    views = _views(config, clip)
    calibration = load_calibration(storage, config.calibration, meta.model_digest) if config.calibration else None
    answer = _answer_rule(config, meta, calibration)
    if answer.scores == "sigmoid" and config.early_exit != "off":
        raise ConfigError(
            f"early_exit must be off with sigmoid scores, got {config.early_exit}: it stops when the first class of a "
            "video is settled, and says nothing of the others"
        )
    scorer = _scorer_config(config, clip, calibration)
    on_gpu = config.resources.gpus_per_worker > 0
    torch_threads = max(1, int(config.resources.cpus_per_worker))
    settings = _Settings(
        clip=clip,
        views=views,
        answer=answer,
        scorer=scorer,
        labels=meta.labels,
        torch_threads=None if on_gpu else torch_threads,
    )
    record = JobRecord(
        checkpoint=checkpoint,
        model_digest=meta.model_digest,
        config_digest=digest(settings.record),
        labels=meta.labels,
        scores=answer.scores,
        windows=views.windows,
        model=meta.model,
        settings=settings.record,
    )
    job = LabelJob(
        storage=storage,
        root="",
        checkpoint=checkpoint,
        allow_factory=config.allow_factory,
        model_digest=meta.model_digest,
        config_digest=record.config_digest,
        run_id=uuid.uuid4().hex[:16],
        clip=clip,
        views=views,
        protocol=config.protocol,
        answer=answer,
        scorer=scorer,
        num_decoders=config.resources.decoders_per_worker,
        torch_threads=torch_threads,
        device="cuda" if on_gpu else "cpu",
    )
    return Opened(meta=meta, job=job, record=record, consensus=consensus)


def as_in(job: LabelJob, record: JobRecord) -> LabelJob:
    """A job that makes of a video what a labelling that is there would have made of it, but for its answer.

    Args:
        record: of the labelling. It may be a stranger's: limits of decoding stay the job's own.

    Raises:
        ConfigError: the network is another one, or the record says nothing of how videos were seen.
    """
    if record.model_digest != job.model_digest:
        raise ConfigError(
            f"checkpoint: {job.checkpoint} is not the network that labelled these videos ({job.model_digest}, expected "
            f"{record.model_digest}); name it with --checkpoint"
        )
    said = record.settings
    threads = said.get("torch_threads")
    if not all(isinstance(said.get(name), dict) for name in ("clip", "views", "scorer")):
        raise ConfigError("predictions: job.json does not say how its videos were seen; compare with one of its rows")
    clip = config_from_mapping(ClipConfig, said["clip"], "clip.", complete=True)
    return replace(
        job,
        clip=clip.decoded_by(replace(job.clip.decode, backend=clip.decode.backend)),
        views=config_from_mapping(ViewsConfig, said["views"], "views.", complete=True),
        scorer=config_from_mapping(ScorerConfig, said["scorer"], "scorer.", complete=True),
        torch_threads=threads if isinstance(threads, int) and 1 <= threads <= _MAX_THREADS else job.torch_threads,
    )


def _open_meta(storage: Storage, checkpoint: str, config: LabelConfig, say: Say) -> CheckpointMeta:
    """What the checkpoint says of itself; a network that does not ship with kinoray is named before it is imported."""
    meta = load_meta(storage, checkpoint)
    network = trusted_network(meta.model, checkpoint, config.allow_factory)
    if not (config.plan or is_shipped(network.factory)):
        options = f" with options {dict(network.options)!r:.500}" if network.options else ""
        say(f"imports {network.factory}{options}, which {checkpoint} names and you allow")
    return meta


def _clip(config: LabelConfig, trained: ClipConfig, warn: Say) -> ClipConfig:
    """What each view holds: numbers as in training, limits and back end as this job has them.

    Raises:
        ConfigError: the two do not go together.
    """
    clip = protocol_named(config.protocol).clip(trained)
    if config.num_segments is not None:
        clip = replace(clip, sample=replace(clip.sample, num_segments=config.num_segments))
    before, now = trained.decode.backend, config.decode.backend
    if before != now:
        warn(
            f"videos are decoded by {now}; the network was trained with {before}, whose frames differ by 1-2 "
            f"grey levels (--decode.backend {before})"
        )
    return clip.decoded_by(config.decode)


def _views(config: LabelConfig, clip: ClipConfig) -> ViewsConfig:
    """Where the views lie. Protocols that mean the same for this network share their results."""
    views = protocol_named(config.protocol).views(config.view_average, config.windows)
    return replace(views, placed=views.placed and clip.sample.is_dense)


def _answer_rule(config: LabelConfig, meta: CheckpointMeta, calibration: Calibrated | None) -> AnswerRule:
    """What the settings say, or else the calibration, or else what the network was trained for."""
    num_classes = len(meta.labels)
    kind = config.scores or meta.scores
    is_trained_so = kind == meta.scores == "sigmoid"
    thresholds = calibration.thresholds if calibration and kind == "sigmoid" and not config.threshold else ()
    if thresholds and len(thresholds) != num_classes:
        raise ConfigError(f"calibration: {config.calibration} has {len(thresholds)} thresholds, not {num_classes}")
    usual = _USUAL_THRESHOLD if is_trained_so and not thresholds else 0.0
    return AnswerRule(
        top_k=min(config.top_k or (num_classes if is_trained_so else _TOP), num_classes),
        scores=kind,
        temperature=config.temperature or (calibration.temperature if calibration else 1.0),
        threshold=config.threshold or usual,
        thresholds=thresholds,
        min_margin=config.min_margin,
        all_scores=config.all_scores,
    )


def _scorer_config(config: LabelConfig, clip: ClipConfig, calibration: Calibrated | None) -> ScorerConfig:
    """What is run. Raises ConfigError: the calibration does not hold what early exit asks of it."""
    early_exit = None
    if config.early_exit != "off" and clip.sample.num_segments == 1:
        raise ConfigError(
            f"early_exit must be off for clips of one segment, which is seen at once, got {config.early_exit}"
        )
    if config.early_exit == "exact":
        early_exit = EarlyExit()
    elif config.early_exit == "margin":
        assert calibration is not None  # LabelConfig checks it
        early_exit = EarlyExit(margin=calibration.margin_for(config.max_changed, clip))
    return ScorerConfig(
        batch_size=config.batch_size if config.resources.gpus_per_worker > 0 else CPU_BATCH,
        inference=config.inference,
        embeddings=config.embeddings,
        segment_logits=config.segment_scores,
        early_exit=early_exit,
    )


def _say_others(storage: Storage, out: str, root: str, say: Say) -> None:
    """A new labelling beside others: never mixed with them, and never unnoticed."""
    try:
        others = [other for other in find_labellings(storage, out) if other != root]
    except ObjectNotFound:
        return
    if others:
        say(f"{out} holds results of another model or other settings ({', '.join(others)}); they stay apart")
