"""Table 2 of the paper as a study over tune's grid: what STC and MFF do on any packed set, others beside them.

python jobs/ablate.py sets/binding --generate --out runs/ablation     # makes the generated set first (docs/ablation.md)
ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/ablate.py s3://bucket/set --out s3://bucket/runs/ablation --resources.num-workers 2
"""

import sys
from dataclasses import dataclass, field, fields, replace

from kinoray.cli import guarded, parse_settings
from kinoray.config.shared import (
    AugmentConfig,
    CacheConfig,
    ClipConfig,
    FlowConfig,
    ModelConfig,
    SampleConfig,
    ViewConfig,
    require,
)
from kinoray.console import end_process
from kinoray.demo.binding import make_binding_set
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.tune.config import TuneConfig
from kinoray.tune.study import ROWS, found_trials, score_orders, study_trials
from kinoray.tune.study_page import Study, study_page, study_plot
from kinoray.tune.verb import tune

__all__ = ["AblateConfig", "ablate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig(TrainConfig):
    """Train the rows of the paper's table 2, TSN, TSM and VCM-SDD/X on a packed set with several seeds; tabulate them.

    Example: python jobs/ablate.py sets/binding --generate --out runs/ablation

    The settings are those of `kinoray train`, and each run is a trial of a sweep (OUT/trials): the same command again
    trains what is missing and nothing else; other seeds and rows join those in OUT. OUT/ablation.md has the tables:
    top-1 with each segment's frames in order, reversed and shuffled, costs, paired differences; OUT/ablation.svg shows
    top-1 against cost. The defaults are for the generated set.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    """Every row is trained once with each of these."""
    rows: tuple[str, ...] = ()
    """Only these: tsn_rgb, tsn_flow, tsm_rgb, tsm, no_stc_no_mff, stc, mff, mff_dim, stc_mff, stc_mff_dim, x_rgb,
    x_flow, x. Default: all."""
    generate: bool = False
    """Make the generated set and pack it to CATALOG first, if it is not there."""
    num_videos: int = 1600
    """generate: training videos, a multiple of the 8 classes, and as many to score."""
    quick: bool = False
    """Shows that it works: 1 epoch, 1 seed, 96 generated videos of each split. Its numbers mean nothing."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(options={"backbone": "tiny", "heads": 4}))
    """Options of all networks (the backbone's), and of VCM-SDD; rows set stc, mff and scale."""
    clip: ClipConfig = field(
        default_factory=lambda: ClipConfig(
            sample=SampleConfig(num_segments=2, frames_per_segment=4),
            # Random places of training stand against learning by heart; a mirror would swap left and right.
            view=ViewConfig(resize_px=72, crop_px=64, train_scales=(1.0,), train_flip=False),
            flow=FlowConfig(preset="medium", bound_px=4.0),
        )
    )
    """What the networks are fed."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(num_views=20))
    """As many views as epochs: each epoch draws its own, and all rows of a seed share them."""
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(gb=30.0))
    """All runs share one decode, as in `kinoray tune`; by default what three seeds see of the generated set fits."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        distinct = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(distinct and min(self.seeds) >= 0, "seeds", "different whole numbers of at least 0", self.seeds)
        known = [row.name for row in ROWS]
        require(set(self.rows) <= set(known), "rows", f"of {', '.join(known)}", self.rows)
        require(self.num_videos >= 8 and self.num_videos % 8 == 0, "num_videos", "a multiple of 8", self.num_videos)
        require(self.model.factory == "vcm_sdd", "model.factory", "left out: the rows name it", self.model.factory)


def ablate(config: AblateConfig) -> str:
    """Train what is missing; write, print and return the table."""
    if config.quick:
        quick = replace(config.optim, epochs=1)
        config = replace(config, seeds=config.seeds[:1], num_videos=min(96, config.num_videos), optim=quick)
    shared = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    sweep = TuneConfig(**shared | {"model": ModelConfig()}, grace_epochs=config.optim.epochs)
    storage = Storage(config.storage)
    if config.generate and not storage.exists(join(config.catalog, "catalog.parquet")):
        with scratch_folder("ablate") as folder:
            videos = folder / "videos"
            make_binding_set(videos, config.num_videos)
            pack(PackConfig(source=str(videos), out=config.catalog, storage=config.storage, resources=config.resources))
    chosen = [row for row in ROWS if not config.rows or row.name in config.rows]
    tune(sweep, study_trials(config.model.options, config.seeds, chosen))
    base = TrainConfig(**shared)
    found, others = found_trials(storage, config.out, config.model.options)
    score_orders(base, [row.settings for row in found if row.status == "finished"])
    study = Study(storage, base, found, others)
    page = study_page(study)
    storage.put(join(config.out, "ablation.md"), page.encode())
    storage.put(join(config.out, "ablation.svg"), study_plot(study).encode())
    print(f"\n{page}")
    return page


def main() -> int:
    job = parse_settings("ablate", AblateConfig, sys.argv[1:], ("generate", "seeds", "rows"), "python jobs/ablate.py")
    if job is not None:
        ablate(job)
    return 0


if __name__ == "__main__":
    end_process(lambda: guarded("ablate", main))
