"""Whole runs under Ray: most of the recipe switched on, and the paper's on videos of Kinetics' shape and classes."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.config.shared import AugmentConfig, OptimConfig, TrainResourcesConfig
from kinoray.demo.videos import make_video
from kinoray.network.checkpoint import list_checkpoints, load_model_state
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig, k400_paper
from kinoray.train.runfolder import RunFolder
from kinoray.train.verb import train
from small_sets import set_in
from test_finetune import CLIP, TINY, saved


def kinetics_like(folder: Path, num_train: int, num_val: int) -> str:
    """Videos of 10 s, 340 x 256 pixels, 30 frames a second, and a catalog of 400 classes; returns where."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for index in range(num_train + num_val):
        coarse = rng.integers(0, 256, (300, 16, 17, 3))
        data = make_video(np.kron(coarse, np.ones((1, 16, 20, 1), int)).astype(np.uint8))
        path = folder / f"v{index}.mp4"
        path.write_bytes(data)
        rows.append(
            {
                "video_id": path.stem,
                "uri": str(path),
                "label": f"class {100 * index:03d}",
                "label_id": 100 * index,
                "split": "train" if index < num_train else "val",
            }
        )
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    labels = tuple(f"class {number:03d}" for number in range(400))
    catalog = Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), labels)
    save_catalog(Storage(), join(str(folder), "catalog.parquet"), catalog)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_papers_recipe_takes_steps(tmp_path: Path, ray_local: None) -> None:
    """Two steps of one video each and 2 of the 16 segments; everything else is the preset's."""
    preset = k400_paper()
    clip = dataclasses.replace(preset.clip, sample=dataclasses.replace(preset.clip.sample, num_segments=2))
    config = dataclasses.replace(
        preset,
        catalog=kinetics_like(tmp_path, num_train=2, num_val=1),
        out=str(tmp_path / "run"),
        clip=clip,
        optim=dataclasses.replace(preset.optim, epochs=1, batch_size=1),
        resources=TrainResourcesConfig(num_workers=1, decode_tasks=1),
    )
    result = train(config)
    assert (result["epochs"], result["steps"], result["samples"]) == (1, 2, 2)
    first, second = (row.loss for row in RunFolder(Storage(), config.out).steps())
    # Of 400 classes that it knows nothing of, a network gives each about 1 / 400.
    assert first == pytest.approx(np.log(400), abs=0.5)
    assert np.isfinite(second)  # one video a batch at a rate for 128: it may be anything


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_with_a_rich_recipe_stops_early_and_keeps_its_best(
    tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate so small that no epoch is better than the first scored one: patience ends the run."""
    uri, source = saved(tmp_path / "source", ("a", "b", "c", "d"))
    config = TrainConfig(
        catalog=set_in(tmp_path / "set", train=9, val=4),
        out=str(tmp_path / "run"),
        model=TINY,
        clip=CLIP,
        init_from=uri,
        eval_every=2,
        patience=2,
        keep_checkpoints=1,
        augment=AugmentConfig(colour_jitter=0.1, randaugment_ops=1, mixup_alpha=0.5, cutmix_alpha=1.0),
        optim=OptimConfig(
            epochs=20,
            batch_size=4,
            lr=1e-12,
            weight_decay=0.0,
            ema_decay=0.9,
            label_smoothing=0.1,
            class_balance=1.0,
            accumulate=2,
            recompute="all",
            freeze_bn=True,
            backbone_lr_factor=0.5,
        ),
        resources=TrainResourcesConfig(num_workers=2, decode_tasks=2),
    )
    result = train(config)

    said = capsys.readouterr().out
    assert f"train: starts from {uri}: " in said
    assert result["epochs"] == 6  # scored after 2, 4 and 6
    assert [row["epoch"] for row in result["metrics"] if "val_top1" in row] == [2, 4, 6]
    kept = {meta.epoch for _, meta in list_checkpoints(Storage(), config.out)}
    assert kept == {6}  # the newest, which is the best of equals, too
    state = load_model_state(Storage(), result["newest"])
    for name, value in source.items():
        if "classifier" not in name:
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-6, msg=name)

    again = train(config)
    assert "is finished (6 epochs); nothing is left to do" in capsys.readouterr().out
    assert again["newest"] == result["newest"]
    longer = dataclasses.replace(config, patience=3, eval_every=1)  # decides no weight, so the run may go on
    assert train(longer)["epochs"] > 6
