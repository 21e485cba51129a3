"""Label every video of a source, exactly once: plan, run what is missing on Ray, check, declare complete.

What is easy to break: all state is in the ledger (kinoray.label.ledger), none in Ray or in this process, so that
killing anything and running the same command again gives the same table.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kinoray.catalog.quarantine import Refusal, error_of
from kinoray.catalog.table import Catalog
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress, format_duration, kept_if_interrupted, many, table, visible
from kinoray.errors import ConfigError, TooManyBad
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import Ledger, Totals
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.times import STAGES, bound_stage
from kinoray.label.unit import Plan, Unit
from kinoray.label.work import UNIT_COLUMNS
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
        "catalog_digest": labelling.catalog.digest,
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
    already = plan.num_rows - sum(unit.num_rows for unit in missing)
    if already:
        of = f"of {many(plan.num_rows, 'video')} {'is' if plan.num_rows == 1 else 'are'}"
        print(f"{task}: {already} {of} labelled already, {plan.num_rows - already} to do")
    if missing:
        progress = Progress(plan.num_rows, task, "videos", already=already)
        with kept_if_interrupted(lambda: _kept(ledger, plan) if is_kept else "nothing is kept"):
            work = _work(labelling, missing)
            for result in run_units(labelling, work, len(missing), resources, task, progress, workers):
                stages.update({stage: result[f"{stage}_s"] for stage in STAGES})
                progress.note(f"bound by {bound_stage(stages)}")
                progress.update(result["rows"], part=result["unit_id"], quarantined=result["quarantined"])
        progress.close()
    totals = ledger.check(plan, labelling.keys)
    ledger.finish(plan, totals)
    _print_totals(totals, task)
    to_do, wall_s = plan.num_rows - already, time.monotonic() - start
    record = {"began": began.isoformat(timespec="seconds"), "wall_s": wall_s, "already": already, "labelled_now": to_do}
    record |= {"videos_per_s": to_do / wall_s, "waited_s": {stage: float(stages[stage]) for stage in STAGES}}
    about = {"task": task, "catalog_digest": plan.catalog_digest, "checkpoint": labelling.job.checkpoint}
    uri = ledger.summarize(labelling.job.run_id, {**about, **record, "totals": asdict(totals)})
    if is_kept:
        print(f"{task}: summary in {uri}")
    return totals


def _work(labelling: Labelling, units: list[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
    """Units with their rows, from somewhere else in every job: so two jobs on one catalog meet at the end."""
    position = {key: row for row, key in enumerate(labelling.keys)}
    # In one chunk: pyarrow's take copies a column of several chunks whole, every time (10 minutes for 10^6 videos).
    table = labelling.catalog.table.select(list(UNIT_COLUMNS)).combine_chunks()
    start = int(labelling.job.run_id, 16) % len(units)
    for unit in units[start:] + units[:start]:
        yield unit, table.take([position[key] for key in unit.keys])


def _kept(ledger: Ledger, plan: Plan) -> str:
    done = ledger.committed()
    rows = sum(unit.num_rows for unit in plan.units if unit.unit_id in done)
    return f"{rows} of {many(plan.num_rows, 'video')} have their row, which stays; the same command labels the rest"


def _say_plan(labelling: Labelling) -> dict[str, Any]:
    """What is done and what a labelling would do."""
    found = preview(labelling.ledger, labelling.catalog, labelling.keys, labelling.plan)
    size = "" if found.size_bytes is None else f", {found.size_bytes:,} bytes to read"
    print(f"label: {many(found.videos, 'video')} = {found.done} done + {found.new} new + {found.changed} changed")
    print(f"label: {found.new + found.changed} to label in {many(found.units, 'unit')}{size}")
    if found.empty:
        which = f"{found.empty:,} of them {'is' if found.empty == 1 else 'are'}"
        print(f"label: {which} not there, or without a byte, and would be quarantined: {visible(found.first_empty)}")
    if found.gone:
        print(f"label: {many(found.gone, 'row')} of videos that are no longer in the source; kept, and not shown")
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
    """Rows of videos that are not in this catalog; they stay, and do not show in its table."""
    size_bytes: int | None
    """Bytes of the videos to do; None where the catalog does not know all their sizes."""
    empty: int
    """Of the videos to do, those that are not there or have no bytes, as far as the catalog knows their sizes."""
    first_empty: str
    """The address of one of them."""
    units: int
    """Units of work to do."""


def preview(ledger: Ledger, catalog: Catalog, keys: Sequence[str], plan: Plan) -> Preview:
    """Compare a catalog with what is committed.

    Args:
        keys: `row_keys` of the catalog.
        plan: its plan, stored or not.
    """
    committed = ledger.committed()
    missing = [unit for unit in plan.units if unit.unit_id not in committed]
    to_do = {key for unit in missing for key in unit.keys}
    places = [place for place, key in enumerate(keys) if key in to_do]
    rows = catalog.table.select(["video_id", "uri", "size_bytes"]).take(pa.array(places, pa.int64())).to_pylist()
    known = set(keys)
    older = {unit.unit_id: unit for before in ledger.plans() for unit in before.units if unit.unit_id in committed}
    gone = [unit for unit in older.values() if not known.issuperset(unit.keys)]
    left: dict[tuple[str, str], str] = {}
    for rows_left in ledger.read_units(gone, _NAMED):
        for row in rows_left.to_pylist():
            if row["row_key"] not in known:
                left[row["video_id"], row["uri"]] = row["row_key"]
    changed = sum((row["video_id"], row["uri"]) in left for row in rows)
    sizes = [row["size_bytes"] for row in rows]
    empty = [row["uri"] for row in rows if row["size_bytes"] == 0]
    return Preview(
        videos=len(keys),
        done=len(keys) - len(to_do),
        new=len(to_do) - changed,
        changed=changed,
        gone=len(left) - changed,
        size_bytes=None if None in sizes else sum(sizes),
        empty=len(empty),
        first_empty=empty[0] if empty else "",
        units=len(missing),
    )


def refuse_too_many_bad(totals: Totals, max_bad_fraction: float, root: str) -> None:
    """Raise TooManyBad where more than this share of the inputs was quarantined."""
    if totals.quarantined > max_bad_fraction * totals.inputs:
        share = totals.quarantined / totals.inputs
        raise TooManyBad(
            f"{totals.quarantined} of {totals.inputs} videos ({share:.1%}) were quarantined, max_bad_fraction allows "
            f"{max_bad_fraction:.1%}: {_reasons(totals)}; the table in {root} is complete all the same and names them"
        )


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in totals.reasons.items())


def _print_totals(totals: Totals, task: str) -> None:
    print(
        f"{task}: {many(totals.inputs, 'input')} = {totals.labelled} labelled + {totals.quarantined} quarantined + "
        f"{totals.skipped} skipped"
    )
    if totals.damaged:
        print(f"{task}: {many(totals.damaged, 'labelled video')} with frames that would not decode (frames_corrupt)")
    if totals.quarantined:
        print(f"{task}: quarantined: {_reasons(totals)}")
        for video_id, reason in totals.examples:
            print(f"{task}:   {visible(video_id)}: {visible(reason)}")
        if totals.quarantined > len(totals.examples):
            print(f"{task}:   and {totals.quarantined - len(totals.examples)} more, in the table's rows quarantined")
