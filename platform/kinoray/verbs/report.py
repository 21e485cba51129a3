"""The config tree of `kinoray report`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.shared import StorageConfig, require

__all__ = ["ReportConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make a static site from predictions: numbers, contact strips, filters, classes, quarantine, corrections.

    Example: kinoray report s3://bucket/labels --out report

    OUT becomes a folder (or an s3:// prefix) with index.html, assets/ and data/. Open index.html where it lies, or
    serve the folder from a bucket: it needs no program of ours and no network. What you correct there stays in the
    browser until you download it as a CSV, which `kinoray correct` takes.
    """

    predictions: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTIONS")]
    """What `label` or `evaluate` wrote."""
    out: str = "report"
    """The site's folder or s3:// prefix; a site that is there is replaced."""
    catalog: str = ""
    """Labelled catalog to compare with; adds accuracy, precision, recall and confusion."""
    title: str = "kinoray report"
    """Heading of the site."""
    max_videos: int = 20_000
    """Videos listed, least certain first; the numbers always cover all."""
    max_strips: int = 2_000
    """Listed videos that get a contact strip, least certain first; each is read and decoded for it."""
    frames_per_video: int = 4
    """Frames in each contact strip; 0 for none."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage."""

    def __post_init__(self) -> None:
        require(self.max_videos >= 0, "max_videos", "at least 0", self.max_videos)
        require(self.max_strips >= 0, "max_strips", "at least 0", self.max_strips)
        require(0 <= self.frames_per_video <= 16, "frames_per_video", "in 0 .. 16", self.frames_per_video)
        require(bool(self.out), "out", "a folder or s3:// prefix", self.out)
        is_page = self.out.rstrip("/").lower().endswith((".html", ".htm"))
        require(not is_page, "out", "a folder or s3:// prefix (the report is a site now, no single page)", self.out)
