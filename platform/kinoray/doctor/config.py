"""Config tree of the verb `doctor`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from kinoray.config.shared import ClipConfig, JobConfig, require

__all__ = ["DoctorConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(JobConfig):
    """Say what is wrong with a set of videos, a machine, a store or a cluster, before money is spent.

    Example: kinoray doctor s3://bucket/library/ --out s3://bucket/checkup

    Example: kinoray doctor --bucket s3://bucket/prefix --address http://head:8265

    With SOURCE, its videos: everything is listed; a sample (by a hash of the names, so the same each time) is read and
    probed, and some of that is decoded, on this machine and without Ray. Without, this machine: versions, GPUs,
    decoders, memory, disk. With --bucket, what a store promises, tried in a folder that is removed again; with
    --address, a cluster and each of its nodes.

    Exits with 1 if a check is wrong, or more than max_bad_fraction of the sample is bad.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = ""
    """A folder or s3:// prefix of videos, a CSV, a pack's folder or a catalog (.parquet). Default: none, and this
    machine is examined."""
    bucket: Annotated[str, tyro.conf.arg(aliases=["--storage"], metavar="URI")] = ""
    """Folder or s3:// prefix that jobs will write to, whose semantics are tried. Default: none."""
    address: str = ""
    """Cluster to examine, in the forms that submit takes: http://HOST:8265, HOST:PORT of its GCS, auto. Default: none
    with SOURCE; without it, RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, if one is set."""
    out: str = ""
    """Folder or s3:// prefix for doctor.json (everything, and more than is printed) and bad.parquet. Default: none."""
    sample: int = 500
    """Videos that are read whole and probed; 0 for all."""
    decode_sample: int = 20
    """Probed videos that are decoded for the estimate of the cost, spread over codecs and sizes; 0 for none."""
    clip: ClipConfig = field(default_factory=lambda: ClipConfig().without_flow())
    """What would be decoded: frames, sizes, limits; with --clip.flow.estimator dis flow, too, as networks with a flow
    stream need it."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        is_known = self.bucket.startswith("s3://") or "://" not in self.bucket
        require(is_known, "bucket", "s3://bucket/prefix or a folder", self.bucket)
        for name in ("sample", "decode_sample"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
