"""The part of a labelling that is on Ray: workers that label units of work, and one row of counts from each unit.

What is easy to break: nothing is kept here. A worker that dies, or all of Ray, costs the units in flight and no more.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError, RayTaskError

from kinoray.catalog.quarantine import error_of, refusals_of_columns
from kinoray.cluster.connect import Lines, Teller, connect, loss_of, quiet_ray, require_fit
from kinoray.config.shared import WorkersConfig
from kinoray.console import Progress, many
from kinoray.errors import ClusterError
from kinoray.label.open import Labelling
from kinoray.label.stage import UNIT_COLUMNS, LabelUnits, pack_unit
from kinoray.label.unit import Unit

__all__ = ["run_units"]

_MAX_BLOCKS = 20_000  # each is a Ray object and a task; more units than this share blocks


def run_units(
    labelling: Labelling, units: list[Unit], resources: WorkersConfig, task: str, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Label units: one row of counts for each, as they finish (see `LabelUnits`).

    Args:
        progress: sees of a unit, by its id, how many of its videos are done; the units' rows are not added to it.

    Raises:
        ClusterError: the workers cannot be placed, or were lost.
        KinorayError: a unit could not be labelled; what is committed stays.
    """
    connect(resources)
    require_fit(resources)
    with Lines(progress) as lines:
        yield from _run_units(labelling, units, resources, task, lines)


def _run_units(
    labelling: Labelling, units: list[Unit], resources: WorkersConfig, task: str, lines: Lines
) -> Iterator[dict[str, Any]]:
    quiet_ray()
    units = _rotated(units, labelling.job.run_id)
    position = {key: row for row, key in enumerate(labelling.keys)}
    # In one chunk: pyarrow's take copies a column of several chunks whole, every time (10 minutes for 10^6 videos).
    table = labelling.catalog.table.select(list(UNIT_COLUMNS)).combine_chunks()
    per_block = -(-len(units) // _MAX_BLOCKS)
    blocks = []
    for start in range(0, len(units), per_block):
        few = units[start : start + per_block]
        packed = [pack_unit(unit, table.take([position[key] for key in unit.keys])) for unit in few]
        blocks.append(pa.Table.from_pylist(packed))
    num_workers = min(resources.num_workers, len(blocks))
    print(f"{task}: {many(num_workers, 'worker')} load{'s' if num_workers == 1 else ''} the network", flush=True)
    # from_blocks, not from_arrow: that starts a remote task a block to learn what is known here.
    dataset = ray.data.from_blocks(blocks).map_batches(
        LabelUnits,
        fn_constructor_args=(labelling.job, Teller(lines.box, num_workers)),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=num_workers,
            max_tasks_in_flight_per_actor=1,  # a unit waits for a free worker, not behind a slow one
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            failures = refusals_of_columns(batch.to_pydict())
            for result, failure in zip(batch.to_pylist(), failures, strict=True):
                if failure is not None:
                    raise error_of(failure)
                yield result
    except RayTaskError:
        raise  # a bug: its traceback is what is needed
    except RayError as error:
        raise ClusterError(
            f"the workers were lost and did not come back: {loss_of(error)}; what is committed stays, run the same "
            "command again"
        ) from error


def _rotated(units: list[Unit], run_id: str) -> list[Unit]:
    """Begin somewhere else in every job, so that two jobs on one catalog meet at the end, not at every unit."""
    start = int(run_id, 16) % len(units)
    return units[start:] + units[:start]
