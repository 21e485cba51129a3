"""Label every video of a source, exactly once: plan, run what is missing on Ray, check, declare complete.

What is easy to break: all state is in the ledger (kinoray.label.ledger), none in Ray or in this process, so that
killing anything and running the same command again gives the same table.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from kinoray import errors
from kinoray.cluster.connect import connect, quiet_ray, require_fit
from kinoray.config.shared import ResourcesConfig
from kinoray.console import Progress, format_duration
from kinoray.errors import ClusterError, KinorayError, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.manifest import write_manifest
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.preview import preview
from kinoray.label.stage import UNIT_COLUMNS, LabelUnits, pack_unit
from kinoray.label.table import Totals, Unit
from kinoray.label.times import STAGES, bound_stage

__all__ = ["label", "refuse_too_many_bad", "run_labelling"]

_MAX_BLOCKS = 20_000  # each is a Ray object and a task; more units than this share blocks


def label(config: LabelConfig) -> dict[str, Any]:
    """Label what is not labelled yet, check that every input has its row, and print the totals.

    Returns:
        The totals, with `labelling_id`, `root` (where the table is), `catalog_digest` and `run_id`. With config.plan:
        videos, done, new, changed, gone, size_bytes and units.

    Raises:
        TooManyBad: more than max_bad_fraction were quarantined; the table is complete all the same.
        IncompleteOutput: rows are not inputs.
        KinorayError: the source, the checkpoint, the store or the cluster cannot be used.
    """
    start = time.monotonic()
    labelling = open_labelling(config, "label")
    if config.plan:
        return _say_plan(labelling)
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


def run_labelling(labelling: Labelling, resources: ResourcesConfig, task: str) -> Totals:
    """Label the units that are missing, check the whole table, declare it complete and print what it holds.

    Raises:
        KinorayError: as `label`, but for TooManyBad.
    """
    ledger, plan = labelling.ledger, labelling.plan
    began, start, stages = datetime.now(UTC), time.monotonic(), Counter[str]()
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
            stages.update({stage: result[f"{stage}_s"] for stage in STAGES})
            progress.note(f"bound by {bound_stage(stages)}")
            progress.update(result["rows"], quarantined=result["quarantined"])
        progress.close()
    totals = ledger.check(plan, labelling.keys)
    ledger.finish(plan, totals)
    write_manifest(ledger, plan)
    _print_totals(totals, task)
    to_do, wall_s = plan.num_rows - already, time.monotonic() - start
    record = {"began": began.isoformat(timespec="seconds"), "wall_s": wall_s, "already": already, "labelled_now": to_do}
    record |= {"videos_per_s": to_do / wall_s, "waited_s": {stage: float(stages[stage]) for stage in STAGES}}
    about = {"task": task, "catalog_digest": plan.catalog_digest, "checkpoint": labelling.job.checkpoint}
    uri = ledger.summarize(labelling.job.run_id, {**about, **record, "totals": asdict(totals)})
    print(f"{task}: summary in {uri}")
    return totals


def _say_plan(labelling: Labelling) -> dict[str, Any]:
    """What is done and what a labelling would do."""
    found = preview(labelling.ledger, labelling.catalog, labelling.keys, labelling.plan)
    size = "" if found.size_bytes is None else f", {found.size_bytes:,} bytes to read"
    print(f"label: {found.videos} videos = {found.done} done + {found.new} new + {found.changed} changed")
    print(f"label: {found.new + found.changed} to label in {found.units} units{size}")
    if found.gone:
        print(f"label: {found.gone} rows are of videos that are no longer in the source; they stay, and do not show")
    print(f"label: nothing was written; the table is, or will be, in {labelling.ledger.root}", flush=True)
    return asdict(found)


def refuse_too_many_bad(totals: Totals, max_bad_fraction: float, root: str) -> None:
    """Raise TooManyBad where more than this share of the inputs was quarantined."""
    if totals.quarantined > max_bad_fraction * totals.inputs:
        share = totals.quarantined / totals.inputs
        raise TooManyBad(
            f"{totals.quarantined} of {totals.inputs} videos ({share:.1%}) were quarantined, max_bad_fraction allows "
            f"{max_bad_fraction:.1%}: {_reasons(totals)}; the table in {root} is complete all the same and names them"
        )


def _rotated(units: list[Unit], run_id: str) -> list[Unit]:
    """Begin somewhere else in every job, so that two jobs on one catalog meet at the end, not at every unit."""
    start = int(run_id, 16) % len(units)
    return units[start:] + units[:start]


def _run_units(labelling: Labelling, units: list[Unit], resources: ResourcesConfig) -> Iterator[dict[str, Any]]:
    """One row of counts for each unit, as they finish. A row with an error becomes that error here."""
    quiet_ray()
    position = {key: row for row, key in enumerate(labelling.keys)}
    # In one chunk: pyarrow's take copies a column of several chunks whole, every time (10 minutes for 10^6 videos).
    table = labelling.catalog.table.select(list(UNIT_COLUMNS)).combine_chunks()
    per_block = -(-len(units) // _MAX_BLOCKS)
    blocks = []
    for start in range(0, len(units), per_block):
        few = units[start : start + per_block]
        packed = [pack_unit(unit, table.take([position[key] for key in unit.keys])) for unit in few]
        blocks.append(pa.Table.from_pylist(packed))
    # from_blocks, not from_arrow: that starts a remote task a block to learn what is known here.
    dataset = ray.data.from_blocks(blocks).map_batches(
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
