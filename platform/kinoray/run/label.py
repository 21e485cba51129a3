"""Label every video of a source, exactly once: plan, run what is missing on Ray, check, declare complete.

What is easy to break: all state is in the ledger (kinoray.predictions), none in Ray or in this process, so that killing
anything and running the same command again gives the same table.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from kinoray import errors
from kinoray.catalog import Catalog, catalog_of_source
from kinoray.checkpoint import CheckpointMeta, find_checkpoint, load_model
from kinoray.config import ClipConfig, ResourcesConfig, digest
from kinoray.errors import ClusterError, ConfigError, KinorayError, ObjectNotFound, TooManyBad
from kinoray.model import InputSpec, check_clip, compile_advice
from kinoray.predictions import Ledger, Plan, Totals, Unit, find_labellings, labelling_id, row_keys
from kinoray.progress import Progress, format_duration
from kinoray.protocol import PROTOCOLS
from kinoray.run.cluster import connect, quiet_ray, require_fit
from kinoray.run.label_stage import LabelJob, LabelUnits, pack_unit
from kinoray.storage import Storage, absolute, join
from kinoray.verbs import LabelConfig

__all__ = ["Labelling", "label", "open_labelling", "refuse_too_many_bad", "run_labelling"]

_MAX_BLOCKS = 20_000  # each is a Ray object and a task; more units than this share blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """A catalog, a model and the ledger where they meet."""

    catalog: Catalog
    keys: list[str]
    """`row_keys` of the catalog."""
    meta: CheckpointMeta
    job: LabelJob
    ledger: Ledger
    plan: Plan


def label(config: LabelConfig) -> dict[str, Any]:
    """Label what is not labelled yet, check that every input has its row, and print the totals.

    Returns:
        The totals, with `labelling_id`, `root` (where the table is), `catalog_digest` and `run_id`.

    Raises:
        TooManyBad: more than max_bad_fraction were quarantined; the table is complete all the same.
        IncompleteOutput: rows are not inputs.
        KinorayError: the source, the checkpoint, the store or the cluster cannot be used.
    """
    start = time.monotonic()
    labelling = open_labelling(config, "label")
    totals = run_labelling(labelling, config.resources, "label")
    print(f"label: complete in {format_duration(time.monotonic() - start)}; the table is in {labelling.ledger.root}")
    print(f"label: look at it with: kinoray report {labelling.ledger.root}", flush=True)
    refuse_too_many_bad(totals, config.max_bad_fraction, labelling.ledger.root)
    return {
        **asdict(totals),
        "labelling_id": labelling.ledger.labelling_id,
        "root": labelling.ledger.root,
        "catalog_digest": labelling.catalog.digest,
        "run_id": labelling.job.run_id,
    }


def open_labelling(
    config: LabelConfig, task: str, *, check: Callable[[Catalog, CheckpointMeta], object] | None = None
) -> Labelling:
    """Find and check everything that a labelling needs, and pin its plan; Ray is not started.

    Args:
        task: the verb, for the lines that are printed.
        check: called before anything is written; raises what it finds wrong.

    Raises:
        KinorayError: as `label`.
    """
    storage = Storage(config.storage)
    checkpoint = find_checkpoint(storage, absolute(config.checkpoint))
    model, meta = load_model(storage, checkpoint)  # here first: what is wrong with it is said before workers start
    clip = _clip(config, meta.clip, model.input_spec)
    views = PROTOCOLS[config.protocol].views(config.view_average)
    top_k = min(config.top_k, len(meta.labels))
    settings = {
        "clip": asdict(clip),
        "views": asdict(views),
        "all_scores": config.all_scores,
        "top_k": top_k,
        "batch_size": config.batch_size,
        "inference": asdict(config.inference),
        "labels": list(meta.labels),
    }
    catalog = catalog_of_source(storage, absolute(config.source)).select(config.split)
    if check is not None:
        check(catalog, meta)
    keys = row_keys(catalog.table)
    folder = labelling_id(meta.model_digest, digest(settings))
    out = absolute(config.out).rstrip("/")
    ledger = Ledger(storage, join(out, folder))
    record = {"model_digest": meta.model_digest, "config_digest": digest(settings), "checkpoint": checkpoint}
    if ledger.pin_job({**record, "model": asdict(meta.model), **settings}):
        _say_others(storage, out, ledger.root, task)
    plan = ledger.plan(catalog.digest, keys, config.unit_size)
    job = LabelJob(
        storage=storage,
        root=ledger.root,
        checkpoint=checkpoint,
        model_digest=meta.model_digest,
        config_digest=digest(settings),
        run_id=uuid.uuid4().hex[:16],
        clip=clip,
        views=views,
        top_k=top_k,
        all_scores=config.all_scores,
        batch_size=config.batch_size,
        inference=config.inference,
        decode_tasks=config.resources.decode_tasks,
        torch_threads=max(1, int(config.resources.cpus_per_worker)),
        device="cuda" if config.resources.gpus_per_worker > 0 else "cpu",
    )
    print(f"{task}: {len(catalog)} videos, {len(meta.labels)} classes, checkpoint {checkpoint}", flush=True)
    if views.num_views > 1:
        print(f"{task}: protocol {config.protocol}, {views.num_views} views of each video", flush=True)
    clips = -(-len(catalog) // config.resources.num_workers) * views.num_views
    if job.device == "cpu" and (advice := compile_advice(model.input_spec, clip, config.inference, clips)):
        print(f"{task}: {advice}", flush=True)
    return Labelling(catalog=catalog, keys=keys, meta=meta, job=job, ledger=ledger, plan=plan)


def run_labelling(labelling: Labelling, resources: ResourcesConfig, task: str) -> Totals:
    """Label the units that are missing, check the whole table, declare it complete and print what it holds.

    Raises:
        KinorayError: as `label`, but for TooManyBad.
    """
    ledger, plan = labelling.ledger, labelling.plan
    done = ledger.committed()
    missing = [unit for unit in plan.units if unit.unit_id not in done]
    already = plan.num_rows - sum(unit.num_rows for unit in missing)
    if already:
        print(f"{task}: {already} of {plan.num_rows} videos are labelled already, {plan.num_rows - already} to do")
    if missing:
        connect(resources)
        require_fit(resources)
        progress = Progress(plan.num_rows, task, "videos", already=already)
        for result in _run_units(labelling, _rotated(missing, labelling.job.run_id), resources):
            progress.update(result["rows"], quarantined=result["quarantined"])
        progress.close()
    totals = ledger.check(plan, labelling.keys)
    ledger.finish(plan, totals)
    _print_totals(totals, task)
    return totals


def refuse_too_many_bad(totals: Totals, max_bad_fraction: float, root: str) -> None:
    """Raise TooManyBad where more than this share of the inputs was quarantined."""
    if totals.quarantined > max_bad_fraction * totals.inputs:
        share = totals.quarantined / totals.inputs
        raise TooManyBad(
            f"{totals.quarantined} of {totals.inputs} videos ({share:.1%}) were quarantined, max_bad_fraction allows "
            f"{max_bad_fraction:.1%}: {_reasons(totals)}; the table in {root} is complete all the same and names them"
        )


def _clip(config: LabelConfig, trained: ClipConfig, spec: InputSpec) -> ClipConfig:
    """What each view holds.

    Raises:
        ConfigError: the model cannot be fed with that.
    """
    clip = PROTOCOLS[config.protocol].clip(trained)
    if config.num_segments is not None:
        clip = replace(clip, sample=replace(clip.sample, num_segments=config.num_segments))
    try:
        check_clip(spec, clip)
    except ConfigError as error:
        raise ConfigError(f"protocol {config.protocol}: {error}") from None
    return clip


def _say_others(storage: Storage, out: str, root: str, task: str) -> None:
    """A new labelling beside others: never mixed with them, and never unnoticed."""
    try:
        others = [other for other in find_labellings(storage, out) if other != root]
    except ObjectNotFound:
        return
    if others:
        print(f"{task}: {out} holds results of another model or other settings ({', '.join(others)}); they stay apart")


def _rotated(units: list[Unit], run_id: str) -> list[Unit]:
    """Begin somewhere else in every job, so that two jobs on one catalog meet at the end, not at every unit."""
    start = int(run_id, 16) % len(units)
    return units[start:] + units[:start]


def _run_units(labelling: Labelling, units: list[Unit], resources: ResourcesConfig) -> Iterator[dict[str, Any]]:
    """One row of counts for each unit, as they finish. A row with an error becomes that error here."""
    quiet_ray()
    position = {key: row for row, key in enumerate(labelling.keys)}
    packed = [pack_unit(unit, labelling.catalog.table.take([position[key] for key in unit.keys])) for unit in units]
    per_block = -(-len(packed) // _MAX_BLOCKS)
    blocks = [pa.Table.from_pylist(packed[start : start + per_block]) for start in range(0, len(packed), per_block)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        LabelUnits,
        fn_constructor_args=(labelling.job,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.num_workers, len(blocks)),
            max_tasks_in_flight_per_actor=1,  # a unit waits for a free worker, not behind a slow one
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for result in batch.to_pylist():
                if result["error_class"]:
                    raise _error_of(result)
                yield result
    except RayTaskError:
        raise  # a bug: its traceback is what is needed
    except RayError as error:
        text = " ".join(str(error).split())
        raise ClusterError(
            f"the workers were lost and did not come back: {text}; what is committed stays, run the same command again"
        ) from error


def _error_of(result: dict[str, Any]) -> KinorayError:
    kind = getattr(errors, result["error_class"], KinorayError)
    error: KinorayError = kind(result["error_text"])
    return error


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in totals.reasons.items())


def _print_totals(totals: Totals, task: str) -> None:
    print(
        f"{task}: {totals.inputs} inputs = {totals.labelled} labelled + {totals.quarantined} quarantined + "
        f"{totals.skipped} skipped"
    )
    if totals.damaged:
        print(f"{task}: {totals.damaged} of the labelled videos have frames that would not decode (frames_corrupt)")
    if totals.quarantined:
        print(f"{task}: quarantined: {_reasons(totals)}")
        for video_id, reason in totals.examples:
            print(f"{task}:   {video_id}: {reason}")
        if totals.quarantined > len(totals.examples):
            print(f"{task}:   and {totals.quarantined - len(totals.examples)} more, in the table's rows quarantined")
