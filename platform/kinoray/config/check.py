"""What a setting must be, and the error that says so."""

from kinoray.errors import ConfigError

__all__ = ["check_fraction", "require"]


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError naming the field unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {found!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless the value is a share, 0 .. 1."""
    require(0 <= value <= 1, name, "in 0 .. 1", value)
