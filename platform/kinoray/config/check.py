"""What a setting must be, and the error that says so."""

import glob
import os
import re

from kinoray.errors import ConfigError

__all__ = ["check_fraction", "in_full", "require", "require_gpus"]

_GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvmap", "/dev/kfd")  # of a server, of WSL, of a Jetson, of AMD


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError naming the field unless the condition holds."""
    if not condition:
        got = "nothing" if found in ("", (), None) else repr(found)
        raise ConfigError(f"{name} must be {expected}, got {got}")


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless the value is a share, 0 .. 1."""
    require(0 <= value <= 1, name, "in 0 .. 1", value)


def require_gpus(config: object) -> None:
    """Refuse a job that wants GPUs for a Ray of its own on a machine that has none: no library has to be asked.

    Raises:
        ConfigError: as said.
    """
    resources = getattr(config, "resources", None)
    wanted = getattr(resources, "gpus_per_worker", 0.0)
    if not wanted or getattr(resources, "address", None) or os.environ.get("RAY_ADDRESS"):
        return
    if not any(glob.glob(pattern) for pattern in _GPUS):
        raise ConfigError(
            f"resources.gpus_per_worker {wanted:g}: this machine has no GPU that can be used ({_GPUS[0]}); leave it "
            "out and the model runs on CPUs, or name a cluster that has some (resources.address)"
        )


def in_full(place: str, message: str) -> str:
    """A part's error with its settings as the whole tree names them: at `clip.view`, view.crop_px is clip.view.crop_px.

    A part does not know where it is; it calls its settings by its own name.
    """
    above, _, own = place.rpartition(".")
    return re.sub(rf"(?<![\w.]){re.escape(own)}\.(?=\w)", f"{place}.", message) if above else message
