"""What happens in a job, as log records with ids: run, unit, video. `resources.logs json` makes Ray write them as JSON.

Without that nobody hears them: a job's output stays what people read.
"""

import logging
from collections.abc import Mapping

__all__ = ["log_event"]

_LOG = logging.getLogger("kinoray.events")
_LOG.addHandler(logging.NullHandler())  # else Python prints warnings that no handler takes


def log_event(what: str, ids: Mapping[str, str | int | float], *, bad: bool = False) -> None:
    """Log something that happened; `ids` become fields of the record. `bad`: as a warning."""
    _LOG.log(logging.WARNING if bad else logging.INFO, what, extra=ids)
