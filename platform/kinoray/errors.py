"""Every error that kinoray raises, and `require`, by which a setting says what it must be.

    KinorayError
      ConfigError               a setting is wrong; the message names the field (also a ValueError)
      StorageError              bytes could not be read or written
        ObjectNotFound          no such file, object or bucket
          BucketNotFound
        AccessDenied            the credentials may not do this
          BadCredentials        none were found, or the store does not take them: it says nothing of the object
        StorageUnavailable      still failing after all retries
        ChecksumMismatch        bytes arrived, but not the ones that were written
        ObjectTooLarge          more bytes than the reader takes; they were not read
      CatalogError              a table of videos is empty, lacks a column or names a video twice
      MediaError                one video is bad; becomes a quarantine row, never ends a job
        EmptyMedia              no bytes at all
        InvalidReference        the catalog's row cannot be: no such place, length or time
        UnreadableContainer     not a video file, or its index is lost
        NoVideoStream           a media file without pictures
        UndecodableVideo        a container that opens, but gives no frame
        MediaOverBudget         larger than the limits in the config allow
        DecodeTimeout           no answer from the decoder within decode.deadline_s
        DecoderCrashed          the decoder process died of it, or failed in a way that nobody foresaw
        DamagedArchive          the archive that holds it is cut or damaged inside it
      CheckpointError           a checkpoint is missing, broken, or of another model
        CheckpointNotFound
        CheckpointCorrupt
        CheckpointMismatch
      ModelError                a model cannot be built or fed as asked
      ClusterError              the cluster cannot be reached, or the job does not fit it
      JobError                  a job ran and must not be called a success
        TooManyBad              more than max_bad_fraction of the inputs were quarantined
        IncompleteOutput        rows out are not rows in
        TrainingDiverged        the loss is no longer a number
        DecoderStartFailed      no decoder process can be started here, so no video can be judged

A message says what failed, where (uri, member, field), what was found and expected, and what to do next, on one line.
"""

import re

__all__ = [
    "AccessDenied",
    "BadCredentials",
    "BucketNotFound",
    "CatalogError",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "ChecksumMismatch",
    "ClusterError",
    "ConfigError",
    "DamagedArchive",
    "DecodeTimeout",
    "DecoderCrashed",
    "DecoderStartFailed",
    "EmptyMedia",
    "IncompleteOutput",
    "InvalidReference",
    "JobError",
    "KinorayError",
    "MediaError",
    "MediaOverBudget",
    "ModelError",
    "NoVideoStream",
    "ObjectNotFound",
    "ObjectTooLarge",
    "StorageError",
    "StorageUnavailable",
    "TooManyBad",
    "TrainingDiverged",
    "UndecodableVideo",
    "UnreadableContainer",
    "check_fraction",
    "in_full",
    "require",
]


class KinorayError(Exception):
    """Base of all errors that kinoray raises on purpose."""


class ConfigError(KinorayError, ValueError):
    """A setting is wrong. The message starts with the field's full name."""


class StorageError(KinorayError):
    """Bytes could not be read or written."""


class ObjectNotFound(StorageError):
    """No such file, object or bucket."""


class BucketNotFound(ObjectNotFound):
    """No such bucket: what was asked of it says nothing of the object."""


class AccessDenied(StorageError):
    """The credentials may not do this."""


class BadCredentials(AccessDenied):
    """None were found, or the store does not take them: expired, unknown, wrong. No object could be read with them."""


class StorageUnavailable(StorageError):
    """The store kept failing until all retries were used up."""


class ChecksumMismatch(StorageError):
    """Bytes arrived, but not those that were written."""


class ObjectTooLarge(StorageError):
    """More bytes than the reader takes."""


class CatalogError(KinorayError):
    """A table of videos is empty, lacks a column, or names a video twice."""


class MediaError(KinorayError):
    """One video is bad. It becomes a quarantine row and never ends a job."""


class EmptyMedia(MediaError):
    """The file has no bytes."""


class InvalidReference(MediaError):
    """The catalog's row says what cannot be: of where the bytes are, or of when the clip begins and ends."""


class UnreadableContainer(MediaError):
    """Not a video file, or its index is lost."""


class NoVideoStream(MediaError):
    """A media file without pictures (audio only, say)."""


class UndecodableVideo(MediaError):
    """The container opens, but no frame comes out."""


class MediaOverBudget(MediaError):
    """Larger than decode.max_* allows."""


class DamagedArchive(MediaError):
    """The archive that holds the video is cut or damaged inside it."""


class DecodeTimeout(MediaError):
    """The decoder gave no answer within decode.deadline_s."""


class DecoderCrashed(MediaError):
    """The decoder process died while it worked on the video, or failed in a way that nobody foresaw."""


class CheckpointError(KinorayError):
    """A checkpoint is missing, broken, or of another model."""


class CheckpointNotFound(CheckpointError):
    """No whole checkpoint at that place."""


class CheckpointCorrupt(CheckpointError):
    """Files of a checkpoint do not match the digests written beside them."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to another model, label map or config."""


class ModelError(KinorayError):
    """A model cannot be built or fed as asked."""


class ClusterError(KinorayError):
    """The cluster cannot be reached, or the job does not fit it."""


class JobError(KinorayError):
    """A job ran, and its result must not be called a success."""


class TooManyBad(JobError):
    """More than max_bad_fraction of the inputs were quarantined."""


class IncompleteOutput(JobError):
    """Rows out are not rows in."""


class TrainingDiverged(JobError):
    """The loss is no longer a number."""


class DecoderStartFailed(JobError):
    """No decoder process can be started on this machine. That is no fault of any video."""


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
