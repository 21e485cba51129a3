"""What `kinoray calibrate` found for a model, written and read here: its temperature and margins for early exit."""

import json
from dataclasses import asdict, dataclass

from kinoray.config.shared import ClipConfig
from kinoray.errors import CheckpointMismatch, ConfigError
from kinoray.storage.objects import Storage, absolute
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json, record_of

__all__ = ["Calibrated", "MarginPoint", "load_calibration"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginPoint:
    """One margin, and what stopping there did to the calibration set."""

    max_changed: float
    """The share of videos that may get another top-1 than the full pass gives."""
    margin: float
    """The lowest margin from which on no higher one changed more."""
    changed: int
    """Videos of the set that did get another."""
    upper: float
    """Upper end of the 95% interval (Wilson) of that share: what may be expected of other videos."""
    segments_saved: float
    """Share of all segments that were not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """The file that `kinoray calibrate` writes."""

    model_digest: str
    num_segments: int
    frames_per_segment: int
    num_videos: int
    """Labelled videos of the set that were read."""
    temperature: float
    nll: tuple[float, float]
    """Mean negative log-likelihood at temperature 1, and at this one."""
    ece: tuple[float, float]
    """Expected calibration error at temperature 1, and at this one."""
    margins: tuple[MarginPoint, ...]
    """Empty for a network that does not see its segments one by one."""

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(asdict(self), indent=1).encode()

    def margin_for(self, max_changed: float, clip: ClipConfig) -> float:
        """The margin at which at most this share of the calibration set changed its top-1.

        Raises:
            ConfigError: it was not fitted, or for other clips.
        """
        sample = clip.sample
        if (sample.num_segments, sample.frames_per_segment) != (self.num_segments, self.frames_per_segment):
            raise ConfigError(
                f"calibration was made for {self.num_segments} x {self.frames_per_segment} frames, this labelling has "
                f"{sample.num_segments} x {sample.frames_per_segment}; run kinoray calibrate with the same protocol"
            )
        fitting = [point for point in self.margins if point.max_changed <= max_changed]
        if not fitting:
            raise ConfigError("calibration holds no margins: this network does not see its segments one by one")
        return fitting[-1].margin


def load_calibration(storage: Storage, uri: str, model_digest: str) -> Calibrated:
    """Read what `kinoray calibrate` wrote.

    Raises:
        StorageError: it cannot be read.
        ConfigError: it is not such a file.
        CheckpointMismatch: it is another model's.
    """
    place = absolute(uri)
    try:
        found = record_of(Calibrated)(parse_json(storage.read(place, max_bytes=MAX_RECORD_BYTES)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place} is not the calibration.json of kinoray calibrate: {error!r}") from error
    if found.model_digest != model_digest:
        raise CheckpointMismatch(
            f"{place} calibrates model {found.model_digest}, the checkpoint is {model_digest}; run kinoray calibrate "
            "with this checkpoint"
        )
    return found
