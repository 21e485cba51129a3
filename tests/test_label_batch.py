"""batch_size 0: the first worker of a labelling finds a size, and every other one takes it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from kinoray.catalog.table import catalog_of_source
from kinoray.config.shared import ClipConfig, DecodeConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.errors import ConfigError
from kinoray.evaluation.config import EvaluateConfig
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.unit import Unit
from kinoray.network.checkpoint import load_meta
from kinoray.network.forward import CPU_BATCH
from kinoray.network.scorer import ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from label_models import save_untrained
from small_sets import LABELS, colour_video
from small_tables import job_record, planned
from tiny_models import OWN_NETWORKS

CLIP = ClipConfig(sample=SampleConfig(num_segments=1, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
STORAGE = Storage(StorageConfig())
NUM_VIDEOS = 10


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(NUM_VIDEOS):
        (folder / f"{number}.mp4").write_bytes(colour_video(LABELS[number % 3], number))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return save_untrained(STORAGE, uri, LABELS, CLIP, "label_models:mixing")


def result_of(
    videos: Path, checkpoint: str, root: Path, batch_size: int, clip: ClipConfig = CLIP
) -> tuple[dict[str, Any], Unit]:
    """What one worker says of the videos in one unit."""
    catalog, ledger = catalog_of_source(STORAGE, str(videos)), Ledger(STORAGE, str(root))
    ledger.pin_job(job_record(labels=load_meta(STORAGE, checkpoint).labels))
    (unit,) = planned(ledger, catalog.digest, row_keys(catalog.table), NUM_VIDEOS).units
    job = LabelJob(
        allow_factory=OWN_NETWORKS,
        storage=STORAGE,
        root=str(root),
        checkpoint=checkpoint,
        model_digest=load_meta(STORAGE, checkpoint).model_digest,
        config_digest="c" * 16,
        run_id="r" * 16,
        clip=clip,
        scorer=ScorerConfig(batch_size=batch_size),
        num_decoders=1,
        torch_threads=1,
    )
    (result,) = LabelUnits(job)(pa.Table.from_pylist([pack_unit(unit, catalog.table)])).to_pylist()
    return result, unit


def rows_of(videos: Path, checkpoint: str, root: Path, batch_size: int) -> list[dict[str, Any]]:
    result, unit = result_of(videos, checkpoint, root, batch_size)
    assert result["rows"] == NUM_VIDEOS, result
    table = Ledger(STORAGE, str(root)).read_unit(unit)
    return table.drop_columns(["model_digest", "config_digest", "run_id"]).to_pylist()


def test_on_a_cpu_it_is_the_default_and_written_down(videos: Path, checkpoint: str, tmp_path: Path) -> None:
    found = rows_of(videos, checkpoint, tmp_path / "found", 0)
    assert json.loads((tmp_path / "found" / "batch_size.json").read_text()) == {"batch_size": CPU_BATCH}
    assert found == rows_of(videos, checkpoint, tmp_path / "given", CPU_BATCH)
    assert not (tmp_path / "given" / "batch_size.json").exists()


def test_a_size_that_is_written_down_is_taken(videos: Path, checkpoint: str, tmp_path: Path) -> None:
    """The network mixes the clips of a batch, so that another size would show."""
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "batch_size.json").write_text('{"batch_size": 3}')
    found = rows_of(videos, checkpoint, tmp_path / "found", 0)
    assert found == rows_of(videos, checkpoint, tmp_path / "three", 3)
    assert found != rows_of(videos, checkpoint, tmp_path / "eight", 8)


def test_what_changes_digits_names_the_labelling_and_nothing_else_does(
    videos: Path, checkpoint: str, tmp_path: Path
) -> None:
    """On a CPU that is the number of threads (sums are split among them), on a GPU the batch size."""
    config = LabelConfig(allow_factory=OWN_NETWORKS, source=str(videos), checkpoint=checkpoint, out=str(tmp_path))

    def roots(on_gpu: bool, sizes: tuple[int, ...] = (8,), cpus: tuple[float, ...] = (1.0,)) -> set[str]:
        resources = [ResourcesConfig(gpus_per_worker=float(on_gpu), cpus_per_worker=cpu, num_workers=3) for cpu in cpus]
        configs = [replace(config, batch_size=size, resources=one) for size in sizes for one in resources]
        return {open_labelling(one, "label").ledger.root for one in configs}

    plain = {open_labelling(replace(config, unit_size=2), "label").ledger.root}
    assert roots(False, sizes=(0, 1, 3, 8), cpus=(0.5, 1.0, 1.9)) == plain
    assert len(roots(False, cpus=(1.0, 2.0, 4.0)) | plain) == 3
    assert len(roots(True, sizes=(0, 1, 3, 8)) | plain) == 5
    assert len(roots(True, cpus=(1.0, 4.0))) == 1


def test_decoding_on_gpus_is_refused_where_there_are_none() -> None:
    for verb in (LabelConfig, EvaluateConfig):
        source = {"source": "v"} if verb is LabelConfig else {"catalog": "c"}
        with pytest.raises(ConfigError, match=r"^decode\.device must be cpu without resources\.gpus_per_worker"):
            verb(**source, checkpoint="c", out="o", decode=DecodeConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"^clip\.decode\.device must be cpu in training; label and evaluate have"):
        TrainConfig(catalog="c", out="o", clip=ClipConfig(decode=DecodeConfig(device="cuda")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_without_a_gpu_ends_the_job_in_one_error(videos: Path, checkpoint: str, tmp_path: Path) -> None:
    on_gpu = replace(CLIP, decode=replace(CLIP.decode, device="cuda"))
    result, _ = result_of(videos, checkpoint, tmp_path, 3, on_gpu)
    assert result["error_class"] == "ConfigError"
    assert result["error_text"].startswith("decode.device cuda needs an NVIDIA GPU")
    assert result["rows"] == 0
