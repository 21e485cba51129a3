"""Label every video of a source, exactly once: plan, run what is missing on Ray, check, declare complete.

What is easy to break: all state is in the ledger (kinoray.label.ledger), none in Ray or in this process, so that
killing anything and running the same command again gives the same table.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinoray.catalog.rows import Refusal, error_of
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress, format_duration, kept_if_interrupted, many, table, visible
from kinoray.errors import ConfigError, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.keys import Pairs, join_pairs
from kinoray.label.ledger import Ledger
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.plan import Plan, gone_rows
from kinoray.label.planfile import shown_plans
from kinoray.label.times import STAGES, bound_stage
from kinoray.label.unit import Totals, Unit
from kinoray.label.work import rows_in
from kinoray.storage.objects import Storage, absolute

if TYPE_CHECKING:
    from kinoray.label.job import Workers

__all__ = ["Preview", "answer", "label", "preview", "refuse_too_many_bad", "run_labelling"]

_NAMED = ["video_id", "uri", "row_key"]


def label(config: LabelConfig) -> dict[str, Any]:
    """Label what is not labelled yet, check that every input has its row, and print the totals.

    Returns:
        The totals, with `labelling_id`, `root` (where the table is), `catalog_digest` and `run_id`. With config.plan:
        videos, done, new, changed, gone, size_bytes, empty and units. Without config.out: as `answer`.

    Raises:
        TooManyBad: more than max_bad_fraction were quarantined; the table is complete all the same.
        IncompleteOutput: rows are not inputs.
        KinorayError: the source, the checkpoint, the store or the cluster cannot be used.
    """
    if not config.out:
        return answer(config)
    start = time.monotonic()
    if config.plan:
        return _say_plan(open_labelling(config, "label"))
    from kinoray.label.job import Workers  # here: it imports ray, which a plan need not wait for

    with Workers(config.resources, "label") as workers:
        labelling = open_labelling(config, "label", look=workers.look)
        totals = run_labelling(labelling, config.resources, "label", workers=workers)
    print(f"label: complete in {format_duration(time.monotonic() - start)}; the table is in {labelling.ledger.root}")
    print(f"label: look at it with: kinoray report {labelling.ledger.root}", flush=True)
    refuse_too_many_bad(totals, config.max_bad_fraction, labelling.ledger.root)
    return {
        **asdict(totals),
        "labelling_id": labelling.ledger.labelling_id,
        "root": labelling.ledger.root,
        "catalog_digest": labelling.plan.catalog_digest,
        "run_id": labelling.job.run_id,
    }


def answer(config: LabelConfig) -> dict[str, Any]:
    """Print what the network says of one video; no Ray is started and nothing is written.

    Returns:
        uri, top (classes with their scores) and abstained.

    Raises:
        MediaError, StorageError: the video is one that a job would quarantine.
        KinorayError: the checkpoint or the store cannot be used.
    """

    from kinoray.label.predict import Model, is_one_video  # here: it imports torch, which a plan need not wait for

    def say(line: str) -> None:
        print(f"label: {visible(line)}", flush=True)

    source = absolute(config.source)
    if not is_one_video(Storage(config.storage), source):
        raise ConfigError(f"out must be given, since {config.source} is not one video")
    with Model(config, say=say, warn=say) as model:
        found = model.predict(source)
    if found.status == "quarantined":
        raise error_of(Refusal("label", str(found.error_class), f"{found.uri} is quarantined: {found.error_text}"))
    length = "" if found.duration_s is None else f"{found.duration_s:.1f} s long, "
    damaged = f", {found.frames_corrupt} more would not decode" if found.frames_corrupt else ""
    frames = f"{many(found.frames_decoded, 'frame')} decoded{damaged}, {many(found.views, 'clip')}"
    say(f"{found.uri}: {length}{frames}; {many(len(model.labels), 'class')} of {model.checkpoint}")
    rows = [(name, f"{score:.4f}") for name, score in found.top]
    print("\n".join(table(rows, head=("CLASS", "SCORE"), right=(1,))) if rows else "no class reaches the threshold")
    if found.abstained:
        say("abstained: below threshold or min_margin")
    return {"uri": found.uri, "top": found.top, "abstained": found.abstained}


def run_labelling(
    labelling: Labelling,
    resources: WorkersConfig,
    task: str,
    *,
    is_kept: bool = True,
    workers: "Workers | None" = None,
) -> Totals:
    """Label the units that are missing, check the whole table, declare it complete and print what it holds.

    Args:
        workers: of this labelling, which may have started. Default: others.
        is_kept: its folder stays, so that people may look into it.

    Raises:
        KinorayError: as `label`, but for TooManyBad.
    """
    from kinoray.label.job import run_units

    ledger, plan = labelling.ledger, labelling.plan
    began, start, stages = datetime.now(UTC), time.monotonic(), Counter[str]()
    done = ledger.committed()
    missing = [unit for unit in plan.units if unit.unit_id not in done]
    already = plan.num_rows - sum(len(unit.keys) for unit in missing)
    if already:
        of = f"of {many(plan.num_rows, 'video')} {'is' if plan.num_rows == 1 else 'are'}"
        print(f"{task}: {already:,} {of} labelled already, {plan.num_rows - already:,} to do")
    if missing:
        progress = Progress(plan.num_rows, task, "videos", already=already)
        with kept_if_interrupted(lambda: _kept(ledger, plan) if is_kept else "nothing is kept"):
            units = _rotated(missing, labelling.job.run_id)
            work = labelling.work(units)
            for result in run_units(labelling, work, len(units), resources, task, progress, workers):
                stages.update({stage: result[f"{stage}_s"] for stage in STAGES})
                progress.note(f"bound by {bound_stage(stages)}")
                progress.update(result["rows"], part=result["unit_id"], quarantined=result["quarantined"])
        progress.close()
    totals = ledger.check(plan, labelling.found.keys)
    ledger.finish(plan, totals, labelling.source)
    _print_totals(totals, task)
    to_do, wall_s = plan.num_rows - already, time.monotonic() - start
    record = {"began": began.isoformat(timespec="seconds"), "wall_s": wall_s, "already": already, "labelled_now": to_do}
    record |= {"videos_per_s": to_do / wall_s, "waited_s": {stage: float(stages[stage]) for stage in STAGES}}
    about = {"task": task, "catalog_digest": plan.catalog_digest, "checkpoint": labelling.job.checkpoint}
    uri = ledger.summarize(labelling.job.run_id, {**about, **record, "totals": asdict(totals)})
    if is_kept:
        print(f"{task}: summary in {uri}")
    return totals


def _rotated(units: list[Unit], run_id: str) -> list[Unit]:
    """Begin somewhere else in every job, so that two jobs on one catalog meet at the end, not at every unit."""
    start = int(run_id, 16) % len(units)
    return units[start:] + units[:start]


def _kept(ledger: Ledger, plan: Plan) -> str:
    done = ledger.committed()
    rows = sum(len(unit.keys) for unit in plan.units if unit.unit_id in done)
    return f"{rows:,} of {many(plan.num_rows, 'video')} have their row, which stays; the same command labels the rest"


def _say_plan(labelling: Labelling) -> dict[str, Any]:
    """What is done and what a labelling would do."""
    found = preview(labelling)
    size = "" if found.size_bytes is None else f", {found.size_bytes:,} bytes to read"
    print(f"label: {many(found.videos, 'video')} = {found.done:,} done + {found.new:,} new + {found.changed:,} changed")
    print(f"label: {found.new + found.changed:,} to label in {many(found.units, 'unit')}{size}")
    if found.empty:
        which = f"{found.empty:,} of them {'is' if found.empty == 1 else 'are'}"
        print(f"label: {which} not there, or without a byte, and would be quarantined: {visible(found.first_empty)}")
    if found.gone:
        print(f"label: {many(found.gone, 'row')} of videos that are no longer in the source; kept, and shown no more")
    print(f"label: nothing was written; the table is, or will be, in {labelling.ledger.root}", flush=True)
    return asdict(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """done + new + changed = videos."""

    videos: int
    """Inputs of the catalog."""
    done: int
    """That have their row."""
    new: int
    """That were never labelled with this model and these settings."""
    changed: int
    """That have a row under the same name and place, but are other files now: another size, checksum or shard place."""
    gone: int
    """Rows of older catalogs of the source whose videos are not in this one; they stay, and do not show any more."""
    size_bytes: int | None
    """Bytes of the videos to do; None where the catalog does not know all their sizes."""
    empty: int
    """Of the videos to do, those that are not there or have no bytes, as far as the catalog knows their sizes."""
    first_empty: str
    """The address of one of them."""
    units: int
    """Units of work to do."""


def preview(labelling: Labelling) -> Preview:
    """Compare a catalog with what is committed."""
    ledger, plan, folder = labelling.ledger, labelling.plan, labelling.scratch.folder
    committed = ledger.committed()
    missing = [unit for unit in plan.units if unit.unit_id not in committed]
    before, left = _gone(labelling, committed)
    to_do = Pairs(folder)
    num_to_do = sum(len(unit.keys) for unit in missing)
    size_bytes: int | None = 0
    empty, first_empty = 0, ""
    for rows in rows_in(labelling.rows, labelling.found.keys, ledger.labelling_id, missing):
        if before:
            to_do.add(_places_of(rows), np.zeros(rows.num_rows, np.int64))
        sizes = rows.column("size_bytes")
        size_bytes = None if size_bytes is None or sizes.null_count else size_bytes + pc.sum(sizes).as_py()
        none = rows.column("uri").filter(pc.fill_null(pc.equal(sizes, 0), False))
        empty += len(none)
        first_empty = first_empty or (none[0].as_py() if len(none) else "")
    changed = _num_common(before, to_do)
    return Preview(
        videos=plan.num_rows,
        done=plan.num_rows - num_to_do,
        new=num_to_do - changed,
        changed=changed,
        gone=sum(len(np.unique(places)) for places, _ in left.buckets()) - _num_common(left, to_do),
        size_bytes=size_bytes,
        empty=empty,
        first_empty=first_empty,
        units=len(missing),
    )


def _num_common(some: Pairs, others: Pairs) -> int:
    """How many numbers are in both."""
    return sum(len(np.intersect1d(one, other)) for (one, _), (other, _) in join_pairs(some, others))


def _gone(labelling: Labelling, committed: set[str]) -> tuple[Pairs, Pairs]:
    """Where videos that are not in the catalog lay: of all rows that there are, and of those that it replaces."""
    ledger, folder = labelling.ledger, labelling.scratch.folder
    found, replaced = Pairs(folder), Pairs(folder)
    older = [plan for plan in ledger.plans() if plan.catalog_digest != labelling.plan.catalog_digest]
    if older:
        shown = shown_plans(ledger, labelling.plan, labelling.source)
        kept = {unit.unit_id for plan in shown if plan is not labelling.plan for unit in plan.units}
        for unit_id, rows in gone_rows(labelling.found.keys, older, committed, folder):
            table = ledger.read_unit(Unit(unit_id, (), 0), _NAMED).take(pa.array(rows))
            places = _places_of(table)
            found.add(places, np.zeros(len(rows), np.int64))
            if unit_id not in kept:
                replaced.add(places, np.zeros(len(rows), np.int64))
    return found, replaced


def _places_of(table: pa.Table) -> NDArray[np.uint64]:
    """A number for each row's name and address, in this process; uint64 [N]."""
    rows = zip(table.column("video_id").to_pylist(), table.column("uri").to_pylist(), strict=True)
    return np.fromiter(map(hash, rows), np.int64, table.num_rows).view(np.uint64)


