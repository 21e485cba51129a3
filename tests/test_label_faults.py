"""A labelling job over a store that fails at every twentieth request says what it says over a sound one."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faulty_s3 import faulty_s3
from kinoray.config.shared import ClipConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import class_names, make_broken, make_demo_set
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.verb import label
from kinoray.storage.objects import Storage, join
from label_models import save_untrained
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
LABELS = tuple(class_names())
UNIT_SIZE = 2


def rows_of(storage: Storage, out: str) -> list[dict[str, Any]]:
    """The table, without what names the run."""
    return read_predictions(storage, out).drop_columns(["run_id"]).sort_by("video_id").to_pylist()


@pytest.mark.slow
def test_a_faulty_store_changes_no_row(
    s3_server: str, s3_config: StorageConfig, bucket: str, ray_local: None, tmp_path: Path
) -> None:
    clean = Storage(s3_config)
    num_good = make_demo_set(tmp_path, videos_per_class=4, seed=5)
    videos = [path.read_bytes() for path in sorted(tmp_path.rglob("*.mp4"))]
    videos += [make_broken(kind, videos[0]) for kind in ("empty", "random")]
    for number, data in enumerate(videos):
        clean.put(join(bucket, "library", f"{number:02d}.mp4"), data)
    checkpoint = save_untrained(clean, join(bucket, "run"), LABELS, CLIP, "label_models:mixing")

    def run(config: StorageConfig, out: str) -> dict[str, Any]:
        return label(
            LabelConfig(
                allow_factory=OWN_NETWORKS,
                source=join(bucket, "library/"),
                checkpoint=checkpoint,
                out=join(bucket, out),
                unit_size=UNIT_SIZE,
                storage=config,
                resources=ResourcesConfig(num_workers=2),
            )
        )

    run(s3_config, "clean")
    with faulty_s3(s3_server) as proxy:
        proxy.rate, proxy.rng, proxy.everything = 0.05, random.Random(1), True
        proxy.kinds = tuple(kind for kind in proxy.kinds if kind != "flip")  # of listings: nothing could notice
        hasty = {"answer_timeout_s": 3.0, "stall_timeout_s": 0.5}
        totals = run(replace(s3_config, endpoint_url=proxy.url, **hasty), "faulty")
        assert proxy.met.total() >= 3, proxy.met
    assert (totals["inputs"], totals["labelled"], totals["quarantined"]) == (num_good + 2, num_good, 2)
    assert rows_of(clean, join(bucket, "faulty")) == rows_of(clean, join(bucket, "clean"))
