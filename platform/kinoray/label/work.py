"""What the driver of a labelling hands to its workers, and what it hears of the network from the first of them.

What is easy to break: the driver needs no torch, which takes seconds and most of a gigabyte. So nothing here imports
it, and what only the built network knows comes from a worker as plain values.
"""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kinoray.catalog.table import REFERENCE_COLUMNS
from kinoray.config.scoring import ScorerConfig, SegmentConsensus, ViewsConfig
from kinoray.config.shared import ClipConfig
from kinoray.label.answers import AnswerRule
from kinoray.label.unit import Unit
from kinoray.storage.objects import Storage

__all__ = ["UNIT_COLUMNS", "LabelJob", "NetworkFacts", "pack_unit"]

UNIT_COLUMNS = ("video_id", *REFERENCE_COLUMNS)
"""Columns of a catalog that a worker needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelJob:
    """What all workers of a job share; small, since it is pickled to each."""

    storage: Storage
    root: str
    """Folder of the labelling, where units are committed; "" where nothing is to be kept."""
    checkpoint: str
    model_digest: str
    config_digest: str
    run_id: str
    clip: ClipConfig
    num_decoders: int
    """Decoder processes of each worker."""
    torch_threads: int
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    answer: AnswerRule = field(default_factory=AnswerRule)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    device: str = "cpu"
    allow_factory: tuple[str, ...] = ()
    """Networks that do not ship with kinoray, and that the checkpoint may name."""
    protocol: str = ""
    """What the clip is of, for messages."""
    clips_a_worker: int = 0
    """About so many, for advice on compiling."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFacts:
    """What only the built network knows of a labelling."""

    consensus: SegmentConsensus | None
    """How it makes one answer of its segments; None for one that sees them together."""
    advice: tuple[str, ...]
    """Lines for people: where a flag contradicts what the network was made for, and whether compiling would pay."""
