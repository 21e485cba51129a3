"""What a setting must be, and the error that says so."""

import re

from kinoray.errors import ConfigError

__all__ = ["check_fraction", "in_full", "require"]


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError naming the field unless the condition holds."""
    if not condition:
        got = "nothing" if found in ("", (), None) else repr(found)
        raise ConfigError(f"{name} must be {expected}, got {got}")


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless the value is a share, 0 .. 1."""
    require(0 <= value <= 1, name, "in 0 .. 1", value)


def in_full(place: str, message: str) -> str:
    """A part's error with its settings as the whole tree names them: at `clip.view`, view.crop_px is clip.view.crop_px.

    A part does not know where it is; it calls its settings by its own name.
    """
    above, _, own = place.rpartition(".")
    return re.sub(rf"(?<![\w.]){re.escape(own)}\.(?=\w)", f"{place}.", message) if above else message
