"""What is said of a video depends on the video and the settings: not on what came before it, nor on who is beside it.

Whole jobs under kills, at more crops: tests/test_kills.py. What decoding gives: tests/test_same_frames.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from decode_reference import moving
from kinoray.config.shared import (
    ClipConfig,
    InferenceConfig,
    ResourcesConfig,
    SampleConfig,
    StorageConfig,
    ViewConfig,
)
from kinoray.demo.videos import make_video
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions, read_windows
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelUnits, pack_unit
from kinoray.label.verb import label
from kinoray.storage.objects import Storage
from kinoray.video.sandbox.pool import shared_sandbox
from label_models import save_untrained
from small_sets import LABELS

LOCAL = Storage(StorageConfig())
SIZES = ((48, 64), (96, 72), (80, 80))


def clip_of(crop_px: int) -> ClipConfig:
    return ClipConfig(
        sample=SampleConfig(num_segments=2, frames_per_segment=2),
        view=ViewConfig(resize_px=crop_px + 8, crop_px=crop_px),
    )


# By workers in this process with the settings of a job


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos of several sizes, some turned, one broken, and one that is longer than the others."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(9):
        height, width = SIZES[number % len(SIZES)]
        frames = moving(30 if number == 4 else 9 + number, height, width, number)
        (folder / f"{number}.mp4").write_bytes(make_video(frames, rotation=90 * (number % 3 == 1)))
    (folder / "5-broken.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    return folder


def config_of(library: Path, folder: Path, crop_px: int, **changes: Any) -> LabelConfig:
    """A labelling by an untrained VCM-SDD, whose rows hold every score."""
    checkpoint = folder / f"run-{crop_px}"
    if not checkpoint.exists():
        options = {"backbone": "tiny", "consensus": "probs", "scale": "dim"}
        save_untrained(LOCAL, str(checkpoint), LABELS, clip_of(crop_px), "vcm_sdd", **options)
    config = LabelConfig(source=str(library), checkpoint=str(checkpoint), out=str(folder / "out"), all_scores=True)
    return replace(config, **changes)


def label_here(config: LabelConfig, num_workers: int, *, backwards: bool = False) -> None:
    """Label with workers and decoders that have seen nothing yet."""
    shared_sandbox(1).close()
    labelling = open_labelling(config, "label")
    workers = [LabelUnits(labelling.job) for _ in range(num_workers)]
    units = labelling.plan.units[:: -1 if backwards else 1]
    for turn, (unit, rows) in enumerate(labelling.work(units)):
        (result,) = workers[turn % num_workers](pa.Table.from_pylist([pack_unit(unit, rows)])).to_pylist()
        assert result["error_text"] == ""


def tables_of(config: LabelConfig) -> list[pa.Table]:
    """All rows but what names the run, sorted; and those of windows."""
    rows = read_predictions(LOCAL, config.out).drop_columns(["run_id"]).sort_by("row_key").combine_chunks()
    if not config.window_s:
        return [rows]
    order = [("row_key", "ascending"), ("window", "ascending")]
    return [rows, read_windows(LOCAL, config.out).sort_by(order).combine_chunks()]


def assert_same_tables(found: LabelConfig, expected: LabelConfig) -> None:
    for ours, theirs in zip(tables_of(found), tables_of(expected), strict=True):
        different = [name for name in theirs.column_names if not ours.column(name).equals(theirs.column(name))]
        assert different == []
        assert ours.equals(theirs)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embeddings": {"embeddings": True},
    "segment scores": {"segment_scores": True},
    "early exit": {"early_exit": "exact", "num_segments": 8, "embeddings": True},
    "views": {"protocol": "5x3"},
    "windows": {"window_s": 0.5, "window_stride_s": 0.25},
    "windows at cuts": {"window_s": 0.5, "window_at_cuts": True},
    "bf16": {"inference": InferenceConfig(precision="bf16")},
    "two threads": {"resources": ResourcesConfig(cpus_per_worker=2.0)},
}


@pytest.mark.parametrize(("way", "crop_px"), [*((way, 44) for way in WAYS), ("plain", 96)])
def test_rows_do_not_depend_on_units_workers_or_order(library: Path, tmp_path: Path, way: str, crop_px: int) -> None:
    config = config_of(library, tmp_path, crop_px, **WAYS[way])
    whole = replace(config, out=str(tmp_path / "whole"), unit_size=64)
    label_here(whole, 1)
    (rows, *_) = tables_of(whole)
    assert rows.column("status").to_pylist().count("labelled") == 9
    assert len({str(scores) for scores in rows.column("scores").to_pylist()}) == 10
    for unit_size, num_workers, batch_size in ((2, 2, 8), (3, 1, 4)):
        parts = replace(config, out=str(tmp_path / f"of-{unit_size}"), unit_size=unit_size, batch_size=batch_size)
        label_here(parts, num_workers, backwards=True)
        assert_same_tables(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("early_exit", ["off", "exact"])
def test_rows_of_compiled_networks_do_not_depend_on_units(
    library: Path, tmp_path: Path, precision: Any, early_exit: Any
) -> None:
    inference = InferenceConfig(precision=precision, compile=True)
    config = config_of(library, tmp_path, 80, inference=inference, early_exit=early_exit)
    whole, parts = (replace(config, out=str(tmp_path / f"of-{size}"), unit_size=size) for size in (64, 2))
    label_here(whole, 1)
    label_here(parts, 2, backwards=True)
    assert_same_tables(parts, whole)


# By jobs


@pytest.mark.ray
def test_two_undisturbed_jobs_agree_in_every_bit(library: Path, ray_local: None, tmp_path: Path) -> None:
    """Each has workers and decoders of its own: one worker with everything in one unit, two with units of two."""
    config = config_of(library, tmp_path, 80)
    one = replace(config, out=str(tmp_path / "one"), resources=ResourcesConfig(num_workers=1))
    two = replace(config, out=str(tmp_path / "two"), resources=ResourcesConfig(num_workers=2), unit_size=2)
    for each in (one, two):
        label(each)
    assert_same_tables(two, one)
