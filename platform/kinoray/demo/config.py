"""Config tree of the verb `demo`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DemoConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Make a small set of real H.264 videos, then pack, train, evaluate, label and report on this machine.

    Example: kinoray demo --videos ~/Videos
    """

    out: str = "demo-out"
    """Folder for everything the demo makes."""
    storage: Literal["local", "s3"] = "local"
    """`s3` keeps the data in a local S3 server that the demo starts and stops (needs the s3-demo extra)."""
    videos: str = ""
    """A folder, prefix or list of videos of your own: the demo ends by asking DeepMind's I3D (Kinetics-400, 47 MB from
    the package index) about the first of them. Where the index cannot be reached, that is said."""