def refuse_too_many_bad(totals: Totals, max_bad_fraction: float, root: str) -> None:
    """Raise TooManyBad where more than this share of the inputs was quarantined."""
    if totals.quarantined > max_bad_fraction * totals.inputs:
        share = totals.quarantined / totals.inputs
        raise TooManyBad(
            f"{totals.quarantined:,} of {totals.inputs:,} videos ({share:.1%}) were quarantined, max_bad_fraction "
            f"allows {max_bad_fraction:.1%}: {_reasons(totals)}; the table in {root} is complete all the same and "
            "names them"
        )


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in totals.reasons.items())


def _print_totals(totals: Totals, task: str) -> None:
    print(
        f"{task}: {many(totals.inputs, 'input')} = {totals.labelled:,} labelled + {totals.quarantined:,} quarantined + "
        f"{totals.skipped:,} skipped"
    )
    if totals.damaged:
        print(
            f"{task}: {many(totals.damaged, 'labelled video')} with frames that are damaged or missing; their rows "
            "have them in frames_corrupt and frames_missing"
        )
    if totals.quarantined:
        print(f"{task}: quarantined: {_reasons(totals)}")
        for video_id, reason in totals.examples:
            print(f"{task}:   {visible(video_id)}: {visible(reason)}")
        if totals.quarantined > len(totals.examples):
            print(f"{task}:   and {totals.quarantined - len(totals.examples):,} more, in the table's rows quarantined")
