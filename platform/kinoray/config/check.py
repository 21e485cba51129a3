"""What a setting must be, and the error that says so."""

from kinoray.errors import ConfigError

__all__ = ["require"]


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError naming the field unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {found!r}")
