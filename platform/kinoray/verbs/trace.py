"""Config tree of the verb `trace`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.shared import StorageConfig

__all__ = ["TraceConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """Say where the time of a labelling or a training went, from what it left in storage.

    Example: kinoray trace labels/library --to trace.json

    For each run of a labelling: how long until its first unit began, how busy its workers were between their first and
    last unit, what they waited for, and the slowest units. For a training: starts, waiting for decoders, steps,
    scoring, and the time between epochs. It may be asked while the job runs.
    """

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    """What `label` or `evaluate` wrote (--out, or one labelling's folder in it), or a run folder of `train`."""
    to: str = ""
    """File or s3:// object for the spans, to be opened in https://ui.perfetto.dev or chrome://tracing."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""
